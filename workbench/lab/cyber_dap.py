"""Cyber DAP's panels: figures computed from the run's own models and measures when a control moves."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from IPython.display import HTML

from workbench.config import override
from workbench.data.text import Windows
from workbench.errors import WorkbenchError
from workbench.evaluation import multiple_choice as mc
from workbench.evaluation.language import held_out_loss
from workbench.lab import figures
from workbench.lab.display import html_table
from workbench.papers.cyber_dap import Adapted, Job, adapt, paired
from workbench.papers.cyber_dap_material import PARTS, Material


def frontier(arms: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """A mark an arm: domain loss gained (y) against general loss given up (x), both in nats against the base."""
    base, symbols = arms["base"], ("circle", "diamond", "square")
    figure = figures.blank("what each arm gains and what it forgets", "forgetting: rise of the general loss (nats)",
                           "gain: fall of the security loss (nats)")  # fmt: skip
    for i, (name, m) in enumerate(arms.items()):
        figure.add_scatter(
            x=[m["nll general"] - base["nll general"]], y=[base["nll domain"] - m["nll domain"]], mode="markers",
            name=name, marker={"size": 13, "color": figures.PALETTE[i % 8], "symbol": symbols[i // 8]},
        )  # fmt: skip
    return figure


def sizes(arms: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """Gain, forgetting and accuracy of the arms that differ in the number of tokens alone, against the tokens."""
    base = arms["base"]
    chosen = sorted(
        ((m["tokens"], m) for name, m in arms.items() if name in ("1 %", "42 %", "dap")), key=lambda r: r[0]
    )
    tokens = [t for t, _ in chosen]
    figure = figures.lines(
        {"gain: security loss": (tokens, [base["nll domain"] - m["nll domain"] for _, m in chosen]),
         "forgetting: general loss": (tokens, [m["nll general"] - base["nll general"] for _, m in chosen])},
        title="gain and forgetting against tokens", x="tokens trained on, repetitions included", y="nats", log_x=True,
    )  # fmt: skip
    return _accuracy(figure, tokens, [m.get("trained page", 0.0) for _, m in chosen])


def _accuracy(figure: go.Figure, tokens: Sequence[int], points: Sequence[float]) -> go.Figure:
    """A second axis, on the right, with the accuracy on trained pages."""
    figure.add_scatter(x=list(tokens), y=list(points), name="accuracy on trained pages (right axis)", yaxis="y2",
                       mode="lines+markers", line={"dash": "dot", "color": figures.PALETTE[2]})  # fmt: skip
    return figure.update_layout(
        yaxis2={"overlaying": "y", "side": "right", "title": "accuracy (points)", "range": [0, 100], "showgrid": False,
                "tickvals": [0, 25, 50, 75, 100]},
        legend={"orientation": "h", "y": -0.25}, margin_r=80,
    )  # fmt: skip


def tokens_curve(job: Job, base: Adapted, *, tokens: Sequence[int], lr: float) -> go.Figure:
    """Adapts the base anew at several budgets and one learning rate: accuracy, and forgetting, against tokens.

    Every budget is a training of its own (seconds each), so that each ends its own schedule.
    """
    small = {k: Windows(w.tokens[: 16 * w.context + 1], w.context, 1, 0) for k, w in job.material.held.items()}
    items = [*job.material.items["trained page"][:40]]

    def account(model: Any, tokenizer: Any) -> tuple[float, float, float]:
        hits = mc.correct(items, mc.best(mc.channel_scores(model, tokenizer, items))) if items else []
        accuracy = 100 * sum(hits) / max(1, len(hits))
        return held_out_loss(model, small["domain"]), held_out_loss(model, small["general"]), accuracy

    rows = [account(base.model, base.tokenizer)]
    for budget in tokens:
        streams = {**job.material.streams, "curated": job.material.streams["curated"][: budget + 1]}
        config = override(job.config, {"lr": lr, "epochs": 1, "save_every": None})
        one = dataclasses.replace(job, config=config, material=dataclasses.replace(job.material, streams=streams),
                                  folder=job.folder / "panel" / f"{budget}-{lr:g}")  # fmt: skip
        adapted = adapt(one, progress=False)
        rows.append(account(adapted.model, adapted.tokenizer))
    xs = [0, *tokens]
    figure = figures.lines(
        {"gain: security loss": (xs, [rows[0][0] - r[0] for r in rows]),
         "forgetting: general loss": (xs, [r[1] - rows[0][1] for r in rows])},
        title=f"one pass at learning rate {lr:g}: gain and forgetting against tokens", x="tokens", y="nats",
    )  # fmt: skip
    return _accuracy(figure, xs, [r[2] for r in rows])


def next_tokens(models: Mapping[str, Any], tokenizer: Any, *, prompt: str, count: int = 8) -> go.Figure:
    """Probabilities of the next token after a typed prompt, for each model: the likeliest of any of them."""
    if not prompt.strip():
        raise WorkbenchError("type a prompt")
    rows = {name: mc.next_log_probs(m, tokenizer, [prompt], limit=m.config.max_position_embeddings)[0].exp()
            for name, m in models.items()}  # fmt: skip
    top = torch.stack(list(rows.values())).max(0).values.topk(count).indices.tolist()
    # as HTML entities: a generated token is text, never markup
    labels = [html.escape(repr(tokenizer.decode([t]))) for t in top]
    figure = figures.blank("the next token", "token", "probability")
    for i, (name, p) in enumerate(rows.items()):
        figure.add_bar(x=labels, y=p[top].tolist(), name=name, marker_color=figures.PALETTE[i])
    return figure.update_layout(barmode="group")


def letters(arms: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """Which letter each arm says over the security questions: a prior, where it differs from a quarter each."""
    figure = figures.blank("letters said, by likelihood", "letter", "share of answers")
    for i, (name, m) in enumerate((n, m) for n, m in arms.items() if "said" in m):
        figure.add_bar(x=list("ABCD"), y=m["said"], name=name, marker_color=figures.PALETTE[i])
    figures.mark(figure, "y", 0.25, "right answers")
    return figure.update_layout(barmode="group")


def position(model: Any, tokenizer: Any, material: Material, *, name: str, count: int = 40) -> go.Figure:
    """Accuracy by letter likelihood with the right option moved to each place in turn, over the same questions."""
    items = material.items[name][:count]
    limit = model.config.max_position_embeddings
    by_key: dict[str, tuple[list[str], list[float]]] = {"accuracy": ([], []), "said": ([], [])}
    turned = [mc.rotate(i, k) for k in range(4) for i in items]
    bias = mc.position_bias(turned, mc.best(mc.letter_scores(model, tokenizer, turned, limit=limit)))
    figure = figures.blank(f"{name}: the four cyclic orders of {len(items)} questions", "letter", "share")
    for i, key in enumerate(by_key):
        figure.add_bar(x=list("ABCD"), y=bias[key], name={"accuracy": "right, where the key is this letter",
                                                          "said": "says this letter"}[key],
                       marker_color=figures.PALETTE[i])  # fmt: skip
    return figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.25})


def harness(models: Mapping[str, Any], tokenizer: Any, material: Material, *, name: str, count: int = 40) -> go.Figure:
    """One set of greedy outputs read by four extractors: accuracy and the share that could not be read."""
    items = material.items[name][:count]
    figure = figures.blank(f"{name}: one output, four readings", "extractor", "share of answers")
    for i, (who, model) in enumerate(models.items()):
        texts = mc.generate(model, tokenizer, [mc.letter_prompt(q) for q in items], new_tokens=4,
                            limit=model.config.max_position_embeddings)  # fmt: skip
        read = {k: [extract(t) for t in texts] for k, extract in mc.EXTRACTORS.items()}
        right = [sum(mc.correct(items, r)) / len(items) for r in read.values()]
        lost = [sum(a is None for a in r) / len(items) for r in read.values()]
        colour = figures.PALETTE[i]
        figure.add_bar(x=list(read), y=right, name=f"{who}: right", marker_color=colour)
        figure.add_bar(x=list(read), y=lost, name=f"{who}: unreadable", marker_color=colour, opacity=0.4)
    return figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.25})


def answers(models: Mapping[str, Any], tokenizer: Any, items: Sequence[mc.Item], count: int = 3) -> HTML:
    """A few questions with what each model writes; everything a model or a file says is escaped."""
    rows = []
    chosen = items[:count]
    wrote = {who: mc.generate(m, tokenizer, [mc.letter_prompt(i) for i in chosen], new_tokens=12,
                              limit=m.config.max_position_embeddings) for who, m in models.items()}  # fmt: skip
    for n, item in enumerate(chosen):
        key = ", ".join(mc.LETTERS[k] for k in sorted(item.answers))
        rows.append([f"<pre style='white-space:pre-wrap'>{html.escape(mc.letter_prompt(item))}</pre>", html.escape(key),
                     *(f"<code>{html.escape(texts[n])}</code>" for texts in wrote.values())])  # fmt: skip
    return html_table(["question", "key", *(f"{who} writes" for who in wrote)], rows)


def gains(before: Mapping[str, Any], after: Mapping[str, Any]) -> HTML:
    """The paired account of `paired` as a table."""
    rows = []
    for r in paired(before, after):
        gain = f"{r['gain'].mean:+.1f} [{r['gain'].low:+.1f}, {r['gain'].high:+.1f}]"
        cells = (
            r["set"],
            r["n"],
            f"{r['before']:.1f}",
            f"{r['after']:.1f}",
            gain,
            r["fixed"],
            r["broken"],
            f"{r['p']:.3f}",
        )
        rows.append([html.escape(str(c)) for c in cells])
    header = ["questions", "n", "before (points)", "after", "gain, 95 % bootstrap", "fixed", "broken", "McNemar p"]
    return html_table(header, rows)


def scorers(arms: Mapping[str, Mapping[str, Any]]) -> HTML:
    """Each arm that was asked for letters: accuracy by every scorer, averaged over the security sets, in points."""
    ways = {"channel": "", "letter likelihood": ", letter likelihood", "generated": ", generated",
            "unreadable": ", unparsable"}  # fmt: skip
    rows = []
    for arm, m in arms.items():
        if any(f"{part}, generated" in m for part in PARTS):
            sets = [part for part in PARTS if part in m]
            rows.append([arm, *(f"{sum(m[part + end] for part in sets) / len(sets):.1f}" for end in ways.values())])
    return html_table(["arm", *(f"{way} (points)" for way in ways)], [[html.escape(c) for c in row] for row in rows])


def updates(before: Any, after: Any) -> go.Figure:
    """Where the weights moved: |change| / |before| of every matrix, by layer."""
    old = dict(before.named_parameters())
    moved = {n: ((p - old[n]).norm() / old[n].norm()).item() for n, p in after.named_parameters() if p.ndim >= 2}
    names = [n.removeprefix("model.").removesuffix(".weight").replace("layers.", "layer ") for n in moved]
    figure = figures.blank("how far each matrix moved", "matrix", "|change| / |before|")
    return figure.add_bar(x=names, y=list(moved.values()), marker_color=figures.PALETTE[0])
