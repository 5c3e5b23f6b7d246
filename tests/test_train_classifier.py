"""The comparison: the whole path on tiny data, its constants, earlier results that it goes on from, rates, fairness."""
import copy
import itertools
import json
import os
import signal
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
import torchvision

import encoders
import train_byol
import train_classifier
import utils
from conftest import HAS_GPU, small_encoder, trace_compiled
from data import Split, draw_patterns, load_folds
from evaluate import extract_features, gain_interval
from test_data import write_cifar10, write_folder, write_stl10
from test_train_byol import TINY, same
from train_classifier import BASELINE, PROTOCOLS, WITH_BYOL, Training, fine_tune, plan, run_training, subset_of
from views import denormalize

QUICK = ["--epochs", "2", "--batch-size", "8", "--device", "cpu", "--precision", "fp32", "--labels-per-class", "all",
         "--learning-rate", "0.04"]
HALF = ["--run", "none", "--dataset", "images", "--image-size", "16", "--init", "random"]
ALL = torch.arange(40)  # of the images of `build`


@pytest.fixture
def images(tmp_path, small):
    return write_folder(tmp_path / "images", per_class=10, unlabeled=20)


def pretrain(*argv):
    assert train_byol.main(["--dataset", "images", *TINY, "--epochs", "1", "--run", "tiny", *argv]) == 0


@pytest.fixture
def pretrained(images):
    pretrain()
    return Path("runs/tiny")


def compare(*argv):
    return train_classifier.main(["--run", "tiny", *QUICK, *argv])


def results(run="tiny"):
    return json.loads(Path(f"runs/{run}/results.json").read_text())


def gains(run, protocol):
    """Of each test image in each seed, from the records: [seeds, images]."""
    before, after = (torch.tensor([[float(bit) for bit in record["correct"][protocol]]
                                   for record in results(run)["records"] if record["arm"] == arm])
                     for arm in (BASELINE, WITH_BYOL))
    return after - before


def calls_of(monkeypatch, name, keep):
    """What `keep` takes of the arguments of each call of a function in the script, which is called all the same."""
    calls, function = [], getattr(train_classifier, name)
    monkeypatch.setattr(train_classifier, name, lambda *args: calls.append(keep(*args)) or function(*args))
    return calls


def build(*argv, images=40):
    """What trainings without BYOL share, on so many patterns."""
    c = utils.read_constants(vars(train_classifier), [*QUICK, *HALF, *argv])
    train_classifier.adopt_runs(c)
    train, test = (draw_patterns(n, 16, utils.seeded_generator(0, n)) for n in (images, 20))
    return train_classifier.build_setup(c, train, test, torch.device("cpu"), 10)


def weights_of(seed):
    return small_encoder("", "random", seed)[0].state_dict()


# ------------------------------------------------------------------------------------------------- the whole path

