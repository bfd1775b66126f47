"""Files in another order in each epoch, side by side, for tar, lines and Parquet alike; and their URLs."""

import io
import tarfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aioloader import BrokenDataError, DataLoader, LoaderClosedError, Pipeline, Retry
from aioloader.core.source import CursorSource
from aioloader.sources import Files, Lines, ParquetRows, TarShards
from aioloader.testing import Gate, assert_resumes_exactly
from tests._cursor_sources import assert_opens_at_every_cursor
from tests._servers import HttpServer, S3Server
from tests._support import Face, Started, Steps, collect, on_both_faces

LENGTHS: Final = (3, 1, 5, 0, 2)
"""Samples per file."""


def tar_bytes(names: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return file.getvalue()


def parquet_bytes(names: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"name": pa.array(names, pa.string())}), file, row_group_size=2)
    return file.getvalue()


class Format:
    """A kind of file whose samples are names."""

    def __init__(
        self,
        suffix: str,
        source: Callable[..., CursorSource],
        write: Callable[[list[str]], bytes],
        name: Callable[..., str],
    ) -> None:
        self.suffix, self.source, self.write, self.name = suffix, source, write, name

    def __repr__(self) -> str:
        return self.suffix

    def files(self, folder: Path, lengths: tuple[int, ...] = LENGTHS) -> list[str]:
        """Files with the names a0, a1, ..., b0, ..."""
        paths = []
        for file, length in zip("abcdefghijklmnop", lengths, strict=False):
            path = folder / f"{file}.{self.suffix}"
            path.write_bytes(self.write([f"{file}{number}" for number in range(length)]))
            paths.append(str(path))
        return paths

    def names(self, samples: list[Any]) -> list[str]:
        return [self.name(sample) for sample in samples]


FORMATS: Final = [
    Format("tar", TarShards, tar_bytes, lambda sample: sample["__key__"]),
    Format("txt", Lines, lambda names: "".join(f"{name}\n" for name in names).encode(), str),
    Format("parquet", ParquetRows, parquet_bytes, lambda row: row["name"]),
]
in_every_format: Final = pytest.mark.parametrize("kind", FORMATS, ids=repr)


def in_turn(lanes: list[list[str]]) -> list[str]:
    """One of each in turn, by a plain loop."""
    readers = [iter(lane) for lane in lanes]
    found = []
    while readers:
        for reader in list(readers):
            name = next(reader, None)
            if name is None:
                readers.remove(reader)
            else:
                found.append(name)
    return found


def names_of(lengths: tuple[int, ...]) -> list[list[str]]:
    return [
        [f"{file}{number}" for number in range(length)]
        for file, length in zip("abcdefghijklmnop", lengths, strict=False)
    ]


# -- side by side ------------------------------------------------------------------------------------------------------


@on_both_faces
@in_every_format
@pytest.mark.parametrize("interleave", [1, 2, 3, 9])
def test_one_sample_of_each_in_turn(tmp_path: Path, kind: Format, interleave: int, face: Face) -> None:
    files = names_of(LENGTHS)
    lanes = [list(chain(*files[lane::interleave])) for lane in range(min(interleave, len(files)))]
    paths = kind.files(tmp_path)
    assert kind.names(collect(Pipeline(kind.source(paths, interleave=interleave)), face)) == in_turn(lanes)


@in_every_format
@pytest.mark.parametrize(("interleave", "shuffle"), [(1, True), (2, False), (3, True)])
def test_it_opens_at_every_cursor(tmp_path: Path, kind: Format, interleave: int, shuffle: bool) -> None:
    source = kind.source(kind.files(tmp_path), interleave=interleave, shuffle=shuffle)
    assert len(assert_opens_at_every_cursor(source)) == sum(LENGTHS)


@in_every_format
def test_a_resume_is_exact_at_every_sample(tmp_path: Path, kind: Format) -> None:
    paths = kind.files(tmp_path)
    assert_resumes_exactly(lambda: Pipeline(kind.source(paths, shuffle=True, seed=3, interleave=2)).repeat(2))


