"""Utterances as tensors with tags on the first piece of each word; and a user's own or MASSIVE's, from one schema.

The schema is MASSIVE's (FitzGerald et al. 2022), a row an utterance, in jsonl or parquet:
  locale      "en-US" or "en"
  partition   "train", "dev" or "test"
  utt         the words, e.g. "wake me at five am"
  annot_utt   the same words with their slots, e.g. "wake me at [time : five am]"
  intent      a name (or a class number, as the Hub stores it)
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.data.commands import Utterance
from workbench.data.hub import hub_dataset
from workbench.errors import WorkbenchError

COLUMNS = ("locale", "partition", "utt", "annot_utt", "intent")
_SLOT = re.compile(r"\[\s*([^:\[\]]+?)\s*:\s*([^\[\]]*?)\s*\]")


def parse_annotated(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """ "wake me at [time : five am]" → words and BIO tags. Raises WorkbenchError for brackets that do not close."""
    words: list[str] = []
    tags: list[str] = []
    end = 0
    for m in [*_SLOT.finditer(text), None]:
        plain = text[end : m.start() if m else len(text)]
        if "[" in plain or "]" in plain:
            raise WorkbenchError(f"annotated utterance {text!r}: a slot is written [name : words]")
        words += plain.split()
        tags += ["O"] * len(plain.split())
        if m:
            inside = m[2].split()
            words += inside
            tags += [f"{'B' if i == 0 else 'I'}-{m[1]}" for i in range(len(inside))]
            end = m.end()
    return tuple(words), tuple(tags)


def annotated(utterance: Utterance) -> str:
    """The inverse of `parse_annotated`, for the words and tags of an utterance."""
    out: list[str] = []
    for word, tag in zip(utterance.words, utterance.tags, strict=True):
        if tag.startswith("B-"):
            out.append(f"[{tag[2:]} : {word}]")
        elif tag.startswith("I-"):
            out[-1] = f"{out[-1][:-1]} {word}]"
        else:
            out.append(word)
    return " ".join(out)


def load_utterances(data: str, languages: Sequence[str]) -> dict[str, list[Utterance]]:
    """Partition → utterances of the languages, from a Hub id or a folder. Raises WorkbenchError in one line.

    Refused: a missing column, a partition "train" or "test" without utterances, a language that does not occur.
    """
    rows = hub_dataset(data, columns=COLUMNS)
    names = getattr(rows.features.get("intent"), "names", None)
    out: dict[str, list[Utterance]] = {"train": [], "dev": [], "test": []}
    seen: set[str] = set()
    for row in rows:
        language = str(row["locale"]).split("-")[0].lower()
        if language not in languages or row["partition"] not in out:
            continue
        seen.add(language)
        words, tags = parse_annotated(str(row["annot_utt"]))
        intent = names[row["intent"]] if names and isinstance(row["intent"], int) else str(row["intent"])
        if words:
            out[row["partition"]].append(Utterance(words, tags, intent, language, str(row["utt"])))
    if missing := [name for name in languages if name not in seen]:
        raise WorkbenchError(
            f"data set {data!r} has no utterance in {', '.join(missing)}: set languages to those it has"
        )
    for partition in ("train", "test"):
        if not out[partition]:
            raise WorkbenchError(f"data set {data!r} has no utterance in partition {partition!r}")
    return out


@dataclass(frozen=True)
class Labels:
    """The intents and the BIO tags a model distinguishes; "O" is tag 0."""

    intents: tuple[str, ...]
    tags: tuple[str, ...]

    @classmethod
    def of(cls, utterances: Iterable[Utterance]) -> "Labels":
        """All that occur, sorted; each slot with its B- and its I- tag."""
        every = list(utterances)
        slots = sorted({tag[2:] for u in every for tag in u.tags if tag != "O"})
        tags = ("O", *(f"{mark}-{slot}" for slot in slots for mark in "BI"))
        return cls(tuple(sorted({u.intent for u in every})), tags)


@dataclass(frozen=True)
class Encoded:
    """N utterances: ids (N, T), first piece of each word (N, W) with -1 beyond the end, intents (N,), tags (N, T).

    tags is -100 wherever no word starts; an intent or tag that the labels lack is -100 too and trains nothing.
    """

    ids: Tensor
    first: Tensor
    intents: Tensor
    tags: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def encode_utterances(utterances: Sequence[Utterance], tokenizer: Any, labels: Labels, context: int) -> Encoded:
    """Words to pieces with the tokenizer's own alignment. Raises WorkbenchError for a word that gets no piece.

    An utterance longer than `context` tokens is refused: cutting it would lose words without a word said.
    """
    if not utterances:
        raise WorkbenchError("no utterance to encode: the data set is empty")
    batch = tokenizer([list(u.words) for u in utterances], is_split_into_words=True)
    rows = batch["input_ids"]
    width, most = max(map(len, rows)), max(len(u.words) for u in utterances)
    if width > context:
        raise WorkbenchError(f"an utterance has {width} tokens, the context is {context}: raise context")
    ids = torch.full((len(rows), width), int(tokenizer.pad_token_id), dtype=torch.int64)
    first = torch.full((len(rows), most), -1, dtype=torch.int64)
    tags = torch.full((len(rows), width), -100, dtype=torch.int64)
    intents = torch.full((len(rows),), -100, dtype=torch.int64)
    intent_id: Mapping[str, int] = {name: i for i, name in enumerate(labels.intents)}
    tag_id: Mapping[str, int] = {name: i for i, name in enumerate(labels.tags)}
    for i, (row, utterance) in enumerate(zip(rows, utterances, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        intents[i] = intent_id.get(utterance.intent, -100)
        for place, word in enumerate(batch.word_ids(i)):
            if word is not None and first[i, word] < 0:
                first[i, word] = place
                tags[i, place] = tag_id.get(utterance.tags[word], -100)
        lost = [w for w, place in zip(utterance.words, first[i].tolist(), strict=False) if place < 0]
        if lost:
            raise WorkbenchError(f"the tokenizer makes nothing of the word {lost[0]!r}: it was trained on other text")
    return Encoded(ids, first, intents, tags)
