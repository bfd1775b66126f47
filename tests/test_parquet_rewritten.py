"""`ParquetRows` over files and objects that are rewritten: while they are read, and before a resume."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aioloader import BrokenDataError, DataLoader, Pipeline
from aioloader.sources import ParquetRows, parquet, parquet_footer
from tests._servers import HttpServer
from tests._support import Face, Steps, on_both_faces

ROWS = 900
"""Of a file, in row groups of three: more than is ever read ahead here."""


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row group is a span, which opens the file anew."""
    monkeypatch.setattr("aioloader.sources.parquet_spans.SPAN_BYTES", 1)


@pytest.fixture(scope="module", autouse=True)
def obstore_runtime() -> None:
    """obstore has threads and files of its own from its first call on; no test is to blame for them."""
    with contextlib.suppress(ImportError):
        from obstore.store import MemoryStore

        MemoryStore().put("a", b"")


def content(version: int, rows: int = ROWS) -> bytes:
    """A file whose rows say which version they are of; of two versions it has the same size and the same footer."""
    table = pa.table({"id": range(rows), "version": pa.array([version] * rows, pa.int64())})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=3, use_dictionary=False, write_statistics=False, compression="none")
    return out.getvalue()


def write(path: Path, data: bytes) -> None:
    """As it was written long ago."""
    path.write_bytes(data)
    os.utime(path, ns=(0, 10**18))


def replace(path: Path, data: bytes) -> None:
    """By a new file of the same time, which takes the name."""
    write(path.with_suffix(".new"), data)
    path.with_suffix(".new").replace(path)


def write_in_place(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.truncate(len(data))  # first: a reader that looks in between sees the new size
        file.write(data)


def remove(path: Path, data: bytes) -> None:
    path.unlink()


CHANGES: dict[str, tuple[Callable[[Path, bytes], None], bytes, str]] = {
    "replaced": (replace, content(2), "another file has taken its place"),
    "written in place": (write_in_place, content(2), "it was written to"),
    "written in place, shorter": (write_in_place, content(2, 30), "bytes, and has"),
    "emptied": (write_in_place, b"", "bytes, and has 0 now"),
    "removed": (remove, b"", ""),  # no such file, or no longer the one that was opened: where the reader is by then
}


def test_both_versions_have_the_same_footer() -> None:
    """So it alone tells nothing."""
    first, second = content(1), content(2)
    assert len(first) == len(second)
    assert first != second
    assert first[-2000:] == second[-2000:]


@on_both_faces
@pytest.mark.parametrize("batch_rows", [None, 7])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, face: Face, change: str, batch_rows: int | None) -> None:
    """Rows of one version, then one error that says what happened, then the next file."""
    alter, data, message = CHANGES[change]
    path, following = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write(path, content(1))
    write(following, content(3, 4))
    with Steps(Pipeline(ParquetRows([path, following], batch_rows=batch_rows)), face) as steps:
        first = steps.next()
        alter(path, data)
        found = [first, *steps.outcomes()]
    check(found, str(path), message, batch_rows)


def check(found: list[Any], name: str, message: str, batch_rows: int | None = None) -> None:
    (error,) = (outcome for outcome in found if isinstance(outcome, Exception))
    place = found.index(error)
    before, after = (rows_of(part, batch_rows) for part in (found[:place], found[place + 1 :]))
    assert before == [(number, 1) for number in range(len(before))]
    assert 0 < len(before) < ROWS
    assert after == [(number, 3) for number in range(4)]
    assert name in str(error)
    assert message in str(error)
    if isinstance(error, BrokenDataError):
        assert f"was rewritten while it was read: {message}" in str(error) or message.startswith("bytes")
        assert f"Its rows from {len(before)} on would be of another version" in str(error)


def rows_of(samples: list[Any], batch_rows: int | None) -> list[tuple[int, int]]:
    if batch_rows is None:
        return [(row["id"], row["version"]) for row in samples]
    return [row for b in samples for row in zip(b["id"].tolist(), b["version"].tolist(), strict=True)]


