"""gzip and zstd, as the files of `Lines` and `TarShards` are: in bounded pieces, up to what is broken."""

import gzip
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from aioloader import BrokenDataError, Pipeline
from aioloader.sources import Lines, TarShards
from aioloader.sources.compressed import decompressor_for
from tests._cursor_sources import assert_opens_at_every_cursor, outcomes
from tests._support import Face, collect, on_both_faces
from tests.test_tar import archive, keys, samples

LINES = [f"{number:06} {'x' * (17 * number % 5000)}" for number in range(200)]
TEXT = "".join(f"{line}\n" for line in LINES).encode()


@pytest.fixture(params=["zstandard", "the standard library"])
def zstd_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two that read `.zst`."""
    if request.param == "zstandard":
        monkeypatch.setitem(sys.modules, "compression.zstd", None)
    else:
        pytest.importorskip("compression.zstd", reason="Python 3.14 is the first that has it")


def frame(*blocks: bytes, window_log: int = 17) -> bytes:
    """A zstd frame by hand: no size, no checksum, and a window of 2 ** `window_log` bytes."""
    return b"\x28\xb5\x2f\xfd\0" + bytes([window_log - 10 << 3]) + b"".join(blocks)


def raw_block(content: bytes, *, is_last: bool = False) -> bytes:
    return (len(content) << 3 | is_last).to_bytes(3, "little") + content


def repeated_block(byte: bytes, count: int, *, is_last: bool = False) -> bytes:
    return (count << 3 | 1 << 1 | is_last).to_bytes(3, "little") + byte


def pieces_of(content: bytes, path: str, size: int = 1 << 20) -> Iterator[bytes]:
    """What comes out, when `content` comes in pieces of `size`."""
    decompressor = decompressor_for(path)
    for start in range(0, len(content), size):
        yield from decompressor.feed(content[start : start + size])
    decompressor.finish()


def broken_off(content: bytes, path: str, size: int = 1 << 20) -> tuple[bytes, str]:
    """What comes out before an error, and the error."""
    found: list[bytes] = []
    with pytest.raises(BrokenDataError) as caught:
        found.extend(pieces_of(content, path, size))  # keeps those before it
    return b"".join(found), str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.tar.xz", "https://host/a.tar.LZ4", "a.txt.zip"])
@pytest.mark.parametrize("source", [Lines, TarShards])
def test_what_nothing_here_decompresses_is_refused_by_its_name(name: str, source: Any) -> None:
    """Read as it is, it would be a file without samples, or one that is broken."""
    with pytest.raises(
        ValueError,
        match=rf"{name.rpartition('/')[2]}: files may be compressed by gzip .* got one that ends in '\.\w+'; ",
    ):
        source(name)


# -- what comes --------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("zeros", [1, 511, 100_000])
def test_zeros_between_the_members_of_a_gzip_file_and_after_the_last_are_padding(
    tmp_path: Path, face: Face, zeros: int
) -> None:
    parts = [gzip.compress(part) for part in (b"1\n2", b"", b"0\n3\n")]
    path = tmp_path / "padded.gz"
    path.write_bytes(b"".join(part + bytes(zeros) for part in parts))
    assert collect(Pipeline(Lines(path)), face) == ["1", "20", "3"]
    path.write_bytes(b"".join(part + bytes(zeros) for part in parts) + b"garbage")
    found = outcomes(Lines(path), face)
    assert found[:-1] == ["1", "20", "3"]
    assert found[-1].startswith(f"{path}: the gzip data is broken: ")

    content = archive(samples(0, 2))
    path = tmp_path / "padded.tar.gz"
    path.write_bytes(gzip.compress(content[:1000]) + bytes(zeros) + gzip.compress(content[1000:]) + bytes(zeros))
    assert keys(collect(Pipeline(TarShards(path)), face)) == ["0000", "0001"]


def test_zeros_before_the_first_member_of_a_gzip_file_are_none(tmp_path: Path) -> None:
    found, message = broken_off(bytes(100) + gzip.compress(b"1\n"), "a.gz")
    assert found == b""
    assert message.startswith("the gzip data is broken: ")


@pytest.mark.usefixtures("zstd_backend")
@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_frames_of_every_kind_in_pieces_of_every_size(size: int) -> None:
    text = TEXT[: 300_000 if size > 100 else 3000]
    streamed = zstandard.ZstdCompressor(level=1).compressobj()
    parts = [
        zstandard.ZstdCompressor(write_checksum=True).compress(text),
        zstandard.ZstdCompressor(write_content_size=False).compress(text),
        struct.pack("<II", 0x184D2A5E, 5) + b"seeks",  # a frame to be skipped, as those are that `pzstd` writes
        streamed.compress(text) + streamed.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK),
        streamed.compress(b"end") + streamed.flush(),
        zstandard.ZstdCompressor().compress(b""),
        frame(raw_block(b"raw"), repeated_block(b"x", 10), raw_block(b"", is_last=True)),
    ]
    assert b"".join(pieces_of(b"".join(parts), "a.zst", size)) == 3 * text + b"endraw" + b"x" * 10


@pytest.mark.parametrize("size", [1, 4096, 1 << 20])
def test_a_thousand_small_gzip_members(size: int) -> None:
    parts = [TEXT[start : start + 50] for start in range(0, 50_000, 50)]
    assert b"".join(pieces_of(b"".join(map(gzip.compress, parts)), "a.gz", size)) == b"".join(parts)


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("zstd_backend")
def test_much_in_little_comes_in_bounded_pieces() -> None:
    """64 MiB of zeros each; a zstd block of four bytes has 128 KiB of them."""
    block = repeated_block(b"\0", 128 << 10)
    for path, content in (
        ("a.zst", frame(*[block] * 511, repeated_block(b"\0", 128 << 10, is_last=True))),
        ("a.gz", gzip.compress(bytes(64 << 20))),
    ):
        total = 0
        for piece in pieces_of(content, path):
            assert len(piece) <= 1 << 20
            total += len(piece)
        assert total == 64 << 20


def of_lines(path: Path, **arguments: Any) -> Lines:
    return Lines(path, **arguments)


def of_samples(path: Path, **arguments: Any) -> TarShards:
    return TarShards(path, **arguments)


@on_both_faces
@pytest.mark.usefixtures("zstd_backend")
@pytest.mark.parametrize(("suffix", "make"), [(".txt.zst", of_lines), (".tar.zst", of_samples)])
def test_a_zstd_window_is_read_up_to_a_limit_that_can_be_raised(
    tmp_path: Path, suffix: str, make: Callable[..., Any], face: Face
) -> None:
    path = tmp_path / f"a{suffix}"
    content = b"0\n" if suffix == ".txt.zst" else archive(samples(0, 1))

    def found(window_log: int, **arguments: Any) -> Any:
        path.write_bytes(frame(raw_block(content, is_last=True), window_log=window_log))
        (outcome,) = outcomes(make(path, **arguments), face)
        return outcome if isinstance(outcome, str) else outcome["txt"][:1].decode()

    for window_log in (17, 27, 28, 30):
        assert found(window_log) == "0"
    assert found(31) == (
        f"{path}: the zstd data needs a window of 2147483648 bytes, and at most 1073741824 are allowed; pass a larger "
        f"max_window_bytes"
    )
    assert found(31, max_window_bytes=1 << 31) == "0"
    assert "a window of 1048576 bytes, and at most 1048575 are allowed" in found(20, max_window_bytes=(1 << 20) - 1)
    with pytest.raises(ValueError, match="max_window_bytes must be at least 1, got 0"):
        make(path, max_window_bytes=0)


@pytest.mark.usefixtures("zstd_backend")
def test_the_content_of_a_frame_in_one_segment_is_its_window() -> None:
    content = zstandard.ZstdCompressor(level=3).compress(bytes(1000))
    assert content[4] & 0x20
    assert b"".join(decompressor_for("a.zst", 1000).feed(content)) == bytes(1000)
    with pytest.raises(BrokenDataError, match="needs a window of 1000 bytes, and at most 999 are allowed"):
        list(decompressor_for("a.zst", 999).feed(content))


# -- what is broken ----------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.usefixtures("zstd_backend")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_all_that_comes_before_a_fault_comes(tmp_path: Path, suffix: str, face: Face) -> None:
    """zlib and libzstd give nothing of a call in which they fail; what comes would depend on where the pieces end."""
    if suffix == ".gz":
        compressor = zlib.compressobj(wbits=31)
        content = compressor.compress(TEXT) + compressor.flush(zlib.Z_SYNC_FLUSH) + b"\xff" * 10
    else:
        parts = [TEXT[start : start + 100_000] for start in range(0, len(TEXT), 100_000)]
        content = frame(*map(raw_block, parts), b"\xff" * 10)
    for size in (1 << 20, 1000):
        found, message = broken_off(content, f"a{suffix}", size)
        assert found == TEXT
        assert "data is broken: " in message
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert outcomes(Lines([path, path]), face) == 2 * [*LINES, f"{path}: {message}"]


@pytest.mark.usefixtures("zstd_backend")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_wrong_checksum_is_an_error_after_all_samples(tmp_path: Path, suffix: str) -> None:
    content = archive(samples(0, 3))
    if suffix == ".gz":
        packed = bytearray(gzip.compress(content))
        packed[-8] ^= 1
    else:
        packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(content))
        packed[-1] ^= 1
    path = tmp_path / f"a.tar{suffix}"
    path.write_bytes(packed)
    found = assert_opens_at_every_cursor(TarShards([path, path]))
    assert keys(found[:3]) == keys(found[4:7]) == ["0000", "0001", "0002"]
    assert len(found) == 8
    assert found[3].startswith(f"{path}: the {'gzip' if suffix == '.gz' else 'zstd'} data is broken: ")
