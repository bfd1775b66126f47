"""Promise 5: a cancelled or timed-out `__anext__` loses no batch, and no error."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from aioloader import DataLoader, Pipeline
from aioloader.testing import Gate, RecordingSource, virtual_order
from tests._support import DEADLINE, Loader, run, turns


class BrokenSampleError(Exception):
    pass


ERROR = BrokenSampleError()


def fetch(key: int) -> int:
    if key == 8:
        raise ERROR
    return key


async def stream() -> AsyncIterator[int]:
    for key in range(20):
        await asyncio.sleep(0)
        yield key


def map_of(seed: int) -> tuple[Loader, list[Any]]:
    """Samples, one of which fails."""
    loader = Pipeline(range(20)).map(virtual_order(seed)(fetch), concurrency=4)
    return loader, [*range(8), ERROR, *range(9, 20)]


def unordered(seed: int) -> tuple[Loader, list[Any]]:
    """A single journey at once, so that the order is known."""
    loader = Pipeline(stream).map(virtual_order(seed)(fetch), concurrency=1, ordered=False)
    return loader, [*range(8), ERROR, *range(9, 20)]


def folds(seed: int) -> tuple[Loader, list[Any]]:
    """An async source and every stage that runs on the loop."""
    order = virtual_order(seed)
    loader = (
        Pipeline(stream)
        .filter(order(lambda key: key % 2 == 0))
        .flat_map(lambda key: twice(key))
        .map(order(fetch), concurrency=3)
        .enumerate()
        .skip(1)
    )
    samples = [key for key in range(0, 20, 2) for _ in range(2)]
    return loader, [ERROR if key == 8 else (n, key) for n, key in enumerate(samples)][1:]


async def twice(key: int) -> AsyncIterator[int]:
    yield key
    await asyncio.sleep(0)
    yield key


def batches(seed: int) -> tuple[Loader, list[Any]]:
    """Collated in threads."""
    loader = Pipeline(range(20)).map(virtual_order(seed)(fetch), concurrency=4).batch(3, collate_fn=list)
    return loader, [[0, 1, 2], [3, 4, 5], ERROR, [9, 10, 11], [12, 13, 14], [15, 16, 17], [18, 19]]


def failing_source(seed: int) -> tuple[Loader, list[Any]]:
    """The source fails at the end."""

    async def failing() -> AsyncIterator[int]:
        async for key in stream():
            yield key
        raise ERROR

    return Pipeline(failing).map(virtual_order(seed)(lambda key: key), concurrency=3), [*range(20), ERROR]


KINDS: list[Callable[[int], tuple[Loader, list[Any]]]] = [map_of, unordered, folds, batches, failing_source]


async def outcome(batches: AsyncIterator[Any]) -> Any:
    """The next batch, or the error in its place."""
    try:
        return await batches.__anext__()
    except BrokenSampleError as error:
        return error


@pytest.mark.parametrize("kind", KINDS)
def test_cancelling_at_any_moment_loses_nothing(kind: Callable[[int], tuple[Loader, list[Any]]]) -> None:
    """Hundreds of seeded runs, whose every `anext` is cancelled after some turns of the loop."""

    async def one(seed: int) -> None:
        chance = random.Random(seed)
        loader, expected = kind(seed)
        found: list[Any] = []
        cancelled = 0
        batches = aiter(loader)
        while True:
            step = asyncio.ensure_future(outcome(batches))
            for _ in range(chance.randrange(14)):
                await asyncio.sleep(0)
            step.cancel()
            try:
                found.append(await step)
            except asyncio.CancelledError:
                cancelled += 1
            except StopAsyncIteration:
                break
        assert found == expected
        assert cancelled > 0
        with pytest.raises(StopAsyncIteration):
            await anext(batches)

    async def main() -> None:
        for seed in range(60 if kind is batches else 300):
            await one(seed)

    run(main)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_cancel_scopes_lose_nothing(kind: Callable[[int], tuple[Loader, list[Any]]]) -> None:
    """anyio cancels again and again until the scope is left; what came is in the list or still to come."""
    loader, expected = kind(1)
    found: list[Any] = []
    batches = aiter(loader)
    ended = False
    while not ended:
        for patience in (0, 0.0001):
            with anyio.move_on_after(patience):
                try:
                    found.append(await outcome(batches))
                except StopAsyncIteration:
                    ended = True
        await turns(7)
    assert found == expected


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
async def test_timeouts_lose_nothing(kind: Callable[[int], tuple[Loader, list[Any]]]) -> None:
    """`asyncio.wait_for` with no patience at all, again and again."""
    loader, expected = kind(2)
    found: list[Any] = []
    batches = aiter(loader)
    while True:
        try:
            found.append(await asyncio.wait_for(outcome(batches), 0.0001))
        except TimeoutError:
            continue
        except StopAsyncIteration:
            break
    assert found == expected


@pytest.mark.asyncio
async def test_the_source_does_not_notice() -> None:
    """Cancelling the consumer's wait does not cancel what the source waits for."""
    gate = Gate()
    source = RecordingSource(range(3), gate=gate)
    batches = aiter(Pipeline(source))
    for _ in range(3):
        step = asyncio.ensure_future(outcome(batches))
        await gate.until_arrived(1)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
    assert source.closed == 0
    gate.open_all()
    assert [sample async for sample in batches] == [0, 1, 2]
    assert source.opened == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", range(40))
