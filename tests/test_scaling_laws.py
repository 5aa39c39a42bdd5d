"""Power laws with an asymptote: planted ones are found, extrapolation has its limits, seeds give its interval."""

import math

import numpy as np
import pytest

from workbench.errors import WorkbenchError
from workbench.evaluation.scaling_laws import PowerLaw, bootstrap_asymptote, data_efficiency, fit_power_law


@pytest.mark.parametrize("x", [(1, 2, 3, 4, 5), (0.15, 0.3, 0.6, 1.4), (8_192, 16_384, 32_768, 65_536)])
@pytest.mark.parametrize("a, E", [(1.02, 3.43), (0.85, 1.84), (0.24, 1.9)])
def test_a_planted_law_is_found_in_any_unit_of_x(x, a, E):
    scale = math.exp(np.log(x).mean())
    planted = PowerLaw(0.3 * scale**a, a, E)
    law = fit_power_law(x, planted(np.array(x)))
    assert law.E == pytest.approx(E, abs=2e-3) and law.a == pytest.approx(a, abs=0.02)
    assert max(map(abs, law.residuals)) < 1e-5 and len(law.residuals) == len(x)
    assert law(x[1]) == pytest.approx(planted(x[1]), abs=1e-5)


def test_least_squares_is_in_linear_loss_and_residuals_are_measured_minus_fitted():
    x, y = np.array([1, 2, 3, 4, 5.0]), np.array([2.16, 2.02, 1.97, 1.94, 1.93])
    law = fit_power_law(x, y)
    assert np.allclose(law.residuals, y - law(x))
    ours = np.square(law.residuals).sum()
    for A, a, E in [(1.02, 1, 1), (1, 1.05, 1), (1, 1, 1.002), (0.98, 1, 1), (1, 0.95, 1), (1, 1, 0.998)]:
        assert np.square(y - PowerLaw(law.A * A, law.a * a, law.E * E)(x)).sum() > ours
    assert 1.8 < law.E < 1.93


def test_unknowns_stay_nonnegative():
    law = fit_power_law([1, 2, 3, 4], [1.0, 1.2, 1.3, 1.4])  # rising: no such law, so A is pushed against its bound
    assert law.A == pytest.approx(0, abs=1e-3) and law.a >= 0 and law.E >= 0
    steep = fit_power_law([1, 2, 4], [4.0, 1.0, 0.0])
    assert steep.E >= 0


def test_a_fixed_exponent_needs_only_two_points():
    law = fit_power_law([1, 4], [3.0, 2.25], exponent=1.0)
    assert (law.A, law.a, law.E) == (pytest.approx(1.0, abs=1e-4), 1.0, pytest.approx(2.0, abs=1e-4))
    for bad in (([1, 2], [3, 2]), ([1, 1, 2], [3, 3, 2]), ([0, 1, 2], [3, 2, 1]), ([1, 2, 3], [3, math.nan, 2])):
        with pytest.raises(WorkbenchError, match="needs 3 finite points"):
            fit_power_law(*bad)


def test_the_inverse_stops_at_the_asymptote():
    law = PowerLaw(1.27, 0.235, 1.92)
    for x in (0.2, 1.0, 7.0):
        assert law.inverse(float(law(x))) == pytest.approx(x, rel=1e-9)
    assert law.inverse(1.92) == math.inf and law.inverse(1.5) == math.inf


def test_efficiency_reproduces_the_papers_arithmetic():
    """3.75 → 3.43 and 3.17 through the standard law 1.27 / D^.235 + 1.92 (D in billions) are 2.29× and 5.17×."""
    standard = PowerLaw(1.27, 0.235, 1.92)
    assert data_efficiency(standard, 3.43, 0.2, 3.75) == pytest.approx(2.29, rel=0.03)
    assert data_efficiency(standard, 3.17, 0.2, 3.75) == pytest.approx(5.17, rel=0.03)
    assert data_efficiency(standard, 3.75, 0.2, 3.75) == pytest.approx(1.0)
    assert data_efficiency(standard, 1.9, 0.2, 3.75) == math.inf
    assert data_efficiency(standard, 3.43, 0.2, 1.9) == pytest.approx(standard.inverse(3.43) / 0.2)


def test_the_bootstrap_interval_is_that_of_the_seeds():
    generator = np.random.default_rng(0)
    planted = PowerLaw(0.4, 1.0, 2.0)
    quiet = {float(k): [float(planted(k))] * 3 for k in range(1, 6)}
    low, high = bootstrap_asymptote(quiet, seed=0, draws=20)
    assert low == pytest.approx(2.0, abs=1e-3) and high == pytest.approx(2.0, abs=1e-3)

    def noisy(sd):
        return {k: [v[0] + float(generator.normal(0, sd)) for _ in range(5)] for k, v in quiet.items()}

    small, large = (bootstrap_asymptote(noisy(sd), seed=0, draws=60) for sd in (0.002, 0.02))
    assert small[0] < 2.0 < small[1] + 0.01 and large[1] - large[0] > 2 * (small[1] - small[0])
    samples = noisy(0.01)
    assert bootstrap_asymptote(samples, seed=3, draws=20) == bootstrap_asymptote(samples, seed=3, draws=20)
