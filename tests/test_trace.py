"""Traces: stages as tracks, chosen samples as slices, waits, retries and second calls; complete JSON at any time."""

import asyncio
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import ref

import pytest

from aioloader import DataLoader, Hedge, Pipeline, Retry
from aioloader.core.entry import Entry
from aioloader.engine.tracing import CalledEntry, TracedEntry
from aioloader.insight.trace_file import FLUSH_EVENTS, TraceFile, Track
from aioloader.stages import batch as batch_module
from aioloader.stages.group import group_entries
from tests._support import Face, Steps, collect, on_both_faces
from tests._work import double


class Events:
    """What is in a trace file."""

    def __init__(self, path: Path) -> None:
        self.all = json.loads(path.read_text(encoding="utf-8"))
        self.tracks = {one["tid"]: one["args"]["name"] for one in self.all if one["name"] == "thread_name"}

    def on(self, track: str, phase: str = "X") -> list[dict[str, Any]]:
        """Slices, or instants, of a track, in all of its lanes."""
        return [
            one
            for one in self.all
            if one["ph"] == phase and self.tracks.get(one["tid"], "").partition(" · ")[0] == track
        ]

    def check(self) -> None:
        """No two slices of one lane overlap: one inside of another would be its callee, others would not be drawn."""
        for tid in self.tracks:
            ends = 0
            for one in sorted((e for e in self.all if e["ph"] == "X" and e["tid"] == tid), key=lambda e: e["ts"]):
                assert round(one["ts"] * 10) >= ends, (self.tracks[tid], one)
                ends = round(one["ts"] * 10) + round(one["dur"] * 10)


async def fetch(key: int) -> int:
    await asyncio.sleep(0)
    return key


def decode(key: int) -> int:
    return key


def traced_threads() -> Pipeline:
    return Pipeline(range(40)).map(decode, concurrency=2).batch(4)


def traced_tasks() -> Pipeline:
    return Pipeline(range(40)).map(fetch, concurrency=8).batch(4)


@on_both_faces
@pytest.mark.parametrize(("make", "stage"), [(traced_threads, "map(decode)"), (traced_tasks, "map(fetch)")])
def test_one_sample_in_n_is_a_slice(face: Face, make: Callable[[], Pipeline], stage: str, tmp_path: Path) -> None:
    loader = make()
    plain = collect(make(), face)
    with loader.trace(tmp_path / "trace.json", every=10):
        assert [b.tolist() for b in collect(loader, face)] == [b.tolist() for b in plain]
    events = Events(tmp_path / "trace.json")
    events.check()
    assert sorted(one["args"]["position"] for one in events.on(stage)) == [0, 10, 20, 30]
    assert {one["name"] for one in events.on(stage)} == {"0", "10", "20", "30"}
    collated = events.on("collate")
    assert len(collated) == 10, "of batches one in n / 10"
    assert {one["name"] for one in collated} == {"4 samples"}
    waits = events.on("consumer")
    assert 0 < len(waits) <= 10
    assert all(one["args"].keys() == {"batch"} and one["args"]["batch"] in range(10) for one in waits)
    assert events.on("consumer", "i")[0]["name"] == "epoch 0 begins"


@on_both_faces
def test_every_sample_through_several_windows(face: Face, tmp_path: Path) -> None:
    """A bound of its own puts a map into another window, which traces the same samples."""
    loader = Pipeline(range(20)).map(fetch, concurrency=4, ahead=6).map(decode).filter(lambda key: key != 3).batch(2)
    with loader.trace(tmp_path / "trace.json", every=1):
        collect(loader, face)
    events = Events(tmp_path / "trace.json")
    events.check()
    assert {one["args"]["position"] for one in events.on("map(fetch)")} == set(range(20))
    (stage,) = {name for name in events.tracks.values() if name.startswith("map(decode) + filter(")}
    assert {one["args"]["position"] for one in events.on(stage)} == set(range(20))


def test_samples_that_travel_to_processes_are_traced_by_their_hops(tmp_path: Path) -> None:
    loader = Pipeline(range(16)).map(double, concurrency=1, executor="process").batch(4)
    with loader, loader.trace(tmp_path / "trace.json", every=1):
        list(loader)
    events = Events(tmp_path / "trace.json")
    events.check()
    assert events.on("map(double)")


class OtherPool(Executor):
    """An executor that is none of threads, as far as anybody can see."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


@on_both_faces
def test_samples_that_travel_to_an_executor_are_traced_by_their_hops(face: Face, tmp_path: Path) -> None:
    with OtherPool() as pool:
        loader = Pipeline(range(16)).map(double, concurrency=1, executor=pool).batch(4)
        with loader.trace(tmp_path / "trace.json", every=1):
            collect(loader, face)
    assert Events(tmp_path / "trace.json").on("map(double)")


class Many:
    """Loads several samples in one call."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, key: int) -> int:
        return key

    def __getitems__(self, keys: list[int]) -> list[int]:
        return keys


