"""The decoder LM: equal to transformers' Llama, causal, counted as the paper's sizes, the same with a memory."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.errors import WorkbenchError
from workbench.models import transformer
from workbench.models.transformer import DecoderLM, LMConfig, from_llama, llama_config, parameter_counts, to_llama
from workbench.papers.infinite_compute_settings import SIZES

GROUPED = LMConfig(vocabulary=50, context=80, width=32, hidden=56, heads=4, kv_heads=2, layers=3)


def decoder(config: LMConfig = GROUPED, seed: int = 0) -> DecoderLM:
    model = DecoderLM(config).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # gains of 1 and small logits would hide a misplaced norm
        for i, p in enumerate(model.parameters()):
            p.mul_(4).add_(0.01 * i)
    return model


def tokens(config: LMConfig = GROUPED, batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(config.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [GROUPED, LMConfig(50, 80, 32, 56, 2, 2, 1)])
@pytest.mark.parametrize("length", [20, 70])  # both ways of computing attention
def test_logits_equal_llamas_both_ways(config, length):
    theirs = LlamaForCausalLM(LlamaConfig(**llama_config(config))).eval()
    ours = DecoderLM(config)
    ours.load_state_dict(from_llama(theirs.state_dict()))
    x = tokens(config, length=length)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-5)
        trained = decoder(config)
        theirs.load_state_dict(to_llama(trained))
        torch.testing.assert_close(trained(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


def test_a_llama_with_biases_is_refused():
    theirs = LlamaForCausalLM(LlamaConfig(**{**llama_config(GROUPED), "attention_bias": True}))
    with pytest.raises(WorkbenchError, match="bias has no place"):
        from_llama(theirs.state_dict())


@pytest.mark.parametrize("length", [20, 70])
def test_no_token_sees_a_later_one(length):
    model, x = decoder(), tokens(length=length)
    changed = x.clone()
    changed[:, length // 2] = (changed[:, length // 2] + 1) % GROUPED.vocabulary
    with torch.no_grad():
        a, b = model(x), model(changed)
    torch.testing.assert_close(a[:, : length // 2], b[:, : length // 2])
    assert (a[:, length // 2 :] - b[:, length // 2 :]).abs().amax((0, 2)).min() > 0


def test_initialisation_is_the_papers_and_its_seeds():
    config = LMConfig(200, 32, 64, 224, 4, 4, 2)
    model = DecoderLM(config).initialise(torch.Generator().manual_seed(3))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            assert abs(p.std().item() - 0.02) < 0.001 and abs(p.mean().item()) < 0.001, name
    again = DecoderLM(config).initialise(torch.Generator().manual_seed(3))
    other = DecoderLM(config).initialise(torch.Generator().manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.head.weight, other.head.weight)
    assert not torch.equal(model.head.weight, model.embedding.weight)  # untied


def test_loss_is_that_of_the_logits_and_recomputing_changes_no_gradient():
    model, x = decoder(), tokens(length=21)
    loss = model(x[:, :-1], x[:, 1:])
    torch.testing.assert_close(loss, F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()))
    plain = torch.autograd.grad(loss, list(model.parameters()))
    model.checkpoint_blocks = True
    again = torch.autograd.grad(model(x[:, :-1], x[:, 1:]), list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_rope_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    rows = transformer.rope(q.expand(1, 1, 30, 16), 1e4) @ transformer.rope(k.expand(1, 1, 30, 16), 1e4).mT
    for shift in (0, 3, 11):
        diagonal = rows[0, 0].diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert rows[0, 0].diagonal(3)[0] != rows[0, 0].diagonal(11)[0]


@pytest.mark.parametrize(
    "size, blocks, nominal", [("150M", 23, 150), ("300M", 103, 300), ("600M", 339, 600), ("1.4B", 906, 1400)]
)
def test_the_papers_sizes(size, blocks, nominal):
    """Millions in the blocks as the paper's shapes give them; its names count embedding and head too."""
    width, hidden, heads, kv_heads, layers = SIZES[size]
    counts = parameter_counts(LMConfig(128_256, 4096, width, hidden, heads, kv_heads, layers))
    assert abs(counts["blocks"] / 1e6 - blocks) < 1
    assert counts["embedding and head"] == 2 * 128_256 * width
    assert abs(counts["total"] / 1e6 / nominal - 1) < 0.06


def test_shapes_that_cannot_be():
    for heads, kv_heads in ((5, 5), (4, 3), (32, 32)):
        with pytest.raises(WorkbenchError, match="kv_heads"):
            LMConfig(50, 16, 32, 64, heads, kv_heads, 1)
