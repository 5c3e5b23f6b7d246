"""torchvision's ResNets as encoders: built, filled with weights, and exported as plain state dicts."""
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from utils import UNREADABLE, UserError, nearest, one_line, say, seeded_init


def build_encoder(name: str, init: str, seed: int, stem: str = "7x7") -> tuple[nn.Module, int]:
    """A torchvision ResNet by name without its classifier, and the number of its features. init: "random" (drawn from
    the seed), "imagenet" (torchvision downloads them), or the path of a file that holds a state dict of that network,
    with or without `fc`. stem: "7x7", torchvision's, or for small images "3x3": a first convolution of stride 1, and no
    max-pooling (Chen et al. 2020, SimCLR, app. B.9). Raises UserError for weights that cannot be had or do not fit."""
    names = models.list_models(module=models, include=["resnet*", "resnext*", "wide_resnet*"])
    if name not in names:
        raise UserError(f"ENCODER {name!r} is unknown{nearest(name, names) or ': it must be a ResNet of torchvision'}")
    with seeded_init(seed, "encoder"):
        encoder = models.get_model(name)
        if stem == "3x3":
            encoder.conv1 = nn.Conv2d(3, encoder.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
            encoder.maxpool = nn.Identity()
    feature_dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if init != "random":
        content = imagenet_weights(name) if init == "imagenet" else read_file(Path(init))
        encoder.load_state_dict(find_weights(content, encoder.state_dict(), init))
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.__class__ = Convolution  # names, weights and state dict stay torchvision's
    return encoder, feature_dim


def imagenet_weights(name: str) -> dict[str, Tensor]:
    try:
        return models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True, weights_only=True)
    except UNREADABLE as error:  # urllib's errors are OSErrors; a wrong checksum is a RuntimeError
        raise UserError(f"INIT 'imagenet': the weights of {name} could not be downloaded ({one_line(error)}): set INIT "
                        f"to 'random' or to a weights file") from error


def read_file(path: Path) -> Any:
    """What torch.save wrote. Only tensors are read: pickled code is refused, not run."""
    if not path.is_file():
        raise UserError(f"INIT '{path}' is neither 'imagenet', 'random' nor a file with weights")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"{path} is not a weights file, or holds other objects besides tensors. If you trust it, take "
                        "them out: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)") from error


def find_weights(content: Any, wanted: dict[str, Tensor], init: str) -> dict[str, Tensor]:
    """The tensors of a ResNet whose state dict looks like `wanted`: in `content` itself or in one of the dicts that it
    holds, with the prefix that wrappers have put before all names, and without the classifier, `fc`. Raises UserError
    where there are none or several, or where they do not fit."""
    candidates = {}  # by their place in `content`: tensors, and the names of those that are wrong
    dicts = {"": content} | content if isinstance(content, dict) else {}
    for container, weights in dicts.items():
        names = [name for name in weights if isinstance(name, str)] if isinstance(weights, dict) else []
        for prefix in {name.removesuffix("bn1.running_mean") for name in names if name.endswith("bn1.running_mean")}:
            own = {name.removeprefix(prefix): weights[name] for name in names if name.startswith(prefix)}
            own = {name: value for name, value in own.items() if not name.startswith("fc")}
            wrong = [name for name in wanted.keys() | own.keys() if not name.endswith("num_batches_tracked") and
                     (name not in own or name not in wanted or own[name].shape != wanted[name].shape)]
            candidates[f"{container} {prefix}".strip()] = own, sorted(wrong)
    if not candidates:
        raise UserError(f"{init} holds no state dict of a ResNet")
    fitting = [place for place, (_, wrong) in candidates.items() if not wrong]
    if len(fitting) > 1:
        raise UserError(f"{init} holds the weights of several networks ({', '.join(sorted(fitting))}): save one "
                        "alone (that of a run of ours is its encoder.pt)")
    place, (weights, wrong) = min(candidates.items(), key=lambda candidate: len(candidate[1][1]))
    if wrong == ["conv1.weight"] and wrong[0] in weights and weights[wrong[0]].shape[1] == 3:  # 1: of gray images
        raise UserError(f"the weights in {init} have another STEM: set it to the other one (--stem), or INIT to random")
    if wrong:
        raise UserError(f"the weights in {init} do not fit ENCODER: {len(wrong)} tensors{place and ' of ' + place} "
                        f"are missing, foreign or of another shape, {', '.join(wrong[:3])}")
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{init} holds weights that are not finite")
    if place:
        say(f"taking the weights of {place} from {init}")
    return weights


def plain_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Weights on the CPU in plain memory format: what torchvision's own network loads."""
    return {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}


def digest_of(init: str | Path) -> str:
    """Differs between any two files; what is no file stands for itself."""
    return sha256(Path(init).read_bytes()).hexdigest() if Path(init).is_file() else str(init)


class Convolution(nn.Conv2d):
    """A convolution of a ResNet, without bias or groups, by `SmallMaps` where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] * x.shape[3] <= 16:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            if dtype != torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX2":
                return SmallMaps.apply(x.to(dtype), self.weight.to(dtype), self.stride, self.padding)
        return super().forward(x)


class SmallMaps(torch.autograd.Function):
    """A convolution whose weights' gradient is one product over the whole batch; oneDNN makes one an image, but is
    faster in fp32 with AVX512. For 64 maps of 512 channels and one pixel, ResNet18's last at 32 px: 0.4 ms in bf16
    where oneDNN takes 3.1, and 6 ms in fp32 by AVX2 where it takes 130 (2 cores of AMD EPYCs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x, weight), (down, right), (above, beside) = ctx.saved_tensors, ctx.stride, ctx.padding
        grad_input = nn.grad.conv2d_input(x.shape, weight, grad_output, ctx.stride, ctx.padding)
        height, width = weight.shape[2:]
        seen = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, beside, beside, above, above))  # [N,H,W,C]
        seen = seen.unfold(1, height, down).unfold(2, width, right).permute(0, 1, 2, 4, 5, 3)  # [N,h,w,height,width,C]
        grad_weight = grad_output.transpose(0, 1).flatten(1) @ seen.flatten(3).flatten(0, 2)  # [O,height*width*C]
        return grad_input, grad_weight.view(-1, height, width, x.shape[1]).permute(0, 3, 1, 2), None, None
