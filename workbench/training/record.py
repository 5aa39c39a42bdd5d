"""What a run leaves behind as it goes: metrics.jsonl (appended), and a folder of checkpoints for each training.

Records are flat JSON objects with a "kind": "step" (a training's step), "result" (one measure, one seed), "note".
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench.errors import WorkbenchError


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has no nan or inf
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def read_records(metrics: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, without touching it: a last line still being written (or cut short) is left out.

    Raises WorkbenchError where an earlier line is damaged.
    """
    if not metrics.exists():
        return
    with open(metrics) as f:
        for number, line in enumerate(f, 1):
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    raise WorkbenchError(f"{metrics} line {number} is damaged; remove the line or start anew") from None


class Record:
    """The metrics and checkpoints of one run, in `folder`. Opening an existing folder continues it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        self.metrics = self.folder / "metrics.jsonl"
        (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._repair()

    def _repair(self) -> None:
        """Drop a last line that a kill cut short, so that appending starts on a fresh line."""
        if self.metrics.exists():
            raw = self.metrics.read_bytes()
            if raw and not raw.endswith(b"\n"):
                os.truncate(self.metrics, raw.rfind(b"\n") + 1)  # works on a full disk too

    def _replace(self, raw: bytes) -> None:
        temporary = self.metrics.with_suffix(".tmp")
        with open(temporary, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.metrics)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one record; raises WorkbenchError when the disk is full."""
        line = json.dumps({"kind": kind, **{k: _plain(v) for k, v in fields.items()}}) + "\n"
        try:
            with open(self.metrics, "a") as f:
                f.write(line)
        except OSError as error:
            self._repair()  # half a line may have fitted
            raise WorkbenchError(
                f"cannot write {self.metrics}: {error.strerror}; free some space, then resume"
            ) from None

    def result(self, measure: str, value: float, *, seed: int | str, **fields: Any) -> None:
        """Store one measure of one seed: what claims are judged from."""
        self.write("result", measure=measure, seed=seed, value=float(value), **fields)

    def records(self, kind: str | None = None, **match: Any) -> list[dict[str, Any]]:
        """All records of a kind whose fields equal `match`, in the order written."""
        return [
            r
            for r in read_records(self.metrics)
            if (kind is None or r["kind"] == kind) and all(r.get(k) == v for k, v in match.items())
        ]

    def rewind(self, training: str, step: int) -> None:
        """Forget the step records of `training` after `step`: they will be computed again from its checkpoint."""
        keep = [
            r
            for r in read_records(self.metrics)
            if not (r["kind"] == "step" and r["training"] == training and r["step"] > step)
        ]
        self._replace("".join(json.dumps(r) + "\n" for r in keep).encode())

    def checkpoints(self, training: str) -> Path:
        """Folder of the checkpoints of one training of this run."""
        return self.folder / "checkpoints" / training

    def progress(self, text: str, done: int, total: int) -> None:
        """Say how far the present work is; a launcher in another process reads it (not part of the results)."""
        temporary = self.folder / f".progress.{os.getpid()}"
        try:
            temporary.write_text(json.dumps({"text": text, "done": done, "total": total, "time": time.time()}))
            os.replace(temporary, self.folder / "progress.json")
        except OSError:
            pass  # a missing progress line must not stop a run
