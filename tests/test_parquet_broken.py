"""`ParquetRows` over files that are broken: cells that Python cannot hold, pages, and numbers in footers."""

import datetime
import io
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aioloader import BrokenDataError, DataLoader, Pipeline
from aioloader.sources import ParquetRows, arrow_columns, parquet, parquet_footer
from aioloader.sources.thrift import read_struct
from aioloader.testing import assert_resumes_exactly
from tests import _thrift
from tests._cursor_sources import assert_opens_at_every_cursor, outcomes
from tests._support import Face, Steps, notes, on_both_faces

Number = Callable[[int], int]

# -- cells -------------------------------------------------------------------------------------------------------------

BAD: Final = 4
"""The row with the cell that Python cannot hold."""


def with_bad(values: list[Any], kind: Any, bad: Any) -> Any:
    return pa.array([*values[:BAD], bad, *values[BAD + 1 :]], kind)


def text() -> Any:
    """Its fifth value is no UTF-8."""
    data = pa.array([b"a", b"b", b"c", b"d", b"\xff", b"f", b"g", b"h"])
    return pa.Array.from_buffers(pa.string(), 8, data.buffers())


def dates() -> Any:
    return with_bad(list(range(8)), pa.date32(), 4_000_000)


COLUMNS: Final[dict[str, Any]] = {
    "timestamp": with_bad(list(range(8)), pa.timestamp("us"), 3 * 10**17),
    "timestamp before year 1": with_bad(list(range(8)), pa.timestamp("us", "UTC"), -3 * 10**17),
    "date": dates(),
    "duration": with_bad(list(range(8)), pa.duration("s"), 10**17),
    "text": text(),
    "text in a dictionary": pa.DictionaryArray.from_arrays(pa.array(range(8), pa.int32()), text()),
    "text in lists": pa.ListArray.from_arrays(pa.array(range(9), pa.int32()), text()),
    "dates in lists of a fixed size": pa.FixedSizeListArray.from_arrays(dates(), 1),
    "dates in structs": pa.StructArray.from_arrays([dates(), pa.array(range(8))], ["d", "n"]),
    "text in maps": pa.MapArray.from_arrays(pa.array(range(9), pa.int32()), text(), pa.array(range(8))),
}


def write_bad_cell(folder: Path, column: Any, groups: int = 8) -> list[str]:
    """Rows 0 to 7, the fifth of them bad, and 100 and 101 in another file."""
    paths = [str(folder / "a.parquet"), str(folder / "b.parquet")]
    pq.write_table(pa.table({"id": range(8), "x": column}), paths[0], row_group_size=groups)
    pq.write_table(pa.table({"id": [100, 101], "x": column[:2]}), paths[1])
    return paths


@on_both_faces
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_cell_that_python_cannot_hold_costs_its_row(tmp_path: Path, face: Face, name: str, groups: int) -> None:
    """An error at its place names file, row and column; all other rows come."""
    column = COLUMNS[name]
    paths = write_bad_cell(tmp_path, column, groups)
    with Steps(Pipeline(ParquetRows(paths)), face) as steps:
        found = steps.outcomes()
    error = found.pop(BAD)
    assert [row["id"] for row in found] == [0, 1, 2, 3, 5, 6, 7, 100, 101]
    for place, row in (0, 0), (3, 3), (4, 5), (7, 0):
        assert found[place]["x"] == column[row].as_py()
    assert isinstance(error, BrokenDataError)
    assert str(error).startswith(f"{paths[0]}, row 4: column 'x' of type ")
    assert "has a value there that Python cannot hold: " in str(error)
    assert error.__cause__ is not None
    assert f"key {paths[0] + ':4'!r}" in notes(error)


