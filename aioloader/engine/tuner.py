"""Tunes a loader while it runs: measures in blocks of time, and sets what the search wants to know next.

Nothing is run for it: the batches are those that the consumer takes, at its pace. So what is found is what helps this
consumer, and once it does not wait any more the search is over. It works on the loop of the newest epoch, by a timer
that lives as long as the search: a setting under which nothing comes any more must end, too, so it cannot wait for
batches. Epochs may end meanwhile; the search goes on in the next one. Short ones are a block each, from the end of the
one before.
"""

from asyncio import TimerHandle
from collections.abc import Callable, Generator, Sequence
from threading import RLock
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal

from aioloader.core.climbing import BUSY, FAILING, Axis, Found, Measured, Point, climb
from aioloader.core.cores import usable_cores
from aioloader.engine.knobs import MOST_ROOM, Key, Knobs, RoomKnob, StageKnob
from aioloader.engine.steps import Step
from aioloader.engine.tuned_room import BytesBudget
from aioloader.engine.tuner_readings import LastEpoch, Reading, Taken, WholeEpoch, waited_by

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["Phase", "Tuner"]

BLOCKS: Final = 5  # of a point
BLOCK_SHARE: Final = 1 / 300  # of all seconds, for a block
BLOCK_SECONDS: Final = (0.01, 0.25)
POINT_SHARE: Final = 1 / 12  # of all seconds, for a point at most
STUCK_SHARE: Final = 1 / 6  # of all seconds, after which a point where nothing came is given up
SETTLE_SHARE: Final = 1 / 3  # of a point, to wait for what was begun under the setting before
AWAY_SECONDS: Final = 5.0  # a consumer that takes nothing for longer does something else, such as validation
COMPUTING: Final = 0.8  # threads that use so much of all cores, or of one where they hold the GIL, are the limit

Phase = Literal["waiting", "searching", "finished", "stopped", "nothing"]


