"""Chains of thought fed by embeddings to any transformers causal LM: generation with a KV cache, and its replay.

Shapes: N chains, P prompt, C thoughts, S prefill, A answer slots, d width, V vocabulary. One row is laid out as

    [pad | prompt][thoughts | unused][unused | prefill][answer | unused]

A chain that stopped early leaves its later thought slots unused: they are masked and take no position, so every row
reads exactly what it would read alone. Prompts and prefills are padded on the left, so the last slot always counts.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workbench.errors import WorkbenchError

Think = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor]]
Ended = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """How thinking ends and an answer begins and ends.

    stop, end: token ids (N, t) so far -> (N,) bool, of the thoughts' shadow tokens and of the answer. stopped, limit:
    ids put after a chain that stopped by itself, and after one that ran into the limit (e.g. marker and box, box).
    """

    stop: Ended
    end: Ended
    stopped: tuple[int, ...]
    limit: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (self.stopped and self.limit):
            raise WorkbenchError("a chain of thought needs a prefill of one token or more before its answer")


@dataclass(frozen=True)
class Rollout:
    """N finished chains; every tensor's first axis is N. Unused slots are False in the masks.

    thoughts (N, C, d): the embeddings that were fed, constants; tokens (N, C): their tokens (of continuous thoughts
    the greedy shadow); actions (N, C, ...): what was drawn at random, constants. stopped (N,): ended by itself.
    """

    prompt: Tensor
    prompt_mask: Tensor
    thoughts: Tensor
    tokens: Tensor
    actions: Tensor
    thought_mask: Tensor
    prefill: Tensor
    prefill_mask: Tensor
    answer: Tensor
    answer_mask: Tensor
    stopped: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self, start: int, stop: int) -> "Rollout":
        """Chains start ... stop - 1."""
        return replace(self, **{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    @property
    def mask(self) -> Tensor:
        """(N, P + C + S + A) bool, slots in use."""
        return torch.cat([self.prompt_mask, self.thought_mask, self.prefill_mask, self.answer_mask], 1)


def embedding_table(model: Any) -> Tensor:
    """E (V, d) as the model feeds it: some families scale inside their embedding module."""
    module = model.get_input_embeddings()
    scale = getattr(module, "embed_scale", None)
    return module.weight if scale is None else module.weight * scale


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits as float32; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def positions_of(mask: Tensor) -> Tensor:
    """(N, T) int64: the how-manieth used slot each slot is, from 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


