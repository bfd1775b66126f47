"""`map(executor="process")`: order, errors at their place, deaths, closing, and batches that come back uncopied."""

import asyncio
import contextlib
import gc
import multiprocessing
import operator
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Subset

from aioloader import DataLoader, LoaderClosedError, Pipeline, WorkerDiedError
from aioloader.executors.processes.mapped_files import MappedFiles
from aioloader.executors.processes.wire import decode, encode
from aioloader.executors.processes.worker_thread import WorkerThread
from tests import _work
from tests._support import Face, Steps, collect, explained, notes, on_both_faces, workers

pytestmark = pytest.mark.usefixtures("fork_server")


def pipeline(n: int, fn: Any, concurrency: int = 2) -> Pipeline:
    return Pipeline(range(n)).map(fn, executor="process", concurrency=concurrency)


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    """The process that workers are forked from: made once, for it takes seconds to import torch."""
    resource_tracker.ensure_running()  # of multiprocessing; it stays
    with pipeline(1, _work.double, 1) as keeper:
        assert list(keeper) == [0]
        yield


def servers() -> set[psutil.Process]:
    """The processes that workers are forked from, one for each loader."""
    return {server for parent in psutil.Process().children() for server in parent.children()}


@contextlib.contextmanager
def resumed_after(processes: list[psutil.Process], event: threading.Event) -> Iterator[None]:
    """`processes`, which are stopped meanwhile, go on when `event` is set."""
    found: list[bool] = []

    def resume() -> None:
        found.append(event.wait(10))
        for process in processes:
            process.resume()

    thread = threading.Thread(target=resume)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        assert found == [True]


def segments() -> int:
    """Segments of batches that are mapped here."""
    return Path("/proc/self/maps").read_text().count("memfd:aioloader")


@on_both_faces
def test_samples_come_in_order(face: Face) -> None:
    """As from a plain loop, though workers finish in any order; the next epoch has the same workers."""
    with pipeline(500, _work.double) as loader:
        assert collect(loader, face) == [2 * i for i in range(500)]
        before = workers()
        assert collect(loader, face) == [2 * i for i in range(500)]
        assert workers() == before


def test_functions_run_in_as_many_processes_as_asked_for() -> None:
    """Not in this one."""
    with pipeline(200, lambda sample: (_work.busy_millisecond(sample), os.getpid())[1], 3) as loader:
        pids = set(loader)
    assert len(pids) == 3
    assert os.getpid() not in pids


def test_neighbouring_maps_share_their_workers() -> None:
    """Samples cross once for both."""
    with (
        Pipeline(range(50))
        .map(lambda x: (x, os.getpid()), executor="process", concurrency=2)
        .map(lambda pair: (*pair, os.getpid()), executor="process", concurrency=2)
    ) as loader:
        samples = list(loader)
    assert [x for x, _, _ in samples] == list(range(50))
    assert all(first == second for _, first, second in samples)


def test_closures_lambdas_and_local_classes_travel() -> None:
    """And a local class is the same class when it comes back."""

    class Pair:
        def __init__(self, left: int, right: int) -> None:
            self.both = (left, right)

    offset = 7
    with pipeline(20, lambda x: Pair(x, x + offset)) as loader:
        pairs = list(loader)
    assert [pair.both for pair in pairs] == [(i, i + 7) for i in range(20)]
    assert all(type(pair) is Pair for pair in pairs)


@on_both_faces
def test_an_error_stands_at_its_place(face: Face) -> None:
    """The user's own exception, with the notes of the loader and the worker's traceback; the next sample follows."""
    with pipeline(10, _work.fail_at_five) as loader, Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    error = outcomes[5]
    assert type(error) is ValueError
    assert str(error) == "no 5"
    assert "stage map(fail_at_five), key 5, epoch 0, position 5" in notes(error)
    assert "in worker process" in notes(error)
    assert 'raise ValueError(f"no {sample}")' in notes(error)
    assert outcomes[:5] + outcomes[6:] == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_an_exception_that_plain_pickle_cannot_make_keeps_its_type() -> None:
    with pipeline(1, _work.refuse) as loader, pytest.raises(_work.RefusedError, match="0: refused") as caught:
        list(loader)
    assert caught.value.code == 0


