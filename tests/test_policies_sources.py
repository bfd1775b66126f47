"""Retries, time limits, second calls and rates of sources that read from stores, over a real wire that fails."""

import asyncio
import contextlib
import gc
import io
import pickle
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError as ThreadCancelledError
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Final

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.exceptions import GenericError, PermissionDeniedError
from obstore.store import LocalStore, MemoryStore

from aioloader import BrokenDataError, DataLoader, Hedge, LoaderClosedError, Pipeline, Rate, Retry
from aioloader.core.policies import Policies
from aioloader.core.source import SourceContext, SourceThreads
from aioloader.sources import Objects, ParquetRows, TarShards
from aioloader.sources.chunks import object_chunks
from aioloader.sources.requests import Requests, store_policies
from aioloader.sources.stores import Version
from aioloader.testing import FaultPlan, Gate
from tests._servers import HttpServer
from tests._support import Face, Started, Steps, collect, explained, notes, on_both_faces, until

SOON: Final[dict[str, Any]] = {"wait_initial": 0.001, "wait_max": 0.01, "jitter": 0.0}
AGAIN: Final = Retry(attempts=20, **SOON)
NEVER: Final = Retry(attempts=3, wait_initial=1000.0, wait_max=1000.0)  # its second attempt
SAMPLES: Final = 24
WORKS: Final = FaultPlan(5, throttled=0.1, unavailable=0.1, reset=0.1, truncated=0.1, retry_after=0.0)


