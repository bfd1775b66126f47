"""`TarShards`: archives of every writer, from files and stores, and broken in every way that an archive can be."""

import gzip
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise, repeat
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy
import pytest
import torch
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aioloader import BrokenDataError, Pipeline
from aioloader.sources import DecodeSample, TarShards
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.tar_parser import TarLimits, TarParser
from aioloader.testing import Gate
from tests._cursor_sources import Opened, assert_opens_at_every_cursor, outcomes
from tests._servers import HttpServer, S3Server
from tests._support import Face, Started, Steps, collect, notes, on_both_faces

Members = Iterable[tuple[str, bytes]]

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(members: Members, format: int = tarfile.PAX_FORMAT, mode: Literal["w", "w:gz"] = "w") -> bytes:
    """An archive as `tarfile` writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def samples(first: int, count: int, size: int = 10) -> list[tuple[str, bytes]]:
    """The members of some samples: text and a class."""
    members = []
    for number in range(first, first + count):
        members += [(f"{number:04}.txt", f"{number}".encode() * size), (f"{number:04}.cls", f"{number % 3}".encode())]
    return members


def keys(found: Iterable[Any]) -> list[Any]:
    """The keys of samples; what is none, an error or its message, as it is."""
    return [sample["__key__"] if isinstance(sample, dict) else sample for sample in found]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Four archives of five samples."""
    paths = [tmp_path / f"shard-{number:03}.tar" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(archive(samples(5 * number, 5)))
    return [str(path) for path in paths]


ALL_KEYS = [f"{number:04}" for number in range(20)]


# -- what comes --------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("format", FORMATS)
def test_neighbours_with_one_key_are_a_sample(tmp_path: Path, format: str, face: Face) -> None:
    long = "deep/" * 30 + "x" * 60 if format == "ustar" else "deep/" * 60 + "x" * 200
    path = tmp_path / "a.tar"
    members = [
        ("train/1.JPG", b"first"),
        ("train/1.seg.png", b"mask"),
        ("train/2.jpg", b""),
        ("2.jpg", b"another folder"),
        (f"{long}.txt", b"x" * 1000),
        ("grüße.txt", "grüße".encode()),
        ("v1.0/3.txt", b"dots in the folder"),
    ]
    path.write_bytes(archive(members, FORMATS[format]))
    url = str(path)
    assert collect(Pipeline(TarShards(path)), face) == [
        {"__key__": "train/1", "__url__": url, "jpg": b"first", "seg.png": b"mask"},
        {"__key__": "train/2", "__url__": url, "jpg": b""},
        {"__key__": "2", "__url__": url, "jpg": b"another folder"},
        {"__key__": long, "__url__": url, "txt": b"x" * 1000},
        {"__key__": "grüße", "__url__": url, "txt": "grüße".encode()},
        {"__key__": "v1.0/3", "__url__": url, "txt": b"dots in the folder"},
    ]


def test_what_is_no_sample_is_left_out(tmp_path: Path) -> None:
    """Folders, symbolic links, pipes, devices, names without an extension, hidden files, WebDataset's own notes."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in [
            (tarfile.DIRTYPE, "folder.d"),
            (tarfile.SYMTYPE, "link.txt"),
            (tarfile.FIFOTYPE, "pipe.txt"),
            (tarfile.CHRTYPE, "device.txt"),
            (tarfile.BLKTYPE, "disk.txt"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "1.txt"
            tar.addfile(info)
        for name in ("README", ".hidden", "__meta__/1.txt", "1.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert keys(Pipeline(TarShards(path))) == ["1"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of its own
def test_what_webdataset_writes_comes_as_webdataset_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    image = numpy.arange(12, dtype=numpy.uint8).reshape(2, 2, 3)
    with webdataset.TarWriter(str(path)) as sink:
        for number in range(10):
            sink.write(
                {
                    "__key__": f"train/{number:03}",
                    "png": image,
                    "cls": number,
                    "json": {"number": number},
                    "npy": numpy.full(3, number),
                    "txt": "text",
                }
            )
    theirs = [
        {name: value for name, value in sample.items() if name != "__local_path__"}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert list(Pipeline(TarShards(path))) == theirs
    decoded = list(Pipeline(TarShards(path, decode=True)))
    assert [sample["cls"] for sample in decoded] == list(range(10))
    assert [sample["json"] for sample in decoded] == [{"number": number} for number in range(10)]
    assert [sample["npy"].tolist() for sample in decoded] == [[number] * 3 for number in range(10)]
    assert {sample["txt"] for sample in decoded} == {"text"}
    assert type(decoded[0]["png"]) is bytes


@on_both_faces
@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_archives(tmp_path: Path, suffix: str, face: Face) -> None:
    path = tmp_path / f"a{suffix}"
    content = archive(samples(0, 50, size=5000))
    if suffix == ".tar.zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(content))
    else:
        path.write_bytes(archive(samples(0, 50, size=5000), mode="w:gz"))
    found = collect(Pipeline(TarShards(path)), face)
    assert keys(found) == [f"{number:04}" for number in range(50)]
    assert found[7]["txt"] == b"7" * 5000


def test_archives_that_were_written_one_behind_the_other_are_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(archive(samples(0, 2)) + archive(samples(2, 1)))
    assert keys(Pipeline(TarShards(path))) == ["0000", "0001", "0002"]
    path.write_bytes(archive([]))
    assert keys(Pipeline(TarShards(path))) == []


def test_a_large_member_among_small_ones(tmp_path: Path) -> None:
    """Longer than what is read at once."""
    path = tmp_path / "a.tar"
    path.write_bytes(archive([("1.bin", b"a" * 3_000_001), ("2.bin", b"b")]))
    first, second = Pipeline(TarShards(path))
    assert first["bin"] == b"a" * 3_000_001
    assert second["bin"] == b"b"


# -- where from --------------------------------------------------------------------------------------------------------


@on_both_faces
def test_archives_come_in_order_by_glob_by_braces_and_by_sequence(
    shards: list[str], tmp_path: Path, face: Face
) -> None:
    for named in (tmp_path / "shard-*.tar", f"{tmp_path}/shard-{{000..003}}.tar", shards):
        assert keys(collect(Pipeline(TarShards(named)), face)) == ALL_KEYS
    chosen = TarShards(f"{tmp_path}/shard-{{003,001}}.tar")
    assert chosen.urls == (shards[3], shards[1])
    assert keys(collect(Pipeline(chosen), face)) == [*ALL_KEYS[15:], *ALL_KEYS[5:10]]
    assert keys(Pipeline(TarShards(f"file://{shards[0]}"))) == ALL_KEYS[:5]


@on_both_faces
def test_from_s3_by_url_and_by_store(
    s3_server: S3Server, shards: list[str], face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket()
    store = s3_server.store(bucket)
    for path in shards:
        store.put(f"train/{Path(path).name}", Path(path))
    names = "train/shard-{000..003}.tar"
    assert keys(collect(Pipeline(TarShards(names, store=store)), face)) == ALL_KEYS
    for name, value in {
        "AWS_ENDPOINT": s3_server.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    found = collect(Pipeline(TarShards(f"s3://{bucket}/{names}")), face)
    assert keys(found) == ALL_KEYS
    assert found[0]["__url__"] == f"s3://{bucket}/train/shard-000.tar"
    assert keys(assert_opens_at_every_cursor(TarShards(names, store=store))) == ALL_KEYS
    del store


@on_both_faces
def test_from_http_by_url_and_by_store(http_server: HttpServer, shards: list[str], face: Face) -> None:
    http_server.files = {f"a b/{Path(path).name}": Path(path).read_bytes() for path in shards}
    assert keys(collect(Pipeline(TarShards(f"{http_server.url}/a%20b/shard-{{000..003}}.tar")), face)) == ALL_KEYS
    store = http_server.store()
    source = TarShards([f"a b/{Path(path).name}" for path in shards], store=store)
    assert keys(collect(Pipeline(source), face)) == ALL_KEYS
    del source, store


def test_a_stored_archive_is_read_in_ranges_of_which_the_failed_are_tried_again(
    http_server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "aioloader.sources.chunks.object_chunks.__kwdefaults__",
        {"start": 0, "needed": 0, "size": 4096, "pace": None, "turn": None},
    )
    content = archive(samples(0, 40, size=100))
    http_server.files = {"a.tar": content}
    http_server.faults = {"a.tar": iter([503, "reset", 500])}
    store = http_server.store()
    assert keys(Pipeline(TarShards("a.tar", store=store))) == [f"{number:04}" for number in range(40)]
    ranges = {asked for method, _, asked in http_server.requests if method == "GET"}
    assert len(ranges) == -(-len(content) // 4096)
    del store


@on_both_faces
def test_so_many_archives_are_opened_ahead_and_no_more(http_server: HttpServer, face: Face) -> None:
    http_server.files = {f"{number}.tar": archive(samples(number, 1)) for number in range(6)}
    http_server.gate = gate = Gate()
    store = http_server.store()
    loader = Pipeline(TarShards("{0..5}.tar", store=store, open_ahead=2))

    def look() -> None:
        gate.wait_arrived(3)
        assert sorted(map(str, gate.arrived)) == ["0.tar", "1.tar", "2.tar"]
        gate.open_all()

    with Steps(loader, face) as steps:
        looking = Started(look)
        assert keys([steps.next()]) == ["0000"]
        looking.outcome()
        assert keys(steps.rest()) == ALL_KEYS[1:6]
    del loader, store


def test_without_archives_ahead_each_is_opened_when_the_one_before_is_over(http_server: HttpServer) -> None:
    http_server.files = {f"{number}.tar": archive(samples(number, 1)) for number in range(3)}
    store = http_server.store()
    assert keys(Pipeline(TarShards("{0..2}.tar", store=store, open_ahead=0))) == ALL_KEYS[:3]
    assert [path for _, path, _ in http_server.requests] == ["0.tar", "1.tar", "2.tar"]
    del store


# -- cursors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_it_opens_at_every_cursor(tmp_path: Path, suffix: str) -> None:
    broken = [("1.txt", b"1"), ("2.txt", b"2"), ("2.txt", b"2"), ("../3.txt", b"3"), ("4.json", b"{"), ("5.txt", b"5")]
    paths = []
    for number, members in enumerate([samples(0, 3), [], broken, samples(3, 2)]):
        paths.append(tmp_path / f"{number}{suffix}")
        paths[-1].write_bytes(archive(members, mode="w:gz" if suffix == ".tar.gz" else "w"))
    paths.insert(1, tmp_path / f"missing{suffix}")
    found = assert_opens_at_every_cursor(TarShards(paths, decode=True))
    errors = [outcome for outcome in found if isinstance(outcome, str)]
    assert keys(outcome for outcome in found if isinstance(outcome, dict)) == [*ALL_KEYS[:3], "1", "5", *ALL_KEYS[3:5]]
    assert len(errors) == 4


def test_a_cursor_that_does_not_fit_is_refused(shards: list[str]) -> None:
    with pytest.raises(ValueError, match="the cursor is in archive 9, but there are 4: they have changed"):
        next(iter(Pipeline(Opened(TarShards(shards), (9, 0, None, None)))))
    (message,) = outcomes(TarShards(shards[:1]), cursor=(0, 10**6, None, None))
    assert f"the file has {Path(shards[0]).stat().st_size} bytes now, and reading resumes at byte 1000000" in message


def test_a_thread_whose_time_is_always_up_gives_all_samples(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of the thread that completes no sample is no end."""
    monkeypatch.setattr("aioloader.sources.parsing.PARSE_SECONDS", -1.0)
    assert keys(assert_opens_at_every_cursor(TarShards(shards))) == ALL_KEYS


NAMES = st.sampled_from(
    ["1.txt", "1.cls", "2.txt", "x" * 120 + ".txt", "folder/1.txt", "no_extension", "/1.txt", "ä.txt"]
)
MEMBERS = st.lists(st.tuples(NAMES, st.sampled_from([b"", b"abc", bytes(512), bytes(513)])), max_size=6)


@settings(max_examples=100)
@given(
    members=MEMBERS,
    format=st.sampled_from(sorted(FORMATS)),
    cuts=st.lists(st.integers(0, 20_000), max_size=6),
    length=st.integers(0, 20_000),
)
def test_where_the_pieces_end_makes_no_difference(members: Members, format: str, cuts: list[int], length: int) -> None:
    """Of a whole archive and of one that ends anywhere; the whole one has what `tarfile` finds in it."""
    if format == "ustar":
        members = [(name, data) for name, data in members if len(name) <= 100]  # it has no room for longer ones
    content = archive(members, FORMATS[format])

    def entries(content: bytes, cuts: Iterable[int]) -> list[Any]:
        bounds = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
        parser = TarParser(StoredFile("a.tar", None, "a.tar"), 0, (0, None, None), DecodeSample(False))
        found: list[Any] = []
        try:
            for start, stop in pairwise(bounds):
                found += parser.parse(content[start:stop]) if start < stop else []
                while parser.has_more:
                    found += parser.parse(b"")
            found += parser.finish()
        except BrokenDataError as error:
            return [*map(seen, found), str(error)]
        return list(map(seen, found))

    def seen(entry: Any) -> Any:
        return (entry.value, str(entry.error), entry.cursor, entry.key)

    whole = entries(content, [])
    assert entries(content, cuts) == whole
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        there = [member.name for member in tar if "." in member.name]
    if not any(name == "/1.txt" for name in there) and len(set(there)) == len(there):
        assert sum(len(value) - 2 for value, _, _, _ in whole) == len(there)
    if length < len(content):
        assert entries(content[:length], cuts) == entries(content[:length], [])


# -- what is broken ----------------------------------------------------------------------------------------------------


def broken_shards(tmp_path: Path, content: bytes, name: str = "bad.tar") -> tuple[TarShards, str]:
    """Two archives, of which the first is `content`; and its path."""
    bad, fine = tmp_path / name, tmp_path / "fine.tar"
    bad.write_bytes(content)
    fine.write_bytes(archive(samples(9, 1)))
    return TarShards([bad, fine]), str(bad)


@on_both_faces
def test_a_truncated_archive_gives_its_whole_samples_then_an_error_then_the_next_archive(
    tmp_path: Path, face: Face
) -> None:
    members = [("1.txt", b"1"), ("1.cls", b"1"), ("2.txt", b"2" * 2000), ("2.cls", b"2")]
    whole = archive(members)
    second = 2 * 1024 + 512  # where the content of the third member begins
    left_out = "; the sample '2' may lack members and is left out"
    for length, expected, said in [
        (0, [], "the file is empty, and even an archive without members has an end mark"),
        (300, [], "the archive is truncated: it ends at byte 300, in the member at 0"),
        (1024, [], "the archive is truncated, or its writer was not closed: it ends at byte 1024 without an end mark"),
        (second, ["1"], f"the archive is truncated: it ends at byte {second}, in the member at 2048"),
        (second - 1, [], f"the archive is truncated: it ends at byte {second - 1}, in the member at 2048"),
        (second + 2001, ["1"], "the archive is truncated: it ends at byte 4561, in the member at 2048"),
        (second + 2048, ["1"], "the archive is truncated, or its writer was not closed: it ends at byte 4608 without"),
    ]:
        source, path = broken_shards(tmp_path, whole[:length])
        with Steps(Pipeline(source), face) as steps:
            found = steps.outcomes()
        assert keys(found[:-2]) == expected
        assert isinstance(found[-2], BrokenDataError)
        assert str(found[-2]).startswith(f"{path}: {said}")
        assert length < 1024 or "may lack members and is left out" in str(found[-2])
        assert keys(found[-1:]) == ["0009"]
    source, _ = broken_shards(tmp_path, whole[:second])
    assert outcomes(source)[1].endswith(left_out)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_a_truncated_compressed_archive(tmp_path: Path, suffix: str) -> None:
    members = [(f"{number}.bin", numpy.random.default_rng(number).bytes(50_000)) for number in range(10)]
    if suffix == ".tar.gz":
        content, name = archive(members, mode="w:gz"), "gzip"
    else:
        content, name = zstandard.ZstdCompressor().compress(archive(members)), "zstd"
    source, path = broken_shards(tmp_path, content[:-150_000], f"bad{suffix}")
    found = outcomes(source)
    assert 1 < len(found) < 10
    assert found[-2].startswith(f"{path}: the {name} data is truncated: it ends before its end mark")
    assert keys(found[-1:]) == ["0009"]


def test_what_is_no_archive(tmp_path: Path) -> None:
    source, path = broken_shards(tmp_path, b"<html>not found</html>" * 100)
    found = outcomes(source)
    assert found[0].startswith(f"{path}: the file is not a tar archive: there is no member header at byte 0: ")
    assert keys(found[1:]) == ["0009"]


def test_an_archive_that_is_broken_in_the_middle(tmp_path: Path) -> None:
    """Where `tarfile` ends in silence."""
    content = bytearray(archive(samples(0, 3)))
    content[2048 + 20] ^= 1  # in the header of the third member
    source, path = broken_shards(tmp_path, bytes(content))
    found = outcomes(source)
    assert found[0] == (
        f"{path}: the archive is broken: there is no member header at byte 2048: its checksum is wrong; the sample "
        f"'0000' may lack members and is left out"
    )
    assert keys(found[1:]) == ["0009"]


@on_both_faces
def test_a_duplicate_member_is_an_error_at_its_place_and_the_next_sample_follows(tmp_path: Path, face: Face) -> None:
    members = [("1.txt", b"1"), ("2.txt", b"2"), ("2.TXT", b"?"), ("3.txt", b"3")]
    source, path = broken_shards(tmp_path, archive(members))
    with Steps(Pipeline(source), face) as steps:
        found = steps.outcomes()
    assert keys([found[0], *found[2:]]) == ["1", "3", "0009"]
    assert isinstance(found[1], BrokenDataError)
    assert str(found[1]) == (
        f"{path}: the sample '2' has two members 'txt', the second one '2.TXT' at byte 2048; each extension may come "
        f"once in a sample"
    )
    assert f"aioloader: stage source(TarShards), key '{path}:2', epoch 0, position 1" in notes(found[1])


@pytest.mark.parametrize(
    "name", ["/tmp/evil.txt", "../evil.txt", "a/../../evil.txt", "a\\..\\evil.txt", "C:\\evil.txt"]
)
def test_a_name_that_leads_out_of_the_archive_is_refused_and_never_on_disk(tmp_path: Path, name: str) -> None:
    source, path = broken_shards(tmp_path, archive([("1.txt", b"1"), (name, b"evil"), ("3.txt", b"3")]))
    there = sorted(tmp_path.parent.rglob("*"))
    found = outcomes(source)
    assert keys([found[0], *found[2:]]) == ["1", "3", "0009"]
    assert found[1] == (
        f"{path}: the name {name!r} at byte 1024 leads out of the archive, and names must be relative and without "
        f"'..'; nothing is extracted to disk, but pack it again"
    )
    assert sorted(tmp_path.parent.rglob("*")) == there
    assert not Path("/tmp/evil.txt").exists()


# -- headers that make no sense ----------------------------------------------------------------------------------------


def member(
    name: str,
    content: bytes = b"",
    *,
    kind: bytes = b"0",
    size: bytes | None = None,
    link: str = "",
    fields: Mapping[int, bytes] = MappingProxyType({}),
) -> bytes:
    """A member by hand: `size` is what the header says, and `fields` what is at some places in it."""
    header = bytearray(512)
    header[257:265] = b"ustar\x0000"
    header[156:157] = kind
    for at, field in {
        0: name.encode(),
        124: b"%011o\0" % len(content) if size is None else size,
        157: link.encode(),
        **fields,
    }.items():
        header[at : at + len(field)] = field
    header[148:156] = b"%06o\0 " % (sum(header) + 256)
    return bytes(header) + content + bytes(-len(content) % 512)


def pax(**records: str | bytes) -> bytes:
    """A pax header by hand, for the member that follows."""
    content = b""
    for key, value in records.items():
        line = b" %b=%b\n" % (key.replace("_", ".").encode(), value.encode() if isinstance(value, str) else value)
        length = len(line) + 1
        while len(b"%d" % length) + len(line) != length:
            length += 1
        content += b"%d%b" % (length, line)
    return member("././@PaxHeader", content, kind=b"x")


END = bytes(1024)


def text(number: int) -> bytes:
    """A sample of one member."""
    return member(f"{number}.txt", b"%d" % number)


NO_SIZES = [b"-00000001000", b"-5\0", b"xx\0", b"0o17\0", b"1_0\0", b"+1\0", b"8\0", b"\xff" * 12, b"\xc0" + bytes(11)]


@on_both_faces
@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"0", b"7", b"1", b"A"])
def test_a_negative_size_ends_its_archive(tmp_path: Path, kind: bytes, face: Face) -> None:
    """And does not send the reader round for ever."""
    evil = member("3.bin", b"", kind=kind, size=b"-00000001000")
    source, path = broken_shards(tmp_path, text(1) + text(2) + evil + text(4) + END)
    before = ["1"] if kind in b"xgLK" else ["1", "2"]  # of which member a header is that belongs to one, nobody knows
    found = outcomes(source, face)
    assert keys([*found[:-2], found[-1]]) == [*before, "0009"]
    assert found[-2] == (
        f"{path}: the archive is broken: the size of the member at byte 2048, in the field at 2172, is "
        f"b'-00000001000', which is not an octal number; the sample '{len(before) + 1}' may lack members and is "
        f"left out"
    )


