"""Chains: arithmetic modulo 7 written out step by step, by a writer who gets single steps wrong in a fixed way.

    <bos> 3 + 4 + 2 = 0 2 answer: \\boxed{ 2 } <eos>

The prompt ends with "=", then follow the running results (the chain of thought), the marker and the boxed answer. The
writer of the pre-training text knows each table entry (op, a, b) with a probability of its own, and writes one and the
same wrong result otherwise; errors propagate. A model of this text is mediocre, worse when sampled, but has the right
chain somewhere: what reinforcement learning needs. One operation is trained on, the other shows what is forgotten.
Difficulty is `steps`; operands of the splits never meet (held-out compositions). Procedural: nothing is downloaded.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from workbench.data.provenance import Provenance
from workbench.errors import WorkbenchError

MODULUS = 7
SPLITS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}  # tenths of all operand tuples
OPERATIONS = ("+", "-")
MARKER, BOX, CLOSE = "answer:", "\\boxed{", "}"
WORDS = ("<bos>", "<eos>", *map(str, range(MODULUS)), *OPERATIONS, "=", MARKER, BOX, CLOSE)
ID = {word: i for i, word in enumerate(WORDS)}
DIGIT = ID["0"]  # id of digit d is DIGIT + d


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word, split at white space; pads with <eos> on the left, as generation needs."""
    words = Tokenizer(WordLevel(dict(ID), unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


def split_of(operands: Tensor) -> Tensor:
    """The tenth (B,), 0 to 9, that each operand tuple (B, steps + 1) belongs to; it depends on the operands alone."""
    mixed = torch.zeros(len(operands), dtype=torch.int64)
    for column in operands.T:  # a multiplicative hash, kept below 2^31 so that nothing overflows
        mixed = ((mixed ^ (column + 1)) * 48_271 + 11) % 2_147_483_647
    return (mixed >> 7) % 10


@dataclass(frozen=True)
class Chains:
    """The world of one seed. steps: operations a chain; floor: least probability that the writer knows an entry."""

    steps: int = 3
    floor: float = 0.35
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise WorkbenchError(f"a chain has at least 1 step, got {self.steps}")

    @property
    def prompt_length(self) -> int:
        return 2 * self.steps + 3

    @property
    def length(self) -> int:
        """Tokens of a whole text: prompt, results, marker, box, answer, closing brace, <eos>."""
        return self.prompt_length + self.steps + 5

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """right, wrong (2, 7, 7) int64 and the probability of right (2, 7, 7), by operation, a, b."""
        g = torch.Generator().manual_seed(self.seed)
        a, b = torch.arange(MODULUS)[:, None], torch.arange(MODULUS)[None]
        right = torch.stack([(a + b) % MODULUS, (a - b) % MODULUS])
        wrong = (right + torch.randint(1, MODULUS, right.shape, generator=g)) % MODULUS
        return right, wrong, self.floor + (1 - self.floor) * torch.rand(right.shape, generator=g)

    def draw(self, generator: torch.Generator, count: int, split: str, operation: str = "") -> tuple[Tensor, Tensor]:
        """Operands (count, steps + 1) of a split and operations (count, steps), indices into OPERATIONS.

        operation: of every step; empty: each step draws its own.
        """
        if split not in SPLITS:
            raise WorkbenchError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
        tenths = torch.tensor(list(SPLITS[split]))
        kept: list[Tensor] = []
        while sum(len(k) for k in kept) < count:
            operands = torch.randint(MODULUS, (16 * count, self.steps + 1), generator=generator)
            kept.append(operands[torch.isin(split_of(operands), tenths)])
        operands = torch.cat(kept)[:count]
        if operation:
            return operands, torch.full((count, self.steps), OPERATIONS.index(operation))
        return operands, torch.randint(len(OPERATIONS), (count, self.steps), generator=generator)

    def results(self, operands: Tensor, operations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Running results (B, steps): the true ones, or with a generator what the imperfect writer writes."""
        right, wrong, known = self.tables
        here, out = operands[:, 0], []
        for t in range(self.steps):
            entry = operations[:, t], here, operands[:, t + 1]
            true = right[entry]
            if generator is not None:
                slip = torch.rand(len(true), generator=generator) > known[entry]
                true = torch.where(slip, wrong[entry], true)
            here = true
            out.append(here)
        return torch.stack(out, 1)

    def prompts(self, operands: Tensor, operations: Tensor) -> Tensor:
        """Token ids (B, prompt_length), from <bos> to "="."""
        ids = torch.full((len(operands), self.prompt_length), ID["<bos>"])
        ids[:, 1:-1:2] = DIGIT + operands
        ids[:, 2:-1:2] = ID["+"] + operations
        ids[:, -1] = ID["="]
        return ids

    def texts(self, operands: Tensor, operations: Tensor, results: Tensor) -> Tensor:
        """Whole texts (B, length) with the chain and the answer that `results` (B, steps) give."""
        fixed = [torch.full((len(operands), 1), ID[w]) for w in (MARKER, BOX, CLOSE, "<eos>")]
        digits = DIGIT + results
        return torch.cat([self.prompts(operands, operations), digits, *fixed[:2], digits[:, -1:], *fixed[2:]], 1)

    def corpus(self, generator: torch.Generator, count: int) -> Tensor:
        """Pre-training texts (count, length) of the imperfect writer, both operations mixed, train split."""
        operands, operations = self.draw(generator, count, "train")
        return self.texts(operands, operations, self.results(operands, operations, generator))

    @property
    def provenance(self) -> Provenance:
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in self.tables)).hexdigest()
        note = f"{self.steps} steps modulo {MODULUS}, entries right with U({self.floor:g}, 1), seed {self.seed}"
        return Provenance(f"chains/{self.seed}", "workbench.data.chains", "1", "Apache-2.0", digest, note)
