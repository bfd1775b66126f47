"""Promise 6: every end of an epoch is an end in bounded time that leaves nothing behind.

That no task, thread, process or open file is left is what `conftest.py` asserts after each of these tests.
"""

import asyncio
import contextlib
import gc
import itertools
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from torch.utils.data import IterableDataset

from aioloader import DataLoader, Pipeline, sample_rng
from aioloader.engine.run import Run
from aioloader.errors import LoaderClosedError
from aioloader.testing import Gate, RecordingSource, SyncRecordingSource
from tests._datasets import AsyncMade, Made, MadeInBulk
from tests._support import (
    DEADLINE,
    Face,
    Started,
    Steps,
    collect,
    join_loader_threads,
    on_both_faces,
    run,
    turns,
    until,
)


async def fetch(key: int) -> int:
    await asyncio.sleep(0)
    return key


def decode(key: int) -> int:
    return key


class BodyError(Exception):
    """Raised by a loop body."""


# -- the ways in which a loop over an endless loader ends


def break_out(loader: Any) -> None:
    for _ in loader:
        break


def raise_in_body(loader: Any) -> None:
    with contextlib.suppress(BodyError):
        for _ in loader:
            raise BodyError


def drop(loader: Any) -> None:
    batches = iter(loader)
    next(batches)
    del batches


def drop_in_a_cycle(loader: Any) -> None:
    holder: list[Any] = [iter(loader)]
    next(holder[0])
    holder.append(holder)
    del holder
    gc.collect()


def close_loader(loader: Any) -> None:
    batches = iter(loader)
    next(batches)
    loader.close()


def close_loader_twice(loader: Any) -> None:
    batches = iter(loader)
    next(batches)
    loader.close()
    loader.close()


def with_block(loader: Any) -> None:
    with loader:
        batches = iter(loader)
        next(batches)


def with_block_and_error(loader: Any) -> None:
    with contextlib.suppress(BodyError), loader:
        for _ in loader:
            raise BodyError


def two_iterators(loader: Any) -> None:
    with loader:
        first, second = iter(loader), iter(loader)
        next(first)
        next(second)


async def async_break_out(loader: Any) -> None:
    async for _ in loader:
        break


async def async_raise_in_body(loader: Any) -> None:
    with contextlib.suppress(BodyError):
        async for _ in loader:
            raise BodyError


async def async_drop(loader: Any) -> None:
    batches = aiter(loader)
    await anext(batches)
    del batches


async def async_drop_in_a_cycle(loader: Any) -> None:
    holder: list[Any] = [aiter(loader)]
    await anext(holder[0])
    holder.append(holder)
    del holder
    gc.collect()


async def async_drop_in_another_thread(loader: Any) -> None:
    """The garbage collector runs in any thread."""
    holder = [aiter(loader)]
    await anext(holder[0])
    Started(holder.clear).outcome()


async def aclose_loader(loader: Any) -> None:
    batches = aiter(loader)
    await anext(batches)
    await loader.aclose()


async def aclose_loader_twice(loader: Any) -> None:
    batches = aiter(loader)
    await anext(batches)
    await loader.aclose()
    await loader.aclose()


async def close_loader_on_its_loop(loader: Any) -> None:
    """`close()` cannot wait for the loop that it stands on; what it began ends all the same."""
    batches = aiter(loader)
    await anext(batches)
    loader.close()
    await turns()


async def async_with_block(loader: Any) -> None:
    async with loader:
        batches = aiter(loader)
        await anext(batches)


async def async_with_block_and_error(loader: Any) -> None:
    with contextlib.suppress(BodyError):
        async with loader:
            async for _ in loader:
                raise BodyError


async def cancelled_body(loader: Any) -> None:
    async def body() -> None:
        async for _ in loader:
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(body())
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task


async def cancelled_scope(loader: Any) -> None:
    with anyio.CancelScope() as scope:
        async for _ in loader:
            scope.cancel()


