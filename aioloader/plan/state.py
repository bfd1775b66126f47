"""The state of a loader: a small, versioned dict, made and checked. Pure: nothing is read or started.

Its keys are always the same, and so are the types of its values: checkpoint libraries load a state in place, into the
one of a fresh loader (torch's `distributed.checkpoint` reads the keys that it finds there, and forgets all others, and
empty dicts). So whatever varies is one string of JSON. `docs/checkpoint.md` has the schema.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

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
from aioloader.stages.flow import STRENGTH, Guarantee

__all__ = [
    "FORMAT",
    "VERSION",
    "ShapeThen",
    "check_fits",
    "contents_of",
    "identity_of",
    "make_state",
    "ranges_of",
    "shape_of",
]

FORMAT: Final = "aioloader"
VERSION: Final = 2

MOST_NESTED: Final = 200
"""Lists in lists in a state: each stage of a pipeline is one or two."""

_LONGEST_INTEGER: Final = 1300  # digits; see `_plain`

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
        shape: Shape = _plain(self._described)
        return shape


def make_state(
    *,
    loader: str,
    epoch: int,
    batches: int,
    cursor: Any,
    guarantee: Guarantee,
    pipeline: Shape,
    ranks: dict[str, Any] | None,
    random: dict[str, Any] | None,
    left_out: Mapping[int, Sequence[range]],
) -> dict[str, Any]:
    """The dict; all of it is new, and JSON gives it back as it is.

    Raises:
        StateError: A source's cursor is nothing that JSON can hold.
    """
    varying = {
        "cursor": _plain(cursor),
        "left_out": [
            [number, steps.start, steps.stop]
            for number, ranges in sorted(left_out.items())
            for steps in ranges
            if number >= epoch
        ],
        "ranks": ranks,
        "pipeline": pipeline,
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "loader": loader,
        "guarantee": guarantee,
        "epoch": epoch,
        "batches": batches,
        "cursor": {"json": f'{{"random":{_object(random or {})},{_text(varying)[1:]}'},
    }


_text: Final = json.JSONEncoder(separators=(",", ":")).encode
_text_again: Final = lru_cache(maxsize=16)(_text)
"""Of strings: generators' states are long, and mostly those of the call before."""


def _object(parts: Mapping[str, Any]) -> str:
    """JSON of what draws random numbers."""
    texts = (_text_again(part) if type(part) is str else _text(_plain(part)) for part in parts.values())
    return f"{{{','.join(f'{_text_again(str(key))}:{text}' for key, text in zip(parts, texts, strict=True))}}}"


def ranges_of(left_out: Any) -> dict[int, list[range]]:
    """What `make_state` was told of steps that are left out.

    Raises:
        StateError: It is nothing of the kind.
    """
    found: dict[int, list[range]] = {}
    for part in left_out:
        if not (isinstance(part, list) and len(part) == 3 and all(map(_is_count, part)) and part[1] < part[2]):
            raise StateError(
                f"'left_out' of the state holds lists of epoch, first step and stop, got {safe_repr(part)}"
            )
        found.setdefault(part[0], []).append(range(part[1], part[2]))
    return found


