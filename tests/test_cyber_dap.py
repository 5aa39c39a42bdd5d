"""Cyber DAP: its corpus and questions, the traps of continued pre-training, its arms, and the claims that judge it."""

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.config import override
from workbench.data.cwe import weaknesses
from workbench.data.decontaminate import decontaminate, ngrams, shared
from workbench.data.packing import document_mask, pack, pad, tokenise
from workbench.data.pages import Page
from workbench.data.text import Mixture, Windows
from workbench.errors import WorkbenchError
from workbench.evaluation.claims import judge
from workbench.losses.causal_lm import next_token_loss, own_loss
from workbench.models.causal_lm import (
    freeze_embeddings,
    load_causal_lm,
    recompute_activations,
    save_model,
    small_llama,
    trainable,
    with_lora,
)
from workbench.papers import cyber_dap as paper
from workbench.papers import cyber_dap_material as source
from workbench.training.record import Record

TINY = override(paper.PRESETS["quick"], {"context": 64, "batch": 4, "held_out": 1024, "questions": 12, "epochs": 2})


def toy_pages(count, words, prefix):
    """Pages of a little language: every page goes round the words of its own topic, in their order."""
    rng = np.random.default_rng(len(words))

    def said(topic, k):
        start = int(rng.integers(3))
        return " ".join(topic[(start + i) % 3] for i in range(k))

    pages = []
    for n in range(count):
        t = [words[(n * 3 + k) % len(words)] for k in range(3)]
        body = f"It is {said(t, 12)}. More {said(t, 12)}."
        pages.append(Page(f"{prefix} {n} {t[0]}", f"about {n} {said(t, 5)}.", body, f"g{n % 4}", f"raw {said(t, 30)}"))
    return tuple(pages)


