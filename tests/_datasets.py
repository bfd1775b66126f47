"""Small datasets and samplers that can be pickled, and the equality of what comes out of them."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal in value, type, dtype and layout, all the way down."""
    assert type(ours) is type(theirs), f"{type(ours)} is not {type(theirs)}"
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        assert ours.requires_grad == theirs.requires_grad
        assert torch.equal(ours, theirs), f"{ours} is not {theirs}"
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    elif isinstance(theirs, Mapping):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, Sequence) and not isinstance(theirs, str | bytes):
        assert len(ours) == len(theirs), f"{ours} is not {theirs}"
        for our_part, their_part in zip(ours, theirs, strict=True):
            assert_same(our_part, their_part)
    else:
        assert ours == theirs


class Point(NamedTuple):
    """A sample that is a named tuple."""

    x: Any
    y: Any


class SampleError(Exception):
    """What a broken dataset raises; it cannot be built from its message alone, as torch's workers try to."""

    def __init__(self, key: int, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key


class Made(Dataset[Any]):
    """`size` samples, each made by a function of its index."""

    def __init__(self, size: int, make: Callable[[int], Any]) -> None:
        self.size = size
        self.make = make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class MadeInBulk(Made):
    """Gives the samples of a whole batch at once; asking for a single one is an error."""

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("__getitems__ is there and must be used")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.make(index) for index in indices]


class NotInBulk(Made):
    """Switches a base class's `__getitems__` off, as torch allows."""

    __getitems__ = None


class AsyncMade(Made):
    """As `Made`, awaited."""

    async def __getitem__(self, index: int) -> Any:
        await asyncio.sleep(0)
        return self.make(index)


class AsyncMadeInBulk(MadeInBulk):
    """As `MadeInBulk`, awaited."""

    async def __getitems__(self, indices: list[int]) -> list[Any]:  # type: ignore[override]
        await asyncio.sleep(0)
        return [self.make(index) for index in indices]


class Stream(IterableDataset[Any]):
    """`size` samples one after the other; counts how often it is read."""

    def __init__(self, size: int, make: Callable[[int], Any]) -> None:
        self.size = size
        self.make = make
        self.reads = 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return map(self.make, range(self.size))


class SizedStream(Stream):
    """A stream that knows its length."""

    def __len__(self) -> int:
        return self.size


class ShardingStream(Stream):
    """Gives each worker of torch its own part."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            return super().__iter__()
        return map(self.make, range(worker.id, self.size, worker.num_workers))


class BrokenStream(IterableDataset[int]):
    """Gives `size` samples, then raises."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.error = SampleError(size, "the stream broke")

    def __iter__(self) -> Iterator[int]:
        yield from range(self.size)
        raise self.error


class Broken(Made):
    """Raises for some indices, always the same object for the same index."""

    def __init__(self, size: int, *broken: int) -> None:
        super().__init__(size, pair)
        self.errors = {index: SampleError(index, "broken") for index in broken}

    def __getitem__(self, index: int) -> Any:
        if index in self.errors:
            raise self.errors[index]
        return super().__getitem__(index)


class AsyncBroken(Broken):
    """As `Broken`, awaited."""

    async def __getitem__(self, index: int) -> Any:
        await asyncio.sleep(0)
        return super().__getitem__(index)


class Stopping(Made):
    """Raises StopIteration for index 6, as a `next()` on something empty does."""

    def __init__(self, size: int) -> None:
        super().__init__(size, pair)

    def __getitem__(self, index: int) -> Any:
        if index == 6:
            raise StopIteration
        return super().__getitem__(index)


class AsyncStopping(Stopping):
    """As `Stopping`, awaited; Python itself makes a RuntimeError of it."""

    async def __getitem__(self, index: int) -> Any:
        await asyncio.sleep(0)
        return super().__getitem__(index)


class Gated(Made):
    """Gives nothing until its gate is opened."""

    def __init__(self, size: int) -> None:
        super().__init__(size, pair)
        self.gate = threading.Event()

    @contextlib.contextmanager
    def opened_at_the_end(self) -> Iterator[None]:
        """Nobody waits for ever, whatever the test does."""
        try:
            yield
        finally:
            self.gate.set()

    def __getitem__(self, index: int) -> Any:
        self.gate.wait()
        return super().__getitem__(index)


class EvensThenOdds:
    """A sampler that is a class with a generator for `__iter__`, and not torch's `Sampler`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        yield from range(0, self.size, 2)
        yield from range(1, self.size, 2)


class BrokenSampler:
    """A sampler that gives `size` keys, then raises."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.error = SampleError(size, "the sampler broke")

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        yield from range(self.size)
        raise self.error


def pair(index: int) -> tuple[torch.Tensor, int]:
    """An input and its label."""
    return torch.arange(3.0) + index, index * index


def record(index: int) -> dict[str, Any]:
    """A sample of every kind of part."""
    return {
        "image": np.full((2, 3), index, np.float32),
        "name": f"sample {index}",
        "weight": index / 4,
        "flag": index % 2 == 0,
        "boxes": [torch.tensor([index, index + 1]), np.int16(index)],
        "raw": bytes([index]),
    }


def point(index: int) -> Point:
    """A named tuple of a tensor and a tuple."""
    return Point(torch.tensor(index), (index, float(index)))


def array(index: int) -> np.ndarray[Any, Any]:
    """A sample that is an array."""
    return np.arange(4, dtype=np.int16) + index


def noisy(index: int) -> tuple[torch.Tensor, int]:
    """A sample that draws from torch's global generator, as augmentation does."""
    return torch.rand(2) + index, index


def join(samples: list[Any]) -> str:
    """A collate_fn with a batch type of its own."""
    return "|".join(str(label) for _, label in samples)


def read_many(indices: Any) -> torch.Tensor:
    """What a dataset does with a whole list as its key (batch_size=None)."""
    return torch.as_tensor(indices) * 10
