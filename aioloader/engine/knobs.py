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

FETCHING: Final = (".fetch", "[...]")
"""How the names of sources end whose samples are loaded by their keys."""

DROP_IN: Final = ("fetch", "dataset[...]")
"""The stages of a `DataLoader` that `num_workers` or `concurrency` is about."""

Key = tuple[Address, str, str]


def key_of(step: Step) -> Key:
    """What is the same for a stage in all epochs."""
    meter = step.meter
    return meter.address, meter.name, meter.kind


@dataclass
class StageKnob:
    """Calls at once in a stage.

    Attributes:
        key: Identifies the stage.
        start: How many without tuning.
        most: How many may be tried.
        value: How many there are now.
        steps: The stage in all epochs under way.
    """

    key: Key
    start: int
    most: int
    value: int
    steps: WeakSet[Step] = field(default_factory=WeakSet)

    @property
    def name(self) -> str:
        """The stage as it is written."""
        return self.key[1]

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
        changes: It is to be tried, and is not only there to go with its stages.
        prefetch: It holds the batches that the consumer takes.
        value: The multiple now.
        mean: What an entry weighs.
        held_back: The budget has been the limit.
    """

    key: Key
    stages: Sequence[StageKnob]
    base: int
    each: float
    changes: bool
    prefetch: bool
    value: int = 1
    mean: MeanBytes = field(default_factory=MeanBytes)
    held_back: bool = False
    _windows: "list[tuple[Window, Run, TunedRoom, list[Limit]]]" = field(default_factory=list)

    @property
    def name(self) -> str:
        """The stage that it is written at."""
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
        self.forget_closed()
        self._windows.append((window, run, room, others))
        room.floor, room.factor = self._floor, self.value

    def set(self, value: int) -> None:
        """Let it be such a multiple, now. From any thread; after the stages were set."""
        self.value = value
        self.forget_closed()
        for window, run, room, others in list(self._windows):
            room.floor, room.factor = self._floor, value
            for limit in others:
                limit.value = max(1, min(usable_cores(), room.floor * value))
            call_loop(run.loop, run.guarded, window.resize)

    def forget_closed(self) -> None:
        """Hold no window that is over."""
        self.held_back = self.held_back or any(room.held_back for _, _, room, _ in self._windows)
        self._windows = [one for one in self._windows if not one[0].closed]


class Knobs:
    """Those of one loader.

    Args:
        drop_in: The loader is a `DataLoader`, with the arguments of torch.
        bounded: The user has said how much may be ahead.
        budget: Of finished samples and batches; None: there is none.
    """

    def __init__(self, *, drop_in: bool, bounded: bool, budget: BytesBudget | None) -> None:
        self.drop_in = drop_in
        self._bounded = bounded
        self._budget = budget
        self.stages: dict[Key, StageKnob] = {}
        self.rooms: dict[Key, RoomKnob] = {}
        self._tuned: list[tuple[Window, TunedRoom]] = []

    def join(self, window: "Window", run: "Run", steps: Sequence[Step], *, fixed: bool) -> None:
        """A window is about to begin, on its loop; nothing in it has begun.

        Args:
            window: It.
            run: It runs there.
            steps: All that have places for calls, and some that have none.
            fixed: No other values will be tried.
        """
        self.forget_closed()
        room = window.places
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
        self._tuned.append((window, tuned))
        if knob is not None:
            knob.join(window, run, tuned, self._others(steps, knob, fixed=fixed) if exact else [])

    def forget_closed(self) -> None:
        """Hold no window that is over, nor share the budget with it."""
        for knob in self.rooms.values():
            knob.forget_closed()
        closed = [room for window, room in self._tuned if window.closed]
        for room in closed:
            room.close()
        self._tuned = [one for one in self._tuned if not one[0].closed]

    def _may_change(self, step: Step) -> bool:
        """Whether we decide how many calls there are, and its function may be called several times at once."""
        if step.limit is not None or step.concurrency < 2:
            return False
        if isinstance(step, ThreadStep):
            if not step.is_ours:
                return False
        elif not isinstance(step, AsyncStep):
            return False
        name = step.meter.name
        if self.drop_in:
            return name in DROP_IN
        return any(part.startswith(("map(", "filter(")) or part.endswith(FETCHING) for part in name.split(" + "))

    def _stage(self, step: Step, room: int | None) -> StageKnob:
        key = key_of(step)
        stage = self.stages.get(key)
        if stage is None:
            most = MOST_AWAITED if isinstance(step, AsyncStep) else MOST_THREADS
            most = max(step.concurrency, most) if room is None else max(step.concurrency, min(most, room))
            stage = self.stages[key] = StageKnob(key, step.concurrency, most, step.concurrency)
        stage.steps.add(step)
        return stage

    def _widen(self, step: Step, value: int, *, fixed: bool, most: int | None = None) -> Limit | None:
        """Let a step that has not begun have so many places; `most`: whatever its limit says later."""
        step.most = most
        if not fixed:
            step.limit = limit = Limit(value)
            return limit
        step.concurrency = step.meter.concurrency = value
        step.places = value if step.places_follow else min(step.places, value)
        return None

    def _room(
        self, window: "Window", run: "Run", steps: Sequence[Step], stages: Sequence[StageKnob], base: int
    ) -> RoomKnob | None:
        """The knob of a window; `base`: its places, if these do not follow from the calls; else 0."""
        first = stages[0] if stages else None
        prefetch = run.output is window and base > 0
        if first is None and not prefetch:
            return None
        key = key_of(steps[0]) if first is None else first.key
        knob = self.rooms.get(key)
        if knob is None:
            each = float(base > 0)
            changes = prefetch or _takes_ahead(key[1])
            if self.drop_in:
                changes = base > 0 and first is not None and first.key[2] == "sync"
                each = base / first.start if base and first is not None else 0.0
            knob = self.rooms[key] = RoomKnob(key, tuple(stages), base, each, changes, prefetch)
        return knob

    def _others(self, steps: Sequence[Step], knob: RoomKnob, *, fixed: bool) -> list[Limit]:
        """The limits of the steps for which nothing can be written, such as collate: the room says their places."""
        limits: list[Limit] = []
        for step in steps:
            if type(step) is not ThreadStep or step.limit is not None or not step.is_ours:
                continue
            if step.concurrency < 2 or key_of(step) in self.stages:
                continue
            width = max(step.concurrency, min(usable_cores(), knob.base * knob.value))
            if (limit := self._widen(step, width, fixed=fixed)) is not None:
                limits.append(limit)
        return limits


def _takes_ahead(name: str) -> bool:
    return any(part.startswith("map(") for part in name.split(" + "))
