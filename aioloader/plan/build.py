"""From a plan to the nodes that run it. Pure: nothing is started, no user code runs."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import isasyncgenfunction, isgeneratorfunction
from typing import Any, TypeAlias

from aioloader.core.cores import usable_cores
from aioloader.core.memory import Alloc
from aioloader.core.source import CursorSource
from aioloader.device import Transfer
from aioloader.engine.cache_stream_node import PlacedNode
from aioloader.engine.combine import HeadNode, InterleaveNode, MergeNode, MixNode, RepeatNode, ZipNode
from aioloader.engine.node import FoldNode, Node, TimedFoldNode
from aioloader.engine.process_stream import OwnProcessNode, Serving
from aioloader.engine.source import FlatMapNode, KeySource, StreamSource
from aioloader.engine.steps import Step
from aioloader.engine.window import Window
from aioloader.executors.epochs import Copies, Epochs, epochs_of, with_set_epoch
from aioloader.executors.processes.stream_worker import StreamWorker
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.memory.pool import BatchMemory
from aioloader.plan.fuse import FusedStages, collate_stage, device_stage, exactly, steps_of
from aioloader.plan.plan import (
    DEFAULT_PREFETCH,
    Combined,
    Plan,
    Repeat,
    Single,
    flow_of,
    flows_of,
    functions_of,
    with_ranks,
)
from aioloader.sources.order import KeyOrder, is_order_stage, order_of
from aioloader.sources.resolve import Indexable, StreamData, source_name
from aioloader.sources.sampler_order import Draws, check_place, replayable_keys
from aioloader.stages.base import FoldStage, Pass, Stage
from aioloader.stages.batch import Batch, BatchFold
from aioloader.stages.cache import COPY, Cache, with_copies
from aioloader.stages.collate import Collate
from aioloader.stages.device import PinMemory, To
from aioloader.stages.drop_if import DropIf, FreshGroup
from aioloader.stages.in_process import OwnProcess
from aioloader.stages.load import FetchBatch, FetchGroup
from aioloader.stages.map import Filter, FlatMap, Map
from aioloader.stages.shard import Again, Shard, ShardFold
from aioloader.stages.split_join import JoinBatches

__all__ = ["build"]

SAMPLES_BETWEEN = 64  # samples, not batches, on their way from a process of its own

Numbered: TypeAlias = Counter[int]
"""How many stages, whose samples have random numbers, there were so far within so many enclosing repeats.

