"""Hand-written digits, 8 x 8 px, 1,797 of them (UCI, shipped with scikit-learn): a set of real images and its split."""

import colorsys
import hashlib
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from workbench.data.provenance import Provenance

TRAIN, VALIDATION = 1300, 147  # the rest, 350, is the test part

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Images:
    """Labelled images in three disjoint parts: pixels (N, C, H, W) float32 in [-1, 1], labels (N,) int64.

    train: to fit on; validation: to choose settings by; test: for what is reported.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor
    provenance: Provenance

    def held_out(self, split: Split) -> tuple[Tensor, Tensor]:
        """Pixels and labels of a part that is not trained on."""
        if split == "validation":
            return self.validation, self.validation_labels
        return self.test, self.test_labels

    @property
    def classes(self) -> int:
        """Number of labels."""
        return int(torch.cat([self.train_labels, self.validation_labels, self.test_labels]).max()) + 1


@cache
def load() -> Images:
    """The digits, shuffled once with a fixed seed and split 1,300 / 147 / 350; the same on every call."""
    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.data))
    pixels = torch.from_numpy(raw.data[order].astype(np.float32)).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(raw.target[order].astype(np.int64))
    provenance = Provenance(
        name="digits", package="scikit-learn", version=version("scikit-learn"), licence="CC BY 4.0 (UCI)",
        sha256=hashlib.sha256(np.ascontiguousarray(raw.data).tobytes()).hexdigest(),
        note=f"{TRAIN} to train on, {VALIDATION} for validation, {len(labels) - TRAIN - VALIDATION} to test on",
    )  # fmt: skip
    sizes = [TRAIN, VALIDATION, len(labels) - TRAIN - VALIDATION]
    train, validation, test = zip(pixels.split(sizes), labels.split(sizes), strict=True)
    return Images(*train, *validation, *test, provenance)


INKS = torch.tensor([colorsys.hsv_to_rgb(label / 10, 1.0, 1.0) for label in range(10)])
INKS = INKS / INKS.sum(1, keepdim=True)  # (10, 3); one grey value, so that lost colour leaves no trace of the class


@cache
def tinted() -> Images:
    """The digits in coloured ink on black, (N, 3, 8, 8): the shapes are real, the colours are ours, a hue a class.

    All inks have the same mean over channels: what is left without colour tells the class by its shape alone.
    """
    plain = load()

    def ink(pixels: Tensor, labels: Tensor) -> Tensor:
        return (pixels + 1) * INKS[labels][:, :, None, None] - 1

    return replace(
        plain, train=ink(plain.train, plain.train_labels), validation=ink(plain.validation, plain.validation_labels),
        test=ink(plain.test, plain.test_labels),
        provenance=replace(plain.provenance, name="tinted digits", note=f"{plain.provenance.note}; coloured by class"),
    )  # fmt: skip
