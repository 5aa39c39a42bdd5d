"""A world of English small enough to list: short windows of real prose, each character as its class."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from workbench.data.provenance import Provenance
from workbench.data.text import prose

CLASSES = ("vowel", "consonant", "other")
SYMBOLS = "ac_"  # one printable character a class
NOISE = 0.01  # share of windows that are any string alike: no string is impossible, so every divergence is finite


@dataclass(frozen=True)
class LetterWorld:
    """law (3^L,) float64: how often each window of L classes stands in the prose, with a share NOISE of any string."""

    law: Tensor
    length: int
    provenance: Provenance

    def draw(self, generator: torch.Generator, count: int) -> Tensor:
        """Windows (count, L) int64 of the digits 0, 1, 2."""
        index = torch.multinomial(self.law, count, replacement=True, generator=generator)
        powers = 3 ** torch.arange(self.length - 1, -1, -1)
        return index[:, None] // powers % 3


@lru_cache(maxsize=2)
def letter_world(package: str = "scikit-learn", length: int = 4) -> LetterWorld:
    """The world of a package's prose; windows start at every character."""
    paragraphs, source = prose(package)
    kind = {c: 0 for c in "aeiouAEIOU"}
    text = "\n".join(paragraphs)
    digits = torch.tensor([kind.get(c, 1 if c.isalpha() else 2) for c in text])
    windows = digits.unfold(0, length, 1)
    index = (windows * 3 ** torch.arange(length - 1, -1, -1)).sum(1)
    counts = index.bincount(minlength=3**length).double()
    return LetterWorld((1 - NOISE) * counts / counts.sum() + NOISE / 3**length, length, source)
