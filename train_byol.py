"""Pretrain an encoder on unlabeled images with BYOL.

    python train_byol.py --demo                       patterns drawn by the code: minutes on a CPU, no download
    python train_byol.py                              STL-10, downloaded once (2.6 GB)
    python train_byol.py --dataset FOLDER --run NAME  your own images: FOLDER/unlabeled/, at any depth

Edit the constants below or pass them as flags. Everything goes to runs/RUN/: the encoder as a plain torchvision state
dict (encoder.pt), the curves, and a checkpoint; the same command again continues an unfinished run.
`torchrun --nproc-per-node=N train_byol.py ...` trains on N GPUs.
"""
import contextlib
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from byol import VIEW_DRAWS, BYOL, learning_rate, render_views, send, target_decay, two_views
from data import Split, batches, load_split, place
from plots import plot_curves, plot_views
from runs import (Metrics, clear_run, only_writer, read_checkpoint, read_json, run_folder, same_constants,
                  save_checkpoint, save_torch, stop_signals, write_json)
from utils import (DEMO, Stopped, UsageError, UserError, autocast, build_encoder, build_optimizer, can_compile,
                   check_choice, check_ranges, choose_threads, constants_of, environment,
                   extract_features, flag, gain_of, knn_predict, plain_state_dict, progress, rank_0_first, run_script,
                   seeded_generator, seeded_init, select_device, select_precision, set_rate, start_processes,
                   verdict_of)

# Data
DATASET = "stl10"  # stl10, patterns, or a folder with unlabeled/ and, for the kNN monitor, train/<class>/
DATA_ROOT = "data"  # where STL-10 and the caches of decoded folders live
IMAGE_SIZE = 96  # pixels a side of the views, and of a folder's images
CROP_AREA = 0.08  # smallest share of an image that a view shows
BLUR_P = (1.0, 0.1)  # probability of the blur in view 1 and in view 2
# Networks
ENCODER = "resnet18"  # any torchvision ResNet by name
INIT = "imagenet"  # imagenet, random, or a file with a state dict of that ResNet
BATCHNORM = "auto"  # of the encoder: batch, frozen (the statistics of INIT), or auto: frozen unless INIT is random
HIDDEN_DIM = 4096  # width of projector and predictor
PROJECTION_DIM = 256  # of the vectors that are compared
# Training
EPOCHS = 10  # passes over the unlabeled images
BATCH_SIZE = 256  # images a step, over all GPUs together
OPTIMIZER = "sgd"  # sgd (momentum 0.9) or adamw
LEARNING_RATE = 0.2  # peak rate per 256 images: a step uses this times BATCH_SIZE / 256
WEIGHT_DECAY = 5e-4  # of matrices and convolutions; BatchNorm and biases get none
WARMUP_EPOCHS = 1.0  # linear rise of the rate, at most half of the run; then a cosine to zero
BASE_DECAY = 0.99  # tau at the start: how much of itself the target keeps at a step; rises to 1
SEED = 0  # of the weights, the order of the images and the views
# The run
RUN = "byol"  # name of the run's folder in runs/
DEVICE = "auto"  # auto is cuda, then mps, then cpu
PRECISION = "auto"  # bf16, fp32, or auto: bf16 where the hardware has it
LOG_EVERY = 20  # steps between rows of metrics.csv; between them no step waits for its loss
CHECKPOINT_MINUTES = 5.0  # between checkpoints

DEMO = DEMO | dict(EPOCHS=2, BATCH_SIZE=64, OPTIMIZER="adamw", LEARNING_RATE=8e-3, WEIGHT_DECAY=1e-4,
                   WARMUP_EPOCHS=0.3, BASE_DECAY=0.9, HIDDEN_DIM=512, PROJECTION_DIM=128)
COLUMNS = ["step", "epoch", "loss", "learning_rate", "decay", "spread", "knn", "images_per_second"]
FREE = {"RUN", "DEVICE", "DATA_ROOT", "CHECKPOINT_MINUTES"}  # may change between a run and its continuation
MIN_STEPS_TO_COMPILE = 1000  # for fewer, the minute that torch.compile takes is not won back


