"""Windows: which stages run as one step, in which place, and how much room they have."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aioloader.cache.disk import DiskStore
from aioloader.core.cores import usable_cores
from aioloader.core.memory import Alloc
from aioloader.device import Transfer, pin_batch
from aioloader.engine.bulk_load_step import BulkLoadStep
from aioloader.engine.cache_step import KeepInMemory, KeepOnDisk, LookUp
from aioloader.engine.node import Node
from aioloader.engine.order_log import Recorded, Replayed
from aioloader.engine.process_step import CHUNK_SECONDS, ProcessStep
from aioloader.engine.room import Room, StepsRoom
from aioloader.engine.steps import AsyncStep, InPlaceStep, Step
from aioloader.engine.thread_step import ExecutorStep, ThreadStep
from aioloader.engine.turns import TurnStep
from aioloader.engine.window import Window
from aioloader.executors.chunk import Call
from aioloader.executors.epochs import with_set_epoch
from aioloader.executors.processes.worker import Work
from aioloader.executors.processes.worker_pool import WorkerPool
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.stages.base import Pass
from aioloader.stages.batch import CollateWith, Group
from aioloader.stages.cache import Cache
from aioloader.stages.collate import Collate
from aioloader.stages.device import PinMemory, To
from aioloader.stages.drop_if import DropIf
from aioloader.stages.load import CollateAny, CollateAsync
from aioloader.stages.map import Filter, InProcesses, Map

__all__ = ["FusedStages", "collate_stage", "device_stage", "exactly", "steps_of"]


@dataclass
class FusedStages:
    """Neighbouring stages that one window will run."""

    batches: bool = False  # its entries are batches
    unordered_input: bool = False  # what comes in has no fixed order
    keyed: bool = False  # its entries are samples of an indexable source
    first: bool = False  # no stage has begun what comes in
    checks: "list[tuple[DropIf, Step]]" = field(default_factory=list)  # made when these are taken, right before
    stages: list[Map | Filter | Cache] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)  # of each stage, for the random numbers of samples

    def add(self, stage: Map | Filter | Cache, seed: int | None = None) -> None:
        """One more stage."""
        if not isinstance(stage, Filter):
            self.checks = []  # what it makes of samples is nothing that their functions know
        self.stages.append(stage)
        self.seeds.append(seed)

    def window(
        self,
        upstream: Node,
        processes: Callable[[], WorkerThread],
        this_pass: Pass,
        *,
        room: int | None = None,
        finished: int | None = None,
        last: bool = False,
    ) -> Window:
        """The window.

        Args:
            upstream: Where its entries come from.
            processes: See `build`.
            this_pass: Which epoch.
            room: How many entries it holds, exactly; None: what its steps have use for, and of batches, which are
                large, as many as its stages are wide and half of the widest again.
            finished: Then: how many of them may be finished, beside those that are under way.
            last: The consumer takes from it.
        """
        ordered = all(stage.ordered for stage in self.stages)
        if room is None and self.batches:
            widths = [stage.width for stage in self.stages]
            room = sum(widths) + max(1, max(widths) // 2)
        limit = None if room is None else max(1, room)
        steps = steps_of(self.stages, self.seeds, limit, processes, keyed=self.keyed)
        early = last or (self.first and not any(stage.is_async for stage in self.stages))
        places = StepsRoom(upstream, steps, finished, early=early) if room is None else exactly(room)
        return Window(
            upstream,
            steps,
            room=places,
            ordered=ordered,
            log=self._order_log(this_pass),
            unordered_input=self.unordered_input,
        )

    def _order_log(self, this_pass: Pass) -> Recorded | Replayed | None:
        """Where the order in which they leave is recorded, or read from."""
        logged = [
            stage for stage in self.stages if isinstance(stage, Map) and (stage.record_order or stage.replay_order)
        ]
        if not logged:
            return None
        if len(logged) > 1:
            raise ValueError(
                f"{' and '.join(stage.label for stage in logged)} run in one window, which has one order; "
                f"pass record_order or replay_order to one of them"
            )
        (stage,) = logged
        name = "-".join(["epoch", str(this_pass.epoch), *map(str, this_pass.repetitions)]) + ".order"
        if stage.replay_order is not None:
            return Replayed(stage.replay_order / name)
        assert stage.record_order is not None
        return Recorded(stage.record_order / name)


def exactly(places: int) -> Room | None:
    """Room for that many; without any, a window begins what it is asked for."""
    return Room(places) if places else None


def steps_of(
    stages: Sequence[Map | Filter | Cache],
    seeds: Sequence[int | None],
    limit: int | None,
    processes: Callable[[], WorkerThread],
    *,
    keyed: bool,
) -> list[Step]:
    """The steps of a window: neighbouring sync stages that run in the same place with the same width cross together.

    Args:
        stages: Those of the window.
        seeds: Of each, see `Call`.
        limit: What the window holds, when that is exact: more workers would have nothing to do.
        processes: See `build`.
        keyed: What caches know samples by: their keys, or else their number in the epoch.
    """
    steps: list[Step] = []
    together: list[Map | Filter] = []
    their_seeds: list[int | None] = []
    keeps: list[tuple[KeepInMemory | KeepOnDisk, str]] = []

    def cross() -> None:
        if together:
            steps.append(_sync_step(tuple(together), tuple(their_seeds), limit, processes))
            together.clear()
            their_seeds.clear()

    for at, (stage, seed) in enumerate(zip(stages, seeds, strict=True)):
        if isinstance(stage, Map) and stage.many is not None:
            width = _width_beside(stage, stages[at + 1 :])
            call = Call(stage.fn, False, stage.label, seed)
            steps.append(
                BulkLoadStep(call, stage.many, width if limit is None else min(width, limit), elastic=limit is None)
            )
        elif isinstance(stage, Cache):
            cross()
            keep = _keep(stage, limit)
            for step in steps:
                step.drops_to = step.drops_to or keep.refused
            keeps.append((keep, stage.pipeline))
            steps.append(keep)
        elif isinstance(stage, Map) and stage.in_place:
            cross()
            steps.append(InPlaceStep(stage.fn, stage.label))
        elif stage.is_async:
            cross()
            width = stage.width if limit is None else min(stage.width, limit)
            steps.append(AsyncStep(stage.fn, width, stage.label, predicate=isinstance(stage, Filter), seed=seed))
        else:
            if together and not _same_place(together, stage):
                cross()
            together.append(stage)
            their_seeds.append(seed)
    cross()
    return [LookUp(keeps, by_position=not keyed), *steps] if keeps else steps


def _width_beside(load: Map, following: Sequence[Map | Filter | Cache]) -> int:
    """As many loads side by side as of what follows in threads, or the usual number."""
    stage = following[0] if following else None
    beside = isinstance(stage, Map) and not (stage.is_async or stage.flexible) and stage.executor is None
    return stage.width if beside and stage is not None else load.width


def _keep(stage: Cache, limit: int | None) -> KeepInMemory | KeepOnDisk:
    if isinstance(stage.store, DiskStore):
        width = stage.width if limit is None else min(stage.width, limit)
        return KeepOnDisk(stage.store, width, stage.label)
    return KeepInMemory(stage.store, stage.label)


def _sync_step(
    together: Sequence[Map | Filter],
    seeds: Sequence[int | None],
    limit: int | None,
    processes: Callable[[], WorkerThread],
) -> Step:
    calls = [
        Call(stage.fn, isinstance(stage, Filter), stage.label, seed)
        for stage, seed in zip(together, seeds, strict=True)
    ]
    leading = next((stage for stage in together if not stage.flexible), together[0])
    width = leading.width if limit is None else min(leading.width, limit)
    executor = leading.executor
    if isinstance(executor, InProcesses):
        pool = partial(_worker_pool, processes(), executor, together, calls, width)
        elastic, owned = limit is None, not executor.kept
        epochs = executor.epochs(with_set_epoch(call.fn for call in calls))
        if executor.turns is not None:
            return TurnStep(calls, width, pool, epochs, elastic=elastic, owned=owned, turns=executor.turns)
        return ProcessStep(calls, width, pool, epochs, elastic=elastic, in_turn=executor.in_turn, owned=owned)
    if executor is not None and not isinstance(executor, ThreadPoolExecutor):
        return ExecutorStep(calls, width, executor)
    return ThreadStep(
        calls,
        width,
        elastic=limit is None,
        executor=executor,
        thread_name=leading.thread_name,
        initializer=next((stage.initializer for stage in together if stage.initializer), None),
    )


def _worker_pool(
    host: WorkerThread, place: InProcesses, together: Sequence[Map | Filter], calls: Sequence[Call], width: int
) -> WorkerPool:
    """The workers of neighbouring stages: those of the epoch before where they are kept."""

    def make() -> WorkerPool:
        return WorkerPool(host, width, program, resumes=place.turns is None)

    def program() -> Work:
        prepare = None if place.prepare is None else place.prepare()
        epochs = place.epochs(with_set_epoch(call.fn for call in calls))
        return Work(tuple(calls), 2 * CHUNK_SECONDS, prepare, epochs)

    program.stages = together  # type: ignore[attr-defined]  # while the workers live, no others have these ids

    if not place.kept:
        return make()
    pool: WorkerPool = host.get_or_create(place.key or tuple(map(id, together)), make)
    return pool


def _same_place(together: Sequence[Map | Filter], stage: Map | Filter) -> bool:
    fixed = next((s for s in together if not s.flexible), None)
    if together[0].executor is not stage.executor:
        return False
    return fixed is None or stage.flexible or (fixed.width, fixed.thread_name) == (stage.width, stage.thread_name)


def collate_stage(collate: CollateWith, alloc: Alloc | None) -> Map:
    """The step behind the fold of a batch stage."""
    fn: Callable[[Group], Any]
    if collate.fn in (list, tuple):
        return Map(CollateAny(collate.fn), False, 1, name=collate.label, in_place=True)
    if collate.fn is None:
        fn = CollateAny(None, Collate(alloc))
    elif collate.is_async:
        fn = CollateAsync(collate.fn)
    else:
        fn = CollateAny(collate.fn)
    return Map(
        fn,
        collate.is_async,
        collate.workers or usable_cores(),
        name=collate.label,
        initializer=collate.initializer,
        thread_name="aioloader-collate",
    )


def device_stage(stage: To | PinMemory, transfer: Transfer) -> Map:
    """The step on the one device thread."""
    backend = transfer.backend
    fn = transfer.send if isinstance(stage, To) else partial(pin_batch, backend=backend)
    return Map(
        fn,
        False,
        concurrency=1,
        name=stage.label,
        initializer=lambda _: backend.init_thread(),
        thread_name="aioloader-device",
    )
