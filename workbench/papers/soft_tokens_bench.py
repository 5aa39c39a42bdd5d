"""What a chain of thought costs: hard, soft and fuzzy, with a KV cache and without, in one run on this machine."""

import csv
import time
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
    config, out = Config(), []
    modes: dict[str, Mode] = {"hard": config.mode("hard"), "soft": config.mode("soft"), "fuzzy": config.mode("fuzzy")}
    for name, mode in modes.items():
        think = thinker(model, mode, sigma_of(model, mode.factor))
        for cached in (True, False):
            for length in lengths:

                def run(think: Any = think, cached: bool = cached, length: int = length) -> None:
                    rollout(model, ids, mask, think, never, limit=length, answer_limit=1, seed=seed, cached=cached)

                times = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    run()
                    times.append(time.perf_counter() - start)
                out.append(
                    {"mode": name, "cached": cached, "thoughts": length, "seconds": min(times),
                     "tokens_per_second": rows * length / min(times), "bytes": peak_bytes(run)}
                )  # fmt: skip
    return out


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
