"""Measure what BYOL gained: one network, trained twice on the labelled images, without BYOL and with it.

    python train_classifier.py --demo            after train_byol.py --demo
    python train_classifier.py                   after train_byol.py
    python train_classifier.py --run NAME        after train_byol.py --run NAME

Both arms share the head's first weights, the order of the batches, the crops and the number of steps; they differ in
the encoder they start from. Dataset, encoder, init and image size are those of the run. Reported is the accuracy on
the test images after the last epoch, never the best one.
"""
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol import crop_resize, draw_crop, learning_rate, normalize
from data import Split, fetch, load_split, place
from plots import plot_comparison
from runs import only_writer, read_json, run_folder, same_constants, save_torch, stop_signals, write_json
from utils import (DEMO, Stopped, UsageError, UserError, accuracy, autocast, build_encoder, build_optimizer,
                   check_choice, check_ranges, constants_of, environment, extract_features, flag, knn_predict,
                   load_encoder, plain_state_dict, progress, read_weights, run_script, seeded_generator, seeded_init,
                   select_device, select_precision, set_rate)

# What to compare; the four after RUN are taken from the run where it exists
RUN = "byol"  # the pretraining run in runs/ whose encoder.pt is compared; results go there too
DATASET = "stl10"  # stl10, patterns, or a folder with train/<class>/ and test/<class>/
IMAGE_SIZE = 96  # pixels a side
ENCODER = "resnet18"  # any torchvision ResNet by name
INIT = "imagenet"  # what "without BYOL" starts from: imagenet, random, or a file with a state dict
# Fine-tuning
SEEDS = (0, 1, 2)  # one training each; a seed decides the head, the order, the crops and random weights
EPOCHS = 10  # passes over the labelled training images
BATCH_SIZE = 64  # images a step
OPTIMIZER = "sgd"  # sgd (momentum 0.9) or adamw
LEARNING_RATE = 0.04  # peak rate per 256 images: a step uses this times BATCH_SIZE / 256
WEIGHT_DECAY = 5e-4  # of matrices and convolutions; BatchNorm and biases get none
WARMUP_EPOCHS = 1.0  # linear rise of the rate, at most half of the training; then a cosine to zero
CROP_AREA = 0.3  # smallest share of an image that a training crop shows
# The machine
DATA_ROOT = "data"  # where STL-10 and the caches of decoded folders live
DEVICE = "auto"  # auto is cuda, then mps, then cpu
PRECISION = "auto"  # bf16, fp32, or auto: bf16 where the hardware has it

DEMO = DEMO | dict(EPOCHS=15, BATCH_SIZE=50, OPTIMIZER="adamw", LEARNING_RATE=1e-2)
FREE = {"RUN", "DATA_ROOT", "DEVICE"}  # may change between a comparison and its continuation
OF_THE_RUN = ("DATASET", "IMAGE_SIZE", "ENCODER", "INIT")
PROTOCOLS = ("fine-tuning", "linear probe", "kNN")
BASELINE, WITH_BYOL = "without BYOL", "with BYOL"
PROBE_PENALTIES = tuple(10.0 ** e for e in range(-6, 2))  # L2 penalties that the linear probe chooses from


def run(c: SimpleNamespace) -> None:
    """Compare both arms with the constants `c`; each run's folder has one writer."""
    folder = run_folder(c.RUN)
    pretrained = adopt_run(c, folder)
    check_constants(c)
    with only_writer(folder):
        compare(c, folder, pretrained)


