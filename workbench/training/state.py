"""What of a network and its optimiser goes into a checkpoint, and how it comes back; sharded parts by rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.models import sharding
from workbench.training import checkpoint


class NonFiniteError(WorkbenchError):
    """The loss or a weight became NaN or infinite."""


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and buffers, all a checkpoint needs: frozen weights come from where the model came from."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as tensors "index.key" and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else rest)[f"{index}.{key}"] = (
                sharding.local(value) if isinstance(value, Tensor) else value
            )
    return tensors, rest


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Give `optimizer` what `pack_optimizer` returned; its own learning rates and groups stay."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **rest}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    ordered: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    for position, own in state.items():
        own.update({k: sharding.like(ordered[position], v) for k, v in own.items() if isinstance(v, Tensor)})
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def finite_weights(model: nn.Module, step: int, owner: str = "") -> dict[str, Tensor]:
    """What a checkpoint keeps of a network. Raises NonFiniteError."""
    weights = {name: sharding.local(t) for name, t in trainable(model).items()}
    for name, t in weights.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise NonFiniteError(
                f"weight {owner}{name} is not finite after step {step}; no checkpoint was written of it"
            )
    return weights


def load_weights(model: nn.Module, saved: checkpoint.Checkpoint, part: str) -> None:
    """Put a checkpoint's `part` into `model`. Raises CheckpointError where the two do not fit each other."""
    state: dict[str, Tensor] = saved.parts[part]
    if sharding.is_sharded(model):
        own = model.state_dict()
        state = {name: sharding.like(own[name], t) if name in own else t for name, t in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise checkpoint.CheckpointError(f"{saved.path} does not fit this model: {line}") from None
    lost = set(missing) & set(trainable(model))
    if lost or unexpected:
        name = sorted(lost or unexpected)[0]
        raise checkpoint.CheckpointError(f"{saved.path} does not fit this model: {name} is in one of them only")
