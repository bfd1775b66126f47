"""From descriptions to nodes: which stages run in one window, and with how much room.

Pure: nothing is started, no user code runs. `Source` and the stages are what a pipeline is; `build` says how it runs.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from aioloader.cores import usable_cores
from aioloader.device import Transfer, pin_batch
from aioloader.engine.combine import MergeNode, MixNode, RepeatNode, ZipNode
from aioloader.engine.node import FoldNode, Node
from aioloader.engine.order_log import Recorded, Replayed
from aioloader.engine.process_step import CHUNK_SECONDS, ProcessStep
from aioloader.engine.source import FlatMapNode, KeySource, StreamSource
from aioloader.engine.steps import AsyncStep, ExecutorStep, Step, ThreadStep
from aioloader.engine.window import Window
from aioloader.executors.chunk import Call
from aioloader.executors.processes.host import Processes
from aioloader.executors.processes.team import Team
from aioloader.executors.processes.worker import Work
from aioloader.sources.drawn import keys_of
from aioloader.sources.order import KeyOrder, is_order_stage, order_of
from aioloader.sources.resolve import Indexable, Stream, source_name
from aioloader.stages.base import FoldStage, Pass, Stage, UnknownLengthError
from aioloader.stages.batch import Batch, CollateWith, Group, Unbatch
from aioloader.stages.collate import Alloc, Collate
from aioloader.stages.device import PinMemory, To
from aioloader.stages.fetch import FetchBatch, FetchGroup
from aioloader.stages.keyed import JoinBatches
from aioloader.stages.map import Filter, FlatMap, InProcesses, Map
from aioloader.stages.shard import Shard
from aioloader.stages.shuffle import Shuffle

__all__ = ["Combined", "Plan", "Repeat", "Single", "any_order", "build", "is_permutable", "length_of"]

DEFAULT_PREFETCH = 2


@dataclass(frozen=True)
class Single:
    """One source.

    Attributes:
        data: What it is.
        sampler: Gives the keys of an epoch instead of 0, 1, 2, ...
        name: In statistics; None: that of the user's object.
        keys: `data` gives keys, or the keys of batches.
    """

    data: Indexable | Stream
    sampler: Stream | None = None
    name: str | None = None
    keys: bool = False

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

    how: Literal["merge", "mix", "zip"]
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
    """

    source: Single | Combined
    stages: tuple[Stage, ...] = ()
    prefetch: int | None = None
    room: int | None = None
    seed: int | None = None


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