@pytest.mark.parametrize("size", NO_SIZES, ids=repr)
def test_a_size_that_is_no_number_ends_its_archive(tmp_path: Path, size: bytes) -> None:
    source, path = broken_shards(tmp_path, text(1) + text(2) + member("3.bin", size=size) + text(4) + END)
    found = outcomes(source)
    assert keys([*found[:2], found[3]]) == ["1", "2", "0009"]
    assert found[2].startswith(
        f"{path}: the archive is broken: the size of the member at byte 2048, in the field at 2172"
    )
    assert "which is not an octal number" in found[2] or "which is a negative number" in found[2]


@on_both_faces
@pytest.mark.parametrize(
    "size", ["-1536", "-5", "xx", "1_0", "+3", "", "3" * 5000, "\u0663", "0x3"], ids=lambda size: size[:9]
)
def test_a_pax_size_that_is_no_number_costs_its_sample(tmp_path: Path, size: str, face: Face) -> None:
    evil = pax(size=size, path="3.txt") + member("3.txt", b"333")
    source, path = broken_shards(tmp_path, text(1) + text(2) + evil + member("3.cls", b"3") + text(4) + END)
    found = outcomes(source, face)
    assert keys([*found[:2], *found[3:]]) == ["1", "2", "4", "0009"]
    assert found[2].startswith(
        f"{path}: the member '3.txt' at byte 2048 cannot be read: the pax header at byte 2560 has the size b'"
    )
    assert len(found[2]) < 300 + len(path)


