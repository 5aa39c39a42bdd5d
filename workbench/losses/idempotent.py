"""The terms of an idempotent generator (IGN, arXiv 2311.01462), each on networks' outputs; a mean over the batch.

f' stands for the present weights held constant. Which argument carries a gradient is the caller's business and is
said at each term; nothing is detached here.
"""

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l1", "l2"]


def distance(a: Tensor, b: Tensor, norm: Norm = "l2") -> Tensor:
    """D(a, b) per sample, (B,): the mean absolute or squared difference of (B, ...)."""
    gap = (a.float() - b.float()).flatten(1)
    return gap.abs().mean(1) if norm == "l1" else gap.square().mean(1)


def reconstruction(fx: Tensor, x: Tensor, norm: Norm = "l2") -> Tensor:
    """L_rec = D(f(x), x): data are fixed points."""
    return distance(fx, x, norm).mean()


def idempotence(ffz: Tensor, fz: Tensor, norm: Norm = "l2") -> Tensor:
    """L_idem = D(f'(f(z)), f(z)): moves f(z) onto the set of fixed points, not that set onto f(z)."""
    return distance(ffz, fz, norm).mean()


def tightness(ffz: Tensor, fz: Tensor, *, bound: Tensor | None = None, clamp: float = 1.5, norm: Norm = "l2") -> Tensor:
    """L_tight = -D(f(f'(z)), f'(z)): expels generated points that are not data; only the outer f learns.

    bound: D(f(x), x) per sample, (B,), with its gradient: IGN's smooth clamp a L_rec tanh(L_tight / (a L_rec)) then
    keeps the term above -a L_rec. None: the bare term, which has no lower bound.
    """
    tight = -distance(ffz, fz, norm)
    if bound is not None:
        limit = clamp * bound.clamp(min=1e-8)
        tight = limit * torch.tanh(tight / limit)
    return tight.mean()
