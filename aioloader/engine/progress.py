"""How far an epoch has come, as its consumer sees it."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from aioloader.core.entry import NOT_READ, ONE_LOST, Entry, begun_each_of, places_of, read_after
from aioloader.core.mix_control import Mixes
from aioloader.insight.batch_info import BatchInfo
from aioloader.insight.meters import ConsumerMeter

__all__ = ["Progress"]


HISTORY: Final = 4096
"""Steps whose cursors are kept, for `replay`."""


class Progress:
    """One epoch. It outlives its iterator and its run, and holds nothing of either: where it was is still asked then.

    Attributes:
        epoch: Its number.
        cursor: Of the last batch that was handed out: where a resumed loader goes on; None before the first.
        meter: Counts the batches.
        batches_before: Those that were delivered before a resume.
        resumed: It began in the middle.
        epoch_pinned: The user chose this epoch with `set_epoch()` after loading the state.
        over: The consumer was told that there is no more.
        source_failed: The consumer got the error of one of several sources.
        length: Batches of the epoch; None: only its end tells.
        begun_before: The epoch has begun before: what it draws has been drawn.
        left_global: State of torch's global generator when the order had been drawn, as text; None: nothing drew.
        loader_state: What else of the loader a resume needs, as it was when the epoch began; JSON-able.
        shape: Of its plan when it began, see `ShapeThen`: its order depends on that, and datasets may grow meanwhile.
            None: it could not be told.
        skipped_steps: Ranges of steps that are not handed out.
        history: The cursors before the latest steps, oldest first.
        mixes: The weights of sources that are mixed by names; None: nothing was built yet.
        batch_size: Of a sampler that gives whole batches, all of this size but the last; None: of any size.
    """

    __slots__ = (
        "_last",
        "_left_out",
        "_step",
        "batch_size",
        "batches_before",
        "begun_before",
        "cursor",
        "epoch",
        "epoch_pinned",
        "history",
        "left_global",
        "length",
        "loader_state",
        "meter",
        "mixes",
        "over",
        "resumed",
        "shape",
        "skipped_steps",
        "source_failed",
    )

    def __init__(self, epoch: int, cursor: Any = None, batches_before: int = 0) -> None:
        self.epoch = epoch
        self.cursor = cursor
        self.batches_before = batches_before
        self.meter = ConsumerMeter()
        self.resumed = cursor is not None
        self.epoch_pinned = False
        self.over = False
        self.source_failed = False
        self.left_global: str | None = None
        self.length: int | None = None
        self.shape: Any = None
        self.begun_before = cursor is not None or batches_before > 0
        self.loader_state: dict[str, Any] = {}
        self.skipped_steps: list[range] = []
        self.history: deque[Any] = deque(maxlen=HISTORY)
        self._left_out = 0
        self.batch_size: int | None = None
        self.mixes: Mixes | None = None
        self._last: Entry | None = None  # that was handed out, of which all is read later but the batch
        self._step = 0  # the one in which that was

    @property
    def batches(self) -> int:
        """Steps that are done: batches that were handed out, that raised, or were left out."""
        return self.batches_before + self.meter.batches + self._left_out

    @property
    def complete(self) -> bool:
        """Whether a resume from here begins the next epoch."""
        return self.over or (self.batches > 0 and self.batches == self.length)

    def hand_out(self, entry: Entry, asked: float) -> float:
        """`entry`, which was asked for at `asked`, is the consumer's now; returns how many seconds it waited."""
        self.history.append(self.cursor)
        self.cursor = entry.cursor
        self._last = entry
        if entry.rare is not None:  # these may be large, and nobody asks for them any more
            entry.rare.pop("origin", None)
            entry.rare.pop("tries", None)
        self._step = self.batches
        if entry.state == ONE_LOST:
            self.source_failed = True
        meter = self.meter
        meter.delivered(asked)
        return meter.last_waited_seconds

    def is_skipped(self, entry: Entry) -> bool:
        """Whether `entry` is not to be handed out, and then that step is done."""
        step = self.batches
        if not any(step in steps for steps in self.skipped_steps):
            return False
        self.history.append(self.cursor)
        self.cursor = entry.cursor
        self._left_out += 1
        return True

    @property
    def info(self) -> BatchInfo | None:
        """About the last batch that was handed out."""
        entry = self._last
        if entry is None:
            return None
        many = type(entry.key) is list
        keys = entry.key if many else [entry.key]
        places: Sequence[int | None] | None = places_of(entry)
        if places is None:
            places = self._positions(entry.position, len(keys)) if many else (entry.position,)
        begun = (begun_each_of(entry) if many else None) or [entry.begun] * len(keys)
        before = self.meter.batches - 1
        ages = tuple(_age(one, before) for one in begun)
        waited = self.meter.last_waited_seconds
        return BatchInfo(self.epoch, self._step, tuple(keys), tuple(places), entry.attempts, waited, ages)

    def _positions(self, number: int | None, count: int) -> Sequence[int | None]:
        """Those of `count` samples that a sampler gave as its batch `number`."""
        if self.batch_size is None or number is None:
            return [None] * count
        return range(number * self.batch_size, number * self.batch_size + count)

    @property
    def resumed_at_end(self) -> bool:
        """Whether it was resumed after its last batch: then the next epoch is what was to come."""
        return self.over and self.resumed and not self.meter.batches and not self.epoch_pinned


def _age(begun: int, batches: int) -> int | None:
    """How many of `batches` were handed out since `begun`, which is as in `Entry`."""
    if begun == NOT_READ:
        return None
    return batches - (begun if begun >= 0 else read_after(begun))  # which is its own inverse
