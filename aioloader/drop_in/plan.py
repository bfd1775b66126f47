"""The plan of a `DataLoader`."""

from typing import Final

from aioloader.drop_in.arguments import Arguments
from aioloader.drop_in.stages import last_stages, stages_here, stages_in_workers
from aioloader.engine.turns import Turns
from aioloader.plan.plan import Plan, Single
from aioloader.sources.epoch_sampling import EpochSampling
from aioloader.sources.sampled import Sampled

__all__ = ["plan_of"]

KEYS_AHEAD: Final = 4096
"""Keys that lie ready, where reading them runs no code of the user's: else cheap batches wait for them."""
BATCHES_AHEAD: Final = (8, 32)
"""In so many batches, at least and at most."""


def plan_of(of: Arguments, sampling: EpochSampling, *, pins: bool = False) -> Plan:
    """The plan: of one epoch, where workers are seeded as torch's, since they have a base seed in each.

    Args:
        of: The arguments.
        sampling: Draws the keys.
        pins: There is page-locked memory.
    """
    data = Sampled(
        of.dataset if of.iterable else sampling.sampler,
        sampling=sampling,
        dataset=of.dataset,
        iterable=of.iterable,
        turns=Turns(of.num_workers) if of.workers_read else None,
        ordered=of.ordered,
        in_order=of.in_order,
        skips=of.skip_errors is not None,
    )
    stages = stages_in_workers(of, data) if of.in_processes else stages_here(of)
    return Plan(
        _source(data),
        (*stages, *last_stages(of, pins=pins)),
        room=of.room,
        grows=of.grows,
        nbytes=None if of.awaits_samples else of.ahead_bytes,
        seed=0 if of.shard and sampling.seed is None else sampling.seed,  # ranks that share samples need the same one
    )


def _source(data: Sampled) -> Single:
    if data.iterable:
        return Single(data, name="source")
    return Single(data, name="sampler", keys=True, ahead=_keys_ahead(data.sampling), check=data.sampling.check_place)


def _keys_ahead(sampling: EpochSampling) -> int:
    """How many items of its sampler lie ready: lists of keys, where there are batches."""
    if not sampling.plain:
        return 0
    least, most = BATCHES_AHEAD
    size: int = getattr(sampling.sampler, "batch_size", 1)
    return min(most, max(least, KEYS_AHEAD // size))
