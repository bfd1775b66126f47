"""Workers that share one program and the tasks that are submitted to it."""

import contextlib
from asyncio import Future
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aioloader.errors import LoaderClosedError
from aioloader.executors.chunk import ChunkResult
from aioloader.executors.processes.cells import ProgressCells
from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.stored import StoredProgram
from aioloader.executors.processes.wire import Message, can_pickle_by_value, encode
from aioloader.executors.processes.worker import Program, lay_out
from aioloader.executors.processes.worker_thread import Worker, WorkerThread
from aioloader.executors.threads import call_loop

__all__ = ["Broken", "Died", "NotSent", "Outcome", "WorkerPool"]

DEPTH: Final = 2  # tasks at a worker: one that it works on, one that it goes on with
TRIES: Final = 3  # workers that may die with a task that they had not begun, before it is the task that is to blame


@dataclass(frozen=True)
class NotSent:
    """The task could not cross, there or back.

    Attributes:
        error: Why.
    """

    error: BaseException


@dataclass(frozen=True)
class Died:
    """The worker died while it had the task.

    Attributes:
        slot: Its number.
        pid: Its process id.
        reason: How it ended, in words.
        at: Which of the task's values it was at.
    """

    slot: int
    pid: int | None
    reason: str
    at: int


@dataclass(frozen=True)
class Broken:
    """No worker can do any task: the program cannot be sent, loaded, or started.

    Attributes:
        error: Why.
    """

    error: BaseException


Outcome = ChunkResult | NotSent | Died | Broken


@dataclass(eq=False)
class _Task:
    owner: Hashable
    values: Any
    done: Callable[[Outcome], None]
    slot: int | None
    parts: list[Any] = field(default_factory=list)
    layout: list[tuple[int, int]] = field(default_factory=list)
    stream_at: int = 0
    forgotten: bool = False
    tries: int = 0


