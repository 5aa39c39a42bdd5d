"""A small decoder-only language model of the Llama family: RMSNorm, RoPE, SwiGLU, grouped queries, no biases.

Shapes: B sequences, T tokens, D width, H heads of width D/H, V vocabulary. Initialisation is N(0, 0.02) for every
matrix; the input embedding and the output head are separate (untied).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.losses.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class LMConfig:
    """Shape of a decoder. width D; hidden: width of the feed-forward layer; kv_heads: key/value heads (groups)."""

    vocabulary: int
    context: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads or self.width // self.heads % 2:
            raise WorkbenchError(
                f"width {self.width} needs heads ({self.heads}) of even width, a multiple of kv_heads ({self.kv_heads})"
            )


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, in float32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rope(x: Tensor, base: float) -> Tensor:
    """Rotate pairs (i, i + D/2) of x (B, H, T, D) by position * base^(-2i/D) (Su et al., arXiv 2104.09864)."""
    t, half = x.shape[-2], x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(t, device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(Dh) + causal mask) v, all (B, H, T, Dh)."""
    t = q.shape[-2]
    if t > 64:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # written out for short contexts: torch.func.vmap has no batching rule for the fused CPU kernel
    ahead = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.masked_fill(ahead, float("-inf")).softmax(-1) @ v


class Block(nn.Module):
    """Pre-norm attention and SwiGLU feed-forward, each added to its input."""

    def __init__(self, config: LMConfig):
        super().__init__()
        d, head = config.width, config.width // config.heads
        self.config = config
        self.attention_norm, self.ffn_norm = RMSNorm(d), RMSNorm(d)
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, config.kv_heads * head, bias=False)
        self.value = nn.Linear(d, config.kv_heads * head, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.gate = nn.Linear(d, config.hidden, bias=False)
        self.up = nn.Linear(d, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, d, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        c = self.config
        q = self.query(x).view(b, t, c.heads, -1).transpose(1, 2)
        k = self.key(x).view(b, t, c.kv_heads, -1).transpose(1, 2)
        v = self.value(x).view(b, t, c.kv_heads, -1).transpose(1, 2)
        q, k = rope(q, c.rope_base), rope(k, c.rope_base)
        groups = c.heads // c.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return self.output(causal_attention(q, k, v).transpose(1, 2).reshape(b, t, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x))
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class DecoderLM(nn.Module):
    """tokens (B, T) int64 → logits (B, T, V), or the mean next-token loss where targets are given."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.checkpoint_blocks = False  # recompute activations in the backward pass: memory for time

    def initialise(self, generator: torch.Generator) -> "DecoderLM":
        """Draw every matrix from N(0, 0.02), gains 1; returns self."""
        for p in self.parameters():
            if p.ndim >= 2:
                nn.init.normal_(p, std=0.02, generator=generator)
        return self

    def features(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, D) after the last norm."""
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with targets (B, T) their mean loss in nats instead, without ever holding all logits."""
        features = self.features(tokens)
        if targets is None:
            return self.head(features)
        return linear_cross_entropy(features.flatten(0, 1), self.head.weight, targets.flatten())


def parameter_counts(config: LMConfig) -> dict[str, int]:
    """Parameters of the blocks (with the last norm), of embedding and head, and in all; nothing is allocated."""
    with torch.device("meta"):
        model = DecoderLM(config)
    total = sum(p.numel() for p in model.parameters())
    tables = model.embedding.weight.numel() + model.head.weight.numel()
    return {"blocks": total - tables, "embedding and head": tables, "total": total}


_LLAMA = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "query": "self_attn.q_proj",
    "key": "self_attn.k_proj", "value": "self_attn.v_proj", "output": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def _llama_name(name: str) -> str:
    fixed = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if name in fixed or name == "head.weight":
        return fixed.get(name, "lm_head.weight")
    _, index, part, weight = name.split(".")
    return f"model.layers.{index}.{_LLAMA[part]}.{weight}"


def from_llama(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformers Llama state dict under our names (untied head). Raises WorkbenchError on what is left over."""
    layers = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("model.layers."))
    ours = ["embedding.weight", "norm.weight", "head.weight"]
    ours += [f"blocks.{i}.{part}.weight" for i in range(layers) for part in _LLAMA]
    left = set(state) - {_llama_name(n) for n in ours}
    if left:
        raise WorkbenchError(f"not a Llama this model can hold: {sorted(left)[0]} has no place in it")
    return {n: state[_llama_name(n)] for n in ours}


def to_llama(model: DecoderLM) -> dict[str, Tensor]:
    """Our state dict under transformers' Llama names."""
    return {_llama_name(name): t for name, t in model.state_dict().items()}


def llama_config(config: LMConfig) -> dict[str, object]:
    """Keyword arguments of transformers.LlamaConfig for the same shape."""
    return {
        "vocab_size": config.vocabulary, "hidden_size": config.width, "intermediate_size": config.hidden,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
        "num_hidden_layers": config.layers, "max_position_embeddings": config.context, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }  # fmt: skip
