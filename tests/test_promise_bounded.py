"""Promise 4: at most `concurrency` samples under way, a stated number of finished ones, `prefetch` finished batches."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import Dataset

from aioloader import DataLoader, Pipeline
from aioloader.testing import Gate, RecordingSource
from tests._support import DEADLINE, Face, Started, Steps, collect, on_both_faces, turns


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
