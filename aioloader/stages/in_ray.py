"""`in_ray`: what is before it runs in actors of a Ray cluster, part by part."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from aioloader.executors.ray.cluster import check_named
from aioloader.stages.base import Builder, Stage
from aioloader.stages.flow import Flow, Shared

if TYPE_CHECKING:
    from aioloader.executors.ray.workers import RayWorkers

__all__ = ["PARTS_PER_ACTOR", "InRay"]

PARTS_PER_ACTOR = 4  # so that a dead actor's work is spread over the others, and twice as many actors have some


@dataclass(frozen=True)
class InRay(Stage):
    """Everything before it runs in actors, an engine for each part; everything after it in the consumer's process.

    The parts are what a state counts, and give their entries one each in turn. Actors only host them: which part is
    where, and how many actors there are, changes no order and no state.

    Args:
        actors: How many; 0: the parts run in this process.
        parts: How many.
        pinned: The user has said how many parts; else a state may say otherwise.
        ahead: Batches of each part that are made and not handed out, between the actor and here.
        workers: What each actor needs; None where there is none.
        pool: The name of a pool whose actors several processes share; None: the actors are the loader's own.
    """

    actors: int
    parts: int
    pinned: bool = True
    ahead: int = 2
    workers: "RayWorkers | None" = field(default=None, compare=False)
    pool: str | None = None

    exact_in_any_order = True
    encloses = True
    here_only = True

    @property
    def label(self) -> str:
        return f"in_ray(actors={self.actors}, parts={self.parts})"

    def with_parts(self, parts: int) -> "InRay":
        """The same with so many parts, as a state says."""
        return replace(self, parts=parts)

    def length(self, upstream: int) -> int:
        return upstream  # of one part; `plan.length_of` adds up all of them

    def shape(self) -> dict[str, Any]:
        return {"stage": "in_ray", "parts": self.parts}

    def flow(self, before: Flow) -> Flow:
        """Where parts are dealt what was dealt to ranks, all ranks have one state, and it counts these ranks' parts."""
        after = replace(before, steady=False, again="head" if before.again == "none" else before.again)
        return after.limited(Shared.SAME_WORLD, "in_ray()").closed()

    def build(self, builder: Builder) -> None:
        if self.actors:  # before an epoch is counted
            builder.beginnings.append(partial(check_named, None if self.workers is None else self.workers.address))
        builder.run_in_ray(self)
