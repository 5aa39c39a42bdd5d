"""`workbench bench alexa_teacher`: tokens a second and memory of teacher and students, measured side by side."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from workbench.evaluation.cost import peak_bytes
from workbench.models.encoders import SHAPES, build_encoder, encoder_config, parameter_counts

MINIATURES = ("mini-2.3B", "mini-170M", "mini-17M")
# the paper's sizes are timed on a GPU only: their weights alone do not fit a small machine
ON_GPU = ("2.3B", "170M", "17M")


class PlainTokenizer:
    """What encoder_config must know of a tokenizer, for a vocabulary of a given size."""

    pad_token_id, bos_token_id, eos_token_id = 1, 0, 2

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return self.vocabulary


@torch.no_grad()
def encoder_cost(
    sizes: Sequence[str], *, vocabulary: int, batch: int = 32, tokens: int = 16, budget: float = 1.0
) -> list[dict[str, Any]]:
    """Rows of one forward pass of each encoder on `batch` inputs of `tokens` tokens, without the LM head.

    tokens a second from the best of the passes that fit `budget` seconds; bytes: weights, and activations at the peak.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size in sizes:
        config = encoder_config(size, PlainTokenizer(vocabulary), context=max(64, tokens))
        net = build_encoder(config, 0).eval().to(device)
        ids = torch.randint(4, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)

        def call(net: Any = net, ids: torch.Tensor = ids) -> None:
            net.base_model(input_ids=ids)
            if ids.is_cuda:
                torch.cuda.synchronize()

        call()
        times: list[float] = []
        while len(times) < 3 or sum(times) < budget:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        if device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            peak = peak_bytes(call)
        counts = parameter_counts(net)
        rows.append(
            {
                "size": size, "layers": SHAPES[size].layers, "width": SHAPES[size].width,
                "non-embedding": counts["non-embedding"], "total": counts["total"], "device": device, "batch": batch,
                "tokens": tokens, "tokens_per_second": round(batch * tokens / min(times)),
                "weight_bytes": sum(p.numel() * p.element_size() for p in net.parameters()), "activation_bytes": peak,
            }
        )  # fmt: skip
        del net
    return rows


def bench(folder: Path) -> None:
    """Write FOLDER/encoders.csv and print it: the miniatures everywhere, the paper's shapes on a GPU."""
    rows = encoder_cost(MINIATURES, vocabulary=1500)
    if torch.cuda.is_available():
        rows += encoder_cost(ON_GPU, vocabulary=150_000, tokens=64)
    with open(folder / "encoders.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for r in rows:
        print(
            f"{r['size']:>10}  {r['non-embedding']:>13,} non-embedding parameters, {r['total']:>13,} in all  "
            f"{r['tokens_per_second']:>9,} tokens/s  weights {r['weight_bytes'] / 1e6:,.1f} MB, "
            f"activations {r['activation_bytes'] / 1e6:,.1f} MB  ({r['device']})"
        )
