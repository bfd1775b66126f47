"""An entry: one sample or batch on its way through the engine, with the cursor to go on after it."""

import re
from asyncio import CancelledError
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, Final, Generic, TypeVar

from aioloader.core.safe_text import add_note, safe_repr
from aioloader.errors import SampleCancelledError

__all__ = [
    "DONE",
    "DROPPED",
    "LAST",
    "NOT_READ",
    "NO_TRIES",
    "ONE_LOST",
    "UNDER_WAY",
    "Entry",
    "annotate",
    "begun_each_of",
    "earliest",
    "failed_in",
    "places_of",
    "presentable",
    "read_after",
    "stop_of",
    "tries_of",
]

# The states of an entry. Plain integers, since they are compared once or twice per sample.
UNDER_WAY: Final = 0  # in a window, not finished
DONE: Final = 1  # finished: `value`, or `error` when that is set
DROPPED: Final = 2  # finished: dropped by a filter
LAST: Final = 3  # finished: the source failed with `error`, and no entry comes after this one
ONE_LOST: Final = 4  # finished: one of several sources failed with `error`; not a sample, and the other sources go on


NOT_READ: Final = -(1 << 62)
"""`Entry.begun` of what no source of ours has read."""


def read_after(batches: int) -> int:
    """`Entry.begun` of a sample that was read after so many batches had been handed out, and has not begun."""
    return ~batches


NO_TRIES: Final = (None, 0, 0.0)
"""`Entry.tries` of what is begun from the start."""


T = TypeVar("T")

_new: Final[Any] = object.__new__


class Rare(Generic[T]):
    """An attribute that few entries have, so that it takes no slot in each of them: in `Entry.rare`.

    Args:
        default: What it is where it has not been set; none: an `AttributeError`.
    """

    def __init__(self, *default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, entry: "Entry", owner: type | None = None) -> T:
        if entry.rare is not None and self._name in entry.rare:
            found: T = entry.rare[self._name]
            return found
        if not self._default:
            raise AttributeError(f"this entry has no {self._name}")
        return self._default[0]

    def __set__(self, entry: "Entry", value: T) -> None:
        if entry.rare is None:
            entry.rare = {}
        entry.rare[self._name] = value


class Entry:
    """One sample or batch on its way.

    The reader of a source makes one for each sample, anew each time: the loader writes into it. It sets `value`,
    `cursor` and `key`, or makes it with `Entry.failed`, and leaves the other attributes alone.

    ```python
    [Entry(row, cursor=row_id, key=row_id) for row_id, row in rows]
    ```

    Attributes:
        value: The sample as the last stage returned it.
        cursor: Where to go on *after* this entry. Small, immutable and JSON-able: integers, floats, strings, and tuples
            of these and None. Not None itself, which is the start.
        key: Names the sample in its epoch, see `core/keys.py`: a number, a string, a path, or a tuple of these. The
            same wherever the source was opened, since `sample_rng()` is seeded by it and notes of errors show it. For
            a batch, the list of its samples' keys.
        position: The sample's position in its source, from 0, in the order of this epoch and over all ranks; for a
            batch, that of its first sample. Entries derived from this one keep the position. None: not known, in a
            source with its own cursors that was resumed in the middle.
        begun: How many batches had been handed out when the first call for it began. Below 0: none has begun, and it
            is what `read_after` gives, or `NOT_READ`. For a batch, that of its first sample.
        error: The user's exception, raised in place of this entry.
        state: One of the constants above.
        since: When it was finished in the newest window; seconds of `perf_counter`.
        kept_as: Its key in the caches of its window, or None if no cache may keep it; set only when it is looked up.
        rare: The following ones; None: it has none of them.
        attempts: How often work on it was begun: 1, unless work was lost and done again. For a batch, the maximum over
            its samples.
        begun_each: `begun` for each of its samples, as it was when they became a batch; set only for one that was made
            of entries. If no call had begun for them, `begun` is that of all, once one has.
        origin: What came into the first function that may be begun again.
        places: The positions of its samples; set only for a batch that was made of entries.
        stage: Where it failed; set only by `annotate`.
        seconds: How long it took to fail; set only where that is known.
        tries: In which step it has failed, how often, and when for the first time; set only where it is tried again.
        stop: Where it was dropped or failed, see `Stop`; set only where a filter counts what it refuses.
    """

    __slots__ = (
        "begun",
        "cursor",
        "error",
        "kept_as",
        "key",
        "position",
        "rare",
        "since",
        "state",
        "value",
    )
    kept_as: Any
    since: float
    attempts = Rare[int](1)
    begun_each = Rare[list[int]]()
    origin = Rare[Any]()
    places = Rare[list[int | None]]()
    seconds = Rare[float | None]()
    stage = Rare[str]()
    stop = Rare[Any]()
    tries = Rare[tuple[Any, int, float]]()

    def __init__(self, value: Any, cursor: Any, key: Any, position: int | None = None, begun: int = NOT_READ) -> None:
        self.value = value
        self.cursor = cursor
        self.key = key
        self.position = position
        self.begun = begun
        self.error: BaseException | None = None
        self.rare: dict[str, Any] | None = None
        self.state: int = UNDER_WAY

    @staticmethod
    def many(
        values: Sequence[Any], cursors: Iterable[Any], keys: Iterable[Any], positions: Iterable[int | None]
    ) -> "list[Entry]":
        """One for each of `values`, in three quarters of the time."""
        entries: list[Entry] = list(map(_new, repeat(Entry, len(values))))
        entry: Entry
        for entry, entry.value, entry.cursor, entry.key, entry.position in zip(
            entries, values, cursors, keys, positions, strict=True
        ):
            entry.begun = NOT_READ
            entry.error = entry.rare = None
            entry.state = UNDER_WAY
        return entries

    @classmethod
    def failed(cls, error: BaseException, cursor: Any, key: Any) -> "Entry":
        """A sample that could not be made: `error` is raised in its place, and the next one follows.

        Args:
            error: What is raised: this object, with a note that names the source, the key and the epoch.
            cursor: Where to go on after it.
            key: What names it.

        Raises:
            TypeError: `error` is not an exception.
        """
        if not isinstance(error, BaseException):
            raise TypeError(
                f"Entry.failed takes an exception, got {safe_repr(error, 80)} of type {type(error).__name__}"
            )
        entry = cls(None, cursor, key)
        entry.error = error
        return entry

    @classmethod
    def last(cls, error: BaseException, cursor: Any, position: int | None) -> "Entry":
        """The last entry of a source that failed."""
        entry = cls(None, cursor, None, position)
        entry.error = error
        entry.state = LAST
        return entry

    def derived(self, value: Any, cursor: Any, key: Any, position: int | None) -> "Entry":
        """An entry made from this one."""
        entry = Entry(value, cursor, key, position)
        if self.attempts > 1:
            entry.attempts = self.attempts
        entry.begun = self.begun
        return entry

    def __repr__(self) -> str:
        outcome = f"error={self.error!r}" if self.error is not None else f"value={self.value!r}"
        return f"Entry({outcome}, cursor={self.cursor!r}, key={self.key!r}, position={self.position})"


