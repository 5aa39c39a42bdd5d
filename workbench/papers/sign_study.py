"""SIGN's study: every arm distilled and measured, on images and in the plane, and the values of its claims."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from workbench.data.corruptions import CORRUPTIONS, box_mask
from workbench.data.digits import Images
from workbench.evaluation import samples as metrics
from workbench.models.classifier import SmallClassifier
from workbench.models.edm import evaluations, karras_sigmas, ode_sample
from workbench.models.idempotent import Idempotent, inpaint, reapply, renoise
from workbench.papers import sign as paper
from workbench.papers.sign_settings import Config
from workbench.training.loop import step_seed
from workbench.training.pool import map_jobs
from workbench.training.record import Record

TEACHER_STEPS = (1, 2, 4, 8, 12)  # Heun
RENOISE = (1.0, 0.5, 0.25)  # noise put back before the second, third and fourth application; on the plane a fifth of it
SEVERAL = "renoised x4"  # judged by multi_step: of six ways to use 2 to 4 evaluations, the best on tuning seeds
EDITS = {"noise": 0.6, "grey inversion": 1.0, "blur": 1.0}
COLOUR_EDITS = {"no colour": 1.0}  # colourising: of images that have a colour to lose


def generator_for(seed: int, stream: int = 1) -> torch.Generator:
    """Measures draw from streams that training never touches (it starts at step 1)."""
    return torch.Generator().manual_seed(step_seed(seed, 0, stream))


def _judged(world: paper.World) -> tuple[Images, SmallClassifier, Tensor, Tensor]:
    """The images, the classifier, and the pixels and labels that are measured on."""
    assert world.images is not None and world.judge is not None
    return world.images, world.judge, *world.images.held_out(world.split)


@torch.no_grad()
def quality(world: paper.World, x: Tensor) -> float:
    """Distance of samples to held-out data: Fréchet over the classifier's features, or in the plane energy distance."""
    if world.mixture is not None:
        stream = 7 if world.split == "test" else 9
        return metrics.energy_distance(x, world.draw(generator_for(0, stream), 2000))
    _, judge, real, _ = _judged(world)
    return metrics.frechet(judge.features(x), judge.features(real))


def _count(world: paper.World, config: Config) -> int:
    """Samples a measure is taken on; points of the plane cost nothing, and fewer hide differences in noise."""
    return config.samples if world.mixture is None else 2000


def ceilings(world: paper.World, config: Config, seed: int) -> dict[str, Any]:
    """What the teacher (by NFE) and training data reach: "floor", "teacher", "copies", "accuracy"."""
    z = world.noise(generator_for(seed), _count(world, config))
    out: dict[str, Any] = {"teacher": {}}
    for steps in TEACHER_STEPS:
        x = ode_sample(world.teacher, z, karras_sigmas(steps, world.sigma_min, world.sigma_max))
        out["teacher"][str(evaluations(steps))] = quality(world, x)
    if world.mixture is not None:
        return out | {"floor": quality(world, world.draw(generator_for(seed, 2), _count(world, config)))}
    images, judge, x, labels = _judged(world)
    corrupted = CORRUPTIONS["noise"](x, EDITS["noise"], generator_for(seed, 3))
    denoised = world.teacher(corrupted, torch.full((len(x),), EDITS["noise"]))
    return out | {
        "floor": quality(world, images.train[: config.samples]),
        "copies": metrics.nearest(x, images.train).mean().item(),
        "accuracy": accuracy(judge, x, labels),
        "noise error, teacher told sigma": (denoised - x).square().mean().item(),
    }  # fmt: skip


