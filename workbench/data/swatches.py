"""Swatches: a small-image world of real pixels in which only global mixing can make an image consistent.

On a mid-grey canvas lie about three round windows per 144 pixels. All windows of one image look onto the SAME one of
six photograph regions ("swatches"), each at its own random place. A network that only sees a neighbourhood cannot know
which photograph the other windows show; one that mixes all tokens can. A larger canvas has more windows of the same
size, so it tests a new resolution and nothing else. Photographs: scikit-image and scikit-learn, shipped with them.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import skimage
import sklearn
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from workbench.data.provenance import Provenance

# name: (package, file, box (left, top, right, bottom) in the photograph's pixels); every box is square
REGIONS = {
    "petals": ("scikit-learn", "flower.jpg", (265, 98, 345, 178)),
    "leaves": ("scikit-learn", "flower.jpg", (40, 70, 130, 160)),
    "retina": ("scikit-image", "retina.jpg", (400, 350, 900, 850)),
    "dusk": ("scikit-image", "rocket.jpg", (205, 110, 295, 200)),
    "sky": ("scikit-learn", "china.jpg", (400, 20, 560, 180)),
    "trees": ("scikit-learn", "china.jpg", (20, 350, 90, 420)),
}
NAMES = tuple(REGIONS)
LICENCES = {
    "flower.jpg": "CC BY 2.0, vultilion (Flickr 6056698931)",
    "china.jpg": "CC BY 2.0, danielbuechele (Flickr 6061409035)",
    "retina.jpg": "CC0 1.0, Häggström (Wikimedia Commons, Fundus photograph of normal left eye)",
    "rocket.jpg": "public domain, SpaceX (Flickr 16511594820)",
}
SIDE = 24  # pixels a swatch is reduced to: a window of 5 pixels then shows its texture
RADIUS = 2.6  # of a window, in pixels
DENSITY = 3 / 144  # windows per pixel


@dataclass(frozen=True)
class Swatches:
    """The six reduced regions, images (6, 3, 24, 24) in [-1, 1], and where their photographs come from."""

    images: Tensor
    provenance: tuple[Provenance, ...]

    def draw(
        self, generator: torch.Generator, batch: int, size: int = 12, only: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A batch of canvases (B, 3, size, size) in [-1, 1] (grey is 0) and the swatch (B,) each one shows.

        only: the index of the one swatch to draw from.
        """
        count = max(1, round(DENSITY * size * size))
        label = torch.randint(len(NAMES), (batch,), generator=generator)
        if only is not None:
            label = torch.full_like(label, only)
        photo = self.images[label]
        centre = torch.rand(batch, count, 2, generator=generator) * (size - 2) + 0.5
        reach = int(RADIUS) + 1
        look = torch.randint(reach, SIDE - reach, (batch, count, 2), generator=generator)
        axis = torch.arange(size)
        canvas = torch.zeros(batch, 3, size, size)
        for d in range(count):
            y, x = (axis[None] - centre[:, d, i, None] for i in (0, 1))  # (B, size)
            cover = (RADIUS + 0.5 - (y[:, :, None] ** 2 + x[:, None] ** 2).sqrt()).clamp(0, 1)[:, None]
            row, column = (
                (axis[None] - centre[:, d, i, None].round().long() + look[:, d, i, None]).clamp(0, SIDE - 1)
                for i in (0, 1)
            )  # fmt: skip
            rows = photo.gather(2, row[:, None, :, None].expand(-1, 3, -1, SIDE))
            seen = rows.gather(3, column[:, None, None].expand(-1, 3, size, -1))
            canvas = canvas * (1 - cover) + seen * cover
        return canvas, label

    @property
    def palette(self) -> Tensor:
        """Colours of each swatch, (6, 36, 3) in [-1, 1]: the means of its 4 x 4 pixel blocks."""
        return F.avg_pool2d(self.images, 4).flatten(2).mT


@cache
def load() -> Swatches:
    """Cut and reduce the six regions; the same on every call, nothing is downloaded."""
    root = {"scikit-image": Path(skimage.__file__).parent / "data", "scikit-learn": Path(sklearn.__file__).parent}
    root["scikit-learn"] /= "datasets/images"
    images, sources = [], {}
    for package, file, box in REGIONS.values():
        path = root[package] / file
        with Image.open(path) as photograph:
            small = photograph.convert("RGB").crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        images.append(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 127.5 - 1)
        sources[file] = Provenance(
            name=f"swatches/{file}",
            package=package,
            version=version(package),
            licence=LICENCES[file],
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            note="regions " + ", ".join(n for n, (_, f, _) in REGIONS.items() if f == file),
        )
    return Swatches(torch.stack(images), tuple(sources.values()))
