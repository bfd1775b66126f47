"""`loader.paused`: no sample begins in the block, what is under way goes on, and what is ready is given."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset, get_worker_info

from aioloader import DataLoader, Limit, Pipeline, Rate
from aioloader.engine.pausing import Paused
from aioloader.sources import Channel
from aioloader.testing import Gate
from tests._support import Face, Started, Steps, collect, on_both_faces, run, turns, until, wait_until, workers

KINDS = ("async", "threads")


pytestmark = pytest.mark.usefixtures("fork_server")


class Work:
    """Functions that wait at a gate, and know how many calls have begun and how many are under way."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.begun: list[Any] = []
        self.ended: list[Any] = []

    def function(self, kind: str) -> Callable[[Any], Any]:
        async def awaited(sample: Any) -> Any:
            self.begun.append(sample)
            try:
                await self.gate.passing(sample)
            finally:
                self.ended.append(sample)
            return sample

        def in_thread(sample: Any) -> Any:
            self.begun.append(sample)
            self.gate.pass_sync(sample)
            self.ended.append(sample)
            return sample

        return awaited if kind == "async" else in_thread

    @property
    def under_way(self) -> int:
        return len(self.begun) - len(self.ended)


class Block:
    """`with` beside a `for` loop, in its thread, and `async with` on the loop of `async for`."""

    def __init__(self, steps: Steps, face: Face, paused: Paused) -> None:
        self._steps, self._face, self._paused = steps, face, paused

    def __enter__(self) -> "Block":
        if self._face == "for":
            self._paused.__enter__()
        else:
            self._steps.do(self._paused.__aenter__)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._face == "for":
            self._paused.__exit__()
        else:
            self._steps.do(self._paused.__aexit__)


def settle(steps: Steps, face: Face) -> None:
    """Let everything happen that can happen without anybody."""
    if face == "for":
        for _ in range(50):
            time.sleep(0)
        for thread in threading.enumerate():  # a hop into it and back
            if thread.name.startswith("aioloader"):
                time.sleep(0.001)
    else:
        steps.do(turns)


# -- what a block is ---------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_begins_and_what_is_under_way_goes_on(kind: str, face: Face) -> None:
    work = Work()
    loader = Pipeline(range(20)).map(work.function(kind), concurrency=3)
    work.gate.open(0)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        steps.until_arrived(work.gate, 4)
        with Block(steps, face, loader.paused()):
            assert sorted(work.begun) == [0, 1, 2, 3]
            work.gate.open_all()
            assert [steps.next(), steps.next(), steps.next()] == [1, 2, 3], "they were under way"
            settle(steps, face)
            assert sorted(work.begun) == [0, 1, 2, 3]
        assert steps.rest() == list(range(4, 20))


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_drained_it_is_entered_when_none_is_under_way(kind: str, face: Face) -> None:
    """Also those that are in a later function of the same window."""
    first, second = Work(), Work()
    loader = Pipeline(range(20)).map(first.function(kind), concurrency=3).map(second.function(kind), concurrency=2)
    first.gate.open_all()
    second.gate.open(0)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        steps.until_arrived(second.gate, 3)

        async def enter() -> None:
            entering = asyncio.ensure_future(paused.__aenter__())
            await turns()
            assert not entering.done()
            second.gate.open_all()
            await entering

        paused = loader.paused(drain=True)
        if face == "for":
            entering = Started(paused.__enter__)
            assert second.under_way == 2
            second.gate.open_all()
            entering.outcome()
        else:
            steps.do(enter)
        begun = len(first.begun)
        assert (first.under_way, second.under_way) == (0, 0)
        assert len(second.begun) == begun, "each that has begun has had all of it"
        settle(steps, face)
        assert len(first.begun) == len(second.begun) == begun
        if face == "for":
            paused.__exit__()
        else:
            steps.do(paused.__aexit__)
        assert steps.rest() == list(range(1, 20))


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_calls_whose_samples_nobody_wants_any_more_are_waited_for_too(kind: str, face: Face) -> None:
    """`take` has all that it wants, and calls for more than that are still under way."""
    work, later = Work(), Work()
    stream = Pipeline(lambda: iter(range(20)))
    taken = stream.map(work.function(kind), concurrency=4).take(3)
    loader = taken.map(later.function("async"), concurrency=3).batch(1, collate_fn=list).prefetch(1)
    later.gate.open_all()
    with Steps(loader, face) as steps:
        first = steps.ask()
        steps.until_arrived(work.gate, 4)
        work.gate.open(0, 1, 2)
        assert first() == [0]
        steps.until_arrived(later.gate, 3)  # `take` has all three, and there is no room for the last batch

        async def enter() -> None:
            entering = asyncio.ensure_future(paused.__aenter__())
            await turns()
            assert not entering.done()
            work.gate.open_all()
            await entering

        paused = loader.paused(drain=True)
        if face == "for":
            entering = Started(paused.__enter__)
            settle(steps, face)
            assert entering.is_alive()
            assert work.under_way
            work.gate.open_all()
            entering.outcome()
        else:
            steps.do(enter)
        assert work.under_way == 0
        if face == "for":
            paused.__exit__()
        else:
            steps.do(paused.__aexit__)
        assert steps.rest() == [[1], [2]]


