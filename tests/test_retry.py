"""`map(retry=)`: calls that fail are made again; who waits for that keeps its place and holds nobody up."""

import asyncio
import contextlib
import gc
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aioloader import Limit, LoaderClosedError, Pipeline, Retry, sample_rng
from aioloader.core.policies import Budget, retry_after
from aioloader.engine.steps import Step
from aioloader.testing import Gate, assert_resumes_exactly
from tests._support import (
    FACES,
    Face,
    Steps,
    collect,
    join_loader_threads,
    notes,
    on_both_faces,
    run,
    turns,
    until,
    wait_until,
)

KINDS = ("async", "threads")

AT_ONCE = Retry(attempts=3, on=OSError, wait_initial=0.0, jitter=0.0)
NEVER = Retry(attempts=3, on=OSError, wait_initial=3000.0, wait_max=3000.0, jitter=0.0)
"""No test waits for the next attempt of this."""


pytestmark = pytest.mark.usefixtures("fork_server")


class Flaky:
    """A function that fails for some samples, and counts its calls.

    Args:
        failures: How often it fails for a sample.
        error: What it raises, made of the sample.
    """

    def __init__(self, failures: dict[int, int], error: Callable[[Any], BaseException] = OSError) -> None:
        self.failures = failures
        self.error = error
        self.calls: Counter[Any] = Counter()
        self.errors: list[BaseException] = []
        self.gate: Gate | None = None

    def __call__(self, sample: int) -> int:
        self.calls[sample] += 1
        if self.calls[sample] <= self.failures.get(sample, 0):
            error = self.error(sample)
            self.errors.append(error)
            raise error
        return sample

    def function(self, kind: str) -> Callable[[Any], Any]:
        async def awaited(sample: Any) -> Any:
            await asyncio.sleep(0)
            result = self(sample)
            if self.gate is not None:
                await self.gate.passing(sample)
            return result

        def in_thread(sample: Any) -> Any:
            result = self(sample)
            if self.gate is not None:
                self.gate.pass_sync(sample)
            return result

        return awaited if kind == "async" else in_thread


