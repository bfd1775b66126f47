"""The nodes that begin a pipeline, and `flat_map`, which reads one iterable per sample."""

import inspect
import warnings
from abc import abstractmethod
from asyncio import CancelledError, Future, Task, TimerHandle, sleep
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Protocol

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import LAST, ONE_LOST, Entry, annotate
from aioloader.core.keys import NAMES, PartKey
from aioloader.core.source import CursorSource, EntryReader
from aioloader.engine.node import MOST_EARLY, Kick, Node, cheap_samples
from aioloader.engine.reading import Reader, open_reader
from aioloader.engine.resumable import Origin, check_origin, note_silent, split_cursor
from aioloader.engine.source_checks import ReadCheck, opened
from aioloader.engine.source_context import RunSourceContext
from aioloader.errors import ReplayWarning, SampleCancelledError, StateError
from aioloader.executors.threads import InContext, TakesJobs
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["FlatMapNode", "KeySource", "Keys", "StreamSource", "warn_of_replay"]


class Keys(Protocol):
    """The keys of one epoch, in order: all of them, or those of this rank."""

    @property
    def stride(self) -> int:
        """How many positions of the whole order each key stands for: one for each rank."""

    @property
    def offset(self) -> int:
        """Which of them is its own."""

    def __len__(self) -> int: ...

    def after(self, position: int) -> "Keys":
        """Those after a position of the whole order."""

    def slice(self, start: int, stop: int) -> Sequence[int]:
        """Keys `start` to `stop` as Python integers; fewer at the end."""


SKIP_SAMPLES: Final = 4096  # a resumed stream reads so many at a time
GRACE_SECONDS: Final = 1.0  # what an async iterator has for one step, at the end, before it is cancelled
TURN_SAMPLES: Final = 256  # of those that are dropped; the loop turns after so many


class KeySource(Node):
    """Gives the keys of an indexable source, or its samples when reading one runs no user code.

    Cursor: the position in the epoch's order after the sample; seed and epoch give the order again. The order is that
    of all ranks: when each has got as many samples, their cursors are the same.

    Args:
        order: Gives the epoch's order, or, called with False, one with the same positions in which no key was moved.
        values: A built-in sequence to read; None: the key itself goes on, and a step of the window loads it.
        name: For statistics.
        names: What the samples are called in notes of errors; None: by their keys, or themselves.
    """

    def __init__(
        self, order: Callable[[bool], Keys], values: Sequence[Any] | None, name: str, names: Sequence[Any] | None = None
    ) -> None:
        self._order = order
        self._keys: Keys
        self._values = values
        self._names = names
        self._position = 0
        self._cursor = 0  # where `_keys` begin
        self.meter = StageMeter(name, "source")

    def resume(self, cursor: Any) -> None:
        self._cursor = as_count(cursor)
        self._order(False).after(self._cursor)  # raises when there is no such place

    @property
    def extra_room(self) -> int:
        return MOST_EARLY

    def start(self, run: "Run", kick: Kick) -> None:
        self.meter = run.adopt(self.meter)
        keys = self._order(True)
        self._keys = keys.after(self._cursor) if self._cursor else keys
        self.ended = not len(self._keys)

    def close(self) -> None:
        self.meter.retired = True

    def poll(self, limit: int) -> list[Entry]:
        start = self._position
        keys = self._keys.slice(start, start + limit)
        self._position = stop = start + len(keys)
        stride = self._keys.stride
        before = self._cursor // stride  # samples of this rank
        self.meter.samples = before + stop
        self.ended = stop >= len(self._keys)
        if self._values is None:
            keys = list(keys)  # `values` and `names` are the same objects, of which a range makes new ones each time
        values: Sequence[Any] = keys
        names: Sequence[Any] = keys if self._names is None else list(map(self._names.__getitem__, keys))
        if self._values is not None:
            if isinstance(keys, range) and keys.step == 1:
                values = self._values[keys.start : keys.stop]
            else:
                values = list(map(self._values.__getitem__, keys))
            naming = {kind: issubclass(kind, NAMES) for kind in set(map(type, values))}
            if all(naming.values()):
                names = values
            elif any(naming.values()):
                names = [v if naming[type(v)] else k for k, v in zip(keys, values, strict=True)]
        first, end = self._cursor + start * stride, self._cursor + stop * stride
        offset = self._keys.offset
        cursors, positions = range(first + stride, end + 1, stride), range(first + offset, end + offset, stride)
        return list(map(Entry, values, cursors, names, positions))


