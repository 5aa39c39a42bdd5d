"""Claims: what a paper says, how it is measured here, and the verdict its stored metrics give."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from workbench.evaluation.intervals import Interval, mean_interval

Verdict = Literal["holds", "does not hold", "inconclusive"]


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, turned into a measure with a direction and a margin that were fixed beforehand.

    measure: name of the result stored once per seed (record kind "result"); margin is in the same unit.
    The claim holds when the whole interval of the mean over seeds lies on the right side of the margin.
    """

    id: str
    sentence: str
    paper_figure: str  # the paper's own number, as printed
    source: str  # table, figure or section of the paper
    measure: str
    unit: str
    direction: Literal[">=", "<="]
    margin: float
    min_seeds: int = 3
    confidence: float = 0.95

    @property
    def rule(self) -> str:
        """When it holds, for a reader: "gain ≥ 1 nats"."""
        return f"{self.measure} {'≥' if self.direction == '>=' else '≤'} {self.margin:g} {self.unit}".strip()


def claim(
    id: str, sentence: str, paper_figure: str, source: str, unit: str, direction: Literal[">=", "<="], margin: float
) -> Claim:
    """A claim whose measure bears the claim's own name."""
    return Claim(id, sentence, paper_figure, source, id, unit, direction, margin)


@dataclass(frozen=True)
class Judgement:
    """A claim, the values it was judged from (by seed), their interval, and the verdict."""

    claim: Claim
    values: dict[str, float]
    interval: Interval | None
    verdict: Verdict
    why: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; an unbounded end of the interval and a value that is not finite become null."""
        out = asdict(self)
        for part in (out["values"], out["interval"] or {}):
            part.update({k: None for k, v in part.items() if isinstance(v, float) and not math.isfinite(v)})
        return out


def results(records: Iterable[Mapping[str, Any]], measure: str) -> dict[str, float]:
    """Seed → value of a measure; of records written twice (a resumed run) the last counts."""
    found = {}
    for r in records:
        if r.get("kind") == "result" and r.get("measure") == measure:
            found[str(r["seed"])] = float(r["value"])
    return found


def judge(claim: Claim, records: Iterable[Mapping[str, Any]]) -> Judgement:
    """The verdict on `claim` from stored records; too few seeds or an interval across the margin decide nothing."""
    values = results(records, claim.measure)
    if not values:
        return Judgement(claim, values, None, "inconclusive", "not measured in this run")
    if not all(math.isfinite(v) for v in values.values()):
        return Judgement(claim, values, None, "inconclusive", "a seed gave a value that is not finite")
    interval = mean_interval(list(values.values()), claim.confidence)
    if interval.n < claim.min_seeds:
        return Judgement(claim, values, interval, "inconclusive", f"{interval.n} of {claim.min_seeds} seeds")
    sign = 1 if claim.direction == ">=" else -1
    worst, best = sorted((sign * (interval.low - claim.margin), sign * (interval.high - claim.margin)))
    if worst >= 0:
        return Judgement(claim, values, interval, "holds", "the whole interval clears the margin")
    if best < 0:
        return Judgement(claim, values, interval, "does not hold", "the whole interval misses the margin")
    return Judgement(claim, values, interval, "inconclusive", "the interval spans the margin")
