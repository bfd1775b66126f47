"""The one interface between the parts of a running pipeline, and folds, which need no more than it.

A running pipeline is a tree of nodes on one event loop. Nothing is pushed: whoever is downstream calls `poll`, which
never waits, and takes a *run* of the entries that are ready. When there are none, the node calls `kick` as soon as that
may have changed. So there is no task and no queue between two nodes, and no await per sample; a node that is not polled
does not move, which is all there is to back-pressure.
"""

from abc import ABC, abstractmethod
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from aioloader.core.entry import LAST, ONE_LOST, Entry
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = [
    "CHUNK_SECONDS",
    "MOST_EARLY",
    "Fold",
    "FoldNode",
    "Kick",
    "Node",
    "TimedFold",
    "TimedFoldNode",
    "cheap_samples",
]

Kick = Callable[[], None]

CHUNK_SECONDS: Final = 0.001  # the work that one hop into a thread should be worth

MOST_EARLY: Final = 512  # in a window whose samples are so cheap that its places alone would not fill a hop


def cheap_samples(meter: StageMeter) -> int:
    """How many samples of a stage are worth a hop, beyond the first; 0 where they are not cheap, or not known."""
    if not meter.busy_seconds:
        return 0
    return min(MOST_EARLY, max(0, int(CHUNK_SECONDS * meter.samples / meter.busy_seconds) - 1))


class Node(ABC):
    """A part of a running pipeline that gives entries in order.

    Attributes:
        ended: True once `poll` can never give an entry again.
        holds_ahead: It holds itself what is made ahead for the consumer, who needs no more than the next one at hand.
        beginnings: What may fail when an epoch of this node and those before it begins. Called before `start`, in the
            consumer's thread, where a failure leaves the loader as it was; what is made later calls it in `start`.
    """

    ended: bool = False
    holds_ahead: bool = False
    beginnings: Sequence[Callable[[], None]] = ()

    @property
    def extra_room(self) -> int:
        """How many entries may be taken before there is need of them, since making them costs next to nothing."""
        return 0

    @property
    def gaps(self) -> bool:
        """Whether something failed, or came to nothing, that in another epoch may be more entries, or fewer.

        What comes after it may have another number then.
        """
        return False

    @property
    def live(self) -> bool:
        """Whether its samples are still being produced: none is to be read before it is needed."""
        return False

    @property
    def fresh(self) -> bool:
        """Whether no call has begun for any of its entries, so that nobody need look, see `Entry.begun`."""
        return False

    def feeds_batches(self, size: int) -> bool:
        """Told before it starts that what it gives becomes batches of `size`; whether nobody else has it by then."""
        return False

    def alive(self, size: int) -> int:
        """Samples that have begun and are still here, or in the nodes before, see `Admission`.

        Args:
            size: For how many samples one of its entries stands.
        """
        return 0

    @abstractmethod
    def resume(self, cursor: Any) -> None:
        """Go on after the entry that carried `cursor`, instead of at the beginning. Before `start`, once at most."""

    @abstractmethod
    def start(self, run: "Run", kick: Kick) -> None:
        """Join `run`, once, on its loop; from now on `kick` says that `poll` is worth trying again."""

    @abstractmethod
    def poll(self, limit: int) -> list[Entry]:
        """Take up to `limit` (>= 1) entries that are ready, and ask for the rest.

        Returns:
            Finished entries in order. Empty when none is ready: `ended` tells whether one ever will be, and if so
            `kick` is called once there may be one. A node may begin work for the entries that it could not give, but
            for no more than `limit`.
        """

    def close(self) -> None:  # noqa: B027 - most nodes hold nothing
        """Let go of threads and tasks: nobody will poll again. Called on the loop, more than once if need be."""


