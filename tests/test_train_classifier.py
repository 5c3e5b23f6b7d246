"""The comparison: fairness of the two arms, the probe, the run's settings, and the whole path on tiny data."""
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

import train_byol
import train_classifier
from conftest import small_encoder
from data import load_split
from test_data import write_folder, write_stl10
from test_train_byol import TINY
from train_classifier import BASELINE, WITH_BYOL, fine_tune, fit_logistic, linear_probe
from utils import read_constants

CPU = torch.device("cpu")
QUICK = ["--epochs", "2", "--batch-size", "8", "--device", "cpu"]


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

def test_a_comparison_fills_the_runs_folder(pretrained, capsys):
    assert compare() == 0
    assert {"results.json", "classifier.pt", "comparison.png"} <= {p.name for p in pretrained.iterdir()}
    found = results()
    assert [(r["seed"], r["arm"]) for r in found["records"]] == [(s, a) for s in (0, 1, 2) for a in (BASELINE, WITH_BYOL)]
    for by_arm in found["summary"].values():
        assert by_arm["gain"] == pytest.approx([b - a for a, b in zip(by_arm[BASELINE], by_arm[WITH_BYOL])])
    table = capsys.readouterr().out.split("test accuracy (%)")[1]
    assert all(name in table for name in ("fine-tuning", "linear probe", "kNN", "±", "seeds 0, 1, 2", "last epoch of 2"))
    assert max(map(len, table.splitlines())) <= 80


def test_a_comparison_is_decided_by_its_seeds(pretrained):
    compare()
    first = results()["records"]
    compare("--overwrite")
    assert results()["records"] == first


def test_an_interrupted_comparison_goes_on_at_the_first_missing_arm(pretrained, monkeypatch):
    assert compare() == 0
    whole = results()["records"]
    compare("--overwrite", "--seeds", "0")
    tune, trained = train_classifier.fine_tune, []

    def interrupted(*args):
        trained.append(args[-1])
        if len(trained) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return tune(*args)

    monkeypatch.setattr(train_classifier, "fine_tune", interrupted)
    assert compare("--overwrite") == 143 and len(results()["records"]) == 3
    assert compare() == 0 and len(trained) == 7
    assert results()["records"] == whole


def test_without_a_run_the_baseline_is_trained_and_the_other_half_explained(images, capsys):
    assert compare("--dataset", "images", "--image-size", "16", "--init", "random", "--seeds", "0") == 0
    out = capsys.readouterr().out
    assert "python train_byol.py --run tiny" in out and WITH_BYOL not in out and BASELINE in out
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


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(pretrained, split, capsys):
    (Path("images") / split).rename("elsewhere")
    assert compare() == 1
    assert f"{split}" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [(["--seeds", "0,0"], "SEEDS 0,0 repeats"), (["--seeds", "a"], "--seeds"),
                                           (["--crop-area", "0"], "CROP_AREA is 0"), (["--epochs", "-1"], "EPOCHS is -1")])
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


# ---------------------------------------------------------------------------------------------------------- fairness

def constants(*argv):
    return read_constants(vars(train_classifier), ["--demo", *QUICK, *argv])


def patterns(n=40):
    split = load_split("patterns", "train", "", 16)
    return split._replace(pixels=split.pixels[:n], labels=split.labels[:n])


def test_both_arms_get_the_same_head_batches_and_steps(monkeypatch):
    """Two different encoders: the same first head, the same images in the same order, the same crops."""
    meetings = []
    for seed_of_encoder in (0, 1):
        heads, batches, crops = [], [], []
        linear, fetch, draw = torch.nn.Linear, train_classifier.fetch, train_classifier.draw_crop
        monkeypatch.setattr(train_classifier.nn, "Linear", lambda *a: heads.append(linear(*a)) or heads[0])
        monkeypatch.setattr(train_classifier, "fetch", lambda p, i, d: batches.append(i.tolist()) or fetch(p, i, d))
        monkeypatch.setattr(train_classifier, "draw_crop", lambda *a: crops.append(draw(*a)) or crops[-1])
        encoder, feature_dim = small_encoder("", "random", seed_of_encoder)
        first = []
        build = train_classifier.build_optimizer
        monkeypatch.setattr(train_classifier, "build_optimizer",
                            lambda *a: first.append(heads[0].weight.detach().clone()) or build(*a))
        fine_tune(encoder, feature_dim, patterns(), 5, constants(), CPU, torch.float32)
        meetings.append((first[0], batches, torch.stack([box for box, _ in crops])))
        monkeypatch.undo()
    (head_a, batches_a, crops_a), (head_b, batches_b, crops_b) = meetings
    assert torch.equal(head_a, head_b) and batches_a == batches_b and torch.equal(crops_a, crops_b)
    assert len(batches_a) == 2 * 5 and sorted(sum(batches_a[:5], [])) == list(range(40))


