"""`map(timeout=, hedge=)`: calls that take too long are cut off, and second calls are made beside slow ones."""

import asyncio
import contextlib
import gc
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from aioloader import Hedge, Limit, LoaderClosedError, Pipeline, Rate, Retry, sample_rng
from aioloader.engine.guard import Guard
from aioloader.testing import Gate
from tests._support import DEADLINE, Face, Steps, collect, notes, on_both_faces, run, turns, until, workers

SHORT = 0.02
AT_ONCE = Hedge(after=0.0, budget=1.0)
AGAIN = Retry(attempts=3, on=TimeoutError, wait_initial=0.0, jitter=0.0)


pytestmark = pytest.mark.usefixtures("fork_server")


class Calls:
    """Async functions whose calls are counted: how many are under way, and how they ended."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.of: Counter[Any] = Counter()
        self.ended: list[tuple[Any, int, str]] = []
        self.gate = Gate()

    @contextlib.contextmanager
    def call(self, sample: Any) -> Iterator[int]:
        """One call; gives its number among those of the sample."""
        self.of[sample] += 1
        number = self.of[sample]
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            yield number
        except BaseException as error:
            self.ended.append((sample, number, type(error).__name__))
            raise
        else:
            self.ended.append((sample, number, "returned"))
        finally:
            self.now -= 1

    def first_hangs(self, *which: int) -> Any:
        """A function whose first call for some samples never ends."""

        async def fetch(sample: int) -> int:
            with self.call(sample) as number:
                await asyncio.sleep(0)
                if sample in which and number == 1:
                    await asyncio.Event().wait()
                return sample

        return fetch


# -- what is said ------------------------------------------------------------------------------------------------------


async def fetched(sample: int) -> int:
    return sample


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"after": -1}, ValueError, "after"),
        ({"after": float("inf")}, ValueError, "after"),
        ({"after": None}, TypeError, "after"),
        ({"after": True}, TypeError, "after"),
        ({"after": "p0"}, ValueError, "percentile"),
        ({"after": "p100"}, ValueError, "percentile"),
        ({"after": "95"}, ValueError, "percentile"),
        ({"budget": 1.01}, ValueError, "budget"),
        ({"budget": -1}, ValueError, "budget"),
        ({"budget": None}, TypeError, "budget"),
    ],
)
def test_bad_hedges(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        Hedge(**arguments)


@pytest.mark.parametrize(
    ("fn", "arguments", "kind", "words"),
    [
        (fetched, {"timeout": 0}, ValueError, "more than 0"),
        (fetched, {"timeout": -1}, ValueError, "more than 0, got -1"),
        (fetched, {"timeout": float("inf")}, ValueError, "must be finite, got inf"),
        (fetched, {"timeout": -1.0}, ValueError, "timeout"),
        (fetched, {"timeout": float("nan")}, ValueError, "timeout"),
        (fetched, {"timeout": True}, TypeError, "timeout"),
        (fetched, {"timeout": "1"}, TypeError, "timeout"),
        (fetched, {"hedge": 0.1}, TypeError, "Hedge"),
        (fetched, {"hedge": "p95"}, TypeError, "Hedge"),
        (abs, {"timeout": 1.0}, ValueError, "cannot stop a thread.*executor='process'"),
        (abs, {"hedge": Hedge()}, ValueError, "async"),
        (abs, {"hedge": Hedge(), "executor": "process"}, ValueError, "async"),
    ],
)
def test_what_does_not_fit_the_function(fn: Any, arguments: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        Pipeline(range(3)).map(fn, **arguments)


def test_no_time_limit_in_an_executor_of_the_user() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="timeout"):
        Pipeline(range(3)).map(abs, executor=pool, timeout=1.0)


# -- a time limit ------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("ordered", [True, False])
def test_a_call_that_takes_too_long_is_cancelled_and_its_cleanup_awaited(ordered: bool, face: Face) -> None:
    cleaned: list[int] = []

    async def fetch(sample: int) -> int:
        if sample == 2:
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
                cleaned.append(sample)
        return sample

    loader = Pipeline(range(6)).map(fetch, concurrency=2, ordered=ordered, timeout=SHORT)
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    (error,) = (outcome for outcome in outcomes if isinstance(outcome, Exception))
    assert type(error) is TimeoutError
    assert "map(fetch) took longer than timeout=0.02 s" in str(error)
    assert "key 2" in notes(error)
    assert error.__cause__ is None
    assert cleaned == [2]
    assert [outcome for outcome in outcomes if outcome is not error] == [0, 1, 3, 4, 5]
    assert loader.stats().stages[1].timeouts == 1
    if ordered:
        assert outcomes[2] is error


@on_both_faces
def test_retried_it_is_made_after_all(face: Face) -> None:
    calls = Calls()
    loader = Pipeline(range(8)).map(calls.first_hangs(1, 5), concurrency=3, timeout=SHORT, retry=AGAIN)
    assert collect(loader, face) == list(range(8))
    stage = loader.stats().stages[1]
    assert (stage.timeouts, stage.retries, stage.errors) == (2, 2, 0)
    assert calls.most <= 3


@on_both_faces
def test_a_call_that_swallows_the_cancellation_has_its_value(face: Face) -> None:
    async def fetch(sample: int) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return f"late {sample}"

    loader = Pipeline(range(3)).map(fetch, timeout=SHORT)
    assert collect(loader, face) == ["late 0", "late 1", "late 2"]
    assert loader.stats().stages[1].timeouts == 0


@on_both_faces
def test_an_error_of_the_cleanup_is_the_cause(face: Face) -> None:
    async def fetch(_: int) -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise KeyError("cleanup") from None
        return 0

    with Steps(Pipeline(range(1)).map(fetch, timeout=SHORT), face) as steps:
        (error,) = steps.outcomes()
    assert type(error) is TimeoutError
    assert isinstance(error.__cause__, KeyError)


@on_both_faces
def test_timeout_errors_of_the_users_own_stay_theirs(face: Face) -> None:
    own = TimeoutError("of the client")

    async def fetch(sample: int) -> int:
        if sample:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        raise own

    loader = Pipeline(range(2)).map(fetch, timeout=30.0)
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert outcomes[0] is own
    assert type(outcomes[1]) is TimeoutError
    assert "timeout=30" not in str(outcomes[1])
    assert loader.stats().stages[1].timeouts == 0


def test_a_function_that_was_cut_off_may_use_timeouts_itself() -> None:
    """Ours rings inside of theirs, and is not taken for theirs."""

    async def fetch(_: int) -> int:
        async with asyncio.timeout(30):
            await asyncio.Event().wait()
        return 0

    with Steps(Pipeline(range(1)).map(fetch, timeout=SHORT), "async for") as steps:
        (error,) = steps.outcomes()
    assert "map(fetch) took longer" in str(error)


def test_what_was_answered_while_the_loop_stood_still_is_in_time() -> None:
    """The consumer trains on the loop, for longer than the time limit."""

    async def main() -> None:
        answers: list[asyncio.Future[int]] = []

        async def fetch(sample: int) -> int:
            if not sample:
                return 0
            answers.append(asyncio.get_running_loop().create_future())
            return await answers[-1]

        batches = aiter(Pipeline(range(2)).map(fetch, timeout=0.05))
        assert await anext(batches) == 0
        await until(lambda: bool(answers))
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, answers[0].set_result, 1)  # as data that has come meanwhile
        time.sleep(0.08)  # noqa: ASYNC251 - a step of the training loop
        assert await anext(batches) == 1

    run(main)


@on_both_faces
def test_a_cache_keeps_nothing_of_what_was_cut_off(face: Face) -> None:
    calls = Calls()
    loader = Pipeline(range(3)).map(calls.first_hangs(1), timeout=SHORT).cache(memory_bytes=1 << 20)
    with Steps(loader, face) as steps:
        assert [type(outcome) for outcome in steps.outcomes()] == [int, TimeoutError, int]
    assert collect(loader, face) == [0, 1, 2]
    assert calls.of == {0: 1, 1: 2, 2: 1}


@on_both_faces
def test_waiting_for_the_rate_is_not_counted(face: Face) -> None:
    loader = Pipeline(range(8)).map(fetched, timeout=0.1, rate=Rate(20, burst=1))
    assert collect(loader, face) == list(range(8))
    assert loader.stats().stages[1].timeouts == 0


def hang_once(folder: Path, sample: int) -> int:
    """In a worker process: the first call for sample 3 hangs."""
    if sample == 3:
        with contextlib.suppress(FileExistsError):
            (folder / "hung").touch(exist_ok=False)
            time.sleep(600)
    return os.getpid() if sample == 100 else sample


class HangOnce:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, sample: int) -> int:
        return hang_once(self.folder, sample)


@on_both_faces
@pytest.mark.parametrize("retry", [None, AGAIN])
def test_a_process_that_takes_too_long_is_killed_and_replaced(retry: Retry | None, face: Face, tmp_path: Path) -> None:
    """Nothing that it had beside is lost or blamed."""
    loader = Pipeline(range(40)).map(HangOnce(tmp_path), concurrency=2, executor="process", timeout=1.0, retry=retry)
    with loader if face == "for" else contextlib.nullcontext():
        with Steps(loader, face) as steps:
            outcomes = steps.outcomes()
        stage = loader.stats().stages[1]
        assert stage.timeouts == 1
        if retry is None:
            assert isinstance(outcomes[3], TimeoutError)
            assert "took longer than timeout=1 s; worker process" in str(outcomes[3])
            assert "was killed" in str(outcomes[3])
            outcomes[3] = 3
        assert outcomes == list(range(40))
    loader.close()


def test_closing_while_a_process_hangs(tmp_path: Path) -> None:
    """It is not waited for, and nothing is left."""
    before = workers()
    loader = Pipeline([4, 3, 5]).map(HangOnce(tmp_path), concurrency=2, executor="process", timeout=60.0)
    with Steps(loader, "for") as steps:
        assert steps.next() == 4
        loader.close()
    assert workers() <= before


def test_a_task_after_the_one_that_was_cut_off_is_not_blamed() -> None:
    """The worker goes on to its next task just before it is killed: that one is run once more."""
    from aioloader.executors.processes.worker_pool import WorkerPool, _Task

    class Thread:
        closed = False

        def call(self, *_: Any) -> None: ...

    class Worker:
        slot, pid = 0, 1234

    pool = WorkerPool(Thread(), 1, lambda: None)  # type: ignore[arg-type, return-value]
    worker: Any = Worker()
    blamed: list[Any] = []
    late, following, waiting = (_Task("owner", [n], blamed.append, None) for n in range(3))
    late.expired = True
    pool._workers[0] = worker
    pool._killed.add(worker)
    pool._tasks_of[worker] = OrderedDict({2: following, 3: waiting})  # 1 has come back

    class Progress:
        @staticmethod
        def read(_: int) -> tuple[int, int]:
            return 2, 0

        @staticmethod
        def sample(_: int) -> int | None:
            return None

    pool._progress = Progress()  # type: ignore[assignment]
    pool._assign = lambda: None  # type: ignore[method-assign]
    pool.died(worker, "was killed")
    assert not blamed
    assert list(pool._waiting) == [following, waiting]


# -- second calls ------------------------------------------------------------------------------------------------------


@on_both_faces
def test_the_first_result_wins_and_the_loser_is_cancelled_and_awaited(face: Face) -> None:
    calls = Calls()
    cleaned: list[int] = []

    async def fetch(sample: int) -> tuple[int, int]:
        with calls.call(sample) as number:
            if number == 1 and sample == 2:
                try:
                    await asyncio.Event().wait()
                finally:
                    for _ in range(5):
                        await asyncio.sleep(0)
                    cleaned.append(sample)
            return sample, number

    loader = Pipeline(range(6)).map(fetch, concurrency=3, hedge=Hedge(after=0.005, budget=1.0))
    samples = collect(loader, face)
    assert [sample for sample, _ in samples] == list(range(6))
    assert samples[2] == (2, 2)
    assert cleaned == [2]
    assert calls.now == 0
    assert loader.stats().stages[1].hedges == 1


def test_the_second_call_loses() -> None:
    """It has cleaned up before the sample goes on, and what it raises then is nobody's."""
    calls = Calls()
    cleaned: list[int] = []

    async def fetch(sample: int) -> int:
        with calls.call(sample) as number:
            if number == 1:
                await calls.gate.passing(sample)
            else:
                calls.gate.open(sample)
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0)
                    cleaned.append(sample)
                    raise KeyError("in cleanup")
            return number

    async def main() -> None:
        async for number in Pipeline(range(1)).map(fetch, hedge=AT_ONCE):
            assert number == 1
            assert cleaned == [0]
            assert calls.now == 0

    run(main)


