"""Parameters: what is refused, in one line, and how -p values are read."""

from typing import Annotated, Literal

import pytest

from workbench.config import Param, as_dict, config, override, parameters, parse_assignments
from workbench.errors import WorkbenchError


@config
class Config:
    steps: Annotated[int, Param("optimiser steps", unit="steps", ge=1, le=100)] = 10
    lr: Annotated[float | None, Param("learning rate", gt=0)] = 0.1
    precision: Annotated[Literal["no", "bf16"], Param("arithmetic")] = "no"
    widths: Annotated[tuple[int, ...], Param("widths", unit="channels", min_length=1)] = (8, 16)
    flip: Annotated[bool, Param("augment")] = False


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=3", 3),
        ("lr=1e-3", 0.001),  # YAML 1.1 reads this as text
        ("lr=null", None),
        ("lr=2", 2.0),
        ("precision=no", "no"),  # YAML 1.1 reads this as false
        ("widths=[4, 5]", (4, 5)),
        ("flip=true", True),
    ],
)
def test_assignments_mean_what_they_say(assignment, value):
    changes = parse_assignments([assignment])
    (name,) = changes
    got = getattr(override(Config(), changes), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stesp=3", "unknown parameter 'stesp': did you mean 'steps'?"),
        ("zzz=3", "known: steps, lr, precision, widths, flip"),
        ("steps=0", "parameter steps: input should be greater than or equal to 1, got 0"),
        ("steps=101", "less than or equal to 100"),
        ("steps=ten", "valid integer"),
        ("steps=2.5", "valid integer"),
        ("steps=true", "parameter steps: takes int, got True"),
        ("lr=-1", "greater than 0"),
        ("lr=.nan", "parameter lr"),
        ("precision=fp8", "'no' or 'bf16'"),
        ("widths=[]", "at least 1"),
        ("widths=[4, x]", "parameter widths.1"),
        ("flip=maybe", "valid boolean"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(assignment, words):
    with pytest.raises(WorkbenchError) as refused:
        override(Config(), parse_assignments([assignment]))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["steps", "=3", "lr=[}"])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(WorkbenchError):
        parse_assignments([text])


def test_override_leaves_the_preset_alone_and_goes_through_json():
    preset = Config()
    changed = override(preset, {"steps": 3})
    assert preset.steps == 10 and changed.steps == 3
    assert as_dict(changed)["widths"] == [8, 16]
    assert override(preset, as_dict(changed)) == changed  # how a resumed run gets its config back


def test_parameters_tell_type_unit_and_range():
    rows = {p.name: p for p in parameters(Config(steps=7))}
    assert (rows["steps"].type, rows["steps"].unit, rows["steps"].range) == ("int", "steps", "≥ 1, ≤ 100")
    assert rows["steps"].default == 7
    assert (rows["lr"].type, rows["lr"].range) == ("float | none", "> 0")
    assert rows["precision"].type == "no | bf16"
    assert (rows["widths"].type, rows["widths"].range) == ("list of int", "at least 1 values")
