"""The papers, one module each. A paper module offers TITLE, AUTHORS, ARXIV, ABOUT, Config, PRESETS and CLAIMS."""

import difflib
import importlib
from types import ModuleType

from workbench.errors import WorkbenchError

PAPERS = (
    "infinite_compute",
    "linfusion",
    "sign",
    "didi_instruct",
    "soft_tokens",
    "talking_models",
    "alexa_teacher",
    "cyber_dap",
)


def load(slug: str) -> ModuleType:
    """The module of a paper; raises WorkbenchError for an unknown slug."""
    if slug not in PAPERS:
        near = difflib.get_close_matches(slug, PAPERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PAPERS)}"
        raise WorkbenchError(f"unknown paper {slug!r}: {hint}")
    return importlib.import_module(f"workbench.papers.{slug}")
