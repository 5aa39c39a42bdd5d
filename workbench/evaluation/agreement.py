"""Do all windows of an image show the same swatch? Purity of its foreground pixels' nearest-palette class."""

import torch
import torch.nn.functional as F
from torch import Tensor

FOREGROUND = 0.25  # distance from the grey canvas, in units of [-1, 1], beyond which a pixel belongs to a window


def shares(images: Tensor, palette: Tensor) -> Tensor:
    """Share of every class among an image's foreground pixels. images (B, 3, H, W); returns (B, C).

    palette: (C, K, 3), K colours of each class, all in [-1, 1]; a pixel belongs to the class of the nearest colour.

    Its colour is first averaged over the foreground of its 3 x 3 neighbourhood, which evens out texture.
    An image without foreground has shares of zero.
    """
    inside = (images.square().sum(1, keepdim=True).sqrt() > FOREGROUND).float()
    weight = F.avg_pool2d(inside, 3, 1, 1)
    colour = F.avg_pool2d(images.clamp(-1, 1) * inside, 3, 1, 1) / weight.clamp(min=1e-6)
    nearest = torch.cdist(colour.flatten(2).mT, palette.flatten(0, 1)[None]).argmin(2) // palette.shape[1]
    votes = F.one_hot(nearest, len(palette)) * inside.flatten(1)[..., None]
    return votes.sum(1) / inside.sum((1, 2, 3)).clamp(min=1)[:, None]


def agreement(images: Tensor, palette: Tensor) -> Tensor:
    """Largest class share of each image, (B,): 1 when all windows show one swatch, 1/C and up for a mixture."""
    return shares(images, palette).amax(1)


def coverage(images: Tensor) -> Tensor:
    """Share of foreground pixels of each image, (B,): agreement says nothing about a canvas that stayed empty."""
    return (images.square().sum(1).sqrt() > FOREGROUND).float().mean((1, 2))
