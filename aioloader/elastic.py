"""Which ranks may go on from a state: what of a plan depends on how many ranks there are, and on which one this is.

`shard` deals one order, that all ranks see alike, in rounds of one sample each. Where nothing behind it drops, adds or
reorders samples on its own, all ranks have the same cursor after the same number of batches, and it is a position of
that order: any number of ranks can go on there ("elastic"). Pure: nothing is started, and nothing communicates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from aioloader.errors import StateError
from aioloader.notes import shown
from aioloader.plan import Combined, Plan, Repeat, placed
from aioloader.sources.drawn import chain_of
from aioloader.sources.resolve import Stream
from aioloader.stages.base import Stage
from aioloader.stages.batch import Batch, Unbatch
from aioloader.stages.cache import Cache
from aioloader.stages.device import PinMemory, To
from aioloader.stages.drop_if import DropIf
from aioloader.stages.map import Filter, Map
from aioloader.stages.select import Enumerate, Skip, Take
from aioloader.stages.shard import Shard
from aioloader.stages.shuffle import Shuffle

__all__ = ["batch_of_all_ranks", "check_one_order", "check_shard_state", "is_sharded", "shard_state"]


class _Shared(IntEnum):
    """Who may go on from a rank's state; each includes what follows."""

    ANY_WORLD = 0
    SAME_WORLD = 1  # every rank has the same state, but it counts what only so many ranks have
    SAME_RANK = 2  # each rank has its own


@dataclass(frozen=True)
class _Ranks:
    """What a plan with `shard` is, as it stands now.

    Attributes:
        rank: Of this process.
        world_size: How many there are.
        batch_size: Samples of one batch on this rank; None: they are not batched.
        shared: Who may go on from its state.
        because: The stage that makes it no more than that.
    """

    rank: int
    world_size: int
    batch_size: int | None = None
    shared: _Shared = _Shared.ANY_WORLD
    because: str = ""

    def limited(self, shared: _Shared, because: str) -> "_Ranks":
        """The same behind a stage that allows no more than `shared`."""
        return self if shared <= self.shared else replace(self, shared=shared, because=because)

    @property
    def elastic(self) -> bool:
        """Whether any number of ranks can go on, with the same global batch: steps are what is counted."""
        return self.shared is _Shared.ANY_WORLD and self.batch_size is not None

    @property
    def global_batch(self) -> int | None:
        """Samples of one batch on all ranks together."""
        return None if self.batch_size is None else self.batch_size * self.world_size


def is_sharded(plan: Plan) -> bool:
    """Whether the samples, or those of one of several sources, are dealt to ranks."""
    if isinstance(plan.source, Combined) and any(map(is_sharded, plan.source.plans)):
        return True
    return any(isinstance(stage, Shard) for stage in plan.stages)


def shard_state(plan: Plan) -> dict[str, Any] | None:
    """What a state says of the ranks it comes from; None: the plan has no `shard`.

    Returns:
        `world_size`; `global_batch`, samples per batch over all ranks or None; `elastic`, whether ranks of any number
        with the same global batch can go on from it; `rank`, None where all ranks have the same state.
    """
    ranks = _ranks(placed(plan))
    if ranks is None:
        return None
    return {
        "world_size": ranks.world_size,
        "global_batch": ranks.global_batch,
        "elastic": ranks.elastic,
        "rank": ranks.rank if ranks.shared is _Shared.SAME_RANK else None,
    }


def check_shard_state(plan: Plan, state: Mapping[str, Any] | None) -> None:
    """Refuse what `shard_state` of another run said, where this plan on this rank cannot go on exactly.

    Raises:
        StateError: It cannot; says which numbers differ and what would do.
    """
    ranks = _ranks(placed(plan))
    if ranks is None and state is None:
        return
    if ranks is None or state is None:
        raise StateError(
            "the state was saved with shard(), and this pipeline has none; add shard(), which is one rank by default"
            if ranks is None
            else "the state was saved without shard(), and this pipeline has one; "
            "leave shard() out, or start from the beginning"
        )
    world_size, global_batch, elastic, rank = _read(state)
    now = f"rank {ranks.rank} of {ranks.world_size}"
    if world_size != ranks.world_size and global_batch is None:
        raise StateError(
            f"the state is of world_size={world_size}, and this is {now}: without batch() a step is one sample for "
            f"each rank, and these ranks would make others; start {world_size} ranks, or add batch() from the beginning"
        )
    if world_size != ranks.world_size and not (elastic and ranks.elastic):
        behind = f"behind {ranks.because} " if ranks.because else ""
        raise StateError(
            f"the state is of world_size={world_size}, and this is {now}: {behind}a position of one rank is none "
            f"of another number of ranks; start {world_size} ranks{_cure(ranks)}"
        )
    if rank is not None and rank != ranks.rank:
        raise StateError(
            f"the state is that of rank {rank} of {world_size}, and this is {now}: behind {ranks.because} each rank "
            f"stands elsewhere; load the state that this rank has saved{_cure(ranks)}"
        )
    if global_batch != ranks.global_batch:
        its = f"{global_batch} ({_per_rank(global_batch, world_size)})"
        ours = f"{ranks.global_batch} ({_per_rank(ranks.global_batch, ranks.world_size)})"
        raise StateError(
            f"the state has a global batch of {its}, and this pipeline one of {ours}: its batches would be others than "
            f"those that were to come; {_way_out(global_batch, ranks.world_size)}"
        )


