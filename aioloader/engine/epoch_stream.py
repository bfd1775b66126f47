"""A part of a pipeline at work for a node elsewhere: one epoch of it, as far as that node has granted."""

import asyncio
from functools import partial
from time import perf_counter
from typing import Final, Protocol

from aioloader.core.entry import Entry
from aioloader.engine.admission import RemoteAdmission
from aioloader.engine.pausing import Pauses, Told
from aioloader.engine.run import Run
from aioloader.insight.meters import StageMeter

__all__ = ["EpochStream", "HearsOfEpochs"]

METER_SECONDS: Final = 0.2  # how often the counters come along


class HearsOfEpochs(Protocol):
    """Whom an `EpochStream` tells."""

    def send_entries(self, number: int, taken: list[Entry], meters: list[StageMeter] | None) -> None:
        """They are finished, and had been granted."""

    def rested(self, number: int, pause: int, still: bool) -> None:
        """No sample begins any more, or none is under way either."""

    def ended(self, stream: "EpochStream") -> None:
        """The run is over, in whatever way."""


class EpochStream:
    """One epoch."""

    def __init__(
        self,
        server: HearsOfEpochs,
        number: int,
        run: Run,
        granted: int,
        pauses: Pauses,
        block: object,
        *,
        batches: bool,
    ) -> None:
        self.number = number
        self._server = server
        self._granted = granted
        self._batches = batches
        self._pauses = pauses
        self._block = block
        self._pumping = False
        self._told = 0.0
        self._told_room = 0
        self._timer: asyncio.TimerHandle | None = None
        loop = asyncio.get_running_loop()
        admission = run.output.admission
        self._admission = admission if isinstance(admission, RemoteAdmission) else None
        self.run = run
        run.active = self._active
        run.attach(loop)
        self.task = loop.create_task(run.supervise(self._kick), name="aioloader-supervisor")
        self.task.add_done_callback(self._done)

    def grant(self, entries: int, handed_out: int) -> None:
        """So many more; and so many batches were handed out."""
        self._granted += entries
        self.run.consumer.batches = handed_out
        self._kick()

    def allow(self, samples: int, handed_out: int) -> None:
        """So many may have been begun; and so many batches were handed out."""
        self.run.consumer.batches = handed_out
        if self._admission is not None:
            self._admission.allow(samples)

    def hold(self, pause: int) -> None:
        """Begin no sample; say so, and when none is under way."""
        if self._block is None:
            self._block, _ = self._pauses.enter()
        for drain in (False, True):
            told = Told(partial(self._server.rested, self.number, pause, drain))
            self.run.pausing.ask(told, drain=drain)

    def let_go(self) -> None:
        """Begin samples again."""
        self._pauses.leave(self._block)
        self._block = None

    def end(self) -> None:
        """Nobody wants any more of it."""
        self.run.request_stop()

    def _kick(self) -> None:
        if not self._pumping and self.run.started and not self.run.stopping:
            self._pumping = True
            self.run.soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        run = self.run
        if run.stopping:
            return
        while self._granted > 0:
            taken = run.output.poll(1 if self._batches else self._granted)
            if not taken:
                break
            self._granted -= len(taken)
            if self._admission is not None:
                self._admission.sent(len(taken))
            self._server.send_entries(self.number, taken, self._news())
        if meters := self._news(only_room=True):
            self._server.send_entries(self.number, [], meters)
        if run.output.ended:
            run.request_stop()

    def _news(self, *, only_room: bool = False) -> list[StageMeter] | None:
        """The counters, now and then; at once when a stage has more room than was told, or a gap."""
        meters, now = self.run.meters, perf_counter()
        room = sum(meter.room + meter.gaps for meter in meters)
        if room == self._told_room and (only_room or now - self._told < METER_SECONDS):
            return None
        self._told, self._told_room = now, room
        return [meter.to_tell() for meter in meters]

    def _active(self) -> None:
        """Something happens: tell how things are when a while has passed, though nothing may come of it."""
        if self._timer is None and not self.run.stopping:
            self._timer = self.run.loop.call_later(METER_SECONDS, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._told = 0.0
        if not self.run.stopping and (meters := self._news()):
            self._server.send_entries(self.number, [], meters)

    def _done(self, task: "asyncio.Task[None]") -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not task.cancelled() and (error := task.exception()) is not None and self.run.failure is None:
            self.run.failure = error
        self._server.ended(self)
