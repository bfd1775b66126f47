"""How far results may overtake a slower sample, where they are given as they are finished."""

from bisect import insort

from aioloader.core.entry import DROPPED, Entry

__all__ = ["Overtaking"]


class Overtaking:
    """Holds results back that would overtake an unfinished sample which `most` results have overtaken already.

    Entries are known by their numbers in the order of the input. Of all unfinished ones, the first has been overtaken
    most often: whatever has overtaken another one has overtaken it, too. So one count is enough, and it is in the bits
    of `_released`: bit `i` says that the entry `i` places after `_base` has been let go.

    A sample that is begun again is unfinished once more. What was let go before that counts then as if it had overtaken
    it: the bound holds, for its newest beginning too.

    Args:
        most: Results that may overtake one sample.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._unfinished: list[int] = []  # numbers, sorted; they come in order, but for those that are begun again
        self._held: list[Entry] = []  # finished, in the order in which they were
        self._base = 0
        self._released = 0

    def resume(self, front: int, beyond: int) -> None:
        """All entries up to number `front` have left, and bit `i` of `beyond` says that of number `front + 1 + i`."""
        self._base, self._released = front, beyond << 1

    def begins(self, entry: Entry) -> None:
        """`entry` is under way."""
        number = entry.cursor[0]
        if number < self._base:  # begun again: those after it are to be counted, up to where it was forgotten, too
            self._released <<= self._base - number
            self._base = number
        insort(self._unfinished, number)

    def finished(self, entry: Entry) -> list[Entry]:
        """The entries that may leave now that `entry` is finished, in order."""
        self._unfinished.remove(entry.cursor[0])
        if entry.state == DROPPED:  # it overtakes nobody
            return [entry, *self._let_go()]
        self._held.append(entry)
        return self._let_go()

    def _let_go(self) -> list[Entry]:
        held = self._held
        if not held:
            return []
        if not self._unfinished:
            self._held = []
            gone = sorted(held, key=_number) if len(held) > 1 else held
            self._note(gone)
            return gone
        first = self._unfinished[0]
        free = [entry for entry in held if entry.cursor[0] < first]
        if free:
            free.sort(key=_number)
            held[:] = [entry for entry in held if entry.cursor[0] > first]
            self._note(free)
        self._forget_before(first)
        left = self._most - self._released.bit_count()
        if left > 0 and held:
            overtaking = held[:left]
            del held[:left]
            self._note(overtaking)
            free += overtaking
        return free

    def _note(self, entries: list[Entry]) -> None:
        for entry in entries:
            if (bit := entry.cursor[0] - self._base) >= 0:
                self._released |= 1 << bit

    def _forget_before(self, first: int) -> None:
        """Nothing before `first` is unfinished: who has left there has overtaken nobody that is."""
        if first > self._base:
            self._released >>= first - self._base
            self._base = first


def _number(entry: Entry) -> int:
    number: int = entry.cursor[0]
    return number
