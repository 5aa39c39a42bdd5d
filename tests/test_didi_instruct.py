"""DiDi-Instruct's objective against exact enumeration, its traps, and a broken part that flips a verdict."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from workbench.config import override
from workbench.errors import WorkbenchError
from workbench.evaluation import enumeration as exact
from workbench.evaluation.claims import judge
from workbench.models import masked_diffusion as md
from workbench.models.masked_lm import Critic, small_masked_lm
from workbench.papers import didi_instruct as paper
from workbench.papers import didi_instruct_exact as listed
from workbench.papers import didi_instruct_sdtt as baseline
from workbench.papers import didi_instruct_study as experiments
from workbench.papers.didi_instruct import Config, Parts
from workbench.papers.didi_instruct_settings import CHANGES
from workbench.training.record import Record

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
    parts = Parts(group_normalise=False, positions="all", decomposed=decomposed)
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
        batch = {"tau": taus, "t": taus, "z": z, "x": x, "zt": zt}
        paper.student_loss(net, net, Oracle(ratio), batch, parts)["policy"].backward()
        draws.append(flat(net))
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 24**0.5
    assert mean.shape == wanted.shape and wanted.norm() > 0.05
    along = float(torch.nn.functional.cosine_similarity(mean, wanted, dim=0))
    assert along > 0.99, along
    off = ((mean - wanted).abs() / (error + 1e-6)).square().mean().sqrt()
    assert off < 1.5, off  # root mean square of the z-scores: 1 for an unbiased estimator


def test_the_sign_is_a_cost(student, target):
    """Text that the critic knows for the student's becomes rarer: a step down the loss lowers the KL, up raises it."""
    parts = Parts(group_normalise=False, positions="all")
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


def test_the_log_probability_counts_what_was_revealed_and_nothing_else():
    """By hand: copied tokens and tokens still masked add nothing, not even a log of 1e-10."""
    before, after = torch.tensor([[V, 1, V], [V, V, V]]), torch.tensor([[0, 1, V], [1, V, 0]])
    p = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5], [0.3, 0.7], [0.6, 0.4]], requires_grad=True)
    got = paper.revealed_log_prob(p.log(), before == V, before, after, V)
    assert got.tolist() == pytest.approx([math.log(0.2), math.log(0.5 * 0.6)])
    got.sum().backward()
    assert (p.grad != 0).sum() == 3


def test_both_jumps_carry_gradient(student):
    """A loss on the second jump alone would leave the all-mask prediction as it was."""
    parts, taus = Parts(group_normalise=False), torch.full((64,), 0.5)
    z, x = paper.trajectory(student, taus, L, rng())
    zt = md.forward_noise(x, taus, V, rng(1))
    at = torch.full((1, L), V)
    for frozen in (False, True):
        net = copy.deepcopy(student)
        batch = {"t": taus, "z": at.expand_as(z) if frozen else z, "x": x, "zt": zt}
        critic = Oracle(torch.randn((V + 1) ** L, generator=rng(2), dtype=torch.float64))
        assert paper.student_loss(net, net, critic, batch, parts)["policy"].requires_grad
    assert ((z == V).any() and (z != V).any()) and (x != V).all()


def test_tau_and_its_weights():
    for beta, second in ((1, 1 / 12), (2, 1 / 20)):  # the variances of Beta(1, 1) and Beta(2, 2)
        tau = paper.draw_tau(40_000, Parts(beta=beta), rng())
        assert tau.min() >= 0.02 and tau.max() <= 0.98 and tau.mean().item() == pytest.approx(0.5, abs=0.01)
        assert tau.var().item() == pytest.approx(second * 0.96**2, rel=0.05)
    together = paper.draw_tau(12, Parts(tau_per="group", group=4), rng()).view(3, 4)
    assert (together == together[:, :1]).all() and together[:, 0].unique().numel() == 3
    tau = torch.tensor([0.02, 0.5, 0.98])
    assert paper.importance(tau, Parts()).tolist() == pytest.approx([10.0, 2.0, 1 / 0.98])  # clamped at small tau
    assert paper.importance(tau, Parts(omega=False)).tolist() == [1, 1, 1]
    # dividing by pi and drawing from pi is the plain integral
    drawn = paper.draw_tau(400_000, Parts(beta=2), rng(4))
    inside = (drawn > 0.1) & (drawn < 0.9)
    w = paper.importance(drawn, Parts(beta=2, over_pi=True, omega=False)).double()
    assert float((w * drawn * inside).mean()) == pytest.approx(0.4, rel=0.02)  # int over 0.1..0.9 of tau


