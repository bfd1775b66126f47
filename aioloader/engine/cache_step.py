"""How a cache stands in a window: a step that looks samples up before the first, and one behind the steps it spares.

    LookUp ──miss──▶ map(fetch) ──▶ map(decode) ──▶ Keep ──▶ ...
       └───────────────────hit──────────────────────▲

A sample that is found jumps over the steps between the two: no request, no thread. Samples keep their slots, so order
and cursors are what they would be without the cache.
"""

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, Final

from aioloader.cache.disk import DiskStore
from aioloader.cache.memory import MemoryStore
from aioloader.cache.segment import Location, LostError
from aioloader.cache.store import MISSING, REFUSED, Mark, StreamPlace
from aioloader.core.entry import DONE, Entry, places_of
from aioloader.engine.cache_opening import Opening
from aioloader.engine.cache_stream_node import PlacedNode
from aioloader.engine.steps import Forward, Step
from aioloader.engine.thread_step import ThreadStep
from aioloader.executors.chunk import DROP, Call
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["KeepInMemory", "KeepOnDisk", "LookUp"]

_KEY: Final = attrgetter("key")
_VALUE: Final = attrgetter("value")

HITS_ROOM: Final = 256
"""Slots more while all samples are found: they take no memory that is not taken already."""


class LookUp(Step):
    """The first step of a window with caches.

    Args:
        keeps: The steps behind which samples are kept, in order, with the pipeline in front of each, in words.
        placed: Samples come with what they are kept as (`PlacedNode`), which has opened the cache; else by their key.
    """

    def __init__(self, keeps: Sequence[tuple["KeepInMemory | KeepOnDisk", str]], *, by_position: bool) -> None:
        super().__init__(StageMeter("cache", "sync"), 0)
        self._keeps = [keep for keep, _ in reversed(keeps)]  # what is found in the last one spares the most
        self._stores = [(keep.store, pipeline) for keep, pipeline in keeps]
        self._by_position = by_position
        self._all_found = False  # of those that came in last

    def bind(self, run: "Run", window: "Window", forward: Forward) -> None:
        self._run = run
        self._window = window
        self._forward = forward
        self._opening = Opening(run, self._stores)
        self._begun = False
        # Most often there is one cache, nothing is behind it, and a sample that is found is done.
        last = self._keeps[0]
        in_place = len(self._keeps) == 1 and window.ordered and window.steps[-1] is last
        self._only = last if in_place and isinstance(last, KeepInMemory) else None
        for keep in self._keeps:
            keep.look_up = self

    @property
    def extra_room(self) -> int:
        return HITS_ROOM if self._all_found else 0

    def accept(self, entry: Entry) -> None:
        self.inbox.append(entry)
        self.dispatch()

    def dispatch(self) -> None:
        if not self._begun:
            self._begun = True
            self._opening.begin(self.dispatch)
        if not self._opening.done or self.closed:
            return
        while self.inbox and (error := self._opening.error) is not None:
            self._fail(self.inbox.popleft(), error, self._keeps[-1].meter.name)
        missed = self._look_up() if self._only is None else self._look_up_in_place(self._only)
        if self._all_found == missed:
            self._all_found = not missed
            self._window.resize()

    def _look_up(self) -> bool:
        """Send on what waits; returns whether something was not found."""
        inbox, keeps, forward = self.inbox, self._keeps, self._forward
        missed = False
        while inbox:
            entry = inbox.popleft()
            key = entry.kept_as if self._by_position else _key_of(entry)
            entry.kept_as = key
            for keep in keeps:
                found = keep.store.find(key)
                if found is not MISSING:
                    keep.found(entry, found)
                    break
                keep.meter.misses += 1
            else:
                missed = True
                forward(entry)
        return missed

    def _look_up_in_place(self, keep: "KeepInMemory") -> bool:
        """The same for one cache in memory with nothing behind it: what is found is done, and costs half as much."""
        entries = list(self.inbox)
        self.inbox.clear()
        keys = [entry.kept_as for entry in entries] if self._by_position else _keys_of(entries)
        missing: list[Entry] = []
        for entry, key, sample in zip(entries, keys, map(keep.store.samples.get, keys, repeat(MISSING)), strict=True):
            if type(sample) is Mark:
                entry.kept_as = key
                missing.append(entry)
            else:
                entry.value = sample
                entry.state = DONE
        meter = keep.meter
        hits = len(entries) - len(missing)
        if hits:
            meter.hits += hits
            meter.samples += hits
            self._window.finished_in_place(hits)
        missed = False
        for entry in missing:
            if keep.store.find(entry.kept_as) is REFUSED:
                keep.found(entry, REFUSED)
            else:
                meter.misses += 1
                missed = True
                self._forward(entry)
        return missed

    def again(self, entry: Entry, keep: "KeepOnDisk") -> None:
        """What `keep` found could not be read: make it after all."""
        if self._by_position:
            upstream = self._window.upstream
            assert isinstance(upstream, PlacedNode)
            upstream.make_again(entry, keep.made)
        else:
            self._forward(entry)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_opening"):
            self._opening.close()
        super().close()


def _keys_of(entries: list[Entry]) -> list[Any]:
    """What each sample is kept as, see `_key_of`; at once where all are names, or integers that name themselves."""
    keys = list(map(_KEY, entries))
    kinds = set(map(type, keys))
    if kinds == {str} or (kinds == {int} and all(map(is_, keys, map(_VALUE, entries)))):
        return keys
    return list(map(_key_of, entries))


