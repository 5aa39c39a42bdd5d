"""Soft tokens' panels: each returns a plotly figure computed from the run's own models when a control moves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import torch

from workbench.errors import WorkbenchError
from workbench.lab import figures
from workbench.models.thinking import embedding_table, replay
from workbench.papers.soft_tokens import Config, generate, gradient_parts, sigma_of, six_modes
from workbench.papers.soft_tokens_settings import Mode
from workbench.papers.soft_tokens_tasks import Questions, Task

SPLITS = {"test": "the trained skill", "other": "the skill not trained on"}


def words_of(task: Task, ids: Sequence[int]) -> list[str]:
    """One readable word an id."""
    return [str(task.tokenizer.decode([i])).strip() or repr(i) for i in ids]


def chain_controls(config: Config, questions: int) -> dict[str, widgets.Widget]:
    """Sliders of `mixtures`: the question, τ, the noise factor and the seed of the noise."""
    return {
        "index": widgets.IntSlider(0, 0, min(15, questions - 1), description="question"),
        "tau": widgets.FloatLogSlider(config.tau_soft, min=-4, max=0.3, description="temperature τ"),
        "factor": widgets.FloatSlider(config.factor, min=0, max=3, step=0.01, description="noise factor"),
        "seed": widgets.IntSlider(0, 0, 20, description="noise seed"),
    }


def _pick(questions: Questions, index: int, device: Any) -> Questions:
    part = slice(index, index + 1)
    return Questions(questions.ids[part], questions.mask[part], questions.truths[part]).to(device)


@torch.no_grad()
def mixtures(
    model: Any, task: Task, questions: Questions, *, index: int, tau: float, factor: float, seed: int = 0
) -> go.Figure:
    """One question thought through anew at (τ, noise factor): the mixture p of each chain step as stacked bars.

    Under each bar: the greedy shadow token. The title says how the answer came out, and how large the noise's norm
    is against the distance from an embedding to its nearest neighbour.
    """
    one = _pick(questions, index, model.device)
    mode = Mode("soft", tau, factor)
    chains = generate(model, task, one, mode, seed=seed)
    logits, _ = replay(model, chains, continuous=True)
    p = (logits[0] / max(tau, 1e-6)).softmax(-1)[chains.thought_mask[0]].cpu()
    shadow = words_of(task, chains.tokens[0][chains.thought_mask[0]].tolist())
    steps = [f"{t + 1}<br>{word}" for t, word in enumerate(shadow)]
    shown = p.sum(0).topk(min(8, p.shape[1])).indices.tolist()
    names = words_of(task, shown)
    answer = str(task.tokenizer.decode(chains.answer[0][chains.answer_mask[0]], skip_special_tokens=True))
    table = embedding_table(model).float()
    nearest = torch.cdist(table[:2000], table[:2000]).fill_diagonal_(float("inf")).amin(1).mean()
    radius = float(sigma_of(model, factor)) * table.shape[1] ** 0.5
    prompt = str(task.tokenizer.decode(one.ids[0][one.mask[0]], skip_special_tokens=True))
    title = (
        f"{prompt[-60:]} → {answer.strip()} (truth {one.truths[0]})<br>"
        f"noise norm {radius:.2f}, nearest other embedding {float(nearest):.2f}"
    )
    figure = figures.blank(title, "chain step, and its greedy shadow token", "weight in the mixture")
    for i, (token, name) in enumerate(zip(shown, names, strict=True)):
        colour = figures.PALETTE[i % len(figures.PALETTE)]
        figure.add_bar(x=steps, y=p[:, token].tolist(), name=name, marker_color=colour)
    rest = 1 - p[:, shown].sum(1)
    if float(rest.max()) > 0.01:
        figure.add_bar(x=steps, y=rest.tolist(), name="all others", marker_color="#cccccc")
    figure.update_layout(barmode="stack", margin_t=80)
    return figure


def _mean_curve(arms: Sequence[Mapping[str, Any]], split: str, mode: str) -> dict[int, float]:
    return {int(k): float(np.mean([a[split][mode][k][0] for a in arms])) for k in arms[0][split][mode]}


def by_arm(measured: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Arm -> its measures, one a seed."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for (arm, _), measures in measured.items():
        out.setdefault(arm, []).append(measures)
    return out


def pass_curves(measured: Mapping[tuple[str, int], Mapping[str, Any]], *, split: str, mode: str) -> go.Figure:
    """pass@k of every arm, mean over seeds; with one seed the band is the 95 % interval over questions."""
    curves, bands = {}, {}
    for arm, runs in by_arm(measured).items():
        curve = _mean_curve(runs, split, mode)
        curves[arm] = (list(curve), list(curve.values()))
        if len(runs) == 1:
            own = runs[0][split][mode]
            bands[arm] = ([max(0.0, own[k][1]) for k in own], [min(1.0, own[k][2]) for k in own])
    title = f"pass@k on {SPLITS[split]}, {mode}d chains"
    return figures.lines(curves, title=title, x="k (samples a question)", y="pass@k", bands=bands, log_x=True)


def table(measured: Mapping[tuple[str, int], Mapping[str, Any]], *, split: str, k: int) -> go.Figure:
    """The paper's table: how a model was trained (rows) against how its chain is made in the test (columns)."""
    arms = by_arm(measured)
    modes = list(next(iter(arms.values()))[0][split])
    rows = [[_mean_curve(runs, split, m).get(1 if m.endswith("greedy") else k, np.nan) for m in modes]
            for runs in arms.values()]  # fmt: skip
    title = f"training × inference on {SPLITS[split]}: greedy pass@1, sampled pass@{k}"
    figure = figures.heatmap(rows, title=title, x="inference", y="training", value="share right", x_labels=modes,
                             y_labels=list(arms))  # fmt: skip
    # the base model on top, as in the paper
    figure.update_yaxes(autorange="reversed", automargin=True, title_standoff=10)
    return figure


