"""The soft-tokens study: every arm of every seed trained, tested in six modes on both skills, and judged."""

import copy
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from workbench.evaluation.pass_at_k import pass_curve
from workbench.models.hub import load_pretrained
from workbench.papers.soft_tokens import (
    Arm,
    Config,
    Mode,
    chain_entropy,
    generate,
    load_base,
    load_task,
    six_modes,
    train,
)  # fmt: skip
from workbench.papers.soft_tokens_tasks import Questions, Task, save_model
from workbench.training.loop import step_seed
from workbench.training.pool import map_jobs
from workbench.training.record import Record

TRAILED: tuple[Arm, ...] = ("hard", "soft")  # arms whose held-out skill is followed while they train


def right_counts(
    model: Any, task: Task, questions: Questions, mode: Mode, *, samples: int, seed: int, rows: int
) -> list[int]:
    """Right answers of `samples` chains for every question, at most `rows` chains at a time; greedy answers."""
    step, out = max(1, rows // samples), []
    for start in range(0, len(questions), step):
        part = slice(start, start + step)
        some = Questions(questions.ids[part], questions.mask[part], questions.truths[part]).to(model.device)
        chains = generate(model, task, some, mode, seed=step_seed(seed, start), samples=samples)
        out += (task.marks(chains, some) == 2).view(-1, samples).sum(1).tolist()
    return out


def test_questions(config: Config, task: Task, split: str, seed: int, count: int = 0) -> Questions:
    """The same questions of a split for every arm of a seed (at most as many as there are)."""
    generator = torch.Generator().manual_seed(step_seed(seed, 0, 1))  # training draws at step 1 and later
    return task.draw(generator, count or config.problems, split)


def in_tests(config: Config, task: Task) -> Task:
    """The task with the chain's limit of the tests."""
    return replace(task, limit=config.test_thoughts or config.thoughts)


def mode_curve(
    config: Config, model: Any, task: Task, questions: Questions, name: str, mode: Mode, seed: int
) -> dict[str, list[float]]:
    """k -> [mean, low, high] of pass@k over questions; a greedy mode has k = 1 only."""
    greedy = name.endswith("greedy")
    n = 1 if greedy else config.draws
    counts = right_counts(model, task, questions, mode, samples=n, seed=seed, rows=config.eval_rows)
    curve = pass_curve(n, counts, (1,) if greedy else config.ks)
    return {str(k): [v.mean, v.low, v.high] for k, v in curve.items()}


def entropies(config: Config, model: Any, task: Task, questions: Questions, mode: Mode, seed: int) -> list[float]:
    """Mean entropy (nats) of the next token at τ = 1 by position of the chain, sampled in `mode`."""
    some = Questions(questions.ids, questions.mask, questions.truths).to(model.device)
    steps = chain_entropy(model, generate(model, task, some, mode, seed=seed), mode, config.rows)
    used = steps.mask.float()
    return ((steps.entropy * used).sum(0) / used.sum(0).clamp(min=1)).tolist()


def measure(config: Config, model: Any, task: Task, seed: int) -> dict[str, Any]:
    """{"test" | "other": {mode: {k: [mean, low, high]}}, "nll", ..., "entropy": {kind: [by position]}}."""
    modes = six_modes(config)
    out: dict[str, Any] = dict(task.knowledge(model))
    task = in_tests(config, task)
    for split in ("test", "other"):
        questions = test_questions(config, task, split, seed)
        out[split] = {name: mode_curve(config, model, task, questions, name, m, seed) for name, m in modes.items()}
    questions = test_questions(config, task, "test", seed, config.trail_problems)
    out["entropy"] = {
        kind: entropies(config, model, task, questions, modes[f"{kind} sample"], seed)
        for kind in ("hard", "soft", "fuzzy")
    }
    return out


def validate(config: Config, model: Any, task: Task, arm: Arm, seed: int, *, whole: bool) -> dict[str, float]:
    """Scores of one validation: "own", greedy in the arm's own mode; "hard", greedy tokens; if `whole` also "sample"
    (p@1), "other_pass" (largest k), "other_greedy", and what `knowledge` measures. Hard inference but for "own"."""
    modes, n, task = six_modes(config), config.trail_problems, in_tests(config, task)
    questions = test_questions(config, task, "validation", seed, n)

    def score(name: str, asked: Questions, samples: int = 1) -> list[int]:
        return right_counts(model, task, asked, modes[name], samples=samples, seed=seed, rows=config.eval_rows)

    out = {"hard": float(np.mean(score("hard greedy", questions)))}
    kind = config.mode(arm).kind
    out["own"] = out["hard"] if kind == "hard" else float(np.mean(score(f"{kind} greedy", questions)))
    if whole:
        other = test_questions(config, task, "other", seed, n)
        k = max(config.ks)
        out["sample"] = pass_curve(config.draws, score("hard sample", questions, config.draws), (1,))[1].mean
        out["other_pass"] = pass_curve(config.draws, score("hard sample", other, config.draws), (k,))[k].mean
        out["other_greedy"] = float(np.mean(score("hard greedy", other)))
        out |= task.knowledge(model)
    return out


@dataclass(frozen=True)
class Job:
    """One arm of one seed, in whatever process."""

    config: Config
    arm: Arm
    seed: int
    folder: Path

    @property
    def record(self) -> Record:
        return Record(self.folder / "arms" / f"{self.arm}, seed {self.seed}")

    @property
    def student(self) -> Path:
        """Where the selected model lies, as transformers saves it."""
        return self.folder / "arms" / f"{self.arm}, seed {self.seed}" / "student"


def _replace_model(model: Any, task: Task, folder: Path) -> None:
    """Write a model's folder whole or not at all: a kill leaves the one before."""
    fresh = folder.with_name(f".{folder.name}-{os.getpid()}")
    save_model(model, task, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def trained(job: Job, task: Task, base: Any, on_log: Callable[[int, dict[str, Any]], None] | None = None) -> Any:
    """The arm's model: trained, or loaded where it is finished. The best own-mode greedy validation decides which
    step's weights are kept, the later of two equal ones. Every validation is a record "trail" of the job.
    on_log(step, logged): called at every logged step."""
    config, record = job.config, job.record
    known = {r["step"]: r for r in record.records("trail")}
    best = max((r["own"], s) for s, r in known.items()) if known else (-1.0, 0)

    def note(step: int, logged: dict[str, Any], model: Any) -> None:
        nonlocal best
        if on_log:
            on_log(step, logged)
        if step % config.every and step != config.steps:
            return
        if step not in known:
            known[step] = validate(config, model, task, job.arm, job.seed, whole=job.arm in TRAILED)
            record.write("trail", step=step, **known[step])
        if (known[step]["own"], step) >= best:
            best = known[step]["own"], step
            _replace_model(model, task, job.student)

    if job.arm in TRAILED and 0 not in known:
        known[0] = validate(config, base, task, job.arm, job.seed, whole=True)
        record.write("trail", step=0, **known[0])
    train(config, task, copy.deepcopy(base), job.arm, job.seed, record, note, progress=False)
    return load_pretrained(AutoModelForCausalLM, str(job.student)).to(base.device).eval()


def measure_arm(job: Job) -> dict[str, Any]:
    """Train the job's arm (or load it) and measure it; "trail" holds its validations."""
    task = load_task(job.config, job.seed)
    base = load_base(job.config, task, job.seed, job.folder, progress=False)
    model = base if job.arm == "base" else trained(job, task, base)
    out = measure(job.config, model, task, job.seed)
    steps = {r["step"]: r for r in job.record.records("trail")}
    out["trail"] = [{k: v for k, v in steps[s].items() if k != "kind"} for s in sorted(steps)]
    return out


def train_base(job: Job) -> None:
    """Train a seed's base model and leave it in the run's folder."""
    load_base(job.config, load_task(job.config, job.seed), job.seed, job.folder, progress=False)


def study(config: Config, folder: Path, record: Record, seed: int = 0) -> dict[tuple[str, int], dict[str, Any]]:
    """{(arm, seed): measures} of every arm and seed; stores what claims are judged by. Finished arms are kept."""
    seeds = range(seed, seed + config.seeds)
    workers = config.workers or None
    known = {(r["arm"], r["seed"]): r["measures"] for r in record.records("arm")}
    todo = [job for s in seeds for a in config.arms if ((job := Job(config, a, s, folder)).arm, s) not in known]
    if config.model == "small":
        fresh = [Job(config, "base", s, folder) for s in seeds if not (folder / f"base-{s}" / "config.json").exists()]
        map_jobs(train_base, fresh, workers=workers, record=record, text="base models")
    measured = map_jobs(measure_arm, todo, workers=workers, record=record, text="arms",
                        cost=lambda job: 0.3 if job.arm == "base" else 1.0)  # fmt: skip
    for job, measures in zip(todo, measured, strict=True):
        known[job.arm, job.seed] = measures
        record.write("arm", arm=job.arm, seed=job.seed, measures=measures)
    for s in seeds:
        for name, value in claim_values({a: known[a, s] for a in config.arms}, max(config.ks)).items():
            record.result(name, value, seed=s)
    return known


def matched(trail: Sequence[Mapping[str, float]], target: float, key: str) -> float:
    """`key` of a trail at the first moment its hard greedy validation reaches `target`, linear between validations.

    The trail's last value where it never does. trail: in order of steps, each with "hard" and `key`.
    """
    before = trail[0]
    for now in trail:
        if now["hard"] >= target:
            gap = now["hard"] - before["hard"]
            share = (target - before["hard"]) / gap if gap > 0 else 1.0
            return before[key] + max(0.0, share) * (now[key] - before[key])
        before = now
    return trail[-1][key]


def selected(trail: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The validation whose weights were kept: the best in its own mode, the later of two equal ones."""
    return max((r for r in trail if r["step"] > 0), key=lambda r: (r["own"], r["step"]))


def score(arm: Mapping[str, Any], split: str, mode: str, k: int = 1) -> float:
    """pass@k of one arm's measures."""
    return arm[split][mode][str(k)][0]


def mean_entropy(arm: Mapping[str, Any]) -> float:
    """Mean entropy over the chain's positions, hard sampling, nats."""
    return float(np.mean(arm["entropy"]["hard"]))


def claim_values(arms: Mapping[Any, Mapping[str, Any]], k: int) -> dict[str, float]:
    """The measures of CLAIMS that one seed's arms allow; k: the largest of pass@k. Hard inference unless said."""
    out: dict[str, float] = {}
    base, hard, soft = (arms.get(a) for a in ("base", "hard", "soft"))
    if soft:
        own = soft["test"]
        out["hard_inference"] = own["hard greedy"]["1"][0] - own["soft greedy"]["1"][0]
        out["hard_inference_pass"] = own["hard sample"][str(k)][0] - own["soft sample"][str(k)][0]
    if base and soft:
        out["soft_learns"] = score(soft, "test", "hard greedy") - score(base, "test", "hard greedy")
        out["other_kept"] = score(soft, "other", "hard sample", k) - score(base, "other", "hard sample", k)
        out["nll_kept"] = soft["nll"] - base["nll"]
        out["entropy_kept"] = mean_entropy(soft) / mean_entropy(base)
    if hard and soft:
        out["greedy_parity"] = score(soft, "test", "hard greedy") - score(hard, "test", "hard greedy")
        out["sample_gap"] = score(hard, "test", "hard sample") - score(soft, "test", "hard sample")
        out["pass_gain"] = score(soft, "test", "hard sample", k) - score(hard, "test", "hard sample", k)
        out["other_pass_gain"] = score(soft, "other", "hard sample", k) - score(hard, "other", "hard sample", k)
        out["nll_gain"] = hard["nll"] - soft["nll"]
        out["entropy_gain"] = mean_entropy(soft) - mean_entropy(hard)
        end = selected(soft["trail"])
        out["matched_nll_gain"] = matched(hard["trail"], end["hard"], "nll") - end["nll"]
        out["matched_pass_gain"] = end["other_pass"] - matched(hard["trail"], end["hard"], "other_pass")
    for name, other in (("noise_limit", "soft, noise x9"), ("noise_place", "soft, hidden noise")):
        if soft and other in arms:
            out[name] = score(soft, "test", "hard greedy") - score(arms[other], "test", "hard greedy")
    if base and "fuzzy" in arms:
        out["fuzzy_learns"] = score(arms["fuzzy"], "test", "hard greedy") - score(base, "test", "hard greedy")
    return out
