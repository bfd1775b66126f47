"""Neighbouring operations fused into one window, or a few, and how much room there is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from aioloader.core.cursors import CompletionCursor
from aioloader.core.limit import Limit
from aioloader.engine.admission import Admission
from aioloader.engine.again import AgainWindow
from aioloader.engine.cache_step import CacheOp
from aioloader.engine.completion_order import CompletionOrder
from aioloader.engine.in_a_row import counted
from aioloader.engine.node import Node
from aioloader.engine.op_steps import steps_of
from aioloader.engine.ops import Op
from aioloader.engine.order_log import Recorded, Replayed
from aioloader.engine.overtaking import Overtaking
from aioloader.engine.room import BytesRoom, GrowingRoom, Room, StepsRoom
from aioloader.engine.window import Window
from aioloader.executors.processes.worker_thread import WorkerThread

__all__ = ["FusedOps", "exactly"]


@dataclass
class FusedOps:
    """Neighbouring ops that one window will run.

    Attributes:
        batches: The entries are batches.
        unordered_input: The input has no fixed order.
        keyed: The entries are samples of an indexable source.
        first: No op has worked on the input before.
        checks: Predicates of groups, which check the samples of a batch once more, if it is made of these entries.
    """

    batches: bool = False
    unordered_input: bool = False
    keyed: bool = False
    first: bool = False
    checks: list[Op] = field(default_factory=list)
    ops: list[Op | CacheOp] = field(default_factory=list)

    @property
    def one_for_one(self) -> bool:
        """Whether each entry gives exactly one, whatever its position: sharding may then come before these ops."""
        return all(op.stream is None if isinstance(op, CacheOp) else not op.predicate for op in self.ops)

    def add(self, op: Op | CacheOp) -> None:
        """Append `op`."""
        if not (isinstance(op, Op) and op.predicate):
            self.checks = []  # it makes other samples, which are not what these predicates are for
        self.ops.append(op)

    def window(
        self,
        upstream: Node,
        processes: Callable[[], WorkerThread],
        order_name: str,
        *,
        room: int | None = None,
        grows: bool = False,
        nbytes: int | None = None,
        finished: int | None = None,
        last: bool = False,
        admission: Admission | None = None,
        begins: bool = False,
        again: bool = False,
    ) -> Window:
        """Build the window; where ops have bounds of their own, several, of which the last is returned.

        Args:
            upstream: Where its entries come from.
            processes: Returns the loader's worker processes; called if an op runs there.
            order_name: The name of the file in the `record_order` folder.
            room: The exact number of entries that it holds. None: as many as its steps can use; of batches, which are
                large, the sum of its ops' concurrencies and half of the largest one.
            grows: It holds more than `room` while a slow entry at the front holds finished ones up, see `Growth`.
            nbytes: It holds fewer than `room` where these would take more bytes, but as many as are made side by side.
            finished: With `room=None`: how many entries may be finished, in addition to those under way.
            last: Whether the consumer takes from it.
            admission: Who decides when samples may begin.
            begins: No sample has begun before.
            again: Entries may be sent back to the first map: an `AgainWindow` is returned.
        """
        log = self._order_log(order_name)
        groups = self._groups(again=again, separate=log is None and (room is None or self.batches))
        completions = self._completions(groups, log, again=again)
        never_waits = self.first and not any(op.is_async for op in self.ops)
        node = upstream
        for number, ops in enumerate(groups):
            is_last = number == len(groups) - 1
            asked = _Asked.of(ops, *((room, nbytes) if is_last else (None, None)), batches=self.batches)
            ops, in_a_row = counted(ops, in_cursors=not completions)
            steps = steps_of(ops, asked.limit, processes, follows=asked.follows)
            places = asked.room(ops, grows=grows)
            if not asked.stated:
                early = (last and is_last) or never_waits
                places = StepsRoom(node, steps, finished if is_last else None, early=early)
            kind = AgainWindow if again and is_last else Window
            ordered = all(op.ordered for op in ops)
            node = window = kind(node, steps, room=places, ordered=ordered, completion=completions.get(number))
            window.in_a_row = in_a_row
            window.bounded = any(isinstance(op, Op) and op.bounded for op in ops)
            window.admission, window.begins = admission, begins and not number
            window.pauses = window.begins or not self.batches
            window.stamps = not self.batches or (isinstance(ops[0], Op) and ops[0].dataset is not None)
        return window

    def _completions(
        self, groups: "list[list[Op | CacheOp]]", log: Recorded | Replayed | None, *, again: bool
    ) -> dict[int, CompletionOrder]:
        """The order of completion of those of the windows, by number, that have one: they share one numbering."""
        unordered = [number for number, ops in enumerate(groups) if not all(op.ordered for op in ops)]
        if not unordered:
            return {}
        numbering = CompletionCursor(unordered_input=self.unordered_input)
        first, last = unordered[0], unordered[-1]
        return {
            number: CompletionOrder(
                numbering,
                log,
                _overtaking(groups[number]),
                numbers=number == first,
                names=number == last and not again,
            )
            for number in range(first, last + 1)
        }

    def _groups(self, *, again: bool, separate: bool) -> "list[list[Op | CacheOp]]":
        """The ops of each window."""
        if again:
            first = next(at for at, op in enumerate(self.ops) if self.batches or not self._is_before_maps(op))
            return [group for group in (self.ops[:first], self.ops[first:]) if group]
        return _separated(self.ops, batches=self.batches) if separate else [self.ops]

    @staticmethod
    def _is_before_maps(op: Op | CacheOp) -> bool:
        """Whether it is no `map`: a filter, or what loads the samples of a dataset."""
        return isinstance(op, Op) and (op.flexible or op.predicate or op.dataset is not None)

    def _order_log(self, name: str) -> Recorded | Replayed | None:
        """Where the order of the results is recorded or read."""
        logged = [op for op in self.ops if isinstance(op, Op) and (op.record_order or op.replay_order)]
        if not logged:
            return None
        if len(logged) > 1:
            raise ValueError(
                f"{' and '.join(op.label for op in logged)} run in one window, which has one order; "
                f"pass record_order or replay_order to one of them"
            )
        (op,) = logged
        if op.replay_order is not None:
            return Replayed(op.replay_order / name)
        assert op.record_order is not None
        return Recorded(op.record_order / name)


@dataclass(frozen=True)
class _Bounds:
    """What the user has said of the room of one window.

    Attributes:
        working: The ops for whose calls there is room in any case.
        ahead: Entries at most; None: bytes alone say it.
        nbytes: Bytes of finished ones at most; None: they are not counted.
        grows: More than `ahead` while a slow one at the front holds finished ones up.
    """

    working: tuple[Op, ...]
    ahead: int | None
    nbytes: int | None
    grows: bool = False

    @classmethod
    def of(cls, ops: "Sequence[Op | CacheOp]") -> "_Bounds | None":
        """Those of `ops`: where several are in one window (a cache has those before it inside), the sums."""
        bounded = [op for op in ops if isinstance(op, Op) and op.bounded]
        if not bounded:
            return None
        working = [op for op in ops if isinstance(op, Op) and (op.bounded or not op.flexible)]
        known = all(op.ahead is not None for op in bounded)
        ahead = sum(op.width if op.ahead is None else op.ahead for op in working) if known else None
        nbytes = [op.ahead_bytes for op in bounded if op.ahead_bytes is not None]
        return cls(tuple(working), ahead, sum(nbytes) if nbytes else None, any(op.grows for op in bounded))

    @property
    def least(self) -> int:
        """Entries that may be under way in any case."""
        return sum(op.width for op in self.working)

    @property
    def room(self) -> Room | None:
        """As a room."""
        if self.nbytes is not None:
            return BytesRoom(self.nbytes, self.least, self.ahead, lambda: self.least)
        assert self.ahead is not None
        return GrowingRoom(self.ahead, self.least, self.ahead) if self.grows else exactly(self.ahead)


@dataclass(frozen=True)
class _Asked:
    """What room one window is to have, as far as that is not for its steps to say.

    Attributes:
        exact: So many entries.
        nbytes: Of finished ones, at most.
        follows: `exact` is what the ops need, and they have a `Limit`, which may change.
        bounds: What the user has said of the ops.
    """

    exact: int | None
    nbytes: int | None
    follows: bool
    bounds: _Bounds | None

    @classmethod
    def of(cls, ops: "Sequence[Op | CacheOp]", exact: int | None, nbytes: int | None, *, batches: bool) -> "_Asked":
        """Of the window of `ops`; for the other arguments see `FusedOps.window`."""
        follows = batches and exact is None and any(isinstance(op.concurrency, Limit) for op in ops)
        if batches:
            exact, nbytes = _room_of_batches(ops, exact, nbytes)
        return cls(exact, nbytes, follows, _Bounds.of(ops) if exact is None else None)

    @property
    def stated(self) -> bool:
        """Whether it is known by now."""
        return self.exact is not None or self.bounds is not None

    @property
    def limit(self) -> int | None:
        """How many entries the window holds, when that is exact."""
        if self.exact is not None:
            return max(1, self.exact)
        return None if self.bounds is None or self.bounds.ahead is None else max(1, self.bounds.ahead)

    def room(self, ops: "Sequence[Op | CacheOp]", *, grows: bool) -> Room | None:
        """The room, if it is `stated`; None: nothing is begun before it is asked for."""
        if self.exact is None:
            return None if self.bounds is None else self.bounds.room
        if self.follows and self.nbytes is None:
            return Room(self.exact, partial(_places_of_batches, ops))
        return _places(self.exact, max(op.width for op in ops), grows=grows, nbytes=self.nbytes)


def _separated(ops: "Sequence[Op | CacheOp]", *, batches: bool) -> "list[list[Op | CacheOp]]":
    """The ops of each of several windows: one with a bound of its own is in a window of its own.

    What the user left to us may be with it, and so may what makes the batches: they are large, and need no places of
    their own before it. All that a cache has before it is in its window.
    """
    caches = [at for at, op in enumerate(ops) if isinstance(op, CacheOp)]
    begin = caches[-1] + 1 if caches else 0
    collate = next((op for op in ops if isinstance(op, Op) and not op.predicate), None) if batches else None
    groups: list[list[Op | CacheOp]] = [list(ops[:begin])]
    for op in ops[begin:]:
        bounded = isinstance(op, Op) and op.bounded
        joins = all(isinstance(other, Op) and (other.flexible or other is collate) for other in groups[-1])
        if bounded and not joins:
            groups.append([])
        groups[-1].append(op)
        if bounded:
            groups.append([])
    return [group for group in groups if group]


def _room_of_batches(ops: "Sequence[Op | CacheOp]", room: int | None, nbytes: int | None) -> tuple[int, int | None]:
    """For how many batches a window has room, and for how many bytes of them.

    Args:
        ops: What is done to them.
        room: As many at most; None: not said.
        nbytes: The same in bytes.
    """
    widths = [op.width for op in ops]
    bounds = _Bounds.of([op for op in ops if isinstance(op, Op) and op.bounded])
    if room is None:
        room = sum(widths) + max(1, max(widths) // 2) if bounds is None or bounds.ahead is None else bounds.ahead
    if bounds is not None:
        room = room if bounds.ahead is None else min(room, bounds.ahead)
        nbytes = bounds.nbytes if nbytes is None else nbytes
    return room, nbytes


def _places_of_batches(ops: "Sequence[Op | CacheOp]") -> int:
    return _room_of_batches(ops, None, None)[0]


def _overtaking(ops: "Sequence[Op | CacheOp]") -> Overtaking | None:
    """How far results may overtake each other in the window of `ops`: as each of them says."""
    bounds = [op.max_overtaken for op in ops if isinstance(op, Op) and op.max_overtaken is not None]
    return Overtaking(min(bounds)) if bounds else None


def _places(room: int, width: int, *, grows: bool, nbytes: int | None) -> Room | None:
    """Room for `room` entries; if it `grows`, for as many as the bytes allow, or more while a slow one is in front."""
    if nbytes is not None and room:
        return BytesRoom(nbytes, width if grows else min(width, room), None if grows else room)
    return GrowingRoom(room, width) if grows else exactly(room)


def exactly(places: int) -> Room | None:
    """Room for `places` entries; None for 0: such a window starts only what it is asked for."""
    return Room(places) if places else None
