"""Decompresses data that arrives in pieces, into pieces of bounded size."""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from aioloader.errors import BrokenDataError
from aioloader.masking import masked

__all__ = ["MAX_WINDOW_BYTES", "Decompressor", "decompressor_for", "is_compressed"]

PIECE_BYTES: Final = 1 << 20
"""The most that comes out at once: a megabyte of input may hold a gigabyte of zeros."""

FIRST_BYTES: Final = 16 << 10
"""How much a new decoder gets first; each call doubles it. A decoder copies what comes after its frame, and a megabyte
may hold 50,000 frames."""

MAX_WINDOW_BYTES: Final = 1 << 30
"""How far back a zstd frame may refer by default: the decoder keeps that much of its output. `zstd --long` asks for
128 MiB, `zstd --long=30` for 1 GiB, and `--long=31` for 2 GiB, which is the maximum."""

_LARGEST_WINDOW_LOG: Final = 31  # lifts libzstd's own limit, because ours counts


class Decompressor(Protocol):
    """From the bytes of a file to its content."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The content that `data` adds, piece by piece; exhaust it before the next call.

        Raises:
            BrokenDataError: `data` is broken; after the pieces before the fault.
        """

    def finish(self) -> None:
        """Check that the file is complete.

        Raises:
            BrokenDataError: It is not.
        """


_OTHERS: Final = (".bz2", ".tbz2", ".tbz", ".xz", ".txz", ".lzma", ".lz4", ".zip", ".7z")
"""What others compress by. As plain text or tar it would be an error that says nothing of it."""


def is_compressed(path: str) -> bool:
    """Whether `path` ends in `.gz`, `.tgz` or `.zst`."""
    return path.lower().endswith((".gz", ".tgz", ".zst"))


def decompressor_for(path: str, max_window_bytes: int = MAX_WINDOW_BYTES) -> Decompressor:
    """A decompressor for the extension of `path`.

    Args:
        path: Only its extension is used.
        max_window_bytes: A zstd frame that needs a larger window is refused.

    Raises:
        ImportError: No installed package reads `.zst`.
        ValueError: It is compressed in a way that nothing here reads.
    """
    lower = path.lower()
    if lower.endswith(_OTHERS):
        raise ValueError(
            f"{masked(path)}: files may be compressed by gzip (.gz, .tgz) or zstd (.zst), got one that ends in "
            f"{lower[lower.rindex('.') :]!r}; compress it by one of these, or decompress it"
        )
    if lower.endswith((".gz", ".tgz")):
        return _Frames(_Gzip, "gzip")
    if lower.endswith(".zst"):
        make = _zstd()
        return _Frames(lambda: _Zstd(make(), max_window_bytes), "zstd")
    return _Plain()


class _Plain:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        """Plain data has no mark of its end."""


class _Frames:
    """Frames (gzip calls them members), each decompressed by a decoder of its own; they may be padded with zeros."""

    def __init__(self, make: Callable[[], Any], name: str) -> None:
        self._make = make
        self._name = name
        self._decoder: Any = None
        self._step = FIRST_BYTES
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        at = 0
        while at < len(view):
            if self._decoder is None:
                if self._begun:
                    at = _ZEROS.match(view, at).end()  # type: ignore[union-attr]  # it matches everywhere
                    if at == len(view):
                        return
                self._decoder = self._make()
                self._step = FIRST_BYTES
                self._begun = True
            decoder = self._decoder
            stop = min(at + self._step, len(view))
            self._step *= 2
            try:
                yield from decoder.decompress(bytes(view[at:stop]))
            except BrokenDataError:
                raise
            except Exception as error:  # each library has its own type
                raise BrokenDataError(f"the {self._name} data is broken: {error}") from error
            at = stop
            if decoder.eof:
                at -= len(decoder.unused_data)
                self._decoder = None

    def finish(self) -> None:
        if self._decoder is not None or not self._begun:
            raise BrokenDataError(f"the {self._name} data is truncated: it ends before its end mark")


_ZEROS: Final = re.compile(rb"\0*")


