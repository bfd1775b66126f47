"""Which sample a thread or a task works on: what `aioloader.sample_rng` asks.

Nothing is computed per sample: whoever runs the user's function leaves a reference to the entry at hand, and only
`sample_rng()` looks into it.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol

__all__ = ["BatchBeingLoaded", "BulkLoad", "KeyOnly", "SampleContext", "SampleName", "current_sample"]


class SampleName(Protocol):
    """What a sample is known by: an entry of the engine is one."""

    @property
    def key(self) -> Any:
        """The index or key it was loaded by, or its number in its stream."""

    @property
    def position(self) -> int | None:
        """Tells samples apart that one object names, one after the other."""


class SampleContext:
    """The sample at hand, of one thread's hop or of one task.

    Attributes:
        name: Whoever it is; None: there is none at the moment.
        seed: Of this epoch and of the stage that is at work; None: the stage gives no random numbers.
        drawn: What `sample_rng` has made for it, with whom it was made for.
    """

    __slots__ = ("name", "rng", "seed")

    def __init__(self, seed: int | None = None) -> None:
        self.name: SampleName | None = None
        self.seed = seed
        self.rng: Any = None


class KeyOnly:
    """A sample by its key alone: in a worker process, where its entry is not.

    Args:
        key: Its key.
    """

    __slots__ = ("key",)
    position = 0

    def __init__(self, key: Any) -> None:
        self.key = key


class BatchBeingLoaded:
    """A batch whose samples are loaded one after the other: the one at hand is the first that is not there yet.

    Args:
        keys: Of the batch.
        samples: Those that are loaded; the loading function appends to it.
    """

    def __init__(self, keys: Sequence[Any], samples: list[Any]) -> None:
        self._keys = keys
        self._samples = samples

    @property
    def key(self) -> Any:
        """Of the sample that is being loaded."""
        return self._keys[len(self._samples)]

    @property
    def position(self) -> int:
        """Its place in the batch."""
        return len(self._samples)


class BulkLoad:
    """Samples that are loaded by one call: which of them is at hand, only the function itself knows.

    Attributes:
        asked: Somebody wanted to know. What the call gave, if it gave anything, is not to be used.
    """

    def __init__(self) -> None:
        self.asked = False

    @property
    def key(self) -> NoReturn:
        """Of nobody."""
        self._refuse()

    @property
    def position(self) -> NoReturn:
        """Of nobody."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        self.asked = True
        raise RuntimeError(
            "sample_rng() gives the random numbers of one sample, got a call while several are loaded together; "
            "let this error pass: they are loaded one by one then"
        )


current_sample: ContextVar[SampleContext | None] = ContextVar("current_sample", default=None)
