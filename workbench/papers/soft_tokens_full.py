"""The paper's own tasks for a Hub model: GSM8K or MATH questions, held-out multiple choice, prompt, stop rules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.data.questions import (
    Choice,
    boxed,
    choice_of,
    load_split,
    math_verify_grader,
    question_of,
    same_number,
)  # fmt: skip
from workbench.errors import WorkbenchError
from workbench.models.thinking import Ended, Format
from workbench.papers.soft_tokens_settings import Config
from workbench.papers.soft_tokens_tasks import Questions, Task

MARKER = "The final answer is:"
# the paper's prompt asks for full reasoning and this last line (appendix B); the wording is ours
PROMPT = (
    'User: {question}\nReason step by step, then end with the line "The final answer is: \\boxed{{answer}}".\n'
    "Assistant:"
)
CHOICE_SPLITS = {"ai2_arc": "test", "hellaswag": "validation", "mmlu": "test"}
HELD_OUT = 20  # every 20th training question is a validation question, never trained on


def ends_with_text(tokenizer: Any, text: str, window: int = 24) -> Ended:
    """True for rows whose last tokens decode to something that ends with `text`, white space aside."""

    def ended(tokens: Tensor) -> Tensor:
        tails = tokenizer.batch_decode(tokens[:, -window:].cpu())
        return torch.tensor([tail.rstrip().endswith(text) for tail in tails], device=tokens.device)

    return ended


def closes_box(tokenizer: Any) -> Ended:
    """True for rows whose tokens close the box that the prefill opened, or hold the end-of-text token."""

    def ended(tokens: Tensor) -> Tensor:
        texts = tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
        closed = torch.tensor([boxed(text) is not None for text in texts], device=tokens.device)
        return closed | (tokens == tokenizer.eos_token_id).any(1)

    return ended


def text_format(tokenizer: Any) -> Format:
    """The stop and prefill rules of appendix C."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    return Format(
        ends_with_text(tokenizer, MARKER), closes_box(tokenizer), ids(" \\boxed{"), ids(f"\n{MARKER} \\boxed{{")
    )


def choice_scores(model: Any, tokenizer: Any, asked: Sequence[Choice]) -> dict[str, float]:
    """Keys "nll": nats per token of the right choice after its question; "accuracy": share whose right choice has the
    largest log-probability. One forward pass a question, its choices as rows."""
    nll, right = 0.0, 0
    for c in asked:
        start = tokenizer.encode(c.question)
        ends = [tokenizer.encode(" " + text.strip(), add_special_tokens=False) for text in c.choices]
        width = len(start) + max(map(len, ends))
        ids = torch.tensor([(start + end + [0] * width)[:width] for end in ends], device=model.device)
        mask = torch.tensor([[i < len(start) + len(e) for i in range(width)] for e in ends], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, len(start) - 1 : -1].float()
        each = -F.cross_entropy(logits.transpose(1, 2), ids[:, len(start) :], reduction="none") * mask[:, len(start) :]
        total = each.sum(1)
        right += int(total.argmax()) == c.right
        nll -= float(total[c.right]) / len(ends[c.right])
    return {"nll": nll / len(asked), "accuracy": right / len(asked)}


def _knowledge(config: Config, tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    sets = {}
    for id in config.other_data:
        short = id.rpartition("/")[2].partition(":")[0]
        data = load_split(id, CHOICE_SPLITS.get(short, "test"))
        sets[short] = [choice_of(data[i]) for i in range(min(config.problems, len(data)))]

    def knowledge(model: Any) -> dict[str, float]:
        out: dict[str, float] = {}
        for name, asked in sets.items():
            out |= {f"{key} {name}": value for key, value in choice_scores(model, tokenizer, asked).items()}
        means = [v for k, v in out.items() if k.startswith("nll ")]
        return {"nll": sum(means) / len(means), **out}

    return knowledge


def full_task(config: Config, tokenizer: Any) -> Task:
    """The task of a full preset; all its data is loaded and looked at before anything trains. Raises WorkbenchError."""
    if not config.other_data:
        raise WorkbenchError("other_data names no multiple-choice set: what is forgotten could not be measured")
    grade = same_number if config.grader == "number" else math_verify_grader()
    if tokenizer.eos_token_id is None:
        raise WorkbenchError("the tokenizer has no end-of-text token, which pads prompts and ends answers")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    data = load_split(config.data, "train")
    held = range(0, len(data), HELD_OUT)
    pools: dict[str, tuple[Any, list[int]]] = {
        "train": (data, [i for i in range(len(data)) if i % HELD_OUT]),
        "validation": (data, list(held)),
    }
    for split, id in (("test", config.test_data or config.data), ("other", config.harder_data)):
        part = load_split(id or config.data, "test")
        pools[split] = (part, list(range(len(part))))
    for split, (part, rows) in pools.items():
        if not rows:
            raise WorkbenchError(f"the split {split!r} of {config.data!r} has no question: it needs 2 rows or more")
        question_of(part[rows[0]])

    def draw(generator: torch.Generator, count: int, split: str) -> Questions:
        part, rows = pools[split]
        chosen = torch.randint(len(rows), (count,), generator=generator)
        if split != "train":  # a test asks each question once
            chosen = torch.randperm(len(rows), generator=generator)[:count]
        pairs = [question_of(part[rows[i]]) for i in chosen.tolist()]
        texts = tokenizer([PROMPT.format(question=q) for q, _ in pairs], padding=True, return_tensors="pt")
        return Questions(texts["input_ids"], texts["attention_mask"].bool(), [a for _, a in pairs])

    return Task(
        tokenizer, text_format(tokenizer), draw, grade, _knowledge(config, tokenizer), config.thoughts,
        config.answer_tokens,
    )  # fmt: skip
