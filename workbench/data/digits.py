"""Hand-written digits, 8 x 8 px, 1,797 of them (UCI, shipped with scikit-learn): a set of real images and its split."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from workbench.data.provenance import Provenance

TRAIN = 1300  # the rest is held out


@dataclass(frozen=True)
class Images:
    """Labelled images in two disjoint parts: pixels (N, C, H, W) float32 in [-1, 1], labels (N,) int64."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    provenance: Provenance

    @property
    def classes(self) -> int:
        """Number of labels."""
        return int(torch.cat([self.train_labels, self.held_out_labels]).max()) + 1


@cache
def load() -> Images:
    """The digits, shuffled once with a fixed seed and split 1,300 / 497; the same on every call."""
    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.data))
    pixels = torch.from_numpy(raw.data[order].astype(np.float32)).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(raw.target[order].astype(np.int64))
    provenance = Provenance(
        name="digits", package="scikit-learn", version=version("scikit-learn"), licence="CC BY 4.0 (UCI)",
        sha256=hashlib.sha256(np.ascontiguousarray(raw.data).tobytes()).hexdigest(),
        note=f"{TRAIN} to train on, {len(labels) - TRAIN} held out",
    )  # fmt: skip
    return Images(pixels[:TRAIN], labels[:TRAIN], pixels[TRAIN:], labels[TRAIN:], provenance)