class Fold(Protocol):
    """A sequential, cheap rule from entries to entries: it waits for nothing and runs no user code.

    A fold says what its output resumes from: every entry it makes carries the cursor to go on after it. That is one of
    its input, or a tuple of one and of numbers.
    """

    def resume(self, cursor: Any) -> Any:
        """Go on after the output that carried `cursor`; returns the cursor that upstream goes on after.

        None for upstream means its beginning. Called before anything is fed.
        """

    @property
    def full(self) -> bool:
        """True once no further entry is wanted (`take`)."""

    def wants(self, limit: int) -> int:
        """How many entries to take from upstream, at most, when downstream wants `limit`; at least 1."""

    def feed(self, run: list[Entry]) -> Iterable[Entry]:
        """Give what `run` (finished entries, maybe with errors, never `LAST`) makes possible."""

    def flush(self) -> Iterable[Entry]:
        """Upstream has ended: give what is left. Its last entry may be `LAST`, when such an end is a failure."""

    def failed_at(self, cursor: Any) -> Any:
        """Where to go on after what `interrupt` or `flush` gave, and a source that failed with `cursor`.

        It is tried again, and what this fold still holds comes again.
        """


@runtime_checkable
class GivesEarly(Protocol):
    """What a fold also has that gives what it holds before the error of one source among several."""

    def interrupt(self) -> Iterable[Entry]:
        """Such an error comes next: give what may go before it. The other sources go on after it."""


@runtime_checkable
class Gathers(Protocol):
    """What a fold also has that makes one entry of several."""

    def gathers(self, size: int) -> tuple[int, int]:
        """For how many samples an entry that it takes stands, and for how many those that it holds.

        Args:
            size: For how many one stands that it gives.
        """


class FoldNode(Node):
    """Runs a fold over its upstream, in the caller's own call of `poll`.

    Args:
        upstream: Gives the entries.
        fold: The rule.
        unordered_input: Upstream has no fixed order. What a fold knows by number (so many samples of the next batch are
            out) would be said of another entry then: a resume forgets it, and some entries come again rather than
            never. (A number that is longer than JSON's decimal digits is a string.)
        recounts: It knows entries by such numbers. Once one of several sources has failed they are not told: that
            source takes part again after a resume.
    """

    def __init__(self, upstream: Node, fold: Fold, *, unordered_input: bool = False, recounts: bool = False) -> None:
        self._upstream = upstream
        self._fold = fold
        self._unordered_input = unordered_input
        self._recounts = recounts
        self._forgets = False
        self._gaps = False
        self._ready: deque[Entry] = deque()
        self._flushed = False

    def resume(self, cursor: Any) -> None:
        if self._unordered_input:
            cursor = _without_numbers(cursor)
        upstream = self._fold.resume(cursor)
        if upstream is not None:
            self._upstream.resume(upstream)

    @property
    def extra_room(self) -> int:
        return self._upstream.extra_room

    @property
    def live(self) -> bool:
        return self._upstream.live

    @property
    def fresh(self) -> bool:
        return self._upstream.fresh

    def alive(self, size: int) -> int:
        its, held = (size, 0)
        if isinstance(self._fold, Gathers):
            its, held = self._fold.gathers(size)
        return len(self._ready) * size + held + self._upstream.alive(its)

    @property
    def gaps(self) -> bool:
        return self._gaps or self._upstream.gaps

    def start(self, run: "Run", kick: Kick) -> None:
        self._upstream.start(run, kick)

    def poll(self, limit: int) -> list[Entry]:
        ready, fold = self._ready, self._fold
        while not ready:
            if self._flushed:
                self.ended = True
                return []
            if fold.full:
                self._finish()
            elif not self._take_in(fold.wants(limit)):
                return []
        return self._hand_over(limit)

    def _take_in(self, count: int) -> bool:
        """Give the fold up to `count` entries that are ready, or the end; False when there is nothing now."""
        fold, upstream, ready = self._fold, self._upstream, self._ready
        run = upstream.poll(count)
        if run:
            failed = run.pop() if run[-1].state == LAST else None
            self._feed(run)
            if failed is not None or fold.full:
                self._finish()
            if failed is not None:
                failed.cursor = fold.failed_at(failed.cursor)
                if ready and ready[-1].state == LAST:
                    ready.pop()  # what the fold says of an end that is none
                ready.append(failed)
        elif upstream.ended:
            self._finish()
        else:
            return False
        return True

    def _hand_over(self, limit: int) -> list[Entry]:
        """Up to `limit` of what is ready."""
        ready = self._ready
        if len(ready) <= limit:
            taken = list(ready)
            ready.clear()
        else:
            taken = [ready.popleft() for _ in range(limit)]
        self.ended = not ready and self._flushed
        return taken

    def _feed(self, run: list[Entry]) -> None:
        """Give `run` to the fold, but for errors that are no samples: these pass by, after what came before them."""
        fold = self._fold
        begin = 0
        failed = [entry for entry in run if entry.error is not None]  # most often none
        for at, entry in [(at, entry) for at, entry in enumerate(run) if entry.error is not None] if failed else ():
            self._gaps = self._gaps or self._recounts  # an error takes the place of a whole batch's samples
            if entry.state == ONE_LOST:
                self._give(fold.feed(run[begin:at]))
                if isinstance(fold, GivesEarly):
                    self._give(fold.interrupt())
                entry.cursor = fold.failed_at(entry.cursor)
                self._ready.append(entry)
                self._forgets = self._recounts
                begin = at + 1
        self._give(fold.feed(run[begin:] if begin else run))

    def _give(self, out: Iterable[Entry]) -> None:
        if self._forgets:
            out = list(out)
            for entry in out:
                entry.cursor = _without_numbers(entry.cursor)
        self._ready.extend(out)

    def _finish(self) -> None:
        """The fold gets no more input: what it still holds is the end."""
        self._flushed = True
        self._give(self._fold.flush())
        self._upstream.close()  # `take(3)` of an endless stream: its tasks end now, not with the epoch

    def close(self) -> None:
        self._upstream.close()


