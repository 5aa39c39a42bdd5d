"""Run folders and records: torn lines, rewinding, full disks, refused settings, provenance."""

import errno
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.runs import folder
from workbench.training.record import Record, read_records


def test_a_torn_last_line_is_dropped_and_writing_goes_on(tmp_path):
    record = Record(tmp_path)
    record.write("note", text="whole")
    with open(record.metrics, "a") as f:
        f.write('{"kind": "note", "te')
    again = Record(tmp_path)
    again.write("note", text="after")
    assert [r["text"] for r in again.records("note")] == ["whole", "after"]


def test_reading_a_running_run_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "note"}\n{"kind": "no')
    assert list(read_records(path)) == [{"kind": "note"}]
    assert path.read_text().endswith('"no')


def test_a_damaged_line_is_told_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "note"}\n{"kind"\n{"kind": "note"}\n')
    with pytest.raises(WorkbenchError, match=r"metrics.jsonl line 2 is damaged"):
        Record(tmp_path).records()


def test_a_full_disk_is_one_line_and_costs_no_earlier_record(tmp_path, monkeypatch):
    record = Record(tmp_path)
    record.write("note", n=1)

    class Half:
        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("workbench.training.record.open", Half, raising=False)
        with pytest.raises(WorkbenchError, match="No space left on device; free some space, then resume"):
            record.write("note", n=2)
    record.write("note", n=3)
    assert [r["n"] for r in record.records("note")] == [1, 3]


def test_rewind_forgets_later_steps_of_that_training_alone(tmp_path):
    record = Record(tmp_path)
    for step in (1, 2, 3):
        record.write("step", training="a", step=step)
        record.write("step", training="b", step=step)
    record.result("gain", 1.0, seed=0)
    record.rewind("a", 1)
    assert [r["step"] for r in record.records("step", training="a")] == [1]
    assert [r["step"] for r in record.records("step", training="b")] == [1, 2, 3]
    assert len(record.records("result")) == 1


def test_values_become_plain_json(tmp_path):
    record = Record(tmp_path)
    record.write("note", a=torch.tensor([1.0, math.nan]), b=np.float32(0.5), c=math.inf)
    line = json.loads(record.metrics.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line == {"kind": "note", "a": [1.0, "nan"], "b": 0.5, "c": "inf"}


def test_start_writes_the_settings_and_goes_on_only_with_the_same(toy, tmp_path):
    run = folder.start("toy", "desk", seed=3, overrides={"level": 0.7})
    assert run.path.parent == toy.out / "runs" / "toy"
    assert (run.config.steps, run.config.level) == (6, 0.7)
    assert folder.settings(run.path) == ("toy", "desk", 3, {"level": 0.7})
    again = folder.start("toy", "desk", seed=3, overrides={"level": 0.7}, run_dir=run.path)
    assert again.path == run.path
    with pytest.raises(WorkbenchError, match="another seed, config"):
        folder.start("toy", "desk", seed=4, run_dir=run.path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"slug": "tory"}, "unknown paper 'tory': did you mean 'toy'"),
        ({"slug": "toy", "preset": "fast"}, "unknown preset 'fast' of toy: choose from quick, desk"),
        ({"slug": "toy", "seed": -1}, "seed is a whole number from 0 up, got -1"),
        ({"slug": "toy", "seed": True}, "seed is a whole number"),
        ({"slug": "toy", "overrides": {"steps": 0}}, "parameter steps"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(toy, arguments, words):
    with pytest.raises(WorkbenchError) as refused:
        folder.start(**arguments)
    assert words in str(refused.value)
    assert not toy.out.exists()


def test_a_folder_that_cannot_be_written_is_one_line(toy):
    (toy.home / "file").write_text("")
    with pytest.raises(WorkbenchError, match="cannot write to"):
        folder.start("toy", run_dir=toy.home / "file" / "run")


@pytest.mark.parametrize(("text", "words"), [(None, "not a run folder"), ("{", "is damaged"), ("{}", "lacks 'slug'")])
def test_a_damaged_run_is_told(toy, text, words):
    path = toy.home / "run"
    path.mkdir()
    if text is not None:
        (path / "config.json").write_text(text)
    with pytest.raises(WorkbenchError, match=words):
        folder.settings(path)


def test_provenance_is_stored_by_name_and_survives_a_resume(toy):
    @dataclass(frozen=True)
    class Source:
        name: str
        licence: str

    run = folder.start("toy")
    run.provenance(Source("digits", "BSD-3-Clause"))
    again = folder.start("toy", run_dir=run.path)
    again.provenance(Source("text", "PSF-2.0"))
    data = folder.read_config(run.path)["data"]
    assert {name: d["licence"] for name, d in data.items()} == {"digits": "BSD-3-Clause", "text": "PSF-2.0"}


def test_the_verdict_is_judged_from_the_stored_metrics_alone(toy):
    run = folder.start("toy")
    for seed in range(3):
        run.record.result("level", 0.5 + 0.01 * seed, seed=seed)
    assert [j.verdict for j in run.judge()] == ["holds"]
    run.record.metrics.write_text(run.record.metrics.read_text().replace("0.5", "0.1"))
    assert [j.verdict for j in folder.start("toy", run_dir=run.path).judge()] == ["does not hold"]
