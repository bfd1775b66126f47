"""Nodes with several upstreams: `merge`, `interleave`, `zip`; `mix` is in `mix_node`."""

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from aioloader.core.cursors import as_count, cursor_parts, cursor_sequence
from aioloader.core.entry import LAST, ONE_LOST, Entry, earliest
from aioloader.core.keys import SourceKey, each_key
from aioloader.engine.node import Kick, Node

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["InputsNode", "InterleaveNode", "MergeNode", "ZipNode", "distinct"]


class InputsNode(Node):
    """What the nodes over several upstreams share: a cursor that holds one cursor per upstream.

    An upstream that fails raises its error at its place, and the others go on without it. It has not ended: after a
    resume it is tried again.
    """

    def __init__(self, upstreams: Sequence[Node]) -> None:
        self._upstreams = list(upstreams)
        self._cursors: list[object] = [None] * len(self._upstreams)
        self._lost: set[int] = set()  # upstreams that have failed

    def resume(self, cursor: Any) -> None:
        self._cursors = list(cursor_parts(cursor, len(self._upstreams)))
        for upstream, its in zip(self._upstreams, self._cursors, strict=True):
            if its is not None:
                upstream.resume(its)

    @property
    def extra_room(self) -> int:
        return min(upstream.extra_room for upstream in self._upstreams)

    @property
    def live(self) -> bool:
        return any(upstream.live for upstream in self._upstreams)

    @property
    def gaps(self) -> bool:
        return bool(self._lost) or any(upstream.gaps for upstream in self._upstreams)

    def start(self, run: "Run", kick: Kick) -> None:
        for upstream in self._upstreams:
            upstream.start(run, kick)

    def close(self) -> None:
        for upstream in self._upstreams:
            upstream.close()

    def _emit(self, entry: Entry, index: int) -> Entry:
        """`entry` of upstream `index` is the next output."""
        self._cursors[index] = entry.cursor
        key = entry.key
        entry.key = each_key(key, partial(SourceKey, index)) if type(key) is list else SourceKey(index, key)
        entry.cursor = tuple(self._cursors)
        if entry.state == LAST:
            entry.state = ONE_LOST
            self._lost.add(index)
            self._upstreams[index].close()
        return entry

    def _end(self) -> None:
        self.ended = True
        self.close()


