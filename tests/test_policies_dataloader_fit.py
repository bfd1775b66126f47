"""What a `DataLoader` whose samples have policies keeps of what it is without: datasets, workers, room, numbers."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from aioloader import DataLoader, Hedge, Rate, Retry, Skip, sample_rng
from tests._support import DEADLINE, Face, Steps, collect, on_both_faces, until

AT_ONCE = Retry(3, ConnectionError, wait_initial=0, jitter=0)


class Numbers(Dataset[Any]):
    """Samples 0 to 399."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 400

    def load(self, key: int) -> Any:
        with self._lock:
            self.begun[key] += 1
        return key

    def __getitem__(self, key: int) -> Any:
        return self.load(key)


class NumbersLater(Numbers):
    async def __getitem__(self, key: int) -> Any:
        await asyncio.sleep(0)
        return self.load(key)


class NumbersInTwo(Numbers):
    """The first sample of a thread waits for that of another one: threads start when there is work for them."""

    def __init__(self) -> None:
        super().__init__()
        self._both = threading.Barrier(2)
        self._thread = threading.local()

    def __getitem__(self, key: int) -> Any:
        if not hasattr(self._thread, "begun"):
            self._thread.begun = True
            self._both.wait(DEADLINE)
        return self.load(key)


# -- datasets ----------------------------------------------------------------------------------------------------------


class OnlyMany(Dataset[int]):
    """Torch's own `__getitem__` is there, and raises."""

    def __len__(self) -> int:
        return 4

    def __getitems__(self, keys: Sequence[int]) -> list[int]:
        return list(keys)


@on_both_faces
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [OnlyMany(), Subset(OnlyMany(), [0, 1, 2, 3])])
def test_a_dataset_that_has_only_getitems(dataset: Any, workers: int, face: Face) -> None:
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, retry=3)
    assert [batch.tolist() for batch in collect(loader, face)] == [[0, 1], [2, 3]]


def test_policies_of_a_user_are_something_else() -> None:
    """Reinforcement learning has a word for it, too."""
    dataset: Any = NumbersLater()
    dataset.policies = ["greedy"]
    loader: Any = DataLoader(dataset, batch_size=400)
    assert [len(batch) for batch in loader] == [400]


class Keys:
    """A batch sampler."""

    def __init__(self, *batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


@on_both_faces
@pytest.mark.parametrize("retry", [None, 3])
@pytest.mark.parametrize(("dataset", "workers"), [(Numbers(), 0), (Numbers(), 2), (NumbersLater(), 0)])
def test_what_is_no_batch_of_keys_fails_at_its_place(dataset: Any, workers: int, retry: Any, face: Face) -> None:
    sampler: Any = Keys([0, 1], 5, [2], [])
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list, retry=retry)
    got: list[Any] = []
    with Steps(loader, face) as steps:
        for _ in range(4):
            try:
                got.append(steps.next())
            except TypeError as error:
                got.append(any("5" in note for note in error.__notes__))
    assert got == [[0, 1], True, [2], []]


# -- what is tried again -----------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize(("dataset", "workers"), [(Numbers(), 0), (Numbers(), 2), (NumbersLater(), 0)])
def test_collate_fn_is_not_tried_again(dataset: Any, workers: int, face: Face) -> None:
    calls: Counter[int] = Counter()

    def convert(sample: Any) -> Any:
        calls[sample] += 1
        raise ConnectionError

    loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=convert, retry=AT_ONCE)
    with Steps(loader, face) as steps:
        with pytest.raises(ConnectionError):
            steps.next()
        loader.close() if face == "for" else steps.do(loader.aclose)
    assert set(calls.values()) == {1}


class Drawing(Numbers):
    """Draws, and then fails twice; the third time it says what it drew."""

    def __len__(self) -> int:
        return 6

    def load(self, key: int) -> float:
        drawn = sample_rng().random().random()
        super().load(key)
        if key % 2 and self.begun[key] < 3:
            raise ConnectionError
        return drawn


class DrawingLater(Drawing):
    async def __getitem__(self, key: int) -> float:
        return self.load(key)


@on_both_faces
@pytest.mark.parametrize("size", [3, None])
@pytest.mark.parametrize(("kind", "workers"), [(Drawing, 0), (Drawing, 2), (DrawingLater, 0)])
def test_each_attempt_has_the_same_random_numbers(
    kind: Callable[[], Any], workers: int, size: int | None, face: Face
) -> None:
    first = DrawingLater()
    first.begun.update(dict.fromkeys(range(6), 2))  # it does not fail
    expected: Any = DataLoader(first, batch_size=6, seed=1)
    loader = DataLoader(kind(), batch_size=size, seed=1, num_workers=workers, retry=AT_ONCE)
    got = collect(loader, face)
    assert (torch.cat(got).tolist() if size else got) == next(iter(expected)).tolist()
    expected.close()


