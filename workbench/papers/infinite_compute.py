"""Pre-training under infinite compute (Kim, Kotha, Liang, Hashimoto; arXiv 2509.14786): the paper's method.

Symbols: D seed tokens, N parameters, E epochs, λ weight decay (`decay`), K ensemble members, H = (E, lr, λ).
Routine A(D, H) -> model; a recipe is judged by its asymptote, lim_N min_H L and lim_N lim_K min_H L, not by a point.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.config import Param, config
from workbench.data.text import Corpus, Mixture, Windows, character_corpus, hub_corpus
from workbench.errors import WorkbenchError
from workbench.evaluation.language import ensemble_losses, sample_text
from workbench.evaluation.scaling_laws import PowerLaw, fit_power_law
from workbench.models.transformer import DecoderLM, LMConfig
from workbench.papers.infinite_compute_claims import ABOUT, ARXIV, AUTHORS, CLAIMS, NOTEBOOK, TITLE
from workbench.papers.infinite_compute_settings import D0, GRID, OPTIMA, SIZES, Optima, Setting
from workbench.training import checkpoint
from workbench.training.loop import Recipe, fit
from workbench.training.pool import map_jobs
from workbench.training.record import Record

__all__ = ["ABOUT", "ARXIV", "AUTHORS", "CLAIMS", "NOTEBOOK", "PRESETS", "TITLE", "Config"]
Arm = Literal["real only", "self", "mixture", "logits", "synthetic only"]


@config
class Config:
    """Parameters of the study."""

    data: Annotated[
        str, Param("prose of a pip package (scikit-learn, scipy, numpy), or a Hub id or folder of text")
    ] = "scikit-learn"
    tokenizer: Annotated[str, Param("Hub id of a tokenizer; empty: characters")] = ""
    split: Annotated[int, Param("seed of the shuffle that cuts the text into train, tune and report parts", ge=0)] = 0
    tokens: Annotated[int, Param("seed tokens D", unit="tokens", ge=1024)] = 16_384
    budgets: Annotated[tuple[int, ...], Param("values of D for the data law", unit="tokens")] = ()
    validation: Annotated[int, Param("held-out tokens, half to tune on, half to report", unit="tokens", ge=512)] = (
        24_576
    )
    context: Annotated[int, Param("window T", unit="tokens", ge=4)] = 32
    batch: Annotated[int, Param("sequences a batch", ge=1)] = 16
    accumulate: Annotated[int, Param("micro-batches a batch is cut into", ge=1)] = 1
    precision: Annotated[Literal["no", "bf16", "fp16"], Param("of the forward pass")] = "no"
    sizes: Annotated[tuple[str, ...], Param("model sizes, smallest first", min_length=1)] = ("d32", "d64")
    seeds: Annotated[int, Param("judging seeds (or groups of members)", ge=1)] = 1
    members: Annotated[int, Param("ensemble members K", ge=1)] = 4
    ensemble_sizes: Annotated[tuple[str, ...], Param("sizes that get an ensemble")] = ("d32",)
    overfit_size: Annotated[str, Param("model size of the over-fitting curves")] = "d32"
    overfit_epochs: Annotated[tuple[int, ...], Param("E of the over-fitting curves")] = (8, 16, 32)
    search: Annotated[
        Literal["none", "certify"], Param("coordinate descent from the stored optima, on the tune split")
    ] = "none"
    arms: Annotated[tuple[Arm, ...], Param("distillation arms")] = ("real only", "mixture")
    share: Annotated[float, Param("synthetic share w of a student's batch", ge=0, lt=1)] = 0.75
    pool: Annotated[int, Param("synthetic tokens a pool", unit="tokens", ge=1024)] = 30_720
    student_epochs: Annotated[int, Param("epochs over the real text of a student", ge=1)] = 8
    student_decay: Annotated[float, Param("weight decay of students with synthetic text", ge=0)] = 0.8
    control_decay: Annotated[float, Param("weight decay of the real-only control", ge=0)] = 1.6
    decay_on: Annotated[Literal["matrices", "everything"], Param("what is decayed (ablation)")] = "matrices"
    workers: Annotated[int, Param("processes that train side by side; 0: one a core", ge=0)] = 0
    save_every: Annotated[int, Param("steps between checkpoints; 0: only at the end", unit="steps", ge=0)] = 0


PRESETS = {
    "quick": Config(),
    "desk": Config(
        budgets=(8_192, 16_384, 32_768), sizes=("d32", "d48", "d64"), seeds=4, members=5, overfit_size="d64",
        ensemble_sizes=("d32", "d48", "d64"), search="certify", pool=122_880,
        student_epochs=16, control_decay=3.2,
        arms=("real only", "self", "mixture", "logits", "synthetic only"),
    ),
    "full": Config(
        data="mlfoundations/dclm-baseline-1.0", tokenizer="meta-llama/Meta-Llama-3.1-8B", tokens=D0,
        budgets=(D0, 2 * D0, 4 * D0, 8 * D0), validation=1024 * 4096, context=4096, batch=64, accumulate=16,
        precision="bf16", sizes=("150M", "300M", "600M", "1.4B"), seeds=3, members=5,
        ensemble_sizes=("150M", "300M", "600M", "1.4B"), overfit_size="300M",
        overfit_epochs=(1, 2, 4, 8, 16, 32, 64, 128),
        search="certify", arms=("real only", "self", "mixture", "logits", "synthetic only"), share=0.9,
        student_epochs=16, pool=9 * D0, student_decay=0.1, control_decay=1.6, save_every=500,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training A(D, H): everything that decides its weights. seed: initialisation; order: data order."""

    size: str
    tokens: int
    setting: Setting
    seed: int
    order: int
    text: str = ""  # name of the synthetic pool, for students
    share: float = 0.0  # synthetic share w of each batch; 1: synthetic text only

    @property
    def name(self) -> str:
        s = self.setting
        base = f"{self.size}-D{self.tokens}-E{s.epochs}-lr{s.lr:g}-wd{s.decay:g}-s{self.seed}-o{self.order}"
        return f"{base}-{self.text}-w{self.share:g}" if self.text else base


