"""Promise 4: at most `concurrency` samples under way, a stated number of finished ones, `prefetch` finished batches."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from aioloader import DataLoader, Pipeline
from aioloader.sources import Channel
from aioloader.testing import Gate, RecordingSource
from tests._support import DEADLINE, Face, Started, Steps, collect, on_both_faces, run, turns, until

pytestmark = pytest.mark.usefixtures("fork_server")


class UnderWay:
    """Counts how many calls are under way, and the most there ever were."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1


def standing_at(gate: Gate, under_way: UnderWay, asynchronous: bool) -> Callable[[int], Any]:
    async def fetch(key: int) -> int:
        with under_way:
            await gate.passing(key)
            return key

    def decode(key: int) -> int:
        with under_way:
            gate.pass_sync(key)
            return key

    return fetch if asynchronous else decode


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_concurrency_is_reached_and_never_passed(
    face: Face, asynchronous: bool, ordered: bool, concurrency: int
) -> None:
    """`concurrency` calls stand side by side; another one begins only when one has ended."""
    gate, under_way = Gate(), UnderWay()
    loader = Pipeline(range(60)).map(
        standing_at(gate, under_way, asynchronous), concurrency=concurrency, ordered=ordered
    )
    consumer = Started(lambda: collect(loader, face))

    gate.wait_arrived(concurrency)
    assert gate.standing == concurrency
    for count in range(1, 6):
        gate.open(gate.arrived[count - 1])
        gate.wait_arrived(concurrency + count)
        assert gate.standing <= concurrency
    gate.open_all()

    assert sorted(consumer.outcome()) == list(range(60))
    assert under_way.most == concurrency


@on_both_faces
def test_concurrency_of_each_map_is_its_own(face: Face) -> None:
    """Neighbouring maps have limits of their own."""
    first, second = UnderWay(), UnderWay()
    gate = Gate()
    gate.open_all()
    loader = (
        Pipeline(range(60))
        .map(standing_at(gate, first, asynchronous=True), concurrency=7)
        .map(standing_at(gate, second, asynchronous=False), concurrency=2)
    )
    assert collect(loader, face) == list(range(60))
    assert first.most <= 7
    assert second.most <= 2


@on_both_faces
@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [1, 3])
def test_batches_are_collated_prefetch_ahead(face: Face, prefetch: int, size: int) -> None:
    """Beside the batch that the consumer has, `prefetch` are made: not fewer, not more."""
    collated = Gate()
    collated.open_all()

    def collate(samples: list[int]) -> list[int]:
        collated.pass_sync()
        return samples

    source = RecordingSource(itertools.count())
    with Steps(Pipeline(source).batch(size, collate_fn=collate).prefetch(prefetch), face) as steps:
        for count in range(1, 8):
            steps.next()
            steps.until_arrived(collated, count + prefetch)
            for _ in range(3):
                steps.settle(source.events[0].loop)
                assert len(collated.arrived) == count + prefetch


@on_both_faces
def test_prefetch_is_two_unless_told(face: Face) -> None:
    """The default of DESIGN: two finished batches."""
    collated = Gate()
    collated.open_all()

    def collate(samples: list[int]) -> list[int]:
        collated.pass_sync()
        return samples

    source = RecordingSource(itertools.count())
    with Steps(Pipeline(source).batch(2, collate_fn=collate), face) as steps:
        steps.next()
        steps.until_arrived(collated, 3)
        for _ in range(3):
            steps.settle(source.events[0].loop)
            assert len(collated.arrived) == 3


@on_both_faces
@pytest.mark.parametrize("concurrency", [1, 8, 64])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_source_is_read_no_further_than_there_is_room(face: Face, concurrency: int, prefetch: int) -> None:
    """While the consumer rests, an endless source is read up to the stated room, then left alone."""

    async def fetch(key: int) -> int:
        await asyncio.sleep(0)
        return key

    source = RecordingSource(itertools.count())
    loader = Pipeline(source).map(fetch, concurrency=concurrency).batch(4, collate_fn=list).prefetch(prefetch)
    with Steps(loader, face) as steps:
        reads = []
        for _ in range(4):
            steps.next()
            for _ in range(4):
                steps.settle(source.events[0].loop)
            reads.append(source.started)
        # What the consumer has had, what waits as batches, a batch that fills up, and the window of the map. DESIGN
        # section 4: as many finished slots as are under way are plenty.
        for count, read in enumerate(reads, 1):
            assert read <= 4 * (count + prefetch + 1) + 2 * concurrency + 64


