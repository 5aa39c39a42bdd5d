"""Intervals and verdicts: against scipy and by hand, and every way a verdict can flip."""

import dataclasses
import json
import math

import pytest
from scipy import stats

from workbench.evaluation.claims import Claim, judge, results
from workbench.evaluation.intervals import mean_interval
from workbench.training.record import Record

CLAIM = Claim("gain", "It gains.", "2x", "Table 1", "gain", "nats", ">=", 1.0)


def records(values, measure="gain"):
    return [{"kind": "result", "measure": measure, "seed": s, "value": v} for s, v in enumerate(values)]


def test_interval_is_students():
    values = [2.1, 1.9, 2.4, 2.2, 1.6]
    got = mean_interval(values, 0.9)
    low, high = stats.t.interval(0.9, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert (got.low, got.high, got.n) == (pytest.approx(low), pytest.approx(high), 5)


def test_interval_by_hand():
    # mean 2, sd 1, n 3: 2 ± 4.302653 / sqrt(3), from the printed t table (two degrees of freedom)
    got = mean_interval([1.0, 2.0, 3.0])
    assert got.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert str(got) == "2 ± 2.5"


def test_one_value_has_no_bounds_and_none_is_refused():
    assert mean_interval([3.0]).high == math.inf
    assert str(mean_interval([3.0])) == "3 (n=1)"
    with pytest.raises(ValueError):
        mean_interval([])


@pytest.mark.parametrize(
    ("values", "direction", "verdict"),
    [
        ([1.5, 1.6, 1.55], ">=", "holds"),
        ([0.5, 0.6, 0.55], ">=", "does not hold"),
        ([0.5, 1.6, 1.1], ">=", "inconclusive"),
        ([1.5, 1.6, 1.55], "<=", "does not hold"),
        ([0.5, 0.6, 0.55], "<=", "holds"),
        ([1.0, 1.0, 1.0], ">=", "holds"),  # at the margin itself
        ([1.0, 1.0, 1.0], "<=", "holds"),
        ([1.5, 1.6], ">=", "inconclusive"),  # two seeds of three
        ([1.5, math.nan, 1.6], ">=", "inconclusive"),
        ([1.5, math.inf, 1.6], ">=", "inconclusive"),
        ([], ">=", "inconclusive"),
    ],
)
def test_verdicts(values, direction, verdict):
    assert judge(dataclasses.replace(CLAIM, direction=direction), records(values)).verdict == verdict


def test_a_wider_confidence_can_undo_a_verdict():
    values = records([1.1, 1.4, 1.7])
    assert judge(dataclasses.replace(CLAIM, confidence=0.8), values).verdict == "holds"
    assert judge(dataclasses.replace(CLAIM, confidence=0.999), values).verdict == "inconclusive"


def test_only_the_claims_own_results_count_and_the_last_of_a_seed():
    mixed = [
        *records([9.0, 9.0, 9.0], measure="other"),
        {"kind": "step", "measure": "gain", "seed": 0, "value": 9.0},
        *records([0.1, 0.2, 0.15]),
        *records([5.0]),  # seed 0 again, as a resumed run writes it
    ]
    assert results(mixed, "gain") == {"0": 5.0, "1": 0.2, "2": 0.15}


def test_breaking_the_method_flips_the_verdict(tmp_path):
    """Shrinkage beats the plain mean on a small noisy sample; shrinking the wrong way, the broken method, must not."""
    import numpy as np

    def error(factor, seed):
        draws = np.random.default_rng(seed).normal(0.5, 2.0, size=(2000, 4)).mean(1)
        return float(((factor * draws - 0.5) ** 2).mean())

    verdicts = {}
    for name, factor in (("method", 0.3), ("broken", 1.7)):
        record = Record(tmp_path / name)
        for seed in range(4):
            record.result("gain", error(1.0, seed) / error(factor, seed), seed=seed)
        verdicts[name] = judge(CLAIM, Record(tmp_path / name).records()).verdict
    assert verdicts == {"method": "holds", "broken": "does not hold"}


@pytest.mark.parametrize("values", [[1.5], [1.5, math.nan, 1.6], []])
def test_judgements_are_plain_json(values):
    text = json.dumps(judge(CLAIM, records(values)).as_dict(), allow_nan=False)
    assert json.loads(text)["claim"]["margin"] == 1.0
