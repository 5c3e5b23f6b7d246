"""The method: loss, networks, moving average, parameter groups, schedules, signs of collapse."""
import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import byol
from byol import BYOL
from conftest import small_encoder


def small_byol():
    return BYOL(small_encoder("", "random", 0)[0], feature_dim=64, hidden_dim=16, projection_dim=4)


def two_batches(n=16):
    return torch.randn(2, n, 3, 16, 16, generator=torch.Generator().manual_seed(1)).unbind(0)


def test_loss_equals_both_forms_and_gives_its_target_no_gradient(generator):
    p, z = torch.randn(2, 32, 8, generator=generator).requires_grad_()
    p.retain_grad(), z.retain_grad()
    loss = byol.byol_loss(p, z)
    assert loss.shape == (32,)
    torch.testing.assert_close(loss, (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(dim=1))
    torch.testing.assert_close(loss, 2 - 2 * (p * z).sum(1) / p.norm(dim=1) / z.norm(dim=1))
    loss.sum().backward()
    assert p.grad is not None and z.grad is None
    assert byol.byol_loss(p.bfloat16(), z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("z, expected", [([3.0, 0.0], 0.0), ([0.0, 2.0], 2.0), ([-1.0, 0.0], 4.0)])
def test_loss_of_parallel_orthogonal_and_opposite_vectors(z, expected):
    assert byol.byol_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([z])).item() == pytest.approx(expected, abs=1e-6)


def test_forward_is_the_sum_of_both_orders_averaged_over_the_batch():
    model, (a, b) = small_byol(), two_batches()
    p = [model.predictor(model.online_projector(model.online_encoder(x))) for x in (a, b)]
    z = [model.target_projector(model.target_encoder(x)) for x in (a, b)]
    expected = (2 - 2 * F.cosine_similarity(p[0], z[1])) + (2 - 2 * F.cosine_similarity(p[1], z[0]))
    loss = model(a, b)
    assert loss.shape == () and 0 <= loss.item() <= 8
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(loss, model(b, a))


def test_no_gradient_reaches_the_target():
    model = small_byol()
    for p in model.parameters():  # even if the target asked for one, and it is unlike the online network
        p.requires_grad_().data.add_(0.1 * torch.randn_like(p))
    model(*two_batches()).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("target"), name


def test_heads_have_the_papers_shape_and_no_forward_pass_builds_them():
    encoder = nn.Flatten()
    encoder.forward = None  # nobody may call it
    model = BYOL(encoder, feature_dim=512)
    for head, width in ((model.online_projector, 512), (model.predictor, 256)):
        assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert head[0].weight.shape == (4096, width) and head[0].bias is not None
        assert head[3].weight.shape == (256, 4096) and head[3].bias is None


def test_target_is_an_equal_copy_with_storage_of_its_own():
    state = small_byol().state_dict(keep_vars=True)
    for name, q in state.items():
        if name.startswith("target"):
            p = state[name.replace("target", "online")]
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr() and not q.requires_grad


def test_each_view_passes_the_networks_by_itself_and_the_target_normalises_by_its_own_batch():
    model, (a, b), outputs = small_byol(), two_batches(), []
    model.predictor.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(a, b)
    assert model.target_encoder.bn.num_batches_tracked == 2, "each view once"
    model(a, b * 100 + 7)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[1], outputs[3])


def test_frozen_batchnorm_keeps_the_encoders_statistics_and_no_others():
    (encoder, _), (a, b) = small_encoder("", "random", 0), two_batches()
    encoder.bn.running_mean.normal_()
    encoder.bn.running_var.uniform_(0.5, 2)
    plain = copy.deepcopy(encoder).eval()
    model, features = BYOL(encoder, 64, 16, 4, frozen_batchnorm=True), []
    for network in (model.online_encoder, model.target_encoder):
        network.register_forward_hook(lambda module, inputs, output: features.append(output))
    model(a, b).backward()
    for x, seen in zip((a, b, a, b), features, strict=True):
        torch.testing.assert_close(seen, plain(x))
    for network in (model.online_encoder, model.target_encoder):
        assert all(map(torch.equal, network.bn.buffers(), plain.bn.buffers()))
    assert model.online_encoder.bn.weight.grad is not None, "its weight and bias are trained"
    assert model.online_projector[1].num_batches_tracked == 2, "the heads see the batch"


