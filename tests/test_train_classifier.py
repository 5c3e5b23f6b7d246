"""The comparison: fairness of the two arms, the probe, the run's settings, and the whole path on tiny data."""
import copy
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
import torchvision
from torch.nn.modules.module import register_module_forward_hook

import plots
import train_byol
import train_classifier
import utils
from byol import normalize
from conftest import HAS_GPU, small_encoder, trace_compiled
from data import Split, load_folds, load_split
from test_data import write_folder, write_stl10
from test_train_byol import TINY
from train_classifier import (BASELINE, BATCHNORM, RANDOM, WITH_BYOL, Cell, Trainee, answers_of, draw_subset, fine_tune,
                              fit_logistic, linear_probe, pack, reestimate_batchnorm, unpack)
from utils import extract_features, knn_predict, percent, read_constants, resolve_auto

CPU = torch.device("cpu")
QUICK = ["--epochs", "2", "--batch-size", "8", "--device", "cpu", "--precision", "fp32", "--labels-per-class", "all",
         "--learning-rate", "0.04"]


@pytest.fixture
def images(tmp_path, small):
    return write_folder(tmp_path / "images", per_class=10, unlabeled=20)


@pytest.fixture
def pretrained(images):
    assert train_byol.main(["--dataset", "images", *TINY, "--epochs", "1", "--run", "tiny"]) == 0
    return Path("runs/tiny")


def compare(*argv):
    return train_classifier.main(["--run", "tiny", *QUICK, *argv])


def results():
    return json.loads(Path("runs/tiny/results.json").read_text())


# ------------------------------------------------------------------------------------------------- the whole path

def test_a_comparison_fills_the_runs_folder(pretrained, drawn, capsys):
    assert compare("--labels-per-class", "3,all") == 0
    assert {"results.json", "classifier.pt"} <= {p.name for p in pretrained.iterdir()}
    assert all((pretrained / name).read_bytes().startswith(b"\x89PNG")
               for name in ("comparison.png", "label_efficiency.png", "neighbors.png"))
    found = results()
    assert ([(r["seed"], r["arm"], r["labels"]) for r in found["records"]]
            == [(s, a, b) for s in (0, 1, 2) for a in (BASELINE, WITH_BYOL) for b in (3, "all")])
    for labels in (3, "all"):
        for protocol, by_arm in found["summary"][str(labels)].items():
            for arm in (BASELINE, WITH_BYOL):
                of_arm = [r for r in found["records"] if (r["arm"], r["labels"]) == (arm, labels)]
                assert by_arm[arm] == [r[protocol] for r in of_arm]
                for r in of_arm:
                    assert 100 * unpack(r["right"][protocol], 20).double().mean().item() == pytest.approx(r[protocol])
            assert by_arm["gain"] == pytest.approx([b - a for a, b in zip(by_arm[BASELINE], by_arm[WITH_BYOL])])
    out = capsys.readouterr().out
    table = out[out.index("labels  test accuracy"):]
    assert all(name in table for name in ("fine-tuning", "linear probe", "kNN", "±", "seeds 0, 1, 2", "gain",
                                          "95% interval over seeds and test images", "one pretraining run; fine-tuned for 2 epochs, the last one", "all labels, fine-tuned"))
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_both_scripts_run_on_every_device_in_every_precision(images, device, precision):
    argv = ["--device", device.type, "--precision", {torch.float32: "fp32", torch.bfloat16: "bf16"}[precision]]
    types = []
    with register_module_forward_hook(lambda module, inputs, output: types.append((type(module), output.dtype))):
        assert train_byol.main(["--dataset", "images", *TINY, "--run", "tiny", *argv]) == 0
        assert compare("--seeds", "0", *argv) == 0
    assert {dtype for module, dtype in types if issubclass(module, torch.nn.Conv2d)} == {precision}, "in training and for features"
    config = json.loads(Path("runs/tiny/config.json").read_text())
    for where in (config["environment"], results()["environment"]):
        assert torch.device(where["device"]).type == device.type and where["precision"] == str(precision)[len("torch."):]
    for file in ("encoder.pt", "classifier.pt"):
        weights = torch.load(f"runs/tiny/{file}", weights_only=True)
        assert all(w.device.type == "cpu" and w.isfinite().all() and w.dtype != torch.bfloat16 for w in weights.values())


def test_compiled_fine_tuning_is_the_same_and_is_compiled_once(pretrained, monkeypatch, capsys):
    """What a GPU has recorded of the first training serves all: the same memory, the same graph, the same batch size."""
    addresses, build = [], train_classifier.build_optimizer

    def seen(network, *rest):
        addresses.append([value.data_ptr() for value in network.state_dict().values()])
        return build(network, *rest)

    argv = ["--labels-per-class", "all,3", "--seeds", "0,1", "--overwrite"]  # 6 images are no batch of 8: left alone
    assert compare(*argv) == 0
    eager = results()["records"]
    compiled = trace_compiled(monkeypatch)
    monkeypatch.setattr(train_classifier, "build_optimizer", seen)
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    assert compare(*argv) == 0 and not compiled, "8 trainings of 4 steps do not win back the time"
    addresses.clear()
    monkeypatch.setattr(train_classifier, "MIN_STEPS_TO_COMPILE", 32)
    assert compare(*argv) == 0 and len(compiled) == 2 and "compiling" in capsys.readouterr().out
    assert results()["records"] == eager
    assert len(addresses) == 8 and all(of_one == addresses[0] for of_one in addresses)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_what_a_gpu_records_of_fine_tuning_is_the_same_training(pretrained, monkeypatch):
    argv, networks = ["--device", "cuda", "--epochs", "4", "--seeds", "0,1"], {"eager": [], "replayed": []}
    tune = train_classifier.fine_tune

    def kept(*args):
        network = tune(*args)
        networks[kind].append({name: value.clone() for name, value in network.state_dict().items()})
        return network

    monkeypatch.setattr(train_classifier, "fine_tune", kept)
    for kind in networks:
        assert compare("--overwrite", *argv) == 0
        monkeypatch.setattr(train_classifier, "MIN_STEPS_TO_COMPILE", 4)
    assert len(networks["eager"]) == len(networks["replayed"]) == 4
    for a, b in zip(*networks.values()):
        for name in a:
            torch.testing.assert_close(b[name], a[name], atol=1e-2, rtol=1e-2)  # in TF32


