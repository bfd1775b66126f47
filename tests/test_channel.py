"""`Channel`: what tasks and threads send comes once, in order; room, the end and errors reach both sides."""

import asyncio
import contextlib
import copy
import gc
import json
import os
import pickle
import random
import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from aioloader import ChannelClosedError, DataLoader, Pipeline
from aioloader.engine.progress import Progress
from aioloader.engine.source_context import RunSourceContext
from aioloader.sources import Channel
from aioloader.sources.channel_ledger import KEPT_SAMPLES
from aioloader.testing import virtual_order
from tests._support import DEADLINE, Face, Started, Steps, collect, on_both_faces, run, turns, until


def filled(samples: Any, *, maxsize: int = 1000, error: Exception | None = None, close: bool = True) -> Channel:
    """A channel with samples in it, closed unless told otherwise."""
    channel = Channel(maxsize)
    for sample in samples:
        channel.send_nowait(sample)
    if close:
        channel.close(error)
    return channel


# -- what comes out ------------------------------------------------------------------------------------------------


@on_both_faces
def test_samples_come_in_the_order_in_which_they_were_sent(face: Face) -> None:
    """Through a pipeline, as through any other source."""
    assert collect(Pipeline(filled(range(10))).map(str).batch(4, collate_fn=list), face) == [
        ["0", "1", "2", "3"],
        ["4", "5", "6", "7"],
        ["8", "9"],
    ]


@on_both_faces
def test_the_drop_in_takes_a_channel_as_an_iterable(face: Face) -> None:
    """`DataLoader(channel, batch_size=...)`, awaited like an async dataset."""
    for workers in (0, 2):
        loader: DataLoader[Any] = DataLoader(filled(range(5)), batch_size=2, num_workers=workers)
        assert [batch.tolist() for batch in collect(loader, face)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="worker_type='process' is for sync datasets"):
        DataLoader(Channel(1), batch_size=2, num_workers=1, worker_type="process")


def test_a_task_sends_while_the_loader_reads_on_the_same_loop() -> None:
    """`await send` and `async for` in one loop, with far more samples than there is room."""
    channel = Channel(3)

    async def main() -> list[int]:
        async def produce() -> None:
            for number in range(200):
                await channel.send(number)
            channel.close()

        task = asyncio.create_task(produce())
        samples = [sample async for sample in Pipeline(channel)]
        await task
        return samples

    assert run(main) == list(range(200))


@on_both_faces
def test_threads_send_and_each_keeps_its_order(face: Face) -> None:
    """Four threads with blocking sends; the channel ends with the last of them."""
    channel = Channel(2)
    senders = [channel.sender_sync() for _ in range(4)]

    def produce(number: int) -> None:
        with senders[number] as sender:
            for count in range(100):
                sender.send((number, count))

    threads = [Started(lambda number=number: produce(number)) for number in range(4)]  # type: ignore[misc]
    samples = collect(Pipeline(channel), face)
    for thread in threads:
        thread.outcome()
    assert sorted(samples) == [(number, count) for number in range(4) for count in range(100)]
    for number in range(4):
        assert [count for sender, count in samples if sender == number] == list(range(100))


@on_both_faces
def test_senders_live_on_loops_of_their_own(face: Face) -> None:
    """Three event loops in three threads, none of them the loader's."""
    channel = Channel(1)
    senders = [channel.sender() for _ in range(3)]

    def produce(number: int) -> None:
        async def main() -> None:
            async def one(part: int) -> None:
                for count in range(20):
                    await senders[number].send((number, part, count))

            with senders[number]:
                await asyncio.gather(one(0), one(1))

        run(main)

    threads = [Started(lambda number=number: produce(number)) for number in range(3)]  # type: ignore[misc]
    samples = collect(Pipeline(channel), face)
    for thread in threads:
        thread.outcome()
    assert len(samples) == len(set(samples)) == 120
    for number in range(3):
        for part in range(2):
            assert [sample[2] for sample in samples if sample[:2] == (number, part)] == list(range(20))


def test_two_loaders_share_a_channel() -> None:
    """Each sample goes to one of them."""
    channel = Channel(2)

    async def main() -> list[int]:
        async def read() -> list[int]:
            return [sample async for sample in Pipeline(channel)]

        async def produce() -> None:
            for number in range(100):
                await channel.send(number)
            channel.close()

        first, second, _ = await asyncio.gather(read(), read(), produce())
        assert first == sorted(first)
        assert second == sorted(second)
        return sorted(first + second)

    assert run(main) == list(range(100))