def test_numbers_as_every_writer_writes_them(tmp_path: Path) -> None:
    sizes = [b"000000000003", b"3\0", b"          3 ", b" 3 \0garbage", b"\x80" + bytes(10) + b"\3"]
    path = tmp_path / "a.tar"
    members = [member(f"{number}.txt", b"abc", size=size) for number, size in enumerate(sizes)]
    path.write_bytes(b"".join(members) + pax(size="3") + member("9.txt", b"abc", size=bytes(12)) + END)
    assert [sample["txt"] for sample in Pipeline(TarShards(path))] == [b"abc"] * 6


@on_both_faces
@pytest.mark.parametrize(
    "content",
    [
        b"3.txt",
        b"99 path=3.txt\n",
        b"0 path=3.txt\n",
        b"-5 path=3.txt\n",
        b"14 path:3.txt\n",
        b"9" * 5000,
        b"13 path=3.txt\n",
    ],
)
def test_a_pax_header_that_makes_no_sense_costs_its_sample(tmp_path: Path, content: bytes, face: Face) -> None:
    """The member's own header says where the next one is."""
    evil = member("././@PaxHeader", content, kind=b"x") + member("3.txt", b"333")
    source, path = broken_shards(tmp_path, text(1) + text(2) + evil + text(4) + END)
    found = outcomes(source, face)
    assert keys([*found[:2], *found[3:]]) == ["1", "2", "4", "0009"]
    assert found[2] == (
        f"{path}: the member '3.txt' at byte 2048 cannot be read: the pax header at byte 2560 has no record at its "
        f"byte 0"
    )