def test_more_seeds_and_budgets_are_added_to_a_comparison(pretrained, monkeypatch):
    assert compare("--seeds", "0") == 0
    first = results()["records"]
    assert compare("--seeds", "0,1", "--labels-per-class", "3,all") == 0
    assert results()["records"][:2] == first and len(results()["records"]) == 8
    monkeypatch.setattr(train_classifier, "fine_tune", None)
    for name in ("comparison.png", "neighbors.png"):
        (pretrained / name).unlink()
    assert compare("--seeds", "0,1") == 0, "table and figures are made again without training"
    assert (pretrained / "comparison.png").exists() and (pretrained / "neighbors.png").exists()
    assert results()["summary"].keys() == {"all"} and len(results()["records"]) == 8


def test_results_of_another_precision_are_not_mixed(pretrained, monkeypatch, capsys):
    """A comparison of another machine, where the same constants chose another precision."""
    monkeypatch.setattr(utils, "has_native_bf16", lambda device: True)
    assert compare("--seeds", "0", "--precision", "auto") == 0
    monkeypatch.setattr(utils, "has_native_bf16", lambda device: False)
    assert compare("--seeds", "0,1", "--precision", "auto") == 1
    assert "other constants: precision bfloat16 -> float32;" in capsys.readouterr().err


def test_an_init_that_is_not_random_has_two_more_arms(images, tmp_path, capsys, monkeypatch):
    inits = []
    build = train_classifier.build_encoder
    monkeypatch.setattr(train_classifier, "build_encoder", lambda n, init, seed: inits.append(init) or build(n, init, seed))
    assert compare("--dataset", "images", "--image-size", "16", "--init", "weights.pt", "--seeds", "0") == 0
    assert [r["arm"] for r in results()["records"]] == [RANDOM, BASELINE, BATCHNORM]
    assert inits == ["random", "weights.pt", "weights.pt"]
    out = capsys.readouterr().out
    assert RANDOM in out and BATCHNORM in out


def test_controls_can_be_left_out_and_added_later(images, tmp_path, capsys):
    argv = ["--dataset", "images", "--image-size", "16", "--init", "weights.pt", "--seeds", "0"]
    assert compare(*argv, "--no-controls") == 0
    first = results()["records"]
    assert [r["arm"] for r in first] == [BASELINE] and RANDOM not in capsys.readouterr().out
    assert compare(*argv) == 0 and results()["records"][:1] == first
    assert [r["arm"] for r in results()["records"]] == [BASELINE, RANDOM, BATCHNORM]


def test_all_four_arms_reach_the_table_and_the_figures(images, drawn, capsys, monkeypatch):
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    assert train_byol.main(["--dataset", "images", *TINY, "--epochs", "1", "--init", "long/" * 20 + "weights.pt", "--run", "tiny"]) == 0
    asked, reestimate = [], train_classifier.reestimate_batchnorm
    monkeypatch.setattr(train_classifier, "reestimate_batchnorm", lambda *a: asked.append(a) or reestimate(*a))
    capsys.readouterr()
    assert compare("--labels-per-class", "3,all", "--seeds", "0") == 0 and len(asked) == 1
    rows = [*(arms := [RANDOM, BASELINE, BATCHNORM, WITH_BYOL]), "gain"]
    assert [r["arm"] for r in results()["records"]] == [arm for arm in arms for _ in range(2)]
    out = capsys.readouterr().out
    table = out.split("test accuracy (%)")[1]
    assert max(map(len, out.splitlines())) <= 80
    assert [table.index(f"   all  {row} ") for row in rows] == sorted(table.index(f"   all  {row} ") for row in rows)
    assert {"comparison.png", "label_efficiency.png", "neighbors.png"} <= {p.name for p in Path("runs/tiny").iterdir()}
    for legend in (figures[-3].axes[0].get_legend(), figures[-2].legends[0]):
        box, page = legend.get_window_extent(), legend.figure.bbox
        assert [text.get_text() for text in legend.texts] == arms and page.x0 <= box.x0 and box.x1 <= page.x1


