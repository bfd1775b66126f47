"""A pool of actors that run one program and share the chunks submitted to it: `WorkerPool`, on a Ray cluster."""

from asyncio import Future
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from time import perf_counter
from typing import Any, Final

from aioloader.errors import LoaderClosedError, WorkerDiedError
from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.layout import lay_out
from aioloader.executors.processes.wire import Message, can_pickle_by_value, encode
from aioloader.executors.processes.worker_pool import Broken, Died, NotSent, Outcome
from aioloader.executors.ray.actors import cancel_call, end_actors, is_loss, kill_actor, words_of
from aioloader.executors.ray.answers import Answers
from aioloader.executors.ray.chunk_actor import AsyncChunkActor, ChunkActor
from aioloader.executors.ray.cluster import Membership
from aioloader.executors.ray.hiring import Hiring
from aioloader.executors.ray.line import Line
from aioloader.executors.ray.lookout import Lookout
from aioloader.executors.ray.losses import Losses
from aioloader.executors.ray.program import Parcel, RayProgram
from aioloader.executors.ray.same_host import Inbox, SegmentsGoneError
from aioloader.executors.ray.seats import Seat, Task
from aioloader.executors.ray.stores import Stores
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.values import encoded
from aioloader.executors.ray.workers import RayWorkers
from aioloader.executors.ray.wreck import SETTLE_SECONDS
from aioloader.insight.actors import ActorStats

__all__ = ["ASYNC_CALLS", "ActorPool"]

ASYNC_CALLS: Final = 16  # side by side in one actor that awaits


