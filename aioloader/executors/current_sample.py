"""Which sample a thread or a task is working on, for `aioloader.sample_rng`.

Nothing is computed per sample: the caller of a user function only sets a reference to the entry, and `sample_rng()`
reads it.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol

__all__ = ["BatchBeingLoaded", "BulkLoad", "KeyOnly", "SampleContext", "SampleName", "current_sample"]


class SampleName(Protocol):
    """What identifies a sample; the engine's entries do."""

    @property
    def key(self) -> Any:
        """The index or key by which it was loaded, or its number in its stream."""

    @property
    def position(self) -> int | None:
        """Distinguishes the samples that one object names, one after the other."""


class SampleContext:
    """The current sample of one hop into a thread, or of one task.

    Attributes:
        name: Identifies the sample; None: there is none.
        seed: The seed of the epoch and the current stage; None: the stage has no random numbers.
        rng: The generator that `sample_rng` has made, and for which sample and seed.
        begins: To be told which sample of a batch is loaded now, and None after the last one; None: nobody asks.
        since: When work on it began, or on one shortly before it that took no time to speak of (`perf_counter`).
    """

    __slots__ = ("begins", "name", "rng", "seed", "since")

    def __init__(self, seed: int | None = None) -> None:
        self.begins: Callable[[int | None], None] | None = None
        self.name: SampleName | None = None
        self.seed = seed
        self.rng: Any = None
        self.since = 0.0


class KeyOnly:
    """A sample in a worker process, where only its key is known."""

    __slots__ = ("key",)
    position = 0

    def __init__(self, key: Any) -> None:
        self.key = key


class BatchBeingLoaded:
    """A batch whose samples are loaded one by one, and appended to `samples`; names the next one to load."""

    def __init__(self, keys: Sequence[Any], samples: list[Any]) -> None:
        self._keys = keys
        self._samples = samples

    @property
    def key(self) -> Any:
        """The key of the sample that is being loaded."""
        return self._keys[len(self._samples)]

    @property
    def position(self) -> int:
        """The place of the sample in the batch."""
        return len(self._samples)


class BulkLoad:
    """Samples that are loaded by one call, so that only the function itself knows which is the current one.

    Attributes:
        asked: Whether the function has called `sample_rng`. Then its result must not be used.
    """

    def __init__(self) -> None:
        self.asked = False

    @property
    def key(self) -> NoReturn:
        self._refuse()

    @property
    def position(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        self.asked = True
        raise RuntimeError(
            "sample_rng() gives the random numbers of one sample, got a call while several are loaded together; "
            "let this error pass: they are loaded one by one then"
        )


current_sample: ContextVar[SampleContext | None] = ContextVar("current_sample", default=None)
