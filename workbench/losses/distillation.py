"""The three losses of diffusion distillation (BK-SDM's, used by LinFusion), each a mean squared error in fp32."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def denoising_loss(student: Tensor, target: Tensor) -> Tensor:
    """L_simple = mean (target - student)^2; both (B, C, H, W). target: eps, v or x0, as the scheduler says."""
    return F.mse_loss(student.float(), target.float())


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_kd = mean (teacher - student)^2 of the two networks' outputs, (B, C, H, W)."""
    return F.mse_loss(student.float(), teacher.detach().float())


def feature_losses(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """mean (a_T^l - a_s^l)^2 of every layer l, (L,); L_feat is its mean. Pairs of equal shape, e.g. (B, N, d)."""
    return torch.stack([F.mse_loss(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True)])
