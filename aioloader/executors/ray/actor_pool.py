"""A pool of actors that run one program and share the chunks submitted to it: `WorkerPool`, on a Ray cluster."""

import warnings
from asyncio import Future
from collections import deque
from collections.abc import Callable, Hashable
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
    MOST_START_FAILURES,
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
from aioloader.executors.ray.lookout import Lookout
from aioloader.executors.ray.program import Parcel, RayProgram
from aioloader.executors.ray.same_host import Inbox, SegmentsGoneError, answer_bytes
from aioloader.executors.ray.seats import Seat, Task
from aioloader.executors.ray.stores import Stores
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.values import Packed, pack, unpack
from aioloader.executors.ray.workers import RayWorkers
from aioloader.executors.ray.wreck import SETTLE_SECONDS, Wreck
from aioloader.insight.actors import ActorStats
from aioloader.memory.pool import BatchMemory

__all__ = ["ASYNC_CALLS", "ActorPool", "RayResult"]

ASYNC_CALLS: Final = 16  # side by side in one actor that awaits
MOST_LOSSES: Final = 5  # of a result that was made, before it counts as if its actor had died


@dataclass(slots=True)
class RayResult(ChunkResult):
    """The result of a chunk in an actor; and how many of its calls were cancelled since their time was up."""

    timeouts: int = 0