@on_both_faces
@pytest.mark.parametrize("name", COLUMNS)
def test_batches_with_such_a_cell(tmp_path: Path, face: Face, name: str) -> None:
    """It costs its batch; the error names the row, as without batches."""
    paths = write_bad_cell(tmp_path, COLUMNS[name])
    with Steps(Pipeline(ParquetRows(paths, batch_rows=2)), face) as steps:
        found = steps.outcomes()
    error = found.pop(2)
    assert [batch["id"].tolist() for batch in found] == [[0, 1], [2, 3], [6, 7], [100, 101]]
    assert isinstance(error, BrokenDataError)
    assert str(error).startswith(f"{paths[0]}, row 4: column 'x' of type ")
    assert error.__cause__ is not None
    assert f"in a batch that begins with row 4 of {paths[0]}" in notes(error)


def test_rows_open_after_such_a_cell(tmp_path: Path) -> None:
    """A state after the error goes on with the next row."""
    paths = write_bad_cell(tmp_path, text(), 3)
    found = assert_opens_at_every_cursor(ParquetRows(paths))
    assert [place for place, outcome in enumerate(found) if isinstance(outcome, str)] == [BAD]


def test_every_row_may_have_such_a_cell(tmp_path: Path) -> None:
    """In one column or another; of several the first is named."""
    far = pa.array([4_000_000, 0, 4_000_000], pa.date32())
    late = pa.array([0, 3 * 10**17, 3 * 10**17], pa.timestamp("us"))
    pq.write_table(pa.table({"far": far, "late": late}), tmp_path / "a.parquet")
    found = outcomes(ParquetRows(tmp_path / "a.parquet"))
    assert [outcome.split("'")[1] for outcome in found] == ["far", "late", "far"]


