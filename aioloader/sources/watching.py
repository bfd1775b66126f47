"""Waiting for a file to grow, or for files to arrive, by the notifications of the system."""

from threading import Event
from typing import Any, Final

__all__ = ["Growth", "require_watchfiles"]

STEP_MS: Final = 20
"""How long watchfiles gathers changes before it tells of them, and how soon it sees that it shall end."""

_DELETED: Final = 3  # `watchfiles.Change.deleted`


def require_watchfiles(what: str) -> None:
    """Say how to install watchfiles before anything waits for it.

    Raises:
        ImportError: It is not there.
    """
    try:
        import watchfiles  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs the package watchfiles: pip install 'aioloader[watch]'") from error


class Growth:
    """Changes of one file, or of a folder and all in it, from the moment of construction on."""

    def __init__(self, path: str) -> None:
        # Its documented lower layer: the generators around it begin to watch at their first `next`, which would be
        # after the read that found nothing, and what is written in between would be seen with the change after it.
        from watchfiles._rust_notify import RustNotify
        from watchfiles.main import _default_force_polling

        polling = _default_force_polling(None)  # file systems without notifications: WATCHFILES_FORCE_POLLING=1
        self._notify: Any = RustNotify([path], False, polling, 300, True, False)
        self._stop = Event()

    def wait(self, timeout: float | None = None) -> dict[str, bool]:
        """Block until something happened since the last call, or `stop`, or `timeout` seconds are over.

        Returns:
            The paths that were touched, and whether what was there was removed: there may be something again.
        """
        limit_ms = 0 if timeout is None else max(1, round(timeout * 1000))
        found = self._notify.watch(STEP_MS, STEP_MS, limit_ms, self._stop)
        touched: dict[str, bool] = {}
        for change, path in () if isinstance(found, str) else found:
            touched[path] = touched.get(path, False) or change == _DELETED
        return touched

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End `wait`, from any thread."""
        self._stop.set()

    def close(self) -> None:
        """End the watch."""
        self._notify.close()
