"""`shuffle`: a permutation of an indexable source, or a buffer over a stream."""

from collections import deque
from dataclasses import dataclass
from random import Random
from typing import Any

from aioloader.engine.entry import Entry
from aioloader.engine.node import Fold
from aioloader.stages.base import FoldStage, Pass

__all__ = ["Shuffle"]


@dataclass(frozen=True)
class Shuffle(FoldStage):
    """Another order in each epoch, the same for the same seed.

    Args:
        buffer_size: None: a permutation of the whole (indexable) source, which `sources/order.py` applies to the keys;
            else how many samples wait for their turn.
        seed: With the epoch, all that the order depends on.
    """

    buffer_size: int | None
    seed: int

    @property
    def label(self) -> str:
        return f"shuffle({'' if self.buffer_size is None else self.buffer_size})"

    def length(self, upstream: int) -> int:
        return upstream

    def fold(self, this_pass: Pass) -> Fold:
        assert self.buffer_size is not None
        return _ShuffleFold(self.buffer_size, this_pass.seed(self.seed, "shuffle"))


class _ShuffleFold:
    """Draws the next output from the buffer; the entry that comes in takes its place.

    Cursor: a cursor not later than the oldest entry that still waits, and the number of outputs. Which place is drawn
    depends on the seed and the number of the output alone, so the buffer's content can be found again by replaying
    integers from there.
    """

    full = False

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = Random(seed)
        self._buffer: list[_Waiting] = []
        self._arrivals: deque[_Waiting] = deque()
        self._last_cursor: Any = None  # of the newest arrival
        self._drawn = 0

    def wants(self, limit: int) -> int:
        return limit + self._size - len(self._buffer)

    def feed(self, run: list[Entry]) -> list[Entry]:
        buffer = self._buffer
        out = []
        for entry in run:
            waiting = _Waiting(entry, self._last_cursor)
            self._last_cursor = entry.cursor
            self._arrivals.append(waiting)
            if len(buffer) < self._size:
                buffer.append(waiting)
            else:
                place = self._random.randrange(self._size)
                drawn, buffer[place] = buffer[place], waiting
                out.append(self._emit(drawn))
        return out

    def flush(self) -> list[Entry]:
        buffer = self._buffer
        out = []
        while buffer:
            place = self._random.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            out.append(self._emit(buffer.pop()))
        return out

    def _emit(self, drawn: "_Waiting") -> Entry:
        entry, drawn.entry = drawn.entry, None
        assert entry is not None
        arrivals = self._arrivals
        while arrivals and arrivals[0].entry is None:
            arrivals.popleft()
        self._drawn += 1
        oldest = arrivals[0].before if arrivals else self._last_cursor
        entry.cursor = (oldest, self._drawn)
        return entry


class _Waiting:
    __slots__ = ("before", "entry")

    def __init__(self, entry: Entry, before: Any) -> None:
        self.entry: Entry | None = entry  # None: it has been drawn
        self.before = before  # the cursor that leads to this entry
