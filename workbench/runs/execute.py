"""Execute notebooks through papermill, several at a time if asked, with a bar for the whole and one for each paper."""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import papermill
import zmq
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.log import logger
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from traitlets import default

from workbench.errors import WorkbenchError
from workbench.runs import folder, html

State = Literal["waiting", "running", "done", "failed", "interrupted"]

# torch with two threads is five times slower beside another busy process unless its threads yield while they wait
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MPLBACKEND": "agg",
    "PLOTLY_RENDERER": "plotly_mimetype",
    "TOKENIZERS_PARALLELISM": "false",
}


class Stopped(Exception):
    """The user pressed Ctrl-C."""


@dataclass
class Job:
    """One paper's notebook on its way through papermill, into the run folder `path`."""

    slug: str
    preset: str
    seed: int
    overrides: Mapping[str, Any]
    path: Path
    notebook: Path
    threads: int | None = None  # torch's, where several papers run at a time
    state: State = "waiting"
    cells: int = 0
    cells_done: int = 0
    seconds: float = 0.0  # all sittings together
    error: str = ""  # one line, or the last lines of a traceback
    stop: threading.Event = field(default_factory=threading.Event)
    cell_since: float = 0.0  # when the running cell began, as time.time()
    client: PapermillNotebookClient | None = None

    def training(self) -> str:
        """What the running cell says it is at: "teacher 120/400", or nothing."""
        try:
            at = json.loads((self.path / "progress.json").read_text())
            return f"{at['text']} {at['done']}/{at['total']}" if at["time"] >= self.cell_since else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the kernel, which runs in a session of its own and does not see the terminal's Ctrl-C."""
        self.stop.set()
        provisioner = getattr(getattr(self.client, "km", None), "provisioner", None)
        if pid := getattr(provisioner, "pid", None):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass


class ThisPython(AsyncKernelManager):
    """Starts kernels with the running interpreter, whatever kernelspecs are installed on the machine."""

    environment = _ENVIRONMENT

    @default("transport_encryption")
    def _encrypt(self) -> str:
        # a notebook's code does not go over a shared machine's loopback in plain text, nor does the kernel warn of it
        return "auto" if zmq.has("curve") else "disabled"

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        missing = {k: v for k, v in self.environment.items() if k not in os.environ}
        able = {"supported_encryption": ["curve"]}
        return KernelSpec(argv=argv, env=missing, display_name="Python 3", language="python", metadata=able)


