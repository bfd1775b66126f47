"""Worker processes that iterate an iterable dataset each: only they know where they are, and when there is no more.

They give batches in turn, as torch's workers do. A worker that has come to its end says so when it is its turn, which
nobody counts, and drops out of the round; so which batch is the n-th of the epoch depends on their parts alone, and not
on when somebody learned of an end. That number is the cursor.

To go on after batch n, each worker reads again what it had given. How many that is, is found out by asking: the turns
up to n are dealt as if no part ended, and when a worker says that its part did, the rest is dealt among the others.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.engine.deaths import hint, who
from aioloader.engine.process_step import ProcessStep
from aioloader.errors import WorkerDiedError
from aioloader.executors.chunk import DROP, Call, ChunkResult, Failed
from aioloader.executors.epochs import Epochs
from aioloader.executors.processes.torch_worker import EXHAUSTED
from aioloader.executors.processes.worker_pool import Broken, Died, NotSent, Outcome, WorkerPool
from aioloader.executors.threads import call_loop

__all__ = ["TurnStep", "Turns", "dealt"]


class Turns(CursorSource):
    """The source of such workers: turns to give a batch, until all of them have ended.

    Cursor: the number of workers, and that of the batches that were given.

    Args:
        workers: How many there are.
    """

    _numbers = itertools.count()
    _names_samples = False

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.epoch = next(self._numbers)  # among all of this process
        self.given = 0  # batches before a resume
        self.over = False

    def check_cursor(self, cursor: Any) -> None:
        workers, _ = map(as_count, cursor_parts(cursor, 2))
        if workers != self.workers:
            raise ValueError(f"a cursor of {self.workers} workers was expected, got one of {workers}")

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        if cursor is not None:
            _, self.given = cursor
        return _TurnReader(self)


class _TurnReader(EntryReader):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._given = turns.given

    async def read(self, limit: int) -> list[Entry]:
        turns = self._turns
        if turns.over:
            return []
        entries = []
        for _ in range(limit):
            self._given += 1  # a turn of which nothing comes counts here; the loader knows how many came
            entries.append(Entry((turns.epoch, 0), (turns.workers, self._given), None, 0))
        return entries


def dealt(count: int, limits: Sequence[int | None]) -> tuple[list[int], int]:
    """How many of the first `count` batches each worker gave, and whose turn is next.

    Args:
        count: Batches of all.
        limits: How many batches each has; None: enough.
    """
    given = [0] * len(limits)
    while active := [slot for slot, limit in enumerate(limits) if limit is None or limit > given[slot]]:
        left = [limit - given[slot] for slot in active if (limit := limits[slot]) is not None]
        rounds = min([count // len(active), *left])
        for slot in active:
            given[slot] += rounds
        count -= rounds * len(active)
        if not rounds:
            for slot in active[:count]:
                given[slot] += 1
            return given, active[count]
    return given, 0


class TurnStep(ProcessStep):
    """Asks workers for batches in turn; those that have ended drop out.

    A turn may be under way to a worker that turns out to have ended: it is dropped, like the one that found out.

    Args:
        calls: See `SyncStep`.
        concurrency: Worker processes.
        pool: Gives the workers when the run begins.
        epochs: See `ProcessStep`.
        elastic: See `SyncStep`.
        owned: The workers end with the run.
        turns: The source.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        concurrency: int,
        pool: Callable[[], WorkerPool],
        epochs: Epochs,
        *,
        elastic: bool,
        owned: bool,
        turns: Turns,
    ) -> None:
        super().__init__(calls, concurrency, pool, epochs, elastic=elastic, in_turn=True, owned=owned)
        self._seeds = [None] * len(calls)
        self._turns = turns
        self._active_slots = list(range(concurrency))  # those that have not ended
        self._begun = False
        self._asked = [0] * concurrency  # batches that each was told to read again
        self._limits: list[int | None] = [None] * concurrency  # how many each turned out to have
        self._reading = 0  # workers that read again now

    def dispatch(self) -> None:
        if self.paused:
            super().dispatch()
            return
        if not self._begun and self.inbox:  # the source has been opened, so it knows
            self._begun = True
            self._read_again()
        if self._reading:
            self._scheduled = False
            return
        if not self._active_slots:
            while self.inbox:
                self._drop(self.inbox.popleft())
        super().dispatch()

    def _next_slot(self) -> int:
        later = [slot for slot in self._active_slots if slot >= self._turn]
        slot = (later or self._active_slots)[0]
        self._turn = slot + 1
        return slot

    # -- what was given before a resume ------------------------------------------------------------------------------

    def _read_again(self) -> None:
        wanted, following = dealt(self._turns.given, self._limits)
        for slot, count in enumerate(wanted):
            if count > self._asked[slot]:
                payload = (self._seeds, self._epochs, None, [(self._turns.epoch, count - self._asked[slot])], 0)
                done = partial(call_loop, self._run.loop, self._run.guarded, self._has_read, slot, self._asked[slot])
                self._asked[slot] = count
                self._reading += 1
                self._pool.submit(self, payload, done, slot)
        self._turn = following

    def _has_read(self, slot: int, before: int, outcome: Outcome) -> None:
        if self.closed:
            return
        self._reading -= 1
        match outcome:
            case ChunkResult(outcomes=[int() as count]):
                if before + count < self._asked[slot]:
                    self._limits[slot] = before + count
                    self._ends(slot)
            case ChunkResult(outcomes=[Failed(error=error)]) | NotSent(error) | Broken(error):
                self._run.fail(error)
            case Died():
                self._run.fail(
                    WorkerDiedError(
                        f"{who(outcome)}, while it read again what was given before the resume{hint(outcome)}"
                    )
                )
        if not self._reading:
            self._read_again()
            if not self._reading:
                self.dispatch()

    # -- turns -------------------------------------------------------------------------------------------------------

    def _ends(self, slot: int | None) -> bool:
        """No more of this worker; False: that was known."""
        if slot not in self._active_slots:
            return False
        self._active_slots.remove(slot)
        self._turns.over = not self._active_slots
        return True

    def _back(self, chunk: list[Entry], slot: int | None, outcome: Outcome) -> None:
        match outcome:
            case ChunkResult(outcomes=[last]) if last is EXHAUSTED and not self.closed:
                self._came_back(chunk, slot)
                self._ends(slot)
                self._landed(chunk, ChunkResult([DROP], outcome.busy_seconds, outcome.cpu_seconds))
            case ChunkResult() if slot not in self._active_slots and not self.closed:
                # From a worker that took the place of a dead one, before that was known here: it began anew.
                self._came_back(chunk, slot)
                self._landed(chunk, ChunkResult([DROP], 0.0, 0.0))
            case _:
                super()._back(chunk, slot, outcome)

    def _died(self, chunk: list[Entry], slot: int | None, death: Died) -> None:
        if self._ends(slot):
            error = WorkerDiedError(f"{who(death)}, and with it what was left of its part of the dataset{hint(death)}")
            self._lost(chunk, error)
        else:  # asked for ahead
            self._landed(chunk, ChunkResult([DROP], 0.0, 0.0))