@pytest.mark.parametrize("fails", ["first", "second", "both", "second exits"])
def test_one_that_fails_does_not_win(fails: str) -> None:
    gate = Gate()
    count = 0

    async def fetch(_: int) -> int:
        nonlocal count
        count += 1
        number = count
        await gate.passing(number)
        if fails == "second exits" and number == 2:
            raise SystemExit(3)
        if fails in ("both", {1: "first", 2: "second"}[number]):
            raise OSError(number)
        return number

    async def main() -> None:
        batches = aiter(Pipeline(range(1)).map(fetch, hedge=AT_ONCE))
        asked = asyncio.ensure_future(anext(batches))
        await gate.until_arrived(2)
        first, second = (1, 2) if fails == "first" else (2, 1)
        gate.open(first)
        await turns(50)
        assert not asked.done()
        gate.open(second)
        if fails == "both":
            with pytest.raises(OSError, match="1"):
                await asked
        else:
            assert await asked == (2 if fails == "first" else 1)

    run(main)


def test_a_call_is_looked_at_again_when_the_budget_was_used_up() -> None:
    """Though no other call begins: what is only a little late does not cost it its chance of a second one."""
    calls = Calls()

    async def fetch(sample: int) -> int:
        with calls.call(sample) as number:
            if number == 1:
                await (asyncio.Event().wait() if sample < 11 else calls.gate.passing(sample))
            return sample

    async def main() -> None:
        loader = Pipeline(range(40)).map(fetch, concurrency=60, hedge=Hedge(after=0.005, budget=0.05))
        batches = aiter(loader)
        asked = asyncio.ensure_future(anext(batches))
        await until(lambda: sum(calls.of.values()) == 50)  # ten are free
        calls.gate.open_all()  # which pays for one more
        assert [await asked, *[sample async for sample in batches]] == list(range(40))

    run(main)
    assert all(calls.of[sample] == 2 for sample in range(11))