class _Gzip:
    """One member of a gzip file."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes) -> Iterator[bytes]:
        while True:
            before = self._decoder.copy()  # a few microseconds per megabyte
            try:
                piece = self._decoder.decompress(data, PIECE_BYTES)
            except zlib.error:
                yield from _up_to_the_fault(before, data)
                raise
            if piece:
                yield piece
            data = self._decoder.unconsumed_tail
            # After a full piece zlib may hold more output, even if it has taken all of the input.
            if self._decoder.eof or not (data or len(piece) == PIECE_BYTES):
                return

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


def _up_to_the_fault(decoder: Any, data: bytes) -> Iterator[bytes]:
    """The output of `data` before its fault: zlib returns nothing from a call that fails.

    It is less than a full piece, otherwise the call would have ended before the fault.
    """
    at, step = 0, len(data)
    while step:
        attempt = decoder.copy()
        try:
            piece = attempt.decompress(data[at : at + step])
        except zlib.error:
            step //= 2
        else:
            decoder = attempt
            at += step
            if at >= len(data):
                step = 0
            if piece:
                yield piece


def _zstd() -> Callable[[], Any]:
    """A function that makes decoders of a frame, from Python 3.14 or else from `zstandard`."""
    try:
        from compression.zstd import (  # type: ignore[import-not-found,unused-ignore]
            DecompressionParameter,
            ZstdDecompressor,
        )
    except ImportError:
        pass
    else:
        return lambda: ZstdDecompressor(options={DecompressionParameter.window_log_max: _LARGEST_WINDOW_LOG})
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "reading .zst files needs Python 3.14, or the package zstandard: pip install 'aioloader[zstd]'"
        ) from error
    return zstandard.ZstdDecompressor(max_window_size=1 << _LARGEST_WINDOW_LOG).decompressobj


class _Zstd:
    """One frame of a zstd file, which is passed to the decoder block by block.

    `zstandard` cannot bound the output of a call: a block of four bytes may hold 128 KiB. So each call gets one block,
    and all blocks before the fault of a broken frame are decompressed. A block is passed on when all of it is there:
    of a part of one, the decoder may return bytes that it refuses with the rest, so that what is read of a broken file
    would depend on how large the reads are. Only the lengths of blocks and the size of the window are read here; the
    rest is up to the decoder.

    Source: RFC 8878, section 3.1.1.
    """

    def __init__(self, decoder: Any, max_window_bytes: int) -> None:
        self._decoder = decoder
        self._max_window_bytes = max_window_bytes
        self._part_length = _Zstd._header_length  # of what comes next; not bound, which would be a cycle
        self._kept: list[bytes] = []  # the beginning of a part
        self._length: int | None = None  # of that part, once it is known
        self._missing = 0  # at least so many bytes of it are to come
        self.unused_data = b""

    def decompress(self, data: bytes) -> Iterator[bytes]:
        if self._kept:
            self._kept.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._kept)
            self._kept = []
        at = 0
        while at < len(data) and not self._decoder.eof:
            length = self._length = self._length or self._part_length(self, data, at)
            if length is None or at + length > len(data):
                self._kept = [data[at:]]
                self._missing = 1 if length is None else at + length - len(data)
                return
            self._length = None
            part = data[at : at + length]
            at += length
            piece = self._decoder.decompress(part)
            if piece:
                yield piece
        self.unused_data = self._decoder.unused_data + data[at:]

    @property
    def eof(self) -> bool:
        return bool(self._decoder.eof)

    def _header_length(self, data: bytes, at: int) -> int | None:
        magic = data[at : at + 4]
        if not _MAGIC.startswith(magic):
            self._part_length = _Zstd._all  # a skippable frame, or not a frame: leave it to the decoder
            return self._all(data, at)
        if len(data) < at + 5:
            return None
        descriptor = data[at + 4]
        is_single = bool(descriptor & 0x20)  # its content is its window
        size_length = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
        length = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3] + size_length
        end = at + length
        if len(data) < end:
            return None
        if is_single:
            window = int.from_bytes(data[end - size_length : end], "little") + (256 if size_length == 2 else 0)
        else:
            exponent, eighths = divmod(data[at + 5], 8)
            window = (8 + eighths) << (exponent + 7)
        if window > self._max_window_bytes:
            raise BrokenDataError(
                f"the zstd data needs a window of {window} bytes, and at most {self._max_window_bytes} are allowed; "
                f"pass a larger max_window_bytes"
            )
        self._part_length = _Zstd._block_length
        return length

    def _block_length(self, data: bytes, at: int) -> int | None:
        if len(data) < at + 3:
            return None
        header = int.from_bytes(data[at : at + 3], "little")
        kind, size = header >> 1 & 3, header >> 3
        if kind == 3 or (kind != 1 and size > _MAX_BLOCK_BYTES):
            return self._all(data, at)  # no block is like that: the decoder refuses it, and need not wait for all of it
        if header & 1:  # the last block
            self._part_length = _Zstd._all  # a checksum, if any
        return 3 + (1 if kind == 1 else size)  # a byte that is repeated, or that many bytes

    def _all(self, data: bytes, at: int) -> int | None:
        return len(data) - at


_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_MAX_BLOCK_BYTES: Final = 128 << 10
