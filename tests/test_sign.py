"""SIGN's method: terms and their gradients, cost by count, resume with the online score, a broken method that flips."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel

from workbench.config import override
from workbench.errors import WorkbenchError
from workbench.evaluation.claims import judge
from workbench.lab import sign as panels
from workbench.models.edm import Denoiser, small_unet
from workbench.models.idempotent import load, save
from workbench.papers import sign as paper
from workbench.papers import sign_study as studies
from workbench.papers.sign_settings import TERMS
from workbench.training import checkpoint
from workbench.training.loop import step_seed
from workbench.training.record import Record

TINY = {
    "steps": 6, "batch": 4, "plane_steps": 60, "plane_batch": 32, "teacher_steps": 4, "teacher_batch": 8, "pairs": 32,
    "pair_steps": 3, "classifier_steps": 20, "samples": 40, "workers": 1,
}  # fmt: skip


def config(**changes):
    return paper.Config(**{**TINY, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sign")


@pytest.fixture(scope="module")
def plane(folder):
    return paper.plane_world(config(), folder, progress=False)


@pytest.fixture(scope="module")
def images(folder):
    return paper.image_world(config(), 0, folder, progress=False)


def parts_of(world, c, name="sign"):
    arm = c.arm(name)
    f, fake = paper.build_student(world, c, arm, 0), world.start.copy()
    batch = paper.draw_batch(world, c, torch.Generator().manual_seed(0), 16)
    return f, fake, batch, arm


def test_the_loss_is_the_weighted_sum_of_its_terms(plane):
    weights = dict(zip(TERMS[:-1], (1.0, 2.0, 3.0, 0.5, 0.25, 1.5), strict=True))
    c = config(**weights)
    f, fake, batch, arm = parts_of(plane, c)
    out = paper.losses(plane, f, fake, batch, arm, c)
    assert set(out) == {"loss", *weights}
    assert out["loss"].item() == pytest.approx(sum(w * out[name].item() for name, w in weights.items()), rel=1e-5)
    # by hand, one network call a term
    fx, fz = f(batch["x"]), f(batch["z"])
    assert out["rec"].item() == pytest.approx((fx - batch["x"]).square().mean().item(), rel=1e-4)
    assert out["idem"].item() == pytest.approx((f(fz) - fz).square().mean().item(), rel=1e-4)
    assert out["reg"].item() == pytest.approx((f(batch["pair_z"]) - batch["pair_x"]).square().mean().item(), rel=1e-4)
    noisy = batch["x"] + batch["denoise_sigma"][:, None] * batch["denoise_noise"]
    assert out["denoise"].item() == pytest.approx((f(noisy) - batch["x"]).square().mean().item(), rel=1e-4)
    high, low = paper.trajectory(plane, batch, c)
    assert out["flow"].item() == pytest.approx((f(high) - f(low)).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("term", TERMS[:-1])
def test_every_term_can_be_zero_and_is_then_not_computed(plane, term):
    c = config(**{term: 0.0})
    f, fake, batch, arm = parts_of(plane, c)
    out = paper.losses(plane, f, fake, batch, arm, c)
    assert set(out) == {"loss", *TERMS[:-1]} - {term}
    alone = paper.losses(plane, f, fake, batch, config(**{t: float(t == term) for t in TERMS[:-1]}).arm("sign"), c)
    assert set(alone) == {"loss", term} and torch.isfinite(alone["loss"])


def test_gradients_stay_out_of_the_teacher_and_of_the_online_score(images):
    c = config()
    f, fake, batch, arm = parts_of(images, c)
    teacher = images.teacher.requires_grad_(True)
    try:
        paper.losses(images, f, fake, batch, arm, c)["loss"].backward()
        for network in (teacher, fake):
            assert all(p.grad is None for p in network.parameters())
        assert all(p.grad is not None for p in f.parameters())
        # the online score's own loss moves it and nothing else
        f.zero_grad(set_to_none=True)
        paper.fake_loss(f, fake, batch, 1.0)["loss"].backward()
        assert all(p.grad is None for p in f.parameters())
        assert all(p.grad is not None for p in fake.parameters())
    finally:
        teacher.requires_grad_(False)


def test_what_flows_into_f_from_the_flow_term_comes_from_its_first_point_only(plane):
    c = config(**{t: float(t == "flow") for t in TERMS[:-1]})
    f, fake, batch, arm = parts_of(plane, c)
    paper.losses(plane, f, fake, batch, arm, c)["loss"].backward()
    got = [p.grad.clone() for p in f.parameters()]
    high, low = paper.trajectory(plane, batch, c)
    f.zero_grad()
    (f(high) - f(low).detach()).square().mean().backward()
    for a, p in zip(got, f.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arm", "changes", "wanted"),
    [
        # f on x, z, pair, x_{n+1}, noisy, then f' twice; s_fake's own update needs f(z) once more
        ("sign", {}, {"student": 8, "teacher": 2, "s_fake": 2}),
        ("sign", {"heun": True, "fake_steps": 3}, {"student": 10, "teacher": 3, "s_fake": 4}),
        ("ign", {}, {"student": 4, "teacher": 0, "s_fake": 0}),
        ("regression", {}, {"student": 1, "teacher": 0, "s_fake": 0}),
        ("no dmd", {}, {"student": 7, "teacher": 1, "s_fake": 0}),
    ],
)
def test_evaluations_are_counted_for_every_method(images, arm, changes, wanted):
    got = paper.evaluations_per_step(images, config(**changes), arm)
    if changes.get("heun"):  # rows whose step ends at sigma 0 still pass through the second evaluation
        assert got["teacher"] == pytest.approx(wanted["teacher"])
    assert got == wanted
    if arm == "sign" and not changes:  # what "equal compute" rests on
        assert config().arm("ign, equal compute").length == sum(got.values()) / 4


def test_arms_differ_in_what_they_say(images):
    c = config()
    assert c.arm("ign").weights["tight"] == 2.5 and not any(c.arm("ign").weights[t] for t in ("dmd", "reg", "flow"))
    own = config(lr=1.0, plane_lr=2.0, ign_lr=3.0, ign_plane_lr=4.0, regression_lr=5.0, regression_plane_lr=6.0)
    rates = [own.arm(name, plane=plane).lr for name in ("sign", "ign", "regression") for plane in (False, True)]
    assert rates == [1, 2, 3, 4, 5, 6] and own.arm("no dmd").lr == 1 and own.arm("ign, scratch", plane=True).lr == 4
    assert not c.arm("ign, no clamp").clamp and c.arm("ign").clamp
    assert all(c.arm("no " + t).weights[t] == 0 for t in TERMS[:-1]) and c.arm("sign").weights["tight"] == 0
    start = paper.build_student(images, c, c.arm("sign"), 0)
    same = [torch.equal(a, b) for a, b in zip(start.net.parameters(), images.start.net.parameters(), strict=True)]
    assert all(same)
    fresh = [paper.build_student(images, c, c.arm("sign, scratch"), s).net.conv_in.weight for s in (0, 0, 1)]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    assert not torch.equal(fresh[0], images.start.net.conv_in.weight)


KILLED = """
import sys, time
from pathlib import Path
from workbench.papers import sign as paper
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
def distil(folder, pause=0.0):
    from workbench.training.record import Record
    c = paper.Config(**{settings!r}, save_every=5)
    world = paper.plane_world(c, folder, progress=False)
    def wait(step, values): time.sleep(pause)
    return paper.distil(world, c, "sign", 3, Record(folder / "student"), on_step=wait, progress=False)
