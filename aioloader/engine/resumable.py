"""Iterables that say where they are: how they are opened at a place, and when they are asked for it.

The cursor of a sample is a count, or a pair of an *origin* and a count from there. An origin is one of two things: what
a sampler drew its order from, or what a user's object with `state_dict` said about itself. Asking such an object may
cost anything, so it is asked once in `SNAPSHOT_SAMPLES`; what was read since then is read again and dropped.
"""

import contextlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final
from weakref import WeakKeyDictionary

from aioloader.engine.progress import cursor_parts, whole

__all__ = [
    "SNAPSHOT_SAMPLES",
    "Origin",
    "Redrawn",
    "after_origin",
    "beginning",
    "is_stateful",
    "open_at",
    "snapshot",
    "split_cursor",
]

SNAPSHOT_SAMPLES: Final = 256

Origin = dict[str, Any]
"""JSON-able: `at`, the samples before it, and what the order was drawn from, or the object's own state."""


class Redrawn(ABC):
    """Keys of one epoch, whose order is drawn when they are first asked for, and can be drawn again."""

    origin: Origin | None
    """What it was drawn from; known once the first key was given, to be set before to have the same order again."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...


def is_stateful(thing: Any) -> bool:
    """Whether `thing` says where it is, as torchdata's and Hugging Face's objects do."""
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def split_cursor(cursor: Any) -> tuple[Origin | None, int]:
    """Origin and count.

    Raises:
        ValueError: It is no cursor of an iterable.
    """
    if cursor is None or type(cursor) is int:
        return None, whole(cursor or 0)
    origin, since = cursor_parts(cursor, 2)
    if not isinstance(origin, dict) or not {"state", "drawn"} & origin.keys():
        raise ValueError(f"an origin was expected, got {origin!r}"[:200])
    whole(origin.get("at"))
    return origin, whole(since)


def beginning(cursor: Any) -> Any:
    """Where an epoch begins of which `cursor` is a later place: its order is drawn as it was."""
    if isinstance(cursor, list | tuple) and len(cursor) == 2 and isinstance(cursor[0], dict) and "drawn" in cursor[0]:
        return cursor[0], 0
    return None


def after_origin(origin: Origin | None, since: int) -> Any:
    """The cursor behind sample number `since` from `origin` on."""
    return since if origin is None else (origin, since)


_initial: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The states that objects had before we first loaded one into them: their next epoch begins with these."""


def open_at(iterable: Iterable[Any], origin: Origin | None) -> tuple[Iterator[Any], Any]:
    """Iterate `iterable` from `origin` on, or from its beginning; in the thread that will go on with it.

    Returns:
        The iterator, and what can be asked where it is, if anything.
    """
    if isinstance(iterable, Redrawn):
        iterable.origin = origin
        return iter(iterable), None
    load_iterable(iterable, origin)
    iterator = iter(iterable)
    return iterator, asked(iterable, iterator, origin)


def load_iterable(iterable: Any, origin: Origin | None) -> None:
    """Let an iterable with a state begin at `origin`, unless its iterators have states of their own."""
    if not is_stateful(iterable):
        return
    owner = getattr(iterable, "__wrapped__", iterable)
    if origin is not None and origin.get("of") == "iterable":
        with contextlib.suppress(TypeError):  # it cannot be referred to weakly, or has no hash
            _initial.setdefault(owner, frozen(iterable.state_dict()))
        iterable.load_state_dict(origin["state"])
        return
    try:
        initial = _initial.get(owner)
    except TypeError:
        return
    if initial is not None:  # some keep what was loaded for all epochs to come
        iterable.load_state_dict(initial)


def asked(iterable: Any, iterator: Iterator[Any] | AsyncIterator[Any], origin: Origin | None) -> Any:
    """What can be asked where `iterator` is, which now begins at `origin`.

    Raises:
        ValueError: The state is one of an iterator, and this one takes none.
    """
    if is_stateful(iterator):
        if origin is not None and origin.get("of") == "iterator":
            iterator.load_state_dict(origin["state"])  # type: ignore[union-attr]  # `is_stateful` says so
        return iterator
    if origin is not None and (origin.get("of") == "iterator" or not is_stateful(iterable)):
        raise ValueError(
            f"the state holds one of the source itself, but {type(iterable).__name__} has no load_state_dict"
        )
    return iterable if is_stateful(iterable) else None


def snapshot(thing: Any, iterator: Any, at: int) -> Origin | None:
    """The origin that `thing` is at now; None, with a warning, when its state cannot be written as JSON."""
    try:
        state = frozen(thing.state_dict())
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"the state_dict() of {type(thing).__name__} cannot be written as JSON ({error}), so that a resume reads "
            f"it from its beginning; let it be made of dicts, lists, strings and numbers",
            stacklevel=2,
        )
        return None
    return {"at": at, "of": "iterator" if thing is iterator else "iterable", "state": state}


def frozen(state: Any) -> Any:
    """A copy that shares nothing with what a user's object goes on to change."""
    return json.loads(json.dumps(state))
