"""Panels: controls beside a figure that is computed again from the run on every change, with a static fallback."""

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import display

from workbench.config import Parameter, as_dict, override, parameters, parse_assignments
from workbench.errors import WorkbenchError
from workbench.lab import figures
from workbench.lab.display import MIME, plotly_bundle
from workbench.papers import load


def _in_red(error: Exception) -> str:
    said = str(error) if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
    return f"<b style='color:#b3261e'>{html.escape(said)}</b>"


def panel(
    draw: Callable[..., go.Figure], controls: Mapping[str, widgets.Widget], *, title: str = ""
) -> tuple[widgets.VBox, dict[str, Any]]:
    """The live panel of `explore` and the figure at the controls' initial values, as display data.

    An error of this first drawing is raised: it is the cell's own. Later ones are told in one line in the panel.
    """
    canvas, message = widgets.Output(), widgets.HTML(layout={"min_height": "22px"})
    cached = lru_cache(maxsize=64)(lambda items: draw(**dict(items)))

    def compute() -> dict[str, Any]:
        now = tuple((name, control.value) for name, control in controls.items())
        try:
            hash(now)
        except TypeError:
            return plotly_bundle(draw(**dict(now)))
        return plotly_bundle(cached(now))

    def put(data: dict[str, Any]) -> None:
        # the height is held while the old drawing goes and the new one comes, so that the page does not jump
        canvas.layout.min_height = f"{data[MIME]['layout']['height'] + 10}px"
        canvas.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def redraw(*_: Any) -> None:
        message.value = "<i>computing …</i>"
        try:
            put(compute())
        except Exception as error:  # the panel must stay usable whatever the controls ask for
            message.value = _in_red(error)
        else:
            message.value = ""

    for control in controls.values():
        if hasattr(control, "continuous_update"):
            control.continuous_update = False
        if control.has_trait("style"):
            control.style.description_width = "initial"  # a name is not cut short
        control.layout.width = control.layout.width or "340px"
        control.observe(redraw, names="value")
    static = compute()
    put(static)
    heading = [widgets.HTML(f"<b>{html.escape(title)}</b>")] if title else []
    row = widgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"})
    return widgets.VBox([*heading, row, message, canvas]), static


def explore(draw: Callable[..., go.Figure], controls: Mapping[str, widgets.Widget], *, title: str = "") -> None:
    """Show draw(**values) under its controls and compute it again whenever one of them changes.

    controls: argument name → ipywidgets control. What was drawn before at the same values is not computed again. One
    display carries the live panel and the figure at the initial values: JupyterLab shows the panel; papermill, nbval
    and the HTML export, which have no kernel behind them, show the figure. An error in `draw` becomes one line.
    """
    live, static = panel(draw, controls, title=title)
    view = live._repr_mimebundle_() or {}
    display({**view, **static}, raw=True)


def ablation_explorer(
    records: Iterable[Mapping[str, Any]], *, title: str = "Ablations", units: Mapping[str, str] | None = None
) -> None:
    """Pick a measure and variants: bars of the mean over seeds with 95 % intervals, the seeds as dots.

    records: {"variant": name, "seed": s, "measures": {name: number, ...}}, as stored; of two records of one variant and
    seed the later counts, measures that are not numbers are left out. units: measure → unit, for the axis. Raises
    WorkbenchError where no record has a variant and a numeric measure.
    """
    latest = {(str(r["variant"]), str(r["seed"])): r["measures"] for r in records if "variant" in r and "measures" in r}
    values: dict[str, dict[str, list[float]]] = {}
    for (variant, _), measures in latest.items():
        for name, value in measures.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(name, {}).setdefault(variant, []).append(value)
    if not values:
        raise WorkbenchError("no ablation is stored here: a record needs a variant, a seed and numeric measures")
    variants = list(dict.fromkeys(variant for variant, _ in latest))

    def draw(measure: str, shown: Sequence[str], log: bool) -> go.Figure:
        chosen = {v: values[measure][v] for v in variants if v in shown and v in values[measure]}
        if not chosen:
            raise WorkbenchError(f"{measure} is not measured for {', '.join(shown)}" if shown else "choose a variant")
        unit = (units or {}).get(measure)
        y = f"{measure} ({unit})" if unit else measure
        return figures.bars(chosen, title=f"{measure}: mean over seeds, 95 % interval", x="variant", y=y, log_y=log)

    controls = {
        "measure": widgets.Dropdown(options=list(values), description="measure"),
        "shown": widgets.SelectMultiple(
            options=variants, value=variants, rows=min(6, len(variants)), description="variants"
        ),
        "log": widgets.Checkbox(False, description="log axis", indent=False),
    }
    explore(draw, controls, title=title)


def parameter_panel(slug: str, preset: str = "quick") -> dict[str, Any]:
    """Controls for every parameter of a paper; the dict returned always holds what differs from the preset.

    Give it to `start(..., overrides=...)`. A value that the config refuses is told in one line and not taken.
    """
    presets = load(slug).PRESETS
    if preset not in presets:
        raise WorkbenchError(f"unknown preset {preset!r} of {slug}: choose from {', '.join(presets)}")
    base = presets[preset]
    overrides: dict[str, Any] = {}
    message = widgets.HTML("<i>nothing changed</i>")
    rows = [_row(p, base, overrides, message) for p in parameters(base)]
    display(widgets.VBox([*rows, message]))
    return overrides


def _control(p: Parameter, base: Any) -> widgets.Widget:
    """A tick box for a bool, a menu for a choice, a slider for a bounded number, else text read as `-p` is."""
    look: dict[str, Any] = {"description": p.name, "style": {"description_width": "170px"}, "tooltip": p.help}
    look["layout"] = {"width": "430px"}
    choices = p.type.split(" | ")
    if p.type == "bool":
        return widgets.Checkbox(value=p.default, **look)
    if isinstance(p.default, str) and p.default in choices:
        return widgets.Dropdown(options=choices, value=p.default, **look)
    if p.type == "float" and {"≥ 0", "≤ 1"} <= {b.replace(".0", "") for b in p.range.split(", ")}:
        return widgets.FloatSlider(p.default, min=0, max=1, step=0.01, continuous_update=False, **look)
    return widgets.Text(value=json.dumps(as_dict(base)[p.name]), continuous_update=False, **look)


def _row(p: Parameter, base: Any, overrides: dict[str, Any], message: widgets.HTML) -> widgets.Widget:
    """The control of one parameter with its unit, range and help; a change goes to `overrides` or is told."""
    control = _control(p, base)

    def changed(change: Mapping[str, Any]) -> None:
        try:
            raw = change["new"]
            value = parse_assignments([f"{p.name}={raw}"])[p.name] if isinstance(control, widgets.Text) else raw
            checked = override(base, {**overrides, p.name: value})
        except WorkbenchError as error:
            message.value = _in_red(error)
            return
        if getattr(checked, p.name) == p.default:
            overrides.pop(p.name, None)
        else:
            overrides[p.name] = value
        message.value = f"<code>overrides = {html.escape(str(overrides))}</code>"

    control.observe(changed, names="value")
    told = " ".join(part for part in (p.unit, f"({p.range})" if p.range else "") if part)
    text = f"<span style='color:#666'>{html.escape(told)}{' · ' if told else ''}{html.escape(p.help)}</span>"
    return widgets.HBox([control, widgets.HTML(text)])