def trajectories(measured: Mapping[tuple[str, int], Mapping[str, Any]], *, key: str, y: str) -> go.Figure:
    """Where training went: greedy accuracy on the trained skill (x) against what became of the other skill (y).

    Read at one x: two arms at the same accuracy. Markers are validations, from the base model on.
    """
    figure = figures.blank(f"{y} along training", "greedy pass@1 on the trained skill (validation)", y)
    for i, arm in enumerate(("hard", "soft")):
        runs = [m for (a, _), m in measured.items() if a == arm]
        for n, m in enumerate(runs):
            points = [r for r in m["trail"] if key in r]
            figure.add_scatter(
                x=[r["hard"] for r in points], y=[r[key] for r in points], name=arm, mode="lines+markers",
                line_color=figures.PALETTE[i], showlegend=n == 0, opacity=0.7,
                text=[f"step {r['step']}" for r in points],
            )  # fmt: skip
    return figure


def entropy(measured: Mapping[tuple[str, int], Mapping[str, Any]], *, kind: str) -> go.Figure:
    """Entropy of the next token (τ = 1) by position of the chain, mean over seeds."""
    curves = {}
    for arm, runs in by_arm(measured).items():
        length = min(len(r["entropy"][kind]) for r in runs)
        mean = np.mean([r["entropy"][kind][:length] for r in runs], 0)
        curves[arm] = (list(range(1, length + 1)), mean.tolist())
    return figures.lines(curves, title=f"entropy along {kind} chains", x="chain step", y="entropy (nats)")


