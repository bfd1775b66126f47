"""What `stats()` counts, and whether `explain()` names the right culprit where we have built one."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from aioloader import DataLoader, Pipeline, StageStats, Stats
from aioloader.engine.run import Run
from aioloader.insight.explain import explain
from aioloader.testing import Gate
from tests._support import Face, Steps, collect, on_both_faces


def stage(name: str, **known: Any) -> StageStats:
    """A stage of which only what matters is told."""
    return StageStats(
        **{
            "name": name,
            "kind": "sync",
            "concurrency": 4,
            "samples": 100,
            "errors": 0,
            "busy_seconds": 0.0,
            "cpu_seconds": 0.0,
            "utilization": 0.0,
            "waiting_for_input_seconds": 0.0,
            "waiting_for_room_seconds": 0.0,
            "finished_slots": 0.0,
            "room": 6,
            **known,
        }
    )


def measured(*stages: StageStats, waited: float = 0.9, loop: float = 0.1, seconds: float = 10.0) -> Stats:
    """Ten seconds of an epoch."""
    return Stats(
        epoch=0,
        seconds=seconds,
        first_batch_seconds=0.1,
        batches=100,
        waited_seconds=seconds * waited,
        waited_fraction=waited,
        loop_cpu_fraction=loop,
        stages=stages,
    )


BUSY = {"busy_seconds": 39.0, "utilization": 0.98}


@pytest.mark.parametrize(
    ("stats", "said"),
    [
        pytest.param(
            measured(stage("map(f)", **BUSY), waited=0.01), ["keeps up", "consumer is the limit"], id="consumer"
        ),
        pytest.param(measured(stage("map(f)"), loop=0.95), ["event loop is the limit", "95%"], id="loop"),
        pytest.param(
            measured(stage("map(f)", kind="async", **BUSY)), ["map(f) is the limit", "its concurrency"], id="async"
        ),
        pytest.param(
            measured(stage("map(f)", cpu_seconds=1.0, **BUSY)), ["map(f) is the limit", "waiting"], id="sleeping"
        ),
        pytest.param(
            measured(stage("map(f)", cpu_seconds=9.6, busy_seconds=20.0, utilization=0.5)),
            ["map(f) is the limit", "compute"],
            id="computing under the GIL",
        ),
        pytest.param(
            measured(
                stage("source(s)", kind="source", concurrency=1, busy_seconds=9.5, utilization=0.95), stage("map(f)")
            ),
            ["source(s) is the limit", "one task reads it"],
            id="source",
        ),
        pytest.param(
            measured(stage("map(f)", busy_seconds=8.0, utilization=0.2)), ["No stage is busy all the time"], id="none"
        ),
        pytest.param(measured(), ["No stage has done anything"], id="nothing"),
    ],
)
def test_explain_names_the_limit(stats: Stats, said: list[str]) -> None:
    """One sentence: the culprit, the numbers, and the way out."""
    sentence = explain(stats)
    for words in said:
        assert words in sentence
    assert sentence.endswith(".")
    assert "100 batches in 10.00 s" in sentence


STRAGGLERS = {"busy_seconds": 53.0, "utilization": 0.08, "concurrency": 64, "finished_slots": 51.0, "room": 96}
"""Of 2000 samples 0.5 % take 1 s and the others 20 ms: most of the time one place is busy, and the window is full."""


def test_slow_samples_in_front_of_finished_ones_are_told() -> None:
    """The places are empty because the window is full: neither prefetch nor more places help, another order does."""
    for kind in ("async", "sync", "process"):
        sentence = explain(measured(stage("map(f)", kind=kind, **STRAGGLERS), waited=0.99))
        assert "map(f) is held up by slow samples" in sentence
        assert "51 finished samples on average, of the 96" in sentence
        assert "ordered=False" in sentence
        assert "prefetch" not in sentence
    assert "in_order=False" in explain(measured(stage("fetch", **STRAGGLERS)), "num_workers")


@pytest.mark.parametrize(
    "known",
    [
        pytest.param({"ordered": False}, id="unordered"),
        pytest.param({"waiting_for_room_seconds": 8.0}, id="nobody takes them"),
        pytest.param({"waiting_for_input_seconds": 8.0}, id="nothing comes"),
        pytest.param({"finished_slots": 3.0}, id="few are finished"),
    ],
)
def test_a_full_window_is_no_matter_of_order_without_slow_samples(known: dict[str, Any]) -> None:
    """Each number has its say."""
    assert "held up" not in explain(measured(stage("map(f)", kind="async", **{**STRAGGLERS, **known})))


def test_a_window_says_whether_it_gives_samples_in_order() -> None:
    """What the advice depends on."""
    for ordered in (True, False):
        loader = Pipeline(range(4)).map(str, ordered=ordered)
        assert sorted(loader) == ["0", "1", "2", "3"]
        assert _stage(loader, "map(str)").ordered is ordered


ONE_AT_A_TIME = {**STRAGGLERS, "busy_seconds": 10.0, "utilization": 0.016, "finished_slots": 93.0, "kind": "async"}


def test_code_that_blocks_the_loop_is_told() -> None:
    """Calls of an async function that has 64 places add up to one; threads have no such trouble."""
    sentence = explain(measured(stage("map(f)", **ONE_AT_A_TIME)))
    assert "map(f) blocks the event loop" in sentence
    assert "make it sync (def), then it runs in threads" in sentence
    assert "async map(f)" in explain(measured(stage("map(f)", **ONE_AT_A_TIME), loop=0.99))
    for known in ({"kind": "sync"}, {"concurrency": 1}, {"finished_slots": 1.0}, {"busy_seconds": 3.0}):
        assert "blocks" not in explain(measured(stage("map(f)", **{**ONE_AT_A_TIME, **known})))


def test_a_limit_in_the_client_looks_like_a_slow_server() -> None:
    """200 places are busy waiting for the 4 that a semaphore lets through: the advice names both."""
    sentence = explain(measured(stage("map(f)", kind="async", **BUSY)))
    assert "raise its concurrency" in sentence
    assert "a limit in your client" in sentence


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("collate(pad)", "collate_fn=list).map(collate, concurrency=...)"),
        ("filter(keep)", "map(fn, concurrency=...) before it"),
        ("drop_if(stale)", "map(fn, concurrency=...) before it"),
        ("to(cuda)", "fewer bytes"),
    ],
)
def test_no_knob_is_advised_that_a_stage_lacks(name: str, way_out: str) -> None:
    """`batch()` takes no concurrency, and the sentence says what to do instead."""
    for known in ({}, {"cpu_seconds": 1.0}, {"kind": "async"}, {"kind": "process"}):
        sentence = explain(measured(stage(name, **BUSY, **known)))
        assert "raise its concurrency" not in sentence
        assert way_out in sentence
    computing = stage(name, cpu_seconds=9.6, busy_seconds=20.0, utilization=0.5)
    assert 'threads do not help; worker processes may: executor="process"' not in explain(measured(computing))


def test_the_drop_in_is_told_of_its_own_arguments() -> None:
    """Its collate runs in `num_workers` threads, and its processes are `worker_type`."""
    assert "raise num_workers" in explain(measured(stage("collate", **BUSY)), "num_workers")
    computing = stage("fetch", cpu_seconds=9.6, busy_seconds=20.0, utilization=0.5)
    sentence = explain(measured(computing), "num_workers")
    assert 'worker_type="process"' in sentence or "more cores help" in sentence


def test_prefetch_is_for_bursts_and_short_is_what_is_short() -> None:
    """Who waits nearly all of the time has nothing to hold ahead."""
    quiet = stage("map(f)", busy_seconds=8.0, utilization=0.2)
    assert "prefetch" not in explain(measured(quiet, waited=0.99))
    assert "very different times" in explain(measured(quiet, waited=0.99))
    assert "prefetch" in explain(measured(quiet, waited=0.3))
    assert "short" not in explain(measured(quiet, waited=0.3))
    assert "short" in explain(measured(quiet, waited=0.99, seconds=1.0))


def test_the_advice_speaks_of_num_workers_to_users_of_the_drop_in() -> None:
    """They know no `concurrency` of threads."""
    assert "raise num_workers" in explain(measured(stage("fetch", cpu_seconds=1.0, **BUSY)), "num_workers")


@on_both_faces
def test_samples_errors_and_batches_are_counted(face: Face) -> None:
    """Per stage what went through it, failed ones too; the numbers of an epoch stay when it is over."""

    def decode(key: int) -> int:
        if key == 3:
            raise ValueError(key)
        return key

    loader = Pipeline(range(10)).map(decode).filter(lambda key: key != 5).batch(3)
    with Steps(loader, face) as steps:
        steps.outcomes()
    stats = loader.stats()
    by_name = {one.name: one for one in stats.stages}

    assert stats.epoch == 0
    assert stats.batches == 3
    assert by_name["source(range)"].samples == 10
    together = by_name["map(decode) + filter(<lambda>)"]  # neighbouring sync stages run in one hop
    assert (together.samples, together.errors) == (10, 1)
    assert sum(one.errors for one in stats.stages) == 1
    assert by_name["collate"].samples == 2  # the batch with the failed sample was not collated
    assert loader.stats() == stats


@on_both_faces
def test_a_stage_behind_a_slow_one_waits_for_input(face: Face) -> None:
    """And the consumer waits, for the batch as for the end."""
    gate = Gate()

    async def fetch(key: int) -> int:
        await gate.passing(key)
        return key

    def decode(key: int) -> int:
        return key

    loader = Pipeline(range(4)).map(fetch, concurrency=1).map(decode)
    with Steps(loader, face) as steps:
        for key in range(3):
            gate.open(key)
            steps.next()
        steps.until_arrived(gate, 4)
        before = _stage(loader, "map(decode)").waiting_for_input_seconds
        _let_time_pass()
        after = _stage(loader, "map(decode)").waiting_for_input_seconds
        assert after > before > 0
        assert _stage(loader, "map(fetch)").busy_seconds > 0
        gate.open_all()
        steps.rest()


@on_both_faces
def test_a_stage_in_front_of_a_resting_consumer_waits_for_room(face: Face) -> None:
    """Its finished samples are in the way, and counted."""

    async def fetch(key: int) -> int:
        loops.append(asyncio.get_running_loop())
        return key

    loops: list[asyncio.AbstractEventLoop] = []
    loader = Pipeline(range(100)).map(fetch, concurrency=2).batch(2)
    with Steps(loader, face) as steps:
        steps.next()
        steps.settle(loops[0])
        before = _stage(loader, "map(fetch)").waiting_for_room_seconds
        _let_time_pass()
        after = _stage(loader, "map(fetch)").waiting_for_room_seconds
        assert after > before
        steps.rest()
    assert _stage(loader, "map(fetch)").finished_slots > 0


@on_both_faces
def test_a_slow_flat_map_is_seen(face: Face) -> None:
    """The time of the function itself counts, also when it returns a list."""

    def halves(key: int) -> list[int]:
        _let_time_pass()
        return [key, key]

    loader = Pipeline(range(3)).flat_map(halves).batch(2)
    collect(loader, face)
    assert _stage(loader, "flat_map(halves)").busy_seconds > 0.002


def test_a_source_that_nobody_asks_waits_for_room() -> None:
    """It was read as far as there was room."""

    def endless() -> Iterator[int]:
        key = 0
        while True:
            yield key
            key += 1

    loader = Pipeline(endless).batch(2)
    with loader:
        batches = iter(loader)
        next(batches)
        _let_time_pass()
        assert _stage(loader, "source(endless)").waiting_for_room_seconds > 0


def test_a_loop_that_computes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in async functions keeps the loop's thread busy, which delays all that it drives."""

    async def compute(key: int) -> int:
        until = time.thread_time() + 0.004
        while time.thread_time() < until:
            pass
        return key

    runs: list[Run] = []
    original = Run.attach

    def attach(run: Run, loop: asyncio.AbstractEventLoop) -> None:
        runs.append(run)
        original(run, loop)

    monkeypatch.setattr(Run, "attach", attach)
    loader = Pipeline(range(40)).map(compute).batch(4)
    collect(loader, "for")
    assert loader.stats().loop_cpu_fraction > 0
    assert runs[0].consumer.loop is not None
    assert runs[0].consumer.loop.seconds() >= 40 * 0.004