# -- back-pressure ---------------------------------------------------------------------------------------------------


@on_both_faces
def test_no_more_is_taken_than_there_is_room(face: Face) -> None:
    """A consumer that rests: its batches ahead, the batch that fills up, `maxsize` samples, and the sender stands."""
    channel = Channel(5)
    sent: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def look(samples: list[int]) -> list[int]:
        loops.append(asyncio.get_running_loop())
        return samples

    def produce() -> None:
        sender = channel.sender_sync()
        for number in range(1000):
            try:
                sender.send(number)
            except ChannelClosedError:
                return
            sent.append(number)

    with Steps(Pipeline(channel).batch(4, collate_fn=look).prefetch(2), face) as steps:
        thread = Started(produce)
        for count in range(1, 6):
            assert steps.next() == list(range(4 * count - 4, 4 * count))
            run(lambda: until(lambda: waits_for_room(channel)))
            for _ in range(3):
                steps.settle(loops[0])
            assert channel.qsize() <= 5
            assert len(sent) <= 4 * (count + 2) + 4 + 5
        channel.close()
        thread.outcome()
        assert steps.rest() == [sent[start : start + 4] for start in range(20, len(sent), 4)]


def waits_for_room(channel: Channel) -> bool:
    """Whether a sender stands at a full channel."""
    return bool(channel._senders)


def test_the_channel_is_no_larger_than_it_says() -> None:
    """`send_nowait` refuses, `send` waits, and those who wait have their turn in order."""
    channel = filled([0, 1], maxsize=2, close=False)
    with pytest.raises(asyncio.QueueFull, match="holds 2 samples, its maxsize; await send"):
        channel.send_nowait(2)

    async def main() -> list[int]:
        tasks = [asyncio.create_task(channel.send(number)) for number in range(2, 6)]
        await turns(5)
        assert not any(task.done() for task in tasks)
        assert channel.qsize() == 2
        iterator = aiter(Pipeline(channel))
        samples = [await anext(iterator) for _ in range(6)]
        await asyncio.gather(*tasks)
        await iterator.aclose()
        return samples

    assert run(main) == list(range(6))


def test_a_sync_send_gives_up_after_its_time() -> None:
    """And has not sent then."""
    channel = filled([0], maxsize=1, close=False)
    with pytest.raises(TimeoutError, match="no room for 0 s; the sample was not sent"):
        channel.sender_sync().send(1, timeout=0)
    channel.close()
    assert list(Pipeline(channel)) == [0]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