class FailsOnce:
    """In other processes, where nothing is remembered: a file tells that it has failed."""

    def __init__(self, folder: Path, *which: int) -> None:
        self.folder, self.which = folder, which

    def __call__(self, sample: int) -> int:
        if sample in self.which:
            try:
                (self.folder / str(sample)).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                raise OSError(f"no {sample}")
        return sample


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"attempts": 0}, ValueError, "attempts"),
        ({"attempts": True}, TypeError, "attempts"),
        ({"attempts": 2.5}, TypeError, "attempts"),
        ({"wait_initial": -1}, ValueError, "wait_initial"),
        ({"wait_max": float("nan")}, ValueError, "wait_max"),
        ({"jitter": "1"}, TypeError, "jitter"),
        ({"budget": 1.5}, ValueError, "budget"),
        ({"budget": -0.1}, ValueError, "budget"),
        ({"budget": True}, TypeError, "budget"),
        ({"on": ()}, TypeError, "on must be"),
        ({"on": "OSError"}, TypeError, "on must be"),
        ({"on": KeyboardInterrupt}, TypeError, "on must be"),
        ({"on": [OSError]}, TypeError, "on must be"),
        ({"on": OSError()}, TypeError, "on must be"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    """The rule, the value found, and a way out."""
    with pytest.raises(kind, match=words) as caught:
        Retry(**arguments)
    assert ";" in str(caught.value)


@pytest.mark.parametrize(("retry", "kind"), [(0, ValueError), (-1, ValueError), (True, TypeError), ("3", TypeError)])
def test_bad_retry(retry: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="retry must be"):
        Pipeline(range(3)).map(abs, retry=retry)


def test_waits_grow_and_have_a_maximum() -> None:
    retry = Retry(wait_initial=0.5, wait_max=3.0, jitter=0.0)
    error = OSError()
    assert [retry.seconds_before(attempt, error) for attempt in (2, 3, 4, 5, 1000)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    jittered = Retry(wait_initial=0.5, wait_max=30.0, jitter=1.0)
    waits = {jittered.seconds_before(2, error) for _ in range(100)}
    assert len(waits) > 50
    assert all(0.5 <= wait <= 1.5 for wait in waits)


def test_jitter_leaves_the_callers_random_numbers_alone() -> None:
    before = random.getstate()
    Retry().seconds_before(2, OSError())
    assert random.getstate() == before


def test_a_server_may_say_how_long_to_wait() -> None:
    """As an attribute, or as a header of the error or of its response: seconds, or a date."""

    class Lower(dict[str, str]):
        pass

    def error(**attributes: Any) -> Exception:
        found = OSError()
        for name, value in attributes.items():
            setattr(found, name, value)
        return found

    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=100), usegmt=True)
    assert retry_after(error(retry_after=2)) == 2.0
    assert retry_after(error(retry_after="2.5")) == 2.5
    assert retry_after(error(retry_after=timedelta(minutes=1))) == 60.0
    assert retry_after(error(headers={"Retry-After": "7"})) == 7.0
    assert retry_after(error(headers={"retry-after": "7"})) == 7.0
    assert retry_after(error(response=SimpleNamespace(headers={"Retry-After": "8"}))) == 8.0
    assert retry_after(error(response=SimpleNamespace(headers={"Other": "8"}), headers={"Retry-After": "9"})) == 9.0
    assert 97.0 <= (retry_after(error(headers={"Retry-After": soon})) or 0.0) <= 100.0
    assert retry_after(error(headers={"Retry-After": past})) == 0.0
    assert retry_after(error(retry_after=-5)) == 0.0
    assert retry_after(error(retry_after=1e9)) == 3600.0
    for nothing in (float("nan"), "soon", object(), None, lambda: 3):
        assert retry_after(error(retry_after=nothing)) is None
    assert retry_after(OSError()) is None
    retry = Retry(wait_initial=0.1, wait_max=0.2, jitter=0.0)
    assert retry.seconds_before(2, error(retry_after=5)) == 5.0  # even beyond wait_max
    assert retry.seconds_before(2, error(retry_after=0.01)) == 0.1


