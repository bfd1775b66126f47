"""Which ranks may go on from a state: what of a plan depends on how many ranks there are, and on which one this is.

`shard` deals one order, that all ranks see alike, in rounds of one sample each. Where no later stage drops, adds or
reorders samples on its own, all ranks have the same cursor after the same number of batches, and it is a position of
that order: any number of ranks can go on there ("elastic"). Pure: nothing is started, and nothing communicates.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from aioloader.core.safe_text import safe_repr
from aioloader.errors import StateError
from aioloader.plan.plan import Combined, Plan, flow_of, flows_of, walk, with_ranks
from aioloader.sources.resolve import StreamData
from aioloader.sources.sampler_order import chain_of
from aioloader.stages.flow import Flow, Ranks, Shared

__all__ = ["batch_of_all_ranks", "check_one_order", "check_shard_state", "is_sharded", "is_shared", "shard_state"]


def is_sharded(plan: Plan) -> bool:
    """Whether the samples, or those of one of several sources, are dealt to ranks."""
    return flow_of(plan).ranks is not None


def is_shared(plan: Plan) -> bool:
    """Whether several ranks are to get the same samples, of it or of one of several sources."""
    return any(stage.for_several_ranks for part in walk(plan) for stage in part.stages)


def shard_state(plan: Plan) -> dict[str, Any] | None:
    """What a state says of the ranks it comes from; None: the plan has no `shard`.

    Returns:
        `world_size`; `global_batch`, samples per batch over all ranks or None; `elastic`, whether ranks of any number
        with the same global batch can go on from it; `rank`, None where all ranks have the same state.
    """
    flow = flow_of(with_ranks(plan))
    ranks = flow.ranks
    if ranks is None:
        return None
    return {
        "world_size": ranks.world_size,
        "global_batch": flow.global_batch,
        "elastic": flow.elastic,
        "rank": ranks.rank if ranks.shared is Shared.SAME_RANK else None,
    }


def check_shard_state(plan: Plan, state: Mapping[str, Any] | None, *, begun: bool = True) -> None:
    """Refuse what `shard_state` of another run said, where this plan on this rank cannot go on exactly.

    Args:
        plan: This one.
        state: What the other one said.
        begun: Its state is in the middle of an epoch. Between two, files are about to be dealt anew, to any ranks.

    Raises:
        StateError: It cannot; says which numbers differ and what would do.
    """
    flow = flow_of(with_ranks(plan))
    ranks = flow.ranks
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
    if ranks.by_file and not begun:
        return
    now = f"rank {ranks.rank} of {ranks.world_size}"
    if world_size != ranks.world_size:
        its = f"the state is of world_size={world_size}, and this is {now}"
        _check_other_world(flow, ranks, elastic and flow.elastic, global_batch, its, f"start {world_size} ranks")
    if rank is not None and rank != ranks.rank:
        raise StateError(
            f"the state is that of rank {rank} of {world_size}, and this is {now}: after {ranks.because} each rank "
            f"is elsewhere; load the state that this rank has saved{_cure(ranks)}"
        )
    if global_batch != flow.global_batch:
        its = f"{global_batch} ({_per_rank(global_batch, world_size)})"
        ours = f"{flow.global_batch} ({_per_rank(flow.global_batch, ranks.world_size)})"
        raise StateError(
            f"the state has a global batch of {its}, and this pipeline one of {ours}: its batches would be others than "
            f"those that were to come; {_way_out(global_batch, ranks.world_size)}"
        )


def _check_other_world(
    flow: Flow, ranks: Ranks, elastic: bool, global_batch: int | None, its: str, way_out: str
) -> None:
    """Refuse a state of another number of ranks, unless steps are what both it and this plan count."""
    one_a_step = elastic and flow.global_batch is None
    if global_batch is None and not (one_a_step or ranks.because or ranks.by_file):
        raise StateError(
            f"{its}: without batch() a step is one sample for each rank, and these ranks would make others; {way_out}, "
            f"or add batch() from the beginning"
        )
    if not elastic:
        after = f"after {ranks.because} " if ranks.because else ""
        raise StateError(
            f"{its}: {after}a position of one rank is none of another number of ranks; {way_out}{_cure(ranks)}"
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
        f"got {safe_repr(state)}; was the state written by state_dict()?"
    )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _cure(ranks: Ranks) -> str:
    """What else may be done about a plan whose states are not for every rank."""
    if ranks.by_file:
        return ", load a state from between two epochs, or deal samples (by='sample') from the beginning"
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
    label = flow_of(plan).before_shard().rank_order
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
    order_source = source.data if source.sampler is None else source.sampler
    parts = chain_of(order_source.make) if isinstance(order_source, StreamData) else ()
    return any(hasattr(part, "num_replicas") and hasattr(part, "rank") for part in parts)


def batch_of_all_ranks(plan: Plan) -> dict[int, int]:
    """The number of the `batch` stage that may have another size on other ranks, and its size over all ranks.

    Empty: there is none. Batches of batches are counted in steps, and so are the same whatever the ranks.
    """
    flows = flows_of(with_ranks(plan))
    ranks = flows[-1].ranks
    if ranks is None or not flows[-1].elastic:
        return {}
    for number, (before, after) in enumerate(pairwise(flows)):
        if before.ranks is not None and after.batch_size is not None and after.batch_size != before.batch_size:
            return {number: after.batch_size // (before.batch_size or 1) * ranks.world_size}
    return {}
