"""Notebooks in a real JupyterLab in headless Chromium: run all, move a slider, the figure's data changes.

WORKBENCH_SCREENSHOTS=DIR keeps pictures. WORKBENCH_BROWSER_RUNS=DIR (an outputs/runs) gives the papers' notebooks a
finished run, DIR/<slug>/<run-id>, to load their trainings from; without it they run the quick preset.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from workbench import papers
from workbench.runs import folder

PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
QUIET = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
    "@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosave": False},
}  # fmt: skip
TINY = """
import ipywidgets as widgets
from workbench.errors import WorkbenchError
from workbench.lab import explore, figures, live_loss
def draw(power, shift):
    if shift > 2:
        raise WorkbenchError("shift is at most 2 <here>")
    print("drawn")
    curve = [1, 2, 3], [x**power + shift for x in (1, 2, 3)]
    return figures.lines({"curve": curve}, title=f"power {power}", x="x", y="y")
explore(draw, {"power": widgets.IntSlider(1, 1, 4, description="power"),
               "shift": widgets.IntSlider(2, 0, 9, description="shift")}, title="Powers <of> x")
"""
LIVE = """
callback = live_loss(["loss"], title="live", y="loss (nats)")
for step in range(1, 41):
    callback(step, {"loss": 1 / step})
"""

pytestmark = pytest.mark.browser


def chromium() -> str | None:
    """The browser: $PLAYWRIGHT_CHROMIUM, or the first that PATH holds."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("PLAYWRIGHT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of playwright's, or a skip that says what is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser test")
    path = chromium()
    if not path:
        pytest.skip("no chromium on PATH and PLAYWRIGHT_CHROMIUM is not set: no browser test")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield running
        running.close()


