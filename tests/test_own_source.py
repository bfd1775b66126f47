"""A source that a user writes with the public names: what it may rely on, and what its mistakes say."""

import asyncio
import json
import re
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aioloader import DataLoader, Pipeline, StateError, sample_rng
from aioloader.sources import CursorSource, Entry, EntryReader, SourceContext, SourceThreads
from aioloader.testing import assert_resumes_exactly
from tests._support import Face, Steps, collect, notes, on_both_faces


class Table(CursorSource):
    """The rows of a table of sqlite3, in the order of their ids; those with a negative number are broken.

    Cursor: the id.
    """

    def __init__(self, path: Path, table: str = "numbers") -> None:
        self.path = str(path)
        self.table = table

    def identity(self) -> dict[str, Any]:
        return {"table": self.table}

    def check_cursor(self, cursor: Any) -> None:
        if type(cursor) is not int:
            raise ValueError(f"a cursor of Table is the id of a row, got {cursor!r}")

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        return _TableReader(self, context.threads(1), cursor or 0)


class _TableReader(EntryReader):
    def __init__(self, source: Table, thread: SourceThreads, last_id: int) -> None:
        self._source = source
        self._thread = thread
        self._last_id = last_id
        self._connection: sqlite3.Connection | None = None

    async def read(self, limit: int) -> list[Entry]:
        rows = await self._thread.call(self._select, limit)
        if rows:
            self._last_id = rows[-1][0]
        return [self._entry(*row) for row in rows]

    def _select(self, limit: int) -> list[tuple[int, int]]:
        if self._connection is None:
            self._connection = sqlite3.connect(self._source.path)
        query = f"SELECT id, number FROM {self._source.table} WHERE id > ? ORDER BY id LIMIT ?"
        return self._connection.execute(query, (self._last_id, min(limit, 7))).fetchall()

    def _entry(self, row_id: int, number: int) -> Entry:
        if number < 0:
            return Entry.failed(ValueError(f"row {row_id} is broken"), row_id, row_id)
        return Entry(number, row_id, row_id)

    async def aclose(self) -> None:
        await self._thread.call(self._close)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()  # raises in another thread than the one that opened it


