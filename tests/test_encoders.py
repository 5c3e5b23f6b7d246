"""torchvision's ResNets as encoders: their weights, in and out, and the convolution of small maps."""
import pytest
import torch
import torchvision
from torch import nn

import encoders
from encoders import Convolution, build_encoder
from utils import UserError, autocast, seeded_init

CPU = torch.device("cpu")


def test_encoder_is_torchvisions_without_the_classifier():
    encoder, feature_dim = build_encoder("resnet18", "random", seed=3)
    network = torchvision.models.resnet18()
    network.load_state_dict(encoder.state_dict(), strict=False)
    network.fc = nn.Identity()
    x = torch.randn(2, 3, 96, 96)
    assert feature_dim == 512
    torch.testing.assert_close(encoder.eval()(x), network.eval()(x))
    again, other = (build_encoder("resnet18", "random", seed)[0] for seed in (3, 4))
    assert torch.equal(encoder.conv1.weight, again.conv1.weight)
    assert not torch.equal(encoder.conv1.weight, other.conv1.weight)


def test_the_3x3_stem_keeps_the_size_of_small_images_and_all_other_weights():
    usual, small = (build_encoder("resnet18", "random", 3, stem)[0] for stem in ("7x7", "3x3"))
    maps = {}
    for stem, encoder in (("7x7", usual), ("3x3", small)):
        for name in ("layer1", "layer4"):
            encoder.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, key=(stem, name): maps.update({key: tuple(output.shape[1:])}))
        encoder.eval()(torch.randn(2, 3, 32, 32))
    assert maps == {("7x7", "layer1"): (64, 8, 8), ("7x7", "layer4"): (512, 1, 1),
                    ("3x3", "layer1"): (64, 32, 32), ("3x3", "layer4"): (512, 4, 4)}
    assert small.conv1.weight.shape == (64, 3, 3, 3) and small.conv1.bias is None and small.conv1.stride == (1, 1)
    assert abs(small.conv1.weight.std().item() / (2 / (64 * 9)) ** 0.5 - 1) < 0.05, "He et al.'s, of what goes out"
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in usual.state_dict().items()
               if name != "conv1.weight")


@pytest.mark.parametrize("own, other", [("7x7", "3x3"), ("3x3", "7x7")])
def test_weights_of_the_other_stem_are_refused(tmp_path, own, other):
    torch.save(build_encoder("resnet18", "random", 0, own)[0].state_dict(), tmp_path / "weights.pt")
    assert build_encoder("resnet18", str(tmp_path / "weights.pt"), 1, own)
    with pytest.raises(UserError, match=r"weights.pt have another STEM: set it to the other one \(--stem\), or INIT"):
        build_encoder("resnet18", str(tmp_path / "weights.pt"), 1, other)


def test_an_unknown_encoder_is_named_with_the_nearest():
    for name, message in (("resnet19", ": did you mean resnet1"), ("vgg16", ": it must be a ResNet of torchvision")):
        with pytest.raises(UserError, match=f"ENCODER '{name}' is unknown{message}"):
            build_encoder(name, "random", 0)


class Code:
    """A pickle that would run code when it is loaded."""

    def __reduce__(self):
        return open, ("executed", "w")


