"""Labelled pictures of any Hub data set or folder, decoded when they are asked for, and split for a downstream task."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from workbench.data.hub import hub_dataset
from workbench.data.provenance import Provenance
from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Rows:
    """Some rows of Pictures: inputs {"pixel_values": (n, 3, S, S) in [-1, 1]} and classes (n,) int64."""

    pictures: "Pictures"
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Decode these rows."""
        numbers = self.numbers[rows].tolist()
        pixels = torch.stack([self.pictures.pixels(i) for i in numbers])
        return {"pixel_values": pixels}, self.pictures.targets[self.numbers[rows]]


class Pictures:
    """A data set with a column of images and one of classes: parquet, jsonl with images, or a folder a class.

    size: side in pixels that every image is resized to. Raises WorkbenchError: wrong column, empty, not an image,
    fewer than two classes.
    """

    def __init__(self, id: str, *, image: str = "image", label: str = "label", size: int):
        self.data = hub_dataset(id, columns=(image, label))
        self.image, self.size = image, size
        column = self.data[label]
        feature = self.data.features[label]
        if None in column:
            raise WorkbenchError(f"{id}: column {label!r} has rows without a class")
        names: Sequence[Any] = getattr(feature, "names", None) or sorted(set(column))
        place = {name: i for i, name in enumerate(names)}
        classes = [c if isinstance(c, int) and hasattr(feature, "names") else place[c] for c in column]
        self.targets = torch.tensor(classes)
        self.labels = tuple(str(name) for name in names)
        if len(self.targets.unique()) < 2:
            raise WorkbenchError(f"{id}: column {label!r} holds one class only, there is nothing to tell apart")
        self.pixels(0)
        digest = hashlib.sha256(self.pixels(0).numpy().tobytes() + self.targets.numpy().tobytes()).hexdigest()
        self.provenance = Provenance(
            Path(id).name,
            "own data",
            "-",
            "the owner's",
            digest,
            f"{len(self.targets):,} pictures, resized to {size} px",
        )

    def pixels(self, number: int) -> Tensor:
        """One picture, (3, S, S) in [-1, 1]."""
        picture = self.data[number][self.image]
        if not isinstance(picture, Image.Image):
            raise WorkbenchError(f"column {self.image!r} holds {type(picture).__name__}, not images")
        picture = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1

    def split(self, seed: int, *, labelled: int = 0, pretrain: bool = True) -> tuple[Any, ...]:
        """Train, validation, test, and for a teacher to be: its own data and its held-out part (None without).

        A fifth each for validation and test; of the rest, half for the teacher when there is one to train. labelled: at
        most so many are the student's (0: all). Raises WorkbenchError when fewer than 50 pictures are there.
        """
        n = len(self.targets)
        if n < 50:
            raise WorkbenchError(f"{n} pictures: 50 is the least, for a student, a validation and a test part")
        order = torch.from_numpy(np.random.default_rng([seed, 13]).permutation(n))
        validation, test, rest = order[: n // 5], order[n // 5 : 2 * (n // 5)], order[2 * (n // 5) :]
        teacher, student = (rest[: len(rest) // 2], rest[len(rest) // 2 :]) if pretrain else (rest[:0], rest)
        parts: list[Any] = [Rows(self, student[:labelled] if labelled else student)]
        parts += [Rows(self, validation), Rows(self, test)]
        held = len(teacher) // 10
        return *parts, *((Rows(self, teacher[held:]), Rows(self, teacher[:held])) if pretrain else (None, None))
