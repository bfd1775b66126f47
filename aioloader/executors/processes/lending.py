"""Values in shared memory that several processes have at once: one lends, the others borrow.

    Lender     writes a value into a segment once; the segment is free when all borrowers have given it back
    Borrower   maps it, and gives the value over that memory

The mappings of borrowers are private: a page that somebody writes to is copied by the system, for that process alone.
So everybody may change a batch in place, and pages that nobody changes are there once. A page that was copied does not
show what is written into the segment later; so when a borrower gives a segment back, it lets go of its copies.
"""

import contextlib
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aioloader.executors.processes.layout import lay_out, open_buffers
from aioloader.executors.processes.segments import Arena, BufferPlace, Mapping
from aioloader.executors.processes.wire import SMALL_BYTES, decode, encode

__all__ = ["Borrower", "Lender", "Loan"]


@dataclass(frozen=True)
class Loan:
    """A value that can be borrowed. What is not in segments travels with it, and is less than a few KiB.

    Attributes:
        layout: Where its buffers are: in segments, or, if there are no `numbers`, in `body`.
        body: What is not in segments.
        numbers: The segments that it lies in.
        new: Segments that nobody has seen yet: numbers and sizes.
        fds: Their descriptors, which whoever makes the loan closes.
        gone: Segments that are to be forgotten.
    """

    layout: Sequence[tuple[int, ...]]
    body: bytes
    numbers: tuple[int, ...]
    new: tuple[tuple[int, int], ...]
    fds: tuple[int, ...]
    gone: tuple[int, ...]

    @property
    def head(self) -> tuple[Any, ...]:
        """All but what goes along in other ways."""
        return self.layout, self.new, self.gone

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds:
            os.close(fd)


class Lender:
    """Used by one thread at a time."""

    def __init__(self) -> None:
        self._arena = Arena()

    def lend(self, value: Any, free: Sequence[int]) -> Loan:
        """Write `value` into shared memory.

        Args:
            value: Anything.
            free: Segments that all borrowers have given back since the last call.

        Raises:
            Exception: It cannot be pickled.
        """
        arena = self._arena
        arena.take_back(free)
        stream, buffers = encode(value)
        body = b""
        if len(stream) < SMALL_BYTES:
            body = stream
        else:
            buffers.append(memoryview(stream))
        if not buffers:
            return Loan((), body, (), (), (), ())
        try:
            places = arena.put(buffers)
        except OSError:  # no memory to share: it goes through the socket
            arena.abandon()
            layout, pieces = lay_out([*buffers, memoryview(body)] if body else buffers)
            return Loan(layout, b"".join(pieces), (), (), (), ())
        new = arena.hand_over(places)
        numbers = tuple({place.segment: None for place in places})
        segments = tuple((number, size) for number, size, _ in new)
        return Loan(places, body, numbers, segments, tuple(fd for _, _, fd in new), tuple(arena.trim()))


class Borrower:
    """Used by one thread at a time; values may die in any."""

    def __init__(self) -> None:
        self._mappings: dict[int, Mapping] = {}
        self._returned: deque[int] = deque()  # appended to by whoever drops the last view

    def borrow(self, head: tuple[Any, ...], body: Any, fds: Sequence[int]) -> Any:
        """The value of a loan; tells by `given_back` when the last part of it has died.

        Args:
            head: Of the loan.
            body: Likewise.
            fds: Likewise; they stay open.

        Raises:
            OSError: Its memory cannot be mapped.
            Exception: It cannot be unpickled here. Nothing is borrowed then but what `given_back` tells.
        """
        layout, new, gone = head
        for number in gone:
            self._mappings.pop(number, None)
        for (number, size), fd in zip(new, fds, strict=True):
            self._mappings[number] = Mapping(fd, size, private=True)
        memory = memoryview(body)
        if not layout:
            return decode(memory)
        if len(layout[0]) == 2:
            buffers = open_buffers(memory, layout)
        else:
            places = [BufferPlace(*place) for place in layout]
            used = {place.segment: None for place in places}
            lent = {number: self._mappings[number].lend(self._returned.append, number) for number in used}
            buffers = [lent[number][offset : offset + size] for number, offset, size in places]
            del lent
            if memory:
                buffers.append(memory)
        stream = buffers.pop()
        return decode(stream, buffers)

    def given_back(self) -> list[int]:
        """Segments of which nothing is in use any more, each of which is told once."""
        numbers: list[int] = []
        with contextlib.suppress(IndexError):
            while True:
                numbers.append(self._returned.popleft())
        for number in numbers:
            if (mapping := self._mappings.get(number)) is not None:
                mapping.forget_changes()
        return numbers
