"""A fold that gives one portion after the other, and takes in the next one while it does."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from aioloader.core.entry import Entry
from aioloader.engine.node import Fold, FoldNode, Kick, Node

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["RefillNode", "RefilledFold"]


class RefilledFold(Fold, Protocol):
    """A fold that needs many entries before it can give any, and then has many to give.

    `feed` gives nothing, `take` does; `flush` gives all that is left. `wants` is 0 while it holds as much as it may.
    """

    def take(self, limit: int) -> Iterable[Entry]:
        """Up to `limit` of what can be given."""


class RefillNode(FoldNode):
    """Runs such a fold: for each entry that is taken from it, another one comes in, if there is one.

    Else upstream would stand still while a portion is given, and the consumer while the next one is gathered. Nobody
    may poll meanwhile (the consumer trains, and the window of batches is full), so an upstream that has something new
    is asked for it here, in a turn of the loop of its own: it kicks in the middle of its own work.

    Args:
        upstream: Gives the entries.
        fold: The rule.
        unordered_input: See `FoldNode`.
    """

    _fold: RefilledFold

    def __init__(self, upstream: Node, fold: RefilledFold, *, unordered_input: bool) -> None:
        super().__init__(upstream, fold, unordered_input=unordered_input, recounts=True)
        self._scheduled = False
        self._closed = False

    def start(self, run: "Run", kick: Kick) -> None:
        self._run, self._kick = run, kick
        super().start(run, self._wake)

    def poll(self, limit: int) -> list[Entry]:
        self._refill()
        if not self._ready:
            self._give(self._fold.take(limit))
        return self._hand_over(limit)

    def close(self) -> None:
        self._closed = True
        super().close()

    def _refill(self) -> None:
        while not self._flushed and (count := self._fold.wants(1)) and self._take_in(count):
            pass

    def _wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._run.soon(self._arrived)

    def _arrived(self) -> None:
        self._scheduled = False
        if not self._closed and not self._run.stopping:
            self._refill()
            self._kick()
