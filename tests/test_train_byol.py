"""Pretraining end to end on tiny data: the loop, the run's folder, stopping and continuing, several processes."""
import copy
import csv
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_byol
import train_classifier
import utils
from byol import BYOL, build_optimizer
from conftest import small_encoder, trace_compiled
from data import batch_indices, load_split
from test_data import write_folder
from utils import read_constants, seeded_generator, seeded_init
from views import two_views

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = ["--init", "random", "--image-size", "16", "--hidden-dim", "32", "--projection-dim", "16", "--batch-size", "8",
        "--epochs", "2", "--log-every", "2", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def tiny(tmp_path, small):
    """A folder of 20 unlabeled and 10 labelled images; returns a function that pretrains a small encoder on it."""
    write_folder(tmp_path / "images", per_class=5, unlabeled=20)
    return lambda *argv, run="tiny": train_byol.main(["--dataset", "images", *TINY, "--run", run, *argv])


def signal_at(monkeypatch, step, signum=signal.SIGTERM):
    """A signal arrives in the step of that number, from 1. Returns a list that grows by each step's precision."""
    train_step, precisions = train_byol.train_step, []

    def signalled(*args):
        precisions.append(args[-1])
        if len(precisions) == step:
            os.kill(os.getpid(), signum)
        return train_step(*args)

    monkeypatch.setattr(train_byol, "train_step", signalled)
    return precisions


def rows(run):
    return list(csv.DictReader(open(f"runs/{run}/metrics.csv", newline="")))


def without_timings(run):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(run)]


def weights(run):
    return torch.load(f"runs/{run}/encoder.pt", weights_only=True)


