"""A cache of a stream, in front of its window: what is kept comes without touching the stream."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aioloader.cache.store import END, MISSING, Store, at_position
from aioloader.core.entry import LAST, Entry
from aioloader.core.safe_text import add_note
from aioloader.engine.cache_opening import Opening
from aioloader.engine.node import MOST_EARLY, Kick, Node
from aioloader.errors import BrokenDataError

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["PlacedNode"]


class PlacedNode(Node):
    """In front of a cache of a stream: gives what is kept without touching the stream, and then the rest of it.

    Samples of a stream are kept as their number in the epoch, with their cursors. Those from the first on without a
    gap are given from the cache, as empty entries that `LookUp` fills; if the stream has been kept to its end, it is
    not opened at all. Else it is resumed behind the last of them. What turns out to be lost when it is loaded is read
    from the stream once more, see `LostSamples`.

    Args:
        upstream: The stream; it gives the same samples in each epoch.
        store: Where they are kept.
        pipeline: What is in front of the cache, in words.
        again: Makes the stream once more.
    """

    def __init__(self, upstream: Node, store: Store, pipeline: str, again: Callable[[], Node]) -> None:
        self._upstream = upstream
        self._again = again
        self._lost: LostSamples | None = None
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
        self._again().resume(cursor)  # raises when it does not fit; the upstream may go on elsewhere
        self._resume_at = cursor

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        self._meters_before = len(run.meters)
        self._opening = Opening(run, self._store, self._pipeline, kick)

    def poll(self, limit: int) -> list[Entry]:
        if not self._opening.done or self.ended:
            return []
        if (error := self._opening.error) is not None:
            self.ended = True
            return [Entry.last(error, self._resume_at, 0)]
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

    def make_again(self, entry: Entry, made: "Made") -> None:
        """`entry` could not be loaded: make its sample.

        Args:
            entry: One that this node gave.
            made: Called on the loop with the entry, which has its value or its own error; and with an error when there
                is no such sample any more.
        """
        if self._lost is None:
            self._lost = LostSamples(self._run, self._store, self._again)
        self._lost.make(entry, made)

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
        if self._lost is not None:
            self._lost.close()
        self._upstream.close()


Made = Callable[[Entry, BaseException | None], None]


class LostSamples:
    """Reads a stream once more, for samples that were kept of it and have been lost since.

    Most often what is lost is a file of many samples, and they are asked for about in order: the stream stays open
    after one, and goes on to the next. For one further to the front it is opened anew.

    Args:
        run: Of which epoch.
        store: Knows where the stream goes on after each of its samples.
        again: Makes the stream.
    """

    def __init__(self, run: "Run", store: Store, again: Callable[[], Node]) -> None:
        self._run = run
        self._store = store
        self._again = again
        self._wanted: dict[int, tuple[Entry, Made]] = {}  # by position
        self._stream: Node | None = None
        self._position = 0  # of the sample that the stream gives next
        self._scheduled = False
        self._closed = False

    def make(self, entry: Entry, made: Made) -> None:
        """See `PlacedNode.make_again`."""
        _, position = entry.kept_as
        self._wanted[position] = entry, made
        self._wake()

    def _wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._run.soon(self._read)

    def _read(self) -> None:
        self._scheduled = False
        while self._wanted and not (self._closed or self._run.stopping):
            first = min(self._wanted)
            try:
                stream = self._stream_before(first)
            except Exception as error:  # a generator, which cannot be iterated once more
                add_note(error, "aioloader: the sample was kept on disk, has been lost since, and cannot be made again")
                self._give(first, error)
                continue
            entries = stream.poll(first + 1 - self._position)
            for entry in entries:
                self._take(entry)
            if not entries:
                if not stream.ended:
                    return
                self._give(first, BrokenDataError("the stream has fewer samples than it had; delete its cache"))

    def _stream_before(self, position: int) -> Node:
        """The stream, open somewhere before the sample at `position`."""
        stream = self._stream
        if stream is not None and self._position <= position:
            return stream
        self.close_stream()
        stream = self._again()
        before = None if position == 0 else self._store.place(position - 1)
        if before is not None:
            stream.resume(before.cursor)
        self._position = position if before is not None else 0
        meters = self._run.meters
        count = len(meters)
        stream.start(self._run, self._wake)
        del meters[count:]  # statistics show each stage once
        self._stream = stream
        return stream

    def _take(self, entry: Entry) -> None:
        """The stream has given `entry`."""
        if entry.state == LAST:
            self.close_stream()
            self._give(min(self._wanted), entry.error)
            return
        position = self._position
        self._position += 1
        if position in self._wanted:
            wanted, _ = self._wanted[position]
            wanted.value, wanted.error, wanted.attempts = entry.value, entry.error, entry.attempts
            self._give(position, None)

    def _give(self, position: int, error: BaseException | None) -> None:
        entry, made = self._wanted.pop(position)
        made(entry, error)

    def close_stream(self) -> None:
        """It is read no further."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """Nobody waits any more."""
        self._closed = True
        self.close_stream()


def _alike(cursor: Any) -> Any:
    """`cursor` as it is compared: across JSON, tuples become lists."""
    if isinstance(cursor, dict):
        return {key: _alike(value) for key, value in cursor.items()}
    return tuple(map(_alike, cursor)) if isinstance(cursor, list | tuple) else cursor
