"""`python -m aioloader index`: writes the indexes of archives, or checks them."""

import fnmatch
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Final, TextIO
from urllib.parse import quote

from aioloader.core.safe_text import safe_repr
from aioloader.errors import BrokenDataError
from aioloader.executors.apart import run_apart
from aioloader.masking import mask_message, masked
from aioloader.sources.chunks import READ_BYTES, object_chunks
from aioloader.sources.paths import expand_braces
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.stores import Version, open_store
from aioloader.sources.tar import TarShards, archives_of
from aioloader.sources.tar_index import SUFFIX, TarIndex, encode_index, other_version
from aioloader.sources.tar_index_files import check_indexable, file_mark, read_index
from aioloader.sources.tar_samples import changed
from aioloader.sources.tar_scan import Scan

__all__ = ["index_archives"]

SHOWN: Final = 3  # broken samples of an archive


def index_archives(urls: Sequence[str], *, check: bool = False) -> int:
    """Write the index of each archive beside it, or compare it with its archive.

    What fails is told on standard error, and the next archive follows.

    Args:
        urls: Paths, globs and URLs; patterns in URLs are looked up in their store.
        check: Only compare: each archive is read again.

    Returns:
        The exit code: 1 if anything failed.
    """
    try:
        archives = _find(urls)
    except Exception as error:
        return _tell(error)
    failed = 0
    for archive in archives:
        try:
            (_check if check else _write)(archive)
        except Exception as error:
            failed = _tell(error)
    return failed


def _tell(error: Exception) -> int:
    mask_message(error)
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    _say(f"aioloader: {masked(text)}", sys.stderr)
    return 1


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print; names that are no text are escaped."""
    print(text.encode("utf-8", "backslashreplace").decode(), file=stream)


# -- which archives ----------------------------------------------------------------------------------------------------


def _find(urls: Sequence[str]) -> tuple[StoredFile, ...]:
    found: list[str] = []
    for url in urls:
        for one in expand_braces(url):
            found += _listed(one) if _is_pattern(one) else [one]
    archives = archives_of(TarShards(found))
    for archive in archives:
        if archive.key.endswith(SUFFIX):
            raise ValueError(f"{archive.name} is an index; pass the archive: {archive.name.removesuffix(SUFFIX)}")
    return archives


def _is_pattern(url: str) -> bool:
    """Whether a URL has to be looked up in its store. In those of HTTP a `?` begins a query."""
    scheme, separator, rest = url.partition("://")
    magic = "*[" if scheme in ("http", "https") else "*?["
    return bool(separator) and scheme != "file" and any(mark in rest for mark in magic)


def _listed(url: str) -> list[str]:
    """The URLs that match a pattern, sorted.

    Raises:
        FileNotFoundError: There are none.
    """
    base, pattern = _split(url)
    parts = pattern.split("/")
    fixed = next(number for number, part in enumerate(parts) if any(mark in part for mark in "*?["))
    store = open_store(base, {}, source="python -m aioloader index")
    try:
        keys = [item["path"] for page in store.list("/".join(parts[:fixed]) or None) for item in page]
    except Exception as error:
        mask_message(error)
        raise ValueError(
            f"what is at {masked(base)} cannot be listed: {error}; name the archives, with {{000..099}} for many"
        ) from error
    matches = sorted(key for key in keys if _matches(key.split("/"), parts))
    if not matches:
        raise FileNotFoundError(f"nothing in {masked(base)} matches {safe_repr(pattern)}")
    return [f"{base}/{quote(key)}" for key in matches]


def _split(url: str) -> tuple[str, str]:
    """The bucket or host of a URL, and what comes after it."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}", path


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the parts of a key fit those of a pattern, in which `**` is any number of folders."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[at:], patterns[1:]) for at in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


# -- what is done to each ----------------------------------------------------------------------------------------------


def _write(archive: StoredFile) -> None:
    check_indexable(archive)
    index, broken = _scanned(archive, None)
    content = encode_index(index)
    if archive.store is None:
        _replace(archive.key + SUFFIX, content)
    else:
        _put(archive, content)
    for text in broken[:SHOWN]:
        _warn(text)
    if len(broken) > SHOWN:
        _warn(f"{archive.name}: {len(broken) - SHOWN} more samples cannot be read")
    _say(f"{archive.name}{SUFFIX}: {len(index)} samples, {len(content)} bytes")


