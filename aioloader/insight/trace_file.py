"""A file of trace events, in the JSON that Perfetto and chrome://tracing read."""

import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any, Final, TypeAlias
from weakref import finalize

from aioloader.core.safe_text import safe_repr
from aioloader.masking import masked

__all__ = ["FLUSH_EVENTS", "MAX_BYTES", "TraceFile", "Track"]

MAX_BYTES: Final = 256 << 20
FLUSH_EVENTS: Final = 512
FLUSH_SECONDS: Final = 1.0
LANES: Final = 1024  # side by side in one track; a stage has no more calls under way that are traced
KEY: Final = 80  # characters of a key or an error
END: Final = b"\n]\n"


Event: TypeAlias = "tuple[Any, float, float | None, int | None, int, Mapping[str, Any] | None]"
"""A name or key, begin and end (None: it has no duration), number, attempts, and what else there is to say."""


class Track:
    """Slices of one kind. Those that overlap are in different lanes, since slices of one thread must not.

    A slice is told when it ends. So a lane is free for one that began after all that were put there had ended.

    Args:
        file: Where it is.
        name: What is shown.
        number: Of all tracks, in order.
        pid: The process.
        counts: What the numbers of its slices are.

    Attributes:
        events: What is to be written; any thread appends.
    """

    def __init__(self, file: "TraceFile", name: str, number: int, pid: int, counts: str) -> None:
        self.file = file
        self.events: list[Event] = []
        self._name = masked(name)
        self._first = number << 12
        self._pid = pid
        self._counts = counts
        self._ends: list[float] = []  # when the last slice of each lane ended
        first = f'"ph":"X","pid":{pid},"tid":{self._first}'  # shared by all slices in the first lane
        self._often = f',\n{{"name":"%s",{first},"dur":%d.%d,"ts":%d.%d,"args":{{"{counts}":%d}}}}'

    def slice(self, name: str, began: float, ended: float, number: int | None = None, **about: Any) -> None:
        """Something took from `began` to `ended` (`perf_counter`)."""
        self._add((name, began, ended, number, 1, about))

    def sample(self, key: Any, began: float, ended: float, position: int | None, attempts: int) -> None:
        """A call for a sample, or for a batch, whose key is a list."""
        self.events.append((key, began, ended, position, attempts, None))
        if len(self.events) >= FLUSH_EVENTS:
            self.file.flush()

    def instant(self, name: str, **about: Any) -> None:
        """Something happened, now."""
        self._add((name, perf_counter(), None, None, 1, about))

    def _add(self, event: Event) -> None:
        self.events.append(event)
        if len(self.events) >= FLUSH_EVENTS or event[1] - self.file.flushed >= FLUSH_SECONDS:
            self.file.flush()

    def written(self, start: float) -> Iterator[str]:
        """All events so far as JSON, with times since `start`; they are let go of. Under the lock of the file."""
        # Tenths of microseconds are cut off and not rounded: what has ended before another one begins must not overlap
        # it, or it is not shown. And floats take long to write.
        events = self.events[:]
        del self.events[: len(events)]  # others append meanwhile
        ends = self._ends
        often: list[Any] = []  # the call of a sample alone in its stage is written most often: all of these at once
        for event in events:
            key, began, ended, number, attempts, about = event
            seldom = about or number is None or attempts > 1 or type(key) is list
            if seldom or ended is None or not ends or ends[0] > began:
                yield self._together(often)
                yield from self._written(event, start)
                continue
            ends[0] = ended
            at, took = int((began - start) * 1e7), int((ended - began) * 1e7)
            name = key if type(key) is int and key.bit_length() < 64 else _name(key)[1:-1]
            often += (name, took // 10, took % 10, at // 10, at % 10, number)
        yield self._together(often)

    def _together(self, often: list[Any]) -> str:
        """Slices in the first lane, which are let go of."""
        text = self._often * (len(often) // 6) % tuple(often)
        often.clear()
        return text

    def _written(self, event: Event, start: float) -> Iterator[str]:
        key, began, ended, number, attempts, about = event
        lane = self._lane(began, ended)
        if lane == LANES:
            self.file.dropped += 1
            return
        tid = self._first + lane
        if lane == len(self._ends):
            self._ends.append(began)
            name = self._name if not lane else f"{self._name} · {lane + 1}"
            for kind, what in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": tid})):
                yield f",\n{json.dumps({'ph': 'M', 'name': kind, 'pid': self._pid, 'tid': tid, 'args': what})}"
        phase = '"ph":"i","s":"t"'
        if ended is not None:
            self._ends[lane] = ended
            took = max(0, int((ended - began) * 1e7))
            phase = f'"ph":"X","dur":{took // 10}.{took % 10}'
        at = int((began - start) * 1e7)
        args = json.dumps(_plain(about)) if about else _args(key, self._counts, number, attempts)
        yield (
            f',\n{{"name":{_name(key)},{phase},"pid":{self._pid},"tid":{tid},"ts":{at // 10}.{at % 10},"args":{args}}}'
        )

    def _lane(self, began: float, ended: float | None) -> int:
        """The number of a lane that is free, of a new one if none is, or `LANES`."""
        if ended is None:  # it has no duration: the first lane, whatever is there
            return 0
        return next((lane for lane, end in enumerate(self._ends) if end <= began), len(self._ends))


class TraceFile:
    """Writes events as they come, and is valid JSON after each write: the closing bracket is written over by the next.

    Events may come from any thread. They are kept until there are some hundred, or a second has passed, and then the
    thread that is there writes them, in one call. When the file is full, it says so, and takes no more. One that is
    dropped without `close` lacks the last of them.

    Args:
        path: Where it is; what is there is replaced.
        process: What is traced, as it is shown.
        max_bytes: How large it may become.

    Attributes:
        dropped: Events for which there was no lane.
        flushed: When it was written last (`perf_counter`).
        expected: How many samples were chosen since then: so many events come to each track without a look at it.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, process: str, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.dropped = self.expected = 0
        self._max_bytes = max_bytes
        self._lock = threading.RLock()  # garbage collection may close the file while its thread is in here
        self._tracks: dict[str, Track] = {}
        self._pid = os.getpid()
        self._began = self.flushed = perf_counter()
        first = {"ph": "M", "name": "process_name", "pid": self._pid, "tid": 0, "args": {"name": masked(process)}}
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._out = _Out(descriptor)
        self._out.write(f"[\n{json.dumps(first)}".encode())
        self._finalizer = finalize(self, self._out.close)

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return not self._finalizer.alive

    @property
    def waiting(self) -> int:
        """Events that are not yet written."""
        return sum(len(track.events) for track in [*self._tracks.values()])

    def track(self, name: str, counts: str = "position") -> Track:
        """The track of this name, whose slices have numbers of `counts`; a new one is below all others."""
        with self._lock:
            if name not in self._tracks:
                self._tracks[name] = Track(self, name, len(self._tracks) + 1, self._pid, counts)
            return self._tracks[name]

    def flush(self) -> None:
        """Write what has come."""
        with self._lock:
            if not self._finalizer.alive:
                for track in self._tracks.values():
                    track.events.clear()
                return
            if os.getpid() != self._pid:  # a forked child: the file is the parent's
                self._finalizer.detach()
                return
            self._write()
            if self._out.size >= self._max_bytes:
                self._finalizer()
                warnings.warn(
                    f"the trace in {self.path} ends here, since it has max_bytes={self._max_bytes}; trace one of more "
                    f"samples, or pass a larger max_bytes",
                    stacklevel=2,
                )

    def _write(self) -> None:
        self.flushed, self.expected = perf_counter(), 0
        content = "".join([text for track in self._tracks.values() for text in track.written(self._began)])
        if not self._finalizer.alive:  # it was closed meanwhile, by a garbage collection in this thread
            return
        try:
            self._out.write(content.encode())
        except OSError as error:
            self._finalizer()
            warnings.warn(f"the trace in {self.path} ends here, since it cannot be written: {error}", stacklevel=2)

    def close(self) -> None:
        """Write what has come, and take no more. Idempotent."""
        with self._lock:
            self.flush()
            self._finalizer()


class _Out:
    """The open file: all but the closing bracket."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = 0

    def write(self, content: bytes) -> None:
        content += END
        written = 0
        while written < len(content):
            written += os.pwrite(self._descriptor, content[written:], self.size + written)
        self.size += len(content) - len(END)

    def close(self) -> None:
        os.close(self._descriptor)


def _name(key: Any) -> str:
    """What a slice is called, as JSON."""
    if type(key) is int and key.bit_length() < 64:
        return f'"{key}"'
    if type(key) is list:
        return f'"{len(key)} samples"'
    return _quoted(key) if type(key) is str else json.dumps(_cut(_text(key)))


@lru_cache(64)
def _quoted(text: str) -> str:
    return json.dumps(_cut(_text(text)))


def _args(key: Any, counts: str, number: int | None, attempts: int) -> str:
    parts = [] if number is None else [f'"{counts}":{number}']
    if type(key) is list and key:
        parts.append(f'"first key":{_name(key[0])},"last key":{_name(key[-1])}')
    if attempts > 1:
        parts.append(f'"attempt":{attempts}')
    return f"{{{','.join(parts)}}}"


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if type(value) in (int, float) else _cut(_text(value)) for name, value in about.items()}


def _text(value: Any) -> str:
    return masked(value if type(value) is str else safe_repr(value, KEY))


def _cut(text: str) -> str:
    return text if len(text) <= KEY else f"{text[: KEY - 3]}..."
