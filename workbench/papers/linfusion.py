"""LinFusion: softmax self-attention of a diffusion UNet distilled into one linear token mixer."""

from workbench.models.generalised_attention import (
    GeneralisedLinearAttention,
    Mixer,
    replace_self_attention,
    self_attentions,
    train_only,
)

__all__ = ["GeneralisedLinearAttention", "Mixer", "replace_self_attention", "self_attentions", "train_only"]
