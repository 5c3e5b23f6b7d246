"""Pretrain an encoder on unlabeled images with BYOL.

    python train_byol.py --demo                       patterns drawn by the code: minutes on a CPU, no download
    python train_byol.py                              STL-10, downloaded once (2.6 GB)
    python train_byol.py --dataset FOLDER --run NAME  your own images: FOLDER/unlabeled/, at any depth

Edit the constants below or pass them as flags. Everything goes to runs/RUN/: the encoder as a plain torchvision state
dict (encoder.pt), the curves, and a checkpoint; the same command again continues an unfinished run.
`torchrun --nproc-per-node=N -- train_byol.py ...` trains on N GPUs.
"""
import contextlib
import shlex
import sys
import time
from functools import partial
from math import isfinite
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Callable

import torch
from torch import Tensor, nn

from byol import BYOL, build_optimizer, learning_rate, set_learning_rate, target_decay
from data import Split, batch_indices, batches, load_for_pretraining, place
from encoders import build_encoder, digest_of, plain_state_dict
from evaluate import monitor, scores_of, verdict
from plots import plot_curves, plot_views
from utils import (LOCK, UNREADABLE, VERSION, UserError, any_process, as_text, autocast, choice, choose_threads,
                   compiler, constants_of, count, distribute, environment, number, on_signals, one_line, only_writer,
                   path, progress, rank_0_first, rank_and_world, read_json, refuse_changes, run_folder, run_script,
                   save_torch, say, seeded_generator, seeded_init, select_device, select_precision, several,
                   start_processes, timer, whole_file, write_json)
from views import render_views, two_views

# Data
DATASET = "stl10"  # stl10, cifar10, patterns, or a folder with unlabeled/ and, for the monitor, train/<class>/
DATA_ROOT = "data"  # where STL-10, CIFAR-10 and the caches of decoded folders live
MAX_UNREADABLE = 0.01  # share of a folder's images that may be unreadable: they are skipped
IMAGE_SIZE = 96  # pixels a side of the views, and of a folder's images
CROP_AREA = "auto"  # smallest share of an image that a view shows
BLUR_P = (0.3, 0.03)  # probability of the blur in view 1 and in view 2 (paper: 1, 0.1, at 224 pixels a side)
JITTER = "auto"  # strength of the colour jitter, as a multiple of the paper's
# Networks
ENCODER = "resnet18"  # any torchvision ResNet by name
STEM = "7x7"  # 7x7 is torchvision's; 3x3, of stride 1 and without max-pooling, is for images of 32 pixels
INIT = "imagenet"  # imagenet, random, or a file with a state dict of that ResNet
BATCHNORM = "auto"  # of the encoder: batch, or frozen: the statistics of INIT
HIDDEN_DIM = 1024  # width of projector and predictor (paper: 4096)
PROJECTION_DIM = 256  # of the vectors that are compared
# Training
EPOCHS = 10  # passes over the unlabeled images
BATCH_SIZE = 256  # images a step, over all GPUs together (paper: 4096)
LEARNING_RATE = 0.05  # peak rate, the same for every BATCH_SIZE (paper: 3.2, by LARS)
PREDICTOR_RATE = 10.0  # how many times as fast the predictor learns (paper: 1)
WEIGHT_DECAY = 5e-4  # of matrices and convolutions alone (paper: 1.5e-6)
WARMUP_EPOCHS = 1.0  # linear rise of the rate, at most half of the run; then a cosine to zero
BASE_DECAY = "auto"  # tau at the start: what the target keeps of itself; rises to 1
SEED = 0  # of the weights, the order of the images and the views
# The run
RUN = "byol"  # name of the run's folder in runs/
DEVICE = "auto"  # auto is cuda, then mps, then cpu
PRECISION = "auto"  # bf16, fp32, or auto: bf16 where the hardware has it
LOG_EVERY = 20  # steps between rows of metrics.csv; between them no step waits for its loss
CHECKPOINT_MINUTES = 5.0  # between checkpoints

