"""What the metrics of one loader are now, with counters that go on from one epoch to the next."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol
from weakref import WeakMethod, ref

from aioloader.insight.gauges import Waits
from aioloader.insight.stats import Stats
from aioloader.metrics.families import ACTOR, LOADER, STAGE, Family, labels_of

__all__ = ["Observable", "Point", "Totals", "check_name"]

StageLabels = tuple[str, str]
_Key = tuple[str, StageLabels | None]


class Observable(Protocol):
    """What is asked of a loader."""

    def stats(self) -> Stats:
        """See `Loader`."""

    @property
    def newest_epoch(self) -> object:
        """Identifies the epoch that `stats` is about."""

    def before_epochs(self, call: Callable[[Stats], None]) -> None:
        """Call this when the next epochs begin, with the statistics of the one before."""


class Point(NamedTuple):
    """One value of a metric.

    Attributes:
        family: Which one.
        stage: Name and position; None: it is of the loader.
        value: A number; of a summary the sum.
        number: Of a summary: how many there were.
        waits: Of a summary, for its quantiles; else None.
        actor: Its name and its node; None: it is no actor's.
    """

    family: Family[Any]
    stage: StageLabels | None
    value: float
    number: float = 0
    waits: Waits | None = None
    actor: tuple[str, str] | None = None

    @property
    def labels(self) -> dict[str, str]:
        """What tells it apart from others of its family."""
        labels = {} if self.stage is None else {"stage": self.stage[0], "position": self.stage[1]}
        return labels if self.actor is None else labels | {"actor": self.actor[0], "node": self.actor[1]}


class Totals:
    """Pulls the statistics of a loader, which count each epoch from 0, and adds the epochs up.

    When an epoch begins, the loader hands over what the one before came to. From then until the new one is there to be
    asked, `stats` still tells of the old one, in whatever thread: that is known by its identity, and adds nothing.

    Args:
        loader: It. It is not kept alive: when it is gone, there are no values.
    """

    def __init__(self, loader: Observable) -> None:
        self._loader = ref(loader)
        self._lock = threading.RLock()  # garbage collection, and so anything, may come in between
        self._before: dict[_Key, float] = defaultdict(float)
        self._settled: object = None
        settle = WeakMethod(self._settle)
        loader.before_epochs(lambda stats: None if (call := settle()) is None else call(stats))

    def _settle(self, stats: Stats) -> None:
        loader = self._loader()
        with self._lock:
            for point in _points(stats):
                for key, value in _counted(point):
                    self._before[key] += value
            self._settled = None if loader is None else loader.newest_epoch

    def points(self) -> list[Point]:
        """All values, as they are now."""
        loader = self._loader()
        if loader is None:
            return []
        with self._lock:
            epoch = loader.newest_epoch
            stats = loader.stats()
            over = epoch is not None and epoch is self._settled
            return [self._summed(point, over=over) for point in _points(stats)]

    def _summed(self, point: Point, *, over: bool) -> Point:
        summed = [self._before[key] + (0.0 if over else value) for key, value in _counted(point)]
        if not summed:
            return point
        return point._replace(value=summed[0], number=summed[1] if len(summed) > 1 else 0)


def _points(stats: Stats) -> Iterator[Point]:
    for family in LOADER:
        yield _point(family, None, family.value(stats))
    for stage, name, position in labels_of(stats):
        for each in STAGE:
            yield _point(each, (name, position), each.value(stage))
        for actor in stage.actors:
            for one in ACTOR:
                yield Point(one, (name, position), one.value(actor), actor=(actor.name, actor.node))


def _point(family: Family[Any], stage: StageLabels | None, value: Any) -> Point:
    if family.kind != "summary":
        return Point(family, stage, value)
    waits, count = value
    return Point(family, stage, waits.sum, count, waits)


def _counted(point: Point) -> Iterator[tuple[_Key, float]]:
    """What of it begins anew with each epoch."""
    if point.actor is not None:
        return
    if point.family.kind != "gauge":
        yield (point.family.name, point.stage), point.value
    if point.family.kind == "summary":
        yield (f"{point.family.name}_count", point.stage), point.number


def check_name(name: Any, taken: Any = ()) -> str:
    """The label that tells a loader apart from others.

    Raises:
        TypeError: It is no str.
        ValueError: It is empty, or another loader has it.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, the value of the label loader, got {name!r}")
    if not name or name in taken:
        raise ValueError(f"each loader needs a name of its own, got {name!r}; pass for instance add(loader, 'val')")
    return name
