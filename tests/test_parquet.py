"""`ParquetRows`: rows and column batches of files written by pyarrow, opened anywhere, and files that are broken."""

import contextlib
import datetime
import io
import pickle
import random
import sys
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aioloader import BrokenDataError, DataLoader, Pipeline
from aioloader.sources import ParquetRows, parquet
from tests._cursor_sources import assert_opens_at_every_cursor, outcomes
from tests._servers import HttpServer
from tests._support import Face, Steps, collect, notes, on_both_faces


def table(rows: int, start: int = 0) -> Any:
    """A table of numbers, bools, strings and vectors that say which row they are of."""
    numbers = range(start, start + rows)
    vectors = pa.array([float(n + i / 4) for n in numbers for i in range(4)], pa.float32())
    return pa.table(
        {
            "id": pa.array(numbers, pa.int64()),
            "half": pa.array([n / 2 for n in numbers], pa.float64()),
            "even": pa.array([n % 2 == 0 for n in numbers], pa.bool_()),
            "name": pa.array([f"row {n}" for n in numbers], pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(vectors, 4),
        }
    )


def write(path: Path, rows: int, start: int = 0, groups: int = 1000) -> str:
    pq.write_table(table(rows, start), path, row_group_size=groups)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Rows 0 to 29 in three files of several row groups, one of them empty."""
    return [
        write(tmp_path / "a.parquet", 12, 0, groups=5),
        write(tmp_path / "b.parquet", 0),
        write(tmp_path / "c.parquet", 18, 12, groups=4),
    ]


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row group is a span, and pieces are of three rows."""
    monkeypatch.setattr("aioloader.sources.parquet_spans.SPAN_BYTES", 1)
    monkeypatch.setattr(parquet, "PIECE_ROWS", 3)
    monkeypatch.setattr(parquet, "PIECE_BYTES", 100)


@pytest.fixture(scope="module", autouse=True)
def obstore_runtime() -> None:
    """obstore has threads and files of its own from its first call on; no test is to blame for them."""
    with contextlib.suppress(ImportError):
        from obstore.store import MemoryStore

        MemoryStore().put("a", b"")


# -- rows --------------------------------------------------------------------------------------------------------------


@on_both_faces
def test_rows_are_dictionaries_in_order(files: list[str], face: Face) -> None:
    """Those of all files, as pyarrow gives them."""
    assert collect(Pipeline(ParquetRows(files)), face) == table(30).to_pylist()


def test_columns_are_chosen_and_ordered_by_the_user(files: list[str]) -> None:
    """Others are not read."""
    rows = outcomes(ParquetRows(files, columns=["name", "id"]))
    assert [list(row.items()) for row in rows[:2]] == [
        [("name", "row 0"), ("id", 0)],
        [("name", "row 1"), ("id", 1)],
    ]


@pytest.mark.usefixtures("small_spans")
def test_rows_open_at_every_cursor(files: list[str]) -> None:
    """File, row group and row; across JSON."""
    found = assert_opens_at_every_cursor(ParquetRows(files, columns=["id"]))
    assert found == [{"id": n} for n in range(30)]


def test_rows_keep_nulls_and_nested_types(tmp_path: Path) -> None:
    """Whatever arrow has, as `to_pylist` gives it."""
    nested = pa.table(
        {
            "n": pa.array([1, None, 3]),
            "list": pa.array([[1], None, [None, 2]], pa.list_(pa.int32())),
            "struct": pa.array([{"a": 1, "b.c": "x"}, None, {"a": None, "b.c": "y"}]),
            "dictionary": pa.array(["u", "v", None]).dictionary_encode(),
            "time": pa.array([datetime.datetime(2026, 1, 2, 3)] * 3, pa.timestamp("us")),
            "bytes": pa.array([b"\0", b"", None]),
        }
    )
    pq.write_table(nested, tmp_path / "n.parquet")
    assert outcomes(ParquetRows(tmp_path / "n.parquet")) == nested.to_pylist()
    assert outcomes(ParquetRows(tmp_path / "n.parquet", columns=["struct"])) == nested.select(["struct"]).to_pylist()


def test_rows_go_through_torchs_own_collate(files: list[str]) -> None:
    """The drop-in takes the source as any iterable dataset."""
    batches = list(DataLoader(ParquetRows(files, columns=["id", "name"]), batch_size=16))
    assert [len(batch["name"]) for batch in batches] == [16, 14]
    assert batches[0]["id"].tolist() == list(range(16))


# -- batches -----------------------------------------------------------------------------------------------------------


def as_table(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of column batches."""
    rows = []
    for batch in batches:
        columns = [c.tolist() if isinstance(c, torch.Tensor) else c for c in batch.values()]
        rows += [dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True)]
    return rows


@on_both_faces
@pytest.mark.usefixtures("small_spans")
def test_batches_run_over_row_groups_and_files(files: list[str], face: Face) -> None:
    """Exactly so many rows in each, but for the last."""
    batches = collect(Pipeline(ParquetRows(files, batch_rows=7)), face)
    assert [len(batch["id"]) for batch in batches] == [7, 7, 7, 7, 2]
    assert as_table(batches) == table(30).to_pylist()
    first = batches[0]
    assert {name: column.dtype for name, column in first.items() if isinstance(column, torch.Tensor)} == {
        "id": torch.int64,
        "half": torch.float64,
        "even": torch.bool,
        "vector": torch.float32,
    }
    assert first["vector"].shape == (7, 4)
    assert first["name"] == [f"row {n}" for n in range(7)]


@pytest.mark.usefixtures("small_spans")
@pytest.mark.parametrize("batch_rows", [1, 4, 100])
def test_batches_open_at_every_cursor(files: list[str], batch_rows: int) -> None:
    """A batch goes on where the one before it ended, wherever that is."""
    found = assert_opens_at_every_cursor(_Listed(files, columns=["id", "even"], batch_rows=batch_rows))
    assert [n for batch in found for n in batch["id"]] == list(range(30))


class _Listed(ParquetRows):
    """Gives lists for tensors, which compare."""

    def open(self, context: Any, cursor: Any) -> Any:
        reader = super().open(context, cursor)
        read = reader.read

        async def listed(limit: int) -> Any:
            entries = await read(limit)
            for entry in entries:
                if entry.error is None:
                    entry.value = {name: column.tolist() for name, column in entry.value.items()}
            return entries

        reader.read = listed  # type: ignore[method-assign]
        return reader


@settings(max_examples=30)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), min_size=1, max_size=4),
    batch_rows=st.integers(1, 50),
    piece_bytes=st.integers(1, 600),
    span_bytes=st.sampled_from([1, 600, 1 << 20]),
)
def test_any_division_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int]],
    batch_rows: int,
    piece_bytes: int,
    span_bytes: int,
) -> None:
    """Files, row groups, spans and pieces of any size."""
    folder = tmp_path_factory.mktemp("parquet")
    start = 0
    for number, (rows, groups) in enumerate(sizes):
        write(folder / f"{number}.parquet", rows, start, groups)
        start += rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "PIECE_BYTES", piece_bytes)
        patch.setattr("aioloader.sources.parquet_spans.SPAN_BYTES", span_bytes)
        batches = list(Pipeline(ParquetRows(folder / "*.parquet", batch_rows=batch_rows)))
        whole = list(Pipeline(ParquetRows(folder / "*.parquet")))
    assert as_table(batches) == whole == table(start).to_pylist()
    assert [len(batch["id"]) for batch in batches[:-1]] == [batch_rows] * (len(batches) - 1)


def test_tensors_may_be_written_to(files: list[str], recwarn: pytest.WarningsRecorder) -> None:
    """In place, like any other; no batch sees what is done to its neighbour, and nobody warns."""
    batches = list(Pipeline(ParquetRows(files[2], columns=["id", "vector"], batch_rows=3)))
    for batch in batches:
        for column in batch.values():
            column.neg_()
    assert [n for batch in batches for n in batch["id"].tolist()] == [-n for n in range(12, 30)]
    assert not recwarn.list


def test_batches_outlive_their_loader(files: list[str]) -> None:
    """The memory is the batch's own."""
    loader = Pipeline(ParquetRows(files, columns=["half"], batch_rows=8))
    kept = [batch["half"] for batch in loader]
    loader.close()
    del loader
    assert torch.cat(kept).tolist() == [n / 2 for n in range(30)]


def test_tensor_types(tmp_path: Path) -> None:
    """Every number, nested fixed lists, and fixed-shape tensors."""
    numbers = {str(kind): pa.array([1, 2, 3, 4]).cast(kind) for kind in (pa.int8(), pa.uint16(), pa.uint64())}
    halves = pa.array([0.5, 1.0, 1.5, 2.0], pa.float32()).cast(pa.float16())
    flat = pa.array(range(24), pa.int32())
    nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 3), 2)
    image = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), (3, 2)), pa.FixedSizeListArray.from_arrays(flat, 6)
    )
    written = pa.table({**numbers, "half": halves, "nested": nested, "image": image})
    pq.write_table(written, tmp_path / "t.parquet", row_group_size=3)
    first, last = Pipeline(ParquetRows(tmp_path / "t.parquet", batch_rows=2))
    assert [first[name].dtype for name in (*numbers, "half")] == [
        torch.int8,
        torch.uint16,
        torch.uint64,
        torch.float16,
    ]
    both = torch.arange(24, dtype=torch.int32)
    assert torch.equal(torch.cat([first["nested"], last["nested"]]), both.view(4, 2, 3))
    assert torch.equal(torch.cat([first["image"], last["image"]]), both.view(4, 3, 2))