DOMAIN = toy_pages(48, ["buffer", "race", "inject", "leak", "token", "bypass", "overflow", "escape", "taint"], "weak")
GENERAL = toy_pages(60, ["array", "matrix", "sparse", "solve", "root", "spline", "fit", "sample", "kernel"], "tool")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base model in a folder, trained for a moment on the general pages."""
    from workbench.data.bpe import train_bpe

    tokenizer = train_bpe([p.text() for p in GENERAL], 200)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    eos = tokenizer.eos_token_id
    model = small_llama(len(tokenizer), width=16, layers=2, heads=2, context=128, seed=0, eos=eos)
    windows = Windows(pack(tokenise([p.text() for p in GENERAL], tokenizer), eos), 64, 4, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for i in range(40):
        optimizer.zero_grad()
        next_token_loss(model, windows[i]).backward()
        optimizer.step()
    return str(save_model(model.eval(), tokenizer, tmp_path_factory.mktemp("base")))


@pytest.fixture
def toy(monkeypatch):
    """The little language in place of CWE and the documentation."""
    from workbench.data.pages import documentation

    provenance = weaknesses.__wrapped__ and source.Provenance("toy", "none", "", "none", "0")
    monkeypatch.setattr(source, "weaknesses", lambda: (DOMAIN, provenance))
    monkeypatch.setattr(source, "documentation", lambda: (GENERAL, provenance))
    assert documentation is not source.documentation


def job_of(base, tmp_path, arm="dap", config=TINY, seed=0):
    _, tokenizer = load_causal_lm(base)
    everything = override(config, {"arms": list(paper.PRESETS["desk"].arms)})
    return paper.Job(everything, arm, seed, base, source.load(everything, tokenizer, seed), tmp_path)


# --- corpus and questions -------------------------------------------------------------------------------------------


def test_the_catalogue_is_read_whole():
    pages, provenance = weaknesses()
    by_name = {p.name: p for p in pages}
    assert len(pages) == 938 and len(by_name) == 938 and "938 weaknesses" in provenance.note
    page = by_name["Out-of-bounds Write"]
    assert page.group == "CWE-119" and page.description.startswith("The product writes data past the end")
    assert "\n" not in page.text() and "canary" in page.raw and "canary" not in page.text()


def test_no_protected_ngram_survives_in_any_text_that_is_trained_on():
    parts = source.split_pages(weaknesses()[0], 5)
    protected = set().union(*(ngrams(s) for s in source.secrets(parts)))
    kept, dropped = source.curated_text(parts)
    raw = source.raw_text(parts, 200_000, np.random.default_rng(0))
    assert len(protected) > 5000 and dropped > 10 and len(raw) > 10
    assert not any(shared(text, protected) for text in [t for t, _ in kept] + raw)
    # and without the step it would: otherwise the test could not fail
    assert any(shared(p.text(described=False), protected) for p in parts["trained page"])
    held = {p.name for p in parts["held-out page"]}
    assert not held & {page.name for _, page in kept}
    fields = {p.name for p in parts["held-out field"]}
    assert all(page.description not in text for text, page in kept if page.name in fields)


def test_decontamination_sees_across_sentences_and_short_secrets():
    secret = "one two three four five six seven eight nine"
    assert decontaminate(["Fine. one two three four five six. seven eight nine", "keep me."], [secret]) == (
        ["", "keep me."],
        3,
    )
    assert decontaminate(["We say: never give up! Again."], ["never give up"]) == (["Again."], 1)
    assert decontaminate(["untouched text."], []) == (["untouched text."], 0)


def test_questions_have_one_right_name_shuffled_places_and_siblings_where_asked():
    pages = weaknesses()[0]
    group = {p.name: p.group for p in pages}
    items = source.questions(pages[:400], pages, np.random.default_rng(0), "t", siblings=3)
    right = {p.description: p.name for p in pages}
    places = [0] * 4
    shared_group = 0
    for item in items:
        (place,) = item.answers
        places[place] += 1
        assert item.options[place] == right[item.question] and len(set(item.options)) == 4
        shared_group += sum(group[o] == group[item.options[place]] != "" for o in item.options) - 1
    assert min(places) > 0.18 * len(items), "no letter is favoured"
    assert shared_group > 2 * len(items), "distractors come from the same parent"
    strangers = source.questions(pages[:400], pages, np.random.default_rng(0), "t", siblings=0)
    assert sum(group[o] == group[i.options[min(i.answers)]] != "" for i in strangers for o in i.options) < 1.5 * len(
        strangers
    )


def test_a_description_that_quotes_its_name_is_no_question():
    pages = [*DOMAIN[:8], Page("give away", "to give away is this one.", "", "")]
    assert {i.question for i in source.questions(pages, pages, np.random.default_rng(0), "t")} == {
        p.description for p in DOMAIN[:8]
    }


def test_trained_pages_are_in_the_stream_and_held_out_ones_are_not(base, tmp_path, toy):
    job = job_of(base, tmp_path)
    _, tokenizer = load_causal_lm(base)
    text = tokenizer.decode(job.material.streams["curated"].tolist())
    assert all(i.question in text for i in job.material.items["trained page"])
    for part in ("held-out field", "held-out page"):
        assert not any(i.question in text for i in job.material.items[part])
    words = re.findall(r"\w+", text)
    assert sorted(words) == sorted(re.findall(r"\w+", tokenizer.decode(job.material.streams["shuffled"].tolist())))


# --- the traps ------------------------------------------------------------------------------------------------------


def test_packing_wastes_nothing_and_marks_every_document():
    documents = [[5, 6, 7], [8], [9, 9]]
    assert pack(documents, 1).tolist() == [1, 5, 6, 7, 1, 8, 1, 9, 9, 1]
    ids, real = pad(documents, 4, 1)
    assert ids.tolist() == [[5, 6, 7, 1], [8, 1, 1, 1], [9, 9, 1, 1]]
    assert real.sum() == 9, "every token and its end, and no padding"


def test_a_document_mask_gives_each_document_what_it_would_see_alone(base):
    model, _ = load_causal_lm(base)
    eos, first, second = model.config.eos_token_id, [5, 6, 7, 8], [9, 10, 11]
    packed = torch.tensor([[eos, *first, eos, *second]])
    mask, positions = document_mask(packed, eos)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    with torch.no_grad():
        together = model(input_ids=packed, attention_mask=mask, position_ids=positions).logits[0]
        alone = [model(input_ids=torch.tensor([[eos, *d]])).logits[0] for d in (first, second)]
        crossing = model(input_ids=packed).logits[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (crossing[6:] - alone[1][1:]).abs().max() > 1e-3, "without the mask the second document sees the first"
    assert next_token_loss(model, packed, separate=eos).item() != pytest.approx(next_token_loss(model, packed).item())


def test_the_loss_is_the_librarys_own_and_a_second_shift_is_caught(tmp_path):
    """With the committed base, which predicts the next token and not the one after it."""
    base = str(paper.REFERENCE / "base-0")
    model, tokenizer = load_causal_lm(base)
    stream = pack(tokenise([p.text() for p in weaknesses()[0][:20]], tokenizer), tokenizer.eos_token_id)
    window = Windows(stream, 64, 4, 0)[0]
    logits = model(input_ids=window).logits.double()
    by_hand = -logits.log_softmax(-1)[:, :-1].gather(2, window[:, 1:, None]).mean()
    assert next_token_loss(model, window).item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert own_loss(model, window).item() == pytest.approx(by_hand.item(), rel=1e-5)

    def shifted_twice(model, window):  # what passing pre-shifted labels comes to
        return F.cross_entropy(model(input_ids=window[:, :-2]).logits.flatten(0, 1), window[:, 2:].flatten())

    material = source.Material({"curated": stream}, {}, {}, 0, 1.0, ())
    with pytest.raises(WorkbenchError, match="shifted twice"):
        paper.adapt(paper.Job(TINY, "dap", 0, base, material, tmp_path), shifted_twice, progress=False)


def test_freezing_the_embeddings_of_a_tied_model_freezes_the_head(base):
    tied, _ = load_causal_lm(base)
    whole = trainable(tied)
    table = tied.get_input_embeddings().weight.numel()
    assert freeze_embeddings(tied) == whole - table, "one tensor, counted once"
    config = tied.config
    config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(config)
    assert trainable(untied) == whole + table and freeze_embeddings(untied) == whole - table


def test_recomputed_activations_and_frozen_embeddings_go_together(base):
    window = torch.randint(5, 100, (2, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        model, _ = load_causal_lm(base)
        freeze_embeddings(model.train())
        if recompute:
            recompute_activations(model)
        next_token_loss(model, window).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_lora_starts_as_the_base_and_trains_nothing_else(base):
    model, _ = load_causal_lm(base)
    window = torch.arange(40)[None]
    before = next_token_loss(model, window).item()
    layers = sum(p.ndim == 2 for n, p in model.named_parameters() if "layers" in n)
    lora = with_lora(model, 4, seed=1)
    assert next_token_loss(lora, window).item() == pytest.approx(before, rel=1e-6)
    named = [n for n, p in lora.named_parameters() if p.requires_grad]
    assert len(named) == 2 * layers == 28 and all("lora_" in n for n in named)


# --- arms -----------------------------------------------------------------------------------------------------------


def test_arms_are_compared_in_tokens(base, tmp_path, toy):
    jobs = {arm: job_of(base, tmp_path, arm) for arm in paper.PRESETS["desk"].arms}
    tokens = {arm: paper.batches(job)[2] for arm, job in jobs.items() if arm != "base"}
    equal = ("dap", "gentle", "aggressive", "frozen embeddings", "lora")
    assert len({tokens[arm] for arm in equal}) == 1
    assert tokens["shuffled words"] == pytest.approx(tokens["dap"], rel=0.1)
    assert tokens["1 %"] < tokens["42 %"] < tokens["dap"] < tokens["replay"]
    data, steps, _ = paper.batches(jobs["replay"])
    assert isinstance(data, Mixture) and steps == paper.batches(jobs["dap"])[1], "as many domain tokens as without"
    assert data[0].shape[0] == 4 + 1 and torch.equal(data[0][:4], paper.batches(jobs["dap"])[0][0])


def test_what_each_arm_leaves_alone(base, tmp_path, toy):
    before = dict(load_causal_lm(base)[0].named_parameters())
    for arm, fixed in (("frozen embeddings", "embed_tokens"), ("lora", "norm"), ("dap", None)):
        after = dict(paper.adapt(job_of(base, tmp_path / arm, arm), progress=False).model.named_parameters())
        assert before.keys() == after.keys(), "a merged LoRA leaves no modules behind"
        same = {n for n in before if torch.equal(before[n], after[n])}
        left = {n for n in before if fixed and (fixed in n or (arm == "lora" and "embed" in n))}
        assert same == left, arm


def test_a_killed_adaptation_resumes_bit_equal(base, tmp_path, toy):
    config = override(TINY, {"save_every": 3})
    whole = paper.adapt(job_of(base, tmp_path / "whole", config=config), progress=False).model.state_dict()
    job = job_of(base, tmp_path / "killed", config=config)

    def kill(step, logged):
        if step >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paper.adapt(job, progress=False, on_step=kill)
    resumed = paper.adapt(job, progress=False).model.state_dict()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_the_adapted_folder_opens_without_the_workbench(base, tmp_path, toy):
    adapted = paper.adapt(job_of(base, tmp_path), progress=False)
    folder = save_model(adapted.model, adapted.tokenizer, tmp_path / "out")
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}, "no pickle"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("weak buffer: about", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted.model(ids).logits)


# --- claims ---------------------------------------------------------------------------------------------------------


def test_an_untrained_domain_flips_the_verdict(base, tmp_path, toy):
    """DAP on the pages holds the first claim; with their words shuffled, the key part off, it does not hold."""
    claim = dataclasses.replace(next(c for c in paper.CLAIMS if c.id == "domain_nll"), margin=0.3)
    control = next(c for c in paper.CLAIMS if c.id == "knowledge_nll")
    config = override(TINY, {"arms": ["base", "dap", "shuffled words"], "seeds": 3, "letters": ["base"], "lr": 1e-2,
                             "epochs": 8, "questions": 4, "teacher": base})  # fmt: skip
    record = Record(tmp_path / "run")
    study = paper.study(config, tmp_path / "run", record)
    assert judge(claim, record.records("result")).verdict == "holds"
    assert judge(dataclasses.replace(control, margin=0.0), record.records("result")).verdict == "holds"
    broken = Record(tmp_path / "broken")
    for s in range(3):
        arms = {"base": study["base", s], "dap": study["shuffled words", s], "shuffled words": study["dap", s]}
        for measure, value in paper.claim_values(arms).items():
            broken.result(measure, value, seed=s)
    assert judge(dataclasses.replace(control, margin=0.0), broken.records("result")).verdict == "does not hold"
    # a second sitting trains nothing: what was measured is read back
    again = paper.study(config, tmp_path / "run", record)
    assert again[("dap", 0)] == record.records("note", variant="dap", seed=0)[0]["measures"]


def test_claim_values_from_numbers_worked_out_by_hand():
    def arm(domain, general, trained="1100", field="10", page="00"):
        hits = {"trained page": trained, "held-out field": field, "held-out page": page}
        out = {"nll domain": domain, "nll general": general} | {f"{k} hits": v for k, v in hits.items()}
        return out | {k: 100 * v.count("1") / len(v) for k, v in hits.items()}

    arms = {
        "base": arm(5.0, 4.0), "dap": arm(4.0, 4.5, trained="1110", page="11"), "aggressive": arm(3.5, 6.0),
        "shuffled words": arm(4.6, 5.0), "general text": arm(4.9, 3.9, trained="0000"), "42 %": arm(4.3, 4.2),
        "less curated": arm(4.2, 4.7), "lora": arm(4.1, 4.3), "replay": arm(4.05, 4.1),
    }  # fmt: skip
    assert paper.claim_values(arms) == pytest.approx({
        "domain_nll": 1.0, "qa_trained": 25.0, "qa_held_out": 50.0, "retained": 0.5, "knowledge_nll": 0.6,
        "knowledge_qa": 25.0, "constrained": 1.5, "more_tokens": 0.3, "less_data": 0.2, "full_beats_lora": 0.1,
        "replay_forgets_less": 0.4,
    })  # fmt: skip
    assert {c.measure for c in paper.CLAIMS} == set(paper.claim_values(arms)), "every claim is measured"
    (row,) = [r for r in paper.paired(arms["base"], arms["dap"]) if r["set"] == "trained page"]
    assert (row["fixed"], row["broken"], row["gain"].mean) == (1, 0, 25.0)


def test_a_base_model_can_be_trained_within_the_run(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(paper, "documentation", lambda: (GENERAL, None))
    monkeypatch.setattr(paper, "VOCABULARY", 200)
    config = override(TINY, {"teacher": "train", "base_steps": 12})
    folder = paper.base_folder(config, 3, tmp_path)
    model, tokenizer = load_causal_lm(folder)
    losses = [r["loss"] for r in Record(tmp_path / "bases" / "base-0").records("step")]
    assert folder.endswith("base-0") and len(tokenizer) == model.config.vocab_size and losses
    exercise = source.exercises(list(GENERAL), 0)[0]
    assert re.fullmatch(r"Question: .*\nA\) .*\nB\) .*\nC\) .*\nD\) .*\nAnswer: [A-D]", exercise)
    assert paper.base_folder(config, 3, tmp_path) == folder, "made once a run"
    own = [paper.base_folder(override(config, {"bases": 0}), s, tmp_path) for s in (3, 4)]
    assert [f[-6:] for f in own] == ["base-3", "base-4"], "0: a base a seed"
    apart = [load_causal_lm(f)[0].model.embed_tokens.weight for f in own]
    assert not torch.equal(*apart)
    with pytest.raises(WorkbenchError, match="no committed base 1"):
        paper.base_folder(override(TINY, {"bases": 2}), 1, tmp_path)
