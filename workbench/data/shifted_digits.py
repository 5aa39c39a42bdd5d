"""Digits seen twice: upright for the teacher, turned, dim and noisy downstream; the turn is the dial of the gap.

scikit-learn's 1,797 handwritten digits (UCI, 8 x 8 pixels) are split by image first, so that no image the teacher has
seen is ever asked of a student.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from workbench.data.provenance import Provenance
from workbench.errors import WorkbenchError

SIDE, CLASSES = 8, 10


@dataclass(frozen=True)
class Images:
    """Pictures (n, 3, 8, 8) in [-1, 1] and their classes (n,); `numbers` are the digits' own rows in the data set."""

    pixels: Tensor
    labels: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """What the teacher saw (upright), its held-out part, and the downstream view of other images."""

    pretrain: Images
    original: Images
    train: Images
    validation: Images
    test: Images


@cache
def _digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images.astype(np.float32)) / 8 - 1
    return pixels[:, None], torch.from_numpy(bunch.target.astype(np.int64))


@cache
def provenance() -> Provenance:
    """Where the digits come from."""
    pixels, labels = _digits()
    digest = hashlib.sha256(pixels.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    return Provenance(
        "handwritten digits", "scikit-learn", version("scikit-learn"), "CC BY 4.0, UCI (Alpaydin, Kaynak)", digest,
        "1,797 pictures of 8 x 8 pixels",
    )  # fmt: skip


def turned(pixels: Tensor, degrees: Tensor, shift: Tensor | None = None) -> Tensor:
    """Pictures (n, 1, S, S) turned anticlockwise by degrees (n,) and moved by shift (n, 2) pixels; -1 comes in."""
    angle = degrees * math.pi / 180
    cos, sin = angle.cos(), angle.sin()
    move = torch.zeros(len(pixels), 2) if shift is None else shift * 2 / pixels.shape[-1]
    rows = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
    grid = F.affine_grid(rows, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels + 1, grid, align_corners=False) - 1


def load(
    *, gap: float = 0.5, seed: int = 0, pretrain: int = 900, train: int = 120, views: int = 3, turn: float = 15,
    noisy: bool = False, looks: int = 1,
) -> Split:  # fmt: skip
    """Digits split by image; downstream pictures are turned by 90 gap degrees, dimmed to 70 % and noisy.

    The teacher sees `views` jittered copies (`turn` degrees, 1 pixel) of `pretrain` images, dim and noisy as well where
    `noisy`; `train` images, as many of each class as can be, are the student's, `looks` noisy views of each; 250 are
    for validation, 200 for the teacher's own test, the rest are the test.
    Raises WorkbenchError for a gap outside [0, 1], or when too few images are left.
    """
    if not 0 <= gap <= 1:
        raise WorkbenchError(f"the gap lies between 0 (upright) and 1 (a quarter turn), got {gap}")
    pixels, labels = _digits()
    if pretrain + train + 250 + 200 > len(labels) - 100:
        raise WorkbenchError(f"{pretrain} + {train} images to learn from leave too few of {len(labels)} to test on")
    g = torch.Generator().manual_seed(1_000_003 * seed + 17)
    order = torch.randperm(len(labels), generator=g)
    # round robin over the classes, so that a small training set has them all
    place = torch.zeros(len(order), dtype=torch.long)
    for c in range(CLASSES):
        own = (labels[order] == c).nonzero()[:, 0]
        place[own] = torch.arange(len(own)) * CLASSES + c
    order = order[place.argsort()]
    student, rest = order[:train], order[train:]
    rest = rest[torch.randperm(len(rest), generator=g)]
    sizes = [pretrain, 200, 250, len(rest) - pretrain - 450]
    teacher, original, validation, test = rest.split(sizes)

    def dim(view: Tensor) -> Tensor:
        return ((view + 1) * 0.7 - 1 + 0.25 * torch.randn(view.shape, generator=g)).clamp(-1, 1)

    def images(view: Tensor, rows: Tensor) -> Images:
        return Images(view.expand(-1, 3, -1, -1).contiguous(), labels[rows], rows)

    def upright(rows: Tensor, copies: int) -> Images:
        rows = rows.repeat(copies)
        degrees = (torch.rand(len(rows), generator=g) * 2 - 1) * turn
        shift = torch.rand(len(rows), 2, generator=g) * 2 - 1
        view = turned(pixels[rows], degrees, shift)
        return images(dim(view) if noisy else view, rows)

    def downstream(rows: Tensor, copies: int = 1) -> Images:
        rows = rows.repeat(copies)
        return images(dim(turned(pixels[rows], torch.full((len(rows),), 90.0 * gap))), rows)

    learn = downstream(student, looks)
    return Split(upright(teacher, views), upright(original, 1), learn, downstream(validation), downstream(test))
