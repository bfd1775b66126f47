"""How a pipeline begins: the plan of a source."""

from typing import Any

from aioloader.core.checks import check_ahead
from aioloader.core.limit import Limit, check_concurrency, width_of
from aioloader.pipeline.described import Described
from aioloader.plan.fetching import fetching
from aioloader.plan.plan import Plan, Single
from aioloader.sources.fetch import FetchSource
from aioloader.sources.resolve import Indexable, StreamData, describe, resolve

__all__ = ["plan_of"]


def plan_of(source: Any, sampler: Any = None, concurrency: int | Limit | None = None) -> Plan:
    """The plan of a pipeline that has nothing but a source yet, see `Pipeline`.

    Raises:
        TypeError: `source` is none, or `sampler` or `concurrency` is for other sources.
        ValueError: `concurrency` is less than 1.
    """
    if concurrency is not None:
        concurrency = check_concurrency(concurrency)
    if isinstance(source, FetchSource):
        plan = fetching(source, *_resolve(source.keys, sampler))
        _check_loads(concurrency, None, source)
    elif not isinstance(source, Described):
        data, keys = _resolve(source, sampler)
        _check_loads(concurrency, data, source)
        plan = Plan(Single(data, keys, tells_epoch=True, concurrency=concurrency))
    elif sampler is None:
        _check_loads(concurrency, None, source)
        plan = source._plan
    else:
        raise TypeError("sampler gives the keys of an indexable source, got a Pipeline; pass sampler to that one")
    return plan


def _resolve(source: Any, sampler: Any) -> tuple[Indexable | StreamData, StreamData | None]:
    data = resolve(source)
    if sampler is None:
        return data, None
    if not isinstance(data, Indexable):
        raise TypeError(f"sampler gives the keys of an indexable source, got {describe(source)}; leave sampler out")
    keys = resolve(sampler)
    if isinstance(keys, Indexable):
        keys = StreamData(sampler, call=False, single_use=False)
    return data, keys


def _check_loads(concurrency: int | Limit | None, data: Indexable | StreamData | None, source: Any) -> None:
    """Refuse a `concurrency` of a source that has nothing to load, or that may not be so far ahead."""
    if concurrency is None:
        return
    if isinstance(data, Indexable) and data.load is not None:
        check_ahead(*data.bounds, width_of(concurrency))
        return
    if isinstance(source, Described | FetchSource):
        way_out = "pass concurrency where that one is made"
    elif isinstance(data, Indexable):
        way_out = "its samples are in memory: pass concurrency to the map after it"
    else:
        way_out = "it is read one sample after the other: pass concurrency to the map after it"
    raise TypeError(
        f"concurrency says how many samples of a map-style source are loaded at once, by its __getitem__; got "
        f"{describe(source)}; {way_out}"
    )
