"""Readers of the public security benchmarks in the formats they are published in: CTI-MCQ, CyberMetric, SecEval."""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.evaluation.multiple_choice import LETTERS, Item

_CTI = ("Question", "Option A", "Option B", "Option C", "Option D", "Prompt", "GT")


def _need(row: Any, fields: tuple[str, ...], where: str) -> None:
    for field in fields:
        if not isinstance(row, dict) or row.get(field) is None:
            raise WorkbenchError(f"{where} has no {field!r}: it is not in the published format")


def _key(letters: str, where: str) -> frozenset[int]:
    """ "b" or "ACD" as options; upper-cased first, one key of CTI-MCQ is lower case."""
    letters = letters.strip().upper()
    if not re.fullmatch("[A-D]*", letters):
        raise WorkbenchError(f"{where}: the key {letters!r} is no letter from A to D")
    return frozenset(LETTERS.index(c) for c in letters)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise WorkbenchError(f"{path} is not JSON") from None


def cti_mcq(path: Path) -> list[Item]:
    """CTIBench's cti-mcq.tsv: URL, Question, Option A to D, Prompt, GT. The prompt is the file's own."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    items = []
    with open(path, encoding="utf8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 1):
            where = f"{path} row {number}"
            _need(row, _CTI, where)
            options = tuple(row[f"Option {c}"] for c in "ABCD")
            tag = re.sub(r"^https?://(www\.)?([^/]*).*", r"\2", row.get("URL") or "")
            items.append(Item(row["Question"], options, _key(row["GT"], where), tag, row["Prompt"]))
    return items


def cybermetric(path: Path) -> list[Item]:
    """CyberMetric-*-v1.json: {"questions": [{"question", "answers": {"A": ...}, "solution"}]}."""
    data = _json(path)
    _need(data, ("questions",), str(path))
    items = []
    for number, row in enumerate(data["questions"], 1):
        where = f"{path} question {number}"
        _need(row, ("question", "answers", "solution"), where)
        options = tuple(row["answers"][c] for c in sorted(row["answers"]))
        asked = ", ".join(f"{c}) {row['answers'][c]}" for c in sorted(row["answers"]))
        # our wording: the marker that the official regex looks for is asked for, nothing else is taken over
        prompt = f"Question: {row['question']}\nOptions: {asked}\nReply with one letter in the form ANSWER: X\n"
        items.append(Item(row["question"], options, _key(row["solution"], where), "", prompt))
    return items


def seceval(path: Path) -> list[Item]:
    """SecEval's questions.json: [{"source", "question", "choices": ["A: ...", ...], "answer": "AC", ...}]."""
    items = []
    data = _json(path)
    if not isinstance(data, list):
        raise WorkbenchError(f"{path} is no list of questions: it is not in the published format")
    for number, row in enumerate(data, 1):
        where = f"{path} question {number}"
        _need(row, ("question", "choices", "answer"), where)
        options = tuple(re.sub(r"^[A-D]:\s*", "", c) for c in row["choices"])
        prompt = f"Question: {row['question']} {' '.join(row['choices'])}".replace("\n", " ") + "\nAnswer:"
        items.append(Item(row["question"], options, _key(row["answer"], where), row.get("source", ""), prompt))
    return items


# reader, the benchmark's own extractor, and the tokens to answer in (SecEval's harness allows 5; reasoning needs more)
BENCHMARKS: dict[str, tuple[Callable[[Path], list[Item]], str, int]] = {
    "cti-mcq": (cti_mcq, "last line", 16), "cybermetric": (cybermetric, "answer marker", 16),
    "seceval": (seceval, "letter set", 5),
}  # fmt: skip


def read_benchmark(spec: str) -> tuple[str, list[Item]]:
    """ "cti-mcq:PATH", "cybermetric:PATH" or "seceval:PATH" → its name and items. Raises WorkbenchError in one line."""
    name, colon, path = spec.partition(":")
    if not colon or name not in BENCHMARKS:
        raise WorkbenchError(f"a benchmark is NAME:PATH with NAME one of {', '.join(BENCHMARKS)}, got {spec!r}")
    if not Path(path).is_file():
        raise WorkbenchError(f"no benchmark file {path!r}: fetch {name} from its repository, then give its path")
    items = BENCHMARKS[name][0](Path(path))
    if not items:
        raise WorkbenchError(f"{path} holds no question")
    return name, items
