"""The method: loss, networks, schedules, and the views against torchvision's own operations on single images."""
import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2 import functional as tv

import byol
from byol import BRIGHTNESS, BYOL, CONTRAST, HUE, SATURATION


def small_byol(seed=0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten())
    return BYOL(encoder, feature_dim=8, hidden_dim=16, projection_dim=4)


def views(n=16, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 3, size, size, generator=generator).unbind(0)


def photographs(n=12, height=40, width=40, seed=3):
    """Images with flat areas, edges, grays and every colour, uint8 [n,3,height,width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    images = F.interpolate(coarse, size=(height, width), mode="bicubic") * 1.4 - 0.2
    images[0] = images[0].mean(dim=0)  # a gray one
    images[1, :, :, : width // 2] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------ loss

def test_loss_equals_both_forms(generator):
    p, z = torch.randn(2, 32, 8, generator=generator)
    expected = (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(dim=1)
    torch.testing.assert_close(byol.byol_loss(p, z), expected)
    assert byol.byol_loss(p, z).shape == (32,)


@pytest.mark.parametrize("z, expected", [([3.0, 0.0], 0.0), ([0.0, 2.0], 2.0), ([-1.0, 0.0], 4.0)])
def test_loss_of_parallel_orthogonal_and_opposite_vectors(z, expected):
    assert byol.byol_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([z])).item() == pytest.approx(expected, abs=1e-6)


def test_loss_is_computed_in_fp32():
    p = torch.randn(4, 256).bfloat16()
    assert byol.byol_loss(p, p).dtype == torch.float32


def test_loss_is_symmetric_in_the_views():
    a, b = views()
    torch.testing.assert_close(small_byol()(a, b), small_byol()(b, a))


def test_forward_is_the_sum_of_both_orders_averaged_over_the_batch():
    model, (a, b) = small_byol(), views()
    other = copy.deepcopy(model)
    p = [other.predictor(other.online_projector(other.online_encoder(x))) for x in (a, b)]
    z = [other.target_projector(other.target_encoder(x)) for x in (a, b)]
    expected = (2 - 2 * F.cosine_similarity(p[0], z[1])) + (2 - 2 * F.cosine_similarity(p[1], z[0]))
    loss = model(a, b)
    assert loss.shape == () and 0 <= loss.item() <= 8
    torch.testing.assert_close(loss, expected.mean())


def test_no_gradient_reaches_the_target():
    model = small_byol()
    with torch.no_grad():  # a target unlike the online network, so that nothing is 0 by chance
        for p in model.target_encoder.parameters():
            p.add_(0.1)
    model.target_encoder.requires_grad_(True)  # even then
    model.target_projector.requires_grad_(True)
    model(*views()).backward()
    assert all(p.grad is None for m in (model.target_encoder, model.target_projector) for p in m.parameters())
    assert all(p.grad is not None for m in (model.online_encoder, model.online_projector, model.predictor)
               for p in m.parameters())


def test_loss_gives_its_target_no_gradient():
    p, z = torch.randn(2, 4, 8).unbind(0)
    p.requires_grad_(), z.requires_grad_()
    byol.byol_loss(p, z).sum().backward()
    assert p.grad is not None and z.grad is None


def test_predictor_matters():
    model, (a, b) = small_byol(), views()
    before = model(a, b).item()
    nn.init.normal_(model.predictor[-1].weight)
    assert model(a, b).item() != pytest.approx(before)


# -------------------------------------------------------------------------------------------------------- networks

def test_heads_have_the_papers_shape():
    model = BYOL(nn.Flatten(), feature_dim=512)
    for head, width in ((model.online_projector, 512), (model.predictor, 256)):
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert head[0].weight.shape == (4096, width) and head[0].bias is not None
        assert head[3].weight.shape == (256, 4096) and head[3].bias is None


def test_target_is_an_equal_copy_with_storage_of_its_own():
    model = small_byol()
    pairs = [(model.online_encoder, model.target_encoder), (model.online_projector, model.target_projector)]
    for online, target in pairs:
        assert online is not target
        for p, q in zip(online.state_dict().values(), target.state_dict().values(), strict=True):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
        assert not any(p.requires_grad for p in target.parameters())


def test_constructor_runs_no_forward_pass():
    class Encoder(nn.Module):
        def forward(self, x):
            raise AssertionError("called")

    BYOL(Encoder(), feature_dim=4, hidden_dim=4, projection_dim=2)


def test_first_view_passes_the_networks_by_itself():
    model, (a, b) = small_byol().train(), views()
    outputs = []
    model.predictor.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(a, b)
    model(a, b * 100 + 7)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[1], outputs[3])


def test_target_normalises_by_its_own_batch():
    """In train mode the target's BatchNorm uses the batch, and keeps statistics of its own."""
    model, (a, b) = small_byol().train(), views()
    before = copy.deepcopy(model.target_encoder[1].running_mean)
    model(a, b)
    assert not torch.equal(model.target_encoder[1].running_mean, before)
    assert model.target_encoder[1].num_batches_tracked == 2  # each view once