def test_only_the_piece_that_failed_is_made_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are made by loops in C."""
    rows = 5 * parquet.PIECE_ROWS
    days = [0] * rows
    days[2500] = 4_000_000
    pq.write_table(pa.table({"id": range(rows), "day": pa.array(days, pa.date32())}), tmp_path / "a.parquet")
    made: list[int] = []
    slow = arrow_columns.rows_and_failures

    def counted(batch: Any) -> Any:
        made.append(batch.num_rows)
        return slow(batch)

    monkeypatch.setattr(arrow_columns, "rows_and_failures", counted)
    with Steps(Pipeline(ParquetRows(tmp_path / "a.parquet")).batch(1024, collate_fn=list), "for") as steps:
        batches = steps.outcomes()
    assert made == [parquet.PIECE_ROWS]
    assert sum(isinstance(batch, BrokenDataError) for batch in batches) == 1


# -- footers -----------------------------------------------------------------------------------------------------------

# Places in a footer, as parquet.thrift numbers its fields.
ROWS: Final = (3,)
GROUP: Final = (4, 1)
GROUP_BYTES: Final = (*GROUP, 2)
GROUP_ROWS: Final = (*GROUP, 3)
COLUMN: Final = (*GROUP, 1, 0, 3)
TYPE: Final = (*COLUMN, 1)
VALUES: Final = (*COLUMN, 5)
UNCOMPRESSED: Final = (*COLUMN, 6)
COMPRESSED: Final = (*COLUMN, 7)
DATA_PAGE: Final = (*COLUMN, 9)
DICTIONARY_PAGE: Final = (*COLUMN, 11)


def written(rows: int = 30, start: int = 0, **options: Any) -> bytes:
    """Rows in groups of ten: a number, text, and a list."""
    numbers = range(start, start + rows)
    out = io.BytesIO()
    lists = pa.array([[n] * (n % 3) for n in numbers], pa.list_(pa.int32()))
    table = pa.table({"id": numbers, "name": [f"row {n}" for n in numbers], "l": lists})
    pq.write_table(table, out, row_group_size=10, **options)
    return out.getvalue()


def footer_of(data: bytes) -> tuple[int, Any]:
    """Where it begins, and what is in it."""
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    return start, _thrift.load(data[start:-8])


def with_footer(data: bytes, footer: Any) -> bytes:
    """The same file with another footer."""
    encoded = _thrift.dump(footer)
    return data[: footer_of(data)[0]] + encoded + struct.pack("<I", len(encoded)) + b"PAR1"


def with_numbers(data: bytes, numbers: dict[_thrift.Place, Number]) -> bytes:
    """The same file with other numbers in its footer, made of those that are there."""
    _, footer = footer_of(data)
    there = dict(_thrift.integers(footer))
    for place, change in numbers.items():
        _thrift.put(footer, place, change(there[place]))
    return with_footer(data, footer)


def always(number: int) -> Number:
    return lambda _: number


def plus(number: int) -> Number:
    return lambda there: there + number


WRONG: Final[dict[str, tuple[dict[_thrift.Place, Number], str]]] = {
    "more rows in the file": ({ROWS: plus(1)}, "its row groups have 30 rows, and the file has 31"),
    "rows below zero": ({ROWS: always(-1)}, "its row groups have 30 rows, and the file has -1"),
    "rows of a group below zero": ({GROUP_ROWS: always(-10)}, "row group 1 has -10 rows"),
    "more rows in a group": ({GROUP_ROWS: plus(1), ROWS: plus(1)}, "'id' of row group 1 has 10 values for 11 rows"),
    "fewer rows in a group": ({GROUP_ROWS: plus(-1), ROWS: plus(-1)}, "'id' of row group 1 has 10 values for 9 rows"),
    "absurdly many": ({GROUP_ROWS: always(1 << 62)}, f"has 10 values for {1 << 62} rows"),
    "bytes of a group below zero": ({GROUP_BYTES: always(-1)}, "in -1 bytes"),
    "values below zero": ({VALUES: always(-5)}, "has -5 values for 10 rows"),
    "absurdly many values": ({VALUES: always(1 << 60)}, f"has {1 << 60} values for 10 rows"),
    "uncompressed below zero": ({UNCOMPRESSED: always(-1)}, "has -1 bytes when it is decompressed"),
    "compressed below zero": ({COMPRESSED: always(-1)}, "'id' of row group 1 has bytes "),
    "nothing compressed": ({COMPRESSED: always(0)}, "'id' of row group 1 has bytes "),
    "more than the file": ({COMPRESSED: always(1 << 40)}, "and those of the file's data are 4 to "),
    "more than 64 bits": ({COMPRESSED: always((1 << 63) - 1)}, "and those of the file's data are 4 to "),
    "into the next": ({COMPRESSED: plus(150)}, "and another begins at "),
    "page below zero": ({DICTIONARY_PAGE: always(0), DATA_PAGE: always(-100)}, "has bytes -100 to "),
    "page after the end": ({DICTIONARY_PAGE: always(0), DATA_PAGE: always(1 << 50)}, f"has bytes {1 << 50} to "),
    "page of another": ({DICTIONARY_PAGE: always(4)}, "one chunk is at bytes 4 to "),
    "another type": ({TYPE: always(5)}, "row group 1 has another column where the file has 'id'"),
}


@on_both_faces
@pytest.mark.parametrize("batch_rows", [None, 10])
@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_cannot_be_true(tmp_path: Path, face: Face, name: str, batch_rows: int | None) -> None:
    """An error at the place of the file, and the next one follows."""
    numbers, message = WRONG[name]
    path, following = tmp_path / "a.parquet", tmp_path / "b.parquet"
    path.write_bytes(with_numbers(written(), numbers))
    following.write_bytes(written(10, 100))
    source = ParquetRows([path, following], batch_rows=batch_rows)
    with Steps(Pipeline(source), face) as steps:
        error, *found = steps.outcomes()
    assert isinstance(error, BrokenDataError)
    assert str(error).startswith(f"{path}: its footer is broken, so no row of it can be read: ")
    assert message in str(error)
    if batch_rows is None:
        assert [row["id"] for row in found] == list(range(100, 110))
        assert_opens_at_every_cursor(source)
    else:
        assert [batch["id"].tolist() for batch in found] == [list(range(100, 110))]


def test_columns_that_are_not_read_may_be_broken(tmp_path: Path) -> None:
    """As far as they are not looked at."""
    path = tmp_path / "a.parquet"
    path.write_bytes(with_numbers(written(), {VALUES: always(-5)}))
    assert [row["name"] for row in outcomes(ParquetRows(path, columns=["name"]))] == [f"row {n}" for n in range(30)]


def test_any_number_of_a_footer(tmp_path: Path) -> None:
    """Whatever it is changed to, there are rows, and errors that name the file; none takes memory."""
    data, path = written(), tmp_path / "a.parquet"
    places = dict(_thrift.integers(footer_of(data)[1]))
    assert {ROWS, GROUP_ROWS, GROUP_BYTES, VALUES, COMPRESSED, UNCOMPRESSED, DATA_PAGE, DICTIONARY_PAGE} <= set(places)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, (place, there) in enumerate(places.items()):
        changed = (-1, 1 << 40, there + 1)[number % 3]
        path.write_bytes(with_numbers(data, {place: always(changed)}))
        with Steps(Pipeline(ParquetRows(path, batch_rows=(None, 7)[number % 2])), "for") as steps:
            for outcome in steps.outcomes():
                if isinstance(outcome, Exception):
                    assert isinstance(outcome, BrokenDataError), f"{place} as {changed}: {outcome!r}"
                    assert str(path) in str(outcome)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kilobytes


def test_statistics_that_are_broken(tmp_path: Path) -> None:
    """They cost their row group. Pyarrow must not be asked for the numbers of the column: it would end the process."""
    data = written()
    _, footer = footer_of(data)
    sizes = footer[4][1][1][1][1][1][1][0][3][1].get(16)  # of the column 'id' in row group 1
    if sizes is None:
        pytest.skip("this pyarrow writes no size statistics")
    for _, content in sizes[1].values():
        if isinstance(content, tuple):
            content[1].append(7)
    path = tmp_path / "a.parquet"
    path.write_bytes(with_footer(data, footer))
    found = outcomes(ParquetRows(path))
    assert [row["id"] for row in found if isinstance(row, dict)] == [*range(10), *range(20, 30)]
    assert found[10].startswith(f"{path}, row group 1: its rows from 10 to 19 cannot be read: ")


@pytest.mark.parametrize("length", [0, 1 << 20, (1 << 32) - 1])
def test_the_length_of_a_footer(tmp_path: Path, length: int) -> None:
    """One that cannot be is an error, also in a file that is large enough; no such amount is read."""
    path = tmp_path / "a.parquet"
    data = written()
    path.write_bytes(data[:-8] + struct.pack("<I", length) + b"PAR1")
    (error,) = outcomes(ParquetRows(path))
    assert error.startswith(f"{path}: it is not a Parquet file, or only a part of one")
    with path.open("wb") as file:
        file.truncate(6 << 30)  # a hole
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<I", length) + b"PAR1")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (error,) = outcomes(ParquetRows(path))
    assert error.startswith(f"{path}: it is not a Parquet file, or only a part of one")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_long_footer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is read whole, in two pieces."""
    monkeypatch.setattr(parquet_footer, "END_BYTES", 100)
    monkeypatch.setattr(parquet_footer, "LARGE_FOOTER", 200)
    (tmp_path / "a.parquet").write_bytes(written())
    assert [row["id"] for row in outcomes(ParquetRows(tmp_path / "a.parquet"))] == list(range(30))


