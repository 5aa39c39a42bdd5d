"""Soft tokens: the estimator against finite differences, the baseline, the world, resume, a broken verdict."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from workbench.config import override
from workbench.data import chains as world
from workbench.errors import WorkbenchError
from workbench.evaluation.claims import judge
from workbench.evaluation.pass_at_k import pass_at_k, pass_curve
from workbench.lab import soft_tokens as panels
from workbench.losses.policy_gradient import advantages, gaussian_log_density, token_log_probability
from workbench.models.thinking import Format, embedding_table, ends_with, replay, rollout
from workbench.papers import soft_tokens as paper
from workbench.papers import soft_tokens_bench as bench
from workbench.papers import soft_tokens_study as studies
from workbench.papers.soft_tokens_settings import Mode
from workbench.papers.soft_tokens_tasks import check_vocabulary, save_model
from workbench.training.record import Record

SOFT = Mode("soft", 0.5, 0.33)


# --- the estimator ---------------------------------------------------------------------------------------------------


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, **changes}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=16, **shape)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=0.8)
    return model


TWO_STEPS = Format(lambda tokens: torch.zeros(len(tokens), dtype=torch.bool), ends_with([4]), (3,), (3,))


def two_steps(model, mode, sigma, samples, seed=0):
    prompt = torch.tensor([[1, 2]])
    with paper.head_inputs(model) as seen:
        return rollout(
            model, prompt, prompt > 0, paper.thinker(model, mode, sigma, seen), TWO_STEPS,
            limit=2, answer_limit=1, seed=seed, samples=samples, answer_tau=1.0,
        )  # fmt: skip


def expected_reward(model, mode, sigma, samples, seed):
    """E[R] of R = 1 for answer 0, the answer's probability taken exactly, the noise common to a seed's calls."""
    chains = two_steps(model, mode, sigma, samples, seed)
    with torch.no_grad():
        return replay(model, chains, continuous=True)[1].softmax(-1)[:, 0, 0].mean().item()


@pytest.mark.parametrize(
    ("mode", "tied"),
    [
        (SOFT, False), (SOFT, True), (Mode("soft", 0.5, 0.5, "hidden"), False),
        (Mode("soft", 0.5, 1.0, "logits"), False), (Mode("soft", 0.7, 1.0, "gumbel"), False),
    ],
    ids=["paper", "paper, tied", "hidden noise", "logit noise", "gumbel"],
)  # fmt: skip
def test_the_score_function_gradient_matches_finite_differences(mode, tied):
    """Along the gradient's own direction, as an independent sample estimates it, where the signal is largest."""
    model, n, blocks = tiny(tie_word_embeddings=tied), 8_000, 8
    sigma = paper.sigma_of(model, mode.factor).double()  # frozen, as within a step
    parameters = [p for p in model.parameters() if p.requires_grad]

    def score_gradient(seed, samples=n):
        chains = two_steps(model, mode, sigma, samples, seed=seed)
        reward = (chains.answer[:, 0] == 0).double()
        thought, answer = paper.log_pi(model, chains, mode, sigma)
        value = ((reward - reward.mean()) * (thought + answer)).mean()
        return torch.autograd.grad(value, parameters)

    direction = score_gradient(5000, 5 * n)
    length = sum(float(d.square().sum()) for d in direction) ** 0.5
    direction = [d / length for d in direction]
    slopes = torch.tensor(
        [
            sum(float((g * d).sum()) for g, d in zip(score_gradient(s), direction, strict=True))
            for s in range(1000, 1000 + blocks)
        ]
    )
    moved = []
    for sign in (1, -1):
        moved.append(copy.deepcopy(model))
        with torch.no_grad():
            for p, d in zip([p for p in moved[-1].parameters() if p.requires_grad], direction, strict=True):
                p.add_(sign * 1e-3 * d)
    truths = torch.tensor(
        [
            (expected_reward(moved[0], mode, sigma, n, s) - expected_reward(moved[1], mode, sigma, n, s)) / 2e-3
            for s in range(2000, 2000 + blocks // 2)
        ]
    )
    error = (slopes.var() / len(slopes) + truths.var() / len(truths)).sqrt()
    assert (slopes.mean() - truths.mean()).abs() < 4 * error, (slopes.mean(), truths.mean(), error)
    assert 4 * error < 0.6 * truths.mean().abs(), "the test could not see a wrong gradient"


def test_gradient_through_the_stored_noise_would_cancel_the_score():
    """The trap: with h̃ = h + σ eps differentiated too, the Gaussian term has no gradient left."""
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 4, dtype=torch.float64)
    eps = torch.randn(6, 4, dtype=torch.float64)
    h = paper.mixture(logits, table, 0.5)
    for constant in (True, False):
        thought = h + 0.3 * eps
        thought = thought.detach() if constant else thought
        term = gaussian_log_density(thought, h, 0.3).sum()
        (grad,) = torch.autograd.grad(term, logits, retain_graph=True)
        assert (grad.abs().max() > 0.1) == constant
    # and what is left is eps / σ . dh
    (by_hand,) = torch.autograd.grad((eps / 0.3 * h).sum(), logits, retain_graph=True)
    (grad,) = torch.autograd.grad(gaussian_log_density((h + 0.3 * eps).detach(), h, 0.3).sum(), logits)
    assert torch.allclose(by_hand, grad)


