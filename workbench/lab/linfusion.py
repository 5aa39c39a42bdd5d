"""LinFusion's panels: each returns a plotly figure computed from the run's own networks when a control moves."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import plotly.graph_objects as go
import torch
from diffusers.models.attention_processor import Attention
from plotly.subplots import make_subplots
from torch import Tensor, nn

from workbench.evaluation import cost as costs
from workbench.kernels.linear_attention import statistics
from workbench.lab import figures
from workbench.models.diffusion import Task, add_noise, ladder, predict, sample
from workbench.models.generalised_attention import GeneralisedLinearAttention, capture, self_attentions
from workbench.papers.linfusion import Config, draw_samples, noisy_batch


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clipped, for image_grid."""
    return (images.clamp(-1, 1) + 1) / 2


def short(name: str) -> str:
    """ "down_blocks.0...attn1" as "down 0.0": enough to tell one UNet's attentions apart."""
    parts = name.split(".")
    numbers = [p for p in parts if p.isdigit()][:2]
    return f"{parts[0].removesuffix('_blocks').removesuffix('_block')} {'.'.join(numbers)}"


@torch.no_grad()
def layer_input(unet: nn.Module, layer: int, task: Task, side: int, time: int, seed: int = 0) -> tuple[Any, Tensor]:
    """One self-attention of `unet` and its input x (1, N, d), while denoising a fresh noisy image at `time`."""
    module = list(self_attentions(unet).values())[layer]
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    batch = noisy_batch(task, torch.Generator().manual_seed(seed), 1, side)
    t = torch.full((1,), time)
    try:
        predict(unet, add_noise(task.scheduler, batch["x0"], batch["noise"], t), t, batch["condition"])
    finally:
        handle.remove()
    return module, seen[0]


