"""Waits for a file to grow, or for files to arrive, with the notifications of the operating system."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any, Final

__all__ = ["FileGrowth", "folders_of_links", "require_watchfiles"]

STEP_MS: Final = 20
"""How long watchfiles collects changes before it reports them, and how soon it notices `stop`."""

_DELETED: Final = 3  # `watchfiles.Change.deleted`
_MOST_LINKS: Final = 40  # in one path, as on Linux


def require_watchfiles(what: str) -> None:
    """Check that watchfiles is installed.

    Raises:
        ImportError: It is not.
    """
    try:
        import watchfiles  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs the package watchfiles: pip install 'aioloader[watch]'") from error


class FileGrowth:
    """Changes of files and folders, from the moment of construction on.

    Args:
        paths: What to watch; links are followed.
        recursive: Watch everything below folders, too.

    Raises:
        OSError: Something cannot be watched.
    """

    def __init__(self, paths: Sequence[str], *, recursive: bool = False) -> None:
        # watchfiles' documented lower layer. Its generators begin to watch at their first `next`: that would be after
        # the read that found nothing, so a write in between would go unnoticed until the next one.
        from watchfiles.main import _default_force_polling

        self._polling = _default_force_polling(None)  # no notifications: WATCHFILES_FORCE_POLLING=1
        self._recursive = recursive
        self._stop = Event()
        self._notify: Any = None
        self._fds: list[int] = []
        try:
            self._paths = {self._watchable(path): path for path in paths}
            self.begin_again()
        except BaseException:
            self.close()
            raise

    def _watchable(self, path: str) -> str:
        """`path`, or another name for what it leads to, if it is not UTF-8, which watchfiles does not accept."""
        try:
            path.encode()
        except UnicodeEncodeError:
            self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            return f"/proc/self/fd/{self._fds[-1]}"
        return path

    def begin_again(self) -> None:
        """Start a new watch from this moment on, which includes the targets of new links."""
        from watchfiles._rust_notify import RustNotify

        before = self._notify
        self._notify = RustNotify(list(self._paths), False, self._polling, 300, self._recursive, False)
        if before is not None:
            before.close()

    def wait(self, timeout: float | None = None) -> dict[str, bool] | None:
        """Block until there are changes since the last call, or `stop` is called, or `timeout` seconds are over.

        Returns:
            The paths that have changed, and whether something was removed there, which may have been replaced. None if
            anything may have happened; later changes are reported again.
        """
        limit_ms = 0 if timeout is None else max(1, round(timeout * 1000))
        try:
            found = self._notify.watch(STEP_MS, STEP_MS, limit_ms, self._stop)
        except RuntimeError as error:
            # A name that is not UTF-8. From then on this watch reports nothing else, and what it had collected is lost.
            if "decode" not in str(error):
                raise
            self.begin_again()
            return None
        touched: dict[str, bool] = {}
        for change, path in () if isinstance(found, str) else found:
            path = self._as_given(path)
            touched[path] = touched.get(path, False) or change == _DELETED
        return touched

    def _as_given(self, path: str) -> str:
        if self._fds:
            for watched, given in self._paths.items():
                if path == watched or path.startswith(f"{watched}/"):
                    return given + path[len(watched) :]
        return path

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End `wait`, from any thread."""
        self._stop.set()

    def close(self) -> None:
        """End the watch, and close its files."""
        if self._notify is not None:
            self._notify.close()
        while self._fds:
            os.close(self._fds.pop())


def folders_of_links(path: str) -> list[str]:
    """The readable folders of the links that `path` goes through: changes in them may change where it leads to.

    For `/mnt/app.log`, a link to `..data/app.log`, where `..data` is a link as well, that is `/mnt`.
    """
    folders: dict[str, None] = {}
    parts = [*reversed(Path(os.path.abspath(path)).parts[1:])]  # noqa: PTH100
    here = os.path.abspath(os.sep)  # noqa: PTH100
    links = 0
    while parts and links < _MOST_LINKS:
        there = os.path.join(here, parts.pop())  # noqa: PTH118
        target = None
        with contextlib.suppress(OSError):  # it is not a link, or not there
            target = os.readlink(there)  # noqa: PTH115
        if target is None:
            here = os.path.normpath(there)
            continue
        links += 1
        if os.access(here, os.R_OK):
            folders[here] = None
        if os.path.isabs(target):  # noqa: PTH117
            here = os.path.abspath(os.sep)  # noqa: PTH100
        parts += [part for part in reversed(Path(target).parts) if part != os.sep]
    return list(folders)