def test_the_log_densities_are_those_of_torch():
    x, mean = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, 0.7).log_prob(x).sum(-1)
    assert torch.allclose(gaussian_log_density(x, mean, 0.7), normal)
    gap = normal - gaussian_log_density(x, mean, 0.7, normalised=False)
    assert torch.allclose(gap, gap[0].expand(3)), "the constant depends on x"
    logits, tokens = torch.randn(3, 5), torch.tensor([0, 4, 2])
    expected = torch.distributions.Categorical(logits=logits / 0.5).log_prob(tokens)
    assert torch.allclose(token_log_probability(tokens, logits, 0.5), expected)


def test_the_leave_one_out_baseline_is_unbiased_and_the_batch_mean_is_not():
    """Exact, by enumerating every group of G = 3 samples of a three-armed policy."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    rewards, g = torch.tensor([1.0, 0.2, -0.7], dtype=torch.float64), 3
    p = logits.softmax(0)
    (truth,) = torch.autograd.grad(p @ rewards, logits, retain_graph=True)
    for baseline, scale in (("leave one out", 1.0), ("none", 1.0), ("batch mean", (g - 1) / g)):
        total, second = torch.zeros(3, dtype=torch.float64), 0.0
        for group in itertools.product(range(3), repeat=g):
            group = torch.tensor(group)
            weight = p[group].prod().item()
            a = advantages(rewards[group][None], baseline)[0]
            (grad,) = torch.autograd.grad((a * p.log()[group]).mean(), logits, retain_graph=True)
            total, second = total + weight * grad, second + weight * grad.square().sum().item()
        assert torch.allclose(total, scale * truth), baseline
    assert torch.allclose(advantages(torch.tensor([[1.0, 0.0, 0.0]])), torch.tensor([[1.0, -0.5, -0.5]]))
    with pytest.raises(WorkbenchError, match="2 samples"):
        advantages(torch.ones(3, 1))


def test_the_loss_is_a_sum_over_steps_and_dimensions_and_rows_change_nothing():
    model = tiny()
    sigma = paper.sigma_of(model, 0.33)
    chains = two_steps(model, SOFT, sigma, 6)
    weights = torch.randn(6, dtype=torch.float64)
    losses = paper.surrogate(model, chains, weights, SOFT, sigma)
    thought, answer = paper.log_pi(model, chains, SOFT, sigma)
    h = chains.thoughts  # by hand: the squared distance to the recomputed mixture, all dimensions of both steps
    mu = (replay(model, chains, continuous=True)[0] / 0.5).softmax(-1) @ embedding_table(model)
    by_hand = -((h - mu).square().sum((1, 2)) / (2 * sigma**2))
    assert torch.allclose(thought, by_hand)
    assert torch.allclose(losses["loss"], -(weights * (by_hand + answer)).mean())
    (whole,) = torch.autograd.grad(losses["loss"], model.lm_head.weight)
    pieces = paper.surrogate(model, chains, weights, SOFT, sigma, rows=4)
    (parts,) = torch.autograd.grad(pieces["loss"], model.lm_head.weight)
    assert torch.allclose(whole, parts)


def test_sigma_makes_the_noise_a_third_of_an_embedding():
    model = tiny(hidden_size=64, vocab_size=200)
    table = embedding_table(model)
    sigma = paper.sigma_of(model, 0.33)
    assert not sigma.requires_grad
    noise = sigma * torch.randn(2000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratio = (noise.norm(dim=1).mean() / table.norm(dim=1).square().mean().sqrt()).item()
    assert ratio == pytest.approx(0.33, rel=0.03)


def test_a_saturated_softmax_passes_no_gradient():
    """The fuzzy trap: at τ = 1e-4 in float32 the logits get none, the table does."""
    logits, table = torch.randn(8, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    shares = {}
    for tau in (1e-4, 0.1, 0.5):
        g = torch.autograd.grad(paper.mixture(logits, table, tau).sum(), [logits, table])
        shares[tau] = g[0].norm().item() / g[1].norm().item()
    assert shares[1e-4] < 1e-4 < 0.01 < shares[0.1]
    top = paper.mixture(logits, table, 0.5, top_k=2)
    p = (logits / 0.5).softmax(-1)
    keep = p.topk(2, -1)
    expected = sum(keep.values[:, i, None] * table[keep.indices[:, i]] for i in range(2)) / keep.values.sum(1)[:, None]
    assert torch.allclose(top, expected, atol=1e-6)


# --- pass@k, the world -----------------------------------------------------------------------------------------------


def test_pass_at_k_by_enumeration():
    for right, k in itertools.product(range(6), (1, 2, 3, 5)):
        draws = list(itertools.combinations([1] * right + [0] * (5 - right), k))
        assert pass_at_k(5, right, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))
    curve = pass_curve(4, [0, 4, 4, 0], (1, 4))
    assert curve[1].mean == curve[4].mean == 0.5 and curve[1].low < 0.5 < curve[1].high
    with pytest.raises(WorkbenchError, match="draw more"):
        pass_at_k(4, 1, 5)
    with pytest.raises(WorkbenchError, match="empty"):
        pass_curve(4, [], (1,))


def test_the_world_is_arithmetic_with_held_out_operands():
    small, g = world.Chains(seed=3), torch.Generator().manual_seed(0)
    operands, operations = small.draw(g, 50, "train")
    results, words = small.results(operands, operations), world.tokenizer()
    for i in range(50):
        here = int(operands[i, 0])
        for t in range(3):
            value = int(operands[i, t + 1])
            here = (here + value if operations[i, t] == 0 else here - value) % 7
            assert here == results[i, t]
    text = words.decode(small.texts(operands, operations, results)[0])
    assert words(text).input_ids == small.texts(operands, operations, results)[0].tolist()
    assert text.endswith(f"answer: \\boxed{{ {int(results[0, -1])} }} <eos>")
    seen = {split: set(map(tuple, small.draw(g, 3000, split)[0].tolist())) for split in world.SPLITS}
    assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    total = torch.cartesian_prod(*[torch.arange(7)] * 4)
    shares = torch.bincount(world.split_of(total), minlength=10) / len(total)
    assert (shares - 0.1).abs().max() < 0.02


def test_the_writer_is_wrong_as_often_as_he_says_and_always_alike():
    small, g = world.Chains(steps=1, seed=1), torch.Generator().manual_seed(0)
    operands, operations = small.draw(g, 40_000, "train")
    true, written = small.results(operands, operations), small.results(operands, operations, g)
    right, wrong, known = small.tables
    entry = operations[:, 0], operands[:, 0], operands[:, 1]
    slip = (true != written)[:, 0]
    assert torch.equal(written[slip][:, 0], wrong[entry][slip])
    assert abs((~slip).double().mean() - known[entry].mean()) < 0.01
    assert known.min() >= 0.35 and (right != wrong).all()


# --- training --------------------------------------------------------------------------------------------------------

TINY = {"chain": 2, "thoughts": 4, "problems": 48, "trail_problems": 48, "draws": 8, "ks": (1, 8),
        "workers": 1}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with the small base model of seed 100, trained once."""
    path = tmp_path_factory.mktemp("run")
    config = paper.Config(**TINY, base_steps=500)
    paper.load_base(config, paper.load_task(config, 100), 100, path, progress=False)
    return path