def test_a_summary_of_other_files(tmp_path: Path) -> None:
    """A file `_metadata` has no rows of its own."""
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "a.parquet")
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    metadata.set_file_path("a.parquet")
    metadata.write_metadata_file(tmp_path / "_metadata")
    (error,) = outcomes(ParquetRows(tmp_path / "_metadata"))
    assert "its rows are in 'a.parquet' and other files; read those" in error


def test_a_pipe_is_no_parquet_file(tmp_path: Path) -> None:
    """Nobody waits until somebody writes into it."""
    os.mkfifo(tmp_path / "a.parquet")
    (error,) = outcomes(ParquetRows(tmp_path / "a.parquet"))
    assert "this is not a regular file" in error


def test_footers_are_read_as_others_read_them() -> None:
    """All that is in them; what is not a struct is an error."""
    data = written(column_encoding={"id": "DELTA_BINARY_PACKED"}, use_dictionary=["name"])
    start, footer = footer_of(data)

    def plain(value: Any, kind: int) -> Any:
        if kind == _thrift.STRUCT:
            return {number: plain(content, field) for number, (field, content) in value.items()}
        return [plain(item, value[0]) for item in value[1]] if kind == _thrift.LIST else value

    assert read_struct(data[start:]) == plain(footer, _thrift.STRUCT)
    for broken in (b"", data[start : start + 50], b"\x16" + b"\xff" * 12, b"\x1d\x00\x00", b"\x18\xff\xff\xff\x7fa"):
        with pytest.raises((IndexError, ValueError)):
            read_struct(broken)


