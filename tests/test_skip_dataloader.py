"""`DataLoader(skip_errors=...)`: samples that cannot be loaded are missing in their batches, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from aioloader import DataLoader, Skip, StateError, TooManySkippedError, WorkerDiedError, sample_rng
from aioloader.sources import CursorSource
from aioloader.testing import assert_resumes_exactly
from tests._support import Face, Steps, on_both_faces
from tests._work import (
    AsyncHoles,
    AsyncManyHoles,
    DeadlyHoles,
    DeadlyManyHoles,
    Holes,
    ManyHoles,
    collate_deadly,
)
from tests.test_skip_errors import BrokenRows, lines_of, stage_of

pytestmark = pytest.mark.usefixtures("fork_server")

BATCHES = [[0, 1, 3], [4, 5, 6, 7], [12, 13, 14], [16, 17, 18, 19]]
"""Of 20 samples in batches of 4, without 2, 8 to 11, and 15."""


async def collate_async(samples: list[Any]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(sample) for sample in samples])


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "inline": (Holes, {}),
    "one thread": (Holes, {"num_workers": 1}),
    "threads": (Holes, {"num_workers": 3}),
    "processes": (Holes, {"num_workers": 2, "worker_type": "process"}),
    "many": (ManyHoles, {"num_workers": 2}),
    "many inline": (ManyHoles, {}),
    "many in processes": (ManyHoles, {"num_workers": 2, "worker_type": "process"}),
    "async": (AsyncHoles, {}),
    "async one": (AsyncHoles, {"concurrency": 1}),
    "async many": (AsyncManyHoles, {}),
    "collate_fn": (Holes, {"num_workers": 2, "collate_fn": torch.as_tensor}),
    "async collate_fn": (Holes, {"num_workers": 2, "collate_fn": collate_async}),
    "async all": (AsyncHoles, {"collate_fn": collate_async}),
    "async many, async collate_fn": (AsyncManyHoles, {"collate_fn": collate_async}),
    "batch_sampler": (Holes, {"batch_size": 1, "batch_sampler": [range(n, n + 4) for n in range(0, 20, 4)]}),
}


def made(way: str, **more: Any) -> DataLoader[Any]:
    dataset, arguments = WAYS[way]
    return DataLoader(dataset(), **{"batch_size": 4, "skip_errors": True, **arguments, **more})


def outcomes_of(loader: Any, face: Face) -> list[Any]:
    with Steps(loader, face) as steps:
        return [type(one) if isinstance(one, Exception) else one.tolist() for one in steps.outcomes()]


@on_both_faces
@pytest.mark.parametrize("way", WAYS)
def test_all_good_samples_come_in_the_same_batches(face: Face, way: str) -> None:
    """However they are loaded: a failed one is missing in its batch, and a batch without any is left out."""
    with made(way) as loader:
        assert outcomes_of(loader, face) == BATCHES
        stage = stage_of(loader)
        assert (stage.skipped, stage.samples) == (6, 4)
        assert len(loader) == 5  # of the sampler


@on_both_faces
@pytest.mark.parametrize("way", WAYS)
def test_past_a_limit_the_batch_raises(face: Face, way: str) -> None:
    """Counted over samples, in the order of the batches."""
    with made(way, skip_errors=Skip(max_errors=3)) as loader:
        expected = [[0, 1, 3], [4, 5, 6, 7], TooManySkippedError, TooManySkippedError, [16, 17, 18, 19]]
        assert outcomes_of(loader, face) == expected
        assert stage_of(loader).skipped == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_report_names_each_sample(way: str, tmp_path: Path) -> None:
    """Its key and its position, not those of the batch."""
    report = tmp_path / "skipped.jsonl"
    with made(way, skip_errors=Skip(report=report)) as loader:
        outcomes_of(loader, "for")
    lines = lines_of(report)
    assert [line["key"] for line in lines] == [2, 8, 9, 10, 11, 15]
    positions = [None] * 6 if way == "batch_sampler" else [2, 8, 9, 10, 11, 15]
    assert [line["position"] for line in lines] == positions
    assert {line["error"] for line in lines} == {f"ValueError: no sample {key}" for key in (2, 8, 9, 10, 11, 15)}
    assert all(line["stage"] and line["seconds"] >= 0 for line in lines)


@pytest.mark.parametrize("way", WAYS)
def test_batch_info_names_the_samples_that_came(way: str) -> None:
    with made(way) as loader:
        batches = iter(loader)
        next(batches)
        info = loader.last_batch_info()
        assert info is not None
        assert info.keys == (0, 1, 3)
        assert info.positions == ((None,) * 3 if way == "batch_sampler" else (0, 1, 3))
        assert len(info.ages) == 3
        del batches


@pytest.mark.parametrize("first", ["inline", "processes", "async"])
def test_a_resume_is_exact(first: str) -> None:
    """At each batch, in any other way of loading a sync dataset; limits go on."""
    ways = ["async", "async one"] if first == "async" else [first, "threads", "inline", "one thread"]
    assert_resumes_exactly(
        lambda way: made(way, skip_errors=Skip(max_errors=4)),
        variants=[{"way": way} for way in ways],
        limit=6,
    )


@on_both_faces
@pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"num_workers": 2, "worker_type": "process"}])
def test_single_samples(face: Face, arguments: dict[str, Any]) -> None:
    """With `batch_size=None` each is handed out alone."""
    with DataLoader(Holes(), batch_size=None, skip_errors=True, **arguments) as loader:
        with Steps(loader, face) as steps:
            assert steps.outcomes() == [key for batch in BATCHES for key in batch]
        assert stage_of(loader).skipped == 6


@on_both_faces
@pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"num_workers": 2, "worker_type": "process"}])
def test_errors_of_other_types_raise(face: Face, arguments: dict[str, Any]) -> None:
    """The batch fails as it does without the argument, with the note that names the sample."""
    loader = DataLoader(Holes(), batch_size=4, skip_errors=Skip(on=OSError), **arguments)
    with loader, Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert [type(one) for one in outcomes] == [ValueError, torch.Tensor, ValueError, ValueError, torch.Tensor]
    assert "dataset index 2" in "".join(outcomes[0].__notes__)


@on_both_faces
@pytest.mark.parametrize("dataset", [DeadlyHoles, DeadlyManyHoles])
def test_a_sample_that_ends_its_process_costs_no_other_one(face: Face, dataset: type[Holes], tmp_path: Path) -> None:
    """Its worker has noted which it was; the batch is loaded again without it."""
    skip = Skip(report=tmp_path / "skipped.jsonl")
    with DataLoader(dataset(), batch_size=4, num_workers=2, worker_type="process", skip_errors=skip) as loader:
        assert outcomes_of(loader, face) == [[0, 1, 3], [4, 7], [12, 13, 14], [16, 17, 18, 19]]
        assert stage_of(loader).skipped == 8
    lines = lines_of(tmp_path / "skipped.jsonl")
    assert [line["key"] for line in lines] == [2, 5, 6, 8, 9, 10, 11, 15]
    deaths = [line for line in lines if line["error"].startswith("WorkerDiedError")]
    assert [(line["key"], line["position"]) for line in deaths] == [(5, 5), (6, 6), (15, 15)]
    assert all(line["error"].endswith(f", with key {line['key']}") for line in deaths)


@pytest.mark.parametrize("more", [{"collate_fn": collate_deadly}, {"skip_errors": Skip(on=ValueError)}])
def test_a_batch_whose_worker_dies_otherwise_raises(more: dict[str, Any]) -> None:
    """It dies while the batch is collated, so that nobody knows for which sample; or deaths are not to be skipped."""
    dataset = Holes() if "collate_fn" in more else DeadlyHoles()
    arguments = {"batch_size": 4, "num_workers": 2, "worker_type": "process", "skip_errors": True, **more}
    with DataLoader(dataset, **arguments) as loader, Steps(loader, "for") as steps:
        kinds = [isinstance(one, WorkerDiedError) for one in steps.outcomes()]
    assert kinds == ([False, True, False, False] if "collate_fn" in more else [False, True, True, False])


def test_deaths_count_for_the_limits_and_a_resume_goes_on_with_them() -> None:
    def made_with(workers: int) -> DataLoader[Any]:
        return DataLoader(
            DeadlyHoles(), batch_size=4, num_workers=workers, worker_type="process", skip_errors=Skip(max_errors=6)
        )

    expected = [[0, 1, 3], [4, 7], TooManySkippedError, TooManySkippedError, [16, 17, 18, 19]]
    with made_with(2) as loader:
        assert outcomes_of(loader, "for") == expected
    with made_with(1) as first:
        batches = iter(first)
        assert [next(batches).tolist(), next(batches).tolist()] == expected[:2]
        state = first.state_dict()
        del batches
    with made_with(2) as second:
        second.load_state_dict(state)
        assert outcomes_of(second, "async for") == expected[2:]


class Ragged(Dataset[torch.Tensor]):
    """Sample 5 has another shape."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: int) -> torch.Tensor:
        return torch.zeros(2 if key == 5 else 1)


