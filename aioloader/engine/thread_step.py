"""The steps of a journey that run synchronous calls off the loop: in threads, or in the user's executor."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures import Future as ConcurrentFuture
from functools import partial
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.entry import Entry
from aioloader.core.limit import Limit, Slots
from aioloader.engine.node import CHUNK_SECONDS
from aioloader.engine.steps import Forward, Step
from aioloader.errors import SampleCancelledError
from aioloader.executors.chunk import Call, ChunkResult, Failed, Refusal, apply_chunk
from aioloader.executors.current_sample import SampleContext
from aioloader.executors.threads import Threads, call_loop
from aioloader.insight.meters import ConsumerMeter, StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["CHUNK_SECONDS", "ExecutorStep", "SyncStep", "ThreadJob", "ThreadStep"]

CHUNK_SAMPLES: Final = 256  # at most in one hop, so that memory is bounded for samples that cost nothing


class SyncStep(Step):
    """What the two ways to run synchronous calls off the loop share.

    Args:
        calls: The neighbouring synchronous stages that cross together.
        concurrency: Calls that may stand side by side.
        elastic: Whether the window gets more room for cheap samples, so that a hop is worth its cost.
    """

    tells_end = True
    times_samples = False  # the times of single samples are known, see `tracing`

    def __init__(self, calls: Sequence[Call], concurrency: int | Limit, *, elastic: bool = True) -> None:
        super().__init__(StageMeter(" + ".join(call.label for call in calls), "sync"), concurrency)
        self._calls = tuple(calls)
        self.selects = any(call.predicate for call in calls)
        self._elastic = elastic
        self._active = 0  # hops under way
        self._extra_room = 0
        self._scheduled = False
        self._seconds_each: float | None = None  # what a sample costs, as far as it is known

    def accept(self, entry: Entry) -> None:
        if self.closed:
            return
        if self.tap is not None:
            self.tap.add((entry,))
            return
        self.inbox.append(entry)
        if not self._scheduled:  # after the entries that come in this same turn
            self._scheduled = True
            self._run.soon(self.dispatch)

    @property
    def extra_room(self) -> int:
        return self._extra_room

    @property
    def under_way(self) -> int:
        """Crossings that have begun and are not over."""
        return self._active

    @property
    def standing(self) -> int:
        """Those of them in which a sample has been for longer than a hop of cheap ones takes."""
        return self._active

    def _begins(self) -> None:
        """One more hop."""
        self._active += 1
        self.meter.idle.wait_for(None)
        self._window.hop_began()

    @property
    def free_places(self) -> int:
        if self.slots is not None and self.inbox:
            return 0
        return (self.concurrency - self._active) * self._size - len(self.inbox)

    @property
    def _size(self) -> int:
        """Samples that one hop is worth."""
        cost = self._seconds_each
        if cost is None:
            return 1
        return max(1, min(CHUNK_SAMPLES, int(CHUNK_SECONDS / max(cost, 1e-9))))

    def _landed(self, entries: Iterable[Entry], result: ChunkResult, settled: int = 0) -> None:
        """A hop is over; back on the loop. The first `settled` of its samples went on before."""
        self._active -= 1
        tried = len(result.outcomes)
        self._settle(entries, result.outcomes[settled:])
        if self.trace is not None and not self.times_samples:
            self.trace.hop([*entries], result.busy_seconds)
        self.meter.busy_seconds += result.busy_seconds
        self.meter.cpu_seconds += result.cpu_seconds
        if tried and result.busy_seconds:
            each = result.busy_seconds / tried
            self._seconds_each = each if self._seconds_each is None else (self._seconds_each + each) / 2
            extra_room = 2 * self.concurrency * (self._size - 1) if self._elastic else 0
            if extra_room != self._extra_room:
                self._extra_room = extra_room
                self._window.resize()
        self.dispatch()
        if self.tap is not None:
            self.tap.pump()
        if not self._active:
            self.meter.idle.wait_for("input")

    def _settle(self, entries: Iterable[Entry], outcomes: Sequence[Any]) -> None:
        """Send samples on with their outcomes."""
        self.meter.samples += len(outcomes)  # first: a budget of retries is a share of them
        now = self._window.now = perf_counter()
        forward = self._forward
        for entry, outcome in zip(entries, outcomes, strict=False):
            entry.since = now
            if type(outcome) is Refusal:
                if outcome.stop is not None:
                    entry.stop = outcome.stop
                self._drop(entry, nothing=outcome.nothing)
            elif type(outcome) is Failed:
                entry.seconds = outcome.seconds
                if outcome.stop is not None:
                    entry.stop = outcome.stop
                self._fail(entry, outcome.error, outcome.label)
            else:
                entry.value = outcome
                forward(entry)

    def _lost(self, entries: Sequence[Entry], error: BaseException) -> None:
        """A hop never ran, or did not come back."""
        call = self._calls[0]
        self._landed(entries, ChunkResult([Failed(error, call.label, call.stop) for _ in entries], 0.0, 0.0))


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
    results before it, which nobody knows of. `_look_again`, two milliseconds after a hop began, sees to both.

    Args:
        calls: See `SyncStep`.
        concurrency: Threads.
        elastic: See `SyncStep`.
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
        executor: ThreadPoolExecutor | None = None,
        thread_name: str = "aioloader-map",
        initializer: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(calls, concurrency, elastic=elastic)
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

    def at_hand(self) -> list[tuple[Any, float]]:
        return [(entry.key, job.since) for job in self._jobs.copy() for entry in job.under_way()]

    def bind(self, run: "Run", window: "Window", forward: Forward, finished: Forward) -> None:
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
            if job.began > overdue:
                self._watch()
            else:
                if fresh := job.outcomes[job.settled :]:
                    self._settle(job.claimed[job.settled :], fresh)
                    job.settled += len(fresh)
                if not job.claimed:  # its thread has not run yet: all this may still happen
                    self._watch()
        if self.inbox:  # else there is nothing to wake anybody for, nor to look at again
            self._seconds_each = None
            self.dispatch()

    def _wake(self, wanted: int, limit: int) -> None:
        slots = self.slots
        while self._active < min(wanted, self.concurrency) and not (self.closed or self._run.stopping):
            if slots is not None and not slots.take():
                return
            self._begins()
            job = ThreadJob(limit, slots) if self.trace is None else self.trace.job(limit, slots)
            self._jobs.add(job)
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

    def _work(self, job: "ThreadJob", broken: BaseException | None = None) -> None:
        """In a thread."""
        sample = SampleContext()
        samples = job.samples(self.inbox, sample, self._run.consumer if self.stamps else None)
        if broken is None:
            result = apply_chunk(self._calls, samples, CHUNK_SECONDS, job.outcomes, sample)
        else:
            failures = [Failed(broken, self._calls[0].label) for _ in islice(samples, 1)]
            result = ChunkResult(list(failures), 0.0, 0.0)
        job.leave()
        call_loop(self._run.loop, self._run.guarded, self._reported, job, result)
        del job, samples, sample, result  # as in `apply_chunk`

    def _reported(self, job: "ThreadJob", result: ChunkResult) -> None:
        self._jobs.discard(job)
        self._landed(job.claimed[job.settled :], result, job.settled)

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

    Attributes:
        began: When it was asked for.
        since: When the thread began the first of its samples.
        claimed: The samples that it has begun, in order; the thread appends.
        outcomes: One for each that is done; the thread appends.
        settled: How many of them went on already; the loop's.
    """

    __slots__ = ("_limit", "_slots", "began", "claimed", "outcomes", "settled", "since")

    def __init__(self, limit: int, slots: Slots | None = None) -> None:
        self._limit = limit
        self._slots = slots
        self.began = self.since = perf_counter()
        self.claimed: list[Entry] = []
        self.outcomes: list[Any] = []
        self.settled = 0

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


