"""The source of anything that is iterated: iterables, async iterables, functions that make one, and `CursorSource`."""

import warnings
from asyncio import sleep
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.entry import Entry, annotate, read_after
from aioloader.core.keys import NAMES
from aioloader.core.source import CursorSource, EntryReader
from aioloader.engine.node import Kick, cheap_samples
from aioloader.engine.pump import TURN_SAMPLES, Pump, call_source
from aioloader.engine.reading import Reader
from aioloader.engine.resumable import Origin, check_origin, note_silent, split_cursor
from aioloader.engine.source_checks import ReadCheck, opened
from aioloader.engine.source_context import RunSourceContext
from aioloader.errors import ReplayWarning, StateError
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["StreamSource", "warn_of_replay"]


SKIP_SAMPLES: Final = 4096  # read at once, at most, by a resumed stream that skips


class StreamSource(Pump):
    """Reads an iterable, async iterable or `CursorSource`, by one task, no further than asked.

    Cursor: that of the `CursorSource`; for anything else the number of samples read, or an origin and the number from
    there on, see `resumable`.

    Args:
        make: What to read, or a function of no arguments that makes it.
        call: Whether `make` is such a function.
        name: For notes and statistics.
        keys: Its samples are keys, or lists of the keys of a batch.
        ahead: How many samples may be read before they are asked for, once the first one was.
        warns: Warn when samples are read again only to be dropped.
        use: Called when the epoch begins; raises if it cannot.
        unknown: `make` may return a `CursorSource`.
        check: Raises ValueError for an origin and a count that are no place in this source.
        tells_epoch: Call `set_epoch` of what is read, if it has one.
        live: Samples are still being produced: read none early.
        seed_of: See `SourceContext.seed`.
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
        seed_of: Callable[[int, str], int] | None = None,
    ) -> None:
        super().__init__(StageMeter(name, "source", concurrency=1), "aioloader-source")
        self._live = live
        self._make = make
        self._call = call
        self._keys = keys
        self._ahead = ahead
        self._computes = not keys  # the first batch need not wait for a set-up that samplers have no use for
        self._warns = warns
        self._use = use
        self._unknown = unknown
        self._check = check
        self._tells_epoch = tells_epoch
        self._seed_of = seed_of
        self._resume_at: Any = None

    @property
    def fresh(self) -> bool:
        return True

    @property
    def extra_room(self) -> int:
        return 0 if self._live else cheap_samples(self.meter)

    @property
    def live(self) -> bool:
        return self._live or (isinstance(self._make, CursorSource) and self._make.live)

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

    def begin(self) -> None:
        """What may fail when an epoch begins. `start` calls it, unless somebody has done so before.

        Raises:
            SourceUsedUpError: The source can be iterated once, and was.
            ReplayWarning: Where warnings are errors.
        """
        if self._use is not None:
            use, self._use = self._use, None
            use()
        if self._warns:
            self._warns = False
            if not isinstance(self._make, CursorSource):
                warn_of_replay(self._resume_at, self.meter.name)

    def start(self, run: "Run", kick: Kick) -> None:
        self.begin()
        super().start(run, kick)

    async def _pump(self) -> None:
        await self._demanded()  # no user code runs before a sample is wanted
        self._since = perf_counter()
        iterable, self._make = self._make, None
        if self._call:
            iterable = await call_source(iterable, self._run, self._threads)
        if isinstance(iterable, CursorSource):
            self._live = self._live or iterable.live
            self.meter.live = iterable.live
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
        try:
            await self._skip(reader, since)
            self._since = None
            while samples := await reader.read(await self._demanded()):
                begun = read_after(self._run.consumer.batches)
                for sample, cursor in samples:
                    position = self._position
                    key = sample if self._keys or isinstance(sample, NAMES) else position
                    self._position += 1
                    self._failed_at = cursor
                    self._put(Entry(sample, cursor, key, position, begun))
                self.meter.samples = self._position
                self.meter.busy_seconds = reader.busy_seconds
                del samples, sample, cursor
        finally:
            await self._run.closing(reader.aclose)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Raise what does not fit as an error of the state: what a function returns is known only now."""
        try:
            yield
        except ValueError as error:
            name = self.meter.name
            raise StateError(f"the 'cursor' of the state does not fit {name}, or is broken: {error}") from error

    async def _skip(self, reader: Reader, count: int) -> None:
        """Read and drop samples that were delivered before the resume."""
        left = count
        while left and not self._closed and (samples := await reader.read(min(left, SKIP_SAMPLES))):
            left -= len(samples)
            if not left % TURN_SAMPLES:  # an async iterable may give its samples without ever waiting
                await sleep(0)

    async def _pump_entries(self, source: CursorSource) -> None:
        meter = self.meter
        context = RunSourceContext(self._run, meter.name, meter, self._seed_of)
        reader: EntryReader | None = None
        self._numbered = self._resume_at is None  # its cursors do not count
        meter.ahead = source.ahead or 0
        try:
            reader = opened(source, context, self._resume_at)
            check = ReadCheck(source, reader)
            while True:
                self._since = None
                limit = await self._demanded()
                self._since = began = perf_counter()
                entries = await check.awaitable(reader.read(limit))
                meter.busy_seconds += perf_counter() - began
                check.look_at(entries, limit)
                if not entries:
                    break
                try:
                    begun = read_after(self._run.consumer.batches)
                    for position, entry in enumerate(entries, self._position):
                        entry.position = position if self._numbered else None
                        entry.begun = begun
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
    """Warn if a resume at `cursor` reads samples again only to drop them."""
    if type(cursor) is int and cursor:
        warnings.warn(
            f"{name} cannot be entered in the middle: the resumed epoch reads the {cursor} samples before it again and "
            f"drops them. Give it state_dict and load_state_dict, or use a source that seeks (a dataset with "
            f"__getitem__, Lines, TarShards)",
            ReplayWarning,
            stacklevel=2,
        )