class Lab:
    """A JupyterLab server of its own, with settings, trust and outputs under `home`; notebooks lie in home/work."""

    def __init__(self, home: Path):
        self.work = home / "work"
        self.work.mkdir(parents=True)
        for name, values in QUIET.items():
            path = home / "settings" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.token, self.url, self.log = secrets.token_hex(16), f"http://127.0.0.1:{port}", home / "lab.log"
        own = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "WORKBENCH_OUT": "out",
               "JUPYTER_DATA_DIR": "data", "JUPYTER_CONFIG_DIR": "config", "IPYTHONDIR": "ipython"}  # fmt: skip
        environment = {**os.environ, **{k: str(home / v) for k, v in own.items()}, "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
                   "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                   f"--ServerApp.root_dir={self.work}", f"--IdentityProvider.token={self.token}"]  # fmt: skip
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self, seconds: float = 120) -> "Lab":
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, f"JupyterLab ended:\n{self.log.read_text()[-3000:]}"
            try:
                with urllib.request.urlopen(f"{self.url}/api/status?token={self.token}", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"JupyterLab did not answer in {seconds} s:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()  # ends its kernels too
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = Lab(tmp_path_factory.mktemp("lab"))
    try:
        yield server.wait()
    finally:
        server.stop()


STATE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  if (!panel?.sessionContext?.isReady || !panel.content?.widgets) return {ready: false};
  const models = panel.content.widgets.map(c => c.model.sharedModel);
  const cells = models.filter(c => c.cell_type == 'code' && c.source.trim());
  const outputs = cells.flatMap(c => c.outputs);
  return {
    ready: true,
    status: panel.sessionContext.session?.kernel?.status,
    done: cells.filter(c => c.execution_count && c.executionState != 'running').length,
    all: cells.length,
    errors: outputs.filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue),
  };
}"""
# every panel of explore: its sliders and what its figure holds
PANELS = """() => [...document.querySelectorAll('.jp-OutputArea-output .widget-vbox')].filter(
  box => box.querySelector('.widget-output')).map((box, i) => {
  box.dataset.panel = i;
  const plot = box.querySelector('.js-plotly-plot');
  const {template, width, height, ...layout} = plot?.layout ?? {};
  return {
    sliders: box.querySelectorAll('.noUi-handle').length,
    figure: plot?.data ? JSON.stringify([plot.data, layout.title, layout.annotations, layout.shapes]) : null,
    message: box.innerText,
  };
})"""


class Page:
    """One notebook open in the browser."""

    def __init__(self, browser: Any, lab: Lab, name: str):
        self.name, self.lab = name, lab
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.outside: list[str] = []
        self.page.on(
            "request",
            lambda r: r.url.startswith(("http", "ws")) and lab.url not in r.url and self.outside.append(r.url),
        )
        self.page.goto(f"{lab.url}/lab/tree/{name}?token={lab.token}&reset")
        self.page.wait_for_function(f"() => ({STATE})().ready", timeout=120_000)
        select = self.page.locator(".jp-Dialog button.jp-mod-accept")  # "Select Kernel", where it asks
        if select.count():
            select.first.click()

    def command(self, name: str) -> None:
        self.page.evaluate("name => window.jupyterapp.commands.execute(name)", name)

    def run_all(self, seconds: float) -> None:
        """Run → Run All Cells by the menu, then wait until every cell is done; fails at the first error output."""
        self.page.wait_for_function(f"() => ({STATE})().status == 'idle'", timeout=120_000)
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.finished(seconds)

    def finished(self, seconds: float) -> None:
        done = f"() => {{ const s = ({STATE})(); return s.errors?.length || (s.done == s.all && s.status == 'idle') }}"
        self.page.wait_for_function(done, timeout=seconds * 1000, polling=250)
        state = self.page.evaluate(STATE)
        assert not state["errors"], state["errors"]
        # a plotly graph appears a moment after its output arrived
        self.page.wait_for_function(f"() => ({PANELS})().every(p => p.figure)", timeout=60_000)

    def panels(self) -> list[dict[str, Any]]:
        return self.page.evaluate(PANELS)

    def move(self, panel: int, slider: int = 0) -> bool:
        """One step of a slider by the keyboard; whether the panel's figure then held other data."""
        before = self.panels()[panel]
        handle = self.page.locator(f'[data-panel="{panel}"] .noUi-handle').nth(slider)
        handle.scroll_into_view_if_needed()
        handle.focus()
        top = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        self.page.keyboard.press("ArrowLeft" if top else "ArrowRight")
        settled = f"""([i, figure]) => {{
          const p = ({PANELS})()[i];
          return p.figure && p.figure != figure && !p.message.includes('computing');
        }}"""
        try:
            self.page.wait_for_function(settled, arg=[panel, before["figure"]], timeout=30_000)
        except Exception as error:
            if "Timeout" not in type(error).__name__:
                raise
            return False
        return True

    def picture(self, name: str, panel: int | None = None) -> None:
        """A screenshot of the page, or of one panel, where pictures are asked for."""
        if out := os.environ.get("WORKBENCH_SCREENSHOTS"):
            Path(out).mkdir(parents=True, exist_ok=True)
            target = self.page if panel is None else self.page.locator(f'[data-panel="{panel}"]')
            target.screenshot(path=str(Path(out) / f"{name}.png"))

    def saved(self) -> Any:
        """The notebook as JupyterLab saves it."""
        self.command("docmanager:save")
        self.page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
        return nbformat.read(self.lab.work / self.name, as_version=4)

    def close(self) -> None:
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()


def write(path: Path, *sources: str) -> None:
    v4 = nbformat.v4
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [v4.new_code_cell(s.strip()) for s in sources]
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), path)


