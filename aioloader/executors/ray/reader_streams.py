"""A part of an epoch as the process that reads it knows it: where it is open, and what has come of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from aioloader.core.memory import Alloc
from aioloader.executors.processes.stream_worker import Heard, Rested
from aioloader.executors.ray.reader_seats import ActorSeat
from aioloader.executors.ray.same_host import Answer, Inbox, InSegments
from aioloader.executors.ray.suspects import CallName
from aioloader.executors.ray.values import unpack

__all__ = ["ReaderSeat", "ReaderStream", "Trial"]


@dataclass(eq=False)
class ReaderStream:
    """A part of an epoch.

    Attributes:
        request: See `PartServer.open`, as for the two after it.
        granted: Entries that may come, and have not.
        batches: Whether they are batches.
        pause: The number of the pause that it is in; 0: it is in none.
        handed_out: Batches that the consumer has got.
        seat: Where it is open; None: nowhere.
        wire: Its name there, see `ReaderActor`.
        inbox: For what comes over this wire in segments; None: its actor is on another host.
        opened: Its actor has said so.
        told: Of the granted entries, those that its actor knows of.
        sent: Reads so far, over this wire.
        came: Those of them that have been answered and taken, in order.
        answers: Those that came before their turn.
        refs: Of reads under way; the object store keeps a result while somebody has its ref.
        leaving: It is to move, as soon as what it was told has come.
        deaths: Actors that it has lost before anything came of it.
        suspect: It is to be tried.
        probation: Entries that must come of it in its next trial.
        again: How often each of the next entries has been begun by now.
        guilty: See `Suspects`.
        blamed: How many of its calls were found guilty in a row, before anything came of it.
        by_store: Its segments could not be mapped, though its actor is on this host.
    """

    number: int
    request: Any
    epoch: int
    cursor: Any
    granted: int
    batches: bool
    pause: int
    listener: Callable[[Heard], None]
    alloc: Alloc | None
    handed_out: int = 0
    seat: "ReaderSeat | None" = None
    wire: str = ""
    inbox: Inbox | None = None
    opened: bool = False
    told: int = 0
    sent: int = 0
    came: int = 0
    answers: dict[int, Any] = field(default_factory=dict)
    refs: dict[int, Any] = field(default_factory=dict)
    leaving: bool = False
    deaths: int = 0
    suspect: bool = False
    probation: int = 0
    again: list[int] = field(default_factory=list)
    guilty: list[tuple[CallName, str]] = field(default_factory=list)
    blamed: int = 0
    by_store: bool = False

    def unpack(self, answer: Answer) -> Any:
        """The value of an answer.

        Raises:
            SegmentsGoneError: It is lost.
            Exception: It cannot be unpickled here.
        """
        if self.inbox is not None:
            return self.inbox.unpack(answer, self.alloc)
        assert not isinstance(answer, InSegments)
        return unpack(answer, self.alloc)

    def with_attempts(self, place: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is known of the next entry, with how often it has been begun."""
        if not self.again:
            return place
        times = self.again.pop(0)
        cursor, position, where, attempts, *rest = place
        return (cursor, position, where, attempts + times, *rest)

    def lose(self) -> None:
        """What its actor was told is lost, and will be begun once more."""
        self.deaths += 1
        self.again = [times + (at < self.told) for at, times in enumerate(self.again)]
        self.again += [1] * (self.told - len(self.again))

    def leave(self) -> None:
        """It is open nowhere."""
        self.seat, self.wire, self.opened, self.leaving = None, "", False, False
        self.inbox = None
        self.told = self.sent = self.came = 0
        self.answers.clear()
        self.refs.clear()

    def rested(self) -> None:
        """It is in a pause, and nothing of it is under way."""
        for still in (False, True):
            self.listener(Rested(self.pause, still))


ReaderSeat: TypeAlias = ActorSeat[ReaderStream]


@dataclass(eq=False)
class Trial:
    """A stream alone in its actor, where calls begin one by one.

    Attributes:
        seat: Its actor's; None: it waits for one.
        left: Entries that must come of it until it is over.
        asked: The call that has got leave last; None: none has.
    """

    stream: ReaderStream
    seat: ReaderSeat | None
    left: int
    asked: tuple[Any, ...] | None = None
