"""Pretrain an encoder on unlabeled images with BYOL.

    python train_byol.py --demo                       patterns drawn by the code: minutes on a CPU, no download
    python train_byol.py                              STL-10, downloaded once (2.6 GB)
    python train_byol.py --dataset FOLDER --run NAME  your own images: FOLDER/unlabeled/, at any depth

Edit the constants below or pass them as flags. Everything goes to runs/RUN/: the encoder as a plain torchvision state
dict (encoder.pt), the curves, and a checkpoint; the same command again continues an unfinished run.
`torchrun --nproc-per-node=N -- train_byol.py ...` trains on N GPUs.
"""
import contextlib
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from byol import BYOL, effective_rank, learning_rate, render_views, target_decay, two_views
from data import Split, batch_indices, batches, load_split, place
from plots import plot_curves, plot_views
from runs import Run, clear_run, last_state, only_writer, run_folder, write_json
from utils import (DEMO, UsageError, UserError, autocast, build_encoder, build_optimizer, check_choice, check_training,
                   choose_threads, compiler, constants_of, digest_of_file, environment, extract_features, fit_logistic,
                   flag, gain_of, knn_predict, make_tuples, name_of, percent, plain_state_dict, rank_0_first,
                   resolve_auto, run_script, say, seeded_generator, seeded_init, select_device, select_precision,
                   start_processes, take_step, verdict_of, warmup_of)

# Data
DATASET = "stl10"  # stl10, patterns, or a folder with unlabeled/ and, for the monitor, train/<class>/
DATA_ROOT = "data"  # where STL-10 and the caches of decoded folders live
IMAGE_SIZE = 96  # pixels a side of the views, and of a folder's images
CROP_AREA = "auto"  # smallest share of an image that a view shows (paper: 0.08); auto: 0.5, if INIT is random 0.2
BLUR_P = (0.3, 0.03)  # probability of the blur in view 1 and in view 2 (paper: 1, 0.1, at 224 pixels a side)
JITTER = "auto"  # strength of the colour jitter, as a multiple of the paper's; auto: 0.5, if INIT is random 1
# Networks
ENCODER = "resnet18"  # any torchvision ResNet by name
INIT = "imagenet"  # imagenet, random, or a file with a state dict of that ResNet
BATCHNORM = "auto"  # of the encoder: batch, or frozen: the statistics of INIT; auto: frozen, if INIT is random batch
HIDDEN_DIM = "auto"  # width of projector and predictor; auto: 4096, if INIT is random 1024
PROJECTION_DIM = 256  # of the vectors that are compared
# Training
EPOCHS = 10  # passes over the unlabeled images
BATCH_SIZE = "auto"  # images a step, over all GPUs together; auto: 256, if INIT is random 64
OPTIMIZER = "sgd"  # sgd (momentum 0.9) or adamw
LEARNING_RATE = "auto"  # peak rate per 256 images; auto: 0.1, if INIT is random 0.05, below 64 px 0.2
PREDICTOR_RATE = "auto"  # how many times as fast the predictor learns; auto: 1, if INIT is random 10
WEIGHT_DECAY = "auto"  # of matrices and convolutions alone; auto: 0, if INIT is random 5e-4
WARMUP_EPOCHS = 1.0  # linear rise of the rate, at most half of the run; then a cosine to zero
BASE_DECAY = "auto"  # tau at the start: what the target keeps of itself; rises to 1; auto: 1, if INIT is random 0.996
SEED = 0  # of the weights, the order of the images and the views
# The run
RUN = "byol"  # name of the run's folder in runs/
DEVICE = "auto"  # auto is cuda, then mps, then cpu
PRECISION = "auto"  # bf16, fp32, or auto: bf16 where the hardware has it
LOG_EVERY = 20  # steps between rows of metrics.csv; between them no step waits for its loss
CHECKPOINT_MINUTES = 5.0  # between checkpoints

DEMO = DEMO | dict(CROP_AREA=0.08, BLUR_P=(1.0, 0.1), EPOCHS=2, BATCH_SIZE=64, OPTIMIZER="adamw", LEARNING_RATE=8e-3,
                   PREDICTOR_RATE=1.0, WEIGHT_DECAY=1e-4, WARMUP_EPOCHS=0.3, BASE_DECAY=0.9, HIDDEN_DIM=512,
                   PROJECTION_DIM=128)
