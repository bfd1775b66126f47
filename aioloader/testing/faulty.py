"""Sources that raise given exceptions at given positions."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

__all__ = ["FaultySource", "SyncFaultySource"]

T = TypeVar("T")


class _Faulty(Generic[T]):
    """Makes the outcomes of both faulty sources."""

    def __init__(self, samples: Iterable[T], faults: Mapping[int, BaseException]) -> None:
        self.samples = samples
        self.faults = dict(faults)
        self.reads = 0

    def _outcomes(self) -> Iterator[tuple[BaseException | None, T | None]]:
        """Pairs of an error or None, and a sample. An error *replaces* the sample at its position."""
        iterator = iter(self.samples)
        position = 0
        while True:
            self.reads += 1
            fault = self.faults.get(position)
            position += 1
            if fault is not None:
                next(iterator, None)
                yield fault, None
                continue
            try:
                sample = next(iterator)
            except StopIteration:
                return
            yield None, sample


class FaultySource(_Faulty[T]):
    """An async iterable that raises given exceptions at given positions.

    Unlike a generator, it goes on after an error, so that a test can see whether the loader reads on.

    Args:
        samples: The samples.
        faults: The exceptions, by the position (from 0) of the sample that each replaces.

    Attributes:
        reads: How many samples have been requested, over all iterations.
    """

    def __aiter__(self) -> AsyncIterator[T]:
        return _AsyncOutcomes(self._outcomes())


class SyncFaultySource(_Faulty[T]):
    """The sync counterpart of `FaultySource`.

    Args:
        samples: The samples.
        faults: The exceptions, by the position (from 0) of the sample that each replaces.

    Attributes:
        reads: How many samples have been requested, over all iterations.
    """

    def __iter__(self) -> Iterator[T]:
        return _Outcomes(self._outcomes())


class _Outcomes(Iterator[T]):
    def __init__(self, outcomes: Iterator[tuple[BaseException | None, T | None]]) -> None:
        self._outcomes = outcomes

    def __next__(self) -> T:
        fault, sample = next(self._outcomes)
        if fault is not None:
            raise fault
        return sample  # type: ignore[return-value]  # None only where T has None


class _AsyncOutcomes(AsyncIterator[T]):
    def __init__(self, outcomes: Iterator[tuple[BaseException | None, T | None]]) -> None:
        self._outcomes = outcomes

    async def __anext__(self) -> T:
        try:
            fault, sample = next(self._outcomes)
        except StopIteration:
            raise StopAsyncIteration from None
        if fault is not None:
            raise fault
        return sample  # type: ignore[return-value]  # None only where T has None
