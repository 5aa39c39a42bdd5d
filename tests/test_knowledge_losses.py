"""One-way distillation losses against their formulas in float64, their gradients, and what they refuse."""

import math

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.losses.knowledge import feature_kd, logit_kd, state_distance


def rows(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_kd_is_the_sum_over_classes(temperature, reverse):
    ours, theirs = 2 * rows(3, 5), 2 * rows(3, 5, seed=1)
    total = 0.0
    for s, t in zip(ours.tolist(), theirs.tolist(), strict=True):
        q, p = ([math.exp(z / temperature) for z in v] for v in (s, t))
        q, p = ([z / sum(v) for z in v] for v in (q, p))
        p, q = (q, p) if reverse else (p, q)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = logit_kd(ours, theirs, temperature=temperature, reverse=reverse)
    assert found.item() == pytest.approx(temperature**2 * total / 3, rel=1e-5)
    assert logit_kd(ours, ours + 7).item() == pytest.approx(0, abs=1e-6)  # logits are defined up to a constant


def test_its_gradient_keeps_its_size_with_the_temperature_and_spares_the_teacher():
    theirs = rows(4, 6, seed=1).requires_grad_()
    sizes = []
    for temperature in (10.0, 100.0):
        ours = rows(4, 6).requires_grad_()
        logit_kd(ours, theirs, temperature=temperature).backward()
        sizes.append(ours.grad.norm().item())
        # T -> inf: the gradient tends to that of half the mean squared difference of centred logits
        wanted = (ours - ours.mean(-1, keepdim=True) - theirs + theirs.mean(-1, keepdim=True)) / 6 / 4
    assert torch.allclose(ours.grad, wanted.detach(), rtol=0.1, atol=1e-3)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1) and theirs.grad is None


def test_masked_rows_do_not_count_and_impossible_classes_do_no_harm():
    ours, theirs = rows(2, 3, 4), rows(2, 3, 4, seed=1)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
    kept = torch.cat([ours[0, :1], ours[1, :2]]), torch.cat([theirs[0, :1], theirs[1, :2]])
    assert logit_kd(ours, theirs, mask=mask) == pytest.approx(logit_kd(*kept).item(), rel=1e-6)
    assert state_distance(ours, theirs, mask=mask) == pytest.approx(state_distance(*kept).item(), rel=1e-6)
    theirs[..., 0] = -torch.inf
    ours.requires_grad_()
    loss = logit_kd(ours, theirs)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(ours.grad).all()


def test_states_cannot_agree_by_shrinking_unless_asked_to():
    x, y = rows(3, 8), rows(3, 8, seed=1)
    assert state_distance(x, y) == pytest.approx(state_distance(10 * x + 5, y).item(), rel=1e-3)
    assert state_distance(1e-2 * x, 1e-2 * y, normalise=False) < 1e-3 * state_distance(x, y, normalise=False)
    centred = [(z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() for z in (x, y)]
    assert state_distance(x, y) == pytest.approx((centred[0] - centred[1]).square().mean().item(), rel=1e-5)


def test_a_hint_moves_the_student_alone():
    x, y = rows(3, 8).requires_grad_(), rows(3, 8, seed=1).requires_grad_()
    feature_kd(x, y).backward()
    assert x.grad.norm() > 0 and y.grad is None
    state_distance(x, y).backward()
    assert y.grad.norm() > 0


def test_what_does_not_fit_is_one_line():
    with pytest.raises(WorkbenchError, match="student has 3, the teacher 4"):
        logit_kd(rows(2, 3), rows(2, 4))
    with pytest.raises(WorkbenchError, match="above 0"):
        logit_kd(rows(2, 3), rows(2, 3), temperature=0)
    with pytest.raises(WorkbenchError, match="different shapes"):
        state_distance(rows(2, 3), rows(2, 4))