def test_frozen_batchnorm_keeps_the_encoders_statistics_and_no_others():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder[1].running_mean.normal_()
    encoder[1].running_var.uniform_(0.5, 2)
    plain = copy.deepcopy(encoder).eval()
    model, (a, b) = BYOL(encoder, 8, 16, 4, frozen_batchnorm=True), views()
    heads = copy.deepcopy(model.online_projector.state_dict())
    features = []
    for network in (model.online_encoder, model.target_encoder):
        network.register_forward_hook(lambda module, inputs, output: features.append(output))
    model(a, b).backward()
    for x, seen in zip((a, b, a, b), features, strict=True):
        torch.testing.assert_close(seen, plain(x))
    for network in (model.online_encoder, model.target_encoder):
        assert torch.equal(network[1].running_mean, plain[1].running_mean)
        assert torch.equal(network[1].running_var, plain[1].running_var) and network[1].num_batches_tracked == 0
    assert model.online_encoder[1].weight.grad is not None, "its weight and bias are trained"
    assert not torch.equal(model.online_projector[1].running_mean, heads["1.running_mean"]), "the heads see the batch"


@pytest.mark.parametrize("tau", [0.0, 0.9, 1.0])
def test_ema_step(tau):
    model = small_byol()
    with torch.no_grad():
        for p in [*model.online_encoder.parameters(), *model.online_projector.parameters()]:
            p.add_(torch.randn_like(p))
    before = copy.deepcopy(model)
    model.update_target(tau)
    for name in ("encoder", "projector"):
        for online, old, new in zip(getattr(before, f"online_{name}").parameters(),
                                    getattr(before, f"target_{name}").parameters(),
                                    getattr(model, f"target_{name}").parameters(), strict=True):
            torch.testing.assert_close(new, tau * old + (1 - tau) * online)
            if tau == 0:
                assert torch.equal(new, online)
            if tau == 1:
                assert torch.equal(new, old)
    for p, q in zip(model.online_encoder.parameters(), before.online_encoder.parameters()):
        assert torch.equal(p, q)


def test_ema_closed_form_after_n_steps():
    model = small_byol()
    start = [p.clone() for p in model.target_encoder.parameters()]
    with torch.no_grad():
        for p in model.online_encoder.parameters():
            p.mul_(3).add_(1)
    for _ in range(10):
        model.update_target(0.8)
    for old, online, new in zip(start, model.online_encoder.parameters(), model.target_encoder.parameters()):
        torch.testing.assert_close(new, 0.8 ** 10 * old + (1 - 0.8 ** 10) * online)


