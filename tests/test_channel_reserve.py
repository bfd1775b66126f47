"""`Channel.reserve`: a place that is taken before its sample is made; and channels that drop their oldest samples."""

import asyncio
import contextlib
import copy
import gc
import os
import pickle
import random
import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from aioloader import ChannelClosedError, DataLoader, Pipeline
from aioloader.sources import Channel, Slot
from aioloader.sources.channel_waiting import WaitingTask
from tests._support import DEADLINE, Face, Started, Steps, collect, on_both_faces, run, turns, until


def taken(channel: Channel, count: int) -> list[Any]:
    """What a loader reads when it asks for `count` samples; it is handed out at once."""
    with channel._lock:
        return channel._take(count)


# -- a slot ----------------------------------------------------------------------------------------------------------


@on_both_faces
def test_samples_come_in_the_order_in_which_slots_are_used(face: Face) -> None:
    """A place has no number: it is the sample that has one, from the moment when it is sent."""
    channel = Channel(3)
    slots = [channel.reserve_nowait() for _ in range(3)]
    for number in (2, 0, 1):
        slots[number].send(number)
    channel.close()
    assert collect(Pipeline(channel), face) == [2, 0, 1]


@on_both_faces
def test_the_drop_in_reads_what_slots_send(face: Face) -> None:
    channel = Channel(4)
    for number in range(4):
        channel.reserve_nowait().send(number)
    channel.close()
    loader: DataLoader[Any] = DataLoader(channel, batch_size=2)
    assert [batch.tolist() for batch in collect(loader, face)] == [[0, 1], [2, 3]]


def test_a_place_counts_from_when_it_is_reserved() -> None:
    """Samples and slots together are no more than `maxsize`, whoever asks."""
    channel = Channel(2)
    channel.send_nowait(0)
    slot = channel.reserve_nowait()
    assert repr(channel) == "<Channel: 1 samples, 1 reserved, maxsize 2, open>"
    with pytest.raises(asyncio.QueueFull, match=r"no free place: it holds 1 samples, 1 of its 2 places are reserved"):
        channel.reserve_nowait()
    with pytest.raises(
        asyncio.QueueFull, match=r"full: it holds 1 samples, 1 of its 2 places are reserved; await send"
    ):
        channel.send_nowait(1)
    with pytest.raises(TimeoutError, match="had no room for 0 s"):
        channel.sender_sync().send(1, timeout=0)
    with pytest.raises(TimeoutError, match="had no free place for 0 s"):
        channel.sender_sync().reserve(timeout=0)
    slot.send(1)
    assert channel.qsize() == 2
    with pytest.raises(asyncio.QueueFull, match="it holds 2 samples, its maxsize"):
        channel.reserve_nowait()
    assert taken(channel, 1) == [0]
    channel.reserve_nowait().release()
    assert not channel._promised


def test_a_slot_is_for_one_sample() -> None:
    channel = Channel(2)
    slot = channel.reserve_nowait()
    assert "free to send" in repr(slot)
    slot.send(1)
    slot.release()
    for used in (slot, channel.reserve_nowait()):
        used.release()
        with pytest.raises(RuntimeError, match="has been used or released: it is for one sample; reserve another one"):
            used.send(2)
    assert "used or released" in repr(slot)
    assert (channel.qsize(), channel._promised) == (1, 0)


def test_a_block_gives_back_what_was_not_used() -> None:
    """`with` and `async with`, also when the block fails."""
    channel = Channel(1)

    async def main() -> None:
        with contextlib.suppress(ZeroDivisionError), await channel.reserve():
            _ = 1 / 0
        async with await channel.reserve():
            pass
        async with await channel.reserve() as slot:
            slot.send(7)

    run(main)
    assert taken(channel, 2) == [7]
    assert not channel._promised


def test_a_slot_that_is_dropped_gives_its_place_to_who_waits() -> None:
    """With a warning, since nobody meant to; none where the channel is closed, and nobody wants the place."""
    channel = Channel(1)

    async def main() -> None:
        slot = await channel.reserve()
        waiting = asyncio.create_task(channel.send(1))
        await turns(3)
        assert not waiting.done()
        assert slot._held
        with pytest.warns(ResourceWarning, match=r"a slot of <Channel: .*> was dropped unused.*use `with slot:`"):
            del slot
        await waiting

    run(main)
    assert taken(channel, 1) == [1]
    slot = channel.reserve_nowait()
    channel.close()
    del slot
    gc.collect()
    assert not channel._promised


