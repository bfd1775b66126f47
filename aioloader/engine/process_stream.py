"""A part of a pipeline that runs in a process of its own: the node here. `process_server` serves it there.

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

from collections import deque
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from aioloader.core.entry import Entry
from aioloader.engine.admission import Admission
from aioloader.engine.node import Kick, Node, cheap_samples
from aioloader.engine.travel import unpacked
from aioloader.errors import WorkerDiedError
from aioloader.executors.processes.stream_worker import (
    Arrived,
    Failure,
    Heard,
    Rested,
    StreamEnded,
    StreamWorkerDied,
)
from aioloader.executors.threads import call_loop
from aioloader.insight.meters import StageMeter

if TYPE_CHECKING:
    from aioloader.engine.run import Run

__all__ = ["OwnProcessNode"]


class Remote(Protocol):
    """Where the other side is: see `StreamWorker`."""

    def open(self, request: Any, listener: Callable[[Heard], None]) -> int: ...
    def grant(self, number: int, entries: int, handed_out: int) -> None: ...
    def allow(self, number: int, samples: int, handed_out: int) -> None: ...
    def hold(self, number: int, pause: int) -> None: ...
    def let_go(self, number: int) -> None: ...
    def end(self, number: int) -> None: ...


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
