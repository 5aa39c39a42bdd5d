"""Stable Diffusion (1.x, 2.x, XL) as a task to distil: frozen UNet, cached VAE latents and text states, prompts."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from workbench.data.hub import ImageCaptions, hub_dataset
from workbench.models.diffusion import Condition, Task
from workbench.models.hub import load_pretrained


class Encoder:
    """A pipeline's VAE and text encoders: images to latents and back, prompts to the UNet's keyword arguments."""

    def __init__(self, pipe: Any):
        self.pipe, self.vae = pipe, pipe.vae
        self.xl = pipe.unet.config.addition_embed_type == "text_time"
        self.factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to scaled latents (B, C, H/f, W/f): the mode of the VAE's posterior."""
        vae = self.vae
        mode = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        return ((mode - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).float().cpu()

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Latents back to images in [-1, 1]."""
        vae = self.vae
        z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(z).sample.float().clamp(-1, 1)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str], side: int) -> dict[str, Any]:
        """Text states (B, T, D), and for XL the pooled text and the size conditioning of an uncropped square."""
        states = self.pipe.encode_prompt(
            list(prompts), device=self.pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        out: dict[str, Any] = {"encoder_hidden_states": states[0].float().cpu()}
        if self.xl:
            sizes = torch.tensor([[side, side, 0, 0, side, side]]).float().repeat(len(prompts), 1)
            out["added_cond_kwargs"] = {"text_embeds": states[2].float().cpu(), "time_ids": sizes}
        return out


class CachedPairs:
    """Captioned images as latents and text states, encoded when first drawn and then kept on disk in half precision."""

    def __init__(self, pairs: ImageCaptions, encoder: Encoder, folder: Path | None):
        self.pairs, self.encoder, self.folder = pairs, encoder, folder

    def _file(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{index // 1000:05d}" / f"{index:08d}.safetensors"

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self._file(index)
        if path and path.exists():
            return {name: t.float() for name, t in load_file(path).items()}
        image, caption = self.pairs[index]
        condition = self.encoder.prompts([caption], self.pairs.size)
        flat = {"latent": self.encoder.latents(image[None])[0], "states": condition["encoder_hidden_states"][0]}
        flat |= {name: t[0] for name, t in condition.get("added_cond_kwargs", {}).items()}
        half = {name: t.half().contiguous() for name, t in flat.items()}
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            save_file(half, partial)
            os.replace(partial, path)
        return {name: t.float() for name, t in half.items()}  # the same whether it was cached or not

    def draw(self, generator: torch.Generator, batch: int) -> tuple[Tensor, Condition]:
        """A batch with replacement: latents (B, C, h, w) and the UNet's keyword arguments."""
        chosen = torch.randint(len(self.pairs), (batch,), generator=generator).tolist()
        rows = [self[i] for i in chosen]
        joined = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        condition: dict[str, Any] = {"encoder_hidden_states": joined["states"]}
        if "text_embeds" in joined:
            condition["added_cond_kwargs"] = {name: joined[name] for name in ("text_embeds", "time_ids")}
        return joined["latent"], condition


def latent_task(
    model: str, data: str, *, size: int, image: str = "image", caption: str = "text",
    crop: Literal["squash", "centre"] = "squash", prompts: Sequence[str] = (), cache: Path | None = None,
) -> Task:  # fmt: skip
    """A frozen Stable Diffusion model (Hub id or folder) and a captioned image set (Hub id or folder) as a Task.

    cache: folder for latents and text states (None: nothing is kept). On a GPU the teacher runs in bfloat16. Raises
    WorkbenchError in one line when the model or the data cannot be had.
    """
    gpu = torch.cuda.is_available()
    pipe = load_pretrained(DiffusionPipeline, model, dtype=torch.bfloat16 if gpu else torch.float32)
    pipe.to("cuda" if gpu else "cpu")
    pipe.vae.enable_tiling()
    encoder = Encoder(pipe)
    rows = hub_dataset(data, columns=(image, caption))
    key = hashlib.sha256(f"{model} {data} {crop}".encode()).hexdigest()[:12]
    sets: dict[int, CachedPairs] = {}

    def draw(generator: torch.Generator, batch: int, side: int) -> tuple[Tensor, Condition]:
        if side not in sets:
            pairs = ImageCaptions(rows, size=side, image=image, caption=caption, crop=crop)
            sets[side] = CachedPairs(pairs, encoder, cache / "latents" / f"{key}-{side}" if cache else None)
        return sets[side].draw(generator, batch)

    def repeated(texts: Sequence[str]) -> Any:
        return lambda batch: tree_map(
            lambda c: c[torch.arange(batch) % len(c)], encoder.prompts(list(texts) or [""], size)
        )  # fmt: skip

    return Task(
        unet=pipe.unet.eval().requires_grad_(False),
        scheduler=DDIMScheduler.from_config(pipe.scheduler.config),
        draw=draw, condition=repeated(prompts), empty=repeated([""]), decode=encoder.images,
        shape=lambda side: (pipe.unet.config.in_channels, side // encoder.factor, side // encoder.factor),
    )  # fmt: skip
