"""Corners of the engine in which something once went wrong."""

import asyncio
import contextvars
import dataclasses
import functools
import gc
import random
import threading
import types
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from aioloader import Pipeline, SampleCancelledError
from aioloader.core.checks import is_async_callable
from aioloader.engine.reading import ThreadReader
from aioloader.engine.stream_source import StreamSource
from aioloader.engine.sync_cursor import SyncCursor
from aioloader.testing import Gate
from tests._support import DEADLINE, FACES, Face, Started, Steps, collect, on_both_faces, run, turns


class Sample:
    """Something that can be referred to weakly."""


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_source_that_fails_when_all_else_is_done_ends_an_unordered_window(face: Face, asynchronous: bool) -> None:
    """Nobody's completion says so: the failure itself must."""
    delivered = Gate()

    def source() -> Iterator[int]:
        yield 1
        delivered.pass_sync("the first sample is with the consumer")
        raise OSError("the disk is gone")

    async def fetch(key: int) -> int:
        return key

    def decode(key: int) -> int:
        return key

    loader = Pipeline(source).map(fetch if asynchronous else decode, ordered=False)
    with Steps(loader, face) as steps:
        assert steps.next() == 1
        delivered.open_all()
        assert [type(one) for one in steps.outcomes()] == [OSError]


@on_both_faces
def test_take_that_is_full_begins_nothing_more(face: Face) -> None:
    """Samples that come late out of an earlier stage go to no thread of a window that is closed."""
    gate = Gate()
    decoded: list[int] = []

    async def fetch(key: int) -> int:
        if key > 1:
            await gate.passing(key)
        return key

    def decode(key: int) -> int:
        decoded.append(key)
        return key

    def hold(key: int) -> Iterator[int]:  # the epoch goes on after the two samples are through
        yield key
        if key == 1:
            gate.open_all()
            yield key

    loader = Pipeline(lambda: iter(range(100))).map(fetch, concurrency=8).map(decode).take(2).flat_map(hold)
    assert collect(loader, face) == [0, 1, 1]
    assert set(decoded) == {0, 1}


@pytest.mark.parametrize("how", ["take", "aclose"])
def test_an_async_source_is_cancelled_once(how: str) -> None:
    """Its `finally` may await: a second cancellation would cut that short."""
    said: list[str] = []

    async def source() -> AsyncIterator[int]:
        try:
            for key in range(1000):
                yield key
        finally:
            said.append("begins to clean up")
            await turns()
            said.append("is clean")

    async def main() -> None:
        if how == "take":
            async for _ in Pipeline(source).take(3):
                pass
        else:
            batches: Any = aiter(Pipeline(source))
            await anext(batches)
            await batches.aclose()

    run(main)
    assert said == ["begins to clean up", "is clean"]


def test_a_shuffle_buffer_lets_go_of_what_it_gave() -> None:
    """Also while one old sample still waits in it: not the samples, only the order of arrivals is kept."""
    alive: weakref.WeakSet[Sample] = weakref.WeakSet()
    most = 0

    def source() -> Iterator[Sample]:
        nonlocal most
        for _ in range(3000):
            sample = Sample()
            alive.add(sample)
            most = max(most, len(alive))
            yield sample

    for _ in Pipeline(source).shuffle(50):
        pass
    assert most < 50 + 1000  # buffer, window and what is read ahead; all of them would be 3000


