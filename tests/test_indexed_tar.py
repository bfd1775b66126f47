"""`TarShards(index=True)`: samples of archives in any order, from files and from a store that counts requests."""

import asyncio
import io
import os
import pickle
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path
from typing import Any, Final, Literal

import obstore
import pytest
from obstore.store import MemoryStore
from torch.utils.data import RandomSampler

import aioloader.__main__ as command_line
from aioloader import BrokenDataError, DataLoader, Hedge, LoaderClosedError, Pipeline, Rate, Retry, StateError
from aioloader.sources import TarShards
from aioloader.sources.tar_index import SUFFIX
from aioloader.testing import FaultPlan, Gate, assert_resumes_exactly
from tests._servers import HttpServer
from tests._support import Face, Started, Steps, collect, notes, on_both_faces, until
from tests._work import key_of

ARCHIVES: Final = 4
SAMPLES: Final = 12  # in each
SIZE: Final = 1500
pytestmark = pytest.mark.usefixtures("fork_server")

NAMES: Final = [f"{number}.tar" for number in range(ARCHIVES)]
ALL: Final = [f"{number:04}" for number in range(ARCHIVES * SAMPLES)]
QUICK: Final[dict[str, Any]] = {"wait_initial": 0.001, "wait_max": 0.01, "jitter": 0.0}