@on_both_faces
def test_a_slow_first_sample_stops_the_source(face: Face) -> None:
    """Head of line: the first sample does not end, others stand finished behind it, and reading stops."""
    gate = Gate()
    gate.open(*range(1, 10_000))

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    source = RecordingSource(range(200))
    consumer = Started(lambda: collect(Pipeline(source).map(fetch, concurrency=4), face))
    gate.wait_arrived(4)
    loop = source.events[0].loop
    assert loop is not None
    for _ in range(4):
        asyncio.run_coroutine_threadsafe(turns(), loop).result(DEADLINE)
    assert source.started <= 2 * 4 + 64
    gate.open_all()
    assert consumer.outcome() == list(range(200))


@on_both_faces
def test_an_unordered_map_reads_no_further_than_there_is_room(face: Face) -> None:
    """Without order a slow sample holds up nobody, and the rest is bounded all the same."""
    gate = Gate()
    gate.open(*range(1, 100_000))

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    source = RecordingSource(itertools.count())
    with Steps(Pipeline(source).map(fetch, concurrency=4, ordered=False), face) as steps:
        assert steps.rest(300) == list(range(1, 301))
        for _ in range(4):
            steps.settle(source.events[0].loop)
        assert source.started <= 300 + 2 * 4 + 64
        gate.open_all()
        assert 0 in steps.rest(200)


@on_both_faces
@pytest.mark.parametrize("buffer_size", [1, 10])
def test_a_shuffle_buffer_holds_no_more_than_its_size(face: Face, buffer_size: int) -> None:
    """`shuffle(buffer_size)` reads its buffer full, and one sample for each that leaves."""
    source = RecordingSource(itertools.count())
    loader = Pipeline(source).shuffle(buffer_size, seed=1).batch(2, collate_fn=list).prefetch(1)
    with Steps(loader, face) as steps:
        steps.next()
        for _ in range(4):
            steps.settle(source.events[0].loop)
        assert source.started <= buffer_size + 2 * 3 + 64


@on_both_faces
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_endless_flat_map_is_read_no_further_than_there_is_room(face: Face, asynchronous: bool) -> None:
    """A function that gives items without end is no problem: they are asked for as they are needed."""
    read: list[int] = []

    def endless(key: int) -> Iterator[int]:
        for part in itertools.count():
            read.append(part)
            yield part

    async def async_endless(key: int) -> AsyncIterator[int]:
        for part in endless(key):
            yield part

    loader = Pipeline(range(2)).flat_map(async_endless if asynchronous else endless).batch(2, collate_fn=list)
    assert collect(loader, face, limit=3) == [[0, 1], [2, 3], [4, 5]]
    assert len(read) <= 2 * 6 + 64


@on_both_faces
def test_take_reads_no_sample_too_many(face: Face) -> None:
    """`take(n)` right behind a source asks for `n` samples and closes it."""
    source = RecordingSource(itertools.count())
    assert collect(Pipeline(source).take(5), face) == [0, 1, 2, 3, 4]
    assert source.yielded == [0, 1, 2, 3, 4]
    assert source.closed == 1


class Counted(Dataset[int]):
    def __init__(self) -> None:
        self.read = Gate()
        self.read.open_all()

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        self.read.pass_sync(index)
        return index


@on_both_faces
def test_dataloader_without_workers_reads_nothing_ahead(face: Face) -> None:
    """`num_workers=0`: one batch is read when it is asked for."""
    dataset = Counted()
    with Steps(DataLoader(dataset, batch_size=4), face) as steps:
        for count in range(1, 4):
            steps.next()
            assert len(dataset.read.arrived) == 4 * count


