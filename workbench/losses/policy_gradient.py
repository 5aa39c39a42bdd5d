"""REINFORCE: advantages with a leave-one-out baseline, and the log-densities they weigh."""

import math
from typing import Literal

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

Baseline = Literal["leave one out", "batch mean", "none"]


def advantages(rewards: Tensor, baseline: Baseline = "leave one out") -> Tensor:
    """A (B, G) of rewards r (B, G), G samples a prompt: r_g minus the mean of the other G - 1 (Kool et al., 2019).

    "batch mean" subtracts the mean of all G, the sample's own reward included, which scales the gradient by (G - 1)/G;
    "none" keeps r. No division by the standard deviation. Raises WorkbenchError: one sample has no others.
    """
    if baseline == "none":
        return rewards
    if baseline == "batch mean":
        return rewards - rewards.mean(1, keepdim=True)
    g = rewards.shape[1]
    if g < 2:
        raise WorkbenchError("a leave-one-out baseline needs 2 samples a prompt or more")
    return (rewards - rewards.mean(1, keepdim=True)) * (g / (g - 1))


def gaussian_log_density(x: Tensor, mean: Tensor, sigma: float | Tensor, *, normalised: bool = True) -> Tensor:
    """log N(x; mean, sigma² I) over the last axis; without the constant -d log(sigma sqrt(2 pi)) if not normalised."""
    out = -(x - mean).square().sum(-1) / (2 * sigma**2)
    if not normalised:
        return out
    return out - x.shape[-1] * (torch.as_tensor(sigma, dtype=out.dtype).log() + 0.5 * math.log(2 * math.pi))


def token_log_probability(tokens: Tensor, logits: Tensor, tau: float = 1.0) -> Tensor:
    """log softmax(logits / tau)[token]; tokens (...), logits (..., V)."""
    return (logits / tau).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
