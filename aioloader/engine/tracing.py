"""A trace of one sample in n. What is not traced pays nothing: no step asks of a sample whether it is.

A sample that is chosen becomes an entry of another class, one attribute of which tells when it is used: an async step
takes the `value` when a call begins, and the entry becomes one of a third class; it notes in `since` when the call has
ended, and after the last step of its window the entry is one as all others again. So nobody pays for it who comes
later, nor for what is read or written more often. Threads look at the class of a sample if their step is traced. Where
samples travel, to processes and to executors of other kinds, only the journey of a hop is known.

Which samples these are is decided when they come into a window, a run at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from aioloader.core.entry import Entry, failed_in
from aioloader.core.safe_text import safe_repr
from aioloader.executors.current_sample import SampleContext, current_sample
from aioloader.insight.meters import ConsumerMeter
from aioloader.insight.trace_file import FLUSH_EVENTS, TraceFile, Track

if TYPE_CHECKING:
    from aioloader.engine.node import Node
    from aioloader.engine.steps import Step
    from aioloader.engine.window import Window

__all__ = ["CalledEntry", "StepTrace", "TracedConsumer", "TracedEntry", "Tracer"]

NOTICEABLE_SECONDS: Final = 1e-3  # of waits that take less, one in n is written
OF_BATCHES: Final = 10  # times as many batches are traced as samples


class Tracer:
    """Traces the epochs of one loader.

    Args:
        file: Where to.
        every: One sample in so many.
    """

    def __init__(self, file: TraceFile, every: int) -> None:
        self.file = file
        self.every = every
        self._consumer = file.track("consumer", "batch")
        self._last: WeakKeyDictionary[Node, StepTrace] = WeakKeyDictionary()  # the last step of each window

    def consumer(self, epoch: int) -> "TracedConsumer":
        """Counts for an epoch that begins."""
        self._consumer.instant(f"epoch {epoch} begins")
        meter = TracedConsumer()
        meter.every, meter.track = self.every, self._consumer
        return meter

    def watch(self, window: "Window", steps: Sequence["Step"]) -> None:
        """Trace what a window does, which is about to start; the one before it is traced by now."""
        trace: StepTrace | None = None
        for step in steps:
            if step.concurrency:
                if trace is not None:
                    trace.after = TracedEntry
                name = step.meter.name
                trace = step.trace = StepTrace(self.file.track(name), self.file.track(f"{name}: retries"))
        if trace is None:
            return
        self._last[window] = trace
        if (before := self._last.get(window.upstream)) is not None:
            before.after = TracedEntry  # the same samples: nothing is between the two
        else:
            window.choose = _choosing(self.every, self.file)


def _choosing(every: int, file: TraceFile) -> Callable[[list[Entry]], None]:
    """Chooses one of `every` samples; of batches, which take longer, ten times as many."""
    left: int | None = None  # until the next one; None: nothing has come yet

    def choose(run: list[Entry]) -> None:
        nonlocal left, every
        count = len(run)
        if left is None:
            left, every = 0, max(1, every // OF_BATCHES) if type(run[0].key) is list else every
        if left >= count:
            left -= count
            return
        chosen = run[left::every]
        for entry in chosen:
            entry.__class__ = TracedEntry
        left = (left - count) % every
        file.expected += len(chosen)
        if file.expected >= FLUSH_EVENTS:  # entries add theirs without a look
            file.flush()

    return choose


class TracedConsumer(ConsumerMeter):
    """Writes the waits of the consumer: those that are noticeable, and of the others one in n."""

    every: int
    track: Track

    def delivered(self, called: float) -> None:
        ConsumerMeter.delivered(self, called)
        if self.last_waited_seconds >= NOTICEABLE_SECONDS or not self.batches % self.every:
            first = self.batches == 1
            name = "wait for the first batch" if first else "wait"
            self.track.slice(name, called, called + self.last_waited_seconds, self.batches - 1)

    def finish(self) -> None:
        super().finish()
        self.track.file.flush()  # who looks at an epoch that is over finds all of it


class StepTrace:
    """The track of a step, and a second one for attempts that wait and for second calls.

    Attributes:
        track: Of its calls.
        events: On that track.
        after: What a traced entry becomes when its call has ended: `TracedEntry`, if another step or window follows.
    """

    after: type[Entry] = Entry

    def __init__(self, track: Track, retries: Track) -> None:
        self.track = track
        self.events = track.events
        self._retries = retries

    # -- async calls -------------------------------------------------------------------------------------------------

    def context(self, seed: int | None) -> "TracedContext":
        """For a worker of an async step."""
        return TracedContext(seed, self)

    # -- threads -----------------------------------------------------------------------------------------------------

    def timed(self, entry: Entry) -> Iterator[Any]:
        """Its sample, and the time until the next one is taken, or the hop is over; in the thread."""
        began = perf_counter()
        try:
            yield entry.value
        finally:
            self.track.sample(entry.key, began, perf_counter(), entry.position, entry.attempts)

    # -- what travels ------------------------------------------------------------------------------------------------

    def hop(self, entries: Sequence[Entry], busy_seconds: float) -> None:
        """Some have come back, from a process or an executor: one slice for all, if one of them is traced."""
        traced = next((entry for entry in entries if type(entry) is not Entry), None)
        if traced is not None:
            now = perf_counter()
            if len(entries) == 1:
                self.track.sample(traced.key, now - busy_seconds, now, traced.position, traced.attempts)
            else:
                self.track.slice(f"{len(entries)} samples in a hop", now - busy_seconds, now, one=traced.key)

    # -- what seldom happens, for all samples ------------------------------------------------------------------------

    def failed(self, entry: Entry, error: BaseException) -> None:
        """A sample has failed for good."""
        self.track.instant(f"{type(error).__name__} in {_name(entry)}", stage=failed_in(entry), error=safe_repr(error))

    def retry(self, entry: Entry, error: BaseException, attempt: int, seconds: float) -> None:
        """A sample has failed, and waits for its next attempt."""
        if type(entry) is CalledEntry:
            entry.since = 0.0  # this attempt is over
            entry.__class__ = TracedEntry  # type: ignore[assignment]  # mypy: of the type that it was found to be
        now = perf_counter()
        name = f"{_name(entry)} waits for attempt {attempt}"
        self._retries.slice(name, now, now + seconds, after=safe_repr(error))

    def second_call(self, name: Any, began: float) -> None:
        """A second call, which began then, is over."""
        key = _name(name) if isinstance(name, Entry) else "sample"
        self._retries.slice(f"{key}, second call", began, perf_counter())


class TracedContext(SampleContext):
    """Of a worker of an async step that is traced by `trace`."""

    __slots__ = ("trace",)

    def __init__(self, seed: int | None, trace: StepTrace) -> None:
        super().__init__(seed)
        self.trace = trace


class TracedEntry(Entry):
    """An entry that is traced. It has no attributes of its own, so that any entry can become one."""

    __slots__ = ()

    @property
    def value(self) -> Any:
        context = current_sample.get()
        if type(context) is TracedContext and context.name is self:  # a call begins, and not somebody weighs it
            self.since = context.trace, perf_counter()  # type: ignore[assignment]  # see `CalledEntry`
            self.__class__ = CalledEntry  # type: ignore[assignment]
            return self.value
        return _value_of(self)

    @value.setter
    def value(self, value: Any) -> None:
        _set_value(self, value)


class CalledEntry(Entry):
    """The same while an async function is called for it.

    In the place of `since`, for which nobody asks before the call has ended, is where it is traced and when it began.
    """

    __slots__ = ()

    @property
    def since(self) -> float:
        began: float = _since_of(self)[1]
        return began

    @since.setter
    def since(self, at: float) -> None:
        """The call has ended."""
        self.__class__ = Entry  # type: ignore[assignment]  # whose attributes are its own
        call: Any = self.since  # what `TracedEntry` has put there
        trace, began = call
        attempts = 1 if self.rare is None else self.attempts
        trace.events.append((self.key, began, perf_counter(), self.position, attempts, None))
        self.since = at
        if trace.after is not Entry:
            self.__class__ = trace.after


_value_of: Final[Callable[[Entry], Any]] = Entry.__dict__["value"].__get__
_set_value: Final[Callable[[Entry, Any], None]] = Entry.__dict__["value"].__set__
_since_of: Final[Callable[[Entry], Any]] = Entry.__dict__["since"].__get__


def _name(entry: Entry) -> str:
    key = entry.key
    if type(key) is list:
        return f"{len(key)} samples"
    return key if type(key) is str else safe_repr(key, 80)
