"""Gauges of now in `stats()`, the ages of samples, and what `explain()` says while nothing is known on average."""

import asyncio
import gc
import multiprocessing.resource_tracker
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, Literal
from weakref import WeakSet

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from aioloader import DataLoader, Pipeline, StageStats, Waits
from aioloader.core.entry import Entry
from aioloader.engine import window as window_module
from aioloader.insight.gauges import Gauges, WaitMeter
from aioloader.insight.meters import StageMeter
from aioloader.sources import Channel
from aioloader.testing import Gate
from tests._support import Face, Started, Steps, collect, explained, join_loader_threads, on_both_faces, run, wait_until

pytestmark = pytest.mark.usefixtures("fork_server")


def stage(loader: Any, name: str) -> StageStats:
    stages: tuple[StageStats, ...] = loader.stats().stages
    return next(one for one in stages if one.name == name)


def mapped(gate: Gate, asynchronous: bool) -> Callable[[int], Any]:
    """A function whose calls stand at the gate of their key."""

    async def wait(key: int) -> int:
        await gate.passing(key)
        return key

    def block(key: int) -> int:
        gate.pass_sync(key)
        return key

    return wait if asynchronous else block


class Asking:
    """A consumer that waits for batches, on either face, in another thread, while the test looks."""

    def __init__(self, loader: Any, face: Face) -> None:
        self._loader, self._face = loader, face
        self.batches: list[Any] = []

    def __enter__(self) -> "Asking":
        self._outcome = Started(lambda: collect(self._loader, self._face))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.batches = self._outcome.outcome()
        else:
            self._loader.close()


class Gated(Dataset[int]):
    """Samples that are loaded when their gate lets them pass."""

    def __init__(self, gate: Gate, count: int) -> None:
        self._gate, self._count = gate, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        self._gate.pass_sync(index)
        return index


class Outcomes:
    """Batches of a loader, and errors in their places."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        with Steps(self._loader, "for") as steps:
            yield from steps.outcomes()


# -- under way ---------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_under_way_is_known_with_the_oldest(face: Face, asynchronous: bool) -> None:
    gate = Gate()
    loader = Pipeline(range(20)).map(mapped(gate, asynchronous), concurrency=4).batch(4)
    name = "map(wait)" if asynchronous else "map(block)"
    with Asking(loader, face) as asking:
        gate.wait_arrived(4)
        first = stage(loader, name)
        assert (first.under_way, first.finished) == (4, 0)
        assert first.oldest_key == "0"
        before = first.oldest_seconds
        wait_until(lambda: stage(loader, name).oldest_seconds > before)
        gate.open(0)
        gate.wait_arrived(5)
        wait_until(lambda: stage(loader, name).oldest_key == "1")
        gate.open(2, 3, 4)  # 1 still stands, and stays the oldest
        gate.wait_arrived(8)
        assert stage(loader, name).oldest_key == "1"
        assert stage(loader, name).under_way == 4
        gate.open_all()
    assert [batch.tolist() for batch in asking.batches] == [list(range(at, at + 4)) for at in range(0, 20, 4)]
    over = stage(loader, name)
    assert (over.under_way, over.finished, over.oldest_seconds, over.oldest_key) == (0, 0, 0.0, "")


@on_both_faces
@pytest.mark.parametrize("asynchronous", [True, False])
def test_finished_samples_wait_behind_a_slow_one(face: Face, asynchronous: bool) -> None:
    """They are not under way, and all stages of a window say how many they are. What was left out waits for nobody."""
    gate = Gate()
    gate.open(*range(1, 20))
    loader = (
        Pipeline(range(20)).map(mapped(gate, asynchronous), concurrency=4).filter(lambda key: key % 2 == 0).batch(4)
    )
    with Asking(loader, face):

        def window() -> list[StageStats]:
            return [one for one in loader.stats().stages if "map(" in one.name or "filter(" in one.name]

        wait_until(lambda: [one.finished for one in window()] == [9] * len(window()) == [9] * (1 + asynchronous))
        assert [one.under_way for one in window()] == [1, 0][: len(window())]
        assert window()[0].oldest_key == "0"
        assert window()[0].room >= 10
        gate.open_all()


def test_a_lone_worker_knows_when_its_sample_began() -> None:
    """Where only one is at work, and more samples wait for it, nobody but the loop's next turn tells it of time."""
    gate = Gate()
    loader = Pipeline(range(10)).map(mapped(gate, asynchronous=True), concurrency=1, ahead=8)
    with Asking(loader, "for"):
        gate.wait_arrived(1)
        wait_until(lambda: stage(loader, "map(wait)").oldest_seconds > 0.05)
        before = perf_counter()
        gate.open(0)
        gate.wait_arrived(2)
        now = stage(loader, "map(wait)")
        assert now.oldest_key == "1"
        assert now.oldest_seconds <= perf_counter() - before
        assert now.samples == 1
        gate.open_all()