@on_both_faces
@pytest.mark.parametrize("timeout", [None, 3600.0])
def test_it_closes_while_the_second_call_is_waited_for(timeout: float | None, face: Face) -> None:
    """The first one has failed, which is nobody's error any more."""
    gate = Gate()
    count = 0
    cleaned: list[int] = []

    async def fetch(_: int) -> int:
        nonlocal count
        count += 1
        number = count
        try:
            await gate.passing(number)
        finally:
            cleaned.append(number)
        raise OSError(number)

    loader = Pipeline(range(1)).map(fetch, hedge=AT_ONCE, timeout=timeout)
    with Steps(loader, face) as steps:
        asked = steps.ask()
        steps.until_arrived(gate, 2)
        gate.open(1)
        if face == "for":
            while not cleaned:
                time.sleep(0.001)
            loader.close()
        else:

            async def close() -> None:
                await until(lambda: bool(cleaned))
                await turns(20)
                await loader.aclose()

            steps.do(close)
        with pytest.raises((LoaderClosedError, StopIteration, StopAsyncIteration)):
            asked()
    loader.close()
    assert sorted(cleaned) == [1, 2]


@on_both_faces
@pytest.mark.parametrize("limited", [False, True])
def test_second_calls_are_counted_in_the_concurrency(limited: bool, face: Face) -> None:
    """There are never more calls than that; one that takes long gets the next place that is free."""
    calls = Calls()
    slow = {0, 7}  # else all places might be taken by those

    async def fetch(sample: int) -> int:
        with calls.call(sample) as number:
            if sample in slow and number == 1:
                await asyncio.Event().wait()
            for _ in range(3):
                await asyncio.sleep(0)
            return sample

    concurrency: Any = Limit(3) if limited else 3
    loader = Pipeline(range(30)).map(fetch, concurrency=concurrency, hedge=Hedge(after=0.003, budget=1.0))
    assert collect(loader, face) == list(range(30))
    assert calls.most <= 3
    assert all(calls.of[sample] == 2 for sample in slow)
    if limited:
        assert concurrency.under_way == 0


