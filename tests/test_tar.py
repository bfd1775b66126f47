"""`TarShards`: archives of every writer, from files and stores, and broken in every way that an archive can be."""

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise, repeat
from pathlib import Path
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
from aioloader.sources.tar import _Samples, _Shard
from aioloader.testing import Gate
from tests._located import Opened, assert_opens_at_every_cursor, outcomes
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
    """Folders, links, pipes, names without an extension, hidden files, and what WebDataset notes of its own."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in [
            (tarfile.DIRTYPE, "folder.d"),
            (tarfile.SYMTYPE, "link.txt"),
            (tarfile.LNKTYPE, "hard.txt"),
            (tarfile.FIFOTYPE, "pipe.txt"),
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
        "aioloader.sources.chunks.object_chunks.__kwdefaults__", {"start": 0, "needed": 0, "size": 4096}
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
    assert (
        f"the file has {Path(shards[0]).stat().st_size} bytes now, and reading shall go on at byte 1000000" in message
    )


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
        parser = _Samples(_Shard("a.tar", None, "a.tar"), 0, (0, None, None), DecodeSample(False))
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
    left_out = "; the sample '1' may lack members and is left out"
    for length, expected, said in [
        (0, [], "the file is empty, and even an archive without members has an end mark"),
        (300, [], "the archive is truncated: it ends at byte 300, in the member at 0"),
        (1024, [], "the archive is truncated, or its writer was not closed: it ends at byte 1024 without an end mark"),
        (second, [], f"the archive is truncated: it ends at byte {second}, in the member at 2048"),
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
    assert outcomes(source)[0].endswith(left_out)


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
    assert found[0].startswith(f"{path}: the file is no tar archive: there is no member header at byte 0: ")
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
        f"'..'; nothing is extracted to disk, but pack it anew"
    )
    assert sorted(tmp_path.parent.rglob("*")) == there
    assert not Path("/tmp/evil.txt").exists()


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    content = bytearray(archive([("1.txt", b"1")]))
    content[156:157] = b"S"
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + sum(content[156:512]) + 256)
    source, path = broken_shards(tmp_path, bytes(content))
    assert (
        outcomes(source)[0] == f"{path}: the member '1.txt' at byte 0 is sparse, which is not read; pack it without -S"
    )


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
    assert f"the object '0.tar' has {len(content)} bytes now, and reading shall go on at byte 1000000" in message
    del source


def test_a_cursor_behind_the_end_of_a_stored_archive_is_refused(http_server: HttpServer) -> None:
    http_server.files = {"0.tar": archive(samples(0, 1))}
    (message,) = outcomes(TarShards(f"{http_server.url}/0.tar"), cursor=(0, 10**6, None, None))
    assert "the object '0.tar' has 10240 bytes now, and reading shall go on at byte 1000000" in message


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
