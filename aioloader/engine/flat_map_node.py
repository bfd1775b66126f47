"""`flat_map`: reads one iterable per sample."""

from asyncio import Future, sleep
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import LAST, ONE_LOST, Entry, annotate
from aioloader.core.keys import PartKey
from aioloader.engine.node import Kick, Node, cheap_samples
from aioloader.engine.pump import TURN_SAMPLES, Pump, call_source
from aioloader.engine.reading import Reader
from aioloader.executors.threads import InContext
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["FlatMapNode"]


class FlatMapNode(Pump):
    """Gives the items of `fn(sample)` in order, sample by sample.

    Cursor: the cursor *before* the sample, and how many of its items have been given.
    If `fn` fails for a sample, at once or in the middle of its items, the error is raised at that place, and the next
    sample follows.

    Args:
        upstream: Gives the samples.
        fn: Returns an iterable or an async iterable; an async function or generator is called on the loop.
        name: For notes and statistics.
        unordered_input: As in `FoldNode`.
    """

    _numbered = False

    def __init__(self, upstream: Node, fn: Callable[[Any], Any], name: str, *, unordered_input: bool = False) -> None:
        super().__init__(StageMeter(name, "source", concurrency=1), "aioloader-flat-map")
        self._upstream = upstream
        self._unordered_input = unordered_input
        self._fn = fn
        self._arrival: Future[None] | None = None
        self._forgets = False  # one of several sources has failed, see `FoldNode`
        self._before: Any = None  # the cursor before the next sample
        self._skipped = 0  # items of it that were delivered before a resume

    @property
    def extra_room(self) -> int:
        return min(cheap_samples(self.meter), self._upstream.extra_room)

    @property
    def live(self) -> bool:
        return self._upstream.live

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
                sample.cursor = (after, 0)  # no item of the next sample has been given
                self.meter.gaps = True
                self._forgets = self._forgets or sample.state == ONE_LOST
                self._put(sample)
            else:
                # In a task of its own: context variables that are set for one sample must not be seen by the next.
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
        if sample.begun < 0:
            sample.begun = self._run.consumer.batches
        self._at_hand = sample.key
        self._since = began = perf_counter()
        threads = InContext(self._threads, self._run.context.copy())
        try:
            iterable = await call_source(self._fn, self._run, threads, sample.value)
            before_seconds += perf_counter() - began
            meter.busy_seconds = before_seconds
            reader = await self._open(iterable, threads)
            self._since = None
            del iterable
            while items := await reader.read(await self._demanded()):
                for item, _ in items:
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
                cursor = (before, 0 if self._forgets else offset + 1)
                failed = sample.derived(None, cursor, sample.key, sample.position)
                self._position += 1
                annotate(error, self.meter.name, sample, self._run.epoch)
                failed.error = error
                meter.errors += 1
                meter.gaps = True
                self._put(failed)
        finally:
            self._since = None
            if reader is not None:
                meter.busy_seconds = before_seconds + reader.busy_seconds
                await self._run.closing(reader.aclose)