ENDS: list[Callable[[Any], None]] = [
    break_out,
    raise_in_body,
    drop,
    drop_in_a_cycle,
    close_loader,
    close_loader_twice,
    with_block,
    with_block_and_error,
    two_iterators,
]
ASYNC_ENDS: list[Callable[[Any], Coroutine[Any, Any, None]]] = [
    async_break_out,
    async_raise_in_body,
    async_drop,
    async_drop_in_a_cycle,
    async_drop_in_another_thread,
    aclose_loader,
    aclose_loader_twice,
    close_loader_on_its_loop,
    async_with_block,
    async_with_block_and_error,
    cancelled_body,
    cancelled_scope,
]


def endless(source: Any) -> Any:
    """A loader with a bit of everything."""
    return Pipeline(source).map(fetch, concurrency=4).map(decode, concurrency=2).batch(3, collate_fn=list)


RECORDING: list[Callable[[], RecordingSource[int] | SyncRecordingSource[int]]] = [
    lambda: RecordingSource(itertools.count()),
    lambda: SyncRecordingSource(itertools.count()),
]
either_source = pytest.mark.parametrize("make", RECORDING, ids=["async-source", "sync-source"])


@either_source
@pytest.mark.parametrize("end", ENDS)
def test_every_end_of_for_closes_the_source(end: Callable[[Any], None], make: Any) -> None:
    """The source's `finally` runs, in the task or thread that iterated it; threads end by themselves."""
    source = make()
    end(endless(source))
    join_loader_threads()
    assert source.opened == source.closed == (2 if end is two_iterators else 1)
    opened, closed = source.events[0], [event for event in source.events if event.what == "close"][-1]
    if source.opened == 1:
        assert closed.task is opened.task
        assert closed.thread is opened.thread


@either_source
@pytest.mark.parametrize("end", ASYNC_ENDS)
def test_every_end_of_async_for_closes_the_source(end: Callable[[Any], Coroutine[Any, Any, None]], make: Any) -> None:
    """The source's `finally` runs, in the task or thread that iterated it; tasks and threads end by themselves."""
    source = make()

    async def main() -> None:
        await end(endless(source))
        gc.collect()
        await until(lambda: source.closed > 0)

    run(main)
    assert source.opened == source.closed == 1
    opened, closed = source.events[0], source.events[-1]
    assert closed.what == "close"
    assert closed.task is opened.task
    assert closed.thread is opened.thread
    assert (closed.task is None) == isinstance(source, SyncRecordingSource)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_end_of_a_dataloader_leaves_nothing(end: Callable[[Any], None], num_workers: int) -> None:
    """The drop-in by `for`."""
    end(DataLoader(list(range(1000)), batch_size=4, num_workers=num_workers))
    join_loader_threads()


