"""The interface between the engine and a cache, and the marks for what is not a sample."""

from abc import ABC, abstractmethod
from typing import Any, Final, NamedTuple

__all__ = ["END", "MISSING", "REFUSED", "Mark", "Store", "StreamPlace", "at_position"]


class Mark:
    """A value in a cache that is not a sample."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> str:
        return self._name  # one object in every process


MISSING: Final = Mark("MISSING")
"""There is nothing under this key."""

REFUSED: Final = Mark("REFUSED")
"""Kept instead of a sample that a filter dropped."""

END: Final = "end"
"""The key under which the number of samples of a stream is kept."""


class StreamPlace(NamedTuple):
    """What the entry of a stream's sample had besides the sample, to be restored on a hit.

    Attributes:
        cursor: Where to go on after it.
        key: Its key.
        position: Its position in its source; None: not known.
        places: For a batch, the positions of its samples; None: it is not a batch, or they are not known.
    """

    cursor: Any
    key: Any
    position: int | None
    places: list[int | None] | None


def at_position(position: int) -> tuple[str, int]:
    """The key of the sample at `position` in a stream."""
    return ("@", position)


class Store(ABC):
    """Keeps samples by key. Keys are integers, strings, or pairs of a string and one of these.

    Several threads and several epochs may use it at once.
    """

    @abstractmethod
    def open(self, pipeline: str) -> None:
        """Begin an epoch; `close` ends it. Called in a thread, since it may read files.

        Args:
            pipeline: The stages before the cache, in words.

        Raises:
            Exception: The cache cannot be used, or belongs to another pipeline.
        """

    def close(self) -> None:  # noqa: B027 - some hold nothing
        """End an epoch. Called on the loop."""

    @abstractmethod
    def find(self, key: Any) -> Any:
        """What is kept under `key`, or `MISSING`. Called on the loop, so it may be a location for `load`."""

    def place(self, position: int) -> StreamPlace | None:
        """The place of the stream's sample at `position`; None: it is not kept."""
        return self._places.get(position)

    @property
    def _places(self) -> dict[int, StreamPlace]:
        raise NotImplementedError

    @abstractmethod
    def put_end(self, count: int) -> None:
        """Record that a stream has ended after `count` samples."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The size of the kept samples."""
