"""What `autotune` may change while a pipeline runs: the calls at once of its stages, and the room of its windows.

A stage or window is built anew in each epoch, by each iterator, and by each round of a `repeat`. A knob stands for all
that are the same one in the pipeline, and is known by the address of its (first) stage. A stage is given a `Limit`
while values are tried, so that its width changes in the middle of an epoch and cancels nobody; once a value is found,
later epochs are simply that wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from aioloader.core.address import Address
from aioloader.core.cores import usable_cores
from aioloader.core.limit import Limit
from aioloader.core.sizes import MeanBytes
from aioloader.core.written import Written
from aioloader.engine.async_step import AsyncStep
from aioloader.engine.room import GrowingRoom, Room
from aioloader.engine.steps import Step
from aioloader.engine.thread_step import ThreadStep
from aioloader.engine.tuned_room import BytesBudget, TunedRoom
from aioloader.executors.threads import call_loop

if TYPE_CHECKING:
    from aioloader.engine.run import Run
    from aioloader.engine.window import Window

__all__ = ["MOST_ROOM", "Key", "Knobs", "RoomKnob", "StageKnob", "key_of"]

MOST_AWAITED: Final = 1024
MOST_THREADS: Final = 128
MANY: Final = 1 << 30  # entries for which there is a place after a window, or more
MOST_ROOM: Final = 32
"""Times the room without tuning."""

Key = tuple[Address, str, str]


def key_of(step: Step) -> Key:
    """What is the same for a stage in all epochs."""
    meter = step.meter
    return meter.address, meter.name, meter.kind


class TunedLimit(Limit):
    """The calls at once of one step, while values are tried."""


@dataclass
class StageKnob:
    """Calls at once in a stage.

    Attributes:
        key: Identifies the stage.
        start: How many without tuning.
        most: How many may be tried.
        value: How many there are now.
        written: Where the user writes them: at several functions, if these cross into a thread together.
        steps: The stage in all epochs under way.
    """

    key: Key
    start: int
    most: int
    value: int
    written: tuple[Written, ...]
    steps: WeakSet[Step] = field(default_factory=WeakSet)

    @property
    def name(self) -> str:
        """The stage as it is shown."""
        return self.key[1]

    @property
    def room(self) -> str | None:
        """The argument that says how much its window holds, if there is one."""
        return next((written.room for written in self.written if written.room), None)

    def set(self, value: int) -> None:
        """Let there be so many, now. From any thread."""
        self.value = value
        for step in list(self.steps):
            if step.limit is not None:
                step.limit.value = value


@dataclass
class RoomKnob:
    """Room of a window, as a multiple of what there is without tuning for as many calls.

    Attributes:
        key: Of its first stage.
        stages: Those of its stages that may be changed.
        base: Places without tuning, where they do not follow from the calls; else 0.
        each: Where they do not: places for each call of a stage, at least, since it would not begin without.
        argument: What says how much it holds; None: nothing does, so no other value is tried, and it only goes with its
            stages.
        value: The multiple now.
        mean: What an entry weighs.
        held_back: The budget has been the limit.
    """

    key: Key
    stages: Sequence[StageKnob]
    base: int
    each: float
    argument: str | None
    value: int = 1
    mean: MeanBytes = field(default_factory=MeanBytes)
    held_back: bool = False
    _windows: "list[tuple[Window, Run, TunedRoom, list[Limit]]]" = field(default_factory=list)

    @property
    def name(self) -> str:
        """The stage that it belongs to."""
        return self.key[1]

    @property
    def _floor(self) -> int:
        return max(self.base, *(ceil(self.each * stage.value) for stage in self.stages), 0)

    @property
    def places(self) -> int:
        """Places there are, but for a budget."""
        newest = [room.now(MANY) for _, _, room, _ in self._windows[-1:]]
        return newest[0] if newest else self._floor * self.value

    @property
    def elastic(self) -> bool:
        """Whether the engine gives more to cheap samples: a written `ahead` would end that."""
        return any(room.elastic for _, _, room, _ in self._windows)

    @property
    def untuned(self) -> int:
        """Places that there would be for as many calls without tuning."""
        newest = [room.untuned for _, _, room, _ in self._windows[-1:]]
        return newest[0] if newest else self.base

    def join(self, window: "Window", run: "Run", room: TunedRoom, others: list[Limit]) -> None:
        """It is the room of `window`, whose `others` have as many places as it has, up to the cores there are."""
        self._windows.append((window, run, room, others))
        room.floor, room.factor = self._floor, self.value

    def set(self, value: int) -> None:
        """Let it be such a multiple, now. From any thread; after the stages were set."""
        self.value = value
        self.forget()
        for window, run, room, others in list(self._windows):
            room.floor, room.factor = self._floor, value
            for limit in others:
                limit.value = max(1, min(usable_cores(), room.floor * value))
            call_loop(run.loop, run.guarded, window.resize)

    def forget(self, over: "Run | None" = None) -> None:
        """Hold no window that is closed, or of a run that is `over`."""
        self.held_back = self.held_back or any(room.held_back for _, _, room, _ in self._windows)
        self._windows = [one for one in self._windows if not (one[0].closed or one[1] is over)]


class Knobs:
    """Those of one loader.

    Args:
        prefetch: The loader has `.prefetch(n)`, which says how many batches are held for the consumer.
        bounded: The user has said how much may be ahead.
        budget: Of finished samples and batches; None: there is none.
    """

    def __init__(self, *, prefetch: bool, bounded: bool, budget: BytesBudget | None) -> None:
        self._prefetch = prefetch
        self._bounded = bounded
        self._budget = budget
        self.stages: dict[Key, StageKnob] = {}
        self.rooms: dict[Key, RoomKnob] = {}
        self._tuned: list[tuple[Window, Run, TunedRoom]] = []

    def join(self, window: "Window", run: "Run", steps: Sequence[Step], *, fixed: bool) -> None:
        """A window is about to begin, or goes on with what is tried here, on its loop.

        Args:
            window: It.
            run: It runs there.
            steps: All that have places for calls, and some that have none.
            fixed: No other values will be tried.
        """
        self.forget()
        room = window.places
        if type(room) is TunedRoom:  # of another search, which is over
            room.close()
            window.places = room = room.inner
        if room is None:
            return
        bounded = self._bounded or window.bounded
        exact = type(room) in (Room, GrowingRoom)
        start = room.now(0)
        most = start if bounded else None
        stages = []
        for step in steps:
            if self._may_change(step):
                stages.append(stage := self._stage(step, most))
                self._widen(step, stage.value, fixed=fixed, most=most)
        if bounded and self._budget is None:
            return
        room.refresh()  # the steps are as wide as they are now
        knob = None if bounded else self._room(window, run, steps, stages, start if exact else 0)
        window.places = tuned = TunedRoom(room, self._budget, MeanBytes() if knob is None else knob.mean)
        self._tuned.append((window, run, tuned))
        if knob is not None:
            knob.join(window, run, tuned, self._others(steps, knob, fixed=fixed) if exact else [])

    def forget(self, over: "Run | None" = None) -> None:
        """Hold no window that is closed, or of a run that is `over`, nor share the budget with it."""
        for knob in self.rooms.values():
            knob.forget(over)
        kept = []
        for window, run, room in self._tuned:
            if window.closed or run is over:
                room.close()
            else:
                kept.append((window, run, room))
        self._tuned = kept

    def _may_change(self, step: Step) -> bool:
        """Whether the user can write another value, and its function may be called several times at once."""
        if not step.written or _is_users(step.limit) or step.stated < 2:
            return False
        return step.is_ours if isinstance(step, ThreadStep) else isinstance(step, AsyncStep)

    def _stage(self, step: Step, room: int | None) -> StageKnob:
        key = key_of(step)
        stage = self.stages.get(key)
        if stage is None:
            most = MOST_AWAITED if isinstance(step, AsyncStep) else MOST_THREADS
            most = max(step.stated, most if room is None else min(most, room))
            stage = self.stages[key] = StageKnob(key, step.stated, most, step.stated, step.written)
        stage.steps.add(step)
        return stage

    def _widen(self, step: Step, value: int, *, fixed: bool, most: int | None = None) -> Limit | None:
        """Let a step have so many places; `most`: whatever its limit says later; `fixed`: it has not begun."""
        step.most = most
        if step.limit is not None:  # of another search, which is over
            step.limit.value = value
            return step.limit
        if not fixed:
            step.follow_limit(limit := TunedLimit(value))
            return limit
        step.concurrency = step.meter.concurrency = value
        step.places = value if step.places_follow else min(step.places, value)
        return None

    def _room(
        self, window: "Window", run: "Run", steps: Sequence[Step], stages: Sequence[StageKnob], base: int
    ) -> RoomKnob | None:
        """The knob of a window; `base`: its places, if these do not follow from the calls; else 0."""
        first = stages[0] if stages else None
        last = run.output is window and base > 0
        if first is None and not last:
            return None
        key = key_of(steps[0]) if first is None else first.key
        knob = self.rooms.get(key)
        if knob is None:
            each, argument = float(base > 0), None if first is None else first.room
            if last and self._prefetch:
                argument = "prefetch"
            elif first is not None and not self._prefetch:  # of a `DataLoader`: so many for each worker
                each, argument = base / first.start, argument if base else None
            knob = self.rooms[key] = RoomKnob(key, tuple(stages), base, each, argument)
        return knob

    def _others(self, steps: Sequence[Step], knob: RoomKnob, *, fixed: bool) -> list[Limit]:
        """The limits of the steps for which nothing can be written, such as collate: the room says their places."""
        limits: list[Limit] = []
        for step in steps:
            if type(step) is not ThreadStep or _is_users(step.limit) or not step.is_ours:
                continue
            if step.stated < 2 or key_of(step) in self.stages:
                continue
            width = max(step.stated, min(usable_cores(), knob.base * knob.value))
            if (limit := self._widen(step, width, fixed=fixed)) is not None:
                limits.append(limit)
        return limits


def _is_users(limit: Limit | None) -> bool:
    return limit is not None and not isinstance(limit, TunedLimit)
