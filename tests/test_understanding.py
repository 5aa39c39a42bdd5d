"""Semantic error rate and span F1 on cases worked out by hand; relative changes and the paired bootstrap."""

import numpy as np
import pytest

from workbench.errors import WorkbenchError
from workbench.evaluation.understanding import (
    averaged,
    bootstrap_change,
    relative_change,
    repaired,
    slot_errors,
    slot_f1,
    spans,
    understood,
)

WORDS = "wake me at five am on monday".split()
GOLD = ["O", "O", "O", "B-time", "I-time", "O", "B-date"]


def score(predicted, intent="alarm"):
    return understood([WORDS], (["alarm"], [intent]), ([GOLD], [predicted]))


@pytest.mark.parametrize(
    ("predicted", "intent", "errors", "semer"),
    [
        (GOLD, "alarm", 0, 0.0),
        (GOLD, "light", 0, 1 / 3),  # the intent alone: one error of two slots and one intent
        (["O"] * 7, "alarm", 2, 2 / 3),  # two deletions
        (["O", "O", "O", "B-time", "O", "O", "B-date"], "alarm", 1, 1 / 3),  # "five" for "five am": a substitution
        (["O", "O", "O", "B-date", "I-date", "O", "B-date"], "alarm", 2, 2 / 3),  # other label: deletion and insertion
        (["B-name", "O", "O", "B-time", "I-time", "O", "B-date"], "alarm", 1, 1 / 3),  # one insertion
        (["B-x", "B-x", "B-x", "B-x", "B-x", "B-x", "B-x"], "light", 9, 10 / 3),  # more errors than slots
    ],
)
def test_semantic_error_rate_by_hand(predicted, intent, errors, semer):
    assert slot_errors(WORDS, GOLD, predicted) == (errors, 2)
    assert score(predicted, intent).semer == pytest.approx(semer)


def test_semer_sums_before_it_divides():
    short = (["stop"], ["O"], ["O"])
    u = understood([WORDS, short[0]], (["alarm", "stop"], ["alarm", "go"]), ([GOLD, short[1]], [GOLD, short[2]]))
    assert u.semer == pytest.approx(1 / 4)  # not the mean of 0/3 and 1/1
    assert (u.intent_error, u.exact_error, u.slot_error) == (0.5, 0.5, 0.0)


def test_the_order_of_equal_slots_does_not_matter_to_semer():
    assert slot_errors(["a", "b"], ["B-x", "B-x"], ["B-x", "B-x"]) == (0, 2)
    assert slot_errors(["a", "a"], ["B-x", "O"], ["O", "B-x"]) == (0, 1)  # the value counts, not its place


def test_spans_follow_conlleval():
    assert spans(["I-a", "I-a", "I-b", "O", "B-b", "B-b"]) == [("a", 0, 2), ("b", 2, 3), ("b", 4, 5), ("b", 5, 6)]
    assert repaired(["O", "I-a", "I-b"]) == ["O", "B-a", "B-b"]


def test_slot_f1_counts_spans_not_tokens():
    gold = [GOLD, ["O"] * 7]
    half = [["O", "O", "O", "B-time", "O", "O", "B-date"], ["O"] * 7]
    assert slot_f1(gold, half) == pytest.approx(0.5)  # 1 right of 2 found and 2 wanted
    assert slot_f1(gold, [["O"] * 7] * 2) == 0.0  # 11 of 14 tokens right: the trap of token accuracy
    assert slot_f1(gold, gold) == 1.0 and slot_f1([["O"]], [["O"]]) == 1.0
    with pytest.raises(WorkbenchError, match="2 predicted tags for 1 words"):
        slot_f1([["O"]], [["O", "O"]])


def test_f1_agrees_with_a_count_by_hand_on_random_tags():
    rng = np.random.default_rng(0)
    names = np.array(["O", "B-a", "I-a", "B-b", "I-b"])
    gold, ours = ([list(names[rng.integers(5, size=9)]) for _ in range(60)] for _ in range(2))
    found = [set(spans(t)) for t in ours]
    wanted = [set(spans(t)) for t in gold]
    right = sum(len(a & b) for a, b in zip(found, wanted, strict=True))
    by_hand = 2 * right / (sum(map(len, found)) + sum(map(len, wanted)))
    assert slot_f1(gold, ours) == pytest.approx(by_hand)


def test_relative_changes_are_of_errors():
    assert relative_change(0.03, 0.04) == pytest.approx(-25)
    with pytest.raises(WorkbenchError, match="nothing to be relative to"):
        relative_change(0.1, 0.0)
    with pytest.raises(WorkbenchError, match="test set is empty"):
        understood([], ([], []), ([], []))


def test_the_bootstrap_is_paired():
    rng = np.random.default_rng(1)
    hard = rng.random(300) < 0.5
    words, gold = [["w"]] * 300, [["B-x"]] * 300

    def system(wrong):
        return understood(words, (["i"] * 300, ["j" if w else "i" for w in wrong]), (gold, gold))

    base, new = system(hard), system(hard & (rng.random(300) < 0.8))
    low, high = bootstrap_change(new, base)
    change = relative_change(new.semer, base.semer)
    assert low < change < high < 0
    same = bootstrap_change(base, base)
    assert same == (0.0, 0.0)  # what is hard for both is no noise
    with pytest.raises(WorkbenchError, match="same utterances"):
        bootstrap_change(new, understood(words[:9], (["i"] * 9, ["i"] * 9), (gold[:9], gold[:9])))


def test_an_average_of_systems_scores_the_mean_of_their_scores():
    good, bad = score(GOLD), score(["O"] * 7, "light")
    both = averaged([good, bad])
    for name, value in both.scores().items():
        assert value == pytest.approx((good.scores()[name] + bad.scores()[name]) / 2) == 0.5
    assert bootstrap_change(both, both) == (0.0, 0.0)
    with pytest.raises(WorkbenchError, match="the same utterances"):
        averaged([good, understood([["stop"]], (["stop"], ["stop"]), ([["O"]], [["O"]]))])
