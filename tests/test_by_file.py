"""`shard(by="file")`: a rank reads its own files alone, from this machine and from stores."""

import io
import json
import re
from itertools import chain
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aioloader import Pipeline, ReadAllWarning, StateError, UnevenWarning
from aioloader.sources import Lines, ParquetRows
from aioloader.sources.pace import FIRST_RANGE_BYTES, Pace
from aioloader.testing import assert_resumes_exactly
from tests._servers import HttpServer
from tests._support import Face, Steps, collect, on_both_faces, wait_until
from tests.test_file_order import FORMATS, Format, in_every_format, names_of

pytestmark = pytest.mark.usefixtures("fork_server")

FILES: Final = 8
PER_FILE: Final = 20
NAMES: Final = sorted(chain(*names_of((PER_FILE,) * FILES)))
TAR, LINES, PARQUET = FORMATS


def ranks(source: Any, world_size: int, **more: Any) -> list[Pipeline]:
    return [Pipeline(source).shard(rank, world_size, by="file", **more) for rank in range(world_size)]


@in_every_format
@on_both_faces
@pytest.mark.filterwarnings("error")
def test_keep_gives_each_rank_what_is_in_its_files(kind: Format, face: Face, tmp_path: Path) -> None:
    """Without a word, and also to a rank that has no file: a training that bears it has said so."""
    names = names_of((7, 3, 5))
    paths = []
    for number, its in enumerate(names):
        paths.append(tmp_path / f"{number}.{kind.suffix}")
        paths[-1].write_bytes(kind.write(its))
    for world_size in (2, 4):
        found = [collect(loader.map(kind.name), face) for loader in ranks(kind.source(paths), world_size, even="keep")]
        assert found == [list(chain(*names[rank::world_size])) for rank in range(world_size)]


# -- what is read ------------------------------------------------------------------------------------------------------


def served(kind: Format, server: HttpServer, padding: int = 0) -> dict[str, bytes]:
    """Eight files on a server, whose samples are long enough for footers and ends of archives to be little."""
    names = names_of((PER_FILE,) * FILES)
    server.files = {
        f"{file}.{kind.suffix}": kind.write([name + "x" * padding for name in its])
        for file, its in zip("abcdefgh", names, strict=True)
    }
    return server.files


def bytes_asked_for(server: HttpServer) -> dict[str, int]:
    """By file, as the request log has them."""
    found: dict[str, int] = {}
    for method, path, asked in server.requests:
        if method == "GET":
            size = len(server.files[path])
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            length = size if span is None else max(0, min(size, int(span[2]) + 1) - int(span[1]))
            found[path] = found.get(path, 0) + length
    server.requests.clear()
    return found


@in_every_format
@pytest.mark.parametrize("world_size", range(1, 9))
def test_all_ranks_together_read_each_byte_once(http_server: HttpServer, kind: Format, world_size: int) -> None:
    """By the log of the server: no file is asked for by two ranks, and a resume goes on in the middle of its file.

    Where nothing else is said, ParquetRows pads, and looks at the footers of all files for that; here each rank gives
    what is in its files.
    """
    files = served(kind, http_server, padding=2000)
    store = http_server.store()
    source = kind.source(list(files), store=store, shuffle=True, interleave=2)
    found, asked = [], []
    for rank in range(world_size):
        loader = unpadded(source, rank, world_size)
        samples = list(loader)
        found += [name.rstrip("x") for name in kind.names(samples)]
        asked.append(bytes_asked_for(http_server))
        assert len(asked[-1]) == len(range(rank, FILES, world_size))
    assert sorted(found) == NAMES
    assert len(set(chain(*asked))) == sum(map(len, asked)) == FILES
    assert sum(sum(one.values()) for one in asked) <= 1.05 * sum(map(len, files.values()))
    del source, store, loader


