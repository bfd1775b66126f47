"""Promise 6, where it takes a process of its own: Ctrl-C, and the end of the interpreter."""

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests._support import Child

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and exit status as POSIX has them")

PREAMBLE = """
import asyncio, atexit, itertools, os, signal, sys, threading, time, warnings
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
signal.signal(signal.SIGURG, lambda number, frame: None)  # see `Child.interrupt`
import aioloader
from aioloader import DataLoader, Pipeline

interrupted = []  # from when on nothing may be imported for the first time
stuck = threading.Event()
def audit(event, args):
    if event == "import" and interrupted:
        os.write(2, f"imported late: {args[0]}\\n".encode())
sys.addaudithook(audit)

def ready():
    interrupted.append(True)
    stuck.set()
    print("ready", flush=True)

async def forever(key):
    if key == 5:
        ready()
        await asyncio.get_running_loop().create_future()
    return key

def forever_sync(key):
    if key == 5:
        ready()
        threading.Event().wait()
    return key

async def stream():
    for key in itertools.count():
        yield key

async def stuck_stream():
    try:
        for key in itertools.count():
            yield await forever(key)
    finally:
        await asyncio.sleep(0)

def collate(samples):
    return samples

async def fetch(key):
    await asyncio.sleep(0)
    return key

class Items:
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return index

class Stuck(Items):
    def __getitem__(self, index):
        return forever_sync(index)

async def consume(loader):
    async for _ in loader:
        pass

"""

NOISE = (
    "Exception ignored",
    "Task was destroyed",
    "never retrieved",
    "never awaited",
    "Fatal Python error",
    "unclosed",
    "imported late",
)

WAITING = {
    "async function": "Pipeline(range(1000)).map(forever, concurrency=4).batch(2, collate_fn=collate)",
    "sync function": "Pipeline(range(1000)).map(forever_sync, concurrency=4).batch(2, collate_fn=collate)",
    "async source": "Pipeline(stuck_stream).map(fetch).batch(2, collate_fn=collate)",
    "flat_map": "Pipeline(range(1)).flat_map(lambda key: stuck_stream()).batch(2)",
    "DataLoader with workers": "DataLoader(Stuck(), batch_size=2, num_workers=2)",
    "DataLoader without workers": "DataLoader(Stuck(), batch_size=2)",
}


@contextmanager
def children(scripts: dict[str, str]) -> Iterator[dict[str, Child]]:
    """One process for each script, side by side: they spend their time waiting."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Child(PREAMBLE + script)) for name, script in scripts.items()}


def interrupted(scripts: dict[str, str]) -> dict[str, tuple[int, str]]:
    """Status and errors of processes that get Ctrl-C when they are in the middle of a batch."""
    with children(scripts) as started:
        for child in started.values():
            child.until_line("ready")
            child.interrupt()
        ends = {name: child.finish() for name, child in started.items()}
    return {name: (status, err) for name, (status, _, err) in ends.items()}


def test_ctrl_c_in_a_for_loop() -> None:
    """In the middle of a batch: KeyboardInterrupt in the main thread, one traceback, the end."""
    ends = interrupted({name: f"for _ in {loader}:\n    pass\n" for name, loader in WAITING.items()})
    for name, (status, err) in ends.items():
        assert status == -signal.SIGINT, (name, err)  # CPython forgets it when it imports some modules on its way out
        assert err.count("Traceback (most recent call last)") == 1, (name, err)
        assert err.rstrip().splitlines()[-1] == "KeyboardInterrupt", (name, err)
        assert not [noise for noise in NOISE if noise in err], (name, err)


def test_ctrl_c_in_an_async_for_loop() -> None:
    """The same under `asyncio.run`, which itself shows the cancellation that it turned into KeyboardInterrupt."""
    ends = interrupted({name: f"asyncio.run(consume({loader}))\n" for name, loader in WAITING.items()})
    for name, (status, err) in ends.items():
        assert status == -signal.SIGINT, (name, err)  # CPython forgets it when it imports some modules on its way out
        lines = err.rstrip().splitlines()
        assert lines[-1] == "KeyboardInterrupt", (name, err)
        assert lines.count("KeyboardInterrupt") == 1, (name, err)
        assert err.count("Traceback (most recent call last)") <= 2, (name, err)
        assert not [noise for noise in NOISE if noise in err], (name, err)


def test_ctrl_c_can_be_caught_and_the_loop_resumed() -> None:
    """A caught KeyboardInterrupt has lost no batch: the iterator goes on."""
    script = f"""{PREAMBLE}
free = threading.Event()
def slow(key):
    if key == 0:
        print("ready", flush=True)
        free.wait()
    return key
batches = iter(Pipeline(range(10)).map(slow, concurrency=2))
try:
    next(batches)
except KeyboardInterrupt:
    free.set()