def test_ema_leaves_buffers_alone():
    model = small_byol()
    model.online_encoder[1].running_mean.fill_(5)
    before = copy.deepcopy(dict(model.named_buffers()))
    model.update_target(0.5)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_parameter_groups_hold_each_trainable_parameter_once():
    encoder = torchvision.models.resnet18()
    encoder.fc = nn.Identity()
    model = BYOL(encoder, 512, 32, 16)
    decayed, plain = byol.parameter_groups(model, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0 and decayed["scale"] == plain["scale"] == 1
    grouped = [id(p) for group in (decayed, plain) for p in group["params"]]
    trainable = [id(p) for m in (model.online_encoder, model.online_projector, model.predictor) for p in m.parameters()]
    assert sorted(grouped) == sorted(trainable)
    undecayed = {id(p) for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for p in m.parameters()}
    undecayed |= {id(m.bias) for m in model.modules() if getattr(m, "bias", None) is not None}
    assert {id(p) for p in plain["params"]} == undecayed & set(trainable)
    groups = byol.parameter_groups(model, 0.1, "predictor", 10)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(trainable)
    assert {id(p) for group in groups if group["scale"] == 10 for p in group["params"]} == set(map(id, model.predictor.parameters()))
    assert {id(p) for group in groups if not group["weight_decay"] for p in group["params"]} == undecayed & set(trainable)


def test_effective_rank_counts_the_directions_in_which_features_vary(generator):
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    signs = torch.cat([torch.eye(16), -torch.eye(16)])
    for directions in (1, 3, 16):
        features = 5 + signs[:, :directions] @ axes[:directions]
        assert byol.effective_rank(features).item() == pytest.approx(directions, rel=1e-3)
    uneven = signs[[0, 1, 16, 17]] * torch.tensor([2.0] + 15 * [1.0])  # variances 4 and 1
    assert byol.effective_rank(uneven).item() == pytest.approx(0.8 ** -0.8 * 0.2 ** -0.2)
    assert byol.effective_rank(torch.ones(8, 16)).item() == 1, "nothing varies"


def test_spread_is_healthy_on_the_sphere_and_0_when_collapsed(generator):
    z = torch.randn(4000, 64, generator=generator)
    assert byol.embedding_spread(z).item() == pytest.approx(1 / 8, rel=0.02)
    assert byol.embedding_spread(torch.ones(100, 64)).item() == pytest.approx(0, abs=1e-6)
    model = small_byol()
    z = []
    model.online_projector.register_forward_hook(lambda module, inputs, output: z.append(output))
    model(*views())
    assert torch.equal(model.spread, byol.embedding_spread(z[0]))


# ------------------------------------------------------------------------------------------------------- schedules

def test_target_decay():
    values = [byol.target_decay(k, 100, 0.99) for k in range(101)]
    assert values[0] == pytest.approx(0.99) and values[50] == pytest.approx(0.995) and values[100] == 1
    assert all(a < b for a, b in zip(values, values[1:]))
    assert values[99] < 1, "the last step still moves the target"


def test_learning_rate():
    values = [byol.learning_rate(k, 110, 10, 0.2) for k in range(111)]
    assert values[0] == 0 and values[5] == pytest.approx(0.1) and values[10] == 0.2
    assert values[60] == pytest.approx(0.1) and values[110] == pytest.approx(0, abs=1e-12)
    assert all(a < b for a, b in zip(values[:10], values[1:11])) and all(a > b for a, b in zip(values[10:], values[11:]))


def test_learning_rate_without_warmup():
    assert byol.learning_rate(0, 10, 0, 0.3) == 0.3


# ----------------------------------------------------------------------------------------------------------- views

def to_uint_scale(difference):
    return difference.abs().max().item() * 255


@pytest.mark.parametrize("height, width, size", [(40, 40, 24), (40, 56, 32), (24, 24, 48)])
def test_crop_is_torchvisions_antialiased_bicubic(device, generator, height, width, size):
    images = photographs(40, height, width)
    box, flip = byol.crop_of(torch.rand(40, byol.CROP_DRAWS, generator=generator), height, width, 0.08)
    ours = byol.crop_resize(images.to(device), box.to(device), flip.to(device), size).cpu()
    assert ours.shape == (40, 3, size, size)
    for image, (top, left, h, w), flipped, mine in zip(images, box.int().tolist(), flip, ours):
        expected = tv.resized_crop(image.float() / 255, top, left, h, w, [size, size],
                                   tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        expected = expected.flip(-1) if flipped else expected
        torch.testing.assert_close(mine, expected, atol=2e-5, rtol=0)


def test_crop_never_reads_beyond_its_box(device):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 8:16, 8:16] = 255
    box = torch.tensor([[8.0, 8.0, 8.0, 8.0]])
    inside = byol.crop_resize(images.to(device), box.to(device), torch.tensor([False], device=device), 32)
    torch.testing.assert_close(inside, torch.ones_like(inside))


def test_crop_boxes_follow_the_paper(generator):
    box, flip = byol.crop_of(torch.rand(20_000, byol.CROP_DRAWS, generator=generator), 64, 64, 0.08)
    top, left, h, w = box.unbind(1)
    assert (box == box.round()).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= 64).all() and (left + w <= 64).all()
    area, ratio = h * w / 64 ** 2, w / h
    assert area.min() > 0.07 and area.max() == 1
    free = area < 0.5  # no side is clamped there
    # Whole pixels: at the smallest crop of 16 x 21, half a pixel on each side is 6% of the ratio.
    assert ratio[free].min() > 0.75 * 0.94 and ratio[free].max() < 4 / 3 * 1.06
    assert ratio[free].log().mean().abs() < 0.01, "log-uniform is symmetric about 1"
    # The area is uniform: below one half of its range lie (0.5 - 0.08) / 0.92 of the draws.
    assert free.float().mean().item() == pytest.approx(0.42 / 0.92, abs=0.02)
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    centered = h < 40
    assert (top / (64 - h))[centered].mean().item() == pytest.approx(0.5, abs=0.02)


