"""`Pipeline.in_process()`: the same batches, errors and states, from a process of its own."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import RandomSampler

from aioloader import Pipeline, WorkerDiedError, sample_rng
from tests import _work
from tests._datasets import assert_same
from tests._support import Face, Steps, collect, explained, notes, on_both_faces, run
from tests._support import workers as processes


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    """The process that others are forked from: made once, for it takes seconds to import torch."""
    with Pipeline(range(1)).in_process() as keeper:
        assert list(keeper) == [0]
        yield


async def later(sample: Any) -> Any:
    await asyncio.sleep(0)
    return sample


async def stream() -> AsyncIterator[int]:
    for number in range(25):
        await asyncio.sleep(0)
        yield number


def fails_at_seven(sample: int) -> int:
    if sample == 7:
        raise KeyError("seven")
    return sample


def noise(sample: int) -> torch.Tensor:
    return torch.rand(3, generator=sample_rng()) + sample


PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "samples": lambda: Pipeline(range(300)).map(later).map(_work.double),
    "shuffled batches": lambda: Pipeline(range(40)).shuffle(seed=3).map(later).map(_work.filled).batch(4),
    "stream": lambda: Pipeline(stream).map(_work.double).shuffle(buffer_size=5).batch(4, drop_last=True),
    "folds": lambda: Pipeline(range(40)).filter(lambda x: x % 3).flat_map(lambda x: [x] * (x % 3)).enumerate(),
    "repeat": lambda: Pipeline(range(7)).shuffle(seed=1).batch(3).repeat(3),
    "shard": lambda: Pipeline(range(20)).shard(1, 3),
    "mix": lambda: Pipeline.mix([range(30), stream], [1, 2], seed=4).batch(5),
    "random numbers of samples": lambda: Pipeline(range(30)).with_seed(5).map(noise).batch(4),
    "nothing": lambda: Pipeline([]),
}


@pytest.mark.parametrize("name", PIPELINES)
@on_both_faces
def test_two_epochs_are_the_same_as_without(face: Face, name: str) -> None:
    """With more stages behind it, too."""
    make = PIPELINES[name]
    with make() as here, make().in_process() as there:
        for _ in range(2):
            assert_same(collect(there, face), collect(here, face))
    behind = make().map(unchanged).take(6)
    with behind, make().in_process().map(unchanged).take(6) as there:
        assert_same(collect(there, face), collect(behind, face))


def unchanged(sample: Any) -> Any:
    return sample


def test_random_numbers_of_stages_behind_it_are_the_same() -> None:
    here = Pipeline(range(10)).with_seed(5).map(noise)
    with Pipeline(range(10)).with_seed(5).in_process().map(noise) as there:
        assert_same(list(there), list(here))
    twice = Pipeline(range(10)).with_seed(5).map(_work.double).map(noise)
    with Pipeline(range(10)).with_seed(5).map(_work.double).in_process().map(noise) as there:
        assert_same(list(there), list(twice))


def test_everything_before_it_runs_in_one_other_process() -> None:
    """Functions, async functions, sources; on an event loop there. What is behind it runs here."""

    async def where(sample: int) -> tuple[int, str]:
        return os.getpid(), threading.current_thread().name

    def source() -> Iterator[int]:
        while True:
            yield os.getpid()

    with (
        Pipeline(source)
        .map(lambda pid: (pid, os.getpid()))
        .take(5)
        .in_process()
        .map(lambda pair: (*pair, os.getpid())) as loader
    ):
        samples = set(loader)
    ((first, second, third),) = samples
    assert first == second != third == os.getpid()
    with Pipeline(range(5)).map(where).in_process() as other:
        ((pid, thread),) = set(other)
    assert pid not in (first, os.getpid())
    assert thread == "MainThread"


@on_both_faces
def test_errors_stand_at_their_place(face: Face) -> None:
    """The user's own, with the notes of both sides; the next batch follows."""
    pipeline = Pipeline(range(20)).map(fails_at_seven).batch(5)
    with pipeline.in_process() as loader, Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert [type(outcome) for outcome in outcomes] == [torch.Tensor, KeyError, torch.Tensor, torch.Tensor]
    assert "stage map(fails_at_seven), key 7, epoch 0, position 7" in notes(outcomes[1])
    assert 'raise KeyError("seven")' in notes(outcomes[1])


