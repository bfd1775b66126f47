"""What actors answer, as outcomes of chunks in this process."""

from dataclasses import dataclass
from typing import Any

from aioloader.executors.chunk import ChunkResult
from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.wire import Message, can_pickle_by_value
from aioloader.executors.processes.worker_pool import NotSent, Outcome
from aioloader.executors.ray.line import Line, result_bytes
from aioloader.executors.ray.same_host import Inbox, SegmentsGoneError, answer_bytes
from aioloader.executors.ray.seats import Seat
from aioloader.executors.ray.values import unpack
from aioloader.memory.pool import BatchMemory

__all__ = ["Answers", "RayResult"]


@dataclass(slots=True)
class RayResult(ChunkResult):
    """The result of a chunk in an actor; and how many of its calls were cancelled since their time was up."""

    timeouts: int = 0


class Answers:
    """Makes outcomes of answers, and notes how large they were. In the thread of `RayThread`.

    Attributes:
        sample_bytes: The mean size of what comes back for a sample; read in any thread.
    """

    def __init__(self) -> None:
        self._memory = BatchMemory()
        self.sample_bytes = 0.0

    def of_call(self, seat: Seat, inbox: Inbox | None, answer: tuple[Any, ...]) -> Outcome | None:
        """What an actor answered to a call of Ray, in memory that is ours alone; None: it is lost."""
        kind, packed, *numbers = answer
        alloc = self._memory.alloc
        try:
            value = unpack(packed, alloc) if inbox is None else inbox.unpack(packed, alloc)
        except SegmentsGoneError:
            if seat.inbox is inbox:  # not of an actor that came after it
                seat.inbox = None  # the rest goes through the object store
            return None
        except BaseException as error:
            return _unreadable(error)
        if kind == "lost":
            return NotSent(value)
        return self._noted(seat, RayResult(value, *numbers), answer_bytes(packed))

    def of_message(self, seat: Seat, line: Line, message: Message) -> Outcome:
        """The same of what came over a line."""
        kind, _, *numbers = message.head
        try:
            value = line.unpack(message)
        except BaseException as error:
            return _unreadable(error)
        if kind == "lost":
            return NotSent(value)
        busy_seconds, cpu_seconds, *_ = numbers
        return self._noted(seat, RayResult(value, busy_seconds, cpu_seconds), result_bytes(message))

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()

    def _noted(self, seat: Seat, result: RayResult, nbytes: int) -> RayResult:
        tried = len(result.outcomes)
        seat.count(tried, result.busy_seconds, nbytes)
        if tried:
            each = nbytes / tried
            self.sample_bytes = each if not self.sample_bytes else (self.sample_bytes + each) / 2
        return result


def _unreadable(error: BaseException) -> NotSent:
    return NotSent(cannot_travel("a result", error, by_value=can_pickle_by_value()))
