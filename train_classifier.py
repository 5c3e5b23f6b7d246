"""Measure what BYOL gained: one network, trained on few and on many labelled images, without BYOL and with it.

    python train_classifier.py --demo            after train_byol.py --demo
    python train_classifier.py                   after train_byol.py
    python train_classifier.py --run A,B,C       after train_byol.py --run A, B and C, which differ in SEED alone
    python train_classifier.py --run none        the arm without BYOL alone

Both arms share the head's first weights, the order of the batches, the crops and the number of steps; each takes the
rate best for it on held-out labelled images. Reported is the test accuracy after the last epoch, never the best one.
"""
import copy
import itertools
import math
import os
import sys
import textwrap
import time
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Callable, Iterable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol import build_optimizer, learning_rate, set_learning_rate
from data import Split, batch_indices, fetch, load_folds, load_split, place
from encoders import build_encoder, digest_of, plain_state_dict
from evaluate import (extract_features, fifths, fold_standardisation, gain_interval, knn_predict, linear_probe, percent,
                      verdict_of)
from plots import plot_label_efficiency, plot_neighbors
from utils import (VERSION, UserError, as_text, autocast, choice, choose_threads, compiler, constants_of, count,
                   environment, flag, nearest, number, only_writer, path, progress, read_json, refuse_changes,
                   run_folder, run_script, save_torch, say, seeded_generator, seeded_init, select_device,
                   select_precision, several, timer, write_json)
from views import CROP_DRAWS, crop_of, crop_resize, normalize, send

# What to compare
RUN = "byol"  # the pretraining run in runs/ whose encoder.pt is compared, or several: A,B,C; or none
DATASET = "run"  # run: that of RUN; stl10, cifar10, patterns, or a folder with train/<class>/ and test/<class>/
IMAGE_SIZE = "run"  # pixels a side
ENCODER = "run"  # any torchvision ResNet by name
STEM = "run"  # 7x7 or 3x3
INIT = "run"  # what "without BYOL" starts from: imagenet, random, or a file with a state dict
LABELS_PER_CLASS = (10, 50, "all")  # budgets: labelled images of each class, all, or fold: one of STL-10's ten a seed
SEEDS = (0, 1, 2)  # one training each; a seed decides the labelled subset, the head, the crops and random weights
# Fine-tuning
EPOCHS = "auto"  # passes over all labelled images; fewer images get as many steps; auto: 40 if INIT is random, else 10
BATCH_SIZE = 64  # images a step
LEARNING_RATE = (0.0006, 0.0025, 0.01, 0.04)  # peak rates, of which held-out images choose one; or a single rate
HEAD_RATE = 0.1  # how many times as fast the new head learns, behind a BatchNorm that gives features one scale
WEIGHT_DECAY = 5e-4  # of matrices and convolutions; BatchNorm and biases get none
WARMUP_EPOCHS = 1.0  # linear rise of the rate, at most half of the training; then a cosine to zero
CROP_AREA = 0.3  # smallest share of an image that a training crop shows
# The machine
DATA_ROOT = "data"  # where STL-10, CIFAR-10 and the caches of decoded folders live
MAX_UNREADABLE = 0.01  # share of a folder's images that may be unreadable: they are skipped
DEVICE = "auto"  # auto is cuda, then mps, then cpu
PRECISION = "auto"  # bf16, fp32, or auto: bf16 where the hardware has it

KINDS = dict(RUN=several(str), DATASET=path("run", "stl10", "cifar10", "patterns"),
             IMAGE_SIZE=number(16, math.inf, "run", whole=True), ENCODER=str, STEM=choice("run", "7x7", "3x3"),
             INIT=path("run", "imagenet", "random"), SEEDS=several(number(0, whole=True)),
             LABELS_PER_CLASS=several(number(1, math.inf, "all", "fold", whole=True)), BATCH_SIZE=number(2, whole=True),
             EPOCHS=number(1, math.inf, "auto", whole=True), LEARNING_RATE=several(number(0)), HEAD_RATE=number(0),
             WEIGHT_DECAY=number(0), WARMUP_EPOCHS=number(0), CROP_AREA=number(0.01, 1), DATA_ROOT=path(),
             MAX_UNREADABLE=number(0, 1), DEVICE=str, PRECISION=choice("auto", "bf16", "fp32"))
