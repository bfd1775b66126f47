"""`shuffle`: a permutation of an indexable source, or a buffer over a stream."""

from collections import deque
from dataclasses import dataclass
from random import Random
from typing import Any

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.core.seeds import BLOCK, random_of_block
from aioloader.engine.node import Fold
from aioloader.engine.resumable import beginning
from aioloader.stages.base import FoldStage, Pass
from aioloader.stages.flow import Flow, Shared
from aioloader.stages.key_order import KeyOrder

__all__ = ["Shuffle"]


@dataclass(frozen=True)
class Shuffle(FoldStage):
    """Another order in each epoch, the same for the same seed.

    Args:
        buffer_size: None: a permutation of the keys of the whole (indexable) source; else how many samples wait for
            their turn.
        seed: With the epoch, all that the order depends on.
    """

    buffer_size: int | None
    seed: int

    keeps_samples = True
    part_by_part = True

    @property
    def reorders(self) -> bool:  # type: ignore[override]  # a plain attribute where it is always so
        return self.buffer_size is None

    @property
    def label(self) -> str:
        return f"shuffle({'' if self.buffer_size is None else self.buffer_size})"

    @property
    def shown(self) -> str:
        return f"shuffle({'' if self.buffer_size is None else f'{self.buffer_size}, '}seed={self.seed})"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> dict[str, Any]:
        return {"stage": "shuffle", "buffer_size": self.buffer_size, "seed": self.seed}

    def flow(self, before: Flow) -> Flow:
        # What leaves last depends on where the end is.
        free = before.batch_size is not None and before.steady
        after = before if free else before.limited(Shared.SAME_WORLD, self.label)
        return after if before.by_key and self.buffer_size is None else after.counted().closed()

    def reorder(self, order: KeyOrder, this_pass: Pass, *, permute: bool) -> KeyOrder:
        return order.permuted(this_pass.seed(self.seed, "shuffle") if permute else None)

    def fold(self, this_pass: Pass) -> Fold:
        assert self.buffer_size is not None
        return _ShuffleFold(self.buffer_size, this_pass.seed(self.seed, "shuffle"))


class _ShuffleFold:
    """Draws the next output from the buffer; the entry that comes in takes its place.

    Cursor: one not later than the oldest entry that still waits, the number of outputs, and how many entries had come
    in. Which place is drawn depends on the seed and these numbers alone, so the buffer's content can be found again:
    the numbers of the entries in it by following the draws back until each place has been drawn, the entries by reading
    on from the oldest one. How many draws that are depends on the size of the buffer, not on how long ago the epoch
    began.
    """

    full = False

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._random = Random()
        self._buffer: list[_Pending] = []
        self._arrivals: deque[_Pending] = deque()
        self._last_cursor: Any = None  # of the newest arrival
        self._arrived = 0
        self._draws = 0
        self._missing: dict[int, _Pending] = {}  # after a resume: by number, those in the buffer that are to come again
        self._resumed_at = 0  # how many had come in when the state was taken
        self._to_replay = False

    def failed_at(self, cursor: Any) -> Any:
        oldest = next((waiting.before for waiting in self._arrivals if waiting.entry is not None), cursor)
        return (oldest, 0, 0)  # another buffer begins, with what is in this one

    def resume(self, cursor: Any) -> Any:
        oldest, drawn, arrived = cursor_parts(cursor, 3)
        self._draws, self._resumed_at = as_count(drawn, as_count(arrived)), arrived
        if arrived > drawn + self._size:
            raise ValueError(f"a buffer of {self._size} holds no more, got {arrived} that came and {drawn} that went")
        self._last_cursor = oldest
        self._to_replay = True  # not now: it takes a moment, and this is also asked for only to see whether it fits
        return oldest

    def _replay(self) -> None:
        """Find out which entries are in the buffer."""
        self._to_replay = False
        size = self._size
        taken = max(0, self._resumed_at - size)  # those that came in when it was full took the places of others
        buffer = list(range(min(size, self._resumed_at)))
        unknown = set(buffer)  # places whose entry is not known
        block = -(-taken // BLOCK)
        while block and unknown:
            block -= 1
            random = random_of_block(self._seed, block)
            first = block * BLOCK
            places = [random.randrange(size) for _ in range(min(BLOCK, taken - first))]
            for number in range(len(places) - 1, -1, -1):
                if (place := places[number]) in unknown:
                    unknown.remove(place)
                    buffer[place] = size + first + number
        self._random = random_of_block(self._seed, taken // BLOCK)
        for _ in range(taken % BLOCK):
            self._random.randrange(size)
        for number in range(taken, self._draws):  # the source had ended: the buffer ran empty
            place = self._draw(number, len(buffer))
            buffer[place] = buffer[-1]
            buffer.pop()
        self._buffer = [_Pending(None, None) for _ in buffer]
        self._missing = dict(zip(buffer, self._buffer, strict=True))
        self._arrived = min(buffer, default=self._resumed_at)

    def wants(self, limit: int) -> int:
        if self._to_replay:
            self._replay()
        return limit + self._size - len(self._buffer) + max(0, self._resumed_at - self._arrived)

    def feed(self, run: list[Entry]) -> list[Entry]:
        buffer = self._buffer
        out = []
        for entry in run:
            before, self._last_cursor = self._last_cursor, entry.cursor
            if before is None:  # the order of the keys is to be the same one again
                before = beginning(entry.cursor)
            self._arrived += 1
            if self._arrived <= self._resumed_at:
                self._again(entry, before)
                continue
            waiting = _Pending(entry, before)
            self._arrivals.append(waiting)
            if len(buffer) < self._size:
                buffer.append(waiting)
            else:
                place = self._draw(self._draws, self._size)
                drawn, buffer[place] = buffer[place], waiting
                out.append(self._emit(drawn))
        return out

    def _again(self, entry: Entry, before: Any) -> None:
        """An entry that had come in before the state was taken: it goes to its place, or had gone out."""
        waiting = self._missing.pop(self._arrived - 1, None)
        if waiting is not None:
            waiting.entry, waiting.before = entry, before
            self._arrivals.append(waiting)

    def flush(self) -> list[Entry]:
        buffer = [waiting for waiting in self._buffer if waiting.entry is not None]
        out = []
        while buffer:
            place = self._draw(self._draws, len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            out.append(self._emit(buffer.pop()))
        return out

    def _draw(self, number: int, places: int) -> int:
        """Of so many places, that of output `number`."""
        if not number % BLOCK:
            self._random = random_of_block(self._seed, number // BLOCK)
        return self._random.randrange(places)

    def _emit(self, drawn: "_Pending") -> Entry:
        entry, drawn.entry = drawn.entry, None
        assert entry is not None
        arrivals = self._arrivals
        while arrivals and arrivals[0].entry is None:
            arrivals.popleft()
        self._draws += 1
        oldest = arrivals[0].before if arrivals else self._last_cursor
        entry.cursor = (oldest, self._draws, self._arrived)
        return entry


class _Pending:
    __slots__ = ("before", "entry")

    def __init__(self, entry: Entry | None, before: Any) -> None:
        self.entry = entry  # None: it has been drawn, or has not come again yet
        self.before = before  # the cursor that leads to this entry
