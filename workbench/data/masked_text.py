"""Sentences as padded tokens by language, and BERT's masking of them, drawn anew for every batch.

Shapes: B sentences, T tokens, V vocabulary. Padding is never masked, never attended to and never in a loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.data.public_text import language_shares
from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Vocabulary:
    """What masking must know of a tokenizer: the mask's id, the padding's, and the ids that are ordinary tokens."""

    mask: int
    pad: int
    ordinary: Tensor  # (V - specials,) int64
    special: Tensor  # (V,) bool

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        """Raises WorkbenchError for a tokenizer without a mask or padding token."""
        for name in ("mask_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise WorkbenchError(f"the tokenizer has no {name.replace('_', ' ')}: masked language models need one")
        special = torch.zeros(len(tokenizer), dtype=torch.bool)
        special[torch.tensor(sorted(set(tokenizer.all_special_ids)))] = True
        return cls(tokenizer.mask_token_id, tokenizer.pad_token_id, (~special).nonzero()[:, 0], special)


def mask_tokens(
    ids: Tensor, vocabulary: Vocabulary, generator: torch.Generator, *, rate: float = 0.15
) -> tuple[Tensor, Tensor]:
    """BERT's 80/10/10: (corrupted ids (B, T), chosen (B, T) bool); `rate` of the ordinary positions are chosen.

    Of the chosen, 80 % become the mask, 10 % a random ordinary token, 10 % stay (Devlin et al. 2019, section 3.1).
    At least one position is chosen, so that a mean over them exists.
    """
    candidates = ~vocabulary.special[ids]
    chosen = (torch.rand(ids.shape, generator=generator) < rate) & candidates
    if not chosen.any():
        places = candidates.nonzero()
        if not len(places):
            raise WorkbenchError("a batch of nothing but special tokens cannot be masked")
        chosen[tuple(places[int(torch.randint(len(places), (1,), generator=generator))])] = True
    kind = torch.rand(ids.shape, generator=generator)
    pick = torch.randint(len(vocabulary.ordinary), ids.shape, generator=generator)
    out = torch.where(chosen & (kind < 0.8), vocabulary.mask, ids)
    return torch.where(chosen & (kind >= 0.8) & (kind < 0.9), vocabulary.ordinary[pick], out), chosen


def encode_lines(lines: Sequence[str], tokenizer: Any, context: int) -> Tensor:
    """Lines as ids (N, T) int32 between the tokenizer's own marks, cut to `context` tokens and padded to the longest.

    Raises WorkbenchError: no line; a tokenizer that makes nothing of one.
    """
    if not lines:
        raise WorkbenchError("no text to encode: the data set is empty")
    rows = tokenizer(list(lines), truncation=True, max_length=context)["input_ids"]
    width = max(map(len, rows))
    out = torch.full((len(rows), width), int(tokenizer.pad_token_id), dtype=torch.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return out


@dataclass(frozen=True)
class Sentences:
    """Encoded sentences by language, once in spoken and once in written form (row i is the same sentence)."""

    spoken: Mapping[str, Tensor]
    written: Mapping[str, Tensor]

    @property
    def languages(self) -> list[str]:
        return list(self.spoken)


@dataclass(frozen=True)
class MaskedBatches:
    """batch_fn of masked language modelling: languages by n^alpha, spoken with probability `share`, masks anew.

    Calling it with a generator gives {"ids", "attention", "targets", "chosen"}, each (B, T): the corrupted input, 1
    where there is no padding, the true ids, and where a prediction counts. The same generator gives the same batch,
    whoever trains on it: a teacher and a student see one input.
    """

    sentences: Sentences
    vocabulary: Vocabulary
    batch: int
    alpha: float = 0.5
    share: float = 1.0
    rate: float = 0.15

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        languages = self.sentences.languages
        counts = [len(self.sentences.spoken[name]) for name in languages]
        shares = torch.from_numpy(language_shares(counts, self.alpha))
        which = torch.multinomial(shares, self.batch, replacement=True, generator=generator).tolist()
        spoken = (torch.rand(self.batch, generator=generator) < self.share).tolist()
        rows = []
        for language, aloud in zip(which, spoken, strict=True):
            table = (self.sentences.spoken if aloud else self.sentences.written)[languages[language]]
            rows.append(table[int(torch.randint(len(table), (1,), generator=generator))])
        return masked_batch(trim(rows, self.vocabulary.pad), self.vocabulary, generator, self.rate)


def trim(rows: Sequence[Tensor], pad: int) -> Tensor:
    """Rows (T_i,) as one batch (B, T) int64, padded to the longest real one."""
    lengths = [int((row != pad).sum()) for row in rows]
    out = torch.full((len(rows), max(lengths)), pad, dtype=torch.int64)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        out[i, :length] = row[:length]
    return out


def masked_batch(ids: Tensor, vocabulary: Vocabulary, generator: torch.Generator, rate: float) -> dict[str, Tensor]:
    """One batch of ids (B, T) int64 masked; see MaskedBatches."""
    corrupted, chosen = mask_tokens(ids, vocabulary, generator, rate=rate)
    return {"ids": corrupted, "attention": (ids != vocabulary.pad).long(), "targets": ids, "chosen": chosen}
