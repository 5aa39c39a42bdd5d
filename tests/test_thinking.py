"""Generation by embeddings on any causal LM: cached equals uncached, early stops and padding change no row, replay."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from workbench.errors import WorkbenchError
from workbench.models.thinking import Format, embedding_table, ends_with, replay, rollout
from workbench.papers.soft_tokens import log_pi, sigma_of, thinker
from workbench.papers.soft_tokens_settings import Mode

V, STOP, CLOSE = 11, 7, 8
SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
}
STOPS = {1, 4, 7, 10}  # several, so that untrained models stop here and there
FORMAT = Format(lambda tokens: tokens[:, -1] % 3 == 1, ends_with([CLOSE]), (9,), (STOP, 9))
SOFT, HARD = Mode("soft", 0.5, 0.33), Mode("hard", 1.0)


def model_of(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():  # sharp enough that chains stop at different steps
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return model


def prompts(lengths=(3, 6, 5)):
    g, width = torch.Generator().manual_seed(1), max(lengths)
    ids = torch.randint(1, 7, (len(lengths), width), generator=g)
    mask = torch.tensor([[False] * (width - n) + [True] * n for n in lengths])
    return ids, mask


def chains_of(model, mode=SOFT, *, cached=True, samples=5, seed=3, ids_mask=None, limit=6):
    ids, mask = ids_mask or prompts()
    return rollout(
        model, ids, mask, thinker(model, mode, sigma_of(model, mode.factor)), FORMAT, limit=limit, answer_limit=3,
        seed=seed, samples=samples, answer_tau=1.0, cached=cached,
    )  # fmt: skip


@pytest.mark.parametrize("mode", [SOFT, HARD, Mode("fuzzy", 1e-4, 0.33)], ids=["soft", "hard", "fuzzy"])
@pytest.mark.parametrize("name", MODELS)
def test_cached_generation_is_uncached_generation(name, mode):
    model = model_of(name)
    a, b = (chains_of(model, mode, cached=c) for c in (True, False))
    assert a.thought_mask.sum(1).unique().numel() > 1, "all chains stop at one step: nothing is tested"
    assert torch.equal(a.mask, b.mask) and torch.equal(a.stopped, b.stopped)
    used = a.thought_mask
    assert (a.thoughts - b.thoughts)[used].abs().max() < 1e-4 * a.thoughts[used].abs().max()
    assert torch.equal(a.tokens[used], b.tokens[used])
    assert torch.equal(a.answer[a.answer_mask], b.answer[b.answer_mask])


@pytest.mark.parametrize("name", MODELS)
def test_the_parallel_pass_sees_what_the_rollout_saw(name):
    """h̃ - σ eps, recovered from the generator, is the mixture that the teacher-forced pass computes."""
    from workbench.papers.soft_tokens import mixture

    model, seen = model_of(name), []
    sigma, table = sigma_of(model, 0.33), embedding_table(model).detach()

    def think(logits, generator):
        thought, token, action = thinker(model, SOFT, sigma)(logits, generator)
        seen.append(mixture(logits, table, SOFT.tau))
        return thought, token, action

    ids, mask = prompts()
    chains = rollout(model, ids, mask, think, FORMAT, limit=6, answer_limit=3, seed=3, samples=5, answer_tau=1.0)
    logits, answer_logits = replay(model, chains, continuous=True)
    used = chains.thought_mask
    gap = (mixture(logits, table, SOFT.tau) - torch.stack(seen, 1))[used].abs().max()
    assert gap < 1e-4 * table.abs().max()
    assert not chains.thoughts.requires_grad and not chains.actions.requires_grad
    assert logits.requires_grad and answer_logits.requires_grad


@pytest.mark.parametrize("mode", [SOFT, HARD], ids=["soft", "hard"])
def test_a_row_reads_what_it_would_read_alone(mode):
    """Neither other rows' lengths, nor left padding, nor slots behind an early stop change a row's log-probability."""
    model = model_of("llama").double()
    chains = chains_of(model, mode, samples=9, limit=4)
    thought, answer = log_pi(model, chains, mode, sigma_of(model, mode.factor))
    assert chains.stopped.any() and not chains.stopped.all()
    for i in range(len(chains)):
        row, own = chains.rows(i, i + 1), {}
        for field in ("prompt", "thought", "prefill", "answer"):
            keep = getattr(row, f"{field}_mask")[0]
            own[f"{field}_mask"] = torch.ones(1, int(keep.sum()), dtype=torch.bool)
            names = ("thoughts", "tokens", "actions") if field == "thought" else (field,)
            own |= {name: getattr(row, name)[:, keep] for name in names}
        alone = type(chains)(**own, stopped=row.stopped)
        a, b = log_pi(model, alone, mode, sigma_of(model, mode.factor))
        assert torch.allclose(a, thought[i], atol=1e-8) and torch.allclose(b, answer[i], atol=1e-8)


def test_stop_and_prefill_rules():
    chains = chains_of(model_of("llama"), HARD, samples=20)
    for i in range(len(chains)):
        tokens = chains.tokens[i][chains.thought_mask[i]].tolist()
        prefill = chains.prefill[i][chains.prefill_mask[i]].tolist()
        ended = tokens[-1] in STOPS
        assert not STOPS & set(tokens[:-1]) and (ended or len(tokens) == 6)
        assert prefill == ([9] if ended else [STOP, 9]) and chains.stopped[i] == ended
        answer = chains.answer[i][chains.answer_mask[i]].tolist()
        assert CLOSE not in answer[:-1] and (len(answer) == 3 or answer[-1] == CLOSE)


def test_no_temperature_and_no_noise_are_hard_tokens_exactly():
    model = model_of("qwen2")
    hard = chains_of(model, Mode("hard", 0.0), samples=1)
    for mode in (Mode("fuzzy", 1e-6, 0.0), Mode("soft", 0.0, 0.0)):
        soft = chains_of(model, mode, samples=1)
        assert torch.equal(soft.thoughts, hard.thoughts) and torch.equal(soft.tokens, hard.tokens)
    near = chains_of(model, Mode("soft", 0.5, 0.0), samples=1)
    assert not torch.equal(near.thoughts[:, 0], hard.thoughts[:, 0])


def test_a_seed_is_a_seed():
    model = model_of("llama")
    a, b, c = (chains_of(model, seed=s).thoughts[:, 0] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    g = torch.get_rng_state()
    chains_of(model, HARD)
    assert torch.equal(g, torch.get_rng_state()), "the global generator was used"


def test_bad_input_is_one_line():
    model = model_of("llama")
    with pytest.raises(WorkbenchError, match="no prompts"):
        chains_of(model, ids_mask=(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4, dtype=torch.bool)))
    with pytest.raises(WorkbenchError, match="token 40 of the tokenizer"):
        chains_of(model, ids_mask=(torch.full((1, 4), 40), torch.ones(1, 4, dtype=torch.bool)))
    with pytest.raises(WorkbenchError, match="at least 1"):
        chains_of(model, limit=0)
    with pytest.raises(WorkbenchError, match="prefill"):
        Format(ends_with([1]), ends_with([2]), (), (3,))
    with pytest.raises(WorkbenchError, match="0 or more"):
        Mode("soft", -0.5, 0.3)
    with pytest.raises(WorkbenchError, match="0 or more"):
        Mode("soft", 0.5, -0.3)
