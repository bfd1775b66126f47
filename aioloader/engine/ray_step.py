"""The step whose calls run in actors of a Ray cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from aioloader.core.entry import Entry
from aioloader.core.limit import Limit, width_of
from aioloader.core.policies import Policies
from aioloader.core.safe_text import safe_repr
from aioloader.engine.deaths import named
from aioloader.engine.ops import OnRay, Op
from aioloader.engine.process_step import LONGER, MORE_DEATHS, ProcessStep
from aioloader.engine.sent import unstamp
from aioloader.engine.step_protocols import StepWindow
from aioloader.engine.steps import Forward
from aioloader.errors import WorkerDiedError
from aioloader.executors.chunk import Call, ChunkResult
from aioloader.executors.epochs import Epochs, with_set_epoch
from aioloader.executors.partial import KeysLeft, LeavesOut, LeftOut
from aioloader.executors.processes.worker_pool import Died, Outcome
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.executors.ray.actor_pool import ActorPool
from aioloader.executors.ray.answers import RayResult
from aioloader.executors.ray.program import Parcel, RayProgram
from aioloader.executors.ray.thread import ray_thread_of

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["RayStep", "ray_step"]

CHUNK_SECONDS: Final = 0.08  # the work that one call of an actor should be worth: both sides spend a millisecond on it
CHUNK_BYTES: Final = 16 << 20  # of results, at most
QUEUE_SECONDS: Final = 0.1  # chunks that take longer are not queued after one another


class RayStep(ProcessStep):
    """Runs calls in actors, in chunks, as `ProcessStep` does in worker processes.

    A call of Ray costs about a millisecond, and more on a network, so a chunk is worth eighty.

    What when an actor dies? Nobody knows at which sample of its chunk it was, since what it knew died with it. So each
    of them is made again alone, in an actor that has nothing else. One whose actor dies again, more often than
    `retries` allows, is to blame, and fails at its place. Unlike a process of this machine, an actor may die by no
    fault of any sample (its machine is gone), so nobody fails by the first death. A batch that is to blame and can do
    without samples is searched for them: each is loaded alone, and the batch is made again without those that end
    their actors.

    Args:
        calls: All sync or all async.
        concurrency: Samples under way; of sync calls, this many actors.
        pool: Gives the actors when the run begins.
        epochs: See `ProcessStep`.
        elastic: See `SyncStep`.
        retries: See `RayWorkers`.
        awaits: The calls are async.
    """

    chunk_seconds = CHUNK_SECONDS
    queue_seconds = QUEUE_SECONDS

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
        self._searches: dict[int, _Search] = {}  # likewise
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

    def bind(self, run: "Run", window: StepWindow, forward: Forward, finished: Forward) -> None:
        super().bind(run, window, forward, finished)
        self.meter.actors = self._actors.actors

    def close(self) -> None:
        super().close()
        self._losses.clear()
        self._searches.clear()

    def _fitting(self, size: int) -> int:
        sample_bytes = self._actors.sample_bytes
        return size if not sample_bytes else max(1, min(size, int(CHUNK_BYTES / sample_bytes)))

    def _quick(self, size: int) -> bool:
        return self.timeout is None and super()._quick(size)  # an actor that is killed takes all that it has with it

    def _makes_whole_batches(self) -> bool:
        return self._actors.on_this_host and super()._makes_whole_batches()

    def dispatch(self) -> None:
        if self._losses and not self.paused:  # a pause may have put them among the others
            alone = [entry for entry in self.inbox if id(entry) in self._losses]
            for entry in alone:
                self.inbox.remove(entry)
            self._again.extend((entry, None) for entry in alone)
        super().dispatch()

    def _payload(self, chunk: list[Entry]) -> Any:
        alone = bool(self._losses) and any(id(entry) in self._losses for entry in chunk)
        return Parcel(super()._payload(chunk), self._quick(self._size), alone)

    def _back(self, chunk: list[Entry], slot: int | None, outcome: Outcome) -> None:
        search = self._searches.get(id(chunk[0])) if self._searches else None
        if search is not None and isinstance(outcome, ChunkResult | Died) and not self.closed:
            self._came_back(chunk, slot)
            self._searched(chunk[0], search, outcome)
            return
        if self._losses and not (isinstance(outcome, Died) and not outcome.expired):
            for entry in chunk:
                self._losses.pop(id(entry), None)
                self._searches.pop(id(entry), None)
        if isinstance(outcome, RayResult):
            self.meter.timeouts += outcome.timeouts
        super()._back(chunk, slot, outcome)

    def _died(self, chunk: list[Entry], slot: int | None, death: Died) -> None:
        if death.expired:
            self._timed_out(chunk[0], death)
            return
        if self._too_many_deaths(death):
            return
        unstamp(chunk, 0, len(chunk))  # their newest beginning counts
        exact = len(chunk) == 1 and death.sure
        for entry in chunk:
            losses = self._losses.pop(id(entry), 0) + 1
            if exact and losses > self._retries:
                self._blame(entry, death)
                return
            self._make_again(entry, losses)
        self._landed((), ChunkResult([], 0.0, 0.0))

    def _too_many_deaths(self, death: Died) -> bool:
        self._deaths += 1
        chances = 1 + max(self._retries, 1)  # nobody may be sure before it is alone
        if self._deaths <= chances * self.concurrency + MORE_DEATHS:
            return False
        self._run.fail(
            WorkerDiedError(
                f"{self._deaths} Ray workers in a row died and none got anything done; the last one, {death.reason}"
                f"; run {self._calls[0].label} in this process to see why"
            )
        )
        return True

    def _make_again(self, entry: Entry, losses: int) -> None:
        """Alone, since actors have died with it."""
        self._losses[id(entry)] = losses
        entry.attempts += 1
        self._again.append((entry, None))

    def _blame(self, entry: Entry, death: Died) -> None:
        """An entry has cost too many actors: it fails, or its samples are tried one by one."""
        error = WorkerDiedError(f"{death.reason}; it was making {named(entry)}, in attempt {entry.attempts}")
        fn: Any = self._calls[0].fn
        left = fn.without(entry.value, None, error) if isinstance(fn, LeavesOut) else None
        if left is None:
            self._lost([entry], error)
            return
        self._searches[id(entry)] = _Search(left.keys, error)
        entry.value = KeysLeft(left.keys, only=0)
        self._make_again(entry, self._retries)
        self._landed((), ChunkResult([], 0.0, 0.0))

    def _searched(self, entry: Entry, search: "_Search", outcome: ChunkResult | Died) -> None:
        """A sample of a batch was tried: go on with the next one, or make the batch without those that are to blame."""
        if isinstance(outcome, Died):
            if self._too_many_deaths(outcome):
                return
            key = (entry.key if type(entry.key) is list else search.keys)[search.at]
            error = WorkerDiedError(f"{outcome.reason}, with key {safe_repr(key)}")
            search.left_out.append(LeftOut(search.at, error))
        else:
            self._deaths = 0
        search.at += 1
        if search.at < len(search.keys):
            entry.value = KeysLeft(search.keys, only=search.at)
            self._again.append((entry, None))
        else:
            del self._searches[id(entry)]
            self._losses.pop(id(entry), None)
            if not search.left_out:  # it was none of them alone
                self._lost([entry], search.error)
                return
            entry.value = KeysLeft(search.keys, search.left_out)
            self._make_again(entry, self._retries)
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


@dataclass
class _Search:
    """Which samples of a batch end their actors.

    Attributes:
        keys: Of all of them.
        error: What the batch fails with if it is none of them alone.
        at: The one that is tried.
        left_out: Those that were to blame.
    """

    keys: Sequence[Any]
    error: WorkerDiedError
    at: int = 0
    left_out: list[LeftOut] = field(default_factory=list)


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
            LONGER * CHUNK_SECONDS,
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
