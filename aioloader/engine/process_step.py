"""The step whose calls run in worker processes."""

from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.entry import Entry
from aioloader.core.limit import Limit, Slots
from aioloader.core.policies import Policies
from aioloader.core.safe_text import safe_repr
from aioloader.core.sizes import MeanBytes
from aioloader.engine.deaths import hint, named, who
from aioloader.engine.node import MOST_EARLY
from aioloader.engine.room import places_for_finished
from aioloader.engine.sent import Payload, Sent, unstamp
from aioloader.engine.step_protocols import StepWindow
from aioloader.engine.steps import Forward
from aioloader.engine.sync_step import SyncStep
from aioloader.errors import WorkerDiedError
from aioloader.executors.chunk import Call, ChunkResult, Failed
from aioloader.executors.chunk_pool import ChunkPool
from aioloader.executors.epochs import Epochs
from aioloader.executors.partial import LeavesOut
from aioloader.executors.processes.stacked import STACKED_FROM
from aioloader.executors.processes.worker_pool import Broken, Died, NotSent, Outcome
from aioloader.executors.threads import call_loop

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["CHUNK_SAMPLES", "CHUNK_SECONDS", "LONGER", "MORE_DEATHS", "ProcessStep"]

CHUNK_SECONDS: Final = 0.01  # the work that one hop should be worth
CHUNK_SAMPLES: Final = 1024
LONGER: Final = 3  # times as long as it should be: then a worker gives the rest of its chunk back
QUEUE_SECONDS: Final = 0.02  # chunks that take longer are not queued after one another
MOST_WHOLE_BYTES: Final = 64 << 20  # of a batch that is made in one chunk
EXPIRY_SECONDS: Final = 0.01  # between two looks at who has taken too long, at least
MORE_DEATHS: Final = 3  # in a row, beyond one for each worker, before the epoch ends


