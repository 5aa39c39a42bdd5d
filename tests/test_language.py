"""Ensembles' losses against distributions averaged by hand; soups; text that follows the models it is drawn from."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from workbench.data.text import Windows
from workbench.evaluation.language import ensemble_losses, sample_text, soup
from workbench.models.transformer import DecoderLM, LMConfig

SHAPE = LMConfig(vocabulary=11, context=8, width=16, hidden=24, heads=1, kv_heads=1, layers=1)


def members(count=3, scale=12.0):
    found = []
    for k in range(count):
        model = DecoderLM(SHAPE).initialise(torch.Generator().manual_seed(k))
        with torch.no_grad():
            model.head.weight.mul_(scale)  # far from uniform, so that the two averages differ
        found.append(model)
    return found


WINDOWS = Windows(torch.randint(11, (201,), generator=torch.Generator().manual_seed(0)), 8, 4, 0)


def by_hand(models, average):
    tokens = WINDOWS.take(range(WINDOWS.count))
    logits = torch.stack([m(tokens[:, :-1]) for m in models]).double()
    if average == "logits":
        p = logits.mean(0).softmax(-1)
    else:
        p = logits.softmax(-1).mean(0)
    return -p.gather(-1, tokens[:, 1:, None]).log().mean().item()


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_losses_are_those_of_the_first_k_members_by_hand(average):
    models = members()
    with torch.no_grad():
        expected = [by_hand(models[: k + 1], average) for k in range(3)]
    assert ensemble_losses(models, WINDOWS, average=average, batch=7) == pytest.approx(expected, abs=1e-5)


def test_logit_average_is_the_normalised_geometric_mean_and_differs_from_the_probability_mean():
    models = members()
    tokens = WINDOWS.take(range(WINDOWS.count))
    with torch.no_grad():
        logs = torch.stack([m(tokens[:, :-1]).log_softmax(-1) for m in models]).mean(0)
        geometric = F.cross_entropy(logs.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert ensemble_losses(models, WINDOWS)[-1] == pytest.approx(geometric, abs=1e-5)
    assert ensemble_losses(models, WINDOWS, average="probabilities")[-1] != pytest.approx(geometric, abs=1e-4)


def test_copies_of_one_model_gain_nothing_and_different_ones_do():
    same = members(1) * 3
    for average in ("logits", "probabilities"):
        first, *rest = ensemble_losses(same, WINDOWS, average=average)
        assert rest == pytest.approx([first, first], abs=1e-6)
    curve = ensemble_losses(members(4), WINDOWS)
    alone = [ensemble_losses([m], WINDOWS)[0] for m in members(4)]
    assert curve[-1] < sum(alone) / 4


def test_a_soup_is_the_mean_of_the_weights():
    models = members()
    mixed = soup(models)
    assert mixed.keys() == models[0].state_dict().keys()
    for name, value in mixed.items():
        torch.testing.assert_close(value, sum(m.state_dict()[name] for m in models) / 3)


class Table(nn.Module):
    """p(next | last token) given as a table (V, V)."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = nn.Parameter(probabilities.clamp(min=1e-30).log())

    def forward(self, tokens):
        return self.logits[tokens]


def test_sampled_text_follows_the_model():
    p = torch.tensor([[0.0, 0.7, 0.3], [0.5, 0.0, 0.5], [1.0, 0.0, 0.0]])
    draw = dict(sequences=400, length=40, context=1)
    text = sample_text([Table(p)], generator=torch.Generator().manual_seed(0), **draw)
    assert text.shape == (400, 40) and text.dtype == torch.int64
    pairs = torch.zeros(3, 3)
    whole = torch.cat([torch.zeros(400, 1, dtype=torch.int64), text], 1)  # the token it starts after
    pairs.index_put_((whole[:, :-1].flatten(), whole[:, 1:].flatten()), torch.tensor(1.0), accumulate=True)
    torch.testing.assert_close(pairs / pairs.sum(1, keepdim=True), p, atol=0.02, rtol=0)
    again = sample_text([Table(p)], generator=torch.Generator().manual_seed(0), **draw)
    other = sample_text([Table(p)], generator=torch.Generator().manual_seed(1), **draw)
    assert torch.equal(text, again) and not torch.equal(text, other)


def test_an_ensembles_text_is_drawn_from_its_mean_logits_not_its_mean_probabilities():
    a, b = torch.tensor([[0.98, 0.02], [0.98, 0.02]]), torch.tensor([[0.4, 0.6], [0.4, 0.6]])
    text = sample_text(
        [Table(a), Table(b)], sequences=300, length=40, context=1, generator=torch.Generator().manual_seed(0)
    )
    geometric = math.sqrt(0.02 * 0.6) / (math.sqrt(0.02 * 0.6) + math.sqrt(0.98 * 0.4))
    assert (text == 1).float().mean().item() == pytest.approx(geometric, abs=0.015)  # the probability mean is 0.31


def test_no_token_sees_further_back_than_the_context():
    class Seen(Table):
        widest = 0

        def forward(self, tokens):
            Seen.widest = max(Seen.widest, tokens.shape[1])
            return super().forward(tokens)

    sample_text([Seen(torch.ones(3, 3))], sequences=2, length=20, context=5, generator=torch.Generator())
    assert Seen.widest == 5