@on_both_faces
def test_all_places_are_taken_by_calls_that_hang(face: Face) -> None:
    """Second calls wait for a place in vain: only a time limit helps, and it does."""
    calls = Calls()
    loader = Pipeline(range(6)).map(
        calls.first_hangs(0, 1), concurrency=2, timeout=0.05, hedge=Hedge(after=0.005, budget=1.0), retry=AGAIN
    )
    assert collect(loader, face) == list(range(6))
    assert calls.most <= 2


def test_a_limit_that_is_shared_counts_second_calls() -> None:
    """Another stage has the other slot: the second call waits for it."""
    limit = Limit(2)
    calls = Calls()

    async def other(sample: int) -> int:
        with calls.call("other"):
            await calls.gate.passing("other")
        return sample

    async def main() -> None:
        holder = aiter(Pipeline(range(1)).map(other, concurrency=limit))
        held = asyncio.ensure_future(anext(holder))
        await calls.gate.until_arrived(1)
        batches = aiter(Pipeline(range(1)).map(calls.first_hangs(0), concurrency=limit, hedge=AT_ONCE))
        asked = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0.01)
        assert calls.of[0] == 1
        assert limit.under_way == 2
        calls.gate.open_all()
        assert await held == 0
        assert await asked == 0
        assert calls.most == 2
        with pytest.raises(StopAsyncIteration):
            await anext(batches)
        assert limit.under_way == 0

    run(main)