WAYS: dict[str, Callable[[], Any]] = {
    "executor": lambda: pipeline(8, _work.fails_in_many_ways),
    "DataLoader": lambda: DataLoader(
        _work.FailsInManyWays(), batch_size=1, num_workers=2, worker_type="process", collate_fn=operator.itemgetter(0)
    ),
    "in_process": lambda: Pipeline(range(8)).map(_work.fails_in_many_ways, concurrency=2).in_process(),
    "in_process, with processes": lambda: pipeline(8, _work.fails_in_many_ways).in_process(),
}


@on_both_faces
@pytest.mark.parametrize("way", WAYS)
def test_exceptions_that_plain_pickle_does_not_take_arrive_as_they_are(way: str, face: Face) -> None:
    """Each at its place and of its own type; what cannot be pickled stays behind, and a note says so."""
    with WAYS[way]() as loader, Steps(loader, face) as steps:
        check_failures(steps.outcomes())


def test_nor_do_they_break_an_executor_of_the_users() -> None:
    """Where one of them cannot be unpickled, the pool is broken for good."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        loader = Pipeline(range(8)).map(_work.fails_in_many_ways, executor=pool, concurrency=1)
        with loader, Steps(loader, "for") as steps:
            check_failures(steps.outcomes())


def check_failures(outcomes: list[Any]) -> None:
    """They are those of `_work.fails_in_many_ways`."""
    http, busy, group, refused, plain, interrupt, leave, last = outcomes
    assert last == 7
    for error in (http, busy, group, refused, plain, interrupt, leave):
        assert "Traceback (most recent call last):" in notes(error)
        assert "fails_in_many_ways" in notes(error)

    check_http(http)
    assert "left behind, since it cannot be pickled: fp, file" in notes(http)

    check_busy(busy, "file")
    assert "left behind, since it cannot be pickled: lock, log" in notes(busy)

    assert type(group) is _work.GroupOfTwoError
    assert (group.message, group.names) == ("two", ("RefusedError", "ExceptionGroup"))
    left, inner = group.exceptions
    assert isinstance(inner, ExceptionGroup)
    assert type(left) is _work.RefusedError
    check_http(inner.exceptions[0])

    assert type(refused) is _work.RefusedError
    assert refused.code == 3
    assert refused.__suppress_context__
    check_busy(refused.__cause__, "cause")

    assert type(plain) is ValueError
    assert plain.args[0] == "mine"
    assert "lock" in plain.args[1]
    assert plain.__notes__[0] == "a note"

    assert type(interrupt) is KeyboardInterrupt
    assert type(leave) is SystemExit
    assert leave.code == 3


def check_http(error: Any) -> None:
    """It is the one of `_work`; its body stayed with the connection."""
    assert type(error) is HTTPError
    assert (error.code, error.reason, error.url, error.filename) == (503, "Busy", "http://host/key", "http://host/key")
    assert error.headers["Retry-After"] == "3"
    assert str(error) == "HTTP Error 503: Busy"
    assert error.read() == b""
    assert not hasattr(error, "nothing")
    error.close()


def check_busy(error: Any, path: str) -> None:
    """It is the one of `_work`."""
    assert type(error) is _work.BusyError
    assert (error.errno, error.strerror, error.filename, error.tries) == (11, "busy", path, 3)
    assert not hasattr(error, "lock")
    assert not hasattr(error, "log")


def test_an_exception_whose_class_stays_behind_is_told_in_words() -> None:
    """A class that no pickle takes: the words, the notes and the traceback are there all the same."""

    lock = threading.Lock

    def fail(sample: int) -> None:
        class LocalError(ValueError):
            nothing_picklable = lock()

        error = LocalError("mine")
        error.add_note("a note")
        raise error

    with pipeline(1, fail) as loader, pytest.raises(RuntimeError, match="LocalError: mine") as caught:
        list(loader)
    assert "a note" in notes(caught.value)
    assert "raise error" in notes(caught.value)


def test_system_exit_in_a_function_is_an_error_like_any_other() -> None:
    """It reaches the consumer, as from a thread."""

    def leave(sample: int) -> None:
        raise SystemExit(3)

    with pipeline(1, leave) as loader, pytest.raises(SystemExit) as caught:
        list(loader)
    assert caught.value.code == 3


def test_a_result_that_cannot_be_pickled_fails_alone() -> None:
    """At its place, with the way out."""
    with pipeline(4, lambda x: threading.Lock() if x == 2 else x) as loader, Steps(loader, "for") as steps:
        outcomes = steps.outcomes()
    assert outcomes[:2] + outcomes[3:] == [0, 1, 3]
    assert "what map(<lambda>) returned cannot cross" in str(outcomes[2]) or "cannot cross" in str(outcomes[2])


def test_a_sample_that_cannot_be_pickled_fails_alone() -> None:
    source = [1, threading.Lock(), 3]
    with (
        Pipeline(source).map(_work.double, executor="process", concurrency=1) as loader,
        Steps(loader, "for") as steps,
    ):
        outcomes = steps.outcomes()
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [2, 6]
    assert "a sample cannot cross to another process" in str(outcomes[1])


def test_a_function_that_cannot_be_pickled_ends_the_epoch() -> None:
    """With an error that says so, once."""
    lock = threading.Lock()

    with pipeline(10, lambda x: (x, lock)) as loader, Steps(loader, "for") as steps:
        (error,) = steps.outcomes()
    assert "the functions or the dataset cannot cross" in str(error)


class _Unloadable:
    def __call__(self, sample: int) -> int:
        return sample

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_a_function_that_cannot_be_unpickled_ends_the_epoch() -> None:
    with pipeline(10, _Unloadable()) as loader, Steps(loader, "for") as steps:
        (error,) = steps.outcomes()
    assert isinstance(error, ValueError)
    assert "which loads its functions" in notes(error)


@on_both_faces
def test_a_worker_that_is_killed_fails_the_sample_it_held(face: Face) -> None:
    """That one alone, by name; a fresh worker does the others."""
    with pipeline(40, _work.killed_at_five) as loader:
        with Steps(loader, face) as steps:
            outcomes = steps.outcomes()
        assert isinstance(outcomes[5], WorkerDiedError)
        assert "was killed by SIGKILL, with key 5" in str(outcomes[5])
        assert outcomes[:5] + outcomes[6:] == [i for i in range(40) if i != 5]


def test_a_death_in_a_chunk_fails_the_sample_that_was_under_way_alone() -> None:
    """Cheap samples travel in chunks: those before and behind it are done, by others."""
    with pipeline(400, _work.killed_at_every_hundredth) as loader, Steps(loader, "for") as steps:
        outcomes = steps.outcomes()
    failed = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, WorkerDiedError)]
    assert failed == [99, 199, 299, 399]
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [i for i in range(400) if i % 100 != 99]


@pytest.mark.parametrize("in_process", [False, True])
@on_both_faces
def test_batches_tell_how_often_their_samples_were_begun(face: Face, in_process: bool, tmp_path: Path) -> None:
    """Those that died finished, in the chunk of one that killed its worker, are made again: the calls count them.

    The others of a chunk, that were behind it, had not begun.
    """
    path = tmp_path / "calls"
    noted = partial(_work.noted_then_killed_at_every_hundredth, path=str(path))
    found: dict[int, int] = {}
    samples = pipeline(400, noted)
    with samples.in_process() if in_process else samples as loader, Steps(loader.with_info(), face) as steps:
        for outcome in steps.outcomes():
            if not isinstance(outcome, WorkerDiedError):
                sample, info = outcome
                found[sample] = info.attempts
    calls = Counter(map(int, path.read_text().split()))
    assert found == {sample: count for sample, count in calls.items() if sample % 100 != 99}


def test_workers_that_die_again_and_again_end_the_epoch() -> None:
    """And do not keep it going for ever."""
    with pipeline(1000, _work.exits) as loader, Steps(loader, "for") as steps:
        outcomes = steps.outcomes()
    assert 1 <= len(outcomes) <= 10
    assert all(isinstance(outcome, WorkerDiedError) for outcome in outcomes)
    assert "exited with status 3" in str(outcomes[-1])


def test_an_idle_worker_that_is_killed_is_replaced_in_silence() -> None:
    with pipeline(20, _work.double) as loader:
        list(loader)
        mine = workers()
        for pid in mine:
            if psutil.Process(pid).parent() is not None:
                os.kill(pid, signal.SIGKILL)
        assert list(loader) == [2 * i for i in range(20)]


@on_both_faces
def test_break_close_and_a_new_epoch(face: Face) -> None:
    """An epoch that is left in the middle disturbs no later one."""
    with pipeline(400, _work.busy_millisecond) as loader:
        for _ in range(3):
            assert collect(loader, face, limit=3) == [0, 1, 2]
        assert collect(loader, face) == list(range(400))


def test_two_epochs_at_once_share_the_workers() -> None:
    with pipeline(100, _work.double) as loader:
        pairs = list(zip(loader, loader, strict=True))
    assert pairs == [(2 * i, 2 * i) for i in range(100)]


def test_close_leaves_no_process_and_the_loader_stays_usable() -> None:
    before = workers()
    loader = pipeline(20, _work.double)
    for _ in range(2):
        assert len(list(loader)) == 20
        assert workers() - before
        loader.close()
        assert workers() == before


def test_aclose_leaves_no_process() -> None:
    before = workers()

    async def main() -> None:
        async with pipeline(20, _work.double) as loader:
            async for _ in loader:
                break
        assert workers() == before

    asyncio.run(main())


def test_a_loader_that_nobody_holds_ends_its_workers() -> None:
    """Garbage collection is enough."""
    before = workers()
    loader = pipeline(20, _work.double)
    list(loader)
    mine = [psutil.Process(pid) for pid in workers() - before]
    del loader
    gc.collect()
    _, alive = psutil.wait_procs(mine, timeout=10)
    assert not alive


def test_closing_kills_a_worker_whose_function_never_returns() -> None:
    def stuck(sample: int) -> None:
        threading.Event().wait()

    before = workers()
    with pipeline(4, stuck) as loader:
        batches = iter(loader)

        def wait() -> None:
            with contextlib.suppress(LoaderClosedError, StopIteration):
                next(batches)

        first = threading.Thread(target=wait, daemon=True)
        first.start()
        while workers() == before:
            pass
    first.join(10)
    assert workers() == before


def test_closing_waits_for_a_worker_that_it_has_not_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is forked, and the answer that says so has come and is not read yet, when its loader is closed.

    The process that forks is stopped meanwhile, so that nobody else ends that worker.
    """
    others = servers()
    suspended: list[psutil.Process] = []
    closed, read = threading.Event(), threading.Event()
    control_ready = WorkerThread._control_ready

    def closes_before_it_reads(self: WorkerThread, events: int) -> None:
        if not closed.is_set():
            suspended.extend(servers() - others)
            suspended[0].suspend()
            self.close()
            closed.set()
        else:
            control_ready(self, events)
            read.set()

    before = workers()
    with pipeline(4, _work.double) as loader:
        monkeypatch.setattr(WorkerThread, "_control_ready", closes_before_it_reads)
        # The worker may be done with the first sample before it hears of the end.
        with contextlib.suppress(LoaderClosedError), resumed_after(suspended, read):
            assert next(iter(loader)) == 0
    assert workers() == before


