"""Measure what BYOL gained: one network, trained on few and on many labelled images, without BYOL and with it.

    python train_classifier.py --demo            after train_byol.py --demo
    python train_classifier.py                   after train_byol.py
    python train_classifier.py --run A,B,C       after train_byol.py --run A, B and C, which differ in SEED alone
    python train_classifier.py --folds           STL-10's own protocol: its ten folds of 1,000 labelled images

Both arms share the head's first weights, the order of the batches, the crops and the number of steps, and each takes
the rate that is best for it on held-out labelled images; they differ in the encoder they start from. Where that began
with ImageNet weights or a file's, two controls show what BYOL is to be measured against: random weights, and those
weights with nothing new but the BatchNorm statistics of these images; --no-controls saves their time. Dataset, encoder,
init and image size are those of the run. Reported is the accuracy on the test images after the last epoch, never the
best one.
"""
import base64
import copy
import math
import sys
import textwrap
import time
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from byol import CROP_DRAWS, crop_of, crop_resize, learning_rate, normalize, send
from data import Split, batch_indices, fetch, load_folds, load_split, place
from plots import plot_comparison, plot_lines, plot_neighbors
from runs import only_writer, read_json, run_folder, same_constants, save_torch, stop_signals, write_json
from utils import (DEMO, Stopped, UsageError, UserError, autocast, build_encoder, build_optimizer, check_training,
                   choose_threads, compiler, constants_of, digest_of_file, environment, extract_features, fit_logistic,
                   flag, fold_standardisation, gain_of, knn_predict, make_tuples, network_input, percent,
                   plain_state_dict, progress, resolve_auto, run_script, seeded_generator, seeded_init, select_device,
                   select_precision, take_step, verdict_of, warmup_of)

# What to compare; the four after RUN are taken from the run where it exists
RUN = "byol"  # the pretraining run in runs/ whose encoder.pt is compared, or several: A,B,C; results go to runs/RUN/
DATASET = "stl10"  # stl10, patterns, or a folder with train/<class>/ and test/<class>/
IMAGE_SIZE = 96  # pixels a side
ENCODER = "resnet18"  # any torchvision ResNet by name
INIT = "imagenet"  # what "without BYOL" starts from: imagenet, random, or a file with a state dict
LABELS_PER_CLASS = (10, 50, "all")  # budgets to learn from: labelled training images of each class, or all
SEEDS = (0, 1, 2)  # one training each; a seed decides the labelled subset, the head, the crops and random weights
CONTROLS = True  # where INIT is not random: also random weights, and INIT's with these images' BatchNorm statistics
FOLDS = False  # learn from STL-10's ten predefined folds of 1,000 images, one a seed, instead
# Fine-tuning
EPOCHS = "auto"  # passes over all labelled images; fewer of them take as many steps; auto: 10, if INIT is random 40
BATCH_SIZE = 64  # images a step
OPTIMIZER = "sgd"  # sgd (momentum 0.9) or adamw
LEARNING_RATE = (0.0025, 0.01, 0.04, 0.16)  # peak rates per 256 images, the best on held-out images is taken; or one
HEAD_RATE = 0.1  # how many times as fast the new head learns, behind a BatchNorm that gives features one scale
WEIGHT_DECAY = 5e-4  # of matrices and convolutions; BatchNorm and biases get none
WARMUP_EPOCHS = 1.0  # linear rise of the rate, at most half of the training; then a cosine to zero
CROP_AREA = 0.3  # smallest share of an image that a training crop shows
# The machine
DATA_ROOT = "data"  # where STL-10 and the caches of decoded folders live
DEVICE = "auto"  # auto is cuda, then mps, then cpu
PRECISION = "auto"  # bf16, fp32, or auto: bf16 where the hardware has it