@on_both_faces
@in_every_format
def test_a_file_that_fails_gives_way_to_the_next_one_of_its_lane(tmp_path: Path, kind: Format, face: Face) -> None:
    paths = kind.files(tmp_path, (2, 2, 2, 2))
    Path(paths[0]).unlink()
    with Steps(Pipeline(kind.source(paths, interleave=2)), face) as steps:
        found = steps.outcomes()
    assert isinstance(found[0], FileNotFoundError)
    assert kind.names(found[1:]) == ["b0", "c0", "b1", "c1", "d0", "d1"]
    assert_resumes_exactly(lambda: Pipeline(kind.source(paths, interleave=2)))


@pytest.mark.parametrize("interleave", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 100])
def test_batches_of_rows_are_all_of_one_size(tmp_path: Path, interleave: int, groups: int) -> None:
    """Where a file has fewer left, rows of the next one complete the batch; and every state leads on."""
    lengths = (7, 12, 3, 0, 9)
    start = 0
    for number, length in enumerate(lengths):
        table = pa.table({"id": pa.array(range(start, start + length), pa.int64())})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=groups)
        start += length

    def loader() -> Pipeline:
        source = ParquetRows(tmp_path / "*.parquet", batch_rows=4, interleave=interleave)
        return Pipeline(source).map(lambda batch: batch["id"].tolist())

    batches = list(loader())
    assert [len(batch) for batch in batches] == [4] * 7 + [3]
    assert sorted(chain(*batches)) == list(range(start))
    if interleave == 3:
        assert batches[:3] == [[0, 1, 2, 3], [7, 8, 9, 10], [19, 20, 21, 4]]
    assert_resumes_exactly(loader)


@on_both_faces
def test_so_many_archives_are_open_and_no_more(http_server: HttpServer, face: Face) -> None:
    """Those that are read side by side, and one more of each."""
    http_server.files = {f"{number}.tar": tar_bytes([str(number)]) for number in range(9)}
    http_server.gate = gate = Gate()
    store = http_server.store()
    loader = Pipeline(TarShards("{0..8}.tar", store=store, interleave=3))

    def look() -> None:
        gate.wait_arrived(6)
        assert sorted(map(str, gate.arrived)) == [f"{number}.tar" for number in range(6)]
        gate.open_all()

    with Steps(loader, face) as steps:
        looking = Started(look)
        assert steps.next()["__key__"] == "0"
        looking.outcome()
        assert [sample["__key__"] for sample in steps.rest()] == [str(number) for number in range(1, 9)]
    del loader, store


@on_both_faces
@in_every_format
@pytest.mark.parametrize("by_file", [False, True])
def test_nothing_is_left_of_files_that_are_waited_for(
    http_server: HttpServer, kind: Format, by_file: bool, face: Face
) -> None:
    """Closed while each of them hangs: no task, thread or connection stays, which a fixture looks for."""
    http_server.files = {f"{file}.{kind.suffix}": kind.write([f"{file}0"]) for file in "abcdef"}
    http_server.gate = gate = Gate()
    store = http_server.store()
    loader = Pipeline(kind.source(list(http_server.files), store=store, interleave=2))
    if by_file:
        loader = loader.shard(0, 2, by="file")
    with Steps(loader, face) as steps:
        outcome = steps.ask()
        steps.until_arrived(gate, 2)
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)
        with pytest.raises((LoaderClosedError, StopIteration, StopAsyncIteration)):
            outcome()
    gate.open_all()
    del loader, store


def test_a_reader_needs_room_for_a_sample_of_each(tmp_path: Path) -> None:
    paths = FORMATS[0].files(tmp_path)
    with pytest.raises(ValueError, match=r"ahead must be at least interleave, .* got ahead=2 and interleave=3"):
        TarShards(paths, interleave=3, ahead=2)
    assert len(list(Pipeline(TarShards(paths, interleave=3, ahead=3)))) == sum(LENGTHS)


# -- shuffled ----------------------------------------------------------------------------------------------------------