@on_both_faces
@pytest.mark.parametrize("workers", [0, 2])
def test_the_drop_in_is_traced_too(face: Face, workers: int, tmp_path: Path) -> None:
    """Without workers, `for` makes samples in `next()`: there are the waits only."""
    loader: DataLoader[Any] = DataLoader(Many(), batch_size=4, num_workers=workers)
    with loader.trace(tmp_path / "trace.json", every=1):
        assert len(collect(loader, face)) == 4
    events = Events(tmp_path / "trace.json")
    assert len(events.on("consumer")) == 4
    made_apart = workers > 0 or face == "async for"  # which has a thread for it
    assert bool([one for one in events.all if one["ph"] == "X" and one not in events.on("consumer")]) is made_apart


@on_both_faces
def test_retries_errors_and_second_calls_are_traced(face: Face, tmp_path: Path) -> None:
    """Of all samples, chosen or not: they are what one looks for."""
    failed: set[int] = set()

    async def request(key: int) -> int:
        if key == 3 and key not in failed:
            failed.add(key)
            raise OSError("busy")
        if key == 5:
            raise KeyError("gone")
        return key

    loader = Pipeline(range(8)).map(request, retry=Retry(3, on=OSError, wait_initial=0.0), concurrency=2).batch(4)
    with loader.trace(tmp_path / "trace.json", every=100), Steps(loader, face) as steps:
        steps.outcomes()
    events = Events(tmp_path / "trace.json")
    (retry,) = events.on("map(request): retries")
    assert retry["name"] == "3 waits for attempt 2"
    assert "busy" in retry["args"]["after"]
    (error,) = events.on("map(request)", "i")
    assert error["name"] == "KeyError in 5"


@on_both_faces
def test_a_second_call_is_a_slice(face: Face, tmp_path: Path) -> None:
    calls: list[int] = []

    async def request(key: int) -> int:
        calls.append(key)
        if calls.count(key) == 1:
            await asyncio.Event().wait()
        return key

    loader = Pipeline(range(1)).map(request, hedge=Hedge(after=0.001, budget=1.0), concurrency=4)
    with loader.trace(tmp_path / "trace.json", every=1):
        assert collect(loader, face) == [0]
    events = Events(tmp_path / "trace.json")
    assert [one["name"] for one in events.on("map(request): retries")] == ["0, second call"]
    assert [one["name"] for one in events.on("map(request)")] == ["0"]


@on_both_faces
def test_each_failed_attempt_of_a_traced_sample_is_a_slice(face: Face, tmp_path: Path) -> None:
    failed: set[int] = set()

    async def request(key: int) -> int:
        if key not in failed:
            failed.add(key)
            raise OSError("busy")
        return key

    loader = Pipeline(range(2)).map(request, retry=Retry(2, on=OSError, wait_initial=0.0), concurrency=1)
    with loader.trace(tmp_path / "trace.json", every=1):
        assert collect(loader, face) == [0, 1]
    assert len(Events(tmp_path / "trace.json").on("map(request)")) == 4


def test_a_trace_is_complete_json_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    loader = traced_threads()
    trace = loader.trace(path, every=1)
    assert Events(path).all[0]["name"] == "process_name"
    list(loader)
    assert len(Events(path).on("map(decode)")) == 40, "an epoch that is over is all there"
    assert not trace.closed
    with Steps(loader, "for") as steps:
        steps.next()
        trace.close()
        Events(path).check()
        steps.rest()
    size = path.stat().st_size
    list(loader)
    assert path.stat().st_size == size, "closed is closed"
    assert repr(trace).endswith("closed>")


def test_what_closes_a_trace(tmp_path: Path) -> None:
    loader = traced_threads()
    first, second = loader.trace(tmp_path / "1.json"), loader.trace(tmp_path / "2.json")
    assert first.closed, "another one has taken its place"
    loader.close()
    assert second.closed

    async def main() -> None:
        async with loader.trace(tmp_path / "3.json") as third:
            async for _ in loader:
                pass
        assert third.closed

    asyncio.run(main())


def test_a_loader_that_is_dropped_drops_its_trace(tmp_path: Path) -> None:
    loader = traced_threads()
    file = ref(loader.trace(tmp_path / "trace.json")._file)
    del loader
    gc.collect()
    assert file() is None
    Events(tmp_path / "trace.json").check()


def test_a_trace_is_bounded(tmp_path: Path) -> None:
    loader = traced_threads()
    trace = loader.trace(tmp_path / "trace.json", every=1, max_bytes=2000)
    with pytest.warns(UserWarning, match="ends here, since it has max_bytes=2000"):
        list(loader)
    assert trace.closed
    Events(tmp_path / "trace.json").check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(loader)) == 10


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        traced_threads().trace(tmp_path / "trace.json", every=0)
    with pytest.raises(FileNotFoundError):
        traced_threads().trace(tmp_path / "missing" / "trace.json")


