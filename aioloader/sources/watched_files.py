"""`Files(watch=True)`: files as they arrive in a folder, each once, when it is complete."""

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, Final

from aioloader.core.entry import Entry
from aioloader.core.safe_text import safe_repr
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.sources.file_events import FileGrowth, folders_of_links, require_watchfiles
from aioloader.sources.given_names import GivenNames
from aioloader.sources.paths import refuse_url
from aioloader.sources.read_ahead import failed
from aioloader.sources.read_file import Read, check_read, load
from aioloader.sources.watched_folder import WatchedFolder

__all__ = ["WatchedFiles"]

TEMPORARY: Final = (".tmp", ".temp", ".part", ".partial", ".crdownload", ".swp", "~")
READ_FILES: Final = 16
"""The most files that are read in one hop: the first of them waits for the last."""


class WatchedFiles(CursorSource):
    """What `Files(..., watch=True)` returns; its arguments are described there.

    When a file is complete. What the system knows exactly, that a writer has closed it (`IN_CLOSE_WRITE` on Linux), is
    not reported by watchfiles, does not exist on other systems, and would not help if a writer opens a file twice. A
    lock or a lease on the file would disturb its writer. So the only way is to wait until nothing happens: `settle`
    seconds without a notification and with the same size and time of change. An empty file waits longer, because a
    file is empty between its creation and the first write. A file that is renamed into place waits as well, because it
    looks the same as one that is created.

    Cursor: the names given so far, relative to the folder. Nothing smaller is exact: names need not be in order, copies
    and moved files keep their times of change, and files may arrive while no loader runs. So the state of a loader
    grows during the epoch by the length of a name per file that is still there; names of removed files are dropped
    from it at some point. Entries share the parts of their cursors, 512 names to a part.
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
                f"Files(watch=True) watches a folder, got {self.folder!r}, which is not a folder, looked up from "
                f"{os.getcwd()!r}; make it first, or for a file that grows use Lines(follow=True)"  # noqa: PTH109
            )

    def identity(self) -> dict[str, Any]:
        return {"pattern": "/".join(self.pattern)}

    def check_cursor(self, cursor: Any) -> None:
        GivenNames(cursor)

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        return _FolderReader(self, context, GivenNames(cursor))

    def wants(self, name: str) -> bool:
        """Whether to give the file with this name below the folder."""
        parts = name.split("/")
        if name.endswith(TEMPORARY) or any(part.startswith(".") for part in parts):
            return False
        return _matches(parts, self.pattern)

    def __repr__(self) -> str:
        return f"Files({self.folder!r}, watch=True, read={self.read!r})"


def _split(path: str) -> tuple[str, list[str]]:
    """The folder to watch, and the parts of the pattern below it."""
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


class _FolderReader(EntryReader):
    # One thread waits for notifications, and reads what is complete. If the folder is found through links, another one
    # waits for changes of these.

    def __init__(self, source: WatchedFiles, context: SourceContext, given: GivenNames) -> None:
        self._source = source
        self._given = given
        self._thread, self._links_thread = context.threads(1), context.threads(1)
        self._folder: WatchedFolder | None = None
        self._links: FileGrowth | None = None
        self._closed = False

    async def read(self, limit: int) -> list[Entry]:
        if self._folder is None:
            await self._thread.call(self._open)
            if self._links is not None:
                self._links_thread.call(self._watch_links)
        return await self._thread.call(self._read, min(limit, READ_FILES))

    def _open(self) -> None:
        folders = folders_of_links(self._source.folder)
        if folders:
            self._links = FileGrowth(folders)
        self._folder = WatchedFolder(
            self._source.folder, self._given, settle=self._source.settle, wants=self._source.wants
        )
        if self._closed:
            self._stop()

    def _watch_links(self) -> None:
        """Check that the path still leads to the folder, after each change of a link; runs in the other thread."""
        assert self._folder is not None
        assert self._links is not None
        try:
            while not self._links.stopped:
                self._folder.check_place()
                self._links.wait()
        except Exception as error:
            self._folder.stop(error)

    def _read(self, limit: int) -> list[Entry]:
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
        self._stop()  # the threads may be in `wait`
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
