"""What `StreamSource` and `FlatMapNode` share: a task that reads the user's iterables."""

import inspect
from abc import abstractmethod
from asyncio import CancelledError, Future, Task, TimerHandle
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.checks import is_async_callable
from aioloader.core.entry import Entry, annotate
from aioloader.engine.node import Kick, Node
from aioloader.engine.reading import Reader, open_reader
from aioloader.engine.resumable import Origin
from aioloader.errors import SampleCancelledError
from aioloader.executors.threads import TakesJobs
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["TURN_SAMPLES", "Pump", "call_source"]


GRACE_SECONDS: Final = 1.0  # what an async iterator has for one step, at the end, before it is cancelled
TURN_SAMPLES: Final = 256  # while samples are skipped, the loop gets a turn after so many


class Pump(Node):
    """A node with a task of its own, which reads the user's iterables no further than downstream asked.

    How it ends: most often the task is waiting for demand; it is cancelled and closes the iterator. But it may be in
    the middle of a step of an async iterator, for instance of a generator that has given its last sample and is
    cleaning up. A cancellation would cut that short, and it cannot be seen from outside. So a step has
    `GRACE_SECONDS`, counted from its beginning, to finish; one that has already waited longer is cancelled at once.
    """

    _computes = True  # see `Threads`
    _ahead = 0  # entries that may be read before they are asked for
    _numbered = True  # `_position` is known

    def __init__(self, meter: StageMeter, thread_name: str) -> None:
        self.meter = meter
        self._thread_name = thread_name
        self._buffer: deque[Entry] = deque()
        self._wanted = 0  # entries that may still be read: what the last poll could not give
        self._demand: Future[None] | None = None
        self._position = 0
        self._failed_at: Any = None  # where to go on if it fails now
        self._over = False  # the task has put its last entry into the buffer
        self._task: Task[None] | None = None
        self._reader: Reader | None = None
        self._grace: TimerHandle | None = None
        self._since: float | None = None  # when a call began that is under way now and is none of the reader's
        self._at_hand: Any = None  # the key of what that call, or the reader, works on
        self._closed = False
        self._paused = False

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        self.meter = run.adopt(self.meter)
        self.meter.gauge = self
        self._threads = run.threads(1, self._thread_name, computes=self._computes)
        run.pausing.join(self)
        self._task = run.spawn(self._main, ends_when_closed=True)

    def poll(self, limit: int) -> list[Entry]:
        buffer = self._buffer
        taken = [buffer.popleft() for _ in range(min(limit, len(buffer)))]
        self._wanted = limit - len(taken)
        if self._ahead:
            ahead = min(self._ahead, self._position)  # none before the first one, which somebody waits for
            if len(buffer) < ahead and len(buffer) <= ahead // 2:
                self._wanted += ahead - len(buffer)
        if self._wanted and self._demand is not None and not self._demand.done():
            self._demand.set_result(None)
        self.ended = self._over and not buffer
        return taken

    def at_hand(self) -> list[tuple[Any, float]]:
        """See `Gauge`: it reads one iterable at a time."""
        since, reader = self._since, self._reader
        if since is None and reader is not None:
            since = reader.reading_since
        return [] if since is None or self._over else [(self._at_hand, since)]

    @property
    def held(self) -> int:
        """See `Gauge`: it has no window."""
        return 0

    # A pause, see `Pausable`: nothing more is read. A read that is under way is not waited for, since it may wait for
    # somebody to send something; what it gives begins no sooner than any other sample.

    quiet = still = True

    @property
    def closed(self) -> bool:
        """Whether nothing is read any more, ever."""
        return self._closed or self._over

    def pause(self) -> None:
        self._paused = True

    def go_on(self) -> None:
        self._paused = False
        if self._wanted and self._demand is not None and not self._demand.done():
            self._demand.set_result(None)

    def close(self) -> None:
        self._closed = True
        self.meter.retired = True
        self.meter.release(self)
        task, reader = self._task, self._reader
        if task is None or task.cancelling() or self._grace is not None:
            return  # a second cancellation would cut short the user's `finally`
        if reader is None or reader.awaiting_since is None:
            task.cancel()
        else:
            left = reader.awaiting_since + GRACE_SECONDS - perf_counter()
            self._grace = self._run.loop.call_later(max(0.0, left), self._grace_is_over)

    def _grace_is_over(self) -> None:
        assert self._task is not None
        assert self._reader is not None
        if self._reader.awaiting_since is not None:  # else the step has ended, and the task ends by itself
            self._task.cancel()

    async def _main(self) -> None:
        """Run `_pump`, and end the stream with what it raises."""
        try:
            await self._pump()
        except CancelledError as error:
            if self._run.stopping or self._closed:
                raise
            cancelled = SampleCancelledError(f"{self.meter.name} was cancelled from inside, not by the loader")
            cancelled.__cause__ = error
            self._put_last(cancelled)
        except BaseException as error:
            self._put_last(error)
        finally:
            if self._grace is not None:
                self._grace.cancel()
            self._over = True
            self._threads.close()
            self._kick()

    @abstractmethod
    async def _pump(self) -> None:
        """Read, wait for demand, and `_put`; returns at the end."""

    async def _demanded(self) -> int:
        """Wait until entries are wanted; returns how many."""
        if self._closed:  # it was closed during a step
            raise CancelledError
        while self._wanted <= 0 or self._paused:
            self.meter.idle.wait_for("room")
            self._demand = self._run.loop.create_future()
            await self._demand
        self.meter.idle.wait_for(None)
        return self._wanted

    def _put(self, entry: Entry) -> None:
        self._buffer.append(entry)
        self._wanted -= 1
        self._kick()

    def _put_last(self, error: BaseException) -> None:
        last = Entry.last(error, self._failed_at, self._position if self._numbered else None)
        annotate(error, self.meter.name, last, self._run.epoch)
        self.meter.errors += 1
        self._buffer.append(last)

    async def _open(self, iterable: Any, threads: TakesJobs, origin: Origin | None = None) -> Reader:
        self._reader = await open_reader(iterable, self.meter.name, self._run, threads, origin)
        return self._reader


async def call_source(fn: Callable[..., Any], run: "Run", threads: TakesJobs, *args: Any) -> Any:
    """Call a user's function that returns an iterable.

    Async generator functions and coroutine functions are called on the loop, any other in the thread: it may block.
    """
    if is_async_callable(fn):
        result = fn(*args)
        return await result if inspect.isawaitable(result) else result
    result = await run.in_thread(threads, fn, *args)
    return await result if inspect.iscoroutine(result) else result
