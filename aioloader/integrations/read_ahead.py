"""Where a loader was some batches ago, for trainers that hold batches which they have not trained on yet."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from aioloader.engine.faces import Batches
from aioloader.engine.progress import Progress
from aioloader.engine.resumable import beginning
from aioloader.loader import Loader

__all__ = ["Places", "ReadAhead"]


class Places:
    """The latest places of one iterator's epoch, oldest first: how many batches it had given, and its cursor.

    It holds nothing of the iterator, which must die when its consumer drops it.

    Args:
        ahead: Batches that its consumer holds.
    """

    def __init__(self, ahead: int) -> None:
        self._latest: deque[tuple[int, Any]] = deque(maxlen=ahead + 1)
        self._progress: Progress | None = None

    def note(self, progress: Progress) -> None:
        """The consumer has asked for one more, and has got it, or an error, or the end."""
        if progress is not self._progress:  # its first batch, or an epoch that was resumed after its last one is over
            self._progress = progress
            self._latest.clear()
            start = progress.history[0] if progress.history else progress.cursor
            self._latest.append((progress.batches_before, start))
        self._latest.append((progress.batches, progress.cursor))

    def state(self, loader: Loader) -> dict[str, Any]:
        """The state of `loader` after the last batch that the consumer is done with."""
        progress = self._progress
        if progress is None or loader._loaded is not None or loader._progress is not progress:
            return loader.state_dict()
        batches, cursor = self._latest[0]
        if batches == progress.batches:  # the end was told, so the consumer is at its last batch
            return loader.state_dict()
        return loader._state_at(progress, batches, beginning(progress.cursor) if cursor is None else cursor)


class ReadAhead(Iterator[Any]):
    """One epoch of a loader, with a note of its place at every `next()`.

    Args:
        batches: The epoch.
        ahead: Batches that its consumer holds.
        begun: Called with the notes when the epoch begins.
    """

    def __init__(self, batches: Batches[Any], ahead: int, begun: Callable[[Places], None]) -> None:
        self._batches = batches
        self._places = Places(ahead)
        self._begun: Callable[[Places], None] | None = begun

    def __next__(self) -> Any:
        if self._begun is not None:
            self._begun(self._places)
            self._begun = None
        try:
            batch = next(self._batches)
        except BaseException:
            self._note()
            del self  # an exception that is kept keeps this frame: not with it the epoch
            raise
        self._note()
        return batch

    def _note(self) -> None:
        if self._batches._delivery is not None:
            self._places.note(self._batches._delivery.progress)
