"""LinFusion students in the released format: the linear attn1 modules alone, so that one file fits every fine-tune.

Format of `Yuanshi/LinFusion-1-5`, `-2-1` and `-XL` (read from the authors' public code): a diffusers folder whose
tensors are named "<i>.<key>", i counting the self-attentions in the order of UNet.named_modules(), with the keys of
GeneralisedLinearAttention (to_q, to_k, to_v, to_out.0, to_q_.{0,1,3}, to_k_.{0,1,3}); config.json lists the modules.
"""

import json
from pathlib import Path

from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench.data.hub import hub_error
from workbench.errors import WorkbenchError
from workbench.models.generalised_attention import GeneralisedLinearAttention, Mixer, self_attentions

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


def student_state(unet: nn.Module) -> dict[str, Tensor]:
    """The tensors of a student UNet's linear attentions under their released names."""
    layers = self_attentions(unet)
    for name, layer in layers.items():
        if not isinstance(layer, GeneralisedLinearAttention):
            raise WorkbenchError(f"{name} is still softmax attention: replace it before saving a student")
    return {
        f"{i}.{key}": tensor.detach().contiguous()
        for i, layer in enumerate(layers.values()) for key, tensor in layer.state_dict().items()
    }  # fmt: skip


def save_student(unet: nn.Module, folder: Path) -> None:
    """Write the linear attentions of `unet` to `folder` in the released format (safetensors)."""
    state = student_state(unet)
    modules = []
    for i, (name, layer) in enumerate(self_attentions(unet).items()):
        small = state.get(f"{i}.to_q_.0.weight")
        modules.append(
            {"module_name": name, "dim_n": state[f"{i}.to_q.weight"].shape[0], "heads": layer.heads,
             "projection_mid_dim": -1 if small is None else small.shape[0]}
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS)
    text = json.dumps({"_class_name": "LinFusion", "modules_list": modules}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf8")


def load_student(unet: nn.Module, id: str) -> list[str]:
    """Put a released student (Hub id or folder) in the place of every softmax self-attention of `unet`, in place.

    The width of f' and g' follows from the file. Returns the modules' names. Raises WorkbenchError when it cannot be
    had (offline and not cached, unknown, no safetensors) or was made for another UNet.
    """
    state = load_file(_weights(id))
    targets = self_attentions(unet)
    numbers = {int(key.split(".", 1)[0]) for key in state}
    if numbers != set(range(len(targets))):
        raise WorkbenchError(f"{id}: {len(numbers)} attention modules for a UNet with {len(targets)} self-attentions")
    for i, (name, attention) in enumerate(targets.items()):
        if not isinstance(attention, Attention):
            raise WorkbenchError(f"{name} is linear already: load a student into the softmax teacher")
        own = {key.split(".", 1)[1]: tensor for key, tensor in state.items() if key.startswith(f"{i}.")}
        small = own.get("to_q_.0.weight")
        # the modules of the teacher are kept; random init draws nothing that the file does not overwrite
        layer = GeneralisedLinearAttention(attention, Mixer(rank=0 if small is None else small.shape[0]))
        try:
            layer.load_state_dict(own)
        except RuntimeError as error:
            wrong = " ".join(str(error).split())[:200]
            raise WorkbenchError(f"{id}: module {i} does not fit {name} of this UNet: {wrong}") from error
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer.train(attention.training))
    return list(targets)


def _weights(id: str) -> Path:
    if Path(id).is_dir():
        if not (Path(id) / WEIGHTS).exists():
            raise WorkbenchError(f"{id}: no {WEIGHTS} in this folder")
        return Path(id) / WEIGHTS
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(id, WEIGHTS))
    except (OSError, ValueError) as error:
        raise hub_error(id, "model", error) from error
