"""`map(fn, executor="ray")`: the promises of the loader, kept by actors of a cluster."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aioloader import Pipeline, Retry, WorkerDiedError, sample_rng
from aioloader.ray import RayWorkers
from tests._ray import RayCluster
from tests._support import Face, Steps, collect, run

pytestmark = pytest.mark.usefixtures("ray_cluster")


class OddError(Exception):
    """Its constructor takes other arguments than `args` has."""

    def __init__(self, key: int, *, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key = key


def square(key: int) -> tuple[int, float]:
    """With random numbers of the sample, and errors."""
    if key % 17 == 5:
        raise OddError(key, why="five")
    return key * key, sample_rng().random().random()


async def square_async(key: int) -> tuple[int, float]:
    await asyncio.sleep(0)
    return square(key)


def outcomes(loader: Pipeline, face: Face = "for") -> list[Any]:
    """Of one epoch; errors at their places."""
    found: list[Any] = []
    with Steps(loader, face) as steps:
        while True:
            try:
                found.append(steps.next())
            except StopIteration:
                return found
            except Exception as error:
                found.append(error)


def shown(found: list[Any]) -> list[str]:
    return [repr(outcome) for outcome in found]


@pytest.mark.parametrize(
    ("fn", "face"),
    [
        (square, "for"),
        pytest.param(square, "async for", marks=pytest.mark.ray),
        pytest.param(square_async, "for", marks=pytest.mark.ray),
        pytest.param(square_async, "async for", marks=pytest.mark.ray),
    ],
)
def test_values_errors_and_random_numbers_are_those_of_threads(fn: Callable[[int], Any], face: Face) -> None:
    """In order, in two epochs, with the traceback of the actor in the notes."""
    here = Pipeline(range(60)).shuffle(seed=1).map(square).with_seed(5)
    with Pipeline(range(60)).shuffle(seed=1).map(fn, executor="ray", concurrency=2).with_seed(5) as there:
        for _ in range(2):
            found = outcomes(there, face)
            assert shown(found) == shown(outcomes(here))
        error = next(outcome for outcome in found if isinstance(outcome, OddError))
    notes = "\n".join(error.__notes__)
    assert "in square" in notes
    assert "aioloader: in Ray worker" in notes
    assert f"key {error.key}" in notes


@pytest.mark.ray
@pytest.mark.usefixtures("distance")
def test_a_filter_and_maps_side_by_side_cross_once() -> None:
    """They share the actors, and one chunk."""
    workers = RayWorkers(cpus=1)
    with (
        Pipeline(range(40))
        .filter(lambda key: key % 3, executor=workers, concurrency=1)
        .map(lambda key: key + 1, executor=workers, concurrency=1)
    ) as loader:
        assert list(loader) == [key + 1 for key in range(40) if key % 3]
        (stage,) = [stage for stage in loader.stats().stages if stage.kind == "ray"]
    assert " + " in stage.name
    assert stage.dropped == 14
    (actor,) = stage.actors
    assert actor.running
    assert actor.samples == 40
    assert actor.pid is not None
    assert actor.node
    assert actor.received_bytes > 0


def views(key: int) -> dict[str, Any]:
    """Views of one memory, which is large."""
    base = torch.full((1 << 19,), float(key))
    return {"all": base, "half": base[: 1 << 18], "array": np.full((1 << 19,), key), "few": torch.tensor([key])}


def test_what_is_delivered_is_nobody_elses_memory() -> None:
    """Writing to it changes nothing that anybody else sees, and it outlives the actor."""
    with Pipeline(range(6)).map(views, executor="ray", concurrency=2) as loader:
        kept = []
        for sample in loader:
            kept.append(sample)
            for value in sample.values():
                value += 1
    for key, sample in enumerate(kept):
        for value in sample.values():
            assert value.min() == value.max() == key + 1


@pytest.mark.ray
@pytest.mark.usefixtures("distance")
def test_arguments_are_the_actors_own() -> None:
    """A function may write to what it gets: the sample here stays as it was."""
    samples = [torch.zeros(1 << 18) for _ in range(4)]
    with Pipeline(samples).map(lambda sample: sample.add_(1), executor="ray", concurrency=1) as loader:
        for _ in range(2):
            assert all(float(sample.sum()) == 1 << 18 for sample in loader)
    assert all(float(sample.sum()) == 0 for sample in samples)


def die_once(marks: str, how: signal.Signals = signal.SIGKILL) -> Callable[[int], int]:
    """A function whose process dies with key 20, the first time."""

    def fn(key: int) -> int:
        mark = Path(marks) / "died"
        if key == 20 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), how)
        return key

    return fn


def test_a_sample_that_kills_its_actor_once_is_made_again(tmp_path: Path) -> None:
    """In order, nothing lost or repeated; `attempts` says so."""
    with (
        Pipeline(range(60)).map(die_once(str(tmp_path)), executor="ray", concurrency=2).batch(10).with_info() as loader
    ):
        batches, infos = zip(*loader, strict=True)
        assert torch.cat(batches).tolist() == list(range(60))
        assert max(info.attempts for info in infos) == 2
        assert sum(actor.restarts for actor in loader.stats().stages[1].actors) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("distance")
def test_an_actor_that_is_told_to_end_is_one_that_died(tmp_path: Path) -> None:
    """Ray raises SystemExit in it, wherever it is: that is no error of the sample there."""
    fn = die_once(str(tmp_path), signal.SIGTERM)
    with Pipeline(range(60)).map(fn, executor="ray", concurrency=2) as loader:
        assert list(loader) == list(range(60))
        assert sum(actor.restarts for actor in loader.stats().stages[1].actors) == 1


def always(key: int) -> int:
    if key == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return key


@pytest.mark.ray
@pytest.mark.usefixtures("distance")
@pytest.mark.parametrize("retries", [0, 1])
def test_a_sample_that_always_kills_fails_at_its_place(retries: int) -> None:
    """By name, after so many deaths more than it may survive, and nobody beside it."""
    workers = RayWorkers(retries=retries)
    with Pipeline(range(30)).map(always, executor=workers, concurrency=2) as loader:
        found = outcomes(loader)
    assert [outcome for outcome in found if type(outcome) is int] == [key for key in range(30) if key != 7]
    assert isinstance(found[7], WorkerDiedError)
    assert "it was making key 7, in attempt" in str(found[7])
    assert "Ray worker" in str(found[7])


def sleep_at_three(key: int) -> int:
    import time

    if key == 3:
        time.sleep(60)
    return key


@pytest.mark.ray
@pytest.mark.usefixtures("distance")
def test_a_call_that_takes_too_long_costs_its_actor() -> None:
    """It is killed and replaced, and the sample fails by `TimeoutError`."""
    with Pipeline(range(8)).map(sleep_at_three, executor="ray", concurrency=2, timeout=1.0) as loader:
        found = outcomes(loader)
        assert loader.stats().stages[1].timeouts == 1
    assert isinstance(found[3], TimeoutError)
    assert "took longer than timeout=1 s; Ray worker" in str(found[3])
    assert [outcome for outcome in found if type(outcome) is int] == [0, 1, 2, 4, 5, 6, 7]


async def hang_at_three(key: int) -> int:
    if key == 3:
        await asyncio.Event().wait()
    return key


@pytest.mark.ray
def test_an_async_call_that_takes_too_long_is_cancelled_there() -> None:
    """The actor lives on; a retry makes the call again."""
    retry = Retry(attempts=2, on=TimeoutError, wait_initial=0.01)
    with Pipeline(range(8)).map(hang_at_three, executor="ray", concurrency=4, timeout=0.2, retry=retry) as loader:
        found = outcomes(loader)
        stage = loader.stats().stages[1]
        assert (stage.timeouts, stage.retries) == (2, 1)
        assert [actor.restarts for actor in stage.actors] == [0]
    assert isinstance(found[3], TimeoutError)
    assert "timeout=0.2 s; it was cancelled" in str(found[3])


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("this stays where it is")


@pytest.mark.ray
@pytest.mark.usefixtures("distance")
def test_what_cannot_travel_fails_at_its_place() -> None:
    """Samples, results and functions, with the reason."""
    with Pipeline([1, Unpicklable(), 3]).map(lambda sample: sample, executor="ray", concurrency=1) as loader:
        found = outcomes(loader)
    assert (found[0], found[2]) == (1, 3)
    assert "a sample cannot cross to another process: this stays where it is" in str(found[1])
    with Pipeline([1, 2, 3]).map(
        lambda key: Unpicklable() if key == 2 else key, executor="ray", concurrency=1
    ) as loader:
        found = outcomes(loader)
    assert (found[0], found[2]) == (1, 3)
    assert "returned cannot cross to another process" in str(found[1])
    unpicklable = Unpicklable()
    with (
        Pipeline([1]).map(lambda key: (key, unpicklable), executor="ray", concurrency=1) as loader,
        pytest.raises(TypeError, match="this stays where it is"),
    ):
        list(loader)


@pytest.mark.ray
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_what_ends_a_program_is_raised_here(kind: type[BaseException], is_async: bool) -> None:
    """In order, and the actor lives on."""

    def fn(key: int) -> int:
        if key == 2:
            raise kind("stop")
        return key

    async def fn_async(key: int) -> int:
        return fn(key)

    with Pipeline(range(5)).map(fn_async if is_async else fn, executor="ray", concurrency=1) as loader:
        it = iter(loader)
        assert [next(it), next(it)] == [0, 1]
        expected = RuntimeError if kind is asyncio.CancelledError else kind
        with pytest.raises(expected):
            next(it)
        assert list(it) == [3, 4]
        assert [actor.restarts for actor in loader.stats().stages[1].actors] == [0]


@pytest.mark.ray
@pytest.mark.usefixtures("distance")
def test_a_state_goes_on_with_any_number_of_actors_and_elsewhere() -> None:
    """2 actors, then 4, then 1, then threads, at every step."""

    def pipeline(**where: Any) -> Pipeline:
        return Pipeline(range(20)).shuffle(seed=3).map(square_even, **where).batch(4).with_seed(1)

    def on_ray(actors: int) -> Pipeline:
        return pipeline(executor=RayWorkers(cpus=0.5), concurrency=actors)

    whole = [batch.tolist() for batch in pipeline()]
    with on_ray(2) as two, on_ray(4) as four, on_ray(1) as one:
        loaders = [two, four, one, pipeline()]
        for first in range(len(whole) + 1):
            state = None
            found: list[list[float]] = []
            for number, loader in enumerate(loaders):
                if state is not None:
                    loader.load_state_dict(json.loads(state))
                else:
                    loader.set_epoch(0)
                it = iter(loader)
                stop = first if not number else first + number
                while len(found) < min(stop, len(whole)) or number == len(loaders) - 1:
                    try:
                        found.append(next(it).tolist())
                    except StopIteration:
                        break
                state = json.dumps(loader.state_dict())
                if len(found) == len(whole):
                    break
                it.close()
            assert found == whole


def square_even(key: int) -> float:
    return key * key + float(sample_rng().random().random())


def test_bad_arguments_are_refused_at_construction() -> None:
    """With what to do."""
    from aioloader import Hedge

    with pytest.raises(ValueError, match="hedge makes its second calls on the loop"):
        Pipeline([1]).map(square_async, executor="ray", hedge=Hedge(after=1.0))
    with pytest.raises(ValueError, match="'thread', 'process' or 'ray', got 'dask'"):
        Pipeline([1]).map(square, executor="dask")  # type: ignore[call-overload]


def test_without_a_cluster_the_first_batch_says_so(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoch has not begun: it can be asked for again once there is one."""
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    loader = Pipeline(range(3)).map(abs, executor="ray", concurrency=1)
    with ray_cluster.left():
        with pytest.raises(ValueError, match=r"call ray\.init\('local'\)"):
            next(iter(loader))
        assert not ray.is_initialized()
    assert loader.state_dict()["epoch"] == 0
    with loader:
        assert collect(loader, "for") == [0, 1, 2]


@pytest.mark.ray
@pytest.mark.usefixtures("distance")
def test_a_pause_begins_nothing_in_actors() -> None:
    """It is entered when the actors have nothing that could begin, and all goes on after it."""
    loader = Pipeline(range(400)).map(slow, executor="ray", concurrency=2)

    async def main() -> None:
        async with loader:
            it = aiter(loader)
            found = [await anext(it)]
            async with loader.paused(drain=True):
                assert all(stage.under_way == 0 for stage in loader.stats().stages[1:])
            async for sample in it:
                found.append(sample)
            assert found == list(range(400))

    run(main)


def slow(key: int) -> int:
    import time

    time.sleep(0.001)
    return key
