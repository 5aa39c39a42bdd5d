"""Losses of masked diffusion models, in nats: MDLM's weighted bound, its exact form, KLs at masked positions."""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from workbench.models.masked_diffusion import Denoiser, forward_noise, logits_at, weight

Divergence = Literal["forward", "reverse", "jeffreys"]


def token_losses(net: nn.Module, x: Tensor, masked: Tensor) -> Tensor:
    """-log p(x_i | the visible tokens) at the positions masked (B, L) bool, 0 elsewhere; (B, L) float32."""
    z = torch.where(masked, cast(Denoiser, net).vocabulary, x)
    log_p = logits_at(net, z, masked).log_softmax(-1)
    out = torch.zeros(x.shape, dtype=log_p.dtype, device=x.device)
    out[masked] = -log_p.gather(1, x[masked][:, None]).squeeze(1)
    return out


def mdlm_loss(net: nn.Module, x: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """MDLM's continuous-time objective (arXiv 2406.07524, eq. 10), nats a token: mean of sum_masked -log p / (t L).

    x (B, L), t (B,) in (0, 1].
    """
    z = forward_noise(x, t, cast(Denoiser, net).vocabulary, generator)
    losses = token_losses(net, x, z == cast(Denoiser, net).vocabulary)
    return (weight(t).to(x.device)[:, None] * losses).mean()


def spread_times(count: int, generator: torch.Generator) -> Tensor:
    """One time in each of `count` equal parts of (0, 1], shuffled by nothing: the loss's variance falls."""
    u = torch.rand(count, generator=generator)
    return ((torch.arange(count) + u) / count).clamp(1e-3, 1.0)


@torch.no_grad()
def elbo(net: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """The bound on -log p of each sequence, nats a token (B,): its integral over t in closed form.

    int_0^1 E[sum_masked -log p] dt / t = sum_k E[mean over a random set of k masked positions], k = 1..L: every k is
    computed, only the sets are drawn (one order of the positions a sequence).
    """
    rank = torch.rand(x.shape, generator=generator).argsort(1).argsort(1).to(x.device)
    total = torch.zeros(len(x), device=x.device)
    for k in range(1, x.shape[1] + 1):
        total += token_losses(net, x, rank < k).sum(1) / k
    return total / x.shape[1]


def divergence(log_teacher: Tensor, log_student: Tensor, kind: Divergence = "forward") -> Tensor:
    """Mean over rows of KL(teacher || student) ("forward"), KL(student || teacher) ("reverse"), or half their sum.

    Log-probabilities (M, V) each; the teacher's carries no gradient.
    """
    log_teacher = log_teacher.detach()
    gap = log_teacher - log_student
    forward, reverse = (log_teacher.exp() * gap).sum(-1), -(log_student.exp() * gap).sum(-1)
    rows = {"forward": forward, "reverse": reverse, "jeffreys": (forward + reverse) / 2}[kind]
    return rows.mean()
