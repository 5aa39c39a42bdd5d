"""A Stable-Diffusion-shaped UNet small enough for two cores, with softmax self-attention in its attn1 modules."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

CONTEXT_WIDTH = 8


def small_unet(channels: tuple[int, int] = (24, 40), *, size: int = 12, seed: int = 0) -> UNet2DConditionModel:
    """A fresh UNet2DConditionModel on RGB: attn1 at full resolution (3 of them) and at half (1), 2 heads each.

    It takes any even size; `size` is only recorded. No positional code anywhere, as in Stable Diffusion.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=size,
            in_channels=3,
            out_channels=3,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=channels,
            layers_per_block=1,
            cross_attention_dim=CONTEXT_WIDTH,
            attention_head_dim=2,  # diffusers reads this as the number of heads
            norm_num_groups=8,
        )


def no_prompt(batch: int) -> Tensor:
    """The context (B, 1, 8) of an unconditional model: ones, so that an adapter of cross-attention has a handle."""
    return torch.ones(batch, 1, CONTEXT_WIDTH)
