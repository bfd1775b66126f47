"""The index of an archive: its format, which comes from strangers, and the command that writes it."""

import asyncio
import io
import json
import os
import signal
import sys
import threading
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import aioloader.__main__ as command_line
from aioloader import BrokenDataError, Pipeline
from aioloader.executors.apart import run_apart
from aioloader.sources import TarShards
from aioloader.sources.joined import JOINED_BYTES, ArchiveRange, cut, plan_window
from aioloader.sources.tar_index import SUFFIX, TarIndex, decode_index, encode_index
from aioloader.sources.tar_scan import Scan
from tests._servers import HttpServer, S3Server
from tests.test_indexed_tar import ALL, archive, keys, members

BLOCK: Final = 512


def index_of(count: int = 3) -> TarIndex:
    starts = [BLOCK * number * 4 for number in range(count + 1)]
    return TarIndex.of("a.tar", 1 << 20, "12345678:9", starts, [f"{number:04}" for number in range(count)])


# -- the format --------------------------------------------------------------------------------------------------------


KEYS: Final = st.binary(max_size=20).map(lambda key: key.decode("utf-8", "surrogateescape"))


@given(
    found=st.lists(st.tuples(st.integers(1, 1 << 24), KEYS)),
    start=st.integers(0, 1 << 40),
    mark=st.one_of(st.none(), st.text("0123456789abcdef:")),
)
def test_it_is_read_as_it_was_written(found: list[tuple[int, str]], start: int, mark: str | None) -> None:
    """Whatever the keys are: line ends, zeros, bytes that are no text."""
    starts = [start * BLOCK]
    for blocks, _ in found:
        starts.append(starts[-1] + blocks * BLOCK)
    keys = [key for _, key in found]
    index = TarIndex.of("a.tar", starts[-1] + 1024, mark, starts, keys)
    again = decode_index(encode_index(index), "a.tar.index")
    assert again == index
    assert [again.key(number) for number in range(len(again))] == keys


def sealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


def rewritten(change: Callable[[dict[str, Any]], None], body: bytes | None = None) -> bytes:
    """An index with another header, or another body, and the checksum of it."""
    magic, header, old = encode_index(index_of())[:-4].split(b"\n", 2)
    fields = json.loads(header)
    change(fields)
    return sealed(b"\n".join((magic, json.dumps(fields).encode(), old if body is None else body)))


def body_of(lengths: list[int], key_lengths: list[int], keys: bytes) -> bytes:
    return zlib.compress(array("Q", lengths).tobytes() + array("I", key_lengths).tobytes() + keys)