def run(c: SimpleNamespace) -> None:
    """Pretrain with the constants `c`; each run's folder has one writer."""
    check_constants(c)
    device = select_device(c.DEVICE)
    rank, world = start_processes(device)
    if c.BATCH_SIZE % world or c.BATCH_SIZE < 2 * world:
        raise UsageError(f"BATCH_SIZE {c.BATCH_SIZE} does not give each of the {world} processes the same number of images, "
                         "at least 2")
    folder = run_folder(c.RUN)
    with only_writer(folder) if rank == 0 else contextlib.nullcontext():
        pretrain(c, folder, device, rank, world)


def pretrain(c: SimpleNamespace, folder: Path, device: torch.device, rank: int, world: int) -> None:
    """Train from the last checkpoint where there is one, and fill the run's folder."""
    config = folder / "config.json"
    state = None if c.overwrite else read_checkpoint(folder)
    finished = state and state["step"] == state["total_steps"]
    if state and not finished and state.get("draws") != VIEW_DRAWS:
        raise UserError(f"{folder / 'checkpoint.pt'} is of an earlier version of this code, which drew other views: finish "
                        "it with that version, or use --overwrite to start anew")
    if state:
        same_constants(state["constants"], constants_of(c), folder / "checkpoint.pt", FREE)
    elif config.exists() and not c.overwrite:
        same_constants(read_json(config, "constants")["constants"], constants_of(c), config, FREE)
    if finished:
        say(f"{folder} is finished; --overwrite starts anew, another --run starts beside it")
        return

    # A run goes on in its own precision and threads, whatever `auto` finds now: another machine may continue it.
    precision = getattr(torch, state["precision"]) if state else select_precision(c.PRECISION, device)
    threads = choose_threads(device, state["threads"] if state and state["world_size"] == world else None)

    unlabeled, train = load_images(c)
    images = place(unlabeled, device)
    if train:
        train = train._replace(pixels=images if train.pixels is unlabeled else place(train.pixels, device))
    steps_per_epoch = len(images) // c.BATCH_SIZE  # the remainder is dropped
    if steps_per_epoch == 0:
        raise UsageError(f"BATCH_SIZE is {c.BATCH_SIZE}, but there are only {len(images)} images: lower it")
    total_steps = c.EPOCHS * steps_per_epoch
    warmup_steps = min(round(c.WARMUP_EPOCHS * steps_per_epoch), total_steps // 2)
    peak = c.LEARNING_RATE * c.BATCH_SIZE / 256

    with rank_0_first():
        model = build_model(c).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, c.OPTIMIZER, peak, c.WEIGHT_DECAY)
    step, losses, right_before = 0, [], None
    if state:
        if state["images"] != len(images):
            raise UserError(f"DATASET {c.DATASET!r} has {len(images)} images, and {state['images']} when {folder} was begun: "
                            "bring them back, choose another RUN, or use --overwrite to start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, losses, right_before = state["step"], state["losses"], state["right_before"]
        if state["world_size"] != world:
            say(f"begun by {state['world_size']} processes, continued by {world}: the views are others from here on")
        state = None  # its memory is not needed any more
    network = distribute(model, device)

    say(f"BYOL: {len(images):,} images, {c.ENCODER} from {c.INIT} weights at {c.IMAGE_SIZE} px, {c.EPOCHS} epochs of "
        f"{steps_per_epoch} steps, on {device} in {str(precision).removeprefix('torch.')}"
        + threads + (f", from step {step} of {total_steps}" if step else ""))
    draw = render_views
    if can_compile(device) and total_steps - step >= MIN_STEPS_TO_COMPILE:
        say("compiling for this GPU: the first step takes a minute or two")
        draw = torch.compile(render_views)
        if network is model:  # SyncBatchNorm cannot be traced
            network = torch.compile(network)
    if rank == 0:
        if c.overwrite:  # only now, when everything that could be wrong has been looked at
            clear_run(folder)
        where = environment(device, precision)
        write_json(config, {"constants": constants_of(c), "environment": where, "world_size": world})
        sample = images[:12].to(device)
        plot_views(folder / "views.png", sample, *two_views(sample, c.IMAGE_SIZE, seeded_generator(c.SEED, "figure"),
                                                                     c.CROP_AREA, c.BLUR_P))
        metrics = Metrics(folder / "metrics.csv", COLUMNS, step)
        if step == 0 and train:  # what BYOL has to rise above
            right_before = monitor(model.online_encoder, train, c.SEED, device, precision)
            knn = percent(right_before)
            metrics.append(step=0, epoch=0, knn=knn)
            say(f"kNN {knn:.1f}% before the first step")

    pending = []  # losses still on the device: reading one makes the host wait
    logged = saved = plotted = told = time.monotonic()
    warned = False

    def read_losses() -> None:
        losses.extend(torch.stack(pending).tolist() if pending else [])
        pending.clear()
        sick = [not math.isfinite(loss) for loss in losses]
        if any(sick):
            first_sick = step - len(losses) + 1 + sick.index(True)
            raise UserError(f"the loss is no longer finite at step {first_sick}: lower LEARNING_RATE, lengthen WARMUP_EPOCHS "
                            f"or set PRECISION to fp32; the last checkpoint in {folder} is kept")

    def check_health() -> None:  # before anything is saved, so that a sick state never is
        read_losses()
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise UserError(f"weights are no longer finite after step {step}: lower LEARNING_RATE, lengthen WARMUP_EPOCHS or "
                            f"set PRECISION to fp32; the last checkpoint in {folder} is kept")

    def save() -> None:
        check_health()
        if rank == 0:
            metrics.flush()
            save_checkpoint(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                                     "total_steps": total_steps, "losses": losses, "images": len(images),
                                     "draws": VIEW_DRAWS, "precision": str(precision).removeprefix("torch."),
                                     "threads": torch.get_num_threads(), "world_size": world,
                                     "right_before": right_before, "constants": constants_of(c)})

    with stop_signals() as signals, progress(total=total_steps * c.BATCH_SIZE, initial=step * c.BATCH_SIZE,
                                             unit="image", unit_scale=True) as bar:
        first = step  # of the steps since `logged`
        indices = batch_indices(c.SEED, len(images), c.BATCH_SIZE, step, total_steps, rank, world)
        for batch in batches(images, indices, device):
            views = two_views(batch, c.IMAGE_SIZE, seeded_generator(c.SEED, "views", step, rank), c.CROP_AREA,
                              c.BLUR_P, draw)
            rate = learning_rate(step, total_steps, warmup_steps, peak)
            tau = target_decay(step, total_steps, c.BASE_DECAY)
            pending.append(train_step(network, model, optimizer, views, rate, tau, precision))
            step += 1
            bar.update(c.BATCH_SIZE)

            epoch_ends = step % steps_per_epoch == 0
            if step % c.LOG_EVERY == 0 or epoch_ends:
                read_losses()
                speed = (step - first) * c.BATCH_SIZE / (time.monotonic() - logged)
                knn = ""
                if epoch_ends and train:
                    right = monitor(model.online_encoder, train, c.SEED, device, precision)
                    knn = percent(right)
                row = dict(step=step, epoch=step / steps_per_epoch, loss=sum(losses) / len(losses), learning_rate=rate,
                           decay=tau, spread=model.spread.item(), knn=knn, images_per_second=round(speed, 1))
                losses.clear()
                bar.set_postfix(loss=f"{row['loss']:.3f}")
                if rank == 0:
                    metrics.append(**row)
                if epoch_ends or bar.disable and time.monotonic() - told > 30:  # without a bar, a line now and then
                    told = time.monotonic()
                    left = (total_steps - step) * c.BATCH_SIZE / speed / 60
                    say(f"epoch {row['epoch']:.2f} of {c.EPOCHS}  loss {row['loss']:.3f}  spread {row['spread']:.3f}  "
                        + (f"kNN {knn:.1f}%  " if knn != "" else "") + f"{speed:,.0f} images/s"
                        + (f"  {left:.0f} min left" if left else ""))
                if row["spread"] < 0.1 * c.PROJECTION_DIM ** -0.5 and not warned:
                    warned = True
                    say(f"warning: the embeddings collapse: their spread is {row['spread']:.4f} where "
                        f"{c.PROJECTION_DIM ** -0.5:.3f} is healthy; lower LEARNING_RATE or raise BASE_DECAY")
                if rank == 0 and time.monotonic() - plotted > 60:
                    plot_curves(folder / "curves.png", metrics.columns, c)
                    plotted = time.monotonic()
                first, logged = step, time.monotonic()
            if step < total_steps and time.monotonic() - saved > c.CHECKPOINT_MINUTES * 60:
                save()
                saved = time.monotonic()
            if world == 1 and signals or step % c.LOG_EVERY == 0 and any_rank(signals, device):
                break

        check_health()
        if rank == 0 and step == total_steps:  # before the last checkpoint, which says that the run is finished
            save_torch(folder / "encoder.pt", plain_state_dict(model.online_encoder))
            plot_curves(folder / "curves.png", metrics.columns, c)
        save()
    if step < total_steps:
        raise Stopped(f"stopped after step {step} of {total_steps}: the same command continues from there",
                      signals[0] if signals else 15)
    if train and right_before is not None and len(right_before) == len(right):  # not where train/ changed on the way
        say(verdict(right_before, right, c.INIT))
    say(f"the encoder is in {folder / 'encoder.pt'}; next: python train_classifier.py"
        + (" --demo" if c.demo else "") + (f" --run {c.RUN}" if c.RUN != (DEMO["RUN"] if c.demo else RUN) else ""))


