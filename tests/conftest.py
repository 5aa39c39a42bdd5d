"""A toy paper with a notebook, real enough to be run, judged and reported in seconds."""

import importlib
import sys
from pathlib import Path

import nbformat
import pytest

PAPER = '''
"""A toy paper: is the mean of noisy halves above 0.4?"""
from typing import Annotated, Literal
from workbench.config import Param, config
from workbench.evaluation.claims import Claim

TITLE, AUTHORS, ARXIV = "Toys <for> tests & trials", "A. Nobody", "0000.00000"
ABOUT, NOTEBOOK = "A toy.", "toy.ipynb"

@config
class Config:
    steps: Annotated[int, Param("optimiser steps", unit="steps", ge=1)] = 4
    level: Annotated[float, Param("what is measured", unit="nats", gt=0, le=1)] = 0.5
    mode: Annotated[Literal["no", "bf16"], Param("precision")] = "no"

PRESETS = {"quick": Config(), "desk": Config(steps=6)}
CLAIMS = (Claim("above", "The level [l] is above 0.4.", "0.7 nats", "Table 1", "level", "nats", ">=", 0.4),)
'''

SETUP = """
import sys
sys.path.insert(0, {home!r})
import toy_paper, workbench.papers
workbench.papers.PAPERS = ("toy", "broken")
sys.modules["workbench.papers.toy"] = sys.modules["workbench.papers.broken"] = toy_paper
"""

CELLS = [
    """
import json, os, time, torch
from pathlib import Path
from workbench.runs.folder import start
from workbench.training.loop import Recipe, fit
run = start(slug, preset, seed=seed, overrides=overrides, run_dir=run_dir)
""",
    """
model = torch.nn.Linear(2, 1)
fitted = fit(model, lambda m, x: {"loss": m(x).square().mean()}, lambda g: torch.randn(4, 2, generator=g),
             Recipe(steps=run.config.steps, log_every=1), name="toy", record=run.record)
run.record.write("note", resumed_from=fitted.resumed_from, python=sys.executable, omp=os.environ["OMP_WAIT_POLICY"])
""",
    """
import ipywidgets, plotly.graph_objects as go
from IPython.display import display
slider, figure = ipywidgets.IntSlider(), go.Figure(go.Scatter(y=[1, 3, 2]), layout={"title": "a </script> title"})
display({"application/vnd.jupyter.widget-view+json": {"version_major": 2, "version_minor": 0,
         "model_id": slider.model_id}, "application/vnd.plotly.v1+json": json.loads(figure.to_json()),
         "text/plain": "figure"}, raw=True)
display(slider)
(run.path / "figures" / "curve.json").write_text(figure.to_json())
""",
    """
if slug == "broken" and not Path(__file_to_mend__).exists():
    raise RuntimeError("the toy broke <here>")
""",
    """
for s in range(4):
    run.record.result("level", run.config.level + 0.01 * s, seed=s)
judgements = run.judge()
""",
]


class Toy:
    """Where the toy paper lives, and the file whose existence mends the paper "broken"."""

    def __init__(self, home: Path):
        self.home, self.mended, self.out = home, home / "mended", home / "out"
        self.setup = SETUP.format(home=str(home))
        (home / "toy_paper.py").write_text(PAPER)

    def notebook(self, slug: str, extra: str = "") -> Path:
        """notebooks/<slug>.ipynb; `extra` is a cell before the last."""
        v4 = nbformat.v4
        parameters = v4.new_code_cell('preset = "quick"\nseed = 0\noverrides = {}\nrun_dir = None')
        parameters.metadata.tags = ["parameters"]
        opening = self.setup + f"slug = {slug!r}; __file_to_mend__ = {str(self.mended)!r}"
        code = [opening, *CELLS[:-1], *([extra] if extra else []), CELLS[-1]]
        intro = v4.new_markdown_cell("# A toy\n\nThe loss is $\\frac{a}{b}$.\n\n$$\\mathcal{L} = \\sum_i x_i^2$$")
        cells = [intro, parameters, *(v4.new_code_cell(c.strip()) for c in code)]
        kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path = self.home / "notebooks" / f"{slug}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), path)
        return path


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The papers "toy" and "broken", and no others; the working folder is a folder of their own."""
    toy = Toy(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("toy", "broken"):
        sys.modules.pop("toy_paper", None)
        module = importlib.import_module("toy_paper")
        module.NOTEBOOK = f"{name}.ipynb"
        monkeypatch.setitem(sys.modules, f"workbench.papers.{name}", module)
    monkeypatch.delitem(sys.modules, "toy_paper")
    monkeypatch.setattr("workbench.papers.PAPERS", ("toy", "broken"))
    monkeypatch.setenv("WORKBENCH_OUT", str(toy.out))
    monkeypatch.setattr("workbench.runs.report.reference_root", lambda: tmp_path / "reference")
    monkeypatch.chdir(tmp_path)
    return toy