def archive(count: int = SAMPLES, fill: bytes = b"A") -> bytes:
    """Some of its samples in each range of 4096 bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:04}.bin")
            info.size = 1000
            tar.addfile(info, io.BytesIO(fill * 1000))
    return out.getvalue()


def table(rows: int = SAMPLES) -> bytes:
    """A row group, and so a span with a request of its own, for each row."""
    out = io.BytesIO()
    pq.write_table(pa.table({"x": list(range(rows))}), out, row_group_size=1)
    return out.getvalue()


TAR, PARQUET = archive(), table()


@pytest.fixture(autouse=True)
def many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """For little data."""
    defaults = {"start": 0, "needed": 0, "size": 4096, "pace": None, "turn": None}
    monkeypatch.setattr("aioloader.sources.chunks.object_chunks.__kwdefaults__", defaults)
    monkeypatch.setattr("aioloader.sources.parquet_spans.SPAN_BYTES", 1)


Make = Callable[..., Pipeline]
"""Makes a loader of a store, with what is done about its requests."""


def objects(store: Any, **policies: Any) -> Pipeline:
    return Pipeline(Objects(store, [f"o/{number}" for number in range(SAMPLES)], **policies)).map(int)


def members(store: Any, **policies: Any) -> Pipeline:
    return Pipeline(TarShards("a.tar", store=store, **policies)).map(lambda sample: int(sample["__key__"]))


def rows(store: Any, **policies: Any) -> Pipeline:
    return Pipeline(ParquetRows("a.parquet", store=store, **policies)).map(lambda row: row["x"])


def batches(store: Any, **policies: Any) -> Pipeline:
    columns = Pipeline(ParquetRows("a.parquet", store=store, batch_rows=1, **policies))
    return columns.map(lambda batch: int(batch["x"][0]))


ALL: Final = list(range(SAMPLES))
of_each_source = pytest.mark.parametrize("make", [objects, members, rows, batches], ids=lambda make: make.__name__)


@pytest.fixture
def server(http_server: HttpServer) -> HttpServer:
    http_server.files = {"a.tar": TAR, "a.parquet": PARQUET}
    http_server.files |= {f"o/{number}": str(number).encode() for number in range(SAMPLES)}
    http_server.tells = "etag"
    return http_server


def counts(loader: Pipeline) -> tuple[int, int, int]:
    """Retries, timeouts and hedges, of all stages."""
    stages = loader.stats().stages
    return (
        sum(stage.retries for stage in stages),
        sum(stage.timeouts for stage in stages),
        sum(stage.hedges for stage in stages),
    )


# -- retry -------------------------------------------------------------------------------------------------------------


@on_both_faces
@of_each_source
def test_a_wire_that_fails_often_costs_no_sample(server: HttpServer, make: Make, face: Face) -> None:
    """429, 503, resets and bodies that are cut off; each request of an archive or a file is made again on its own."""
    store = server.store()
    assert collect(make(store), face) == ALL
    clean = Counter(server.requests)
    server.requests.clear()
    server.plan = WORKS
    loader = make(store, retry=AGAIN)
    assert collect(loader, face) == ALL
    retries, timeouts, hedges = counts(loader)
    assert retries > 2
    assert (timeouts, hedges) == (0, 0)
    # One more where the client's kept connection was closed as it wrote: it sends the request again by itself.
    assert len(server.requests) >= clean.total() + retries
    assert set(server.requests) == set(clean)
    assert max(stage.samples for stage in loader.stats().stages) == SAMPLES
    del store, loader


@of_each_source
def test_an_answer_that_is_shorter_than_it_says_is_asked_for_again(server: HttpServer, make: Make) -> None:
    """Where that can be told: of a range."""
    if make is objects:
        make = ranges
    server.plan = FaultPlan(1, wrong_length=0.3)
    store = server.store()
    loader = make(store, retry=AGAIN)
    assert list(loader) == ALL
    assert counts(loader)[0] > 2
    del store, loader


def ranges(store: Any, **policies: Any) -> Pipeline:
    keys = [f"o/{number}" for number in range(SAMPLES)]
    parts = {key: (0, len(key) - 2) for key in keys}
    return Pipeline(Objects(store, keys, ranges=parts, **policies)).map(int)


@on_both_faces
@of_each_source
def test_after_the_last_attempt_the_error_of_the_store_has_a_note(server: HttpServer, make: Make, face: Face) -> None:
    """At its place; the store itself has made none."""
    for name in ("a.tar", "a.parquet", "o/0"):
        server.faults[name] = repeat(503)
    store = server.store()
    loader = make(store, retry=Retry(attempts=3, **SOON))
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert isinstance(found[0], GenericError)
    assert "503" in str(found[0])
    assert "aioloader: attempt 3 of 3 failed, " in notes(found[0])
    assert found[1:] == (ALL[1:] if make is objects else [])
    failing = {"a.tar", "a.parquet", "o/0"}
    # One more where the client's kept connection was closed as it wrote, as above.
    assert 3 <= len([path for _, path, _ in server.requests if path in failing]) <= 4
    assert counts(loader)[0] == 2
    del store, loader, found


@of_each_source
def test_one_attempt_is_one_request(server: HttpServer, make: Make) -> None:
    """Also of the store."""
    for name in ("a.tar", "a.parquet", "o/0"):
        server.faults[name] = iter([503])
    store = server.store()
    with Steps(make(store, retry=1), "for") as steps:
        assert isinstance(steps.outcomes()[0], GenericError)
    del store


@on_both_faces
@pytest.mark.parametrize(("status", "kind"), [(404, FileNotFoundError), (403, PermissionDeniedError)])
@of_each_source
def test_what_another_attempt_cannot_change_is_final(
    server: HttpServer, make: Make, status: int, kind: type[Exception], face: Face
) -> None:
    for name in ("a.tar", "a.parquet", "o/0"):
        server.faults[name] = repeat(status)
    store = server.store()
    loader = make(store, retry=AGAIN)
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert isinstance(found[0], kind)
    assert "attempt" not in notes(found[0])
    assert counts(loader)[0] == 0
    del store, loader, found


@of_each_source
def test_types_that_are_named_are_obeyed(server: HttpServer, make: Make) -> None:
    """What is missing may come, where somebody says so; and a 503 is final then."""
    store = server.store()
    for name in ("a.tar", "a.parquet", "o/0"):
        server.faults[name] = iter([404, 404])
    assert list(make(store, retry=Retry(attempts=3, on=FileNotFoundError, **SOON))) == ALL
    for name in ("a.tar", "a.parquet", "o/0"):
        server.faults[name] = iter([404, 503])
    with Steps(make(store, retry=Retry(attempts=3, on=FileNotFoundError, **SOON)), "for") as steps:
        error = steps.outcomes()[0]
    assert isinstance(error, GenericError)
    assert "aioloader: attempt 2 of 3 failed, and this is not retried" in notes(error)
    del store, error


@of_each_source
def test_a_budget_ends_an_outage(server: HttpServer, make: Make) -> None:
    for name in server.files:
        server.faults[name] = repeat(503)
    store = server.store()
    loader = make(store, retry=Retry(attempts=30, budget=0.01, **SOON))
    with Steps(loader, "for") as steps:
        error = steps.outcomes()[0]
    assert "retries are 1% of all calls at most (budget)" in notes(error)
    assert counts(loader)[0] == 10
    del store, loader, error


@on_both_faces
def test_an_attempt_never_brings_another_version(server: HttpServer, face: Face) -> None:
    """The second attempt for a range finds an archive that was written anew."""
    for tells in ("etag", "time", "weak etag"):
        server.reset()
        server.tells = tells
        server.files = {"a.tar": archive(fill=b"B")}
        server.versions = {"a.tar": chain([TAR] * 3, repeat(archive(fill=b"B")))}
        server.faults = {"a.tar": chain([None, None, "truncated"], repeat(None))}
        store = server.store()
        with Steps(Pipeline(TarShards("a.tar", store=store, retry=AGAIN)), face) as steps:
            found = steps.outcomes()
        assert isinstance(found[-1], BrokenDataError)
        assert "was rewritten while it was read" in str(found[-1])
        assert {sample["bin"] for sample in found[:-1]} == {b"A" * 1000}
        del store, found


@on_both_faces
@pytest.mark.parametrize(
    "policies", [{"retry": Retry(attempts=3, on=BrokenDataError, **SOON)}, {"hedge": Hedge(after=0.0, budget=1.0)}]
)
def test_a_resume_into_another_version_is_refused_by_each_attempt(
    server: HttpServer, policies: dict[str, Any], face: Face
) -> None:
    """A later one must not be taken for right because it is as wrong as the first."""
    store = server.store()
    loader = members(store, **policies)
    with Steps(loader, face) as steps:
        assert steps.rest(10) == ALL[:10]
        state = loader.state_dict()
    del loader
    changed = bytearray(TAR)
    changed[-1] = 1  # nothing that a mark in the state would tell
    server.files["a.tar"] = bytes(changed)
    resumed = members(store, **policies)
    resumed.load_state_dict(state)
    with Steps(resumed, face) as steps:
        (error,) = steps.outcomes()
    assert isinstance(error, BrokenDataError)
    assert "was rewritten" in str(error)
    del store, resumed, error


@pytest.mark.asyncio
async def test_an_error_is_let_go_of_with_its_traceback() -> None:
    """Without the garbage collector: it may keep connections."""

    class MarkedError(Exception):
        pass

    async def request() -> None:
        raise MarkedError

    gc.disable()
    try:
        for policies in ({"timeout": 100.0}, {"hedge": Hedge(after=0.0, budget=1.0)}, {"retry": 1, "rate": Rate(1e6)}):
            made = requests(Context(), **policies)
            with contextlib.suppress(MarkedError):
                await made.run(request)

            def call(made: Requests = made) -> None:
                with contextlib.suppress(MarkedError):
                    made.call(request)

            thread = Started(call)
            await until(lambda thread=thread: not thread.is_alive())  # type: ignore[misc]
            thread.outcome()
            await asyncio.sleep(0)
        assert [each for each in gc.get_objects() if type(each) is MarkedError] == []
    finally:
        gc.enable()


@on_both_faces
def test_a_server_without_ranges_is_asked_again_and_nothing_comes_twice(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, face: Face
) -> None:
    """The new answer begins at the first byte, and what has been handed on is passed over."""
    monkeypatch.setattr("aioloader.sources.chunks.READ_BYTES", 1024)
    server.ranges = False
    server.files["a.tar"] = TAR
    server.faults["a.tar"] = chain([None, 503, "truncated", "reset", "truncated"], repeat(None))
    store = server.store()
    loader = members(store, retry=AGAIN)
    assert collect(loader, face) == ALL
    assert counts(loader)[0] == 4
    assert len(server.requests) == 6
    del store, loader


@pytest.mark.asyncio
async def test_an_object_that_ends_where_reading_begins_is_not_asked_again(server: HttpServer) -> None:
    """The range is past its end (416), which is no failure."""
    store, context = server.store(), Context()
    made = requests(context, retry=NEVER)
    end = len(TAR)
    chunks = object_chunks(store, "a.tar", Version(store, "a.tar"), made, start=end, needed=end)
    assert [piece async for piece in chunks] == []
    assert context.counted == {}
    assert [method for method, _, _ in server.requests] == ["GET", "HEAD"]
    del store, chunks


@on_both_faces
def test_the_drop_in_takes_over_what_the_objects_say(server: HttpServer, face: Face) -> None:
    for number in ALL:
        server.faults[f"o/{number}"] = iter([503])
    store = server.store()
    with pytest.raises(ValueError, match="pass them to Objects"):
        DataLoader(Objects(store, ["o/1"]), retry=3)
    loader = DataLoader(Objects(store, [f"o/{number}" for number in ALL], retry=AGAIN), batch_size=8)
    assert [int(sample) for batch in collect(loader, face) for sample in batch] == ALL
    assert sum(stage.retries for stage in loader.stats().stages) == SAMPLES
    del store, loader


# -- listings ----------------------------------------------------------------------------------------------------------


class FailingList(MemoryStore):
    """Each listing gives two pages of it, then fails."""

    failures: int
    offsets: list[Any]

    def list(self, prefix: Any = None, *, offset: Any = None, chunk_size: int = 50, **_: Any) -> Any:
        self.offsets.append(offset)
        return self._pages(super().list(prefix, offset=offset, chunk_size=10))

    async def _pages(self, pages: Any) -> Any:
        number = 0
        async for page in pages:
            number += 1
            if number > 2 and self.failures:
                self.failures -= 1
                raise ConnectionResetError("in the middle of a listing")
            yield page


def listed(failures: int) -> FailingList:
    store = FailingList()
    store.failures, store.offsets = failures, []
    for number in range(60):
        obstore.put(store, f"{number:02}", b"x")
    return store


@on_both_faces
@pytest.mark.parametrize("in_order", [True, False])
def test_a_listing_goes_on_after_its_last_page(face: Face, in_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or from its start, where the store lists in no order; no key comes twice."""
    monkeypatch.setattr("aioloader.sources.listing._lists_in_order", lambda _: in_order)
    store = listed(2)
    loader = Pipeline(Objects(store, prefix="", with_key=True, retry=AGAIN)).map(lambda sample: sample[0])
    assert collect(loader, face) == [f"{number:02}" for number in range(60)]
    assert store.offsets == ([None, "19", "39"] if in_order else [None, None, None])
    source = loader.stats().stages[0]
    assert (source.name, source.retries, source.samples) == ("Objects", 2, 60)