COLUMNS = ["step", "epoch", "loss", "learning_rate", "decay", "spread", "knn", "probe", "rank", "images_per_second"]
AUTO = {  # where INIT is random, and where it is not
    # Small images bear a higher rate: encoders fine-tune better by it, though frozen features are worse. At 64 px only
    # the latter was seen (README.md).
    "LEARNING_RATE": (lambda c: 0.2 if c.IMAGE_SIZE < 64 else 0.05, 0.1),
    "CROP_AREA": (0.2, 0.5), "JITTER": (1.0, 0.5), "BATCHNORM": ("batch", "frozen"), "HIDDEN_DIM": (1024, 4096),
    "BATCH_SIZE": (64, 256), "PREDICTOR_RATE": (10.0, 1.0), "WEIGHT_DECAY": (5e-4, 0.0), "BASE_DECAY": (0.996, 1.0)}
SHOWN = {"loss": "loss {:.3f}", "spread": "spread {:.3f}", "knn": "kNN {:.1f}%", "probe": "probe {:.1f}%",
         "rank": "rank {:.0f}"}  # in a line
CHECKPOINT_VERSION = 4  # raised where a run that an earlier version began cannot be continued bit for bit
FREE = {"RUN", "DEVICE", "DATA_ROOT", "CHECKPOINT_MINUTES"}  # may change between a run and its continuation
PROBE_PENALTY = 0.1  # of the monitor's linear probe; the best of six for random and for good weights, 4,000 images
MIN_STEPS_TO_COMPILE = 1000  # for fewer, the minute that torch.compile takes is not won back


def run(c: SimpleNamespace) -> None:
    """Pretrain with the constants `c`; each run's folder has one writer."""
    check_optimizer(c)
    resolve_auto(c, AUTO)
    check_constants(c)
    c.INIT_SHA256 = digest_of_file(c.INIT)  # for the comparison, which starts from the same weights
    device = select_device(c.DEVICE)
    rank, world = start_processes(device)
    if c.BATCH_SIZE % world or c.BATCH_SIZE < 2 * world:
        raise UsageError(f"BATCH_SIZE {c.BATCH_SIZE} does not give each of the {world} processes the same number of "
                         "images, at least 2")
    folder = run_folder(c.RUN)
    with only_writer(folder) if rank == 0 else contextlib.nullcontext():
        pretrain(c, folder, device, rank, world)


def pretrain(c: SimpleNamespace, folder: Path, device: torch.device, rank: int, world: int) -> None:
    """Train from the last checkpoint where there is one, and fill the run's folder."""
    state = None if c.overwrite else last_state(folder, constants_of(c), FREE, CHECKPOINT_VERSION, AUTO)
    # An encoder.pt whose checkpoints were deleted, for they are large, is that of a finished run.
    finished = state["step"] == state["total_steps"] if state else (folder / "encoder.pt").exists()
    if finished and not c.overwrite:
        say(f"{folder} is finished; --overwrite starts anew, another --run starts beside it")
        return
    # A run goes on in its own precision and threads, whatever `auto` finds now: another machine may continue it.
    precision = getattr(torch, state["precision"]) if state else select_precision(c.PRECISION, device)
    threads = choose_threads(device, state["threads"] if state and state["world_size"] == world else None)
    images, train = load_images(c, device)
    steps_per_epoch = len(images) // c.BATCH_SIZE  # the remainder is dropped
    if steps_per_epoch == 0:
        raise UsageError(f"BATCH_SIZE is {c.BATCH_SIZE}, but there are only {len(images)} images: lower it")
    if state and state["images"] != len(images):
        raise UserError(f"DATASET {c.DATASET!r} has {len(images)} images, and {state['images']} when {folder} was "
                        "begun: bring them back, choose another RUN, or use --overwrite to start anew")

    with rank_0_first():
        model = build_model(c).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, c.OPTIMIZER, c.LEARNING_RATE, c.WEIGHT_DECAY, "predictor", c.PREDICTOR_RATE)
    facts = {"images": len(images), "version": CHECKPOINT_VERSION, "precision": name_of(precision),
             "threads": torch.get_num_threads(), "world_size": world,
             "right_before": state["right_before"] if state else None}
    run = Run(folder, c, steps_per_epoch, device, {"model": model, "optimizer": optimizer}, facts, COLUMNS, SHOWN,
              plot_curves)
    if state:
        run.resume(state)
        if state["world_size"] != world:
            say(f"begun by {state['world_size']} processes, continued by {world}: the views are others from here on")
        state = None  # its memory is not needed any more
    say(f"BYOL: {len(images):,} images, {c.ENCODER} from {Path(c.INIT).name} weights at {c.IMAGE_SIZE} px, {c.EPOCHS} "
        f"epochs of {steps_per_epoch} steps, on {device} in {name_of(precision)}{threads}"
        + (f", from step {run.step} of {run.total_steps}" if run.step else ""))
    network, draw = prepare(model, device, run.total_steps - run.step)
    watch = partial(monitor, train=train, seed=c.SEED, device=device, precision=precision) if train else None
    c.began_anew = c.overwrite
    if rank == 0:
        if c.overwrite:  # only now, when everything that could be wrong has been looked at
            clear_run(folder)
        where = environment(device, precision)
        write_json(folder / "config.json", {"constants": constants_of(c), "environment": where})
        sample = images[:12].to(device)
        plot_views(folder / "views.png", sample, *two_views(sample, c.IMAGE_SIZE, seeded_generator(c.SEED, "figure"),
                                                            c.CROP_AREA, c.BLUR_P, c.JITTER))
    with run.recording():
        if run.step == 0 and watch and rank == 0:  # what BYOL has to rise above
            run.facts["right_before"] = watch(model.online_encoder)
            scores = scores_of(run.facts["right_before"])
            run.note(step=0, epoch=0, **scores)
            say("  ".join(SHOWN[name].format(score) for name, score in scores.items()) + "  before the first step")
        right = train_epochs(c, run, images, model, network, optimizer, precision, draw, watch)
        run.finish("encoder.pt", plain_state_dict(model.online_encoder))
    before = run.facts["right_before"]
    if before and right and len(before["knn"]) == len(right["knn"]):  # not where train/ changed on the way
        for name, label in (("knn", "kNN"), ("probe", "linear probe")):
            say(verdict(label, before[name], right[name], c.INIT))
    say(f"the encoder is in {folder / 'encoder.pt'}; next: python train_classifier.py"
        + " --demo" * c.demo + "".join(f" {flag(name)} {getattr(c, name)}" for name in ("RUN", "DATA_ROOT")
                                       if name in c.given))