def make_table(path: Path, numbers: list[int]) -> Path:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS numbers(id INTEGER PRIMARY KEY, number INTEGER)")
        connection.executemany("INSERT INTO numbers(number) VALUES (?)", [(number,) for number in numbers])
    return path


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Ten times the numbers from 0 to 29."""
    return Table(make_table(tmp_path / "rows.db", [10 * number for number in range(30)]))


# -- what it can do ----------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_table_is_read_in_its_order(table: Table, face: Face) -> None:
    pipeline = Pipeline(table).map(lambda number: number // 10)
    assert collect(pipeline, face) == list(range(30))
    assert collect(pipeline, face) == list(range(30))


@on_both_faces
def test_a_drop_in_takes_it(table: Table, face: Face) -> None:
    loader: DataLoader[Any] = DataLoader(table, batch_size=12, collate_fn=lambda batch: batch)
    assert [len(batch) for batch in collect(loader, face)] == [12, 12, 6]
    with pytest.raises(ValueError, match="worker_type='process' is for sync datasets"):
        DataLoader(table, num_workers=2, worker_type="process")


@on_both_faces
def test_a_broken_row_raises_in_its_place(tmp_path: Path, face: Face) -> None:
    table = Table(make_table(tmp_path / "rows.db", [1, -1, 2, 3, -1]))
    with Steps(Pipeline(table).batch(1, collate_fn=list), face) as steps:
        found = steps.outcomes()
    assert [str(outcome) for outcome in found] == ["[1]", "row 2 is broken", "[2]", "[3]", "row 5 is broken"]
    assert notes(found[1]) == "aioloader: stage source(Table), key 2, epoch 0, position 1"


@on_both_faces
def test_what_read_raises_ends_the_epoch_and_is_tried_again(tmp_path: Path, face: Face) -> None:
    """The source's own error, after the samples before it; a state that is taken there leads there."""
    table = Table(make_table(tmp_path / "rows.db", list(range(10))))
    loader = Pipeline(table).batch(2, collate_fn=list)
    with Steps(loader, face) as steps:
        assert [steps.next() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
        state = loader.state_dict()
    with closing(sqlite3.connect(table.path)) as connection, connection:
        connection.execute("ALTER TABLE numbers RENAME TO others")
    loader.load_state_dict(state)
    with Steps(loader, face) as steps:
        with pytest.raises(sqlite3.OperationalError, match="no such table") as caught:
            steps.next()
        assert notes(caught.value) == "aioloader: stage source(Table), epoch 0"
        state = loader.state_dict()
        assert steps.outcomes() == []
    loader.load_state_dict(state)
    with closing(sqlite3.connect(table.path)) as connection, connection:
        connection.execute("ALTER TABLE others RENAME TO numbers")
    assert collect(loader, face) == [[6, 7], [8, 9]]


@pytest.mark.parametrize(
    "make",
    [
        lambda table: Pipeline(table).batch(4),
        lambda table: Pipeline(table).filter(lambda number: number % 20).batch(4, drop_last=True),
        lambda table: Pipeline(table).map(str, concurrency=3).shuffle(buffer_size=5).batch(4, collate_fn=list),
        lambda table: Pipeline(table).shard(1, 3).batch(2),
        lambda table: Pipeline(table).cache(memory_bytes=1 << 20).batch(4),
        lambda table: Pipeline(table).repeat(2).take(40).batch(4),
        lambda table: Pipeline.interleave(table, range(20)).batch(4),
        lambda table: Pipeline(lambda: table).batch(4),
        lambda table: DataLoader(table, batch_size=4),
        lambda table: DataLoader(table, batch_size=4, num_workers=2),
    ],
)
def test_it_resumes_exactly(table: Table, make: Callable[[Any], Any]) -> None:
    assert_resumes_exactly(lambda: make(table))


def test_it_resumes_exactly_with_broken_rows(tmp_path: Path) -> None:
    numbers = [-1 if number % 5 == 3 else number for number in range(23)]
    table = Table(make_table(tmp_path / "rows.db", numbers))
    assert_resumes_exactly(lambda: Pipeline(table).batch(2))


@pytest.mark.usefixtures("fork_server")
@pytest.mark.slow
def test_it_resumes_exactly_in_a_process_of_its_own(table: Table) -> None:
    assert_resumes_exactly(lambda: Pipeline(table).in_process().batch(4), limit=3)


@on_both_faces
def test_ranks_share_it_out(table: Table, face: Face) -> None:
    parts = [collect(Pipeline(table).shard(rank, 4), face) for rank in range(4)]
    dealt = [number for row in zip(*parts, strict=True) for number in row]
    assert dealt == [*(10 * number for number in range(30)), 0, 10]


@on_both_faces
def test_a_resume_reads_what_has_come_since(tmp_path: Path, face: Face) -> None:
    path = make_table(tmp_path / "rows.db", [1, 2, 3, 4])
    loader = Pipeline(Table(path))
    with Steps(loader, face) as steps:
        assert [steps.next() for _ in range(3)] == [1, 2, 3]
        state = json.dumps(loader.state_dict())
    make_table(path, [5, 6])
    other = Pipeline(Table(path))
    other.load_state_dict(json.loads(state))
    assert collect(other, face) == [4, 5, 6]


@on_both_faces
def test_random_numbers_of_a_sample_are_those_of_its_key(table: Table, face: Face) -> None:
    """Each row has others, and the same ones when the source is opened in the middle."""
    loader = Pipeline(table).with_seed(3).map(lambda number: (number, sample_rng().random().random()))
    whole = collect(loader, face)
    assert len({drawn for _, drawn in whole}) == 30
    loader = Pipeline(table).with_seed(3).map(lambda number: (number, sample_rng().random().random()))
    with Steps(loader, face) as steps:
        for _ in range(11):
            steps.next()
        state = loader.state_dict()
    loader.load_state_dict(state)
    assert collect(loader, face) == whole[11:]


def test_a_state_of_another_identity_is_refused(table: Table) -> None:
    loader = Pipeline(table)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    with pytest.raises(StateError, match=r"the source \(Table\) has table='others', and had 'numbers'"):
        Pipeline(Table(Path(table.path), "others")).load_state_dict(state)
    broken = json.loads(state["cursor"]["json"]) | {"cursor": [3]}
    with pytest.raises(StateError, match=r"a cursor of Table is the id of a row, got \[3\]"):
        loader.load_state_dict(state | {"cursor": {"json": json.dumps(broken)}})


def test_an_identity_of_tuples_is_the_same_after_json() -> None:
    class Named(Once):
        def identity(self) -> dict[str, Any]:
            return {"columns": ("a", ("b", 1))}

    assert_resumes_exactly(lambda: Pipeline(Named(one_by_one)))


@on_both_faces
def test_a_cache_on_disk_is_of_one_source(table: Table, tmp_path: Path, face: Face) -> None:
    """The path of another table is another source, as a string or as a path."""

    class OfPath(Table):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.path = path  # type: ignore[assignment]

    other = make_table(tmp_path / "other.db", [1])
    for number, make in enumerate((Table, OfPath)):
        folder = tmp_path / f"cache-{number}"
        for _ in range(2):
            assert len(collect(Pipeline(make(Path(table.path))).cache(disk=folder), face)) == 30
        with pytest.raises(ValueError, match="keeps the samples of another"):
            Pipeline(make(other)).cache(disk=folder)


# -- where its code runs -----------------------------------------------------------------------------------------------


@on_both_faces
def test_a_reader_lives_on_the_loop_and_its_tasks_and_threads_end_with_it(face: Face) -> None:
    """`aclose` comes once, while both are still there; a `break` cancels `read`."""
    said: list[str] = []
    loops: set[Any] = set()

    class Watched(CursorSource):
        def open(self, context: SourceContext, cursor: Any) -> EntryReader:
            loops.update({context.loop, asyncio.get_running_loop()})
            return WatchedReader(context)

    class WatchedReader(EntryReader):
        def __init__(self, context: SourceContext) -> None:
            self._thread = context.threads(1)
            self._task = context.spawn(self._wait)
            self._number = 0

        async def _wait(self) -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                said.append("task cancelled")

        async def read(self, limit: int) -> list[Entry]:
            loops.add(asyncio.get_running_loop())
            if self._number == 5:
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    said.append("read cancelled")
            self._number += 1
            await self._thread.call(lambda: None)
            return [Entry(self._number, self._number, self._number)]

        async def aclose(self) -> None:
            assert threading.current_thread().name != await self._thread.call(lambda: threading.current_thread().name)
            said.append("closed")

    loader = Pipeline(Watched()).prefetch(0)
    with Steps(loader, face) as steps:
        assert [steps.next() for _ in range(3)] == [1, 2, 3]
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)
    assert len(loops) == 1
    assert said.count("closed") == said.count("task cancelled") == 1
    assert "read cancelled" not in said or said.index("read cancelled") < said.index("closed")


