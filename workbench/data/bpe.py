"""A byte-level BPE tokenizer trained here on the prose of pip packages, and the text as tokens, in disjoint parts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from workbench.data.provenance import Provenance
from workbench.data.text import ALPHABET, prose
from workbench.errors import WorkbenchError

SHARES = {"teacher": 0.45, "judge": 0.45, "tune": 0.05, "report": 0.05}  # of the characters, cut between paragraphs


@dataclass(frozen=True)
class BpeText:
    """Disjoint token streams (T,) int64 by part, the tokenizer, V (the mask is token V) and where the text comes from.

    teacher: what teacher, students and critics see; judge: what the judge alone sees; tune, report: held out.
    """

    parts: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerFast
    vocabulary: int
    provenance: tuple[Provenance, ...]

    def windows(self, part: str, length: int, count: int, generator: torch.Generator) -> Tensor:
        """`count` windows (count, length) of a part, each from a random place."""
        tokens = self.parts[part]
        start = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
        return tokens[start + torch.arange(length)]

    def tiled(self, part: str, length: int) -> Tensor:
        """All non-overlapping windows of a part, (N, length)."""
        tokens = self.parts[part]
        return tokens[: len(tokens) // length * length].view(-1, length)


def train_bpe(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens (printable ASCII and newline always among them); [MASK] comes after them.

    Raises WorkbenchError: no text; a vocabulary smaller than the alphabet, or larger than the text has pairs for.
    """
    if not any(texts):
        raise WorkbenchError("a tokenizer needs text to be trained on: the data set is empty")
    if vocabulary < len(ALPHABET):
        raise WorkbenchError(f"a vocabulary of {vocabulary} cannot hold the alphabet of {len(ALPHABET)} characters")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted({piece for c in ALPHABET for word, _ in level.pre_tokenize_str(c) for piece in word})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = level, decoders.ByteLevel()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    if bpe.get_vocab_size() != vocabulary:
        raise WorkbenchError(f"the text gives {bpe.get_vocab_size()} tokens, not {vocabulary}: lower the vocabulary")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


@lru_cache(maxsize=2)
def bpe_text(packages: tuple[str, ...], vocabulary: int, split: int = 0) -> BpeText:
    """The prose of the packages, shuffled by paragraph with `split` and cut into parts; the BPE sees the teacher's."""
    paragraphs: list[str] = []
    sources: list[Provenance] = []
    for package in packages:
        found, source = prose(package)
        paragraphs += found
        sources.append(source)
    if not paragraphs:
        raise WorkbenchError("no text: name at least one package")
    order = np.random.default_rng(split).permutation(len(paragraphs))
    total = sum(len(text) for text in paragraphs)
    texts: dict[str, list[str]] = {part: [] for part in SHARES}
    ends = dict(zip(SHARES, np.cumsum(list(SHARES.values())) * total, strict=True))
    so_far = 0
    for i in order:
        part = next(p for p, end in ends.items() if so_far < end or p == "report")
        texts[part].append(paragraphs[i])
        so_far += len(paragraphs[i])
    tokenizer = train_bpe(texts["teacher"], vocabulary)
    parts = {
        part: torch.tensor(tokenizer("\n".join(found))["input_ids"], dtype=torch.int64) for part, found in texts.items()
    }
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    sizes = ", ".join(f"{part} {len(tokens)}" for part, tokens in parts.items())
    made = Provenance(f"BPE of {vocabulary} tokens", "tokenizers", "trained here", "Apache-2.0", digest, sizes)
    return BpeText(parts, tokenizer, vocabulary, (*sources, made))
