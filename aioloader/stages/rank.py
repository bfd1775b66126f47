"""Which rank this process is, of how many: by numbers, a process group, a mesh, torch.distributed or the environment.

All of it is looked up in what this process knows already: nothing here talks to other ranks.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch

from aioloader.core.checks import check_count

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Even",
    "MeshDims",
    "check_group",
    "check_mesh",
    "check_rank",
    "current_rank",
    "group_rank",
    "has_process_group",
    "mesh_rank",
    "uneven",
]

Even = Literal["pad", "drop", "error", "keep", "agree"]
"""What becomes of a last round with fewer samples than ranks, see `Shard`."""

MeshDims = tuple["DeviceMesh", tuple[int, ...]]
"""A mesh, and the dimensions that data is split over, by number; the last one counts fastest."""


def has_process_group() -> bool:
    """Whether torch.distributed is initialised."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def current_rank() -> tuple[int, int]:
    """Rank and world size of this process: of torch.distributed when it is initialised, else of RANK and WORLD_SIZE.

    Raises:
        ValueError: The environment variables do not fit.
    """
    if has_process_group():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if rank is None:
        if world_size.strip() != "1":  # each of several processes would take itself for rank 0
            raise ValueError(
                f"RANK and WORLD_SIZE go together, got WORLD_SIZE={world_size!r} without RANK; "
                f"set both as torchrun does, or pass shard(rank, world_size)"
            )
        rank = "0"
    try:
        numbers = int(rank), int(world_size)
    except ValueError:
        raise ValueError(
            f"RANK and WORLD_SIZE must be integers, got RANK={rank!r} and WORLD_SIZE={world_size!r}; "
            f"pass shard(rank, world_size)"
        ) from None
    _check_range(*numbers, "the environment variables RANK and WORLD_SIZE")
    return numbers


def check_rank(rank: object, world_size: object) -> tuple[int, int]:
    """Rank and world size as they were passed.

    Raises:
        TypeError: They are no integers.
        ValueError: Only one is there, or they do not fit.
    """
    if rank is None or world_size is None:
        raise ValueError(
            f"rank and world_size go together, got rank={rank} and world_size={world_size}; "
            f"pass both, or neither to take them from torch.distributed or RANK and WORLD_SIZE"
        )
    world_size = check_count("world_size", world_size, least=1)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an integer, got {rank!r}")
    _check_range(rank, world_size, "the arguments")
    return rank, world_size


def _check_range(rank: int, world_size: int, where: str) -> None:
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size=} from {where}")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank must be in [0, world_size), got {rank=} with {world_size=} from {where}; "
            f"pass torch.distributed.get_rank()"
        )


# -- process groups ----------------------------------------------------------------------------------------------------


def check_group(group: object) -> None:
    """Refuse what is no process group, or one without this process.

    Raises:
        TypeError: It is none.
        ValueError: This process is not in it.
    """
    distributed = torch.distributed
    if distributed.is_available():
        # What `new_group` gives to processes that are not in it. By value: older torch has an object, newer a number.
        if group is distributed.GroupMember.NON_GROUP_MEMBER or group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "group must be one that this process is in, got the mark of torch.distributed.new_group for processes "
                "outside of it; make the loader on the group's ranks alone"
            )
        if isinstance(group, distributed.ProcessGroup):
            return
    raise TypeError(
        f"group must be a torch.distributed.ProcessGroup, got {group!r} of type {type(group).__name__}; pass for "
        f"instance torch.distributed.new_group(ranks), or shard(rank, world_size)"
    )