def contents_of(state: Any) -> dict[str, Any]:
    """A copy of what a state holds, in one flat dict.

    Args:
        state: From anywhere.

    Raises:
        StateError: It is none, or one of another version, or something in it is missing or of another type.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"a state is a dict from state_dict(), got {type(state).__name__}: {safe_repr(state)}")
    if state.get("format") != FORMAT:
        raise StateError(
            f"a state has 'format': {FORMAT!r}, got {safe_repr(state.get('format'))} in a dict of "
            f"{safe_repr(sorted(map(str, state)))}; pass what state_dict() of this loader returned"
        )
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise StateError(
            f"this is a state of version {safe_repr(version)}, and this release reads version {VERSION}; "
            f"load it with the release that wrote it"
        )
    _check_types(state, {"loader": (str,), "guarantee": (str,), "epoch": (int,), "batches": (int,), "cursor": (dict,)})
    if state["cursor"].keys() != {"json"}:
        raise StateError(f"'cursor' of the state holds one string, 'json', got {safe_repr(state['cursor'])}")
    varying = _parsed(state["cursor"]["json"])
    _check_types(
        varying,
        {
            "random": (dict,),
            "left_out": (list,),
            "ranks": (dict, type(None)),
            "pipeline": (list,),
        },
    )
    if "cursor" not in varying:
        raise StateError("the state has no 'cursor' in its JSON: it is cut off")
    for key in ("epoch", "batches"):
        if not _is_count(state[key]):
            raise StateError(f"{key!r} of the state must be from 0 to 2**63 - 1, got {safe_repr(state[key])}")
    if state["guarantee"] not in STRENGTH:
        raise StateError(f"'guarantee' of the state must be one of {STRENGTH}, got {safe_repr(state['guarantee'])}")
    return {**varying, **{key: state[key] for key in ("loader", "guarantee", "epoch", "batches")}}


def check_fits(
    contents: Mapping[str, Any],
    *,
    loader: str,
    pipeline: Shape,
    check_ranks: Callable[[dict[str, Any] | None, bool], None],
) -> None:
    """Refuse a state of another loader.

    Args:
        contents: What the state holds.
        loader: The kind of loader.
        pipeline: Its shape.
        check_ranks: Refuses what the state says of the ranks that it comes from, where it does not do for this one;
            it is told whether an epoch has begun in it.

    Raises:
        StateError: It is; says what is different.
    """
    if contents["loader"] != loader:
        raise StateError(f"the state is of a {contents['loader']}"[:200] + f", and this is a {loader}")
    check_ranks(contents["ranks"], contents["cursor"] is not None)
    difference = _difference(pipeline, contents["pipeline"])
    if difference is not None:
        raise StateError(f"the state is of another pipeline: {difference}")


def _check_types(parts: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    for key, kinds in types.items():
        if key not in parts:
            raise StateError(f"the state has no {key!r}: it is cut off")
        if not isinstance(parts[key], kinds) or isinstance(parts[key], bool):
            raise StateError(f"{key!r} of the state must be {_or(kinds)}, got {safe_repr(parts[key])}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _parsed(text: Any) -> dict[str, Any]:
    """What `make_state` wrote as JSON."""
    if not isinstance(text, str):
        raise StateError(f"'json' in the cursor of the state is a string, got {safe_repr(text)}")
    try:
        varying = json.loads(text, parse_int=_integer)
        nested = _nested(varying)
    except RecursionError:
        nested = True
    except ValueError as error:
        raise StateError(f"'json' in the cursor of the state is none, or broken: {error}"[:300]) from None
    if nested:
        raise StateError(f"'json' in the cursor of the state is nested more than {MOST_NESTED} deep: it is no state")
    if not isinstance(varying, dict):
        raise StateError(f"'json' in the cursor of the state is an object, got {safe_repr(varying)}")
    return varying


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _nested(value: Any) -> bool:
    """Whether `value` is nested too deep to be walked through without a care."""
    level = [value]
    for _ in range(MOST_NESTED):
        inner = [part for part in level if isinstance(part, list | dict)]
        level = [part for outer in inner for part in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return True


def _or(types: tuple[type, ...]) -> str:
    return " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)


def _plain(value: Any) -> Any:
    """A copy as JSON gives it back. An integer too long for decimal digits becomes a string of hexadecimal ones."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, bool | str | float | None):
        return value
    if isinstance(value, int):
        return hex(value) if value.bit_length() > 4096 else int(value)
    raise StateError(f"a cursor is made of numbers, strings and lists, got {value!r} of {type(value).__name__}"[:300])


# -- the shape ---------------------------------------------------------------------------------------------------------


def shape_of(plan: Plan) -> Shape:
    """The source and the stages of `plan` that decide which sample comes when, and maps for people who read it.

    As JSON gives it back.
    """
    shape: Shape = _plain(_described(plan))
    return shape


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
        {"stage": "source", "name": type(data.dataset).__name__, "length": length} | identity_of(data.dataset),
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
    return described | identity_of(data.make)


_OURS: Final = {"arguments", "kind", "length", "name", "sampler", "sources", "stage"}
"""Keys of a source's description that a state has anyway."""


def identity_of(stream: Any) -> dict[str, Any]:
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
        plain: dict[str, Any] = _plain(told)
    except StateError:
        raise TypeError(f"{rule}: numbers, strings, lists and dicts, got {safe_repr(told, 80)}") from None
    return plain


def _length(source: Single) -> int | None:
    try:
        return source.length()
    except TypeError:
        return None


def _difference(now: Shape, then: Any, where: str = "") -> str | None:
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
        difference = _difference(mine, its, f"source {number} of {place}, ")
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