RECIPE = {  # what "auto" stands for where INIT is
    #              random   others    (the paper)
    "CROP_AREA":  (0.2,     0.5,      0.08),
    "JITTER":     (1.0,     0.5,      1.0),
    "BATCHNORM":  ("batch", "frozen", "batch"),
    "BASE_DECAY": (0.996,   0.999,    0.996)}
KINDS = dict(DATASET=path("stl10", "cifar10", "patterns"), DATA_ROOT=path(), MAX_UNREADABLE=number(0, 1),
             IMAGE_SIZE=number(16, whole=True), CROP_AREA=number(0.01, 1, "auto"),
             BLUR_P=several(number(0, 1), exactly=2), JITTER=number(0, 2, "auto"), ENCODER=str,
             STEM=choice("7x7", "3x3"), INIT=path("imagenet", "random"), BATCHNORM=choice("auto", "batch", "frozen"),
             HIDDEN_DIM=number(1, whole=True), PROJECTION_DIM=number(2, whole=True), EPOCHS=number(1, whole=True),
             BATCH_SIZE=number(2, whole=True), LEARNING_RATE=number(0), PREDICTOR_RATE=number(0),
             WEIGHT_DECAY=number(0), WARMUP_EPOCHS=number(0), BASE_DECAY=number(0, 1, "auto"),
             SEED=number(0, whole=True), RUN=str, DEVICE=str, PRECISION=choice("auto", "bf16", "fp32"),
             LOG_EVERY=number(1, whole=True), CHECKPOINT_MINUTES=number(0))
DEMO = dict(DATASET="patterns", IMAGE_SIZE=32, INIT="random", RUN="demo", EPOCHS=7, BATCH_SIZE=64)
FREE = {"RUN", "DEVICE", "DATA_ROOT", "MAX_UNREADABLE", "CHECKPOINT_MINUTES", "LABELLED",
        "DATASET", "IMAGES"}  # may change between a run and its continuation; load_images refuses other images
COLUMNS = {  # of metrics.csv, and how a line shows them
    "step": "", "epoch": "", "loss": "loss {:.3f}", "learning_rate": "", "decay": "", "spread": "spread {:.3f}",
    "knn": "kNN {:.1f}%", "probe": "probe {:.1f}%", "rank": "rank {:.0f}", "images_per_second": "{:,.0f} images/s"}


