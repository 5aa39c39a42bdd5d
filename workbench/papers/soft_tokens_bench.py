"""What a chain of thought costs: hard, soft and fuzzy, with a KV cache and without, in one run on this machine."""

import csv
import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.evaluation.cost import peak_bytes
from workbench.models.thinking import Format, rollout
from workbench.papers.soft_tokens import sigma_of, thinker
from workbench.papers.soft_tokens_settings import Config, Mode

SHAPE: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 512}  # fmt: skip


def generation_cost(
    lengths: tuple[int, ...] = (16, 32, 64), *, rows: int = 16, prompt: int = 12, repeats: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows {"mode", "cached", "thoughts", "seconds", "tokens_per_second", "bytes"} of a small Llama on this device.

    Chains never stop before their length. seconds: the best of `repeats`; bytes: the most tensors alive at once
    beyond weights and inputs (space inside fused operators is not seen).
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    ids = torch.randint(SHAPE["vocab_size"], (rows, prompt), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    never = Format(lambda t: torch.zeros(len(t), dtype=torch.bool), lambda t: t[:, -1] < 0, (1,), (1,))
    config = Config()
    modes: dict[str, Mode] = {"hard": config.mode("hard"), "soft": config.mode("soft"), "fuzzy": config.mode("fuzzy")}
    thinks = {name: thinker(model, mode, sigma_of(model, mode.factor)) for name, mode in modes.items()}
    cells = list(itertools.product(modes, (True, False), lengths))

    def run(name: str, cached: bool, length: int) -> None:
        rollout(model, ids, mask, thinks[name], never, limit=length, answer_limit=1, seed=seed, cached=cached)

    best = dict.fromkeys(cells, float("inf"))
    run(*cells[0])  # the first call allocates its work space
    for _ in range(repeats):  # taking turns, so that what else the machine does meets all alike
        for cell in cells:
            start = time.perf_counter()
            run(*cell)
            best[cell] = min(best[cell], time.perf_counter() - start)
    return [
        {"mode": name, "cached": cached, "thoughts": length, "seconds": seconds,
         "tokens_per_second": rows * length / seconds, "bytes": peak_bytes(partial(run, name, cached, length))}
        for (name, cached, length), seconds in best.items()
    ]  # fmt: skip


def bench(folder: Path) -> None:
    """Write soft_tokens.csv to `folder` and print its rows."""
    rows = generation_cost()
    path = folder / "soft_tokens.csv"
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    for r in rows:
        kind = "cached" if r["cached"] else "uncached"
        print(
            f"{r['mode']:6}{kind:9}{r['thoughts']:4} thoughts{r['seconds']:8.3f} s"
            f"{r['tokens_per_second']:9.0f} tokens/s{r['bytes'] / 2**20:8.1f} MiB"
        )
