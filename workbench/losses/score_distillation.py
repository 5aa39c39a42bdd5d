"""Terms that distil a score into a one-step generator: distribution matching, consistency, regression, denoising."""

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.losses.idempotent import Norm, distance
from workbench.models.edm import DenoiserFn


@torch.no_grad()
def score_difference(
    fz: Tensor, sigma: Tensor, noise: Tensor, fake: DenoiserFn, real: DenoiserFn, *, normalise: bool = True
) -> Tensor:
    """The direction g in which DMD moves f(z), of its shape: D_fake(x_t) - D_real(x_t) at x_t = f(z) + sigma noise.

    That is sigma^2 (s_fake - s_real). normalise: divided by mean |f(z) - D_real(x_t)| of each sample (DMD, equation 8),
    which evens out the noise levels; without it, g / sigma^2 averaged over noise is the gradient of the reverse KL
    divergence of the two noised distributions in f(z).
    """
    xt = fz + sigma.view(-1, *[1] * (fz.dim() - 1)) * noise
    d_real = real(xt, sigma)
    g = fake(xt, sigma) - d_real
    if normalise:
        g = g / (fz - d_real).abs().flatten(1).mean(1).clamp(min=1e-6).view(-1, *[1] * (fz.dim() - 1))
    return torch.nan_to_num(g)


def distribution_matching(fz: Tensor, g: Tensor) -> Tensor:
    """L_dmd = 1/2 mean ||f(z) - sg(f(z) - g)||^2: its gradient in f(z) is g over the number of elements."""
    return 0.5 * F.mse_loss(fz.float(), (fz - g).detach().float())


def flow_consistency(f_high: Tensor, f_low: Tensor, norm: Norm = "l2") -> Tensor:
    """L_flow = D(f(x_{n+1}), sg f'(x_n)): two points of one trajectory of the teacher's flow go to the same place."""
    return distance(f_high, f_low.detach(), norm).mean()


def regression(fz: Tensor, target: Tensor, norm: Norm = "l2") -> Tensor:
    """L_reg = D(f(z), ODE(z)) on stored pairs of noise and the teacher's sample from it."""
    return distance(fz, target, norm).mean()


def projection(f_noisy: Tensor, x: Tensor, norm: Norm = "l2") -> Tensor:
    """L_denoise = D(f(x + sigma eps), x)."""
    return distance(f_noisy, x, norm).mean()
