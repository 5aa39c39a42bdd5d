"""Data of the full presets: Hub data sets and local folders by `datasets`, token files on disk, captioned images."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from workbench.errors import WorkbenchError


def hub_error(id: str, kind: str, error: Exception) -> WorkbenchError:
    """One line that says why `id` (a "data set" or a "model") could not be had, from what the Hub libraries raised."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(f"{error} {error.__cause__ or ''}".split())

    def any_of(*types: type) -> bool:
        return any(isinstance(e, types) for e in chain)

    if any_of(errors.GatedRepoError) or "gated" in text:
        return WorkbenchError(
            f"{kind} {id!r} is gated: accept its terms on its Hub page, then log in (`hf auth login` or HF_TOKEN)"
        )
    if any_of(errors.RevisionNotFoundError):
        return WorkbenchError(f"{kind} {id!r} has no such revision on the Hub: {text[:200]}")
    if kind == "model" and "safetensors" in text:
        return WorkbenchError(f"{kind} {id!r} has no safetensors weights, the only format loaded here: {text[:160]}")
    if (
        constants.HF_HUB_OFFLINE
        and not Path(id).is_dir()
        and any_of(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, OSError)
    ):
        return WorkbenchError(
            f"{kind} {id!r} is not in the cache and HF_HUB_OFFLINE is set: fetch it once on a machine with a network, "
            f"or unset HF_HUB_OFFLINE"
        )
    if any_of(errors.RepositoryNotFoundError, DatasetNotFoundError, errors.HFValidationError):
        return WorkbenchError(f"{kind} {id!r} is unknown: no folder here, no public id on the Hub (owner/name)")
    if any_of(errors.LocalEntryNotFoundError, ConnectionError) or any("Connect" in type(e).__name__ for e in chain):
        return WorkbenchError(f"{kind} {id!r} is not in the cache and the Hub cannot be reached: check the network")
    return WorkbenchError(f"{kind} {id!r} could not be loaded: {text[:300] or type(error).__name__}")


def hub_dataset(
    id: str, split: str = "train", *, name: str | None = None, streaming: bool = False, columns: Sequence[str] = ()
) -> Any:
    """A `datasets` Dataset (or IterableDataset when streaming) from the Hub or a folder of parquet, jsonl or images.

    name: the data set's configuration. columns: those that must exist. Uses the user's cache (HF_HOME); with
    HF_HUB_OFFLINE, a streamed data set is read from the cache too. Raises WorkbenchError in one line when it is
    offline and not cached, gated, unknown, without the split or a column, or empty.
    """
    from datasets import load_dataset
    from huggingface_hub import constants

    local = Path(id).is_dir()
    if local and not any(p.is_file() for p in Path(id).rglob("*")):
        raise WorkbenchError(f"data set {id!r} is an empty folder: put parquet, jsonl or image files into it")
    stream = streaming and (local or not constants.HF_HUB_OFFLINE)
    try:
        data = load_dataset(str(Path(id).resolve()) if local else id, name, split=split, streaming=stream)
        first = next(iter(data), None)
    except WorkbenchError:
        raise
    except Exception as error:  # the library's builders raise of every kind; each becomes one line
        told = f"{error} {error.__cause__}".lower()
        # pyarrow's word for a parquet file without rows is the batch size it chose for it
        if isinstance(error, StopIteration) or "no data" in told or "batchsize must be greater than 0" in told:
            raise WorkbenchError(f"data set {id!r}, split {split!r}, is empty") from error
        raise hub_error(id, "data set", error) from error
    if first is None:
        raise WorkbenchError(f"data set {id!r}, split {split!r}, is empty")
    for column in columns:
        if column not in first:
            raise WorkbenchError(f"data set {id!r} has no column {column!r}: it has {', '.join(map(repr, first))}")
    return data.to_iterable_dataset() if streaming and not stream else data


