"""After every test: nothing is left behind, and torch is as it was.

Threads, child processes and open files are compared before and after. What is on its way out gets until a deadline to
be gone, and is waited for by its own means (`join`, `wait`), so a passing test waits for nothing.

For an async test the tasks are checked while its loop still runs: closing the loop cancels what is left and would hide
it.
"""

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import gettempdir
from types import FrameType
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests._support import until_no_task_left, wait_until

try:
    from pytest_asyncio import fixture as async_fixture
except ImportError:  # `bench/gpu_run.sh` does without it: tests of devices are not async, and ask for no such fixture
    async_fixture = pytest.fixture  # type: ignore[assignment]

if TYPE_CHECKING:
    from tests._ray import RayCluster
    from tests._servers import HttpServer, S3Server

settings.register_profile(
    "deterministic",
    derandomize=True,  # the same examples in every run
    database=None,
    deadline=None,  # a hang fails by `TEST_SECONDS`; a slow machine is no failure
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("deterministic")

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
"""Each of the hundreds of processes that tests start would compile aioloader anew, which takes it a second."""

TEST_SECONDS = 100.0
"""A test that takes longer hangs, and fails with the traceback of where it stands."""

GONE_SECONDS = 10.0
"""How long threads, processes and files that are on their way out may take."""


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave soak tests, those of a Ray cluster or a release and whole trainers out unless `-m` names them."""
    asked = config.getoption("markexpr")
    unasked = [marker for marker in ("soak", "ray", "trainers", "release") if marker not in asked]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in unasked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def warm_up() -> None:
    """Open what a process opens once and keeps, so that no test is blamed for it.

    libuv keeps a pipe for signals from its first loop on; torch makes its pools, and remembers the number of intra-op
    threads, when first asked; the threads of obstore have a queue of events; psutil and the import system keep files of
    their own.
    """

    async def nothing() -> None:
        await asyncio.sleep(0)

    asyncio.run(nothing())
    with contextlib.suppress(ImportError):
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(nothing())
    torch.get_num_threads()
    torch.ones(512, 512) @ torch.ones(512, 512)
    psutil.Process().children(recursive=True)
    _touch_obstore()


def _touch_obstore() -> None:
    """Call obstore, if it is installed."""
    with contextlib.suppress(ImportError):
        import obstore

        obstore.put(obstore.store.MemoryStore(), "key", b"")


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[S3Server]":
    """moto's S3."""
    from tests._servers import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def running_ray_cluster() -> "Iterator[RayCluster]":
    """Part of `ray_cluster`."""
    pytest.importorskip("ray")
    from tests._ray import RayCluster

    cluster = RayCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def ray_cluster(running_ray_cluster: "RayCluster") -> "Iterator[RayCluster]":
    """A Ray cluster of three nodes to which this process is connected; a test may kill what it likes of it."""
    yield running_ray_cluster
    running_ray_cluster.heal()


@pytest.fixture(params=["near", "far"])
def distance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where actors are: on this host, as in truth, or as if on another one."""
    if request.param == "far":
        monkeypatch.setattr("aioloader.executors.ray.same_host.Inbox.of", lambda *_: None)
    return str(request.param)


@pytest.fixture(scope="session")
def running_http_server() -> "Iterator[HttpServer]":
    """Part of `http_server`."""
    from tests._servers import HttpServer

    with HttpServer() as server:
        yield server


@pytest.fixture(scope="module")
def fork_server() -> Iterator[None]:
    """The process that workers are forked from: made once for a file, since it takes seconds to import torch.

    `pytestmark = pytest.mark.usefixtures("fork_server")`
    """
    from multiprocessing import resource_tracker

    from aioloader.executors.processes.fork_server import ForkServer

    resource_tracker.ensure_running()  # of multiprocessing; it stays
    server, _, connection = ForkServer.join()  # as a loader does, but nothing of it is left that has threads
    with connection:
        process = psutil.Process(server._process.pid)
        wait_until(lambda: bool(process.children()))  # else it comes in the middle of a test
        yield
    server.leave()


@pytest.fixture
def http_server(running_http_server: "HttpServer") -> "HttpServer":
    """An HTTP server without files, which answers at once."""
    running_http_server.reset()
    return running_http_server


@pytest.fixture(autouse=True)
def never_hangs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Raise in the main thread when the test takes too long."""
    seconds = 3600.0 if request.node.get_closest_marker("release") else TEST_SECONDS  # installs torch

    def fail(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"the test was not done after {seconds:g} s: it hangs")  # no `except Exception` catches this

    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, never_hangs: None) -> Iterator[None]:
    """No thread, process or open file is left after the test."""
    on_ray = "running_ray_cluster" in request.fixturenames
    threads = set(threading.enumerate())
    children = set(psutil.Process().children(recursive=True))
    gc.collect()  # files that an earlier test's garbage still holds are not this test's
    gc.freeze()  # what is alive by now is not looked through again and again: most of a collection's time
    files = _open_files()
    yield
    gc.collect()
    deadline = time.monotonic() + (3 if on_ray else 1) * GONE_SECONDS  # actors die when their raylet gets to it
    # A thread that was ending during that collection may have kept a loader, which only the next one finds.
    while (running := _ours(threads)) and time.monotonic() < deadline:
        next(iter(running)).join(0.05)
        gc.collect()
    left_threads = sorted(thread.name for thread in _ours(threads))
    left_children = _children_left(children, deadline, on_ray=on_ray)
    # Threads of libraries, not to be joined, let go of theirs a little later: that of watchfiles of what it watches
    # with, those of obstore of futures whose callbacks lead to a store, and these only when it is called again.
    while (left_files := _files_left(files, on_ray=on_ray)) and time.monotonic() < deadline:
        time.sleep(0.001)
        _touch_obstore()
        gc.collect()
    assert not left_threads, f"threads left: {left_threads}"
    assert not left_children, f"child processes left: {left_children}"
    assert not left_files, f"open files left: {left_files}"


