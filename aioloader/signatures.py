"""The types of what pipelines take, and of what the default collate makes of samples; see `docs/types.md`."""

from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar, final

import numpy as np
from torch import Generator, Tensor
from torch.utils.data import Dataset

from aioloader.core.mixture import Schedule
from aioloader.core.policies import Hedge, Retry
from aioloader.core.rate import Rate
from aioloader.core.skip import Skip
from aioloader.core.source import CursorSource
from aioloader.core.typevars import T_co
from aioloader.device import DeviceLike
from aioloader.executors.ray.workers import RayWorkers
from aioloader.sources.fetch import FetchSource

__all__ = [
    "AsyncIndexed",
    "Data",
    "DataLoaderOptions",
    "DictOfStackables",
    "Indexed",
    "ListOfStackables",
    "Many",
    "NamedWeights",
    "OwnOptions",
    "Source",
    "Stackable",
    "Stream",
    "TupleWithNames",
    "Unknown",
]

K = TypeVar("K")
T = TypeVar("T")


class Indexed(Protocol[T_co]):
    """A map-style dataset."""

    def __getitem__(self, key: Any, /) -> T_co:
        """The sample of a key."""


class AsyncIndexed(Protocol[T_co]):
    """One whose samples are awaited."""

    def __getitem__(self, key: Any, /) -> Coroutine[Any, Any, T_co]:
        """The sample of a key."""


class Many(Protocol[T_co]):
    """One that gives several samples at a time."""

    def __getitems__(self, keys: Any, /) -> Sequence[T_co] | Coroutine[Any, Any, Sequence[T_co]]:
        """Those of the keys."""


Iterated: TypeAlias = CursorSource[T] | FetchSource[T] | AsyncIterable[T] | Iterable[T]

Stream: TypeAlias = Iterated[T] | Callable[[], Iterated[T]] | Callable[[], Coroutine[Any, Any, Iterated[T]]]
"""What is iterated, other pipelines too, or a function that returns such."""

Source: TypeAlias = Stream[T] | Dataset[T]
"""One of several sources. Map-style datasets are known by their class here."""

Data: TypeAlias = Iterated[T] | Dataset[T] | AsyncIndexed[T] | Indexed[T] | Many[T]
"""What a `DataLoader` takes."""

NamedWeights: TypeAlias = Mapping[str, float] | Schedule | Callable[[int], Mapping[str, float]]
"""Of named sources; the function is called with the number of the draw."""

Stackable: TypeAlias = Tensor | np.ndarray[Any, Any] | np.generic | float
"""The default collate makes one tensor of several."""


DictOfStackables: TypeAlias = (
    dict[K, Tensor] | dict[K, bool] | dict[K, int] | dict[K, float] | dict[K, Tensor | int] | dict[K, Tensor | float]
)
ListOfStackables: TypeAlias = (
    list[Tensor] | list[bool] | list[int] | list[float] | list[Tensor | int] | list[Tensor | float]
)
"""Each kind for itself, since `dict[str, int]` is no `dict[str, Stackable]`: another could be put into that."""


@final
class Unknown:
    """Nothing is of this type: an overload for it is for `Any` alone, which matches every one and takes the first."""


class TupleWithNames(Protocol):
    """A `NamedTuple`: the default collate gives the same class again, with batches of its fields."""

    @property
    def _fields(self) -> tuple[str, ...]:
        """The names."""


class OwnOptions(TypedDict, total=False):
    """The arguments of `DataLoader` that are passed by name."""

    prefetch_factor: int | None
    persistent_workers: bool
    pin_memory_device: str
    in_order: bool
    device: DeviceLike | None
    concurrency: int | None
    ahead: int | None
    ahead_bytes: int | None
    worker_type: Literal["thread", "process", "ray"] | RayWorkers
    worker_method: Literal["multiprocessing", "thread"] | None
    seed: int | None
    skip_errors: Skip | bool | None
    retry: Retry | int | None
    sample_timeout: float | None
    hedge: Hedge | None
    rate: Rate | None
    shard: bool


class DataLoaderOptions(OwnOptions, total=False):
    """All that the overloads of `DataLoader` have in common."""

    sampler: Any
    batch_sampler: Any
    num_workers: int
    pin_memory: bool
    drop_last: bool
    timeout: float
    worker_init_fn: Callable[[int], None] | None
    multiprocessing_context: Any
    generator: Generator | None