DEMO = dict(RUN="demo", LABELS_PER_CLASS=(10, 50), SEEDS=(0, 1, 2, 3, 4), EPOCHS=1, BATCH_SIZE=32, LEARNING_RATE=0.0025)
OF_THE_RUN = dict(DATASET=("stl10", "patterns"), IMAGE_SIZE=(96, 32), ENCODER=("resnet18", "resnet18"),
                  STEM=("7x7", "7x7"), INIT=("imagenet", "random"))  # "run" where RUN is none, and with --demo
PLACES = {"RUN", "DATA_ROOT", "MAX_UNREADABLE", "DEVICE", "DATASET", "INIT"}  # of the last two only the path is free
FREE = PLACES | {"SEEDS", "LABELS_PER_CLASS", "EPOCHS", "LEARNING_RATE"}  # may change between calls
MAY_DIFFER = PLACES | {"SEED", "CHECKPOINT_MINUTES"}  # between pretraining runs compared together
HELD_OUT, MOST_FIFTHS = 500, 2  # a rate is judged by as many fifths as hold so many images, but at most by so many
PROTOCOLS = ("fine-tuning", "linear probe", "kNN")
BASELINE, WITH_BYOL = "without BYOL", "with BYOL"


class Training(NamedTuple):
    """One training of the comparison, as its record names it."""
    seed: int
    arm: str
    labels: int | str
    epochs: int
    rate: float | None  # None: not chosen yet, as not all of its trials are done
    fifth: int | None = None  # of the labelled images, held out to judge the rate; None: tested on the test images


class Setup(NamedTuple):
    """What all trainings of a comparison share."""
    c: SimpleNamespace
    train: Split
    test: Split
    device: torch.device
    network: nn.Module    # each training takes place in its memory, because a GPU has recorded the steps of the first
    forward: Callable     # `network` and `crops`, compiled where that pays
    crop: Callable
    advance: Callable     # called with a title after each step
    frozen: dict          # what `frozen_encoder` has returned


