"""A small bidirectional transformer (ModernBERT's classes, so that any transformers opens it) and its critic."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import ModernBertConfig, ModernBertForMaskedLM
from transformers.utils import logging

from workbench.errors import WorkbenchError
from workbench.models.hub import load_pretrained
from workbench.models.masked_diffusion import Denoiser


class MaskedLM(nn.Module):
    """A ModernBertForMaskedLM as a denoiser; its vocabulary counts the mask as its last token."""

    def __init__(self, net: ModernBertForMaskedLM):
        super().__init__()
        self.net = net
        self.vocabulary = int(net.config.vocab_size) - 1
        self.width = int(net.config.hidden_size)

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.net.model.layers)

    @property
    def table(self) -> Tensor:
        return cast(Tensor, self.net.model.embeddings.tok_embeddings.weight)

    @property
    def head(self) -> nn.Linear:
        return self.net.decoder

    def hidden(self, z: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        """z (B, L), or embeddings (B, L, D) → (B, L, D) after the last norm."""
        return self.net.model(input_ids=z, inputs_embeds=embeds).last_hidden_state

    def features(self, hidden: Tensor) -> Tensor:
        """(..., D) → the head's input."""
        return self.net.head(hidden)


def small_masked_lm(
    vocabulary: int, length: int, *, width: int = 64, layers: int = 3, heads: int = 4, seed: int = 0
) -> MaskedLM:
    """A fresh network for V = `vocabulary` real tokens and the mask; attention everywhere, no dropout, tied tables."""
    settings: dict[str, Any] = dict(
        vocab_size=vocabulary + 1, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=length, layer_types=["full_attention"] * layers,
        # no padding row: ModernBERT gives it no gradient, and every token here is a real one
        pad_token_id=None, bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None,
        # short texts: positions must turn by more than ModernBERT's base of 160,000 turns them; wide enough a start
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1000.0}},
        initializer_range=width**-0.5, attn_implementation="sdpa",
    )  # fmt: skip
    config = ModernBertConfig(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedLM(ModernBertForMaskedLM(config))


def load_masked_lm(id: str, *, vocabulary: int | None = None) -> MaskedLM:
    """A saved network, float32. Raises WorkbenchError: not there; made for another vocabulary than `vocabulary`."""
    logging.disable_progress_bar()  # a bar for a file of 200 kB would fill the notebook
    net = MaskedLM(load_pretrained(ModernBertForMaskedLM, id, dtype=torch.float32, attn_implementation="sdpa"))
    check_vocabulary(net, vocabulary, id)
    return net.eval()


def check_vocabulary(net: Any, vocabulary: int | None, name: str) -> None:
    """Raise WorkbenchError unless the network's real tokens are `vocabulary` in number (None: any)."""
    if vocabulary is not None and net.vocabulary != vocabulary:
        raise WorkbenchError(
            f"{name} was made for {net.vocabulary} tokens and a mask, the tokenizer here has {vocabulary}: "
            "teacher, student, critic and text must share one vocabulary"
        )


def save_masked_lm(net: MaskedLM, tokenizer: Any, folder: Path) -> None:
    """A folder that AutoModelForMaskedLM and AutoTokenizer open without this package."""
    logging.disable_progress_bar()
    net.net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Critic(nn.Module):
    """D: a copy of a denoiser's backbone with a spectrally normalised head a position (DiDi-Instruct, section 3).

    forward gives logit D at every position, (B, L): at its optimum log q_student(z) - log q_reference(z) at each of
    them. Only the last `train_blocks` blocks and the head learn. Built for its seed, whatever the global generator.
    """

    def __init__(self, denoiser: nn.Module, train_blocks: int, seed: int = 0):
        super().__init__()
        self.backbone = copy.deepcopy(denoiser).requires_grad_(False)
        inner = cast(Denoiser, self.backbone)
        self.vocabulary, width = inner.vocabulary, inner.width
        if not 0 <= train_blocks <= len(inner.blocks):
            raise WorkbenchError(f"the critic trains 0 to {len(inner.blocks)} blocks, got {train_blocks}")
        for block in list(inner.blocks)[len(inner.blocks) - train_blocks :]:
            block.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = spectral_norm(nn.Linear(width, width)), spectral_norm(nn.Linear(width, 1))

    def forward(self, z: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        """z (B, L) or embeddings (B, L, D) → logit D (B, L)."""
        hidden = cast(Denoiser, self.backbone).hidden(z, embeds)
        return self.last(F.silu(self.first(hidden))).squeeze(-1)

    def parameter_count(self) -> tuple[int, int]:
        """Parameters in all, and those that learn."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
