"""Cyber DAP at the paper's own sizes (meta device), over two ranks, on a user's model and data, and its benchmark."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from workbench.config import as_dict, override
from workbench.data.bpe import train_bpe
from workbench.errors import WorkbenchError
from workbench.lab import cyber_dap as panels
from workbench.models.causal_lm import freeze_embeddings, load_causal_lm, on_meta, save_model, small_llama
from workbench.papers import cyber_dap as paper
from workbench.papers import cyber_dap_bench
from workbench.runs.folder import notebook_path
from workbench.training.record import Record

# the public config.json files of the three models, as far as they decide shapes
LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
MODELS = {
    "full": (LlamaConfig(**LLAMA, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                         num_attention_heads=32), 8_030_261_248),
    "full-14b": (Qwen2Config(vocab_size=152_064, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=48,
                             num_attention_heads=40, num_key_value_heads=8, tie_word_embeddings=False),
                 14_770_033_664),
    "full-70b": (LlamaConfig(**LLAMA, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
                             num_attention_heads=64), 70_553_706_496),
}  # fmt: skip


@pytest.mark.parametrize("preset", MODELS)
def test_the_papers_models_have_the_published_number_of_parameters(preset, tmp_path):
    config, parameters = MODELS[preset]
    config.save_pretrained(tmp_path)
    model = on_meta(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.device.type == "meta" for p in model.parameters()), "nothing is allocated"
    tables = 2 * config.vocab_size * config.hidden_size
    assert freeze_embeddings(model) == parameters - tables
    c = paper.PRESETS[preset]
    assert c.shard and c.recompute and c.precision == "bf16" and c.tokens == 118_800_000
    assert c.batch * c.accumulate * c.context * 8 == 524_288, "0.5M tokens a step on one node of 8 GPUs"


TEXTS = [f"Tool {n}: to open door {n % 7} turn the handle {n % 5} times and wait." for n in range(60)]


def tiny_model(folder, *, tied=True, seed=0):
    tokenizer = train_bpe(TEXTS, 150)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    model = small_llama(len(tokenizer), width=16, layers=2, heads=2, context=192, seed=seed, eos=tokenizer.eos_token_id)
    if not tied:
        model.config.tie_word_embeddings = False
        model = AutoModelForCausalLM.from_config(model.config)
    return str(save_model(model, tokenizer, folder))


def jsonl(folder, rows):
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


def own(tmp_path, **changes):
    """A user's model, data with questions, and general text."""
    rows = [{"text": f"Turn the handle {n % 5} times, then wait for {n} minutes.", "name": f"Door {n}",
             "description": f"This opens to the room with number {n}.", "group": "g"} for n in range(40)]  # fmt: skip
    data = jsonl(tmp_path / "data", rows)
    general = jsonl(tmp_path / "general", [{"text": t} for t in TEXTS])
    return override(paper.PRESETS["quick"], {
        "teacher": tiny_model(tmp_path / "model"), "data": data, "general": general, "context": 16, "batch": 2,
        "tokens": 512, "general_tokens": 512, "held_out": 256, "questions": 4, "epochs": 1, **changes,
    })  # fmt: skip


def test_a_users_model_and_data_go_through_the_whole_study(tmp_path):
    seceval = tmp_path / "questions.json"
    row = {"source": "s", "question": "All?", "choices": ["A: w", "B: x", "C: y", "D: z"], "answer": "AC"}
    seceval.write_text(json.dumps([row, row | {"answer": "B"}]))
    config = own(tmp_path, benchmarks=[f"seceval:{seceval}"], across=False, recompute=True)
    run = tmp_path / "run"
    measured = paper.study(config, run, Record(run), 0)
    m = measured["dap", 0]
    assert {"nll domain", "nll general", "trained page", "held-out page", "seceval, generated", "tokens"} <= m.keys()
    assert m["nll domain"] < measured["base", 0]["nll domain"] and m["seceval, unparsable"] >= 0
    assert {r["measure"] for r in Record(run).records("result")} >= {"domain_nll", "retained", "constrained"}


