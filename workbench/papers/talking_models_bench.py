"""What talking costs: time and memory of a training step against the rounds, examples a second of both models."""

import csv
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.evaluation.cost import peak_bytes
from workbench.models.stages import Stages
from workbench.papers.talking_models_settings import PRESETS, Config
from workbench.papers.talking_models_study import Job, build_pupil
from workbench.papers.talking_models_tasks import load_task, small_model

REPEATS = 5


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of several calls: what other processes add is never negative."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def rows_of(config: Config, task_name: str, *, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """A row {"task", "what", "rounds", "seconds", "examples_per_second", "bytes"} for each thing that is timed.

    Weights do not change the cost, so both models are fresh. Inference is the student's own: no message is exchanged.
    """
    task = load_task(config, task_name, 0)
    teacher = Stages(
        small_model(task, config.teacher_width, config.teacher_layers, config.patch, 0), config.teacher_low,
        config.teacher_high,
    )  # fmt: skip
    batch = task.train.take(torch.arange(config.batch))
    found = []

    def row(what: str, rounds: int, call: Callable[[], object]) -> None:
        seconds = best_seconds(call, repeats)
        found.append(
            {"task": task_name, "what": what, "rounds": rounds, "seconds": seconds,
             "examples_per_second": config.batch / seconds, "bytes": peak_bytes(call)}
        )  # fmt: skip

    def step(pupil: nn.Module) -> None:
        pupil(batch)["loss"].backward()
        pupil.zero_grad()

    arms = [("alone", 0), ("logit KD", 0), ("feature KD", 0), ("one-way", 1), ("two-way", 1), ("two-way", 2),
            ("two-way", 3), ("two-way", 4)]  # fmt: skip
    for arm, rounds in arms:
        with tempfile.TemporaryDirectory() as folder:
            own = replace(config, rounds=max(1, rounds))
            pupil = build_pupil(Job(own, task_name, arm, 0, config.gap, Path(folder)), task, teacher)
            row(f"training step, {arm}", rounds, partial(step, pupil))
    student = pupil.student.eval()
    with torch.no_grad():
        row("inference, student", 0, lambda: student(batch[0]))
        row("inference, teacher", 0, lambda: teacher(batch[0]))
    return found


def measure(folder: Path) -> None:
    """Time both tasks at the desk preset's sizes, write cost.csv, print it."""
    rows = [row for task in PRESETS["desk"].tasks for row in rows_of(PRESETS["desk"], task)]
    with open(folder / "cost.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for r in rows:
            writer.writerow(r | {key: f"{r[key]:.4g}" for key in ("seconds", "examples_per_second")})
    for r in rows:
        speed = f"{1e3 * r['seconds']:8.2f} ms {r['examples_per_second']:10,.0f} examples/s {r['bytes']:12,} bytes"
        print(f"{r['task']:8} {r['what']:26} rounds {r['rounds']} {speed}")
