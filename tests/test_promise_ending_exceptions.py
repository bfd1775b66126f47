"""`KeyboardInterrupt` and `SystemExit` in user code: they reach the consumer in order, and leave nothing behind.

asyncio lets both through: a task that raises one ends its event loop. So each place where user code runs must hand them
over as it does any other exception.
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from torch.utils.data import Dataset, IterableDataset

from aioloader import DataLoader, Pipeline
from aioloader.sources import CursorSource, Entry, EntryReader, SourceContext
from tests._support import Face, Steps, on_both_faces

Ending = type[BaseException]
Make = Callable[[Ending], Any]

ENDINGS: list[Ending] = [KeyboardInterrupt, SystemExit]
both_kinds = pytest.mark.parametrize("kind", ENDINGS)

BAD = 3


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """The process that workers are forked from: made once, for it takes seconds to import torch."""
    with Pipeline(range(1)).map(str, executor="process", concurrency=1) as keeper:
        assert list(keeper) == ["0"]
        yield


class Raise:
    """Gives back what it gets, but for `BAD`: that raises."""

    def __init__(self, kind: Ending, bad: int = BAD) -> None:
        self.kind = kind
        self.bad = bad

    def __call__(self, key: int) -> int:
        if key == self.bad:
            raise self.kind
        return key

    def false(self, key: int) -> bool:
        self(key)
        return False

    def true(self, key: int) -> bool:
        self(key)
        return True

    async def at_once(self, key: int) -> int:
        return self(key)

    async def later(self, key: int) -> int:
        await asyncio.sleep(0)
        return self(key)

    async def later_true(self, key: int) -> bool:
        await self.later(key)
        return True

    def all(self, batch: list[int]) -> list[int]:
        return [self(key) for key in batch]

    async def all_later(self, batch: list[int]) -> list[int]:
        return [await self.later(key) for key in batch]

    def numbers(self) -> Iterator[int]:
        yield from map(self, range(6))

    async def numbers_later(self) -> AsyncIterator[int]:
        for key in range(6):
            yield await self.later(key)

    def one_by_one(self, key: int) -> Iterator[int]:
        """Not raised when it is called, but when it is iterated."""
        yield self(key)

    async def one_by_one_later(self, key: int) -> AsyncIterator[int]:
        yield await self.later(key)

    def fail(self, *args: Any) -> Any:
        raise self.kind

    async def fail_later(self, *args: Any) -> Any:
        await asyncio.sleep(0)
        raise self.kind


class Items(Dataset[int]):
    def __init__(self, kind: Ending) -> None:
        self.load = Raise(kind)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, key: int) -> int:
        return self.load(key)


class AsyncItems(Items):
    async def __getitem__(self, key: int) -> int:  # type: ignore[override]
        return await self.load.later(key)


class InBulk(Items):
    def __getitems__(self, keys: list[int]) -> list[int]:
        return self.load.all(keys)


class AsyncInBulk(AsyncItems):
    async def __getitems__(self, keys: list[int]) -> list[int]:
        return await self.load.all_later(keys)


class Stream(IterableDataset[int]):
    def __init__(self, kind: Ending) -> None:
        self.load = Raise(kind)

    def __iter__(self) -> Iterator[int]:
        return self.load.numbers()


class Keys:
    """A sampler."""

    def __init__(self, kind: Ending) -> None:
        self.load = Raise(kind)

    def __iter__(self) -> Iterator[int]:
        return self.load.numbers()

    def __len__(self) -> int:
        return 6


class Batches(Keys):
    """A batch sampler."""

    def __iter__(self) -> Iterator[Any]:
        return ([key] for key in self.load.numbers())


class Unready:
    """Cannot be iterated, sync or async."""

    def __init__(self, kind: Ending) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[int]:
        raise self.kind


class AsyncUnready:
    def __init__(self, kind: Ending) -> None:
        self.kind = kind

    def __aiter__(self) -> AsyncIterator[int]:
        raise self.kind


class Sample:
    """Cannot be pickled if it is bad."""

    def __init__(self, key: int, kind: Ending) -> None:
        self.key = key
        self.kind = kind

    def __reduce__(self) -> Any:
        return Raise(self.kind), (Raise(self.kind)(self.key),)


def lists(pipeline: Pipeline) -> Pipeline:
    """Batches of one."""
    return pipeline.batch(1, collate_fn=list)


def first(batch: list[int]) -> int:
    return batch[0]


def dropin(dataset: Any, **options: Any) -> Any:
    return DataLoader(dataset, 1, collate_fn=first, **options)


ONE_FAILS: dict[str, Make] = {
    "map": lambda kind: Pipeline(range(6)).map(Raise(kind)),
    "map, one at a time": lambda kind: Pipeline(range(6)).map(Raise(kind), concurrency=1),
    "map, async at once": lambda kind: Pipeline(range(6)).map(Raise(kind).at_once),
    "map, async": lambda kind: Pipeline(range(6)).map(Raise(kind).later),
    "map, async, one at a time": lambda kind: Pipeline(range(6)).map(Raise(kind).later, concurrency=1),
    "two maps": lambda kind: Pipeline(range(6)).map(Raise(kind, bad=9).later).map(Raise(kind)),
    "filter": lambda kind: Pipeline(range(6)).filter(Raise(kind).true),
    "filter, async": lambda kind: Pipeline(range(6)).filter(Raise(kind).later_true),
    "flat_map, sync": lambda kind: Pipeline(range(6)).flat_map(lambda key: [Raise(kind)(key)]),
    "flat_map, generator": lambda kind: Pipeline(range(6)).flat_map(Raise(kind).one_by_one),
    "flat_map, async generator": lambda kind: Pipeline(range(6)).flat_map(Raise(kind).one_by_one_later),
    "collate": lambda kind: Pipeline(range(6)).batch(1, collate_fn=lambda batch: Raise(kind)(batch[0])),
    "collate, async": lambda kind: Pipeline(range(6)).batch(1, collate_fn=Raise(kind).all_later).unbatch(),
    "map of batches": lambda kind: lists(Pipeline(range(6))).map(Raise(kind).all).map(first),
    "drop_if": lambda kind: Pipeline(range(6)).drop_if(Raise(kind).false),
    "drop_if, before a batch": lambda kind: lists(Pipeline(range(6)).drop_if(Raise(kind).false)).map(first),
    "drop_if, of batches": lambda kind: lists(Pipeline(range(6))).drop_if(lambda b: Raise(kind).false(b[0])).map(first),
    "a dataset": lambda kind: Pipeline(Items(kind)),
    "a dataset, async": lambda kind: Pipeline(AsyncItems(kind)),
    "a dataset, in bulk": lambda kind: Pipeline(InBulk(kind)).batch(1, collate_fn=first),
    "a dataset, in bulk, no batch": lambda kind: Pipeline(InBulk(kind)),
    "a cursor source's entry": lambda kind: Pipeline(Numbers(Raise(kind), "entry")),
    "memory cache": lambda kind: Pipeline(range(6)).map(Raise(kind)).cache(memory_bytes=1 << 20),
    "drop-in": lambda kind: dropin(Items(kind)),
    "drop-in, one worker": lambda kind: dropin(Items(kind), num_workers=1),
    "drop-in, async": lambda kind: dropin(AsyncItems(kind), num_workers=1),
    "drop-in, async, no worker": lambda kind: dropin(AsyncItems(kind)),
    "drop-in, in bulk": lambda kind: dropin(InBulk(kind), num_workers=1),
    "drop-in, in bulk, no worker": lambda kind: dropin(InBulk(kind)),
    "drop-in, in bulk, async": lambda kind: dropin(AsyncInBulk(kind), num_workers=1),
    "drop-in, no batches": lambda kind: DataLoader(Items(kind), batch_size=None, collate_fn=lambda key: key),
    "drop-in, collate": lambda kind: DataLoader(range(6), 1, collate_fn=lambda b: Raise(kind)(b[0])),
    "drop-in, collate, one worker": lambda kind: DataLoader(
        range(6),
        1,
        collate_fn=lambda b: Raise(kind)(b[0]),
        num_workers=1,
    ),
}

IN_PROCESSES: dict[str, Make] = {
    "map": lambda kind: Pipeline(range(6)).map(Raise(kind), executor="process", concurrency=1),
    "drop-in": lambda kind: dropin(Items(kind), num_workers=1, worker_type="process"),
    "in_process, map": lambda kind: Pipeline(range(6)).map(Raise(kind)).in_process(),
    "in_process, async map": lambda kind: Pipeline(range(6)).map(Raise(kind).later).in_process(),
    "in_process, collate": lambda kind: Pipeline(range(6)).batch(1, collate_fn=Raise(kind).all).in_process().unbatch(),
    "pickled on the way there": lambda kind: (
        Pipeline(range(6)).map(lambda key: cast(Any, Sample(key, kind))).map(int, executor="process", concurrency=1)
    ),
    "pickled on the way back": lambda kind: Pipeline(range(6)).map(
        lambda key: Sample(key, kind), executor="process", concurrency=1
    ),
}

SOURCE_FAILS: dict[str, Make] = {
    "generator function": lambda kind: Pipeline(Raise(kind).numbers),
    "generator": lambda kind: Pipeline(Raise(kind).numbers()),
    "async generator function": lambda kind: Pipeline(Raise(kind).numbers_later),
    "async generator": lambda kind: Pipeline(Raise(kind).numbers_later()),
    "iterable dataset": lambda kind: Pipeline(Stream(kind)),
    "sampler": lambda kind: Pipeline(range(6), sampler=Keys(kind)),
    "cursor source": lambda kind: Pipeline(Numbers(Raise(kind), "read")),
    "in_process": lambda kind: Pipeline(Raise(kind).numbers).in_process(),
    "drop-in": lambda kind: dropin(Stream(kind)),
    "drop-in, one worker": lambda kind: dropin(Stream(kind), num_workers=1),
    "drop-in, one process": lambda kind: dropin(Stream(kind), num_workers=1, worker_type="process"),
    "drop-in, sampler": lambda kind: dropin(range(6), sampler=Keys(kind)),
    "drop-in, sampler, one worker": lambda kind: dropin(range(6), sampler=Keys(kind), num_workers=1),
    "drop-in, batch sampler": lambda kind: DataLoader(range(6), batch_sampler=Batches(kind), collate_fn=first),
    "drop-in, batch sampler, one worker": lambda kind: DataLoader(
        range(6),
        batch_sampler=Batches(kind),
        collate_fn=first,
        num_workers=1,
    ),
}

NOTHING_BEGINS: dict[str, Make] = {
    "a function": lambda kind: Pipeline(Raise(kind).fail),
    "a function, async": lambda kind: Pipeline(Raise(kind).fail_later),
    "an iterable": lambda kind: Pipeline(Unready(kind)),
    "an async iterable": lambda kind: Pipeline(AsyncUnready(kind)),
    "a cursor source": lambda kind: Pipeline(Numbers(Raise(kind), "open")),
    "drop-in, one worker": lambda kind: dropin(_Begins(kind), num_workers=1),
    "drop-in, sampler": lambda kind: dropin(range(6), sampler=_Begins(kind), num_workers=1),
}


class _Begins(IterableDataset[int]):
    def __init__(self, kind: Ending) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[int]:
        raise self.kind

    def __len__(self) -> int:
        return 6


class Numbers(CursorSource):
    """A source that fails in one of the methods of its reader."""

    def __init__(self, load: Raise, where: str) -> None:
        self.load = load
        self.where = where

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        if self.where == "open":
            self.load(BAD)
        return _NumberReader(self, context)


class _NumberReader(EntryReader):
    def __init__(self, source: Numbers, context: SourceContext) -> None:
        self._source = source
        self._thread = context.threads(1)
        self._number = -1
        if source.where == "task":
            context.spawn(self._fail)

    async def _fail(self) -> None:
        self._source.load(BAD)

    async def read(self, limit: int) -> list[Entry]:
        self._number = number = self._number + 1
        if number == 6:
            return []
        try:
            await self._thread.call(self._source.load, number)
        except BaseException as error:
            if self._source.where == "entry":
                return [Entry.failed(error, number, number)]
            if self._source.where == "read":
                raise
        return [Entry(number, number, number)]

    async def aclose(self) -> None:
        if self._source.where == "aclose":
            self._source.load(BAD)


def seen(loader: Any, face: Face) -> list[Any]:
    """What comes, with exceptions by their types."""
    try:
        with Steps(loader, face) as steps:
            found = steps.outcomes()
        loader.close()
    except (KeyboardInterrupt, SystemExit):
        pytest.fail(f"it came where no batch is asked for:\n{traceback.format_exc()}")  # it would end pytest
    return [
        type(one) if isinstance(one, BaseException) else one.key if isinstance(one, Sample) else int(one)
        for one in found
    ]


@both_kinds
@on_both_faces
@pytest.mark.parametrize("where", ONE_FAILS)
def test_it_is_raised_in_place_of_its_sample(where: str, face: Face, kind: Ending) -> None:
    """And the iterator goes on."""
    assert seen(ONE_FAILS[where](kind), face) == [0, 1, 2, kind, 4, 5]


@both_kinds
@on_both_faces
@pytest.mark.parametrize("where", IN_PROCESSES)
def test_it_comes_back_from_another_process(where: str, face: Face, kind: Ending) -> None:
    assert seen(IN_PROCESSES[where](kind), face) == [0, 1, 2, kind, 4, 5]


@both_kinds
@on_both_faces
@pytest.mark.parametrize("where", SOURCE_FAILS)
def test_a_source_that_raises_it_ends_the_epoch(where: str, face: Face, kind: Ending) -> None:
    assert seen(SOURCE_FAILS[where](kind), face) == [0, 1, 2, kind]


@both_kinds
@on_both_faces
@pytest.mark.parametrize("where", NOTHING_BEGINS)
def test_a_source_that_cannot_begin_raises_it_once(where: str, face: Face, kind: Ending) -> None:
    assert seen(NOTHING_BEGINS[where](kind), face) == [kind]


@both_kinds
def test_without_workers_the_iterable_is_asked_again(kind: Ending) -> None:
    """That is in the consumer's own thread, where it may be a Ctrl-C as well, after which the iterator goes on."""
    batches = iter(dropin(_Begins(kind)))
    for _ in range(2):
        with pytest.raises(kind):
            next(batches)
    assert seen(dropin(_Begins(kind)), "async for") == [kind]


