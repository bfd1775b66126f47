"""Chunks whose actor was lost, or whose result: who is to blame, and what is made again."""

from collections.abc import Callable, Hashable
from typing import Any, Final, Protocol

from aioloader.executors.processes.worker_pool import Died, Outcome
from aioloader.executors.ray.actors import kill_actor, result_is_lost, words_of
from aioloader.executors.ray.answers import Answers
from aioloader.executors.ray.same_host import Inbox
from aioloader.executors.ray.seats import Seat, Task
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.wreck import SETTLE_SECONDS, Wreck

__all__ = ["Losses", "TaskPool"]

MOST_LOSSES: Final = 5  # of a result that was made, before it counts as if its actor had died


class TaskPool(Protocol):
    """The pool. All of it is called in the thread of `RayThread`."""

    def safely(self, fn: Callable[..., None], *args: Any) -> None:
        """Call `fn`; what it raises fails all tasks."""

    def has_gone(self) -> bool:
        """Whether the connection to Ray has ended; then all tasks have failed."""

    def requeue(self, tasks: list[Task]) -> None:
        """They have not begun, or are made again elsewhere."""

    def fill(self) -> None:
        """Ask for the actors that are missing."""

    def go_on(self) -> None:
        """Something has been done: tell those that wait for that, and send more."""


class Losses:
    """What lost actors had, until it is known what becomes of it. In the thread of `RayThread`.

    Args:
        thread: It.
        answers: Unpacks what had been answered.
        pool: Of the actors.
    """

    def __init__(self, thread: RayThread, answers: Answers, pool: TaskPool) -> None:
        self._thread = thread
        self._answers = answers
        self._pool = pool
        self._wrecks: dict[Any, Wreck] = {}  # by the refs of calls of lost actors of which more is to be heard

    @property
    def open(self) -> bool:
        """Whether more is to be heard of some calls."""
        return bool(self._wrecks)

    def call(self, seat: Seat, handle: Any, ref: Any, error: BaseException) -> None:
        """`ref` failed since its actor was lost, or its result."""
        name, pid = seat.name, None if seat.place is None else seat.place.pid
        died = Died(seat.number, pid, f"{name} died: {words_of(error)}", 0)
        if result_is_lost(error):
            task = seat.take(ref)
            assert task is not None
            self.result(task, died)
        elif not self._pool.has_gone():
            self.actor(seat, handle, died, ref)

    def actor(self, seat: Seat, handle: Any, died: Died, ref: Any) -> None:
        """An actor is given up; `ref` is the first of its calls that is known to be lost with it."""
        tasks = seat.vacate()
        seat.restarts += 1
        kill_actor(handle)
        wreck = Wreck(tasks, died, one_by_one=seat.side_by_side == 1)
        self._wrecks.update(dict.fromkeys(wreck.calls, wreck))
        wreck.failed(ref)
        self._settle(wreck)
        self._pool.fill()
        if wreck.calls:
            self._thread.later(SETTLE_SECONDS, self._pool.safely, self._give_up, wreck)

    def result(self, task: Task, outcome: Outcome) -> None:
        """A chunk was made, and is made again; too often, and this is what becomes of it."""
        task.losses += 1
        if task.losses <= MOST_LOSSES:
            self._pool.requeue([task])
        elif not task.forgotten:
            task.done(outcome)

    def hear(self, seat: Seat, inbox: Inbox | None, ref: Any, future: Any) -> bool:
        """A call has been answered, or Ray has in its actor's place; whether it is one of a lost actor."""
        wreck = self._wrecks.get(ref)
        if wreck is None:
            return False
        error = future.exception()
        if error is None:
            wreck.answered(ref, self._answers.of_call(seat, inbox, future.result()))
        elif result_is_lost(error):
            wreck.answered(ref, None)
        else:
            wreck.failed(ref)
        self._settle(wreck)
        return True

    def forget(self, owner: Hashable) -> None:
        """Nobody wants its outcomes any more."""
        for ref, wreck in self._wrecks.items():
            wreck.calls[ref].forgotten |= wreck.calls[ref].owner == owner

    def take_all(self) -> list[Task]:
        """What lost actors had, and of which nothing is known; nothing more is to be heard of it."""
        found = [wreck.calls[ref] for ref, wreck in self._wrecks.items()]
        self._wrecks = {}
        return found

    def _give_up(self, wreck: Wreck) -> None:
        wreck.give_up()
        self._settle(wreck)
        self._pool.go_on()

    def _settle(self, wreck: Wreck) -> None:
        told, again = wreck.settle()
        self._wrecks = {ref: other for ref, other in self._wrecks.items() if ref in other.calls}
        self._pool.requeue(again)
        for task, outcome in told:
            if not task.forgotten:
                task.done(outcome)
