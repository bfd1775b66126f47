"""Loading several samples by one call, where a dataset offers that and it is worth it."""

from collections.abc import Callable, Sequence
from contextvars import copy_context
from itertools import islice
from math import inf
from time import perf_counter, thread_time
from typing import Any, Final

from aioloader.core.limit import Limit
from aioloader.engine.node import CHUNK_SECONDS
from aioloader.engine.thread_step import ThreadJob, ThreadStep
from aioloader.executors.chunk import Call, ChunkResult, Failed, apply_chunk
from aioloader.executors.current_sample import BulkLoad, SampleContext, current_sample
from aioloader.executors.threads import call_loop

__all__ = ["BulkLoadStep"]

MOST: Final = 64  # samples in one call
GAIN: Final = 0.8  # a call for twice as many must bring the price of a sample down to this


class _Size:
    """How many samples a call is for: doubled as long as that makes a sample cheaper.

    A table that decodes columns gives 64 rows in little more time than one. A dataset that reads one file after the
    other gains nothing, and stays at one: its samples shall be read side by side, and none wait for its neighbours.
    """

    def __init__(self) -> None:
        self.now = 1
        self._cheapest = inf
        self._settled = False

    def measured(self, count: int, seconds: float) -> None:
        """A call for `count` samples took this long; any thread."""
        if self._settled or count != self.now:
            return
        each = seconds / count
        if each < GAIN * self._cheapest:
            self._cheapest = each
            self.now = min(MOST, 2 * count)
            self._settled = count == MOST
        else:
            self.now = max(1, count // 2)
            self._settled = True

    def failed(self) -> None:
        """Calls for many do not work where single ones do, or ask whose random numbers they may have."""
        self.now = 1
        self._settled = True


class BulkLoadStep(ThreadStep):
    """Loads samples by `__getitems__`, or by `__getitem__` where one call for many is not cheaper.

    When a call for many fails, its samples are loaded one by one, so that the error is raised in its place.

    Args:
        call: Loads one.
        many: Loads a list of keys to a list of samples.
        concurrency: Threads.
        elastic: See `SyncStep`.
    """

    times_samples = False

    def __init__(
        self, call: Call, many: Callable[[list[Any]], Sequence[Any]], concurrency: int | Limit, *, elastic: bool = True
    ) -> None:
        super().__init__([call], concurrency, elastic=elastic)
        self._many = many
        self._count = _Size()

    @property
    def _size(self) -> int:
        return max(self._count.now, super()._size)

    def _work(self, job: ThreadJob, broken: BaseException | None = None) -> None:
        """In a thread."""
        sample = SampleContext()
        samples = job.samples(self.inbox, sample, self._run.consumer if self.stamps else None, several=True)
        cpu_began = thread_time()
        began = now = perf_counter()
        while now - began < CHUNK_SECONDS and job.keeps() and (keys := list(islice(samples, self._count.now))):
            loaded = copy_context().run(self._load, keys) if len(keys) > 1 else None  # see `isolated`
            if loaded is not None:
                job.outcomes.extend(loaded)
            else:
                before = len(job.outcomes)
                if len(keys) > 1:
                    for entry in job.claimed[-len(keys) :]:
                        entry.attempts += 1
                apply_chunk(self._calls, self._named(job, keys, sample), inf, job.outcomes, sample)
                if len(keys) > 1:
                    if not any(type(outcome) is Failed for outcome in job.outcomes[before:]):
                        self._count.failed()
                elif self._count.now == 1:
                    self._count.measured(1, perf_counter() - now)
            now = perf_counter()
            del keys, loaded
        # It has no name here, see `ThreadStep._work`.
        job.result = ChunkResult(job.outcomes, now - began, thread_time() - cpu_began)
        job.leave()
        call_loop(self._run.loop, self._run.guarded, self._reported, job)
        del job, samples, sample  # as in `apply_chunk`

    def _load(self, keys: list[Any]) -> list[Any] | None:
        """The samples of `keys`; None: that does not work."""
        sample = SampleContext(self._calls[0].seed)
        sample.name = several = BulkLoad()
        current_sample.set(sample)
        began = perf_counter()
        try:
            loaded = list(self._many(keys))
        except BaseException:  # it comes again when they are loaded one by one
            return None
        finally:
            if several.asked:
                self._count.failed()
        if several.asked:
            return None
        self._count.measured(len(keys), perf_counter() - began)
        return loaded if len(loaded) == len(keys) else None

    def _named(self, job: ThreadJob, keys: list[Any], sample: SampleContext) -> Any:
        """`keys`, while `sample` tells which one is at hand. Samples that take their time do not keep those before."""
        for entry, key in zip(job.claimed[-len(keys) :], keys, strict=True):
            if job.outcomes and perf_counter() - job.since > CHUNK_SECONDS:
                call_loop(self._run.loop, self._run.guarded, self._settle_done, job)
            sample.name = entry
            yield key