@pytest.fixture(autouse=True)
def no_task_left(request: pytest.FixtureRequest, nothing_left: None) -> None:
    """No task is pending after an async test, while its loop still runs."""
    # Asked for here and not by name, as it would start a loop for every sync test too. It is taken down before the
    # loop, and that before `nothing_left`.
    if request.node.get_closest_marker("asyncio") is not None:
        request.getfixturevalue("no_task_left_in_loop")


@async_fixture
async def no_task_left_in_loop() -> AsyncIterator[None]:
    """Part of `no_task_left`: runs in the test's loop."""
    threads = set(threading.enumerate())
    before = asyncio.all_tasks()
    yield
    await until_no_task_left(before)
    # A thread of a loader may need the loop to end, so it cannot just be joined: both get their turns.
    deadline = time.monotonic() + GONE_SECONDS
    while left := [thread for thread in _ours(threads) if thread.name.startswith("aioloader")]:
        assert time.monotonic() < deadline, f"threads left while the loop runs: {[thread.name for thread in left]}"
        left[0].join(0.001)
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def torch_is_as_before() -> Iterator[None]:
    """The settings of torch that the consumer's thread sees are those from before the test."""
    before = _torch_settings()
    yield
    after = _torch_settings()
    assert after == before


def _torch_settings() -> dict[str, object]:
    return {
        "num_threads": torch.get_num_threads(),
        "num_interop_threads": torch.get_num_interop_threads(),
        "grad": torch.is_grad_enabled(),
        "inference_mode": torch.is_inference_mode_enabled(),
        "default_device": torch.get_default_device(),
        "default_dtype": torch.get_default_dtype(),
    }


def _ours(before: set[threading.Thread]) -> list[threading.Thread]:
    """New threads that are somebody's fault: aioloader's own of any kind, and all that would keep Python alive."""
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before
        and thread is not threading.current_thread()
        and (thread.name.startswith("aioloader") or not thread.daemon)
    ]


def _children_left(before: set[psutil.Process], deadline: float, *, on_ray: bool = False) -> list[str]:
    new = [child for child in psutil.Process().children(recursive=True) if child not in before]
    if on_ray:  # its own processes come and go; an actor is somebody's fault
        from tests._ray import is_actor

        new = [child for child in new if is_actor(_command(child))]
    _, alive = psutil.wait_procs(new, timeout=max(0.0, deadline - time.monotonic()))
    left = []
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(child.cmdline())
            # One for the whole process, which multiprocessing starts at need and ends at exit.
            if "multiprocessing.resource_tracker" not in command and "multiprocessing.forkserver" not in command:
                left.append(command)
    return left


def _open_files() -> dict[tuple[int, str], None]:
    """Number and target of each open file descriptor; empty where the system does not tell."""
    directory = Path("/proc/self/fd")
    found: dict[tuple[int, str], None] = {}
    if directory.is_dir():
        for number in os.listdir(directory):  # noqa: PTH208 - a listing holds a descriptor of its own, iterdir longer
            with contextlib.suppress(OSError):  # that descriptor is gone by now
                found[int(number), os.readlink(directory / number)] = None  # noqa: PTH115
    return found


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _files_left(before: dict[tuple[int, str], None], *, on_ray: bool = False) -> list[str]:
    """New descriptors, but for those that a library opens once and keeps for the process.

    Sockets, pipes and `anon_inode:` (epoll, eventfd: what an event loop is made of) are never excused: `warm_up` has
    opened the ones that stay. A *device* is, since drivers and generators of random numbers keep theirs, and so is
    what multiprocessing's resource tracker and pytest's capture hold. Ray closes its sockets to what has died when it
    likes, and keeps its logs.
    """
    its_own = ("socket:", "pipe:", "anon_inode:", f"{gettempdir()}/ray/") if on_ray else ()
    kept = ("/dev/", "/proc/", "/sys/", *its_own)
    new = [(number, target) for number, target in _open_files() if (number, target) not in before]
    return [f"{number} -> {target}" for number, target in new if not target.startswith(kept)]
