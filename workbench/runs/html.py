"""Notebook → one HTML file that needs no network: plotly figures drawn by an embedded plotly.js, equations as MathML.

Stock nbconvert leaves plotly's JSON undrawn and asks the network for MathJax, require.js and the widget manager.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert as to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, Preprocessor
from plotly.offline import get_plotlyjs

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"


def plotly_script() -> str:
    """plotly.js in a script element, to stand once in a page's head."""
    code = get_plotlyjs().replace("</script", "<\\/script")
    return f"<script>{code}</script>"


def figure_div(figure: dict[str, Any], element: str) -> str:
    """A div with the id `element` and the script that draws the plotly JSON `figure` into it."""
    # "</" would end the script element where a title or label holds markup
    data, layout = (json.dumps(figure.get(k, v)).replace("</", "<\\/") for k, v in (("data", []), ("layout", {})))
    height = figure.get("layout", {}).get("height") or 450
    return (
        f'<div id="{element}" class="plotly-figure" style="min-height:{height}px"></div>\n'
        f'<script>Plotly.newPlot("{element}", {data}, {layout}, {{"responsive": true, "displaylogo": false}});</script>'
    )


def mathml(tex: str, display: str) -> str:
    """MathML of a TeX formula, which browsers draw by themselves; the TeX where it cannot be converted."""
    try:
        converted = to_mathml(tex, display=display)
    except Exception:  # the converter raises its own zoo of errors; a formula must not cost the report
        converted = "\\"
    if "\\" in converted:  # a command it does not know is left as text in the middle
        tag = "div" if display == "block" else "code"
        return f"<{tag} class='tex'>{html.escape(tex)}</{tag}>"
    return converted


class _Renderer(IPythonRenderer):
    """Markdown with its formulas turned into MathML; method names are those of nbconvert's renderer."""

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def multiline_math(self, body: str) -> str:
        return mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        # equation and align only number and place; what is inside reads the same as aligned
        inner = {"equation": body, "equation*": body}.get(name)
        return mathml(inner or rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


class StaticOutputs(Preprocessor):
    """Plotly JSON becomes a drawn div; widget views go, and with them bundles that hold nothing else to see."""

    def preprocess_cell(self, cell: Any, resources: Any, index: int) -> tuple[Any, Any]:
        if cell.cell_type != "code":
            return cell, resources
        kept = []
        for number, output in enumerate(cell.outputs):
            if output.output_type == "stream" and not output.text.strip():  # what a finished progress bar leaves
                continue
            data = output.get("data")
            if data and PLOTLY in data:
                output["data"] = {"text/html": figure_div(data[PLOTLY], f"figure-{index}-{number}")}
            elif data and WIDGET in data:
                del data[WIDGET]
                if not set(data) - {"text/plain"}:  # the repr of a widget says nothing to a reader
                    continue
            elif data and "text/latex" in data and "text/html" not in data:
                data["text/html"] = mathml(re.sub(r"^\s*\$+|\$+\s*$", "", data["text/latex"]), "block")
            kept.append(output)
        cell.outputs = kept
        return cell, resources


class OfflineExporter(HTMLExporter):
    """nbconvert's HTML with every outside address emptied."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            mathjax_url="", require_js_url="", jquery_url="", jupyter_widgets_base_url="", mermaid_js_url="",
            mermaid_layout_elk_js_url="", widget_renderer_url="", embed_images=True,
            preprocessors=[CoalesceStreamsPreprocessor, StaticOutputs], **kwargs,
        )  # fmt: skip

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        path = context.get("resources", {}).get("metadata", {}).get("path", "")
        renderer = _Renderer(escape=False, attachments=attachments, embed_images=True, path=path)
        return MarkdownWithMath(renderer=renderer).render(source)


def export(notebook: Path, page: Path, title: str) -> None:
    """Write the executed `notebook` as one self-contained HTML file `page`."""
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata.pop("widgets", None)
    body, _ = OfflineExporter().from_notebook_node(nb, {"metadata": {"name": title, "path": str(notebook.parent)}})
    head = "<style>math { font-size: 1.15em }</style>"
    if 'class="plotly-figure"' in body:
        head += plotly_script()
    page.write_text(body.replace("</head>", head + "</head>", 1))
