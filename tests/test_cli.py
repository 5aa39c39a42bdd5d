"""The command line: what it shows, and that every mistake is one line and a non-zero exit before anything starts."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from workbench.cli import app
from workbench.runs import folder


def invoke(*words: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["run", "--presett", "quick"], "No such option: --presett"),
        (["run", "tory"], "unknown paper 'tory': did you mean 'toy'?"),
        (["run", "toy", "--preset", "fast"], "unknown preset 'fast' of toy: choose from quick, desk"),
        (["run", "toy", "-p", "stesp=3"], "unknown parameter 'stesp': did you mean 'steps'?"),
        (["run", "toy", "-p", "steps=0"], "parameter steps: input should be greater than or equal to 1, got 0"),
        (["run", "toy", "-p", "steps=many"], "parameter steps: input should be a valid integer"),
        (["run", "toy", "-p", "steps"], "-p takes name=value, got 'steps'"),
        (["run", "toy", "-p", "broken.steps=3"], "-p broken.steps: 'broken' is none of the papers to run (toy)"),
        (["run", "toy", "broken", "-p", "stesp=3"], "address one paper with -p toy.NAME=VALUE"),
        (["run", "toy", "--seed", "-1"], "seed is a whole number from 0 up, got -1"),
        (["run", "toy", "--seed", "x"], "Invalid value for '--seed'"),
        (["run", "toy", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["run", "toy"], "no notebooks/"),
        (["show", "tory"], "unknown paper 'tory'"),
        (["show"], "Missing argument 'SLUG'"),
        (["resume", "nothing"], "run 'nothing': no such run under"),
        (["resume", "no/where"], "no/where is not a run folder: it has no config.json"),
        (["keep", "nothing"], "run 'nothing': no such run under"),
        (["bench", "nothing"], "no benchmark 'nothing'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(toy, words, said):
    result = invoke(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == "" and not toy.out.exists()


def test_help_names_every_command_and_loads_no_torch():
    code = "import sys; from workbench.cli import app\ntry: app()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("list", "show", "run", "resume", "report", "keep", "bench"):
        assert f" {name} " in done.stdout


def test_no_words_at_all_show_the_help():
    assert "Usage" in invoke().output


def test_show_tells_claims_presets_and_parameters(toy):
    said = invoke("show", "toy").output
    for text in (
        "The level [l] is above 0.4.",
        "0.7 nats",
        "level ≥ 0.4 nats",
        "quick",
        "desk",
        "≥ 1",
        "optimiser steps",
    ):
        assert text in said


def test_list_tells_the_latest_verdicts(toy):
    assert "no run yet" in invoke("list").output
    run = folder.start("toy")
    for seed in range(3):
        run.record.result("level", 0.5 + seed / 100, seed=seed)
    run.judge()
    assert "1 holds" in invoke("list").output


def test_a_value_for_one_paper_wins_over_one_for_all():
    from workbench.cli import _for_each

    got = _for_each(["toy", "broken"], ["toy.steps=5", "steps=3", "level=0.5"])
    assert got == {"toy": {"steps": 5, "level": 0.5}, "broken": {"steps": 3, "level": 0.5}}


def test_a_run_id_that_fits_two_runs_is_refused(toy):
    for n in (1, 2):
        folder.start("toy", run_dir=toy.out / "runs" / "toy" / f"2026-{n}")
    result = invoke("resume", "2026")
    assert result.exit_code == 2 and "matches 2026-1, 2026-2" in result.stderr


def test_every_kernel_bench_that_is_listed_can_be_imported():
    import importlib

    names = invoke("bench").stdout.split()
    assert "linear_attention" in names
    for name in names:
        assert any(hasattr(importlib.import_module(m), "bench") for m in _homes(name)), name


def _homes(name: str) -> list[str]:
    from workbench.papers import PAPERS

    return [f"workbench.papers.{name}" if name in PAPERS else f"workbench.kernels.bench_{name}"]
