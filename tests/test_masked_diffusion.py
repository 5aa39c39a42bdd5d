"""Masked diffusion: draws, jumps and bounds against exact enumeration; the BPE text; what generation measures see."""

import itertools
import math

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from workbench.data.bpe import bpe_text, train_bpe
from workbench.errors import WorkbenchError
from workbench.evaluation import enumeration as exact
from workbench.evaluation.generation import at_entropy, copied, distinct, judge_loss, pooled_entropy, sample_entropy
from workbench.kernels.head_sampling import sample_head
from workbench.losses.masked_diffusion import divergence, elbo, mdlm_loss, spread_times, token_losses
from workbench.models import masked_diffusion as md
from workbench.models.masked_lm import Critic, load_masked_lm, save_masked_lm, small_masked_lm

V, L = 3, 4


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def net():
    net = small_masked_lm(V, L, width=16, layers=1, heads=2, seed=3).double().eval()
    for p in net.parameters():  # far from uniform, so that a mistake shows
        p.data.add_(0.3 * torch.randn(p.shape, generator=rng(p.numel()), dtype=p.dtype))
    return net.requires_grad_(False)


def chi_square(observed, expected):
    """Statistic over its degrees of freedom; near 1 when the draws follow `expected`."""
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return float(((observed - expected)[keep] ** 2 / expected[keep]).sum() / (keep.sum() - 1))


def test_head_draws_follow_the_softmax_and_the_temperature():
    g = rng()
    features, weight, bias = torch.randn(1, 5, generator=g), torch.randn(7, 5, generator=g), torch.randn(7, generator=g)
    tilt = torch.randn(1, 7, generator=g)
    for temperature, extra in ((1.0, None), (0.5, None), (1.0, tilt)):
        logits = features @ weight.T + bias + (0 if extra is None else extra)
        wanted = (logits[0].double() / temperature).softmax(-1) * 40_000
        rows = None if extra is None else extra.expand(40_000, -1)
        got = sample_head(
            features.expand(40_000, -1), weight, bias, rng(1), temperature=temperature, tilt=rows, chunk=999
        )
        assert chi_square(got.bincount(minlength=7).double(), wanted) < 3
    with pytest.raises(WorkbenchError, match="temperature is above 0, got 0"):
        sample_head(features, weight, bias, rng(), temperature=0.0)


def test_a_token_of_no_probability_is_never_drawn():
    weight = torch.tensor([[0.0], [-1e9], [0.0], [-1e9]])
    drawn = sample_head(torch.ones(5000, 1), weight, None, rng())
    assert set(drawn.tolist()) == {0, 2}
    assert sample_head(torch.ones(0, 1), weight, None, rng()).shape == (0,)


def test_forward_noise_masks_each_position_with_its_share():
    x = torch.zeros(20_000, 2, dtype=torch.int64)
    z = md.forward_noise(x, torch.tensor([0.3, 0.8]).repeat(10_000), V, rng())
    share = (z == V).double().view(10_000, 2, 2).mean((0, 2))
    assert share.tolist() == pytest.approx([0.3 * 0.999, 0.8 * 0.999], abs=0.01)
    assert set(z.unique().tolist()) == {0, V}


def test_reveal_probability_is_the_posteriors():
    t, s = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    a_t, a_s = md.alpha(t), md.alpha(s)
    assert (a_s - a_t) / (1 - a_t) == pytest.approx(float((t - s) / t))
    h = 1e-6
    slope = (md.alpha(t + h) - md.alpha(t - h)) / (2 * h)
    assert -slope / (1 - a_t) == pytest.approx(float(md.weight(t)))


