"""What `explain()` and `stats()` say of retries, timeouts, second calls and rates: while they wait, when they limit."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aioloader import DataLoader, Hedge, Pipeline, PolicyStats, Rate, Retry, StageStats, Stats
from aioloader.core.policies import Policies
from aioloader.insight.explain import explain
from aioloader.insight.policies import MOST_KINDS, PolicyMeter
from aioloader.testing import Gate
from tests._support import DEADLINE, Face, Started, collect, explained, on_both_faces, wait_until

pytestmark = pytest.mark.usefixtures("fork_server")

HOUR = 3600.0
LATER = Retry(attempts=2, on=OSError, wait_initial=HOUR, wait_max=HOUR, jitter=0.0)
AT_ONCE = Retry(attempts=4, on=OSError, wait_initial=0.0, jitter=0.0)


# -- in words ----------------------------------------------------------------------------------------------------------


def stage(name: str = "map(fetch)", policies: PolicyStats | None = None, **known: Any) -> StageStats:
    """A stage of which only what matters is told: 1,000 samples in 10 s, on 32 places."""
    return StageStats(
        **{
            "name": name,
            "kind": "async",
            "concurrency": 32,
            "samples": 1000,
            "errors": 0,
            "busy_seconds": 60.0,
            "cpu_seconds": 0.0,
            "utilization": 0.2,
            "waiting_for_input_seconds": 0.0,
            "waiting_for_room_seconds": 0.0,
            "finished_slots": 0.0,
            "room": 48,
            "policies": policies,
            **known,
        }
    )


def measured(*stages: StageStats, waited: float = 0.9) -> Stats:
    return Stats(
        epoch=0,
        seconds=10.0,
        first_batch_seconds=0.1,
        batches=100,
        waited_seconds=10 * waited,
        waited_fraction=waited,
        loop_cpu_fraction=0.1,
        stages=stages,
    )


BUSY: dict[str, Any] = {"busy_seconds": 310.0, "utilization": 0.97}
HELD: dict[str, Any] = {"finished_slots": 30.0}
THROTTLED = PolicyStats(per_second=1234.5, rate_wait_seconds=9.3)
WAITS = PolicyStats(
    wait_initial=0.1, wait_max=5.0, jitter=1.0, retried_after="ConnectionResetError", retry_wait_seconds=240.0
)


@pytest.mark.parametrize(
    ("stats", "said"),
    [
        pytest.param(
            measured(stage(policies=THROTTLED)),
            ["The rate of map(fetch) is the limit", "93% of the time", "1,234 a second", "raise per_second"],
            id="rate",
        ),
        pytest.param(
            measured(stage(policies=replace(THROTTLED, rate_bound="most", per_second=2.5))),
            ["The rate of map(fetch) is the limit", "2.5 a second", "raise most"],
            id="the most of an adaptive rate",
        ),
        pytest.param(
            measured(stage(policies=replace(THROTTLED, rate_bound="growth"))), ["raise start"], id="a rate that grows"
        ),
        pytest.param(
            measured(stage(policies=replace(THROTTLED, rate_bound="refusals"))),
            ["The rate of map(fetch) is the limit", "the server allows no more"],
            id="what the server allows",
        ),
        pytest.param(
            measured(stage(policies=WAITS, retries=200, **HELD)),
            [
                "map(fetch) is held up by samples that wait for their next attempts",
                "wait_initial=0.1, wait_max=5, jitter=1",
                "ordered=False",
                "17% of the calls of map(fetch) were retries, mostly after ConnectionResetError",
                "a sample waited 1.2 s for its next attempt",
            ],
            id="waits of retries",
        ),
        pytest.param(
            measured(stage(policies=replace(WAITS, asked_waits=150), retries=200, **HELD)),
            ["held up by samples that wait", "Retry-After", "rate=Rate(...)"],
            id="waits that the server asks for",
        ),
        pytest.param(
            measured(stage(policies=WAITS, retries=300, **BUSY)),
            ["map(fetch) is the limit", "23% of the calls of map(fetch) were retries", "less concurrency"],
            id="retries take places",
        ),
        pytest.param(
            measured(stage(policies=PolicyStats(retry_budget=0.1, refused_retries=40), retries=100, **BUSY)),
            ["40 of its errors were final only because the retries are at their budget=0.1"],
            id="the budget of retries",
        ),
        pytest.param(
            measured(stage(policies=PolicyStats(timeout=0.3), timeouts=120, **BUSY)),
            ["timeout=0.3 cut off 12% of the calls", "12% of the time", "the others took 0.31 s", "raise timeout"],
            id="a tight timeout",
        ),
        pytest.param(
            measured(stage(policies=PolicyStats(timeout=5.0), timeouts=50, busy_seconds=300.0, utilization=0.94)),
            ["timeout=5 cut off 5% of the calls", "83% of the time", "took 0.053 s", "a lower timeout"],
            id="a timeout for what hangs",
        ),
        pytest.param(
            measured(
                stage(policies=PolicyStats(hedge_budget=0.05, hedge_after=0.25, refused_hedges=210), hedges=50, **BUSY)
            ),
            [
                "210 calls that took more than twice as long as after (0.25 s) of its Hedge had no second one",
                "budget=0.05",
            ],
            id="the budget of second calls",
        ),
        pytest.param(
            measured(stage(policies=PolicyStats(hedge_budget=0.5), hedges=400, **BUSY)),
            ["40% as many calls again are second ones", "lower budget=0.5"],
            id="second calls take places",
        ),
        pytest.param(
            measured(stage(policies=PolicyStats(timeout=4.0), **HELD)),
            ["held up by slow samples", "ordered=False, or lower timeout=4 or pass hedge=Hedge(...)"],
            id="slow samples within a timeout",
        ),
        pytest.param(
            measured(stage(**HELD)),
            ["held up by slow samples", "pass timeout=... or hedge=Hedge(...)"],
            id="slow samples without one",
        ),
    ],
)
def test_what_limits_is_named_with_its_number(stats: Stats, said: list[str]) -> None:
    sentence = explain(stats)
    for words in said:
        assert words in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    "stats",
    [
        pytest.param(measured(stage(policies=THROTTLED, timeouts=99), waited=0.01), id="the consumer is the limit"),
        pytest.param(measured(stage(policies=replace(THROTTLED, rate_wait_seconds=3.0))), id="bursts only"),
        pytest.param(measured(stage(policies=replace(WAITS, retry_wait_seconds=3.0), retries=5)), id="few wait"),
        pytest.param(measured(stage(policies=replace(WAITS, retry_wait_seconds=50.0), retries=5)), id="there is room"),
        pytest.param(measured(stage(policies=PolicyStats(timeout=0.3), timeouts=9, **BUSY)), id="few are cut off"),
        pytest.param(
            measured(stage(policies=PolicyStats(hedge_budget=0.05, refused_hedges=9), hedges=50, **BUSY)), id="few late"
        ),
        pytest.param(
            measured(stage("map(other)", **BUSY), stage(policies=WAITS, retries=200, timeouts=100)), id="another stage"
        ),
    ],
)
def test_what_does_not_limit_is_not_named(stats: Stats) -> None:
    sentence = explain(stats)
    for word in ("rate of", "next attempt", "retries", "cut off", "second one", "its Hedge"):
        assert word not in sentence


def test_the_drop_in_is_told_of_its_own_arguments() -> None:
    late = explain(measured(stage(policies=PolicyStats(timeout=0.3), timeouts=120, **BUSY)), "num_workers")
    assert "sample_timeout=0.3 cut off" in late
    assert "raise sample_timeout" in late
    failing = explain(measured(stage("dataset[...]", WAITS, retries=200, **HELD)), "num_workers")
    assert "next attempts" in failing
    assert "order" not in failing, "its samples come in the order of their batch"


def test_kinds_of_errors_are_counted_within_bounds() -> None:
    meter = PolicyMeter(Policies(retry=LATER))
    for n in range(MOST_KINDS):
        meter.tried_again(type(f"Made{n}Error", (OSError,), {})(), 0.0)
    for n in range(1000):
        meter.tried_again(type(f"Late{n}Error", (OSError,), {})(), 0.0)
    meter.tried_again(type("Made3Error", (OSError,), {})(), HOUR + 1)
    told, at = meter.stats()
    assert (told.retried_after, told.asked_waits, at) == ("Made3Error", 1, None)


# -- while it runs -----------------------------------------------------------------------------------------------------


def look(loader: Any, name: str) -> StageStats:
    stages: tuple[StageStats, ...] = loader.stats().stages
    return next((one for one in stages if one.name == name), stage(name))


def policies_of(loader: Any, name: str) -> PolicyStats:
    return look(loader, name).policies or PolicyStats()


class Asking:
    """A consumer that waits for batches in another thread, while the test looks; what it waits for never comes."""

    def __init__(self, loader: Any, face: Face) -> None:
        self._loader, self._face = loader, face

    def __enter__(self) -> None:
        self._outcome = Started(lambda: collect(self._loader, self._face))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._loader.close()
        if kind is None:
            self._outcome.join(DEADLINE)
            assert not self._outcome.is_alive()


def first_fails(count: int = 10**9, error: type[Exception] = ConnectionResetError) -> Callable[[int], Any]:
    """A function that fails once for each of the first `count` samples."""
    calls: Counter[int] = Counter()

    async def fetch(key: int) -> int:
        calls[key] += 1
        if key < count and calls[key] == 1:
            raise error
        return key

    return fetch


def sync(fetch: Callable[[int], Any]) -> Callable[[int], Any]:
    """The same for threads."""

    def load(key: int) -> Any:
        try:
            fetch(key).send(None)
        except StopIteration as returned:
            return returned.value

    return load


@on_both_faces
@pytest.mark.parametrize("how", ["async", "threads", "in_process"])
def test_samples_that_wait_for_their_next_attempt_are_told(face: Face, how: str) -> None:
    load = sync(first_fails(3)) if how == "threads" else first_fails(3)
    load.__qualname__, name = "load", "map(load)"
    pipeline = Pipeline(range(8)).map(load, concurrency=4, retry=LATER)
    loader = pipeline.in_process().batch(8) if how == "in_process" else pipeline.batch(8)
    with Asking(loader, face):
        wait_until(lambda: policies_of(loader, name).waiting_for_attempt == 3)
        said = explained(loader)
        assert said.startswith("No batch has come yet: ")
        assert f"3 samples wait for their next attempts in {name}, the first in 3" in said
        assert " s (mostly after ConnectionResetError)" in said
        told = policies_of(loader, name)
        assert told.next_attempt_seconds is not None
        assert HOUR - DEADLINE < told.next_attempt_seconds <= HOUR
    assert policies_of(loader, name).waiting_for_attempt == 0
    assert policies_of(loader, name).retried_after == "ConnectionResetError"


@on_both_faces
@pytest.mark.parametrize("threads", [False, True])
def test_samples_that_wait_for_a_rate_are_told(face: Face, threads: bool) -> None:
    """First that nothing comes, then, when averages count, that the rate limits."""
    fetch = first_fails(0)
    load = sync(fetch)
    name = "map(load)" if threads else "map(fetch)"
    fetch.__qualname__, load.__qualname__ = "fetch", "load"
    loader = Pipeline(range(9)).map(load if threads else fetch, concurrency=4, rate=Rate(1 / HOUR, burst=4)).batch(1)
    with Asking(loader, face):
        wait_until(lambda: loader.stats().batches == 4 and policies_of(loader, name).waiting_for_rate > 0)
        still = replace(loader.stats(), waiting_seconds=HOUR, seconds=HOUR + 1.0)
        assert re.search(
            rf"\d samples wait for the rate of {re.escape(name)}, which is 0.00028 a second", explain(still)
        )
        # The wait that goes on is in no average yet.
        wait_until(
            lambda: (
                f"The rate of {name} is the limit"
                in explain(replace(loader.stats(), waiting_seconds=0.0, waited_fraction=0.9))
            )
        )
        with loader.paused():
            assert policies_of(loader, name).waiting_for_rate == 0
            waited = policies_of(loader, name).rate_wait_seconds
            assert policies_of(loader, name).rate_wait_seconds == waited > 0
    assert policies_of(loader, name).waiting_for_rate == 0


@pytest.mark.parametrize(
    ("retried", "said"),
    [
        (True, "1 sample waits for its next attempt in fetch, in 3"),
        (False, "1 sample waits for the rate of fetch, which is 0.00028 a second"),
    ],
)
def test_waits_of_a_loader_without_workers_are_told(retried: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its consumer waits itself, so another thread asks."""
    data = Loads(sync(first_fails(1 if retried else 0)))
    retry, rate = (LATER, None) if retried else (None, Rate(1 / HOUR, burst=4))
    loader: DataLoader[Any] = DataLoader(data, batch_size=2, retry=retry, rate=rate)
    woken = threading.Event()
    monkeypatch.setattr("aioloader.stages.load_one.sleep", lambda _: woken.wait(DEADLINE))
    outcome = Started(lambda: collect(loader, "for"))
    wait_until(lambda: said in explained(loader))
    woken.set()
    outcome.join(DEADLINE)
    told = policies_of(loader, "fetch")
    assert (told.waiting_for_attempt, told.waiting_for_rate) == (0, 0)
    assert (told.retry_wait_seconds > 0, told.rate_wait_seconds > 0) == (retried, not retried)