@dataclass(frozen=True)
class Trained:
    """A finished cell: losses in nats a token (train: mean over the last epoch) and where its weights lie."""

    cell: Cell
    parameters: int
    train: float
    tune: float
    report: float
    weights: Path


@dataclass
class Study:
    """A config with its corpora and record: `train` computes cells side by side and never one twice."""

    config: Config
    record: Record
    corpora: dict[tuple[int, int], Corpus] = dataclasses.field(default_factory=dict)
    trained: dict[Cell, Trained] = dataclasses.field(default_factory=dict)

    def corpus(self, tokens: int, split: int | None = None) -> Corpus:
        """The text at budget D; split: another shuffle of the same text (the tuning split)."""
        c = self.config
        key = (tokens, c.split if split is None else split)
        if key not in self.corpora:
            self.corpora[key] = (
                hub_corpus(c.data, c.tokenizer, tokens, folder=self.record.folder / "text", validation=c.validation)
                if c.tokenizer
                else character_corpus(tokens, split=key[1], validation=c.validation, package=c.data)
            )
        return self.corpora[key]

    def train(self, cells: Iterable[Cell], *, text: str = "training", split: int | None = None) -> list[Trained]:
        """The cells trained, in order. split: train and validate on another shuffle (for tuning)."""
        wanted = list(cells)
        missing = [c for c in dict.fromkeys(wanted) if c not in self.trained]
        pools = {c.text: self.record.folder / "text" / f"{c.text}.safetensors" for c in missing if c.text}
        jobs = [
            Job(c, self.config, self.corpus(c.tokens, split), self.record.folder, pools.get(c.text)) for c in missing
        ]
        known = {r["cell"] for r in self.record.records("cell")}
        workers = self.config.workers or None
        for t in map_jobs(train_cell, jobs, workers=workers, cost=job_cost, record=self.record, text=text):
            self.trained[t.cell] = t
            if t.cell.name not in known:
                s = t.cell.setting
                self.record.write(
                    "cell", cell=t.cell.name, D=t.cell.tokens, N=t.parameters, E=s.epochs, lr=s.lr, decay=s.decay,
                    seed=t.cell.seed, order=t.cell.order, text=t.cell.text, share=t.cell.share, train=t.train,
                    tune=t.tune, report=t.report,
                )  # fmt: skip
        return [self.trained[c] for c in wanted]