def torchvision_operation(operation, image, factor):
    return {BRIGHTNESS: tv.adjust_brightness, CONTRAST: tv.adjust_contrast, SATURATION: tv.adjust_saturation,
            HUE: tv.adjust_hue}[operation](image, factor)


@pytest.mark.parametrize("operation, factors", [(BRIGHTNESS, (0.6, 1.4)), (CONTRAST, (0.6, 1.4)),
                                                (SATURATION, (0.8, 1.2)), (HUE, (-0.1, 0.1))])
def test_each_colour_operation_is_torchvisions(device, operation, factors):
    images = photographs().float() / 255
    n = len(images)
    factor = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1)
    factor[:, operation] = torch.linspace(*factors, n)
    order = torch.arange(4).repeat(n, 1)
    ours = byol.color_jitter(images.to(device), order.to(device), factor.to(device)).cpu()
    for image, strength, mine in zip(images, factor[:, operation].tolist(), ours):
        torch.testing.assert_close(mine, torchvision_operation(operation, image, strength), atol=1e-5, rtol=0)


def test_jitter_applies_each_images_own_factors_in_its_own_order(device, generator):
    images = photographs(24).float() / 255
    orders = torch.tensor(list(itertools.permutations(range(4))))
    factor = torch.rand(24, 4, generator=generator) * torch.tensor([0.8, 0.8, 0.4, 0.2]) + torch.tensor([0.6, 0.6, 0.8, -0.1])
    ours = byol.color_jitter(images.to(device), orders.to(device), factor.to(device)).cpu()
    for image, order, strengths, mine in zip(images, orders.tolist(), factor.tolist(), ours):
        for operation in order:
            image = torchvision_operation(operation, image, strengths[operation])
        torch.testing.assert_close(mine, image, atol=2e-5, rtol=0)


def test_grayscale_is_torchvisions(device):
    images = photographs().float() / 255
    gray = torch.arange(len(images)) % 2 == 0
    ours = byol.blend(images.to(device), (~gray).float().to(device), gray.float().to(device)).cpu()
    expected = torch.where(gray.view(-1, 1, 1, 1), tv.rgb_to_grayscale(images, num_output_channels=3), images)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size, taps", [(32, 3), (64, 7), (96, 9), (224, 23)])
