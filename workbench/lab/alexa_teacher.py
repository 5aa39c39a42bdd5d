"""The Alexa Teacher Model's panels: each returns a plotly figure computed from the run's own networks and text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from workbench.data.public_text import language_shares
from workbench.data.spoken import spoken
from workbench.errors import WorkbenchError
from workbench.lab import figures
from workbench.models.encoders import SHAPES, IntentSlotModel, build_encoder, encoder_config, parameter_counts
from workbench.papers.alexa_teacher import ARMS, COMPARED, World, parse, predict
from workbench.papers.alexa_teacher_bench import PlainTokenizer

SCORES = {"semer": "SemER", "intent": "intent error", "slots": "slot error (1 - F1)", "exact": "exact-match error"}


def table(header: Sequence[str], columns: Sequence[Sequence[Any]], title: str, widths: Sequence[int] = ()) -> go.Figure:
    """A table as a figure, so that a panel can redraw it."""
    cells = {"values": [list(map(str, c)) for c in columns], "align": "left", "height": 26}
    head = {"values": [f"<b>{h}</b>" for h in header], "align": "left"}
    figure = go.Figure(go.Table(header=head, cells=cells, columnwidth=list(widths) or None))
    rows = max((len(c) for c in columns), default=0)
    margin = {"l": 10, "r": 10, "t": 50, "b": 10}
    return figure.update_layout(template=figures.TEMPLATE, title=title, height=110 + 30 * rows, margin=margin)


def shapes_table(vocabulary: int = 150_000) -> go.Figure:
    """The paper's encoder sizes as built here on the meta device: what it counts, and what is stored beside it."""
    rows = []
    for size in ("9.3B", "2.3B", "700M", "170M", "17M", "XLM-R Base", "DistilBERT"):
        with torch.device("meta"):
            net = build_encoder(encoder_config(size, PlainTokenizer(vocabulary), context=512), 0)
        counts, s = parameter_counts(net), SHAPES[size]
        rows.append((size, f"{s.layers} × {s.width}, FFN {s.ffn}", f"{counts['non-embedding'] / 1e6:,.1f} M",
                     f"{counts['total'] / 1e6:,.1f} M"))  # fmt: skip
    header = ["size", "layers × width", "non-embedding parameters", f"all, with {vocabulary:,} tokens"]
    return table(
        header, list(zip(*rows, strict=True)), "encoders at the paper's sizes (shapes inferred from its counts)"
    )


def spoken_view(text: str, language: str) -> go.Figure:
    """Words of a written sentence, and what is said; lower case alone beside it, which leaves the numbers."""
    alone = text.lower()
    forms = ["as written", "lower case alone", "spoken form"]
    return table(["form", "text"], [forms, [text, alone, spoken(text, language) or "(nothing)"]],
                 f"spoken form, {language}", (1, 5))  # fmt: skip


def mixture_view(world: World, *, alpha: float, share: float, seed: int = 0) -> go.Figure:
    """Shares of the languages in public and in-domain batches at exponent alpha, and lines at a spoken share."""
    figure = make_subplots(1, 2, specs=[[{"type": "xy"}, {"type": "table"}]], column_widths=[0.45, 0.55])
    for i, (name, text) in enumerate(world.sentences.items()):
        counts = [len(text.spoken[language]) for language in text.languages]
        for j, (exponent, told) in enumerate(((1.0, "as it comes"), (alpha, f"alpha {alpha:g}"))):
            figure.add_bar(
                x=text.languages, y=language_shares(counts, exponent).tolist(), name=f"{name}, {told}",
                marker_color=figures.PALETTE[2 * i + j], row=1, col=1,
            )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    public, lines, forms = world.sentences["public"], [], []
    for _ in range(7):
        language = public.languages[int(torch.randint(len(public.languages), (1,), generator=generator))]
        aloud = bool(torch.rand(1, generator=generator) < share)
        rows = (public.spoken if aloud else public.written)[language]
        row = rows[int(torch.randint(len(rows), (1,), generator=generator))]
        lines.append(world.tokenizer.decode(row, skip_special_tokens=True).strip()[:70])
        forms.append("spoken" if aloud else "written")
    figure.add_table(header={"values": ["form", "a public line"], "align": "left"}, columnwidth=[1, 5],
                     cells={"values": [forms, lines], "align": "left", "height": 26}, row=1, col=2)  # fmt: skip
    figure.update_yaxes(title_text="share of sentences", row=1, col=1)
    legend = {"orientation": "h", "y": -0.15}
    title = "which language a sentence is drawn from, and in which form"
    return figure.update_layout(template=figures.TEMPLATE, title=title, legend=legend, height=460)


