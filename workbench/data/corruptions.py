"""Degradations of images that an editor must undo: noise, a mask, grey inversion, blur, lost colour."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def noisy(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """x + strength eps; x (B, C, H, W) in [-1, 1]."""
    return x + strength * torch.randn(x.shape, generator=generator)


def inverted(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Grey levels turned towards their negative: strength 1 is -x."""
    return (1 - 2 * strength) * x


def blurred(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A share `strength` of the 3 x 3 mean of each pixel's neighbourhood."""
    smooth = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (1 - strength) * x + strength * smooth


def colourless(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A share `strength` of the mean over channels: what colourising starts from (grey images stay as they are)."""
    return (1 - strength) * x + strength * x.mean(1, keepdim=True)


CORRUPTIONS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "noise": noisy, "grey inversion": inverted, "blur": blurred, "no colour": colourless,
}  # fmt: skip


def box_mask(shape: torch.Size | tuple[int, ...], top: float, left: float, height: float, width: float) -> Tensor:
    """A mask (1, 1, H, W), True where a pixel is lost; the box is given in shares of the image."""
    h, w = shape[-2:]
    rows, columns = torch.arange(h)[:, None] / h, torch.arange(w)[None] / w
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return inside[None, None]