def test_blur_is_torchvisions(device, size, taps):
    images = photographs(4, size, size).float() / 255
    sigma = torch.tensor([0.1, 0.7, 2.0, 0.0])
    ours = byol.gaussian_blur(images.clone().to(device), sigma.to(device)).cpu()
    for image, s, mine in zip(images, sigma.tolist(), ours):
        expected = tv.gaussian_blur(image, [taps, taps], [s, s]) if s else image
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_solarize_is_torchvisions(device):
    images = photographs().float() / 255
    chosen = torch.arange(len(images)) % 2 == 0
    ours = byol.solarize(images.to(device), chosen.to(device)).cpu()
    expected = torch.where(chosen.view(-1, 1, 1, 1), tv.solarize(images, 0.5), images)
    assert torch.equal(ours, expected)


def test_normalize_is_torchvisions(device):
    images = photographs().float() / 255
    weights = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    torch.testing.assert_close(byol.normalize(images.to(device)).cpu(), tv.normalize(images, weights.mean, weights.std))
    torch.testing.assert_close(byol.denormalize(byol.normalize(images)), images)


def test_render_applies_everything_in_the_papers_order(generator):
    images = photographs(64)
    view = byol.view_of(torch.rand(64, byol.VIEW_DRAWS, generator=generator), 40, 40, 0.08, blur_p=0.5, solarize_p=0.5)
    ours = byol.render(images, view, 40)
    for i, image in enumerate(images):
        top, left, h, w = view.box[i].int().tolist()
        x = tv.resized_crop(image.float() / 255, top, left, h, w, [40, 40], tv.InterpolationMode.BICUBIC).clamp(0, 1)
        x = x.flip(-1) if view.flip[i] else x
        for operation in view.order[i].tolist():
            x = torchvision_operation(operation, x, view.factor[i, operation].item())
        x = tv.rgb_to_grayscale(x, 3) if view.gray[i] else x
        x = tv.gaussian_blur(x, [5, 5], [view.sigma[i].item()] * 2) if view.sigma[i] else x
        if view.solarize[i]:
            near = (x - 0.5).abs() < 1e-4  # where rounding decides which side of the threshold a pixel is on
            x = torch.where(near, byol.denormalize(ours[i]), tv.solarize(x, 0.5))
        torch.testing.assert_close(ours[i], byol.normalize(x), atol=5e-4, rtol=0)


def test_rates_lie_inside_binomial_bounds(generator):
    n = 20_000

    def rate(chosen, p):
        assert abs(chosen.float().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / n)

    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for blur_p, solarize_p in ((1.0, 0.0), (0.1, 0.2)):
        view = byol.view_of(torch.rand(n, byol.VIEW_DRAWS, generator=generator), 64, 64, 0.08, blur_p, solarize_p)
        rate(view.flip, 0.5)
        rate((view.factor != neutral).any(dim=1), 0.8)
        rate(view.gray, 0.2)
        rate(view.sigma > 0, blur_p)
        rate(view.solarize, solarize_p)
        jitter = (view.factor - neutral).abs().amax(dim=0)
        torch.testing.assert_close(jitter, torch.tensor([0.4, 0.4, 0.2, 0.1]), atol=1e-3, rtol=0)
        blurred = view.sigma[view.sigma > 0]
        assert blurred.min() >= 0.1 and blurred.max() <= 2.0
        assert blurred.mean().item() == pytest.approx(1.05, abs=0.06)
        for turn in range(4):  # each operation as often in each turn
            for operation in range(4):
                rate(view.order[:, turn] == operation, 0.25)


def test_two_views_use_the_papers_rates(monkeypatch, generator):
    seen, view_of = [], byol.view_of
    monkeypatch.setattr(byol, "view_of", lambda u, *parameters: seen.append(parameters) or view_of(u, *parameters))
    byol.two_views(photographs(), 24, generator)
    assert seen == [(40, 40, 0.08, 1.0, 0.0, 1), (40, 40, 0.08, 0.1, 0.2, 1)], "height, width, area, blur, solarize, jitter"
    byol.two_views(photographs(), 24, generator, min_area=0.5, blur_p=(0.3, 0.0), jitter_strength=0.5)
    assert seen[2:] == [(40, 40, 0.5, 0.3, 0.0, 0.5), (40, 40, 0.5, 0.0, 0.2, 0.5)]