def _warn(text: str) -> None:
    _say(f"aioloader: warning: {masked(text)} (it raises in its place, as it does without an index)", sys.stderr)


def _check(archive: StoredFile) -> None:
    """Raises BrokenDataError if the index is not that of the archive."""
    index, _ = read_index(archive)
    now, _ = _scanned(archive, index)
    if (now.starts, now.key_ends, now.keys) != (index.starts, index.key_ends, index.keys):
        raise BrokenDataError(
            f"{archive.name} is not what its index says: {len(index)} samples were indexed, and {len(now)} are there, "
            f"or others; write it again: python -m aioloader index {archive.name}"
        )
    _say(f"{archive.name}{SUFFIX}: fits, {len(index)} samples")


def _scanned(archive: StoredFile, index: TarIndex | None) -> tuple[TarIndex, list[str]]:
    """The index of an archive as it is now, and what is wrong with samples in it.

    Args:
        archive: Is read from front to back.
        index: The one that it has.

    Raises:
        BrokenDataError: It cannot be read to its end, or has changed.
    """
    scan = Scan(archive)
    if archive.store is None:
        with FileIO(archive.key) as file:
            before = os.fstat(file.fileno())
            with _progress(archive.name, before.st_size) as add:
                while piece := file.read(READ_BYTES):
                    scan.feed(piece)
                    add(len(piece))
            after = os.stat(archive.key)  # noqa: PTH116
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
            raise BrokenDataError(f"{archive.name} was changed while it was read; begin again when it is complete")
        return scan.finish(file_mark(archive.key, after)), scan.broken
    version = Version(archive.store, archive.key)

    async def scan_object() -> None:
        progress: AbstractContextManager[Callable[[int], None]] | None = None
        add: Callable[[int], None] = _nothing
        try:
            async for piece in object_chunks(archive.store, archive.key, version):
                if progress is None:
                    progress = _progress(archive.name, version.size)
                    add = progress.__enter__()
                scan.feed(piece)
                add(len(piece))
        finally:
            if progress is not None:
                progress.__exit__(None, None, None)

    run_apart(scan_object)
    if index is not None and (scan.read != index.size or other_version(index.mark, version.mark)):
        raise BrokenDataError(changed(archive.name, index.size, scan.read))
    return scan.finish(version.mark), scan.broken


def _replace(path: str, content: bytes) -> None:
    """Write a file so that at no time there is half of it, nor two of it."""
    place = Path(path)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _put(archive: StoredFile, content: bytes) -> None:
    import obstore

    try:
        obstore.put(archive.store, archive.key + SUFFIX, content, use_multipart=False)
    except Exception as error:
        mask_message(error)
        raise OSError(
            f"{archive.name}{SUFFIX} cannot be written: {error}; write the indexes where the archives can be written "
            f"to, and copy them to where they are read"
        ) from error


# -- progress ----------------------------------------------------------------------------------------------------------


def _nothing(_: int) -> None:
    pass


@contextmanager
def _progress(name: str, total: int, stream: TextIO | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, of tqdm if that is installed; gives a function of the bytes that were read."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield _nothing
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _line(name, total, stream)
        return

    class QuietBar(tqdm):  # type: ignore[type-arg]
        monitor_interval = 0  # no thread

    with QuietBar(total=total, unit="B", unit_scale=True, desc=name, leave=False, file=stream) as bar:

        def add(count: int) -> None:
            bar.update(count)

        yield add


def _line(name: str, total: int, stream: TextIO) -> Iterator[Callable[[int], None]]:
    """One line that is written over, a hundred times at most."""
    read = shown = 0

    def add(count: int) -> None:
        nonlocal read, shown
        read += count
        percent = 100 * read // max(1, total)
        if percent != shown:
            shown = percent
            stream.write(f"\r{name}: {percent} %")
            stream.flush()

    try:
        yield add
    finally:
        stream.write("\r" + " " * (len(name) + 8) + "\r")
        stream.flush()
