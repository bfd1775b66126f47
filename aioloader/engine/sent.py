"""Samples on their way to a worker, together."""

from typing import Any, TypeAlias

from aioloader.core.entry import Entry
from aioloader.executors.epochs import Epochs

__all__ = ["Payload", "Sent", "unstamp"]


class Sent(list[Entry]):
    """Entries that travel together.

    Attributes:
        begun: Their `Entry.begun` before.
    """

    begun: list[int]


Payload: TypeAlias = tuple[list[int | None], Epochs, list[Any] | None, list[Any], int]
"""Seeds of the calls, epochs, names of the samples (None: they name themselves), the samples, and see `stacked`."""


def unstamp(chunk: list[Entry], start: int, stop: int) -> None:
    """These begin later."""
    if isinstance(chunk, Sent):
        for entry, begun in zip(chunk[start:stop], chunk.begun[start:stop], strict=True):
            entry.begun = begun