GOOD: Final = encode_index(index_of())
BROKEN: Final[dict[str, tuple[bytes, str]]] = {
    "nothing": (b"", "is no index of a tar archive: it begins with b''"),
    "something else": (b"\x80\x04\x95 a pickle", "is no index of a tar archive"),
    "a later version": (
        GOOD.replace(b"index 1\n", b"index 27\n"),
        "version b'27', and this release reads version b'1'",
    ),
    "no header": (sealed(b"aioloader tar index 1\n"), "its header is no JSON"),
    "a header that is nested": (sealed(b"aioloader tar index 1\n" + b"[" * 100_000 + b"\n"), "its header is no JSON"),
    "a list": (sealed(b"aioloader tar index 1\n[]\n"), "its header is no object"),
    "a negative size": (
        rewritten(lambda fields: fields.update(size=-1)),
        "'size' must be an integer of at least 0, got -1",
    ),
    "a size that is none": (rewritten(lambda fields: fields.update(size=True)), "'size' must be an integer"),
    "a count that is huge": (
        rewritten(lambda fields: fields.update(samples=1 << 62)),
        "samples in an archive of 1048576",
    ),
    "a count that is wrong": (rewritten(lambda fields: fields.update(samples=5)), "5 samples"),
    "no name": (rewritten(lambda fields: fields.pop("archive")), "'archive' must be a name"),
    "a mark that is none": (rewritten(lambda fields: fields.update(mark=5)), "'mark' must be text"),
    "a start within a block": (rewritten(lambda fields: fields.update(start=5)), "blocks of 512 bytes"),
    "samples beyond the end": (rewritten(lambda fields: fields.update(start=1 << 20)), "samples up to byte"),
    "a cut": (GOOD[:-5], "its checksum is wrong: it was cut off, or changed"),
    "no compression": (rewritten(lambda _: None, b"no zlib"), "cannot be decompressed"),
    "half a body": (rewritten(lambda _: None, zlib.compress(bytes(100))[:9]), "it is cut off"),
    "a sample of no length": (rewritten(lambda _: None, body_of([512, 0, 512], [1] * 3, b"abc")), "blocks of 512"),
    "a sum beyond 64 bits": (
        rewritten(lambda _: None, body_of([(1 << 64) - 512] * 3, [1] * 3, b"abc")),
        "samples up to",
    ),
    "too few keys": (
        rewritten(lambda _: None, body_of([512] * 3, [1] * 3, b"ab")),
        "keys of 3 bytes were promised, and 2",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_index_is_refused_with_the_way_out(case: str) -> None:
    content, message = BROKEN[case]
    with pytest.raises(BrokenDataError) as raised:
        decode_index(content, "x/a.tar.index")
    assert str(raised.value).startswith("x/a.tar.index ")
    assert message in str(raised.value)
    assert str(raised.value).endswith("write it again: python -m aioloader index x/a.tar")


def test_any_byte_that_is_changed_or_missing_is_found_out() -> None:
    for at in range(len(GOOD)):
        changed = bytearray(GOOD)
        changed[at] ^= 0x10
        for content in (bytes(changed), GOOD[:at], GOOD[:at] + GOOD[at + 1 :]):
            with pytest.raises(BrokenDataError):
                decode_index(content, "a.tar.index")


def test_a_small_file_cannot_take_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioloader.sources.tar_index.MAX_BYTES", 1 << 16)
    with pytest.raises(BrokenDataError, match="it holds more than 65536 bytes"):
        decode_index(rewritten(lambda _: None, zlib.compress(bytes(1 << 20))), "a.tar.index")


# -- which samples share a request -------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=40), min_size=1, max_size=4),
    data=st.data(),
)
def test_each_sample_is_in_one_range_and_little_is_read_besides(sizes: list[list[int]], data: st.DataObject) -> None:
    """Whatever the order, and however often a sample comes."""
    places = []
    for number, archive_sizes in enumerate(sizes):
        at = 0
        for size in archive_sizes:
            places.append(ArchiveRange(number, at, at + (size << 16)))
            at += size << 16
    wanted = data.draw(st.lists(st.integers(0, len(places) - 1), min_size=1, max_size=60))
    most = data.draw(st.integers(1, 64)) << 20
    more = data.draw(st.booleans())
    window = plan_window(wanted, places.__getitem__, most_bytes=most, more=more)
    assert 1 <= len(window.places) <= len(wanted)
    assert window.places == [places[key] for key in wanted[: len(window.places)]]
    assert sorted(position for planned in window.ranges for position in planned.positions) == list(
        range(len(window.places))
    )
    for planned in window.ranges:
        inside = {window.places[position] for position in planned.positions}
        needed = sum(place.stop - place.start for place in inside)
        archive, start, stop = planned.place
        assert all(place.archive == archive and start <= place.start < place.stop <= stop for place in inside)
        assert stop - start <= max(JOINED_BYTES, needed if len(inside) == 1 else 0)
        assert stop - start <= 1.05 * needed
    if len(window.places) > 1:
        assert sum(place.stop - place.start for place in window.places) <= most


def test_a_sequence_is_cut_where_its_ranges_end() -> None:
    """And not where a window does, so that there is no small range between two windows."""
    places = [ArchiveRange(0, at << 20, (at + 1) << 20) for at in range(100)]
    first = plan_window(range(30), places.__getitem__, most_bytes=1 << 40, more=True)
    assert [planned.place for planned in first.ranges] == [
        ArchiveRange(0, 0, 12 << 20),
        ArchiveRange(0, 12 << 20, 24 << 20),
    ]
    assert len(first.places) == 24
    last = plan_window(range(24, 30), places.__getitem__, most_bytes=1 << 40, more=False)
    assert [planned.place for planned in last.ranges] == [ArchiveRange(0, 24 << 20, 30 << 20)]


@given(st.lists(st.binary(max_size=10)), st.integers(0, 50), st.integers(0, 50))
def test_a_cut_is_that_of_the_whole(pieces: list[bytes], start: int, length: int) -> None:
    whole = b"".join(pieces)
    assert b"".join(cut(pieces, start, start + length)) == whole[start : start + length]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(archive(members(0, 5)))
    return path


def run(*arguments: Any) -> int:
    return command_line.main(["index", *map(str, arguments)])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_writes_beside_each_archive_and_says_what_is_there(
    tmp_path: Path, tar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.tar").write_bytes(archive(members(5, 2)))
    assert run(tmp_path / "*.tar") == 0
    assert names_in(tmp_path) == ["a.tar", "a.tar.index", "b.tar", "b.tar.index"]
    out, err = capsys.readouterr()
    assert f"{tar}.index: 5 samples, " in out
    assert err == ""
    assert keys(Pipeline(TarShards([tar, tmp_path / "b.tar"], index=True))) == ALL[:7]
    assert run("--check", tmp_path / "*") == 0
    assert keys(Pipeline(TarShards(tmp_path / "*"))) == ALL[:7]
    assert f"{tar}.index: fits, 5 samples" in capsys.readouterr().out


def test_an_archive_that_cannot_be_read_on_gets_no_index_and_the_next_one_follows(
    tmp_path: Path, tar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tar.read_bytes()
    (tmp_path / "0-cut.tar").write_bytes(whole[:4000])
    (tmp_path / "1-text.tar").write_bytes(b"no archive" * 100)
    negative = bytearray(whole)
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + sum(negative[156:512]) + 8 * 32)
    (tmp_path / "2-negative.tar").write_bytes(negative)
    (tmp_path / "3-packed.tar.gz").write_bytes(b"")
    (tmp_path / "4-packed.tar.zst").write_bytes(zstandard.compress(whole))
    assert run(*sorted(tmp_path.iterdir()), tmp_path / "missing.tar", tar) == 1
    errors = capsys.readouterr().err.splitlines()
    for line, (name, why) in zip(
        errors,
        [
            ("0-cut.tar", "truncated"),
            ("1-text.tar", "is not a tar archive"),
            ("2-negative.tar", "negative number"),
            ("3-packed.tar.gz", "is compressed"),
            ("4-packed.tar.zst", "is compressed"),
            ("missing.tar", "No such file"),
        ],
        strict=True,
    ):
        assert name in line
        assert why in line
        assert "Traceback" not in line
    assert [name for name in names_in(tmp_path) if "index" in name] == ["a.tar.index"]


def test_samples_that_cannot_be_read_are_told_and_keep_their_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tar"
    twice = [member for number in range(5) for member in ((f"{number}.txt", b""), (f"{number}.txt", b""))]
    path.write_bytes(archive([*twice, ("fine.txt", b"")]))
    assert run(path) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert "the sample '0' has two members 'txt'" in errors[0]
    assert "raises in its place" in errors[0]
    assert "2 more samples cannot be read" in errors[-1]
    source: Any = TarShards(path, index=True)
    assert len(source) == 6
    assert source[5]["__key__"] == "fine"


def test_a_check_finds_what_has_changed(tar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In size, in time, and in nothing but what is in it."""
    assert run("--check", tar) == 1
    assert "has no index" in capsys.readouterr().err
    run(tar)
    time = tar.stat().st_mtime_ns
    tar.write_bytes(archive([(f"x{name}", content) for name, content in members(0, 5)]))
    os.utime(tar, ns=(time, time))
    assert run("--check", tar) == 1
    assert "is not what its index says: 5 samples were indexed" in capsys.readouterr().err
    os.utime(tar, ns=(time, time + 1))
    assert run("--check", tar) == 1
    assert "was changed since its index was written: its size is the same" in capsys.readouterr().err
    tar.write_bytes(archive(members(0, 50)))
    assert run("--check", tar) == 1
    assert "it had 20480 bytes, and has" in capsys.readouterr().err
    assert run(tar) == run("--check", tar) == 0


def test_an_index_is_never_half_written(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails, or is interrupted, leaves the old one and nothing else."""
    run(tar)
    before = Path(f"{tar}{SUFFIX}").read_bytes()
    tar.write_bytes(archive(members(0, 6)))

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(tar) == 1

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert run(tar) == 130
    assert Path(f"{tar}{SUFFIX}").read_bytes() == before
    assert names_in(tar.parent) == ["a.tar", "a.tar.index"]


def test_an_archive_that_changes_while_it_is_read_gets_no_index(
    tar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = Scan.feed

    def grows(self: Scan, piece: Any) -> None:
        feed(self, piece)
        with tar.open("ab") as file:
            file.write(bytes(512))
        monkeypatch.setattr(Scan, "feed", feed)

    monkeypatch.setattr(Scan, "feed", grows)
    assert run(tar) == 1
    assert "was changed while it was read" in capsys.readouterr().err
    assert names_in(tar.parent) == ["a.tar"]


def test_patterns_are_looked_up_in_the_bucket(
    s3_server: S3Server, tar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = s3_server.make_bucket()
    store = s3_server.store(bucket)
    for name in ("train/a 1.tar", "train/b.tar", "train/deep/c.tar", "train/notes.txt", "d.tar"):
        store.put(name, tar)
    for variable, value in {
        "AWS_ENDPOINT": s3_server.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    assert run(f"s3://{bucket}/train/*.tar") == 0
    found = [item["path"] for page in store.list() for item in page if item["path"].endswith(SUFFIX)]
    assert sorted(found) == ["train/a 1.tar.index", "train/b.tar.index"]
    assert run(f"s3://{bucket}/**/[cd].tar", "--check") == 1
    assert run(f"s3://{bucket}/**/[cd].tar") == run(f"s3://{bucket}/**/[cd].tar", "--check") == 0
    source = TarShards([f"s3://{bucket}/train/a%201.tar", f"s3://{bucket}/d.tar"], index=True)
    assert keys(Pipeline(source)) == ALL[:5] * 2
    assert keys(Pipeline(TarShards("d.tar", store=store, index=True))) == ALL[:5]
    store.put("d.tar", tar)  # a new upload of the same
    assert keys(Pipeline(TarShards("d.tar", store=store, index=True))) == ALL[:5]
    store.put("d.tar", io.BytesIO(archive(members(1, 5))))
    capsys.readouterr()
    assert run(f"s3://{bucket}/d.tar", "--check") == 1
    assert "d.tar was changed since its index was written" in capsys.readouterr().err
    assert run(f"s3://{bucket}/none/*.tar") == 1
    assert "matches 'none/*.tar'" in capsys.readouterr().err
    del store, source


def test_what_cannot_be_written_or_listed_is_told_in_a_line(
    http_server: HttpServer, tar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    http_server.files = {"a.tar": tar.read_bytes()}
    assert run(f"{http_server.url}/a.tar") == 1
    assert "a.tar.index cannot be written" in capsys.readouterr().err
    assert run(f"{http_server.url}/*.tar") == 1
    assert "cannot be listed" in capsys.readouterr().err
    assert run(f"{tar}.index") == 1
    assert "a.tar.index is an index; pass the archive" in capsys.readouterr().err
    assert run(tar.parent / "none-*.tar") == 1
    assert "no file matches the glob" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_progress_is_shown_on_a_terminal(tar: Path, monkeypatch: pytest.MonkeyPatch, with_tqdm: bool) -> None:
    """And is gone at the end."""
    if not with_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(tar) == 0
    shown = terminal.getvalue()
    assert "a.tar" in shown
    assert "100 %" in shown or "100%" in shown or "it/s" in shown or "B/s" in shown
    assert not shown.rpartition("\r")[2].strip()


# -- waiting for a store without a loop --------------------------------------------------------------------------------


def test_what_is_run_apart_gives_its_result_or_its_error() -> None:
    async def result() -> int:
        return 5

    async def error() -> None:
        raise KeyError("five")

    assert run_apart(result) == 5
    with pytest.raises(KeyError, match="five"):
        run_apart(error)


def test_an_interrupt_ends_what_is_run_apart() -> None:
    """It is cancelled and cleans up, and the thread is gone, before the caller goes on."""
    cleaned = []

    async def hangs() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(threading.current_thread().name)

    with pytest.raises(KeyboardInterrupt):
        run_apart(hangs)
    assert cleaned == ["aioloader-apart"]


def test_where_an_index_is_cannot_be_said(tmp_path: Path) -> None:
    """It is beside its archive: a path would be taken for True."""
    with pytest.raises(TypeError, match=r"index must be True or False, got 'a\.tar\.index'; the index of"):
        TarShards(tmp_path / "a.tar", index="a.tar.index")  # type: ignore[arg-type]
