"""Verdict tables and the HTML report, all from what run folders store; and the small reference runs kept in git."""

import json
import math
import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from rich import box
from rich.markup import escape
from rich.table import Table

from workbench import papers
from workbench.errors import WorkbenchError
from workbench.evaluation.claims import Claim
from workbench.evaluation.intervals import Interval
from workbench.runs import folder
from workbench.training.record import read_records

KEPT_BYTES = 150_000  # of step records in a reference run: enough for its curves, small enough for git
COLOURS = {"holds": "green", "does not hold": "red", "inconclusive": "yellow"}


@dataclass(frozen=True)
class Row:
    """One claim of one run, as tables show it."""

    sentence: str
    source: str
    paper_figure: str
    ours: str
    verdict: str
    why: str
    margin: str


@dataclass(frozen=True)
class RunView:
    """A run folder as the report sees it. state: done, failed, interrupted, unfinished, damaged."""

    path: Path
    slug: str
    preset: str
    seed: int
    state: str
    seconds: float | None
    error: str
    rows: list[Row]
    reference: bool

    @property
    def id(self) -> str:
        return "reference" if self.reference else self.path.name

    @property
    def title(self) -> str:
        return papers.load(self.slug).TITLE if self.slug in papers.PAPERS else self.slug

    @property
    def summary(self) -> str:
        """How many claims have which verdict: "9 holds, 5 inconclusive"; empty where nothing was judged."""
        counts = {v: sum(row.verdict == v for row in self.rows) for v in COLOURS}
        return ", ".join(f"{n} {v}" for v, n in counts.items() if n)


def _json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return default
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise WorkbenchError(f"{path} is damaged; remove the run, or run it anew") from None


def _row(judged: dict[str, Any]) -> Row:
    claim, stored = Claim(**judged["claim"]), judged["interval"]
    ours = "–"
    if stored:
        # an end without bound is stored as null
        low, high = (bound if stored[k] is None else stored[k] for k, bound in (("low", -math.inf), ("high", math.inf)))
        ours = f"{Interval(stored['mean'], low, high, stored['n'])} {claim.unit}".strip()
    return Row(claim.sentence, claim.source, claim.paper_figure, ours, judged["verdict"], judged["why"], claim.rule)


def read(path: Path, *, reference: bool = False) -> RunView:
    """A run folder's settings, state and verdicts. Raises WorkbenchError where a file is missing or damaged."""
    config = folder.read_config(path)
    if missing := {"slug", "preset", "seed"} - config.keys():
        raise WorkbenchError(
            f"{path / 'config.json'} lacks {', '.join(sorted(missing))}; remove the run, or run it anew"
        )
    claims = _json(path / "claims.json", [])
    ended = _json(path / "run.json", {"state": "done" if claims else "unfinished", "seconds": None})
    error = (path / "error.txt").read_text() if (path / "error.txt").exists() else ""
    try:
        rows = [_row(c) for c in claims]
    except (KeyError, TypeError):
        raise WorkbenchError(f"{path / 'claims.json'} is of another version; run the notebook anew") from None
    return RunView(
        path, config["slug"], config["preset"], config["seed"], ended["state"], ended["seconds"], error,
        rows, reference,
    )  # fmt: skip


def reference_root() -> Path:
    """outputs/reference of the checkout (not of $WORKBENCH_OUT): what is committed."""
    return Path(__file__).resolve().parents[2] / "outputs" / "reference"


def references(root: Path | None = None) -> list[RunView]:
    """The committed reference runs, in the papers' order."""
    root = root or reference_root()
    found = [read(p.parent, reference=True) for p in sorted(root.glob("*/config.json"))]
    return sorted(found, key=_order)


def latest(root: Path) -> list[RunView]:
    """The latest run of each paper and preset under root/runs (run ids sort by time)."""
    newest: dict[tuple[str, str], RunView] = {}
    for config in sorted(root.glob("runs/*/*/config.json")):
        path = config.parent
        try:
            view = read(path)
        except WorkbenchError as error:  # one damaged run must not cost the report of the others
            view = RunView(path, path.parent.name, path.name, 0, "damaged", None, str(error), [], False)
        newest[view.slug, view.preset] = view
    return sorted(newest.values(), key=_order)


def _order(view: RunView) -> tuple[int, str, str]:
    known = papers.PAPERS.index(view.slug) if view.slug in papers.PAPERS else len(papers.PAPERS)
    return known, view.slug, view.preset


def find_run(name: str, root: Path) -> Path:
    """A run folder by path or by run id (also its beginning, where only one begins so). Raises WorkbenchError."""
    if (Path(name) / "config.json").exists():
        return Path(name).resolve()
    if os.sep in name:
        raise WorkbenchError(f"{name} is not a run folder: it has no config.json")
    found = [p.parent for p in sorted(root.glob("runs/*/*/config.json")) if p.parent.name.startswith(name)]
    if len(found) != 1:
        ids = f"matches {', '.join(p.name for p in found)}" if found else f"no such run under {root / 'runs'}"
        raise WorkbenchError(f"run {name!r}: {ids}; give a run id or the run's folder")
    return found[0]


