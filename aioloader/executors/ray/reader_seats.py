"""The actors that a loader reads from: each has a seat, and one that is lost is replaced."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Generic, TypeVar

from aioloader.errors import WorkerDiedError
from aioloader.executors.ray.actors import (
    GRACE_SECONDS,
    MOST_START_FAILURES,
    Place,
    Shortage,
    begin_actor,
    is_loss,
    is_unreachable,
    kill_actor,
    words_of,
)
from aioloader.executors.ray.reader import ReaderActor
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.workers import RayWorkers
from aioloader.insight.actors import ActorStats

__all__ = ["NAMESPACE", "ActorSeat", "Seats", "seat_name"]

AGAIN_SECONDS: Final = 0.5  # after which an actor is asked for again that was not to be had
CALLS: Final = 10_000  # of an actor at a time, which is no limit
NAMESPACE: Final = "aioloader"
"""Of Ray, in which actors of a pool have their names."""

S = TypeVar("S")


def seat_name(pool: str, number: int) -> str:
    """The name of an actor in a pool."""
    return f"{pool}: reader {number}"


@dataclass(eq=False)
class ActorSeat(Generic[S]):
    """The place of an actor.

    Attributes:
        number: From 0.
        home: The seats that it is one of.
        actor: Its handle; None: it has been lost, or not been asked for.
        place: Where it runs; None: it does not.
        streams: That are open there.
        used: Some have been.
        left: Wires over which nobody listens any more, and whose actor could not be told.
        failures: Actors in a row that died before they ran.
        restarts: Actors that were lost.
        samples: Entries that came from it.
        received_bytes: Their size.
        cpu_seconds: What the actor has computed.
        cpu_before: And those before it.
        since: When the actor began to run.
    """

    number: int
    home: "Seats[S]"
    actor: Any = None
    place: Place | None = None
    streams: set[S] = field(default_factory=set)
    used: bool = False
    left: list[str] = field(default_factory=list)
    failures: int = 0
    restarts: int = 0
    samples: int = 0
    received_bytes: int = 0
    cpu_seconds: float = 0.0
    cpu_before: float = 0.0
    since: float = 0.0

    def __str__(self) -> str:
        return f"Ray reader {self.number}" + ("" if self.place is None else f" ({self.place})")

    def stats(self, now: float) -> ActorStats:
        """What is known of it; from any thread."""
        place = self.place
        return ActorStats(
            f"Ray reader {self.number}",
            "" if place is None else place.node,
            None if place is None else place.pid,
            place is not None,
            self.samples,
            busy_seconds=self.cpu_before + self.cpu_seconds,
            running_seconds=0.0 if place is None else now - self.since,
            restarts=self.restarts,
            received_bytes=self.received_bytes,
        )


class Seats(Generic[S]):
    """So many seats. In the thread of `RayThread`.

    Args:
        thread: It.
        workers: What each actor needs.
        pool: The name of a pool whose actors others use, too; None: they are the loader's own.
        guarded: Calls a function, and sees to what it raises.
        runs: Called when an actor runs.
        late: Called when one of them does not run though it is time, before anything is said of it; None: nothing is.
        lost: Called with a seat, and in words how its actor was lost, for those that had streams there.
    """

    def __init__(
        self,
        thread: RayThread,
        workers: RayWorkers,
        pool: str | None,
        *,
        guarded: Callable[..., None],
        runs: Callable[[], None],
        late: Callable[[], None] | None,
        lost: Callable[[ActorSeat[S], str], None],
    ) -> None:
        self._thread = thread
        self._workers = workers
        self._pool = pool
        self._guarded = guarded
        self._runs, self._is_late, self._lost = runs, late, lost
        self._seats: list[ActorSeat[S]] = []
        self._warned = False
        self._ended = False
        self.wanted = 0

    def running(self) -> list[ActorSeat[S]]:
        """Seats that may be given work. Only those whose actor runs: one that waits for room may wait for ever."""
        return [seat for seat in self._seats[: self.wanted] if seat.place is not None]

    @property
    def shared(self) -> bool:
        """Whether others use the actors, too."""
        return self._pool is not None

    @property
    def starting(self) -> bool:
        """Whether an actor is about to run, if there is room for it."""
        return any(seat.place is None for seat in self._seats[: self.wanted])

    def stats(self) -> tuple[ActorStats, ...]:
        """What is known of the actors; from any thread."""
        now = monotonic()
        return tuple(seat.stats(now) for seat in self._seats[: self.wanted])

    def scale(self, actors: int) -> list[ActorSeat[S]]:
        """Have so many from now on; returns those that are not wanted any more, whose actors are still there."""
        self.wanted = actors
        while len(self._seats) < actors:
            self._seats.append(ActorSeat(len(self._seats), self))
        for seat in self._seats[:actors]:
            self._start(seat)
        return self._seats[actors:]

    def renew(self, seat: ActorSeat[S]) -> None:
        """Have an actor in this seat in which nothing has been; ours only."""
        self.dismiss(seat)
        self._start(seat)

    def dismiss(self, seat: ActorSeat[S]) -> None:
        """End the actor of a seat, if it is ours."""
        actor, seat.actor, seat.place = seat.actor, None, None
        if actor is not None and self._pool is None:
            kill_actor(actor)

    def abandon(self) -> None:
        """Their connection has ended, and all actors with it.

        Nothing is asked of Ray any more, or it would join any cluster that it finds.
        """
        self._ended = True
        for seat in self._seats:
            seat.actor = seat.place = None
            seat.streams.clear()

    def end(self, program: str) -> None:
        """End all actors that are ours, in bounded time; what those of a pool do for us has been ended before.

        Args:
            program: Its name; actors of a pool need not keep it.
        """
        self._ended = True
        actors = [seat.actor for seat in self._seats if seat.actor is not None]
        running = [seat.actor for seat in self._seats if seat.place is not None]
        for seat in self._seats:
            seat.actor = seat.place = None
        if self._pool is None:
            _end_actors(actors, running)
        else:
            for actor in running:
                actor.forget.remote(program)

    # -- their lives -------------------------------------------------------------------------------------------------

    def _start(self, seat: ActorSeat[S]) -> None:
        if self._ended or seat.actor is not None or seat.number >= self.wanted:
            return
        options: dict[str, Any] = {"max_concurrency": CALLS}
        if self._pool is not None:
            name = seat_name(self._pool, seat.number)
            options |= {"name": name, "namespace": NAMESPACE, "get_if_exists": True}
        seat.used = False
        seat.cpu_before, seat.cpu_seconds = seat.cpu_before + seat.cpu_seconds, 0.0
        seat.actor = begin_actor(
            self._thread,
            ReaderActor,
            (max(1, int(self._workers.cpus)),),
            self._workers,
            ready=lambda actor, told: self._guarded(self._ready, seat, actor, told),
            late=lambda actor, shortage: self._guarded(self._late, seat, actor, shortage),
            **options,
        )

    def _ready(self, seat: ActorSeat[S], actor: Any, told: Place | BaseException) -> None:
        if seat.actor is not actor or self._ended:
            return
        if isinstance(told, Place):
            seat.place, seat.failures, seat.since = told, 0, monotonic()
            left, seat.left = seat.left, []
            for wire in left:  # of a pool: it may be the one that could not be reached before
                actor.end.remote(wire)
            self._runs()
            return
        self.dismiss(seat)
        if not is_loss(told):
            raise told
        # An actor of a pool that cannot be reached may be one that the cluster does not know to be lost yet.
        seat.failures += not is_unreachable(told)
        if seat.failures > MOST_START_FAILURES and not self.running():
            raise WorkerDiedError(
                f"Ray readers die before they run, {seat.failures} in a row; the last one: {words_of(told)}; is "
                f"aioloader installed on all nodes, or in runtime_env?"
            ) from told
        self._thread.later(AGAIN_SECONDS * max(1, seat.failures), self._guarded, self._start, seat)

    def _late(self, seat: ActorSeat[S], actor: Any, shortage: Shortage) -> None:
        if seat.actor is not actor or self._ended or self._is_late is None:
            return
        self._is_late()
        running = len(self.running())
        text = f"{running} of {self.wanted} actors of in_ray run: {shortage.words}"
        if shortage.hopeless and not running:
            for one in self._seats:  # the next epoch asks again
                self.dismiss(one)
            raise ValueError(f"{text}; ask for less, or add nodes to the cluster")
        if not self._warned:
            self._warned = True
            others = ". Those that run do all the work until then" if running else ""
            warnings.warn(f"{text}; ask for less, or end what holds it{others}", RuntimeWarning, stacklevel=2)

    def lose(self, seat: ActorSeat[S], actor: Any, error: BaseException) -> None:
        """An actor is lost, or cannot be reached, as it shows first when its node is gone: it may live on."""
        if seat.actor is not actor or self._ended:
            return  # that is known
        why = f"{seat} was lost: {words_of(error)}"
        seat.actor, seat.place = None, None
        seat.restarts += 1
        if self._pool is None:
            kill_actor(actor)
            self._lost(seat, why)
            self._start(seat)
        else:  # the name may be that of the one that is lost for a moment
            self._lost(seat, why)
            self._thread.later(AGAIN_SECONDS, self._guarded, self._start, seat)


def _end_actors(actors: list[Any], running: list[Any]) -> None:
    """Let `running` ones close what is open there, for a moment, and then kill all.

    Not by `__ray_terminate__`: that waits for the calls of an actor, and one of an async actor that nobody answers any
    more would keep it from being killed, too.
    """
    import ray

    try:
        closing = [actor.close.remote() for actor in running]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=GRACE_SECONDS, fetch_local=False)
    finally:
        for actor in actors:
            kill_actor(actor)
