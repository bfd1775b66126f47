"""The plan of a source whose samples are fetched by key."""

from aioloader.core.written import Written
from aioloader.plan.plan import Plan, Single
from aioloader.sources.fetch import FetchSource
from aioloader.sources.resolve import Indexable, StreamData
from aioloader.stages.map import Map

__all__ = ["fetching"]


def fetching(source: FetchSource, data: Indexable | StreamData, sampler: StreamData | None) -> Plan:
    """The keys of `source`, and what makes samples of them.

    Args:
        source: What fetches.
        data: Its keys.
        sampler: What says which of them there are, in which order; None: all of them.
    """
    kind = type(source).__name__
    planned = isinstance(data, Indexable) and data.begin is not None and sampler is None
    stages = [
        Map(
            source.fetch,
            True,
            source.concurrency,
            name=f"{kind}.fetch",
            ahead=source.ahead,
            ahead_bytes=source.ahead_bytes,
            policies=None if planned else source.policies,  # then they are for the requests that are planned
            written=Written(f"{kind}(..."),
        )
    ]
    if source.finishes:
        stages.append(Map(source.finish, False, name=f"{kind}.finish"))
    return Plan(Single(data, sampler, name=kind), tuple(stages))