def static_figures(notebook: Any) -> list[Any]:
    """Plotly figures stored beside a widget, by both of which a reader is served."""
    bundles = [o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return [b[PLOTLY] for b in bundles if PLOTLY in b and WIDGET in b]


def test_a_slider_computes_the_figure_again(browser, lab):
    write(lab.work / "tiny.ipynb", TINY, LIVE)
    page = Page(browser, lab, "tiny.ipynb")
    page.run_all(120)
    (panel,) = page.panels()
    assert "power 1" in panel["figure"] and "Powers <of> x" in panel["message"]
    page.picture("tiny-before")
    assert page.move(0), "the figure did not change"
    assert "power 2" in page.panels()[0]["figure"]
    page.picture("tiny-after")

    # an error is one line, the old figure stays, and the panel goes on
    shift = page.page.locator(".noUi-handle").nth(1)
    shift.focus()
    page.page.keyboard.press("ArrowRight")
    told = page.page.locator(".widget-vbox").get_by_text("shift is at most 2 <here>")
    told.wait_for()
    assert "power 2" in page.panels()[0]["figure"]
    page.picture("tiny-error")
    shift.focus()
    page.page.keyboard.press("ArrowLeft")
    told.wait_for(state="detached")
    assert page.move(0) and "power 3" in page.panels()[0]["figure"]

    notebook = page.saved()
    static, _ = static_figures(notebook)
    assert static["layout"]["title"]["text"] == "power 1"  # what papermill and the HTML export show
    (live,) = notebook.cells[1].outputs
    assert live["data"][PLOTLY]["data"][0]["x"][-1] == 40  # one output, with the last step
    last = "() => [...document.querySelectorAll('.js-plotly-plot')].at(-1).data[0].x.at(-1)"
    assert page.page.evaluate(last) == 40  # and so on the page
    assert page.outside == []
    page.close()


def test_it_works_after_restart_and_run_all(browser, lab):
    write(lab.work / "again.ipynb", TINY)
    page = Page(browser, lab, "again.ipynb")
    page.run_all(120)
    page.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:restart-run-all') }")
    page.page.locator(".jp-Dialog button.jp-mod-warn, .jp-Dialog button.jp-mod-accept").last.click()
    page.page.wait_for_function(f"() => ({STATE})().done == 0 || ({STATE})().status != 'idle'")
    page.finished(120)
    assert len(page.panels()) == 1
    assert page.move(0) and "power 2" in page.panels()[0]["figure"]
    page.close()


def test_the_gallery_links_to_notebooks_that_open(browser, lab):
    for path in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(path, lab.work)
    page = Page(browser, lab, "00_start_here.ipynb")
    page.run_all(120)
    page.picture("gallery")
    page.page.locator(".jp-OutputArea a", has_text="LinFusion").first.click()
    page.page.wait_for_function("() => window.jupyterapp.shell.currentWidget?.context?.path == '02_linfusion.ipynb'")
    page.page.close()


def finished_run(slug: str) -> Path | None:
    """The latest judged run of a paper under $WORKBENCH_BROWSER_RUNS."""
    root = os.environ.get("WORKBENCH_BROWSER_RUNS")
    found = sorted(Path(root).resolve().glob(f"{slug}/*/claims.json")) if root else []
    return found[-1].parent if found else None


def paper_notebooks() -> list[Path]:
    known = {f"{slug}.ipynb" for slug in papers.PAPERS}
    return [p for p in sorted(NOTEBOOKS.glob("*.ipynb")) if re.sub(r"^\d+_", "", p.name) in known]


@pytest.mark.parametrize("path", paper_notebooks(), ids=lambda p: p.stem)
def test_every_panel_of_a_paper_reacts(browser, lab, path, tmp_path):
    slug = re.sub(r"^\d+_", "", path.stem)
    values: dict[str, Any] = {"preset": "quick", "seed": 0, "overrides": {}, "run_dir": str(tmp_path / "run")}
    if run := finished_run(slug):
        shutil.copytree(run, tmp_path / "run")
        _, values["preset"], values["seed"], values["overrides"] = folder.settings(run)
    notebook = parameterize_notebook(load_notebook_node(str(path)), values)
    nbformat.write(notebook, lab.work / f"run_{path.name}")
    page = Page(browser, lab, f"run_{path.name}")
    page.run_all(900)
    panels = page.panels()
    assert panels, "the notebook has no panel"
    for number, panel in enumerate(panels):
        assert panel["figure"], f"panel {number} has no figure"
        if panel["sliders"]:
            assert any(page.move(number, s) for s in range(panel["sliders"])), f"panel {number}: no slider changes it"
            page.picture(f"{slug}-{number}", number)
    assert any(p["sliders"] for p in panels)
    assert len(static_figures(page.saved())) >= len(panels)
    assert page.outside == []
    page.close()