class _Chunk:
    """Samples that went to a user's executor together.

    Attributes:
        entries: The samples.
        begun: Their `Entry.begun` before.
        since: When they went.
        future: Of the executor.
    """

    __slots__ = ("begun", "entries", "future", "since")
    future: "ConcurrentFuture[ChunkResult]"

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.begun = [entry.begun for entry in entries]
        self.since = perf_counter()


class ExecutorStep(SyncStep):
    """Runs calls in a user's executor of any kind, in chunks: functions and samples travel by pickle.

    What travels cannot be taken back, so a chunk is at most what the samples before it say is worth a millisecond, and
    is shared fairly among the places that are free.

    When it pauses, what the executor has not begun is cancelled and comes back. A chunk that it has begun, as far as
    it says, is waited for if it has more than one sample: the others would begin one after the other.

    Args:
        calls: See `SyncStep`.
        concurrency: Chunks under way; each has one slot of a `Limit`.
        executor: For instance a `ProcessPoolExecutor`.
    """

    def __init__(self, calls: Sequence[Call], concurrency: int | Limit, executor: Executor) -> None:
        super().__init__(calls, concurrency)
        self._executor = executor
        self._chunks: set[_Chunk] = set()
        self._called_back: set[ConcurrentFuture[ChunkResult]] = set()

    def at_hand(self) -> list[tuple[Any, float]]:
        # One sample of each chunk is under way, and only the executor knows which: most often there is but one.
        return [(chunk.entries[0].key, chunk.since) for chunk in self._chunks.copy() if chunk.future.running()]

    @property
    def quiet(self) -> bool:
        return all(len(chunk.entries) == 1 for chunk in self._chunks)

    def hold(self) -> None:
        super().hold()
        for chunk in list(self._chunks):
            self._called_back.add(chunk.future)
            if not chunk.future.cancel():
                self._called_back.discard(chunk.future)

    def dispatch(self) -> None:
        self._scheduled = False
        if self.paused:
            self._set_aside()
            return
        inbox = self.inbox
        while inbox and self._active < self.concurrency and not (self.closed or self._run.stopping):
            if self.slots is not None and not self.slots.take():
                return
            fair = -(-len(inbox) // (self.concurrency - self._active))
            chunk = _Chunk([inbox.popleft() for _ in range(min(self._size, fair))])
            self._begins()
            self._stamp(chunk.entries)
            values = [entry.value for entry in chunk.entries]
            try:
                chunk.future = self._executor.submit(apply_chunk, self._calls, values, 2 * CHUNK_SECONDS)
            except RuntimeError as error:  # shut down, or broken
                if self.slots is not None:
                    self.slots.release()
                self._run.loop.call_soon(self._run.guarded, self._lost, chunk.entries, error)
            else:
                self._chunks.add(chunk)
                chunk.future.add_done_callback(partial(self._done, chunk))

    def _done(self, chunk: _Chunk, future: "ConcurrentFuture[ChunkResult]") -> None:
        # Called in a thread of the executor.
        if self.slots is not None:
            self.slots.release()
        error: BaseException | None
        if future.cancelled() and future in self._called_back:
            self._called_back.discard(future)
            call_loop(self._run.loop, self._run.guarded, self._returned, chunk, ChunkResult([], 0.0, 0.0))
            return
        if future.cancelled():
            error = SampleCancelledError("the executor was shut down before it ran these samples")
        else:
            error = future.exception()
        if error is None:
            call_loop(self._run.loop, self._run.guarded, self._returned, chunk, future.result())
        else:  # a worker process died, or something could not be pickled
            call_loop(self._run.loop, self._run.guarded, self._not_returned, chunk, error)

    def _returned(self, chunk: _Chunk, result: ChunkResult) -> None:
        self._chunks.discard(chunk)
        tried = len(result.outcomes)
        if not self.closed:  # its time was up: these have not begun, and go first
            for entry, begun in zip(chunk.entries[tried:], chunk.begun[tried:], strict=True):
                entry.begun = begun
            self.inbox.extendleft(reversed(chunk.entries[tried:]))
        self._landed(chunk.entries[:tried], result)

    def _not_returned(self, chunk: _Chunk, error: BaseException) -> None:
        self._chunks.discard(chunk)
        self._lost(chunk.entries, error)
