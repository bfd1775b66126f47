"""A pool of workers that run one program and share the tasks submitted to it."""

import contextlib
import os
import signal
from asyncio import Future
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

from aioloader.errors import LoaderClosedError
from aioloader.executors.chunk import ChunkResult
from aioloader.executors.processes.cells import ProgressCells
from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.layout import Layout, lay_out
from aioloader.executors.processes.stored import StoredProgram
from aioloader.executors.processes.wire import Message, can_pickle_by_value, encode
from aioloader.executors.processes.worker import Program
from aioloader.executors.processes.worker_thread import Worker, WorkerThread
from aioloader.executors.threads import call_loop

__all__ = ["Broken", "Died", "NotSent", "Outcome", "WorkerPool"]

TASKS_PER_WORKER: Final = 2  # one that it runs, and one to go on with
MAX_IDLE_DEATHS: Final = 3  # workers that may die with a task that they had not begun, before the task is blamed


@dataclass(frozen=True)
class NotSent:
    """The task or its result could not be pickled."""

    error: BaseException


@dataclass(frozen=True)
class Died:
    """The worker died, for `reason`, while it worked on the value with the index `at` of the task.

    `expired`: it was killed, since that took too long. `sample`: the value is a batch, and it was at that sample of it.
    `sure`: it was this task, and no other one that it had.
    """

    slot: int
    pid: int | None
    reason: str
    at: int
    expired: bool = False
    sample: int | None = None
    sure: bool = True


@dataclass(frozen=True)
class Broken:
    """No worker can run any task: the program cannot be sent or loaded, or no process can be started."""

    error: BaseException


Outcome = ChunkResult | NotSent | Died | Broken


@dataclass(eq=False)
class _Task:
    owner: Hashable
    values: Any
    done: Callable[[Outcome], None]
    slot: int | None
    layout: Layout = ()
    pieces: Sequence[Any] = ()
    forgotten: bool = False
    expired: bool = False
    idle_deaths: int = 0


@dataclass(eq=False)
class _Hold:
    """Somebody holds the pool. `workers` have not said that no call is under way in them."""

    number: int
    workers: set[Worker]
    said: Callable[[bool], None]
    told: bool = False

    def check(self) -> None:
        if not self.workers and not self.told:
            self.told = True
            self.said(True)


