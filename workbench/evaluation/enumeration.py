"""Exact laws of a masked-diffusion sampler on a world small enough to list: float64, differentiable, no draws.

Clean strings x: V^L of them; states z: (V + 1)^L, the digit V being the mask. A jump t → s is a matrix over states.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.models.masked_diffusion import Denoiser, alpha, logits_at


def listing(symbols: int, length: int) -> Tensor:
    """All strings of `symbols` digits, (symbols^length, length) int64, in counting order."""
    return torch.tensor(list(itertools.product(range(symbols), repeat=length)))


def index_of(strings: Tensor, symbols: int) -> Tensor:
    """The place of each string (N, L) in `listing`, (N,)."""
    powers = symbols ** torch.arange(strings.shape[1] - 1, -1, -1)
    return (strings * powers).sum(1)


def token_table(net: nn.Module, length: int) -> Tensor:
    """p(x_i = v | z) of every state, (S, L, V) float64; a visible token is certain."""
    v = cast(Denoiser, net).vocabulary
    states = listing(v + 1, length)
    masked = states == v
    table = F.one_hot(states.clamp(max=v - 1), v).double()
    return table.masked_scatter(masked[..., None].expand_as(table), logits_at(net, states, masked).double().softmax(-1))


def jump_matrix(table: Tensor, t: float, s: float) -> Tensor:
    """P(z_s | z_t) of one reverse jump, (S, S) float64, from token_table (S, L, V)."""
    _, length, v = table.shape
    states = listing(v + 1, length)
    masked = (states == v)[..., None]
    stay = s / t
    # each position by itself: a masked one stays masked with s/t, a visible one is certain
    reveal = table * (1 - stay * masked.double())
    to = torch.cat([reveal, masked.double() * stay], -1)  # (S, L, V + 1)
    out = torch.ones(len(states), len(states), dtype=torch.float64)
    for i in range(length):
        out = out * to[:, i, states[:, i]]
    return out


def sampler_law(table: Tensor, times: Sequence[float]) -> Tensor:
    """The law of clean strings, (V^L,), of jumps from all masked at 1 through `times` (the last one 0)."""
    _, length, v = table.shape
    states = listing(v + 1, length)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1.0  # the last state is all masks
    now = 1.0
    for s in times:
        law = law @ jump_matrix(table, now, s)
        now = s
    return law[(states < v).all(1)]


def step_law(table: Tensor, steps: int) -> Tensor:
    """The law of clean strings after `steps` equal steps."""
    return sampler_law(table, [1 - (i + 1) / steps for i in range(steps - 1)] + [0.0])


def noised(law: Tensor, t: float, vocabulary: int, length: int) -> Tensor:
    """q(z_t), (S,), of a law of clean strings (V^L,) pushed through the forward noise."""
    clean, states = listing(vocabulary, length), listing(vocabulary + 1, length)
    a = float(alpha(torch.tensor(t, dtype=torch.float64)))
    out = torch.ones(len(clean), len(states), dtype=torch.float64)
    for i in range(length):
        same = clean[:, i, None] == states[None, :, i]
        hidden = (states[:, i] == vocabulary)[None]
        out = out * (hidden.double() * (1 - a) + same.double() * a)
    return law @ out


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), nats; where p is 0 nothing is counted."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum()