def train_epochs(c: SimpleNamespace, run: Run, images: Tensor, model: BYOL, network: nn.Module,
                 optimizer: torch.optim.Optimizer, precision: torch.dtype, draw: Callable,
                 watch: Callable | None) -> dict[str, Tensor] | None:
    """BYOL, from the step where the run stands to its last, or until it is asked to stop; what `watch` saw last.

    network: `model` as it is called, distributed or compiled. draw: render_views or its compiled form. watch: `monitor`
    of an encoder.
    """
    right, warmup_steps = None, warmup_of(c, run.steps_per_epoch)
    indices = batch_indices(c.SEED, "order", len(images), c.BATCH_SIZE, run.step, run.total_steps, run.rank, run.world)
    for batch in batches(images, indices, run.device):
        generator = seeded_generator(c.SEED, "views", run.step, run.rank)
        views = two_views(batch, c.IMAGE_SIZE, generator, c.CROP_AREA, c.BLUR_P, c.JITTER, draw)
        rate = learning_rate(run.step, run.total_steps, warmup_steps, c.LEARNING_RATE * c.BATCH_SIZE / 256)
        tau = target_decay(run.step, run.total_steps, c.BASE_DECAY)
        loss = train_step(network, model, optimizer, views, rate, tau, precision)
        run.count(loss)
        if run.row_is_due:
            scores = {}
            if run.epoch_ends and watch:
                run.check_health()  # features of sick weights are no numbers
                scores = scores_of(right := watch(model.online_encoder))
            run.log(learning_rate=rate, decay=tau, spread=(spread := model.spread.item()), **scores)
            if spread < 0.1 * c.PROJECTION_DIM ** -0.5:
                run.warn(f"the embeddings collapse: their spread is {spread:.4f} where {c.PROJECTION_DIM ** -0.5:.3f} "
                         "is healthy; lower LEARNING_RATE" + " or raise BASE_DECAY" * (c.BASE_DECAY < 1))
        if not run.goes_on():
            break
    return right


def train_step(network: nn.Module, model: BYOL, optimizer: torch.optim.Optimizer, views: tuple[Tensor, Tensor],
               rate: float, tau: float, precision: torch.dtype) -> Tensor:
    """One step of the online network by the optimizer and one of the target by the average; the loss, on the device.

    network: `model`, or its DistributedDataParallel.
    """
    view1, view2 = (view.contiguous(memory_format=torch.channels_last) for view in views)
    with autocast(view1.device, precision):
        loss = network(view1, view2)
    take_step(optimizer, loss, rate)
    model.update_target(tau)
    return loss.detach().clone()  # where a CUDA graph is replayed, its next loss takes this one's place


def build_model(c: SimpleNamespace) -> BYOL:
    encoder, feature_dim = build_encoder(c.ENCODER, c.INIT, c.SEED)
    with seeded_init(c.SEED, "heads"):
        return BYOL(encoder, feature_dim, c.HIDDEN_DIM, c.PROJECTION_DIM, frozen_batchnorm=c.BATCHNORM == "frozen")