def unpadded(source: Any, rank: int, world_size: int) -> Pipeline:
    """The files of a rank as they are, also where they could be counted."""
    loader = Pipeline(source).shard(rank, world_size, by="file")
    (shard,) = loader._plan.stages
    object.__setattr__(shard, "even", None)
    return loader


@pytest.mark.parametrize("kind", FORMATS[:2], ids=repr)
def test_a_resume_reads_what_is_to_come(http_server: HttpServer, kind: Format) -> None:
    """From about the offset of each open file on: the mark before it may be half of a small file away."""
    files = served(kind, http_server, padding=2000)
    store = http_server.store()

    def make(store: Any) -> Pipeline:
        return Pipeline(kind.source(list(files), store=store, interleave=2)).shard(1, 2, by="file")

    first = make(store)
    with Steps(first, "for") as steps:
        steps.rest(30)
        state = first.state_dict()
    http_server.requests.clear()
    second = make(store)
    second.load_state_dict(json.loads(json.dumps(state)))
    assert len(list(second)) == 50
    asked = {path.partition(".")[0]: share for path, share in shares_asked_for(http_server).items()}
    assert asked.keys() == set("bdfh")
    assert max(asked["b"], asked["d"]) < 0.65
    assert asked["f"] == asked["h"] == 1
    del first, second, store


