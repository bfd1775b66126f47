"""What a loader has read from a `Channel` and not handed out, which goes back when it is closed."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from aioloader.core.entry import Entry
from aioloader.core.source import RunListener

__all__ = ["ChannelLedger"]

KEPT_SAMPLES: Final = 1 << 16
"""So many samples that a loader has read and not handed out are kept, to go back when it is closed."""


class ChannelLedger(RunListener):
    """What one run has read of a channel and not handed out, so that it can go back.

    The cursor of an entry is ("channel", the ledger's name, the entry's number). Whatever the stages behind make of
    cursors, the one that was handed out last has such a triple in it, and what comes after that number has not been
    handed out. Behind `shuffle(buffer_size)` and `ordered=False` that is so from the oldest one on that has not been:
    what overtook it comes again.

    A filter that drops samples for ever hands nothing out, hence the bound of what is kept.
    """

    def __init__(self, put_back: Callable[[Sequence[Any]], None]) -> None:
        self._put_back = put_back
        self._name = os.urandom(6).hex()  # a cursor of another run, from a saved state, says nothing about this one
        self._read = 0
        self._kept: deque[Any] = deque(maxlen=KEPT_SAMPLES)
        self._seen: Any = None

    def entries(self, samples: list[Any]) -> list[Entry]:
        """The next that were read."""
        start, name = self._read, self._name
        self._read = stop = start + len(samples)
        self._kept.extend(samples)
        cursors = [("channel", name, number) for number in range(start + 1, stop + 1)]
        return list(map(Entry, samples, cursors, range(start, stop), range(start, stop)))

    def forget(self, handed_out: Any) -> None:
        """The entry with the cursor `handed_out` has reached the consumer, and all before it."""
        if handed_out is self._seen:
            return
        self._seen = handed_out
        number = self._number_in(handed_out)
        if number is not None:
            kept = self._kept
            while len(kept) > self._read - number:
                kept.popleft()

    def _number_in(self, cursor: Any) -> int | None:
        """The lowest number of ours in `cursor`."""
        if not isinstance(cursor, tuple):
            return None
        if len(cursor) == 3 and cursor[0] == "channel" and cursor[1] == self._name:
            return int(cursor[2])
        return min((number for part in cursor if (number := self._number_in(part)) is not None), default=None)

    def run_over(self, handed_out: Any) -> None:
        self.forget(handed_out)
        if self._kept:
            self._put_back(self._kept)
            self._kept = deque(maxlen=0)
