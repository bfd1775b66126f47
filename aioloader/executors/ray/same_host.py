"""Results of actors on the same host as the process that wants them: in shared memory, past the object store.

Through the store a result is copied twice: into it, and out of it, since its memory is shared by all who read it. An
actor whose memory this process can map writes into segments instead (see `segments`), as a worker process does: its
answer names them, and they are mapped here. They have no names in any file system, so nothing is left of them however
their processes end: they are found as open files of the actor, in `/proc`.

What tells the actor that segments were mapped, or are free again, goes with later calls. Calls may be lost, refused or
begin in another order. So what is told is a *log*: each call brings all of it that the actor has not confirmed, and it
ignores what it knows. Told twice, that a segment is free would free it while somebody has it again.

When an actor dies between its answer and the moment when that is read here, its segments are gone, and the result is
lost as one in the store of a lost node is. A process that has got the number of the dead one has other files.
"""

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch

from aioloader.core.memory import Alloc
from aioloader.executors.processes.segments import Arena, BufferPlace, MappedSegments, create_file
from aioloader.executors.processes.wire import decode, encode
from aioloader.executors.ray.values import Packed, encoded, nbytes_of, unpack
from aioloader.memory.pool import SMALLEST_BYTES, BatchMemory

__all__ = [
    "Answer",
    "InSegments",
    "Inbox",
    "OpenFile",
    "Outbox",
    "PartPost",
    "SegmentsGoneError",
    "Told",
    "answer_bytes",
    "probe",
]


class SegmentsGoneError(Exception):
    """The segments of a result cannot be mapped: mostly, their actor has died since."""


