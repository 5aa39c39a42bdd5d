"""Strip notebooks in place: no outputs, counts or run metadata, but for cells marked `# NBVAL_CHECK_OUTPUT`.

nbstripout can keep outputs by tag only, not by the comment that nbval reads. Exits with 1 where it changed a file, as
pre-commit expects.
"""

import json
import sys
from pathlib import Path
from typing import Any


def stripped(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook as it should be committed; the argument is left alone."""
    cells = []
    for cell in notebook["cells"]:
        metadata = {k: v for k, v in cell["metadata"].items() if k in ("tags", "jupyter")}
        cell = {**cell, "metadata": metadata}
        if cell["cell_type"] == "code":
            checked = any(
                line.strip().startswith("# NBVAL_CHECK_OUTPUT") for line in "".join(cell["source"]).split("\n")
            )
            kept = [{**o, **({"execution_count": None} if "execution_count" in o else {})} for o in cell["outputs"]]
            cell.update(execution_count=None, outputs=kept if checked else [])
        cells.append(cell)
    metadata = {k: v for k, v in notebook["metadata"].items() if k in ("kernelspec", "language_info")}
    return {**notebook, "cells": cells, "metadata": metadata}


def main(paths: list[str]) -> int:
    changed = 0
    for path in map(Path, paths):
        before = path.read_text(encoding="utf8")
        after = json.dumps(stripped(json.loads(before)), indent=1, ensure_ascii=False) + "\n"
        if after != before:
            path.write_text(after, encoding="utf8")
            print(f"stripped {path}")
            changed = 1
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
