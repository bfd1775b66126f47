"""The step of a window that runs synchronous calls in threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.entry import Entry
from aioloader.core.limit import Limit, Slots
from aioloader.engine.node import CHUNK_SECONDS
from aioloader.engine.step_protocols import StepWindow, TraceOfStep
from aioloader.engine.steps import Forward
from aioloader.engine.sync_step import CHUNK_SAMPLES, SyncStep
from aioloader.engine.torch_state import NOTHING_SET, context_state
from aioloader.errors import SampleCancelledError
from aioloader.executors.chunk import Call, ChunkResult, Failed, apply_chunk
from aioloader.executors.current_sample import SampleContext
from aioloader.executors.threads import Threads, call_loop
from aioloader.insight.meters import ConsumerMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["LIGHT_BYTES", "LIGHT_SECONDS", "ThreadJob", "ThreadStep"]

LIGHT_SECONDS: Final = 1e-4
"""CPU time of a call that takes no longer than its way into a thread and back, where other processes use all cores."""
LIGHT_BYTES: Final = 1 << 16
"""What a call may be given that is taken for one of these before it is known what it takes."""


class ThreadStep(SyncStep):
    """Runs calls in threads, which take samples from the inbox themselves.

    A hop costs 30 to 70 µs, so a thread that has been woken takes cheap samples one after the other for about a
    millisecond and reports them together. Since each sample is claimed only when it is begun, samples begin in order,
    slow ones stand side by side up to `concurrency`, and none waits behind another one in a chunk. Claiming is one
    operation of a deque, which is atomic.

    Under a `Limit` a thread is woken only with a slot, and keeps it from sample to sample while nobody else waits. It
    releases the slot itself, after its last sample: its loop may be busy.

    What if samples that were cheap turn slow? The thread stops after the one that took it past its millisecond. Until
    that one ends, two things would be stuck: the samples in the inbox for which no other thread was woken, and the
    results before it, which nobody knows of. `_look_again`, two milliseconds after a hop was asked for, sees to both;
    and again while the thread, which may have begun long after that, may claim another sample.

    Calls that are `light` are made on the loop while they take less time than a hop, if that loop is ours: the first
    ones too if they are given little, so that the first batch need not wait for a thread; one that has
    waited for something, as for pages of a mapped file, sends the next ones back into threads. Async
    functions of the user's run there, too, and one may be suspended in a `with torch.inference_mode()`, which belongs
    to the thread: then, as for any other of torch's contexts, a thread makes the calls.

    Args:
        calls: See `SyncStep`.
        concurrency: Threads.
        elastic: See `SyncStep`.
        light: See `Op`.
        executor: The user's pool of threads; None: threads of ours, which end with the window.
        thread_name: Names our threads.
        initializer: Called in each of our threads with its number.
    """

    times_samples = True

    def __init__(
        self,
        calls: Sequence[Call],
        concurrency: int | Limit,
        *,
        elastic: bool = True,
        light: Callable[[Any, float], bool] | None = None,
        executor: ThreadPoolExecutor | None = None,
        thread_name: str = "aioloader-map",
        initializer: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(calls, concurrency, elastic=elastic)
        self._light = light
        self._cpu_each: float | None = None  # what a call costs; None: not known; inf: it waits for something
        self._executor = executor
        self._thread_name = thread_name
        self._initializer = initializer
        self._threads: Threads | None = None
        self._jobs: set[ThreadJob] = set()
        self._watching = False

    @property
    def is_ours(self) -> bool:
        """Whether its threads are ours, and nothing is called in each of them."""
        return self._executor is None and self._initializer is None

    @property
    def standing(self) -> int:
        overdue = perf_counter() - CHUNK_SECONDS
        return sum(job.began < overdue and len(job.outcomes) < len(job.claimed) for job in self._jobs)

    @property
    def rests(self) -> bool:
        return not self.at_hand()

    def at_hand(self) -> list[tuple[Any, float]]:
        return [(entry.key, job.since) for job in self._jobs.copy() for entry in job.under_way()]

    def bind(self, run: "Run", window: StepWindow, forward: Forward, finished: Forward) -> None:
        super().bind(run, window, forward, finished)
        if self._executor is None:
            self._threads = run.threads(self.concurrency, self._thread_name, self._initializer)
            if window.room:
                self._threads.prepare()  # while the first samples are being read

    def close(self) -> None:
        super().close()
        if self._threads is not None:
            self._threads.close()

    def _follow(self, slots: Slots) -> None:
        super()._follow(slots)
        if self._threads is not None:
            self._threads.allow(self.concurrency)

    def dispatch(self) -> None:
        """Wake as many threads as the inbox is worth: one per millisecond of work in it.

        Threads that are under way count where samples are cheap, for they take the next ones within the millisecond.
        """
        self._scheduled = False
        if self.paused:
            self._set_aside()
            return
        waiting = len(self.inbox)
        if self._may_work_here:
            self._work_here()
            return
        size = self._size
        if size == 1:
            self._wake(self._active + waiting, 1)
        else:
            self._wake(-(-waiting // size), CHUNK_SAMPLES)
            if self._active:
                self._watch()

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._run.loop.call_later(2 * CHUNK_SECONDS, self._run.guarded, self._look_again)

    def _look_again(self) -> None:
        """See the class: samples that were thought to be cheap are not.

        Not only a matter of speed, for a call may wait for what the next sample's call does.
        """
        self._watching = False
        overdue = perf_counter() - CHUNK_SECONDS
        for job in self._jobs:
            if job.claimed and job.since <= overdue:
                self._settle_done(job)
            else:  # its thread goes on after this sample, or has not run yet: all this may still happen
                self._watch()
        if self.inbox:  # else there is nothing to wake anybody for, nor to look at again
            self._seconds_each = None
            self.dispatch()

    def _settle_done(self, job: "ThreadJob") -> None:
        """Send the samples on that `job` is done with, though it has not come to its end."""
        if fresh := job.outcomes[job.settled :]:
            self._settle(job.claimed[job.settled :], fresh)
            job.settled += len(fresh)

    def _wake(self, wanted: int, limit: int) -> None:
        slots = self.slots
        while self._active < min(wanted, self.concurrency) and not (self.closed or self._run.stopping):
            if slots is not None and not slots.take():
                return
            job = self._begun_job(limit, slots)
            if self._threads is not None:
                self._threads.submit(partial(self._work, job))
                continue
            assert self._executor is not None
            try:
                future = self._executor.submit(self._work, job)
            except RuntimeError as error:  # it has been shut down
                job.leave()
                self._run.loop.call_soon(self._run.guarded, self._refused, job, error)
                return
            future.add_done_callback(partial(self._cancelled, job))

    def _begun_job(self, limit: int, slots: Slots | None = None) -> "ThreadJob":
        """One more hop begins."""
        self._begins()
        job = ThreadJob(limit, slots, self.trace)
        self._jobs.add(job)
        return job

    @property
    def _may_work_here(self) -> bool:
        light, cost = self._light, self._cpu_each
        if light is None or (cost is not None and cost >= LIGHT_SECONDS) or not self._run.private_loop:
            return False
        most = LIGHT_BYTES if cost is None else inf
        waiting = self.inbox.copy()  # threads that are under way take from it meanwhile
        return all(light(entry.value, most) for entry in waiting) and context_state() == NOTHING_SET

    def _work_here(self) -> None:
        """On the loop."""
        if self.inbox and not (self.closed or self._run.stopping):
            job = self._begun_job(CHUNK_SAMPLES)
            job.result = self._made(job)
            self._reported(job)

    def _work(self, job: "ThreadJob", broken: BaseException | None = None) -> None:
        """In a thread.

        It has no name for the result: the loop may go on while this thread still stands here, and a batch that it
        knows would be copied when it is sent, see `Arena.lend`.
        """
        job.result = self._made(job, broken)
        job.leave()
        call_loop(self._run.loop, self._run.guarded, self._reported, job)

    def _made(self, job: "ThreadJob", broken: BaseException | None = None) -> ChunkResult:
        """Make the calls of `job`."""
        sample = SampleContext()
        samples = job.samples(self.inbox, sample, self._run.consumer if self.stamps else None)
        if broken is None:
            result = apply_chunk(self._calls, samples, CHUNK_SECONDS, job.outcomes, sample)
        else:
            failures = [Failed(broken, self._calls[0].label) for _ in islice(samples, 1)]
            result = ChunkResult(list(failures), 0.0, 0.0)
        try:
            return result
        finally:
            del job, samples, sample, result  # as in `apply_chunk`

    def _reported(self, job: "ThreadJob") -> None:
        self._jobs.discard(job)
        entries, result = job.claimed[job.settled :], job.taken()
        if self._light is not None and result.outcomes:
            count = len(result.outcomes)
            waited = result.busy_seconds >= count * CHUNK_SECONDS
            self._cpu_each = inf if waited else result.cpu_seconds / count
        self._landed(entries, result, job.settled)

    def _refused(self, job: "ThreadJob", error: BaseException) -> None:
        """The user's pool does not run it, nor any other: what waits fails."""
        self._jobs.discard(job)
        entries = list(self.inbox)
        self.inbox.clear()
        self._lost(entries, error)

    def _cancelled(self, job: "ThreadJob", future: "ConcurrentFuture[None]") -> None:
        # Called in any thread, for each hop; one that ran has reported itself.
        if future.cancelled():
            job.leave()
            error = SampleCancelledError("the executor was shut down before it ran this sample")
            call_loop(self._run.loop, self._run.guarded, self._refused, job, error)


