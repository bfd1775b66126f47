"""Sources of two halves: keys, which are cheap to have, and what fetches the sample of one."""

from abc import ABC, abstractmethod
from typing import Any

__all__ = ["FetchSource"]


class FetchSource(ABC):
    """A source whose samples are fetched by key, many at once.

    `Pipeline(source)` is `Pipeline(source.keys).map(source.fetch, concurrency=source.concurrency)`: where the keys are
    a sequence, order stages permute them, and where they are a stream, they are read no further than fetched.

    Attributes:
        concurrency: Fetches under way at once.
    """

    concurrency: int

    @property
    @abstractmethod
    def keys(self) -> Any:
        """Whatever a pipeline takes as a source."""

    @abstractmethod
    async def fetch(self, key: Any) -> Any:
        """The sample of one of `keys`."""