class Loads:
    """Twelve samples."""

    def __init__(self, load: Callable[[int], Any]) -> None:
        self._load = load

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: int) -> Any:
        return self._load(key)


@on_both_faces
def test_places_that_are_taken_are_not_the_fault_of_the_rate(face: Face) -> None:
    gate = Gate()

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    loader = Pipeline(range(20)).map(fetch, concurrency=2, rate=Rate(1000, burst=2)).batch(4)
    with Asking(loader, face):
        gate.wait_arrived(2)
        wait_until(lambda: policies_of(loader, "map(fetch)").waiting_for_rate == 0)
        assert "rate" not in explained(loader)
        assert "2 samples have been under way in map(fetch)" in explained(loader)
        gate.open_all()


@on_both_faces
def test_calls_that_hang_in_all_places_are_told_with_the_second_calls_that_find_none(face: Face) -> None:
    gate = Gate()

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    loader = Pipeline(range(20)).map(fetch, concurrency=3, hedge=Hedge(after=0.0, budget=1.0)).batch(4)
    with Asking(loader, face):
        wait_until(lambda: policies_of(loader, "map(fetch)").waiting_for_second_call > 0 and len(gate.arrived) == 3)
        assert "no place in map(fetch), whose 3 are taken: only a timeout ends calls that hang" in explained(loader)
        gate.open_all()