class WorkerPool:
    """At most `count` workers.

    Their program is made at the first task, in the worker thread, where it is pickled. If the pool `resumes`, tasks of
    a worker that died are given to others; it must not where each worker has state of its own.
    """

    def __init__(
        self, worker_thread: WorkerThread, count: int, make_program: Callable[[], Program], *, resumes: bool = True
    ) -> None:
        self._worker_thread = worker_thread
        self._make_program = make_program
        self._resumes = resumes
        self._workers: list[Worker | None] = [None] * count  # by slot
        self._tasks_of: dict[Worker, OrderedDict[int, _Task]] = {}  # by number, in the order they were sent
        self._waiting: deque[_Task] = deque()
        self._last_number = 0
        self._program: StoredProgram | None = None
        self._progress: ProgressCells | None = None  # written by the workers, and still there when they have died
        self._closed = False
        self._held: dict[Hashable, _Hold] = {}  # by owner
        self._killed: set[Worker] = set()  # since a value took too long
        self._loop: Any = None
        self.learned: tuple[float | None, float | None] = None, None  # see `ChunkPool`
        self.ended: Future[None] | None = None

    # -- in any thread -----------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Workers that there may be."""
        return len(self._workers)

    def hold(self, owner: Hashable, said: Callable[[bool], None]) -> None:
        """Let no worker begin a value, until all owners have let go.

        Args:
            owner: Identifies who holds.
            said: Called in the worker thread: with False when none begins any more, and with True when no call is under
                way in any worker either, and all results of before have been given.
        """
        self._worker_thread.call(self._hold, owner, said)

    def let_go(self, owner: Hashable) -> None:
        """See `hold`."""
        self._worker_thread.call(self._let_go, owner)

    def submit(
        self, owner: Hashable, values: Sequence[Any], done: Callable[[Outcome], None], slot: int | None = None
    ) -> None:
        """Let a worker run the program on `values`.

        Args:
            owner: Identifies the task for `forget`.
            values: What the program takes.
            done: Called once, in the worker thread, unless the owner forgets the task.
            slot: The worker that runs it; None: the one with the fewest tasks.
        """
        self._worker_thread.call(self._submit, _Task(owner, values, done, slot))

    def forget(self, owner: Hashable) -> None:
        """Drop the tasks of `owner`: those not yet begun are not run, and the results of the others are ignored."""
        self._worker_thread.call(self._forget, owner)

    def expire(self, owner: Hashable, seconds: float) -> None:
        """Kill the workers that have been at one value of `owner` for so long."""
        self._worker_thread.call(self._expire, owner, seconds)

    def prepare(self) -> None:
        """Start the fork server, which may take seconds, before the first task is there."""
        self._worker_thread.call(self._prepare)

    def close(self) -> None:
        """End the workers: idle ones now, busy ones after their task or a grace period. Idempotent."""
        if not self._closed:
            self._closed = True
            self._worker_thread.call(self._close)

    def end_on(self, loop: Any) -> None:
        """Complete `ended` on this loop when the workers have ended after `close`."""
        self._loop = loop
        self.ended = loop.create_future()

    @property
    def gone(self) -> bool:
        """Whether the pool is closed and all workers have ended."""
        return self.ended is not None and self.ended.done()

    def alive(self) -> list[str]:
        """The names of the workers."""
        return [f"worker process {worker.pid}" for worker in self._workers if worker is not None]

    def at_work(self, owner: Hashable) -> list[tuple[Any, int, float]]:
        """For each worker that runs a task of `owner`: its values, the index of the one at hand, and since when."""
        progress, found = self._progress, []
        for slot, worker in enumerate(list(self._workers)):
            tasks = None if worker is None else self._tasks_of.get(worker)
            if progress is None or tasks is None:
                continue
            for _ in range(3):  # until the worker has not moved on meanwhile
                number, at = progress.read(slot)
                since = progress.since(slot)
                if progress.read(slot) == (number, at):
                    break
            task = tasks.get(number)
            if task is not None and task.owner == owner and not task.forgotten:
                found.append((task.values, at, since))
        return found

    # -- in the worker thread ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        with contextlib.suppress(OSError):  # the first task raises it again
            if not (self._closed or self._worker_thread.closed):
                self._worker_thread.begin()

    def _submit(self, task: _Task) -> None:
        if self._closed or self._worker_thread.closed:
            task.done(Broken(_closed()))
            return
        try:
            stream, buffers = encode(task.values)
        except BaseException as error:
            task.done(NotSent(cannot_travel("a sample", error, by_value=can_pickle_by_value())))
            return
        task.layout, task.pieces = lay_out([*buffers, stream])
        self._waiting.append(task)
        self._assign()

    def _hold(self, owner: Hashable, said: Callable[[bool], None]) -> None:
        """See `hold`. Those that are started from now on find it written, and need not be asked."""
        if self._closed or self._worker_thread.closed:
            said(False)
            said(True)
            return
        if self._progress is not None:
            self._progress.held = True
        self._last_number += 1
        hold = self._held[owner] = _Hold(self._last_number, set(self._tasks_of), said)
        said(False)
        for worker in self._tasks_of:
            worker.send(("held", hold.number))
        hold.check()

    def _let_go(self, owner: Hashable) -> None:
        if self._held.pop(owner, None) is None or self._held:
            return
        if self._progress is not None:
            self._progress.held = False
        for worker in self._tasks_of:
            worker.send(("let go",))  # those that wait for it look again

    def _expire(self, owner: Hashable, seconds: float) -> None:
        progress = self._progress
        if progress is None:
            return
        for slot, worker in enumerate(self._workers):
            if worker is None or worker.pid is None:
                continue
            number, _ = progress.read(slot)
            task = self._tasks_of[worker].get(number)
            if task is None or task.owner != owner or task.forgotten or task.expired:
                continue
            if perf_counter() - progress.since(slot) >= seconds:
                task.expired = True
                self._killed.add(worker)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

    def _is_still(self, worker: Worker, number: int | None = None) -> None:
        """No call is under way in `worker`, as it answered to hold `number`; None: it has died."""
        for hold in list(self._held.values()):
            if number in (None, hold.number):
                hold.workers.discard(worker)
                hold.check()

    def _assign(self) -> None:
        """Give waiting tasks to workers."""
        while self._waiting and not self._closed:
            slot = self._waiting[0].slot
            if slot is None:
                slot = min(range(len(self._workers)), key=self._load)
                if self._load(slot) >= TASKS_PER_WORKER:
                    return
            try:
                self._send(self._worker(slot), self._waiting.popleft())
            except BaseException as error:  # the program cannot be pickled, or no process can be started
                self._break(error)
                return

    def _load(self, slot: int) -> int:
        worker = self._workers[slot]
        return 0 if worker is None else len(self._tasks_of[worker])

    def _send(self, worker: Worker, task: _Task) -> None:
        self._last_number += 1
        self._tasks_of[worker][self._last_number] = task
        worker.send(("task", self._last_number, worker.freed(), task.layout), task.pieces)

    def _worker(self, slot: int) -> Worker:
        """The worker in `slot`, started if there is none."""
        worker = self._workers[slot]
        if worker is None:
            if self._program is None:
                self._program = StoredProgram(self._make_program())
            if self._progress is None:
                self._progress = ProgressCells.create(len(self._workers))
                self._progress.held = bool(self._held)
            self._progress.clear(slot)
            worker = self._worker_thread.spawn(self, slot, self._program.modules)
            self._workers[slot] = worker
            self._tasks_of[worker] = OrderedDict()
            self._program.send_to(worker, self._progress.descriptor(), slots=len(self._workers))
        return worker

    def _forget(self, owner: Hashable) -> None:
        self._let_go(owner)
        self._waiting = deque(task for task in self._waiting if task.owner != owner)
        for worker, tasks in self._tasks_of.items():
            numbers = [number for number, task in tasks.items() if task.owner == owner]
            for number in numbers:
                tasks[number].forgotten = True
            if numbers:  # the worker answers with those that it had not begun; the others come back as usual
                worker.send(("forget", numbers))

    def received(self, worker: Worker, message: Message) -> None:
        kind, *rest = message.head
        if kind == "broken":
            error = worker.unpack(message)
            self._break(error)
            return
        if kind == "still":
            self._is_still(worker, rest[0])
            return
        tasks = self._tasks_of[worker]
        if kind == "skipped":
            for number in rest[0]:
                tasks.pop(number, None)
            self._assign()
            return
        task = tasks.pop(rest[0], None)
        outcome: Outcome
        try:
            value = worker.unpack(message)
            outcome = ChunkResult(*value) if kind == "done" else NotSent(value)
        except BaseException as error:
            outcome = NotSent(cannot_travel("a result", error, by_value=can_pickle_by_value()))
        self._assign()
        if task is not None and not task.forgotten:
            task.done(outcome)

    def died(self, worker: Worker, reason: str) -> None:
        tasks = self._tasks_of.pop(worker)
        if self._workers[worker.slot] is worker:
            self._workers[worker.slot] = None
        wanted = {number: task for number, task in tasks.items() if not task.forgotten}
        if self._closed or self._worker_thread.closed:
            for task in wanted.values():
                task.done(Broken(_closed()))
            if not self._tasks_of:
                self._end()
            return
        sample = None if self._progress is None else self._progress.sample(worker.slot)
        lost = self._take_lost(worker, tasks, wanted)
        self._waiting.extendleft(reversed(wanted.values()))  # not begun: another worker runs them
        if worker in self._killed:
            # It had gone on to another task just before: that one is not to blame, and is run once more.
            self._killed.discard(worker)
            self._waiting.extendleft(task for task, _ in lost if not task.expired)
            lost = [(task, at) for task, at in lost if task.expired]
        for task, at in lost:
            task.done(Died(worker.slot, worker.pid, reason, at, task.expired, sample))
        self._is_still(worker)
        self._assign()

    def _take_lost(
        self, worker: Worker, tasks: OrderedDict[int, _Task], wanted: dict[int, _Task]
    ) -> list[tuple[_Task, int]]:
        """Remove from `wanted` what died with `worker`; returns these tasks, and where in each the worker was."""
        if not self._resumes:
            lost = [(task, 0) for task in wanted.values()]
            wanted.clear()
            return lost
        begun, at = (0, 0) if self._progress is None else self._progress.read(worker.slot)
        if begun in tasks:
            return [(wanted.pop(begun), at)] if begun in wanted else []
        if wanted:
            # The worker had begun nothing: it was killed while idle, or every worker dies at its start. Trying again is
            # right in the first case, and in the second one too, if not for ever.
            number, task = next(iter(wanted.items()))
            task.idle_deaths += 1
            if task.idle_deaths >= MAX_IDLE_DEATHS:
                return [(wanted.pop(number), 0)]
        return []

    def _break(self, error: BaseException) -> None:
        failed = [*self._waiting, *(task for tasks in self._tasks_of.values() for task in tasks.values())]
        self._waiting.clear()
        for tasks in self._tasks_of.values():
            tasks.clear()
        for slot, worker in enumerate(self._workers):
            if worker is not None:
                worker.close()
                self._workers[slot] = None  # the next task gets a new one
        for task in failed:
            if not task.forgotten:
                task.done(Broken(error))

    def _close(self) -> None:
        for owner in list(self._held):
            self._let_go(owner)
        self._waiting.clear()
        for worker in self._tasks_of:
            worker.close()
        if not self._tasks_of:
            self._end()

    def _end(self) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        if self.ended is not None:
            call_loop(self._loop, _complete, self.ended)


def _closed() -> LoaderClosedError:
    return LoaderClosedError("the loader was closed while its worker processes had something to do")


def _complete(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)
