"""Talking Models' experiments: one student an arm, task, place of the dial and seed; what is measured of each."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from workbench.errors import WorkbenchError
from workbench.models.stages import Stages
from workbench.papers.talking_models import Config, Pupil, effective_rank
from workbench.papers.talking_models_tasks import (
    Task,
    at_gaps,
    batches,
    evaluate,
    fit_probe,
    knows_labels,
    load_task,
    load_teacher,
    save_model,
    small_model,
)  # fmt: skip
from workbench.training.loop import Recipe, adamw, fit
from workbench.training.pool import map_jobs
from workbench.training.record import Record


@dataclass(frozen=True)
class Job:
    """One student to train and measure, in whatever process."""

    config: Config
    task: str
    arm: str
    seed: int
    gap: float
    folder: Path  # of the run

    @property
    def name(self) -> str:
        return f"{self.task}, {self.arm}, gap {self.gap:g}, seed {self.seed}"

    @property
    def record(self) -> Record:
        return Record(self.folder / "students" / self.name)


def load_job(job: Job) -> tuple[Task, Stages]:
    """The job's task and its teacher: every arm of a seed gets the same ones, "random teacher" apart."""
    task = load_task(job.config, job.task, job.seed, job.gap)
    setup = job.config.setup(job.task, job.arm)
    return task, load_teacher(job.config, task, job.seed, job.folder / "teachers", random=setup.random)


def build_pupil(job: Job, task: Task, teacher: Stages) -> Pupil:
    """The arm before training. Students of one seed start from the same weights whatever the arm.

    Raises WorkbenchError where logit distillation is asked for and the teacher's head predicts something else.
    """
    config, setup = job.config, job.config.setup(job.task, job.arm)
    if setup.method == "logits" and not knows_labels(teacher.model, task):
        raise WorkbenchError(
            f"the teacher's head predicts {teacher.outputs} classes that are not the data's {len(task.labels)}: "
            'use "probe KD" instead of "logit KD"'
        )
    student = small_model(task, config.student_width, config.student_layers, config.patch, 1_000 + job.seed)
    probe = fit_probe(teacher, task) if setup.method == "probe" else None
    stages = Stages(student, config.student_low, config.student_high)
    return Pupil(stages, teacher, setup, config, seed=job.seed, probe=probe)


def train_student(job: Job, task: Task, teacher: Stages, **loop: Any) -> Pupil:
    """Train one arm (or load it, where its record holds it finished): same steps and batches for all arms of a seed."""
    config, pupil = job.config, build_pupil(job, task, teacher)
    recipe = Recipe(
        steps=config.steps, lr=pupil.setup.lr, weight_decay=config.decay, warmup=0.1, schedule="cosine", clip=1.0,
        precision=config.precision, save_every=config.save_every, seed=job.seed,
    )  # fmt: skip
    optimizer = None
    if not pupil.setup.frozen:
        optimizer = adamw(pupil, recipe)
        theirs = {id(p) for p in pupil.teacher.parameters()}
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": kept, "lr": rate}
            for group in optimizer.param_groups
            for inside, rate in ((False, recipe.lr), (True, recipe.lr * config.teacher_rate))
            if (kept := [p for p in group["params"] if (id(p) in theirs) == inside])
        ]
        optimizer = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps)
    fit(
        pupil, lambda model, batch: model(batch), batches(task.train, config.batch), recipe, name=job.name,
        record=job.record, optimizer=optimizer, **loop,
    )  # fmt: skip
    return pupil.eval()


