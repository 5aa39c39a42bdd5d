"""A generator f from data space to data space, without a time input, meant to satisfy f(f(z)) = f(z); and its uses.

f(x) = skip u + scale net(u, time), u = x / sqrt(mean(x^2) + sigma_data^2), with constants skip, scale and time.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workbench.errors import WorkbenchError
from workbench.models.edm import Denoiser
from workbench.models.hub import load_pretrained


class Idempotent(nn.Module):
    """f of a network that once was a denoiser, its noise level held at one constant.

    The input is brought to the scale the network knows by its own root mean square: clean images and pure noise of
    sigma_max both come in. Without that (normalise=False, the constant level's own scale) noise saturates the network.
    """

    def __init__(
        self, net: nn.Module, *, sigma_data: float, time: float, scale: float, skip: float = 0.0, level: float = 1.0,
        normalise: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.net, self.sigma_data, self.time = net, sigma_data, time
        self.scale, self.skip, self.level, self.normalise = scale, skip, level, normalise

    def forward(self, x: Tensor) -> Tensor:
        """f(x), float32, for x (B, ...) of any noise level."""
        dims = tuple(range(1, x.dim()))
        size = x.square().mean(dims, keepdim=True) if self.normalise else self.level**2
        u = x / (size + self.sigma_data**2) ** 0.5
        t = torch.full((len(x),), self.time, device=x.device)
        return self.skip * u + self.scale * self.net(u, t, return_dict=False)[0].float()


def from_denoiser(denoiser: Denoiser, level: float, *, skip: bool = False, normalise: bool = True) -> Idempotent:
    """f with the denoiser's weights, its noise input held at `level`.

    skip: keep the denoiser's c_skip x as well, so that f starts as a denoising step; a noise-predicting ("vp") network
    needs it, an EDM network (whose output is near the image itself) does without, and leaks no noise from its input.
    """
    if denoiser.kind == "vp" and not skip:
        raise WorkbenchError('a "vp" network predicts noise: f needs the skip connection (skip=true)')
    c_skip, c_out, c_in, c_noise = (float(c) for c in denoiser.coefficients(torch.tensor([level])))
    net = copy.deepcopy(denoiser.net).requires_grad_(True)
    return Idempotent(
        net, sigma_data=denoiser.sigma_data, time=c_noise, scale=c_out if skip else denoiser.sigma_data,
        skip=c_skip / c_in if skip else 0.0, level=level, normalise=normalise,
    )  # fmt: skip


def frozen(f: nn.Module, x: Tensor) -> Tensor:
    """f_theta'(x): the present weights as constants, so that a gradient flows through x alone."""
    constants = {name: p.detach() for name, p in f.named_parameters()}
    return functional_call(f, constants, (x,))


def _whole(times: int) -> None:
    if times < 1:
        raise WorkbenchError(f"f is applied once or more (NFE), got {times}")


@torch.no_grad()
def reapply(f: nn.Module, x: Tensor, times: int) -> list[Tensor]:
    """[f(x), f(f(x)), ...], `times` of them. Raises WorkbenchError for none."""
    _whole(times)
    out = []
    for _ in range(times):
        x = f(x)
        out.append(x)
    return out


@torch.no_grad()
def renoise(f: nn.Module, z: Tensor, sigmas: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """[f(z), f(x_1 + sigma_1 eps), f(x_2 + sigma_2 eps), ...]: one application a level, after the first.

    Raises WorkbenchError for a negative level.
    """
    if any(sigma < 0 for sigma in sigmas):
        raise WorkbenchError(f"noise put back has a level of 0 or more, got {min(sigmas):g}")
    out = [f(z)]
    for sigma in sigmas:
        noise = torch.randn(z.shape, generator=generator).to(z)
        out.append(f(out[-1] + sigma * noise))
    return out


@torch.no_grad()
def inpaint(
    f: nn.Module, x: Tensor, lost: Tensor, times: int, generator: torch.Generator, *, noise: float = 0.0
) -> list[Tensor]:
    """Fill the pixels where `lost` is True: grey (plus noise) there, then f and the known pixels back, `times` over."""
    _whole(times)
    y = torch.where(lost, noise * torch.randn(x.shape, generator=generator).to(x), x)
    out = []
    for _ in range(times):
        y = torch.where(lost, f(y), x)
        out.append(y)
    return out


_CONSTANTS = ("sigma_data", "time", "scale", "skip", "level", "normalise")


def save(f: Idempotent, folder: Path) -> None:
    """The network as a diffusers folder, and f's constants in idempotent.json beside it."""
    f.net.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator, union-attr]
    rule = "f(x) = skip * u + scale * net(u, time), u = x / sqrt(mean(x^2) + sigma_data^2)"
    constants: dict[str, Any] = {name: getattr(f, name) for name in _CONSTANTS}
    (folder / "idempotent.json").write_text(json.dumps({"rule": rule, **constants}, indent=1) + "\n")


def load(cls: Any, folder: Path) -> Idempotent:
    """What `save` wrote; cls: the network's class (UNet2DModel). Raises WorkbenchError."""
    try:
        constants = json.loads((folder / "idempotent.json").read_text())
        kept = {name: constants[name] for name in _CONSTANTS}
    except (OSError, ValueError, KeyError) as error:
        raise WorkbenchError(f"{folder} holds no student: idempotent.json is missing or damaged ({error})") from None
    return Idempotent(load_pretrained(cls, str(folder)), **kept)
