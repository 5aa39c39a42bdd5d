"""DiDi-Instruct (Zheng et al., arXiv 2509.25035): a masked diffusion language model distilled into a few-step student.

Symbols: p_theta teacher, p_nu student, D_lambda critic; x clean text, z_t noised, m mask; tau the intermediate time.
The objective is the integral KL between both models' noised laws,

    L(nu) = int omega(t) KL(q_nu(z_t) || q_theta(z_t)) dt,

and its gradient, by the score-function identity (Theorem 3.1), needs no gradient through sampling:

    grad L = E_{t ~ pi, x ~ p_nu, z_t ~ Q(.|x)} [ omega(t) / pi(t) R(z_t, t) grad log p_nu(x) ],
    R = log q_nu(z_t) - log q_theta(z_t) = log D / (1 - D)      of the optimal critic that calls the student's text 1.

R is a cost: the loss below is E[omega R log p_nu], so text that the critic knows for the student's becomes rarer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.losses.masked_diffusion import divergence
from workbench.models.masked_diffusion import (
    Denoiser,
    Move,
    draw,
    features_at,
    forward_noise,
    head_logits,
    jump,
    logits_at,
    reveals,
    weight,
)
from workbench.models.masked_lm import Critic
from workbench.papers.didi_instruct_settings import (
    ABOUT,
    ARXIV,
    AUTHORS,
    CHANGES,
    CLAIMS,
    NOTEBOOK,
    PRESETS,
    TITLE,
    Config,
    Parts,
    Variant,
)  # fmt: skip
from workbench.training.loop import Auxiliary, Fitted, Recipe, fit
from workbench.training.record import Record

__all__ = ["ABOUT", "ARXIV", "AUTHORS", "CLAIMS", "NOTEBOOK", "PRESETS", "TITLE", "Config", "Parts", "Variant"]
TAU_RANGE = (0.02, 0.98)
Reference = Callable[[torch.Generator, int], Tensor]  # (generator, count) -> clean text (count, L) the critic calls 0


def _mask(net: nn.Module) -> int:
    return cast(Denoiser, net).vocabulary


# --- the pieces of the objective -------------------------------------------------------------------------------------


def draw_tau(count: int, parts: Parts, generator: torch.Generator) -> Tensor:
    """tau (count,) ~ pi = Beta(a, a) on [0.02, 0.98], a whole; one a group of G where parts.tau_per says so."""
    number = count // parts.group if parts.tau_per == "group" else count
    a = parts.beta
    # Beta(a, a) of whole a is the a-th smallest of 2 a - 1 uniform numbers
    u = torch.rand(number, 2 * a - 1, generator=generator).sort(1).values[:, a - 1]
    tau = TAU_RANGE[0] + (TAU_RANGE[1] - TAU_RANGE[0]) * u
    return tau.repeat_interleave(count // number)


def importance(tau: Tensor, parts: Parts) -> Tensor:
    """omega(tau) / pi(tau), (B,): omega = 1 / tau clamped to [0.1, 10], each factor 1 where it is switched off."""
    w = weight(tau).clamp(0.1, 10.0) if parts.omega else torch.ones_like(tau)
    if parts.over_pi:
        low, high = TAU_RANGE
        a = torch.full_like(tau, float(parts.beta))
        unit = ((tau - low) / (high - low)).clamp(1e-4, 1 - 1e-4)
        w = w * (high - low) / torch.distributions.Beta(a, a).log_prob(unit).exp()
    return w


@torch.no_grad()
def trajectory(
    student: nn.Module, tau: Tensor, length: int, generator: torch.Generator, *, decomposed: bool = True
) -> tuple[Tensor, Tensor]:
    """(z_tau, x), (B, L) each: the student's two reverse jumps 1 → tau → 0 (intermediate-state matching).

    decomposed=False: one jump 1 → 0, and z_tau is all mask.
    """
    m = torch.full((len(tau), length), _mask(student), device=next(student.parameters()).device)
    one, zero = torch.ones_like(tau), torch.zeros_like(tau)
    z = jump(student, m, one, tau, generator) if decomposed else m
    return z, jump(student, z, tau if decomposed else one, zero, generator)


def revealed_log_prob(log_p: Tensor, masked: Tensor, before: Tensor, after: Tensor, mask: int) -> Tensor:
    """log P_nu(after | before) of each sequence, (B,): the sum over what was masked before and is revealed after.

    log_p (M, V): log-probabilities at the positions masked (B, L) of `before`. Copied tokens are certain and those
    still masked carry no gradient: neither is counted.
    """
    shown = (after != mask) & masked
    tokens = after.clamp(max=log_p.shape[1] - 1)[masked]
    picked = log_p.gather(1, tokens[:, None]).squeeze(1) * shown[masked]
    return torch.zeros(before.shape, device=before.device, dtype=log_p.dtype).masked_scatter(masked, picked).sum(1)


def reward(critic: nn.Module, z: Tensor, mask: int, parts: Parts, *, clip: float = 8.0) -> Tensor:
    """R (B,): the mean over masked positions of the critic's log-odds, each clipped; 0 where nothing is masked.

    Every position's optimum is the log-ratio of the whole sequence: a mean estimates it, a sum would favour few masks.
    parts.positions "all" reads every position: right where texts are so short that often none is masked.
    """
    read = (z == mask).float() if parts.positions == "masked" else torch.ones_like(z).float()
    odds = critic(z).clamp(-clip, clip)
    return (odds * read).sum(1) / read.sum(1).clamp(min=1)


def advantage(r: Tensor, parts: Parts) -> Tensor:
    """R~ (B,): (R - mean of its group of G) / (std + eps), clipped to [-3, 3]; R itself where switched off.

    A group whose members agree has a standard deviation near 0 and nothing to say: eps keeps its R~ small.
    """
    if not parts.group_normalise:
        return r
    groups = r.view(-1, parts.group)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-2)).clamp(-3, 3).flatten()


def student_loss(
    student: nn.Module, teacher: nn.Module, critic: nn.Module, batch: dict[str, Any], parts: Parts
) -> dict[str, Tensor]:
    """L_S of one batch {"tau", "z", "x", "zt", "t"}: the score-function term, KL to the teacher, entropy.

    z, x: the trajectory; zt = z_t of x, at t = tau where the times are coupled. With the critic as it is now.
    """
    mask, z, x = _mask(student), batch["z"], batch["x"]
    with torch.no_grad():
        r = parts.sign * reward(critic, batch["zt"], mask, parts)
    w = importance(batch["t"], parts).to(r) * advantage(r, parts)
    # at t = 1 every row is all mask: one row of it serves the whole batch
    start = torch.full_like(z[:1], mask)
    everywhere = torch.ones_like(start, dtype=torch.bool)
    hi = logits_at(student, start, everywhere).log_softmax(-1)
    first = hi.repeat(len(z), 1)
    log_p = revealed_log_prob(first, everywhere.expand_as(z), start.expand_as(z), z if parts.decomposed else x, mask)
    terms: dict[str, Tensor] = {}
    masked = z == mask
    mine, states = [hi], [(start, everywhere)]
    if parts.decomposed and masked.any():
        lo = logits_at(student, z, masked).log_softmax(-1)
        log_p = log_p + revealed_log_prob(lo, masked, z, x, mask)
        mine.append(lo)
        states.append((z, masked))
    terms["policy"] = (w * log_p).mean()
    loss = terms["policy"]
    if parts.kl:
        kls = []
        for ours, (state, at) in zip(mine, states, strict=True):
            with torch.no_grad():
                theirs = logits_at(teacher, state, at).log_softmax(-1)
            kls.append(divergence(theirs, ours, parts.kl_kind))
        terms["kl"] = torch.stack(kls).sum()
        loss = loss + parts.kl * terms["kl"]
    if parts.entropy:
        terms["spread"] = torch.stack([-(p.exp() * p).sum(-1).mean() for p in mine]).mean()
        loss = loss - parts.entropy * terms["spread"]
    return {"loss": loss, **terms, "reward": r.mean(), "reward_sd": r.std(), "log_p": log_p.detach().mean()}


def critic_loss(
    critic: nn.Module, fake: Tensor, real: Tensor, mask: int, parts: Parts, smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Binary cross-entropy at the masked positions of fake (B, L), label 1, and real (B, L), the reference's, 0."""
    odds = critic(torch.cat([fake, real])).float()
    at = (torch.cat([fake, real]) == mask) | (parts.positions == "all")
    label = torch.cat([torch.ones_like(fake), torch.zeros_like(real)]).float()
    soft = label * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(odds, soft, reduction="none")
    right = ((odds > 0) == (label > 0.5)).float()
    count = at.sum().clamp(min=1)
    return {"loss": (losses * at).sum() / count, "accuracy": (right * at).sum().detach() / count}


