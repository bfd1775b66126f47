"""The step that awaits an async function on the loop, for many samples at once."""

from asyncio import CancelledError, Future, Task, current_task
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.entry import DONE, Entry
from aioloader.core.limit import Limit, Slots
from aioloader.core.policies import Policies
from aioloader.core.policy_log import Waiting
from aioloader.core.safe_text import add_note, safe_str
from aioloader.engine.guard import Guard, GuardedCall
from aioloader.engine.node import cheap_samples
from aioloader.engine.steps import Forward, Step
from aioloader.engine.worker_slot import WorkerSlot
from aioloader.errors import SampleCancelledError
from aioloader.executors.current_sample import SampleContext, current_sample
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["AsyncStep"]

OTHER_LOOP: Final = (
    "attached to a different loop",  # asyncio: a future or a task
    "bound to a different event loop",  # asyncio: a lock, a semaphore, a queue
    "should be used inside a task",  # timeouts of aiohttp and async_timeout, which look for a task of their own loop
    "Event loop is closed",  # asyncio: a client of an earlier epoch, or of an `asyncio.run` that has returned
)
"""Parts of the errors that are raised when a client of one event loop is used on another."""

OTHER_LOOP_NOTE: Final = (
    "aioloader: under `for`, async functions run on a private event loop, and this looks like a client that was made "
    "on another one; make it at the first sample, and iterate within `with loader:`, which keeps that loop for all "
    "epochs, or use `async for`, which runs on yours"
)

STREAK_SECONDS: Final = 0.001  # how long a worker may go on without a turn of the loop, when nothing suspends