class Tuner:
    """See the module.

    Args:
        seconds: How long to measure.
        memory_bytes: Of finished samples and batches; None: as without tuning.
        prefetch: See `Knobs`.
        bounded: See `Knobs`.
        ended: Called once, on the loop, when a search has come to its end.
        clock: Gives seconds.

    Attributes:
        phase: How far it is.
        found: How the search ended; None: it has not.
        spent: Seconds so far.
        cores_used: CPU seconds per second when it was measured last.
    """

    def __init__(
        self,
        seconds: float,
        memory_bytes: int | None,
        *,
        prefetch: bool,
        bounded: bool,
        ended: Callable[[], None],
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.seconds = seconds
        self.budget = None if memory_bytes is None else BytesBudget(memory_bytes)
        self.knobs = Knobs(prefetch=prefetch, bounded=bounded, budget=self.budget)
        self.phase: Phase = "waiting"
        self.found: Found | None = None
        self.spent = 0.0
        self.cores_used = 0.0
        self.stages: list[StageKnob] = []  # axes of the search
        self.rooms: list[RoomKnob] = []  # and those after them
        self._ended = ended
        self._clock = clock
        self._block_seconds = min(max(BLOCK_SECONDS[0], seconds * BLOCK_SHARE), BLOCK_SECONDS[1])
        self._lock = RLock()  # a signal handler may call `stop` in the thread that it has stopped
        self._run: Run | None = None
        self._windows: list[tuple[Window, Sequence[Step]]] = []  # of the newest run
        self._timer: TimerHandle | None = None
        self._search: Generator[Point, Measured, Found] | None = None
        self._point_began = 0.0  # of `spent`
        self._ticked = 0.0
        self._taken = Taken()
        self._before: Reading | None = None  # the beginning of the block; None: it settles
        self._epoch: WholeEpoch | None = None  # that all of can be a block
        self._last: LastEpoch | None = None  # epoch
        self._settled_at = 0  # with so many batches
        self._settled_by = 0.0  # or at that time of `spent`
        self._turnover = 2  # batches in a block
        self._seen = 0  # batches
        self._came = 0.0  # when the newest of them was seen

    @property
    def over(self) -> bool:
        """Whether nothing is tried any more."""
        return self.phase in ("finished", "stopped", "nothing")

    # -- what a run tells --------------------------------------------------------------------------------------------

    def adopt(self, run: "Run") -> None:
        """Tune an epoch that is under way, on its loop, in place of who has tuned it so far."""
        before, run.tuner = run.tuner, self
        if before is self:
            return
        if before is not None:
            before.end(run)
        if self.over or run.stopping or not run.started:  # what is to begin says so itself
            return
        for window in list(run.windows):
            self.join(window, run)
            window.resize()
        self.begin(run)

    def join(self, window: "Window", run: "Run") -> None:
        """A window is about to begin, on its loop, or has begun."""
        steps = window.parts
        with self._lock:
            if window.closed:
                return
            over = not self._turn_to(run)
            self.knobs.join(window, run, steps, fixed=self.over)
            self._windows = [one for one in self._windows if not one[0].closed]
            self._windows.append((window, steps))
        if over:
            self._ended()

    def _turn_to(self, run: "Run") -> bool:
        """It is the newest now; one before it may end later, under `async for`. False: the search is over by that."""
        before, goes_on = self._run, True
        if run is not before:
            goes_on = before is None or self.over or self._add_epoch(before)
            self._run, self._windows, self._before, self._epoch = run, [], None, None
        return goes_on

    def begin(self, run: "Run") -> None:
        """All nodes of an epoch have begun, on its loop."""
        with self._lock:
            if self.over:
                return
            over = not self._turn_to(run)  # where none of its windows makes anything
            self._seen, self._settled_at, self._settled_by = 0, 1, self.spent + self._most_settling
            self._ticked = self._came = now = self._clock()
            called = now if run.consumer.began is None else run.consumer.began
            last, self._last = self._last, None
            if last is None or called - last.at >= AWAY_SECONDS:
                self._epoch = WholeEpoch(called, self.spent, None, self._taken.copy())
            else:
                self._epoch = WholeEpoch(last.at, self.spent, last, self._taken.copy())
            self._before = None
        if over:
            self._ended()
        else:
            self._again(run)

    def end(self, run: "Run") -> None:
        """An epoch has ended, on its loop, and its windows are closed."""
        with self._lock:
            over = run is self._run and not self.over and not self._add_epoch(run)
            self.knobs.forget(run)
            if run is self._run:
                self._run, self._windows, self._before, self._epoch = None, [], None, None
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
        if over:
            self._ended()

    def stop(self) -> None:
        """Try nothing more, and go back to where it began, unless it has come to its end. From any thread."""
        with self._lock:
            if self.over:
                return
            self.phase = "stopped"
            if self.stages or self.rooms:
                self._set((*(stage.start for stage in self.stages), *(1 for _ in self.rooms)))

    # -- the timer ---------------------------------------------------------------------------------------------------

    def _again(self, run: "Run") -> None:
        self._timer = run.loop.call_later(self._block_seconds / 2, run.guarded, self._tick, run)

    def _tick(self, run: "Run") -> None:
        with self._lock:
            if self.over or run is not self._run or run.stopping:
                return
            goes_on = self._look(run)
        if goes_on:
            self._again(run)
        else:
            self._ended()

    def _look(self, run: "Run") -> bool:
        """See what has come since; False: that was the end."""
        now, consumer = self._clock(), run.consumer
        passed, self._ticked = now - self._ticked, now
        if run.pausing.paused:  # whatever is measured now is no rate
            self._before, self._epoch, self._came = None, None, now
            return True
        waits = bool(consumer.asking)
        if consumer.batches == self._seen and not waits:
            if now - self._came > AWAY_SECONDS:  # it may be validating, and takes its time
                self._before = self._epoch = None
                return True
        else:
            self._came = now
        self._seen = consumer.batches
        self.spent += passed
        if self._search is None:
            return self._start(run) if consumer.batches else True
        return self._measure(run, now, waits=waits)

    def _start(self, run: "Run") -> bool:
        """Begin the search, once a batch has come: by then all that runs is known."""
        self.stages = [stage for stage in self.knobs.stages.values() if stage.most > 1]
        self.rooms = [room for room in self.knobs.rooms.values() if room.argument and not room.elastic]
        if not self.stages and not self.rooms:
            self.phase = "nothing"
            return False
        self.phase = "searching"
        axes = [Axis(stage.start, 1, stage.most) for stage in self.stages]
        axes += [Axis(1, 1, MOST_ROOM, is_room=True) for _ in self.rooms]
        self._search = climb(axes)
        next(self._search)  # what is measured first is how it is
        self._settle(run)
        return True

    def _measure(self, run: "Run", now: float, *, waits: bool) -> bool:
        before = self._before
        long = self.spent - self._point_began
        if before is None:
            if run.consumer.batches >= self._settled_at or self.spent >= self._settled_by:
                self._turnover = max(2, self._begun_batches(run))
                self._before = self._read(run, now)
            return True
        reading = self._read(run, now)
        least = self._turnover if long < self.seconds * POINT_SHARE / 2 else 1
        stuck = waits and long > self.seconds * STUCK_SHARE
        if reading.batches - before.batches >= least and reading.at - before.at >= self._block_seconds:
            self._taken.add(before, reading)
            self._before = reading
        elif stuck and not self._taken.blocks:
            self._taken.add(before, reading)
        return self._next(run) if self._is_measured and self._epoch_is_long(now) else True

    def _epoch_is_long(self, now: float) -> bool:
        """Whether blocks inside this epoch say what it is like; else all of it does, once it has ended."""
        return self._epoch is None or now - self._epoch.since > self.seconds * POINT_SHARE

    def _add_epoch(self, run: "Run") -> bool:
        """Let a short epoch that ends be a block, in place of those inside it, or one in which there was none.

        False: that was the end of the search.

        An epoch may be over before the timer comes even once, and all of them may be like that. It counts from the end
        of the one before it: what it takes to begin, and what the consumer does in between, is much of its time.
        """
        epoch, now = self._epoch, self._clock()
        self._last = LastEpoch(run.consumer, now, run.consumer.batches, waited_by(run.consumer))
        if epoch is None or (self._epoch_is_long(now) and len(self._taken.blocks) > len(epoch.taken.blocks)):
            return True
        before, after = epoch.began(), self._read(run, now)
        if after.batches <= before.batches:  # none was given yet: it is a block together with the next one
            self._last = LastEpoch(run.consumer, epoch.since, 0, 0.0)
            return True
        self.spent = epoch.spent + now - epoch.since
        if self._search is None:
            return self._start(run)
        self._taken = epoch.taken
        self._taken.add(before, after)
        return self._next(run) if self._is_measured else True

    @property
    def _is_measured(self) -> bool:
        """Whether there are blocks enough of this point; those that are an epoch may each be as short as that."""
        taken = self._taken
        if len(taken.blocks) >= BLOCKS and taken.seconds >= BLOCKS * self._block_seconds:
            return True
        return bool(taken.blocks) and self.spent - self._point_began > self.seconds * POINT_SHARE

    def _next(self, run: "Run") -> bool:
        """A point is measured: which is the next one? False: there is none."""
        taken, search = self._taken, self._search
        assert search is not None
        self.cores_used = taken.cpu / taken.seconds
        measured = Measured(
            tuple(taken.blocks),
            max(0.0, min(1.0, taken.waited / taken.seconds)),
            tuple(self._use(stage, taken) for stage in self.stages) + tuple(0.0 for _ in self.rooms),
            taken.failed_share,
            self.seconds - self.spent,
            self.spent - self._point_began,
        )
        try:
            point = search.send(measured)
        except StopIteration as end:
            self.found = end.value
            self.phase = "finished"
            self._set(self.found.point)
            return False
        self._set(point)
        self._settle(run)
        return True

    def _use(self, stage: StageKnob, taken: Taken) -> float:
        return min(1.0, taken.busy.get(stage.key, 0.0) / (taken.seconds * max(1, stage.value)))

    def _set(self, point: Point) -> None:
        stages, rooms = point[: len(self.stages)], point[len(self.stages) :]
        for stage, value in zip(self.stages, stages, strict=True):
            stage.set(value)
        for room, value in zip(self.rooms, rooms, strict=True):
            room.value = value
        for room in self.knobs.rooms.values():
            room.set(room.value)

    def _settle(self, run: "Run") -> None:
        """Measure from when all that was begun before is handed out."""
        self._taken = Taken()
        self._before = self._epoch = None
        self._point_began = self.spent
        self._settled_at = run.consumer.batches + 1 + self._begun_batches(run)
        self._settled_by = self.spent + self._most_settling

    def _begun_batches(self, run: "Run") -> int:
        """About how many batches there will be of what has begun.

        A block has as many at least: workers that began together finish together, and come in bursts.
        """
        return round(sum(window.occupied / self._size(run, window, steps) for window, steps in self._windows))

    def _size(self, run: "Run", window: "Window", steps: Sequence[Step]) -> float:
        """Of what is in a window, about so many make a batch: as many as have left it for each that was handed out."""
        meter = steps[-1].meter
        left = meter.samples - meter.retries - window.held
        return max(1.0, left / max(1, run.consumer.batches))

    @property
    def _most_settling(self) -> float:
        return self.seconds * POINT_SHARE * SETTLE_SHARE

    def _read(self, run: "Run", now: float) -> Reading:
        consumer = run.consumer
        # With what waits in windows: a slow sample at the front holds others up, which then come all at once.
        made = sum(window.held / self._size(run, window, steps) for window, steps in self._windows)
        waited = waited_by(consumer)
        cpu = 0.0 if consumer.loop is None or not run.private_loop else consumer.loop.seconds()
        calls: dict[Key, tuple[int, int, float]] = {}
        for meter in run.meters:
            key = (meter.address, meter.name, meter.kind)
            cpu += meter.cpu_seconds
            bad = meter.errors + meter.retries + meter.timeouts
            calls[key] = (meter.samples, bad, meter.busy_seconds)
        return Reading(now, consumer.batches + made, waited, cpu, calls)

    # -- what it came to ---------------------------------------------------------------------------------------------

    @property
    def limit(self) -> str:
        """What the limit is at the end, in words."""
        found = self.found
        assert found is not None
        after, cores = found.after, usable_cores()
        if found.why == "consumer":
            return f"your loop is the limit: it waits {after.waited:.0%} of its time for batches"
        if after.failed >= FAILING:
            return f"the server is the limit: {after.failed:.0%} of the calls failed or were tried again"
        if any(room.held_back for room in self.knobs.rooms.values()):
            return "memory_bytes is the limit"
        if self.cores_used >= COMPUTING * cores:
            return f"the cores are the limit: {self.cores_used:.1f} of {cores} compute"
        if self.cores_used >= COMPUTING:
            return "computing is the limit; where it holds the GIL, processes help more than threads"
        if found.why == "time":
            return "the time is up: a longer search may find more"
        use, busiest = max(zip(after.use, [stage.name for stage in self.stages], strict=False), default=(0.0, ""))
        if use < BUSY:
            return "no stage is busy all the time, and no change helps: explain() says what is known"
        return f"{busiest} is busy, and more calls at once do not help: cores, server, network or disk are the limit"
