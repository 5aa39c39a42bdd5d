"""LinFusion: softmax self-attention of a diffusion UNet distilled into a normalised, non-causal linear token mixer."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from workbench.data import swatches
from workbench.errors import WorkbenchError
from workbench.evaluation.agreement import agreement, shares
from workbench.evaluation.cost import cost, curve, exponent
from workbench.losses.distillation import denoising_loss, feature_losses, output_loss
from workbench.models.adapters import add_lora, attach_lora, lora_state
from workbench.models.denoisers import no_prompt, small_unet
from workbench.models.diffusion import Task, add_noise, cosine_schedule, predict, sample, target
from workbench.models.generalised_attention import (
    GeneralisedLinearAttention,
    capture,
    replace_self_attention,
    self_attentions,
    token_counts,
    train_only,
)
from workbench.models.patch_parallel import PatchParallel
from workbench.papers.linfusion_settings import (
    ABOUT,
    ARXIV,
    AUTHORS,
    CLAIMS,
    NOTEBOOK,
    PRESETS,
    REFERENCE,
    TITLE,
    Config,
    Variant,
)  # fmt: skip
from workbench.training.loop import Recipe, fit, step_seed
from workbench.training.pool import map_jobs
from workbench.training.record import Record

__all__ = ["ABOUT", "ARXIV", "AUTHORS", "CLAIMS", "NOTEBOOK", "PRESETS", "TITLE", "Config", "Variant"]


def _mixed(weights: dict[str, float], simple: Tensor, kd: Tensor, layers: Tensor) -> dict[str, Tensor]:
    """L = L_simple + alpha L_kd + beta L_feat, and its parts; a term of weight 0 is measured but not trained on."""
    parts = {"simple": simple, "kd": kd, "feat": layers.mean()}
    loss = torch.stack([weights[name] * value for name, value in parts.items() if weights[name]]).sum()
    return {"loss": loss, **parts, "feat_layers": layers.detach()}


def compare(task: Task, student: nn.Module, batch: dict[str, Any], weights: dict[str, float]) -> dict[str, Tensor]:
    """Both full forward passes on one noisy batch, and the losses: "loss", "simple", "kd", "feat", "feat_layers" (L,).

    Layer l of the student sees the student's own input; nothing of the teacher is fed into it, as in the released
    training script.
    """
    device = next(student.parameters()).device
    x0, noise, t = (batch[key].to(device) for key in ("x0", "noise", "t"))
    z = add_noise(task.scheduler, x0, noise, t)
    with torch.no_grad(), capture(task.unet.to(device)) as theirs:
        wanted = predict(task.unet, z, t, batch["condition"])
    with capture(student) as ours:
        out = predict(student, z, t, batch["condition"])
    simple = denoising_loss(out, target(task.scheduler, x0, noise, t))
    layers = list(self_attentions(task.unet))
    features = feature_losses([ours[name] for name in layers], [theirs[name] for name in layers])
    return _mixed(weights, simple, output_loss(out, wanted), features)


def noisy_batch(task: Task, generator: torch.Generator, batch: int, side: int) -> dict[str, Any]:
    """Clean images, noise, uniform times and condition, all drawn with `generator`."""
    x0, condition = task.draw(generator, batch, side)
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(int(task.scheduler.config["num_train_timesteps"]), (batch,), generator=generator)
    return {"x0": x0, "noise": noise, "t": t, "condition": condition}


def swatch_task(unet: nn.Module) -> Task:
    """The small UNet on the world of swatches: unconditional, pixels are the latents."""
    world = swatches.load()

    def condition(batch: int) -> dict[str, Tensor]:
        return {"encoder_hidden_states": no_prompt(batch)}

    return Task(
        unet=unet.eval().requires_grad_(False), scheduler=cosine_schedule(),
        draw=lambda generator, batch, side: (world.draw(generator, batch, side)[0], condition(batch)),
        condition=condition, empty=condition, decode=lambda z: z, shape=lambda side: (3, side, side),
    )  # fmt: skip


def denoise(task: Task, unet: nn.Module, batch: dict[str, Any]) -> Tensor:
    """L_simple of a network on a noisy batch."""
    z = add_noise(task.scheduler, batch["x0"], batch["noise"], batch["t"])
    out = predict(unet, z, batch["t"], batch["condition"])
    return denoising_loss(out, target(task.scheduler, batch["x0"], batch["noise"], batch["t"]))


def train_teacher(config: Config, seed: int, record: Record | None = None, **loop: Any) -> UNet2DConditionModel:
    """A small UNet with softmax self-attention, trained on swatches from scratch; returns its EMA."""
    task = swatch_task(cast(nn.Module, small_unet(size=config.size, seed=seed)))
    recipe = Recipe(
        steps=config.teacher_steps, lr=config.teacher_lr, warmup=0.05, schedule="cosine", clip=1.0, ema=0.995, seed=seed
    )

    unet = task.unet.train().requires_grad_(True)
    fitted = fit(
        unet,
        lambda u, b: {"loss": denoise(task, u, b)},
        lambda g: noisy_batch(task, g, 32, config.size),
        recipe,
        name=f"teacher {seed}",
        record=record,
        **loop,
    )
    assert isinstance(fitted.ema, UNet2DConditionModel)
    return fitted.ema


def load_task(config: Config, seed: int = 0, folder: Path | None = None) -> Task:
    """The teacher of student seed `seed` with its data: a small one, committed or trained here, or Stable Diffusion.

    folder: of the run, where trained teachers and cached latents are kept. Raises WorkbenchError: a committed teacher
    that is not there; a model or data set that cannot be had.
    """
    if config.model != "small":
        from workbench.models.latent_diffusion import latent_task

        return latent_task(
            config.model, config.data, size=config.size, image=config.image_column, caption=config.caption_column,
            crop=config.crop, prompts=config.prompts, cache=folder,
        )  # fmt: skip
    index = seed % config.teachers
    if config.teacher == "train":
        return swatch_task(train_teacher(config, index, Record(folder / "teachers") if folder else None))
    path = REFERENCE / f"teacher-{index}"
    if not path.is_dir():
        raise WorkbenchError(f"no committed teacher {index} in {REFERENCE}: use fewer teachers, or -p teacher=train")
    return swatch_task(UNet2DConditionModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32))


@dataclass
class Student:
    """A distilled UNet: what was trained, what it was before, and the record of its training."""

    unet: nn.Module
    layers: list[str]
    trained: int
    frozen: int
    history: list[dict[str, Any]]


def build_student(config: Config, task: Task, variant: str, seed: int) -> tuple[nn.Module, list[str]]:
    """A copy of the teacher with every self-attention replaced and nothing else left to train; names of the layers."""
    unet, mixer = copy.deepcopy(task.unet), config.mixer(variant)
    counts = None
    if not mixer.normalise:
        z = torch.zeros(1, *task.shape(config.size))
        counts = token_counts(task.unet, z, torch.zeros(1, dtype=torch.long), **task.condition(1))
    layers = replace_self_attention(unet, mixer, counts=counts, seed=seed)
    unet.float()  # master weights; the loop's precision decides what the forward pass runs in
    train_only(unet, layers)
    return unet.train(), layers


def distil(
    config: Config, task: Task, variant: str = "paper", seed: int = 0, record: Record | None = None, **loop: Any
) -> Student:
    """Distil one student. Raises AssertionError should anything but the new layers have changed."""
    unet, layers = build_student(config, task, variant, seed)
    frozen = {name: p for name, p in unet.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    weights = config.weights(variant)
    recipe = Recipe(
        steps=config.steps, lr=config.lr, accumulate=config.accumulate, precision=config.precision, seed=seed,
        save_every=config.save_every,
    )  # fmt: skip
    fitted = fit(
        unet, lambda student, batch: compare(task, student, batch, weights),
        lambda generator: noisy_batch(task, generator, config.batch, config.size), recipe,
        name=f"{variant}, seed {seed}", record=record, **loop,
    )  # fmt: skip
    changed = [name for name, p in frozen.items() if not torch.equal(p, before[name])]
    assert not changed, f"distillation changed {changed[0]}, which is none of the new layers"
    return Student(
        unet=unet.eval(), layers=layers, history=fitted.history,
        trained=sum(p.numel() for p in unet.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in frozen.values()),
    )  # fmt: skip


_ALL = {"simple": 1.0, "kd": 1.0, "feat": 1.0}


@torch.no_grad()
def held_out(config: Config, task: Task, student: nn.Module, seed: int, scale: int) -> dict[str, Any]:
    """Losses on fresh images of `scale` times the training side: "kd", "simple", "feat", "feat_layers" and the
    teacher's own "teacher_simple". The same images, times and noise for every student of a seed."""
    generator = torch.Generator().manual_seed(step_seed(seed, 0, 1))  # training starts at step 1: never its batches
    rows = []
    for _ in range(math.ceil(config.held_out / scale**2 / 16)):
        batch = noisy_batch(task, generator, min(16, config.held_out), scale * config.size)
        row = compare(task, student, batch, _ALL)
        rows.append(row | {"teacher_simple": compare(task, task.unet, batch, _ALL)["simple"]})
    return {key: torch.stack([row[key] for row in rows]).mean(0).tolist() for key in rows[0]}


