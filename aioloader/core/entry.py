"""What travels through the engine: one sample or batch, with the cursor to go on after it."""

from asyncio import CancelledError
from typing import Any, Final

from aioloader.core.safe_text import add_note, safe_repr
from aioloader.errors import SampleCancelledError

__all__ = [
    "DONE",
    "DROPPED",
    "LAST",
    "ONE_LOST",
    "UNDER_WAY",
    "Entry",
    "annotate",
    "places_of",
    "presentable",
]

# The states of an entry. Plain integers, since they are compared once or twice per sample.
UNDER_WAY: Final = 0  # in a window, not finished
DONE: Final = 1  # finished: `value`, or `error` when that is set
DROPPED: Final = 2  # finished, and a filter said no
LAST: Final = 3  # finished: the source failed with `error`, and nothing comes after this entry
ONE_LOST: Final = 4  # finished: one of several sources failed with `error`; it is no sample, and the others go on


class Entry:
    """One sample or batch on its way.

    Attributes:
        value: The sample as the last stage left it.
        cursor: Where to go on *after* this entry; small, immutable, JSON-able (integers and tuples).
        key: What names the sample in its epoch, see `aioloader.keys`. Of a batch: the list of its samples' keys.
        position: Where it stands in its source, in the order of this epoch and of all ranks, from 0; of a batch: where
            its first sample stands. What is made of an entry keeps its position. None: not known, in a source with
            cursors of its own that was entered in the middle.
        attempts: How often making it was begun: 1, unless work was lost and done again; of a batch: the most of its
            samples.
        error: The user's exception, raised at this entry's place.
        state: One of the constants above.
        kept_as: Its key in the caches of its window, or None if no cache may keep it; not set before it is looked up.
        places: The positions of its samples; set for a batch that was made of entries, and for nothing else.
    """

    __slots__ = ("attempts", "cursor", "error", "kept_as", "key", "places", "position", "state", "value")
    kept_as: Any
    places: list[int | None]

    def __init__(self, value: Any, cursor: Any, key: Any, position: int | None) -> None:
        self.value = value
        self.cursor = cursor
        self.key = key
        self.position = position
        self.attempts: int = 1
        self.error: BaseException | None = None
        self.state: int = UNDER_WAY

    @classmethod
    def last(cls, error: BaseException, cursor: Any, position: int | None) -> "Entry":
        """The entry that a failed source ends with."""
        entry = cls(None, cursor, None, position)
        entry.error = error
        entry.state = LAST
        return entry

    def derived(self, value: Any, cursor: Any, key: Any, position: int | None) -> "Entry":
        """One that is made of this one."""
        entry = Entry(value, cursor, key, position)
        entry.attempts = self.attempts
        return entry

    def __repr__(self) -> str:
        outcome = f"error={self.error!r}" if self.error is not None else f"value={self.value!r}"
        return f"Entry({outcome}, cursor={self.cursor!r}, key={self.key!r}, position={self.position})"


def places_of(entry: Entry) -> list[int | None] | None:
    """The positions of the samples of a batch; None: it was not made of entries."""
    return getattr(entry, "places", None)


def annotate(error: BaseException, stage: str, entry: Entry, epoch: int) -> None:
    """Say on the user's own exception which stage and sample it comes from.

    One exception object may be raised for many samples (a cached error): it gets one note per place it was seen at,
    and at most a few, so that its notes do not grow with the epoch.
    """
    name = (
        "" if entry.key is None or type(entry.key) is list else f"key {safe_repr(entry.key)}, "
    )  # a list is a batch's
    counts = "batch" if type(entry.key) is list and places_of(entry) is None else "position"  # a sampler's batch
    place = "" if entry.position is None else f", {counts} {entry.position}"
    note = f"aioloader: stage {stage}, {name}epoch {epoch}{place}"
    notes = [n for n in getattr(error, "__notes__", ()) if isinstance(n, str)]
    if note not in notes and sum(n.startswith("aioloader: stage ") for n in notes) < 4:
        add_note(error, note)


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
        add_note(replacement, note)
    return replacement
