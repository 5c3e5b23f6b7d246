"""A run's folder: one writer, files that are whole or absent, checkpoints, metrics, and stopping when asked."""
import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NoReturn

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import (UNREADABLE, CannotWrite, Stopped, UsageError, UserError, constants_of, flag, one_line, progress,
                   rank_and_world, say)

RUNS = Path("runs")
LOCK = ".lock"
CHECKPOINTS = ("checkpoint.next.pt", "checkpoint.pt", "checkpoint.previous.pt")  # latest first; next only after a crash


def run_folder(*names: str) -> Path:
    """The folder of a run, or of several together. Raises UsageError for a name that could lead out of runs/."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise UsageError(f"RUN {name!r} is no run name: use letters, digits, '.', '_' and '-' ({flag('RUN')})")
    return RUNS / ",".join(names)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise CannotWrite, which names the path and the way out, where what is done inside cannot write."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"cannot write {path} ({error.strerror or one_line(error)}): make space or the folder "
                          "writable, then run the same command again") from error


@contextlib.contextmanager
def whole_file(path: Path, suffix: str = ".tmp") -> Iterator[BinaryIO]:
    """Write a file under a temporary name, flush it to disk, rename it: no reader or crash meets half a file."""
    partial = path.with_name(path.name + suffix)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def clear_run(folder: Path) -> None:
    """Remove a run's files, all but the lock that this process holds: checkpoints first, last what tells the run."""
    def turn(path: Path) -> tuple[bool, bool]:
        return not path.name.startswith("checkpoint"), path.name == "config.json"

    with writing(folder):
        for path in sorted(folder.iterdir(), key=turn):
            if path.name != LOCK and path.is_file():
                path.unlink()


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process; the system lets go of it when the process ends, however it ends."""
    with writing(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is being written by another process: wait for it, or choose another "
                            "RUN") from error
        except OSError:
            pass  # a file system without locks
        yield


def write_json(path: Path, content: Any) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path, key: str) -> dict:
    """A JSON object that this code wrote, which `key` tells. Raises UserError for any other file."""
    try:
        content = json.loads(path.read_text())
        content[key]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): delete it to start anew") from error


def same_constants(before: dict, now: dict, path: Path, free: set[str]) -> None:
    """Raise UserError, naming them, where constants other than the `free` ones differ from those in `path`."""
    before, now = json.loads(json.dumps([before, now]))  # tuples become lists, as in a JSON file
    changed = {name: f"{name} {value} -> {now.get(name)}" for name, value in before.items()  # earlier versions: fewer
               if value != now.get(name) and name not in free}
    if changed:
        why = " (the schedules span all EPOCHS: a longer run is another run)" * ("EPOCHS" in changed)
        raise UserError(f"{path} has other constants: {', '.join(changed.values())}; set them back, choose another "
                        f"RUN, or use --overwrite to start anew{why}")


def last_state(folder: Path, constants: dict, free: set[str], version: int | None,
               resolved: Iterable[str] = ()) -> dict | None:
    """The latest checkpoint, or None. Raises UserError where a run of other constants is there.

    version: of a checkpoint that can be continued; told first, for setting constants back would not help another.
    resolved: constants for which an earlier version recorded "auto", and this one what it stands for.
    """
    state, config = read_checkpoint(folder), folder / "config.json"
    if state:
        if state["step"] < state["total_steps"] and state.get("version") != version:
            raise UserError(f"{folder / 'checkpoint.pt'} is of an earlier version of this code, and cannot be "
                            "continued by this one: finish it with that version, or use --overwrite to start anew")
        unresolved = {name for name in resolved if state["constants"].get(name) == "auto"}
        same_constants(state["constants"], constants, folder / "checkpoint.pt", free | unresolved)
    elif config.exists():
        same_constants(read_json(config, "constants")["constants"], constants, config, free)
    return state


def save_torch(path: Path, content: Any) -> None:
    """torch.save, whole or not at all."""
    with whole_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer hides what stopped it: a full disk, or the user
            raise (error.__context__ or error) from None


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write checkpoint.pt; the one before it stays as checkpoint.previous.pt until the next."""
    latest, current, previous = (folder / name for name in CHECKPOINTS)
    save_torch(latest, state)
    if current.exists():
        os.replace(current, previous)
    os.replace(latest, current)


