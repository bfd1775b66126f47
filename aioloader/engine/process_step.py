"""The step whose calls run in worker processes."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from aioloader.engine.entry import Entry
from aioloader.engine.steps import Forward
from aioloader.engine.sync_steps import SyncStep
from aioloader.errors import WorkerDiedError
from aioloader.executors.chunk import DROP, Call, ChunkResult
from aioloader.executors.processes.team import Broken, Died, Lost, Outcome, Team
from aioloader.executors.processes.torch_worker import EXHAUSTED
from aioloader.executors.threads import call_loop

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["CHUNK_SECONDS", "ProcessStep", "Turns"]

CHUNK_SECONDS: Final = 0.005  # the work that one crossing should be worth
CHUNK_SAMPLES: Final = 1024
QUEUE_SECONDS: Final = 0.02  # chunks that take longer are not queued behind one another
MORE_DEATHS: Final = 3  # in a row, beyond one for each worker, before the epoch ends


class Turns(AsyncIterator[tuple[int]]):
    """The source of workers that read an iterable dataset: turns to give a batch, until all of them have ended.

    Each is the same small tuple: the number of the epoch among all of this process.
    """

    _numbers = count()

    def __init__(self) -> None:
        self._epoch = (next(self._numbers),)
        self.over = False

    async def __anext__(self) -> tuple[int]:
        if self.over:
            raise StopAsyncIteration
        return self._epoch


class ProcessStep(SyncStep):
    """Runs calls in worker processes, in chunks.

    A crossing costs about 0.2 ms of both sides, so a chunk is worth five milliseconds. A worker has the next chunk
    before it is done with one; not so where chunks take long, for then nothing is gained, and a sample would wait
    behind another one while other workers are idle. What travels cannot be taken back, but a worker stops when its
    chunk turns out to take twice as long as it should, and the rest goes on elsewhere.

    What when a worker dies in the middle of a chunk (a segmentation fault, out of memory, `os._exit`)? It has noted
    which sample it was at: that one fails, at its place. What was done before it in the chunk died with the worker and
    is done again, sample by sample, and the rest goes on elsewhere. When workers die again and again and nothing is
    ever done, the epoch ends. Where workers read an iterable dataset, nobody else knows where one of them stood: its
    part ends with the error, and those of the others go on.

    Args:
        calls: See `SyncStep`.
        concurrency: Worker processes.
        team: Gives the workers when the run begins.
        elastic: See `SyncStep`.
        in_turn: Task k is for worker k modulo `concurrency`, as in torch: with seeded workers, random transforms are
            repeatable.
        owned: The workers end with the run.
        turns: The source, when only workers know when there is no more: each gives `EXHAUSTED` then.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        concurrency: int,
        team: Callable[[], Team],
        *,
        elastic: bool = True,
        in_turn: bool = False,
        owned: bool = False,
        turns: Turns | None = None,
    ) -> None:
        super().__init__(calls, concurrency, elastic=elastic)
        self.meter.kind = "process"
        self._make_team = team
        self._seeds = [None if turns else call.seed for call in calls]
        self._in_turn = in_turn
        self._owned = owned
        self._turns = turns
        self._turn = 0
        self._active_seats = list(range(concurrency))  # those that are not exhausted
        self._again: deque[Entry] = deque()  # they were done by a worker that died before it gave them back
        self._deaths = 0  # in a row
        self._team: Team

    def bind(self, run: "Run", window: "Window", forward: Forward) -> None:
        super().bind(run, window, forward)
        self._team = self._make_team()
        if self._owned:
            self._team.end_on(run.loop)
            run.own(self._team)
        self._team.prepare()

    def close(self) -> None:
        if not self.closed:
            self._team.forget(self)
            if self._owned:
                self._team.close()
        super().close()
        self._again.clear()

    @property
    def _size(self) -> int:
        cost = self._seconds_each
        if cost is None or self._in_turn:
            return 1
        size = max(1, min(CHUNK_SAMPLES, int(CHUNK_SECONDS / max(cost, 1e-9))))
        return size if self._elastic else min(size, max(1, self.meter.room // (2 * self.concurrency)))

    @property
    def _places(self) -> int:
        """Chunks that may be under way."""
        if self._in_turn:
            return max(self.concurrency, self.meter.room)
        cost = self._seconds_each
        quick = cost is not None and cost * self._size < QUEUE_SECONDS
        return self.concurrency * 2 if quick else self.concurrency

    def dispatch(self) -> None:
        self._scheduled = False
        inbox = self.inbox
        while (self._again or inbox) and self._active < self._places and not (self.closed or self._run.stopping):
            if self._again:
                chunk = [self._again.popleft()]
            else:
                fair = -(-len(inbox) // (self._places - self._active))
                chunk = [inbox.popleft() for _ in range(min(self._size, fair))]
            if not self._active_seats:
                self._drop(chunk[0])
                continue
            self._active += 1
            self.meter.idle.wait_for(None)
            seat = self._next_seat() if self._in_turn else None
            done = partial(call_loop, self._run.loop, self._run.guarded, self._back, chunk, seat)
            self._team.submit(self, self._payload(chunk), done, seat)

    def _payload(self, chunk: list[Entry]) -> tuple[list[int | None], list[Any] | None, list[Any]]:
        """For a worker: seeds of the calls, names of the samples (None: they name themselves), and the samples."""
        values = [entry.value for entry in chunk]
        keys = None
        if any(entry.key is not entry.value for entry in chunk):
            keys = [entry.key for entry in chunk]
        return self._seeds, keys, values

    def _next_seat(self) -> int:
        """The worker whose turn it is."""
        later = [seat for seat in self._active_seats if seat >= self._turn]
        seat = (later or self._active_seats)[0]
        self._turn = seat + 1
        return seat

    def _back(self, chunk: list[Entry], seat: int | None, outcome: Outcome) -> None:
        if self.closed:
            return
        match outcome:
            case ChunkResult(outcomes=[last]) if last is EXHAUSTED and self._turns is not None:
                self._exhausted(seat, self._turns)
                self._landed(chunk, ChunkResult([DROP], outcome.busy_seconds, outcome.cpu_seconds))
            case ChunkResult() if self._turns is not None and seat not in self._active_seats:
                # From a worker that took the place of a dead one, before that was known here: it began anew.
                self._landed(chunk, ChunkResult([DROP], 0.0, 0.0))
            case ChunkResult():
                self._deaths = 0
                tried = len(outcome.outcomes)
                self.inbox.extendleft(reversed(chunk[tried:]))  # its time was up: these go first
                self._landed(chunk[:tried], outcome)
            case Lost(error):
                self._lost(chunk, error)
            case Broken(error):
                self._run.fail(error)
            case Died():
                self._died(chunk, seat, outcome)

    def _exhausted(self, seat: int | None, turns: Turns) -> bool:
        """No more of this worker; False: that was known."""
        if seat not in self._active_seats:
            return False
        self._active_seats.remove(seat)
        turns.over = not self._active_seats
        return True

    def _died(self, chunk: list[Entry], seat: int | None, death: Died) -> None:
        self._deaths += 1
        who = f"worker process {death.seat} (pid {death.pid}) {death.reason}"
        hint = "; if memory ran out, use fewer workers" if "SIGKILL" in death.reason else ""
        if self._turns is not None:
            if self._exhausted(seat, self._turns):
                self._lost(chunk, WorkerDiedError(f"{who}, and with it what was left of its part of the dataset{hint}"))
            else:  # asked for ahead
                self._landed(chunk, ChunkResult([DROP], 0.0, 0.0))
        elif self._deaths > self.concurrency + MORE_DEATHS:
            self._run.fail(
                WorkerDiedError(
                    f"{self._deaths} worker processes in a row died and none got anything done; the last one, "
                    f"pid {death.pid}, {death.reason}; run {self._calls[0].label} in this process to see why"
                )
            )
        else:
            self._again.extend(chunk[: death.at])
            self.inbox.extendleft(reversed(chunk[death.at + 1 :]))
            held = chunk[death.at]
            self._lost([held], WorkerDiedError(f"{who}, with {_named(held)}{hint}"))


def _named(entry: Entry) -> str:
    """A sample, for a sentence; a batch by its keys."""
    return f"{'samples' if type(entry.key) is list else 'key'} {entry.key!r}"[:200]
