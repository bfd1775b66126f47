"""`FaultPlan`: the same faults for the same seed, key and attempt; what each does to functions, sources and servers."""

import asyncio
import pickle
import socket
from collections import Counter
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from aioloader import Pipeline
from aioloader.core.policies import retry_after
from aioloader.testing import Fault, FaultError, FaultPlan, FaultySource, SyncFaultySource
from aioloader.testing.fault_plan import KINDS, FaultKind
from tests._servers import HttpServer
from tests._support import Face, Started, Steps, on_both_faces, run

FAST: Any = {"latency_seconds": 0.0, "drip_seconds": 0.0}


def always(kind: str, **more: Any) -> FaultPlan:
    """A plan in which every call has this fault."""
    shares: Any = {kind: 1.0}
    return FaultPlan(0, **shares, **{**FAST, **more})


async def load(key: int) -> bytes:
    return bytes([key]) * 8


def load_sync(key: int) -> bytes:
    return bytes([key]) * 8


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_a_plan_depends_on_seed_key_and_attempt_alone() -> None:
    """Two plans of one seed agree on every call, in whatever order they are asked; another seed does not."""
    shares: Any = dict.fromkeys(KINDS, 0.1)
    one, same, other = FaultPlan(1, **shares), FaultPlan(1, **shares), FaultPlan(2, **shares)
    calls = [(key, attempt) for key in range(200) for attempt in (1, 2, 3)]
    told = {call: one.fault(*call) for call in calls}
    assert {call: same.fault(*call) for call in reversed(calls)} == told
    assert {call: other.fault(*call) for call in calls} != told
    assert {fault.kind for fault in told.values() if fault is not None} == set(KINDS)


def test_it_is_the_same_in_every_process() -> None:
    """These faults are those of seed 7, today and for ever: `hash` of strings, which differs, has no part in it."""
    plan = FaultPlan(7, reset=0.5)
    assert "".join("x" if plan.fault(f"k{number}") else "." for number in range(20)) == "xx...x.xx....x..xxx."


def test_shares_are_kept() -> None:
    """About as many calls fail as were asked for."""
    plan = FaultPlan(3, throttled=0.05, hang=0.02)
    kinds = Counter(fault.kind for key in range(20_000) if (fault := plan.fault(key)) is not None)
    assert kinds["throttled"] == pytest.approx(1000, rel=0.15)
    assert kinds["hang"] == pytest.approx(400, rel=0.2)
    assert set(kinds) == {"throttled", "hang"}


def test_later_attempts_may_be_fine() -> None:
    """With `attempts=2` the third call of each key works."""
    plan = always("reset", attempts=2)
    assert [plan.fault("a", attempt) is None for attempt in (1, 2, 3, 4)] == [False, False, True, True]