def _read(state: Mapping[str, Any]) -> tuple[int, int | None, bool, int | None]:
    """The parts of what `shard_state` gave, which may come from anywhere."""
    good = isinstance(state, Mapping)
    if good:
        world_size, elastic = state.get("world_size"), state.get("elastic")
        global_batch, rank = state.get("global_batch"), state.get("rank")
        good = (
            _is_count(world_size, 1)
            and isinstance(elastic, bool)
            and (global_batch is None or _is_count(global_batch, 1))
            and (rank is None or (_is_count(rank, 0) and rank < world_size))
        )
        if good:
            return world_size, global_batch, elastic, rank  # type: ignore[return-value]  # as just checked
    raise StateError(
        f"the part of a state about ranks must hold world_size, global_batch, elastic and a rank below world_size, "
        f"got {shown(state)}; was the state written by state_dict()?"
    )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _cure(ranks: _Ranks) -> str:
    """What else may be done about a plan whose states are not for every rank."""
    return f", or put {ranks.because} before shard()" if ranks.because else ""


def _per_rank(global_batch: int | None, world_size: int) -> str:
    if global_batch is None:
        return "no batch()"
    return f"world_size {world_size} times batch_size {global_batch // world_size}"


def _way_out(global_batch: int | None, world_size: int) -> str:
    if global_batch is None:
        return "leave batch() out"
    if global_batch % world_size:
        return f"start a number of ranks that divides {global_batch}, which {world_size} does not"
    return f"pass batch_size={global_batch // world_size}"


# -- what a plan is ----------------------------------------------------------------------------------------------------


def _ranks(plan: Plan) -> _Ranks | None:
    """What `plan`, which has been `placed`, is; None: it has no `shard`."""
    ranks: _Ranks | None = _combined(plan.source) if isinstance(plan.source, Combined) else None
    batch_size = None if ranks is None else ranks.batch_size
    steady = _same_steps(plan)
    for stage in plan.stages:
        if isinstance(stage, Batch):
            batch_size = (batch_size or 1) * stage.batch_size
        elif isinstance(stage, Unbatch):
            batch_size = None
        if isinstance(stage, Shard):
            assert stage.rank is not None  # `placed`
            assert stage.world_size is not None
            if ranks is None:
                ranks = _Ranks(stage.rank, stage.world_size)
            else:
                world_size = ranks.world_size * stage.world_size
                ranks = replace(ranks, rank=ranks.rank + ranks.world_size * stage.rank, world_size=world_size)
                ranks = ranks.limited(_Shared.SAME_WORLD, f"a second {stage.label}")
        elif ranks is not None:
            batched = ranks.batch_size is not None
            ranks = ranks.limited(_shared_behind(stage, batched=batched, steady=batched and steady), stage.label)
        if ranks is not None:
            ranks = replace(ranks, batch_size=batch_size)
    if ranks is not None and (label := _unordered(plan)):
        ranks = ranks.limited(_Shared.SAME_RANK, label)
    return ranks


def _shared_behind(stage: Stage, *, batched: bool, steady: bool) -> _Shared:
    """Who may go on from a state behind `stage`, which stands behind `shard`.

    Behind `batch` all ranks are counted in steps, and a step is the same whatever their number.

    Args:
        stage: The stage.
        batched: It stands behind `batch`.
        steady: There are as many steps, whatever the number of ranks.
    """
    match stage:
        case Map() | Batch(max_wait=None) | Cache() | To() | PinMemory():
            return _Shared.ANY_WORLD
        case Repeat(times):
            return _Shared.ANY_WORLD if steady or times is None else _Shared.SAME_WORLD
        case Shuffle():  # what leaves its buffer last depends on where the end is
            return _Shared.ANY_WORLD if steady else _Shared.SAME_WORLD
        case Take() | Skip() | Enumerate():
            return _Shared.ANY_WORLD if batched else _Shared.SAME_WORLD
        case Unbatch(collated) if collated:
            return _Shared.SAME_WORLD
    return _Shared.SAME_RANK  # what it gives depends on the samples


