"""Multiple choice: likelihoods against brute force, letters read as the benchmarks do, their files, paired tests."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from workbench.data.bpe import train_bpe
from workbench.errors import WorkbenchError
from workbench.evaluation import multiple_choice as mc
from workbench.evaluation.multiple_choice import Item
from workbench.evaluation.paired import bootstrap, mcnemar, wilson
from workbench.evaluation.security_benchmarks import read_benchmark
from workbench.models.causal_lm import small_llama

A, B, C, D = (frozenset({i}) for i in range(4))
ITEMS = [
    Item("it writes past the end", ("overflow", "injection", "a race", "a leak of secrets"), B),
    Item("two threads", ("race", "leak"), A),
]


@pytest.fixture(scope="module")
def writer():
    """An untrained little Llama and its tokenizer: any model has exact likelihoods."""
    text = ["the quick brown fox writes past the end of a buffer", "a race between threads; secrets leak: A B C D"] * 9
    tokenizer = train_bpe(text, 130)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    model = small_llama(len(tokenizer), width=16, layers=2, heads=2, context=128, seed=3, eos=tokenizer.eos_token_id)
    return model.eval(), tokenizer


def by_hand(model, tokenizer, context, continuation):
    """log p token by token, one forward pass each, in float64."""
    ids = [tokenizer.eos_token_id, *tokenizer(context)["input_ids"]]
    total = 0.0
    for token in tokenizer(continuation)["input_ids"]:
        with torch.no_grad():
            logits = model.double()(torch.tensor([ids])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    model.float()
    return total


def test_log_likelihoods_are_the_sum_of_every_tokens(writer):
    pairs = [
        ("a race", " between threads"),
        ("", "the fox"),
        ("the quick brown fox writes past", " the end of a buffer"),
    ]
    found = mc.log_likelihoods(*writer, pairs, batch=2)
    assert found.tolist() == pytest.approx([by_hand(*writer, *p) for p in pairs], abs=1e-4)
    # padding to a longer neighbour changes nothing, nor does the order
    alone = [mc.log_likelihoods(*writer, [p])[0] for p in pairs]
    assert found.tolist() == pytest.approx([float(a) for a in alone], abs=1e-4)


def test_a_context_too_long_loses_its_beginning_and_nothing_else(writer):
    model, tokenizer = writer
    context, rest = "the quick brown fox writes past the end of a buffer", " threads"
    ids = tokenizer(context)["input_ids"]
    room = 12 - len(tokenizer(rest)["input_ids"]) - 1
    kept = tokenizer.decode(ids[-room:])
    short = mc.log_likelihoods(model, tokenizer, [(context, rest)], limit=12)
    assert float(short[0]) == pytest.approx(by_hand(model, tokenizer, kept, rest), abs=1e-4)
    with pytest.raises(WorkbenchError, match="cannot score a continuation of 0 tokens"):
        mc.log_likelihoods(model, tokenizer, [(context, "")])


def test_the_three_scorers_are_the_quantities_they_name(writer):
    model, tokenizer = writer
    item = ITEMS[0]
    letters, pmi, channel = (
        f(model, tokenizer, ITEMS) for f in (mc.letter_scores, mc.option_scores, mc.channel_scores)
    )
    assert letters.shape == pmi.shape == channel.shape == (2, 4)
    for scores in (letters, pmi, channel):
        assert torch.isneginf(scores[1, 2:]).all() and torch.isfinite(scores[1, :2]).all()
    for k, option in enumerate(item.options):
        assert float(letters[0, k]) == pytest.approx(
            by_hand(model, tokenizer, mc.letter_prompt(item), f" {mc.LETTERS[k]}"), abs=1e-4
        )
        expected = by_hand(model, tokenizer, f"{item.question}\n", option) - by_hand(model, tokenizer, "\n", option)
        assert float(pmi[0, k]) == pytest.approx(expected, abs=1e-4)
        expected = by_hand(model, tokenizer, f"{option}:", f" {item.question}")
        assert float(channel[0, k]) == pytest.approx(expected, abs=1e-4)


def test_generation_is_greedy_and_padding_on_the_left_is_not_seen(writer):
    model, tokenizer = writer
    prompts = ["a", "the quick brown fox writes past the end"]
    together = mc.generate(model, tokenizer, prompts, new_tokens=5)
    assert together == [mc.generate(model, tokenizer, [p], new_tokens=5)[0] for p in prompts]
    first = mc.next_log_probs(model, tokenizer, prompts)
    for text, row in zip(together, first, strict=True):
        assert text.startswith(tokenizer.decode([int(row.argmax())], skip_special_tokens=True))


def test_extractors_differ_where_the_official_ones_do():
    table = {
        # text: first letter, last line, answer marker, letter set
        "B": (B, B, None, B),
        "The Answer is B": (B, None, None, A | B),
        "I can't say.\nX": (None, None, None, None),
        "ANSWER: c": (None, None, C, A),
        "Answer: B": (B, None, B, B),
        "It violates the CIA triad.\n**D**": (D, D, None, A | C | D),
        "": (None, None, None, None),
    }
    for text, expected in table.items():
        assert tuple(extract(text) for extract in mc.EXTRACTORS.values()) == expected, text


def test_unparsable_answers_are_wrong_and_sets_are_compared_exactly():
    items = [Item("q", ("a", "b", "c", "d"), A | C), Item("q", ("a", "b"), frozenset()), ITEMS[0]]
    assert mc.correct(items, [A | C, None, None]) == [True, True, False]
    assert mc.correct(items, [A, A, B]) == [False, False, True]


def test_rotation_moves_the_key_with_its_option():
    for by in range(5):
        turned = mc.rotate(ITEMS[0], by)
        assert turned.options[next(iter(turned.answers))] == "injection"
        assert turned.answers == frozenset({(1 + by) % 4})
    with pytest.raises(WorkbenchError, match="prompt of its own"):
        mc.rotate(Item("q", ("a", "b"), A, prompt="as is"), 1)


def test_position_bias_shows_a_model_that_always_says_b():
    items = [mc.rotate(ITEMS[0], k) for k in range(4)]
    bias = mc.position_bias(items, [B] * 4)
    assert bias["said"] == [0, 1, 0, 0] and bias["right"] == [0.25] * 4
    assert bias["accuracy"] == [0, 1, 0, 0], "right exactly where the key is B: 25 % with no knowledge"
    assert mc.longest_option(items) == [frozenset({(3 + k) % 4}) for k in range(4)]
    assert mc.majority_letter([*items, ITEMS[0]]) == [B] * 5


def test_benchmarks_in_their_published_formats(tmp_path):
    tsv = tmp_path / "cti-mcq.tsv"
    with open(tsv, "w", newline="") as f:
        writer = csv.writer(f, delimiter="\t")
        writer.writerow(["URL", "Question", "Option A", "Option B", "Option C", "Option D", "Prompt", "GT"])
        writer.writerow(["https://attack.mitre.org/techniques/T1548/", "Which?", "w", "x", "y", "z", "Say one. ", "b"])
    name, items = read_benchmark(f"cti-mcq:{tsv}")
    assert (name, items[0].answers, items[0].tag, mc.letter_prompt(items[0])) == (
        "cti-mcq", B, "attack.mitre.org", "Say one. "
    ), "a lower-case key is upper-cased, and the prompt is the file's own"  # fmt: skip

    metric = tmp_path / "CyberMetric-80-v1.json"
    row = {"question": "Which?", "answers": {"A": "w", "B": "x", "C": "y", "D": "z"}, "solution": "D"}
    metric.write_text(json.dumps({"questions": [row]}))
    items = read_benchmark(f"cybermetric:{metric}")[1]
    assert items[0].answers == D and items[0].options == ("w", "x", "y", "z")
    assert "A) w, B) x, C) y, D) z" in items[0].prompt and "ANSWER: X" in items[0].prompt

    several = tmp_path / "questions.json"
    row = {"source": "CWE", "question": "All?", "choices": ["A: w", "B: x", "C: y", "D: z"], "answer": "AC"}
    several.write_text(json.dumps([row, row | {"answer": ""}]))
    items = read_benchmark(f"seceval:{several}")[1]
    assert items[0].answers == A | C and items[0].options == ("w", "x", "y", "z") and items[0].tag == "CWE"
    assert items[1].answers == frozenset() and items[0].prompt.endswith("Answer:")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("seceval", "[]", "holds no question"),
        ("seceval", "{}", "no list of questions"),
        ("seceval", "not json", "is not JSON"),
        ("cybermetric", '{"questions": [{"question": "q", "answers": {"A": "x", "B": "y"}}]}', "has no 'solution'"),
        (
            "cybermetric",
            '{"questions": [{"question": "q", "answers": {"A": "x"}, "solution": "E"}]}',
            "no letter from A",
        ),
        ("cti-mcq", "URL\tQuestion\nu\tq\n", "row 1 has no 'Option A'"),
    ],
)
def test_a_file_in_another_format_is_told_in_one_line(tmp_path, name, content, message):
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(WorkbenchError, match=message) as error:
        read_benchmark(f"{name}:{path}")
    assert "\n" not in str(error.value)


def test_a_missing_benchmark_is_told_in_one_line(tmp_path):
    with pytest.raises(WorkbenchError, match="no benchmark file"):
        read_benchmark(f"seceval:{tmp_path}/none.json")
    with pytest.raises(WorkbenchError, match="NAME:PATH"):
        read_benchmark("mmlu")


def test_wilson_against_its_definition():
    found = wilson(37, 100)
    z = stats.norm.ppf(0.975)
    for end in (found.low, found.high):  # the ends solve |p - end| = z sqrt(end (1 - end) / n)
        assert abs(0.37 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 100))
    assert wilson(0, 10).low == pytest.approx(0, abs=1e-12)


def test_a_paired_interval_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.6
    after = before.copy()
    after[:20] = True  # twenty items at most are fixed, none broken
    gain = bootstrap((after.astype(float) - before).tolist(), seed=1)
    apart = math.hypot(*(wilson(int(x.sum()), 400).high - x.mean() for x in (before, after)))
    assert gain.low > 0 and gain.high - gain.mean < 0.5 * apart
    # the interval of a mean agrees with the normal one where that is exact enough
    half = 1.96 * (after.astype(float) - before).std() / 20
    assert (gain.high - gain.low) / 2 == pytest.approx(half, rel=0.15)


def test_mcnemar_counts_what_only_one_got_right():
    before, after = [True] * 50 + [False] * 10, [True] * 48 + [False] * 2 + [True] * 9 + [False]
    assert mcnemar(before, after) == pytest.approx(stats.binomtest(9, 11, 0.5).pvalue)
    assert mcnemar([True, False], [True, False]) == 1.0