class _Engine(Engine):
    """Papermill's own client on our kernel manager; counts cells into the job, stores no widget state (megabytes)."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=120, job=None, **kwargs):  # type: ignore[no-untyped-def]
        job.cells, job.cells_done = len(nb_man.nb.cells), 0
        start, complete = nb_man.cell_start, nb_man.cell_complete

        def cell_start(*args, **options):  # type: ignore[no-untyped-def]
            if job.stop.is_set():
                raise Stopped
            job.cell_since = time.time()
            return start(*args, **options)

        def cell_complete(*args, **options):  # type: ignore[no-untyped-def]
            job.cells_done += 1
            return complete(*args, **options)

        nb_man.cell_start, nb_man.cell_complete = cell_start, cell_complete
        threads = {"OMP_NUM_THREADS": str(job.threads)} if job.threads else {}
        manager = type("Manager", (ThisPython,), {"environment": {**_ENVIRONMENT, **threads}})
        job.client = PapermillNotebookClient(
            nb_man, kernel_name=kernel_name, kernel_manager_class=manager, startup_timeout=start_timeout,
            timeout=None, store_widget_state=False, log=logger,
        )  # fmt: skip
        return job.client.execute()


papermill_engines.register("workbench", _Engine)


def prepare(
    slug: str,
    preset: str,
    seed: int,
    overrides: Mapping[str, Any],
    *,
    root: Path | None = None,
    path: Path | None = None,
) -> Job:
    """A job whose settings and notebook were checked; nothing is written yet. Raises WorkbenchError."""
    folder.check(slug, preset, seed, overrides)
    notebook = folder.notebook_path(slug)
    return Job(slug, preset, seed, dict(overrides), path or folder.new_run_path(slug, root), notebook)


def prepare_resume(path: Path) -> Job:
    """The job that goes on in an existing run folder, with the settings stored there. Raises WorkbenchError."""
    slug, preset, seed, changes = folder.settings(path)
    job = prepare(slug, preset, seed, changes, path=path.resolve())
    if (path / "run.json").exists():
        job.seconds = json.loads((path / "run.json").read_text()).get("seconds", 0.0)
    return job


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _execute(job: Job) -> None:
    """Run one job to whatever end; leaves notebook.ipynb, notebook.html, run.json and perhaps error.txt."""
    started, before = time.perf_counter(), job.seconds
    if job.stop.is_set():
        job.state = "interrupted"
        return
    job.state = "running"
    output = job.path / "notebook.ipynb"
    whole = ""
    try:
        folder.start(job.slug, job.preset, seed=job.seed, overrides=job.overrides, run_dir=job.path)
        (job.path / "error.txt").unlink(missing_ok=True)
        values = {"preset": job.preset, "seed": job.seed, "overrides": dict(job.overrides), "run_dir": str(job.path)}
        papermill.execute_notebook(
            job.notebook, output, values, engine_name="workbench", kernel_name="python3", progress_bar=False, job=job
        )
        job.state = "done"
    except PapermillExecutionError as error:
        whole = _plain("\n".join(error.traceback))
        one_line = f"{error.ename}: {_plain(error.evalue).strip()}"
        own = error.ename in ("WorkbenchError", "CheckpointError", "NonFiniteError")
        where = f"cell {error.exec_count}: "
        job.error = where + one_line if own else where + "\n".join([one_line, *whole.splitlines()[-8:]])
        job.state = "interrupted" if error.ename == "KeyboardInterrupt" or job.stop.is_set() else "failed"
    except WorkbenchError as error:
        whole = job.error = str(error)
        job.state = "failed"
    except Exception as error:  # a dead kernel, a full disk: the other papers still run
        whole = traceback.format_exc()
        job.error = f"{type(error).__name__}: {str(error).strip()}"
        job.state = "interrupted" if job.stop.is_set() else "failed"
    job.seconds = before + time.perf_counter() - started
    try:
        if output.exists():
            html.export(output, job.path / "notebook.html", f"{job.slug} ({job.preset})")
        if whole and job.state == "failed":
            (job.path / "error.txt").write_text(whole + "\n")
        folder.write_json(job.path / "run.json", {"state": job.state, "seconds": round(job.seconds, 1)})
    except Exception as error:  # told, but the results are in metrics.jsonl and claims.json already
        job.error += f"\ncannot finish {job.path}: {type(error).__name__}: {error}"
        job.state = "failed" if job.state == "done" else job.state


def _watch(futures: list[Future[None]], jobs: list[Job], console: Console) -> None:
    """Draw the bars until every job has ended; without a terminal, a line at each start, end and half minute."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(), TextColumn("[dim]{task.fields[detail]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        whole = progress.add_task("[bold]all papers", total=len(jobs), count=f"0/{len(jobs)}", detail="")
        bars: dict[int, TaskID] = {
            n: progress.add_task(f"{j.slug} {j.preset}", total=None, start=False, count="", detail="waiting")
            for n, j in enumerate(jobs)
        }
        told: dict[int, tuple[State, float]] = {n: ("waiting", 0.0) for n in bars}
        while True:
            pending = wait(futures, timeout=0.25).not_done
            ended = sum(j.state not in ("waiting", "running") for j in jobs)
            share = sum(j.cells_done / j.cells for j in jobs if j.state == "running" and j.cells)
            progress.update(whole, completed=ended + share, count=f"{ended}/{len(jobs)} papers")
            for n, j in enumerate(jobs):
                state, at = told[n]
                count = f"cell {min(j.cells_done + 1, j.cells)}/{j.cells}" if j.cells else ""
                if j.state == "running":
                    progress.start_task(bars[n])
                    detail = j.training() or "starting the kernel" * (not j.cells)
                    progress.update(bars[n], completed=j.cells_done, total=j.cells or None, count=count, detail=detail)
                elif j.state != "waiting" and state != j.state:
                    progress.update(bars[n], completed=j.cells_done, count=j.state, detail="")
                    progress.stop_task(bars[n])
                if j.state != state:
                    told[n] = (j.state, time.monotonic())
                    if j.state == "running":
                        console.print(f"{j.slug} {j.preset}: running in {j.path}", soft_wrap=True, highlight=False)
                    else:
                        console.print(f"{j.slug} {j.preset}: {j.state} after {j.seconds:.0f} s", highlight=False)
                elif j.state == "running" and not console.is_terminal and time.monotonic() - at > 30:
                    told[n] = (j.state, time.monotonic())
                    console.print(f"{j.slug} {j.preset}: {count} {escape(j.training())}".rstrip(), highlight=False)
            if not pending:
                return


def run(jobs: list[Job], *, workers: int = 1, console: Console | None = None) -> bool:
    """Execute the jobs, `workers` at a time; a failing one does not stop the others. True when all are done.

    Each job's state, seconds and error are set. Ctrl-C interrupts the kernels, keeps the partial notebooks and returns.
    """
    console = console or Console()
    if workers > 1:
        for job in jobs:
            # a small preset takes one thread alone as well as beside others: its figures do not depend on `workers`
            small = job.preset in folder.SMALL_PRESETS
            job.threads = 1 if small else max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [pool.submit(_execute, job) for job in jobs]
        try:
            _watch(futures, jobs, console)
        except KeyboardInterrupt:
            for number, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 30)):
                for job in jobs:
                    if job.state in ("waiting", "running"):
                        job.kill(number)
                try:
                    if not wait(futures, timeout=patience).not_done:
                        break
                except KeyboardInterrupt:
                    continue  # pressed again: do not wait any longer
    for future in futures:
        if future.done():
            future.result()  # a mistake of this file's own must not pass in silence
    for job in jobs:
        if job.state == "failed":
            console.print(f"[red]{job.slug} failed in {escape(job.error)}", soft_wrap=True, highlight=False)
            console.print(f"  whole traceback: {job.path / 'error.txt'}", soft_wrap=True, highlight=False)
        elif job.state == "interrupted" and (job.path / "config.json").exists():
            console.print(f"{job.slug} was interrupted; go on with: workbench resume {job.path}", soft_wrap=True)
    return all(job.state == "done" for job in jobs)
