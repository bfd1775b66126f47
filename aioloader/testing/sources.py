"""Fakes that a test steers: gates instead of delays, sources that tell what happened to them, any order of completion.

None of them sleeps. Each wait is for a state, and has a deadline, so that a test of a loader that hangs fails.
"""

import asyncio
import concurrent.futures
import itertools
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Final, Generic, Literal, TypeVar
from weakref import WeakKeyDictionary

__all__ = [
    "FaultySource",
    "Gate",
    "RecordingSource",
    "SourceEvent",
    "SyncFaultySource",
    "SyncRecordingSource",
    "virtual_order",
]

T = TypeVar("T")

DEADLINE_SECONDS: Final = 30.0
"""After so long a wait in a fake fails; no wait of a passing test comes near it."""

QUIET_TURNS: Final = 4
"""So many turns of the loop without a new call count as idle: enough for a loader to fill what just came free."""


class Gate:
    """One gate per key, closed at first: functions under test stand at their gates until the test opens them.

    Works from async functions and, in threads, from sync ones, of any event loop. With it a test holds a loader in an
    exact state ("four samples under way, none finished") and looks at it, however slow the machine is.

    Example:
        ```python
        gate = Gate()

        async def fetch(key):
            await gate.passing(key)
            return key

        async def main():
            batches = aiter(Pipeline(range(100)).map(fetch, concurrency=4))
            first = asyncio.ensure_future(anext(batches))
            await gate.until_arrived(4)      # four journeys stand at their gates
            assert gate.arrived == (0, 1, 2, 3)
            gate.open_all()
            assert await first == 0
        ```

    Args:
        deadline_seconds: After so long a wait raises `TimeoutError`.
    """

    def __init__(self, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._deadline = deadline_seconds
        self._lock = threading.Lock()
        self._arrived: list[Hashable] = []
        self._opened: set[Hashable] = set()
        self._all_open = False
        self._waiting: dict[Hashable, list[concurrent.futures.Future[None]]] = {}
        self._watching: list[tuple[int, concurrent.futures.Future[None]]] = []

    @property
    def arrived(self) -> tuple[Hashable, ...]:
        """The keys that have come to their gates so far, whether let through or not, in order of arrival."""
        with self._lock:
            return tuple(self._arrived)

    @property
    def standing(self) -> int:
        """How many calls stand at closed gates now."""
        with self._lock:
            return sum(not future.done() for futures in self._waiting.values() for future in futures)

    async def passing(self, key: Hashable = None) -> None:
        """Arrive at the gate of `key` and wait until it is open.

        Raises:
            TimeoutError: It was not opened before the deadline.
        """
        await self._wait(self._arrive(key), f"the gate of {key!r} was not opened")

    def pass_sync(self, key: Hashable = None) -> None:
        """Do as `passing` does, from a sync function in a thread.

        Raises:
            TimeoutError: It was not opened before the deadline.
        """
        self._wait_sync(self._arrive(key), f"the gate of {key!r} was not opened")

    def open(self, *keys: Hashable) -> None:
        """Open the gates of `keys`, for those who stand there and those who come later. From any thread."""
        with self._lock:
            self._opened.update(keys)
            released = [future for key in keys for future in self._waiting.pop(key, ())]
        _release(released)

    def open_all(self) -> None:
        """Open every gate, of keys to come too. From any thread."""
        with self._lock:
            self._all_open = True
            released = [future for futures in self._waiting.values() for future in futures]
            self._waiting.clear()
        _release(released)

    async def until_arrived(self, n: int) -> None:
        """Wait until at least `n` calls have arrived since the gate was made.

        Raises:
            TimeoutError: Fewer had arrived at the deadline; the message says which.
        """
        await self._wait(self._watch(n), f"fewer than {n} calls arrived", tell_arrived=True)

    def wait_arrived(self, n: int) -> None:
        """Do as `until_arrived` does, from a thread without an event loop.

        Raises:
            TimeoutError: Fewer had arrived at the deadline; the message says which.
        """
        self._wait_sync(self._watch(n), f"fewer than {n} calls arrived", tell_arrived=True)

    def _arrive(self, key: Hashable) -> concurrent.futures.Future[None]:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._arrived.append(key)
            through = self._all_open or key in self._opened
            if not through:
                self._waiting.setdefault(key, []).append(future)
            count = len(self._arrived)
            seen = [watcher for n, watcher in self._watching if n <= count]
            self._watching = [(n, watcher) for n, watcher in self._watching if n > count]
        _release(seen)
        if through:
            _release([future])
        return future

    def _watch(self, n: int) -> concurrent.futures.Future[None]:
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            reached = len(self._arrived) >= n
            if not reached:
                self._watching.append((n, future))
        if reached:
            _release([future])
        return future

    async def _wait(
        self, future: concurrent.futures.Future[None], complaint: str, *, tell_arrived: bool = False
    ) -> None:
        if future.done():
            return
        try:
            async with asyncio.timeout(self._deadline):
                await asyncio.wrap_future(future)
        except TimeoutError:
            raise TimeoutError(self._complain(complaint, tell_arrived)) from None

    def _wait_sync(
        self, future: concurrent.futures.Future[None], complaint: str, *, tell_arrived: bool = False
    ) -> None:
        try:
            future.result(self._deadline)
        except TimeoutError:
            raise TimeoutError(self._complain(complaint, tell_arrived)) from None

    def _complain(self, complaint: str, tell_arrived: bool) -> str:
        arrived = f"; arrived: {self.arrived!r}" if tell_arrived else ""
        return f"{complaint} within {self._deadline:g} s{arrived}"


def _release(futures: Iterable[concurrent.futures.Future[None]]) -> None:
    for future in futures:
        # False for a waiter that was cancelled meanwhile; from here on it cannot be cancelled any more.
        if future.set_running_or_notify_cancel():
            future.set_result(None)


@dataclass(frozen=True)
class SourceEvent:
    """One thing that happened to a recording source.

    Attributes:
        what: `open` when an iteration began, `read` when its next sample was asked for, `yield` when that was handed
            out, `close` when the iteration ended, for whatever reason.
        iteration: Which iteration of the source, from 0.
        position: Which sample of the iteration; for `close`, how many were handed out.
        thread: The thread in which it happened.
        task: The asyncio task in which it happened; None in a thread without a running loop.
        loop: The running event loop, or None.
    """

    what: Literal["open", "read", "yield", "close"]
    iteration: int
    position: int
    thread: threading.Thread
    task: "asyncio.Task[Any] | None"
    loop: asyncio.AbstractEventLoop | None


class _RecordsReads(Generic[T]):
    """What the two recording sources share."""

    def __init__(self, samples: Iterable[T]) -> None:
        self.samples = samples
        self.events: list[SourceEvent] = []
        self.yielded: list[T] = []
        self._iterations = itertools.count()
        self._lock = threading.Lock()

    @property
    def opened(self) -> int:
        """How many iterations have begun."""
        return self._count("open")

    @property
    def started(self) -> int:
        """How many samples have been asked for, over all iterations."""
        return self._count("read")

    @property
    def closed(self) -> int:
        """How many iterations have ended: exhausted, failed or closed, with their `finally` run."""
        return self._count("close")

    def _count(self, what: str) -> int:
        with self._lock:
            return sum(event.what == what for event in self.events)

    def _begin(self) -> int:
        iteration = next(self._iterations)
        self._record("open", iteration, 0)
        return iteration

    def _record(self, what: Literal["open", "read", "yield", "close"], iteration: int, position: int) -> None:
        try:
            loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        task = None if loop is None else asyncio.current_task()
        event = SourceEvent(what, iteration, position, threading.current_thread(), task, loop)
        with self._lock:
            self.events.append(event)


class RecordingSource(_RecordsReads[T]):
    """An async iterable that records what is done to it, by which task, on which loop.

    May be iterated again and again, each time from the start.

    Args:
        samples: What it gives; an endless iterable such as `itertools.count()` is fine for one iteration.
        gate: When given, each sample waits at the gate of its position before it is handed out.

    Attributes:
        events: Everything that happened, in order.
        yielded: The samples that were handed out, over all iterations.
    """

    def __init__(self, samples: Iterable[T], *, gate: Gate | None = None) -> None:
        super().__init__(samples)
        self._gate = gate

    async def __aiter__(self) -> AsyncIterator[T]:  # an async generator: closing it must reach the `finally`
        iteration = self._begin()
        position = 0
        try:
            iterator = iter(self.samples)
            while True:
                self._record("read", iteration, position)
                if self._gate is not None:
                    await self._gate.passing(position)
                try:
                    sample = next(iterator)
                except StopIteration:
                    return
                self._record("yield", iteration, position)
                self.yielded.append(sample)
                position += 1
                yield sample
        finally:
            self._record("close", iteration, position)


class SyncRecordingSource(_RecordsReads[T]):
    """The twin of `RecordingSource` for `for`: an iterable that records what is done to it, in which thread.

    Args:
        samples: What it gives; an endless iterable such as `itertools.count()` is fine for one iteration.
        gate: When given, each sample waits at the gate of its position before it is handed out.

    Attributes:
        events: Everything that happened, in order.
        yielded: The samples that were handed out, over all iterations.
    """

    def __init__(self, samples: Iterable[T], *, gate: Gate | None = None) -> None:
        super().__init__(samples)
        self._gate = gate

    def __iter__(self) -> Iterator[T]:
        iteration = self._begin()
        position = 0
        try:
            iterator = iter(self.samples)
            while True:
                self._record("read", iteration, position)
                if self._gate is not None:
                    self._gate.pass_sync(position)
                try:
                    sample = next(iterator)
                except StopIteration:
                    return
                self._record("yield", iteration, position)
                self.yielded.append(sample)
                position += 1
                yield sample
        finally:
            self._record("close", iteration, position)


class _Faulty(Generic[T]):
    """What the two faulty sources share: which outcome is next."""

    def __init__(self, samples: Iterable[T], faults: Mapping[int, BaseException]) -> None:
        self.samples = samples
        self.faults = dict(faults)
        self.reads = 0

    def _outcomes(self) -> Iterator[tuple[BaseException | None, T | None]]:
        """Each fault comes *instead of* the sample of its position, which is the number of reads before it."""
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

    Unlike a generator it would go on after a failure, so that a test sees whether anybody asks.

    Args:
        samples: What it gives.
        faults: Position in the source, from 0, to the exception raised there instead of the sample.

    Attributes:
        reads: How often a sample was asked for, over all iterations.
    """

    def __aiter__(self) -> AsyncIterator[T]:
        return _AsyncOutcomes(self._outcomes())


class SyncFaultySource(_Faulty[T]):
    """The twin of `FaultySource` for `for`.

    Args:
        samples: What it gives.
        faults: Position in the source, from 0, to the exception raised there instead of the sample.

    Attributes:
        reads: How often a sample was asked for, over all iterations.
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


class virtual_order:  # noqa: N801 - used as a decorator
    """Makes concurrent calls of an async function end in a random order that is the same for the same seed.

    No time passes: each call stands still until the loop is idle, which means that for a few of its turns no other call
    came; then one of those that stand goes on, drawn from the seed. So every order that a network could give turns up
    within a few seeds, in microseconds.

    Example:
        ```python
        async def double(x):
            return 2 * x

        loader = Pipeline(range(100)).map(virtual_order(seed=7)(double), concurrency=8)
        assert list(loader) == [2 * x for x in range(100)]
        ```

    Args:
        seed: Draws the order. One object may wrap several functions, whose calls are then drawn together.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # One pump for each loop: the sync face brings a loop of its own, and a test may use both.
        self._pumps: WeakKeyDictionary[asyncio.AbstractEventLoop, _Releaser] = WeakKeyDictionary()

    def __call__(self, fn: Callable[[Any], Any]) -> Callable[[Any], Coroutine[Any, Any, Any]]:
        """Wrap `fn`, sync or async: the wrapped function first waits for its turn, then does as `fn` does."""

        async def in_virtual_order(sample: Any) -> Any:
            await self.turn()
            result = fn(sample)
            return await result if isawaitable(result) else result

        in_virtual_order.__name__ = getattr(fn, "__name__", "in_virtual_order")
        return in_virtual_order

    async def turn(self) -> None:
        """Wait for this call's turn."""
        loop = asyncio.get_running_loop()
        pump = self._pumps.get(loop)
        if pump is None:
            pump = self._pumps[loop] = _Releaser(self._seed)
        await pump.turn(loop)


class _Releaser:
    """Releases the calls of one loop, one by one, whenever nothing new has come for some turns."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._standing: list[asyncio.Future[None]] = []
        self._quiet = 0
        self._running = False

    async def turn(self, loop: asyncio.AbstractEventLoop) -> None:
        future = loop.create_future()
        self._standing.append(future)
        self._quiet = 0
        if not self._running:
            self._running = True
            loop.call_soon(self._look, loop)
        await future

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._standing = [future for future in self._standing if not future.done()]  # some were cancelled
        if not self._standing:
            self._running = False
            return
        self._quiet += 1
        if self._quiet > QUIET_TURNS:
            self._quiet = 0
            self._standing.pop(self._random.randrange(len(self._standing))).set_result(None)
        loop.call_soon(self._look, loop)