async def test_a_cancelled_waiter_passes_its_batch_on(moment: int) -> None:
    """Two tasks wait for the one batch that comes; the first is cancelled around that moment."""
    gate = Gate()

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    batches = aiter(Pipeline(range(3)).map(fetch))
    first, second = asyncio.ensure_future(outcome(batches)), asyncio.ensure_future(outcome(batches))
    await gate.until_arrived(3)
    gate.open(0)
    for _ in range(moment):
        await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(DEADLINE):
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        if first.cancelled():  # only one is left to take it
            assert await second == 0
        gate.open_all()
        await asyncio.wait([first, second])
        rest = [sample async for sample in batches]

    found = [step.result() for step in (first, second) if not step.cancelled()]
    assert sorted(found + rest) == [0, 1, 2]


@pytest.mark.asyncio
async def test_a_consumer_that_is_cancelled_leaves_the_loader_to_the_next() -> None:
    """A task is cancelled in the middle of its loop; another goes on with the same iterator."""
    found: list[int] = []
    gate = Gate()
    gate.open(*range(5))

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    batches = aiter(Pipeline(range(10)).map(fetch, concurrency=2))

    async def consume() -> None:
        async for sample in batches:
            found.append(sample)

    consumer = asyncio.create_task(consume())
    await gate.until_arrived(6)
    await turns()
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    gate.open_all()
    await consume()
    assert found == list(range(10))


@pytest.mark.asyncio
@pytest.mark.parametrize("num_workers", [0, 2])
async def test_dataloader_loses_nothing(num_workers: int) -> None:
    """The drop-in, whose samples are read in threads, with and without workers."""
    for seed in range(30):
        chance = random.Random(seed)
        batches = aiter(DataLoader(list(range(40)), batch_size=3, num_workers=num_workers))
        found: list[int] = []
        while True:
            step = asyncio.ensure_future(outcome(batches))
            for _ in range(chance.randrange(30)):
                await asyncio.sleep(0)
            step.cancel()
            try:
                found.extend((await step).tolist())
            except asyncio.CancelledError:
                continue
            except StopAsyncIteration:
                break
        assert found == list(range(40))


@pytest.mark.asyncio
@pytest.mark.parametrize("victim", [0, 1])
async def test_a_wake_up_that_meets_a_cancelled_waiter_is_passed_on(victim: int) -> None:
    """Two tasks wait; one of them is cancelled, perhaps the one just woken; the other gets the batch."""
    never = asyncio.Event()
    both_wait = asyncio.Event()
    waiting: list[asyncio.Task[int]] = []

    async def fetch(key: int) -> int:
        if key == 0:
            await both_wait.wait()
        else:  # runs in the turn in which key 0 was finished and its waiter woken, before that waiter could run
            waiting[victim].cancel()
            await never.wait()
        return key

    batches = aiter(Pipeline(range(2)).map(fetch, concurrency=1))

    async def take() -> int:
        sample: int = await anext(batches)
        return sample

    waiting += [asyncio.create_task(take()), asyncio.create_task(take())]
    await turns()
    both_wait.set()
    done, _ = await asyncio.wait(waiting, timeout=DEADLINE)

    assert done == set(waiting)
    assert waiting[victim].cancelled()
    assert waiting[1 - victim].result() == 0
    await batches.aclose()


