"""From descriptions to nodes: which stages run in one window, and with how much room.

Pure: nothing is started, no user code runs. `Source` and the stages are what a pipeline is; `build` says how it runs.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

from aioloader.cache.disk import DiskStore
from aioloader.cores import usable_cores
from aioloader.device import Transfer, pin_batch
from aioloader.engine.cached import KeepInMemory, KeepOnDisk, LookUp, PlacedNode
from aioloader.engine.combine import HeadNode, InterleaveNode, MergeNode, MixNode, RepeatNode, ZipNode
from aioloader.engine.located import CursorSource
from aioloader.engine.many_step import ManyStep
from aioloader.engine.node import FoldNode, Node, TimedFoldNode
from aioloader.engine.order_log import Recorded, Replayed
from aioloader.engine.own_process import OwnProcessNode, Serving
from aioloader.engine.process_step import CHUNK_SECONDS, ProcessStep
from aioloader.engine.source import FlatMapNode, KeySource, StreamSource
from aioloader.engine.steps import AsyncStep, ExecutorStep, Step, ThreadStep
from aioloader.engine.window import Window
from aioloader.executors.chunk import Call
from aioloader.executors.processes.host import Processes
from aioloader.executors.processes.remote import Remote
from aioloader.executors.processes.team import Team
from aioloader.executors.processes.worker import Work
from aioloader.memory.pool import BatchMemory
from aioloader.sources.drawn import keys_of
from aioloader.sources.files import Files
from aioloader.sources.order import KeyOrder, is_order_stage, order_of
from aioloader.sources.resolve import Indexable, Stream, describe_content, source_name
from aioloader.stages.base import FoldStage, Pass, Stage, UnknownLengthError
from aioloader.stages.batch import Batch, CollateWith, Group, Unbatch
from aioloader.stages.cache import COPY, Cache, with_copies
from aioloader.stages.collate import Alloc, Collate
from aioloader.stages.device import PinMemory, To
from aioloader.stages.drop_if import DropIf, FreshGroup
from aioloader.stages.fetch import FetchBatch, FetchGroup
from aioloader.stages.keyed import JoinBatches
from aioloader.stages.map import Filter, FlatMap, InProcesses, Map
from aioloader.stages.own_process import OwnProcess
from aioloader.stages.shard import Again, Shard, ShardFold
from aioloader.stages.shuffle import Shuffle

__all__ = [
    "Combined",
    "Plan",
    "Repeat",
    "Single",
    "any_order",
    "build",
    "in_front_of_cache",
    "is_permutable",
    "length_of",
    "placed",
]

DEFAULT_PREFETCH = 2
SAMPLES_BETWEEN = 64  # samples, not batches, on their way from a process of its own


@dataclass(frozen=True)
class Single:
    """One source.

    Attributes:
        data: What it is.
        sampler: Gives the keys of an epoch instead of 0, 1, 2, ...
        name: In statistics; None: that of the user's object.
        keys: `data` gives keys, or the keys of batches.
        tells_epoch: A stream with `set_epoch` is told the number of each epoch, as a sampler is.
    """

    data: Indexable | Stream
    sampler: Stream | None = None
    name: str | None = None
    keys: bool = False
    tells_epoch: bool = False

    def length(self) -> int:
        """Samples per epoch; TypeError when unknown."""
        return self.data.length if self.sampler is None else self.sampler.length

    @property
    def indexable(self) -> bool:
        """Whether order stages are arithmetic on its keys."""
        return self.sampler is None and isinstance(self.data, Indexable)


@dataclass(frozen=True)
class Combined:
    """Several pipelines as one source."""

    how: Literal["interleave", "merge", "mix", "zip"]
    plans: tuple["Plan", ...]
    weights: tuple[float, ...] = ()
    seed: int = 0

    indexable = False

    def length(self) -> int:
        """Samples per epoch; TypeError when unknown."""
        lengths = [length_of(plan) for plan in self.plans]
        return min(lengths) if self.how == "zip" else sum(lengths)


@dataclass(frozen=True)
class Repeat(Stage):
    """All that is before it, again and again."""

    times: int | None

    @property
    def label(self) -> str:
        return f"repeat({'' if self.times is None else self.times})"

    def length(self, upstream: int) -> int:
        if self.times is None:
            raise UnknownLengthError("repeat() without a number is endless")
        return upstream * self.times


@dataclass(frozen=True)
class Plan:
    """A pipeline's description.

    Attributes:
        source: Where samples come from.
        stages: What is done to them.
        prefetch: Finished batches held ahead; None: 2, and for samples that are not batched what their window holds.
        room: Batches being made and finished together; None: decided here.
        seed: Of the random numbers of samples (`sample_rng`); None: the loader draws one.
        gives_info: What is handed out are pairs of a batch and its `BatchInfo`.
    """

    source: Single | Combined
    stages: tuple[Stage, ...] = ()
    prefetch: int | None = None
    room: int | None = None
    seed: int | None = None
    gives_info: bool = False


def length_of(plan: Plan) -> int:
    """Entries per epoch.

    Raises:
        TypeError: Unknown before it has run.
    """
    length = plan.source.length()
    for stage in plan.stages:
        length = stage.length(length)
    return length


def any_order(source: Single | Combined, stages: Sequence[Stage]) -> bool:
    """Whether samples come in another order each time."""
    if isinstance(source, Combined) and (
        (source.how == "merge" and len(source.plans) > 1)
        or any(any_order(inner.source, inner.stages) for inner in source.plans)
    ):
        return True
    return any(isinstance(stage, Map) and not stage.ordered and stage.replay_order is None for stage in stages)


def placed(plan: Plan) -> Plan:
    """The plan with each `shard` as it is now: looked up once, so that a whole epoch is of one rank.

    Raises:
        ValueError: `shard(even="error")`, and it is known that the samples do not share out evenly; or the rank that
            the environment names is none.
    """
    source = plan.source
    if isinstance(source, Combined):
        source = replace(source, plans=tuple(placed(inner) for inner in source.plans))
    plan = replace(plan, source=source)
    for at, stage in enumerate(plan.stages):
        if isinstance(stage, Shard):
            shard = stage.placed()
            plan = replace(plan, stages=(*plan.stages[:at], shard, *plan.stages[at + 1 :]))
            if shard.even == "error":
                with suppress(UnknownLengthError, TypeError):  # then the end of the stream tells
                    length_of(replace(plan, stages=plan.stages[: at + 1]))
    return plan


def build(
    plan: Plan,
    this_pass: Pass,
    transfer: Transfer | None = None,
    alloc: Alloc | None = None,
    processes: Callable[[], Processes] = Processes,
    *,
    dry: bool = False,
    resumed: bool = False,
    drawn: dict[str, Any] | None = None,
) -> Window:
    """The nodes of one epoch; the last is always a window, which holds what is made ahead.

    Args:
        plan: What to run.
        this_pass: Which epoch, for seeds.
        transfer: The loader's way to its device, when `plan` ends in `to` or `pin_memory` and there is such a device.
        alloc: Where the default collate puts batches; None: into fresh memory.
        processes: Gives the loader's worker processes; called when a stage runs there.
        dry: The nodes will never be started, only `resume` will tell whether a cursor fits.
        resumed: `resume` will be called: the epoch has begun before.
        drawn: Gets what samplers draw their order from, and has it in a resumed epoch.
    """
    plan = placed(plan)
    builder = _Builder(this_pass, transfer, alloc, processes, dry=dry, resumed=resumed, drawn=drawn)
    return _output(plan, this_pass, builder, processes)


def _output(plan: Plan, this_pass: Pass, builder: "_Builder", processes: Callable[[], Processes]) -> Window:
    """The nodes of `plan` and the window that ends them."""
    prefetch = DEFAULT_PREFETCH if plan.prefetch is None else plan.prefetch
    node, journey = builder.stream(plan)
    if not journey.stages:
        if isinstance(node, Window) and plan.stages and isinstance(plan.stages[-1], DropIf):
            return node  # it has no room: what is made ahead is held by the window before it
        return Window(node, (), room=prefetch)
    if plan.room is not None or journey.batches:
        return journey.window(node, prefetch if plan.room is None else plan.room, processes, this_pass, exact=True)
    return journey.window(node, journey.room(plan.prefetch), processes, this_pass)


@dataclass
class _Journey:
    """Neighbouring stages that one window will run."""

    batches: bool = False  # its entries are batches
    loose: bool = False  # what comes in has no fixed order
    keyed: bool = False  # its entries are samples of an indexable source
    checks: "list[tuple[DropIf, Step]]" = field(default_factory=list)  # made when these are taken, right before
    stages: list[Map | Filter | Cache] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)  # of each stage, for the random numbers of samples

    def add(self, stage: Map | Filter | Cache, seed: int | None = None) -> None:
        """One more stage."""
        self.stages.append(stage)
        self.seeds.append(seed)

    def room(self, finished: int | None = None) -> int:
        """As many places as may be under way, and half as many again for finished samples that wait for a slow one.

        Behind latency that keeps 96 to 99 % of the rate of a loop that does not keep order (measured with 512 under
        way: 64 places more gave 77 %, 256 gave 96 to 99 %).
        """
        widths = [stage.width for stage in self.stages]
        return sum(widths) + (max(1, max(widths) // 2) if finished is None else finished)

    def window(
        self, upstream: Node, room: int, processes: Callable[[], Processes], this_pass: Pass, *, exact: bool = False
    ) -> Window:
        """The window. With `exact` there is never more than `room`, however cheap the samples are."""
        ordered = all(stage.ordered for stage in self.stages)
        limit = max(1, room) if exact or self.batches else None
        steps = _steps(self.stages, self.seeds, limit, processes, keyed=self.keyed)
        return Window(upstream, steps, room=room, ordered=ordered, log=self._order_log(this_pass), loose=self.loose)

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


class _Builder:
    def __init__(
        self,
        this_pass: Pass,
        transfer: Transfer | None,
        alloc: Alloc | None,
        processes: Callable[[], Processes],
        *,
        dry: bool,
        resumed: bool,
        drawn: dict[str, Any] | None = None,
    ) -> None:
        self._pass = this_pass
        self._dry = dry
        self._resumed = resumed
        self._drawn = drawn
        self._samplers = 0
        self._place = ""  # within enclosing repeats, for names of samplers
        self._transfer = transfer
        self._alloc = alloc
        self._processes = processes
        self._numbered = 0  # stages whose samples have random numbers

    def _seed(self) -> int | None:
        """For the random numbers of samples in the next stage."""
        self._numbered += 1
        this_pass = self._pass
        if this_pass.sample_seed is None:
            return None
        return this_pass.seed(this_pass.sample_seed, f"sample {len(this_pass.repetitions)} {self._numbered}")

    def stream(self, plan: Plan) -> tuple[Node, _Journey]:
        """The nodes of `plan`, and the stages at its end that still want a window."""
        original, plan = plan, replace(plan, stages=with_copies(plan.stages))
        splits = [i for i, stage in enumerate(plan.stages) if isinstance(stage, Repeat | OwnProcess)]
        if splits:
            at = splits[-1]
            split = plan.stages[at]
            inner = Plan(plan.source, plan.stages[:at])
            rest: Sequence[Stage] = plan.stages[at + 1 :]
            node: Node
            loose = any_order(plan.source, plan.stages[:at])
            if isinstance(split, OwnProcess):
                inner = Plan(plan.source, original.stages[: original.stages.index(split)])
                node, journey = self._own_process(inner, loose=loose)
            else:
                assert isinstance(split, Repeat)
                place = f"{self._place}{self._samplers}."
                self._samplers += 1
                node = RepeatNode(lambda repetition: self._repetition(inner, repetition, place), split.times)
                journey = _Journey(loose=loose)
        else:
            node, journey, rest = self._source(plan.source, plan.stages)
        for number, stage in enumerate(rest, len(plan.stages) - len(rest)):
            if isinstance(stage, DropIf):
                node, journey = self._check_late(node, journey, stage, plan)
            elif isinstance(stage, Shard):
                node, journey = self._shard(node, journey, stage, replace(plan, stages=plan.stages[:number]))
            else:
                loose = any_order(plan.source, plan.stages[:number])
                node, journey = self._add(node, journey, stage, loose=loose)
        return node, journey

    def _shard(self, node: Node, journey: _Journey, stage: Shard, before: Plan) -> tuple[Node, _Journey]:
        """`stage` behind the plan `before`, of which `node` and `journey` are made.

        A map gives one sample for one, so that maps in front run on this rank's samples alone; so does a cache that
        knows samples by their keys.
        """
        one_for_one = Map | Cache if journey.keyed else Map
        commutes = all(isinstance(other, one_for_one) for other in journey.stages)
        if not commutes:
            node, journey = self._close(node, journey), _Journey()
        assert stage.rank is not None  # `placed`
        assert stage.world_size is not None
        again_from = _again(before)
        fold = ShardFold(stage.rank, stage.world_size, stage.even, again_from)
        if fold.head and again_from == "head":

            def again() -> Node:
                builder = _Builder(self._pass, None, self._alloc, self._processes, dry=self._dry, resumed=True)
                return builder.stream(before)[0] if commutes else builder.closed(before)

            node = HeadNode(node, again, fold.head)
        return FoldNode(node, fold), journey

    def _check_late(self, node: Node, journey: _Journey, stage: DropIf, plan: Plan) -> tuple[Node, _Journey]:
        """A window that begins what it is asked for, over one that holds what is made ahead."""
        prefetch = DEFAULT_PREFETCH if plan.prefetch is None else plan.prefetch
        if journey.batches:
            node = journey.window(node, prefetch, self._processes, self._pass, exact=True)
        elif journey.stages:
            node = self._close(node, journey)
        elif stage is plan.stages[-1]:
            node = Window(node, (), room=prefetch)
        steps = _steps([stage.check()], [None], None, self._processes, keyed=False)
        window = Window(node, steps, room=0)
        return window, _Journey(checks=[*journey.checks, (stage, steps[0])])

    def _repetition(self, plan: Plan, repetition: int, place: str) -> Node:
        this_pass = self._pass.repeated(repetition)
        builder = _Builder(
            this_pass, None, self._alloc, self._processes, dry=self._dry, resumed=self._resumed, drawn=self._drawn
        )
        builder._place = place
        return builder.closed(plan)

    def _own_process(self, plan: Plan, *, loose: bool) -> tuple[Node, _Journey]:
        """The node for a plan that runs in a process of its own."""
        # What would run here: it numbers the stages, and says whether a cursor fits.
        builder = _Builder(self._pass, None, None, Processes, dry=True, resumed=self._resumed)
        builder._numbered = self._numbered
        node, journey = builder.stream(plan)
        inner = _InProcess(placed(plan), self._numbered)
        self._numbered = builder._numbered
        batches = journey.batches
        if self._dry:
            return self._close(node, journey), _Journey(batches=batches, loose=loose)
        key = (id(plan.source), *map(id, plan.stages), repr(inner.places))
        remote = partial(_remote, self._processes(), key, plan, inner)
        room = DEFAULT_PREFETCH if batches else SAMPLES_BETWEEN
        return OwnProcessNode(remote, self._pass, room=room, batches=batches), _Journey(batches=batches, loose=loose)

    def closed(self, plan: Plan) -> Node:
        """The nodes of a plan inside another one."""
        return self._close(*self.stream(plan))

    def _close(self, node: Node, journey: _Journey) -> Node:
        return journey.window(node, journey.room(), self._processes, self._pass) if journey.stages else node

    def _source(self, source: Single | Combined, stages: Sequence[Stage]) -> tuple[Node, _Journey, Sequence[Stage]]:
        if isinstance(source, Combined):
            inner = [self.closed(plan) for plan in source.plans]
            return self._combine(source, inner), _Journey(loose=any_order(source, ())), stages
        data = source.data
        if isinstance(data, Stream):
            if not self._dry:
                data.use()
            name = source.name or f"source({source_name(data.make)})"
            # Behind a cache it is no surprise: what is not kept is read again in every epoch.
            warns = not (self._dry or source.keys or any(isinstance(stage, Cache) for stage in stages))
            source_node = StreamSource(
                data.make,
                call=data.call,
                name=name,
                keys=source.keys,
                warns=warns,
                unknown=data.call and not source.keys,
                tells_epoch=source.tells_epoch,
            )
            return source_node, _Journey(), stages
        if source.sampler is None and data.loads_many and (at := _batch_of_keys(stages)) is not None:
            return self._batches_of(data, stages, at)
        journey = _Journey(keyed=True)
        name = source.name or f"source({source_name(data.data)})"
        if data.load is not None:
            load = Map(
                data.load,
                data.is_async,
                name=f"{type(data.data).__name__}[...]",
                flexible=True,
                many=data.data.__getitems__ if data.loads_many else None,
            )
            journey.add(load, self._seed())
        if source.sampler is not None:
            if not self._dry:
                source.sampler.use()
            how = {
                "resumed": self._resumed,
                "record": self._drawn,
                "name": f"drawn {self._place}{self._samplers}",
                "repetitions": self._pass.repetitions,
            }
            self._samplers += 1
            open_sampler = partial(_open_sampler, source.sampler, self._pass.epoch, how)
            node: Node = StreamSource(open_sampler, call=True, name="sampler", keys=True)
            if data.load is None:
                values = data.data
                journey.add(Map(values.__getitem__, False, name=f"{type(values).__name__}[...]", flexible=True))
            return node, journey, stages
        # Each map gives one sample for one, so that order stages behind it may as well choose its input.
        order_stages = []
        for at, stage in enumerate(stages):
            if isinstance(stage, Map):
                journey.add(stage, None if stage is COPY else self._seed())
            elif isinstance(stage, Cache):
                journey.add(stage)
            elif is_order_stage(stage):
                order_stages.append(stage)
            else:
                rest = stages[at:]
                break
        else:
            rest = ()
        values = data.data if data.load is None else None
        return KeySource(self._order(data, order_stages), values, name, data.names), journey, rest

    def _order(self, data: Indexable, stages: Sequence[Stage]) -> KeyOrder:
        return order_of(data.length, stages, self._pass, permute=not self._dry)

    def _batches_of(self, data: Indexable, stages: Sequence[Stage], at: int) -> tuple[Node, _Journey, Sequence[Stage]]:
        """Whole batches of a dataset that loads many samples at once; `stages[at]` is the batch.

        Keys are batched, and loading a batch is one step with collating it. Cursors are as they would be otherwise.
        """
        batch = stages[at]
        assert isinstance(batch, Batch)
        name = f"source({source_name(data.data)})"
        node: Node = KeySource(self._order(data, stages[:at]), None, name, data.names)
        node = FoldNode(node, batch.fold(self._pass))
        collate = batch.collate
        journey = _Journey(batches=True)
        fetch = FetchBatch(data.data, collate.fn, Collate(self._alloc))
        journey.add(
            Map(
                FetchGroup(fetch),
                False,
                collate.workers or usable_cores(),
                name=f"{type(data.data).__name__}[...]",
                thread_name="aioloader-fetch",
            ),
            self._seed(),
        )
        return node, journey, stages[at + 1 :]

    def _combine(self, source: Combined, nodes: list[Node]) -> Node:
        match source.how:
            case "interleave":
                return InterleaveNode(nodes)
            case "merge":
                return MergeNode(nodes)
            case "zip":
                return ZipNode(nodes)
            case "mix":
                return MixNode(nodes, source.weights, self._pass.seed(source.seed, "mix"))

    def _add(self, node: Node, journey: _Journey, stage: Stage, *, loose: bool) -> tuple[Node, _Journey]:
        if isinstance(stage, Map | Filter):
            journey.add(stage, None if stage is COPY else self._seed())
            return node, journey
        if isinstance(stage, To | PinMemory):
            journey.batches = True  # whatever it is made of, it is held as batches are
            if self._transfer is not None:
                journey.add(device_stage(stage, self._transfer))
            return node, journey
        if isinstance(stage, Cache) and journey.keyed:
            journey.add(stage)
            return node, journey
        are_batches = journey.batches
        node = self._close(node, journey)
        if isinstance(stage, Cache):
            placed = _Journey(are_batches)
            placed.add(stage)
            return node if self._dry else PlacedNode(node, stage.store, stage.pipeline), placed
        if isinstance(stage, FlatMap):
            return FlatMapNode(node, stage.fn, stage.label, loose=loose), _Journey(loose=loose)
        assert isinstance(stage, FoldStage), stage
        loose_fold = loose and isinstance(stage, Unbatch | Shuffle)
        if isinstance(stage, Batch) and stage.max_wait is not None:
            node = TimedFoldNode(node, stage.fold(self._pass), stage.max_wait, stage.label)
        else:
            node = FoldNode(node, stage.fold(self._pass), loose=loose_fold)
        if isinstance(stage, Batch | JoinBatches):
            batches = _Journey(batches=True, loose=loose)
            for check, step in journey.checks:
                batches.add(_fresh_stage(check, step))
            batches.add(collate_stage(stage.collate, self._alloc))
            return node, batches
        return node, _Journey(loose=loose)


def _fresh_stage(check: DropIf, step: Step) -> Filter:
    """What looks through a batch once more, in the crossing of its collate; counts where the first look counts."""
    return Filter(FreshGroup(check.fn, lambda: step.meter), is_async=False, name=check.label)


def _batch_of_keys(stages: Sequence[Stage]) -> int | None:
    """Where in `stages` keys are batched, when nothing is done to single samples before that."""
    for at, stage in enumerate(stages):
        if isinstance(stage, Batch):
            return None if stage.collate.is_async or stage.max_wait is not None else at
        if not is_order_stage(stage):
            return None
    return None


def collate_stage(collate: CollateWith, alloc: Alloc | None) -> Map:
    """The step behind the fold of a batch stage."""
    fn: Callable[[Group], Any]
    if collate.fn is None:
        fn = _DefaultCollate(Collate(alloc))
    elif collate.is_async:
        fn = _AsyncUserCollate(collate.fn)
    else:
        fn = _UserCollate(collate.fn)
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


@dataclass(frozen=True)
class _DefaultCollate:
    collate: Collate

    def __call__(self, group: Group) -> Any:
        return self.collate(group.samples, group.keys)


@dataclass(frozen=True)
class _UserCollate:
    collate_fn: Callable[[list[Any]], Any]

    def __call__(self, group: Group) -> Any:
        return self.collate_fn(group.samples)


@dataclass(frozen=True)
class _AsyncUserCollate:
    collate_fn: Callable[[list[Any]], Any]

    async def __call__(self, group: Group) -> Any:
        return await self.collate_fn(group.samples)


def _steps(
    stages: Sequence[Map | Filter | Cache],
    seeds: Sequence[int | None],
    limit: int | None,
    processes: Callable[[], Processes],
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
                ManyStep(call, stage.many, width if limit is None else min(width, limit), elastic=limit is None)
            )
        elif isinstance(stage, Cache):
            cross()
            keep = _keep(stage, limit, keyed=keyed)
            for step in steps:
                step.drops_to = step.drops_to or keep.refused
            keeps.append((keep, stage.pipeline))
            steps.append(keep)
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
    return [LookUp(keeps, placed=not keyed), *steps] if keeps else steps


def _width_beside(load: Map, following: Sequence[Map | Filter | Cache]) -> int:
    """As many loads side by side as of what follows in threads, or the usual number."""
    stage = following[0] if following else None
    beside = isinstance(stage, Map) and not (stage.is_async or stage.flexible) and stage.executor is None
    return stage.width if beside and stage is not None else load.width


def _keep(stage: Cache, limit: int | None, *, keyed: bool) -> KeepInMemory | KeepOnDisk:
    if isinstance(stage.store, DiskStore):
        width = stage.width if limit is None else min(stage.width, limit)
        return KeepOnDisk(stage.store, width, stage.label, placed=not keyed)
    return KeepInMemory(stage.store, stage.label)


def _sync_step(
    together: Sequence[Map | Filter], seeds: Sequence[int | None], limit: int | None, processes: Callable[[], Processes]
) -> Step:
    calls = [
        Call(stage.fn, isinstance(stage, Filter), stage.label, seed)
        for stage, seed in zip(together, seeds, strict=True)
    ]
    leading = next((stage for stage in together if not stage.flexible), together[0])
    width = leading.width if limit is None else min(leading.width, limit)
    executor = leading.executor
    if isinstance(executor, InProcesses):
        team = partial(_team, processes(), executor, together, calls, width)
        return ProcessStep(
            calls,
            width,
            team,
            elastic=limit is None,
            in_turn=executor.in_turn,
            owned=not executor.kept,
            turns=executor.turns,
        )
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


def _team(
    host: Processes, place: InProcesses, together: Sequence[Map | Filter], calls: Sequence[Call], width: int
) -> Team:
    """The workers of neighbouring stages: those of the epoch before where they are kept."""

    def make() -> Team:
        return Team(host, width, program, resumes=place.turns is None)

    def program() -> Work:
        prepare = None if place.prepare is None else place.prepare()
        return Work(tuple(calls), 2 * CHUNK_SECONDS, prepare)

    program.stages = together  # type: ignore[attr-defined]  # while the workers live, no others have these ids

    if not place.kept:
        return make()
    team: Team = host.kept(place.key or tuple(map(id, together)), make)
    return team


@dataclass(frozen=True)
class _InProcess:
    """In the other process: the nodes of `plan`.

    Args:
        plan: What runs there.
        numbered: Stages before it whose samples have random numbers.
    """

    plan: Plan
    numbered: int

    @property
    def places(self) -> list[tuple[int | None, int | None]]:
        """Ranks and world sizes in it."""
        return [(stage.rank, stage.world_size) for stage in self.plan.stages if isinstance(stage, Shard)]

    def __call__(self, this_pass: Pass, resumed: bool) -> Window:
        builder = _Builder(this_pass, None, self._memory.alloc, Processes, dry=False, resumed=resumed)
        builder._numbered = self.numbered
        return _output(self.plan, this_pass, builder, Processes)

    @cached_property
    def _memory(self) -> BatchMemory:
        return BatchMemory()


def _remote(host: Processes, key: Hashable, plan: Plan, inner: _InProcess) -> Remote:
    """The process of its own, that of the epoch before if there was one."""

    def make() -> Remote:
        return Remote(host, program)

    def program() -> Serving:
        return Serving(inner)

    program.plan = plan  # type: ignore[attr-defined]  # while the process lives, no others have these ids
    remote: Remote = host.kept(("own process", key), make)
    return remote


def _same_place(together: Sequence[Map | Filter], stage: Map | Filter) -> bool:
    fixed = next((s for s in together if not s.flexible), None)
    if together[0].executor is not stage.executor:
        return False
    return fixed is None or stage.flexible or (fixed.width, fixed.thread_name) == (stage.width, stage.thread_name)


def _open_sampler(sampler: Stream, epoch: int, how: dict[str, Any]) -> Any:
    """The keys of an epoch; called in the source's thread.

    A sampler with `set_epoch`, such as torch's DistributedSampler, is told the epoch: else each has the same order.
    """
    set_epoch = getattr(sampler.make, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    if sampler.call or not isinstance(sampler.make, Iterable):
        return sampler.make() if sampler.call else sampler.make
    return keys_of(sampler.make, partial(iter, sampler.make), **how)


def _again(plan: Plan) -> Again:
    """How a resumed `shard` behind `plan` gets the first samples of the epoch."""
    if isinstance(plan.source, Combined):
        hows = {_again(inner) for inner in plan.source.plans}
        return "none" if "none" in hows else "all" if "all" in hows else "head"
    data = plan.source.data
    if isinstance(data, Stream) and isinstance(data.make, CursorSource) and not data.make.replayable:
        return "none"
    # A sampler may draw another order when it is iterated once more.
    once = plan.source.sampler is not None or (isinstance(data, Stream) and data.single_use)
    return "all" if once else "head"


def is_permutable(plan: Plan) -> bool:
    """Whether `shuffle` without a buffer may follow: each entry so far is one sample of an indexable source."""
    return plan.source.indexable and all(
        isinstance(stage, Map | Cache) or is_order_stage(stage) for stage in plan.stages
    )


def in_front_of_cache(plan: Plan) -> str:
    """What is in front of a cache behind `plan`, in words: a cache on disk belongs to one such pipeline.

    Raises:
        ValueError: The next epoch would give other samples, or in another order, and nothing else tells them apart.
    """
    if isinstance(plan.source, Single) and isinstance(plan.source.data, Indexable) and _is_keyed(plan):
        data = plan.source.data
        if isinstance(data.data, Files):
            first = f"samples by name of Files(read={data.data.read!r}, with_path={data.data.with_path})"
        elif data.load is None and isinstance(data.data, list | tuple):
            first = "samples by name"
        else:
            first = f"samples by index of {source_name(data.data)}({data.length})"
        return " > ".join([first, *(stage.label for stage in plan.stages if isinstance(stage, Map | Filter))])
    return " > ".join(["samples by position", *_in_order(plan)])


def _is_keyed(plan: Plan) -> bool:
    """Whether entries are samples of the source by its keys: nothing but order stages, then maps and filters."""
    one_for_one = True
    for stage in plan.stages:
        if isinstance(stage, Filter):
            one_for_one = False
        elif not isinstance(stage, Map | Cache) and not (
            one_for_one and is_order_stage(stage) and plan.source.indexable
        ):
            return False
    return True


def _in_order(plan: Plan) -> list[str]:
    """`plan` in words, if its epochs are all the same."""
    if isinstance(plan.source, Combined):
        if plan.source.how not in ("zip", "interleave"):
            raise ValueError(
                f"cache() behind {plan.source.how}() cannot tell samples apart: they come in another order in each "
                f"epoch; put cache() into each of the pipelines that are combined"
            )
        words = [f"{plan.source.how}({', '.join(' > '.join(_in_order(part)) for part in plan.source.plans)})"]
    else:
        if plan.source.sampler is not None:
            raise ValueError(
                "cache() cannot tell samples apart here: the sampler may give another order in each epoch, and what is "
                "between it and cache() is more than map and filter; put cache() before that"
            )
        words = [describe_content(plan.source.data)]
    for stage in plan.stages:
        if isinstance(stage, Shuffle) or (isinstance(stage, Map) and not stage.ordered):
            raise ValueError(
                f"cache() behind {stage.label} cannot tell samples apart: they come in another order in each epoch; "
                f"put cache() before it"
            )
        if isinstance(stage, Shard):
            rank, world_size = stage.place()
            words.append(f"shard({rank}, {world_size})")
        elif not isinstance(stage, Cache):
            words.append(stage.label)
    return words
