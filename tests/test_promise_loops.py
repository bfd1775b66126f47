"""Promise 3: async code runs on the caller's loop, sync code never on a loop's thread."""

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from aiohttp import ClientSession
from torch.utils.data import Dataset, IterableDataset

from aioloader import DataLoader, Pipeline
from aioloader.testing import RecordingSource, SyncRecordingSource
from tests._support import DEADLINE, Face, Loader, collect, notes, on_both_faces, run


@dataclass
class Places:
    """Where user code ran: the loop that was running there, and the thread."""

    seen: list[tuple[asyncio.AbstractEventLoop | None, threading.Thread]] = field(default_factory=list)

    def note(self) -> None:
        try:
            loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        self.seen.append((loop, threading.current_thread()))

    @property
    def loops(self) -> set[asyncio.AbstractEventLoop | None]:
        return {loop for loop, _ in self.seen}

    @property
    def threads(self) -> set[threading.Thread]:
        return {thread for _, thread in self.seen}


class AsyncItems(Dataset[Any]):
    def __init__(self, places: Places) -> None:
        self.places = places

    def __len__(self) -> int:
        return 6

    async def __getitem__(self, index: int) -> int:
        self.places.note()
        await asyncio.sleep(0)
        self.places.note()
        return index


class AsyncManyItems(AsyncItems):
    async def __getitems__(self, indices: list[int]) -> list[int]:
        self.places.note()
        await asyncio.sleep(0)
        return indices


class Items(Dataset[int]):
    def __init__(self, places: Places) -> None:
        self.places = places

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        self.places.note()
        return index


class ManyItems(Items):
    def __getitems__(self, indices: list[int]) -> list[int]:
        self.places.note()
        return indices


class Stream(IterableDataset[int]):
    def __init__(self, places: Places) -> None:
        self.places = places

    def __iter__(self) -> Iterator[int]:
        for key in range(6):
            self.places.note()
            yield key


class Sampler:
    """Gives keys, sync."""

    def __init__(self, places: Places) -> None:
        self.places = places

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[int]:
        for key in range(6):
            self.places.note()
            yield key


class BatchSampler(Sampler):
    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        for key in super().__iter__():
            yield [key]

    def __len__(self) -> int:
        return 6


async def later(places: Places, value: Any) -> Any:
    places.note()
    await asyncio.sleep(0)
    places.note()
    return value


async def stream(places: Places, samples: Any) -> AsyncIterator[Any]:
    try:
        for sample in samples:
            places.note()
            yield sample
            await asyncio.sleep(0)
    finally:
        places.note()


def soon(places: Places, value: Any) -> Any:
    places.note()
    return value


def items(places: Places, samples: Any) -> Iterator[Any]:
    try:
        for sample in samples:
            places.note()
            yield sample
    finally:
        places.note()


class AsyncCallable:
    def __init__(self, places: Places) -> None:
        self.places = places

    async def __call__(self, key: int) -> Any:
        return await later(self.places, key)

    async def method(self, key: int) -> Any:
        return await later(self.places, key)


ASYNC_CODE: dict[str, Callable[[Places], Loader]] = {
    "async generator": lambda places: Pipeline(stream(places, range(6))),
    "async generator function": lambda places: Pipeline(lambda: stream(places, range(6))),
    "async map": lambda places: Pipeline(range(6)).map(partial(later, places)),
    "async callable": lambda places: Pipeline(range(6)).map(AsyncCallable(places)),
    "async method": lambda places: Pipeline(range(6)).map(AsyncCallable(places).method),
    "async filter": lambda places: Pipeline(range(6)).filter(lambda_of(places)),
    "async flat_map": lambda places: Pipeline(range(6)).flat_map(lambda key: stream(places, [key])),
    "async items": lambda places: Pipeline(AsyncItems(places)),
    "DataLoader of async items": lambda places: DataLoader(AsyncItems(places), batch_size=2),
    "DataLoader of async items, workers": lambda places: DataLoader(AsyncItems(places), batch_size=2, num_workers=2),
    "DataLoader of async __getitems__": lambda places: DataLoader(AsyncManyItems(places), batch_size=2),
    "merge": lambda places: Pipeline.merge(stream(places, range(3)), stream(places, range(3))),
    "mix": lambda places: Pipeline.mix([stream(places, range(3)), stream(places, range(3))], [0.5, 0.5]),
    "zip": lambda places: Pipeline.zip(stream(places, range(6)), range(6)),
}


