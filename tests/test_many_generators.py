"""`merge` and `interleave`: many sources as one, each iterated by one task and closed by it."""

import asyncio
import gc
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioloader import Pipeline, SampleCancelledError
from aioloader.core.entry import ONE_LOST, Entry
from aioloader.engine.combine import InterleaveNode
from aioloader.engine.key_source import KeySource
from aioloader.engine.node import Kick, Node
from aioloader.insight.meters import StageMeter
from aioloader.stages.key_order import KeyOrder
from aioloader.testing import FaultySource, Gate, RecordingSource, SyncRecordingSource, virtual_order
from tests._support import Face, Started, Steps, collect, on_both_faces, run, until

MANY = 100


# -- interleave ------------------------------------------------------------------------------------------------------


def model(sources: list[list[Any]]) -> list[Any]:
    """One of each in turn; the ended drop out."""
    iterators = [iter(source) for source in sources]
    found = []
    while iterators:
        for iterator in list(iterators):
            try:
                found.append(next(iterator))
            except StopIteration:
                iterators.remove(iterator)
    return found


LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=5)


def lists(lengths: list[int]) -> list[list[tuple[int, int]]]:
    return [[(number, place) for place in range(length)] for number, length in enumerate(lengths)]


class _Slow(Node):
    """A source that has entries ready when a test says so."""

    def __init__(self, samples: list[Any], ready: Iterator[int]) -> None:
        self._samples = samples
        self._position = 0
        self._ready = ready

    def resume(self, cursor: Any) -> None:
        self._position = cursor

    def start(self, run: Any, kick: Kick) -> None:
        raise AssertionError

    def poll(self, limit: int) -> list[Entry]:
        start = self._position
        stop = min(start + min(limit, next(self._ready)), len(self._samples))
        self._position = stop
        self.ended = stop == len(self._samples)
        return [Entry(self._samples[n], n + 1, None, n) for n in range(start, stop)]


def everything(node: Node, limits: Iterator[int]) -> list[Entry]:
    found: list[Entry] = []
    while not node.ended:
        limit = next(limits)
        run = node.poll(limit)
        assert len(run) <= limit
        found += run
    return found


@given(
    lengths=LENGTHS,
    ready=st.lists(st.integers(0, 3), min_size=1, max_size=20).filter(any),
    limits=st.lists(st.integers(1, 6), min_size=1, max_size=8),
)
def test_interleave_is_a_plain_turn_whoever_is_fast(lengths: list[int], ready: list[int], limits: list[int]) -> None:
    """And goes on behind any of its outputs, with the same cursors, through JSON, as a saved state would."""
    ready = [*ready, 1] if len(ready) % 2 == 0 else ready  # an odd length reaches every source with every number

    def node() -> InterleaveNode:
        answers = itertools.cycle(ready)
        return InterleaveNode([_Slow(samples, answers) for samples in lists(lengths)])

    def without_wait(cursor: Any) -> list[Entry]:
        again = InterleaveNode([_Slow(samples, itertools.repeat(9)) for samples in lists(lengths)])
        again.resume(cursor)
        return everything(again, itertools.repeat(1))

    found = everything(node(), itertools.cycle(limits))
    assert [entry.value for entry in found] == model(lists(lengths))
    assert [entry.position for entry in found] == model([list(range(length)) for length in lengths])
    for number, entry in enumerate(found, 1):
        rest = without_wait(json.loads(json.dumps(entry.cursor)))
        assert [later.value for later in rest] == [later.value for later in found[number:]]
        assert [json.dumps(later.cursor) for later in rest] == [json.dumps(later.cursor) for later in found[number:]]


@on_both_faces
@pytest.mark.parametrize("size", [1, 4])
def test_interleave_of_sources_of_all_kinds(face: Face, size: int) -> None:
    """Indexable, sync and async, with stages of their own."""

    async def letters() -> AsyncIterator[str]:
        for letter in "abcde":
            await asyncio.sleep(0)
            yield letter

    sources: list[Any] = [range(3), letters, Pipeline(range(4)).map(str), (n * 10 for n in range(2)), []]
    expected = model([[0, 1, 2], list("abcde"), list("0123"), [0, 10], []])
    loader = Pipeline.interleave(*sources).batch(size, collate_fn=list)
    assert list(itertools.chain.from_iterable(collect(loader, face))) == expected