@in_every_format
def test_the_first_samples_are_of_all_files_and_others_in_each_epoch(tmp_path: Path, kind: Format) -> None:
    """The first 300 of 1,600 samples in 8 files are of all 8, not of 2; and the order is another one."""
    source = kind.source(kind.files(tmp_path, (200,) * 8), shuffle=True, interleave=8)
    loader = Pipeline(source)
    first, second = (kind.names(list(loader.take(300))) for _ in range(2))
    assert {name[0] for name in first} == {name[0] for name in second} == set("abcdefgh")
    loader = loader.take(8)
    orders = [tuple(kind.names(list(loader))) for _ in range(4)]
    assert len(set(orders)) == 4


@in_every_format
def test_the_order_depends_on_seed_and_pass_alone(tmp_path: Path, kind: Format) -> None:
    paths = kind.files(tmp_path, (1,) * 8)

    def order(seed: int = 0, epoch: int = 0) -> list[str]:
        loader = Pipeline(kind.source(paths, shuffle=True, seed=seed))
        loader.set_epoch(epoch)
        return kind.names(list(loader))

    assert order() == order()
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    rounds = kind.names(list(Pipeline(kind.source(paths, shuffle=True)).repeat(3)))
    assert rounds[:8] == order()
    assert len({tuple(rounds[at : at + 8]) for at in (0, 8, 16)}) == 3
    assert sorted(order()) == sorted(order(epoch=1)) == [name for [name] in names_of((1,) * 8)]


def test_another_order_is_another_pipeline(tmp_path: Path) -> None:
    paths = FORMATS[1].files(tmp_path)
    loader = Pipeline(Lines(paths, shuffle=True, seed=1))
    state = loader.state_dict()
    for other in (Lines(paths, shuffle=True, seed=2), Lines(paths), Lines(paths, shuffle=True, seed=1, interleave=2)):
        with pytest.raises(ValueError, match="the state is of another pipeline"):
            Pipeline(other).load_state_dict(state)


def test_a_cache_needs_an_order_that_stays(tmp_path: Path) -> None:
    paths = FORMATS[1].files(tmp_path)
    with pytest.raises(ValueError, match=r"cache\(\) cannot tell samples apart here: Lines gives them in another"):
        Pipeline(Lines(paths, shuffle=True)).cache(memory_bytes=1 << 20)
    assert len(list(Pipeline(Lines(paths, interleave=2)).cache(memory_bytes=1 << 20))) == sum(LENGTHS)


def test_it_is_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    loader = Pipeline(Lines(FORMATS[1].files(tmp_path), shuffle=True, interleave=2))
    here = [list(loader) for _ in range(2)]
    with loader.in_process() as there:
        assert [list(there) for _ in range(2)] == here
    assert here[0] != here[1]


def test_arguments_that_cannot_work_are_refused(tmp_path: Path) -> None:
    paths = FORMATS[1].files(tmp_path)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        Lines(paths, shuffle=True, seed=1.5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="follow=True waits at the end of the last file, got shuffle=True"):
        Lines(paths, shuffle=True, follow=True)


# -- stores and URLs ---------------------------------------------------------------------------------------------------