class MergeNode(InputsNode):
    """Entries of all upstreams, as they come. Cursor: that of each upstream; the realised order is not in it.

    Each is asked for its share of what is wanted: what is read ahead is bounded by that, and not by it times the number
    of upstreams.
    """

    _given = 0

    def poll(self, limit: int) -> list[Entry]:
        taken: list[Entry] = []
        if self.ended:
            return taken
        upstreams = self._upstreams
        share = -(-limit // max(1, sum(not self._is_over(index) for index in range(len(upstreams)))))
        turn = self._given % len(upstreams)  # the first to be asked changes, so that a fast one starves nobody
        for index in (*range(turn, len(upstreams)), *range(turn)):
            if len(taken) == limit:
                break
            if self._is_over(index):
                continue
            for entry in upstreams[index].poll(min(share, limit - len(taken))):
                self._given += 1
                taken.append(self._emit(entry, index))
        self.ended = all(map(self._is_over, range(len(upstreams))))
        return taken

    def _is_over(self, index: int) -> bool:
        return self._upstreams[index].ended or index in self._lost


class InterleaveNode(InputsNode):
    """One entry of each upstream in turn; those that have ended drop out of the turn.

    All are asked together, for their share of what is wanted, so that they work side by side. Cursor: that of each
    upstream, whose turn is next, and who has ended; which is found out in turn, so it does not depend on who is fast.
    """

    def __init__(self, upstreams: Sequence[Node]) -> None:
        super().__init__(upstreams)
        self._pending: list[deque[Entry]] = [deque() for _ in self._upstreams]
        self._turn = 0
        self._over: list[int] = []

    def resume(self, cursor: Any) -> None:
        cursors, turn, over = cursor_parts(cursor, 3)
        super().resume(cursors)
        last = len(self._upstreams) - 1
        self._turn = as_count(turn, last)
        self._over = distinct(over, last)
        self.ended = len(self._over) > last

    def poll(self, limit: int) -> list[Entry]:
        if self.ended:
            return []
        out = {*self._over, *self._lost}
        share = -(-limit // (len(self._upstreams) - len(out)))
        for index, (upstream, pending) in enumerate(zip(self._upstreams, self._pending, strict=True)):
            if len(pending) < share and not upstream.ended and index not in out:
                pending.extend(upstream.poll(share - len(pending)))
        taken: list[Entry] = []
        while len(taken) < limit and not self.ended:
            index = self._turn
            pending = self._pending[index]
            if pending:
                entry = self._emit(pending.popleft(), index)
                if entry.state != ONE_LOST:  # which is no sample: it has its turn again, after a resume at least
                    self._turn = (index + 1) % len(self._upstreams)
                entry.cursor = (entry.cursor, self._turn, tuple(self._over))
                taken.append(entry)
                self._end_if_over()
            elif index in self._over or index in self._lost:
                self._turn = (index + 1) % len(self._upstreams)
            elif self._upstreams[index].ended:
                self._over.append(index)
                self._end_if_over()
            else:
                break
        return taken

    def _end_if_over(self) -> None:
        if len(self._over) + len(self._lost) == len(self._upstreams):
            self._end()


class ZipNode(InputsNode):
    """Tuples of one entry of each upstream; ends with the shortest. Cursor: that of each upstream."""

    def __init__(self, upstreams: Sequence[Node]) -> None:
        super().__init__(upstreams)
        self._pending: list[deque[Entry]] = [deque() for _ in self._upstreams]

    def poll(self, limit: int) -> list[Entry]:
        for upstream, pending in zip(self._upstreams, self._pending, strict=True):
            if len(pending) < limit and not upstream.ended and not self.ended:
                pending.extend(upstream.poll(limit - len(pending)))
        taken: list[Entry] = []
        while not self.ended and len(taken) < limit:
            if (lost := self._error_of_a_part()) is not None:
                taken.append(lost)
                continue
            if not all(self._pending):
                break
            taken.append(self._pair([pending.popleft() for pending in self._pending]))
        if len(taken) < limit and not self.ended:
            taken.extend(self._look_for_the_end())
        return taken

    def _error_of_a_part(self) -> Entry | None:
        """An upstream has several sources, and one of these has failed: nothing is paired up with that."""
        for index, pending in enumerate(self._pending):
            if pending and pending[0].state == ONE_LOST:
                return self._emit(pending.popleft(), index)
        return None

    def _look_for_the_end(self) -> list[Entry]:
        """Ask in order, as Python's `zip` does: whoever comes first fails, or ends it, or is waited for."""
        for upstream, pending in zip(self._upstreams, self._pending, strict=True):
            if pending and pending[0].state == LAST:
                last = Entry.last(pending[0].error or AssertionError(), tuple(self._cursors), pending[0].position)
                self._end()
                return [last]
            if not pending:
                if upstream.ended:
                    self._end()
                break
        return []

    def _pair(self, entries: list[Entry]) -> Entry:
        before = tuple(self._cursors)
        self._cursors = [entry.cursor for entry in entries]
        paired = Entry(
            tuple(entry.value for entry in entries),
            tuple(self._cursors),
            tuple(entry.key for entry in entries),
            entries[0].position,
        )
        if (attempts := max(entry.attempts for entry in entries)) > 1:
            paired.attempts = attempts
        paired.begun = earliest([entry.begun for entry in entries])
        for entry in entries:
            if entry.state == LAST:
                paired.state = LAST
                paired.error = entry.error
                paired.cursor = before  # the others of this pair wait for the one that failed
                self._end()
                break
            if paired.error is None:
                paired.error = entry.error
        return paired


def distinct(over: Any, last: int) -> list[int]:
    """The numbers of sources that have ended, each once.

    Raises:
        ValueError: They are none.
    """
    found = [as_count(index, last) for index in cursor_sequence(over)]
    if len(set(found)) < len(found):
        raise ValueError(f"sources end once, got {over!r}"[:200])
    return found
