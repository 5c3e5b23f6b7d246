"""The views: each operation against torchvision's own on single images, and the draws against the paper."""
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

import views
from views import BRIGHTNESS, CONTRAST, HUE, SATURATION


def photographs(n=12, height=40, width=40, seed=3):
    """Images with flat areas, edges, grays and every colour, uint8 [n,3,height,width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    images = F.interpolate(coarse, size=(height, width), mode="bicubic") * 1.4 - 0.2
    images[0] = images[0].mean(dim=0)  # a gray one
    images[1, :, :, : width // 2] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("height, width, size", [(40, 40, 24), (40, 56, 32), (24, 24, 48)])
def test_crop_is_torchvisions_antialiased_bicubic(device, generator, height, width, size):
    images = photographs(40, height, width)
    box, flip = views.crop_of(torch.rand(40, views.CROP_DRAWS, generator=generator), height, width, 0.08)
    ours = views.crop_resize(images.to(device), box.to(device), flip.to(device), size).cpu()
    assert ours.shape == (40, 3, size, size)
    for image, (top, left, h, w), flipped, mine in zip(images, box.int().tolist(), flip, ours):
        expected = tv.resized_crop(image.float() / 255, top, left, h, w, [size, size],
                                   tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        expected = expected.flip(-1) if flipped else expected
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("height, width, min_area", [(64, 64, 0.08), (64, 64, 0.2), (24, 24, 0.5), (40, 64, 0.3),
                                                     (64, 40, 0.3), (30, 90, 0.9), (90, 30, 0.9), (32, 32, 1.0)])
def test_crop_boxes_are_distributed_as_torchvisions(generator, height, width, min_area):
    n, image = 4_000, torch.empty(3, height, width)
    box, flip = views.crop_of(torch.rand(n, views.CROP_DRAWS, generator=generator), height, width, min_area)
    top, left, h, w = box.unbind(1)
    assert (box == box.round()).all() and (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.tensor([RandomResizedCrop.get_params(image, [min_area, 1.0], [3 / 4, 4 / 3])
                                 for _ in range(n)]).float()
    values = {"top": (top, expected[:, 0]), "left": (left, expected[:, 1]), "height": (h, expected[:, 2]),
              "width": (w, expected[:, 3]), "area": (h * w, expected[:, 2:].prod(1)),
              "ratio": (w / h, expected[:, 3] / expected[:, 2])}
    for name, pair in values.items():
        points = torch.cat(pair).unique()
        shares = [torch.searchsorted(sample.sort().values, points, right=True) / n for sample in pair]
        # Kolmogorov and Smirnov: two samples of one distribution differ by more once in 2,000 times.
        assert (shares[0] - shares[1]).abs().max() < 1.95 * (2 / n) ** 0.5, name
    whole = (h == height) | (w == width)
    assert whole.float().mean().item() == pytest.approx(
        ((expected[:, 2] == height) | (expected[:, 3] == width)).float().mean().item(), abs=0.02)
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.02)


TORCHVISIONS = {BRIGHTNESS: tv.adjust_brightness, CONTRAST: tv.adjust_contrast, SATURATION: tv.adjust_saturation,
                HUE: tv.adjust_hue}
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize("operation, factors", [(BRIGHTNESS, (0.6, 1.4)), (CONTRAST, (0.6, 1.4)),
                                                (SATURATION, (0.8, 1.2)), (HUE, (-0.1, 0.1))])
def test_each_colour_operation_is_torchvisions(device, operation, factors):
    images = photographs().float() / 255
    n = len(images)
    factor = NEUTRAL.repeat(n, 1)
    factor[:, operation] = torch.linspace(*factors, n)
    order = torch.arange(4).repeat(n, 1)
    ours = views.color_jitter(images.to(device), order.to(device), factor.to(device)).cpu()
    for image, strength, mine in zip(images, factor[:, operation].tolist(), ours):
        torch.testing.assert_close(mine, TORCHVISIONS[operation](image, strength), atol=1e-5, rtol=0)


def test_jitter_applies_each_images_own_factors_in_its_own_order(device, generator):
    images = photographs(24).float() / 255
    orders = torch.tensor(list(itertools.permutations(range(4))))
    factor = NEUTRAL + (2 * torch.rand(24, 4, generator=generator) - 1) * torch.tensor([0.4, 0.4, 0.2, 0.1])
    ours = views.color_jitter(images.to(device), orders.to(device), factor.to(device)).cpu()
    for image, order, strengths, mine in zip(images, orders.tolist(), factor.tolist(), ours):
        for operation in order:
            image = TORCHVISIONS[operation](image, strengths[operation])
        torch.testing.assert_close(mine, image, atol=2e-5, rtol=0)


def test_grayscale_is_torchvisions(device):
    images = photographs().float() / 255
    gray = torch.arange(len(images)) % 2 == 0
    ours = views.blend(images.to(device), (~gray).float().to(device), gray.float().to(device)).cpu()
    expected = torch.where(gray.view(-1, 1, 1, 1), tv.rgb_to_grayscale(images, num_output_channels=3), images)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size, taps", [(32, 3), (64, 7), (96, 9), (224, 23)])
def test_blur_is_torchvisions(device, size, taps):
    images = photographs(4, size, size).float() / 255
    sigma = torch.tensor([0.1, 0.7, 2.0, 0.0])
    ours = views.gaussian_blur(images.clone().to(device), sigma.to(device)).cpu()
    for image, s, mine in zip(images, sigma.tolist(), ours):
        expected = tv.gaussian_blur(image, [taps, taps], [s, s]) if s else image
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_solarize_is_torchvisions(device):
    images = photographs().float() / 255
    chosen = torch.arange(len(images)) % 2 == 0
    ours = views.solarize(images.to(device), chosen.to(device)).cpu()
    expected = torch.where(chosen.view(-1, 1, 1, 1), tv.solarize(images, 0.5), images)
    assert torch.equal(ours, expected)


def test_normalize_is_torchvisions(device):
    images = photographs().float() / 255
    weights = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    ours = views.normalize(images.to(device)).cpu()
    torch.testing.assert_close(ours, tv.normalize(images, weights.mean, weights.std))
    torch.testing.assert_close(views.denormalize(ours), images)


def test_render_applies_everything_in_the_papers_order(generator):
    images, draws = photographs(64), torch.rand(64, views.VIEW_DRAWS, generator=generator)
    view = views.view_of(draws, 40, 40, 0.08, blur_p=0.5, solarize_p=0.5)
    ours = views.render(images, view, 40)
    for i, image in enumerate(images):
        top, left, h, w = view.box[i].int().tolist()
        x = tv.resized_crop(image.float() / 255, top, left, h, w, [40, 40], tv.InterpolationMode.BICUBIC).clamp(0, 1)
        x = x.flip(-1) if view.flip[i] else x
        for operation in view.order[i].tolist():
            x = TORCHVISIONS[operation](x, view.factor[i, operation].item())
        x = tv.rgb_to_grayscale(x, 3) if view.gray[i] else x
        x = tv.gaussian_blur(x, [5, 5], [view.sigma[i].item()] * 2) if view.sigma[i] else x
        if view.solarize[i]:
            near = (x - 0.5).abs() < 1e-4  # where rounding decides which side of the threshold a pixel is on
            x = torch.where(near, views.denormalize(ours[i]), tv.solarize(x, 0.5))
        torch.testing.assert_close(ours[i], views.normalize(x), atol=5e-4, rtol=0)


def test_rates_lie_inside_binomial_bounds(generator):
    n = 20_000

    def rate(chosen, p):
        assert abs(chosen.float().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / n)

    for blur_p, solarize_p in ((1.0, 0.0), (0.1, 0.2)):
        view = views.view_of(torch.rand(n, views.VIEW_DRAWS, generator=generator), 64, 64, 0.08, blur_p, solarize_p)
        rate(view.flip, 0.5)
        rate((view.factor != NEUTRAL).any(dim=1), 0.8)
        rate(view.gray, 0.2)
        rate(view.sigma > 0, blur_p)
        rate(view.solarize, solarize_p)
        jitter = (view.factor - NEUTRAL).abs().amax(dim=0)
        torch.testing.assert_close(jitter, torch.tensor([0.4, 0.4, 0.2, 0.1]), atol=1e-3, rtol=0)
        blurred = view.sigma[view.sigma > 0]
        assert blurred.min() >= 0.1 and blurred.max() <= 2.0
        assert blurred.mean().item() == pytest.approx(1.05, abs=0.06)
        for turn in range(4):  # each operation as often in each turn
            for operation in range(4):
                rate(view.order[:, turn] == operation, 0.25)


def test_two_views_use_the_papers_rates_unless_told_otherwise(monkeypatch, generator):
    seen, view_of = [], views.view_of
    monkeypatch.setattr(views, "view_of", lambda u, *given: seen.append(given) or view_of(u, *given))
    views.two_views(photographs(), 24, generator)
    assert seen == [(40, 40, 0.08, 1.0, 0.0, 1), (40, 40, 0.08, 0.1, 0.2, 1)], "the last: area, blur, solarize, jitter"
    views.two_views(photographs(), 24, generator, min_area=0.5, blur_p=(0.3, 0.0), jitter_strength=0.5)
    assert seen[2:] == [(40, 40, 0.5, 0.3, 0.0, 0.5), (40, 40, 0.5, 0.0, 0.2, 0.5)]
    draws = torch.rand(50, views.VIEW_DRAWS, generator=generator)
    whole, half = (view_of(draws, 40, 40, 0.08, 0.5, 0.5, strength).factor for strength in (1, 0.5))
    torch.testing.assert_close(half - NEUTRAL, (whole - NEUTRAL) / 2)


def test_each_number_that_is_drawn_decides_one_thing(generator):
    """So crop, flip, jitter, order, grayscale, blur and solarize are independent of each other."""
    draws = torch.rand(500, views.VIEW_DRAWS, generator=generator)

    def fields(u):
        return views.view_of(u, 64, 64, 0.9, 0.5, 0.5)._asdict()  # so large an area takes all tries of some crops

    before, changed = fields(draws), []
    for column in range(views.VIEW_DRAWS):
        other = draws.clone()
        other[:, column] = torch.rand(500, generator=generator)
        changed += [[name for name, value in fields(other).items() if not torch.equal(value, before[name])]]
    assert changed == [[name] for name in 22 * ["box"] + ["flip"] + 4 * ["order"] + 5 * ["factor"]
                       + ["gray", "sigma", "sigma", "solarize"]]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_a_few_numbers_wake_no_threads():
    """exp and sqrt of torch would; beside busy processes their threads wait for each other, a hundred times as long."""
    script = """