@torch.no_grad()
def masked_view(
    nets: Mapping[str, Any], world: World, text: str, language: str, word: int, count: int = 6
) -> go.Figure:
    """What each encoder puts in the place of one masked word of a sentence: its most probable pieces."""
    words = spoken(text, language).split()
    if not words:
        raise WorkbenchError("type a sentence with at least one word")
    place = min(word, len(words)) - 1
    batch = world.tokenizer([words], is_split_into_words=True)
    pieces = [i for i, w in enumerate(batch.word_ids(0)) if w == place]
    ids = torch.tensor(batch["input_ids"])
    # one mask for the word, whatever its pieces
    ids = torch.cat([ids[:, : pieces[0]], torch.tensor([[world.vocabulary.mask]]), ids[:, pieces[-1] + 1 :]], 1)
    figure = make_subplots(1, len(nets), subplot_titles=list(nets), horizontal_spacing=0.12)
    for column, (name, net) in enumerate(nets.items(), 1):
        p = net(input_ids=ids).logits[0, pieces[0]].float().softmax(-1)
        top = p.topk(count)
        names = [world.tokenizer.decode([i]).strip() or "·" for i in top.indices.tolist()]
        labels = [f"{n} ({i})" if names.count(n) > 1 else n for i, n in enumerate(names)]
        figure.add_bar(x=top.values.tolist()[::-1], y=labels[::-1], orientation="h", showlegend=False, name=name,
                       marker_color=figures.PALETTE[column - 1], row=1, col=column)  # fmt: skip
    shown = " ".join("[MASK]" if i == place else w for i, w in enumerate(words))
    figure.update_xaxes(title_text="probability")
    return figure.update_layout(
        template=figures.TEMPLATE, title=f"{shown}   (it was: {words[place]})", height=380, margin_t=90
    )


def understanding_view(
    models: Mapping[str, IntentSlotModel], world: World, name: str, text: str, language: str
) -> go.Figure:
    """One model's reading of a sentence: probabilities of the likely intents, and of every slot on every word."""
    read = parse(models[name], world, text, language)
    slots = {tag[2:] for tag in world.labels.tags if tag != "O"}
    mass = {s: sum(read["slots"][:, i] for i, t in enumerate(world.labels.tags) if t[2:] == s) for s in sorted(slots)}
    kept = sorted(mass, key=lambda s: -float(torch.as_tensor(mass[s]).max()))[:8]
    z = [[*torch.as_tensor(mass[s]).tolist()] for s in kept]
    figure = make_subplots(1, 2, subplot_titles=["intent", "slot of each word"], column_widths=[0.32, 0.68],
                           horizontal_spacing=0.18)  # fmt: skip
    top = read["intent"].topk(min(6, len(world.labels.intents)))
    names = [world.labels.intents[i].removeprefix("Hass") for i in top.indices.tolist()]
    figure.add_bar(x=top.values.tolist()[::-1], y=names[::-1], orientation="h", showlegend=False,
                   marker_color=figures.PALETTE[0], row=1, col=1)  # fmt: skip
    columns = [f"{i + 1} {w}<br>{t}" for i, (w, t) in enumerate(zip(read["words"], read["tags"], strict=True))]
    figure.add_heatmap(z=z, x=columns, y=kept, colorscale="Blues", zmin=0, zmax=1, row=1, col=2,
                       colorbar={"title": {"text": "probability", "side": "right"}})  # fmt: skip
    found = ", ".join(f"{label} = {value}" for label, value in read["spans"]) or "no slot"
    return figure.update_layout(
        template=figures.TEMPLATE, title=f"{name}: {names[0]}; {found}", height=440, margin_t=90
    )