class AsyncStep(Step):
    """Awaits `fn` on the loop, in up to `concurrency` long-lived workers.

    There is no task per sample: a worker that finishes one sample takes the next, and when `fn` does not suspend, a
    single worker does them all without a turn of the loop. Workers are started and woken only as they are needed.
    Under a `Limit` one that gets no slot waits like one without samples, and is woken when the step is granted one.

    A worker only puts down what it has finished, and the window is told of many samples together: until the worker
    waits, nobody else runs who could miss them. It tells before it waits for more; and where it waits in the function
    instead, the loop's next turn does, before anything else (`_turned`, which is on its way from the moment in which a
    worker begins a sample).
    """

    calls_on_loop = True
    tells_end = True

    def __init__(
        self,
        fn: Callable[[Any], Awaitable[Any]],
        concurrency: int | Limit,
        name: str,
        *,
        predicate: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(StageMeter(name, "async"), concurrency)
        self._fn = fn
        self._guard: Guard | None = None
        self._seed = seed  # see `Call`
        self._predicate = self.selects = predicate
        self._workers = 0
        self._coming = 0  # workers that have been started or woken and have not run yet
        self._idle: list[Future[None]] = []  # one per worker that waits
        self._runner: object = None  # the worker that ran last; None: since then the loop has had a turn
        self._turn_seen = True  # nobody waits to be told of the next turn
        self._samples: set[SampleContext] = set()  # one per worker
        self._done: list[Entry] = []  # finished, but the window does not know

    def obey(self, policies: Policies) -> None:
        super().obey(policies)
        if policies.timeout is not None or policies.hedge is not None:
            self._guard = Guard(
                self._fn, self.meter.name, policies.timeout, policies.hedge, timeout_name=policies.timeout_name
            )

    def bind(self, run: "Run", window: "Window", forward: Forward, finished: Forward) -> None:
        super().bind(run, window, forward, finished)
        if self._guard is not None:
            self._guard.bind(run, self)

    def accept(self, entry: Entry) -> None:
        if self.closed:
            return
        if (tap := self.tap) is not None:
            if self.inbox and not (self.paused or tap.throttled):  # there is no place free: nothing more is to be done
                tap.waiting.append(entry)
            else:
                tap.add((entry,))
            return
        self.inbox.append(entry)
        self.dispatch()

    @property
    def extra_room(self) -> int:
        return cheap_samples(self.meter)

    @property
    def free_places(self) -> int:
        if self.inbox:
            return 0
        free = self.concurrency - self._workers + len(self._idle) + self.extra_room  # such as take no time to speak of
        if self._guard is not None and self._guard.crowded:
            free = min(free, self.concurrency - self._guard.busy + self.extra_room)
        return free if self.slots is None else min(free, 1)

    @property
    def rests(self) -> bool:
        return not self.at_hand()

    def at_hand(self) -> list[tuple[Any, float]]:
        # The name is read before the time, and a worker writes the time first: it is never older than its sample.
        names = [(sample.name, sample.since) for sample in self._samples.copy()]
        # What a function has put there to load several samples is only to be asked by itself, see `BulkLoad`.
        return [(name.key if isinstance(name, Entry) else None, since) for name, since in names if name is not None]

    def waiting(self) -> Waiting:
        waiting = super().waiting()
        return waiting if self._guard is None else waiting._replace(for_second_call=self._guard.wanted)

    def dispatch(self) -> None:
        if self.paused:
            self._set_aside()
            return
        self.meter.idle.wait_for(None)
        self._summon()

    def close(self) -> None:
        super().close()
        if self._guard is not None:
            self._guard.close()
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
        """Start or wake up to two more workers.

        The number of running workers limits how many may be on their way. Where samples wait, the crowd therefore
        doubles with each turn of the loop (512 requests are out after ten turns); where none wait it stays at two,
        since the running worker has emptied the inbox before the others arrive. No sample is left behind: each worker
        that arrives takes one, and summons the next workers before it suspends. Where they wait for a slot, more
        workers would not help: the step is told when it has one.
        """
        slots = self.slots
        if slots is not None and slots.waits and not slots.granted:
            return
        for _ in range(2):
            if self._coming > self._workers - len(self._idle) - self._coming:
                return
            if self._idle:
                future = self._idle.pop()
                if future.done():  # cancelled, with the worker that waited for it
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
        if self.slots is None:
            self._run.spawn(self._work, context, self.inbox, context=context)
        else:
            self._run.spawn(self._work_in_slots, context, self.inbox, self.slots, context=context)

    def follow_limit(self, limit: Limit) -> None:
        idle, self._idle = self._idle, []
        for future in idle:  # they have no slots: each ends, and others take over
            if not future.done():
                future.set_result(None)
                self._coming += 1
        super().follow_limit(limit)

    def _use(self, slots: Slots) -> None:
        if self._guard is not None:
            self._follow(slots)
            self._guard.serve()
        super()._use(slots)

    @property
    def _wants_slots(self) -> bool:
        return bool(self.inbox) or (self._guard is not None and self._guard.waits)

    @property
    def _coming_for_slots(self) -> bool:
        return self._coming > 0

    async def _work_in_slots(self, context: Context, inbox: deque[Entry], slots: Slots) -> None:
        slot = WorkerSlot(slots)
        try:
            await self._work(context, inbox, slot)
        finally:
            slot.leave()

    async def _work(self, context: Context, inbox: deque[Entry], slot: WorkerSlot | None = None) -> None:
        run, fn, forward, predicate = self._run, self._fn, self._forward, self._predicate
        window, meter, tap = self._window, self.meter, self.tap
        me = current_task()
        assert me is not None
        sample = SampleContext(self._seed) if self.trace is None else self.trace.context(self._seed)
        guard, call = self._guard, None
        if guard is not None:
            call = guard.for_worker(me, sample)
        current_sample.set(sample)  # in this task's own context
        self._samples.add(sample)
        clean = context.copy()
        gated, plain = slot is not None or guard is not None, guard is None and not predicate
        put_down = self._done.append if plain and self._in_place else forward
        # What is tried again has begun before.
        fresh, stamps, consumer = self.fresh and self.retrying is None, self.stamps, run.consumer
        self._coming -= 1
        count = 0  # samples since `began`, not yet in the meter
        woken = began = sample.since = window.now = perf_counter()
        resumed = True  # others may have run since the last sample
        while True:
            if not inbox:
                began, count = self._counted(count, began), 0
                sample.since = began
                if call is not None:
                    call.rest()
                if self._done:
                    self._settle()
                self._ran_out(began - woken)
                if inbox is not self.inbox:
                    self._end(sample)
                    return
                if tap is not None and tap.waiting:
                    tap.pump(at_hand=guard is None or not (guard.crowded and guard.full))
                if inbox:
                    continue
                if slot is not None:
                    slot.leave(idle=True)
                if guard is not None and guard.waits:
                    guard.serve()
                sample.name = sample.rng = None
                if self.closed:
                    self._samples.discard(sample)
                    window.rested()
                    return
                await self._wait()
                woken = began = sample.since = window.now = perf_counter()
                resumed = True
                continue
            if gated:
                if (guard is None or guard.crowded or slot is not None) and not self._may_begin(slot, call):
                    began, count = self._counted(count, began), 0
                    sample.name = sample.rng = None
                    if self._done:
                        self._settle()
                    await self._wait()
                    woken = began = sample.since = window.now = perf_counter()
                    resumed = True
                    continue
                if call is not None:
                    call.began = now = perf_counter() if count else began  # which is now
                    if not call.guard.watched:
                        call.guard.watch(now)
            entry = inbox.popleft()
            if resumed:  # else the workers summoned before are still on their way
                resumed = False
                self._runner = me
                if self._turn_seen:
                    self._watch_turn()
                if inbox:
                    if self._idle or self._workers < self.concurrency:
                        self._summon()
                elif tap is not None and tap.waiting:
                    tap.pump()
            if fresh or (stamps and entry.begun < 0):
                entry.begun = consumer.batches  # in another thread that may have got more since the last sample
            sample.name = entry
            try:
                result = await fn(entry.value)
                if not plain:
                    if call is not None and call.touched:
                        result = await call.guard.outcome(call, result, None)
                    refused = predicate and not result
            except BaseException as error:  # SystemExit too is for the consumer; raised here, it would end the loop
                failure: BaseException | None = error
                if call is not None and call.touched:
                    failure = await call.guard.failed(call, entry, error)
                if isinstance(failure, CancelledError):
                    if run.stopping and failure is error:
                        raise
                    if run.stopping:  # while it was waited what the call comes to
                        raise CancelledError from None
                    failure = self._cancelled_inside(me, failure)
                began, count = self._counted(count + 1, began), -1  # which is 0 in a moment
                seconds = began - sample.since
                sample.since, resumed = began, True
                if failure is None:
                    entry.since = began
                    forward(entry)
                else:
                    entry.seconds = seconds
                    self._fail(entry, failure, self.meter.name)
                del failure
            else:
                if self._runner is not me:  # it has suspended: what follows happens now
                    now = window.now = perf_counter()  # as in `_counted`, which this is too often for
                    meter.samples += count + 1
                    meter.busy_seconds += now - began
                    sample.since = began = now
                    count, resumed = -1, True
                    if call is not None and call.guard.measured:
                        call.ended()
                entry.since = began  # else it took no time to speak of
                if not predicate:
                    entry.value = result
                    put_down(entry)
                elif refused:
                    self._drop(entry, nothing=entry.value is None)
                else:
                    forward(entry)
                del result  # else an idle worker would keep its last sample alive
            count += 1
            del entry
            try:
                if context == clean:
                    continue
            except Exception:  # a user's `__eq__` failed: not clean, as far as anyone can tell
                pass
            # As in `isolated`. A task keeps its context for life, so another task takes over from this one.
            self._samples.discard(sample)
            self._counted(count, began)
            if call is not None:
                call.rest()
            if self._done:
                self._settle()
            self._coming += 1
            self._start_worker()
            return

    def _may_begin(self, slot: WorkerSlot | None, call: GuardedCall | None) -> bool:
        """Whether a worker may begin a call: there is a place beside second calls, and a slot."""
        guard = self._guard
        if call is not None:
            call.rest()
        if guard is not None and guard.crowded:
            if guard.waits and slot is not None:
                slot.leave()  # for a second call, unless another stage has waited for longer
            guard.serve()
            if guard.full:
                if slot is not None:
                    slot.leave()
                return False
        return slot is None or slot.ready()

    def go_on(self) -> None:
        """A call or a worker has ended, and nobody is on the way who would begin the next call."""
        if self.closed or self.paused:
            return
        if self.tap is not None:
            self.tap.pump()
        if self.inbox:
            self._summon()

    def _watch_turn(self) -> None:
        """A worker begins a sample after others may have run. As long as none does, it reads no clock.

        If it is the only one that works, nobody else would tell it that it has been suspended: so the loop's next turn
        does.
        """
        self._turn_seen = False
        self._run.after_turn(self._turned)

    def _turned(self) -> None:
        self._turn_seen = True
        self._runner = None
        if self._done:
            self._settle()

    def _settle(self) -> None:
        """Let the window know what has been put down."""
        done = self._done
        for entry in done:
            entry.state = DONE
        count = len(done)
        done.clear()
        self._window.finished_in_place(count)

    def _counted(self, count: int, began: float) -> float:
        """Add `count` samples since `began` to the meter; returns the time."""
        now = self._window.now = perf_counter()
        if count:
            self.meter.samples += count
            self.meter.busy_seconds += now - began
        return now

    def _ran_out(self, streak_seconds: float) -> None:
        """A worker has emptied the inbox, `streak_seconds` after it was woken: see whether more comes at once."""
        if len(self._idle) + 1 == self._workers and self._window.under_way:
            self.meter.idle.wait_for("input")  # from the step before; for the first step, the window knows better
        if not self.closed and streak_seconds < STREAK_SECONDS:
            self._run.drain()

    def _end(self, sample: SampleContext) -> None:
        """A worker ends, since its step follows a limit now, for which others ask, see `follow_limit`."""
        self._samples.discard(sample)
        self._workers -= 1
        if self.closed:
            self._window.rested()
        self.go_on()

    async def _wait(self) -> None:
        future = self._run.loop.create_future()
        self._idle.append(future)
        await future
        self._coming -= 1

    def _cancelled_inside(self, me: "Task[Any]", cause: CancelledError) -> SampleCancelledError:
        """The error of a sample whose function was cancelled, though nobody cancelled the loader."""
        error = SampleCancelledError(f"{self.meter.name} was cancelled from inside, not by the loader")
        error.__cause__ = cause
        while me.cancelling():  # dealt with: when the supervisor cancels, that is another cancellation
            me.uncancel()
        return error
