"""Samples that are begun again: two windows around a predicate, which sends what it refuses back to the first map.

    AgainWindow: map, filter ──taken──▶ CheckWindow: the predicate ──kept──▶ batch
         ▲                                        │
         └──────────────begun again───────────────┘

A sample keeps its number and its slot. While it is looked at, its slot in the first window stays taken (`lend`), so
nothing else begins in it, and nothing grows however often samples are sent back.

Ordered: it keeps its place in the second window, too, where those after it wait; when it has been made anew it goes
straight back there. In completion order it leaves the second window, and comes again like any other. Either way it has
not been delivered: only the second window gives cursors, so a state counts it as still to come.
"""

from typing import Any

from aioloader.core.entry import DONE, DROPPED, NO_TRIES, NOT_READ, UNDER_WAY, Entry
from aioloader.engine.window import Window

__all__ = ["AgainWindow", "CheckWindow"]


class AgainWindow(Window):
    """A window whose entries may come back, to be begun again with what came in."""

    one_by_one = True
    check: "CheckWindow"

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self._away: set[Entry] = set()  # ordered: begun again, and their places are in the other window

    @property
    def empty(self) -> bool:
        return not (self._occupied or self._lent)

    def alive(self, size: int) -> int:
        lent, self._lent = self._lent, 0  # the other window counts these
        try:
            return super().alive(size) - len(self._away) * size
        finally:
            self._lent = lent

    def accept(self, run: list[Entry]) -> None:
        for entry in run:
            entry.origin = entry.value
        super().accept(run)

    def _leave(self, limit: int) -> list[Entry]:
        taken = super()._leave(limit)
        self._lent += sum(entry.error is None for entry in taken)  # at once: it must not seem to be empty
        return taken

    def begin_again(self, entry: Entry) -> None:
        """Send an entry that was lent through all steps once more, after those that wait."""
        entry.value = entry.origin
        entry.state = UNDER_WAY
        entry.attempts += 1
        entry.begun = NOT_READ
        entry.tries = NO_TRIES
        self._lent -= 1
        self._occupied += 1
        if self._closed:
            return
        self.under_way += 1
        if self.ordered:
            self._away.add(entry)
        elif self._completion is not None:
            self._completion.begin((entry,))
        self._steps[0].take_in([entry])

    def finished(self, entry: Entry) -> None:
        if entry not in self._away:
            super().finished(entry)
            return
        self._away.discard(entry)
        self.under_way -= 1
        self._occupied -= 1
        self._lent += 1
        self.check.came_again(entry)
        if self.under_way == self._aside:
            self.wake()


class CheckWindow(Window):
    """Lets pass what its predicate keeps, and sends the rest back; it begins only what it is asked for."""

    one_by_one = True
    upstream: AgainWindow

    @property
    def _all_done(self) -> bool:
        return super()._all_done and not self.upstream._away

    def finished(self, entry: Entry) -> None:
        if entry.state != DROPPED:
            self.upstream.give_back(1)
            super().finished(entry)
            return
        self.under_way -= 1
        if not self.ordered:
            self._occupied -= 1  # it comes again
            self.wake()
        self.upstream.begin_again(entry)

    def came_again(self, entry: Entry) -> None:
        """An entry that has its place here has been made anew."""
        if entry.error is None and entry.state != DROPPED:
            self.under_way += 1
            self._steps[0].take_in([entry])
            return
        self.upstream.give_back(1)
        if entry.state == DROPPED:
            self._left_out()
        else:
            entry.state = DONE
            entry.since = self.now
        if self._slots[0] is entry:
            self._kick()