def accuracy(judge: SmallClassifier, x: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier gives their label."""
    return (judge(x).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def measure(world: paper.World, config: Config, f: Idempotent, seed: int) -> dict[str, Any]:
    """All measures of one student; distances are `quality`, "x1".."x4" count applications."""
    z = world.noise(generator_for(seed), _count(world, config))
    again = reapply(f, z, 5)
    scale = 1.0 if world.mixture is None else 0.2
    noised = renoise(f, z, [scale * s for s in RENOISE], generator_for(seed, 4))
    out: dict[str, Any] = {f"distance x{k}": quality(world, x) for k, x in enumerate(again[:4], 1)}
    out |= {f"distance renoised x{k}": quality(world, x) for k, x in enumerate(noised[1:], 2)}
    for k in range(1, 5):
        out[f"idempotence x{k}"] = metrics.idempotence_error(again[k - 1], again[k])
    if world.mixture is not None:
        reached, share = metrics.modes(again[0], world.mixture.means, world.mixture.sd)
        x = world.draw(generator_for(seed, 5), _count(world, config))
        out |= {"modes": reached, "share in modes": share, "reconstruction": (f(x) - x).square().mean().item()}
        corrupted = x + 0.4 * torch.randn(x.shape, generator=generator_for(seed, 3))
        out["share in modes, noisy"] = metrics.modes(corrupted, world.mixture.means, world.mixture.sd)[1]
        return out | {
            "share in modes, projected": metrics.modes(f(corrupted), world.mixture.means, world.mixture.sd)[1]
        }
    images, judge, real, _ = _judged(world)
    fake = judge.features(again[0])
    out["precision"], out["recall"] = metrics.precision_recall(judge.features(real[:2000]), fake[:2000])
    out["class entropy"] = metrics.class_entropy(judge(again[0]))
    out["copies"] = metrics.nearest(again[0], images.train).mean().item()
    return out | edits(world, f, seed)


def edits(world: paper.World, f: Idempotent, seed: int) -> dict[str, float]:
    """Zero-shot editing of held-out images: error and the classifier's accuracy before and after one application."""
    images, judge, x, labels = _judged(world)
    out = {"reconstruction": (f(x) - x).square().mean().item()}
    for name, strength in (EDITS | (COLOUR_EDITS if x.shape[1] == 3 else {})).items():
        before = CORRUPTIONS[name](x, strength, generator_for(seed, 3))
        after = f(before)
        out |= {f"{name}: error before": (before - x).square().mean().item(),
                f"{name}: error": (after - x).square().mean().item(),
                f"{name}: accuracy before": accuracy(judge, before, labels),
                f"{name}: accuracy": accuracy(judge, after, labels)}  # fmt: skip
    lost = box_mask(x.shape, 0.0, 0.5, 1.0, 0.5)
    mean = images.train.mean(0, keepdim=True).expand_as(x)
    # from grey and once: on the tuning seeds a start from noise and further applications were worse
    filled = inpaint(f, x, lost, 1, generator_for(seed, 6))
    hole = lost.expand_as(x)
    out["mask: error, mean image"] = (mean - x)[hole].square().mean().item()
    out["mask: error"] = (filled[-1] - x)[hole].square().mean().item()
    out["mask: accuracy before"] = accuracy(judge, torch.where(lost, mean, x), labels)
    return out | {"mask: accuracy": accuracy(judge, filled[-1], labels)}


@dataclass(frozen=True)
class Job:
    """One student to distil and measure, in whatever process."""

    config: Config
    world: str  # "images" or "plane"
    arm: str
    seed: int
    folder: Path

    @property
    def record(self) -> Record:
        return Record(self.folder / "students" / self.world / f"{self.arm}, seed {self.seed}")

    def load_world(self) -> paper.World:
        """The job's world; what the run's folder holds finished is loaded."""
        if self.world == "plane":
            return paper.plane_world(self.config, self.folder, progress=False)
        return paper.image_world(self.config, self.seed, self.folder, progress=False)

    def distil(self, world: paper.World, **loop: Any) -> paper.Student:
        """The student, and its distance to the data on the way as records "curve"."""
        record, z = self.record, world.noise(generator_for(self.seed, 8), min(400, _count(world, self.config)))

        def watch(step: int, f: Idempotent) -> None:
            with torch.no_grad():
                record.write("curve", step=step, distance=quality(world, f(z)))

        if not self.curve():  # f before its first step: from a denoiser's weights it is a crude generator already
            start = paper.build_student(world, self.config, self.config.arm(self.arm), self.seed)
            watch(0, start.to(next(world.start.parameters()).device))
        return paper.distil(world, self.config, self.arm, self.seed, record, watch, **loop)

    def curve(self) -> dict[int, float]:
        """Step -> distance of the present weights' samples; of a step computed twice the later counts."""
        return {int(r["step"]): float(r["distance"]) for r in self.record.records("curve")}


def run_job(job: Job) -> dict[str, Any]:
    """Distil (or load) the job's student and measure it."""
    world = job.load_world()
    student = job.distil(world, progress=False)
    out = measure(world, job.config, student.f, job.seed)
    curve = job.curve()
    norms = [float(r["grad_norm"]) for r in student.history]
    out |= {"curve": curve, "seconds": student.seconds, "gradient norm, largest": max(norms)}
    out["distance, end over best"] = list(curve.values())[-1] / min(curve.values())
    cost = paper.evaluations_per_step(world, job.config, job.arm)
    return out | {"evaluations a step": sum(cost.values()) * job.config.arm(job.arm).length}


Measures = dict[tuple[str, str, int], dict[str, Any]]


def study(config: Config, folder: Path, record: Record, seed: int = 0) -> Measures:
    """Every arm of every seed on images and in the plane, a worker a core; stores what claims are judged by.

    Returns {(world, arm, seed): measures}; the arm "teacher" holds the ceilings. What an earlier sitting has
    measured is not repeated.
    """
    seeds = range(seed, seed + config.seeds)
    known: Measures = {(r["world"], r["variant"], r["seed"]): r["measures"] for r in record.records("student")}

    def keep(world: str, arm: str, s: int, measures: dict[str, Any]) -> None:
        known[world, arm, s] = measures
        record.write("student", world=world, variant=arm, seed=s, measures=measures)

    for s in seeds:  # here, once, so that no two students train the same teacher
        for world in ["images", *(["plane"] if config.plane_arms else [])]:
            if (world, "teacher", s) not in known:
                keep(world, "teacher", s, ceilings(Job(config, world, "sign", s, folder).load_world(), config, s))
    jobs = [Job(config, "images", arm, s, folder) for s in seeds for arm in config.arms]
    jobs += [Job(config, "plane", arm, s, folder) for s in seeds for arm in config.plane_arms]
    todo = [job for job in jobs if (job.world, job.arm, job.seed) not in known]

    def cost(job: Job) -> float:
        """About the seconds of one core."""
        arm = config.arm(job.arm)
        terms = arm.length * (1 + sum(map(bool, arm.weights.values())))
        return terms * (config.steps * 0.02 if job.world == "images" else config.plane_steps * 0.002)

    found = map_jobs(run_job, todo, workers=config.workers or None, cost=cost, record=record, text="students")
    for job, measures in zip(todo, found, strict=True):
        keep(job.world, job.arm, job.seed, measures)
    for s in seeds:
        own = {(world, arm): m for (world, arm, own_seed), m in known.items() if own_seed == s}
        for name, value in claim_values(own).items():
            record.result(name, value, seed=s)
    return known


def _ratio(top: Mapping[str, Any], bottom: Mapping[str, Any], key: str) -> float:
    return float(top[key]) / float(bottom[key])


def claim_values(students: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, float]:
    """The measures of CLAIMS that one seed's students allow; students: (world, arm) -> measures."""
    out: dict[str, float] = {}

    def get(arm: str, world: str = "images") -> Mapping[str, Any] | None:
        return students.get((world, arm))

    sign, ign, regression = get("sign"), get("ign"), get("regression")
    teacher = get("teacher")
    if sign and teacher:
        out["sign_rise"] = sign["distance, end over best"]
        out["multi_step"] = sign[f"distance {SEVERAL}"] / sign["distance x1"]
        out["one_step"] = sign["distance x1"] / teacher["teacher"]["7"]
        out["projection"] = sign["noise: error"] / sign["noise: error before"]
        out["projection_accuracy"] = sign["noise: accuracy"] - sign["noise: accuracy before"]
        out["inpainting"] = sign["mask: error"] / sign["mask: error, mean image"]
        out["copies"] = sign["copies"] / teacher["copies"]
    if sign and ign:
        out["beats_ign"] = _ratio(ign, sign, "distance x1")
        out["ign_rise"] = ign["distance, end over best"]
    if sign and (longer := get("ign, equal compute")):
        out["beats_ign_compute"] = _ratio(longer, sign, "distance x1")
    if sign and regression:
        out["idempotence"] = _ratio(sign, regression, "idempotence x1")
        drift = [m["distance x4"] / m["distance x1"] for m in (regression, sign)]
        out["again"] = drift[0] / drift[1]
    for measure, arm in (("score_term", "no dmd"), ("pairs_term", "no reg")):
        if sign and (other := get(arm)):
            out[measure] = _ratio(other, sign, "distance x1")
    plane, plane_ign = get("sign", "plane"), get("ign, scratch", "plane")
    scratch, regressed = get("sign, scratch", "plane"), get("regression", "plane")
    if scratch and plane_ign:
        out["plane_modes"] = float(scratch["modes"] - plane_ign["modes"])
        out["plane_beats_ign"] = _ratio(plane_ign, scratch, "distance x1")
    if plane and regressed:
        out["plane_idempotence"] = _ratio(plane, regressed, "idempotence x1")
        out["plane_projection"] = plane["share in modes, projected"] - regressed["share in modes, projected"]
    if plane and (other := get("no idem", "plane")):
        out["idem_term"] = _ratio(other, plane, "idempotence x1")
    return out


def students_of(known: Measures, config: Config, folder: Path, seed: int, world: str, arms: Iterable[str]) -> Any:
    """{arm: finished student} of a study, loaded from its folder."""
    loaded = Job(config, world, "sign", seed, folder).load_world()
    out: dict[str, Any] = {}
    for arm in arms:
        if (world, arm, seed) in known:
            out[arm] = Job(config, world, arm, seed, folder).distil(loaded, progress=False)
    return cast(dict[str, paper.Student], out)
