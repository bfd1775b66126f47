"""Iterables with a `state_dict`: how they are opened at a place, and when they are asked for their state.

The cursor of a sample is a count, or a pair of an *origin* and a count from there. An origin is one of two things: what
a sampler drew its order from, or the state that a user's object with `state_dict` gave. Such a call may cost anything,
so it is made after the first sample and then once in `SNAPSHOT_SAMPLES`; a resume reads the samples since then again
and drops them.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Any, Final
from weakref import ref

from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.safe_text import safe_repr
from aioloader.core.user_state import decoded, encoded
from aioloader.errors import StateError

__all__ = [
    "SNAPSHOT_SAMPLES",
    "KnowsOrigin",
    "Origin",
    "after_origin",
    "ask_initial",
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
    """Keys of one epoch, whose order is drawn with the first key and can be drawn again."""

    origin: Origin | None
    """What the order is drawn from. Known after the first key; set it before that to get the same order again."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...


def is_stateful(thing: object) -> bool:
    """Whether `thing` can save and load its state, as objects of torchdata and Hugging Face can."""
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def split_cursor(cursor: object) -> tuple[Origin | None, int]:
    """Split `cursor` into its origin and the count from there.

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
    if "state" in parts:
        decoded(origin["state"])  # else it would be found out only when the epoch begins
    return origin, as_count(since)


_OF: Final = ("iterable", "iterator")


def beginning(cursor: object) -> Any:
    """The cursor of the beginning of the epoch that `cursor` is from: its order is drawn as it was."""
    origin = cursor[0] if isinstance(cursor, list | tuple) and len(cursor) == 2 else None
    if isinstance(origin, dict) and "generators" in origin:
        return origin, 0
    return None


def after_origin(origin: Origin | None, since: int) -> Any:
    """The cursor after `since` samples from `origin` on."""
    return since if origin is None else (origin, since)


class _Known:
    """What is remembered of a user's object with a state, as long as the object lives.

    Attributes:
        initial: Its state before its first sample; None: it gave none that JSON can hold.
        loaded: A state was loaded into it since.
        after: Its state after the first sample that it gave then; None: there was no sample, or no state.
        silent: It was asked during an epoch and gave no state.
    """

    __slots__ = ("after", "initial", "loaded", "silent")

    def __init__(self) -> None:
        self.initial: Any = None
        self.loaded = False
        self.after: Any = None
        self.silent = False

    def ask(self, iterable: Any) -> None:
        """Ask for the initial state, unless it is known, or another one has been loaded."""
        if self.initial is None and not self.loaded:
            self.initial = _told(iterable)


_known: dict[int, tuple[ref[Any], _Known]] = {}  # by id: an object may be equal to another one, or have no hash


def _knowledge(iterable: object) -> _Known:
    """What is known of `iterable`."""
    owner = getattr(iterable, "__wrapped__", iterable)
    if (entry := _known.get(id(owner))) is not None:
        return entry[1]
    known = _Known()
    key = id(owner)
    with contextlib.suppress(TypeError):  # it cannot be referred to weakly
        _known[key] = ref(owner, lambda _: _known.pop(key, None)), known
    return known


def open_at(iterable: Iterable[Any], origin: Origin | None) -> tuple[Iterator[Any], Any]:
    """Iterate `iterable` from `origin` on, or from its beginning; in the thread that will go on with it.

    An object with a state is asked for it only once it has been iterated, as in torchdata's StatefulDataLoader: some
    have none before. Where one is loaded before that, as there, the object is asked for its own first.

    After `load_state_dict`, some objects begin every later epoch at the loaded place (Hugging Face's do, until they are
    told another epoch); others begin at their start, maybe in another order than before. The first sample of the next
    epoch tells which: an object whose state is then what it was after the first sample of the resumed epoch has its
    initial state loaded.

    Returns:
        The iterator, and the object to ask for its state, if there is one.
    """
    if isinstance(iterable, KnowsOrigin):
        iterable.origin = origin
        return iter(iterable), None
    known = load_iterable(iterable, origin)
    iterator = iter(iterable)
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
        iterable.load_state_dict(decoded(known.initial))
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
    """Make an iterable with a state begin at `origin`, unless its iterators have states of their own."""
    if not is_stateful(iterable):
        return None
    known = _knowledge(iterable)
    if origin is not None and origin.get("of") == "iterable":
        known.ask(iterable)
        known.loaded, known.after = True, None
        iterable.load_state_dict(decoded(origin["state"]))
    return known


def begin_again(iterable: Any) -> None:
    """Load the initial state of an async iterable again, if another one was loaded into it since."""
    if is_stateful(iterable) and (known := _knowledge(iterable)).loaded:
        known.loaded = False
        if known.initial is not None:
            iterable.load_state_dict(decoded(known.initial))


def ask_initial(iterable: Any) -> None:
    """Ask for the initial state of `iterable`, which has just been iterated and has given nothing yet."""
    _knowledge(iterable).ask(iterable)


def asked(iterable: object, iterator: Iterator[Any] | AsyncIterator[Any], origin: Origin | None) -> Any:
    """Make `iterator` begin at `origin`, right after `iterable` has given it.

    Returns:
        What is to be asked for its state, the iterator or the iterable; None: neither has one.

    Raises:
        ValueError: The state is one of an iterator, and this one takes none.
    """
    if is_stateful(iterator):
        if origin is not None and origin.get("of") == "iterator":
            iterator.load_state_dict(decoded(origin["state"]))  # type: ignore[union-attr]  # `is_stateful` says so
        return iterator
    if origin is not None:
        check_takes_state(iterable if origin.get("of") == "iterable" else iterator)
    if not is_stateful(iterable):
        return None
    if not hasattr(iterable, "__wrapped__"):  # else it calls `ask_initial`: its iterator has not begun
        ask_initial(iterable)
    return iterable


def check_takes_state(thing: object) -> None:
    """Refuse a state if `thing` cannot load one.

    Raises:
        StateError: It has no `load_state_dict`.
    """
    if not is_stateful(thing):
        raise StateError(f"the state holds one of the source itself, but {type(thing).__name__} has no load_state_dict")


def check_origin(iterable: object, origin: Origin, *, made: bool) -> None:
    """Refuse an origin that `iterable` cannot be opened at, as far as that shows before it is iterated.

    Args:
        iterable: A source, or the generator function that makes it.
        origin: From a state.
        made: Whether it is such a function.

    Raises:
        ValueError: Why.
    """
    if "generators" in origin:
        raise ValueError("it holds the states of generators, and no order is drawn here")
    if made or origin["of"] == "iterable":
        check_takes_state(iterable)


def is_due(at: int) -> bool:
    """Whether an object is to be asked for its state after `at` samples of the epoch.

    After the first one, since it has drawn its order by then. Not before: its state may still be that of the end of the
    last epoch.
    """
    return at == 1 or (at > 0 and not at % SNAPSHOT_SAMPLES)


def note_first(thing: object, iterator: object) -> None:
    """Remember the state of `thing` after its first sample, if one was loaded into it."""
    if thing is not iterator and (known := _knowledge(thing)).loaded:
        known.after = _told(thing)


def snapshot(thing: object, iterator: object, at: int) -> Origin | None:
    """The origin that `thing` is at now; None when it gives no state that can be kept.

    That is no error while samples are read: the user may never ask for the loader's state. If they do, its guarantee
    says that a resume reads from the beginning (`tells_state`).
    """
    state = _told(thing)
    if thing is not iterator:
        _knowledge(thing).silent = state is None
    if state is None:
        return None
    return {"at": at, "of": "iterator" if thing is iterator else "iterable", "state": state}


def note_silent(iterable: object) -> None:
    """A cursor counts the samples of `iterable`: so when the state was taken, the object gave none of its own."""
    if is_stateful(iterable):
        _knowledge(iterable).silent = True


def tells_state(iterable: object) -> bool:
    """Whether `iterable` gives a state, as far as it has been asked."""
    return is_stateful(iterable) and not ((known := _known.get(id(iterable))) and known[1].silent)


def _told(thing: Any) -> Any:
    """A copy of the state of `thing` that shares nothing with it, see `encoded`; None: it gives none."""
    try:
        return encoded(thing.state_dict())
    except Exception:  # some give it only while they are iterated, or not at all
        return None
