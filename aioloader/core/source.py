"""Sources that know where each of their samples is: what `aioloader.sources` is made of, and what it may use.

A plain iterable is read sample by sample, and its cursor is a count: to go on in it, all before is read again. A source
of this kind gives entries with cursors of its own, for instance a file and a byte offset, and opens at one. It gives
them in lists, since a file that is read in large pieces has many samples at once.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, ClassVar, TypeVar

from aioloader.core.entry import Entry

__all__ = ["CursorSource", "EntryReader", "RunListener", "SourceContext", "SourceThreads"]

T = TypeVar("T")
E = TypeVar("E", bound="RunListener")


class EntryReader(ABC):
    """One epoch of a `CursorSource`, read by the one task that owns it."""

    @abstractmethod
    async def read(self, limit: int) -> list[Entry]:
        """Give 1 to `limit` entries, those that are there; `[]` at the end.

        Each with its `cursor`, where to go on after it, and its `key`, which names it and no other sample of the epoch,
        wherever it was opened; `position` is filled in by the caller. An entry with `error` raises at its place, and
        the next one follows.

        Raises:
            Exception: The source cannot go on; raised once, after the entries before it, and the epoch ends.
        """

    async def aclose(self) -> None:  # noqa: B027 - many hold nothing
        """Let go of files and connections. Called once, in the same task, also after a failure or in a cancellation."""


class CursorSource(ABC):
    """A source that gives each sample with a cursor, small and JSON-able, and opens at one.

    Pass it to `Pipeline` or `DataLoader`. Each epoch opens it anew, several may be open at a time, and it is pickled
    like any other object: what is open belongs to the reader.

    Attributes:
        replayable: Opened at a cursor, it gives what came after it. False for live data, which does not come again.
    """

    replayable: ClassVar[bool] = True

    @property
    def live(self) -> bool:
        """Whether it waits for samples that do not exist yet: cheap stages after it then take none before they must."""
        return not self.replayable

    def identity(self) -> dict[str, Any]:
        """What cursors depend on: which files, in which order. A state of another identity is refused.

        A small dict that JSON can hold. Asked for with each state, so what is costly is computed once.
        """
        return {}

    def check_cursor(self, cursor: Any) -> None:  # noqa: B027 - what there is to check is the source's own matter
        """Refuse what is no cursor of this source. May have been through JSON: lists for tuples.

        Raises:
            ValueError: Why.
        """

    @abstractmethod
    def open(self, context: "SourceContext", cursor: Any) -> EntryReader:
        """Begin an epoch behind `cursor`, or at its start when that is None. On the loop; must not block or wait."""


class RunListener(ABC):
    """What all readers of one source in one run share, and what is told of the run's end."""

    @abstractmethod
    def run_over(self, handed_out: Any) -> None:
        """The run has ended, and its consumer takes no more of it. In any thread.

        Args:
            handed_out: The cursor of the last entry that reached the consumer; None: there was none.
        """


class SourceContext(ABC):
    """What a reader may use while it is open: its loop, threads that end with it, and tasks that end with it."""

    @property
    @abstractmethod
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the reader runs on: the consumer's under `async for`."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The number of the epoch."""

    @property
    @abstractmethod
    def handed_out(self) -> Any:
        """The cursor of the last entry that reached the consumer, as the last stage made it; None: none did yet."""

    @abstractmethod
    def shared(self, owner: object, make: Callable[[], E]) -> E:
        """What the readers of `owner` share in this run, made by the first of them."""

    @abstractmethod
    def threads(self, limit: int) -> "SourceThreads":
        """Up to `limit` threads, started as they are needed, that end with the reader."""

    @abstractmethod
    def spawn(self, fn: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        """Start a task, for instance to read ahead; it is cancelled when the reader is closed.

        What it raises ends the run as a failure of the engine: a reader catches, and raises in `read`.
        """


class SourceThreads(Executor):
    """A reader's threads, as an executor: `aiofiles.open(path, "rb", executor=threads)`."""

    @abstractmethod
    def call(self, fn: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Begin `fn(*args)` in a thread; await the result. When that is cancelled, the call itself goes on."""
