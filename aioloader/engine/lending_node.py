"""One process reads, and others of its host get the same entries. Their nodes are in `borrowing_node.py`.

    the host                              a guest
    LendingNode ◀──"hello": who, what─────  BorrowingNode; its own nodes are never started
                ──"welcome"──────────────▶  all have come
                ──"entries"──────────────▶  with cursors; values are in shared memory, see `Lender`
                ◀──"took": how many, segments that are free, and whether it wants a batch
                ──"end", "closed"────────▶  there is nothing more
                ──"failed": an error─────▶  before all had come
                ◀──"closed"───────────────  it has ended its iterator, and may come again

All get the same entries in the same order, each with its cursor, so the state of each is as if it had read by itself.
The bound: what is under way and finished before the host's node, as without it, and `room` entries between that and
the slowest of them. Nobody gets anything before all have come: who is not there yet need not be told later.

A batch is sent when all ranks want it, that is when each has a free place for it. So no more of them are alive than in
one process that reads for itself: the one in use, `prefetch` made ahead, and the one that takes the place of a batch
that was just given up. (Sent ahead of that, two or three more were: 1.5 times the memory.) That takes no time from
anybody, since each has the next batch at hand meanwhile. What a guest has given up, it tells with its next wish, so
the memory is free before the next batch is made.

The end of a process is noticed even if a child of it holds its sockets (`Peer`). A guest that is gone is not waited for
any more, but if it dies before all have come, all end with an error; when the host is gone, the others end with an
error after what it had sent.
"""

import json
import os
import socket
from asyncio import Future, TimerHandle
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from aioloader.core.entry import Entry
from aioloader.engine.meeting import Door, Peer
from aioloader.engine.node import Kick, Node
from aioloader.engine.travel import EntryParcel, unpacked
from aioloader.errors import WorkerDiedError
from aioloader.executors.processes.lending import Borrower, Lender, Loan
from aioloader.executors.processes.wire import Message
from aioloader.executors.threads import Threads

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["LendingNode", "ShareTerms", "plan_of"]


@dataclass(frozen=True)
class ShareTerms:
    """What all of them have in common.

    Attributes:
        label: Of the stage, for errors.
        name: Of their meeting.
        what: The pipeline before it, in words: if theirs differ, that is an error.
        ranks: Of all of them; the first one is the host.
        rank: Of this one.
        room: Entries between the host and the slowest. 0: one at a time, when all want it.
        batches: The entries are batches, each of which travels alone.
        timeout: So many seconds may pass until all have come.
    """

    label: str
    name: tuple[Any, ...]
    what: str
    ranks: tuple[int, ...]
    rank: int
    room: int
    batches: bool
    timeout: float

    def meeting(self, epoch: int) -> tuple[Any, ...]:
        """The name of the meeting of an epoch."""
        return (*self.name, self.ranks, epoch)

    def late(self, missing: str) -> TimeoutError:
        """The error when some have not come."""
        return TimeoutError(
            f"{self.label}: {missing} did not come within timeout={self.timeout:g} s; each rank of the group must "
            f"iterate the same loader in the same epoch"
        )


def plan_of(what: str, cursor: Any) -> str:
    """What a rank is about to read, to be compared."""
    return f"{what}, from {'the beginning' if cursor is None else json.dumps(cursor, default=repr)} on"


# -- the host ----------------------------------------------------------------------------------------------------------


class _Guest:
    """One of the others.

    Attributes:
        peer: Its connection.
        rank: None: it has not said it yet.
        ahead: Entries that it was sent and has not taken.
        wants: It has a place for a batch, and none has been sent for that.
        left: It has ended its iterator.
        borrowed: Segments that it has not given back.
    """

    def __init__(self) -> None:
        self.peer: Peer
        self.rank: int | None = None
        self.ahead = 0
        self.wants = self.left = False
        self.borrowed: set[int] = set()


