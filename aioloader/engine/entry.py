"""What travels through the engine: one sample or batch, with the cursor to go on after it."""

import contextlib
from asyncio import CancelledError
from typing import Any, Final, NamedTuple

from aioloader.errors import SampleCancelledError

__all__ = [
    "DONE",
    "DROPPED",
    "LAST",
    "UNDER_WAY",
    "Entry",
    "PartKey",
    "SourceKey",
    "annotate",
    "part_key",
    "presentable",
]

# The states of an entry. Plain integers, since they are compared once or twice per sample.
UNDER_WAY: Final = 0  # in a window, not finished
DONE: Final = 1  # finished: `value`, or `error` when that is set
DROPPED: Final = 2  # finished, and a filter said no
LAST: Final = 3  # finished: the source failed with `error`, and nothing comes after this entry


class Entry:
    """One sample or batch on its way.

    Attributes:
        value: The sample as the last stage left it.
        cursor: Where to go on *after* this entry; small, immutable, JSON-able (integers and tuples).
        key: What names the sample: the index or key it was loaded by, else None. Of a batch: the list of its samples'.
        position: How many entries came before it in the epoch, counted where it was made.
        error: The user's exception, raised at this entry's place.
        state: One of the constants above.
        kept_as: Its key in the caches of its window; set by the step that looks it up there, and not before.
    """

    __slots__ = ("cursor", "error", "kept_as", "key", "position", "state", "value")
    kept_as: Any

    def __init__(self, value: Any, cursor: Any, key: Any, position: int) -> None:
        self.value = value
        self.cursor = cursor
        self.key = key
        self.position = position
        self.error: BaseException | None = None
        self.state: int = UNDER_WAY

    @classmethod
    def last(cls, error: BaseException, cursor: Any, position: int) -> "Entry":
        """The entry that a failed source ends with."""
        entry = cls(None, cursor, None, position)
        entry.error = error
        entry.state = LAST
        return entry

    def __repr__(self) -> str:
        outcome = f"error={self.error!r}" if self.error is not None else f"value={self.value!r}"
        return f"Entry({outcome}, cursor={self.cursor!r}, key={self.key!r}, position={self.position})"


class PartKey(NamedTuple):
    """The key of one of several entries that come from one: of `flat_map`, `unbatch`, or a later round of `repeat`.

    Attributes:
        key: Of the entry that it comes from; its position, when that has none.
        part: Which of them it is, from 1; of `repeat` from 1 too, since the entries of the first round keep their keys.
    """

    key: Any
    part: int

    def __repr__(self) -> str:
        return f"{self.key!r} ({self.part})"


def part_key(entry: "Entry", part: int) -> PartKey:
    """The key of part `part` of what `entry` is made into."""
    return PartKey(entry.position if entry.key is None else entry.key, part)


class SourceKey(NamedTuple):
    """The key of an entry of one of several sources.

    Attributes:
        source: Its number, from 0.
        key: In that source; None: it has none.
    """

    source: int
    key: Any

    def __repr__(self) -> str:
        return f"{self.key!r} of source {self.source}"


def annotate(error: BaseException, stage: str, entry: Entry, epoch: int) -> None:
    """Say on the user's own exception which stage and sample it comes from.

    One exception object may be raised for many samples (a cached error): it gets one note per place it was seen at,
    and at most a few, so that its notes do not grow with the epoch.
    """
    name = "" if entry.key is None or type(entry.key) is list else f"key {_short(entry.key)}, "  # a list is a batch's
    note = f"aioloader: stage {stage}, {name}epoch {epoch}, position {entry.position}"
    notes = [n for n in getattr(error, "__notes__", ()) if isinstance(n, str)]
    if note not in notes and sum(n.startswith("aioloader: stage ") for n in notes) < 4:
        with contextlib.suppress(Exception):  # a frozen dataclass takes none, and must not be replaced by that error
            error.add_note(note)


def presentable(error: BaseException) -> BaseException:
    """`error`, unless raising it in `next()` would mean something else than an error.

    A `StopIteration` that escapes from a user function would end the epoch in silence, a `CancelledError` would look
    like somebody's cancellation of the consumer.
    """
    if isinstance(error, StopIteration | StopAsyncIteration | GeneratorExit):
        replacement: BaseException = RuntimeError(f"a user function raised {type(error).__name__}")
    elif isinstance(error, CancelledError):
        replacement = SampleCancelledError("a user function raised CancelledError, and nobody had cancelled the loader")
    else:
        return error
    replacement.__cause__ = error
    for note in getattr(error, "__notes__", ()):
        replacement.add_note(note)
    return replacement


def _short(key: Any) -> str:
    try:
        text = repr(key)
    except Exception as broken:  # a user's __repr__ must not replace the user's error
        text = f"<{type(key).__name__} whose repr raises {type(broken).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."