@torch.no_grad()
def message_measures(pupil: Pupil, task: Task, limit: int = 512) -> dict[str, float]:
    """Of the messages about `limit` test examples, class token and all: how close, how rich, what can be read off.

    mc: d(Enc_S(a_S), Enc_T(a_T)). sc: L_SC. rank: effective rank of the questions.
    probe: share of targets (classes; stars above their median) that a linear probe reads off the questions of half
    the examples, asked on the other half.
    echo: d(b_S, b'_S), 0 where the student hears its own state again. lecture: d(reply, Enc_T(b_T)), 0 where the
    teacher replies what it makes of the input unasked. drift: d(b'_1, b'_N), what further rounds changed.
    """
    from sklearn.linear_model import LogisticRegression

    device = next(pupil.parameters()).device
    inputs, target = task.test.take(torch.arange(min(limit, len(task.test))))
    said = pupil.talk({k: v.to(device) for k, v in inputs.items()})
    ours, theirs = said.words["a_S"], said.words["a_T"]
    flat = (ours - ours.mean(0)).flatten(0, 1).cpu()  # what differs from input to input, not from place to place
    y = target if task.labels else (target > target.median()).long()
    x, half = ours.flatten(1).cpu().numpy(), len(target) // 2
    reader = LogisticRegression(C=0.1, max_iter=300).fit(x[:half], y[:half])
    return {
        "mc": float(pupil.message_consistency(said)),
        "sc": float(pupil.state_consistency(said)),
        "rank": effective_rank(flat),
        "spread": float(theirs.var(0).mean().sqrt()),
        "probe": float(reader.score(x[half:], y[half:])),
        "echo": float(pupil.distance(said.b_S, said.heard[-1])),
        "lecture": float(pupil.distance(said.replies[-1], said.words["b_T"])),
        "drift": float(pupil.distance(said.heard[0], said.heard[-1])),
    }


def measure_student(job: Job) -> dict[str, Any]:
    """Train the job's student and measure it WITHOUT any message: "error" on the test part, "validation".

    With messages also message_measures; where the teacher adapted, its error on its own task before and after.
    """
    task, teacher = load_job(job)
    frozen = job.config.setup(job.task, job.arm).frozen
    before = evaluate(teacher, task.original) if not frozen and task.original is not None else None
    pupil = train_student(job, task, teacher, progress=False)
    out: dict[str, Any] = {
        "error": evaluate(pupil.student, task.test), "validation": evaluate(pupil.student, task.validation),
        "train": evaluate(pupil.student, task.train),
    }  # fmt: skip
    if pupil.setup.method == "messages":
        out |= message_measures(pupil, task)
    if before is not None and task.original is not None:
        out |= {"teacher before": before, "teacher after": evaluate(pupil.teacher, task.original)}
    folder = job.folder / "students" / job.name / "student"
    save_model(pupil.student.model, folder, task)
    return out


def measure_teacher(job: Job) -> dict[str, Any]:
    """The teacher itself: its error on its own task and, where its head fits, on the downstream test part; sizes."""
    task, teacher = load_job(job)
    student = small_model(task, job.config.student_width, job.config.student_layers, job.config.patch, 0)
    out: dict[str, Any] = {
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "student parameters": sum(p.numel() for p in student.parameters()),
    }
    if task.original is not None:
        out["original"] = evaluate(teacher, task.original)
    if knows_labels(teacher.model, task):
        out["downstream"] = evaluate(teacher, task.test)
    return out


Known = dict[tuple[str, float, str, int], dict[str, Any]]  # (task, gap, arm, seed) -> measures


def jobs_of(config: Config, folder: Path, seed: int) -> list[Job]:
    """Every student of a run: all arms at the main place of the dial, gap_arms at the others; seeds from 10 seed up."""
    return [
        Job(config, task, arm, s, gap, folder)
        for s in range(10 * seed, 10 * seed + config.seeds)
        for task in config.tasks
        for gap in at_gaps(config)
        for arm in (config.arms if gap == config.gap else config.gap_arms)
    ]