def test_identical_encoders_gain_exactly_nothing(pretrained, monkeypatch):
    monkeypatch.setattr(train_classifier, "load_encoder", lambda *a: None)  # BYOL's arm starts from the init, too
    assert compare("--seeds", "0,1") == 0
    assert all(by_arm["gain"] == [0, 0] for by_arm in results()["summary"].values())


def test_the_heads_differ_between_seeds_and_the_encoder_is_trained():
    encoder, feature_dim = small_encoder("", "random", 0)
    before = encoder.conv.weight.detach().clone()
    a = fine_tune(encoder, feature_dim, patterns(), 0, constants(), CPU, torch.float32)
    assert not torch.equal(a.conv.weight, before)
    b = fine_tune(small_encoder("", "random", 0)[0], feature_dim, patterns(), 1, constants(), CPU, torch.float32)
    assert not torch.equal(a.fc.weight, b.fc.weight)


def test_frozen_evaluation_moves_no_weight_and_no_buffer():
    encoder, _ = small_encoder("", "random", 0)
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    train = patterns()
    scores = train_classifier.evaluate_frozen(encoder, train, train, 0, CPU, torch.float32)
    assert set(scores) == {"linear probe", "probe penalty", "kNN"}
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_the_last_epoch_is_reported(pretrained, monkeypatch):
    """The test images are predicted once, after training: there is no best epoch to choose."""
    calls, extract = [], train_classifier.extract_features
    monkeypatch.setattr(train_classifier, "extract_features", lambda e, p, *a: calls.append(len(p)) or extract(e, p, *a))
    compare("--seeds", "0")
    assert len(calls) == 2 * 3  # an arm: training and test images for the frozen protocols, test images at the end


def test_random_labels_are_learned_at_chance(images, generator):
    train, test = (load_split("patterns", split, "", 16) for split in ("train", "test"))
    shuffled = test._replace(labels=test.labels[torch.randperm(len(test.labels), generator=generator)])
    train = train._replace(labels=train.labels[torch.randperm(len(train.labels), generator=generator)])
    scores = train_classifier.evaluate_frozen(small_encoder("", "random", 0)[0], train, shuffled, 0, CPU, torch.float32)
    bound = 4 * math.sqrt(0.1 * 0.9 / len(test.labels)) * 100
    assert abs(scores["linear probe"] - 10) < bound and abs(scores["kNN"] - 10) < bound


# ------------------------------------------------------------------------------------------------------------- probe

def test_logistic_regression_reaches_the_minimum(generator):
    """At the optimum the gradient of the convex objective is 0; checked in fp64, on the standardised features."""
    x = torch.randn(200, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    labels = torch.randint(0, 3, (200,), generator=generator)
    head = fit_logistic(x, labels, classes=3, penalty=0.05)
    mean, std = x.double().mean(0), x.double().std(0)
    weight = (head.weight.double() * std).requires_grad_()
    bias = (head.bias.double() + head.weight.double() @ mean).requires_grad_()
    loss = F.cross_entropy((x.double() - mean) / std @ weight.T + bias, labels) + 0.05 / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max(g.abs().max().item() for g in gradients) < 1e-4


def test_linear_probe_finds_what_theory_allows(generator):
    """Two classes at distance 2 in unit noise: Phi(1) = 84.1% at best."""
    labels = torch.randint(0, 2, (6000,), generator=generator)
    x = torch.randn(6000, 5, generator=generator)
    x[:, 0] += labels * 2.0
    probe, penalty = linear_probe(x[:2000], labels[:2000], 2, seed=0)
    right = (probe(x[2000:]).argmax(1) == labels[2000:]).float().mean().item()
    assert abs(right - 0.8413) < 4 * math.sqrt(0.84 * 0.16 / 4000) and penalty in train_classifier.PROBE_PENALTIES
