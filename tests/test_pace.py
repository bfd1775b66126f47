"""How far ahead of its consumer objects are read: what is asked for, counted, and what a wait changes about that."""

import io
import json
import re
from collections.abc import Hashable
from itertools import pairwise
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aioloader import Pipeline
from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.engine.source_context import RunSourceContext
from aioloader.sources import ParquetRows, TarShards, pace, read_ahead
from aioloader.sources.chunks import RANGE_BYTES
from aioloader.sources.pace import FIRST_RANGE_BYTES, HURRIED, LONGER, WAITS, Pace
from aioloader.testing import Gate
from tests._servers import HttpServer
from tests._support import Face, Steps, on_both_faces, wait_until
from tests.test_by_file import PARQUET, TAR, bytes_asked_for, served
from tests.test_file_order import FORMATS, Format

GROUPS: Final = 32
ROWS: Final = 100  # of a row group


class Clock:
    """In place of `perf_counter`."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "perf_counter", clock)
    return clock


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each store is far away, and each look for more samples is a wait."""
    monkeypatch.setattr(pace, "FAR_SECONDS", -1)
    monkeypatch.setattr(read_ahead, "STALL_SECONDS", -1)


def far_away(*args: Any, **more: Any) -> Pace:
    ours = Pace(*args, **more)
    ours.answered(0.03)
    return ours


@pytest.mark.parametrize(
    ("files", "megabytes", "lanes", "kilobytes"),
    [(4, 7, 2, 89), (100, 100, 1, 8192), (4, 64, 2, 819), (1, 1, 1, 16)],
)
def test_ranges_are_short_where_a_reader_reads_little(
    clock: Clock, files: int, megabytes: int, lanes: int, kilobytes: int
) -> None:
    """Those of a consumer that waits, too: what it had asked for ahead is a small part of what it reads."""
    ours = far_away(lanes, files)
    assert ours.range_bytes(RANGE_BYTES, None) == FIRST_RANGE_BYTES
    assert ours.range_bytes(RANGE_BYTES, megabytes << 20) >> 10 == kilobytes
    short = ours.range_bytes(RANGE_BYTES, megabytes << 20)
    for _ in range(9):  # it waits nevertheless, for a third of its time
        clock.now += 0.09
        ours.starved(0.03)
    assert ours.range_bytes(RANGE_BYTES, None) == LONGER * FIRST_RANGE_BYTES
    assert ours.range_bytes(RANGE_BYTES, megabytes << 20) == min(RANGE_BYTES, LONGER * short)
    assert ours.ahead_bytes == short