def test_ctrl_c_ends_a_sync_send() -> None:
    """In the main thread, while it waits for room: it has not sent."""
    channel = filled([0], maxsize=1, close=False)
    over = threading.Event()

    def press() -> None:
        while not waits_for_room(channel):
            over.wait(0.001)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        while not over.wait(0.05):  # see `Child.finish`: it may have come just before the wait
            signal.pthread_kill(main, signal.SIGURG)

    pressing = Started(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            channel.sender_sync().send(1)
    finally:
        over.set()
        pressing.outcome()
    channel.close()
    assert list(Pipeline(channel)) == [0]


def test_a_sync_send_does_not_block_a_loop() -> None:
    """It would stand still, and with it perhaps the one who makes room."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"runs an event loop; await channel\.send"):
            Channel(1).sender_sync().send(0)

    run(main)


# -- the end ---------------------------------------------------------------------------------------------------------


@on_both_faces
def test_an_error_travels_and_comes_after_the_samples(face: Face) -> None:
    """The user's own exception object, once; the epoch is over then."""
    gone = ValueError("the environment is gone")
    with Steps(Pipeline(filled(range(3), error=gone)).batch(2, collate_fn=list), face) as steps:
        outcomes = steps.outcomes()
    assert outcomes == [[0, 1], [2], gone]
    assert "source(Channel)" in gone.__notes__[0]


@on_both_faces
def test_a_closed_channel_has_empty_epochs_and_a_failed_one_fails_them(face: Face) -> None:
    """What failed never looks as if it were over in good order."""
    channel = filled(range(3))
    loader = Pipeline(channel)
    assert collect(loader, face) == [0, 1, 2]
    assert collect(loader, face) == []
    failed = Pipeline(filled([], error=KeyError("x")))
    for _ in range(2):
        with pytest.raises(KeyError):
            collect(failed, face)


def test_close_is_idempotent_and_the_first_call_counts() -> None:
    """So whoever comes late may close once more."""
    channel = filled([])
    channel.close(ValueError("too late"))
    assert channel.closed
    assert list(Pipeline(channel)) == []


def test_only_an_exception_can_be_the_error() -> None:
    with pytest.raises(TypeError, match="error must be an exception, for instance"):
        Channel(1).close("broken")  # type: ignore[arg-type]


def test_a_closed_channel_takes_nothing() -> None:
    """Each way to send says so, with the error that it was closed with as its cause."""
    gone = ValueError("gone")
    channel = filled([], error=gone)
    for refused in (channel.send_nowait, channel.sender_sync().send, channel.sender().send_nowait):
        with pytest.raises(ChannelClosedError, match="closed: the sample was not sent") as caught:
            refused(0)
        assert caught.value.__cause__ is gone

    async def main() -> None:
        with pytest.raises(ChannelClosedError):
            await channel.send(0)

    run(main)


def test_close_wakes_those_who_wait_for_room() -> None:
    """Tasks and threads get the error, and what they wanted to send does not come."""
    channel = filled([0], maxsize=1, close=False)

    async def main() -> None:
        task = asyncio.create_task(channel.send(1))
        thread = Started(lambda: channel.sender_sync().send(2))
        await until(lambda: len(channel._senders) == 2)
        channel.close()
        with pytest.raises(ChannelClosedError):
            await task
        with pytest.raises(ChannelClosedError):
            await asyncio.to_thread(thread.outcome)

    run(main)
    assert list(Pipeline(channel)) == [0]


@on_both_faces
def test_close_wakes_a_consumer_that_waits(face: Face) -> None:
    """From another thread, while there is nothing in the channel."""
    channel = Channel(1)
    consumer = Started(lambda: collect(Pipeline(channel), face))
    run(lambda: until(lambda: bool(channel._readers)))
    channel.close()
    assert consumer.outcome() == []


def test_the_channel_ends_with_its_last_sender() -> None:
    """Senders are counted from when they are made; the first that failed is told in the end, the others go on."""
    channel = Channel(10)
    first, second = channel.sender(), channel.sender()
    broken = RuntimeError("environment 1")

    async def main() -> None:
        await first.send(1)
        with pytest.raises(RuntimeError), first:
            raise broken
        assert not channel.closed
        with pytest.raises(ChannelClosedError, match="this sender is closed"):
            await first.send(2)
        with second:
            await second.send(3)
        second.close()

    run(main)
    assert channel.closed
    with Steps(Pipeline(channel), "for") as steps:
        assert steps.outcomes() == [1, 3, broken]


def test_a_sender_is_an_async_context_manager_too() -> None:
    """As it is used in tasks; the block's end and its error mean the same as with `with`."""
    channel = Channel(maxsize=8)

    open_after: list[bool] = []

    async def main() -> None:
        async with channel.sender() as sender:
            await sender.send(1)
            other = channel.sender()
        open_after.append(not channel.closed)
        with contextlib.suppress(KeyError):
            async with other:
                await other.send(2)
                raise KeyError("lost")
        open_after.append(not channel.closed)

    run(main)
    assert open_after == [True, False]
    with Steps(Pipeline(channel), "for") as steps:
        first, second, error = steps.outcomes()
    assert (first, second) == (1, 2)
    assert isinstance(error, KeyError)


def test_a_for_loop_that_stops_those_who_send_is_told() -> None:
    """`for` in a running loop blocks it: its tasks cannot send. A closed channel needs nobody."""
    channel = Channel(maxsize=8)
    loader = Pipeline.merge(range(3), Pipeline(channel).map(abs)).batch(2)

    async def main() -> None:
        for live in (loader, DataLoader(channel, 2)):
            with pytest.warns(RuntimeWarning, match=r"`for` over .*Channel.* use `async for`") as caught:
                iter(live)
            assert caught[0].filename == __file__
        aiter(loader)
        iter(Pipeline(range(3)))
        channel.close()
        iter(loader)

    iter(loader)
    run(main)


def test_a_sender_that_was_closed_out_is_no_failure() -> None:
    """It stops because the channel was closed: that is no news to the consumer."""
    channel = Channel(1)
    sender = channel.sender_sync()
    channel.close()
    with pytest.raises(ChannelClosedError), sender:
        sender.send(0)
    assert list(Pipeline(channel)) == []


@on_both_faces
def test_a_channel_is_closed_by_its_block(face: Face) -> None:
    """`with channel:` so that no sender waits for ever when the consumer has had enough; an error goes along."""
    with Channel(1) as channel:
        pass
    assert collect(Pipeline(channel), face) == []

    async def main() -> Channel:
        with pytest.raises(ZeroDivisionError):
            async with Channel(1) as channel:
                _ = 1 / 0
        return channel

    failed = run(main)
    with pytest.raises(ZeroDivisionError):
        collect(Pipeline(failed), face)


# -- what was read ahead ---------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize(
    "describe",
    [
        pytest.param(lambda channel: Pipeline(channel).batch(3, collate_fn=list).prefetch(4), id="batch"),
        pytest.param(lambda channel: Pipeline(channel).map(str).map(int).batch(3, collate_fn=list), id="map"),
        pytest.param(
            lambda channel: Pipeline(channel).filter(bool).enumerate().map(second).batch(3, collate_fn=list), id="folds"
        ),
        pytest.param(lambda channel: Pipeline.merge(channel, []).batch(3, collate_fn=list), id="merge"),
        pytest.param(lambda channel: Pipeline.mix([channel, []], [1, 1]).batch(3, collate_fn=list), id="mix"),
        pytest.param(lambda channel: Pipeline.interleave([], channel).batch(3, collate_fn=list), id="interleave"),
        pytest.param(lambda channel: Pipeline(channel).repeat(1).batch(3, collate_fn=list), id="repeat"),
        pytest.param(lambda channel: Pipeline(channel).shard(0, 1).batch(3, collate_fn=list), id="shard"),
        pytest.param(lambda channel: Pipeline(channel).drop_if(odd_million).batch(3, collate_fn=list), id="drop_if"),
        pytest.param(lambda channel: Pipeline(channel).batch(3, max_wait=1e6, collate_fn=list), id="max_wait"),
    ],
)
def test_what_was_not_handed_out_comes_in_the_next_epoch(face: Face, describe: Callable[[Channel], Any]) -> None:
    """`break` after two batches, whatever was made ahead: the next epoch goes on with the next sample."""
    channel = filled(range(1, 101))
    loader = describe(channel)
    first = collect(loader, face, limit=2)
    if face == "for":
        loader.close()
    second = collect(loader, face)
    assert [sample for batch in first + second for sample in batch] == list(range(1, 101))
    assert len(first) == 2
    assert collect(loader, face) == []


