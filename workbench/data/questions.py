"""Question sets with checkable answers, and multiple-choice sets, from the Hub or local folders of the same columns."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.data.hub import hub_dataset
from workbench.errors import WorkbenchError


def boxed(text: str) -> str | None:
    """What stands before the brace that closes \\boxed{ (open at the start of `text`); None if it stays open."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i].strip()
    return None


def load_split(id: str, split: str) -> Any:
    """A `datasets` data set; id: "owner/name", "owner/name:configuration" or a folder. Raises WorkbenchError."""
    name, colon, configuration = id.rpartition(":")
    return hub_dataset(name, split, name=configuration) if colon else hub_dataset(id, split)


def question_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """(question, answer) of one row: GSM8K's "#### 18", MATH's boxed solution, or a column "answer"/"final_answer".

    Raises WorkbenchError for a row of none of these shapes.
    """
    question = row.get("question") or row.get("problem")
    if question is None:
        raise WorkbenchError(f"no question column: it has {', '.join(map(repr, row))}")
    answer = row.get("final_answer") or row.get("answer")
    answer = answer[0] if isinstance(answer, list) and answer else answer
    if isinstance(answer, str) and "####" in answer:
        return str(question), answer.rsplit("####", 1)[1].strip().replace(",", "")
    if answer is None and "\\boxed{" in str(row.get("solution", "")):
        answer = boxed(str(row["solution"]).rsplit("\\boxed{", 1)[1])
    if answer is None:
        raise WorkbenchError(f"no checkable answer in a row with the columns {', '.join(map(repr, row))}")
    return str(question), str(answer).strip()


@dataclass(frozen=True)
class Choice:
    """One multiple-choice question: what precedes the choices, the choices, the index of the right one."""

    question: str
    choices: tuple[str, ...]
    right: int


def choice_of(row: Mapping[str, Any]) -> Choice:
    """A row of ARC, HellaSwag or MMLU. Raises WorkbenchError for other columns."""
    if "endings" in row:  # HellaSwag
        return Choice(str(row["ctx"]), tuple(row["endings"]), int(row["label"]))
    if "answerKey" in row:  # ARC
        text = f"Question: {row['question']}\nAnswer:"
        return Choice(text, tuple(row["choices"]["text"]), list(row["choices"]["label"]).index(row["answerKey"]))
    if "choices" in row and "answer" in row:  # MMLU
        return Choice(f"Question: {row['question']}\nAnswer:", tuple(row["choices"]), int(row["answer"]))
    raise WorkbenchError(f"no multiple-choice question in a row with the columns {', '.join(map(repr, row))}")


def same_number(answer: str, truth: str) -> bool:
    """Equal as numbers, or letter by letter where either is none; "$1,200.00" is 1200."""

    def number(text: str) -> float | None:
        try:
            return float(re.sub(r"[\s,$]|\\[,!$]", "", text).rstrip("."))
        except ValueError:
            return None

    a, b = number(answer), number(truth)
    return a == b if a is not None and b is not None else answer.strip() == truth.strip()


def math_verify_grader() -> Any:
    """grade(answer, truth) by the package math-verify, the paper's grader. Raises WorkbenchError if not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise WorkbenchError("grader=math-verify needs the package: pip install math-verify[antlr4_13_2]") from None
    return lambda answer, truth: bool(verify(parse(f"\\boxed{{{truth}}}"), parse(f"\\boxed{{{answer}}}")))
