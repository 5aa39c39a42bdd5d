"""The pre-commit hook strips outputs, but those that nbval compares; committed notebooks are stripped."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("strip_outputs", ROOT / "tools" / "strip_outputs.py")
assert _spec and _spec.loader
strip = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(strip)


def test_outputs_go_but_for_checked_cells(tmp_path):
    v4 = nbformat.v4
    result = v4.new_output("execute_result", data={"text/plain": "2"}, execution_count=7)
    cells = [
        v4.new_code_cell(
            "1 + 1", outputs=[result], execution_count=7, metadata={"papermill": {}, "tags": ["parameters"]}
        ),
        v4.new_code_cell("# NBVAL_CHECK_OUTPUT\n1 + 1", outputs=[result], execution_count=8),
    ]
    path = tmp_path / "n.ipynb"
    nbformat.write(v4.new_notebook(cells=cells, metadata={"widgets": {"big": 1}}), path)
    assert strip.main([str(path)]) == 1
    plain, checked = (nb := nbformat.read(path, as_version=4)).cells
    assert plain.outputs == [] and plain.execution_count is None and plain.metadata == {"tags": ["parameters"]}
    assert checked.outputs[0].data["text/plain"] == "2" and checked.outputs[0].execution_count is None
    assert "widgets" not in nb.metadata and plain.id
    nbformat.validate(nb)
    assert strip.main([str(path)]) == 0  # a second time changes nothing


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_committed_notebooks_are_stripped(path):
    notebook = json.loads(path.read_text())
    assert strip.stripped(notebook)["cells"] == notebook["cells"]