@pytest.mark.parametrize("kind", FORMATS[:2], ids=repr)
@pytest.mark.parametrize("taken", [6, 33, 70, 120])
@on_both_faces
def test_little_is_asked_for_again_after_a_resume(
    http_server: HttpServer, kind: Format, taken: int, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the reader was stopped: ranges, and what waits of them parsed, are a small part of what is read."""
    monkeypatch.setattr(Pace, "starved", lambda *_: None)  # a consumer that never waits, however slow the machine is
    files = served(kind, http_server, padding=100_000)
    source = kind.source(list(files), store=http_server.store(), interleave=2)
    first, second = Pipeline(source).prefetch(0), Pipeline(source).prefetch(0)
    with Steps(first, face) as steps:
        steps.rest(taken)
        state = first.state_dict()
    second.load_state_dict(json.loads(json.dumps(state)))
    assert len(collect(second, face)) == FILES * PER_FILE - taken
    asked = bytes_asked_for(http_server)
    assert sum(asked.values()) <= 1.05 * sum(map(len, files.values()))
    del source, first, second


@pytest.mark.parametrize("kind", FORMATS[:2], ids=repr)
@on_both_faces
def test_of_a_file_that_is_open_ahead_the_first_range_is_asked_for(
    http_server: HttpServer, kind: Format, face: Face
) -> None:
    """The rest when its turn comes: a resume would ask for it again."""
    files = served(kind, http_server, padding=150_000)
    assert all(len(content) > 10 * FIRST_RANGE_BYTES for content in files.values())
    source = kind.source(list(files), store=http_server.store(), interleave=2)
    ahead = {f"c.{kind.suffix}", f"d.{kind.suffix}"}
    with Steps(Pipeline(source).prefetch(0), face) as steps:
        steps.next()
        wait_until(lambda: ahead <= {path for _, path, _ in http_server.requests})
        asked = bytes_asked_for(http_server)
        assert {path: asked[path] for path in ahead} == dict.fromkeys(ahead, FIRST_RANGE_BYTES)
        assert len(steps.rest()) == FILES * PER_FILE - 1
    later = bytes_asked_for(http_server)
    assert {path: asked.get(path, 0) + later.get(path, 0) for path in files} == {
        path: len(content) for path, content in files.items()
    }


@on_both_faces
@pytest.mark.parametrize("batch_rows", [None, 10])
def test_of_parquet_a_resume_asks_again_for_the_row_groups_that_are_open(
    http_server: HttpServer, batch_rows: int | None, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of one cannot be decoded: so what is asked for twice is one of each open file, and the footers of these.

    The next one is fetched when a range's worth of this one is left, and not before.
    """
    monkeypatch.setattr(Pace, "starved", lambda *_: None)  # a consumer that never waits, however slow the machine is
    rows, groups = 100, 8
    for file in "abcd":
        out = io.BytesIO()
        table = pa.table({"text": [f"{file}{row:03}" + "x" * 2000 for row in range(rows * groups)]})
        pq.write_table(table, out, rows, compression="none", use_dictionary=False, write_statistics=False)
        http_server.files[f"{file}.parquet"] = out.getvalue()
    source = ParquetRows(sorted(http_server.files), store=http_server.store(), interleave=2, batch_rows=batch_rows)
    chunks = pq.ParquetFile(io.BytesIO(http_server.files["a.parquet"])).metadata
    starts = [chunks.row_group(group).column(0).data_page_offset for group in range(groups)]

    def asked() -> dict[str, list[int]]:
        """The row groups of each file that were asked for, in order; -1: its footer."""
        found: dict[str, list[int]] = {}
        for method, path, span in http_server.requests:
            if method == "GET":
                start = int(span.removeprefix("bytes=").partition("-")[0])
                found.setdefault(path[0], []).append(starts.index(start) if start in starts else -1)
        http_server.requests.clear()
        return found

    def read(loader: Pipeline, count: int | None) -> Any:
        with Steps(loader, face) as steps:
            assert len(steps.rest(count)) == count or count is None
            return json.loads(json.dumps(loader.state_dict()))

    taken = 2 * (3 * rows + 10) // (batch_rows or 1)  # of each lane three row groups and ten rows
    state = read(Pipeline(source).prefetch(0), taken)
    assert asked() == {file: [-1, 0, 1, 2, 3] for file in "ab"}
    again = Pipeline(source).prefetch(0)
    again.load_state_dict(state)
    read(again, None)
    assert asked() == {file: [-1, *range(3 if file in "ab" else 0, groups)] for file in "abcd"}
    del source, again


def test_small_row_groups_are_read_together_only_where_there_are_many(
    tmp_path: Path, http_server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of objects; those that are read ahead are asked for again by a resume."""
    monkeypatch.setattr(Pace, "starved", lambda *_: None)  # a consumer that never waits, however slow the machine is
    rows = [{"text": "x" * 1000 + str(number)} for number in range(4000)]
    for group in range(2):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{group}.parquet", 100, compression="none")
    http_server.files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    source = ParquetRows(sorted(http_server.files), store=http_server.store())
    assert len(list(Pipeline(source))) == 8000
    spans = [int(last) - int(first) for first, last in re.findall(r"bytes=(\d+)-(\d+)", str(http_server.requests))]
    assert max(spans) < 2 * FIRST_RANGE_BYTES
    assert len(spans) > 2 * 10


def shares_asked_for(server: HttpServer) -> dict[str, float]:
    return {path: count / len(server.files[path]) for path, count in bytes_asked_for(server).items()}


@in_every_format
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_rank_opens_no_file_of_another(
    tmp_path: Path, kind: Format, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = kind.files(tmp_path, (PER_FILE,) * FILES)
    opened: list[str] = []

    class Recording(io.FileIO):
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr("aioloader.sources.chunks.FileIO", Recording)
    monkeypatch.setattr("aioloader.sources.parquet_input.FileIO", Recording)
    found: list[str] = []
    parts = []
    for rank in range(world_size):
        found += kind.names(list(unpadded(kind.source(paths, shuffle=True, interleave=3), rank, world_size)))
        parts.append(set(opened))
        opened.clear()
    assert sorted(found) == NAMES
    assert sorted(chain(*parts)) == paths


@on_both_faces
@in_every_format
def test_each_epoch_a_rank_gets_others(tmp_path: Path, kind: Format, face: Face) -> None:
    """The order of all files is permuted, then dealt: the same for all ranks, another one in each epoch."""
    paths = kind.files(tmp_path, (2,) * FILES)
    loaders = ranks(kind.source(paths, shuffle=True), 2)
    epochs = []
    for _ in range(4):
        parts = [kind.names(collect(loader, face)) for loader in loaders]
        assert sorted(chain(*parts)) == sorted(chain(*names_of((2,) * FILES)))
        epochs.append({name[0] for name in parts[0]})
    assert len(set(map(frozenset, epochs))) > 1


# -- states ------------------------------------------------------------------------------------------------------------


@in_every_format
def test_a_resume_is_exact(tmp_path: Path, kind: Format) -> None:
    paths = kind.files(tmp_path, (3, 1, 4, 2, 5))

    def loader() -> Pipeline:
        source = kind.source(paths, shuffle=True, interleave=2)
        return Pipeline(source).shard(1, 2, by="file").batch(2, collate_fn=list)

    assert_resumes_exactly(loader)


def test_a_state_is_that_of_its_rank(tmp_path: Path) -> None:
    paths = LINES.files(tmp_path, (2,) * 4)
    first, second = ranks(Lines(paths), 2)
    with Steps(first, "for") as steps:
        steps.next()
        state = first.state_dict()
    with pytest.raises(StateError, match=r"rank 0 of 2, and this is rank 1 of 2: after shard\(by='file'\) each rank"):
        second.load_state_dict(state)
    with pytest.raises(
        StateError, match=r"world_size=2, .* rank 0 of 4.*; start 2 ranks, load a state from between two"
    ):
        ranks(Lines(paths), 4)[0].load_state_dict(state)
    with pytest.warns(ReadAllWarning):
        by_sample = Pipeline(Lines(paths)).shard(0, 2)
    with pytest.raises(StateError, match=r"the state is of"):
        by_sample.load_state_dict(state)


def test_between_two_epochs_any_number_of_ranks_may_go_on(tmp_path: Path) -> None:
    """The next epoch deals all files anew."""
    paths = LINES.files(tmp_path, (2,) * 6)
    source = Lines(paths, shuffle=True)
    two = ranks(source, 2)
    found = [list(loader) for loader in two]
    state = json.loads(json.dumps(two[0].state_dict()))
    three = ranks(source, 3)
    for loader in three:
        loader.load_state_dict(state)
    after = [list(loader) for loader in three]
    assert sorted(chain(*found)) == sorted(chain(*after)) == sorted(chain(*names_of((2,) * 6)))
    whole = Pipeline(source)
    whole.set_epoch(1)
    order = [name[0] for name in list(whole)[::2]]
    assert [[name[0] for name in part[::2]] for part in after] == [order[rank::3] for rank in range(3)]


@on_both_faces
def test_ranks_of_several_sources_are_mixed(tmp_path: Path, face: Face) -> None:
    paths = LINES.files(tmp_path, (3,) * 4)

    def loader() -> Pipeline:
        parts = [Pipeline(Lines(paths, shuffle=True, seed=seed)).shard(1, 2, by="file") for seed in range(2)]
        return Pipeline.mix(parts, [1, 2])

    assert len(collect(loader(), face)) == 12
    assert_resumes_exactly(loader)


def test_it_works_in_a_process_of_its_own(tmp_path: Path) -> None:
    paths = LINES.files(tmp_path, (2,) * 4)
    for loader in ranks(Lines(paths, shuffle=True), 2):
        with loader.in_process() as there:
            assert list(there) == list(loader)


# -- as many on each rank ----------------------------------------------------------------------------------------------


LENGTHS: Final = (12, 7, 18, 5, 3)


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    """Files of unequal length; the rows are numbered."""
    start = 0
    for number, length in enumerate(LENGTHS):
        table = pa.table({"id": pa.array(range(start, start + length), pa.int64())})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
        start += length
    return str(tmp_path / "*.parquet")


def ids(loader: Pipeline, batch_rows: int | None) -> list[int]:
    samples = list(loader)
    return [row["id"] for row in samples] if batch_rows is None else [n for one in samples for n in one["id"].tolist()]


@pytest.mark.parametrize("batch_rows", [None, 4])
@pytest.mark.parametrize("interleave", [1, 3])
@pytest.mark.parametrize("world_size", range(1, 6))
def test_ranks_are_filled_up_or_cut_to_one_length(
    parquet: str, world_size: int, interleave: int, batch_rows: int | None
) -> None:
    source = ParquetRows(parquet, interleave=interleave, batch_rows=batch_rows)
    own = [sum(LENGTHS[rank::world_size]) for rank in range(world_size)]
    samples = own if batch_rows is None else [-(-rows // batch_rows) for rows in own]
    padded = ranks(source, world_size)
    assert [len(list(loader)) for loader in padded] == [max(samples)] * world_size
    assert set(chain(*(ids(loader, batch_rows) for loader in padded))) == set(range(sum(LENGTHS)))
    dropped = ranks(source, world_size, even="drop")
    assert [len(list(loader)) for loader in dropped] == [min(samples)] * world_size
    found = list(chain(*(ids(loader, batch_rows) for loader in dropped)))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("even", ["pad", "drop"])
@pytest.mark.parametrize("batch_rows", [None, 4])
def test_a_resume_is_exact_where_a_rank_is_filled_up(parquet: str, even: Any, batch_rows: int | None) -> None:
    def loader(rank: int) -> Pipeline:
        source = ParquetRows(parquet, shuffle=True, interleave=2, batch_rows=batch_rows)
        samples = Pipeline(source).shard(rank, 2, by="file", even=even)
        return samples.map(lambda row: row["id"] if batch_rows is None else row["id"].tolist())

    for rank in range(2):
        assert_resumes_exactly(lambda rank=rank: loader(rank))


def test_a_rank_that_cannot_read_some_rows_has_as_many_all_the_same(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.parquet").write_bytes(PARQUET.write([f"{number}{row}" for row in range(6)]))
    broken = tmp_path / "2.parquet"
    content = bytearray(broken.read_bytes())
    content[4:12] = b"\xff" * 8  # in the first page of the first of three row groups
    broken.write_bytes(content)
    outcomes = []
    for loader in ranks(ParquetRows(tmp_path / "*.parquet"), 2):
        outcomes.append(list(loader.skip_errors()))
    assert [len(one) for one in outcomes] == [11, 12]  # and one error


def test_a_rank_without_a_file_reads_that_of_another(parquet: str) -> None:
    parts = [ids(loader, None) for loader in ranks(ParquetRows(parquet), 7)]
    assert {len(part) for part in parts} == {max(LENGTHS)}
    assert set(parts[5]) == set(parts[0])
    for even in ("drop", "error"):
        loader = Pipeline(ParquetRows(parquet)).shard(0, 7, by="file", even=even)
        with pytest.raises(ValueError, match="has 5 of them for 7 ranks, so that ranks 5 to 6 have none"):
            next(iter(loader))


def test_ranks_must_not_differ_where_that_is_asked_for(parquet: str) -> None:
    loader = Pipeline(ParquetRows(parquet)).shard(0, 2, by="file", even="error")
    with pytest.raises(ValueError, match=r"shard\(even='error'\) needs .*, but their files have 12 to 33; write files"):
        next(iter(loader))


def test_an_empty_rank_is_refused_by_all(tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(PARQUET.write(["a"]))
    (tmp_path / "1.parquet").write_bytes(PARQUET.write([]))
    for loader in ranks(ParquetRows(tmp_path / "*.parquet"), 2):
        with pytest.raises(ValueError, match="the files of rank 1 have none; leave empty files out"):
            next(iter(loader))


@pytest.mark.parametrize("kind", FORMATS[:2], ids=repr)
def test_what_nobody_has_counted_cannot_be_evened_out(tmp_path: Path, kind: Format) -> None:
    paths = kind.files(tmp_path, (3, 1, 2))
    assert [len(list(loader)) for loader in ranks(kind.source(paths), 2)] == [5, 1]
    for even in ("pad", "drop", "error"):
        with pytest.raises(ValueError, match=rf"even='{even}'\) must know how many .*; pass even='agree' and"):
            Pipeline(kind.source(paths)).shard(0, 2, by="file", even=even)
    for loader in ranks(kind.source(paths), 4):  # on all of them, so that none waits for the others
        with pytest.raises(
            ValueError, match="has 3 of them for 4 ranks, so that rank 3 has none and would end at once"
        ):
            next(iter(loader))


# -- where it may stand ------------------------------------------------------------------------------------------------


def test_maps_may_come_before_it(tmp_path: Path) -> None:
    paths = LINES.files(tmp_path, (2, 2))
    parts = [list(Pipeline(Lines(paths)).map(str.upper).shard(rank, 2, by="file")) for rank in range(2)]
    assert parts == [["A0", "A1"], ["B0", "B1"]]


def test_what_has_no_files_to_deal_is_refused(tmp_path: Path) -> None:
    paths = LINES.files(tmp_path, (2, 2))
    source = Lines(paths)
    for loader, why in {
        Pipeline(source).filter(bool): r"comes before filter\(bool\); put it right after the source",
        Pipeline(source).shuffle(buffer_size=2): r"comes before shuffle\(2\)",
        Pipeline.mix([Pipeline(source), Pipeline(source)], [1, 1]): r"is Pipeline\.mix\(\.\.\.\); put it into each",
        Pipeline([1, 2]): "list is asked for single samples: each rank loads its own alone already",
        Pipeline(lambda: source): "needs a source that knows its files: TarShards, Lines or ParquetRows itself",
        Pipeline(Lines(paths, follow=True)): "",
    }.items():
        if why:
            with pytest.raises(ValueError, match=rf"shard\(by='file'\) .*{why}"):
                loader.shard(0, 2, by="file")
        else:
            with pytest.raises(ValueError, match="deals files that end, and with follow=True the last one does not"):
                next(iter(loader.shard(0, 2, by="file")))
    with pytest.raises(ValueError, match="by must be 'sample' or 'file', got 'row'"):
        Pipeline(source).shard(0, 2, by="row")  # type: ignore[arg-type]


@in_every_format
def test_reading_everything_on_each_rank_is_told_once(tmp_path: Path, kind: Format) -> None:
    paths = kind.files(tmp_path, (2, 2, 2))
    samples = Pipeline(kind.source(paths)).map(str)
    with pytest.warns(ReadAllWarning, match=r"each of 2 ranks reads all 3 files of .*; shard\(by='file'\)") as told:
        loader = samples.shard(0, 2)
    assert [len(list(loader.batch(2, collate_fn=list))) for _ in range(2)] == [2, 2]  # and no more is said
    assert [Path(one.filename).name for one in told] == ["test_by_file.py"]
    list(Pipeline(kind.source(paths[:1])).shard(0, 2))  # there is nothing to deal
    list(Pipeline(kind.source(paths)).shard(0, 1))
    list(Pipeline(kind.source(paths)).shard(0, 2, by="file"))


@on_both_faces
def test_ranks_that_are_looked_up_are_told_when_iteration_begins(
    tmp_path: Path, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = LINES.files(tmp_path, (2, 2, 2))
    loader = Pipeline(Lines(paths)).shard()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.warns(ReadAllWarning, match="each of 3 ranks reads all 3 files of Lines") as told:
        assert collect(loader, face) == ["a1", "c0"]
    assert len(told) == 1
    assert collect(loader, face) == ["a1", "c0"]
    by_file = Pipeline(Lines(paths)).shard(by="file")
    with pytest.warns(UnevenWarning, match=r"nobody has counted that: where ranks get different .* pass even='agree'"):
        assert collect(by_file, face) == ["b0", "b1"]
    assert collect(by_file, face) == ["b0", "b1"]