def pretrain(c: SimpleNamespace) -> None:
    """Train with the constants `c`, from the last checkpoint where there is one, and fill the run's folder."""
    resolve(c)
    folder, device = run_folder(c.RUN), select_device(c.DEVICE)
    rank, world = start_processes(device)
    with only_writer(folder) if rank == 0 else contextlib.nullcontext():
        state = None if c.overwrite else read_state(folder, c)
        if (folder / "encoder.pt").exists() and not c.overwrite:
            return say(f"{folder} is finished; --overwrite starts anew, another --run starts beside it, with --init "
                       f"{folder / 'encoder.pt'} from its encoder")
        c.PRECISION = select_precision(c.PRECISION, device)
        threads = choose_threads(device, state["threads"] if state and state["world_size"] == world else None)
        images, labelled = load_images(c, device, state)
        with rank_0_first(), seeded_init(c.SEED, "heads"):
            encoder, feature_dim = build_encoder(c.ENCODER, c.INIT, c.SEED, c.STEM)
            model = BYOL(encoder, feature_dim, c.HIDDEN_DIM, c.PROJECTION_DIM, c.BATCHNORM == "frozen")
        model = model.to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, c.WEIGHT_DECAY, "predictor", c.PREDICTOR_RATE)
        if state:
            model.load_state_dict(state.pop("model"))
            optimizer.load_state_dict(state.pop("optimizer"))
        state = (state or {"step": 0, "losses": [], "rows": []}) | {
            "version": VERSION, "constants": constants_of(c), "world_size": world, "threads": torch.get_num_threads()}
        say(f"BYOL: {count(len(images), 'image')}, {c.ENCODER} ({c.STEM}) from {Path(c.INIT).name} weights at "
            f"{c.IMAGE_SIZE} px, {count(c.EPOCHS, 'epoch')} of {count(len(images) // c.BATCH_SIZE, 'step')}, on "
            f"{device} in {c.PRECISION}{threads}" + f", from step {state['step']}" * (state["step"] > 0))
        say(", ".join(f"{name} {as_text(getattr(c, name))}" for name in RECIPE))
        if rank == 0:
            begin_folder(c, folder, images, device)
        score = partial(monitor, pixels=labelled.pixels, labels=labelled.labels, seed=c.SEED, device=device,
                        precision=c.PRECISION) if labelled and rank == 0 else None
        if score and state["step"] == 0:  # what BYOL has to rise above
            state["before"] = score(model.online_encoder)
            log(c, state, {"step": 0, "epoch": 0} | scores_of(state["before"]), ending="before the first step")
        train(c, folder, state, images, model, optimizer, score)
        if rank == 0:
            write_rows(folder, state["rows"], c)
            save_torch(folder / "encoder.pt", plain_state_dict(model.online_encoder))  # the sign of a finished run
    for name, protocol in (("knn", "kNN"), ("probe", "linear probe")) if {"before", "after"} <= state.keys() else ():
        say(verdict(protocol, state["before"][name], state["after"][name]))
    flags = ["--demo"] * c.demo + ["--run", c.RUN] * (c.RUN != DEMO["RUN"] or not c.demo)
    flags += ["--data-root", c.DATA_ROOT] * (c.DATA_ROOT != KINDS["DATA_ROOT"]("data"))
    flags += ["--max-unreadable", str(c.MAX_UNREADABLE)] * (c.MAX_UNREADABLE != 0.01)
    say(f"the encoder is in {folder / 'encoder.pt'}; next: python train_classifier.py {shlex.join(flags)}")


def train(c: SimpleNamespace, folder: Path, state: dict, images: Tensor, model: BYOL, optimizer: torch.optim.Optimizer,
          score: Callable | None) -> None:
    """BYOL, from the step where `state` stands to the last one, after which it is saved. score: `monitor` of an
    encoder. Raises KeyboardInterrupt(signal, when) where one, to any of the processes, asked for it."""
    device, (rank, world) = model.spread.device, rank_and_world()
    steps_per_epoch = len(images) // c.BATCH_SIZE  # the remainder is dropped
    total_steps, warmup_steps = c.EPOCHS * steps_per_epoch, round(c.WARMUP_EPOCHS * steps_per_epoch)
    compiled = compiler(device, total_steps - state["step"])
    draw, network = compiled(render_views), compiled(model) if world == 1 else distribute(model, device)
    indices = batch_indices(c.SEED, "order", len(images), c.BATCH_SIZE, state["step"], total_steps, rank, world)
    line_due, checkpoint_due = timer(30), timer(60 * c.CHECKPOINT_MINUTES)
    losses, signals = [], []  # losses: those that the host has not read yet
    with on_signals(signals), progress(total=total_steps * c.BATCH_SIZE, initial=state["step"] * c.BATCH_SIZE,
                                       unit="image", unit_scale=True) as bar:
        first_step, start = state["step"], time.monotonic()  # of the steps since the last row
        for step, batch in enumerate(batches(images, indices, device), start=state["step"]):
            views = two_views(batch, c.IMAGE_SIZE, seeded_generator(c.SEED, "views", step, rank), c.CROP_AREA, c.BLUR_P,
                              c.JITTER, draw)
            rate = learning_rate(step, total_steps, warmup_steps, c.LEARNING_RATE)
            tau = target_decay(step, total_steps, c.BASE_DECAY)
            losses.append(train_step(network, model, optimizer, views, rate, tau, c.PRECISION))
            bar.update(c.BATCH_SIZE)
            state["step"] = step = step + 1
            epoch_ends = step % steps_per_epoch == 0
            if epoch_ends or step % c.LOG_EVERY == 0:
                read_losses(state, losses, model if epoch_ends else None)
                speed = (step - first_step) * c.BATCH_SIZE / (time.monotonic() - start)
                row = {"step": step, "epoch": step / steps_per_epoch, "loss": mean(state["losses"]), "decay": tau,
                       "learning_rate": rate, "spread": model.spread.item(), "images_per_second": round(speed, 1)}
                if epoch_ends and score:
                    state["after"] = score(model.online_encoder)
                    row |= scores_of(state["after"])
                minutes = (total_steps - step) * c.BATCH_SIZE / speed / 60
                log(c, state, row, epoch_ends or bar.disable and line_due(), f"{minutes:.0f} min left" * (minutes > 0))
                first_step, start = step, time.monotonic()
            signum = any_process(max(signals, default=0), device) if world == 1 or step % c.LOG_EVERY == 0 else 0
            if signum or step == total_steps or checkpoint_due():
                read_losses(state, losses, model)
                if rank == 0:
                    weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    save_torch(folder / "checkpoint.pt", state | weights)
                    if step < total_steps:  # else `pretrain` does
                        write_rows(folder, state["rows"], c)
            if signum:
                break
    if state["step"] < total_steps:
        raise KeyboardInterrupt(signum, f"after step {state['step']} of {total_steps}")


