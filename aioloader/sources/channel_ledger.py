"""Samples that a loader has read from a `Channel` and not handed out: they go back when the loader is closed."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from aioloader.core.entry import Entry
from aioloader.core.source import RunListener

__all__ = ["ChannelLedger"]

KEPT_SAMPLES: Final = 1 << 16
"""The most samples that are kept to go back."""


class ChannelLedger(RunListener):
    """The samples that one run has read from a channel and not handed out, so that they can go back.

    The cursor of an entry is ("channel", the ledger's name, the entry's number). Whatever later stages make of cursors,
    the one that was handed out last contains such a triple, and entries after that number were not handed out. After
    `shuffle(buffer_size)` and `ordered=False` it is the number before the oldest entry that was not handed out:
    samples that overtook it come again.

    The number of samples is bounded, because a filter may drop all samples, so that nothing is handed out.
    """

    def __init__(self, put_back: Callable[[Sequence[Any]], None]) -> None:
        self._put_back = put_back
        self._name = os.urandom(
            6
        ).hex()  # so that a cursor of another run, from a saved state, is not taken for one of this run
        self._read = 0
        self._kept: deque[Any] = deque(maxlen=KEPT_SAMPLES)
        self._seen: Any = None

    def entries(self, samples: list[Any]) -> list[Entry]:
        """Entries for samples that were read."""
        start, name = self._read, self._name
        self._read = stop = start + len(samples)
        self._kept.extend(samples)
        cursors = [("channel", name, number) for number in range(start + 1, stop + 1)]
        return list(map(Entry, samples, cursors, range(start, stop), range(start, stop)))

    def forget(self, handed_out: Any) -> None:
        """Drop what the consumer has: the entry with cursor `handed_out` and all before it."""
        if handed_out is self._seen:
            return
        self._seen = handed_out
        number = self._number_in(handed_out)
        if number is not None:
            kept = self._kept
            while len(kept) > self._read - number:
                kept.popleft()

    def _number_in(self, cursor: Any) -> int | None:
        """The lowest number of this ledger's entries in `cursor`."""
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
