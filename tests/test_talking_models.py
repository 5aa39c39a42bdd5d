"""Talking Models: the exchange and its losses by hand, where gradients go, each trap, and a verdict that flips."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from workbench.errors import WorkbenchError
from workbench.evaluation.claims import judge
from workbench.losses.knowledge import correlation_distance, state_distance
from workbench.models.stages import Stages, resize_tokens
from workbench.papers import talking_models as paper
from workbench.papers import talking_models_study as study
from workbench.papers import talking_models_tasks as tasks
from workbench.training.record import Record

TINY = paper.Config(
    teacher_steps=3, steps=4, batch=8, workers=1, arms=("alone",), teacher_width=32, voice=16, message=8
)


def job(tmp_path, task="vision", arm="two-way", seed=100, **changes):
    return study.Job(replace(TINY, **changes), task, arm, seed, TINY.gap, tmp_path)


def pupil_of(tmp_path, task="vision", arm="two-way", double=False, **changes):
    """A pupil with fresh models, its task, and a batch of 8."""
    one = job(tmp_path, task, arm, **changes)
    data = tasks.load_task(one.config, task, one.seed)
    model = tasks.small_model(data, one.config.teacher_width, one.config.teacher_layers, one.config.patch, 5)
    pupil = study.build_pupil(one, data, Stages(model, one.config.teacher_low, one.config.teacher_high))
    return pupil, data, data.train.take(torch.arange(8))


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "low", "high"), [("vision", 0, 3), ("vision", 1, 2), ("ratings", 1, 3)])
def test_three_stages_are_the_model(task, low, high):
    data = tasks.load_task(TINY, task, 100)
    model = tasks.small_model(data, 32, 3, 4, 0).eval()
    inputs, _ = data.test.take(torch.arange(6))
    with torch.no_grad():
        assert torch.equal(Stages(model, low, high)(inputs), model(**inputs).logits)


def test_stages_refuse_what_they_cannot_cut():
    model = tasks.small_model(tasks.load_task(TINY, "vision", 100), 32, 2, 4, 0)
    for low, high in ((2, 2), (1, 3), (-1, 1)):
        with pytest.raises(WorkbenchError, match="lower state comes first"):
            Stages(model, low, high)
    with pytest.raises(WorkbenchError, match="not as Linear"):
        Stages(torch.nn.Linear(2, 2), 0, 1)


def test_tokens_are_resized_as_a_grid_and_the_class_token_stays():
    rows = torch.arange(4.0)[:, None] * torch.ones(4)  # a ramp down the grid
    state = torch.cat([torch.full((1, 1, 1), 9.0), rows.reshape(1, 16, 1)], 1)
    small = resize_tokens(state, 5)
    assert small[0, 0] == 9 and torch.allclose(small[0, 1:3], small[0, 1]) and small[0, 1] < small[0, 3]
    assert resize_tokens(state, None) is state and resize_tokens(state, 17) is state
    with pytest.raises(WorkbenchError, match="square grid"):
        resize_tokens(state, 4)


# --- distances: the collapse trap -------------------------------------------------------------------------------------


def test_correlation_distance_is_two_minus_twice_the_correlation():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 3, 4, generator=g) for _ in range(2))
    y = 0.5 * x + y
    wanted = [2 - 2 * torch.corrcoef(torch.stack([x[:, n, d], y[:, n, d]]))[0, 1] for n in range(3) for d in range(4)]
    assert correlation_distance(x, y).item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-3)
    assert correlation_distance(x, 3 - 7 * x).item() == pytest.approx(4, rel=1e-3)
    with pytest.raises(WorkbenchError, match="2 or more"):
        correlation_distance(x[:1], y[:1])


def test_states_that_say_the_same_of_every_example_agree_only_one_by_one():
    g = torch.Generator().manual_seed(0)
    constant = torch.randn(4, 8, generator=g).expand(16, 4, 8)
    x, y = (constant + 1e-2 * torch.randn(16, 4, 8, generator=g) for _ in range(2))
    assert state_distance(x, y) < 1e-3  # nothing is said, and all seems well
    assert correlation_distance(x, y) > 1


# --- the exchange -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_exchange_by_hand(tmp_path):
    pupil, _, (inputs, _) = pupil_of(tmp_path, rounds=2)
    S, T, vs, vt = pupil.student, pupil.teacher, pupil.voice_S, pupil.voice_T
    said = pupil.talk(inputs)
    state = S.low(inputs)
    for n in range(2):
        question = vs.encoder(state)
        reply = vt.encoder(T.mid(vt.decoder(question)))  # the teacher's OWN layers, on the question
        state = vs.decoder(reply)
        assert torch.equal(said.questions[n], question) and torch.equal(said.heard[n], state)
    assert torch.equal(said.b_S, S.mid(S.low(inputs))) and torch.equal(said.b_T, T.mid(T.low(inputs)))


@pytest.mark.parametrize("task", ["vision", "ratings"])
def test_the_losses_by_hand(tmp_path, task):
    pupil, _, (inputs, target) = pupil_of(tmp_path, task, w1=0.5, w2=0.25, w3=2.0)
    out, said = pupil((inputs, target)), pupil.talk(inputs)
    vs, vt, d = pupil.voice_S, pupil.voice_T, correlation_distance
    prediction = pupil.student.model(**inputs).logits
    own = F.cross_entropy(prediction, target) if task == "vision" else (prediction[:, 0] - target).square().mean()
    interact = d(said.b_S, said.heard[0])
    mc = d(vs.encode(said.a_S), vt.encode(said.a_T))

    def copied(state, voice):
        return (state - voice.decode(voice.encode(state))).square().mean() / state.var()

    sc = sum(copied(s, v) for s, v in [(said.a_S, vs), (said.b_S, vs), (said.a_T, vt), (said.b_T, vt)]) / 2
    for name, wanted in {"task": own, "interact": interact, "mc": mc, "sc": sc}.items():
        assert out[name].item() == pytest.approx(wanted.item(), rel=1e-4), name
    assert out["loss"].item() == pytest.approx((own + 0.5 * interact + 0.25 * mc + 2 * sc).item(), rel=1e-4)


def test_the_reply_depends_on_the_question_only_when_there_is_one(tmp_path):
    for arm, asked in (("two-way", True), ("one-way", False)):
        pupil, _, (inputs, _) = pupil_of(tmp_path, arm=arm)
        said = pupil.talk(inputs)
        first = pupil.student.model.vit.embeddings.patch_embeddings.projection.weight
        grads = torch.autograd.grad(said.replies[0].square().sum(), [first, pupil.voice_S.encoder[1].weight],
                                    allow_unused=True)  # fmt: skip
        assert all((g is not None and g.norm() > 0) == asked for g in grads), arm


def test_gradients_pass_through_the_frozen_teacher_and_leave_it_alone(tmp_path):
    pupil, _, batch = pupil_of(tmp_path, w1=1.0, w2=0.0, w3=0.0)
    pupil(batch)["loss"].backward()
    assert all(p.grad is None for p in pupil.teacher.parameters())
    assert pupil.voice_T.decoder[0].weight.grad.norm() > 0  # reached through mid_T
    adapting, _, batch = pupil_of(tmp_path, arm="adapting teacher")
    adapting(batch)["loss"].backward()
    middle = adapting.teacher.model.vit.layers[1].mlp
    assert all(p.grad is not None and p.grad.norm() > 0 for p in middle.parameters())


@pytest.mark.parametrize(("stop", "student", "path"), [("none", 1, 1), ("reply", 1, 0), ("student", 0, 1)])
def test_stopped_gradients_stop(tmp_path, stop, student, path):
    pupil, _, (inputs, _) = pupil_of(tmp_path, stop=stop)
    # the student's middle layer is reached through b_S alone, its decoder through b'_S alone
    weights = [next(pupil.student.model.vit.layers[1].parameters()), pupil.voice_S.decoder[0].weight]
    grads = torch.autograd.grad(pupil.interaction(pupil.talk(inputs)), weights, allow_unused=True)
    assert [int(g is not None and g.norm() > 0) for g in grads] == [student, path]


@torch.no_grad()
def test_an_echo_and_a_lecture_are_told_apart(tmp_path):
    for arm in ("two-way", "one-way"):
        pupil, data, _ = pupil_of(tmp_path, arm=arm)
        measures = study.message_measures(pupil.eval(), data, 64)
        said = pupil.talk(data.test.take(torch.arange(64))[0])
        assert measures["echo"] == pytest.approx(correlation_distance(said.b_S, said.heard[0]).item(), rel=1e-4)
        # the teacher's own reading is what a lecture says; an answer to an untrained question has little of it
        assert measures["lecture"] < 1e-6 if arm == "one-way" else measures["lecture"] > 0.5


def test_a_term_of_weight_zero_is_measured_and_not_trained_on(tmp_path):
    pupil, _, batch = pupil_of(tmp_path, arm="no MC", w1=0.0)
    out = pupil(batch)
    out["loss"].backward()
    assert out["mc"] > 0 and out["interact"] > 0
    assert out["loss"].item() == pytest.approx((out["task"] + pupil.setup.w3 * out["sc"]).item(), rel=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------


def test_arms_of_a_seed_share_student_teacher_and_batches(tmp_path):
    starts, teachers = [], []
    for arm in ("alone", "feature KD", "two-way", "random teacher"):
        one = job(tmp_path, arm=arm)
        data, teacher = study.load_job(one)
        starts.append(study.build_pupil(one, data, teacher).student.state_dict())
        teachers.append(teacher.state_dict())
    assert all(torch.equal(starts[0][k], s[k]) for s in starts for k in starts[0])
    assert all(torch.equal(teachers[0][k], t[k]) for t in teachers[:3] for k in teachers[0])
    weights = [k for k in teachers[0] if k.endswith("weight") and teachers[0][k].ndim > 1]
    assert not any(torch.equal(teachers[0][k], teachers[3][k]) for k in weights)
    draw = tasks.batches(data.train, 4)
    first, second = (draw(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("arm", "changes"), [("two-way", False), ("adapting teacher", True)])
def test_only_an_adapting_teacher_changes(tmp_path, arm, changes):
    one = job(tmp_path, arm=arm)
    data, teacher = study.load_job(one)
    before = copy.deepcopy(teacher.state_dict())
    pupil = study.train_student(one, data, teacher, progress=False)
    same = [torch.equal(before[k], v) for k, v in pupil.teacher.state_dict().items()]
    assert all(same) != changes


class Killed(Exception):
    pass


@pytest.mark.parametrize("arm", ["two-way", "adapting teacher"])
def test_a_killed_training_goes_on_bit_for_bit(tmp_path, arm):
    def train(folder):
        one = job(folder, "ratings", arm, save_every=2, rounds=2)
        data, teacher = study.load_job(one)
        return study.train_student(one, data, teacher, progress=False)

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train_interrupted(tmp_path / "cut", arm)
    assert (tmp_path / "cut" / "students").is_dir()
    again = train(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def train_interrupted(folder, arm):
    """The same training, killed in its third step, after the checkpoint of its second."""
    one = job(folder, "ratings", arm, save_every=2, rounds=2)
    data, teacher = study.load_job(one)
    pupil = study.build_pupil(one, data, teacher)
    calls, forward = [], type(pupil).forward

    def dying(self, batch):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pupil), "forward", dying)
        study.train_student(one, data, teacher, progress=False)


@pytest.mark.parametrize(("task", "opener", "key"), [
    ("vision", AutoModelForImageClassification, "pixel_values"),
    ("ratings", AutoModelForSequenceClassification, "input_ids"),
])  # fmt: skip
def test_the_student_alone_is_a_folder_that_transformers_opens(tmp_path, task, opener, key):
    one = job(tmp_path, task)
    measures = study.measure_student(one)
    folder = tmp_path / "students" / one.name / "student"
    model = opener.from_pretrained(folder)
    data = tasks.load_task(one.config, task, one.seed)
    inputs, target = data.test.take(torch.arange(len(data.test)))
    # the stored student knows neither voices nor teacher, so what was measured cannot have used a message
    assert {n.split(".")[0] for n, _ in model.named_parameters()} <= {"vit", "bert", "classifier"}
    with torch.no_grad():
        logits = model.eval()(**{key: inputs[key]}).logits
    assert paper.prediction_error(logits, target) == pytest.approx(measures["error"], abs=1e-6)


def test_errors_by_hand():
    assert paper.prediction_error(torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 2.0])) == pytest.approx(2.5**0.5)
    assert paper.prediction_error(torch.tensor([[1.0, 0], [0, 1], [2, 0]]), torch.tensor([0, 0, 0])) == pytest.approx(
        1 / 3
    )
    flat = torch.zeros(100, 5)
    flat[:, 2] = torch.arange(100.0)
    assert paper.effective_rank(flat) == pytest.approx(1, abs=1e-6)
    assert paper.effective_rank(torch.eye(4).repeat(10, 1)) == pytest.approx(3, rel=1e-3)


def test_the_probe_is_sklearns_and_reads_a_teacher(tmp_path):
    data = tasks.load_task(TINY, "vision", 100)
    teacher = Stages(tasks.small_model(data, 32, 3, 4, 0), 1, 3).eval()
    probe = tasks.fit_probe(teacher, data)
    states, target = tasks.states_of(teacher, data.train)
    x = states.mean(1).double()
    z = (x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-6)
    wanted = LogisticRegression(C=0.1, max_iter=500).fit(z, target).decision_function(z)
    assert torch.allclose(probe(x.float()).double(), torch.from_numpy(wanted), atol=1e-2)
    assert (probe(x.float()).argmax(1) == target).float().mean() > 0.5  # chance is 0.1
    ratings = tasks.load_task(TINY, "ratings", 100)
    reader = Stages(tasks.small_model(ratings, 32, 3, 4, 0), 1, 3).eval()
    states, stars = tasks.states_of(reader, ratings.train)
    assert (tasks.fit_probe(reader, ratings)(states.mean(1))[:, 0] - stars).square().mean() < stars.var()


# --- claims -----------------------------------------------------------------------------------------------------------


def tiny_study(folder, **changes):
    config = replace(TINY, tasks=("vision",), arms=("two-way", "no MC"), seeds=3, steps=60, batch=24, w1=0.0, w2=1.0,
                     w3=0.1, gaps=(), **changes)  # fmt: skip
    record = Record(folder)
    study.run_study(config, record, 10)
    return record.records("result")


def test_without_message_consistency_the_verdict_flips(tmp_path):
    claim = next(c for c in paper.CLAIMS if c.id == "consistency_vision")
    intact = judge(claim, tiny_study(tmp_path / "intact"))
    broken = judge(claim, broken_study(tmp_path / "broken"))
    assert intact.verdict == "holds", intact
    assert broken.verdict == "does not hold", broken


def broken_study(folder):
    """The same study whose "two-way" arm has lost L_MC."""
    with pytest.MonkeyPatch.context() as patch:
        whole = paper.Config.setup
        patch.setattr(paper.Config, "setup", lambda self, task, arm: replace(whole(self, task, arm), w2=0.0))
        return tiny_study(folder)


def test_every_claim_is_measured_by_some_study():
    config = paper.PRESETS["desk"]
    measures = {"error": 0.5, "mc": 0.2, "sc": 0.1, "teacher before": 0.1, "teacher after": 0.3}
    arms = {"two-way": 0.25, "alone": 0.75, "logit KD": 0.625}
    known = {
        (task, gap, arm, 0): measures | {"error": arms.get(arm, 0.5) - (0.125 if gap == 0 and arm == "logit KD" else 0)}
        for task in config.tasks
        for gap in tasks.at_gaps(config)
        for arm in {*config.arms, *config.gap_arms}
    }
    values = study.claim_values(known, config, 0)
    assert {c.measure for c in paper.CLAIMS} <= set(values)
    assert values["wording_vision"] == values["decoding_vision"] == -values["rounds_vision"] == 0.25
    assert values["over_kd_ratings"] == 0.375 and values["kd_gain_vision"] == 0.125
    assert values["gap_ratings"] == 0.125 and values["forgetting_vision"] == pytest.approx(0.2)
    assert study.claim_values({}, config, 0) == {}


def test_each_arm_has_its_own_tuned_knobs_unless_told_otherwise():
    for task, tuned in paper.TUNED.items():
        for arm, (weights, rate) in tuned.items():
            setup = paper.Config().setup(task, arm)
            given = (setup.w1, setup.w2, setup.w3) if setup.method == "messages" else (setup.kd,) * len(weights)
            assert (given, setup.lr) == (weights, rate), (task, arm)
        told = paper.Config(lr=0.5, kd=7.0, w2=0.25)
        assert {told.setup(task, arm).lr for arm in tuned} == {0.5}
        assert told.setup(task, "logit KD").kd == 7 and told.setup(task, "one-way").w2 == 0.25
        assert told.setup(task, "alone").kd == 0
        # an ablation differs from the full method in what it is named after alone
        full = paper.Config().setup(task, "two-way")
        for arm, change in (("no MC", {"w2": 0.0}), ("no SC", {"w3": 0.0}), ("3 rounds", {"rounds": 3})):
            assert paper.Config().setup(task, arm) == replace(full, **change)


def test_without_state_consistency_messages_do_not_give_states_back(tmp_path):
    config = replace(TINY, tasks=("vision",), arms=("two-way", "no SC"), seeds=3, steps=60, batch=24, w1=0.1, w2=1.0,
                     w3=1.0, gaps=())  # fmt: skip
    record = Record(tmp_path)
    study.run_study(config, record, 10)
    claim = next(c for c in paper.CLAIMS if c.id == "copies_vision")
    assert judge(claim, record.records("result")).verdict == "holds"
