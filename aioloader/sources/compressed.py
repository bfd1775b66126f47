"""Decompressing what arrives in pieces, into pieces of bounded size."""

import zlib
from collections.abc import Iterator
from typing import Any, Final, Protocol

from aioloader.errors import BrokenDataError

__all__ = ["Decompressor", "decompressor_for", "is_compressed"]

PIECE_BYTES: Final = 1 << 20
"""What comes out at once, at most: a megabyte of input may hold a gigabyte of zeros."""


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


def decompressor_for(path: str) -> Decompressor:
    """By the extension of `path`.

    Raises:
        ImportError: Nothing that is installed reads `.zst`.
    """
    lower = path.lower()
    if lower.endswith((".gz", ".tgz")):
        return _Frames(_Gzip, "gzip")
    if lower.endswith(".zst"):
        return _Frames(_zstd(), "zstd")
    return _Plain()


class _Plain:
    """No compression."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        """There is no mark of the end."""


class _Frames:
    """Frames (members, in gzip's words), one behind the other, each by a decoder of its own."""

    def __init__(self, make: Any, name: str) -> None:
        self._make = make
        self._name = name
        self._decoder: Any = None
        self._begun = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        data = bytes(data)
        while data:
            if self._decoder is None:
                if self._begun and not data.strip(b"\0"):  # gzip files may be padded
                    return
                self._decoder = self._make()
                self._begun = True
            decoder = self._decoder
            try:
                yield from decoder.decompress(data)
            except Exception as error:  # each library has its own
                raise BrokenDataError(f"the {self._name} data is broken: {error}") from error
            data = b""
            if decoder.eof:
                data = decoder.unused_data
                self._decoder = None

    def finish(self) -> None:
        if self._decoder is not None or not self._begun:
            raise BrokenDataError(f"the {self._name} data is truncated: it ends before its end mark")


class _Gzip:
    """One member of a gzip file."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes) -> Iterator[bytes]:
        decoder = self._decoder
        while True:
            piece = decoder.decompress(data, PIECE_BYTES)
            if piece:
                yield piece
            data = decoder.unconsumed_tail
            # A full piece: zlib may hold more of the output, even when it has taken all of the input.
            if decoder.eof or not (data or len(piece) == PIECE_BYTES):
                return

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


def _zstd() -> Any:
    """A class that decodes one frame: of the standard library since Python 3.14, else of `zstandard`."""
    try:
        from compression.zstd import ZstdDecompressor  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        pass
    else:
        return lambda: _BoundedZstd(ZstdDecompressor())
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "reading .zst files needs Python 3.14, or the package zstandard: pip install 'aioloader[zstd]'"
        ) from error
    return lambda: _SlicedZstd(zstandard.ZstdDecompressor().decompressobj())


class _BoundedZstd:
    """One frame, by the standard library."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def decompress(self, data: bytes) -> Iterator[bytes]:
        decoder = self._decoder
        while True:
            piece = decoder.decompress(data, PIECE_BYTES)
            if piece:
                yield piece
            data = b""
            if decoder.eof or decoder.needs_input:
                return

    @property
    def eof(self) -> bool:
        return bool(self._decoder.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._decoder.unused_data)


class _SlicedZstd:
    """One frame, by `zstandard`, which bounds no output: small slices of input do, but for what is made to harm."""

    SLICE_BYTES: Final = 16 << 10

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.unused_data = b""

    def decompress(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), self.SLICE_BYTES):
            stop = start + self.SLICE_BYTES
            piece = self._decoder.decompress(data[start:stop])
            if piece:
                yield piece
            if self._decoder.eof:
                self.unused_data = self._decoder.unused_data + data[stop:]
                return

    @property
    def eof(self) -> bool:
        return bool(self._decoder.eof)
