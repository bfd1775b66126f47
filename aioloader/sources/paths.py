"""The files that a path, a glob, or several of these stand for."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from aioloader.core.safe_text import safe_repr
from aioloader.masking import masked

__all__ = ["Identity", "Paths", "each_path", "expand_braces", "files_in", "find_files", "names_of", "refuse_url"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_files(paths: Paths, *, source: str, folders: bool = False) -> tuple[str, ...]:
    """The files of `paths`, in a stable order: as given, those of a glob sorted.

    A path stays as it is, whether or not the file exists. What looks like a glob is one, unless a file has exactly that
    name; `**` means any folders.

    Args:
        paths: A path, a glob, or a sequence of these.
        source: The name of the source, for errors.
        folders: A single path may be a folder, and stands for the files in it and in the folders in it.

    Raises:
        TypeError: Something is not a path.
        FileNotFoundError: A glob matches no file, or a folder has none.
        ValueError: There is no path.
    """
    if folders and isinstance(paths, str | os.PathLike) and Path(paths).is_dir():
        inside = sorted(files_in(os.fspath(paths)))
        if not inside:
            raise FileNotFoundError(
                f"{source}: no file in the folder {os.fspath(paths)!r} or in the folders in it, except hidden ones, "
                f"looked up from {str(Path.cwd())!r}; check the path"
            )
        return tuple(inside)
    found: list[str] = []
    for path in each_path(paths, source=source):
        if not glob.has_magic(path) or os.path.lexists(path):
            found.append(path)
            continue
        there = glob.glob(path, recursive=True)  # noqa: PTH207 - for a Path it would have to be cut in two
        matches = sorted(match for match in there if not Path(match).is_dir())
        if not matches:
            raise FileNotFoundError(
                f"{source}: no file matches the glob {safe_repr(path)}, searched from {str(Path.cwd())!r}; check the "
                f"folder and the extension, or pass a path without any of *?["
            )
        found += matches
    return tuple(found)


def refuse_url(path: str, *, source: str) -> None:
    """Refuse URLs, unless a file has exactly that name.

    Raises:
        ValueError: `path` is a URL.
    """
    if _URL.match(path) is not None and not os.path.lexists(path):
        raise ValueError(
            f"{source} takes a folder or glob of this machine, got the URL {safe_repr(path)}; pass a path (of a URL "
            f"file://... what is after that), or for stores the URLs of files, without watch"
        )


def names_of(paths: Sequence[str]) -> dict[str, Any]:
    """What a state says about files, in their order: how many there are, and a checksum of their names.

    Common parent folders do not count, so that data may be mounted elsewhere. Neither do passwords in URLs, because
    they change. A checksum, because the names of a hundred thousand files do not belong in a checkpoint.
    """
    paths = [masked(path) for path in paths] if any("://" in path for path in paths) else paths
    common = os.path.commonprefix(paths)  # noqa: RUF071 - URLs too; and it is cut at a slash
    cut = 1 + max(common.rfind("/"), common.rfind(os.sep))
    names = "\n".join(path[cut:] for path in paths)
    return {"files": len(paths), "names": sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]}


Identity = tuple[int, int]
"""Device and inode of a folder."""


def files_in(
    folder: str, above: frozenset[Identity] = frozenset(), seen: dict[Identity, dict[str, None]] | None = None
) -> Iterator[str]:
    """The files in a folder and in the folders in it, in any order; without hidden ones, as with globs.

    Links are followed, except for those that lead back to a folder that they are in.

    Args:
        folder: Where to look.
        above: The folders that it is in.
        seen: Gets the folders that were read, with their names: links may give one several.
    """
    status = os.stat(folder)  # noqa: PTH116
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    if seen is not None:
        seen.setdefault(identity, {})[folder] = None
    with os.scandir(folder) as listing:
        entries = [entry for entry in listing if not entry.name.startswith(".")]
    for entry in entries:
        if _is_folder(entry):
            yield from files_in(entry.path, above | {identity}, seen)
        else:
            yield entry.path


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which raises when it is read
        return False


def each_path(paths: object, *, source: str) -> list[str]:
    """`paths` as a list of strings, which are not looked up.

    Raises:
        TypeError: Something is not a path.
        ValueError: There is no path.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not isinstance(paths, Sequence) or isinstance(paths, bytes | bytearray):
        raise TypeError(f"{source} takes a path, a glob, or a sequence of them; got {safe_repr(paths)}")
    found = []
    for path in paths:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"{source} takes paths as str or os.PathLike; got {safe_repr(path, 80)} of type {type(path).__name__}"
            )
        found.append(os.fspath(path))
    if not found:
        raise ValueError(f"{source} needs at least one path, got none; an empty list would be an epoch without samples")
    return found


_URL: Final = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
"""With one slash where `pathlib` has made it a path."""

_BRACES: Final = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def expand_braces(text: str) -> Iterator[str]:
    """`shard-{000..002}.tar` and `{train,val}.tar` as a shell reads them; other braces stay."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    head, tail = text[: match.start()], text[match.end() :]
    first, last, names = match.groups()
    if names is not None:
        options = names.split(",")
    else:
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        options = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    for option in options:
        yield from (f"{head}{option}{rest}" for rest in expand_braces(tail))
