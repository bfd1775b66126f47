"""How a sync iterable is read: sample by sample, each with the cursor to go on after it."""

from collections import deque
from collections.abc import Iterable, Iterator
from io import IOBase
from time import perf_counter
from typing import Any, Final

from aioloader.engine.resumable import KnowsOrigin, Origin, is_due, note_first, open_at, snapshot
from aioloader.engine.torch_state import check_leak, context_state

__all__ = ["READ_SECONDS", "SyncCursor"]

READ_SECONDS: Final = 0.001  # what one hop into the source's thread should be worth


class SyncCursor:
    """Reads one iterable, in one thread: the source's own, or the consumer's where there are no workers.

    No user code runs before the first `read`.

    Attributes:
        origin: What cursors are counted from. Set it before the first `read`, which moves it on.
        ready: Pairs of a sample and the cursor after it. `read` appends to it; another thread may take from it.
        count: How many samples were read.
        busy_seconds: Time spent in `read`.
        hurried: Somebody waits for the next sample: `read` returns with it. Another thread may set it.
    """

    def __init__(self, iterable: Iterable[Any], name: str, origin: Origin | None = None) -> None:
        self.origin = origin
        self.ready: deque[tuple[Any, Any]] = deque()
        self.count = 0
        self.busy_seconds = 0.0
        self.hurried = False
        self._name = name
        self._iterable: Iterable[Any] | None = iterable  # until it is opened
        self._iterator: Iterator[Any] | None = None
        self._before = 0  # samples of the epoch before the first one that is read
        self._counted_from = 0  # samples that had been read at the origin
        self._draws: KnowsOrigin | None = None  # its origin is known after its first sample
        self._stateful: Any = None  # is asked for its state, see `is_due`

    def read(self, limit: int) -> None:
        """Read up to `limit` samples, and none after the one that took it past `READ_SECONDS`.

        Raises:
            StopIteration: There are no more.
            BaseException: The user's own.
        """
        began = now = perf_counter()
        before = context_state()
        stop = self.count + limit
        try:
            iterator = self._open() if self._iterator is None else self._iterator
            while self.count < stop and now - began < READ_SECONDS:
                sample = next(iterator)
                check_leak(before, self._name)
                self.count += 1
                if self._draws is not None or self._stateful is not None:
                    self._find_origin(iterator)
                since = self.count - self._counted_from
                self.ready.append((sample, since if self.origin is None else (self.origin, since)))
                del sample
                if self.hurried:
                    break
                now = perf_counter()
        finally:
            self.busy_seconds += perf_counter() - began

    def _open(self) -> Iterator[Any]:
        iterable = self._iterable
        assert iterable is not None
        self._before = 0 if self.origin is None else self.origin["at"]
        self._draws = iterable if isinstance(iterable, KnowsOrigin) else None
        self._iterator, self._stateful = open_at(iterable, self.origin)
        self._iterable = None
        return self._iterator

    def _find_origin(self, iterator: Iterator[Any]) -> None:
        """Count the sample that was just read, and those after it, from the newest origin."""
        if self._draws is not None:
            self.origin, self._draws = self._draws.origin, None
        elif self.count == 1 and self._before:
            note_first(self._stateful, iterator)
        elif is_due(at := self._before + self.count):
            origin = snapshot(self._stateful, iterator, at)
            if origin is None:
                self._stateful = None
            else:
                self.origin, self._counted_from = origin, self.count

    @property
    def opened(self) -> bool:
        """Whether the iterable was opened, as far as this thread can see."""
        return self._iterator is not None

    @property
    def closable(self) -> bool:
        """Whether the iterator is to be closed. `Pipeline(open(path))`: iterating a file does not make it ours."""
        return hasattr(self._iterator, "close") and not isinstance(self._iterator, IOBase)

    def close(self) -> None:
        """Close the user's generator, in the thread that reads it."""
        if self.closable:
            self._iterator.close()  # type: ignore[union-attr]  # as was just asked
