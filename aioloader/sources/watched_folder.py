"""Which files arrive in a folder, and when each is complete."""

import errno
import os
import stat
from collections.abc import Callable
from itertools import islice
from time import monotonic, time
from typing import Any, NamedTuple

from aioloader.sources.file_events import FileGrowth
from aioloader.sources.given_names import GivenNames
from aioloader.sources.paths import Identity, files_in

__all__ = ["WatchedFolder"]


class _Seen(NamedTuple):
    """The state of a file or folder that is complete at `due`, if it has not changed by then."""

    due: float
    size: int
    changed: int


class WatchedFolder:
    """The files that arrive in a folder. Not thread-safe, except for `stop`."""

    def __init__(self, folder: str, given: GivenNames, *, settle: float, wants: Callable[[str], bool]) -> None:
        self._folder = folder
        self._settle = settle
        self._wants = wants
        self._given = given
        self._root = os.path.realpath(folder)  # as notifications name it
        self._place = os.path.abspath(folder)  # noqa: PTH100
        self._identity = _identity(self._root)
        self._growth = FileGrowth([self._root], recursive=True)  # before the first look, so that nothing is missed
        self._waiting: dict[str, _Seen] = {}  # by name
        self._complete: dict[str, OSError | None] = {}  # in order; with an error for a folder that cannot be read
        self._folders_given: set[str] = set()  # folders of given names
        self._refused: set[str] = set()  # folders that cannot be read
        self._folders: dict[Identity, dict[str, None]] = {}  # their names
        self._links_made = False  # to folders, since the watch began: it does not see changes there
        self._failure: Exception | None = None
        self._first_look()

    def stop(self, failure: Exception | None = None) -> None:
        """End `take`, from any thread; it raises `failure` after the complete files."""
        self._failure = failure
        self._growth.stop()

    def close(self) -> None:
        """End the watch."""
        self._growth.close()

    def take(self, limit: int) -> list[tuple[str, Any, OSError | None]]:
        """Wait for complete files; 1 to `limit` names with their cursors, none after `stop`.

        A name with an error is that of a folder that cannot be read.
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
        """Check that the path still leads to the watched folder.

        Raises:
            OSError: The folder was removed or replaced.
        """
        identity = _identity(self._place)
        if identity is None:
            raise FileNotFoundError(
                errno.ENOENT,
                "the watched folder was removed, and nothing more can arrive in it",
                self._folder,
            )
        if identity != self._identity:
            raise OSError(errno.ESTALE, "another folder took the watched one's place", self._folder)

    def _note_folders(self, name: str) -> None:
        while (name := os.path.dirname(name)) and name not in self._folders_given:  # noqa: PTH120
            self._folders_given.add(name)

    def _forget(self, name: str) -> None:
        """Forget a file, or all files in a folder, after it was removed: what appears there now is new."""
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
            if seen is not None and seen.size and seen.changed / 1e9 < clock - self._settle:
                self._finish(name)

    def _look_over(self) -> None:
        """Look at everything, after changes may have been missed. Files that have not changed keep their due time."""
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
        if "\ufffd" in path:  # notifications garble names that are not UTF-8
            path = os.path.dirname(path)  # noqa: PTH120
        # If links give a folder several names, notifications use one of them.
        folder, base = os.path.split(path)
        identity = _identity(folder)
        others = self._folders.get(identity, {}) if identity is not None else {}
        for known in {folder: None} | others:
            name = f"{known}/{base}"[len(self._root) + 1 :]
            if removed:
                self._forget(name)
            self._look(name, monotonic())

    def _look(self, name: str, now: float) -> None:
        """Look at a file or folder that may have changed."""
        path = self._path(name)
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:  # removed or renamed
            self._waiting.pop(name, None)
            self._complete.pop(name, None)
            self._forget(name)
            return
        if stat.S_ISDIR(status.st_mode):
            # Look into it now and once more later, because it was not watched from its first moment on.
            self._waiting[name] = _Seen(now + self._settle, -1, 0)
            inside: list[str] = []
            try:
                inside = self._names_below(path)
                self._links_made = self._links_made or name in self._refused or _has_links(path)
                self._refused.discard(name)
            except (FileNotFoundError, NotADirectoryError):
                pass  # it was removed again
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
            and self._wants(name)
        ):
            self._waiting[name] = _Seen(now + self._settle, status.st_size, status.st_mtime_ns)

    def _look_again(self) -> None:
        """Look at those that are due."""
        now = monotonic()
        for _, name in sorted((seen.due, name) for name, seen in self._waiting.items() if seen.due <= now):
            before = self._waiting.pop(name)
            self._look(name, now)
            after = self._waiting.get(name)
            if after is None or after.size < 0:
                if before.size < 0:
                    self._waiting.pop(name, None)  # a folder, which has now been looked into twice
            elif not after.size:
                del self._waiting[name]  # its first byte will cause a notification
            elif (before.size, before.changed) == (after.size, after.changed):
                self._finish(name)

    def _finish(self, name: str) -> None:
        del self._waiting[name]
        self._complete[name] = None


def _identity(folder: str) -> Identity | None:
    """What tells a folder from others; None if it is not a folder."""
    try:
        status = os.stat(folder)  # noqa: PTH116
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def _has_links(folder: str) -> bool:
    """Whether it is a link, or has links to folders in it."""
    if os.path.islink(folder):  # noqa: PTH114
        return True
    return any(os.path.islink(os.path.join(here, name)) for here, names, _ in os.walk(folder) for name in names)  # noqa: PTH114, PTH118