def second(pair: tuple[int, int]) -> int:
    return pair[1]


def odd_million(sample: int) -> bool:
    return sample == 1_000_001


@on_both_faces
def test_take_makes_epochs_of_a_channel(face: Face) -> None:
    """`take(n)` of a live source, again and again: nothing is lost between two of them."""
    channel = filled(range(40))
    loader = Pipeline(channel).map(str, concurrency=4).batch(3, collate_fn=list).take(2)
    found = [collect(loader, face) for _ in range(8)]
    samples = [int(sample) for epoch in found for batch in epoch for sample in batch]
    assert samples == list(range(40))
    assert [len(epoch) for epoch in found] == [2, 2, 2, 2, 2, 2, 2, 0]


@on_both_faces
def test_an_epoch_that_read_to_the_end_gives_back_too(face: Face) -> None:
    """The source has ended long ago when the consumer leaves: what it left is not gone with it."""
    loader = Pipeline(filled(range(6))).batch(2, collate_fn=list).prefetch(10)
    assert collect(loader, face, limit=1) == [[0, 1]]
    loader.close()
    assert collect(loader, face) == [[2, 3], [4, 5]]


@on_both_faces
def test_a_sample_that_was_taken_apart_comes_again(face: Face) -> None:
    """Behind `flat_map` or `unbatch`, when the epoch ends in the middle of it."""
    loader = Pipeline(filled(["abc", "def", "ghi"])).flat_map(list)
    assert collect(loader, face, limit=4) == ["a", "b", "c", "d"]
    loader.close()
    assert collect(loader, face, limit=3) == ["d", "e", "f"]


@on_both_faces
def test_what_the_thread_of_the_consumer_has_not_taken_goes_back(face: Face) -> None:
    """Under `for` the run is over while its last batches lie in a queue: these count as not handed out."""
    channel = filled(range(8))
    loader = Pipeline(channel).batch(2, collate_fn=list).prefetch(8)
    with Steps(loader, face) as steps:
        assert steps.next() == [0, 1]
        run(lambda: until(lambda: face == "async for" or not any_loop()))
        assert channel.qsize() == 0
        assert steps.rest() == [[2, 3], [4, 5], [6, 7]]
    assert collect(loader, face) == []


def any_loop() -> bool:
    """Whether a private loop is alive."""
    return any(thread.name == "aioloader-loop" for thread in threading.enumerate())