class _Pump(Node):
    """A node with a task of its own, which reads user iterables as far as downstream asked.

    The story of its end. Most often the task waits for demand; it is cancelled, and closes the iterator. But it may be
    in the middle of a step of an async iterator. That can be a generator that has given its last sample and cleans up,
    which a cancellation would cut short, and nobody can see that from outside. So a step gets a moment, counted from
    its beginning, to come to its end; one that waits for longer than that is cancelled at once.
    """

    _computes = True  # see `Threads`
    _ahead = 0  # entries that may be read before anybody asks for them
    _numbered = True  # how many came before `_position` is known

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
        self._closed = False

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        self.meter = run.adopt(self.meter)
        self._threads = run.threads(1, self._thread_name, computes=self._computes)
        self._task = run.spawn(self._main, ends_when_closed=True)

    def poll(self, limit: int) -> list[Entry]:
        buffer = self._buffer
        taken = [buffer.popleft() for _ in range(min(limit, len(buffer)))]
        self._wanted = limit - len(taken)
        if self._ahead and self._position and len(buffer) <= self._ahead // 2:
            self._wanted += self._ahead - len(buffer)
        if self._wanted and self._demand is not None and not self._demand.done():
            self._demand.set_result(None)
        self.ended = self._over and not buffer
        return taken

    def close(self) -> None:
        self._closed = True
        self.meter.retired = True
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
        if self._closed:  # while it was in the middle of a step
            raise CancelledError
        while self._wanted <= 0:
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


