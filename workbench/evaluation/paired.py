"""Two models on the same questions: bootstrap intervals, McNemar's exact test; and Wilson's interval of one share."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from workbench.evaluation.intervals import Interval


def wilson(hits: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share. Raises ValueError when n is 0."""
    if n < 1:
        raise ValueError("no answers to take a share of")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, middle - half, middle + half, n)


def bootstrap(
    values: Sequence[float], *, draws: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:  # fmt: skip
    """Percentile bootstrap of the mean over items. Raises ValueError when empty.

    For a paired comparison give the differences item by item: the pairing is then resampled with the item.
    """
    if not len(values):
        raise ValueError("no values to resample")
    data = np.asarray(values, dtype=float)
    means = data[np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))].mean(1)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided p value of "neither is better", from the items that only one of the two got right."""
    fixed = sum(b < a for b, a in zip(before, after, strict=True))
    broken = sum(b > a for b, a in zip(before, after, strict=True))
    if fixed + broken == 0:
        return 1.0
    return float(stats.binomtest(fixed, fixed + broken, 0.5).pvalue)
