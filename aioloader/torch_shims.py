"""Stand-ins: what torch's constructor gets for an async dataset, and what trainers get for a batch sampler."""

from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

__all__ = ["AsyncStandIn", "BatchSamplerView"]


class AsyncStandIn(IterableDataset[Any]):
    """An async iterable, for torch's constructor: what it checks of iterable datasets holds for it.

    Args:
        dataset: With a length or without.
    """

    def __new__(cls, dataset: Any) -> "AsyncStandIn":
        return super().__new__(_SizedAsyncStandIn if hasattr(dataset, "__len__") else cls)

    def __init__(self, dataset: AsyncIterable[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("an async dataset is iterated by the loader, not by torch")


class _SizedAsyncStandIn(AsyncStandIn):
    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # made only for those that have a length


class _SamplerView:
    """What `loader.batch_sampler.sampler` shows to trainers: a place to set the epoch."""

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self.set_epoch = set_epoch


class BatchSamplerView(Iterable[Any]):
    """A loader's batch sampler, for trainers that read it, with a `sampler` whose `set_epoch` reaches the loader.

    Args:
        batch_sampler: The real one; None: the loader has none.
        length: Of the loader.
        set_epoch: The loader's.
    """

    def __init__(self, batch_sampler: Any, length: Callable[[], int], set_epoch: Callable[[int], None]) -> None:
        self._batch_sampler = batch_sampler
        self._length = length
        self.sampler = _SamplerView(set_epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batch_sampler or ())

    def __len__(self) -> int:
        return self._length()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._batch_sampler, name)
