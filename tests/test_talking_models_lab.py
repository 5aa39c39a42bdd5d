"""Talking Models' panels compute from a run: what is drawn is what the run's own models say; the benchmark counts."""

import csv

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.lab import talking_models as panels
from workbench.papers import talking_models_bench as bench
from workbench.papers import talking_models_study as study
from workbench.runs.folder import check
from workbench.training.record import Record

TINY = {
    "tasks": ["vision"], "arms": ["alone", "logit KD", "two-way", "one-way"], "steps": 3, "batch": 8,
    "teacher_steps": 3, "workers": 1, "gaps": [1.0], "seeds": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run: its folder, config and what was measured."""
    folder = tmp_path_factory.mktemp("run")
    config = check("talking_models", "quick", 0, TINY)
    return folder, config, study.run_study(config, Record(folder), 0)


def test_bars_are_the_errors_saved(finished):
    _, config, known = finished
    figure = panels.gains(known, config, "vision", config.gap)
    bars = {b.name: b.y[0] for b in figure.data if b.type == "bar"}
    errors = {arm: [known["vision", config.gap, arm, s]["error"] for s in (0, 1)] for arm in config.arms}
    assert set(bars) == {"logit KD", "two-way", "one-way"}
    assert bars["two-way"] == pytest.approx((sum(errors["alone"]) - sum(errors["two-way"])) / 2)
    with pytest.raises(WorkbenchError, match="no pair"):
        panels.gains(known, config, "vision", 0.9)


def test_the_diagnosis_is_the_mean_over_seeds(finished):
    _, config, known = finished
    line = next(x for x in panels.diagnosis(known, config, "vision").splitlines() if x.startswith("  two-way"))
    replies = [known["vision", config.gap, "two-way", s]["echo"] for s in (0, 1)]
    assert f"{sum(replies) / 2:.2f}" == line.split()[1]


def test_the_dial_has_a_point_at_each_place(finished):
    _, config, known = finished
    lines = {d.name: d for d in panels.dial(known, config, "vision").data if d.name}
    assert list(lines["two-way over logit KD"].x) == [config.gap, 1.0]
    for at, y in zip(*(lines["two-way over logit KD"][k] for k in "xy"), strict=True):
        wanted = [study.gain(known, "vision", at, s, "two-way", "logit KD") for s in (0, 1)]
        assert y == pytest.approx(sum(wanted) / 2)


def test_the_gap_dial_trains_where_it_stops_and_remembers(finished):
    folder, config, _ = finished
    figure = panels.train_at(config, folder, "vision", 0.75, 2, 0)
    assert {b.name for b in figure.data if b.type == "bar"} == {"alone", "logit KD", "two-way", "the teacher itself"}
    kept = {p: p.stat().st_mtime for p in (folder / "dial").rglob("*.safetensors")}
    again = panels.train_at(config, folder, "vision", 0.75, 2, 0)
    assert again == figure and kept == {p: p.stat().st_mtime for p in (folder / "dial").rglob("*.safetensors")}


def test_the_explorer_shows_the_very_messages(finished):
    folder, config, _ = finished
    for arm, per_round in (("two-way", 2), ("one-way", 1)):
        pupil, task = panels.pupil_of(folder, config, "vision", arm, 0)
        figure = panels.exchange(pupil, task, index=3, rounds=3, token=1)
        rows = figure.data[0].z
        assert len(rows) == 3 * per_round and pupil.setup.rounds == config.rounds
    inputs, _ = panels._example(task, 3)
    with torch.no_grad():
        reply = pupil.talk(inputs).replies[0][0, 1]
    assert torch.allclose(torch.tensor(rows[-1]), reply)
    space = panels.message_space(pupil, task, count=12, token=9)  # a position there is not: the last one
    assert {d.name for d in space.data} == {"the same input", "student", "teacher"}
    curve = panels.rounds_curve({"vision": (pupil, task)}, most=3)
    assert list(curve.data[0].x) == [1, 2, 3] and pupil.setup.rounds == config.rounds
    assert curve.data[0].y[1] == pytest.approx(0, abs=1e-9)  # one-way: a second round says nothing new


def test_other_layers_and_widths_are_trained_anew_and_judged_on_validation(finished):
    folder, config, _ = finished

    def drawn(**choice):
        usual = {"teacher": (1, 3), "student": (1, 2), "message": config.message}
        return panels.elsewhere(config, folder, "vision", steps=2, seed=0, **usual | choice).data

    same = drawn()
    assert [b.x[0] for b in same[:2]] == ["alone", "as in the run"] and same[1].y == same[3].y  # the same student
    errors = {b.x[0]: b.y[0] for b in (same[0], same[1])}
    job = study.Job(study.replace(config, gaps=(), steps=2), "vision", "alone", 0, config.gap, folder / "again")
    data, teacher = study.load_job(study.replace(job, folder=folder))
    alone = study.train_student(job, data, teacher, progress=False).student
    assert errors["alone"] == panels.evaluate(alone, data.validation)
    other = drawn(student=(0, 1), message=2)
    assert other[0].y == same[0].y and other[1].y == same[1].y and other[4].y != same[4].y
    with pytest.raises(WorkbenchError, match="lower state comes first"):
        drawn(teacher=(2, 2))


def test_data_pictures(finished):
    _, config, _ = finished
    assert "45 degrees" in panels.digits(0.5).layout.title.text
    task = study.load_task(check("talking_models", "quick", 0, {}), "ratings", 0)
    for curve in panels.long_tail(task).data:
        assert list(curve.y) == sorted(curve.y, reverse=True) and sum(curve.y) == 30_000


def test_the_benchmark_writes_what_rounds_cost(tmp_path, monkeypatch):
    config = check("talking_models", "quick", 0, TINY | {"teacher_width": 16, "gaps": []})
    monkeypatch.setattr(bench, "PRESETS", {"desk": config})
    monkeypatch.setattr(bench, "REPEATS", 1)
    bench.measure(tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "cost.csv")))
    sizes = [int(r["bytes"]) for r in rows if r["what"].endswith("two-way")]
    assert len(sizes) == 4 and sizes == sorted(sizes) and sizes[-1] > sizes[0]
    assert {r["what"] for r in rows} >= {"inference, student", "inference, teacher", "training step, alone"}
    assert panels.cost_figure([r | {"seconds": float(r["seconds"]), "bytes": int(r["bytes"])} for r in rows], "bytes")