def test_ranges_grow_further_while_a_consumer_does_little_but_wait(clock: Clock) -> None:
    """A stop costs it more then, once; each epoch costs it less. When it has got to work, they are as before."""
    ours = far_away(lanes=2, files=4)
    short = ours.range_bytes(RANGE_BYTES, 4 << 20)
    lengths = []
    for _ in range(2 + WAITS + 3):
        clock.now += 0.031
        ours.starved(0.03)
        lengths.append(ours.range_bytes(RANGE_BYTES, 4 << 20) // short)
    assert lengths == [2, *[LONGER] * WAITS, *[HURRIED] * 4]
    assert ours.hurries
    assert not ours.may_open((4 << 20) * 4 // 20, 4 << 20)
    clock.now += 60
    ours.starved(0.03)
    assert ours.range_bytes(RANGE_BYTES, 4 << 20) == LONGER * short
    assert not ours.hurries


def test_a_wait_for_bytes_changes_nothing_while_batches_lie_ready() -> None:
    """It holds nobody up: a training that takes its time keeps the short ranges."""
    starves = False
    ours = far_away(lanes=2, files=4, starves=lambda: starves)
    short = ours.range_bytes(RANGE_BYTES, 4 << 20)
    for _ in range(9):
        ours.starved(0.03)
    assert ours.range_bytes(RANGE_BYTES, 4 << 20) == short
    starves = True
    ours.starved(0.03)
    assert ours.range_bytes(RANGE_BYTES, 4 << 20) == 2 * short


def test_a_wait_for_a_store_nearby_changes_nothing() -> None:
    """A machine that is busy makes its reader wait now and then; some answers come at once."""
    ours = Pace(lanes=2, files=4)
    short = ours.range_bytes(RANGE_BYTES, 4 << 20)
    ours.starved(0.03)  # nothing is known of it
    for seconds in (0.03, 0.002, *[0.03] * (pace.ANSWERS - 1)):
        ours.answered(seconds)
    ours.starved(0.03)
    assert ours.range_bytes(RANGE_BYTES, 4 << 20) == short
    ours.answered(0.03)
    ours.starved(0.03)
    assert ours.range_bytes(RANGE_BYTES, 4 << 20) == 2 * short


class Telling(CursorSource[int]):
    """Numbers, one at a time; keeps the context of its latest reader."""

    def open(self, context: SourceContext, cursor: Any) -> "TellingReader":
        self.context = context
        return TellingReader(cursor or 0)


class TellingReader(EntryReader):
    def __init__(self, at: int) -> None:
        self.at = at

    async def read(self, limit: int) -> list[Entry]:
        self.at += 1
        return [Entry(self.at, self.at, self.at, 0)]


@on_both_faces
def test_a_source_is_told_whether_its_consumer_has_nothing(face: Face) -> None:
    """Not before the first batch, which is always waited for; and not while one lies ready."""
    source = Telling()
    loader = Pipeline(source).batch(2, collate_fn=list).prefetch(2)
    with Steps(loader, face) as steps:
        steps.next()
        wait_until(lambda: not source.context.consumer_starves)  # the next ones have been made meanwhile
        steps.rest(3)
        wait_until(lambda: not source.context.consumer_starves)
    with Steps(Pipeline(source).batch(2, collate_fn=list).prefetch(0), face) as steps:
        assert steps.next() == [1, 2]
        assert source.context.consumer_starves  # nothing is made before it is asked for


# -- what is asked for, by the request log -----------------------------------------------------------------------------


def four_files(server: HttpServer, groups: int = GROUPS) -> list[list[int]]:
    """Of Parquet, 128 row groups in all; returns where each group begins, and the last one ends."""
    for file in "abcd":
        out = io.BytesIO()
        table = pa.table({"text": [f"{file}{row:04}" + "x" * 500 for row in range(ROWS * groups)]})
        pq.write_table(table, out, ROWS, compression="none", use_dictionary=False, write_statistics=False)
        server.files[f"{file}.parquet"] = out.getvalue()
    metadata = pq.ParquetFile(io.BytesIO(server.files["a.parquet"])).metadata
    starts = [metadata.row_group(group).column(0).data_page_offset for group in range(groups)]
    return [starts, [*starts[1:], starts[-1] + metadata.row_group(groups - 1).column(0).total_compressed_size]]


@on_both_faces
@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("batch_rows", [None, 20])
@pytest.mark.parametrize("taken", [0.31, 0.375, 0.44])
def test_of_parquet_little_is_asked_for_again_of_a_consumer_that_waits(
    http_server: HttpServer, taken: float, batch_rows: int | None, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then, that is: of each open file two row groups more than the one that is given out, at most."""
    monkeypatch.setattr(pace, "WAITS", 1 << 60)
    starts, stops = four_files(http_server)
    source = ParquetRows(sorted(http_server.files), store=http_server.store(), interleave=2, batch_rows=batch_rows)
    first, second = Pipeline(source).prefetch(0), Pipeline(source).prefetch(0)
    samples = 4 * GROUPS * ROWS // (batch_rows or 1)
    with Steps(first, face) as steps:
        count = int(taken * samples)
        assert len(steps.rest(count)) == count
        state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    with Steps(second, face) as steps:
        assert len(steps.rest()) == samples - count
    twice = sum(bytes_asked_for(http_server).values()) - sum(map(len, http_server.files.values()))
    footers = 4 * 7000  # of the files that are open, or will be soon
    assert (twice - footers) / (stops[0] - starts[0]) <= 2 * 3
    del source, first, second


@on_both_faces
@pytest.mark.usefixtures("far")
def test_row_groups_are_fetched_side_by_side_for_a_consumer_that_waits(
    http_server: HttpServer, clock: Clock, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them for one that does little else, and never two of them in one request where there are few."""
    starts, stops = four_files(http_server)
    assert clock.now == 0  # it stands still, so waits are all that there is
    source = ParquetRows(sorted(http_server.files), store=http_server.store())
    most: dict[int, int] = {}
    for waits in (1 << 60, 1):
        monkeypatch.setattr(pace, "WAITS", waits)
        ahead = []
        with Steps(Pipeline(source).prefetch(0), face) as steps:
            for group in range(GROUPS - 1):
                steps.rest(ROWS)
                asked = [span for method, path, span in http_server.requests if method == "GET" and path[0] == "a"]
                ahead.append(len(asked) - group - 2)  # but the footer, and those that were given out
        most[waits] = max(ahead)
        spans = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for span in asked]
        assert {(first, last + 1) for first, last in spans[1:]} == set(zip(starts, stops, strict=True))
        http_server.requests.clear()
    assert most[1 << 60] <= 4 < most[1] <= 8
    del source


@on_both_faces
def test_two_ranges_are_under_way_for_a_consumer_that_does_little_but_wait(
    http_server: HttpServer, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte is asked for once."""
    files = served(TAR, http_server, padding=150_000)
    monkeypatch.setattr(Pace, "hurries", True)
    with Steps(Pipeline(TarShards(list(files), store=http_server.store())).prefetch(0), face) as steps:
        assert len(steps.rest()) == 8 * 20
    spans: dict[str, list[list[int]]] = {}
    for _, path, span in http_server.requests:
        spans.setdefault(path, []).append([int(part) for part in span.removeprefix("bytes=").split("-")])
    for path, its in spans.items():
        its.sort()
        assert all(second == last + 1 for (_, last), (second, _) in pairwise(its))
        assert its[0][0] == 0
        assert its[-1][1] + 1 >= len(files[path])


class FirstPasses(Gate):
    """The first one that comes need not wait."""

    come = 0

    async def passing(self, key: Hashable = None) -> None:
        self.come += 1
        if self.come > 1:
            await super().passing(key)


def test_for_such_a_consumer_a_range_is_asked_for_before_the_one_before_it_is_answered(
    http_server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that, one request at a time is under way for a file, but for the bytes that still come."""
    served(TAR, http_server, padding=20_000)
    monkeypatch.setattr(Pace, "hurries", True)
    http_server.gate = gate = FirstPasses()
    with Steps(Pipeline(TarShards(["a.tar"], store=http_server.store())).prefetch(0), "for") as steps:
        steps.next()
        wait_until(lambda: gate.standing == 2)
        gate.open_all()
        assert len(steps.rest()) == 19


@pytest.mark.parametrize("kind", FORMATS, ids=repr)
@pytest.mark.usefixtures("far")
def test_each_source_asks_whether_its_consumer_has_nothing(
    http_server: HttpServer, kind: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it has something, no wait of the reader makes what is under way any more."""
    if kind is PARQUET:
        four_files(http_server)
    else:
        served(kind, http_server, padding=100_000)
    longest, most = [], []
    for starves in (False, True):
        http_server.requests.clear()
        monkeypatch.setattr(RunSourceContext, "consumer_starves", starves)
        source = kind.source(sorted(http_server.files), store=http_server.store())
        open_now = set()
        with Steps(Pipeline(source).prefetch(0), "for") as steps:
            for _ in range(8):
                steps.rest(ROWS if kind is PARQUET else 10)
                open_now.add(sum(method == "GET" for method, _, _ in http_server.requests))
        spans = re.findall(r"bytes=(\d+)-(\d+)", str(http_server.requests))
        longest.append(max(int(last) - int(first) for first, last in spans))
        most.append(max(open_now))
    if kind is PARQUET:
        assert most[0] <= 1 + 8 + 1 < most[1]  # the footer, the row groups that were given out, and the next one
    else:
        assert 3 * longest[0] < longest[1]
    del source
