"""The one training loop: accelerate, AMP, accumulation, clipping, schedule, EMA, NaN guard, checkpoints, resume.

A second network that learns beside the first (a critic, an online score) is an Auxiliary: same guards, same checkpoint.

Randomness is stateless: the batch and torch's generator of a step depend on (seed, step, micro-step, rank) alone, so a
run that was killed and resumed computes what the uninterrupted run computes, bit for bit on the same machine.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from workbench.errors import WorkbenchError
from workbench.models import sharding
from workbench.training import checkpoint
from workbench.training.record import Record
from workbench.training.state import NonFiniteError, finite_weights, load_weights, pack_optimizer, unpack_optimizer

LossFn = Callable[[nn.Module, Any], Mapping[str, Tensor]]


class IndexedBatches(Protocol):
    """Micro-batches by number: i counts every micro-batch of the run, all ranks included, from 0."""

    def __getitem__(self, i: int) -> Any: ...


BatchFn = Callable[[torch.Generator], Any] | IndexedBatches


@dataclass(frozen=True)
class Recipe:
    """How to optimise. lr: peak rate; warmup: fraction of steps; clip: largest gradient norm; ema: decay per step."""

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = None
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema: float | None = None
    save_every: int | None = None
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise WorkbenchError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.save_every is not None and self.save_every < 1:
            raise WorkbenchError(f"save_every is at least 1 (or None: only at the end), got {self.save_every}")

    def factor(self, update: int) -> float:
        """Share of the peak learning rate at the 0-based `update`: linear warm-up, then constant or cosine to 0."""
        warm = math.ceil(self.warmup * self.steps)
        if update < warm:
            return (update + 1) / warm
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, self.steps - warm)))


@dataclass(frozen=True)
class Auxiliary:
    """A network that is updated `repeats` times before each step of the main one: a discriminator, an online score.

    loss_fn(this network, batch) returns {"loss": scalar, ...}, logged as "NAME/loss" and so on; it sees the main
    network by closure and detaches what it takes from there. The main loss reaches `model` in the same way: gradients
    it leaves here are dropped. Weights and optimiser are saved and restored with the main network's.
    batch_fn: as in `fit`; None takes the main one's, drawn anew (an indexed one is read from its start, by own count).
    The learning rate follows the main recipe's schedule from lr on; precision and seed are the main recipe's too.
    """

    model: nn.Module
    loss_fn: LossFn
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None
    repeats: int = 1
    batch_fn: BatchFn | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise WorkbenchError(f"repeats is at least 1, got {self.repeats}")

    def settings(self) -> dict[str, Any]:
        """What a checkpoint's auxiliary must share with this one to go on."""
        names = ("lr", "betas", "weight_decay", "clip", "repeats")
        return {k: list(v) if isinstance(v := getattr(self, k), tuple) else v for k in names}


@dataclass
class Fitted:
    """A finished training: the model, its EMA copy if asked for, and what was logged."""

    model: nn.Module
    ema: nn.Module | None
    steps: int
    seconds: float  # spent training, all sittings together
    resumed_from: int | None
    history: list[dict[str, Any]] = field(default_factory=list)


def step_seed(seed: int, step: int, micro: int = 0, rank: int = 0) -> int:
    """A 63-bit seed that depends on its arguments alone, and differs wherever one of them does."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; decay on matrices that are no embedding, none on the rest."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise WorkbenchError("nothing to train: no parameter of the model requires a gradient")
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def _accelerator(precision: str) -> Accelerator:
    """An Accelerator of this precision; accelerate keeps one per process and refuses another precision otherwise."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise WorkbenchError('precision "fp16" needs a CUDA GPU; use "bf16" or "no" here')
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision)


