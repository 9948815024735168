"""Process groups as arguments: checked, and what is summed over them before an objective."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_pref import validate
from fused_pref.validate import is_dtensor


def group_of(name: str, value: Any) -> Any:
    """A process group that this rank is in; a one-dimensional DeviceMesh stands for its own.

    Raises:
        TypeError, ValueError: something else, or this rank is not in it.
    """
    if value is None:
        return None
    if dist.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(value, DeviceMesh) and value.ndim == 1:
            value = value.get_group()
    if not dist.is_available() or not isinstance(value, dist.ProcessGroup):
        if dist.is_available() and value is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name} must be a group that this rank is in; rank {dist.get_rank()} is not in it")
        raise validate.fail(name, "a torch.distributed.ProcessGroup, a 1-d DeviceMesh or None", value, TypeError)
    if dist.get_rank(value) < 0:
        raise ValueError(f"{name} must be a group that this rank is in; rank {dist.get_rank()} is not in it")
    if torch.compiler.is_compiling():
        raise ValueError(f"{name} is not supported under torch.compile; compile the model up to the head")
    return value


def sum_over_ranks(values: Tensor, group: Any) -> Tensor:
    """Sum a tensor over the ranks of a group, in place."""
    dist.all_reduce(values, group=group)
    return values


def gathered(values: Tensor, group: Any) -> Tensor:
    """(ranks, ...): what every rank holds, which has one shape on all of them."""
    values = values.contiguous()
    parts = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(parts.unbind(0)), values, group=group)
    return parts


def head_group(weight: Any, tp_group: Any) -> Any:
    """The group of a vocab-parallel head: ``tp_group``, or of a DTensor weight that of the mesh that holds its rows.

    Raises:
        TypeError, ValueError: no group that this rank is in, a weight that is placed otherwise, or both.
    """
    group = group_of("tp_group", tp_group)
    if not is_dtensor(weight):
        return group
    rows = [number for number, placement in enumerate(weight.placements) if placement.is_shard(0)]
    whole = sum(placement.is_replicate() for placement in weight.placements)
    if len(rows) > 1 or len(rows) + whole < len(weight.placements):
        raise ValueError(
            f"weight must be sharded along its rows over at most one mesh dimension; got {weight.placements}"
        )
    if rows and group is not None:
        raise ValueError("tp_group must be None with a sharded DTensor weight, whose mesh says it")
    return weight.device_mesh.get_group(rows[0]) if rows else group


def local_head(hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """Hidden states, weight and bias as plain tensors; what is replicated is taken as it is.

    Gradients come back as DTensors.

    Raises:
        ValueError: placements that do not go with that of the weight.
    """
    if not is_dtensor(weight):
        return hidden, weight, bias
    if is_dtensor(hidden) and not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(f"hidden must be replicated; got {hidden.placements}")
    if is_dtensor(bias) and (bias.device_mesh, bias.placements) != (weight.device_mesh, weight.placements):
        raise ValueError(
            f"bias must be placed like weight, {weight.placements} on {weight.device_mesh}; got {bias.placements} on "
            f"{bias.device_mesh}"
        )
    hidden, weight, bias = (value.to_local() if is_dtensor(value) else value for value in (hidden, weight, bias))
    return hidden, weight, bias
