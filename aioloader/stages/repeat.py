"""`repeat`: all that is before it, again and again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from aioloader.core.cursors import MAX_COUNT, as_count, cursor_parts
from aioloader.core.entry import LAST, ONE_LOST, Entry
from aioloader.core.keys import PartKey, each_key
from aioloader.engine.fuse import FusedOps
from aioloader.engine.node import Kick, Node
from aioloader.stages.base import Builder, Evenness, Stage, UnknownLengthError
from aioloader.stages.flow import Flow, Shared

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["Repeat", "RepeatNode"]


@dataclass(frozen=True)
class Repeat(Stage):
    """All that is before it, again and again."""

    times: int | None

    exact_in_any_order = True
    passes = True
    same_each_epoch = True
    part_by_part = True
    encloses = True

    @property
    def label(self) -> str:
        return f"repeat({'' if self.times is None else self.times})"

    @property
    def evenness(self) -> Evenness:
        return "given" if self.times is None else "kept"

    def length(self, upstream: int) -> int:
        if self.times is None:
            raise UnknownLengthError("repeat() without a number is endless")
        return upstream * self.times

    def shape(self) -> dict[str, Any]:
        return {"stage": "repeat", "n": self.times}

    def flow(self, before: Flow) -> Flow:
        free = self.times is None or (before.batch_size is not None and before.steady)
        return (before if free else before.limited(Shared.SAME_WORLD, self.label)).cut().closed()

    def build(self, builder: Builder) -> None:
        builder.node = node = RepeatNode(builder.repetitions(), self.times)
        builder.beginnings.append(node.begin)
        builder.fused = FusedOps()


class RepeatNode(Node):
    """One upstream after the other, made anew for each repetition. Cursor: the repetition and the cursor in it.

    An upstream that gives nothing ends it: repeating that for ever would be a silent hang.

    Args:
        make: Gives the upstream of repetition 0, 1, ...
        times: How many; None: for ever.
    """

    def __init__(self, make: Callable[[int], Node], times: int | None) -> None:
        self._make = make
        self._times = times
        self._repetition = 0
        self._upstream = make(0)
        self._given = 0  # entries of this repetition
        self._upstream_may_give = False  # a new repetition has not been polled yet
        self._gaps = False  # in a repetition before
        self._failure: Exception | None = None
        self.ended = times == 0

    def resume(self, cursor: Any) -> None:
        repetition, its = cursor_parts(cursor, 2)
        self._repetition = as_count(repetition, MAX_COUNT if self._times is None else max(0, self._times - 1))
        self._upstream = self._make(self._repetition)
        self._given = 1  # that repetition was not empty
        if its is not None:
            self._upstream.resume(its)

    @property
    def extra_room(self) -> int:
        return self._upstream.extra_room

    @property
    def live(self) -> bool:
        return self._upstream.live

    def alive(self, size: int) -> int:
        return self._upstream.alive(size)

    @property
    def gaps(self) -> bool:
        return self._gaps or self._upstream.gaps

    def begin(self) -> None:
        """See `beginnings`: of the repetition that comes first."""
        for begin in self._upstream.beginnings if not self.ended else ():
            begin()

    def start(self, run: "Run", kick: Kick) -> None:
        self._run, self._kick = run, kick
        if not self.ended:
            self._upstream.start(run, kick)

    def poll(self, limit: int) -> list[Entry]:
        while not self.ended:
            if self._failure is not None:
                self.ended = True
                return [Entry.last(self._failure, (self._repetition, None), None)]
            taken = self._upstream.poll(limit)
            for entry in taken:
                entry.cursor = (self._repetition, entry.cursor)
                if self._repetition and entry.state != LAST:
                    entry.key = each_key(entry.key, partial(PartKey, part=self._repetition))
            self._given += sum(entry.state != ONE_LOST for entry in taken)
            if taken and taken[-1].state == LAST:
                self.ended = True
            elif self._upstream.ended:
                self._next()
            if taken:
                return taken
            if not (self.ended or self._upstream_may_give or self._failure is not None):
                return taken
            self._upstream_may_give = False
        return []

    def _next(self) -> None:
        """The repetition is over: begin the next one, so that it is under way when it is asked for."""
        self._upstream.close()
        self._gaps = self.gaps
        self._repetition += 1
        if self._repetition == self._times or not self._given:
            self.ended = True
            return
        self._given = 0
        try:
            self._upstream = self._make(self._repetition)
        except Exception as error:  # a source that cannot begin again fails as a source does: after what came before
            self._failure = error
            return
        self._upstream.start(self._run, self._kick)
        self._upstream_may_give = True

    def close(self) -> None:
        self._upstream.close()
