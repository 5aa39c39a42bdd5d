"""Less Data, More Security (arXiv 2507.02964): domain-adaptive continued pre-training (DAP) of causal language models.

L(theta) = -(1 / sum_b |x_b|) sum_b sum_{t>=2} log p_theta(x_{b,t} | x_{b,<t}) over packed text is the only loss: no
prompt mask, no replay, no KL term. Which parameters and values "constrained" stands for the abstract does not say: the
learning rates are ours, and frozen embeddings, replay and LoRA are arms beside the main one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench.data.bpe import train_bpe
from workbench.data.packing import end_of_text, pack, tokenise
from workbench.data.pages import documentation
from workbench.data.text import Mixture, Windows
from workbench.errors import WorkbenchError
from workbench.evaluation import multiple_choice as mc
from workbench.evaluation.language import held_out_loss
from workbench.evaluation.paired import bootstrap, mcnemar
from workbench.evaluation.security_benchmarks import BENCHMARKS, read_benchmark
from workbench.losses.causal_lm import next_token_loss, own_loss
from workbench.models.causal_lm import (
    context_limit,
    freeze_embeddings,
    load_causal_lm,
    load_sharded,
    load_tokenizer,
    recompute_activations,
    save_model,
    small_llama,
    trainable,
    with_lora,
)
from workbench.papers import cyber_dap_material
from workbench.papers.cyber_dap_bench import bench
from workbench.papers.cyber_dap_material import PARTS, Material
from workbench.papers.cyber_dap_settings import (
    ABOUT,
    ARXIV,
    AUTHORS,
    CHANGES,
    CLAIMS,
    NOTEBOOK,
    PRESETS,
    REFERENCE,
    TITLE,
    Arm,
    Config,
)
from workbench.training.loop import Recipe, fit
from workbench.training.pool import map_jobs
from workbench.training.record import Record

__all__ = ["ABOUT", "ARXIV", "AUTHORS", "CLAIMS", "NOTEBOOK", "PRESETS", "TITLE", "Arm", "Config", "bench"]
VOCABULARY = 2048  # of a small base model's tokenizer, trained on its general text alone
SHAPE = {"width": 64, "layers": 2, "heads": 4, "context": 256}


# --- the base model --------------------------------------------------------------------------------------------------


def train_base(config: Config, index: int, record: Record | None = None, **loop: Any) -> tuple[nn.Module, Any]:
    """A small "released" model: tokenizer and weights from general pages and exercises in answering with a letter."""
    pages, _ = cyber_dap_material.general_split(documentation()[0])
    texts = [p.text() for p in pages]
    tokenizer = train_bpe(texts, VOCABULARY)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    eos = end_of_text(tokenizer)
    order = torch.randperm(2 * len(pages), generator=torch.Generator().manual_seed(index)).tolist()
    both = [*texts, *cyber_dap_material.exercises(pages, index)]
    stream = pack(tokenise([both[i] for i in order if i < len(both)], tokenizer), eos)
    model = small_llama(len(tokenizer), seed=index, eos=eos, **SHAPE)
    recipe = Recipe(
        steps=config.base_steps, lr=config.base_lr, weight_decay=0.1, betas=(0.9, 0.95), warmup=0.02,
        schedule="cosine", clip=1.0, seed=index, save_every=500, log_every=50,
    )  # fmt: skip
    windows = Windows(stream, 128, 8, index)
    fit(
        model,
        lambda m, w: {"loss": next_token_loss(m, w)},
        windows,
        recipe,
        name=f"base {index}",
        record=record,
        **loop,
    )
    return model.eval(), tokenizer


def base_folder(config: Config, seed: int, folder: Path, **loop: Any) -> str:
    """Where the base model of a seed is: committed, trained here into `folder`, or the user's id."""
    index = seed % config.bases if config.bases else seed
    if config.teacher == "train":
        out = folder / "bases" / f"base-{index}"
        if not (out / "config.json").exists():
            save_model(*train_base(config, index, Record(out), **loop), out)
        return str(out)
    if config.teacher != "reference":
        return config.teacher
    out = REFERENCE / f"base-{index}"
    if not out.is_dir():
        raise WorkbenchError(f"no committed base {index} in {REFERENCE}: use fewer bases, or -p teacher=train")
    return str(out)


