"""A part of a pipeline that runs in a process of its own: the node here, and what serves it there.

For loops whose main thread is busy in Python: everything of the loader that needs the GIL, its event loop and the
user's functions included, is where another GIL is. Finished entries come in shared memory, and this side does for each
no more than unpickle it.

    this process                                    the other one
    OwnProcessNode ──"open": pass, cursor, room──▶  a run of the inner pipeline, on the event loop there
                   ◀──"entries", with cursors─────  as far as they were granted
                   ──"grant": so many more───────▶
                   ──"allow": with an admission──▶  so many samples may have been begun, all in all
                   ──"hold", "let go"────────────▶  the run pauses, and goes on
                   ◀──"paused"────────────────────  it is quiet, and then still
                   ──"end"───────────────────────▶  the run is stopped; the process stays for the next epoch

The bound: what is under way and finished in the inner pipeline, as it would be here, and `room` entries between the
two. Nobody is asked for what was not granted, so the connection never fills up.
"""

import asyncio
import contextlib
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Protocol

from aioloader.core.entry import Entry
from aioloader.engine.admission import Admission, RemoteAdmission
from aioloader.engine.loop_thread import new_event_loop
from aioloader.engine.node import Kick, Node, cheap_samples
from aioloader.engine.pausing import Pauses, Told
from aioloader.engine.run import Run
from aioloader.engine.travel import EntryParcel, unpacked
from aioloader.errors import WorkerDiedError
from aioloader.executors.processes.failures import portable
from aioloader.executors.processes.layout import open_buffers
from aioloader.executors.processes.stream_worker import (
    Arrived,
    Failure,
    Heard,
    Rested,
    StreamEnded,
    StreamWorkerDied,
)
from aioloader.executors.processes.wire import decode
from aioloader.executors.processes.worker import WorkerLink
from aioloader.executors.threads import call_loop
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.window import Window

__all__ = ["EpochStream", "OwnProcessNode", "Serving"]

METER_SECONDS: Final = 0.2  # how often the counters of the other side come along


class Remote(Protocol):
    """Where the other side is: see `StreamWorker`."""

    def open(self, request: Any, listener: Callable[[Heard], None]) -> int: ...
    def grant(self, number: int, entries: int, handed_out: int) -> None: ...
    def allow(self, number: int, samples: int, handed_out: int) -> None: ...
    def hold(self, number: int, pause: int) -> None: ...
    def let_go(self, number: int) -> None: ...
    def end(self, number: int) -> None: ...


# -- here --------------------------------------------------------------------------------------------------------------


