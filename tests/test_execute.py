"""Notebooks through papermill: a failing paper beside a good one, resume, Ctrl-C, and the kernel that is used."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from typer.testing import CliRunner

from workbench.cli import app
from workbench.runs import execute
from workbench.training.record import read_records


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def hostile_kernelspec(tmp_path, monkeypatch):
    """A python3 kernelspec of the user's that starts no kernel, found before any other."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")


def test_a_failing_paper_is_kept_and_told_the_other_runs_and_the_failed_resumes(toy, hostile_kernelspec, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    toy.notebook("toy")
    toy.notebook("broken")
    ran = CliRunner().invoke(app, ["run", "broken", "toy", "-p", "toy.level=0.6", "-p", "steps=3", "--jobs", "2"])
    assert ran.exit_code == 1, ran.output

    good, bad = only(toy.out / "runs" / "toy"), only(toy.out / "runs" / "broken")
    assert json.loads((good / "run.json").read_text())["state"] == "done"
    config = json.loads((good / "config.json").read_text())["config"]
    assert (config["steps"], config["level"]) == (3, 0.6)
    assert json.loads((bad / "config.json").read_text())["config"]["level"] == 0.5
    assert json.loads((good / "claims.json").read_text())[0]["verdict"] == "holds"
    note = next(r for r in read_records(good / "metrics.jsonl") if r["kind"] == "note")
    # not the kernelspec's interpreter, and torch's threads yield while they wait
    assert (note["python"], note["omp"]) == (sys.executable, "PASSIVE")
    notebook = nbformat.read(good / "notebook.ipynb", as_version=4)
    assert "widgets" not in notebook.metadata
    assert "Plotly.newPlot" in (good / "notebook.html").read_text()

    assert json.loads((bad / "run.json").read_text())["state"] == "failed"
    assert "RuntimeError: the toy broke <here>" in (bad / "error.txt").read_text()
    partial = nbformat.read(bad / "notebook.ipynb", as_version=4)
    assert any(o.output_type == "error" for c in partial.cells for o in c.get("outputs", []))
    assert partial.cells[-1].execution_count is None
    assert "the toy broke" in (bad / "notebook.html").read_text()
    assert "broken failed in cell" in ran.output and "RuntimeError: the toy broke <here>" in ran.output
    assert "holds" in ran.output and str(toy.out / "report.html") in ran.output.replace("\n", "")
    assert "the toy broke &lt;here&gt;" in (toy.out / "report.html").read_text()

    toy.mended.touch()
    again = CliRunner().invoke(app, ["resume", bad.name])
    assert again.exit_code == 0, again.output
    assert only(toy.out / "runs" / "broken") == bad
    assert not (bad / "error.txt").exists()
    notes = [r["resumed_from"] for r in read_records(bad / "metrics.jsonl") if r["kind"] == "note"]
    assert notes == [None, 3]  # the second time the training was loaded, not repeated
    assert len([r for r in read_records(bad / "metrics.jsonl") if r["kind"] == "step"]) == 3
    assert json.loads((bad / "run.json").read_text())["seconds"] > 0


LAUNCHER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for jobs in its background
{setup}
from workbench.cli import app
app()
"""


def test_ctrl_c_ends_the_kernel_keeps_the_notebook_and_says_how_to_go_on(toy):
    toy.notebook("toy", extra="run.record.progress('nap', 1, 60); time.sleep(600)")
    command = [sys.executable, "-c", LAUNCHER.format(setup=toy.setup), "run", "toy"]
    process = subprocess.Popen(command, cwd=toy.home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300  # a busy machine starts a kernel slowly
    while (
        not list(toy.out.glob("runs/toy/*/progress.json"))
        or "nap" not in next(toy.out.glob("runs/toy/*/progress.json")).read_text()
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert kernels
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    run = only(toy.out / "runs" / "toy")
    assert process.returncode == 130, said
    assert f"workbench resume {run}" in said.replace("\n", "") and "Traceback" not in said
    assert psutil.wait_procs(kernels, timeout=10)[1] == []
    assert "KeyboardInterrupt" in (run / "notebook.ipynb").read_text()
    assert json.loads((run / "run.json").read_text())["state"] == "interrupted"


def test_a_dead_kernel_is_a_failure_told_in_one_line(toy, capsys):
    toy.notebook("toy", extra="os._exit(9)")
    job = execute.prepare("toy", "quick", 0, {})
    assert not execute.run([job])
    assert job.state == "failed" and "DeadKernelError" in job.error
    assert (job.path / "notebook.html").exists() and "DeadKernelError" in (job.path / "error.txt").read_text()


def test_what_a_long_cell_is_at_is_read_from_its_progress_file(toy):
    toy.notebook("toy")
    job = execute.prepare("toy", "quick", 0, {})
    assert job.training() == ""
    job.path.mkdir(parents=True)
    now = {"text": "teacher", "done": 3, "total": 9, "time": time.time()}
    (job.path / "progress.json").write_text(json.dumps(now))
    assert job.training() == "teacher 3/9"
    job.cell_since = time.time() + 1
    assert job.training() == ""  # said by an earlier cell