def train_step(network: nn.Module, model: BYOL, optimizer: torch.optim.Optimizer, views: tuple[Tensor, Tensor],
               rate: float, tau: float, precision: str) -> Tensor:
    """One step of the online network, then one of the target; the loss. network: `model`, distributed or compiled."""
    view1, view2 = (view.contiguous(memory_format=torch.channels_last) for view in views)
    with autocast(view1.device, precision):
        loss = network(view1, view2)
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.update_target(tau)
    return loss.detach().clone()  # where a CUDA graph is replayed, its next loss takes this one's place


def resolve(c: SimpleNamespace) -> None:
    """Give each constant that is "auto" its value. Raises UserError for constants that contradict each other."""
    vars(c).update({name: values[c.INIT != "random"] for name, values in RECIPE.items() if getattr(c, name) == "auto"})
    if c.BATCHNORM == "frozen" and c.INIT == "random":
        raise UserError("BATCHNORM is frozen, but INIT random has no statistics to keep: set it to auto (--batchnorm)")
    if c.RUN == "none" or Path(c.INIT).parent == run_folder(c.RUN).resolve():
        raise UserError(f"RUN {c.RUN} is not possible: it must not be none, and INIT must lie outside its folder")
    c.INIT_SHA256 = digest_of(c.INIT)  # the comparison starts from the same weights


def read_state(folder: Path, c: SimpleNamespace) -> dict | None:
    """What the run's checkpoint holds, None where there is none; a precision that is "auto" becomes the run's own.
    Raises UserError where it cannot be read, or is that of a run with other constants."""
    file, config = folder / "checkpoint.pt", folder / "config.json"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
        begun = state or (read_json(config, "constants") if config.exists() else {"constants": {}})
        constants = begun["constants"]
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read ({one_line(error)[:80]}): --overwrite starts anew") from None
    if begun.get("version", VERSION) != VERSION:
        raise UserError(f"{folder} was begun by an earlier version of this code: finish it with that one, choose "
                        "another RUN, or use --overwrite to start anew")
    if c.PRECISION == "auto":
        c.PRECISION = constants.get("PRECISION", "auto")
    moved = {"INIT"} if constants.get("INIT_SHA256") == c.INIT_SHA256 else set()
    refuse_changes(constants, c, file if state else config, FREE | moved)
    return state


