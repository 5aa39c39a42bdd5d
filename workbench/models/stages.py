"""A transformer cut in three: low (input to state a), mid (a to state b), head (b to prediction), for ViT and BERT."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification, ViTForImageClassification

from workbench.errors import WorkbenchError

CLASSES = (ViTForImageClassification, BertForSequenceClassification)


class Stages(nn.Module):
    """`model` with its states after `low` and after `high` layers within reach: model(x) = head(mid(low(x))).

    States are (B, N, D): a class token first, then patches (ViT) or words (BERT, no padding). The model itself is not
    changed and saves as it always does. Raises WorkbenchError for another class or layers out of order.
    """

    def __init__(self, model: nn.Module, low: int, high: int):
        super().__init__()
        if not isinstance(model, CLASSES):
            names = " or ".join(c.__name__ for c in CLASSES)
            raise WorkbenchError(f"a model is cut into stages as {names}, not as {type(model).__name__}")
        depth = model.config.num_hidden_layers
        if not 0 <= low < high <= depth:
            raise WorkbenchError(
                f"layers {low} and {high} of a model with {depth}: the lower state comes first, "
                f"the higher one at {depth} or before"
            )
        self.model: Any = model
        self.first, self.last = low, high

    @property
    def width(self) -> int:
        """D of its states."""
        return int(self.model.config.hidden_size)

    @property
    def tokens(self) -> int | None:
        """N of its states where the model fixes it (ViT), else None."""
        c = self.model.config
        pictures = isinstance(self.model, ViTForImageClassification)
        return (int(c.image_size) // int(c.patch_size)) ** 2 + 1 if pictures else None

    @property
    def outputs(self) -> int:
        """Width of its prediction: classes, or 1 for a number."""
        return int(self.model.config.num_labels)

    def _layers(self) -> Any:
        if isinstance(self.model, ViTForImageClassification):
            return self.model.vit.layers
        return self.model.bert.encoder.layer

    def low(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """a, (B, N, D), from the model's own keyword arguments."""
        body = self.model.vit if isinstance(self.model, ViTForImageClassification) else self.model.bert
        state = body.embeddings(**inputs)
        for layer in self._layers()[: self.first]:
            state = layer(state, None)
        return state

    def mid(self, state: Tensor) -> Tensor:
        """b, (B, N, D), from a: the model's own layers low .. high."""
        for layer in self._layers()[self.first : self.last]:
            state = layer(state, None)
        return state

    def head(self, state: Tensor) -> Tensor:
        """The prediction, (B, outputs), from b: the remaining layers and the classifier."""
        for layer in self._layers()[self.last :]:
            state = layer(state, None)
        if isinstance(self.model, ViTForImageClassification):
            return self.model.classifier(self.model.vit.layernorm(state)[:, 0])
        return self.model.classifier(self.model.dropout(self.model.bert.pooler(state)))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The prediction, (B, outputs): what the model itself computes."""
        return self.head(self.mid(self.low(inputs)))


def resize_tokens(state: Tensor, tokens: int | None) -> Tensor:
    """(B, N, D) as (B, tokens, D): the class token stays, the square grid of the others is interpolated.

    For models that cut the same image into patches of different sizes. None, or an equal number: unchanged.
    """
    count = state.shape[1]
    if tokens is None or tokens == count:
        return state
    before, after = math.isqrt(count - 1), math.isqrt(tokens - 1)
    if before**2 != count - 1 or after**2 != tokens - 1:
        raise WorkbenchError(
            f"{count} tokens cannot be resized to {tokens}: neither is a square grid and a class token"
        )
    grid = state[:, 1:].mT.unflatten(-1, (before, before))
    grid = F.interpolate(grid, (after, after), mode="bilinear", antialias=after < before)
    return torch.cat([state[:, :1], grid.flatten(2).mT], 1)