@on_both_faces
def test_what_open_began_ends_when_it_fails(face: Face) -> None:
    """Its tasks and threads, though there is no reader to close."""

    class Failing(CursorSource):
        def open(self, context: SourceContext, cursor: Any) -> EntryReader:
            context.threads(1).call(lambda: None)
            context.spawn(self._wait)
            raise OSError("no such table")

        async def _wait(self) -> None:
            await asyncio.get_running_loop().create_future()

    with Steps(Pipeline.interleave(Failing(), range(3)), face) as steps:
        found = steps.outcomes()
    assert [str(outcome) for outcome in found] == ["no such table", "0", "1", "2"]
    assert notes(found[0]) == "aioloader: stage source(Failing), epoch 0, position 0"


def test_a_number_of_threads_is_checked() -> None:
    class Without(CursorSource):
        def open(self, context: SourceContext, cursor: Any) -> EntryReader:
            context.threads(0)
            raise AssertionError("not reached")

    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        list(Pipeline(Without()))


# -- mistakes ----------------------------------------------------------------------------------------------------------


Give = Callable[[int, int], Any]


class Once(CursorSource):
    """Gives what a function makes of the number of a call and its limit."""

    def __init__(self, give: Give) -> None:
        self.give = give

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        return GivingReader(self.give, cursor or 0)