class OpenFile(NamedTuple):
    """An open file of a process, and what it is known by. Another process cannot have the same one."""

    fd: int
    device: int
    inode: int

    @classmethod
    def of(cls, fd: int) -> "OpenFile":
        """One of this process."""
        status = os.fstat(fd)
        return cls(fd, status.st_dev, status.st_ino)

    def open(self, pid: int) -> int:
        """Open the same file as process `pid` has; returns a descriptor.

        Raises:
            OSError: There is no such process on this host, it does not have the file, or it is another user's.
        """
        fd = os.open(f"/proc/{pid}/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        if OpenFile.of(fd)[1:] != self[1:]:
            os.close(fd)
            raise FileNotFoundError(f"file {self.fd} of process {pid} is another one")
        return fd


class InSegments(NamedTuple):
    """A result in segments.

    Attributes:
        stream: Its pickle.
        places: Of its buffers.
        new: Number, size and file of each segment that was not named before.
        forgotten: Segments that are no more.
        known: How far the actor knows the log.
    """

    stream: bytes
    places: list[BufferPlace]
    new: list[tuple[int, int, OpenFile]]
    forgotten: list[int]
    known: int


Answer: TypeAlias = Packed | InSegments

Told: TypeAlias = tuple[int, tuple[int, ...]]
"""Where a part of the log begins, and that part: numbers of segments that are free, and below 0 of such as are mapped
and whose files may be closed."""


@cache
def probe() -> OpenFile | None:
    """In an actor: a file by which a process on the same host finds out that it is; None: there are no such files."""
    if sys.platform != "linux":
        return None
    try:
        return OpenFile.of(create_file(1))  # it stays open as long as the actor lives
    except OSError:
        return None


class Outbox:
    """In an actor: puts results for one process into segments.

    Attributes:
        arena: Its segments.
    """

    def __init__(self) -> None:
        self.arena = Arena()
        self._files: dict[int, int] = {}  # descriptors that nobody has mapped yet, as far as is known
        self._known = 0

    def hear(self, told: Told) -> None:
        """Take note of what the other process says."""
        begin, log = told
        for number in log[max(0, self._known - begin) :]:
            if number > 0:
                self.arena.take_back([number])
            else:
                os.close(self._files.pop(-number))
        self._known = max(self._known, begin + len(log))

    def pack(self, value: Any) -> Answer:
        """A result in segments; or as for another host, if it is small, or there is no memory to share.

        Raises:
            Exception: Whatever pickling a user's object raises.
        """
        return self.pack_encoded(*encode(value))

    def pack_encoded(self, stream: bytes, buffers: list[memoryview]) -> Answer:
        """The same of what `encode` gives. If nobody else refers to what `Arena.lend` gave for it, it is not copied."""
        arena = self.arena
        if (places := arena.place(buffers)) is None:
            return encoded(stream, buffers)
        new = []
        for number, size, fd in arena.hand_over(places):
            self._files[number] = fd
            new.append((number, size, OpenFile.of(fd)))
        return InSegments(stream, places, new, arena.trim(), self._known)

    def close(self) -> None:
        """Nobody reads any more: what is mapped elsewhere stays there."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self.arena.close()


class PartPost:
    """Where the batches of a part are made, and sent from: in segments, as soon as a process of this host reads it."""

    def __init__(self) -> None:
        self._outbox: Outbox | None = None

    def hear(self, told: Told) -> None:
        """Who reads is on this host, and says so with each read."""
        if self._outbox is None:
            self._outbox = Outbox()
        self._outbox.hear(told)

    def alloc(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Alloc`; in any thread."""
        outbox = self._outbox
        return _for_other_hosts().alloc(shape, dtype) if outbox is None else outbox.arena.lend(shape, dtype)

    alloc.from_bytes = SMALLEST_BYTES  # type: ignore[attr-defined]  # as both of them

    def pack(self, stream: bytes, buffers: list[memoryview]) -> Answer:
        """What `encode` gave, which nobody else has."""
        return encoded(stream, buffers) if self._outbox is None else self._outbox.pack_encoded(stream, buffers)

    def close(self) -> None:
        """Nobody reads any more."""
        if self._outbox is not None:
            self._outbox.close()


@cache
def _for_other_hosts() -> BatchMemory:
    """Of this actor, for all its parts and epochs."""
    return BatchMemory()


class Inbox:
    """What one actor on this host sends: maps its segments, and says what has become of them.

    Args:
        pid: Of the actor.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._segments = MappedSegments()
        self._log: list[int] = []
        self._begin = 0  # of the log: what comes before is known to the actor

    @classmethod
    def of(cls, pid: int, file: OpenFile | None) -> "Inbox | None":
        """For the actor that has `file`; None: its memory cannot be mapped here."""
        if file is None or sys.platform != "linux":
            return None
        try:
            os.close(file.open(pid))
        except OSError:
            return None
        return cls(pid)

    def told(self) -> Told:
        """What the next call brings."""
        self._log += self._segments.freed()
        return self._begin, tuple(self._log)

    def unpack(self, answer: Answer, alloc: Alloc | None) -> Any:
        """The value of an answer.

        Args:
            answer: Of the actor.
            alloc: See `unpack`, for a result that is not in segments.

        Raises:
            SegmentsGoneError: Its segments are gone.
            Exception: It cannot be unpickled here.
        """
        if not isinstance(answer, InSegments):
            return unpack(answer, alloc)
        self._hear(answer)
        try:
            buffers = self._segments.buffers(answer.places)
        except KeyError as error:
            raise SegmentsGoneError(f"the answer that named segment {error} was lost") from error
        return decode(answer.stream, buffers)

    def _hear(self, answer: InSegments) -> None:
        if answer.known > self._begin:
            del self._log[: answer.known - self._begin]
            self._begin = answer.known
        self._segments.forget(answer.forgotten)
        for number, size, file in answer.new:
            try:
                self._segments.map(number, size, file.open(self._pid))
            except OSError as error:
                raise SegmentsGoneError(f"the memory of process {self._pid} cannot be mapped: {error}") from error
            self._log.append(-number)


def answer_bytes(answer: Answer) -> int:
    """The size of a result."""
    if isinstance(answer, InSegments):
        return len(answer.stream) + sum(place.size for place in answer.places)
    return nbytes_of(answer)
