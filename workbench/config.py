"""Parameters of a paper: a frozen pydantic dataclass whose fields carry help, unit and range.

A paper writes

    @config
    class Config:
        steps: Annotated[int, Param("optimiser steps", unit="steps", ge=1)] = 200

and gets type and range checks, a table for `workbench show`, and one-line errors for `-p name=value`.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from workbench.errors import WorkbenchError

config = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))


def Param(help: str, *, unit: str = "", **bounds: Any) -> Any:  # noqa: N802 (reads as pydantic's Field does)
    """Help text, unit ("nats", "steps", "px") and bounds (ge, gt, le, lt, min_length) of one config field."""
    return Field(description=help, json_schema_extra={"unit": unit}, **bounds)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of `workbench show`: a parameter as a user meets it."""

    name: str
    type: str
    unit: str
    default: Any
    range: str
    help: str


def _schema_type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(_schema_type(s) for s in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_schema_type(schema.get('items', {}))}"
    names = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "none"}
    return names.get(schema.get("type", ""), schema.get("const", schema.get("type", "any")))


def parameters(values: Any) -> list[Parameter]:
    """Every parameter of a config instance: name, type, unit, this preset's value, range and help."""
    schema = TypeAdapter(type(values)).json_schema()
    bounds = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
    rows = []
    for name, s in schema["properties"].items():
        allowed = ", ".join(text.format(s[key]) for key, text in bounds.items() if key in s)
        rows.append(
            Parameter(name, _schema_type(s), s.get("unit", ""), getattr(values, name), allowed, s.get("description", ""))
        )
    return rows


def override(values: Any, changes: Mapping[str, Any]) -> Any:
    """The config with `changes` applied and checked. Raises WorkbenchError: unknown name, wrong type, out of range."""
    known = {f.name for f in dataclasses.fields(values)}
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise WorkbenchError(f"unknown parameter {name!r}: {hint}")
    try:
        return type(values)(**{**{n: getattr(values, n) for n in known}, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise WorkbenchError(f"parameter {where}: {first['msg'].lower()}, got {first['input']!r}") from None


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["steps=10", "sizes=[d32, d64]"]` → a dict; values are read as YAML. Raises WorkbenchError without an "="."""
    changes = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise WorkbenchError(f"-p takes name=value, got {text!r}")
        try:
            changes[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise WorkbenchError(f"-p {name.strip()}: {value!r} is not a YAML value") from None
    return changes


def as_dict(values: Any) -> dict[str, Any]:
    """The config as plain JSON types, in field order."""
    return TypeAdapter(type(values)).dump_python(values, mode="json")