def lambda_of(places: Places) -> Callable[[int], Any]:
    async def keep(key: int) -> bool:
        await later(places, key)
        return True

    return keep


SYNC_CODE: dict[str, Callable[[Places], Loader]] = {
    "generator": lambda places: Pipeline(items(places, range(6))),
    "generator function": lambda places: Pipeline(partial(items, places, range(6))),
    "source function": lambda places: Pipeline(partial(soon, places, range(6))),
    "items": lambda places: Pipeline(Items(places)),
    "stream": lambda places: Pipeline(Stream(places)),
    "sampler": lambda places: Pipeline(list(range(6)), sampler=Sampler(places)),
    "map": lambda places: Pipeline(range(6)).map(partial(soon, places)),
    "map behind an async map": lambda places: (
        Pipeline(range(6)).map(partial(later, Places())).map(partial(soon, places))
    ),
    "map of an async source": lambda places: Pipeline(stream(Places(), range(6))).map(partial(soon, places)),
    "filter": lambda places: Pipeline(range(6)).filter(lambda _: soon(places, True)),
    "filter behind an async map": lambda places: (
        Pipeline(range(6)).map(partial(later, Places())).filter(lambda _: soon(places, True))
    ),
    "flat_map": lambda places: Pipeline(range(6)).flat_map(lambda key: items(places, [key])),
    "flat_map that returns a list": lambda places: Pipeline(range(6)).flat_map(lambda key: soon(places, [key])),
    "collate_fn": lambda places: Pipeline(range(6)).batch(2, collate_fn=partial(soon, places)),
    "collate_fn behind an async map": lambda places: (
        Pipeline(range(6)).map(partial(later, Places())).batch(2, collate_fn=partial(soon, places))
    ),
    "merge": lambda places: Pipeline.merge(items(places, range(3)), items(places, range(3))),
    "mix": lambda places: Pipeline.mix([items(places, range(3)), items(places, range(3))], [0.5, 0.5]),
    "zip": lambda places: Pipeline.zip(items(places, range(6)), range(6)),
    "DataLoader of items": lambda places: DataLoader(Items(places), batch_size=2),
    "DataLoader of items, workers": lambda places: DataLoader(Items(places), batch_size=2, num_workers=2),
    "DataLoader of __getitems__": lambda places: DataLoader(ManyItems(places), batch_size=2),
    "DataLoader of a stream": lambda places: DataLoader(Stream(places), batch_size=2),
    "DataLoader of a stream, workers": lambda places: DataLoader(Stream(places), batch_size=2, num_workers=2),
    "DataLoader with a sampler": lambda places: DataLoader(Items(Places()), batch_size=2, sampler=Sampler(places)),
    "DataLoader with a sampler, workers": lambda places: DataLoader(
        Items(Places()), batch_size=2, sampler=Sampler(places), num_workers=2
    ),
    "DataLoader with a batch_sampler": lambda places: DataLoader(Items(Places()), batch_sampler=BatchSampler(places)),
    "DataLoader with collate_fn": lambda places: DataLoader(
        Items(Places()), batch_size=2, collate_fn=partial(soon, places)
    ),
    "DataLoader with collate_fn, async items": lambda places: DataLoader(
        AsyncItems(Places()), batch_size=2, collate_fn=partial(soon, places)
    ),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("code", sorted(ASYNC_CODE))
async def test_async_code_runs_on_the_callers_loop(code: str) -> None:
    """Under `async for` every async function, source and dataset runs on the loop of the caller."""
    places = Places()
    async for _ in ASYNC_CODE[code](places):
        pass
    assert places.loops == {asyncio.get_running_loop()}


@pytest.mark.parametrize("code", sorted(ASYNC_CODE))
def test_async_code_runs_on_the_private_loop_under_for(code: str) -> None:
    """Under `for` it runs on one loop, in the thread `aioloader-loop`."""
    places = Places()
    for _ in ASYNC_CODE[code](places):
        pass
    assert len(places.loops) == 1
    assert None not in places.loops
    assert {thread.name for thread in places.threads} == {"aioloader-loop"}


@pytest.mark.parametrize("code", sorted(SYNC_CODE))
def test_sync_code_runs_on_no_loop_under_for(code: str) -> None:
    """Under `for` no sync function of the user runs in the thread of the private loop."""
    places = Places()
    for _ in SYNC_CODE[code](places):
        pass
    assert places.seen
    assert places.loops == {None}
    assert "aioloader-loop" not in {thread.name for thread in places.threads}


@pytest.mark.asyncio
@pytest.mark.parametrize("code", sorted(SYNC_CODE))
async def test_sync_code_runs_on_no_loop_under_async_for(code: str) -> None:
    """Under `async for` no sync function of the user runs in the thread of the caller's loop, which goes on turning."""
    places = Places()
    async for _ in SYNC_CODE[code](places):
        pass
    assert places.seen
    assert places.loops == {None}
    assert threading.current_thread() not in places.threads


@on_both_faces
@pytest.mark.parametrize("code", ["generator", "generator function", "stream", "sampler", "DataLoader with a sampler"])
def test_what_is_iterated_stays_in_one_thread(face: Face, code: str) -> None:
    """A sync iterable is read by one thread in one epoch: what it holds may be bound to that (a cursor of sqlite)."""
    places = Places()
    collect(SYNC_CODE[code](places), face)
    assert len(places.threads) == 1


@pytest.mark.asyncio
async def test_a_queue_of_the_callers_loop_works() -> None:
    """A source may wait for what another task of the caller's program puts into an `asyncio.Queue`."""
    queue: asyncio.Queue[int | None] = asyncio.Queue(1)
    semaphore = asyncio.Semaphore(2)

    async def received() -> AsyncIterator[int]:
        while (sample := await queue.get()) is not None:
            yield sample

    async def limited(sample: int) -> int:
        async with semaphore:
            await asyncio.sleep(0)
        return sample

    async def send() -> None:
        for sample in range(20):
            await queue.put(sample)
        await queue.put(None)

    sender = asyncio.create_task(send())
    assert [sample async for sample in Pipeline(received).map(limited, concurrency=4)] == list(range(20))
    await sender


@pytest.mark.asyncio
async def test_for_works_inside_a_running_loop() -> None:
    """A notebook runs its cells inside a loop; `for` does not care."""
    places = Places()
    loader = Pipeline(range(6)).map(partial(later, places)).map(partial(soon, places)).batch(2, collate_fn=list)
    assert list(loader) == [[0, 1], [2, 3], [4, 5]]
    assert asyncio.get_running_loop() not in places.loops


@pytest.mark.asyncio
async def test_dataloader_by_for_works_inside_a_running_loop() -> None:
    """The drop-in too, whether it has workers or not."""
    for num_workers in (0, 2):
        loader = DataLoader(Items(Places()), batch_size=3, num_workers=num_workers)
        assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5]]


