"""Auxiliary networks in the one loop: bit-equal resume, guards, own settings, and what a checkpoint refuses."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from workbench.errors import WorkbenchError
from workbench.training import checkpoint
from workbench.training.loop import Auxiliary, Recipe, fit
from workbench.training.record import Record
from workbench.training.state import NonFiniteError

# a generator that must match a Gaussian, and a critic that tells the two apart: neither learns without the other
TRAINEE = """
import sys, time, torch
from torch import nn
from workbench.training.loop import Auxiliary, Recipe, fit
from workbench.training.record import Record
from workbench.training.state import NonFiniteError

def networks():
    torch.manual_seed(5)
    return nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))

def train(folder, pause=0.0, steps=40, record=True, **critic_settings):
    model, critic = networks()
    def fool(model, x):
        time.sleep(pause)
        return {"loss": nn.functional.softplus(-critic(model(x))).mean()}
    def tell_apart(critic, x):
        fake, real = model(x).detach(), 0.5 * x + 2
        apart = nn.functional.softplus(critic(fake)).mean() + nn.functional.softplus(-critic(real)).mean()
        return {"loss": apart, "fake": critic(fake).mean()}
    settings = {**dict(lr=2e-2, betas=(0.5, 0.99), clip=1.0, repeats=2), **critic_settings}
    recipe = Recipe(steps=steps, lr=1e-2, warmup=0.1, schedule="cosine", ema=0.9, save_every=7, log_every=5, seed=3)
    side = Auxiliary(critic, tell_apart, **settings)
    fitted = fit(model, fool, lambda g: torch.randn(16, 2, generator=g), recipe, name="game", progress=False,
                 record=Record(folder) if record else None, auxiliaries={"critic": side})
    return fitted, critic

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


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_killed_game_resumes_bit_equal_with_its_critic(trainee, tmp_path):
    path, train = trainee
    whole, critic = train(tmp_path / "whole")
    process = subprocess.Popen([sys.executable, path, tmp_path / "killed", "0.02"], stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed" / "checkpoints" / "game"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("step-*"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed, its_critic = train(tmp_path / "killed")
    assert resumed.resumed_from and resumed.resumed_from < 40
    assert same(whole.model, resumed.model) and same(whole.ema, resumed.ema) and same(critic, its_critic)
    assert Record(tmp_path / "whole").records("step") == Record(tmp_path / "killed").records("step")
    # and with no record at all it is the same training
    assert same(train(None, record=False)[1], critic)


def test_the_checkpoint_holds_the_auxiliary_and_its_optimiser(trainee, tmp_path):
    _, train = trainee
    _, critic = train(tmp_path)
    saved = checkpoint.newest(tmp_path / "checkpoints" / "game")
    assert torch.equal(saved.parts["auxiliary-critic"]["0.weight"], critic[0].weight)
    assert saved.parts["auxiliary-critic-optimizer"]["0.step"].item() == 80  # two updates a step
    (saved.path / "auxiliary-critic.safetensors").unlink()
    with pytest.warns(UserWarning, match="trying the one before"):
        assert train(tmp_path)[0].resumed_from == 35


def test_the_critic_is_updated_as_by_hand():
    """Two steps of both, written out with plain torch: order of updates, draws, clipping and schedule."""
    draws: list[torch.Tensor] = []

    def batch(generator):
        draws.append(torch.randn(4, 2, generator=generator))
        return draws[-1]

    def networks():
        torch.manual_seed(0)
        return nn.Linear(2, 1), nn.Linear(1, 1)

    def main_loss(model, critic, x):
        return critic(model(x)).square().mean()

    def critic_loss(model, critic, x):
        return (critic(model(x).detach()) - 1).square().mean()

    model, critic = networks()
    side = Auxiliary(critic, lambda c, x: {"loss": critic_loss(model, c, x)}, lr=0.1, clip=0.01)
    recipe = Recipe(steps=2, lr=0.05, schedule="cosine", log_every=1)
    fitted = fit(model, lambda m, x: {"loss": main_loss(m, critic, x)}, batch, recipe, name="hand", progress=False,
                 auxiliaries={"c": side})  # fmt: skip
    ours, other = networks()
    main = torch.optim.AdamW(ours.parameters(), lr=0.05, weight_decay=0.0)
    aside = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.0)
    assert len(draws) == 4 and len({d.sum().item() for d in draws}) == 4
    for step in range(2):
        for optimiser, peak in ((main, 0.05), (aside, 0.1)):
            optimiser.param_groups[0]["lr"] = peak * recipe.factor(step)
        aside.zero_grad()
        critic_loss(ours, other, draws[2 * step]).backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.01)
        assert fitted.history[step]["c/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        aside.step()
        main.zero_grad()
        main_loss(ours, other, draws[2 * step + 1]).backward()
        main.step()
    torch.testing.assert_close(model.weight, ours.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(critic.weight, other.weight, rtol=1e-6, atol=1e-7)
    assert {"c/loss", "c/grad_norm", "loss"} <= set(fitted.history[0])


def test_nan_in_the_auxiliary_stops_with_its_name(tmp_path):
    model, critic, seen = nn.Linear(2, 1), nn.Linear(1, 1), []

    def loss(critic, x):
        seen.append(1)
        return {"loss": critic(model(x).detach()).mean() * (float("nan") if len(seen) == 7 else 1.0)}

    side = Auxiliary(critic, loss)
    with pytest.raises(NonFiniteError, match=r"loss of critic is nan at step 7; the last good .*step-00000006") as stop:
        fit(model, lambda m, x: {"loss": m(x).mean()}, lambda g: torch.ones(1, 2), Recipe(steps=9, save_every=3),
            name="n", record=Record(tmp_path), auxiliaries={"critic": side}, progress=False)  # fmt: skip
    assert "\n" not in str(stop.value)
    assert "forward" not in vars(critic), "accelerate's wrapper is still on the user's network"


def test_a_checkpoint_never_holds_an_auxiliary_weight_that_is_not_finite(tmp_path):
    model, critic = nn.Linear(2, 1), nn.Linear(1, 1)
    poison = Auxiliary(critic, lambda c, x: {"loss": c(model(x).detach()).mean()}, lr=float("inf"))
    with pytest.raises(NonFiniteError, match="weight critic/weight is not finite after step 1"):
        fit(model, lambda m, x: {"loss": m(x).mean()}, lambda g: torch.ones(1, 2), Recipe(steps=2, save_every=1),
            name="n", record=Record(tmp_path), auxiliaries={"critic": poison}, progress=False)  # fmt: skip
    assert checkpoint.newest(tmp_path / "checkpoints" / "n") is None


def test_other_auxiliary_settings_are_refused_in_one_line(trainee, tmp_path):
    _, train = trainee
    train(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="other auxiliary networks [^\n]*$"):
        train(tmp_path, lr=0.3)
    with pytest.raises(WorkbenchError, match="repeats is at least 1"):
        train(tmp_path, repeats=0)


def test_an_auxiliary_reads_indexed_batches_by_its_own_count():
    seen: dict[str, list[int]] = {"main": [], "side": []}

    class Numbers:
        def __getitem__(self, i):
            return torch.tensor([[float(i)]])

    def note(who, network, x):
        seen[who].append(int(x))
        return {"loss": network(x).mean()}

    model, critic = nn.Linear(1, 1), nn.Linear(1, 1)
    side = Auxiliary(critic, lambda c, x: note("side", c, x), repeats=3)
    fit(model, lambda m, x: note("main", m, x), Numbers(), Recipe(steps=2, accumulate=2), name="i", progress=False,
        auxiliaries={"s": side})  # fmt: skip
    assert seen == {"main": [0, 1, 2, 3], "side": [0, 1, 2, 3, 4, 5]}
