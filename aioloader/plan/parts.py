"""The user's objects in a plan, and plans with others in their places."""

from dataclasses import replace
from operator import is_
from typing import Any

from torch import Generator

from aioloader.core.limit import Limit
from aioloader.core.rate import Rate
from aioloader.plan.plan import Combined, Plan, Single, walk
from aioloader.sources.fetch import PlannedKeys
from aioloader.sources.resolve import Indexable, StreamData
from aioloader.sources.sampled import Sampled
from aioloader.sources.sampler_order import draws_globally, generators_of

__all__ = [
    "datasets_of",
    "generators_in",
    "global_draws",
    "is_indexable",
    "keeping_last",
    "limits_of",
    "rates_of",
    "sampled_of",
    "samplers_of",
    "streams_of",
    "with_streams",
]


def _sources_of(plan: Plan) -> list[Single]:
    return [part.source for part in walk(plan) if isinstance(part.source, Single)]


def streams_of(plan: Plan) -> list[StreamData]:
    """All streams of a plan, samplers included."""
    parts = [part for source in _sources_of(plan) for part in (source.data, source.sampler)]
    return [part for part in parts if isinstance(part, StreamData)]


def sampled_of(plan: Plan) -> Sampled | None:
    """What a `DataLoader` reads; None: it is the plan of a pipeline."""
    data = plan.source.data if isinstance(plan.source, Single) else None
    return data if isinstance(data, Sampled) else None


def datasets_of(plan: Plan) -> list[Any]:
    """All datasets with an index."""
    return [source.data.data for source in _sources_of(plan) if isinstance(source.data, Indexable)]


def limits_of(plan: Plan) -> list[tuple[str, Limit]]:
    """The limits that stages of a plan may share with others, with the names of these stages."""
    sources = [("its source", source.concurrency) for source in _sources_of(plan)]
    stages = [(stage.label, stage.limit) for part in walk(plan) for stage in part.stages]
    return [(label, limit) for label, limit in (*sources, *stages) if isinstance(limit, Limit)]


def rates_of(plan: Plan) -> list[tuple[str, Rate]]:
    """The rates that sources and stages of a plan may share with others, with the names of these."""
    planned = [data for data in datasets_of(plan) if isinstance(data, PlannedKeys)]
    reading = [*(stream.make for stream in streams_of(plan)), *planned]
    sources = [("its source", getattr(source, "rate", None)) for source in reading]
    stages = [(stage.label, stage.rate) for part in walk(plan) for stage in part.stages]
    return [(label, rate) for label, rate in (*sources, *stages) if isinstance(rate, Rate)]


def samplers_of(plan: Plan) -> list[Any]:
    """All samplers of a plan."""
    return [source.sampler.make for source in _sources_of(plan) if source.sampler is not None]


def _drawing_samplers_of(plan: Plan) -> list[Any]:
    """Those whose order can be drawn again: not the functions, which may give anything."""
    return [sampler for sampler in samplers_of(plan) if hasattr(sampler, "__iter__")]


def generators_in(plan: Plan) -> list[Generator]:
    """The generators that orders are drawn from, apart from torch's global one."""
    if (data := sampled_of(plan)) is not None:
        return data.sampling.generators
    return generators_of(*(stream.make for stream in streams_of(plan)))


def global_draws(plan: Plan) -> int:
    """How many orders may be drawn from torch's global generator."""
    if (data := sampled_of(plan)) is not None:
        return int(data.draws_globally)
    return sum(map(draws_globally, _drawing_samplers_of(plan)))


def is_indexable(plan: Plan) -> bool:
    """Whether its length is known for sure, and not promised by somebody's `__len__`."""
    return all(source.indexable for source in _sources_of(plan))


def keeping_last(plan: Plan) -> Plan:
    """`plan` without any `drop_last`."""
    source = plan.source
    if isinstance(source, Combined):
        plans = tuple(keeping_last(inner) for inner in source.plans)
        source = source if all(map(is_, plans, source.plans)) else replace(source, plans=plans)
    stages = tuple(stage.keeping_last() for stage in plan.stages)
    if source is plan.source and all(map(is_, stages, plan.stages)):
        return plan
    return replace(plan, source=source, stages=stages)


def with_streams(plan: Plan, others: dict[int, Any]) -> Plan:
    """`plan` with other objects to iterate, by the ids of those that they are for."""

    def other(data: Any) -> Any:
        known = isinstance(data, StreamData) and id(data.make) in others
        return replace(data, make=others[id(data.make)]) if known else data

    source = plan.source
    if isinstance(source, Combined):
        source = replace(source, plans=tuple(with_streams(inner, others) for inner in source.plans))
    else:
        source = replace(source, data=other(source.data), sampler=other(source.sampler))
    return replace(plan, source=source)
