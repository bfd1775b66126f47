"""What is done about calls of `map` that fail, take long, or are too many."""

import asyncio
import threading
import time
from collections import Counter
from typing import Any, cast

import pytest

from aioloader import Hedge, Pipeline, Rate, Retry
from tests._support import Face, Steps, notes, on_both_faces
from tests._work import forever

QUICK = Retry(attempts=3, on=OSError, wait_initial=0.001, jitter=0.001)


class Flaky:
    """Each fifth sample fails twice, sample 7 always, and sample 8 with an error that is not retried."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self._lock = threading.Lock()

    def sync(self, key: int) -> int:
        with self._lock:
            self.calls[key] += 1
        if key == 7 or (key % 5 == 0 and self.calls[key] < 3):
            raise OSError(f"no {key}")
        if key == 8:
            raise ValueError("bad")
        return key

    async def asynchronous(self, key: int) -> int:
        await asyncio.sleep(0)
        return self.sync(key)


def outcomes(loader: Any, face: Face) -> list[Any]:
    with Steps(loader, face) as steps:
        return steps.outcomes()


@on_both_faces
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("fn", ["sync", "asynchronous"])
def test_a_failed_call_is_made_again(face: Face, fn: str, ordered: bool) -> None:
    flaky = Flaky()
    loader = Pipeline(range(20)).map(getattr(flaky, fn), concurrency=4, ordered=ordered, retry=QUICK)
    found = outcomes(loader, face)
    errors = {str(error): error for error in found if isinstance(error, Exception)}
    given = [sample for sample in found if not isinstance(sample, Exception)]
    expected = [key for key in range(20) if key not in (7, 8)]
    assert (given if ordered else sorted(given)) == expected
    assert set(errors) == {"no 7", "bad"}
    assert "attempt 3 of 3 failed" in notes(errors["no 7"])
    assert flaky.calls[7] == 3
    assert flaky.calls[8] == 1
    (stage,) = [stage for stage in loader.stats().stages if stage.name.startswith("map")]
    assert stage.retries == 2 * 4 + 2


@on_both_faces
def test_a_budget_stops_retries_in_an_outage(face: Face) -> None:
    calls = Counter[int]()

    async def down(key: int) -> int:
        calls[key] += 1
        raise OSError("down")

    loader = Pipeline(range(200)).map(
        down, concurrency=8, retry=Retry(5, OSError, wait_initial=0, jitter=0, budget=0.1)
    )
    found = outcomes(loader, face)
    assert len(found) == 200
    assert all(isinstance(error, OSError) for error in found)
    assert calls.total() <= 200 * 1.2 + 20


@on_both_faces
def test_a_call_that_hangs_is_cancelled_and_awaited(face: Face) -> None:
    """What it cleans up is done before the next attempt begins."""
    tries = Counter[int]()
    cleaned: list[int] = []

    async def hang(key: int) -> int:
        tries[key] += 1
        if key % 4 == 1 and tries[key] == 1:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.append(key)
        return key

    retry = Retry(2, TimeoutError, wait_initial=0, jitter=0)
    loader = Pipeline(range(12)).map(hang, concurrency=12, timeout=0.02, retry=retry)
    assert outcomes(loader, face) == list(range(12))
    assert sorted(cleaned) == [1, 5, 9]
    assert loader.stats().stages[-1].timeouts == 3


@on_both_faces
def test_a_second_call_takes_the_place_of_one_that_takes_long(face: Face) -> None:
    tries = Counter[int]()
    cancelled: list[int] = []

    async def slow_at_first(key: int) -> int:
        tries[key] += 1
        if key == 3 and tries[key] == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(key)
                raise
        return key

    loader = Pipeline(range(8)).map(slow_at_first, concurrency=4, hedge=Hedge(after=0.01, budget=1.0))
    assert outcomes(loader, face) == list(range(8))
    assert tries[3] == 2
    assert cancelled == [3]
    assert loader.stats().stages[-1].hedges == 1


def test_a_worker_process_whose_call_hangs_is_replaced() -> None:
    with Pipeline([4, 5, 6]).map(forever, concurrency=2, executor="process", timeout=1.0) as loader:
        found = outcomes(loader, "for")
    assert [found[0], found[2]] == [4, 6]
    assert isinstance(found[1], TimeoutError)
    assert "was killed" in str(found[1])


@on_both_faces
@pytest.mark.parametrize("fn", ["sync", "asynchronous"])
def test_calls_begin_at_a_rate(face: Face, fn: str) -> None:
    """So many in the time that they took, at most; retries count."""
    flaky = Flaky()
    began = time.perf_counter()
    loader = Pipeline(range(20, 60)).map(getattr(flaky, fn), concurrency=8, rate=Rate(200, 5), retry=QUICK)
    assert outcomes(loader, face) == list(range(20, 60))
    seconds = time.perf_counter() - began
    assert flaky.calls.total() == 40 + 2 * 8
    assert flaky.calls.total() <= 200 * seconds + 5 + 1


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"retry": 0}, ValueError),
        ({"retry": "3"}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": -1.0}, ValueError),
        ({"hedge": 0.1}, TypeError),
        ({"rate": 100}, TypeError),
    ],
)
def test_bad_input_is_refused_at_once(arguments: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=next(iter(arguments))):
        Pipeline(range(3)).map(Flaky().asynchronous, **arguments)


def test_threads_cannot_be_stopped() -> None:
    with pytest.raises(ValueError, match="cannot stop a thread"):
        Pipeline(range(3)).map(Flaky().sync, timeout=1.0)
    with pytest.raises(ValueError, match="hedge is for async"):
        Pipeline(range(3)).map(Flaky().sync, hedge=Hedge())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Retry(attempts=0), ValueError),
        (lambda: Retry(on=cast(Any, 3)), TypeError),
        (lambda: Retry(on=cast(Any, KeyboardInterrupt)), TypeError),
        (lambda: Retry(wait_initial=-1), ValueError),
        (lambda: Retry(budget=1.5), ValueError),
        (lambda: Hedge(after="soon"), ValueError),
        (lambda: Hedge(budget=-0.1), ValueError),
        (lambda: Rate(0), ValueError),
        (lambda: Rate(10, 0), ValueError),
        (lambda: Rate.adaptive(on=cast(Any, 3)), TypeError),
    ],
)
def test_bad_policies_are_refused_at_once(make: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        make()