@on_both_faces
def test_blocks_nest_and_overlap(face: Face) -> None:
    """The last one that is left lets samples begin, in whatever thread."""
    work = Work()
    work.gate.open_all()
    loader = Pipeline(range(100)).map(work.function("threads"), concurrency=2)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        outer, inner = loader.paused(), loader.paused(drain=True)
        Started(outer.__enter__) if face == "for" else steps.do(outer.__aenter__)
        with Block(steps, face, inner), Block(steps, face, inner):
            pass
        begun = len(work.begun)
        settle(steps, face)
        assert len(work.begun) <= begun
        if face == "for":
            Started(outer.__exit__).outcome()
        else:
            steps.do(outer.__aexit__)
        assert steps.rest() == list(range(1, 100))


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_that_begins_inside_begins_paused(kind: str, face: Face) -> None:
    work = Work()
    work.gate.open_all()
    reads = []

    def source() -> Iterator[int]:
        for number in range(5):
            reads.append(number)
            yield number

    loader = Pipeline(source).map(work.function(kind), concurrency=3)
    with Steps(loader, face) as steps:
        with Block(steps, face, loader.paused(drain=True)):
            asked = steps.ask()
            settle(steps, face)
            assert (work.begun, reads) == ([], [])
        assert [asked(), *steps.rest()] == list(range(5))


def test_nothing_runs_or_it_is_over() -> None:
    """Before the first epoch and after the last one there is nothing to wait for."""
    loader = Pipeline(range(5)).map(abs)
    with loader.paused(drain=True):
        pass
    assert list(loader) == list(range(5))
    with loader.paused(drain=True) as block:
        assert block is not None

    async def main() -> None:
        async with loader.paused(drain=True):
            pass
        assert [sample async for sample in loader] == list(range(5))
        with loader.paused(drain=True):
            pass

    run(main)


def test_without_workers_there_is_nothing_to_pause() -> None:
    """`next()` makes the samples."""
    loader = DataLoader(list(range(6)), batch_size=2)
    with loader.paused(drain=True):
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]


# -- who waits for it --------------------------------------------------------------------------------------------------


def test_with_in_the_thread_of_the_loop_says_async_with() -> None:
    """It would wait for what cannot go on, whether the loop runs or stands still. Nothing is left paused."""
    work = Work()
    loader = Pipeline(range(9)).map(work.function("async"), concurrency=2)
    work.gate.open(0)
    with Steps(loader, "async for") as steps:
        assert steps.next() == 0
        for attempt in range(2):

            async def enter() -> None:
                with pytest.raises(RuntimeError, match="async with"), loader.paused(drain=True):
                    pytest.fail("entered")
                with loader.paused():  # that needs nobody to go on
                    pass

            steps.do(enter) if attempt else None
            with pytest.raises(RuntimeError, match="async with"), loader.paused(drain=True):
                pytest.fail("entered")
        with loader.paused():
            work.gate.open_all()
            assert [steps.next(), steps.next()] == [1, 2]
            settle(steps, "async for")
            assert work.begun == [0, 1, 2]
        assert steps.rest() == list(range(3, 9))


def test_with_in_the_thread_of_the_loop_cannot_wait_for_processes(tmp_path: Path) -> None:
    """Their answers come on that loop. Nothing is left paused."""
    log = Log(tmp_path / "log")
    with Pipeline(range(100)).map(log, executor="process", concurrency=2) as loader:
        with Steps(loader, "async for") as steps:
            assert steps.next() == 0
            with pytest.raises(RuntimeError, match=r"async with loader.paused\(\)"), loader.paused():
                pytest.fail("entered")
            assert steps.rest() == list(range(1, 100))
        steps_closed(loader)