def test_the_strength_of_the_jitter_scales_its_factors(generator):
    draws = torch.rand(50, byol.VIEW_DRAWS, generator=generator)
    whole, half = (byol.view_of(draws, 40, 40, 0.08, 0.5, 0.5, strength).factor for strength in (1, 0.5))
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(half - neutral, (whole - neutral) / 2)


def test_each_number_that_is_drawn_decides_one_thing(generator):
    """So crop, flip, jitter, order, grayscale, blur and solarize are independent of each other."""
    draws = torch.rand(500, byol.VIEW_DRAWS, generator=generator)

    def fields(u):
        return byol.view_of(u, 64, 64, 0.08, 0.5, 0.5)._asdict()

    before, changed = fields(draws), []
    for column in range(byol.VIEW_DRAWS):
        other = draws.clone()
        other[:, column] = torch.rand(500, generator=generator)
        changed += [[name for name, value in fields(other).items() if not torch.equal(value, before[name])]]
    assert changed == [[name] for name in 4 * ["box"] + ["flip"] + 4 * ["order"] + 5 * ["factor"]
                       + ["gray", "sigma", "sigma", "solarize"]]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_a_few_numbers_wake_no_threads():
    """exp and sqrt of torch would; beside busy processes their threads wait for each other, a hundred times as long."""
    script = """
import os, torch, byol
torch.set_num_threads(2)
draws, before = torch.rand(1000, byol.VIEW_DRAWS), len(os.listdir("/proc/self/task"))
byol.view_of(draws, 96, 96, 0.08, 1.0, 0.2)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(byol.__file__).parent, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "0\n"


def test_copies_of_one_image_differ(device, generator):
    images = photographs(3, 48, 48)[[2] * 32].to(device)
    view1, view2 = byol.two_views(images, 32, generator)
    batch = torch.cat([view1, view2]).flatten(1)
    assert batch.shape == (64, 3 * 32 * 32) and batch.dtype == torch.float32 and batch.device.type == device.type
    assert torch.isfinite(batch).all()
    distance = torch.cdist(batch, batch) + torch.eye(64, device=device) * 1e3
    assert distance.min() > 0.1


def test_views_are_decided_by_the_generator_alone(device):
    images = photographs().to(device)
    torch.manual_seed(1)
    first = byol.two_views(images, 24, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = byol.two_views(images, 24, torch.Generator().manual_seed(5))
    other = byol.two_views(images, 24, torch.Generator().manual_seed(6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])


def test_two_views_leave_the_images_as_they_are(generator):
    images = photographs()
    before = images.clone()
    byol.two_views(images, 24, generator)
    assert torch.equal(images, before)


# -------------------------------------------------------------------------------------------------------- training

def test_training_moves_the_online_network_by_the_optimizer_and_the_target_by_the_average():
    model = small_byol()
    optimizer = torch.optim.SGD(byol.parameter_groups(model, 0), lr=0.1)
    before = copy.deepcopy(model)
    model(*views()).backward()
    optimizer.step()
    for name in ("online_encoder", "online_projector", "predictor"):
        for p, q in zip(getattr(model, name).parameters(), getattr(before, name).parameters()):
            torch.testing.assert_close(p, q - 0.1 * p.grad)
    for name in ("target_encoder", "target_projector"):
        assert all(torch.equal(p, q) for p, q in zip(getattr(model, name).parameters(), getattr(before, name).parameters()))


def test_loss_falls_on_a_fixed_batch():
    model, (a, b) = small_byol(), views(32)
    optimizer = torch.optim.SGD(byol.parameter_groups(model, 0), lr=0.2, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = model(a, b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(0.9)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
