"""What features are worth: kNN and probe against theory, the monitor, intervals that hold what they promise."""
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as tv

import byol
import evaluate
import features
from conftest import small_encoder
from evaluate import extract_features, fit_logistic, gain_interval, knn_predict, linear_probe, percent, verdict

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_of_normalised_images_and_leave_the_encoder_as_it_was(device, precision):
    encoder = small_encoder("", "random", 0)[0].to(device).train()
    encoder.relu.eval()  # as one that is frozen
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    parts, whole = (extract_features(encoder, pixels, device, precision, batch_size) for batch_size in (4, 10))
    assert parts.shape == (10, 64) and parts.dtype == torch.float32 and not parts.requires_grad
    assert encoder.training and encoder.bn.training and not encoder.relu.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    torch.testing.assert_close(parts, whole, atol=1e-4 if precision == "fp32" else 0.05, rtol=1e-4)
    weights = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    expected = tv.normalize(pixels / 255, weights.mean, weights.std).flatten(1)
    torch.testing.assert_close(extract_features(nn.Flatten(), pixels, device, precision).cpu(), expected)


def test_knn_agrees_with_brute_force(generator):
    bank, queries = torch.randn(60, 5, generator=generator), torch.randn(30, 5, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    predicted = knn_predict(bank, labels, queries, classes=4, k=7, temperature=0.2)
    for query, mine in zip(queries, predicted.tolist()):
        cosine = F.cosine_similarity(query, bank).tolist()
        nearest = sorted(range(60), key=lambda i: -cosine[i])[:7]
        votes = [sum(math.exp(cosine[i] / 0.2) for i in nearest if labels[i] == k) for k in range(4)]
        assert mine == votes.index(max(votes))
    assert knn_predict(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[0.1, 1.0]]), classes=2).tolist() == [1]


def test_knn_never_holds_the_similarities_of_all_queries_at_once(generator, monkeypatch):
    bank, queries = torch.randn(60, 5, generator=generator), torch.randn(2500, 5, generator=generator)
    labels, topk, rows = torch.randint(0, 4, (60,), generator=generator), torch.Tensor.topk, []
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **k: rows.append(len(x)) or topk(x, *a, **k))
    predicted = knn_predict(bank, labels, queries, classes=4)
    assert sum(rows) == 2500 and max(rows) <= 1024
    assert torch.equal(predicted[2000:], knn_predict(bank, labels, queries[2000:], classes=4))


