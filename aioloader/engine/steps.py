"""The two ways in which a stage of a journey runs: awaited on the loop, or in chunks through an executor."""

from abc import ABC, abstractmethod
from asyncio import CancelledError, Future, current_task
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from itertools import zip_longest
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.entry import DROPPED, Entry, annotate
from aioloader.core.safe_text import add_note, safe_str
from aioloader.engine.node import cheap_samples
from aioloader.errors import SampleCancelledError
from aioloader.executors.current_sample import SampleContext, current_sample
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["AsyncStep", "Forward", "InPlaceStep", "Step", "bind_in_a_row"]

Forward = Callable[[Entry], None]

OTHER_LOOP: Final = (
    "attached to a different loop",  # asyncio: a future or a task
    "bound to a different event loop",  # asyncio: a lock, a semaphore, a queue
    "should be used inside a task",  # aiohttp's and async_timeout's timeouts, which look for a task of their own loop
    "Event loop is closed",  # asyncio: a client of an epoch before, or of an `asyncio.run` that is over
)
"""What errors say that are raised where a client of one event loop is used on another."""

OTHER_LOOP_NOTE: Final = (
    "aioloader: under `for`, async functions run on a private event loop, and this looks like a client that was made "
    "on another one; make it at the first sample, and iterate within `with loader:`, which keeps that loop for all "
    "epochs, or use `async for`, which runs on yours"
)

STREAK_SECONDS: Final = 0.001  # how long a worker goes on without a turn of the loop, when nothing suspends


class Step(ABC):
    """One stage of a window's journeys.

    Attributes:
        inbox: Entries that wait for this step. Bounded by the window's room, like everything in it.
        places: As many entries count as under way here in the window's room, see `StepsRoom`.
        selects: It leaves samples out.
    """

    closed: bool = False
    selects: bool = False

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

    @property
    def extra_room(self) -> int:
        """How many samples more than it has places for may be begun, since they are cheap."""
        return 0

    @abstractmethod
    def accept(self, entry: Entry) -> None:
        """An entry comes from the step before."""

    @abstractmethod
    def dispatch(self) -> None:
        """`inbox` has been filled."""

    def close(self) -> None:
        """Nothing will be accepted any more, and what waits is not begun."""
        self.closed = True
        self.meter.retired = True
        self.inbox.clear()

    def _fail(self, entry: Entry, error: BaseException, label: str) -> None:
        annotate(error, label, entry, self._run.epoch)
        entry.error = error
        entry.value = None
        self.meter.errors += 1
        self._window.failed()
        self._finished(entry)

    def _drop(self, entry: Entry, *, nothing: bool = False) -> None:
        """A predicate refused it.

        Args:
            entry: The sample.
            nothing: It was None: what gave it up may give it another time, so that no cache keeps that.
        """
        self.meter.dropped += 1
        if nothing:
            self.meter.gaps = True
            entry.kept_as = None
        entry.state = DROPPED
        entry.value = None
        self._finished(entry)


def bind_in_a_row(steps: Sequence[Step], run: "Run", window: "Window", forward: Forward, finished: Forward) -> None:
    """Bind `steps` so that each gives to the next one, and the last one to `forward`."""
    for step, following in zip_longest(steps, steps[1:]):
        step.bind(run, window, forward if following is None else following.accept, finished)


class InPlaceStep(Step):
    """Calls `fn`, which is ours and takes less time than a hop, on the loop.

    Args:
        fn: Raises nothing.
        name: For statistics.
    """

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