def test_a_process_that_was_forked_meanwhile_disturbs_nobody() -> None:
    """It has loaders of its own, and its end is not that of its parent's workers."""
    with pipeline(20, _work.double) as loader:
        batches = iter(loader)
        assert next(batches) == 0
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # the timer of this test is its parent's; a child that hangs would keep pytest's output
            status = 1
            try:
                status = 0 if list(pipeline(5, _work.double)) == [0, 2, 4, 6, 8] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert list(batches) == [2 * i for i in range(1, 20)]


def test_tensors_come_back_in_memory_that_is_used_again() -> None:
    """A consumer that drops its batches has a handful of segments mapped; no view is ever overwritten."""
    with pipeline(100, _work.filled) as loader:
        for _ in range(3):
            for number, batch in enumerate(loader):
                assert batch.shape == (1000, 100)
                assert (batch == number).all()
        assert 1 <= segments() < 40


def test_batches_that_are_kept_keep_their_memory() -> None:
    """All of them, a slice, an array, and after the loader is gone."""
    loader = pipeline(60, _work.filled)
    kept = list(loader)
    slices = [batch[3:5] for batch in loader]
    arrays = [batch.numpy() for batch in loader]
    for _ in loader:  # whatever would be used again is, now
        pass
    loader.close()
    del loader
    gc.collect()
    for number in range(60):
        assert (kept[number] == number).all()
        assert (slices[number] == number).all()
        assert (arrays[number] == number).all()


