"""The report and the notebooks' HTML: right verdicts, nothing fetched, figures drawn by a browser without a network."""

import json
import os
import re
import shutil

import nbformat
import plotly.graph_objects as go
import pytest

from workbench.errors import WorkbenchError
from workbench.runs import folder, html, report

PLOTLY, WIDGET = html.PLOTLY, html.WIDGET
FIGURE = json.loads(go.Figure(go.Scatter(y=[1, 3, 2]), layout={"title": "an </script><b>end</b>"}).to_json())
OUTSIDE = re.compile(
    r"""<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(["']?http"""
)


def judged_run(values=(0.5, 0.51, 0.52), preset="quick", run_id=None, toy=None):
    run_dir = toy.out / "runs" / "toy" / run_id if toy else None
    run = folder.start("toy", preset, run_dir=run_dir)
    for seed, value in enumerate(values):
        run.record.result("level", value, seed=seed)
    run.judge()
    return run


def executed_notebook(path, *outputs):
    """A notebook as papermill leaves it: one code cell with these display bundles, and a formula."""
    v4 = nbformat.v4
    cell = v4.new_code_cell("figure", execution_count=1)
    cell.outputs = [v4.new_output("display_data", data=data) for data in outputs]
    cell.outputs.append(v4.new_output("stream", name="stderr", text="1/3000\r2/3000\r3/3000\n"))
    text = v4.new_markdown_cell("Loss $\\frac{a}{b}$ and\n\n$$\\mathcal{L} = \\sum_i \\lVert x_i \\rVert^2$$\n")
    nbformat.write(v4.new_notebook(cells=[text, cell], metadata={"widgets": {"state": "x" * 10_000}}), path)


def test_notebook_html_asks_for_nothing_and_keeps_what_can_be_seen(tmp_path):
    view = {"version_major": 2, "version_minor": 0, "model_id": "abc"}
    executed_notebook(
        tmp_path / "notebook.ipynb",
        {WIDGET: view, PLOTLY: FIGURE, "text/plain": "both"},
        {WIDGET: view, "text/plain": "IntSlider(value=0)"},
        {WIDGET: view, "text/html": "<p>a static table</p>", "text/plain": "t"},
        {"text/latex": "$\\alpha$", "text/plain": "<Math>"},
    )
    html.export(tmp_path / "notebook.ipynb", tmp_path / "notebook.html", "toy")
    page = (tmp_path / "notebook.html").read_text()
    assert not OUTSIDE.search(page)
    assert page.count("Plotly.newPlot(") == 1 + html.plotly_script().count("Plotly.newPlot(")
    assert "an <\\/script><b>end<\\/b>" in page  # or the figure's title would end the script
    assert page.count(html.plotly_script()) == 1
    assert "IntSlider" not in page and "x" * 10_000 not in page
    assert "a static table" in page
    assert page.count("<math") == 3 and "<mfrac>" in page and "\\frac" not in page
    assert "3/3000" in page and "1/3000" not in page  # a progress bar leaves its last state


def test_a_notebook_without_figures_is_small(tmp_path):
    executed_notebook(tmp_path / "notebook.ipynb")
    html.export(tmp_path / "notebook.ipynb", tmp_path / "notebook.html", "toy")
    assert (tmp_path / "notebook.html").stat().st_size < 1_000_000


def test_a_formula_that_cannot_be_converted_stays_readable():
    assert "<math" in html.mathml(r"\theta_{t+1} = \theta_t - \eta \nabla L", "inline")
    for tex in (r"\left( a", r"\unheardof{a} + b"):
        assert html.mathml(tex, "inline") == f"<code class='tex'>{tex}</code>"


def test_the_report_shows_the_latest_run_of_each_preset(toy):
    judged_run((0.1, 0.11, 0.12), run_id="20260101-000000-aa", toy=toy)
    judged_run((0.5, 0.51, 0.52), run_id="20260102-000000-aa", toy=toy)
    judged_run((0.3, 0.5), preset="desk", run_id="20260101-000000-bb", toy=toy)
    views = report.latest(toy.out)
    assert [(v.preset, v.id, v.rows[0].verdict) for v in views] == [
        ("desk", "20260101-000000-bb", "inconclusive"),
        ("quick", "20260102-000000-aa", "holds"),
    ]
    assert views[0].rows[0].why == "2 of 3 seeds"
    assert views[1].rows[0].ours == "0.51 ± 0.025 nats"
    page = report.write(views, toy.out / "report.html").read_text()
    assert not OUTSIDE.search(page)
    assert "Toys &lt;for&gt; tests &amp; trials" in page
    assert "0.51 ± 0.025 nats" in page and "level ≥ 0.4 nats" in page
    assert "Plotly" not in page.split("<script>")[0]  # no figure stored: plotly.js stays out


