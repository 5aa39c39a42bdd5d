"""Documents as training sequences: packed end to end behind an end-of-text token, or padded one a row."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.errors import WorkbenchError


def tokenise(texts: Sequence[str], tokenizer: object) -> list[list[int]]:
    """Token ids of each text, no special tokens; empty texts are dropped. Raises WorkbenchError if none is left."""
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise WorkbenchError("no text to pack: every document is empty")
    return tokenizer(kept, add_special_tokens=False, return_attention_mask=False)["input_ids"]  # type: ignore[operator]


def end_of_text(tokenizer: object) -> int:
    """The id that ends a document. Raises WorkbenchError for a tokenizer without one."""
    mark = tokenizer.eos_token_id  # type: ignore[attr-defined]
    if mark is None:
        raise WorkbenchError("the tokenizer has no EOS token to put between documents")
    return int(mark)


def pack(documents: Sequence[Sequence[int]], eos: int, limit: int | None = None) -> np.ndarray:
    """One stream (tokens,) uint32: every document, an EOS before the first and after each; cut after `limit` tokens."""
    whole = np.fromiter((t for d in documents for t in (*d, eos)), dtype=np.uint32)
    return np.concatenate([[np.uint32(eos)], whole])[: None if limit is None else limit].astype(np.uint32)


def pad(documents: Sequence[Sequence[int]], length: int, eos: int) -> tuple[Tensor, Tensor]:
    """One document a row, cut into pieces of `length`: ids (N, length) int64, mask of real tokens (N, length)."""
    pieces = [[*d, eos][i : i + length] for d in documents for i in range(0, len(d) + 1, length)]
    ids = torch.full((len(pieces), length), eos, dtype=torch.int64)
    real = torch.zeros(len(pieces), length, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece)
        real[row, : len(piece)] = True
    return ids, real


def document_mask(tokens: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """What a packed batch (B, T) needs so that no document sees another: (mask (B, 1, T, T) bool, positions (B, T)).

    True: query row may look at key column (causal, same document). An EOS opens the document after it, as in `pack`.
    """
    document = (tokens == eos).long().cumsum(1)
    t = tokens.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=tokens.device).tril()
    same = document[:, :, None] == document[:, None, :]
    place = torch.arange(t, device=tokens.device).expand_as(tokens)
    first = torch.where(tokens == eos, place, 0).cummax(1).values
    return (same & causal)[:, None], place - first