# --- distillation ----------------------------------------------------------------------------------------------------


def noisy_students(
    student: nn.Module, count: int, length: int, parts: Parts, generator: torch.Generator
) -> dict[str, Tensor]:
    """A batch of the student's own text: tau, the trajectory z, x, and zt = x noised again at t (coupled: t = tau)."""
    tau = draw_tau(count, parts, generator)
    z, x = trajectory(student, tau, length, generator, decomposed=parts.decomposed)
    t = tau if parts.coupled else draw_tau(count, parts, generator)
    return {"tau": tau, "t": t, "z": z, "x": x, "zt": forward_noise(x, t, _mask(student), generator)}


@dataclass
class Student:
    """A distilled student: its averaged weights, the critic it ended with, and the record of its training."""

    net: nn.Module
    critic: Critic
    fitted: Fitted
    critic_size: tuple[int, int]  # the critic's parameters, in all and those that learned


def distil(
    teacher: nn.Module, reference: Reference, length: int, config: Config, parts: Parts, seed: int,
    record: Record | None = None, *, name: str = "didi", **loop: Any,
) -> Student:  # fmt: skip
    """Alternate: the critic learns to tell the student's noised text from the reference's, then the student moves.

    Each side draws its own text in its own step, the student's after the critic's update. The teacher gets no gradient.
    """
    teacher = teacher.eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    critic = Critic(teacher, config.critic_blocks, seed)
    mask, count = _mask(teacher), config.batch

    def seeds(generator: torch.Generator) -> Tensor:
        return torch.randint(2**62, (1,), generator=generator)  # the networks draw, so a batch is a seed

    def tell_apart(d: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(batch))
        fake = noisy_students(student, count, length, parts, generator)
        real = reference(generator, count).to(fake["x"].device)
        return critic_loss(d.train(), fake["zt"], forward_noise(real, fake["t"], mask, generator), mask,
                           parts, config.smoothing)  # fmt: skip

    def move(s: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(batch))
        fake = noisy_students(s, count, length, parts, generator)
        return student_loss(s, teacher, critic.eval(), fake, parts)

    if config.critic_warmup:  # the frozen-student phase: rewards of a critic that knows nothing are noise
        first = Recipe(steps=config.critic_warmup, lr=config.critic_lr, warmup=0.1, clip=1.0, seed=seed)
        fit(critic, tell_apart, seeds, first, name=f"{name}, critic", record=record, progress=False)
    recipe = Recipe(
        steps=config.steps, lr=config.lr, warmup=config.warmup, clip=config.clip, ema=config.ema, seed=seed,
        schedule="cosine", precision=config.precision, save_every=config.save_every, log_every=config.log_every,
    )  # fmt: skip
    side = Auxiliary(critic, tell_apart, lr=config.critic_lr, clip=1.0, repeats=config.critic_repeats)
    fitted = fit(student, move, seeds, recipe, name=name, record=record, auxiliaries={"critic": side}, **loop)
    assert fitted.ema is not None
    size = critic.parameter_count()
    return Student(fitted.ema.eval().requires_grad_(False), critic.eval().requires_grad_(False), fitted, size)


