"""BYOL, Bootstrap Your Own Latent (Grill et al. 2020, arXiv:2006.07733): the method and nothing else.

An online network predicts, from one view of an image, what a target network makes of the other view. The target is a
slow average of the online network. Values follow the paper's appendix and its official code.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """The projector and the predictor: Linear, BatchNorm, ReLU, Linear without bias."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
                         nn.Linear(hidden_dim, out_dim, bias=False))


class BYOL(nn.Module):
    """Online and target network. The target starts as a copy of the online one, with storage of its own. It gets no
    gradient and stays in train mode: its BatchNorm normalises by its own batch, as in the official code. Call
    `update_target` after each optimizer step. encoder: maps normalised images [N,3,S,S] to features [N,feature_dim]; it
    becomes `online_encoder`. frozen_batchnorm: both encoders normalise by the statistics that `encoder` came with, and
    keep them, because those of views are not those of images; the heads normalise by the batch."""

    def __init__(self, encoder: nn.Module, feature_dim: int, hidden_dim: int = 4096, projection_dim: int = 256,
                 frozen_batchnorm: bool = False):
        super().__init__()
        for module in encoder.modules() if frozen_batchnorm else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # and so in the target's copy
        self.online_encoder = encoder
        self.online_projector = mlp(feature_dim, hidden_dim, projection_dim)
        self.predictor = mlp(projection_dim, hidden_dim, projection_dim)
        self.target_encoder = copy.deepcopy(self.online_encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.online_projector).requires_grad_(False)
        # Not a weight: the latest batch's spread, kept here so that nobody has to compute an embedding twice.
        self.register_buffer("spread", torch.zeros(()), persistent=False)

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """Mean loss over the batch, summed over both orders of the views: a scalar from 0 to 8. Each view passes
        through the networks by itself, so that BatchNorm never mixes the two."""
        z1 = self.online_projector(self.online_encoder(view1))  # NxD
        z2 = self.online_projector(self.online_encoder(view2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        with torch.no_grad():
            t1 = self.target_projector(self.target_encoder(view1))
            t2 = self.target_projector(self.target_encoder(view2))
            self.spread.copy_(embedding_spread(z1))
        return (byol_loss(p1, t2) + byol_loss(p2, t1)).mean()

    @torch.no_grad()
    def update_target(self, tau: float) -> None:
        """target = tau * target + (1 - tau) * online, for parameters; BatchNorm's buffers are not averaged."""
        online = [*self.online_encoder.parameters(), *self.online_projector.parameters()]
        target = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - tau)


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Squared distance of the two normalised vectors, 2 - 2 cos(p, z), in fp32: [N,D], [N,D] -> [N], 0 to 4."""
    return 2 - 2 * F.cosine_similarity(p.float(), z.detach().float(), dim=-1)


def build_optimizer(module: nn.Module, weight_decay: float, child: str = "", factor: float = 1) -> torch.optim.SGD:
    """SGD with momentum 0.9; `set_learning_rate` sets the rate of each step. Matrices and convolutions decay; BatchNorm
    and biases, the 1-D parameters, do not. The child module of that name learns `factor` times as fast as all else, its
    groups' `scale`: BYOL's predictor, because one that is ahead keeps features from collapsing into few directions."""
    groups = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            scale = factor if name.startswith(f"{child}.") else 1
            groups.setdefault((p.ndim > 1, scale), []).append(p)
    return torch.optim.SGD([{"params": parameters, "weight_decay": weight_decay * decays, "scale": scale}
                            for (decays, scale), parameters in groups.items()], lr=0.0, momentum=0.9, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step: `rate` times the `scale` of each parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from 0 to `peak` over the warm-up, at most half of all steps, then half a cosine to 0 at `total_steps`."""
    warmup_steps = min(warmup_steps, total_steps // 2)
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (math.cos(math.pi * progress) + 1) / 2


def target_decay(step: int, total_steps: int, base: float) -> float:
    """tau of step k of K: 1 - (1 - base) (cos(pi k / K) + 1) / 2, from `base` at 0 to 1 at K."""
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


def embedding_spread(z: Tensor) -> Tensor:
    """Standard deviation over the batch of the normalised embeddings [N,D], averaged over the D dimensions. About
    1/sqrt(D) when they fill the sphere and 0 when all are the same (collapse); Chen & He 2021, section 4.1."""
    return F.normalize(z.detach().float(), dim=-1).std(dim=0).mean()


def effective_rank(features: Tensor) -> Tensor:
    """In how many directions features [N,D] vary, 1 to min(N - 1, D), whatever their scale. Exp of the entropy of the
    principal axes' shares of variance: Roy & Vetterli 2007, who take shares of the singular values. A collapse into few
    directions shows here, but not always in the spread, because the projector's BatchNorm widens whatever is left."""
    variance = torch.linalg.svdvals(features - features.mean(dim=0)).square()
    return torch.special.entr(variance / variance.sum().clamp(min=1e-30)).sum().exp()
