"""The Alexa Teacher Model's losses, stages and fine-tuning; each trap has a test, each verdict can be flipped."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from workbench.config import override
from workbench.data.public_text import public_text
from workbench.errors import WorkbenchError
from workbench.evaluation.claims import judge
from workbench.models.encoders import (
    IntentSlotModel,
    MaskedEncoder,
    build_encoder,
    encoder_config,
    encoder_of,
    intent_slot_loss,
    parameter_counts,
)
from workbench.papers import alexa_teacher as paper
from workbench.papers.alexa_teacher_world import load_world
from workbench.training.record import Record

CONFIG = paper.Config(
    languages=("en", "es"), left_out="es", vocabulary=800, pool=400, labels=40, test=20, teacher_size="mini-170M",
    intermediate_size="tiny", student_size="tiny", batch=16, stage1_steps=6, stage2_steps=6, student_steps=6,
    tune_steps=6, tune_batch=8, workers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def public():
    return public_text(CONFIG.languages, english=0, lines=60)


@pytest.fixture(scope="module")
def world(public):
    return load_world(CONFIG, 0, public)


def encoder(world, size="tiny", seed=0, **kw):
    return build_encoder(encoder_config(size, world.tokenizer, context=40, **kw), seed)


def batch_of(world, seed=0, text="in-domain", size=6):
    config = override(CONFIG, {"batch": size})
    return world.batches(config, text)(torch.Generator().manual_seed(seed))


def by_hand(net, batch):
    """All logits (B, T, V) of the plain transformers model, in float64."""
    net = copy.deepcopy(net).double()
    return net(input_ids=batch["ids"], attention_mask=batch["attention"]).logits


def test_the_losses_by_definition(world):
    student, teacher, batch = encoder(world, spread=0.3), encoder(world, "mini-170M", 1, spread=0.3), batch_of(world)
    config = override(CONFIG, {"mlm": 0.3, "tau": 2.0})
    losses = paper.pretraining_losses(MaskedEncoder(student), MaskedEncoder(teacher), batch, config)
    with torch.no_grad():
        z, wanted = by_hand(student, batch), by_hand(teacher, batch)
    mlm, soft, entropy = [], [], []
    for b, t in batch["chosen"].nonzero().tolist():
        mlm.append(-z[b, t].log_softmax(-1)[batch["targets"][b, t]])
        q, p = (wanted[b, t] / 2).softmax(-1), (z[b, t] / 2).log_softmax(-1)
        soft.append(-4 * (q * p).sum())  # the paper's soft cross-entropy, times tau^2
        entropy.append(-4 * (q * q.log()).sum())
    assert losses["mlm"].item() == pytest.approx(torch.stack(mlm).mean().item(), rel=1e-4)
    assert losses["soft"].item() == pytest.approx((torch.stack(soft) - torch.stack(entropy)).mean().item(), rel=1e-3)
    assert losses["loss"].item() == pytest.approx(0.3 * losses["mlm"].item() + 0.7 * losses["soft"].item(), rel=1e-5)


def test_the_gradient_is_the_soft_cross_entropys(world):
    student, teacher, batch = encoder(world), encoder(world, "mini-170M", 1, spread=0.3), batch_of(world)
    paper.pretraining_losses(MaskedEncoder(student), MaskedEncoder(teacher), batch, override(CONFIG, {"mlm": 0.0}))[
        "loss"
    ].backward()
    ours = student.lm_head.dense.weight.grad.clone()
    student.zero_grad()
    z = student(input_ids=batch["ids"], attention_mask=batch["attention"]).logits[batch["chosen"]]
    with torch.no_grad():
        q = teacher(input_ids=batch["ids"], attention_mask=batch["attention"]).logits[batch["chosen"]].softmax(-1)
    F.cross_entropy(z, q).backward()
    assert torch.allclose(ours, student.lm_head.dense.weight.grad, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_padding_and_unchosen_positions_change_nothing(world):
    net, batch = encoder(world, spread=0.3), batch_of(world)
    wide = {k: F.pad(v, (0, 5), value=world.vocabulary.pad if k in ("ids", "targets") else 0) for k, v in batch.items()}
    one, two = (paper.pretraining_losses(MaskedEncoder(net), None, b, CONFIG)["loss"] for b in (batch, wide))
    assert one.item() == pytest.approx(two.item(), rel=1e-5)
    other = {**batch, "targets": torch.where(batch["chosen"], batch["targets"], 5)}
    assert torch.equal(paper.pretraining_losses(MaskedEncoder(net), None, other, CONFIG)["loss"], one)


def test_hidden_states_are_matched_layer_by_layer_when_asked(world):
    assert (
        paper.layer_map(2, 3) == [0, 2]
        and paper.layer_map(4, 30) == [6, 14, 21, 29]
        and paper.layer_map(3, 3) == [0, 1, 2]
    )
    student, teacher, batch = encoder(world), encoder(world, "mini-2.3B", 1), batch_of(world)
    s, t = MaskedEncoder(student, hidden=True, teacher_width=64), MaskedEncoder(teacher, hidden=True)
    losses = paper.pretraining_losses(s, t, batch, override(CONFIG, {"hidden": 0.5}))
    with torch.no_grad():
        h = student.base_model(batch["ids"], batch["attention"], output_hidden_states=True).hidden_states[1:]
        g = teacher.base_model(batch["ids"], batch["attention"], output_hidden_states=True).hidden_states[1:]
        pairs = zip(h, paper.layer_map(len(h), len(g)), s.projections, strict=True)
        by_definition = sum(
            (p(x[batch["chosen"]]) - g[k][batch["chosen"]]).square().mean(-1).mean() for x, k, p in pairs
        )
    assert losses["hidden"].item() == pytest.approx(by_definition.item(), rel=1e-4)
    plain = paper.pretraining_losses(s, t, batch, CONFIG)["loss"]
    assert losses["loss"].item() == pytest.approx(plain.item() + 0.5 * by_definition.item(), rel=1e-4)


def test_the_teacher_is_in_eval_mode_and_left_as_it_was(world):
    """The classic bug, dropout in the teacher, is a switch here: it changes what the student learns."""
    teacher = encoder(world, "mini-170M", 1, dropout=0.3).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    nets = {}
    for mode in ("eval", "eval", "train"):
        config = override(CONFIG, {"teacher_mode": mode})
        net = paper.pretrain(config, world, "direct", encoder(world), teacher, seed=3, progress=False)
        nets.setdefault(mode, []).append(net.lm_head.dense.weight.detach())
    assert torch.equal(*nets["eval"]) and not torch.equal(nets["eval"][0], nets["train"][0])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_another_vocabulary_is_refused(world):
    config = encoder_config("tiny", world.tokenizer, context=40)
    config.vocab_size += 7
    with pytest.raises(WorkbenchError, match="the teacher has 807 tokens, the student 800: [^\n]*one vocabulary$"):
        paper.pretrain(CONFIG, world, "direct", encoder(world), build_encoder(config, 0), seed=0)


def test_arms_read_the_same_batches_for_the_same_steps(world, monkeypatch):
    seen = {}

    def spy(model, loss_fn, batch_fn, recipe, *, name, **kw):
        seen[name] = (batch_fn, recipe)

    monkeypatch.setattr(paper, "fit", spy)
    nets = {}
    for name in paper.needed(tuple(paper.ARMS)):
        nets[name] = paper.train_arm(CONFIG, world, name, nets, seed=4)
    recipes = [seen[n][1] for n in ("direct", "stage 1 teacher", "MLM alone", "via intermediate", "public text")]
    assert all(r == recipes[0] for r in recipes)
    assert seen["stage 2"][1] == seen["stage 1 continued"][1]  # more steps alone are no gain of stage 2
    for pair in (("direct", "stage 1 teacher"), ("direct", "MLM alone"), ("public text", "stage 1 student")):
        a, b = (seen[n][0](torch.Generator().manual_seed(5)) for n in pair)
        assert all(torch.equal(a[k], b[k]) for k in a), pair
    assert seen["written student"][0].share == 0 and seen["spoken student"][0].share == 1
    # students start from the same weights: nothing but the teacher differs
    first = [nets[n].lm_head.dense.weight for n in ("direct", "MLM alone", "scratch")]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])


def test_what_an_arm_needs_comes_before_it():
    assert paper.needed(("via intermediate",)) == ["stage 1", "stage 2", "intermediate", "via intermediate"]
    order = paper.needed(tuple(paper.ARMS))
    for i, name in enumerate(order):
        for other in (paper.ARMS[name].start, paper.ARMS[name].teacher):
            assert other is None or order.index(other) < i


def test_max_pooling_never_reads_padding(world):
    data = world.encoded["covered"]
    for pooling in ("max", "first"):
        torch.manual_seed(0)
        model = IntentSlotModel(encoder_of(encoder(world, spread=0.3)), 5, 7, hidden=8, pooling=pooling).eval()
        lengths = (data.ids != world.vocabulary.pad).sum(1)
        short = int(lengths.argmin())
        ids = data.ids[short : short + 1]
        with torch.no_grad():
            wide = model(ids, (ids != world.vocabulary.pad).long())
            tight = model(ids[:, : lengths[short]], torch.ones(1, lengths[short], dtype=torch.long))
        assert torch.allclose(wide[0], tight[0], atol=1e-5)


def test_the_joint_loss_by_hand():
    g = torch.Generator().manual_seed(0)
    intent, slot = torch.randn(2, 3, generator=g), torch.randn(2, 4, 5, generator=g)
    tags = torch.tensor([[-100, 2, -100, 0], [-100, 4, 1, -100]])
    losses = intent_slot_loss(intent, slot, torch.tensor([2, 0]), tags, 4.0)
    of_intent = -(intent.log_softmax(-1)[0, 2] + intent.log_softmax(-1)[1, 0]) / 2
    p = slot.log_softmax(-1)
    of_slot = -(p[0, 1, 2] + p[0, 3, 0] + p[1, 1, 4] + p[1, 2, 1]) / 4
    assert losses["loss"].item() == pytest.approx((of_intent + 4 * of_slot).item(), rel=1e-6)


def test_a_frozen_encoder_stays_and_an_unfrozen_one_moves(world):
    net = encoder(world, dropout=0.2)
    before = {k: v.clone() for k, v in encoder_of(net).state_dict().items()}
    for frozen in (True, False):
        model = paper.fine_tune(CONFIG, world, net, seed=0, frozen=frozen, progress=False)
        same = [torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items()]
        assert all(same) if frozen else not all(same)
        assert model.train().encoder.training != frozen  # a frozen encoder has no dropout
    assert all(torch.equal(v, before[k]) for k, v in encoder_of(net).state_dict().items())  # a copy was tuned


def test_fewer_labels_are_the_first_of_each_language(world, monkeypatch):
    """The curve over labels: a small set lies inside every larger one, and nothing else about a batch differs."""
    seen = {}

    def spy(model, loss_fn, batch_fn, recipe, *, name, **kw):
        seen[name] = ({tuple(row) for s in range(30) for row in rows(batch_fn, s)}, recipe)

    def rows(batch_fn, s):
        return [[i for i in row if i != pad] for row in batch_fn(torch.Generator().manual_seed(s))["ids"].tolist()]

    monkeypatch.setattr(paper, "fit", spy)
    pad, data = world.vocabulary.pad, world.encoded["labelled"]
    for count in (5, 12, None):
        paper.fine_tune(CONFIG, world, encoder(world), seed=0, labels=count, name=str(count))
    allowed = {tuple(i for i in row if i != pad) for row in data.ids[:5].tolist()}  # one language has labels here
    assert seen["5"][0] == allowed < seen["12"][0] < seen["None"][0]
    assert seen["5"][1] == seen["None"][1]


def test_several_fine_tunings_are_averaged_and_differ(world):
    """Other heads and batches each time, the same for every encoder; the first is the one a reader sees."""
    net = encoder(world)
    one, two = (
        paper.tuned_scores(override(CONFIG, {"tunes": n}), world, net, seed=0, name="x")["covered"] for n in (1, 2)
    )
    models = [paper.fine_tune(CONFIG, world, net, seed=s, progress=False) for s in (0, 1000)]
    alone = [paper.evaluate(m, world)["covered"] for m in models]
    assert one.scores() == alone[0].scores() != alone[1].scores()
    assert two.semer == pytest.approx((alone[0].semer + alone[1].semer) / 2)


def test_students_take_their_own_rate(world, monkeypatch):
    rates = {}
    monkeypatch.setattr(paper, "fit", lambda m, f, b, recipe, *, name, **kw: rates.update({name: recipe.lr}))
    config = override(CONFIG, {"lr": 1e-3, "stage2_lr": 2e-3, "student_lr": 3e-3})
    for name in ("stage 1", "stage 2", "stage 2 alone", "intermediate", "MLM alone", "public text"):
        paper.pretrain(config, world, name, encoder(world), seed=0)
    assert list(rates.values()) == [1e-3, 2e-3, 1e-3, 3e-3, 3e-3, 3e-3]


def test_distillation_resumes_bit_equal(world, tmp_path):
    teacher = encoder(world, "mini-170M", 1)

    class Killed(Exception):
        pass

    def kill(step, logged):
        if step == 4:
            raise Killed

    config = override(CONFIG, {"save_every": 2, "hidden": 0.1})

    def run(folder, **kw):
        return paper.pretrain(
            config, world, "direct", encoder(world), teacher, seed=2, record=Record(folder), progress=False, **kw
        )

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        # log_every is 10: the callback comes at the last step only, so the kill is put into the batches
        broken = copy.copy(world)
        calls = iter(range(10))

        def batches(*args):
            draw = world.batches(*args)

            def one(generator):
                if next(calls) == 3:
                    raise Killed
                return draw(generator)

            return one

        object.__setattr__(broken, "batches", batches)
        paper.pretrain(
            config, broken, "direct", encoder(world), teacher, seed=2, record=Record(tmp_path / "cut"), progress=False
        )
    again = run(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def run(public, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = override(CONFIG, {"arms": ["stage 1 continued", "via intermediate", "scratch"], "frozen": ["stage 2"],
                               "label_counts": [10, 40], "label_arms": ["stage 2"]})  # fmt: skip
    record = Record(folder)
    measured = paper.study(config, folder, record, 7, public)
    return config, folder, record, measured


def test_a_study_measures_saves_and_is_not_repeated(run, public):
    config, folder, record, measured = run
    arms = measured[7]["arms"]
    assert set(arms) == {"stage 1", "stage 1 continued", "stage 2", "intermediate", "via intermediate", "scratch"}
    assert set(arms["stage 2"]["tuned"]) == {"covered", "novel", "left out"} == set(arms["stage 2"]["frozen"])
    assert "frozen" not in arms["scratch"] and arms["scratch"]["parameters"]["non-embedding"] < 5000
    # fewer labels than all, and no second training on all of them
    assert list(arms["stage 2"]["labels"]) == ["10"] and "labels" not in arms["scratch"]
    assert set(arms["stage 2"]["labels"]["10"]) == {"covered", "novel", "left out"}
    low, high = measured[7]["changes"]["stage 2 / stage 1 continued"]
    assert low <= high
    results = {r["measure"] for r in record.records("result")}
    assert {"stage2_intent", "student_beats_teacher", "transfer"} <= results and "distilled" not in results
    before = len(record.records())
    assert paper.study(config, folder, record, 7, public) == measured and len(record.records()) == before


def test_every_encoder_opens_without_the_workbench(run, world):
    config, folder, _, _ = run
    job = paper.Job(config, 7, folder)
    for name in ("stage 2", "via intermediate"):
        net, tokenizer = (c.from_pretrained(job.model(name)) for c in (AutoModelForMaskedLM, AutoTokenizer))
        assert (job.model(name) / "model.safetensors").exists() and not list(job.model(name).glob("*.bin"))
        text = f"turn on the kitchen {tokenizer.mask_token}"
        out = net(**tokenizer(text, return_tensors="pt")).logits
        assert out.shape[-1] == len(tokenizer) == 800 and torch.isfinite(out).all()
        assert net.config.model_type == "xlm-roberta-xl"  # pre-layernorm
        ids = world.tokenizer(["turn on the light"])["input_ids"][0]
        assert (ids[0], ids[-1]) == (world.tokenizer.bos_token_id, world.tokenizer.eos_token_id)
    net = AutoModelForMaskedLM.from_pretrained(job.model("via intermediate"))
    model = paper.fine_tune(
        config,
        paper.load_world(config, 7, public_text(config.languages, english=0, lines=60)),
        net,
        seed=7,
        progress=False,
    )
    own = paper.save_understanding(model, world, folder / "understanding")
    opened = AutoModel.from_pretrained(own)
    batch = world.tokenizer("stop the timer", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(opened(**batch).last_hidden_state, model.encoder(**batch).last_hidden_state)
    assert (own / "heads.safetensors").exists() and "HassTurnOn" in (own / "labels.json").read_text()


def test_a_sentence_is_parsed(world):
    model = paper.fine_tune(CONFIG, world, encoder(world), seed=0, progress=False)
    read = paper.parse(model, world, "Set the kitchen light to 45%!", "en")
    assert read["words"] == ("set", "the", "kitchen", "light", "to", "forty", "five", "percent")
    assert read["intent"].sum().item() == pytest.approx(1) and read["slots"].shape[0] == 8 == len(read["tags"])
    for text, line in (("?!", "at least one word"), ("word " * 60, "the encoder takes")):
        with pytest.raises(WorkbenchError, match=line):
            paper.parse(model, world, text, "en")


# --- verdicts that flip ---------------------------------------------------------------------------------------------


def verdicts(config, public, folder, seeds=3):
    record = Record(folder)
    paper.study(override(config, {"seeds": seeds}), folder, record, 200, public)
    records = record.records("result")
    return {claim.id: judge(claim, records).verdict for claim in paper.CLAIMS}


def test_counts_are_taken_twice(world):
    net = encoder(world, "mini-170M")
    counts = parameter_counts(net)
    d = 40
    layer = 4 * (d * d + d) + 2 * d * 4 * d + 4 * d + d + 4 * d  # attention, feed-forward, two norms
    assert counts["non-embedding"] == layer + 2 * d
    assert counts["total"] == counts["non-embedding"] + 800 * d + net.config.max_position_embeddings * d + d + (
        d * d + d + 2 * d + 800
    ) + net.lm_head.bias.numel() * (net.lm_head.bias is not net.lm_head.decoder.bias)  # fmt: skip
