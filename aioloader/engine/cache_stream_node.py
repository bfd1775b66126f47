"""The node between a stream and its cache: samples that are kept come without reading the stream."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aioloader.cache.store import END, MISSING, Store, at_position
from aioloader.core.entry import LAST, Entry, read_after
from aioloader.core.safe_text import add_note
from aioloader.engine.cache_opening import Opening
from aioloader.engine.node import MOST_EARLY, Kick, Node
from aioloader.errors import BrokenDataError

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["PlacedNode"]


class PlacedNode(Node):
    """Gives the samples of a stream that are kept without reading the stream, and then the rest of it.

    The key of a stream's sample in the cache is its number in the epoch; its cursor is kept too. Samples from the
    first one up to the first gap come from the cache, as empty entries that the window's `CacheStep` fills. If the
    whole stream is kept it is not opened at all; otherwise it resumes after the last of these samples. Samples that
    turn out to be lost when they are loaded are read from the stream again, see `LostSamples`.

    Args:
        upstream: The stream; it gives the same samples in each epoch.
        store: Where samples are kept.
        pipeline: What comes before the cache, in words.
        again: Builds the stream once more.
    """

    def __init__(self, upstream: Node, store: Store, pipeline: str, again: Callable[[], Node]) -> None:
        self._upstream = upstream
        self._again = again
        self._lost: LostSamples | None = None
        self._store = store
        self._pipeline = pipeline
        self._opening: Opening | None = None
        self._resume_at: Any = None
        self._position = 0  # of the next sample in the epoch
        self._numbered = True  # that position is known, and will be the same in other epochs
        self._ready = False  # the cache is open, and the position to resume at has been found in it
        self._begun = False  # the upstream has been started
        self._complete = True  # no error so far

    @property
    def extra_room(self) -> int:
        return self._upstream.extra_room if self._begun else MOST_EARLY

    @property
    def live(self) -> bool:
        return self._upstream.live

    def resume(self, cursor: Any) -> None:
        self._again().resume(cursor)  # raises if the cursor does not fit; the upstream itself may resume elsewhere
        self._resume_at = cursor

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        self._meters_before = len(run.meters)
        self._opening = Opening(run, self._store, self._pipeline, kick)

    def poll(self, limit: int) -> list[Entry]:
        if not self._begun and (entries := self._from_cache(limit)):
            return entries
        if not self._begun or self.ended:
            return []
        run = self._upstream.poll(limit)
        if self._upstream.gaps:  # samples after it, and the end, may have other numbers in another epoch
            self._numbered = False
        for entry in run:
            if entry.error is not None:
                self._complete = False
            entry.kept_as = at_position(self._position) if self._numbered else None
            self._position += 1
        if self._upstream.ended:
            self.ended = True
            if self._numbered and self._complete:
                self._store.put_end(self._position)
        return run

    def make_again(self, entry: Entry, made: "Made") -> None:
        """Make the sample of an entry that could not be loaded.

        Args:
            entry: An entry that this node gave.
            made: Called on the loop with the entry, which then has its value or its own error. The second argument is
                an error when the stream has no such sample any more.
        """
        if self._lost is None:
            self._lost = LostSamples(self._run, self._store, self._again)
        self._lost.make(entry, made)

    def _from_cache(self, limit: int) -> list[Entry]:
        """What comes before the stream is read. When that is all, the epoch ends, or the stream begins."""
        if self._opening is None or not self._opening.done or self.ended:
            return []
        if (error := self._opening.error) is not None:
            self.ended = True
            return [Entry.last(error, self._resume_at, 0)]
        if not self._ready:
            self._ready = True
            self._find_position()
        if entries := self._kept(limit):
            return entries
        if self._store.find(END) == self._position and self._numbered:
            self.ended = True
        else:
            self._begin_upstream()
        return []

    def _begin_upstream(self) -> None:
        """Start the stream, later than other nodes, and put its meters where they would have been."""
        self._begun = True
        if self._resume_at is not None:
            self._upstream.resume(self._resume_at)
        meters = self._run.meters
        count = len(meters)
        self._upstream.start(self._run, self._kick)
        late = meters[count:]
        meters[self._meters_before :] = late + meters[self._meters_before : count]

    def _find_position(self) -> None:
        """Find the number of the first sample after the cursor that this node resumes at."""
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
            entry = Entry(None, place.cursor, place.key, place.position, read_after(self._run.consumer.batches))
            if place.places is not None:
                entry.places = place.places
            entry.kept_as = at_position(self._position)
            entries.append(entry)
            self._position += 1
            self._resume_at = place.cursor
        return entries

    def close(self) -> None:
        if self._opening is not None:
            self._opening.close()
        if self._lost is not None:
            self._lost.close()
        self._upstream.close()


Made = Callable[[Entry, BaseException | None], None]


class LostSamples:
    """Reads a stream again, for samples of it that were kept and have been lost since.

    Most often a file of many samples is lost, and they are wanted roughly in order. So the stream stays open after
    each of them and goes on to the next; it is opened again only for a sample before its position.

    Args:
        run: The epoch.
        store: Has the cursors of the samples, with which the stream can resume after each of them.
        again: Builds the stream.
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
            except Exception as error:  # a generator, which cannot be iterated twice
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
        """The stream, open at or before the sample at `position`."""
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
        with self._run.pausing.exempt():  # the samples that it is for are under way
            stream.start(self._run, self._wake)
        del meters[count:]  # statistics show each stage only once
        self._stream = stream
        return stream

    def _take(self, entry: Entry) -> None:
        """Use `entry`, which the stream has given, if it is wanted."""
        if entry.state == LAST:
            self.close_stream()
            self._give(min(self._wanted), entry.error)
            return
        position = self._position
        self._position += 1
        if position in self._wanted:
            wanted, _ = self._wanted[position]
            wanted.value, wanted.error = entry.value, entry.error
            if entry.attempts > 1:
                wanted.attempts = entry.attempts
            self._give(position, None)

    def _give(self, position: int, error: BaseException | None) -> None:
        entry, made = self._wanted.pop(position)
        made(entry, error)

    def close_stream(self) -> None:
        """Close the stream; a later sample opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """The epoch is over: no sample is wanted any more."""
        self._closed = True
        self.close_stream()


def _alike(cursor: Any) -> Any:
    """`cursor` with tuples for lists, to compare: JSON turns tuples into lists."""
    if isinstance(cursor, dict):
        return {key: _alike(value) for key, value in cursor.items()}
    return tuple(map(_alike, cursor)) if isinstance(cursor, list | tuple) else cursor