@on_both_faces
def test_a_listing_that_fails_for_good_is_an_error_after_its_keys(face: Face) -> None:
    store = listed(9)
    loader = Pipeline(Objects(store, prefix="", retry=Retry(attempts=3, on=ValueError)))
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert found[:-1] == [b"x"] * 20
    assert isinstance(found[-1], ConnectionResetError)


# -- timeout -----------------------------------------------------------------------------------------------------------


@on_both_faces
@of_each_source
def test_requests_that_hang_are_given_up_and_made_again(server: HttpServer, make: Make, face: Face) -> None:
    server.plan = FaultPlan(2, hang=0.15)
    store = server.store()
    loader = make(store, retry=AGAIN, timeout=0.25)
    assert collect(loader, face) == ALL
    retries, timeouts, _ = counts(loader)
    assert retries == timeouts > 0
    del store, loader


@on_both_faces
@of_each_source
def test_a_time_limit_alone_is_an_error_in_plain_words(server: HttpServer, make: Make, face: Face) -> None:
    server.gate = gate = Gate()
    store = server.store()
    loader = make(store, timeout=0.1)
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert [type(outcome) for outcome in found] == [TimeoutError] * (SAMPLES if make is objects else 1)
    assert "timeout=0.1 s" in str(found[0])
    assert counts(loader) == (0, len(found), 0)
    gate.open_all()
    del store, loader, found


