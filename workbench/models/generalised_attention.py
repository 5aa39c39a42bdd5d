"""LinFusion's generalised linear attention as a drop-in for the self-attention of a diffusers UNet.

Per module, with x (B, N, d), h heads of width d/h and a positive map phi (LinFusion, arXiv 2409.02097, method):

    q = phi(Wq (x + f'(x)))     k = phi(Wk (x + g'(x)))     v = Wv x
    S = mean_j k_j v_j^T        s = mean_j k_j              o_i = q_i^T S / (q_i^T s + eps)        out = Wo o

f', g' = Linear(d, r) -> LayerNorm -> LeakyReLU -> Linear(r, d). Keys are those of the released students:
to_q, to_k, to_v, to_out.0, to_q_ (f') and to_k_ (g'). The other mixings exist to be compared with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.linear_attention import apply_statistics, linear_attention
from workbench.models.patch_parallel import PatchParallel


@dataclass(frozen=True)
class Mixer:
    """Which token mixer stands where softmax stood; the defaults are the paper's.

    rank: width r of f' and g' (None: r = d; 0: no f', g' at all; a float is a share of d: 1/16 for SDXL).
    eps_scale: whether eps is added to a mean over tokens (the same at every N, as released) or to a sum.
    gate: Mamba2's per-head decay, for the scans only.
    """

    mixing: Literal["non-causal", "causal", "bi-directional"] = "non-causal"
    normalise: bool = True
    gate: bool = False
    rank: int | float | None = None
    phi: Literal["elu+1", "relu", "softmax"] = "elu+1"
    init: Literal["teacher", "random"] = "teacher"
    eps: float = 1e-4
    eps_scale: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.gate and self.mixing == "non-causal":
            raise WorkbenchError('gate needs an order of the tokens: mixing "causal" or "bi-directional"')
        if self.rank is not None and self.rank < 0:
            raise WorkbenchError(f"rank is None (as wide as the layer), 0 (no f', g') or more, got {self.rank}")


def feature_map(u: Tensor, phi: str) -> Tensor:
    """phi(u) >= 0 over the last axis, same shape and dtype."""
    if phi == "elu+1":
        return F.elu(u) + 1
    return F.relu(u) if phi == "relu" else u.softmax(-1)


def scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, chunk: int = 64) -> Tensor:
    """sum_{j<=i} decay(j+1..i) (q_i.k_j) v_j: the causal recurrence H_i = a_i H_{i-1} + k_i v_i^T, chunk by chunk.

    q, k: (B, H, N, D), v: (B, H, N, Dv), log_decay: log a_i <= 0, (B, H, N). Returns (B, H, N, Dv). O(N chunk).
    """
    log_decay = q.new_zeros(q.shape[:3]) if log_decay is None else log_decay
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    out = []
    for qc, kc, vc, ac in zip(*(x.split(chunk, 2) for x in (q, k, v, log_decay)), strict=True):
        a = ac.cumsum(2)
        # masked before exp: above the diagonal the exponent is positive and may overflow
        past = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool, device=a.device).tril()
        decay = (a[..., :, None] - a[..., None, :]).masked_fill(~past, -torch.inf).exp()
        out.append((qc @ kc.mT * decay) @ vc + (qc * a.exp()[..., None]) @ state)
        last = a[..., -1:, None]
        state = last.exp() * state + (kc * (last - a[..., None]).exp()).mT @ vc
    return torch.cat(out, 2)


def _small_network(width: int, rank: int) -> nn.Sequential:
    """f' or g': the low-rank gate absorbed into the feature map."""
    return nn.Sequential(
        nn.Linear(width, rank), nn.LayerNorm(rank), nn.LeakyReLU(inplace=True), nn.Linear(rank, width)
    )  # fmt: skip


class GeneralisedLinearAttention(nn.Module):
    """Takes over a diffusers Attention module: its projections (the same objects), norms and residual convention.

    count: tokens at the training resolution; un-normalised sums are divided by it, whatever N is at sampling time.
    """

    def __init__(self, attention: Attention, mixer: Mixer, count: float | None = None):
        super().__init__()
        if mixer.normalise is False and count is None:
            raise WorkbenchError("without normalisation the layer needs `count`, the tokens it sees at training size")
        self.mixer, self.count, self.heads = mixer, count, attention.heads
        self.patches: PatchParallel | None = None  # set to split the tokens over simulated ranks
        self.group_norm, self.residual = attention.group_norm, attention.residual_connection
        self.rescale = attention.rescale_output_factor
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out
        weight = cast(Tensor, attention.to_q.weight)
        width = weight.shape[1]
        if mixer.rank != 0:
            rank = int(mixer.rank * width) if isinstance(mixer.rank, float) else mixer.rank or width
            self.to_q_, self.to_k_ = (_small_network(width, max(rank, 1)) for _ in range(2))
        if mixer.gate:
            self.to_decay = nn.Linear(width, self.heads)
            nn.init.constant_(self.to_decay.bias, 4.0)  # a = sigmoid(4) = .98 a token: start with a long memory
        if mixer.init == "random":
            for linear in cast(list[nn.Linear], [self.to_q, self.to_k, self.to_v, self.to_out[0]]):
                cpu = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
                linear.load_state_dict(cpu.state_dict())
        elif mixer.rank != 0:
            for network in (self.to_q_, self.to_k_):  # zero, so that training starts from the teacher's projections
                for parameter in network[-1].parameters():
                    nn.init.zeros_(parameter)
        self.to(device=weight.device, dtype=weight.dtype)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k), v: each (B, H, N, d/H), from the layer's (normed) input x (B, N, d)."""
        q_in, k_in = (x + self.to_q_(x), x + self.to_k_(x)) if self.mixer.rank != 0 else (x, x)
        q, k, v = (
            u.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for u in (self.to_q(q_in), self.to_k(k_in), self.to_v(x))
        )  # fmt: skip
        return feature_map(q, self.mixer.phi), feature_map(k, self.mixer.phi), v

    def decay(self, x: Tensor) -> Tensor | None:
        """log a_i, (B, H, N), where the mixer has a gate."""
        return F.logsigmoid(self.to_decay(x).transpose(1, 2)) if self.mixer.gate else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
        """The weighted mean (or sum) of v for every token, heads apart: (B, H, N, d/H)."""
        m, n = self.mixer, k.shape[2]
        eps = m.eps if m.eps_scale == "mean" else m.eps / n
        if m.mixing == "non-causal" and self.patches is not None:
            scale = 1.0 if self.count is None else n / self.count
            strips = self.patches.statistics(k, v)
            parts = [
                apply_statistics(strip, S, s, eps, normalise=m.normalise, scale=scale, dtype=v.dtype)
                for strip, (S, s) in zip(q.chunk(len(strips), 2), strips, strict=True)
            ]
            return torch.cat(parts, 2)
        if m.mixing == "non-causal":
            return linear_attention(q, k, v, normalise=m.normalise, eps=eps, count=self.count)
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # one more channel sums the weights of each row
        both = scan(q, k, v, log_decay)
        if m.mixing == "bi-directional":
            # the backward pass forgets by the gates of the tokens after i; the diagonal is counted once
            gates = None if log_decay is None else log_decay.flip(2)
            backward = scan(q.flip(2), k.flip(2), v.flip(2), gates).flip(2)
            both = both + backward - (q * k).sum(-1, keepdim=True) * v
        total, weights = both[..., :-1], both[..., -1:]
        return total / (weights + eps * n) if m.normalise else total / (self.count or n)

    def matrix(self, x: Tensor) -> Tensor:
        """The weights M (B, H, N, N) in the layer's dtype, built explicitly (O(N^2)): for tests and pictures."""
        q, k, _ = self.features(x)
        identity = torch.eye(x.shape[1], dtype=q.dtype, device=q.device).expand(*q.shape[:2], -1, -1)
        return self.mix(q, k, identity, self.decay(x))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, **kwargs: object,
    ) -> Tensor:  # fmt: skip
        """hidden_states: (B, N, d), or (B, d, H, W) inside a UNet2DModel. Returns the same shape.

        Raises WorkbenchError for an attention mask or a second sequence: this layer replaces self-attention only.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise WorkbenchError("linear self-attention takes no mask and no second sequence; leave cross-attention be")
        x = hidden_states.flatten(2).mT if hidden_states.dim() == 4 else hidden_states
        if self.group_norm is not None:
            x = self.group_norm(x.mT).mT
        mixed = self.mix(*self.features(x), self.decay(x))
        out = mixed.transpose(1, 2).flatten(2).to(x.dtype)
        for module in self.to_out:
            out = module(out)
        if hidden_states.dim() == 4:
            out = out.mT.reshape(hidden_states.shape)
        return (out + hidden_states if self.residual else out) / self.rescale


def self_attentions(unet: nn.Module) -> dict[str, Attention | GeneralisedLinearAttention]:
    """Name -> module of every self-attention (softmax or linear) of a UNet, in the order of the network."""
    found: dict[str, Attention | GeneralisedLinearAttention] = {}
    for name, module in unet.named_modules():
        if isinstance(module, GeneralisedLinearAttention):
            found[name] = module
        elif isinstance(module, Attention) and not module.is_cross_attention:
            found[name] = module
    return found


@contextmanager
def capture(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, every self-attention's output (after Wo, before the residual), by name, as the UNet runs."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    handles = [module.register_forward_hook(keep(name)) for name, module in self_attentions(unet).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def replace_self_attention(
    unet: nn.Module, mixer: Mixer | None = None, *, counts: dict[str, int] | None = None, seed: int = 0
) -> list[str]:
    """Put the linear layer in the place of every softmax self-attention of `unet`, in place; returns their names.

    unet: UNet2DConditionModel (SD, SDXL: every attn1) or UNet2DModel. counts: tokens of each layer at training size
    (`token_counts`), needed without normalisation only. seed: of the fresh weights, the same on every device.
    Raises WorkbenchError when there is no softmax self-attention left to replace.
    """
    mixer = mixer or Mixer()
    targets = {n: m for n, m in self_attentions(unet).items() if isinstance(m, Attention)}
    if not targets:
        raise WorkbenchError(f"{type(unet).__name__} has no softmax self-attention to replace")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, attention in targets.items():
            parent, _, child = name.rpartition(".")
            layer = GeneralisedLinearAttention(attention, mixer, counts[name] if counts else None)
            setattr(unet.get_submodule(parent), child, layer.train(attention.training))
    return list(targets)


@torch.no_grad()
def token_counts(unet: nn.Module, z: Tensor, t: Tensor, **condition: object) -> dict[str, int]:
    """Tokens N that each self-attention sees when `unet` runs on z (B, C, H, W): N is what `counts` above needs."""
    with capture(unet) as seen:
        unet(z, t, **condition)
    # (B, N, d) inside a transformer block, (B, d, H, W) inside a UNet2DModel
    return {name: a.shape[1] if a.dim() == 3 else a[0, 0].numel() for name, a in seen.items()}


def train_only(unet: nn.Module, names: list[str]) -> list[str]:
    """Let gradients reach the parameters under the modules `names` only; returns the trainable parameters' names."""
    prefixes = tuple(f"{name}." for name in names)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    return [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