def compare(c: SimpleNamespace) -> None:
    """Train what is missing of every seed, arm and budget; leaves the table, results.json, classifier.pt, figures."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("the comparison is one process: start it without torchrun")
    stamp = adopt_runs(c)
    c.EPOCHS = (40 if c.INIT == "random" else 10) if c.EPOCHS == "auto" else c.EPOCHS
    folder, device = run_folder(*c.RUN), select_device(c.DEVICE)
    c.PRECISION = select_precision(c.PRECISION, device)
    with only_writer(folder):
        train, test = (load_labelled(c, split, device) for split in ("train", "test"))
        if stamp not in (None, train.stamp()):
            raise UserError(f"DATASET {c.DATASET} has another train/ than that of {as_text(c.RUN)}: set it to run")
        check_constants(c, train)
        arms = [BASELINE] if c.RUN == ("none",) else [BASELINE, WITH_BYOL]
        results = open_results(c, folder, train, test)
        records = {Training(*(record[name] for name in Training._fields)): record for record in results["records"]}
        missing = [training for training in plan(c, records, arms, train) if training not in records]
        steps = c.EPOCHS * (len(train.labels) // c.BATCH_SIZE)  # of each; the remainder is dropped
        threads = choose_threads(device)
        say(f"{Path(c.DATASET).name}: {count(len(train.labels), 'training image')} and "
            f"{count(len(test.labels), 'test image')} of {len(train.classes)} classes\n{c.ENCODER} ({c.STEM}) from "
            f"{Path(c.INIT).name} weights at {c.IMAGE_SIZE} px, on {device} in {c.PRECISION}{threads}\n"
            f"{count(len(missing), 'training')} of {count(steps, 'step')} to do")
        setup = build_setup(c, train, test, device, len(missing) * steps)
        for arm in arms:  # whose weights could be wrong: nothing is deleted before
            frozen_encoder(setup, arm, c.SEEDS[0])
        for name in ("results.json", "classifier.pt", "label_efficiency.png", "neighbors.png") if c.overwrite else ():
            (folder / name).unlink(missing_ok=True)
        while missing:
            training = missing[0]
            records[training], network = run_training(setup, training)
            tested = [t for t in reversed(records) if t.arm == arms[-1] and t.fifth is None]  # of two rates the latest
            if training == max(tested, key=lambda t: (images_of(t.labels, train), t.epochs, -t.seed), default=None):
                save_torch(folder / "classifier.pt", plain_state_dict(network))
            results |= {"records": list(records.values()), "environment": environment(device)}
            write_json(folder / "results.json", results)
            missing = [training for training in plan(c, records, arms, train) if training not in records]
        report(setup, folder, results, records, arms)
    if WITH_BYOL not in arms:
        say("\nfor the arm with BYOL, run python train_byol.py and then the command that it prints last")


def plan(c: SimpleNamespace, records: dict[Training, dict], arms: list[str], train: Split) -> list[Training]:
    """All trainings: those that judge the rates, then those of the table, by the best rate of each arm and budget. The
    rates are judged with one seed for all arms, also rates and budgets that are added later."""
    seed = next((known.seed for known in records if known.fifth is not None), c.SEEDS[0])
    rates = c.LEARNING_RATE if len(c.LEARNING_RATE) > 1 else ()
    trials = {(arm, labels): [Training(seed, arm, labels, c.EPOCHS, rate, fifth) for rate in rates
                              for fifth in range(min(MOST_FIFTHS, math.ceil(5 * HELD_OUT / images_of(labels, train))))]
              for arm, labels in itertools.product(arms, c.LABELS_PER_CLASS)}
    best = {key: max(c.LEARNING_RATE, key=lambda rate: sum(records[t]["fine-tuning"] for t in own if t.rate == rate))
            for key, own in trials.items() if all(t in records for t in own)}
    return sum(trials.values(), []) + [Training(seed, arm, labels, c.EPOCHS, best.get((arm, labels)))
                                       for seed, arm, labels in itertools.product(c.SEEDS, arms, c.LABELS_PER_CLASS)]


def images_of(labels: int | str, train: Split) -> int:
    """How many labelled images a budget pays."""
    return {"all": len(train.labels), "fold": 1000}.get(labels) or labels * len(train.classes)


def build_setup(c: SimpleNamespace, train: Split, test: Split, device: torch.device, steps: int) -> Setup:
    network, feature_dim = build_encoder(c.ENCODER, "random", 0, c.STEM)
    network.fc = new_head(feature_dim, len(train.classes), 0)
    network = network.to(device, memory_format=torch.channels_last)
    compiled = compiler(device, steps)
    return Setup(c, train, test, device, network, compiled(network), compiled(crops), progress_over(steps), frozen={})


def progress_over(steps: int) -> Callable[[str], None]:
    """Returns what to call, with a title, after each step: a bar on a terminal, elsewhere a line each half minute."""
    bar, line_due, start, numbers = progress(total=steps, unit="step"), timer(30), time.monotonic(), itertools.count(1)

    def advance(title: str) -> None:
        done = next(numbers)
        bar.update()
        bar.set_description(title, refresh=False)
        if bar.disable and line_due():
            minutes = (time.monotonic() - start) / done * (steps - done) / 60
            say(f"{title.rstrip()}: step {done:,} of {steps:,}, {minutes:.0f} min left")
    return advance


def new_head(feature_dim: int, classes: int, seed: int) -> nn.Sequential:
    """A linear layer, behind a BatchNorm without weights for features of any scale: He et al. 2022 (MAE, app. A.1)."""
    with seeded_init(seed, "head"):
        return nn.Sequential(nn.BatchNorm1d(feature_dim, affine=False), nn.Linear(feature_dim, classes))


def frozen_encoder(setup: Setup, arm: str, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The weights that an arm starts from, and their features of both splits. Seed s uses run number s modulo runs."""
    c, device = setup.c, setup.device
    init = str(run_folder(c.RUN[seed % len(c.RUN)]) / "encoder.pt") if arm == WITH_BYOL else c.INIT
    key = init, seed if init == "random" else None  # the same encoder for all seeds is used once
    if key not in setup.frozen:
        encoder = build_encoder(c.ENCODER, init, seed, c.STEM)[0].to(device, memory_format=torch.channels_last)
        setup.frozen[key] = encoder.state_dict(), *(extract_features(encoder, split.pixels, device, c.PRECISION).cpu()
                                                    for split in (setup.train, setup.test))
    return setup.frozen[key]


