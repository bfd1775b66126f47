"""A plan's nodes while they are made, stage after stage. Pure: starts nothing, calls no user code."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import isasyncgenfunction, isgeneratorfunction
from typing import Any, Final

from aioloader.core.address import Address
from aioloader.core.cores import usable_cores
from aioloader.core.limit import Limit
from aioloader.core.memory import Alloc
from aioloader.core.mix_control import MixControl, Mixes
from aioloader.core.written import Written
from aioloader.device import Transfer
from aioloader.engine.admission import Admission
from aioloader.engine.call_gate import CallGate
from aioloader.engine.combine import InterleaveNode, MergeNode, ZipNode
from aioloader.engine.fuse import FusedOps, exactly
from aioloader.engine.key_source import KeySource
from aioloader.engine.mix_node import MixNode
from aioloader.engine.node import Node
from aioloader.engine.ops import Op
from aioloader.engine.process_stream import OwnProcessNode
from aioloader.engine.skipping import SkipRule
from aioloader.engine.stream_source import StreamSource
from aioloader.engine.window import Window
from aioloader.executors.epochs import epochs_of, with_set_epoch
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.plan.admission import size_of_entries
from aioloader.plan.in_ray import PartProgram, parts_here, parts_in_actors
from aioloader.plan.mixing import epoch_lengths
from aioloader.plan.own_process import InProcessProgram, worker_of
from aioloader.plan.plan import (
    DEFAULT_PREFETCH,
    Combined,
    Plan,
    Single,
    flows_of,
    functions_of,
    walk,
    with_ranks,
    without_reports,
)
from aioloader.sources.resolve import Indexable, StreamData, source_name
from aioloader.sources.sampler_order import Draws, check_place, replayable_keys
from aioloader.stages.base import FoldStage, Pass, Stage, order_of
from aioloader.stages.flow import Flow
from aioloader.stages.in_ray import InRay
from aioloader.stages.key_order import KeyOrder
from aioloader.stages.map import ASYNC_CONCURRENCY

__all__ = ["PlanBuilder", "output_of", "part_window"]

SAMPLES_BETWEEN: Final = 64
"""Samples, not batches, on their way from a process of its own."""

NO_DRAWS: Final = Draws()
_AGAIN: Final = Draws(resumed=True)


@dataclass
class PlanBuilder:
    """See `Builder`; it has built `plan` when it is there.

    Attributes:
        live: Time decides which samples a batch holds, so that none is read early; in `plan`, or in one that it is a
            part of.
        path: The inputs on the way to `plan`, see `Address`.
        warns: Say so when a source is read again only to drop samples.
        functions: How many of the user's functions there were so far.
        beginnings: See `Node`.
        admission: Who decides when samples may begin.
        begun: They have, in what is built so far.
        mixes: The weights of sources that are mixed by names.
        gate: What is asked before each call of a function; None: nobody is.
    """

    plan: Plan
    this_pass: Pass
    transfer: Transfer | None = None
    alloc: Alloc | None = None
    processes: Callable[[], WorkerThread] = WorkerThread
    live: bool = False
    draws: Draws = NO_DRAWS
    path: Address = ()
    warns: bool = True
    functions: int = 0
    beginnings: list[Callable[[], None]] = field(default_factory=list)
    admission: Admission | None = None
    begun: bool = False
    mixes: Mixes = field(default_factory=lambda: Mixes({}))
    gate: CallGate | None = None
    flow: Flow = field(default_factory=Flow)
    following: Sequence[Stage] = ()
    rule: SkipRule | None = None
    key_stages: list[FoldStage] = field(default_factory=list)
    node: Node = field(init=False)
    fused: FusedOps = field(default_factory=FusedOps)

    def __post_init__(self) -> None:
        stages = self.plan.stages
        flows = flows_of(self.plan)  # before each stage
        self.live = self.live or bool(flows[-1].timed)
        self.alloc = next((memory for stage in stages if (memory := stage.memory()) is not None), self.alloc)
        first = max((at for at, stage in enumerate(stages) if stage.encloses), default=None)
        if first is None:
            self._source(self.plan.source)
            self.fused.unordered_input = bool(flows[0].steps.input_order)
        for at in range(first or 0, len(stages)):
            self._at = at
            self.flow, self.following = flows[at], stages[at + 1 :]
            fused = self.fused
            stages[at].build(self)
            if self.fused is not fused:
                self.fused.unordered_input = bool(flows[at + 1].steps.input_order)

    @property
    def _before(self) -> Plan:
        """The plan up to the stage that is built."""
        return replace(self.plan, stages=self.plan.stages[: self._at])

    # -- what stages use ---------------------------------------------------------------------------------------------

    @property
    def prefetch(self) -> int:
        return DEFAULT_PREFETCH if self.plan.prefetch is None else self.plan.prefetch

    @property
    def described(self) -> str:
        return ".".join(stage.label for part in walk(self._before) for stage in part.stages) or "the source"

    def fuse(self, op: Op) -> None:
        self.functions += 1
        op.address = (*self.path, self.functions)
        op.seed = self.this_pass.seed_of_samples(op.address)
        self.fused.add(op if self.gate is None else self.gate.wrap(op))

    def close(self, *, room: int | None = None, again: bool = False) -> Node:
        fused, self.fused = self.fused, FusedOps()
        if fused.ops or room is not None:
            self.node = fused.window(
                self.node,
                self.processes,
                self.order_name,
                room=room,
                admission=self.admission,
                begins=not self.begun,
                again=again,
            )
            self.begun = self.begun or bool(fused.ops)
        return self.node

    def admitting(self, window: Window) -> Window:
        window.admission = self.admission
        return window

    def again(self, *, closed: bool, warns: bool = True) -> Callable[[], Node]:
        before, path = without_reports(self._before), self.path

        def make() -> Node:
            builder = self._other(before, path=path, draws=_AGAIN, warns=warns)
            return builder.close() if closed else builder.node

        return make

    def repetitions(self) -> Callable[[int], Node]:
        before = self._before

        def make(number: int) -> Node:
            this_pass = self.this_pass.repeated(number)
            builder = self._other(before, this_pass=this_pass, path=self.path, draws=self.draws, warns=self.warns)
            node = builder.close()
            if not number:  # those of the others are the same
                self.functions, self.begun = builder.functions, builder.begun
            node.beginnings = builder.beginnings
            return node

        return make

    def run_in_process(self) -> None:
        before = self._before
        here = PlanBuilder(before, self.this_pass, live=self.live, path=self.path, warns=False)
        self.functions = here.functions
        batches = here.fused.batches
        plan = with_ranks(before)
        node = here.close()
        self.begun = here.begun
        size = size_of_entries(before) if self.begun and self.admission is not None else None
        program = InProcessProgram(plan, self.path, self.live, part_window, size)
        ranks = repr([flow.ranks for part in walk(plan) for flow in flows_of(part)])
        remote = partial(worker_of, self.processes, ("process", self.path, self.live, ranks, size), program)
        request = (self.this_pass, epochs_of(with_set_epoch(functions_of(before))))
        room = DEFAULT_PREFETCH if batches else SAMPLES_BETWEEN
        self.node = OwnProcessNode(
            remote,
            request,
            node,
            room=room,
            batches=batches,
            admission=None if size is None else self.admission,
            size=size or 1,
        )
        self.fused = FusedOps(batches)

    def run_in_ray(self, stage: InRay) -> None:
        before = self._before
        here = PlanBuilder(before, self.this_pass, live=self.live, path=self.path, warns=False)
        self.functions, self.begun = here.functions, here.begun
        batches = here.fused.batches
        program = PartProgram(with_ranks(before), stage.parts, self.path, self.live, part_window)
        if stage.actors:
            this_pass, alloc, processes = self.this_pass, self.alloc, self.processes
            self.node = parts_in_actors(program, stage, this_pass, alloc, processes, batches=batches)
        else:
            self.node = parts_here(program, self.this_pass, self.alloc)
        self.fused = FusedOps(batches)

    # -- the source --------------------------------------------------------------------------------------------------

    @property
    def order_name(self) -> str:
        """Of the file that tells in which order the results of this pass left."""
        return "-".join(["epoch", str(self.this_pass.epoch), *map(str, self.this_pass.repetitions)]) + ".order"

    def _other(
        self, plan: Plan, *, path: Address, draws: Draws, warns: bool, this_pass: Pass | None = None
    ) -> "PlanBuilder":
        """The nodes of a plan inside this one, or of its beginning."""
        return PlanBuilder(
            plan,
            self.this_pass if this_pass is None else this_pass,
            None,
            self.alloc,
            self.processes,
            self.live,
            draws,
            path,
            warns,
            admission=self.admission,
            mixes=self.mixes.again() if draws is _AGAIN else self.mixes,
            gate=self.gate,
        )

    def _source(self, source: Single | Combined) -> None:
        if isinstance(source, Combined):
            parts = [
                self._other(plan, path=(*self.path, number), draws=self.draws, warns=self.warns)
                for number, plan in enumerate(source.plans)
            ]
            self.beginnings = [begin for part in parts for begin in part.beginnings]
            self.node = self._combine(source, [part.close() for part in parts])
            self.begun = any(part.begun for part in parts)
        elif isinstance(source.data, StreamData):
            self._stream(source, source.data)
        else:
            self._indexable(source, source.data)

    def _combine(self, source: Combined, nodes: list[Node]) -> Node:
        match source.how:
            case "interleave":
                return InterleaveNode(nodes)
            case "merge":
                return MergeNode(nodes)
            case "zip":
                return ZipNode(nodes)
            case "mix":
                weights: tuple[float, ...] | MixControl = source.weights
                if source.mixture is not None:
                    weights = self.mixes.control(".".join(map(str, self.path)), source.mixture)
                this_pass = self.this_pass
                seed = this_pass.seed(source.seed, "mix")
                return MixNode(nodes, weights, seed, this_pass.repetitions, partial(epoch_lengths, source))

    def _stream(self, source: Single, data: StreamData) -> None:
        # After a cache it is no surprise: what is not kept is read again in every epoch.
        cached = any(stage.caches for stage in self.plan.stages)
        again, epoch = self.draws is _AGAIN, self.this_pass.epoch
        now = data.of_epoch(epoch, self.draws)
        node = StreamSource(
            now.make,
            call=now.call,
            name=source.name or f"source({source_name(data.make)})",
            keys=source.keys,
            ahead=source.ahead,
            warns=self.warns and not (source.keys or cached),
            use=data.use_again if again else partial(data.begin, epoch, self.draws),
            unknown=now.call and not source.keys and not _is_generator(now.make),
            check=source.check,
            tells_epoch=source.tells_epoch,
            live=self.live,
            seed_of=self.this_pass.seed,
        )
        self.beginnings.append(node.begin)
        node.meter.address = self.path
        self.node, self.fused = node, FusedOps(first=True)

    def _indexable(self, source: Single, data: Indexable) -> None:
        self.fused = FusedOps(keyed=True, first=True)
        values = data.data if data.load is None else None
        if data.load is not None:
            ahead, ahead_bytes = data.bounds
            width = source.concurrency or (ASYNC_CONCURRENCY if data.is_async else usable_cores())
            self.fuse(
                Op(
                    data.load,
                    f"{type(data.data).__name__}[...]",
                    data.is_async,
                    width if ahead is None or isinstance(width, Limit) else min(width, ahead),
                    flexible=source.concurrency is None and ahead is None and ahead_bytes is None,
                    many=data.data.__getitems__ if data.loads_many else None,
                    dataset=data.data,
                    ahead=ahead,
                    ahead_bytes=ahead_bytes,
                    written=Written(f"Pipeline({type(data.data).__name__}"),
                )
            )
        node: KeySource | StreamSource
        if source.sampler is None:
            name = source.name or f"source({source_name(data.data)})"
            node = KeySource(partial(self._order, data.length), values, name, data.names, data.begin)
        else:
            node = self._sampler(source.sampler)
            if values is not None:
                label = f"{type(values).__name__}[...]"
                self.fused.add(Op(values.__getitem__, label, flexible=True))
        node.meter.address = self.path
        self.node = node

    def _sampler(self, sampler: StreamData) -> StreamSource:
        repetitions = self.this_pass.repetitions
        in_cursor = bool(repetitions)
        how = {"name": ".".join(map(str, self.path)), "repetitions": repetitions, "in_cursor": in_cursor}
        make = partial(_open_sampler, sampler, self.this_pass.epoch, self.draws, how)
        use = sampler.use_again if self.draws is _AGAIN else sampler.use
        check = None if sampler.call else partial(check_place, sampler.make, in_cursor=in_cursor)
        node = StreamSource(make, call=True, name="sampler", keys=True, use=use, check=check)
        self.beginnings.append(node.begin)
        return node

    def _order(self, length: int, permute: bool) -> KeyOrder:
        return order_of(length, self.key_stages, self.this_pass, permute=permute)


def part_window(
    plan: Plan,
    this_pass: Pass,
    *,
    alloc: Alloc | None,
    draws: Draws,
    path: Address,
    live: bool,
    gate: CallGate | None,
    warns: bool,
    admission: Admission | None = None,
) -> Window:
    """The nodes of a plan with a window at their end, wherever that is."""
    builder = PlanBuilder(
        plan,
        this_pass,
        None,
        alloc,
        live=live,
        draws=draws,
        path=path,
        warns=warns,
        admission=admission,
        gate=gate,
    )
    return output_of(builder)


def output_of(builder: PlanBuilder) -> Window:
    """The window that ends the nodes of a plan."""
    plan, node, fused = builder.plan, builder.node, builder.fused
    if not fused.ops:
        # What is made ahead may be held by the window before it, or by this one already.
        if isinstance(node, Window) and (not node.holds or (fused.batches and node.rule is not None)):
            return node
        room = 1 if node.holds_ahead else builder.prefetch
        return builder.admitting(Window(node, (), room=exactly(room)))
    window = partial(
        fused.window,
        node,
        builder.processes,
        builder.order_name,
        admission=builder.admission,
        begins=not builder.begun,
    )
    if plan.room is not None or fused.batches:
        return window(room=builder.prefetch if plan.room is None else plan.room, grows=plan.grows, nbytes=plan.nbytes)
    return window(finished=plan.prefetch, last=True)


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