def draw_samples(config: Config, task: Task, unet: nn.Module, seed: int, scale: int, count: int) -> Tensor:
    """`count` images in [-1, 1] at `scale` times the training side; a seed gives every network the same noise."""
    noise = torch.randn(count, *task.shape(scale * config.size), generator=torch.Generator().manual_seed(seed))
    out = sample(
        unet, task.scheduler, noise, task.condition(count), steps=config.sample_steps, guidance=config.guidance,
        empty=task.empty(count),
    )  # fmt: skip
    return task.decode(out).cpu()


def sample_agreement(config: Config, task: Task, unet: nn.Module, seed: int, scale: int) -> float:
    """Mean agreement of samples from the swatch world."""
    images = draw_samples(config, task, unet, seed, scale, config.samples)
    return agreement(images, swatches.load().palette).mean().item()


@contextmanager
def split_over_ranks(
    student: nn.Module, ranks: int, mode: Literal["synchronous", "stale"]
) -> Iterator[list[PatchParallel]]:
    """Within the block every linear attention works on `ranks` strips that exchange statistics."""
    layers = [m for m in self_attentions(student).values() if isinstance(m, GeneralisedLinearAttention)]
    splits = [PatchParallel(ranks, mode) for _ in layers]
    for layer, split in zip(layers, splits, strict=True):
        layer.patches = split
    try:
        yield splits
    finally:
        for layer in layers:
            layer.patches = None