def test_a_slot_in_a_cycle_may_be_collected_while_the_channel_promises_places() -> None:
    """The collector runs in the middle of that, in the thread that has the lock: no place is lost or given twice."""
    channel = Channel(3)

    class Cycle:
        def __init__(self, slot: Slot) -> None:
            self.slot = slot
            self.me = self

    async def main() -> None:
        Cycle(await channel.reserve())
        second, third = await channel.reserve(), await channel.reserve()
        sends = [asyncio.create_task(channel.send(number)) for number in range(4)]
        await turns(3)

        class Collecting(dict[Any, None]):
            """The waiting senders; the collector comes with the first one that is woken."""

            def __init__(self, senders: dict[Any, None]) -> None:
                super().__init__(senders)

            def popitem(self, last: bool = True) -> tuple[Any, None]:
                first = next(iter(self))
                gc.collect()
                return first, self.pop(first)

        channel._senders = Collecting(channel._senders)  # type: ignore[assignment]
        with pytest.warns(ResourceWarning, match="was dropped unused"):
            second.release()
        assert channel._promised == 3  # the third slot, and two senders that were woken
        await turns(3)
        assert sorted(channel._samples) == [0, 1]
        third.release()
        await turns(3)
        assert sorted(channel._samples) == [0, 1, 2]
        assert taken(channel, 3) == [0, 1, 2]
        await asyncio.gather(*sends)

    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()
    assert (taken(channel, 3), channel._promised) == ([3], 0)