def test_batches_can_be_written_to_and_take_part_in_autograd() -> None:
    with pipeline(1, _work.filled) as loader:
        (batch,) = loader
    batch += 1
    weight = torch.ones(100, requires_grad=True)
    (batch @ weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((100,), 1000.0))


def test_file_descriptors_do_not_grow_with_batches_that_are_kept() -> None:
    """torch's workers need one for each tensor."""
    with pipeline(200, _work.filled) as loader:
        before = psutil.Process().num_fds()
        kept = list(loader)
        assert psutil.Process().num_fds() < before + 30
        assert len(kept) == 200


def test_stats_know_the_time_in_workers() -> None:
    with pipeline(100, _work.busy_millisecond) as loader:
        list(loader)  # the first epoch waits for its workers
        list(loader)
        stage = loader.stats().stages[-1]
        assert "GIL" not in explained(loader)  # each worker has one
    assert (stage.kind, stage.samples) == ("process", 100)
    assert stage.busy_seconds >= 0.1
    assert stage.cpu_seconds > 0


def test_workers_are_like_this_process() -> None:
    """Directory, environment and default dtype, as they are when the worker is made; one torch thread."""

    def look(sample: int) -> Any:
        return str(Path.cwd()), os.environ.get("AIOLOADER_TEST"), torch.get_default_dtype(), torch.get_num_threads()

    os.environ["AIOLOADER_TEST"] = "here"
    try:
        with pipeline(1, look, 1) as loader:
            assert list(loader) == [(str(Path.cwd()), "here", torch.get_default_dtype(), 1)]
    finally:
        del os.environ["AIOLOADER_TEST"]