@on_both_faces
@in_every_format
def test_files_come_from_stores_and_urls_alike(
    s3_server: S3Server, tmp_path: Path, kind: Format, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket()
    store = s3_server.store(bucket)
    for path in kind.files(tmp_path, (2, 3)):
        store.put(f"train/{Path(path).name}", Path(path))
    keys = f"train/{{a,b}}.{kind.suffix}"
    in_environment(s3_server, monkeypatch)
    expected = list(chain(*names_of((2, 3))))
    assert kind.names(collect(Pipeline(kind.source(keys, store=store)), face)) == expected
    assert kind.names(collect(Pipeline(kind.source(f"s3://{bucket}/{keys}")), face)) == expected
    assert_opens_at_every_cursor(kind.source(keys, store=store, interleave=2))
    del store


def in_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT": server.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


@on_both_faces
def test_whole_files_come_from_stores_and_urls(
    s3_server: S3Server, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket()
    store = s3_server.store(bucket)
    for name in "abc":
        store.put(f"{name}.bin", name.encode() * 4)
    in_environment(s3_server, monkeypatch)
    urls = f"s3://{bucket}/{{a,b,c}}.bin"
    for files in (Files("{a,b,c}.bin", store=store), Files(urls)):
        assert len(files) == len(Pipeline(files)) == 3
        assert collect(Pipeline(files), face) == [b"aaaa", b"bbbb", b"cccc"]
        assert sorted(collect(Pipeline(files).shuffle(seed=1).shard(0, 1, by="file"), face)) == [
            b"aaaa",
            b"bbbb",
            b"cccc",
        ]
    batches = collect(DataLoader(Files(urls, read="tensor"), batch_size=3), face)
    assert [batch.shape for batch in batches] == [(3, 4)]
    pairs = collect(Pipeline(Files(urls, with_path=True)), face)
    assert pairs[0] == (f"s3://{bucket}/a.bin", b"aaaa")
    assert collect(Pipeline(Files(urls, read=None)), face)[2] == f"s3://{bucket}/c.bin"
    with Steps(Pipeline(Files(["a.bin", "z.bin"], store=store)), face) as steps:
        found = steps.outcomes()
    assert found[0] == b"aaaa"
    assert isinstance(found[1], FileNotFoundError)
    del store, files


@on_both_faces
@pytest.mark.parametrize("kind", [*FORMATS, None], ids=repr)
def test_requests_that_fail_are_made_again(http_server: HttpServer, kind: Format | None, face: Face) -> None:
    content = b"a0\n" if kind is None else kind.write(["a0", "a1"])
    http_server.files = {"a": content}
    http_server.faults = {"a": iter([503, "reset", 503])}
    url = f"{http_server.url}/a"
    policies: dict[str, Any] = {"retry": Retry(attempts=5, wait_initial=0.001, wait_max=0.001), "timeout": 20}
    loader = Pipeline(Files(url, **policies) if kind is None else kind.source(url, **policies))
    found = collect(loader, face)
    assert found == [content] if kind is None else kind.names(found) == ["a0", "a1"]
    assert sum(stage.retries for stage in loader.stats().stages) == 3


def test_compressed_lines_come_from_a_store(http_server: HttpServer) -> None:
    import gzip

    http_server.files = {"a.jsonl.gz": gzip.compress(b"1\n2\n"), "b.jsonl": b"3\n4\n"}
    source = Lines(f"{http_server.url}/{{a.jsonl.gz,b.jsonl}}", decode="json")
    assert assert_opens_at_every_cursor(source) == [1, 2, 3, 4]


def test_a_line_of_a_rewritten_object_is_refused_after_a_resume(http_server: HttpServer) -> None:
    http_server.tells = "etag"
    http_server.files = {"a.txt": b"1\n2\n3\n"}

    def loader() -> Pipeline:
        return Pipeline(Lines(f"{http_server.url}/a.txt"))

    first = loader()
    with Steps(first, "for") as steps:
        steps.next()
        state = first.state_dict()
    http_server.files = {"a.txt": b"1\n2\n4\n"}
    second = loader()
    second.load_state_dict(state)
    with pytest.raises(BrokenDataError, match="was rewritten since the state was made: its ETag differs"):
        next(iter(second))


def test_what_is_missing_for_a_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    for source in (Files, Lines, ParquetRows, TarShards):
        with pytest.raises(ImportError, match=rf"{source.__name__}: reading s3://b needs .*'aioloader\[objects\]'"):
            source("s3://b/a")


def test_options_of_requests_need_a_store(tmp_path: Path) -> None:
    for source in (Files, Lines, ParquetRows, TarShards):
        path = tmp_path / "a"
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=f"{source.__name__} takes retry for a store, got paths; leave it out"):
            source(path, retry=3)
    with pytest.raises(ValueError, match="Files takes files of this machine or URLs, got both"):
        Files([path, "https://host/a"])
    with pytest.raises(ValueError, match=r"Files\(watch=True\) watches a folder of this machine.* leave retry out"):
        Files(tmp_path, watch=True, retry=3)
