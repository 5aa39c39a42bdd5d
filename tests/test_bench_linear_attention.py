"""The kernel's benchmark on tiny lengths: what it records, and that what does not fit is told rather than fatal."""

import csv
import json
from types import SimpleNamespace

import pytest

from workbench.errors import WorkbenchError
from workbench.kernels import bench_linear_attention as module


def by_point(rows):
    return {(r["method"], r["pass"], r["tokens"]): r for r in rows}


def test_rows_say_time_memory_bandwidth_and_where_they_are_from(tmp_path):
    rows = module.bench(tmp_path, tokens=[512, 64], device="cpu", seconds=0.01)
    assert len(rows) == len(module.METHODS) * 2 * 2 and {r["status"] for r in rows} == {"ok"}
    for r in rows:
        assert 0 < r["ms_p50"] and 0 < r["bandwidth_limit_percent"] and r["device"] and r["torch"] and r["commit"]
        assert r["ms_p20"] == "" or r["ms_p20"] <= r["ms_p50"] <= r["ms_p80"]
    assert float(rows[0]["max_error"]) < 1e-5 and rows[0]["path"] == "PyTorch"
    at = by_point(rows)
    matrix = module.HEADS * 512 * 512 * 4 / 1e6
    assert at["naive_softmax", "forward", 512]["peak_mb"] >= matrix  # MB; N x N scores of every head
    for direction in ("forward", "forward+backward"):
        small, large = (at["linear_attention", direction, n]["peak_mb"] for n in (64, 512))
        assert large < 8.1 * small  # eight times the tokens
    assert at["linear_attention", "forward", 512]["peak_mb"] < matrix / 2
    stored = json.loads((tmp_path / "linear_attention.json").read_text())
    with open(tmp_path / "linear_attention.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert stored == rows and [r["method"] for r in table] == [r["method"] for r in rows]


def test_what_does_not_fit_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=64e6))
    at = by_point(module.bench(tmp_path, tokens=[64, 4096], device="cpu", seconds=0.01, cap=1e9))
    assert at["naive_softmax", "forward", 4096]["status"].startswith("too large: about 1 GB")
    assert at["linear_attention", "forward", 4096]["status"] == "ok"

    at = by_point(module.bench(tmp_path, tokens=[64, 128], device="cpu", seconds=0.01, cap=1e-9))
    assert at["sdpa", "forward", 64]["status"] == "ok" and at["sdpa", "forward", 128]["status"].startswith("not run")

    def full(q, k, v):
        raise module.torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(module.METHODS, "sdpa", full)
    at = by_point(module.bench(tmp_path, tokens=[64], device="cpu", seconds=0.01))
    assert at["sdpa", "forward", 64]["status"] == "out of memory"
    assert at["naive_softmax", "forward", 64]["status"] == "ok"


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(WorkbenchError, match="1 token or more"):
        module.bench(tmp_path, tokens=[0])
    with pytest.raises(WorkbenchError, match="not available here"):
        module.bench(tmp_path, device="meta")
