"""What each fold and source does to cursors: where a loader would go on after an entry was handed out (DESIGN 6)."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioloader import DataLoader, Pipeline
from aioloader.core.entry import Entry
from aioloader.engine.node import Fold
from aioloader.stages.base import FoldStage, Pass
from aioloader.stages.batch import Batch, CollateWith, Unbatch
from aioloader.stages.select import Enumerate, SkipFirst, Take
from aioloader.stages.shard import Shard
from aioloader.stages.shuffle import Shuffle
from aioloader.stages.split_join import INSIDE, JoinBatches, SplitBatches
from tests._support import Face, Steps, on_both_faces

FIRST = Pass(epoch=0)


def entries(values: Iterable[Any]) -> list[Entry]:
    """Entries as an indexable source gives them: the cursor is the position after the sample."""
    return [Entry(value, position + 1, position, position) for position, value in enumerate(values)]


def run_fold(fold: Fold, source: list[Entry], sizes: Iterable[int] = ()) -> list[Entry]:
    """Feed `source` in runs of `sizes`, no more than the fold wants, then flush."""
    out: list[Entry] = []
    wishes = iter(sizes)
    while source and not fold.full:
        size = max(1, min(next(wishes, 3), fold.wants(1)))
        out.extend(fold.feed(source[:size]))
        source = source[size:]
    out.extend(fold.flush())
    return out


def folded(stage: FoldStage, values: Iterable[Any]) -> list[Entry]:
    return run_fold(stage.fold(FIRST), entries(values))


def cursors(out: Iterable[Entry]) -> list[Any]:
    return [entry.cursor for entry in out]


def test_batch_resumes_after_its_last_sample() -> None:
    """A batch carries the cursor of its last sample, the short one too."""
    out = folded(Batch(4), range(10))
    assert [entry.value.samples for entry in out] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert cursors(out) == [4, 8, 10]


def test_take_and_enumerate_carry_their_count() -> None:
    """The cursor alone would not say how many are still to come, or which number is next."""
    assert cursors(folded(Take(3), range(10))) == [(1, 1), (2, 2), (3, 3)]
    assert cursors(folded(Enumerate(), range(2))) == [(1, 1), (2, 2)]


def test_skip_carries_how_many_it_left_out() -> None:
    """So that a resumed one does not leave them out again."""
    assert cursors(folded(SkipFirst(2), range(4))) == [(3, 2), (4, 2)]


def test_unbatch_resumes_before_its_batch() -> None:
    """The batch is read again, and its first samples are dropped."""
    assert cursors(folded(Unbatch(collated=False), [["a", "b"], ["c"]])) == [(None, 1), (None, 2), (1, 1)]


def test_the_shard_of_a_stream_keeps_its_cursors() -> None:
    """Those of the round's last entry, the same on all ranks, with the count over all of them."""
    for rank, samples in enumerate(([0, 3, 6], [1, 4, 0], [2, 5, 1])):  # the last round is filled from the beginning
        out = folded(Shard(rank, 3), range(7))
        assert [entry.value for entry in out] == samples
        assert cursors(out) == [(3, 3), (6, 6), (7, 7)]


def test_the_keys_of_a_batch_come_together_again() -> None:
    """Split: the last key of a batch carries the batch's cursor, the others none. Join: the batch's."""
    split = folded(SplitBatches(2), [[7, 8], [], [9]])
    assert [entry.key for entry in split] == [7, 8, 1, 9]
    assert [entry.position for entry in split] == [0, 1, 1, 4]
    assert cursors(split) == [INSIDE, 1, 2, 3]
    joined = run_fold(JoinBatches(CollateWith()).fold(FIRST), split)
    assert [entry.value.samples for entry in joined] == [[7, 8], [], [9]]
    assert cursors(joined) == [1, 2, 3]


@given(
    length=st.integers(0, 60),
    size=st.integers(1, 12),
    seed=st.integers(0, 10),
    sizes=st.lists(st.integers(1, 9), max_size=60),
)
def test_a_shuffle_buffer_is_found_again_by_replaying_integers(
    length: int, size: int, seed: int, sizes: list[int]
) -> None:
    """From any output on: read on from its cursor, replay its number of draws, and the rest is the same.

    The cursor must not be later than the oldest sample that still waits. What was drawn already is dropped again by
    number, since which place is drawn does not depend on the samples.
    """
    stage = Shuffle(size, seed)
    whole = run_fold(stage.fold(FIRST), entries(range(length)), sizes)
    assert sorted(entry.value for entry in whole) == list(range(length))
    assert [entry.cursor[1] for entry in whole] == list(range(1, length + 1))
    for number, entry in enumerate(whole, 1):
        oldest = entry.cursor[0] or 0  # None: nothing was read before it
        assert {later.value for later in whole[number:]} <= set(range(oldest, length))
        replayed = run_fold(stage.fold(FIRST), entries(range(length)), reversed(sizes))
        assert [again.value for again in replayed[number:]] == [later.value for later in whole[number:]]


def _positions(loader: Any, face: Face) -> list[Any]:
    """The cursor that is current after each batch."""
    found: list[Any] = []
    with Steps(loader, face) as steps:
        while True:
            try:
                steps.next()
            except StopIteration:
                return found
            found.append(steps._iterator.cursor)


async def _pairs(sample: int) -> AsyncIterator[tuple[int, int]]:
    for number in range(2):
        await asyncio.sleep(0)
        yield sample, number


@on_both_faces
@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        pytest.param(Pipeline(range(5)).batch(2), [2, 4, 5], id="indexable"),
        pytest.param(Pipeline(range(5)).skip(1).take(3), [1, 2, 3], id="order stages move no cursor"),
        pytest.param(Pipeline(lambda: iter(range(3))), [1, 2, 3], id="stream"),
        pytest.param(Pipeline(range(6)).filter(lambda n: n % 2 == 1), [2, 4, 6], id="filter"),
        pytest.param(Pipeline(range(2)).flat_map(_pairs), [(None, 1), (None, 2), (1, 1), (1, 2)], id="flat_map"),
        pytest.param(Pipeline(range(2)).repeat(2), [(0, 1), (0, 2), (1, 1), (1, 2)], id="repeat"),
        pytest.param(Pipeline.zip(range(2), ["a", "b", "c"]), [(1, 1), (2, 2)], id="zip"),
        pytest.param(Pipeline.mix([range(2)], [1]), [((1,), 1, ()), ((2,), 2, ())], id="mix"),
        pytest.param(Pipeline.merge(range(2)), [(1,), (2,)], id="merge"),
        pytest.param(DataLoader(list(range(5)), batch_size=2, num_workers=1), [1, 2, 3], id="dataloader"),
    ],
)
def test_handing_a_batch_out_makes_its_cursor_current(loader: Any, expected: list[Any], face: Face) -> None:
    """However much is made ahead, the cursor is that of the batch that the consumer got."""
    assert _positions(loader, face) == expected


@on_both_faces
def test_the_cursor_of_a_batch_does_not_depend_on_concurrency(face: Face) -> None:
    """What is under way or finished ahead leaves no trace in it."""
    expected = None
    for concurrency in (1, 7, 64):
        loader = Pipeline(range(100)).shuffle(seed=1).map(str, concurrency=concurrency).flat_map(list).batch(8)
        found = _positions(loader, face)
        assert expected is None or found == expected
        expected = found