class ActorPool:
    """At most so many actors as are needed for `width` chunks at once. They stay until the loader is closed.

    How a chunk goes: over a line, to an actor for sync functions on this host (see `Line`); else it is a call of Ray.

    Who gets what: only an actor that runs is sent anything, at most twice what it works on at once, and that only
    where chunks are quick. So a chunk never waits for an actor that may never come.

    What when an actor dies? `Wreck` says who is to blame; the others are sent elsewhere. That an idle actor has died is
    noticed at once where it has a line, and else only with the next chunk, which is blamed for it: once, which
    `retries` allows for. A line ends before Ray tells of the death, and how it came; that is waited for, if not long.

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
        self._workers = workers
        side_by_side = min(ASYNC_CALLS, width) if awaits else 1
        self._seats = [Seat(number, side_by_side) for number in range(-(-width // side_by_side))]
        self._count = width
        self._waiting: deque[Task] = deque()
        self._hiring = Hiring(
            thread, AsyncChunkActor if awaits else ChunkActor, workers, self._seats, make_program, self
        )
        self._last_number = 0  # of a chunk that went over a line
        self._membership: Membership | None = None
        self._answers = Answers()
        self._losses = Losses(thread, self._answers, self)
        self._held: dict[Hashable, tuple[Callable[[bool], None], list[bool]]] = {}
        self._stores = Stores()
        self._lookout = Lookout(
            thread, waits=self._waits, has_gone=self.has_gone, fail=self.give_up, seen=self._stores.learn
        )
        self.closed = False
        self._broken: BaseException | None = None
        self.learned: tuple[float | None, float | None] = None, None  # see `ChunkPool`
        self.ended: Future[None] | None = None

    # -- in any thread -----------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        return self._count

    @property
    def sample_bytes(self) -> float:
        """The mean size of what comes back for a sample."""
        return self._answers.sample_bytes

    @property
    def on_this_host(self) -> bool:
        """Whether there are actors that run, and all of them have lines."""
        lines = [seat.line is not None for seat in self._seats if seat.place is not None]
        return bool(lines) and all(lines)

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
        self._thread.call(self.safely, fn, *args)

    # -- in the thread: actors ---------------------------------------------------------------------------------------

    def safely(self, fn: Callable[..., None], *args: Any) -> None:
        """Whatever fails here must fail tasks: who waits for them would wait for ever."""
        try:
            fn(*args)
        except BaseException as error:
            self.give_up(error)

    def _begin_anew(self) -> None:
        """A run begins: connect, and try again what had been given up. What fails fails the tasks of the run."""
        if self.closed:
            return
        self._broken = None
        self._hiring.begin_anew()
        try:
            membership = self._thread.join_cluster(self._workers.address)
            if membership is not self._membership:  # another connection: actors of an old one are gone with it
                self._start_over()
                self._membership = membership
                self._stores.learn()
        except BaseException as error:
            self.give_up(error)
        else:
            self.fill()

    def fill(self) -> None:
        """See `TaskPool`."""
        if self._hiring.fill():
            self._lookout.watch()

    def has_gone(self) -> bool:
        """Whether the connection has ended. Asked before each use: Ray would join any cluster that it finds instead."""
        if self._broken is not None:
            return True
        if self._membership is not None and self._membership.alive:
            return False
        self.give_up(
            WorkerDiedError("the connection to Ray has ended, and with it all Ray workers; call ray.init again")
        )
        return True

    def _start_over(self) -> None:
        self.requeue([*self._losses.take_all(), *(task for seat in self._seats for _, task in seat.vacate())])
        self._hiring.forget_program()

    def runs(self, seat: Seat) -> None:
        """An actor may be sent chunks."""
        self._assign()

    # -- in the thread: tasks ----------------------------------------------------------------------------------------

    def _submit(self, owner: Hashable, parcel: Parcel, done: Callable[[Outcome], None]) -> None:
        if self.closed or self._thread.closed:
            done(Broken(LoaderClosedError("the loader was closed while its Ray workers had something to do")))
            return
        if self._broken is not None:
            done(Broken(self._broken))
            return
        try:
            stream, buffers = encode(parcel.payload)
        except BaseException as error:
            done(NotSent(cannot_travel("a sample", error, by_value=can_pickle_by_value())))
            return
        self._waiting.append(Task(owner, parcel, done, stream, buffers))
        self._assign()

    def _assign(self) -> None:
        """Send waiting chunks to actors."""
        if self.closed or self._held or not self._waiting:
            return
        self._lookout.watch()
        self.fill()
        while self._waiting:
            task = self._waiting[0]
            fitting = [seat for seat in self._seats if seat.has_room(task)]
            if not fitting:
                return
            seat = min(fitting, key=lambda seat: len(seat.load))
            if seat.line is not None:
                self._waiting.popleft()
                self._send_over(seat.line, seat, task)
                continue
            if self.has_gone() or not self._fits_store(task, idle=not seat.load):
                return
            self._waiting.popleft()
            self._send(seat, task)

    def _send_over(self, line: Line, seat: Seat, task: Task) -> None:
        """Over a line."""
        self._last_number += 1
        task.since = perf_counter()
        seat.load[self._last_number] = task
        line.send_chunk(self._last_number, *lay_out([*task.buffers, memoryview(task.stream)]))

    def _send(self, seat: Seat, task: Task) -> None:
        """As a call of Ray."""
        handle, inbox = seat.handle, seat.inbox
        try:
            packed = encoded(task.stream, task.buffers)
            ref = handle.run.remote(packed, None if inbox is None else inbox.told())
        except BaseException as error:
            self._waiting.appendleft(task)
            self.give_up(error)
            return
        task.since = perf_counter()
        seat.load[ref] = task
        ref.future().add_done_callback(partial(self._call, self._answered, seat, handle, inbox, ref))

    def _fits_store(self, task: Task, *, idle: bool) -> bool:
        """Whether one more chunk, and what comes of it, leaves room in the object stores, so that nothing is spilled.

        One may be under way in any case, and an `idle` actor gets one where twice as much would be there.
        """
        others = [other for seat in self._seats if seat.line is None for other in seat.load.values()]
        share = self._stores.share()
        if not others or share is None:
            return True
        expected = sum(one.nbytes + one.size * self.sample_bytes for one in (task, *others))
        return expected <= (2 if idle else 1) * share

    def _answered(self, seat: Seat, handle: Any, inbox: Inbox | None, ref: Any, future: Any) -> None:
        """An actor has answered, or Ray in its place."""
        if not self._losses.hear(seat, inbox, ref, future):
            self._take(seat, handle, inbox, ref, future)
        del future
        self.go_on()

    def _take(self, seat: Seat, handle: Any, inbox: Inbox | None, ref: Any, future: Any) -> None:
        """The same, of a call that nothing was known of."""
        error = future.exception()
        if error is not None and ref in seat.load and is_loss(error):
            self._losses.call(seat, handle, ref, error)
        elif (task := seat.take(ref)) is not None:  # else it was taken from an actor that was given up: nobody listens
            outcome = NotSent(error) if error is not None else self._answers.of_call(seat, inbox, future.result())
            del future
            if outcome is None:
                gone = SegmentsGoneError("the memory of an actor on this host cannot be mapped")
                self._losses.result(task, NotSent(gone))
            elif not task.forgotten:
                task.done(outcome)

    def received(self, seat: Seat, handle: Any, message: Message) -> None:
        """An actor has sent something over its line."""
        line = seat.line
        assert line is not None
        kind, *rest = message.head
        if kind == "skipped":
            for number in rest[0]:
                seat.take(number)
        else:
            task = seat.take(rest[0])
            outcome = self._answers.of_message(seat, line, message)
            self._assign()  # first: the actor need not wait for the rest
            if task is not None and not task.forgotten:
                task.done(outcome)
        self.go_on()

    # -- in the thread: losses ---------------------------------------------------------------------------------------

    def hung_up(self, seat: Seat, handle: Any) -> None:
        """The line to an actor has ended. Ray says why, unless it has gone itself."""
        self._thread.later(SETTLE_SECONDS, self.safely, self.left, seat, handle, None)

    def left(self, seat: Seat, handle: Any, error: BaseException | None) -> None:
        """An actor has died, or serves its line no more: the first chunk that it had not answered was its death."""
        if seat.handle is not handle or self.closed:  # that has been seen to
            return
        line, place = seat.line, seat.place
        assert line is not None
        assert place is not None
        line.read()  # what it has said before
        if seat.handle is not handle or self.has_gone():
            return
        why = "its connection has ended" if error is None else words_of(error)
        died = Died(seat.number, place.pid, f"{seat.name} died: {why}", 0)
        if seat.load:
            self._losses.actor(seat, handle, died, next(iter(seat.load)))
            self.go_on()
        else:  # nobody is to blame, and the next chunk asks for another one
            seat.vacate()
            seat.restarts += 1
            kill_actor(handle)

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
            self.requeue([task for ref, task in tasks if (ref, task) not in late])
        self.go_on()

    def requeue(self, tasks: list[Task]) -> None:
        """See `TaskPool`."""
        self._waiting.extendleft(task for task in reversed(tasks) if not task.forgotten)

    def _forget(self, owner: Hashable) -> None:
        self._let_go(owner)
        self._waiting = deque(task for task in self._waiting if task.owner != owner)
        self._losses.forget(owner)
        for seat in self._seats:
            refs = [ref for ref, task in seat.load.items() if task.owner == owner]
            for ref in refs:
                seat.load[ref].forgotten = True
            if seat.line is None:
                for ref in list(seat.load)[seat.side_by_side :]:  # not begun
                    if ref in refs:
                        cancel_call(ref)
            elif refs:
                seat.line.forget(refs)  # it answers with those that it had not begun
        self._assign()

    def _waits(self) -> bool:
        return bool(self._waiting or self._losses.open or any(seat.load for seat in self._seats)) and not self.closed

    def give_up(self, error: BaseException) -> None:
        """No actor can run any task, until the next run begins."""
        self._broken = error
        connected = self._membership is not None and self._membership.alive
        failed = [*self._waiting, *self._losses.take_all()]
        self._waiting.clear()
        for seat in self._seats:
            handle = seat.handle
            failed += [task for _, task in seat.vacate()]
            seat.start_failures = 0
            if handle is not None and connected:
                kill_actor(handle)
        self._membership = None
        self._hiring.forget_program()
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

    def go_on(self) -> None:
        """See `TaskPool`."""
        self._check_held()
        self._assign()

    def _check_held(self) -> None:
        for said, told in self._held.values():
            if not told and all(
                len(seat.load) <= seat.side_by_side and all(task.size == 1 for task in seat.load.values())
                for seat in self._seats
            ):
                told.append(False)
                said(False)
            if len(told) == 1 and not self._losses.open and not any(seat.load for seat in self._seats):
                told.append(True)
                said(True)

    def end(self) -> None:
        """See `RayOwner`."""
        self.closed = True
        self._waiting.clear()
        running = [seat.handle for seat in self._seats if seat.place is not None]
        starting = [seat.handle for seat in self._seats if seat.handle is not None and seat.place is None]
        for seat in self._seats:
            seat.vacate()
        self._hiring.forget_program()
        if self._membership is not None and self._membership.alive:
            for handle in starting:  # they are at nothing of the user's
                kill_actor(handle)
            end_actors(running)
        self._answers.close()
