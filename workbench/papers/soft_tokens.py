"""Soft Tokens, Hard Truths (Butt, Kwiatkowski, Labiad, Kempe, Ollivier; arXiv 2509.19170): the paper's method.

Symbols: E (V, n0) embedding table, p = softmax(logits / τ), h = p E the mixed embedding, h̃ = h + σ N(0, I) what is fed
in its place, R the reward of the answer a, B prompts of G samples. Noise makes h̃ an action with a density, so plain
REINFORCE trains chains of thought without reference chains and without back-propagation through time.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.losses.policy_gradient import advantages, gaussian_log_density, token_log_probability
from workbench.models.thinking import Rollout, Think, embedding_table, full_precision, pick, replay, rollout
from workbench.papers.soft_tokens_settings import (
    ABOUT,
    ARXIV,
    AUTHORS,
    CLAIMS,
    NOTEBOOK,
    PRESETS,
    TITLE,
    Arm,
    Config,
    Mode,
)  # fmt: skip
from workbench.papers.soft_tokens_tasks import Questions, Task, load_base, load_task
from workbench.training.loop import Fitted, Recipe, fit, step_seed
from workbench.training.record import Record

__all__ = [
    "ABOUT", "ARXIV", "AUTHORS", "CLAIMS", "NOTEBOOK", "PRESETS", "TITLE", "Arm", "Config", "Mode", "bench",
    "load_base", "load_task",
]  # fmt: skip


def mixture(logits: Tensor, table: Tensor, tau: float, top_k: int = 0) -> Tensor:
    """h = softmax(logits / τ) E (section 3); logits (..., V), table (V, n0). τ = 0 is the limit, E[argmax].

    top_k: keep the k largest logits only (another method's truncation; 0: the paper's, all of them).
    """
    if tau == 0:
        return table[logits.argmax(-1)]
    if top_k:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return (logits.to(dtype) / tau).softmax(-1) @ table.to(dtype)


@torch.no_grad()
def sigma_of(model: Any, factor: float) -> Tensor:
    """σ = factor x sqrt(mean E_ij²), so that the noise's norm σ sqrt(n0) is `factor` times an embedding's.

    The paper says "RMS norm of the embeddings"; per coordinate is our reading, the one that makes the noise "a bit
    smaller than the embeddings". σ is a constant of the step: it depends on E, which trains.
    """
    return factor * embedding_table(model).float().square().mean().sqrt()


@contextmanager
def head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """The final hidden states h^L (N, slots, n_L) that the output head was last fed, as the list's only entry."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(slice(None), inputs[:1]))
    try:
        yield seen
    finally:
        hook.remove()