class LendingNode(Node):
    """Gives the entries of `upstream`, and lends them to the guests.

    Args:
        upstream: Gives them.
        terms: They.
        lender: Has the memory that batches come in, or may.
    """

    holds_ahead = True

    def __init__(self, upstream: Node, terms: ShareTerms, lender: Lender) -> None:
        self._upstream = upstream
        self._terms = terms
        self._cursor: Any = None
        self._lender = lender
        self._borrower = Borrower()
        self._guests: list[_Guest] = []
        self._ready: deque[Entry] = deque()
        self._door: Door | None = None
        self._timer: TimerHandle | None = None
        self._welcomed = self._lending = self._over = self._closed = False
        self._wants = False  # see `_Guest`
        self._threads: Threads

    @property
    def extra_room(self) -> int:
        return self._upstream.extra_room

    @property
    def gaps(self) -> bool:
        return self._upstream.gaps

    @property
    def live(self) -> bool:
        return self._upstream.live

    def resume(self, cursor: Any) -> None:
        self._upstream.resume(cursor)
        self._cursor = cursor

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        terms = self._terms
        self._threads = run.threads(1, "aioloader-share")
        self._upstream.start(run, self._pump)
        self._timer = run.loop.call_later(terms.timeout, run.guarded, self._late)
        came = partial(run.guarded, self._came)
        self._door = Door(run.loop, terms.meeting(run.epoch), terms.ranks[1:], came)

    def poll(self, limit: int) -> list[Entry]:
        ready = self._ready
        taken = [ready.popleft() for _ in range(min(limit, len(ready)))]
        self._wants = len(taken) < limit
        if taken or self._wants:
            self._run.soon(self._pump)
        self.ended = self._over and not ready
        return taken

    # -- who comes ---------------------------------------------------------------------------------------------------

    def _came(self, sock: socket.socket) -> None:
        if self._welcomed:  # all are there
            sock.close()
            return
        guest = _Guest()
        run = self._run
        received, gone = partial(run.guarded, self._heard, guest), partial(run.guarded, self._gone, guest)
        guest.peer = Peer(run.loop, sock, received, gone)
        self._guests.append(guest)

    def _heard(self, guest: _Guest, message: Message) -> None:
        if self._closed:
            return
        match message.head:
            case ("hello", rank, what):
                mine = plan_of(self._terms.what, self._cursor)
                if what != mine:
                    self._give_up(
                        ValueError(
                            f"{self._terms.label}: all ranks must read the same, but rank {self._terms.rank} reads "
                            f"{mine}, and rank {rank} reads {what}"
                        )
                    )
                    return
                guest.rank = rank
                self._welcome()
            case ("closed",):
                guest.left = True
            case ("took", count, numbers, wants):
                guest.ahead -= count
                guest.wants = guest.wants or wants
                guest.borrowed.difference_update(numbers)
                self._lender.less(numbers)
                self._pump()

    def _welcome(self) -> None:
        """If all have come, say so."""
        if self._missing():
            return
        self._welcomed = True
        self._stop_waiting()
        for guest in self._guests:
            guest.peer.send(("welcome",))
        self._pump()

    def _missing(self) -> list[int]:
        there = {guest.rank for guest in self._guests}
        return [rank for rank in self._terms.ranks[1:] if rank not in there]

    def _late(self) -> None:
        self._give_up(self._terms.late("rank " + ", ".join(map(str, self._missing()))))

    def _give_up(self, error: Exception) -> None:
        """Fail before all have come, with those that have: they need not wait for themselves to be late.

        Who knocks at this moment is one of them. Who comes later finds nobody, and waits: the host may begin again.
        """
        self._stop_waiting()
        for guest in self._guests:
            guest.peer.send(("failed", error))
        self._run.fail(error)

    def _stop_waiting(self) -> None:
        if self._door is not None:
            self._door.close()
        if self._timer is not None:
            self._timer.cancel()

    def _gone(self, guest: _Guest) -> None:
        self._guests.remove(guest)
        self._lender.less(guest.borrowed)
        if not (self._welcomed or guest.left):
            who = "one" if guest.rank is None else f"rank {guest.rank}"
            self._give_up(
                WorkerDiedError(
                    f"{self._terms.label}: {who} (pid {guest.peer.pid}), for which rank {self._terms.rank} would have "
                    f"read, has died before all ranks had come"
                )
            )
        self._pump()

    # -- what they get -----------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Lend what comes, as far as the slowest has room, one list after the other."""
        if not self._welcomed or self._lending or self._over or self._closed:
            return
        room = self._room()
        if room <= 0:
            return
        self._lender.less(self._borrower.given_back())  # first: for the batch that is begun when one is taken
        taken = self._upstream.poll(1 if self._terms.batches else room)
        if taken:
            self._lending = True
            self._wants = False
            for guest in self._guests:
                guest.wants = False
            where = f"rank {self._terms.rank} (pid {os.getpid()})"
            future = self._run.submit(self._threads, self._lend, EntryParcel.of(taken, where))
            future.add_done_callback(lambda future: self._run.guarded(self._lent, future))
        elif self._upstream.ended:
            self._over = True
            for guest in self._guests:
                guest.peer.send(("end",))
            self._kick()

    def _room(self) -> int:
        """How many entries all have room for."""
        if not self._terms.room:
            return int(self._wants and not self._ready and all(guest.wants for guest in self._guests))
        return self._terms.room - max([len(self._ready), *(guest.ahead for guest in self._guests)])

    def _lend(self, parcel: EntryParcel) -> tuple[EntryParcel, Loan]:
        """In a thread: to everybody who may be there, this process too; who is gone by then gives it back at once."""
        stream, buffers = parcel.encoded()  # this process gets values of its own over the same memory
        return parcel, self._lender.lend_encoded(stream, buffers, len(self._terms.ranks))

    def _lent(self, future: "Future[tuple[EntryParcel, Loan]]") -> None:
        self._lending = False
        if future.cancelled():
            return
        parcel, loan = future.result()
        try:
            if self._closed:
                return
            places = parcel.places
            self._lender.less(loan.numbers, len(self._terms.ranks) - 1 - len(self._guests))
            for guest in self._guests:
                guest.ahead += len(places)
                guest.borrowed.update(loan.numbers)
                guest.peer.send(("entries", places, *loan.head), loan.body, loan.fds)
            values, keys, _ = self._borrower.borrow(loan.head, loan.body, loan.fds)
        finally:
            loan.close()
        for entry, own in zip(unpacked(places, values, keys), parcel.taken, strict=True):
            if own.error is not None:  # which has a traceback
                entry.error = own.error
            self._ready.append(entry)
        del values, parcel, future
        self._kick()
        self._pump()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stop_waiting()
            for guest in self._guests:
                if not self._over:
                    guest.peer.send(("closed",))
                guest.peer.close()
            self._guests.clear()
            self._lender.close()
        self._upstream.close()
