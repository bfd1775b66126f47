"""The state of a loader: a small, versioned dict, made and checked. Pure: nothing is read or started.

Its keys are always the same, and so are the types of its values: checkpoint libraries load a state in place, into the
one of a fresh loader (torch's `distributed.checkpoint` reads the keys that it finds there, and forgets all others, and
empty dicts). So whatever varies is one string of JSON. `docs/checkpoint.md` has the schema.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from aioloader.core.cursors import plain
from aioloader.core.safe_text import safe_repr
from aioloader.errors import StateError
from aioloader.plan.shape import Shape, difference_of
from aioloader.stages.flow import STRENGTH, Guarantee

__all__ = [
    "FORMAT",
    "VERSION",
    "check_fits",
    "contents_of",
    "make_state",
    "ranges_of",
]

FORMAT: Final = "aioloader"
VERSION: Final = 2

MOST_NESTED: Final = 200
"""Lists in lists in a state: each stage of a pipeline is one or two."""

_LONGEST_INTEGER: Final = 1300  # digits; see `plain`


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
        "cursor": plain(cursor),
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
    texts = (_text_again(part) if type(part) is str else _text(plain(part)) for part in parts.values())
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
    difference = difference_of(pipeline, contents["pipeline"])
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