@torch.no_grad()
def weights_of(module: Any, x: Tensor, token: int, head: int) -> Tensor:
    """Row `token` of M, (N,): what this token takes from every other, softmax or linear."""
    if isinstance(module, GeneralisedLinearAttention):
        return module.matrix(x)[0, head, token]
    attention = cast(Attention, module)
    q, k = (
        cast(nn.Linear, p)(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for p in (attention.to_q, attention.to_k)
    )
    return (q[0, head, token] @ k[0, head].mT * q.shape[-1] ** -0.5).softmax(-1)


def listening(
    unets: Mapping[str, nn.Module], task: Task, side: int, *, x: float, y: float, layer: int, head: int, time: int
) -> go.Figure:
    """Whose pixels do I listen to: one row of M as a picture, per network. x, y: the token, as shares of the side."""
    figure = make_subplots(1, len(unets), subplot_titles=list(unets), horizontal_spacing=0.02)
    for column, (name, unet) in enumerate(unets.items(), 1):
        module, inputs = layer_input(unet, layer, task, side, time)
        grid = round(inputs.shape[1] ** 0.5)
        px, py = (min(int(place * grid), grid - 1) for place in (x, y))
        row = weights_of(module, inputs, py * grid + px, head)
        figure.add_heatmap(z=row.view(grid, grid).tolist(), colorscale="Viridis", showscale=False, row=1, col=column)
        figure.add_scatter(x=[px], y=[py], mode="markers", marker={"color": "red", "symbol": "x", "size": 9},
                           showlegend=False, row=1, col=column)  # fmt: skip
        figure.layout.annotations[column - 1].text = f"{name}<br>row sum {row.sum().item():.3g}"
        axis = "" if column == 1 else str(column)
        figure.update_yaxes(autorange="reversed", visible=False, scaleanchor=f"x{axis}", row=1, col=column)
    figure.update_xaxes(visible=False)
    figure.update_layout(
        template=figures.TEMPLATE, height=380, margin_t=110, title="weights that the marked token gives to every token"
    )
    return figure


@torch.no_grad()
def resolution(unets: Mapping[str, nn.Module], task: Task, config: Config, *, side: int, time: int) -> go.Figure:
    """Mean and spread of every attn1 output at `side` px, beside the spread at the training side (hollow)."""
    figure = make_subplots(1, 2, subplot_titles=["standard deviation", "mean"])
    for i, (name, unet) in enumerate(unets.items()):
        colour = figures.PALETTE[i % len(figures.PALETTE)]
        for at, symbol in ((config.size, "circle-open"), (side, "circle")):
            batch = noisy_batch(task, torch.Generator().manual_seed(1), 8, at)
            t = torch.full((8,), time)
            with capture(unet) as seen:
                predict(unet, add_noise(task.scheduler, batch["x0"], batch["noise"], t), t, batch["condition"])
            labels = [short(n) for n in seen]
            for column, values in ((1, [a.std().item() for a in seen.values()]),
                                   (2, [a.mean().item() for a in seen.values()])):  # fmt: skip
                figure.add_scatter(
                    x=labels, y=values, mode="markers", name=f"{name}, {at} px", showlegend=column == 1,
                    marker={"color": colour, "symbol": symbol, "size": 11}, row=1, col=column,
                )  # fmt: skip
    figure.update_yaxes(type="log", title_text="std of attn1 output", row=1, col=1)
    figure.update_yaxes(title_text="mean of attn1 output", row=1, col=2)
    figure.update_xaxes(title_text="layer")
    figure.update_layout(template=figures.TEMPLATE, title=f"statistics at {side} px against {config.size} px (hollow)")
    return figure


def samples(
    unets: Mapping[str, nn.Module], task: Task, config: Config, *, scale: int, count: int = 6, seed: int = 0
) -> go.Figure:
    """Samples at `scale` times the training side from the same noise, one row a network."""
    rows = [draw_samples(config, task, unet, seed, scale, count) for unet in unets.values()]
    side = scale * config.size
    figure = figures.image_grid(to_unit(torch.cat(rows)), columns=count, scale=max(1, 96 // side))
    figure.update_layout(title=f"{side} px, one noise; rows from the top:<br>{', '.join(unets)}", margin_t=80)
    return figure.update_layout(height=figure.layout.height + 80, width=max(640, figure.layout.width))


def cost_figure(rows: Sequence[dict[str, Any]], key: str = "seconds") -> go.Figure:
    """Measured cost against tokens on log axes, exponents in the legend, the crossing with fused softmax marked."""
    curves, units = {}, {"seconds": "time (s)", "bytes": "peak memory (bytes)"}
    for method in dict.fromkeys(r["method"] for r in rows):
        tokens, values = costs.curve(rows, method, key)
        curves[f"{method} (exponent {costs.exponent(tokens, values):.2f})"] = (tokens, values)
    figure = figures.lines(curves, title=f"{units[key]} of one forward pass", x="tokens N", y=units[key],
                           log_x=True, log_y=True)  # fmt: skip
    tokens, linear = costs.curve(rows, "linear", key)
    cross = costs.crossing(tokens, linear, costs.curve(rows, "softmax, SDPA", key)[1])
    if cross:  # as a curve: plotly places an annotated line wrongly on a logarithmic axis
        ends = [min(linear), max(r[key] for r in rows)]
        name = f"linear is cheaper than SDPA from about {cross:.0f} tokens"
        figure.add_scatter(x=[cross, cross], y=ends, mode="lines", name=name, line={"dash": "dot", "color": "#666"})
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return figure


@lru_cache(maxsize=16)
def measured_cost(heads: int, width: int, longest: int) -> tuple[dict[str, Any], ...]:
    """Cost rows of this machine, measured once per setting of the panel."""
    tokens = [n for n in (256, 512, 1024, 2048, 4096, 8192) if n <= longest]
    return tuple(costs.cost(tokens, heads=heads, width=width, budget=0.03, limit=0.5))


@torch.no_grad()
def state(unet: nn.Module, task: Task, side: int, *, share: float, strips: int, permute: bool, layer: int) -> go.Figure:
    """S and s of one head after `share` of the tokens came in; permuting them or averaging strips changes nothing."""
    module, x = layer_input(unet, layer, task, side, 500)
    _, k, v = module.features(x)
    n = k.shape[2]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)) if permute else torch.arange(n)
    order = order[: max(strips, int(share * n) // strips * strips)]
    parts = [statistics(k[:, :, c], v[:, :, c]) for c in order.chunk(strips)]
    S = torch.stack([p[0] for p in parts]).mean(0)
    s = torch.stack([p[1] for p in parts]).mean(0)
    whole, _ = statistics(k, v)
    gap = (S - whole).abs().max().item()
    figure = make_subplots(1, 2, column_widths=[0.8, 0.2], subplot_titles=["S = mean of k vᵀ", "s = mean of k"])
    figure.add_heatmap(z=S[0, 0].tolist(), coloraxis="coloraxis", row=1, col=1)
    figure.add_heatmap(z=s[0, 0][:, None].tolist(), coloraxis="coloraxis", row=1, col=2)
    figure.update_yaxes(autorange="reversed", title_text="feature of k", row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=1, col=2)
    figure.update_xaxes(title_text="feature of v", row=1, col=1)
    title = f"{len(order)} of {n} tokens; largest difference from the whole image's S: {gap:.2e}"
    figure.update_layout(template=figures.TEMPLATE, coloraxis={"colorscale": "RdBu", "cmid": 0}, title=title)
    return figure


def features(students: Mapping[str, Mapping[str, Any]], layers: Sequence[str], scale: int) -> go.Figure:
    """L_feat of every layer, one curve a variant; students: variant -> measures of the study."""
    labels = [short(name) for name in layers]
    figure = figures.blank(f"feature error per layer at {scale}x the training side", "layer", "L_feat (squared units)")
    for i, (variant, m) in enumerate(students.items()):
        figure.add_scatter(x=labels, y=m[f"feat_layers x{scale}"], name=variant, mode="lines+markers",
                           line_color=figures.PALETTE[i % len(figures.PALETTE)])  # fmt: skip
    figure.update_yaxes(type="log")
    return figure


def board(students: Mapping[str, Mapping[str, Any]], scales: Sequence[int], key: str = "kd") -> go.Figure:
    """One loss of every variant against the size of the canvas."""
    curves = {name: (list(scales), [m[f"{key} x{s}"] for s in scales]) for name, m in students.items()}
    y = f"{key} (squared error)"
    return figures.lines(curves, title=f"{key} on fresh images", x="side, in training sides", y=y, log_y=True)


def decay_ranks(*, tokens: int, forget: float, rank: int) -> go.Figure:
    """Mamba2's decay mask, and how well F Gᵀ of rank r stands in for it: what generalised linear attention absorbs."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    mask = torch.where(distance >= 0, (1 - forget) ** distance.clamp(min=0).double(), 0.0)
    U, values, V = torch.linalg.svd(mask)
    near = U[:, :rank] * values[:rank] @ V[:rank]
    error = ((near - mask).norm() / mask.norm()).item()
    figure = make_subplots(1, 3, subplot_titles=["mask", f"rank {rank}: {100 * error:.0f} % off", "singular values"])
    for column, z in ((1, mask), (2, near)):
        figure.add_heatmap(z=z.tolist(), colorscale="Viridis", showscale=False, row=1, col=column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    figure.add_scatter(x=list(range(1, tokens + 1)), y=values.tolist(), mode="lines", showlegend=False, row=1, col=3)
    figure.update_yaxes(type="log", row=1, col=3)
    figure.update_layout(
        template=figures.TEMPLATE, title="a decay mask is nearly low-rank once it forgets slowly", height=360
    )
    return figure


def climb(unet: nn.Module, task: Task, side: int, *, first: float, second: float, seed: int = 0) -> go.Figure:
    """SDEdit ladder from a sample at the training side: twice and four times the side, re-noised and denoised."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *task.shape(side), generator=generator)
    low = sample(unet, task.scheduler, noise, task.condition(2), steps=15)
    rungs = ladder(unet, task.scheduler, low, task.condition(2), [first, second], generator, steps=15)
    big = [torch.nn.functional.interpolate(task.decode(r), size=4 * side, mode="nearest") for r in rungs]
    title = f"{side}, {2 * side} and {4 * side} px; strengths {first:g} and {second:g}"
    return figures.image_grid(to_unit(torch.cat(big)), columns=2, title=title, scale=4)