def test_a_jump_copies_what_is_visible_and_ends_clean(net):
    z = torch.tensor([[0, V, 2, V]]).repeat(50, 1)
    half = md.jump(net, z, torch.full((50,), 0.8), torch.full((50,), 0.4), rng())
    assert (half[:, 0] == 0).all() and (half[:, 2] == 2).all() and 0 < (half == V).sum() < 100
    assert (md.jump(net, z, torch.full((50,), 0.8), torch.zeros(50), rng()) < V).all()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_has_the_law_that_enumeration_gives(net, steps):
    law = exact.step_law(exact.token_table(net, L), steps)
    assert law.sum() == pytest.approx(1)
    drawn = md.sample(net, 30_000, L, steps, rng(steps))
    counts = exact.index_of(drawn, V).bincount(minlength=V**L).double()
    assert chi_square(counts, law * 30_000) < 1.6
    if steps == 1:  # one jump is a product of its positions
        p = exact.token_table(net, L)[-1]
        strings = exact.listing(V, L)
        assert torch.allclose(law, torch.stack([p[i, strings[:, i]] for i in range(L)]).prod(0))


def test_a_jump_matrix_composes_where_the_network_does_not_matter():
    """With one symbol only, what is revealed is known: two jumps are one, and noise has the closed form."""
    table = torch.ones(2**2, 2, 1, dtype=torch.float64)
    two = exact.jump_matrix(table, 1.0, 0.5) @ exact.jump_matrix(table, 0.5, 0.2)
    assert torch.allclose(two, exact.jump_matrix(table, 1.0, 0.2))
    z = exact.noised(torch.ones(1, dtype=torch.float64), 0.5, 1, 2)
    a = 1 - 0.999 * 0.5
    assert z.tolist() == pytest.approx([a * a, a * (1 - a), (1 - a) * a, (1 - a) ** 2])


def brute_bound(net, x):
    """The bound from its integral: every set of masks, its Beta integral over t written out."""
    total = 0.0
    for masked in itertools.product([False, True], repeat=L):
        k = sum(masked)
        if k:
            loss = token_losses(net, x[None], torch.tensor([masked])).sum()
            # int t^k (1 - t)^(L - k) / t dt
            total += float(loss) * math.factorial(k - 1) * math.factorial(L - k) / math.factorial(L)
    return total / L


def test_the_bound_is_its_integral_and_bounds_the_likelihood(net):
    x = torch.tensor([0, 2, 1, 1])
    wanted = brute_bound(net, x)
    got = elbo(net, x.repeat(20_000, 1), rng())
    assert got.mean().item() == pytest.approx(wanted, abs=4 * float(got.std()) / 20_000**0.5)
    weighted = [float(mdlm_loss(net, x.repeat(4000, 1), spread_times(4000, rng(i)), rng(i + 50))) for i in range(20)]
    spread = torch.tensor(weighted).std().item() / 20**0.5
    assert sum(weighted) / 20 == pytest.approx(wanted, abs=5 * spread + 2e-3 * wanted)
    # many small steps: the sampler's own likelihood of x is at least what the bound promises
    law = exact.step_law(exact.token_table(net, L), 16)
    assert -law[exact.index_of(x[None], V)].log().item() / L < wanted


def test_losses_are_counted_at_masked_positions_alone(net):
    x = torch.tensor([[0, 1, 2, 0]])
    losses = token_losses(net, x, torch.tensor([[True, False, False, True]]))
    table = exact.token_table(net, L)[exact.index_of(torch.tensor([[V, 1, 2, V]]), V + 1)][0]
    assert losses[0].tolist() == pytest.approx([-table[0, 0].log().item(), 0, 0, -table[3, 0].log().item()])


def test_the_mask_is_never_predicted(net):
    with torch.no_grad():
        net.head.bias[V] += 1e4
        before = exact.token_table(net, L)
        net.head.bias[V] -= 1e4
    assert torch.allclose(before, exact.token_table(net, L)) and torch.allclose(before.sum(-1), torch.ones(()).double())
    assert (md.sample(net, 100, L, 4, rng()) < V).all()


