"""The shape of a plan: what decides which sample comes when, as a state says it and must find it again. Pure."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from aioloader.core.cursors import plain
from aioloader.core.safe_text import safe_repr
from aioloader.core.source import CursorSource
from aioloader.errors import StateError
from aioloader.plan.parts import sampled_of
from aioloader.plan.plan import Combined, Plan, Single
from aioloader.plan.ranks import batch_of_all_ranks
from aioloader.sources.fetch import NamedSamples, PlannedKeys
from aioloader.sources.resolve import Indexable, source_name
from aioloader.sources.sampled import Sampled
from aioloader.sources.sampler_order import arguments_of, kind_of

__all__ = ["Shape", "ShapeThen", "difference_of", "shape_of"]

Shape = list[dict[str, Any]]
"""What of a loader decides which sample comes when; names of functions are told and not compared."""


class ShapeThen:
    """The shape that a plan had when an epoch began; as JSON gives it back, which is made when it is asked for.

    Args:
        plan: With datasets that may grow meanwhile.
    """

    def __init__(self, plan: Plan) -> None:
        self._described = _described(plan)

    @cached_property
    def shape(self) -> Shape:
        """See `shape_of`."""
        shape: Shape = plain(self._described)
        return shape


def shape_of(plan: Plan) -> Shape:
    """The source and the stages of `plan` that decide which sample comes when, and maps for people who read it.

    As JSON gives it back.
    """
    return ShapeThen(plan).shape


def _described(plan: Plan) -> Shape:
    if (data := sampled_of(plan)) is not None:
        return _sampled(data)  # its arguments, the same however they are carried out
    of_all = batch_of_all_ranks(plan)
    shape = [_source(plan.source)]
    for number, stage in enumerate(plan.stages):
        part = stage.shape()
        if part is not None and number in of_all:  # its size on this rank may be another one on others
            part = {key: value for key, value in part.items() if key != "batch_size"}
            part["global_batch"] = of_all[number]
        if part is not None:
            shape.append(part)
    return shape


def _sampled(data: Sampled) -> Shape:
    sampling = data.sampling
    try:
        length = len(data.dataset)
    except (TypeError, NotImplementedError):
        length = None
    batch = {"batch_size": sampling.batch_size, "drop_last": sampling.drop_last, "ordered": data.ordered}
    shape = [
        {"stage": "source", "name": type(data.dataset).__name__, "length": length} | _identity_of(data.dataset),
        {"stage": "stream"} if data.iterable else sampling.shape(),
        {"stage": "batch"} | batch,
    ]
    return [*shape, {"stage": "skip_errors"}] if data.skips else shape


def _source(source: Single | Combined) -> dict[str, Any]:
    if isinstance(source, Combined):
        combined: dict[str, Any] = {"stage": source.how, "sources": [_described(plan) for plan in source.plans]}
        if source.how == "mix":
            weights = list(source.weights) if source.mixture is None else repr(source.mixture.schedule)
            combined |= {"weights": weights, "seed": source.seed}
        return combined
    data = source.data
    if isinstance(data, Indexable):
        kind, name = "indexable", source_name(data.data)
    else:
        kind, name = "stream", source_name(data.make)
    if source.sampler is not None:
        kind = "sampler"
    described: dict[str, Any] = {"stage": "source", "kind": kind, "name": name, "length": _length(source)}
    if source.sampler is not None:
        described |= {"sampler": kind_of(source.sampler.make), "arguments": arguments_of(source.sampler.make)}
    if isinstance(data, Indexable):
        return described | data.data.identity() if isinstance(data.data, NamedSamples | PlannedKeys) else described
    return described | _identity_of(data.make)


_OURS: Final = {"arguments", "kind", "length", "name", "sampler", "sources", "stage"}
"""Keys of a source's description that a state has anyway."""


def _identity_of(stream: Any) -> dict[str, Any]:
    """What its cursors depend on, where it can tell; as JSON gives it back, to be compared with that of a state.

    Raises:
        TypeError: `identity()` of a source that somebody has written gives something else.
    """
    if not isinstance(stream, CursorSource):
        return {}
    told: Any = stream.identity()
    rule = f"{source_name(stream)}.identity must return a small dict of strings to what JSON can hold"
    if not isinstance(told, dict) or not all(isinstance(key, str) for key in told):
        raise TypeError(f"{rule}, got {safe_repr(told, 80)} of type {type(told).__name__}")
    if taken := sorted(_OURS & told.keys()):
        raise TypeError(f"{rule}, got {safe_repr(told, 80)}; the loader uses the key {taken[0]!r} itself")
    try:
        known: dict[str, Any] = plain(told)
    except StateError:
        raise TypeError(f"{rule}: numbers, strings, lists and dicts, got {safe_repr(told, 80)}") from None
    return known