def subset_of(setup: Setup, labels: int | str, seed: int) -> Tensor:
    """Indices of a budget's training images, as many of each class; a seed's smaller subsets lie in its larger ones."""
    truth = setup.train.labels
    if labels == "fold":
        return load_folds(setup.c.DATA_ROOT, len(truth))[seed]
    if labels == "all":
        return torch.arange(len(truth))
    order = torch.randperm(len(truth), generator=seeded_generator(seed, "labels"))
    return torch.cat([order[truth[order] == k][:labels] for k in truth.unique()])


def run_training(setup: Setup, training: Training) -> tuple[dict, nn.Module]:
    """A training's record, with what each protocol gets right, and the fine-tuned network. A trial of a rate is tested
    on its fifth of the labelled images, by fine-tuning alone."""
    seed, arm, labels, _, rate, fifth = training
    c, (pixels, known, classes), (images, truth, _) = setup.c, setup.train, setup.test
    subset, (weights, features, queries) = subset_of(setup, labels, seed), frozen_encoder(setup, arm, seed)
    title = f"{f'seed {seed}' if fifth is None else f'rate {rate:<6g}'} {labels:>4} labels {arm:<12}"
    if fifth is not None:
        subset, held_out = (subset[index] for index in fifths(known[subset], seed)[fifth])
        images, truth = fetch(pixels, held_out, pixels.device), known[held_out]
    network = fine_tune(setup, weights, subset, seed, rate, title)
    correct = {"fine-tuning": extract_features(network, images, setup.device, c.PRECISION).cpu().argmax(dim=1) == truth}
    record = training._asdict()
    if fifth is None:
        probe, record["probe penalty"] = linear_probe(features[subset], known[subset], len(classes), seed)
        correct["linear probe"] = probe(queries).argmax(dim=1) == truth
        correct["kNN"] = knn_predict(features[subset], known[subset], queries, len(classes)) == truth
    record |= {protocol: percent(x) for protocol, x in correct.items()}
    record["correct"] = {protocol: "".join("01"[bit] for bit in x.tolist()) for protocol, x in correct.items()}
    say(title + "".join(f"  {name} {record[name]:.1f}" for name in correct) + "  held out" * (fifth is not None))
    return record, network


def fine_tune(setup: Setup, start: dict[str, Tensor], subset: Tensor, seed: int, rate: float, title: str) -> nn.Module:
    """An encoder's weights `start` and a new head, trained on images `subset`: a network with one linear layer, `fc`.
    Head, order and crops come from the seed alone. The number of steps is that of EPOCHS passes over all of train/."""
    c, train, device, network = setup.c, setup.train, setup.device, setup.network
    head = new_head(network.fc[1].in_features, len(train.classes), seed)
    network.load_state_dict(start | {f"fc.{name}": value for name, value in head.state_dict().items()})
    batch_size = min(c.BATCH_SIZE, len(subset))  # of another than BATCH_SIZE the steps would have to be recorded, too
    crop, forward = (setup.crop, setup.forward) if batch_size == c.BATCH_SIZE else (crops, network)
    steps_per_epoch = len(train.labels) // c.BATCH_SIZE
    total_steps, warmup_steps = c.EPOCHS * steps_per_epoch, round(c.WARMUP_EPOCHS * steps_per_epoch)
    optimizer = build_optimizer(network, c.WEIGHT_DECAY, "fc", c.HEAD_RATE)
    for step, index in enumerate(batch_indices(seed, "fine-tuning order", len(subset), batch_size, 0, total_steps)):
        images = fetch(train.pixels, subset[index], device)
        draws = torch.rand(batch_size, CROP_DRAWS, generator=seeded_generator(seed, "fine-tuning crops", step))
        x = crop(images, send(draws, device), c.CROP_AREA)
        x = x.contiguous(memory_format=torch.channels_last)  # a copy: what is replayed writes where it did before
        with autocast(device, c.PRECISION):
            scores = forward(x)
        loss = F.cross_entropy(scores.float(), send(train.labels[subset[index]], device))
        set_learning_rate(optimizer, learning_rate(step, total_steps, warmup_steps, rate))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        setup.advance(title)
    tuned = copy.deepcopy(network)
    norm, linear = tuned.fc
    tuned.fc = fold_standardisation(linear, norm.running_mean, (norm.running_var + norm.eps).sqrt())
    return tuned


