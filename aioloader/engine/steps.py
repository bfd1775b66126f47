"""What the steps of a window have in common, and the simplest one."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aioloader.core.entry import DROPPED, Entry, annotate, stop_of
from aioloader.executors.chunk import Stop
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["Forward", "InPlaceStep", "Step", "bind_in_a_row"]

Forward = Callable[[Entry], None]


class Step(ABC):
    """One step of a window: each entry goes through all of them in turn.

    Attributes:
        inbox: Entries that wait for this step. The window's room bounds it, as it bounds everything in the window.
        places: How many entries under way in this step the window makes room for, see `StepsRoom`.
        selects: Whether it may drop samples.
        stamps: Its call may be the first one for an entry, see `Entry.begun`. The window says so.
        stop: What is said of samples that end in it, unless that is known of them already; None: nobody asks.
        fresh: It is the first one for each.
    """

    closed: bool = False
    selects: bool = False
    stamps: bool = False
    stop: Stop | None = None
    fresh: bool = False

    def __init__(self, meter: StageMeter, concurrency: int) -> None:
        self.meter = meter
        self.concurrency = self.places = meter.concurrency = concurrency
        self.inbox: deque[Entry] = deque()

    @property
    def parts(self) -> "list[Step]":
        """The steps with a meter of their own: this one, unless it is made of others."""
        return [self]

    def bind(self, run: "Run", window: "Window", forward: Forward, finished: Forward) -> None:
        """Join a run; entries go to `forward`, but failed and dropped ones to `finished`."""
        self._run = run
        self._window = window
        self._forward = forward
        self._finished = finished

    def at_hand(self) -> Sequence[tuple[Any, float]]:
        """See `Gauge`."""
        return ()

    @property
    def held(self) -> int:
        """See `Gauge`."""
        return self._window.held

    @property
    def extra_room(self) -> int:
        """How many samples beyond `places` may be started because they are cheap."""
        return 0

    @abstractmethod
    def accept(self, entry: Entry) -> None:
        """Take an entry from the step before."""

    @abstractmethod
    def dispatch(self) -> None:
        """Start on the entries in `inbox`: the window has put some there."""

    def close(self) -> None:
        """Accept no more entries, and do not start those that wait."""
        self.closed = True
        self.meter.retired = True
        self.meter.release(self)
        self.inbox.clear()

    def _stamp(self, entries: Sequence[Entry]) -> None:
        """The calls for `entries` begin."""
        if self.stamps:
            batches = self._run.consumer.batches
            for entry in entries:
                if entry.begun < 0:
                    entry.begun = batches

    def _fail(self, entry: Entry, error: BaseException, label: str) -> None:
        if self.stop is not None:
            entry.stop = stop_of(entry) or self.stop
        annotate(error, label, entry, self._run.epoch)
        self._window.now = perf_counter()
        entry.error = error
        entry.value = None
        self.meter.errors += 1
        self._window.failed()
        self._finished(entry)

    def _drop(self, entry: Entry, *, nothing: bool = False) -> None:
        """Leave out an entry that a predicate refused.

        Args:
            entry: The entry.
            nothing: Its value was None. A function gave the sample up and may make it in the next epoch, so no cache
                keeps that it was refused.
        """
        if self.stop is not None:
            entry.stop = stop_of(entry) or self.stop
        self.meter.dropped += 1
        if nothing:
            self.meter.gaps = True
            entry.kept_as = None
        entry.state = DROPPED
        entry.value = None
        self._finished(entry)


def bind_in_a_row(steps: Sequence[Step], run: "Run", window: "Window", forward: Forward, finished: Forward) -> None:
    """Bind `steps` so that each forwards to the next one, and the last one to `forward`."""
    for step, following in zip_longest(steps, steps[1:]):
        step.bind(run, window, forward if following is None else following.accept, finished)


class InPlaceStep(Step):
    """Calls `fn` on the loop. Only for functions of ours that take less time than a hop and never raise."""

    def __init__(self, fn: Callable[[Any], Any], name: str) -> None:
        super().__init__(StageMeter(name, "sync"), 1)
        self._fn = fn

    def accept(self, entry: Entry) -> None:
        self.meter.samples += 1
        entry.value = self._fn(entry.value)
        self._forward(entry)

    def dispatch(self) -> None:
        while self.inbox:
            self.accept(self.inbox.popleft())