class StreamSource(_Pump):
    """Reads an iterable, async iterable or `CursorSource`, by one task, no further than asked.

    Cursor: that of the `CursorSource`; of others the number of samples read, or an origin and the number from there on,
    see `resumable`.

    Args:
        make: What to read, or a function of no arguments that gives it.
        call: Whether `make` is such a function.
        name: For notes and statistics.
        keys: Its samples are keys, or lists of the keys of a batch.
        ahead: So many samples may be read before they are asked for, though none before the first.
        warns: Say so when samples are read again only to be dropped.
        use: Called when the epoch begins; raises where it cannot.
        unknown: `make` may give a `CursorSource`.
        check: Refuses a place, an origin and a number from there on, that is none.
        tells_epoch: Call `set_epoch` of what is read, if it has one.
        live: Its samples come into being meanwhile: none is read early.
    """

    def __init__(
        self,
        make: Any,
        *,
        call: bool,
        name: str,
        keys: bool = False,
        ahead: int = 0,
        warns: bool = False,
        use: Callable[[], None] | None = None,
        unknown: bool = False,
        check: Callable[[Origin | None, int], None] | None = None,
        tells_epoch: bool = False,
        live: bool = False,
    ) -> None:
        super().__init__(StageMeter(name, "source", concurrency=1), "aioloader-source")
        self._live = live
        self._make = make
        self._call = call
        self._keys = keys
        self._ahead = ahead
        self._computes = not keys  # the first batch does not wait for what a sampler has no use for
        self._warns = warns
        self._use = use
        self._unknown = unknown
        self._check = check
        self._tells_epoch = tells_epoch
        self._resume_at: Any = None

    @property
    def extra_room(self) -> int:
        return 0 if self._live else cheap_samples(self.meter)

    @property
    def gaps(self) -> bool:
        return self.meter.gaps

    def resume(self, cursor: Any) -> None:
        self._resume_at = self._failed_at = cursor
        if isinstance(self._make, CursorSource):
            self._make.check_cursor(cursor)
            return
        if not self._unknown or not isinstance(cursor, list | tuple | str) or not cursor:
            origin, since = split_cursor(cursor)
            if self._check is not None:
                self._check(origin, since)
            elif origin is not None and not self._keys and (not self._call or not self._unknown):
                check_origin(self._make, origin, made=self._call)
            if origin is None and since and not self._call:
                note_silent(self._make)

    def start(self, run: "Run", kick: Kick) -> None:
        if self._use is not None:
            self._use()
        if self._warns:
            warn_of_replay(self._resume_at, self.meter.name)
        super().start(run, kick)

    async def _pump(self) -> None:
        await self._demanded()  # nothing of the user's runs before a sample is wanted
        iterable, self._make = self._make, None
        if self._call:
            iterable = await _call(iterable, self._run, self._threads)
        if isinstance(iterable, CursorSource):
            self._live = self._live or iterable.live
            if self._unknown and self._resume_at is not None:
                with self._fitting():
                    iterable.check_cursor(self._resume_at)
            await self._pump_entries(iterable)
            return
        if self._tells_epoch and callable(tell := getattr(iterable, "set_epoch", None)):
            await self._run.in_thread(self._threads, tell, self._run.epoch)
        with self._fitting():
            origin, since = split_cursor(self._resume_at)
        self._position = since + (0 if origin is None else origin["at"])
        reader = await self._open(iterable, self._threads, origin)
        del iterable
        marks = reader.marks
        try:
            await self._skip(reader, since)
            number = since  # samples that this reader gave
            while samples := await reader.read(await self._demanded()):
                for sample in samples:
                    while marks and marks[0][0] <= number + 1:
                        at, origin = marks.popleft()
                        since = number - at
                    position = self._position
                    key = sample if self._keys or isinstance(sample, NAMES) else position
                    number += 1
                    since += 1
                    self._position += 1
                    self._failed_at = since if origin is None else (origin, since)
                    self._put(Entry(sample, self._failed_at, key, position))
                self.meter.samples = self._position
                self.meter.busy_seconds = reader.busy_seconds
                del samples, sample
        finally:
            await self._run.closing(reader.aclose)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """What a function has given is known only now, and so whether the state fits."""
        try:
            yield
        except ValueError as error:
            name = self.meter.name
            raise StateError(f"the 'cursor' of the state does not fit {name}, or is broken: {error}") from error

    async def _skip(self, reader: Reader, count: int) -> None:
        """Read again what was delivered before, and drop it."""
        left = count
        while left and not self._closed and (samples := await reader.read(min(left, SKIP_SAMPLES))):
            left -= len(samples)
            if not left % TURN_SAMPLES:  # an async iterable may give its samples without ever waiting
                await sleep(0)

    async def _pump_entries(self, source: CursorSource) -> None:
        meter = self.meter
        context = RunSourceContext(self._run, meter.name)
        reader: EntryReader | None = None
        self._numbered = self._resume_at is None  # its cursors do not count
        try:
            reader = opened(source, context, self._resume_at)
            check = ReadCheck(source, reader)
            while True:
                limit = await self._demanded()
                began = perf_counter()
                entries = await check.awaitable(reader.read(limit))
                meter.busy_seconds += perf_counter() - began
                check.look_at(entries, limit)
                if not entries:
                    break
                try:
                    for position, entry in enumerate(entries, self._position):
                        entry.position = position if self._numbered else None
                        if entry.error is not None:
                            annotate(entry.error, meter.name, entry, self._run.epoch)
                            meter.errors += 1
                            meter.gaps = True  # it may stand for the rest of a file
                except AttributeError:
                    check.look_at_all(entries)  # one of them is no entry
                    raise
                self._position += len(entries)
                self._failed_at = entries[-1].cursor
                meter.samples = self._position
                self._buffer.extend(entries)
                self._wanted -= len(entries)
                self._kick()
                del entries, entry
        finally:
            try:
                if reader is not None:
                    await self._run.closing(reader.aclose)
            finally:
                await self._run.closing(context.aclose)


def warn_of_replay(cursor: Any, name: str) -> None:
    """Say so when samples will be read again only to be dropped."""
    if type(cursor) is int and cursor:
        warnings.warn(
            f"{name} cannot be entered in the middle: the resumed epoch reads the {cursor} samples before it again and "
            f"drops them. Give it state_dict and load_state_dict, or use a source that seeks (a dataset with "
            f"__getitem__, Lines, TarShards)",
            ReplayWarning,
            stacklevel=2,
        )