class _Side:
    """The moving parts of one auxiliary network in a session."""

    def __init__(self, name: str, spec: Auxiliary, accelerator: Accelerator):
        self.name, self.spec, self.bare = name, spec, spec.model
        self.bare.to(accelerator.device)
        recipe = Recipe(steps=1, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
        self.inner = adamw(self.bare, recipe)
        self.model = accelerator.prepare_model(self.bare)
        self.optimizer = accelerator.prepare_optimizer(self.inner)

    @property
    def part(self) -> str:
        """Name of its tensors in a checkpoint."""
        return f"auxiliary-{self.name}"


class _Session:
    """The moving parts of one training, and how they go into a checkpoint and come back."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, recipe: Recipe,
        auxiliaries: Mapping[str, Auxiliary],
    ):  # fmt: skip
        self.recipe, self.bare = recipe, model
        self.accelerator = _accelerator(recipe.precision)
        self.bare.to(self.accelerator.device)
        self.inner = optimizer or adamw(model, recipe)
        for group in self.inner.param_groups:
            group.setdefault("initial_lr", group["lr"])
        averaging = get_ema_multi_avg_fn(recipe.ema) if recipe.ema is not None else None
        self.ema = AveragedModel(model, multi_avg_fn=averaging) if averaging else None
        # a sharded model keeps its ranks in step by itself
        self.sharded = sharding.is_sharded(model)
        self.model = model if self.sharded else self.accelerator.prepare_model(model)
        self.optimizer = self.accelerator.prepare_optimizer(self.inner)
        self.sides = [_Side(name, spec, self.accelerator) for name, spec in auxiliaries.items()]
        for group in [g for side in self.sides for g in side.inner.param_groups]:
            group.setdefault("initial_lr", group["lr"])
        self.seconds = 0.0

    def close(self) -> None:
        """Give the user's models back without accelerate's wrappers."""
        for wrapped, bare in [(self.model, self.bare), *((side.model, side.bare) for side in self.sides)]:
            self.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            vars(bare).pop("forward", None)  # accelerate leaves the bound method behind on the instance

    def save(self, folder, step: int) -> None:
        weights = finite_weights(self.bare, step)
        others = {side.part: finite_weights(side.bare, step, f"{side.name}/") for side in self.sides}
        if self.accelerator.is_main_process or self.sharded:
            tensors, rest = pack_optimizer(self.inner)
            parts = {"model": weights, "optimizer": tensors, **others}
            if self.ema is not None:
                parts["ema"] = self.ema.state_dict()
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            auxiliaries = {}
            for side in self.sides:
                parts[f"{side.part}-optimizer"], own = pack_optimizer(side.inner)
                auxiliaries[side.name] = {"settings": side.spec.settings(), "optimizer": own}
            state = {
                "recipe": asdict(self.recipe), "optimizer": rest, "scaler": scaler, "seconds": self.seconds,
                "auxiliaries": auxiliaries,
            }  # fmt: skip
            checkpoint.save(folder, step, parts, state)
        self.accelerator.wait_for_everyone()

    def load(self, saved: checkpoint.Checkpoint) -> None:
        then, now = saved.state["recipe"], asdict(self.recipe)
        now["betas"] = list(now["betas"])
        cadence = ("save_every", "log_every")
        changed = [k for k in now if then.get(k) != now[k] and k not in cadence]
        if changed:
            old = ", ".join(f"{k}={then.get(k)}" for k in changed)
            raise checkpoint.CheckpointError(f"{saved.path} belongs to another recipe ({old}); use a new run folder")
        theirs = {name: a["settings"] for name, a in saved.state.get("auxiliaries", {}).items()}
        if theirs != {side.name: side.spec.settings() for side in self.sides}:
            raise checkpoint.CheckpointError(
                f"{saved.path} belongs to a training with other auxiliary networks ({theirs or 'none'}); use a new run "
                "folder"
            )
        load_weights(self.bare, saved, "model")
        unpack_optimizer(self.inner, saved.parts["optimizer"], saved.state["optimizer"])
        for side in self.sides:
            load_weights(side.bare, saved, side.part)
            rest = saved.state["auxiliaries"][side.name]["optimizer"]
            unpack_optimizer(side.inner, saved.parts[f"{side.part}-optimizer"], rest)
        if self.ema is not None:
            self.ema.load_state_dict(saved.parts["ema"])
        if self.accelerator.scaler and saved.state["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        self.seconds = saved.state["seconds"]

    def _draw(self, batch_fn: BatchFn, seed: int, number: int) -> Any:
        """One micro-batch on the device; `number` counts this rank's from 0. Sets torch's generator to `seed`."""
        accelerator = self.accelerator
        torch.manual_seed(seed)
        if callable(batch_fn):
            batch = batch_fn(torch.Generator().manual_seed(seed))
        else:
            batch = batch_fn[number * accelerator.num_processes + accelerator.process_index]
        return send_to_device(batch, accelerator.device)

    def update_side(self, index: int, step: int, batch_fn: BatchFn, last_good: str) -> dict[str, Any]:
        """The updates of one auxiliary that belong to `step`; returns what is logged of the last one."""
        side, accelerator = self.sides[index], self.accelerator
        spec = side.spec
        logged: dict[str, Any] = {}
        for group in side.inner.param_groups:
            group["lr"] = group["initial_lr"] * self.recipe.factor(step - 1)
        for repeat in range(spec.repeats):
            side.optimizer.zero_grad()
            # a stream of draws of its own, whatever `accumulate` is
            seed = step_seed(step_seed(self.recipe.seed, step, repeat, accelerator.process_index), index)
            batch = self._draw(spec.batch_fn or batch_fn, seed, (step - 1) * spec.repeats + repeat)
            with accelerator.autocast():
                losses = spec.loss_fn(side.model, batch)
            value = losses["loss"].detach()
            if not torch.isfinite(value):
                raise NonFiniteError(f"loss of {side.name} is {float(value)} at step {step}; {last_good}")
            accelerator.backward(losses["loss"])
            logged = {key: x.detach().float() for key, x in losses.items()}
            if spec.clip is not None:
                trained = [p for p in side.bare.parameters() if p.requires_grad]
                logged["grad_norm"] = accelerator.clip_grad_norm_(trained, spec.clip)
            side.optimizer.step()
        return {f"{side.name}/{key}": value for key, value in logged.items()}

    def update(self, step: int, loss_fn: LossFn, batch_fn: BatchFn, last_good: str) -> dict[str, Any]:
        """One optimiser step (`step` counts from 1) over `accumulate` micro-batches; returns what is logged of it.

        Auxiliaries go first, so that the main step meets a critic that has seen this very network.
        """
        recipe, accelerator = self.recipe, self.accelerator
        aside: dict[str, Any] = {}
        for index in range(len(self.sides)):
            aside |= self.update_side(index, step, batch_fn, last_good)
        factor = recipe.factor(step - 1)
        for group in self.inner.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad()
        mean: dict[str, Tensor] = {}
        for micro in range(recipe.accumulate):
            seed = step_seed(recipe.seed, step, micro, accelerator.process_index)
            batch = self._draw(batch_fn, seed, (step - 1) * recipe.accumulate + micro)
            with accelerator.no_sync(self.model) if micro + 1 < recipe.accumulate else nullcontext():
                with accelerator.autocast():
                    losses = loss_fn(self.model, batch)
                value = losses["loss"].detach()
                if not torch.isfinite(value):
                    raise NonFiniteError(f"loss is {float(value)} at step {step}; {last_good}")
                accelerator.backward(losses["loss"] / recipe.accumulate)
            for key, x in losses.items():
                mean[key] = mean.get(key, 0) + x.detach().float() / recipe.accumulate
        logged: dict[str, Any] = {"lr": self.inner.param_groups[0]["lr"]}
        if recipe.clip is not None:
            trained = [p for p in self.bare.parameters() if p.requires_grad]
            logged["grad_norm"] = sharding.whole(accelerator.clip_grad_norm_(trained, recipe.clip))
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.bare)
        return {**mean, **logged, **aside}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def fit(
    model: nn.Module,
    loss_fn: LossFn,
    batch_fn: BatchFn,
    recipe: Recipe,
    *,
    name: str,
    record: Record | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    auxiliaries: Mapping[str, Auxiliary] | None = None,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> Fitted:
    """Train `model` in place; load it where `record` holds this training finished, or go on from its last checkpoint.

    loss_fn(model, batch) returns {"loss": scalar tensor, ...}: whatever else it returns, scalars or vectors (M,), is
    logged every `log_every` steps as a record {"kind": "step", "training": name, "step": ...}.
    batch_fn(generator) draws one micro-batch with the generator given (CPU) and nothing else; or batch_fn[i] is the
    i-th micro-batch (epochs over a fixed set), and must depend on i alone.
    `optimizer` defaults to `adamw`; the schedule scales each group's "initial_lr" (a float or a tensor).
    auxiliaries: by name, networks trained in place beside `model` (see Auxiliary), each before every main step.

    Raises NonFiniteError (step, value, last good checkpoint), CheckpointError (disk full; another recipe or model).
    """
    folder = record.checkpoints(name) if record else None
    session = _Session(model, optimizer, recipe, auxiliaries or {})
    if folder and session.sharded:
        folder = sharding.rank_folder(folder)
    history: list[dict[str, Any]] = []
    resumed_from = None
    last_good = "there is no checkpoint yet"
    with torch.random.fork_rng():
        try:
            done = 0
            if record and folder:
                saved = checkpoint.newest(folder)
                if session.sharded:  # a kill may fall between two ranks' checkpoints
                    step = sharding.common_step(saved.step if saved else 0)
                    if saved and saved.step != step:
                        saved = checkpoint.load(folder / f"step-{step:08d}") if step else None
                if saved:
                    session.load(saved)
                    done = resumed_from = saved.step
                    last_good = f"the last good checkpoint is {saved.path}"
                if done < recipe.steps and session.accelerator.is_main_process:
                    record.rewind(name, done)
                history = record.records("step", training=name)
            bar = tqdm(
                total=recipe.steps, initial=done, desc=name, leave=False, mininterval=0.5, unit="step",
                disable=not progress or done == recipe.steps or not session.accelerator.is_main_process,
            )  # fmt: skip
            started, told = time.perf_counter(), 0.0
            already = session.seconds
            with bar:
                for step in range(done + 1, recipe.steps + 1):
                    logged = session.update(step, loss_fn, batch_fn, last_good)
                    session.seconds = already + time.perf_counter() - started
                    bar.update()
                    if step % recipe.log_every == 0 or step == recipe.steps:
                        plain = {key: _plain(value) for key, value in logged.items()}
                        history.append({"kind": "step", "training": name, "step": step, **plain})
                        bar.set_postfix(loss=f"{plain['loss']:.4g}", refresh=False)
                        if session.accelerator.is_main_process:
                            if record:
                                record.write("step", training=name, step=step, **plain)
                            if on_step:
                                on_step(step, plain)
                    if record and time.perf_counter() - told > 0.5:
                        told = time.perf_counter()
                        record.progress(name, step, recipe.steps)
                    due = step == recipe.steps or (recipe.save_every and step % recipe.save_every == 0)
                    if folder and due:
                        session.save(folder, step)
                        last_good = f"the last good checkpoint is {folder / f'step-{step:08d}'}"
        finally:
            session.close()
    averaged = session.ema.module if session.ema is not None else None
    return Fitted(model, averaged, recipe.steps, session.seconds, resumed_from, history)
