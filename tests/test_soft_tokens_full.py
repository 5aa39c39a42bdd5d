"""Soft tokens on the paper's own kind of task: local folders in the Hub's formats, tiny models, real sizes on meta."""

import json
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from workbench.data.questions import Choice, boxed, choice_of, math_verify_grader, question_of, same_number
from workbench.errors import WorkbenchError
from workbench.papers import soft_tokens as paper
from workbench.papers import soft_tokens_study as studies
from workbench.papers.soft_tokens_full import (
    MARKER,
    PROMPT,
    choice_scores,
    closes_box,
    ends_with_text,
    full_task,
    text_format,
)
from workbench.papers.soft_tokens_tasks import Task

WORDS = (
    f"{PROMPT.format(question='')} {MARKER} \\boxed{{ }} How many apples are plus ? Answer: Question: red blue {{ frac"
)
VOCABULARY = ["<unk>", "<bos>", "<eos>", "frac", *dict.fromkeys(WORDS.split()), *map(str, range(12)), "}."]


@pytest.fixture(scope="module")
def words():
    table = Tokenizer(WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    table.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=table, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def model_of(family, vocabulary):
    torch.manual_seed(0)
    small = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
    return (
        LlamaForCausalLM(LlamaConfig(**small)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**small))
    ).eval()


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def hub(tmp_path_factory, words):
    """Folders of the Hub's formats and a tiny model of each family."""
    root = tmp_path_factory.mktemp("hub")
    sums = [{"question": f"How many apples are {i} plus {j} ?", "answer": f"{i} plus {j}\n#### {i + j}"}
            for i in range(6) for j in range(5)]  # fmt: skip
    lines(root / "gsm8k" / "train.jsonl", sums)
    lines(root / "gsm8k" / "test.jsonl", sums[:9])
    lines(
        root / "math" / "test.jsonl", [{"problem": f"How many {i} ?", "solution": f"\\boxed{{{i}}}"} for i in range(5)]
    )
    arc = {"question": "How many ?", "choices": {"text": ["red", "blue plus"], "label": ["A", "B"]}, "answerKey": "B"}
    lines(root / "ai2_arc" / "test.jsonl", [arc] * 3)
    lines(
        root / "hellaswag" / "validation.jsonl", [{"ctx": "apples are", "endings": ["red", "blue"], "label": "0"}] * 3
    )
    lines(root / "mmlu" / "test.jsonl", [{"question": "How many ?", "choices": ["1", "2", "3"], "answer": 2}] * 3)
    for family in ("llama", "qwen2"):
        model_of(family, len(VOCABULARY)).save_pretrained(root / family)
        words.save_pretrained(root / family)
    return root


def config_of(hub, family="llama", **changes):
    settings = {
        "model": str(hub / family), "data": str(hub / "gsm8k"), "harder_data": str(hub / "math"),
        "other_data": tuple(str(hub / n) for n in ("ai2_arc", "hellaswag", "mmlu")), "thoughts": 5,
        "test_thoughts": 7, "answer_tokens": 4, "prompts": 1, "samples": 4, "accumulate": 2, "rows": 2, "steps": 2,
        "every": 1, "problems": 4, "trail_problems": 3, "draws": 4, "ks": (1, 4), "workers": 1,
    }  # fmt: skip
    return paper.Config(**{**settings, **changes})


def test_the_full_path_trains_and_measures_on_local_folders(hub, tmp_path):
    config = config_of(hub, arms=("base", "hard", "soft"))
    known = studies.study(config, tmp_path, studies.Record(tmp_path), seed=0)
    soft = known["soft", 0]
    assert {"nll", "accuracy ai2_arc", "nll hellaswag", "accuracy mmlu"} <= set(soft)
    assert soft["nll"] == pytest.approx(sum(soft[f"nll {n}"] for n in ("ai2_arc", "hellaswag", "mmlu")) / 3)
    assert max(len(e) for e in soft["entropy"].values()) <= config.test_thoughts and len(soft["trail"]) == 3
    assert (tmp_path / "arms" / "soft, seed 0" / "student" / "model.safetensors").exists()
    stored = {r["measure"] for r in studies.Record(tmp_path).records("result")}
    assert {"soft_learns", "other_pass_gain", "nll_gain", "matched_nll_gain"} <= stored


