"""MDLM's published network (a diffusion transformer, 169 M parameters) under its own parameter names, as a denoiser.

Shapes and names follow kuleshov-group/mdlm: rotary positions, modulated norms from a noise level that MDLM keeps at 0.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench.data.hub import hub_error
from workbench.errors import WorkbenchError
from workbench.models.transformer import rope


@dataclass(frozen=True)
class DiTConfig:
    """Shape. vocab_size counts the mask, its last token; cond_dim: width of the noise level's embedding."""

    vocab_size: int = 50258
    hidden_dim: int = 768
    n_blocks: int = 12
    n_heads: int = 12
    cond_dim: int = 128
    model_length: int = 1024


class _Norm(nn.Module):
    """LayerNorm with a gain and no bias, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype) * self.weight


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class _Block(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        d, self.heads = c.hidden_dim, c.n_heads
        self.norm1, self.norm2 = _Norm(d), _Norm(d)
        self.attn_qkv, self.attn_out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.adaLN_modulation = _zero(nn.Linear(c.cond_dim, 6 * d))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.attn_qkv(y).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(rope(q, 10_000.0), rope(k, 10_000.0), v)
        x = x + gate1 * self.attn_out(mixed.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class _Embedding(nn.Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(rows, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))


class _NoiseLevel(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))


class _Final(nn.Module):
    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm_final, self.linear = _Norm(c.hidden_dim), _zero(nn.Linear(c.hidden_dim, c.vocab_size))
        self.adaLN_modulation = _zero(nn.Linear(c.cond_dim, 2 * c.hidden_dim))


class MDLMDiT(nn.Module):
    """The network; the modulations are those of noise level 0 at every time, as MDLM trains and samples it."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config, self.vocabulary, self.width = config, config.vocab_size - 1, config.hidden_dim
        self.vocab_embed = _Embedding(config.vocab_size, config.hidden_dim)
        self.sigma_map = _NoiseLevel(config.cond_dim)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_blocks))
        self.output_layer = _Final(config)

    @property
    def table(self) -> Tensor:
        return self.vocab_embed.embedding

    @property
    def head(self) -> nn.Linear:
        return self.output_layer.linear

    def _condition(self) -> Tensor:
        """Embedding of noise level 0, (cond_dim,): cosines are 1, sines 0."""
        level = torch.cat([self.table.new_ones(128), self.table.new_zeros(128)])
        return F.silu(self.sigma_map.mlp(level))

    def hidden(self, z: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        """z (B, L) or embeddings (B, L, D) → (B, L, D) before the output layer."""
        x = self.table[cast(Tensor, z)] if embeds is None else embeds
        condition = self._condition()
        for block in self.blocks:
            x = block(x, condition)
        return x

    def features(self, hidden: Tensor) -> Tensor:
        """(..., D) → the head's input."""
        shift, scale = self.output_layer.adaLN_modulation(self._condition()).chunk(2, -1)
        return self.output_layer.norm_final(hidden) * (1 + scale) + shift


def load_mdlm(id: str) -> MDLMDiT:
    """MDLM's weights from a folder or the Hub: config.json and model.safetensors, nobody's code is run.

    Raises WorkbenchError in one line: not to be had, or no MDLM of this shape.
    """
    folder = Path(id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(id, allow_patterns=["config.json", "model.safetensors"]))
        except Exception as error:  # the Hub's errors are of every kind; each becomes one line
            raise hub_error(id, "model", error) from error
    try:
        stored = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"model {id!r} needs config.json and model.safetensors: {error}") from None
    # the published state begins with the wrapper's name and holds the rotary frequencies, which follow from the shape
    state = {n.removeprefix("backbone."): t.float() for n, t in state.items() if not n.endswith("inv_freq")}
    names: dict[str, Any] = {f: stored[f] for f in DiTConfig.__dataclass_fields__ if f in stored}
    with torch.device("meta"):
        net = MDLMDiT(DiTConfig(**names))
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WorkbenchError(f"model {id!r} is no MDLM of this shape: {str(error).splitlines()[-1].strip()}") from None
    return net.eval()


def save_mdlm(net: MDLMDiT, folder: Path) -> None:
    """config.json and model.safetensors, as load_mdlm reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(net.config), indent=1) + "\n")
    save_file({n: cast(Tensor, t).contiguous() for n, t in net.state_dict().items()}, folder / "model.safetensors")
