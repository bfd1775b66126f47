"""`Rate`: how many calls begin in a second, in all stages that share it; and one that finds what a server allows."""

import asyncio
import copy
import heapq
import itertools
import os
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any

import pytest

from aioloader import Limit, Pipeline, Rate, Retry
from aioloader.core import rate as rate_module
from aioloader.testing import Gate
from tests._support import DEADLINE, Face, Started, Steps, collect, on_both_faces, run, turns

KINDS = ("async", "threads")
SLOW = 1 / 3600
"""Calls a second: nobody waits for the second one."""


pytestmark = pytest.mark.usefixtures("fork_server")


class RefusedError(Exception):
    """Too many requests."""


class Clock:
    """What `Rate` takes for the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(rate_module, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# -- the bucket --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: Rate(0), ValueError, "per_second"),
        (lambda: Rate(-3), ValueError, "per_second"),
        (lambda: Rate(inf), ValueError, "per_second"),
        (lambda: Rate(True), TypeError, "per_second"),
        (lambda: Rate("3"), TypeError, "per_second"),  # type: ignore[arg-type]
        (lambda: Rate(3, 0), ValueError, "burst"),
        (lambda: Rate(3, 1.5), TypeError, "burst"),  # type: ignore[arg-type]
        (lambda: Rate.adaptive("429"), TypeError, "on must be"),  # type: ignore[arg-type]
        (lambda: Rate.adaptive(OSError, start=0), ValueError, "start"),
        (lambda: Rate.adaptive(OSError, start="1"), TypeError, "start"),  # type: ignore[arg-type]
        (lambda: Rate.adaptive(OSError, least=0), ValueError, "least"),
        (lambda: Rate.adaptive(OSError, start=5, least=6), ValueError, "between least and most"),
        (lambda: Rate.adaptive(OSError, start=5, most=4), ValueError, "between least and most"),
        (lambda: Pipeline(range(3)).map(abs, rate=100), TypeError, r"Rate\(100\)"),  # type: ignore[call-overload]
    ],
)
def test_bad_arguments(make: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        make()
    assert "; " in str(caught.value) or "burst" in words


def test_tokens_come_at_the_rate_up_to_the_burst(clock: Clock) -> None:
    rate = Rate(10, burst=3)
    assert [rate.take_ready(1) for _ in range(4)] == [1, 1, 1, 0]
    clock.now += 0.25
    assert rate.take_ready(9) == 2
    clock.now += 1000
    assert rate.take_ready(9) == 3
    assert (rate.per_second, rate.burst) == (10.0, 3)
    assert Rate(1000).burst == 50
    assert Rate(1).burst == 1


def test_where_it_is_far_from_acting_it_is_asked_once_for_many(clock: Clock) -> None:
    """But most of what nobody asks for is left to others."""
    rate = Rate(1000, burst=100)
    assert rate.take_ready(4, 1000) == 4 + 96 // 8
    assert rate.take_ready(100) == 100 - 16
    assert rate.take_ready(1, 1000) == 0
    clock.now += 0.01
    assert rate.take_ready(4, 1000) == 4 + 6 // 8


def test_who_asks_first_has_the_first_turn(clock: Clock) -> None:
    """Also before those that ask when the tokens come."""
    rate = Rate(10, burst=1)
    assert [round(rate.take(), 3) for _ in range(4)] == [0.0, 0.1, 0.2, 0.3]
    clock.now += 0.15
    assert rate.take_ready(1) == 0
    rate.give_back()  # one that waited has been closed
    assert round(rate.take(), 3) == 0.15, "after the two that wait still"
    assert repr(rate) == "Rate(10, 1)"


@pytest.mark.parametrize("seed", range(20))
def test_no_more_than_burst_and_rate_in_any_time(seed: int, clock: Clock) -> None:
    draw = random.Random(seed)
    per_second, burst = draw.choice((5.0, 100.0, 3000.0)), draw.choice((1, 7, 100))
    rate = Rate(per_second, burst)
    begun: list[float] = []
    for _ in range(500):
        clock.now += draw.choice((0.0, 0.1, 1.0, 20.0)) * draw.random() / per_second
        if draw.random() < 0.5:
            begun += [clock.now] * rate.take_ready(draw.randrange(1, 10))
        elif draw.random() < 0.2:
            begun.append(clock.now + rate.take())
    begun.sort()
    for first in range(0, len(begun), 17):
        for last in range(first, len(begun)):
            assert last - first + 1 <= burst + per_second * (begun[last] - begun[first]) + 1e-6


def test_threads_share_it() -> None:
    rate = Rate(SLOW, burst=1000)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda n: sum(rate.take_ready(n % 3 + 1) for _ in range(300)), range(8)))
    assert sum(taken) == 1000


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda rate: pickle.loads(pickle.dumps(rate))])
def test_a_copy_is_a_rate_of_its_own(make: Callable[[Rate], Rate]) -> None:
    rate = Rate(SLOW, burst=2)
    assert rate.take_ready(2) == 2
    other = make(rate)
    assert other.take_ready(3) == 2
    adaptive = make(Rate.adaptive(OSError, start=7, least=3, most=9))
    assert adaptive.per_second == 7.0


def test_a_forked_child_can_use_it() -> None:
    rate = Rate(SLOW, burst=2)
    with rate._lock:
        pid = os.fork()
        if not pid:
            os._exit(rate.take_ready(2))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2


# -- one that adapts ---------------------------------------------------------------------------------------------------


class Server:
    """Allows so many requests a second, with room for a burst of a tenth of a second, and refuses others."""

    def __init__(self, allowed: float, now: float) -> None:
        self.allowed = allowed
        self._tokens = allowed / 10
        self._at = now

    def allows(self, now: float) -> bool:
        self._tokens = min(self.allowed / 10, self._tokens + (now - self._at) * self.allowed)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class SecondServer(Server):
    """Allows so many requests in each second of the clock."""

    def __init__(self, allowed: float, now: float) -> None:
        super().__init__(allowed, now)
        self._tokens = allowed

    def allows(self, now: float) -> bool:
        if int(now) != int(self._at):
            self._tokens = self.allowed
        self._at = now
        self._tokens -= 1
        return self._tokens >= 0


def simulate(
    clock: Clock,
    rate: Rate,
    server: Server,
    seconds: float,
    *,
    round_trip: float = 0.02,
    changes: dict[float, float] | None = None,
    wanted: float | None = None,
) -> tuple[list[float], list[float]]:
    """Calls at `rate` for so long; returns when the server allowed one, and when it refused one.

    Args:
        clock: Of the rate.
        rate: It.
        server: It.
        seconds: How long.
        round_trip: Of a call, and a half more by chance.
        changes: After how long the server allows another number.
        wanted: Calls a second that there are at most; None: any number.
    """
    chance = random.Random(1)
    begin = clock.now
    number = itertools.count()
    events: list[tuple[float, int, str]] = []
    allowed: list[float] = []
    refused: list[float] = []
    coming = dict(changes or {})

    def after(delay: float, what: str) -> None:
        heapq.heappush(events, (clock.now + delay, next(number), what))

    after(0.0, "ask")
    while events[0][0] < begin + seconds:
        clock.now, _, what = heapq.heappop(events)
        while coming and (first := min(coming)) <= clock.now - begin:
            server.allowed = coming.pop(first)
        if what == "ask":
            after(rate.take() + 0.001 * chance.random(), "call")  # timers are late
        elif what == "call":
            after(round_trip / 2 * (1 + chance.random() / 2), "arrive")
            after(0.0 if wanted is None else 1 / wanted, "ask")
        elif what == "arrive":
            if server.allows(clock.now):
                allowed.append(clock.now - begin)
            else:
                refused.append(clock.now - begin)
                after(round_trip / 2, "fail")
        else:
            rate.failed(RefusedError())
    return allowed, refused


@pytest.mark.parametrize("round_trip", [0.005, 0.02, 0.1])
def test_it_reaches_what_a_server_allows_and_is_seldom_refused(round_trip: float, clock: Clock) -> None:
    """200 calls a second: 0.9 of them at least, and a hundredth refused at most, once it has found that out."""
    rate = Rate.adaptive(RefusedError, start=10)
    allowed, refused = simulate(clock, rate, Server(200, clock.now), 15.0, round_trip=round_trip)
    later = sum(at > 5 for at in allowed)
    assert later >= 0.9 * 200 * 10
    assert sum(at > 5 for at in refused) <= 0.01 * later
    assert len(refused) <= 0.04 * len(allowed)
    assert sum(at < 3 for at in allowed) >= 0.5 * 200 * 3  # soon


def test_a_start_that_is_far_beyond_is_corrected_by_what_was_begun(clock: Clock) -> None:
    """Not by halves, each of which costs refusals."""
    allowed, refused = simulate(clock, Rate.adaptive(RefusedError, start=2000), Server(200, clock.now), 30.0)
    assert len(allowed) >= 0.95 * 200 * 30
    assert len(refused) <= 0.015 * len(allowed)


def test_a_server_that_counts_by_the_second_is_seldom_asked_too_much(clock: Clock) -> None:
    """What was begun in the last second says how much that is, when it refuses for the first time."""
    rate = Rate.adaptive(RefusedError, start=10)
    allowed, refused = simulate(clock, rate, SecondServer(200, clock.now), 30.0, round_trip=0.005)
    assert len(allowed) >= 0.9 * 200 * 30
    assert len(refused) <= 0.008 * len(allowed)


def test_it_follows_a_server_that_allows_more_or_less(clock: Clock) -> None:
    rate = Rate.adaptive(RefusedError, start=100)
    allowed, refused = simulate(clock, rate, Server(200, clock.now), 60.0, changes={10.0: 50.0, 25.0: 200.0})
    assert sum(15 < at < 25 for at in allowed) >= 0.85 * 50 * 10
    assert sum(at > 50 for at in allowed) >= 0.85 * 200 * 10
    assert len(refused) <= 0.03 * len(allowed)


def test_it_does_not_grow_while_nobody_waits(clock: Clock) -> None:
    """What is not asked for says nothing of the server."""
    rate = Rate.adaptive(RefusedError, start=100)
    simulate(clock, rate, Server(1000, clock.now), 20.0, wanted=20)
    assert rate.per_second == 100


def test_its_bounds_hold(clock: Clock) -> None:
    rate = Rate.adaptive(RefusedError, start=20, least=15, most=40)
    simulate(clock, rate, Server(1000, clock.now), 10.0)
    assert rate.per_second == 40
    for _ in range(50):
        clock.now += 2.0
        rate.failed(RefusedError())
    assert rate.per_second == 15
    rate.failed(OSError())
    assert rate.per_second == 15


def test_refusals_of_what_was_under_way_count_once(clock: Clock) -> None:
    rate = Rate.adaptive(RefusedError, start=100)
    for _ in range(100):
        rate.take_ready(1)
        clock.now += 0.01
    for _ in range(30):
        rate.failed(RefusedError())
        clock.now += 0.001
    assert rate.per_second == 50
    rate.failed(KeyError())
    assert repr(rate) == "Rate.adaptive(now 50)"


# -- in stages ---------------------------------------------------------------------------------------------------------


class Work:
    def __init__(self) -> None:
        self.begun: list[int] = []
        self.gate = Gate()
        self.waits = False

    def function(self, kind: str) -> Callable[[int], Any]:
        async def awaited(sample: int) -> int:
            self.begun.append(sample)
            if self.waits:
                await self.gate.passing(sample)
            return sample

        def in_thread(sample: int) -> int:
            self.begun.append(sample)
            if self.waits:
                self.gate.pass_sync(sample)
            return sample

        return awaited if kind == "async" else in_thread


@on_both_faces
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_begin_than_there_are_tokens(kind: str, ordered: bool, face: Face) -> None:
    """And who waits for the next one is closed at once: no timer is left."""
    work = Work()
    loader = Pipeline(range(50)).map(work.function(kind), concurrency=4, ordered=ordered, rate=Rate(SLOW, burst=7))
    with Steps(loader, face) as steps:
        assert sorted(steps.next() for _ in range(7)) == list(range(7))
        assert sorted(work.begun) == list(range(7))
        loader.close() if face == "for" else steps.do(loader.aclose)
    loader.close()


@on_both_faces
@pytest.mark.parametrize("kind", [*KINDS, "process", "own"])
def test_order_and_samples_are_as_without_it(kind: str, face: Face) -> None:
    work = Work()
    pool = ThreadPoolExecutor(2) if kind == "own" else None
    executor: Any = {"process": "process", "own": pool}.get(kind)
    fn = work.function(kind) if executor is None else abs
    loader = Pipeline(range(300)).map(fn, concurrency=3, executor=executor, rate=Rate(3000)).batch(10)
    batches = collect(loader, face)
    assert [sample for batch in batches for sample in batch.tolist()] == list(range(300))
    loader.close()
    if pool is not None:
        pool.shutdown()


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_taken_for_what_cannot_begin(kind: str, face: Face) -> None:
    """All places are taken: others may have the tokens."""
    work = Work()
    work.waits = True
    rate = Rate(SLOW, burst=10)
    loader = Pipeline(range(50)).map(work.function(kind), concurrency=3, rate=rate)
    with Steps(loader, face) as steps:
        asked = steps.ask()
        steps.until_arrived(work.gate, 3)
        assert rate.take_ready(10) == 7
        work.gate.open_all()
        assert asked() == 0
        loader.close() if face == "for" else steps.do(loader.aclose)
    loader.close()
    assert len(work.begun) == 3


@on_both_faces
def test_stages_share_it_and_each_attempt_counts(face: Face) -> None:
    rate = Rate(SLOW, burst=10)
    failed: list[int] = []
    calls: list[str] = []

    async def first(sample: int) -> int:
        calls.append("first")
        if sample == 0 and len(failed) < 2:
            failed.append(sample)
            raise OSError
        return sample

    async def second(sample: int) -> int:
        calls.append("second")
        return sample

    loader = (
        Pipeline(range(4))
        .map(first, concurrency=1, rate=rate, retry=Retry(3, OSError, wait_initial=0, jitter=0))
        .map(second, concurrency=1, rate=rate)
    )
    assert collect(loader, face) == list(range(4))
    assert (calls.count("first"), calls.count("second")) == (6, 4)
    assert rate.take_ready(5) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_loaders_on_several_loops_share_it(kind: str) -> None:
    rate = Rate(SLOW, burst=20)
    work = Work()
    fn = work.function(kind)
    enough = threading.Event()

    def count(sample: int) -> int:
        if len(work.begun) >= 20:
            enough.set()
        return sample

    loaders = [Pipeline(range(100)).map(fn, concurrency=2, rate=rate).map(count) for _ in range(3)]
    started = [Started(lambda loader=loader: list(loader)) for loader in loaders]  # type: ignore[misc]
    assert enough.wait(DEADLINE)
    for loader in loaders:
        loader.close()
    for one in started:
        one.join(DEADLINE)
        assert not one.is_alive()
    assert len(work.begun) == 20


def test_no_loader_starves_another_one() -> None:
    """On one loop, where one of them always asks first."""
    rate = Rate(2000, burst=1)
    begun = {"a": 0, "b": 0}

    async def drain(name: str) -> None:
        async def fetch(sample: int) -> int:
            begun[name] += 1
            return sample

        async with Pipeline(range(1000)).map(fetch, concurrency=4, rate=rate) as loader:
            async for _ in loader:
                if sum(begun.values()) >= 100:
                    return

    async def main() -> None:
        await asyncio.gather(drain("a"), drain("b"))

    run(main)
    assert min(begun.values()) >= 30


@on_both_faces
def test_what_is_closed_gives_its_turn_back(face: Face) -> None:
    rate = Rate(SLOW, burst=1)
    loader = Pipeline(range(5)).map(Work().function("async"), rate=rate)
    with Steps(loader, face) as steps:
        assert steps.next() == 0
        loader.close() if face == "for" else steps.do(loader.aclose)
    loader.close()
    for thread in threading.enumerate():
        if thread.name == "aioloader-loop" and face == "for":
            thread.join(0.5)
    assert rate._tokens > -1.0


@on_both_faces
def test_a_limit_may_be_raised_while_samples_wait(face: Face) -> None:
    limit = Limit(1)
    work = Work()
    work.waits = True
    loader = Pipeline(range(6)).map(work.function("async"), concurrency=limit, rate=Rate(1e6))
    with Steps(loader, face) as steps:
        asked = steps.ask()
        steps.until_arrived(work.gate, 1)
        limit.value = 3
        steps.until_arrived(work.gate, 3)
        work.gate.open_all()
        assert [asked(), *steps.rest()] == list(range(6))


def test_nobody_begins_in_a_pause_and_then_all_do() -> None:
    """Tokens that were taken for samples that then paused are given back."""
    work = Work()

    async def main() -> None:
        rate = Rate(200, burst=1)
        loader = Pipeline(range(12)).map(work.function("async"), concurrency=2, rate=rate)
        batches = aiter(loader)
        assert await anext(batches) == 0
        async with loader.paused(drain=True):
            before = len(work.begun)
            await asyncio.sleep(0.02)  # the next turn comes in the block
            await turns(50)
            assert len(work.begun) == before
        assert [sample async for sample in batches] == list(range(1, 12))

    run(main)


@on_both_faces
@pytest.mark.parametrize("kind", KINDS)
def test_failures_are_told_to_an_adaptive_rate(kind: str, face: Face) -> None:
    work = Work()
    fn = work.function(kind)
    rate = Rate.adaptive(RefusedError, start=1000, least=100)

    def refused(sample: int) -> Any:
        if sample == 3 and work.begun.count(3) == 0:
            work.begun.append(3)
            raise RefusedError
        return fn(sample)

    async def refused_there(sample: int) -> Any:
        return await refused(sample)

    call: Any = refused_there if kind == "async" else refused
    loader = Pipeline(range(6)).map(call, rate=rate, retry=Retry(2, RefusedError, wait_initial=0, jitter=0))
    assert collect(loader, face) == list(range(6))
    assert 100 <= rate.per_second <= 500


def test_in_process_refuses_it() -> None:
    """A copy there would be another one."""
    with pytest.raises(ValueError, match=r"map\(abs\).*Rate\(5\).*after in_process"):
        Pipeline(range(3)).map(abs, rate=Rate(5)).in_process()


@on_both_faces
def test_cheap_samples_share_a_hop_under_a_rate(face: Face) -> None:
    """One that never acts costs next to nothing, in threads, too: not a hop for each sample."""
    begun: list[int] = []

    def cheap(sample: int) -> int:
        begun.append(threading.get_ident())
        return sample

    loader = Pipeline(range(2000)).map(cheap, concurrency=1, rate=Rate(1e9, burst=10_000)).batch(100)
    assert len(collect(loader, face)) == 20
    assert len(begun) == 2000