class AsyncStep(Step):
    """Awaits `fn` on the loop, in up to `concurrency` long-lived workers.

    No task per sample: a worker takes the next entry as soon as it is done with one, and when `fn` does not suspend, a
    single worker does them all without a turn of the loop. Workers are started, and woken, only as they are needed.
    """

    def __init__(
        self,
        fn: Callable[[Any], Awaitable[Any]],
        concurrency: int,
        name: str,
        *,
        predicate: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(StageMeter(name, "async"), concurrency)
        self._fn = fn
        self._seed = seed  # see `Call`
        self._predicate = self.selects = predicate
        self._workers = 0
        self._coming = 0  # workers that have been woken or started and have not run yet
        self._idle: list[Future[None]] = []
        self._runner: object = None  # the worker that ran last

    def accept(self, entry: Entry) -> None:
        if not self.closed:
            self.inbox.append(entry)
            self.dispatch()

    @property
    def extra_room(self) -> int:
        return cheap_samples(self.meter)

    def dispatch(self) -> None:
        self.meter.idle.wait_for(None)
        self._summon()

    def close(self) -> None:
        super().close()
        for future in self._idle:
            if not future.done():
                future.set_result(None)
        self._idle.clear()

    def _fail(self, entry: Entry, error: BaseException, label: str) -> None:
        super()._fail(entry, error, label)
        if (
            isinstance(error, RuntimeError)
            and self._run.private_loop
            and OTHER_LOOP_NOTE not in getattr(error, "__notes__", ())
            and any(words in safe_str(error) for words in OTHER_LOOP)
        ):
            add_note(error, OTHER_LOOP_NOTE)

    def _summon(self) -> None:
        """Bring up to two more workers.

        How many are under way already decides how many may be on their way: the crowd doubles with each turn of the
        loop where samples wait (512 requests are out after ten turns), and is two where they do not, since the worker
        that runs has emptied the inbox before the others arrive. Nothing is ever left lying: whoever arrives takes an
        entry, and brings the next ones before it suspends.
        """
        for _ in range(2):
            if self._coming > self._workers - len(self._idle) - self._coming:
                return
            if self._idle:
                future = self._idle.pop()
                if future.done():  # a cancelled one belongs to a worker that is being closed
                    continue
                future.set_result(None)
            elif self._workers < self.concurrency:
                self._workers += 1
                self._start_worker()
            else:
                return
            self._coming += 1

    def _start_worker(self) -> None:
        context = self._run.context.copy()
        self._run.spawn(self._work, context, context=context)

    async def _work(self, context: Context) -> None:
        run, inbox, idle, fn, forward, meter = self._run, self.inbox, self._idle, self._fn, self._forward, self.meter
        create_future, predicate = run.loop.create_future, self._predicate
        me = current_task()
        assert me is not None
        sample = SampleContext(self._seed)
        current_sample.set(sample)  # in the context of this task
        clean = context.copy()
        self._coming -= 1
        count = 0  # samples since `began` that the meter does not know of
        woken = began = perf_counter()
        while True:
            if not inbox:
                now = perf_counter()
                meter.samples += count
                meter.busy_seconds += now - began
                count = 0
                if len(idle) + 1 == self._workers and self._window.under_way:
                    meter.idle.wait_for("input")  # from the step before; of the first step the window knows better
                if not self.closed and now - woken < STREAK_SECONDS:
                    run.drain()
                if not inbox:
                    sample.name = sample.rng = None
                if self.closed:
                    return
                if not inbox:
                    future = create_future()
                    idle.append(future)
                    await future
                    self._coming -= 1
                    woken = now = perf_counter()
                began = now
                continue
            entry = inbox.popleft()
            if self._runner is not me:  # else those who were summoned then are still on their way
                self._runner = me
                if inbox:
                    self._summon()
                now = perf_counter()
                meter.samples += count
                meter.busy_seconds += now - began
                count = 0
                began = now
            sample.name = entry
            try:
                result = await fn(entry.value)
                dropped = predicate and not result
            except CancelledError as error:
                if run.stopping:
                    raise
                cancelled = SampleCancelledError(f"{meter.name} was cancelled from inside, not by the loader")
                cancelled.__cause__ = error
                while me.cancelling():  # answered: the supervisor's cancellation is another one
                    me.uncancel()
                self._fail(entry, cancelled, meter.name)
                del cancelled
            except BaseException as error:  # what ends a program, too, is the consumer's; here it would end the loop
                self._fail(entry, error, meter.name)
            else:
                if dropped:
                    self._drop(entry, nothing=entry.value is None)
                else:
                    if not predicate:
                        entry.value = result
                    forward(entry)
                del result  # or a sample would live as long as its worker is idle
            count += 1
            del entry
            try:
                is_clean = context == clean
            except Exception:
                is_clean = False
            if not is_clean:  # as in `isolated`; a task has one context for life, so another takes this one's place
                meter.samples += count
                meter.busy_seconds += perf_counter() - began
                self._coming += 1
                self._start_worker()
                return
