"""The names of files that were already given: the cursor of watched files."""

from typing import Any, Final

from aioloader.core.cursors import cursor_parts, cursor_sequence

__all__ = ["GivenNames"]

CHUNK_NAMES: Final = 512
SEPARATOR: Final = "//"
"""Between names in a cursor: no path below a folder contains two slashes in a row."""


class GivenNames:
    """The names of files that were already given, and that are still there; see `WatchedFiles`."""

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
        packed = len(names) - len(names) % CHUNK_NAMES
        self._full = tuple(SEPARATOR.join(names[at : at + CHUNK_NAMES]) for at in range(0, packed, CHUNK_NAMES))
        self._current = tuple(names[packed:])

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def cursor(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The cursor after the last name that was added."""
        return self._full, self._current

    def add(self, name: str) -> None:
        """Add the name of a file that is given now."""
        self._names[name] = None
        self._current = (*self._current, name)
        if len(self._current) == CHUNK_NAMES:
            self._full = (*self._full, SEPARATOR.join(self._current))
            self._current = ()
            if len(self._names) < len(self._full) * CHUNK_NAMES // 2:
                self._pack()

    def names(self) -> list[str]:
        """All names, in the order in which they were added."""
        return list(self._names)

    def forget(self, name: str) -> None:
        """Remove the name of a file that was removed: another file with that name is a new one."""
        self._names.pop(name, None)

    def forget_below(self, folder: str) -> None:
        """Remove the names of all files in a folder."""
        self.keep({name for name in self._names if not name.startswith(f"{folder}/")})

    def keep(self, there: set[str]) -> None:
        """Remove all names that are not in `there`."""
        self._names = {name: None for name in self._names if name in there}
        self._pack()
