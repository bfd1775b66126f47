"""Sources with keys, which are cheap to get, and a function that fetches the sample of a key."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic

from aioloader.core.policies import Policies
from aioloader.core.rate import Rate
from aioloader.core.source import SourceContext
from aioloader.core.typevars import T_co

__all__ = ["FetchSource", "NamedSamples", "PlannedKeys"]


class NamedSamples(Sequence[Any]):
    """A map-style source of ours whose samples have names, and are read in threads.

    Attributes:
        names: What the samples are called, by index.
        ahead: How many are begun and not taken, at most; None: decided by the engine.
        ahead_bytes: The same in bytes.
    """

    names: Sequence[Any]
    ahead: int | None
    ahead_bytes: int | None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What numbers of samples depend on, see `CursorSource.identity`."""


class PlannedKeys(Sequence[int]):
    """Keys `0` to `n - 1` of samples whose requests are planned from the order in which they will be wanted.

    Attributes:
        names: What the samples are called, by key.
        rate: How many requests begin in a second, which others may share.
    """

    names: Sequence[Any]
    rate: Rate | None = None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What keys depend on, see `CursorSource.identity`."""

    def __getitem__(self, key: Any) -> Any:
        """The key itself, which is what `fetch` gets where a sampler gives the keys and nothing is planned."""
        return range(len(self))[key]

    @abstractmethod
    def begin(self, context: SourceContext) -> Callable[[Sequence[int], bool], Sequence[Any]]:
        """Begin an epoch.

        Returns:
            A function of the next keys, and of whether more follow: it gives what `fetch` is called with for some of
            them, the first ones, and at least one.
        """


class FetchSource(ABC, Generic[T_co]):
    """A source whose samples are fetched by key, many at once.

    `Pipeline(source)` is `Pipeline(source.keys).map(source.fetch, concurrency=source.concurrency)`: if the keys are a
    sequence, order stages permute them; if they are a stream, they are read no further than they are fetched.

    Attributes:
        concurrency: How many samples are fetched at once.
        ahead: How many are fetched and not taken, at most; None: decided by the engine.
        ahead_bytes: The same in bytes.
        policies: What is done about calls of `fetch` that fail, take long, or are too many; None: nothing.
        finishes: What `fetch` gives is no sample yet: `finish` makes one of it.
    """

    concurrency: int
    ahead: int | None = None
    ahead_bytes: int | None = None
    policies: Policies | None = None
    finishes: bool = False

    @property
    @abstractmethod
    def keys(self) -> Any:
        """Any source of a pipeline.

        With `PlannedKeys`, `policies` are not for `fetch`, but for each request that their plan makes; unless a sampler
        gives the keys, since nothing is planned then.
        """

    @abstractmethod
    async def fetch(self, key: Any) -> Any:
        """The sample of one of `keys`."""

    def finish(self, fetched: Any) -> Any:
        """The sample of what was fetched; called in a thread."""
        return fetched
