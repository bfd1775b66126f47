"""Sources that know where each of their samples is: what `aioloader.sources` is made of, and what yours may be made of.

A plain iterable is read sample by sample, and its cursor is a count: to go on in it, all before is read again. A source
of this kind gives entries with cursors of its own, for instance a file and a byte offset, and opens at one. It gives
them in lists, since a file that is read in large pieces has many samples at once.

    CursorSource   describes: what there is, where a cursor leads. Pickled and shared; holds nothing open.
    EntryReader    reads one epoch of it. Holds files and connections, and closes them.
    SourceContext  what a reader may use of the run: threads, tasks, the loop.
    Entry          one sample, with its cursor and its key.

`docs/sources/own.md` has a whole one.
"""

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, ClassVar, Generic, TypeVar

from aioloader.core.entry import Entry
from aioloader.core.policies import Policies
from aioloader.core.policy_log import PolicyLog
from aioloader.core.seeds import derive_seed
from aioloader.core.typevars import T_co

__all__ = ["CursorSource", "EntryReader", "RunListener", "SourceContext", "SourceThreads"]

T = TypeVar("T")
E = TypeVar("E", bound="RunListener")


class EntryReader(ABC):
    """One epoch of a `CursorSource`, read by one task, which calls `read` until the end and then `aclose`.

    Both run on the event loop, one after the other and never twice at a time, and must not block it: what blocks goes
    to `SourceContext.threads`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.isasyncgenfunction(cls.read):
            raise TypeError(f"{cls.__qualname__}.read must return a list of entries, but it is an async generator")

    @abstractmethod
    async def read(self, limit: int) -> list[Entry]:
        """Give the next 1 to `limit` entries, or `[]` at the end.

        Called when that many more samples are wanted, and not before the first one is. It may wait as long as there is
        nothing; as soon as there is something it should return, and not wait until `limit` are there. After `[]`, or an
        exception, it is not called again.

        It is cancelled when the epoch is given up, as by a `break`; a call in a thread that it waits for goes on.

        Args:
            limit: How many at most, 1 or more.

        Returns:
            New entries, in order, in a new list. One made by `Entry.failed` raises in its place.

        Raises:
            Exception: The source cannot go on. Raised once, after the entries before it, and the epoch ends; a state
                that is taken then leads to where it failed, and it is opened again there.
        """

    async def aclose(self) -> None:  # noqa: B027 - many hold nothing
        """Let go of files and connections.

        Called once for each reader, after its last `read`, also after a failure or a cancellation; it has five seconds.
        Threads and tasks of the context are still there, and end after it.
        """


class CursorSource(ABC, Generic[T_co]):
    """A source that gives each sample with a cursor, and opens at one: a resume reads nothing again.

    Pass it to `Pipeline` or `DataLoader`. Each epoch opens it anew, and several may be open at a time. What is open
    belongs to the reader; the source itself is a description, which `in_process()` pickles, and of which
    `cache(disk=...)` compares the class and the attributes that are plain values.

    Its order is its own: `shuffle(buffer_size)` shuffles it, and with `shard()` every rank opens it, reads all of it,
    and keeps its part. With `__len__`, `len(loader)` is known; a state is then refused once that number has changed, so
    what grows does not define it.

    Attributes:
        ahead: Entries that its readers hold ready, at most, if that is stated; for statistics.
        replayable: Opened at a cursor, it gives what came after it. False for live data, which does not come again:
            then a state says `"live"`, and a `for` loop in the thread of a running event loop warns that both may wait.
    """

    ahead: int | None = None
    replayable: ClassVar[bool] = True
    _names_samples: ClassVar[bool] = True  # False: keys come later, and are None until then

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("open", "identity", "check_cursor"):
            if inspect.iscoroutinefunction(getattr(cls, name)):
                raise TypeError(
                    f"{cls.__qualname__}.{name} must be a plain function, but it is async; what has to be awaited "
                    f"belongs into the first EntryReader.read"
                )

    @property
    def live(self) -> bool:
        """Whether it waits for samples that do not exist yet: cheap stages after it then take none before they must."""
        return not self.replayable

    @property
    def same_each_epoch(self) -> bool:
        """Whether each epoch gives the same samples in the same order, as a cache needs it."""
        return True

    def identity(self) -> dict[str, Any]:
        """What cursors depend on: which file or table, in which order. A state of another identity is refused.

        A small dict of strings to what JSON can hold. Called for each state that is made or loaded, in the
        thread that does that, so what is costly is computed once. What may change without moving a sample, such as a
        path or a timeout, does not belong into it.
        """
        return {}

    def check_cursor(self, cursor: Any) -> None:
        """Refuse what is no cursor of this source, so that a broken state is told where it is loaded.

        Called with the cursor of a state, never with None. It has been through JSON, which makes tuples lists, and may
        hold anything. Looks at the value alone: nothing is opened.

        Raises:
            ValueError: Why.
        """

    @abstractmethod
    def open(self, context: "SourceContext", cursor: Any) -> EntryReader:
        """Begin an epoch after `cursor`, or at its start when that is None.

        Called on the event loop, when the first sample is wanted. It must not block or wait: make the reader, and open
        files in its first `read`, in a thread.

        Args:
            context: What the reader may use.
            cursor: That of an entry which this source gave, in this process or another one. It may have been through
                JSON, which makes tuples lists; `check_cursor` has accepted it.
        """


class RunListener(ABC):
    """What all readers of one source in one run share, and what is told of the run's end."""

    @abstractmethod
    def run_over(self, handed_out: Any) -> None:
        """The run has ended, and its consumer takes no more of it. In any thread.

        Args:
            handed_out: The cursor of the last entry that reached the consumer; None: there was none.
        """