# -- hedge and rate ----------------------------------------------------------------------------------------------------


@on_both_faces
@of_each_source
def test_a_second_request_wins_over_one_that_hangs(server: HttpServer, make: Make, face: Face) -> None:
    server.plan = FaultPlan(0, hang=1.0, attempts=1)  # the first one for each path
    store = server.store()
    loader = make(store, hedge=Hedge(after=0.1, budget=1.0))
    assert collect(loader, face) == ALL
    retries, timeouts, hedges = counts(loader)
    assert (retries, timeouts) == (0, 0)
    assert hedges > 0
    del store, loader


class CountingRate(Rate):
    """Counts who takes a turn."""

    taken = 0

    def _took(self, now: float, count: int, *, waits: bool = False) -> None:
        super()._took(now, count, waits=waits)
        self.taken += count

    def give_back(self, count: int = 1) -> None:
        self.taken -= count
        super().give_back(count)


@on_both_faces
@of_each_source
def test_each_attempt_takes_a_turn_at_the_rate(server: HttpServer, make: Make, face: Face) -> None:
    server.plan = WORKS
    rate = CountingRate(500.0, 1)
    store = server.store()
    assert collect(make(store, retry=AGAIN, rate=rate), face) == ALL
    assert rate.taken == len([1 for method, _, _ in server.requests])
    del store