def places_of(entry: Entry) -> list[int | None] | None:
    """The positions of a batch's samples; None: it was not made of entries."""
    return None if entry.rare is None else entry.rare.get("places")


def begun_each_of(entry: Entry) -> list[int] | None:
    """`Entry.begun` for each of a batch's samples; None: it was not made of entries."""
    each = None if entry.rare is None else entry.rare.get("begun_each")
    return [entry.begun] * len(each) if each and each[0] < 0 <= entry.begun else each


def earliest(begun: list[int]) -> int:
    """`Entry.begun` of what is one sample now, and has been several."""
    return min([one for one in begun if one >= 0], default=max(begun))


def tries_of(entry: Entry) -> tuple[Any, int, float] | None:
    """See `Entry.tries`; None: it has not been tried again."""
    return None if entry.rare is None else entry.rare.get("tries")


def stop_of(entry: Entry) -> Any:
    """Where an entry was dropped or failed, see `Stop`; None: nobody has said so."""
    return None if entry.rare is None else entry.rare.get("stop")


def failed_in(entry: Entry) -> str:
    """The stage in which `entry` failed; empty: not known.

    An error that comes from a process of its own has it in its note only.
    """
    stage: str = getattr(entry, "stage", "")
    if not stage and entry.error is not None:
        notes = [note for note in getattr(entry.error, "__notes__", ()) if isinstance(note, str)]
        found = [match[1] for note in reversed(notes) if (match := _NOTE.match(note))]
        stage = found[0] if found else ""
    return stage


_NOTE: Final = re.compile(r"aioloader: stage (.*?), (?:key .*, )?epoch \d")


def annotate(error: BaseException, stage: str, entry: Entry, epoch: int) -> None:
    """Add a note to the user's exception: which stage and sample it comes from.

    One exception object may be raised for many samples (a cached error). It gets one note per stage and sample, at most
    four, so that its notes do not grow with the epoch.
    """
    entry.stage = stage
    is_batch = type(entry.key) is list
    name = "" if entry.key is None or is_batch else f"key {safe_repr(entry.key)}, "
    unit = "batch" if is_batch and places_of(entry) is None else "position"  # a sampler's batch
    place = "" if entry.position is None else f", {unit} {entry.position}"
    note = f"aioloader: stage {stage}, {name}epoch {epoch}{place}"
    notes = [n for n in getattr(error, "__notes__", ()) if isinstance(n, str)]
    if note not in notes and sum(n.startswith("aioloader: stage ") for n in notes) < 4:
        add_note(error, note)


def presentable(error: BaseException) -> BaseException:
    """`error`, or a replacement if raising it in `next()` would not look like an error.

    A `StopIteration` from a user function would end the epoch silently, and a `CancelledError` would look as if the
    consumer had been cancelled.
    """
    if isinstance(error, StopIteration | StopAsyncIteration | GeneratorExit):
        replacement: BaseException = RuntimeError(f"a user function raised {type(error).__name__}")
    elif isinstance(error, CancelledError):
        replacement = SampleCancelledError("a user function raised CancelledError, and nobody had cancelled the loader")
    else:
        return error
    replacement.__cause__ = error
    for note in getattr(error, "__notes__", ()):
        add_note(replacement, note)
    return replacement