def test_a_comparison_fills_the_runs_folder(pretrained, drawn, capsys):
    assert compare("--labels-per-class", "3,11,all") == 0
    assert all((pretrained / f"{name}.png").read_bytes()[1:4] == b"PNG" for name in ("label_efficiency", "neighbors"))
    out, found = capsys.readouterr().out, results()
    assert "LABELS_PER_CLASS 11: class 'a' has only 10 training images; left out\n" in out
    table = out[out.index("labels  test accuracy"):]
    assert ([(r["seed"], r["arm"], r["labels"]) for r in found["records"]]
            == [(s, a, b) for s in (0, 1, 2) for a in (BASELINE, WITH_BYOL) for b in (3, "all")])
    for labels, by_protocol in found["summary"].items():
        for protocol, by_arm in by_protocol.items():
            for arm in (BASELINE, WITH_BYOL):
                of_arm = [r for r in found["records"] if (r["arm"], str(r["labels"])) == (arm, labels)]
                assert by_arm[arm] == [r[protocol] for r in of_arm]
                assert [5 * r["correct"][protocol].count("1") for r in of_arm] == by_arm[arm], "of 20 images"
                row = next(line for line in table.splitlines() if line.startswith(f"{labels:>6}  {arm}"))
                assert f"{mean(by_arm[arm]):.1f} ± {stdev(by_arm[arm]):.1f}" in row
            assert by_arm["interval"][0] == pytest.approx(mean(by_arm[WITH_BYOL]) - mean(by_arm[BASELINE]))
    for text in (*PROTOCOLS, "gain  ", "seeds 0, 1, 2", "95% interval over seeds and test images",
                 "one pretraining run; fine-tuned for 2 epochs, the last one"):
        assert text in table
    assert max(map(len, out[out.index("images: 20 training images"):].splitlines())) <= 80


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_scripts_run_on_every_device_in_every_precision(images, device, precision):
    argv, types = ["--device", device.type, "--precision", precision], []
    with torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: types.append((type(module), output.dtype))):
        pretrain(*argv)
        assert compare("--seeds", "0", *argv) == 0
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {dtype for kind, dtype in types if issubclass(kind, torch.nn.Conv2d)} == {expected}, "and for features"
    for written in (json.loads(Path("runs/tiny/config.json").read_text()), results()):
        assert torch.device(written["environment"]["device"]).type == device.type
        assert written["constants"]["PRECISION"] == precision
    for file in ("encoder.pt", "classifier.pt"):
        for value in torch.load(f"runs/tiny/{file}", weights_only=True).values():
            assert value.device.type == "cpu" and value.isfinite().all() and value.dtype != torch.bfloat16