@on_both_faces
def test_a_budget_bounds_second_calls(face: Face) -> None:
    """Ten are free, and one for ten calls."""

    async def fetch(sample: int) -> int:
        await asyncio.sleep(0.003)
        return sample

    loader = Pipeline(range(100)).map(fetch, concurrency=20, hedge=Hedge(after=0.0, budget=0.1))
    assert collect(loader, face) == list(range(100))
    assert 10 <= loader.stats().stages[1].hedges <= 21
    none = Pipeline(range(30)).map(fetch, concurrency=20, hedge=Hedge(after=0.0, budget=0.0))
    assert collect(none, face) == list(range(30))
    assert none.stats().stages[1].hedges == 0


@on_both_faces
def test_a_percentile_needs_some_twenty_calls(face: Face) -> None:
    calls = Calls()
    loader = Pipeline(range(10)).map(calls.first_hangs(5), concurrency=4, timeout=0.05, hedge=Hedge("p90", 1.0))
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert isinstance(outcomes[5], TimeoutError)
    assert loader.stats().stages[1].hedges == 0
    loader = Pipeline(range(60)).map(calls.first_hangs(40), concurrency=4, timeout=5.0, hedge=Hedge("p90", 1.0))
    assert collect(loader, face) == list(range(60))
    assert calls.of[40] == 2


def test_a_percentile_counts_those_that_had_a_second_call() -> None:
    """Else the slow ones would never count, and what is slow would become less and less."""
    guard = Guard(fetched, "map", None, Hedge("p90"))

    async def main() -> None:
        class Step:
            concurrency, slots, tap = 8, None, None

            def later(self, *_: Any) -> Any:
                return asyncio.get_running_loop().call_later(3600, print)

            def go_on(self) -> None: ...

        class Run:
            stopping = False

        guard.bind(Run(), Step())  # type: ignore[arg-type]
        task = asyncio.current_task()
        assert task is not None
        record = guard.for_worker(task, None)  # type: ignore[arg-type]
        record.twin = asyncio.ensure_future(asyncio.sleep(0, ("second", None)))
        await record.twin
        task.cancel()
        record.cancelled = True
        with pytest.raises(asyncio.CancelledError) as caught:
            await asyncio.sleep(0)
        record.began = time.perf_counter() - 50
        assert await guard.outcome(record, None, caught.value) == "second"
        guard.close()

    asyncio.run(main())
    assert guard._durations[0] >= 50


