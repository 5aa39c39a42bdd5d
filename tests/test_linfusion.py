"""LinFusion's layer against its definition, its distillation against its promises, its claims against a broken one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from workbench.errors import WorkbenchError
from workbench.evaluation.claims import judge
from workbench.evaluation.cost import cost, crossing, curve, exponent, peak_bytes
from workbench.models.diffusion import add_noise, target
from workbench.models.generalised_attention import (
    GeneralisedLinearAttention,
    Mixer,
    capture,
    replace_self_attention,
    scan,
    self_attentions,
    token_counts,
)
from workbench.papers import linfusion as paper
from workbench.training.record import Record

MIXERS = {
    "paper": Mixer(),
    "no normalisation": Mixer(normalise=False),
    "causal": Mixer(mixing="causal"),
    "causal, gated": Mixer(mixing="causal", gate=True),
    "causal, sums": Mixer(mixing="causal", normalise=False),
    "bi-directional": Mixer(mixing="bi-directional"),
    "bi-directional, gated": Mixer(mixing="bi-directional", gate=True),
    "relu, eps on sums": Mixer(phi="relu", eps_scale="sum"),
    "softmax features, no f', g'": Mixer(phi="softmax", rank=0),
    "random": Mixer(init="random"),
}


def layer_of(mixer, seed=0):
    torch.manual_seed(seed)
    layer = GeneralisedLinearAttention(Attention(24, heads=2, dim_head=12), mixer, count=100).double().eval()
    for name, p in layer.named_parameters():  # f' and g' start at zero: move them, so that they are tested too
        if name.startswith(("to_q_.3", "to_k_.3", "to_decay")):
            torch.nn.init.normal_(p, std=0.3)
    return layer


def tokens(n=70, seed=1):
    return torch.randn(2, n, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(layer, x):
    """The layer from its equations: every weight M_ij written out, nothing shared with the implementation."""
    m, n = layer.mixer, x.shape[1]
    phi = {"elu+1": lambda u: F.elu(u) + 1, "relu": F.relu, "softmax": lambda u: u.softmax(-1)}[m.phi]
    q_in = x if m.rank == 0 else x + layer.to_q_(x)
    k_in = x if m.rank == 0 else x + layer.to_k_(x)
    heads = []
    for h in range(2):
        part = slice(12 * h, 12 * (h + 1))
        q, k = phi(layer.to_q(q_in)[..., part]), phi(layer.to_k(k_in)[..., part])
        M = q @ k.mT
        if m.mixing != "non-causal":
            mask = torch.zeros(x.shape[0], n, n, dtype=x.dtype)
            a = torch.sigmoid(layer.to_decay(x))[..., h] if m.gate else torch.ones(x.shape[:2], dtype=x.dtype)
            for i in range(n):
                for j in range(n):
                    if j <= i:
                        mask[:, i, j] = a[:, j + 1 : i + 1].prod(1)
                    elif m.mixing == "bi-directional":
                        mask[:, i, j] = a[:, i:j].prod(1)  # the backward scan forgets by the gates of i .. j-1
            M = M * mask
        eps = m.eps * (n if m.eps_scale == "mean" else 1)
        M = M / (M.sum(-1, keepdim=True) + eps) if m.normalise else M / layer.count
        heads.append(M @ layer.to_v(x)[..., part])
    return layer.to_out[0](torch.cat(heads, -1))


@pytest.mark.parametrize("name", MIXERS)
def test_the_layer_is_its_definition(name):
    layer, x = layer_of(MIXERS[name]), tokens()
    with torch.no_grad():
        # S and s are kept in float32 or better, whatever comes in
        assert (layer(x) - by_definition(layer, x)).abs().max() < 1e-5
        q, k, v = layer.features(x)
        assert (layer.matrix(x) @ v - layer.mix(q, k, v, layer.decay(x))).abs().max() < 1e-5


@pytest.mark.parametrize("name", MIXERS)
def test_rows_sum_to_one_only_when_normalised(name):
    layer = layer_of(MIXERS[name])
    sums = layer.matrix(tokens()).sum(-1)
    if layer.mixer.normalise:
        assert (1 - sums).abs().max() < 5e-3 and (sums < 1).all()
    else:
        assert (sums - 1).abs().mean() > 0.1


def test_order_matters_to_the_causal_layer_alone():
    x, order = tokens(), torch.randperm(70, generator=torch.Generator().manual_seed(0))
    for name, same in (
        ("paper", True),
        ("no normalisation", True),
        ("causal", False),
        ("bi-directional, gated", False),
    ):
        layer = layer_of(MIXERS[name])
        gap = (layer(x[:, order]) - layer(x)[:, order]).abs().max()
        assert (gap < 1e-6) == same, name
    layer, changed = layer_of(MIXERS["causal"]), tokens()
    changed[:, 40:] += 1
    assert torch.allclose(layer(x)[:, :40], layer(changed)[:, :40])


def test_four_times_the_tokens_change_nothing_but_what_is_not_normalised():
    x = tokens()
    assert (layer_of(MIXERS["paper"])(x.repeat(1, 4, 1))[:, :70] - layer_of(MIXERS["paper"])(x)).abs().max() < 1e-6
    layer = layer_of(MIXERS["no normalisation"])
    one, four = layer.mix(*layer.features(x)), layer.mix(*layer.features(x.repeat(1, 4, 1)))[:, :, :70]
    assert torch.allclose(four, 4 * one)
    # eps added to a sum is another eps at every N
    summed = layer_of(Mixer(eps_scale="sum", eps=10.0))
    assert (summed(x.repeat(1, 4, 1))[:, :70] - summed(x)).abs().max() > 1e-4


def test_the_chunked_scan_is_the_recurrence_and_does_not_overflow():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 2, 150, 4, generator=g, dtype=torch.float64) for _ in range(3))
    log_decay = -20 * torch.rand(1, 2, 150, generator=g, dtype=torch.float64)
    state, rows = torch.zeros(1, 2, 4, 4, dtype=torch.float64), []
    for i in range(150):
        state = log_decay[:, :, i, None, None].exp() * state + k[:, :, i, :, None] * v[:, :, i, None, :]
        rows.append((q[:, :, i, None] @ state)[:, :, 0])
    assert torch.allclose(scan(q, k, v, log_decay), torch.stack(rows, 2))


@pytest.fixture(scope="module")
def task():
    return paper.load_task(paper.Config(), 0)


def test_a_fresh_student_is_the_teacher_with_another_feature_map(task):
    student = copy.deepcopy(task.unet)
    names = replace_self_attention(student)
    assert names == list(self_attentions(task.unet)) and all(n.endswith("attn1") for n in names)
    ours, theirs = student.get_submodule(names[0]), task.unet.get_submodule(names[0])
    keys = {k.rsplit(".", 1)[0] for k in ours.state_dict()}
    assert keys == {"to_q", "to_k", "to_v", "to_out.0"} | {f"to_{p}_.{i}" for p in "qk" for i in (0, 1, 3)}
    assert torch.equal(ours.to_q.weight, theirs.to_q.weight)
    x = torch.randn(1, 9, 24)
    assert ours.to_q_(x).eq(0).all() and ours.to_q_[0].weight.abs().max() > 0
    with pytest.raises(WorkbenchError, match="no softmax self-attention"):
        replace_self_attention(student)


def test_random_init_depends_on_its_seed(task):
    weights = []
    for seed in (1, 1, 2):
        unet = copy.deepcopy(task.unet)
        name = replace_self_attention(unet, Mixer(init="random"), seed=seed)[0]
        weights.append(unet.get_submodule(name).to_q.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], task.unet.get_submodule(name).to_q.weight)


def test_impossible_mixers_are_refused():
    with pytest.raises(WorkbenchError, match="order of the tokens"):
        Mixer(gate=True)
    with pytest.raises(WorkbenchError, match="count"):
        GeneralisedLinearAttention(Attention(24, heads=2, dim_head=12), Mixer(normalise=False))
    layer = layer_of(Mixer())
    with pytest.raises(WorkbenchError, match="no mask"):
        layer(tokens(), attention_mask=torch.ones(2, 70))


def test_token_counts(task):
    counts = token_counts(task.unet, torch.zeros(1, 3, 16, 16), torch.tensor([1]), **task.condition(1))
    assert sorted(counts.values()) == [64, 256, 256, 256]


def test_the_losses_by_hand(task):
    config = paper.Config()
    student, _ = paper.build_student(config, task, "paper", 0)
    batch = paper.noisy_batch(task, torch.Generator().manual_seed(0), 3, 12)
    losses = paper.compare(task, student, batch, {"simple": 1.0, "kd": 0.5, "feat": 0.25})
    z, t = add_noise(task.scheduler, batch["x0"], batch["noise"], batch["t"]), batch["t"]
    with torch.no_grad(), capture(task.unet) as theirs, capture(student) as ours:
        wanted = task.unet(z, t, **batch["condition"]).sample
        out = student(z, t, **batch["condition"]).sample
    simple = (target(task.scheduler, batch["x0"], batch["noise"], t) - out).square().mean()
    kd = (wanted - out).square().mean()
    layers = [(theirs[n] - ours[n]).square().mean() for n in self_attentions(student)]
    assert torch.allclose(losses["simple"], simple) and torch.allclose(losses["kd"], kd)
    assert torch.allclose(losses["feat_layers"], torch.stack(layers)) and len(layers) == 4
    assert torch.allclose(losses["loss"], simple + 0.5 * kd + 0.25 * sum(layers) / 4)


@pytest.mark.parametrize("variant", ["paper", "causal, gated", "no L_simple"])
def test_distillation_trains_the_new_layers_and_nothing_else(task, variant, tmp_path):
    config = paper.Config(steps=4, batch=4)
    before = {name: p.clone() for name, p in task.unet.state_dict().items()}
    student = paper.distil(config, task, variant, 7, Record(tmp_path), progress=False)
    assert all(torch.equal(p, before[name]) for name, p in task.unet.state_dict().items())
    after = student.unet.state_dict()
    for name, old in before.items():
        assert torch.equal(after[name], old) == (".attn1." not in name), name
    gates = {n for n in after if "to_decay" in n}
    fresh = {n for n in after if ".to_q_." in n or ".to_k_." in n}
    assert student.trained == sum(after[n].numel() for n in before if ".attn1." in n) + sum(
        after[n].numel() for n in fresh | gates
    )
    again = paper.distil(config, task, variant, 7, Record(tmp_path), progress=False)  # finished: loaded, not repeated
    assert all(torch.equal(p, after[name]) for name, p in again.unet.state_dict().items())


def test_distillation_brings_the_student_nearer(task):
    config = paper.Config(steps=12, batch=8, held_out=8)
    start = paper.build_student(config, task, "paper", 100)[0].eval()
    student = paper.distil(config, task, "paper", 100, progress=False).unet
    assert paper.held_out(config, task, student, 100, 1)["kd"] < 0.7 * paper.held_out(config, task, start, 100, 1)["kd"]


def test_teachers_are_real_and_missing_ones_are_told():
    for seed in (0, 1):
        task = paper.load_task(paper.Config(), seed)
        got = paper.held_out(paper.Config(held_out=16), task, task.unet, 5, 1)
        assert got["kd"] == 0 and got["simple"] < 0.2  # v has a variance of about 1: this network has learned
    with pytest.raises(WorkbenchError, match="teacher=train"):
        paper.load_task(paper.Config(teachers=9), 8)


def test_a_teacher_is_trained_here_on_request(tmp_path):
    config = paper.Config(teacher="train", teacher_steps=3, teachers=1)
    a, b = (paper.load_task(config, seed, tmp_path).unet.state_dict() for seed in (0, 5))
    assert all(torch.equal(a[name], b[name]) for name in a)  # one teacher, trained once
    assert not torch.equal(a["conv_in.weight"], paper.small_unet(seed=0).state_dict()["conv_in.weight"])


def tiny_study(folder, **changes):
    config = paper.Config(
        variants=("paper", "no normalisation"), seeds=3, batch=4, held_out=16, scales=(1, 2), samples=2,
        sample_steps=1, ranks=0, workers=1, **changes,
    )  # fmt: skip
    record = Record(folder)
    paper.study(config, folder, record, seed=110)
    return record.records("result")


def test_breaking_the_method_flips_the_verdict(tmp_path):
    claim = next(c for c in paper.CLAIMS if c.id == "normalisation")
    intact = judge(claim, tiny_study(tmp_path / "intact", steps=30))
    broken = judge(claim, tiny_study(tmp_path / "broken", steps=5, normalise=False))
    assert intact.verdict == "holds", intact
    assert broken.verdict == "does not hold", broken


def test_every_claim_is_measured_by_some_study():
    losses = {
        f"{k} x{s}": 1.0 for k in ("kd", "simple", "teacher_simple", "agreement", "teacher agreement") for s in (1, 2)
    }
    extra = {
        "kd x1 at step 0": 1.0,
        "patches": {"synchronous": 0.0, "stale": [2.0, 1.0]},
        "plug_in": {"teacher": 0.1, "teacher_adapted": 0.9, "student": 0.1, "student_adapted": 0.8},
    }
    values = paper.claim_values({v: losses | extra for v in paper.PRESETS["desk"].variants})
    timed = {"linear_exponent", "softmax_exponent", "naive_exponent"}
    assert set(values) | timed == {c.measure for c in paper.CLAIMS}
    assert values["plug_in"] == pytest.approx(0.875)


def test_cost_counts_and_fits():
    n = [1024, 2048, 4096]
    assert exponent(n, [3 * x**1.7 for x in n]) == pytest.approx(1.7)
    assert crossing([100, 1000, 10000], [2, 2, 2], [0.2, 2, 20]) == pytest.approx(1000)
    assert crossing([1, 2], [3, 3], [1, 2]) is None and crossing([5, 6], [1, 1], [2, 2]) == 5
    assert peak_bytes(lambda: torch.ones(256).exp_() + 1) == 2 * 1024
    rows = cost([64, 128], budget=0.0)
    tokens_, bytes_ = curve(rows, "softmax, naive", "bytes")
    assert bytes_[1] == 4 * bytes_[0] and tokens_ == [64, 128]
    assert curve(rows, "linear", "bytes")[1][1] < 3 * curve(rows, "linear", "bytes")[1][0]
