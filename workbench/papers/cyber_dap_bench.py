"""`workbench bench cyber_dap`: training cost of full, frozen and LoRA adaptation; packing against padding."""

import csv
import time
from pathlib import Path
from typing import Any

import torch

from workbench.data.cwe import weaknesses
from workbench.data.packing import end_of_text, pack, pad, tokenise
from workbench.data.text import Windows
from workbench.evaluation.cost import peak_bytes
from workbench.losses.causal_lm import next_token_loss
from workbench.models.causal_lm import freeze_embeddings, load_causal_lm, recompute_activations, trainable, with_lora
from workbench.papers.cyber_dap_settings import REFERENCE


def _step(model: Any, optimizer: torch.optim.Optimizer, window: torch.Tensor) -> None:
    next_token_loss(model, window).backward()
    optimizer.step()
    optimizer.zero_grad()


def training_cost(base: str, window: torch.Tensor, repeats: int = 3) -> list[dict[str, Any]]:
    """Rows {"method", "trained", "tokens_per_second", "peak_bytes"} of one optimiser step, the best of `repeats`."""
    rows = []
    for method in ("full", "frozen embeddings", "lora", "full, recomputed activations"):
        model, _ = load_causal_lm(base)
        model.train()
        if method == "frozen embeddings":
            freeze_embeddings(model)
        elif method == "lora":
            model = with_lora(model, 8, 0)
        elif method != "full":
            recompute_activations(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        _step(model, optimizer, window)  # makes the optimiser's state
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            _step(model, optimizer, window)
            times.append(time.perf_counter() - start)
        peak = peak_bytes(lambda m=model, o=optimizer: _step(m, o, window))  # type: ignore[misc]
        tokens = window.shape[0] * (window.shape[1] - 1)
        rows.append({"method": method, "trained": trainable(model), "tokens_per_second": round(tokens / min(times)),
                     "peak_bytes": peak})  # fmt: skip
    return rows


def packing_cost(documents: list[list[int]], length: int, eos: int) -> list[dict[str, Any]]:
    """Rows {"layout", "sequences", "share_real", "dropped"}: the share of a batch's places that hold a document's token
    or its end, and the tokens of the last, incomplete window, which packing leaves out."""
    stream = pack(documents, eos)
    windows = Windows(stream, length, 1, 0).count
    padded, real = pad(documents, length, eos)
    kept = windows * length
    return [
        {"layout": "packed", "sequences": windows, "share_real": 1.0, "dropped": len(stream) - 1 - kept},
        {"layout": "padded", "sequences": len(padded), "share_real": real.float().mean().item(), "dropped": 0},
    ]


def bench(folder: Path) -> None:
    """Write training.csv and packing.csv to `folder` and print them: the committed base, curated CWE pages."""
    base = str(REFERENCE / "base-0")
    _, tokenizer = load_causal_lm(base)
    eos = end_of_text(tokenizer)
    documents = tokenise([p.text() for p in weaknesses()[0]], tokenizer)
    window = Windows(pack(documents, eos), 128, 8, 0)[0]
    tables = {"training": training_cost(base, window), "packing": [
        {"length": length, **row} for length in (128, 256, 512) for row in packing_cost(documents, length, eos)
    ]}  # fmt: skip
    for name, rows in tables.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"{name} ({folder / f'{name}.csv'})")
        for row in rows:
            print("  " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