import os, torch, views
torch.set_num_threads(2)
draws, before = torch.rand(1000, views.VIEW_DRAWS), len(os.listdir("/proc/self/task"))
views.view_of(draws, 96, 96, 0.08, 1.0, 0.2)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(views.__file__).parent, stdout=subprocess.PIPE,
                          text=True, check=True)
    assert done.stdout == "0\n"


def test_copies_of_one_image_differ(device, generator):
    images = photographs(3, 48, 48)[[2] * 32].to(device)
    view1, view2 = views.two_views(images, 32, generator)
    batch = torch.cat([view1, view2]).flatten(1)
    assert batch.shape == (64, 3 * 32 * 32) and batch.dtype == torch.float32 and batch.device.type == device.type
    assert torch.isfinite(batch).all()
    distance = torch.cdist(batch, batch) + torch.eye(64, device=device) * 1e3
    assert distance.min() > 0.1


def test_views_are_decided_by_the_generator_alone_and_leave_the_images_as_they_are(device):
    images = photographs().to(device)
    before, state = images.clone(), torch.get_rng_state()
    first = views.two_views(images, 24, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, before)
    torch.manual_seed(2)
    again = views.two_views(images, 24, torch.Generator().manual_seed(5))
    other = views.two_views(images, 24, torch.Generator().manual_seed(6))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])


def test_a_gpu_that_is_not_asked_which_images_need_work_makes_the_same_views(monkeypatch):
    draws = torch.rand(12, views.VIEW_DRAWS, generator=torch.Generator().manual_seed(5))
    view = views.view_of(draws, 40, 40, 0.08, blur_p=0.5, solarize_p=0)  # rounding decides what it inverts
    asked = views.render(photographs(), view, 24)
    monkeypatch.setattr(views, "where_needed", lambda operation, x, amount: operation(x, amount))
    torch.testing.assert_close(views.render(photographs(), view, 24), asked, atol=1e-5, rtol=0)