def test_calls_are_counted_by_key() -> None:
    """A wrapped function meets what `fault` tells of its key and attempt."""
    plan = FaultPlan(5, reset=0.5)
    flaky = plan.wrap(load_sync)
    for attempt in (1, 2, 3):
        for key in range(50):
            expected = plan.fault(key, attempt)
            if expected is None:
                assert flaky(key) == load_sync(key)
            else:
                with pytest.raises(FaultError) as caught:
                    flaky(key)
                assert caught.value.fault == expected
    assert plan.calls(7) == 3
    assert plan.calls("never") == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": "a"}, TypeError, "seed must be an integer, got 'a'"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"reset": 1.5}, ValueError, "reset must be a share of the calls, 0 to 1, got 1.5"),
        ({"reset": "often"}, TypeError, "reset must be a share"),
        ({"reset": 0.6, "hang": 0.6}, ValueError, "1 together at most, got 1.2"),
        ({"latency_seconds": -1}, ValueError, "latency_seconds must be 0 or more seconds"),
        ({"retry_after": None}, TypeError, "retry_after must be a number of seconds"),
        ({"attempts": 0}, ValueError, "attempts must be at least 1, got 0"),
        ({"attempts": 1.5}, TypeError, "attempts must be an integer"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FaultPlan(**{"seed": 0, **arguments})


# -- functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["throttled", "unavailable", "reset", "truncated", "changed_etag"])
def test_functions_raise(kind: str) -> None:
    """A `ConnectionError` with the fault; sync and async alike."""
    for call in (always(kind).wrap(load_sync), lambda key: run(lambda: always(kind).wrap(load)(key))):
        with pytest.raises(ConnectionError, match=kind) as caught:
            call(3)
        assert isinstance(caught.value, FaultError)
        assert (caught.value.fault.kind, caught.value.fault.key, caught.value.fault.attempt) == (kind, 3, 1)
        assert caught.value.status == {"throttled": 429, "unavailable": 503, "changed_etag": 412}.get(kind)


def test_a_throttled_call_says_how_long_to_wait() -> None:
    """Where the retries of aioloader look for it."""
    with pytest.raises(FaultError) as caught:
        always("throttled", retry_after=1.5).wrap(load_sync)(1)
    assert retry_after(caught.value) == 1.5


@pytest.mark.parametrize("kind", ["latency", "drip"])
def test_slow_functions_return_all_the_same(kind: str) -> None:
    assert always(kind).wrap(load_sync)(1) == load_sync(1)
    assert run(lambda: always(kind, latency_seconds=0.001).wrap(load)(1)) == load_sync(1)


def test_a_wrong_length_is_half_of_what_can_be_cut() -> None:
    """Bytes, strings, lists and tuples; else the result stays."""
    assert always("wrong_length").wrap(load_sync)(1) == load_sync(1)[:4]
    assert run(lambda: always("wrong_length").wrap(load)(1)) == load_sync(1)[:4]
    assert always("wrong_length").wrap(abs)(-3) == 3


def test_hanging_calls_are_cancelled_or_released() -> None:
    """An async one ends when it is cancelled; both kinds when the plan is released."""
    plan = always("hang")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await plan.wrap(load)(1)
        hanging = asyncio.ensure_future(plan.wrap(load)(2))
        await asyncio.sleep(0)
        plan.release()
        with pytest.raises(TimeoutError, match="released"):
            await hanging
        with pytest.raises(TimeoutError, match="released"):  # from now on none hangs
            await plan.wrap(load)(3)

    run(main)
    other = always("hang")
    thread = Started(lambda: other.wrap(load_sync)(1))
    other.release()
    with pytest.raises(TimeoutError, match="released"):
        thread.outcome()


def test_a_wrapped_function_looks_like_its_own() -> None:
    """Its name, whether it is async, and pickle, with the calls counted anew."""
    plan = always("reset", attempts=1)
    flaky = plan.wrap(load_sync)
    with pytest.raises(FaultError) as caught:
        flaky(1)
    assert flaky(1) == load_sync(1)
    again = pickle.loads(pickle.dumps(flaky))
    with pytest.raises(FaultError):
        again(1)
    assert pickle.loads(pickle.dumps(caught.value)).fault == Fault("reset", 1, 1)
    pipeline = Pipeline(range(3)).map(plan.wrap(load)).map(flaky, executor="process")  # type: ignore[call-overload]  # is not run
    assert repr(pipeline) == "Pipeline(range).map(load).map(load_sync)"


@on_both_faces
def test_a_loader_meets_what_was_told(face: Face) -> None:
    """Sync and async functions in a pipeline fail for the keys that the plan names."""
    plan = FaultPlan(11, reset=0.2, throttled=0.1, latency=0.1, wrong_length=0.1, **FAST)
    told = [plan.fault(key) for key in range(60)]
    for fn in (
        plan.wrap(load),
        FaultPlan(11, reset=0.2, throttled=0.1, latency=0.1, wrong_length=0.1, **FAST).wrap(load_sync),
    ):
        with Steps(Pipeline(range(60)).map(fn, concurrency=8), face) as steps:
            outcomes = steps.outcomes()
        for key, fault, outcome in zip(range(60), told, outcomes, strict=True):
            if fault is not None and fault.error is not None:
                assert isinstance(outcome, FaultError)
                assert outcome.fault == fault
            else:
                cut = fault is not None and fault.kind == "wrong_length"
                assert outcome == (load_sync(key)[:4] if cut else load_sync(key))


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_source_follows_a_plan() -> None:
    """It is asked by the position, each iteration is another attempt, and it goes on after an error."""
    plan = FaultPlan(2, reset=0.3, latency=0.2, **FAST)
    source, sync_source = FaultySource(range(40), plan), SyncFaultySource(range(40), FaultPlan(2, reset=0.3, **FAST))

    async def outcomes() -> list[Any]:
        found: list[Any] = []
        iterator = aiter(source)
        while True:
            try:
                found.append(await anext(iterator))
            except StopAsyncIteration:
                return found
            except FaultError as error:
                found.append(error.fault)

    for attempt in (1, 2):
        expected = [
            fault if (fault := plan.fault(position, attempt)) and fault.error else position for position in range(40)
        ]
        assert run(outcomes) == expected
    iterator = iter(sync_source)
    found: list[Any] = []
    while True:
        try:
            found.append(next(iterator))
        except StopIteration:
            break
        except FaultError as error:
            found.append(error.fault)
    assert found == [FaultPlan(2, reset=0.3, **FAST).fault(position) or position for position in range(40)]


# -- the server of the tests -------------------------------------------------------------------------------------------


def ask(server: HttpServer, path: str, timeout: float = 30.0) -> tuple[bytes, str | None]:
    """Body and ETag of a GET."""
    with urlopen(Request(f"{server.url}/{path}", headers={"Connection": "close"}), timeout=timeout) as answer:
        return answer.read(), answer.headers["ETag"]


def served(server: HttpServer, kind: FaultKind, **more: Any) -> HttpServer:
    server.files = {"a": bytes(range(200))}
    server.tells = "etag"
    server.plan = always(kind, attempts=1, **more)
    return server


@pytest.mark.parametrize(("kind", "status"), [("throttled", 429), ("unavailable", 503)])
def test_a_server_refuses(http_server: HttpServer, kind: FaultKind, status: int) -> None:
    """The next attempt is fine."""
    server = served(http_server, kind, retry_after=2.5)
    with pytest.raises(HTTPError) as caught:
        ask(server, "a")
    caught.value.close()
    assert caught.value.code == status
    assert retry_after(caught.value) == (2.5 if kind == "throttled" else None)
    assert ask(server, "a")[0] == server.files["a"]


@pytest.mark.parametrize(("kind", "error"), [("reset", (OSError, HTTPException)), ("truncated", IncompleteRead)])
def test_a_server_breaks_off(http_server: HttpServer, kind: FaultKind, error: Any) -> None:
    server = served(http_server, kind)
    with pytest.raises(error):
        ask(server, "a")
    assert ask(server, "a")[0] == server.files["a"]


def test_a_server_is_slow_or_silent(http_server: HttpServer) -> None:
    """`latency` and `drip` give all of it; what hangs never answers."""
    for kind in ("latency", "drip"):
        assert ask(served(http_server, kind), "a")[0] == http_server.files["a"]
    with pytest.raises((TimeoutError, socket.timeout)):
        ask(served(http_server, "hang"), "a", timeout=0.05)
    assert ask(http_server, "a")[0] == http_server.files["a"]


def test_a_server_gives_another_length_or_version(http_server: HttpServer) -> None:
    server = served(http_server, "wrong_length")
    assert [ask(server, "a")[0] for _ in range(2)] == [server.files["a"][:100], server.files["a"]]
    server = served(http_server, "changed_etag")
    first, second = (ask(server, "a")[1] for _ in range(2))
    assert first != second
