"""LoRA on a UNet's cross-attention: trained on one UNet, attached unchanged to another with the same attn2 modules."""

from typing import Any

from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from workbench.errors import WorkbenchError

TARGETS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]


def add_lora(unet: Any, rank: int = 4) -> list[str]:
    """Put a fresh adapter on every attn2 in place and train it alone; returns the trainable parameters' names."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS))
    return [name for name, p in unet.named_parameters() if p.requires_grad]


def lora_state(unet: Any) -> dict[str, Tensor]:
    """The adapter's tensors, under the names any UNet of this shape uses."""
    return {name: t.detach().clone() for name, t in get_peft_model_state_dict(unet).items()}


def attach_lora(unet: Any, state: dict[str, Tensor], rank: int = 4) -> None:
    """Attach a trained adapter in place, unchanged. Raises WorkbenchError when a tensor finds no place."""
    add_lora(unet, rank)
    if set(get_peft_model_state_dict(unet)) != set(state):
        raise WorkbenchError("the adapter does not fit this UNet's cross-attention: it was made for another shape")
    set_peft_model_state_dict(unet, state)