if __name__ == "__main__":
    distil(folder, pause)
"""


def test_a_killed_distillation_resumes_bit_equal_with_the_online_score(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("{settings!r}", repr(TINY)))
    c = config(save_every=5)

    def distil(where):
        world = paper.plane_world(c, where, progress=False)
        return paper.distil(world, c, "sign", 3, Record(where / "student"), progress=False)

    whole = distil(tmp_path / "whole")
    process = subprocess.Popen([sys.executable, script, tmp_path / "killed", "0.03"], stderr=subprocess.DEVNULL)
    kept = tmp_path / "killed" / "student" / "checkpoints" / "sign, seed 3"
    deadline = time.monotonic() + 120
    while len(list(kept.glob("step-*"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "the distillation ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.newest(kept).step < TINY["plane_steps"]
    resumed = distil(tmp_path / "killed")
    for a, b in ((whole.f, resumed.f), (whole.fake, resumed.fake)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert "s_fake/loss" in resumed.history[-1] and whole.history == resumed.history


def test_a_lagging_online_score_shows_in_its_loss(plane):
    """Trap: a score that does not keep up looks like adversarial instability; its logged loss tells the two apart.

    The student is held still, so that both scores have the same samples to follow.
    """
    last = {}
    for lr in (1e-9, 2e-3):
        s = paper.distil(plane, config(fake_lr=lr, plane_lr=1e-12, plane_steps=120), "dmd only", 100, progress=False)
        last[lr] = sum(r["s_fake/loss"] for r in s.history[-10:])
    assert last[1e-9] > 2 * last[2e-3], last


def test_the_student_is_a_diffusers_folder_that_opens_alone(images, tmp_path):
    s = paper.distil(images, config(), "sign", 0, progress=False)
    save(s.f, tmp_path / "student")
    z = images.noise(torch.Generator().manual_seed(0), 3)
    code = f"""