@pytest.mark.parametrize("tau, steps", [(0.0, 1), (0.9, 1), (1.0, 1), (0.8, 10)])
def test_the_target_is_the_moving_average_of_the_online_networks_parameters(tau, steps):
    model = small_byol()
    for x in [*model.parameters(), model.online_encoder.bn.running_mean]:
        x.data.normal_()
    before = copy.deepcopy(model)
    for _ in range(steps):
        model.update_target(tau)
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        if name.startswith("target"):
            online = before.get_parameter(name.replace("target", "online"))
            torch.testing.assert_close(new, tau ** steps * old + (1 - tau ** steps) * online)
            assert tau not in (0, 1) or torch.equal(new, old if tau else online)
        else:
            assert torch.equal(new, old)
    assert all(map(torch.equal, model.buffers(), before.buffers())), "they are not averaged"


def test_the_optimizers_groups_hold_each_trainable_parameter_once():
    encoder = torchvision.models.resnet18()
    encoder.fc = nn.Identity()
    model = BYOL(encoder, 512, 32, 16)
    trainable = [id(p) for name, p in model.named_parameters() if not name.startswith("target")]
    plain = {id(p) for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for p in m.parameters()}
    plain = (plain | {id(m.bias) for m in model.modules() if isinstance(m, nn.Linear)}) & set(trainable)
    for child, factor, scales in (("", 1, {1}), ("predictor", 10, {1, 10})):
        groups = byol.build_optimizer(model, 0.1, child, factor).param_groups
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(trainable)
        assert {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]} == plain
        assert {(group["weight_decay"] > 0, group["scale"]) for group in groups} == set(product((True, False), scales))
    assert byol.build_optimizer(model, 0).defaults["momentum"] == 0.9
    assert ({id(p) for group in groups if group["scale"] == 10 for p in group["params"]}
            == set(map(id, model.predictor.parameters())))


def test_loss_falls_on_a_fixed_batch():
    model, (a, b), losses = small_byol(), two_batches(32), []
    optimizer = byol.build_optimizer(model, 0)
    byol.set_learning_rate(optimizer, 0.2)
    for _ in range(30):
        loss = model(a, b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(0.9)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_target_decay_rises_to_1_after_the_last_step():
    values = [byol.target_decay(k, 100, 0.99) for k in range(101)]
    assert values[0] == pytest.approx(0.99) and values[50] == pytest.approx(0.995) and values[100] == 1
    assert values == sorted(set(values)), "also the last step moves the target"


def test_learning_rate_rises_over_the_warmup_and_falls_to_0():
    values = [byol.learning_rate(k, 110, 10, 0.2) for k in range(111)]
    assert values[0] == 0 and values[5] == pytest.approx(0.1) and values[10] == 0.2
    assert values[60] == pytest.approx(0.1) and values[110] == pytest.approx(0, abs=1e-12)
    assert values[:11] == sorted(set(values[:11])) and values[10:] == sorted(set(values[10:]), reverse=True)
    assert byol.learning_rate(0, 10, 0, 0.3) == byol.learning_rate(0, 1, 5, 0.3) == 0.3
    capped = [byol.learning_rate(k, 4, 400, 0.2) for k in range(4)]
    assert capped == pytest.approx([0, 0.1, 0.2, 0.1]), "a warm-up takes at most half of all steps"


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
    assert byol.embedding_spread(torch.randn(4000, 64, generator=generator)).item() == pytest.approx(1 / 8, rel=0.02)
    assert byol.embedding_spread(torch.ones(100, 64)).item() == pytest.approx(0, abs=1e-6)
    model, z = small_byol(), []
    model.online_projector.register_forward_hook(lambda module, inputs, output: z.append(output))
    model(*two_batches())
    assert torch.equal(model.spread, byol.embedding_spread(z[0]))
