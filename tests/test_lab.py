"""The lab as a notebook uses it: panels compute again, figures are stored, verdicts and errors are told in one line."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import ipywidgets as widgets
import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from IPython.testing.globalipapp import start_ipython
from nbclient import NotebookClient
from PIL import Image

from workbench import papers
from workbench.errors import WorkbenchError
from workbench.lab import display, figures, gallery, live, panels
from workbench.runs import report
from workbench.training.loop import Recipe, fit

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def shown(monkeypatch):
    """What a cell displays, in order; an update of a display is ("update", data)."""
    found = []

    class Handle:
        def update(self, data, raw=False):
            found.append(("update", data))

    def fake(value, raw=False, display_id=None):
        found.append(value)
        return Handle() if display_id else None

    for module in (display, panels, live, gallery):
        monkeypatch.setattr(module, "display", fake)
    return found


def draw_power(power):
    return figures.lines({"x": ([1, 2], [1, 2**power])}, title=f"power {power}", x="x (m)", y="y (m)")


def title_of(bundle):
    return bundle[display.MIME]["layout"]["title"]["text"]


def test_one_display_carries_the_live_panel_and_the_static_figure(shown):
    assert panels.explore(draw_power, {"power": widgets.IntSlider(2, 1, 9)}) is None
    (bundle,) = shown
    assert WIDGET in bundle and title_of(bundle) == "power 2"
    assert bundle[display.MIME]["layout"]["height"] == figures.HEIGHT


def test_a_control_computes_the_figure_again_but_not_twice_at_the_same_values():
    drawn = []
    slider = widgets.IntSlider(1, 1, 9)
    live_panel, static = panels.panel(lambda power: drawn.append(power) or draw_power(power), {"power": slider})
    canvas = live_panel.children[-1]
    assert title_of(static) == title_of(canvas.outputs[0]["data"]) == "power 1"
    for value in (3, 1, 3):
        slider.value = value
        assert title_of(canvas.outputs[0]["data"]) == f"power {value}"
        assert canvas.outputs[0]["data"][display.MIME]["data"][0]["y"][1] == 2**value
    assert drawn == [1, 3]
    assert slider.continuous_update is False


def test_an_unhashable_value_is_drawn_every_time():
    picker = widgets.Select(options=[("a", [1]), ("b", [2])])
    live_panel, _ = panels.panel(lambda which: draw_power(which[0]), {"which": picker})
    picker.index = 1
    assert title_of(live_panel.children[-1].outputs[0]["data"]) == "power 2"


def test_an_error_is_one_escaped_line_and_the_panel_goes_on():
    slider = widgets.IntSlider(1, 0, 9)

    def draw(power):
        if power == 0:
            raise WorkbenchError("power from <1> up")
        return draw_power(1 // (power - 5)) if power == 5 else draw_power(power)

    live_panel, _ = panels.panel(draw, {"power": slider}, title="<b>powers</b>")
    heading, _, message, canvas = live_panel.children
    assert heading.value == "<b>&lt;b&gt;powers&lt;/b&gt;</b>"
    slider.value = 0
    assert "power from &lt;1&gt; up" in message.value and "WorkbenchError" not in message.value
    assert title_of(canvas.outputs[0]["data"]) == "power 1"
    slider.value = 5
    assert "ZeroDivisionError" in message.value and "\n" not in message.value
    slider.value = 4
    assert message.value == "" and title_of(canvas.outputs[0]["data"]) == "power 4"


def test_an_error_of_the_first_drawing_is_the_cells():
    with pytest.raises(ZeroDivisionError):
        panels.panel(lambda power: draw_power(1 // power), {"power": widgets.IntSlider(0)})


def test_ablation_explorer_shows_the_stored_seeds_mean_and_interval(monkeypatch):
    caught = {}
    monkeypatch.setattr(panels, "explore", lambda draw, controls, title: caught.update(draw=draw, controls=controls))
    stored = [
        {"variant": v, "seed": s, "measures": {"kd": value, "layers": [1, 2], "flag": True}}
        for v, values in {"paper": (1.0, 2.0, 3.0), "causal": (4.0, 6.0, 5.0)}.items()
        for s, value in enumerate(values)
    ]
    stored.append({"variant": "paper", "seed": 2, "measures": {"kd": 6.0}})  # measured again: the last counts
    panels.ablation_explorer([{"kind": "note"}, *stored], units={"kd": "squared error"})
    assert caught["controls"]["measure"].options == ("kd",)
    assert caught["controls"]["shown"].value == ("paper", "causal")
    figure = caught["draw"]("kd", ("paper",), False)
    bar = next(t for t in figure.data if t.type == "bar")
    assert bar.y == (3.0,)
    # sd of 1, 2, 6 is sqrt(7); t(0.975, 2) = 4.302653
    assert bar.error_y.array[0] == pytest.approx(4.302653 * 7**0.5 / 3**0.5)
    assert figure.layout.yaxis.title.text == "kd (squared error)"
    with pytest.raises(WorkbenchError, match="choose a variant"):
        caught["draw"]("kd", (), False)
    with pytest.raises(WorkbenchError, match="no ablation is stored"):
        panels.ablation_explorer([{"kind": "note"}])


def test_parameter_panel_yields_overrides_that_start_takes(toy, shown):
    overrides = panels.parameter_panel("toy")
    (box,) = shown
    *rows, message = box.children
    controls = {row.children[0].description: row.children[0] for row in rows}
    assert "optimiser steps" in rows[0].children[1].value and "≥ 1" in rows[0].children[1].value
    controls["steps"].value = "7"
    controls["mode"].value = "bf16"
    assert overrides == {"steps": 7, "mode": "bf16"}
    controls["steps"].value = "0"
    assert "parameter steps" in message.value and overrides["steps"] == 7
    controls["steps"].value = "many"
    assert "parameter steps" in message.value and overrides["steps"] == 7
    run = display.start("toy", overrides=overrides)
    assert (run.config.steps, run.config.mode) == (7, "bf16")
    controls["steps"].value = "4"  # the preset's own value is no override
    assert overrides == {"mode": "bf16"}
    with pytest.raises(WorkbenchError, match="unknown preset 'full' of toy: choose from quick, desk"):
        panels.parameter_panel("toy", "full")


def test_start_shows_every_parameter_escaped_and_what_was_changed(toy, shown):
    display.start("toy", overrides={"steps": 9})
    page = shown[0].data
    assert "Toys &lt;for&gt; tests &amp; trials" in page
    assert "<b>9</b>" in page and "preset: 4" in page
    assert "3 parameters, 1 changed" in page
    assert all(f"<code>{name}</code>" in page for name in ("steps", "level", "mode"))


def test_show_stores_the_figure_that_it_displays(toy, shown):
    run = display.start("toy")
    display.show(draw_power(2), run, "power")
    stored = json.loads((run.path / "figures" / "power.json").read_text())
    assert stored["data"] == shown[-1][display.MIME]["data"]
    with pytest.raises(WorkbenchError, match="plain file name"):
        display.show(draw_power(2), run, "../power")
    assert not (run.path / "power.json").exists()


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((0.5, 0.51, 0.52), "holds"), ((0.1, 0.11, 0.12), "does not hold"), ((0.3, 0.5), "inconclusive")],
)
def test_finish_writes_and_shows_the_verdict_of_the_stored_values(toy, shown, values, verdict):
    run = display.start("toy")
    for seed, value in enumerate(values):
        run.record.result("level", value, seed=seed)
    display.finish(run)
    assert json.loads((run.path / "claims.json").read_text())[0]["verdict"] == verdict
    page = shown[-1].data
    assert f"<b style='color:{display.COLOURS[verdict]}'>{verdict}</b>" in page
    assert "level ≥ 0.4 nats" in page and "fixed beforehand" in page and f"{len(values)} seeds" in page


def train(callback, steps=40):
    model = torch.nn.Linear(1, 1)
    fit(model, lambda m, x: {"loss": m(x).square().mean(), "members": torch.tensor([1.0, 3.0])},
        lambda g: torch.randn(4, 1, generator=g), Recipe(steps=steps, log_every=1), name="t", on_step=callback,
        progress=False)  # fmt: skip


def test_live_loss_is_throttled_and_whole_at_the_cells_end(shown, monkeypatch):
    shell = start_ipython() or live.get_ipython()
    callback = live.live_loss(["loss", "members"], y="loss (nats)")
    drawn = []
    callback._canvas.observe(lambda change: drawn.append(change["new"]), names="outputs")
    train(callback)
    early = len(drawn)
    assert 1 <= early <= 4 and len(shown) == 1  # not one for each of the 40 steps; the display waits
    shell.events.trigger("post_run_cell", None)
    kind, data = shown[-1]
    assert kind == "update" and WIDGET in data
    figure = data[display.MIME]
    assert figure["data"][0]["x"][-1] == 40 and figure["data"][1]["y"][-1] == 2.0  # the members' mean
    assert drawn[-1][0]["data"][display.MIME] == figure  # the page shows what the notebook keeps
    shell.events.trigger("post_run_cell", None)
    assert len(shown) == 2 and len(drawn) == early + 1  # the next cells do not draw it again


def test_live_loss_says_so_where_a_finished_training_was_loaded(shown):
    shell = start_ipython() or live.get_ipython()
    live.live_loss(title="teacher")
    shell.events.trigger("post_run_cell", None)
    assert shown[-1] == ("update", {"text/plain": "teacher: no new step, the finished training was loaded"})


def test_live_loss_thins_long_curves_and_keeps_the_last_step(shown, monkeypatch):
    monkeypatch.setattr(live, "POINTS", 20)
    callback = live.live_loss(["loss"])
    for step in range(1, 2 * live.POINTS + 2):
        callback(step, {"loss": 1.0})
    xs = callback._draw()[display.MIME]["data"][0]["x"]
    assert len(xs) <= live.POINTS and xs[-1] == 2 * live.POINTS + 1


def test_live_loss_names_what_is_logged_where_no_key_fits(shown):
    with pytest.raises(WorkbenchError, match="no nll here; the training logs loss"):
        train(live.live_loss(["nll"]))


def test_drawing_costs_a_training_little(shown, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    callback = live.live_loss(["loss"])
    monkeypatch.setattr(callback, "_draw", lambda: now.__setitem__(0, now[0] + 0.1))  # a slow drawing: 0.1 s
    spent = 0.0
    for step in range(1, 3001):
        now[0] += 0.01
        before = now[0]
        callback(step, {"loss": 1.0})
        spent += now[0] - before
    assert 0 < spent <= 0.03 * now[0]


def test_image_grid_keeps_every_pixel():
    images = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    figure = figures.image_grid(images, columns=3, scale=2)
    raw = base64.b64decode(figure.data[0].source.partition(",")[2])
    sheet = np.asarray(Image.open(io.BytesIO(raw)))
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1, 3)
    fifth = sheet[5:9, 7:13]
    assert np.array_equal(fifth, (images[4] * 255).round().byte().permute(1, 2, 0).numpy())
    assert (sheet[4] == 255).all()  # the seam
    grey = figures.image_grid(torch.zeros(1, 1, 2, 2))
    assert grey.data[0].source.startswith("data:image/png;base64,")


def test_lines_put_a_band_around_its_curve_and_training_curves_average_members():
    figure = figures.lines({"a": ([1, 2], [3, 4])}, title="t", x="x (m)", y="y (s)", bands={"a": ([2, 3], [4, 5])},
                           levels={"limit": 1.0}, log_x=True)  # fmt: skip
    assert list(figure.data[0].y) == [4, 5, 3, 2] and figure.layout.xaxis.type == "log"
    assert figure.layout.shapes[0].y0 == 1.0
    steps = [{"kind": "step", "training": "t", "step": s, "loss": [s, s + 2.0]} for s in (1, 2)]
    curves = figures.training_curves([{"kind": "note"}, *steps], y="loss (nats)")
    assert list(curves.data[0].y) == [2.0, 3.0] and curves.layout.yaxis.title.text == "loss (nats)"


def test_a_mistake_is_one_line_in_a_notebook_and_the_cell_fails(tmp_path):
    source = "from workbench.errors import WorkbenchError\nraise WorkbenchError('steps is a number from 1 up')"
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    NotebookClient(nb, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = nb.cells[0].outputs
    assert output.output_type == "error"
    assert "\n".join(output.traceback) == "WorkbenchError: steps is a number from 1 up"


def test_the_gallery_reads_what_the_papers_say_of_themselves():
    for slug in papers.PAPERS:
        module = papers.load(slug)
        read = gallery.described(slug)
        assert read == {name: getattr(module, name) for name in ("TITLE", "AUTHORS", "ARXIV", "ABOUT", "NOTEBOOK")}
    assert len({slug for slug, _, _ in gallery.PLANNED} | set(papers.PAPERS)) == 14


def test_the_gallery_imports_no_paper(tmp_path):
    code = "import sys; from workbench.lab import gallery; gallery.show(); print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_gallery_links_to_notebooks_and_counts_verdicts(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "PAPERS", ("toy",))
    told = {"TITLE": "Toys <for> trials", "AUTHORS": "A", "ARXIV": "0", "ABOUT": "a < b", "NOTEBOOK": "toy.ipynb"}
    monkeypatch.setattr(gallery, "described", lambda slug: told)
    here = tmp_path / "notebooks"
    here.mkdir()
    (here / "toy.ipynb").write_text("{}")
    page = gallery.cards(here, toy.out, []).data
    assert "no run yet" in page and "Toys &lt;for&gt; trials" in page and "a &lt; b" in page
    assert "href='toy.ipynb'" in page and "planned" in page.lower() and "No report yet" in page
    run = display.folder.start("toy")
    for seed in range(3):
        run.record.result("level", 0.5 + seed / 100, seed=seed)
    run.judge()
    (run.path / "notebook.ipynb").write_text("{}")
    report.write(report.latest(toy.out), toy.out / "report.html")
    page = gallery.cards(here, toy.out, report.latest(toy.out)).data
    assert "1 holds" in page and "no run yet" not in page
    for link in re.findall(r"href='([^']*(?:ipynb|html))'", page):
        assert (here / link).exists(), link
    monkeypatch.setattr(papers, "PAPERS", ("toy", "gasp"))
    assert "2503.15672" not in gallery.cards(here, toy.out, []).data  # no longer planned


def test_a_mark_stands_where_it_says_on_linear_and_log_axes():
    figure = figures.blank("t", "tokens", "time (s)", log_x=True)
    figures.mark(figure, "x", 1000, "here")
    figures.mark(figure, "y", 5, "limit")
    across, limit = figure.layout.shapes
    assert (across.x0, across.x1, limit.y0, limit.y1) == (1000, 1000, 5, 5)
    # plotly places an annotation of a log axis by its exponent
    assert figure.layout.annotations[0].x == 3 and figure.layout.annotations[1].y == 5


def test_every_builder_names_its_axes():
    made = [
        figures.heatmap([[1, 2]], title="t", x="decay", y="epochs", value="loss (nats)"),
        figures.bars({"a": [1.0]}, title="t", y="loss (nats)", x="variant"),
        figures.blank("t", "x (m)", "y (s)"),
    ]
    for figure in made:
        assert isinstance(figure, go.Figure)
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    assert made[0].data[0].colorbar.title.text == "loss (nats)"
    assert made[1].data[0].error_y.array is None  # one seed has no interval


def test_the_start_notebook_is_short_and_stripped():
    path = Path(__file__).parents[1] / "notebooks" / "00_start_here.ipynb"
    nb = nbformat.read(path, as_version=4)
    assert all(not c.get("outputs") for c in nb.cells)
    assert len({c.id for c in nb.cells}) == len(nb.cells)
