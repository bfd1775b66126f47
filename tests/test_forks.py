"""`os.fork` while a loader is at work: the child begins anew, and nothing of the parent is disturbed by it."""

import os
import textwrap
from contextlib import ExitStack

import pytest

from tests._support import Child

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PREAMBLE = """
import asyncio, os, signal, sys, tempfile, threading, traceback, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # that is the point
import torch
from aioloader import DataLoader, Pipeline

async def fetch(key):
    await asyncio.sleep(0)
    return key

class Items:
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return index

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(40))

def batches():
    return [list(range(at, at + 4)) for at in range(0, 40, 4)]

def lists(epoch):
    return [batch.tolist() for batch in epoch]

async def async_epoch(loader):
    return [batch.tolist() async for batch in loader]

def in_child(work, leave=os._exit):
    # Exit status of a child that does `work`.
    child = os.fork()
    if child == 0:
        signal.alarm(25)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        leave(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def refused(step):
    try:
        step()
    except RuntimeError as error:
        assert "before a fork and belongs to the parent process" in str(error), error
    else:
        raise AssertionError("it was not refused")
"""

LOADERS = {
    "async map": "Pipeline(range(40)).map(fetch).batch(4)",
    "map": "Pipeline(range(40)).map(int).batch(4)",
    "cache": "Pipeline(range(40)).map(fetch).cache(memory_bytes=100_000).batch(4)",
    "disk": "Pipeline(range(40)).map(int).cache(disk=tempfile.mkdtemp() + '/cache').batch(4)",
    "threads": "DataLoader(Items(), batch_size=4, num_workers=2)",
    "stream": "DataLoader(Stream(), batch_size=4, num_workers=2)",
    "inline": "DataLoader(Items(), batch_size=4)",
}
WITH_PROCESSES = {
    "process": "Pipeline(range(40)).map(int, executor='process', concurrency=2).batch(4)",
    "own process": "Pipeline(range(40)).map(fetch).batch(4).in_process()",
    "persistent": "DataLoader(Items(), batch_size=4, num_workers=2, worker_type='process', persistent_workers=True)",
    "workers": "DataLoader(Items(), batch_size=4, num_workers=2, worker_type='process')",
}

BY_FOR = """
loader = LOADER
with loader:
    assert lists(loader) == batches()
    old, unbegun = iter(loader), iter(loader)
    first = next(old)

    def work():
        if INLINE:
            assert lists(old) == batches()[1:]  # it has no threads, and is a copy of its own
        else:
            refused(lambda: next(old))
        old.close()
        assert lists(loader) == batches()
        assert lists(unbegun) == batches()
        half = iter(loader)
        next(half)
        loader.close()
        assert lists(loader) == batches()
        assert asyncio.run(async_epoch(loader)) == batches()
        loader.__exit__(None, None, None)

    assert in_child(work) == 0
    assert [first.tolist(), *lists(old)] == batches()
    assert lists(loader) == batches()
"""

BY_ASYNC_FOR = """
loader = LOADER

async def main():
    async with loader:
        old = aiter(loader)
        first = await anext(old)
        other = iter(loader) if not INLINE else None
        if other is not None:
            next(other)

        def work():
            refused(lambda: old.__anext__().send(None))
            assert lists(loader) == batches()
            assert asyncio.run(async_epoch(loader)) == batches()
            loader.close()

        status = in_child(work)
        assert status == 0, status
        if other is not None:
            assert len(list(other)) == len(batches()) - 1
        rest = [batch.tolist() async for batch in old]
        assert [first.tolist(), *rest] == batches()

asyncio.run(main())
"""


BRIEFLY = """
loader = LOADER
with loader:
    assert lists(loader) == batches()
    old = iter(loader)
    first = next(old)

    def work():
        refused(lambda: next(old))
        old.close()
        assert lists(loader) == batches()
        loader.__exit__(None, None, None)

    assert in_child(work) == 0
    assert [first.tolist(), *lists(old)] == batches()
    assert lists(loader) == batches()
"""


def run_all(scripts: list[str]) -> None:
    """Side by side: most of their time goes into importing torch."""
    with ExitStack() as stack:
        for child in [stack.enter_context(Child(PREAMBLE + script)) for script in scripts]:
            status, _, errors = child.finish()
            assert (status, errors) == (0, "")


