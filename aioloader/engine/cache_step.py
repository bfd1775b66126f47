"""A cache in a window: one step around the steps that it spares.

    look up ──missed──▶ map(fetch) ──▶ map(decode) ──▶ keep ──▶ ...
       └────────────────────found──────────────────────────────▲

A sample that is found skips the steps inside: no request, no thread. Samples keep their slots in the window, so order
and cursors are the same as without the cache. The second cache of a window has the first one inside.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aioloader.cache.disk import DiskStore
from aioloader.cache.memory import MemoryStore
from aioloader.cache.segment import Location, LostError
from aioloader.cache.store import MISSING, REFUSED, Mark, StreamPlace
from aioloader.core.cores import usable_cores
from aioloader.core.entry import DONE, DROPPED, UNDER_WAY, Entry, places_of
from aioloader.engine.cache_opening import Opening
from aioloader.engine.cache_stream_node import PlacedNode
from aioloader.engine.step_protocols import StepWindow
from aioloader.engine.steps import Forward, Step, bind_in_a_row
from aioloader.engine.thread_step import ThreadStep
from aioloader.executors.chunk import DROP, Call, Stop
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["CacheOp"]

_KEY: Final = attrgetter("key")
_VALUE: Final = attrgetter("value")

HITS_ROOM: Final = 256
"""Extra slots while every sample is found: these samples are in memory already."""


@dataclass(frozen=True)
class CacheOp:
    """A cache that keeps what the ops before it made.

    Attributes:
        store: Where it keeps samples.
        pipeline: What comes before the cache, in words.
        label: Its name in statistics.
        stream: The node that numbers the samples of a stream; None: samples are identified by their keys.
        stop: What is said of samples that it found to be refused.
    """

    store: MemoryStore | DiskStore
    pipeline: str
    label: str
    stream: PlacedNode | None = None
    stop: Stop | None = None

    is_async = False
    ordered = True

    @property
    def concurrency(self) -> int:
        """How many samples are written or read at once."""
        return 1 if isinstance(self.store, MemoryStore) else usable_cores()

    @property
    def width(self) -> int:
        """The same."""
        return self.concurrency

    def around(self, steps: Sequence[Step], limit: int | None) -> "CacheStep":
        """A step around `steps`, in a window that holds `limit` entries (None: no fixed number)."""
        if isinstance(self.store, MemoryStore):
            return MemoryCacheStep(self, steps)
        return DiskCacheStep(self, steps, self.concurrency if limit is None else min(self.concurrency, limit))


class CacheStep(Step):
    """Looks samples up, and keeps what the inner steps make of those that are missing."""

    def __init__(self, op: CacheOp, inner: Sequence[Step]) -> None:
        super().__init__(StageMeter(op.label, "sync"), 0)
        self._store = op.store
        self._stream = op.stream
        self.stop = op.stop
        self._inner = inner
        self._all_found = False  # in the last look-up

    @property
    def parts(self) -> list[Step]:
        return [*(part for step in self._inner for part in step.parts), self]

    def bind(self, run: "Run", window: StepWindow, forward: Forward, finished: Forward) -> None:
        bind_in_a_row(self._inner, run, window, self._made, self._not_made)
        self._make = self._inner[0].accept if self._inner else self._made
        super().bind(run, window, forward, finished)
        self.meter.cached_bytes = self._store.nbytes

    @property
    def extra_room(self) -> int:
        return HITS_ROOM if self._all_found else 0

    def accept(self, entry: Entry) -> None:
        self.inbox.append(entry)
        self.dispatch()

    def dispatch(self) -> None:
        if self.paused:
            self._set_aside()
            return
        missed = self._look_up()
        if self._all_found == missed:
            self._all_found = not missed
            self._window.resize()

    def close(self) -> None:
        super().close()
        for step in self._inner:
            step.close()

    @property
    def quiet(self) -> bool:
        return not self._inner or self._inner[0].quiet

    def hold(self) -> None:
        """Look nothing up, and make nothing of what was missing: a sample begins when it is looked up."""
        super().hold()
        if self._inner:
            self._inner[0].hold()

    def let_go(self) -> None:
        if self._inner:
            self._inner[0].let_go()
        super().let_go()

    def _look_up(self) -> bool:
        """Look up all that waits; returns whether a sample was missing."""
        inbox, find = self.inbox, self._store.find
        missed = False
        while inbox:
            entry = inbox.popleft()
            if self._stream is None:
                entry.kept_as = _key_of(entry)
            found = find(entry.kept_as)
            if found is MISSING:
                missed = True
                self.meter.misses += 1
                self._make(entry)
            else:
                self.meter.hits += 1
                self._found(entry, found)
        return missed

    @abstractmethod
    def _found(self, entry: Entry, found: Any) -> None:
        """Send `entry` on with what the store has for it."""

    @abstractmethod
    def _keep(self, entry: Entry, sample: Any) -> None:
        """Keep `sample`, then send `entry` on, or drop it when the sample is `REFUSED`."""

    def _made(self, entry: Entry) -> None:
        """The inner steps have made a sample; None is not kept, since it may be a sample in the next epoch."""
        if entry.kept_as is None or entry.value is None:
            self._forward(entry)
        else:
            self._keep(entry, entry.value)

    def _not_made(self, entry: Entry) -> None:
        """A sample failed inside, or a filter refused it; a refusal is kept too."""
        if entry.state == DROPPED and entry.kept_as is not None:
            entry.state = UNDER_WAY
            self._keep(entry, REFUSED)
        else:
            self._finished(entry)


class MemoryCacheStep(CacheStep):
    """A cache in memory."""

    _store: MemoryStore

    def _look_up(self) -> bool:
        """The same at half the cost where this is the last step of the window, as it mostly is: a hit is done."""
        if not self._window.takes_many(self._forward):
            return super()._look_up()
        entries = list(self.inbox)
        self.inbox.clear()
        keys = [entry.kept_as for entry in entries] if self._stream is not None else _keys_of(entries)
        others: list[Entry] = []
        now, stamps, batches = self._window.now, self.stamps, self._run.consumer.batches
        for entry, key, sample in zip(entries, keys, map(self._store.samples.get, keys, repeat(MISSING)), strict=True):
            if type(sample) is Mark:
                entry.kept_as = key
                others.append(entry)
            else:
                entry.value = sample
                entry.state = DONE
                entry.since = now
                if stamps and entry.begun < 0:  # it begins when it is looked up
                    entry.begun = batches
        hits = len(entries) - len(others)
        if hits:
            self.meter.hits += hits
            self.meter.samples += hits
            self._window.finished_in_place(hits)
        self.inbox.extend(others)
        return super()._look_up() if others else False

    def _found(self, entry: Entry, found: Any) -> None:
        self._stamp((entry,))
        self.meter.samples += 1
        if found is REFUSED:
            self._drop(entry)
        else:
            entry.value = found
            self._forward(entry)

    def _made(self, entry: Entry) -> None:
        self.meter.samples += 1
        super()._made(entry)

    def _keep(self, entry: Entry, sample: Any) -> None:
        try:
            self._store.put(entry.kept_as, sample, _place_of(entry))
        except (KeyboardInterrupt, SystemExit) as error:  # of the sample's `__reduce__`; here it would end the loop
            self._fail(entry, error, self.meter.name)
            return
        self.meter.cached_bytes = self._store.nbytes
        if sample is REFUSED:
            self._drop(entry)
        else:
            self._forward(entry)


class DiskCacheStep(CacheStep):
    """A cache on disk, which it reads and writes in `concurrency` threads."""

    _store: DiskStore

    def __init__(self, op: CacheOp, inner: Sequence[Step], concurrency: int) -> None:
        super().__init__(op, inner)
        self._pipeline = op.pipeline
        self._opening: Opening | None = None
        self._disk = _DiskStep(self._store, concurrency, op.label, self._make_again)
        self._disk.stop = op.stop

    @property
    def parts(self) -> list[Step]:
        return [*super().parts[:-1], self._disk]

    def bind(self, run: "Run", window: StepWindow, forward: Forward, finished: Forward) -> None:
        self._disk.bind(run, window, forward, finished)
        self.meter = self._disk.meter
        super().bind(run, window, forward, finished)

    def dispatch(self) -> None:
        if self._opening is None:
            self._opening = Opening(self._run, self._store, self._pipeline, self.dispatch)
        if not self._opening.done or self.closed:
            return
        while self.inbox and (error := self._opening.error) is not None:
            self._fail(self.inbox.popleft(), error, self.meter.name)
        super().dispatch()

    def close(self) -> None:
        if self._opening is not None:
            self._opening.close()
        super().close()
        self._disk.close()

    def _found(self, entry: Entry, found: Location) -> None:
        entry.value = _Load(found, entry.value)
        self._disk.accept(entry)

    def _keep(self, entry: Entry, sample: Any) -> None:
        entry.value = _Write(entry.kept_as, sample, _place_of(entry))
        self._disk.accept(entry)

    def _make_again(self, entry: Entry) -> None:
        """The sample was found but could not be read: make it after all."""
        self.meter.hits -= 1
        self.meter.misses += 1
        if self._stream is None:
            if self.paused and self._inner:
                self._inner[0].take_in([entry])
            else:
                self._make(entry)
        else:
            self._stream.make_again(entry, self._made_again)

    def _made_again(self, entry: Entry, error: BaseException | None) -> None:
        """A lost sample of a stream has been made again, or cannot be."""
        if error is not None:
            self._fail(entry, error, self.meter.name)
        elif entry.error is not None:  # its own error, which it would have without the cache
            self._finished(entry)
        else:
            self._made(entry)


class _Write(NamedTuple):
    """A sample to write."""

    key: Any
    sample: Any
    place: StreamPlace | None


class _Load(NamedTuple):
    """A sample to read."""

    location: Location
    instead: Any  # the entry's value, from which the sample is made if it cannot be read


class _DiskStep(ThreadStep):
    """The threads of a `DiskCacheStep`; `lost` takes entries whose samples could not be read."""

    def __init__(self, store: DiskStore, concurrency: int, name: str, lost: Forward) -> None:
        calls = [Call(partial(_read_or_write, store), predicate=False, label=name)]
        super().__init__(calls, concurrency, thread_name="aioloader-cache")
        self._store = store
        self._lost_on_disk = lost

    def _settle(self, entries: Iterable[Entry], outcomes: Sequence[Any]) -> None:
        self.meter.cached_bytes = self._store.nbytes
        super()._settle(entries, outcomes)

    def _fail(self, entry: Entry, error: BaseException, label: str) -> None:
        if isinstance(error, LostError):
            entry.value = entry.value.instead
            self._lost_on_disk(entry)
        else:
            super()._fail(entry, error, label)


def _read_or_write(store: DiskStore, job: _Write | _Load) -> Any:
    """Runs in a thread."""
    if isinstance(job, _Load):
        sample = store.load(job.location)
    else:
        store.put(*job)
        sample = job.sample
    return DROP if sample is REFUSED else sample


def _place_of(entry: Entry) -> StreamPlace | None:
    """What is kept beside a sample of a stream, for epochs that do not read the stream."""
    key = entry.kept_as
    if type(key) is tuple and key[0] == "@":
        return StreamPlace(entry.cursor, entry.key, entry.position, places_of(entry))
    return None


def _keys_of(entries: list[Entry]) -> list[Any]:
    """The `_key_of` of each entry; fast where all are strings, or integers that are their own keys."""
    keys = list(map(_KEY, entries))
    kinds = set(map(type, keys))
    if kinds == {str} or (kinds == {int} and all(map(is_, keys, map(_VALUE, entries)))):
        return keys
    return list(map(_key_of, entries))


def _key_of(entry: Entry) -> Any:
    """The key of an indexable source's sample in the store: its name or index; None if it has no name."""
    key = entry.key
    kind = type(key)
    if kind is int:
        # In a list of integers and other things, an integer is its own key, and the others have their index.
        return key if type(entry.value) is int and entry.value == key else ("#", key)
    if kind is str or key is None:
        return key
    return (kind.__name__, str(key))
