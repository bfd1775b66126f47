"""`Files(watch=True)`: files as they arrive in a folder, each once, when it is complete."""

import contextlib
import errno
import glob
import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import islice
from math import isfinite
from time import monotonic, time
from typing import Any, Final, NamedTuple

from aioloader.engine.entry import Entry
from aioloader.engine.located import Access, CursorSource, EntryReader
from aioloader.engine.progress import cursor_parts, cursor_sequence
from aioloader.sources.ahead import failed
from aioloader.sources.paths import files_in
from aioloader.sources.watching import Growth, require_watchfiles
from aioloader.sources.whole import Read, check_read, load

__all__ = ["WatchedFiles"]

TEMPORARY: Final = (".tmp", ".temp", ".part", ".partial", ".crdownload", ".swp", "~")
READ_FILES: Final = 16
"""So many are read in one crossing, at most: the first of them waits for the last."""

CHUNK_NAMES: Final = 512
SEPARATOR: Final = "//"
"""Between names in a cursor: a path that is put together from names has no two slashes side by side."""


class WatchedFiles(CursorSource):
    """What `Files(..., watch=True)` is; its arguments are described there.

    The rule for "complete". What the system knows exactly, the end of a writer (`IN_CLOSE_WRITE` on Linux), is not told
    by watchfiles, does not exist on other systems, and would not help with a writer who opens a file twice. A lock or a
    lease on the file would disturb its writer. So what remains is to wait until nothing happens: `settle` seconds
    without a notification, with size and time of change as they were before, and something in it, since a file is
    empty between its creation and the first write, however long that takes. A file that is renamed into place waits as
    well: it cannot be told from one that is created.

    Cursor: the names given so far, below the folder. Nothing smaller is exact: names need not grow, times of change
    are kept by those who copy and move files, and files arrive while nobody watches. The state of a loader therefore
    grows with the epoch, by the length of a name per file that is still there; names of files that have been removed
    are left out of it in time. Entries share their cursors' parts, 512 names to a part.
    """

    live = True

    def __init__(
        self, paths: Any, *, read: Read | None = "bytes", with_path: bool = False, settle: float = 0.5
    ) -> None:
        check_read(read, with_path)
        require_watchfiles("Files(watch=True)")
        if not isinstance(paths, str | os.PathLike):
            raise TypeError(
                f"Files(watch=True) takes one folder or glob, got {paths!r:.80}; "
                f"watch each by a source of its own and join them with Pipeline.merge"
            )
        if isinstance(settle, bool) or not isinstance(settle, int | float):
            raise TypeError(f"settle must be a number of seconds, got {settle!r}")
        if not (isfinite(settle) and settle > 0):
            raise ValueError(f"settle must be more than 0 seconds, got {settle}; 0.5 is the default")
        self.read = read
        self.with_path = bool(with_path)
        self.settle = float(settle)
        self.folder, self.pattern = _split(os.fspath(paths))
        if not os.path.isdir(self.folder):  # noqa: PTH112
            kind = NotADirectoryError if os.path.lexists(self.folder) else FileNotFoundError
            raise kind(
                f"Files(watch=True) watches a folder, got {self.folder!r}, which is none, looked at from "
                f"{os.getcwd()!r}; make it first, or for a file that grows use Lines(follow=True)"  # noqa: PTH109
            )

    def identity(self) -> dict[str, Any]:
        return {"pattern": "/".join(self.pattern)}

    def check_cursor(self, cursor: Any) -> None:
        _Given(cursor)

    def open(self, access: Access, cursor: Any) -> EntryReader:
        return _Reader(self, access, _Given(cursor))

    def wants(self, name: str) -> bool:
        """Whether the file with this name below the folder is one of those to be given."""
        parts = name.split("/")
        if name.endswith(TEMPORARY) or any(part.startswith(".") for part in parts):
            return False
        return _matches(parts, self.pattern)

    def __repr__(self) -> str:
        return f"Files({self.folder!r}, watch=True, read={self.read!r})"


