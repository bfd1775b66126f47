"""The step whose calls run in actors of a Ray cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from aioloader.core.entry import Entry
from aioloader.core.limit import Limit, width_of
from aioloader.core.policies import Policies
from aioloader.engine.process_step import CHUNK_SAMPLES, MORE_DEATHS, ProcessStep, named, unstamp
from aioloader.engine.steps import Forward
from aioloader.errors import WorkerDiedError
from aioloader.executors.chunk import Call, ChunkResult
from aioloader.executors.epochs import Epochs, epochs_of, with_set_epoch
from aioloader.executors.processes.worker_pool import Died, Outcome
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.executors.ray.actor_pool import ActorPool, RayResult
from aioloader.executors.ray.program import Parcel, RayProgram
from aioloader.executors.ray.thread import ray_thread_of
from aioloader.executors.ray.workers import RayWorkers

if TYPE_CHECKING:
    from aioloader.engine.ops import Op
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["OnRay", "RayStep", "ray_step"]

CHUNK_SECONDS: Final = 0.02  # the work that one call of an actor should be worth: it costs about a millisecond
CHUNK_BYTES: Final = 16 << 20  # of results, at most
QUEUE_SECONDS: Final = 0.1  # chunks that take longer are not queued after one another


@dataclass(frozen=True)
class OnRay:
    """Runs functions in actors of a Ray cluster.

    Args:
        workers: What the actors need.
        prepare: See `InProcesses`.
        epochs: See there.
        seeds_each: The global generators are seeded for each call, so that what is drawn from them does not depend on
            who makes it.
    """

    workers: RayWorkers
    prepare: Callable[[], Callable[[int], None] | None] | None = None
    epochs: Callable[[Sequence[Any]], Epochs] = epochs_of
    seeds_each: bool = False


class RayStep(ProcessStep):
    """Runs calls in actors, in chunks, as `ProcessStep` does in worker processes.

    A hop costs about a millisecond, and more on a network, so a chunk is worth twenty.

    What when an actor dies? Nobody knows at which sample of its chunk it was, since what it knew died with it. So each
    of them is made again alone, in an actor that has nothing else. One whose actor dies again, more often than
    `retries` allows, is to blame, and fails at its place. Unlike a process of this machine, an actor may die by no
    fault of any sample (its machine is gone), so nobody fails by the first death.

    Args:
        calls: All sync or all async.
        concurrency: Samples under way; of sync calls, this many actors.
        pool: Gives the actors when the run begins.
        epochs: See `ProcessStep`.
        elastic: See `SyncStep`.
        retries: See `RayWorkers`.
        awaits: The calls are async.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        concurrency: int | Limit,
        pool: Callable[[], ActorPool],
        epochs: Epochs,
        *,
        elastic: bool,
        retries: int,
        awaits: bool,
    ) -> None:
        super().__init__(calls, concurrency, self._keep_pool, epochs, elastic=elastic)
        self.meter.kind = "ray"
        self._make_actors = pool
        self._retries = retries
        self._awaits = awaits
        self._losses: dict[int, int] = {}  # by the `id` of an entry: how many actors died with it
        self._said_timeout: float | None = None
        self._actors: ActorPool

    def _keep_pool(self) -> ActorPool:
        self._actors = self._make_actors()
        return self._actors

    def obey(self, policies: Policies) -> None:
        super().obey(policies)
        self._said_timeout = policies.timeout
        if self._awaits and self.timeout is not None:
            self.timeout = 2 * self.timeout + 5.0  # its own loop cancels it in time, unless the function blocks it

    def bind(self, run: "Run", window: "Window", forward: Forward, finished: Forward) -> None:
        super().bind(run, window, forward, finished)
        self.meter.actors = self._actors.actors
        self._seconds_each = self._actors.seconds_each  # as in the epoch before: its first chunks are large enough

    def close(self) -> None:
        super().close()
        self._losses.clear()

    @property
    def _size(self) -> int:
        cost = self._seconds_each
        if cost is None or self.timeout is not None:
            return 1
        size = max(1, min(CHUNK_SAMPLES, int(CHUNK_SECONDS / max(cost, 1e-9))))
        if sample_bytes := self._actors.sample_bytes:
            size = max(1, min(size, int(CHUNK_BYTES / sample_bytes)))
        return size if self._elastic else min(size, max(1, self.meter.room // (2 * self.concurrency)))

    @property
    def _quick(self) -> bool:
        """Whether chunks are done so soon that one may wait after another one in the same actor."""
        cost = self._seconds_each
        return self.timeout is None and cost is not None and cost * self._size < QUEUE_SECONDS

    @property
    def _places(self) -> int:
        return self.concurrency * 2 if self._quick else self.concurrency

    def _payload(self, chunk: list[Entry]) -> Any:
        alone = bool(self._losses) and any(id(entry) in self._losses for entry in chunk)
        return Parcel(super()._payload(chunk), self._quick, alone)

    def _back(self, chunk: list[Entry], slot: int | None, outcome: Outcome) -> None:
        if self._losses and not isinstance(outcome, Died):
            for entry in chunk:
                self._losses.pop(id(entry), None)
        if isinstance(outcome, RayResult):
            self.meter.timeouts += outcome.timeouts
        super()._back(chunk, slot, outcome)
        self._actors.seconds_each = self._seconds_each

    def _died(self, chunk: list[Entry], slot: int | None, death: Died) -> None:
        if death.expired:
            self._timed_out(chunk[0], death)
            return
        self._deaths += 1
        if self._deaths > (self._retries + 1) * self.concurrency + MORE_DEATHS:
            self._run.fail(
                WorkerDiedError(
                    f"{self._deaths} Ray workers in a row died and none got anything done; the last one, {death.reason}"
                    f"; run {self._calls[0].label} in this process to see why"
                )
            )
            return
        unstamp(chunk, 0, len(chunk))  # their newest beginning counts
        lost = []
        for entry in chunk:
            losses = self._losses.pop(id(entry), 0) + 1
            if len(chunk) == 1 and losses > self._retries:
                lost.append(entry)
                continue
            self._losses[id(entry)] = losses
            entry.attempts += 1
            self._again.append((entry, None))
        if lost:
            words = f"{death.reason}; it was making {named(lost[0])}, in attempt {lost[0].attempts}"
            self._lost(lost, WorkerDiedError(words))
        else:
            self._landed((), ChunkResult([], 0.0, 0.0))

    def _timed_out(self, entry: Entry, death: Died) -> None:
        self.meter.timeouts += 1
        seconds = self._said_timeout
        self._lost(
            [entry],
            TimeoutError(
                f"{self._calls[0].label} took longer than {self._timeout_name}={seconds:g} s; {death.reason} was killed"
            ),
        )


def ray_step(
    together: "Sequence[Op]", place: OnRay, width: int | Limit, limit: int | None, host: WorkerThread
) -> RayStep:
    """The step of neighbouring ops that run in actors.

    Args:
        together: They, all sync or all async.
        place: Where.
        width: Their concurrency.
        limit: See `steps_of`.
        host: Of the loader.
    """
    workers = width_of(width) if limit is None else min(width_of(width), limit)
    policies = together[0].policies
    awaits = together[0].is_async
    key = ("pool", *(op.address for op in together))

    def program() -> RayProgram:
        prepare = None if place.prepare is None else place.prepare()
        return RayProgram(
            tuple(op.call for op in together),
            2 * CHUNK_SECONDS,
            prepare,
            place.epochs(with_set_epoch(op.fn for op in together)),
            max(1, int(place.workers.cpus)),
            str(torch.get_default_dtype()).removeprefix("torch."),
            None if policies is None or not awaits else policies.timeout,
            "timeout" if policies is None else policies.timeout_name,
            seeds_each=place.seeds_each,
        )

    def pool() -> ActorPool:
        thread = ray_thread_of(host)
        make = partial(ActorPool, thread, workers, program, place.workers, awaits=awaits)
        found: ActorPool = thread.get_or_create(key, make)
        return found

    return RayStep(
        [op.call for op in together],
        width,
        pool,
        place.epochs(with_set_epoch(op.fn for op in together)),
        elastic=limit is None,
        retries=place.workers.retries,
        awaits=awaits,
    )
