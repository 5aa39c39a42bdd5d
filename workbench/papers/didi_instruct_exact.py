"""DiDi-Instruct where everything can be listed: windows of letter classes, exact divergences, no judge and no draws."""

from typing import Any

import torch
from torch import Tensor, nn

from workbench.data.letter_classes import letter_world
from workbench.evaluation import enumeration as exact
from workbench.losses.masked_diffusion import mdlm_loss, spread_times
from workbench.models.masked_diffusion import weight
from workbench.models.masked_lm import MaskedLM, small_masked_lm
from workbench.papers.didi_instruct import TAU_RANGE, distil, variant_parts
from workbench.papers.didi_instruct_settings import Config, Parts
from workbench.training.loop import Recipe, fit
from workbench.training.record import Record

TIMES = 6  # points of the quadrature over tau


def quadrature() -> tuple[list[float], list[float]]:
    """Gauss-Legendre points and weights on the range of tau, as shares of pi (uniform)."""
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(TIMES)
    low, high = TAU_RANGE
    return ((low + high) / 2 + (high - low) / 2 * points).tolist(), (weights / 2).tolist()


def integral_kl(table: Tensor, target: Tensor, length: int, parts: Parts) -> Tensor:
    """L(nu) = E_tau[ omega(tau) KL(q_nu(z_tau) || q(z_tau)) ], nats, exact and differentiable.

    table: the student's token_table; target (V^L,): the law of clean text it is compared with. The student samples by
    the two jumps 1 → tau → 0, or by one where the score is not decomposed.
    """
    v = table.shape[2]
    total = torch.zeros((), dtype=torch.float64)
    for tau, share in zip(*quadrature(), strict=True):
        law = exact.sampler_law(table, [tau, 0.0] if parts.decomposed else [0.0])
        w = float(weight(torch.tensor(tau)).clamp(0.1, 10.0)) if parts.omega else 1.0
        q, p = (exact.noised(x, tau, v, length) for x in (law, target))
        total = total + share * w * exact.kl(q, p)
    return total


def train_teacher(config: Config, seed: int, record: Record | None = None) -> MaskedLM:
    """A small MDLM on the letter windows."""
    world = letter_world(length=config.exact_length)
    net = small_masked_lm(3, world.length, width=32, layers=2, heads=2, seed=seed)

    def loss(m: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(int(batch))
        return {"loss": mdlm_loss(m, world.draw(g, 128), spread_times(128, g), g)}

    recipe = Recipe(steps=config.exact_teacher_steps, lr=3e-3, warmup=0.05, schedule="cosine", clip=1.0, ema=0.98,
                    seed=seed)  # fmt: skip
    fitted = fit(net, loss, lambda g: torch.randint(2**62, (1,), generator=g), recipe, name="exact teacher",
                 record=record, progress=False)  # fmt: skip
    assert isinstance(fitted.ema, MaskedLM)
    return fitted.ema.eval().requires_grad_(False)


@torch.no_grad()
def measure(net: nn.Module, config: Config, parts: Parts) -> dict[str, Any]:
    """Exact numbers of a student or teacher, nats: "ikl", and "kl N", "entropy N" of its law after N steps."""
    world = letter_world(length=config.exact_length)
    table = exact.token_table(net, world.length)
    out: dict[str, Any] = {"ikl": float(integral_kl(table, world.law, world.length, parts))}
    for steps in range(1, world.length + 1):
        law = exact.step_law(table, steps)
        out[f"kl {steps}"] = float(exact.kl(law, world.law))
        out[f"entropy {steps}"] = float(-torch.special.xlogy(law, law).sum())
    return out


def study(config: Config, seed: int, record: Record | None = None) -> dict[str, dict[str, Any]]:
    """variant → exact measures of one seed; "teacher" among them."""
    world = letter_world(length=config.exact_length)
    teacher = train_teacher(config, seed, record)
    out = {"teacher": measure(teacher, config, config.parts())}
    own = config.exact()
    for variant in config.exact_variants:
        student = distil(teacher, world.draw, world.length, own, variant_parts(own, variant), seed, record,
                         name=f"exact {variant}", progress=False)  # fmt: skip
        out[variant] = measure(student.net, config, config.parts())
    return out
