"""How the seats of a pool get their actors: asked for, running, with their functions, and called back over a line."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from aioloader.errors import WorkerDiedError
from aioloader.executors.processes.failures import BY_VALUE
from aioloader.executors.processes.wire import Message, can_pickle_by_value
from aioloader.executors.ray.actors import (
    MOST_START_FAILURES,
    ActorBase,
    Place,
    Shortage,
    begin_actor,
    kill_actor,
    words_of,
)
from aioloader.executors.ray.chunk_actor import ChunkActor
from aioloader.executors.ray.line import Line
from aioloader.executors.ray.program import RayProgram
from aioloader.executors.ray.same_host import Inbox
from aioloader.executors.ray.seats import Seat
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.values import Packed, pack, unpack
from aioloader.executors.ray.workers import RayWorkers

__all__ = ["Employer", "Hiring"]


class Employer(Protocol):
    """What has the seats. All of it is called in the thread of `RayThread`."""

    closed: bool

    def safely(self, fn: Callable[..., None], *args: Any) -> None:
        """Call `fn`; what it raises fails all tasks."""

    def has_gone(self) -> bool:
        """Whether the connection to Ray has ended; then all tasks have failed."""

    def give_up(self, error: BaseException) -> None:
        """No actor can run any task: `error` is why."""

    def runs(self, seat: Seat) -> None:
        """An actor may be sent chunks."""

    def received(self, seat: Seat, handle: Any, message: Message) -> None:
        """An actor has sent something over its line."""

    def hung_up(self, seat: Seat, handle: Any) -> None:
        """An actor has hung up, or has died."""

    def left(self, seat: Seat, handle: Any, error: BaseException | None) -> None:
        """The call in which an actor served its line is over; Ray says why."""


class Hiring:
    """Fills seats with actors.

    Only an actor that runs gets work. One on this host is asked to call back over a line (`Line`); where it cannot, and
    on other hosts, chunks are calls of Ray.

    Args:
        thread: Everything happens there.
        kind: The class of the actors.
        workers: What each of them needs.
        seats: All of the pool.
        make_program: Makes what the actors run.
        employer: The pool.
    """

    def __init__(
        self,
        thread: RayThread,
        kind: type[ActorBase],
        workers: RayWorkers,
        seats: Sequence[Seat],
        make_program: Callable[[], RayProgram],
        employer: Employer,
    ) -> None:
        self._thread = thread
        self._kind = kind
        self._workers = workers
        self._seats = seats
        self._make_program = make_program
        self._employer = employer
        self._program: Any = None  # in the object store
        self._told = False

    def begin_anew(self) -> None:
        """A run begins: what had been given up is tried again, and said again."""
        self._told = False
        for seat in self._seats:
            seat.start_failures = 0

    def forget_program(self) -> None:
        """The object store has gone, or is not needed any more."""
        self._program = None

    def fill(self) -> bool:
        """Ask for the actors that are missing; returns whether any are."""
        missing = [seat for seat in self._seats if seat.handle is None and seat.start_failures <= MOST_START_FAILURES]
        if not missing or self._employer.closed or self._employer.has_gone():
            return False
        try:
            for seat in missing:
                self._begin(seat)
        except BaseException as error:
            self._employer.give_up(error)
        return True

    def _begin(self, seat: Seat) -> None:
        """Ask for an actor."""
        import ray

        if self._program is None:
            self._program = ray.put(self._packed_program())
        options: dict[str, Any] = {} if seat.side_by_side == 1 else {"max_concurrency": seat.side_by_side}
        seat.handle = begin_actor(
            self._thread,
            self._kind,
            (seat.number,),
            self._workers,
            ready=partial(self._employer.safely, self._ready, seat),
            late=partial(self._employer.safely, self._is_late, seat),
            **options,
        )

    def _packed_program(self) -> Packed:
        program = self._make_program()
        try:
            return pack(program)
        except Exception as error:
            if not can_pickle_by_value():
                error.add_note(f"aioloader: {BY_VALUE}")
            raise

    def _ready(self, seat: Seat, handle: Any, place: Place | BaseException) -> None:
        """An actor runs, or has died before."""
        if seat.handle is not handle or self._employer.closed:
            kill_actor(handle)
        elif self._employer.has_gone():
            pass
        elif isinstance(place, BaseException):
            self._not_started(seat, place)
        else:
            self._when_done(handle.load.remote(self._program), self._loaded, seat, handle, place)

    def _loaded(self, seat: Seat, handle: Any, place: Place, future: Any) -> None:
        """It has its functions, or cannot have them."""
        if seat.handle is not handle or self._employer.closed:
            kill_actor(handle)
            return
        error = future.exception()
        if error is not None:
            self._not_started(seat, error)
            return
        if (refused := future.result()) is not None:
            self._employer.give_up(unpack(refused))
            return
        inbox = Inbox.of(place.pid, place.file)
        if inbox is None or self._kind is not ChunkActor:
            self._runs(seat, place, inbox)
        else:
            self._ask_to_call(seat, handle, place, inbox)

    def _ask_to_call(self, seat: Seat, handle: Any, place: Place, inbox: Inbox) -> None:
        """It is on this host."""
        if self._employer.has_gone():
            return
        safely, employer = self._employer.safely, self._employer
        try:
            seat.line = Line(
                self._thread,
                place.pid,
                up=partial(safely, self._runs, seat, place, inbox),
                received=partial(safely, employer.received, seat, handle),
                ended=partial(safely, employer.hung_up, seat, handle),
            )
        except OSError:  # no more sockets
            self._runs(seat, place, inbox)
            return
        self._when_done(handle.serve.remote(seat.line.name), self._served, seat, handle, place, inbox)

    def _served(self, seat: Seat, handle: Any, place: Place, inbox: Inbox, future: Any) -> None:
        """It serves its line no more, or never has."""
        if seat.handle is not handle or self._employer.closed:
            return
        error = future.exception()
        if seat.place is not None:
            self._employer.left(seat, handle, error)
        elif error is not None:
            self._not_started(seat, error)
        else:  # it cannot reach this process
            seat.hang_up()
            self._runs(seat, place, inbox)

    def _runs(self, seat: Seat, place: Place, inbox: Inbox | None) -> None:
        seat.runs(place, inbox)
        self._employer.runs(seat)

    def _when_done(self, ref: Any, fn: Callable[..., None], *args: Any) -> None:
        ref.future().add_done_callback(partial(self._thread.call, self._employer.safely, fn, *args))

    def _not_started(self, seat: Seat, error: BaseException) -> None:
        """Try again, if not for ever."""
        handle = seat.handle
        seat.vacate()
        kill_actor(handle)
        seat.restarts += 1
        seat.start_failures += 1
        if self._employer.has_gone():
            return
        if seat.start_failures <= MOST_START_FAILURES:
            self.fill()
        elif all(seat.start_failures > MOST_START_FAILURES or seat.handle is None for seat in self._seats):
            died = WorkerDiedError(
                f"Ray workers die before they run, {seat.start_failures} in a row; the last one: {words_of(error)}; is "
                f"aioloader installed on all nodes, or in runtime_env?"
            )
            died.__cause__ = error
            self._employer.give_up(died)

    def _is_late(self, seat: Seat, handle: Any, why: Shortage) -> None:
        """It does not run yet: say so once, or give up where it never will."""
        if self._employer.closed or seat.handle is not handle or self._employer.has_gone():
            return
        running = sum(seat.place is not None for seat in self._seats)
        if why.hopeless and not running:
            words = f"no Ray worker can begin: {why.words}; ask for less in RayWorkers, or add nodes"
            self._employer.give_up(ValueError(words))
        elif not self._told:
            self._told = True
            warnings.warn(
                f"{running} of {len(self._seats)} Ray workers run: {why.words}; lower concurrency, or end what holds "
                f"them. Those that run do all the work until then",
                RuntimeWarning,
                stacklevel=2,
            )
