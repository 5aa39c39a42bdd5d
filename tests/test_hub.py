"""Hub and local data: readers, one-line errors, token files, captioned images, safetensors only. No network is used."""

import json
import os
import subprocess
import sys

import datasets
import httpx
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import errors
from PIL import Image
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from workbench.data.hub import ImageCaptions, hub_dataset, read_tokens, tokenise_to_memmap
from workbench.errors import WorkbenchError
from workbench.models.hub import load_pretrained


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def one_line(call, pattern):
    with pytest.raises(WorkbenchError, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)


def write(folder, kind):
    folder.mkdir()
    rows = [{"text": f"document {i}", "n": i} for i in range(5)]
    if kind == "parquet":
        pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    elif kind == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        for i in range(5):
            Image.new("RGB", (12, 6), (50 * i, 0, 255)).save(folder / f"{i}.png")
        captions = [{"file_name": f"{i}.png", "text": f"shade {i}"} for i in range(5)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in captions))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_text_folders(tmp_path, kind, streaming):
    data = hub_dataset(write(tmp_path / kind, kind), "train", streaming=streaming, columns=["text"])
    assert [row["text"] for row in data] == [f"document {i}" for i in range(5)]
    assert hasattr(data, "__len__") != streaming


def test_image_folder_with_captions(tmp_path):
    data = hub_dataset(write(tmp_path / "images", "images"), "train", columns=["image", "text"])
    pairs = ImageCaptions(data, size=8)
    pixels, caption = pairs[2]
    assert pixels.shape == (3, 8, 8) and caption == "shade 2" and len(pairs) == 5
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([100, 0, 255]) / 127.5 - 1)
    images, captions = pairs.batch(4, torch.Generator().manual_seed(1))
    again = pairs.batch(4, torch.Generator().manual_seed(1))
    assert images.shape == (4, 3, 8, 8) and captions == again[1] and torch.equal(images, again[0])
    recaptioned = ImageCaptions(data, size=8, captions=[f"new {i}" for i in range(5)], crop="centre")
    assert recaptioned[1][1] == "new 1"
    one_line(lambda: ImageCaptions(data, size=8, captions=["one"]), "1 captions for 5 images")
    one_line(lambda: ImageCaptions(data, size=8, caption="caption"), "no column 'caption': it has 'image', 'text'")
    one_line(lambda: ImageCaptions(data, size=8, image="text")[0], "not images")
    one_line(lambda: ImageCaptions(data.to_iterable_dataset(), size=8), "streaming=False")


def test_squash_and_centre_differ():
    half = Image.new("RGB", (16, 8))
    half.paste((255, 255, 255), (0, 0, 4, 8))  # the left quarter, which a centre crop to a square cuts away
    data = datasets.Dataset.from_dict({"image": [half], "text": [["first", "second"]]}).cast_column(
        "image", datasets.Image()
    )
    squash, caption = ImageCaptions(data, size=8)[0]
    assert squash[:, 4, 0].max() > 0.9 and caption == "first"
    assert ImageCaptions(data, size=8, crop="centre")[0][0].max() < -0.9


def test_what_is_missing_is_said_in_one_line(tmp_path):
    folder = write(tmp_path / "some", "parquet")
    one_line(lambda: hub_dataset(folder, "train", columns=["caption"]), "no column 'caption': it has 'text', 'n'")
    one_line(lambda: hub_dataset(folder, "test"), "test")
    (tmp_path / "none").mkdir()
    one_line(lambda: hub_dataset(str(tmp_path / "none")), "empty folder")
    (tmp_path / "hollow").mkdir()
    pd.DataFrame({"text": []}).to_parquet(tmp_path / "hollow" / "train.parquet")
    one_line(lambda: hub_dataset(str(tmp_path / "hollow")), "is empty")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "train.jsonl").write_text("")
    one_line(lambda: hub_dataset(str(tmp_path / "nothing")), "is empty")
    one_line(lambda: hub_dataset(str(tmp_path / "absent")), "not in the cache|unknown")