class SourceContext(ABC):
    """What a reader may use while it is open: its loop, threads that end with it, and tasks that end with it.

    The loader makes it. Its methods are called on the loop. `handed_out` and `shared` are what `Channel` takes samples
    back with, and may still change; so may `consumer_starves`.
    """

    @property
    @abstractmethod
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the reader runs on: the consumer's under `async for`, a private one under `for`."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The number of the epoch, from 0: for an order that changes with it."""

    @property
    @abstractmethod
    def handed_out(self) -> Any:
        """The cursor of the last entry that reached the consumer, as the last stage made it; None: none did yet."""

    @property
    def consumer_starves(self) -> bool:
        """Whether no batch lies ready for the consumer, who has had one: what a reader waits for, it waits for, too.

        True where nobody can tell.
        """
        return True

    @abstractmethod
    def shared(self, owner: object, make: Callable[[], E]) -> E:
        """What the readers of `owner` share in this run, made by the first of them."""

    @abstractmethod
    def threads(self, limit: int) -> "SourceThreads":
        """Up to `limit` threads, started as they are needed, that end with the reader.

        With a limit of 1 all calls are made by one thread, in order, as a connection of sqlite3 needs it.

        Raises:
            TypeError, ValueError: `limit` is no integer of at least 1.
        """

    @abstractmethod
    def spawn(self, fn: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        """Start a task, for instance to read ahead; it is cancelled when the reader is closed.

        What it raises ends the run as a failure of the engine: a reader catches, and raises in `read`.
        """

    @abstractmethod
    def count_dropped(self, count: int) -> None:
        """Let `stats()` say that the source has left out `count` more samples."""

    @abstractmethod
    def count_requests(self, *, retries: int = 0, timeouts: int = 0, hedges: int = 0) -> None:
        """Let `stats()` count what became of the source's requests: that many more were made again, and so on."""

    def seed(self, seed: int, purpose: str) -> int:
        """The seed of an order that changes: another one in each epoch, and in each round of a `repeat`.

        The same on all ranks, in all processes, and when the pass is resumed.

        Args:
            seed: The user's.
            purpose: What it is for; different ones give unrelated seeds.
        """
        return derive_seed(seed, purpose, self.epoch)

    def part(self) -> "SourceContext":
        """A context for a part of the epoch, whose threads and tasks end with its own `aclose`, not with the reader."""
        raise NotImplementedError

    async def aclose(self) -> None:  # noqa: B027 - the loader closes the one that it made
        """End the tasks, wait for them, and let go of the threads. Only for what `part` has made."""

    def policy_log(self, policies: Policies) -> PolicyLog:
        """What is to be told of requests that fail, are late or wait, for `stats()` and `explain()`."""
        return PolicyLog()


class SourceThreads(Executor):
    """A reader's threads, as an executor: `aiofiles.open(path, "rb", executor=threads)`."""

    @abstractmethod
    def call(self, fn: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Begin `fn(*args)` in a thread; await the result. When that is cancelled, the call itself goes on.

        More calls than there are threads wait for their turn, in order.
        """