def test_a_name_that_cannot_be_known_ends_its_archive(tmp_path: Path) -> None:
    """The sample before may be its own: what a header has room for may be the beginning of another name."""
    for name in ("x" * 100, "gr??e.txt"):
        evil = member("././@PaxHeader", b"?", kind=b"x") + member(name, b"333")
        source, path = broken_shards(tmp_path, text(1) + text(2) + evil + text(4) + END)
        found = outcomes(source)
        assert keys([found[0], found[2]]) == ["1", "0009"]
        assert found[1] == (
            f"{path}: the member at byte 2048 has no name that can be read: the pax header at byte 2560 has no record "
            f"at its byte 0; the sample '2' may lack members and is left out"
        )


@on_both_faces
@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_a_header_has_a_bound_of_its_own(tmp_path: Path, kind: bytes, face: Face) -> None:
    """It is passed over without being held, and the sample of its member is an error."""
    long = member("././@Long", bytes(3 << 20), kind=kind)
    source, path = broken_shards(tmp_path, text(1) + text(2) + long + text(3) + text(4) + END)
    found = outcomes(source, face)
    assert keys([*found[:2], *found[3:]]) == ["1", "2", "4", "0009"]
    what = "pax header" if kind == b"x" else "long name"
    assert found[2] == (
        f"{path}: the member '3.txt' at byte 2048 cannot be read: the {what} at byte 2560 has 3145728 bytes, and at "
        f"most 1048576 are allowed"
    )