def _split(path: str) -> tuple[str, list[str]]:
    """A folder, and the names in it that are meant."""
    if not glob.has_magic(path) or os.path.lexists(path):
        return path, ["**"]
    parts = path.split("/")
    at = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    folder = "/".join(parts[:at])
    return folder or ("/" if path.startswith("/") else "."), parts[at:]


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether names match a glob, part by part; `**` stands for any number of them."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        if patterns == ["**"]:
            return True
        return any(_matches(parts[at:], patterns[1:]) for at in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


class _Given:
    """The names that were given; see `WatchedFiles`."""

    def __init__(self, cursor: Any) -> None:
        full, current = ((), ()) if cursor is None else cursor_parts(cursor, 2)
        parts = cursor_sequence(full), cursor_sequence(current)
        if not all(isinstance(name, str) for part in parts for name in part):
            raise ValueError(f"names of files were expected, got {cursor!r}"[:200])
        names = [name for part in parts[0] for name in part.split(SEPARATOR)]
        self._names = dict.fromkeys([*names, *parts[1]])
        self._pack()

    def _pack(self) -> None:
        names = list(self._names)
        whole = len(names) - len(names) % CHUNK_NAMES
        self._full = tuple(SEPARATOR.join(names[at : at + CHUNK_NAMES]) for at in range(0, whole, CHUNK_NAMES))
        self._current = tuple(names[whole:])

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def cursor(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Where to go on."""
        return self._full, self._current

    def add(self, name: str) -> None:
        """One more."""
        self._names[name] = None
        self._current = (*self._current, name)
        if len(self._current) == CHUNK_NAMES:
            self._full = (*self._full, SEPARATOR.join(self._current))
            self._current = ()
            if len(self._names) < len(self._full) * CHUNK_NAMES // 2:
                self._pack()

    def forget(self, name: str) -> None:
        """Its file was removed: another one with that name is a new one."""
        self._names.pop(name, None)

    def keep(self, there: set[str]) -> None:
        """Forget all whose file is not there any more."""
        self._names = {name: None for name in self._names if name in there}
        self._pack()


class _Seen(NamedTuple):
    """A file, or a folder, that may be complete at `due`, if it is then as it was when it was looked at."""

    due: float
    size: int
    changed: int


class _Folder:
    """What arrives in a folder, for one thread."""

    def __init__(self, source: WatchedFiles, given: _Given) -> None:
        self._source = source
        self._given = given
        self._root = os.path.realpath(source.folder)  # which is how notifications name it
        self._growth = Growth(self._root)  # before the first look, so that nothing is missed in between
        self._waiting: dict[str, _Seen] = {}  # by name
        self._complete: dict[str, None] = {}  # in order
        self._first_look()

    def stop(self) -> None:
        """End `take`, from any thread."""
        self._growth.stop()

    def close(self) -> None:
        """End the watch."""
        self._growth.close()

    def take(self, limit: int) -> list[tuple[str, Any]]:
        """Wait for complete files; 1 to `limit` names with their cursors, none after `stop`."""
        while not self._complete and not self._growth.stopped:
            due = min((seen.due for seen in self._waiting.values()), default=None)
            now = monotonic()
            if due is None or due > now:
                for path, removed in self._growth.wait(None if due is None else due - now).items():
                    self._touched(path, removed)
            self._look_again()
        taken = []
        for name in list(islice(self._complete, limit)):
            del self._complete[name]
            self._given.add(name)
            taken.append((name, self._given.cursor))
        return taken

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _names_below(self, folder: str) -> list[str]:
        return sorted(path[len(self._root) + 1 :] for path in files_in(folder))

    def _first_look(self) -> None:
        names = self._names_below(self._root)
        self._given.keep(set(names))
        now, clock = monotonic(), time()
        for name in names:
            self._look(name, now)
            seen = self._waiting.get(name)
            if seen is not None and seen.size and seen.changed / 1e9 < clock - self._source.settle:
                self._finish(name)

    def _touched(self, path: str, removed: bool = False) -> None:
        if not path.startswith(f"{self._root}/"):
            if not os.path.isdir(self._root):  # noqa: PTH112
                raise FileNotFoundError(
                    errno.ENOENT,
                    "the watched folder was removed, and nothing more can arrive in it",
                    self._source.folder,
                )
            return
        if "\ufffd" in path:  # a name that is no UTF-8 is not told as it is
            path = os.path.dirname(path)  # noqa: PTH120
        name = path[len(self._root) + 1 :]
        if removed:
            self._given.forget(name)  # what is there now is another file
        self._look(name, monotonic())

    def _look(self, name: str, now: float) -> None:
        """Something happened to what has this name."""
        path = self._path(name)
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:  # removed, or renamed
            self._waiting.pop(name, None)
            self._complete.pop(name, None)
            self._given.forget(name)
            return
        if stat.S_ISDIR(status.st_mode):
            # It is looked through now, and when it settled: it is not watched from its first moment on.
            self._waiting[name] = _Seen(now + self._source.settle, -1, 0)
            inside: list[str] = []
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed again
                inside = self._names_below(path)
            for below in inside:
                if below not in self._waiting:
                    self._look(below, now)
        elif (
            stat.S_ISREG(status.st_mode)
            and name not in self._given
            and name not in self._complete
            and self._source.wants(name)
        ):
            self._waiting[name] = _Seen(now + self._source.settle, status.st_size, status.st_mtime_ns)

    def _look_again(self) -> None:
        """At those that are due."""
        now = monotonic()
        for _, name in sorted((seen.due, name) for name, seen in self._waiting.items() if seen.due <= now):
            before = self._waiting.pop(name)
            self._look(name, now)
            after = self._waiting.get(name)
            if after is None or after.size < 0:
                if before.size < 0:
                    self._waiting.pop(name, None)  # a folder, for the second time
            elif not after.size:
                del self._waiting[name]  # its first byte will be told
            elif (before.size, before.changed) == (after.size, after.changed):
                self._finish(name)

    def _finish(self, name: str) -> None:
        del self._waiting[name]
        self._complete[name] = None


class _Reader(EntryReader):
    # Its thread waits for notifications, and reads what is complete.

    def __init__(self, source: WatchedFiles, access: Access, given: _Given) -> None:
        self._source = source
        self._given = given
        self._thread = access.threads(1)
        self._folder: _Folder | None = None
        self._closed = False

    async def read(self, limit: int) -> list[Entry]:
        return await self._thread.call(self._read, min(limit, READ_FILES))

    def _read(self, limit: int) -> list[Entry]:
        """In the thread."""
        if self._folder is None:
            self._folder = _Folder(self._source, self._given)
            if self._closed:
                self._folder.stop()
        return [self._load(name, cursor) for name, cursor in self._folder.take(limit)]

    def _load(self, name: str, cursor: Any) -> Entry:
        source = self._source
        path = os.path.join(source.folder, name)  # noqa: PTH118
        try:
            sample = load(path, source.read, source.with_path)
        except Exception as error:
            return failed(error, cursor, path)
        return Entry(sample, cursor, path, 0)

    async def aclose(self) -> None:
        self._closed = True
        if self._folder is not None:
            self._folder.stop()  # the thread may be waiting
        await self._thread.call(self._close)

    def _close(self) -> None:
        if self._folder is not None:
            self._folder.close()
