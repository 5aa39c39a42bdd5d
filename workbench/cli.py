"""The command `workbench`: list, show, run, resume, report, keep, bench. An error is one line and a non-zero exit."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from workbench.errors import WorkbenchError

# torch, papermill and the papers are imported inside the commands: --help stays instant
if TYPE_CHECKING:
    from workbench.runs.execute import Job


class _OneLineErrors(TyperGroup):
    """Tells usage errors and WorkbenchError in one line on stderr instead of a panel or a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except WorkbenchError as error:
            message, code = str(error), 2
        except OSError as error:
            message, code = f"{error.filename or 'the system'}: {error.strerror or error}", 1
        except Exception as error:
            if not hasattr(error, "format_message"):  # the usage errors of typer's command-line parser have it
                raise
            message, code = error.format_message() or "nothing to do (try: workbench --help)", 2
        else:
            sys.exit(code if isinstance(code, int) else 0)
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(code)


app = typer.Typer(
    cls=_OneLineErrors,
    help="Run papers on pre-training and distillation as notebooks, and judge their claims.",
    epilog="Start with: workbench list, then workbench show SLUG, then workbench run SLUG.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the outputs instead of $WORKBENCH_OUT or outputs/ (runs go to OUT/runs/SLUG/ID)."),
]


def _root(out: Path | None) -> Path:
    from workbench.runs.folder import outputs_root

    return out.resolve() if out else outputs_root()


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
def list_papers(out: Out = None) -> None:
    """The papers, their presets, and the verdicts of their latest runs."""
    from workbench import papers
    from workbench.runs import report

    verdicts: dict[str, list[str]] = {}
    for view in [*report.references(), *report.latest(_root(out))]:
        verdicts.setdefault(view.slug, []).append(f"{view.preset} ({view.id}): {view.summary or view.state}")
    table = Table("paper", "title", "presets", "verdicts", show_lines=True)
    for slug in papers.PAPERS:
        paper = papers.load(slug)
        table.add_row(
            slug, escape(paper.TITLE), ", ".join(paper.PRESETS), "\n".join(verdicts.get(slug, ["no run yet"]))
        )
    Console().print(table)


@app.command()
def show(slug: Annotated[str, typer.Argument(metavar="SLUG", help="A paper, as `workbench list` names it.")]) -> None:
    """What a paper claims here, its presets, and every parameter with type, unit, range and default."""
    from workbench import papers
    from workbench.config import parameters

    paper = papers.load(slug)
    console = Console()
    console.print(escape(paper.TITLE), style="bold", highlight=False)
    console.print(f"{paper.AUTHORS}, arXiv {paper.ARXIV}\n{paper.ABOUT}\n", highlight=False, markup=False)
    claims = Table("claim", "paper's figure", "source", "holds here when", title="Claims", title_justify="left")
    for c in paper.CLAIMS:
        rule = f"{c.rule}, {c.confidence:.0%} interval, {c.min_seeds}+ seeds"
        claims.add_row(*map(escape, (c.sentence, c.paper_figure, c.source, rule)))
    console.print(claims)
    presets = {name: parameters(values) for name, values in paper.PRESETS.items()}
    table = Table("parameter", "type", "unit", "range", *presets, "meaning", title="Parameters", title_justify="left")
    for rows in zip(*presets.values(), strict=True):
        p = rows[0]
        table.add_row(*map(escape, (p.name, p.type, p.unit, p.range, *(_brief(r.default) for r in rows), p.help)))
    console.print(table)
    console.print(f"Change one with: workbench run {slug} -p {presets[next(iter(presets))][0].name}=VALUE", style="dim")


def _brief(value: Any) -> str:
    return "[" + ", ".join(map(_brief, value)) + "]" if isinstance(value, list | tuple) else str(value)


def _for_each(slugs: list[str], assignments: list[str]) -> dict[str, dict[str, Any]]:
    """The -p values of each paper: `name=value` goes to all of them, `slug.name=value` to one."""
    from workbench.config import parse_assignments

    changes: dict[str, dict[str, Any]] = {slug: {} for slug in slugs}
    parsed = parse_assignments(assignments)
    # plain names first, so that what is addressed to one paper wins wherever it stands
    for name, value in sorted(parsed.items(), key=lambda item: "." in item[0]):
        slug, dot, own = name.rpartition(".")
        if dot and slug not in changes:
            raise WorkbenchError(f"-p {name}: {slug!r} is none of the papers to run ({', '.join(slugs)})")
        for target in [slug] if dot else slugs:
            changes[target][own if dot else name] = value
    return changes