def test_a_file_that_changes_between_its_footer_and_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one row of it comes."""
    path = tmp_path / "a.parquet"
    write(path, content(1))
    read_end = parquet_footer.read_end

    def read_and_replace(*args: Any) -> Any:
        found = read_end(*args)
        replace(path, content(2))
        return found

    monkeypatch.setattr(parquet, "read_end", read_and_replace)
    with Steps(Pipeline(ParquetRows(path)), "for") as steps:
        (error,) = steps.outcomes()
    assert "another file has taken its place. Its rows from 0 on" in str(error)


@pytest.mark.parametrize("change", [replace, remove])
def test_a_file_that_changes_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, bytes], None]
) -> None:
    """The same, once."""
    path = tmp_path / "a.parquet"
    write(path, content(1))
    open_file = pa.OSFile

    def change_and_open(name: str) -> Any:
        change(path, content(2))
        return open_file(name)

    monkeypatch.setattr(pa, "OSFile", change_and_open)
    with Steps(Pipeline(ParquetRows(path)), "for") as steps:
        (error,) = steps.outcomes()
    assert "another file has taken its place. Its rows from 0 on" in str(error)


@on_both_faces
@pytest.mark.parametrize("kind", ["memory", "local"])
@pytest.mark.parametrize("batch_rows", [None, 7])
@pytest.mark.parametrize("size", [ROWS, 30])
def test_an_object_that_changes_while_it_is_read(
    tmp_path: Path, face: Face, kind: str, batch_rows: int | None, size: int
) -> None:
    """The same: ranges are of the version that the footer was of."""
    obstore = pytest.importorskip("obstore.store")
    store = obstore.MemoryStore() if kind == "memory" else obstore.LocalStore(tmp_path)
    store.put("t/a", content(1))
    store.put("t/b", content(3, 4))
    with Steps(Pipeline(ParquetRows(["t/a", "t/b"], store=store, batch_rows=batch_rows)), face) as steps:
        first = steps.next()
        store.put("t/a", content(2, size))
        found = [first, *steps.outcomes()]
    check(found, "t/a", "the store has another version of it now", batch_rows)


def test_an_object_of_a_server_that_tells_no_versions(http_server: HttpServer) -> None:
    """Its size is looked at, and the time of its last change, if there is one."""
    http_server.files.update({"a": content(1), "b": content(3, 4)})
    loader = Pipeline(ParquetRows(["a", "b"], store=http_server.store()))
    with Steps(loader, "for") as steps:
        first = steps.next()
        http_server.files["a"] = content(2, 30)
        found = [first, *steps.outcomes()]
    check(found, "a", f"it had {len(content(1))} bytes, and has {len(content(2, 30))} now")


def test_an_object_that_is_removed_while_it_is_read() -> None:
    """Is named, once."""
    obstore = pytest.importorskip("obstore.store")
    store = obstore.MemoryStore()
    store.put("t/a", content(1))
    store.put("t/b", content(3, 4))
    with Steps(Pipeline(ParquetRows(["t/a", "t/b"], store=store)), "for") as steps:
        first = steps.next()
        store.delete("t/a")
        found = [first, *steps.outcomes()]
    check(found, "t/a", "the store does not have it any more")


@on_both_faces
def test_a_state_after_the_error_goes_on_in_the_next_file(tmp_path: Path, face: Face) -> None:
    """And is not held up by the file that was changed."""
    path, following = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write(path, content(1))
    write(following, content(3, 4))
    loader = Pipeline(ParquetRows([path, following]))
    with Steps(loader, face) as steps:
        steps.next()
        replace(path, content(2))
        error = None
        while error is None:
            try:
                steps.next()
            except BrokenDataError as caught:
                error = caught
        state = json.loads(json.dumps(loader.state_dict()))
    resumed = Pipeline(ParquetRows([path, following]))
    resumed.load_state_dict(state)
    with Steps(resumed, face) as steps:
        assert [row["version"] for row in steps.outcomes()] == [3] * 4


@on_both_faces
@pytest.mark.parametrize("batch_rows", [None, 7])
def test_a_resume_into_another_version_is_refused_at_its_place(
    tmp_path: Path, face: Face, batch_rows: int | None
) -> None:
    """The rows that are left are not those that were to come; a copy of the same file is the same file."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    paths = [here / "a.parquet", here / "b.parquet"]
    write(paths[0], content(1))
    write(paths[1], content(3, 4))
    loader = Pipeline(ParquetRows(paths, batch_rows=batch_rows))
    with Steps(loader, face) as steps:
        steps.rest(5)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = [str(sample) for sample in steps.outcomes()]

    def resumed(paths: list[Path]) -> list[Any]:
        loader = Pipeline(ParquetRows(paths, batch_rows=batch_rows))
        loader.load_state_dict(state)
        with Steps(loader, face) as steps:
            return steps.outcomes()

    for path in paths:
        (there / path.name).write_bytes(path.read_bytes())
    assert [str(sample) for sample in resumed([there / path.name for path in paths])] == expected

    table = pq.read_table(paths[0])
    pq.write_table(table.slice(1), paths[0], row_group_size=3)
    error, *rest = resumed(paths)
    assert isinstance(error, BrokenDataError)
    assert str(error).startswith(f"{paths[0]}: reading resumes in row group ")
    assert "its footer differs: it was changed after the state was made" in str(error)
    assert rows_of(rest, batch_rows) == [(number, 3) for number in range(4)]


def test_a_file_that_was_read_to_its_end_may_change(tmp_path: Path) -> None:
    """A resume does not even open it."""
    path, following = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write(path, content(1, 6))
    write(following, content(3, 4))
    loader = Pipeline(ParquetRows([path, following], batch_rows=6))
    with Steps(loader, "for") as steps:
        steps.next()
        state = loader.state_dict()
    write(path, content(2, 9))
    resumed = Pipeline(ParquetRows([path, following], batch_rows=6))
    resumed.load_state_dict(state)
    assert [batch["version"].tolist() for batch in resumed] == [[3] * 4]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_drop_in(tmp_path: Path, num_workers: int) -> None:
    """Batches of one version, then the error."""
    path = tmp_path / "a.parquet"
    write(path, content(1))
    with Steps(DataLoader(ParquetRows(path), batch_size=2, num_workers=num_workers), "for") as steps:
        found = [steps.next()]
        replace(path, content(2))
        found += steps.outcomes()
    *batches, error = found
    assert f"{path} was rewritten while it was read" in str(error)
    assert {version for batch in batches for version in batch["version"].tolist()} == {1}