class _Reader:
    """Feeds embeddings to a model, with its cache or, uncached, all of them again each time."""

    def __init__(self, model: Any, cached: bool):
        self.model, self.cached = model, cached
        self.past = DynamicCache(config=model.config) if cached else None
        # transformers 5.24 renamed the argument
        self.word = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        self.embeds: Tensor | None = None
        self.mask: Tensor | None = None

    def feed(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Logits (N, V) float32 after the last slot of embeds (N, t, d); mask (N, t)."""
        new = mask.shape[1]
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        if not self.cached:
            self.embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds], 1)
            embeds, new = self.embeds, self.mask.shape[1]
        out = self.model(
            inputs_embeds=embeds, attention_mask=self.mask.long(), position_ids=positions_of(self.mask)[:, -new:],
            use_cache=self.cached, logits_to_keep=1, **{self.word: self.past},
        )  # fmt: skip
        return full_precision(out.logits[:, -1])

    def repeat(self, times: int) -> None:
        """Every row `times` times, in place: one prompt is read once for all its samples."""
        assert self.mask is not None
        self.mask = self.mask.repeat_interleave(times, 0)
        if self.past is not None:
            self.past.batch_repeat_interleave(times)
        elif self.embeds is not None:
            self.embeds = self.embeds.repeat_interleave(times, 0)


def _prefill(format: Format, stopped: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (N, S): each row's prefill, padded on the left."""
    width = max(len(format.stopped), len(format.limit))

    def padded(ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        pad = width - len(ids)
        row = torch.tensor([ids[0]] * pad + list(ids), device=stopped.device)
        return row, torch.arange(width, device=stopped.device) >= pad

    (a, a_mask), (b, b_mask) = padded(format.stopped), padded(format.limit)
    return torch.where(stopped[:, None], a, b), torch.where(stopped[:, None], a_mask, b_mask)


@torch.no_grad()
def rollout(
    model: Any, prompt: Tensor, prompt_mask: Tensor, think: Think, format: Format, *, limit: int, answer_limit: int,
    seed: int, samples: int = 1, answer_tau: float = 0.0, cached: bool = True,
) -> Rollout:  # fmt: skip
    """`samples` chains for each prompt (B, P) of ids, then an answer; rows b * samples + g. Nothing carries a gradient.

    think(logits (N, V), generator) -> the thought (N, d), its token (N,) and what was drawn (N, ...). limit,
    answer_limit: most thoughts and answer tokens; answer_tau: 0 is greedy.
    Raises WorkbenchError: no prompt, ids beyond the model's vocabulary.
    """
    if not len(prompt):
        raise WorkbenchError("no prompts to think about: the set is empty")
    if limit < 1 or answer_limit < 1 or samples < 1:
        raise WorkbenchError(f"thoughts {limit}, answer tokens {answer_limit} and samples {samples} are at least 1")
    embed = model.get_input_embeddings()
    top = max(int(prompt.max()), *format.stopped, *format.limit)
    if top >= embed.weight.shape[0]:
        raise WorkbenchError(
            f"token {top} of the tokenizer is not in the model's vocabulary of {embed.weight.shape[0]}"
        )
    generator = torch.Generator(prompt.device).manual_seed(seed)
    reader = _Reader(model, cached)
    logits = reader.feed(embed(prompt), prompt_mask).repeat_interleave(samples, 0)
    reader.repeat(samples)
    alive = torch.ones(len(logits), dtype=torch.bool, device=prompt.device)
    stopped = ~alive
    thoughts, tokens, actions, used = [], [], [], []
    for _ in range(limit):
        thought, token, action = think(logits, generator)
        thoughts.append(thought)
        tokens.append(token)
        actions.append(action)
        used.append(alive)
        logits = reader.feed(thought[:, None], alive[:, None])
        stopped = stopped | (alive & format.stop(torch.stack(tokens, 1)))
        alive = ~stopped
        if not alive.any():
            break
    prefill, prefill_mask = _prefill(format, stopped)
    logits = reader.feed(embed(prefill), prefill_mask)
    alive = torch.ones_like(stopped)
    answer, answered = [], []
    for a in range(answer_limit):
        token = pick(logits, answer_tau, generator)
        answer.append(token)
        answered.append(alive)
        if a + 1 == answer_limit:
            break
        ended = format.end(torch.stack(answer, 1))
        if not (alive & ~ended).any():
            break
        logits = reader.feed(embed(token)[:, None], alive[:, None])
        alive = alive & ~ended
    return Rollout(
        prompt.repeat_interleave(samples, 0), prompt_mask.repeat_interleave(samples, 0), torch.stack(thoughts, 1),
        torch.stack(tokens, 1), torch.stack(actions, 1), torch.stack(used, 1), prefill, prefill_mask,
        torch.stack(answer, 1), torch.stack(answered, 1), stopped,
    )  # fmt: skip


def pick(logits: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """A token (N,) from softmax(logits / tau), logits (N, V); tau 0 takes the most probable."""
    if tau == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / tau).softmax(-1), 1, generator=generator)[:, 0]


def replay(model: Any, chains: Rollout, *, continuous: bool) -> tuple[Tensor, Tensor]:
    """One parallel, differentiable pass over finished chains: logits before each thought (N, C, V) and each answer
    token (N, A, V), float32.

    continuous: the stored thoughts are fed, as constants; otherwise their tokens through the embedding, which trains.
    """
    embed = model.get_input_embeddings()
    thoughts = chains.thoughts if continuous else embed(chains.tokens)
    embeds = torch.cat([embed(chains.prompt), thoughts, embed(chains.prefill), embed(chains.answer)], 1)
    mask = chains.mask
    start = chains.prompt.shape[1] - 1  # the last slot of the prompt predicts the first thought
    logits = model(
        inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions_of(mask), use_cache=False,
        logits_to_keep=embeds.shape[1] - start,
    ).logits  # fmt: skip
    logits = full_precision(logits)
    answers = chains.thoughts.shape[1] + chains.prefill.shape[1]
    return logits[:, : chains.thoughts.shape[1]], logits[:, answers : answers + chains.answer.shape[1]]


def ends_with(ids: Sequence[int]) -> Ended:
    """True for rows whose last tokens are `ids`."""

    def ended(tokens: Tensor) -> Tensor:
        if tokens.shape[1] < len(ids):
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        return (tokens[:, -len(ids) :] == torch.tensor(ids, device=tokens.device)).all(1)

    return ended