def test_a_budget_is_a_share_of_calls() -> None:
    """Ten are free; then one for ten calls; at most those of a thousand calls are saved up."""
    budget = Budget(0.1)
    assert [budget.take(0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert not budget.take(9)
    assert budget.take(11)
    assert not budget.take(11)
    assert sum(budget.take(1_000_000) for _ in range(1000)) == 100
    assert not Budget(0.0).take(1000)
    assert all(Budget(None).take(0) for _ in range(1000))


# -- what is done ------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_is_tried_again(kind: str, ordered: bool, face: Face) -> None:
    flaky = Flaky({3: 2, 4: 1, 11: 2})
    loader = Pipeline(range(20)).map(flaky.function(kind), concurrency=4, ordered=ordered, retry=AT_ONCE)
    loader = loader.batch(5).with_info()
    batches = collect(loader, face)
    samples = [sample for batch, _ in batches for sample in batch.tolist()]
    assert (samples if ordered else sorted(samples)) == list(range(20))
    assert flaky.calls[3] == flaky.calls[11] == 3
    assert flaky.calls.total() == 25
    stage = loader.stats().stages[1]
    assert (stage.retries, stage.errors, stage.samples) == (5, 0, 20)
    if ordered:
        assert [info.attempts for _, info in batches] == [3, 1, 3, 1]


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_after_the_last_attempt_the_users_own_error_is_at_its_place(kind: str, face: Face) -> None:
    flaky = Flaky({2: 99})
    loader = Pipeline(range(5)).map(flaky.function(kind), concurrency=2, retry=AT_ONCE)
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert outcomes[:2] + outcomes[3:] == [0, 1, 3, 4]
    assert outcomes[2] is flaky.errors[-1]
    assert "attempt 3 of 3 failed" in notes(outcomes[2])
    assert "key 2, epoch 0, position 2" in notes(outcomes[2])
    assert flaky.calls[2] == 3
    stage = loader.stats().stages[1]
    assert (stage.retries, stage.errors) == (2, 1)
    assert all("attempt" not in notes(error) for error in flaky.errors[:-1])


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_tried_again_keeps_no_engine_alive(kind: str, face: Face) -> None:
    """The loader knows its last sample after the epoch; that knew in which step it had failed."""
    flaky = Flaky({2: 1})
    loader = Pipeline(range(3)).map(flaky.function(kind), retry=AT_ONCE)
    assert collect(loader, face) == [0, 1, 2]
    flaky.errors.clear()  # their tracebacks lead to the step
    join_loader_threads()
    gc.collect()
    assert not [alive for alive in gc.get_objects() if issubclass(type(alive), Step)]


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_other_errors_are_final(kind: str, face: Face) -> None:
    """At the first attempt without a word, later with one."""

    def error(sample: int) -> Exception:
        return OSError(sample) if sample == 2 and flaky.calls[2] == 1 else KeyError(sample)

    flaky = Flaky({1: 99, 2: 99}, error)
    loader = Pipeline(range(4)).map(flaky.function(kind), concurrency=1, retry=AT_ONCE)
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert isinstance(outcomes[1], KeyError)
    assert "attempt" not in notes(outcomes[1])
    assert isinstance(outcomes[2], KeyError)
    assert "attempt 2 of 3 failed, and this is not retried" in notes(outcomes[2])
    assert flaky.calls == {0: 1, 1: 1, 2: 2, 3: 1}


def test_one_error_for_all_has_one_note() -> None:
    """Some clients raise the same object again and again."""
    error = OSError("gone")

    async def fetch(_: int) -> int:
        raise error

    with Steps(Pipeline(range(30)).map(fetch, retry=AT_ONCE), "async for") as steps:
        assert all(outcome is error for outcome in steps.outcomes())
    assert notes(error).count("attempt 3 of 3") == 1


@pytest.mark.parametrize("count", [1, 3])
def test_a_number_is_the_number_of_attempts(count: int) -> None:
    calls = 0

    async def fetch(_: int) -> int:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt if count == 1 else SystemExit  # these are never retried

    with Steps(Pipeline(range(1)).map(fetch, retry=count), "async for") as steps:
        assert isinstance(steps.outcomes()[0], KeyboardInterrupt | SystemExit)
    assert calls == 1


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_who_waits_takes_no_concurrency(kind: str, face: Face) -> None:
    """Both places are for others; and one that waits is not under way."""
    flaky = Flaky({0: 1, 1: 1})
    flaky.gate = Gate()
    loader = Pipeline(range(20)).map(flaky.function(kind), concurrency=2, ordered=False, retry=NEVER)
    with Steps(loader, face) as steps:
        asked = steps.ask()
        steps.until_arrived(flaky.gate, 2)
        assert set(flaky.gate.arrived) == {2, 3}
        assert loader.stats().stages[1].under_way == 2
        assert loader.stats().stages[1].retries == 2
        flaky.gate.open(2)
        steps.until_arrived(flaky.gate, 3)
        assert asked() == 2
        flaky.gate.open_all()
        loader.close() if face == "for" else steps.do(loader.aclose)


def test_the_room_grows_for_those_that_go_on_while_others_wait() -> None:
    """All places of the first room wait for their next attempts, and each place for a call is idle."""
    retry = Retry(attempts=2, on=OSError, wait_initial=0.2, wait_max=0.2, jitter=0.0)
    flaky = Flaky(dict.fromkeys(range(3), 1))
    begun: list[int] = []

    async def fetch(sample: int) -> int:
        begun.append(sample)
        return flaky(sample)

    async def main() -> None:
        loader = Pipeline(range(100)).map(fetch, concurrency=2, retry=retry)
        assert [sample async for sample in loader] == list(range(100))

    run(main)
    assert begun.index(3) < begun.index(0, 1)


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_stops_retries_in_an_outage(kind: str, face: Face) -> None:
    retry = Retry(attempts=4, on=OSError, wait_initial=0.0, jitter=0.0, budget=0.1)
    flaky = Flaky(dict.fromkeys(range(100), 99))
    loader = Pipeline(range(100)).map(flaky.function(kind), concurrency=1, retry=retry)
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert all(isinstance(outcome, OSError) for outcome in outcomes)
    assert 20 <= loader.stats().stages[1].retries <= 10 + 12
    assert any("retries are 10% of all calls at most (budget)" in notes(outcome) for outcome in outcomes)


@on_both_faces
def test_a_budget_counts_calls_of_a_hop_that_is_not_over(face: Face) -> None:
    """A thread that has made many calls stands in another one: they are counted, and may be retried."""
    gate = Gate()

    def fetch(sample: int) -> int:
        if sample < 200:
            raise OSError
        gate.pass_sync(sample)
        return sample

    retry = Retry(attempts=2, on=OSError, wait_initial=3600.0, wait_max=3600.0, budget=0.2)
    loader = Pipeline(range(201)).map(fetch, concurrency=1, ahead=201, retry=retry)
    with Steps(loader, face) as steps:
        asked = steps.ask()
        steps.until_arrived(gate, 1)

        async def retried() -> None:
            await until(lambda: loader.stats().stages[1].retries >= 40)

        wait_until(lambda: loader.stats().stages[1].retries >= 40) if face == "for" else steps.do(retried)
        gate.open_all()
        loader.close() if face == "for" else steps.do(loader.aclose)
        with contextlib.suppress(LoaderClosedError, StopIteration, StopAsyncIteration, OSError):
            asked()
    loader.close()


def test_a_sample_that_is_tried_again_has_its_numbers_from_the_first_on() -> None:
    """Also in the worker that has made its generator, and has had no use for another since."""
    drawn: list[int] = []

    async def fetch(sample: int) -> int:
        if sample == 0:
            drawn.append(sample_rng().random().randrange(1 << 30))
            if len(drawn) == 1:
                raise OSError
        else:
            await turns(50)  # the first sample's time comes
        return sample

    async def main() -> None:
        loader = Pipeline(range(3)).with_seed(1).map(fetch, concurrency=1, ahead=3, retry=AT_ONCE)
        assert [sample async for sample in loader] == [0, 1, 2]

    run(main)
    assert drawn[0] == drawn[1]


@on_both_faces
@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("kind", [*KINDS, "process"])
def test_each_attempt_has_the_same_random_numbers(kind: str, concurrency: int, face: Face, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    flaky = Flaky(dict.fromkeys(range(8), 1))

    def draw(sample: int) -> int:
        number = int(sample_rng().random().randrange(1 << 30))
        seen.append((sample, number))
        flaky(sample)
        return number

    async def awaited(sample: int) -> int:
        return draw(sample)

    plain = Pipeline(range(8)).with_seed(7).map(_drawn)
    if kind == "process":
        fails = _FailsAfterDrawing(tmp_path)
        loader = Pipeline(range(8)).with_seed(7).map(fails, executor="process", concurrency=concurrency, retry=AT_ONCE)
    else:
        fn = awaited if kind == "async" else draw
        loader = Pipeline(range(8)).with_seed(7).map(fn, concurrency=concurrency, retry=AT_ONCE)
    assert collect(loader, face) == collect(plain, face)
    if kind != "process":
        assert len(seen) == 16
        assert len(set(seen)) == 8


def _drawn(_: int) -> int:
    return int(sample_rng().random().randrange(1 << 30))


class _FailsAfterDrawing:
    def __init__(self, folder: Path) -> None:
        self.fails = FailsOnce(folder, *range(8))

    def __call__(self, sample: int) -> int:
        number = _drawn(sample)
        self.fails(sample)
        return number


@on_both_faces
@pytest.mark.parametrize("executor", ["process", "own processes", "own threads"])
def test_executors_of_all_kinds(executor: str, face: Face, tmp_path: Path) -> None:
    fails = FailsOnce(tmp_path, 1, 5)
    pool: Any = "process"
    if executor == "own processes":
        pool = ProcessPoolExecutor(2, get_context("spawn"))
    elif executor == "own threads":
        pool = ThreadPoolExecutor(2)
    try:
        loader = Pipeline(range(8)).map(fails, concurrency=2, executor=pool, retry=AT_ONCE)
        assert collect(loader, face) == list(range(8))
        assert loader.stats().stages[1].retries == 2
        loader.close()
    finally:
        if pool != "process":
            pool.shutdown()


@on_both_faces
def test_in_a_process_of_its_own(face: Face, tmp_path: Path) -> None:
    loader = Pipeline(range(8)).map(FailsOnce(tmp_path, 2), retry=AT_ONCE).in_process().batch(4)
    assert [batch.tolist() for batch in collect(loader, face)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sum(stage.retries for stage in loader.stats().stages) == 1


@on_both_faces
@pytest.mark.parametrize("disk", [False, True])
def test_a_cache_keeps_what_came_of_a_retry_and_nothing_of_failures(disk: bool, face: Face, tmp_path: Path) -> None:
    flaky = Flaky({1: 1, 2: 4})
    loader = Pipeline(range(4)).map(flaky.function("async"), retry=AT_ONCE)
    loader = loader.cache(disk=tmp_path / "cache") if disk else loader.cache(memory_bytes=1 << 20)
    with Steps(loader, face) as steps:
        first = steps.outcomes()
    assert first[:2] + first[3:] == [0, 1, 3]
    with Steps(loader, face) as steps:
        assert steps.outcomes() == [0, 1, 2, 3]
    assert flaky.calls == {0: 1, 1: 2, 2: 5, 3: 1}
    loader.close()


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_is_exact_while_samples_wait(kind: str, face: Face) -> None:
    """A state is of what was given; what waits for its next attempt is begun anew, with all attempts."""
    flaky = Flaky({5: 1, 7: 1})
    flaky.gate = Gate()
    flaky.gate.open_all()
    loader = Pipeline(range(12)).map(flaky.function(kind), concurrency=4, retry=NEVER).batch(2)
    with Steps(loader, face) as steps:
        assert [steps.next().tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        state = loader.state_dict()
        loader.close() if face == "for" else steps.do(loader.aclose)
    again = Pipeline(range(12)).map(flaky.function(kind), concurrency=3, retry=AT_ONCE).batch(2)
    again.load_state_dict(state)
    flaky.calls.clear()
    assert [batch.tolist() for batch in collect(again, face)] == [[4, 5], [6, 7], [8, 9], [10, 11]]


def test_resume_from_every_batch() -> None:
    def make() -> Pipeline:
        failing = Flaky({1: 1, 6: 2, 9: 99})
        return Pipeline(range(12)).shuffle(seed=1).map(failing.function("async"), concurrency=3, retry=AT_ONCE).batch(2)

    assert_resumes_exactly(make)


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_that_counts_samples(kind: str, face: Face) -> None:
    """Staleness, requeueing, skipped errors, a limit."""
    flaky = Flaky({2: 1, 3: 99, 9: 2})
    looked: Counter[int] = Counter()

    def stale(sample: int) -> bool:
        looked[sample] += 1
        return sample % 5 == 2 and looked[sample] == 1

    limit = Limit(3)
    loader = (
        Pipeline(range(16))
        .map(flaky.function(kind), concurrency=limit, retry=AT_ONCE)
        .drop_if(stale, requeue=True)
        .skip_errors(on=OSError, max_share=None)
        .batch(3)
        .max_staleness(1)
    )
    batches = collect(loader, face)
    assert [sample for batch in batches for sample in batch.tolist()] == [n for n in range(16) if n != 3]
    assert flaky.calls[3] == 3
    assert flaky.calls[2] == 3  # failed, made, and made again
    assert limit.under_way == 0


@on_both_faces
def test_what_is_requeued_has_all_its_attempts_again(face: Face) -> None:
    calls = 0
    looked = 0

    async def fetch(_: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 3:  # twice, each time
            raise OSError(calls)
        return calls

    def stale(_: int) -> bool:
        nonlocal looked
        looked += 1
        return looked == 1

    loader = Pipeline(range(1)).map(fetch, retry=AT_ONCE).drop_if(stale, requeue=True).batch(1)
    assert [batch.tolist() for batch in collect(loader, face)] == [[6]]


@on_both_faces
def test_batches_are_tried_again_too(face: Face) -> None:
    calls = 0

    async def post(batch: Any) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError
        found: list[int] = batch.tolist()
        return found

    loader = Pipeline(range(6)).batch(2).map(post, concurrency=1, retry=AT_ONCE).with_info()
    batches = collect(loader, face)
    assert [batch for batch, _ in batches] == [[0, 1], [2, 3], [4, 5]]
    assert max(info.attempts for _, info in batches) == 2


@on_both_faces
def test_ages_count_from_the_first_attempt(face: Face) -> None:
    gate = Gate()
    calls: Counter[int] = Counter()

    async def fetch(sample: int) -> int:
        calls[sample] += 1
        if sample == 3 and calls[sample] == 1:
            await gate.passing("fails")
            raise OSError
        return sample

    loader = Pipeline(range(4)).map(fetch, concurrency=4, ordered=True, retry=AT_ONCE).batch(1).with_info()
    with Steps(loader, face) as steps:
        found = [steps.next() for _ in range(3)]
        gate.open_all()
        found += steps.rest()
    assert [batch.item() for batch, _ in found] == [0, 1, 2, 3]
    assert found[-1][1].ages == (3,)


# -- pauses, and the end -----------------------------------------------------------------------------------------------


def test_draining_does_not_wait_for_attempts_to_come_and_none_begins_in_the_block() -> None:
    soon = Retry(attempts=2, on=OSError, wait_initial=0.001, jitter=0.0)
    flaky = Flaky({0: 1, 1: 1})

    async def main() -> None:
        for retry in (NEVER, soon):
            flaky.calls.clear()
            loader = Pipeline(range(2)).map(flaky.function("async"), retry=retry)
            batches = aiter(loader)
            asked = asyncio.ensure_future(anext(batches))
            await until(lambda: flaky.calls.total() == 2)
            await turns(20)
            async with loader.paused(drain=True):
                before = flaky.calls.total()
                await asyncio.sleep(0.01)  # their time comes in the block
                assert flaky.calls.total() == before
            if retry is soon:
                assert await asked == 0
                assert await anext(batches) == 1
            await loader.aclose()
            await asyncio.gather(asked, return_exceptions=True)

    run(main)


def test_who_fails_in_the_block_waits_for_its_end() -> None:
    flaky = Flaky({0: 1})
    gate = Gate()

    async def fetch(sample: int) -> int:
        await gate.passing(sample)
        return flaky(sample)

    async def main() -> None:
        loader = Pipeline(range(1)).map(fetch, retry=AT_ONCE)
        batches = aiter(loader)
        asked = asyncio.ensure_future(anext(batches))
        await gate.until_arrived(1)
        async with loader.paused():
            gate.open_all()
            async with loader.paused(drain=True):
                await turns(50)
                assert flaky.calls.total() == 1
        assert await asked == 0
        assert flaky.calls.total() == 2
        await loader.aclose()

    run(main)


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["close", "break"])
def test_closing_does_not_wait_for_attempts_to_come(how: str, kind: str, face: Face) -> None:
    """No timer is left, which would keep the loader alive for an hour."""
    flaky = Flaky({1: 1})
    loader = Pipeline(range(50)).map(flaky.function(kind), concurrency=2, retry=NEVER)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        if how == "close":
            loader.close() if face == "for" else steps.do(loader.aclose)

    if face == "async for":

        async def timers() -> None:
            async for _ in loader:
                break
            await loader.aclose()
            handles = [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
            assert all("Retrying" not in repr(handle) for handle in handles)

        asyncio.run(timers())


# -- against a plain model ---------------------------------------------------------------------------------------------

SEEDS, SOAK_SEEDS, BLOCK = 200, 5000, 20


def simulate(seed: int, face: Face) -> None:
    """A random pipeline: each sample ends given or raised, once, in order, with as many calls as it must have."""
    draw = random.Random(seed)
    count = draw.randrange(0, 40)
    stages = draw.choice((1, 1, 2))
    attempts = [draw.choice((1, 2, 3, 5)) for _ in range(stages)]
    failures = [{n: draw.choice((0, 0, 0, 1, 2, 9)) for n in range(count)} for _ in range(stages)]
    wrong = {n for n in range(count) if draw.random() < 0.05}  # another error
    ordered = draw.random() < 0.6
    size = draw.choice((None, 1, 3))
    calls: list[Counter[int]] = [Counter() for _ in range(stages)]
    loader: Pipeline = Pipeline(range(count))
    for at in range(stages):

        def call(sample: int, at: int = at) -> int:
            calls[at][sample] += 1
            if calls[at][sample] <= failures[at][sample]:
                raise OSError(sample)
            if sample in wrong:
                raise KeyError(sample)
            return sample

        async def awaited(sample: int, call: Callable[[int], int] = call) -> int:
            for _ in range(draw.randrange(3)):
                await asyncio.sleep(0)
            return call(sample)

        loader = loader.map(
            awaited if draw.random() < 0.7 else call,
            concurrency=draw.choice((1, 2, 5, 30)),
            ordered=ordered,
            retry=Retry(attempts[at], OSError, wait_initial=draw.choice((0.0, 0.0005)), jitter=draw.choice((0, 0.001))),
        )
    if size is not None:
        loader = loader.skip_errors(on=(OSError, KeyError), max_errors=None, max_share=None).batch(size)

    expected: list[Any] = []
    for n in range(count):
        outcome: Any = n
        for at in range(stages):
            if failures[at][n] >= attempts[at]:
                outcome = ("OSError", n)
                break
            if n in wrong:
                outcome = ("KeyError", n)
                break
        expected.append(outcome)
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    got: list[Any] = []
    for outcome in found:
        if isinstance(outcome, Exception):
            got.append((type(outcome).__name__, outcome.args[0]))
        elif size is None:
            got.append(outcome)
        else:
            got += outcome.tolist()
    if size is not None:
        expected = [outcome for outcome in expected if isinstance(outcome, int)]
    if not ordered:
        got, expected = sorted(got, key=str), sorted(expected, key=str)
    assert got == expected, f"seed {seed}"
    for n in range(count):
        wanted = min(failures[0][n] + 1, attempts[0])
        assert calls[0][n] == wanted, f"seed {seed}, sample {n}"
    retries = sum(counter.total() for counter in calls) - sum(len(counter) for counter in calls)
    assert sum(stage.retries for stage in loader.stats().stages) == retries, f"seed {seed}"


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_random_pipelines(first: int) -> None:
    for seed in range(first, first + BLOCK):
        simulate(seed, FACES[seed % 2])


@pytest.mark.soak
@pytest.mark.parametrize("first", range(SEEDS, SOAK_SEEDS, 10 * BLOCK))
def test_random_pipelines_many(first: int) -> None:
    for seed in range(first, first + 10 * BLOCK):
        simulate(seed, FACES[seed % 2])
