"""SIGN's panels: each returns a plotly figure computed from the run's own networks when a control moves."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from workbench.data.corruptions import CORRUPTIONS, box_mask
from workbench.evaluation.samples import nearest
from workbench.lab import figures
from workbench.models.edm import evaluations, karras_sigmas, ode_sample
from workbench.models.idempotent import inpaint, reapply, renoise
from workbench.papers.sign import Student, World, noised
from workbench.papers.sign_study import quality

DISTANCE = "Fréchet distance (own features)"
PLANE_DISTANCE = "energy distance"


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clipped, for image_grid."""
    return (images.clamp(-1, 1) + 1) / 2


@torch.no_grad()
def applications(students: Mapping[str, Student], world: World, *, times: int, count: int, seed: int) -> go.Figure:
    """The plane: z, f(z), f(f(z)), ... of every student, the last ones joined by lines; real modes as rings."""
    assert world.mixture is not None
    z = world.noise(torch.Generator().manual_seed(seed), count)
    figure = make_subplots(1, len(students), subplot_titles=list(students), horizontal_spacing=0.03)
    for column, student in enumerate(students.values(), 1):
        path = torch.stack([z, *reapply(student.f, z, times)]).cpu()  # (times + 1, count, 2)
        ends = torch.cat([path[1:], torch.full((1, count, 2), float("nan"))]).permute(1, 0, 2).reshape(-1, 2)
        figure.add_scatter(x=world.mixture.means[:, 0].tolist(), y=world.mixture.means[:, 1].tolist(), mode="markers",
                           marker={"size": 26, "symbol": "circle-open", "color": "#888"}, name="modes, 3 sd",
                           showlegend=column == 1, row=1, col=column)  # fmt: skip
        line = {"width": 1, "color": figures.PALETTE[0]}
        figure.add_scatter(x=ends[:, 0].tolist(), y=ends[:, 1].tolist(), mode="lines", name="f(z) to f applied again",
                           line=line, showlegend=column == 1, row=1, col=column)  # fmt: skip
        for at, colour, name in ((1, figures.PALETTE[1], "f(z)"), (times, figures.PALETTE[2], "last application")):
            marker, (px, py) = {"size": 5, "color": colour}, path[at].T.tolist()
            figure.add_scatter(x=px, y=py, mode="markers", name=name, marker=marker, showlegend=column == 1, row=1,
                               col=column)  # fmt: skip
        axis = "" if column == 1 else str(column)
        figure.update_xaxes(range=[-2.4, 2.4], row=1, col=column)
        figure.update_yaxes(range=[-2.4, 2.4], scaleanchor=f"x{axis}", row=1, col=column)
    figure.update_layout(
        template=figures.TEMPLATE, height=430, title=f"{times} applications of f to noise of sd {world.sigma_max:g}",
        legend={"orientation": "h", "y": -0.12}, margin_t=90,
    )  # fmt: skip
    return figure


@torch.no_grad()
def scores(student: Student, world: World, *, sigma: float, seed: int = 0) -> go.Figure:
    """s_teacher (exact), s_fake and their difference at one noise level, as arrows where the noised samples lie."""
    assert student.fake is not None
    z = world.noise(torch.Generator().manual_seed(seed), 150)
    x = noised(student.f(z), torch.full((150,), sigma), torch.randn(150, 2, generator=torch.Generator().manual_seed(1)))
    level = torch.full((150,), sigma)
    real, fake = ((d(x, level) - x) / sigma**2 for d in (world.teacher, student.fake))
    figure = make_subplots(1, 3, subplot_titles=["teacher's score", "s_fake", "s_fake - teacher"])
    length = 0.5 / real.norm(dim=1).quantile(0.9).item()
    for column, arrows in enumerate((real, fake, fake - real), 1):
        gap = torch.full_like(x, float("nan"))
        ends = torch.stack([x, x + length * arrows, gap], 1).reshape(-1, 2)
        figure.add_scatter(x=ends[:, 0].tolist(), y=ends[:, 1].tolist(), mode="lines", showlegend=False, row=1,
                           col=column, line={"width": 1.5, "color": figures.PALETTE[column - 1]})  # fmt: skip
        figure.add_scatter(x=x[:, 0].tolist(), y=x[:, 1].tolist(), mode="markers", marker={"size": 3, "color": "#444"},
                           showlegend=False, row=1, col=column)  # fmt: skip
        figure.update_yaxes(scaleanchor="x" if column == 1 else f"x{column}", row=1, col=column)
    share = ((fake - real).norm() / real.norm()).item()
    title = f"scores at sigma {sigma:g}: the difference is {share:.0%} of the teacher's score"
    return figure.update_layout(template=figures.TEMPLATE, title=title, height=380, margin_t=90)


