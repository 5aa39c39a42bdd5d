"""DiDi-Instruct measured: teacher and judge on real text, students of every variant and seed, and what claims need."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.data.bpe import BpeText, bpe_text
from workbench.data.provenance import Provenance
from workbench.data.text import hub_corpus
from workbench.errors import WorkbenchError
from workbench.evaluation.generation import at_entropy, copied, quality
from workbench.losses.masked_diffusion import elbo, mdlm_loss, spread_times
from workbench.models.hub import load_pretrained
from workbench.models.masked_diffusion import sample
from workbench.models.masked_lm import check_vocabulary, load_masked_lm, save_masked_lm, small_masked_lm
from workbench.models.mdlm_dit import load_mdlm, save_mdlm
from workbench.models.transformer import DecoderLM, LMConfig, from_llama, llama_config, to_llama
from workbench.papers import didi_instruct_exact as listed
from workbench.papers.didi_instruct import Guidance, Student, distil, variant_parts
from workbench.papers.didi_instruct_sdtt import sdtt
from workbench.papers.didi_instruct_settings import REFERENCE, Config
from workbench.training.loop import Recipe, fit, step_seed
from workbench.training.pool import map_jobs
from workbench.training.record import Record

JOBS = ("listed", "teacher", "sdtt")  # besides a variant's name: what else one seed measures


@dataclass(frozen=True)
class Task:
    """Teacher, judge and text. draw(part, generator, count): windows (count, L) of a part ("teacher" is training's)."""

    teacher: nn.Module
    judge: nn.Module
    tokenizer: Any
    draw: Callable[[str, torch.Generator, int], Tensor]
    held: Tensor  # non-overlapping windows of the part that is only reported, (N, L)
    train: Tensor  # the teacher's token stream (T,), to look for copies in
    provenance: tuple[Provenance, ...]


def judge_shape(config: Config) -> LMConfig:
    """The small judge: as wide and deep as the teacher, autoregressive, on text that no one else sees."""
    return LMConfig(config.vocabulary, config.teacher_length, config.width, 2 * config.width, 4, 4, config.layers)


def train_teacher(config: Config, text: BpeText, seed: int = 0, record: Record | None = None, **loop: Any) -> nn.Module:
    """A small MDLM from scratch on the teacher's part; returns its average."""
    net = small_masked_lm(config.vocabulary, config.teacher_length, width=config.width, layers=config.layers, seed=seed)

    def loss(m: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(int(batch))
        return {"loss": mdlm_loss(m, text.windows("teacher", config.teacher_length, 64, g), spread_times(64, g), g)}

    recipe = Recipe(steps=config.teacher_steps, lr=3e-3, weight_decay=0.05, warmup=0.03, schedule="cosine", clip=1.0,
                    ema=0.995, seed=seed)  # fmt: skip
    fitted = fit(net, loss, lambda g: torch.randint(2**62, (1,), generator=g), recipe, name="teacher", record=record,
                 **loop)  # fmt: skip
    assert fitted.ema is not None
    return fitted.ema.eval().requires_grad_(False)


def train_judge(config: Config, text: BpeText, seed: int = 0, record: Record | None = None, **loop: Any) -> DecoderLM:
    """The independent judge, on the judge's part alone."""
    judge = DecoderLM(judge_shape(config)).initialise(torch.Generator().manual_seed(seed))
    recipe = Recipe(steps=config.judge_steps, lr=3e-3, weight_decay=0.1, warmup=0.03, schedule="cosine", clip=1.0,
                    ema=0.99, seed=seed)  # fmt: skip
    fitted = fit(
        judge, lambda m, x: {"loss": m(x[:, :-1], x[:, 1:])},
        lambda g: text.windows("judge", config.teacher_length, 64, g), recipe, name="judge", record=record, **loop,
    )  # fmt: skip
    assert isinstance(fitted.ema, DecoderLM)
    return fitted.ema.eval().requires_grad_(False)


def save_reference(config: Config, folder: Path = REFERENCE) -> None:
    """Train the small teacher and judge and store both in half precision; each folder opens with transformers."""
    from transformers import LlamaConfig

    text = bpe_text(config.packages, config.vocabulary, config.split)
    teacher, judge = train_teacher(config, text), train_judge(config, text)
    save_masked_lm(cast(Any, teacher.half()), text.tokenizer, folder / "teacher")
    shape: dict[str, Any] = {**llama_config(judge_shape(config)), "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**shape).save_pretrained(folder / "judge")
    state = {name: t.half().contiguous() for name, t in to_llama(judge).items()}
    save_file(state, folder / "judge" / "model.safetensors", {"format": "pt"})


def load_judge(folder: Path, config: Config) -> DecoderLM:
    """The stored judge, float32. Raises WorkbenchError: not there; of another shape than the config's."""
    from safetensors.torch import load_file

    judge = DecoderLM(judge_shape(config))
    try:
        judge.load_state_dict({n: t.float() for n, t in from_llama(load_file(folder / "model.safetensors")).items()})
    except (OSError, RuntimeError) as error:
        line = str(error).splitlines()[-1].strip()
        raise WorkbenchError(f"the judge in {folder} does not fit this config: {line}; use -p teacher=train") from None
    return judge.eval().requires_grad_(False)


def load_task(config: Config, folder: Path | None = None) -> Task:
    """Teacher, judge and text of a config: the committed small ones, trained here, or an MDLM with a Hub judge.

    folder: of the run, where trained ones are kept. Raises WorkbenchError in one line before anything trains.
    """
    if config.model != "small":
        return _hub_task(config, folder or Path("."))
    text = bpe_text(config.packages, config.vocabulary, config.split)
    if len(text.parts["report"]) < 2 * config.length:
        raise WorkbenchError(f"length {config.length} leaves no held-out window: the text is too short")
    if config.teacher == "train":
        record = Record(folder / "teachers") if folder else None
        teacher, judge = train_teacher(config, text, record=record), train_judge(config, text, record=record)
    else:
        if not (REFERENCE / "teacher").is_dir():
            raise WorkbenchError(f"no committed teacher in {REFERENCE}: use -p teacher=train")
        teacher = load_masked_lm(str(REFERENCE / "teacher"), vocabulary=text.vocabulary)
        judge = load_judge(REFERENCE / "judge", config)
    return Task(
        teacher.requires_grad_(False), judge, text.tokenizer,
        lambda part, g, count: text.windows(part, config.length, count, g), text.tiled("report", config.length),
        text.parts["teacher"], text.provenance,
    )  # fmt: skip


def _hub_task(config: Config, folder: Path) -> Task:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, config.tokenizer)
    teacher = load_mdlm(config.model)
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    check_vocabulary(teacher, len(tokenizer) - 1, config.model)
    judge = load_pretrained(AutoModelForCausalLM, config.judge).eval().requires_grad_(False)
    if judge.config.vocab_size < len(tokenizer) - 1:
        raise WorkbenchError(
            f"judge {config.judge!r} knows {judge.config.vocab_size} tokens, the tokenizer has {len(tokenizer) - 1}: "
            "the judge must read the teacher's tokens"
        )
    corpus = hub_corpus(
        config.data, config.tokenizer, config.tokens, folder=folder / "text", validation=64 * config.length
    )

    def draw(part: str, g: torch.Generator, count: int) -> Tensor:
        start = torch.randint(len(corpus.train) - config.length + 1, (count, 1), generator=g).numpy()
        at = start + np.arange(config.length)
        return torch.from_numpy(np.asarray(corpus.train)[at].astype(np.int64))

    held = torch.from_numpy(np.asarray(corpus.report).astype(np.int64))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Task(
        teacher.to(device).requires_grad_(False), judge.to(device), tokenizer, draw,
        held[: len(held) // config.length * config.length].view(-1, config.length),
        torch.from_numpy(np.asarray(corpus.train[:1_000_000]).astype(np.int64)), (corpus.provenance,),
    )  # fmt: skip


def reference_text(config: Config, task: Task, seed: int) -> Callable[[torch.Generator, int], Tensor]:
    """What the critic takes for real: the training text, or a pool that the teacher wrote in L steps."""
    if config.reference == "data":
        return lambda g, count: task.draw("teacher", g, count)
    pool = sample(task.teacher, 512, config.length, config.length, torch.Generator().manual_seed(seed))
    return lambda g, count: pool[torch.randint(len(pool), (count,), generator=g)]


def distil_on_text(config: Config, task: Task, variant: str, seed: int, record: Record | None, **loop: Any) -> Student:
    """One student of a variant; loaded where its record holds it finished."""
    return distil(
        task.teacher, reference_text(config, task, seed), config.length, config, variant_parts(config, variant), seed,
        record, name=variant, **loop,
    )  # fmt: skip


def save_student(net: nn.Module, tokenizer: Any, folder: Path) -> None:
    """A folder: of a small student, one that AutoModelForMaskedLM opens; of an MDLM, its own config and weights."""
    if hasattr(net, "net"):
        save_masked_lm(cast(Any, net), tokenizer, folder)
    else:
        save_mdlm(cast(Any, net), folder)
        tokenizer.save_pretrained(folder)


# --- measuring -------------------------------------------------------------------------------------------------------


def guidance(config: Config, student: Student, steps: int) -> Guidance:
    """RGAS as the config has it."""
    return Guidance(student.critic, steps, config.guidance, config.candidates, config.rerank_from)


def measure(config: Config, task: Task, net: nn.Module, seed: int, *, temperature: float = 1.0,
            guide: Student | None = None, nfe: tuple[int, ...] | None = None) -> dict[str, Any]:  # fmt: skip
    """{"NAME @ N": value} over the NFE: the judge's loss, entropies, distinct-n, seconds a sequence.

    Every model of a seed draws from the same generator, never the one of its training.
    """
    out: dict[str, Any] = {}
    for steps in nfe or config.nfe:
        generator = torch.Generator().manual_seed(step_seed(seed, 0, steps))
        move = guidance(config, guide, steps).mover(net, temperature) if guide else None
        start = time.perf_counter()
        tokens = sample(net, config.samples, config.length, steps, generator, temperature=temperature, move=move)
        seconds = (time.perf_counter() - start) / config.samples
        found = quality(task.judge, tokens) | {"copied": copied(tokens, task.train), "seconds": seconds}
        out |= {f"{name} @ {steps}": value for name, value in found.items()}
    return out


@dataclass(frozen=True)
class Job:
    """One student (or the teacher, or the listed world) of one seed, in whatever process."""

    config: Config
    name: str
    seed: int
    folder: Path

    @property
    def record(self) -> Record:
        return Record(self.folder / "students" / f"{self.name}, seed {self.seed}")


def run_job(job: Job) -> dict[str, Any]:
    """Train and measure what the job names."""
    config, seed = job.config, job.seed
    if job.name == "listed":
        return cast(dict[str, Any], listed.study(config, seed, job.record))
    task = load_task(config, job.folder)
    if job.name == "teacher":
        out = {
            f"T {temperature:g} {key}": value
            for temperature in config.temperatures
            for key, value in measure(config, task, task.teacher, seed, temperature=temperature).items()
        }
        held = task.held[:64].to(next(task.teacher.parameters()).device)
        out["elbo"] = float(elbo(task.teacher, held, torch.Generator().manual_seed(seed)).mean())
        real = task.held[: config.samples]
        return out | {f"real {key}": value for key, value in quality(task.judge, real).items()}
    if job.name == "sdtt":
        start = time.perf_counter()
        net = sdtt(task.teacher, reference_text(config, task, seed), config.length, config, seed, job.record,
                   progress=False)  # fmt: skip
        return measure(config, task, net, seed) | {"training seconds": time.perf_counter() - start}
    student = distil_on_text(config, task, job.name, seed, job.record, progress=False)
    out = measure(config, task, student.net, seed) | {"training seconds": student.fitted.seconds}
    out["critic accuracy"] = student.fitted.history[-1]["critic/accuracy"]
    if job.name == "didi":
        guided = measure(config, task, student.net, seed, guide=student)
        out |= {f"guided {key}": value for key, value in guided.items()}
    return out


def study(config: Config, folder: Path, record: Record, seed: int = 0) -> dict[tuple[str, int], dict[str, Any]]:
    """Every job of every seed; stores what claims are judged by and returns {(name, seed): measures}.

    What was measured in an earlier sitting of the same run is not repeated.
    """
    seeds = range(seed, seed + config.seeds)
    names = ["teacher", *config.variants, *(["sdtt"] if config.sdtt_steps else []), "listed"]
    known = {(r["variant"], r["seed"]): r["measures"] for r in record.records("student")}
    if config.teacher == "train" and config.model == "small":
        load_task(config, folder)  # here, once, so that no two jobs train the same teacher
    todo = [Job(config, name, s, folder) for s in seeds for name in names if (name, s) not in known]
    weights = {"listed": 1.5, "teacher": 1.0}
    done = map_jobs(run_job, todo, workers=config.workers or None, cost=lambda job: weights.get(job.name, 1.2),
                    record=record, text="students")  # fmt: skip
    for job, measures in zip(todo, done, strict=True):
        known[job.name, job.seed] = measures
        record.write("student", variant=job.name, seed=job.seed, measures=measures)
    for s in seeds:
        for measure_, value in claim_values({n: known[n, s] for n in names}, config).items():
            record.result(measure_, value, seed=s)
    return known


def frontier(teacher: Mapping[str, Any], config: Config, steps: int, by: str = "entropy") -> list[tuple[float, float]]:
    """The teacher's (entropy, judge's loss) at one NFE, a point a temperature."""
    return [(teacher[f"T {t:g} {by} @ {steps}"], teacher[f"T {t:g} loss @ {steps}"]) for t in config.temperatures]


def gain(measures: Mapping[str, Any], teacher: Mapping[str, Any], config: Config, steps: int, prefix: str = "",
         by: str = "entropy") -> float:  # fmt: skip
    """How far a sampler's judge loss lies below the teacher's of the same NFE and entropy, nats a token."""
    there = at_entropy(frontier(teacher, config, steps, by), measures[f"{prefix}{by} @ {steps}"])
    return there - measures[f"{prefix}loss @ {steps}"]


def claim_values(jobs: Mapping[str, Mapping[str, Any]], config: Config) -> dict[str, float]:
    """The measures of CLAIMS that one seed's jobs allow, by name; jobs: name → measures."""
    out: dict[str, float] = {}
    few, most = 4, max(config.nfe)
    if "listed" in jobs and "didi" in jobs["listed"]:
        world = jobs["listed"]
        out["listed_ikl"] = world["didi"]["ikl"] / world["teacher"]["ikl"]
        out["listed_kl"] = world["didi"]["kl 2"] / world["teacher"]["kl 2"]
        for variant, name in (
            ("no score decomposition", "listed_decomposition"),
            ("no coupled time", "listed_coupled"),
        ):
            if variant in world:
                out[name] = world[variant]["kl 2"] / world["didi"]["kl 2"]
    didi, teacher = jobs.get("didi"), jobs.get("teacher")
    if didi is None or teacher is None or few not in config.nfe:
        return out
    out["few_steps"] = teacher[f"T 1 loss @ {few}"] - didi[f"loss @ {few}"]
    out["few_steps_matched"] = gain(didi, teacher, config, few)
    out["few_steps_matched_pooled"] = gain(didi, teacher, config, few, by="pooled")
    out["entropy_kept"] = didi[f"entropy @ {few}"] / teacher[f"T 1 entropy @ {few}"]
    out["pooled_kept"] = didi[f"pooled @ {few}"] / teacher[f"T 1 pooled @ {few}"]
    out["distinct_kept"] = didi[f"distinct2 @ {few}"] / teacher[f"T 1 distinct2 @ {few}"]
    if 8 in config.nfe and most > 8:
        out["speed"] = teacher[f"T 1 loss @ {most}"] - didi["loss @ 8"]
    out["guidance"] = gain(didi, teacher, config, few, "guided ") - gain(didi, teacher, config, few)
    out["guidance_raw"] = didi[f"loss @ {few}"] - didi[f"guided loss @ {few}"]
    if sdtt_ := jobs.get("sdtt"):
        out["against_sdtt"] = gain(didi, teacher, config, few) - gain(sdtt_, teacher, config, few)
    for variant, name in (
        ("no score decomposition", "decomposition"), ("no coupled time", "coupled"), ("no omega", "omega"),
        ("no regularisation", "regularisation"), ("no group normalisation", "grouping"),
    ):  # fmt: skip
        if other := jobs.get(variant):
            out[name] = gain(didi, teacher, config, few) - gain(other, teacher, config, few)
    return out


def honest_cost(config: Config, steps: int) -> dict[str, int]:
    """Network passes a sequence with RGAS at this NFE."""
    critic = cast(Any, None)  # passes depend on the settings alone
    return Guidance(critic, steps, config.guidance, config.candidates, config.rerank_from).passes()