def test_a_cancelled_wait_leaves_nothing_paused() -> None:
    work = Work()
    loader = Pipeline(range(9)).map(work.function("async"), concurrency=2)

    async def main() -> None:
        iterator = aiter(loader)
        asking = asyncio.ensure_future(anext(iterator))
        await work.gate.until_arrived(2)
        entering = asyncio.ensure_future(loader.paused(drain=True).__aenter__())
        await turns(100)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        work.gate.open_all()
        assert await asking == 0
        assert [sample async for sample in iterator] == list(range(1, 9))

    run(main)


def test_an_interrupted_wait_leaves_nothing_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while `with` waits."""
    work = Work()
    loader = Pipeline(range(9)).map(work.function("threads"), concurrency=2)
    iterator = iter(loader)
    asking = Started(lambda: next(iterator))
    work.gate.wait_arrived(2)

    class Interrupted:
        def put(self, item: None) -> None:
            pass

        def get(self) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("aioloader.engine.pausing.SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt), loader.paused(drain=True):
            pytest.fail("entered")
    work.gate.open_all()
    assert [asking.outcome(), *iterator] == list(range(9))


@on_both_faces
def test_closing_ends_the_wait(face: Face) -> None:
    """The run that was waited for is over."""
    work = Work()
    loader = Pipeline(range(9)).map(work.function("async"), concurrency=2)
    work.gate.open(0)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        steps.until_arrived(work.gate, 3)
        paused = loader.paused(drain=True)
        if face == "for":
            entering = Started(paused.__enter__)
            loader.close()
            entering.outcome()
            paused.__exit__()
        else:

            async def close() -> None:
                entering = asyncio.ensure_future(paused.__aenter__())
                await turns(100)
                assert not entering.done()
                await loader.aclose()
                await entering
                await paused.__aexit__()

            steps.do(close)
    work.gate.open_all()
    assert collect(loader, face) == list(range(9))


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_end_with_their_run_are_under_way_until_they_have_ended(kind: str, face: Face) -> None:
    """A consumer has left its loop: a call that is cancelled cleans up, and one in a thread goes on."""
    gate, under_way = Gate(), set[int]()

    async def awaited(key: int) -> int:
        under_way.add(key)
        try:
            if key:
                await asyncio.Event().wait()
        finally:
            await gate.passing(key)
            under_way.discard(key)
        return key

    def in_thread(key: int) -> int:
        under_way.add(key)
        gate.pass_sync(key)
        under_way.discard(key)
        return key

    loader = Pipeline(range(9)).map(awaited if kind == "async" else in_thread, concurrency=2)
    gate.open(0)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        if kind == "threads":
            steps.until_arrived(gate, 3)
        paused = loader.paused(drain=True)
        if face == "for":
            if kind == "async":
                wait_until(lambda: under_way == {1, 2})
            closing = Started(loader.close)
            steps.until_arrived(gate, 3)
            entering = Started(paused.__enter__)
            settle(steps, face)
            assert entering.is_alive()
            gate.open_all()
            entering.outcome()
            assert not under_way
            paused.__exit__()
            closing.outcome()
        else:

            async def close() -> None:
                await until(lambda: under_way == {1, 2})
                closing = asyncio.ensure_future(loader.aclose())
                await gate.until_arrived(3)
                entering = asyncio.ensure_future(paused.__aenter__())
                await turns(100)
                assert not entering.done()
                gate.open_all()
                await entering
                assert not under_way
                await paused.__aexit__()
                await closing

            steps.do(close)


def test_another_loop_may_pause_it() -> None:
    """`async with` on a loop, of a run on another one; and `with` in a third thread."""
    work = Work()
    loader = Pipeline(range(30)).map(work.function("async"), concurrency=2)
    iterator = iter(loader)
    asking = Started(lambda: next(iterator))
    work.gate.wait_arrived(2)

    async def main() -> None:
        entering = asyncio.ensure_future(loader.paused(drain=True).__aenter__())
        await turns(100)
        assert not entering.done()
        work.gate.open_all()
        paused = await entering
        assert work.under_way == 0
        begun = len(work.begun)
        with loader.paused(drain=True):
            await turns(100)
            assert len(work.begun) == begun
        await paused.__aexit__()

    run(main)
    assert [asking.outcome(), *iterator] == list(range(30))


def test_a_loop_that_is_closed_under_its_run_is_not_waited_for() -> None:
    """The callbacks that it had are thrown away, and with them what was to answer."""
    work = Work()
    loader = Pipeline(range(9)).map(work.function("threads"), concurrency=2)
    work.gate.open_all()
    loop = asyncio.new_event_loop()
    iterators = []

    async def begin() -> None:
        iterators.append(aiter(loader))
        assert await anext(iterators[0]) == 0

    loop.run_until_complete(begin())
    entering = Started(loader.paused().__enter__)
    while not loop._ready:  # type: ignore[attr-defined]
        time.sleep(0)
    for task in asyncio.all_tasks(loop):
        task.cancel()
    pending = asyncio.all_tasks(loop)
    loop.run_until_complete(asyncio.wait(pending))
    loop.close()
    entering.outcome()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_in_a_forked_child_only_its_own_block_is_left() -> None:
    """The threads that were in others are not there."""
    loader = Pipeline(range(5)).map(abs)
    paused = loader.paused()
    Started(paused.__enter__).outcome()

    def child() -> bool:
        fine = list(loader) == list(range(5))
        with loader.paused():
            asking = Started(lambda: list(loader))
            asking.join(0.05)
            fine = fine and asking.is_alive()
        return fine and asking.outcome() == list(range(5))

    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if child() else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    paused.__exit__()
    assert list(loader) == list(range(5))


# -- what pauses -------------------------------------------------------------------------------------------------------


@on_both_faces
def test_ready_batches_are_given_and_finished_samples_become_batches(face: Face) -> None:
    """Collate goes on: the window of batches is not the first one."""
    work = Work()
    collated: list[list[int]] = []

    def collate(samples: list[int]) -> list[int]:
        collated.append(samples)
        return samples

    loader = Pipeline(range(100)).map(work.function("threads"), concurrency=4).batch(2, collate_fn=collate).prefetch(1)
    work.gate.open_all()
    with Steps(loader, face) as steps:
        assert steps.next() == [0, 1]
        with Block(steps, face, loader.paused(drain=True)):
            begun = len(work.begun)
            ready = begun // 2 - 1
            assert [steps.next() for _ in range(ready)] == [[2 * at, 2 * at + 1] for at in range(1, ready + 1)]
            assert len(collated) == ready + 1
            assert len(work.begun) == begun
        assert len(steps.rest()) == 49 - ready


COLLATED: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "Pipeline": lambda fn: Pipeline(list(range(40))).batch(2, collate_fn=fn).prefetch(4),
    "repeated": lambda fn: Pipeline(list(range(20))).repeat(2).batch(2, collate_fn=fn).prefetch(4),
    "mixed": lambda fn: Pipeline.interleave(list(range(20)), list(range(20))).batch(2, collate_fn=fn).prefetch(4),
    "DataLoader": lambda fn: DataLoader(list(range(40)), 2, num_workers=2, collate_fn=fn),
}


@on_both_faces
@pytest.mark.parametrize("name", COLLATED)
def test_where_batches_are_the_first_that_is_worked_on_they_pause(name: str, face: Face) -> None:
    begun: list[Any] = []

    def collate(samples: list[int]) -> list[int]:
        begun.append(samples)
        return samples

    loader = COLLATED[name](collate)
    with Steps(loader, face) as steps:
        taken = [steps.next()]
        with Block(steps, face, loader.paused(drain=True)):
            settle(steps, face)
            count = len(begun)
            while len(taken) < count:
                taken.append(steps.next())
            settle(steps, face)
            assert len(begun) == count < 20
        taken += steps.rest()
    assert sorted(sample for batch in taken for sample in batch) == sorted(collect_reference(name))


def collect_reference(name: str) -> list[int]:
    return list(range(20)) * 2 if name in ("repeated", "mixed") else list(range(40))


@on_both_faces
def test_finished_samples_of_what_is_repeated_or_mixed_become_batches(face: Face) -> None:
    makes: tuple[tuple[Callable[[Any], Pipeline], int], ...] = (  # and calls that make a second batch
        (lambda fn: Pipeline(range(10)).map(fn, concurrency=2).repeat(4), 2),
        (lambda fn: Pipeline.mix([Pipeline(range(20)).map(fn, concurrency=2), range(20)], [1, 1]), 2),
        (lambda fn: Pipeline(range(40)).map(fn, concurrency=2).shuffle(4).skip(1), 7),
    )
    for make, calls in makes:
        work = Work()
        work.gate.open_all()
        loader = make(work.function("threads")).batch(1, collate_fn=list).prefetch(1)
        with Steps(loader, face) as steps:
            steps.next()
            steps.until_arrived(work.gate, calls)
            with Block(steps, face, loader.paused(drain=True)):
                settle(steps, face)
                begun = len(work.begun)
                steps.next()
                settle(steps, face)
                assert len(work.begun) == begun
            steps.rest()
            assert work.under_way == 0


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_window_of_samples_pauses_too(kind: str, face: Face) -> None:
    """After `flat_map` another sample begins."""
    first, second = Work(), Work()
    first.gate.open_all()
    second.gate.open((0, 0))
    loader = (
        Pipeline(range(10))
        .map(first.function(kind), concurrency=2)
        .flat_map(lambda sample: [(sample, 0), (sample, 1), (sample, 2)])
        .map(second.function(kind), concurrency=2)
    )
    with Steps(loader, face) as steps:
        assert steps.next() == (0, 0)
        steps.until_arrived(second.gate, 3)
        with Block(steps, face, loader.paused()):
            second.gate.open_all()
            assert [steps.next(), steps.next()] == [(0, 1), (0, 2)]
            settle(steps, face)
            assert len(second.begun) == 3
            begun = len(first.begun)
            settle(steps, face)
            assert len(first.begun) == begun
        assert len(steps.rest()) == 27


@on_both_faces
def test_sources_are_not_read_further_and_a_read_that_waits_is_not_waited_for(face: Face) -> None:
    work = Work()
    work.gate.open_all()
    channel = Channel(8)
    loader = Pipeline(channel).map(work.function("async"), concurrency=2)
    channel.send_nowait(0)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        with Block(steps, face, loader.paused(drain=True)):
            for number in range(1, 5):
                channel.send_nowait(number)
            settle(steps, face)
            assert work.begun == [0]
        assert [steps.next() for _ in range(4)] == [1, 2, 3, 4]
        channel.close()
        assert steps.rest() == []


@on_both_faces
def test_an_async_source_is_not_read_further(face: Face) -> None:
    read: list[int] = []

    async def numbers() -> AsyncIterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    work = Work()
    work.gate.open_all()
    loader = Pipeline(numbers).map(work.function("async"), concurrency=2)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        with Block(steps, face, loader.paused(drain=True)):
            settle(steps, face)
            count = len(read)
            assert work.under_way == 0
            for _ in range(len(work.begun) - 1):
                steps.next()
            settle(steps, face)
            assert len(read) == count < 100
        assert steps.rest()[-1] == 99


@on_both_faces
def test_what_is_requeued_is_not_begun_again_in_the_block(face: Face) -> None:
    work = Work()
    work.gate.open_all()
    stale: set[int] = set()
    loader = (
        Pipeline(range(30))
        .map(work.function("threads"), concurrency=3)
        .drop_if(stale.__contains__, requeue=True)
        .batch(1, collate_fn=list)
        .prefetch(1)
    )
    with Steps(loader, face) as steps:
        assert steps.next() == [0]
        with Block(steps, face, loader.paused(drain=True)):
            settle(steps, face)
            begun = len(work.begun)
            stale.update(range(30))
            settle(steps, face)
            assert len(work.begun) == begun
            assert work.under_way == 0
            stale.clear()
        assert steps.rest() == [[number] for number in range(1, 30)]


@on_both_faces
@pytest.mark.parametrize("disk", [False, True])
def test_what_a_cache_holds_pauses_as_well(disk: bool, face: Face, tmp_path: Path) -> None:
    first, second = Work(), Work()
    first.gate.open_all()
    second.gate.open_all()
    keep: dict[str, Any] = {"disk": tmp_path} if disk else {"memory_bytes": 1 << 20}
    loader = Pipeline(range(60)).map(first.function("threads"), concurrency=2).cache(**keep)
    loader = loader.map(second.function("threads"), concurrency=2)
    for epoch in range(2):
        with Steps(loader, face) as steps:
            assert steps.next() == 0
            with Block(steps, face, loader.paused(drain=True)):
                counts = len(first.begun), len(second.begun)
                assert (first.under_way, second.under_way) == (0, 0)
                settle(steps, face)
                assert (len(first.begun), len(second.begun)) == counts
            assert steps.rest() == list(range(1, 60))
        assert len(first.begun) == 60
        assert len(second.begun) == 60 * (epoch + 1)


@on_both_faces
def test_granted_slots_go_to_those_that_are_not_paused(face: Face) -> None:
    """A paused stage has no use for a slot of its `Limit`."""
    limit = Limit(1)
    work, other = Work(), Work()
    work.gate.open(0)
    loader = Pipeline(range(9)).map(work.function("threads"), concurrency=limit)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        steps.until_arrived(work.gate, 2)
        waiting = Pipeline(range(3)).map(other.function("async"), concurrency=limit)
        other.gate.open_all()
        with Block(steps, face, loader.paused()):
            reader = Started(lambda: list(waiting))
            work.gate.open_all()
            assert reader.outcome() == [0, 1, 2]
            assert steps.next() == 1
            settle(steps, face)
            assert work.begun == [0, 1]
        assert steps.rest() == list(range(2, 9))


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_for_a_rate_has_not_begun(kind: str, face: Face) -> None:
    """Two calls may begin, and then none for an hour: these need not be waited for."""
    work = Work()
    work.gate.open(0)
    loader = Pipeline(range(9)).map(work.function(kind), concurrency=4, rate=Rate(1 / 3600, burst=2))
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        steps.until_arrived(work.gate, 2)
        work.gate.open_all()
        with Block(steps, face, loader.paused(drain=True)):
            assert steps.next() == 1
            settle(steps, face)
            assert work.begun == work.ended == [0, 1]
        loader.close() if face == "for" else steps.do(loader.aclose)


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_for_the_rate_of_a_later_function_is_under_way(kind: str, face: Face) -> None:
    """It goes on, and the block is entered when it has had all of it."""
    first, second = Work(), Work()
    first.gate.open_all()
    second.gate.open_all()
    loader = Pipeline(range(300)).map(first.function(kind), concurrency=8)
    loader = loader.map(second.function(kind), concurrency=8, rate=Rate(3000, burst=1))
    with Steps(loader, face) as steps:
        for number in range(5):
            assert steps.next() == number
            with Block(steps, face, loader.paused(drain=True)):
                begun = len(first.begun)
                assert len(first.ended) == len(second.begun) == len(second.ended) == begun
                settle(steps, face)
                assert len(first.begun) == len(second.begun) == begun
        assert steps.rest() == list(range(5, 300))


# -- other processes ---------------------------------------------------------------------------------------------------


class Log:
    """Calls in any process, noted in a file: one byte when one begins, and one when it has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def __call__(self, sample: Any) -> Any:
        self._note(b"b")
        self._note(b"e")
        return sample

    def _note(self, byte: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(byte)

    @property
    def begun(self) -> int:
        return self.path.read_bytes().count(b"b")

    @property
    def under_way(self) -> int:
        return self.begun - self.path.read_bytes().count(b"e")


class Logged:
    """A dataset whose samples are noted."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __len__(self) -> int:
        return 400

    def __getitem__(self, key: int) -> int:
        return int(self.log(key))


class LoggedStream(IterableDataset[int]):
    """The same, read by each worker."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        yield from map(self.log, range(first, 400, step))


ELSEWHERE: dict[str, Callable[[Log], Any]] = {
    "executor": lambda log: Pipeline(range(400)).map(log, executor="process", concurrency=2).batch(4),
    "in_process": lambda log: Pipeline(range(400)).map(log, concurrency=2).batch(4).in_process(),
    "in_process, samples": lambda log: Pipeline(range(400)).map(log, concurrency=2).in_process().batch(4),
    "both": lambda log: Pipeline(range(400)).map(log, executor="process", concurrency=2).batch(4).in_process(),
    "DataLoader": lambda log: DataLoader(Logged(log), 4, num_workers=2, worker_type="process"),
    "DataLoader, any order": lambda log: DataLoader(
        Logged(log), 4, num_workers=2, worker_type="process", in_order=False
    ),
    "DataLoader, iterable": lambda log: DataLoader(LoggedStream(log), 4, num_workers=2, worker_type="process"),
    "DataLoader, kept": lambda log: DataLoader(
        Logged(log), 4, num_workers=2, worker_type="process", persistent_workers=True
    ),
}


@on_both_faces
@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_processes_pause(name: str, face: Face, tmp_path: Path) -> None:
    """They are told, and answer when no call is under way there."""
    log = Log(tmp_path / "log")
    loader = ELSEWHERE[name](log)
    with loader:
        for _ in range(2):
            taken: list[int] = []
            before = log.begun
            with Steps(loader, face) as steps:
                taken += steps.next().tolist()
                for _ in range(5):
                    with Block(steps, face, loader.paused(drain=True)):
                        count = log.begun
                        assert log.under_way == 0
                        settle(steps, face)
                        assert log.begun == count
                    taken += steps.next().tolist()
                with Block(steps, face, loader.paused()):
                    pass
                for batch in steps.rest():
                    taken += batch.tolist()
            assert sorted(taken) == list(range(400))
            assert log.begun - before == 400
        with Steps(loader, face) as steps, Block(steps, face, loader.paused(drain=True)):
            count = log.begun
            asked = steps.ask()
            settle(steps, face)
            assert log.begun == count, "an epoch that begins in the block begins paused"
        if face == "for":
            loader.close()
            with pytest.raises(Exception, match="closed"):
                asked()
        else:
            steps_closed(loader)


def steps_closed(loader: Any) -> None:
    run(loader.aclose)


@on_both_faces
@pytest.mark.parametrize("name", ["executor", "DataLoader"])
def test_workers_that_die_in_the_block_cost_nothing(name: str, face: Face, tmp_path: Path) -> None:
    """What they had has not begun: others begin it when the block is left."""
    log = Log(tmp_path / "log")
    with ELSEWHERE[name](log) as loader:
        with Steps(loader, face) as steps:
            taken = steps.next().tolist()
            with Block(steps, face, loader.paused(drain=True)):
                for pid in workers():
                    os.kill(pid, signal.SIGKILL)
                with Block(steps, face, loader.paused(drain=True)):
                    assert log.under_way == 0
            for batch in steps.rest():
                taken += batch.tolist()
        assert sorted(taken) == list(range(400))
        if face == "async for":
            steps_closed(loader)


@on_both_faces
@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_executors_of_the_user_pause(kind: Any, face: Face, tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    context = {"mp_context": get_context("spawn")} if kind is ProcessPoolExecutor else {}
    with kind(1, **context) as pool:
        loader = Pipeline(range(300)).map(log, executor=pool, concurrency=4).batch(4)
        with Steps(loader, face) as steps:
            taken = steps.next().tolist()
            for _ in range(10):
                with Block(steps, face, loader.paused(drain=True)):
                    count = log.begun
                    assert log.under_way == 0
                    settle(steps, face)
                    assert log.begun == count
                taken += steps.next().tolist()
            for batch in steps.rest():
                taken += batch.tolist()
        assert taken == list(range(300))
    assert log.begun == 300


# -- races -------------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_no_call_begins_in_any_of_many_blocks(kind: str, face: Face) -> None:
    """Blocks at any moment, of calls that take no time: a thread may be just about to take a sample."""
    work = Work()
    work.gate.open_all()
    loader = Pipeline(range(20000)).map(work.function(kind), concurrency=4)
    with Steps(loader, face) as steps:
        for number in range(200):
            assert steps.next() == number
            with Block(steps, face, loader.paused(drain=True)):
                begun = len(work.begun)
                assert work.under_way == 0
                for _ in range(20):
                    time.sleep(0)
                assert len(work.begun) == begun


def test_many_threads_pause_one_loader() -> None:
    """In no block has anything begun, and when all are left all goes on."""
    work = Work()
    work.gate.open_all()
    loader = Pipeline(range(3000)).map(work.function("threads"), concurrency=4).map(abs, concurrency=2)

    def pause(drain: bool) -> None:
        for _ in range(200):
            with loader.paused(drain=drain):
                begun = len(work.begun)
                if drain:
                    assert work.under_way == 0
                    time.sleep(0)
                    assert len(work.begun) == begun

    threads = [Started(lambda drain=drain: pause(drain)) for drain in (True, True, False)]  # type: ignore[misc]
    assert list(loader) == list(range(3000))
    for thread in threads:
        thread.outcome()