def test_data_without_names_is_trained_on_and_not_asked_about(tmp_path):
    config = own(tmp_path, arms=["base", "dap"], data=jsonl(tmp_path / "plain", [{"text": t} for t in TEXTS]))
    measured = paper.study(config, tmp_path / "run", Record(tmp_path / "run"), 0)
    assert "trained page" not in measured["dap", 0]
    assert paper.claim_values({arm: measured[arm, 0] for arm in config.arms}).keys() == {"domain_nll", "retained"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "x"}], "no column 'text'"),
        ([{"text": ""}], "holds no text"),
        ([{"text": 3}], "column 'text' holds int"),
        ([], "empty"),
        ([{"text": "One page alone."}], "held-out tokens are less|every document is empty"),
    ],
)
def test_bad_data_is_told_in_one_line_before_anything_trains(tmp_path, rows, message):
    config = own(tmp_path, data=jsonl(tmp_path / "bad", rows))
    with pytest.raises(WorkbenchError, match=message) as error:
        paper.study(config, tmp_path / "run", Record(tmp_path / "run"), 0)
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "arms").exists()


def test_a_bad_model_is_told_in_one_line(tmp_path):
    folder = tiny_model(tmp_path / "model")
    with pytest.raises(WorkbenchError, match="context 4096 is more than the 192 tokens"):
        job = paper.Job(own(tmp_path / "a", context=16), "dap", 0, folder, None, tmp_path)
        paper.adapt(paper.Job(override(job.config, {"context": 4096}), "dap", 0, folder, None, tmp_path))
    larger = train_bpe([*TEXTS, "quite another vocabulary, with words of its own: ransom, phishing, payload"], 190)
    larger.add_special_tokens({"eos_token": "<|endoftext|>"})
    larger.save_pretrained(folder)
    with pytest.raises(WorkbenchError, match="another model's"):
        load_causal_lm(folder)
    weights = tmp_path / "pickled"
    tiny_model(weights)
    (weights / "model.safetensors").unlink()
    torch.save({}, weights / "pytorch_model.bin")
    with pytest.raises(WorkbenchError, match="safetensors"):
        load_causal_lm(str(weights))
    code = tmp_path / "code"
    tiny_model(code)
    config = json.loads((code / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.Config"}}
    (code / "config.json").write_text(json.dumps(config))
    (code / "mine.py").write_text("raise SystemExit('this code must never run')")
    with pytest.raises(WorkbenchError) as error:
        load_causal_lm(str(code))
    assert "\n" not in str(error.value)


def test_what_a_model_writes_is_shown_escaped(tmp_path, monkeypatch):
    model, tokenizer = load_causal_lm(tiny_model(tmp_path / "model"))
    item = panels.mc.Item("<script>alert(1)</script>?", ("<b>a</b>", "b"), frozenset({0}))
    monkeypatch.setattr(panels.mc, "generate", lambda *a, **k: ["<img src=x onerror=alert(2)>"])
    shown = panels.answers({"base": model}, tokenizer, [item]).data
    assert "<script>" not in shown and "<img" not in shown and "<b>a" not in shown and "&lt;img" in shown
    monkeypatch.setattr(tokenizer.__class__, "decode", lambda self, ids: "<i>")
    figure = panels.next_tokens({"base": model}, tokenizer, prompt="Tool")
    assert "<i>" not in str(figure.data[0].x) and "&lt;i&gt;" in str(figure.data[0].x)


RANKS = """
import os, sys, torch
from pathlib import Path
from accelerate import Accelerator
Accelerator()
from workbench.losses.causal_lm import next_token_loss
from workbench.models.causal_lm import load_sharded, save_model
from workbench.training.loop import Recipe, fit
from workbench.runs.folder import notebook_path
from workbench.training.record import Record
folder, run, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, tokenizer = load_sharded(folder, bf16=False)
assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
def stop(step, logged):
    if step == steps:
        raise KeyboardInterrupt
recipe = Recipe(steps=6, lr=1e-2, clip=1.0, save_every=2, log_every=1, seed=1, weight_decay=0.1)
draw = lambda g: torch.randint(3, 140, (2, 17), generator=g)
fit(model.train(), lambda m, w: {"loss": next_token_loss(m, w)}, draw, recipe, name="dap", record=Record(run),
    progress=False, on_step=stop if steps < 6 else None)
save_model(model, tokenizer, Path(run) / "out")
torch.distributed.barrier()
os._exit(0)  # all is written: gloo's threads, torn down at exit, once aborted a rank that had finished
"""


def torchrun(script, *args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *args]
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=300)


def test_two_ranks_hold_half_each_and_train_what_one_process_trains(tmp_path):
    from workbench.losses.causal_lm import next_token_loss
    from workbench.training.loop import Recipe, fit, step_seed

    folder = tiny_model(tmp_path / "model", tied=False)
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    done = torchrun(script, folder, tmp_path / "two", 6)
    assert done.returncode == 0, done.stderr[-3000:]
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "out").state_dict()

    model, _ = load_causal_lm(folder)
    step = iter(range(1, 7))

    def both(generator):
        now = next(step)
        draws = [torch.Generator().manual_seed(step_seed(1, now, 0, rank)) for rank in (0, 1)]
        return torch.cat([torch.randint(3, 140, (2, 17), generator=g) for g in draws])

    recipe = Recipe(steps=6, lr=1e-2, clip=1.0, seed=1, weight_decay=0.1)
    fit(model.train(), lambda m, w: {"loss": next_token_loss(m, w)}, both, recipe, name="one", progress=False)
    for name, p in model.state_dict().items():
        torch.testing.assert_close(two[name], p, rtol=1e-3, atol=1e-4)

    # stopped after step 5, each rank goes on from its part of step 4
    assert torchrun(script, folder, tmp_path / "killed", 5).returncode != 0
    assert {p.name for p in (tmp_path / "killed" / "checkpoints" / "dap").iterdir()} == {"rank-0-of-2", "rank-1-of-2"}
    done = torchrun(script, folder, tmp_path / "killed", 6)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "killed" / "out").state_dict()
    assert all(torch.equal(two[name], resumed[name]) for name in two), "bit-equal"


