"""Held-out loss of language models and of their ensembles, in nats per token; and text sampled from them."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.data.text import Windows

Average = Literal["logits", "probabilities"]


def _batches(windows: Windows, batch: int):
    for start in range(0, windows.count, batch):
        yield windows.take(range(start, min(start + batch, windows.count)))


@torch.no_grad()
def ensemble_losses(
    members: Sequence[nn.Module], windows: Windows, *, average: Average = "logits", batch: int = 64
) -> list[float]:
    """Loss of the first 1, 2, ..., K members together, in nats: K = 1 is a single model's loss.

    "logits": p ∝ exp(mean_k logits_k), the paper's (a normalised geometric mean of the members' distributions);
    "probabilities": mean_k p_k. Members map tokens (B, T) to logits (B, T, V).
    """
    device = next(members[0].parameters()).device
    total = torch.zeros(len(members), dtype=torch.float64)
    count = 0
    for tokens in _batches(windows, batch):
        tokens = tokens.to(device)
        targets = tokens[:, 1:].reshape(-1)
        running: Tensor | None = None
        for k, member in enumerate(members):
            scores = member(tokens[:, :-1]).float().flatten(0, 1)
            if average == "probabilities":
                scores = scores.log_softmax(-1)
                running = scores if running is None else torch.logaddexp(running, scores)
                loss = -running.gather(1, targets[:, None]).sum() + len(targets) * torch.tensor(k + 1.0).log()
            else:
                running = scores if running is None else running + scores
                loss = F.cross_entropy(running / (k + 1), targets, reduction="sum")
            total[k] += float(loss)
        count += len(targets)
    return (total / count).tolist()


def soup(members: Sequence[nn.Module]) -> Mapping[str, Tensor]:
    """State dict of the mean of the members' weights (a contrast: independently trained members share no basin)."""
    states = [m.state_dict() for m in members]
    return {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}


@torch.no_grad()
def sample_text(
    members: Sequence[nn.Module],
    *,
    sequences: int,
    length: int,
    context: int,
    generator: torch.Generator,
    first: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """Unconditional text (sequences, length) int64 from the mean of the members' logits, starting after token `first`.

    Each token sees the last `context` ones, as in training. One member: its own text.
    """
    device = next(members[0].parameters()).device
    text = torch.full((sequences, 1), first, dtype=torch.int64, device=device)
    for _ in range(length):
        seen = text[:, -context:]
        logits = sum(m(seen)[:, -1].float() for m in members) / len(members)
        probabilities = (logits / temperature).softmax(-1).cpu()
        text = torch.cat([text, torch.multinomial(probabilities, 1, generator=generator).to(device)], 1)
    return text[:, 1:].cpu()


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Windows, *, batch: int = 16) -> float:
    """Mean next-token loss of a transformers causal model (its `.logits`) over all windows, in nats per token."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for tokens in _batches(windows, batch):
        tokens = tokens.to(device)
        logits = model(input_ids=tokens[:, :-1]).logits.float()
        total += float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
        count += tokens[:, 1:].numel()
    return total / count
