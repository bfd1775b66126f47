"""A file of trace events, in the JSON that Perfetto and chrome://tracing read."""

import json
import os
import threading
import warnings
from collections import deque
from collections.abc import Mapping
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


Event: TypeAlias = "tuple[Track, Any, float, float | None, int | None, int, Mapping[str, Any] | None]"
"""Where, a name or key, begin and end (None: it has no duration), position, attempts, and what else there is to say."""


class Track:
    """Slices of one kind. Those that overlap are in different lanes, since slices of one thread must not.

    A slice is told when it ends. So a lane is free for one that began after all that were put there had ended.

    Args:
        file: Where it is.
        name: What is shown.
        number: Of all tracks, in order.
        pid: The process, as JSON.

    Attributes:
        ends: When the last slice of each lane ended.
        first: What all slices in its first lane have in common.
    """

    def __init__(self, file: "TraceFile", name: str, number: int, pid: str) -> None:
        self.file = file
        self.name = name
        self.ends: list[float] = []
        self.first = f'"ph":"X",{pid}"tid":{number << 12},'
        self._number = number

    def slice(self, name: str, began: float, ended: float, **about: Any) -> None:
        """Something took from `began` to `ended` (`perf_counter`)."""
        self.file.add((self, name, began, ended, None, 1, about))

    def sample(self, key: Any, began: float, ended: float, position: int | None, attempts: int) -> None:
        """A call for a sample, or for a batch, whose key is a list."""
        events = self.file.events
        events.append((self, key, began, ended, position, attempts, None))
        if len(events) >= FLUSH_EVENTS:
            self.file.flush()

    def instant(self, name: str, **about: Any) -> None:
        """Something happened, now."""
        self.file.add((self, name, perf_counter(), None, None, 1, about))

    def lane(self, began: float, ended: float | None) -> int:
        """The number of a lane; -1: there is none. Under the lock of the file."""
        first, ends = self._number << 12, self.ends
        if ended is None:  # it has no duration: the first lane, whatever is there
            if not ends:
                self.file.introduce(self.name, first, 0)
                ends.append(began)
            return first
        for lane, end in enumerate(ends):
            if end <= began:
                ends[lane] = ended
                return first + lane
        lane = len(ends)
        if lane >= LANES:
            return -1
        self.file.introduce(self.name, first + lane, lane)
        ends.append(ended)
        return first + lane


class TraceFile:
    """Writes events as they come, and is valid JSON after each write: the closing bracket is written over by the next.

    Events may come from any thread. They are kept until there are some hundred, or a second has passed, and then the
    thread that is there writes them, in one call. When the file is full, it says so, and takes no more. One that is
    dropped without `close` lacks the last of them.

    Args:
        path: Where it is; what is there is replaced.
        process: What is traced, as it is shown.
        max_bytes: How large it may become.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, process: str, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.dropped = 0
        self._max_bytes = max_bytes
        self._lock = threading.RLock()  # garbage collection may close the file while its thread is in here
        self._tracks: list[Track] = []
        self.events: deque[Event] = deque()  # any thread appends
        self._lines: list[str] = []
        self._pid = os.getpid()
        self._process = f'"pid":{self._pid},'
        self._began = self._flushed = perf_counter()
        first = {"ph": "M", "name": "process_name", "pid": self._pid, "tid": 0, "args": {"name": masked(process)}}
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._out = _Out(descriptor)
        self._out.write(f"[\n{json.dumps(first)}".encode())
        self._finalizer = finalize(self, self._out.close)

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return not self._finalizer.alive

    def track(self, name: str) -> Track:
        """The track of this name; a new one is below all others."""
        with self._lock:
            found = next((track for track in self._tracks if track.name == name), None)
            if found is None:
                found = Track(self, name, len(self._tracks) + 1, self._process)
                self._tracks.append(found)
            return found

    def add(self, event: Event) -> None:
        """Add an event; it becomes text when it is written, many at a time."""
        self.events.append(event)
        if len(self.events) >= FLUSH_EVENTS or event[2] - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def _format(self, event: Event) -> None:
        track, key, began, ended, position, attempts, about = event
        if (tid := track.lane(began, ended)) < 0:
            self.dropped += 1
            return
        at = int((began - self._began) * 1e7)
        took = -1 if ended is None else max(0, int((ended - began) * 1e7))
        what = '"ph":"i","s":"t"' if took < 0 else f'"ph":"X","dur":{took // 10}.{took % 10}'
        args = _args(key, position, attempts) if about is None else json.dumps(_plain(about))
        self._lines.append(
            f',\n{{"name":{_name(key)},{what},{self._process}"tid":{tid},"ts":{at // 10}.{at % 10},"args":{args}}}'
        )

    def introduce(self, name: str, tid: int, lane: int) -> None:
        """A lane of the track `name` has the thread number `tid` from now on. Under the lock."""
        name = masked(name) if not lane else f"{masked(name)} · {lane + 1}"
        for kind, args in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": tid})):
            event = {"ph": "M", "name": kind, "pid": self._pid, "tid": tid, "args": args}
            self._lines.append(f",\n{json.dumps(event)}")

    def flush(self) -> None:
        """Write what has come."""
        with self._lock:
            if not self._finalizer.alive:
                self.events.clear()
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
        # Tenths of microseconds, cut off and not rounded: what has ended before another one begins must not overlap it,
        # or it is not shown. And floats take long to write.
        events, start = self.events, self._began
        self._flushed = perf_counter()
        while events:
            event = events.popleft()
            track, key, began, ended, position, attempts, about = event
            ends = track.ends
            seldom = about or type(key) is not int or attempts > 1 or position is None
            if seldom or ended is None or not ends or ends[0] > began:
                self._format(event)
                continue
            ends[0] = ended  # what is written most often, in half the time: the call of a sample alone in its stage
            at, took = int((began - start) * 1e7), int((ended - began) * 1e7)
            self._lines.append(
                f',\n{{"name":"{key}",{track.first}"dur":{took // 10}.{took % 10},'
                f'"ts":{at // 10}.{at % 10},"args":{{"position":{position}}}}}'
            )
        lines, self._lines = self._lines, []
        try:
            self._out.write("".join(lines).encode())
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
    if type(key) is int:
        return f'"{key}"'
    if type(key) is list:
        return f'"{len(key)} samples"'
    return json.dumps(_cut(_text(key)))


def _args(key: Any, position: int | None, attempts: int) -> str:
    parts = [] if position is None else [f'"position":{position}']
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
