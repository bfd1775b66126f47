"""`Pipeline.with_length`: a length where nobody can count, and what it means for the state; `Pipeline.batch_size`."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from aioloader import LengthWarning, Pipeline
from aioloader.sources import Channel
from tests._support import Face, Steps, collect, on_both_faces

pytestmark = pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def numbers() -> Iterator[int]:
    yield from range(10)


def streamed() -> Pipeline:
    return Pipeline(numbers).batch(4, collate_fn=list)


def test_len_is_what_was_said() -> None:
    """After `batch` in batches, before it in samples, which later stages count on from."""
    with pytest.raises(TypeError):
        len(streamed())
    assert len(streamed().with_length(3)) == 3
    assert len(Pipeline(numbers).with_length(10).batch(4)) == 3
    assert len(Pipeline(numbers).with_length(10).shard(1, 2).batch(2)) == 3
    assert len(Pipeline(range(10)).filter(bool).with_length(9).map(str).batch(2, drop_last=True)) == 4
    assert len(Pipeline(numbers).with_length(10).repeat(3)) == 30
    assert len(Pipeline.zip(Pipeline(numbers).with_length(10), range(7))) == 7
    assert len(streamed().to("cpu").prefetch(1).with_length(3)) == 3
    assert len(streamed().with_length(3).with_info()) == 3
    assert len(streamed().with_length(5).with_length(3)) == 3
    with pytest.raises(TypeError):
        len(Pipeline(numbers).with_length(10).filter(bool))


def test_what_can_be_counted_need_not_be_said() -> None:
    """Another number than that of the pipeline is a mistake."""
    assert len(Pipeline(range(10)).batch(4).with_length(3)) == 3
    with pytest.raises(ValueError, match=r"got n=4 for a pipeline that gives 3; leave it out, or use take\(4\)"):
        Pipeline(range(10)).batch(4).with_length(4)
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        streamed().with_length(-1)
    with pytest.raises(TypeError):
        streamed().with_length(2.5)  # type: ignore[arg-type]


@on_both_faces
def test_the_state_after_the_last_batch_is_the_next_epoch(face: Face) -> None:
    """As it is where the loader counts itself: no further `next()` is needed."""
    for loader, epoch in ((streamed(), 0), (streamed().with_length(3), 1)):
        with Steps(loader, face) as steps:
            for _ in range(3):
                steps.next()
            state = loader.state_dict()
            assert (state["epoch"], state["batches"] > 0) == (epoch, epoch == 0)
            assert steps.rest() == []
        other = streamed().with_length(3)
        other.load_state_dict(state)
        assert collect(other, face) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert other.state_dict()["epoch"] == 2


@on_both_faces
def test_a_state_fits_with_and_without(face: Face) -> None:
    """The length is no part of what decides which sample comes when."""
    for said, loaded in ((3, None), (None, 3), (3, 7)):
        loader, other = (streamed() if n is None else streamed().with_length(n) for n in (said, loaded))
        with Steps(loader, face) as steps:
            steps.next()
            other.load_state_dict(loader.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LengthWarning)
            assert collect(other, face) == [[4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("n", [2, 4])
@on_both_faces
def test_another_number_of_batches_warns_at_the_end(n: int, face: Face) -> None:
    """All of them come, and it is said once an epoch, where the user's code is."""
    loader = streamed().with_length(n)
    for _ in range(2):
        with Steps(loader, face) as steps, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(steps.rest()) == 3
            assert steps.rest() == []
        (one,) = caught
        assert one.category is LengthWarning
        assert f"has {n} batches, and this one had 3" in str(one.message)
    assert loader.state_dict()["epoch"] == 2


