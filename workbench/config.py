"""Parameters of a paper: a frozen pydantic dataclass whose fields carry help, unit and range.

A paper writes

    @config
    class Config:
        steps: Annotated[int, Param("optimiser steps", unit="steps", ge=1)] = 200

and gets type and range checks, a table for `workbench show`, and one-line errors for `-p name=value`.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from workbench.errors import WorkbenchError


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type) -> Any:
    """Make a class of annotated fields a frozen, checked config: unknown names and values out of range are refused."""
    settings = ConfigDict(extra="forbid", allow_inf_nan=False)
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=settings)


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
    if "const" in schema:
        return str(schema["const"])
    if "prefixItems" in schema:
        return f"[{', '.join(_schema_type(s) for s in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_schema_type(schema.get('items', {}))}"
    names = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "none"}
    return names.get(schema.get("type", ""), schema.get("type", "any"))


_BOUNDS = {
    "minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}",
    "minItems": "at least {} values", "maxItems": "at most {} values",
}  # fmt: skip


def _schema_range(schema: Mapping[str, Any]) -> str:
    own = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema and "prefixItems" not in schema]
    inner = [_schema_range(s) for s in [*schema.get("anyOf", []), *([schema["items"]] if schema.get("items") else [])]]
    return ", ".join([*own, *(text for text in inner if text)])


def parameters(values: Any) -> list[Parameter]:
    """Every parameter of a config instance: name, type, unit, this preset's value, range and help."""
    schema = TypeAdapter(type(values)).json_schema()
    return [
        Parameter(
            name, _schema_type(s), s.get("unit", ""), getattr(values, name), _schema_range(s), s.get("description", "")
        )
        for name, s in schema["properties"].items()
    ]


def override(values: Any, changes: Mapping[str, Any]) -> Any:
    """The config with `changes` applied and checked. Raises WorkbenchError: unknown name, wrong type, out of range."""
    known = [f.name for f in dataclasses.fields(values)]
    types = {p.name: p.type for p in parameters(values)}
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise WorkbenchError(f"unknown parameter {name!r}: {hint}")
        # pydantic would take true for 1; a slip of the pen must not train for one step
        if isinstance(value, bool) and "bool" not in types[name].split(" | "):
            raise WorkbenchError(f"parameter {name}: takes {types[name]}, got {value!r}")
    try:
        return type(values)(**{**{n: getattr(values, n) for n in known}, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise WorkbenchError(f"parameter {where}: {message}, got {first['input']!r}") from None


class _Loader(yaml.SafeLoader):
    """YAML whose `no`, `on` and dates stay text and whose 1e-3 is a number, as anyone typing -p means them."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag.rpartition(":")[2] in ("int", "null", "merge")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+|\.inf|\.nan)$", re.I),
    list("-+0123456789."),
)


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["steps=10", "sizes=[d32, d64]"]` → a dict; values are read as YAML. Raises WorkbenchError without an "="."""
    changes = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise WorkbenchError(f"-p takes name=value, got {text!r}")
        try:
            changes[name.strip()] = yaml.load(value, _Loader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError:
            raise WorkbenchError(f"-p {name.strip()}: {value!r} is not a YAML value") from None
    return changes


def as_dict(values: Any) -> dict[str, Any]:
    """The config as plain JSON types, in field order."""
    return TypeAdapter(type(values)).dump_python(values, mode="json")