DEMO = DEMO | dict(LABELS_PER_CLASS=(5, "all"), EPOCHS=7, BATCH_SIZE=25, OPTIMIZER="adamw", LEARNING_RATE=(1e-2,))
AUTO = {"EPOCHS": (40, 10)}  # where INIT is random, and where it is not
FREE = {"RUN", "DATA_ROOT", "DEVICE", "SEEDS", "LABELS_PER_CLASS", "CONTROLS", "FOLDS", "EPOCHS"}  # between calls
OF_THE_RUN = ("DATASET", "IMAGE_SIZE", "ENCODER", "INIT")
MAY_DIFFER = {"SEED", "RUN", "DATA_ROOT", "DEVICE", "CHECKPOINT_MINUTES"}  # between pretraining runs compared together
RESULTS_VERSION = 3  # raised where what an earlier version measured cannot be compared with this one's
HELD_OUT = 500  # labelled images, at least, that a rate is judged by, where so many are labelled
MIN_STEPS_TO_COMPILE = 4000  # of some 7 ms that are saved in each, where compiling takes half a minute
PROTOCOLS = ("fine-tuning", "linear probe", "kNN")
RANDOM, BASELINE, BATCHNORM, WITH_BYOL = "random weights", "without BYOL", "BatchNorm only", "with BYOL"
FOLD = "fold"  # the budget of one of STL-10's folds
PROBE_PENALTIES = tuple(10.0 ** e for e in range(-3, 2))  # L2 penalties that the linear probe chooses from


class Cell(NamedTuple):
    """One training of the comparison."""
    seed: int
    arm: str
    labels: int | str
    epochs: int


class Trainee:
    """The network that is trained: each training takes place in the memory of the first, whose steps a GPU has recorded.

    compiled: what is done to a function before it is called again and again.
    """

    def __init__(self, compiled: Callable = lambda function: function):
        self.compiled, self.network = compiled, None

    def become(self, network: nn.Module) -> nn.Module:
        """Take on the weights and buffers of `network`; what the training before it returned is gone then."""
        if self.network is None:
            self.network, self.head = network, network.fc
            self.forward, self.crops = self.compiled(network), self.compiled(crops)
        self.network.fc = self.head  # fine_tune puts another in its place
        self.network.load_state_dict(network.state_dict())
        return self.network.train()


class Task(NamedTuple):
    """What all trainings of a comparison share."""
    c: SimpleNamespace
    train: Split
    test: Split
    device: torch.device
    precision: torch.dtype
    encoders: list[Path]  # one of each pretraining run; a seed takes the one whose number is seed modulo runs
    trainee: Trainee
    folds: list[Tensor] = []
    signals: list[int] = []
    features: dict | None = None  # of training and test images, by each encoder that was asked


def run(c: SimpleNamespace) -> None:
    """Compare the arms with the constants `c`; each folder of results has one writer."""
    encoders = adopt_runs(c)
    resolve_auto(c, AUTO)
    check_constants(c)
    if c.FOLDS:
        c.SEEDS, c.LABELS_PER_CLASS = c.SEEDS if "SEEDS" in c.given else tuple(range(10)), (FOLD,)
    turns = [sum(seed % len(encoders) == i for seed in c.SEEDS) for i in range(len(encoders))]
    if len(set(turns)) > 1:
        raise UsageError(f"SEEDS {','.join(map(str, c.SEEDS))} do not take the runs {c.RUN} equally often: of "
                         f"{len(turns)} runs, seed s takes that of number s modulo {len(turns)}, counted from 0")
    folder = run_folder(*c.RUN.split(","))
    if not encoders:
        print(f"there is no pretraining in {folder}: this is the half without BYOL", flush=True)
    with only_writer(folder):
        compare(c, folder, encoders)


