"""Parts of a pipeline at work in an actor: each is a run on the actor's event loop, which is asked for its entries.

Other than in a process of its own, nothing is sent that nobody waits for: each read brings the leave for some entries
more, and takes the next ones back. So what is finished is in the object store only if somebody is about to fetch it.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from aioloader.core.entry import Entry
from aioloader.core.memory import Alloc
from aioloader.engine.call_gate import CallGate
from aioloader.engine.epoch_stream import EpochStream
from aioloader.engine.pausing import Pauses, Told
from aioloader.engine.run import Run
from aioloader.engine.travel import EntryParcel
from aioloader.engine.window import Window
from aioloader.executors.processes.failures import portable
from aioloader.executors.ray.same_host import PartPost
from aioloader.executors.ray.same_host import Told as SegmentsTold
from aioloader.executors.ray.values import pack
from aioloader.executors.threads import call_loop
from aioloader.insight.meters import StageMeter

__all__ = ["RayServing"]


@dataclass(frozen=True)
class RayServing:
    """The program of an actor that parts of a pipeline run in.

    Args:
        build: Gives the nodes of one part: called with the request, whether it is resumed, what is to be asked before a
            function of the user's is called, and where batches go.
    """

    build: Callable[[Any, bool, CallGate | None, Alloc], Window]

    def begin(self, where: str) -> "PartServer":
        """In the actor, which `where` names."""
        return PartServer(self.build, where)


class PartServer:
    """Runs parts, as many at a time as are asked for. See `ServesParts`."""

    def __init__(self, build: Callable[[Any, bool, CallGate | None, Alloc], Window], where: str) -> None:
        self._build = build
        self.where = where
        self._parts: dict[str, _Part] = {}

    async def open(self, wire: str, request: Any) -> None:
        its, epoch, cursor, batches, paused, suspects = request
        loop = asyncio.get_running_loop()
        gate = CallGate(partial(call_loop, loop), suspects) if suspects is not None else None
        post = PartPost()
        window = self._build(its, cursor is not None, gate, post.alloc)
        if cursor is not None:
            window.resume(cursor)
        self._parts[wire] = _Part(window, epoch, gate, post, batches=batches, paused=paused, where=self.where)

    async def read(self, wire: str, number: int, more: int, handed_out: int, told: SegmentsTold | None = None) -> Any:
        part = self._parts.get(wire)
        if part is None:
            return ("gone",)
        if told is not None:
            part.post.hear(told)
        part.stream.grant(more, handed_out)
        return await part.take(number)

    async def rest(self, wire: str, pause: int, drain: bool) -> None:
        if (part := self._parts.get(wire)) is not None:
            await part.rest(pause, drain=drain)

    def let_go(self, wire: str, pause: int) -> None:
        if (part := self._parts.get(wire)) is not None:
            part.let_go(pause)

    async def watch(self, wire: str, number: int) -> Any:
        part = self._parts.get(wire)
        if part is None or part.gate is None:
            return None
        asked = await part.gate.watch(number)
        return None if asked is None else (number, asked.stage, asked.key, asked.name)

    def go(self, wire: str, number: int | None) -> None:
        if (part := self._parts.get(wire)) is not None and part.gate is not None:
            part.gate.go(number)

    def end(self, wire: str) -> None:
        if (part := self._parts.pop(wire, None)) is not None:
            part.end()

    async def close(self) -> None:
        parts, self._parts = list(self._parts.values()), {}
        for part in parts:
            part.end()
        tasks = [part.stream.task for part in parts]
        if tasks:
            await asyncio.wait(tasks)


class _Part:
    """One part, from `open` to `end`: what it has made waits here for reads, which are answered in their order."""

    def __init__(
        self,
        window: Window,
        epoch: int,
        gate: CallGate | None,
        post: PartPost,
        *,
        batches: bool,
        paused: int,
        where: str,
    ) -> None:
        self.gate = gate
        self.post = post
        self._where = where
        self._made: deque[tuple[list[Entry], list[StageMeter] | None]] = deque()
        self._news: list[StageMeter] | None = None
        self._last: tuple[Any, ...] | None = None  # what all reads get after the end
        self._reads: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self._pauses = Pauses()
        self._block: object = None
        self._held = self._released = 0  # the newest pause, and the newest one that is over
        run = Run(window, epoch, pauses=self._pauses)
        if paused:
            self._hold(paused)
        self.stream = EpochStream(self, 0, run, 0, self._pauses, None, batches=batches)

    async def take(self, number: int) -> Any:
        """What read number `number` gets."""
        read = self._reads[number] = asyncio.get_running_loop().create_future()
        self._answer()
        return await read

    def _answer(self) -> None:
        while self._next in self._reads and (self._made or self._last is not None):
            read = self._reads.pop(self._next)
            self._next += 1
            answer = self._entries(*self._made.popleft()) if self._made else self._last
            if not read.done():  # else its caller is gone
                read.set_result(answer)

    def _entries(self, taken: list[Entry], meters: list[StageMeter] | None) -> tuple[Any, ...]:
        parcel = EntryParcel.of(taken, self._where)
        meters, self._news = meters or self._news, None
        stream, buffers = parcel.encoded(meters)
        return "entries", parcel.places, self.post.pack(stream, buffers)

    # -- what `EpochStream` tells ------------------------------------------------------------------------------------

    def send_entries(self, number: int, taken: list[Entry], meters: list[StageMeter] | None) -> None:
        """They are finished."""
        if taken:
            self._made.append((taken, meters))
            self._answer()
        else:
            self._news = meters  # they go with the next ones

    def rested(self, number: int, pause: int, still: bool) -> None:
        """Not asked for here, see `rest`."""

    def ended(self, stream: EpochStream) -> None:
        """The run is over, in whatever way."""
        run = stream.run
        if run.failure is not None:
            self._last = "failed", pack(portable(run.failure, self._where))
        elif run.output.ended:
            self._last = "ended", pack([meter.to_tell() for meter in run.meters])
        else:
            self._last = ("gone",)
        self._answer()

    # -- pauses: calls come in any order, so that each says which pause it is about -----------------------------------

    async def rest(self, pause: int, *, drain: bool) -> None:
        """See `ServesParts`."""
        if pause <= self._released:
            return
        self._hold(pause)
        rested = asyncio.get_running_loop().create_future()
        self.stream.run.pausing.ask(Told(partial(_done, rested)), drain=drain)
        await rested

    def let_go(self, pause: int) -> None:
        """See `ServesParts`."""
        self._released = max(self._released, pause)
        if self._block is not None and self._held <= self._released:
            block, self._block = self._block, None
            self._pauses.leave(block)

    def _hold(self, pause: int) -> None:
        self._held = max(self._held, pause)
        if self._block is None:
            self._block, _ = self._pauses.enter()

    def end(self) -> None:
        """Nobody reads any more."""
        self.post.close()
        if self.gate is not None:
            self.gate.go(None)  # or threads would wait in it for ever
        self.stream.run.request_stop()


def _done(rested: "asyncio.Future[None]") -> None:
    if not rested.done():
        rested.set_result(None)
