"""A mixture of isotropic Gaussians: data whose score is known in closed form at every noise level."""

import math

import torch
from torch import Tensor, nn


class GaussianMixture(nn.Module):
    """sum_k 1/K N(mean_k, sd^2 I); called as a denoiser it returns E[x | x + sigma eps], exactly.

    means: (K, D). The score at noise sigma is (self(y, sigma) - y) / sigma^2.
    """

    means: Tensor

    def __init__(self, means: Tensor, sd: float):
        super().__init__()
        self.register_buffer("means", means)
        self.sd = sd

    def draw(self, generator: torch.Generator, n: int) -> Tensor:
        """n samples (n, D)."""
        which = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.sd * noise

    def _logits(self, y: Tensor, variance: Tensor) -> Tensor:
        return -(y[:, None] - self.means).square().sum(-1) / (2 * variance)

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        """E[x | y] for y (B, D) = x + sigma eps, sigma (B,)."""
        noise = sigma[:, None].square()
        variance = self.sd**2 + noise
        r = self._logits(y, variance).softmax(-1)
        return (noise * (r @ self.means) + self.sd**2 * y) / variance

    def log_prob(self, y: Tensor, sigma: Tensor) -> Tensor:
        """Log density of x + sigma eps at y (B, D), in nats, (B,)."""
        variance = self.sd**2 + sigma[:, None].square()
        normaliser = 0.5 * self.means.shape[1] * torch.log(2 * math.pi * variance[:, 0])
        return self._logits(y, variance).logsumexp(-1) - math.log(len(self.means)) - normaliser


def ring(modes: int = 8, radius: float = 1.5, sd: float = 0.1, crowding: float = 1.0) -> GaussianMixture:
    """`modes` Gaussians of equal weight on a circle of the plane, evenly, or crowded to one side (crowding > 1).

    On an even ring, sending isotropic noise to the nearest mode already gives every mode its share; on a crowded one it
    does not, and only a method that knows the distribution gets the shares right.
    """
    angle = 2 * math.pi * (torch.arange(modes) / modes) ** crowding
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), sd)