@on_both_faces
def test_both_calls_have_the_same_random_numbers_and_contexts_of_their_own(face: Face) -> None:
    mark: ContextVar[str] = ContextVar("mark", default="clean")
    drawn: dict[int, list[int]] = {}
    marks: list[str] = []

    async def fetch(sample: int) -> int:
        rng = sample_rng().random()
        first = rng.randrange(1 << 30)
        await asyncio.sleep(0)
        drawn.setdefault(sample, []).append(first + rng.randrange(1 << 30))
        marks.append(mark.get())
        mark.set("dirty")
        if len(drawn[sample]) == 1:
            await asyncio.Event().wait()
        return sample

    loader = Pipeline(range(5)).with_seed(3).map(fetch, concurrency=10, hedge=Hedge(after=0.003, budget=1.0))
    assert collect(loader, face) == list(range(5))
    assert all(len(numbers) == 2 and len(set(numbers)) == 1 for numbers in drawn.values())
    assert set(marks) == {"clean"}


@on_both_faces
def test_a_second_call_that_hangs_alone_is_cut_off_in_time(face: Face) -> None:
    """The first one failed; the limit is that of the attempt."""
    calls = Calls()

    async def fetch(sample: int) -> int:
        with calls.call(sample) as number:
            if number == 1:
                await calls.gate.passing(sample)
                raise OSError(sample)
            calls.gate.open(sample)
            await asyncio.Event().wait()
        return sample

    loader = Pipeline(range(1)).map(fetch, timeout=0.1, hedge=AT_ONCE)
    with Steps(loader, face) as steps:
        (error,) = steps.outcomes()
    assert type(error) is TimeoutError
    assert isinstance(error.__cause__, OSError)
    assert calls.now == 0
    assert [how for _, number, how in calls.ended if number == 2] == ["CancelledError"]


@on_both_faces
def test_a_second_call_is_made_though_the_timer_of_the_limit_is_far_away(face: Face) -> None:
    """A call that has had its chance leaves the timer to the limit; the next call has its chance in time."""
    calls = Calls()
    loader = Pipeline(range(3)).map(
        calls.first_hangs(0, 1, 2), concurrency=2, timeout=60.0, hedge=Hedge(after=0.005, budget=1.0)
    )
    with Steps(loader, face) as steps:
        assert steps.rest(0) == []
    fn = calls.first_hangs(1, 2)
    loader = Pipeline(range(3)).map(fn, concurrency=3, timeout=60.0, hedge=Hedge(after=0.005, budget=1.0))
    assert collect(loader, face) == [0, 1, 2]


def test_second_calls_take_their_turn_at_the_rate() -> None:
    """And a failure of one is told to an adaptive rate."""
    told: list[BaseException] = []

    class Watched(Rate):
        def failed(self, error: BaseException) -> None:
            told.append(error)

    rate = Watched(20, burst=1)
    count = 0
    gate = Gate()

    async def fetch(_: int) -> int:
        nonlocal count
        count += 1
        if count == 2:
            gate.open_all()
            raise OSError(2)
        await gate.passing()
        return count

    async def main() -> None:
        began = time.perf_counter()
        async for _ in Pipeline(range(1)).map(fetch, rate=rate, hedge=AT_ONCE):
            pass
        assert time.perf_counter() - began >= 0.045
        assert [str(error) for error in told] == ["2"]

    run(main)


# -- the end -----------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("how", ["close", "break"])
def test_the_end_with_second_calls_under_way(how: str, face: Face) -> None:
    """No task is left, and each call cleans up, undisturbed."""
    cleaned: Counter[int] = Counter()
    gate = Gate()

    async def fetch(sample: int) -> int:
        if not sample:
            return 0
        try:
            gate._arrive(sample)
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            cleaned[sample] += 1
        return sample

    loader = Pipeline(range(4)).map(fetch, concurrency=8, timeout=60.0, hedge=AT_ONCE)
    gate.open_all()
    before = set(threading.enumerate())
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        steps.until_arrived(gate, 6)  # three first calls, and three second ones
        if how == "close":
            loader.close() if face == "for" else steps.do(loader.aclose)
    gc.collect()
    loader.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(DEADLINE)
    assert cleaned == {1: 2, 2: 2, 3: 2}