def crops(images: Tensor, draws: Tensor, min_area: float) -> Tensor:
    """Random resized crops of uint8 images [N,3,S,S], as large as they are and normalised; draws: [N,CROP_DRAWS]."""
    return normalize(crop_resize(images, *crop_of(draws, *images.shape[-2:], min_area), images.shape[-1]))


def adopt_runs(c: SimpleNamespace) -> str | None:
    """Set constants that are "run" to the runs' own; returns the stamp that train/ must have in a folder that is not
    theirs. Raises UserError for a constant that contradicts a run, and for runs that differ in more than SEED."""
    if c.RUN == ("none",):
        vars(c).update({name: values[c.demo] for name, values in OF_THE_RUN.items() if getattr(c, name) == "run"})
        return None
    configs, runs = [run_folder(name) / "config.json" for name in c.RUN], []
    for name, config in zip(c.RUN, configs):
        if not config.exists():
            near = nearest(name, [file.parent.name for file in config.parent.parent.glob("*/config.json")])
            raise UserError(f"RUN {name}: there is no {config}{near}; pretrain that run first, or compare without BYOL "
                            "(--run none)")
        runs.append(run := read_json(config, "constants")["constants"])
        for constant in OF_THE_RUN:
            value, of_run = getattr(c, constant), KINDS[constant](run.get(constant, OF_THE_RUN[constant][0]))
            same = value in ("run", of_run) or constant == "INIT" and digest_of(value) == run.get("INIT_SHA256")
            if not same and not (constant == "DATASET" and run.get("LABELLED") and Path(value).is_dir()):
                raise UserError(f"{constant} {value} contradicts {config}, which says {of_run}: set it to run, or "
                                f"pretrain a run with it ({flag(constant)})")
            setattr(c, constant, of_run if value == "run" else value)
        if run.get("INIT_SHA256", now := digest_of(c.INIT)) != now:
            raise UserError(f"INIT {c.INIT} is not the file that {config} began with: bring that one back")
        differ = [f"{name} {as_text(value)} and {as_text(runs[0].get(name))}" for name, value in sorted(run.items())
                  if name not in MAY_DIFFER and value != runs[0].get(name)]
        if differ:
            raise UserError(f"RUN {as_text(c.RUN)}: {config} and {configs[0]} differ in {', '.join(differ)}; runs that "
                            "are compared together differ in SEED alone")
        if not config.with_name("encoder.pt").exists():
            raise UserError(f"{config.parent} has no encoder.pt yet: its train_byol.py command, run again, finishes "
                            "the pretraining")
    if len({run["SEED"] for run in runs}) < len(runs):
        raise UserError(f"RUN {as_text(c.RUN)}: two of these runs have the same SEED, so they are the same run")
    return next((run["LABELLED"] for run in runs if KINDS["DATASET"](run["DATASET"]) != c.DATASET), None)