def test_repeat_goes_on_with_the_same_workers() -> None:
    with Pipeline(range(10)).map(_work.pid_of, executor="process", concurrency=1).repeat(3) as loader:
        pids = list(loader)
    assert len(pids) == 30
    assert len(set(pids)) == 1


def test_an_async_function_is_refused() -> None:
    async def fetch(key: int) -> int:
        return key

    with pytest.raises(ValueError, match="awaited on the loop; leave it out"):
        Pipeline(range(3)).map(fetch, executor="process")


def test_a_fork_server_that_is_killed_takes_its_workers_and_is_replaced() -> None:
    """No worker outlives it, and the loader goes on. The last test here: a new one takes seconds."""
    with pipeline(20, _work.double) as loader:
        list(loader)
        before = [psutil.Process(pid) for pid in workers()]
        (fork_server,) = {server.parent() for worker in before if (server := worker.parent()) is not None}
        assert fork_server is not None
        fork_server.kill()
        _, alive = psutil.wait_procs(before, timeout=10)
        assert not alive
        assert list(loader) == [2 * i for i in range(20)]


# -- arrays that lie in files ------------------------------------------------------------------------------------------


def mapped(path: Path, mode: Any = "r+") -> Any:
    """Five rows of a file that begins with something else: row i holds 300 times the number i."""
    if not path.exists():
        path.write_bytes(b"header  " + np.repeat(np.arange(5), 300).tobytes())
    return np.memmap(path, np.int64, mode, offset=8, shape=(5, 300))


OVER_FILES: dict[str, Callable[[Any], Any]] = {
    "executor": lambda dataset: pipeline(5, dataset.__getitem__),
    "DataLoader": lambda dataset: DataLoader(
        Subset(dataset, range(5)), batch_size=None, num_workers=2, worker_type="process"
    ),
    "in_process": lambda dataset: Pipeline(dataset).in_process(),
    "in_process, with processes": lambda dataset: pipeline(5, dataset.__getitem__).in_process(),
}


