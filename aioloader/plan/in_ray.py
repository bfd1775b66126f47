"""What runs in actors for `in_ray`, part by part, and the nodes that stand for it here. Pure, as `build` is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

from aioloader.core.address import Address
from aioloader.core.memory import Alloc
from aioloader.core.source import CursorSource
from aioloader.engine.call_gate import CallGate
from aioloader.engine.node import Node
from aioloader.engine.parts_node import PartsNode
from aioloader.engine.ray_node import RayPartNode, RayParts
from aioloader.engine.ray_server import RayServing
from aioloader.engine.resumable import is_stateful
from aioloader.engine.window import Window
from aioloader.executors.epochs import Copies, Epochs, epochs_of, with_set_epoch
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.executors.ray.readers import Readers, ReadersTerms
from aioloader.executors.ray.thread import ray_thread_of
from aioloader.executors.ray.workers import RayWorkers
from aioloader.memory.pool import BatchMemory
from aioloader.plan.elsewhere import sends_what_it_collates
from aioloader.plan.parts import datasets_of, streams_of, with_streams
from aioloader.plan.plan import Plan, flows_of, functions_of, part_of, walk
from aioloader.sources.sampler_order import Draws, detached_copies
from aioloader.stages.base import Pass
from aioloader.stages.in_ray import InRay

__all__ = ["PartProgram", "parts_here", "parts_in_actors"]

SAMPLES_AHEAD: Final = 64
"""Samples, not batches, of a part on their way from its actor."""


@dataclass(frozen=True)
class PartProgram:
    """The stages before `in_ray`: gives the nodes of any part of them.

    Args:
        plan: What is dealt, with ranks as they are.
        parts: Into how many parts.
        path: See `PlanBuilder`.
        live: See `PlanBuilder`.
        build: Gives the window that ends the nodes of a plan.
        epochs: Those that the user's objects in it are in.
    """

    plan: Plan
    parts: int
    path: Address
    live: bool
    build: Callable[..., Window]
    epochs: Epochs = ()

    def __call__(self, request: tuple[int, Pass, Epochs], resumed: bool, gate: CallGate | None, alloc: Alloc) -> Window:
        """In an actor: the nodes of a part."""
        number, this_pass, epochs = request
        self._copies.tell(epochs)
        alloc = alloc if self._lends else self._memory.alloc
        return self.part(number, this_pass, alloc, Draws(resumed=resumed), gate)

    def part(
        self,
        number: int,
        this_pass: Pass,
        alloc: Alloc | None = None,
        draws: Draws | None = None,
        gate: CallGate | None = None,
        *,
        warns: bool = True,
    ) -> Window:
        """The nodes of a part."""
        return self.build(
            part_of(self.plan, number, self.parts),
            this_pass,
            alloc=alloc,
            draws=Draws() if draws is None else draws,
            path=self.path,
            live=self.live,
            gate=gate,
            warns=warns,
        )

    @cached_property
    def _copies(self) -> Copies:
        return Copies(functions_of(self.plan), self.epochs)

    @cached_property
    def _lends(self) -> bool:
        return sends_what_it_collates(self.plan)

    @cached_property
    def _memory(self) -> BatchMemory:
        return BatchMemory()

    @property
    def of_now(self) -> "PartProgram":
        """The same, as it is to be pickled now."""
        return replace(self, epochs=epochs_of(with_set_epoch(functions_of(self.plan))))

    @property
    def is_shared(self) -> bool:
        """Whether parts may read from one copy of the source: not where it may keep its place in itself."""
        streams = [stream for stream in streams_of(self.plan) if not stream.call]
        return all(isinstance(stream.make, CursorSource) for stream in streams)


def parts_here(program: PartProgram, this_pass: Pass, alloc: Alloc | None) -> Node:
    """The parts in this process, without Ray. What keeps its place in itself is copied for each of them."""
    nodes = []
    for number in range(program.parts):
        its = [stream.make for stream in streams_of(program.plan) if not stream.call and is_stateful(stream.make)]
        copies = detached_copies(its, shared=datasets_of(program.plan))
        plan = with_streams(program.plan, dict(zip(map(id, its), copies, strict=True)))
        nodes.append(replace(program, plan=plan).part(number, this_pass, alloc))
    return PartsNode(nodes)


def parts_in_actors(
    program: PartProgram,
    stage: InRay,
    this_pass: Pass,
    alloc: Alloc | None,
    processes: Callable[[], WorkerThread],
    *,
    batches: bool,
) -> Node:
    """The parts in actors of a Ray cluster.

    Args:
        program: What each actor runs.
        stage: How many there are, and so on.
        this_pass: Which epoch.
        alloc: Where batches are put that come from there.
        processes: Gives the worker processes of the loader, with which its actors end.
        batches: Whether the entries are batches.
    """
    plan = program.plan
    ranks = [flow.ranks for part in walk(plan) for flow in flows_of(part)]
    workers = RayWorkers() if stage.workers is None else stage.workers
    actors = min(stage.actors, stage.parts)  # a state may be of fewer parts
    place = ("in_ray", program.path, program.live, stage.pool)
    terms = ReadersTerms(actors, workers, stage.pool, _first_seat(ranks), program.is_shared, place)
    key = (place, program.parts, repr(ranks))
    readers = partial(_readers, processes, key, terms, partial(_serving, program))
    room = stage.ahead if batches else SAMPLES_AHEAD
    parts = RayParts(readers, program.parts, room, batches, stage.label, alloc)
    epochs = epochs_of(with_set_epoch(functions_of(plan)))
    nodes = [
        RayPartNode(parts, number, (number, this_pass, epochs), program.part(number, this_pass, warns=False))
        for number in range(program.parts)
    ]
    return PartsNode(nodes)


def _first_seat(ranks: Sequence[Any]) -> int:
    """Where this rank's parts begin, so that those of all ranks are spread over the actors of a pool."""
    return next((its.rank for its in reversed(ranks) if its is not None), 0)


def _serving(program: PartProgram) -> RayServing:
    return RayServing(program.of_now)


def _readers(
    processes: Callable[[], WorkerThread], key: object, terms: ReadersTerms, make_program: Callable[[], RayServing]
) -> Readers:
    """Those of the epoch before, if there were any. Those of other parts or ranks end: their actors hold CPUs."""
    thread = ray_thread_of(processes())
    readers: Readers = thread.get_or_create(key, partial(Readers, thread, terms, make_program))
    for other in thread.kept(Readers):
        if other is not readers and other.terms.place == terms.place:
            other.retire()
    return readers