def test_times_are_coupled_unless_switched_off(student):
    coupled = paper.noisy_students(student, 16, L, Parts(), rng())
    assert torch.equal(coupled["t"], coupled["tau"])
    free = paper.noisy_students(student, 16, L, Parts(coupled=False), rng())
    assert torch.equal(free["tau"], coupled["tau"]) and not torch.equal(free["t"], free["tau"])
    one = paper.noisy_students(student, 16, L, Parts(decomposed=False), rng())
    assert (one["z"] == V).all() and (one["x"] < V).all()


class Fixed(torch.nn.Module):
    def __init__(self, odds):
        super().__init__()
        self.odds = odds

    def forward(self, z):
        return self.odds.expand(z.shape)


def test_the_reward_is_a_clipped_mean_over_masks():
    z = torch.tensor([[V, 0, V], [V, 1, 1], [0, 0, 0]])
    assert paper.reward(Fixed(torch.tensor([1.0, 99.0, 3.0])), z, V, Parts()).tolist() == [2, 1, 0]  # a sum: 4, 1
    assert paper.reward(Fixed(torch.tensor([50.0, 0, -50.0])), z, V, Parts()).tolist() == [0, 8, 0]  # clipped first
    everywhere = paper.reward(Fixed(torch.tensor([1.0, 2.0, 3.0])), z, V, Parts(positions="all"))
    assert everywhere.tolist() == [2, 2, 2]


def test_grouped_rewards_are_centred_scaled_clipped_and_survive_agreement():
    r = torch.tensor([1.0, 2, 3, 4, 7, 7, 7, 7, 0, 0, 0, 100])
    a = paper.advantage(r, Parts(group=4)).view(3, 4)
    assert a.sum(1).abs().max() < 1e-5 and a[0, 3] == pytest.approx(1.5 / (1.2909944 + 1e-2), rel=1e-5)
    assert a[1].abs().max() == 0  # a group that agrees: no division by 0, no signal
    assert torch.equal(paper.advantage(r, Parts(group_normalise=False)), r)
    assert paper.advantage(torch.arange(24.0).pow(6), Parts(group=24)).abs().max() <= 3


def test_the_critic_learns_the_log_ratio():
    """At its optimum every masked position's log-odds are the log-ratio of the whole noised sequence."""
    net = small_masked_lm(V, L, width=16, layers=1, heads=2, seed=0)
    critic = Critic(net, 1, seed=0)
    fake = torch.tensor([0.35, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.35])
    real = torch.full((8,), 0.125)
    strings, g = exact.listing(V, L), rng()
    optimiser = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(120):
        f, r = (strings[torch.multinomial(p, 256, replacement=True, generator=g)] for p in (fake, real))
        t = torch.full((256,), 0.4)
        losses = paper.critic_loss(
            critic.train(), md.forward_noise(f, t, V, g), md.forward_noise(r, t, V, g), V, Parts()
        )
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
    q, p = (exact.noised(law.double(), 0.4, V, L) for law in (fake, real))
    states = exact.listing(V + 1, L)
    some = ((states == V).sum(1) == 1).nonzero()[:, 0]
    got = paper.reward(critic.eval(), states[some], V, Parts()).double()
    wanted = (q / p).log()[some]
    assert torch.corrcoef(torch.stack([got, wanted]))[0, 1] > 0.95 and (got - wanted).abs().mean() < 0.25
    # label smoothing keeps the log-odds of a perfect critic finite: at its optimum log(0.95 / 0.05)
    odds = torch.tensor([[2.944439]])
    z = torch.tensor([[V]])
    smooth = torch.nn.Parameter(odds)
    paper.critic_loss(Fixed(smooth[0]), z, z[:0], V, Parts(), 0.1)["loss"].backward()
    assert smooth.grad.abs().item() < 1e-4


def tiny(**changes):
    return Config(**{"steps": 6, "batch": 8, "length": L, "nfe": (1,), "log_every": 1, "critic_blocks": 1} | changes)


@pytest.fixture(scope="module")
def teacher():
    return small_masked_lm(V, L, width=16, layers=2, heads=2, seed=2).eval().requires_grad_(False)


def text(g, count):
    return torch.randint(V, (count, L), generator=g)