def compare(c: SimpleNamespace, folder: Path, encoders: list[Path]) -> None:
    """Train what is missing of every seed, arm and budget; leaves the table, results.json, classifier.pt, figures."""
    device = select_device(c.DEVICE)
    precision = select_precision(c.PRECISION, device)
    threads = choose_threads(device)
    train, test = (load_labelled(c, split, device) for split in ("train", "test"))
    if c.BATCH_SIZE > len(train.labels):
        raise UsageError(f"BATCH_SIZE is {c.BATCH_SIZE}, but there are only {len(train.labels)} training images: "
                         "lower it")
    folds = load_folds(c.DATA_ROOT, len(train.labels)) if c.FOLDS else []
    budgets = affordable(c.LABELS_PER_CLASS, train)
    inputs = {f"encoder.pt (number {i} of RUN)": digest_of_file(path) for i, path in enumerate(encoders)}
    inputs["INIT"] = digest_of_file(c.INIT)
    inputs |= {f"{name}/ of DATASET": digest_of(split) for name, split in (("train", train), ("test", test))}
    results = open_results(folder / "results.json", c, environment(device, precision), inputs)
    controls = c.CONTROLS and c.INIT != "random"
    arms = [RANDOM] * controls + [BASELINE] + [BATCHNORM] * controls + [WITH_BYOL] * bool(encoders)
    print(f"{c.DATASET}: {len(train.labels):,} training and {len(test.labels):,} test images of {len(train.classes)} "
          f"classes\n{c.ENCODER} from {Path(c.INIT).name} weights at {c.IMAGE_SIZE} px, on {device} in "
          f"{results['environment']['precision']}{threads}", flush=True)

    save = partial(write_json, folder / "results.json", results)
    with stop_signals() as signals:
        cells = {Cell(*(record[name] for name in Cell._fields)): record for record in results["records"]}
        trainings = sum(Cell(*key, c.EPOCHS) not in cells for key in product(c.SEEDS, arms, budgets))
        if len(c.LEARNING_RATE) > 1:
            trainings *= 1 + len(c.LEARNING_RATE)  # about: each rate is tried on one to five folds
        steps = trainings * c.EPOCHS * (len(train.labels) // c.BATCH_SIZE)
        trainee = Trainee(compiler(device, steps >= MIN_STEPS_TO_COMPILE))
        task = Task(c, train, test, device, precision, encoders, trainee, folds, signals, features={})
        if c.overwrite:
            save()
            c.began_anew = True
        for seed, arm in product(c.SEEDS, arms):
            missing = [cell for labels in budgets if (cell := Cell(seed, arm, labels, c.EPOCHS)) not in cells]
            start = build_arm(task, arm, seed) if missing else ()
            for cell in missing:
                record, network = train_cell(task, cell, *start, choose_rate(task, cell, results["trials"], save))
                if arm == arms[-1] and all(effort(cell, train) > effort(other, train) for other in cells
                                           if other.arm == arm):
                    save_torch(folder / "classifier.pt", plain_state_dict(network))
                results["records"].append(record)
                cells[cell] = record
                save()
                print(f"seed {seed} {cell.labels:>4} labels {arm:<14}"
                      + "".join(f"  {name} {record[name]:.1f}" for name in PROTOCOLS), flush=True)

    report(task, folder, results, cells, arms, budgets)
    if not encoders:
        same = [f"{flag(name)} {getattr(c, name)}" for name in ("RUN", "DATA_ROOT", *OF_THE_RUN) if name in c.given]
        command = " ".join(["python train_byol.py", *["--demo"] * c.demo, *same])
        print(f"\nFor the half with BYOL: {command}, then this command again.")


def load_labelled(c: SimpleNamespace, split: str, device: torch.device) -> Split:
    found = load_split(c.DATASET, split, c.DATA_ROOT, c.IMAGE_SIZE)
    if found is None:
        raise UserError(f"DATASET {c.DATASET!r} has no {split}/: the classifier needs {split}/<class>/ with images")
    if len(found.classes) < 2:  # a subset may then be a single image, of which BatchNorm learns nothing
        raise UserError(f"DATASET {c.DATASET!r} has but one class in {split}/: there is nothing to tell apart")
    return found._replace(pixels=place(found.pixels, device))


def digest_of(split: Split) -> str:
    """Tells these images, in this order and with these labels, from any others."""
    digest = sha256(repr((split.classes, split.labels.tolist())).encode())
    for images in split.pixels.split(256):
        digest.update(images.cpu().contiguous().numpy())
    return digest.hexdigest()


def init_of(task: Task, arm: str, seed: int) -> str:
    """What an arm starts from, as INIT says it."""
    if arm == WITH_BYOL:
        return str(task.encoders[seed % len(task.encoders)])
    return "random" if arm == RANDOM else task.c.INIT


def build_arm(task: Task, arm: str, seed: int) -> tuple[nn.Module, int]:
    """The encoder that an arm starts from, and the number of its features."""
    encoder, feature_dim = build_encoder(task.c.ENCODER, init_of(task, arm, seed), seed)
    encoder = encoder.to(task.device, memory_format=torch.channels_last)
    if arm == BATCHNORM:
        reestimate_batchnorm(encoder, task.train.pixels, task.device, task.precision)
    return encoder, feature_dim


def frozen_features(task: Task, arm: str, seed: int, encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """Features of the training and of the test images; an encoder that no seed changes is asked once."""
    init = init_of(task, arm, seed)
    key = arm, init, seed if init == "random" else None
    if key not in task.features:
        task.features[key] = tuple(features_of(task, encoder, split.pixels) for split in (task.train, task.test))
    return task.features[key]


def features_of(task: Task, network: nn.Module, pixels: Tensor) -> Tensor:
    return extract_features(network, pixels, task.device, task.precision).cpu()


def subset_of(task: Task, cell: Cell) -> Tensor:
    """Indices of the training images that a cell learns from."""
    if cell.labels == FOLD:
        return task.folds[cell.seed % len(task.folds)]  # rates may have been tried with another seed than a fold's
    return draw_subset(task.train.labels, cell.labels, cell.seed)


def train_cell(task: Task, cell: Cell, encoder: nn.Module, feature_dim: int, rate: float) -> tuple[dict, nn.Module]:
    """One cell's record, with the images that each protocol got right, and the network that was fine-tuned."""
    train, test, subset = task.train, task.test, subset_of(task, cell)
    train_features, queries = frozen_features(task, cell.arm, cell.seed, encoder)
    bank, labels = train_features[subset], train.labels[subset]
    probe, penalty = linear_probe(bank, labels, len(train.classes), cell.seed)
    network = fine_tune(task, copy.deepcopy(encoder), feature_dim, subset, cell.seed, rate,
                        f"seed {cell.seed}, {cell.labels} labels, {cell.arm}")
    right = {"fine-tuning": features_of(task, network, test.pixels).argmax(dim=1) == test.labels,
             "linear probe": probe(queries).argmax(dim=1) == test.labels,
             "kNN": knn_predict(bank, labels, queries, len(train.classes)) == test.labels}
    run = Path(init_of(task, cell.arm, cell.seed)).parent.name if cell.arm == WITH_BYOL else None
    record = cell._asdict() | {"run": run, "rate": rate, "probe penalty": penalty}
    record |= {name: percent(answers) for name, answers in right.items()}
    return record | {"right": {name: pack(answers) for name, answers in right.items()}}, network


def choose_rate(task: Task, cell: Cell, trials: list[dict], save: Callable) -> float:
    """The rate of LEARNING_RATE that is best for the cell's arm and budget on held-out images, with the first seed.

    `trials` holds what is known already, and takes on what is tried, which `save` keeps.
    """
    rates = task.c.LEARNING_RATE
    key = cell._asdict() | {"seed": trials[0]["seed"] if trials else task.c.SEEDS[0]}  # one for all arms, also later
    known = {trial["rate"]: trial["held out"] for trial in trials if trial.items() >= key.items()}
    unknown = [rate for rate in rates if rate not in known] if len(rates) > 1 else []
    for rate in unknown:
        known[rate] = held_out_accuracy(task, Cell(**key), rate)
        trials.append(key | {"rate": rate, "held out": known[rate]})
        save()
        print(f"rate {rate:<6g} {cell.labels:>4} labels {cell.arm:<14}  held out {known[rate]:.1f}", flush=True)
    best = max(rates, key=known.get) if known else rates[0]
    if unknown and best in (min(rates), max(rates)):
        print(f"the {'largest' if best == max(rates) else 'smallest'} of LEARNING_RATE is best there: one beyond it may be "
              "better", flush=True)
    return best


def held_out_accuracy(task: Task, cell: Cell, rate: float) -> float:
    """Accuracy on fifths of the subset, each held out from a training of its own: as many as hold HELD_OUT images."""
    train, seed, subset = task.train, cell.seed, subset_of(task, cell)
    (encoder, feature_dim), right = build_arm(task, cell.arm, seed), []
    for fit, held_out in fifths(train.labels[subset], seed)[:math.ceil(5 * HELD_OUT / len(subset))]:
        network = fine_tune(task, copy.deepcopy(encoder), feature_dim, subset[fit], seed, rate,
                            f"{cell.labels} labels, {cell.arm}, rate {rate:g}")
        scores = features_of(task, network, fetch(train.pixels, subset[held_out], train.pixels.device))
        right.append(scores.argmax(dim=1) == train.labels[subset[held_out]])
    return percent(torch.cat(right))


def fifths(labels: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Five ways to hold out a fifth, with a fifth of each class: the indices [N] of four fifths, and of the other one."""
    mixed = torch.randperm(len(labels), generator=seeded_generator(seed, "held out"))
    mixed = mixed[labels[mixed].argsort(stable=True)]
    fifth = torch.arange(len(mixed)) % 5
    return [(mixed[fifth != i], mixed[fifth == i]) for i in range(5)]


def reestimate_batchnorm(encoder: nn.Module, pixels: Tensor, device: torch.device, precision: torch.dtype,
                         batch_size: int = 256) -> None:
    """Give the encoder's BatchNorm the mean statistics of batches of these images, uint8 [N,3,S,S]; no weight moves.

    What any pass through the network in train mode does by itself: a gain that this has, too, is not BYOL's.
    """
    order = torch.randperm(len(pixels), generator=seeded_generator(0, "BatchNorm"))  # a folder's come class by class
    whole = order.split(batch_size)[:max(1, len(pixels) // batch_size)]  # the remainder would weigh as much as a batch
    with autocast(device, precision):
        update_bn((network_input(fetch(pixels, index, device)) for index in whole), encoder)


def affordable(budgets: tuple[int | str, ...], train: Split) -> list[int | str]:
    """The budgets that every class can pay; the others are named. Raises UsageError where none is left."""
    fewest, name = min((int((train.labels == k).sum()), name) for k, name in enumerate(train.classes))
    possible = [b for b in budgets if b in ("all", FOLD) or b <= fewest]
    if len(possible) < len(budgets):
        left_out = ",".join(str(b) for b in budgets if b not in possible)
        message = f"LABELS_PER_CLASS {left_out}: class {name!r} has only {fewest} training images"
        if not possible:
            raise UsageError(f"{message}: lower it ({flag('LABELS_PER_CLASS')})")
        print(f"{message}; left out")
    return possible


def draw_subset(labels: Tensor, per_class: int | str, seed: int) -> Tensor:
    """Indices of `per_class` images of each class; a seed's smaller subsets lie in its larger ones."""
    if per_class == "all":
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=seeded_generator(seed, "labels"))
    return torch.cat([order[labels[order] == k][:per_class] for k in labels.unique()])


def images_per_class(labels: int | str, train: Split) -> float:
    """Images of each class that a budget pays, on average."""
    return {"all": len(train.labels), FOLD: 1000}[labels] / len(train.classes) if isinstance(labels, str) else labels


def effort(cell: Cell, train: Split) -> tuple[float, int]:
    """What decides whose network is kept: the labelled images, then the epochs."""
    return images_per_class(cell.labels, train), cell.epochs


def adopt_runs(c: SimpleNamespace) -> list[Path]:
    """Set `c`'s dataset, encoder, init and image size to those of the pretraining runs; returns their encoder.pt files.

    Empty where there is no such run. Raises UsageError for a flag that contradicts a run's config.json, and for runs
    that differ in more than their SEED.
    """
    configs = [run_folder(name) / "config.json" for name in c.RUN.split(",")]
    if len(configs) == 1 and not configs[0].exists():
        return []
    for config in configs:
        if not config.exists():
            raise UserError(f"RUN {c.RUN}: there is no {config}: pretrain that run first")
    runs = [read_json(config, "constants")["constants"] for config in configs]
    for config, of_run in zip(configs, runs):
        for name in OF_THE_RUN:
            if name in c.given and getattr(c, name) != of_run[name]:
                raise UsageError(f"{flag(name)} {getattr(c, name)} contradicts {config}, which says {of_run[name]}: "
                                 "leave the flag out, or pretrain a run with it")
            setattr(c, name, of_run[name])
        if of_run.get("INIT_SHA256", now := digest_of_file(c.INIT)) != now:
            raise UserError(f"INIT {c.INIT} is not the file that {config} began with: bring that one back")
        differ = [f"{name} {runs[0][name]} and {of_run[name]}" for name in runs[0].keys() & of_run.keys() - MAY_DIFFER
                  if runs[0][name] != of_run[name]]
        if differ:
            raise UsageError(f"RUN {c.RUN}: {configs[0]} and {config} differ in {', '.join(sorted(differ))}; runs that "
                             "are compared together differ in SEED alone")
        if not config.with_name("encoder.pt").exists():
            raise UserError(f"{config.parent} has no encoder.pt yet: its train_byol.py command, run again, finishes "
                            "the pretraining")
    if len({of_run["SEED"] for of_run in runs}) < len(runs):
        raise UsageError(f"RUN {c.RUN}: two of these runs have the same SEED, and so are one")
    return [config.with_name("encoder.pt") for config in configs]


def open_results(path: Path, c: SimpleNamespace, where: dict, inputs: dict[str, str]) -> dict:
    """Results so far: a comparison goes on at the first seed, arm or budget that is missing.

    inputs: digests of what the results depend on, by name. Raises UserError where results are there of others, or of
    another version.
    """
    if c.overwrite or not path.exists():
        return {"version": RESULTS_VERSION, "constants": constants_of(c), "environment": where, "inputs": inputs,
                "trials": [], "records": []}
    results = read_json(path, "inputs")
    if results.get("version") != RESULTS_VERSION:
        raise UserError(f"{path} is of another version of this code, which measures otherwise: use --overwrite to "
                        "compare anew")
    for name in results["inputs"].keys() & inputs.keys():  # BYOL's arm may be new
        if results["inputs"][name] != inputs[name]:
            raise UserError(f"{path} was measured with another {name}: use --overwrite to compare anew")
    same_constants(results["constants"] | {"precision": results["environment"]["precision"]},
                   constants_of(c) | {"precision": where["precision"]}, path, FREE)
    return results | {"constants": constants_of(c), "inputs": inputs}


def pack(right: Tensor) -> str:
    """bool [N] as text: a bit an image, in base64."""
    return base64.b64encode(np.packbits(right.numpy())).decode()


def unpack(text: str, n: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n)).bool()


def answers_of(records: list[dict], protocol: str, n: int) -> Tensor:
    """Which of the `n` test images a protocol got right, a row for each record: [R,N], 0 or 1."""
    return torch.stack([unpack(record["right"][protocol], n) for record in records]).double()


def fine_tune(task: Task, encoder: nn.Module, feature_dim: int, subset: Tensor, seed: int, rate: float,
              title: str = "") -> nn.Module:
    """Train encoder and a new head on the images `subset`; returns the network, with the head as its `fc`.

    It is the task's trainee, and so changes with the next training. The head, the order and the crops come from the seed
    alone, so two encoders meet the same ones. The number of steps is that of EPOCHS passes over all training images,
    whatever the subset. Raises Stopped when a signal asks for it.
    The head learns behind a BatchNorm without weights, as a linear probe does in He et al. 2022 (MAE, appendix A.1),
    for features that nobody trained with labels are ill scaled. In the end it is folded into the head.
    """
    c, train, device = task.c, task.train, task.device
    with seeded_init(seed, "head"):
        norm, head = nn.BatchNorm1d(feature_dim, affine=False), nn.Linear(feature_dim, len(train.classes))
    encoder.fc = nn.Sequential(norm, head)
    network = task.trainee.become(encoder.to(device, memory_format=torch.channels_last))
    batch_size = min(c.BATCH_SIZE, len(subset))
    crop, forward = crops, network
    if batch_size == c.BATCH_SIZE:  # each other size would have to be recorded, too
        crop, forward = task.trainee.crops, task.trainee.forward
    steps_per_epoch = len(train.labels) // c.BATCH_SIZE  # the remainder is dropped
    total_steps, warmup_steps = c.EPOCHS * steps_per_epoch, warmup_of(c, steps_per_epoch)
    peak = rate * batch_size / 256
    optimizer = build_optimizer(network, c.OPTIMIZER, peak, c.WEIGHT_DECAY, "fc", c.HEAD_RATE)
    order = batch_indices(seed, "fine-tuning order", len(subset), batch_size, 0, total_steps)
    began = told = time.monotonic()
    with progress((subset[index] for index in order), total=total_steps, desc=title, unit="step") as bar:
        for step, index in enumerate(bar):
            images = fetch(train.pixels, index, device)
            draws = torch.rand(batch_size, CROP_DRAWS, generator=seeded_generator(seed, "fine-tuning crops", step))
            x = crop(images, send(draws, device), c.CROP_AREA)
            x = x.contiguous(memory_format=torch.channels_last)  # a copy: what is replayed writes where it did before
            with autocast(device, task.precision):
                scores = forward(x)
            loss = F.cross_entropy(scores.float(), send(train.labels[index], device))
            take_step(optimizer, loss, learning_rate(step, total_steps, warmup_steps, peak))
            if bar.disable and (now := time.monotonic()) - told > 60:  # where no terminal shows it, a line now and then
                told, left = now, (now - began) / (step + 1) * (total_steps - step - 1) / 60
                print(f"{title}: step {step + 1:,} of {total_steps:,}  {left:.0f} min left", flush=True)
            if task.signals:
                raise Stopped("stopped: the results so far are kept, and the same command continues from there",
                              task.signals[0])
    norm, head = network.fc
    network.fc = fold_standardisation(head, norm.running_mean, (norm.running_var + norm.eps).sqrt())
    return network


def crops(images: Tensor, draws: Tensor, min_area: float) -> Tensor:
    """Random resized crops of uint8 images [N,3,S,S], as large as they are and normalised; draws: [N,CROP_DRAWS]."""
    size = images.shape[-1]
    return normalize(crop_resize(images, *crop_of(draws, size, size, min_area), size))


def linear_probe(features: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[nn.Module, float]:
    """Multinomial logistic regression on frozen features [N,D], and its L2 penalty.

    The penalty is the best of PROBE_PENALTIES on all fifths, each held out in turn (one alone is too few images to
    choose by); then all images are used.
    """
    folds = fifths(labels, seed)

    def right_answers(penalty):
        return sum((fit_logistic(features[fit], labels[fit], classes, penalty)(features[held_out]).argmax(dim=1)
                    == labels[held_out]).sum().item() for fit, held_out in folds)

    penalty = max(reversed(PROBE_PENALTIES), key=right_answers)  # of equals the strongest
    return fit_logistic(features, labels, classes, penalty), penalty


def summarize(cells: dict[Cell, dict], labels: int | str, c: SimpleNamespace, arms: list[str], n: int) -> dict:
    """protocol -> arm -> accuracies in percent, one a seed, at one budget; also BYOL's `gain` over the baseline, seed
    by seed, and its `interval`: mean, and half of the 95% interval over seeds and the `n` test images."""
    of = {arm: [cells[Cell(seed, arm, labels, c.EPOCHS)] for seed in c.SEEDS] for arm in arms}
    summary = {protocol: {arm: [record[protocol] for record in of[arm]] for arm in arms} for protocol in PROTOCOLS}
    if WITH_BYOL in arms:
        runs = c.RUN.count(",") + 1
        for protocol, by_arm in summary.items():
            gains = answers_of(of[WITH_BYOL], protocol, n) - answers_of(of[BASELINE], protocol, n)
            if runs > 1:  # seeds that share a run are no independent repetitions
                gains = torch.stack([gains[[seed % runs == i for seed in c.SEEDS]].mean(dim=0) for i in range(runs)])
            by_arm |= {"gain": [b - a for a, b in zip(by_arm[BASELINE], by_arm[WITH_BYOL])], "interval": gain_of(gains)}
    return summary


def report(task: Task, folder: Path, results: dict, cells: dict[Cell, dict], arms: list[str],
           budgets: list[int | str]) -> None:
    """The table, its numbers in results.json, and the figures, all from the records."""
    c, test = task.c, task.test
    summary = {str(labels): summarize(cells, labels, c, arms, len(test.labels)) for labels in budgets}
    write_json(folder / "results.json", results | {"classes": test.classes, "summary": summary})
    print_table(summary, arms, c)
    print_classes(cells, test, arms, budgets[-1], c)
    plot_comparison(folder / "comparison.png", summary[str(budgets[-1])], PROTOCOLS, arms,
                    label_text(budgets[-1]) + "\n" + caption(c))
    if len(budgets) > 1:
        sizes = [images_per_class(labels, task.train) for labels in budgets]
        panels = {protocol: {arm: [summary[str(labels)][protocol][arm] for labels in budgets] for arm in arms}
                  for protocol in PROTOCOLS}
        plot_lines(folder / "label_efficiency.png", panels, sizes, "labelled images a class", caption(c))
    lengths = [epochs for epochs in sorted({cell.epochs for cell in cells})
               if all(Cell(*rest, epochs) in cells for rest in product(c.SEEDS, arms, budgets))]
    if len(lengths) > 1:
        panels = {label_text(labels): {arm: [[cells[Cell(seed, arm, labels, epochs)]["fine-tuning"] for seed in c.SEEDS]
                                             for epochs in lengths] for arm in arms} for labels in budgets}
        steps = [epochs * (len(task.train.labels) // c.BATCH_SIZE) for epochs in lengths]
        plot_lines(folder / "steps.png", panels, steps, "fine-tuning steps", caption(c, lengths))
    if task.encoders:
        seed = c.SEEDS[0]
        shown = [(arm, frozen_features(task, arm, seed, build_arm(task, arm, seed)[0])[1])
                 for arm in (BASELINE, WITH_BYOL)]
        plot_neighbors(folder / "neighbors.png", test, shown, seeded_generator(c.SEEDS[0], "queries"), c.RUN)


def mean_std(values: list[float]) -> str:
    """'48.5 ± 1.2', mean and standard deviation, or the value alone where there is but one."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def print_table(summary: dict, arms: list[str], c: SimpleNamespace) -> None:
    def row(labels: int | str, name: str, texts: list[str]) -> None:
        print(f"{labels:>6}  {name:<17}" + "".join(text.rjust(17) for text in texts))

    print()
    row("labels", "test accuracy (%)", PROTOCOLS)
    for labels, by_protocol in summary.items():
        for arm in arms:
            row(labels, arm, [mean_std(by_arm[arm]) for by_arm in by_protocol.values()])
        if WITH_BYOL in arms:
            intervals = [by_arm["interval"] for by_arm in by_protocol.values()]
            row(labels, "gain", [f"{gain:+.1f} ± {half:.1f}" for gain, half in intervals])
            row("", "", [verdict_of(*interval) for interval in intervals])
    print("\n" + caption(c))
    if WITH_BYOL in arms:
        covered = "runs, seeds and" if "," in c.RUN else "seeds and" if len(c.SEEDS) > 1 else "the"
        print(f"gain: ± half of its 95% interval over {covered} test images")


def print_classes(cells: dict[Cell, dict], test: Split, arms: list[str], labels: int | str, c: SimpleNamespace) -> None:
    """Accuracy of each class after fine-tuning, mean over the seeds, where the classes fit a screen."""
    if len(test.classes) > 20:
        return
    of = [[cells[Cell(seed, arm, labels, c.EPOCHS)] for seed in c.SEEDS] for arm in arms]
    right = [answers_of(records, "fine-tuning", len(test.labels)).mean(dim=0) for records in of]
    print(f"\n{label_text(labels)}, fine-tuned, by class\n{'':20}" + "".join(arm.rjust(15) for arm in arms))
    for k, name in enumerate(test.classes):
        print(f"{name[:19]:<20}" + "".join(f"{100 * of_arm[test.labels == k].mean():15.1f}" for of_arm in right))


def label_text(labels: int | str) -> str:
    return {"all": "all labels", FOLD: "folds of 1,000 labels"}.get(labels, f"{labels} labels a class")


def caption(c: SimpleNamespace, lengths: Sequence[int] = ()) -> str:
    """What the numbers are, for table and figures, in lines of at most 80 characters. lengths: all that are shown."""
    epochs = ", ".join(map(str, lengths or [c.EPOCHS]))
    seeds, runs = ", ".join(map(str, c.SEEDS)), c.RUN.count(",") + 1
    spread = (f"mean ± std over {'folds' if c.FOLDS else 'seeds'} {seeds}: labelled subset, head, random weights"
              if len(c.SEEDS) > 1 else f"seed {seeds}")
    data = Path(c.DATASET).resolve().name  # a folder's name says enough, and a path may be long
    return (f"{c.RUN}: {data} at {c.IMAGE_SIZE} px, {c.ENCODER} from {Path(c.INIT).name} weights\n"
            f"{textwrap.fill(spread, 80)}\n"
            f"{'one pretraining run' if runs == 1 else f'{runs} pretraining runs, in turn'}; fine-tuned for {epochs} "
            "epochs, the last one reported")


def check_constants(c: SimpleNamespace) -> None:
    make_tuples(c, "LEARNING_RATE", "SEEDS", "LABELS_PER_CLASS")
    check_training(c, HEAD_RATE=(0, math.inf))
    if len(set(c.SEEDS)) != len(c.SEEDS) or not c.SEEDS:
        raise UsageError(f"SEEDS {','.join(map(str, c.SEEDS))} repeats a seed or is empty")
    budgets = c.LABELS_PER_CLASS
    if len(set(budgets)) != len(budgets) or not all(b == "all" or isinstance(b, int) and b > 0 for b in budgets):
        raise UsageError(f"LABELS_PER_CLASS {','.join(map(str, budgets))} must be different positive numbers or 'all' "
                         f"({flag('LABELS_PER_CLASS')})")
    if 1 in budgets and len(c.LEARNING_RATE) > 1:
        raise UsageError("LABELS_PER_CLASS 1 leaves no image to choose a rate by: give one LEARNING_RATE")
    if c.FOLDS and not set(c.SEEDS) <= set(range(10)):
        raise UsageError(f"SEEDS {','.join(map(str, c.SEEDS))}: of STL-10's folds there are those from 0 to 9")
    if c.FOLDS and c.DATASET != "stl10":
        raise UsageError(f"FOLDS are STL-10's, and DATASET is {c.DATASET!r}: leave --folds out")


def main(argv: list[str] | None = None) -> int:
    return run_script(globals(), argv)


if __name__ == "__main__":
    sys.exit(main())