def table(views: Sequence[RunView]) -> Table:
    """The verdicts for a terminal: paper, seconds and counts, then verdict · ours ± interval · claim a row."""
    head = ("verdict", "ours ± interval", "claim [dim](the paper's figure; why undecided)[/]")
    out = Table(*head, title="Verdicts", title_justify="left", box=box.SIMPLE)
    for view in views:
        seconds = f", {view.seconds:.0f} s" if view.seconds is not None else ""
        what = view.summary or f"[red]{view.state}[/]: no verdicts"
        out.add_section()
        out.add_row("", "", f"[bold]{view.slug} {view.preset}[/]{seconds}: {what}")
        for row in view.rows:
            colour, why = COLOURS[row.verdict], f"; {row.why}" if row.verdict == "inconclusive" else ""
            claim = f"{escape(row.sentence)} [dim]({escape(row.paper_figure + why)})[/]"
            out.add_row(f"[{colour}]{row.verdict}[/]", escape(row.ours), claim)
    return out


def markdown(views: Iterable[RunView]) -> str:
    """The verdicts as the README's table; the margin stands with the claim, so that a reader can judge the judge."""
    lines = ["| paper | claim | paper's figure | ours ± interval | margin | verdict |", "|---|---|---|---|---|---|"]
    for view in views:
        for row in view.rows:
            cells = (
                f"{view.slug} ({view.preset})", f"{row.sentence} ({row.source})", row.paper_figure, row.ours,
                row.margin,
                f"**{row.verdict}**" + (f": {row.why}" if row.verdict == "inconclusive" else ""),
            )  # fmt: skip
            lines.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _figures(view: RunView) -> list[dict[str, str]]:
    """Name and plotly JSON of a run's stored figures, in the order they were made."""
    paths = sorted((view.path / "figures").glob("*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    # "</" would end the script element that holds the JSON
    return [{"name": p.stem.replace("_", " "), "json": p.read_text().replace("</", "<\\/")} for p in paths]


def write(views: Sequence[RunView], page: Path) -> Path:
    """Write the HTML report: one file, readable from file:// with no network. Returns its path."""
    from workbench.runs.html import plotly_script  # nbconvert's schemas take seconds, which a listing need not wait for

    page.parent.mkdir(parents=True, exist_ok=True)
    links = {
        v.path: {
            name: os.path.relpath(v.path / name, page.parent)
            for name in ("notebook.html", "metrics.jsonl", "config.json", "error.txt")
            if (v.path / name).exists()
        }
        for v in views
    }
    figures = {v.path: _figures(v) for v in views}
    environment = Environment(loader=PackageLoader("workbench.runs", "."), autoescape=True)
    text = environment.get_template("report.html.j2").render(
        views=views, links=links, figures=figures, plotly=plotly_script() if any(figures.values()) else ""
    )
    page.write_text(text)
    return page


def command(path: Path) -> str:
    """The command that makes this run again."""
    slug, preset, seed, changes = folder.settings(path)
    words = ["workbench", "run", slug, "--preset", preset, "--seed", str(seed)]
    for name, value in changes.items():
        words += ["-p", f"{name}={json.dumps(value)}"]
    return shlex.join(words)


def keep(path: Path, root: Path | None = None) -> Path:
    """Copy a judged run's config, verdicts, results and thinned curves to outputs/reference/<slug>/, to be committed.

    Raises WorkbenchError where the run was not judged.
    """
    if not (path / "claims.json").exists():
        raise WorkbenchError(f"{path} has no claims.json: let the run finish first")
    again = command(path)
    records = list(read_records(path / "metrics.jsonl"))
    steps: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        if r["kind"] == "step":
            steps.setdefault(r["training"], []).append(r)
    stride = 1
    while True:
        # each training's last step stays, whatever the stride
        thin = {id(r) for rows in steps.values() for r in (*rows[::stride], rows[-1])}
        if sum(len(json.dumps(r)) for r in records if id(r) in thin) <= KEPT_BYTES or all(
            stride >= len(rows) for rows in steps.values()
        ):
            break
        stride *= 2
    out = (root or reference_root()) / folder.read_config(path)["slug"]
    out.mkdir(parents=True, exist_ok=True)
    kept = [r for r in records if r["kind"] in ("result", "note") or id(r) in thin]
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    for name in ("config.json", "claims.json", "run.json"):
        if (path / name).exists():
            shutil.copyfile(path / name, out / name)
    (out / "command.txt").write_text(again + "\n")
    return out