class ActorPool:
    """At most so many actors as are needed for `width` chunks at once. They stay until the loader is closed.

    Who gets what: only an actor that runs is sent anything, at most twice what it works on at once, and that only
    where chunks are quick. So a chunk never waits for an actor that may never come.

    What when an actor dies? `Wreck` says who is to blame; the others are sent elsewhere. That an idle actor has died is
    only noticed with the next chunk, which is blamed for it: once, which `retries` allows for.

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
        self._wrecks: dict[Any, Wreck] = {}  # by the refs of calls of lost actors of which more is to be heard
        self._program: Any = None  # in the object store
        self._membership: Membership | None = None
        self._memory = BatchMemory()
        self._held: dict[Hashable, tuple[Callable[[bool], None], list[bool]]] = {}
        self._stores = Stores()
        self._lookout = Lookout(
            thread, waits=self._waits, has_gone=self._has_gone, fail=self._break, seen=self._stores.learn
        )
        self._told = False
        self._closed = False
        self._broken: BaseException | None = None
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
                self._stores.learn()
        except BaseException as error:
            self._break(error)
        else:
            self._fill()

    def _fill(self) -> None:
        """Ask for the actors that are missing."""
        missing = [seat for seat in self._seats if seat.handle is None and seat.start_failures <= MOST_START_FAILURES]
        if not missing or self._closed or self._has_gone():
            return
        self._lookout.watch()
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
        self._requeue([*self._take_wrecked(), *(task for seat in self._seats for _, task in seat.vacate())])
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
        elif self._has_gone():
            pass
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
        self._lookout.watch()
        self._fill()
        while self._waiting:
            task = self._waiting[0]
            fitting = [seat for seat in self._seats if seat.has_room(task)]
            if not fitting:
                return
            seat = min(fitting, key=lambda seat: len(seat.load))
            if not self._fits_store(task, idle=not seat.load):
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

    def _fits_store(self, task: Task, *, idle: bool) -> bool:
        """Whether one more chunk, and what comes of it, leaves room in the object stores, so that nothing is spilled.

        One may be under way in any case, and an `idle` actor gets one where twice as much would be there.
        """
        others = [other for seat in self._seats for other in seat.load.values()]
        share = self._stores.share()
        if not others or share is None:
            return True
        expected = sum(one.nbytes + one.size * self.sample_bytes for one in (task, *others))
        return expected <= (2 if idle else 1) * share

    def _answered(self, seat: Seat, handle: Any, inbox: Inbox | None, ref: Any, future: Any) -> None:
        """An actor has answered, or Ray in its place."""
        error = future.exception()
        if (wreck := self._wrecks.get(ref)) is not None:
            self._wreck_knows(seat, inbox, wreck, ref, future)
        elif error is not None and ref in seat.load and is_loss(error):
            self._lost(seat, handle, ref, error)
        elif (task := seat.take(ref)) is not None:  # else it was taken from an actor that was given up: nobody listens
            outcome = NotSent(error) if error is not None else self._outcome(seat, inbox, future.result())
            del future
            if outcome is None:
                self._result_lost(
                    task, NotSent(SegmentsGoneError("the memory of an actor on this host cannot be mapped"))
                )
            elif not task.forgotten:
                task.done(outcome)
        self._check_held()
        self._assign()

    def _outcome(self, seat: Seat, inbox: Inbox | None, answer: tuple[Any, ...]) -> Outcome | None:
        """What an actor answered, in memory that is ours alone; None: it is lost."""
        kind, packed, *numbers = answer
        alloc = self._memory.alloc
        try:
            value = unpack(packed, alloc) if inbox is None else inbox.unpack(packed, alloc)
        except SegmentsGoneError:
            if seat.inbox is inbox:  # not of an actor that came after it
                seat.inbox = None  # the rest goes through the object store
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
        """`ref` failed since its actor was lost, or its result."""
        name, pid = seat.name, None if seat.place is None else seat.place.pid
        died = Died(seat.number, pid, f"{name} died: {words_of(error)}", 0)
        if result_is_lost(error):
            task = seat.take(ref)
            assert task is not None
            self._result_lost(task, died)
            return
        if self._has_gone():
            return
        tasks = seat.vacate()
        seat.restarts += 1
        kill_actor(handle)
        wreck = Wreck(tasks, died, one_by_one=seat.side_by_side == 1)
        self._wrecks.update(dict.fromkeys(wreck.calls, wreck))
        wreck.failed(ref)
        self._settle(wreck)
        self._fill()
        if wreck.calls:
            self._thread.later(SETTLE_SECONDS, self._safely, self._give_up, wreck)

    def _result_lost(self, task: Task, outcome: Outcome) -> None:
        """A chunk was made, and is made again; too often, and this is what becomes of it."""
        task.losses += 1
        if task.losses <= MOST_LOSSES:
            self._requeue([task])
        elif not task.forgotten:
            task.done(outcome)

    def _wreck_knows(self, seat: Seat, inbox: Inbox | None, wreck: Wreck, ref: Any, future: Any) -> None:
        """More is heard of a lost actor."""
        error = future.exception()
        if error is None:
            wreck.answered(ref, self._outcome(seat, inbox, future.result()))
        elif result_is_lost(error):
            wreck.answered(ref, None)
        else:
            wreck.failed(ref)
        self._settle(wreck)

    def _give_up(self, wreck: Wreck) -> None:
        wreck.give_up()
        self._settle(wreck)
        self._check_held()
        self._assign()

    def _settle(self, wreck: Wreck) -> None:
        told, again = wreck.settle()
        self._wrecks = {ref: other for ref, other in self._wrecks.items() if ref in other.calls}
        self._requeue(again)
        for task, outcome in told:
            if not task.forgotten:
                task.done(outcome)

    def _take_wrecked(self) -> list[Task]:
        """What lost actors had, and of which nothing is known."""
        found = [wreck.calls[ref] for ref, wreck in self._wrecks.items()]
        self._wrecks = {}
        return found

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
        for ref, wreck in self._wrecks.items():
            wreck.calls[ref].forgotten |= wreck.calls[ref].owner == owner
        for seat in self._seats:
            for number, (ref, task) in enumerate(seat.load.items()):
                if task.owner == owner:
                    task.forgotten = True
                    if number >= seat.side_by_side:  # not begun
                        cancel_call(ref)
        self._assign()

    def _waits(self) -> bool:
        return bool(self._waiting or self._wrecks or any(seat.load for seat in self._seats)) and not self._closed

    def _break(self, error: BaseException) -> None:
        """No actor can run any task, until the next run begins."""
        self._broken = error
        connected = self._membership is not None and self._membership.alive
        failed = [*self._waiting, *self._take_wrecked()]
        self._waiting.clear()
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
            if len(told) == 1 and not self._wrecks and not any(seat.load for seat in self._seats):
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
