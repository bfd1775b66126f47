"""`DataLoader(worker_type="ray")`: batches are made in actors."""

import json
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from aioloader import DataLoader, sample_rng
from aioloader.ray import RayWorkers
from tests._support import Face, Steps, collect, on_both_faces


class Noisy(Dataset[Any]):
    """Samples with random numbers of all kinds; one fails."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        if index == 9:
            raise LookupError("no nine")
        info = get_worker_info()
        assert info is None or info.num_workers in (1, 2)
        return index, torch.rand(3), sample_rng().random().random(), torch.full((1 << 16,), float(index))


def outcomes(loader: Any, face: Face = "for", limit: int | None = None) -> list[Any]:
    """Batches as lists, and errors as text."""
    found: list[Any] = []
    with Steps(loader, face) as steps:
        while limit is None or len(found) < limit:
            try:
                index, noise, own, image = steps.next()
                found.append((index.tolist(), noise.tolist(), own.tolist(), image.sum().item()))
            except StopIteration:
                break
            except LookupError as error:
                found.append(str(error))
    return found


def on_ray(actors: int, **more: Any) -> Any:
    return DataLoader(Noisy(), 4, shuffle=True, num_workers=actors, worker_type="ray", seed=3, **more)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@on_both_faces
def test_batches_do_not_depend_on_who_makes_them(face: Face) -> None:
    """In order, errors at their places, and what is drawn from torch's global generator, too; also after a resume."""
    with on_ray(2) as two, on_ray(1) as one:
        whole = outcomes(two, face)
        assert len(whole) == 6
        assert whole.count("no nine") == 1
        two.set_epoch(0)
        iterator = iter(two)
        found = []
        for _ in range(3):
            try:
                next(iterator)
            except LookupError:
                continue
        state = json.dumps(two.state_dict())
        iterator.close()
        one.load_state_dict(json.loads(state))
        found = outcomes(one, face)
        assert found == whole[3:]
        stage = next(stage for stage in one.stats().stages if stage.kind == "ray")
        assert stage.name == "fetch"
    with DataLoader(Noisy(), 4, shuffle=True, seed=3) as here:
        for theirs, ours in zip(outcomes(here), whole, strict=True):
            assert theirs == ours if isinstance(theirs, str) else (theirs[0], theirs[2:]) == (ours[0], ours[2:])


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Awaited(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    async def __getitem__(self, index: int) -> int:
        return index


def test_what_actors_cannot_load_is_refused_at_construction() -> None:
    """With what to do instead."""
    with pytest.raises(ValueError, match="its iterator would die with its actor; use Pipeline"):
        DataLoader(Stream(), num_workers=2, worker_type="ray")
    with pytest.raises(ValueError, match="worker_type='ray' is for sync datasets"):
        DataLoader(Awaited(), num_workers=2, worker_type=RayWorkers(cpus=2))
    with pytest.raises(ValueError, match="must be 'thread', 'process' or 'ray', got 'dask'"):
        DataLoader(Noisy(), num_workers=2, worker_type="dask")  # type: ignore[call-overload]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_samples_with_policies_are_loaded_there_one_by_one() -> None:
    """And collated here."""

    class Flaky(Dataset[int]):
        tried = 0

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> int:
            self.tried += 1
            if index == 3 and self.tried % 2:
                raise OSError("once more")
            return index

    with DataLoader(Flaky(), 3, num_workers=1, worker_type="ray", retry=5, sample_timeout=60) as loader:
        assert [batch.tolist() for batch in collect(loader, "for")] == [[0, 1, 2], [3, 4, 5]]