@on_both_faces
def test_a_resumed_epoch_counts_from_its_beginning(face: Face) -> None:
    """Batches before the state are batches of the epoch."""
    loader = streamed().with_length(3)
    with Steps(loader, face) as steps:
        steps.next()
        state = loader.state_dict()
    other = streamed().with_length(3)
    other.load_state_dict(state)
    with Steps(other, face) as steps:
        steps.next()
        assert other.state_dict()["epoch"] == 0
        steps.next()
        assert other.state_dict()["epoch"] == 1
        assert steps.rest() == []


@on_both_faces
def test_a_source_that_fails_at_the_last_batch_is_tried_again(face: Face) -> None:
    """An error that ended the epoch is no full epoch, however many batches there were."""

    def fails() -> Iterator[int]:
        yield from range(8)
        raise OSError("gone")

    loader = Pipeline(fails).batch(4, collate_fn=list).with_length(3)
    with Steps(loader, face) as steps, warnings.catch_warnings():
        warnings.simplefilter("error", LengthWarning)
        assert steps.next() == [0, 1, 2, 3]
        assert steps.next() == [4, 5, 6, 7]
        with pytest.raises(OSError, match="gone"):
            steps.next()
        assert loader.state_dict()["epoch"] == 0
        assert steps.rest() == []
    assert loader.state_dict()["epoch"] == 1


@on_both_faces
def test_where_samples_may_come_again_only_the_end_tells(face: Face) -> None:
    """A resumed epoch may have more batches than one that was not, and none of them may be left out."""

    def merged() -> Pipeline:
        return Pipeline.merge(range(6)).map(str, ordered=False).shuffle(3, seed=1).batch(1, collate_fn=list)

    loader = merged().with_length(6)
    assert loader.state_dict()["guarantee"] == "at-least-once"
    with Steps(loader, face) as steps:
        seen = [steps.next(), steps.next(), steps.next()]
        state = loader.state_dict()
        steps.rest(3)
        assert loader.state_dict()["epoch"] == 1
    other = merged().with_length(6)
    other.load_state_dict(state)
    with Steps(other, face) as steps:
        seen += [steps.next(), steps.next(), steps.next()]
        assert other.state_dict()["epoch"] == 0
        assert {sample for batch in seen + steps.rest() for sample in batch} == set("012345")
    assert other.state_dict()["epoch"] == 1


SIZES: dict[str, tuple[Callable[[], Any], int | None]] = {
    "batches": (lambda: Pipeline(range(9)).batch(4), 4),
    "and more stages": (lambda: Pipeline(range(9)).batch(4).map(len).to("cpu").prefetch(2).with_length(3), 4),
    "samples": (lambda: Pipeline(range(9)), None),
    "samples again": (lambda: Pipeline(range(9)).batch(4).unbatch(), None),
    "batches of another size": (lambda: Pipeline(range(9)).batch(4).unbatch().batch(2), 2),
    "what batches are taken apart to": (lambda: Pipeline(range(9)).batch(4).flat_map(list), None),
    "batches of that": (lambda: Pipeline(range(9)).batch(4).flat_map(list).batch(2), 2),
    "of a rank": (lambda: Pipeline(range(9)).shard(0, 2).batch(4), 4),
    "by length": (lambda: Pipeline([[1], [2]]).batch_by_length(8, len), None),
    "mixed": (lambda: Pipeline.mix([Pipeline(range(9)).batch(4), Pipeline(Numbers()).batch(4)], [1, 1]), 4),
    "mixed, of several sizes": (lambda: Pipeline.merge(Pipeline(range(9)).batch(4), Pipeline(range(9)).batch(2)), None),
    "live": (lambda: Pipeline(Channel(2)).batch(3), 3),
}


@pytest.mark.parametrize("name", SIZES)
def test_batch_size(name: str) -> None:
    """Samples in a batch, as torch's attribute says it; None where that is no number."""
    make, size = SIZES[name]
    assert make().batch_size == size


def test_batch_size_cannot_be_set() -> None:
    with pytest.raises(AttributeError):
        Pipeline(range(9)).batch(4).batch_size = 2  # type: ignore[misc]
