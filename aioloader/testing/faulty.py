"""Sources that raise given exceptions at given positions, or fail by a plan."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from aioloader.testing.fault_plan import Fault, FaultPlan

__all__ = ["FaultySource", "SyncFaultySource"]

T = TypeVar("T")


class _Outcome(NamedTuple, Generic[T]):
    """What comes of one read: an error, or a sample with what the plan does to it."""

    error: BaseException | None
    sample: T | None
    fault: Fault | None = None


class _Faulty(Generic[T]):
    """Makes the outcomes of both faulty sources."""

    def __init__(self, samples: Iterable[T], faults: Mapping[int, BaseException] | FaultPlan) -> None:
        self.samples = samples
        self.plan = faults if isinstance(faults, FaultPlan) else None
        self.faults = {} if isinstance(faults, FaultPlan) else dict(faults)
        self.reads = 0

    def _outcomes(self) -> Iterator[_Outcome[T]]:
        """An error *replaces* the sample at its position."""
        iterator = iter(self.samples)
        position = 0
        while True:
            self.reads += 1
            error = self.faults.get(position)
            if error is not None:
                next(iterator, None)
                yield _Outcome(error, None)
            else:
                try:
                    sample = next(iterator)
                except StopIteration:
                    return
                yield _Outcome(None, sample, None if self.plan is None else self.plan.next_fault(position))
            position += 1


class FaultySource(_Faulty[T]):
    """An async iterable that raises given exceptions at given positions.

    Unlike a generator, it goes on after an error, so that a test can see whether the loader reads on.

    Args:
        samples: The samples.
        faults: The exceptions, by the position (from 0) of the sample that each replaces. Or a plan, which is asked by
            the position; each iteration is another attempt.

    Attributes:
        reads: How many samples have been requested, over all iterations.
    """

    def __aiter__(self) -> AsyncIterator[T]:
        return _AsyncOutcomes(self._outcomes(), self.plan)


class SyncFaultySource(_Faulty[T]):
    """The sync counterpart of `FaultySource`.

    Args:
        samples: The samples.
        faults: See there.

    Attributes:
        reads: How many samples have been requested, over all iterations.
    """

    def __iter__(self) -> Iterator[T]:
        return _Outcomes(self._outcomes(), self.plan)


class _Outcomes(Iterator[T]):
    def __init__(self, outcomes: Iterator[_Outcome[T]], plan: FaultPlan | None) -> None:
        self._outcomes = outcomes
        self._plan = plan

    def __next__(self) -> T:
        error, sample, fault = next(self._outcomes)
        if error is not None:
            raise error
        if self._plan is not None:
            self._plan.enter_sync(fault)
        return FaultPlan.leave(fault, sample)  # type: ignore[no-any-return]


class _AsyncOutcomes(AsyncIterator[T]):
    def __init__(self, outcomes: Iterator[_Outcome[T]], plan: FaultPlan | None) -> None:
        self._outcomes = outcomes
        self._plan = plan

    async def __anext__(self) -> T:
        try:
            error, sample, fault = next(self._outcomes)
        except StopIteration:
            raise StopAsyncIteration from None
        if error is not None:
            raise error
        if self._plan is not None:
            await self._plan.enter(fault)
        return FaultPlan.leave(fault, sample)  # type: ignore[no-any-return]
