"""A DDPM of the Hub (google/ddpm-cifar10-32 and its like) read as a denoiser of x + sigma eps."""

from pathlib import Path

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from workbench.errors import WorkbenchError
from workbench.models.edm import Denoiser
from workbench.models.hub import load_pretrained


def load_denoiser(model: str, size: int, channels: int) -> Denoiser:
    """The frozen denoiser of an unconditional DDPM: UNet and scheduler at the root, or in unet/ and scheduler/.

    Raises WorkbenchError: it cannot be had, was made for another size or other channels, or does not predict noise.
    """
    nested = (Path(model) / "unet").is_dir()
    unet = load_pretrained(UNet2DModel, model, **({"subfolder": "unet"} if nested else {}))
    schedule = load_pretrained(DDIMScheduler, model, **({"subfolder": "scheduler"} if nested else {}))
    side, got = unet.config["sample_size"], unet.config["in_channels"]
    side = side[0] if isinstance(side, list | tuple) else side
    if (side, got) != (size, channels):
        raise WorkbenchError(
            f"the teacher {model!r} works at {side} px with {got} channels, the run at {size} px with {channels}: "
            "set size and channels, or choose another teacher"
        )
    if schedule.config["prediction_type"] != "epsilon":
        raise WorkbenchError(f"the teacher {model!r} predicts {schedule.config['prediction_type']!r}, not the noise")
    denoiser = Denoiser(unet, 0.5, kind="vp", alphas_cumprod=schedule.alphas_cumprod)
    return denoiser.eval().requires_grad_(False)
