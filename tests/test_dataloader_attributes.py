"""Attributes of a `DataLoader`: what is set counts from the next epoch on, copies have their own, some are fixed."""

import copy
import pickle
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from aioloader import DataLoader
from tests._support import Face, on_both_faces, run


class Counted:
    """Samples that are awaited one after the other."""

    def __init__(self, count: int) -> None:
        self.count = count

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(self.count):
            yield number


def batches(loader: DataLoader[Any], face: Face) -> list[Any]:
    async def ours() -> list[Any]:
        return [batch async for batch in loader]

    return run(ours) if face == "async for" else list(loader)


@on_both_faces
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_function_that_is_set_collates_from_the_next_epoch_on(face: Face, num_workers: int) -> None:
    """Workers and none alike."""
    loader: DataLoader[Any] = DataLoader(range(4), batch_size=2, num_workers=num_workers, collate_fn=list)
    assert batches(loader, face) == [[0, 1], [2, 3]]
    loader.collate_fn = sum
    assert loader.collate_fn is sum
    assert batches(loader, face) == [1, 5]


@on_both_faces
def test_a_number_of_workers_that_is_set_counts_from_the_next_epoch_on(face: Face) -> None:
    """The batches are the same."""
    loader: DataLoader[Any] = DataLoader(range(8), batch_size=2, collate_fn=list)
    first = batches(loader, face)
    loader.num_workers = 3
    assert batches(loader, face) == first
    assert max(stage.concurrency for stage in loader.stats().stages) == 3


@pytest.mark.parametrize(
    "name", ["batch_size", "batch_sampler", "sampler", "drop_last", "dataset", "persistent_workers"]
)
def test_what_decides_the_batches_cannot_be_set(name: str) -> None:
    """As in torch."""
    loader = DataLoader(range(4))
    with pytest.raises(ValueError, match=f"^{name} attribute should not be set"):
        setattr(loader, name, None)


def test_a_copy_has_attributes_of_its_own() -> None:
    """Nothing that is set there is seen here."""
    loader: DataLoader[Any] = DataLoader(range(4), batch_size=2, collate_fn=list)
    other = copy.copy(loader)
    other.collate_fn = sum
    assert list(loader) == [[0, 1], [2, 3]]
    assert list(other) == [1, 5]


@on_both_faces
def test_a_loader_from_another_program_goes_on_from_a_state(face: Face) -> None:
    """Its attributes and its order travel with it."""
    loader: DataLoader[Any] = DataLoader(range(8), 2, True, generator=torch.Generator().manual_seed(3), collate_fn=list)
    other = pickle.loads(pickle.dumps(loader))
    iterator = iter(loader)
    given = [next(iterator)]
    other.load_state_dict(loader.state_dict())
    given += list(iterator)
    assert given[:1] + batches(other, face) == given
    assert other.batch_size == 2
    assert other.collate_fn is list


@on_both_faces
def test_a_batch_of_an_async_iterable_is_made_once_more(face: Face) -> None:
    """torch's constructor gets a stand-in for it, which nobody iterates."""
    loader: DataLoader[Any] = DataLoader(Counted(6), batch_size=2, collate_fn=list)
    assert batches(loader, face) == [[0, 1], [2, 3], [4, 5]]
    with pytest.warns(UserWarning, match="cannot be entered in the middle"):
        assert loader.replay(1) == [2, 3]


class Holder:
    """A dataset that holds its own loader, asks another one for what it lacks, and can be copied."""

    def __init__(self) -> None:
        self.samples = list(range(6))
        self.loader: DataLoader[Any] = DataLoader(self, batch_size=3)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.samples, name)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return self.samples[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda holder: pickle.loads(pickle.dumps(holder))])
def test_a_dataset_that_holds_its_loader_is_copied_with_it(copied: Callable[[Holder], Holder]) -> None:
    """The loader is there before the dataset has its attributes, and asks it nothing then."""
    assert [batch.tolist() for batch in copied(Holder()).loader] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_workers", -1), ("num_workers", "4"), ("concurrency", 0), ("prefetch_factor", 0), ("skip_errors", 3)],
)
def test_what_is_refused_changes_nothing(name: str, value: object) -> None:
    loader: DataLoader[Any] = DataLoader(range(4), batch_size=2, num_workers=2)
    before = getattr(loader, name)
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(loader, name, value)
    assert getattr(loader, name) == before
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_a_method_that_is_replaced_counts_from_the_next_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Samples:
        def __len__(self) -> int:
            return 2

        async def __getitem__(self, index: int) -> int:
            return index

    async def negative(self: Samples, index: int) -> int:
        return -index

    loader: DataLoader[Any] = DataLoader(Samples(), batch_size=2)
    assert [batch.tolist() for batch in loader] == [[0, 1]]
    monkeypatch.setattr(Samples, "__getitem__", negative)
    assert [batch.tolist() for batch in loader] == [[0, -1]]


def test_an_end_that_a_ctrl_c_has_lost_is_found() -> None:
    """It has left the queue when the interrupt comes, and is nowhere."""
    loader: DataLoader[Any] = DataLoader(range(2), batch_size=2, num_workers=1)
    iterator = iter(loader)
    assert len(list(iterator)) == 1
    delivery: Any = iterator._delivery
    delivery._queue.get_nowait()
    assert next(iterator, None) is None
    assert next(iterator, None) is None


def test_a_class_that_comes_after_it_sees_what_is_set() -> None:
    class Noting:
        noted: list[str] = []  # noqa: RUF012 - of this class alone

        def __setattr__(self, name: str, value: object) -> None:
            self.noted.append(name)
            super().__setattr__(name, value)

    class Noted(DataLoader[Any], Noting):
        pass

    Noted(range(4)).own = 1
    assert Noting.noted[-1] == "own"


class Gated(torch.utils.data.Dataset[int]):
    """Its first sample of an epoch comes when it is allowed to."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        self.gate.wait(20)
        return index


@on_both_faces
def test_a_timeout_that_is_set_counts(face: Face) -> None:
    samples = Gated()
    loader = DataLoader(samples, 2, num_workers=1)
    loader.timeout = 0.01
    with pytest.raises(RuntimeError, match="timed out after"):
        batches(loader, face)
    samples.gate.set()
    loader.timeout = 0
    assert [batch.tolist() for batch in batches(loader, face)] == [[0, 1]]


def test_another_number_of_workers_that_stay() -> None:
    """They are others then."""
    with DataLoader(range(8), 2, num_workers=1, persistent_workers=True, worker_type="process") as loader:
        first = [batch.tolist() for batch in loader]
        for workers in (3, 2):
            loader.num_workers = workers
            assert [batch.tolist() for batch in loader] == first


@pytest.mark.parametrize(("name", "value"), [("ahead", 0), ("ahead_bytes", -1), ("device", "meta")])
def test_what_the_constructor_refuses_cannot_be_set(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        DataLoader(range(4), 1, num_workers=1, **{name: value})
    loader = DataLoader(range(4), num_workers=1)
    with pytest.raises(ValueError, match=name):
        setattr(loader, name, value)
    assert getattr(loader, name) is None
