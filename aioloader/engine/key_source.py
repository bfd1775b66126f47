"""The source of an indexable dataset: the keys of one epoch, in order."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from aioloader.core.cursors import as_count
from aioloader.core.entry import Entry
from aioloader.core.keys import NAMES
from aioloader.core.source import SourceContext
from aioloader.engine.node import MOST_EARLY, Kick, Node
from aioloader.engine.source_context import RunSourceContext
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["KeySource", "Keys"]

PLANNED_KEYS: Final = 4096
"""How many keys are planned at once: some milliseconds of the loop, and enough to find neighbours among."""

Plan = Callable[[Sequence[int], bool], Sequence[Any]]


class Keys(Protocol):
    """The keys of one epoch, in order: all of them, or this rank's."""

    @property
    def stride(self) -> int:
        """How many positions of the whole order there are for each key: one per rank."""

    @property
    def offset(self) -> int:
        """Which of these positions is the key's own."""

    def __len__(self) -> int: ...

    def after(self, position: int) -> "Keys":
        """The keys after a position of the whole order."""

    def slice(self, start: int, stop: int) -> Sequence[int]:
        """Keys `start` to `stop` as Python integers; fewer at the end."""


class KeySource(Node):
    """Gives the keys of an indexable source, or its samples when reading one runs no user code.

    Cursor: the position after the sample in the epoch's order, which follows from seed and epoch. It is the order of
    all ranks: ranks that have got equally many samples have the same cursor.

    Args:
        order: Makes the epoch's order; called with False, one that is as long but not shuffled.
        values: A built-in sequence to read; None: the entries' values are the keys, and a step of the window loads.
        name: For statistics.
        names: What the samples are called in notes of errors; None: by their keys, or by themselves.
        begin: Begins a plan, see `PlannedKeys`, whose results are the values instead.
    """

    def __init__(
        self,
        order: Callable[[bool], Keys],
        values: Sequence[Any] | None,
        name: str,
        names: Sequence[Any] | None = None,
        begin: Callable[[SourceContext], Plan] | None = None,
    ) -> None:
        self._order = order
        self._keys: Keys
        self._values = values
        self._names = names
        self._begin = begin
        self._planned: _Planned | None = None
        self._position = 0
        self._cursor = 0  # where `_keys` begin
        self.meter = StageMeter(name, "source")

    def resume(self, cursor: Any) -> None:
        self._cursor = as_count(cursor)
        self._order(False).after(self._cursor)  # raises when there is no such position

    @property
    def fresh(self) -> bool:
        return True

    @property
    def extra_room(self) -> int:
        return MOST_EARLY

    def start(self, run: "Run", kick: Kick) -> None:
        self.meter = run.adopt(self.meter)
        keys = self._order(True)
        self._keys = keys.after(self._cursor) if self._cursor else keys
        self.ended = not len(self._keys)
        if self._begin is not None:
            self._planned = _Planned(self._begin(RunSourceContext(run, self.meter.name, self.meter)), self._keys)

    def close(self) -> None:
        self.meter.retired = True

    def poll(self, limit: int) -> list[Entry]:
        start = self._position
        keys = self._keys.slice(start, start + limit)
        self._position = stop = start + len(keys)
        stride = self._keys.stride
        before = self._cursor // stride  # samples of this rank
        self.meter.samples = before + stop
        self.ended = stop >= len(self._keys)
        if self._values is None or self._planned is not None:
            keys = list(keys)  # `values` and `names` are the same objects, of which a range makes new ones each time
        values: Sequence[Any] = keys
        names: Sequence[Any] = keys if self._names is None else list(map(self._names.__getitem__, keys))
        if self._planned is not None:
            values = self._planned.take(len(keys))
        elif self._values is not None:
            if isinstance(keys, range) and keys.step == 1:
                values = self._values[keys.start : keys.stop]
            else:
                values = list(map(self._values.__getitem__, keys))
            naming = {kind: issubclass(kind, NAMES) for kind in set(map(type, values))}
            if all(naming.values()):
                names = values
            elif any(naming.values()):
                names = [v if naming[type(v)] else k for k, v in zip(keys, values, strict=True)]
        first, end = self._cursor + start * stride, self._cursor + stop * stride
        offset = self._keys.offset
        cursors, positions = range(first + stride, end + 1, stride), range(first + offset, end + offset, stride)
        return Entry.many(values, cursors, names, positions)


class _Planned:
    """What a plan makes of the keys of an epoch, some thousand of them at a time."""

    def __init__(self, plan: Plan, keys: Keys) -> None:
        self._plan = plan
        self._keys = keys
        self._at = 0  # of the first key that is not planned
        self._ready: deque[Any] = deque()

    def take(self, count: int) -> list[Any]:
        """The next values, of so many keys that are there."""
        ready = self._ready
        while len(ready) < count:
            keys = self._keys.slice(self._at, self._at + PLANNED_KEYS)
            made = self._plan(keys, self._at + len(keys) < len(self._keys))
            self._at += len(made)
            ready.extend(made)
        return [ready.popleft() for _ in range(count)]