def _without_numbers(cursor: Any) -> Any:
    if not (isinstance(cursor, list | tuple) and cursor):
        return cursor
    first, *numbers = cursor
    return (first, *(0 if isinstance(number, int | str) else number for number in numbers))


class TimedFold(Fold, Protocol):
    """A fold that holds entries back to give them together, but not for ever."""

    @property
    def waiting(self) -> int | None:
        """The number of the output whose entries wait for more; None: none wait."""

    def cut(self) -> Iterable[Entry]:
        """Time is up: give what waits as it is."""


EARLY_SECONDS: Final = 0.001  # so much before its time a timer may come: libuv counts milliseconds


class TimedFoldNode(FoldNode):
    """Runs a fold whose output is given `max_wait` seconds after its first entry came, at the latest.

    The fold stays passive: a timer of the loop kicks whoever is downstream, who then polls. When there is no room
    downstream nothing happens until there is, and what has come meanwhile is taken first. There is one timer, which
    goes on by itself while outputs become full before their time: it costs nothing per sample.

    Args:
        upstream: Gives the entries.
        fold: The rule.
        max_wait: Seconds of the loop's clock.
        name: For statistics.
    """

    _fold: TimedFold

    def __init__(self, upstream: Node, fold: TimedFold, max_wait: float, name: str) -> None:
        super().__init__(upstream, fold)
        self._max_wait = max_wait
        self._waiting: int | None = None  # the output that was begun at `_began`
        self._began = 0.0
        self._timer: TimerHandle | None = None
        self._closed = False
        self.meter = StageMeter(name, "fold")

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        super().start(run, kick)
        self.meter = run.adopt(self.meter)

    def poll(self, limit: int) -> list[Entry]:
        taken = super().poll(limit)
        if not taken and self._is_due():
            cut = list(self._fold.cut())
            self.meter.partial += len(cut)
            self._ready.extend(cut)
            taken = super().poll(limit)
        self.meter.samples += len(taken)
        if self._fold.waiting != self._waiting:
            self._waiting = self._fold.waiting
            self._began = self._run.loop.time()
            if self._timer is None and self._waiting is not None and not self._closed:
                self._arm()
        return taken

    def close(self) -> None:
        self._closed = True
        self.meter.retired = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().close()

    def _is_due(self) -> bool:
        waits = self._waiting is not None and self._waiting == self._fold.waiting
        return waits and self._run.loop.time() >= self._began + self._max_wait - EARLY_SECONDS

    def _arm(self) -> None:
        self._timer = self._run.loop.call_at(self._began + self._max_wait, self._run.guarded, self._rung)

    def _rung(self) -> None:
        self._timer = None
        if self._is_due():
            self._kick()
        elif self._waiting is not None:  # that output was full in time, and another one has begun
            self._arm()