def test_knn_is_as_right_as_theory_says(generator):
    """Two classes of angles with normal noise, many neighbours known: the vote of 20 that a majority of a dense bank
    casts. Where class 1 has probability p, k voters drawn by it are right with the probabilities of Binomial(k, p)."""
    n, half, k, known = 8_000, 0.5, 20, []
    for _ in range(2):
        labels = torch.randint(0, 2, (n,), generator=generator)
        angle = torch.randn(n, generator=generator) * 0.5 + (labels * 2 - 1) * half
        known += torch.stack([angle.cos(), angle.sin()], dim=1), labels
    bank, labels, queries, truth = known
    found = percent(knn_predict(bank, labels, queries, classes=2, k=k, temperature=1000.0) == truth) / 100
    x = torch.linspace(-6, 6, 20_001, dtype=torch.float64)  # noise of class 1, whose share at an angle is p
    weight, p = torch.exp(-x ** 2 / 2), torch.sigmoid(2 * half * (half + 0.5 * x) / 0.5 ** 2)
    votes = torch.stack([math.comb(k, i) * p ** i * (1 - p) ** (k - i) for i in range(k + 1)])
    expected = (weight * (votes[k // 2 + 1:].sum(0) + votes[k // 2] / 2)).sum().item() / weight.sum().item()
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / n) and expected < 0.84 < 0.8413


def test_logistic_regression_reaches_the_minimum(generator):
    """There the gradient of the convex objective is 0, by fp64, on standardised features. A loss near 1 in fp32 cannot
    tell points whose gradient is below some sqrt(2 * 1.2e-7) = 5e-4; after three iterations it is 1.3e-3 at least."""
    x = torch.randn(200, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    labels = torch.randint(0, 3, (200,), generator=generator)
    head = fit_logistic(x, labels, classes=3, penalty=0.05)
    mean, std = x.double().mean(0), x.double().std(0)
    weight = (head.weight.double() * std).requires_grad_()
    bias = (head.bias.double() + head.weight.double() @ mean).requires_grad_()
    loss = F.cross_entropy((x.double() - mean) / std @ weight.T + bias, labels) + 0.05 / 2 * weight.square().sum()
    assert max(gradient.abs().max().item() for gradient in torch.autograd.grad(loss, (weight, bias))) < 5e-4
    head = fit_logistic(torch.tensor([[1.0, 5.0]]), torch.tensor([1]), 2, penalty=0.1)  # of a single image
    assert head.weight.isfinite().all() and head(torch.tensor([[1.0, 5.0]])).argmax().item() == 1


def test_linear_probe_finds_what_theory_allows(generator):
    """Two classes at distance 2 in unit noise: Phi(1) = 84.1% at best."""
    labels = torch.randint(0, 2, (6000,), generator=generator)
    x = torch.randn(6000, 5, generator=generator)
    x[:, 0] += labels * 2.0
    probe, penalty = linear_probe(x[:2000], labels[:2000], 2, seed=0)
    found = percent(probe(x[2000:]).argmax(1) == labels[2000:]) / 100
    assert abs(found - 0.8413) < 4 * math.sqrt(0.84 * 0.16 / 4000) and penalty in evaluate.PROBE_PENALTIES


def test_the_probes_penalty_is_judged_by_every_image_once_held_out(monkeypatch):
    """And the one that gets most of them right is taken."""
    labels, features, asked = torch.arange(50) % 5, torch.arange(50.0)[:, None], {}  # a feature is an image's number
    best = evaluate.PROBE_PENALTIES[2]
    right_for = {penalty: 2 + 4 * i for i, penalty in enumerate(evaluate.PROBE_PENALTIES)} | {best: 20}

    def fit(x, y, classes, penalty):
        def probe(queries):
            number = queries[:, 0].long()
            asked.setdefault(penalty, []).append((x[:, 0].long().tolist(), number.tolist()))
            return F.one_hot((labels[number] + (number >= right_for[penalty])) % classes, classes)

        assert torch.equal(labels[x[:, 0].long()], y)
        return probe

    monkeypatch.setattr(evaluate, "fit_logistic", fit)
    assert linear_probe(features, labels, 5, seed=0)[1] == best and asked.keys() == right_for.keys()
    for folds in asked.values():
        assert sorted(number for _, held_out in folds for number in held_out) == list(range(50))
        for fitted, held_out in folds:
            assert sorted(fitted + held_out) == list(range(50)) and labels[held_out].bincount().tolist() == [2] * 5


def test_random_labels_are_learned_at_chance(generator):
    features, labels = torch.randn(1200, 16, generator=generator), torch.randint(0, 10, (1200,), generator=generator)
    (bank, queries), (known, truth) = features.split(600), labels.split(600)
    probe, _ = linear_probe(bank, known, 10, seed=0)
    for answer in (probe(queries).argmax(dim=1), knn_predict(bank, known, queries, 10)):
        assert abs(percent(answer == truth) - 10) < 400 * math.sqrt(0.1 * 0.9 / 600)


def test_the_monitor_sees_a_fifth_of_the_training_images(monkeypatch, generator):
    labels, seen, pixels = torch.arange(250) % 10, [], torch.arange(250, dtype=torch.uint8)  # an image is its number
    features = torch.cat([F.one_hot(labels, 10), torch.arange(250)[:, None]], dim=1).float()  # telling, numbered
    monkeypatch.setattr(evaluate, "MONITOR_IMAGES", 200)
    monkeypatch.setattr(evaluate, "extract_features", lambda encoder, images, *rest: features[images.long()])
    monkeypatch.setattr(evaluate, "knn_predict", lambda *args: seen.append(args[:3]) or torch.zeros(40))
    monkeypatch.setattr(evaluate, "fit_logistic", lambda x, y, *rest: seen.append((x, y)) or fit_logistic(x, y, *rest))
    found = evaluate.monitor(nn.Identity(), pixels, labels, 0, CPU, "fp32")
    (x, y), (bank, known, queries) = seen
    assert torch.equal(x, bank) and torch.equal(y, known) and (len(bank), len(queries)) == (160, 40)
    numbers = torch.cat([bank, queries])[:, -1].long()
    assert len(numbers.unique()) == 200, "none is in both"
    assert found["probe"].shape == found["knn"].shape == (40,) and found["probe"].all(), "features meet their labels"
    assert torch.equal(found["knn"], labels[numbers[160:]] == 0)
    assert found["rank"] == byol.effective_rank(features[numbers])
    assert evaluate.scores_of({"knn": torch.arange(8) < 3, "rank": torch.tensor(6.54)}) == {"knn": 37.5, "rank": 6.5}


@pytest.mark.parametrize("repetitions, of_seed", [(1, 0.0), (3, 0.0), (3, 0.3)])  # how a network differs by its seed
def test_intervals_of_two_equal_arms_hold_0_in_95_percent_of_cases(generator, repetitions, of_seed):
    """Seeds and images are drawn anew in every case; a single seed's interval promises nothing of other seeds."""
    cases, images, holds = 400, 400, 0
    for _ in range(cases):
        difficulty = torch.randn(images, generator=generator)  # what both arms find hard
        arms = [difficulty + of_seed * torch.randn(repetitions, 1, generator=generator)
                + 0.3 * torch.randn(images, generator=generator)  # what this arm finds hard
                + 0.7 * torch.randn(repetitions, images, generator=generator) for _ in range(2)]
        gain, half = gain_interval((arms[1] > 0).double() - (arms[0] > 0).double())
        holds += abs(gain) <= half
    assert abs(holds / cases - 0.95) < 3 * math.sqrt(0.95 * 0.05 / cases)


def test_an_interval_is_of_the_mean_gain_and_by_students_t():
    for freedom, t in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (999, 1.96234), (7999, 1.96026)):
        assert evaluate.t_quantile(0.975, freedom) == pytest.approx(t, rel=1e-4)
    gains = torch.tensor([1.0, 0, 0, -1, 1, 0, 0, 0, 0, 1])
    mean, half = gain_interval(gains)
    assert (mean, half) == (pytest.approx(20), pytest.approx(2.26216 * 100 * gains.std().item() / 10 ** 0.5, rel=1e-4))
    same = gains.expand(3, -1)  # seeds that agree on every image add nothing
    assert gain_interval(same) == (pytest.approx(mean), pytest.approx(half))
    shifted = 0.1 * torch.tensor([0.0, 1, -1])[:, None].expand(3, 10)  # images that agree in every seed add nothing
    assert gain_interval(shifted) == (pytest.approx(0), pytest.approx(4.30265 * 10 / math.sqrt(3), rel=1e-4))
    assert gain_interval(10 * shifted) == (pytest.approx(0), 100) and gain_interval(-gains[:1]) == (-100, 100)
    assert [evaluate.verdict_of(*x) for x in ((2, 1), (-2, 1), (1, 2), (0, 0), (-100, 100))] == [
        "gained", "LOST", "cannot tell", "cannot tell", "cannot tell"]


def test_the_verdict_tells_gained_from_lost_and_from_neither():
    """Of 1,000 images, 60 became right and 20 wrong: a difference of 4 points, with 1.96 errors of McNemar's test."""
    image = torch.arange(1000)
    before, gained, level = image < 500, (20 <= image) & (image < 560), (36 <= image) & (image < 540)
    half = 196.2 * math.sqrt((80 - 40 ** 2 / 1000) / 999 / 1000)
    assert verdict("kNN", before, gained) == (
        f"kNN went from 50.0% to 54.0%, by +4.0 ± {half:.1f} (95%): pretraining gained") and 1.7 < half < 1.75
    assert "to 50.0%, by -4.0 ± 1.7 (95%): pretraining LOST; train for more" in verdict("kNN", gained, before)
    assert verdict("kNN", before, level).endswith(
        "to 50.4%, by +0.4 ± 1.7 (95%): 1,000 held-out images cannot tell this from chance")
    assert "by -100.0 ± 100.0 (95%): 1 held-out image cannot tell" in verdict("kNN", before[:1], gained[:1])
    assert "went from" not in (changed := verdict("kNN", before, before[:999])) and "images have changed" in changed


def test_features_are_scored_on_images_that_are_held_out_each_once(generator, monkeypatch):
    monkeypatch.setattr(evaluate, "PROBE_PENALTIES", evaluate.PROBE_PENALTIES[:1])
    labels = torch.arange(100) % 2
    noise = torch.randn(100, 8, generator=generator)
    assert features.score(noise + 9 * F.one_hot(labels, 8), labels, budget=20) == (100.0, 100.0)
    assert all(30 < accuracy < 70 for accuracy in features.score(noise, labels, budget=20)), "nothing leaks"