def test_without_prefetch_each_waiting_thread_gets_its_batch() -> None:
    """Several threads may share an iterator; each asks for one."""
    batches = iter(Pipeline(range(10)).batch(1, collate_fn=list).prefetch(0))
    assert next(batches) == [0]
    threads = [Started(lambda: next(batches)) for _ in range(4)]
    assert sorted(thread.outcome() for thread in threads) == [[1], [2], [3], [4]]
    batches.close()


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_caught_error_keeps_no_samples_alive(face: Face, asynchronous: bool) -> None:
    """No cycle of an exception, its traceback and our frames: samples die when the consumer drops them."""
    refs: list[weakref.ref[Sample]] = []

    def decode(key: int) -> Sample:
        if key == 5:
            raise ValueError(key)
        sample = Sample()
        refs.append(weakref.ref(sample))
        return sample

    async def fetch(key: int) -> Sample:
        return decode(key)

    loader = Pipeline(range(50)).map(fetch if asynchronous else decode, concurrency=2)

    async def consume() -> int:
        errors, batches = 0, aiter(loader)
        while True:
            try:
                await anext(batches)
            except ValueError:
                errors += 1
            except StopAsyncIteration:
                return errors

    def consume_in_thread() -> int:
        errors, batches = 0, iter(loader)
        while True:
            try:
                next(batches)
            except ValueError:
                errors += 1
            except StopIteration:
                return errors

    gc.collect()
    gc.disable()
    try:
        errors = consume_in_thread() if face == "for" else run(consume)
        assert errors == 1
        assert sum(ref() is not None for ref in refs) == 0
    finally:
        gc.enable()


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Takes no attributes, and so no notes."""

    code: int


@on_both_faces
def test_an_error_that_takes_no_note_is_raised_as_it_is(face: Face) -> None:
    """Python cannot even give it a traceback; that is not made worse by a note."""
    error = FrozenError(7)

    async def fetch(key: int) -> int:
        if key == 1:
            raise error
        return key

    with Steps(Pipeline(range(3)).map(fetch), face) as steps:
        found = steps.outcomes()
    assert [found[0], found[2]] == [0, 2]
    assert isinstance(found[1], FrozenError | dataclasses.FrozenInstanceError)


def test_closing_while_epochs_begin_hangs_nobody() -> None:
    """One thread opens epochs in a `with` block, another closes the loader again and again."""
    loader = Pipeline(range(5))
    over = threading.Event()

    def consume() -> int:
        epochs = 0
        with loader:
            for _ in range(200):
                try:
                    list(loader)
                except RuntimeError:  # LoaderClosedError, or the loop was gone already
                    continue
                epochs += 1
        over.set()
        return epochs

    def close() -> None:
        while not over.is_set():
            loader.close()

    closing, consuming = Started(close), Started(consume)
    consuming.outcome()
    closing.outcome()


@pytest.mark.asyncio
async def test_all_waiters_hear_of_the_end() -> None:
    """However many tasks wait on one iterator when the epoch ends, each is told."""
    gate = Gate()

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    batches = aiter(Pipeline(range(2)).map(fetch))

    async def take() -> Any:
        return await anext(batches, "the end")

    tasks = [asyncio.create_task(take()) for _ in range(6)]
    await gate.until_arrived(2)
    gate.open_all()
    found = await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE)
    assert sorted(map(str, found)) == ["0", "1", *["the end"] * 4]


@on_both_faces
def test_zip_raises_what_its_first_source_raises(face: Face) -> None:
    """As Python's: the first source is asked before the second one's end is seen."""

    def fails() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    with Steps(Pipeline.zip(fails, [10, 20]), face) as steps:
        found = steps.outcomes()
    assert found[:2] == [(1, 10), (2, 20)]
    assert [type(one) for one in found[2:]] == [OSError]
    assert collect(Pipeline.zip([10, 20], fails), face) == [(10, 1), (20, 2)]


@on_both_faces
def test_a_burst_does_not_wait_for_the_sample_after_it(face: Face) -> None:
    """Samples of a sync stream that are there go on, however long the next one takes."""
    gate = Gate()

    def bursts() -> Iterator[int]:
        yield from range(3)
        gate.pass_sync("an hour later")
        yield 3

    with Steps(Pipeline(bursts).prefetch(10), face) as steps:
        assert [steps.next() for _ in range(3)] == [0, 1, 2]
        gate.open_all()
        assert steps.rest() == [3]


def test_requests_go_out_in_doubling_crowds() -> None:
    """256 requests are under way after some ten turns of the loop, not one more with each turn."""
    began: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        turn = 0
        everyone = loop.create_future()

        def count() -> None:
            nonlocal turn
            turn += 1
            if not everyone.done():
                loop.call_soon(count)

        async def fetch(key: int) -> int:
            began.append(turn)
            if len(began) == 256:
                everyone.set_result(None)
            await everyone
            return key

        count()
        assert [key async for key in Pipeline(range(256)).map(fetch, concurrency=256)] == list(range(256))

    run(main)
    assert began[-1] - began[0] <= 16


def test_what_never_suspends_lets_the_loop_turn() -> None:
    """A predicate that refuses an endless stream does not keep other tasks from running."""

    async def refuse(key: int) -> bool:
        return False

    async def main() -> None:
        batches = aiter(Pipeline(range(1 << 40)).filter(refuse))
        waiting = asyncio.ensure_future(anext(batches))
        for _ in range(100):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await batches.aclose()

    run(main)


def test_a_thread_that_begins_late_gives_its_first_sample_at_once() -> None:
    """Not with the next one, which may come in an hour: nobody looked while there was nothing."""
    begins, never = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        never.wait(DEADLINE)
        yield 2

    cursor = SyncCursor(source(), "source")

    class Late:
        """Runs one hop in a thread, which begins when it is let."""

        def submit(self, _: Any, read: Any, limit: int) -> "asyncio.Future[None]":
            loop = asyncio.get_running_loop()
            done: asyncio.Future[None] = loop.create_future()

            def hop() -> None:
                begins.wait(DEADLINE)
                read(limit)
                loop.call_soon_threadsafe(done.set_result, None)

            self.thread = threading.Thread(target=hop)
            self.thread.start()
            return done

    async def main() -> list[Any]:
        late: Any = Late()
        reading = asyncio.create_task(ThreadReader(cursor, late, None).read(8))  # type: ignore[arg-type]
        while not cursor.hurried:  # noqa: ASYNC110  # nobody tells that the time of the hop is over
            await asyncio.sleep(0)
        begins.set()
        try:
            return await reading
        finally:
            never.set()
            await asyncio.to_thread(late.thread.join)

    assert run(main) == [(1, 1)]


@on_both_faces
@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("held", [1, 5, 6])
def test_what_is_finished_without_waiting_is_delivered_while_the_next_sample_waits(
    face: Face, concurrency: int, held: int
) -> None:
    """A worker tells the window of many samples together; one that waits must not keep those before it."""
    gate = Gate()

    async def fetch(key: int) -> int:
        if key >= held:
            await gate.passing(key)
        return key

    with Steps(Pipeline(range(8)).map(fetch, concurrency=concurrency), face) as steps:
        assert [steps.next() for _ in range(held)] == list(range(held))
        gate.open_all()
        assert steps.rest() == list(range(held, 8))


@pytest.mark.parametrize("seed", range(60))
def test_samples_that_wait_fail_or_soil_the_context_among_such_that_do_not(seed: int) -> None:
    """Whatever ends a worker's run of samples that do not wait, each sample is told of once."""
    chance = random.Random(seed)
    weights = {"at once": 20, "waits": chance.choice([1, 5]), "fails": 1, "soils": 1, "cancels itself": 1}
    kinds = chance.choices([*weights], [*weights.values()], k=80)
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def fetch(key: int) -> int:
        kind = kinds[key]
        if kind == "waits":
            for _ in range(key % 4 + 1):
                await asyncio.sleep(0)
        elif kind == "fails":
            raise OSError(key)
        elif kind == "soils":
            variable.set(key)
        elif kind == "cancels itself":
            raise asyncio.CancelledError
        return key

    concurrency = chance.choice([1, 2, 7, 64])
    loader = Pipeline(range(80)).map(fetch, concurrency=concurrency, ahead=chance.choice([None, 64, 200]))
    if filtered := chance.random() < 0.5:
        loader = loader.filter(lambda key: key % 5 != 0)
    with Steps(loader, chance.choice(FACES)) as steps:
        outcomes = steps.outcomes()
    errors = {"fails": OSError, "cancels itself": SampleCancelledError}
    expected = [errors.get(kind, key) for key, kind in enumerate(kinds) if kind in errors or not filtered or key % 5]
    assert [type(one) if isinstance(one, Exception) else one for one in outcomes] == expected
    assert loader.stats().stages[1].samples == 80


