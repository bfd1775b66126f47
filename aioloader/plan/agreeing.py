"""Where ranks agree on their batches: which group they ask, and that it can be asked. Pure."""

from typing import TYPE_CHECKING, Any, Final

import torch

from aioloader.plan.plan import Plan, walk
from aioloader.stages.rank import check_mesh
from aioloader.stages.shard import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["agreeing_group", "check_agreeing"]

_WAY_OUT: Final = "pass shard(group=torch.distributed.new_group(backend='gloo'), even='agree')"


def agreeing_group(plan: Plan) -> "ProcessGroup | None":
    """The ranks that agree on each batch of `plan`; None: none have to.

    Raises:
        ValueError: They cannot, or not on one thing.
    """
    groups = [
        group
        for part in walk(plan)
        for stage in part.stages
        if isinstance(stage, Shard) and stage.even == "agree" and (group := check_agreeing(stage)) is not None
    ]
    if any(group is not groups[0] for group in groups):
        raise ValueError(
            "shard(even='agree') lets ranks agree on the batches of the whole pipeline, and this one has several "
            "of them with other groups; pass the same group to each"
        )
    return groups[0] if groups else None


def check_agreeing(shard: Shard) -> "ProcessGroup | None":
    """The ranks that are asked; None: there is one rank.

    Raises:
        ValueError: There are several, and no gloo group of them.
    """
    group = _group_of(shard)
    if group is None:
        rank, world_size = shard.place()
        if world_size == 1:
            return None
        raise ValueError(
            f"shard(even='agree') lets the ranks ask each other, and this is {rank=} with {world_size=} and without a "
            f"process group; {_WAY_OUT}"
        )
    if torch.distributed.get_world_size(group) == 1:
        return None
    backend = _cpu_backend(group)
    if backend != "gloo":
        raise ValueError(
            f"shard(even='agree') needs a group of gloo, whose calls do not wait in a stream of the device, got one of "
            f"{backend or 'no backend for the CPU'}; {_WAY_OUT}"
        )
    return group  # type: ignore[no-any-return]  # as `check_group` has seen


def _group_of(shard: Shard) -> Any:
    if shard.group is not None or shard.mesh is None:
        return shard.group
    mesh, dims = check_mesh(shard.mesh)
    if len(dims) > 1:
        raise ValueError(
            f"shard(even='agree') needs one group of the ranks that agree, and mesh has {len(dims)} dimensions; "
            f"{_WAY_OUT}"
        )
    return mesh.get_group(dims[0])


def _cpu_backend(group: Any) -> str:
    """What carries tensors of the CPU among the ranks of `group`; empty: nothing does."""
    config = str(torch.distributed.get_backend_config(group))  # such as "cpu:gloo,cuda:nccl"
    backends = dict(pair.partition(":")[::2] for pair in config.split(","))
    return backends.get("cpu", "")