So each has a number of its own, and the same one wherever a part of the pipeline is built, and however often.
"""


def build(
    plan: Plan,
    this_pass: Pass,
    transfer: Transfer | None = None,
    alloc: Alloc | None = None,
    processes: Callable[[], WorkerThread] = WorkerThread,
    *,
    dry: bool = False,
    draws: Draws = Draws(),  # noqa: B008 - it is frozen
) -> Window:
    """The nodes of one epoch; the last is always a window, which holds what is made ahead.

    Args:
        plan: What to run.
        this_pass: Which epoch, for seeds.
        transfer: The loader's way to its device, when `plan` ends in `to` or `pin_memory` and there is such a device.
        alloc: Where the default collate puts batches; None: into fresh memory.
        processes: Gives the loader's worker processes; called when a stage runs there.
        dry: The nodes will never be started, only `resume` will tell whether a cursor fits.
        draws: What samplers draw their order from.
    """
    plan = with_ranks(plan)
    live = bool(flow_of(plan).timed)
    builder = _Builder(this_pass, transfer, alloc, processes, live=live, dry=dry, draws=draws)
    return _output(plan, this_pass, builder, processes)


def _output(plan: Plan, this_pass: Pass, builder: "_Builder", processes: Callable[[], WorkerThread]) -> Window:
    """The nodes of `plan` and the window that ends them."""
    prefetch = DEFAULT_PREFETCH if plan.prefetch is None else plan.prefetch
    node, journey = builder.stream(plan)
    if not journey.stages:
        if isinstance(node, Window) and plan.stages and isinstance(plan.stages[-1], DropIf):
            return node  # it has no room: what is made ahead is held by the window before it
        return Window(node, (), room=exactly(prefetch))
    if plan.room is not None or journey.batches:
        return journey.window(node, processes, this_pass, room=prefetch if plan.room is None else plan.room)
    return journey.window(node, processes, this_pass, finished=plan.prefetch, last=True)


class _Builder:
    def __init__(
        self,
        this_pass: Pass,
        transfer: Transfer | None,
        alloc: Alloc | None,
        processes: Callable[[], WorkerThread],
        *,
        live: bool,  # time decides which samples a batch holds, so that none is read early
        dry: bool,
        draws: Draws = Draws(),  # noqa: B008 - it is frozen
    ) -> None:
        self._pass = this_pass
        self._dry = dry
        self._draws = draws
        self._samplers = 0
        self._place = ""  # within enclosing repeats, for names of samplers
        self._transfer = transfer
        self._alloc = alloc
        self._processes = processes
        self._live = live
        self._numbered: Numbered = Counter()
        self._warns = True  # of samples that are read only to be dropped

    def _seed(self) -> int | None:
        """For the random numbers of samples in the next stage."""
        this_pass = self._pass
        depth = len(this_pass.repetitions)
        self._numbered[depth] += 1
        if this_pass.sample_seed is None:
            return None
        return this_pass.seed(this_pass.sample_seed, f"sample {depth} {self._numbered[depth]}")

    def stream(self, plan: Plan) -> tuple[Node, FusedStages]:
        """The nodes of `plan`, and the stages at its end that still want a window."""
        original, plan = plan, replace(plan, stages=with_copies(plan.stages))
        flows = flows_of(plan)  # before each stage
        numbered = self._numbered.copy()  # whatever builds a part of `plan` once more begins there
        splits = [i for i, stage in enumerate(plan.stages) if isinstance(stage, Repeat | OwnProcess)]
        if splits:
            at = splits[-1]
            split = plan.stages[at]
            inner = Plan(plan.source, plan.stages[:at])
            rest: Sequence[Stage] = plan.stages[at + 1 :]
            node: Node
            if isinstance(split, OwnProcess):
                inner = Plan(plan.source, original.stages[: original.stages.index(split)])
                node, journey = self._own_process(inner)
            else:
                assert isinstance(split, Repeat)
                place = f"{self._place}{self._samplers}."
                self._samplers += 1
                node = RepeatNode(lambda repetition: self._repetition(inner, repetition, place, numbered), split.times)
                journey = FusedStages()
            journey.unordered_input = bool(flows[at + 1].steps.input_order)
        else:
            node, journey, rest = self._source(plan.source, plan.stages)
            journey.unordered_input = bool(flows[0].steps.input_order)
        for number, stage in enumerate(rest, len(plan.stages) - len(rest)):
            before = journey
            if isinstance(stage, DropIf):
                node, journey = self._check_late(node, journey, stage, plan)
            elif isinstance(stage, Shard):
                so_far = replace(plan, stages=plan.stages[:number])
                node, journey = self._shard(node, journey, stage, so_far, numbered)
            elif isinstance(stage, Cache) and not journey.keyed:
                so_far = replace(plan, stages=plan.stages[:number])
                node, journey = self._cached_stream(node, journey, stage, so_far, numbered)
            else:
                unordered_input = bool(flows[number].completion_order)
                node, journey = self._add(node, journey, stage, unordered_input=unordered_input)
            if journey is not before:
                journey.unordered_input = bool(flows[number + 1].steps.input_order)
        return node, journey

    def _shard(
        self, node: Node, journey: FusedStages, stage: Shard, before: Plan, numbered: Numbered
    ) -> tuple[Node, FusedStages]:
        """`stage` behind the plan `before`, of which `node` and `journey` are made; `numbered` are stages before those.

        A map gives one sample for one, so that maps in front run on this rank's samples alone; so does a cache that
        knows samples by their keys.
        """
        one_for_one = Map | Cache if journey.keyed else Map
        commutes = all(isinstance(other, one_for_one) for other in journey.stages)
        if not commutes:
            node, journey = self._close(node, journey), FusedStages()
        assert stage.rank is not None  # `with_ranks`
        assert stage.world_size is not None
        again_from = _again(before)
        fold = ShardFold(stage.rank, stage.world_size, stage.even, again_from)
        if fold.head and again_from == "head":

            def again() -> Node:
                builder = _Builder(
                    self._pass, None, self._alloc, self._processes, live=self._live, dry=self._dry, draws=_AGAIN
                )
                builder._numbered = numbered.copy()
                return builder.stream(before)[0] if commutes else builder.closed(before)

            node = HeadNode(node, again, fold.head)
        return FoldNode(node, fold), journey

    def _cached_stream(
        self, node: Node, journey: FusedStages, stage: Cache, before: Plan, numbered: Numbered
    ) -> tuple[Node, FusedStages]:
        """A cache after the plan `before`, whose samples are known by their places; see `_shard`."""
        cached = FusedStages(journey.batches)
        cached.add(stage)
        node = self._close(node, journey)
        if self._dry:
            return node, cached

        def again() -> Node:
            builder = _Builder(self._pass, None, self._alloc, self._processes, live=self._live, dry=False, draws=_AGAIN)
            builder._numbered = numbered.copy()
            builder._warns = False
            return builder.closed(before)

        return PlacedNode(node, stage.store, stage.pipeline, again), cached

    def _check_late(self, node: Node, journey: FusedStages, stage: DropIf, plan: Plan) -> tuple[Node, FusedStages]:
        """A window that begins what it is asked for, over one that holds what is made ahead."""
        prefetch = DEFAULT_PREFETCH if plan.prefetch is None else plan.prefetch
        if journey.batches:
            node = journey.window(node, self._processes, self._pass, room=prefetch)
        elif journey.stages:
            node = self._close(node, journey)
        elif stage is plan.stages[-1]:
            node = Window(node, (), room=exactly(prefetch))
        steps = steps_of([stage.check()], [None], None, self._processes, keyed=False)
        window = Window(node, steps, room=None)
        return window, FusedStages(checks=[*journey.checks, (stage, steps[0])])

    def _repetition(self, plan: Plan, repetition: int, place: str, numbered: Numbered) -> Node:
        """Round `repetition` of `plan`; `numbered` are stages before it."""
        this_pass = self._pass.repeated(repetition)
        builder = _Builder(
            this_pass, None, self._alloc, self._processes, live=self._live, dry=self._dry, draws=self._draws
        )
        builder._place = place
        builder._numbered = numbered.copy()
        builder._warns = self._warns
        node = builder.closed(plan)
        self._numbered |= builder._numbered  # the most of each: every round has the same numbers
        return node

    def _own_process(self, plan: Plan) -> tuple[Node, FusedStages]:
        """The node for a plan that runs in a process of its own."""
        # What would run here: it numbers the stages, and says whether a cursor fits.
        builder = _Builder(self._pass, None, None, WorkerThread, live=self._live, dry=True)
        builder._numbered = self._numbered.copy()
        node, journey = builder.stream(plan)
        inner = _InProcess(with_ranks(plan), self._numbered, self._live)
        self._numbered = builder._numbered
        batches = journey.batches
        if self._dry:
            return self._close(node, journey), FusedStages(batches=batches)
        key = (id(plan.source), *map(id, plan.stages), repr(inner.places), self._live, *sorted(inner.numbered.items()))
        remote = partial(_remote, self._processes(), key, plan, inner)
        room = DEFAULT_PREFETCH if batches else SAMPLES_BETWEEN
        request = (self._pass, epochs_of(with_set_epoch(functions_of(plan))))
        return OwnProcessNode(remote, request, room=room, batches=batches), FusedStages(batches=batches)

    def closed(self, plan: Plan) -> Node:
        """The nodes of a plan inside another one."""
        return self._close(*self.stream(plan))

    def _close(self, node: Node, journey: FusedStages) -> Node:
        return journey.window(node, self._processes, self._pass) if journey.stages else node

    def _source(self, source: Single | Combined, stages: Sequence[Stage]) -> tuple[Node, FusedStages, Sequence[Stage]]:
        if isinstance(source, Combined):
            inner = [self.closed(plan) for plan in source.plans]
            return self._combine(source, inner), FusedStages(), stages
        data = source.data
        if isinstance(data, StreamData):
            if not self._dry:
                data.use()
            name = source.name or f"source({source_name(data.make)})"
            # Behind a cache it is no surprise: what is not kept is read again in every epoch.
            cached = any(isinstance(stage, Cache) for stage in stages)
            warns = self._warns and not (self._dry or source.keys or cached)
            source_node = StreamSource(
                data.make,
                call=data.call,
                name=name,
                keys=source.keys,
                ahead=source.ahead,
                warns=warns,
                unknown=data.call and not source.keys and not _is_generator(data.make),
                check=source.check,
                tells_epoch=source.tells_epoch,
                live=self._live,
            )
            return source_node, FusedStages(first=True), stages
        if source.sampler is None and data.loads_many and (at := _batch_of_keys(stages)) is not None:
            return self._batches_of(data, stages, at)
        journey = FusedStages(keyed=True, first=True)
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
            repetitions = self._pass.repetitions
            in_cursor = bool(repetitions)
            how = {"name": f"{self._place}{self._samplers}", "repetitions": repetitions, "in_cursor": in_cursor}
            self._samplers += 1
            open_sampler = partial(_open_sampler, source.sampler, self._pass.epoch, self._draws, how)
            check = None if source.sampler.call else partial(check_place, source.sampler.make, in_cursor=in_cursor)
            node: Node = StreamSource(open_sampler, call=True, name="sampler", keys=True, check=check)
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

    def _batches_of(
        self, data: Indexable, stages: Sequence[Stage], at: int
    ) -> tuple[Node, FusedStages, Sequence[Stage]]:
        """Whole batches of a dataset that loads many samples at once; `stages[at]` is the batch.

        Keys are batched, and loading a batch is one step with collating it. Cursors are as they would be otherwise.
        """
        batch = stages[at]
        assert isinstance(batch, Batch)
        name = f"source({source_name(data.data)})"
        node: Node = KeySource(self._order(data, stages[:at]), None, name, data.names)
        node = FoldNode(node, BatchFold(batch.batch_size, drop_last=batch.drop_last, of_keys=True))
        collate = batch.collate
        journey = FusedStages(batches=True)
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

    def _add(
        self, node: Node, journey: FusedStages, stage: Stage, *, unordered_input: bool
    ) -> tuple[Node, FusedStages]:
        if isinstance(stage, Map | Filter):
            journey.add(stage, None if stage is COPY else self._seed())
            return node, journey
        if isinstance(stage, To | PinMemory):
            journey.batches = True  # whatever it is made of, it is held as batches are
            journey.checks = []
            if self._transfer is not None:
                journey.add(device_stage(stage, self._transfer))
            return node, journey
        if isinstance(stage, Cache) and journey.keyed:
            journey.add(stage)
            return node, journey
        first = journey.first and not journey.stages
        node = self._close(node, journey)
        if isinstance(stage, FlatMap):
            return FlatMapNode(node, stage.fn, stage.label, unordered_input=unordered_input), FusedStages()
        assert isinstance(stage, FoldStage), stage
        recounts = not stage.exact_in_any_order
        if isinstance(stage, Batch) and stage.max_wait is not None:
            node = TimedFoldNode(node, stage.fold(self._pass), stage.max_wait, stage.label)
        else:
            node = FoldNode(
                node, stage.fold(self._pass), unordered_input=unordered_input and recounts, recounts=recounts
            )
        if isinstance(stage, Batch | JoinBatches):
            batches = FusedStages(batches=True)
            for check, step in journey.checks:
                batches.add(_fresh_stage(check, step))
            batches.add(collate_stage(stage.collate, self._alloc))
            return node, batches
        return node, FusedStages(first=first)


def _fresh_stage(check: DropIf, step: Step) -> Filter:
    """What looks through a batch once more, in the hop of its collate; counts where the first look counts."""
    return Filter(FreshGroup(check.fn, lambda: step.meter), is_async=False, name=check.label)


def _batch_of_keys(stages: Sequence[Stage]) -> int | None:
    """Where in `stages` keys are batched, when nothing is done to single samples before that."""
    for at, stage in enumerate(stages):
        if isinstance(stage, Batch):
            return None if stage.collate.is_async or stage.max_wait is not None else at
        if not is_order_stage(stage):
            return None
    return None


@dataclass(frozen=True)
class _InProcess:
    """In the other process: the nodes of `plan`.

    Args:
        plan: What runs there.
        numbered: Stages before it.
        live: See `_Builder`.
        epochs: Those that the user's objects in it are in.
    """

    plan: Plan
    numbered: Numbered
    live: bool
    epochs: Epochs = ()

    @property
    def places(self) -> list[tuple[int | None, int | None]]:
        """Ranks and world sizes in it."""
        return [(stage.rank, stage.world_size) for stage in self.plan.stages if isinstance(stage, Shard)]

    def __call__(self, request: tuple[Pass, Epochs], resumed: bool) -> Window:
        this_pass, epochs = request
        self._copies.tell(epochs)
        # Nothing is drawn there but by `shuffle`: `Pipeline.in_process` refuses samplers that draw.
        draws = Draws(resumed=resumed)
        builder = _Builder(this_pass, None, self._memory.alloc, WorkerThread, live=self.live, dry=False, draws=draws)
        builder._numbered = self.numbered.copy()
        return _output(self.plan, this_pass, builder, WorkerThread)

    @cached_property
    def _copies(self) -> Copies:
        return Copies(functions_of(self.plan), self.epochs)

    @cached_property
    def _memory(self) -> BatchMemory:
        return BatchMemory()


def _remote(host: WorkerThread, key: Hashable, plan: Plan, inner: _InProcess) -> StreamWorker:
    """The process of its own, that of the epoch before if there was one."""

    def make() -> StreamWorker:
        return StreamWorker(host, program)

    def program() -> Serving:
        return Serving(replace(inner, epochs=epochs_of(with_set_epoch(functions_of(inner.plan)))))

    program.plan = plan  # type: ignore[attr-defined]  # while the process lives, no others have these ids
    remote: StreamWorker = host.get_or_create(("own process", key), make)
    return remote


_AGAIN = Draws(resumed=True)


def _is_generator(make: Any) -> bool:
    """Whether calling it gives a generator, and so nothing with cursors of its own."""
    return isgeneratorfunction(make) or isasyncgenfunction(make)


def _open_sampler(sampler: StreamData, epoch: int, draws: Draws, how: dict[str, Any]) -> Any:
    """The keys of an epoch; called in the source's thread.

    A sampler with `set_epoch`, such as torch's DistributedSampler, is told the epoch: else each has the same order.
    """
    set_epoch = getattr(sampler.make, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    if sampler.call or not isinstance(sampler.make, Iterable):
        return sampler.make() if sampler.call else sampler.make
    return replayable_keys(sampler.make, partial(iter, sampler.make), draws, **how)


def _again(plan: Plan) -> Again:
    """How a resumed `shard` behind `plan` gets the first samples of the epoch."""
    if isinstance(plan.source, Combined):
        hows = {_again(inner) for inner in plan.source.plans}
        return "none" if "none" in hows else "all" if "all" in hows else "head"
    data = plan.source.data
    if isinstance(data, StreamData) and isinstance(data.make, CursorSource) and not data.make.replayable:
        return "none"
    # A sampler may draw another order when it is iterated once more.
    once = plan.source.sampler is not None or (isinstance(data, StreamData) and data.single_use)
    return "all" if once else "head"
