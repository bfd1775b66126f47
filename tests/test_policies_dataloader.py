"""`DataLoader(retry=, sample_timeout=, hedge=, rate=)`: about samples, wherever and however they are loaded."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from aioloader import DataLoader, Hedge, Rate, Retry, Skip, sample_rng
from aioloader.testing import assert_resumes_exactly
from tests._support import Face, Steps, collect, on_both_faces, until, wait_until

AT_ONCE = Retry(3, ConnectionError, wait_initial=0, jitter=0)
SLOW = 1 / 3600


pytestmark = pytest.mark.usefixtures("fork_server")


class Flaky:
    """Samples 0 to 19, of which every fifth fails so often with a `ConnectionError` before it comes."""

    def __init__(self, failures: int = 2, error: type[Exception] = ConnectionError) -> None:
        self.failures = failures
        self.error = error
        self.calls: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 20

    def load(self, key: int) -> int:
        with self._lock:
            self.calls[key] += 1
        if key % 5 == 0 and self.calls[key] <= self.failures:
            raise self.error(f"sample {key} was reset")
        return key


class Sync(Flaky):
    def __getitem__(self, key: int) -> int:
        return self.load(key)


class SyncMany(Flaky):
    def __getitems__(self, keys: list[int]) -> list[int]:
        return [self.load(key) for key in keys]


class Async(Flaky):
    async def __getitem__(self, key: int) -> int:
        await asyncio.sleep(0)
        return self.load(key)


class AsyncMany(Flaky):
    async def __getitems__(self, keys: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return [self.load(key) for key in keys]


class OnDisk(Flaky):
    """For worker processes, which do not share what has failed."""

    def __init__(self, folder: Path, failures: int = 2) -> None:
        self.folder = folder
        self.failures = failures

    def __getitem__(self, key: int) -> int:
        if key % 5 == 0:
            done = len(list(self.folder.glob(f"{key}-*")))
            if done < self.failures:
                (self.folder / f"{key}-{done}").touch()
                raise ConnectionError(f"sample {key} was reset")
        return key


KINDS = ("async", "async many", "threads", "threads many", "inline", "processes")


def make(kind: str, folder: Path, failures: int = 2, **options: Any) -> DataLoader[Any]:
    """A loader of one of these kinds."""
    match kind:
        case "async":
            return DataLoader(Async(failures), **options)
        case "async many":
            return DataLoader(AsyncMany(failures), **options)
        case "threads":
            return DataLoader(Sync(failures), num_workers=2, **options)
        case "threads many":
            return DataLoader(SyncMany(failures), num_workers=2, **options)
        case "inline":
            return DataLoader(Sync(failures), **options)
    return DataLoader(OnDisk(folder, failures), num_workers=2, worker_type="process", **options)


def retries(loader: DataLoader[Any]) -> int:
    return sum(stage.retries for stage in loader.stats().stages)


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_loaded_again_and_its_neighbours_are_not(kind: str, face: Face, tmp_path: Path) -> None:
    loader = make(kind, tmp_path, batch_size=4, retry=AT_ONCE)
    assert [batch.tolist() for batch in collect(loader, face)] == torch.arange(20).view(5, 4).tolist()
    assert retries(loader) == 8
    if kind != "processes":
        assert loader.dataset.calls == Counter({key: 3 if key % 5 == 0 else 1 for key in range(20)})
    loader.close()


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_without_batches(kind: str, face: Face, tmp_path: Path) -> None:
    if kind.endswith("many"):
        pytest.skip("torch needs __getitem__ here")
    loader = make(kind, tmp_path, batch_size=None, retry=AT_ONCE)
    assert collect(loader, face) == list(range(20))
    assert retries(loader) == 8
    loader.close()


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_after_the_last_attempt_the_error_stands_at_its_place(kind: str, face: Face, tmp_path: Path) -> None:
    loader = make(kind, tmp_path, 3, batch_size=4, retry=AT_ONCE)
    got: list[Any] = []
    with Steps(loader, face) as steps:
        for _ in range(5):
            try:
                got.append(steps.next().tolist())
            except ConnectionError as error:
                notes = "\n".join(error.__notes__)
                assert "attempt 3 of 3 failed" in notes
                got.append(str(error))
    assert got[4] == [16, 17, 18, 19], "the batch without any that fails"
    assert [str(one).rpartition(" was")[0] for one in got[:4]] == [f"sample {key}" for key in (0, 5, 10, 15)]
    loader.close()


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_has_had_all_its_attempts(kind: str, face: Face, tmp_path: Path) -> None:
    report = tmp_path / "skipped.jsonl"
    loader = make(kind, tmp_path, 3, batch_size=4, retry=AT_ONCE, skip_errors=Skip(ConnectionError, report=str(report)))
    got = [batch.tolist() for batch in collect(loader, face)]
    assert [sample for batch in got for sample in batch] == [key for key in range(20) if key % 5]
    loader.close()
    lines = report.read_text().splitlines()
    assert len(lines) == 4
    assert all('"attempts": 3' in line for line in lines)


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_other_errors_are_final(kind: str, face: Face, tmp_path: Path) -> None:
    loader = make(kind, tmp_path, 1, batch_size=20, retry=Retry(3, KeyError))
    with pytest.raises(ConnectionError):
        collect(loader, face)
    loader.close()


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_order", [True, False])
def test_batches_are_those_of_the_sampler(kind: str, face: Face, in_order: bool, tmp_path: Path) -> None:
    loader = make(kind, tmp_path, batch_size=3, shuffle=True, seed=5, in_order=in_order, drop_last=True, retry=AT_ONCE)
    plain: Any = DataLoader(range(20), batch_size=3, shuffle=True, seed=5, drop_last=True)
    assert [batch.tolist() for batch in collect(loader, face)] == [batch.tolist() for batch in plain]
    loader.close()


class Random:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: int) -> float:
        return sample_rng().random().random()


class RandomLater(Random):
    async def __getitem__(self, key: int) -> float:  # type: ignore[override]
        return sample_rng().random().random()


@on_both_faces
@pytest.mark.parametrize("dataset", [Random(), RandomLater()])
@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_are_those_without_policies(dataset: Any, workers: int, face: Face) -> None:
    plain = DataLoader(dataset, batch_size=4, num_workers=workers, seed=1)
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, seed=1, retry=3)
    assert torch.cat(collect(loader, face)).tolist() == torch.cat(collect(plain, face)).tolist()


@pytest.mark.parametrize("kind", ["async", "threads", "threads many", "inline", "processes"])
def test_it_resumes_exactly(kind: str, tmp_path: Path) -> None:
    assert_resumes_exactly(lambda: make(kind, tmp_path, 1, batch_size=3, shuffle=True, seed=2, retry=AT_ONCE))


def test_a_state_is_that_of_a_loader_without_policies() -> None:
    """One may be given up for the other in the middle of an epoch."""
    loader: Any = DataLoader(Sync(), batch_size=3, num_workers=2, shuffle=True, seed=2, retry=AT_ONCE)
    batches = iter(loader)
    first = [next(batches).tolist(), next(batches).tolist()]
    other: Any = DataLoader(range(20), batch_size=3, shuffle=True, seed=2)
    expected = [batch.tolist() for batch in other]
    again: Any = DataLoader(Sync(0), batch_size=3, num_workers=2, shuffle=True, seed=2)
    again.load_state_dict(loader.state_dict())
    loader.close()
    assert first + [batch.tolist() for batch in again] == expected


# -- time --------------------------------------------------------------------------------------------------------------


class Hanging(Async):
    """Key 3 hangs at first."""

    async def __getitem__(self, key: int) -> int:
        self.calls[key] += 1
        if key == 3 and self.calls[key] == 1:
            await asyncio.get_running_loop().create_future()
        return key


class HangingThere(OnDisk):
    def __getitem__(self, key: int) -> int:
        mark = self.folder / "hung"
        if key == 3 and not mark.exists():
            mark.touch()
            time.sleep(600)
        return key


@on_both_faces
@pytest.mark.parametrize("kind", ["async", "processes"])
def test_a_sample_that_hangs_is_given_up_and_loaded_again(kind: str, face: Face, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 5, "retry": Retry(2, TimeoutError, wait_initial=0, jitter=0)}
    loader: Any
    if kind == "async":
        loader = DataLoader(Hanging(), sample_timeout=0.05, **options)
    else:
        loader = DataLoader(HangingThere(tmp_path), num_workers=1, worker_type="process", sample_timeout=1.0, **options)
    assert torch.cat(collect(loader, face)).tolist() == list(range(20))
    assert sum(stage.timeouts for stage in loader.stats().stages) == 1
    loader.close()


@on_both_faces
@pytest.mark.parametrize("kind", ["async", "processes"])
def test_a_timeout_says_which_argument_it_is(kind: str, face: Face, tmp_path: Path) -> None:
    """A DataLoader has a `timeout`, too: that of a batch."""
    loader: Any
    if kind == "async":
        loader = DataLoader(Hanging(), batch_size=5, sample_timeout=0.05)
    else:
        loader = DataLoader(HangingThere(tmp_path), 5, num_workers=1, worker_type="process", sample_timeout=0.05)
    with pytest.raises(TimeoutError, match=r"took longer than sample_timeout=0\.05 s"):
        collect(loader, face)
    loader.close()


@on_both_faces
def test_a_second_call_has_the_sample_of_one_that_hangs(face: Face) -> None:
    loader: Any = DataLoader(Hanging(), batch_size=5, hedge=Hedge(after=0.02, budget=1.0))
    assert torch.cat(collect(loader, face)).tolist() == list(range(20))
    assert sum(stage.hedges for stage in loader.stats().stages) == 1


@on_both_faces
@pytest.mark.parametrize("kind", ["async", "threads"])
def test_no_more_samples_begin_than_the_rate_allows(kind: str, face: Face, tmp_path: Path) -> None:
    loader = make(kind, tmp_path, 0, batch_size=4, rate=Rate(SLOW, burst=8))
    with Steps(loader, face) as steps:
        assert [steps.next().tolist(), steps.next().tolist()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert sum(loader.dataset.calls.values()) == 8
        loader.close() if face == "for" else steps.do(loader.aclose)
    loader.close()


def test_without_workers_the_loop_itself_waits_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("aioloader.stages.load_one.sleep", waits.append)
    loader: Any = DataLoader(Sync(0), batch_size=4, rate=Rate(SLOW, burst=2))
    assert next(iter(loader)).tolist() == [0, 1, 2, 3]
    assert len(waits) == 2


@on_both_faces
@pytest.mark.parametrize("kind", ["async", "threads", "processes"])
def test_it_closes_while_samples_wait_for_their_next_attempt(kind: str, face: Face, tmp_path: Path) -> None:
    loader = make(kind, tmp_path, 1, batch_size=4, retry=Retry(2, wait_initial=3600, wait_max=3600))
    with Steps(loader, face) as steps:
        asked = steps.ask()
        if face == "for":
            wait_until(lambda: retries(loader) > 0)
            loader.close()
        else:

            async def close() -> None:
                await until(lambda: retries(loader) > 0)
                await loader.aclose()

            steps.do(close)
        with pytest.raises((RuntimeError, StopIteration, StopAsyncIteration)):
            asked()
    loader.close()


# -- bad input ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "options", "kind", "words"),
    [
        (Sync(), {"retry": 0}, ValueError, "retry"),
        (Sync(), {"retry": "3"}, TypeError, "retry"),
        (Sync(), {"sample_timeout": 1.0}, ValueError, "sample_timeout cannot stop a thread.*worker_type='process'"),
        (Sync(), {"sample_timeout": 1.0, "num_workers": 2}, ValueError, "sample_timeout cannot stop a thread"),
        (Async(), {"sample_timeout": -1.0}, ValueError, "sample_timeout"),
        (Async(), {"sample_timeout": "1"}, TypeError, "sample_timeout"),
        (Sync(), {"hedge": Hedge()}, ValueError, "hedge is for async"),
        (Async(), {"hedge": 0.1}, TypeError, "hedge"),
        (Async(), {"rate": 100}, TypeError, r"Rate\(100\)"),
        (Stream(), {"retry": 3}, ValueError, "loaded by key, got Stream"),
        (Stream(), {"rate": Rate(3)}, ValueError, "loaded by key, got Stream"),
    ],
)
def test_bad_arguments(dataset: Any, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        DataLoader(dataset, **options)