def run_study(config: Config, record: Record, seed: int) -> Known:
    """Every student of the run, measured once; one result a seed for each claim that the arms allow.

    The teacher's own measures are stored as the arm "teacher". A student measured before is not trained again.
    """
    jobs = jobs_of(config, record.folder, seed)
    known: Known = {(r["task"], r["gap"], r["arm"], r["seed"]): r["measures"] for r in record.records("student")}

    def store(done: list[Job], measures: list[dict[str, Any]], arm: str | None = None) -> None:
        for job, found in zip(done, measures, strict=True):
            key = (job.task, job.gap, arm or job.arm, job.seed)
            if key not in known:
                known[key] = found
                record.write("student", task=job.task, gap=job.gap, arm=key[2], seed=job.seed, measures=found,
                             variant=f"{job.task}: {key[2]}, gap {job.gap:g}")  # fmt: skip

    teachers = {
        (j.task, j.gap, j.seed): replace(j, arm="alone")
        for j in jobs
        if (j.task, j.gap, "teacher", j.seed) not in known
    }
    # one process a teacher, before the places of the dial that share it
    main, others = ([t for t in teachers.values() if (t.gap == config.gap) == first] for first in (True, False))
    workers = config.workers or None
    for group, text in ((main, "teachers"), (others, "teachers at other places of the dial")):
        store(group, map_jobs(measure_teacher, group, workers=workers, record=record, text=text), "teacher")
    todo = [j for j in jobs if (j.task, j.gap, j.arm, j.seed) not in known]
    store(todo, map_jobs(measure_student, todo, workers=workers, record=record, text="students"))
    for (task, gap, arm, s), measures in known.items():
        if "error" in measures:  # no claim's measure, but the table a reader asks for
            record.result(f"error: {task}, {arm}, gap {gap:g}", measures["error"], seed=s)
    for s in sorted({job.seed for job in jobs}):
        for measure, value in claim_values(known, config, s).items():
            record.result(measure, value, seed=s)
    return known


def claim_values(known: Known, config: Config, seed: int) -> dict[str, float]:
    """The measures of CLAIMS that one seed's students allow, by name. Gains are errors saved: above 0 is better."""
    out: dict[str, float] = {}
    for task in config.tasks:
        pairs = {
            "kd_gain": ("logit KD", "alone"), "talk_gain": ("two-way", "alone"), "over_kd": ("two-way", "logit KD"),
            "over_hint": ("two-way", "feature KD"), "question": ("two-way", "one-way"),
            "knowledge": ("two-way", "random teacher"), "wording": ("two-way", "no MC"),
            "decoding": ("two-way", "no SC"), "rounds": ("3 rounds", "two-way"),
        }  # fmt: skip
        for name, (better, worse) in pairs.items():
            found = gain(known, task, config.gap, seed, better, worse)
            if found is not None:
                out[f"{name}_{task}"] = found
        own = known.get((task, config.gap, "two-way", seed))
        for name, arm, term in (("consistency", "no MC", "mc"), ("copies", "no SC", "sc")):
            without = known.get((task, config.gap, arm, seed))
            if own and without:
                out[f"{name}_{task}"] = without[term] / own[term]
        if adapted := known.get((task, config.gap, "adapting teacher", seed)):
            if "teacher after" in adapted:
                out[f"forgetting_{task}"] = adapted["teacher after"] - adapted["teacher before"]
        near, far = min(at_gaps(config)), max(at_gaps(config))
        ends = [gain(known, task, at, seed, "two-way", "logit KD") for at in (near, far)]
        if near < far and ends[0] is not None and ends[1] is not None:
            out[f"gap_{task}"] = ends[1] - ends[0]
    return out


def gain(known: Known, task: str, gap: float, seed: int, better: str, worse: str) -> float | None:
    """Error of arm `worse` minus error of arm `better`, the same seed; None where one of them was not trained."""
    first, second = (known.get((task, gap, arm, seed)) for arm in (better, worse))
    return second["error"] - first["error"] if first and second else None


def seeds_of(known: Known) -> list[int]:
    """The seeds of a study, in order."""
    return sorted({seed for *_, seed in known})
