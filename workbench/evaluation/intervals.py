"""Confidence intervals of a mean over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its two-sided Student-t interval, in the measure's own unit."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        return f"{self.mean:.4g} ± {half:.2g}" if math.isfinite(half) else f"{self.mean:.4g} (n={self.n})"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student-t interval of the mean of n independent values; infinite for n < 2. Raises ValueError when empty."""
    if not values:
        raise ValueError("no values to take the mean of")
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
