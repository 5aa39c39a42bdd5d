"""The gallery of the start notebook: every paper with what it claims, its notebook, and what its last runs said."""

import ast
import html
import os
from collections.abc import Sequence
from pathlib import Path

from IPython.display import HTML, display

from workbench import papers
from workbench.lab.display import COLOURS, html_table, small
from workbench.runs import report
from workbench.runs.folder import outputs_root

# what is to come, as slug, short title and arXiv number; one that is in papers.PAPERS is no longer shown as planned
PLANNED = (
    (
        "alexa_teacher",
        "Alexa Teacher Model: pre-training and distilling multi-billion-parameter encoders",
        "2206.07808",
    ),
    ("cyber_dap", "Less Data, More Security: domain-adaptive continuous pre-training", "2507.02964"),
    ("didi_instruct", "DiDi-Instruct: discrete diffusion divergence instruct", "2509.25035"),
    ("gasp", "GASP: unifying geometric and semantic self-supervised pre-training for driving", "2503.15672"),
    ("hemm", "HEMM: holistic evaluation of multimodal foundation models", "2407.03418"),
    ("hovle", "HoVLE: monolithic vision-language models with holistic embedding", "2412.16158"),
    ("krr_st", "Self-supervised data set distillation for transfer learning (KRR-ST)", "2310.06511"),
    ("llava_kd", "LLaVA-KD: distilling multimodal large language models", "2410.16236"),
    ("ph_reg", "Vision transformers with self-distilled registers (PH-Reg)", "2505.21501"),
    ("sign", "SIGN: score-based idempotent distillation of diffusion models", "2509.21470"),
    ("soft_tokens", "Soft tokens, hard truths", "2509.19170"),
    ("talking_models", "Talking models: distil pre-trained knowledge by interactive communication", "2310.03188"),
)


def described(slug: str) -> dict[str, str]:
    """TITLE, AUTHORS, ARXIV, ABOUT and NOTEBOOK of a paper, read from its source files.

    Importing every paper takes seconds for each, and the start notebook should be there at once.
    """
    wanted, found = {"TITLE", "AUTHORS", "ARXIV", "ABOUT", "NOTEBOOK"}, {}
    for path in sorted(Path(papers.__file__).parent.glob(f"{slug}*.py")):
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in wanted:
                    found[name] = str(ast.literal_eval(node.value))
    return found


def _arxiv(number: str) -> str:
    return f"<a href='https://arxiv.org/abs/{number}' target='_blank'>arXiv {number}</a>"


def _verdicts(view: report.RunView, here: Path) -> str:
    """One run in a line or two: preset, counts of its verdicts in their colours, links to what it left."""
    counts = {v: sum(r.verdict == v for r in view.rows) for v in COLOURS}
    said = ", ".join(f"<b style='color:{COLOURS[v]}'>{n} {v}</b>" for v, n in counts.items() if n)
    names = {"notebook.ipynb": "executed notebook", "claims.json": "claims.json"}
    links = [
        f"<a href='{html.escape(os.path.relpath(view.path / file, here), quote=True)}'>{text}</a>"
        for file, text in names.items()
        if (view.path / file).exists()
    ]
    which = f"{view.preset}, {'committed reference run' if view.reference else view.id}"
    return f"{said or html.escape(view.state)}{small(' · '.join([html.escape(which), *links]))}"


def cards(here: Path, root: Path, views: Sequence[report.RunView]) -> HTML:
    """The table of papers. here: folder of the start notebook, for links; root: the outputs folder; views: its runs."""
    rows = []
    for slug in papers.PAPERS:
        d = described(slug)
        link = html.escape(d["NOTEBOOK"], quote=True)
        title = f"<a href='{link}'><b>{html.escape(d['TITLE'])}</b></a>"
        title += small(f"{html.escape(d['AUTHORS'])} · {_arxiv(d['ARXIV'])}<br>slug <code>{slug}</code>")
        mine = [_verdicts(v, here) for v in views if v.slug == slug]
        ready = "ready" if (here / d["NOTEBOOK"]).exists() else "notebook missing"
        rows.append([title, html.escape(d["ABOUT"]), ready, "<br>".join(mine) or "no run yet"])
    planned = "".join(
        f"<li>{html.escape(title)}, {_arxiv(number)}</li>"
        for slug, title, number in PLANNED
        if slug not in papers.PAPERS
    )
    table = html_table(["paper", "what it claims", "status", "last verdicts, by preset"], rows).data
    page = root / "report.html"
    told = f"<a href='{html.escape(os.path.relpath(page, here), quote=True)}'>The report of all runs</a>"
    if not page.exists():
        told = "No report yet: <code>workbench report</code> writes it"
    to_come = f"<p>Planned, not there yet:</p><ul style='color:#666'>{planned}</ul>" if planned else ""
    return HTML(f"<div>{table}<p>{told}{small(html.escape(str(page)))}</p>{to_come}</div>")


def show() -> None:
    """Show every paper of the workbench: its notebook, what it claims, and the verdicts of its last runs."""
    here, root = Path(__file__).resolve().parents[2] / "notebooks", outputs_root()
    display(cards(here, root, [*report.latest(root), *report.references()]))