@pytest.mark.parametrize("streaming", [False, True])
def test_offline_and_not_cached(streaming):
    one_line(
        lambda: hub_dataset("nobody/none", streaming=streaming), "'nobody/none' is not in the cache and HF_HUB_OFF"
    )


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (lambda r: errors.GatedRepoError("no", response=r), "gated: accept its terms"),
        (lambda r: errors.RepositoryNotFoundError("no", response=r), "is unknown"),
        (lambda r: datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "is unknown"),
        (lambda r: datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset"), "gated"),
        (lambda r: ConnectionError("Couldn't reach 'a/b'"), "Hub cannot be reached"),
        (lambda r: ValueError("BuilderConfig 'x' not found.\nAvailable: ['y']"), "could not be loaded: .*Available"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(monkeypatch, error, pattern):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid/a/b"))

    def fail(*args, **kw):
        raise error(response)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    one_line(lambda: hub_dataset("a/b"), pattern)


def test_offline_variable_in_a_fresh_process(tmp_path):
    code = """
from workbench.data.hub import hub_dataset
from workbench.models.hub import load_pretrained
from workbench.errors import WorkbenchError
from transformers import AutoModelForCausalLM, AutoTokenizer
from diffusers import UNet2DConditionModel
for call in (lambda: hub_dataset("nobody/none"), lambda: load_pretrained(AutoModelForCausalLM, "nobody/none"),
             lambda: load_pretrained(AutoTokenizer, "nobody/none"),
             lambda: load_pretrained(UNet2DConditionModel, "nobody/none", subfolder="unet")):
    try:
        call()
    except WorkbenchError as error:
        print(error)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    lines = ran.stdout.splitlines()
    assert len(lines) == 4, ran.stderr[-2000:]
    assert all("'nobody/none' is not in the cache and HF_HUB_OFFLINE is set" in line for line in lines)


class Letters:
    """A tokenizer of single letters; letter a is 1."""

    bos_token_id, eos_token_id, name_or_path = None, 0, "letters"

    def __len__(self):
        return 27

    def __call__(self, texts, **kw):
        return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}


def test_token_file(tmp_path):
    path = tmp_path / "deep" / "tokens.bin"
    tokens = tokenise_to_memmap(iter(["abc", "", "de", "fgh"]), Letters(), path, 9, source="abc", batch=2)
    assert tokens.dtype == np.uint32 and isinstance(tokens, np.memmap)
    assert tokens.tolist() == [0, 1, 2, 3, 0, 4, 5, 0, 6]
    assert read_tokens(path).tolist() == tokens.tolist()
    assert sorted(p.name for p in path.parent.iterdir()) == ["tokens.bin", "tokens.bin.json"]

    def unread():
        raise AssertionError("a finished file was made again")
        yield

    assert tokenise_to_memmap(unread(), Letters(), path, 9, source="abc").tolist() == tokens.tolist()
    one_line(lambda: tokenise_to_memmap(["abc"], Letters(), path, 99, source="abc"), "4 tokens in 1 documents.* 99")
    assert read_tokens(path).tolist() == tokens.tolist(), "a failed attempt must leave the finished file alone"
    assert len(list(path.parent.iterdir())) == 2
    os.truncate(path, 20)
    one_line(lambda: read_tokens(path), "20 bytes where 9 tokens take 36")
    one_line(lambda: read_tokens(tmp_path / "none"), "no token file")
    bare = Letters()
    bare.eos_token_id = None
    one_line(lambda: tokenise_to_memmap(["a"], bare, path, 1), "neither a BOS nor an EOS")


def test_models_come_from_safetensors_only(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8))
    model.save_pretrained(tmp_path / "good")
    loaded = load_pretrained(GPT2LMHeadModel, str(tmp_path / "good"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    pickled = tmp_path / "pickled"
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    one_line(lambda: load_pretrained(GPT2LMHeadModel, str(pickled)), "safetensors")
    one_line(lambda: load_pretrained(AutoModel, str(pickled)), "safetensors")
    one_line(lambda: load_pretrained(GPT2LMHeadModel, str(pickled), use_safetensors=False), "only safetensors")
    one_line(lambda: load_pretrained(AutoTokenizer, "a/b", trust_remote_code=True), "trust_remote_code")
