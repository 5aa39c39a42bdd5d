"""Losses of one-way knowledge distillation: softened logits (Hinton et al.) and hidden states (FitNets)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import WorkbenchError


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` where `mask` (same shape) is not zero; 0 when nothing is kept."""
    if mask is None:
        return values.mean()
    kept = mask.to(values.dtype)
    return (values * kept).sum() / kept.sum().clamp(min=1)


def logit_kd(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, reverse: bool = False, mask: Tensor | None = None
) -> Tensor:
    """T² KL(softmax(z_T / T) || softmax(z_S / T)) in nats, the mean over rows (Hinton, Vinyals, Dean 2015, section 2).

    student, teacher: logits (..., C) over the same C classes or words; mask (...): rows that count (1) or not (0).
    reverse: KL(student || teacher) instead, which seeks the teacher's modes. T² keeps the gradient's size as T grows.
    No gradient reaches the teacher. Raises WorkbenchError when the last axes differ or T is not positive.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise WorkbenchError(
            f"logit distillation needs one set of classes: the student has {student.shape[-1]}, "
            f"the teacher {teacher.shape[-1]}"
        )
    if temperature <= 0:
        raise WorkbenchError(f"the distillation temperature is above 0, got {temperature}")
    ours = F.log_softmax(student.float() / temperature, -1)
    theirs = F.log_softmax(teacher.detach().float() / temperature, -1)
    p, q = (ours, theirs) if reverse else (theirs, ours)
    # where p is 0 its logarithm may be -inf: 0 log 0 is 0
    terms = torch.where(p == -torch.inf, torch.zeros_like(p), p.exp() * (p - q))
    return temperature**2 * _mean(terms.sum(-1), mask)


def state_distance(x: Tensor, y: Tensor, *, normalise: bool = True, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of two states (..., D), each brought to mean 0 and variance 1 over D first.

    Without normalising, two states agree best by both shrinking to nothing. Gradients reach both; detach what is fixed.
    mask (...): positions that count (1) or not (0).
    """
    if x.shape != y.shape:
        raise WorkbenchError(f"states of different shapes cannot be compared: {tuple(x.shape)}, {tuple(y.shape)}")
    x, y = x.float(), y.float()
    if normalise:
        x, y = (F.layer_norm(z, z.shape[-1:]) for z in (x, y))
    return _mean((x - y).square().mean(-1), mask)


def feature_kd(regressed: Tensor, teacher: Tensor, *, normalise: bool = True, mask: Tensor | None = None) -> Tensor:
    """The hint loss: the student's state (..., D), already through its regressor, against the teacher's (..., D).

    FitNets (Romero et al. 2015, eq. 3), on normalised states unless told otherwise. No gradient reaches the teacher.
    """
    return state_distance(regressed, teacher.detach(), normalise=normalise, mask=mask)


def standardise(x: Tensor) -> Tensor:
    """A batch of states (B, ...), each component brought to mean 0 and variance 1 over the batch (eps 1e-5)."""
    return (x - x.mean(0)) * torch.rsqrt(x.var(0, unbiased=False) + 1e-5)


def correlation_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of two batches of states (B, N, D), each feature of each position standardised over B.

    It is 2 (1 - correlation), averaged: 0 when y follows x from example to example, 2 when they have nothing in common.
    Neither shrinking nor answering every example alike brings it down, which a distance of single states allows.
    Gradients reach both; detach what is fixed. Raises WorkbenchError: other shapes, or a batch of fewer than 2.
    """
    if x.shape != y.shape or len(x) < 2:
        raise WorkbenchError(
            f"two batches of equal shape, of 2 or more, are compared: {tuple(x.shape)}, {tuple(y.shape)}"
        )
    return (standardise(x.float()) - standardise(y.float())).square().mean()