import json, sys, torch
from diffusers import UNet2DModel
net = UNet2DModel.from_pretrained({str(tmp_path / "student")!r}, use_safetensors=True)
c = json.load(open({str(tmp_path / "student" / "idempotent.json")!r}))
z = {float(images.sigma_max)} * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
u = z / (z.square().mean((1, 2, 3), keepdim=True) + c["sigma_data"] ** 2).sqrt()
with torch.no_grad():
    out = c["skip"] * u + c["scale"] * net(u, torch.full((3,), c["time"])).sample
assert "workbench" not in sys.modules
print(json.dumps(out.flatten().tolist()))
"""
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    torch.testing.assert_close(torch.tensor(json.loads(alone.stdout)), s.f(z).flatten(), rtol=1e-5, atol=1e-6)
    again = load(UNet2DModel, tmp_path / "student")
    assert torch.equal(again(z), s.f(z))
    (tmp_path / "student" / "idempotent.json").unlink()
    with pytest.raises(WorkbenchError, match="holds no student"):
        load(UNet2DModel, tmp_path / "student")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reg": -1.0}, "parameter reg: .*greater than or equal to 0"),
        ({"sigma_min": -0.1}, "parameter sigma_min: .*greater than 0"),
        ({"sigma_min": 20.0}, "sigma_min 20 is not below sigma_max 10"),
        ({"pair_steps": 0}, "parameter pair_steps: .*greater than or equal to 1"),
        ({"pair_steps": 5000}, "parameter pair_steps: .*less than or equal to 1000"),
        ({"levels": 1}, "parameter levels: .*greater than or equal to 2"),
        ({"arms": ["sgin"]}, "parameter arms.0"),
        ({"size": 7}, "size is even"),
        ({"size": 16}, "digits are 8 px with channels=1, the run is set to 16 px"),
        ({"rec": 0, "idem": 0, "flow": 0, "dmd": 0, "reg": 0, "denoise": 0}, "every loss weight of SIGN is 0"),
    ],
)
def test_bad_settings_are_one_clear_line(changes, told):
    with pytest.raises(WorkbenchError, match=told) as stop:
        override(paper.PRESETS["quick"], changes)
    assert "\n" not in str(stop.value)


def test_an_arm_whose_every_term_is_zero_is_refused(plane):
    with pytest.raises(WorkbenchError, match="arm 'regression' has no term left"):
        paper.distil(plane, config(reg=0.0), "regression", progress=False)


def test_measures_of_a_perfect_and_of_a_useless_student(images):
    """f that returns held-out images is nearest and reads every edit; one that returns grey is not."""
    c = config()
    ceiling = studies.ceilings(images, c, 0)
    held, _ = images.images.held_out("test")
    assert studies.quality(images, held) == pytest.approx(0, abs=1e-6) and ceiling["floor"] > 0.01
    grey = studies.measure(images, c, lambda x: torch.zeros_like(x), 0)
    assert grey["distance x1"] > 2 * ceiling["floor"] and grey["class entropy"] == pytest.approx(0, abs=1e-6)
    assert grey["idempotence x1"] == 0  # and yet perfectly idempotent
    edits = studies.edits(images, lambda x: x, 0)
    assert edits["reconstruction"] == 0
    assert edits["noise: error"] == edits["noise: error before"] == pytest.approx(0.36, rel=0.05)
    assert edits["mask: error"] > edits["mask: error, mean image"]


def test_settings_are_chosen_on_one_held_out_part_and_reported_on_another(images, plane):
    """Every measure that looks at real data follows the split: distance, edits, and in the plane the reference draw."""
    f = lambda x: x + 0.1  # noqa: E731
    for world in (images, plane):
        test, validation = (studies.measure(replace(world, split=s), config(), f, 0) for s in ("test", "validation"))
        differing = {k for k in test if test[k] != validation[k]}
        assert "distance x1" in differing
    test, validation = (studies.edits(replace(images, split=s), f, 0) for s in ("test", "validation"))
    assert all(test[k] != validation[k] for k in test if "error before" in k or "mean image" in k)
    assert override(config(), {"split": "validation"}).split == "validation" and paper.PRESETS["desk"].split == "test"


def test_every_seed_may_have_a_teacher_of_its_own(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(paper, "train_denoiser", lambda d, *a, seed, **k: seen.append(seed) or d)
    for teachers in (0, 2):
        for s in (3, 4):
            paper.image_world(config(teachers=teachers), s, progress=False)
    assert seen == [3, 4, 1, 0]


def test_measures_draw_nothing_that_training_draws():
    used = {step_seed(0, step, micro) for step in range(1, 500) for micro in range(3)}
    assert not used & {step_seed(0, 0, stream) for stream in range(10)}


@pytest.fixture(scope="module")
def small_study(folder):
    c = config(arms=("sign", "ign", "regression"), plane_arms=("sign", "ign, scratch"), seeds=1)
    record = Record(folder)
    return c, studies.study(c, folder, record, seed=0), record


def test_a_study_stores_what_it_measured_and_does_not_repeat_it(small_study, folder, monkeypatch):
    c, known, record = small_study
    assert ("images", "sign", 0) in known and ("plane", "ign, scratch", 0) in known and ("plane", "teacher", 0) in known
    before = record.records("result")
    assert {"beats_ign", "idempotence", "one_step", "projection"} <= {r["measure"] for r in before}
    monkeypatch.setattr(studies, "run_job", lambda job: pytest.fail("measured twice"))
    again = studies.study(c, folder, Record(folder), seed=0)
    assert again["images", "sign", 0]["distance x1"] == known["images", "sign", 0]["distance x1"]


def test_the_panels_draw_from_a_run(small_study, folder, images, plane):
    c, known, _ = small_study
    loaded = studies.students_of(known, c, folder, 0, "images", c.arms)
    points = studies.students_of(known, c, folder, 0, "plane", c.plane_arms)
    first = {arm: known["images", arm, 0] for arm in c.arms}
    assert len(panels.against_cost(known["images", "teacher", 0], first).data) == 7
    assert len(panels.curves(first).data) == len(panels.idempotence(first).data) == 3
    assert [t.name for t in panels.histories(loaded, "s_fake/loss").data] == ["sign"]
    one, two = (panels.editing(loaded, images, image=3, corruption=k, strength=1.0, times=2) for k in ("noise", "mask"))
    assert one.data[0].source != two.data[0].source and "class" in one.layout.title.text
    inputs = re.findall(r"input ([0-9.]+)", one.layout.title.text)
    assert len(inputs) == 3 and len(set(inputs)) == 1  # every student is given the same damage
    wide = panels.editing(loaded, images, image=3, corruption="mask", strength=1.0, times=2, width=0.25)
    assert wide.data[0].source != two.data[0].source  # the brush is heard
    a, b = (panels.samples(loaded, images, times=t, mode="re-noise", seed=0) for t in (1, 3))
    assert a.data[0].source != b.data[0].source
    assert panels.memorised(loaded["sign"], images).data
    assert panels.applications(points, plane, times=3, count=20, seed=0).data
    assert "%" in panels.scores(points["sign"], plane, sigma=0.5).layout.title.text
    assert len(panels.schedule(loaded["sign"], images, first=1.0, ratio=0.5, steps=3).data[0].y) == 3


def test_every_claim_is_measured_by_the_desk_preset():
    c = paper.PRESETS["desk"]
    numbers = {f"distance{how} x{k}": 1.0 for how in ("", " renoised") for k in range(1, 5)}
    numbers |= {f"{e}: {what}": 1.0 for e in ("noise", "mask") for what in ("error", "error before", "accuracy",
                "accuracy before", "error, mean image")}  # fmt: skip
    one = numbers | {f"idempotence x{k}": 1.0 for k in range(1, 5)} | {
        "distance, end over best": 1.0, "copies": 1.0, "modes": 8, "share in modes, projected": 1.0,
        "teacher": {"7": 2.0}, "class entropy": 1.0,
    }  # fmt: skip
    students = {("images", arm): one for arm in (*c.arms, "teacher")} | {("plane", arm): one for arm in c.plane_arms}
    values = studies.claim_values(students)
    assert {claim.measure for claim in paper.CLAIMS} <= set(values)
    assert values["one_step"] == 0.5 and len(paper.CLAIMS) >= 3


def test_taking_the_projecting_terms_away_flips_the_verdict(tmp_path):
    """What makes f more than a one-step student of the pairs is L_rec, L_idem, L_flow and L_denoise."""
    claim = next(c for c in paper.CLAIMS if c.id == "plane_idempotence")
    intact = config(plane_steps=350, plane_batch=64, pairs=256, pair_steps=8, samples=300)
    broken = override(intact, {"rec": 0.0, "idem": 0.0, "flow": 0.0, "denoise": 0.0})
    rival = {s: studies.run_job(studies.Job(intact, "plane", "regression", s, tmp_path / "a")) for s in (110, 111, 112)}
    verdicts = []
    for c, folder in ((intact, tmp_path / "a"), (broken, tmp_path / "b")):
        record = Record(folder)
        for s, regression in rival.items():
            own = studies.run_job(studies.Job(c, "plane", "sign", s, folder))
            arms = {("plane", "sign"): own, ("plane", "regression"): regression}
            record.result(claim.measure, studies.claim_values(arms)[claim.measure], seed=s)
        verdicts.append(judge(claim, record.records("result")).verdict)
    assert verdicts == ["holds", "does not hold"]


def test_the_benchmark_counts_what_it_times(tmp_path, capsys):
    from workbench.papers.sign_bench import sampling_cost

    rows = sampling_cost(images=8, steps=(1, 3), repeats=1)
    assert [(r["method"], r["nfe"]) for r in rows] == [
        ("teacher, Heun", 1), ("teacher, Heun", 5), ("student", 1), ("student", 2), ("student", 4),
    ]  # fmt: skip
    assert all(r["seconds"] > 0 and r["bytes"] > 0 for r in rows)
    counted = Denoiser(small_unet(), 0.75)
    with paper.counted(counted) as evaluated:
        counted(torch.zeros(3, 1, 8, 8), torch.ones(3))
    assert evaluated == [3]


def test_colour_is_measured_on_tinted_digits_and_the_panel_shows_it(folder):
    c = config(data="tinted digits", channels=3)
    job = studies.Job(c, "images", "sign", 0, folder / "tinted")
    world = job.load_world()
    student = job.distil(world, progress=False)
    found = studies.edits(world, student.f, 0)
    assert found["no colour: error before"] > 0.01 and found["no colour: error"] != found["no colour: error before"]
    figure = panels.recoloured(student, world, count=4)
    assert figure.layout.title.text.startswith("original, without colour")
    with pytest.raises(WorkbenchError, match="tinted digits are 8 px with channels=3"):
        config(data="tinted digits")