def read_checkpoint(folder: Path) -> dict | None:
    """The latest checkpoint that is whole; says so where that is not the last one written. None where there is none.

    Raises UserError where there are checkpoints and none can be read.
    """
    found = [folder / name for name in CHECKPOINTS if (folder / name).exists()]
    for path in found:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict) and {"step", "total_steps", "constants"} <= state.keys():
                return state
        except UNREADABLE:
            pass
        say(f"{path} is torn or no checkpoint of this code; looking for the one before it")
    if found:
        raise UserError(f"no checkpoint in {folder} can be read: --overwrite starts anew")
    return None


class Metrics:
    """metrics.csv: a row per log interval, appended to; continuing a run cuts it back to the checkpoint's step.

    columns: of each name, the numbers so far, nan where there is none. They stay in memory, for a long run's file takes
    seconds to read.
    """

    def __init__(self, path: Path, names: list[str], step: int):
        self.path, self.columns = path, {name: [] for name in names}
        rows = []
        if step > 0 and path.exists():
            whole_lines, _, _ = path.read_text().rpartition("\n")  # a killed process may leave half a row
            rows = [row for row in csv.DictReader(whole_lines.splitlines()) if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with whole_file(path) as file:
            file.write(text.getvalue().encode())
        for row in rows:
            self.remember(row)

    def remember(self, row: dict[str, float | str]) -> None:
        for name, numbers in self.columns.items():
            numbers.append(float(str(row.get(name, "")) or "nan"))

    def append(self, **row: float | str) -> None:
        with writing(self.path), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        self.remember(row)

    def flush(self) -> None:
        """Bring the rows to the disk, so that no checkpoint is ever ahead of them."""
        with writing(self.path), open(self.path, "a") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in the list, for the loop to stop after its step; a second one stops at once.

    Raises Stopped for the second. What comes within half a second of the first is the same one: torchrun repeats it.
    """
    received, first = [], 0.0

    def note(number, frame):
        nonlocal first
        if received and time.monotonic() - first > 0.5:
            raise Stopped("stopped at once: what was saved before is whole, and the same command continues from there",
                          number)
        if not received:
            received.append(number)
            first = time.monotonic()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Run:
    """The bookkeeping of a training: where it stands, what its steps gave, and what lies on the disk of it.

    What is trained it knows only as `parts`, by name, whose state a checkpoint holds; `facts` are what else one holds.
    Of several processes all call the same methods, and rank 0 writes.
    columns: of metrics.csv; step, epoch, loss and images_per_second are filled in here. shown: how a line shows some of
    them. plot: draws curves.png from them.
    """

    def __init__(self, folder: Path, c: SimpleNamespace, steps_per_epoch: int, device: torch.device,
                 parts: dict[str, Any], facts: dict[str, Any], columns: list[str], shown: dict[str, str],
                 plot: Callable[[Path, dict, SimpleNamespace], None]):
        self.folder, self.c, self.steps_per_epoch, self.device = folder, c, steps_per_epoch, device
        self.parts, self.facts, self.columns, self.shown, self.plot = parts, facts, columns, shown, plot
        self.rank, self.world = rank_and_world()
        self.step, self.total_steps = 0, c.EPOCHS * steps_per_epoch
        self.losses = []  # since the last row
        self.pending = []  # still on the device: reading one makes the host wait
        self.warned = False

    def resume(self, state: dict) -> None:
        """Take up the state of a checkpoint."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.losses = state["step"], state["losses"]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, steps are counted and logged, and signals ask for a stop."""
        self.metrics = Metrics(self.folder / "metrics.csv", self.columns, self.step) if self.rank == 0 else None
        self.first = self.step  # of the steps since `logged`
        self.logged = self.saved = self.plotted = self.told = time.monotonic()
        batch = self.c.BATCH_SIZE
        with stop_signals() as self.signals, progress(total=self.total_steps * batch, initial=self.step * batch,
                                                      unit="image", unit_scale=True) as self.bar:
            yield

    def note(self, **row: float) -> None:
        """A row of metrics.csv from outside the training, whose time is not that of any step."""
        if self.rank == 0:
            self.metrics.append(**row)
        self.logged = time.monotonic()

    @property
    def epoch_ends(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    @property
    def row_is_due(self) -> bool:
        return self.step % self.c.LOG_EVERY == 0 or self.epoch_ends

    def count(self, loss: Tensor) -> None:
        """A step is done. Losses are read, and the time is taken, when a row is due."""
        self.pending.append(loss)
        self.step += 1
        self.bar.update(self.c.BATCH_SIZE)
        if self.row_is_due:
            self.read_losses()
            self.speed = (self.step - self.first) * self.c.BATCH_SIZE / (time.monotonic() - self.logged)

    def read_losses(self) -> None:
        self.losses.extend(torch.stack(self.pending).tolist() if self.pending else [])
        self.pending.clear()
        sick = [not math.isfinite(loss) for loss in self.losses]
        if any(sick):
            self.refuse(f"the loss is no longer finite at step {self.step - len(sick) + 1 + sick.index(True)}")

    def refuse(self, what: str) -> NoReturn:
        raise UserError(f"{what}: lower LEARNING_RATE, lengthen WARMUP_EPOCHS or set PRECISION to fp32; the last "
                        f"checkpoint in {self.folder} is kept")

    def log(self, **numbers: float | str) -> None:
        """A row of metrics.csv; at an epoch's end, or where there is no progress bar now and then, a line."""
        row = dict(step=self.step, epoch=self.step / self.steps_per_epoch, loss=sum(self.losses) / len(self.losses),
                   images_per_second=round(self.speed, 1)) | numbers
        self.losses.clear()
        self.bar.set_postfix(loss=f"{row['loss']:.3f}")
        if self.rank == 0:
            self.metrics.append(**row)
            if time.monotonic() - self.plotted > 60:
                self.plot(self.folder / "curves.png", self.metrics.columns, self.c)
                self.plotted = time.monotonic()
        if self.epoch_ends or self.bar.disable and time.monotonic() - self.told > 30:
            self.told = time.monotonic()
            left = (self.total_steps - self.step) * self.c.BATCH_SIZE / self.speed / 60
            say(f"epoch {row['epoch']:.2f} of {self.c.EPOCHS}  "
                + "".join(text.format(row[name]) + "  " for name, text in self.shown.items() if name in row)
                + f"{self.speed:,.0f} images/s" + (f"  {left:.0f} min left" if left else ""))
        self.first, self.logged = self.step, time.monotonic()

    def warn(self, text: str) -> None:
        """The first warning is printed; a run that ails would repeat it at every row."""
        if not self.warned:
            say(f"warning: {text}")
        self.warned = True

    def goes_on(self) -> bool:
        """Save a checkpoint where one is due; False where a signal, to any of the processes, asks for a stop."""
        if self.step < self.total_steps and time.monotonic() - self.saved > self.c.CHECKPOINT_MINUTES * 60:
            self.save()
            self.saved = time.monotonic()
        if self.world == 1:
            return not self.signals
        if self.step % self.c.LOG_EVERY:
            return True  # asking takes a message to all the others
        asked = torch.tensor(len(self.signals), device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return asked.item() == 0

    def check_health(self) -> None:
        """Before anything is saved, so that a sick state never is."""
        self.read_losses()
        for part in self.parts.values():
            if isinstance(part, nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
                self.refuse(f"weights are no longer finite after step {self.step}")

    def save(self) -> None:
        self.check_health()
        if self.rank == 0:
            self.metrics.flush()
            save_checkpoint(self.folder, {name: part.state_dict() for name, part in self.parts.items()} | self.facts
                            | {"step": self.step, "total_steps": self.total_steps, "losses": self.losses,
                               "constants": constants_of(self.c)})

    def finish(self, name: str, weights: dict[str, Tensor]) -> None:
        """After the last step, write the weights, then the checkpoint that says so. Raises Stopped after any other."""
        self.check_health()
        if self.rank == 0 and self.step == self.total_steps:
            save_torch(self.folder / name, weights)
            self.plot(self.folder / "curves.png", self.metrics.columns, self.c)
        self.save()
        if self.step < self.total_steps:
            raise Stopped(f"stopped after step {self.step} of {self.total_steps}: the same command continues from "
                          "there", self.signals[0] if self.signals else signal.SIGTERM)