# --- reward-guided ancestral sampling --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guidance:
    """RGAS: steps before `rerank_from` of the way tilt the logits by the critic, the others choose among candidates.

    scale: h at the first and the last tilted step; clip: of each component of the gradient; candidates: M.
    temperature: of the softmax over the candidates' summed log-odds.
    """

    critic: nn.Module
    steps: int
    scale: tuple[float, float] = (0.2, 1.0)
    candidates: int = 4
    rerank_from: float = 0.5
    clip: float = 1.0
    temperature: float = 1.0

    def passes(self) -> dict[str, int]:
        """Forward passes of the student and forward and backward passes of the critic that a sequence costs."""
        tilted = sum(self.tilts(i) for i in range(self.steps))
        ranked = sum(self.ranks(i) for i in range(self.steps))
        return {"student": self.steps, "critic": tilted + self.candidates * ranked, "critic backward": tilted}

    def tilts(self, step: int) -> bool:
        """Whether a step (from 0) tilts."""
        return step < self.rerank_from * self.steps

    def ranks(self, step: int) -> bool:
        """Whether it re-ranks; never the last: the critic reads masked positions, and none is left after it."""
        return not self.tilts(step) and self.candidates > 1 and step < self.steps - 1

    def strength(self, step: int) -> float:
        """h, from scale[0] to scale[1] over the tilted steps."""
        last = max(1, sum(self.tilts(i) for i in range(self.steps)) - 1)
        return self.scale[0] + (self.scale[1] - self.scale[0]) * step / last

    def mover(self, student: nn.Module, temperature: float = 1.0) -> Move:
        """The reverse step that `sample` takes in place of its own."""

        def move(step: int, z: Tensor, t: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
            mask = _mask(student)
            shown = reveals(z, t, s, mask, generator)
            masked = z == mask
            # the tilt needs the logits of every masked position, a plain step those of the revealed ones
            at = masked if self.tilts(step) else shown
            if not shown.any():
                return z
            features = features_at(student, z, at)
            tilt = self.tilt(student, z, masked, features) * self.strength(step) if self.tilts(step) else None
            rows = shown[at]
            features, tilt = features[rows], None if tilt is None else tilt[rows]

            def once() -> Tensor:
                out = z.clone()
                out[shown] = draw(student, features, generator, temperature=temperature, tilt=tilt)
                return out

            return self.choose([once() for _ in range(self.candidates)], generator) if self.ranks(step) else once()

        return move

    def tilt(self, student: nn.Module, z: Tensor, masked: Tensor, features: Tensor) -> Tensor:
        """-grad of the critic's summed log-odds by the logits at masked positions, (M, V), clipped.

        The critic reads soft tokens there: softmax(logits) @ the embedding table.
        """
        critic = cast(Any, self.critic)
        table = critic.backbone.table
        with torch.enable_grad():
            logits = head_logits(student, features).detach().requires_grad_(True)
            soft = logits.softmax(-1).to(table.dtype) @ table[: _mask(student)]
            embeds = F.embedding(z, table).masked_scatter(masked[..., None], soft)
            odds = (critic(embeds=embeds) * masked).sum()
            (gradient,) = torch.autograd.grad(-odds, logits)
        return gradient.clamp(-self.clip, self.clip)

    def choose(self, drawn: list[Tensor], generator: torch.Generator) -> Tensor:
        """One of the M candidates (B, L) of each row, by softmax of minus the critic's log-odds summed over masks."""
        mask = self.critic.vocabulary
        scores = [-(self.critic(z) * (z == mask)).sum(1).float() for z in drawn]
        odds = (torch.stack(scores, 1) / self.temperature).softmax(1).cpu()
        pick = torch.multinomial(odds, 1, generator=generator).squeeze(1).to(drawn[0].device)
        return torch.stack(drawn, 1)[torch.arange(len(pick), device=pick.device), pick]


def bench(folder: Path) -> None:
    """`workbench bench didi_instruct`."""
    from workbench.papers.didi_instruct_bench import bench as measure

    measure(folder)


def variant_parts(config: Config, variant: str) -> Parts:
    """The parts of a variant: the config's own, with what the variant's name takes away or leaves."""
    return replace(config.parts(), **CHANGES.get(variant, {}))