class _Held:
    """Key 3 is held until a file is there."""

    def __init__(self, flag: Path) -> None:
        self._flag = flag

    def __call__(self, key: int) -> int:
        pause = threading.Event()
        while key == 3 and not self._flag.exists():
            pause.wait(0.001)
        return key


@pytest.fixture(scope="module", autouse=True)
def resource_tracker() -> None:
    """What a spawned process needs, and keeps open for as long as this one lives."""
    multiprocessing.resource_tracker.ensure_running()


@pytest.mark.parametrize("where", ["process", "pool", "threads", "in_process"])
def test_all_executors_tell_what_is_under_way(tmp_path: Path, where: str) -> None:
    held = _Held(tmp_path / "flag")
    pool: Any = None
    match where:
        case "process" | "in_process":
            executor: Any = "process" if where == "process" else None
        case "pool":
            executor = pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
        case _:
            executor = pool = ThreadPoolExecutor(2)
    loader: Pipeline = Pipeline(range(8)).map(held, concurrency=2, executor=executor)
    if where == "in_process":
        loader = loader.in_process()
    loader = loader.batch(2)

    def now() -> StageStats:
        return next((one for one in loader.stats().stages if one.name.startswith("map(")), None) or _nothing()

    try:
        with loader, Asking(loader, "for"):
            wait_until(lambda: (now().under_way, now().oldest_key) == (1, "3"))
            before = now().oldest_seconds
            wait_until(lambda: now().oldest_seconds > before)
            (tmp_path / "flag").touch()
        assert (now().under_way, now().oldest_seconds) == (0, 0.0)
        assert now().waited_seconds.max > 0
    finally:
        if pool is not None:
            pool.shutdown()


