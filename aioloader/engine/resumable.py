"""Iterables that say where they are: how they are opened at a place, and when they are asked for it.

The cursor of a sample is a count, or a pair of an *origin* and a count from there. An origin is one of two things: what
a sampler drew its order from, or what a user's object with `state_dict` said about itself. Asking such an object may
cost anything, so it is asked behind the first sample and once in `SNAPSHOT_SAMPLES`; what was
read since then is read again and dropped.
"""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Any, Final
from weakref import ref

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.safe_text import safe_repr
from aioloader.errors import StateError

__all__ = [
    "SNAPSHOT_SAMPLES",
    "KnowsOrigin",
    "Origin",
    "after_origin",
    "begin_again",
    "beginning",
    "check_origin",
    "is_due",
    "is_stateful",
    "note_first",
    "note_silent",
    "open_at",
    "snapshot",
    "split_cursor",
    "tells_state",
]

SNAPSHOT_SAMPLES: Final = 256

Origin = dict[str, Any]
"""JSON-able: `at`, the samples before it, and either `generators`, the states that the order was drawn from, or the
object's own `state`, and whether that is one `of` the `"iterable"` or of its `"iterator"`."""


class KnowsOrigin(ABC):
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
        return None, as_count(cursor or 0)
    origin, since = cursor_parts(cursor, 2)
    parts = origin.keys() if isinstance(origin, dict) else ()
    if not (parts == {"at", "generators"} or (parts == {"at", "of", "state"} and origin["of"] in _OF)):
        raise ValueError(f"an origin was expected, got {safe_repr(origin)}")
    as_count(origin["at"])
    return origin, as_count(since)


_OF: Final = ("iterable", "iterator")


def beginning(cursor: Any) -> Any:
    """Where an epoch begins of which `cursor` is a later place: its order is drawn as it was."""
    origin = cursor[0] if isinstance(cursor, list | tuple) and len(cursor) == 2 else None
    if isinstance(origin, dict) and "generators" in origin:
        return origin, 0
    return None


def after_origin(origin: Origin | None, since: int) -> Any:
    """The cursor behind sample number `since` from `origin` on."""
    return since if origin is None else (origin, since)


class _Known:
    """What is kept of an object of the user's that tells its state, as long as the object lives.

    Attributes:
        initial: Its state before its first sample; None: it has told none that JSON can hold.
        loaded: One of ours was loaded into it since.
        after: Its state behind the first sample that it gave then; None: it gave none, or told none.
        silent: It was asked in an epoch, and did not tell.
    """

    __slots__ = ("after", "initial", "loaded", "silent")

    def __init__(self, iterable: Any) -> None:
        self.initial = _told(iterable)
        self.loaded = False
        self.after: Any = None
        self.silent = False


_known: dict[int, tuple[ref[Any], _Known]] = {}  # by id: an object may be equal to another one, or have no hash


def _knowledge(iterable: Any) -> _Known:
    """Of `iterable`; it is asked for its state when it is seen first."""
    owner = getattr(iterable, "__wrapped__", iterable)
    if (entry := _known.get(id(owner))) is not None:
        return entry[1]
    known = _Known(iterable)
    key = id(owner)
    with contextlib.suppress(TypeError):  # it cannot be referred to weakly
        _known[key] = ref(owner, lambda _: _known.pop(key, None)), known
    return known


def open_at(iterable: Iterable[Any], origin: Origin | None) -> tuple[Iterator[Any], Any]:
    """Iterate `iterable` from `origin` on, or from its beginning; in the thread that will go on with it.

    Some objects keep what was loaded for all epochs to come (Hugging Face's do, while they are told no other epoch),
    others go on by themselves, and maybe in another order than before. What they do is seen at the first sample of the
    epoch behind: whoever is where the loaded state had brought it then is sent back to its beginning.

    Returns:
        The iterator, and what can be asked where it is, if anything.
    """
    if isinstance(iterable, KnowsOrigin):
        iterable.origin = origin
        return iter(iterable), None
    known = load_iterable(iterable, origin)
    iterator = iter(iterable)
    if known is not None and known.initial is None and not known.loaded:  # some tell only what is iterated
        known.initial = _told(iterable)
    who = asked(iterable, iterator, origin)
    if who is iterable and origin is None and known is not None and known.loaded:
        known.loaded = False
        first = list(islice(iterator, 1))
        if first and (_told(iterable) != known.after if known.after is not None else known.initial is None):
            return _Begun(first, iterator), who
        if (close := getattr(iterator, "close", None)) is not None:
            close()
        if known.initial is None:
            raise ValueError(
                f"{type(iterable).__name__} goes on in each epoch from the state that was loaded into it, and told "
                f"none of its beginning to send it back to; pass a function that makes a new one for each epoch"
            )
        iterable.load_state_dict(known.initial)
        iterator = iter(iterable)
    return iterator, who