@on_both_faces
def test_late_calls_without_a_second_one_are_counted(face: Face) -> None:
    gate = Gate()

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    loader = Pipeline(range(20)).map(fetch, concurrency=3, hedge=Hedge(after=0.0, budget=0.0)).batch(20)
    with Asking(loader, face):
        wait_until(lambda: policies_of(loader, "map(fetch)").refused_hedges == 3)
        told = policies_of(loader, "map(fetch)")
        assert (told.hedge_budget, told.hedge_after, told.waiting_for_second_call) == (0.0, 0.0, 0)
        gate.open_all()


@on_both_faces
@pytest.mark.parametrize("how", ["async", "threads", "in_process"])
def test_what_came_of_retries_is_told_after_the_epoch(face: Face, how: str) -> None:
    fetch = first_fails(7)
    load = sync(fetch) if how == "threads" else fetch
    load.__qualname__ = "load"
    pipeline = Pipeline(range(40)).map(load, concurrency=4, retry=AT_ONCE)
    loader = pipeline.in_process().batch(8) if how == "in_process" else pipeline.batch(8)
    with loader:
        assert [len(batch) for batch in collect(loader, face)] == [8] * 5
        one = look(loader, "map(load)")
    assert (one.samples, one.retries) == (40, 7)
    assert one.policies is not None
    assert one.policies.retried_after == "ConnectionResetError"
    assert one.policies.retry_wait_seconds > 0
    assert (one.policies.waiting_for_attempt, one.policies.next_attempt_seconds) == (0, None)
    json.dumps(loader.stats().as_dict())