def setting(folder, **changes):
    config = paper.Config(**TINY, base_steps=500, **changes)
    task = paper.load_task(config, 100)
    return config, task, paper.load_base(config, task, 100, folder)


def test_the_base_model_is_neither_hopeless_nor_perfect(folder):
    config, task, base = setting(folder)
    questions = studies.test_questions(config, task, "test", 100)
    counts = studies.right_counts(
        base, task, questions, paper.six_modes(config)["hard sample"], samples=8, seed=0, rows=64
    )
    assert 0.2 < sum(counts) / (8 * 48) < 0.9


@pytest.mark.parametrize(
    "arm", ["hard", "soft", "fuzzy", "soft, hidden noise", "soft, gumbel", "soft, logit noise", "soft, top-k"]
)
def test_every_arm_trains_and_no_other_thing_changes(folder, arm):
    config, task, base = setting(folder, steps=4, prompts=16, samples=4)  # enough that rewards differ in a group
    model = copy.deepcopy(base)
    _, fitted = paper.train(config, task, model, arm, 0, progress=False)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert changed == {n for n, _ in base.named_parameters()}  # full fine-tuning, the embedding included
    logged = fitted.history[-1]
    assert logged["loss"] == pytest.approx(logged["thought"] + logged["answer"], rel=1e-5)
    assert 0 <= logged["right"] <= 1 and logged["thoughts"] <= config.thoughts