def load_labelled(c: SimpleNamespace, split: str, device: torch.device) -> Split:
    found = load_split(c.DATASET, split, c.DATA_ROOT, c.IMAGE_SIZE, c.MAX_UNREADABLE)
    if found is None:
        raise UserError(f"DATASET {c.DATASET!r} has no {split}/: the classifier needs {split}/<class>/ with images")
    if len(found.classes) < 2:  # a subset may then be a single image, of which BatchNorm learns nothing
        raise UserError(f"DATASET {c.DATASET!r} has only one class in {split}/: a comparison needs two")
    return found._replace(pixels=place(found.pixels, device))


def check_constants(c: SimpleNamespace, train: Split) -> None:
    """Raise UserError for constants that contradict each other. Budgets that a class cannot pay are left out."""
    uses = {sum(seed % len(c.RUN) == i for seed in c.SEEDS) for i in range(len(c.RUN))}  # of each run
    if len(uses) > 1:
        raise UserError(f"SEEDS {as_text(c.SEEDS)} do not use the runs {as_text(c.RUN)} equally often: seed "
                        f"s uses run number s modulo {len(c.RUN)}, counted from 0")
    if c.BATCH_SIZE > len(train.labels):
        raise UserError(f"BATCH_SIZE is {c.BATCH_SIZE}, but there are {len(train.labels)} training images: lower it")
    if 1 in c.LABELS_PER_CLASS and len(c.LEARNING_RATE) > 1:
        raise UserError("LABELS_PER_CLASS 1 leaves no image to choose a rate by: give one LEARNING_RATE")
    if "fold" in c.LABELS_PER_CLASS and (c.DATASET != "stl10" or max(c.SEEDS) > 9):
        raise UserError("LABELS_PER_CLASS fold is for DATASET stl10 and SEEDS from 0 to 9: it has ten folds")
    fewest, name = min((int((train.labels == k).sum()), name) for k, name in enumerate(train.classes))
    left_out = [labels for labels in c.LABELS_PER_CLASS if not isinstance(labels, str) and labels > fewest]
    if left_out:
        message = f"LABELS_PER_CLASS {as_text(left_out)}: class {name!r} has only {count(fewest, 'training image')}"
        if len(left_out) == len(c.LABELS_PER_CLASS):
            raise UserError(f"{message}: lower it (--labels-per-class)")
        say(f"{message}; left out")
        c.LABELS_PER_CLASS = tuple(labels for labels in c.LABELS_PER_CLASS if labels not in left_out)


def open_results(c: SimpleNamespace, folder: Path, train: Split, test: Split) -> dict:
    """Results so far, from which the comparison goes on; none with --overwrite. Raises UserError where they are of
    another version, of other constants, or of another encoder, INIT or other images."""
    encoders = [run_folder(name) / "encoder.pt" for name in c.RUN if name != "none"]
    inputs = {f"encoder.pt (number {i} of RUN)": digest_of(file) for i, file in enumerate(encoders)}
    inputs |= {"INIT": digest_of(c.INIT), "train/ of DATASET": train.stamp(), "test/ of DATASET": test.stamp()}
    file = folder / "results.json"
    if c.overwrite or not file.exists():
        return {"version": VERSION, "inputs": inputs, "constants": constants_of(c), "records": []}
    results = read_json(file, "inputs")
    before = {"version of this code": results.get("version")} | results["inputs"]
    for name, now in ({"version of this code": VERSION} | inputs).items():
        if before.get(name) != now:
            raise UserError(f"{file} was measured with another {name}: use --overwrite to compare anew")
    refuse_changes(results["constants"], c, file, FREE)
    return results | {"constants": constants_of(c)}