def compare(c: SimpleNamespace, folder: Path, pretrained: Path | None) -> None:
    """Train what is missing of every seed and arm; leaves a table, results.json, comparison.png and classifier.pt."""
    device = select_device(c.DEVICE)
    precision = select_precision(c.PRECISION, device)
    train, test = (load_split(c.DATASET, split, c.DATA_ROOT, c.IMAGE_SIZE) for split in ("train", "test"))
    for name, split in (("train", train), ("test", test)):
        if split is None:
            raise UserError(f"DATASET {c.DATASET!r} has no {name}/: the classifier needs {name}/<class>/ with images")
    train, test = (split._replace(pixels=place(split.pixels, device)) for split in (train, test))
    if c.BATCH_SIZE > len(train.labels):
        raise UsageError(f"BATCH_SIZE is {c.BATCH_SIZE}, but there are only {len(train.labels)} training images: lower it")
    results = open_results(folder / "results.json", c, environment(device, precision))
    arms = [BASELINE] + ([WITH_BYOL] if pretrained else [])
    print(f"{c.ENCODER} from {c.INIT} weights, {c.DATASET} at {c.IMAGE_SIZE} px: {len(train.labels):,} training and "
          f"{len(test.labels):,} test images of {len(train.classes)} classes, on {device} in "
          f"{str(precision).removeprefix('torch.')}")

    with stop_signals() as signals:
        for seed in c.SEEDS:
            for arm in arms:
                if any(r["arm"] == arm and r["seed"] == seed for r in results["records"]):
                    continue
                encoder, feature_dim = build_encoder(c.ENCODER, c.INIT, seed)
                if arm == WITH_BYOL:
                    load_encoder(encoder, read_weights(pretrained), pretrained)
                encoder = encoder.to(device, memory_format=torch.channels_last)
                record = {"arm": arm, "seed": seed} | evaluate_frozen(encoder, train, test, seed, device, precision)
                network = fine_tune(encoder, feature_dim, train, seed, c, device, precision, signals,
                                    f"{arm}, seed {seed}")
                predicted = extract_features(network, test.pixels, device, precision).argmax(dim=1).cpu()
                record["fine-tuning"] = accuracy(predicted, test.labels)
                if arm == arms[-1] and seed == c.SEEDS[0]:
                    save_torch(folder / "classifier.pt", plain_state_dict(network))
                results["records"].append(record)
                write_json(folder / "results.json", results)
                print(f"seed {seed}, {arm:<12}  " + "  ".join(f"{name} {record[name]:.1f}%" for name in PROTOCOLS),
                      flush=True)

    results["classes"] = train.classes
    results["summary"] = {p: summarize(results["records"], p, c.SEEDS, arms) for p in PROTOCOLS}
    write_json(folder / "results.json", results)
    print_table(results["summary"], arms, c)
    plot_comparison(folder / "comparison.png", {p: {arm: results["summary"][p][arm] for arm in arms} for p in PROTOCOLS},
                    caption(c))
    if not pretrained:
        same = [f"{flag(name)} {getattr(c, name)}" for name in ("RUN", *OF_THE_RUN) if name in c.given]
        print(f"\nThis is the half without BYOL. For the other: {' '.join(['python train_byol.py', *['--demo'] * c.demo, *same])}"
              ", then this command again.")


def adopt_run(c: SimpleNamespace, folder: Path) -> Path | None:
    """Set `c`'s dataset, encoder, init and image size to those of the pretraining run; returns its encoder.pt.

    None where there is no such run. Raises UsageError for a flag that contradicts the run's config.json.
    """
    config = folder / "config.json"
    if not config.exists():
        return None
    of_run = read_json(config, "constants")["constants"]
    for name in OF_THE_RUN:
        if name in c.given and getattr(c, name) != of_run[name]:
            raise UsageError(f"{flag(name)} {getattr(c, name)} contradicts {config}, which says {of_run[name]}: leave the "
                             "flag out, or pretrain a run with it")
        setattr(c, name, of_run[name])
    if not (folder / "encoder.pt").exists():
        raise UserError(f"{folder} has no encoder.pt yet: its train_byol.py command, run again, finishes the pretraining")
    return folder / "encoder.pt"


def open_results(path: Path, c: SimpleNamespace, where: dict) -> dict:
    """Results so far: a comparison that was interrupted goes on at the first arm and seed that is missing."""
    if c.overwrite or not path.exists():
        return {"constants": constants_of(c), "environment": where, "records": []}
    results = read_json(path, "records")
    same_constants(results["constants"], constants_of(c), path, FREE)
    return results


