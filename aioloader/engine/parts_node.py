"""Parts of one source, one entry of each in turn."""

from typing import Any

from aioloader.core.entry import LAST, ONE_LOST, Entry
from aioloader.engine.combine import InterleaveNode

__all__ = ["PartsNode"]


class PartsNode(InterleaveNode):
    """As `interleave`, with the same cursors, but of parts of one source: their samples keep the keys that they have.

    A part is asked when its turn has come, and not before: it works ahead by itself, up to a bound of its own.
    """

    def alive(self, size: int) -> int:
        return sum(part.alive(size) for part in self._upstreams)

    def poll(self, limit: int) -> list[Entry]:
        taken: list[Entry] = []
        while len(taken) < limit and not self.ended:
            index = self._turn
            part = self._upstreams[index]
            if index in self._over or index in self._lost:
                self._turn = (index + 1) % len(self._upstreams)
            elif run := part.poll(1):
                taken.append(self._given(run[0], index))
                self._end_if_over()
            elif part.ended:
                self._over.append(index)
                self._end_if_over()
            else:
                break
        return taken

    def _given(self, entry: Entry, index: int) -> Entry:
        """`entry` of part `index` is the next output."""
        self._cursors[index] = entry.cursor
        if entry.state == LAST:  # the others go on; it has its turn again, after a resume at least
            entry.state = ONE_LOST
            self._lost.add(index)
            self._upstreams[index].close()
        elif entry.state != ONE_LOST:
            self._turn = (index + 1) % len(self._upstreams)
        cursor: Any = (tuple(self._cursors), self._turn, tuple(self._over))
        entry.cursor = cursor
        return entry