def group_rank(group: "ProcessGroup") -> tuple[int, int]:
    """Rank and world size in `group`.

    Raises:
        ValueError: This process is not in it.
    """
    try:
        rank = torch.distributed.get_rank(group)
    except ValueError:
        if (known := _known.get(group)) is None:
            raise
        return known  # it was destroyed, for instance at the end of training, before the last state is taken
    if rank < 0:
        raise ValueError(
            f"group must be one that this process is in, got one of ranks "
            f"{torch.distributed.get_process_group_ranks(group)} in rank {torch.distributed.get_rank()}; "
            f"make the loader on the group's ranks alone"
        )
    found = _known[group] = rank, torch.distributed.get_world_size(group)
    return found


_known: "WeakKeyDictionary[ProcessGroup, tuple[int, int]]" = WeakKeyDictionary()
"""Rank and world size in groups that were asked, which never change."""


# -- meshes ------------------------------------------------------------------------------------------------------------


def check_mesh(mesh: Any) -> MeshDims:
    """The mesh and the dimensions that data is split over.

    Args:
        mesh: A DeviceMesh of one dimension, such as `mesh["dp"]`; or a pair of a DeviceMesh and the names or numbers of
            its dimensions: `(mesh, "dp")`, `(mesh, ("replicate", "shard"))`.

    Raises:
        TypeError: It is neither.
        ValueError: Which dimension is not said, or it is not there, or this process is not in the mesh.
    """
    wanted: Any = None
    if isinstance(mesh, tuple) and len(mesh) == 2:
        mesh, wanted = mesh
    if not _is_mesh(mesh):
        raise TypeError(
            f"mesh must be a DeviceMesh or a pair of one and a dimension, got {mesh!r} of type {type(mesh).__name__}; "
            f"pass for instance mesh=mesh['dp'] or mesh=(mesh, 'dp')"
        )
    names = tuple(mesh.mesh_dim_names or ())
    known = ", ".join(map(repr, names)) if names else f"0 to {mesh.ndim - 1}"
    if wanted is None:
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh must have one dimension, got {mesh.ndim} ({known}); say which one the data is split over, for "
                f"instance mesh=(mesh, {names[0] if names else 0!r})"
            )
        wanted = 0
    several = isinstance(wanted, Sequence) and not isinstance(wanted, str)
    dims = tuple(_dimension(dim, mesh.ndim, names, known) for dim in (wanted if several else (wanted,)))
    if not dims or len(set(dims)) < len(dims):
        raise ValueError(f"mesh takes each dimension once, got {wanted!r}; the mesh has {known}")
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh must be one that this process is in, got one of ranks {mesh.mesh.tolist()}; "
            f"make the loader on the mesh's ranks alone"
        )
    return mesh, dims


def _is_mesh(mesh: object) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(mesh, DeviceMesh)


def _dimension(dim: object, ndim: int, names: tuple[str, ...], known: str) -> int:
    if isinstance(dim, str):
        if dim in names:
            return names.index(dim)
    elif not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"mesh takes names or numbers of dimensions, got {dim!r}; the mesh has {known}")
    elif 0 <= dim < ndim:
        return dim
    raise ValueError(f"mesh has no dimension {dim!r}; it has {known}")


def mesh_rank(mesh_dims: MeshDims) -> tuple[int, int]:
    """Rank and world size along the dimensions: the same for all ranks that differ in others only."""
    mesh, dims = mesh_dims
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # `check_mesh` has looked
    rank, world_size = 0, 1
    for dim in dims:
        size = mesh.size(dim)
        rank, world_size = rank * size + coordinate[dim], world_size * size
    return rank, world_size


def uneven(samples: int, world_size: int, resumed_at: int = 0) -> ValueError:
    """The error for a source of `samples`, of which `resumed_at` had been delivered before this run."""
    resumed_at = resumed_at if resumed_at % world_size else 0  # whole rounds make no difference
    left = samples - resumed_at
    after = f" after position {resumed_at}" if resumed_at else ""
    return ValueError(
        f"shard(even='error') needs as many samples for each rank, but {left} samples{after} on {world_size} ranks "
        f"leave {left % world_size} over; take a number that {world_size} divides, or even='pad' or even='drop'"
    )
