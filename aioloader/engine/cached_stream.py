"""A cache of a stream, in front of its window: what is kept comes without touching the stream."""

from typing import TYPE_CHECKING, Any

from aioloader.cache.store import END, MISSING, Store, at_position
from aioloader.engine.cache_opening import Opening
from aioloader.engine.entry import Entry
from aioloader.engine.node import MOST_EARLY, Kick, Node

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["PlacedNode"]


class PlacedNode(Node):
    """In front of a cache of a stream: gives what is kept without touching the stream, and then the rest of it.

    Samples of a stream are kept as their number in the epoch, with their cursors. Those from the first on without a
    gap are given from the cache, as empty entries that `LookUp` fills; if the stream has been kept to its end, it is
    not opened at all. Else it is resumed behind the last of them.

    Args:
        upstream: The stream; it gives the same samples in each epoch.
        store: Where they are kept.
        pipeline: What is in front of the cache, in words.
    """

    def __init__(self, upstream: Node, store: Store, pipeline: str) -> None:
        self._upstream = upstream
        self._store = store
        self._pipeline = pipeline
        self._resume_at: Any = None
        self._position = 0  # in the epoch, of the next sample; None where that cannot be known
        self._numbered = True
        self._ready = False  # the cache is open, and what was delivered before a resume has been found in it
        self._begun = False  # the upstream
        self._whole = True  # no error so far

    @property
    def extra_room(self) -> int:
        return self._upstream.extra_room if self._begun else MOST_EARLY

    def resume(self, cursor: Any) -> None:
        self._resume_at = cursor

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        self._meters_before = len(run.meters)
        self._opening = Opening(run, [(self._store, self._pipeline)])
        self._opening.begin(kick)

    def poll(self, limit: int) -> list[Entry]:
        if not self._opening.done or self.ended:
            return []
        if self._opening.error is not None:
            self.ended = True
            return [Entry.last(self._opening.error, self._resume_at, 0)]
        if not self._ready:
            self._ready = True
            self._find_position()
        if not self._begun:
            if entries := self._kept(limit):
                return entries
            if self._store.find(END) == self._position and self._numbered:
                self.ended = True
                return []
            self._begun = True
            if self._resume_at is not None:
                self._upstream.resume(self._resume_at)
            self._start_upstream()
        run = self._upstream.poll(limit)
        if self._upstream.gaps:  # what comes after it, and the end, may have other numbers another time
            self._numbered = False
        for entry in run:
            if entry.error is not None:
                self._whole = False
            entry.kept_as = at_position(self._position) if self._numbered else None
            self._position += 1
        if self._upstream.ended:
            self.ended = True
            if self._numbered and self._whole:
                self._store.put_end(self._position)
        return run

    def _start_upstream(self) -> None:
        """Later than others are: its meters go where they would have gone."""
        meters = self._run.meters
        count = len(meters)
        self._upstream.start(self._run, self._kick)
        late = meters[count:]
        meters[self._meters_before :] = late + meters[self._meters_before : count]

    def _find_position(self) -> None:
        """The number of the sample behind the cursor to go on at."""
        if self._resume_at is None:
            return
        wanted = _alike(self._resume_at)
        position = 0
        while (place := self._store.place(position)) is not None:
            position += 1
            if _alike(place.cursor) == wanted:
                self._position = position
                return
        self._numbered = False

    def _kept(self, limit: int) -> list[Entry]:
        entries: list[Entry] = []
        if not self._numbered:
            return entries
        while len(entries) < limit and (place := self._store.place(self._position)) is not None:
            if self._store.find(at_position(self._position)) is MISSING:
                break
            entry = Entry(None, place.cursor, place.key, place.position)
            if place.places is not None:
                entry.places = place.places
            entry.kept_as = at_position(self._position)
            entries.append(entry)
            self._position += 1
            self._resume_at = place.cursor
        return entries

    def close(self) -> None:
        if hasattr(self, "_opening"):
            self._opening.close()
        self._upstream.close()


def _alike(cursor: Any) -> Any:
    """`cursor` as it is compared: across JSON, tuples become lists."""
    if isinstance(cursor, dict):
        return {key: _alike(value) for key, value in cursor.items()}
    return tuple(map(_alike, cursor)) if isinstance(cursor, list | tuple) else cursor
