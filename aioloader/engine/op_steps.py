"""Which neighbouring operations share a step of their window, and what that step is."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aioloader.core.limit import Limit, width_of
from aioloader.core.written import Written
from aioloader.engine.async_step import AsyncStep
from aioloader.engine.bulk_load_step import BulkLoadStep
from aioloader.engine.cache_step import CacheOp
from aioloader.engine.executor_step import ExecutorStep
from aioloader.engine.ops import InProcesses, OnRay, Op
from aioloader.engine.process_step import CHUNK_SECONDS, LONGER, ProcessStep
from aioloader.engine.ray_step import ray_step
from aioloader.engine.steps import InPlaceStep, Step
from aioloader.engine.thread_step import ThreadStep
from aioloader.engine.turns import TurnStep
from aioloader.executors.epochs import with_set_epoch
from aioloader.executors.processes.worker import Work
from aioloader.executors.processes.worker_pool import WorkerPool
from aioloader.executors.processes.worker_thread import WorkerThread

__all__ = ["steps_of"]


def steps_of(
    ops: Sequence[Op | CacheOp],
    limit: int | None,
    processes: Callable[[], WorkerThread],
    *,
    follows: bool = False,
) -> list[Step]:
    """The steps of a window.

    Neighbouring sync ops with the same place and width share a hop. A cache becomes one step around all steps before
    it.

    Args:
        ops: The window's ops.
        limit: How many entries the window holds, when that is exact: more workers would have nothing to do.
        processes: See `FusedOps.window`.
        follows: It will hold more when there is more concurrency, see `Limit`.
    """
    steps = _Steps(limit, processes, follows=follows)
    for at, op in enumerate(ops):
        if isinstance(op, CacheOp):
            steps.close()
            steps.made = [op.around(steps.made, limit)]
        elif op.many is not None:
            width = _narrowed(_width_beside(op, ops[at + 1 :]), limit)
            steps.put(BulkLoadStep(op.call, op.many, width, elastic=limit is None), op)
        elif op.in_place:
            steps.close()
            steps.put(InPlaceStep(op.fn, op.label), op)
        elif op.is_async and not isinstance(op.executor, OnRay):
            steps.close()
            width = _narrowed(op.concurrency, limit)
            steps.put(AsyncStep(op.fn, width, op.label, predicate=op.predicate, seed=op.seed), op)
            steps.made[-1].stop = op.stop
        else:
            steps.share_hop(op)
    steps.close()
    return steps.made


class _Steps:
    """The steps so far; for the arguments see `steps_of`.

    Attributes:
        made: They.
    """

    def __init__(self, limit: int | None, processes: Callable[[], WorkerThread], *, follows: bool) -> None:
        self.made: list[Step] = []
        self._limit = limit
        self._processes = processes
        self._follows = follows
        self._together: list[Op] = []  # sync ops that will share a step

    def put(self, step: Step, *ops: Op) -> None:
        """Append `step`, which calls `ops`."""
        op = ops[0]
        step.meter.address = op.address
        step.written = _written(ops)
        if op.policies is not None:
            step.obey(op.policies)
        if not self._follows:
            step.most = self._limit
        self.made.append(step)

    def share_hop(self, op: Op) -> None:
        """Call the sync `op` in a step with those before it, if they have one place."""
        if self._together and not _same_place(self._together, op):
            self.close()
        self._together.append(op)

    def close(self) -> None:
        """Make the step of the sync ops that are together so far."""
        if self._together:
            self.put(_sync_step(tuple(self._together), self._limit, self._processes), *self._together)
            self._together.clear()


def _written(ops: Sequence[Op]) -> tuple[Written, ...]:
    """Where the concurrency of `ops` is written, which share a step: at each that does not follow another one."""
    own = [op.written for op in ops if not op.flexible and op.written is not None]
    return tuple(own or [op.written for op in ops if op.written is not None][:1])


def _narrowed(width: int | Limit, limit: int | None) -> int | Limit:
    """No more than `limit`; a `Limit` stays one, and its step has `Step.most`."""
    return width if limit is None or isinstance(width, Limit) else min(width, limit)


def _width_beside(load: Op, following: Sequence[Op | CacheOp]) -> int | Limit:
    """The concurrency of `load`: what the user said, or that of the op that follows in threads, if one does."""
    if not load.flexible:
        return load.concurrency
    op = following[0] if following else None
    beside = isinstance(op, Op) and not (op.predicate or op.is_async or op.flexible) and op.executor is None
    return op.concurrency if beside and op is not None else load.concurrency


def _sync_step(together: Sequence[Op], limit: int | None, processes: Callable[[], WorkerThread]) -> Step:
    calls = [op.call for op in together]
    leading = next((op for op in together if not op.flexible), together[0])
    width = _narrowed(leading.concurrency, limit)
    executor = leading.executor
    if isinstance(executor, InProcesses):
        workers = width_of(width) if limit is None else min(width_of(width), limit)
        pool = partial(_worker_pool, processes(), executor, together, workers)
        elastic, owned = limit is None, not executor.kept
        epochs = executor.epochs(with_set_epoch(call.fn for call in calls))
        if executor.turns is not None:
            return TurnStep(calls, workers, pool, epochs, elastic=elastic, owned=owned, turns=executor.turns)
        return ProcessStep(calls, width, pool, epochs, elastic=elastic, in_turn=executor.in_turn, owned=owned)
    if isinstance(executor, OnRay):
        return ray_step(together, executor, width, limit, processes())
    if executor is not None and not isinstance(executor, ThreadPoolExecutor):
        return ExecutorStep(calls, width, executor)
    return ThreadStep(
        calls,
        width,
        elastic=limit is None,
        light=leading.light if len(together) == 1 else None,
        executor=executor,
        thread_name=leading.thread_name,
        initializer=next((op.initializer for op in together if op.initializer), None),
    )


def _worker_pool(host: WorkerThread, place: InProcesses, together: Sequence[Op], width: int) -> WorkerPool:
    """The workers of neighbouring ops: those of the previous epoch, where they are kept."""

    def make() -> WorkerPool:
        return WorkerPool(host, width, program, resumes=place.turns is None)

    def program() -> Work:
        prepare = None if place.prepare is None else place.prepare()
        epochs = place.epochs(with_set_epoch(op.fn for op in together))
        return Work(tuple(op.call for op in together), LONGER * CHUNK_SECONDS, prepare, epochs)

    if not place.kept:
        return make()
    # Another number of workers is another pool. But a `Limit` that has changed starts no more of them.
    number = None if any(isinstance(op.concurrency, Limit) for op in together) else width
    pool: WorkerPool = host.get_or_create(("pool", number, *(op.address for op in together)), make)
    return pool


def _same_place(together: Sequence[Op], op: Op) -> bool:
    if any(other.policies is not None for other in (op, *together)):
        return False
    fixed = next((other for other in together if not other.flexible), None)
    if together[0].executor != op.executor or together[0].is_async != op.is_async:
        return False
    return fixed is None or op.flexible or (fixed.concurrency, fixed.thread_name) == (op.concurrency, op.thread_name)
