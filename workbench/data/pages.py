"""Pages of reference text (a name, a one-sentence description, a body): package documentation, or a user's files."""

import ast
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path

from workbench.data.hub import hub_dataset
from workbench.data.provenance import Provenance
from workbench.data.text import LICENCES, MODULES
from workbench.errors import WorkbenchError

# subpackages whose functions are not documentation a reader would open
_SKIPPED = {"tests", "externals", "testing", "_lib", "distutils", "f2py", "_utils", "callback", "_loss", "_typing"}


@dataclass(frozen=True)
class Page:
    """One page. group: pages of one group are siblings (the harder distractors); raw: what a curator would cut away.

    A page without a description can be read but not asked about.
    """

    name: str
    description: str
    body: str
    group: str = ""
    raw: str = ""

    def text(self, described: bool = True) -> str:
        """ "Name: description body", or without the description."""
        parts = [self.description if described else "", self.body]
        return f"{self.name}: " + " ".join(p for p in parts if p)


def clean(text: str) -> str:
    """White space to single spaces; anything beyond printable ASCII dropped."""
    return " ".join(text.encode("ascii", "ignore").decode().split())


def _prose(paragraph: str) -> bool:
    plain = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    return len(paragraph) > 60 and plain >= 0.85 * len(paragraph) and not re.search(r"-{3,}|>>>", paragraph)


def _documented(path: Path, prefix: str) -> list[Page]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    pages = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        paragraphs = [clean(p) for p in re.split(r"\n\s*\n", ast.get_docstring(node) or "")]
        if 25 <= len(paragraphs[0]) <= 200:
            body = " ".join(p for p in paragraphs[1:] if _prose(p))
            pages.append(Page(f"{prefix}.{node.name}", paragraphs[0], body, prefix))
    return pages


@lru_cache(maxsize=2)
def documentation(
    packages: tuple[str, ...] = ("scipy", "scikit-learn", "numpy"),
) -> tuple[tuple[Page, ...], Provenance]:
    """A page for each public function and class of the packages: "scipy.stats.kstest", its summary line, its prose.

    The docstrings are read with ast, nothing is imported. Siblings share the subpackage. Raises WorkbenchError for a
    package whose licence is not listed or that is not installed.
    """
    found: dict[str, Page] = {}
    for package in packages:
        if package not in LICENCES:
            raise WorkbenchError(f"unknown text package {package!r}: choose from {', '.join(LICENCES)}")
        spec = util.find_spec(MODULES[package])
        if spec is None or spec.origin is None:
            raise WorkbenchError(f"the text comes with the package {package}, which is not installed")
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if not _SKIPPED & set(inside.parts) and path.name != "conftest.py":
                for page in _documented(path, ".".join([MODULES[package], *inside.parts[:-1][:1]])):
                    found.setdefault(page.name, page)
    pages = tuple(found[name] for name in sorted(found))
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in packages)
    note = f"{len(pages)} functions and classes, {sum(len(p.text()) for p in pages)} characters"
    return pages, Provenance("package documentation", versions, "", "BSD-3-Clause", digest(pages), note)


def digest(pages: Sequence[Page]) -> str:
    """SHA-256 of the pages' names and texts."""
    whole = "\n".join(f"{p.name}\t{p.description}\t{p.body}\t{p.raw}" for p in pages)
    return hashlib.sha256(whole.encode()).hexdigest()


def user_pages(data: str, limit: int | None = None) -> tuple[tuple[Page, ...], Provenance]:
    """Pages of a Hub text data set or of a folder of jsonl or parquet files; at most `limit` rows of it.

    Columns: "text" (needed), and for questions "name" and "description" (one sentence that is not part of "text"),
    "group" (siblings are better distractors). Raises WorkbenchError: no such column, empty, nothing but empty texts.
    """
    rows = hub_dataset(data, streaming=True, columns=("text",))
    pages = []
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            break
        for column in ("text", "name", "description", "group"):
            if row.get(column) is not None and not isinstance(row[column], str):
                raise WorkbenchError(
                    f"data set {data!r}: column {column!r} holds {type(row[column]).__name__}, not text"
                )
        if (row["text"] or "").strip():
            given = {k: row.get(k) or "" for k in ("name", "description", "group")}
            pages.append(Page(given["name"], given["description"], row["text"], given["group"]))
    if not pages:
        raise WorkbenchError(f"data set {data!r} holds no text: its column 'text' is empty in every row")
    note = f"{len(pages)} rows, {sum(bool(p.name and p.description) for p in pages)} with a name and a description"
    return tuple(pages), Provenance(data, "folder" if Path(data).is_dir() else "Hugging Face Hub", "", "see its card",
                                    digest(pages), note)  # fmt: skip
