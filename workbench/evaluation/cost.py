"""Time and memory of a token mixer against the number of tokens, and the exponents that describe them."""

import math
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.kernels.linear_attention import linear_attention


def naive_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention through the N x N matrix. (B, H, N, D) each."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def linear_elu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LinFusion's mixer with its feature map. (B, H, N, D) each."""
    return linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": linear_elu,
    "softmax, SDPA": F.scaled_dot_product_attention,
    "softmax, naive": naive_softmax,
}


class _Peak(TorchDispatchMode):
    """Follows every tensor storage an operation makes until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.alive: dict[int, weakref.finalize] = {}

    def _free(self, key: int, size: int) -> None:
        self.held -= size
        del self.alive[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in inputs or id(storage) in self.alive:
                continue  # a view, or work in place
            size = storage.nbytes()
            self.alive[id(storage)] = weakref.finalize(storage, self._free, id(storage), size)
            self.held += size
            self.peak = max(self.peak, self.held)
        return out


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors one call holds beyond its inputs; work space inside a fused operator is not seen."""
    with _Peak() as tracker:
        call()
    return tracker.peak


@torch.no_grad()
def cost(
    tokens: Sequence[int], *, heads: int = 2, width: int = 32, budget: float = 0.1, limit: float = 1.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows {"method", "tokens", "seconds", "bytes"} of a forward pass on the CPU, batch 1, float32.

    seconds: the best of three calls or as many as fit in `budget` seconds (what other processes add is never
    negative). A length whose call is expected to
    take longer than `limit` seconds, from the length before and N^2, is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for method, mix in METHODS.items():
        before: dict[str, Any] | None = None
        for n in sorted(tokens):
            if before and before["seconds"] * (n / before["tokens"]) ** 2 > limit:
                break
            q, k, v = (torch.randn(1, heads, n, width, generator=generator) for _ in range(3))
            mix(q, k, v)  # the first call allocates its work space
            times: list[float] = []
            while len(times) < 3 or sum(times) < budget:
                start = time.perf_counter()
                mix(q, k, v)
                times.append(time.perf_counter() - start)
            before = {"method": method, "tokens": n, "seconds": min(times)}
            rows.append({**before, "bytes": peak_bytes(partial(mix, q, k, v))})
    return rows


def curve(rows: Sequence[dict[str, Any]], method: str, key: str = "seconds") -> tuple[list[float], list[float]]:
    """(tokens, values) of one method."""
    own = [r for r in rows if r["method"] == method]
    return [r["tokens"] for r in own], [r[key] for r in own]


def exponent(tokens: Sequence[float], values: Sequence[float], least: int = 1024) -> float:
    """Slope of log(values) on log(tokens) by least squares over tokens >= `least`; nan with fewer than two points."""
    kept = [(n, value) for n, value in zip(tokens, values, strict=True) if n >= least]
    if len(kept) < 2:
        return math.nan
    n, value = np.log(np.array(kept, dtype=float)).T
    return float(np.polyfit(n, value, 1)[0])


def crossing(tokens: Sequence[float], low: Sequence[float], high: Sequence[float]) -> float | None:
    """Tokens from which on `low` stays below `high`, interpolated on log axes; None when it never does.

    The first length measured when `low` is below all along.
    """
    n = min(len(low), len(high))
    gap = np.log(np.asarray(low[:n])) - np.log(np.asarray(high[:n]))
    if n == 0 or gap[-1] >= 0:
        return None
    above = np.flatnonzero(gap >= 0)
    if len(above) == 0:
        return float(tokens[0])
    i = int(above[-1])
    share = gap[i] / (gap[i] - gap[i + 1])
    return float(np.exp(np.log(tokens[i]) + share * (np.log(tokens[i + 1]) - np.log(tokens[i]))))
