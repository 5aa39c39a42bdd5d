"""DiDi-Instruct's panels: an unmasking film, quality against entropy and cost, the parts, the listed world."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from workbench.data.letter_classes import SYMBOLS, letter_world
from workbench.evaluation import enumeration as exact
from workbench.lab import figures
from workbench.models.masked_diffusion import sample
from workbench.papers.didi_instruct import Student
from workbench.papers.didi_instruct_settings import CUMULATIVE, LEAVE_ONE_OUT, Config
from workbench.papers.didi_instruct_study import Task, frontier, guidance, honest_cost

Measured = Mapping[tuple[str, int], Mapping[str, Any]]
NATS = "judge's loss (nats per token)"


def film(
    nets: Mapping[str, nn.Module], task: Task, config: Config, *, steps: int, shown: int, seed: int = 0,
    temperature: float = 1.0, guide: Student | None = None,
) -> go.Figure:  # fmt: skip
    """One sequence of each network after `shown` of `steps` steps: tokens new in this step are marked, masks are grey.

    A network named "RGAS" samples with the guide's critic. The prompt of the config stands first.
    """
    prompt = task.tokenizer(config.prompt)["input_ids"] if config.prompt else None
    figure = figures.blank(f"after step {shown} of {steps}", "position", "")
    for row, (name, net) in enumerate(nets.items()):
        frames = [torch.full((1, config.length), task.tokenizer.mask_token_id)]

        def keep(i: int, z: Tensor, frames: list[Tensor] = frames) -> None:
            frames.append(z)

        move = guidance(config, guide, steps).mover(net, temperature) if guide and name == "RGAS" else None
        sample(
            net, 1, config.length, steps, torch.Generator().manual_seed(seed), temperature=temperature, prompt=prompt,
            move=move, on_step=keep,
        )  # fmt: skip
        now, before = frames[min(shown, steps)][0], frames[max(0, min(shown, steps) - 1)][0]
        _strip(figure, len(nets) - 1 - row, now, before, task.tokenizer)
    figure.update_yaxes(tickvals=list(range(len(nets))), ticktext=list(reversed(list(nets))), range=[-0.6, len(nets)])
    figure.update_xaxes(range=[-0.6, config.length - 0.4], showgrid=False)
    return figure.update_layout(height=140 + 90 * len(nets), showlegend=False)


def _strip(figure: go.Figure, y: int, now: Tensor, before: Tensor, tokenizer: Any) -> None:
    mask = tokenizer.mask_token_id
    words = [" " if t == mask else tokenizer.decode([t]).replace("\n", "⏎").replace(" ", "·") for t in now.tolist()]
    fresh = [(a != b) for a, b in zip(now.tolist(), before.tolist(), strict=True)]
    colours = [
        "#e6e6e6" if t == mask else "#fbd5a5" if f else "#d6e9f8" for t, f in zip(now.tolist(), fresh, strict=True)
    ]
    figure.add_scatter(
        x=list(range(len(words))), y=[y] * len(words), mode="markers+text", text=[html.escape(w) for w in words],
        textfont={"size": 11}, marker={"symbol": "square", "size": 25, "color": colours}, hoverinfo="text",
    )  # fmt: skip


def _mean(measured: Measured, name: str, key: str) -> float | None:
    values = [m[key] for (n, _), m in measured.items() if n == name and key in m]
    return sum(values) / len(values) if values else None


def samplers(measured: Measured) -> dict[str, tuple[str, str]]:
    """Legend name → (job, prefix of its measures), of all that was measured."""
    there = {n for n, _ in measured}
    out = {"teacher": ("teacher", "T 1 "), "DiDi-Instruct": ("didi", ""), "with RGAS": ("didi", "guided ")}
    if "sdtt" in there:
        out["SDTT"] = ("sdtt", "")
    return {name: pair for name, pair in out.items() if pair[0] in there}


def by_nfe(measured: Measured, config: Config, *, key: str = "loss", cost: str = "student passes") -> go.Figure:
    """A measure against the steps, one curve a sampler, means over seeds; cost "all passes" counts the critic's too."""
    curves = {}
    for name, (job, prefix) in samplers(measured).items():
        xs, ys = [], []
        for steps in config.nfe:
            value = _mean(measured, job, f"{prefix}{key} @ {steps}")
            if value is not None:
                extra = sum(honest_cost(config, steps).values()) if prefix == "guided " else steps
                xs.append(extra if cost == "all passes" else steps)
                ys.append(value)
        curves[name] = (xs, ys)
    real = _mean(measured, "teacher", f"real {key}")
    names = {"loss": NATS, "entropy": "entropy inside a sequence (nats)", "pooled": "entropy of all tokens (nats)",
             "seconds": "seconds a sequence"}  # fmt: skip
    return figures.lines(
        curves, title=f"{names.get(key, key)} against cost", x=f"{cost} a sequence", y=names.get(key, key), log_x=True,
        log_y=key == "seconds", levels={"real text": real} if real is not None else None,
    )  # fmt: skip


