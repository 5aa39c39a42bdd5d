"""Panels: controls beside a figure that is computed again from the run on every change, with a static fallback."""

import html
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
from IPython.display import display

from workbench.config import Parameter, as_dict, override, parameters, parse_assignments
from workbench.errors import WorkbenchError
from workbench.lab.display import plotly_bundle
from workbench.papers import load


def explore(
    draw: Callable[..., go.Figure], controls: Mapping[str, widgets.Widget], *, title: str = ""
) -> widgets.Widget:
    """Show draw(**values) under its controls and compute it again whenever one of them changes.

    One display carries the live panel and the figure at the initial values: JupyterLab shows the panel; papermill,
    nbval and the HTML export, which have no kernel behind them, show the figure. An error in `draw` becomes one line.
    """
    canvas, message = widgets.Output(), widgets.HTML()
    cached = lru_cache(maxsize=64)(lambda items: draw(**dict(items)))

    def values() -> tuple[tuple[str, Any], ...]:
        return tuple((name, control.value) for name, control in controls.items())

    def compute() -> go.Figure:
        now = values()
        try:
            hash(now)
        except TypeError:
            return draw(**dict(now))
        return cached(now)

    def redraw(*_: Any) -> None:
        message.value = "<small>computing …</small>"
        try:
            data = plotly_bundle(compute())
        except Exception as error:  # the panel must stay usable whatever the controls ask for
            message.value = f"<b style='color:#b3261e'>{html.escape(f'{type(error).__name__}: {error}')}</b>"
            return
        canvas.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)
        message.value = ""

    for control in controls.values():
        if hasattr(control, "continuous_update"):
            control.continuous_update = False
        control.style.description_width = "initial"
        control.observe(redraw, names="value")
    static = plotly_bundle(compute())  # the first drawing must work: its error is the cell's
    canvas.outputs = ({"output_type": "display_data", "data": static, "metadata": {}},)
    heading = [widgets.HTML(f"<b>{html.escape(title)}</b>")] if title else []
    row = widgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"})
    panel = widgets.VBox([*heading, row, message, canvas])
    live = panel._repr_mimebundle_() or {}
    bundle = live[0] if isinstance(live, tuple) else live
    display({**bundle, **static}, raw=True)
    return panel


def parameter_panel(slug: str, preset: str = "quick") -> dict[str, Any]:
    """Controls for every parameter of a paper; the dict returned always holds what differs from the preset.

    Give it to `start(..., overrides=...)`. A value the config refuses is told in one line and not taken.
    """
    base = load(slug).PRESETS[preset]
    overrides: dict[str, Any] = {}
    message = widgets.HTML()
    rows = []
    for p in parameters(base):
        rows.append(_control(p, base, overrides, message))
    display(widgets.VBox([*rows, message]))
    return overrides


def _control(p: Parameter, base: Any, overrides: dict[str, Any], message: widgets.HTML) -> widgets.Widget:
    """A tick box for a bool, a menu for a choice, else text read as `-p name=value` is."""
    look: dict[str, Any] = {"description": f"{p.name} ({p.unit})" if p.unit else p.name, "tooltip": p.help}
    look["style"] = {"description_width": "220px"}
    look["layout"] = {"width": "520px"}
    choices = p.type.split(" | ") if isinstance(p.default, str) and p.default in p.type.split(" | ") else None
    control: widgets.Widget
    if p.type == "bool":
        control = widgets.Checkbox(value=p.default, **look)
    elif choices:
        control = widgets.Dropdown(options=choices, value=p.default, **look)
    else:
        text = json.dumps(as_dict(base)[p.name])
        control = widgets.Text(value=text, continuous_update=False, **look)

    def changed(change: Mapping[str, Any]) -> None:
        try:
            raw = change["new"]
            value = parse_assignments([f"{p.name}={raw}"])[p.name] if isinstance(control, widgets.Text) else raw
            checked = override(base, {**overrides, p.name: value})
        except WorkbenchError as error:
            message.value = f"<b style='color:#b3261e'>{html.escape(str(error))}</b>"
            return
        if getattr(checked, p.name) == p.default:
            overrides.pop(p.name, None)
        else:
            overrides[p.name] = value
        message.value = f"<small>overrides = {html.escape(str(overrides))}</small>"

    control.observe(changed, names="value")
    return control