@pytest.mark.parametrize("arm", ["soft", "hard"])
def test_a_qwen2_trains_through_the_same_code(hub, words, arm):
    class Marked(Task):
        """An untrained model boxes nothing: marks that differ, so that there is something to reinforce."""

        def marks(self, chains, questions):
            return torch.arange(len(chains)) % 3

    config = config_of(hub, "qwen2", problems=2)
    task = Marked(**vars(full_task(config, words)))
    model = paper.load_base(config, task)
    before = {n: p.clone() for n, p in model.named_parameters()}
    paper.train(config, task, model, arm, 0, progress=False)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.ndim == 2)
    assert 0 < studies.measure(config, model, task, 0)["nll"]


def test_splits_do_not_meet_and_prompts_are_padded_on_the_left(hub):
    task = paper.load_task(config_of(hub))
    drawn = {s: task.draw(torch.Generator().manual_seed(0), 200, s) for s in ("train", "validation", "test", "other")}

    def asked(split):
        return {task.tokenizer.decode(i[m]) for i, m in zip(drawn[split].ids, drawn[split].mask, strict=True)}

    assert not asked("train") & asked("validation")
    assert len(drawn["test"]) == len(asked("test")) == 9  # each test question once, however many are asked for
    mixed = drawn["train"].mask
    assert mixed[:, -1].all()
    assert task.tokenizer.decode(drawn["other"].ids[0][drawn["other"].mask[0]]).count("How") == 1


def test_what_stops_a_chain_and_closes_a_box(words):
    stop, end = ends_with_text(words, MARKER), closes_box(words)
    texts = ["plus 1 The final answer is:", "The final answer is: 1", "red red red answer is:"]
    ids = [words.encode(t, add_special_tokens=False)[-5:] for t in texts]
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(i)) + i for i in ids])
    assert stop(tokens).tolist() == [True, False, False]
    answers = torch.tensor([words.encode(t, add_special_tokens=False) for t in ("1 } 2", "frac { 1", "1 2 <eos>")])
    assert end(answers).tolist() == [True, False, True]
    format = text_format(words)
    assert words.decode(format.stopped).endswith("\\boxed{") and words.decode(format.limit).startswith(MARKER)


def test_boxes_numbers_and_rows():
    assert boxed("\\frac{1}{2} } and") == "\\frac{1}{2}" and boxed("{1") is None and boxed("") is None
    assert same_number("$1,200.00", "1200") and same_number("18.", "18") and not same_number("18", "19")
    assert same_number("\\frac12", "\\frac12") and not same_number("x", "y")
    assert question_of({"question": "q", "answer": "so\n#### 1,200"}) == ("q", "1200")
    assert question_of({"problem": "p", "solution": "is \\boxed{\\frac{1}{2}}."}) == ("p", "\\frac{1}{2}")
    assert question_of({"problem": "p", "answer": " 3 ", "solution": "x"}) == ("p", "3")  # full-qwen's columns
    assert question_of({"question": "p", "final_answer": ["7"]}) == ("p", "7")
    with pytest.raises(WorkbenchError, match="no checkable answer"):
        question_of({"question": "q"})
    with pytest.raises(WorkbenchError, match="no question column"):
        question_of({"text": "q"})
    with pytest.raises(WorkbenchError, match="multiple-choice"):
        choice_of({"text": "q"})
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert choice_of(row) == Choice("Question: q\nAnswer:", ("a", "b"), 1)


def test_the_papers_grader_is_called_as_documented(monkeypatch):
    """math-verify's README: parse both texts, then verify(gold, answer); "order here is important"."""
    asked = []
    fake = types.ModuleType("math_verify")
    fake.parse = lambda text: [text]
    fake.verify = lambda gold, target: asked.append((gold, target)) or gold == target
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    grade = math_verify_grader()
    assert grade("7", "7") is True and grade("8", "7") is False
    assert asked[1] == (["\\boxed{7}"], ["\\boxed{8}"])
    monkeypatch.setitem(sys.modules, "math_verify", None)  # what an import of a missing package meets
    with pytest.raises(WorkbenchError, match="pip install") as error:
        math_verify_grader()
    assert "\n" not in str(error.value)