def fine_tune(encoder: nn.Module, feature_dim: int, train: Split, seed: int, c: SimpleNamespace, device: torch.device,
              precision: torch.dtype, signals: list[int] = (), title: str = "") -> nn.Module:
    """Train encoder and a new head on the labelled images; returns the encoder with the head as its `fc`.

    The head, the order and the crops come from the seed alone, so two encoders meet the same ones. Raises Stopped
    when `signals` holds one.
    """
    with seeded_init(seed, "head"):
        encoder.fc = nn.Linear(feature_dim, len(train.classes))
    network = encoder.to(device, memory_format=torch.channels_last).train()
    n, size, batch_size = len(train.labels), train.pixels.shape[-1], c.BATCH_SIZE
    steps_per_epoch = n // batch_size  # the remainder is dropped
    total_steps = c.EPOCHS * steps_per_epoch
    warmup_steps = min(round(c.WARMUP_EPOCHS * steps_per_epoch), total_steps // 2)
    peak = c.LEARNING_RATE * batch_size / 256
    optimizer = build_optimizer(network, c.OPTIMIZER, peak, c.WEIGHT_DECAY)
    labels = train.labels.to(device)
    with progress(total=total_steps, desc=title, unit="step") as bar:
        for step in range(total_steps):
            epoch, batch = divmod(step, steps_per_epoch)
            if batch == 0:
                order = torch.randperm(n, generator=seeded_generator(seed, "fine-tuning order", epoch))
            index = order[batch * batch_size:(batch + 1) * batch_size]
            images = fetch(train.pixels, index, device)
            generator = seeded_generator(seed, "fine-tuning crops", step)
            box, flipped = (field.to(device) for field in draw_crop(batch_size, size, size, generator, c.CROP_AREA))
            x = normalize(crop_resize(images, box, flipped, size)).contiguous(memory_format=torch.channels_last)
            set_rate(optimizer, learning_rate(step, total_steps, warmup_steps, peak))
            with autocast(device, precision):
                scores = network(x)
            optimizer.zero_grad()
            F.cross_entropy(scores.float(), labels[index.to(device)]).backward()
            optimizer.step()
            bar.update()
            if signals:
                raise Stopped("stopped: the results so far are kept, and the same command continues at the first that is "
                              "missing", signals[0])
    return network


def evaluate_frozen(encoder: nn.Module, train: Split, test: Split, seed: int, device: torch.device,
                    precision: torch.dtype) -> dict[str, float]:
    """Test accuracy in percent of a linear probe and of kNN on the encoder's features; the encoder stays as it is."""
    features, queries = (extract_features(encoder, split.pixels, device, precision).cpu() for split in (train, test))
    probe, penalty = linear_probe(features, train.labels, len(train.classes), seed)
    return {"linear probe": accuracy(probe(queries).argmax(dim=1), test.labels), "probe penalty": penalty,
            "kNN": accuracy(knn_predict(features, train.labels, queries, len(train.classes)), test.labels)}


def linear_probe(features: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[nn.Module, float]:
    """Multinomial logistic regression on frozen features [N,D], and its L2 penalty.

    The penalty is the best of PROBE_PENALTIES on a held-out fifth of the training images; then all of them are used.
    """
    order = torch.randperm(len(labels), generator=seeded_generator(seed, "probe"))
    fit, held_out = order.tensor_split([int(0.8 * len(order))])

    def score(penalty):
        probe = fit_logistic(features[fit], labels[fit], classes, penalty)
        return accuracy(probe(features[held_out]).argmax(dim=1), labels[held_out])

    penalty = max(reversed(PROBE_PENALTIES), key=score)  # of equals the strongest
    return fit_logistic(features, labels, classes, penalty), penalty


def fit_logistic(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Module:
    """Minimise cross-entropy + penalty / 2 * |W|^2 over standardised features by L-BFGS; the bias is free."""
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x = (features - mean) / std
    head = nn.utils.skip_init(nn.Linear, features.shape[1], classes)  # no draw: it starts at 0
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + penalty / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():  # fold the standardisation into the weights
        head.weight /= std
        head.bias -= head.weight @ mean
    return head.requires_grad_(False)


def summarize(records: list[dict], protocol: str, seeds: tuple[int, ...], arms: list[str]) -> dict:
    """Accuracies in percent by arm, one a seed, and the gain of each seed."""
    by_arm = {arm: [r[protocol] for seed in seeds for r in records if (r["arm"], r["seed"]) == (arm, seed)] for arm in arms}
    if WITH_BYOL in by_arm:
        by_arm["gain"] = [after - before for before, after in zip(by_arm[BASELINE], by_arm[WITH_BYOL])]
    return by_arm


def mean_std(values: list[float], form: str = ".1f") -> str:
    """'48.5 ± 1.2', or the value alone where there is but one."""
    return f"{mean(values):{form}}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def print_table(summary: dict, arms: list[str], c: SimpleNamespace) -> None:
    columns = arms + (["gain"] if WITH_BYOL in arms else [])
    print("\n" + "test accuracy (%)".ljust(18) + "".join(column.rjust(16) for column in columns))
    for protocol, by_arm in summary.items():
        print(protocol.ljust(18) + "".join(mean_std(by_arm[column], "+.1f" if column == "gain" else ".1f").rjust(16)
                                           for column in columns))
    print("\n" + caption(c))


def caption(c: SimpleNamespace) -> str:
    """What the numbers are, for table and figure, in lines of at most 80 characters."""
    spread = f"mean ± std over seeds {', '.join(map(str, c.SEEDS))}" if len(c.SEEDS) > 1 else f"seed {c.SEEDS[0]}"
    return f"{c.RUN}: {c.DATASET} at {c.IMAGE_SIZE} px, {c.ENCODER} from {c.INIT} weights\n{spread}, last epoch of {c.EPOCHS}"


def check_constants(c: SimpleNamespace) -> None:
    check_ranges(c, IMAGE_SIZE=(16, math.inf), EPOCHS=(1, math.inf), BATCH_SIZE=(2, math.inf),
                 LEARNING_RATE=(0, math.inf), WEIGHT_DECAY=(0, math.inf), WARMUP_EPOCHS=(0, math.inf), CROP_AREA=(0.01, 1))
    check_choice("OPTIMIZER", c.OPTIMIZER, ["sgd", "adamw"])
    check_choice("PRECISION", c.PRECISION, ["auto", "bf16", "fp32"])
    if len(set(c.SEEDS)) != len(c.SEEDS) or not c.SEEDS:
        raise UsageError(f"SEEDS {','.join(map(str, c.SEEDS))} repeats a seed or is empty")


def main(argv: list[str] | None = None) -> int:
    return run_script(globals(), argv)


if __name__ == "__main__":
    sys.exit(main())
