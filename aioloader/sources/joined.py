"""Which samples of stored archives one request reads: planned from the keys to come, before any of them is read.

A key is a number, and the bytes of number `n + 1` come after those of `n` or are in a later archive; so keys in order
are neighbours. The keys to come are known in any order, so those of a whole window of them are sorted, and neighbours
are joined where little lies between them: a twentieth of what is wanted. In sequence this gives the ranges of a reader
that has no index; shuffled, one request a sample, and fewer where a window has many samples of an archive.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

__all__ = ["JOINED_BYTES", "ArchiveRange", "JoinedRange", "PlannedWindow", "cut", "plan_window"]

JOINED_BYTES: Final = 12 << 20
"""The most that is joined to one range; where samples are small, a range has this size."""

WASTED: Final = 20
"""What lies between joined samples is at most this part of them: all ranks together read little twice."""


class ArchiveRange(NamedTuple):
    """Where a sample is: in which archive, and from which byte to which."""

    archive: int
    start: int
    stop: int


class JoinedRange(NamedTuple):
    """One range, and which of the keys are in it.

    Attributes:
        place: What is read.
        positions: Of these keys in their order, ascending.
    """

    place: ArchiveRange
    positions: list[int]


class PlannedWindow(NamedTuple):
    """What was planned of some keys.

    Attributes:
        places: Of the samples, in the order of the keys; keys after these are for the next window.
        ranges: In the order in which they are wanted first.
    """

    places: list[ArchiveRange]
    ranges: list[JoinedRange]


def plan_window(
    keys: Sequence[int], place_of: Callable[[int], ArchiveRange], *, most_bytes: float, more: bool
) -> PlannedWindow:
    """The ranges that hold the samples of `keys`, at least of the first one.

    Args:
        keys: In the order in which they are wanted.
        place_of: Where the sample of a key is.
        most_bytes: What the samples of a window take together.
        more: Others follow after `keys`.
    """
    places: list[ArchiveRange] = []
    nbytes = 0
    for key in keys:
        place = place_of(key)
        nbytes += place.stop - place.start
        if places and nbytes > most_bytes:
            more = True
            break
        places.append(place)
    order = sorted(range(len(places)), key=keys.__getitem__)
    ranges = _joined(order, places)
    if more and len(ranges) > 1 and order == list(range(len(places))):
        # In sequence: the last range may go on in the next window, so it belongs there.
        del places[ranges.pop().positions[0] :]
    ranges.sort(key=_first)
    return PlannedWindow(places, ranges)


def _first(planned: JoinedRange) -> int:
    return planned.positions[0]


def _joined(order: list[int], places: list[ArchiveRange]) -> list[JoinedRange]:
    """Neighbours in `order` as ranges."""
    ranges: list[JoinedRange] = []
    archive = -1
    start = stop = wanted = 0
    members: list[int] = []

    def close() -> None:
        if members:
            ranges.append(JoinedRange(ArchiveRange(archive, start, stop), sorted(members)))

    for position in order:
        place = places[position]
        gap = place.start - stop
        size = place.stop - place.start
        if place.archive == archive and gap < 0:  # the same sample once more
            members.append(position)
        elif (
            place.archive == archive
            and place.stop - start <= JOINED_BYTES
            and (place.stop - start) - (wanted + size) <= (wanted + size) // WASTED
        ):
            stop = place.stop
            wanted += size
            members.append(position)
        else:
            close()
            archive, start, stop = place
            wanted = size
            members = [position]
    close()
    return ranges


def cut(pieces: Sequence[Any], start: int, stop: int) -> list[Any]:
    """The bytes from `start` to `stop` of a range that came in pieces."""
    parts: list[Any] = []
    begin = 0
    for piece in pieces:
        end = begin + len(piece)
        if begin < stop and start < end:
            parts.append(memoryview(piece)[max(0, start - begin) : stop - begin])
        begin = end
    return parts
