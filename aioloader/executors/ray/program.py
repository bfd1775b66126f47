"""What actors that run chunks are sent: once, a program; then chunks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from aioloader.executors.chunk import Call
from aioloader.executors.epochs import Epochs

__all__ = ["Parcel", "RayProgram"]


@dataclass(frozen=True)
class RayProgram:
    """What each actor gets once.

    Args:
        calls: The functions of one journey, all sync or all async.
        budget_seconds: After this time a chunk is returned, finished or not.
        prepare: Called once in each actor with its number.
        epochs: The epochs that the objects of the calls are in.
        threads: For one operation of torch.
        dtype: torch's default one in the driver, by name.
        timeout: Seconds for one attempt of an async call; None: no limit.
        timeout_name: How the user calls that.
        seeds_each: See `OnRay`.
    """

    calls: tuple[Call, ...]
    budget_seconds: float
    prepare: Callable[[int], None] | None
    epochs: Epochs
    threads: int
    dtype: str
    timeout: float | None = None
    timeout_name: str = "timeout"
    seeds_each: bool = False


class Parcel(NamedTuple):
    """A chunk for an actor.

    Attributes:
        payload: See `Payload` of `ProcessStep`.
        quick: It is done so soon that another one may wait after it in the same actor.
        alone: Nothing else may be in the actor meanwhile: if it dies, this one is to blame.
    """

    payload: tuple[Any, ...]
    quick: bool
    alone: bool
