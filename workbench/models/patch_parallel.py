"""One image over several ranks: equal strips of tokens that exchange only the linear attention's statistics (S, s)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.linear_attention import statistics


@dataclass
class PatchParallel:
    """Simulates `ranks` equal strips inside one process, for one layer (DistriFusion's scheme, as LinFusion uses it).

    "synchronous": every rank averages the statistics all ranks have computed just now: the single-rank result.
    "stale": after `warmup` synchronous calls a rank averages its own fresh statistics with those the other ranks had
    at the previous denoising step, so that sending overlaps with computing.
    bytes_sent: what all ranks together have sent so far; softmax_bytes: what exchanging all K and V would have sent.
    """

    ranks: int = 2
    mode: Literal["synchronous", "stale"] = "synchronous"
    warmup: int = 1
    calls: int = 0
    bytes_sent: int = 0
    softmax_bytes: int = 0
    previous: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def statistics(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(S, s) as each rank sees them, one per strip. k, v: (B, H, N, D). Raises WorkbenchError: N not divisible."""
        if k.shape[2] % self.ranks:
            raise WorkbenchError(f"{k.shape[2]} tokens do not make {self.ranks} equal strips, which averaging needs")
        own = [statistics(*pair) for pair in zip(k.chunk(self.ranks, 2), v.chunk(self.ranks, 2), strict=True)]
        fresh = self.mode == "synchronous" or self.calls < self.warmup or not self.previous
        seen = own if fresh else self.previous
        self.calls += 1
        peers = self.ranks - 1
        self.bytes_sent += peers * sum(x.numel() * x.element_size() for pair in own for x in pair)
        self.softmax_bytes += peers * (k.numel() + v.numel()) * k.element_size()
        joined = []
        for rank in range(self.ranks):
            pairs = [own[r] if r == rank else seen[r] for r in range(self.ranks)]
            joined.append((torch.stack([S for S, _ in pairs]).mean(0), torch.stack([s for _, s in pairs]).mean(0)))
        self.previous = [(S.detach(), s.detach()) for S, s in own]
        return joined