class _Begun(Iterator[Any]):
    """An iterator whose first sample has been read."""

    def __init__(self, first: list[Any], rest: Iterator[Any]) -> None:
        self._first = first
        self._rest = rest

    def __next__(self) -> Any:
        return self._first.pop() if self._first else next(self._rest)

    def close(self) -> None:
        """Close the iterator, if it can be."""
        if (close := getattr(self._rest, "close", None)) is not None:
            close()


def load_iterable(iterable: Any, origin: Origin | None) -> _Known | None:
    """Let an iterable with a state begin at `origin`, unless its iterators have states of their own."""
    if not is_stateful(iterable):
        return None
    known = _knowledge(iterable)
    if origin is not None and origin.get("of") == "iterable":
        known.loaded, known.after = True, None
        iterable.load_state_dict(origin["state"])
    return known


def begin_again(iterable: Any) -> None:
    """Let an async iterable into which a state was loaded begin where it did when it was seen first."""
    if is_stateful(iterable) and (known := _knowledge(iterable)).loaded:
        known.loaded = False
        if known.initial is not None:
            iterable.load_state_dict(known.initial)


def asked(iterable: Any, iterator: Iterator[Any] | AsyncIterator[Any], origin: Origin | None) -> Any:
    """What can be asked where `iterator` is, which now begins at `origin`.

    Raises:
        ValueError: The state is one of an iterator, and this one takes none.
    """
    if is_stateful(iterator):
        if origin is not None and origin.get("of") == "iterator":
            iterator.load_state_dict(origin["state"])  # type: ignore[union-attr]  # `is_stateful` says so
        return iterator
    if origin is not None:
        check_takes_state(iterable if origin.get("of") == "iterable" else iterator)
    return iterable if is_stateful(iterable) else None


def check_takes_state(thing: Any) -> None:
    """Refuse a state for `thing` that it could not take.

    Raises:
        StateError: It has no `load_state_dict`.
    """
    if not is_stateful(thing):
        raise StateError(f"the state holds one of the source itself, but {type(thing).__name__} has no load_state_dict")


def check_origin(iterable: Any, origin: Origin, *, made: bool) -> None:
    """Refuse an origin that is none of `iterable`, as far as that can be told before it is iterated.

    Args:
        iterable: A source, or the generator function that makes it.
        origin: From a state.
        made: It is such a function.

    Raises:
        ValueError: Why.
    """
    if "generators" in origin:
        raise ValueError("it holds the states of generators, and no order is drawn here")
    if made or origin["of"] == "iterable":
        check_takes_state(iterable)


def is_due(at: int) -> bool:
    """Whether an object is to be asked for its state, behind so many samples of the epoch.

    Behind the first one: then it has drawn its order. Not before: what it says at the end of the last epoch is no
    beginning of the next one.
    """
    return at == 1 or (at > 0 and not at % SNAPSHOT_SAMPLES)


def note_first(thing: Any, iterator: Any) -> None:
    """`thing`, into which a state was loaded, has given one sample."""
    if thing is not iterator and (known := _knowledge(thing)).loaded:
        known.after = _told(thing)


def snapshot(thing: Any, iterator: Any, at: int) -> Origin | None:
    """The origin that `thing` is at now; None when it tells no state that JSON can hold.

    That is no error while samples are read: nobody may ever ask for a state of the loader. Whoever does is told that a
    resume reads from the beginning (`tells_state`).
    """
    state = _told(thing)
    if thing is not iterator:
        _knowledge(thing).silent = state is None
    if state is None:
        return None
    return {"at": at, "of": "iterator" if thing is iterator else "iterable", "state": state}


def note_silent(iterable: Any) -> None:
    """A state counts the samples of `iterable`, so it was asked for its own, and did not tell."""
    if is_stateful(iterable):
        _knowledge(iterable).silent = True


def tells_state(iterable: Any) -> bool:
    """Whether `iterable` says where it is, as far as it has been asked."""
    return is_stateful(iterable) and not ((known := _known.get(id(iterable))) and known[1].silent)


def _told(thing: Any) -> Any:
    """A copy of the state of `thing`, that shares nothing with what it goes on to change; None: it tells none."""
    try:
        return json.loads(json.dumps(thing.state_dict()))
    except Exception:  # it may need to be iterated, or to be asked by nobody
        return None
