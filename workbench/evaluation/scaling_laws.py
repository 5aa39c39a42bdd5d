"""Power laws with an asymptote, L(x) = A / x^a + E, and what they are used for: limits and data efficiency."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit

from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = A x^-a + E with the residuals (measured - fitted) at the points it was fitted to, in L's unit."""

    A: float
    a: float
    E: float
    residuals: tuple[float, ...] = ()

    def __call__(self, x: float | np.ndarray) -> float | np.ndarray:
        return self.A * np.asarray(x, dtype=float) ** -self.a + self.E

    def inverse(self, loss: float) -> float:
        """The x at which the law reaches `loss`; infinite at or below the asymptote, where the law says nothing."""
        return math.inf if loss <= self.E else (self.A / (loss - self.E)) ** (1 / self.a)


def fit_power_law(x: Sequence[float], y: Sequence[float], *, exponent: float | None = None) -> PowerLaw:
    """Least squares in linear loss with A, a, E >= 0, started at (1, 0.5, 2) scaled to the data (Kim et al., sec. 3).

    Three unknowns need three points, and three points are fitted exactly: see the residuals and a bootstrap before
    believing the asymptote. exponent: fix a, which leaves two unknowns. Raises WorkbenchError: too few points.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    unknowns = 3 if exponent is None else 2
    if len(set(xs)) < unknowns or not np.isfinite(ys).all() or (xs <= 0).any():
        raise WorkbenchError(f"a power law with {unknowns} unknowns needs {unknowns} finite points at different x > 0")
    scale = math.exp(np.log(xs).mean())  # fitted in x / scale, so that the start suits any unit of x
    spread = max(float(np.ptp(ys)), 1e-9)

    def law(z, A, E, a=exponent):  # noqa: N803 (the paper's symbols)
        return A * z**-a + E

    free = law if exponent is not None else lambda z, A, E, a: A * z**-a + E  # noqa: N803
    start = [spread, max(float(ys.min()) - spread, 0.0)] + ([0.5] if exponent is None else [])
    top = [np.inf, np.inf] + ([10.0] if exponent is None else [])
    best, *_ = curve_fit(free, xs / scale, ys, p0=start, bounds=([0.0] * unknowns, top), max_nfev=20_000)
    a = float(exponent if exponent is not None else best[2])
    A, E = float(best[0]) * scale**a, float(best[1])
    fitted = A * xs**-a + E
    return PowerLaw(A, a, E, tuple((ys - fitted).tolist()))


def bootstrap_asymptote(
    samples: Mapping[float, Sequence[float]], *, seed: int, draws: int = 200, exponent: float | None = None
) -> tuple[float, float]:
    """95 % percentile interval of E: seeds (samples[x]) drawn again with replacement at every x, the law refitted."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        means = [float(np.mean(generator.choice(list(v), len(v)))) for v in samples.values()]
        try:
            found.append(fit_power_law(list(samples), means, exponent=exponent).E)
        except RuntimeError:
            continue  # curve_fit did not converge on this draw
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def data_efficiency(standard: PowerLaw, loss: float, tokens: float, baseline: float) -> float:
    """How many times more data the standard recipe would need for `loss` than it needed for its own `baseline` loss.

    Both losses go through the same law: D'(loss) / D'(baseline). Infinite at or below the law's asymptote; the
    baseline's own point is replaced by `tokens` where the law cannot reach it.
    """
    own = standard.inverse(baseline)
    return standard.inverse(loss) / (own if math.isfinite(own) else tokens)
