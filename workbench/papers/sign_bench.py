"""Sampling cost of a SIGN student against its teacher: evaluations, seconds, memory, images per second."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.evaluation.cost import peak_bytes
from workbench.models.edm import Denoiser, evaluations, karras_sigmas, ode_sample, small_unet
from workbench.models.idempotent import from_denoiser, reapply


@torch.no_grad()
def sampling_cost(
    images: int = 256, steps: tuple[int, ...] = (1, 2, 4, 8, 18), repeats: int = 3
) -> list[dict[str, Any]]:
    """Rows {"method", "nfe", "seconds", "images_per_second", "bytes"}: the small UNet as teacher (Heun) and as student.

    Cost does not depend on the weights, so nothing is trained. seconds: the best of `repeats`; bytes: the most that one
    call holds beyond its inputs.
    """
    teacher = Denoiser(small_unet(), 0.75).eval()
    f = from_denoiser(teacher, 1.0).eval()
    z = 10 * torch.randn(images, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    calls: list[tuple[str, int, Callable[[], Tensor]]] = [
        ("teacher, Heun", evaluations(n), lambda n=n: ode_sample(teacher, z, karras_sigmas(n, 0.05, 10.0)))  # type: ignore[misc]
        for n in steps
    ]
    calls += [("student", k, lambda k=k: reapply(f, z, k)[-1]) for k in (1, 2, 4)]  # type: ignore[misc]
    rows = []
    for method, nfe, call in calls:
        call()  # the first call allocates its work space
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        best = min(times)
        rows.append({"method": method, "nfe": nfe, "seconds": best, "images_per_second": images / best,
                     "bytes": peak_bytes(call)})  # fmt: skip
    return rows


def bench(folder: Path) -> None:
    """Measure, print, and write sign.csv."""
    rows = sampling_cost()
    with open(folder / "sign.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'method':14} {'NFE':>4} {'seconds':>9} {'images/s':>9} {'peak MB':>8}")
    for r in rows:
        print(
            f"{r['method']:14} {r['nfe']:4} {r['seconds']:9.4f} {r['images_per_second']:9.0f} {r['bytes'] / 1e6:8.1f}"
        )
