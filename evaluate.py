"""What features are worth: frozen features, kNN, linear probe, and intervals of a difference in accuracy."""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol import effective_rank
from utils import autocast, count, seeded_generator
from views import normalize

MONITOR_IMAGES = 5000  # at most: CIFAR-10's 50,000 would take nine seconds of one CPU thread an epoch
MONITOR_PENALTY = 0.1  # of the monitor's probe; the best of six for random and for good weights, 4,000 images
PROBE_PENALTIES = tuple(10.0 ** e for e in range(-3, 2))  # L2 penalties that the linear probe chooses from


@torch.no_grad()
def extract_features(encoder: nn.Module, pixels: Tensor, device: torch.device, precision: str,
                     batch_size: int = 256) -> Tensor:
    """Features fp32 [N,D], on `device`, of uint8 images by the encoder in eval mode: no weight or buffer moves."""
    modes = [(module, module.training) for module in encoder.modules()]  # some may be frozen, others not
    encoder.eval()
    features = []
    for batch in pixels.split(batch_size):
        x = normalize(batch.to(device).float() / 255).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            features.append(encoder(x).float())
    for module, training in modes:
        module.training = training
    return torch.cat(features)


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = 20,
                temperature: float = 0.07) -> Tensor:
    """Classes [M] by the vote of the k most similar of the bank's features, weighted exp(cos / temperature). bank [N,D]
    with labels [N], queries [M,D]; Wu et al. 2018 (arXiv:1805.01978), section 3.4."""
    bank, predicted = F.normalize(bank, dim=1), []
    for some in F.normalize(queries, dim=1).split(1024):  # all similarities at once may be larger than memory
        similarity, nearest = (some @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(some), classes, device=some.device)
        votes.scatter_add_(1, labels[nearest], torch.exp((similarity - 1) / temperature))  # -1: exp stays below 1
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def fit_logistic(features: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    """Minimise cross-entropy + penalty / 2 * |W|^2 over standardised features by L-BFGS; the bias is free."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=min(1, len(features) - 1)).clamp(min=1e-6)
    x = (features - mean) / std
    head = nn.utils.skip_init(nn.Linear, features.shape[1], classes)  # no draw: it starts at 0
    head.load_state_dict({"weight": torch.zeros(classes, features.shape[1]), "bias": torch.zeros(classes)})
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + penalty / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return fold_standardisation(head, mean, std).requires_grad_(False)


@torch.no_grad()
def fold_standardisation(head: nn.Linear, mean: Tensor, std: Tensor) -> nn.Linear:
    """Change `head` so that it makes of features [N,D] what it has made of (features - mean) / std."""
    head.weight /= std
    head.bias -= head.weight @ mean
    return head


def linear_probe(features: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[nn.Linear, float]:
    """Multinomial logistic regression on frozen features [N,D], of all images, and its L2 penalty: that of
    PROBE_PENALTIES which is best on all fifths, each held out in turn (one alone is too few images to choose by)."""
    def correct(penalty):
        return sum((fit_logistic(features[fit], labels[fit], classes, penalty)(features[held_out]).argmax(dim=1)
                    == labels[held_out]).sum().item() for fit, held_out in fifths(labels, seed))

    penalty = max(reversed(PROBE_PENALTIES), key=correct)  # of equals the strongest
    return fit_logistic(features, labels, classes, penalty), penalty


def fifths(labels: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Five ways to hold out a fifth of each class: the indices of the other four fifths, and those of the one."""
    mixed = torch.randperm(len(labels), generator=seeded_generator(seed, "held out"))
    mixed = mixed[labels[mixed].argsort(stable=True)]
    fifth = torch.arange(len(mixed)) % 5
    return [(mixed[fifth != i], mixed[fifth == i]) for i in range(5)]


def monitor(encoder: nn.Module, pixels: Tensor, labels: Tensor, seed: int, device: torch.device,
            precision: str) -> dict[str, Tensor]:
    """Which of 20% of labelled images kNN and a linear probe get right from the other 80%: `knn` and `probe`, bool [M].
    And the effective `rank` of all their features. Takes MONITOR_IMAGES at random of more. pixels: uint8 [N,3,S,S]."""
    order = torch.randperm(len(labels), generator=seeded_generator(seed, "monitor"))[:MONITOR_IMAGES]
    features, labels = extract_features(encoder, pixels[order], device, precision).cpu(), labels[order]
    (bank, queries), (known, truth) = (x.tensor_split([int(0.8 * len(x))]) for x in (features, labels))
    classes = int(labels.max()) + 1
    probe = fit_logistic(bank, known, classes, MONITOR_PENALTY)
    return {"knn": knn_predict(bank, known, queries, classes) == truth,
            "probe": probe(queries).argmax(dim=1) == truth, "rank": effective_rank(features)}


def scores_of(answers: dict[str, Tensor]) -> dict[str, float]:
    """What `monitor` found, in numbers: accuracies in percent, and the rank."""
    return {name: percent(x) if x.dtype == torch.bool else round(x.item(), 1) for name, x in answers.items()}


def verdict(protocol: str, before: Tensor, after: Tensor) -> str:
    """What pretraining did to frozen features, in words, from which of the same images a protocol gets right."""
    if len(before) != len(after):
        return f"{protocol}: the labelled images have changed since the run began, so there is nothing to compare"
    gain, half = gain_interval(after.double() - before.double())
    in_words = {"cannot tell": f"{count(len(after), 'held-out image')} cannot tell this from chance",
                "gained": "pretraining gained",
                "LOST": "pretraining LOST; train for more EPOCHS, lower LEARNING_RATE or raise CROP_AREA"}
    return (f"{protocol} went from {percent(before):.1f}% to {percent(after):.1f}%, by {gain:+.1f} ± {half:.1f} (95%): "
            + in_words[verdict_of(gain, half)])


def percent(correct: Tensor) -> float:
    """Accuracy in percent, of the answers that are correct: bool [N]."""
    return 100 * correct.sum().item() / len(correct)


def gain_interval(gains: Tensor) -> tuple[float, float]:
    """Mean gain in percent and half of its 95% interval, at most 100, from gains [R,N], or [N], of N images in R
    repetitions (seeds): 1 where only the second arm is right, -1 where only the first is. Both are samples, and all
    repetitions meet all images: a two-way analysis of variance tells what either contributes to the mean's variance,
    widened by its own quantile of Student's t (Graybill & Wang 1980). A single repetition's is of the images alone."""
    gains = 100 * gains.double().view(-1, gains.shape[-1])
    r, n = gains.shape
    mean, of_image, of_repetition = gains.mean().item(), gains.mean(dim=0), gains.mean(dim=1)
    if n == 1:
        return mean, 100.0
    images, repetitions = of_image.var().item() / n, 0.0
    if r > 1:
        rest = (gains - of_repetition[:, None] - of_image + mean).square().sum().item() / ((r - 1) * (n - 1))
        images = max(0.0, images - rest / (r * n))  # what the repetitions' variance holds already
        repetitions = t_quantile(0.975, r - 1) ** 2 * of_repetition.var().item() / r
    return mean, min(100.0, math.sqrt(repetitions + t_quantile(0.975, n - 1) ** 2 * images))


@functools.cache
def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t, by its density in the angle whose tangent is t / sqrt(freedom): cos^(freedom - 1)."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 100_001)
    below = np.cumsum(density := np.cos(angle).clip(0) ** (freedom - 1)) - density / 2
    return math.sqrt(freedom) * math.tan(np.interp(p * below[-1], below, angle))


def verdict_of(gain: float, half: float) -> str:
    """A gain and half of its 95% interval in words."""
    return "cannot tell" if not abs(gain) > half else "gained" if gain > 0 else "LOST"
