"""Time, peak memory and share of the bandwidth limit of linear attention beside softmax, from 1k to 256k tokens.

`workbench bench linear_attention` calls bench(). One head layout: SD-1.5's widest grid, 8 heads of 40.
"""

import csv
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from workbench.errors import WorkbenchError
from workbench.kernels.linear_attention import linear_attention, quadratic_reference

TOKENS = tuple(1024 * 4**i for i in range(5))  # 1k to 256k
HEADS, WIDTH = 8, 40


def two_matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plain PyTorch form a user would write: q (k^T v) / (q . mean k + eps), in the inputs' own dtype."""
    return q @ (k.mT @ (v / k.shape[2])) / (q @ k.mean(2).unsqueeze(-1) + 1e-4)


def naive_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention that builds the N x N matrix, as PyTorch did before fused attention."""
    return (q @ k.mT / math.sqrt(q.shape[3])).softmax(-1) @ v


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear_attention": linear_attention,
    "two_matmuls": two_matmuls,
    "sdpa": F.scaled_dot_product_attention,
    "naive_softmax": naive_softmax,
}


def bench(
    out: Path,
    *,
    tokens: tuple[int, ...] | list[int] | None = None,
    device: str | torch.device | None = None,
    seconds: float = 0.5,
    cap: float = 2.0,
) -> list[dict]:
    """Measure every method at every length, forward and forward + backward; write linear_attention.{csv,json} to `out`.

    seconds: measuring time a point. cap: a point whose one call is expected to take longer (seconds, from the shorter
    lengths and the method's exponent) is recorded as not run; one that cannot fit in memory as too large; one that
    runs out of memory as out of memory. Raises WorkbenchError for lengths below 1 or a device that is not there.
    """
    tokens = list(TOKENS if tokens is None else tokens)
    if not tokens or min(tokens) < 1:
        raise WorkbenchError(f"bench: lengths must be 1 token or more, got {tokens}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise WorkbenchError(f"bench: device {device} is not available here; use cpu or a visible cuda device")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shared = _provenance(device) | {"dtype": str(dtype).removeprefix("torch."), "heads": HEADS, "width": WIDTH}
    shared |= {"copy_gb_per_s": round(_copy_bandwidth(device) / 1e9, 2), "max_error": f"{_error(device, dtype):.1e}"}
    rows: list[dict] = []
    points = [(m, p, n) for m in METHODS for p in ("forward", "forward+backward") for n in sorted(tokens)]
    for method, direction, n in tqdm(points, desc="bench linear_attention", unit="point"):
        earlier = [r for r in rows if (r["method"], r["pass"], r["status"]) == (method, direction, "ok")]
        row = {"method": method, "pass": direction, "tokens": n}
        rows.append(row | _point(method, direction, n, device, dtype, earlier, seconds, cap, shared) | shared)
    out.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(out / "linear_attention.csv", "w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)
    (out / "linear_attention.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
    return rows


def _point(
    method: str, direction: str, n: int, device: torch.device, dtype: torch.dtype, earlier: list[dict],
    seconds: float, cap: float, shared: dict,
) -> dict:  # fmt: skip
    exponent = 1 if method in ("linear_attention", "two_matmuls") else 2
    if earlier and (expected := earlier[-1]["ms_p50"] / 1e3 * (n / earlier[-1]["tokens"]) ** exponent) > cap:
        return {"status": f"not run: about {expected:.0f} s a call expected, the cap is {cap:g} s"}
    size = torch.finfo(dtype).bits // 8
    forward = direction == "forward"
    need = HEADS * n * WIDTH * 4 * (8 if forward else 16)
    if method == "naive_softmax":
        need += HEADS * n * n * size * (2 if forward else 4)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > free * 0.8:
        return {"status": f"too large: about {need / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free"}
    try:
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(1, HEADS, n, WIDTH, generator=generator, device=device, dtype=dtype) for _ in range(3))
        if exponent == 1:
            q, k = F.elu(q) + 1, F.elu(k) + 1
        g = torch.randn(v.shape, generator=generator, device=device, dtype=dtype)
        if forward:
            call = _forward(METHODS[method], q, k, v)
        else:
            call = _both(METHODS[method], [x.requires_grad_() for x in (q, k, v)], g)
        peak = _peak_bytes(call, device)
        low, middle, high, runs = _times(call, device, seconds)
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    # what any method must move: q, k, v in and out out; then q, k, v, g in and three gradients out
    traffic = (4 if forward else 11) * HEADS * n * WIDTH * size
    limit = traffic / (shared["copy_gb_per_s"] * 1e9)
    return {
        "status": "ok", "ms_p50": round(middle * 1e3, 4),
        "ms_p20": round(low * 1e3, 4) if runs > 2 else "", "ms_p80": round(high * 1e3, 4) if runs > 2 else "",
        "runs": runs, "peak_mb": round(peak / 1e6, 2), "bandwidth_limit_percent": round(100 * limit / middle, 2),
    }  # fmt: skip


def _forward(method: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return method(q, k, v)

    return call


def _both(method: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(method(*inputs), inputs, g)


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that one call holds beyond its inputs, in bytes, as PyTorch's allocator sees it."""
    call()  # the first call compiles, and keeps work space
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # the profiler announces each start and stop from C++, in the middle of the progress bar
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            call()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _times(call: Callable[[], object], device: torch.device, seconds: float) -> tuple[float, float, float, int]:
    """The 20th, 50th and 80th percentile of a call's time in seconds, and how many calls were timed."""
    if device.type == "cuda":
        from triton.testing import do_bench

        times = [t / 1e3 for t in do_bench(call, warmup=25, rep=int(seconds * 200), return_mode="all")]
    else:
        times, end = [], time.perf_counter() + seconds
        while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            if sum(times) > 2 * seconds:  # one slow point is not repeated for minutes
                break
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return low.item(), middle.item(), high.item(), len(times)


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and write counted: the limit that the percentages are of."""
    a = torch.empty((256 if device.type == "cuda" else 64) * 2**20 // 4, device=device).normal_()
    b = torch.empty_like(a)
    _, middle, _, _ = _times(lambda: b.copy_(a), device, 0.5)
    return 2 * a.nbytes / middle


def _error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest deviation from the float64 N x N form at 1000 tokens, relative to that form's largest value."""
    generator = torch.Generator(device).manual_seed(1)
    q, k, v = (torch.randn(1, 2, 1000, WIDTH, generator=generator, device=device, dtype=dtype) for _ in range(3))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    wanted = quadratic_reference(q, k, v)
    return ((linear_attention(q, k, v).double() - wanted).abs().max() / wanted.abs().max()).item()


def _provenance(device: torch.device) -> dict:
    """Device, versions, date and commit: on every row, so that a row copied elsewhere still says where it is from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed"
    return {
        "device": name, "threads": torch.get_num_threads(), "path": "Triton" if device.type == "cuda" else "PyTorch",
        "torch": torch.__version__, "triton": version, "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": _commit(),
        "load_average": round(psutil.getloadavg()[0], 1),  # of the minute before: what else the machine was doing
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
