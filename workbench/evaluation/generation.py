"""Is sampled text good, and is it still varied? A judge's loss with the entropies that must stand beside it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def judge_loss(judge: nn.Module, tokens: Tensor, *, batch: int = 128) -> float:
    """Mean of -log p(token | tokens before it), nats a token, over tokens 2..L of (N, L): log generative perplexity.

    judge: tokens (B, T) → logits (B, T, V), or a transformers causal model. It must not have trained what it judges.
    """
    device = next(judge.parameters()).device
    total = 0.0
    for part in tokens.split(batch):
        part = part.to(device)
        out: Any = judge(part[:, :-1])
        logits = out if isinstance(out, Tensor) else out.logits
        total += float(F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / (len(tokens) * (tokens.shape[1] - 1))


def _entropy(counts: Sequence[int]) -> float:
    p = np.asarray(counts, dtype=float)
    p = p / p.sum()
    return float(-(p * np.log(p)).sum())


def sample_entropy(tokens: Tensor) -> float:
    """Entropy of the tokens inside each sequence (N, L), averaged, in nats: the paper's; blind to equal sequences."""
    return float(np.mean([_entropy(list(Counter(row).values())) for row in tokens.tolist()]))


def _grams(tokens: Tensor, n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for row in tokens.tolist() for i in range(len(row) - n + 1)]


def pooled_entropy(tokens: Tensor, n: int = 2) -> float:
    """Entropy of the n-grams of all sequences together, in nats: falls when sequences repeat each other.

    Its value grows with the number of sequences: compare sets of one size only.
    """
    return _entropy(list(Counter(_grams(tokens, n)).values()))


def distinct(tokens: Tensor, n: int = 2) -> float:
    """Different n-grams over all n-grams of (N, L), in (0, 1]; compare sets of one size only."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams)


def copied(tokens: Tensor, corpus: Tensor, n: int = 8) -> float:
    """Share of the n-grams of (N, L) that stand in the corpus (T,) word for word: memorised text."""
    known = set(_grams(corpus[None], n))
    grams = _grams(tokens, n)
    return sum(g in known for g in grams) / len(grams)


def quality(judge: nn.Module, tokens: Tensor) -> dict[str, float]:
    """The judge's loss and, always, what tells a good sampler from one that says little: entropies and distinct-n."""
    return {
        "loss": judge_loss(judge, tokens), "entropy": sample_entropy(tokens), "pooled": pooled_entropy(tokens, 1),
        "pooled2": pooled_entropy(tokens, 2),
        "distinct1": distinct(tokens, 1), "distinct2": distinct(tokens, 2),
    }  # fmt: skip


def at_entropy(frontier: Sequence[tuple[float, float]], entropy: float) -> float:
    """The loss that a family of samplers (entropy, loss), say one model's temperatures, has at this entropy.

    Read off the least-squares line through all of them, within their range and beyond: neighbours in temperature often
    differ by little more entropy than its sampling error, and a line through those two would say anything. Two points
    or more, of different entropy.
    """
    x, y = np.array(frontier).T
    slope = ((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum()
    return float(y.mean() + slope * (entropy - x.mean()))