def test_a_run_that_failed_is_in_the_report_with_its_traceback(toy):
    run = folder.start("toy")
    folder.write_json(run.path / "run.json", {"state": "failed", "seconds": 3.0})
    (run.path / "error.txt").write_text("ValueError: <bad>")
    (view,) = report.latest(toy.out)
    page = report.write([view], toy.out / "report.html").read_text()
    assert "ValueError: &lt;bad&gt;" in page and 'class="verdict failed"' in page


def test_an_empty_report_says_what_to_do(tmp_path):
    assert "workbench run SLUG" in report.write([], tmp_path / "report.html").read_text()


def test_a_damaged_run_is_told_and_costs_no_other(toy):
    judged_run(run_id="20260101-000000-aa", toy=toy)
    bad = judged_run(run_id="20260102-000000-aa", toy=toy)
    (bad.path / "claims.json").write_text("[")
    with pytest.raises(WorkbenchError, match="claims.json is damaged"):
        report.read(bad.path)
    views = report.latest(toy.out)
    assert [(v.state, len(v.rows)) for v in views] == [("damaged", 0), ("done", 1)]
    assert "claims.json is damaged" in report.write(views, toy.out / "report.html").read_text()


def test_markdown_has_a_row_a_claim_and_escapes_bars(toy):
    judged_run((0.3, 0.5))
    text = report.markdown(report.latest(toy.out)).splitlines()
    assert len(text) == 3 and all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in text)
    assert "**inconclusive**: 2 of 3 seeds" in text[2]


def test_keep_stores_a_small_run_whose_verdict_can_be_recomputed(toy):
    run = folder.start("toy", "desk", seed=2, overrides={"level": 0.7, "mode": "bf16"})
    for step in range(1, 5001):
        run.record.write("step", training="t", step=step, loss=1 / step, filler="x" * 40)
    for seed in range(3):
        run.record.result("level", 0.5 + seed / 100, seed=seed)
    run.judge()
    kept = report.keep(run.path)
    assert kept == report.reference_root() / "toy"
    assert sum(f.stat().st_size for f in kept.iterdir()) < 200_000
    records = list(report.read_records(kept / "metrics.jsonl"))
    steps = [r["step"] for r in records if r["kind"] == "step"]
    assert steps[0] == 1 and steps[-1] == 5000 and 500 < len(steps) < 5000
    assert sum(r["kind"] == "result" for r in records) == 3
    command = (kept / "command.txt").read_text()
    assert command == "workbench run toy --preset desk --seed 2 -p level=0.7 -p 'mode=\"bf16\"'\n"
    (view,) = report.references()
    assert view.reference and view.rows[0].verdict == "holds"


def test_keep_refuses_a_run_without_verdicts(toy):
    run = folder.start("toy")
    with pytest.raises(WorkbenchError, match="has no claims.json"):
        report.keep(run.path)


@pytest.fixture
def offline_page():
    """Opens a file in headless Chromium without a network; gives the page and the requests that left the disk."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on this machine: the offline report was not opened in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        context = browser.new_context(offline=True)
        page = context.new_page()
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        page.on("pageerror", lambda e: faults.append(str(e)))
        yield page, asked, faults
        browser.close()


@pytest.mark.browser
def test_a_browser_draws_the_notebook_and_the_report_from_disk(toy, offline_page):
    page, asked, faults = offline_page
    run = judged_run()
    for name in ("loss", "cost", "rarely_opened"):
        (run.path / "figures" / f"{name}.json").write_text(json.dumps(FIGURE))
    executed_notebook(run.path / "notebook.ipynb", {PLOTLY: FIGURE, "text/plain": "figure"})
    html.export(run.path / "notebook.ipynb", run.path / "notebook.html", "toy")
    written = report.write(report.latest(toy.out), toy.out / "report.html")

    page.goto(written.as_uri())
    page.wait_for_selector("#figure-1-1 .scatterlayer .trace path")
    assert page.locator(".scatterlayer").count() == 2
    page.click("details:has(#figure-1-3) summary")  # drawn when first opened
    page.wait_for_selector("#figure-1-3 .scatterlayer .trace path")
    assert page.locator("#verdicts .verdict.holds").inner_text() == "holds"

    page.click("text=the executed notebook")
    page.wait_for_selector(".plotly-figure .scatterlayer .trace path")
    above, below = (page.locator("mfrac > *").nth(n).bounding_box() for n in (0, 1))
    assert above and below and above["y"] + above["height"] <= below["y"] + 1  # a fraction, not a line of text
    assert asked == [] and faults == []
