"""Keeps samples in memory, up to a budget."""

import threading
from typing import Any

from aioloader.cache.samples import kept, size_of
from aioloader.cache.store import END, MISSING, Store, StreamPlace
from aioloader.core.forks import tell_of_fork

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """Keeps the samples that come first, until the budget is used up.

    Nothing is evicted. In an epoch every sample is needed once, whatever the order, so all are worth the same: each one
    kept is one fewer to fetch in every epoch. If the data is larger than the budget, a cache that evicts the least
    recently used sample would evict each one shortly before its next use, and fetch all of them in every epoch.

    Args:
        budget: In bytes, counted by `size_of`.

    Attributes:
        samples: By key. Read-only for other modules.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._begin()
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`: the child has its own copy of the samples."""
        self._lock = threading.Lock()

    def _begin(self) -> None:
        self.samples: dict[Any, Any] = {}
        self._place_of: dict[int, StreamPlace] = {}
        self._nbytes = 0
        self._full = False
        self._lock = threading.Lock()

    def open(self, pipeline: str) -> None:
        """Does nothing."""

    def find(self, key: Any) -> Any:
        return self.samples.get(key, MISSING)

    def put(self, key: Any, sample: Any, place: StreamPlace | None) -> None:
        """Keep `sample`, if there is room."""
        if self._full or key in self.samples:
            return
        sample = kept(sample)
        size = size_of(sample) + 200  # about what its entry in the dictionaries takes
        with self._lock:
            if key in self.samples:
                return
            if self._nbytes + size > self.budget:
                self._full = True
                return
            self._nbytes += size
            if place is not None:
                self._place_of[key[1]] = place
            self.samples[key] = sample

    def put_end(self, count: int) -> None:
        self.samples[END] = count

    @property
    def _places(self) -> dict[int, StreamPlace]:
        return self._place_of

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the samples out: a pipeline that is pickled starts with an empty cache."""
        return {"budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["budget"])  # type: ignore[misc]