def report(setup: Setup, folder: Path, results: dict, records: dict[Training, dict], arms: list[str]) -> None:
    """The table, its numbers in results.json, and the figures, all from the records."""
    def row(labels: int | str, name: str, texts: Iterable[str]) -> None:
        say(f"{labels:>6}  {name:<17}" + "".join(text.rjust(17) for text in texts))

    c, summary = setup.c, {}
    trainings = [training for training in plan(c, records, arms, setup.train) if training.fifth is None]
    row("\nlabels", "test accuracy (%)", PROTOCOLS)
    for labels in c.LABELS_PER_CLASS:
        of = {arm: [records[t] for t in trainings if (t.arm, t.labels) == (arm, labels)] for arm in arms}
        summary[labels] = {p: {arm: [record[p] for record in of[arm]] for arm in arms} for p in PROTOCOLS}
        for arm in arms:
            accuracies = [summary[labels][p][arm] for p in PROTOCOLS]
            row(labels, arm, [f"{mean(x):.1f}" + (f" ± {stdev(x):.1f}" if len(x) > 1 else "") for x in accuracies])
        if WITH_BYOL in arms:
            intervals = [interval(c, of[BASELINE], of[WITH_BYOL], p) for p in PROTOCOLS]
            row(labels, "gain", [f"{gain:+.1f} ± {half:.1f}" for gain, half in intervals])
            row("", "", [verdict_of(*of_protocol) for of_protocol in intervals])
            for protocol, of_protocol in zip(PROTOCOLS, intervals):
                summary[labels][protocol]["interval"] = of_protocol
    runs = ("no pretraining" if c.RUN == ("none",) else "one pretraining run" if len(c.RUN) == 1 else
            f"{len(c.RUN)} pretraining runs, in turn")
    data, init = Path(c.DATASET).name, Path(c.INIT).name
    lines = (f"{as_text(c.RUN)}: {data} at {c.IMAGE_SIZE} px, {c.ENCODER} from {init} weights",
             f"mean ± std over seeds {', '.join(map(str, c.SEEDS))}: labelled subset, head, random weights"
             if len(c.SEEDS) > 1 else f"seed {c.SEEDS[0]}",
             f"{runs}; fine-tuned for {count(c.EPOCHS, 'epoch')}, the last one reported")
    caption = "\n".join(textwrap.fill(line, 80) for line in lines)
    say("\n" + caption)
    if WITH_BYOL in arms:
        covered = "runs, seeds and" if len(c.RUN) > 1 else "seeds and" if len(c.SEEDS) > 1 else "the"
        say(f"gain: ± half of its 95% interval over {covered} test images")
    for t in trainings if len(c.LEARNING_RATE) > 2 else ():
        if t.seed == c.SEEDS[0] and t.rate in (min(c.LEARNING_RATE), max(c.LEARNING_RATE)):
            say(f"{t.labels} labels {t.arm}: the best rate, {t.rate:g}, is at an end of LEARNING_RATE; try beyond it")
    write_json(folder / "results.json", results | {"classes": setup.test.classes, "summary": summary})
    if len(summary) > 1:
        sizes = [images_of(labels, setup.train) / len(setup.train.classes) for labels in summary]
        panels = {p: {arm: [of_labels[p][arm] for of_labels in summary.values()] for arm in arms} for p in PROTOCOLS}
        plot_label_efficiency(folder / "label_efficiency.png", panels, sizes, caption)
    if WITH_BYOL in arms:
        features = {arm: frozen_encoder(setup, arm, c.SEEDS[0])[2] for arm in arms}
        plot_neighbors(folder / "neighbors.png", *setup.test, features, seeded_generator(c.SEEDS[0], "queries"),
                       as_text(c.RUN))


def interval(c: SimpleNamespace, baseline: list[dict], with_byol: list[dict], protocol: str) -> tuple[float, float]:
    """BYOL's mean gain over the baseline and half of its 95% interval, from the records of each seed."""
    gains = torch.tensor([[int(y) - int(x) for x, y in zip(before["correct"][protocol], after["correct"][protocol])]
                          for before, after in zip(baseline, with_byol)], dtype=torch.double)
    if len(c.RUN) > 1:  # seeds that share a run are no independent repetitions
        gains = torch.stack([gains[[seed % len(c.RUN) == i for seed in c.SEEDS]].mean(0) for i in range(len(c.RUN))])
    return gain_interval(gains)


def main(argv: list[str] | None = None) -> int:
    return run_script(compare, globals(), argv)


if __name__ == "__main__":
    sys.exit(main())