@on_both_faces
@pytest.mark.parametrize("way", OVER_FILES)
def test_a_memory_mapped_array_is_mapped_in_the_workers(way: str, face: Face, tmp_path: Path) -> None:
    """And so is all that shows the same memory: what one of them writes, everybody sees."""
    rows = mapped(tmp_path / "rows")
    with OVER_FILES[way](_work.OverFile(rows)) as loader:
        assert collect(loader, face) == [True] * 5
    assert rows[:, -1].tolist() == [-1] * 5
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]


def there(value: Any) -> tuple[Any, int]:
    """`value` as workers get it, and how many bytes travel."""
    stream, buffers = encode(value, MappedFiles())
    return decode(stream, [bytearray(buffer) for buffer in buffers]), len(stream) + sum(map(len, buffers))


VIEWS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda rows: rows,
    "slice": lambda rows: rows[1:4, 10:20],
    "steps": lambda rows: rows[::2, ::-3],
    "transpose": lambda rows: rows.T,
    "reshape": lambda rows: rows.reshape(10, 150),
    "dtype": lambda rows: rows.view([("left", "<i4"), ("right", "<i4")]),
    "array": lambda rows: np.asarray(rows)[3:],
    "scalar": lambda rows: rows[3, 4, ...],
    "broadcast": lambda rows: np.broadcast_to(rows[2], (7, 300)),
    "tensor": lambda rows: torch.from_numpy(rows),
    "tensor of steps": lambda rows: torch.from_numpy(rows)[1:, ::2].t(),
    "tensor of another dtype": lambda rows: torch.from_numpy(rows).view(torch.bfloat16),
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where memory belongs to")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_memory_mapped_array_travel_as_the_name_of_the_file(view: str, mode: str, tmp_path: Path) -> None:
    value = VIEWS[view](mapped(tmp_path / "rows", mode))
    arrived, size = there(value)
    assert size < 1000
    assert type(arrived) is type(value)
    assert (arrived.dtype, arrived.shape) == (value.dtype, value.shape)
    assert (arrived == value).all()
    if isinstance(value, np.ndarray):
        assert (arrived.strides, arrived.flags.writeable) == (value.strides, value.flags.writeable)
    if isinstance(value, np.memmap):
        assert (arrived.filename, arrived.mode, arrived.offset) == (value.filename, mode, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where memory belongs to")
def test_many_views_of_a_file_map_it_once(tmp_path: Path) -> None:
    """A mapping takes a file descriptor, of which there are few."""
    rows = mapped(tmp_path / "rows", "r")
    arrived, _ = there([rows[i % 5] for i in range(2000)])
    assert len({id(row.base) for row in arrived}) == 1
    assert [int(row[0]) for row in arrived[:6]] == [0, 1, 2, 3, 4, 0]


def test_what_the_file_does_not_show_travels_by_content(tmp_path: Path) -> None:
    """Changes of a private copy, a file that was removed, another one in its place."""
    private = mapped(tmp_path / "private", "c")
    private[2] = 7
    assert there(private)[0][:, 0].tolist() == [0, 1, 7, 3, 4]

    removed = mapped(tmp_path / "removed", "r")
    (tmp_path / "removed").unlink()
    assert there(removed)[0][:, 0].tolist() == [0, 1, 2, 3, 4]

    replaced = mapped(tmp_path / "replaced", "r")
    (tmp_path / "other").write_bytes(bytes((tmp_path / "replaced").stat().st_size))
    (tmp_path / "other").replace(tmp_path / "replaced")
    assert there(replaced)[0][:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where memory belongs to")
def test_a_file_that_is_gone_before_a_worker_starts_is_an_error_that_names_it(tmp_path: Path) -> None:
    rows = mapped(tmp_path / "rows", "r")
    stream, buffers = encode(rows, MappedFiles())
    (tmp_path / "rows").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"rows has been removed or replaced"):
        decode(stream, buffers)
    (tmp_path / "rows").write_bytes((tmp_path / "elsewhere").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"rows has been removed or replaced"):
        decode(stream, buffers)