def test_batchnorm_only_takes_on_the_statistics_of_the_images_and_moves_no_weight(generator):
    encoder, _ = small_encoder("", "random", 0)
    encoder.bn.running_mean.fill_(9)
    encoder.bn.num_batches_tracked.fill_(100)  # as in weights that were trained
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    pixels = torch.randint(0, 256, (130, 3, 16, 16), dtype=torch.uint8, generator=generator)
    reestimate_batchnorm(encoder, pixels, CPU, torch.float32, batch_size=64)
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())
    assert encoder.bn.num_batches_tracked == 2 and encoder.bn.momentum == 0.1, "whole batches; later training is as ever"
    seen = encoder.conv(normalize(pixels.float() / 255))
    torch.testing.assert_close(encoder.bn.running_mean, seen.mean(dim=(0, 2, 3)), atol=0.01, rtol=0)
    torch.testing.assert_close(encoder.bn.running_var, seen.var(dim=(0, 2, 3)), atol=0, rtol=0.05)


def test_stl10s_folds_are_the_labelled_subsets(tmp_path, small, monkeypatch, capsys):
    write_stl10(tmp_path / "data")
    subsets, tune = [], train_classifier.fine_tune
    monkeypatch.setattr(train_classifier, "fine_tune", lambda t, e, f, s, *a: subsets.append(s.tolist()) or tune(t, e, f, s, *a))
    argv = ["--dataset", "stl10", "--image-size", "16", "--init", "random", "--epochs", "1", "--folds"]
    assert compare(*argv) == 0
    folds = load_folds("data", 20)
    assert subsets == [fold.tolist() for fold in folds]
    assert [(r["seed"], r["labels"]) for r in results()["records"]] == [(fold, "fold") for fold in range(10)]
    out = capsys.readouterr().out.partition("For the half")[0]
    assert "over folds 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in out and max(map(len, out.splitlines())) <= 80
    subsets.clear()
    assert compare(*argv, "--seeds", "4", "--overwrite") == 0 and subsets == [folds[4].tolist()]
    assert compare(*argv, "--seeds", "10") == 2 and "those from 0 to 9" in capsys.readouterr().err
    shared = task()._replace(folds=folds)
    assert train_classifier.subset_of(shared, Cell(12, BASELINE, "fold", 1)).tolist() == folds[2].tolist(), "for its rate"


def test_subsets_are_balanced_nested_and_the_seeds_own():
    labels = torch.arange(60) % 3
    few, more, other = (draw_subset(labels, n, seed) for n, seed in ((2, 0), (5, 0), (2, 1)))
    assert labels[few].bincount().tolist() == [2] * 3 and labels[more].bincount().tolist() == [5] * 3
    assert set(few.tolist()) < set(more.tolist()) and set(few.tolist()) != set(other.tolist())
    assert draw_subset(labels, "all", 0).tolist() == list(range(60))


def test_budgets_that_no_class_can_pay_are_named(pretrained, capsys):
    assert compare("--labels-per-class", "11") == 2
    assert "LABELS_PER_CLASS 11: class" in capsys.readouterr().err
    assert compare("--labels-per-class", "11,all", "--seeds", "0") == 0
    assert "has only 10 training images; left out" in capsys.readouterr().out


def test_a_budget_that_is_no_number_is_named(pretrained, monkeypatch, capsys):
    monkeypatch.setattr(train_classifier, "LABELS_PER_CLASS", "all")  # a constant's flag takes its default's type
    assert compare("--labels-per-class", "10") == 2 and "LABELS_PER_CLASS 10 must be" in capsys.readouterr().err


def test_results_from_other_first_weights_are_not_mixed(images, capsys):
    argv = ["--dataset", "images", "--image-size", "16", "--init", "first.pt", "--seeds", "0", "--no-controls"]
    for seed, status in ((0, 0), (1, 1)):
        torch.save(small_encoder("", "random", seed)[0].state_dict(), "first.pt")
        assert compare(*argv) == status
    assert "measured with another INIT" in capsys.readouterr().err


def test_a_comparison_starts_from_the_very_weights_that_pretraining_began_with(images, capsys):
    torch.save(small_encoder("", "random", 0)[0].state_dict(), "first.pt")
    assert train_byol.main(["--dataset", "images", *TINY, "--run", "tiny", "--init", "first.pt"]) == 0
    assert compare("--seeds", "0", "--no-controls") == 0
    torch.save(small_encoder("", "random", 1)[0].state_dict(), "first.pt")
    assert compare("--seeds", "1", "--no-controls") == 1
    assert "INIT first.pt is not the file that runs/tiny/config.json began with" in capsys.readouterr().err


def test_neighbours_of_few_images_and_of_the_classes_that_are_there(tmp_path, generator):
    test = Split(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2, 2]), ["a", "b", "c"])
    plots.plot_neighbors(tmp_path / "x.png", test, [("an arm", torch.eye(3))], generator, "run")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_right_answers_survive_the_file():
    right = torch.arange(21) % 4 == 0
    assert torch.equal(unpack(json.loads(json.dumps(pack(right))), 21), right)


def test_accuracy_of_each_class(capsys):
    c = constants("--seeds", "0,1")
    cells = {Cell(seed, BASELINE, 5, c.EPOCHS): {"right": {"fine-tuning": pack(torch.tensor(right))}}
             for seed, right in ((0, [True, False, True, True, True]), (1, [True, False, False, False, True]))}
    train_classifier.print_classes(cells, Split(torch.empty(5), torch.tensor([0, 0, 0, 1, 1]), ["a", "b"]), [BASELINE], 5, c)
    assert re.findall(r"^([ab]) +([0-9.]+)$", capsys.readouterr().out, re.M) == [("a", "50.0"), ("b", "75.0")]


