"""How near generated samples are to data: Fréchet distance, precision and recall, coverage, energy distance, copies.

Feature distances take (N, D) features of any network. They are named for what they are: a Fréchet distance over the
features of a small classifier trained here is not FID, which is defined by Inception-v3.
"""

import math

import numpy as np
import torch
from torch import Tensor

from workbench.errors import WorkbenchError


def frechet(a: Tensor, b: Tensor) -> float:
    """||mean_a - mean_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two feature sets (N, D), in squared feature units.

    Infinite where a feature is not finite (a generator that diverged). Raises WorkbenchError for under two samples.
    """
    if min(len(a), len(b)) < 2:
        raise WorkbenchError("a Fréchet distance needs two samples or more on both sides")
    x, y = (f.double().cpu().numpy() for f in (a, b))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.inf
    cx, cy = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (x, y))
    # the trace of a square root is the sum of the roots of the eigenvalues, defined for singular covariances too
    root = np.sqrt(np.linalg.eigvals(cx @ cy).real.clip(min=0)).sum()
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(cx + cy) - 2 * root)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fakes within the real manifold, and of reals within the fakes' (Kynkäänniemi et al. 2019).

    The manifold of a set is the union of balls around its points that reach to the k-th nearest other point.
    """

    def inside(points: Tensor, manifold: Tensor) -> float:
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
        return (torch.cdist(points, manifold) <= radius).any(1).float().mean().item()

    real, fake = real.flatten(1).double(), fake.flatten(1).double()
    return inside(fake, real), inside(real, fake)


def nearest(samples: Tensor, train: Tensor) -> Tensor:
    """Root-mean-square distance per element of each sample to its nearest training example, (N,)."""
    gap = torch.cdist(samples.flatten(1), train.flatten(1)).amin(1)
    return gap / samples[0].numel() ** 0.5


def class_entropy(logits: Tensor) -> float:
    """Entropy of the histogram of predicted classes, in nats: ln C when every class is generated equally often."""
    share = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).double() / len(logits)
    return float(-(share * share.clamp(min=1e-12).log()).sum())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| over all pairs of two sets (N, D), (M, D); 0 for equal distributions.

    Unbiased: a pair of a point with itself is left out, so that it may come out slightly negative.
    """
    a, b = a.double(), b.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    within = sum(torch.cdist(x, x).sum().item() / (len(x) * (len(x) - 1)) for x in (a, b))
    return 2 * torch.cdist(a, b).mean().item() - within


def modes(samples: Tensor, means: Tensor, sd: float, *, reach: float = 3.0, least: float = 0.02) -> tuple[int, float]:
    """Modes with at least the share `least` of the samples within `reach` sd, and the share of samples in any."""
    gap, which = torch.cdist(samples, means).min(1)
    inside = gap <= reach * sd
    share = torch.bincount(which[inside], minlength=len(means)) / len(samples)
    return int((share >= least).sum()), inside.float().mean().item()


def idempotence_error(fx: Tensor, ffx: Tensor) -> float:
    """||f(f(z)) - f(z)|| / ||f(z)||, norms over the whole batch. A constant and the identity have none: never alone."""
    return ((ffx - fx).norm() / fx.norm().clamp(min=1e-12)).item()