@on_both_faces
def test_a_source_that_fails_raises_once_after_the_samples_before_it(face: Face) -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise OSError("gone")

    with Pipeline(source).in_process() as loader, Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert outcomes[:3] == [0, 1, 2]
    (error,) = outcomes[3:]
    assert isinstance(error, OSError)


@on_both_faces
def test_a_process_that_is_killed_is_named_and_the_next_epoch_has_a_new_one(face: Face, tmp_path: Path) -> None:
    """What it sent comes, in order, then the error, then the end."""
    died = tmp_path / "died"

    def dies_once(sample: int) -> int:
        if sample == 200 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return sample

    with Pipeline(range(300)).map(dies_once, concurrency=1).in_process() as loader:
        with Steps(loader, face) as steps:
            outcomes = steps.outcomes()
        assert isinstance(outcomes[-1], WorkerDiedError)
        assert "was killed by SIGKILL" in str(outcomes[-1])
        assert outcomes[:-1] == list(range(len(outcomes) - 1))
        assert collect(loader, face) == list(range(300))


@on_both_faces
def test_a_state_goes_on_with_and_without_it(face: Face) -> None:
    """JSON-able, and the same wherever the stages run."""
    make = PIPELINES["shuffled batches"]
    with make() as here, make().in_process() as there:
        whole = collect(here, face)
        with Steps(there, face) as steps:
            for _ in range(4):
                steps.next()
            state = json.loads(json.dumps(there.state_dict()))
        for build in (make, lambda: make().in_process()):
            with build() as resumed:
                resumed.load_state_dict(state)
                assert_same(collect(resumed, face), whole[4:])


def test_no_more_is_made_than_is_bounded(tmp_path: Path) -> None:
    """A consumer that stands still: what the inner pipeline holds, and two batches between the two."""
    log = tmp_path / "log"

    def note(sample: int) -> int:
        with log.open("a") as file:
            file.write("x")
        return sample

    def settled() -> int:
        return len(log.read_text()) if log.exists() else 0

    with Pipeline(range(3000)).map(note, concurrency=1).batch(1).in_process().prefetch(1) as loader:
        batches = iter(loader)
        next(batches)
        with Pipeline(range(5000)).in_process() as other:  # time, for whoever would run ahead
            assert len(list(other)) == 5000
        assert settled() < 1500  # cheap samples go through threads in hops of up to 256
        assert [int(batch) for batch in batches] == list(range(1, 3000))


@on_both_faces
def test_break_ends_the_inner_epoch_and_keeps_the_process(face: Face, tmp_path: Path) -> None:
    """The user's generator is closed there."""
    closed = tmp_path / "closed"

    def source() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.touch()

    with Pipeline(source).map(lambda x: (x, os.getpid())).in_process() as loader:
        (first,) = collect(loader, face, limit=1)
        until(closed.exists)
        (second,) = collect(loader, face, limit=1)
    assert first == second


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


def test_close_and_garbage_collection_leave_no_process() -> None:
    before = processes()
    loader = Pipeline(range(50)).in_process()
    for _ in range(2):
        assert len(list(loader)) == 50
        assert processes() - before
        loader.close()
        assert processes() == before
    next(iter(loader))
    mine = [psutil.Process(pid) for pid in processes() - before]
    del loader
    gc.collect()
    _, alive = psutil.wait_procs(mine, timeout=10)
    assert not alive


def test_closing_kills_a_process_whose_function_never_returns() -> None:
    before = processes()

    def stuck(sample: int) -> int:
        if sample:
            threading.Event().wait()
        return sample

    with Pipeline(range(10)).map(stuck).in_process() as loader:
        assert next(iter(loader)) == 0
    assert processes() == before


def test_a_cancelled_step_loses_no_batch() -> None:
    async def main() -> None:
        async with Pipeline(range(100)).map(later).in_process() as loader:
            batches = aiter(loader)
            found: list[int] = []
            while len(found) < 100:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0):
                        found.append(await anext(batches))
                if len(found) < 100:
                    found.append(await anext(batches))
            assert found == list(range(100))

    run(main)


def test_two_epochs_at_once_share_the_process() -> None:
    with Pipeline(range(50)).map(lambda x: (x, os.getpid())).in_process() as loader:
        pairs = list(zip(loader, loader, strict=True))
    assert len({pid for pair in pairs for _, pid in pair}) == 1
    assert [first for (first, _), _ in pairs] == list(range(50))