assert free.is_set()
assert list(batches) == list(range(10))
"""
    with Child(script) as child:
        child.until_line("ready")
        child.interrupt()
        status, _, err = child.finish()
    assert (status, err) == (0, "")


ENDS = {
    "live iterator": "batches = iter(LOADER); next(batches)",
    "several live iterators": "many = [iter(LOADER) for _ in range(3)]; [next(one) for one in many]",
    "sys.exit in the body": "for _ in LOADER:\n    sys.exit(0)",
    "live async iterator": """
async def main():
    global batches
    batches = aiter(LOADER)
    await anext(batches)
asyncio.run(main())
""",
    "sys.exit in the async body": """
async def main():
    async for _ in LOADER:
        sys.exit(0)
asyncio.run(main())
""",
    "loop left behind": """
loop = asyncio.new_event_loop()
batches = aiter(LOADER)
loop.run_until_complete(anext(batches))
loop.close()
""",
    "iterator of a daemon thread": """
def consume():
    for _ in LOADER:
        print("ready", flush=True)
        threading.Event().wait()
threading.Thread(target=consume, daemon=True).start()
while threading.active_count() < 3:
    pass
""",
    "iterator of another thread": """
kept = []
def consume():
    kept.append(iter(LOADER))
    next(kept[0])
thread = threading.Thread(target=consume)
thread.start()
thread.join()
""",
}
LOADERS = {
    "pipeline": "Pipeline(stream()).map(fetch, concurrency=4).map(collate, concurrency=2).batch(2, collate_fn=collate)",
    "DataLoader": "DataLoader(Items(), batch_size=2, num_workers=2)",
}


@pytest.mark.parametrize("loader", sorted(LOADERS))
def test_the_interpreter_ends_with_a_live_iterator(loader: str) -> None:
    """Nobody closed anything; the process ends at once, with status 0 and not a word."""
    scripts = {name: end.replace("LOADER", LOADERS[loader]) for name, end in ENDS.items()}
    if loader == "pipeline":
        del scripts["loop left behind"]  # asyncio itself complains of tasks that its closed loop cannot end
    else:  # each process takes seconds to import torch
        scripts = {name: scripts[name] for name in ("live iterator", "live async iterator", "loop left behind")}
    with children(scripts) as started:
        ends = {name: child.finish() for name, child in started.items()}
    assert {name: (status, err) for name, (status, _, err) in ends.items()} == dict.fromkeys(scripts, (0, ""))


STUCK = {  # the first batch may be there before the function is stuck
    "break": "for _ in LOADER:\n    stuck.wait()\n    break",
    "live iterator": "batches = iter(LOADER); next(batches); stuck.wait()",
    "sys.exit in the body": "for _ in LOADER:\n    stuck.wait()\n    sys.exit(0)",
    "async break": """
async def main():
    async for _ in LOADER:
        stuck.wait()
        break
asyncio.run(main())
""",
}


def test_the_interpreter_ends_while_a_function_is_stuck_in_a_thread() -> None:
    """A function that never returns in a worker thread keeps no process alive for ever."""
    loader = "Pipeline(range(1000)).map(forever_sync, concurrency=6).batch(2, collate_fn=collate)"
    with children({name: end.replace("LOADER", loader) for name, end in STUCK.items()}) as started:
        for child in started.values():
            child.until_line("ready")
        ends = {name: child.finish() for name, child in started.items()}
    for name, (status, _, err) in ends.items():
        assert status == 0, (name, err)
        assert "Traceback" not in err, (name, err)


def test_the_number_of_torch_threads_is_nobodys_but_the_callers() -> None:
    """The main thread never asked for its number before; afterwards it is what it would have been, in every thread."""
    script = f"""{PREAMBLE}
import os, torch
def number(key):
    return torch.get_num_threads()
assert set(Pipeline(range(50)).map(number, concurrency=4)) == {{1}}
list(DataLoader(Items(), batch_size=10, num_workers=2))
in_thread = []
thread = threading.Thread(target=lambda: in_thread.append(torch.get_num_threads()))
thread.start()
thread.join()
print(torch.get_num_threads(), in_thread[0], file=sys.stderr)
"""
    with Child("import torch, sys; print(torch.get_num_threads(), torch.get_num_threads(), file=sys.stderr)") as child:
        _, _, expected = child.finish()
    with Child(script) as child:
        status, _, err = child.finish()
    assert (status, err) == (0, expected)


@pytest.mark.parametrize("face", ["for", "async for"])
def test_a_forked_child_of_a_finished_loader_works(face: str) -> None:
    """Nothing of a loader whose epoch is over stands in the way of `os.fork`."""
    script = f"""{PREAMBLE}
import os
loader = Pipeline(range(6)).map(fetch).batch(2, collate_fn=collate)
def epoch():
    if {face!r} == "for":
        return list(loader)
    async def main():
        return [batch async for batch in loader]
    return asyncio.run(main())
assert epoch() == [[0, 1], [2, 3], [4, 5]]
child = os.fork()
if child == 0:
    os._exit(0 if epoch() == [[0, 1], [2, 3], [4, 5]] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    with Child(script) as child:
        status, _, err = child.finish()
    assert (status, err) == (0, "")
