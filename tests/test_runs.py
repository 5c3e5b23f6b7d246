"""The bookkeeping of a run by itself: no image, no network that learns, no training."""
import csv
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import runs
from runs import Run, last_state
from utils import Stopped, UserError, constants_of

FOLDER = Path("runs/some")


def begin(state=None, steps_per_epoch=4, **constants):
    """A run of two epochs of four steps, a row every third step, of whatever has a state."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    c = SimpleNamespace(**dict(EPOCHS=2, BATCH_SIZE=5, LOG_EVERY=3, CHECKPOINT_MINUTES=math.inf) | constants)
    run = Run(FOLDER, c, steps_per_epoch, torch.device("cpu"), parts={"model": nn.Linear(2, 2)}, facts={"images": 20},
              columns=["step", "epoch", "loss", "images_per_second", "rate"],
              shown={"loss": "loss {:.2f}", "rate": "rate {:.1f}"},
              plot=lambda path, columns, c: path.write_text(str(len(columns["step"]))))
    if state:
        run.resume(state)
    return run


def step_through(run, losses, until=8):
    """What a training loop does."""
    while run.step < until:
        run.count(torch.tensor(losses[run.step]))
        if run.row_is_due:
            run.log(rate=run.step / 10)
        if not run.goes_on():
            return


def rows():
    return [(int(row["step"]), float(row["epoch"]), float(row["loss"]), float(row["rate"]))
            for row in csv.DictReader(open(FOLDER / "metrics.csv"))]


LOSSES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
ROWS = [(3, 0.75, 2.0, 0.3), (4, 1.0, 4.0, 0.4), (6, 1.5, 5.5, 0.6), (8, 2.0, 7.5, 0.8)]  # means since the row before


def test_a_run_from_its_first_step_to_its_last(capsys):
    run = begin()
    with run.recording():
        step_through(run, LOSSES)
        run.finish("weights.pt", run.parts["model"].state_dict())
    assert rows() == ROWS and (FOLDER / "curves.png").read_text() == "4"
    state = torch.load(FOLDER / "checkpoint.pt", weights_only=True)
    assert state["step"] == state["total_steps"] == 8 and state["images"] == 20 and state["losses"] == []
    assert torch.equal(torch.load(FOLDER / "weights.pt", weights_only=True)["weight"], state["model"]["weight"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" images/s")[0].rsplit("  ", 1)[0] for line in lines] == [
        "epoch 1.00 of 2  loss 4.00  rate 0.4", "epoch 2.00 of 2  loss 7.50  rate 0.8"]


def test_losses_are_read_only_where_a_row_is_due(monkeypatch):
    read, stack = [], torch.stack
    monkeypatch.setattr(runs.torch, "stack", lambda losses: read.append(len(losses)) or stack(losses))
    run = begin()
    with run.recording():
        step_through(run, LOSSES)
    assert read == [3, 1, 2, 2]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_a_stopped_run_goes_on_where_it_stood(stop_after):
    run = begin()
    with pytest.raises(Stopped, match=f"after step {stop_after} of 8") as stopped, run.recording():
        step_through(run, LOSSES, until=stop_after - 1)
        os.kill(os.getpid(), signal.SIGTERM)
        step_through(run, LOSSES)
        run.finish("weights.pt", {})
    assert stopped.value.status == 128 + signal.SIGTERM and not (FOLDER / "weights.pt").exists()
    again = begin(last_state(FOLDER, constants_of(run.c), set(), None))
    assert again.step == stop_after
    assert torch.equal(again.parts["model"].weight, run.parts["model"].weight)
    with again.recording():
        step_through(again, LOSSES)
        again.finish("weights.pt", {})
    assert rows() == ROWS


def test_checkpoints_are_written_when_they_are_due_and_the_last_one_by_the_end(monkeypatch):
    saved = []
    monkeypatch.setattr(runs, "save_checkpoint", lambda folder, state: saved.append(state["step"]))
    for minutes, steps in ((0, [1, 2, 3, 4, 5, 6, 7]), (math.inf, [])):
        run = begin(CHECKPOINT_MINUTES=minutes)
        with run.recording():
            step_through(run, LOSSES)
            assert saved == steps
            run.finish("weights.pt", {})
        assert saved.pop() == 8
        saved.clear()


@pytest.mark.parametrize("minutes, found_at", [(math.inf, 6), (0, 5)])  # when a row is due, or a checkpoint
def test_a_sick_loss_is_named_by_its_step_and_ends_the_run(minutes, found_at):
    run = begin(CHECKPOINT_MINUTES=minutes)
    with pytest.raises(UserError, match="no longer finite at step 5: lower LEARNING_RATE"), run.recording():
        step_through(run, [*LOSSES[:4], math.nan, *LOSSES[5:]])
    assert run.step == found_at


def test_sick_weights_reach_no_file():
    run = begin()
    with pytest.raises(UserError, match="weights are no longer finite after step 8"), run.recording():
        step_through(run, LOSSES)
        nn.init.constant_(run.parts["model"].weight, math.inf)
        run.finish("weights.pt", {})
    assert not (FOLDER / "checkpoint.pt").exists() and not (FOLDER / "weights.pt").exists()


def test_a_warning_is_given_once(capsys):
    run = begin()
    run.warn("it ails")
    run.warn("it ails more")
    assert capsys.readouterr().out == "warning: it ails\n"