def test_a_null_is_nan_among_floats_and_an_error_among_integers(tmp_path: Path) -> None:
    """The batch without nulls comes, and the one with them raises at its place."""
    path = tmp_path / "nulls.parquet"
    pq.write_table(
        pa.table({"x": pa.array([0.5, None, 2.0, 3.0]), "n": pa.array([0, 1, 2, None]), "s": ["a", None, "b", None]}),
        path,
    )
    with Steps(Pipeline(ParquetRows(path, batch_rows=2)), "for") as steps:
        batch, error = steps.outcomes()
    assert batch["x"].isnan().tolist() == [False, True]
    assert batch["n"].tolist() == [0, 1]
    assert batch["s"] == ["a", None]
    assert str(error) == (
        "column 'n' has 1 null, which a tensor of int64 cannot hold; fill them when writing, leave the column out with "
        "columns=, or read rows (batch_rows=None), where they are None"
    )
    assert f"begins with row 2 of {path}" in notes(error)


# -- what is broken ----------------------------------------------------------------------------------------------------


@on_both_faces
def test_files_that_cannot_be_read_raise_at_their_place(tmp_path: Path, face: Face) -> None:
    """Missing, a folder, something else, cut off: each is named, and the others come."""
    good = write(tmp_path / "good.parquet", 2)
    folder = tmp_path / "folder"
    folder.mkdir()
    text = tmp_path / "text.parquet"
    text.write_text("no table")
    empty = tmp_path / "empty.parquet"
    empty.touch()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(Path(good).read_bytes()[:-50])
    paths: list[str | Path] = [tmp_path / "missing.parquet", good, folder, text, empty, cut, good]
    with Steps(Pipeline(ParquetRows(paths, columns=["id"])), face) as steps:
        missing, *rows, no_file, no_table, nothing, part, again, last = steps.outcomes()
    assert rows == [{"id": 0}, {"id": 1}] == [again, last]
    assert isinstance(missing, FileNotFoundError)
    assert missing.filename == str(tmp_path / "missing.parquet")
    assert isinstance(no_file, IsADirectoryError)
    assert f"'{folder}/*.parquet'" in notes(no_file)
    for error, path in ((no_table, text), (nothing, empty), (part, cut)):
        assert isinstance(error, BrokenDataError)
        assert str(error).startswith(f"{path}: it is not a Parquet file, or only a part of one")


