"""Pre-layernorm multilingual encoders: their shapes, their masked-LM form, and the joint intent and slot model.

The class is transformers' XLMRobertaXL, which is the paper's encoder as far as it is known: RoBERTa with the layer norm
before each sublayer, one more after the last, none after the embeddings, learned absolute positions, tied output.
Shapes: B sentences, T tokens, d width, V vocabulary, I intents, K slot tags.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, XLMRobertaXLConfig, XLMRobertaXLForMaskedLM
from transformers.utils import logging

from workbench.errors import WorkbenchError
from workbench.models.hub import load_pretrained

logging.disable_progress_bar()  # one bar a shard of every small encoder would bury the training's own


@dataclass(frozen=True)
class Shape:
    """Layers, width d, heads and the feed-forward's width."""

    layers: int
    width: int
    heads: int
    ffn: int


# The paper prints counts, not shapes: these are the shapes that fit its counts (second-hand or inferred), then ours
SHAPES = {
    "9.3B": Shape(46, 4096, 32, 16384), "2.3B": Shape(30, 2560, 32, 10240), "700M": Shape(24, 1536, 24, 6144),
    "170M": Shape(24, 768, 12, 3072), "17M": Shape(4, 768, 12, 1200),
    "XLM-R Base": Shape(12, 768, 12, 3072), "DistilBERT": Shape(6, 768, 12, 3072),
    "mini-2.3B": Shape(2, 64, 4, 256), "mini-170M": Shape(1, 40, 4, 160), "mini-17M": Shape(1, 24, 2, 96),
    "tiny": Shape(1, 16, 2, 32),
}  # fmt: skip


def encoder_config(size: str, tokenizer: Any, *, context: int, dropout: float = 0.0, spread: float = 0.02) -> Any:
    """transformers' config of a named size for a tokenizer; spread: standard deviation of the initial weights.

    Raises WorkbenchError for an unknown size or a padding id so large that positions (which count from it) run out.
    """
    if size not in SHAPES:
        raise WorkbenchError(f"unknown encoder size {size!r}: choose from {', '.join(SHAPES)}")
    shape, pad = SHAPES[size], int(tokenizer.pad_token_id)
    return XLMRobertaXLConfig(
        vocab_size=len(tokenizer), hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.ffn, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, max_position_embeddings=context + pad + 1, type_vocab_size=1,
        pad_token_id=pad, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=spread, layer_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip


def build_encoder(config: Any, seed: int) -> XLMRobertaXLForMaskedLM:
    """A masked-LM encoder with the weights that `seed` draws (the global generator is left alone)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return XLMRobertaXLForMaskedLM(config)


def parameter_counts(net: Any) -> dict[str, int]:
    """ "non-embedding": what the paper counts (the layers and their last norm); "total": what is stored and served."""
    base = net.base_model
    tables = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    inside = sum(p.numel() for p in base.parameters() if id(p) not in tables)
    return {"non-embedding": inside, "total": sum(p.numel() for p in net.parameters())}


def load_encoder(id: str) -> tuple[Any, Any]:
    """(masked-LM model, tokenizer) of one folder or Hub id, float32. Raises WorkbenchError in one line.

    Refused: no tokenizer, no mask or padding token, a slow tokenizer (words cannot be traced to pieces), and a
    tokenizer that knows more tokens than the model has embeddings: another model's tokenizer.
    """
    tokenizer = load_pretrained(AutoTokenizer, id)
    net = load_pretrained(AutoModelForMaskedLM, id, dtype=torch.float32)
    if not tokenizer.is_fast:
        raise WorkbenchError(f"model {id!r}: its tokenizer is a slow one; words and pieces cannot be aligned with it")
    for name in ("mask_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise WorkbenchError(f"model {id!r}: its tokenizer has no {name.replace('_', ' ')}")
    try:
        tokenizer([["word"]], is_split_into_words=True)
    except (AssertionError, ValueError, TypeError):
        # byte-level tokenizers (RoBERTa's) take words one by one only with a space before the first
        tokenizer = load_pretrained(AutoTokenizer, id, add_prefix_space=True)
    rows = net.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise WorkbenchError(
            f"model {id!r}: its tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings: another tokenizer"
        )
    return net, tokenizer


def save_encoder(net: Any, tokenizer: Any, folder: Path) -> Path:
    """Weights (safetensors), config and tokenizer, as AutoModelForMaskedLM and AutoTokenizer open them."""
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class MaskedEncoder(nn.Module):
    """A masked-LM network whose output is computed at chosen positions only: (B, T, V) logits never exist.

    hidden: whether the states of every layer come too. projections: for hidden-state matching, d_S -> d_T a student
    layer; learned with the student and thrown away with this wrapper.
    """

    def __init__(self, net: Any, *, hidden: bool = False, teacher_width: int | None = None):
        super().__init__()
        self.net, self.hidden = net, hidden
        layers, width = int(net.config.num_hidden_layers), int(net.config.hidden_size)
        self.projections = nn.ModuleList()
        if teacher_width:
            self.projections.extend(nn.Linear(width, teacher_width, bias=False) for _ in range(layers))

    def forward(self, ids: Tensor, attention: Tensor, chosen: Tensor) -> tuple[Tensor, list[Tensor]]:
        """ids, attention (B, T) int64, chosen (B, T) bool: logits (M, V) there, states [(M, d), ...] a layer."""
        head = getattr(self.net, "lm_head", None)
        # a class that names its head otherwise: all logits, then the chosen
        part = self.net.base_model if head is not None else self.net
        out = part(input_ids=ids, attention_mask=attention, output_hidden_states=self.hidden)
        states = [h[chosen] for h in out.hidden_states[1:]] if self.hidden else []
        return head(out.last_hidden_state[chosen]) if head is not None else out.logits[chosen], states


class IntentSlotModel(nn.Module):
    """Joint intent classification and slot filling: one pass of the encoder, two heads of one hidden layer each.

    pooling "max": over real tokens only (padding is -inf); "first": the opening mark. frozen: the encoder is neither
    trained nor put into training mode. The heads are those of the authors' public MASSIVE code, scaled down.
    """

    def __init__(
        self, encoder: Any, intents: int, tags: int, *, hidden: int, pooling: Literal["max", "first"] = "max",
        frozen: bool = False, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.encoder, self.pooling, self.frozen = encoder, pooling, frozen
        width = int(encoder.config.hidden_size)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.intent = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, intents))
            self.slot = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, tags))
        encoder.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "IntentSlotModel":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, ids: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """ids, attention (B, T) → intent logits (B, I), slot logits (B, T, K)."""
        h = self.encoder(input_ids=ids, attention_mask=attention).last_hidden_state
        if self.pooling == "first":
            pooled = h[:, 0]
        else:
            pooled = h.masked_fill(attention[..., None] == 0, float("-inf")).amax(1)
        return self.intent(pooled), self.slot(h)


def intent_slot_loss(intent: Tensor, slot: Tensor, wanted: Tensor, tags: Tensor, weight: float) -> dict[str, Tensor]:
    """L = CE(intent) + weight * CE(slots): wanted (B,), tags (B, T) with -100 where no word starts."""
    of_intent = F.cross_entropy(intent.float(), wanted)
    of_slot = F.cross_entropy(slot.float().flatten(0, 1), tags.flatten(), ignore_index=-100)
    return {"loss": of_intent + weight * of_slot, "intent": of_intent, "slot": of_slot}


def encoder_of(net: Any) -> Any:
    """The encoder without its LM head (shared weights, not a copy)."""
    return cast(Any, net.base_model)