def test_batches_that_are_kept_stay_as_they_are() -> None:
    with Pipeline(range(60)).map(_work.filled).batch(2).in_process() as loader:
        kept = [(batch, batch[1][3:4]) for batch in loader]
        for _ in loader:  # whatever would be used again is, now
            pass
    for number, (batch, row) in enumerate(kept):
        assert (batch[0] == 2 * number).all()
        assert (row == 2 * number + 1).all()


def test_stats_and_explain_know_the_stages_there() -> None:
    """In the order of the pipeline."""
    with Pipeline(range(50)).map(_work.busy_millisecond).batch(5).in_process().map(_work.double) as loader:
        list(loader)
        stages = loader.stats().stages
        assert [stage.name for stage in stages] == ["source(range)", "map(busy_millisecond)", "collate", "map(double)"]
        assert stages[1].samples == 50
        assert stages[1].busy_seconds >= 0.05
        assert "busy_millisecond" in explained(loader)


def test_a_rank_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up here, when the epoch begins."""
    with Pipeline(range(10)).shard().in_process() as loader:
        assert len(list(loader)) == 10
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert list(loader) == [1, 3, 5, 7, 9]


def test_what_cannot_go_there_is_refused() -> None:
    with pytest.raises(ValueError, match="pass the generator function itself"):
        Pipeline(iter([1])).in_process()
    with pytest.raises(ValueError, match=r"use shuffle\(seed=\.\.\.\) instead"):
        Pipeline(range(3), sampler=RandomSampler(range(3))).in_process()
    with pytest.raises(ValueError, match=r"must come before in_process\(\)"):
        Pipeline(range(3)).in_process().in_process()
    lock = threading.Lock()
    with Pipeline(range(3)).map(lambda x: (x, lock)).in_process() as loader, Steps(loader, "for") as steps:
        (error,) = steps.outcomes()
    assert "cannot cross to another process" in str(error)


class Unreadable:
    """Reads a file when it is pickled, which is not there."""

    def __reduce__(self) -> Any:
        raise FileNotFoundError("no such file")


@pytest.mark.parametrize("kind", [threading.Lock, Unreadable])
def test_a_batch_that_cannot_be_pickled_fails_alone(kind: Callable[[], Any]) -> None:
    pipeline = Pipeline(range(4)).map(lambda x: kind() if x == 2 else x)
    with pipeline.in_process() as loader, Steps(loader, "for") as steps:
        outcomes = steps.outcomes()
    assert outcomes[:2] + outcomes[3:] == [0, 1, 3]
    assert "a batch cannot cross to another process" in str(outcomes[2])


def test_tensors_beside_what_cannot_be_pickled_come_as_they_are() -> None:
    """They travel together, and each is pickled by itself then."""
    pipeline = Pipeline(range(64)).map(lambda x: threading.Lock() if x == 40 else torch.full((4096,), float(x)))
    with pipeline.in_process() as loader, Steps(loader, "for") as steps:
        outcomes = steps.outcomes()
    assert isinstance(outcomes.pop(40), Exception)
    for number, tensor in zip([*range(40), *range(41, 64)], outcomes, strict=True):
        assert (tensor == number).all()
        tensor.add_(1)


class Flaky:
    """Cannot be pickled at some attempts."""

    def __init__(self, fails_at: tuple[int, ...]) -> None:
        self.fails_at = fails_at
        self.attempts = 0

    def __reduce__(self) -> Any:
        self.attempts += 1
        if self.attempts in self.fails_at:
            raise OSError("not now")
        return Flaky, (self.fails_at,)


@pytest.mark.parametrize("fails_at", [(1,), (1, 3), (2,)])
def test_what_is_pickled_once_is_not_pickled_again(fails_at: tuple[int, ...]) -> None:
    pipeline = Pipeline(range(4)).map(lambda x: Flaky(fails_at) if x == 2 else x)
    with pipeline.in_process() as loader:
        samples: list[Any] = list(loader)
    assert samples[:2] + samples[3:] == [0, 1, 3]
    assert samples[2].fails_at == fails_at


def test_sigint_is_not_for_the_other_process() -> None:
    """A Ctrl-C reaches the group of this process alone; and one that is sent to it is ignored."""
    with Pipeline(range(100)).map(_work.pid_of).in_process() as loader:
        samples = iter(loader)
        os.kill(next(samples), signal.SIGINT)
        assert len(list(samples)) == 99