class OwnProcessNode(Node):
    """Gives the entries of a pipeline that runs elsewhere. Cursors are those of that pipeline.

    Args:
        remote: Gives the process; called when the run begins.
        request: What `Serving.build` is called with, after whether it is resumed.
        inner: What would run here. It is never started, but knows which cursors fit.
        room: Entries between the two processes; of batches each travels alone.
        batches: Whether the entries are batches.
        admission: Who decides when samples may begin there, if they do; None: nobody but the rooms.
        size: For how many samples one of the entries stands.
    """

    def __init__(
        self,
        remote: "Callable[[], Remote]",
        request: Any,
        inner: Node,
        *,
        room: int,
        batches: bool,
        admission: Admission | None = None,
        size: int = 1,
    ) -> None:
        self._admission = admission
        self._size = size
        self._received = 0  # samples
        self._allowed = 0
        self._deciding = False
        self._get_remote = remote
        self._inner = inner
        self._request = request
        self._room = room
        self._batches = batches
        self._cursor: Any = None
        self._ready: deque[Entry] = deque()
        self._over = False
        self._failed = False  # something in there
        self._closed = False
        self._meters: list[StageMeter] = []
        self._number = 0
        self._told = 0  # batches that were handed out, as far as the other side knows
        self._pauses = 0  # how often it was paused
        self._quiet = self._still = False

    @property
    def extra_room(self) -> int:
        return min(map(cheap_samples, self._meters), default=0)

    @property
    def gaps(self) -> bool:
        return self._failed or any(meter.gaps for meter in self._meters)

    def resume(self, cursor: Any) -> None:
        self._inner.resume(cursor)
        self._cursor = cursor

    def start(self, run: "Run", kick: Kick) -> None:
        self._run = run
        self._kick = kick
        self._meters_at = len(run.meters)
        self._remote = self._get_remote()
        paused = run.pausing.paused  # from the first moment on, not from that in which "hold" arrives
        request = (self._request, run.epoch, self._cursor, self._room, self._batches, paused)
        listener = partial(call_loop, run.loop, run.guarded, self._heard)
        self._number = self._remote.open(request, listener)
        if self._admission is not None:
            self._admission.add(self)
            self.wake()
        run.pausing.join(self)

    def poll(self, limit: int) -> list[Entry]:
        ready = self._ready
        taken = [ready.popleft() for _ in range(min(limit, len(ready)))]
        handed_out = self._run.consumer.batches
        if (taken or handed_out != self._told) and not self._over:
            self._told = handed_out
            self._remote.grant(self._number, len(taken), handed_out)
        self.ended = self._over and not ready
        return taken

    def alive(self, size: int) -> int:
        return len(self._ready) * size  # what is there is for `wake` to say

    def wake(self) -> None:
        """See `AdmissionGate`. Not at once: what has just left one place may not be in the next one yet."""
        if not self._deciding:
            self._deciding = True
            self._run.soon(self._decide)

    def _decide(self) -> None:
        """Say how many samples may have been begun there, all in all.

        Those that came, and as many more as may be alive, without those that are alive here.
        """
        self._deciding = False
        if self._admission is not None and not self._over:
            allowed = self._received + self._admission.free
            if allowed > self._allowed:
                self._allowed = allowed
                self._told = self._run.consumer.batches
                self._remote.allow(self._number, allowed, self._told)

    def close(self) -> None:
        if not self._closed and self._number:
            self._closed = True
            if self._admission is not None:
                self._admission.remove(self)
            self._over = True
            self._remote.end(self._number)
            for meter in self._meters:
                meter.retired = True
                if meter.told is not None:
                    meter.told = meter.told.at_rest

    # -- a pause, see `Pausable` -------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def quiet(self) -> bool:
        return self._quiet or self._over

    @property
    def still(self) -> bool:
        return self._still or self._over

    def pause(self) -> None:
        self._pauses += 1
        self._quiet = self._still = False
        self._remote.hold(self._number, self._pauses)

    def go_on(self) -> None:
        self._remote.let_go(self._number)

    # -- what comes from there ---------------------------------------------------------------------------------------

    def _heard(self, heard: Heard) -> None:
        if self._closed:
            return
        match heard:
            case Rested(pause, still):
                if pause == self._pauses:
                    self._quiet, self._still = True, still
            case Arrived():
                self._arrived(heard)
            case StreamEnded(meters):
                self._count(meters)
                self._over = True
            case Failure(error):
                self._run.fail(error)
            case StreamWorkerDied(pid, reason):
                self._ready.append(Entry.last(self._death(pid, reason), self._cursor, None))
                self._over = True
        self._run.pausing.look()
        self._kick()

    def _death(self, pid: int | None, reason: str) -> WorkerDiedError:
        return WorkerDiedError(
            f"the process that the loader runs in (pid {pid}) {reason}; "
            f"without in_process() the same happens where you can see it"
        )

    def _arrived(self, heard: Arrived) -> None:
        if heard.error is None:
            values, keys, meters = heard.values
            self._count(meters)
        else:
            values = keys = [None] * len(heard.places)
        for entry in unpacked(heard.places, values, keys):
            entry.error = entry.error or heard.error
            self._failed = self._failed or entry.error is not None
            self._ready.append(entry)
            self._cursor = entry.cursor
            self._received += self._size
        if self._admission is not None:
            self.wake()

    def _count(self, meters: list[StageMeter] | None) -> None:
        """The newest counters of the stages there."""
        for index, theirs in enumerate(meters or ()):
            if index == len(self._meters):
                mine = self._run.adopt(StageMeter(theirs.name, theirs.kind, address=theirs.address))
                if self._run.meters[-1] is mine:  # a new one: before those of the stages here
                    self._run.meters.insert(self._meters_at + index, self._run.meters.pop())
                self._meters.append(mine)
            for field in fields(StageMeter):
                if field.name != "retired":
                    setattr(self._meters[index], field.name, getattr(theirs, field.name))
        if meters:
            self._meters[-1].ahead += self._room


# -- there -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Serving:
    """The program of a process that pipelines run in.

    Args:
        build: Gives the nodes of one epoch: called with the request, and whether it is resumed.
    """

    build: Callable[[Any, bool], "Window"]

    def serve(self, channel: WorkerLink, slot: int) -> None:
        """Until there is no more need of it."""
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_EngineServer(channel, self.build).serve())