class ThreadJob:
    """What one wake-up of a thread does.

    Args:
        limit: Samples that it may claim.
        slots: Of its step, if that has a `Limit`; it has one of them.
        trace: Of its step.

    Attributes:
        began: When it was asked for.
        since: When the thread began the first of its samples.
        claimed: The samples that it has begun, in order; the thread appends.
        outcomes: One for each that is done; the thread appends.
        settled: How many of them went on already; the loop's.
        result: Of all of it, when the thread is done.
    """

    __slots__ = ("_limit", "_slots", "_trace", "began", "claimed", "outcomes", "result", "settled", "since")

    def __init__(self, limit: int, slots: Slots | None = None, trace: TraceOfStep | None = None) -> None:
        self._limit = limit
        self._slots = slots
        self._trace = trace
        self.began = self.since = perf_counter()
        self.claimed: list[Entry] = []
        self.outcomes: list[Any] = []
        self.settled = 0
        self.result: ChunkResult | None = None

    def taken(self) -> ChunkResult:
        """The result, which is nowhere else any more."""
        assert self.result is not None
        result, self.result = self.result, None
        self.claimed, self.outcomes = [], []  # in this order: see `under_way`
        return result

    def samples(
        self,
        inbox: deque[Entry],
        sample: SampleContext,
        consumer: ConsumerMeter | None = None,
        *,
        several: bool = False,
    ) -> Iterator[Any]:
        """Claim samples, in the thread, until the inbox is empty; `sample` tells which one is at hand.

        Args:
            inbox: Where they wait.
            sample: The context of the calls.
            consumer: Of the run, if these calls may be the first ones for their samples, see `Entry.begun`.
            several: There are several in one call, so that whoever makes the calls asks whether the job `keeps`.
        """
        self.since = perf_counter()
        limited = self._slots is not None and not several
        trace = None if several else self._trace
        for _ in range(self._limit):
            if limited and not self.keeps():
                return
            try:
                entry = inbox.popleft()
            except IndexError:
                return
            if consumer is not None and entry.begun < 0:
                entry.begun = consumer.batches
            self.claimed.append(entry)
            sample.name = entry
            if trace is not None and type(entry) is not Entry:
                yield from trace.timed(entry)
            else:
                yield entry.value

    def keeps(self) -> bool:
        """Whether another call may begin in its slot: always the first, later ones where nobody waits for it."""
        if self._slots is None:
            return True
        if self.claimed and self._slots.pressed and not self._slots.keep():
            self._slots = None
            return False
        return True

    def leave(self) -> None:
        """Have no slot any more, if there was one."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release()

    def under_way(self) -> list[Entry]:
        """What was begun and is not done; from any thread, while this one goes on."""
        for _ in range(3):
            done = len(self.outcomes)
            begun = self.claimed[done:]
            if len(self.outcomes) == done:  # else some of these are done by now
                return begun
        return self.claimed[-1:]
