"""Neighbouring operations fused into one window: which of them share a step, and how much room there is."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from aioloader.core.address import Address
from aioloader.core.cores import usable_cores
from aioloader.core.cursors import CompletionCursor
from aioloader.core.limit import Limit, width_of
from aioloader.core.policies import Policies
from aioloader.core.written import Written
from aioloader.engine.admission import Admission
from aioloader.engine.again import AgainWindow
from aioloader.engine.async_step import AsyncStep
from aioloader.engine.bulk_load_step import BulkLoadStep
from aioloader.engine.cache_step import CacheOp
from aioloader.engine.in_a_row import counted
from aioloader.engine.node import Node
from aioloader.engine.order_log import Recorded, Replayed
from aioloader.engine.overtaking import Overtaking
from aioloader.engine.process_step import CHUNK_SECONDS, ProcessStep
from aioloader.engine.ray_step import OnRay, ray_step
from aioloader.engine.room import BytesRoom, GrowingRoom, Room, StepsRoom
from aioloader.engine.steps import InPlaceStep, Step
from aioloader.engine.thread_step import ExecutorStep, ThreadStep
from aioloader.engine.turns import Turns, TurnStep
from aioloader.engine.window import Window
from aioloader.executors.chunk import Call, Stop
from aioloader.executors.epochs import Epochs, epochs_of, with_set_epoch
from aioloader.executors.processes.worker import Work
from aioloader.executors.processes.worker_pool import WorkerPool
from aioloader.executors.processes.worker_thread import WorkerThread

__all__ = ["PROCESSES", "FusedOps", "InProcesses", "Op", "exactly", "steps_of"]


@dataclass(frozen=True)
class InProcesses:
    """Runs sync functions in worker processes of the loader.

    Args:
        kept: The workers stay from one epoch to the next.
        in_turn: The workers take turns, so that random numbers are repeatable when each worker has its own seed.
        prepare: Called before the first sample; returns a function that each worker calls with its number, or None.
            That function is sent to the workers with the others.
        turns: The source, when only the workers know where the data ends.
        epochs: Returns the current epochs of the user's objects with `set_epoch`, for their copies in the workers.
    """

    kept: bool = True
    in_turn: bool = False
    prepare: Callable[[], Callable[[int], None] | None] | None = None
    turns: Turns | None = None
    epochs: Callable[[Sequence[Any]], Epochs] = epochs_of


PROCESSES: Final = InProcesses()
"""The usual place. Neighbouring stages that run here are sent to the workers together."""


@dataclass(frozen=True)
class Op:
    """A function that a window calls with each entry.

    Attributes:
        fn: Sync or async.
        label: Its name in statistics and in notes of errors.
        is_async: Whether `fn` is awaited on the loop.
        concurrency: The maximum number of calls at once, or a `Limit` that it shares with others.
        address: See `Address`; identifies its worker processes, and its random numbers depend on it.
        seed: The seed of its samples' random numbers; None: it draws none.
        predicate: `fn` decides which entries stay.
        ordered: Results come in the order of the input.
        executor: Where `fn` runs; None: a sync one in threads of the loader, an async one on the loop.
        initializer: Called in each of the loader's threads with its number.
        thread_name: The name of these threads.
        flexible: The user did not set the concurrency: next to another sync op, it takes that one's.
        many: Does the same as `fn` for a list of samples at once, where that may be cheaper.
        dataset: With `many`: the dataset from which `fn` loads samples by their keys.
        record_order: With `ordered=False`: a folder to which the order of the results is written.
        replay_order: With `ordered=False`: such a folder; results come in the order that it has.
        in_place: `fn` runs no user code and takes less time than a hop: it is called on the loop.
        ahead: Entries that may be under way and finished together; None: as many as its window has use for. One with a
            bound of its own has a window of its own.
        ahead_bytes: The same in bytes of finished ones.
        grows: More than `ahead` while a slow one at the front holds finished ones up, see `Growth`.
        max_overtaken: With `ordered=False`: results that may overtake a slower one; None: any number.
        max_dropped_in_a_row: With `predicate`: entries that it may refuse one after the other; None: any number.
        stop: What is said of entries that end here; None: nobody asks.
        policies: What is done about its calls. With any it shares no hop with others.
        written: Where the user writes its concurrency; None: nowhere.
    """

    fn: Callable[[Any], Any]
    label: str
    is_async: bool = False
    concurrency: int | Limit = field(default_factory=usable_cores)
    address: Address = ()
    seed: int | None = None
    predicate: bool = False
    ordered: bool = True
    executor: Executor | InProcesses | OnRay | None = None
    initializer: Callable[[int], None] | None = None
    thread_name: str = "aioloader-map"
    flexible: bool = False
    many: Callable[[list[Any]], Any] | None = None
    dataset: Any = None
    record_order: Path | None = None
    replay_order: Path | None = None
    in_place: bool = False
    ahead: int | None = None
    ahead_bytes: int | None = None
    grows: bool = False
    max_overtaken: int | None = None
    max_dropped_in_a_row: int | None = None
    stop: Stop | None = None
    policies: Policies | None = None
    written: Written | None = None

    @property
    def width(self) -> int:
        """The maximum number of calls at once, as of now."""
        return width_of(self.concurrency)

    @property
    def bounded(self) -> bool:
        """Whether the user has said how much may be ahead."""
        return self.ahead is not None or self.ahead_bytes is not None

    @property
    def call(self) -> Call:
        """The same for steps that run several ops in one hop."""
        return Call(self.fn, self.predicate, self.label, self.seed, self.stop)


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
        groups = self._groups(again=again, apart=log is None and (room is None or self.batches))
        unordered = [number for number, ops in enumerate(groups) if not all(op.ordered for op in ops)]
        numbering = CompletionCursor(unordered_input=self.unordered_input) if unordered else None
        node = upstream
        for number, ops in enumerate(groups):
            is_last = number == len(groups) - 1
            early = (last and is_last) or (self.first and not any(op.is_async for op in self.ops))
            exact, budget = (room, nbytes) if is_last else (None, None)
            follows = self.batches and exact is None and any(isinstance(op.concurrency, Limit) for op in ops)
            if self.batches:
                exact, budget = _room_of_batches(ops, exact, budget)
            bounds = _Bounds.of(ops) if exact is None else None
            ops, in_a_row = counted(ops, in_cursors=not unordered)
            steps = steps_of(ops, _limit(exact, bounds), processes, follows=follows)
            places: Room | None
            if exact is not None and follows and budget is None:
                places = Room(exact, partial(_places_of_batches, ops))
            elif exact is not None:
                places = _places(exact, max(op.width for op in ops), grows=grows, nbytes=budget)
            elif bounds is not None:
                places = bounds.room
            else:
                places = StepsRoom(node, steps, finished if is_last else None, early=early)
            kind = AgainWindow if again and is_last else Window
            node = window = kind(
                node,
                steps,
                room=places,
                ordered=number not in unordered,
                log=log,
                overtaking=_overtaking(ops),
                numbering=numbering if unordered and unordered[0] <= number <= unordered[-1] else None,
            )
            window.in_a_row = in_a_row
            window.bounded = any(isinstance(op, Op) and op.bounded for op in ops)
            window.admission, window.begins = admission, begins and not number
            window.pauses = window.begins or not self.batches
            window.stamps = not self.batches or (isinstance(ops[0], Op) and ops[0].dataset is not None)
            if unordered:
                window.numbers = number == unordered[0]
                window.names = number == unordered[-1] and not again
        return window

    def _groups(self, *, again: bool, apart: bool) -> "list[list[Op | CacheOp]]":
        """The ops of each window."""
        if again:
            first = next(at for at, op in enumerate(self.ops) if self.batches or not self._is_before_maps(op))
            return [group for group in (self.ops[:first], self.ops[first:]) if group]
        return _apart(self.ops, batches=self.batches) if apart else [self.ops]

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


def _limit(room: int | None, bounds: _Bounds | None) -> int | None:
    """How many entries a window holds, when that is exact."""
    if room is not None:
        return max(1, room)
    return None if bounds is None or bounds.ahead is None else max(1, bounds.ahead)


def _apart(ops: "Sequence[Op | CacheOp]", *, batches: bool) -> "list[list[Op | CacheOp]]":
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
    said = [op.max_overtaken for op in ops if isinstance(op, Op) and op.max_overtaken is not None]
    return Overtaking(min(said)) if said else None


def _places(room: int, width: int, *, grows: bool, nbytes: int | None) -> Room | None:
    """Room for `room` entries; if it `grows`, for as many as the bytes allow, or more while a slow one is in front."""
    if nbytes is not None and room:
        return BytesRoom(nbytes, width if grows else min(width, room), None if grows else room)
    return GrowingRoom(room, width) if grows else exactly(room)


def exactly(places: int) -> Room | None:
    """Room for `places` entries; None for 0: such a window starts only what it is asked for."""
    return Room(places) if places else None


def steps_of(
    ops: Sequence[Op | CacheOp],
    limit: int | None,
    processes: Callable[[], WorkerThread],
    *,
    follows: bool = False,
) -> list[Step]:
    """The steps of a window.

    Neighbouring sync ops with the same place and width share a hop. A cache becomes one step around all steps before
    it.

    Args:
        ops: The window's ops.
        limit: How many entries the window holds, when that is exact: more workers would have nothing to do.
        processes: See `FusedOps.window`.
        follows: It will hold more when there is more concurrency, see `Limit`.
    """
    steps: list[Step] = []
    together: list[Op] = []

    def put(step: Step, *ops: Op) -> None:
        op = ops[0]
        step.meter.address = op.address
        step.written = _written(ops)
        if op.policies is not None:
            step.obey(op.policies)
        if not follows:
            step.most = limit
        steps.append(step)

    def close() -> None:
        if together:
            put(_sync_step(tuple(together), limit, processes), *together)
            together.clear()

    for at, op in enumerate(ops):
        if isinstance(op, CacheOp):
            close()
            steps = [op.around(steps, limit)]
        elif op.many is not None:
            width = _narrowed(_width_beside(op, ops[at + 1 :]), limit)
            put(BulkLoadStep(op.call, op.many, width, elastic=limit is None), op)
        elif op.in_place:
            close()
            put(InPlaceStep(op.fn, op.label), op)
        elif op.is_async and not isinstance(op.executor, OnRay):
            close()
            width = _narrowed(op.concurrency, limit)
            put(AsyncStep(op.fn, width, op.label, predicate=op.predicate, seed=op.seed), op)
            steps[-1].stop = op.stop
        else:
            if together and not _same_place(together, op):
                close()
            together.append(op)
    close()
    return steps


def _written(ops: Sequence[Op]) -> tuple[Written, ...]:
    """Where the concurrency of `ops` is written, which share a step: at each that does not follow another one."""
    said = [op.written for op in ops if not op.flexible and op.written is not None]
    return tuple(said or [op.written for op in ops if op.written is not None][:1])


def _narrowed(width: int | Limit, limit: int | None) -> int | Limit:
    """No more than `limit`; a `Limit` stays one, and its step has `Step.most`."""
    return width if limit is None or isinstance(width, Limit) else min(width, limit)


def _width_beside(load: Op, following: Sequence[Op | CacheOp]) -> int | Limit:
    """The concurrency of `load`: what the user said, or that of the op that follows in threads, if one does."""
    if not load.flexible:
        return load.concurrency
    op = following[0] if following else None
    beside = isinstance(op, Op) and not (op.predicate or op.is_async or op.flexible) and op.executor is None
    return op.concurrency if beside and op is not None else load.concurrency


def _sync_step(together: Sequence[Op], limit: int | None, processes: Callable[[], WorkerThread]) -> Step:
    calls = [op.call for op in together]
    leading = next((op for op in together if not op.flexible), together[0])
    width = _narrowed(leading.concurrency, limit)
    executor = leading.executor
    if isinstance(executor, InProcesses):
        workers = width_of(width) if limit is None else min(width_of(width), limit)
        pool = partial(_worker_pool, processes(), executor, together, workers)
        elastic, owned = limit is None, not executor.kept
        epochs = executor.epochs(with_set_epoch(call.fn for call in calls))
        if executor.turns is not None:
            return TurnStep(calls, workers, pool, epochs, elastic=elastic, owned=owned, turns=executor.turns)
        return ProcessStep(calls, width, pool, epochs, elastic=elastic, in_turn=executor.in_turn, owned=owned)
    if isinstance(executor, OnRay):
        return ray_step(together, executor, width, limit, processes())
    if executor is not None and not isinstance(executor, ThreadPoolExecutor):
        return ExecutorStep(calls, width, executor)
    return ThreadStep(
        calls,
        width,
        elastic=limit is None,
        executor=executor,
        thread_name=leading.thread_name,
        initializer=next((op.initializer for op in together if op.initializer), None),
    )


def _worker_pool(host: WorkerThread, place: InProcesses, together: Sequence[Op], width: int) -> WorkerPool:
    """The workers of neighbouring ops: those of the previous epoch, where they are kept."""

    def make() -> WorkerPool:
        return WorkerPool(host, width, program, resumes=place.turns is None)

    def program() -> Work:
        prepare = None if place.prepare is None else place.prepare()
        epochs = place.epochs(with_set_epoch(op.fn for op in together))
        return Work(tuple(op.call for op in together), 2 * CHUNK_SECONDS, prepare, epochs)

    if not place.kept:
        return make()
    pool: WorkerPool = host.get_or_create(("pool", *(op.address for op in together)), make)
    return pool


def _same_place(together: Sequence[Op], op: Op) -> bool:
    if any(other.policies is not None for other in (op, *together)):
        return False
    fixed = next((other for other in together if not other.flexible), None)
    if together[0].executor != op.executor or together[0].is_async != op.is_async:
        return False
    return fixed is None or op.flexible or (fixed.concurrency, fixed.thread_name) == (op.concurrency, op.thread_name)