@on_both_faces
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_cannot_be_collated_raises(face: Face, workers: int) -> None:
    """Nobody knows which of its samples is the wrong one."""
    loader = DataLoader(Ragged(), batch_size=4, num_workers=workers, skip_errors=True)
    with Steps(loader, face) as steps:
        assert [type(one) for one in steps.outcomes()] == [torch.Tensor, RuntimeError, torch.Tensor]
    assert stage_of(loader).skipped == 0


@on_both_faces
def test_to_a_device(face: Face) -> None:
    """Shorter batches are moved like the others."""
    with made("threads", device="cpu") as loader:
        assert outcomes_of(loader, face) == BATCHES
    with made("inline", device="cpu") as loader:
        assert outcomes_of(loader, face) == BATCHES


@on_both_faces
def test_rows_of_a_source_that_goes_on_are_skipped(face: Face) -> None:
    """Before they are batched, so that batches are full."""
    source: CursorSource = BrokenRows((0, 4, 9))
    loader = DataLoader(source, batch_size=2, skip_errors=True)
    assert outcomes_of(loader, face) == [[1, 2], [3, 5], [6, 7], [8]]
    loader = DataLoader(BrokenRows((4,), fails=True), batch_size=4, skip_errors=True)
    assert outcomes_of(loader, face) == [[0, 1, 2, 3], [5, 6, 7, 8], [9], OSError]


