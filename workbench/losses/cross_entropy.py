"""Next-token cross-entropy in nats, from features and the head's weight, so that logits never exist whole."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _chunk_sum(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((features @ weight.T).float(), targets, reduction="sum")


def linear_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 2048) -> Tensor:
    """Mean of -log softmax(features @ weight^T)[target], a float32 scalar in nats per token.

    features (N, D), weight (V, D), targets (N,) int64. Logits are made `chunk` rows at a time and made again in the
    backward pass, so at most (chunk, V) of them are alive.
    """
    total = features.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), chunk):
        rows = features[start : start + chunk], weight, targets[start : start + chunk]
        if len(targets) > chunk and torch.is_grad_enabled():
            total = total + checkpoint(_chunk_sum, *rows, use_reentrant=False)
        else:
            total = total + _chunk_sum(*rows)
    return total / len(targets)
