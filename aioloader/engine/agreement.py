"""Ranks that agree, before each batch, that all of them have it: `shard(even="agree")`.

Where nobody can count the batches of a rank, since a filter or packing decides, ranks ask each other. The rules:

- Only `next()` asks, in the thread or task that calls it: on every rank a question has the same place among the
  collective calls of the training loop. No thread of the loader ever takes part in one.
- How many questions there are depends on nothing but their answers, which are the same on all ranks. So two ranks never
  ask different ones, and none waits for a question that another does not ask.
- They are one step ahead. While a batch is handed out, ranks ask whether all have the next one in their hands already;
  this question waits for nothing. At the next call its answer is there, and if it is yes, the batch is handed out at
  once. If not, each rank waits until it knows what it has, a batch, an error or the end, and asks again with that.
- A rank that fails raises its own error. The others raise `RankError` at the same place instead of giving a batch that
  their loop would train on alone. A rank that ends ends all.
- Each question says where its rank is, epoch and step, so that ranks that are at different places (another state was
  loaded, one loop has ended early) find out, and do not train on what does not belong together.
- One iterator asks at a time. Two that ask a group from two tasks or threads would do so in an order that time decides,
  on each rank for itself: the second one fails. One after the other is as good as any order of collective calls; and
  each question says which iterator it is of, so that ranks which begin theirs in different orders find out.
- No answer is passed over. An epoch that is left leaves a question, and its answer is looked at before the next epoch
  asks anything on that group. So all ranks look at the same answers, and if there is one that says that they are at
  different places, all of them hear it, and nobody asks a question more than the others and waits for them.

A question is one all-reduce of a few numbers on a gloo group. Its end is heard by a callback, and so a caller can be
interrupted, cancelled or closed meanwhile; the next call of `next()` goes on with the same question.
"""

import atexit
import threading
from collections.abc import Callable, Generator
from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary, WeakSet

import torch

from aioloader.core.entry import Entry
from aioloader.core.forks import after_fork_in_child
from aioloader.engine.progress import Progress
from aioloader.engine.run import CLOSE_SECONDS
from aioloader.errors import RankError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Agreement", "Have", "Question", "Steps"]


class Have(IntEnum):
    """What a rank has for the step in question; the least of all ranks decides."""

    ERROR = 0
    ENDED = 1
    NOT_YET = 2
    BATCH = 3


EVERY: Final = 1 << 62
"""Where a rank says nothing: more than any number that another one says."""


NEW_GROUP: Final = "torch.distributed.new_group(backend='gloo')"


class Question:
    """One all-reduce under way.

    Args:
        group: Of gloo.
        have: What this rank has.
        rank: Of this process in the group.
        epoch: Where this rank is.
        step: Likewise; None: a rank that has ended is at none.
        early: It is asked while the batch before is handed out.
        iterator: Which one of those that have asked this group.
    """

    def __init__(
        self,
        group: "ProcessGroup",
        have: Have,
        rank: int,
        epoch: int,
        step: int | None,
        *,
        early: bool,
        iterator: int = 0,
    ) -> None:
        self._group = group
        self._iterator = iterator
        self._step = step
        self._epoch = epoch
        self._early = early
        place = None if step is None else 2 * step + early
        self._numbers = torch.tensor(
            [
                have,
                rank if have is Have.ERROR else EVERY,
                epoch,
                -epoch,
                EVERY if place is None else place,
                EVERY if place is None else -place,
                iterator,
                -iterator,
            ],
            dtype=torch.int64,
            device="cpu",
        )
        least = torch.distributed.ReduceOp.MIN
        work = torch.distributed.all_reduce(self._numbers, op=least, group=group, async_op=True)
        assert work is not None  # this process is in the group
        self._future = work.get_future()

    @property
    def answered(self) -> bool:
        return bool(self._future.done())

    def when_answered(self, call: Callable[[], object]) -> None:
        """Call `call`, which never fails, in some thread, once it is answered."""
        heard = threading.Event()
        _heard.add(heard)

        def answered(_: object) -> None:
            call()
            heard.set()

        self._future.add_done_callback(answered)

    def answer(self) -> tuple[Have, int]:
        """The least that a rank has, and the first rank that failed, if one did.

        Raises:
            RankError: A rank is gone, or at another place.
        """
        here = f"epoch {self._epoch}" if self._step is None else f"batch {self._step} of epoch {self._epoch}"
        try:
            self._future.value()
        except RuntimeError as error:
            raise RankError(
                f"the ranks could not agree on {here}: one of them is gone, or has not asked for it within the "
                f"time-out of the group"
            ) from error
        have, rank, epoch, minus_epoch, place, minus_place, iterator, minus_iterator = self._numbers.tolist()
        _iterators[self._group] = max(_iterators.get(self._group, 0), -minus_iterator)  # all count on from there
        if epoch != -minus_epoch or (place != EVERY and place != -minus_place):
            epochs = f"epoch {epoch}" if epoch == -minus_epoch else f"epochs {epoch} to {-minus_epoch}"
            raise RankError(
                f"the ranks must ask for their batches in step, and this one is at {here}, others elsewhere: they are "
                f"in {epochs}, at batches {place // 2} to {-minus_place // 2}; load states that were saved at the same "
                f"step, and end each epoch on all ranks at the same step"
            )
        if iterator != -minus_iterator:
            raise RankError(
                f"the ranks must ask for the batches of their iterators in the same order, and at {here} this one asks "
                f"for iterator {self._iterator} of its group, and others for iterators {iterator} to "
                f"{-minus_iterator}; begin and advance them in the same order on all ranks, or give each loader a "
                f"group of its own: {NEW_GROUP}"
            )
        return Have(have), rank


