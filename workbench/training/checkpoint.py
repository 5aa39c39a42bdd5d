"""Checkpoints that survive a kill, a full disk and a flipped bit: safetensors and JSON, checksummed, then renamed.

A checkpoint is a folder step-00000120/ with one .safetensors file per part ("model", "optimizer", "ema"), state.json,
and manifest.json with the SHA-256 of each file. It is written under a temporary name, fsynced, and renamed.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from workbench.errors import WorkbenchError

Parts = Mapping[str, Mapping[str, torch.Tensor]]


class CheckpointError(WorkbenchError):
    """A checkpoint that cannot be written, or that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the step it was taken after, its tensors by part, and its JSON state."""

    step: int
    parts: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    path: Path


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors with a storage each: safetensors refuses tied weights, which load back equal all the same."""
    seen: set[int] = set()
    out = {}
    for name, t in tensors.items():
        t = t.detach().contiguous()
        if t.untyped_storage().data_ptr() in seen:
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        out[name] = t
    return out


def save(folder: Path, step: int, parts: Parts, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write folder/step-<step> whole or not at all, then drop all but the `keep` newest. Raises CheckpointError."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".writing-{step:08d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".writing-*"):  # left by a kill
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        for name, tensors in parts.items():
            save_file(_own_storage(tensors), temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(dict(state)))
        manifest = {p.name: _digest(p) for p in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "sha256": manifest}))
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        why = "the disk is full" if full else str(error)
        kept = _steps(folder)
        last = f"the checkpoint of step {kept[0]} is intact" if kept else "no earlier checkpoint"
        raise CheckpointError(
            f"cannot write a checkpoint to {folder}: {why}; {last}; free some space, then resume"
        ) from None
    for old in _steps(folder)[keep:]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return final


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, newest first."""
    return sorted((int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError when it is truncated, altered or incomplete."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest["sha256"].items():
            if _digest(path / name) != digest:
                raise CheckpointError(
                    f"checkpoint {path} is refused: {name} is not what was written (checksum differs)"
                )
        parts = {p.stem: load_file(p) for p in sorted(path.glob("*.safetensors")) if p.name in manifest["sha256"]}
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(int(manifest["step"]), parts, state, path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {path} is refused: it is incomplete or damaged ({type(error).__name__})"
        ) from None


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; each refused one is told in a one-line warning. None where there is none."""
    for step in _steps(folder):
        try:
            return load(folder / f"step-{step:08d}")
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    return None
