"""A pool of actors that run one program and share the chunks submitted to it: `WorkerPool`, on a Ray cluster."""

import warnings
from asyncio import Future
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Final

from aioloader.errors import LoaderClosedError, WorkerDiedError
from aioloader.executors.chunk import ChunkResult
from aioloader.executors.processes.failures import BY_VALUE, cannot_travel
from aioloader.executors.processes.wire import can_pickle_by_value
from aioloader.executors.processes.worker_pool import Broken, Died, NotSent, Outcome
from aioloader.executors.ray.actors import (
    Place,
    Shortage,
    begin_actor,
    cancel_call,
    end_actors,
    is_loss,
    kill_actor,
    result_is_lost,
    words_of,
)
from aioloader.executors.ray.chunk_actor import AsyncChunkActor, ChunkActor
from aioloader.executors.ray.cluster import Membership
from aioloader.executors.ray.program import Parcel, RayProgram
from aioloader.executors.ray.same_host import Inbox, SegmentsGoneError, answer_bytes
from aioloader.executors.ray.seats import Seat, Task
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.values import Packed, pack, unpack
from aioloader.executors.ray.workers import RayWorkers
from aioloader.insight.actors import ActorStats
from aioloader.memory.pool import BatchMemory

__all__ = ["ASYNC_CALLS", "ActorPool", "RayResult"]

ASYNC_CALLS: Final = 16  # side by side in one actor that awaits
LOOK_SECONDS: Final = 2.0  # between two looks at whether Ray is still there, while something is under way
SILENT_SECONDS: Final = 40.0  # without a head, after which an epoch ends: Ray ends the whole process after 60
MOST_LOSSES: Final = 5  # of a result that was made, before it counts as if its actor had died
MOST_START_FAILURES: Final = 3  # of actors in one place, in a row
STORE_SHARE: Final = 4  # chunks under way fill at most the 1/n of a node's object store


@dataclass(slots=True)
class RayResult(ChunkResult):
    """The result of a chunk in an actor; and how many of its calls were cancelled since their time was up."""

    timeouts: int = 0


