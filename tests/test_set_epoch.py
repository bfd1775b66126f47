"""`set_epoch`: the copies of datasets and functions in worker processes are in the epoch that the user's own are in."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import pytest
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from aioloader import DataLoader, Pipeline
from tests._support import Face, collect, on_both_faces

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there are no worker processes"),
    pytest.mark.usefixtures("fork_server"),
]


class Told:
    """Something that is told its epoch, and has no other way to know it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def add(self, sample: int) -> int:
        return 10 * self.epoch + sample

    def __call__(self, sample: int) -> int:
        return self.add(sample)


class Secretive(Told):
    """Its `epoch` is another number."""

    def __init__(self) -> None:
        self._told = 0

    def set_epoch(self, epoch: int) -> None:
        self._told = epoch

    def add(self, sample: int) -> int:
        return 10 * self._told + sample


class Rows(Told, Dataset[int]):
    """A map-style dataset."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return self.add(index)


class SecretiveRows(Secretive, Rows):
    """Does not say which epoch it is in."""

    epoch = None  # type: ignore[assignment]


class RowsInBulk(Rows):
    """Gives several rows at once."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return list(map(self.add, indices))


class Stream(Told, IterableDataset[int]):
    """An iterable dataset that shares its samples out among torch's workers."""

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return map(self.add, range(first, 4, step))


class SecretiveStream(Secretive, Stream):
    """Does not say which epoch it is in."""


class CountingStream(Stream):
    """Counts its epochs itself, too."""

    def __iter__(self) -> Iterator[int]:
        samples = list(super().__iter__())
        self.epoch += 1
        return iter(samples)


class RefusingRows(Rows):
    """Cannot be in epoch 1."""

    def set_epoch(self, epoch: int) -> None:
        if epoch == 1:
            raise ValueError("no epoch 1")
        super().set_epoch(epoch)


WORKERS: dict[str, dict[str, Any]] = {
    "none": {"num_workers": 0},
    "threads": {"num_workers": 2},
    "processes": {"num_workers": 2, "worker_type": "process"},
    "persistent processes": {"num_workers": 2, "worker_type": "process", "persistent_workers": True},
}
workers = pytest.mark.parametrize("workers", WORKERS)