def quality_entropy(measured: Measured, config: Config, *, steps: int = 4, by: str = "entropy") -> go.Figure:
    """The judge's loss against entropy at one NFE: the teacher's temperatures as a line, every other sampler a point.

    Below the line is better than the teacher at that entropy; to the left along it is only colder.
    """
    points: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    rows = [frontier(m, config, steps, by) for (n, _), m in measured.items() if n == "teacher"]
    mean = torch.tensor(rows).mean(0).T.tolist()
    points["teacher, by temperature"] = (mean[0], mean[1])
    for name, (job, prefix) in samplers(measured).items():
        x, y = (_mean(measured, job, f"{prefix}{k} @ {steps}") for k in (by, "loss"))
        if job != "teacher" and x is not None and y is not None:
            points[name] = ([x], [y])
    for variant in LEAVE_ONE_OUT:
        x, y = (_mean(measured, variant, f"{k} @ {steps}") for k in (by, "loss"))
        if x is not None and y is not None:
            points[variant] = ([x], [y])
    title = {"entropy": "entropy inside a sequence (nats)", "pooled": "entropy of all tokens (nats)"}[by]
    figure = figures.lines(points, title=f"quality and entropy at {steps} NFE", x=title, y=NATS)
    return figure.update_traces(marker_size=11)


def table(measured: Measured, config: Config, rows: Sequence[str], *, key: str = "loss") -> go.Figure:
    """Variants against the steps, means over seeds: the paper's ablation tables in miniature."""
    there = [v for v in rows if any(n == v for n, _ in measured)]
    z = [[_mean(measured, v, f"{key} @ {n}") for n in config.nfe] for v in there]
    names, values = [*there], [*z]
    if "didi" in there:
        names.append("didi with RGAS")
        values.append([_mean(measured, "didi", f"guided {key} @ {n}") for n in config.nfe])
    numbers = [[float("nan") if v is None else v for v in row] for row in values]
    figure = figures.heatmap(
        numbers, title=f"{key} by NFE", x="NFE", y="", value=key, x_labels=config.nfe, y_labels=names
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(type="category")
    return figure.update_layout(height=120 + 42 * len(names))


def listed_table(measured: Measured, rows: Sequence[str]) -> go.Figure:
    """Exact KL(sampler || text) of the listed world by steps, means over seeds; the first row is the teacher."""
    worlds = [m for (n, _), m in measured.items() if n == "listed"]
    there = ["teacher", *(v for v in rows if v in worlds[0])]
    steps = [k for k in worlds[0]["teacher"] if k.startswith("kl ")]
    z = [[sum(w[v][k] for w in worlds) / len(worlds) for k in steps] for v in there]
    figure = figures.heatmap(
        z, title="listed world: exact KL(sampler || text)", x="steps", y="", value="nats",
        x_labels=[k.removeprefix("kl ") for k in steps], y_labels=there,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(type="category")
    return figure.update_layout(height=120 + 42 * len(there))


ROWS = {"one part left out": ("didi", *LEAVE_ONE_OUT), "parts added one by one": CUMULATIVE}


@torch.no_grad()
def listed_law(nets: Mapping[str, nn.Module], *, steps: int, count: int = 20) -> go.Figure:
    """The most frequent windows of the listed world and how often each sampler writes them, exactly."""
    world = letter_world(length=len_of(nets))
    order = world.law.argsort(descending=True)[:count]
    strings = ["".join(SYMBOLS[i] for i in row) for row in exact.listing(3, world.length)[order].tolist()]
    figure = figures.blank(
        f"windows of {world.length} letters, {steps} steps", "window (a vowel, c consonant)", "share"
    )
    figure.add_bar(x=strings, y=world.law[order].tolist(), name="text", marker_color="#bbbbbb")
    for i, (name, net) in enumerate(nets.items()):
        law = exact.step_law(exact.token_table(net, world.length), steps)
        title = f"{name}, KL {float(exact.kl(law, world.law)):.3f}"
        marker = {"color": figures.PALETTE[i], "size": 9}
        figure.add_scatter(x=strings, y=law[order].tolist(), name=title, mode="markers", marker=marker)
    return figure


def len_of(nets: Mapping[str, nn.Module]) -> int:
    """The window length that the listed world's networks were made for."""
    net: Any = next(iter(nets.values()))
    return int(net.net.config.max_position_embeddings)


def critic_figure(history: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The critic's accuracy and the spread of the reward against the step: near 1, or a spread of 0, is no signal."""
    steps = [h["step"] for h in history]
    curves = {
        "critic's accuracy": (steps, [h["critic/accuracy"] for h in history]),
        "reward, standard deviation": (steps, [h["reward_sd"] for h in history]),
    }
    return figures.lines(curves, title="critic and reward", x="step", y="accuracy, nats", markers=False)
