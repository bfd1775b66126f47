"""Parts of a pipeline that run in actors: the node here that stands for one of them.

    this process                                    an actor
    RayPartNode ──"open": pass, cursor──────────▶   a run of the part, on the actor's event loop
                ──"read": so many more──────────▶
                ◀──entries, with cursors─────────   as soon as there are any
                ──"end"─────────────────────────▶   the run is stopped; the actor stays for the next epoch

It is the node for a process of its own, over another connection: one that opens the part again elsewhere, after the
newest entry that has come, when its actor is lost (`Readers`). Nothing of that is seen here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.memory import Alloc
from aioloader.engine.node import Node
from aioloader.engine.process_stream import OwnProcessNode
from aioloader.errors import WorkerDiedError
from aioloader.executors.processes.stream_worker import Heard
from aioloader.executors.ray.readers import Readers
from aioloader.insight.gauges import Gauges
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["RayPartNode", "RayParts"]


@dataclass
class RayParts:
    """What the nodes of all parts have in common.

    Attributes:
        readers: Gives the actors; called when the run begins.
        parts: How many there are.
        room: Entries of a part between its actor and here.
        batches: Whether the entries are batches.
        label: Of the stage.
        alloc: Where batches are put that come from there; None: into fresh memory.
        told: The counters that came from each part.
        totals: Those of all parts.
        meter: That of the stage itself; None: the run has not begun.
    """

    readers: Callable[[], Readers]
    parts: int
    room: int
    batches: bool
    label: str
    alloc: Alloc | None
    told: dict[int, list[StageMeter]] = field(default_factory=dict)
    totals: list[StageMeter] = field(default_factory=list)
    meter: StageMeter | None = None

    def begin(self, run: "Run", readers: Readers) -> None:
        """A part begins."""
        if self.meter is None:
            self.meters_at = len(run.meters)
            self.meter = run.adopt(StageMeter(self.label, "ray"))
            self.meter.actors = readers.stats
            self.meter.ahead = self.parts * self.room

    def count(self, run: "Run", part: int, meters: list[StageMeter]) -> None:
        """The newest counters of a part."""
        self.told[part] = meters
        for index, theirs in enumerate(meters):
            if index == len(self.totals):
                mine = run.adopt(StageMeter(theirs.name, theirs.kind, address=theirs.address))
                if run.meters[-1] is mine:  # a new one: in the order of the stages
                    run.meters.insert(self.meters_at + index, run.meters.pop())
                self.totals.append(mine)
            _add_up([its[index] for its in self.told.values() if index < len(its)], self.totals[index])

    def close(self) -> None:
        """The run is over."""
        for meter in (*self.totals, *([] if self.meter is None else [self.meter])):
            meter.retired = True
            if meter.told is not None:
                meter.told = meter.told.at_rest


_SUMS: Final = (
    "concurrency", "samples", "errors", "dropped", "dropped_late", "retries", "timeouts", "hedges", "partial",
    "busy_seconds", "cpu_seconds", "room", "ahead", "finished_sum", "handovers", "skipped", "hits", "misses",
)  # fmt: skip


def _add_up(parts: list[StageMeter], total: StageMeter) -> None:
    """Let `total` be what the counters of a stage are in all parts together."""
    first = parts[0]
    for name in {one.name for one in fields(StageMeter)} - {*_SUMS, "retired", "actors"}:
        setattr(total, name, getattr(first, name))
    for name in _SUMS:
        setattr(total, name, sum(getattr(part, name) for part in parts))
    total.gaps = any(part.gaps for part in parts)
    total.cached_bytes = max(part.cached_bytes for part in parts)
    gauges = [part.told for part in parts if part.told is not None]
    oldest = min((one for one in gauges if one.oldest_since is not None), key=_since, default=Gauges())
    total.told = Gauges(
        sum(one.under_way for one in gauges),
        oldest.oldest_since,
        oldest.oldest_key,
        sum(one.finished for one in gauges),
        max((one.waits for one in gauges), key=lambda waits: waits.sum, default=Gauges().waits),
        policies=gauges[0].policies if gauges else None,
    )


def _since(gauges: Gauges) -> float:
    return gauges.oldest_since or 0.0


class RayPartNode(OwnProcessNode):
    """Gives the entries of a part.

    Args:
        parts: What it has in common with the others.
        number: Of the part.
        request: What the program of the actor is called with.
        inner: What would run here. It is never started, but knows which cursors fit.
    """

    def __init__(self, parts: RayParts, number: int, request: Any, inner: Node) -> None:
        super().__init__(partial(_PartRemote, parts, number), request, inner, room=parts.room, batches=parts.batches)
        self._parts = parts
        self._part = number

    def start(self, run: "Run", kick: Callable[[], None]) -> None:
        super().start(run, kick)
        remote = self._remote
        assert isinstance(remote, _PartRemote)
        self._parts.begin(run, remote.readers)

    def close(self) -> None:
        super().close()
        self._parts.close()

    def _count(self, meters: list[StageMeter] | None) -> None:
        if meters:
            self._parts.count(self._run, self._part, meters)
            self._meters = meters  # for `gaps` and `extra_room`

    def _arrived(self, heard: Any) -> None:
        super()._arrived(heard)
        if self._parts.meter is not None:
            self._parts.meter.samples += len(heard.places)

    def _death(self, pid: int | None, reason: str) -> WorkerDiedError:
        return WorkerDiedError(f"part {self._part} of {self._parts.label}: {reason}")


class _PartRemote:
    """The connection of one part, see `Remote`."""

    def __init__(self, parts: RayParts, number: int) -> None:
        self.readers = parts.readers()
        self._alloc = parts.alloc
        self._part = number
        self.grant, self.hold = self.readers.grant, self.readers.hold
        self.let_go, self.end = self.readers.let_go, self.readers.end_part

    def open(self, request: Any, listener: Callable[[Heard], None]) -> int:
        return self.readers.open(request, listener, self._alloc)

    def allow(self, number: int, samples: int, handed_out: int) -> None:
        raise NotImplementedError("max_staleness does not go with in_ray()")