def confusion_view(
    models: Mapping[str, IntentSlotModel], world: World, name: str, test: str, only: int = 12
) -> go.Figure:
    """Intents as they are (rows) and as a model reads them (columns): the `only` intents with most mistakes."""
    if test not in world.tests:
        raise WorkbenchError(f"no test set {test!r}: choose from {', '.join(world.tests)}")
    read, _ = predict(models[name], world.encoded[test], world.labels, world.vocabulary.pad)
    known = {intent: i for i, intent in enumerate(world.labels.intents)}
    count = np.zeros((len(known), len(known)))
    for u, answer in zip(world.tests[test], read, strict=True):
        if u.intent in known:
            count[known[u.intent], known[answer]] += 1
    wrong = count.sum(1) + count.sum(0) - 2 * count.diagonal()
    kept = sorted(np.argsort(-wrong)[:only])
    names = [world.labels.intents[i].removeprefix("Hass") for i in kept]
    error = np.mean([u.intent != a for u, a in zip(world.tests[test], read, strict=True)])
    figure = figures.heatmap(
        count[np.ix_(kept, kept)], title=f"{name} on {test}: {100 * error:.1f} % of intents wrong", x="read as", y="is",
        value="utterances", x_labels=names, y_labels=names, colours="Blues",
    ).update_layout(height=560)  # fmt: skip
    figure.update_traces(texttemplate="%{z:d}")  # counts
    return figure.update_yaxes(automargin=True, title_standoff=12)


def errors_view(measured: Mapping[int, Any], *, score: str, test: str, kind: str = "tuned") -> go.Figure:
    """One error of every arm on one test set: bars of the mean over seeds, a dot a seed."""
    values: dict[str, list[float]] = {}
    for m in measured.values():
        for name, arm in m["arms"].items():
            if test in arm.get(kind, {}):
                values.setdefault(name, []).append(100 * arm[kind][test][score])
    if not values:
        raise WorkbenchError(f"this run has no {kind} encoders scored on {test!r}")
    return figures.bars(values, title=f"{SCORES[score]} on {test}, encoders {kind}", y=f"{SCORES[score]} (%)")


def changes_view(measured: Mapping[int, Any], seed: int) -> go.Figure:
    """Relative change of SemER between pairs of arms on one seed, with paired bootstrap intervals over utterances."""
    m = measured[seed]
    figure = figures.blank(f"relative change of SemER, covered test, seed {seed}", "change (%), negative is better", "")
    for new, base in reversed(COMPARED):
        if f"{new} / {base}" in m["changes"]:
            ours, theirs = (m["arms"][name]["tuned"]["covered"]["semer"] for name in (new, base))
            low, high = m["changes"][f"{new} / {base}"]
            at = 100 * (ours - theirs) / theirs
            figure.add_scatter(
                x=[at], y=[f"{new}<br>against {base}"], mode="markers", showlegend=False,
                marker={"size": 10, "color": figures.PALETTE[0]},
                error_x={"type": "data", "symmetric": False, "array": [high - at], "arrayminus": [at - low]},
            )  # fmt: skip
    figures.mark(figure, "x", 0, "no change")
    return figure.update_layout(height=130 + 52 * len(m["changes"]))


