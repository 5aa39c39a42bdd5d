"""A vocabulary head and a draw from its softmax, row by row: the place of a fused kernel for discrete diffusion.

Discrete diffusion samples at every masked position of every step. All of it comes through `sample_head`: the logits
h W^T + b of a row are needed for one draw and then forgotten, so a fused kernel never has to write them to memory.
This is the PyTorch path: `chunk` rows of logits at a time, one uniform number a row, the inverse of the cumulative sum.
"""

import torch
from torch import Tensor

from workbench.errors import WorkbenchError


@torch.no_grad()
def sample_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    tilt: Tensor | None = None,
    chunk: int = 8192,
) -> Tensor:
    """Tokens (M,) int64 drawn from softmax((features @ weight^T + bias + tilt) / temperature).

    features (M, D), weight (V, D), bias (V,) or None, tilt (M, V) or None. The generator lives on the CPU, whatever the
    device. Sums and draws are float64: low-precision noise makes samples look better than they are (lower entropy).
    Raises WorkbenchError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise WorkbenchError(f"temperature is above 0, got {temperature:g}")
    uniform = torch.rand(len(features), 1, generator=generator, dtype=torch.float64).to(features.device)
    drawn = []
    for start in range(0, len(features), chunk):
        logits = features[start : start + chunk] @ weight.T
        if bias is not None:
            logits = logits + bias
        if tilt is not None:
            logits = logits + tilt[start : start + chunk]
        cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
        at = uniform[start : start + chunk] * cumulative[:, -1:]
        drawn.append(torch.searchsorted(cumulative, at, right=True).squeeze(1))
    if not drawn:
        return torch.zeros(0, dtype=torch.int64, device=features.device)
    return torch.cat(drawn).clamp(max=len(weight) - 1)
