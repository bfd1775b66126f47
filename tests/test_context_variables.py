"""Context variables: functions see the consumer's, and what they set themselves ends with the sample or batch."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from aioloader import DataLoader, Pipeline
from tests._support import Face, Steps, collect, on_both_faces

# At module level: a worker process imports them, since a ContextVar cannot be pickled.
new: ContextVar[Any] = ContextVar("new")  # nobody but the functions sets it
request: ContextVar[Any] = ContextVar("request", default=None)  # the consumer's, which the functions change
own: ContextVar[int] = ContextVar("own")

Looked = tuple[bool, Any]


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """The process that workers are forked from: made once, for it takes seconds to import torch."""
    with Pipeline(range(1)).map(str, executor="process", concurrency=1) as keeper:
        assert list(keeper) == ["0"]
        yield


def look(key: Any) -> Looked:
    """Whether nothing is to be seen of another sample, and the consumer's value; then sets both variables."""
    seen = new.get(None) is None, request.get()
    new.set(torch.zeros(2))  # two tensors cannot be compared
    request.set(("of sample", key))
    return seen


async def look_later(key: Any) -> Looked:
    await asyncio.sleep(0)
    return look(key)


def look_and_fail(key: Any) -> Looked:
    if key % 2:
        look(key)
        raise ValueError("odd")
    return look(key)


def items(key: int) -> Iterator[Looked]:
    yield look(key)
    yield request.get() == ("of sample", key), "user"  # its own items are one sample's


async def items_later(key: int) -> AsyncIterator[Looked]:
    for item in items(key):
        yield item
        await asyncio.sleep(0)


def is_clean(key: int) -> bool:
    return look(key) == (True, "user")


async def is_clean_later(key: int) -> bool:
    return is_clean(key)


def collate(samples: Any) -> list[Any]:
    return [*samples, look("batch")]


async def collate_later(samples: Any) -> list[Any]:
    return [*samples, await look_later("batch")]


class Items(Dataset[Looked]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: int) -> Looked:
        return look(key)


class InBulk(Items):
    def __getitems__(self, keys: list[int]) -> list[Looked]:
        return [look(keys)] * len(keys)


class AsyncItems(Items):
    async def __getitem__(self, key: int) -> Looked:  # type: ignore[override]
        return await look_later(key)


class Stream(IterableDataset[Looked]):
    """Its own variable is its own: it finds what it set before."""

    def __iter__(self) -> Iterator[Looked]:
        for number in range(12):
            yield (number == 0 or own.get() == number - 1), request.get()
            own.set(number)


PIPELINES: dict[str, Callable[[], Any]] = {
    "map": lambda: Pipeline(range(12)).map(look, concurrency=2),
    "map, in one hop": lambda: Pipeline(range(2000)).map(look, concurrency=1),
    "map, async": lambda: Pipeline(range(12)).map(look_later, concurrency=2),
    "map in processes": lambda: Pipeline(range(12)).map(look, executor="process", concurrency=1),
    "filter": lambda: Pipeline(range(12)).filter(is_clean).map(lambda _: (True, "user")),
    "filter, async": lambda: Pipeline(range(12)).filter(is_clean_later).map(lambda _: (True, "user")),
    "flat_map": lambda: Pipeline(range(6)).flat_map(items),
    "flat_map, async": lambda: Pipeline(range(6)).flat_map(items_later),
    "drop_if": lambda: Pipeline(range(12)).drop_if(lambda key: not is_clean(key)).map(lambda _: (True, "user")),
    "collate": lambda: Pipeline([(True, "user")] * 9).batch(3, collate_fn=collate).unbatch(),
    "collate, async": lambda: Pipeline([(True, "user")] * 9).batch(3, collate_fn=collate_later).unbatch(),
    "a dataset": lambda: Pipeline(Items()).batch(3, collate_fn=collate).unbatch(),
    "a dataset, in bulk": lambda: Pipeline(InBulk()).batch(3, collate_fn=collate).unbatch(),
    "a dataset, by some": lambda: Pipeline(InBulk()).map(lambda sample: sample),
    "a dataset, async": lambda: Pipeline(AsyncItems()).batch(3, collate_fn=collate).unbatch(),
}


def of_a_consumer_with_a_value(loader: Any, face: Face) -> list[Any]:
    """What comes out; the consumer sets `request` before, and finds it as it was afterwards."""

    def consume() -> list[Any]:
        request.set("user")
        with loader:
            found = collect(loader, face)
        assert (new.get(None), request.get()) == (None, "user")
        return found

    return copy_context().run(consume)