def test_dataloader_without_workers_is_inline() -> None:
    """`num_workers=0` reads in the consumer's own thread, as torch's."""
    places = Places()
    for _ in DataLoader(Items(places), batch_size=2):
        pass
    assert places.threads == {threading.current_thread()}


@pytest.mark.asyncio
async def test_the_loop_turns_while_sync_code_runs() -> None:
    """A sync function that blocks does not block the caller's loop: another task sets it free."""
    free = threading.Event()

    def slow(key: int) -> int:
        assert free.wait(30)
        return key

    async def release() -> None:
        free.set()

    loader = Pipeline(range(3)).map(slow, concurrency=1)
    batches = aiter(loader)
    first = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0)
    await asyncio.create_task(release())
    assert await first == 0
    assert [sample async for sample in batches] == [1, 2]


def test_both_faces_of_one_loader() -> None:
    """The same object by `for`, by `async for`, and by `for` again."""
    loader = Pipeline(range(6)).map(partial(later, Places())).batch(2, collate_fn=list)

    async def main() -> list[Any]:
        return [batch async for batch in loader]

    assert list(loader) == run(main) == list(loader) == [[0, 1], [2, 3], [4, 5]]


def test_one_loader_on_loops_one_after_the_other() -> None:
    """Nothing of a loop outlives it: each `asyncio.run` may iterate the same loader."""
    source = RecordingSource(range(4))
    loader = Pipeline(source).map(partial(later, Places()))

    async def main() -> list[Any]:
        return [batch async for batch in loader]

    assert run(main) == run(main) == [0, 1, 2, 3]
    assert len({event.loop for event in source.events}) == 2