@on_both_faces
def test_a_dropped_iterator_gives_back_too(face: Face) -> None:
    """`break` and nothing else: it comes back as soon as the iterator is gone."""
    channel = filled(range(10))

    def read() -> list[int]:
        return [batch[0] for batch, _ in zip(Pipeline(channel).batch(1, collate_fn=list), range(2), strict=False)]

    async def read_async() -> list[int]:
        found = []
        async for batch in Pipeline(channel).batch(1, collate_fn=list):
            found.append(batch[0])
            if len(found) == 2:
                break
        return found

    async def main() -> list[int]:
        found = read() if face == "for" else await read_async()
        gc.collect()
        left = 10 - len(found) - (face == "for")  # `zip` takes one more before it stops
        await until(lambda: channel.qsize() == left)
        return found

    assert run(main) == [0, 1]
    assert collect(Pipeline(channel), face) == list(range(3 if face == "for" else 2, 10))


@on_both_faces
def test_without_order_nothing_is_lost_though_some_may_come_again(face: Face) -> None:
    """What had overtaken others is behind the oldest that was not handed out."""
    channel = filled(range(50))
    order = virtual_order(seed=3)

    async def fetch(sample: int) -> int:
        await order.turn()
        return sample

    loader = Pipeline(channel).map(fetch, concurrency=8, ordered=False)
    first = collect(loader, face, limit=10)
    loader.close()
    assert set(first) | set(collect(loader, face)) == set(range(50))


def test_what_is_kept_to_go_back_is_bounded() -> None:
    """A filter that refuses all hands nothing out: the newest are kept, and no more."""
    channel = Channel(1000)

    async def main() -> int:
        loader = Pipeline(channel).filter(lambda _: False)
        consumer = asyncio.ensure_future(anext(aiter(loader)))
        for number in range(KEPT_SAMPLES + 5000):
            await channel.send(number)
        await until(lambda: channel.qsize() == 0)
        consumer.cancel()
        await asyncio.wait([consumer])
        await loader.aclose()
        return channel.qsize()

    assert run(main) == KEPT_SAMPLES


def test_what_was_handed_out_is_let_go() -> None:
    """An endless epoch keeps no sample that the consumer has had."""

    class Sample:
        pass

    channel = Channel(4)
    alive: list[weakref.ref[Sample]] = []

    async def main() -> None:
        iterator = aiter(Pipeline(channel).batch(2, collate_fn=len))
        for _ in range(50):
            for _ in range(2):
                sample = Sample()
                alive.append(weakref.ref(sample))
                await channel.send(sample)
                del sample
            assert await anext(iterator) == 2
            assert sum(ref() is not None for ref in alive) <= 4
        await iterator.aclose()

    run(main)


# -- cancelling ------------------------------------------------------------------------------------------------------


def test_a_cancelled_send_has_not_sent() -> None:
    """It gives up its place; those behind it move up, and it never sends later."""
    channel = filled([0], maxsize=1, close=False)

    async def main() -> list[int]:
        tasks = [asyncio.create_task(channel.send(number)) for number in (1, 2, 3)]
        await turns(3)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        iterator = aiter(Pipeline(channel))
        samples = [await anext(iterator) for _ in range(3)]
        await asyncio.gather(tasks[0], tasks[2])
        await iterator.aclose()
        return samples

    assert run(main) == [0, 1, 3]
    assert channel.qsize() == 0


def test_a_cancelled_consumer_loses_no_sample() -> None:
    """`wait_for(anext(...))` that times out, again and again, while samples come."""
    channel = Channel(2)

    async def main() -> list[int]:
        iterator = aiter(Pipeline(channel))
        samples: list[int] = []
        for number in range(30):
            asking = asyncio.ensure_future(anext(iterator))
            await turns(number % 4)
            asking.cancel()
            await channel.send(number)
            await asyncio.wait([asking])
            if not asking.cancelled():
                samples.append(asking.result())
            samples += [await anext(iterator) for _ in range(number + 1 - len(samples))]
        await iterator.aclose()
        return samples

    assert run(main) == list(range(30))