@on_both_faces
@pytest.mark.parametrize("prefetch_factor", [None, 1, 3])
def test_dataloader_reads_ahead_as_torchs(face: Face, prefetch_factor: int | None) -> None:
    """At most `prefetch_factor * num_workers` batches are under way or finished; the factor is 2 unless told."""
    ahead = 2 * (prefetch_factor or 2)
    dataset = Counted()
    loader = DataLoader(dataset, batch_size=4, num_workers=2, prefetch_factor=prefetch_factor)
    with Steps(loader, face) as steps:
        for count in range(1, 6):
            steps.next()
            steps.until_arrived(dataset.read, 4 * (count + ahead) - 8)  # it does read ahead
            assert len(dataset.read.arrived) <= 4 * (count + ahead)


# -- no further than `stats()` says ----------------------------------------------------------------------------------


class Begun:
    """Counts the samples that the first function of a pipeline has begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0
        self.loop: asyncio.AbstractEventLoop | None = None

    def begin(self) -> None:
        with self._lock:
            self.count += 1

    async def at_once(self, key: int) -> int:
        self.begin()
        self.loop = asyncio.get_running_loop()
        return key

    async def in_a_turn(self, key: int) -> int:
        await asyncio.sleep(0)
        return await self.at_once(key)

    async def in_a_while(self, key: int) -> int:
        for _ in range(50):
            await asyncio.sleep(0)
        return await self.at_once(key)

    def in_a_thread(self, key: int) -> int:
        self.begin()
        return key


def decode(key: int) -> int:
    return key


def keep(_: int) -> bool:
    return True


def never(_: int) -> bool:
    return False


def items_of(key: int) -> list[int]:
    return [key]


Fetch = Callable[[int], Any]
Describe = Callable[[Fetch], Pipeline]

FETCHES = ["at_once", "in_a_turn", "in_a_while", "in_a_thread"]
ENDLESS = range(1_000_000)

WIDE: dict[str, Describe] = {
    "decode": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).map(decode, concurrency=64),
    "narrow": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).map(decode, concurrency=1),
    "as usual": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).map(decode),
    "filter": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).filter(keep).map(decode, concurrency=64),
    "as completed": lambda fetch: (
        Pipeline(ENDLESS).map(fetch, concurrency=8, ordered=False).map(decode, concurrency=64, ordered=False)
    ),
    "stream": lambda fetch: Pipeline(lambda: iter(ENDLESS)).map(fetch, concurrency=8).map(decode, concurrency=64),
}
"""One window of samples, whose room is that of `fetch`."""


def begun_ahead(loader: Any, face: Face, begun: Begun, size: int) -> int:
    """The most samples that were begun and not handed out whenever the consumer rested."""
    most = 0
    with Steps(loader, face) as steps:
        for count in range(1, 25):
            batch = steps.next()
            assert len(batch) == size
            if count % 3 == 0:
                for _ in range(2):
                    steps.settle(begun.loop)
            most = max(most, begun.count - size * count)
    return most


def room_of(loader: Any, name: str) -> Any:
    """What `stats()` says."""
    return next(stage.room for stage in loader.stats().stages if name in stage.name)


@on_both_faces
@pytest.mark.parametrize("fetch", FETCHES[:3])
@pytest.mark.parametrize("pipeline", WIDE)
def test_a_cheap_stage_lets_none_before_it_begin_more(face: Face, pipeline: str, fetch: str) -> None:
    """However wide it is: what is under way, and two batches; and that is what `stats()` says."""
    begun = Begun()
    loader = WIDE[pipeline](getattr(begun, fetch)).batch(8, collate_fn=list)
    most = begun_ahead(loader, face, begun, 8)
    assert most <= room_of(loader, "map") + 8 * room_of(loader, "collate")
    assert most <= 40


SEVERAL: dict[str, Describe] = {
    "alone": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8),
    "three": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).map(decode).map(str, concurrency=7),
    "two windows": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).shuffle(1).map(decode, concurrency=64),
    "a fold": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).take(100_000),
    "a cheap one before": lambda fetch: Pipeline(ENDLESS).map(decode).map(fetch, concurrency=8),
    "flat_map": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).flat_map(items_of).map(decode),
    "rounds": lambda fetch: Pipeline(range(100)).map(fetch, concurrency=8).repeat().map(decode, concurrency=64),
    "two sources": lambda fetch: Pipeline.interleave(
        *(Pipeline(ENDLESS).map(fetch, concurrency=width) for width in (4, 5))
    ).map(decode, concurrency=64),
}
"""Several windows, each with a room of its own."""


@on_both_faces
@pytest.mark.parametrize("fetch", FETCHES)
@pytest.mark.parametrize("pipeline", SEVERAL)
def test_no_sample_is_begun_beyond_what_stats_says(face: Face, pipeline: str, fetch: str) -> None:
    """The rooms of its stages after each other, and of the batches."""
    begun = Begun()

    async def see(batch: list[Any]) -> list[Any]:
        begun.loop = asyncio.get_running_loop()
        return batch

    loader = SEVERAL[pipeline](getattr(begun, fetch)).batch(8, collate_fn=list).map(see)
    most = begun_ahead(loader, face, begun, 8)
    stages = [stage for stage in loader.stats().stages if stage.kind != "source" or "flat_map" in stage.name]
    batches = next(stage.room for stage in stages if stage.name.startswith("collate"))
    samples = sum(stage.room for stage in stages if not stage.name.startswith(("collate", "map(test_")))
    assert most <= samples + 8 * batches


@on_both_faces
@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_a_slow_stage_after_another_reaches_its_concurrency(face: Face, concurrency: int) -> None:
    """Its calls get their places as they stand there, though nobody has finished yet."""
    begun, gate, under_way = Begun(), Gate(), UnderWay()
    loader = (
        Pipeline(range(60))
        .map(begun.at_once, concurrency=2)
        .map(standing_at(gate, under_way, asynchronous=False), concurrency=concurrency)
        .batch(4, collate_fn=list)
    )
    consumer = Started(lambda: collect(loader, face))
    gate.wait_arrived(concurrency)
    assert gate.standing == concurrency
    gate.open_all()
    assert [key for batch in consumer.outcome() for key in batch] == list(range(60))
    assert under_way.most == concurrency
    assert room_of(loader, "map") >= concurrency


@on_both_faces
def test_a_slow_first_sample_lets_a_window_grow_to_sixteen_times_its_concurrency(face: Face) -> None:
    """Whatever the width of the cheap stage after it. No more are begun than the room says."""
    gate, begun = Gate(), Begun()
    gate.open(*range(1, 10_000))

    async def fetch(key: int) -> int:
        await begun.at_once(key)
        await gate.passing(key)
        return key

    loader = Pipeline(range(3000)).map(fetch, concurrency=8).map(decode, concurrency=64).batch(8, collate_fn=list)
    consumer = Started(lambda: collect(loader, face))
    gate.wait_arrived(16 * 8)
    loop = begun.loop
    assert loop is not None
    for _ in range(4):
        asyncio.run_coroutine_threadsafe(turns(), loop).result(DEADLINE)
    assert begun.count == room_of(loader, "map(decode)") == 16 * 8
    gate.open_all()
    assert len(consumer.outcome()) == 375


@on_both_faces
def test_a_live_source_is_read_no_further(face: Face) -> None:
    """A cheap stage takes no more out of a channel than there is room for."""
    channel = Channel(5000)
    for number in range(5000):
        channel.send_nowait(number)
    begun = Begun()

    async def see(keys: list[int]) -> list[int]:
        await begun.at_once(keys[0])
        return keys

    loader = Pipeline(channel).map(decode, concurrency=64).batch(8, collate_fn=list).map(see, concurrency=1)
    with Steps(loader, face) as steps:
        for count in range(1, 12):
            steps.next()
            steps.settle(begun.loop)
            stages = {stage.name: stage for stage in loader.stats().stages}
            taken = next(stage.samples for stage in stages.values() if stage.kind == "source")
            assert taken - 8 * count <= 64 + 32 + 8 * stages["collate(list)"].room
    loader.close()


@on_both_faces
@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_async_dataset_is_loaded_no_further(face: Face, size: int) -> None:
    """`DataLoader`, sample by sample: batches do not pile up where they are put together."""
    begun = Begun()

    class Remote(Dataset[int]):
        def __len__(self) -> int:
            return 10_000

        async def __getitem__(self, index: int) -> int:  # type: ignore[override]
            return await begun.in_a_turn(index)

    loader = DataLoader(Remote(), batch_size=size, concurrency=8, collate_fn=list)
    most = begun_ahead(loader, face, begun, size)
    stages = loader.stats().stages
    assert most <= room_of(loader, "dataset[...]") + size * stages[-1].room


class BegunInAFile:
    """Counts across processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @property
    def count(self) -> int:
        return self.path.stat().st_size

    def begin(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(b".")

    async def at_once(self, key: int) -> int:
        self.begin()
        return key

    async def in_a_turn(self, key: int) -> int:
        await asyncio.sleep(0)
        return await self.at_once(key)

    def in_a_thread(self, key: int) -> int:
        self.begin()
        return key


PLACED: dict[str, Describe] = {
    "decode in processes": lambda fetch: (
        Pipeline(ENDLESS).map(fetch, concurrency=8).map(decode, executor="process", concurrency=1)
    ),
    "in a process of its own": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).map(decode).in_process(),
    "decode outside of it": lambda fetch: Pipeline(ENDLESS).map(fetch, concurrency=8).in_process().map(decode),
}


