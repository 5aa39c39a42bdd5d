"""Absorbing-state (masked) discrete diffusion: forward noise, clean-token probabilities, reverse jumps, sampling.

Symbols: x (B, L) clean tokens in 0..V-1; z_t (B, L) tokens in 0..V, where V is the mask m; alpha_t = 1 - (1 - EPS) t.

    q(z_t | x) = Cat(alpha_t x + (1 - alpha_t) m)         each position by itself
    t -> s:  a visible token is copied; a masked one is revealed w.p. (alpha_s - alpha_t) / (1 - alpha_t) = (t - s) / t

A network needs no time: of an absorbing process the visible tokens say it all (MDLM, Sahoo et al., arXiv 2406.07524).
"""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.head_sampling import sample_head

EPS = 1e-3  # alpha at t = 1


class Denoiser(Protocol):
    """What a network offers. V = `vocabulary`; the mask's row of `table` (V + 1, D) is the last one."""

    vocabulary: int
    width: int
    blocks: nn.ModuleList

    def hidden(self, z: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        """z (B, L) or their embeddings (B, L, D) → what stands before the vocabulary's part, (B, L, D)."""
        ...

    def features(self, hidden: Tensor) -> Tensor:
        """(..., D) → the head's input (..., D)."""
        ...

    @property
    def table(self) -> Tensor: ...

    @property
    def head(self) -> nn.Linear: ...


def alpha(t: Tensor) -> Tensor:
    """alpha_t, same shape as t."""
    return 1 - (1 - EPS) * t


def weight(t: Tensor) -> Tensor:
    """-alpha'_t / (1 - alpha_t) = 1 / t: the weight of a masked position in the continuous-time bound."""
    return 1 / t


def forward_noise(x: Tensor, t: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """z_t of x (B, L) at times t (B,) in [0, 1]."""
    keep = torch.rand(x.shape, generator=generator).to(x.device) < alpha(t).to(x.device)[:, None]
    return torch.where(keep, x, vocabulary)


def logits_at(net: nn.Module, z: Tensor, at: Tensor) -> Tensor:
    """Logits over the V real tokens at the positions `at` (B, L) bool, (M, V) in row-major order.

    The mask can never be predicted (SUBS): its logit is not there. Rows of z that are all the same (as at t = 1, where
    everything is masked) are computed once.
    """
    return head_logits(net, features_at(net, z, at))


def head_logits(net: nn.Module, features: Tensor) -> Tensor:
    """(M, D) → (M, V), without the mask's logit."""
    d = cast(Denoiser, net)
    bias = d.head.bias
    out = features @ d.head.weight[: d.vocabulary].T
    out = out if bias is None else out + bias[: d.vocabulary]
    return out if out.dtype == torch.float64 else out.float()


def features_at(net: nn.Module, z: Tensor, at: Tensor) -> Tensor:
    """The head's inputs at the positions `at`, (M, D)."""
    d = cast(Denoiser, net)
    if len(z) > 1 and bool((z == z[:1]).all()):
        hidden = d.hidden(z[:1]).expand(len(z), -1, -1)
    else:
        hidden = d.hidden(z)
    return d.features(hidden[at])


def draw(
    net: nn.Module,
    features: Tensor,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    tilt: Tensor | None = None,
) -> Tensor:
    """Tokens (M,) from the network's head on features (M, D): every draw of every sampler comes through here."""
    d = cast(Denoiser, net)
    bias = d.head.bias
    return sample_head(
        features, d.head.weight[: d.vocabulary], None if bias is None else bias[: d.vocabulary], generator,
        temperature=temperature, tilt=tilt,
    )  # fmt: skip


def reveals(z: Tensor, t: Tensor, s: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Which masked positions of z_t (B, L) are revealed on the way to s, bool (B, L); t, s (B,)."""
    share = ((t - s) / t)[:, None].to(z.device)
    return (torch.rand(z.shape, generator=generator).to(z.device) < share) & (z == vocabulary)


@torch.no_grad()
def jump(
    net: nn.Module, z: Tensor, t: Tensor, s: Tensor, generator: torch.Generator, *, temperature: float = 1.0
) -> Tensor:
    """One reverse step z_t → z_s of the ancestral sampler, (B, L); t, s (B,). s = 0 reveals everything."""
    shown = reveals(z, t, s, cast(Denoiser, net).vocabulary, generator)
    out = z.clone()
    if shown.any():
        out[shown] = draw(net, features_at(net, z, shown), generator, temperature=temperature)
    return out


Move = Callable[[int, Tensor, Tensor, Tensor, torch.Generator], Tensor]


@torch.no_grad()
def sample(
    net: nn.Module,
    count: int,
    length: int,
    steps: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    prompt: Sequence[int] | None = None,
    move: Move | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Ancestral sampling in `steps` equal steps of t from all masked: (count, length) int64 on the CPU.

    move(step, z, t, s, generator): another reverse step (guidance) in place of `jump`. prompt: tokens to begin with.
    Raises WorkbenchError: steps outside 1..length, a temperature not above 0, an empty, too long or unknown prompt.
    """
    d = cast(Denoiser, net)
    if not 1 <= steps <= length:
        raise WorkbenchError(f"NFE is a number of steps from 1 to the length {length}, got {steps}")
    if not temperature > 0:
        raise WorkbenchError(f"temperature is above 0, got {temperature:g}")
    if prompt is not None and not 0 < len(prompt) < length:
        raise WorkbenchError(f"a prompt has 1 to {length - 1} tokens, got {len(prompt)}")
    if prompt is not None and not all(0 <= token < d.vocabulary for token in prompt):
        raise WorkbenchError(f"the prompt has a token outside the vocabulary of {d.vocabulary}: another tokenizer?")
    z = torch.full((count, length), d.vocabulary, dtype=torch.int64, device=next(net.parameters()).device)
    if prompt is not None:
        z[:, : len(prompt)] = torch.tensor(list(prompt))
    was = net.training
    net.eval()
    for i in range(steps):
        t, s = (torch.full((count,), 1 - k / steps) for k in (i, i + 1))
        if i == steps - 1:
            s = torch.zeros(count)  # the last step removes what noise is left, exactly
        if move is None:
            z = jump(net, z, t, s, generator, temperature=temperature)
        else:
            z = move(i, z, t, s, generator)
        if on_step:
            on_step(i, z.cpu())
    net.train(was)
    return z.cpu()