@on_both_faces
def test_a_repeat_goes_on_counting(face: Face) -> None:
    """Each round has a step of its own, and all count in one place."""

    async def fetch(key: int) -> int:
        if key:
            raise ConnectionResetError
        return key

    loader: Pipeline = Pipeline(range(4)).map(fetch, retry=Retry(attempts=2, wait_initial=0.0, jitter=0.0, budget=0.0))
    loader = loader.skip_errors().repeat(4).batch(1)
    assert len(collect(loader, face)) == 4
    one = look(loader, "map(fetch)")
    assert one.policies is not None
    assert (one.errors, one.retries, one.policies.refused_retries, one.policies.retry_budget) == (12, 0, 12, 0.0)


def test_an_adaptive_rate_says_what_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioloader.core.rate.monotonic", lambda: 1000.0)
    rate = Rate.adaptive(on=ConnectionError, start=10.0, most=20.0)
    said = [rate.bound]
    rate.failed(ConnectionResetError())
    said += [rate.bound, Rate.adaptive(on=ConnectionError, start=20.0, most=20.0).bound, Rate(3).bound]
    assert said == ["growth", "refusals", "most", "given"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_samples_of_a_drop_in_are_counted_once(workers: int) -> None:
    """However often they are tried."""
    images = Loads(sync(first_fails(5)))
    loader: DataLoader[Any] = DataLoader(images, batch_size=4, num_workers=workers, retry=AT_ONCE)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    stages = [one for one in loader.stats().stages if one.retries]
    assert [one.retries for one in stages] == [5]
    assert stages[0].samples == (12 if workers else 3), "without workers, by the batch"


def test_a_stage_without_policies_has_none() -> None:
    loader = Pipeline(range(3)).map(abs).batch(3)
    collect(loader, "for")
    assert all(one.policies is None for one in loader.stats().stages)