def test_three_networks_and_an_average(teacher):
    """The teacher stays; student, critic and average move; the critic's frozen blocks are the teacher's own."""
    before = {n: p.clone() for n, p in teacher.state_dict().items()}
    done = paper.distil(teacher, text, L, tiny(), Parts(kl=0.1), 0, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in teacher.state_dict().items())
    assert not torch.equal(done.net.head.weight, teacher.head.weight)
    assert not torch.equal(done.net.head.weight, done.fitted.model.head.weight)
    frozen, learned = done.critic.backbone.blocks[0].state_dict(), done.critic.backbone.blocks[1].state_dict()
    for i, state in ((0, frozen), (1, learned)):
        same = all(torch.equal(p, teacher.blocks[i].state_dict()[n]) for n, p in state.items())
        assert same == (i == 0)
    row = done.fitted.history[-1]
    assert {"loss", "policy", "kl", "reward", "reward_sd", "critic/loss", "critic/accuracy"} <= set(row)


def test_a_distillation_resumes_bit_equal(teacher, tmp_path):
    config = tiny(save_every=2)
    whole = paper.distil(teacher, text, L, config, Parts(), 3, Record(tmp_path / "whole"), progress=False)

    class Stop(Exception):
        pass

    def stop(step, row):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        paper.distil(teacher, text, L, config, Parts(), 3, Record(tmp_path / "cut"), progress=False, on_step=stop)
    again = paper.distil(teacher, text, L, config, Parts(), 3, Record(tmp_path / "cut"), progress=False)
    assert again.fitted.resumed_from == 4
    for a, b in ((whole.net, again.net), (whole.critic, again.critic)):
        assert all(torch.equal(p, b.state_dict()[n]) for n, p in a.state_dict().items())


def test_each_part_changes_the_training(teacher):
    seen = []
    for variant in ("didi", *CHANGES):
        config = tiny(steps=2, kl=0.1, entropy=0.01)
        done = paper.distil(teacher, text, L, config, paper.variant_parts(config, variant), 1, progress=False)
        seen.append(done.fitted.model.head.weight.detach().flatten())
    names = ["didi", *CHANGES]
    equal = {
        (a, b) for i, a in enumerate(names) for j, b in enumerate(names) if i < j and torch.equal(seen[i], seen[j])
    }
    # the paper's last row but one is the whole without its regularisation
    assert equal == {("no regularisation", "+ omega")}


def test_guidance_tilts_by_the_gradient_and_counts_its_passes(student):
    """The tilt is minus the gradient of the summed log-odds by the logits, checked by finite differences."""
    critic = Critic(student, 1, seed=1).double().eval().requires_grad_(False)
    guide = paper.Guidance(critic, 2, (1.0, 1.0))
    z = torch.tensor([[V, 0, V]])
    masked = z == V
    features = md.features_at(student, z, masked)
    tilt = guide.tilt(student, z, masked, features)
    logits = md.head_logits(student, features)

    def odds(rows):
        embeds = student.table[z].masked_scatter(masked[..., None], rows.softmax(-1) @ student.table[:V])
        return (critic(embeds=embeds) * masked).sum()

    for i, v in ((0, 0), (1, 1)):
        step = torch.zeros_like(logits)
        step[i, v] = 1e-2  # ModernBERT turns positions in float32: a smaller step measures that
        slope = (odds(logits + step) - odds(logits - step)) / 2e-2
        assert tilt[i, v].item() == pytest.approx(-slope.item(), rel=1e-2)
    clipped = replace(guide, clip=1e-4).tilt(student, z, masked, features)
    assert clipped.abs().max() <= 1e-4


