"""SIGN's parts against closed forms: exact scores, the ODE, DMD's gradient, gradient routing, sample distances."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from scipy.integrate import quad
from scipy.stats import entropy
from torch import nn

from workbench.data import corruptions, digits
from workbench.data.mixture import GaussianMixture, ring
from workbench.errors import WorkbenchError
from workbench.evaluation import samples as metrics
from workbench.losses import idempotent as ign
from workbench.losses import score_distillation as sd
from workbench.models import edm
from workbench.models.idempotent import Idempotent, from_denoiser, frozen, inpaint, reapply, renoise


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_mixtures_denoiser_is_the_posterior_mean():
    """Against brute-force quadrature in one dimension, and against autograd of the log density (Tweedie)."""
    mixture = GaussianMixture(torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64), 0.3)
    y, sigma = 0.7, 0.8

    def joint(x):
        prior = sum(math.exp(-((x - m) ** 2) / (2 * 0.09)) for m in (-1.0, 0.5, 2.0))
        return prior * math.exp(-((y - x) ** 2) / (2 * sigma**2))

    wanted = quad(lambda x: x * joint(x), -8, 8)[0] / quad(joint, -8, 8)[0]
    at, level = torch.tensor([[y]], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)
    assert mixture(at, level).item() == pytest.approx(wanted, abs=1e-9)
    points = torch.randn(20, 2, generator=g(), dtype=torch.float64).requires_grad_(True)
    plane = GaussianMixture(ring().means.double(), 0.1)
    levels = torch.rand(20, generator=g(1), dtype=torch.float64) + 0.1
    score = torch.autograd.grad(plane.log_prob(points, levels).sum(), points)[0]
    torch.testing.assert_close((plane(points, levels) - points) / levels[:, None] ** 2, score)
    total = quad(lambda x: mixture.log_prob(torch.tensor([[x]]).double(), level).exp().item(), -12, 12)[0]
    assert total == pytest.approx(1, abs=1e-7)


def test_the_flow_carries_noise_to_the_mixture():
    mixture = ring()
    grid = edm.karras_sigmas(18, 0.02, 5.0)
    x = edm.ode_sample(mixture, 5 * torch.randn(2000, 2, generator=g()), grid)
    real = mixture.draw(g(1), 2000)
    floor = metrics.energy_distance(mixture.draw(g(2), 2000), real)
    assert metrics.energy_distance(x, real) < 0.02 + abs(floor)
    assert metrics.modes(x, mixture.means, mixture.sd)[0] == 8
    # Heun's error falls with the square of the step, Euler's with the step: against a fine reference on a smooth flow
    one = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), 1.0)
    z = torch.randn(4, 2, generator=g(), dtype=torch.float64)
    start, end = torch.full((4,), 3.0).double(), torch.full((4,), 0.5).double()
    exact = z * math.sqrt((1 + 0.25) / (1 + 9))  # the flow of one Gaussian only rescales
    for heun, order in ((False, 1), (True, 2)):
        errors = []
        for n in (16, 32):
            x, steps = z, torch.linspace(3.0, 0.5, n + 1, dtype=torch.float64)
            for a, b in zip(steps[:-1], steps[1:], strict=True):
                x = edm.ode_step(one, x, a.expand(4), b.expand(4), heun=heun)
            errors.append((x - exact).abs().max().item())
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
    assert torch.allclose(edm.ode_step(one, z, start, torch.zeros(4).double()), one(z, start))  # to 0: the denoiser
    mixed = edm.ode_step(one, z, start, torch.tensor([0.5, 0.0, 0.5, 0.0]).double())
    assert torch.allclose(mixed[1::2], one(z, start)[1::2])
    assert torch.allclose(mixed[::2], edm.ode_step(one, z, start, end)[::2])


def test_the_grid_and_its_euler_steps_are_diffusers():
    scheduler = EDMEulerScheduler(sigma_min=0.02, sigma_max=5.0, sigma_data=1.0)
    scheduler.set_timesteps(6)
    grid = edm.karras_sigmas(6, 0.02, 5.0)
    torch.testing.assert_close(grid, scheduler.sigmas, rtol=1e-4, atol=1e-6)
    calls = []
    edm.ode_sample(lambda x, s: calls.append(1) or 0 * x, torch.ones(2, 2), grid)
    assert len(calls) == edm.evaluations(6) == 11
    assert (ring(crowding=1.4).means.norm(dim=1) - 1.5).abs().max() < 1e-6
    with pytest.raises(WorkbenchError, match="1 step or more and 0 < low < high"):
        edm.karras_sigmas(0, 0.02, 5.0)
    with pytest.raises(WorkbenchError, match="0 < low < high"):
        edm.karras_sigmas(4, 5.0, -1.0)


def test_a_vp_network_is_read_as_the_same_denoiser():
    """With the noise that the exact score implies, the wrapped network gives the exact posterior mean."""
    abar = torch.cos(torch.linspace(0.01, 1.55, 1000)) ** 2
    mixture = ring()
    sigmas = ((1 - abar) / abar).sqrt()

    class Noise(nn.Module):
        def forward(self, u, t, return_dict=False):
            assert torch.allclose(t, torch.tensor([300.0, 700.0]), atol=1e-2)
            sigma = sigmas[[300, 700]]
            x = u * (1 + sigma[:, None] ** 2).sqrt()  # what a VP network sees is scaled by sqrt(abar)
            return ((x - mixture(x, sigma)) / sigma[:, None],)

    denoiser = edm.Denoiser(Noise(), 0.5, kind="vp", alphas_cumprod=abar)
    y, level = torch.randn(2, 2, generator=g()), sigmas[[300, 700]]
    torch.testing.assert_close(denoiser(y, level), mixture(y, level), rtol=1e-4, atol=1e-5)
    with pytest.raises(WorkbenchError, match="needs the skip"):
        from_denoiser(denoiser, 1.0)
    with pytest.raises(WorkbenchError, match="needs the schedule"):
        edm.Denoiser(Noise(), 0.5, kind="vp")


def test_edm_preconditioning_is_karras_table_1():
    c_skip, c_out, c_in, _ = edm.Denoiser(nn.Identity(), 0.5).coefficients(torch.tensor([0.5, 2.0]))
    assert c_skip.tolist() == pytest.approx([0.5, 0.25 / 4.25])
    assert c_out.tolist() == pytest.approx([0.25 / math.sqrt(0.5), 1.0 / math.sqrt(4.25)])
    assert c_in.tolist() == pytest.approx([1 / math.sqrt(0.5), 1 / math.sqrt(4.25)])


def test_dmds_gradient_is_that_of_the_reverse_kl():
    """A Gaussian generator m + a z against a Gaussian, both scores exact: KL(N(m, a^2 + s^2) || N(mu, v^2 + s^2))."""
    m, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.7))
    mu, v, sigma = -0.5, 1.2, 0.6
    p, q = a**2 + sigma**2, v**2 + sigma**2
    (0.5 * (torch.log(q / p) + (p + (m - mu) ** 2) / q - 1)).backward()
    wanted = torch.stack([m.grad, a.grad]).clone()
    m.grad = a.grad = None
    n = 400_000
    z = torch.randn(n, 1, generator=g(), dtype=torch.float64)
    fz = m + a * z
    fake = GaussianMixture(m.detach().view(1, 1), a.item())
    real = GaussianMixture(torch.tensor([[mu]], dtype=torch.float64), v)
    level = torch.full((n,), sigma, dtype=torch.float64)
    noise = torch.randn(n, 1, generator=g(1), dtype=torch.float64)
    step = sd.score_difference(fz, level, noise, fake, real, normalise=False)
    assert not step.requires_grad
    sd.distribution_matching(fz, step / sigma**2).backward()
    got = torch.stack([m.grad, a.grad])
    # the loss is half a mean over elements in float32, so that its gradient is the expectation itself
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=2e-3)


def test_the_normalised_direction_is_dmds():
    fz, level, noise = (
        torch.randn(3, 4, generator=g()),
        torch.tensor([0.5, 1.0, 2.0]),
        torch.randn(3, 4, generator=g(1)),
    )
    fake, real = (lambda x, s: 0.5 * x), (lambda x, s: 0.1 * x)
    xt = fz + level[:, None] * noise
    wanted = 0.4 * xt / (fz - 0.1 * xt).abs().mean(1, keepdim=True)
    torch.testing.assert_close(sd.score_difference(fz, level, noise, fake, real), wanted)
    broken = sd.score_difference(fz, level, noise, lambda x, s: x * float("nan"), real)
    assert broken.eq(0).all()  # one bad row must not end the run


class Affine(nn.Module):
    """f(x) = w x + b: every term's gradient can be written down."""

    def __init__(self, w=0.8, b=0.1):
        super().__init__()
        self.w, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (w, b))

    def forward(self, x):
        return self.w * x + self.b