class GivingReader(EntryReader):
    def __init__(self, give: Give, number: int) -> None:
        self._give = give
        self._number = number

    async def read(self, limit: int) -> list[Entry]:
        self._number += 1
        return self._give(self._number, limit)  # type: ignore[no-any-return]


def one_by_one(number: int, limit: int) -> list[Entry]:
    return [Entry(number, number, number)] if number < 4 else []


def sound(number: int) -> Entry:
    return Entry(number, number, number)


@on_both_faces
@pytest.mark.parametrize(
    ("give", "said"),
    [
        (
            lambda *_: None,
            r"TypeError: Once: GivingReader.read must return a list of entries, got None; \[\] is",
        ),
        (lambda *_: iter([]), "must return a list of entries, got <.*iterator.*; pass it through list"),
        (lambda n, _: (sound(n),), r"must return a list of entries, got \(Entry.* of type tuple"),
        (lambda n, _: [n], "got one with 1 of type int; make it Entry"),
        (lambda n, limit: [sound(n)] * (limit + 1), "ValueError: .* at most limit entries, got .* keep the others for"),
        (lambda n, _: [Entry(n, None, n)], r"returned an entry without a cursor \(key 1\)"),
        (lambda n, _: [Entry(n, np.int64(n), n)], "of type int64: pass for instance int"),
        (lambda n, _: [Entry(n, [n], n)], r"with the cursor \[1\]; .* pass tuple\(cursor\)"),
        (lambda n, _: [Entry(n, (1, (n, {})), n)], r"got \{\} of type dict"),
        (lambda n, _: [Entry(n, b"a", n)], "got b'a' of type bytes"),
        (lambda n, _: [Entry(n, n, None)], "returned an entry with the key None; a key names one sample"),
        (lambda n, _: [Entry(n, n, [n])], r"returned an entry with the key \[1\]"),
        (lambda n, _: [Entry.failed("no", n, n)], "Entry.failed takes an exception, got 'no' of type str"),  # type: ignore[arg-type]
    ],
)
def test_a_mistake_ends_the_epoch_and_is_named(give: Give, said: str, face: Face) -> None:
    with Steps(Pipeline(Once(give)).batch(2, collate_fn=list).take(3), face) as steps:
        (error,) = steps.outcomes()
    assert re.search(said, f"{type(error).__name__}: {error}"), error
    assert notes(error) == "aioloader: stage source(Once), epoch 0, position 0"


@on_both_faces
@pytest.mark.parametrize(
    ("give", "said"),
    [
        (lambda *_: None, "got None; "),
        (lambda *_: ["x"], "got one with 'x' of type str"),
        (lambda n, limit: ["x", sound(n)][:limit], "got one with 'x' of type str"),
        (lambda n, _: [Entry(n, None, n)], r"without a cursor \(key 2\)"),
    ],
)
def test_a_mistake_that_comes_later_too(give: Give, said: str, face: Face) -> None:
    """After the samples before it."""

    def later(number: int, limit: int) -> Any:
        return [sound(1)] if number == 1 else give(number, limit)

    with Steps(Pipeline(Once(later)), face) as steps:
        first, error = steps.outcomes(2)
    assert first == 1
    assert re.search(said, str(error)), error