@both_kinds
@on_both_faces
def test_a_reader_that_cannot_be_closed(face: Face, kind: Ending) -> None:
    assert seen(Pipeline(Numbers(Raise(kind, bad=9), "aclose")), face) == [0, 1, 2, 3, 4, 5]
    assert seen(Pipeline(Numbers(Raise(kind), "aclose")), face)[-1] is kind


@both_kinds
@on_both_faces
def test_a_task_of_a_reader(face: Face, kind: Ending) -> None:
    """It is the whole run that ends, as with any error that a task lets out."""
    assert seen(Pipeline(Numbers(Raise(kind), "task")), face)[-1] is kind


@both_kinds
@on_both_faces
def test_one_of_several_sources(face: Face, kind: Ending) -> None:
    """The others go on."""
    loader = Pipeline.interleave(Raise(kind).numbers, Pipeline(range(10, 16)))
    assert seen(loader, face) == [0, 10, 1, 11, 2, 12, kind, 13, 14, 15]


@both_kinds
@on_both_faces
def test_a_batch_that_is_looked_through_again(face: Face, kind: Ending) -> None:
    """The second look of `drop_if`."""
    calls: list[int] = []

    def stale(key: int) -> bool:
        calls.append(key)
        if calls.count(BAD) == 2 and key == BAD:
            raise kind
        return False

    loader = Pipeline(range(6)).drop_if(stale).batch(2, collate_fn=lambda batch: batch[0])
    assert seen(loader, face) == [0, kind, 4]


@both_kinds
@on_both_faces
def test_an_executor_of_the_users(face: Face, kind: Ending) -> None:
    with ThreadPoolExecutor(1) as executor:
        loader = Pipeline(range(6)).map(Raise(kind), executor=executor)
        assert seen(loader, face) == [0, 1, 2, kind, 4, 5]


@both_kinds
@on_both_faces
@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_a_worker_that_cannot_begin(face: Face, kind: Ending, worker_type: Any) -> None:
    """Raised for its first batch, as torch does."""
    loader = dropin(range(4), num_workers=1, worker_type=worker_type, worker_init_fn=Raise(kind).fail)
    assert seen(loader, face)[0] is kind


@both_kinds
@on_both_faces
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_sample_that_a_cache_cannot_write(where: str, face: Face, kind: Ending, tmp_path: Path) -> None:
    samples = Pipeline(range(6)).map(lambda key: Sample(key, kind))
    loader = samples.cache(memory_bytes=1 << 20) if where == "memory" else samples.cache(disk=tmp_path / "cache")
    assert seen(loader, face) == [0, 1, 2, kind, 4, 5]