@dataclass(frozen=True)
class Job:
    """What a worker process needs to train one cell."""

    cell: Cell
    config: Config
    corpus: Corpus
    folder: Path
    pool: Path | None


def lm_config(size: str, config: Config, vocabulary: int) -> LMConfig:
    """The shape of a named size for this study's text. Raises WorkbenchError for an unknown size."""
    if size not in SIZES:
        raise WorkbenchError(f"unknown model size {size!r}: choose from {', '.join(SIZES)}")
    width, hidden, heads, kv_heads, layers = SIZES[size]
    return LMConfig(vocabulary, config.context, width, hidden, heads, kv_heads, layers)


def batches(job: Job) -> tuple[Windows | Mixture, int]:
    """The cell's micro-batches and its number of optimiser steps: E epochs of the real text, synthetic on top (§5).

    With a synthetic share w, a batch holds (1 - w) real sequences, so E epochs take E D / ((1 - w) batch T) steps.
    """
    c, cell, train = job.config, job.cell, job.corpus.train
    micro = max(1, c.batch // c.accumulate)
    real = Windows(train, c.context, micro, cell.order)
    if job.pool is None:
        return real, max(1, cell.setting.epochs * real.per_epoch // c.accumulate)
    synthetic = load_file(job.pool)["tokens"]
    fewer = max(1, round(micro * (1 - c.share)))
    steps = max(1, cell.setting.epochs * Windows(train, c.context, fewer, 0).per_epoch // c.accumulate)
    if cell.share == 1:
        return Windows(synthetic, c.context, micro, cell.order), steps
    rest = Windows(synthetic, c.context, micro - fewer, cell.order)
    return Mixture(Windows(train, c.context, fewer, cell.order), rest), steps


def job_cost(job: Job) -> float:
    """In proportion to the training's time: parameters of the blocks × tokens seen (plus a constant a step)."""
    shape = lm_config(job.cell.size, job.config, job.corpus.vocabulary)
    share = job.config.share if job.pool else 0.0
    return job.cell.setting.epochs * job.cell.tokens / (1 - share) * (20 * shape.width + shape.width**2) * shape.layers


def train_cell(job: Job) -> Trained:
    """A(D, H) with AdamW(.9, .95), clip 1, 1 % warm-up and one cosine to 0 over the whole run; then validate (§2)."""
    cell, c = job.cell, job.config
    record = Record(job.folder / "cells" / cell.name)
    shape = lm_config(cell.size, c, job.corpus.vocabulary)
    model = DecoderLM(shape).initialise(torch.Generator().manual_seed(cell.seed))
    data, steps = batches(job)
    recipe = Recipe(
        steps=steps, lr=cell.setting.lr, weight_decay=cell.setting.decay, betas=(0.9, 0.95), clip=1.0, warmup=0.01,
        schedule="cosine", accumulate=c.accumulate, precision=c.precision, seed=cell.seed,
        save_every=c.save_every or None, log_every=max(1, steps // 50),
    )  # fmt: skip
    optimizer = None
    if c.decay_on == "everything":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
    model.checkpoint_blocks = torch.cuda.is_available()
    fitted = fit(
        model, lambda m, tokens: {"loss": m(tokens[:, :-1], tokens[:, 1:])}, data, recipe, name="lm", record=record,
        optimizer=optimizer, progress=torch.cuda.is_available(),
    )  # fmt: skip
    held = record.records("result")
    if not held:
        for part in ("tune", "report"):
            windows = Windows(getattr(job.corpus, part), c.context, 1, 0)
            record.result(part, ensemble_losses([model], windows)[0], seed=cell.seed)
        held = record.records("result")
    losses = {r["measure"]: r["value"] for r in held}
    last = [r["loss"] for r in fitted.history if r["step"] > steps * (1 - 1 / max(2, cell.setting.epochs))]
    weights = record.checkpoints("lm") / f"step-{steps:08d}"
    count = sum(p.numel() for p in model.parameters())
    return Trained(cell, count, sum(last) / len(last), losses["tune"], losses["report"], weights)


def load_model(trained: Trained, config: Config, vocabulary: int) -> DecoderLM:
    """The trained model, from its verified checkpoint."""
    model = DecoderLM(lm_config(trained.cell.size, config, vocabulary))
    model.load_state_dict(checkpoint.load(trained.weights).parts["model"])
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def optima(tokens: int, size: str) -> Optima:
    """The stored tuned settings of a cell. Raises WorkbenchError where none were ever searched."""
    if (tokens, size) not in OPTIMA:
        known = ", ".join(f"{s} at {d}" for d, s in OPTIMA if d < D0)
        raise WorkbenchError(f"no tuned settings for {size} at {tokens} tokens: search them first (there are: {known})")
    return OPTIMA[tokens, size]


# --- the search of §3: coordinate descent over (E, lr, λ) with a certificate -----------------------------------------


def neighbours(setting: Setting, fixed: Sequence[str] = ()) -> list[Setting]:
    """The one-step neighbours on the grid: at most 6, fewer at its edge or with a variable held fixed."""
    found = []
    for variable, values in GRID.items():
        if variable in fixed:
            continue
        near = min(range(len(values)), key=lambda i: abs(values[i] - getattr(setting, variable)))
        for i in (near - 1, near + 1):
            if 0 <= i < len(values):
                found.append(dataclasses.replace(setting, **{variable: values[i]}))  # type: ignore[arg-type]
    return found


def certify(
    loss: Callable[[Sequence[Setting]], Sequence[float]], start: Setting, *, fixed: Sequence[str] = (), moves: int = 20
) -> tuple[Setting, bool, dict[Setting, float]]:
    """Move to the best neighbour until none is better: the optimum, whether it is certified, and all losses seen."""
    seen: dict[Setting, float] = {}
    here = start
    for _ in range(moves):
        fresh = [s for s in (here, *neighbours(here, fixed)) if s not in seen]
        seen.update(zip(fresh, loss(fresh), strict=True))
        best = min((here, *neighbours(here, fixed)), key=seen.__getitem__)
        if best == here:
            return here, True, seen
        here = best
    return here, False, seen


def search(
    study: Study, size: str, tokens: int, *, recipe: Literal["standard", "regularised"], split: int, seed: int,
    moves: int = 20, start: Setting | None = None,
) -> tuple[Setting, bool, dict[Setting, float]]:  # fmt: skip
    """`certify` on the tune half of a tuning split with a tuning seed, from the stored optimum; λ fixed if standard."""

    def loss(settings: Sequence[Setting]) -> list[float]:
        cells = [Cell(size, tokens, s, seed, seed) for s in settings]
        return [t.tune for t in study.train(cells, text=f"search {recipe} {size}", split=split)]

    first = start or getattr(optima(tokens, size), recipe)
    return certify(loss, first, fixed=("decay",) if recipe == "standard" else (), moves=moves)


# --- ensembles (§4) ---------------------------------------------------------------------------------------------------


def member_seed(group: int, member: int) -> int:
    """Members differ in nothing but their seed (initialisation and data order); groups share no member."""
    return 1000 * group + member


def member_cells(
    size: str, tokens: int, setting: Setting, group: int, members: int, *, share: Sequence[str] = ()
) -> list[Cell]:
    """K cells of one group. share: what they have in common, "init", "order" or both (ablation: then no ensemble)."""
    seeds = [member_seed(group, k) for k in range(members)]
    return [
        Cell(size, tokens, setting, seeds[0] if "init" in share else s, seeds[0] if "order" in share else s)
        for s in seeds
    ]


def ensemble_curve(study: Study, members: Sequence[Trained], part: str = "report", **how: str) -> list[float]:
    """Loss of the first 1..K members together on a validation half (nats); how: average="probabilities"."""
    corpus = study.corpus(members[0].cell.tokens)
    models = [load_model(t, study.config, corpus.vocabulary) for t in members]
    return ensemble_losses(models, Windows(getattr(corpus, part), study.config.context, 1, 0), **how)  # type: ignore[arg-type]


def k_limit(curve: Sequence[float]) -> PowerLaw:
    """A / K^b + E through K = 1..len(curve) (eq. for lim K → ∞); its E is an extrapolation."""
    return fit_power_law(range(1, len(curve) + 1), curve)


def n_limit(losses: Mapping[int, float]) -> PowerLaw:
    """A / N^α + E over parameter counts with α = 1 (the paper found 1.02): two unknowns, which 3 sizes can carry."""
    return fit_power_law(list(losses), list(losses.values()), exponent=1.0)


# --- distillation by sampled text (§5) --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Text to be written: by each teacher in turn (one alone: self; several: their mixture) or by their mean logits."""

    teachers: tuple[Trained, ...]
    averaged: bool
    config: Config
    vocabulary: int
    seed: int
    path: Path


def write_text(job: Sampling) -> Path:
    """Sample job.config.pool tokens unconditionally at temperature 1 and store them; a finished pool is kept."""
    if job.path.exists():
        return job.path
    models = [load_model(t, job.config, job.vocabulary) for t in job.teachers]
    generator = torch.Generator().manual_seed(job.seed)
    writers = [models] if job.averaged else [[m] for m in models]
    length = max(job.config.context, min(480, 16 * job.config.context))
    each = math.ceil(job.config.pool / len(writers) / length)
    texts = [
        sample_text(w, sequences=each, length=length, context=job.config.context, generator=generator) for w in writers
    ]
    tokens: Tensor = torch.cat([t.flatten() for t in texts])[: job.config.pool]
    job.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.path.with_suffix(".tmp")
    save_file({"tokens": tokens}, temporary)
    temporary.replace(job.path)
    return job.path


def distil(study: Study, members: Sequence[Trained], group: int) -> dict[str, Trained]:
    """One fresh student an arm, all with the same number of steps: the compute control is `real only` (§5, Fig. 9)."""
    c, cell = study.config, members[0].cell
    vocabulary = study.corpus(cell.tokens).vocabulary
    sources = {"self": (members[:1], False), "mixture": (members, False), "logits": (members, True)}
    needed = {"mixture" if arm == "synthetic only" else arm for arm in c.arms} - {"real only"}
    jobs = [
        Sampling(tuple(sources[arm][0]), sources[arm][1], c, vocabulary, 7000 + group,
                 study.record.folder / "text" / f"{arm}-{group}.safetensors") for arm in sorted(needed)
    ]  # fmt: skip
    map_jobs(write_text, jobs, workers=c.workers or None, record=study.record, text=f"sampling for group {group}")
    seed, lr = member_seed(group, 500), optima(cell.tokens, cell.size).regularised.lr
    student = Setting(c.student_epochs, lr, c.student_decay)
    control = Setting(round(c.student_epochs / (1 - c.share)), lr, c.control_decay)
    cells: dict[str, Cell] = {}
    for arm in c.arms:
        if arm == "real only":
            cells[arm] = Cell(cell.size, cell.tokens, control, seed, seed)
        else:
            pool = "mixture" if arm == "synthetic only" else arm
            share = 1.0 if arm == "synthetic only" else c.share
            cells[arm] = Cell(cell.size, cell.tokens, student, seed, seed, f"{pool}-{group}", share)
    return dict(zip(cells, study.train(cells.values(), text=f"students of group {group}"), strict=True))


def retained(single: float, student: float, ensemble: float) -> float:
    """Per cent of the ensemble's gain that the student keeps: 100 (single - student) / (single - ensemble)."""
    return 100 * (single - student) / (single - ensemble)
