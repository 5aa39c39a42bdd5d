"""Prose from packages: disjoint parts, budgets that nest, honest provenance; windows that make exact epochs."""

import hashlib
import json
from importlib import metadata

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workbench.data.text import (
    ALPHABET,
    Mixture,
    Windows,
    character_corpus,
    decode,
    encode,
    hub_corpus,
    prose,
)
from workbench.errors import WorkbenchError


def paragraphs(tokens) -> set[str]:
    """Whole paragraphs of a stream (its last one may be cut)."""
    return set(decode(tokens).strip("\n").split("\n")[:-1])


def test_characters_go_there_and_back():
    assert len(set(ALPHABET)) == len(ALPHABET) == 96
    assert decode(encode("A loss of 3.17?\n~")) == "A loss of 3.17?\n~"
    with pytest.raises(WorkbenchError, match="'é' is not in the alphabet"):
        encode("café")


def test_prose_names_its_package_version_licence_and_hash():
    texts, source = prose("scikit-learn")
    assert (source.package, source.licence) == ("scikit-learn", "BSD-3-Clause")
    assert source.version == metadata.version("scikit-learn")
    assert source.sha256 == hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert len(texts) > 200 and all(150 <= len(t) <= 1502 and t[0].isupper() and t[-1] == "." for t in texts)
    assert len({t[:40] for t in texts}) == len(texts)  # near-duplicates are dropped
    with pytest.raises(WorkbenchError, match="unknown text package 'left-pad'.*scikit-learn"):
        prose("left-pad")


def test_train_tune_and_report_share_no_paragraph():
    corpus = character_corpus(16_384, split=7)
    assert [len(corpus.train), len(corpus.tune), len(corpus.report)] == [16_385, 12_289, 12_289]
    parts = [paragraphs(p) for p in (corpus.train, corpus.tune, corpus.report)]
    assert all(len(p) > 10 for p in parts)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not parts[a] & parts[b]
        first = parts[a]
        assert not any(decode(getattr(corpus, ("train", "tune", "report")[b])[-150:]) in text for text in first)
    everything = set(prose()[0])
    assert parts[0] < everything


def test_budgets_nest_and_keep_the_validation_text():
    small, large = character_corpus(4096, split=3), character_corpus(8192, split=3)
    assert torch.equal(large.train[:4097], small.train)
    assert torch.equal(large.tune, small.tune) and torch.equal(large.report, small.report)
    again, other = character_corpus(4096, split=3), character_corpus(4096, split=4)
    assert torch.equal(again.train, small.train)
    assert not torch.equal(other.train, small.train) and not torch.equal(other.report, small.report)
    with pytest.raises(WorkbenchError, match=r"has about \d+ characters of prose to train on, not 10000000"):
        character_corpus(10_000_000, split=0)


def test_an_epoch_is_every_window_once_in_an_order_of_its_own():
    windows = Windows(torch.arange(1001), context=10, batch=8, seed=1)
    assert (windows.count, windows.per_epoch) == (100, 12)

    def epoch(n, seed=1):
        w = Windows(windows.tokens, 10, 8, seed)
        return [w[i][:, 0].tolist() for i in range(n * 12, (n + 1) * 12)]

    starts = [s for batch in epoch(0) for s in batch]
    assert len(set(starts)) == 96 and set(starts) <= set(range(0, 1000, 10))
    assert epoch(0) == epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=2)
    batch = windows[5]
    assert batch.shape == (8, 11) and torch.equal(batch[:, 1:], batch[:, :-1] + 1)
    with pytest.raises(WorkbenchError, match="less than one batch of 8 × 10"):
        Windows(torch.arange(80), 10, 8, 0)


def test_windows_of_a_token_file_are_those_of_a_tensor(tmp_path):
    values = np.arange(500, dtype=np.uint32) + 100_000  # beyond what 16 bits hold
    values.tofile(tmp_path / "tokens.bin")
    on_disk = Windows(np.memmap(tmp_path / "tokens.bin", dtype=np.uint32, mode="r"), 16, 4, 3)
    in_memory = Windows(torch.from_numpy(values.astype(np.int64)), 16, 4, 3)
    for i in (0, 6, 7, 20):
        assert on_disk[i].dtype == torch.int64 and torch.equal(on_disk[i], in_memory[i])


def test_a_mixture_keeps_its_shares():
    real, synthetic = Windows(torch.zeros(401).long(), 10, 4, 0), Windows(torch.ones(801).long(), 10, 12, 0)
    for i in (0, 3, 50):
        batch = Mixture(real, synthetic)[i]
        assert batch.shape == (16, 11) and batch.float().mean() == 0.75


def words_tokenizer(folder):
    vocabulary = {"[BOS]": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(50)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="[BOS]", unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def test_a_folder_of_documents_becomes_memory_mapped_parts(tmp_path):
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": " ".join(f"w{(3 * i + j) % 50}" for j in range(9))}) for i in range(100)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = words_tokenizer(tmp_path / "tokenizer")
    small, large = (
        hub_corpus(str(tmp_path / "data"), tokenizer, n, folder=tmp_path / "text", validation=200) for n in (300, 600)
    )
    assert isinstance(large.train, np.memmap) and large.vocabulary == 52
    assert (len(large.tune), len(large.report)) == (101, 101) and len(large.train) >= 601
    assert np.array_equal(small.report, large.report) and np.array_equal(small.train[:301], large.train[:301])
    document = [0, *(2 + j for j in range(9))]
    assert large.tune[:10].tolist() == document  # BOS, then the first document
    assert Windows(large.train, 16, 2, 0)[0].shape == (2, 17)