def size_view(measured: Mapping[int, Any], *, score: str, test: str, count: str) -> go.Figure:
    """Error against parameters, an arm a dot, coloured by its text: the gap at one size is the paper's message."""
    figure = figures.blank(f"{SCORES[score]} on {test}", f"{count} parameters", f"{SCORES[score]} (%)", log_x=True)
    found: dict[str, list[tuple[float, float, str]]] = {}
    for name, arm in next(iter(measured.values()))["arms"].items():
        if test in arm["tuned"]:
            seeds = [100 * m["arms"][name]["tuned"][test][score] for m in measured.values()]
            text = ARMS[name].text if ARMS[name].teacher is None else f"{ARMS[name].text}, distilled"
            found.setdefault(text, []).append((arm["parameters"][count], float(np.mean(seeds)), name))
    for i, (text, dots) in enumerate(sorted(found.items())):
        xs, ys, _ = zip(*sorted(dots), strict=True)
        figure.add_scatter(
            x=xs, y=ys, mode="markers", name=text, marker={"size": 11, "color": figures.PALETTE[i]}, cliponaxis=False
        )
    every = sorted(dot for dots in found.values() for dot in dots)
    sizes, errors = [dot[0] for dot in every], [dot[1] for dot in every]
    # names stand beside their dots in a column of their own, a line's height apart, so that none covers another
    low, high = 0.9 * min(errors), max(1.1 * max(errors), 1.0)
    pixel = (high - low) / 380
    for size in sorted(set(sizes)):
        column = [(y, name) for x, y, name in every if x == size]
        places = [y for y, _ in column]
        for i in range(1, len(places)):
            places[i] = max(places[i], places[i - 1] + 17 * pixel)
        places[-1] = min(places[-1], high - 9 * pixel)
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - 17 * pixel)
        for (y, name), place in zip(column, places, strict=True):
            figure.add_annotation(
                x=np.log10(size), y=y, text=name, ax=24, ay=(y - place) / pixel, xanchor="left", showarrow=True,
                arrowhead=0, arrowwidth=1, arrowcolor="#aaa", standoff=7, font_size=12,
            )  # fmt: skip
    edge = [np.log10(min(sizes)) - 0.08, np.log10(max(sizes)) + 0.35]
    figure.update_xaxes(range=edge).update_yaxes(range=[low, high])
    return figure.update_layout(height=520, legend={"orientation": "h", "y": 1, "yanchor": "bottom"}, margin_t=90)


def labels_view(measured: Mapping[int, Any], *, score: str, test: str, labels: int) -> go.Figure:
    """Error against labelled utterances a language, a line an encoder, mean over seeds; `labels` is their full number.

    Raises WorkbenchError for a run that fine-tuned on one number of labels alone.
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for name, arm in next(iter(measured.values()))["arms"].items():
        if arm.get("labels"):
            seeds = [m["arms"][name] for m in measured.values()]
            counts = sorted(int(n) for n in arm["labels"])
            y = [float(np.mean([100 * own["labels"][str(n)][test][score] for own in seeds])) for n in counts]
            full = float(np.mean([100 * own["tuned"][test][score] for own in seeds]))
            curves[name] = ([*counts, labels], [*y, full])
    if not curves:
        raise WorkbenchError("this run has one number of labels: set label_counts to smaller ones")
    every = sorted({x for xs, _ in curves.values() for x in xs})
    return figures.lines(
        curves, title=f"{SCORES[score]} on {test} against labels", x="labelled utterances a language",
        y=f"{SCORES[score]} (%)", log_x=True,
    ).update_xaxes(tickvals=every, ticktext=list(map(str, every)))  # fmt: skip


def losses_view(measured: Mapping[int, Any]) -> go.Figure:
    """Held-out MLM loss of every arm on its three texts, mean over seeds."""
    texts = list(next(iter(next(iter(measured.values()))["arms"].values()))["nll"])
    figure = figures.blank("masked-word loss on held-out text", "", "nats a masked token")
    for i, text in enumerate(texts):
        names = list(next(iter(measured.values()))["arms"])
        y = [float(np.mean([m["arms"][n]["nll"][text] for m in measured.values()])) for n in names]
        figure.add_bar(x=names, y=y, name=text, marker_color=figures.PALETTE[i])
    # above the bars: names of encoders are slanted below them
    return figure.update_layout(legend={"orientation": "h", "y": 1, "yanchor": "bottom"}, margin_t=90, height=460)
