"""How entries leave a window as they are finished: by what numbers, how far ahead of slower ones, and in which order.

The order is that in which they are finished, unless one that was recorded is replayed.
"""

from collections import deque
from collections.abc import Iterable

from aioloader.core.cursors import CompletionCursor
from aioloader.core.entry import DROPPED, Entry
from aioloader.engine.order_log import Recorded, Replayed
from aioloader.engine.overtaking import Overtaking
from aioloader.errors import StateError

__all__ = ["CompletionOrder"]


class CompletionOrder:
    """The order of entries that have no fixed one, in one window.

    Args:
        numbering: Numbers the entries of this window and of others before or after it, which have one order together.
        log: Where the order in which they leave is recorded, or in which they are to leave; None: nowhere.
        overtaking: How far they may overtake each other; None: as far as they do.
        numbers: Entries get their numbers here, and not in a window before this one.
        names: Entries get their cursors here, and not in a window after this one.

    Attributes:
        numbering: As given.
        replays: They leave in an order that was recorded.
    """

    def __init__(
        self,
        numbering: CompletionCursor,
        log: Recorded | Replayed | None = None,
        overtaking: Overtaking | None = None,
        *,
        numbers: bool = True,
        names: bool = True,
    ) -> None:
        self.numbering = numbering
        self._numbers = numbers
        self._names = names
        self._overtaking = overtaking
        self._log = log
        self._record = log if isinstance(log, Recorded) else None
        self._replay = log if isinstance(log, Replayed) else None
        self.replays = self._replay is not None
        self._waiting: dict[int, Entry] = {}  # replayed: finished, and it is not their turn

    def resume(self, cursor: object) -> object:
        """Go on after the entries in `cursor`; returns the cursor for the nodes before."""
        if not self._names:
            return cursor
        before = self.numbering.resume(cursor)
        if self._log is not None:
            self._log.check(self.numbering.count)
        return before

    def start(self) -> None:
        """Entries come in from now on."""
        if self._log is not None:
            self._log.begin(self.numbering.count)
        if self._overtaking is not None:
            self._overtaking.resume(*self.numbering.delivered)

    # -- as they come in ---------------------------------------------------------------------------------------------

    def comes(self, run: list[Entry]) -> list[Entry]:
        """Number the entries of `run`; returns those that were not delivered before a resume."""
        return self.numbering.comes(run) if self._numbers else run

    def begin(self, run: Iterable[Entry]) -> None:
        """They are under way."""
        if self._overtaking is not None:
            for entry in run:
                self._overtaking.begins(entry)

    @property
    def to_come(self) -> int:
        """How many entries must come in before one can leave: all up to the one whose turn it is wait for it.

        They are no more than were under way when the order was recorded.
        """
        following = None if self._replay is None else self._replay.following
        return 0 if following is None else max(0, following - self.numbering.came)

    # -- as they leave -----------------------------------------------------------------------------------------------

    def finished(self, entry: Entry, leaving: deque[Entry]) -> bool:
        """Put `entry` with those that may leave, or let it wait for its turn; True: others are waited for."""
        if self._replay is None:
            if self._overtaking is None:
                leaving.append(entry)
            else:
                leaving.extend(self._overtaking.finished(entry))
            return False
        waiting, replay = self._waiting, self._replay
        waiting[entry.cursor[0]] = entry
        while (following := replay.following) is not None and following in waiting:
            leaving.append(waiting.pop(following))
            replay.advance()
        return bool(waiting)

    def leave(self, entries: list[Entry]) -> None:
        """Give entries that leave their cursors, if none of them can fall behind any more."""
        for entry in entries:
            if self._names or entry.state == DROPPED:
                number = self.numbering.leaves(entry)
                if self._record is not None:
                    self._record.add(number)

    def have_left(self) -> None:
        """Entries are handed on: a state that is taken from now on must not be ahead of the log, whatever happens."""
        if self._record is not None:
            self._record.flush()

    def fail(self, last: Entry) -> None:
        """A source has failed, after all entries that came before."""
        if self._names:
            last.cursor = self.numbering.cursor
            self.numbering.forgets = True

    def no_more(self, *, input_ended: bool, failed: bool) -> tuple[int, StateError | None] | None:
        """Whether nothing can leave any more, since log and source do not fit, while nothing is under way.

        Args:
            input_ended: Nothing comes in any more.
            failed: Since the source has failed.

        Returns:
            How many entries that wait are given up, and why, unless that was said; None: all is well.
        """
        replay = self._replay
        if replay is None:
            return None
        lost = bool(self._waiting) and (replay.following is None or input_ended)
        if not lost and not (input_ended and not failed and replay.following is not None):
            return None
        count = len(self._waiting)
        self._waiting.clear()
        error = None
        if not failed:
            error = replay.no_more()
            replay.following = None  # told
        return count, error

    def close(self) -> None:
        """Nothing leaves any more. Idempotent."""
        if self._log is not None:
            self._log.close()
