"""Multiple-choice questions for causal language models: exact log-likelihoods, generated letters, and extractors."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError

LETTERS = "ABCDEFGHIJ"
Answer = frozenset[int] | None  # chosen options; None: no answer could be read


@dataclass(frozen=True)
class Item:
    """One question. answers: the right options, none or several are possible; tag: what results are split by.

    prompt: the benchmark's own prompt, used instead of `letter_prompt`'s.
    """

    question: str
    options: tuple[str, ...]
    answers: frozenset[int]
    tag: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        if not 2 <= len(self.options) <= len(LETTERS):
            raise WorkbenchError(f"a question takes 2 to {len(LETTERS)} options, got {len(self.options)}")
        if not all(0 <= a < len(self.options) for a in self.answers):
            raise WorkbenchError(f"the answer {sorted(self.answers)} is none of {len(self.options)} options")


def rotate(item: Item, by: int) -> Item:
    """The options moved `by` places down, the last ones to the top. Raises WorkbenchError for a fixed prompt."""
    if item.prompt:
        raise WorkbenchError("this question has a prompt of its own, whose options cannot be moved")
    n = len(item.options)
    options = tuple(item.options[(i - by) % n] for i in range(n))
    return replace(item, options=options, answers=frozenset((a + by) % n for a in item.answers))


def letter_prompt(item: Item) -> str:
    """ "Question: ... A) ... B) ... Answer:", or the item's own prompt."""
    if item.prompt:
        return item.prompt
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, item.options, strict=False)]
    return "\n".join([f"Question: {item.question}", *lines, "Answer:"])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _split(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both, as the whole is tokenised where that keeps the context's own tokens."""
    first, whole = _ids(tokenizer, context), _ids(tokenizer, context + continuation)
    if len(whole) > len(first) and whole[: len(first)] == first:
        return first, whole[len(first) :]
    return first, _ids(tokenizer, continuation)


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, batch: int = 64, limit: int | None = None
) -> Tensor:
    """log p(continuation | context) in nats for each (context, continuation), float64 (N,): a sum over its tokens.

    Every context starts behind an end-of-text token, as a packed document does. limit: tokens the model can take; the
    context loses its beginning where it must. Raises WorkbenchError for an empty continuation or one beyond the limit.
    """
    mark = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows = []
    for context, continuation in pairs:
        before, after = _split(tokenizer, context, continuation)
        if not after or (limit is not None and len(after) >= limit):
            raise WorkbenchError(f"cannot score a continuation of {len(after)} tokens: {continuation[:40]!r}")
        room = len(before) if limit is None else limit - len(after) - 1
        rows.append(([mark, *(before[len(before) - min(room, len(before)) :])], after))
    device = next(model.parameters()).device
    out = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(rows[i][0]) + len(rows[i][1]) for i in chosen)
        ids = torch.full((len(chosen), longest), mark, dtype=torch.int64)
        for row, i in enumerate(chosen):  # padded on the right: a causal model does not see it
            whole = [*rows[i][0], *rows[i][1]]
            ids[row, : len(whole)] = torch.tensor(whole)
        logits = model(input_ids=ids[:, :-1].to(device)).logits.float()
        scores = logits.log_softmax(-1).gather(2, ids[:, 1:, None].to(device))[..., 0].double().cpu()
        for row, i in enumerate(chosen):
            first, last = len(rows[i][0]) - 1, len(rows[i][0]) + len(rows[i][1]) - 1
            out[i] = scores[row, first:last].sum()
    return out


def _table(items: Sequence[Item], scores: Tensor) -> Tensor:
    """(N, most options), -inf where an item has fewer."""
    out = torch.full((len(items), max(len(i.options) for i in items)), -torch.inf, dtype=torch.float64)
    at = 0
    for row, item in enumerate(items):
        out[row, : len(item.options)] = scores[at : at + len(item.options)]
        at += len(item.options)
    return out


@torch.no_grad()
def next_log_probs(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, batch: int = 64, limit: int | None = None
) -> Tensor:
    """log p(next token | prompt) of every token, (N, V) float32 on the CPU; contexts as in `log_likelihoods`."""
    mark = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    room = None if limit is None else limit - 1
    rows = [[mark, *(ids if room is None else ids[-room:])] for ids in (_ids(tokenizer, p) for p in prompts)]
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids = torch.full((len(chosen), max(len(rows[i]) for i in chosen)), mark, dtype=torch.int64)
        for row, i in enumerate(chosen):
            ids[row, : len(rows[i])] = torch.tensor(rows[i])
        logits = model(input_ids=ids.to(device)).logits
        for row, i in enumerate(chosen):
            found[i] = logits[row, len(rows[i]) - 1].float().log_softmax(-1).cpu()
    return torch.stack([found[i] for i in range(len(rows))])


def letter_scores(model: nn.Module, tokenizer: Any, items: Sequence[Item], **how: Any) -> Tensor:
    """log p(" A" | prompt), log p(" B" | prompt), ...: (N, options) float64, in nats."""
    letters = [_ids(tokenizer, f" {letter}") for letter in LETTERS]
    if all(len(ids) == 1 for ids in letters):  # one pass a question in place of one an option
        rows = next_log_probs(model, tokenizer, [letter_prompt(i) for i in items], **how)
        flat = [rows[n, letters[k][0]] for n, i in enumerate(items) for k in range(len(i.options))]
        return _table(items, torch.stack(flat).double())
    pairs = [(letter_prompt(i), f" {LETTERS[k]}") for i in items for k in range(len(i.options))]
    return _table(items, log_likelihoods(model, tokenizer, pairs, **how))


