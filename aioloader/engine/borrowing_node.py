"""A guest of `share`: gives the entries that another process of its host reads, see `lending_node.py`."""

import os
from asyncio import TimerHandle
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from aioloader.core.entry import Entry
from aioloader.engine.lending_node import ShareTerms, plan_of
from aioloader.engine.meeting import Bell, Peer, try_door
from aioloader.engine.node import Kick, Node
from aioloader.engine.travel import unpacked
from aioloader.errors import WorkerDiedError
from aioloader.executors.processes.lending import Borrower
from aioloader.executors.processes.wire import Message
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["BorrowingNode"]


class BorrowingNode(Node):
    """Gives the entries that the host lends.

    Args:
        inner: What would run here. It is never started, but knows which cursors fit.
        terms: They.
    """

    holds_ahead = True

    def __init__(self, inner: Node, terms: ShareTerms) -> None:
        self._inner = inner
        self._terms = terms
        self._cursor: Any = None
        self._resumed = False
        self._borrower = Borrower()
        self._ready: deque[Entry] = deque()
        self._bell: Bell | None = None
        self._peer: Peer | None = None
        self._timer: TimerHandle | None = None
        self._failed = False
        self._wants = False  # it has told the host so
        self._welcomed = self._over = self._closed = False
        self.meter = StageMeter(terms.label, "source")

    @property
    def gaps(self) -> bool:
        return self._failed or self._inner.gaps

    @property
    def live(self) -> bool:
        return self._inner.live

    def resume(self, cursor: Any) -> None:
        self._inner.resume(cursor)
        self._cursor = self._from = cursor

    _from: Any = None

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        self.meter = run.adopt(self.meter)
        self._meeting = self._terms.meeting(run.epoch)
        self._timer = run.loop.call_later(self._terms.timeout, run.guarded, self._late)
        self._bell = Bell(run.loop, self._meeting, self._terms.rank, partial(run.guarded, self._knock))
        self._knock()

    def poll(self, limit: int) -> list[Entry]:
        ready = self._ready
        taken = [ready.popleft() for _ in range(min(limit, len(ready)))]
        if self._peer is not None and self._welcomed:
            free = self._borrower.given_back()
            wants = not (self._terms.room or self._wants) and len(taken) < limit
            if taken or free or wants:
                self._wants = self._wants or wants
                self._peer.send(("took", len(taken), free, wants))
        self.ended = self._over and not ready
        return taken

    def _knock(self) -> None:
        if self._closed or self._peer is not None or (sock := try_door(self._meeting)) is None:
            return
        run = self._run
        self._peer = Peer(run.loop, sock, partial(run.guarded, self._heard), partial(run.guarded, self._gone))
        self._peer.send(("hello", self._terms.rank, plan_of(self._terms.what, self._from)))

    def _late(self) -> None:
        self._run.fail(self._terms.late("others" if self._peer is not None else f"rank {self._terms.ranks[0]}"))

    def _heard(self, message: Message) -> None:
        if self._closed:
            for fd in message.fds:
                os.close(fd)
            return
        match message.head:
            case ("welcome",):
                self._welcomed = True
                self._stop_waiting()
            case ("failed", error):
                self._run.fail(error)
            case ("entries", places, *loan):
                self._arrived(places, tuple(loan), message)
            case ("end",):
                self._over = True
            case ("closed",) if self._welcomed:
                self._lost("has ended its iterator")
            case ("closed",):  # it may begin this epoch again
                assert self._peer is not None
                self._peer.close()
                self._peer = None
                self._knock()
        self._kick()

    def _arrived(self, places: list[tuple[Any, ...]], loan: tuple[Any, ...], message: Message) -> None:
        try:
            values, keys, _ = self._borrower.borrow(loan, message.body, message.fds)
        except Exception as error:
            entries = [_unreadable(place, error) for place in places]
        else:
            entries = unpacked(places, values, keys)
        finally:
            for fd in message.fds:
                os.close(fd)
        self._wants = False
        for entry in entries:
            self._failed = self._failed or entry.error is not None
            self.meter.samples += 1
            self._cursor = entry.cursor
            self._ready.append(entry)

    def _gone(self) -> None:
        """The host is, without a word: its process has ended."""
        if not self._over:
            self._lost("has died")
        self._peer = None
        self._kick()

    def _lost(self, why: str) -> None:
        host = f"rank {self._terms.ranks[0]}" + ("" if self._peer is None else f" (pid {self._peer.pid})")
        error = WorkerDiedError(f"{self._terms.label}: {host}, which reads for rank {self._terms.rank}, {why}")
        self._ready.append(Entry.last(error, self._cursor, None))
        self._failed = self._over = True

    def _stop_waiting(self) -> None:
        if self._bell is not None:
            self._bell.close()
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        if not self._closed:
            self._closed = self._over = True
            self.meter.retired = True
            self._stop_waiting()
            if self._peer is not None:
                self._peer.send(("closed",))
                self._peer.close()
                self._peer = None


def _unreadable(place: tuple[Any, ...], error: Exception) -> Entry:
    entry = unpacked([place], [error], [None])[0]
    entry.value, entry.error = None, error
    return entry