async def awaited(key: int) -> int:
    return key


async def yielding(key: int) -> AsyncIterator[int]:
    yield key


def with_an_attribute(fn: Any) -> Any:
    """A function of its own, that somebody has marked."""
    fn = types.FunctionType(fn.__code__, fn.__globals__)
    fn.marked = True
    return fn


class Calls:
    def sync(self, key: int) -> int:
        return key

    async def awaited(self, key: int) -> int:
        return key

    async def __call__(self, key: int) -> int:
        return key


@pytest.mark.parametrize(
    ("fn", "is_async"),
    [
        (awaited, True),
        (yielding, True),
        (with_an_attribute(awaited), True),
        (functools.wraps(awaited)(lambda key: key), False),
        (functools.partial(awaited), True),
        (functools.partial(Calls().awaited), True),
        (Calls().awaited, True),
        (Calls().sync, False),
        (Calls(), True),
        (Calls, False),
        (with_an_attribute(collect), False),
        (collect, False),
        (abs, False),
        ([].append, False),
    ],
)
def test_what_is_awaited_when_it_is_called(fn: Any, is_async: bool) -> None:
    assert is_async_callable(fn) is is_async


@pytest.mark.parametrize(("read", "wanted"), [(0, 1), (1, 2), (5, 6), (7, 8), (40, 9)])
def test_a_source_reads_as_much_ahead_as_it_has_read(read: int, wanted: int) -> None:
    """Up to its bound, of 8 here; nothing beside the first sample, which somebody waits for."""
    source = StreamSource(range(100), call=False, name="source", ahead=8)
    source._position = read
    assert source.poll(1) == []
    assert source._wanted == wanted
