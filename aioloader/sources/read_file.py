"""Reads a file at once: into bytes, into a tensor, or many of one size into one tensor."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch

from aioloader.core.memory import Alloc
from aioloader.core.safe_text import add_note
from aioloader.errors import BrokenDataError
from aioloader.memory.lease import writable

__all__ = ["Read", "check_read", "load", "read_bytes", "read_stacked", "read_tensor"]

Read = Literal["bytes", "tensor"]

_READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # else Windows translates CR LF

CHECKED_BYTES: Final = 1 << 20

_HAS_READV = hasattr(os, "readv")  # not on Windows


def read_bytes(path: str) -> bytes:
    """The content of a file.

    Raises:
        BrokenDataError: It was rewritten while it was read.
        OSError: The system's own, with the path.
    """
    fd = _open(path)
    try:
        before = os.fstat(fd)
        content = os.read(fd, before.st_size + 1)
        if len(content) != before.st_size:  # it grows, or has no size, as those of /proc
            pieces = [content]
            while piece := os.read(fd, 1 << 20):
                pieces.append(piece)
            content = b"".join(pieces)
        _check_unchanged(fd, path, before, len(content))
        return content
    except OSError as error:
        raise _named(error, path) from None
    finally:
        os.close(fd)


def read_tensor(path: str) -> torch.Tensor:
    """The content of a file, uint8 [bytes].

    Raises:
        BrokenDataError: It was rewritten while it was read.
        OSError: The system's own, with the path.
    """
    fd = _open(path)
    try:
        before = os.fstat(fd)
        size = before.st_size
        content = torch.empty(size, dtype=torch.uint8, device="cpu")
        # Not a bytearray, which may begin 16 bytes after a multiple of 32: the kernel then copies at a third of the
        # speed (measured on an EPYC); torch's memory begins at multiples of 64.
        memory = writable(content) if size else memoryview(bytearray())
        fits = _read_into(fd, memory, bytearray(1)) == size
        if fits:
            _check_unchanged(fd, path, before, size)
    except OSError as error:
        raise _named(error, path) from None
    finally:
        os.close(fd)
    if not fits:  # it is being changed
        changed = bytearray(read_bytes(path))
        return torch.frombuffer(changed, dtype=torch.uint8) if changed else torch.empty(0, dtype=torch.uint8)
    return content


def read_stacked(paths: Sequence[str], alloc: Alloc) -> torch.Tensor:
    """Files of one size in one tensor, uint8 [files, bytes], each read straight into its row.

    Reading 64 KiB from the page cache costs 6 µs. Memory for each file (page faults), a copy into the batch or a hop
    into a thread would each cost more, and even three system calls make up half of it. So there is one allocation for
    all files, of memory that was used before, and no `fstat`: each read asks for one byte more than the file should
    have.

    Args:
        paths: At least one.
        alloc: Allocates the memory.

    Raises:
        OSError: The system's own, with the path.
        ValueError: The files differ in size.
    """
    size = _size(paths[0])
    batch = alloc((len(paths), size), torch.uint8)
    memory = writable(batch) if size else memoryview(bytearray())
    beyond = bytearray(1)
    begin = 0
    for path in paths:
        fd = _open(path)
        try:
            got = _read_into(fd, memory[begin : begin + size], beyond)
            if got != size:
                _differ(paths[0], size, path, max(got, os.fstat(fd).st_size))
        except OSError as error:
            raise _named(error, path) from None
        finally:
            os.close(fd)
        begin += size
    return batch


def _check_unchanged(fd: int, path: str, before: os.stat_result, length: int) -> None:
    """Refuse a file that was truncated or rewritten while it was read: half of the content may be old, half new.

    A file that a single call reads within microseconds is not checked, which would cost a sixth of the read. Appending
    does no harm, and the size of files in /proc and /sys is not that of their content.

    Raises:
        BrokenDataError: It has changed.
    """
    if before.st_size <= length < CHECKED_BYTES:
        return
    now = os.fstat(fd)
    appended = now.st_size > before.st_size
    if not appended and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise BrokenDataError(
            f"{path} was rewritten while it was read: it has {now.st_size} bytes now, and had {before.st_size}; "
            f"write under another name and rename"
        )


def _read_into(fd: int, place: memoryview, beyond: bytearray) -> int:
    """Fill `place` from the beginning of a file; returns the bytes read, one more than fit if there are more."""
    size = len(place)
    if not _HAS_READV:
        content = os.read(fd, size + 1)
        if len(content) == size:
            place[:] = content
        return len(content)
    got = total = os.readv(fd, (place, beyond))
    while got and total < size:  # a signal came, or the file system returns less than there is
        got = os.readv(fd, (place[total:], beyond))
        total += got
    return total


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError as error:
        _advise(error, path)
        raise


def _open(path: str) -> int:
    try:
        return os.open(path, _READ_ONLY)
    except OSError as error:
        _advise(error, path)
        raise


def _named(error: OSError, path: str) -> OSError:
    """`error` with the path, which errors of descriptors lack: `[Errno 21] Is a directory: '/data/images'`."""
    named = OSError(error.errno, error.strerror, path)
    _advise(named, path)
    return named


def _advise(error: OSError, path: str) -> None:
    if isinstance(error, FileNotFoundError):
        add_note(error, "aioloader: it was removed, or never existed: look files up again with a new Files(...)")
    elif isinstance(error, IsADirectoryError):
        add_note(
            error,
            f"aioloader: a file was expected; for those in a folder pass it alone, Files({path!r}), or '{path}/*'",
        )
    elif isinstance(error, PermissionError):
        add_note(error, "aioloader: make it readable for this user (chmod, chown), or leave it out of the paths")


def _differ(first: str, first_size: int, other: str, size: int) -> None:
    raise ValueError(
        f"files of one batch must have one size to be stacked, got {first_size} bytes in {first!r} and {size} in "
        f"{other!r}; pass read='bytes', or collate_fn= with a function that pads"
    )


_READERS: Final[dict[str | None, Callable[[str], Any]]] = {"bytes": read_bytes, "tensor": read_tensor, None: str}


def check_read(read: Any, with_path: bool) -> None:
    """Check the two arguments of `Files`.

    Raises:
        ValueError: One is invalid.
    """
    if not (read is None or (isinstance(read, str) and read in _READERS)):
        raise ValueError(f"read must be 'bytes', 'tensor' or None, got {read!r}")
    if with_path and read is None:
        raise ValueError("with_path=True gives pairs of path and content, got read=None: samples are paths already")


def load(path: str, read: Read | None, with_path: bool) -> Any:
    """A file as a sample of `Files`."""
    content = _READERS[read](path)
    return (path, content) if with_path else content