def test_the_benchmark_measures_packing_and_every_way_to_train(tmp_path):
    folder = tiny_model(tmp_path / "model")
    rows = cyber_dap_bench.training_cost(folder, torch.randint(3, 140, (2, 33)), repeats=1)
    cost = {r["method"]: r for r in rows}
    assert cost["lora"]["trained"] < cost["full"]["trained"] > cost["frozen embeddings"]["trained"]
    assert all(r["tokens_per_second"] > 0 and r["peak_bytes"] > 0 for r in rows)
    packed, padded = cyber_dap_bench.packing_cost([[5] * 7, [6] * 3, [7] * 8], 8, 1)
    # 7 + 1, 3 + 1, 8 + 1 places with a token in 8, 8 and 16 of them
    assert padded["share_real"] == pytest.approx(21 / 32) and padded["sequences"] == 4
    assert packed["sequences"] == 2 and packed["dropped"] == 21 - 2 * 8


def test_the_notebook_runs_on_a_users_model_and_data(tmp_path, monkeypatch, capsys):
    """Every code cell, in order, with `teacher` and `data` of one's own; the verdicts are written."""
    monkeypatch.setenv("WORKBENCH_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    config = own(tmp_path)
    usual = as_dict(paper.PRESETS["quick"])
    changes = {k: v for k, v in as_dict(config).items() if v != usual[k]}
    notebook = json.loads(notebook_path("cyber_dap").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(cell.count("\n") < 25 for cell in cells)
    names = {"preset": "quick", "seed": 0, "overrides": changes, "run_dir": None}
    for cell in cells[1:]:
        exec(compile(cell, "cell", "exec"), names)
    run = names["run"]
    claims = {c["claim"]["id"]: c for c in json.loads((run.path / "claims.json").read_text())}
    assert claims["domain_nll"]["why"] == "1 of 3 seeds" and claims["less_data"]["why"] == "not measured in this run"
    assert {p.stem for p in (run.path / "figures").iterdir()} >= {"frontier", "letters", "updates"}
    assert (run.path / "adapted" / "model.safetensors").exists()
    assert changes["data"] in json.loads((run.path / "config.json").read_text())["data"]
