"""Targets, conversions, DDIM, guidance and SDEdit against what can be worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from workbench.errors import WorkbenchError
from workbench.models.denoisers import no_prompt, small_unet
from workbench.models.diffusion import add_noise, cosine_schedule, ladder, sample, target, to_x0_and_noise

KINDS = ["epsilon", "v_prediction", "sample"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_target_and_conversion_are_inverse(kind):
    schedule = cosine_schedule(prediction=kind)
    x0, noise, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([1, 500, 900])
    z = add_noise(schedule, x0, noise, t)
    abar = schedule.alphas_cumprod[t].view(3, 1, 1, 1)
    assert torch.allclose(z, abar.sqrt() * x0 + (1 - abar).sqrt() * noise, atol=1e-6)
    found, eps = to_x0_and_noise(schedule, target(schedule, x0, noise, t), z, t)
    assert torch.allclose(found, x0, atol=1e-4) and torch.allclose(eps, noise, atol=1e-4)


class Perfect(nn.Module):
    """Knows x0 and says what a perfect network would say; the sign of its context moves the x0 it believes in."""

    def __init__(self, schedule, x0):
        super().__init__()
        self.schedule, self.x0, self.seen = schedule, x0, []
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, z, t, encoder_hidden_states):
        self.seen.append(int(t))
        x0 = self.x0 + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        abar = self.schedule.alphas_cumprod[int(t)]
        noise = (z - abar.sqrt() * x0) / (1 - abar).sqrt()
        return SimpleNamespace(sample=target(self.schedule, x0.expand_as(z), noise, t.expand(len(z)).long()))


def context(value):
    return {"encoder_hidden_states": torch.full((2, 1, 4), float(value))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_leads_to_its_image(kind):
    schedule = cosine_schedule(prediction=kind)
    perfect = Perfect(schedule, normal(1, 3, 6, 6, seed=2))
    out = sample(perfect, schedule, normal(2, 3, 6, 6), context(0), steps=10)
    assert (out - perfect.x0).abs().max() < 2e-2
    assert len(perfect.seen) == 10 and perfect.seen[0] == 999 and perfect.seen == sorted(perfect.seen, reverse=True)


def test_guidance_extrapolates_and_asks_for_the_empty_prompt():
    schedule = cosine_schedule()
    perfect = Perfect(schedule, torch.zeros(1, 3, 4, 4))
    noise = normal(2, 3, 4, 4)
    out = sample(perfect, schedule, noise, context(0.3), steps=8, guidance=2.0, empty=context(0.1))
    assert torch.allclose(out, torch.full_like(out, 0.5), atol=2e-2)  # .1 + 2 (.3 - .1)
    with pytest.raises(WorkbenchError, match="empty prompt"):
        sample(perfect, schedule, noise, context(0.3), steps=2, guidance=2.0)


def test_sdedit_keeps_more_at_a_lower_strength_and_refuses_none():
    schedule = cosine_schedule()
    perfect = Perfect(schedule, torch.zeros(1, 3, 4, 4))
    start = torch.ones(2, 3, 4, 4)
    sample(perfect, schedule, normal(2, 3, 4, 4), context(0), steps=10, start=start, strength=0.3)
    assert len(perfect.seen) == 3 and perfect.seen[0] < 400
    with pytest.raises(WorkbenchError, match="strength"):
        sample(perfect, schedule, start, context(0), strength=0.0)


def test_any_size_and_the_same_noise_gives_the_same_image():
    unet, schedule = small_unet(seed=3).eval(), cosine_schedule()
    condition = {"encoder_hidden_states": no_prompt(2)}
    for side in (12, 16):
        noise = normal(2, 3, side, side)
        a, b = (sample(unet, schedule, noise, condition, steps=2) for _ in range(2))
        assert a.shape == noise.shape and torch.equal(a, b)
    rungs = ladder(unet, schedule, a, condition, [0.5, 0.2], torch.Generator().manual_seed(0), steps=4)
    assert [r.shape[-1] for r in rungs] == [16, 32, 64]
