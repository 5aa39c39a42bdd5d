"""pass@k: the chance that at least one of k samples is right, without bias, with an interval over problems."""

import math
from collections.abc import Sequence

from workbench.errors import WorkbenchError
from workbench.evaluation.intervals import Interval, mean_interval


def pass_at_k(n: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k) for c = `right` of n samples (Chen et al., arXiv 2107.03374, eq. 1).

    Raises WorkbenchError for k above n, or c outside 0 ... n.
    """
    if not 1 <= k <= n:
        raise WorkbenchError(f"pass@{k} needs 1 <= k <= n samples, and n is {n}: draw more samples")
    if not 0 <= right <= n:
        raise WorkbenchError(f"{right} right answers of {n} samples")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def pass_curve(n: int, right: Sequence[int], ks: Sequence[int]) -> dict[int, Interval]:
    """pass@k of a set of problems, `right` samples of n each: mean and 95 % interval over problems."""
    if not len(right):
        raise WorkbenchError("pass@k of no problems: the test set is empty")
    table = {k: {c: pass_at_k(n, c, k) for c in set(right)} for k in ks}
    return {k: mean_interval([table[k][c] for c in right]) for k in ks}