def test_the_norms_of_both_terms_are_logged_and_change_nothing(folder):
    config, task, base = setting(folder, steps=2, prompts=12, samples=8, every=1, rows=40)
    runs = [
        paper.train(replace(config, norms=norms), task, copy.deepcopy(base), "soft", 0, progress=False)
        for norms in (True, False)
    ]
    (with_norms, told), (without, _) = runs
    assert all(torch.equal(p, without.state_dict()[n]) for n, p in with_norms.state_dict().items())
    for row in told.history:  # the clipped gradient is the sum of the two
        parts = row["thought_norm"], row["answer_norm"]
        assert abs(parts[0] - parts[1]) <= row["grad_norm"] * 1.001 and row["grad_norm"] <= sum(parts) * 1.001
    model = copy.deepcopy(base)
    losses = paper.objective(model, task, config, "soft", paper.Batches(task, config, 0, 1)[0])
    losses["answer"].backward()
    by_hand = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    assert losses["answer_norm"].item() == pytest.approx(by_hand, rel=1e-4) and by_hand > 0
    assert told.history[0]["answer_norm"] == pytest.approx(by_hand, rel=1e-4)
    figure = panels.term_norms({"soft": told.history})
    assert [len(line.x) for line in figure.data] == [2, 2]
    with pytest.raises(WorkbenchError, match="norms=true"):
        panels.term_norms({"soft": [{"step": 1}]})