def checkpoint(run):
    return torch.load(f"runs/{run}/checkpoint.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_fills_its_folder(tiny, drawn, capsys):
    assert tiny() == 0
    assert {p.name for p in Path("runs/tiny").iterdir()} == {".lock", "config.json", "metrics.csv", "checkpoint.pt",
                                                             "encoder.pt", "views.png", "curves.png"}
    assert all(Path("runs/tiny", name).read_bytes().startswith(b"\x89PNG") for name in ("views.png", "curves.png"))
    config = json.loads(Path("runs/tiny/config.json").read_text())
    assert config["constants"]["BATCH_SIZE"] == 8 and config["environment"]["world_size"] == 1
    assert config["environment"]["torch"] == torch.__version__ and config["version"] == utils.VERSION
    table = rows("tiny")
    assert [row["step"] for row in table] == ["0", "2", "4"], "20 images make two batches of 8, the rest is dropped"
    start = table.pop(0)
    assert start["loss"] == "" and all(0 <= float(start[name]) <= 100 for name in ("knn", "probe")), "to rise above"
    assert all(1 <= float(row["rank"]) <= 9 for row in (start, *table)), "of 10 labelled images"
    assert all(0 <= float(row["loss"]) <= 8 and float(row["spread"]) > 0 for row in table)
    assert [float(row["epoch"]) for row in table] == [1, 2] and all(row["knn"] and row["probe"] for row in table)
    out = capsys.readouterr().out
    assert "BYOL: 20 images, resnet18 (7x7) from random weights at 16 px, 2 epochs of 2 steps, on cpu in fp32" in out
    assert "epoch 2.00 of 2  loss" in out


def test_runs_are_decided_by_the_seed(tiny):
    tiny(run="a"), tiny(run="b"), tiny("--seed", "1", run="c")
    assert same(weights("a"), weights("b")) and not same(weights("a"), weights("c"))
    assert without_timings("a") == without_timings("b")


@pytest.mark.parametrize("flags", ["--precision fp32", "--precision bf16", "--predictor-rate 1 --weight-decay 0"])
def test_a_stopped_run_continues_bit_for_bit(tiny, monkeypatch, capsys, flags):
    """A signal in any step: a checkpoint, its exit status; the same command ends where an uninterrupted run does."""
    monkeypatch.setattr(signal, "SIG_IGN", None)  # these tests may run under nohup
    tiny(*(argv := [*flags.split(), "--log-every", "3"]), run="whole")
    for stop_after, signum in ((1, signal.SIGTERM), (2, signal.SIGHUP), (3, signal.SIGINT)):
        with monkeypatch.context() as patch:
            steps = signal_at(patch, stop_after, signum)
            assert tiny(*argv, run=signum.name) == 128 + signum and not Path(f"runs/{signum.name}/encoder.pt").exists()
            out = capsys.readouterr().out
            assert f"stopped after step {stop_after} of 4: the same command continues from there" in out
            assert rows(signum.name), "what was logged so far"
            assert tiny(*argv, run=signum.name) == 0
        assert f", from step {stop_after}\n" in capsys.readouterr().out and len(steps) == 4
        assert same(weights("whole"), weights(signum.name)) and without_timings("whole") == without_timings(signum.name)
        assert same(checkpoint("whole")["model"], checkpoint(signum.name)["model"])


def test_a_finished_run_says_so_and_how_to_go_on_from_its_encoder(tiny, capsys):
    tiny()
    before = {p: p.read_bytes() for p in Path("runs/tiny").iterdir()}
    assert tiny() == 0
    out = capsys.readouterr().out
    assert "runs/tiny is finished" in out and "with --init runs/tiny/encoder.pt from its encoder" in out
    assert {p: p.read_bytes() for p in Path("runs/tiny").iterdir()} == before
    assert tiny("--init", "runs/tiny/encoder.pt", "--learning-rate", "0", run="further") == 0
    assert torch.equal(weights("further")["conv.weight"], weights("tiny")["conv.weight"])


def test_what_comes_next_is_a_command_that_names_this_run(tiny, tmp_path, monkeypatch, capsys):
    """Whether its name and the data's were given as flags or edited in the file."""
    def next_of(*argv):
        assert train_byol.main(["--dataset", "images", *TINY, "--epochs", "1", *argv]) == 0
        flags = capsys.readouterr().out.splitlines()[-1].partition("; next: python train_classifier.py ")[2]
        c = read_constants(vars(train_classifier), shlex.split(flags))
        assert Path("runs", *c.RUN, "encoder.pt").exists()
        return flags

    assert next_of() == "--run byol"
    assert next_of("--demo") == "--demo" and next_of("--demo", "--run", "x") == "--demo --run x"
    monkeypatch.setattr(train_byol, "RUN", "mine")
    assert next_of() == "--run mine"
    monkeypatch.setattr(train_byol, "DATA_ROOT", "my data")
    assert next_of("--run", "yours", "--max-unreadable", "1") == (
        f"--run yours --data-root '{tmp_path}/my data' --max-unreadable 1.0")


@pytest.mark.parametrize("minutes, reads, saves", [
    ("1000", [3, 1, 2, 2, 0], [8]), ("0", [1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0], [1, 2, 3, 4, 5, 6, 7, 8])])
def test_rows_hold_means_of_losses_and_checkpoints_come_when_due(tiny, monkeypatch, minutes, reads, saves):
    """The host reads losses, and so waits for the device, where a row or a checkpoint is due and nowhere else."""
    losses, read, saved = iter(map(float, range(1, 9))), [], []
    read_losses, save = train_byol.read_losses, train_byol.save_torch
    monkeypatch.setattr(train_byol, "train_step", lambda *_: torch.tensor(next(losses)))
    monkeypatch.setattr(train_byol, "read_losses", lambda state, pending, model=None: read.append(len(pending))
                        or read_losses(state, pending, model))
    monkeypatch.setattr(train_byol, "save_torch", lambda path, x: saved.append(x.get("step")) or save(path, x))
    assert tiny("--batch-size", "5", "--log-every", "3", "--checkpoint-minutes", minutes) == 0
    assert [(row["step"], row["epoch"], row["loss"]) for row in rows("tiny")[1:]] == [
        ("3", "0.75", "2.0"), ("4", "1.0", "4.0"), ("6", "1.5", "5.5"), ("8", "2.0", "7.5")]
    assert read == reads and saved == [*saves, None], "a last checkpoint, and then the encoder"


def test_pretraining_needs_no_test_split_no_labels_and_no_unlabeled_images(tiny, tmp_path, capsys):
    (tmp_path / "images" / "test").rename(tmp_path / "elsewhere")
    assert tiny(run="no_test") == 0 and "kNN" in (out := capsys.readouterr().out) and "probe" in out
    (tmp_path / "images" / "train").rename(tmp_path / "labelled")
    assert tiny(run="no_labels") == 0 and "kNN" not in capsys.readouterr().out
    assert all(row["knn"] == row["probe"] == row["rank"] == "" for row in rows("no_labels"))
    assert same(weights("no_test"), weights("no_labels")), "the monitor changes nothing"
    (tmp_path / "labelled").rename(tmp_path / "images" / "train")
    (tmp_path / "images" / "unlabeled").rename(tmp_path / "unlabeled")
    assert tiny() == 0 and "BYOL: 10 images" in capsys.readouterr().out, "those of train/"


def test_a_training_step_moves_the_online_network_and_then_the_target():
    """At the rate of the call, not the optimizer's; the predictor four times as fast."""
    model = BYOL(small_encoder("", "random", 0)[0], 64, 16, 8)
    optimizer = build_optimizer(model, 0, "predictor", 4)
    before = copy.deepcopy(model)
    both = tuple(torch.randn(2, 8, 3, 16, 16).unbind(0))
    loss = train_byol.train_step(model, model, optimizer, both, 0.05, 0.75, "fp32")
    assert loss.shape == () and not loss.requires_grad
    for name, p in model.named_parameters():
        old = before.get_parameter(name)
        if name.startswith("target"):
            online = model.get_parameter(name.replace("target", "online"))
            torch.testing.assert_close(p, 0.75 * old + 0.25 * online)
        else:
            assert p.grad.abs().max() > 0
            torch.testing.assert_close(p, old - (0.2 if name.startswith("predictor") else 0.05) * p.grad)


def test_bf16_and_fp32_stay_together():
    """The same 40 steps. bf16 keeps 8 bits, an error of up to 0.4% an operation, so that a loss of some 2 may differ by
    a few percent (0.04 was measured) and must not drift away."""
    images, losses = load_split("patterns", "unlabeled", "", 32).pixels[:64], {}
    for precision in ("fp32", "bf16"):
        with seeded_init(0, "heads"):
            model = BYOL(small_encoder("", "random", 0)[0].to(memory_format=torch.channels_last), 64, 64, 16)
        optimizer = build_optimizer(model, 0)
        losses[precision] = torch.stack([
            train_byol.train_step(model, model, optimizer, two_views(images, 16, seeded_generator(0, step)), 0.03, 0.99,
                                  precision) for step in range(40)])
        assert losses[precision].dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    difference = (losses["fp32"] - losses["bf16"]).abs()
    assert difference.max() > 0, "bf16 was used"
    assert difference.max() < 0.1 and losses["fp32"][-5:].mean() < losses["fp32"][0] - 0.5


def test_compiled_training_is_the_same_training(tiny, monkeypatch, capsys):
    """What is compiled on a GPU traces here, too, in one graph, on the path without questions to the host."""
    tiny(run="eager")
    compiled = trace_compiled(monkeypatch)
    assert tiny(run="short") == 0 and not compiled, "a short run does not win back the time"
    monkeypatch.setattr(utils, "MIN_STEPS_TO_COMPILE", 4)
    monkeypatch.setattr("views.where_needed", lambda operation, x, amount: operation(x, amount))
    assert tiny(run="compiled") == 0 and len(compiled) == 2 and "compiling" in capsys.readouterr().out
    for name, value in weights("eager").items():
        torch.testing.assert_close(weights("compiled")[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("flags, expected", [
    ("--init random", (0.2, 1.0, "batch", 0.996)), ("--init imagenet", (0.5, 0.5, "frozen", 0.999)),
    ("--init x.pt --batchnorm batch --base-decay 0.5", (0.5, 0.5, "batch", 0.5))])
def test_auto_depends_on_the_first_weights_and_what_is_set_stands(flags, expected):
    train_byol.resolve(c := read_constants(vars(train_byol), flags.split()))
    assert tuple(getattr(c, name) for name in train_byol.RECIPE) == expected


def test_the_target_moves_from_any_weights(tiny):
    """By default: it ends neither as it began nor as the online network."""
    assert tiny(run="first") == 0
    assert tiny("--init", "runs/first/encoder.pt", run="second") == 0
    for run, init in (("first", small_encoder("", "random", 0)[0].state_dict()), ("second", weights("first"))):
        assert json.loads(Path(f"runs/{run}/config.json").read_text())["constants"]["BASE_DECAY"] <= 0.999
        model = checkpoint(run)["model"]
        target, online = model["target_encoder.conv.weight"], model["online_encoder.conv.weight"]
        assert not torch.equal(target, init["conv.weight"]) and not torch.equal(target, online)


def test_constants_reach_the_optimizer_the_schedules_and_the_views(tiny, monkeypatch):
    first, scales, seen, step = {}, set(), [], train_byol.train_step

    def looked_at(network, model, optimizer, *rest):
        first or first.update(copy.deepcopy(model.state_dict()))
        scales.update(group["scale"] for group in optimizer.param_groups)
        return step(network, model, optimizer, *rest)

    monkeypatch.setattr(train_byol, "train_step", looked_at)
    monkeypatch.setattr(train_byol, "two_views", lambda *args: seen.append(args[3:6]) or two_views(*args))
    flags = "--crop-area 0.5 --blur-p 0.3,0 --jitter 0.25 --predictor-rate 3 --warmup-epochs 100 --learning-rate 0.1"
    assert tiny(*flags.split(), "--base-decay", "1", "--log-every", "1") == 0
    assert scales == {1, 3.0} and seen == [(0.5, (0.3, 0.0), 0.25)] * 5, "the figure's and four batches"
    assert [float(row["learning_rate"]) for row in rows("tiny")[1:]] == pytest.approx([0, 0.05, 0.1, 0.05])
    assert [float(row["decay"]) for row in rows("tiny")[1:]] == [1, 1, 1, 1]
    for name, value in checkpoint("tiny")["model"].items():
        if value.ndim > 1:
            assert torch.equal(value, first[name]) == name.startswith("target"), "at a decay of 1 it never moves"


@pytest.mark.parametrize("batchnorm, frozen", [("auto", True), ("batch", False)])
def test_batchnorm_is_frozen_also_after_the_monitor_looked(tiny, batchnorm, frozen):
    """It puts the encoder into eval mode, and back."""
    encoder, _ = small_encoder("", "random", 7)
    encoder.bn.running_mean.normal_()
    torch.save(encoder.state_dict(), "first.pt")
    assert tiny("--batchnorm", batchnorm, "--init", "first.pt") == 0
    for network in ("online_encoder", "target_encoder"):
        assert torch.equal(checkpoint("tiny")["model"][f"{network}.bn.running_mean"], encoder.bn.running_mean) == frozen


@pytest.mark.parametrize("missing", ["metrics.csv", "curves.png", "encoder.pt"])
def test_pretraining_ends_with_its_verdict_also_when_it_was_continued(tiny, monkeypatch, capsys, missing):
    """Where it was stopped on the way, and where it ended after its last checkpoint, before all files were written."""
    answers = iter([torch.arange(100) < correct for correct in (10, 50, 90)])
    monkeypatch.setattr(train_byol, "monitor",
                        lambda *args, **rest: {"knn": (x := next(answers)), "probe": x.roll(5).logical_not()})
    signal_at(monkeypatch, 3)
    assert tiny() == 143 and "went from" not in capsys.readouterr().out
    replace = os.replace

    def full(source, target):
        if target.name == missing:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert tiny() == 1 and f"runs/tiny/{missing} (No space left" in capsys.readouterr().err
    assert checkpoint("tiny")["step"] == 4 and not Path("runs/tiny/encoder.pt").exists()
    assert tiny() == 0
    out = capsys.readouterr().out
    assert "kNN went from 10.0% to 90.0%, by +80.0 ± 8.0 (95%): pretraining gained" in out
    assert "linear probe went from 90.0% to 10.0%, by -80.0 ± 8.0 (95%): pretraining LOST" in out
    assert [row["knn"] + "," + row["probe"] for row in rows("tiny")] == ["10.0,90.0", "50.0,50.0", "90.0,10.0"]


def test_every_image_of_an_epoch_is_taken_once():
    steps = list(batch_indices(0, "order", 50, 7, 0, 14))
    first, second = torch.cat(steps[:7]).tolist(), torch.cat(steps[7:]).tolist()
    assert first != second and len(set(first)) == len(set(second)) == 49, "the remainder is dropped"
    assert set(first) | set(second) <= set(range(50))
    assert all(map(torch.equal, batch_indices(0, "order", 50, 7, 3, 14), steps[3:])), "from any step on"
    halves = zip(*(batch_indices(0, "order", 50, 7, 0, 14, rank, 2) for rank in (0, 1)))
    assert all(torch.equal(torch.cat(half).sort()[0], step.sort()[0]) for half, step in zip(halves, steps, strict=True))


def test_two_processes_share_a_batch_step_as_one_stop_together_and_continue(tmp_path, small, monkeypatch, capsys):
    """Their gradient is that of one process on both halves, as long as BatchNorm is frozen, which on a CPU sees its own
    half alone. One of them is asked to stop, twice, as torchrun does it. A GPU beside the CPU changes nothing."""
    write_folder(tmp_path / "images", per_class=5, unlabeled=20)
    argv = ["--dataset", "images", *TINY, "--run", "two"]
    Path("script.py").write_text(f"""
import copy, os, signal, sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
import torch, torch.distributed as dist, data, train_byol
from conftest import small_encoder
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
step, fetch, steps, orders = train_byol.train_step, data.fetch, [], data.batch_indices(0, "order", 20, 8, 0, 4)
def of_both(x):
    dist.all_gather(shares := [torch.empty_like(x) for _ in range(2)], x.contiguous())
    return shares
def recorded(pixels, index, device):
    if len(index) == 4:  # no stamp's
        assert torch.equal(torch.cat(of_both(index)).sort().values, next(orders).sort().values)
    return fetch(pixels, index, device)
def compared(network, model, optimizer, views, *rest):
    assert not network.broadcast_buffers, "130 of them, a step, that nobody needs"
    steps.append(1)
    if dist.get_rank() == len(steps) == 1:
        os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGTERM)
    for module in model.modules():
        if "BatchNorm" in type(module).__name__:
            module.train(len(steps) > 2)
    alone = copy.deepcopy(model)
    alone.zero_grad()
    alone(*(torch.cat(of_both(view)) for view in views)).backward()
    loss = step(network, model, optimizer, views, *rest)
    for p, q in zip(model.parameters(), alone.parameters()):
        assert not p.requires_grad or len(steps) > 2 or (p.grad - q.grad).abs().max() < 1e-5 * q.grad.abs().max()
    assert torch.equal(*of_both(torch.cat([p.detach().flatten() for p in model.parameters()]))), "equal bit for bit"
    return loss
train_byol.build_encoder, train_byol.train_step, data.fetch = small_encoder, compared, recorded
assert train_byol.main({argv}) == 143 and len(steps) == 2
dist.barrier()
assert train_byol.main({argv}) == 0 and len(steps) == 4
""")
    alone = ["--standalone", "--local-addr=localhost"]  # a port that is free, under a name that resolves everywhere
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *alone, "script.py"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "stopped after step 2 of 4" in done.stdout, done.stderr
    assert done.stdout.count(", from step 2") == done.stdout.count("epoch 2.00 of 2") == 1
    assert json.loads(Path("runs/two/config.json").read_text())["environment"]["world_size"] == 2
    Path("runs/two/encoder.pt").unlink()
    threads = []
    monkeypatch.setattr(train_byol, "choose_threads", lambda device, begun_with: threads.append(begun_with) or "")
    assert train_byol.main(argv) == 0 and threads == [None], "alone it has more"
    assert "begun by 2 processes, continued by 1" in capsys.readouterr().out
    assert [path.name for path in Path("runs").iterdir()] == ["two"] and Path("runs/two/encoder.pt").exists()
