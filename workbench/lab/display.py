"""What a notebook cell shows: the run's parameters, figures that are also stored, a live loss curve, the verdicts."""

import html
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from IPython.display import HTML, display

from workbench.config import parameters
from workbench.evaluation.claims import Judgement
from workbench.lab import figures
from workbench.papers import load
from workbench.runs import folder
from workbench.runs.folder import Run

COLOURS = {"holds": "#00733f", "does not hold": "#b3261e", "inconclusive": "#8a6100"}
_CELL = "padding:4px 12px;text-align:left;vertical-align:top;white-space:normal"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> HTML:
    """A plain table; every cell is HTML already, so the caller escapes what came from elsewhere."""
    head = "".join(f"<th style='{_CELL}'>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td style='{_CELL}'>{c}</td>" for c in row) + "</tr>" for row in rows)
    return HTML(f"<table style='border-collapse:collapse'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def plotly_bundle(figure: go.Figure) -> dict[str, Any]:
    """The display data of a figure: plotly's JSON, which JupyterLab draws and the HTML export turns into a page."""
    content = {**json.loads(figure.to_json()), "config": {"displaylogo": False, "responsive": True}}
    return {"application/vnd.plotly.v1+json": content}


def start(
    slug: str,
    preset: str = "quick",
    *,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
) -> Run:
    """Open a run (see workbench.runs.folder.start) and show its parameters; what differs from the preset is bold."""
    run = folder.start(slug, preset, seed=seed, overrides=overrides, run_dir=run_dir)
    rows = []
    for p in parameters(run.config):
        value = html.escape(str(p.default))
        name = f"<code>{p.name}</code>"
        if overrides and p.name in overrides:
            value, name = f"<b>{value}</b>", f"<b>{name}</b>"
        rows.append([name, value, html.escape(p.unit), html.escape(p.range), html.escape(p.help)])
    print(f"{load(slug).TITLE} · preset {preset} · seed {seed}\n{run.path}")
    display(html_table(["parameter", "value", "unit", "range", "meaning"], rows))
    return run


def show(figure: go.Figure, run: Run, name: str) -> None:
    """Display a figure and keep it in the run's figures/ for the report."""
    (run.path / "figures" / f"{name}.json").write_text(figure.to_json())
    display(plotly_bundle(figure), raw=True)


def live_loss(
    keys: Sequence[str] = ("loss",), *, title: str = "while training", y: str = "loss", log_y: bool = False
) -> Callable[[int, Mapping[str, Any]], None]:
    """A callback for `fit(on_step=...)`: one curve, redrawn in place at most twice a second, its last state stays."""
    curves: dict[str, tuple[list[float], list[float]]] = {key: ([], []) for key in keys}
    handle = display({"text/plain": title}, raw=True, display_id=True)
    drawn = 0.0

    def on_step(step: int, logged: Mapping[str, Any]) -> None:
        nonlocal drawn
        for key, (xs, ys) in curves.items():
            if key in logged:
                value = logged[key]
                ys.append(sum(value) / len(value) if isinstance(value, list) else value)
                xs.append(step)
        if handle is not None and time.monotonic() - drawn > 0.5:
            drawn = time.monotonic()
            figure = figures.lines(curves, title=title, x="step", y=y, log_y=log_y, markers=False)
            handle.update(plotly_bundle(figure), raw=True)

    return on_step


def claims_table(judgements: Sequence[Judgement]) -> HTML:
    """Claim · the paper's figure · ours with its interval · the margin · the verdict, coloured, and why."""
    rows = []
    for j in judgements:
        c = j.claim
        ours = "–" if j.interval is None else f"{j.interval} {c.unit}"
        verdict = f"<b style='color:{COLOURS[j.verdict]}'>{j.verdict}</b><br><small>{html.escape(j.why)}</small>"
        margin = f"{'≥' if c.direction == '>=' else '≤'} {c.margin:g} {c.unit}"
        source = f"{html.escape(c.paper_figure)}<br><small>{html.escape(c.source)}</small>"
        rows.append([html.escape(c.sentence), source, html.escape(ours), html.escape(margin), verdict])
    return html_table(["claim", "the paper", "ours ± 95 % interval", "holds if", "verdict"], rows)


def finish(run: Run) -> list[Judgement]:
    """Judge the claims from the stored metrics, write claims.json, and show the verdicts."""
    judgements = run.judge()
    display(claims_table(judgements))
    print(f"{len(judgements)} claims judged from {run.record.metrics}")
    return judgements
