"""Plotly figures of one look: lines with bands, bars with intervals, heat maps, image grids, training curves."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from PIL import Image

from workbench.evaluation.intervals import mean_interval

# Okabe and Ito's palette: distinguishable with the common colour-vision deficiencies
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#B8A100")
HEIGHT = 420  # px, where a figure says nothing else
TEMPLATE = go.layout.Template(
    layout=go.Layout(
        font={"family": "system-ui, sans-serif", "size": 14, "color": "#222"},
        title={"font": {"size": 17}, "x": 0.02},
        colorway=PALETTE,
        paper_bgcolor="white",
        plot_bgcolor="white",
        xaxis={"gridcolor": "#e6e6e6", "linecolor": "#888", "zeroline": False, "ticks": "outside", "automargin": True},
        yaxis={"gridcolor": "#e6e6e6", "linecolor": "#888", "zeroline": False, "ticks": "outside", "automargin": True},
        legend={"bgcolor": "rgba(255,255,255,0.7)"},
        margin={"l": 70, "r": 20, "t": 50, "b": 72},
        height=HEIGHT,
    )
)


def blank(title: str, x: str, y: str, *, log_x: bool = False, log_y: bool = False) -> go.Figure:
    """An empty figure with titled axes; x and y name the quantity and its unit, as in "loss (nats per token)"."""
    figure = go.Figure()
    figure.update_layout(template=TEMPLATE, title=title, xaxis_title=x, yaxis_title=y)
    # D2 labels 1, 2 and 5 of each decade; by itself plotly labels every digit, on top of each other
    if log_x:
        figure.update_xaxes(type="log", dtick="D2")
    if log_y:
        figure.update_yaxes(type="log", dtick="D2")
    return figure


def mark(figure: go.Figure, axis: str, value: float, text: str) -> None:
    """A dashed line across the figure at `value` of axis "x" or "y", with its name; right on log axes too."""
    log = figure.layout[f"{axis}axis"].type == "log"
    place = {axis: np.log10(value) if log else value, "showarrow": False, "text": text}  # labels count in decades
    line = {"color": "#666", "dash": "dash", "width": 1.5}
    if axis == "y":
        figure.add_hline(y=value, line=line)
        figure.add_annotation(**place, xref="paper", x=1, xanchor="right", yanchor="bottom")
    else:
        figure.add_vline(x=value, line=line)
        figure.add_annotation(**place, yref="paper", y=1, xanchor="left", yanchor="bottom")


def _faded(colour: str, alpha: float = 0.15) -> str:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = True,
) -> go.Figure:
    """Curves by name as (x values, y values); bands by the same name as (low, high); levels are dashed horizontals."""
    figure = blank(title, x, y, log_x=log_x, log_y=log_y)
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        if bands and name in bands:
            low, high = bands[name]
            figure.add_scatter(
                x=[*xs, *reversed(xs)], y=[*high, *reversed(low)], fill="toself", fillcolor=_faded(colour),
                line={"width": 0}, hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        mode = "lines+markers" if markers else "lines"
        figure.add_scatter(x=list(xs), y=list(ys), name=name, mode=mode, line={"color": colour})
    for name, value in (levels or {}).items():
        mark(figure, "y", value, name)
    return figure


def bars(
    values: Mapping[str, Sequence[float]], *, title: str, y: str, x: str = "", log_y: bool = False,
    level: tuple[str, float] | None = None,
) -> go.Figure:  # fmt: skip
    """A bar a variant: the mean of its seeds, whiskers of the 95 % interval (2 seeds and up), the seeds as dots."""
    figure = blank(title, x, y, log_y=log_y)
    for i, (name, seeds) in enumerate(values.items()):
        interval = mean_interval(list(seeds))
        half = interval.high - interval.mean
        error = {"type": "data", "array": [half], "visible": True} if np.isfinite(half) else None
        colour = PALETTE[i % len(PALETTE)]
        figure.add_bar(
            x=[name], y=[interval.mean], error_y=error, marker_color=_faded(colour, 0.5), showlegend=False, name=name,
            hovertemplate=f"{interval}<extra>{name}</extra>",
        )  # fmt: skip
        dots = {"color": colour, "size": 8, "line": {"color": "white", "width": 1}}
        figure.add_scatter(
            x=[name] * len(seeds), y=list(seeds), mode="markers", showlegend=False, marker=dots, name=name
        )
    if level:
        mark(figure, "y", level[1], level[0])
    return figure


def heatmap(
    z: Any, *, title: str, x: str, y: str, value: str, x_labels: Sequence[Any] | None = None,
    y_labels: Sequence[Any] | None = None, text: bool = True, colours: str = "Viridis",
) -> go.Figure:  # fmt: skip
    """z (rows, columns) as colours; `value` names the quantity and its unit beside the colour bar."""
    z = np.asarray(z.detach().cpu() if isinstance(z, torch.Tensor) else z, dtype=float)
    figure = blank(title, x, y)
    figure.add_heatmap(
        z=z.tolist(), x=list(map(str, x_labels)) if x_labels is not None else None,
        y=list(map(str, y_labels)) if y_labels is not None else None, colorscale=colours,
        colorbar={"title": {"text": value, "side": "right"}}, texttemplate="%{z:.3g}" if text else None,
    )  # fmt: skip
    # labels that look like numbers would be placed as numbers, with cells of unequal width
    if x_labels is not None:
        figure.update_xaxes(type="category")
    if y_labels is None:
        figure.update_yaxes(autorange="reversed")
    else:
        figure.update_yaxes(type="category")
    return figure


def image_grid(images: torch.Tensor, *, columns: int = 8, title: str = "", scale: int = 6) -> go.Figure:
    """(N, C, H, W) in [0, 1], C of 1 or 3, as one picture of `columns` a row, each pixel `scale` px wide, sharp."""
    n, channels, h, w = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full((rows * (h + 1) - 1, columns * (w + 1) - 1, 3), 255, dtype=np.uint8)
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().cpu().expand(n, 3, h, w).permute(0, 2, 3, 1)
    for i, picture in enumerate(pixels.numpy()):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        sheet[top : top + h, left : left + w] = picture
    raw = io.BytesIO()
    Image.fromarray(sheet).save(raw, "png", optimize=True)
    # as numbers the same picture is some forty times larger in the notebook and in the report
    source = "data:image/png;base64," + base64.b64encode(raw.getvalue()).decode()
    figure = go.Figure(go.Image(source=source, zsmooth=False, hoverinfo="skip"))
    longest = max(map(len, title.split("<br>")))
    width = max(320, sheet.shape[1] * scale + 20, 10 * longest + 40)  # a title wider than its picture is not cut
    edge = {"l": 10, "r": 10, "t": 50 if title else 10, "b": 10}
    figure.update_layout(template=TEMPLATE, title=title, margin=edge)
    figure.update_layout(height=sheet.shape[0] * scale + edge["t"] + 10, width=width)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def training_curves(
    records: Iterable[Mapping[str, Any]], *, key: str = "loss", title: str = "", y: str = ""
) -> go.Figure:
    """One curve a training from stored step records; a vector-valued key gives its mean over members."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for r in records:
        if r.get("kind") == "step" and key in r:
            xs, ys = curves.setdefault(r["training"], ([], []))
            xs.append(r["step"])
            ys.append(float(np.mean(r[key])))
    return lines(curves, title=title or f"{key} while training", x="step", y=y or key, markers=False)