@on_both_faces
@pytest.mark.parametrize("fetch", ["at_once", "in_a_turn", "in_a_thread"])
@pytest.mark.parametrize("pipeline", PLACED)
def test_processes_begin_no_more_than_stats_says(face: Face, pipeline: str, fetch: str, tmp_path: Path) -> None:
    """What travels counts with the stage that it comes from."""
    begun = BegunInAFile(tmp_path / "begun")
    loader = PLACED[pipeline](getattr(begun, fetch)).batch(8, collate_fn=list)
    with loader, Steps(loader, face) as steps:
        for count in range(1, 40):
            steps.next()
            told = partial(is_told, loader, begun.count - 8 * count)
            if face == "for":
                run(partial(until, told))
            else:
                steps.do(partial(until, told))


def is_told(loader: Any, ahead: int) -> bool:
    """Whether `stats()` says so, which another process tells in a moment."""
    *stages, collate = [stage for stage in loader.stats().stages if stage.kind != "source"]
    return bool(ahead <= sum(stage.room for stage in stages) + 8 * collate.room)


@on_both_faces
def test_finished_samples_never_exceed_the_room(face: Face, tmp_path: Path) -> None:
    """`finished_slots` of every stage, with caches that are full, resumed, and made anew."""
    loaders = [
        Pipeline(range(3000)).map(decode).cache(memory_bytes=1 << 20).batch(4, collate_fn=list),
        Pipeline(lambda: iter(range(3000))).map(decode).cache(disk=tmp_path).batch(4, collate_fn=list),
        Pipeline(range(3000)).map(decode).map(decode, concurrency=7).repeat(2).batch(64, collate_fn=list),
        Pipeline(range(3000)).map(decode).drop_if(never).batch(64, collate_fn=list),
        Pipeline(range(300)).map(decode).cache(memory_bytes=1 << 20),
    ]
    for loader in loaders:
        for _ in range(2):
            collect(loader, face)
            assert_no_more_than_the_room(loader)
        assert len(collect(loader, face, limit=3)) == 3
        loader.load_state_dict(loader.state_dict())
        collect(loader, face)
        assert_no_more_than_the_room(loader)
        loader.close()


def assert_no_more_than_the_room(loader: Any) -> None:
    for stage in loader.stats().stages:
        assert stage.finished_slots <= stage.room, stage