@app.command()
def run(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="SLUG", help="Papers; all when left out.")] = None,
    preset: Annotated[
        str, typer.Option(help="quick (two CPU cores), desk (judges the claims) or full (GPU).")
    ] = "quick",
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--parameter", metavar="NAME=VALUE", help="One parameter, as YAML; SLUG.NAME=VALUE for one."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed; a preset's further seeds follow from it.")] = 0,
    out: Out = None,
    jobs: Annotated[int, typer.Option(min=1, help="Papers to run at a time.")] = 1,
) -> None:
    """Run papers' notebooks, judge their claims, write the HTML report. All settings are checked before any starts."""
    from workbench import papers

    chosen = list(dict.fromkeys(slugs or papers.PAPERS))
    for slug in chosen:
        papers.load(slug)
    changes = _for_each(chosen, parameter or [])
    from workbench.runs import execute

    prepared = []
    for slug in chosen:
        try:
            prepared.append(execute.prepare(slug, preset, seed, changes[slug], root=_root(out)))
        except WorkbenchError as error:
            hint = f"; address one paper with -p {slug}.NAME=VALUE" if len(chosen) > 1 and parameter else ""
            raise WorkbenchError(f"{slug}: {error}{hint}" if len(chosen) > 1 else str(error)) from None
    _finish(prepared, jobs, _root(out))


@app.command()
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run id (or its beginning), or a run's folder.")],
    out: Out = None,
) -> None:
    """Go on with a run that was killed or failed: same folder, same settings, trainings from their checkpoints."""
    from workbench.runs import execute, report

    job = execute.prepare_resume(report.find_run(run, _root(out)))
    # root/runs/slug/id: the report belongs to the outputs the run belongs to
    root = job.path.parents[2] if job.path.parents[1].name == "runs" else _root(out)
    _finish([job], 1, root)


def _finish(jobs: "list[Job]", workers: int, root: Path) -> None:
    """Execute, then the verdicts of these runs and the report of all; exits with 1 where a paper failed."""
    from workbench.runs import execute, report

    console = Console()
    fine = execute.run(jobs, workers=workers, console=console)
    views = [report.read(job.path) for job in jobs if (job.path / "config.json").exists()]
    if views:
        console.print(report.table(views))
        page = report.write([*report.latest(root), *report.references()], root / "report.html")
        console.print(f"report: {page}", soft_wrap=True, highlight=False)
    if not fine:
        raise typer.Exit(130 if any(job.state == "interrupted" for job in jobs) else 1)


@app.command("report")
def make_report(
    out: Out = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the README's table of reference verdicts.")
    ] = False,
) -> None:
    """Write OUT/report.html from the latest run of each paper and preset, beside the committed reference runs."""
    from workbench.runs import report

    if markdown:
        print(report.markdown(report.references()), end="")
        return
    views = [*report.latest(_root(out)), *report.references()]
    console = Console()
    if views:
        console.print(report.table(views))
    console.print(f"report: {report.write(views, _root(out) / 'report.html')}", soft_wrap=True, highlight=False)


@app.command()
def keep(run: Annotated[str, typer.Argument(metavar="RUN", help="A run id or folder.")], out: Out = None) -> None:
    """Copy a judged run's settings, verdicts and thinned metrics to outputs/reference/SLUG, to be committed."""
    from workbench.runs import report

    print(report.keep(report.find_run(run, _root(out))))


@app.command()
def bench(
    name: Annotated[
        str | None, typer.Argument(help="A kernel or a paper with a benchmark; lists them when left out.")
    ] = None,
    out: Out = None,
) -> None:
    """Measure a kernel or a paper's cost on this machine; results go to OUT/bench/NAME."""
    import importlib

    from workbench import papers

    kernels = sorted(p.stem[6:] for p in (Path(__file__).parent / "kernels").glob("bench_*.py"))
    if name in kernels:
        module = importlib.import_module(f"workbench.kernels.bench_{name}")
    elif name in papers.PAPERS and hasattr(papers.load(name), "bench"):
        module = papers.load(name)
    else:
        names = [*kernels, *(slug for slug in papers.PAPERS if hasattr(papers.load(slug), "bench"))]
        if name is None:
            print("\n".join(names))
            return
        raise WorkbenchError(f"no benchmark {name!r}: choose from {', '.join(names)}")
    folder = _root(out) / "bench" / name
    folder.mkdir(parents=True, exist_ok=True)
    module.bench(folder)
    print(folder)


if __name__ == "__main__":
    app()