def test_a_comment_for_all_members_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(member("pax_global_header", bytes(3 << 20), kind=b"g") + text(1) + text(2) + END)
    assert keys(Pipeline(TarShards(path))) == ["1", "2"]


# -- bounds ------------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_member_that_is_too_long_is_an_error_at_its_place_and_the_rest_goes_on(
    tmp_path: Path, suffix: str, face: Face
) -> None:
    long = member("2.txt", b"2") + member("2.bin", bytes(5000)) + member("2.cls", b"2")
    content = text(1) + long + member("3.bin", bytes(4999)) + member("README", bytes(9000)) + text(4) + END
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
    found = outcomes(TarShards(path, max_member_bytes=4999), face)
    assert keys([found[0], *found[2:]]) == ["1", "3", "4"]
    assert found[1] == (
        f"{path}: the member '2.bin' at byte 2048 has 5000 bytes, and at most 4999 are allowed; pass a larger "
        f"max_member_bytes"
    )
    assert keys(outcomes(TarShards(path, max_member_bytes=5000), face)) == ["1", "2", "3", "4"]


@on_both_faces
def test_a_sample_that_is_too_long_is_an_error_at_its_place_and_the_rest_goes_on(tmp_path: Path, face: Face) -> None:
    """Names with a dot too early make all of an archive one sample."""
    many = b"".join(member(f"img.{number:04}.bin", bytes(1000)) for number in range(100))
    path = tmp_path / "a.tar"
    path.write_bytes(text(1) + many + text(3) + END)
    found = outcomes(TarShards(path, max_sample_bytes=50_000), face)
    assert keys([found[0], found[2]]) == ["1", "3"]
    assert found[1] == (
        f"{path}: the sample 'img' has 50292 bytes up to the member 'img.0032.bin' at byte 50176, and at most 50000 "
        f"are allowed; pass a larger max_sample_bytes, unless the names have a dot too early: what is before the first "
        f"one is the key"
    )
    assert keys(outcomes(TarShards(path), face)) == ["1", "img", "3"]


@pytest.mark.parametrize(
    "size", [b"\x80" + bytes(3) + (1 << 60).to_bytes(8), b"\x80" + b"\xff" * 11, b"77777777777\0"], ids=repr
)
def test_a_member_that_says_to_be_longer_than_the_archive(tmp_path: Path, size: bytes) -> None:
    source, path = broken_shards(tmp_path, text(1) + text(2) + member("3.txt", b"3", size=size) + text(4) + END)
    found = outcomes(source)
    assert keys([*found[:2], *found[3:]]) == ["1", "2", "0009"]
    assert found[2].startswith(
        f"{path}: the archive is truncated: it ends at byte 5120, in the member at 2048; the sample '3' "
    )


def in_pieces(pieces: Iterable[bytes], limits: TarLimits) -> tuple[list[Any], int]:
    """What an archive has that comes in `pieces`, and how many bytes were held for it at most."""
    parser = TarParser(StoredFile("a.tar.gz", None, "a.tar.gz"), 0, (0, None, None), DecodeSample(False), limits)
    found: list[Any] = []
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for piece in pieces:
            found += parser.parse(piece)
            while parser.has_more:
                found += parser.parse(b"")
        found += parser.finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return [str(entry.error) if entry.error else entry.value for entry in found], peak - before


def packed(*parts: tuple[bytes, int]) -> list[bytes]:
    """Parts, so many times each, by gzip."""
    compressor = zlib.compressobj(wbits=31)
    pieces = [compressor.compress(part) for part, times in parts for _ in range(times)]
    return [piece for piece in [*pieces, compressor.flush()] if piece]


def test_what_is_passed_over_is_not_held() -> None:
    """64 MiB of zeros each: a member that is too long, one that is left out, headers without end, zeros at the end."""
    zeros = (bytes(1 << 20), 64)
    long, left_out, header = (
        member(name, size=b"%011o\0" % (64 << 20), kind=kind)
        for name, kind in (("2.bin", b"0"), ("README", b"0"), ("", b"x"))
    )
    headers = pax(comment="x" * 1500) * 256
    pieces = packed(
        (text(1) + long, 1),
        zeros,
        (left_out, 1),
        zeros,
        (header, 1),
        zeros,
        (text(3), 1),
        (headers, 100),
        (text(4), 1),
        zeros,
    )
    found, held = in_pieces(pieces, TarLimits(member_bytes=1 << 20))
    assert keys([found[0], found[3]]) == ["1", "4"]
    assert "the member '2.bin' at byte 1024 has 67108864 bytes" in found[1]
    assert "has 67108864 bytes, and at most 1048576 are allowed" in found[2]
    assert len(found) == 4
    assert held < 16 << 20


