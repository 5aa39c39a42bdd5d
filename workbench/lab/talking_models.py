"""Talking Models' panels: each returns a plotly figure computed from the run's own models when a control moves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from workbench.data import shifted_digits
from workbench.errors import WorkbenchError
from workbench.evaluation.intervals import mean_interval
from workbench.lab import figures
from workbench.losses.knowledge import correlation_distance, standardise
from workbench.papers.talking_models import Config, Pupil
from workbench.papers.talking_models_study import (
    Job,
    Known,
    gain,
    load_job,
    message_measures,
    seeds_of,
    train_student,
)  # fmt: skip
from workbench.papers.talking_models_tasks import Table, Task, at_gaps, evaluate, load_task, load_teacher


@lru_cache(maxsize=32)
def _loaded(folder: Path, config: Config, task: str, arm: str, seed: int) -> tuple[Pupil, Task]:
    job = Job(config, task, arm, seed, config.gap, folder)
    data, teacher = load_job(job)
    return train_student(job, data, teacher, progress=False), data


def pupil_of(folder: Path, config: Config, task: str, arm: str, seed: int) -> tuple[Pupil, Task]:
    """A finished student of a run with its voices and teacher, from its checkpoint (trained where it is not there)."""
    return _loaded(folder, config, task, arm, seed)


# --- data -------------------------------------------------------------------------------------------------------------


def long_tail(task: Task) -> go.Figure:
    """How many ratings each user and each item has, sorted: the teacher's pre-training data."""
    if not isinstance(task.pretrain, Table):
        raise WorkbenchError("there are no pre-training ratings here: the teacher was brought along")
    ids = task.pretrain.inputs
    curves = {}
    for name, column in (("items", 2), ("users", 1)):
        counts = torch.bincount(ids[:, column]).sort(descending=True).values
        counts = counts[counts > 0]
        curves[name] = (list(range(1, len(counts) + 1)), counts.tolist())
    most = sum(curves["items"][1][: len(curves["items"][1]) // 5]) / len(ids)
    title = f"{len(ids):,} ratings of the teacher, {most:.0%} of them of a fifth of the items"
    return figures.lines(
        curves, title=title, x="rank", y="ratings", log_x=True, log_y=True, markers=False
    )  # fmt: skip


def digits(gap: float, seed: int = 0, count: int = 12) -> go.Figure:
    """Downstream pictures at one place of the dial, below the teacher's own upright ones."""
    split = shifted_digits.load(gap=gap, seed=seed)
    pictures = torch.cat([split.pretrain.pixels[:count], split.test.pixels[:count]])
    title = f"above: the teacher's digits<br>below: downstream, gap {gap:g} ({90 * gap:.0f} degrees)"
    return figures.image_grid((pictures + 1) / 2, columns=count, title=title, scale=6)


# --- results ----------------------------------------------------------------------------------------------------------


def gains(known: Known, config: Config, task: str, gap: float, against: str = "alone") -> go.Figure:
    """Error every arm saves against one of them, a bar an arm, a dot a seed."""
    arms = [a for a in dict.fromkeys(arm for t, g, arm, _ in known if (t, g) == (task, gap)) if a != "teacher"]
    values = {}
    for arm in arms:
        found = [gain(known, task, gap, seed, arm, against) for seed in seeds_of(known)]
        if arm != against and any(v is not None for v in found):
            values[arm] = [v for v in found if v is not None]
    if not values:
        raise WorkbenchError(f"no pair of {against!r} and another arm was trained at gap {gap:g}")
    unit = "stars RMSE" if task == "ratings" else "share of test pictures"
    return figures.bars(
        values, title=f"{task}, gap {gap:g}: error saved against {against!r}", y=f"error saved ({unit})", x="arm"
    )  # fmt: skip


def diagnosis(known: Known, config: Config, task: str) -> str:
    """A line an arm that talks, the mean over seeds: what its messages are like on test inputs (message_measures)."""
    columns = {"echo": "echo", "lecture": "lecture", "mc": "d(messages)", "sc": "L_SC", "rank": "rank",
               "probe": "probe", "train": "train", "error": "test"}  # fmt: skip
    lines = [f"{task:18} " + " ".join(f"{title:>11}" for title in columns.values())]
    for arm in config.arms:
        rows = [known[key] for key in known if key[:3] == (task, config.gap, arm) and "echo" in known[key]]
        if rows:
            means = (sum(r[key] for r in rows) / len(rows) for key in columns)
            lines.append(f"  {arm:16} " + " ".join(f"{mean:11.2f}" for mean in means))
    return "\n".join(lines)


def dial(known: Known, config: Config, task: str) -> go.Figure:
    """The gain of two-way communication over logit distillation, and of both over alone, against the gap."""
    pairs = {"two-way over logit KD": ("two-way", "logit KD"), "two-way over alone": ("two-way", "alone"),
             "logit KD over alone": ("logit KD", "alone")}  # fmt: skip
    curves, bands = {}, {}
    for name, (better, worse) in pairs.items():
        xs, means, low, high = [], [], [], []
        for at in sorted(at_gaps(config)):
            found = [gain(known, task, at, seed, better, worse) for seed in seeds_of(known)]
            values = [v for v in found if v is not None]
            if values:
                interval = mean_interval(values)
                xs.append(at)
                means.append(interval.mean)
                finite = np.isfinite(interval.low)
                low.append(interval.low if finite else interval.mean)
                high.append(interval.high if finite else interval.mean)
        if xs:
            curves[name], bands[name] = (xs, means), (low, high)
    unit = "stars RMSE" if task == "ratings" else "share of test pictures"
    return figures.lines(
        curves, bands=bands, title=f"{task}: gain against the distance of the downstream task", levels={"no gain": 0.0},
        x="gap (0: as the teacher knows it, 1: far)", y=f"error saved ({unit})",
    )  # fmt: skip


def train_at(config: Config, folder: Path, task: str, gap: float, steps: int, seed: int) -> go.Figure:
    """The gap dial: alone, logit KD and two-way trained anew at this place, for `steps` steps; test errors."""
    own = replace(config, gap=gap, gaps=(), steps=steps)
    errors = {}
    for arm in ("alone", "logit KD", "two-way"):
        # kept in a folder of their own: moving back to a place loads what was trained there
        job = Job(own, task, arm, seed, gap, folder / "dial" / f"{steps} steps")
        data = load_task(own, task, seed, gap)
        teacher = load_teacher(own, data, seed, folder / "teachers")
        errors[arm] = [evaluate(train_student(job, data, teacher, progress=False).student, data.test)]
    errors["the teacher itself"] = [evaluate(teacher, data.test)]
    title = f"{task}: trained now at gap {gap:g}, {steps} steps, seed {seed}"
    return figures.bars(errors, title=title, y=f"test error ({data.unit})", x="arm")


def elsewhere(
    config: Config, folder: Path, task: str, *, teacher: tuple[int, int], student: tuple[int, int], message: int,
    steps: int, seed: int,
) -> go.Figure:  # fmt: skip
    """Two-way students trained anew: messages of other layers (low, high) or another width, and as in the run.

    Left their errors on the VALIDATION part beside the student alone's; right what their messages there are like.
    """
    own = replace(config, gaps=(), steps=steps)
    here = replace(
        own, teacher_low=teacher[0], teacher_high=teacher[1], student_low=student[0], student_high=student[1],
        message=message,
    )  # fmt: skip
    data = load_task(own, task, seed)
    shown = replace(data, test=data.validation)  # what is chosen by moving a slider is not chosen on the test part
    figure = make_subplots(1, 2, subplot_titles=("validation error", "messages, validation part"))
    trained = (("alone", own, "alone"), ("as in the run", own, "two-way"), ("as chosen", here, "two-way"))
    for place, (name, c, arm) in enumerate(trained):
        cut = f"{steps} steps, T {c.teacher_low}-{c.teacher_high}, S {c.student_low}-{c.student_high}, k {c.message}"
        stages = load_teacher(c, data, seed, folder / "teachers")
        job = Job(c, task, arm, seed, c.gap, folder / "elsewhere" / cut)
        pupil = train_student(job, data, stages, progress=False)
        colour = figures.PALETTE[place]
        figure.add_bar(x=[name], y=[evaluate(pupil.student, data.validation)], marker_color=colour, showlegend=False,
                       row=1, col=1)  # fmt: skip
        if arm == "two-way":
            found = message_measures(pupil, shown)
            values = {"read by a probe": found["probe"], "directions / k": found["rank"] / c.message,
                      "echo: 1 - d / 2": 1 - found["echo"] / 2}  # fmt: skip
            figure.add_bar(x=list(values), y=list(values.values()), marker_color=colour, name=f"two-way, {name}",
                           row=1, col=2)  # fmt: skip
    figure.update_yaxes(title_text=data.unit, row=1, col=1)
    figure.update_yaxes(title_text="share", row=1, col=2)
    figure.update_traces(texttemplate="%{y:.3g}", textposition="inside")
    title = f"{task}: teacher {teacher[0]} to {teacher[1]}, student {student[0]} to {student[1]}, k = {message}"
    return figure.update_layout(template=figures.TEMPLATE, title=title, height=440, legend={"orientation": "h"})


# --- messages ---------------------------------------------------------------------------------------------------------


def _example(task: Task, index: int) -> tuple[dict[str, Tensor], Tensor]:
    # a batch of one has no spread to standardise over, so its neighbours come along
    return task.test.take((torch.arange(64) + index) % len(task.test))


def _in_scale_of(heard: Tensor, state: Tensor) -> Tensor:
    """`heard` with the mean and spread that `state` has over the batch, for a head that knows those alone."""
    return standardise(heard) * state.std(0, unbiased=False) + state.mean(0)


def _said(prediction: Tensor, task: Task) -> str:
    if not task.labels:
        return f"{prediction[0]:.2f} stars"
    p = prediction.softmax(0)
    return f"{task.labels[int(p.argmax())]} ({p.max():.0%})"


@torch.no_grad()
def exchange(pupil: Pupil, task: Task, *, index: int, rounds: int, token: int) -> go.Figure:
    """One exchange: the message of every turn as a row of numbers, and what the student makes of it.

    Written beside each turn: what the student's head says of b_S (no message) and of every reply it hears, and how far
    the turn moved the student's higher state.
    """
    inputs, target = _example(task, index)
    before, pupil.setup = pupil.setup, replace(pupil.setup, rounds=rounds)
    try:
        said = pupil.talk(inputs)
    finally:
        pupil.setup = before
    alone = pupil.student.head(said.b_S)[0]
    truth = f"{target[0]:.0f} stars" if not task.labels else task.labels[int(target[0])]
    rows, labels = [], []
    state = said.b_S
    for n, (reply, heard) in enumerate(zip(said.replies, said.heard, strict=True), 1):
        if said.questions:
            rows.append(said.questions[n - 1][0])
            labels.append(f"round {n}: the student asks")
        moved = float((standardise(state) - standardise(heard))[0].square().mean())  # as L_interact sees them
        heard = _in_scale_of(heard, said.b_S)
        rows.append(reply[0])
        labels.append(f"round {n}: the teacher replies<br>heard as {_said(pupil.student.head(heard)[0], task)}, "
                      f"moved {moved:.2f}")  # fmt: skip
        state = heard
    token = min(token, rows[0].shape[0] - 1)
    z = [row[min(token, len(row) - 1)].tolist() for row in rows][::-1]
    title = f"test example {index}, truth {truth}; the student alone says {_said(alone, task)}"
    figure = figures.heatmap(z, title=title, x="component of the message", y="", value="value", text=False,
                             y_labels=labels[::-1], colours="RdBu")  # fmt: skip
    figure.data[0].zmid = 0
    return figure.update_layout(height=150 + 60 * len(rows), margin_l=260)


@torch.no_grad()
def rounds_curve(pupils: Mapping[str, tuple[Pupil, Task]], most: int = 4) -> go.Figure:
    """Which rounds change the student: how far round n moves what it hears, the mean over 256 test examples."""
    curves = {}
    for name, (pupil, task) in pupils.items():
        inputs, _ = task.test.take(torch.arange(min(256, len(task.test))))
        before, pupil.setup = pupil.setup, replace(pupil.setup, rounds=most)
        try:
            said = pupil.talk(inputs)
        finally:
            pupil.setup = before
        states = [said.b_S, *said.heard]
        moved = [float(correlation_distance(a, b)) for a, b in zip(states, states[1:], strict=False)]
        curves[name] = (list(range(1, most + 1)), moved)
    return figures.lines(
        curves, title="how far each round moves the student's state", x="round", y="d(before, after) over the examples",
        levels={"unrelated states": 2.0},
    )  # fmt: skip


@torch.no_grad()
def message_space(pupil: Pupil, task: Task, *, count: int, token: int) -> go.Figure:
    """Messages about the same inputs, in the student's two main directions: student o, teacher x, joined."""
    inputs, target = task.test.take(torch.arange(min(count, len(task.test))))
    said = pupil.talk(inputs)
    pair = [said.words["a_S"], said.words["a_T"]]
    token = min(token, *(m.shape[1] - 1 for m in pair))
    # as L_MC sees them: every component standardised over the inputs
    ours, theirs = ((m[:, token] - m[:, token].mean(0)) / (m[:, token].std(0) + 1e-5) for m in pair)
    _, _, axes = torch.linalg.svd(ours, full_matrices=False)
    a, b = (ours @ axes[:2].T).tolist(), (theirs @ axes[:2].T).tolist()
    figure = figures.blank("messages about the same inputs", "first direction", "second direction")
    joined = [[(p[k], q[k], None) for p, q in zip(a, b, strict=True)] for k in (0, 1)]
    figure.add_scatter(x=sum(joined[0], ()), y=sum(joined[1], ()), mode="lines", line={"color": "#bbb", "width": 1},
                       hoverinfo="skip", name="the same input")  # fmt: skip
    names = [task.labels[int(t)] if task.labels else f"{t:.0f} stars" for t in target]
    for points, name, symbol, colour in ((a, "student", "circle-open", 0), (b, "teacher", "x", 1)):
        figure.add_scatter(x=[p[0] for p in points], y=[p[1] for p in points], mode="markers", name=name, text=names,
                           marker={"symbol": symbol, "color": figures.PALETTE[colour], "size": 8})  # fmt: skip
    return figure.update_layout(height=520)


def cost_figure(rows: Sequence[Mapping[str, Any]], key: str) -> go.Figure:
    """Time or bytes of a training step by arm and rounds, both tasks."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    figure = make_subplots(1, len(tasks), subplot_titles=tasks)
    scale, name = {"seconds": (1e3, "milliseconds a step"), "bytes": (2**-20, "MiB of tensors a step")}[key]
    for column, task in enumerate(tasks, 1):
        own = [r for r in rows if r["task"] == task and r["what"].startswith("training")]
        labels = [
            r["what"].removeprefix("training step, ") + (f", N={r['rounds']}" if r["rounds"] else "") for r in own
        ]
        figure.add_bar(x=labels, y=[scale * r[key] for r in own], marker_color=figures.PALETTE[column - 1],
                       showlegend=False, row=1, col=column)  # fmt: skip
    figure.update_yaxes(title_text=name, row=1, col=1)
    return figure.update_layout(template=figures.TEMPLATE, title=f"what talking costs: {name}", height=440)
