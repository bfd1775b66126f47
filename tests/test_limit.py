"""`Limit`: concurrency that any number of stages share, and that may be changed while they run."""

import asyncio
import copy
import gc
import os
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest

from aioloader import Hedge, Limit, Pipeline
from aioloader.testing import Gate
from tests._support import DEADLINE, FACES, Face, Started, Steps, collect, on_both_faces, run, until, wait_until

KINDS = ("async", "threads")


def square(sample: int) -> int:
    return sample * sample


pytestmark = pytest.mark.usefixtures("fork_server")


class Counter:
    """Functions that count how many calls of all of them are under way at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = self.calls = 0

    def enter(self) -> None:
        with self._lock:
            self.now += 1
            self.calls += 1
            self.most = max(self.most, self.now)

    def leave(self) -> None:
        with self._lock:
            self.now -= 1

    def function(self, kind: str, gate: Gate | None = None) -> Callable[[Any], Any]:
        """A function of that kind, which waits at `gate`."""

        async def awaited(sample: Any) -> Any:
            self.enter()
            try:
                if gate is None:
                    await asyncio.sleep(0)
                else:
                    await gate.passing(sample)
            finally:
                self.leave()
            return sample

        def in_thread(sample: Any) -> Any:
            self.enter()
            try:
                if gate is not None:
                    gate.pass_sync(sample)
            finally:
                self.leave()
            return sample

        return awaited if kind == "async" else in_thread


def _close(loader: Pipeline, steps: Steps, face: Face) -> None:
    if face == "for":
        loader.close()
    else:
        steps.do(loader.aclose)


# -- the object --------------------------------------------------------------------------------------------------------


def test_a_limit_is_a_number_that_can_be_changed() -> None:
    limit = Limit(64)
    assert (limit.value, limit.under_way, repr(limit)) == (64, 0, "Limit(64)")
    limit.value = 96
    assert limit.value == 96


@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_is_at_least_one(value: int) -> None:
    with pytest.raises(ValueError, match=r"at least 1, got .*paused"):
        Limit(value)
    limit = Limit(3)
    with pytest.raises(ValueError, match="at least 1"):
        limit.value = value
    assert limit.value == 3


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
def test_a_limit_is_an_integer(value: Any) -> None:
    with pytest.raises(TypeError, match="integer"):
        Limit(value)
    limit = Limit(3)
    with pytest.raises(TypeError, match="integer"):
        limit.value = value
    assert limit.value == 3


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda limit: pickle.loads(pickle.dumps(limit))])
def test_a_copy_is_a_limit_of_its_own(make: Callable[[Limit], Limit]) -> None:
    limit = Limit(3)
    other = make(limit)
    other.value = 5
    assert (limit.value, other.value) == (3, 5)


@pytest.mark.parametrize("concurrency", [True, 2.0, "2"])
def test_concurrency_names_the_limit_as_a_way_out(concurrency: Any) -> None:
    with pytest.raises(TypeError, match="Limit"):
        Pipeline(range(3)).map(abs, concurrency=concurrency)


def test_a_loader_with_a_limit_can_be_pickled() -> None:
    limit = Limit(3)
    loader = pickle.loads(pickle.dumps(Pipeline(range(9)).map(abs, concurrency=limit).map(str, concurrency=limit)))
    assert list(loader) == [str(number) for number in range(9)]
    first, second = (stage.concurrency for stage in loader._plan.stages)
    assert first is second is not limit


def test_in_process_refuses_a_limit() -> None:
    limit = Limit(3)
    with pytest.raises(ValueError, match=r"map\(abs\).*Limit\(3\).*concurrency=3"):
        Pipeline(range(9)).map(abs, concurrency=limit).in_process()
    mixed = Pipeline.merge(Pipeline(range(9)).map(abs, concurrency=limit), range(3))
    with pytest.raises(ValueError, match="Limit"):
        mixed.in_process()


def test_ahead_is_at_least_the_limit_of_now() -> None:
    with pytest.raises(ValueError, match="ahead"):
        Pipeline(range(9)).map(abs, concurrency=Limit(8), ahead=4)


# -- its books ---------------------------------------------------------------------------------------------------------


class Party:
    """A stage of a simulation: what `Slots` tells, it notes."""

    def __init__(self, limit: Limit, loop: asyncio.AbstractEventLoop) -> None:
        self.told = 0
        self.slots = limit.join(loop, self._told, on_loop=True)

    def _told(self) -> None:
        self.told += 1


@pytest.mark.parametrize("seed", range(20))
def test_books_are_right_in_any_order(seed: int) -> None:
    """Thousands of random schedules: never more than the value, and no free slot while somebody waits."""

    async def main() -> None:
        for number in range(200):
            await schedule(random.Random(f"{seed} {number}"))

    async def schedule(rng: random.Random) -> None:
        loop = asyncio.get_running_loop()
        limit = Limit(rng.randint(1, 4))
        parties = [Party(limit, loop) for _ in range(rng.randint(1, 5))]
        for _ in range(40):
            party = rng.choice(parties)
            slots = party.slots
            before = sum(one.slots.held for one in parties)
            match rng.randrange(7):
                case 0 | 1:
                    taken = slots.take()
                    assert not taken or before < limit.value
                    assert taken or slots.waits
                case 2 | 3 if slots.held:
                    slots.release()
                case 4 if slots.held:
                    first, used = next(iter(limit._ledger._queue), slots), limit._ledger.used
                    assert slots.keep() == (first is slots and used <= limit.value)
                case 5:
                    limit.value = rng.randint(1, 5)
                case 6:
                    if rng.random() < 0.3:
                        slots.close(all_of_it=True)
                        parties[parties.index(party)] = Party(limit, loop)
                    else:
                        slots.give_back(waits=rng.random() < 0.5)
            _check(limit, parties)
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        for party in parties:
            party.slots.close(all_of_it=True)
        assert limit.under_way == 0
        assert limit._ledger.used == 0

    asyncio.run(main())


def _check(limit: Limit, parties: list[Party]) -> None:
    ledger = limit._ledger
    every = [party.slots for party in parties]
    assert ledger.used == sum(slots.held + slots.granted for slots in every)
    assert ledger.granted == sum(slots.granted for slots in every)
    assert limit.under_way == sum(slots.held for slots in every)
    assert [slots for slots in every if slots.waits] == [slots for slots in every if slots in ledger._queue]
    assert len(set(ledger._queue)) == len(ledger._queue)
    if any(slots.waits for slots in every):
        assert ledger.used >= limit.value, "a slot is free, and somebody waits"
    assert ledger.pressed == (ledger.used > limit.value or bool(ledger._queue))


def test_a_slot_is_granted_to_who_has_waited_longest() -> None:
    async def main() -> None:
        limit = Limit(1)
        loop = asyncio.get_running_loop()
        hot, second, third = (Party(limit, loop) for _ in range(3))
        assert hot.slots.take()
        assert not second.slots.take()
        assert not third.slots.take()
        hot.slots.release()
        assert not hot.slots.take(), "it is back first, and was not first"
        await asyncio.sleep(0)
        assert (second.told, third.told) == (1, 0)
        assert second.slots.take()
        assert not second.slots.keep(), "third waits"
        await asyncio.sleep(0)
        assert third.slots.take()
        assert not second.slots.take()
        third.slots.release()
        assert hot.slots.take()

    asyncio.run(main())


def test_books_are_right_in_many_threads() -> None:
    """Threads take, keep and release, one changes the value, and the garbage collector gives back."""
    limit = Limit(3)
    counter = Counter()
    loop = asyncio.new_event_loop()
    runner = Started(loop.run_forever)
    start = threading.Barrier(5)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        party = Party(limit, loop)
        start.wait(DEADLINE)
        for _ in range(2000):
            if party.slots.take():
                counter.enter()
                while rng.random() < 0.5:
                    counter.leave()
                    if not party.slots.keep():
                        break
                    counter.enter()
                else:
                    counter.leave()
                    party.slots.release()
        party.slots.close()

    threads = [Started(lambda seed=seed: work(seed)) for seed in range(4)]  # type: ignore[misc]
    start.wait(DEADLINE)
    while any(thread.is_alive() for thread in threads):
        limit.value = 1
        limit.value = 3
    for thread in threads:
        thread.outcome()
    loop.call_soon_threadsafe(loop.stop)
    runner.outcome()
    loop.close()
    assert counter.most <= 3
    assert limit._ledger.used == 0
    assert limit._ledger.granted == 0


def test_a_signal_handler_or_a_collection_may_come_while_the_books_are_open() -> None:
    """Whoever holds the lock is not waited for: he does what was asked when he is done."""

    async def main() -> None:
        limit = Limit(2)
        party = Party(limit, asyncio.get_running_loop())
        assert party.slots.take()
        with limit._ledger.lock:
            limit.value = 5
            party.slots.release()
            party.slots.close()
        assert not party.slots.take(), "closed"
        assert (limit.value, limit.under_way) == (5, 0)

    asyncio.run(main())


def test_what_is_lost_with_its_loop_gives_back() -> None:
    """A loop that is closed under a stage, a stage that is collected, and a loop that stands still."""
    limit = Limit(1)
    loop = asyncio.new_event_loop()
    lost = Party(limit, loop)
    assert lost.slots.take()
    loop.close()

    async def others() -> Party:
        mine = Party(limit, asyncio.get_running_loop())
        assert mine.slots.take(), "the loop of who has it is closed"
        return mine

    standing = asyncio.new_event_loop()
    mine = standing.run_until_complete(others())
    del mine
    gc.collect()
    assert limit._ledger.used == 0

    async def wait() -> Party:
        mine = Party(limit, asyncio.get_running_loop())
        blocker.slots.held or blocker.slots.take()
        assert not mine.slots.take()
        return mine

    blocker = Party(limit, standing)
    waiting = standing.run_until_complete(wait())
    blocker.slots.release()

    async def third() -> None:
        mine = Party(limit, asyncio.get_running_loop())
        assert mine.slots.take(), "the loop of who waits stands still"
        mine.slots.close(all_of_it=True)

    asyncio.run(third())

    async def again() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.told
        assert waiting.slots.take()

    standing.run_until_complete(again())
    standing.close()


# -- stages ------------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_order_and_samples_are_as_without_it(kind: str, face: Face) -> None:
    limit = Limit(4)
    counter = Counter()
    fn = counter.function(kind)
    loader = Pipeline(range(500)).map(fn, concurrency=limit).filter(bool).map(fn, concurrency=limit).batch(8)
    batches = [batch.tolist() for batch in collect(loader, face)]
    assert [sample for batch in batches for sample in batch] == list(range(1, 500))
    assert counter.most <= 4
    assert limit.under_way == 0


@on_both_faces
@pytest.mark.parametrize("kinds", [("async", "async"), ("threads", "threads"), ("async", "threads")])
def test_two_stages_have_no_more_calls_than_the_limit(kinds: tuple[str, str], face: Face) -> None:
    """Of one window; a slow first one does not keep the second from its turn."""
    limit = Limit(2)
    counter, gate = Counter(), Gate()
    first, second = counter.function(kinds[0], gate), counter.function(kinds[1])
    loader = Pipeline(range(6)).map(first, concurrency=limit).map(lambda x: x).map(second, concurrency=limit)
    with Steps(loader, face) as steps:
        asked = steps.ask()
        steps.until_arrived(gate, 2)
        assert limit.under_way == 2
        assert gate.arrived == (0, 1)
        gate.open(0, 1)
        steps.until_arrived(gate, 4)
        gate.open_all()
        assert [asked(), *steps.rest()] == list(range(6))
    assert counter.most == 2


@pytest.mark.parametrize("kind", KINDS)
def test_two_loaders_on_two_loops_share_it(kind: str) -> None:
    """One by `for` and one by `async for`."""
    limit = Limit(3)
    counter, gate = Counter(), Gate()
    fn = counter.function(kind, gate)
    first = Pipeline(range(20)).map(fn, concurrency=limit)
    second = Pipeline(range(20)).map(fn, concurrency=limit)
    one = Started(lambda: list(first))
    gate.wait_arrived(3)

    async def all_of_it() -> list[int]:
        return [sample async for sample in second]

    two = Started(lambda: run(all_of_it))
    gate.open_all()
    assert one.outcome() == two.outcome() == list(range(20))
    assert counter.most == 3
    assert limit.under_way == 0


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_more_begins_more_at_once_and_fewer_cancels_nobody(kind: str, face: Face) -> None:
    limit = Limit(2)
    counter, gate = Counter(), Gate()
    loader = Pipeline(range(40)).map(counter.function(kind, gate), concurrency=limit)
    gate.open(0)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        steps.until_arrived(gate, 3)
        assert counter.now == 2
        limit.value = 6
        steps.until_arrived(gate, 7)
        stage = loader.stats().stages[-1]
        assert stage.concurrency == 6
        assert stage.room >= 6
        assert counter.now == limit.under_way == 6
        limit.value = 1
        assert counter.now == 6
        gate.open(1, 2, 3, 4)  # two are left: no other begins
        assert [steps.next() for _ in range(4)] == [1, 2, 3, 4]
        assert set(gate.arrived) == set(range(7))
        gate.open(5, 6)
        steps.until_arrived(gate, 8)
        assert counter.now == 1
        gate.open_all()
        assert steps.rest() == list(range(5, 40))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hot_stage_starves_no_other(kind: str) -> None:
    """It is always ready for one more, and releases and takes again at once."""
    limit = Limit(1)
    counter = Counter()
    stop = threading.Event()

    def endless() -> Iterator[int]:
        number = 0
        while not stop.is_set():
            yield number
            number += 1

    hot = iter(Pipeline(endless).map(counter.function(kind), concurrency=limit))
    assert next(hot) == 0
    reader = Started(lambda: sum(1 for _ in hot))
    other = Pipeline(range(100)).map(counter.function(kind), concurrency=limit)
    assert list(other) == list(range(100))
    stop.set()
    reader.outcome()
    assert counter.most == 1


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_waits_for_another_one_of_its_limit_is_no_deadlock(kind: str, face: Face) -> None:
    """Finished samples that wait in a window have no slot."""
    limit = Limit(1)
    counter = Counter()
    fn = counter.function(kind)
    loader = Pipeline(range(30)).map(fn, concurrency=limit).batch(3, collate_fn=list).map(fn, concurrency=limit)
    assert collect(loader.prefetch(1), face) == [[at, at + 1, at + 2] for at in range(0, 30, 3)]
    assert counter.most == 1


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_errors_give_slots_back(kind: str, face: Face) -> None:
    limit = Limit(2)

    async def awaited(sample: int) -> int:
        return 1 // (sample % 2)

    def in_thread(sample: int) -> int:
        return 1 // (sample % 2)

    loader = Pipeline(range(10)).map(awaited if kind == "async" else in_thread, concurrency=limit)
    with Steps(loader, face) as steps:
        for number in range(10):
            if number % 2:
                assert steps.next() == 1
            else:
                with pytest.raises(ZeroDivisionError):
                    steps.next()
    assert limit.under_way == 0


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_broken_off_gives_its_slots_back(kind: str, face: Face) -> None:
    limit = Limit(3)
    counter, gate = Counter(), Gate()
    gate.open(0, 1)
    loader = Pipeline(range(100)).map(counter.function(kind, gate), concurrency=limit)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        assert steps.next() == 1
        steps.until_arrived(gate, 5)
        assert limit.under_way == 3
        if kind == "threads":  # they cannot be cancelled
            gate.open_all()
        _close(loader, steps, face)
    assert limit.under_way == 0
    assert limit._ledger.used == 0
    other = Pipeline(range(9)).map(Counter().function(kind), concurrency=limit)
    assert collect(other, face) == list(range(9))


@on_both_faces
def test_who_waits_for_a_slot_can_be_closed(face: Face) -> None:
    """Closing a stage that waits takes it out of the line."""
    limit = Limit(1)
    gate, later = Gate(), Gate()
    counter = Counter()
    holder = Pipeline(range(1)).map(counter.function("threads", gate), concurrency=limit)
    held = Started(lambda: list(holder))
    gate.wait_arrived(1)
    waiting = Pipeline(range(3)).map(counter.function("async", later), concurrency=limit)

    async def try_it() -> None:
        iterator = aiter(waiting)
        asking = asyncio.ensure_future(anext(iterator))
        await until(lambda: bool(limit._ledger._queue))
        asking.cancel()
        await iterator.aclose()

    run(try_it)
    assert not limit._ledger._queue
    gate.open_all()
    assert held.outcome() == [0]
    assert not later.arrived
    assert collect(Pipeline(range(3)).map(counter.function("async"), concurrency=limit), face) == [0, 1, 2]


@on_both_faces
@pytest.mark.parametrize("executor", ["process", "pool", "threads"])
def test_executors_of_all_kinds_follow_it(executor: str, face: Face) -> None:
    limit = Limit(2)
    pool: Any = executor
    if executor == "pool":
        pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    elif executor == "threads":
        pool = ThreadPoolExecutor(1)
    try:
        loader = Pipeline(range(300)).map(square, concurrency=limit, executor=pool).map(abs, concurrency=limit)
        with loader:
            assert collect(loader, face) == [number * number for number in range(300)]
            limit.value = 5
            with Steps(loader, face) as steps:
                assert steps.next() == 0
                stage = next(stage for stage in loader.stats().stages if "square" in stage.name)
                assert stage.concurrency == (2 if executor == "process" else 5), "no more workers than were started"
            assert limit.under_way >= 0
    finally:
        if executor != "process":
            pool.shutdown()
    assert limit._ledger.used == 0


@on_both_faces
@pytest.mark.parametrize("value", [3, 2])
def test_a_second_call_needs_a_slot_that_is_free(value: int, face: Face) -> None:
    """With three slots there is one for it; with two, another call has it, and there is no second one."""
    limit = Limit(value)
    counter, gate = Counter(), Gate()
    calls: list[int] = []

    async def fetch(sample: int) -> int:
        calls.append(sample)
        counter.enter()
        try:
            if calls.count(sample) == 1:
                await gate.passing(sample)
        finally:
            counter.leave()
        return sample

    loader = Pipeline(range(2)).map(fetch, concurrency=limit, hedge=Hedge(after=0.05, budget=1.0))
    with Steps(loader, face) as steps:
        asked = steps.ask()
        steps.until_arrived(gate, 2)
        if value == 2:
            assert limit.under_way == 2
            gate.open_all()
        first = asked()
        assert [first, *steps.rest()] == [0, 1]
    assert counter.most <= value
    assert len(calls) == (2 if value == 2 else 4)
    assert limit._ledger.used == 0


class Many:
    """A dataset that loads several samples at once."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def __len__(self) -> int:
        return 200

    def __getitem__(self, key: int) -> int:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int]) -> list[int]:
        self.counter.enter()
        self.counter.leave()
        return keys