def test_a_loser_that_cleans_up_is_not_cut_short_by_the_end() -> None:
    """The run ends while its worker waits for the loser: that is not cancelled again."""
    steps: list[str] = []
    gate = Gate()

    async def fetch(sample: int) -> int:
        if not steps:
            steps.append("first")
            await gate.passing("first")
            return sample
        try:
            gate.open("first")
            await asyncio.Event().wait()
        finally:
            steps.append("cleanup")
            await gate.passing("cleanup")
            steps.append("cleaned")
        return sample

    async def main() -> None:
        loader = Pipeline(range(1)).map(fetch, hedge=AT_ONCE)
        asked = asyncio.ensure_future(anext(aiter(loader)))
        await gate.until_arrived(2)
        assert steps == ["first", "cleanup"]
        closing = asyncio.ensure_future(loader.aclose())
        await turns(50)
        gate.open_all()
        await closing
        assert steps == ["first", "cleanup", "cleaned"]
        await asyncio.gather(asked, return_exceptions=True)

    run(main)


def test_the_loop_ends_with_second_calls_under_way() -> None:
    """`asyncio.run` cancels all tasks there are."""
    ended = []

    async def fetch(_: int) -> int:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)
        return 0

    async def main() -> None:
        asked = asyncio.ensure_future(anext(aiter(Pipeline(range(2)).map(fetch, timeout=60.0, hedge=AT_ONCE))))
        await asyncio.sleep(0.02)
        assert not asked.done()

    asyncio.run(main())
    assert len(ended) == 4


def test_nothing_is_kept_of_calls_that_are_over() -> None:
    """Neither by records of workers nor by timers."""

    class Sample:
        pass

    seen: list[weakref.ref[Sample]] = []

    async def fetch(sample: int) -> Sample:
        await asyncio.sleep(0.005 if sample == 3 else 0)
        made = Sample()
        seen.append(weakref.ref(made))
        if sample == 5:
            raise OSError(made)
        return made

    async def main() -> None:
        loader = (
            Pipeline(range(8))
            .map(fetch, concurrency=2, timeout=60.0, hedge=Hedge(0.001, 1.0))
            .skip_errors(on=OSError, max_share=None)
        )
        async for sample in loader:
            del sample
        await loader.aclose()

    run(main)
    gc.collect()
    assert not any(ref() for ref in seen)


def test_no_sample_begins_in_a_block_since_a_second_call_had_its_place() -> None:
    """Who waits for the place of a second call has not begun."""
    calls = Calls()
    begun: list[int] = []

    async def fetch(sample: int) -> int:
        begun.append(sample)
        with calls.call(sample):
            await calls.gate.passing((sample, calls.of[sample]))
        return sample

    async def main() -> None:
        loader = Pipeline(range(6)).map(fetch, concurrency=3, hedge=Hedge(after=0.005, budget=1.0))
        batches = aiter(loader)
        asked = asyncio.ensure_future(anext(batches))
        await calls.gate.until_arrived(3)
        calls.gate.open((2, 1))
        await calls.gate.until_arrived(4)  # a second call, or sample 3, which gets one of its own then
        async with loader.paused():
            before = set(begun)
            calls.gate.open_all()
            await turns(200)
            await asyncio.sleep(0.02)
            await turns(200)
            assert set(begun) == before
        assert [await asked, *[sample async for sample in batches]] == list(range(6))
        assert calls.most <= 3

    run(main)


@on_both_faces
def test_in_a_process_of_its_own(face: Face, tmp_path: Path) -> None:
    loader = Pipeline(range(6)).map(_HangsOnceThere(tmp_path), timeout=0.2, retry=AGAIN, hedge=Hedge(5.0)).in_process()
    assert collect(loader, face) == list(range(6))
    assert sum(stage.timeouts for stage in loader.stats().stages) == 1
    loader.close()


class _HangsOnceThere:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def __call__(self, sample: int) -> int:
        if sample == 2:
            with contextlib.suppress(FileExistsError):
                (self.folder / "hung").touch(exist_ok=False)
                await asyncio.Event().wait()
        return sample