def test_mean_and_deviation():
    assert train_classifier.mean_std([1.0, 2.0, 3.0]) == "2.0 ± 1.0" and train_classifier.mean_std([1.0]) == "1.0"


def test_a_comparison_is_decided_by_its_seeds(pretrained):
    compare("--seeds", "0,1")
    first = results()["records"]
    compare("--seeds", "0,1", "--overwrite")
    assert results()["records"] == first


def test_an_interrupted_comparison_goes_on_at_the_first_missing_arm(pretrained, monkeypatch, capsys):
    argv = ["--seeds", "0,1"]
    assert compare(*argv) == 0
    whole = results()["records"]
    tune, trained = train_classifier.fine_tune, []

    def interrupted(*args):
        trained.append(args[-1])
        if len(trained) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return tune(*args)

    monkeypatch.setattr(train_classifier, "fine_tune", interrupted)
    capsys.readouterr()
    assert compare("--overwrite", *argv) == 143 and len(results()["records"]) == 2
    assert "the same command continues from there (without --overwrite)" in capsys.readouterr().out
    assert compare(*argv) == 0 and len(trained) == 5
    assert results()["records"] == whole


def test_without_a_run_the_baseline_is_trained_and_the_other_half_explained(images, capsys):
    assert compare("--dataset", "images", "--image-size", "16", "--init", "random", "--seeds", "0") == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "there is no pretraining in runs/tiny: this is the half without BYOL", "before anything is trained"
    table, last = "\n".join(rest[:-1]), rest[-1]
    assert "python train_byol.py --run tiny" in last and WITH_BYOL not in table and BASELINE in table
    assert [r["arm"] for r in results()["records"]] == [BASELINE]


def test_an_unfinished_run_is_named(pretrained, capsys):
    (pretrained / "encoder.pt").unlink()
    assert compare() == 1 and "no encoder.pt yet" in capsys.readouterr().err


def test_dataset_encoder_init_and_size_come_from_the_run(pretrained, capsys):
    assert compare("--seeds", "0", "--image-size", "16") == 0, "a flag that agrees is no error"
    assert results()["constants"]["DATASET"] == "images" and results()["constants"]["IMAGE_SIZE"] == 16
    for argv in (["--image-size", "32"], ["--dataset", "stl10"], ["--encoder", "resnet34"], ["--init", "imagenet"]):
        assert compare(*argv) == 2
        assert f"{argv[0]} {argv[1]} contradicts runs/tiny/config.json" in capsys.readouterr().err


def test_a_single_class_is_refused_in_one_line(tmp_path, small, capsys):
    write_folder(tmp_path / "one", classes=("a",))
    assert compare("--dataset", "one", "--image-size", "16", "--init", "random") == 1
    err = capsys.readouterr().err
    assert err == "error: DATASET 'one' has but one class in train/: there is nothing to tell apart\n"


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(pretrained, split, capsys):
    (Path("images") / split).rename("elsewhere")
    assert compare() == 1
    assert f"{split}" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [(["--seeds", "0,0"], "SEEDS 0,0 repeats"), (["--seeds", "a"], "--seeds"),
                                           (["--crop-area", "0"], "CROP_AREA is 0"),
                                           (["--labels-per-class", "0"], "LABELS_PER_CLASS 0 must"),
                                           (["--labels-per-class", "3,3"], "LABELS_PER_CLASS 3,3 must"),
                                           (["--labels-per-class", "3,some"], "--labels-per-class"),
                                           (["--labels-per-class", "1,3", "--learning-rate", "0.1,0.2"], "LABELS_PER_CLASS 1 leaves"),
                                           (["--folds"], "FOLDS are STL-10's, and DATASET is"), (["--epochs", "-1"], "EPOCHS is -1")])
