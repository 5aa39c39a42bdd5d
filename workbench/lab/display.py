"""What a notebook cell shows: the run's parameters, figures that are also stored, and the verdicts."""

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from IPython.display import HTML, display

from workbench.config import parameters
from workbench.errors import WorkbenchError
from workbench.evaluation.claims import Judgement
from workbench.lab.figures import HEIGHT
from workbench.papers import load
from workbench.runs import folder
from workbench.runs.folder import Run

MIME = "application/vnd.plotly.v1+json"
COLOURS = {"holds": "#00733f", "does not hold": "#b3261e", "inconclusive": "#8a6100"}
# JupyterLab sets tables right-aligned and in one line; a sentence needs the opposite
_CELL = "padding:5px 12px;text-align:left;vertical-align:top;white-space:normal;border-bottom:1px solid #e0e0e0"


def small(text: str) -> str:
    """`text` (HTML) on a line of its own, smaller and grey."""
    return f"<br><span style='font-size:88%;color:#666'>{text}</span>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> HTML:
    """A plain table; every cell is HTML already, so the caller escapes what came from elsewhere."""
    head = "".join(f"<th style='{_CELL}'>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td style='{_CELL}'>{c}</td>" for c in row) + "</tr>" for row in rows)
    table = f"<table style='border-collapse:collapse;font-size:13px'><thead><tr>{head}</tr></thead>"
    return HTML(f"{table}<tbody>{body}</tbody></table>")


def plotly_bundle(figure: go.Figure) -> dict[str, Any]:
    """The display data of a figure: plotly's JSON, which JupyterLab draws and the HTML export turns into a page."""
    content = {**json.loads(figure.to_json()), "config": {"displaylogo": False, "responsive": True}}
    content["layout"].setdefault("height", HEIGHT)  # JupyterLab takes none from the template
    return {MIME: content}


def start(
    slug: str,
    preset: str = "quick",
    *,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
) -> Run:
    """Open a run (see workbench.runs.folder.start) and show its parameters; what differs from the preset is bold.

    The small presets' models are computed faster by one torch thread than by two: there it is one a process, unless
    OMP_NUM_THREADS says otherwise.
    """
    if preset in folder.SMALL_PRESETS and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    run = folder.start(slug, preset, seed=seed, overrides=overrides, run_dir=run_dir)
    paper = load(slug)
    usual = {p.name: p.default for p in parameters(paper.PRESETS[preset])}
    rows, changed = [], 0
    for p in parameters(run.config):
        value, name = html.escape(_words(p.default)), f"<code>{html.escape(p.name)}</code>"
        if p.default != usual[p.name]:
            changed += 1
            value, name = f"<b>{value}</b>{small('preset: ' + html.escape(_words(usual[p.name])))}", f"<b>{name}</b>"
        rows.append([name, value, *map(html.escape, (p.unit, p.range, p.help))])
    head = f"<b>{html.escape(paper.TITLE)}</b>, preset <b>{html.escape(preset)}</b>, seed {seed}"
    table = html_table(["parameter", "value", "unit", "range", "meaning"], rows).data
    count = f"{len(rows)} parameters, {changed} changed from the preset" if changed else f"{len(rows)} parameters"
    where = small(html.escape(str(run.path)))
    folded = f"<details><summary style='cursor:pointer'>{count}</summary>{table}</details>"
    display(HTML(f"<div>{head}{where}{folded}</div>"))
    return run


def _words(value: Any) -> str:
    return "[" + ", ".join(map(_words, value)) + "]" if isinstance(value, list | tuple) else str(value)


def show(figure: go.Figure, run: Run, name: str) -> None:
    """Display a figure and keep it as figures/<name>.json of the run, for the report. Raises WorkbenchError."""
    path = run.path / "figures" / f"{name}.json"
    if path.name != f"{name}.json":
        raise WorkbenchError(f"a figure's name is a plain file name, got {name!r}")
    try:
        path.write_text(figure.to_json())
    except OSError as error:
        raise WorkbenchError(f"cannot write {path}: {error.strerror}") from None
    display(plotly_bundle(figure), raw=True)


def claims_table(judgements: Sequence[Judgement]) -> HTML:
    """Claim · the paper's figure and source · ours with its interval · the rule · the verdict, coloured, and why."""
    rows = []
    for j in judgements:
        c = j.claim
        ours = "–" if j.interval is None else f"{j.interval} {c.unit}"
        seeds = "" if j.interval is None else small(f"{c.confidence:.0%} interval, {j.interval.n} seeds")
        verdict = f"<b style='color:{COLOURS[j.verdict]}'>{j.verdict}</b>{small(html.escape(j.why))}"
        paper = html.escape(c.paper_figure) + small(html.escape(c.source))
        rows.append([html.escape(c.sentence), paper, html.escape(ours) + seeds, html.escape(c.rule), verdict])
    return html_table(["claim", "the paper's figure", "ours ± interval", "holds if", "verdict"], rows)


def finish(run: Run) -> list[Judgement]:
    """Judge the claims from the stored metrics, write claims.json, and show the verdicts and how they are made."""
    judgements = run.judge()
    title = html.escape(load(run.slug).TITLE)
    how = (
        "A claim <b>holds</b> when the whole interval of the mean over seeds lies on the right side of a margin fixed "
        "beforehand, <b>does not hold</b> when all of it lies on the wrong side; an interval across the margin, or too "
        f"few seeds, is <b>inconclusive</b>. Computed from {html.escape(str(run.record.metrics))}"
    )
    display(
        HTML(f"<div><b>{title}</b>, preset {html.escape(run.preset)}{claims_table(judgements).data}{small(how)}</div>")
    )
    return judgements
