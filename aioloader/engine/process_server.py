"""What a process of its own does: it runs parts of a pipeline, and sends what is finished. See `process_stream`."""

import asyncio
import contextlib
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from aioloader.core.entry import Entry
from aioloader.core.memory import Alloc
from aioloader.engine.epoch_stream import EpochStream
from aioloader.engine.loop_thread import new_event_loop
from aioloader.engine.pausing import Pauses
from aioloader.engine.run import Run
from aioloader.engine.travel import EntryParcel
from aioloader.executors.processes.failures import portable
from aioloader.executors.processes.layout import open_buffers
from aioloader.executors.processes.wire import decode
from aioloader.executors.processes.worker import WorkerLink
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.window import Window

__all__ = ["Serving"]

_CALLS: Final[dict[str, Callable[..., None]]] = {
    "grant": EpochStream.grant,
    "allow": EpochStream.allow,
    "hold": EpochStream.hold,
    "let go": EpochStream.let_go,
    "end": EpochStream.end,
}
"""What the other side says of an epoch that it has opened."""


@dataclass(frozen=True)
class Serving:
    """The program of a process that pipelines run in.

    Args:
        build: Gives the nodes of one epoch: called with the request, whether it is resumed, and where batches go.
    """

    build: Callable[[Any, bool, Alloc], "Window"]

    def serve(self, channel: WorkerLink, slot: int) -> None:
        """Until there is no more need of it."""
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_EngineServer(channel, self.build).serve())


class _EngineServer:
    """Runs epochs on this process's event loop, as many at a time as are asked for."""

    def __init__(self, channel: WorkerLink, build: Callable[[Any, bool, Alloc], "Window"]) -> None:
        self._channel = channel
        self._build = build
        self._streams: dict[int, EpochStream] = {}
        self._sender = _BatchSender(channel)
        self.where = f"the process of its own (pid {os.getpid()})"

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._channel.fileno(), self._readable)
        # That of uvloop lets the socket not block: then a thread that sends more than it takes would leave the rest.
        os.set_blocking(self._channel.fileno(), True)
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
                    case ("close",):
                        self._over.set_result(None)
                    case (call, number, *told, freed):
                        self._sender.put_back(freed)
                        if (stream := self._streams.get(number)) is not None:  # else the other side hears of its end
                            _CALLS[call](stream, *told)
        except BaseException as error:  # EOFError: the user's process is gone
            if not self._over.done():
                self._over.set_exception(error)

    def _open(self, number: int, stream: Any, buffers: list[memoryview]) -> None:
        try:
            request, epoch, cursor, room, batches, paused = decode(stream, buffers)
            window = self._build(request, cursor is not None, self._channel.arena.lend)
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

    def ended(self, stream: EpochStream) -> None:
        """A run is over, in whatever way."""
        del self._streams[stream.number]
        run = stream.run
        if run.failure is not None:
            self._sender.put(("failed", stream.number), portable(run.failure, self.where))
        elif run.output.ended:
            self._sender.put(("ended", stream.number), [meter.to_tell() for meter in run.meters])


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
        stream, buffers = parcel.encoded(meters)
        self._channel.send_encoded(("entries", number, parcel.places), stream, buffers)

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