def load_images(c: SimpleNamespace, device: torch.device, state: dict | None) -> tuple[Tensor, Split | None]:
    """Images to pretrain on, and train/ where there is one. Raises UserError for too few, or others than before."""
    with rank_0_first():
        unlabeled, labelled = load_for_pretraining(c.DATASET, c.DATA_ROOT, c.IMAGE_SIZE, c.MAX_UNREADABLE)
    images, world = len(unlabeled.pixels), rank_and_world()[1]
    if c.BATCH_SIZE > images:
        raise UserError(f"BATCH_SIZE is {c.BATCH_SIZE}, but there are only {count(images, 'image')}: lower it")
    if c.BATCH_SIZE % world or c.BATCH_SIZE < 2 * world:
        raise UserError(f"BATCH_SIZE {c.BATCH_SIZE} does not divide into {world} equal parts of at least 2 images")
    c.IMAGES, c.LABELLED = unlabeled.stamp(), labelled.stamp() if labelled else ""
    if state and state["constants"]["IMAGES"] != c.IMAGES:
        raise UserError(f"DATASET {c.DATASET} no longer holds the run's images: bring them back, or choose another RUN")
    step = state["step"] if state else 0
    if any_process(step, device) != step:
        raise UserError(f"another process continues from a checkpoint that this one lacks: share {run_folder(c.RUN)}")
    if state and state["world_size"] != world:
        say(f"begun by {state['world_size']} processes, continued by {world}: from here on the random views differ")
    return place(unlabeled.pixels, device), labelled


def begin_folder(c: SimpleNamespace, folder: Path, images: Tensor, device: torch.device) -> None:
    """Write config.json and views.png. With --overwrite nothing else of an earlier run stays. It goes only here, when
    everything that could be wrong has been looked at, and its encoder and checkpoint first."""
    for file in sorted(folder.iterdir(), key=lambda file: file.suffix != ".pt") if c.overwrite else ():
        if file.name != LOCK and file.is_file():
            file.unlink()
    write_json(folder / "config.json", {"version": VERSION, "constants": constants_of(c),
                                        "environment": environment(device) | {"precision": c.PRECISION}})
    sample, generator = images[:12].to(device), seeded_generator(c.SEED, "figure")
    views = two_views(sample, c.IMAGE_SIZE, generator, c.CROP_AREA, c.BLUR_P, c.JITTER)
    plot_views(folder / "views.png", sample, *views)


def read_losses(state: dict, losses: list[Tensor], model: BYOL | None = None) -> None:
    """Bring the losses to the host, which waits for the device here alone. Raises UserError for what is not finite."""
    state["losses"] += torch.stack(losses).tolist() if losses else []
    losses.clear()
    if not all(map(isfinite, state["losses"])) or model and not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"losses or weights are no longer finite at step {state['step']}: begin a RUN with a lower "
                        "LEARNING_RATE, longer WARMUP_EPOCHS or PRECISION fp32; the last checkpoint is kept")


def write_rows(folder: Path, rows: list[dict[str, float]], c: SimpleNamespace) -> None:
    """metrics.csv and curves.png, from the rows so far."""
    lines = [",".join(COLUMNS)] + [",".join(str(row.get(name, "")) for name in COLUMNS) for row in rows]
    with whole_file(folder / "metrics.csv") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    plot_curves(folder / "curves.png", rows, c)


def log(c: SimpleNamespace, state: dict, row: dict[str, float], aloud: bool = True, ending: str = "") -> None:
    """Keep a row of the losses so far, print it where `aloud`, and warn where it is the first that shows a collapse."""
    healthy = c.PROJECTION_DIM ** -0.5
    if row.get("spread", 1) < 0.1 * healthy <= min((before.get("spread", 1) for before in state["rows"]), default=1):
        say(f"warning: the embeddings collapse: their spread is {row['spread']:.4f}, healthy is {healthy:.3f}: lower "
            "LEARNING_RATE or raise BASE_DECAY")
    state["rows"].append(row)
    state["losses"] = []
    if aloud:
        texts = [form.format(row[name]) for name, form in COLUMNS.items() if form and name in row]
        say("  ".join([f"epoch {row['epoch']:.2f} of {c.EPOCHS}", *texts, ending]).rstrip())


def main(argv: list[str] | None = None) -> int:
    return run_script(pretrain, globals(), argv)


if __name__ == "__main__":
    sys.exit(main())
