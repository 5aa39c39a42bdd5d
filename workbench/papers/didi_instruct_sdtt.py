"""The baseline of DiDi-Instruct: self-distillation through time (Deschenaux and Gulcehre, arXiv 2410.21035)."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.losses.masked_diffusion import divergence
from workbench.models.masked_diffusion import Denoiser, forward_noise, jump, logits_at
from workbench.papers.didi_instruct import Reference
from workbench.papers.didi_instruct_settings import Config
from workbench.training.loop import Recipe, fit
from workbench.training.record import Record


def sdtt_loss(
    student: nn.Module, teacher: nn.Module, x: Tensor, t: Tensor, dt: float, generator: torch.Generator, kind: str
) -> dict[str, Tensor]:
    """SDTT (Deschenaux and Gulcehre, arXiv 2410.21035): one pass of the student learns two steps of the teacher.

    The teacher goes z_t → z_(t-dt/2) → z_(t-dt). A position's target is the teacher's distribution from the pass before
    it was revealed; of the positions still masked, from the last pass. x (B, L) clean text, t (B,) in [dt, 1].
    """
    mask = cast(Denoiser, student).vocabulary
    z = forward_noise(x, t, mask, generator)
    masked = z == mask
    with torch.no_grad():
        target = logits_at(teacher, z, masked).log_softmax(-1)
        middle = jump(teacher, z, t, t - dt / 2, generator)
        still = middle == mask
        if still.any():
            target[still[masked]] = logits_at(teacher, middle, still).log_softmax(-1)
    mine = logits_at(student, z, masked).log_softmax(-1)
    return {"loss": divergence(target, mine, cast(Any, kind))}


def sdtt(
    teacher: nn.Module, reference: Reference, length: int, config: Config, seed: int, record: Record | None = None,
    **loop: Any,
) -> nn.Module:  # fmt: skip
    """Rounds that double the step, each learning from the last round's student; returns the last one's average."""
    net = teacher.eval().requires_grad_(False)
    steps = config.sdtt_steps // config.sdtt_rounds
    for number in range(config.sdtt_rounds):
        dt = min(1.0, 2.0 ** (number + 1) / config.sdtt_from)

        def loss(s: nn.Module, batch: Tensor, net: nn.Module = net, dt: float = dt) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(int(batch))
            t = dt + (1 - dt) * torch.rand(config.batch, generator=generator)
            x = reference(generator, config.batch).to(next(s.parameters()).device)
            return sdtt_loss(s, net, x, t, dt, generator, "forward")

        recipe = Recipe(
            steps=steps, lr=config.sdtt_lr, warmup=config.warmup, clip=1.0, ema=config.ema, seed=seed * 16 + number,
            schedule="cosine", precision=config.precision, save_every=config.save_every, log_every=config.log_every,
        )  # fmt: skip
        student = copy.deepcopy(net).requires_grad_(True)
        fitted = fit(
            student, loss, lambda g: torch.randint(2**62, (1,), generator=g), recipe, name=f"sdtt round {number}",
            record=record, **loop,
        )  # fmt: skip
        assert fitted.ema is not None
        net = fitted.ema.eval().requires_grad_(False)
    return net