async def in_turn(seed: int, describe: Callable[[Any], Any], n: int) -> None:
    """Tasks that ask one iterator, now and then, and some of which are cancelled, until `n` samples are there."""
    chance = random.Random(seed)
    batches = aiter(describe(virtual_order(seed)))
    calls: list[asyncio.Task[int]] = []  # in the order in which they began

    async def ask() -> int:
        me = asyncio.current_task()
        assert me is not None
        calls.append(me)
        sample: int = await anext(batches)
        return sample

    while sum(task.done() and not task.cancelled() and task.exception() is None for task in calls) < n:
        for _ in range(chance.randrange(4)):
            asyncio.ensure_future(ask())  # noqa: RUF006 - it is in `calls` soon
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        if calls and chance.random() < 0.5:
            chance.choice(calls).cancel()
    await turns(2)  # all have begun
    await asyncio.wait(calls)
    given = [task for task in calls if not task.cancelled() and task.exception() is None]
    assert [task.result() for task in given] == list(range(n)), f"{seed=}"
    ends = [task.exception() for task in calls if not task.cancelled() and task not in given]
    assert all(isinstance(end, StopAsyncIteration) for end in ends)
    await batches.aclose()


@pytest.mark.parametrize(
    "describe",
    [
        lambda order: Pipeline(range(12)).map(order(lambda key: key), concurrency=3),
        lambda order: Pipeline(range(12)).map(order(lambda key: key), concurrency=3).prefetch(0),
        lambda order: Pipeline(stream).take(12).filter(order(lambda key: key >= 0)).prefetch(1),
    ],
    ids=["map", "prefetch(0)", "stream"],
)
def test_tasks_that_ask_one_iterator_are_served_in_turn(describe: Callable[[Any], Any]) -> None:
    """The first who asked gets the first batch, whoever else asks or is cancelled, in 200 orders."""

    async def main() -> None:
        for seed in range(200):
            await in_turn(seed, describe, 12)

    run(main)


@pytest.mark.asyncio
async def test_who_asks_as_a_batch_comes_does_not_overtake_the_one_who_waits() -> None:
    """The waiter is woken, and before it runs another task asks: that one gets the next batch."""
    gate = Gate()
    newcomer: list[asyncio.Task[int]] = []

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    batches = aiter(Pipeline(range(2)).map(fetch, concurrency=2))

    async def take() -> int:
        sample: int = await anext(batches)
        return sample

    waiting = [asyncio.create_task(take()), asyncio.create_task(take())]
    await gate.until_arrived(2)
    await turns()
    gate.open(0)
    while not any(task.done() for task in waiting + newcomer):
        newcomer.append(asyncio.create_task(take()))
        await asyncio.sleep(0)
    assert waiting[0].result() == 0
    gate.open_all()
    assert await waiting[1] == 1
    for task in newcomer:
        with pytest.raises(StopAsyncIteration):
            await task


@pytest.mark.asyncio
@pytest.mark.parametrize("num_workers", [0, 2])
async def test_the_drop_in_serves_tasks_in_turn(num_workers: int) -> None:
    """Its batches come from threads."""
    batches = aiter(DataLoader(list(range(40)), batch_size=2, num_workers=num_workers))
    async with asyncio.timeout(DEADLINE):
        found = await asyncio.gather(*(anext(batches) for _ in range(20)))
    assert [batch.tolist() for batch in found] == [[start, start + 1] for start in range(0, 40, 2)]
    with pytest.raises(StopAsyncIteration):
        await anext(batches)


@pytest.mark.asyncio
async def test_all_who_wait_are_told_of_the_end() -> None:
    """The first gets the last batch, or the error of the source, and the others the end; nobody waits for ever."""

    async def failing() -> AsyncIterator[int]:
        yield 0
        await asyncio.sleep(0)
        raise ERROR

    batches = aiter(Pipeline(failing))
    async with asyncio.timeout(DEADLINE):
        found = await asyncio.gather(*(outcome(batches) for _ in range(5)), return_exceptions=True)
    assert found[:2] == [0, ERROR]
    assert all(isinstance(end, StopAsyncIteration) for end in found[2:])