def test_equal_rows_are_computed_once_and_alike(net):
    rows = torch.full((3, L), V)
    at = torch.ones(3, L, dtype=torch.bool)
    one = md.logits_at(net, rows[:1], at[:1])
    assert torch.allclose(md.logits_at(net, rows, at), one.repeat(3, 1))


def test_divergences_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    forward = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    reverse = (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2
    assert divergence(p.log(), q.log(), "forward").item() == pytest.approx(forward, rel=1e-5)
    assert divergence(p.log(), q.log(), "reverse").item() == pytest.approx(reverse, rel=1e-5)
    assert divergence(p.log(), q.log(), "jeffreys").item() == pytest.approx((forward + reverse) / 2, rel=1e-5)


def test_bad_sampling_input_is_one_line(net):
    cases = [
        ({"steps": 0}, "from 1 to the length 4, got 0"), ({"steps": 5}, "from 1 to the length 4, got 5"),
        ({"temperature": -1.0}, "above 0, got -1"), ({"prompt": []}, "1 to 3 tokens, got 0"),
        ({"prompt": [7]}, "outside the vocabulary of 3"),
    ]  # fmt: skip
    for wrong, told in cases:
        with pytest.raises(WorkbenchError, match=told):
            md.sample(net, 2, L, **{"steps": 2, "generator": rng(), **wrong})


def test_a_prompt_stays_and_steps_reveal_more_and_more(net):
    film = []
    out = md.sample(net, 200, L, 4, rng(), prompt=[2], on_step=lambda i, z: film.append((z == V).sum().item()))
    assert (out[:, 0] == 2).all() and len(film) == 4 and film == sorted(film, reverse=True) and film[-1] == 0
    assert torch.equal(md.sample(net, 50, L, 3, rng(9)), md.sample(net, 50, L, 3, rng(9)))
    a, b = md.sample(net, 50, L, 3, rng(9)), md.sample(net, 50, L, 3, rng(10))
    assert not torch.equal(a, b)


def test_a_saved_network_opens_without_the_workbench(tmp_path):
    tokenizer = train_bpe(["a plain sentence about plain things, plainly said"] * 3, 100)
    net = small_masked_lm(100, 8, width=16, layers=2, heads=2, seed=1).eval()
    save_masked_lm(net, tokenizer, tmp_path)
    there, words = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert words.mask_token_id == net.vocabulary == 100 and len(words) == 101
    z = torch.tensor([[5, 100, 7, 100, 100, 9, 11, 100]])
    assert torch.equal(there.eval()(input_ids=z).logits[..., :100], md.head_logits(net, net.features(net.hidden(z))))
    assert torch.equal(load_masked_lm(str(tmp_path)).head.weight, net.head.weight)
    with pytest.raises(WorkbenchError, match="made for 100 tokens and a mask, the tokenizer here has 384"):
        load_masked_lm(str(tmp_path), vocabulary=384)


def test_every_embedding_gets_a_gradient():
    """No token is a padding token: transformers would never train its row."""
    net = small_masked_lm(5, 6, width=16, layers=1, heads=2)
    net.features(net.hidden(torch.arange(6)[None])).square().sum().backward()
    assert (net.table.grad.abs().sum(1) > 0).all()


def test_position_matters():
    net = small_masked_lm(5, 32, width=16, layers=1, heads=2).eval()
    z = torch.full((1, 32), 5)
    z[0, 3] = 1
    out = net.features(net.hidden(z))[0]
    assert (out[2] - out[30]).abs().max() > 1e-3


def test_the_critic_learns_its_last_blocks_and_head_only():
    net = small_masked_lm(V, L, width=16, layers=3, heads=2)
    critic = Critic(net, 1, seed=4)
    total, learns = critic.parameter_count()
    block = sum(p.numel() for p in net.blocks[0].parameters())
    last = sum(p.numel() for p in net.blocks[2].parameters())
    assert learns == last + 16 * 16 + 16 + 16 + 1 and last >= block and total > learns
    assert torch.equal(critic.last.weight, Critic(net, 1, seed=4).last.weight)
    for _ in range(30):
        critic.train()(torch.zeros(1, L, dtype=torch.int64))
    norms = [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (critic.first, critic.last)]
    assert norms == pytest.approx([1, 1], abs=1e-2)
    with pytest.raises(WorkbenchError, match="0 to 3 blocks, got 4"):
        Critic(net, 4)
    z = torch.tensor([[0, 1, 2, V]])
    assert torch.allclose(critic.eval()(z), critic(embeds=net.table[z]))


def test_the_text_is_cut_without_overlap_and_comes_back_whole():
    text = bpe_text(("scikit-learn",), 300)
    assert set(text.parts) == {"teacher", "judge", "tune", "report"} and text.vocabulary == 300
    assert text.tokenizer.mask_token_id == 300 and all(int(t.max()) < 300 for t in text.parts.values())
    lines = {part: set(text.tokenizer.decode(t).split("\n")) for part, t in text.parts.items()}
    for a, b in itertools.combinations(lines.values(), 2):
        assert not a & b
    sentence = "The estimator (see [1]) is fitted; it's 3 times faster!"
    assert text.tokenizer.decode(text.tokenizer(sentence)["input_ids"]) == sentence
    assert len(text.parts["judge"]) == pytest.approx(len(text.parts["teacher"]), rel=0.05)
    drawn = text.windows("teacher", 16, 8, rng())
    assert drawn.shape == (8, 16) and torch.equal(drawn, text.windows("teacher", 16, 8, rng()))
    assert bpe_text.__wrapped__(("scikit-learn",), 300).provenance == text.provenance


def test_a_tokenizer_without_text_is_refused_in_one_line():
    with pytest.raises(WorkbenchError, match="the data set is empty"):
        train_bpe(["", ""], 200)
    with pytest.raises(WorkbenchError, match="cannot hold the alphabet"):
        train_bpe(["text"], 50)
    with pytest.raises(WorkbenchError, match="lower the vocabulary"):
        train_bpe(["text"], 500)


class Bigram(torch.nn.Module):
    """A judge whose loss is known: the next token is the last one plus 1 with probability 0.9."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        p = torch.full((*tokens.shape, 10), 0.1 / 9)
        return p.scatter(2, ((tokens + 1) % 10)[..., None], 0.9).log() + self.anchor


def test_generation_measures_by_hand():
    good, bad = torch.arange(6)[None].repeat(4, 1), torch.tensor([[0, 0, 0, 0, 0, 0]]).repeat(4, 1)
    assert judge_loss(Bigram(), good) == pytest.approx(-math.log(0.9), rel=1e-5)
    assert judge_loss(Bigram(), bad, batch=3) == pytest.approx(-math.log(0.1 / 9), rel=1e-5)
    assert sample_entropy(good) == pytest.approx(math.log(6)) and sample_entropy(bad) == 0
    # four equal sequences: varied inside, yet one text only; the paper's entropy cannot see it, these two can
    assert distinct(good, 2) == 5 / 20 and pooled_entropy(good, 2) == pytest.approx(math.log(5))
    assert copied(good, torch.arange(10), 3) == 1 and copied(bad, torch.arange(10), 3) == 0


def test_the_loss_at_an_entropy_is_read_off_the_frontier():
    frontier = [(2.0, 1.0), (1.0, 0.5), (3.0, 1.5)]
    assert at_entropy(frontier, 1.5) == pytest.approx(0.75) and at_entropy(frontier, 4.0) == pytest.approx(2.0)
    # two neighbours whose order is noise alone do not turn the line over
    noisy = [(1.0, 0.5), (2.0, 1.0), (2.99, 1.6), (3.01, 1.4)]
    assert at_entropy(noisy, 3.5) == pytest.approx(1.75, abs=0.05)