def _key_of(entry: Entry) -> Any:
    """What a sample of an indexable source is kept as: its name or index; None for what has no name."""
    key = entry.key
    kind = type(key)
    if kind is int:
        # A list of integers and other things: the integers name themselves, the others have their index.
        return key if type(entry.value) is int and entry.value == key else ("#", key)
    if kind is str or key is None:
        return key
    return (kind.__name__, str(key))


class KeepInMemory(Step):
    """Behind the steps that a cache in memory spares.

    Args:
        store: The cache.
        name: The stage, as written.
    """

    look_up: LookUp

    def __init__(self, store: MemoryStore, name: str) -> None:
        super().__init__(StageMeter(name, "sync"), 0)
        self.store = store

    def bind(self, run: "Run", window: "Window", forward: Forward) -> None:
        super().bind(run, window, forward)
        self.meter.cached_bytes = self.store.nbytes

    def dispatch(self) -> None:
        """Nothing waits here."""

    def accept(self, entry: Entry) -> None:
        self.meter.samples += 1
        if entry.kept_as is not None and entry.value is not None:  # what came to nothing may come another time
            try:
                self._put(entry, entry.value)
            except (KeyboardInterrupt, SystemExit) as error:  # of the sample's `__reduce__`; here it would end the loop
                self._fail(entry, error, self.meter.name)
                return
        self._forward(entry)

    def refused(self, entry: Entry) -> None:
        """A filter in front refused it."""
        if entry.kept_as is not None:
            self._put(entry, REFUSED)
        self._drop(entry)

    def found(self, entry: Entry, sample: Any) -> None:
        """`entry` is kept, as `sample`."""
        meter = self.meter
        meter.hits += 1
        meter.samples += 1
        if sample is REFUSED:
            self._drop(entry)
        else:
            entry.value = sample
            self._forward(entry)

    def _put(self, entry: Entry, sample: Any) -> None:
        self.store.put(entry.kept_as, sample, _place_of(entry))
        self.meter.cached_bytes = self.store.nbytes


class _Write:
    """A sample on its way to the disk."""

    __slots__ = ("key", "place", "sample")

    def __init__(self, key: Any, sample: Any, place: StreamPlace | None) -> None:
        self.key = key
        self.sample = sample
        self.place = place


class _Load:
    """A sample on its way from the disk."""

    __slots__ = ("instead", "location")

    def __init__(self, location: Location, instead: Any) -> None:
        self.location = location
        self.instead = instead  # what the first step takes, should the sample be lost


class _LostOnDisk:
    """It was lost on the disk: what to do instead."""

    __slots__ = ("instead",)

    def __init__(self, instead: Any) -> None:
        self.instead = instead


class KeepOnDisk(ThreadStep):
    """Behind the steps that a cache on disk spares: it writes and reads in threads.

    Args:
        store: The cache.
        concurrency: Threads.
        name: The stage, as written.
    """

    look_up: LookUp

    def __init__(self, store: DiskStore, concurrency: int, name: str) -> None:
        super().__init__(
            [Call(partial(_work, store), predicate=False, label=name)], concurrency, thread_name="aioloader-cache"
        )
        self.store = store

    def accept(self, entry: Entry) -> None:
        if entry.kept_as is None or entry.value is None:
            self._forward(entry)
            return
        entry.value = _Write(entry.kept_as, entry.value, _place_of(entry))
        super().accept(entry)

    def refused(self, entry: Entry) -> None:
        """A filter in front refused it."""
        if entry.kept_as is None:
            self._drop(entry)
            return
        entry.value = _Write(entry.kept_as, REFUSED, _place_of(entry))
        super().accept(entry)

    def found(self, entry: Entry, location: Location) -> None:
        """`entry` is kept, at `location`."""
        self.meter.hits += 1
        entry.value = _Load(location, entry.value)
        super().accept(entry)

    def made(self, entry: Entry, error: BaseException | None) -> None:
        """What was lost of a stream has been made again, or cannot be."""
        if error is not None:
            self._fail(entry, error, self.meter.name)
        elif entry.error is not None:  # the sample's own, which it would have without a cache
            self._window.finished(entry)
        else:
            self.accept(entry)

    def _settle(self, entries: Any, outcomes: Any) -> None:
        self.meter.cached_bytes = self.store.nbytes
        lost = [
            (entry, outcome) for entry, outcome in zip(entries, outcomes, strict=False) if type(outcome) is _LostOnDisk
        ]
        if not lost:
            super()._settle(entries, outcomes)
            return
        for entry, outcome in zip(entries, outcomes, strict=False):
            if type(outcome) is not _LostOnDisk:
                super()._settle([entry], [outcome])
                continue
            self.meter.hits -= 1
            self.meter.misses += 1
            entry.value = outcome.instead
            self.look_up.again(entry, self)


def _work(store: DiskStore, job: Any) -> Any:
    """In a thread."""
    if type(job) is _Load:
        try:
            sample = store.load(job.location)
        except LostError:
            return _LostOnDisk(job.instead)
    else:
        store.put(job.key, job.sample, job.place)
        sample = job.sample
    return DROP if sample is REFUSED else sample


def _place_of(entry: Entry) -> StreamPlace | None:
    """What is kept beside a sample of a stream."""
    key = entry.kept_as
    if type(key) is tuple and key[0] == "@":
        return StreamPlace(entry.cursor, entry.key, entry.position, places_of(entry))
    return None