def gradient_paths(
    model: Any, task: Task, config: Config, questions: Questions, *, factor: float, taus: Sequence[float], seed: int = 0
) -> go.Figure:
    """Norm of the policy gradient through the softmax, through the table E, and of the answer, against τ."""
    some = Questions(questions.ids[:4], questions.mask[:4], questions.truths[:4]).to(model.device)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for tau in taus:
        parts = gradient_parts(model, task, replace(config, samples=8), Mode("soft", tau, factor), some, seed)
        for name, value in parts.items():
            xs, ys = curves.setdefault(name, ([], []))
            xs.append(tau)
            ys.append(max(value, 1e-12))
    figure = figures.lines(
        curves, title="where the gradient of one step comes from", x="temperature τ", y="gradient norm",
        log_x=True, log_y=True,
    )  # fmt: skip
    figure.update_yaxes(dtick=2, exponentformat="power")
    figure.update_xaxes(dtick=1, exponentformat="power")
    return figure


def learning(measured: Mapping[tuple[str, int], Mapping[str, Any]]) -> go.Figure:
    """Greedy validation in each arm's own mode, while it trains; mean over seeds."""
    curves = {}
    for arm, runs in by_arm(measured).items():
        trails = [[r for r in m["trail"] if r["step"] > 0] for m in runs]
        if arm == "base" or not trails[0]:
            continue
        xs = [r["step"] for r in trails[0]]
        curves[arm] = (xs, np.mean([[r["own"] for r in trail] for trail in trails], 0).tolist())
    if not curves:
        raise WorkbenchError("no arm was trained: there is no learning curve")
    return figures.lines(curves, title="greedy validation, own mode", x="optimiser step", y="share right")


def term_norms(steps: Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    """Gradient norms of the objective's two terms while an arm trains; steps: arm -> its logged steps."""
    curves = {}
    for arm, rows in steps.items():
        logged = [r for r in rows if "thought_norm" in r]
        for term, words in (("thought", "log density of the chain"), ("answer", "answer")):
            # where all chains of a step earn the same the gradient is zero up to rounding
            norms = [(r["step"], r[f"{term}_norm"]) for r in logged if r[f"{term}_norm"] > 1e-4]
            curves[f"{arm}: {words}"] = ([step for step, _ in norms], [norm for _, norm in norms])
    if not any(xs for xs, _ in curves.values()):
        raise WorkbenchError("no gradient norm was logged: train with norms=true")
    figure = figures.lines(
        curves, title="gradient norm of both terms of the objective, before clipping", x="optimiser step",
        y="gradient norm", log_y=True, markers=False,
    )  # fmt: skip
    return figure.update_yaxes(dtick=1, exponentformat="power")


def noise_sweep(config: Config, measured: Mapping[tuple[str, int], Mapping[str, Any]]) -> go.Figure:
    """Greedy validation, hard tokens, against the noise factor: soft arms that differ in it alone, mean over seeds."""
    usual, points = config.mode("soft"), {}
    for arm, runs in by_arm(measured).items():
        mode = config.mode(arm)  # type: ignore[arg-type]
        if replace(mode, factor=usual.factor) == usual:
            trails = [[r for r in m["trail"] if r["step"] > 0] for m in runs]
            kept = [max(t, key=lambda r: (r["own"], r["step"]))["hard"] for t in trails]
            points[mode.factor] = float(np.mean(kept)), float(np.mean([t[-1]["hard"] for t in trails]))
    if not points:
        raise WorkbenchError("no arm with soft tokens was trained: there is no noise to sweep")
    factors = sorted(points)
    before = [m["trail"][0]["hard"] for (arm, _), m in measured.items() if arm == "soft"]
    figure = figures.lines(
        {name: (factors, [points[f][i] for f in factors]) for i, name in enumerate(("kept step", "last step"))},
        title="soft training against its noise (hard inference)", x="noise factor, in units of the embeddings' rms",
        y="greedy validation, share right", levels={"base model": float(np.mean(before))} if before else None,
        log_x=True,
    )  # fmt: skip
    return figure.update_xaxes(tickvals=factors, ticktext=[f"{f:g}" for f in factors])


def mode_names(config: Config, *, sampled: bool) -> list[str]:
    """Names of the six test modes that sample (or not)."""
    return [name for name in six_modes(config) if name.endswith("sample") == sampled]
