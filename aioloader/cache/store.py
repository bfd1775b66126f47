"""What the engine asks of a cache, and the marks that stand in it for what is no sample."""

from abc import ABC, abstractmethod
from typing import Any, Final, NamedTuple

__all__ = ["END", "MISSING", "REFUSED", "Mark", "Store", "StreamPlace", "at_position"]


class Mark:
    """What stands in a cache and is no sample."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> str:
        return self._name  # one object in every process


MISSING: Final = Mark("MISSING")
"""Nothing is kept under this key."""

REFUSED: Final = Mark("REFUSED")
"""Kept instead of a sample that a filter refused."""

END: Final = "end"
"""The key under which the number of samples of a stream is kept."""


class StreamPlace(NamedTuple):
    """Of a sample of a stream: what it came with, to be given again.

    Attributes:
        cursor: Where to go on after it.
        key: Its key.
        position: Where it stands in its source; None: not known.
        places: Of a batch: where its samples stand; None: it is none, or not known.
    """

    cursor: Any
    key: Any
    position: int | None
    places: list[int | None] | None


def at_position(position: int) -> tuple[str, int]:
    """The key of a stream's sample."""
    return ("@", position)


class Store(ABC):
    """Keeps samples by key. Keys are integers, strings, or pairs of a string and one of these.

    Of any thread, and of several epochs at once.
    """

    @abstractmethod
    def open(self, pipeline: str) -> None:
        """An epoch begins; in a thread, since it may read. `close` follows.

        Args:
            pipeline: What is in front of the cache, in words.

        Raises:
            Exception: The cache cannot be used, or is that of another pipeline.
        """

    def close(self) -> None:  # noqa: B027 - some hold nothing
        """An epoch is over. On the loop."""

    @abstractmethod
    def find(self, key: Any) -> Any:
        """What is kept under `key`, or `MISSING`. On the loop: where it takes longer, what `load` takes."""

    def place(self, position: int) -> StreamPlace | None:
        """Of the sample of a stream at `position`; None: it is not kept."""
        return self._places.get(position)

    @property
    def _places(self) -> dict[int, StreamPlace]:
        raise NotImplementedError

    @abstractmethod
    def put_end(self, count: int) -> None:
        """A stream has ended after `count` samples."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What the kept samples take."""