@on_both_faces
def test_entries_that_are_kept_are_found_out(face: Face) -> None:
    """The loader has written into them."""
    kept = [sound(number) for number in range(1, 4)]
    loader = Pipeline(Once(lambda number, _: kept[number - 1 : number])).map(lambda number: number + 1)
    assert collect(loader, face) == [2, 3, 4]
    with pytest.raises(ValueError, match=r"returned an entry a second time \(key 1\); make a new Entry"):
        collect(loader, face)


@on_both_faces
def test_a_cursor_that_turns_bad_later_is_told_with_the_state(face: Face) -> None:
    def give(number: int, limit: int) -> list[Entry]:
        return [Entry(number, number if number < 3 else object(), number)]

    loader = Pipeline(Once(give)).take(4)
    with Steps(loader, face) as steps:
        assert [steps.next() for _ in range(2)] == [1, 2]
        loader.state_dict()
        steps.next()
        with pytest.raises(StateError, match="a cursor is made of numbers, strings and lists, got <object"):
            loader.state_dict()


@on_both_faces
def test_what_open_returns_is_checked(face: Face) -> None:
    class Empty(CursorSource):
        def open(self, context: SourceContext, cursor: Any) -> EntryReader:
            return None  # type: ignore[return-value]

    class Listed(CursorSource):
        def open(self, context: SourceContext, cursor: Any) -> EntryReader:
            return iter([1])  # type: ignore[return-value]

    for source, said in ((Empty(), "got None"), (Listed(), "of type list_iterator")):
        with Steps(Pipeline(source), face) as steps:
            (error,) = steps.outcomes()
        assert f"{type(source).__name__}.open must return an EntryReader, got " in str(error)
        assert said in str(error)


@on_both_faces
def test_read_is_async(face: Face) -> None:
    """It may as well return something else that can be awaited."""

    class Plain(EntryReader):
        def read(self, limit: int) -> Any:
            return [sound(1)]

    class Passed(EntryReader):
        def __init__(self) -> None:
            self._reader = GivingReader(one_by_one, 0)

        def read(self, limit: int) -> Any:
            return self._reader.read(limit)

    class Opened(CursorSource):
        def __init__(self, make: Callable[[], EntryReader]) -> None:
            self.make = make

        def open(self, context: SourceContext, cursor: Any) -> EntryReader:
            return self.make()

    assert collect(Pipeline(Opened(Passed)), face) == [1, 2, 3]
    with Steps(Pipeline(Opened(Plain)), face) as steps:
        (error,) = steps.outcomes()
    assert str(error).startswith("Opened: Plain.read must be an `async def` that returns a list, got [Entry(value=1")


def test_what_must_not_be_async_is_refused_with_its_class() -> None:
    for name in ("open", "identity", "check_cursor"):

        async def late(self: Any, *args: Any) -> Any:
            """Of the source."""

        with pytest.raises(TypeError, match=rf"Late.{name} must be a plain function, but it is async; what has to be"):
            type("Late", (CursorSource,), {name: late})

    with pytest.raises(TypeError, match=r"Yielding.read must return a list of entries, but it is an async generator"):

        class Yielding(EntryReader):
            async def read(self, limit: int) -> Any:
                yield sound(1)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "got None of type NoneType"),
        ({1: 2}, "dict of strings"),
        ({"name": "x"}, "the loader uses the key 'name' itself"),
        ({"length": 3}, "the loader uses the key 'length' itself"),
        ({"path": Path("x")}, "numbers, strings, lists and dicts, got {'path': "),
    ],
)
def test_an_identity_is_checked_when_a_state_is_made(told: Any, said: str) -> None:
    class Told(Once):
        def identity(self) -> dict[str, Any]:
            return told  # type: ignore[no-any-return]

    for loader in (Pipeline(Told(one_by_one)), DataLoader(Told(one_by_one))):
        with pytest.raises(TypeError, match=r"Told.identity must return a small dict") as caught:
            loader.state_dict()
        assert said in str(caught.value)


def test_a_class_is_no_source() -> None:
    with pytest.raises(TypeError, match="got the class Table: pass an instance of it"):
        Pipeline(Table)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="abstract"):
        CursorSource()  # type: ignore[abstract]