def archive(members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive as `tarfile` writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def members(first: int, count: int, size: int = SIZE) -> list[tuple[str, bytes]]:
    """Those of some samples: a blob and its number."""
    return [
        member
        for number in range(first, first + count)
        for member in ((f"{number:04}.bin", bytes([number % 256]) * size), (f"{number:04}.txt", str(number).encode()))
    ]


def write_index(*paths: Any) -> None:
    """By the command."""
    assert command_line.main(["index", *map(str, paths)]) == 0


def keys(found: Iterable[Any]) -> list[Any]:
    """The keys of samples, also of batches of them; errors as they are."""
    return [sample["__key__"] if isinstance(sample, dict) else sample for sample in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Archives and their indexes."""
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(archive(members(SAMPLES * number, SAMPLES)))
    write_index(*(tmp_path / name for name in NAMES))
    return tmp_path


@pytest.fixture
def server(http_server: HttpServer, folder: Path) -> HttpServer:
    """The same behind HTTP."""
    serve(http_server, folder)
    return http_server


def serve(server: HttpServer, folder: Path) -> None:
    server.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    server.tells = "etag"


def from_files(folder: Path, server: HttpServer, **more: Any) -> Any:
    return TarShards([folder / name for name in NAMES], index=True, **more)


def from_store(folder: Path, server: HttpServer, **more: Any) -> Any:
    return TarShards(f"{server.url}/{{0..3}}.tar", index=True, **more)


Make = Callable[..., Any]
of_both = pytest.mark.parametrize("make", [from_files, from_store], ids=["files", "store"])


def asked(server: HttpServer, kind: Literal["archives", "indexes"] = "archives") -> list[tuple[str, int]]:
    """What was read: the archive, and how many bytes of it, for each request."""
    found = []
    for method, path, header in server.requests:
        if method == "GET" and path.endswith(SUFFIX) == (kind == "indexes"):
            start, stop = (header or "bytes=0-0").removeprefix("bytes=").split("-")
            size = min(int(stop) + 1, len(server.files[path])) - int(start)
            found.append((path, size if header else len(server.files[path])))
    return found


def total(server: HttpServer) -> int:
    return sum(size for _, size in asked(server))


def bytes_of(server: HttpServer) -> int:
    """Of all archives."""
    return sum(len(content) for path, content in server.files.items() if not path.endswith(SUFFIX))


# -- what comes --------------------------------------------------------------------------------------------------------


@on_both_faces
@of_both
@pytest.mark.parametrize("decode", [False, True])
def test_samples_keys_and_order_are_those_without_an_index(
    folder: Path, server: HttpServer, make: Make, face: Face, decode: bool
) -> None:
    urls = make(folder, server).urls
    plain = Pipeline(TarShards(urls, decode=decode)).batch(5, collate_fn=list)
    indexed = Pipeline(make(folder, server, decode=decode)).batch(5, collate_fn=list)
    with Steps(plain, face) as expected, Steps(indexed, face) as found:
        for _ in range(-(-len(ALL) // 5)):
            assert found.next() == expected.next()
            infos = indexed.last_batch_info(), plain.last_batch_info()
            assert infos[0] is not None
            assert infos[1] is not None
            assert infos[0].keys == infos[1].keys
    assert len(make(folder, server)) == len(ALL)
    assert len(indexed) == -(-len(ALL) // 5)


@on_both_faces
def test_archives_of_every_kind_give_the_same_by_their_index(
    tmp_path: Path, http_server: HttpServer, face: Face
) -> None:
    """Long names, folders and links among the samples, hard links, several archives in one file, broken samples."""
    long = "deep/" * 60 + "x" * 200
    ordinary = [
        ("a/1.txt", b"1"),
        (f"{long}.txt", b"x" * 1000),
        ("grüße.txt", b"2"),
        ("a/1.cls", b"again"),
        ("v.0/1.cls", b"x" * 100_000),
    ]
    (tmp_path / "0.tar").write_bytes(archive(ordinary))
    (tmp_path / "1.tar").write_bytes(
        archive(ordinary, tarfile.GNU_FORMAT) + archive([("b.txt", b"second"), ("c.txt", b"")])
    )
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        for name, kind, link in [
            ("folder", tarfile.DIRTYPE, ""),
            ("a.txt", tarfile.REGTYPE, ""),
            ("a.copy", tarfile.LNKTYPE, "a.txt"),
            ("note", tarfile.REGTYPE, ""),
            ("b.link", tarfile.SYMTYPE, "a.txt"),
            ("c.copy", tarfile.LNKTYPE, "a.txt"),
            ("d.txt", tarfile.REGTYPE, ""),
            ("d.txt", tarfile.REGTYPE, ""),
            ("../e.txt", tarfile.REGTYPE, ""),
            ("f.txt", tarfile.REGTYPE, ""),
            ("end", tarfile.DIRTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    (tmp_path / "3.tar").write_bytes(archive([]))
    write_index(*(tmp_path / name for name in NAMES))
    serve(http_server, tmp_path)
    for make in (from_files, from_store):
        with Steps(Pipeline(TarShards(make(tmp_path, http_server).urls)), face) as steps:
            expected = steps.outcomes()
        with Steps(Pipeline(make(tmp_path, http_server)), face) as steps:
            found = steps.outcomes()
        assert list(map(str, found)) == list(map(str, expected))
        assert len(found) == len(make(tmp_path, http_server)) == 17
        assert sum(isinstance(outcome, BrokenDataError) for outcome in found) == 3


@of_both
def test_it_is_a_sequence_and_can_be_pickled(folder: Path, server: HttpServer, make: Make) -> None:
    source = pickle.loads(pickle.dumps(make(folder, server)))
    assert keys(Pipeline(source)) == ALL
    assert repr(source) == "TarShards(4 archives, 48 samples, index=True)"
    if make is from_files:
        assert keys([source[0], source[-1], *source[3:5]]) == ["0000", "0047", "0003", "0004"]
        with pytest.raises(IndexError, match="sample 48 of 48"):
            source[48]


@on_both_faces
@of_both
def test_a_shuffle_is_a_permutation_over_all_archives_and_another_in_each_epoch(
    folder: Path, server: HttpServer, make: Make, face: Face
) -> None:
    loader = Pipeline(make(folder, server)).shuffle(seed=1).batch(6, collate_fn=list)
    epochs = [keys(sample for batch in collect(loader, face) for sample in batch) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [ALL, ALL]
    assert epochs[0] != epochs[1]
    assert {int(key) // SAMPLES for key in epochs[0][:16]} == set(range(ARCHIVES))


@on_both_faces
@of_both
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_ranks_get_equal_parts_that_are_exactly_all(
    folder: Path, server: HttpServer, make: Make, face: Face, world_size: int
) -> None:
    source = make(folder, server)
    parts = [
        keys(collect(Pipeline(source).shuffle(seed=2).shard(rank, world_size), face)) for rank in range(world_size)
    ]
    assert {key for part in parts for key in part} == set(ALL)
    assert {len(part) for part in parts} == {-(-len(ALL) // world_size)}
    numbers = Pipeline(range(len(ALL))).shuffle(seed=2)
    assert parts == [[ALL[number] for number in numbers.shard(rank, world_size)] for rank in range(world_size)]


@of_both
def test_take_and_skip_choose_before_anything_is_read(folder: Path, server: HttpServer, make: Make) -> None:
    source = make(folder, server)
    server.requests.clear()
    assert keys(Pipeline(source).skip(SAMPLES + 2).take(3)) == ALL[SAMPLES + 2 : SAMPLES + 5]
    assert len(Pipeline(source).skip(40).batch(3)) == 3
    if make is from_store:
        assert asked(server) == [("1.tar", 3 * 6 * 512)]


@of_both
def test_it_resumes_exactly_at_every_batch(folder: Path, server: HttpServer, make: Make) -> None:
    source = make(folder, server)

    def loader(**_: Any) -> Pipeline:
        return Pipeline(source).shuffle(seed=5).map(lambda sample: sample["__key__"]).batch(7, collate_fn=list)

    states = assert_resumes_exactly(loader)
    assert {state["guarantee"] for state in states} == {"exact"}


@of_both
def test_another_number_of_ranks_goes_on(folder: Path, server: HttpServer, make: Make) -> None:
    source = make(folder, server)

    def rank(number: int, world_size: int) -> Pipeline:
        return Pipeline(source).shuffle(seed=5).shard(number, world_size).batch(12 // world_size, collate_fn=keys)

    whole = list(Pipeline(source).shuffle(seed=5).batch(12, collate_fn=keys))
    for before, after in [(1, 2), (2, 3), (3, 4), (4, 1)]:
        first = rank(0, before)
        with Steps(first, "for") as steps:
            steps.next()
            state = first.state_dict()
        found: Counter[str] = Counter()
        for number in range(after):
            second = rank(number, after)
            second.load_state_dict(state)
            found.update(key for batch in second for key in batch)
        assert found == Counter(key for batch in whole[1:] for key in batch)


@on_both_faces
@of_both
def test_a_cache_spares_all_reading(folder: Path, server: HttpServer, make: Make, face: Face) -> None:
    loader = Pipeline(make(folder, server)).shuffle(seed=1).cache(memory_bytes=1 << 20).batch(8, collate_fn=list)
    collect(loader, face)
    server.requests.clear()
    for name in NAMES:
        (folder / name).unlink()
    assert sorted(keys(sample for batch in collect(loader, face) for sample in batch)) == ALL
    assert asked(server) == []


@of_both
def test_a_cache_on_disk_that_has_a_part_spares_that_part(
    folder: Path, server: HttpServer, make: Make, tmp_path: Path
) -> None:
    loader = Pipeline(make(folder, server)).cache(disk=tmp_path / "cache").batch(8, collate_fn=list)
    with Steps(loader, "for") as steps:
        steps.next()
    loader.close()
    assert keys(sample for batch in loader for sample in batch) == ALL


def test_workers_that_are_processes(folder: Path, server: HttpServer) -> None:
    """Functions after it, all of it, and those of the drop-in."""
    source = from_store(folder, server)
    with Pipeline(source).map(key_of, executor="process", concurrency=1) as loader:
        assert list(loader) == ALL
    with Pipeline(source).shuffle(seed=3).in_process() as loader:
        assert keys(loader) == keys(Pipeline(source).shuffle(seed=3))
    with DataLoader(
        from_files(folder, server), batch_size=5, num_workers=1, worker_type="process", collate_fn=keys
    ) as drop_in:
        assert [key for batch in drop_in for key in batch] == ALL


@on_both_faces
@of_both
def test_the_drop_in_takes_it_as_a_dataset(folder: Path, server: HttpServer, make: Make, face: Face) -> None:
    """Policies of the source are those of its samples there."""
    server.faults = {name: iter([503]) for name in NAMES}
    more: dict[str, Any] = {"retry": Retry(attempts=3, **QUICK)} if make is from_store else {}
    loader = DataLoader(
        make(folder, server, decode=True, **more), batch_size=5, shuffle=True, seed=1, num_workers=2, collate_fn=list
    )
    found = [sample for batch in collect(loader, face) for sample in batch]
    assert sorted(keys(found)) == ALL
    assert {type(sample["txt"]) for sample in found} == {str}
    del loader


@on_both_faces
@of_both
def test_a_sampler_gives_the_numbers_of_samples(folder: Path, server: HttpServer, make: Make, face: Face) -> None:
    source = make(folder, server)
    loader = Pipeline(source, sampler=[5, 47, 5, 0])
    assert keys(collect(loader, face)) == ["0005", "0047", "0005", "0000"]
    assert sorted(keys(collect(Pipeline(source, sampler=RandomSampler(range(48))), face))) == ALL


@on_both_faces
@of_both
def test_samples_with_the_same_key_are_told_apart(
    tmp_path: Path, http_server: HttpServer, make: Make, face: Face
) -> None:
    """In one archive a cache would give the first of them for the second."""
    for name in NAMES:
        content = [("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3"), ("b.cls", b"4"), ("a.txt", b"5")]
        (tmp_path / name).write_bytes(archive(content))
    write_index(*(tmp_path / name for name in NAMES))
    serve(http_server, tmp_path)
    loader = Pipeline(make(tmp_path, http_server)).cache(memory_bytes=1 << 20)
    plain = collect(Pipeline(TarShards(make(tmp_path, http_server).urls)), face)
    assert collect(loader, face) == collect(loader, face) == plain
    info = loader.last_batch_info()
    assert info is not None
    assert repr(info.keys[0]).endswith("3.tar:a' (2)")


@of_both
def test_a_state_of_other_archives_is_refused(folder: Path, server: HttpServer, make: Make) -> None:
    """Of as many samples: in another order, of other names, or written anew. A copy elsewhere is the same."""
    loader = Pipeline(make(folder, server)).shuffle(seed=1)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    for other in (from_files, from_store):
        Pipeline(other(folder, server)).shuffle(seed=1).load_state_dict(state)
    reversed_order = Pipeline(TarShards([folder / name for name in reversed(NAMES)], index=True)).shuffle(seed=1)
    with pytest.raises(StateError, match="of other names, or in another order"):
        reversed_order.load_state_dict(state)
    (folder / "0.tar").write_bytes(archive(members(0, SAMPLES, size=SIZE + 512)))
    write_index(folder / "0.tar")
    with pytest.raises(StateError, match="its archives were written anew"):
        Pipeline(from_files(folder, server)).shuffle(seed=1).load_state_dict(state)


@of_both
def test_what_asks_for_samples_again_gets_them(folder: Path, server: HttpServer, make: Make) -> None:
    """`repeat`, `replay`, and a sample that is begun again after its range was let go of."""
    source = make(folder, server)
    assert keys(Pipeline(source).take(5).repeat(3)) == ALL[:5] * 3
    loader = Pipeline(source).shuffle(seed=1).batch(8, collate_fn=keys)
    whole = list(loader)
    assert list(loader.replay(3)) == whole[3]
    looks: Counter[str] = Counter()

    def stale(sample: dict[str, Any]) -> bool:
        looks[sample["__key__"]] += 1
        return looks[sample["__key__"]] == 1 and sample["__key__"] in ("0003", "0030")

    assert keys(Pipeline(source).map(dict).drop_if(stale, requeue=True)) == ALL


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> int:
    """As if the archives were large: ranges of 16 KiB without an index, and about the same with one."""
    defaults = {"start": 0, "needed": 0, "size": 16 << 10, "pace": None, "turn": None}
    monkeypatch.setattr("aioloader.sources.chunks.object_chunks.__kwdefaults__", defaults)
    monkeypatch.setattr("aioloader.sources.joined.JOINED_BYTES", 16 << 10)
    monkeypatch.setattr("aioloader.sources.tar_ranges.JOINED_BYTES", 16 << 10)
    return 16 << 10


@on_both_faces
def test_in_sequence_it_costs_what_the_plain_reader_costs(
    server: HttpServer, folder: Path, small_ranges: int, face: Face
) -> None:
    """No byte twice, and as many requests, however they lie in the windows of the plan."""
    collect(Pipeline(TarShards(f"{server.url}/{{0..3}}.tar")), face)
    plain = len(asked(server))
    source = from_store(folder, server)
    assert len(asked(server, "indexes")) == ARCHIVES
    server.requests.clear()
    assert keys(collect(Pipeline(source), face)) == ALL
    assert len(asked(server)) <= 1.25 * plain
    assert total(server) <= bytes_of(server)
    assert max(size for _, size in asked(server)) <= small_ranges


@on_both_faces
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffled", [False, True])
def test_all_ranks_together_read_everything_about_once(
    server: HttpServer, folder: Path, face: Face, world_size: int, shuffled: bool
) -> None:
    source = from_store(folder, server)
    server.requests.clear()
    whole = Pipeline(source).shuffle(seed=1) if shuffled else Pipeline(source)
    for rank in range(world_size):
        collect(whole.shard(rank, world_size), face)
    assert total(server) <= 1.05 * bytes_of(server)
    assert len(asked(server)) <= len(ALL)


def test_a_true_shuffle_joins_neighbours_where_a_window_has_them(server: HttpServer, folder: Path) -> None:
    """All samples are in one window: a request for each archive, though the order is a permutation."""
    source = from_store(folder, server)
    server.requests.clear()
    assert sorted(keys(Pipeline(source).shuffle(seed=1))) == ALL
    assert sorted(path for path, _ in asked(server)) == NAMES


@on_both_faces
def test_a_true_shuffle_of_many_small_samples(http_server: HttpServer, tmp_path: Path, face: Face) -> None:
    """Eight archives of 200: the first 300 are of all of them, for at most twice the requests of a plain reader."""
    paths = [tmp_path / f"{number}.tar" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(archive([(f"{number * 200 + at:04}.txt", b"x") for at in range(200)]))
    write_index(*paths)
    serve(http_server, tmp_path)
    collect(Pipeline(TarShards(f"{http_server.url}/{{0..7}}.tar")), face)
    plain = len(http_server.requests)
    http_server.requests.clear()
    loader = Pipeline(TarShards(f"{http_server.url}/{{0..7}}.tar", index=True)).shuffle(seed=0)
    epochs = [[int(key) for key in keys(collect(loader, face))]]
    assert len(http_server.requests) <= 2 * plain
    epochs.append([int(key) for key in keys(collect(loader, face))])
    assert epochs[0] != epochs[1]
    for numbers in epochs:
        assert sorted(numbers) == list(range(1600))
        assert len({number // 200 for number in numbers[:300]}) == 8
        displacement = sum(abs(number - at) for at, number in enumerate(numbers)) / 1600
        assert displacement >= 0.95 * 1600 / 3


def test_a_true_shuffle_over_more_than_a_window_reads_each_sample_by_itself(
    server: HttpServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioloader.sources.indexed_tar.WINDOW_BYTES", 30_000)
    source = from_store(folder, server)
    server.requests.clear()
    assert sorted(keys(Pipeline(source).shuffle(seed=1))) == ALL
    assert len(ALL) // 2 < len(asked(server)) <= len(ALL)
    assert total(server) <= bytes_of(server)


@on_both_faces
def test_a_long_sample_is_read_in_several_requests(
    server: HttpServer, folder: Path, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of which may fail, and has to be done in time, by itself."""
    for module in ("joined", "tar_ranges"):
        monkeypatch.setattr(f"aioloader.sources.{module}.JOINED_BYTES", 2000)
    monkeypatch.setattr("aioloader.sources.tar_ranges.RANGE_BYTES", 1000)
    source = from_store(folder, server, retry=Retry(attempts=2, **QUICK))
    server.faults = {"1.tar": iter([None, 503])}
    server.requests.clear()
    found = collect(Pipeline(source), face)
    assert found == list(Pipeline(TarShards(source.urls)))
    asked_for = asked(server)[: 4 * len(ALL) + 1]
    assert sorted({size for _, size in asked_for}) == [72, 1000]
    assert len(asked_for) == 4 * len(ALL) + 1


@on_both_faces
def test_the_next_ranges_are_asked_for_ahead_and_no_more(
    server: HttpServer, folder: Path, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all samples that are under way wait for one range."""
    source = from_store(folder, server, open_ahead=2, concurrency=1)
    server.gate = gate = Gate()
    loader = Pipeline(source)

    def look() -> None:
        gate.wait_arrived(3)
        assert sorted(map(str, gate.arrived)) == ["0.tar", "1.tar", "2.tar"]
        gate.open_all()

    with Steps(loader, face) as steps:
        looking = Started(look)
        assert keys([steps.next()]) == ["0000"]
        looking.outcome()
        assert keys(steps.rest()) == ALL[1:]
    del loader


@on_both_faces
def test_ahead_bounds_what_is_read_and_not_taken(server: HttpServer, folder: Path, face: Face) -> None:
    """Ranges have no more samples than that."""
    source = from_store(folder, server, ahead=4)
    server.requests.clear()
    with Steps(Pipeline(source), face) as steps:
        assert keys([steps.next()]) == ["0000"]
        assert total(server) <= (1 + 4 + 4) * 6 * 512
        assert keys(steps.rest()) == ALL[1:]


@on_both_faces
def test_a_range_that_fails_is_asked_for_again_alone(server: HttpServer, folder: Path, face: Face) -> None:
    server.faults = {"1.tar": iter([503, "reset", "truncated", "short"])}
    source = from_store(folder, server, retry=Retry(attempts=5, **QUICK), timeout=20.0)
    server.requests.clear()
    loader = Pipeline(source)
    assert keys(collect(loader, face)) == ALL
    assert Counter(path for path, _ in asked(server)) == {"0.tar": 1, "1.tar": 5, "2.tar": 1, "3.tar": 1}
    assert sum(stage.retries for stage in loader.stats().stages) == 4
    del loader


@on_both_faces
def test_a_request_that_fails_for_good_costs_one_sample(server: HttpServer, folder: Path, face: Face) -> None:
    """It is the error of the one that asked; the others in its range ask for themselves."""
    source = from_store(folder, server, retry=Retry(attempts=2, **QUICK))
    server.faults = {"1.tar": iter([503, 503])}
    with Steps(Pipeline(source), face) as steps:
        found = steps.outcomes()
    failed = [number for number, outcome in enumerate(found) if isinstance(outcome, Exception)]
    assert failed == [SAMPLES]
    assert "1.tar:0012" in notes(found[SAMPLES])
    assert "attempt" in notes(found[SAMPLES])
    assert keys(found[:SAMPLES]) + keys(found[SAMPLES + 1 :]) == ALL[:SAMPLES] + ALL[SAMPLES + 1 :]


@on_both_faces
def test_a_second_call_and_a_rate_are_for_requests_not_for_samples(
    server: HttpServer, folder: Path, face: Face
) -> None:
    """Four requests are made for 48 samples: a rate of one in a thousand seconds with a burst of eight delays none."""
    rate = Rate(0.001, burst=8)
    loader = Pipeline(from_store(folder, server, rate=rate, hedge=Hedge(after=100.0)))
    assert keys(collect(loader, face)) == ALL
    with pytest.raises(ValueError, match="rate"):
        loader.in_process()
    del loader


class CountingRate(Rate):
    """Counts who takes a turn."""

    taken = 0

    def _took(self, now: float, count: int, *, waits: bool = False) -> None:
        super()._took(now, count, waits=waits)
        self.taken += count


@on_both_faces
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_wire_that_fails_often_costs_no_sample(
    server: HttpServer, folder: Path, small_ranges: int, face: Face, shuffled: bool
) -> None:
    """429, 503, resets, bodies that are cut off or short: each attempt is a request, and takes a turn at the rate."""
    rate = CountingRate(5000.0)
    source = from_store(folder, server, retry=Retry(attempts=20, **QUICK), rate=rate)
    loader = Pipeline(source).shuffle(seed=1) if shuffled else Pipeline(source)
    server.requests.clear()
    clean = len(collect(loader, face)) and len(asked(server))
    server.requests.clear()
    rate.taken = 0
    server.plan = FaultPlan(
        5, throttled=0.1, unavailable=0.1, reset=0.1, truncated=0.1, wrong_length=0.1, retry_after=0.0
    )
    assert sorted(keys(collect(loader, face))) == ALL
    retries = sum(stage.retries for stage in loader.stats().stages)
    assert retries > 2
    assert rate.taken == len(server.requests) >= clean
    del loader, source


@on_both_faces
def test_requests_that_hang_are_given_up_or_overtaken(
    server: HttpServer, folder: Path, small_ranges: int, face: Face
) -> None:
    """By `timeout` and `retry`, and by `hedge`."""
    patient = from_store(folder, server, retry=Retry(attempts=20, **QUICK), timeout=0.25)
    hasty = from_store(folder, server, hedge=Hedge(after=0.1, budget=1.0))
    server.plan = FaultPlan(2, hang=0.15)
    loader = Pipeline(patient)
    assert keys(collect(loader, face)) == ALL
    stages = loader.stats().stages
    assert sum(stage.retries for stage in stages) == sum(stage.timeouts for stage in stages) > 0
    server.plan = FaultPlan(0, hang=1.0, attempts=1)  # the first request for each archive
    loader = Pipeline(hasty)
    assert keys(collect(loader, face)) == ALL
    assert sum(stage.hedges for stage in loader.stats().stages) > 0
    del loader, patient, hasty


@on_both_faces
@pytest.mark.parametrize("waits_for", ["its next attempt", "an answer", "the rate", "a hedge"])
def test_closing_while_a_request_waits(server: HttpServer, folder: Path, face: Face, waits_for: str) -> None:
    """Nobody waits to the end, and the fixtures find nothing that is left."""
    rate = CountingRate(0.001, ARCHIVES)  # its turns are for the indexes
    all_policies: dict[str, dict[str, Any]] = {
        "its next attempt": {"retry": Retry(attempts=3, wait_initial=1000.0, wait_max=1000.0)},
        "an answer": {"timeout": 1000.0},
        "the rate": {"rate": rate},
        "a hedge": {"hedge": Hedge(after=0.0, budget=1.0)},
    }
    source = from_store(folder, server, **all_policies[waits_for])
    server.gate = gate = Gate()
    if waits_for == "its next attempt":
        gate.open_all()
        server.faults |= {name: repeat(503) for name in server.files}
    loader = Pipeline(source)
    server.requests.clear()

    async def waits() -> None:
        await until(lambda: rate.taken > ARCHIVES if waits_for == "the rate" else len(server.requests) > 0)

    with Steps(loader, face) as steps:
        asking = steps.ask()
        asyncio.run(waits()) if face == "for" else steps.do(waits)
        loader.close() if face == "for" else steps.do(loader.aclose)
        with pytest.raises(LoaderClosedError):
            asking()
    gate.open_all()
    del loader, source


@on_both_faces
def test_a_state_fits_with_and_without_policies(server: HttpServer, folder: Path, face: Face) -> None:
    loader = Pipeline(from_store(folder, server)).shuffle(seed=1)
    with Steps(loader, face) as steps:
        whole = keys(steps.rest(10))
        state = loader.state_dict()
        whole += keys(steps.rest())
    resumed = Pipeline(from_store(folder, server, retry=Retry(attempts=9, **QUICK), concurrency=3)).shuffle(seed=1)
    resumed.load_state_dict(state)
    server.plan = FaultPlan(5, throttled=0.1, reset=0.1, truncated=0.1, retry_after=0.0)
    assert keys(collect(resumed, face)) == whole[10:]
    del loader, resumed


def test_indexes_are_asked_for_again_too(server: HttpServer, folder: Path) -> None:
    server.faults = {f"2.tar{SUFFIX}": iter([503, 429])}
    assert len(from_store(folder, server, retry=Retry(attempts=3, **QUICK))) == len(ALL)
    assert Counter(path for path, _ in asked(server, "indexes"))[f"2.tar{SUFFIX}"] == 3


@on_both_faces
def test_leaving_while_a_store_has_not_answered(server: HttpServer, folder: Path, face: Face) -> None:
    """Nothing is left, and who waited for the range is not waited for."""
    source = from_store(folder, server, timeout=100.0)
    server.gate = gate = Gate()
    gate.open("0.tar")
    with Steps(Pipeline(source), face) as steps:
        assert keys([steps.next()]) == ["0000"]
        gate.wait_arrived(2)
    gate.open_all()


# -- what does not fit -------------------------------------------------------------------------------------------------


@of_both
def test_without_an_index_the_command_is_named(folder: Path, server: HttpServer, make: Make) -> None:
    (folder / f"2.tar{SUFFIX}").unlink()
    del server.files[f"2.tar{SUFFIX}"]
    with pytest.raises(FileNotFoundError, match=r"2\.tar has no index.*python -m aioloader index .*2\.tar, or leave"):
        make(folder, server)


@of_both
def test_the_index_of_another_archive_is_refused(folder: Path, server: HttpServer, make: Make) -> None:
    shutil.copy(folder / f"1.tar{SUFFIX}", folder / f"2.tar{SUFFIX}")
    serve(server, folder)
    with pytest.raises(BrokenDataError, match=r"2\.tar\.index is the index of another archive, of '1\.tar'"):
        make(folder, server)


@of_both
def test_an_index_of_strangers_that_is_broken_is_refused(folder: Path, server: HttpServer, make: Make) -> None:
    (folder / f"0.tar{SUFFIX}").write_bytes(pickle.dumps("strangers"))
    serve(server, folder)
    with pytest.raises(BrokenDataError, match=r"0\.tar\.index is no index of a tar archive.*write it again"):
        make(folder, server)


@on_both_faces
@pytest.mark.parametrize("change", ["size", "time"])
def test_a_file_that_was_changed_since_is_refused(folder: Path, server: HttpServer, face: Face, change: str) -> None:
    """Before and after its index was read; a copy elsewhere, with other times, is the same."""
    source = from_files(folder, server)
    path = folder / "1.tar"
    if change == "size":
        path.write_bytes(path.read_bytes()[:-512])
    else:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(BrokenDataError, match=r"1\.tar was changed since its index was written.*aioloader index"):
        from_files(folder, server)
    with Steps(Pipeline(source), face) as steps:
        found = steps.outcomes()
    broken = [outcome for outcome in found if isinstance(outcome, BrokenDataError)]
    assert len(broken) == SAMPLES
    assert "1.tar was changed" in str(broken[0])
    assert "1.tar:0012" in notes(broken[0])
    assert keys(found[:SAMPLES]) + keys(found[2 * SAMPLES :]) == ALL[:SAMPLES] + ALL[2 * SAMPLES :]
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for each in folder.glob("0.tar*"):
        shutil.copyfile(each, elsewhere / each.name)
    assert keys(Pipeline(TarShards(elsewhere / "0.tar", index=True))) == ALL[:SAMPLES]


@on_both_faces
def test_an_object_that_was_changed_since_is_an_error_of_its_samples(
    server: HttpServer, folder: Path, face: Face
) -> None:
    """In size before it is read; in its version while it is read."""
    source = from_store(folder, server)
    server.files["1.tar"] = server.files["1.tar"][:-512]
    del server.files["2.tar"]
    with Steps(Pipeline(source), face) as steps:
        found = steps.outcomes()
    assert keys(found[:SAMPLES]) == ALL[:SAMPLES]
    assert keys(found[3 * SAMPLES :]) == ALL[3 * SAMPLES :]
    for outcome in found[SAMPLES : 2 * SAMPLES]:
        assert isinstance(outcome, BrokenDataError)
        assert "1.tar was changed since its index was written: it had" in str(outcome)
    for outcome in found[2 * SAMPLES : 3 * SAMPLES]:
        assert isinstance(outcome, FileNotFoundError)
    assert "2.tar:0030" in notes(found[30])
    assert len({id(outcome) for outcome in found}) == len(found)
    loader = Pipeline(source).skip_errors().batch(5, collate_fn=keys)
    assert [key for batch in collect(loader, face) for key in batch] == ALL[:SAMPLES] + ALL[3 * SAMPLES :]
    del loader


@on_both_faces
def test_an_object_with_another_etag_in_its_place_is_refused_and_a_copy_is_not(face: Face, tmp_path: Path) -> None:
    store = MemoryStore()
    obstore.put(store, "a.tar", archive(members(0, 3)))
    indexed(store, "a.tar", tmp_path)
    source = TarShards("a.tar", store=store, index=True)
    assert keys(collect(Pipeline(source), face)) == ALL[:3]
    obstore.put(store, "a.tar", archive(members(0, 3)))
    with Steps(Pipeline(TarShards("a.tar", store=store, index=True)), face) as steps:
        found = steps.outcomes()
    assert [type(outcome) for outcome in found] == [BrokenDataError] * 3
    assert "its size is the same, its version is not" in str(found[0])


def indexed(store: Any, key: str, folder: Path) -> None:
    """Write the index of an object beside it, as the command does for a URL."""
    from aioloader.indexer import _write
    from aioloader.sources.stored_files import StoredFile

    _write(StoredFile(key, store, key))


@on_both_faces
@of_both
def test_an_archive_with_other_samples_in_the_same_bytes_is_found_out(
    folder: Path, server: HttpServer, make: Make, face: Face
) -> None:
    """Size and time are as they were; each sample is checked, so none is taken for another."""
    path = folder / "1.tar"
    time = path.stat().st_mtime_ns
    other = members(SAMPLES, SAMPLES)
    other[4:8] = [("extra.bin", other[4][1]), other[5], ("extra.bin", other[6][1]), ("extra.txt", other[7][1])]
    path.write_bytes(archive(other))
    os.utime(path, ns=(time, time))
    server.files["1.tar"] = path.read_bytes()
    with Steps(Pipeline(make(folder, server)), face) as steps:
        found = steps.outcomes()
    wrong = {number: outcome for number, outcome in enumerate(found) if isinstance(outcome, Exception)}
    assert list(wrong) == [SAMPLES + 2, SAMPLES + 3]
    assert "1.tar:0014 is not at byte" in str(wrong[SAMPLES + 2])
    assert "extra" in str(wrong[SAMPLES + 2])


@on_both_faces
def test_a_server_without_ranges_is_told(server: HttpServer, folder: Path, face: Face) -> None:
    source = from_store(folder, server)
    server.ranges = False
    with Steps(Pipeline(source).take(1), face) as steps:
        (error,) = steps.outcomes()
    assert isinstance(error, BrokenDataError)
    assert "gives no ranges, which an index needs; read it without index=True" in str(error)


@on_both_faces
@of_both
def test_limits_hold(folder: Path, server: HttpServer, make: Make, face: Face) -> None:
    with Steps(Pipeline(make(folder, server, max_member_bytes=100)).take(1), face) as steps:
        (error,) = steps.outcomes()
    assert isinstance(error, BrokenDataError)
    assert "pass a larger max_member_bytes" in str(error)


def test_arguments_that_cannot_work_are_refused_where_they_are_written(folder: Path, server: HttpServer) -> None:
    with pytest.raises(ValueError, match=r"Pipeline\(...\)\.shuffle\(\) is the true shuffle, and shuffle=True"):
        from_files(folder, server, shuffle=True)
    with pytest.raises(ValueError, match="interleave=4 is for archives without an index"):
        from_files(folder, server, interleave=4)
    with pytest.raises(ValueError, match="archives of this machine or of stores, got both"):
        TarShards([str(folder / "0.tar"), f"{server.url}/1.tar"], index=True)
    with pytest.raises(ValueError, match="pass index=True"):
        TarShards(folder / "0.tar", concurrency=4)
    with pytest.raises(ValueError, match=r"pass it to Pipeline\(source, concurrency"):
        from_files(folder, server, concurrency=4)
    with pytest.raises(ValueError, match="concurrency must be"):
        from_store(folder, server, concurrency=0)
    with pytest.raises(ValueError, match="for a store, got paths"):
        from_files(folder, server, retry=3)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        TarShards(folder / "none-*.tar", index=True)
    (folder / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed.*an index is of no use"):
        TarShards(folder / "a.tar.gz", index=True)
