"""Causal language models of transformers: small ones made here, released ones loaded; what of them trains; LoRA."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState, init_empty_weights
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from workbench.errors import WorkbenchError
from workbench.models.hub import load_pretrained
from workbench.models.sharding import fill, gather, is_sharded, shard


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


def load_tokenizer(id: str) -> Any:
    """The tokenizer of a Hub id or folder. Raises WorkbenchError in one line: none there, or without an EOS token."""
    tokenizer = load_pretrained(AutoTokenizer, id)
    if tokenizer.eos_token_id is None:
        raise WorkbenchError(f"the tokenizer of {id!r} has no EOS token to put between documents")
    return tokenizer


def load_causal_lm(id: str, *, precision: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer by Hub id or folder. Raises WorkbenchError in one line.

    What is refused: no safetensors weights, code that is not transformers' own, no tokenizer beside the weights, and a
    tokenizer with more tokens than the model has embeddings (it belongs to another model).
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for twenty tensors, in every worker
    try:
        tokenizer = load_tokenizer(id)
        model = load_pretrained(AutoModelForCausalLM, id, dtype=getattr(torch, precision))
    finally:
        if shown:
            logging.enable_progress_bar()
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise WorkbenchError(
            f"model {id!r} has {rows} embeddings, its tokenizer {len(tokenizer)} tokens: it is another model's"
        )
    return model, tokenizer


def on_meta(id: str | Path) -> nn.Module:
    """The model of a folder or Hub id on the meta device: its shapes, without a byte of weights."""
    config = load_pretrained(AutoConfig, str(id))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def blocks(model: Any) -> list[nn.Module]:
    """The decoder layers, in order: the units of sharding."""
    return list(model.get_decoder().layers)


def load_sharded(id: str, *, bf16: bool) -> tuple[Any, Any]:
    """Model and tokenizer with weights cut over the ranks of torchrun, float32; `bf16` is what the passes compute in.

    Rank 0 alone reads the weights, into CPU memory, and hands them round; no GPU ever holds them whole.
    """
    PartialState()  # joins torchrun's ranks
    if not dist.is_initialized():
        raise WorkbenchError("sharding needs ranks: start with torchrun, or set shard=false")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dist.get_rank() == 0:
        whole, tokenizer = load_causal_lm(id)
        state, config = whole.state_dict(), whole.config
    else:
        state, config = {}, load_pretrained(AutoConfig, id)
        tokenizer = load_tokenizer(id)
    # weights without storage; buffers (the rotary frequencies) are no part of a checkpoint and are kept
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    shard(model, blocks(model), bf16=bf16)
    model.to_empty(device=device)
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    fill(model, state)
    return model, tokenizer


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
        with warnings.catch_warnings():  # peft asks transformers by a name that is about to go
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, spec)


def recompute_activations(model: Any) -> None:
    """Activation checkpointing: memory for time. Inputs must carry gradients: frozen embeddings cut them off."""
    with warnings.catch_warnings():  # the newer name is not in every version this library takes
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False


def save_model(model: Any, tokenizer: Any, folder: Path, *, half: bool = False) -> Path:
    """A folder that transformers opens without this library: config, safetensors weights, tokenizer.

    A sharded model is put together on rank 0, which writes it; every rank has to call.
    """
    state = gather(model) if is_sharded(model) else None
    if half:
        model = model.half()
    if state != {}:
        model.save_pretrained(folder, **({"state_dict": state} if state else {}))
        tokenizer.save_pretrained(folder)
    return folder