class WorkerPool:
    """At most `count` workers.

    Args:
        host: Runs them.
        count: How many workers there may be.
        make_program: Gives what they do; called at the first task, in the thread of `host`, for there it is pickled.
        resumes: Another worker may do what one that died has left undone; False: where it stood is known to it alone.
    """

    def __init__(
        self, host: WorkerThread, count: int, make_program: Callable[[], Program], *, resumes: bool = True
    ) -> None:
        self._host = host
        self._make_program = make_program
        self._resumes = resumes
        self._slots_of_workers: list[Worker | None] = [None] * count
        self._loads: dict[Worker, OrderedDict[int, _Task]] = {}
        self._waiting: deque[_Task] = deque()
        self._number = 0
        self._program: StoredProgram | None = None
        self._progress: ProgressCells | None = None  # the workers write to it; it outlives them
        self._closed = False
        self._loop: Any = None
        self.ended: Future[None] | None = None

    # -- any thread --------------------------------------------------------------------------------------------------

    def submit(
        self, owner: Hashable, values: Sequence[Any], done: Callable[[Outcome], None], slot: int | None = None
    ) -> None:
        """Let a worker do `values`.

        Args:
            owner: For `forget`.
            values: A list for the program.
            done: Called once, in the thread of the host, unless the owner forgets it.
            slot: Which worker does it; None: the one that has least to do.
        """
        self._host.call(self._submit, _Task(owner, values, done, slot))

    def forget(self, owner: Hashable) -> None:
        """What this owner submitted is of no use any more: what was not begun is not done."""
        self._host.call(self._forget, owner)

    def prepare(self) -> None:
        """Start what takes longer than there being something for the workers to do: that which they are forked from."""
        self._host.call(self._prepare)

    def close(self) -> None:
        """End the workers: idle ones now, busy ones after their task or a moment of grace. Idempotent."""
        if not self._closed:
            self._closed = True
            self._host.call(self._close)

    def end_on(self, loop: Any) -> None:
        """Complete `ended` on this loop when the workers have ended after `close`."""
        self._loop = loop
        self.ended = loop.create_future()

    @property
    def gone(self) -> bool:
        """Closed, and all workers have ended."""
        return self.ended is not None and self.ended.done()

    def alive(self) -> list[str]:
        """Names of the workers."""
        return [f"worker process {worker.pid}" for worker in self._slots_of_workers if worker is not None]

    # -- in the host's thread ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        with contextlib.suppress(OSError):  # it comes again with the first task
            if not (self._closed or self._host.closed):
                self._host.begin()

    def _submit(self, task: _Task) -> None:
        if self._closed or self._host.closed:
            task.done(Broken(_closed()))
            return
        try:
            stream, buffers = encode(task.values)
        except BaseException as error:
            task.done(NotSent(cannot_travel("a sample", error, by_value=can_pickle_by_value())))
            return
        task.layout, task.parts = lay_out(buffers)
        task.stream_at = sum(map(len, task.parts))
        task.parts.append(stream)
        self._waiting.append(task)
        self._assign()

    def _assign(self) -> None:
        """Give waiting tasks to workers."""
        while self._waiting and not self._closed:
            slot = self._waiting[0].slot
            if slot is None:
                slot = min(range(len(self._slots_of_workers)), key=self._load)
                if self._load(slot) >= DEPTH:
                    return
            try:
                self._give(self._slot(slot), self._waiting.popleft())
            except BaseException as error:  # the program cannot be pickled, or nothing can be started
                self._break(error)
                return

    def _load(self, slot: int) -> int:
        worker = self._slots_of_workers[slot]
        return 0 if worker is None else len(self._loads[worker])

    def _give(self, worker: Worker, task: _Task) -> None:
        self._number += 1
        self._loads[worker][self._number] = task
        worker.send(("task", self._number, worker.freed(), task.stream_at, task.layout), task.parts)

    def _slot(self, slot: int) -> Worker:
        """The worker of a slot, a new one if need be."""
        worker = self._slots_of_workers[slot]
        if worker is None:
            if self._program is None:
                self._program = StoredProgram(self._make_program())
            if self._progress is None:
                self._progress = ProgressCells.create(len(self._slots_of_workers))
            self._progress.clear(slot)
            worker = self._host.spawn(self, slot, self._program.modules)
            self._slots_of_workers[slot] = worker
            self._loads[worker] = OrderedDict()
            self._program.send_to(worker, self._progress.descriptor(), slots=len(self._slots_of_workers))
        return worker

    def _forget(self, owner: Hashable) -> None:
        self._waiting = deque(task for task in self._waiting if task.owner != owner)
        for worker, load in self._loads.items():
            numbers = [number for number, task in load.items() if task.owner == owner]
            for number in numbers:
                load[number].forgotten = True
            if numbers:  # it says which of them it had not begun; the others come back
                worker.send(("forget", numbers))

    def received(self, worker: Worker, message: Message) -> None:
        """See `Owner`."""
        kind, *rest = message.head
        if kind == "broken":
            error = worker.unpack(message)
            self._break(error)
            return
        load = self._loads[worker]
        if kind == "skipped":
            for number in rest[0]:
                load.pop(number, None)
            self._assign()
            return
        task = load.pop(rest[0], None)
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
        """See `Owner`."""
        load = self._loads.pop(worker)
        if self._slots_of_workers[worker.slot] is worker:
            self._slots_of_workers[worker.slot] = None
        tasks = {number: task for number, task in load.items() if not task.forgotten}
        if self._closed or self._host.closed:
            for task in tasks.values():
                task.done(Broken(_closed()))
            if not self._loads:
                self._end()
            return
        lost: list[tuple[_Task, int]] = []
        if not self._resumes:
            lost = [(task, 0) for task in tasks.values()]
            tasks = {}
        elif (begun := self._begun(worker)) is not None and begun[0] in load:
            number, at = begun
            if number in tasks:
                lost = [(tasks.pop(number), at)]
        elif tasks:
            # It had begun nothing: somebody killed it while it was idle, or it dies whenever it starts. Trying again is
            # right for the one, and for the other, too, if it comes to an end.
            number, task = next(iter(tasks.items()))
            task.tries += 1
            if task.tries >= TRIES:
                lost = [(tasks.pop(number), 0)]
        self._waiting.extendleft(reversed(tasks.values()))  # not begun: another worker does them
        for task, at in lost:
            task.done(Died(worker.slot, worker.pid, reason, at))
        self._assign()

    def _begun(self, worker: Worker) -> tuple[int, int] | None:
        return self._progress.read(worker.slot) if self._progress is not None else None

    def _break(self, error: BaseException) -> None:
        tasks = [*self._waiting, *(task for load in self._loads.values() for task in load.values())]
        self._waiting.clear()
        for load in self._loads.values():
            load.clear()
        for slot, worker in enumerate(self._slots_of_workers):
            if worker is not None:
                worker.close()
                self._slots_of_workers[slot] = None  # the next task gets a new one
        for task in tasks:
            if not task.forgotten:
                task.done(Broken(error))

    def _close(self) -> None:
        self._waiting.clear()
        for worker in self._loads:
            worker.close()
        if not self._loads:
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
