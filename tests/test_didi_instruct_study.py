"""DiDi-Instruct end to end: claims from measures, a tiny run, the saved student, the full path on tiny folders."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from workbench.data.bpe import train_bpe
from workbench.data.letter_classes import letter_world
from workbench.errors import WorkbenchError
from workbench.evaluation import enumeration as exact
from workbench.losses.masked_diffusion import elbo
from workbench.models import masked_diffusion as md
from workbench.models.masked_lm import load_masked_lm
from workbench.models.mdlm_dit import DiTConfig, MDLMDiT, load_mdlm, save_mdlm
from workbench.papers import didi_instruct as paper
from workbench.papers import didi_instruct_bench as bench
from workbench.papers import didi_instruct_exact as listed
from workbench.papers import didi_instruct_study as experiments
from workbench.papers.didi_instruct import Config, Parts
from workbench.papers.didi_instruct_settings import REFERENCE
from workbench.training.record import Record

SMALL = {
    "steps": 2, "batch": 8, "critic_warmup": 2, "samples": 8, "nfe": (2, 4), "temperatures": (0.8, 1.0),
    "exact_steps": 2, "exact_batch": 8, "exact_teacher_steps": 2, "workers": 1, "log_every": 1,
}  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_whole_study_runs_stores_and_does_not_repeat(tmp_path, monkeypatch):
    config = Config(**SMALL, variants=("didi", "no coupled time"), sdtt_steps=2, sdtt_rounds=2, length=16)
    record = Record(tmp_path)
    measured = experiments.study(config, tmp_path, record, 7)
    assert {name for name, _ in measured} == {"teacher", "didi", "no coupled time", "sdtt", "listed"}
    for key in ("loss", "entropy", "pooled", "distinct2", "seconds", "copied"):
        assert measured["didi", 7][f"{key} @ 4"] >= 0 and f"guided {key} @ 4" in measured["didi", 7]
    stored = {r["measure"] for r in record.records("result")}
    assert {"few_steps_matched", "entropy_kept", "pooled_kept", "against_sdtt", "listed_kl"} <= stored
    monkeypatch.setattr(experiments, "run_job", None)  # a second sitting trains nothing
    assert experiments.study(config, tmp_path, record, 7).keys() == measured.keys()


def test_every_claim_is_measured_by_the_desk_preset():
    desk = paper.PRESETS["desk"]
    text = {f"{k} @ {n}": 1.0 for k in ("loss", "entropy", "pooled", "distinct2") for n in desk.nfe}
    teacher = {f"T {t:g} {k}": v * t for t in desk.temperatures for k, v in text.items()}
    jobs = {name: text | {f"guided {k}": v for k, v in text.items()} for name in (*desk.variants, "sdtt")}
    world = {k: 1.0 for k in ("ikl", "kl 2")}
    jobs |= {"teacher": teacher, "listed": {v: world for v in ("teacher", *desk.exact_variants)}}
    values = experiments.claim_values(jobs, desk)
    assert {c.measure for c in paper.CLAIMS} <= set(values)
    assert desk.seeds >= 3 and len(paper.CLAIMS) >= 3


def test_a_colder_teacher_gains_nothing_at_matched_entropy():
    """The trap of generative perplexity: a teacher made colder has a gain of 0, whatever its loss."""
    config = Config(temperatures=(0.6, 0.8, 1.0), nfe=(4,), length=16)
    teacher = {}
    for t, entropy, loss in ((0.6, 2.0, 3.0), (0.8, 2.5, 4.5), (1.0, 3.0, 6.0)):
        teacher |= {f"T {t:g} entropy @ 4": entropy, f"T {t:g} loss @ 4": loss, f"T {t:g} pooled @ 4": 2 * entropy}
    cold = {"entropy @ 4": 2.5, "loss @ 4": 4.5, "pooled @ 4": 5.0}
    assert experiments.gain(cold, teacher, config, 4, by="entropy") == pytest.approx(0)
    assert experiments.gain(cold, teacher, config, 4, by="pooled") == pytest.approx(0)
    better = {"entropy @ 4": 2.75, "loss @ 4": 4.75, "pooled @ 4": 5.0}
    assert experiments.gain(better, teacher, config, 4, by="entropy") == pytest.approx(0.5)
    assert experiments.gain(better, teacher, config, 4, by="pooled") == pytest.approx(-0.25)


def test_the_committed_teacher_and_judge_are_real_and_open_with_transformers():
    config = Config()
    task = experiments.load_task(config)
    bound = float(elbo(task.teacher, task.held[:40], rng()).mean())
    assert bound < 4.1  # log 384 is 5.95
    text = task.held[:40]
    assert experiments.quality(task.judge, text)["loss"] < 3.3
    noise = torch.randint(384, text.shape, generator=rng())
    assert experiments.quality(task.judge, noise)["loss"] > 6
    theirs = AutoModelForCausalLM.from_pretrained(REFERENCE / "judge", dtype=torch.float32)
    assert (theirs(input_ids=text).logits - task.judge(text)).abs().max() < 1e-3
    assert len(AutoTokenizer.from_pretrained(REFERENCE / "teacher")) == 385
    again = task.tokenizer("The estimator")["input_ids"]
    assert AutoTokenizer.from_pretrained(REFERENCE / "teacher")("The estimator")["input_ids"] == again
    assert sum(f.stat().st_size for f in REFERENCE.rglob("*") if f.is_file()) < 3_000_000


def test_a_distilled_student_opens_without_the_workbench(tmp_path):
    config = Config(**SMALL, length=16)
    task = experiments.load_task(config)
    student = experiments.distil_on_text(config, task, "didi", 0, None, progress=False)
    experiments.save_student(student.net, task.tokenizer, tmp_path)
    there, words = AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    z = torch.tensor([words("The [MASK][MASK] of")["input_ids"]])
    assert (z == words.mask_token_id).sum() == 2
    at = torch.ones_like(z, dtype=torch.bool)
    ours = md.logits_at(student.net, z, at)
    assert torch.allclose(there(input_ids=z).logits[0, :, :384], ours, atol=1e-5)
    assert not torch.equal(there.decoder.weight, load_masked_lm(str(REFERENCE / "teacher")).head.weight)


def test_the_listed_world_is_the_texts(tmp_path):
    world = letter_world(length=3)
    assert world.law.sum() == pytest.approx(1) and (world.law > 0).all()
    drawn = world.draw(rng(), 50_000)
    counts = exact.index_of(drawn, 3).bincount(minlength=27) / 50_000
    assert (counts - world.law).abs().max() < 0.01
    # one letter: a sampler with the text's own law has an integral KL of 0
    table = torch.zeros(4, 1, 3, dtype=torch.float64)
    law = letter_world(length=1).law
    table[:] = law
    table[:3] = torch.eye(3, dtype=torch.float64)[:, None]
    assert listed.integral_kl(table, law, 1, Parts()).item() == pytest.approx(0, abs=1e-12)
    assert listed.integral_kl(table, torch.ones(3).double() / 3, 1, Parts()).item() > 0.01


def test_the_published_network_has_its_size_and_follows_its_definition():
    with torch.device("meta"):
        net = MDLMDiT(DiTConfig())
    count = sum(p.numel() for p in net.parameters())
    d, v, c = 768, 50258, 128
    block = 3 * d * d + d * d + 2 * 4 * d * d + 5 * d + 2 * d + c * 6 * d + 6 * d
    by_hand = 2 * v * d + v + 12 * block + d + (256 * c + c + c * c + c) + (c * 2 * d + 2 * d)
    assert count == by_hand and count / 1e6 == pytest.approx(169, abs=1)
    assert {n.split(".")[0] for n, _ in net.named_parameters()} == {
        "vocab_embed",
        "sigma_map",
        "blocks",
        "output_layer",
    }


@pytest.fixture
def hub(tmp_path):
    """A tiny MDLM, judge, tokenizer and text, as folders of the Hub's formats."""
    sentences = [
        f"The {w} of the matrix is {w} when the {w} is real." for w in ("rank", "trace", "norm", "inverse")
    ] * 60
    tokenizer = train_bpe(sentences, 120)
    tokenizer.add_special_tokens({"eos_token": "Ċ"})  # a piece it has: the newline
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences))
    torch.manual_seed(0)
    net = MDLMDiT(DiTConfig(vocab_size=121, hidden_dim=16, n_blocks=2, n_heads=2, cond_dim=8, model_length=16))
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    save_mdlm(net, tmp_path / "mdlm")
    state = load_file(tmp_path / "mdlm" / "model.safetensors")  # as published: under the wrapper's name
    wrapped = {f"backbone.{n}": t for n, t in state.items()} | {"backbone.rotary_emb.inv_freq": torch.ones(4)}
    save_file(wrapped, tmp_path / "mdlm" / "model.safetensors")
    judge = LlamaForCausalLM(
        LlamaConfig(vocab_size=121, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    judge.save_pretrained(tmp_path / "judge")
    return tmp_path


def full(hub, **changes):
    folders = {name: str(hub / name) for name in ("data", "tokenizer", "judge")}
    return Config(
        **{**SMALL, "model": str(hub / "mdlm"), **folders, "tokens": 1024, "length": 16, "critic_blocks": 2, **changes}
    )


def test_the_full_path_runs_on_tiny_folders(hub, tmp_path):
    config = full(hub)
    task = experiments.load_task(config, tmp_path / "run")
    assert task.draw("teacher", rng(), 3).shape == (3, 16) and task.held.shape[1] == 16
    student = experiments.distil_on_text(config, task, "didi", 0, None, progress=False)
    measures = experiments.measure(config, task, student.net, 0, guide=student)
    assert measures["loss @ 4"] > 0 and measures["entropy @ 4"] > 0
    experiments.save_student(student.net, task.tokenizer, tmp_path / "student")
    again = load_mdlm(str(tmp_path / "student"))
    assert torch.equal(again.head.weight, student.net.head.weight)
    # what is visible decides: the network really reads the text
    z = torch.full((2, 16), 120)
    z[1, 0] = 5
    logits = md.logits_at(again, z, z == 120)
    assert (logits[0] - logits[-1]).abs().max() > 1e-6


def test_full_inputs_that_do_not_fit_are_one_line(hub, tmp_path):
    other = train_bpe(["other words entirely, of another text altogether"] * 4, 110)
    other.add_special_tokens({"eos_token": "Ċ"})
    other.save_pretrained(tmp_path / "other")
    (hub / "empty").mkdir()
    cases = [
        ({"tokenizer": str(tmp_path / "other")}, "made for 120 tokens and a mask, the tokenizer here has 110"),
        ({"data": str(hub / "empty")}, "is an empty folder"),
        ({"model": str(hub / "judge")}, "is no MDLM of this shape"),
    ]
    for changes, told in cases:
        with pytest.raises(WorkbenchError, match=told) as caught:
            experiments.load_task(full(hub, **changes), tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_the_bench_counts_tokens_passes_and_bytes(tmp_path):
    bench.bench(tmp_path, Config(**SMALL, length=16), count=4)
    with open(tmp_path / "sampling.csv", newline="") as file:
        rows = {(r["sampler"], r["nfe"]): r for r in csv.DictReader(file)}
    assert rows.keys() == {(s, n) for s in ("teacher", "student", "student, RGAS") for n in ("2", "4")}
    passes = ("student_passes", "critic_passes", "critic_backward")
    assert [rows["student", "4"][k] for k in passes] == ["4", "0", "0"]
    assert [rows["student, RGAS", "4"][k] for k in passes] == ["4", "6", "2"]  # 2 tilted, 1 step of 4 candidates
    assert all(float(r["tokens_a_second"]) > 0 and int(r["peak_bytes"]) > 0 for r in rows.values())