def test_stl10_from_pretraining_to_torchvision_which_gives_the_trained_features(tmp_path, small, monkeypatch, capsys):
    """With a real ResNet, and folds as subsets."""
    write_stl10(tmp_path / "data")
    for script in (train_byol, train_classifier):
        monkeypatch.setattr(script, "build_encoder", encoders.build_encoder)
    pretrain("--dataset", "stl10", "--batch-size", "15")
    network, trained = torchvision.models.resnet18(), torch.load("runs/tiny/checkpoint.pt", weights_only=True)["model"]
    missing, unexpected = network.load_state_dict(torch.load("runs/tiny/encoder.pt", weights_only=True), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and unexpected == []
    network.fc = torch.nn.Identity()
    encoder, _ = encoders.build_encoder("resnet18", "random", 0)
    encoder.load_state_dict({name: trained[f"online_encoder.{name}"] for name in encoder.state_dict()})
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(*(extract_features(e.to(memory_format=torch.channels_last), pixels, torch.device("cpu"), "fp32")
                         for e in (network, encoder)))
    subsets = calls_of(monkeypatch, "fine_tune", lambda setup, weights, subset, *rest: subset.tolist())
    assert compare("--seeds", "9", "--epochs", "1", "--labels-per-class", "fold") == 0
    assert subsets == [load_folds("data", 20)[9].tolist()] * 2
    network = torchvision.models.resnet18(num_classes=10)
    network.load_state_dict(torch.load("runs/tiny/classifier.pt", weights_only=True), strict=True)
    assert compare("--labels-per-class", "fold", "--seeds", "0,10") == 1
    assert "SEEDS from 0 to 9: it has ten folds" in capsys.readouterr().err


def test_cifar10_with_the_3x3_stem_from_pretraining_to_torchvision(tmp_path, small, monkeypatch, capsys):
    write_cifar10(tmp_path / "data", monkeypatch)
    for script in (train_byol, train_classifier):
        monkeypatch.setattr(script, "build_encoder", encoders.build_encoder)
    assert train_byol.main(["--dataset", "cifar10", "--stem", "3x3", "--image-size", "16", "--init", "random", "--run",
                            "small", "--epochs", "1", "--batch-size", "9", "--hidden-dim", "8", "--device", "cpu"]) == 0
    assert train_classifier.main(["--run", "small", *QUICK, "--seeds", "0", "--epochs", "1"]) == 0
    assert "20 images, resnet18 (3x3) from random weights" in (out := capsys.readouterr().out)
    assert out.count("resnet18 (3x3) from random weights") == 2 and "10 test images of 10 classes" in out
    for file, fc in (("encoder.pt", torch.nn.Identity()), ("classifier.pt", torch.nn.Linear(512, 10))):
        network = torchvision.models.resnet18()
        network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = torch.nn.Identity()
        network.fc = fc
        network.load_state_dict(torch.load(f"runs/small/{file}", weights_only=True))


def test_compiled_fine_tuning_is_the_same_and_is_compiled_once(pretrained, monkeypatch, capsys):
    """What a GPU has recorded of the first training serves all: its memory, its graph, its batch size."""
    argv = ["--labels-per-class", "all,3", "--seeds", "0,1", "--overwrite"]  # 6 images are no batch of 8: left alone
    assert compare(*argv) == 0
    eager, compiled = results()["records"], trace_compiled(monkeypatch)
    addresses = calls_of(monkeypatch, "build_optimizer", lambda network, *rest: [
        value.data_ptr() for value in network.state_dict().values()])
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    assert compare(*argv) == 0 and not compiled, "8 trainings of 4 steps do not win back the time"
    monkeypatch.setattr(utils, "MIN_STEPS_TO_COMPILE", 32)
    assert compare(*argv) == 0 and len(compiled) == 2 and "compiling" in capsys.readouterr().out
    assert results()["records"] == eager
    assert len(addresses) == 16 and all(of_one == addresses[8] for of_one in addresses[8:])


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
def test_what_a_gpu_records_of_fine_tuning_is_the_same_training(pretrained, monkeypatch):
    argv, networks = ["--device", "cuda", "--epochs", "4", "--seeds", "0,1"], []
    monkeypatch.setattr(train_classifier, "fine_tune", lambda *args: networks.append(fine_tune(*args)) or networks[-1])
    assert compare(*argv) == 0
    monkeypatch.setattr(utils, "MIN_STEPS_TO_COMPILE", 4)
    assert compare("--overwrite", *argv) == 0 and len(networks) == 8
    states = [network.state_dict() for network in networks]
    torch.testing.assert_close(states[4:], states[:4], atol=1e-2, rtol=1e-2)  # in TF32


def test_without_byol_the_baseline_is_trained_and_the_other_half_explained(images, monkeypatch, capsys):
    monkeypatch.setattr(train_classifier, "RUN", "none")  # edited in the file
    assert train_classifier.main([*QUICK, *HALF[2:], "--seeds", "0", "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "no pretraining; fine-tuned for 1 epoch, the last one reported\n" in out
    assert out.endswith("for the arm with BYOL, run python train_byol.py and then the command that it prints last\n")
    assert [r["arm"] for r in results("none")["records"]] == [BASELINE]
    assert {path.name for path in Path("runs/none").iterdir()} == {".lock", "results.json", "classifier.pt"}


# -------------------------------------------------------------------------------------- constants and earlier results

def test_dataset_encoder_init_and_size_come_from_the_run(pretrained, monkeypatch, capsys):
    assert compare("--seeds", "0", "--image-size", "16", "--dataset", "./images") == 0, "what agrees is no error"
    constants = results()["constants"]
    assert constants["DATASET"] == str(Path("images").resolve()) and constants["IMAGE_SIZE"] == 16
    for name, value in (("IMAGE_SIZE", 32), ("DATASET", "stl10"), ("ENCODER", "resnet34"), ("STEM", "3x3"),
                        ("INIT", "imagenet")):
        expected = f"error: {name} {value} contradicts runs/tiny/config.json, which says {constants[name]}: set it to "
        assert compare(utils.flag(name), str(value)) == 1 and capsys.readouterr().err.startswith(expected)
        with monkeypatch.context() as file:
            file.setattr(train_classifier, name, value)
            assert compare() == 1 and capsys.readouterr().err.startswith(expected)


def test_a_run_that_is_not_there_is_named_with_the_nearest_and_downloads_nothing(pretrained, monkeypatch, capsys):
    monkeypatch.setattr("data.download_stl10", lambda *a, **k: pytest.fail("downloads"))
    for edited, given in (("byol", ["--run", "tinny"]), ("tinny", [])):
        monkeypatch.setattr(train_classifier, "RUN", edited)
        assert train_classifier.main([*QUICK, *given]) == 1 and not Path("runs/tinny").exists()
        assert capsys.readouterr() == ("", "error: RUN tinny: there is no runs/tinny/config.json: did you mean tiny?; "
                                           "pretrain that run first, or compare without BYOL (--run none)\n")
    (pretrained / "encoder.pt").unlink()
    assert compare() == 1 and "runs/tiny has no encoder.pt yet" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--seeds", "0,0"], "SEEDS is 0,0: it must be one value, or several that differ"),
    (["--labels-per-class", "3,some"], "some: it must be a whole number at least 1 or all or fold"),
    (["--labels-per-class", "1,3", "--learning-rate", "0.1,0.2"], "LABELS_PER_CLASS 1 leaves no image to choose"),
    (["--labels-per-class", "fold"], "fold is for DATASET stl10"),
    (["--batch-size", "21"], "BATCH_SIZE is 21, but there are 20 training images: lower it"),
    (["--dataset", "one"], "/one' has only one class in train/: a comparison needs two\n"),
    (["--dataset", "none"], "/none' has no train/: the classifier needs train/<class>/"),
    (["--dataset", "half"], "/half' has no test/: the classifier needs test/<class>/")])
def test_mistakes_end_in_one_line(images, capsys, argv, message):
    write_folder(Path("one"), classes=["a"])
    write_folder(Path("half"))
    Path("half/test").rename("none")
    assert compare(*HALF, *argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_seeds_and_budgets_are_added_and_nothing_is_trained_twice_but_with_overwrite(pretrained, monkeypatch, capsys):
    monkeypatch.setattr(utils, "has_native_bf16", lambda device: False)
    assert compare("--seeds", "0", "--precision", "auto") == 0
    first, classifier = results()["records"], (pretrained / "classifier.pt").read_bytes()
    assert compare("--seeds", "0,1", "--labels-per-class", "3,all") == 0, "fp32 is what auto meant"
    found = results()["records"]
    assert found[:2] == first and len(found) == 8 and (pretrained / "label_efficiency.png").exists()
    assert (pretrained / "classifier.pt").read_bytes() == classifier, "neither another seed's nor one of fewer labels"
    (pretrained / "neighbors.png").unlink()
    Path("link").symlink_to("images")
    with monkeypatch.context() as patch:
        patch.setattr(train_classifier, "fine_tune", None)
        assert compare("--seeds", "0,1", "--dataset", f"../{Path.cwd().name}/link", "--data-root", "other") == 0
    assert (pretrained / "neighbors.png").exists(), "table and figures are made again"
    assert results()["summary"].keys() == {"all"} and results()["records"] == found
    monkeypatch.setattr(utils, "has_native_bf16", lambda device: True)
    assert compare("--seeds", "0,1", "--precision", "auto") == 1
    assert "results.json was made with other constants: PRECISION fp32 -> bf16;" in capsys.readouterr().err
    (pretrained / "neighbors.png").write_text("old")
    assert compare("--seeds", "0", "--overwrite") == 0 and results()["records"] == first
    assert not (pretrained / "label_efficiency.png").exists() and (pretrained / "neighbors.png").read_text() != "old"


def test_a_stopped_comparison_goes_on_at_the_first_missing_training(pretrained, monkeypatch, capsys):
    assert compare() == 0
    whole, steps = results()["records"], itertools.count(1)
    calls_of(monkeypatch, "set_learning_rate", lambda *a: next(steps) == 10 and os.kill(os.getpid(), signal.SIGTERM))
    assert compare("--overwrite") == 143 and results()["records"] == whole[:2], "in the third of six trainings"
    assert capsys.readouterr().out.endswith("starts anew; without --overwrite it continues what is there\n")
    assert compare() == 0 and next(steps) == 10 + 4 * 4 + 1
    assert results()["records"] == whole, "its seeds alone decide what comes out"


@pytest.mark.parametrize("name, change", [
    ("encoder.pt (number 0 of RUN)", lambda: torch.save(weights_of(9), "runs/tiny/encoder.pt")),
    ("test/ of DATASET", lambda: Path("images/test/b/9.png").rename("images/test/a/new.png")),
    ("train/ of DATASET", lambda: Path("images/train/a/0.png").write_bytes(Path("images/train/b/0.png").read_bytes())),
    ("version of this code", lambda: None)])
def test_results_of_another_version_encoder_or_other_images_are_refused(pretrained, monkeypatch, capsys, name, change):
    assert compare("--seeds", "0") == 0
    change()
    monkeypatch.setattr(train_classifier, "VERSION", utils.VERSION + name.startswith("version"))
    assert compare("--seeds", "0,1") == 1
    err = capsys.readouterr().err
    assert f"another {name}" in err and err.endswith("use --overwrite to compare anew\n")
    assert compare("--seeds", "0", "--overwrite") == 0 and compare("--seeds", "0") == 0


def test_a_run_and_its_first_weights_may_be_moved_but_not_be_others(images, capsys):
    for file in images.glob("test/*/[1-9].png"):
        file.unlink()
    torch.save(weights_of(0), "first.pt")
    pretrain("--init", "first.pt")
    half = [*HALF, "--seeds", "0", "--init"]
    assert compare("--seeds", "0,1") == 0 and compare(*half, "first.pt") == 0
    before = results()["records"]
    Path("first.pt").rename("moved.pt")
    Path("runs/tiny").rename("runs/other")
    assert compare("--run", "other", "--init", "moved.pt", "--seeds", "0,1,2") == 0 and compare(*half, "moved.pt") == 0
    assert results("other")["records"][:4] == before and len(results("none")["records"]) == 1
    for protocol, by_arm in results("other")["summary"]["all"].items():
        assert by_arm["interval"] == list(gain_interval(gains("other", protocol))) and 0 <= by_arm["interval"][1] <= 100
    assert gains("other", "kNN").shape == (3, 2), "of two test images"
    torch.save(weights_of(1), "first.pt")
    assert compare("--run", "other", "--seeds", "0") == 1
    assert "first.pt is not the file that runs/other/config.json began with" in capsys.readouterr().err
    assert compare(*half, "first.pt") == 1 and "measured with another INIT" in capsys.readouterr().err


def test_runs_that_differ_in_their_seed_are_compared_together(images, monkeypatch, capsys):
    starts = calls_of(monkeypatch, "fine_tune", lambda setup, weights, *rest: weights)
    for name, *argv in (("of3", "--seed", "3"), ("of4", "--seed", "4"), ("again", "--seed", "3"),
                        ("other", "--seed", "5", "--crop-area", "0.5")):
        pretrain("--run", name, *argv)
    assert compare("--run", "of3,of4", "--seeds", "0,1,2,3") == 0
    out = capsys.readouterr().out
    for seed, run in enumerate(["of3", "of4"] * 2):
        assert same(starts[2 * seed + 1], torch.load(f"runs/{run}/encoder.pt", weights_only=True))
    of_seeds = gains("of3,of4", "kNN")
    expected = gain_interval(torch.stack([of_seeds[0::2].mean(0), of_seeds[1::2].mean(0)]))
    assert results("of3,of4")["summary"]["all"]["kNN"]["interval"] == pytest.approx(expected), "a run is one repetition"
    assert "2 pretraining runs, in turn" in out and "over runs, seeds and test images" in out
    for argv, needle in ((["--seeds", "0,1,2"], "do not use the runs of3,of4 equally often: seed s uses"),
                         (["--seeds", "0,2"], "equally often"), (["--run", "of3,of3"], "RUN is of3,of3"),
                         (["--run", "of3,again"], "two of these runs have the same SEED"),
                         (["--run", "of3,missing"], "there is no runs/missing/config.json"),
                         (["--run", "of3,other"], "differ in CROP_AREA 0.5 and 0.2; runs that are compared together")):
        assert compare("--run", "of3,of4", "--seeds", "0,1", *argv) == 1 and needle in capsys.readouterr().err


def test_the_classifier_that_is_kept_is_that_of_the_most_labels_then_epochs(pretrained):
    kept = []
    for argv in (["2"], ["2", "--labels-per-class", "2"], ["1"], ["4", "--labels-per-class", "2"], ["4"]):
        assert compare("--seeds", "0", "--epochs", *argv) == 0
        kept.append((pretrained / "classifier.pt").read_bytes())
    assert kept[:4] == kept[:1] * 4 and kept[4] != kept[0]
    for argv in (["--seeds", "1", "--epochs", "8"], ["--seeds", "0,1", "--epochs", "8"],
                 ["--seeds", "0,1", "--epochs", "8", "--learning-rate", "0.3"]):
        assert compare(*argv) == 0
        kept.append((pretrained / "classifier.pt").read_bytes())
        assert kept[-1] != kept[-2], "longer, of a lower seed, by the rate that is the best now"
    assert compare("--seeds", "2", "--epochs", "8", "--learning-rate", "0.3") == 0
    assert (pretrained / "classifier.pt").read_bytes() == kept[-1]


# -------------------------------------------------------------------------------------------------- rates and fairness

def test_the_default_comparison_of_5000_labels_in_ten_classes_takes_at_most_60_trainings():
    c, records = utils.read_constants(vars(train_classifier), ["--epochs", "10"]), {}
    train = Split(torch.empty(5000), torch.arange(5000) % 10, list("abcdefghij"))
    assert [train_classifier.images_of(labels, train) for labels in (50, "fold", "all")] == [500, 1000, 5000]
    while missing := [t for t in plan(c, records, [BASELINE, WITH_BYOL], train) if t not in records]:
        assert len(records) + len(missing) == 58
        records[missing[0]] = {"fine-tuning": len(records) * 7 % 10}
    assert sum(t.fifth is None for t in records) == 3 * 2 * 3 and all(t.rate in c.LEARNING_RATE for t in records)


def test_each_arm_and_budget_takes_the_rate_that_is_best_on_held_out_images(pretrained, monkeypatch, capsys):
    """A rate that is added later costs its own trials, and the table's trainings where it is the best."""
    rising = {(BASELINE, 3): (0.05, 0.1, 0.2, 0.8), (BASELINE, "all"): (0.8, 0.2, 0.1, 0.05),
              (WITH_BYOL, 3): (0.8, 0.05, 0.2, 0.1), (WITH_BYOL, "all"): (0.8, 0.05, 0.1, 0.2)}
    best, asked = {key: rates[-1] for key, rates in rising.items()} | {(BASELINE, 3): 0.2}, []

    def answered(setup, training):
        asked.append(training)
        correct = rising[training.arm, training.labels].index(training.rate)
        record = {"correct": dict.fromkeys(PROTOCOLS, "1" * correct + "0" * (20 - correct))}
        return training._asdict() | dict.fromkeys(PROTOCOLS, 5.0 * correct) | record, torch.nn.Linear(1, 1)

    def asked_by(seeds, rates, *argv):
        before = results()["records"] if Path("runs/tiny/results.json").exists() else []
        asked.clear()
        assert compare("--labels-per-class", "3,all", "--seeds", seeds, "--learning-rate", rates, *argv) == 0
        assert results()["records"][:len(before)] == before and len(results()["records"]) == len(before) + len(asked)
        return asked

    def trials(*rates):
        return [Training(0, *key, 2, rate, fifth) for key in best for rate in rates for fifth in (0, 1)]

    def table(*seeds):
        return [Training(seed, *key, 2, rate) for seed in seeds for key, rate in best.items()]

    monkeypatch.setattr(train_classifier, "run_training", answered)
    assert asked_by("0,1", "0.05,0.1,0.2") == trials(0.05, 0.1, 0.2) + table(0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert "32 trainings of 4 steps to do" in lines
    assert [line.split(":")[0] for line in lines if "at an end of LEARNING_RATE" in line] == [
        "3 labels without BYOL", "all labels without BYOL", "all labels with BYOL"], "and 0.1 lies between"
    assert asked_by("1,0,2", "0.05,0.1,0.2") == table(2)
    assert len(asked_by("0", "0.1,0.2", "--epochs", "1")) == 16 + 4, "another length has rates of its own"
    best[BASELINE, 3] = 0.8
    assert asked_by("2,1", "0.05,0.1,0.2,0.8") == trials(0.8) + table(2, 1)[::4], "by the same seed"


def test_subsets_are_balanced_nested_and_the_seeds_own_and_a_rate_is_judged_by_their_fifths(small, monkeypatch):
    """Those are balanced, disjoint, and were held out; no test image is looked at."""
    setup = build(images=100)
    pixels, labels, subset = setup.train.pixels, setup.train.labels, subset_of(setup, 5, 0)
    few, other = (subset_of(setup, 2, seed) for seed in (0, 1))
    assert labels[subset].bincount().tolist() == [5] * 10 and labels[few].bincount().tolist() == [2] * 10
    assert set(few.tolist()) < set(subset.tolist()) and set(few.tolist()) != set(other.tolist())
    assert torch.equal(subset_of(setup, "all", 0), torch.arange(100))
    fitted = calls_of(monkeypatch, "fine_tune", lambda setup, weights, subset, *rest: subset.tolist())
    seen = calls_of(monkeypatch, "extract_features", lambda network, pixels, *rest: pixels)
    records = [run_training(setup, Training(0, BASELINE, 5, 2, 0.04, fifth))[0] for fifth in range(5)]
    assert seen[0] is pixels and seen[1] is setup.test.pixels, "for the frozen features"
    held_out = [[next(i for i in subset.tolist() if torch.equal(pixels[i], image)) for image in of] for of in seen[2:]]
    assert sorted(sum(held_out, [])) == sorted(subset.tolist())
    for record, fit, of in zip(records, fitted, held_out, strict=True):
        assert sorted(fit + of) == sorted(subset.tolist()) and labels[of].tolist() == list(range(10))
        assert record["fine-tuning"] == 10 * record["correct"]["fine-tuning"].count("1") and record["rate"] == 0.04


def test_both_arms_get_the_same_head_batches_crops_and_steps(small, monkeypatch):
    """Two encoders, and the first one again: in the memory of the one before it, it comes out the same."""
    starts = calls_of(monkeypatch, "build_optimizer", lambda network, *rest: copy.deepcopy(network.state_dict()))
    batches = calls_of(monkeypatch, "fetch", lambda pixels, index, device: index.tolist())
    draws = calls_of(monkeypatch, "crop_of", lambda draws, *rest: draws)
    setup = build()._replace(advance=(titles := []).append)
    tuned = [fine_tune(setup, weights_of(encoder), ALL, seed, 0.04, "title").state_dict()
             for encoder, seed in ((0, 5), (1, 5), (0, 5), (0, 6))]
    assert titles == ["title"] * 4 * 10 and batches[:10] == batches[10:20] != batches[30:]
    assert sorted(sum(batches[:5], [])) == list(range(40)), "an epoch"
    assert torch.equal(torch.stack(draws[:10]), torch.stack(draws[10:20]))
    heads = [{name: start.pop(name) for name in list(start) if name.startswith("fc.")} for start in starts]
    assert all(same(start, weights_of(encoder)) for start, encoder in zip(starts, (0, 1, 0, 0)))
    assert same(heads[0], heads[1]) and not same(heads[0], heads[3])
    assert same(tuned[0], tuned[2]) and not torch.equal(tuned[0]["conv.weight"], starts[0]["conv.weight"])


def test_identical_encoders_gain_exactly_nothing(pretrained, monkeypatch):
    monkeypatch.setattr(train_classifier, "build_encoder", lambda name, *rest: small_encoder(name, "random", 0))
    assert compare("--seeds", "0,1") == 0
    for protocol in PROTOCOLS:
        assert not gains("tiny", protocol).any() and results()["summary"]["all"][protocol]["interval"] == [0, 0]


def test_a_fine_tuning_in_detail(small, monkeypatch, generator):
    """A smaller budget takes as many steps, of its own images alone, which are normalised. The head learns at its own
    rate, behind a BatchNorm, and ends as one linear layer that answers as both did."""
    batches = calls_of(monkeypatch, "fetch", lambda pixels, index, device: sorted(index.tolist()))
    groups = calls_of(monkeypatch, "set_learning_rate", lambda optimizer, rate: optimizer.param_groups)
    inputs, setup, x = [], build("--head-rate", "0.25"), torch.randn(8, 3, 16, 16, generator=generator)
    hook = setup.network.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    tuned = fine_tune(setup, weights_of(0), torch.tensor([3, 5, 9, 11, 20]), 0, 0.04, "").eval()
    hook.remove()
    assert batches == [[3, 5, 9, 11, 20]] * 2 * 5
    images = denormalize(torch.cat(inputs))
    torch.testing.assert_close(images, images[:, :1].clamp(0, 1).expand_as(images))  # patterns are gray
    norm, linear = setup.network.eval().fc
    own = {id(p) for group in groups[0] if group["scale"] == 0.25 for p in group["params"]}
    assert own == set(map(id, linear.parameters())) and {group["scale"] for group in groups[0]} == {1, 0.25}
    assert type(norm) is torch.nn.BatchNorm1d and not norm.affine and type(tuned.fc) is torch.nn.Linear
    torch.testing.assert_close(tuned(x), setup.network(x), rtol=1e-4, atol=1e-4)


def test_where_no_terminal_shows_its_bar_a_line_says_each_half_minute_how_far_it_is(monkeypatch, capsys):
    now = [0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    advance = train_classifier.progress_over(10)
    for _ in range(10):
        now[0] += 25
        advance("seed 0")
    assert capsys.readouterr().out.splitlines() == [
        f"seed 0: step {step} of 10, {left} min left" for step, left in ((2, 3), (4, 2), (6, 2), (8, 1), (10, 0))]


def test_every_fine_tuning_starts_from_the_very_encoder_and_is_tested_once_at_its_end(pretrained, monkeypatch):
    """Neither the frozen protocols nor another budget move an encoder, and there is no best epoch to choose."""
    starts = calls_of(monkeypatch, "fine_tune", lambda setup, weights, *rest: copy.deepcopy(weights))
    asked = calls_of(monkeypatch, "extract_features", lambda network, pixels, *rest: len(starts))
    assert compare("--seeds", "0,1", "--labels-per-class", "3,all") == 0
    baseline, exported = map(weights_of, (0, 1)), torch.load(pretrained / "encoder.pt", weights_only=True)
    expected = sum(([weights] * 2 + [exported] * 2 for weights in baseline), [])
    assert len(starts) == 8 and all(map(same, starts, expected))
    # Before it training and test images for the frozen protocols, once an encoder; after each the test images.
    assert asked == [0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8]