def train_step(network: nn.Module, model: BYOL, optimizer: torch.optim.Optimizer, views: tuple[Tensor, Tensor],
               rate: float, tau: float, precision: torch.dtype) -> Tensor:
    """One step of the online network by the optimizer and one of the target by the average; the loss, on the device.

    network: `model`, or its DistributedDataParallel.
    """
    view1, view2 = (view.contiguous(memory_format=torch.channels_last) for view in views)
    set_rate(optimizer, rate)
    with autocast(view1.device, precision):
        loss = network(view1, view2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.update_target(tau)
    return loss.detach()


def any_rank(signals: list[int], device: torch.device) -> bool:
    """Whether any process was asked to stop; all of them must ask this after the same step."""
    if not dist.is_initialized():
        return False
    asked = torch.tensor(len(signals), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return asked.item() > 0


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The permutation [n] in which an epoch takes the images."""
    return torch.randperm(n, generator=seeded_generator(seed, "order", epoch))


def batch_indices(seed: int, n: int, batch_size: int, first_step: int, total_steps: int, rank: int = 0,
                  world: int = 1) -> Iterator[Tensor]:
    """For each step from `first_step` on, the indices of this process's share of its batch, of `n` images."""
    steps_per_epoch, order = n // batch_size, None  # the remainder is dropped
    for step in range(first_step, total_steps):
        epoch, batch = divmod(step, steps_per_epoch)
        if order is None or batch == 0:
            order = epoch_order(seed, epoch, n)
        yield order[batch * batch_size:(batch + 1) * batch_size][rank::world].contiguous()


def build_model(c: SimpleNamespace) -> BYOL:
    encoder, feature_dim = build_encoder(c.ENCODER, c.INIT, c.SEED)
    with seeded_init(c.SEED, "heads"):
        frozen = c.BATCHNORM == "frozen" or c.BATCHNORM == "auto" and c.INIT != "random"
        return BYOL(encoder, feature_dim, c.HIDDEN_DIM, c.PROJECTION_DIM, frozen)


def distribute(model: BYOL, device: torch.device) -> nn.Module:
    """DistributedDataParallel where there are several processes; on CUDA with BatchNorm over all of them."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place: every BatchNorm has a parent
    # Buffers need no broadcast: SyncBatchNorm keeps them equal, and on a CPU those of rank 0 are the ones that are kept.
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                               broadcast_buffers=False)


def load_images(c: SimpleNamespace) -> tuple[Tensor, Split | None]:
    """Images to pretrain on, and the labelled training split for the kNN monitor, if there is one."""
    with rank_0_first():
        train = load_split(c.DATASET, "train", c.DATA_ROOT, c.IMAGE_SIZE)
        unlabeled = load_split(c.DATASET, "unlabeled", c.DATA_ROOT, c.IMAGE_SIZE) or train
    if unlabeled is None:
        raise UserError(f"DATASET {c.DATASET!r} has neither unlabeled/ nor train/: there are no images to pretrain on")
    return unlabeled.pixels, train


def monitor(encoder: nn.Module, train: Split, seed: int, device: torch.device, precision: torch.dtype) -> Tensor:
    """Which of 20% of the labelled training images kNN gets right from the other 80%: bool [M], on the CPU.

    No test image is seen.
    """
    order = torch.randperm(len(train.labels), generator=seeded_generator(seed, "monitor"))
    features = extract_features(encoder, train.pixels, device, precision)
    bank, held_out = send(order, device).tensor_split([int(0.8 * len(order))])
    labels = send(train.labels, device)
    predicted = knn_predict(features[bank], labels[bank], features[held_out], len(train.classes))
    return (predicted == labels[held_out]).cpu()


def percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


def verdict(before: Tensor, after: Tensor, init: str) -> str:
    """What pretraining did to kNN, in words, from which of the same images were right before and after it: bool [M]."""
    gain, half = gain_of(after.double() - before.double())
    line = f"kNN went from {percent(before):.1f}% to {percent(after):.1f}%, by {gain:+.1f} ± {half:.1f} (95%): "
    return line + {"cannot tell": f"{len(after):,} held-out images cannot tell whether pretraining changed it",
                   "gained": "pretraining gained",
                   "LOST": "pretraining LOST; " + ("train for more EPOCHS: kNN falls at first" if init == "random" else
                                                   "lower LEARNING_RATE, raise BASE_DECAY to 1, or raise CROP_AREA"),
                   }[verdict_of(gain, half)]


def check_constants(c: SimpleNamespace) -> None:
    check_ranges(c, IMAGE_SIZE=(16, math.inf), CROP_AREA=(0.01, 1), HIDDEN_DIM=(1, math.inf), PROJECTION_DIM=(2, math.inf),
                 EPOCHS=(1, math.inf), BATCH_SIZE=(2, math.inf), LEARNING_RATE=(0, math.inf),
                 WEIGHT_DECAY=(0, math.inf), WARMUP_EPOCHS=(0, math.inf), BASE_DECAY=(0, 1), LOG_EVERY=(1, math.inf),
                 CHECKPOINT_MINUTES=(0, math.inf))
    if len(c.BLUR_P) != 2 or not all(0 <= p <= 1 for p in c.BLUR_P):
        raise UsageError(f"BLUR_P is {','.join(map(str, c.BLUR_P))}: it must be two probabilities ({flag('BLUR_P')})")
    check_choice("OPTIMIZER", c.OPTIMIZER, ["sgd", "adamw"])
    check_choice("BATCHNORM", c.BATCHNORM, ["auto", "batch", "frozen"])
    if c.BATCHNORM == "frozen" and c.INIT == "random":
        raise UsageError("BATCHNORM is frozen, but INIT random has no statistics to keep: set it to auto or batch "
                         "(--batchnorm)")
    check_choice("PRECISION", c.PRECISION, ["auto", "bf16", "fp32"])


def say(line: str) -> None:
    """Print a line above the progress bar, from rank 0 alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(line)


def main(argv: list[str] | None = None) -> int:
    return run_script(globals(), argv)


if __name__ == "__main__":
    sys.exit(main())