def test_a_short_batch_comes_before_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Order is kept: first the rows before the failure, then the failure."""
    good = write(tmp_path / "good.parquet", 3)
    found = outcomes(_Listed([good, tmp_path / "missing", good], columns=["id"], batch_rows=2))
    assert found[:2] == [{"id": [0, 1]}, {"id": [2]}]
    assert "No such file" in found[2]
    assert found[3:] == [{"id": [0, 1]}, {"id": [2]}]


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    """Says which there are."""
    path = write(tmp_path / "a.parquet", 2)
    assert outcomes(ParquetRows(path, columns=["id", "label"])) == [
        f"{path} has no column 'label'; the columns there are: 'id', 'half', 'even', 'name', 'vector'"
    ]


def test_files_with_other_columns(tmp_path: Path) -> None:
    """The first one says what there is, also when reading goes on in a later one."""
    first = write(tmp_path / "a.parquet", 1)
    other = tmp_path / "b.parquet"
    pq.write_table(table(1).drop_columns(["half"]).append_column("id2", [[7]]).set_column(0, "id", [["x"]]), other)
    error = (
        f"{other} has other columns than {first}: 'id' is string and not int64, 'half' is missing, 'id2' is new; "
        f"choose those that all files have with columns=, or read the others by a source of their own"
    )
    assert outcomes(ParquetRows([first, other])) == [table(1).to_pylist()[0], error]
    assert outcomes(ParquetRows([first, other]), cursor=(1, 0, 0)) == [error]
    assert outcomes(ParquetRows([first, other], columns=["name"])) == [{"name": "row 0"}, {"name": "row 0"}]


TEXT: Final = ["a", None, "c"]
NUMBERS: Final = [1, None, 3]
VALUES: Final[dict[str, Any]] = {
    "null": pa.nulls(3),
    "string": pa.array(TEXT, pa.string()),
    "large_string": pa.array(TEXT, pa.large_string()),
    "dictionary": pa.array(TEXT).dictionary_encode(),
    "binary": pa.array([b"a", None, b"c"], pa.binary()),
    "large_binary": pa.array([b"a", None, b"c"], pa.large_binary()),
    "int8": pa.array(NUMBERS, pa.int8()),
    "int32": pa.array(NUMBERS, pa.int32()),
    "int64": pa.array(NUMBERS, pa.int64()),
    "uint32": pa.array(NUMBERS, pa.uint32()),
    "uint64": pa.array(NUMBERS, pa.uint64()),
    "float32": pa.array([0.5, None, 1.5], pa.float32()),
    "float64": pa.array([0.5, None, 1.5], pa.float64()),
    "lists": pa.array([["a"], [], None], pa.list_(pa.string())),
    "large lists": pa.array([["a"], [], None], pa.large_list(pa.large_string())),
    "empty lists": pa.array([[], [None], None], pa.list_(pa.null())),
    "vectors of int32": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
    "vectors of int64": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2)),
    "structs": pa.array([{"a": 1}, None, {"a": 2}], pa.struct({"a": pa.int64()})),
    "empty structs": pa.array([{"a": None}, None, None], pa.struct({"a": pa.null()})),
    "maps": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "empty maps": pa.array([[("k", None)], None, []], pa.map_(pa.large_string(), pa.null())),
    "milliseconds": pa.array(NUMBERS, pa.timestamp("ms")),
    "microseconds": pa.array(NUMBERS, pa.timestamp("us")),
    "nanoseconds": pa.array(NUMBERS, pa.timestamp("ns")),
    "decimals of 2 digits": pa.array([1, None, 3], pa.decimal128(9, 2)),
    "decimals of 3 digits": pa.array([1, None, 3], pa.decimal128(9, 3)),
}
ALIKE: Final = [
    {"string", "large_string", "dictionary"},
    {"binary", "large_binary"},
    {"lists", "large lists", "empty lists"},
    {"structs", "empty structs"},
    {"maps", "empty maps"},
    {"milliseconds", "microseconds"},
    {"empty lists", "vectors of int32"},  # to Python, but no tensors
    {"empty lists", "vectors of int64"},
    {"vectors of int32", "vectors of int64"},
    {"int8", "int32", "int64", "uint32", "uint64"},
    {"float32", "float64"},
]


@pytest.mark.parametrize("second", VALUES)
def test_columns_that_are_stored_in_another_way(tmp_path: Path, second: str) -> None:
    """Each value is what it would be alone; where it would be something else, the file is an error."""
    for first, values in VALUES.items():
        paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
        pq.write_table(pa.table({"x": values}), paths[0])
        pq.write_table(pa.table({"x": VALUES[second]}), paths[1])
        found = outcomes(ParquetRows(paths))
        if first == second or "null" in (first, second) or any({first, second} <= alike for alike in ALIKE):
            assert found == [{"x": x} for x in values.to_pylist() + VALUES[second].to_pylist()], first
        else:
            assert len(found) == 4, first
            assert f"{paths[1]} has other columns than {paths[0]}: 'x' is " in found[3]


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        ("int64", "int8", torch.int64),
        ("int64", "uint32", torch.int64),
        ("uint64", "uint32", torch.uint64),
        ("float64", "float32", torch.float64),
        ("vectors of int64", "vectors of int32", torch.int64),
        ("float64", "null", torch.float64),
        ("int64", "null", torch.int64),
        ("int32", "int64", None),
        ("uint32", "int32", None),
        ("float32", "float64", None),
        ("vectors of int32", "vectors of int64", None),
        ("vectors of int32", "empty lists", None),
        ("int64", "float64", None),
    ],
)
def test_tensors_have_one_type(tmp_path: Path, first: str, second: str, dtype: torch.dtype | None) -> None:
    """That of the first file; one that is wider does not fit into it."""
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, name in zip(paths, (first, second), strict=True):
        values = VALUES[name]
        pq.write_table(pa.table({"x": values if name in ("null", "empty lists") else values.drop_null()}), path)
    rows = len(VALUES[first].drop_null())
    with Steps(Pipeline(ParquetRows(paths, batch_rows=rows + 1)), "for") as steps:
        found = steps.outcomes()
    if dtype is None:
        assert "has other columns than" in str(found[1])
    elif second == "null" and dtype is torch.int64:
        assert "column 'x' has 1 null, which a tensor of int64 cannot hold" in str(found[0])
    else:
        assert {batch["x"].dtype for batch in found} == {dtype}
        assert torch.cat([batch["x"] for batch in found])[:rows].tolist() == VALUES[first].drop_null().to_pylist()


@pytest.mark.parametrize("batch_rows", [None, 2])
def test_a_column_of_nulls_becomes_what_is_found_later(tmp_path: Path, batch_rows: int | None) -> None:
    """Also when reading goes on after it was found: a file that has it otherwise is the same error."""
    paths = [tmp_path / f"{number}.parquet" for number in range(4)]
    for path, name in zip(paths, ("null", "null", "string", "float64"), strict=True):
        pq.write_table(pa.table({"x": VALUES[name], "n": range(3)}), path)
    source = ParquetRows(paths, columns=["x"], batch_rows=batch_rows)
    found = assert_opens_at_every_cursor(source)
    assert found[-1] == (
        f"{paths[3]} has other columns than {paths[2]}: 'x' is double and not string; choose those that all "
        f"files have with columns=, or read the others by a source of their own"
    )
    cells = [cell for sample in found[:-1] for cell in (sample["x"] if batch_rows else [sample["x"]])]
    assert cells == [None] * 6 + TEXT


def test_columns_in_another_order_are_the_same_columns(tmp_path: Path) -> None:
    """Each row has them in the order of the first file."""
    first = write(tmp_path / "a.parquet", 1)
    pq.write_table(table(1).select(["name", "vector", "even", "half", "id"]), tmp_path / "b.parquet")
    rows = outcomes(ParquetRows(tmp_path / "*.parquet"))
    assert rows[0] == rows[1]
    assert list(rows[1]) == table(1).column_names
    assert len(outcomes(ParquetRows([first, tmp_path / "b.parquet"], batch_rows=2))) == 1


def test_a_broken_row_group_raises_at_its_place(tmp_path: Path) -> None:
    """Its rows are named, and the other row groups come."""
    path = tmp_path / "a.parquet"
    rows = pa.table({"id": pa.array(range(30))})
    pq.write_table(rows, path, row_group_size=10, compression="zstd", use_dictionary=False)
    metadata = pq.read_metadata(path)
    chunk = metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    found = outcomes(ParquetRows(path))
    assert found[:10] + found[11:] == [{"id": n} for n in (*range(10), *range(20, 30))]
    assert found[10].startswith(f"{path}, row group 1: its rows from 10 to 19 cannot be read: ")
    broken = assert_opens_at_every_cursor(ParquetRows(path))
    assert broken == found


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    """A dictionary has room for one."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], ["a", "b", "a"]), path)
    assert outcomes(ParquetRows(path)) == [f"{path} has more than one column named 'a'; leave it out with columns="]
    assert outcomes(ParquetRows(path, columns=["b"])) == [{"b": 2}]