def patch_parallel(config: Config, task: Task, student: nn.Module, seed: int, steps: Sequence[int]) -> dict[str, Any]:
    """Sampling split over ranks against the whole image, same noise: "synchronous" largest difference, "stale" rms
    difference relative to the image's rms for each number of DDIM `steps`, bytes sent by one image and step."""
    noise = torch.randn(4, *task.shape(2 * config.size), generator=torch.Generator().manual_seed(seed))

    def run(count: int) -> Tensor:
        return sample(student, task.scheduler, noise, task.condition(4), steps=count)

    whole = {count: run(count) for count in steps}
    with split_over_ranks(student, config.ranks, "synchronous") as splits:
        synchronous = (run(steps[0]) - whole[steps[0]]).abs().max().item()
    sent = sum(s.bytes_sent for s in splits) / (4 * steps[0])
    softmax = sum(s.softmax_bytes for s in splits) / (4 * steps[0])
    stale = []
    for count in steps:
        with split_over_ranks(student, config.ranks, "stale"):
            stale.append(((run(count) - whole[count]).square().mean() / whole[count].square().mean()).sqrt().item())
    return {"synchronous": synchronous, "stale": stale, "steps": list(steps), "bytes": sent, "softmax_bytes": softmax}


def train_adapter(
    config: Config, task: Task, only: int, seed: int, record: Record | None, **loop: Any
) -> dict[str, Tensor]:
    """A LoRA of the softmax TEACHER's cross-attention that knows one swatch only; returns its tensors."""
    unet, world = copy.deepcopy(task.unet), swatches.load()
    add_lora(unet)

    def batch(generator: torch.Generator) -> dict[str, Any]:
        one = replace(task, draw=lambda g, n, side: (world.draw(g, n, side, only)[0], task.condition(n)))
        return noisy_batch(one, generator, config.batch, config.size)

    recipe = Recipe(steps=config.adapter_steps, lr=1e-2, seed=seed)
    fit(unet.train(), lambda u, b: {"loss": denoise(task, u, b)}, batch, recipe, name="adapter", record=record, **loop)
    return lora_state(unet)


def plug_in(
    config: Config, task: Task, student: nn.Module, state: dict[str, Tensor], only: int, seed: int
) -> dict[str, float]:
    """What the teacher's adapter does to the teacher and, unchanged, to the student: share of the adapter's swatch."""
    out = {}
    for name, unet in (("teacher", task.unet), ("student", student)):
        for suffix in ("", "_adapted"):
            unet = copy.deepcopy(unet)
            if suffix:
                attach_lora(unet, state)
            images = draw_samples(config, task, unet, seed, 1, config.samples)
            out[name + suffix] = shares(images, swatches.load().palette)[:, only].mean().item()
    return out


@dataclass(frozen=True)
class Job:
    """One student to distil and measure, in whatever process."""

    config: Config
    variant: Variant
    seed: int
    folder: Path

    @property
    def record(self) -> Record:
        return Record(self.folder / "students" / f"{self.variant}, seed {self.seed}")