def loader(dataset: Any, workers: str, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": 2} | WORKERS[workers] | kwargs)


def samples(loader: Any, face: Face = "for") -> list[int]:
    """Of one epoch, sorted."""
    return sorted(int(sample) for batch in collect(loader, face) for sample in batch)


def of_epoch(epoch: int) -> list[int]:
    return [10 * epoch + sample for sample in range(4)]


@on_both_faces
@workers
@pytest.mark.parametrize("kind", [Rows, RowsInBulk, SecretiveRows, Stream, SecretiveStream])
def test_a_dataset_is_in_the_epoch_that_the_loader_was_told(
    face: Face, workers: str, kind: type[Rows] | type[Stream]
) -> None:
    with loader(kind(), workers) as ours:
        for epoch in (0, 1, 5, 2):
            ours.set_epoch(epoch)
            assert samples(ours, face) == of_epoch(epoch)


@workers
@pytest.mark.parametrize("kind", [Rows, Stream])
def test_a_dataset_that_says_its_epoch_may_be_told_itself(workers: str, kind: type[Rows] | type[Stream]) -> None:
    dataset = kind()
    with loader(dataset, workers) as ours:
        for epoch in (0, 1, 5, 2):
            dataset.set_epoch(epoch)
            assert samples(ours) == of_epoch(epoch)


@workers
def test_single_samples_are_in_it_too(workers: str) -> None:
    with loader(Rows(), workers, batch_size=None) as ours:
        for epoch in (0, 1):
            ours.set_epoch(epoch)
            assert [int(sample) for sample in ours] == of_epoch(epoch)


def test_persistent_workers_that_count_epochs_themselves_go_on_counting() -> None:
    """As torch's do: nobody tells them anything."""
    with loader(CountingStream(), "persistent processes") as ours:
        assert [samples(ours) for _ in range(3)] == [of_epoch(0), of_epoch(1), of_epoch(2)]


def test_an_epoch_that_has_begun_stays_what_it_is() -> None:
    """Two iterators share their persistent workers."""
    with loader(Rows(), "persistent processes", prefetch_factor=1, num_workers=1) as ours:
        ours.set_epoch(1)
        first = iter(ours)
        found = [next(first).tolist()]
        ours.set_epoch(2)
        second = iter(ours)
        others = [next(second).tolist()]
        found += [batch.tolist() for batch in first]
        others += [batch.tolist() for batch in second]
    assert found == [[10, 11], [12, 13]]
    assert others == [[20, 21], [22, 23]]


def test_an_epoch_that_a_copy_refuses_is_an_error_of_its_batches() -> None:
    dataset = RefusingRows()
    with loader(dataset, "persistent processes") as ours:
        assert samples(ours) == of_epoch(0)
        dataset.epoch = 1
        batches = iter(ours)
        for _ in range(2):
            with pytest.raises(ValueError, match="no epoch 1"):
                next(batches)
        ours.set_epoch(2)
        assert samples(ours) == of_epoch(2)


@on_both_faces
@workers
@pytest.mark.parametrize("kind", [Rows, SecretiveStream])
@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
def test_a_resumed_epoch_and_the_one_after_it(face: Face, workers: str, kind: type[Rows] | type[Stream]) -> None:
    """The workers are there already, in another epoch, when the state is loaded."""
    with loader(kind(), workers) as ours:
        ours.set_epoch(3)
        batches = iter(ours)
        first = next(batches).tolist()
        state = ours.state_dict()
        rest = [sample for batch in batches for sample in batch.tolist()]
    with loader(kind(), workers) as resumed:
        resumed.set_epoch(7)
        assert samples(resumed, face) == of_epoch(7)
        resumed.load_state_dict(state)
        assert samples(resumed, face) == sorted(rest)
        assert sorted(first + rest) == of_epoch(3)
        resumed.set_epoch(4)
        assert samples(resumed, face) == of_epoch(4)


def method(told: Told) -> Any:
    return told.add


def part(told: Told) -> Any:
    return partial(call, told)


def call(told: Told, sample: int) -> int:
    return told.add(sample)


def itself(told: Told) -> Any:
    return told


@on_both_faces
@pytest.mark.parametrize("function", [method, part, itself])
@pytest.mark.parametrize("where", ["threads", "process", "in_process", "process in_process"])
def test_functions_are_in_the_epoch_of_their_object(face: Face, function: Any, where: str) -> None:
    told = Told()
    executor: Literal["thread", "process"] = "process" if where.startswith("process") else "thread"
    pipeline = Pipeline(range(4)).map(function(told), executor=executor, concurrency=2).batch(2)
    if where.endswith("in_process"):
        pipeline = pipeline.in_process()
    with pipeline:
        for epoch in (0, 1, 5, 2):
            told.set_epoch(epoch)
            assert samples(pipeline, face) == of_epoch(epoch)


@pytest.mark.parametrize("in_process", [False, True])
def test_a_pipeline_reads_a_map_style_dataset_in_the_epoch_that_it_is_in(in_process: bool) -> None:
    rows, others = Rows(), Rows()
    pipeline = Pipeline.interleave(Pipeline(rows), Pipeline(others).filter(others.add)).batch(2)
    pipeline = pipeline.in_process() if in_process else pipeline
    with pipeline:
        for epoch in (1, 2):
            rows.set_epoch(epoch)
            others.set_epoch(epoch + 1)
            assert samples(pipeline) == of_epoch(epoch) + of_epoch(epoch + 1)


@on_both_faces
@pytest.mark.parametrize("in_process", [False, True])
@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
def test_a_pipeline_tells_its_stream_each_epoch(face: Face, in_process: bool) -> None:
    """Also one that is resumed, and a process that is kept."""
    pipeline = Pipeline(Stream()).batch(2)
    pipeline = pipeline.in_process() if in_process else pipeline
    with pipeline:
        assert [samples(pipeline, face) for _ in range(3)] == [of_epoch(0), of_epoch(1), of_epoch(2)]
        batches = iter(pipeline)
        assert next(batches).tolist() == of_epoch(3)[:2]
        state = pipeline.state_dict()
        assert [batch.tolist() for batch in batches] == [of_epoch(3)[2:]]
        pipeline.set_epoch(9)
        assert samples(pipeline, face) == of_epoch(9)
        pipeline.load_state_dict(state)
        assert samples(pipeline, face) == of_epoch(3)[2:]
        assert samples(pipeline, face) == of_epoch(4)