def _same_steps(plan: Plan) -> bool:
    """Whether ranks of any number make as many steps of an order, the last ones included."""
    if isinstance(plan.source, Combined) and not all(map(_same_steps, plan.source.plans)):
        return False
    for stage in plan.stages:
        match stage:
            case Shard(even="drop") | Batch(drop_last=True):
                return False
    return True


def _combined(source: Combined) -> _Ranks | None:
    """Several sources, some of which have been dealt to ranks."""
    known = [_ranks(plan) for plan in source.plans]
    there = [ranks for ranks in known if ranks is not None]
    if not there:
        return None
    ranks = max(there, key=lambda ranks: ranks.shared)
    label = f"Pipeline.{source.how}(...)"
    if any((other.rank, other.world_size) != (ranks.rank, ranks.world_size) for other in there):
        return ranks.limited(_Shared.SAME_RANK, label)
    if source.how == "zip" and len(there) == len(known) and len({other.batch_size for other in there}) == 1:
        return ranks
    if source.how == "merge" and len(known) > 1:
        return ranks.limited(_Shared.SAME_RANK, label)
    return ranks.limited(_Shared.SAME_WORLD, label)


# -- one order for all ranks -------------------------------------------------------------------------------------------


def check_one_order(plan: Plan) -> None:
    """Refuse a plan whose order is made while it runs, so that each rank would see, and deal, another one.

    Raises:
        ValueError: Some samples would come on several ranks, and others on none.
    """
    if _draws_by_rank(plan):
        raise ValueError(
            "shard() deals an order that all ranks see alike, but a DistributedSampler gives each rank its own part "
            "already; leave out one of the two"
        )
    label = _realised(plan)
    if label:
        raise ValueError(
            f"shard() deals an order that all ranks see alike, but {label} gives samples as they come, on each rank in "
            f"another order: some would come twice and others never; put shard() before it"
        )


def _draws_by_rank(plan: Plan) -> bool:
    """Whether samples of `plan` come from a sampler that gives each rank its part."""
    source = plan.source
    if isinstance(source, Combined):
        return any(map(_draws_by_rank, source.plans))
    drawn = source.data if source.sampler is None else source.sampler
    parts = chain_of(drawn.make) if isinstance(drawn, Stream) else ()
    return any(hasattr(part, "num_replicas") and hasattr(part, "rank") for part in parts)


def _realised(plan: Plan, *, closed: bool = False) -> str:
    """The stage behind which the order of samples is made while it runs, if there is one.

    Args:
        plan: What comes before `shard`.
        closed: Something is between the last stage and `shard`.
    """
    label = ""
    if isinstance(plan.source, Combined):
        if plan.source.how == "merge" and len(plan.source.plans) > 1:
            label = "Pipeline.merge(...)"
        label = label or next((found for inner in plan.source.plans if (found := _realised(inner, closed=True))), "")
    journey: list[Stage] = []  # neighbouring stages: of maps alone it commutes with `shard`, which then runs first
    for stage in plan.stages:
        if isinstance(stage, DropIf) or (isinstance(stage, Batch) and stage.max_wait is not None):
            label = label or stage.label
        if isinstance(stage, Map | Filter):
            journey.append(stage)
        elif not isinstance(stage, Shard | PinMemory) or not all(isinstance(other, Map) for other in journey):
            label = label or _unordered(journey)
            journey = []
    if closed or not all(isinstance(other, Map) for other in journey):
        label = label or _unordered(journey)
    return label


def _unordered(part: "Plan | list[Stage]") -> str:
    """A stage that gives its samples as they are finished, if there is one."""
    stages = part if isinstance(part, list) else part.stages
    label = next((f"{stage.label[:-1]}, ordered=False)" for stage in stages if _gives_as_finished(stage)), "")
    if label or isinstance(part, list) or not isinstance(part.source, Combined):
        return label
    if part.source.how == "merge" and len(part.source.plans) > 1:
        return "Pipeline.merge(...)"
    return next((found for inner in part.source.plans if (found := _unordered(inner))), "")


def _gives_as_finished(stage: Stage) -> bool:
    return isinstance(stage, Map) and not stage.ordered and stage.replay_order is None


def batch_of_all_ranks(plan: Plan) -> dict[int, int]:
    """The number of the `batch` stage that may have another size on other ranks, and its size over all ranks.

    Empty: there is none. Batches of batches are counted in steps, and so are the same whatever the ranks.
    """
    ranks = _ranks(placed(plan))
    if ranks is None or not ranks.elastic:
        return {}
    sharded = False
    for number, stage in enumerate(plan.stages):
        sharded = sharded or isinstance(stage, Shard)
        if sharded and isinstance(stage, Batch):
            return {number: stage.batch_size * ranks.world_size}
    return {}