def test_mistakes_end_in_one_line(pretrained, capsys, argv, message):
    capsys.readouterr()
    assert compare(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_the_classifier_loads_into_plain_torchvision(tmp_path):
    """On STL-10's own format, with a real ResNet: from pretraining to the fine-tuned network."""
    write_stl10(tmp_path / "data")
    assert train_byol.main([*TINY, "--image-size", "32", "--batch-size", "15", "--epochs", "1", "--run", "tiny"]) == 0
    assert compare("--seeds", "0", "--epochs", "1") == 0
    network = torchvision.models.resnet18(num_classes=10)
    network.load_state_dict(torch.load("runs/tiny/classifier.pt", weights_only=True), strict=True)


# ------------------------------------------------------------------------------------------ rates, lengths, several runs

def test_each_arm_and_budget_takes_the_rate_that_is_best_on_held_out_images(pretrained, monkeypatch, capsys):
    asked, best = [], {(BASELINE, 3): 0.2, (BASELINE, "all"): 0.05, (WITH_BYOL, 3): 0.1, (WITH_BYOL, "all"): 0.2}

    def held_out(task, cell, rate):
        asked.append((cell.arm, cell.labels, rate))
        assert cell.seed == 0, "all arms are tuned on the same images, also later"
        return 50.0 + (rate == best[cell.arm, cell.labels])

    tuned, tune = [], train_classifier.fine_tune
    monkeypatch.setattr(train_classifier, "held_out_accuracy", held_out)
    monkeypatch.setattr(train_classifier, "fine_tune", lambda *args: tuned.append(args[5]) or tune(*args))
    argv = ["--labels-per-class", "3,all", "--learning-rate", "0.05,0.1,0.2"]
    assert compare(*argv, "--seeds", "0,1") == 0
    assert asked == [(*key, rate) for key in best for rate in (0.05, 0.1, 0.2)], "once for all seeds"
    assert [r["rate"] for r in results()["records"]] == [*best.values()] * 2 == tuned
    out = capsys.readouterr().out
    assert "rate 0.1       3 labels with BYOL       held out 51.0\n" in out
    ends = [line.split()[1] for line in out.splitlines() if "of LEARNING_RATE is best there" in line]
    assert ends == ["largest", "smallest", "largest"], "and 0.1 lies between"
    assert compare(*argv, "--seeds", "1,0,2") == 0 and len(asked) == 12, "nor for seeds that are added"
    found = results()
    del found["trials"][4], found["records"][1:]  # as if it had been stopped in the second search
    (pretrained / "results.json").write_text(json.dumps(found))
    assert compare(*argv, "--seeds", "1") == 0 and asked[12:] == [(BASELINE, "all", 0.1)], "what is known is kept"
    assert [trial["held out"] for trial in results()["trials"]].count(51) == 4
    assert compare(*argv, "--seeds", "0", "--epochs", "1") == 0 and len(asked) == 25, "another length is tuned by itself"


@pytest.mark.parametrize("enough, folds", [(1, 1), (25, 3), (1000, 5)])
def test_a_rate_is_judged_by_fifths_of_the_subset_that_were_held_out(monkeypatch, enough, folds):
    """Balanced, disjoint, as many as are enough, and never by an image that was trained on or is for the test."""
    monkeypatch.setattr(train_classifier, "HELD_OUT", enough)
    monkeypatch.setattr(train_classifier, "build_encoder", small_encoder)
    train, pairs = patterns(100), []
    subset = draw_subset(train.labels, 5, 0)
    tune, extract = train_classifier.fine_tune, train_classifier.extract_features
    monkeypatch.setattr(train_classifier, "fine_tune", lambda *args: pairs.append([args[3]]) or tune(*args))
    monkeypatch.setattr(train_classifier, "extract_features", lambda n, pixels, *a: pairs[-1].append(pixels) or extract(n, pixels, *a))
    c = constants("--init", "random")
    task = train_classifier.Task(c, train, None, CPU, torch.float32, [], Trainee())
    accuracy = train_classifier.held_out_accuracy(task, Cell(0, BASELINE, 5, c.EPOCHS), 0.04)
    assert len(pairs) == folds and 0 <= accuracy <= 100
    held_out = [next(i for i in subset.tolist() if torch.equal(train.pixels[i], image)) for _, images in pairs for image in images]
    assert len(set(held_out)) == len(held_out) == 10 * folds
    for fold, (fitted, _) in enumerate(pairs):
        of_fold = held_out[10 * fold:10 * fold + 10]
        assert sorted(fitted.tolist() + of_fold) == sorted(subset.tolist())
        assert train.labels[of_fold].tolist() == list(range(10)), "a fifth of each class"


def test_other_lengths_are_kept_beside_and_drawn_against_the_steps(pretrained, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_classifier, "plot_lines", lambda path, panels, x, _, caption: drawn.append((path.name, panels, x, caption)))
    assert compare("--seeds", "0") == 0 and not drawn
    first = results()["records"]
    assert compare("--seeds", "0", "--epochs", "4") == 0 and results()["records"][:2] == first
    (name, panels, steps, captions), = drawn
    assert "fine-tuned for 2, 4 epochs" in captions
    classifier = (pretrained / "classifier.pt").read_bytes()
    assert name == "steps.png" and steps == [4, 8] and panels.keys() == {"all labels"}
    assert panels["all labels"][WITH_BYOL] == [[r["fine-tuning"] for r in results()["records"] if
                                                (r["arm"], r["epochs"]) == (WITH_BYOL, epochs)] for epochs in (2, 4)]
    assert compare("--seeds", "0", "--epochs", "1") == 0, "a shorter one leaves the network of the longest"
    assert compare("--seeds", "1,2", "--epochs", "4") == 0, "and so do other seeds"
    assert compare("--seeds", "0", "--epochs", "8", "--labels-per-class", "2") == 0, "and fewer labels"
    assert (pretrained / "classifier.pt").read_bytes() == classifier
    assert compare("--seeds", "0", "--epochs", "8") == 0 and (pretrained / "classifier.pt").read_bytes() != classifier


def test_the_classifier_that_is_kept_is_byols_though_the_baseline_was_trained_longer(images):
    half = ["--dataset", "images", "--image-size", "16", "--init", "random", "--seeds", "0"]
    assert compare(*half, "--epochs", "4") == 0
    of_baseline = Path("runs/tiny/classifier.pt").read_bytes()
    assert train_byol.main(["--dataset", "images", *TINY, "--epochs", "1", "--run", "tiny"]) == 0
    assert compare("--seeds", "0") == 0 and Path("runs/tiny/classifier.pt").read_bytes() != of_baseline


@pytest.mark.parametrize("change, name", [("encoder", "encoder.pt (number 0 of RUN)"), ("test", "test/ of DATASET"),
                                          ("image", "train/ of DATASET")])
def test_results_of_another_encoder_or_of_other_images_are_not_mixed(pretrained, capsys, change, name):
    assert compare("--seeds", "0") == 0
    if change == "encoder":
        weights = torch.load(pretrained / "encoder.pt", weights_only=True)
        torch.save({key: value + 1 for key, value in weights.items()}, pretrained / "encoder.pt")
    elif change == "test":
        (Path("images/test/b/9.png")).rename("images/test/a/new.png")
    else:
        Image.new("RGB", (20, 20), "red").save("images/train/a/0.png")
    assert compare("--seeds", "0,1") == 1
    assert f"results.json was measured with another {name}: use --overwrite" in capsys.readouterr().err
    assert compare("--seeds", "0", "--overwrite") == 0


def test_results_of_another_version_are_not_mixed(pretrained, monkeypatch, capsys):
    assert compare("--seeds", "0") == 0
    monkeypatch.setattr(train_classifier, "RESULTS_VERSION", train_classifier.RESULTS_VERSION + 1)
    assert compare("--seeds", "0,1") == 1
    assert "results.json is of another version of this code" in capsys.readouterr().err
    assert compare("--seeds", "0", "--overwrite") == 0 and compare("--seeds", "0") == 0


def test_a_run_that_gets_another_name_stays_one_run(pretrained, capsys):
    assert compare("--seeds", "0,1") == 0
    pretrained.rename("runs/other")
    assert compare("--run", "other", "--seeds", "0,1,2") == 0
    found = json.loads(Path("runs/other/results.json").read_text())
    before, after = (answers_of([r for r in found["records"] if r["arm"] == arm], "kNN", 20) for arm in (BASELINE, WITH_BYOL))
    assert found["summary"]["all"]["kNN"]["interval"] == list(utils.gain_of(after - before))
    weights = torch.load("runs/other/encoder.pt", weights_only=True)
    torch.save({key: value + 1 for key, value in weights.items()}, "runs/other/encoder.pt")
    Path("runs/other").rename("runs/third")
    assert compare("--run", "third", "--seeds", "0,1,2,3") == 1
    assert "measured with another encoder.pt" in capsys.readouterr().err


def test_runs_that_differ_in_their_seed_are_compared_together(images, capsys):
    for seed in (3, 4):
        assert train_byol.main(["--dataset", "images", *TINY, "--epochs", "1", "--run", f"of{seed}", "--seed", str(seed)]) == 0
    both = ["--run", "of3,of4"]
    capsys.readouterr()
    assert compare(*both, "--seeds", "0,1,2,3") == 0
    found = json.loads(Path("runs/of3,of4/results.json").read_text())
    assert [r["run"] for r in found["records"] if r["arm"] == WITH_BYOL] == ["of3", "of4", "of3", "of4"]
    assert all(r["run"] is None for r in found["records"] if r["arm"] == BASELINE)
    before, after = (torch.stack([unpack(r["right"]["kNN"], 20) for r in found["records"] if r["arm"] == arm]).double()
                     for arm in (BASELINE, WITH_BYOL))
    gains = after - before
    expected = utils.gain_of(torch.stack([gains[0::2].mean(0), gains[1::2].mean(0)]))
    assert found["summary"]["all"]["kNN"]["interval"] == pytest.approx(expected), "a run is one repetition"
    out = capsys.readouterr().out
    assert "2 pretraining runs, in turn" in out and "over runs, seeds and test images" in out
    assert max(map(len, out.splitlines())) <= 80
    for argv, needle in ((["--seeds", "0,1,2"], "do not take the runs of3,of4 equally often: of 2 runs"),
                         (["--seeds", "0,2"], "equally often"), (["--run", "of3,of3", "--seeds", "0,1"], "the same SEED")):
        assert compare(*both, *argv) == 2 and needle in capsys.readouterr().err
    assert compare("--run", "of3,missing", "--seeds", "0,1") == 1
    assert "there is no runs/missing/config.json: pretrain that run first" in capsys.readouterr().err
    assert train_byol.main(["--dataset", "images", *TINY, "--epochs", "1", "--run", "other", "--seed", "5",
                            "--crop-area", "0.5"]) == 0
    assert compare("--run", "of3,other", "--seeds", "0,1") == 2
    assert "differ in CROP_AREA 0.2 and 0.5; runs that are compared together" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- fairness

ALL = torch.arange(40)


def constants(*argv):
    c = read_constants(vars(train_classifier), ["--demo", *QUICK, *argv])
    resolve_auto(c, train_classifier.AUTO)
    return c


def patterns(n=40):
    split = load_split("patterns", "train", "", 16)
    return split._replace(pixels=split.pixels[:n], labels=split.labels[:n])


def task(*argv):
    return train_classifier.Task(constants(*argv), patterns(), None, CPU, torch.float32, [], Trainee())


def test_both_arms_get_the_same_head_batches_and_steps(monkeypatch):
    """Two different encoders: the same first head, the same images in the same order, the same crops."""
    meetings = []
    for seed_of_encoder in (0, 1):
        heads, batches, crops = [], [], []
        linear, fetch, draw = torch.nn.Linear, train_classifier.fetch, train_classifier.crop_of
        monkeypatch.setattr(train_classifier.nn, "Linear", lambda *a: heads.append(linear(*a)) or heads[0])
        monkeypatch.setattr(train_classifier, "fetch", lambda p, i, d: batches.append(i.tolist()) or fetch(p, i, d))
        monkeypatch.setattr(train_classifier, "crop_of", lambda *a: crops.append(draw(*a)) or crops[-1])
        encoder, feature_dim = small_encoder("", "random", seed_of_encoder)
        first = []
        build = train_classifier.build_optimizer
        monkeypatch.setattr(train_classifier, "build_optimizer",
                            lambda *a: first.append(heads[0].weight.detach().clone()) or build(*a))
        fine_tune(task(), encoder, feature_dim, ALL, 5, 0.04)
        meetings.append((first[0], batches, torch.stack([box for box, _ in crops])))
        monkeypatch.undo()
    (head_a, batches_a, crops_a), (head_b, batches_b, crops_b) = meetings
    assert torch.equal(head_a, head_b) and batches_a == batches_b and torch.equal(crops_a, crops_b)
    assert len(batches_a) == 2 * 5 and sorted(sum(batches_a[:5], [])) == list(range(40))


def test_fine_tuning_normalises_its_images(monkeypatch):
    seen = []
    monkeypatch.setattr(train_classifier, "crop_resize", lambda images, *a: torch.full(images.shape, 0.5))
    encoder, feature_dim = small_encoder("", "random", 0)
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fine_tune(task(), encoder, feature_dim, ALL, 0, 0.04)
    torch.testing.assert_close(seen[0], normalize(torch.full_like(seen[0], 0.5)))
    assert seen[0].amin() < 0.1


def test_a_smaller_budget_takes_as_many_steps_and_only_its_own_images(monkeypatch):
    batches, fetch = [], train_classifier.fetch
    monkeypatch.setattr(train_classifier, "fetch", lambda p, i, d: batches.append(i.tolist()) or fetch(p, i, d))
    encoder, feature_dim = small_encoder("", "random", 0)
    fine_tune(task(), encoder, feature_dim, torch.tensor([3, 5, 9, 11, 20]), 0, 0.04)
    assert len(batches) == 2 * 5 and all(sorted(batch) == [3, 5, 9, 11, 20] for batch in batches)


def test_where_no_terminal_shows_its_bar_a_long_fine_tuning_says_each_minute_how_far_it_is(monkeypatch, capsys):
    clock = (25 * i for i in range(100))  # seconds at each look
    monkeypatch.setattr(train_classifier, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    fine_tune(task(), *small_encoder("", "random", 0), ALL, 0, 0.04, "seed 0")
    assert capsys.readouterr().out.splitlines() == [
        f"seed 0: step {step} of 10  {left} min left" for step, left in ((3, 3), (6, 2), (9, 0))]


def test_identical_encoders_gain_exactly_nothing(pretrained, monkeypatch):
    monkeypatch.setattr(train_classifier, "build_encoder", lambda name, init, seed: small_encoder(name, "random", 0))
    assert compare("--seeds", "0,1") == 0
    assert all(by_arm["gain"] == [0, 0] for by_arm in results()["summary"]["all"].values())


def test_the_heads_differ_between_seeds_and_the_encoder_is_trained():
    encoder, feature_dim = small_encoder("", "random", 0)
    before = encoder.conv.weight.detach().clone()
    a = fine_tune(task(), encoder, feature_dim, ALL, 0, 0.04)
    assert not torch.equal(a.conv.weight, before)
    b = fine_tune(task(), small_encoder("", "random", 0)[0], feature_dim, ALL, 1, 0.04)
    assert not torch.equal(a.fc.weight, b.fc.weight)


def test_fine_tuning_does_not_depend_on_the_scale_of_the_features():
    x, scores = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), []
    for scale in (torch.full((64,), 64.0), 2.0 ** torch.arange(6, 70).remainder(12).clamp(min=6)):
        encoder, feature_dim = small_encoder("", "random", 0)
        # From 64 up, where what BatchNorm adds to a variance is nothing.
        encoder.pool.register_forward_hook(lambda module, inputs, features, scale=scale: features * scale)
        scores.append(fine_tune(task("--epochs", "20"), encoder, feature_dim, ALL, 0, 0.04).eval()(x))
    torch.testing.assert_close(scores[0], scores[1], rtol=0.01, atol=0.01)
    assert scores[0].std() > 0.1


def test_the_tuned_network_ends_in_one_linear_layer_that_answers_as_it_did_in_training(monkeypatch):
    kept, fold = [], train_classifier.fold_standardisation
    monkeypatch.setattr(train_classifier, "fold_standardisation",
                        lambda *a: kept.append(copy.deepcopy(encoder.fc).eval()) or fold(*a))
    encoder, feature_dim = small_encoder("", "random", 0)
    network = fine_tune(task(), encoder, feature_dim, ALL, 0, 0.04).eval()
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert type(network.fc) is torch.nn.Linear and type(kept[0]) is torch.nn.Sequential
    torch.testing.assert_close(network(x), kept[0](network[:-1](x)), rtol=1e-4, atol=1e-4)


def test_the_head_learns_at_its_own_rate(monkeypatch):
    groups = []
    monkeypatch.setattr(train_classifier, "take_step", lambda optimizer, *_: groups.extend(optimizer.param_groups))
    encoder, feature_dim = small_encoder("", "random", 0)
    network = fine_tune(task("--head-rate", "0.25", "--epochs", "1"), encoder, feature_dim, ALL, 0, 0.04)
    own = {id(p) for group in groups if group["scale"] == 0.25 for p in group["params"]}
    assert own == set(map(id, network.fc.parameters())) and {group["scale"] for group in groups} == {1, 0.25}


def test_neither_the_frozen_protocols_nor_another_budget_move_an_encoder(pretrained, monkeypatch):
    """Every fine-tuning starts from the very encoder that was built, whatever came before it."""
    starts, tune = {}, train_classifier.fine_tune

    def recorded(task, encoder, *rest):
        starts.setdefault(rest[-1].split(", ")[2], []).append({k: v.clone() for k, v in encoder.state_dict().items()})
        return tune(task, encoder, *rest)

    monkeypatch.setattr(train_classifier, "fine_tune", recorded)
    assert compare("--seeds", "0", "--labels-per-class", "3,5,all") == 0
    fresh = small_encoder("", "random", 0)[0].state_dict()
    exported = torch.load(pretrained / "encoder.pt", weights_only=True)
    for arm, expected in ((BASELINE, fresh), (WITH_BYOL, exported)):
        assert len(starts[arm]) == 3 and all(torch.equal(start[k], expected[k]) for start in starts[arm] for k in expected)


def test_the_last_epoch_is_reported(pretrained, monkeypatch):
    """The test images are predicted once, after training: there is no best epoch to choose."""
    calls, extract = [], train_classifier.extract_features
    monkeypatch.setattr(train_classifier, "extract_features", lambda e, p, *a: calls.append(len(p)) or extract(e, p, *a))
    compare("--seeds", "0")
    assert len(calls) == 2 * 3  # an arm: training and test images for the frozen protocols, test images at the end
    calls.clear()
    compare("--seeds", "0,1", "--overwrite")
    assert len(calls) == 4 * 3 - 2, "the pretrained encoder is the same for all seeds: its features are kept"


def test_random_labels_are_learned_at_chance(images, generator):
    train, test = (load_split("patterns", split, "", 16) for split in ("train", "test"))
    shuffled = test._replace(labels=test.labels[torch.randperm(len(test.labels), generator=generator)])
    train = train._replace(labels=train.labels[torch.randperm(len(train.labels), generator=generator)])
    encoder, _ = small_encoder("", "random", 0)
    features, queries = (extract_features(encoder, split.pixels, CPU, torch.float32) for split in (train, shuffled))
    probe, _ = linear_probe(features, train.labels, 10, seed=0)
    bound = 4 * math.sqrt(0.1 * 0.9 / len(test.labels)) * 100
    for guess in (probe(queries).argmax(dim=1), knn_predict(features, train.labels, queries, 10)):
        assert abs(percent(guess == shuffled.labels) - 10) < bound


# ------------------------------------------------------------------------------------------------------------- probe

def test_logistic_regression_reaches_the_minimum(generator):
    """At the optimum the gradient of the convex objective is 0; checked in fp64, on the standardised features.

    A loss near 1 in fp32 cannot tell points whose gradient is below some sqrt(2 * 1.2e-7) = 5e-4: how far below the search
    ends is the processor's rounding (5.5e-5 at most in 40 draws on one, 1.3e-4 in this draw on another; with three
    iterations at least 1.3e-3).
    """
    x = torch.randn(200, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    labels = torch.randint(0, 3, (200,), generator=generator)
    head = fit_logistic(x, labels, classes=3, penalty=0.05)
    mean, std = x.double().mean(0), x.double().std(0)
    weight = (head.weight.double() * std).requires_grad_()
    bias = (head.bias.double() + head.weight.double() @ mean).requires_grad_()
    loss = F.cross_entropy((x.double() - mean) / std @ weight.T + bias, labels) + 0.05 / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max(g.abs().max().item() for g in gradients) < 5e-4


def test_linear_probe_finds_what_theory_allows(generator):
    """Two classes at distance 2 in unit noise: Phi(1) = 84.1% at best."""
    labels = torch.randint(0, 2, (6000,), generator=generator)
    x = torch.randn(6000, 5, generator=generator)
    x[:, 0] += labels * 2.0
    probe, penalty = linear_probe(x[:2000], labels[:2000], 2, seed=0)
    right = (probe(x[2000:]).argmax(1) == labels[2000:]).float().mean().item()
    assert abs(right - 0.8413) < 4 * math.sqrt(0.84 * 0.16 / 4000) and penalty in train_classifier.PROBE_PENALTIES


def test_the_probes_penalty_is_judged_by_every_image_once_held_out(monkeypatch):
    """And the one that gets most of them right is taken."""
    labels, asked = torch.arange(50) % 5, []
    features = torch.arange(50.0)[:, None]  # an image's feature is its number
    right_for = {penalty: 2 + 4 * i for i, penalty in enumerate(train_classifier.PROBE_PENALTIES)}
    best = train_classifier.PROBE_PENALTIES[2]
    right_for[best] = 20

    def fit(x, y, classes, penalty):
        assert torch.equal(labels[x[:, 0].long()], y)

        def probe(queries):
            number = queries[:, 0].long()
            asked.append((penalty, x[:, 0].tolist(), number.tolist()))
            return F.one_hot(torch.where(number < right_for[penalty], labels[number], (labels[number] + 1) % classes), classes)
        return probe

    monkeypatch.setattr(train_classifier, "fit_logistic", fit)
    _, penalty = linear_probe(features, labels, 5, seed=0)
    assert penalty == best
    for penalty in right_for:
        of_penalty = [(set(fitted), held_out) for p, fitted, held_out in asked if p == penalty]
        assert sorted(i for _, held_out in of_penalty for i in held_out) == list(range(50))
        assert all(len(fitted) == 40 and not fitted & set(held_out) for fitted, held_out in of_penalty)
        assert all(labels[held_out].bincount().tolist() == [2] * 5 for _, held_out in of_penalty)