def thinker(model: Any, mode: Mode, sigma: Tensor | float, seen: Sequence[Tensor] = ()) -> Think:
    """One step of the chain in `mode`: the next input (N, n0), its token (of a mixture the greedy shadow), the action.

    The action is the token, h̃ itself, or of the other methods the noisy logits ("logits", "gumbel") or the noisy final
    hidden state ("hidden"), whose clean value is taken from `seen` (see head_inputs).
    """
    table = embedding_table(model).detach()

    def think(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        if mode.kind == "hard":
            token = pick(logits, mode.tau, generator)
            return table[token], token, token
        shadow = logits.argmax(-1)
        if mode.noise == "hidden" and mode.factor > 0:
            last = seen[0][:, -1]
            last = last.repeat_interleave(len(logits) // len(last), 0)  # a prompt is read once for all its samples
            noise = torch.randn(last.shape, generator=generator, device=last.device, dtype=last.dtype)
            state = last + mode.factor * noise
            z = full_precision(model.get_output_embeddings()(state))
            return mixture(z, table, mode.tau, mode.top_k).to(table.dtype), shadow, state
        if mode.noise != "embedding" and mode.factor > 0:
            z = logits + logit_noise(logits, mode, generator)
            return mixture(z, table, mode.tau, mode.top_k).to(table.dtype), shadow, z
        h = mixture(logits, table, mode.tau, mode.top_k)
        noise = torch.randn(h.shape, generator=generator, device=h.device, dtype=h.dtype)
        thought = (h + sigma * noise).to(table.dtype)
        return thought, shadow, thought

    return think


def logit_noise(logits: Tensor, mode: Mode, generator: torch.Generator) -> Tensor:
    """Noise in front of the softmax, `factor` in units of the logits: Gaussian (Table 7) or Gumbel."""
    if mode.noise == "gumbel":
        u = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-9, 1 - 1e-7)
        return -mode.factor * (-u.log()).log()
    return mode.factor * torch.randn(logits.shape, generator=generator, device=logits.device)


def generate(
    model: Any, task: Task, questions: Questions, mode: Mode, *, seed: int, samples: int = 1, answer_tau: float = 0.0,
    sigma: Tensor | float | None = None, cached: bool = True,
) -> Rollout:  # fmt: skip
    """Chains and answers in one mode; only the chain is continuous, answers are greedy tokens unless answer_tau > 0."""
    noise = sigma_of(model, mode.factor) if sigma is None else sigma
    with head_inputs(model) as seen:
        return rollout(
            model, questions.ids, questions.mask, thinker(model, mode, noise, seen), task.format, limit=task.limit,
            answer_limit=task.answer_limit, seed=seed, samples=samples, answer_tau=answer_tau, cached=cached,
        )  # fmt: skip


def log_pi(
    model: Any, chains: Rollout, mode: Mode, sigma: Tensor | float, *, detach: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor]:
    """log π(h̃) and log π(a | h̃), (N,) each: SUMS over steps and dimensions (eqs 8 to 10), the constant dropped.

    h is recomputed with gradient from the stored h̃, which are constants. detach: "softmax" and / or "table" stops the
    gradient through that part of h = p E (for the analysis; the paper does not say whether it stops any).
    """
    with head_inputs(model) as seen:
        logits, answer_logits = replay(model, chains, continuous=mode.kind != "hard")
    answer = token_log_probability(chains.answer, answer_logits)
    if mode.kind == "hard":
        thought = token_log_probability(chains.tokens, logits, mode.tau)
    elif mode.noise == "gumbel":
        x = (chains.actions - logits) / mode.factor
        thought = -(x + (-x).exp()).sum(-1)
    elif mode.noise == "hidden":
        state = full_precision(seen[0][:, : logits.shape[1]])
        thought = gaussian_log_density(chains.actions, state, mode.factor, normalised=False)
    elif mode.noise == "logits":
        thought = gaussian_log_density(chains.actions, logits, mode.factor, normalised=False)
    else:
        table = embedding_table(model)
        table = table.detach() if "table" in detach else table
        h = mixture(logits.detach() if "softmax" in detach else logits, table, mode.tau, mode.top_k)
        thought = gaussian_log_density(chains.actions, h, sigma, normalised=False)
    return (thought * chains.thought_mask).sum(1), (answer * chains.answer_mask).sum(1)


def surrogate(
    model: Any, chains: Rollout, weights: Tensor, mode: Mode, sigma: Tensor | float, *, rows: int = 0
) -> dict[str, Tensor]:
    """L = -1/(BG) Σ sg(A) (log π(h̃) + log π(a | h̃)) (eq 8, appendix A); weights A (N,). Keys "thought", "answer".

    rows: chains scored at a time, recomputed in the backward pass (V logits at each of hundreds of steps are the
    memory of a run); 0: all at once.
    """

    def part(start: int, stop: int) -> Tensor:
        thought, answer = log_pi(model, chains.rows(start, stop), mode, sigma)
        a = weights[start:stop].detach()
        return -torch.stack([(a * thought).sum(), (a * answer).sum()]) / len(chains)

    n = len(chains)
    if not 0 < rows < n:
        both = part(0, n)
    else:
        pieces = [
            torch.utils.checkpoint.checkpoint(part, s, min(s + rows, n), use_reentrant=False)
            for s in range(0, n, rows)
        ]  # fmt: skip
        both = torch.stack(pieces).sum(0)
    return {"loss": both.sum(), "thought": both[0], "answer": both[1]}


def gradient_norm(value: Tensor, model: Any) -> float:
    """Norm of the gradient of `value` over all trained weights; the graph stays for further gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True) if value.requires_grad else []
    return sum(float(g.float().square().sum()) for g in grads if g is not None) ** 0.5


def objective(model: Any, task: Task, config: Config, arm: Arm, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """One step of the method: roll out G samples a prompt, reward their answers, and return the surrogate loss.

    Also logged: mean reward, share of right answers, of chains that stopped by themselves, and their length; where the
    batch says so the gradient norms of the terms of the loss, "thought_norm" and "answer_norm".
    """
    bare = getattr(model, "module", model)
    mode, questions = config.mode(arm), batch["questions"]
    sigma = sigma_of(bare, mode.factor)
    training, _ = bare.training, bare.eval()
    chains = generate(
        bare, task, questions, mode, seed=int(batch["seed"]), samples=config.samples, answer_tau=1.0, sigma=sigma
    )
    bare.train(training)
    marks = task.marks(chains, questions)
    reward = torch.where(marks == 2, config.reward, torch.where(marks == 1, config.reward / 10, 0.0))
    a = advantages(reward.view(-1, config.samples), config.baseline).flatten()
    losses = surrogate(bare, chains, a, mode, sigma, rows=config.rows)
    thoughts = chains.thought_mask.sum(1).float().mean()
    told = {"reward": reward.mean(), "right": (marks == 2).float().mean(), "stopped": chains.stopped.float().mean()}
    if batch["norms"]:  # two more backward passes
        told |= {f"{k}_norm": torch.tensor(gradient_norm(losses[k], bare)) for k in ("thought", "answer")}
    return {**losses, **told, "thoughts": thoughts}


@dataclass(frozen=True)
class Batches:
    """Micro-batch i of a training: its prompts, the seed of its rollout, and whether its gradient norms are logged."""

    task: Task
    config: Config
    seed: int
    log_every: int

    def __getitem__(self, i: int) -> dict[str, Any]:
        step, micro = i // self.config.accumulate + 1, i % self.config.accumulate
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, micro))
        questions = self.task.draw(generator, self.config.prompts, "train")
        logged = step % self.log_every == 0 or step == self.config.steps
        seed = torch.randint(2**62, (1,), generator=generator)
        return {"questions": questions, "seed": seed, "norms": self.config.norms and logged}


def train(
    config: Config, task: Task, model: Any, arm: Arm, seed: int, record: Record | None = None,
    on_step: Callable[[int, dict[str, Any], Any], None] | None = None, **loop: Any,
) -> tuple[Any, Fitted]:  # fmt: skip
    """Train `model` in place by REINFORCE in the mode of `arm`; AdamW, 20 warm-up steps, cosine, every weight.

    on_step(step, logged, model) is called at every logged step. Raises WorkbenchError for the arm "base".
    """
    if arm == "base":
        raise WorkbenchError("the arm 'base' is the model before training")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WorkbenchError("one arm trains in one process: give each GPU an arm or a seed of its own, not torchrun")
    model.train()
    recipe = Recipe(
        steps=config.steps, lr=config.rate(arm), warmup=min(1.0, config.warmup / config.steps), schedule="cosine",
        clip=config.clip, accumulate=config.accumulate, precision=config.precision, seed=seed,
        log_every=math.gcd(10, config.every), save_every=config.save_every,
    )  # fmt: skip

    def told(step: int, logged: dict[str, Any]) -> None:
        if on_step:
            model.eval()
            on_step(step, logged, model)
            model.train()

    fitted = fit(
        model, lambda m, batch: objective(m, task, config, arm, batch),
        Batches(task, config, seed, recipe.log_every), recipe, name=arm, record=record, on_step=told, **loop,
    )  # fmt: skip
    return model.eval(), fitted


def gradient_parts(
    model: Any, task: Task, config: Config, mode: Mode, questions: Questions, seed: int
) -> dict[str, float]:
    """Norm of the policy gradient by its path: "softmax" (logits of h = p E), "table" (E in p E), "answer".

    At τ = 1e-4 the softmax is saturated, and the first of them all but vanishes.
    """
    sigma = sigma_of(model, mode.factor)
    chains = generate(model, task, questions, mode, seed=seed, samples=config.samples, answer_tau=1.0, sigma=sigma)
    rewards = (task.marks(chains, questions) == 2).float().view(-1, config.samples)
    a = advantages(rewards).flatten()
    out = {}
    for name, detach in (("softmax", ("table",)), ("table", ("softmax",)), ("answer", ("softmax", "table"))):
        thought, answer = log_pi(model, chains, mode, sigma, detach=detach)
        if mode.kind == "hard" and name == "table":
            continue  # one path only
        out[name] = gradient_norm((a * (answer if name == "answer" else thought)).mean(), model)
    return out


@dataclass(frozen=True)
class Steps:
    """What a chain looked like inside: entropies of p at τ = 1 in nats (N, C), and the mask of used steps."""

    entropy: Tensor
    mask: Tensor


@torch.no_grad()
def chain_entropy(model: Any, chains: Rollout, mode: Mode, rows: int = 0) -> Steps:
    """Entropy of the next-token distribution at τ = 1 before every step of chains, `rows` at a time (0: all)."""
    pieces = []
    for start in range(0, len(chains), rows or len(chains)):
        part = chains.rows(start, start + (rows or len(chains)))
        p = replay(model, part, continuous=mode.kind != "hard")[0].log_softmax(-1)
        pieces.append(-(p.exp() * p).sum(-1))
    return Steps(torch.cat(pieces), chains.thought_mask)


def six_modes(config: Config) -> dict[str, Mode]:
    """The test modes of the paper: hard, soft and fuzzy, each greedy (τ = 0, or no noise) and sampled."""
    out = {}
    for kind in ("hard", "soft", "fuzzy"):
        mode = config.mode(kind)  # type: ignore[arg-type]
        out[f"{kind} greedy"] = replace(mode, tau=0.0 if kind == "hard" else mode.tau, factor=0.0)
        out[f"{kind} sample"] = mode
    return out


def bench(folder: Any) -> None:
    """Cost of hard, soft and fuzzy chains, cached and uncached: see soft_tokens_bench."""
    from workbench.papers.soft_tokens_bench import bench as measure

    measure(folder)
