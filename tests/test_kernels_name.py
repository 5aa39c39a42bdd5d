"""The folder kernels/ is never mistaken for Hugging Face's package of that name, which transformers looks for."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LOOK = """
import importlib.util, pathlib, sys
root = pathlib.Path(sys.argv[1]).resolve()
sys.path.insert(0, str(root))
spec = importlib.util.find_spec("kernels")
real = spec is not None and spec.origin is not None
assert not real or root not in pathlib.Path(spec.origin).resolve().parents, f"kernels is ours: {spec.origin}"
from transformers import CLIPTextModel, LlamaForCausalLM
from transformers.utils import import_utils
from diffusers import UNet2DConditionModel
if not real:
    assert not import_utils.is_kernels_available(), "transformers takes our folder for the package"
print("fine")
"""


def test_kernels_is_no_package():
    assert not list((ROOT / "kernels").glob("__init__.py*")), (
        "an __init__.py here breaks every transformers model import"
    )
    assert (ROOT / "workbench" / "kernels").resolve() == ROOT / "kernels"


def test_models_import_with_the_checkout_on_the_path():
    ran = subprocess.run(
        [sys.executable, "-c", LOOK, str(ROOT)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert ran.returncode == 0 and ran.stdout.split() == ["fine"], ran.stderr[-2000:]
