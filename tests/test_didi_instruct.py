"""DiDi-Instruct's objective against exact enumeration, each trap of its rebuilding, and a broken part that flips a verdict."""

import copy
from dataclasses import replace

import pytest
import torch

from workbench.evaluation import enumeration as exact
from workbench.models import masked_diffusion as md
from workbench.models.masked_lm import Critic, small_masked_lm
from workbench.papers import didi_instruct as paper
from workbench.papers import didi_instruct_exact as listed
from workbench.papers.didi_instruct import Config, Parts

V, L = 2, 3


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rough(seed, **shape):
    """A network far from uniform, in float64."""
    net = small_masked_lm(shape.pop("v", V), shape.pop("length", L), width=16, layers=1, heads=2, seed=seed)
    net = net.double().eval()
    for p in net.parameters():
        p.data.add_(0.3 * torch.randn(p.shape, generator=rng(seed + p.numel()), dtype=p.dtype))
    return net


@pytest.fixture(scope="module")
def student():
    return rough(1)


@pytest.fixture(scope="module")
def target():
    law = torch.rand(V**L, generator=rng(8), dtype=torch.float64) + 0.1
    return law / law.sum()


class Oracle(torch.nn.Module):
    """The optimal critic at one time: every position says log q_student(z_t) - log q_reference(z_t)."""

    def __init__(self, ratio):
        super().__init__()
        self.ratio = ratio

    def forward(self, z):
        return self.ratio[exact.index_of(z, V + 1)][:, None].expand(z.shape)


def exact_term(net, target, tau, parts):
    """omega(tau) KL(q_nu(z_tau) || q(z_tau)) and the log-ratio of every state."""
    law = exact.sampler_law(exact.token_table(net, L), [tau, 0.0] if parts.decomposed else [0.0])
    q, p = (exact.noised(x, tau, V, L) for x in (law, target))
    w = min(max(1 / tau, 0.1), 10.0) if parts.omega else 1.0
    return w * exact.kl(q, p), (q.log() - p.log()).detach()


def flat(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("decomposed", [True, False], ids=["two jumps", "one jump"])
def test_the_estimator_is_the_exact_gradient_in_expectation(student, target, decomposed):
    """Theorem 3.1: no gradient passes through sampling, yet the mean over draws is the gradient of the integral KL."""
    parts = Parts(group_normalise=False, kl=0.0, entropy=0.0, decomposed=decomposed)
    tau = 0.6
    net = copy.deepcopy(student)
    loss, ratio = exact_term(net, target, tau, parts)
    loss.backward()
    wanted = flat(net)
    draws = []
    for i in range(24):
        net.zero_grad()
        g, taus = rng(100 + i), torch.full((4000,), tau)
        z, x = paper.trajectory(net, taus, L, g, decomposed=decomposed)
        zt = md.forward_noise(x, taus, V, g)
        # where nothing is masked the reward is 0 by definition: the oracle is told apart from it below
        batch = {"tau": taus, "t": taus, "z": z, "x": x, "zt": zt}
        ours = paper.student_loss(net, net, Oracle(ratio), batch, parts)
        seen = (zt != V).all(1)
        clean = torch.where(seen, ratio[exact.index_of(zt, V + 1)], 0.0)  # the part that no mask carries, added back
        start = torch.full_like(z, V)
        log_p = 0.0
        for before, after in ((start, z), (z, x)) if decomposed else ((start, x),):
            at = before == V
            log_p = log_p + paper.revealed_log_prob(md.logits_at(net, before, at).log_softmax(-1), at, before, after, V)
        (ours["policy"] + (1 / tau * clean * log_p).mean()).backward()
        draws.append(flat(net))
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 24**0.5
    assert mean.shape == wanted.shape and wanted.norm() > 0.05
    along = float(torch.nn.functional.cosine_similarity(mean, wanted, dim=0))
    assert along > 0.99, along
    off = ((mean - wanted).abs() / (error + 1e-6)).square().mean().sqrt()
    assert off < 1.5, off  # root mean square of the z-scores: 1 for an unbiased estimator


def test_the_sign_is_a_cost(student, target):
    """Text that the critic knows for the student's becomes rarer: one step against the reward's gradient lowers the KL."""
    parts = Parts(group_normalise=False)
    for sign, better in ((1.0, True), (-1.0, False)):
        net = copy.deepcopy(student)
        before, ratio = exact_term(net, target, 0.6, parts)
        g, taus = rng(5), torch.full((4000,), 0.6)
        z, x = paper.trajectory(net, taus, L, g)
        batch = {"t": taus, "z": z, "x": x, "zt": md.forward_noise(x, taus, V, g)}
        paper.student_loss(net, net, Oracle(sign * ratio), batch, parts)["policy"].backward()
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.05 * p.grad if p.grad is not None else 0)
        assert (exact_term(net, target, 0.6, parts)[0] < before) == better
