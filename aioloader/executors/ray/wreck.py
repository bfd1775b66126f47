"""What becomes of the calls that an actor had when it was lost. Pure: it says what is told, and to whom."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from aioloader.executors.processes.worker_pool import Died, Outcome
from aioloader.executors.ray.seats import Task

__all__ = ["SETTLE_SECONDS", "Wreck"]

SETTLE_SECONDS: Final = 1.0  # so long it is waited for what Ray says of the other calls of a lost actor


class Wreck:
    """The calls of a lost actor, until it is known what has become of each.

    Ray fails all calls that it had been sent, all alike, and in any order; and of what had been answered before, the
    large results are still on their way. An actor for sync functions works on one call after the other, so the first
    one that it had not answered is to blame, and those after it had not begun. So nothing is decided before those in
    front are known. But an answer may have died with the actor, if it died right after it: where others came after
    it, that is not sure. One that awaits may have been at all of them.

    Args:
        calls: By their refs, in the order of sending.
        died: What those hear that are to blame.
        one_by_one: It worked on one after the other.
    """

    def __init__(self, calls: Iterable[tuple[Any, Task]], died: Died, *, one_by_one: bool) -> None:
        self.calls = OrderedDict(calls)
        self._died = replace(died, sure=len(self.calls) == 1)
        self._one_by_one = one_by_one
        self._known: dict[Any, Outcome | None] = {}  # None: it was made, and its result is lost

    def answered(self, ref: Any, outcome: Outcome | None) -> None:
        """A call had been answered. None: its result is lost, so that nobody is to blame for that."""
        self._known[ref] = outcome

    def failed(self, ref: Any) -> None:
        """A call was lost with the actor."""
        self._known[ref] = self._died

    def give_up(self) -> None:
        """Wait no longer."""
        for ref in self.calls:
            self._known.setdefault(ref, self._died)

    def settle(self) -> tuple[list[tuple[Task, Outcome]], list[Task]]:
        """What is told now, and which tasks are made again. Neither are in `calls` any more."""
        told: list[tuple[Task, Outcome]] = []
        again: list[Task] = []
        for ref, task in list(self.calls.items()):
            if ref not in self._known:
                if self._one_by_one:
                    break
                continue
            outcome = self._known[ref]
            del self.calls[ref]
            if outcome is None:
                again.append(task)
                continue
            if self._one_by_one and isinstance(outcome, Died):
                told.append((task, replace(outcome, sure=not self.calls)))
                again += self.calls.values()
                self.calls.clear()
                break
            told.append((task, outcome))
        return told, again
