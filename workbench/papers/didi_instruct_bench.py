"""What sampling costs: `workbench bench didi_instruct` times teacher, student and RGAS at every NFE in one run."""

import csv
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.evaluation.cost import peak_bytes
from workbench.models.masked_diffusion import Move, sample
from workbench.papers.didi_instruct import Guidance
from workbench.papers.didi_instruct_settings import PRESETS, Config
from workbench.papers.didi_instruct_study import distil_on_text, load_task

COLUMNS = ("sampler", "nfe", "student_passes", "critic_passes", "critic_backward", "seconds_a_sequence",
           "tokens_a_second", "peak_bytes", "load_average")  # fmt: skip


def row(name: str, net: nn.Module, config: Config, steps: int, guide: Guidance | None, count: int) -> dict[str, Any]:
    """One sampler at one NFE: the best of three timings of `count` sequences, and the most bytes it holds at once."""
    move: Move | None = guide.mover(net) if guide else None

    def once() -> None:
        sample(net, count, config.length, steps, torch.Generator().manual_seed(0), move=move)

    once()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    passes = guide.passes() if guide else {"student": steps, "critic": 0, "critic backward": 0}
    return {
        "sampler": name, "nfe": steps, "student_passes": passes["student"], "critic_passes": passes["critic"],
        "critic_backward": passes["critic backward"], "seconds_a_sequence": min(times) / count,
        "tokens_a_second": count * config.length / min(times), "peak_bytes": peak_bytes(once),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def bench(folder: Path, config: Config | None = None, *, count: int = 8) -> None:
    """Write sampling.csv: teacher, student (the same network: the same cost a step) and RGAS. A short distillation."""
    long = {"steps": 5, "length": 128, "nfe": (1, 2, 4, 8, 16, 32, 64, 128)}  # cost needs no more training than this
    config = config or Config(**{**PRESETS["quick"].__dict__, **long})
    task = load_task(config, folder)
    student = distil_on_text(config, task, "didi", 0, None, progress=False)
    rows = []
    for steps in config.nfe:
        guide = Guidance(student.critic, steps, config.guidance, config.candidates, config.rerank_from)
        for name, net, extra in (("teacher", task.teacher, None), ("student", student.net, None),
                                 ("student, RGAS", student.net, guide)):  # fmt: skip
            rows.append(row(name, net, config, steps, extra, count))
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    with open(folder / "sampling.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