# --- adaptation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One arm of one seed: the base, the text, and where its checkpoints go."""

    config: Config
    arm: Arm
    seed: int
    base: str
    material: Material
    folder: Path

    @property
    def record(self) -> Record:
        return Record(self.folder / "arms" / f"{self.arm}, seed {self.seed}")

    @property
    def change(self) -> dict[str, Any]:
        return CHANGES.get(self.arm, {})


@dataclass
class Adapted:
    """A model after its arm: what trained, on how many tokens, and its history."""

    model: Any
    tokenizer: Any
    trained: int
    tokens: int
    history: list[dict[str, Any]]


def batches(job: Job) -> tuple[Windows | Mixture, int, int]:
    """The arm's micro-batches (B, T + 1), its number of optimiser steps, and the tokens those train on.

    Every arm but "less curated" sees the curated number of tokens, `epochs` times; replay adds general text on top.
    """
    c, change = job.config, job.change
    curated = job.material.streams["curated"]
    size = max(c.batch * c.context, int(change.get("share", 1.0) * (len(curated) - 1))) + 1
    name = change.get("stream", "curated")
    if name not in job.material.streams:
        raise WorkbenchError(f"arm {job.arm!r} needs raw text beside the curated, which {c.data!r} does not have")
    whole, epochs = job.material.streams[name], c.epochs
    if name == "raw":
        size, epochs = int(c.hungry * c.epochs * (len(curated) - 1)) + 1, 1  # as much as there is, each token once
    windows = Windows(whole[:size], c.context, c.batch, job.seed)
    steps = max(1, epochs * windows.per_epoch // c.accumulate)
    if not change.get("replay"):
        return windows, steps, steps * c.accumulate * c.batch * c.context
    extra = max(1, round(c.batch * c.replay / (1 - c.replay)))
    general = Windows(job.material.streams["general"], c.context, extra, job.seed)
    return Mixture(windows, general), steps, steps * c.accumulate * (c.batch + extra) * c.context


def check_start(model: nn.Module, window: Tensor, loss: float) -> None:
    """Raises WorkbenchError where the loss before the first step is not the base's own."""
    known = float(own_loss(model, window))
    if not math.isclose(loss, known, rel_tol=0.005, abs_tol=1e-3):
        raise WorkbenchError(
            f"the loss before training is {loss:.3f}, the base's own is {known:.3f} nats: are targets shifted twice?"
        )


def adapt(job: Job, loss_fn: Any = next_token_loss, **loop: Any) -> Adapted:
    """Continued pre-training of the base by the job's arm. loss_fn(model, window): a scalar, in nats.

    Raises WorkbenchError before the first step where the loss is not the base's own.
    """
    c, change = job.config, job.change
    if c.shard and change.get("lora"):
        raise WorkbenchError("the LoRA arm trains on one device a rank: run it with shard=false")
    if c.shard:
        model, tokenizer = load_sharded(job.base, bf16=c.precision == "bf16")
    else:
        model, tokenizer = load_causal_lm(job.base)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    if context_limit(model) < c.context:
        raise WorkbenchError(f"context {c.context} is more than the {context_limit(model)} tokens of {job.base!r}")
    if job.arm == "base":
        return Adapted(model.eval(), tokenizer, 0, 0, [])
    separate = None if c.across else end_of_text(tokenizer)
    data, steps, tokens = batches(job)
    # measured without the document mask: the library's own loss knows none
    window = data[0].to(model.device)
    with torch.no_grad():
        check_start(model.eval(), window, float(loss_fn(model, window)))
    if c.recompute:
        recompute_activations(model)
    if change.get("frozen"):
        freeze_embeddings(model)
    if change.get("lora"):
        model = with_lora(model, c.lora_rank, job.seed)
    recipe = Recipe(
        steps=steps, lr=c.lora_lr if change.get("lora") else c.lr * change.get("lr", 1.0), weight_decay=c.decay,
        betas=(0.9, 0.95), clip=1.0, warmup=c.warmup, schedule=c.schedule, accumulate=c.accumulate,
        precision="no" if c.shard else c.precision, seed=job.seed, save_every=c.save_every,
        log_every=max(1, steps // 40),
    )  # fmt: skip
    loss = partial(loss_fn, separate=separate) if separate is not None else loss_fn
    trained = trainable(model)
    fitted = fit(model.train(), lambda m, w: {"loss": loss(m, w)}, data, recipe, name="dap", record=job.record, **loop)
    merged = model.merge_and_unload() if change.get("lora") else model
    return Adapted(merged.eval(), tokenizer, trained, tokens, fitted.history)


# --- measures --------------------------------------------------------------------------------------------------------


def measure(config: Config, model: Any, tokenizer: Any, material: Material, letters: bool) -> dict[str, Any]:
    """Losses on held-out text, and accuracy on every question set, by each scorer; all of it without sampling.

    "nll domain", "nll general" in nats a token; for each set S: "S" (accuracy of the channel score, in points) and
    "S hits" (a 0 or 1 an item); with `letters` also "S, letter likelihood", "S, generated", "S, unparsable" (points)
    and "said" (the share of each letter over the domain sets).
    """
    limit = context_limit(model)
    out: dict[str, Any] = {f"nll {k}": held_out_loss(model, w) for k, w in material.held.items()}
    answers: list[mc.Answer] = []
    for name, items in material.items.items():
        if not items:
            continue
        hits = mc.correct(items, mc.best(mc.channel_scores(model, tokenizer, items, limit=limit)))
        out |= {name: _points(hits), f"{name} hits": "".join("01"[h] for h in hits)}
        if not letters:
            continue
        by_letter = mc.best(mc.letter_scores(model, tokenizer, items, limit=limit))
        texts = mc.generate(model, tokenizer, [mc.letter_prompt(i) for i in items], new_tokens=4, limit=limit)
        read = [mc.first_letter(t) for t in texts]
        out[f"{name}, letter likelihood"] = _points(mc.correct(items, by_letter))
        out[f"{name}, generated"] = _points(mc.correct(items, read))
        out[f"{name}, unparsable"] = _points([r is None for r in read])
        answers += by_letter if name != "general" else []
    if answers:
        domain = [i for name, items in material.items.items() if name != "general" for i in items]
        out["said"] = mc.position_bias(domain, answers)["said"]
    return out


def _points(hits: Sequence[bool]) -> float:
    return 100 * sum(hits) / len(hits)


def measure_benchmarks(config: Config, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Accuracy on the public files in `benchmarks`: by letter likelihood, and generated and read as officially.

    Greedy, no retries. For each benchmark: "B, letter likelihood" (single answers), "B, generated", "B, unparsable".
    """
    out: dict[str, Any] = {}
    for spec in config.benchmarks:
        name, items = read_benchmark(spec)
        _, extractor, room = BENCHMARKS[name]
        tokens, limit = config.answer_tokens or room, context_limit(model)
        prompts = [mc.letter_prompt(i) for i in items]
        read = [
            mc.EXTRACTORS[extractor](t) for t in mc.generate(model, tokenizer, prompts, new_tokens=tokens, limit=limit)
        ]
        out[f"{name}, generated"] = _points(mc.correct(items, read))
        out[f"{name}, unparsable"] = _points([r is None for r in read])
        single = [i for i in items if len(i.answers) == 1]
        scored = mc.best(mc.letter_scores(model, tokenizer, single, limit=limit))
        out[f"{name}, letter likelihood"] = _points(mc.correct(single, scored))
    return out


def measure_arm(job: Job) -> dict[str, Any]:
    """Train the job's arm (or load it, where its folder holds it finished) and measure it."""
    adapted = adapt(job, progress=False)
    letters = job.arm in job.config.letters
    out = measure(job.config, adapted.model, adapted.tokenizer, job.material, letters)
    out |= measure_benchmarks(job.config, adapted.model, adapted.tokenizer)
    return out | {"trained parameters": adapted.trained, "tokens": adapted.tokens}


def _cost(job: Job) -> float:
    return 1.0 + (0 if job.arm == "base" else batches(job)[2] / 50_000)


def prepare(config: Config, seed: int, folder: Path) -> tuple[str, Material]:
    """The base of a seed and what it is to be trained on and asked about."""
    base = base_folder(config, seed, folder)
    return base, cyber_dap_material.load(config, load_tokenizer(base), seed)


def study(config: Config, folder: Path, record: Record, seed: int = 0) -> dict[tuple[str, int], dict[str, Any]]:
    """Train and measure every arm for every seed, and store what claims are judged by: {(arm, seed): measures}.

    What an earlier sitting of the same run measured is not measured again.
    """
    seeds = range(seed, seed + config.seeds)
    if config.teacher == "train":
        made = seeds[: config.bases or None]
        map_jobs(partial(base_folder, config, folder=folder, progress=False), made, workers=config.workers or None,
                 record=record, text="base models")  # fmt: skip
    known = {(r["variant"], r["seed"]): r["measures"] for r in record.records("note") if "variant" in r}
    todo = []
    for s in seeds:
        missing = [arm for arm in config.arms if (arm, s) not in known]
        if missing:
            base, material = prepare(config, s, folder)
            todo += [Job(config, arm, s, base, material, folder) for arm in missing]
    done = map_jobs(measure_arm, todo, workers=config.workers or None, cost=_cost, record=record, text="arms")
    for job, measures in zip(todo, done, strict=True):
        known[job.arm, job.seed] = measures
        record.write("note", variant=job.arm, seed=job.seed, measures=measures)
    for s in seeds:
        for measure, value in claim_values({arm: known[arm, s] for arm in config.arms}).items():
            record.result(measure, value, seed=s)
    return known


def _held_out(m: Mapping[str, Any]) -> float:
    """Accuracy over the two held-out sets together, in points."""
    hits = "".join(m[f"{part} hits"] for part in ("held-out field", "held-out page"))
    return 100 * hits.count("1") / len(hits)


def claim_values(arms: Mapping[Any, Mapping[str, Any]]) -> dict[str, float]:
    """The measures of CLAIMS that one seed's arms allow, by name; `arms`: arm -> measures."""
    out: dict[str, float] = {}
    base, dap = arms.get("base"), arms.get("dap")
    if base is None or dap is None:
        return out
    out["domain_nll"] = base["nll domain"] - dap["nll domain"]
    asked = "trained page" in base
    if asked:
        out["qa_trained"] = dap["trained page"] - base["trained page"]
        out["qa_held_out"] = _held_out(dap) - _held_out(base)
    out["retained"] = dap["nll general"] - base["nll general"]
    controls = [arms[arm] for arm in ("shuffled words", "general text") if arm in arms]
    if controls:
        out["knowledge_nll"] = min(m["nll domain"] for m in controls) - dap["nll domain"]
        if asked:
            out["knowledge_qa"] = dap["trained page"] - max(m["trained page"] for m in controls)
    if other := arms.get("aggressive"):
        out["constrained"] = other["nll general"] - dap["nll general"]
    if other := arms.get("42 %"):
        out["more_tokens"] = other["nll domain"] - dap["nll domain"]
    if other := arms.get("less curated"):
        out["less_data"] = other["nll domain"] - dap["nll domain"]
    if other := arms.get("lora"):
        out["full_beats_lora"] = other["nll domain"] - dap["nll domain"]
    if other := arms.get("replay"):
        out["replay_forgets_less"] = dap["nll general"] - other["nll general"]
    return out


def paired(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each question set: gain in points with its bootstrap interval, items fixed and broken, McNemar's p."""
    rows = []
    for name in (*PARTS, "general"):
        if f"{name} hits" not in before:
            continue
        old, new = ([h == "1" for h in m[f"{name} hits"]] for m in (before, after))
        gain = bootstrap([100.0 * (a - b) for b, a in zip(old, new, strict=True)])
        fixed = sum(a > b for b, a in zip(old, new, strict=True))
        broken = sum(a < b for b, a in zip(old, new, strict=True))
        rows.append({"set": name, "n": len(old), "before": _points(old), "after": _points(new), "gain": gain,
                     "fixed": fixed, "broken": broken, "p": mcnemar(old, new)})  # fmt: skip
    return rows
