"""`Pipeline(dataset, concurrency=...)`: how many samples of a map-style source are loaded at once."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from aioloader import Pipeline
from aioloader.sources import Channel, Files, Objects
from aioloader.testing import Gate, assert_resumes_exactly
from tests._support import Face, Started, Steps, collect, on_both_faces


class Counting(Dataset[int]):
    """Loads wait at a gate; knows how many were under way at once."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.most = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, key: int) -> int:
        self.gate.pass_sync(key)
        self.most = max(self.most, self.gate.standing + 1)
        return key


class CountingAsync(Counting):
    async def __getitem__(self, key: int) -> int:  # type: ignore[override]
        await self.gate.passing(key)
        return key


class CountingInBulk(Counting):
    def __getitems__(self, keys: list[int]) -> list[int]:
        self.gate.pass_sync(keys[0])
        return keys


def ask(steps: Steps, face: Face) -> Callable[[], Any]:
    """Ask for the first sample or batch; returns what waits for it."""
    if face == "for":
        return Started(steps.next).outcome

    async def begin() -> Any:
        return asyncio.ensure_future(anext(steps._iterator))

    task = steps.do(begin)

    async def first() -> Any:
        return await task

    return lambda: steps.do(first)


@on_both_faces
@pytest.mark.parametrize("kind", [Counting, CountingAsync])
@pytest.mark.parametrize("concurrency", [1, 3, 7])
def test_so_many_are_loaded_at_once(face: Face, kind: type[Counting], concurrency: int) -> None:
    """All of them, and no more; the function after it has its own number."""
    gate = Gate()
    loader = Pipeline(kind(gate), concurrency=concurrency).map(abs, concurrency=2)
    with Steps(loader, face) as steps:
        first = ask(steps, face)
        steps.until_arrived(gate, concurrency)
        assert gate.standing == concurrency
        gate.open(0)
        assert first() == 0
        assert gate.standing <= concurrency
        gate.open_all()
        assert steps.rest() == list(range(1, 24))
    assert [stage.concurrency for stage in loader.stats().stages if stage.kind != "source"] == [concurrency, 2]


@on_both_faces
def test_so_many_calls_for_whole_batches_stand_side_by_side(face: Face) -> None:
    """A dataset with `__getitems__` is asked for the batches of the pipeline."""
    gate = Gate()
    loader = Pipeline(CountingInBulk(gate), concurrency=3).batch(4).prefetch(5)
    with Steps(loader, face) as steps:
        first = ask(steps, face)
        steps.until_arrived(gate, 3)
        assert gate.standing == 3
        gate.open_all()
        assert first().tolist() == [0, 1, 2, 3]
        assert [batch.tolist() for batch in steps.rest()] == torch.arange(4, 24).reshape(5, 4).tolist()


@on_both_faces
def test_samples_of_a_dataset_that_loads_many_are_loaded_in_so_many_threads(face: Face) -> None:
    """Not in as many as the function after it has, as it is without a number."""
    for concurrency, found in ((3, 3), (None, 2)):
        gate = Gate()
        gate.open_all()
        loader = Pipeline(CountingInBulk(gate), concurrency=concurrency).map(abs, concurrency=2)
        assert collect(loader, face) == list(range(24))
        assert [stage.concurrency for stage in loader.stats().stages[1:]] == [found, 2]


def test_a_resume_does_not_depend_on_it() -> None:
    gate = Gate()
    gate.open_all()

    def make(concurrency: int | None = None) -> Pipeline:
        return Pipeline(Counting(gate), concurrency=concurrency).shuffle(seed=1).batch(5)

    assert_resumes_exactly(make, variants=({}, {"concurrency": 3}))


@on_both_faces
def test_a_sample_that_is_begun_again_is_not_loaded_again(face: Face) -> None:
    """`drop_if(requeue=True)` begins at the first map, whoever set the number of loads."""
    loads: list[int] = []
    seen: list[int] = []

    class Noting(Dataset[int]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, key: int) -> int:
            loads.append(key)
            return key

    def once(sample: int) -> bool:
        seen.append(sample)
        return seen.count(sample) == 1

    loader = Pipeline(Noting(), concurrency=2).map(abs).drop_if(once, requeue=True).batch(2, collate_fn=list)
    assert collect(loader, face) == [[0, 1], [2, 3], [4, 5]]
    assert sorted(loads) == list(range(6))


@pytest.mark.parametrize(
    ("source", "way_out"),
    [
        ([1, 2], "its samples are in memory: pass concurrency to the map after it"),
        (torch.arange(3), "its samples are in memory"),
        (range(3), "its samples are in memory"),
        ((n for n in range(3)), "read one sample after the other: pass concurrency to the map after it"),
        (lambda: iter([1]), "read one sample after the other"),
        (Channel(1), "read one sample after the other"),
        (Pipeline(range(3)), "pass concurrency where that one is made"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_source_that_loads_nothing_has_no_use_for_it(source: Any, way_out: str) -> None:
    with pytest.raises(TypeError, match=r"concurrency says how many samples of a map-style source.*" + way_out):
        Pipeline(source, concurrency=2)


def test_objects_have_a_number_of_their_own() -> None:
    store = pytest.importorskip("obstore.store").MemoryStore()
    with pytest.raises(TypeError, match="pass concurrency where that one is made"):
        Pipeline(Objects(store, ["a"]), concurrency=2)


@pytest.mark.parametrize(
    ("concurrency", "error", "said"),
    [
        (0, ValueError, "concurrency must be at least 1, got 0; leave it out for the default"),
        (-1, ValueError, "concurrency must be at least 1"),
        (1.5, TypeError, "concurrency must be an integer of at least 1, got 1.5"),
        (True, TypeError, "concurrency must be an integer"),
        ("4", TypeError, "concurrency must be an integer"),
    ],
)
def test_wrong_numbers_are_refused_at_construction(concurrency: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Pipeline(Counting(Gate()), concurrency=concurrency)


def test_files_that_may_be_less_far_ahead_are_refused(tmp_path: Any) -> None:
    (tmp_path / "a").write_bytes(b"a")
    files = Files(tmp_path, read="bytes", ahead=4)
    assert list(Pipeline(files, concurrency=4)) == [b"a"]
    with pytest.raises(ValueError, match=r"ahead must be at least concurrency.* got ahead=4 and concurrency=5"):
        Pipeline(files, concurrency=5)
