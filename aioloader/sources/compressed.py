"""Decompressing what arrives in pieces, into pieces of bounded size."""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from aioloader.errors import BrokenDataError

__all__ = ["MAX_WINDOW_BYTES", "Decompressor", "decompressor_for", "is_compressed"]

PIECE_BYTES: Final = 1 << 20
"""What comes out at once, at most: a megabyte of input may hold a gigabyte of zeros."""

FIRST_BYTES: Final = 16 << 10
"""What a fresh decoder gets first, and twice as much with each call: it copies what comes after its frame, and a
megabyte may hold 50,000 frames."""

MAX_WINDOW_BYTES: Final = 1 << 30
"""How far back a zstd frame may refer, unless the user says otherwise: the decoder keeps that much of what came out.
`zstd --long` asks for 128 MiB, `zstd --long=30` for 1 GiB, and `--long=31` for 2 GiB, which is the most there is."""

_LARGEST_WINDOW_LOG: Final = 31  # libzstd's own limit is lifted, for ours is the one that counts


class Decompressor(Protocol):
    """From the bytes of a file to its content."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The content that `data` adds, piece by piece; to be used up before the next call.

        Raises:
            BrokenDataError: It cannot be decompressed; after the pieces before that.
        """

    def finish(self) -> None:
        """The file is over.

        Raises:
            BrokenDataError: It was not complete.
        """


def is_compressed(path: str) -> bool:
    """Whether the name of `path` says so: `.gz`, `.tgz` or `.zst`."""
    return path.lower().endswith((".gz", ".tgz", ".zst"))


def decompressor_for(path: str, max_window_bytes: int = MAX_WINDOW_BYTES) -> Decompressor:
    """By the extension of `path`.

    Args:
        path: Its extension counts.
        max_window_bytes: A zstd frame that needs a larger window is refused.

    Raises:
        ImportError: Nothing that is installed reads `.zst`.
    """
    lower = path.lower()
    if lower.endswith((".gz", ".tgz")):
        return _Frames(_Gzip, "gzip")
    if lower.endswith(".zst"):
        make = _zstd()
        return _Frames(lambda: _Zstd(make(), max_window_bytes), "zstd")
    return _Plain()


class _Plain:
    """No compression."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        """There is no mark of the end."""


class _Frames:
    """Frames (members, in gzip's words), one after the other, each by a decoder of its own; zeros may pad them."""

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
            except Exception as error:  # each library has its own
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
            before = self._decoder.copy()  # a few microseconds for a megabyte
            try:
                piece = self._decoder.decompress(data, PIECE_BYTES)
            except zlib.error:
                yield from _up_to_the_fault(before, data)
                raise
            if piece:
                yield piece
            data = self._decoder.unconsumed_tail
            # A full piece: zlib may hold more of the output, even when it has taken all of the input.
            if self._decoder.eof or not (data or len(piece) == PIECE_BYTES):
                return

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


def _up_to_the_fault(decoder: Any, data: bytes) -> Iterator[bytes]:
    """What comes out of `data`, which is broken somewhere: zlib gives nothing of a call in which it fails.

    Less than a full piece, or the call would have ended before the fault.
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
    """Makes decoders of one frame: of the standard library since Python 3.14, else of `zstandard`."""
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
    """One frame of a zstd file, which the decoder gets block by block.

    `zstandard` cannot bound what comes out of a call: a block of four bytes may hold 128 KiB. So each call gets one
    block at most, and of a frame that is broken all blocks before the fault come. What is in a block is the decoder's;
    only the lengths are read here, and the size of the window.

    Source: RFC 8878, section 3.1.1.
    """

    def __init__(self, decoder: Any, max_window_bytes: int) -> None:
        self._decoder = decoder
        self._max_window_bytes = max_window_bytes
        self._part_length = _Zstd._header_length  # of what comes next; not bound, which would be a cycle
        self._left = 0  # bytes of the part at hand that have not come yet
        self._kept = b""  # the beginning of a part that does not tell its length yet
        self.unused_data = b""

    def decompress(self, data: bytes) -> Iterator[bytes]:
        data = self._kept + data
        self._kept = b""
        at = 0
        while at < len(data) and not self._decoder.eof:
            if not self._left:
                length = self._part_length(self, data, at)
                if length is None:
                    self._kept = data[at:]
                    return
                self._left = length
            part = data[at : at + self._left]
            at += len(part)
            self._left -= len(part)
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
            self._part_length = _Zstd._all  # a skippable frame, or none at all: the decoder knows
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
                f"the zstd data needs a window of {window} bytes, and at most {self._max_window_bytes} are taken; pass "
                f"a larger max_window_bytes"
            )
        self._part_length = _Zstd._block_length
        return length

    def _block_length(self, data: bytes, at: int) -> int | None:
        if len(data) < at + 3:
            return None
        header = int.from_bytes(data[at : at + 3], "little")
        if header & 1:  # the last block
            self._part_length = _Zstd._all  # a checksum, if any
        return 3 + (1 if header >> 1 & 3 == 1 else header >> 3)  # one byte that is repeated, or so many

    def _all(self, data: bytes, at: int) -> int | None:
        return len(data) - at


_MAGIC: Final = b"\x28\xb5\x2f\xfd"