@on_both_faces
def test_a_server_without_ranges_takes_a_turn_for_each_answer(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, face: Face
) -> None:
    """And none for each piece of it."""
    monkeypatch.setattr("aioloader.sources.chunks.READ_BYTES", 1024)
    server.ranges = False
    rate = CountingRate(500.0)
    store = server.store()
    assert collect(members(store, rate=rate), face) == ALL
    assert rate.taken == len(server.requests) == 2
    del store


# -- resume, close and processes ---------------------------------------------------------------------------------------


@on_both_faces
@of_each_source
@pytest.mark.parametrize("first", [{}, {"retry": AGAIN}])
def test_a_state_fits_with_and_without_retries(
    server: HttpServer, make: Make, face: Face, first: dict[str, Any]
) -> None:
    """Also one that was made while requests failed."""
    second: dict[str, Any] = {} if first else {"retry": AGAIN}
    store = server.store()
    loader = make(store, **first)
    server.plan = WORKS if first else None
    with Steps(loader, face) as steps:
        assert steps.rest(10) == ALL[:10]
        state = pickle.loads(pickle.dumps(loader.state_dict()))
    del loader
    server.plan = WORKS if second else None
    resumed = make(store, **second)
    resumed.load_state_dict(state)
    assert collect(resumed, face) == ALL[10:]
    del store, resumed


@on_both_faces
@of_each_source
@pytest.mark.parametrize("waits_for", ["its next attempt", "an answer", "the rate", "a hedge", "nothing of ours"])
def test_closing_while_a_request_waits(server: HttpServer, make: Make, face: Face, waits_for: str) -> None:
    """Nobody waits to the end, and the fixtures find nothing that is left."""
    rate = CountingRate(0.001, 1)
    all_policies: dict[str, dict[str, Any]] = {
        "its next attempt": {"retry": NEVER},
        "an answer": {"timeout": 1000.0},
        "the rate": {"rate": rate},
        "a hedge": {"hedge": Hedge(after=0.0, budget=1.0)},
        "nothing of ours": {},
    }
    policies = all_policies[waits_for]
    server.gate = gate = Gate()
    store = server.store()
    if waits_for == "its next attempt":
        gate.open_all()
        server.faults |= {name: repeat(503) for name in server.files}
    if waits_for == "the rate":
        rate.take()
    loader = make(store, **policies)
    with Steps(loader, face) as steps:
        asked = steps.ask()
        if waits_for in ("an answer", "a hedge", "nothing of ours"):
            steps.until_arrived(gate, 2 if waits_for == "a hedge" else 1)
        else:

            def waits(loader: Pipeline = loader) -> Coroutine[Any, Any, None]:
                return until(lambda: rate.taken > 1 if waits_for == "the rate" else counts(loader)[0] > 0)

            asyncio.run(waits()) if face == "for" else steps.do(waits)
            told = next(stage.policies for stage in loader.stats().stages if stage.policies is not None)
            if waits_for == "the rate":
                assert told.waiting_for_rate > 0
                assert "for the rate of " in explained(loader)
            else:
                assert (told.waiting_for_attempt > 0, told.retried_after) == (True, "GenericError")
                assert " for its next attempt in " in (said := explained(loader)) or " wait for their next" in said
        loader.close() if face == "for" else steps.do(loader.aclose)
        with pytest.raises(LoaderClosedError):
            asked()
    gate.open_all()
    del store, loader


def test_a_source_with_policies_travels_to_a_process(server: HttpServer) -> None:
    source = TarShards(f"{server.url}/a.tar", retry=AGAIN, timeout=30, hedge=Hedge())
    server.faults["a.tar"] = iter([503])
    with Pipeline(source).in_process() as loader:
        assert len(list(loader)) == SAMPLES
        assert counts(loader)[0] == 1
    del source


@pytest.mark.parametrize("make", [objects, members, rows])
def test_a_rate_does_not_travel(make: Make) -> None:
    """Another process would count for itself."""
    with pytest.raises(ValueError, match=r"cannot share its Rate\(5\) with this one; put that stage after in_process"):
        make(MemoryStore(), rate=Rate(5)).in_process()
    make(MemoryStore(), timeout=5.0).in_process()


