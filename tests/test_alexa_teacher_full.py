"""The Alexa Teacher Model at the paper's sizes (meta device), on a user's own model and data, its bench and panels."""

import csv
import dataclasses
import json

import pytest
import torch

from workbench.config import override
from workbench.data.commands import sample, split_templates
from workbench.data.public_text import public_text
from workbench.data.utterances import annotated
from workbench.errors import WorkbenchError
from workbench.evaluation.claims import judge
from workbench.lab import alexa_teacher as panels
from workbench.models.encoders import build_encoder, encoder_config, load_encoder, parameter_counts, save_encoder
from workbench.papers import alexa_teacher as paper
from workbench.papers.alexa_teacher_bench import PlainTokenizer, encoder_cost
from workbench.papers.alexa_teacher_world import load_public, load_world, make_tokenizer
from workbench.training.record import Record

TINY = paper.Config(
    languages=("en", "es"), left_out="", vocabulary=800, pool=300, labels=24, test=12, teacher_size="mini-170M",
    intermediate_size="tiny", student_size="tiny", batch=12, stage1_steps=4, stage2_steps=4, student_steps=4,
    tune_steps=4, tune_batch=8, arms=("via intermediate",), frozen=(), workers=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("size", "million"),
    [("9.3B", 9260), ("2.3B", 2360), ("170M", 169.9), ("17M", 16.8), ("XLM-R Base", 85.1), ("DistilBERT", 42.5)],
)
def test_the_papers_sizes_without_memory(size, million):
    with torch.device("meta"):
        net = build_encoder(encoder_config(size, PlainTokenizer(150_000), context=512), 0)
    counts = parameter_counts(net)
    assert counts["non-embedding"] / 1e6 == pytest.approx(million, rel=0.01)
    width = net.config.hidden_size
    assert counts["total"] - counts["non-embedding"] > 150_000 * width  # at 17M the table outweighs the layers
    names = dict(net.named_modules())
    assert "roberta.encoder.LayerNorm" in names and "roberta.embeddings.LayerNorm" not in names
    assert "roberta.encoder.layer.0.attention.self_attn_layer_norm" in names  # before the sublayer


def test_unknown_sizes_and_languages_are_one_line():
    with pytest.raises(WorkbenchError, match="unknown encoder size '3B'"):
        encoder_config("3B", PlainTokenizer(300), context=8)
    with pytest.raises(WorkbenchError, match="left_out 'it' is none of several languages: en, es"):
        load_world(override(TINY, {"left_out": "it"}), 0)