def test_the_papers_grader_knows_equal_forms():
    pytest.importorskip("math_verify")
    grade = math_verify_grader()
    for answer, truth in (("\\frac12", "0.5"), ("1,200", "1200"), ("x+1", "1+x"), ("(1,2)", "(1, 2)")):
        assert grade(answer, truth), (answer, truth)
    for answer, truth in (("3", "4"), ("", "4"), ("\\frac{", "4")):
        assert not grade(answer, truth), (answer, truth)


def test_choices_are_scored_one_token_at_a_time(words):
    model = model_of("llama", len(VOCABULARY))
    asked = [Choice("How many apples", ("red", "blue plus 1"), 1), Choice("are", ("1", "2"), 0)]
    nll, right = 0.0, 0
    for c in asked:
        totals = []
        for text in c.choices:
            ids = words.encode(c.question) + words.encode(text, add_special_tokens=False)
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(words.encode(c.question))
            totals.append((sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids))), len(ids) - start))
        nll -= totals[c.right][0] / totals[c.right][1]
        right += max(range(2), key=lambda i: totals[i][0]) == c.right
    found = choice_scores(model, words, asked)
    assert found["nll"] == pytest.approx(nll / 2, rel=1e-5) and found["accuracy"] == right / 2


def test_rows_and_micro_batches_are_the_whole_batch(hub):
    """B prompts as B micro-batches of one: the loop's mean over micro-batches is the paper's 1 / (BG)."""
    config = config_of(hub)
    assert config.prompts * config.accumulate == 2
    full = paper.PRESETS["full"]
    assert (full.prompts * full.accumulate, full.samples, full.steps, full.thoughts, full.test_thoughts) == (
        2, 32, 4000, 128, 512,
    )  # fmt: skip
    assert full.rate("hard") == full.rate("soft") == 6e-6 and full.reward == 100


def test_what_cannot_be_had_is_one_line(hub, tmp_path, words, monkeypatch):
    with pytest.raises(WorkbenchError, match="could not be loaded|empty folder|unknown|reached|offline|OFFLINE|cache"):
        paper.load_task(config_of(hub, data=str(tmp_path / "nothing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkbenchError, match="empty folder"):
        paper.load_task(config_of(hub, data=str(tmp_path / "empty")))
    with pytest.raises(WorkbenchError, match="no multiple-choice set"):
        paper.load_task(config_of(hub, other_data=()))
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(WorkbenchError, match="math-verify"):
        paper.load_task(config_of(hub, grader="math-verify"))
    model_of("llama", 8).save_pretrained(tmp_path / "other")
    words.save_pretrained(tmp_path / "other")
    config = config_of(hub, model=str(tmp_path / "other"))
    with pytest.raises(WorkbenchError, match="two vocabularies"):
        paper.load_base(config, paper.load_task(config), 0)


# the public config.json files, as far as they differ from the classes' defaults
LLAMA3 = {"vocab_size": 128_256, "num_key_value_heads": 8}
REAL = {
    "Llama-3.2-3B": (LlamaForCausalLM, LlamaConfig(**LLAMA3, hidden_size=3072, intermediate_size=8192, head_dim=128,
                     num_hidden_layers=28, num_attention_heads=24, tie_word_embeddings=True), 3_212_749_824),
    "Llama-3.1-8B": (LlamaForCausalLM, LlamaConfig(**LLAMA3, hidden_size=4096, intermediate_size=14336,
                     num_hidden_layers=32, num_attention_heads=32), 8_030_261_248),
    "Qwen2.5-3B": (Qwen2ForCausalLM, Qwen2Config(vocab_size=151_936, hidden_size=2048, intermediate_size=11008,
                   num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True),
                   3_085_938_688),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_papers_models_have_their_sizes(name):
    cls, config, parameters = REAL[name]
    with torch.device("meta"):
        model = cls(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == config.tie_word_embeddings