def test_guidance_costs_what_it_says_and_prefers_what_the_critic_prefers(student):
    calls = {"critic": 0, "student": 0}

    class Likes(torch.nn.Module):
        """Calls a sequence the student's for each visible 1 in it."""

        def __init__(self):
            super().__init__()
            self.backbone, self.vocabulary = student, V

        def forward(self, z=None, embeds=None):
            calls["critic"] += 1
            if z is None:
                return (embeds @ student.table[1]).double()
            return 5.0 * (z == 1).double().sum(1, keepdim=True).expand(z.shape)

    inner = student.hidden

    def counted(*a, **k):
        calls["student"] += 1
        return inner(*a, **k)

    guide = paper.Guidance(Likes(), 3, (0.0, 0.0), candidates=4, rerank_from=0.4)
    student.hidden = counted
    try:
        plain = md.sample(student, 400, L, 3, rng(3))
        assert calls == {"critic": 0, "student": 3}
        calls["student"] = 0
        ranked = md.sample(student, 400, L, 3, rng(3), move=guide.mover(student))
    finally:
        del student.hidden
    assert calls == {"critic": guide.passes()["critic"], "student": 3}
    # two tilted steps would cost two backward passes: rerank_from 0.4 of 3 steps tilts steps 0 and 1
    assert guide.passes() == {"student": 3, "critic": 2, "critic backward": 2}
    again = replace(guide, rerank_from=0.0)
    assert again.passes() == {"student": 3, "critic": 8, "critic backward": 0}
    chosen = md.sample(student, 400, L, 3, rng(3), move=again.mover(student))
    assert (chosen == 1).double().mean() < (plain == 1).double().mean() - 0.02
    assert (ranked < V).all()
    # h ramps over the tilted steps
    ramp = paper.Guidance(Likes(), 8, (30.0, 40.0))
    assert [ramp.strength(i) for i in range(4)] == pytest.approx([30, 30 + 10 / 3, 30 + 20 / 3, 40])
    assert paper.Guidance(Likes(), 8, (30.0, 40.0)).passes() == {"student": 8, "critic": 16, "critic backward": 4}


def test_sdtt_targets_are_the_teachers_two_steps(student):
    """The target of a position is what the teacher said before it was revealed."""
    other = rough(4)
    x, t = torch.tensor([[0, 1, 0]]).repeat(256, 1), torch.full((256,), 0.9)
    same = baseline.sdtt_loss(student, student, x, t, 1e-6, rng(), "forward")["loss"]
    assert same.item() == pytest.approx(0, abs=1e-6)  # a step of no length: the student's own prediction
    far = baseline.sdtt_loss(other, student, x, t, 0.9, rng(), "forward")["loss"]
    assert far > 0.01
    done = baseline.sdtt(small_masked_lm(V, L, width=16, layers=1, heads=2).eval(), text, L,
                      tiny(sdtt_steps=4, sdtt_rounds=2, sdtt_from=4), 0, progress=False)  # fmt: skip
    assert not done.training


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nfe": [0, 4]}, "nfe: from 1 to the length 16, got"), ({"nfe": [64]}, "nfe: from 1 to the length 16"),
        ({"temperatures": [1.0, -0.5]}, "temperatures: each above 0"), ({"prompt": "  "}, "prompt: some text"),
        ({"temperatures": [0.5, 0.7]}, "1 must be among them"),
        ({"batch": 30}, "a multiple of the group 64, got 30"), ({"packages": []}, "at least 1 item"),
        ({"packages": ["pandas"]}, None), ({"vocabulary": 256}, None), ({"model": "a/b"}, "needs data, tokenizer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_trains(changes, told):
    with pytest.raises(WorkbenchError, match=told or ".") as caught:
        config = override(paper.PRESETS["quick"], changes)
        experiments.load_task(config)
    assert "\n" not in str(caught.value)
    if "vocabulary" in changes:
        assert "was made for 384 tokens and a mask, the tokenizer here has 256" in str(caught.value)


def test_a_reward_of_the_wrong_sign_flips_the_verdict():
    """One teacher, five students a sign, judged by the claim's own rule and margin; batches large for little noise."""
    config = Config(exact_teacher_steps=200, exact_batch=640, critic_warmup=30)
    world, own = listed.letter_world(length=4), config.exact()
    net = listed.train_teacher(config, 110)
    there = listed.measure(net, config, own.parts())
    claim = next(c for c in paper.CLAIMS if c.id == "listed_kl")
    verdicts = {}
    for sign, steps in ((1, 70), (-1, 10)):
        records = []
        for seed in range(110, 115):
            done = paper.distil(
                net,
                world.draw,
                4,
                replace(own, steps=steps, lr=7e-4),
                replace(own.parts(), sign=sign),
                seed,
                progress=False,
            )
            values = {"teacher": there, "didi": listed.measure(done.net, config, own.parts())}
            value = experiments.claim_values({"listed": values}, config)["listed_kl"]
            records.append({"kind": "result", "measure": "listed_kl", "value": value, "seed": seed})
        verdicts[sign] = judge(claim, records)
    assert verdicts[1].verdict == "holds", verdicts[1]
    assert verdicts[-1].verdict == "does not hold", verdicts[-1]