def test_each_term_sends_its_gradient_where_the_paper_says():
    f, z = Affine(), torch.randn(50, 3, generator=g(), dtype=torch.float64)
    # L_idem: by hand, with the outer weights as constants W, B and the inner ones free
    fz = f(z)
    ign.idempotence(frozen(f, fz), fz).backward()
    w, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.1))
    inner = w * z + b
    (0.8 * inner + 0.1 - inner).square().mean().backward()
    assert f.w.grad.item() == pytest.approx(w.grad.item(), rel=1e-5)  # distances are taken in float32
    assert f.b.grad.item() == pytest.approx(b.grad.item(), rel=1e-5)
    # L_tight: the inner f constant, the outer free, and the sign turned round
    f.zero_grad()
    fz = f(z).detach()
    ign.tightness(f(fz), fz).backward()
    w, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.1))
    inner = 0.8 * z + 0.1
    (-(w * inner + b - inner).square().mean()).backward()
    assert f.w.grad.item() == pytest.approx(w.grad.item(), rel=1e-5)
    # frozen: nothing reaches the weights, whatever the input carries
    f.zero_grad()
    frozen(f, z.requires_grad_(True)).sum().backward()
    assert f.w.grad is None or f.w.grad == 0
    assert z.grad.eq(0.8).all()