@on_both_faces
@pytest.mark.parametrize("name", PIPELINES)
def test_what_one_sample_sets_does_not_show_in_the_next(name: str, face: Face) -> None:
    """Nor in a batch's collate function what its samples set; the consumer's own value shows in all."""
    found = of_a_consumer_with_a_value(PIPELINES[name](), face)
    assert len(found) >= 12
    expected = None if name == "map in processes" else "user"  # which does not travel
    assert set(found) == {(True, expected)}


@on_both_faces
@pytest.mark.parametrize(("worker_type", "num_workers"), [("thread", 0), ("thread", 1), ("process", 1)])
@pytest.mark.parametrize("batch_size", [3, None])
def test_the_drop_in_keeps_samples_apart(
    batch_size: int | None, worker_type: Any, num_workers: int, face: Face
) -> None:
    """Without workers too, where all of it runs in the consumer's own thread."""
    together: Any = (lambda sample: [sample]) if batch_size is None else collate
    datasets: list[Any] = [Items(), Stream()] if batch_size is None else [Items(), InBulk(), Stream()]
    if worker_type == "thread":
        datasets.append(AsyncItems())
    for dataset in datasets:
        loader: DataLoader[Any] = DataLoader(
            dataset, batch_size, num_workers=num_workers, worker_type=worker_type, collate_fn=together
        )
        found = of_a_consumer_with_a_value(loader, face)
        expected = None if worker_type == "process" else "user"
        assert {look for batch in found for look in batch} == {(True, expected)}, type(dataset).__name__


@on_both_faces
def test_a_sample_that_fails_leaves_nothing_either(face: Face) -> None:
    """The next one of the same hop, or of the same task, is clean."""

    async def fail_later(key: int) -> Looked:
        await asyncio.sleep(0)
        return look_and_fail(key)

    for fn in (look_and_fail, fail_later):
        found: list[Any] = []
        with Steps(Pipeline(range(10)).map(fn, concurrency=1), face) as steps:
            while True:
                try:
                    found.append(steps.next())
                except ValueError as error:
                    found.append(str(error))
                except StopIteration:
                    break
        assert found == [(True, None), "odd"] * 5


@on_both_faces
def test_functions_of_one_sample_that_cross_together_share_its_context(face: Face) -> None:
    """What the first sets, the second sees, as in a plain loop."""

    def first(key: int) -> int:
        look(key)
        return key

    pipeline = Pipeline(range(6)).map(first).map(lambda key: request.get() == ("of sample", key))
    assert collect(pipeline, face) == [True] * 6


@on_both_faces
def test_samples_that_are_looked_at_again_in_their_batch_are_kept_apart(face: Face) -> None:
    """`drop_if` sees each once alone, and once with the others of its batch."""
    looked: list[Looked] = []

    def stale(key: int) -> bool:
        looked.append(look(key))
        return False

    loader = Pipeline(range(12)).drop_if(stale).batch(4, collate_fn=collate)
    found = of_a_consumer_with_a_value(loader, face)
    assert [batch[-1] for batch in found] == [(True, "user")] * 3
    assert looked == [(True, "user")] * 24


@on_both_faces
def test_what_worker_init_fn_sets_is_there_for_each_sample(face: Face) -> None:
    """It belongs to the thread, not to a sample."""

    def connect(worker: int) -> None:
        request.set(("connection", threading.current_thread().name))

    def use(samples: list[int]) -> bool:
        connection = request.get()
        look(samples)
        return bool(connection == ("connection", threading.current_thread().name))

    loader: DataLoader[Any] = DataLoader(list(range(20)), 2, num_workers=2, worker_init_fn=connect, collate_fn=use)
    assert collect(loader, face) == [True] * 10


@on_both_faces
def test_an_async_function_that_sets_nothing_keeps_its_task(face: Face) -> None:
    """Another task is made only for what follows a change."""
    tasks: set[Any] = set()

    async def plain(key: int) -> int:
        tasks.add(asyncio.current_task())
        await asyncio.sleep(0)
        return key

    async def changing(key: int) -> int:
        request.set(key)
        return await plain(key)

    assert collect(Pipeline(range(20)).map(plain, concurrency=1), face) == list(range(20))
    assert len(tasks) == 1
    tasks.clear()
    assert collect(Pipeline(range(20)).map(changing, concurrency=1), face) == list(range(20))
    assert len(tasks) == 20
