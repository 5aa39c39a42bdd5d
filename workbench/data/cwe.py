"""The Common Weakness Enumeration as pages: MITRE's catalogue ships as XML in the package cwe2."""

import xml.etree.ElementTree as ElementTree
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from xml.etree.ElementTree import Element

from workbench.data.pages import Page, clean, digest
from workbench.data.provenance import Provenance
from workbench.errors import WorkbenchError

_FILE = "database_v49/cwec_v4.14.xml"
_NS = {"c": "http://cwe.mitre.org/cwe-7"}
# what a curator would leave out of a corpus: code, boilerplate, bookkeeping; in the order of the catalogue
_RAW = (
    "Applicable_Platforms", "Modes_Of_Introduction", "Detection_Methods", "Potential_Mitigations",
    "Demonstrative_Examples", "Observed_Examples", "Notes", "Mapping_Notes", "Content_History",
)  # fmt: skip


def _words(element: Element | None) -> str:
    """The text of an element, a space between its parts."""
    return clean(" ".join(element.itertext())) if element is not None else ""


def _weakness(weakness: Element) -> Page:
    parents = [
        r.get("CWE_ID", "")
        for r in weakness.findall("c:Related_Weaknesses/c:Related_Weakness", _NS)
        if r.get("Nature") == "ChildOf" and r.get("View_ID") == "1000"
    ]
    raw = " ".join(_words(weakness.find(f"c:{field}", _NS)) for field in _RAW)
    return Page(
        clean(weakness.get("Name", "")), _words(weakness.find("c:Description", _NS)),
        _words(weakness.find("c:Extended_Description", _NS)), f"CWE-{parents[0]}" if parents else "", clean(raw),
    )  # fmt: skip


@lru_cache(maxsize=1)
def weaknesses() -> tuple[tuple[Page, ...], Provenance]:
    """A page for each weakness that is not deprecated: its name, Description, Extended_Description, and the raw rest.

    Siblings share the first parent in the research view (1000). Raises WorkbenchError where cwe2 is not installed.
    """
    spec = util.find_spec("cwe2")
    if spec is None or spec.origin is None:
        raise WorkbenchError(
            "the weaknesses come with the package cwe2 (pip install cwe2==3.0.0), which is not installed"
        )
    root = ElementTree.parse(Path(spec.origin).parent / _FILE).getroot()
    found = root.findall("c:Weaknesses/c:Weakness", _NS)
    pages = tuple(_weakness(w) for w in found if w.get("Status") != "Deprecated")
    note = f"CWE {root.get('Version')}, {len(pages)} weaknesses, {sum(len(p.text()) for p in pages)} characters curated"
    licence = "CWE terms of use (MITRE); the package is MIT"
    return pages, Provenance("weaknesses (CWE)", "cwe2", metadata.version("cwe2"), licence, digest(pages), note)