def test_the_clamp_bounds_tightness_and_without_it_nothing_does():
    fz, rec = torch.zeros(4, 2), torch.tensor([0.1, 0.2, 0.3, 0.4])
    for far in (1.0, 10.0, 1e3):
        bare = ign.tightness(torch.full((4, 2), far), fz)
        clamped = ign.tightness(torch.full((4, 2), far), fz, bound=rec, clamp=1.5)
        assert bare.item() == pytest.approx(-(far**2)) and clamped.item() >= -1.5 * 0.25 - 1e-6
    by_hand = (1.5 * rec * torch.tanh(-4.0 / (1.5 * rec))).mean()
    assert ign.tightness(torch.full((4, 2), 2.0), fz, bound=rec, clamp=1.5).item() == pytest.approx(by_hand.item())


def test_distances_against_their_definitions():
    a, b = torch.randn(5, 2, 3, generator=g()), torch.randn(5, 2, 3, generator=g(1))
    for norm, power in (("l1", 1), ("l2", 2)):
        wanted = [np.mean(np.abs((x - y).numpy()) ** power) for x, y in zip(a, b, strict=True)]
        assert ign.distance(a, b, norm).tolist() == pytest.approx(wanted, rel=1e-5)


def test_frechet_of_gaussians_is_its_closed_form():
    x = torch.randn(60_000, 2, generator=g())
    y = torch.tensor([1.0, -2.0]) + torch.randn(60_000, 2, generator=g(1)) * torch.tensor([2.0, 0.5])
    assert metrics.frechet(x, y) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (1 - 0.5) ** 2, rel=0.02)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(x, x * float("nan")) == math.inf
    with pytest.raises(WorkbenchError, match="two samples"):
        metrics.frechet(x[:1], x)


def test_precision_recall_energy_copies_and_entropy():
    wide, narrow = torch.rand(400, 2, generator=g()), 0.3 * torch.rand(400, 2, generator=g(1))
    precision, recall = metrics.precision_recall(wide, narrow)
    assert precision > 0.9 and recall < 0.3  # good samples of a small part
    precision, recall = metrics.precision_recall(narrow, wide)
    assert precision < 0.3 and recall > 0.9
    a, b = torch.randn(30, 2, generator=g()), torch.randn(20, 2, generator=g(1)) + 1
    mean = lambda p, q, skip: np.mean([math.dist(x, y) for i, x in enumerate(p) for j, y in enumerate(q)  # noqa: E731
                                       if not (skip and i == j)])  # fmt: skip
    wanted = 2 * mean(a, b, False) - mean(a, a, True) - mean(b, b, True)
    assert metrics.energy_distance(a, b) == pytest.approx(wanted, abs=1e-4)
    train = torch.zeros(3, 1, 2, 2)
    train[1] = 1
    assert metrics.nearest(train[1:2] + 0.5, train).item() == pytest.approx(0.5)
    logits = torch.eye(4)[[0, 0, 0, 1]]
    assert metrics.class_entropy(logits) == pytest.approx(entropy([3, 1]))
    assert metrics.modes(ring().means[:3].repeat(10, 1), ring().means, 0.1) == (3, 1.0)


def test_idempotence_alone_says_nothing():
    """Trap: a constant and the identity are both idempotent; coverage and distance tell them from a generator."""
    mixture, z = ring(), 5 * torch.randn(500, 2, generator=g())
    real = mixture.draw(g(1), 500)
    for f in (lambda x: torch.full_like(x, 1.5), lambda x: x):
        fz = f(z)
        assert metrics.idempotence_error(fz, f(fz)) == 0
        assert metrics.energy_distance(fz, real) > 0.5


def student(normalise=True, skip=False):
    torch.manual_seed(0)
    denoiser = edm.Denoiser(edm.PlaneNet(width=16, layers=1), 1.0)
    return from_denoiser(denoiser, 1.0, normalise=normalise, skip=skip), denoiser