def test_a_killed_training_resumes_bit_equal(folder, tmp_path):
    config, task, base = setting(folder, steps=6, prompts=2, samples=4, save_every=2, every=1)
    whole, _ = paper.train(config, task, copy.deepcopy(base), "soft", 1, Record(tmp_path / "a"), progress=False)

    def kill(step, logged, model):
        if step == 5:
            raise KeyboardInterrupt

    record = Record(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        paper.train(config, task, copy.deepcopy(base), "soft", 1, record, kill, progress=False)
    again, fitted = paper.train(config, task, copy.deepcopy(base), "soft", 1, record, progress=False)
    assert fitted.resumed_from == 4
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in whole.state_dict().items())
    rows = [[(r["step"], r["loss"], r["reward"]) for r in x.records("step")] for x in (Record(tmp_path / "a"), record)]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_rewards_are_the_papers(folder):
    config, task, base = setting(folder)
    questions = task.draw(torch.Generator().manual_seed(0), 3, "test")
    chains = paper.generate(base, task, questions, paper.six_modes(config)["hard greedy"], seed=0)
    right = torch.tensor([world.DIGIT + int(t) for t in questions.truths])
    close, eos = world.ID["}"], world.ID["<eos>"]
    answer = torch.stack([right, torch.full((3,), close)], 1)
    answer[1, 0] = world.DIGIT + (int(questions.truths[1]) + 1) % 7
    answer[2, 1] = eos  # the box stays open
    marked = replace(chains, answer=answer, answer_mask=torch.ones_like(answer, dtype=torch.bool))
    assert task.marks(marked, questions).tolist() == [2, 1, 0]


def test_the_trained_model_opens_without_the_workbench(folder, tmp_path):
    config, task, base = setting(folder, steps=2, prompts=2, samples=4)
    model, _ = paper.train(config, task, copy.deepcopy(base), "soft", 0, progress=False)
    save_model(model, task, tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = words("<bos> 3 + 4 + 2 =", return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not list(tmp_path.glob("*.bin")) and words.decode(ids[0]) == "<bos> 3 + 4 + 2 ="
    text = words.decode(again.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert "answer: \\boxed{" in text


def test_the_exported_llama_computes_what_the_decoder_computes(folder):
    """The base model was trained as a DecoderLM: its texts' loss is near the writer's own entropy."""
    config, task, base = setting(folder)
    text = task.world.corpus(torch.Generator().manual_seed(5), 64)
    logits = base(text[:, :-1]).logits[:, task.world.prompt_length + 2 - 1 :]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, task.world.prompt_length + 2 :].flatten())
    assert loss < 0.05  # marker, box, the copied answer, brace and <eos> are certain


def verdict_of(path, folder, **changes):
    """The verdict on "hard_inference_pass" from five short soft trainings of the base model, each with questions of
    its own."""
    config, task, base = setting(folder, steps=3, prompts=4, samples=16, **changes)
    record = Record(path)
    for run in range(100, 105):
        model = copy.deepcopy(base)
        paper.train(config, task, model, "soft", run, progress=False)
        values = studies.claim_values({"soft": studies.measure(config, model, task, run)}, 8)
        record.result("hard_inference_pass", values["hard_inference_pass"], seed=run)
    return judge(next(c for c in paper.CLAIMS if c.id == "hard_inference_pass"), record.records("result"))


def test_hard_tokens_that_are_not_drawn_flip_the_verdict(folder, tmp_path):
    """Hard inference finds more at pass@k because it draws; take the drawing away (τ near 0) and the claim falls."""
    intact, broken = verdict_of(tmp_path / "intact", folder), verdict_of(tmp_path / "broken", folder, tau_hard=0.02)
    assert intact.verdict == "holds", intact
    assert broken.verdict == "does not hold", broken


# --- the study -------------------------------------------------------------------------------------------------------


def test_a_study_measures_every_claim_and_is_not_repeated(tmp_path):
    changes = {"base_steps": 4, "steps": 4, "every": 2, "prompts": 2, "samples": 2, "problems": 8, "trail_problems": 8}
    arms = paper.PRESETS["desk"].arms
    config = paper.Config(**{**TINY, **changes}, arms=arms)
    record = Record(tmp_path)
    known = studies.study(config, tmp_path, record, seed=120)
    stored = {r["measure"] for r in record.records("result")}
    assert stored == {c.measure for c in paper.CLAIMS}
    trail = known["soft", 120]["trail"]
    assert [r["step"] for r in trail] == [0, 2, 4] and {"own", "hard", "sample", "other_pass", "nll"} <= set(trail[0])
    for arm in ("hard", "soft"):
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "arms" / f"{arm}, seed 120" / "student")
        assert kept.config.vocab_size == len(world.WORDS)
    before = record.metrics.read_text()
    again = studies.study(config, tmp_path, Record(tmp_path), seed=120)
    assert again.keys() == known.keys()
    arms_before = [line for line in before.splitlines() if '"kind": "arm"' in line]
    arms_after = [line for line in record.metrics.read_text().splitlines() if '"kind": "arm"' in line]
    assert arms_after == arms_before, "a finished arm was measured again"