def tokenise_to_memmap(
    texts: Iterable[str], tokenizer: Any, path: Path, budget: int, *, source: str = "", batch: int = 256
) -> np.ndarray:
    """Write the first `budget` tokens of `texts` to `path` (uint32), each document after a BOS; returns the memory map.

    tokenizer: a transformers tokenizer (its EOS stands in where it has no BOS). The file appears only when it is
    whole; PATH.json says what is in it. A file of the same source, tokenizer and budget is used again (source: an
    id of the texts; empty: never used again). Raises WorkbenchError when the texts end before the budget.
    """
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if mark is None:
        raise WorkbenchError("the tokenizer has neither a BOS nor an EOS token to put between documents")
    if budget < 1:
        raise WorkbenchError(f"a token file needs a budget of 1 token or more, got {budget}")
    identity = {
        "source": source, "tokenizer": str(tokenizer.name_or_path), "vocabulary": len(tokenizer), "bos": int(mark),
        "tokens": budget, "dtype": "uint32",
    }  # fmt: skip
    if source and _sidecar(path).exists() and path.exists():
        stored = json.loads(_sidecar(path).read_text(encoding="utf8"))
        if {k: stored.get(k) for k in identity} == identity:
            return read_tokens(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    written = documents = 0
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for ids in _documents(texts, tokenizer, batch):
                tokens = np.asarray([mark, *ids], dtype=np.uint32)[: budget - written].tobytes()
                file.write(tokens)
                digest.update(tokens)
                written, documents = written + len(tokens) // 4, documents + 1
                if written == budget:
                    break
            file.flush()
            os.fsync(file.fileno())
        if written < budget:
            raise WorkbenchError(
                f"{source or 'the texts'}: {written:,} tokens in {documents:,} documents, the budget is {budget:,}"
            )
        _sidecar(path).unlink(missing_ok=True)  # never the old description beside new tokens
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    describe = identity | {"documents": documents, "sha256": digest.hexdigest()}
    partial.write_text(json.dumps(describe, indent=1) + "\n", encoding="utf8")
    os.replace(partial, _sidecar(path))
    return read_tokens(path)


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of a file made by tokenise_to_memmap, (tokens,) uint32, read-only and not loaded into memory.

    Raises WorkbenchError when the file or its description is missing, or their lengths differ.
    """
    try:
        tokens = json.loads(_sidecar(path).read_text(encoding="utf8"))["tokens"]
        size = path.stat().st_size
    except (OSError, ValueError, KeyError) as error:
        raise WorkbenchError(f"{path}: no token file with its {_sidecar(path).name}; make it again") from error
    if size != 4 * tokens:
        raise WorkbenchError(f"{path}: {size} bytes where {tokens} tokens take {4 * tokens}; make it again")
    return np.memmap(path, dtype=np.uint32, mode="r")


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _documents(texts: Iterable[str], tokenizer: Any, batch: int) -> Iterator[list[int]]:
    kept = (text for text in texts if text)
    while chunk := list(itertools.islice(kept, batch)):
        yield from tokenizer(chunk, add_special_tokens=False, return_attention_mask=False)["input_ids"]


class ImageCaptions:
    """Images with captions for a text-to-image model, drawn at random: the data of LinFusion's full preset.

    data: a Dataset with random access; image, caption: its columns; captions: replaces the column (one a row).
    size: px. crop: "squash" resizes to a square as LinFusion does for SD-1.5, "centre" keeps the aspect (SDXL).
    """

    def __init__(
        self, data: Any, *, size: int, image: str = "image", caption: str = "text",
        captions: Sequence[str] | None = None, crop: Literal["squash", "centre"] = "squash",
    ):  # fmt: skip
        if not hasattr(data, "__len__"):
            raise WorkbenchError("image-caption data needs random access: load it with streaming=False")
        if not len(data):
            raise WorkbenchError("image-caption data is empty")
        for column in [image] if captions is not None else [image, caption]:
            if column not in data.column_names:
                raise WorkbenchError(f"no column {column!r}: it has {', '.join(map(repr, data.column_names))}")
        if captions is not None and len(captions) != len(data):
            raise WorkbenchError(f"{len(captions)} captions for {len(data)} images: one an image is needed, in order")
        self.data, self.size, self.image, self.caption = data, size, image, caption
        self.captions, self.crop = captions, crop

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Image (3, size, size) float32 in [-1, 1] and its caption. Raises WorkbenchError for what is not an image."""
        row = self.data[index]
        picture = row[self.image]
        if not isinstance(picture, Image.Image):
            raise WorkbenchError(f"column {self.image!r} holds {type(picture).__name__}, not images")
        picture, square = picture.convert("RGB"), (self.size, self.size)
        if self.crop == "squash":
            picture = picture.resize(square, Image.Resampling.BICUBIC)
        else:
            picture = ImageOps.fit(picture, square, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
        caption = row[self.caption] if self.captions is None else self.captions[index]
        # some sets keep several captions an image; the first is the one that does not depend on a seed
        return pixels, caption[0] if isinstance(caption, list) else str(caption)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """n images (n, 3, size, size) and their captions, drawn with replacement: the draw depends on the generator."""
        chosen = torch.randint(len(self), (n,), generator=generator).tolist()
        images, captions = zip(*(self[i] for i in chosen), strict=True)
        return torch.stack(images), list(captions)