def curves(measures: Mapping[str, Mapping[str, Any]], *, plane: bool = False) -> go.Figure:
    """Distance to the data while training, one curve an arm, from a study's measures."""
    drawn = {arm: (list(map(int, m["curve"])), list(m["curve"].values())) for arm, m in measures.items()}
    y = PLANE_DISTANCE if plane else DISTANCE
    return figures.lines(drawn, title="distance to the data while training", x="step", y=y, log_y=True)


def histories(students: Mapping[str, Student], key: str) -> go.Figure:
    """One logged value ("loss", "grad_norm", a term, "s_fake/loss") of every student that has it, against the step."""
    drawn = {
        arm: ([r["step"] for r in s.history if key in r], [r[key] for r in s.history if key in r])
        for arm, s in students.items()
    }
    kept = {arm: values for arm, values in drawn.items() if values[0]}
    positive = all(v > 0 for _, ys in kept.values() for v in ys)
    return figures.lines(kept, title=f"{key} while training", x="step", y=key, log_y=positive, markers=False)


def against_cost(ceilings: Mapping[str, Any], measures: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """Distance to the data against network evaluations: the teacher's curve, each student by both kinds of steps."""
    nfe = [int(n) for n in ceilings["teacher"]]
    drawn: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "teacher, Heun": (nfe, [*ceilings["teacher"].values()])
    }
    for arm, m in measures.items():
        drawn[f"{arm}, applied again"] = ([1, 2, 3, 4], [m[f"distance x{k}"] for k in (1, 2, 3, 4)])
        renoised = [m["distance x1"], *(m[f"distance renoised x{k}"] for k in (2, 3, 4))]
        drawn[f"{arm}, re-noised"] = ([1, 2, 3, 4], renoised)
    floor = {"training images": ceilings["floor"]}
    return figures.lines(drawn, title="quality against sampling cost", x="network evaluations (NFE)", y=DISTANCE,
                         log_x=True, log_y=True, levels=floor)  # fmt: skip