class ProcessStep(SyncStep):
    """Runs calls in worker processes, in chunks.

    A hop costs about 0.2 ms of both sides, and half a millisecond of this one where workers keep all cores busy and the
    caches are theirs; so a chunk is worth ten milliseconds. A worker has the next chunk
    before it is done with one; not so where chunks take long, for then nothing is gained, and a sample would wait
    after another one while other workers are idle. What travels cannot be taken back, but a worker stops when its
    chunk turns out to take three times as long as it should, and the rest goes on elsewhere.

    Samples that become large batches travel by whole batches, where that is about as much work as a chunk should be:
    the worker stacks them (`stacked`), and a copy is saved.

    What when a worker dies in the middle of a chunk (a segmentation fault, out of memory, `os._exit`)? It has noted
    which sample it was at: that one fails, at its place; or, where failed samples are left out of their batches, that
    batch is made again without it. What was done before it in the chunk died with the worker and
    is done again, sample by sample, and the rest goes on elsewhere. When workers die again and again and nothing is
    ever done, the epoch ends.

    How does it pause? The workers share memory that says so, and look there before each sample. Chunks that they have
    not begun stay with them, for chunks have an order and a place. `quiet` is when that is written. To know that no
    call is under way, the workers are asked: one answers between two calls. What is out by then has not begun.

    Args:
        calls: See `SyncStep`.
        concurrency: Worker processes. Of a `Limit` each chunk under way has one slot, and no more workers are used than
            there were places when they were made.
        pool: Gives the workers when the run begins.
        epochs: Those of the objects in the calls, for their copies in workers that are kept.
        elastic: See `SyncStep`.
        in_turn: Task k is for worker k modulo `concurrency`, as in torch: with seeded workers, random transforms are
            repeatable.
        owned: The workers end with the run.
    """

    chunk_seconds = CHUNK_SECONDS
    queue_seconds = QUEUE_SECONDS

    def __init__(
        self,
        calls: Sequence[Call],
        concurrency: int | Limit,
        pool: Callable[[], ChunkPool],
        epochs: Epochs,
        *,
        elastic: bool = True,
        in_turn: bool = False,
        owned: bool = False,
    ) -> None:
        super().__init__(calls, concurrency, elastic=elastic)
        self.meter.kind = "process"
        self._make_pool = pool
        self._seeds = [call.seed for call in calls]
        self._epochs = epochs
        self._in_turn = in_turn
        self._owned = owned
        self._turn = 0
        self._again: deque[tuple[Entry, int | None]] = deque()  # lost with a worker that died, and whose turn it was
        self._deaths = 0  # in a row
        self._queues: dict[int, deque[Sent]] = {}  # in turn: what each worker has, and begins one after the other
        self._pool: ChunkPool
        self._out = 0  # samples that workers have
        self._out_aside = 0  # those of them that are known not to have begun
        self._holds = 0  # how often it was told to pause
        self._pool_held = False
        self.timeout: float | None = None
        self._timeout_name = ""
        self._expiry: TimerHandle | None = None
        self._batch_size = 0  # of the batches that are made of what it gives; 0: none are, or it may drop samples
        self._sent = 0  # samples that end in batches: this says where in its batch the next one is
        self._bytes = MeanBytes()  # of a sample, where that is of interest
        self._whole = False  # a chunk is a batch

    def feeds_batches(self, size: int) -> bool:
        self._batch_size = 0 if self.selects else size
        return not self.selects

    def obey(self, policies: Policies) -> None:
        super().obey(policies)
        self.timeout, self._timeout_name = policies.timeout, policies.timeout_name

    def at_hand(self) -> list[tuple[Any, float]]:
        found = []
        for (_, _, keys, values, _), at, since in self._pool.at_work(self):
            names = values if keys is None else keys
            found.append((names[at] if at < len(names) else None, since))
        return found

    def bind(self, run: "Run", window: StepWindow, forward: Forward, finished: Forward) -> None:
        self._pool = self._make_pool()
        if self.limit is not None:
            self.most = self._pool.count if self.most is None else min(self.most, self._pool.count)
        super().bind(run, window, forward, finished)
        if not self._in_turn:  # its first chunks are as large as those of the epoch before
            self._seconds_each, self._bytes.now = self._pool.learned
            self._whole = self._makes_whole_batches()
            if self._elastic:
                self._extra_room = self._room_for_hops
                window.resize()
        if self._owned:
            self._pool.end_on(run.loop)
            run.own(self._pool)
        self._pool.prepare()

    def close(self) -> None:
        if not self.closed:
            if self._expiry is not None:
                self._expiry.cancel()
                self._expiry = None
            self._pool.forget(self)
            if self._owned:
                self._pool.close()
            if self.slots is not None:
                self.slots.close(all_of_it=True)  # what is forgotten does not come back
        super().close()
        self._again.clear()

    @property
    def quiet(self) -> bool:
        return self._pool_held

    def hold(self) -> None:
        super().hold()
        self._holds += 1
        self._pool_held = False
        rested = partial(call_loop, self._run.loop, self._run.guarded, self._pool_rests, self._holds)
        self._pool.hold(self, rested)

    def _pool_rests(self, holds: int, still: bool) -> None:
        """The pool is held; or also, it has no call under way."""
        if self.closed or not self.paused or holds != self._holds:
            return
        self._pool_held = True
        if still:
            self._out_aside = self._out
            self._window.set_aside(self._out_aside)
        self._window.wake()

    def let_go(self) -> None:
        self._pool.let_go(self)
        self._back_from_aside(self._out_aside)
        super().let_go()

    def _back_from_aside(self, count: int) -> None:
        """So many of those that have not begun may begin, or are lost after all."""
        count = min(count, self._out_aside)
        self._out_aside -= count
        self._window.set_aside(-count)

    def _set_aside(self) -> None:
        self.inbox.extendleft(entry for entry, _ in reversed(self._again))
        self._again.clear()
        super()._set_aside()

    @property
    def _size(self) -> int:
        cost = self._seconds_each
        if cost is None or self._in_turn or self.timeout is not None:
            return 1
        size = max(1, min(CHUNK_SAMPLES, int(self.chunk_seconds / max(cost, 1e-9))))
        if self._whole:
            return self._batch_size
        size = self._fitting(size)
        return size if self._elastic else min(size, max(1, self.meter.room // (2 * self.concurrency)))

    def _fitting(self, size: int) -> int:
        """How many of `size` samples travel together."""
        return size

    def _makes_whole_batches(self) -> bool:
        """Whether a chunk is to be a batch, by what is known now."""
        of, each, cost = self._batch_size, self._bytes.now, self._seconds_each
        if each is None or cost is None or not self._elastic or self.timeout is not None:
            return False
        if of * (self.concurrency + 1) > MOST_EARLY:
            return False
        longest = (LONGER if self._whole else LONGER - 1) * self.chunk_seconds  # not back and forth
        return of * cost <= longest and STACKED_FROM <= of * each <= MOST_WHOLE_BYTES

    def _quick(self, size: int) -> bool:
        """Whether chunks of `size` are done so soon that one may wait after another one in the same worker."""
        cost = self._seconds_each
        return cost is not None and cost * size < self.queue_seconds

    def _places(self, size: int) -> int:
        """Chunks of `size` that may be under way."""
        if self._in_turn:
            return max(self.concurrency, self.meter.room)
        return self.concurrency * 2 if self._quick(size) else self.concurrency

    @property
    def _room_for_hops(self) -> int:
        # Each worker has the next chunk, where it has use for it. If these are batches, there is room for just these: a
        # sample more would travel alone, and the batches that it and the others are in would be copied.
        beside = self.concurrency + (places_for_finished(self.concurrency) if self._whole else 0)
        size = self._size
        return self._places(size) * size - beside

    def _next_size(self, size: int, places: int) -> int:
        """Samples for the next chunk, of `size` at most; 0: it waits for more.

        As batches are taken, samples come in by as many, and a hop for each of these would cost more than it carries.
        So while all workers have something to do, a chunk waits until it is half as large as it could be. The next one
        that comes back makes an end of waiting.
        """
        waiting, idle = len(self.inbox), self.concurrency - self._active
        fair = -(-waiting // (places - self._active))
        if not self._elastic:
            return min(size, fair)
        least = min(size, self.meter.room // places) // 2
        if self._whole and self.meter.room >= size * self.concurrency:
            least = size - self._sent % size  # which makes a batch complete
            if waiting >= least:
                return least
        if fair >= least:
            return min(size, fair)
        if idle <= 0:
            return least if waiting >= least else 0
        return min(least, -(-waiting // idle))

    def dispatch(self) -> None:
        self._scheduled = False
        if self.paused:
            self._set_aside()
            return
        inbox, most = self.inbox, self._size
        places = self._places(most)
        while (self._again or inbox) and self._active < places and not (self.closed or self._run.stopping):
            size = self._next_size(most, places)
            if not size and not self._again:
                return
            if self.slots is not None and not self.slots.take():
                return
            slot = None
            if self._again:
                entry, slot = self._again.popleft()
                chunk = Sent([entry])
            else:
                chunk = Sent([inbox.popleft() for _ in range(size)])
                self._sent += size
            self._begins()
            if self._in_turn and slot is None:
                slot = self._next_slot()
            self._sends(chunk, slot)
            done = partial(call_loop, self._run.loop, self._run.guarded, self._back, chunk, slot)
            if self.slots is not None:
                done = partial(self._done, self.slots, done)
            self._pool.submit(self, self._payload(chunk), done, slot)
            if self.timeout is not None and self._expiry is None:
                self._watch(self.timeout)

    @staticmethod
    def _done(slots: Slots, done: Callable[[Outcome], None], outcome: Outcome) -> None:
        """A chunk has come back; in the thread of the pool."""
        slots.release()
        done(outcome)

    def _sends(self, chunk: Sent, slot: int | None) -> None:
        """A worker gets `chunk`. It begins it at once, or next; or, in turn, after all that it has."""
        self._out += len(chunk)
        chunk.begun = [entry.begun for entry in chunk]
        if slot is None:
            self._stamp(chunk)
            return
        queue = self._queues.setdefault(slot, deque())
        queue.append(chunk)
        if len(queue) == 1:
            self._stamp(chunk)

    def _came_back(self, chunk: list[Entry], slot: int | None) -> None:
        """In turn, the worker goes on with the next one."""
        self._out -= len(chunk)
        if self._out_aside:
            self._back_from_aside(len(chunk))
        queue = None if slot is None else self._queues[slot]
        if not queue:
            return
        if chunk is not queue[0]:  # it could not be sent
            queue.remove(chunk)  # type: ignore[arg-type]  # in turn, all are `Sent`
            return
        queue.popleft()
        if queue:
            self._stamp(queue[0])

    def _not_begun(self, chunk: list[Entry], at: int) -> None:
        """What comes from index `at` on in `chunk` was not begun, and goes first, elsewhere."""
        unstamp(chunk, at, len(chunk))
        self._sent -= len(chunk) - at
        self.inbox.extendleft(reversed(chunk[at:]))

    def _payload(self, chunk: list[Entry]) -> Any:
        """For a worker: a `Payload`."""
        values = [entry.value for entry in chunk]
        names = [entry.key for entry in chunk]
        keys = None if all(map(is_, names, values)) else names
        size = len(chunk)
        batch = size if self._whole and size == self._batch_size and not self._sent % size else 0
        payload: Payload = self._seeds, self._epochs, keys, values, batch
        return payload

    def _next_slot(self) -> int:
        """The worker whose turn it is."""
        slot = self._turn % self.concurrency
        self._turn = slot + 1
        return slot

    def _back(self, chunk: list[Entry], slot: int | None, outcome: Outcome) -> None:
        if self.closed:
            return
        self._came_back(chunk, slot)
        match outcome:
            case ChunkResult():
                self._deaths = 0
                tried = len(outcome.outcomes)
                if self._batch_size and tried and type(last := outcome.outcomes[-1]) is not Failed:
                    self._bytes.saw(last)
                    self._whole = self._makes_whole_batches()
                self._not_begun(chunk, tried)  # its time was up
                self._landed(chunk[:tried], outcome)
                self._pool.learned = self._seconds_each, self._bytes.now
            case NotSent(error):
                self._lost(chunk, error)
            case Broken(error):
                self._run.fail(error)
            case Died():
                self._died(chunk, slot, outcome)

    def _fail(self, entry: Entry, error: BaseException, label: str) -> None:
        super()._fail(entry, error, label)
        if entry.error is None or self._window.rule is not None:  # it is sent again, or is left out of its batch
            self._sent -= 1

    def _watch(self, timeout: float) -> None:
        """Look again when a call may have taken too long; it is the workers that know when theirs began."""
        if self._active and not (self.closed or self._run.stopping):
            oldest = min((since for _, since in self.at_hand()), default=perf_counter())
            self._expiry = self.later(max(EXPIRY_SECONDS, oldest + timeout - perf_counter()), self._expire)

    def _expire(self) -> None:
        self._expiry = None
        if self.timeout is not None:
            if any(perf_counter() - since >= self.timeout for _, since in self.at_hand()):
                self._pool.expire(self, self.timeout)
            self._watch(self.timeout)

    def _timed_out(self, entry: Entry, death: Died) -> None:
        self.meter.timeouts += 1
        self._lost(
            [entry],
            TimeoutError(
                f"{self._calls[0].label} took longer than {self._timeout_name}={self.timeout:g} s; worker process "
                f"{death.slot} (pid {death.pid}) was killed"
            ),
        )

    def _died(self, chunk: list[Entry], slot: int | None, death: Died) -> None:
        if death.expired:
            self._timed_out(chunk[death.at], death)
            return
        self._deaths += 1
        if self._deaths > self.concurrency + MORE_DEATHS:
            self._run.fail(
                WorkerDiedError(
                    f"{self._deaths} worker processes in a row died and none got anything done; the last one, "
                    f"pid {death.pid}, {death.reason}; run {self._calls[0].label} in this process to see why"
                )
            )
        else:
            unstamp(chunk, 0, death.at)  # their newest beginning counts
            for entry in chunk[: death.at]:
                entry.attempts += 1
                self._again.append((entry, slot))
            self._not_begun(chunk, death.at + 1)
            self._died_with(chunk, slot, death)

    def _died_with(self, chunk: list[Entry], slot: int | None, death: Died) -> None:
        """The entry that the worker was at fails; if it is a batch that can do without a sample, it comes again."""
        held = chunk[death.at]
        fn: Any = self._calls[0].fn
        at, keys = death.sample, held.key
        which = named(held) if at is None or type(keys) is not list else f"key {safe_repr(keys[at])}"
        error = WorkerDiedError(f"{who(death)}, with {which}{hint(death)}")
        left = fn.without(held.value, at, error) if isinstance(fn, LeavesOut) else None
        if left is None:
            self._lost([held], error)
            return
        unstamp(chunk, death.at, death.at + 1)
        held.value = left
        held.attempts += 1
        self._again.append((held, slot))
        self._landed((), ChunkResult([], 0.0, 0.0))