def test_f_takes_clean_images_and_pure_noise_at_a_scale_its_network_knows():
    """Trap: at one constant level noise of 80 would reach the network 50 times larger than anything it has seen."""
    seen = []
    for normalise, largest in ((True, 1.5), (False, 100.0)):
        f, _ = student(normalise)
        f.net.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].abs().max().item()))
        seen.clear()
        f(torch.randn(64, 2, generator=g()))
        f(80 * torch.randn(64, 2, generator=g()))
        assert (max(seen) < 1.5) == normalise and max(seen) < 3 * largest, seen


def test_with_its_skip_f_begins_as_a_denoising_step():
    """Trap: at a constant level f(z) is already one step of the teacher, so its quality before training counts."""
    f, denoiser = student(normalise=False, skip=True)
    x = torch.randn(8, 2, generator=g())
    torch.testing.assert_close(f(x), denoiser(x, torch.ones(8)))


def test_both_kinds_of_several_steps():
    f = lambda x: 0.5 * x  # noqa: E731
    x = torch.ones(2, 1, 2, 2)
    assert [float(y.mean()) for y in reapply(f, x, 3)] == [0.5, 0.25, 0.125]
    noised = renoise(f, x, [0.0, 0.0], g())
    assert all(torch.equal(a, b) for a, b in zip(noised, reapply(f, x, 3), strict=True))
    torch.testing.assert_close(renoise(f, x, [2.0], g(3))[1], f(f(x) + 2 * torch.randn(x.shape, generator=g(3))))


def test_absurd_sampling_is_one_clear_line():
    x = torch.ones(2, 1, 2, 2)
    for call in (lambda: reapply(lambda y: y, x, 0), lambda: inpaint(lambda y: y, x, x > 0, -1, g())):
        with pytest.raises(WorkbenchError, match="applied once or more"):
            call()
    with pytest.raises(WorkbenchError, match="level of 0 or more, got -1"):
        renoise(lambda y: y, x, [1.0, -1.0], g())


def test_inpainting_keeps_known_pixels():
    lost = corruptions.box_mask((1, 1, 4, 4), 0.5, 0.0, 0.5, 1.0)
    assert lost[0, 0].tolist() == [[False] * 4] * 2 + [[True] * 4] * 2
    x = torch.randn(3, 1, 4, 4, generator=g())
    for y in inpaint(lambda y: y + 5, x, lost, 3, g(1), noise=1.0):
        assert torch.equal(y[..., :2, :], x[..., :2, :])
        assert not torch.isclose(y[..., 2:, :], x[..., 2:, :]).any()


def test_corruptions_and_their_strength():
    x = torch.rand(2, 3, 8, 8, generator=g()) * 2 - 1
    for name, damage in corruptions.CORRUPTIONS.items():
        assert torch.allclose(damage(x, 0.0, g()), x), name
    assert torch.allclose(corruptions.inverted(x, 1.0, g()), -x)
    grey = corruptions.colourless(x, 1.0, g())
    assert torch.allclose(grey[:, 0], grey[:, 2]) and torch.allclose(grey[:, 0], x.mean(1))
    assert corruptions.blurred(x, 1.0, g()).std() < 0.6 * x.std()
    assert (corruptions.noisy(x, 0.6, g()) - x).std().item() == pytest.approx(0.6, rel=0.1)


def test_digits_are_split_once_and_named():
    images = digits.load()
    assert images.train.shape == (1300, 1, 8, 8) and images.classes == 10
    assert (len(images.validation), len(images.test)) == (147, 350)
    assert images.train.min() == -1 and images.train.max() == 1
    parts = [part.flatten(1) for part in (images.train, images.validation, images.test)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert torch.cdist(parts[i], parts[j]).amin() > 0  # none in both parts
    assert images.held_out("validation")[0] is images.validation and images.held_out("test")[1] is images.test_labels
    assert images.provenance.package == "scikit-learn" and len(images.provenance.sha256) == 64


def test_idempotent_is_a_function_of_one_input():
    f, _ = student()
    assert isinstance(f, Idempotent)
    with pytest.raises(TypeError):
        f(torch.zeros(1, 2), torch.ones(1))


def test_tinted_digits_tell_their_class_by_colour_and_without_it_by_shape_alone():
    plain, inked = digits.load(), digits.tinted()
    assert inked.test.shape == (350, 3, 8, 8) and inked.train.min() == -1 and inked.train.max() <= 1
    grey = corruptions.colourless(inked.test, 1.0, g())
    # one grey value for every ink: the plain digit at a third of its brightness, whatever the class
    torch.testing.assert_close((grey + 1) * 3, (plain.test + 1).expand(-1, 3, -1, -1))
    hue = torch.nn.functional.normalize((inked.test + 1).mean((2, 3)), dim=1)
    read = (hue @ torch.nn.functional.normalize(digits.INKS, dim=1).T).argmax(1)
    assert torch.equal(read, inked.test_labels)
