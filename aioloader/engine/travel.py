"""Entries on their way to another process: what goes with their values, and what becomes of those that cannot go."""

from collections.abc import Sequence
from dataclasses import dataclass
from pickle import PickleBuffer
from typing import Any

from aioloader.core.entry import DONE, Entry, begun_each_of, places_of
from aioloader.core.safe_text import safe_repr
from aioloader.executors.processes.failures import cannot_travel, portable
from aioloader.executors.processes.wire import can_pickle_by_value, decode, encode
from aioloader.insight.meters import StageMeter

__all__ = ["EntryParcel", "unpacked"]


@dataclass
class EntryParcel:
    """Entries without what must be pickled apart.

    Attributes:
        values: Of each, or what it failed with.
        keys: Of each.
        where: Names the process that they are in, for errors.
    """

    taken: Sequence[Entry]
    values: list[Any]
    keys: list[Any]
    where: str
    failed: list[bool]

    @classmethod
    def of(cls, taken: Sequence[Entry], where: str) -> "EntryParcel":
        """These entries."""
        values = [entry.value if entry.error is None else portable(entry.error, where) for entry in taken]
        failed = [entry.error is not None for entry in taken]
        return cls(taken, values, [entry.key for entry in taken], where, failed)

    def encoded(self, meters: list[StageMeter] | None = None) -> tuple[bytes, list[memoryview]]:
        """Values, keys and counters, see `encode`. The entries have no values any more: what is sent is let go of here.

        Errors are put in the places of values that cannot be pickled, and words for such keys.
        """
        try:
            return encode((self.values, self.keys, meters))
        except BaseException:
            self._refuse()
            return encode((self.values, self.keys, meters))
        finally:
            self.values = []
            for entry in self.taken:
                entry.value = None

    def _refuse(self) -> None:
        """Pickle each value and each key by itself."""
        for at, value in enumerate(self.values):
            try:
                self.values[at] = _Pickled(value)
            except BaseException as error:
                refused = cannot_travel("a batch", error, by_value=can_pickle_by_value())
                self.values[at], self.failed[at] = portable(refused, self.where), True
        for at, key in enumerate(self.keys):
            try:
                self.keys[at] = _Pickled(key)
            except BaseException:
                self.keys[at] = safe_repr(key)[:200]

    @property
    def places(self) -> list[tuple[Any, ...]]:
        """What is known of each, but for its value and its key."""
        return [
            (
                entry.cursor,
                entry.position,
                places_of(entry),
                1 if entry.rare is None else entry.attempts,
                entry.begun,
                begun_each_of(entry),
                entry.state or DONE,
                bad,
            )
            for entry, bad in zip(self.taken, self.failed, strict=True)
        ]


def unpacked(places: Sequence[tuple[Any, ...]], values: Sequence[Any], keys: Sequence[Any]) -> list[Entry]:
    """The entries of an `EntryParcel`."""
    entries = []
    for (cursor, position, where, attempts, begun, begun_each, state, failed), value, key in zip(
        places, values, keys, strict=True
    ):
        entry = Entry(None if failed else value, cursor, key, position, begun)
        if where is not None:
            entry.places = where
        if begun_each is not None:
            entry.begun_each = begun_each
        if attempts > 1:
            entry.attempts = attempts
        entry.state = state
        entry.error = value if failed else None
        entries.append(entry)
    return entries


class _Pickled:
    """What has been pickled, and is not again: its own functions might fail this time."""

    def __init__(self, value: Any) -> None:
        self._stream, self._buffers = encode(value)

    def __reduce__(self) -> Any:
        return decode, (self._stream, [PickleBuffer(buffer) for buffer in self._buffers])
