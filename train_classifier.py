"""Measure what BYOL gained: one network, trained on few and on many labelled images, without BYOL and with it.

    python train_classifier.py --demo            after train_byol.py --demo
    python train_classifier.py                   after train_byol.py
    python train_classifier.py --run NAME        after train_byol.py --run NAME
    python train_classifier.py --folds           STL-10's own protocol: its ten folds of 1,000 labelled images

Both arms share the head's first weights, the order of the batches, the crops and the number of steps; they differ in
the encoder they start from. Where that began with ImageNet weights or a file's, two more arms show what BYOL is to be
measured against: random weights, and those weights with nothing new but the BatchNorm statistics of these images. Dataset,
encoder, init and image size are those of the run. Reported is the accuracy on the test images after the last epoch, never
the best one.
"""
import copy
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol import CROP_DRAWS, crop_of, crop_resize, learning_rate, normalize, send
from data import Split, fetch, load_folds, load_split, place
from plots import plot_comparison, plot_label_efficiency, plot_neighbors
from runs import only_writer, read_json, run_folder, same_constants, save_torch, stop_signals, write_json
from utils import (DEMO, Stopped, UsageError, UserError, accuracy, autocast, build_encoder, build_optimizer,
                   check_choice, check_ranges, choose_threads, constants_of, environment, extract_features, flag,
                   knn_predict, load_encoder, plain_state_dict, progress, read_weights, run_script, seeded_generator,
                   seeded_init, select_device, select_precision, set_rate)

# What to compare; the four after RUN are taken from the run where it exists
RUN = "byol"  # the pretraining run in runs/ whose encoder.pt is compared; results go there too
DATASET = "stl10"  # stl10, patterns, or a folder with train/<class>/ and test/<class>/
IMAGE_SIZE = 96  # pixels a side
ENCODER = "resnet18"  # any torchvision ResNet by name
INIT = "imagenet"  # what "without BYOL" starts from: imagenet, random, or a file with a state dict
LABELS_PER_CLASS = (10, 50, "all")  # budgets to learn from: labelled training images of each class, or all
SEEDS = (0, 1, 2)  # one training each; a seed decides the labelled subset, the head, the crops and random weights
FOLDS = False  # learn from STL-10's ten predefined folds of 1,000 images, one a seed, instead
# Fine-tuning
EPOCHS = 10  # passes over all labelled training images; a smaller budget takes as many steps
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

DEMO = DEMO | dict(LABELS_PER_CLASS=(5, "all"), EPOCHS=7, BATCH_SIZE=25, OPTIMIZER="adamw", LEARNING_RATE=1e-2)
FREE = {"RUN", "DATA_ROOT", "DEVICE", "SEEDS", "LABELS_PER_CLASS", "FOLDS"}  # may change when a comparison goes on
OF_THE_RUN = ("DATASET", "IMAGE_SIZE", "ENCODER", "INIT")
PROTOCOLS = ("fine-tuning", "linear probe", "kNN")
RANDOM, BASELINE, BATCHNORM, WITH_BYOL = "random weights", "without BYOL", "BatchNorm only", "with BYOL"
FOLD = "fold"  # the budget of one of STL-10's folds
PROBE_PENALTIES = tuple(10.0 ** e for e in range(-6, 2))  # L2 penalties that the linear probe chooses from


def run(c: SimpleNamespace) -> None:
    """Compare the arms with the constants `c`; each run's folder has one writer."""
    folder = run_folder(c.RUN)
    pretrained = adopt_run(c, folder)
    check_constants(c)
    if c.FOLDS:
        c.SEEDS, c.LABELS_PER_CLASS = tuple(range(10)), (FOLD,)
    with only_writer(folder):
        compare(c, folder, pretrained)