def _nothing() -> StageStats:
    return StageStats("", "sync", 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


def test_a_drop_in_without_workers_tells_another_thread() -> None:
    gate = Gate()
    loader: DataLoader[Any] = DataLoader(Gated(gate, 4), batch_size=2)
    with Asking(loader, "for"):
        gate.wait_arrived(1)
        (fetch,) = [one for one in loader.stats().stages if one.name == "fetch"]
        assert (fetch.under_way, fetch.oldest_key) == (1, "[0, 1]")
        assert loader.stats().waiting_seconds > 0
        assert "1 batch has been under way in fetch" in explained(loader)
        gate.open_all()
    assert loader.stats().waiting_seconds == 0.0


def test_who_has_given_up_waiting_waits_no_more() -> None:
    """A `next()` that was cancelled, or whose time was up, leaves nothing behind; nor does one that gets its batch."""
    gate = Gate()

    async def fetch(sample: int) -> int:
        await gate.passing(sample)
        return sample

    async def main() -> None:
        loader = Pipeline(range(2)).map(fetch)
        async with loader:
            batches = aiter(loader)
            asked = asyncio.ensure_future(anext(batches))
            await gate.until_arrived(1)
            assert loader.stats().waiting_seconds > 0
            asked.cancel()
            await asyncio.wait([asked])
            assert loader.stats().waiting_seconds == 0.0
            gate.open_all()
            assert [sample async for sample in batches] == [0, 1]
            assert loader.stats().waiting_seconds == 0.0

    run(main)


def test_a_next_whose_time_is_up_waits_no_more() -> None:
    gate = Gate()
    loader: DataLoader[Any] = DataLoader(Gated(gate, 2), batch_size=1, num_workers=1, timeout=0.05)
    with loader:
        batches = iter(loader)
        with pytest.raises(RuntimeError, match="timed out"):
            next(batches)
        assert loader.stats().waiting_seconds == 0.0
        gate.open_all()


@on_both_faces
def test_a_flat_map_tells_its_sample_and_a_source_that_it_is_read(face: Face) -> None:
    gate = Gate()

    async def slow() -> AsyncIterator[int]:
        for key in range(3):
            await gate.passing(("source", key))
            yield key

    async def items(key: int) -> AsyncIterator[int]:
        await gate.passing(("items", key))
        yield key

    loader = Pipeline(slow).flat_map(items).batch(1)
    with Asking(loader, face):
        gate.wait_arrived(1)
        source, flat = stage(loader, "source(slow)"), stage(loader, "flat_map(items)")
        assert (source.under_way, source.oldest_key, flat.under_way) == (1, "", 0)
        assert "nothing has come from source(slow)" in explained(loader)
        gate.open(("source", 0))
        gate.wait_arrived(2)
        assert (stage(loader, "flat_map(items)").under_way, stage(loader, "flat_map(items)").oldest_key) == (1, "0")
        assert "1 sample has been under way in flat_map(items)" in explained(loader)
        gate.open_all()
    assert stage(loader, "source(slow)").under_way == stage(loader, "flat_map(items)").under_way == 0


def test_statistics_can_be_asked_at_any_moment() -> None:
    """From another thread, while sets and lists that are looked at change."""

    async def fetch(key: int) -> int:
        await asyncio.sleep(0)
        return key

    def decode(key: int) -> int:
        return key

    loader = Pipeline(range(20_000)).map(fetch, concurrency=32).map(decode, concurrency=4).batch(16)
    over = threading.Event()

    def ask() -> int:
        asked = 0
        while not over.is_set():
            for one in loader.stats().stages:
                assert 0 <= one.under_way <= max(1, one.concurrency)
                assert 0 <= one.finished_slots <= one.room
                assert one.finished >= 0
                assert one.oldest_seconds >= 0
            explained(loader)
            asked += 1
        return asked

    asking = Started(ask)
    try:
        collect(loader, "for")
    finally:
        over.set()
    assert asking.outcome() > 0


# -- waits -------------------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_finished_batch_waits_until_it_is_handed_out(face: Face) -> None:
    """On both faces: under `for` the queue between the threads counts."""
    gate = Gate()
    loops: list[asyncio.AbstractEventLoop] = []

    async def fetch(key: int) -> int:
        loops.append(asyncio.get_running_loop())
        await gate.passing(key)
        return key

    loader = Pipeline(range(6)).map(fetch, concurrency=6).batch(2, collate_fn=list).prefetch(1)
    with Steps(loader, face) as steps:
        gate.open(*range(4))
        assert steps.next() == [0, 1]
        steps.settle(loops[0])
        assert stage(loader, "collate(list)").finished == 1
        assert stage(loader, "map(fetch)").finished == 0
        began = perf_counter()
        while perf_counter() - began < 0.02:
            pass
        assert steps.next() == [2, 3]
        waited = stage(loader, "collate(list)").waited_seconds
        assert waited.max >= 0.02
        assert waited.sum >= waited.max >= waited.p99 >= waited.p50 >= 0
        assert stage(loader, "map(fetch)").waited_seconds.max < waited.max
        gate.open_all()
        assert steps.rest() == [[4, 5]]
    assert stage(loader, "collate(list)").finished == 0
    assert stage(loader, "collate(list)").waited_seconds.max == waited.max


@on_both_faces
def test_samples_wait_for_a_slower_one_before_them(face: Face) -> None:
    gate = Gate()
    gate.open(1, 2, 3)
    loader = Pipeline(range(4)).map(mapped(gate, asynchronous=True), concurrency=4).batch(4)
    with Asking(loader, face):
        gate.wait_arrived(4)
        wait_until(lambda: stage(loader, "map(wait)").finished == 3)
        began = perf_counter()
        while perf_counter() - began < 0.02:
            pass
        gate.open_all()
    waited = stage(loader, "map(wait)").waited_seconds
    assert waited.max >= waited.p50 >= 0.02
    assert waited.sum >= 0.06


def test_what_waits_for_a_worker_is_not_finished() -> None:
    """A call that does not suspend ends when it begins, however long its sample has been in the window."""
    gate = Gate()

    async def fetch(key: int) -> int:
        if key == 0:
            await gate.passing(key)
        return key

    loader = Pipeline(range(4)).map(fetch, concurrency=1, ahead=4).batch(4)
    with Asking(loader, "for"):
        gate.wait_arrived(1)
        wait_until(lambda: stage(loader, "map(fetch)").oldest_seconds > 0.5)
        gate.open_all()
    assert stage(loader, "map(fetch)").waited_seconds.max < 0.5


def test_what_waited_long_is_measured_however_fast_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is taken in quick succession not all is: so a time is looked at that does not stand still meanwhile."""
    monkeypatch.setattr(window_module, "MEASURED_SECONDS", 0.03)

    async def fetch(key: int) -> int:
        return key

    async def main() -> None:
        loader = Pipeline(range(16)).map(fetch, concurrency=8).batch(8).prefetch(0)
        batches = aiter(loader)
        await anext(batches)
        await asyncio.sleep(0.05)  # the others are there at once, and wait
        await anext(batches)
        assert stage(loader, "map(fetch)").waited_seconds.max >= 0.04
        await loader.aclose()

    run(main)


def finished(*since: float) -> list[Entry]:
    """Entries that were finished at these times."""
    entries = [Entry(None, 0, 0) for _ in since]
    for entry, time in zip(entries, since, strict=True):
        entry.since = time
    return entries


@given(st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=16), min_size=1, max_size=120))
def test_waits_are_those_of_the_latest_samples(runs: list[list[float]]) -> None:
    """Sum and maximum are of all, percentiles of a thousand at least, where there were as many."""
    meter = WaitMeter()
    for waits in runs:
        if len(waits) == 1:
            meter.took_one(100.0, 100.0 - waits[0])
        else:
            meter.took(100.0, finished(*(100.0 - wait for wait in waits)), len(waits))
    every = sorted(wait for waits in runs for wait in waits)
    found = meter.waits
    assert found.sum == pytest.approx(sum(every), abs=1e-6)
    assert found.max == pytest.approx(every[-1])
    if len(every) <= 1000:
        for share, wait in ((0.5, found.p50), (0.95, found.p95), (0.99, found.p99)):
            assert wait == pytest.approx(every[round(share * (len(every) - 1))], abs=1e-9)


def test_of_many_that_are_taken_together_some_speak_for_all() -> None:
    """Evenly spread; so the sum is about right."""
    meter = WaitMeter()
    meter.took(1000.0, finished(*range(1000)), 1000)
    assert meter.waits.sum == pytest.approx(sum(range(1, 1001)), rel=0.07)
    assert meter.waits.max == 1000.0


def test_what_waits_are_of_is_bounded() -> None:
    meter = WaitMeter()
    meter.took(5.0, finished(*[0.0] * 10), 10)
    for _ in range(5000):
        meter.took_one(1.0, 0.0)
    assert meter.waits == Waits(5050.0, 5.0, 1.0, 1.0, 1.0)


def test_counters_travel_with_their_gauges() -> None:
    meter = StageMeter("map(f)", "async")
    meter.waits = WaitMeter()
    meter.waits.took_one(2.0, 1.0)
    told = meter.to_tell()
    assert (told.gauge, told.waits, told.gauges) == (None, None, Gauges(waits=Waits(1.0, 1.0, 1.0, 1.0, 1.0)))


# -- rooms -------------------------------------------------------------------------------------------------------------


@given(
    widths=st.lists(st.tuples(st.integers(1, 8), st.booleans(), st.booleans()), min_size=1, max_size=3),
    batch=st.integers(1, 9),
    ahead=st.none() | st.integers(0, 9),
    dropping=st.booleans(),
    prefetch=st.integers(0, 3),
)
def test_there_is_never_more_than_there_is_room_for(
    widths: list[tuple[int, bool, bool]], batch: int, ahead: int | None, dropping: bool, prefetch: int
) -> None:
    """At any moment, and on average."""

    async def on_loop(key: int) -> int:
        if key % 3 == 0:
            await asyncio.sleep(0)
        return key

    def in_thread(key: int) -> int:
        return key

    pipeline = Pipeline(range(120))
    for width, is_async, ordered in widths:
        room = None if ahead is None else width + ahead
        pipeline = pipeline.map(on_loop if is_async else in_thread, concurrency=width, ordered=ordered, ahead=room)
    if dropping:
        pipeline = pipeline.filter(lambda key: key % 4 != 0).drop_if(lambda key: key % 7 == 0)
    loader = pipeline.batch(batch).prefetch(prefetch)

    async def main() -> None:
        async for _ in loader:
            for one in loader.stats().stages:
                assert one.finished_slots <= one.room, one
                assert one.under_way <= max(1, one.concurrency), one
                if one.kind != "source":
                    assert one.finished <= one.room, one

    run(main)


# -- ages --------------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_age_counts_batches_since_the_call_began(face: Face, asynchronous: bool) -> None:
    """Four begin before any batch, and two after each: they are not known to have begun when they came in."""
    gate = Gate()
    loader = Pipeline(range(10)).map(mapped(gate, asynchronous), concurrency=4, ordered=False).batch(2).prefetch(0)
    with Steps(loader.with_info(), face) as steps:
        gate.open(3, 1)
        first = steps.next()[1]
        assert (set(first.keys), first.ages) == ({1, 3}, (0, 0))
        steps.until_arrived(gate, 6)
        later = gate.arrived[4:6]
        gate.open(0, 2)
        assert steps.next()[1].ages == (1, 1)
        gate.open(*later)
        assert set(steps.next()[1].keys) == set(later)
        gate.open_all()


def test_a_call_that_does_not_suspend_knows_what_was_handed_out_meanwhile() -> None:
    """A worker goes on from sample to sample without a turn of the loop, while the consumer's thread takes a batch."""
    gate = Gate()
    loops: list[asyncio.AbstractEventLoop] = []

    async def fetch(key: int) -> int:
        loops.append(asyncio.get_running_loop())
        if key < 5:
            await gate.passing(key)
        else:
            gate.pass_sync(key)
        return key

    loader = Pipeline(range(8)).map(fetch, concurrency=1, ahead=8).batch(2).prefetch(2).with_info()
    with Steps(loader, "for") as steps:
        gate.open(*range(4))
        assert steps.next()[1].keys == (0, 1)
        gate.wait_arrived(5)
        steps.settle(loops[0])  # the next batch is in the queue
        gate.open(4)
        gate.wait_arrived(6)  # the loop stands still in sample 5
        assert steps.next()[1].keys == (2, 3)
        gate.open_all()
        assert steps.next()[1].keys == (4, 5)
        assert steps.next()[1].ages == (1, 1)


@on_both_faces
@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_ages_are_what_max_staleness_lets_them_be(face: Face, most: int, asynchronous: bool) -> None:
    """Samples begin when the batch that is `most` in front of theirs is asked for, and not before."""
    gate = Gate()
    loader = Pipeline(range(20)).map(mapped(gate, asynchronous), concurrency=8).batch(2).max_staleness(most)
    with Asking(loader.with_info(), face) as asking:
        for step in range(10):
            gate.wait_arrived(min(20, 2 * (step + 1 + most)))
            gate.open(2 * step, 2 * step + 1)
    assert [info.ages for _, info in asking.batches] == [(min(step, most),) * 2 for step in range(10)]


@on_both_faces
def test_samples_that_were_made_of_one_have_its_age(face: Face) -> None:
    """Through `flat_map`, `unbatch` and a batch of batches; the batch that they were in before is none of theirs."""
    gate = Gate()
    loader = (
        Pipeline(range(4))
        .map(mapped(gate, asynchronous=True), concurrency=4, ahead=4)
        .flat_map(lambda key: [key, key])
        .batch(4)
        .unbatch()
        .batch(2)
        .prefetch(0)
        .with_info()
    )
    with Steps(loader, face) as steps:
        gate.open_all()
        infos = [info for _, info in steps.rest()]
    assert [info.ages for info in infos] == [(0, 0), (1, 1), (2, 2), (3, 3)]


@on_both_faces
def test_samples_without_a_call_count_from_when_they_were_read(face: Face) -> None:
    """For live samples that is known; keys of data at rest say nothing."""
    channel = Channel(16)
    for key in range(6):
        channel.send_nowait(key)
    channel.close()
    infos = [info for _, info in collect(Pipeline(channel).batch(2).prefetch(1).with_info(), face)]
    assert infos[0].ages == (0, 0)
    assert all(age is not None and age <= info.step for info in infos for age in info.ages)
    assert [info.ages for _, info in collect(Pipeline(range(4)).batch(2).with_info(), face)] == [(None, None)] * 2


def test_a_drop_in_knows_the_ages_of_its_samples() -> None:
    class Rows(Dataset[int]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> int:
            return index

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(8))

    for dataset in (Rows(), Stream()):
        inline: DataLoader[Any] = DataLoader(dataset, batch_size=2)
        for _ in inline:
            info = inline.last_batch_info()
            assert info is not None
            assert info.ages == (0, 0)
    for worker_type in WORKER_TYPES:
        loader: DataLoader[Any] = DataLoader(Rows(), batch_size=2, num_workers=1, worker_type=worker_type)
        with loader:
            ages = []
            for _ in loader:
                info = loader.last_batch_info()
                assert info is not None
                ages.append(info.ages)
        assert ages[0] == (0, 0)
        assert all(first == second for first, second in ages)
        assert {age for age, _ in ages} <= {0, 1, 2}


WORKER_TYPES: tuple[Literal["thread", "process"], ...] = ("thread", "process")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_sample_from_a_cache_begins_when_it_is_looked_up(tmp_path: Path, where: str) -> None:
    loader = Pipeline(range(12)).map(abs)
    loader = loader.cache(memory_bytes=1 << 20) if where == "memory" else loader.cache(disk=tmp_path)
    for _ in range(2):
        infos = [info for _, info in collect(loader.batch(2).with_info(), "for")]
        assert infos[0].ages == (0, 0)
        assert all(age is not None and 0 <= age <= info.step for info in infos for age in info.ages)


@on_both_faces
def test_a_sample_that_is_begun_again_is_young_again(face: Face) -> None:
    gate = Gate()
    stale: set[int] = set()

    def is_stale(key: int) -> bool:
        found = key in stale
        stale.discard(key)
        return found

    loader = (
        Pipeline(range(6))
        .map(mapped(gate, asynchronous=True), concurrency=6, ahead=6)
        .drop_if(is_stale, requeue=True)
        .batch(2)
        .prefetch(0)
        .with_info()
    )
    with Steps(loader, face) as steps:
        gate.open(0, 1)
        assert steps.next()[1].ages == (0, 0)
        stale.add(2)
        gate.open_all()
        second = steps.next()[1]
        assert dict(zip(second.keys, second.ages, strict=True)) == {2: 0, 3: 1}
        assert second.attempts == 2


def test_errors_count_as_batches_and_steps_left_out_do_not() -> None:
    gate = Gate()

    async def refuse(key: int) -> int:
        await gate.passing(key)
        if key == 0:
            raise ValueError(key)
        return key

    loader = Pipeline(range(8)).map(refuse, concurrency=8, ahead=8).batch(2).with_info()
    loader.skip_steps(1, 2)
    with Asking(Outcomes(loader), "for") as asking:
        gate.wait_arrived(8)
        gate.open_all()
    outcomes = asking.batches
    assert isinstance(outcomes[0], ValueError)
    assert [(info.step, info.ages) for _, info in outcomes[1:]] == [(2, (1, 1)), (3, (2, 2))]


@pytest.mark.parametrize("last", [True, False])
def test_ages_cross_into_a_process_of_its_own(last: bool) -> None:
    loader: Pipeline = Pipeline(range(32)).map(str)
    loader = loader.batch(4, collate_fn=list).in_process() if last else loader.in_process().batch(4, collate_fn=list)
    with loader:
        infos = [info for _, info in collect(loader.with_info(), "for")]
    assert infos[0].ages == (0,) * 4
    assert all(age is not None and 0 <= age <= info.step for info in infos for age in info.ages)


# -- what is said ------------------------------------------------------------------------------------------------------


@on_both_faces
def test_hanging_samples_are_named_before_the_first_batch(face: Face) -> None:
    gate = Gate()

    async def rollout(key: int) -> int:
        await gate.passing(key)
        return key

    loader = Pipeline(range(2, 100)).map(rollout, concurrency=8).batch(8)
    with Asking(loader, face):
        gate.wait_arrived(8)
        said = explained(loader)
        assert said.startswith("No batch has come yet: 8 samples have been under way in map(rollout) for ")
        assert " s, the oldest is key 2 " in said
        assert said.endswith(".")
        gate.open_all()
    assert "under way" not in explained(loader)


@on_both_faces
def test_a_filter_that_refuses_everything_is_named(face: Face) -> None:
    gate = Gate()
    gate.open(*range(50))

    def has_variance(_: int) -> bool:
        return False

    loader = Pipeline(range(100)).map(mapped(gate, asynchronous=True), concurrency=4).filter(has_variance).batch(8)
    with Asking(loader, face):
        gate.wait_arrived(54)
        wait_until(lambda: "filter(has_variance) has left out all 50 samples so far" in explained(loader))
        assert "4 samples have been under way in map(wait)" in explained(loader)
        gate.open_all()
    assert "filter(has_variance) has left out all 100 samples so far" in explained(loader)


@on_both_faces
def test_an_idle_channel_is_no_limit(face: Face) -> None:
    channel = Channel(8)
    loader = Pipeline(channel).map(lambda key: key).batch(2)
    with Asking(loader, face):
        wait_until(lambda: "idle" in explained(loader))
        said = explained(loader)
        assert said.startswith("The source is idle: nothing has come from source(Channel) for ")
        assert "nothing in the loader is the limit" in said
        for key in range(5):
            channel.send_nowait(key)
        wait_until(lambda: loader.stats().batches == 2 and loader.stats().waiting_seconds > 1.1)
        said = explained(loader)
        assert said.startswith("The source is idle: no sample has come for ")
        assert "is the limit (2 batches" in said
        channel.close()
    assert "source(Channel) is the limit" not in explained(loader)


def test_a_wait_that_is_long_for_this_loader_is_told_instead_of_averages() -> None:
    gate = Gate()
    gate.open(*range(40))
    loader = Pipeline(range(60)).map(mapped(gate, asynchronous=False), concurrency=2).batch(4)
    with Asking(loader, "for"):
        gate.wait_arrived(42)
        wait_until(lambda: explained(loader).startswith("No batch has come for "))
        assert "2 samples have been under way in map(block) for " in explained(loader)
        assert "the oldest is key 40" in explained(loader)
        gate.open_all()


@on_both_faces
def test_a_hanging_collate_is_told_by_the_keys_of_its_batch(face: Face) -> None:
    gate = Gate()

    async def collate(samples: list[int]) -> list[int]:
        await gate.passing()
        return samples

    loader = Pipeline(range(8)).batch(2, collate_fn=collate)
    with Asking(loader, face):
        gate.wait_arrived(1)
        assert "under way in collate(collate) for " in explained(loader)
        assert "keys [0, 1]" in explained(loader)
        gate.open_all()


@on_both_faces
def test_a_paused_loader_is_called_paused(face: Face) -> None:
    loader = Pipeline(range(4)).map(lambda key: key).batch(2)
    with loader.paused():
        assert loader.stats().paused
        asking = Started(lambda: collect(loader, face))
        wait_until(lambda: loader.stats().waiting_seconds > 0)
        assert "No batch has come yet: the loader is paused" in explained(loader)
    assert len(asking.outcome()) == 2
    assert not loader.stats().paused


class Sample:
    """Something of which it is known when it is gone."""


@on_both_faces
def test_what_can_be_asked_keeps_nothing_alive(face: Face) -> None:
    """When an iterator is dropped, batches that nobody took are gone, too, though `stats()` still works."""
    made: WeakSet[Sample] = WeakSet()

    def make(_: int) -> Sample:
        made.add(sample := Sample())
        return sample

    loader = Pipeline(range(40)).map(make).batch(4, collate_fn=list).prefetch(4)
    with Steps(loader, face) as steps:
        steps.next()
    join_loader_threads()
    gc.collect()
    assert not made
    assert [(one.under_way, one.finished) for one in loader.stats().stages] == [(0, 0)] * 3