# -- sparse members ----------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize(
    "options", ["gnu", "pax --sparse-version=0.0", "pax --sparse-version=0.1", "pax --sparse-version=1.0"]
)
def test_sparse_members_that_gnu_tar_writes(tmp_path: Path, options: str, face: Face) -> None:
    contents = {}
    for number in range(5):
        with (tmp_path / f"{number}.bin").open("wb") as file:
            if number == 1:
                for part in range(40):  # more than a header has room for
                    file.seek(part << 16)
                    file.write(b"%d" % part * 1000)
            if number == 2:
                file.truncate(100_000)
            if number == 3:
                file.write(b"3" * 5000)
                file.truncate(100_000)
        contents[number] = (tmp_path / f"{number}.bin").read_bytes()
    names = [f"{number}.bin" for number in range(5)]
    command = ["tar", "-S", *f"--format={options}".split(), "-cf", "a.tar", *names]
    subprocess.run(command, cwd=tmp_path, check=True)
    archived = (tmp_path / "a.tar").read_bytes()
    if len(archived) > 1 << 20:
        pytest.skip("this file system or this tar knows no holes")
    found = collect(Pipeline(TarShards(tmp_path / "a.tar")), face)
    assert [sample["bin"] == contents[number] for number, sample in enumerate(found)] == [True] * 5


def old_sparse(size: bytes, spans: list[tuple[bytes, bytes]], content: bytes, flag: bytes = b"\0") -> bytes:
    """A member in GNU's own format."""
    fields = {386 + 24 * at + 12 * half: span[half] for at, span in enumerate(spans) for half in (0, 1)}
    return member("2.bin", content, kind=b"S", fields={**fields, 482: flag, 483: size})


def in_pax(size: str, content: bytes, major: str = "1") -> bytes:
    """A member whose map is at the beginning of its content."""
    return pax(GNU_sparse_major=major, GNU_sparse_minor="0", GNU_sparse_realsize=size) + member("2.bin", content)


SPARSE: list[Any] = [
    (old_sparse(b"3000", [(b"0", b"2"), (b"1000", b"2")], b"abcd"), None),
    (old_sparse(b"10", [(b"0", b"2"), (b"7", b"2")], b"abcd"), "a part that ends at 9 of a file of 8"),
    (old_sparse(b"10", [(b"4", b"2"), (b"2", b"2")], b"abcd"), "a part at 2, where the one before ends at 6"),
    (old_sparse(b"10", [(b"4", b"2")], b"abcd"), "parts of 2 bytes together, and 4 are stored"),
    (old_sparse(b"-10", [(b"4", b"2")], b"ab"), "b'-10"),
    (old_sparse(b"10", [(b"-4", b"2")], b"ab"), "b'-4"),
    (old_sparse(b"10", [(b"4", b"\xff" * 12)], b"ab"), "which is a negative number"),
    (in_pax("8", b"1\n6\n2\n".ljust(512, b"\0") + b"ab"), None),
    (in_pax("8", b"9\n6\n2\n".ljust(512, b"\0")), "9 parts, and fewer follow"),
    (in_pax("8", b"-1\n6\n2\n".ljust(512, b"\0")), "b'-1', which is not a decimal number"),
    (in_pax("8", b"9999999\n"), "9999999 parts, and at most 65536 are allowed"),
    (in_pax("8", b""), "b'', which is not a decimal number"),
    (in_pax("-8", b""), "b'-8', which is not a decimal number"),
    (in_pax("8", b"", major="2"), "the sparse version b'2.0', which is not supported; pack it again without -S"),
    (pax(GNU_sparse_major="1", GNU_sparse_minor="0") + member("2.bin"), "no size of a sparse member"),
    (pax(GNU_sparse_map="6,2", GNU_sparse_size="8") + member("2.bin", b"ab"), None),
    (pax(GNU_sparse_map="6,2,1", GNU_sparse_size="8") + member("2.bin", b"ab"), "a part without a length"),
    (pax(GNU_sparse_map="6,-2", GNU_sparse_size="8") + member("2.bin", b"ab"), "b'-2', which is not a decimal number"),
    (
        pax(GNU_sparse_map="6,2", GNU_sparse_size="999999999999") + member("2.bin", b"ab"),
        "has 999999999999 bytes, and at most 268435456 are allowed",
    ),
]  # fmt: skip


@on_both_faces
@pytest.mark.parametrize(("content", "said"), SPARSE)
def test_a_sparse_map_that_makes_no_sense_costs_its_sample(
    tmp_path: Path, content: bytes, said: str | None, face: Face
) -> None:
    source, path = broken_shards(tmp_path, text(1) + content + text(3) + END)
    found = outcomes(source, face)
    assert keys([found[0], *found[2:]]) == ["1", "3", "0009"]
    if said is None:
        assert found[1]["bin"] in (b"\0\0\0\0\0\0ab", b"ab".ljust(512, b"\0") + b"cd".ljust(1024, b"\0"))
    else:
        assert found[1].startswith(f"{path}: the member '2.bin' at byte 1024 ")
        assert said in found[1]