def test_interleave_has_the_length_of_all() -> None:
    """Where all of them know theirs."""
    assert len(Pipeline.interleave(range(3), range(5))) == 8
    assert repr(Pipeline.interleave(range(3), [1])) == "Pipeline.interleave(Pipeline(range), Pipeline(list))"
    with pytest.raises(TypeError):
        len(Pipeline.interleave(range(3), lambda: iter([])))
    with pytest.raises(ValueError, match="interleave needs at least one source"):
        Pipeline.interleave()


@on_both_faces
def test_interleaved_sources_are_read_side_by_side(face: Face) -> None:
    """The first is slow; the others are asked meanwhile, for a sample each."""
    gate = Gate()

    def source(number: int) -> Any:
        async def generate() -> AsyncIterator[int]:
            await gate.passing(number)
            yield number

        return generate

    with Steps(Pipeline.interleave(*(source(number) for number in range(4))), face) as steps:
        gate.open(1, 2, 3)

        def open_the_first() -> None:
            gate.wait_arrived(4)
            gate.open(0)

        opener = Started(open_the_first)
        assert steps.rest() == [0, 1, 2, 3]
        opener.outcome()


@on_both_faces
def test_interleave_reads_no_further_than_it_must(face: Face) -> None:
    """Endless sources: each a share of what is wanted."""
    sources = [RecordingSource(itertools.count()) for _ in range(3)]
    loader = Pipeline.interleave(*sources).batch(3, collate_fn=list).prefetch(2)
    with Steps(loader, face) as steps:
        for count in range(5):
            assert steps.next() == [count, count, count]
            for _ in range(3):
                steps.settle(sources[0].events[0].loop)
            assert all(source.started <= count + 1 + 2 + 3 for source in sources)


@on_both_faces
def test_interleave_fails_in_turn(face: Face) -> None:
    """The failure of one source comes when its turn comes, and the others go on."""
    others = [RecordingSource(range(4)), RecordingSource(range(4))]
    gone = OSError("gone")
    faulty = FaultySource(range(100), {2: gone})
    with Steps(Pipeline.interleave(others[0], faulty, others[1]), face) as steps:
        outcomes = steps.outcomes()
    assert outcomes == [0, 0, 0, 1, 1, 1, 2, gone, 2, 3, 3]
    assert [source.closed for source in others] == [1, 1]


def test_interleave_resumes_the_indexable_without_reading_it_again() -> None:
    """Keys are arithmetic: the cursor of each is where it goes on."""

    def keys(length: int, permute: bool) -> KeyOrder:
        return KeyOrder(range(length))

    def node() -> InterleaveNode:
        return InterleaveNode([KeySource(partial(keys, length), None, "keys") for length in (5, 2, 9)])

    class Meters:
        """As much of a run as they need."""

        def adopt(self, meter: StageMeter) -> StageMeter:
            return meter

    def started(cursor: Any = None) -> InterleaveNode:
        made = node()
        if cursor is not None:
            made.resume(cursor)
        made.start(Meters(), lambda: None)  # type: ignore[arg-type]
        return made

    found = everything(started(), itertools.repeat(4))
    again = started(found[7].cursor)
    assert [entry.value for entry in everything(again, itertools.repeat(3))] == [e.value for e in found[8:]]
    assert found[7].cursor == ((4, 2, 3), 0, (1,)) or found[7].cursor[2] == (1,)


# -- many generators -----------------------------------------------------------------------------------------------


COMBINED = pytest.mark.parametrize("how", [Pipeline.merge, Pipeline.interleave, Pipeline.zip])


@on_both_faces
@COMBINED
def test_each_of_many_generators_has_one_task(face: Face, how: Any) -> None:
    """That opens, reads and closes it, and no other generator."""
    sources = [RecordingSource(range(3)) for _ in range(MANY)]
    loader = how(*sources).batch(10, collate_fn=list)
    batches = collect(loader, face)
    samples = list(itertools.chain.from_iterable(batches))
    if how == Pipeline.zip:
        assert samples == [(number,) * MANY for number in range(3)]
    else:
        assert sorted(samples) == sorted(list(range(3)) * MANY)
    tasks = [{event.task for event in source.events} for source in sources]
    assert all(len(of_one) == 1 for of_one in tasks)
    assert len(set.union(*tasks)) == MANY
    assert [source.closed for source in sources] == [1] * MANY