def folder_of(path, utterances):
    path.mkdir()
    rows = [{"locale": f"{u.language}-XX", "partition": p, "utt": u.text, "annot_utt": annotated(u), "intent": u.intent}
            for p, us in utterances.items() for u in us]  # fmt: skip
    (path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's utterances, public text and masked-LM encoder with another tokenizer than ours."""
    root = tmp_path_factory.mktemp("own")
    split = split_templates(("en", "es"), 5, intents=4)
    known: set[str] = set()
    parts = {name: [u for x in ("en", "es") for u in sample(split, x, ("labelled",), "labelled", n, 1, known=known)]
             for name, n in (("train", 60), ("test", 15))}  # fmt: skip
    data = folder_of(root / "data", parts)
    (root / "public").mkdir()
    lines = [{"text": f"Public line {i}, at {i}:30.", "language": x} for i in range(1, 20) for x in ("en", "es")]
    (root / "public" / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    text = [" " + u.text for us in parts.values() for u in us]
    tokenizer = make_tokenizer(override(TINY, {"vocabulary": 600}), text)
    net = build_encoder(encoder_config("mini-170M", tokenizer, context=40), 3)
    save_encoder(net, tokenizer, root / "teacher")
    return {"data": data, "public": str(root / "public"), "teacher": str(root / "teacher")}


def test_the_same_study_on_a_users_model_and_data(own, tmp_path):
    config = override(TINY, own)
    measured = paper.study(config, tmp_path, Record(tmp_path), 0)
    arms = measured[0]["arms"]
    assert set(arms["via intermediate"]["tuned"]) == {"covered"}
    job = paper.Job(config, 0, tmp_path)
    student, tokenizer = load_encoder(str(job.model("via intermediate")))
    assert len(tokenizer) == 600 == student.config.vocab_size  # the user's tokenizer, not one of ours
    stage1 = load_encoder(str(job.model("stage 1")))[0]
    theirs = load_encoder(own["teacher"])[0]
    same = [torch.equal(a, b) for a, b in zip(stage1.parameters(), theirs.parameters(), strict=True)]
    assert all(same)  # it stands for stage 1 as it is; stage 2 went on from it
    stage2 = load_encoder(str(job.model("stage 2")))[0]
    assert not torch.equal(stage2.lm_head.dense.weight, theirs.lm_head.dense.weight)


def test_what_is_wrong_with_a_users_things_is_one_line(own, tmp_path):
    _, tokenizer = load_encoder(own["teacher"])
    net = build_encoder(encoder_config("tiny", PlainTokenizer(500), context=40), 0)
    save_encoder(net, tokenizer, tmp_path / "mixed")
    cases = {
        "teacher": (
            str(tmp_path / "mixed"),
            "its tokenizer has 600 tokens, the model 500 embeddings: another tokenizer",
        ),
        "data": (str(tmp_path), "model|column|could not be loaded"),
        "public": (own["data"], "no column 'text'"),
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jsonl").write_text("")
    cases["data "] = (str(tmp_path / "empty"), "is empty")
    for key, (value, line) in cases.items():
        with pytest.raises(WorkbenchError, match=line) as error:
            load_world(override(TINY, {**own, key.strip(): value}), 0)
        assert "\n" not in str(error.value)


def test_verdicts_flip_when_stage_2_reads_no_utterances(tmp_path):
    """The claim's own rule on three seeds of a tiny world: it can hold, and it cannot without in-domain text."""
    claim = next(c for c in paper.CLAIMS if c.id == "indomain_loss")
    claim = dataclasses.replace(claim, margin=-0.5)  # the desk's margin is for the desk's steps
    verdicts = {}
    public = public_text(("en", "es"), english=0, lines=40)
    for text in ("in-domain", "public"):
        config = override(FLIP, {"second_text": text})
        record = Record(tmp_path / text)
        paper.study(config, tmp_path / text, record, 300, public)
        verdicts[text] = judge(claim, record.records("result"))
    assert verdicts["in-domain"].verdict == "holds" and verdicts["public"].verdict == "does not hold"


FLIP = override(
    TINY,
    {"seeds": 3, "arms": ["stage 1 continued", "stage 2"], "stage1_steps": 10, "stage2_steps": 150, "batch": 24,
     "teacher_size": "tiny", "lr": 5e-3, "stage2_lr": 5e-3},
)  # fmt: skip


def test_the_bench_measures_teacher_and_students(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "workbench.papers.alexa_teacher_bench.encoder_cost", lambda sizes, **kw: encoder_cost(sizes, **kw, budget=0.02)
    )
    paper.bench(tmp_path)
    with open(tmp_path / "encoders.csv") as f:
        rows = {r["size"]: r for r in csv.DictReader(f)}
    assert list(rows) == ["mini-2.3B", "mini-170M", "mini-17M"]
    weights = [int(r["weight_bytes"]) for r in rows.values()]
    assert weights == sorted(weights, reverse=True) and all(int(r["tokens_per_second"]) > 0 for r in rows.values())
    assert all(int(r["activation_bytes"]) > 0 for r in rows.values()) and "tokens/s" in capsys.readouterr().out


def test_the_panels_draw_from_a_run(tmp_path):
    config = override(TINY, {"languages": ["en", "es"], "left_out": "es", "frozen": ["stage 2"], "label_counts": [8]})
    public = public_text(config.languages, english=0, lines=40)
    measured = paper.study(config, tmp_path, Record(tmp_path), 0, public)
    world = load_world(config, 0, public)
    job = paper.Job(config, 0, tmp_path)
    nets = {n: load_encoder(str(job.model(n)))[0].eval() for n in ("stage 2", "via intermediate")}
    models = {n: paper.fine_tune(config, world, net, seed=0, progress=False) for n, net in nets.items()}
    first = panels.mixture_view(world, alpha=1.0, share=0.0)
    second = panels.mixture_view(world, alpha=0.0, share=1.0)
    assert first.to_json() != second.to_json()
    assert "forty five" in panels.spoken_view("It is 45%", "en").to_json()
    a = panels.masked_view(nets, world, "turn on the light", "en", 2)
    assert a.to_json() != panels.masked_view(nets, world, "turn on the light", "en", 4).to_json()
    read = panels.understanding_view(models, world, "stage 2", "set the kitchen to 5", "en")
    assert len(read.data[1].x) == 5 and "kitchen" in read.to_json()
    confusion = panels.confusion_view(models, world, "stage 2", "covered", only=50)
    assert sum(map(sum, confusion.data[0].z)) == len(world.tests["covered"])
    assert panels.errors_view(measured, score="semer", test="left out").data
    assert panels.changes_view(measured, 0).data is not None and panels.losses_view(measured).data
    size = panels.size_view(measured, score="slots", test="covered", count="total")
    assert sorted(a.text for a in size.layout.annotations) == sorted(measured[0]["arms"])
    curve = panels.labels_view(measured, score="semer", test="covered", labels=24)
    assert {line.name: line.x for line in curve.data} == {"stage 2": (8, 24), "via intermediate": (8, 24)}
    assert curve.data[0].y[-1] == 100 * measured[0]["arms"]["stage 2"]["tuned"]["covered"]["semer"]
    assert len(panels.shapes_table().data[0].cells["values"][0]) == 7
    few = {0: {"arms": {"scratch": {"tuned": {}}}}}
    for draw, line in ((lambda: panels.labels_view(few, score="semer", test="covered", labels=24), "one number of"),
                       (lambda: panels.errors_view(measured, score="semer", test="x"), "no tuned encoders scored on"),
                       (lambda: panels.confusion_view(models, world, "stage 2", "x"), "no test set 'x'")):  # fmt: skip
        with pytest.raises(WorkbenchError, match=line):
            draw()


def test_names_of_equal_encoders_do_not_cover_each_other():
    """Eight encoders of one size with nearly one error: every name a line's height from the next, in their order."""
    arms = {
        name: {"tuned": {"covered": {"semer": 0.5 + 0.001 * i}}, "parameters": {"total": 100 if i else 900}}
        for i, name in enumerate(paper.ARMS)
    }
    figure = panels.size_view({0: {"arms": arms}}, score="semer", test="covered", count="total")
    low, high = figure.layout.yaxis.range
    # where a name stands, in pixels from below
    stands = sorted((380 * (a.y - low) / (high - low) - a.ay, a.y) for a in figure.layout.annotations if a.x == 2)
    assert all(b[0] - a[0] > 12 and b[1] > a[1] for a, b in zip(stands, stands[1:], strict=False))
    assert len(stands) == len(arms) - 1 and stands[-1][0] <= 380


def test_the_presets_are_runnable_configs():
    full = paper.PRESETS["full"]
    assert full.rate == 0.15 and full.teacher == "facebook/xlm-roberta-xl" and full.left_out in full.languages
    assert paper.PRESETS["desk"].seeds >= 3 and set(paper.PRESETS["quick"].arms) <= set(paper.PRESETS["desk"].arms)
    assert callable(load_public) and len({c.measure for c in paper.CLAIMS}) == len(paper.CLAIMS) >= 3
