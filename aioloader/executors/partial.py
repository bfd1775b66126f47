"""A batch without the samples that could not be loaded, on its way from a worker to the loop that counts them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Self

from aioloader.core.memory import Alloc, IntoMemory
from aioloader.executors.processes.failures import portable

__all__ = ["NO_SAMPLES", "KeysLeft", "LeavesOut", "LeftOut", "Partial", "over_partial", "over_partial_async"]


class _NoSamples:
    def __reduce__(self) -> str:
        return "NO_SAMPLES"  # one object in every process


NO_SAMPLES: Final = _NoSamples()
"""Instead of a batch: none of its samples could be loaded."""


class LeftOut:
    """A sample that could not be loaded.

    Attributes:
        at: Its number in its batch.
        error: Why.
        seconds: How long it took to fail; None: not known.
        attempts: How often it was tried.
    """

    def __init__(self, at: int, error: BaseException, seconds: float | None = None, attempts: int = 1) -> None:
        self.at = at
        self.error = error
        self.seconds = seconds
        self.attempts = attempts

    def __reduce__(self) -> Any:
        return LeftOut, (self.at, portable(self.error, f"process {os.getpid()}"), self.seconds, self.attempts)


class Partial:
    """What could be loaded of a batch, and what could not.

    Attributes:
        batch: The batch, or its samples, or what is made of them; `NO_SAMPLES`: there are none.
        left_out: In order.
        stage: Where they failed.
    """

    def __init__(self, batch: Any, left_out: list[LeftOut], stage: str) -> None:
        self.batch = batch
        self.left_out = left_out
        self.stage = stage

    def but(self, batch: Any) -> "Partial":
        """The same with another batch."""
        return Partial(batch, self.left_out, self.stage)


class KeysLeft:
    """The keys of a batch that has cost a worker; those left are loaded one by one.

    Attributes:
        keys: All of them.
        left_out: The samples that workers have died with, in order.
        only: The number of the one that is loaded, to see whether the worker lives on, and nothing is made of it; None:
            all that are left.
    """

    def __init__(self, keys: Sequence[Any], left_out: Sequence[LeftOut] = (), only: int | None = None) -> None:
        self.keys = keys
        self.left_out = left_out
        self.only = only

    def __len__(self) -> int:
        return len(self.keys)


class LeavesOut(ABC):
    """A function of a batch's keys that can do without samples."""

    @abstractmethod
    def without(self, keys: Any, at: int | None, error: BaseException) -> "KeysLeft | None":
        """What to give it instead of `keys`, with which a worker has died; None: nothing.

        Args:
            keys: What it was given.
            at: The number of the sample that was being loaded; None: not known.
            error: Tells that the worker has died.
        """


class over_partial(IntoMemory):  # noqa: N801 - a function, but one that can be pickled
    """`fn` of batches, for those as well of which some samples are left out."""

    def __init__(self, fn: Callable[[Any], Any]) -> None:
        self.fn = fn

    def into(self, alloc: Alloc | None) -> Self:
        return type(self)(self.fn.into(alloc)) if isinstance(self.fn, IntoMemory) else self

    def __call__(self, batch: Any) -> Any:
        """Call it."""
        if type(batch) is not Partial:
            return self.fn(batch)
        return batch if batch.batch is NO_SAMPLES else batch.but(self.fn(batch.batch))


class over_partial_async:  # noqa: N801
    """The same for an async `fn`."""

    def __init__(self, fn: Callable[[Any], Awaitable[Any]]) -> None:
        self.fn = fn

    async def __call__(self, batch: Any) -> Any:
        """Call it."""
        if type(batch) is not Partial:
            return await self.fn(batch)
        return batch if batch.batch is NO_SAMPLES else batch.but(await self.fn(batch.batch))