def test_the_report_says_how_long_the_last_attempt_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]

    class Slow(Numbers):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, key: int) -> Any:
            clock[0] += 2
            raise ConnectionError

    for module in ("stages.load_one", "stages.load", "engine.inline"):
        monkeypatch.setattr(f"aioloader.{module}.perf_counter", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("aioloader.stages.load_one.sleep", sleep)
    for size in (1, None):
        report = tmp_path / f"{size}.jsonl"
        skip = Skip(report=str(report))
        loader: Any = DataLoader(Slow(), batch_size=size, retry=Retry(3, wait_initial=5, jitter=0), skip_errors=skip)
        assert list(loader) == []
        record = json.loads(report.read_text())
        assert (record["attempts"], record["seconds"]) == (3, 2.0)


def test_ctrl_c_gives_a_turn_of_the_rate_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = Rate(1.0, burst=1)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aioloader.stages.load_one.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iter(DataLoader(Numbers(), batch_size=2, rate=rate)))
    assert rate.take() <= 1.0


# -- workers and room --------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("size", [4, None])
@pytest.mark.parametrize("retry", [None, 3])
def test_worker_init_fn_is_called_once_for_each_worker(retry: Any, size: int | None, face: Face) -> None:
    calls: list[int] = []
    loader = DataLoader(NumbersInTwo(), batch_size=size, num_workers=2, worker_init_fn=calls.append, retry=retry)
    collect(loader, face)
    assert sorted(calls) == [0, 1]


@on_both_faces
@pytest.mark.parametrize("size", [4, None])
def test_threads_that_only_collate_are_the_workers_of_an_async_dataset(size: int | None, face: Face) -> None:
    calls: list[int] = []
    loader = DataLoader(NumbersLater(), batch_size=size, num_workers=1, worker_init_fn=calls.append, retry=3)
    collect(loader, face)
    assert calls == [0]


@on_both_faces
@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"num_workers": 0}, 0),
        ({"num_workers": 2}, 4),
        ({"num_workers": 2, "prefetch_factor": 3}, 6),
        ({"num_workers": 2, "ahead": 5, "in_order": False}, 5),
    ],
)
def test_no_more_is_ahead_than_without_policies(options: dict[str, Any], batches: int, face: Face) -> None:
    dataset = Numbers()
    loader: Any = DataLoader(dataset, batch_size=4, retry=3, **options)
    with Steps(loader, face) as steps:
        for given in range(1, 101):
            steps.next()
            if "prefetch_factor" in options or "ahead" in options or not batches:  # else it may grow
                assert dataset.begun.total() <= 4 * (given + batches)
        rooms = {stage.name: stage.room for stage in loader.stats().stages}
        if batches and not loader._arguments.grows:
            assert rooms["dataset[...]"] + 4 * rooms["collate"] == 4 * batches


@on_both_faces
def test_others_go_on_while_a_sample_waits_for_its_next_attempt(face: Face) -> None:
    """In order, it holds the batches after it up: these are loaded meanwhile, to 16 times as many as usual."""

    class First(Numbers):
        def load(self, key: int) -> Any:
            super().load(key)
            if key == 0:
                raise ConnectionError
            return key

    dataset = First()
    loader = DataLoader(dataset, batch_size=2, num_workers=2, retry=Retry(2, wait_initial=3600, wait_max=3600))
    with Steps(loader, face) as steps:
        asked = steps.ask()

        async def others() -> None:
            await until(lambda: dataset.begun.total() > 32)
            await loader.aclose()

        if face == "for":
            asyncio.run(others())
        else:
            steps.do(others)
        with pytest.raises((RuntimeError, StopIteration, StopAsyncIteration)):
            asked()
    loader.close()


# -- bad input ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize("option", [{"sample_timeout": 1.0}, {"hedge": Hedge()}])
def test_an_iterable_dataset_is_told_that_it_is_one(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="loaded by key, got Stream"):
        DataLoader(Stream(), **option)


def test_processes_are_none_without_workers() -> None:
    with pytest.raises(ValueError, match="worker_type='process' with num_workers=1 or more"):
        DataLoader(Numbers(), worker_type="process", sample_timeout=1.0)
