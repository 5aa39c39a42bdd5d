"""Test questions kept out of a training corpus: sentences that share an n-gram of words with them are dropped."""

import re
from collections.abc import Iterable, Sequence

NGRAM = 8  # words; CWE's descriptions are one sentence, shorter than the usual 13-gram window could catch
_WORD = re.compile(r"[a-z0-9]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def ngrams(text: str, n: int = NGRAM) -> set[tuple[str, ...]]:
    """Runs of n lower-case words; the whole text where it is shorter than n."""
    words = _WORD.findall(text.lower())
    if len(words) < n:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def shared(text: str, protected: set[tuple[str, ...]]) -> bool:
    """Whether `text` holds one of the protected runs of words (as `ngrams` gives them)."""
    words = _WORD.findall(text.lower())
    sizes = {len(run) for run in protected}
    return any(tuple(words[i : i + n]) in protected for n in sizes for i in range(len(words) - n + 1))


def decontaminate(texts: Sequence[str], secrets: Iterable[str], n: int = NGRAM) -> tuple[list[str], int]:
    """The texts without the sentences that share an n-gram with a secret, and the number of sentences dropped.

    A match across a sentence's end drops the whole text: what is returned never holds a protected n-gram.
    """
    protected: set[tuple[str, ...]] = set().union(*(ngrams(s, n) for s in secrets))
    kept, dropped = [], 0
    for text in texts:
        sentences = _SENTENCE.split(text)
        clean = [s for s in sentences if not shared(s, protected)]
        dropped += len(sentences) - len(clean)
        joined = " ".join(clean)
        if shared(joined, protected):
            dropped, joined = dropped + len(clean), ""
        kept.append(joined)
    return kept, dropped