def build(
    plan: Plan,
    this_pass: Pass,
    transfer: Transfer | None = None,
    alloc: Alloc | None = None,
    processes: Callable[[], Processes] = Processes,
    *,
    dry: bool = False,
    resumed: bool = False,
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
    """
    builder = _Builder(this_pass, transfer, alloc, processes, dry=dry, resumed=resumed)
    prefetch = DEFAULT_PREFETCH if plan.prefetch is None else plan.prefetch
    node, journey = builder.stream(plan)
    if not journey.stages:
        return Window(node, (), room=prefetch)
    if plan.room is not None or journey.batches:
        return journey.window(node, prefetch if plan.room is None else plan.room, processes, this_pass, exact=True)
    return journey.window(node, journey.room(plan.prefetch), processes, this_pass)


@dataclass
class _Journey:
    """Neighbouring stages that one window will run."""

    batches: bool = False  # its entries are batches
    stages: list[Map | Filter] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)  # of each stage, for the random numbers of samples

    def add(self, stage: Map | Filter, seed: int | None = None) -> None:
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
        steps = _steps(self.stages, self.seeds, max(1, room) if exact or self.batches else None, processes)
        return Window(upstream, steps, room=room, ordered=ordered, log=self._order_log(this_pass))

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
    ) -> None:
        self._pass = this_pass
        self._dry = dry
        self._resumed = resumed
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
        repeats = [i for i, stage in enumerate(plan.stages) if isinstance(stage, Repeat)]
        if repeats:
            at = repeats[-1]
            repeat = plan.stages[at]
            assert isinstance(repeat, Repeat)
            inner = Plan(plan.source, plan.stages[:at])
            node: Node = RepeatNode(lambda repetition: self._repetition(inner, repetition), repeat.times)
            journey = _Journey()
            rest: Sequence[Stage] = plan.stages[at + 1 :]
        else:
            node, journey, rest = self._source(plan.source, plan.stages)
        at = len(plan.stages) - len(rest)
        for number, stage in enumerate(rest, at):
            loose = any_order(plan.source, plan.stages[:number])
            node, journey = self._add(node, journey, stage, loose=loose)
        return node, journey

    def _repetition(self, plan: Plan, repetition: int) -> Node:
        resumed, self._resumed = self._resumed, False  # the first that is made; those after it begin
        this_pass = self._pass.repeated(repetition)
        builder = _Builder(this_pass, None, self._alloc, self._processes, dry=self._dry, resumed=resumed)
        return builder.closed(plan)

    def closed(self, plan: Plan) -> Node:
        """The nodes of a plan inside another one."""
        return self._close(*self.stream(plan))

    def _close(self, node: Node, journey: _Journey) -> Node:
        return journey.window(node, journey.room(), self._processes, self._pass) if journey.stages else node

    def _source(self, source: Single | Combined, stages: Sequence[Stage]) -> tuple[Node, _Journey, Sequence[Stage]]:
        if isinstance(source, Combined):
            inner = [self.closed(plan) for plan in source.plans]
            return self._combine(source, inner), _Journey(), stages
        data = source.data
        if isinstance(data, Stream):
            if not self._dry:
                data.use()
            name = source.name or f"source({source_name(data.make)})"
            warns = not (self._dry or source.keys)
            source_node = StreamSource(data.make, call=data.call, name=name, keys=source.keys, warns=warns)
            return source_node, _Journey(), stages
        if source.sampler is None and data.loads_many and (at := _batch_of_keys(stages)) is not None:
            return self._batches_of(data, stages, at)
        journey = _Journey()
        name = f"source({source_name(data.data)})"
        if data.load is not None:
            load = Map(data.load, data.is_async, name=f"{type(data.data).__name__}[...]", flexible=True)
            journey.add(load, self._seed())
        if source.sampler is not None:
            if not self._dry:
                source.sampler.use()
            open_sampler = partial(_open_sampler, source.sampler, self._pass.epoch, self._resumed)
            node: Node = StreamSource(open_sampler, call=True, name="sampler", keys=True)
            if data.load is None:
                values = data.data
                journey.add(Map(values.__getitem__, False, name=f"{type(values).__name__}[...]", flexible=True))
            return node, journey, stages
        # Each map gives one sample for one, so that order stages behind it may as well choose its input.
        order_stages = []
        for at, stage in enumerate(stages):
            if isinstance(stage, Map):
                journey.add(stage, self._seed())
            elif is_order_stage(stage):
                order_stages.append(stage)
            else:
                rest = stages[at:]
                break
        else:
            rest = ()
        values = data.data if data.load is None else None
        key_source = KeySource(self._order(data, order_stages), values, name, data.names)
        return key_source, journey, rest

    def _order(self, data: Indexable, stages: Sequence[Stage]) -> KeyOrder:
        if not self._dry:
            return order_of(data.length, stages, self._pass)
        length = data.length
        for stage in stages:
            length = stage.length(length)
        return KeyOrder(range(length))

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
            case "merge":
                return MergeNode(nodes)
            case "zip":
                return ZipNode(nodes)
            case "mix":
                return MixNode(nodes, source.weights, self._pass.seed(source.seed, "mix"))

    def _add(self, node: Node, journey: _Journey, stage: Stage, *, loose: bool) -> tuple[Node, _Journey]:
        if isinstance(stage, Map | Filter):
            journey.add(stage, self._seed())
            return node, journey
        if isinstance(stage, To | PinMemory):
            journey.batches = True  # whatever it is made of, it is held as batches are
            if self._transfer is not None:
                journey.add(device_stage(stage, self._transfer))
            return node, journey
        node = self._close(node, journey)
        if isinstance(stage, FlatMap):
            return FlatMapNode(node, stage.fn, stage.label, loose=loose), _Journey()
        assert isinstance(stage, FoldStage), stage
        loose = loose and isinstance(stage, Unbatch | Shuffle | Shard)
        node = FoldNode(node, stage.fold(self._pass), loose=loose)
        if isinstance(stage, Batch | JoinBatches):
            journey = _Journey(batches=True)
            journey.add(collate_stage(stage.collate, self._alloc))
            return node, journey
        return node, _Journey()


def _batch_of_keys(stages: Sequence[Stage]) -> int | None:
    """Where in `stages` keys are batched, when nothing is done to single samples before that."""
    for at, stage in enumerate(stages):
        if isinstance(stage, Batch):
            return None if stage.collate.is_async else at
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
    stages: Sequence[Map | Filter], seeds: Sequence[int | None], limit: int | None, processes: Callable[[], Processes]
) -> list[Step]:
    """The steps of a window: neighbouring sync stages that run in the same place with the same width cross together.

    Args:
        stages: Those of the window.
        seeds: Of each, see `Call`.
        limit: What the window holds, when that is exact: more workers would have nothing to do.
        processes: See `build`.
    """
    steps: list[Step] = []
    together: list[Map | Filter] = []
    their_seeds: list[int | None] = []

    def cross() -> None:
        if together:
            steps.append(_sync_step(tuple(together), tuple(their_seeds), limit, processes))
            together.clear()
            their_seeds.clear()

    for stage, seed in zip(stages, seeds, strict=True):
        if stage.is_async:
            cross()
            width = stage.width if limit is None else min(stage.width, limit)
            steps.append(AsyncStep(stage.fn, width, stage.label, predicate=isinstance(stage, Filter), seed=seed))
        else:
            if together and not _same_place(together, stage):
                cross()
            together.append(stage)
            their_seeds.append(seed)
    cross()
    return steps


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
        return Team(host, width, program)

    def program() -> Work:
        prepare = None if place.prepare is None else place.prepare()
        return Work(tuple(calls), 2 * CHUNK_SECONDS, prepare)

    program.stages = together  # type: ignore[attr-defined]  # while the workers live, no others have these ids

    if not place.kept:
        return make()
    team: Team = host.kept(place.key or tuple(map(id, together)), make)
    return team


def _same_place(together: Sequence[Map | Filter], stage: Map | Filter) -> bool:
    fixed = next((s for s in together if not s.flexible), None)
    if together[0].executor is not stage.executor:
        return False
    return fixed is None or stage.flexible or (fixed.width, fixed.thread_name) == (stage.width, stage.thread_name)


def _open_sampler(sampler: Stream, epoch: int, resumed: bool) -> Any:
    """The keys of an epoch; called in the source's thread.

    A sampler with `set_epoch`, such as torch's DistributedSampler, is told the epoch: else each has the same order.
    """
    set_epoch = getattr(sampler.make, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    if sampler.call or not isinstance(sampler.make, Iterable):
        return sampler.make() if sampler.call else sampler.make
    return keys_of(sampler.make, partial(iter, sampler.make), resumed=resumed)


def is_permutable(plan: Plan) -> bool:
    """Whether `shuffle` without a buffer may follow: each entry so far is one sample of an indexable source."""
    return plan.source.indexable and all(isinstance(stage, Map) or is_order_stage(stage) for stage in plan.stages)