# -- links, and ends ---------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_hard_link_has_the_content_of_the_member_before_it_in_its_sample(tmp_path: Path, face: Face) -> None:
    """Elsewhere it is an error: a resume begins with the sample, and would not find what is before it."""
    long = "deep/" * 60 + "1"
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, target in [
            ("1.txt", None), ("1.copy.txt", "1.txt"), ("2.txt", "1.txt"), ("3.txt", "4.txt"), ("4.txt", None),
            (f"{long}.txt", None), (f"{long}.copy", f"{long}.txt"), ("5.a", "5.__key__"), ("6.a", "6.a"),
            ("7.txt", None),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            if target is not None:
                info.type, info.linkname = tarfile.LNKTYPE, target
                tar.addfile(info)
            else:
                info.size = 1
                tar.addfile(info, io.BytesIO(b"x"))
    found = outcomes(TarShards(path), face)
    assert found[0] == {"__key__": "1", "__url__": str(path), "txt": b"x", "copy.txt": b"x"}
    assert found[4] == {"__key__": long, "__url__": str(path), "txt": b"x", "copy": b"x"}
    assert keys([found[3], found[7]]) == ["4", "7"]
    assert found[1] == (
        f"{path}: the member '2.txt' at byte 1536 is a hard link to '1.txt', which is not a member before it in the "
        f"same sample; pack it again with tar --hard-dereference"
    )
    for place, target in ((2, "4.txt"), (5, "5.__key__"), (6, "6.a")):
        assert f"is a hard link to {target!r}, which is not a member before it" in found[place]


@on_both_faces
@pytest.mark.parametrize("garbage", [b"garbage", b"garbage" * 100], ids=len)
def test_what_comes_after_the_end_mark_costs_no_sample(tmp_path: Path, garbage: bytes, face: Face) -> None:
    source, path = broken_shards(tmp_path, text(1) + text(2) + END + garbage)
    found = outcomes(source, face)
    assert keys([*found[:2], found[3]]) == ["1", "2", "0009"]
    assert found[2].startswith(f"{path}: there is something after the end mark")
    source, path = broken_shards(tmp_path, text(1) + text(2) + END + bytes(100))
    assert keys(outcomes(source, face)) == ["1", "2", "0009"]


def test_a_sample_ends_with_its_archive(tmp_path: Path) -> None:
    """Where another one follows in the same file that begins with the same key."""
    path = tmp_path / "a.tar"
    path.write_bytes(text(1) + END + member("1.cls", b"1") + text(2) + END)
    found = assert_opens_at_every_cursor(TarShards(path))
    assert [sorted(sample) for sample in found] == [["__key__", "__url__", name] for name in ("txt", "cls", "txt")]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
@pytest.mark.parametrize("last", [END, END + b"garbage", b"", member("9.txt", size=b"-1"), b"?" * 512], ids=len)
def test_it_goes_on_after_every_error(tmp_path: Path, suffix: str, last: bytes) -> None:
    """A resume after each sample and each error gives what came after it."""
    content = b"".join(
        [
            *(
                text(1),
                pax(size="xx") + text(2),
                member("2.cls", b"2"),
                text(3),
                member("././@PaxHeader", b"?", kind=b"x"),
            ),
            *(text(4), member("5.bin", bytes(5000)), old_sparse(b"10", [(b"4", b"2")], b"abcd"), text(6)),
            *(member("7.txt", kind=b"1", link="6.txt"), member("8.txt", b"8"), member("8.TXT", b"8"), text(9), last),
        ]
    )
    if suffix != ".tar":
        content = gzip.compress(content) if suffix == ".tar.gz" else zstandard.ZstdCompressor().compress(content)
    (tmp_path / f"a{suffix}").write_bytes(content)
    (tmp_path / f"b{suffix}").write_bytes(content)
    found = assert_opens_at_every_cursor(TarShards(tmp_path / f"*{suffix}", max_member_bytes=4000))
    some = ["1", "3", "6", *(["9"] if last.startswith(END) else [])]
    assert keys(sample for sample in found if isinstance(sample, dict)) == 2 * some


@on_both_faces
def test_a_missing_archive_is_named_at_its_place_and_the_next_one_follows(
    http_server: HttpServer, shards: list[str], tmp_path: Path, face: Face
) -> None:
    missing = str(tmp_path / "missing.tar")
    with Steps(Pipeline(TarShards([shards[0], missing, str(tmp_path), shards[1]])), face) as steps:
        found = steps.outcomes()
    assert keys([*found[:5], *found[7:]]) == ALL_KEYS[:10]
    assert isinstance(found[5], FileNotFoundError)
    assert found[5].filename == missing
    assert isinstance(found[6], IsADirectoryError)
    assert f"aioloader: stage source(TarShards), key '{missing}', epoch 0, position 5" in notes(found[5])

    http_server.files = {"0.tar": archive(samples(0, 1)), "2.tar": archive(samples(1, 1)), "3.tar": b""}
    http_server.faults = {"3.tar": repeat(403)}
    store = http_server.store()
    with Steps(Pipeline(TarShards("{0..3}.tar", store=store)), face) as steps:
        found = steps.outcomes()
    assert keys([found[0], found[2]]) == ALL_KEYS[:2]
    assert isinstance(found[1], FileNotFoundError)
    assert "key '1.tar', epoch 0, position 1" in notes(found[1])
    assert "key '3.tar', epoch 0, position 3" in notes(found[3])
    del store, found


@on_both_faces
def test_a_body_that_is_cut_off_is_an_error_and_the_next_archive_follows(http_server: HttpServer, face: Face) -> None:
    http_server.files = {"0.tar": archive(samples(0, 20)), "1.tar": archive(samples(0, 1))}
    http_server.faults = {"0.tar": repeat("truncated")}
    store = http_server.store()
    with Steps(Pipeline(TarShards("{0,1}.tar", store=store)), face) as steps:
        found = steps.outcomes()
    assert isinstance(found[0], Exception)
    assert "key '0.tar', epoch 0, position 0" in notes(found[0])
    assert keys(found[1:]) == ["0000"]
    del store, found


def test_a_server_without_ranges_sends_the_whole_archive_once(http_server: HttpServer) -> None:
    """As plain ones do; also where an epoch goes on in the middle of it."""
    content = archive(samples(0, 3, size=10_000))
    http_server.files = {"0.tar": content}
    http_server.ranges = False
    source = TarShards(f"{http_server.url}/0.tar")
    assert keys(assert_opens_at_every_cursor(source)) == ALL_KEYS[:3]
    (message,) = outcomes(source, cursor=(0, 10**6, None, None))
    assert f"the object '0.tar' has {len(content)} bytes now, and reading resumes at byte 1000000" in message
    del source


def test_a_cursor_behind_the_end_of_a_stored_archive_is_refused(http_server: HttpServer) -> None:
    http_server.files = {"0.tar": archive(samples(0, 1))}
    (message,) = outcomes(TarShards(f"{http_server.url}/0.tar"), cursor=(0, 10**6, None, None))
    assert "the object '0.tar' has 10240 bytes now, and reading resumes at byte 1000000" in message


# -- decoding ----------------------------------------------------------------------------------------------------------


def png(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), color).save(file, "PNG")
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    numpy.save(file, array)
    return file.getvalue()


