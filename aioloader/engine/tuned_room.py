"""The room of a window while `autotune` is at work: more than without it, but within a budget of bytes."""

from collections.abc import Iterable, Sequence
from typing import Final
from weakref import WeakSet

from aioloader.core.entry import Entry
from aioloader.core.sizes import MeanBytes
from aioloader.engine.room import Growth, Room

__all__ = ["BytesBudget", "TunedRoom"]

UNKNOWN: Final = 2  # entries that may be there before any has been weighed


class BytesBudget:
    """Bytes of finished samples and batches, shared equally by the rooms that there are.

    Equal shares and not first come, first served: a window early in the pipeline would take it all.

    Args:
        nbytes: All in all.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._rooms: WeakSet[TunedRoom] = WeakSet()

    def join(self, room: "TunedRoom") -> None:
        """One more to share with."""
        self._rooms.add(room)

    def leave(self, room: "TunedRoom") -> None:
        """One fewer."""
        self._rooms.discard(room)

    @property
    def share(self) -> float:
        """Bytes for each room."""
        return self.nbytes / max(1, len(self._rooms))


class TunedRoom(Room):
    """`factor` times what `inner` has, or `floor` if that is more, as far as a budget allows: one place in any case.

    Args:
        inner: See below.
        budget: Which it shares with others; None: there is none.
        mean: What an entry weighs, as far as that is known from earlier epochs.

    Attributes:
        inner: The room without tuning.
        floor: See above.
        factor: See above.
        held_back: The budget has been the limit.
    """

    def __init__(self, inner: Room, budget: BytesBudget | None, mean: MeanBytes) -> None:
        super().__init__(0)
        self.inner = inner
        self._budget = budget
        self.mean = mean
        self.floor = 0
        self.factor = 1
        self.held_back = False
        self.weighs = inner.weighs or budget is not None
        if inner.growth is not None:
            self.growth = inner.growth if budget is None else _GrowthWithin(inner.growth, self)
        if budget is not None:
            budget.join(self)

    @property
    def width(self) -> int:  # type: ignore[override]  # a plain attribute where it does not change
        return self.inner.width

    @property
    def widest(self) -> int:  # type: ignore[override]  # a plain attribute where it does not change
        return self.inner.widest

    def now(self, asked: int) -> int:
        return self.within(max(self.inner.now(asked), self.floor) * self.factor)

    @property
    def untuned(self) -> int:
        """Places without tuning."""
        return self.inner.now(1 << 30)

    def within(self, places: int) -> int:
        """As many of `places` as the budget allows."""
        if self._budget is None:
            return places
        allowed = self.mean.places(self._budget.share)
        if allowed is None:
            return min(places, UNKNOWN)
        if allowed < places:
            self.held_back = True
        return max(1, min(places, allowed))

    def gave(self, entries: Sequence[Entry]) -> None:
        self.inner.gave(entries)
        if self._budget is not None:
            for entry in entries:
                if entry.error is None:
                    self.mean.saw(entry.value)

    @property
    def elastic(self) -> bool:
        return self.inner.elastic

    @property
    def may_grow(self) -> bool:
        return self.inner.may_grow

    def look(self) -> None:
        self.inner.look()

    def refresh(self) -> None:
        self.inner.refresh()

    def close(self) -> None:
        """It counts no more."""
        if self._budget is not None:
            self._budget.leave(self)


class _GrowthWithin(Growth):
    """The growth of a room, within its budget."""

    def __init__(self, inner: Growth, room: TunedRoom) -> None:
        super().__init__()
        self._inner = inner
        self._room = room

    def came(self, count: int, held: int, now: float) -> None:
        self._inner.came(count, held, now)

    def wait(self, held: int, seconds_each: float) -> float:
        return self._inner.wait(held, seconds_each)

    def most(self, concurrency: int, entries: Iterable[Entry]) -> int:
        return self._room.within(self._inner.most(concurrency, entries))