def test_a_cursor_of_other_files(files: list[str]) -> None:
    """Is refused, and not read past."""
    assert "the files have changed" in outcomes(ParquetRows(files), cursor=(7, 0, 0))[0]
    assert "it has 3 row groups and 12 rows: it was changed" in outcomes(ParquetRows(files[0]), cursor=(0, 9, 0))[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"columns": "id"}, TypeError, r"pass \['id'\]"),
        ({"columns": []}, ValueError, "at least one column"),
        ({"columns": ["a", 1]}, TypeError, "got 1 of type int"),
        ({"columns": ["a", "a"]}, ValueError, "each column once"),
        ({"batch_rows": 0}, ValueError, "batch_rows must be at least 1, got 0; leave it out for one sample per row"),
    ],
)
def test_arguments_that_do_not_fit(arguments: Any, error: type[Exception], message: str) -> None:
    """At once."""
    with pytest.raises(error, match=message):
        ParquetRows("a.parquet", **arguments)


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    """Says what was searched."""
    with pytest.raises(FileNotFoundError, match="ParquetRows: no file matches the glob"):
        ParquetRows(tmp_path / "*.parquet")


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out is the install command."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'aioloader\[parquet\]'"):
        ParquetRows("a.parquet")


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_objects_of_a_store(files: list[str]) -> None:
    """Read by ranges, as files are."""
    obstore = pytest.importorskip("obstore.store")
    store = obstore.MemoryStore()
    for name, path in zip("ac", files[::2], strict=True):
        store.put(f"t/{name}.parquet", Path(path).read_bytes())
    source = ParquetRows(["t/a.parquet", "t/missing.parquet", "t/c.parquet"], columns=["id"], store=store)
    found = outcomes(source)
    assert [row["id"] for row in (*found[:12], *found[13:])] == list(range(30))
    assert "t/missing.parquet" in found[12]