def test_members_are_decoded_by_their_last_extension(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    content = {
        "png": png((1, 2, 3)),
        "seg.png": png((4, 5, 6)),
        "json": b'{"a": [1]}',
        "txt": "grüße".encode(),
        "cls": b"7\n",
        "npy": npy(numpy.arange(3)),
        "pickle": pickle.dumps(1),
        "bin": b"bytes",
    }
    path.write_bytes(archive([(f"1.{name}", value) for name, value in content.items()]))

    (sample,) = Pipeline(TarShards(path, decode=True))
    assert (sample["json"], sample["txt"], sample["cls"]) == ({"a": [1]}, "grüße", 7)
    assert sample["npy"].tolist() == [0, 1, 2]
    assert all(sample[name] == content[name] for name in ("png", "pickle", "bin"))

    (sample,) = Pipeline(TarShards(path)).map(DecodeSample("torchrgb8"))
    assert sample["png"].shape == (3, 2, 3)
    assert sample["png"].dtype == torch.uint8
    assert sample["png"][:, 0, 0].tolist() == [1, 2, 3]
    assert sample["seg.png"][:, 1, 2].tolist() == [4, 5, 6]

    (sample,) = Pipeline(TarShards(path, decode="pil"))
    assert sample["png"].getpixel((0, 0)) == (1, 2, 3)

    (sample,) = Pipeline(TarShards(path, decode={".CLS": float, "seg.png": len}))
    assert (sample["cls"], sample["seg.png"], sample["json"]) == (7.0, len(content["seg.png"]), content["json"])


def test_a_member_that_is_not_what_it_says_stands_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    objects = npy(numpy.array([object()], dtype=object))
    path.write_bytes(
        archive([("1.json", b"{"), ("2.json", b"2"), ("3.png", b"PNG"), ("4.npy", objects), ("5.txt", b"\xff")])
    )
    with Steps(Pipeline(TarShards(path, decode="pil")), "for") as steps:
        found = steps.outcomes()
    assert found[1]["json"] == 2
    assert isinstance(found[0], BrokenDataError)
    assert isinstance(found[0].__cause__, json.JSONDecodeError)
    assert str(found[0]).startswith(f"1.json in {path} cannot be decoded: JSONDecodeError: Expecting")
    assert str(found[2]).startswith(f"3.png in {path} cannot be decoded: UnidentifiedImageError: ")
    assert "Object arrays cannot be loaded when allow_pickle=False" in str(found[3])
    assert f"5.txt in {path} cannot be decoded: UnicodeDecodeError" in str(found[4])


# -- as a source among others ------------------------------------------------------------------------------------------


@on_both_faces
def test_taking_a_few_samples_lets_go_of_the_archives(tmp_path: Path, face: Face) -> None:
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.tar")
        paths[-1].write_bytes(archive(samples(100 * number, 100, size=10_000)))
    with Steps(Pipeline(TarShards(paths)), face) as steps:
        assert keys([steps.next()]) == ["0000"]
    assert keys(collect(Pipeline(TarShards(paths)).take(3), face)) == ALL_KEYS[:3]


@on_both_faces
def test_leaving_while_a_store_has_not_answered(http_server: HttpServer, face: Face) -> None:
    http_server.files = {f"{number}.tar": archive(samples(number, 1)) for number in range(3)}
    http_server.gate = gate = Gate()
    gate.open("0.tar")
    store = http_server.store()
    with Steps(Pipeline(TarShards("{0..2}.tar", store=store)), face) as steps:
        assert keys([steps.next()]) == ["0000"]
        steps.until_arrived(gate, 3)
    gate.open_all()
    del store


@pytest.mark.filterwarnings("ignore::aioloader.ReadAllWarning")
def test_batches_shuffles_and_shards_follow(shards: list[str]) -> None:
    loader = Pipeline(TarShards(shards, decode=True)).shuffle(buffer_size=8).map(lambda sample: sample["cls"]).batch(5)
    batches = list(loader)
    assert [batch.shape for batch in batches] == [(5,)] * 4
    parts = [keys(Pipeline(TarShards(shards)).shard(rank, 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == ALL_KEYS


def test_it_can_be_pickled(shards: list[str]) -> None:
    assert keys(Pipeline(pickle.loads(pickle.dumps(TarShards(shards, decode=True))))) == ALL_KEYS


# -- bad arguments -----------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_refused_where_they_are_written(shards: list[str], tmp_path: Path) -> None:
    refused: Callable[..., Any] = partial(pytest.raises)
    with refused(FileNotFoundError, match=r"TarShards: no file matches the glob '.*none-\*\.tar', searched from"):
        TarShards(tmp_path / "none-*.tar")
    with refused(ValueError, match="TarShards needs at least one path, got none"):
        TarShards([])
    with refused(TypeError, match="TarShards takes a path, a glob, or a sequence of them; got 3"):
        TarShards(3)  # type: ignore[arg-type]
    with refused(ValueError, match="TarShards runs no commands, got 'pipe:curl x'; pass the URL, or a store"):
        TarShards("pipe:curl x")
    with refused(ValueError, match=r"takes URLs without a query, got 'https://host/a\.tar\?key=1'; make a store"):
        TarShards("https://host/a.tar?key=1")
    with refused(ValueError, match="open_ahead must be at least 0, got -1"):
        TarShards(shards, open_ahead=-1)
    with refused(ValueError, match="decode must be False, True, 'pil', 'torchrgb8' or a mapping .*, got 'rgb'"):
        TarShards(shards, decode="rgb")  # type: ignore[arg-type]
    with refused(ValueError, match="decode must map extensions to functions, got 3 for 'cls'"):
        TarShards(shards, decode={"cls": 3})  # type: ignore[dict-item]


def test_what_is_not_installed_is_named_with_its_command(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"decode='pil' needs Pillow: pip install 'aioloader\[images\]'"):
        TarShards(shards, decode="pil")
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ImportError, match=r"reading s3://bucket needs the package obstore: .*'aioloader\[objects\]'"):
        TarShards("s3://bucket/a.tar")
