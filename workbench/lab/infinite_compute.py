"""Figures and panels of the infinite-compute notebook, each drawn from the run's models and records."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import torch

from workbench.data.text import ALPHABET, decode
from workbench.evaluation.scaling_laws import fit_power_law
from workbench.lab.figures import PALETTE, blank, heatmap, lines
from workbench.papers.infinite_compute import Study, Trained, k_limit, load_model
from workbench.papers.infinite_compute_settings import Setting
from workbench.papers.infinite_compute_study import Distilled, Ensembles, Recipes, asymptote_band

NATS = "loss (nats per token)"


def overfit_figure(curves: Mapping[float, Mapping[int, Sequence[Trained]]]) -> go.Figure:
    """Train (thin) and report loss (bold) against epochs, one colour a decay; means over groups."""
    figure = blank("More epochs: who over-fits?", "epochs E", NATS, log_x=True)
    for colour, (decay, by_epoch) in zip(PALETTE, curves.items(), strict=False):
        epochs = sorted(by_epoch)
        for part, style in (("report", {"width": 3}), ("train", {"width": 1, "dash": "dot"})):
            ys = [fmean(getattr(t, part) for t in by_epoch[e]) for e in epochs]
            name = f"λ = {decay:g}, {'held out' if part == 'report' else 'training text'}"
            figure.add_scatter(x=epochs, y=ys, name=name, mode="lines+markers", line={"color": colour, **style})
    return figure


def recipe_figure(recipes: Recipes, tokens: int) -> go.Figure:
    """Loss against N for both recipes at one budget with the spread over groups; the tuned one's law and limit."""
    count = len(next(iter(recipes.models.values())))
    figure = blank(f"Two recipes at D = {tokens:,} tokens", "parameters N", NATS, log_x=True)
    for colour, recipe in zip(PALETTE[1::-1], ("standard", "regularised"), strict=True):
        groups = [recipes.losses(recipe, tokens, i) for i in range(count)]
        sizes = list(groups[0])
        means = [fmean(g[n] for g in groups) for n in sizes]
        spread = [max(g[n] for g in groups) - m for n, m in zip(sizes, means, strict=True)]
        figure.add_scatter(x=sizes, y=means, name=recipe, mode="lines+markers", line={"color": colour},
                           error_y={"type": "data", "array": spread} if count > 1 else None)  # fmt: skip
        if recipe == "regularised" and len(sizes) >= 2:
            law, (low, high) = asymptote_band(groups)
            label = f"extrapolated limit {law.E:.3f} [{low:.3f}, {high:.3f}]; best measured {min(means):.3f}"
            figure.add_hline(y=law.E, line={"dash": "dash", "color": colour}, annotation_text=label)
    return figure


def fit_panel(points: Mapping[str, Mapping[float, float]]) -> tuple[Any, dict[str, widgets.Widget]]:
    """(draw, controls) for `explore`: leave points of a curve out, free or fix the exponent; see the limit move."""
    names = list(points)
    most = max(map(len, points.values()))
    controls: dict[str, widgets.Widget] = {
        "curve": widgets.Dropdown(options=names, description="curve"),
        "first": widgets.IntSlider(0, 0, most - 2, description="drop first"),
        "last": widgets.IntSlider(0, 0, most - 2, description="drop last"),
        "exponent": widgets.FloatSlider(1.0, min=0.0, max=2.0, step=0.1, description="exponent (0: free)"),
    }

    def draw(curve: str, first: int, last: int, exponent: float) -> go.Figure:
        xs, ys = list(points[curve]), list(points[curve].values())
        kept = slice(first, len(xs) - last)
        law = fit_power_law(xs[kept], ys[kept], exponent=exponent or None)
        smooth = np.geomspace(min(xs), max(xs) * 8, 80)
        title = f"{curve}: {law.A:.3g} / x^{law.a:.2f} + {law.E:.3f}"
        curve_xy = (smooth.tolist(), np.asarray(law(smooth)).tolist())
        figure = lines({"law": curve_xy}, title=title, x="x (N, K or D)", y=NATS, log_x=True, markers=False,
                       levels={f"limit {law.E:.3f} (extrapolated)": law.E})  # fmt: skip
        used = [i in range(*kept.indices(len(xs))) for i in range(len(xs))]
        colours = [PALETTE[1] if u else "#bbbbbb" for u in used]
        figure.add_scatter(
            x=xs, y=ys, mode="markers", name="measured (grey: left out)", marker={"color": colours, "size": 9}
        )
        return figure

    return draw, controls


def search_panel(searches: Mapping[str, tuple[Setting, bool, Mapping[Setting, float]]]) -> tuple[Any, dict]:
    """(draw, controls) for `explore`: the losses a search saw, epochs × decay at the learning rate chosen."""
    controls = {
        "size": widgets.Dropdown(options=list(searches), description="size"),
        "lr": widgets.SelectionSlider(
            options=sorted({s.lr for _, _, seen in searches.values() for s in seen}),
            value=next(iter(searches.values()))[0].lr, description="lr",
        ),
    }  # fmt: skip

    def draw(size: str, lr: float) -> go.Figure:
        best, certified, seen = searches[size]
        here = {(s.epochs, s.decay): v for s, v in seen.items() if s.lr == lr}
        epochs, decays = sorted({e for e, _ in here}), sorted({d for _, d in here})
        z = [[here.get((e, d), float("nan")) for d in decays] for e in epochs]
        word = "certified: no neighbour is better" if certified else "not certified"
        title = f"{size}: optimum E = {best.epochs}, lr = {best.lr:g}, λ = {best.decay:g} ({word})"
        return heatmap(z, title=title, x="weight decay λ", y="epochs E", value="tune loss (nats)",
                       x_labels=decays, y_labels=epochs)  # fmt: skip

    return draw, controls


