"""Denoisers D(x, sigma) around a diffusers UNet2DModel, and the probability-flow ODE in sigma (Karras et al. 2022).

dx/dsigma = (x - D(x, sigma)) / sigma. Two parametrisations of one class: EDM's preconditioning, for networks trained
here, and the VP noise prediction of DDPM checkpoints, read as a denoiser of x0 + sigma eps.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from workbench.errors import WorkbenchError

DenoiserFn = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), sigma (B,)) -> E[x0 | x], same shape


class PlaneNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A perceptron on points (B, D) with a UNet2DModel's call: net(x, t, return_dict=False)[0]."""

    @register_to_config
    def __init__(self, dimensions: int = 2, width: int = 128, layers: int = 3, frequencies: int = 4):
        super().__init__()
        widths = [dimensions + 2 * frequencies, *[width] * layers]
        hidden = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(width, dimensions))

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """x (B, D), t (B,) in the units of `Denoiser`'s noise code."""
        angle = 2 ** torch.arange(self.config["frequencies"], device=x.device) * t[:, None] / 100
        return (self.body(torch.cat([x, angle.sin(), angle.cos()], 1)),)


def small_unet(
    channels: tuple[int, ...] = (16, 32), *, size: int = 8, image_channels: int = 1, seed: int = 0
) -> UNet2DModel:
    """A fresh UNet2DModel for images of `size` px: one layer a block, attention in the middle only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=size, in_channels=image_channels, out_channels=image_channels, block_out_channels=channels,
            down_block_types=("DownBlock2D",) * len(channels), up_block_types=("UpBlock2D",) * len(channels),
            layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
        )  # fmt: skip


def fresh(net: Any, seed: int) -> Any:
    """A network of the same configuration with new weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(net).from_config(net.config)


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 1))


class Denoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out net(c_in x, c_noise).

    kind "edm": Karras et al. 2022, Table 1, c_noise = 25 ln sigma (theirs is ln(sigma) / 4: diffusers' positional
    embedding is made for times of some hundreds). kind "vp": `net` predicts the noise of a DDPM with `alphas_cumprod`
    (T,); sigma_t = sqrt((1 - abar_t) / abar_t) and c_noise is t, interpolated in ln sigma.
    """

    log_sigmas: Tensor

    def __init__(
        self, net: nn.Module, sigma_data: float, *, kind: Literal["edm", "vp"] = "edm",
        alphas_cumprod: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        if (kind == "vp") != (alphas_cumprod is not None):
            raise WorkbenchError('a "vp" denoiser, and no other, needs the schedule alphas_cumprod')
        self.net, self.sigma_data, self.kind = net, sigma_data, kind
        table = torch.zeros(1) if alphas_cumprod is None else 0.5 * torch.log((1 - alphas_cumprod) / alphas_cumprod)
        self.register_buffer("log_sigmas", table.float(), persistent=False)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise, each of sigma's shape (B,)."""
        data = self.sigma_data
        if self.kind == "edm":
            root = (sigma**2 + data**2).sqrt()
            return data**2 / root**2, sigma * data / root, 1 / root, 25 * sigma.log()
        table, wanted = self.log_sigmas, sigma.log().contiguous()
        upper = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        t = (upper - 1 + (wanted - low) / (high - low)).clamp(0, len(table) - 1)
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), t

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x0 + sigma eps = x] for x (B, ...), sigma (B,) > 0."""
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        out = self.net(_column(c_in, x) * x, c_noise, return_dict=False)[0]
        return _column(c_skip, x) * x + _column(c_out, x) * out.float()

    def copy(self) -> "Denoiser":
        """Its own weights, free to be trained."""
        return cast(Denoiser, copy.deepcopy(self)).requires_grad_(True)


def denoising(denoiser: DenoiserFn, x: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """Mean of (1/sigma^2 + 1/sigma_data^2) ||D(x + sigma noise, sigma) - x||^2: EDM's weight, and DMD's for s_fake."""
    weight = 1 / sigma**2 + 1 / sigma_data**2
    error = (denoiser(x + _column(sigma, x) * noise, sigma) - x).square()
    return (_column(weight, x) * error).mean()


def karras_sigmas(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """`steps` noise levels from `high` down to `low`, then 0: (steps + 1,). Karras et al. 2022, equation 5."""
    if steps < 1 or not 0 < low < high:
        raise WorkbenchError(f"a grid needs 1 step or more and 0 < low < high, got {steps} steps, {low} to {high}")
    share = torch.arange(steps) / max(1, steps - 1)
    grid = (high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([grid, torch.zeros(1)])


def ode_step(denoiser: DenoiserFn, x: Tensor, sigma: Tensor, to: Tensor, *, heun: bool = True) -> Tensor:
    """One step of the flow from `sigma` to `to` < sigma (B,), by Euler, or Heun where `to` > 0."""
    here, there = _column(sigma, x), _column(to, x)
    slope = (x - denoiser(x, sigma)) / here
    moved = x + (there - here) * slope
    if not heun or not bool((to > 0).any()):
        return moved
    last = there > 0  # D is not defined at sigma 0: those rows keep their Euler step
    again = (moved - denoiser(moved, torch.where(to > 0, to, sigma))) / torch.where(last, there, here)
    return torch.where(last, x + (there - here) * 0.5 * (slope + again), moved)


@torch.no_grad()
def ode_sample(denoiser: DenoiserFn, noise: Tensor, sigmas: Tensor, *, heun: bool = True) -> Tensor:
    """The flow from `noise` ~ N(0, sigmas[0]^2 I) to 0; n steps cost 2 n - 1 evaluations by Heun, n by Euler."""
    x = noise
    for high, low in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = ode_step(denoiser, x, high.expand(len(x)), low.expand(len(x)), heun=heun)
    return x


def evaluations(steps: int, *, heun: bool = True) -> int:
    """Denoiser evaluations (NFE) of ode_sample with `steps` steps."""
    return 2 * steps - 1 if heun else steps
