"""Several readers side by side: one entry of each in turn."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.core.source import EntryReader

__all__ = ["InTurn", "Lane", "TurnCursor", "turn_cursor", "within_turn"]

TurnCursor = tuple[int, tuple[Any, ...]]
"""Whose turn is next, and the cursors of all lanes; None for one that has given nothing yet."""


class Lane(EntryReader):
    """A reader that may be read side by side with others."""

    async def begin(self) -> None:
        """Open what will be read first, without waiting for it."""

    @abstractmethod
    def take(self) -> Entry | None:
        """The next entry, if it is there already; None: `read` tells what is next."""


def turn_cursor(cursor: Any, lanes: int) -> tuple[int, list[Any]]:
    """Whose turn is next, and the cursors of all `lanes`.

    Raises:
        ValueError: `cursor` is nothing of the kind.
    """
    if cursor is None:
        return 0, [None] * lanes
    turn, cursors = cursor_parts(cursor, 2)
    return as_count(turn, lanes - 1), cursor_parts(cursors, lanes)


def within_turn(cursor: TurnCursor, lane: int, place: Any) -> TurnCursor:
    """`cursor` as it was before, when `lane` had come to `place` and still had its turn."""
    _, cursors = cursor
    return lane, (*cursors[:lane], place, *cursors[lane + 1 :])


class InTurn(EntryReader):
    """One entry of each lane in turn; those that have ended drop out.

    Cursor: see `TurnCursor`.

    Args:
        lanes: Closed with the reader.
        turn: Whose turn is next.
        cursors: Where the lanes begin.
        stays: Whether the lane that has given an entry keeps its turn; None: it never does.
    """

    def __init__(
        self, lanes: Sequence[Lane], turn: int, cursors: Sequence[Any], stays: Callable[[Entry], bool] | None = None
    ) -> None:
        self._all = lanes
        self._lanes: list[Lane | None] = list(lanes)
        self._cursors = [None if one is None else tuple(one) for one in cursors]
        self._turn = turn
        self._open_lanes = len(lanes)
        self._stays = stays
        self._begun = False

    async def read(self, limit: int) -> list[Entry]:
        if not self._begun:
            self._begun = True
            for one in self._all:
                await one.begin()
        entries: list[Entry] = []
        lanes, cursors = self._lanes, self._cursors
        while self._open_lanes and len(entries) < limit:
            turn = self._turn
            lane = lanes[turn]
            entry = None if lane is None else lane.take()
            if lane is not None and entry is None:
                if entries:
                    break  # give what is there instead of waiting
                taken = await lane.read(1)
                if taken:
                    entry = taken[0]
                else:
                    lanes[turn] = None
                    self._open_lanes -= 1
            if entry is None or self._stays is None or not self._stays(entry):
                self._turn = (turn + 1) % len(lanes)
            if entry is not None:
                cursors[turn] = entry.cursor
                entry.cursor = (self._turn, tuple(cursors))
                entries.append(entry)
        return entries

    async def aclose(self) -> None:
        for lane in self._all:
            await lane.aclose()