class _EngineServer:
    """Runs epochs on this process's event loop, as many at a time as are asked for."""

    def __init__(self, channel: WorkerLink, build: Callable[[Any, bool], "Window"]) -> None:
        self._channel = channel
        self._build = build
        self._streams: dict[int, EpochStream] = {}
        self._sender = _BatchSender(channel)
        self.where = f"the process of its own (pid {os.getpid()})"

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._channel.fileno(), self._readable)
        try:
            await self._over
        finally:
            loop.remove_reader(self._channel.fileno())
            streams = list(self._streams.values())
            for stream in streams:
                stream.run.request_stop()
            if streams:
                await asyncio.wait([stream.task for stream in streams])
            self._sender.close()

    def _readable(self) -> None:
        try:
            while self._channel.ready() and not self._over.done():
                message = self._channel.next()
                match message.head:
                    case ("open", number, stream_at, layout):
                        body = memoryview(message.body)
                        self._open(number, body[stream_at:], open_buffers(body, layout))
                    case ("grant", number, entries, handed_out, freed):
                        self._sender.put_back(freed)
                        if (stream := self._streams.get(number)) is not None:
                            stream.grant(entries, handed_out)
                    case ("allow", number, samples, handed_out, freed):
                        self._sender.put_back(freed)
                        if (stream := self._streams.get(number)) is not None:
                            stream.allow(samples, handed_out)
                    case ("hold", number, pause, freed):
                        self._sender.put_back(freed)
                        if (stream := self._streams.get(number)) is not None:  # else the other side hears of its end
                            stream.hold(pause)
                    case ("let go", number, freed):
                        self._sender.put_back(freed)
                        if (stream := self._streams.get(number)) is not None:
                            stream.let_go()
                    case ("end", number, freed):
                        self._sender.put_back(freed)
                        if (stream := self._streams.get(number)) is not None:
                            stream.run.request_stop()
                    case ("close",):
                        self._over.set_result(None)
        except BaseException as error:  # EOFError: the user's process is gone
            if not self._over.done():
                self._over.set_exception(error)

    def _open(self, number: int, stream: Any, buffers: list[memoryview]) -> None:
        try:
            request, epoch, cursor, room, batches, paused = decode(stream, buffers)
            window = self._build(request, cursor is not None)
            if cursor is not None:
                window.resume(cursor)
        except BaseException as error:
            self._sender.put(("failed", number), portable(error, self.where))
            return
        pauses = Pauses()
        run = Run(window, epoch, pauses=pauses)
        block = pauses.enter()[0] if paused else None
        self._streams[number] = EpochStream(self, number, run, room, pauses, block, batches=batches)

    def send_entries(self, number: int, taken: list[Entry], meters: list[StageMeter] | None) -> None:
        """Send what has been granted."""
        self._sender.put_entries(number, taken, meters, self.where)

    def rested(self, number: int, pause: int, still: bool) -> None:
        """No sample begins any more, or none is under way either."""
        self._sender.put(("paused", number), (pause, still))

    def ended(self, stream: "EpochStream") -> None:
        """A run is over, in whatever way."""
        del self._streams[stream.number]
        run = stream.run
        if run.failure is not None:
            self._sender.put(("failed", stream.number), portable(run.failure, self.where))
        elif run.output.ended:
            self._sender.put(("ended", stream.number), [meter.to_tell() for meter in run.meters])


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
        server: "HearsOfEpochs",
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


class _BatchSender:
    """A thread that pickles, copies into shared memory and writes, so that the event loop waits for none of it."""

    def __init__(self, channel: WorkerLink) -> None:
        self._channel = channel
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="aioloader-sender", daemon=True)
        self._thread.start()

    def put(self, head: tuple[Any, ...], value: Any) -> None:
        """Send a message."""
        self._jobs.put(partial(self._channel.send, head, value))

    def put_back(self, freed: list[int]) -> None:
        """These segments can be used again: by this thread, which alone uses them."""
        if freed:
            self._jobs.put(partial(self._channel.arena.take_back, freed))

    def put_entries(self, number: int, taken: list[Entry], meters: list[StageMeter] | None, where: str) -> None:
        """Send entries."""
        self._jobs.put(partial(self._send_entries, number, taken, meters, where))

    def close(self) -> None:
        """Send what waits, and end."""
        self._jobs.put(None)
        self._thread.join()

    def _send_entries(self, number: int, taken: list[Entry], meters: list[StageMeter] | None, where: str) -> None:
        parcel = EntryParcel.of(taken, where)
        try:
            self._channel.send(("entries", number, parcel.places), (parcel.values, parcel.keys, meters))
        except OSError:
            raise
        except BaseException:
            parcel.refuse()
            self._channel.send(("entries", number, parcel.places), (parcel.values, parcel.keys, meters))

    def _main(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job()
                del job
        except OSError:  # the user's process is gone, which the event loop sees too
            with contextlib.suppress(Exception):
                while self._jobs.get() is not None:
                    pass
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # or the user's process would wait for ever
