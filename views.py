"""BYOL's two views of an image: pure functions of pixels and of uniform numbers, for a whole batch at once. Every image
draws its own parameters. Probabilities and strengths follow the paper's appendix B, the operations torchvision.
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's luma
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the operations of the colour jitter
JITTER_STRENGTHS = (0.4, 0.4, 0.2, 0.1)  # in that order
JITTER_P, GRAY_P = 0.8, 0.2  # probabilities of the jitter and of grayscale in either view
MIN_SIGMA, MAX_SIGMA = 0.1, 2.0  # of the blur, in pixels of the view
BLUR_P, SOLARIZE_P = (1.0, 0.1), (0.0, 0.2)  # probabilities in view 1 and in view 2
CROP_TRIES = 10  # candidates for a crop, of which the first that lies in the image is taken
CROP_DRAWS, VIEW_DRAWS = 2 * CROP_TRIES + 3, 2 * CROP_TRIES + 16  # uniform numbers that they take for each image


class View(NamedTuple):
    """What one view does to each of N images; every field has one row an image."""
    box: Tensor       # [N,4] top, left, height, width of the crop, whole pixels
    flip: Tensor      # [N] bool
    order: Tensor     # [N,4] a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE
    factor: Tensor    # [N,4] strength of each operation: 1, 1, 1, 0 leave the image as it is
    gray: Tensor      # [N] bool
    sigma: Tensor     # [N] of the blur, in pixels; 0 leaves the image as it is
    solarize: Tensor  # [N] bool


def view_of(u: Tensor, height: int, width: int, min_area: float, blur_p: float, solarize_p: float,
            jitter_strength: float = 1) -> View:
    """The view of images of `height` x `width` pixels that uniform numbers u [N,VIEW_DRAWS] stand for (appendix B)."""
    crop, order, strength, rest = u.split((CROP_DRAWS, 4, 4, 5), dim=1)
    jitter, gray, blur, sigma, solarize = rest.unbind(dim=1)
    strength = jitter_strength * (2 * strength - 1) * constant(JITTER_STRENGTHS, u)
    return View(*crop_of(crop, height, width, min_area),
                order=order.argsort(dim=1),
                factor=constant((1.0, 1.0, 1.0, 0.0), u) + strength * (jitter < JITTER_P)[:, None],
                gray=gray < GRAY_P,
                sigma=(MIN_SIGMA + sigma * (MAX_SIGMA - MIN_SIGMA)) * (blur < blur_p),
                solarize=solarize < solarize_p)


def crop_of(u: Tensor, height: int, width: int, min_area: float) -> tuple[Tensor, Tensor]:
    """Boxes [N,4] of random resized crops, and flips [N], that uniform numbers u [N,CROP_DRAWS] stand for. Area
    `min_area` to 1, ratio 3/4 to 4/3, log-uniform; of CROP_TRIES candidates the first that lies in the image, else the
    largest box in its middle that keeps to the ratios: torchvision's RandomResizedCrop."""
    area, ratio, start, flip = u.split((CROP_TRIES, CROP_TRIES, 2, 1), dim=1)
    area = (min_area + area * (1 - min_area)) * height * width
    ratio = torch.pow(4 / 3, 2 * ratio - 1)  # width over height
    # Square roots as 1 / sqrt(1 / x), whole numbers by int(): torch's sqrt, exp, floor and round wake all threads of a
    # CPU even for a few thousand numbers, and wait for them where other processes keep the cores busy.
    sides = torch.stack([torch.rsqrt(ratio / area), torch.rsqrt(1 / (ratio * area))], dim=2)  # [N,tries,2]
    sides = (sides + 0.5).int()
    image = constant((height, width), sides)
    fits = ((sides >= 1) & (sides <= image)).all(dim=2)
    fallback = constant((min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))), sides)
    first = fits.int().argmax(dim=1).view(-1, 1, 1).expand(-1, 1, 2)
    found = fits.any(dim=1, keepdim=True)
    sides = torch.where(found, sides.gather(1, first)[:, 0], fallback)
    room = image - sides
    start = torch.where(found, (start * (room + 1)).int(), room // 2).minimum(room)
    return torch.cat([start, sides], dim=1).float(), flip[:, 0] < 0.5


def render(images: Tensor, view: View, size: int) -> Tensor:
    """Apply a view to uint8 images on its device: crop, flip, colour jitter, grayscale, blur, solarize, normalise."""
    x = crop_resize(images, view.box, view.flip, size)
    x = color_jitter(x, view.order, view.factor)
    x = blend(x, torch.where(view.gray, 0.0, 1.0), view.gray.float())
    x = where_needed(gaussian_blur, x, view.sigma)
    return normalize(solarize(x, view.solarize))


def render_views(images: Tensor, draws: Tensor, size: int, min_area: float, blur_p: tuple[float, float],
                 jitter_strength: float) -> tuple[Tensor, Tensor]:
    """The two views that uniform numbers [2,N,VIEW_DRAWS] stand for."""
    return tuple(render(images, view_of(u, *images.shape[-2:], min_area, blur, solarize, jitter_strength), size)
                 for u, blur, solarize in zip(draws, blur_p, SOLARIZE_P))


def two_views(images: Tensor, size: int, generator: torch.Generator, min_area: float = 0.08,
              blur_p: tuple[float, float] = BLUR_P, jitter_strength: float = 1,
              render_views: Callable = render_views) -> tuple[Tensor, Tensor]:
    """BYOL's two views of each image: uint8 [N,3,H,W] -> two normalised float tensors [N,3,size,size]. Uniform numbers
    for both are drawn on the CPU and go to the images' device in one copy; all else is done there. min_area: smallest
    share of an image that a crop shows. jitter_strength: a multiple of the paper's. render_views: perhaps compiled."""
    draws = send(torch.rand(2, len(images), VIEW_DRAWS, generator=generator), images.device)
    return render_views(images, draws, size, min_area, blur_p, jitter_strength)


def normalize(x: Tensor) -> Tensor:
    """Float images [N,3,H,W] in [0,1] -> mean 0 and standard deviation 1 over ImageNet's colours."""
    return (x - constant(IMAGENET_MEAN, x, 3, 1, 1)) / constant(IMAGENET_STD, x, 3, 1, 1)


def denormalize(x: Tensor) -> Tensor:
    """The inverse of `normalize`."""
    return x * constant(IMAGENET_STD, x, 3, 1, 1) + constant(IMAGENET_MEAN, x, 3, 1, 1)


def constant(values: tuple[float, ...], x: Tensor, *shape: int) -> Tensor:
    """The values on x's device, made there: torch.tensor(..., device="cuda") would make the host wait for a copy."""
    return torch.cat([x.new_full((1,), value) for value in values]).view(shape or -1)


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. The host waits for MPS, which may read the source when it is gone, but not for a copy to CUDA."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def crop_resize(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop each image to its own box, resize, flip: uint8 [N,3,H,W] -> float [N,3,size,size] in [0,1]. Antialiased
    bicubic resampling is a linear map of the rows and one of the columns, so each image takes two matrix products, and
    flipping is reading the second matrix backwards. Bicubic overshoots: clipped to [0,1]."""
    top, left, h, w = box.unbind(dim=1)
    rows = bicubic_matrix(top, h, images.shape[2], size) / 255  # [N,size,H], and uint8 to [0,1] on the way
    columns = bicubic_matrix(left, w, images.shape[3], size)    # [N,size,W]
    columns = torch.where(flip.view(-1, 1, 1), columns.flip(1), columns)
    x = rows[:, None] @ images.float()
    return (x @ columns[:, None].transpose(2, 3)).clamp_(0, 1)


def bicubic_matrix(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """Weights [N,size_out,size_in] that resample pixels start ... start+length as torchvision does (antialiased). The
    kernel is Keys' cubic with a = -0.5; when shrinking it is stretched by the scale, which is the antialiasing."""
    scale = (length / size_out).view(-1, 1, 1)
    out = torch.arange(size_out, device=start.device).view(1, -1, 1) + 0.5
    pixel = torch.arange(size_in, device=start.device).view(1, 1, -1) + 0.5
    d = ((pixel - start.view(-1, 1, 1) - out * scale) / scale.clamp(min=1)).abs().clamp_(max=2)
    weight = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    weight *= (pixel > start.view(-1, 1, 1)) & (pixel < (start + length).view(-1, 1, 1))
    return weight / weight.sum(dim=2, keepdim=True)


def color_jitter(x: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each image [N,3,H,W], by its own factors [N,4] in its own order.
    Three of the four are blends, alike but for their weights, so one pass serves every image whatever its turn."""
    b, c, s, shift = factor.unbind(dim=1)
    one, zero = torch.ones_like(b), torch.zeros_like(b)
    # Weights [3,4,N] of the image, of its gray version and of its mean gray, for each operation.
    weights = torch.stack([b, c, s, one, zero, zero, 1 - s, zero, zero, 1 - c, zero, zero]).view(3, 4, -1)
    for operation in order.unbind(dim=1):
        x = blend(x, *weights.gather(1, operation.expand(3, 1, -1))[:, 0]).clamp_(0, 1)
        x = where_needed(shift_hue, x, torch.where(operation == HUE, shift, zero))
    return x


def blend(x: Tensor, image: Tensor, gray: Tensor, mean: Tensor | None = None) -> Tensor:
    """image * x + gray * luma(x) + mean * (mean luma of x), with weights [N]: an affine map of the colours."""
    r, g, b = GRAY_WEIGHTS
    luma = (r * x[:, :1]).add_(x[:, 1:2], alpha=g).add_(x[:, 2:], alpha=b)  # [N,1,H,W]
    offset = gray.view(-1, 1, 1, 1) * luma
    if mean is not None:
        offset += mean.view(-1, 1, 1, 1) * luma.mean(dim=(2, 3), keepdim=True)
    return torch.addcmul(offset, image.view(-1, 1, 1, 1), x)


def where_needed(operation: Callable, x: Tensor, amount: Tensor) -> Tensor:
    """operation(x, amount); on a CPU in place and of the images alone whose amount is not 0. A GPU is not asked which
    those are, because the host would wait for it."""
    if x.device.type == "cpu" and len(chosen := amount.nonzero()[:, 0]) < len(x):
        x[chosen] = operation(x[chosen], amount[chosen])
        return x
    return operation(x, amount)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of images [N,3,H,W] in [0,1] by `shift` [N], in turns; value and chroma stay as they are."""
    r, g, b = x.unbind(dim=1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    d = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == r, (g - b) / d, torch.where(value == g, 2 + (b - r) / d, 4 + (r - g) / d))  # sixths
    k = (constant((5.0, 3.0, 1.0), x, 3, 1, 1) + (hue + 6 * shift.view(-1, 1, 1))[:, None]).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image [N,3,S,S] by its own sigma [N] in pixels, reflecting at the border; sigma 0 leaves it alone. The
    kernel is about a tenth of the side, odd: 23 taps at 224 px (official code), 9 at 96."""
    size = x.shape[-1]
    radius = size // 20
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)  # sigma 0: 1 at the centre, 0 beside it
    kernel = kernel / kernel.sum(dim=1, keepdim=True)                       # [N,taps]
    # Which pixel each tap of each output reads: [taps,size,size], the rows of a unit matrix, reflected at the border.
    reads = F.pad(torch.eye(size, device=x.device)[None], (0, 0, radius, radius), "reflect")[0].unfold(0, size, 1).mT
    matrix = (kernel @ reads.flatten(1)).view(-1, 1, size, size)
    return matrix @ x @ matrix.transpose(2, 3)


def solarize(x: Tensor, chosen: Tensor) -> Tensor:
    """Invert the pixels at or above one half, in the images [N] that were chosen."""
    return torch.where(chosen.view(-1, 1, 1, 1) & (x >= 0.5), 1 - x, x)