def option_scores(model: nn.Module, tokenizer: Any, items: Sequence[Item], **how: Any) -> Tensor:
    """log p(option | question) - log p(option | ""), so that a likely or long option has no advantage. (N, options)."""
    asked = [(f"{i.question}\n", option) for i in items for option in i.options]
    alone = [("\n", option) for i in items for option in i.options]
    scores = log_likelihoods(model, tokenizer, asked, **how) - log_likelihoods(model, tokenizer, alone, **how)
    return _table(items, scores)


def channel_scores(model: nn.Module, tokenizer: Any, items: Sequence[Item], **how: Any) -> Tensor:
    """log p(question | "option:"): the same text under every option, so nothing but the option differs. (N, options).

    For questions that are descriptions of the option, in the order a page is written in: "Name: description".
    """
    pairs = [(f"{option}:", f" {i.question}") for i in items for option in i.options]
    return _table(items, log_likelihoods(model, tokenizer, pairs, **how))


def best(scores: Tensor) -> list[Answer]:
    """The option of the highest score of each row."""
    return [frozenset({int(k)}) for k in scores.argmax(1)]


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, batch: int = 64,
    limit: int | None = None,
) -> list[str]:  # fmt: skip
    """What the model writes after each prompt, greedily (no temperature, no retries), `new_tokens` at most.

    Plain text, without special tokens; whoever shows it escapes it. limit: as in `log_likelihoods`.
    """
    mark = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = tokenizer.eos_token_id
    room = None if limit is None else limit - new_tokens - 1
    rows = [[mark, *(ids if room is None else ids[-room:])] for ids in (_ids(tokenizer, p) for p in prompts)]
    device = next(model.parameters()).device
    out = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(rows[i]) for i in chosen)
        ids = torch.full((len(chosen), longest), end, dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for row, i in enumerate(chosen):  # padded on the left, so that all go on at the same place
            ids[row, longest - len(rows[i]) :] = torch.tensor(rows[i])
            seen[row, longest - len(rows[i]) :] = 1
        written = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=seen.to(device), max_new_tokens=new_tokens, do_sample=False,
            num_beams=1, pad_token_id=end, eos_token_id=end,
        )  # fmt: skip
        for i, text in zip(chosen, tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True), strict=True):
            out[i] = text
    return out


# --- reading an answer out of text: the three official ways, and the first letter that stands alone -----------------


def last_line(text: str) -> Answer:
    """CTIBench: the last line must be one letter; anything else, a refusal's "X" included, is no answer."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    match = re.fullmatch(r"[(*]*([A-Da-d])[).:*]*", lines[-1]) if lines else None
    return frozenset({LETTERS.index(match[1].upper())}) if match else None


def answer_marker(text: str) -> Answer:
    """CyberMetric: the letter after "ANSWER", in either case. Their retries on bad format are left out."""
    match = re.search(r"answer:?\s*([A-D])", text, re.IGNORECASE)
    return frozenset({LETTERS.index(match[1].upper())}) if match else None


def letter_set(text: str) -> Answer:
    """SecEval: every capital A to D of the output, "Answer:" removed first: "The Answer is B" reads as A and B."""
    found = {LETTERS.index(c) for c in re.findall("[A-D]", text.replace("Answer:", ""))}
    return frozenset(found) or None


def first_letter(text: str) -> Answer:
    """The first capital A to D that stands alone."""
    match = re.search(r"(?<![A-Za-z0-9])([A-D])(?![A-Za-z0-9])", text)
    return frozenset({LETTERS.index(match[1])}) if match else None


EXTRACTORS: dict[str, Callable[[str], Answer]] = {
    "first letter": first_letter, "last line": last_line, "answer marker": answer_marker, "letter set": letter_set,
}  # fmt: skip


# --- accounts --------------------------------------------------------------------------------------------------------


def correct(items: Sequence[Item], given: Sequence[Answer]) -> list[bool]:
    """Whether each answer is exactly the right set; what could not be read is wrong, where something was asked for."""
    return [(answer or frozenset()) == item.answers for item, answer in zip(items, given, strict=True)]


def position_bias(items: Sequence[Item], given: Sequence[Answer]) -> dict[str, list[float]]:
    """Shares by letter: "said" (of all answers), "right" (of all keys), and "accuracy" on the items with that key.

    Items with one right option only; nan where no item has the key.
    """
    count = max(len(i.options) for i in items)
    single = [(next(iter(i.answers)), a) for i, a in zip(items, given, strict=True) if len(i.answers) == 1]
    said = [sum(a == {k} for _, a in single) / max(1, len(single)) for k in range(count)]
    keys = [sum(key == k for key, _ in single) for k in range(count)]
    hits = [sum(key == k and a == {k} for key, a in single) for k in range(count)]
    return {
        "said": said, "right": [n / max(1, len(single)) for n in keys],
        "accuracy": [h / n if n else float("nan") for h, n in zip(hits, keys, strict=True)],
    }  # fmt: skip


def longest_option(items: Sequence[Item]) -> list[Answer]:
    """The answers of someone who always takes the longest option."""
    return [frozenset({max(range(len(i.options)), key=lambda k: len(i.options[k]))}) for i in items]


def majority_letter(items: Sequence[Item]) -> list[Answer]:
    """The answers of someone who always says the commonest right letter."""
    keys = [next(iter(i.answers)) for i in items if len(i.answers) == 1]
    common = max(set(keys), key=keys.count)
    return [frozenset({common}) for _ in items]