def compare(c: SimpleNamespace, folder: Path, pretrained: Path | None) -> None:
    """Train what is missing of every seed, arm and budget; leaves the table, results.json, classifier.pt, figures."""
    device = select_device(c.DEVICE)
    precision = select_precision(c.PRECISION, device)
    threads = choose_threads(device)
    train, test = (load_split(c.DATASET, split, c.DATA_ROOT, c.IMAGE_SIZE) for split in ("train", "test"))
    for name, split in (("train", train), ("test", test)):
        if split is None:
            raise UserError(f"DATASET {c.DATASET!r} has no {name}/: the classifier needs {name}/<class>/ with images")
    train, test = (split._replace(pixels=place(split.pixels, device)) for split in (train, test))
    if c.BATCH_SIZE > len(train.labels):
        raise UsageError(f"BATCH_SIZE is {c.BATCH_SIZE}, but there are only {len(train.labels)} training images: lower it")
    folds = load_folds(c.DATA_ROOT, len(train.labels)) if c.FOLDS else []
    budgets = affordable(c.LABELS_PER_CLASS, train)
    results = open_results(folder / "results.json", c, environment(device, precision))
    records = results["records"]
    arms = [BASELINE] if c.INIT == "random" else [RANDOM, BASELINE, BATCHNORM]
    arms += [WITH_BYOL] * (pretrained is not None)
    features = {}  # of arm and seed; an encoder that no seed changes is asked once

    def features_of(arm: str, seed: int, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        varies = arm == RANDOM or arm == BASELINE and c.INIT == "random"
        key = arm, seed if varies else c.SEEDS[0]
        if key not in features:
            features[key] = tuple(extract_features(encoder, split.pixels, device, precision).cpu()
                                  for split in (train, test))
        return features[key]

    print(f"{c.DATASET}: {len(train.labels):,} training and {len(test.labels):,} test images of {len(train.classes)} "
          f"classes\n{c.ENCODER} from {c.INIT} weights at {c.IMAGE_SIZE} px, on {device} in "
          f"{str(precision).removeprefix('torch.')}{threads}", flush=True)

    with stop_signals() as signals:
        for seed in c.SEEDS:
            for arm in arms:
                known = {r["labels"] for r in records if (r["arm"], r["seed"]) == (arm, seed)}
                missing = [labels for labels in budgets if labels not in known]
                if not missing:
                    continue
                encoder, feature_dim = build_arm(arm, seed, c, pretrained)
                encoder = encoder.to(device, memory_format=torch.channels_last)
                if arm == BATCHNORM:
                    reestimate_batchnorm(encoder, train.pixels, device, precision)
                train_features, test_features = features_of(arm, seed, encoder)
                for labels in missing:
                    subset = folds[seed] if labels == FOLD else draw_subset(train.labels, labels, seed)
                    network = fine_tune(copy.deepcopy(encoder), feature_dim, train, subset, seed, c, device, precision,
                                        signals, f"seed {seed}, {labels} labels, {arm}")
                    bank, bank_labels = train_features[subset], train.labels[subset]
                    probe, penalty = linear_probe(bank, bank_labels, len(train.classes), seed)
                    record = {"arm": arm, "seed": seed, "labels": labels, "probe penalty": penalty} | score({
                        "fine-tuning": extract_features(network, test.pixels, device, precision).cpu().argmax(dim=1),
                        "linear probe": probe(test_features).argmax(dim=1),
                        "kNN": knn_predict(bank, bank_labels, test_features, len(train.classes))}, test)
                    if (arm, seed, labels) == (arms[-1], c.SEEDS[0], budgets[-1]):
                        save_torch(folder / "classifier.pt", plain_state_dict(network))
                    records.append(record)
                    write_json(folder / "results.json", results)
                    print(f"seed {seed} {labels:>4} labels {arm:<14}"
                          + "".join(f"  {name} {record[name]:.1f}" for name in PROTOCOLS), flush=True)

        results |= {"classes": train.classes, "summary": {str(b): summarize(records, b, c.SEEDS, arms) for b in budgets}}
        write_json(folder / "results.json", results)
        print_table(results["summary"], arms, c)
        print_classes(records, train.classes, arms, budgets[-1], c.SEEDS)
        plot_comparison(folder / "comparison.png", results["summary"][str(budgets[-1])], PROTOCOLS, arms,
                        label_text(budgets[-1]) + "\n" + caption(c))
        if len(budgets) > 1:
            sizes = [len(train.labels) / len(train.classes) if b == "all" else b for b in budgets]
            plot_label_efficiency(folder / "label_efficiency.png", results["summary"], sizes, PROTOCOLS, arms, caption(c))
        if pretrained:
            shown = [(arm, features_of(arm, c.SEEDS[0], build_arm(arm, c.SEEDS[0], c, pretrained)[0].to(device))[1])
                     for arm in (BASELINE, WITH_BYOL)]
            plot_neighbors(folder / "neighbors.png", test, shown, seeded_generator(c.SEEDS[0], "queries"), c.RUN)
    if not pretrained:
        same = [f"{flag(name)} {getattr(c, name)}" for name in ("RUN", *OF_THE_RUN) if name in c.given]
        command = " ".join(["python train_byol.py", *["--demo"] * c.demo, *same])
        print(f"\nThis is the half without BYOL. For the other: {command}, then this command again.")


def build_arm(arm: str, seed: int, c: SimpleNamespace, pretrained: Path | None) -> tuple[nn.Module, int]:
    """The encoder that an arm starts from, and the number of its features."""
    encoder, feature_dim = build_encoder(c.ENCODER, c.INIT if arm in (BASELINE, BATCHNORM) else "random", seed)
    if arm == WITH_BYOL:
        load_encoder(encoder, read_weights(pretrained), pretrained)
    return encoder, feature_dim


@torch.no_grad()
def reestimate_batchnorm(encoder: nn.Module, pixels: Tensor, device: torch.device, precision: torch.dtype,
                         batch_size: int = 256) -> None:
    """Give the encoder's BatchNorm the mean statistics of batches of these images, uint8 [N,3,S,S]; no weight moves.

    What any pass through the network in train mode does by itself: a gain that this has, too, is not BYOL's.
    """
    layers = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches, equally weighted
    encoder.train()
    order = torch.randperm(len(pixels), generator=seeded_generator(0, "BatchNorm"))  # a folder's come class by class
    for index in order.split(batch_size)[:max(1, len(pixels) // batch_size)]:  # whole batches
        x = normalize(fetch(pixels, index, device).float() / 255).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            encoder(x)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum


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
    """Results so far: a comparison goes on at the first seed, arm or budget that is missing."""
    if c.overwrite or not path.exists():
        return {"constants": constants_of(c), "environment": where, "records": []}
    results = read_json(path, "records")
    same_constants(results["constants"] | {"precision": results["environment"]["precision"]},
                   constants_of(c) | {"precision": where["precision"]}, path, FREE)
    return results | {"constants": constants_of(c)}


def fine_tune(encoder: nn.Module, feature_dim: int, train: Split, subset: Tensor, seed: int, c: SimpleNamespace,
              device: torch.device, precision: torch.dtype, signals: list[int] = (), title: str = "") -> nn.Module:
    """Train encoder and a new head on the images `subset` of `train`; returns the encoder with the head as its `fc`.

    The head, the order and the crops come from the seed alone, so two encoders meet the same ones. The number of steps
    is that of EPOCHS passes over all of `train`, whatever the subset. Raises Stopped when `signals` holds one.
    """
    with seeded_init(seed, "head"):
        encoder.fc = nn.Linear(feature_dim, len(train.classes))
    network = encoder.to(device, memory_format=torch.channels_last).train()
    steps_per_epoch = len(train.labels) // c.BATCH_SIZE  # the remainder is dropped
    total_steps = c.EPOCHS * steps_per_epoch
    warmup_steps = min(round(c.WARMUP_EPOCHS * steps_per_epoch), total_steps // 2)
    batch_size = min(c.BATCH_SIZE, len(subset))
    steps_per_pass, size = len(subset) // batch_size, train.pixels.shape[-1]
    peak = c.LEARNING_RATE * batch_size / 256
    optimizer = build_optimizer(network, c.OPTIMIZER, peak, c.WEIGHT_DECAY)
    with progress(total=total_steps, desc=title, unit="step") as bar:
        for step in range(total_steps):
            epoch, batch = divmod(step, steps_per_pass)
            if batch == 0:
                order = subset[torch.randperm(len(subset), generator=seeded_generator(seed, "fine-tuning order", epoch))]
            index = order[batch * batch_size:(batch + 1) * batch_size]
            images = fetch(train.pixels, index, device)
            draws = torch.rand(batch_size, CROP_DRAWS, generator=seeded_generator(seed, "fine-tuning crops", step))
            box, flipped = crop_of(send(draws, device), size, size, c.CROP_AREA)
            x = normalize(crop_resize(images, box, flipped, size)).contiguous(memory_format=torch.channels_last)
            set_rate(optimizer, learning_rate(step, total_steps, warmup_steps, peak))
            with autocast(device, precision):
                scores = network(x)
            optimizer.zero_grad()
            F.cross_entropy(scores.float(), send(train.labels[index], device)).backward()
            optimizer.step()
            bar.update()
            if signals:
                raise Stopped("stopped: the results so far are kept, and the same command continues from there",
                              signals[0])
    return network


def score(predicted: dict[str, Tensor], test: Split) -> dict:
    """Test accuracy in percent of each protocol's predictions [N], and of each class by itself."""
    of_class = [test.labels == k for k in range(len(test.classes))]
    by_class = {name: [accuracy(guess[chosen], test.labels[chosen]) for chosen in of_class]
                for name, guess in predicted.items()}
    return {name: accuracy(guess, test.labels) for name, guess in predicted.items()} | {"by class": by_class}


def linear_probe(features: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[nn.Module, float]:
    """Multinomial logistic regression on frozen features [N,D], and its L2 penalty.

    The penalty is the best of PROBE_PENALTIES on a held-out fifth of the training images; then all of them are used.
    """
    order = torch.randperm(len(labels), generator=seeded_generator(seed, "probe"))
    fit, held_out = order.tensor_split([int(0.8 * len(order))])

    def held_out_accuracy(penalty):
        probe = fit_logistic(features[fit], labels[fit], classes, penalty)
        return accuracy(probe(features[held_out]).argmax(dim=1), labels[held_out])

    penalty = max(reversed(PROBE_PENALTIES), key=held_out_accuracy)  # of equals the strongest
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


def summarize(records: list[dict], labels: int | str, seeds: tuple[int, ...], arms: list[str]) -> dict:
    """protocol -> arm -> accuracies in percent, one a seed, at one budget; `gain` is BYOL's over the baseline."""
    of = {(r["arm"], r["seed"]): r for r in records if r["labels"] == labels}
    summary = {protocol: {arm: [of[arm, seed][protocol] for seed in seeds] for arm in arms} for protocol in PROTOCOLS}
    if WITH_BYOL in arms:
        for by_arm in summary.values():
            by_arm["gain"] = [after - before for before, after in zip(by_arm[BASELINE], by_arm[WITH_BYOL])]
    return summary


def mean_std(values: list[float]) -> str:
    """'48.5 ± 1.2', mean and standard deviation, or the value alone where there is but one."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def mean_error(gains: list[float]) -> str:
    """'+8.9 ± 2.0', mean of the paired differences and its standard error."""
    return f"{mean(gains):+.1f}" + (f" ± {stdev(gains) / math.sqrt(len(gains)):.1f}" if len(gains) > 1 else "")


def print_table(summary: dict, arms: list[str], c: SimpleNamespace) -> None:
    print("\nlabels  test accuracy (%)" + "".join(protocol.rjust(17) for protocol in PROTOCOLS))
    for labels, by_protocol in summary.items():
        for row in arms + ["gain"] * (WITH_BYOL in arms):
            form = mean_error if row == "gain" else mean_std
            print(f"{labels:>6}  {row:<17}" + "".join(form(by_protocol[protocol][row]).rjust(17) for protocol in PROTOCOLS))
    print("\n" + caption(c))
    if WITH_BYOL in arms and len(c.SEEDS) > 1:
        print("gain: mean of the differences, seed by seed, ± its standard error")


def print_classes(records: list[dict], classes: list[str], arms: list[str], labels: int | str,
                  seeds: tuple[int, ...]) -> None:
    """Accuracy of each class after fine-tuning, mean over the seeds, where the classes fit a screen."""
    if len(classes) > 20:
        return
    print(f"\n{label_text(labels) + ', fine-tuned':<25}" + "".join(arm.rjust(17) for arm in arms))
    for k, name in enumerate(classes):
        means = [mean(r["by class"]["fine-tuning"][k] for r in records
                      if (r["arm"], r["labels"]) == (arm, labels) and r["seed"] in seeds) for arm in arms]
        print(f"{name[:24]:<25}" + "".join(f"{value:17.1f}" for value in means))


def label_text(labels: int | str) -> str:
    return {"all": "all labels", FOLD: "folds of 1,000 labels"}.get(labels, f"{labels} labels a class")


def caption(c: SimpleNamespace) -> str:
    """What the numbers are, for table and figures, in lines of at most 80 characters."""
    seeds = ", ".join(map(str, c.SEEDS))
    spread = (f"mean ± std over {'folds' if c.FOLDS else 'seeds'} {seeds}: labelled subset, head, random weights"
              if len(c.SEEDS) > 1 else f"seed {seeds}")
    data = Path(c.DATASET).resolve().name  # a folder's name says enough, and a path may be long
    return (f"{c.RUN}: {data} at {c.IMAGE_SIZE} px, {c.ENCODER} from {c.INIT} weights\n{spread}\n"
            f"one pretraining run; fine-tuned for {c.EPOCHS} epochs, the last one reported")


def check_constants(c: SimpleNamespace) -> None:
    check_ranges(c, IMAGE_SIZE=(16, math.inf), EPOCHS=(1, math.inf), BATCH_SIZE=(2, math.inf),
                 LEARNING_RATE=(0, math.inf), WEIGHT_DECAY=(0, math.inf), WARMUP_EPOCHS=(0, math.inf), CROP_AREA=(0.01, 1))
    check_choice("OPTIMIZER", c.OPTIMIZER, ["sgd", "adamw"])
    check_choice("PRECISION", c.PRECISION, ["auto", "bf16", "fp32"])
    if len(set(c.SEEDS)) != len(c.SEEDS) or not c.SEEDS:
        raise UsageError(f"SEEDS {','.join(map(str, c.SEEDS))} repeats a seed or is empty")
    budgets = c.LABELS_PER_CLASS
    if len(set(budgets)) != len(budgets) or not all(b == "all" or b > 0 for b in budgets):
        raise UsageError(f"LABELS_PER_CLASS {','.join(map(str, budgets))} must be different positive numbers or 'all' "
                         f"({flag('LABELS_PER_CLASS')})")
    if c.FOLDS and c.DATASET != "stl10":
        raise UsageError(f"FOLDS are STL-10's, and DATASET is {c.DATASET!r}: leave --folds out")


def main(argv: list[str] | None = None) -> int:
    return run_script(globals(), argv)


if __name__ == "__main__":
    sys.exit(main())