def prepare(model: BYOL, device: torch.device, steps: int) -> tuple[nn.Module, Callable]:
    """The network as it is called, and render_views: distributed over the processes, compiled where that pays."""
    compiled = compiler(device, steps >= MIN_STEPS_TO_COMPILE)
    if dist.is_initialized():
        on_gpu = device.type == "cuda"
        if on_gpu:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place: every BatchNorm has a parent
        # Not compiled, for SyncBatchNorm cannot be traced. Buffers need no broadcast: it keeps them equal, and on a CPU
        # rank 0's are the ones that stay.
        network = nn.parallel.DistributedDataParallel(model, device_ids=[device] if on_gpu else None,
                                                      broadcast_buffers=False)
    else:
        network = compiled(model)
    return network, compiled(render_views)


def load_images(c: SimpleNamespace, device: torch.device) -> tuple[Tensor, Split | None]:
    """Images to pretrain on, and the labelled training split to watch them by, if there is one."""
    with rank_0_first():
        train = load_split(c.DATASET, "train", c.DATA_ROOT, c.IMAGE_SIZE)
        unlabeled = load_split(c.DATASET, "unlabeled", c.DATA_ROOT, c.IMAGE_SIZE) or train
    if unlabeled is None:
        raise UserError(f"DATASET {c.DATASET!r} has neither unlabeled/ nor train/: there are no images to pretrain on")
    images = place(unlabeled.pixels, device)
    if train:
        train = train._replace(pixels=images if train is unlabeled else place(train.pixels, device))
    return images, train


def monitor(encoder: nn.Module, train: Split, seed: int, device: torch.device,
            precision: torch.dtype) -> dict[str, Tensor]:
    """Which of 20% of the labelled training images kNN and a linear probe get right from the other 80%: bool [M] each;
    and the effective `rank` of all their features. No test image is seen.
    """
    order = torch.randperm(len(train.labels), generator=seeded_generator(seed, "monitor"))
    features = extract_features(encoder, train.pixels, device, precision).cpu()[order]
    (bank, queries), (labels, truth) = (x.tensor_split([int(0.8 * len(x))]) for x in (features, train.labels[order]))
    probe = fit_logistic(bank, labels, len(train.classes), PROBE_PENALTY)
    return {"knn": knn_predict(bank, labels, queries, len(train.classes)) == truth,
            "probe": probe(queries).argmax(dim=1) == truth, "rank": effective_rank(features)}


def scores_of(watched: dict[str, Tensor]) -> dict[str, float]:
    """What `monitor` saw, in numbers: right answers in percent."""
    return {name: percent(x) if x.dtype == torch.bool else round(x.item(), 1) for name, x in watched.items()}


def verdict(protocol: str, before: Tensor, after: Tensor, init: str) -> str:
    """What pretraining did to the frozen features, in words, from which of the same images a protocol got right."""
    gain, half = gain_of(after.double() - before.double())
    line = f"{protocol} went from {percent(before):.1f}% to {percent(after):.1f}%, by {gain:+.1f} ± {half:.1f} (95%): "
    return line + {"cannot tell": f"{len(after):,} held-out images cannot tell whether pretraining changed it",
                   "gained": "pretraining gained",
                   "LOST": "pretraining LOST; " + ("train for more EPOCHS or lower LEARNING_RATE" if init == "random"
                                                   else "lower LEARNING_RATE or raise CROP_AREA"),
                   }[verdict_of(gain, half)]


def check_optimizer(c: SimpleNamespace) -> None:
    """Raise UsageError for a constant that is left to "auto", which is for SGD, where that is not the optimizer."""
    left = [name for name in ("LEARNING_RATE", "WEIGHT_DECAY") if getattr(c, name) == "auto"]
    if left and c.OPTIMIZER == "adamw":
        raise UsageError(f"OPTIMIZER is adamw, but auto is for sgd: give {' and '.join(left)}, too")


def check_constants(c: SimpleNamespace) -> None:
    make_tuples(c, "BLUR_P")
    check_training(c, PREDICTOR_RATE=(0, math.inf), JITTER=(0, 2), BLUR_P=(0, 1), HIDDEN_DIM=(1, math.inf),
                   PROJECTION_DIM=(2, math.inf), BASE_DECAY=(0, 1), LOG_EVERY=(1, math.inf),
                   CHECKPOINT_MINUTES=(0, math.inf))
    if len(c.BLUR_P) != 2:
        raise UsageError(f"BLUR_P is {','.join(map(str, c.BLUR_P))}: it must be two probabilities ({flag('BLUR_P')})")
    check_choice("BATCHNORM", c.BATCHNORM, ["batch", "frozen"])
    if c.BATCHNORM == "frozen" and c.INIT == "random":
        raise UsageError("BATCHNORM is frozen, but INIT random has no statistics to keep: set it to auto or batch "
                         "(--batchnorm)")


def main(argv: list[str] | None = None) -> int:
    return run_script(globals(), argv)


if __name__ == "__main__":
    sys.exit(main())