def idempotence(measures: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """||f^(k+1) - f^k|| / ||f^k|| against k, one curve an arm."""
    drawn = {arm: ([1, 2, 3, 4], [m[f"idempotence x{k}"] for k in (1, 2, 3, 4)]) for arm, m in measures.items()}
    return figures.lines(drawn, title="idempotence error over applications", x="applications k",
                         y="‖f(fᵏ) − fᵏ‖ / ‖fᵏ‖", log_y=True)  # fmt: skip


@torch.no_grad()
def samples(
    students: Mapping[str, Student], world: World, *, times: int, mode: str, seed: int, count: int = 10
) -> go.Figure:
    """Samples from one noise, a row each: the teacher (12 Heun steps), then every student after `times` steps."""
    z = world.noise(torch.Generator().manual_seed(seed), count)
    rows = [ode_sample(world.teacher, z, karras_sigmas(12, world.sigma_min, world.sigma_max))]
    for s in students.values():
        sigmas = [1 / 2**k for k in range(times - 1)]
        steps = (
            reapply(s.f, z, times)
            if mode == "apply again"
            else renoise(s.f, z, sigmas, torch.Generator().manual_seed(1))
        )
        rows.append(steps[-1])
    title = f"teacher ({evaluations(12)} NFE), then<br>{', '.join(students)} ({times} NFE)"
    figure = figures.image_grid(
        to_unit(torch.cat(rows)), columns=count, title=title, scale=max(1, 48 // world.shape[-1])
    )
    return figure.update_layout(margin_t=80, height=figure.layout.height + 30)  # room for the second line


@torch.no_grad()
def editing(
    students: Mapping[str, Student], world: World, *, image: int, corruption: str, strength: float, times: int,
    top: float = 0.0, left: float = 0.5, height: float = 1.0, width: float = 0.5, seed: int = 0,
) -> go.Figure:  # fmt: skip
    """The editing bench: a held-out image, degraded or with a hole brushed in, and f applied once, twice, ... to it.

    A row a student: original, input, then every application; the title tells each result's class, its error, and the
    distance to the nearest training image.
    """
    assert world.images is not None and world.judge is not None
    pixels, labels = world.images.held_out(world.split)
    x = pixels[image : image + 1]
    rows, told = [], []
    for arm, student in students.items():
        generator = torch.Generator().manual_seed(seed)  # the same damage for every student
        if corruption == "mask":
            lost = box_mask(x.shape, top, left, height, width)
            given = torch.where(lost, torch.zeros_like(x), x)
            out = inpaint(student.f, x, lost, times, generator)
        else:
            given = CORRUPTIONS[corruption](x, strength, generator)
            out = reapply(student.f, given, times)
        rows.append(torch.cat([x, given, *out]))
        error, before = ((y - x).square().mean().item() for y in (out[-1], given))
        copy = nearest(out[-1], world.images.train).item()
        label = int(world.judge(out[-1]).argmax())
        told.append(f"{arm}: class {label}, error {error:.3f} (input {before:.3f}), nearest training image {copy:.2f}")
    title = f"original ({int(labels[image])}), input, {times} applications<br>" + "<br>".join(told)
    figure = figures.image_grid(
        to_unit(torch.cat(rows)), columns=times + 2, title=title, scale=max(1, 72 // x.shape[-1])
    )
    extra = 28 * len(told)
    return figure.update_layout(margin_t=80 + extra, height=figure.layout.height + extra + 30)


def editing_controls(world: World) -> dict[str, widgets.Widget]:
    """Controls of `editing`: which image, what is done to it, and the brush's box in shares of the side."""
    assert world.images is not None
    edits = ["noise", "mask", *(name for name in CORRUPTIONS if name != "noise")]

    def share(value: float, name: str) -> widgets.Widget:
        return widgets.FloatSlider(value, min=0, max=1, step=0.125, description=name)

    return {
        "image": widgets.IntSlider(3, 0, len(world.images.held_out(world.split)[0]) - 1, description="held-out image"),
        "corruption": widgets.Dropdown(options=edits, description="edit"),
        "strength": widgets.FloatSlider(0.6, min=0, max=1.5, step=0.1, description="strength"),
        "times": widgets.IntSlider(3, 1, 6, description="applications"),
        "top": share(0.0, "mask: top"), "left": share(0.5, "mask: left"),
        "height": share(1.0, "mask: height"), "width": share(0.5, "mask: width"),
    }  # fmt: skip


@torch.no_grad()
def recoloured(student: Student, world: World, *, count: int = 10) -> go.Figure:
    """The first held-out images, the same without colour, and f of these; a column an image."""
    assert world.images is not None
    x = world.images.held_out(world.split)[0][:count]
    grey = CORRUPTIONS["no colour"](x, 1.0, torch.Generator())
    rows = to_unit(torch.cat([x, grey, student.f(grey)]))
    title = "original, without colour, f of that"
    return figures.image_grid(rows, columns=count, title=title, scale=max(1, 48 // x.shape[-1]))


@torch.no_grad()
def memorised(student: Student, world: World, *, count: int = 8, seed: int = 0) -> go.Figure:
    """Generated images above their nearest training images, the closest pairs of 200 samples first."""
    assert world.images is not None
    x = student.f(world.noise(torch.Generator().manual_seed(seed), 200))
    gaps = torch.cdist(x.flatten(1), world.images.train.flatten(1))
    order = gaps.amin(1).argsort()[:count]
    pairs = torch.cat([x[order], world.images.train[gaps[order].argmin(1)]])
    title = f"closest {count} of 200 samples (above),<br>nearest training images (below)"
    figure = figures.image_grid(to_unit(pairs), columns=count, title=title, scale=max(1, 56 // x.shape[-1]))
    return figure.update_layout(margin_t=80, height=figure.layout.height + 30)


@torch.no_grad()
def schedule(student: Student, world: World, *, first: float, ratio: float, steps: int, count: int = 300) -> go.Figure:
    """Distance to the data after each application when noise first, first * ratio, ... is put back in between."""
    z = world.noise(torch.Generator().manual_seed(11), count)
    sigmas = [first * ratio**k for k in range(steps - 1)]
    noise = renoise(student.f, z, sigmas, torch.Generator().manual_seed(1))
    drawn = {
        "re-noised": (list(range(1, steps + 1)), [quality(world, x) for x in noise]),
        "applied again": (list(range(1, steps + 1)), [quality(world, x) for x in reapply(student.f, z, steps)]),
    }
    told = ", ".join(f"{s:.2f}" for s in sigmas)
    return figures.lines(drawn, title=f"noise put back: {told}", x="applications of f (NFE)", y=DISTANCE)