def test_what_is_not_traced_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a trace, no entry is another one, and no step has a hook."""
    monkeypatch.setattr(TracedEntry, "value", property(lambda _: pytest.fail("a traced entry")))
    loader = traced_threads()
    assert len(list(loader)) == 10
    with Steps(loader, "for") as steps:
        steps.next()
        delivery = steps._iterator._delivery
        assert delivery.run.output.choose is None
        assert all(step.trace is None for step in delivery.run.output._parts)


def test_what_waits_to_be_written_is_bounded_before_the_first_batch(tmp_path: Path) -> None:
    """Calls add what they have without a look at how much there is."""
    most = 0

    async def fetch(key: int) -> int:
        nonlocal most
        most = max(most, trace._file.waiting)
        return key

    loader = Pipeline(range(8 * FLUSH_EVENTS)).map(fetch, concurrency=4).batch(8 * FLUSH_EVENTS)
    with loader.trace(tmp_path / "trace.json", every=1) as trace:
        assert len(list(loader)) == 1
    assert FLUSH_EVENTS // 2 < most < 2 * FLUSH_EVENTS


@on_both_faces
def test_what_was_traced_is_like_all_others_after_its_window(
    face: Face, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nobody after it pays."""
    kinds: list[type] = []

    def seen(entries: list[Entry]) -> Entry:
        kinds.extend(type(entry) for entry in entries)
        return group_entries(entries)

    monkeypatch.setattr(batch_module, "group_entries", seen)
    loader = Pipeline(range(16)).map(fetch).map(fetch).batch(4)
    with loader.trace(tmp_path / "trace.json", every=1):
        collect(loader, face)
    assert kinds == [Entry] * 16
    assert len(Events(tmp_path / "trace.json").on("map(fetch)")) == 32


class AwaitsMany:
    """Awaits several samples in one call, and says itself which one is at hand."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, key: int) -> int:
        return key

    async def __getitems__(self, keys: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return keys


@on_both_faces
def test_calls_for_many_samples_are_traced(face: Face, tmp_path: Path) -> None:
    loader: DataLoader[Any] = DataLoader(AwaitsMany(), batch_size=4, concurrency=8)
    with loader.trace(tmp_path / "trace.json", every=1):
        assert len(collect(loader, face)) == 4
    assert [one["name"] for one in Events(tmp_path / "trace.json").on("dataset.__getitems__")] == ["4 samples"] * 4


def test_slices_that_follow_each_other_at_once_do_not_overlap(tmp_path: Path) -> None:
    """However their times would be rounded."""
    file = TraceFile(tmp_path / "trace.json", "loader")
    track, at = file.track("map(fetch)"), file._began + 0.06e-6
    for key in ["a", 1, "b", 2, "c"]:
        track.sample(key, at, at + 1.06e-6, 0, 1)
        at += 1.06e-6
    file.close()
    events = Events(tmp_path / "trace.json")
    assert len(events.on("map(fetch)")) == 5
    assert len(events.tracks) == 1, "they are in one lane"
    events.check()


def test_a_file_that_is_closed_while_it_is_written_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection may close it, in the thread that writes."""
    file = TraceFile(tmp_path / "trace.json", "loader")
    track, written = file.track("map(fetch)"), Track.written

    def collected(self: Track, start: float) -> list[str]:
        file._finalizer()
        return list(written(self, start))

    track.slice("one", 0.0, 1.0)
    monkeypatch.setattr(Track, "written", collected)
    file.flush()
    assert file.closed
    Events(tmp_path / "trace.json").check()


def test_any_entry_can_become_a_traced_one() -> None:
    """Which is why it may have no attributes of its own."""
    entry = Entry("value", 1, "key", 0)
    entry.since = 0.0
    entry.__class__ = TracedEntry
    entry.since = 1.0
    entry.value = "other"
    assert (entry.value, entry.since, entry.key) == ("other", 1.0, "key")
    entry.__class__ = CalledEntry
    assert entry.value == "other"


def test_names_may_be_any_text(tmp_path: Path) -> None:
    """Those of slices that are written together; the first one is written alone."""
    names = ["first", 'a "quoted" name', "100%d", "%s", "\u00fc\\n\n", "last"]
    file = TraceFile(tmp_path / "trace.json", "loader")
    track = file.track("read")
    for number, name in enumerate([*names, 7, 10**5000]):  # of which no text can be made
        track.sample(name, float(number), number + 0.5, number, 1)
    file.close()
    *slices, huge = Events(tmp_path / "trace.json").on("read")
    assert len(huge["name"]) <= 80
    assert [one["name"] for one in slices] == [*names, "7"]
    assert [(one["dur"], one["args"]) for one in slices] == [(5e5, {"position": number}) for number in range(7)]


def test_secrets_are_not_written(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "trace.json", "https://user:secret@host/")
    track = file.track("map(fetch)")
    track.sample("https://user:secret@host/a.tar", 0.0, 1.0, None, 1)
    track.slice("wait", 0.0, 1.0, after="https://user:secret@host/b.tar")
    file.close()
    assert "secret" not in (tmp_path / "trace.json").read_text()


@pytest.fixture(autouse=True)
def nothing_is_written_late() -> Iterator[None]:
    yield
    gc.collect()