@pytest.mark.parametrize("end", ASYNC_ENDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_end_of_an_async_dataloader_leaves_nothing(
    end: Callable[[Any], Coroutine[Any, Any, None]], num_workers: int
) -> None:
    """The drop-in by `async for`."""
    run(lambda: end(DataLoader(list(range(1000)), batch_size=4, num_workers=num_workers)))


class Stream(IterableDataset[int]):
    """torch's kind of stream, which sees its end."""

    def __init__(self) -> None:
        self.closed_in: list[threading.Thread] = []
        self.opened_in: list[threading.Thread] = []

    def __iter__(self) -> Iterator[int]:
        self.opened_in.append(threading.current_thread())
        try:
            yield from itertools.count()
        finally:
            self.closed_in.append(threading.current_thread())


@pytest.mark.parametrize("end", [break_out, drop, close_loader, with_block])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataloader_closes_its_stream(end: Callable[[Any], None], num_workers: int) -> None:
    """An `IterableDataset` written as a generator is closed in the thread that iterated it."""
    stream = Stream()
    end(DataLoader(stream, batch_size=4, num_workers=num_workers))
    join_loader_threads()
    assert stream.closed_in == stream.opened_in
    assert len(stream.opened_in) == 1


@on_both_faces
def test_nothing_is_left_at_the_end_of_an_epoch(face: Face) -> None:
    """When the loop over a whole epoch is over, the threads are gone already, and the source is closed."""
    source = RecordingSource(range(20))
    before = set(threading.enumerate())
    batches = []

    async def main() -> None:
        async for batch in endless(source):
            batches.append(batch)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert set(threading.enumerate()) == before

    if face == "async for":
        asyncio.run(main())
    else:
        for batch in endless(source):
            batches.append(batch)
        assert set(threading.enumerate()) == before
    assert list(itertools.chain.from_iterable(batches)) == list(range(20))
    assert source.closed == 1


@on_both_faces
def test_the_end_is_the_end(face: Face) -> None:
    """After StopIteration comes StopIteration, as Python's iterators promise."""
    with Steps(Pipeline(range(3)), face) as steps:
        assert steps.rest() == [0, 1, 2]
        for _ in range(3):
            with pytest.raises(StopIteration):
                steps.next()


# -- user generators


@on_both_faces
def test_a_generator_may_wait_while_it_is_closed(face: Face) -> None:
    """`finally` of an async generator may await: its connection is closed properly."""
    closed: list[str] = []

    async def source() -> AsyncIterator[int]:
        try:
            for key in itertools.count():
                yield key
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            closed.append("yes")

    assert collect(Pipeline(source).map(decode), face, limit=3) == [0, 1, 2]
    join_loader_threads()
    assert closed == ["yes"]


class Held:
    """An async generator that stands in its `finally`, after its last sample, until a test lets it go on."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.gate = Gate()
        self.ends: list[str] = []

    async def __call__(self, key: int = 0) -> AsyncIterator[int]:
        try:
            for sample in range(self._samples):
                yield sample
        finally:
            try:
                await self.gate.passing(key)
            except asyncio.CancelledError:
                self.ends.append("cut short")
                raise
            self.ends.append("closed")


class Generated:
    """An async iterable whose iterator is a generator."""

    def __init__(self, make: Callable[[], AsyncIterator[int]]) -> None:
        self._make = make

    def __aiter__(self) -> AsyncIterator[int]:
        return self._make()


EXHAUSTED: dict[str, Callable[[Held], Any]] = {
    "source": lambda held: Pipeline(held),
    "source, then take": lambda held: Pipeline(held).map(decode).take(4),
    "flat_map": lambda held: Pipeline(range(1)).flat_map(held),
    "zip": lambda held: Pipeline.zip(Pipeline(held), Pipeline(range(1000))).map(lambda pair: pair[0]),
    "DataLoader": lambda held: DataLoader(Generated(held), batch_size=None, num_workers=1),
}


@on_both_faces
@pytest.mark.parametrize("name", EXHAUSTED)
def test_a_generator_that_cleans_up_after_its_last_sample_is_not_cancelled(face: Face, name: str) -> None:
    """It is read ahead, so its `finally` runs when the consumer closes the loader, who has had all there was."""
    held = Held(4)
    loader = EXHAUSTED[name](held)
    with Steps(loader, face) as steps:
        assert [steps.next() for _ in range(4)] == [0, 1, 2, 3]
        steps.until_arrived(held.gate, 1)
        run_of_epoch = steps._iterator._delivery.run
        if face == "for":
            closing = Started(loader.close)
            while not run_of_epoch.stopping:
                threading.Event().wait(0.001)
            held.gate.open_all()
            closing.outcome()
        else:

            async def close() -> None:
                closing = asyncio.create_task(loader.aclose())
                await until(lambda: run_of_epoch.stopping)
                held.gate.open_all()
                await closing

            steps.do(close)
    assert held.ends == ["closed"]


@on_both_faces
def test_a_generator_that_waits_for_ever_is_cancelled(face: Face) -> None:
    """When it has had its moment, counted from when it was asked: so an idle one ends at once."""
    gate = Gate()
    ends: list[BaseException] = []

    async def source() -> AsyncIterator[int]:
        yield 0
        try:
            await gate.passing(1)
        except asyncio.CancelledError as error:
            ends.append(error)
            raise

    with Steps(Pipeline(source), face) as steps:
        assert steps.next() == 0
        steps.until_arrived(gate, 1)
    join_loader_threads()
    assert len(ends) == 1


@on_both_faces
def test_a_generator_may_hold_a_cancel_scope(face: Face) -> None:
    """anyio insists that a scope is left by the task that entered it; so do asyncio's timeouts."""
    left: list[str] = []

    async def source() -> AsyncIterator[int]:
        with anyio.CancelScope():
            async with asyncio.timeout(1000):
                for key in itertools.count():
                    yield key
                    await asyncio.sleep(0)
        left.append("normally")

    async def parts(key: int) -> AsyncIterator[int]:
        with anyio.CancelScope():
            yield key
            yield key

    assert collect(Pipeline(source).flat_map(parts).map(fetch, concurrency=2), face, limit=3) == [0, 0, 1]
    join_loader_threads()
    assert left == []  # it was closed, not exhausted


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_generators_of_flat_map_are_closed(face: Face, asynchronous: bool) -> None:
    """Each in the thread or task that iterated it; those that were exhausted have closed themselves."""
    events: list[tuple[str, int, threading.Thread]] = []

    def parts(key: int) -> Iterator[int]:
        events.append(("open", key, threading.current_thread()))
        try:
            yield key
            yield key
            yield key
        finally:
            events.append(("close", key, threading.current_thread()))

    async def async_parts(key: int) -> AsyncIterator[int]:
        events.append(("open", key, threading.current_thread()))
        try:
            yield key
            yield key
            yield key
        finally:
            events.append(("close", key, threading.current_thread()))

    loader = Pipeline(range(1000)).flat_map(async_parts if asynchronous else parts)
    assert collect(loader, face, limit=5) == [0, 0, 0, 1, 1]
    join_loader_threads()
    opened = {(key, thread) for what, key, thread in events if what == "open"}
    closed = {(key, thread) for what, key, thread in events if what == "close"}
    assert opened == closed


@on_both_faces
def test_take_closes_the_source_before_the_epoch_is_over(face: Face) -> None:
    """`take` has enough: what is upstream ends too."""
    source = RecordingSource(itertools.count())
    assert collect(Pipeline(source).map(fetch, concurrency=4).take(3), face) == [0, 1, 2]
    join_loader_threads()
    assert source.closed == 1


@on_both_faces
@pytest.mark.parametrize("combine", [Pipeline.zip, Pipeline.merge])
def test_every_source_of_several_is_closed(face: Face, combine: Any) -> None:
    """`zip` ends with the shortest and closes the longer; dropped half-way all are closed."""
    sources = [RecordingSource(range(3)), RecordingSource(itertools.count())]
    limit = 2 if combine == Pipeline.merge else None
    collect(combine(*sources), face, limit=limit)
    join_loader_threads()
    assert [source.closed for source in sources] == [1, 1]


@on_both_faces
def test_a_cancelled_sample_sees_its_cancellation(face: Face) -> None:
    """Async functions that are under way at the end are cancelled, and may clean up after themselves."""
    gate = Gate()
    cleaned: list[int] = []

    async def slow(key: int) -> int:
        if key == 0:
            return key
        try:
            await gate.passing(key)
        finally:
            await asyncio.sleep(0)
            cleaned.append(key)
        return key

    with Steps(Pipeline(range(100)).map(slow, concurrency=4), face) as steps:
        assert steps.next() == 0
        steps.until_arrived(gate, 4)
    join_loader_threads()
    assert set(cleaned) == set(gate.arrived)
    assert len(cleaned) == len(gate.arrived)


# -- close while somebody waits


def test_close_does_not_miss_an_epoch_that_another_thread_is_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run is there before the iterator knows of it: nobody would end it, and `next()` would wait for ever."""
    source = RecordingSource(range(4), gate=Gate())
    iterator: Any = iter(Pipeline(source))
    closing: list[Started] = []
    begin = Run.attach

    def attach(run: Run, loop: asyncio.AbstractEventLoop) -> None:
        begin(run, loop)
        closing.append(Started(iterator.close))
        while not iterator._closed:
            threading.Event().wait(0.001)
        closing[0].join(0.05)  # without the lock it is over by now

    monkeypatch.setattr(Run, "attach", attach)
    asking = Started(lambda: next(iterator))
    with pytest.raises(LoaderClosedError):
        asking.outcome()
    closing[0].outcome()


def test_close_wakes_a_thread_that_waits_for_a_batch() -> None:
    """Its `next()` raises: an epoch that somebody else cut short is not a finished one."""
    gate = Gate()
    loader = Pipeline(RecordingSource(range(3), gate=gate)).map(decode)
    batches = iter(loader)
    waiting = Started(lambda: next(batches))
    gate.wait_arrived(1)
    loader.close()
    with pytest.raises(LoaderClosedError):
        waiting.outcome()


def test_close_waits_for_a_sync_sample_that_is_under_way() -> None:
    """A thread cannot be cancelled; `close()` returns when its function has."""
    gate = Gate()

    def slow(key: int) -> int:
        gate.pass_sync(key)
        return key

    loader = Pipeline(range(10)).map(slow, concurrency=2)
    batches = iter(loader)
    waiting = Started(lambda: next(batches))
    gate.wait_arrived(2)
    closing = Started(loader.close)
    gate.open_all()
    closing.outcome()
    with pytest.raises(LoaderClosedError):
        waiting.outcome()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("aioloader")]


@pytest.mark.asyncio
async def test_aclose_wakes_a_task_that_waits_for_a_batch() -> None:
    """The same by `async for`."""
    gate = Gate()
    loader = Pipeline(RecordingSource(range(3), gate=gate)).map(decode)
    batches = aiter(loader)

    async def wait() -> Any:
        return await anext(batches)

    waiting = asyncio.create_task(wait())
    await gate.until_arrived(1)
    await loader.aclose()
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(LoaderClosedError):
            await waiting


@pytest.mark.asyncio
async def test_close_from_another_thread_ends_an_async_epoch() -> None:
    """`close()` does not need to be called on the loop."""
    gate = Gate()
    loader = Pipeline(RecordingSource(range(3), gate=gate)).map(decode)
    batches = aiter(loader)

    async def wait() -> Any:
        return await anext(batches)

    waiting = asyncio.create_task(wait())
    await gate.until_arrived(1)
    closing = Started(loader.close)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(LoaderClosedError):
            await waiting
    await until(lambda: not closing.is_alive())
    closing.outcome()


@on_both_faces
def test_an_epoch_that_was_cut_short_does_not_look_finished(face: Face) -> None:
    """The loader is closed while the consumer is in its loop body: the next `next()` says so, it does not just end."""
    loader: Any = Pipeline(range(1000)).batch(2, collate_fn=list)
    with Steps(loader, face) as steps:
        steps.next()
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)
        with pytest.raises(LoaderClosedError):
            steps.rest()


def test_close_before_anything_began() -> None:
    """Nothing to close is no error, by any name, any number of times."""
    loader = Pipeline(range(3))
    loader.close()
    loader.close()
    with loader:
        pass

    async def main() -> None:
        await loader.aclose()
        async with loader:
            pass

    run(main)


@on_both_faces
def test_a_closed_loader_may_be_iterated_again(face: Face) -> None:
    """`close()` ends what is alive; a new `iter()` is a new epoch, as after a `with` block."""
    loader: Any = Pipeline(range(4)).map(decode)
    with loader:
        assert collect(loader, face) == [0, 1, 2, 3]
        assert collect(loader, face) == [0, 1, 2, 3]
    assert collect(loader, face) == [0, 1, 2, 3]
    join_loader_threads()


@pytest.mark.asyncio
async def test_waiting_sets_no_timer() -> None:
    """Nothing polls: a loader that waits has nothing scheduled on the caller's loop."""
    gate = Gate()
    loop: Any = asyncio.get_running_loop()
    batches = aiter(Pipeline(RecordingSource(range(3), gate=gate)).map(fetch).map(decode).batch(2))

    async def wait() -> Any:
        return await anext(batches)

    waiting = asyncio.create_task(wait())
    while not gate.arrived:  # noqa: ASYNC110 - `until_arrived` would set a timer of its own
        await asyncio.sleep(0)
    await turns()
    ours = [timer for timer in loop._scheduled if not timer.cancelled()]
    assert len(ours) == 1  # the deadline of the gate itself
    gate.open_all()
    assert (await waiting).tolist() == [0, 1]


# -- errors


def bad(key: int) -> int:
    if key % 10 == 9:
        raise ValueError(key)
    return key


def is_natural(key: int) -> bool:
    return key >= 0


async def bad_async(key: int) -> int:
    return bad(key)


async def bad_later(key: int) -> int:
    await asyncio.sleep(0)
    return bad(key)


def bad_samples(samples: list[int]) -> list[int]:
    return [bad(sample) for sample in samples]


def bad_with_numbers(key: int) -> int:
    sample_rng()
    return bad(key)


def bad_source() -> Iterator[int]:
    return map(bad, itertools.count())


async def bad_async_source() -> AsyncIterator[int]:
    for key in itertools.count():
        yield bad(key)


def bad_items(key: int) -> Iterator[int]:
    return map(bad, range(3 * key, 3 * key + 3))


class BadStream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return bad_source()


def with_a_cache_that_is_a_file() -> Pipeline:
    """Something else takes the place of its directory before it is opened."""
    place = Path(tempfile.mkdtemp()) / "cache"
    loader = Pipeline(range(1000)).cache(disk=place).batch(4)
    place.touch()
    return loader


FAILING: dict[str, Callable[[], Any]] = {
    "map": lambda: Pipeline(range(1000)).map(bad),
    "map, batch": lambda: Pipeline(range(1000)).map(bad).batch(4),
    "map, filter, batch": lambda: Pipeline(range(1000)).map(bad_with_numbers).filter(is_natural).batch(4),
    "async map, batch": lambda: Pipeline(range(1000)).map(bad_async).batch(4),
    "async map, the last sample": lambda: Pipeline(range(10)).map(bad_later, concurrency=4).batch(4),
    "collate": lambda: Pipeline(range(1000)).batch(2, collate_fn=bad_samples).batch(2, collate_fn=list),
    "unbatch": lambda: Pipeline(range(1000)).batch(2, collate_fn=bad_samples).unbatch().batch(3),
    "source": lambda: Pipeline(bad_source).batch(4),
    "async source": lambda: Pipeline(bad_async_source).batch(4),
    "flat_map": lambda: Pipeline(range(1000)).flat_map(bad_items).batch(4),
    "zip": lambda: Pipeline.zip(Pipeline(range(1000)).map(bad), Pipeline(range(1000))).batch(4),
    "cache": lambda: Pipeline(range(1000)).map(bad).cache(memory_bytes=1000).batch(4),
    "a cache that cannot be opened": with_a_cache_that_is_a_file,
    "DataLoader": lambda: DataLoader(Made(1000, bad), batch_size=4, num_workers=2),
    "DataLoader, many at once": lambda: DataLoader(MadeInBulk(1000, bad), batch_size=4, num_workers=2),
    "DataLoader, async": lambda: DataLoader(AsyncMade(1000, bad), batch_size=4),
    "DataLoader, stream": lambda: DataLoader(BadStream(), batch_size=4, num_workers=2),
    "DataLoader without workers": lambda: DataLoader(BadStream(), batch_size=4),
}


@on_both_faces
@pytest.mark.parametrize("name", FAILING)
def test_a_loop_that_ends_by_an_error_ends_its_epoch_without_the_garbage_collector(face: Face, name: str) -> None:
    """An error keeps the frame of the loop that caught it, and with it the iterator: nothing may keep the error."""
    gc.collect()
    gc.disable()
    try:
        if face == "for":

            def consume() -> Any:
                batches = iter(FAILING[name]())
                with contextlib.suppress(ValueError, OSError):
                    for _ in batches:
                        pass
                return weakref.ref(batches)

            batches = consume()
            for thread in threading.enumerate():
                if thread.name.startswith("aioloader"):
                    thread.join(DEADLINE)
                    assert not thread.is_alive()
            assert batches() is None
        else:

            async def consume_async() -> Any:
                batches = aiter(FAILING[name]())
                with contextlib.suppress(ValueError, OSError):
                    async for _ in batches:
                        pass
                return weakref.ref(batches)

            async def main() -> None:
                batches = await consume_async()
                await until(lambda: batches() is None)
                await until(lambda: len(asyncio.all_tasks()) == 1)

            run(main)
    finally:
        gc.enable()
