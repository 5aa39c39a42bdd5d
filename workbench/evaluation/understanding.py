"""How well utterances are understood: intent error, span F1 of slots, exact match, semantic error rate, and changes.

Per-utterance counts are kept, so that two systems can be compared on the same utterances by a paired bootstrap.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nervaluate.evaluator import Evaluator

from workbench.errors import WorkbenchError

Span = tuple[str, int, int]


def repaired(tags: Sequence[str]) -> list[str]:
    """BIO in which every I- follows its own label: one that does not opens a span (conlleval's reading)."""
    out: list[str] = []
    for tag in tags:
        if tag.startswith("I-") and (not out or out[-1][2:] != tag[2:]):
            tag = "B-" + tag[2:]
        out.append(tag)
    return out


def spans(tags: Sequence[str]) -> list[Span]:
    """(label, first word, word after the last) of every span in BIO tags."""
    found: list[Span] = []
    for i, tag in enumerate(repaired(tags)):
        if tag.startswith("B-"):
            found.append((tag[2:], i, i + 1))
        elif tag.startswith("I-"):
            label, first, _ = found[-1]
            found[-1] = (label, first, i + 1)
    return found


def slot_f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """Micro F1 over spans that match in label and in both ends (nervaluate, scenario "strict"); 1 where there are none.

    gold, predicted: BIO tags, one a word. Raises WorkbenchError where the lengths differ.
    """
    for g, p in zip(gold, predicted, strict=True):
        if len(g) != len(p):
            raise WorkbenchError(f"{len(p)} predicted tags for {len(g)} words")
    ours, theirs = [repaired(p) for p in predicted], [repaired(g) for g in gold]
    labels = sorted({t[2:] for tags in [*theirs, *ours] for t in tags if t != "O"})
    if not labels:
        return 1.0
    return float(Evaluator(theirs, ours, tags=labels, loader="list").evaluate()["overall"]["strict"].f1)


def slot_errors(words: Sequence[str], gold: Sequence[str], predicted: Sequence[str]) -> tuple[int, int]:
    """(substitutions + deletions + insertions, slots in the reference) of one utterance.

    A slot is a label with its words. Equal ones are right; of what is left, a reference and a hypothesis of the same
    label make one substitution, a reference alone is a deletion, a hypothesis alone an insertion.
    """

    def slots(tags: Sequence[str]) -> Counter[tuple[str, str]]:
        return Counter((label, " ".join(words[a:b])) for label, a, b in spans(tags))

    ours, theirs = slots(predicted), slots(gold)
    right = ours & theirs
    missing = Counter(label for label, _ in (theirs - right).elements())
    extra = Counter(label for label, _ in (ours - right).elements())
    # a substitution uses up one of each
    return sum((missing | extra).values()), sum(theirs.values())


@dataclass(frozen=True)
class Understood:
    """Counts of N utterances, each array (N,): what every score here is computed from; f1 is over all of them."""

    intent_wrong: np.ndarray
    exact_wrong: np.ndarray
    slot_errors: np.ndarray
    slots: np.ndarray
    f1: float

    @property
    def intent_error(self) -> float:
        """Share of utterances whose intent is wrong."""
        return float(self.intent_wrong.mean())

    @property
    def slot_error(self) -> float:
        """1 - span F1."""
        return 1 - self.f1

    @property
    def exact_error(self) -> float:
        """Share of utterances in which the intent or any slot is wrong."""
        return float(self.exact_wrong.mean())

    @property
    def semer(self) -> float:
        """Semantic error rate: the intent counts as one slot more.

        SemER = (slot substitutions + deletions + insertions + intent errors) / (reference slots + intents), over all
        utterances together; above 1 when insertions abound.
        """
        return float((self.slot_errors + self.intent_wrong).sum() / (self.slots + 1).sum())

    def scores(self) -> dict[str, float]:
        """The four errors by name."""
        return {"intent": self.intent_error, "slots": self.slot_error, "exact": self.exact_error, "semer": self.semer}


def understood(
    words: Sequence[Sequence[str]],
    intents: tuple[Sequence[str], Sequence[str]],
    tags: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
) -> Understood:
    """Score predictions: intents and tags are (gold, predicted). Raises WorkbenchError when there are none."""
    if not words:
        raise WorkbenchError("no utterance to evaluate on: the test set is empty")
    (gold, predicted), (right, ours) = intents, tags
    wrong = np.array([g != p for g, p in zip(gold, predicted, strict=True)])
    errors, slots = np.array([slot_errors(w, g, p) for w, g, p in zip(words, right, ours, strict=True)]).T
    return Understood(wrong, wrong | (errors > 0), errors, slots, slot_f1(right, ours))


def averaged(runs: Sequence[Understood]) -> Understood:
    """The mean counts (and f1) of several systems of one kind on the same utterances; its scores are their mean.

    Raises WorkbenchError for other utterances.
    """
    if any(not np.array_equal(run.slots, runs[0].slots) for run in runs):
        raise WorkbenchError("an average needs every system on the same utterances, in the same order")
    intent, exact, errors = (np.mean([getattr(run, name) for run in runs], axis=0)
                             for name in ("intent_wrong", "exact_wrong", "slot_errors"))  # fmt: skip
    return Understood(intent, exact, errors, runs[0].slots, float(np.mean([run.f1 for run in runs])))


def relative_change(new: float, base: float) -> float:
    """100 (new - base) / base, the paper's unit: negative is better. Raises WorkbenchError where the base is 0."""
    if base == 0:
        raise WorkbenchError("the baseline makes no error: a relative change has nothing to be relative to")
    return 100 * (new - base) / base


def bootstrap_change(new: Understood, base: Understood, *, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the relative change of SemER, both systems on the same utterances drawn with replacement.

    Paired: what makes an utterance hard for both is not counted as noise. Raises WorkbenchError for other utterances.
    """
    if not np.array_equal(new.slots, base.slots):
        raise WorkbenchError("a paired bootstrap needs both systems on the same utterances, in the same order")
    rng = np.random.default_rng(seed)
    n = len(base.slots)
    picks = rng.integers(n, size=(draws, n))
    ours, theirs = ((u.slot_errors + u.intent_wrong)[picks].sum(1) for u in (new, base))
    kept = theirs > 0
    changes = 100 * (ours[kept] - theirs[kept]) / theirs[kept]
    low, high = np.quantile(changes, [0.025, 0.975])
    return float(low), float(high)
