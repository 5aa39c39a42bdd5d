"""Real English prose that ships in a pip package, as characters; and fixed windows of any token stream, by epoch."""

import ast
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.data.hub import hub_dataset, tokenise_to_memmap
from workbench.data.provenance import Provenance
from workbench.errors import WorkbenchError
from workbench.models.hub import load_pretrained

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # newline, then printable ASCII: 96 characters
LICENCES = {"scipy": "BSD-3-Clause", "scikit-learn": "BSD-3-Clause", "numpy": "BSD-3-Clause"}
MODULES = {"scipy": "scipy", "scikit-learn": "sklearn", "numpy": "numpy"}


@dataclass(frozen=True)
class Corpus:
    """Disjoint token streams, each 1-D (int64 tensor or memory-mapped uint32), and what they came from.

    tune: the half of the validation text that settings may be chosen on; report: the half that is only reported.
    """

    train: Tensor | np.ndarray
    tune: Tensor | np.ndarray
    report: Tensor | np.ndarray
    vocabulary: int
    provenance: Provenance


def encode(text: str) -> Tensor:
    """Characters of ALPHABET → int64 (T,). Raises WorkbenchError for any other character."""
    try:
        return torch.tensor([_INDEX[c] for c in text], dtype=torch.int64)
    except KeyError as error:
        raise WorkbenchError(
            f"character {error.args[0]!r} is not in the alphabet: printable ASCII and newline"
        ) from None


def decode(tokens: Tensor) -> str:
    """int64 (T,) → text."""
    return "".join(ALPHABET[i] for i in tokens.tolist())


_INDEX = {c: i for i, c in enumerate(ALPHABET)}
_PROSE = re.compile(r"[A-Z](?:(?!--)[^`|<>{}=\\]){149,1500}[.]", re.S)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [d for node in ast.walk(tree) if isinstance(node, kinds) and (d := ast.get_docstring(node))]


@lru_cache(maxsize=2)
def prose(package: str = "scikit-learn") -> tuple[tuple[str, ...], Provenance]:
    """Paragraphs of English from a package's docstrings (read, never imported), sorted, near-duplicates dropped.

    A paragraph is 150 to 1,500 characters of ASCII that starts a sentence, ends one, holds no code or table marks, and
    is at least 90 % letters, spaces and commas. Two that open with the same 40 characters count as one.
    """
    if package not in LICENCES:
        raise WorkbenchError(f"unknown text package {package!r}: choose from {', '.join(LICENCES)}")
    spec = util.find_spec(MODULES[package])
    if spec is None or spec.origin is None:
        raise WorkbenchError(f"the text comes with the package {package}, which is not installed")
    found: dict[str, str] = {}
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for docstring in _docstrings(path):
            for paragraph in re.split(r"\n\s*\n", docstring):
                text = " ".join(paragraph.split())
                plain = sum(c.isalpha() or c in " ," for c in text)
                if text.isascii() and _PROSE.fullmatch(text) and plain >= 0.9 * len(text):
                    found.setdefault(text[:40], text)
    paragraphs = tuple(sorted(found.values()))
    digest = hashlib.sha256("\n".join(paragraphs).encode()).hexdigest()
    note = f"{len(paragraphs)} paragraphs of prose from docstrings, {sum(map(len, paragraphs))} characters"
    return paragraphs, Provenance(
        f"{package} docstrings", package, metadata.version(package), LICENCES[package], digest, note
    )


def character_corpus(tokens: int, *, split: int, validation: int = 24_576, package: str = "scikit-learn") -> Corpus:
    """`tokens` unique training characters and two validation halves, disjoint by paragraph; `split` seeds the shuffle.

    The validation text of a split is the same for every training budget, and a smaller budget is the start of a larger
    one. Raises WorkbenchError when the package has not that much prose.
    """
    paragraphs, provenance = prose(package)
    order = np.random.default_rng(split).permutation(len(paragraphs))
    stream = iter(order)
    parts = []
    for size in (validation // 2, validation - validation // 2, tokens):
        text: list[str] = []
        length = 0
        while length < size + 1:
            try:
                paragraph = paragraphs[next(stream)]
            except StopIteration:
                most = sum(map(len, paragraphs)) - validation
                raise WorkbenchError(
                    f"{package} has about {most} characters of prose to train on, not {tokens}"
                ) from None
            text.append(paragraph)
            length += len(paragraph) + 1
        parts.append(encode("\n" + "\n".join(text))[: size + 1])
    return Corpus(parts[2], parts[0], parts[1], len(ALPHABET), provenance)


def hub_corpus(data: str, tokenizer: str, tokens: int, *, folder: Path, validation: int) -> Corpus:
    """The first `tokens` tokens of a Hub text data set (or local folder) with a "text" column, memory-mapped.

    Validation comes first in the stream, so every budget has the same; tokenised once into `folder`.
    """
    from transformers import AutoTokenizer

    words = load_pretrained(AutoTokenizer, tokenizer)
    streaming = not Path(data).is_dir()
    texts = (row["text"] for row in hub_dataset(data, streaming=streaming, columns=("text",)))
    name = hashlib.sha256(f"{data} {tokenizer}".encode()).hexdigest()[:12]
    stream = tokenise_to_memmap(texts, words, folder / f"{name}-{tokens}.bin", validation + tokens + 2, source=data)
    half = validation // 2
    tune, report, train = stream[: half + 1], stream[half : validation + 1], stream[validation:]
    note = f"{tokens} training tokens by {tokenizer}"
    digest = hashlib.sha256(np.ascontiguousarray(stream).tobytes()).hexdigest()
    source = Provenance(data, "Hugging Face Hub", "", "see its card", digest, note)
    return Corpus(train, tune, report, len(words), source)


@dataclass(frozen=True)
class Windows:
    """Batches (B, T + 1) of fixed, non-overlapping windows: each epoch sees every window once, in an order of its own.

    self[i] depends on (seed, i) alone. A last partial batch of an epoch is dropped, as is a partial window.
    """

    tokens: Tensor | np.ndarray
    context: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.per_epoch < 1:
            raise WorkbenchError(
                f"{len(self.tokens) - 1} tokens are less than one batch of {self.batch} × {self.context}; lower either"
            )

    @property
    def count(self) -> int:
        """Windows in the stream."""
        return (len(self.tokens) - 1) // self.context

    @property
    def per_epoch(self) -> int:
        """Batches an epoch."""
        return self.count // self.batch

    def take(self, windows: Sequence[int] | np.ndarray) -> Tensor:
        """The named windows, int64 (len, T + 1): inputs are [:, :-1], targets [:, 1:]."""
        at = np.asarray(windows)[:, None] * self.context + np.arange(self.context + 1)
        if isinstance(self.tokens, Tensor):
            return self.tokens[torch.from_numpy(at)]
        return torch.from_numpy(self.tokens[at].astype(np.int64))

    def __getitem__(self, i: int) -> Tensor:
        epoch, within = divmod(i, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return self.take(order[within * self.batch : (within + 1) * self.batch])


@dataclass(frozen=True)
class Mixture:
    """Each batch joins one of `real` and one of `synthetic`, whose batch sizes set the shares."""

    real: Windows
    synthetic: Windows

    def __getitem__(self, i: int) -> Tensor:
        return torch.cat([self.real[i], self.synthetic[i]])