def test_a_cache_on_disk_is_the_same_with_and_without(server: HttpServer, tmp_path: Path) -> None:
    url = f"{server.url}/a.tar"
    for policies in ({}, {"retry": 3, "timeout": 5.0}, {"hedge": Hedge()}):
        loader = Pipeline(TarShards(url, **policies)).cache(disk=tmp_path / "cache")
        assert len(list(loader)) == SAMPLES
        loader.close()
    (stage,) = [stage for stage in loader.stats().stages if stage.hits]
    assert stage.hits == SAMPLES
    del loader


# -- one request -------------------------------------------------------------------------------------------------------


class Context(SourceContext):
    """What requests use of a reader's context."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.counted: Counter[str] = Counter()
        self.tasks: list[asyncio.Task[None]] = []

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    @property
    def epoch(self) -> int:
        return 0

    @property
    def handed_out(self) -> Any:
        return None

    def shared(self, owner: object, make: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def threads(self, limit: int) -> SourceThreads:
        raise NotImplementedError

    def spawn(self, fn: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        self.tasks.append(asyncio.get_running_loop().create_task(fn()))
        return self.tasks[-1]

    def count_dropped(self, count: int) -> None:
        raise NotImplementedError

    def count_requests(self, **counts: int) -> None:
        self.counted.update(counts)


def requests(context: Context, **policies: Any) -> Requests:
    made = store_policies(*map(policies.get, ("retry", "timeout", "hedge", "rate")))
    assert isinstance(made, Policies)
    return Requests(made, "Test", context)


@pytest.mark.asyncio
async def test_the_first_attempt_runs_in_the_task_that_asks() -> None:
    context = Context()

    async def request() -> Any:
        return asyncio.current_task()

    assert await requests(context, retry=3).run(request) is asyncio.current_task()
    assert not context.tasks


@pytest.mark.asyncio
async def test_of_two_calls_the_loser_is_cancelled_and_awaited() -> None:
    """While it cleans up, the result waits."""
    context, gate = Context(), Gate()
    seen: list[str] = []

    async def request() -> int:
        number = len(gate.arrived)
        try:
            await gate.passing(number)
        finally:
            await asyncio.sleep(0)
            seen.append(f"{number} is over")
        return number

    asking = asyncio.ensure_future(requests(context, hedge=Hedge(after=0.0, budget=1.0)).run(request))
    await gate.until_arrived(2)
    gate.open(1)
    assert await asking == 1
    assert sorted(seen) == ["0 is over", "1 is over"]
    assert context.counted == {"hedges": 1}
    assert all(task.done() for task in context.tasks)


@pytest.mark.parametrize("first_to_fail", [0, 1])
@pytest.mark.asyncio
async def test_a_call_that_fails_does_not_win_and_of_two_errors_the_first_calls_counts(first_to_fail: int) -> None:
    for both in (False, True):
        context, gate = Context(), Gate()

        async def request(gate: Gate = gate, both: bool = both) -> int:
            number = len(gate.arrived)
            await gate.passing(number)
            if both or number == first_to_fail:
                raise ConnectionError(str(number))
            return number

        asking = asyncio.ensure_future(requests(context, hedge=Hedge(after=0.0, budget=1.0)).run(request))
        await gate.until_arrived(2)
        gate.open(first_to_fail)
        await until(lambda context=context: any(task.done() for task in context.tasks))  # type: ignore[misc]
        gate.open_all()
        if both:
            with pytest.raises(ConnectionError, match="0"):
                await asking
        else:
            assert await asking == 1 - first_to_fail


@pytest.mark.asyncio
async def test_a_hedge_has_a_budget_and_waits_for_no_turn() -> None:
    context = Context()

    async def request() -> None:
        await asyncio.sleep(0.01)

    none = requests(context, hedge=Hedge(after=0.0, budget=0.0))
    rate = CountingRate(0.001, 1)
    rated = requests(context, hedge=Hedge(after=0.0, budget=1.0), rate=rate)
    await none.run(request)
    await rated.run(request)
    assert context.counted == {}
    assert rate.taken == 1


@pytest.mark.asyncio
async def test_a_percentile_is_known_after_twenty_requests() -> None:
    context, gate = Context(), Gate()
    made = requests(context, hedge=Hedge(after="p90", budget=1.0))
    for _ in range(20):
        await made.run(lambda: asyncio.sleep(0))
    assert context.counted == {}
    asking = asyncio.ensure_future(made.run(gate.passing))
    await gate.until_arrived(2)
    gate.open_all()
    await asking
    assert context.counted == {"hedges": 1}


@pytest.mark.asyncio
async def test_a_turn_that_is_not_taken_goes_back() -> None:
    rate = CountingRate(0.001, 1)
    rate.take()
    made = requests(Context(), rate=rate)
    asking = asyncio.ensure_future(made.run(lambda: asyncio.sleep(0)))
    await until(lambda: rate.taken == 2)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert rate.taken == 1


@pytest.mark.asyncio
async def test_a_loop_that_stands_still_makes_no_request_late() -> None:
    """What was answered meanwhile counts, though the timer rings first."""
    context, answered = Context(), threading.Event()
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    async def request() -> str:
        return await answer

    def reply() -> None:
        loop.call_soon_threadsafe(answer.set_result, "there")
        answered.set()

    asking = asyncio.ensure_future(requests(context, timeout=0.05).run(request))
    await until(lambda: bool(context.tasks))
    await asyncio.sleep(0)
    thread = Started(reply)  # and now the consumer trains on the loop
    answered.wait()
    threading.Event().wait(0.1)
    assert await asking == "there"
    assert context.counted == {}
    thread.outcome()


@pytest.mark.asyncio
async def test_a_thread_is_refused_once_the_reader_is_closed() -> None:
    """Those that wait are let go, whether their request has begun or not; those that come later do not wait."""
    context, gate = Context(), Gate()
    made = requests(context, retry=3)
    waiting = Started(lambda: made.call(gate.passing))
    await gate.until_arrived(1)
    about_to = Started(lambda: made.call(gate.passing))
    while len(made._threads_wait) < 2:  # it is on its way to the loop, which makes no turn until it is closed
        pass
    made.close()
    late = Started(lambda: made.call(gate.passing))
    for thread in (waiting, about_to, late):
        with pytest.raises(ThreadCancelledError):
            thread.outcome()
    gate.open_all()
    await asyncio.wait(context.tasks)
    assert len(gate.arrived) == 1


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [objects, members, rows])
def test_only_one_of_the_two_retries(server: HttpServer, make: Make, tmp_path: Path) -> None:
    store = server.store()
    with pytest.raises(ValueError, match="would both retry, attempts times attempts; pass one of them"):
        make(store, retry=3, retry_config={"max_retries": 2})
    make(store, timeout=3, retry_config={"max_retries": 2})
    for plain in (MemoryStore(), LocalStore(tmp_path)):
        make(plain, retry=3, timeout=1.0)  # they make no retries
    with pytest.raises(ValueError, match="for a store that is reached over a network, got MemoryStore"):
        make(MemoryStore(), retry_config={"max_retries": 2})
    with pytest.raises(ValueError, match="retry must be at least 1, got 0"):
        make(store, retry=0)
    with pytest.raises(ValueError, match="timeout must be"):
        make(store, timeout=-1)
    with pytest.raises(TypeError, match=r"hedge must be a Hedge, got 0\.5"):
        make(store, hedge=0.5)
    with pytest.raises(TypeError, match="rate must be a Rate, got 100"):
        make(store, rate=100)
    del store


def test_the_stores_own_client_options_stay(server: HttpServer) -> None:
    store = server.store(client_options={"allow_http": True, "timeout": "7s"})
    source = Objects(store, ["o/0"], retry=3)
    assert source._store.retry_config["max_retries"] == 0
    assert source._store.client_options["timeout"] == "7s"
    assert list(Pipeline(TarShards(f"{server.url}/a.tar", retry=3))) != []
    del store, source


@pytest.mark.parametrize("name", ["retry", "timeout", "hedge", "rate"])
def test_files_on_a_disk_take_none_of_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.tar").write_bytes(TAR)
    (tmp_path / "a.parquet").write_bytes(PARQUET)
    value: Any = {"retry": 3, "timeout": 1.0, "hedge": Hedge(), "rate": Rate(5)}[name]
    with pytest.raises(ValueError, match=f"TarShards takes {name} for a store, got paths; leave it out"):
        TarShards(tmp_path / "a.tar", **{name: value})
    with pytest.raises(ValueError, match=f"ParquetRows takes {name} for a store, got paths; leave it out"):
        ParquetRows(tmp_path / "a.parquet", **{name: value})
