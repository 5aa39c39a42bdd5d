"""The loop: bit-equal resume after a kill, refused checkpoints, a full disk, NaN, accumulation, EMA, precision."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench.errors import WorkbenchError
from workbench.training import checkpoint
from workbench.training.loop import Recipe, adamw, fit, step_seed
from workbench.training.record import Record
from workbench.training.state import NonFiniteError

TRAINEE = """
import sys, time, torch
from torch import nn
from workbench.training.loop import Recipe, fit
from workbench.training.record import Record
from workbench.training.state import NonFiniteError

def train(folder, pause=0.0, **changes):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
    def loss(model, batch):
        time.sleep(pause)
        return {"loss": (model(batch).sum(-1) - batch.prod(-1)).square().mean()}
    settings = dict(steps=60, lr=1e-2, weight_decay=0.1, warmup=0.1, schedule="cosine", clip=1.0, accumulate=2,
                    ema=0.9, save_every=7, log_every=3, seed=3)
    return fit(model, loss, lambda g: torch.randn(8, 6, generator=g), Recipe(**{**settings, **changes}),
               name="toy", record=Record(folder), progress=False)

if __name__ == "__main__":
    train(sys.argv[1], float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def trainee(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "trainee.py"
    path.write_text(TRAINEE)
    scope: dict = {"__name__": "trainee"}
    exec(compile(TRAINEE, str(path), "exec"), scope)
    return path, scope["train"]


def same_run(a, b, record_a: Record, record_b: Record) -> None:
    """Bit-equal parameters, EMA and metrics."""
    for x, y in [(a.model, b.model), (a.ema, b.ema)]:
        for (name, p), q in zip(x.state_dict().items(), y.state_dict().values(), strict=True):
            assert torch.equal(p, q), name
    assert record_a.records("step") == record_b.records("step")
    assert a.history == b.history


@pytest.mark.parametrize("after", [1, 2, 3])
def test_kill_and_resume_is_bit_equal(trainee, tmp_path, after):
    path, train = trainee
    whole = train(tmp_path / "whole")
    process = subprocess.Popen([sys.executable, path, tmp_path / "killed", "0.01"], stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed" / "checkpoints" / "toy"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("step-*"))) < min(after, 2) and time.monotonic() < deadline:
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.037 * after)  # somewhere inside a step
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = train(tmp_path / "killed")
    assert resumed.resumed_from and resumed.resumed_from < 60
    same_run(whole, resumed, Record(tmp_path / "whole"), Record(tmp_path / "killed"))


def test_kill_before_the_first_checkpoint_starts_anew(trainee, tmp_path):
    _, train = trainee
    whole = train(tmp_path / "whole")
    record = Record(tmp_path / "early")
    record.write("step", training="toy", step=3, loss=1.0)  # what a run killed at step 5 had logged
    with open(record.metrics, "a") as f:
        f.write('{"kind": "step", "train')  # and the line the kill cut short
    resumed = train(tmp_path / "early")
    assert resumed.resumed_from is None
    same_run(whole, resumed, Record(tmp_path / "whole"), Record(tmp_path / "early"))


def test_a_finished_training_is_loaded_not_repeated(trainee, tmp_path):
    _, train = trainee
    first = train(tmp_path)
    again = train(tmp_path)
    assert again.resumed_from == 60
    assert again.seconds == first.seconds
    same_run(first, again, Record(tmp_path), Record(tmp_path))


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "altered":
        raw[-3] ^= 1
        path.write_bytes(raw)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(trainee, tmp_path, how, file):
    _, train = trainee
    whole = train(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    newest = tmp_path / "b" / "checkpoints" / "toy" / "step-00000060"
    if how == "altered" and file == "manifest.json":
        (newest / file).write_text((newest / file).read_text().replace("a", "b"))
    else:
        damage(newest / file, how)
    with pytest.raises(checkpoint.CheckpointError, match="is refused") as refused:
        checkpoint.load(newest)
    assert "\n" not in str(refused.value)
    with pytest.warns(UserWarning, match="trying the one before"):
        resumed = train(tmp_path / "b")
    assert resumed.resumed_from == 56
    same_run(whole, resumed, Record(tmp_path / "a"), Record(tmp_path / "b"))


def test_a_full_disk_stops_the_run_and_loses_nothing(trainee, tmp_path, monkeypatch):
    _, train = trainee
    whole = train(tmp_path / "whole")
    real, calls = checkpoint.save_file, []

    def out_of_space(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:  # the EMA of the third checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", out_of_space)
    with pytest.raises(checkpoint.CheckpointError, match="disk is full; the checkpoint of step 14 is intact") as stop:
        train(tmp_path / "full")
    assert "\n" not in str(stop.value)
    assert not list((tmp_path / "full" / "checkpoints" / "toy").glob(".writing-*"))
    monkeypatch.setattr(checkpoint, "save_file", real)
    resumed = train(tmp_path / "full")
    assert resumed.resumed_from == 14
    same_run(whole, resumed, Record(tmp_path / "whole"), Record(tmp_path / "full"))


def test_a_really_full_file_system(tmp_path):
    """The same on a real file system of 1 MB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        small = {"model": {"w": torch.ones(50_000)}}  # 0.2 MB
        checkpoint.save(disk / "c", 1, small, {})
        with pytest.raises(checkpoint.CheckpointError, match="disk is full; the checkpoint of step 1 is intact"):
            checkpoint.save(disk / "c", 2, {"model": {"w": torch.ones(250_000)}}, {})
        assert checkpoint.newest(disk / "c").step == 1
        assert torch.equal(checkpoint.newest(disk / "c").parts["model"]["w"], torch.ones(50_000))
        (disk / "filler").write_bytes(b"x" * (1 << 19))
        record = Record(disk)
        with pytest.raises(WorkbenchError, match="No space left"):
            for _ in range(100_000):
                record.write("note", text="x" * 100)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_nan_stops_with_step_value_and_last_good_checkpoint(tmp_path):
    model = nn.Linear(2, 1)

    def loss(model, batch):
        return {"loss": model(batch).mean() * (float("inf") if len(seen) == 12 else 1.0)}

    seen: list[int] = []

    def batch(generator):
        seen.append(1)
        return torch.ones(1, 2)

    recipe = Recipe(steps=20, save_every=5)
    with pytest.raises(NonFiniteError, match=r"loss is -?inf at step 12; the last good checkpoint is .*step-00000010"):
        fit(model, loss, batch, recipe, name="n", record=Record(tmp_path), progress=False)


def test_a_checkpoint_never_holds_a_weight_that_is_not_finite(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    recipe = Recipe(steps=4, save_every=1)
    poison = torch.optim.SGD(model.parameters(), lr=float("inf"))
    with pytest.raises(NonFiniteError, match="weight weight is not finite after step 1"):
        fit(model, lambda m, b: {"loss": m(b).mean()}, lambda g: torch.ones(1, 1), recipe, name="n",
            record=Record(tmp_path), optimizer=poison, progress=False)  # fmt: skip
    assert checkpoint.newest(tmp_path / "checkpoints" / "n") is None


def test_accumulation_equals_one_large_batch():
    """Mean gradients over k micro-batches are the gradient of the k times larger batch."""
    data = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0))
    weights = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        position = iter(data.double() if accumulate == 4 else data.double().reshape(1, 32, 3))
        recipe = Recipe(steps=1, accumulate=accumulate)
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        fit(model, lambda m, x: {"loss": m(x).square().mean()}, lambda g, p=position: next(p), recipe,
            name="a", optimizer=sgd, progress=False)  # fmt: skip
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)  # the loss is averaged in float32 for the log


def test_ema_is_the_exponential_average_of_the_weights():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    steps, decay, lr = 5, 0.8, 0.1
    fitted = fit(model, lambda m, b: {"loss": m(b).mean()}, lambda g: torch.ones(1, 1), Recipe(steps=steps, ema=decay),
                 name="e", optimizer=torch.optim.SGD(model.parameters(), lr=lr), progress=False)  # fmt: skip
    expected = -lr  # the first update starts the average
    for step in range(2, steps + 1):
        expected = decay * expected + (1 - decay) * (-lr * step)
    assert fitted.ema.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == pytest.approx(-lr * steps, rel=1e-6)


def test_schedule_matches_its_closed_form():
    recipe = Recipe(steps=100, warmup=0.1, schedule="cosine")
    assert [recipe.factor(i) for i in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert recipe.factor(55) == pytest.approx(0.5)
    assert recipe.factor(99) < 1e-3
    assert Recipe(steps=10).factor(9) == 1.0


def test_decay_touches_matrices_only():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    groups = adamw(model, Recipe(steps=1, weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.3, 1), (0.0, 4)]
    assert groups[0]["params"][0] is model[1].weight


def test_step_seeds_differ_wherever_an_argument_does():
    seeds = {step_seed(a, b, c, d) for a in range(4) for b in range(40) for c in range(3) for d in range(3)}
    assert len(seeds) == 4 * 40 * 3 * 3
    assert step_seed(1, 23) != step_seed(12, 3)


def test_frozen_weights_stay_and_are_not_written(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, lambda m, x: {"loss": m(x).square().mean()}, lambda g: torch.randn(4, 3, generator=g), Recipe(steps=3),
        name="f", record=Record(tmp_path), progress=False)  # fmt: skip
    assert torch.equal(before, model[0].weight)
    assert set(checkpoint.newest(tmp_path / "checkpoints" / "f").parts["model"]) == {"1.weight", "1.bias"}


def test_tied_weights_survive_a_checkpoint(tmp_path):
    shared = torch.arange(6.0)
    checkpoint.save(tmp_path, 1, {"model": {"a": shared, "b": shared}}, {})
    parts = checkpoint.load(tmp_path / "step-00000001").parts["model"]
    assert torch.equal(parts["a"], shared) and torch.equal(parts["b"], shared)


def test_another_recipe_or_model_is_one_clear_line(trainee, tmp_path):
    _, train = trainee
    train(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"belongs to another recipe \(lr=0.01\)"):
        train(tmp_path, lr=0.5)
    with pytest.raises(checkpoint.CheckpointError, match="does not fit this model"):
        fit(nn.Linear(6, 1), lambda m, b: {"loss": m(b).mean()}, lambda g: torch.randn(8, 6, generator=g),
            Recipe(steps=60, lr=1e-2, weight_decay=0.1, warmup=0.1, schedule="cosine", clip=1.0, accumulate=2, ema=0.9,
                   save_every=7, log_every=3, seed=3), name="toy", record=Record(tmp_path), progress=False)  # fmt: skip


def test_precisions_can_follow_each_other_in_one_process():
    """bf16 after float32 in one notebook kernel: products in bf16, weights in float32, the user's model unwrapped."""
    products = []

    def loss(model, x):
        products.append(nn.functional.linear(x, torch.ones(4, 4)).dtype)
        return {"loss": model(x).float().mean()}

    for precision in ("no", "bf16", "no"):
        model = nn.Linear(4, 4)
        fit(model, loss, lambda g: torch.randn(2, 4, generator=g), Recipe(steps=1, precision=precision), name="p",
            progress=False)  # fmt: skip
        assert model.weight.dtype == torch.float32
        assert "forward" not in vars(model), "accelerate's wrapper is still on the user's model"
    assert products == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused only where there is no GPU")
def test_fp16_without_a_gpu_is_one_clear_line():
    with pytest.raises(WorkbenchError, match='"fp16" needs a CUDA GPU; use "bf16" or "no" here'):
        fit(nn.Linear(1, 1), lambda m, b: {"loss": m(b).mean()}, lambda g: torch.ones(1, 1),
            Recipe(steps=1, precision="fp16"), name="h", progress=False)  # fmt: skip


def test_metrics_are_json_that_any_reader_takes(trainee, tmp_path):
    _, train = trainee
    train(tmp_path, steps=6)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [3, 6]
    assert set(records[0]) == {"kind", "training", "step", "loss", "lr", "grad_norm"}