@on_both_faces
def test_a_dataset_that_loads_many_at_once_is_under_the_limit_of_its_map(face: Face) -> None:
    counter, limit = Counter(), Limit(2)
    loader = Pipeline(Many(counter)).map(counter.function("threads"), concurrency=limit)
    assert collect(loader, face) == list(range(200))
    assert counter.most <= 2
    assert limit._ledger.used == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_has_a_limit_of_its_own() -> None:
    limit = Limit(1)
    gate = Gate()
    counter = Counter()
    loader = Pipeline(range(2)).map(counter.function("threads", gate), concurrency=limit)
    held = Started(lambda: list(loader))
    gate.wait_arrived(1)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            fine = list(Pipeline(range(5)).map(abs, concurrency=limit)) == list(range(5))
            status = 0 if fine and limit.value == 1 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert limit.under_way == 1
    gate.open_all()
    assert held.outcome() == [0, 1]


def _is_free(limit: Limit) -> bool:
    return limit._ledger.used == 0


@pytest.mark.parametrize("face", FACES)
def test_random_schedules_of_stages_and_values(face: Face) -> None:
    """Whatever the pipeline and whenever the value changes: all samples come, in order, within the limit."""
    rng = random.Random(0)
    for _ in range(30):
        limit = Limit(rng.randint(1, 5))
        counter = Counter()
        loader = Pipeline(range(60))
        for _ in range(rng.randint(1, 3)):
            concurrency: Any = limit if rng.random() < 0.8 else rng.randint(1, 4)
            fn = (counter if concurrency is limit else Counter()).function(rng.choice(KINDS))
            loader = loader.map(fn, concurrency=concurrency)
        most = limit.value
        with Steps(loader, face) as steps:
            taken = []
            for number in range(rng.choice([60, 60, 30])):
                taken.append(steps.next())
                if number % 7 == 0:
                    limit.value = rng.randint(1, 5)
                    most = max(most, limit.value)
            assert taken == list(range(len(taken)))
            if len(taken) < 60:
                _close(loader, steps, face)
        assert counter.most <= most
        wait_until(partial(_is_free, limit))  # the loop of `for` ends in its own time
