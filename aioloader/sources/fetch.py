"""Sources with keys, which are cheap to get, and a function that fetches the sample of a key."""

from abc import ABC, abstractmethod
from typing import Any

from aioloader.core.policies import Policies

__all__ = ["FetchSource"]


class FetchSource(ABC):
    """A source whose samples are fetched by key, many at once.

    `Pipeline(source)` is `Pipeline(source.keys).map(source.fetch, concurrency=source.concurrency)`: if the keys are a
    sequence, order stages permute them; if they are a stream, they are read no further than they are fetched.

    Attributes:
        concurrency: How many samples are fetched at once.
        ahead: How many are fetched and not taken, at most; None: decided by the engine.
        ahead_bytes: The same in bytes.
        policies: What is done about calls of `fetch` that fail, take long, or are too many; None: nothing.
    """

    concurrency: int
    ahead: int | None = None
    ahead_bytes: int | None = None
    policies: Policies | None = None

    @property
    @abstractmethod
    def keys(self) -> Any:
        """Any source of a pipeline."""

    @abstractmethod
    async def fetch(self, key: Any) -> Any:
        """The sample of one of `keys`."""
