"""Labelled images of a Hub data set or a local folder, held in memory at one size: CIFAR-10 and what looks like it."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from workbench.data.digits import Images
from workbench.data.hub import hub_dataset
from workbench.data.provenance import Provenance
from workbench.errors import WorkbenchError


def labelled_images(
    id: str, *, size: int, channels: int = 3, image: str = "img", label: str = "label", test: str = "test"
) -> Images:
    """Splits "train" and `test` of a data set as tensors (N, channels, size, size); larger images are cropped.

    The validation part is a tenth of "train"; a second tenth is the test part where the data set has no such split.
    Raises WorkbenchError: as hub_dataset, for a column that holds no images, and for an image smaller than `size`.
    """
    pixels, labels = _read(id, "train", size, channels, image, label)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))  # a set may be sorted by label
    pixels, labels = pixels[order], labels[order]
    tenth = max(1, len(pixels) // 10)
    try:
        tested = _read(id, test, size, channels, image, label)
    except WorkbenchError as error:
        if "split" not in str(error):
            raise
        tested = pixels[:tenth], labels[:tenth]
        pixels, labels = pixels[tenth:], labels[tenth:]
    validation, pixels = pixels[:tenth], pixels[tenth:]
    validation_labels, labels = labels[:tenth], labels[tenth:]
    if not len(pixels):
        raise WorkbenchError(f"data set {id!r} has too few images: nothing is left to train on")
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    note = f"{len(pixels)} to train on, {len(validation)} for validation, {len(tested[0])} to test on, {size} px"
    source = "local folder" if Path(id).is_dir() else "Hugging Face Hub"
    provenance = Provenance(id, source, "", "see its card", digest, note)
    return Images(pixels, labels, validation, validation_labels, *tested, provenance)


def _read(id: str, split: str, size: int, channels: int, image: str, label: str) -> tuple[Tensor, Tensor]:
    data = hub_dataset(id, split, columns=(image, label))
    pictures, labels = [], []
    for row in data:
        picture = row[image]
        if not isinstance(picture, Image.Image):
            raise WorkbenchError(f"column {image!r} of {id!r} holds {type(picture).__name__}, not images")
        if min(picture.size) < size:
            raise WorkbenchError(
                f"data set {id!r} has an image of {picture.size[0]} x {picture.size[1]} px, the model works at {size}"
            )
        picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size))
        pictures.append(np.asarray(picture).reshape(size, size, channels))
        labels.append(int(row[label]))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.tensor(labels)
