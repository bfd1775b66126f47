"""The places of actors in a pool, and what is in them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from aioloader.executors.processes.worker_pool import Outcome
from aioloader.executors.ray.actors import Place
from aioloader.executors.ray.line import Line
from aioloader.executors.ray.program import Parcel
from aioloader.executors.ray.same_host import Inbox
from aioloader.insight.actors import ActorStats

__all__ = ["Seat", "Task"]


@dataclass(eq=False)
class Task:
    """A chunk for an actor.

    Attributes:
        owner: Identifies it for `forget`.
        parcel: It.
        done: Called once with its outcome, unless it is forgotten.
        stream: What is sent: a pickle,
        buffers: and the memory of its tensors and arrays.
        nbytes: The size of both.
        since: When the actor began it, as far as that is known.
        forgotten: Nobody wants its outcome any more.
        losses: How often its result was lost after it had been made.
    """

    owner: Hashable
    parcel: Parcel
    done: Callable[[Outcome], None]
    stream: bytes
    buffers: list[memoryview]
    since: float = 0.0
    forgotten: bool = False
    losses: int = 0

    def __post_init__(self) -> None:
        self.nbytes = len(self.stream) + sum(buffer.nbytes for buffer in self.buffers)

    @property
    def size(self) -> int:
        """How many samples it has."""
        return len(self.parcel.payload[3])


class Seat:
    """The place of one actor. If the actor is lost, another one gets its place and its number.

    Attributes:
        side_by_side: How many chunks it works on at once.
        handle: Of the actor; None: none has been asked for.
        place: Where it runs; None: it does not run yet.
        inbox: For what it sends in segments; None: it is on another host, or does not run yet.
        line: To it, over which it gets chunks; None: there is none, and chunks are calls of Ray.
        load: What it has been sent and has not answered, in the order of sending.
        restarts: How many actors were lost in this place.
        start_failures: How many in a row died before they ran.
    """

    def __init__(self, number: int, side_by_side: int) -> None:
        self.number = number
        self.side_by_side = side_by_side
        self.handle: Any = None
        self.place: Place | None = None
        self.inbox: Inbox | None = None
        self.line: Line | None = None
        self.load: OrderedDict[Any, Task] = OrderedDict()
        self.restarts = 0
        self.start_failures = 0
        self._began = 0.0
        self._ran_seconds = 0.0
        self._samples = 0
        self._busy_seconds = 0.0
        self._received_bytes = 0

    @property
    def name(self) -> str:
        """Of the actor, for texts."""
        return f"Ray worker {self.number}" if self.place is None else f"Ray worker {self.number} ({self.place})"

    def runs(self, place: Place, inbox: Inbox | None) -> None:
        """It has begun to run."""
        self.place = place
        self.inbox = inbox
        self.start_failures = 0
        self._began = perf_counter()

    def hang_up(self) -> None:
        """It gets nothing more over its line."""
        line, self.line = self.line, None
        if line is not None:
            line.close()

    def vacate(self) -> list[tuple[Any, Task]]:
        """Its actor is lost or not wanted any more; returns what it had."""
        if self.place is not None:
            self._ran_seconds += perf_counter() - self._began
        self.hang_up()
        self.handle = self.place = self.inbox = None
        tasks = list(self.load.items())
        self.load = OrderedDict()
        return tasks

    def has_room(self, task: Task) -> bool:
        """Whether `task` may be sent to it now."""
        if self.place is None or (self.line is not None and not self.line.is_up):  # that one has died
            return False
        if not self.load:
            return True
        if task.parcel.alone or any(other.parcel.alone for other in self.load.values()):
            return False
        return len(self.load) < self.side_by_side * (2 if task.parcel.quick else 1)

    def take(self, ref: Any) -> Task | None:
        """It has answered."""
        task = self.load.pop(ref, None)
        if task is not None and self.load and self.side_by_side == 1:  # the next one begins
            first = next(iter(self.load.values()))
            first.since = max(first.since, perf_counter())
        return task

    def count(self, samples: int, busy_seconds: float, nbytes: int) -> None:
        """It has made so much."""
        self._samples += samples
        self._busy_seconds += busy_seconds
        self._received_bytes += nbytes

    def stats(self) -> ActorStats:
        """What is known of it; asked in any thread."""
        place = self.place
        running = 0.0 if place is None else perf_counter() - self._began
        return ActorStats(
            name=f"Ray worker {self.number}",
            node="" if place is None else place.node,
            pid=None if place is None else place.pid,
            running=place is not None,
            samples=self._samples,
            busy_seconds=self._busy_seconds,
            running_seconds=self._ran_seconds + running,
            restarts=self.restarts,
            received_bytes=self._received_bytes,
        )