def test_matching_reads_the_trail_where_the_accuracies_meet():
    trail = [{"hard": 0.4, "nll": 1.0}, {"hard": 0.8, "nll": 2.0}, {"hard": 0.7, "nll": 5.0}, {"hard": 1.0, "nll": 3.0}]
    assert studies.matched(trail, 0.5, "nll") == pytest.approx(1.25)
    assert studies.matched(trail, 0.3, "nll") == 1.0
    assert studies.matched(trail, 0.9, "nll") == pytest.approx(5 - 2 * 2 / 3)
    assert studies.matched(trail, 1.1, "nll") == 3.0
    rows = [{"step": 0, "own": 1.0}, {"step": 1, "own": 0.7}, {"step": 2, "own": 0.9}, {"step": 3, "own": 0.9}]
    assert studies.selected(rows)["step"] == 3


def test_bad_settings_are_one_line_before_anything_trains():
    quick = paper.PRESETS["quick"]
    for changes, said in (
        ({"ks": [1, 64]}, "draws"), ({"tau_soft": -0.1}, "tau_soft"), ({"factor": -1}, "factor"),
        ({"thoughts": 0}, "thoughts"), ({"chain": 0}, "chain"), ({"samples": 1}, "samples"),
        ({"data": "openai/gsm8k:main"}, "belong together"),
    ):  # fmt: skip
        with pytest.raises(WorkbenchError, match=said) as error:
            override(quick, changes)
        assert "\n" not in str(error.value)
    config = paper.Config(**TINY)
    with pytest.raises(WorkbenchError, match="two vocabularies"):
        check_vocabulary(tiny(), paper.load_task(config).tokenizer)
    with pytest.raises(WorkbenchError, match="empty"):
        paper.load_task(config).draw(torch.Generator(), 0, "test")
    with pytest.raises(WorkbenchError, match="unknown split"):
        world.Chains().draw(torch.Generator(), 1, "dev")
    with pytest.raises(WorkbenchError, match="before training"):
        paper.train(config, paper.load_task(config), tiny(), "base", 0)


# --- panels and cost -------------------------------------------------------------------------------------------------


def test_the_mixture_panel_generates_anew(folder):
    config, task, base = setting(folder)
    questions = studies.test_questions(config, task, "test", 100)
    soft = panels.mixtures(base, task, questions, index=0, tau=0.5, factor=0.33)
    weights = torch.tensor([bar.y for bar in soft.data])
    assert torch.allclose(weights.sum(0), torch.ones(weights.shape[1]), atol=0.02)
    fuzzy = panels.mixtures(base, task, questions, index=0, tau=1e-4, factor=0.0)
    assert torch.tensor([bar.y for bar in fuzzy.data]).amax(0).min() > 0.999
    chains = paper.generate(base, task, panels._pick(questions, 0, "cpu"), Mode("fuzzy", 1e-4), seed=0)
    shadow = [label.split("<br>")[1] for label in fuzzy.data[0].x]
    assert shadow == panels.words_of(task, chains.tokens[0][chains.thought_mask[0]].tolist())
    loud = panels.mixtures(base, task, questions, index=0, tau=0.5, factor=3.0)
    assert loud.layout.title.text != soft.layout.title.text


