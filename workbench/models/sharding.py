"""FSDP: weights, gradients and optimiser state cut over the ranks, one block a unit; each rank saves its own part.

A model that went through `shard` trains in `fit` like any other. It resumes on the same number of ranks.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from workbench.errors import WorkbenchError


def shard(model: nn.Module, blocks: Iterable[nn.Module], *, bf16: bool = False) -> nn.Module:
    """Cut every block, then the rest, over all ranks (torch's fully_shard, in place); returns the model.

    bf16: compute in bfloat16, sums of gradients and weights in float32. Raises WorkbenchError without ranks.
    """
    if not dist.is_initialized():
        raise WorkbenchError("sharding needs ranks: start with torchrun (python -m torch.distributed.run)")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    how: dict[str, Any] = {"mesh": mesh, **({"mp_policy": policy} if policy else {})}
    for block in blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    return model


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a sharded model the whole weights `state`, which only rank 0 holds (an empty mapping elsewhere)."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)


def gather(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights on the CPU of rank 0, an empty dict elsewhere. Every rank has to call it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: t for name, t in state.items() if isinstance(t, Tensor)}


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` cut this model."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded value (a gradient norm) put together; any other tensor as it is. Every rank has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """`part`, as this rank's part of a tensor that is cut as `parameter` is; unchanged where that is not cut."""
    if not isinstance(parameter, DTensor) or part.dim() == 0:
        return part
    return DTensor.from_local(
        part.to(parameter.device), parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


def rank_folder(folder: Path) -> Path:
    """Where this rank's checkpoints are: another number of ranks does not find them."""
    return folder / f"rank-{dist.get_rank()}-of-{dist.get_world_size()}"


def common_step(step: int) -> int:
    """The newest step that every rank has a checkpoint of, `step` being this rank's newest (0: none)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    newest = torch.tensor(step, device=device)
    dist.all_reduce(newest, op=dist.ReduceOp.MIN)
    return int(newest)
