"""Diffusion in a diffusers scheduler's terms: targets, conversions, DDIM sampling at any size, guidance, SDEdit.

z_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps. Networks predict eps, v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0, or x0.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from workbench.errors import WorkbenchError

Condition = Mapping[str, Any]  # a UNet's keyword arguments: encoder_hidden_states (B, T, D), SDXL's added_cond_kwargs


@dataclass(frozen=True)
class Task:
    """A frozen diffusion model, its schedule and its data: all that a distillation needs to know.

    draw(generator, batch, side): clean (latent) images (B, C, H, W) for canvases of `side` px, and their condition.
    condition(batch): what to sample under; empty(batch): the empty prompt's, for guidance.
    decode: latents to images (B, 3, H, W) in [-1, 1]. shape(side): (C, H, W) of the latents of a canvas.
    """

    unet: nn.Module
    scheduler: DDIMScheduler
    draw: Callable[[torch.Generator, int, int], tuple[Tensor, Condition]]
    condition: Callable[[int], Condition]
    empty: Callable[[int], Condition]
    decode: Callable[[Tensor], Tensor]
    shape: Callable[[int], tuple[int, int, int]]


def cosine_schedule(steps: int = 1000, prediction: str = "v_prediction") -> DDIMScheduler:
    """Cosine abar_t (Nichol and Dhariwal 2021) over `steps` times, sampled from the last one down (trailing)."""
    return DDIMScheduler(
        num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2", prediction_type=prediction,
        clip_sample=False, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip


def prediction_type(scheduler: DDIMScheduler) -> str:
    """ "epsilon", "v_prediction" or "sample"."""
    return str(scheduler.config["prediction_type"])


def _coefficients(scheduler: DDIMScheduler, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t), sqrt(1 - abar_t), shaped (B, 1, ...) like `like`."""
    abar = scheduler.alphas_cumprod.to(like.device)[t].to(like.dtype).view(-1, *[1] * (like.dim() - 1))
    return abar.sqrt(), (1 - abar).sqrt()


def add_noise(scheduler: DDIMScheduler, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t of x0 (B, ...) at times t (B,), integers in 0..T-1."""
    signal, sigma = _coefficients(scheduler, t, x0)
    return signal * x0 + sigma * noise


def target(scheduler: DDIMScheduler, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network is to predict: eps, v or x0, by the scheduler's prediction_type."""
    kind = prediction_type(scheduler)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    signal, sigma = _coefficients(scheduler, t, x0)
    return signal * noise - sigma * x0


def to_x0_and_noise(scheduler: DDIMScheduler, output: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The (x0, eps) that a network's output at z_t stands for; abar_t must lie strictly between 0 and 1."""
    signal, sigma = _coefficients(scheduler, t, z)
    kind = prediction_type(scheduler)
    if kind == "epsilon":
        return (z - sigma * output) / signal, output
    if kind == "sample":
        return output, (z - signal * output) / sigma
    return signal * z - sigma * output, sigma * z + signal * output


def predict(unet: nn.Module, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The network's output for z (B, C, H, W), float32, computed on the network's device and in its precision."""
    weight = next(p for p in unet.parameters() if p.is_floating_point())

    def there(x: Any) -> Any:
        return x.to(weight.device, weight.dtype) if isinstance(x, Tensor) else x

    return unet(there(z), t.to(weight.device), **tree_map(there, dict(condition))).sample.float()


@torch.no_grad()
def sample(
    unet: nn.Module,
    scheduler: DDIMScheduler,
    noise: Tensor,
    condition: Condition,
    *,
    steps: int = 25,
    guidance: float = 1.0,
    empty: Condition | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """DDIM (eta = 0) from `noise` (B, C, H, W), any H and W the UNet takes; deterministic. Returns x0, float32.

    condition: the UNet's keyword arguments, for each of the B images. guidance w > 1, with those of the `empty` prompt:
    out = out_empty + w (out - out_empty).
    start, strength (SDEdit): begin at the last `strength` share of the steps, from `start` noised to that time.
    Raises WorkbenchError for guidance without `empty`, or a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise WorkbenchError(f"strength is a share of the noise steps in (0, 1], got {strength}")
    own = copy.deepcopy(scheduler)  # set_timesteps would change the caller's
    own.set_timesteps(steps)
    device = next(unet.parameters()).device
    noise, start = noise.to(device), None if start is None else start.to(device)
    times = own.timesteps[steps - max(1, round(strength * steps)) :].to(device)
    z = noise
    if start is not None:
        z = add_noise(scheduler, start, noise, times[:1].expand(len(noise)))
    for i, t in enumerate(times):
        if guidance == 1.0:
            out = predict(unet, z, t, condition)
        elif empty is None:
            raise WorkbenchError("guidance needs the condition of the empty prompt to guide away from")
        else:
            joined = tree_map(lambda a, b: torch.cat([a, b]), dict(empty), dict(condition))
            both = predict(unet, torch.cat([z, z]), t, joined)
            without, with_ = both.chunk(2)
            out = without + guidance * (with_ - without)
        z = own.step(out, int(t), z, return_dict=False)[0]
        if on_step:
            on_step(i, z)
    return z


def ladder(
    unet: nn.Module,
    scheduler: DDIMScheduler,
    image: Tensor,
    condition: Condition,
    strengths: list[float],
    generator: torch.Generator,
    *,
    steps: int = 25,
) -> list[Tensor]:
    """SDEdit ladder (LinFusion's high-resolution path): twice the side, re-noise, denoise, once per strength.

    image: (B, C, H, W). Returns the image at every rung, the given one first.
    """
    rungs = [image]
    for strength in strengths:
        larger = F.interpolate(rungs[-1], scale_factor=2, mode="bicubic", align_corners=False)
        noise = torch.randn(larger.shape, generator=generator)
        rungs.append(
            sample(unet, scheduler, noise.to(larger), condition, steps=steps, start=larger, strength=strength)
        )  # fmt: skip
    return rungs