class FakeRun:
    """As much of a run as a `RunSourceContext` needs to read a channel."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.progress = Progress(0)
        self.shared: dict[object, Any] = {}


async def _storm(seed: int) -> None:
    """Senders that send and give up, readers that come and go, cancellations, an end, in an order drawn from `seed`."""
    draw = random.Random(seed)
    order = virtual_order(seed)
    channel = Channel(draw.randint(1, 4))
    sent: dict[int, list[int]] = {}  # by sender: those that were sent for certain
    received: list[tuple[int, int]] = []

    async def produce(number: int) -> None:
        mine = sent.setdefault(number, [])
        for count in range(draw.randint(1, 6)):
            await order.turn()
            try:
                if draw.random() < 0.3:
                    channel.send_nowait((number, count))
                else:
                    await channel.send((number, count))
            except asyncio.QueueFull:
                continue
            except ChannelClosedError:
                return
            mine.append(count)

    async def consume() -> None:
        fake = FakeRun()
        reader = channel.open(RunSourceContext(fake, "test"), None)  # type: ignore[arg-type]
        try:
            while True:
                await order.turn()
                entries = await reader.read(draw.randint(1, 4))
                if not entries:
                    return
                for entry in entries:
                    await order.turn()
                    received.append(entry.value)
                    fake.progress.cursor = (entry.cursor, None)
        finally:
            for shared in fake.shared.values():
                shared.run_over(fake.progress.cursor)

    async def disturb(tasks: list[asyncio.Task[None]]) -> None:
        for _ in range(draw.randint(0, 4)):
            await order.turn()
            await order.turn()
            draw.choice(tasks).cancel()

    producers = [asyncio.create_task(produce(number)) for number in range(draw.randint(1, 4))]
    consumers = [asyncio.create_task(consume()) for _ in range(draw.randint(1, 2))]
    closes = draw.random() < 0.3
    trouble = asyncio.create_task(disturb(producers + consumers))
    if closes:
        await order.turn()
        channel.close()
    await trouble
    last = asyncio.create_task(consume())  # whoever was cancelled, somebody reads on
    await asyncio.wait(producers)
    channel.close()
    await asyncio.wait([*consumers, last])
    await consume()

    assert len(received) == len(set(received)), f"{seed=}: twice"
    for number, counts in sent.items():
        assert {(number, count) for count in counts} <= set(received), f"{seed=}: lost"
    certain = {(number, count) for number, counts in sent.items() for count in counts}
    assert set(received) <= certain, f"{seed=}: what was refused or cancelled came all the same"
    assert not channel._senders
    assert not channel._promised
    assert not channel._readers


@pytest.mark.parametrize("block", range(4))
def test_every_sample_that_was_sent_comes_once_whatever_happens(block: int) -> None:
    """2000 orders of sending, cancelling, closing and changing readers."""

    async def main() -> None:
        for seed in range(500 * block, 500 * (block + 1)):
            await _storm(seed)

    run(main)


class Ticks:
    """The clock of the running loop, turned by hand: one second with each turn of the loop."""

    def __init__(self) -> None:
        self.now = 0.0
        asyncio.get_running_loop().time = lambda: self.now  # type: ignore[method-assign]

    async def tick(self) -> None:
        self.now += 1.0
        await asyncio.sleep(0)


async def by_timeout(send: Callable[[], Any], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await send()


async def by_wait_for(send: Callable[[], Any], seconds: float) -> None:
    await asyncio.wait_for(send(), seconds)


async def by_fail_after(send: Callable[[], Any], seconds: float) -> None:
    with anyio.fail_after(seconds):
        await send()


async def by_move_on_after(send: Callable[[], Any], seconds: float) -> None:
    with anyio.move_on_after(seconds) as scope:
        await send()
    if scope.cancelled_caught:
        raise TimeoutError


async def by_cancel(send: Callable[[], Any], seconds: float) -> None:
    task = asyncio.create_task(send())
    asyncio.get_running_loop().call_later(seconds, task.cancel)
    await asyncio.wait([task])
    if task.cancelled():
        raise TimeoutError


async def _impatience(seed: int, give_up: Callable[[Callable[[], Any], float], Any]) -> tuple[int, int]:
    """Senders that give up after some turns of the loop; returns how many sent and how many gave up."""
    draw = random.Random(seed)
    clock = Ticks()
    channel = Channel(draw.randint(1, 3))
    send = channel.sender().send if draw.random() < 0.5 else channel.send
    told: dict[tuple[int, int], bool] = {}
    received: list[tuple[int, int]] = []

    async def produce(number: int) -> None:
        for count in range(8):
            key = (number, count)
            try:
                await give_up(lambda key=key: send(key), draw.randint(0, 6))  # type: ignore[misc]
            except TimeoutError:
                told[key] = False
            else:
                told[key] = True

    async def consume() -> None:
        async for sample in Pipeline(channel).prefetch(draw.randint(0, 1)):
            received.append(sample)
            for _ in range(draw.randint(0, 4)):
                await asyncio.sleep(0)

    consumer = asyncio.create_task(consume())
    producers = [asyncio.create_task(produce(number)) for number in range(4)]
    while not all(task.done() for task in producers):
        await clock.tick()
    channel.close()
    await consumer
    assert sorted(received) == sorted(key for key, sent in told.items() if sent), f"{seed=}"
    for number in range(4):
        assert [key for key in received if key[0] == number] == sorted(key for key in received if key[0] == number)
    return sum(told.values()), len(told) - sum(told.values())


@pytest.mark.parametrize("give_up", [by_timeout, by_wait_for, by_fail_after, by_move_on_after, by_cancel])
def test_a_send_that_gives_up_has_not_sent_and_one_that_returns_has(give_up: Any) -> None:
    """500 orders for each way to give up, 32 sends in each: also in the turn in which there is room."""

    async def main() -> list[tuple[int, int]]:
        return [await _impatience(seed, give_up) for seed in range(500)]

    with asyncio.Runner() as runner:
        counts = runner.run(main())
    assert sum(sent for sent, _ in counts) > 1000
    assert sum(given_up for _, given_up in counts) > 1000


def test_a_place_that_was_promised_goes_to_the_next_when_its_sender_gives_up() -> None:
    """The sender is cancelled in the turn in which the reader makes room: the one behind it sends, and nobody waits."""
    channel = filled([0], maxsize=1, close=False)

    async def main() -> None:
        first, second = [asyncio.create_task(channel.send(number)) for number in (1, 2)]
        await turns(3)
        reader = channel.open(RunSourceContext(FakeRun(), "test"), None)  # type: ignore[arg-type]
        assert [entry.value for entry in await reader.read(1)] == [0]  # makes room, without a turn of the loop
        first.cancel()
        with pytest.raises(asyncio.QueueFull):  # the place is the second's, not that of the next who comes
            channel.send_nowait(3)
        await second
        assert first.cancelled()

    run(main)
    channel.close()
    assert list(Pipeline(channel)) == [2]


def test_a_sender_whose_loop_is_closed_holds_no_place() -> None:
    """Its task is still known to somebody, and will never run again; the others go on."""
    channel = filled([0], maxsize=1, close=False)
    loop = asyncio.new_event_loop()
    task = loop.create_task(channel.send(1))
    loop.run_until_complete(turns(3))
    loop.close()
    sending = Started(lambda: channel.sender_sync().send(2))
    run(lambda: until(lambda: len(channel._senders) == 2))
    iterator = iter(Pipeline(channel))
    assert [next(iterator), next(iterator)] == [0, 2]
    sending.outcome()
    channel.close()
    assert list(iterator) == []
    loop.set_exception_handler(lambda *_: None)  # "destroyed but it is pending"
    del task


@pytest.mark.parametrize("room_comes", [False, True])
def test_a_sync_send_whose_time_is_over_as_room_comes(room_comes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has sent if the room came first, and says so; else it has not and never will."""
    channel = filled([0], maxsize=1, close=False)

    class JustThen(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if room_comes:
                with channel._lock:
                    assert channel._take(1) == [0]
            return False

    sender = channel.sender_sync()
    with monkeypatch.context() as patched:
        patched.setattr("aioloader.sources.channel_queue.threading.Event", JustThen)
        with contextlib.nullcontext() if room_comes else pytest.raises(TimeoutError, match="was not sent"):
            sender.send(1, timeout=5)
    channel.close()
    assert list(Pipeline(channel)) == ([1] if room_comes else [0])


def test_ctrl_c_as_room_comes_ends_a_sync_send_that_has_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place was promised, and the thread is interrupted before it uses it: the place is free again."""
    channel = filled([0], maxsize=1, close=False)

    class JustThen(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            with channel._lock:
                assert channel._take(1) == [0]
            raise KeyboardInterrupt

    sender = channel.sender_sync()
    with monkeypatch.context() as patched:
        patched.setattr("aioloader.sources.channel_queue.threading.Event", JustThen)
        with pytest.raises(KeyboardInterrupt):
            sender.send(1)
    channel.send_nowait(2)
    channel.close()
    assert list(Pipeline(channel)) == [2]


@on_both_faces
def test_epochs_that_are_broken_off_anywhere_give_every_sample_once(face: Face) -> None:
    """30 ways to read 60 samples by epochs of any length, while a thread sends."""
    for seed in range(30):
        draw = random.Random(seed)
        channel = Channel(draw.randint(1, 5))
        loader = Pipeline(channel).map(str, concurrency=3).batch(draw.randint(1, 5), collate_fn=list)
        loader = loader.prefetch(draw.randint(0, 3))

        def produce(channel: Channel = channel) -> None:
            with channel.sender_sync() as sender:
                for number in range(60):
                    sender.send(number)

        thread = Started(produce)
        samples: list[int] = []
        while len(samples) < 60:
            for batch in collect(loader, face, limit=draw.randint(1, 6)):
                samples += map(int, batch)
            loader.close()  # `break` alone lets go a little later
        thread.outcome()
        assert samples == list(range(60)), f"{seed=}"


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maxsize", "said"),
    [(0, "maxsize must be at least 1, got 0"), (-1, "at least 1"), (1.5, "an integer"), (True, "an integer")],
)
def test_maxsize_is_a_positive_integer(maxsize: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        Channel(maxsize)


@pytest.mark.parametrize("do", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_channel_cannot_be_pickled_or_copied(do: Callable[[Any], Any]) -> None:
    """Its samples would be in two places, or in none."""
    with pytest.raises(TypeError, match="belongs to its process and cannot be pickled or copied"):
        do(Channel(1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_is_told_that_it_has_no_channel() -> None:
    """Whatever it sent would stay in its copy."""
    channel = filled([0], close=False)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            channel.send_nowait(1)
        except RuntimeError as error:
            said = str(error).encode()
        finally:
            os.write(writing, said)
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as told:
        assert b"made before a fork and belongs to the parent process" in told.read()
    channel.close()
    assert list(Pipeline(channel)) == [0]


def test_an_abandoned_channel_goes_with_its_senders() -> None:
    """A task that waits for room in a channel that nobody knows: both are collected."""

    async def main() -> "weakref.ref[Channel]":
        channel = filled([0], maxsize=1, close=False)
        task = asyncio.create_task(channel.send(1))
        await turns(3)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # it says "destroyed but it is pending"
        del task
        return weakref.ref(channel)

    async def watched() -> "weakref.ref[Channel]":
        ref = await main()
        gc.collect()
        return ref

    assert run(watched)() is None


def test_a_sender_that_nobody_receives_from_ends_with_its_loop() -> None:
    """The loop is shut down while a task waits for room: no hang, and its sample does not come later."""
    channel = filled([0], maxsize=1, close=False)

    async def main() -> None:
        task = asyncio.create_task(channel.send(1))
        await turns(3)
        assert not task.done()

    asyncio.run(main())
    assert not channel._senders
    channel.close()
    assert list(Pipeline(channel)) == [0]


@on_both_faces
def test_a_dropped_iterator_leaves_the_channel_to_others(face: Face) -> None:
    """It waited for samples; the next loader gets them."""
    channel = Channel(10)
    if face == "for":
        iterator: Any = iter(Pipeline(channel))
        asking = Started(lambda: next(iterator, None))
        run(lambda: until(lambda: bool(channel._readers)))
        iterator.close()
        with pytest.raises(Exception, match="closed before this epoch was over"):
            asking.outcome()
    else:

        async def main() -> None:
            async with asyncio.timeout(DEADLINE):
                asking = asyncio.ensure_future(anext(aiter(Pipeline(channel))))
                await until(lambda: bool(channel._readers))
                asking.cancel()
                await asyncio.wait([asking])
                del asking
                gc.collect()
                await until(lambda: not channel._readers)

        run(main)
    channel.send_nowait(7)
    channel.close()
    assert collect(Pipeline(channel), face) == [7]


@on_both_faces
def test_a_state_says_that_live_data_cannot_be_replayed(face: Face) -> None:
    """It loads all the same: what comes is what is in the channel then."""
    channel = filled(range(12))
    loader = Pipeline(channel).map(str).batch(2, collate_fn=list)
    assert collect(loader, face, limit=2) == [["0", "1"], ["2", "3"]]
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["guarantee"] == "live"
    assert Pipeline.merge(range(3), channel).state_dict()["guarantee"] == "live"
    loader.close()
    loader.load_state_dict(state)
    assert collect(loader, face, limit=2) == [["4", "5"], ["6", "7"]]
    assert loader.state_dict()["batches"] == 4
    loader.close()
    assert collect(loader, face) == [["8", "9"], ["10", "11"]]


def test_its_repr_says_what_is_in_it() -> None:
    assert repr(filled([1, 2], maxsize=3)) == "<Channel: 2 samples, maxsize 3, closed>"
    assert threading.active_count() >= 1