def ensemble_figure(found: Ensembles) -> go.Figure:
    """Loss of K members together: one curve a setting and size (means over groups), dashed to its K → ∞ limit."""
    figure = blank("Averaging the logits of K members", "members K", NATS)
    for colour, ((kind, size), curves) in zip(PALETTE, found.curves.items(), strict=False):
        mean = np.mean(curves, 0).tolist()
        ks = list(range(1, len(mean) + 1))
        name = f"{size}, tuned for {'K → ∞' if kind == 'member' else 'K = 1'}"
        figure.add_scatter(x=ks, y=mean, name=name, mode="lines+markers", line={"color": colour})
        if len(mean) >= 3:
            limit = k_limit(mean).E
            figure.add_scatter(x=[ks[-1], ks[-1] + 2], y=[limit, limit], mode="lines", name=f"limit {limit:.3f}",
                               line={"color": colour, "dash": "dash"}, showlegend=False)  # fmt: skip
    return figure


def microscope(study: Study, members: Sequence[Trained]) -> tuple[Any, dict[str, widgets.Widget]]:
    """(draw, controls) for `explore`: at one place of the held-out text, members' and averages' next-token bars."""
    corpus = study.corpus(members[0].cell.tokens)
    models = [load_model(t, study.config, corpus.vocabulary) for t in members]
    context = study.config.context
    text = torch.as_tensor(np.asarray(corpus.report[: 40 * context]).astype(np.int64))
    controls: dict[str, widgets.Widget] = {
        "position": widgets.IntSlider(context * 2, min=context, max=len(text) - 2, description="position"),
        "k": widgets.IntSlider(len(models), min=1, max=len(models), description="members K"),
    }

    @torch.no_grad()
    def draw(position: int, k: int) -> go.Figure:
        seen = text[position - context : position][None]
        logits = torch.stack([m(seen.to(next(m.parameters()).device))[0, -1].float().cpu() for m in models[:k]])
        logit_mean, probability_mean = logits.mean(0).softmax(-1), logits.softmax(-1).mean(0)
        top = logit_mean.topk(8).indices.tolist()
        truth = int(text[position])
        top = top if truth in top else [*top[:-1], truth]
        label = (
            [repr(ALPHABET[i]) + (" ← truth" if i == truth else "") for i in top]
            if corpus.vocabulary == len(ALPHABET)
            else top
        )
        shown = decode(seen[0]).replace("\n", "⏎") if corpus.vocabulary == len(ALPHABET) else ""
        figure = blank(f"…{shown}▮", "next token", "probability")
        for i, row in enumerate(logits.softmax(-1)):
            figure.add_bar(x=label, y=row[top].tolist(), name=f"member {i + 1}", marker_color="#c8c8c8")
        figure.add_bar(x=label, y=logit_mean[top].tolist(), name="mean of logits", marker_color=PALETTE[0])
        figure.add_bar(x=label, y=probability_mean[top].tolist(), name="mean of probabilities", marker_color=PALETTE[1])
        return figure

    return draw, controls


def inversion_panel(recipes: Recipes) -> tuple[Any, dict[str, widgets.Widget]]:
    """(draw, controls) for `explore`: drop a loss on the standard recipe's data law; read what data it is worth."""
    law = recipes.data_law
    assert law is not None, "the data law needs three budgets"
    count = len(next(iter(recipes.models.values())))
    budgets = sorted({d for _, d, _ in recipes.models})
    best = [fmean(min(recipes.losses("standard", d, i).values()) for i in range(count)) for d in budgets]
    slider = widgets.FloatSlider(
        best[-1], min=min(law.E + 0.01, best[-1] - 0.3), max=best[0], step=0.01, description="loss"
    )

    def draw(loss: float) -> go.Figure:
        worth = law.inverse(loss)
        smooth = np.geomspace(budgets[0], max(budgets[-1] * 4, min(worth, budgets[-1] * 64)), 100)
        title = f"a loss of {loss:.2f} is worth {worth:,.0f} tokens to the standard recipe" if np.isfinite(worth) else (
            f"a loss of {loss:.2f} lies at or below the standard law's asymptote {law.E:.2f}")  # fmt: skip
        curve_xy = (smooth.tolist(), np.asarray(law(smooth)).tolist())
        figure = lines({"standard law": curve_xy}, title=title, x="tokens D", y=NATS, log_x=True, markers=False,
                       levels={"loss": loss})  # fmt: skip
        figure.add_scatter(x=budgets, y=best, mode="markers", name="measured", marker={"size": 10, "color": PALETTE[1]})
        if np.isfinite(worth):
            figure.add_vline(x=worth, line={"dash": "dot", "color": "#666"})
        return figure

    return draw, {"loss": slider}


def distil_figure(found: Distilled) -> go.Figure:
    """Students by arm (dots: groups) between the single model's loss and the teacher ensemble's."""
    figure = blank("Students with the same number of steps", "text the student trains on", NATS)
    for colour, (arm, students) in zip(PALETTE, found.students.items(), strict=False):
        ys = [t.report for t in students]
        figure.add_scatter(
            x=[arm] * len(ys), y=ys, mode="markers", name=arm, marker={"color": colour, "size": 8, "opacity": 0.6}
        )
        dash = {"color": colour, "size": 16, "symbol": "line-ew", "line": {"width": 3, "color": colour}}
        figure.add_scatter(x=[arm], y=[fmean(ys)], mode="markers", showlegend=False, marker=dash)
    for name, values in (("single model", found.single), ("teacher ensemble", found.ensemble)):
        figure.add_hline(y=fmean(values), line={"dash": "dash", "color": "#666"}, annotation_text=name)
    return figure
