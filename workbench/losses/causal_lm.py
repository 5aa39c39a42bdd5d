"""The loss of continued pre-training: mean next-token cross-entropy of a causal language model over packed windows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.data.packing import document_mask


def next_token_loss(model: nn.Module, window: Tensor, *, separate: int | None = None) -> Tensor:
    """Mean of -log p(x_t | x_<t) over a window (B, T + 1) of int64 tokens: a float32 scalar, nats per token.

    model(input_ids=...).logits is (B, T, V), as transformers' causal models answer. Inputs and targets are cut here,
    so no `labels` are passed: the library shifts those itself, and a second shift trains to predict two tokens ahead.
    separate: the id that ends a document; then attention and positions start anew at each document.
    """
    inputs, targets = window[:, :-1], window[:, 1:]
    extra = {}
    if separate is not None:
        mask, positions = document_mask(inputs, separate)
        extra = {"attention_mask": mask, "position_ids": positions}
    logits = model(input_ids=inputs, **extra).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def own_loss(model: nn.Module, window: Tensor) -> Tensor:
    """The loss that transformers itself gives for the window, through its `labels`: what `next_token_loss` equals."""
    return model(input_ids=window, labels=window).loss
