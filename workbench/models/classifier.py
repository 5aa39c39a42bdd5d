"""A small convolutional classifier: its penultimate features measure generated images, its logits judge edits."""

import torch
from torch import Tensor, nn


class SmallClassifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to `classes` logits, by way of `width` features (B, width)."""

    def __init__(self, channels: int, classes: int, *, width: int = 32, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(channels, 16, 3, padding=1), nn.SiLU(),
                nn.Conv2d(16, width, 3, stride=2, padding=1), nn.SiLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1), nn.SiLU(),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, width), nn.Tanh(),
            )  # fmt: skip
            self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees, (B, width)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.body(x))
