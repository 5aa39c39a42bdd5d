"""Non-causal normalised linear attention: Triton on CUDA, an equally exact O(N) PyTorch path, a float64 reference.

q, k >= 0 have been through the feature map (LinFusion: elu + 1); v is plain. For one head with N tokens
(LinFusion, arXiv 2409.02097, section 3; the released layer takes means, so eps means the same at every N):

    S = 1/N sum_j k_j v_j^T          (D, Dv)
    s = 1/N sum_j k_j                (D)
    z_i = q_i . s + eps
    o_i = q_i^T S / z_i              normalised: the weights of a row sum to 1 - eps / z_i
    o_i = q_i^T S * N / count        not normalised: sums over tokens, divided by a fixed count (the training N)

Time O(N D Dv), memory O(N (D + Dv)); no N x N matrix exists, forward or backward.

Backward, with g_i = dL/do_i and d_i = g_i . o_i. From o_i = u_i / z_i, u_i = S^T q_i:
du_i = g_i / z_i and dz_i = -d_i / z_i, hence

    dq_i = S du_i + s dz_i           = (S g_i - d_i s) / z_i
    dS   = sum_i q_i du_i^T          = sum_i q_i (g_i / z_i)^T
    ds   = sum_i q_i dz_i            = -sum_i q_i d_i / z_i
    dk_j = (dS v_j + ds) / N
    dv_j = dS^T k_j / N

so both directions consist of two shapes of work only: a sum of outer products over tokens (S, dS) and rows times a
small matrix (o, dq, dk, dv). linear_attention_triton.py has one kernel for each.

S and s are accumulated and kept in float32 (float64 for float64 input), also under autocast: the sums over 256k tokens
are what half precision would lose.
"""

import math
import os

import torch
from torch import Tensor

from workbench.errors import WorkbenchError


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, normalise: bool = True, eps: float = 1e-4, count: float | None = None
) -> Tensor:
    """Every query attends to every key through the feature map's inner product; O(N) time and memory, differentiable.

    q: (B, H, Nq, D), k: (B, H, N, D), v: (B, H, N, Dv); q and k are non-negative. Returns (B, H, Nq, Dv) in v's dtype.
    normalise=False divides the sum over tokens by `count` (default N) instead of by each row's total weight.
    Raises WorkbenchError for shapes that do not fit.
    """
    S, s = statistics(k, v)
    return apply_statistics(q, S, s, eps, normalise=normalise, scale=_scale(k, count), dtype=v.dtype)


def statistics(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """S = mean_j k_j v_j^T (B, H, D, Dv) and s = mean_j k_j (B, H, D), float32: all that queries need to know.

    k: (B, H, N, D), v: (B, H, N, Dv). Strips of an image with equal token counts are joined by averaging their (S, s).
    """
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise WorkbenchError(
            f"linear attention: k {tuple(k.shape)} and v {tuple(v.shape)} must be (batch, heads, tokens, width) with "
            "the same batch, heads and tokens"
        )
    if k.shape[2] == 0:
        raise WorkbenchError("linear attention: no tokens to attend to (k and v have length 0)")
    if _triton(k, v):
        from workbench.kernels.linear_attention_triton import Statistics

        return Statistics.apply(k, v)
    with torch.autocast(k.device.type, enabled=False):  # autocast would take the sums over tokens in half precision
        k, v = k.to(_accumulator(k, v)), v.to(_accumulator(k, v))
        return k.mT @ v / k.shape[2], k.mean(2)


def apply_statistics(
    q: Tensor, S: Tensor, s: Tensor, eps: float = 1e-4, *, normalise: bool = True, scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """q^T S / (q^T s + eps), or q^T S * scale without normalisation.

    q: (B, H, Nq, D), S: (B, H, D, Dv), s: (B, H, D). Returns (B, H, Nq, Dv) in `dtype` (default: q's).
    """
    if q.dim() != 4 or S.shape[:3] != (*q.shape[:2], q.shape[3]) or s.shape != S.shape[:3]:
        raise WorkbenchError(
            f"linear attention: q {tuple(q.shape)} does not fit the statistics S {tuple(S.shape)}, s {tuple(s.shape)}: "
            "q must be (batch, heads, tokens, D), S (batch, heads, D, Dv), s (batch, heads, D)"
        )
    dtype = dtype or q.dtype
    if _triton(q, S, s):
        from workbench.kernels.linear_attention_triton import Apply

        return Apply.apply(q, S, s, eps, normalise, scale, dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, S, s = (x.to(_accumulator(q, S, s)) for x in (q, S, s))
        out = q @ S
        out = out / (q @ s.unsqueeze(-1) + eps) if normalise else out * scale
        return out.to(dtype)


def attention_matrix(
    q: Tensor, k: Tensor, *, normalise: bool = True, eps: float = 1e-4, count: float | None = None
) -> Tensor:
    """The weights M (B, H, Nq, N) in float64 that linear_attention never builds: out = M v. For tests and pictures."""
    weights = q.double() @ k.double().mT
    if not normalise:
        return weights / (k.shape[2] if count is None else count)
    return weights / (weights.sum(-1, keepdim=True) + eps * k.shape[2])


def quadratic_reference(
    q: Tensor, k: Tensor, v: Tensor, *, normalise: bool = True, eps: float = 1e-4, count: float | None = None
) -> Tensor:
    """The same layer through the N x N matrix, in float64: O(N^2), for tests. Shapes as in linear_attention."""
    return attention_matrix(q, k, normalise=normalise, eps=eps, count=count) @ v.double()


def _scale(k: Tensor, count: float | None) -> float:
    if count is None:
        return 1.0
    if not (math.isfinite(count) and count > 0):
        raise WorkbenchError(f"linear attention: count is {count}, it must be a positive number of tokens")
    return k.shape[-2] / count


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _triton(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these tensors: CUDA, or any device under Triton's interpreter; never float64."""
    if any(t.dtype not in (torch.float32, torch.float16, torch.bfloat16) for t in tensors):
        return False
    if os.environ.get("TRITON_INTERPRET") != "1" and not all(t.is_cuda for t in tensors):
        return False
    return _has_triton()


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
