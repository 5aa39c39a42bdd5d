"""Causal language models of transformers: small ones made here, released ones loaded; what of them trains; LoRA."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from workbench.errors import WorkbenchError
from workbench.models.hub import load_pretrained


def small_llama(
    vocabulary: int, *, width: int, layers: int, heads: int, context: int, seed: int, eos: int | None = None
) -> LlamaForCausalLM:
    """A Llama with tied embeddings, feed-forward 3 widths wide, initialised with `seed`; float32."""
    if width % heads or width // heads % 2:
        raise WorkbenchError(f"width {width} needs heads ({heads}) of even width")
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=eos, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_causal_lm(id: str, *, precision: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer by Hub id or folder. Raises WorkbenchError in one line.

    What is refused: no safetensors weights, code that is not transformers' own, no tokenizer beside the weights, and a
    tokenizer with more tokens than the model has embeddings (it belongs to another model).
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for twenty tensors, in every worker
    try:
        tokenizer = load_pretrained(AutoTokenizer, id)
        model = load_pretrained(AutoModelForCausalLM, id, dtype=getattr(torch, precision))
    finally:
        if shown:
            logging.enable_progress_bar()
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise WorkbenchError(
            f"model {id!r} has {rows} embeddings, its tokenizer {len(tokenizer)} tokens: it is another model's"
        )
    if tokenizer.eos_token_id is None:
        raise WorkbenchError(f"the tokenizer of {id!r} has no EOS token to put between documents")
    return model, tokenizer


def on_meta(id: str | Path) -> nn.Module:
    """The model of a folder or Hub id on the meta device: its shapes, without a byte of weights."""
    config = load_pretrained(AutoConfig, str(id))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def context_limit(model: Any) -> int:
    """The most tokens the model was made for."""
    return int(model.config.max_position_embeddings)


def freeze_embeddings(model: Any) -> int:
    """Freeze the input embedding and the head; returns how many parameters still train.

    Where the two are tied they are one tensor, and freezing either freezes both.
    """
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_(False)
    return trainable(model)


def trainable(model: nn.Module) -> int:
    """Number of parameters that require a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_lora(model: Any, rank: int, seed: int) -> Any:
    """The model with a LoRA on every linear layer of its blocks, alpha = 2 rank, and nothing else to train (peft)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spec = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, spec)


def recompute_activations(model: Any) -> None:
    """Activation checkpointing: memory for time. Inputs must carry gradients: frozen embeddings cut them off."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False


def save_model(model: Any, tokenizer: Any, folder: Path, *, half: bool = False) -> Path:
    """A folder that transformers opens without this library: config, safetensors weights, tokenizer."""
    if half:
        model = model.half()
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder
