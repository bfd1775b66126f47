"""Ranges of indexed archives in stores: requested as they were planned, and shared by the samples in them."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from aioloader.core.safe_text import add_note
from aioloader.core.source import SourceContext
from aioloader.errors import BrokenDataError
from aioloader.masking import mask_message
from aioloader.sources.chunks import RANGE_BYTES
from aioloader.sources.joined import JOINED_BYTES, ArchiveRange, cut, plan_window
from aioloader.sources.ranges import Range
from aioloader.sources.requests import Pending, Requests
from aioloader.sources.stores import Version
from aioloader.sources.tar_samples import TarSamples, changed

__all__ = ["ArchiveRanges", "PlannedRanges", "Wanted"]


class ArchiveRanges:
    """Reads ranges of archives: each of the version that its index is of.

    Args:
        samples: Where they are.
        requests: What makes the requests; None: each is made as it is.
    """

    def __init__(self, samples: TarSamples, requests: Requests | None) -> None:
        self.samples = samples
        self._requests = requests
        self._versions: dict[int, Version] = {}

    async def read(self, place: ArchiveRange) -> list[Any]:
        """The bytes of a range: in one request, or in several, one after the other, where it is long.

        Raises:
            BrokenDataError: The archive is another one than was indexed, or an answer was cut short.
            Exception: The store's own.
        """
        number, start, stop = place
        size = stop - start if stop - start <= JOINED_BYTES else RANGE_BYTES
        archive = self.samples.archives[number]
        try:
            return [await self._range(number, at, min(at + size, stop)) for at in range(start, stop, size)]
        except Exception as error:
            mask_message(error)
            if not isinstance(error, BrokenDataError):
                add_note(error, f"aioloader: object {archive.key!r}, bytes {start} to {stop}, of {archive.store!r}")
            raise

    async def _range(self, number: int, start: int, stop: int) -> Any:
        from obstore.exceptions import NotSupportedError

        archive, index = self.samples.archives[number], self.samples.indexes[number]
        version = self._versions.get(number)
        if version is None:
            version = self._versions[number] = Version(archive.store, archive.key, index.mark)

        def check(meta: Any) -> int:
            size: int = meta["size"]
            if size != index.size or not version.is_same(meta):
                raise BrokenDataError(changed(archive.name, index.size, size))
            return size

        async def attempt() -> Any:
            request = Range(archive.store, archive.key, start, stop, version.condition)
            try:
                return await request.read(check)
            finally:
                request.cancel()

        try:
            return await (attempt() if self._requests is None else self._requests.run(attempt))
        except NotSupportedError as error:  # a plain HTTP server
            raise BrokenDataError(
                f"{archive.name}: its server gives no ranges, which an index needs; read it without index=True"
            ) from error


class PlannedRanges:
    """The ranges of one epoch, planned window by window.

    Args:
        ranges: Reads them.
        context: The source's.
        most_keys: How many samples a window has, at most; None: as many as it is given.
        most_bytes: The same in bytes.
        ranges_ahead: How many ranges with several samples are requested after the one that is being used.
    """

    def __init__(
        self,
        ranges: ArchiveRanges,
        context: SourceContext,
        *,
        most_keys: int | None,
        most_bytes: float,
        ranges_ahead: int,
    ) -> None:
        self._ranges = ranges
        self._context = context
        self._most_keys = most_keys
        self._most_bytes = most_bytes
        self._ranges_ahead = ranges_ahead
        self._to_come: deque[_Shared] = deque()  # in the order in which they will be wanted
        self._used = False  # some sample has been asked for

    def plan(self, keys: Sequence[int], more: bool) -> Sequence["Wanted"]:
        """See `PlannedKeys.begin`."""
        if self._most_keys is not None and len(keys) > self._most_keys:
            keys, more = keys[: self._most_keys], True
        places, ranges = plan_window(keys, self._ranges.samples.place, most_bytes=self._most_bytes, more=more)
        wanted: list[Any] = [None] * len(places)
        for place, positions in ranges:
            shared = _Shared(place, len(positions))
            if shared.comes:
                self._to_come.append(shared)
            for position in positions:
                wanted[position] = Wanted(keys[position], places[position], shared, self)
        if self._used:
            self._begin_ahead()
        return wanted

    async def read(self, wanted: "Wanted") -> list[Any]:
        """The bytes of a sample.

        One request that fails would be the error of all samples in it. But an error has one place: it is that of the
        sample that asked first, and the others ask for themselves. So a fault that concerns one of them, or that does
        not last, costs one sample.
        """
        shared, place = wanted.shared, wanted.place
        if not shared.left or shared.has_failed() or shared.place == place:
            return await self._ranges.read(place)
        shared.left -= 1
        pending = self._asked(shared)
        if not pending.task.done():
            await asyncio.wait({pending.task})
        if shared.has_failed():  # another sample has its error
            return await self._ranges.read(place)
        if pending.won:
            pieces = cut(pending.value, place.start - shared.place.start, place.stop - shared.place.start)
            if not shared.left:
                shared.pending = None  # all have theirs
            return pieces
        shared.failed, shared.pending = True, None
        try:
            return await pending.result()  # raises
        finally:
            del pending  # the traceback of its error has this frame

    def _asked(self, shared: "_Shared") -> Pending[list[Any]]:
        """The request of a range, and of those after it."""
        if not shared.used:
            shared.used = self._used = True
            self._begin(shared)
            # Those before it are not wanted, or not any more: their samples were in a cache.
            while shared.comes:
                self._to_come.popleft().comes = False
            self._begin_ahead()
        assert shared.pending is not None
        return shared.pending

    def _begin_ahead(self) -> None:
        for number, shared in enumerate(self._to_come):
            if number >= self._ranges_ahead:
                break
            self._begin(shared)

    def _begin(self, shared: "_Shared") -> None:
        if shared.pending is None:
            shared.pending = Pending(self._context, lambda: self._ranges.read(shared.place))


class _Shared:
    """A range that one request reads.

    Attributes:
        place: Where it is.
        left: How many of its samples have not been asked for.
        pending: The request; None: not begun, or all samples have what they need of it.
        comes: It is among the ranges to come: those with several samples, since the others are read one by one.
        used: A sample has asked for it.
        failed: Its request has; the samples that come now ask for themselves.
    """

    __slots__ = ("comes", "failed", "left", "pending", "place", "used")

    def __init__(self, place: ArchiveRange, left: int) -> None:
        self.place = place
        self.left = left
        self.comes = left > 1
        self.pending: Pending[list[Any]] | None = None
        self.used = False
        self.failed = False

    def has_failed(self) -> bool:
        """No attribute: that changes while somebody waits, which type checkers do not know."""
        return self.failed


class Wanted:
    """A sample that will be wanted, and the range that has it.

    Attributes:
        number: Of the sample.
        place: Where it is.
        shared: The range.
    """

    __slots__ = ("_planned", "number", "place", "shared")

    def __init__(self, number: int, place: ArchiveRange, shared: _Shared, planned: PlannedRanges) -> None:
        self.number = number
        self.place = place
        self.shared = shared
        self._planned = planned

    async def read(self) -> list[Any]:
        """Its bytes.

        Raises:
            Exception: See `ArchiveRanges.read`.
        """
        return await self._planned.read(self)