@pytest.mark.parametrize("ask", ["send", "reserve"])
def test_a_slot_that_is_collected_just_before_somebody_waits_wakes_it(
    ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has seen that there is no place, and before it stands in the queue: else it would wait for ever."""
    channel = Channel(1)
    slots = [channel.reserve_nowait()]

    class Late(WaitingTask):
        def __init__(self) -> None:
            super().__init__()
            slots.clear()

    async def main() -> None:
        if ask == "send":
            await channel.send(1)
        else:
            (await channel.reserve()).send(1)

    monkeypatch.setattr("aioloader.sources.channel_queue.WaitingTask", Late)
    with pytest.warns(ResourceWarning, match="was dropped unused"):
        run(main)
    assert taken(channel, 1) == [1]


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_reservers_and_senders_have_their_turns_in_one_order() -> None:
    """First come, first served, whatever they want, and wherever they wait."""
    channel = Channel(1)
    channel.send_nowait("first")
    order: list[str] = []

    async def main() -> None:
        async def reserve() -> None:
            slot = await channel.reserve()
            order.append("reserve")
            slot.send("reserved")

        async def send() -> None:
            await channel.send("sent")
            order.append("send")

        def in_thread() -> None:
            slot = channel.sender_sync().reserve()
            order.append("thread")
            slot.send("threaded")

        tasks = [asyncio.create_task(reserve()), asyncio.create_task(send())]
        await turns(3)
        thread = Started(in_thread)
        await until(lambda: len(channel._senders) == 3)
        tasks.append(asyncio.create_task(reserve()))
        await turns(3)
        assert order == []
        found = []
        for count in range(1, 6):
            await until(lambda: channel.qsize() == 1)
            found += taken(channel, 1)
            assert len(order) == count - 1
        await asyncio.gather(*tasks)
        await asyncio.to_thread(thread.outcome)
        assert found == ["first", "reserved", "sent", "threaded", "reserved"]

    run(main)
    assert order == ["reserve", "send", "thread", "reserve"]


def test_a_reserver_is_let_in_when_a_loader_has_read_a_sample() -> None:
    """It need not have been handed out: the loader reads no further than it has room."""
    channel = Channel(2)
    for number in range(2):
        channel.send_nowait(number)

    async def main() -> None:
        waiting = asyncio.create_task(channel.reserve())
        await turns(3)
        assert not waiting.done()
        loader = Pipeline(channel).batch(2, collate_fn=list).prefetch(1)
        batches = aiter(loader)
        assert await anext(batches) == [0, 1]
        with await waiting as slot:
            slot.send(2)
        begun = 3
        while True:  # nobody takes a batch: how many more may begin?
            try:
                channel.reserve_nowait().send(begun)
            except asyncio.QueueFull:
                await turns()
                if channel.qsize() == 2:
                    break
            else:
                begun += 1
        ahead = sum(stage.room for stage in loader.stats().stages) * 2 + 2  # and the batch that fills up
        assert begun - 2 <= 2 + ahead
        await loader.aclose()

    run(main)


def test_a_cancelled_reserve_has_taken_nothing() -> None:
    """Also in the turn in which a place is promised to it: that goes to the next."""
    channel = Channel(1)
    channel.send_nowait(0)

    async def main() -> None:
        early, first, second = [asyncio.create_task(channel.reserve()) for _ in range(3)]
        await turns(3)
        early.cancel()
        await turns(3)
        assert len(channel._senders) == 2
        assert taken(channel, 1) == [0]  # makes room, without a turn of the loop
        first.cancel()
        with pytest.raises(asyncio.QueueFull):  # it is the second's, not that of the next who comes
            channel.reserve_nowait()
        (await second).send(1)
        assert first.cancelled()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await channel.reserve()

    run(main)
    assert (taken(channel, 2), channel._promised, len(channel._senders)) == ([1], 0, 0)


@pytest.mark.filterwarnings("ignore:.*was dropped unused:ResourceWarning")
def test_a_place_whose_taker_is_cancelled_later_is_not_lost() -> None:
    """A task holds the slot that `reserve` gave it, and whoever waits for that task gives up: nobody has the slot."""
    channel = Channel(1)

    async def main() -> None:
        for _ in range(20):
            reserving = asyncio.create_task(channel.reserve())
            waiting = asyncio.create_task(asyncio.wait_for(reserving, 1000))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            del reserving, waiting
            await asyncio.sleep(0)  # what woke this task up still knows the other one
            gc.collect()
            channel.reserve_nowait().release()

    run(main)


@pytest.mark.parametrize("room_comes", [False, True])
def test_a_sync_reserve_whose_time_is_over_as_a_place_comes(room_comes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the place if that came first; else it has none and never will."""
    channel = Channel(1)
    channel.send_nowait(0)

    class JustThen(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if room_comes:
                assert taken(channel, 1) == [0]
            return False

    sender = channel.sender_sync()
    with monkeypatch.context() as patched:
        patched.setattr("aioloader.sources.channel_waiting.threading.Event", JustThen)
        if room_comes:
            sender.reserve(timeout=5).send(1)
        else:
            with pytest.raises(TimeoutError, match="no free place for 5 s"):
                sender.reserve(timeout=5)
    assert taken(channel, 1) == [int(room_comes)]
    channel.reserve_nowait().release()


def test_ctrl_c_as_a_place_comes_leaves_it_free(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = Channel(1)
    channel.send_nowait(0)

    class JustThen(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert taken(channel, 1) == [0]
            raise KeyboardInterrupt

    sender = channel.sender_sync()
    with monkeypatch.context() as patched:
        patched.setattr("aioloader.sources.channel_waiting.threading.Event", JustThen)
        with pytest.raises(KeyboardInterrupt):
            sender.reserve()
    channel.reserve_nowait().release()


def test_a_reserver_whose_loop_is_closed_holds_no_place() -> None:
    """Its task will never run again; the others go on."""
    channel = Channel(1)
    channel.send_nowait(0)
    loop = asyncio.new_event_loop()
    task = loop.create_task(channel.reserve())
    loop.run_until_complete(turns(3))
    loop.close()
    reserving = Started(lambda: channel.sender_sync().reserve())
    run(lambda: until(lambda: len(channel._senders) == 2))
    assert taken(channel, 1) == [0]
    reserving.outcome().send(1)
    assert taken(channel, 1) == [1]
    loop.set_exception_handler(lambda *_: None)  # "destroyed but it is pending"
    del task


def test_a_blocking_reserve_in_an_event_loop_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"reserve\(\) of a sync sender blocks.* await channel.reserve"):
            Channel(1).sender_sync().reserve()

    run(main)


# -- the end ---------------------------------------------------------------------------------------------------------


def test_close_ends_those_who_wait_and_the_slots_there_are() -> None:
    """What is in the channel comes; a slot has no sample yet, and nobody knows whether there ever will be one."""
    channel = Channel(2)
    channel.send_nowait(0)
    slot = channel.reserve_nowait()

    async def main() -> None:
        waiting = asyncio.create_task(channel.reserve())
        await turns(3)
        thread = Started(lambda: channel.sender_sync().reserve())
        await until(lambda: len(channel._senders) == 2)
        channel.close(ValueError("enough"))
        with pytest.raises(ChannelClosedError, match="the channel is closed") as caught:
            await waiting
        assert str(caught.value.__cause__) == "enough"
        with pytest.raises(ChannelClosedError):
            await asyncio.to_thread(thread.outcome)
        with pytest.raises(ChannelClosedError, match="closed: no place was reserved"):
            await channel.reserve()

    run(main)
    with pytest.raises(ChannelClosedError, match="closed: no place was reserved"):
        channel.reserve_nowait()
    with pytest.raises(ChannelClosedError, match="the sample was not sent"):
        slot.send(1)
    slot.release()
    assert not channel._promised
    with Steps(Pipeline(channel), "for") as steps:
        assert steps.next() == 0
        with pytest.raises(ValueError, match="enough"):
            steps.next()


def test_a_place_that_was_promised_as_the_channel_is_closed_is_none() -> None:
    """The loader reads, and the channel is closed, in the turn before the reserver comes to it."""
    channel = Channel(1)
    channel.send_nowait(0)

    async def main() -> None:
        waiting = asyncio.create_task(channel.reserve())
        await turns(3)
        assert taken(channel, 1) == [0]
        channel.close()
        with pytest.raises(ChannelClosedError):
            await waiting

    run(main)
    assert not channel._promised


def test_a_sender_that_is_closed_gives_its_slots_back() -> None:
    """Its error is kept for the consumer, and with it the frame that has the slot: nobody must wait for that."""
    channel = Channel(1)
    first, second = channel.sender(), channel.sender()

    async def worker() -> None:
        with first:
            slot = await first.reserve()
            raise KeyError(slot.__class__)

    async def main() -> None:
        failing = asyncio.create_task(worker())
        await asyncio.wait([failing])
        with second:
            with await second.reserve() as slot:  # there is one place
                slot.send(1)
            with pytest.raises(asyncio.QueueFull):
                second.reserve_nowait()

    run(main)
    with Steps(Pipeline(channel), "for") as steps:
        one, error = steps.outcomes()
    assert (one, type(error)) == (1, KeyError)


def test_a_slot_of_a_closed_sender_sends_nothing() -> None:
    channel = Channel(3)
    sender, other = channel.sender_sync(), channel.sender_sync()
    slot = sender.reserve()
    used = sender.reserve_nowait()
    used.send(1)
    sender.close()
    for late in (slot, used):
        with pytest.raises(ChannelClosedError, match="this sender is closed"):
            late.send(2)
    for ask in (sender.reserve, sender.reserve_nowait):
        with pytest.raises(ChannelClosedError, match="this sender is closed"):
            ask()
    assert (channel.qsize(), channel._promised) == (1, 0)
    other.close()
    assert list(Pipeline(channel)) == [1]


def test_a_sender_that_is_closed_while_it_waits_for_a_place_gets_none() -> None:
    channel = Channel(1)
    channel.send_nowait(0)
    sender, other = channel.sender(), channel.sender()

    async def main() -> None:
        waiting = asyncio.create_task(sender.reserve())
        await turns(3)
        sender.close()
        assert taken(channel, 1) == [0]
        with pytest.raises(ChannelClosedError, match="this sender is closed"):
            await waiting

    run(main)
    with other.reserve_nowait() as slot:
        slot.send(1)
    assert not channel._promised


@pytest.mark.parametrize("do", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_slot_cannot_be_pickled_or_copied(do: Callable[[Any], Any]) -> None:
    with Channel(1).reserve_nowait() as slot, pytest.raises(TypeError, match="cannot be pickled or copied"):
        do(slot)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_no_slots() -> None:
    """Using one says so, and one that is collected there waits for no lock."""
    channel = Channel(1)
    slot: Slot | None = channel.reserve_nowait()
    reading, writing = os.pipe()
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with channel._lock:
            held.set()
            forked.wait(DEADLINE)

    holding = Started(hold)  # a thread that is not there in the child, where the lock stays locked
    assert held.wait(DEADLINE)
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            assert slot is not None
            slot.send(1)
        except RuntimeError as error:
            said = str(error).encode()
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(DEADLINE))
            slot = None
            gc.collect()
            os.write(writing, said)
            os._exit(0)
    forked.set()
    holding.outcome()
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as told:
        assert b"made before a fork and belongs to the parent process" in told.read()
    assert slot is not None
    slot.release()


# -- drop_oldest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when_full", ["drop", "", None, 1, ["wait"]])
def test_when_full_is_one_of_two(when_full: Any) -> None:
    with pytest.raises(ValueError, match=r"when_full must be 'wait' or 'drop_oldest', got"):
        Channel(1, when_full)


@on_both_faces
def test_the_newest_samples_stay(face: Face) -> None:
    """`send` waits for nobody, from tasks and threads; what was dropped is counted."""
    channel = Channel(3, when_full="drop_oldest")

    async def main() -> None:
        for number in range(4):
            await channel.send(number)

    run(main)
    for number in range(4, 7):
        channel.send_nowait(number)
    channel.sender_sync().send(7)
    assert (channel.qsize(), channel.dropped) == (3, 5)
    channel.close()
    with pytest.raises(ChannelClosedError):
        channel.send_nowait(8)
    assert collect(Pipeline(channel), face) == [5, 6, 7]
    assert channel.dropped == 5


@on_both_faces
def test_stats_tell_what_was_dropped_while_a_loader_read(face: Face) -> None:
    """At the source, from when this loader began."""
    channel = Channel(2, when_full="drop_oldest")
    for number in range(3):
        channel.send_nowait(number)
    loader = Pipeline(channel).drop_if(never).prefetch(0)  # begins nothing before it is asked for
    with Steps(loader, face) as steps:
        found = [steps.next()]
        for number in range(3, 20):
            channel.send_nowait(number)
        channel.close()
        found += steps.rest()
    assert found[0] == 1
    assert found[-2:] == [18, 19]
    source, *_ = loader.stats().stages
    assert (source.name, source.dropped) == ("source(Channel)", channel.dropped - 1)
    assert len(found) + source.dropped == 19


def never(_: Any) -> bool:
    return False


def test_reserved_places_are_not_dropped() -> None:
    """Where they are all there is, it is the new sample that has no place."""
    channel = Channel(2, when_full="drop_oldest")
    slot = channel.reserve_nowait()
    for number in range(3):
        channel.send_nowait(number)
    assert (list(channel._samples), channel.dropped) == ([2], 2)
    with pytest.raises(asyncio.QueueFull):  # nothing is dropped for a sample that is yet to be made
        channel.reserve_nowait()
    assert taken(channel, 1) == [2]
    other = channel.reserve_nowait()
    channel.send_nowait(3)
    assert (channel.qsize(), channel.dropped) == (0, 3)
    other.send(4)
    slot.send(5)
    assert (list(channel._samples), channel.dropped) == ([4, 5], 3)


def test_a_reserver_waits_where_samples_are_dropped() -> None:
    """Its place comes when a loader has read; until then `send` has its way with the samples."""
    channel = Channel(1, when_full="drop_oldest")

    async def main() -> None:
        channel.send_nowait(0)
        waiting = asyncio.create_task(channel.reserve())
        await turns(3)
        await channel.send(1)
        await turns(3)
        assert not waiting.done()
        assert taken(channel, 1) == [1]
        await channel.send(2)  # the place is promised: this one has none
        (await waiting).send(3)

    run(main)
    assert (list(channel._samples), channel.dropped) == ([3], 2)


@on_both_faces
def test_what_goes_back_is_dropped_only_for_newer_samples(face: Face) -> None:
    """A `break` alone loses nothing, even where more goes back than there is room; it was sent before all others."""
    channel = Channel(4, when_full="drop_oldest")
    for number in range(4):
        channel.send_nowait(number)
    loader = Pipeline(channel).map(str, concurrency=4).batch(1, collate_fn=list).prefetch(3)
    with Steps(loader, face) as steps:
        assert steps.next() == ["0"]
        if face == "for":
            run(lambda: until(lambda: not channel.qsize()))
        else:
            steps.do(lambda: until(lambda: not channel.qsize()))
        for number in range(4, 8):
            channel.send_nowait(number)
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)
    kept = list(channel._samples)
    assert kept == list(range(1, 8))
    assert channel.dropped == 0
    channel.send_nowait(8)
    assert (list(channel._samples), channel.dropped) == ([5, 6, 7, 8], 4)
    channel.close()
    assert collect(loader, face) == [["5"], ["6"], ["7"], ["8"]]


# -- any order of it all ---------------------------------------------------------------------------------------------


class Model:
    """A channel that is a list of samples, a number of slots and a queue of those who wait; it knows no tasks."""

    def __init__(self, maxsize: int, *, drops: bool) -> None:
        self.maxsize, self.drops = maxsize, drops
        self.samples: deque[int] = deque()
        self.slots: set[int] = set()
        self.waiting: list[tuple[str, int]] = []
        self.dropped = 0
        self.closed = False
        self.outcomes: dict[int, str] = {}

    @property
    def full(self) -> bool:
        return len(self.samples) + len(self.slots) >= self.maxsize

    def ask(self, kind: str, number: int) -> None:
        if self.closed:
            self.outcomes[number] = "closed"
        elif kind == "send" and self.drops:
            while self.samples and self.full:
                self.samples.popleft()
                self.dropped += 1
            if self.full:
                self.dropped += 1
            else:
                self.samples.append(number)
            self.outcomes[number] = "done"
        else:
            self.waiting.append((kind, number))
            self.let_in()

    def let_in(self) -> None:
        while self.waiting and not self.full:
            kind, number = self.waiting.pop(0)
            self.outcomes[number] = "done"
            if kind == "send":
                self.samples.append(number)
            else:
                self.slots.add(number)

    def cancel(self, number: int) -> None:
        self.waiting = [(kind, other) for kind, other in self.waiting if other != number]
        self.outcomes[number] = "cancelled"

    def use(self, number: int, sample: int | None) -> str:
        self.slots.discard(number)
        if sample is not None and self.closed:
            return "closed"
        if sample is not None:
            self.samples.append(sample)
        self.let_in()
        return "done"

    def take(self, count: int) -> list[int]:
        found = [self.samples.popleft() for _ in range(min(count, len(self.samples)))]
        self.let_in()
        return found

    def put_back(self, samples: list[int]) -> None:
        self.samples.extendleft(reversed(samples))

    def close(self) -> None:
        self.closed = True
        self.outcomes |= {number: "closed" for _, number in self.waiting}
        self.waiting.clear()


class Driven:
    """The same of a real channel, by tasks."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.tasks: dict[int, asyncio.Task[Any]] = {}
        self.slots: dict[int, Slot] = {}

    def ask(self, kind: str, number: int) -> None:
        self.tasks[number] = asyncio.create_task(self._send(number) if kind == "send" else self._reserve(number))

    async def _send(self, number: int) -> None:
        await self.channel.send(number)

    async def _reserve(self, number: int) -> None:
        self.slots[number] = await self.channel.reserve()

    @property
    def outcomes(self) -> dict[int, str]:
        found = {}
        for number, task in self.tasks.items():
            if task.done():
                failed = None if task.cancelled() else task.exception()
                assert failed is None or isinstance(failed, ChannelClosedError)
                found[number] = "cancelled" if task.cancelled() else "closed" if failed else "done"
        return found

    def use(self, number: int, sample: int | None, draw: random.Random) -> str:
        slot = self.slots.pop(number)
        if sample is None:
            slot.release()
            return "done"
        try:
            if draw.random() < 0.5:
                with slot:
                    slot.send(sample)
            else:
                slot.send(sample)
        except ChannelClosedError:
            return "closed"
        return "done"


async def _schedule(seed: int, *, settles: bool) -> None:
    """Up to 40 moves in one order that is drawn; the model and the channel agree whenever the loop is idle.

    Args:
        seed: Of the order.
        settles: The loop is idle after each move: then they agree on everything, all the time. Else several moves may
            come in one turn of it, and who was let in first may be drawn otherwise by a cancellation: what is compared
            then is what must not depend on it.
    """
    draw = random.Random(seed)
    drops = draw.random() < 0.3
    maxsize = draw.randint(1, 4)
    model = Model(maxsize, drops=drops)
    channel = Channel(maxsize, "drop_oldest" if drops else "wait")
    driven = Driven(channel)
    received: list[int] = []
    sent: list[int] = []  # by slots
    reserved: set[int] = set()  # the numbers of those who asked for one
    last: list[int] = []  # read, and may go back
    excess = 0

    for number in range(draw.randint(5, 40)):
        move = draw.choice(
            ["send", "reserve", "reserve", "use", "use", "release", "cancel", "take", "take", "back", "end"]
        )
        waiting = [key for key, task in driven.tasks.items() if not task.done()]
        if move in ("send", "reserve"):
            model.ask(move, number)
            driven.ask(move, number)
            if move == "reserve":
                reserved.add(number)
        elif move in ("use", "release") and driven.slots:
            key = draw.choice(sorted(driven.slots))
            sample = 1000 + number if move == "use" else None
            outcome = driven.use(key, sample, draw)
            if sample is not None and outcome == "done":
                sent.append(sample)
            if settles:
                assert outcome == model.use(key, sample), f"{seed=}"
        elif move == "cancel" and waiting:
            key = draw.choice(waiting)
            driven.tasks[key].cancel()
            if settles:
                model.cancel(key)
        elif move == "take":
            count = draw.randint(1, 3)
            last = taken(channel, count)
            received += last
            if settles:
                assert last == model.take(count), f"{seed=}"
        elif move == "back" and last:
            channel._put_back(last)
            excess += len(last)
            del received[len(received) - len(last) :]
            if settles:
                model.put_back(last)
            last = []
        elif move == "end" and draw.random() < 0.1:
            channel.close()
            model.close()
        assert channel.qsize() + channel._promised <= maxsize + excess, f"{seed=}"
        if settles or draw.random() < 0.5:
            await turns(3)
            assert channel._promised == len(driven.slots), f"{seed=}"
            assert not channel._senders or channel._full, f"{seed=}: a place is free, and somebody waits"
        if settles:
            assert driven.outcomes == model.outcomes, f"{seed=}"
            assert list(channel._samples) == list(model.samples), f"{seed=}"
            assert driven.slots.keys() == model.slots, f"{seed=}"
            assert channel.dropped == model.dropped, f"{seed=}"

    channel.close()
    await turns(3)
    for slot in driven.slots.values():
        slot.release()
    received += taken(channel, 1000)
    done = {number for number, outcome in driven.outcomes.items() if outcome == "done"}
    by_send = {number for number in received if number < 1000}
    assert len(received) == len(set(received)), f"{seed=}: twice"
    assert by_send <= done, f"{seed=}: what was refused or cancelled came all the same"
    assert (channel._promised, len(channel._senders)) == (0, 0)
    if not drops:
        assert by_send == done - reserved, f"{seed=}: lost"
        assert set(received) - by_send == set(sent), f"{seed=}: lost"
        in_order = [number for number in received if number < 1000]
        assert excess or in_order == sorted(in_order), f"{seed=}: who came first was not let in first"


@pytest.mark.parametrize("settles", [True, False])
@pytest.mark.parametrize("block", range(4))
def test_any_order_of_moves_is_that_of_a_plain_model(block: int, settles: bool) -> None:
    """4000 orders of sending, reserving, using, releasing, cancelling, reading, going back and closing."""

    async def main() -> None:
        for seed in range(500 * block, 500 * (block + 1)):
            await _schedule(seed, settles=settles)

    run(main)


def test_threads_that_reserve_and_give_back_lose_no_place() -> None:
    """Eight threads; some slots are used, some released, some dropped with the frame that had them."""
    channel = Channel(3)
    senders = [channel.sender_sync() for _ in range(8)]
    sent: list[list[tuple[int, int]]] = [[] for _ in senders]

    def work(number: int) -> None:
        draw = random.Random(number)
        with senders[number] as sender:
            for count in range(100):
                with sender.reserve() as slot:
                    if draw.random() < 0.7:
                        slot.send((number, count))
                        sent[number].append((number, count))

    threads = [Started(lambda number=number: work(number)) for number in range(8)]  # type: ignore[misc]
    received = list(Pipeline(channel))
    for thread in threads:
        thread.outcome()
    assert sorted(received) == sorted(sample for samples in sent for sample in samples)
    assert not channel._promised