@pytest.mark.parametrize("script", [BY_FOR, BY_ASYNC_FOR], ids=["for", "async for"])
def test_a_child_begins_anew_and_the_parent_goes_on(script: str) -> None:
    """In the middle of an epoch, within `with`: a new epoch works in the child, an iterator of its parent says no."""
    once = "def check(loader, inline):" + textwrap.indent(script.replace("loader = LOADER\n", ""), "    ")
    checks = [f"check({make}, {name == 'inline'})" for name, make in LOADERS.items()]
    run_all([once.replace("INLINE", "inline") + "\n" + "\n".join(checks)])


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_a_child_begins_anew_with_processes_of_its_own(name: str) -> None:
    """The parent's serve the parent, and are left alone."""
    run_all([BRIEFLY.replace("LOADER", WITH_PROCESSES[name])])


def test_a_child_may_be_forked_by_any_thread() -> None:
    """As servers do: that thread is the main one of the child."""
    script = """
loader = Pipeline(range(40)).map(fetch).batch(4)
with loader:
    old = iter(loader)
    first = next(old)
    def work():
        refused(lambda: next(old))
        assert lists(loader) == batches()
        loader.close()
    found = []
    thread = threading.Thread(target=lambda: found.append(in_child(work)))
    thread.start()
    thread.join()
    assert found == [0], found
    assert [first.tolist(), *lists(old)] == batches()
"""
    run_all([script])


HELD = {
    "the loader's": "loader._lock",
    "a beginning iterator's": "iterator._starting",
    "the cache's": "store._lock",
    "that of drawing": "sampler_order._drawing",
    "that of torch's threads": "threads._intraop_lock",
    "that of the fork server": "fork_server._lock",
    "the memory's": "loader._memory._lock",
}


def test_a_lock_that_another_thread_held_at_the_fork_stops_nobody() -> None:
    """Each lock of ours, held by a thread that the child has not."""
    script = f"""
from aioloader.executors import threads
from aioloader.executors.processes import fork_server
from aioloader.sources import sampler_order
for disk in (False, True):
    loader = Pipeline(list(range(40))).shuffle(seed=0).map(int)
    loader = loader.cache(disk=tempfile.mkdtemp() + "/cache") if disk else loader.cache(memory_bytes=100_000)
    (store,) = [stage.store for stage in loader._plan.stages if hasattr(stage, "store")]
    loader = loader.map(int, executor="process", concurrency=1).batch(4)
    shuffled = DataLoader(Items(), batch_size=4, shuffle=True, num_workers=2)
    loader._alloc(None)
    iterator = iter(loader)
    held, over = threading.Event(), threading.Event()
    def hold():
        with {", ".join(HELD.values())}:
            held.set()
            over.wait()
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    def work():
        threads.limit_intraop_threads()
        assert sorted(sum(lists(loader), [])) == list(range(40))
        assert sorted(sum(lists(iterator), [])) == list(range(40))
        assert sorted(sum(lists(shuffled), [])) == list(range(40))
        loader.close()
    status = in_child(work)
    over.set()
    holder.join()
    assert status == 0, status
    loader.close()
"""
    run_all([script])


def test_a_child_that_drops_what_it_copied_takes_nothing_from_its_parent() -> None:
    """Neither its garbage collector nor its end closes, kills or takes back what is the parent's."""
    script = """
import gc
from aioloader.sources import Channel
loader = DataLoader(Items(), batch_size=4, num_workers=2, worker_type="process", persistent_workers=True)
tensors = Pipeline(range(40)).map(lambda k: torch.full((50_000,), k), executor="process", concurrency=1)
channel = Channel(100)
for number in range(40):
    channel.send_nowait(number)
channel.close()
live = Pipeline(channel).batch(4)
epochs = [iter(loader), iter(tensors), iter(live)]
firsts = [next(epoch) for epoch in epochs]
def work():
    global loader, tensors, live, epochs, firsts
    del loader, tensors, live, epochs, firsts
    gc.collect()
assert in_child(work, sys.exit) == 0
assert in_child(lambda: None, sys.exit) == 0
assert [first.tolist() for first in (firsts[0], firsts[2])] == [batches()[0]] * 2
assert lists(epochs[0]) == batches()[1:]
assert [int(tensor[-1]) for tensor in epochs[1]] == list(range(1, 40))
assert int(firsts[1][0]) == 0
assert lists(epochs[2]) == batches()[1:]
for one in (loader, tensors, live):
    one.close()
"""
    run_all([script])


def test_processes_of_multiprocessing_may_use_a_loader_of_their_parent() -> None:
    """The fork start method: the loader is copied with everything else."""
    script = """
import multiprocessing
loader = DataLoader(Items(), batch_size=4, num_workers=2)
def rank(queue):
    queue.put(lists(loader))
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
with loader:
    alive = iter(loader)
    next(alive)
    processes = [context.Process(target=rank, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(), queue.get()] == [batches()] * 2
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert lists(alive) == batches()[1:]
"""
    run_all([script])
