"""The same loop under torchrun: two gloo ranks equal one process that sees both ranks' batches; a kill resumes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from workbench.training.loop import Recipe, fit, step_seed
from workbench.training.record import Record

SCRIPT = """
import os, sys, torch
from torch import nn
from workbench.training.loop import Recipe, fit
from workbench.training.record import Record
torch.manual_seed(0)
model = nn.Linear(3, 1)
recipe = Recipe(steps=int(sys.argv[2]), save_every=4, log_every=1, seed=5)
fitted = fit(model, lambda m, x: {"loss": m(x).square().mean()}, lambda g: torch.randn(4, 3, generator=g), recipe,
             name="ddp", record=Record(sys.argv[1]), progress=False)
torch.save(fitted.model.state_dict(), f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
torch.distributed.barrier()
os._exit(0)  # all is written: gloo's threads, torn down at exit, may abort a rank that has finished
"""


def torchrun(folder: Path, script: Path, steps: int) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder, str(steps)]
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_equal_one_process_with_both_batches(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun(tmp_path / "two", script, 6)
    ranks = [torch.load(tmp_path / "two" / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert torch.equal(ranks[0]["weight"], ranks[1]["weight"])

    step = iter(range(1, 7))

    def both(generator):
        now = next(step)
        draws = [torch.Generator().manual_seed(step_seed(5, now, 0, rank)) for rank in (0, 1)]
        return torch.cat([torch.randn(4, 3, generator=g) for g in draws])

    torch.manual_seed(0)
    alone = fit(nn.Linear(3, 1), lambda m, x: {"loss": m(x).square().mean()}, both, Recipe(steps=6, seed=5),
                name="one", progress=False)  # fmt: skip
    torch.testing.assert_close(alone.model.weight.detach(), ranks[0]["weight"], rtol=1e-5, atol=1e-6)
    assert [r["step"] for r in Record(tmp_path / "two").records("step")] == [1, 2, 3, 4, 5, 6], "one rank writes"