def test_a_computing_transform_is_told_from_a_sleeping_one() -> None:
    """CPU seconds of the threads are counted beside the wall time."""

    def compute(key: int) -> int:
        until = time.thread_time() + 0.002
        while time.thread_time() < until:
            pass
        return key

    def wait(key: int) -> int:
        threading.Event().wait(0.002)
        return key

    computing = Pipeline(range(20)).map(compute, concurrency=2)
    waiting = Pipeline(range(20)).map(wait, concurrency=2)
    collect(computing, "for")
    collect(waiting, "for")
    assert _stage(computing, "map(compute)").cpu_seconds >= 20 * 0.002
    assert _stage(waiting, "map(wait)").busy_seconds >= 20 * 0.002
    assert _stage(waiting, "map(wait)").cpu_seconds < _stage(waiting, "map(wait)").busy_seconds


def test_the_drop_in_has_stats_without_workers_too() -> None:
    """Inline loading is measured likewise: all of it is waiting."""
    loader = DataLoader(list(range(10)), batch_size=2)
    for _ in loader:
        pass
    stats = loader.stats()
    assert stats.batches == 5
    assert [one.samples for one in stats.stages] == [5, 5]


def test_before_the_first_epoch_there_is_nothing_to_explain() -> None:
    """Zeros, and a sentence that says so."""
    loader = Pipeline(range(3))
    assert loader.stats().epoch is None
    assert loader.stats().as_dict()["batches"] == 0
    assert "Nothing to explain yet" in loader.explain()


def _stage(loader: Any, name: str) -> StageStats:
    stages: tuple[StageStats, ...] = loader.stats().stages
    return next(one for one in stages if one.name == name)


def _let_time_pass() -> None:
    """Some milliseconds of work: the clock must move, by however much."""
    until = time.perf_counter() + 0.002
    while time.perf_counter() < until:
        pass