class FlatMapNode(_Pump):
    """Gives the items of `fn(sample)` one after the other.

    Cursor: the cursor *before* the sample, and how many of its items are out.
    A sample whose function fails, at once or in the middle of its items, raises at that place; the next one follows.

    Args:
        upstream: Gives the samples.
        fn: Returns an iterable or an async iterable; an async function or generator is called on the loop.
        name: For notes and statistics.
        loose: As in `FoldNode`.
    """

    _numbered = False

    def __init__(self, upstream: Node, fn: Callable[[Any], Any], name: str, *, unordered_input: bool = False) -> None:
        super().__init__(StageMeter(name, "source", concurrency=1), "aioloader-flat-map")
        self._upstream = upstream
        self._unordered_input = unordered_input
        self._fn = fn
        self._arrival: Future[None] | None = None
        self._forgets = False  # one of several sources has failed, see `FoldNode`
        self._before: Any = None  # the cursor that leads to the next sample
        self._skipped = 0  # items of it that were delivered before a resume

    @property
    def extra_room(self) -> int:
        return min(cheap_samples(self.meter), self._upstream.extra_room)

    @property
    def gaps(self) -> bool:
        return self.meter.gaps or self._upstream.gaps

    def resume(self, cursor: Any) -> None:
        self._before, skipped = cursor_parts(cursor, 2)
        self._skipped = 0 if self._unordered_input else as_count(skipped)
        self._failed_at = (self._before, self._skipped)
        if self._before is not None:
            self._upstream.resume(self._before)

    def start(self, run: "Run", kick: Kick) -> None:
        self._upstream.start(run, self._arrived)
        super().start(run, kick)

    def close(self) -> None:
        super().close()
        self._upstream.close()

    def _arrived(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def _next_sample(self) -> Entry | None:
        while True:
            self._arrival = self._run.loop.create_future()
            run = self._upstream.poll(1)
            if run:
                self.meter.idle.wait_for(None)
                return run[0]
            if self._upstream.ended:
                return None
            self.meter.idle.wait_for("input")
            await self._arrival

    async def _pump(self) -> None:
        while True:
            await self._demanded()
            sample = await self._next_sample()
            if sample is None:
                return
            if sample.state == LAST:
                sample.cursor = (sample.cursor, 0)
                self._buffer.append(sample)
                return
            after = sample.cursor
            if sample.error is not None:
                sample.cursor = (after, 0)  # nothing of what comes after it
                self.meter.gaps = True
                self._forgets = self._forgets or sample.state == ONE_LOST
                self._put(sample)
            else:
                # In a task of its own, for context variables that are set for one sample do not show to the next.
                items = self._items_of(sample, self._before)
                await self._run.loop.create_task(items, context=self._run.context.copy())
            self._before = after
            self._failed_at = (after, 0)
            self._skipped = 0

    async def _items_of(self, sample: Entry, before: Any) -> None:
        offset = 0
        skipped = self._skipped
        reader: Reader | None = None
        meter = self.meter
        before_seconds = meter.busy_seconds
        began = perf_counter()
        threads = InContext(self._threads, self._run.context.copy())
        try:
            iterable = await _call(self._fn, self._run, threads, sample.value)
            before_seconds += perf_counter() - began
            meter.busy_seconds = before_seconds
            reader = await self._open(iterable, threads)
            del iterable
            while items := await reader.read(await self._demanded()):
                for item in items:
                    offset += 1
                    if offset <= skipped:
                        if not offset % TURN_SAMPLES:
                            await sleep(0)
                        continue
                    key = PartKey(sample.key, offset)
                    self._put(sample.derived(item, (before, 0 if self._forgets else offset), key, sample.position))
                    self._position += 1
                meter.samples = self._position
                meter.busy_seconds = before_seconds + reader.busy_seconds
                del items, item
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if offset >= skipped:
                failed = Entry(None, (before, 0 if self._forgets else offset + 1), sample.key, sample.position)
                self._position += 1
                annotate(error, self.meter.name, sample, self._run.epoch)
                failed.error = error
                meter.errors += 1
                meter.gaps = True
                self._put(failed)
        finally:
            if reader is not None:
                meter.busy_seconds = before_seconds + reader.busy_seconds
                await self._run.closing(reader.aclose)


async def _call(fn: Callable[..., Any], run: "Run", threads: TakesJobs, *args: Any) -> Any:
    """Call a user's function that returns an iterable.

    Async generator functions and coroutine functions are called on the loop; any other in the thread, since it may do
    whatever a sync function may do.
    """
    if is_async_callable(fn):
        result = fn(*args)
        return await result if inspect.isawaitable(result) else result
    result = await run.in_thread(threads, fn, *args)
    return await result if inspect.iscoroutine(result) else result


def is_async_callable(fn: Any) -> bool:
    """Whether calling `fn` gives an awaitable or an async generator, as far as its definition tells.

    Looks through `functools.partial`, bound methods and objects with an `async def __call__`.
    """
    while hasattr(fn, "func") and hasattr(fn, "keywords"):  # functools.partial
        fn = fn.func
    if inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn):
        return True
    call = getattr(type(fn), "__call__", None)  # noqa: B004 - the definition of the call is what is looked at
    return inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)
