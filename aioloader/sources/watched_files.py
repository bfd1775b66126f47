"""`Files(watch=True)`: files as they arrive in a folder, each once, when it is complete."""

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

from aioloader.core.cursors import cursor_parts, cursor_sequence
from aioloader.core.entry import Entry
from aioloader.core.safe_text import safe_repr
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.sources.file_events import Growth, folders_of_links, require_watchfiles
from aioloader.sources.paths import Identity, files_in, refuse_url
from aioloader.sources.read_ahead import failed
from aioloader.sources.read_file import Read, check_read, load

__all__ = ["WatchedFiles"]

TEMPORARY: Final = (".tmp", ".temp", ".part", ".partial", ".crdownload", ".swp", "~")
READ_FILES: Final = 16
"""So many are read in one hop, at most: the first of them waits for the last."""

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
                f"Files(watch=True) takes one folder or glob, got {safe_repr(paths, 80)}; "
                f"watch each by a source of its own and join them with Pipeline.merge"
            )
        if isinstance(settle, bool) or not isinstance(settle, int | float):
            raise TypeError(f"settle must be a number of seconds, got {settle!r}")
        if not (isfinite(settle) and settle > 0):
            raise ValueError(f"settle must be more than 0 seconds, got {settle}; 0.5 is the default")
        refuse_url(os.fspath(paths), source="Files(watch=True)")
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

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        return _FolderReader(self, context, _Given(cursor))

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

    def names(self) -> list[str]:
        """All of them."""
        return list(self._names)

    def forget(self, name: str) -> None:
        """Its file was removed: another one with that name is a new one."""
        self._names.pop(name, None)

    def forget_below(self, folder: str) -> None:
        """The same for all in a folder."""
        self.keep({name for name in self._names if not name.startswith(f"{folder}/")})

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
        self._place = os.path.abspath(source.folder)  # noqa: PTH100
        self._identity = _identity(self._root)
        self._growth = Growth([self._root], recursive=True)  # before the first look, so that nothing is missed between
        self._waiting: dict[str, _Seen] = {}  # by name
        self._complete: dict[str, OSError | None] = {}  # in order; with why what is below it cannot be given
        self._folders_given: set[str] = set()  # those of the names given
        self._refused: set[str] = set()  # folders that cannot be read
        self._folders: dict[Identity, dict[str, None]] = {}  # what they are called
        self._links_made = False  # to folders, since the watch began: it does not see what happens there
        self._failure: Exception | None = None
        self._first_look()

    def stop(self, failure: Exception | None = None) -> None:
        """End `take`, from any thread; it raises `failure` after what is complete."""
        self._failure = failure
        self._growth.stop()

    def close(self) -> None:
        """End the watch."""
        self._growth.close()

    def take(self, limit: int) -> list[tuple[str, Any, OSError | None]]:
        """Wait for complete files; 1 to `limit` names with their cursors, none after `stop`.

        With an error: the name is that of a folder which cannot be looked through.
        """
        while not self._complete and not self._growth.stopped:
            due = min((seen.due for seen in self._waiting.values()), default=None)
            now = monotonic()
            if due is None or due > now:
                touched = self._growth.wait(None if due is None else due - now)
                if touched is None:
                    self._look_over()
                for path, removed in (touched or {}).items():
                    self._touched(path, removed)
            self._look_again()
            if self._links_made:
                self._links_made = False
                self._growth.begin_again()
                self._look_over()
        if self._failure is not None and not self._complete:
            raise self._failure
        taken = []
        for name in list(islice(self._complete, limit)):
            error = self._complete.pop(name)
            if error is None:
                self._given.add(name)
                self._note_folders(name)
            taken.append((name, self._given.cursor, error))
        return taken

    def check_place(self) -> None:
        """Whether the folder is still the one that is watched.

        Raises:
            OSError: It was removed, or another one has its name.
        """
        identity = _identity(self._place)
        if identity is None:
            raise FileNotFoundError(
                errno.ENOENT,
                "the watched folder was removed, and nothing more can arrive in it",
                self._source.folder,
            )
        if identity != self._identity:
            raise OSError(errno.ESTALE, "another folder took the watched one's place", self._source.folder)

    def _note_folders(self, name: str) -> None:
        while (name := os.path.dirname(name)) and name not in self._folders_given:  # noqa: PTH120
            self._folders_given.add(name)

    def _forget(self, name: str) -> None:
        """It was removed: what is there from now on is something else; of a folder that is so for all in it."""
        self._given.forget(name)
        if name in self._folders_given:
            self._folders_given.discard(name)
            self._given.forget_below(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _names_below(self, folder: str) -> list[str]:
        above, parent = set(), folder
        while parent != self._root:
            parent = os.path.dirname(parent)  # noqa: PTH120
            above.add(_identity(parent))
        found = files_in(folder, frozenset(filter(None, above)), self._folders)
        return sorted(path[len(self._root) + 1 :] for path in found)

    def _first_look(self) -> None:
        names = self._names_below(self._root)
        self._given.keep(set(names))
        for name in self._given.names():
            self._note_folders(name)
        now, clock = monotonic(), time()
        for name in names:
            self._look(name, now)
            seen = self._waiting.get(name)
            if seen is not None and seen.size and seen.changed / 1e9 < clock - self._source.settle:
                self._finish(name)

    def _look_over(self) -> None:
        """Anything may have happened. What waits and is as it was goes on waiting, not from the beginning."""
        self.check_place()
        names = self._names_below(self._root)
        there = set(names)
        self._given.keep(there)
        now = monotonic()
        gone = [name for name, seen in self._waiting.items() if seen.size >= 0 and name not in there]
        for name in [*gone, *(name for name in self._complete if name not in there)]:
            self._look(name, now)
        for name in names:
            before = self._waiting.get(name)
            self._look(name, now)
            after = self._waiting.get(name)
            if before is not None and after is not None and before[1:] == after[1:]:
                self._waiting[name] = before

    def _touched(self, path: str, removed: bool = False) -> None:
        if not path.startswith(f"{self._root}/"):
            self.check_place()
            return
        if "\ufffd" in path:  # a name that is no UTF-8 is not told as it is
            path = os.path.dirname(path)  # noqa: PTH120
        # Of a folder that links give several names, one is told.
        folder, base = os.path.split(path)
        identity = _identity(folder)
        others = self._folders.get(identity, {}) if identity is not None else {}
        for known in {folder: None} | others:
            name = f"{known}/{base}"[len(self._root) + 1 :]
            if removed:
                self._forget(name)
            self._look(name, monotonic())

    def _look(self, name: str, now: float) -> None:
        """Something happened to what has this name."""
        path = self._path(name)
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:  # removed, or renamed
            self._waiting.pop(name, None)
            self._complete.pop(name, None)
            self._forget(name)
            return
        if stat.S_ISDIR(status.st_mode):
            # It is looked through now, and when it settled: it is not watched from its first moment on.
            self._waiting[name] = _Seen(now + self._source.settle, -1, 0)
            inside: list[str] = []
            try:
                inside = self._names_below(path)
                self._links_made = self._links_made or name in self._refused or _has_links(path)
                self._refused.discard(name)
            except (FileNotFoundError, NotADirectoryError):
                pass  # removed again
            except PermissionError as error:
                if name not in self._refused:
                    self._refused.add(name)
                    self._complete[name] = error
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


def _identity(folder: str) -> Identity | None:
    """What tells a folder from others; None: it is none."""
    try:
        status = os.stat(folder)  # noqa: PTH116
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def _has_links(folder: str) -> bool:
    """Whether it is a link, or there are links to folders in it."""
    if os.path.islink(folder):  # noqa: PTH114
        return True
    return any(os.path.islink(os.path.join(here, name)) for here, names, _ in os.walk(folder) for name in names)  # noqa: PTH114, PTH118


class _FolderReader(EntryReader):
    # Its thread waits for notifications, and reads what is complete. Where the folder is found through a link, another
    # one waits for what happens to that.

    def __init__(self, source: WatchedFiles, access: SourceContext, given: _Given) -> None:
        self._source = source
        self._given = given
        self._thread, self._links_thread = access.threads(1), access.threads(1)
        self._folder: _Folder | None = None
        self._links: Growth | None = None
        self._closed = False

    async def read(self, limit: int) -> list[Entry]:
        if self._folder is None:
            await self._thread.call(self._open)
            if self._links is not None:
                self._links_thread.call(self._watch_links)
        return await self._thread.call(self._read, min(limit, READ_FILES))

    def _open(self) -> None:
        """In the thread."""
        folders = folders_of_links(self._source.folder)
        if folders:
            self._links = Growth(folders)
        self._folder = _Folder(self._source, self._given)
        if self._closed:
            self._stop()

    def _watch_links(self) -> None:
        """In the other thread: the folder must stay the one that its path leads to."""
        assert self._folder is not None
        assert self._links is not None
        try:
            while not self._links.stopped:
                self._folder.check_place()
                self._links.wait()
        except Exception as error:
            self._folder.stop(error)

    def _read(self, limit: int) -> list[Entry]:
        """In the thread."""
        assert self._folder is not None
        return [self._load(name, cursor, error) for name, cursor, error in self._folder.take(limit)]

    def _load(self, name: str, cursor: Any, refusal: OSError | None) -> Entry:
        source = self._source
        path = os.path.join(source.folder, name)  # noqa: PTH118
        if refusal is not None:
            return failed(refusal, cursor, path)
        try:
            sample = load(path, source.read, source.with_path)
        except Exception as error:
            return failed(error, cursor, path)
        return Entry(sample, cursor, path, 0)

    async def aclose(self) -> None:
        self._closed = True
        self._stop()  # the threads may be waiting
        await self._thread.call(self._close)
        if self._links is not None:
            await self._links_thread.call(self._links.close)

    def _stop(self) -> None:
        if self._folder is not None:
            self._folder.stop()
        if self._links is not None:
            self._links.stop()

    def _close(self) -> None:
        if self._folder is not None:
            self._folder.close()