def test_what_is_near_in_an_object_is_requested_together(http_server: HttpServer) -> None:
    """The row groups of a span, and of a wide table only the columns that are asked for."""
    out = io.BytesIO()
    noise = random.Random(0)
    wide = pa.array(noise.randbytes(100) for _ in range(4000))
    numbers = pa.array(range(4000), pa.int64())
    pq.write_table(pa.table({"a": numbers, "b": numbers, "wide": wide, "c": numbers}), out, row_group_size=2000)
    http_server.files["t"] = out.getvalue()
    source = ParquetRows("t", columns=["a", "b", "c"], batch_rows=4000, store=http_server.store())
    (batch,) = Pipeline(source)
    assert batch["a"].tolist() == batch["b"].tolist() == batch["c"].tolist() == list(range(4000))
    head, _footer, *spans = http_server.requests
    assert head[0] == "HEAD"
    assert len(spans) == 3  # a and b of the first row group, c of it with a and b of the second one, c of that
    asked = [list(map(int, span.removeprefix("bytes=").split("-"))) for _, _, span in spans]
    assert sum(stop + 1 - start for start, stop in asked) < len(out.getvalue()) - 2 * 190_000


@on_both_faces
def test_an_epoch_that_is_given_up_leaves_nothing(files: list[str], face: Face) -> None:
    """No thread and no open file; the next one begins anew."""
    loader = Pipeline(ParquetRows(files, columns=["id"]))
    for _ in range(3):
        assert collect(loader, face, limit=1) == [{"id": 0}]


def test_a_source_is_pickled_as_it_was_made(files: list[str]) -> None:
    """Nothing in it is open."""
    copied = pickle.loads(pickle.dumps(ParquetRows(files, columns=["id"], batch_rows=4)))
    assert next(iter(Pipeline(copied)))["id"].tolist() == [0, 1, 2, 3]
