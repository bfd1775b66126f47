"""Samples kept in memory, up to a budget."""

import threading
from typing import Any

from aioloader.cache.samples import kept, size_of
from aioloader.cache.store import END, MISSING, Store, StreamPlace
from aioloader.core.forks import tell_of_fork

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """The first samples that come, until the budget is used up; then no more.

    Nothing is evicted. With an epoch in any order, every sample is asked for once, so none is worth more than another:
    each one kept is one fewer to fetch, in every epoch. A cache that evicts what was used longest ago would, when the
    data is larger than the budget, throw out each sample shortly before its next use, and fetch all of them for ever.

    Args:
        budget: In bytes; see `size_of` for what counts.

    Attributes:
        samples: By key; for reading, and not beyond this epoch's step.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._begin()
        tell_of_fork(self)

    def _forked(self) -> None:
        """See `Forkable`: what is kept stays, apart from the parent's from now on."""
        self._lock = threading.Lock()

    def _begin(self) -> None:
        self.samples: dict[Any, Any] = {}
        self._place_of: dict[int, StreamPlace] = {}
        self._nbytes = 0
        self._full = False
        self._lock = threading.Lock()

    def open(self, pipeline: str) -> None:
        """There is nothing to read."""

    def find(self, key: Any) -> Any:
        return self.samples.get(key, MISSING)

    def put(self, key: Any, sample: Any, place: StreamPlace | None) -> None:
        """Keep `sample`, if there is room."""
        if self._full or key in self.samples:
            return
        sample = kept(sample)
        size = size_of(sample) + 200  # and its place in here, about
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
        """Without the samples: a pipeline that is sent somewhere keeps them there anew."""
        return {"budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["budget"])  # type: ignore[misc]