class Numbers(IterableDataset[int]):
    """Raises after five."""

    def __iter__(self) -> Any:
        yield from range(5)
        raise OSError("gone")


@on_both_faces
@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterator_that_raises_is_over(face: Face, workers: int) -> None:
    """As it is for Python; what it gave before comes."""
    loader = DataLoader(Numbers(), batch_size=2, num_workers=workers, skip_errors=True)
    assert outcomes_of(loader, face) == [[0, 1], [2, 3], [4], OSError]


def convert(sample: Any) -> Any:
    return 12 // (sample - 2)


@on_both_faces
@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_converted_of_a_stream_is_skipped(face: Face, workers: int) -> None:
    """With `batch_size=None` the `collate_fn` works on single samples."""

    def numbers() -> Any:
        yield from range(5)

    class Few(IterableDataset[int]):
        def __iter__(self) -> Any:
            return numbers()

    loader = DataLoader(Few(), batch_size=None, collate_fn=convert, num_workers=workers, skip_errors=True)
    with Steps(loader, face) as steps:
        assert steps.outcomes() == [-6, -12, 12, 6]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_resumes_exactly(workers: int) -> None:
    """Inline and in threads, the cursors are the same."""

    class Few(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(7))

    assert_resumes_exactly(
        lambda n: DataLoader(Few(), batch_size=2, num_workers=n, skip_errors=True), variants=({"n": workers}, {"n": 0})
    )


def test_worker_processes_cannot_skip_in_a_stream() -> None:
    with pytest.raises(ValueError, match="skip_errors cannot leave samples out of an IterableDataset that worker"):
        DataLoader(Numbers(), num_workers=2, worker_type="process", skip_errors=True)


@pytest.mark.parametrize("wrong", [1, "yes", ValueError, {"on": ValueError}])
def test_wrong_arguments_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="skip_errors must be a Skip, True or False, got"):
        DataLoader(Holes(), skip_errors=wrong)


@pytest.mark.parametrize("off", [None, False])
def test_without_it_errors_raise(off: Any) -> None:
    with made("threads", skip_errors=off) as loader:
        assert loader.skip_errors is None
        assert outcomes_of(loader, "for")[0] is ValueError


def test_a_state_says_whether_samples_are_skipped() -> None:
    """Its cursors hold the counts."""
    with made("threads") as loader:
        next(iter(loader))
        state = json.loads(json.dumps(loader.state_dict()))
    with pytest.raises(StateError):
        made("threads", skip_errors=None).load_state_dict(state)


def test_replay_makes_a_shorter_batch_again(tmp_path: Path) -> None:
    report = tmp_path / "skipped.jsonl"
    with made("threads", skip_errors=Skip(report=report)) as loader:
        outcomes_of(loader, "for")
        assert loader.replay(0).tolist() == BATCHES[0]
    assert len(lines_of(report)) == 6


class Drawn(Dataset[int]):
    """A number that belongs to the sample; some fail."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: int) -> int:
        drawn = sample_rng().random().randrange(1 << 30)
        if key in (1, 6):
            raise ValueError(key)
        return drawn


class DrawnMany(Drawn):
    def __getitems__(self, keys: list[int]) -> list[int]:
        return [self[key] for key in keys]


@pytest.mark.parametrize("dataset", [Drawn, DrawnMany])
@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_still_belong_to_their_samples(dataset: type[Drawn], workers: int) -> None:
    """A failed sample before it takes no other one's."""
    alone = DataLoader(Drawn(), batch_size=None, seed=4, skip_errors=True)
    loader = DataLoader(dataset(), batch_size=4, seed=4, num_workers=workers, skip_errors=True)
    numbers = [number for batch in loader for number in batch.tolist()]
    assert len(numbers) == 10
    assert numbers == list(alone)


def test_tensors_that_are_loaded_straight_into_a_batch() -> None:
    """Nothing is different where nothing fails."""
    data = TensorDataset(torch.arange(10.0))
    batches = [batch.tolist() for (batch,) in DataLoader(data, batch_size=4, num_workers=1, skip_errors=True)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