_heard: WeakSet[threading.Event] = WeakSet()
"""Of callbacks that torch is to call, set once it has."""

_newest: "WeakKeyDictionary[ProcessGroup, Question]" = WeakKeyDictionary()
"""By group, the question that was asked last, as long as nobody has looked at its answer."""

_iterators: "WeakKeyDictionary[ProcessGroup, int]" = WeakKeyDictionary()
"""By group, how many iterators have asked."""

_asking: "WeakKeyDictionary[ProcessGroup, Agreement]" = WeakKeyDictionary()
"""By group, whose `next()` is running."""

for _of_process in (_heard, _newest, _iterators, _asking):
    after_fork_in_child(_of_process.clear)


@atexit.register
def _hear_answers() -> None:
    """Wait for callbacks, `CLOSE_SECONDS` at most, before the interpreter is torn down.

    Somebody was interrupted while waiting for other ranks. torch calls back in a thread of its own, and one that comes
    into an interpreter on its way out is ended by it; C++ does not allow that, and aborts the process. With Ctrl-C all
    ranks end, so that an answer, or the news that a rank is gone, is not far.
    """
    deadline = monotonic() + CLOSE_SECONDS
    for heard in list(_heard):
        heard.wait(max(0.0, deadline - monotonic()))


Steps = Generator[Question | None, Entry | None, Entry | None]
"""Yields a question that is to be answered before it goes on, or None, to be sent this rank's next batch, None at its
end; returns what is handed out, None if all end."""


class Agreement:
    """What one epoch has asked, and what this rank holds meanwhile. A context in which `next()` runs.

    `step` may be left in the middle, and another one begun later: all that counts is kept here.

    Args:
        group: Of gloo.
        progress: Of the epoch on this rank.
    """

    def __init__(self, group: "ProcessGroup", progress: Progress) -> None:
        self._group = group
        self._rank = torch.distributed.get_rank(group)
        self._progress = progress
        self._before = _newest.get(group)  # of an epoch that was left, most likely
        self._early: Question | None = None
        self._full: Question | None = None
        self._ended = False
        self._number: int | None = None  # of the iterator; None: it has not asked yet
        self.held: Entry | None = None
        self.over = False

    def __enter__(self) -> None:
        """A call of `next()` begins.

        Raises:
            RankError: That of another iterator has not ended, in another task or thread.
        """
        if _asking.setdefault(self._group, self) is not self:
            raise RankError(
                f"shard(even='agree') lets ranks ask each other in the order of their next() calls, and another "
                f"iterator of this process is asking the same group at this moment: time would decide who comes first, "
                f"on each rank for itself; read one after the other, or give each loader a group of its own: "
                f"{NEW_GROUP}"
            )

    def __exit__(self, *_: object) -> None:
        del _asking[self._group]

    def step(self) -> Steps:
        """Agree on the next batch.

        Raises:
            RankError: The ranks cannot.
        """
        if (before := self._before) is not None:
            yield before
            self._before = None
            self._answer(before)
        if (early := self._early) is not None:
            yield early
            self._early = None
            if self._answer(early)[0] is Have.BATCH:
                return self._take()
        if self._full is None:
            if self.held is None and not self._ended:
                self.held = yield None
                self._ended = self.held is None
            self._full = self._ask(early=False)
        full = self._full
        yield full
        self._full = None
        have, rank = self._answer(full)
        if have is Have.ENDED:
            self.over = True
            self.held = None
            return None
        entry = self._take()
        if have is Have.ERROR and (entry is None or entry.error is None):
            error = RankError(
                f"rank {rank} of the group failed at batch {self._progress.batches} of epoch {self._progress.epoch}; "
                f"the cause is in its own error. This rank's batch is left out, so that all stay in step"
            )
            if entry is None:  # this one has ended, and says so once more at the next step
                return Entry.last(error, self._progress.cursor, None)
            entry.value, entry.error = None, error
        return entry

    def look_ahead(self, held: Entry | None) -> None:
        """Ask for the batch after the one that is handed out; `held`: this rank's, if it is ready."""
        self.held = held
        self._early = self._ask(early=True)

    def _take(self) -> Entry | None:
        entry, self.held = self.held, None
        return entry

    def _ask(self, *, early: bool) -> Question:
        progress = self._progress
        if self.held is not None and not (early and self.held.error is not None):
            have = Have.BATCH if self.held.error is None else Have.ERROR
        else:
            have = Have.NOT_YET if early else Have.ENDED
        step = None if have is Have.ENDED else progress.batches
        if self._number is None:
            self._number = _iterators[self._group] = _iterators.get(self._group, 0) + 1
        question = _newest[self._group] = Question(
            self._group, have, self._rank, progress.epoch, step, early=early, iterator=self._number
        )
        return question

    def _answer(self, question: Question) -> tuple[Have, int]:
        if _newest.get(self._group) is question:
            del _newest[self._group]
        try:
            return question.answer()
        except RankError:
            self.over = True  # there is no way to go on together
            self.held = None
            raise