def test_weights_that_cannot_be_had_or_do_not_fit_are_named(tmp_path):
    whole = torchvision.models.resnet34().state_dict()
    torch.save(whole, tmp_path / "whole.pt")
    torn, own = (tmp_path / "whole.pt").read_bytes()[:1000], torchvision.models.resnet18().state_dict()
    for content, message in [
            (None, "is neither 'imagenet', 'random' nor a file with weights"), (b"", "is not a weights file"),
            (torn, "is not a weights file"), ({"weights": Code()}, "is not a weights file"),
            (whole, "do not fit ENCODER"),
            ({"model": {}, "step": 3}, "holds no state dict"), ([torch.ones(1)], "holds no state dict"),
            ({"net": {"backbone." + name: value for name, value in whole.items()}}, "do not fit .* of net backbone"),
            ({"q": own, "k": own}, r"holds the weights of several networks \(k, q\): save one alone"),
            ({**own, "conv1.weight": torch.ones(64, 1, 7, 7)}, "do not fit ENCODER: 1 tensors .* conv1.weight"),
            ({**own, "projector.weight": torch.ones(1)}, "do not fit ENCODER: 1 tensors .* projector.weight"),
            ({**own, "conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, "holds weights that are not fin")]:
        file = tmp_path / "weights.pt"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        with pytest.raises(UserError, match=f"weights.pt'? {message}") as error:
            build_encoder("resnet18", str(file), 0)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("container", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "backbone.", "module.encoder_q.", "_orig_mod.net."])
def test_weights_are_found_in_one_container_and_behind_one_prefix(tmp_path, capsys, container, prefix):
    """With a classifier, and beside what else a checkpoint holds."""
    weights = torchvision.models.resnet18().state_dict()
    content = {prefix + name: value for name, value in weights.items()} | {f"{prefix}fc.0.weight": torch.ones(3)}
    if prefix:
        content |= {"queue": torch.ones(4, 4), "predictor.0.weight": torch.ones(2, 2)}
    whole = {container: content, "epoch": 7, "optimizer": {"state": {}}} if container else content
    torch.save(whole, tmp_path / "x.pt")
    encoder, _ = build_encoder("resnet18", str(tmp_path / "x.pt"), seed=0)
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    place = f"{container} {prefix}".strip()
    assert capsys.readouterr().out == f"taking the weights of {place} from {tmp_path / 'x.pt'}\n" * bool(place)


def test_the_exported_weights_have_plain_memory_and_digests_tell_files_apart(tmp_path):
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    weight = encoders.plain_state_dict(network)["weight"]
    assert weight.is_contiguous() and torch.equal(weight, network.weight) and not weight.requires_grad
    for name in "abc":
        (tmp_path / name).write_text("x" if name == "c" else "y")
    a, b, c, absent = (encoders.digest_of(tmp_path / name) for name in ("a", "b", "c", "absent"))
    assert a == b != c and absent == str(tmp_path / "absent") and encoders.digest_of("random") == "random"


# ------------------------------------------------------------------------------------------------------ convolutions

def both_convolutions(*shape):
    """Ours and torch's, with the same weights."""
    with seeded_init(0, "convolution"):
        ours, torchs = (cls(*shape, bias=False) for cls in (Convolution, nn.Conv2d))
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


@pytest.mark.parametrize("size, kernel, stride, padding", [
    (1, 3, 1, 1), (2, 3, 2, 1), (4, 3, 1, 1), (3, 3, 2, 1), (4, 1, 2, 0), (4, (3, 1), (1, 2), (1, 0)),
    (4, (1, 3), (2, 1), (0, 1))])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_of_small_maps_has_torchs_gradients(size, kernel, stride, padding, memory_format, generator,
                                                          monkeypatch):
    monkeypatch.setattr(encoders.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    x, results = torch.randn(3, 4, size, size, generator=generator, dtype=torch.float64), []
    for convolution in (pair := both_convolutions(4, 6, kernel, stride, padding)):
        convolution.to(torch.float64, memory_format=memory_format)
        of = x.clone(memory_format=memory_format).requires_grad_()  # a leaf of its own, with a gradient of its own
        y = convolution(of)
        (y.square() * torch.arange(y.numel()).view_as(y)).sum().backward()  # no two places alike
        results.append((y, of.grad, convolution.weight.grad))
        assert ("SmallMaps" in y.grad_fn.name()) == (convolution is pair[0])
    torch.testing.assert_close(*results)


def test_a_convolution_of_small_maps_has_torchs_gradients_in_bf16(generator):
    x, scale = torch.randn(16, 64, 2, 2, generator=generator), torch.randn(16, 32, 2, 2, generator=generator)
    results = []
    for convolution in (pair := both_convolutions(64, 32, 3, 1, 1)):
        of = x.clone().requires_grad_()
        with autocast(CPU, "bf16"):
            y = convolution(of)
        assert y.dtype == torch.bfloat16 and ("SmallMaps" in y.grad_fn.name()) == (convolution is pair[0])
        (y * scale).sum().backward()
        results.append((y, of.grad, convolution.weight.grad))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, atol=0.02 * theirs.std().item(), rtol=0.02)


@pytest.mark.parametrize("where, precision, capability, ours", [
    ("cpu", "fp32", "AVX2", True), ("cpu", "fp32", "AVX512", False), ("cpu", "bf16", "AVX512", True),
    ("meta", "bf16", "AVX2", False)])
def test_small_maps_are_convolved_our_way_where_that_is_faster(where, precision, capability, ours, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    encoder = build_encoder("resnet18", "random", 0)[0].to(where)
    used = set()
    for name, module in encoder.named_modules():
        module.register_forward_hook(lambda _, inputs, y, name=name: used.add(name) if "SmallMaps" in y.grad_fn.name()
                                     else None)
    with autocast(CPU, precision):
        encoder(torch.zeros(2, 3, 64, 64, device=where))
    later = {f"layer{n}.{b}.conv{c}" for n in (3, 4) for b in (0, 1) for c in (1, 2)} | {"layer4.0.downsample.0"}
    assert used == (later - {"layer3.0.conv1"} if ours else set())  # what sees 4x4 pixels or fewer


def test_grouped_convolutions_stay_torchs():
    encoder, _ = build_encoder("resnext50_32x4d", "random", 0)
    encoder(torch.zeros(2, 3, 32, 32)).sum().backward()
    kinds = {(module.groups > 1, type(module)) for module in encoder.modules() if isinstance(module, nn.Conv2d)}
    assert kinds == {(True, nn.Conv2d), (False, Convolution)}