def measure_student(job: Job) -> dict[str, Any]:
    """Distil the job's student (or load it, where its folder holds it finished) and measure it at every scale."""
    config, seed = job.config, job.seed
    task = load_task(config, seed, job.folder)
    student = distil(config, task, job.variant, seed, job.record, progress=False)
    out: dict[str, Any] = {"trained": student.trained, "frozen": student.frozen}
    for scale in config.scales:
        losses = held_out(config, task, student.unet, seed, scale)
        out |= {f"{key} x{scale}": value for key, value in losses.items()}
    if config.model != "small":
        return out
    if job.variant in ("paper", "no normalisation", "causal"):
        for scale in config.scales[:2]:
            out[f"agreement x{scale}"] = sample_agreement(config, task, student.unet, seed, scale)
    if job.variant == "paper":
        start = build_student(config, task, "paper", seed)[0].eval()
        out["kd x1 at step 0"] = held_out(config, task, start, seed, 1)["kd"]
        for scale in config.scales[:2]:
            out[f"teacher agreement x{scale}"] = sample_agreement(config, task, task.unet, seed, scale)
        if config.ranks and config.mixing == "non-causal":
            out["patches"] = patch_parallel(config, task, student.unet, seed, (8, 32))
        if config.adapter_steps:
            only = seed % len(swatches.NAMES)
            state = train_adapter(config, task, only, seed, job.record, progress=False)
            out["plug_in"] = plug_in(config, task, student.unet, state, only, seed)
    return out


def study(config: Config, folder: Path, record: Record, seed: int = 0) -> dict[tuple[str, int], dict[str, Any]]:
    """Distil and measure every variant for every seed (two cores: two at a time), and store what claims are judged by.

    Returns {(variant, seed): measures}. Students measured in an earlier sitting of the same run are not repeated.
    """
    seeds = range(seed, seed + config.seeds)
    jobs = [Job(config, variant, s, folder) for s in seeds for variant in config.variants]
    known = {(r["variant"], r["seed"]): r["measures"] for r in record.records("student")}
    if config.teacher == "train" and config.model == "small":
        for index in range(config.teachers):  # here, once, so that no two students train the same teacher
            load_task(config, index, folder)
    todo = [job for job in jobs if (job.variant, job.seed) not in known]
    students = map_jobs(measure_student, todo, workers=config.workers or None, record=record, text="students")
    for job, measures in zip(todo, students, strict=True):
        known[job.variant, job.seed] = measures
        record.write("student", variant=job.variant, seed=job.seed, measures=measures)
    for s in seeds:
        for measure, value in claim_values({variant: known[variant, s] for variant in config.variants}).items():
            record.result(measure, value, seed=s)
    return known


def claim_values(students: dict[Any, dict[str, Any]]) -> dict[str, float]:
    """The measures of CLAIMS that one seed's students allow, by name; `students`: variant -> measures."""
    out: dict[str, float] = {}
    paper = students.get("paper")
    if paper is None or "kd x2" not in paper:
        return out
    out["simple_excess"] = paper["simple x1"] / paper["teacher_simple x1"]
    out["drift"] = paper["kd x2"] / paper["kd x1"]
    if "kd x1 at step 0" in paper:
        out["distilled"] = paper["kd x1 at step 0"] / paper["kd x1"]
        out["agreement_kept"] = paper["agreement x1"] - paper["teacher agreement x1"]
        out["agreement_kept_x2"] = paper["agreement x2"] - paper["teacher agreement x2"]
    if "patches" in paper:
        coarse, fine = paper["patches"]["stale"]
        out |= {"synchronous_ranks": paper["patches"]["synchronous"], "stale_ranks": coarse / fine}
    if "plug_in" in paper:
        p = paper["plug_in"]
        out["plug_in"] = (p["student_adapted"] - p["student"]) / (p["teacher_adapted"] - p["teacher"])
    if other := students.get("no normalisation"):
        out["normalisation"] = other["kd x2"] / paper["kd x2"]
        out["drift_without"] = other["kd x2"] / other["kd x1"]
    if other := students.get("causal"):
        out["non_causal"] = other["kd x1"] / paper["kd x1"]
        if "agreement x2" in paper:
            out["non_causal_agreement"] = paper["agreement x2"] - other["agreement x2"]
    if other := students.get("no f', g'"):
        out["gates"] = other["kd x1"] / paper["kd x1"]
    if other := students.get("random init"):
        out["teacher_init"] = other["kd x1"] / paper["kd x1"]
    return out


def time_mixers(config: Config, record: Record) -> list[dict[str, Any]]:
    """Time and memory of one mixer against tokens, `timings` times over; stores the fitted exponents."""
    rows = []
    for repetition in range(config.timings):
        now = cost(config.tokens, seed=repetition)
        rows += [{**row, "repetition": repetition} for row in now]
        for measure, method in (("linear_exponent", "linear"), ("softmax_exponent", "softmax, SDPA"),
                                ("naive_exponent", "softmax, naive")):  # fmt: skip
            record.result(measure, exponent(*curve(now, method)), seed=repetition)
    return rows