def test_the_gradient_by_path_adds_up_and_the_panel_shows_it(folder):
    config, task, base = setting(folder, samples=8)
    questions = task.draw(torch.Generator().manual_seed(0), 4, "train")
    warm = paper.gradient_parts(base, task, config, SOFT, questions, 0)
    cold = paper.gradient_parts(base, task, config, Mode("fuzzy", 1e-4, 0.33), questions, 0)
    assert cold["softmax"] < 0.05 * warm["softmax"] and cold["table"] > 0.1 * warm["table"]
    figure = panels.gradient_paths(base, task, config, questions, factor=0.33, taus=(1e-4, 0.5))
    assert {line.name for line in figure.data} == {"softmax", "table", "answer"}


def test_every_panel_draws_a_study():
    def arm(value):
        curve = {name: {"1": [value, value - 0.1, value + 0.1]} for name in paper.six_modes(paper.Config())}
        for name in curve:
            if name.endswith("sample"):
                curve[name]["8"] = [value + 0.1, value, value + 0.2]
        trail = [{"step": s, "own": value, "hard": value, "nll": 1.0, "other_pass": 0.5} for s in (0, 2, 4)]
        return {"test": curve, "other": curve, "nll": 1.0, "trail": trail, "entropy": {"hard": [1.0, 0.5, 0.2]}}

    measured = {("base", 0): {**arm(0.4), "trail": []}, ("hard", 0): arm(0.6), ("soft", 0): arm(0.8)}
    table = panels.table(measured, split="test", k=8)
    assert table.data[0].z[2][0] == 0.8 and table.data[0].z[1][1] == pytest.approx(0.7)
    curves = panels.pass_curves(measured, split="other", mode="soft sample")
    assert [list(line.y) for line in curves.data if line.name == "soft"] == [[0.8, 0.9]]
    assert len(panels.trajectories(measured, key="nll", y="nll").data) == 2
    config = paper.Config()
    loud = arm(0.3)
    loud["trail"][-1]["hard"] = 0.1
    swept = panels.noise_sweep(config, {**measured, ("soft, noise x9", 0): loud, ("soft, hidden noise", 0): arm(0.5)})
    assert {line.name: (line.x, line.y) for line in swept.data} == {
        "kept step": ((0.33, 3.0), (0.8, 0.1)), "last step": ((0.33, 3.0), (0.8, 0.1)),
    }  # fmt: skip
    with pytest.raises(WorkbenchError, match="no noise to sweep"):
        panels.noise_sweep(config, {("hard", 0): arm(0.6)})
    assert list(panels.entropy(measured, kind="hard").data[0].y) == [1.0, 0.5, 0.2]
    assert {line.name for line in panels.learning(measured).data} == {"hard", "soft"}


def test_the_bench_counts_memory_and_writes_its_rows(tmp_path, monkeypatch, capsys):
    rows = bench.generation_cost((4, 96), rows=4, repeats=1)  # long enough for the chain to outweigh the table
    assert {(r["mode"], r["cached"]) for r in rows} == {
        (m, c) for m in ("hard", "soft", "fuzzy") for c in (True, False)
    }
    kept = {(r["mode"], r["cached"], r["thoughts"]): r["bytes"] for r in rows}
    for mode in ("hard", "soft", "fuzzy"):
        assert kept[mode, False, 96] > kept[mode, False, 4] > 0 and kept[mode, True, 96] < kept[mode, False, 96]
    monkeypatch.setattr(bench, "generation_cost", lambda: rows)
    paper.bench(tmp_path)
    assert len((tmp_path / "soft_tokens.csv").read_text().splitlines()) == 1 + len(rows)
    assert "tokens/s" in capsys.readouterr().out