# -- pages -------------------------------------------------------------------------------------------------------------


def break_page(path: Path, group: int, page: int = 0) -> None:
    """Overwrite one page of the first column with nonsense."""
    data = bytearray(path.read_bytes())
    chunk = footer_of(bytes(data))[1][4][1][1][group][1][1][1][0][3][1]
    at = chunk[9][1]
    for _ in range(page + 1):
        start, reader = at, io.BytesIO(data[at:])
        header = _thrift._read(reader, _thrift.STRUCT)
        at += reader.tell() + header[3][1]
    data[start:at] = b"\xff" * (at - start)
    path.write_bytes(data)


def write_pages(path: Path, start: int = 0) -> None:
    """Thirty rows in row groups of ten, in pages of one row."""
    table = pa.table({"id": pa.array(range(start, start + 30), pa.int64())})
    pq.write_table(table, path, row_group_size=10, data_page_size=1, write_batch_size=1, use_dictionary=False)


@on_both_faces
def test_a_broken_page_costs_the_rest_of_its_row_group(
    tmp_path: Path, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was decoded before it comes, then the error, then the next row group and the next file."""
    monkeypatch.setattr(parquet, "PIECE_ROWS", 2)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_pages(paths[0])
    write_pages(paths[1], 100)
    break_page(paths[0], group=1, page=6)
    source = ParquetRows(paths)
    found = outcomes(source, face)
    assert found[:16] + found[17:] == [{"id": n} for n in (*range(16), *range(20, 30), *range(100, 130))]
    assert found[16].startswith(f"{paths[0]}, row group 1: its rows from 16 to 19 cannot be read: ")
    assert assert_opens_at_every_cursor(source) == found


@pytest.mark.parametrize("batch_rows", [None, 4])
def test_a_page_that_is_short_of_a_value(
    tmp_path: Path, batch_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The column is not filled up from the next row group: rows would be put together from two."""
    monkeypatch.setattr(parquet, "PIECE_ROWS", 4)
    path = tmp_path / "a.parquet"
    table = pa.table({"id": pa.array(range(30), pa.int64()), "same": pa.array(range(30), pa.int64())})
    pq.write_table(table, path, row_group_size=10, use_dictionary=False, data_page_version="2.0")
    data = bytearray(path.read_bytes())
    at = footer_of(bytes(data))[1][4][1][1][1][1][1][1][0][3][1][9][1]
    reader = io.BytesIO(data[at:])
    header = _thrift._read(reader, _thrift.STRUCT)
    for field in 1, 3:  # values, and rows
        _thrift.put(header, (8, field), 9)
    data[at : at + reader.tell()] = _thrift.dump(header)
    path.write_bytes(data)
    found = outcomes(ParquetRows(path, batch_rows=batch_rows))
    (error,) = (outcome for outcome in found if isinstance(outcome, str))
    assert f"{path}, row group 1: its rows from 1" in error
    rows = [row for row in found if row is not error]
    if batch_rows is not None:
        rows = [
            {"id": a, "same": b} for part in rows for a, b in zip(*map(torch.Tensor.tolist, part.values()), strict=True)
        ]
    assert all(row["id"] == row["same"] for row in rows)
    assert [row["id"] for row in rows if not 10 <= row["id"] < 20] == [*range(10), *range(20, 30)]


def test_a_checksum_that_does_not_fit(tmp_path: Path) -> None:
    """Where a file has checksums of its pages, a bit that was flipped is no other value."""
    path = tmp_path / "a.parquet"
    table = pa.table({"id": pa.array(range(30), pa.int64())})
    pq.write_table(table, path, row_group_size=10, use_dictionary=False, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<3q", 13, 14, 15))
    data[at] ^= 64
    path.write_bytes(data)
    found = outcomes(ParquetRows(path))
    assert found[:10] + found[11:] == [{"id": n} for n in (*range(10), *range(20, 30))]
    assert "its rows from 10 to 19 cannot be read: could not verify page integrity" in found[10]


# -- all of it ---------------------------------------------------------------------------------------------------------


def write_everything(folder: Path) -> list[str]:
    """A bad cell, a broken page, a broken footer, a file that is missing, one with other columns; rows 0 to 79."""
    paths = [folder / f"{number}.parquet" for number in range(6)]
    days = [0] * 20
    days[13] = 4_000_000
    for number in (0, 1, 2, 4, 5):
        ids = pa.array(range(20 * number, 20 * number + 20), pa.int64())
        day = pa.array(days if number == 0 else [0] * 20, pa.date32())
        table = pa.table({"id": ids, "day": day} if number != 5 else {"id": ids})
        pq.write_table(table, paths[number], row_group_size=5, use_dictionary=False)
    break_page(paths[1], group=2)
    paths[2].write_bytes(with_numbers(paths[2].read_bytes(), {VALUES: always(-5)}))
    return list(map(str, paths))


PIPELINES: Final[dict[str, Callable[[list[str]], Any]]] = {
    "rows": lambda paths: Pipeline(ParquetRows(paths)),
    "batches": lambda paths: Pipeline(ParquetRows(paths, batch_rows=7)),
    "batch": lambda paths: Pipeline(ParquetRows(paths)).batch(7, collate_fn=list),
    "shuffle": lambda paths: Pipeline(ParquetRows(paths)).shuffle(buffer_size=6, seed=3),
    "shard": lambda paths: Pipeline(ParquetRows(paths)).shard(1, 3),
    "shard by file": lambda paths: Pipeline(ParquetRows(paths, interleave=2)).shard(0, 2, by="file"),
    "side by side": lambda paths: Pipeline(ParquetRows(paths, shuffle=True, interleave=3)),
    "batches side by side": lambda paths: Pipeline(ParquetRows(paths, batch_rows=7, interleave=3)),
    "take and skip": lambda paths: Pipeline(ParquetRows(paths)).skip(5).take(60),
    "map": lambda paths: Pipeline(ParquetRows(paths)).map(lambda row: row["id"], concurrency=3),
    "drop-in": lambda paths: DataLoader(ParquetRows(paths), batch_size=4, collate_fn=list),
    "drop-in, a worker": lambda paths: DataLoader(ParquetRows(paths), batch_size=4, collate_fn=list, num_workers=1),
}


@pytest.mark.filterwarnings("ignore::aioloader.ReadAllWarning")
@pytest.mark.parametrize("name", PIPELINES)
def test_every_state_leads_on_past_every_error(tmp_path: Path, name: str) -> None:
    """Each error stands at its place once, before and after a resume, and nothing else is lost."""
    paths = write_everything(tmp_path)
    assert_resumes_exactly(lambda: PIPELINES[name](paths), limit=24)


def test_what_is_lost_is_what_is_broken(tmp_path: Path) -> None:
    """One row, one row group, three files."""
    found = outcomes(ParquetRows(write_everything(tmp_path)))
    assert sum(isinstance(outcome, str) for outcome in found) == 5
    ids = [row["id"] for row in found if isinstance(row, dict)]
    assert ids == [n for n in (*range(40), *range(80, 100)) if n != 13 and not 30 <= n < 35]
    assert found[13].startswith(f"{tmp_path}/0.parquet, row 13: column 'day' of type date32")
    assert next(row for row in found if isinstance(row, dict)) == {"id": 0, "day": datetime.date(1970, 1, 1)}
