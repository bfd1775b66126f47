"""What the steps of a window have in common, and the simplest one."""

from abc import ABC, abstractmethod
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aioloader.core.entry import DROPPED, Entry, annotate, stop_of
from aioloader.core.limit import Limit, Slots, width_of
from aioloader.core.policies import Policies
from aioloader.core.policy_log import Waiting
from aioloader.core.written import Written
from aioloader.engine.retrying import Retrying, Tap
from aioloader.engine.step_protocols import StepWindow, TraceOfStep
from aioloader.executors.chunk import Stop
from aioloader.insight.meters import StageMeter
from aioloader.insight.policies import PolicyMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["Forward", "InPlaceStep", "Step", "bind_in_a_row"]

Forward = Callable[[Entry], None]


class Step(ABC):
    """One step of a window: each entry goes through all of them in turn.

    How it pauses, so that no sample begins (see `pausing`): the entries that wait are moved out of the inbox. Threads
    claim a sample by taking it from there, which is one operation of a deque. So each of them is either in a thread's
    hands by then, and has begun, or it is set aside; there is no flag that a thread might have looked at just before.

    Args:
        meter: Counts for it.
        concurrency: How many entries may be under way in it; a `Limit` is followed.

    Attributes:
        concurrency: How many may be under way in it now.
        inbox: Entries that wait for this step. The window's room bounds it, as it bounds everything in the window.
        places: How many entries under way in this step the window makes room for, see `StepsRoom`.
        places_follow: `places` is `concurrency`, and not for the room to decide.
        most: The most that `concurrency` may become; None: what its `Limit` says.
        selects: Whether it may drop samples.
        paused: No entry begins.
        retrying: Entries that fail may be tried again.
        tap: Lets entries into the inbox at a rate.
        stamps: Its call may be the first one for an entry, see `Entry.begun`. The window says so.
        stop: What is said of samples that end in it, unless that is known of them already; None: nobody asks.
        fresh: It is the first one for each.
        tells_end: Each entry that it sends on has its `since`.
        trace: Where to trace some samples; None: nobody does.
        bound: It has joined a run.
        stated: Its concurrency as it was given.
        written: Where the user writes its concurrency, of each call of his that has a function in it; empty: nowhere.
    """

    closed: bool = False
    selects: bool = False
    paused: bool = False
    retrying: Retrying | None = None
    tap: Tap | None = None
    places_follow: bool = True
    most: int | None = None
    calls_on_loop: bool = False  # see `Limit.join`
    stamps: bool = False
    stop: Stop | None = None
    fresh: bool = False
    tells_end: bool = False
    trace: TraceOfStep | None = None
    written: tuple[Written, ...] = ()
    bound: bool = False

    def __init__(self, meter: StageMeter, concurrency: int | Limit) -> None:
        self.meter = meter
        self.limit = concurrency if isinstance(concurrency, Limit) else None
        self.concurrency = self.places = self.stated = meter.concurrency = width_of(concurrency)
        self.slots: Slots | None = None
        self.inbox: deque[Entry] = deque()
        self._aside: deque[Entry] = deque()  # they have not begun

    @property
    def parts(self) -> "list[Step]":
        """The steps with a meter of their own: this one, unless it is made of others."""
        return [self]

    def bind(self, run: "Run", window: Any, forward: Forward, finished: Forward) -> None:
        """Join a run; entries go to `forward`, but failed and dropped ones to `finished`.

        Args:
            run: It.
            window: A `StepWindow`.
            forward: The next step, or the window.
            finished: Of the window.
        """
        self._run = run
        self._window: StepWindow = window
        self._forward = forward
        self._finished = finished
        self._in_place = window.takes_many(forward)  # many entries at a time
        self.bound = True
        if self.limit is not None:
            self._join(self.limit)

    def at_hand(self) -> Sequence[tuple[Any, float]]:
        """See `Gauge`."""
        return ()

    @property
    def held(self) -> int:
        """See `Gauge`."""
        return self._window.held

    def waiting(self) -> Waiting:
        """What waits in it now, for its policies; called in any thread."""
        attempts, at = (0, None) if self.retrying is None else self.retrying.waiting
        return Waiting(attempts, at, 0 if self.tap is None else self.tap.throttled)

    @property
    def extra_room(self) -> int:
        """How many samples beyond `places` may be started because they are cheap."""
        return 0

    def feeds_batches(self, size: int) -> bool:
        """See `Node.feeds_batches`, of the last step of a window."""
        return False

    @abstractmethod
    def accept(self, entry: Entry) -> None:
        """Take an entry from the step before."""

    @abstractmethod
    def dispatch(self) -> None:
        """Start on the entries in `inbox`: the window has put some there."""

    def take_in(self, entries: Sequence[Entry]) -> None:
        """Begin on entries that come into the window, or come again."""
        if self.tap is not None:
            self.tap.add(entries)
        elif self.paused:
            self._aside.extend(entries)
            self._window.set_aside(len(entries))
        else:
            self.inbox.extend(entries)
            self.dispatch()

    def take_back(self, entries: Sequence[Entry]) -> None:
        """Begin on entries that have waited beside the inbox, since they are older than what is in it. Not paused."""
        if self.tap is not None:
            self.tap.add(entries, first=True)
        else:
            self.inbox.extendleft(reversed(entries))
            self.dispatch()

    def close(self) -> None:
        """Accept no more entries, and do not start those that wait."""
        self.closed = True
        self.meter.retired = True
        self.meter.release(self)
        self.inbox.clear()
        self._aside.clear()
        if self.slots is not None:
            self.slots.close()
        for waiting in (self.retrying, self.tap):
            if waiting is not None:
                waiting.close()

    def obey(self, policies: Policies) -> None:
        """Do about its calls what these say. Before `bind`."""
        self.meter.policies = PolicyMeter(policies)
        if policies.retry is not None:
            self.retrying = Retrying(policies.retry, self)
        if policies.rate is not None:
            self.tap = Tap(policies.rate, self)

    # -- what waits before it ----------------------------------------------------------------------------------------

    @property
    def free_places(self) -> int:
        """How many entries more it can begin on now."""
        return 0 if self.inbox else 1

    def set_aside(self, count: int) -> None:
        """See `Window.set_aside`."""
        self._window.set_aside(count)

    def later(self, seconds: float, callback: Callable[[], None]) -> TimerHandle:
        """Call `callback` on the loop."""
        return self._run.loop.call_later(seconds, self._run.guarded, callback)

    def go_on(self) -> None:  # noqa: B027 - most have no second calls
        """There may be a place for one more call."""

    # -- a limit that is shared --------------------------------------------------------------------------------------

    def _join(self, limit: Limit) -> None:
        self.slots = limit.join(self._run.loop, self._slots_changed, on_loop=self.calls_on_loop)
        self._follow(self.slots)

    def follow_limit(self, limit: Limit) -> None:
        """Have as many calls at once as `limit` says, from now on: before `bind`, or on the loop while it runs.

        Calls that are under way by then have no slots, and still count. Whoever makes them takes samples from an inbox
        that is empty from now on, and so ends with the sample at hand; others, who ask for slots, have the new inbox.
        """
        self.limit = limit
        if not self.bound or self.closed:
            return
        before, self.inbox = self.inbox, deque()
        self.inbox.extend(_taken_from(before))
        self._join(limit)
        self.dispatch()

    def _slots_changed(self) -> None:
        """There may be a slot, or the limit is another one."""
        if self.slots is not None and not (self.closed or self._run.stopping):
            self._run.guarded(self._use, self.slots)

    def _use(self, slots: Slots) -> None:
        self._follow(slots)
        if self.tap is not None:
            self.tap.pump()
        if self.inbox:
            self.dispatch()
        if not self._coming_for_slots:
            slots.give_back(waits=self._wants_slots)

    @property
    def _wants_slots(self) -> bool:
        """Whether calls wait for a slot."""
        return bool(self.inbox)

    @property
    def _coming_for_slots(self) -> bool:
        """Whether somebody is on the way who will take what was granted, or give it back."""
        return False

    def _follow(self, slots: Slots) -> None:
        """Let the concurrency be that of the limit."""
        width = slots.value if self.most is None else min(slots.value, self.most)
        self.meter.concurrency = width
        if width != self.concurrency:
            self.concurrency = width
            self.places = width if self.places_follow else min(self.places, width)
            self._window.resize()

    # -- a pause -----------------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Whether no sample begins any more, since it pauses."""
        return True

    @property
    def rests(self) -> bool:
        """Closed: whether none of its calls is under way, if it waits for them. It tells `Window.rested` then."""
        return True

    def hold(self) -> None:
        """Begin no entry, until `let_go`. Those that are under way go on."""
        self.paused = True
        self._set_aside()
        if self.tap is not None:
            self.tap.hold()

    def let_go(self) -> None:
        """Begin entries again."""
        self.paused = False
        waiting, self._aside = self._aside, deque()
        if waiting:
            self._window.set_aside(-len(waiting))
        if self.tap is not None:
            self.tap.let_go(waiting)
        elif waiting:
            self.take_back(waiting)

    def _set_aside(self) -> None:
        """Move what is in the inbox to where nobody begins it; what comes back from a hop comes here, too."""
        waiting = list(_taken_from(self.inbox))
        if self.tap is not None:
            self.tap.rate.give_back(len(waiting))
        self._aside.extendleft(reversed(waiting))
        self._window.set_aside(len(waiting))

    # -- for what an entry comes to ----------------------------------------------------------------------------------

    def _stamp(self, entries: Sequence[Entry]) -> None:
        """The calls for `entries` begin."""
        if self.stamps:
            batches = self._run.consumer.batches
            for entry in entries:
                if entry.begun < 0:
                    entry.begun = batches

    def _fail(self, entry: Entry, error: BaseException, label: str) -> None:
        if self.tap is not None:
            self.tap.rate.failed(error)
        if self.retrying is not None and self.retrying.again(entry, error):
            return
        if self.stop is not None:
            entry.stop = stop_of(entry) or self.stop
        annotate(error, label, entry, self._run.epoch)
        self._window.now = entry.since = perf_counter()
        entry.error = error
        entry.value = None
        self.meter.errors += 1
        if self.trace is not None:
            self.trace.failed(entry, error)
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


def _taken_from(inbox: deque[Entry]) -> Iterable[Entry]:
    """All entries; threads take some meanwhile."""
    while inbox:
        try:
            yield inbox.popleft()
        except IndexError:
            return


def bind_in_a_row(steps: Sequence[Step], run: "Run", window: StepWindow, forward: Forward, finished: Forward) -> None:
    """Bind `steps` so that each forwards to the next one, and the last one to `forward`."""
    for step, following in zip_longest(steps, steps[1:]):
        step.bind(run, window, forward if following is None else following.accept, finished)


class InPlaceStep(Step):
    """Calls `fn` on the loop. Only for functions of ours that take less time than a hop."""

    def __init__(self, fn: Callable[[Any], Any], name: str) -> None:
        super().__init__(StageMeter(name, "sync"), 1)
        self._fn = fn

    def accept(self, entry: Entry) -> None:
        self.meter.samples += 1
        try:
            entry.value = self._fn(entry.value)
        except Exception as error:
            self._fail(entry, error, self.meter.name)
        else:
            self._forward(entry)

    def dispatch(self) -> None:
        if self.paused:
            self._set_aside()
        while self.inbox:
            self.accept(self.inbox.popleft())