def _length(source: Single) -> int | None:
    try:
        return source.length()
    except TypeError:
        return None


def difference_of(now: Shape, then: Any, where: str = "") -> str | None:
    """The first difference between two shapes, in words."""
    if not isinstance(then, Sequence) or not all(isinstance(part, dict) and "stage" in part for part in then):
        return f"the description in the state is broken: {then!r}"[:300]
    here, there = ([part for part in shape if not _is_ordered_map(part)] for shape in (now, then))
    for number, (mine, its) in enumerate(zip(here, there, strict=False)):
        if (difference := _stage_difference(mine, its, number, where)) is not None:
            return difference
    if len(here) != len(there):
        longer, verb = (here, "is") if len(here) > len(there) else (there, "was")
        return (
            f"{where}stage {min(len(here), len(there))} {verb} {_words(longer[min(len(here), len(there))])}, and "
            + ("there was none" if verb == "is" else "there is none now")
        )
    return None


def _stage_difference(mine: dict[str, Any], its: dict[str, Any], number: int, where: str) -> str | None:
    place = f"{where}stage {number}"
    if mine["stage"] != its["stage"]:
        return f"{place} is {_words(mine)}, and was {_words(its)}"
    for key in [key for key in mine if key != "name"]:
        then = its.get(key)
        if key == "sources":
            if (difference := _sources_difference(mine[key], then, place)) is not None:
                return difference
        elif mine[key] != then:
            if key == "arguments":
                return _arguments_difference(mine[key], then, place)
            if key == "length":
                return _length_difference(mine, then, where)
            if mine["stage"] == "source" and mine.get("kind") == its.get("kind"):
                return _source_difference(mine, its, key, where)
            if (words := _words(mine)) == _words(its):
                return f"{place}, {words}, has {key}={mine[key]!r}, and had {key}={then!r}"[:300]
            return f"{place} is {words}, and was {_words(its)}"
    return None


def _sources_difference(now: list[Shape], then: Any, place: str) -> str | None:
    if not isinstance(then, Sequence) or len(now) != len(then):
        return f"{place} has {len(now)} sources, and had {len(then) if isinstance(then, Sequence) else then!r}"[:300]
    for number, (mine, its) in enumerate(zip(now, then, strict=True)):
        difference = difference_of(mine, its, f"source {number} of {place}, ")
        if difference is not None:
            return difference
    return None


def _arguments_difference(now: dict[str, Any], then: Any, place: str) -> str:
    if not isinstance(then, dict):
        return f"the arguments of the sampler of {place} in the state are broken: {then!r}"[:300]
    name = next(name for name in {**now, **then} if now.get(name, "nothing") != then.get(name, "nothing"))
    return f"the sampler of {place} has {name}={now.get(name)!r}, and had {then.get(name)!r}"[:300]


def _length_difference(mine: dict[str, Any], then: Any, where: str) -> str:
    now = mine["length"]
    what = f"{where}the dataset ({mine['name']})"
    if not isinstance(now, int) or not isinstance(then, int):
        return f"{what} has length {now}, and had {then!r}"[:300]
    return (
        f"{what} has {'shrunk' if now < then else 'grown'} from {then} samples to {now}, and the order depends on that"
    )


def _source_difference(mine: dict[str, Any], its: dict[str, Any], key: str, where: str) -> str:
    what = f"{where}the source ({mine['name']})"
    if key == "names":
        return f"{what} has as many files as it had, but of other names, or in another order"
    if key == "samples":
        return f"{what} has as many samples as it had, but others, or in other places: its archives were written anew"
    return f"{what} has {key}={mine[key]!r}, and had {its.get(key)!r}"[:300]


def _is_ordered_map(part: Mapping[str, Any]) -> bool:
    """One sample for one, in place: whatever it is called, and whether it is there, no sample moves."""
    return part["stage"] == "map" and bool(part.get("ordered"))


def _words(part: Mapping[str, Any]) -> str:
    """`batch(batch_size=4, drop_last=False)`."""
    stage, sources = str(part["stage"]), part.get("sources")
    if stage == "source":
        return f"a source of kind {safe_repr(part.get('kind'))}"
    if isinstance(sources, list):
        return f"{stage} of {len(sources)} sources"[:100]
    if "name" in part:
        unordered_input = ", ordered=False" if part.get("ordered") is False else ""
        return f"{stage}({part['name']}{unordered_input})"[:100]
    arguments = ", ".join(f"{key}={value!r}" for key, value in part.items() if key != "stage" and value is not None)
    return (stage if stage.endswith(")") else f"{stage}({arguments})")[:100]