@on_both_faces
@COMBINED
@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
def test_many_generators_are_closed_where_they_were_iterated(face: Face, how: Any, sync: bool) -> None:
    """`break` in the middle: each `finally` runs in its own task, and of sync ones in its own thread."""
    kind = SyncRecordingSource if sync else RecordingSource
    count = 20 if sync else MANY
    sources: list[Any] = [kind(itertools.count()) for _ in range(count)]
    loader = how(*sources)
    assert len(collect(loader, face, limit=3)) == 3
    gc.collect()
    loader.close()
    if face == "async for":
        run(lambda: until(lambda: all(source.closed == source.opened for source in sources)))
    for source in sources:
        assert source.closed == source.opened
        assert len({event.thread if sync else event.task for event in source.events}) <= 1


@on_both_faces
@pytest.mark.parametrize("how", [Pipeline.merge, Pipeline.interleave])
def test_one_of_many_fails_and_the_others_go_on(face: Face, how: Any) -> None:
    """The error comes once, with its source's name; all are closed in the end."""
    sources = [RecordingSource(range(9)) for _ in range(20)]
    gone = ValueError("gone")
    with Steps(how(*sources[:10], FaultySource(range(9), {4: gone}), *sources[10:]), face) as steps:
        outcomes = steps.outcomes()
    assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == [gone]
    assert len(outcomes) == 20 * 9 + 4 + 1
    assert "source(FaultySource)" in gone.__notes__[0]
    assert all(source.closed == source.opened for source in sources)


@on_both_faces
@pytest.mark.parametrize("how", [Pipeline.merge, Pipeline.interleave])
def test_a_generator_that_is_cancelled_from_inside_is_a_failure(face: Face, how: Any) -> None:
    """Nobody cancelled the loader: it must not look like that, nor like an end."""

    async def cancelled() -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    others = [RecordingSource(range(2)) for _ in range(5)]
    with Steps(how(*others, cancelled), face) as steps:
        outcomes = steps.outcomes()
    assert isinstance(outcomes[-1], SampleCancelledError)
    assert all(source.closed == source.opened for source in others)


@on_both_faces
@pytest.mark.parametrize("seed", range(20))
def test_merge_gives_every_sample_in_any_order_of_arrival(face: Face, seed: int) -> None:
    """Each source's own order is kept."""
    order = virtual_order(seed)

    def source(number: int) -> Any:
        async def generate() -> AsyncIterator[tuple[int, int]]:
            for place in range(number):
                await order.turn()
                yield number, place

        return generate

    samples = collect(Pipeline.merge(*(source(number) for number in range(8))), face)
    assert sorted(samples) == [(number, place) for number in range(8) for place in range(number)]
    for number in range(8):
        assert [place for one, place in samples if one == number] == list(range(number))


@on_both_faces
def test_merge_takes_from_who_has_something(face: Face) -> None:
    """One stands still, the others go on."""
    gate = Gate()

    async def standing() -> AsyncIterator[int]:
        await gate.passing()
        yield -1

    with Steps(Pipeline.merge(standing, range(5), lambda: iter(range(5, 10))), face) as steps:
        assert sorted(steps.rest(10)) == list(range(10))
        gate.open_all()
        assert steps.rest() == [-1]


@on_both_faces
def test_merge_of_many_reads_a_share_of_each_ahead(face: Face) -> None:
    """What 50 endless generators are ahead together is what one would be, and one sample each."""
    sources = [RecordingSource(itertools.count()) for _ in range(50)]
    loader = Pipeline.merge(*sources).batch(4, collate_fn=list).prefetch(2)
    with Steps(loader, face) as steps:
        for count in range(1, 40):
            steps.next()
            if count % 10 == 1:
                for _ in range(3):
                    steps.settle(sources[0].events[0].loop)
            read = sum(source.started for source in sources)
            assert read <= 4 * (count + 2 + 1) + 2 * 50


def test_a_failure_is_no_sample() -> None:
    """What the node itself gives when one of its sources has failed, and when that was the last one."""

    class Failing(Node):
        def resume(self, cursor: Any) -> None:
            raise AssertionError

        def start(self, run: Any, kick: Kick) -> None:
            raise AssertionError

        def poll(self, limit: int) -> list[Entry]:
            self.ended = True
            return [Entry.last(ValueError("gone"), 0, 0)]

    node = InterleaveNode([Failing(), _Slow([1, 2], itertools.repeat(9))])
    failure, *rest = node.poll(5)
    assert failure.state == ONE_LOST
    assert failure.cursor == ((0, None), 0, ())  # it has its turn again
    assert [entry.value for entry in rest] == [1, 2]
    assert rest[0].cursor == ((0, 1), 0, ())
    assert node.poll(5) == []
    assert node.ended