class ActorPool:
    """At most so many actors as are needed for `width` chunks at once. They stay until the loader is closed.

    Who gets what: only an actor that runs is sent anything, at most twice what it works on at once, and that only
    where chunks are quick. So a chunk never waits for an actor that may never come.

    What when an actor dies? Ray fails all calls that it had been sent, in the order of sending, and all alike. An actor
    for sync functions works on one after the other, so only the first one that it had not answered may be to blame; the
    others had not begun and are sent elsewhere. One that awaits may have been at all of them. That an idle actor has
    died is only noticed with the next chunk, which is blamed for it: once, which `retries` bears.

    A lost node shows as an actor that is unavailable first, and it may come back. Nobody waits for that: it is given up
    and killed at once, and what it says later is for tasks that it does not have any more.

    Args:
        thread: Of the loader; everything happens there, unless stated otherwise.
        width: Chunks that may be worked on at once.
        make_program: Makes what the actors run.
        workers: What each of them needs.
        awaits: The program is async.
    """

    def __init__(
        self,
        thread: RayThread,
        width: int,
        make_program: Callable[[], RayProgram],
        workers: RayWorkers,
        *,
        awaits: bool,
    ) -> None:
        self._thread = thread
        self._make_program = make_program
        self._workers = workers
        self._kind = AsyncChunkActor if awaits else ChunkActor
        side_by_side = min(ASYNC_CALLS, width) if awaits else 1
        self._seats = [Seat(number, side_by_side) for number in range(-(-width // side_by_side))]
        self._count = width
        self._waiting: deque[Task] = deque()
        self._late: dict[Any, Task] = {}  # answered by an actor that has died since; the answer is on its way
        self._program: Any = None  # in the object store
        self._membership: Membership | None = None
        self._memory = BatchMemory()
        self._held: dict[Hashable, tuple[Callable[[bool], None], list[bool]]] = {}
        self._looks = False
        self._silent_since: float | None = None
        self._told = False
        self._closed = False
        self._broken: BaseException | None = None
        self._store_bytes = 0
        self.sample_bytes = 0.0
        """The mean size of what comes back for a sample; read in any thread."""
        self.seconds_each: float | None = None
        """What a sample costs, as its step has found out; for the step of the next epoch."""
        self.ended: Future[None] | None = None

    # -- in any thread -----------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        return self._count

    @property
    def gone(self) -> bool:
        return self.ended is not None and self.ended.done()

    def prepare(self) -> None:
        """Ask for the actors."""
        self._call(self._begin_anew)

    def submit(self, owner: Hashable, values: Parcel, done: Callable[[Outcome], None], slot: int | None = None) -> None:
        """See `ChunkPool`."""
        self._call(self._submit, owner, values, done)

    def forget(self, owner: Hashable) -> None:
        self._call(self._forget, owner)

    def expire(self, owner: Hashable, seconds: float) -> None:
        self._call(self._expire, owner, seconds)

    def hold(self, owner: Hashable, said: Callable[[bool], None]) -> None:
        self._call(self._hold, owner, said)

    def let_go(self, owner: Hashable) -> None:
        self._call(self._let_go, owner)

    def at_work(self, owner: Hashable) -> list[tuple[Any, int, float]]:
        found = []
        for seat in self._seats:
            for task in list(seat.load.values())[: seat.side_by_side]:
                if task.owner == owner and not task.forgotten:
                    found.append((task.parcel.payload, 0, task.since))
        return found

    def actors(self) -> tuple[ActorStats, ...]:
        """What is known of each."""
        return tuple(seat.stats() for seat in self._seats)

    def alive(self) -> list[str]:
        return [seat.name for seat in self._seats if seat.place is not None]

    def end_on(self, loop: Any) -> None:
        """It ends with the loader, and not with a run."""

    def close(self) -> None:
        """It ends with the loader."""

    def _call(self, fn: Callable[..., None], *args: Any) -> None:
        self._thread.call(self._safely, fn, *args)

    # -- in the thread: actors ---------------------------------------------------------------------------------------

    def _safely(self, fn: Callable[..., None], *args: Any) -> None:
        """Whatever fails here must fail tasks: who waits for them would wait for ever."""
        try:
            fn(*args)
        except BaseException as error:
            self._break(error)

    def _begin_anew(self) -> None:
        """A run begins: connect, and try again what had been given up. What fails fails the tasks of the run."""
        if self._closed:
            return
        self._told = False
        self._broken = None
        for seat in self._seats:
            seat.start_failures = 0
        try:
            membership = self._thread.join_cluster(self._workers.address)
            if membership is not self._membership:  # another connection: actors of an old one are gone with it
                self._start_over()
                self._membership = membership
                self._store_bytes = _smallest_store()
        except BaseException as error:
            self._break(error)
        else:
            self._fill()

    def _fill(self) -> None:
        """Ask for the actors that are missing."""
        missing = [seat for seat in self._seats if seat.handle is None and seat.start_failures <= MOST_START_FAILURES]
        if not missing or self._closed or self._has_gone():
            return
        self._watch()
        try:
            for seat in missing:
                self._begin(seat)
        except BaseException as error:
            self._break(error)

    def _has_gone(self) -> bool:
        """Whether the connection has ended. Asked before each use: Ray would join any cluster that it finds instead."""
        if self._broken is not None:
            return True
        if self._membership is not None and self._membership.alive:
            return False
        self._break(
            WorkerDiedError("the connection to Ray has ended, and with it all Ray workers; call ray.init again")
        )
        return True

    def _start_over(self) -> None:
        self._requeue([task for seat in self._seats for _, task in seat.vacate()])
        self._requeue(list(self._late.values()))
        self._late.clear()
        self._program = None

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
            ready=partial(self._safely, self._ready, seat),
            late=partial(self._safely, self._is_late, seat),
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
        if seat.handle is not handle or self._closed:
            kill_actor(handle)
        elif isinstance(place, BaseException):
            self._not_started(seat, place)
        else:
            loaded = handle.load.remote(self._program).future()
            loaded.add_done_callback(partial(self._call, self._loaded, seat, handle, place))

    def _loaded(self, seat: Seat, handle: Any, place: Place, future: Any) -> None:
        """It has its functions, or cannot have them."""
        if seat.handle is not handle or self._closed:
            kill_actor(handle)
            return
        error = future.exception()
        if error is not None:
            self._not_started(seat, error)
        elif (refused := future.result()) is not None:
            self._break(unpack(refused))
        else:
            seat.runs(place)
            self._assign()

    def _not_started(self, seat: Seat, error: BaseException) -> None:
        """Try again, if not for ever."""
        handle = seat.handle
        seat.vacate()
        kill_actor(handle)
        seat.restarts += 1
        seat.start_failures += 1
        if self._has_gone():
            return
        if seat.start_failures <= MOST_START_FAILURES:
            self._fill()
        elif all(seat.start_failures > MOST_START_FAILURES or seat.handle is None for seat in self._seats):
            died = WorkerDiedError(
                f"Ray workers die before they run, {seat.start_failures} in a row; the last one: {words_of(error)}; is "
                f"aioloader installed on all nodes, or in runtime_env?"
            )
            died.__cause__ = error
            self._break(died)

    def _is_late(self, seat: Seat, handle: Any, why: Shortage) -> None:
        """It does not run yet: say so once, or give up where it never will."""
        if self._closed or seat.handle is not handle or self._has_gone():
            return
        running = sum(seat.place is not None for seat in self._seats)
        if why.hopeless and not running:
            self._break(ValueError(f"no Ray worker can begin: {why.words}; ask for less in RayWorkers, or add nodes"))
        elif not self._told:
            self._told = True
            warnings.warn(
                f"{running} of {len(self._seats)} Ray workers run: {why.words}; lower concurrency, or end what holds "
                f"them. Those that run do all the work until then",
                RuntimeWarning,
                stacklevel=2,
            )

    # -- in the thread: tasks ----------------------------------------------------------------------------------------

    def _submit(self, owner: Hashable, parcel: Parcel, done: Callable[[Outcome], None]) -> None:
        if self._closed or self._thread.closed:
            done(Broken(LoaderClosedError("the loader was closed while its Ray workers had something to do")))
            return
        if self._broken is not None:
            done(Broken(self._broken))
            return
        try:
            packed = pack(parcel.payload)
        except BaseException as error:
            done(NotSent(cannot_travel("a sample", error, by_value=can_pickle_by_value())))
            return
        self._waiting.append(Task(owner, parcel, done, packed))
        self._assign()

    def _assign(self) -> None:
        """Send waiting chunks to actors."""
        if self._closed or self._held or not self._waiting or self._has_gone():
            return
        self._watch()
        self._fill()
        while self._waiting:
            task = self._waiting[0]
            fitting = [seat for seat in self._seats if seat.has_room(task)]
            if not fitting:
                return
            seat = min(fitting, key=lambda seat: len(seat.load))
            if seat.load and not self._fits_store(task):
                return
            self._waiting.popleft()
            self._send(seat, task)

    def _send(self, seat: Seat, task: Task) -> None:
        handle, inbox = seat.handle, seat.inbox
        try:
            ref = handle.run.remote(task.packed, None if inbox is None else inbox.told())
        except BaseException as error:
            self._waiting.appendleft(task)
            self._break(error)
            return
        task.since = perf_counter()
        seat.load[ref] = task
        ref.future().add_done_callback(partial(self._call, self._answered, seat, handle, inbox, ref))

    def _fits_store(self, task: Task) -> bool:
        """Whether one more chunk, and what comes of it, leaves room in the object store: nothing of ours is spilled."""
        tasks = [task, *(other for seat in self._seats for other in seat.load.values())]
        expected = sum(task.nbytes + task.size * self.sample_bytes for task in tasks)
        return not self._store_bytes or expected <= self._store_bytes / STORE_SHARE

    def _answered(self, seat: Seat, handle: Any, inbox: Inbox | None, ref: Any, future: Any) -> None:
        """An actor has answered, or Ray in its place."""
        task = self._late.pop(ref, None)
        was_late = task is not None
        error = future.exception()
        if task is None and error is not None and ref in seat.load and is_loss(error):
            self._lost(seat, handle, ref, error)
            self._assign()
            return
        task = task or seat.take(ref)
        if task is None:  # it was taken from an actor that was given up: whatever it says, nobody listens
            return
        if error is None:
            outcome = self._outcome(seat, inbox, task, future.result())
        elif was_late:  # it had not answered after all: it had been lost with the others
            self._requeue([task])
            outcome = None
        else:
            outcome = NotSent(error)
        del future
        if outcome is not None and not task.forgotten:
            task.done(outcome)
        self._check_held()
        self._assign()

    def _outcome(self, seat: Seat, inbox: Inbox | None, task: Task, answer: tuple[Any, ...]) -> Outcome | None:
        """What an actor answered, in memory that is ours alone; None: it is lost, and made again."""
        kind, packed, *numbers = answer
        alloc = self._memory.alloc
        try:
            value = unpack(packed, alloc) if inbox is None else inbox.unpack(packed, alloc)
        except SegmentsGoneError as error:
            if seat.inbox is inbox:  # not of an actor that came after it
                seat.inbox = None  # the rest goes through the object store
            task.losses += 1
            if task.losses > MOST_LOSSES:
                return NotSent(error)
            self._requeue([task])
            return None
        except BaseException as error:
            return NotSent(cannot_travel("a result", error, by_value=can_pickle_by_value()))
        if kind == "lost":
            return NotSent(value)
        result = RayResult(value, *numbers)
        tried, nbytes = len(value), answer_bytes(packed)
        seat.count(tried, result.busy_seconds, nbytes)
        if tried:
            each = nbytes / tried
            self.sample_bytes = each if not self.sample_bytes else (self.sample_bytes + each) / 2
        return result

    # -- in the thread: losses ---------------------------------------------------------------------------------------

    def _lost(self, seat: Seat, handle: Any, ref: Any, error: BaseException) -> None:
        """`ref` failed since its actor was lost, or its result.

        What has been answered meanwhile is left to its own callback, which is on its way. A call that failed as this
        one did looks the same, and is found out there.
        """
        import ray

        if result_is_lost(error):
            task = seat.take(ref)
            assert task is not None
            task.losses += 1
            if task.losses <= MOST_LOSSES:
                self._requeue([task])
                return
            seat.load[ref] = task
        if self._has_gone():
            return
        name, pid = seat.name, None if seat.place is None else seat.place.pid
        tasks = seat.vacate()
        seat.restarts += 1
        kill_actor(handle)
        others = [other for other, _ in tasks if other is not ref]
        answered: set[Any] = set()
        if others:
            with suppress(Exception):
                answered.update(ray.wait(others, num_returns=len(others), timeout=0, fetch_local=False)[0])
        died = Died(seat.number, pid, f"{name} died: {words_of(error)}", 0)
        again = []
        blamed = False
        for other, task in tasks:
            if other in answered:
                self._late[other] = task
            elif blamed and seat.side_by_side == 1:  # not begun
                again.append(task)
            else:
                blamed = True
                if not task.forgotten:
                    task.done(died)
        self._requeue(again)
        self._fill()
        self._check_held()

    def _expire(self, owner: Hashable, seconds: float) -> None:
        for seat in self._seats:
            now = perf_counter()
            begun = list(seat.load.items())[: seat.side_by_side]
            late = [(ref, task) for ref, task in begun if task.owner == owner and now - task.since >= seconds]
            if not late or seat.place is None:
                continue
            handle, name, pid = seat.handle, seat.name, seat.place.pid
            tasks = seat.vacate()
            seat.restarts += 1
            kill_actor(handle)
            for _, task in late:
                if not task.forgotten:
                    task.done(Died(seat.number, pid, name, 0, expired=True))
            self._requeue([task for ref, task in tasks if (ref, task) not in late])
        self._check_held()
        self._assign()

    def _requeue(self, tasks: list[Task]) -> None:
        """They have not begun, or are made again elsewhere."""
        self._waiting.extendleft(task for task in reversed(tasks) if not task.forgotten)

    def _forget(self, owner: Hashable) -> None:
        self._let_go(owner)
        self._waiting = deque(task for task in self._waiting if task.owner != owner)
        for task in self._late.values():
            task.forgotten |= task.owner == owner
        for seat in self._seats:
            for number, (ref, task) in enumerate(seat.load.items()):
                if task.owner == owner:
                    task.forgotten = True
                    if number >= seat.side_by_side:  # not begun
                        cancel_call(ref)
        self._assign()

    def _watch(self) -> None:
        """Look now and then whether Ray is there, while somebody waits for it.

        After a `ray.shutdown()` of the user's no call of before is ever answered, and nobody is told. Without a head
        actors work on, and it may come back; if not, Ray ends this process, so the program is told while it can still
        save its state.
        """
        if not self._looks:
            self._looks = True
            self._thread.later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._looks = False
        waits = self._waiting or self._late or any(seat.load for seat in self._seats)
        if not waits or self._closed or self._has_gone():
            self._silent_since = None
            return
        self._watch()
        assert self._membership is not None
        if self._membership.head_answers():
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = perf_counter()
        elif perf_counter() - self._silent_since >= SILENT_SECONDS:
            self._break(
                WorkerDiedError(
                    f"the head of the Ray cluster has not answered for {SILENT_SECONDS:.0f} s; Ray ends this process "
                    f"soon unless ray.shutdown() is called"
                )
            )

    def _break(self, error: BaseException) -> None:
        """No actor can run any task, until the next run begins."""
        self._broken = error
        connected = self._membership is not None and self._membership.alive
        failed = [*self._waiting, *self._late.values()]
        self._waiting.clear()
        self._late.clear()
        for seat in self._seats:
            handle = seat.handle
            failed += [task for _, task in seat.vacate()]
            seat.start_failures = 0
            if handle is not None and connected:
                kill_actor(handle)
        self._membership = self._program = None
        for task in failed:
            if not task.forgotten:
                task.done(Broken(error))
        self._check_held()

    # -- in the thread: pauses, and the end --------------------------------------------------------------------------

    def _hold(self, owner: Hashable, said: Callable[[bool], None]) -> None:
        """Send nothing more. Chunks that were sent go on; it is quiet once no sample of them can begin any more."""
        self._held[owner] = said, []
        self._check_held()

    def _let_go(self, owner: Hashable) -> None:
        self._held.pop(owner, None)
        self._assign()

    def _check_held(self) -> None:
        for said, told in self._held.values():
            if not told and all(
                len(seat.load) <= seat.side_by_side and all(task.size == 1 for task in seat.load.values())
                for seat in self._seats
            ):
                told.append(False)
                said(False)
            if len(told) == 1 and not self._late and not any(seat.load for seat in self._seats):
                told.append(True)
                said(True)

    def end(self) -> None:
        """See `RayOwner`."""
        self._closed = True
        self._waiting.clear()
        running = [seat.handle for seat in self._seats if seat.place is not None]
        starting = [seat.handle for seat in self._seats if seat.handle is not None and seat.place is None]
        for seat in self._seats:
            seat.vacate()
        self._program = None
        if self._membership is not None and self._membership.alive:
            for handle in starting:  # they are at nothing of the user's
                kill_actor(handle)
            end_actors(running)
        self._memory.close()


def _smallest_store() -> int:
    """Bytes of the object store of the node that has the smallest one."""
    import ray

    sizes = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(min(filter(None, sizes), default=0))