@on_both_faces
def test_a_sync_source_is_read_in_a_thread(face: Face) -> None:
    """A plain iterable never holds up a loop."""
    source = SyncRecordingSource(range(6))
    assert collect(Pipeline(source).batch(4, collate_fn=list), face) == [[0, 1, 2, 3], [4, 5]]
    assert {event.loop for event in source.events} == {None}


@on_both_faces
def test_context_variables_of_the_consumer_are_seen(face: Face) -> None:
    """What the consumer set (a request's id, a decimal context) is seen by user functions of both kinds."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    async def fetch(key: int) -> list[str]:
        return [variable.get()]

    def decode(seen: list[str]) -> list[str]:
        return [*seen, variable.get()]

    loader = Pipeline(range(3)).map(fetch).map(decode)
    token = variable.set("set")
    try:
        found = collect(loader, face)
    finally:
        variable.reset(token)
    assert found == [["set", "set"]] * 3


def test_a_client_of_another_loop_is_told() -> None:
    """Under `for` the caller's loop is not the one that awaits: the errors of libraries do not say so, a note does."""

    async def main() -> list[RuntimeError]:
        future = asyncio.get_running_loop().create_future()
        lock = asyncio.Lock()
        await lock.acquire()
        held = asyncio.create_task(lock.acquire())  # who waits binds it to this loop
        await asyncio.sleep(0)

        async def wait(_: int) -> None:
            await future

        async def enter(_: int) -> None:
            await lock.acquire()

        async with ClientSession() as session:

            async def get(_: int) -> None:
                await session.get("http://127.0.0.1:9/")

            loop = asyncio.get_running_loop()

            def error_of(loader: Pipeline) -> RuntimeError:
                idle = threading.Event()  # aiohttp sees that it is on another loop only while no task of its own runs
                loop.call_soon_threadsafe(idle.set)
                idle.wait(DEADLINE)
                return _error_of(loader)

            errors = [await asyncio.to_thread(error_of, Pipeline([0]).map(fn)) for fn in (wait, enter, get)]
        held.cancel()
        return errors

    for error in run(main):
        assert notes(error).count("make it at the first sample") == 1
        assert "`async for`" in notes(error)
    for loader in (Pipeline([0]).map(_fail_plainly), Pipeline([0]).map(_fail_in_a_thread)):
        assert "private event loop" not in notes(_error_of(loader))


@on_both_faces
def test_a_loop_that_is_closed_is_explained_where_it_is_ours(face: Face) -> None:
    """Under `async for` it is the caller's matter."""

    async def fetch(_: int) -> None:
        raise RuntimeError("Event loop is closed")

    with pytest.raises(RuntimeError, match="is closed") as caught:
        collect(Pipeline([0]).map(fetch), face)
    assert ("private event loop" in notes(caught.value)) == (face == "for")


async def _fail_plainly(_: int) -> None:
    raise RuntimeError("no answer")


def _fail_in_a_thread(_: int) -> None:
    raise RuntimeError("Event loop is closed")


def _error_of(loader: Loader) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        collect(loader, "for")
    return caught.value
