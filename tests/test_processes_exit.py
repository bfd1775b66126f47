"""Worker processes at the end of the user's process, however it comes, and in scripts of every kind."""

import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests._support import Child

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no worker processes")

# No `if __name__ == "__main__"` in any of these: what is in them must not run again in a worker.
PREAMBLE = """
import os, signal, sys, threading
interrupted = []  # from when on nothing may be imported for the first time
def interrupt(number, frame):
    interrupted.append(True)
    signal.default_int_handler(number, frame)
def audit(event, args):
    if event == "import" and interrupted:
        os.write(2, f"imported late: {args[0]}\\n".encode())
sys.addaudithook(audit)
signal.signal(signal.SIGINT, interrupt)
signal.signal(signal.SIGURG, lambda number, frame: None)  # see `Child.interrupt`
print("main", flush=True)
import torch
from aioloader import DataLoader, Pipeline

def forever(key):
    if key == 5:
        os.write(1, b"ready\\n")
        while True:
            signal.pause()
    return key

class Stuck:
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return forever(index)
"""

SCRIPTS = {
    "pipeline": "for _ in Pipeline(range(1000)).map(forever, executor='process', concurrency=2): pass",
    "own process": "for _ in Pipeline(range(1000)).map(forever).in_process(): pass",
    "loader": "for _ in DataLoader(Stuck(), num_workers=2, worker_type='process'): pass",
    "forked": """
def silent(key):
    while key == 5:
        signal.pause()
    return key
batches = iter(Pipeline(range(1000)).map(silent, executor='process', concurrency=2))
next(batches)
if os.fork() == 0:  # it holds copies of all that its parent has open, but for what must be closed with that
    threading.Event().wait()
print("ready", flush=True)
for _ in batches: pass
""",
}


@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9"])
def test_no_process_outlives_the_users(how: str) -> None:
    """Neither after Ctrl-C nor after `kill -9`, with workers in the middle of something that never ends."""
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(PREAMBLE + script)) for name, script in SCRIPTS.items()}
        for name, child in children.items():
            child.until_line("ready")
            copies = []
            mine = psutil.Process(child.process.pid)
            started = mine.children(recursive=True)
            if name == "forked":
                copies = [p for p in mine.children() if p.cmdline() == mine.cmdline()]
                assert len(copies) == 1
            ours = [process for process in started if process not in copies]
            assert len(ours) >= 2
            if how == "Ctrl-C":
                child.interrupt()
            else:
                child.process.kill()
            _, alive = psutil.wait_procs(ours, timeout=20)
            for copy in copies:
                copy.kill()
            assert not alive, name
            if how == "Ctrl-C":
                status, _, errors = child.finish()
                assert status == -signal.SIGINT, errors
                assert errors.count("Traceback (most recent call last)") == 1, errors
                assert errors.rstrip().endswith("\nKeyboardInterrupt"), errors
                assert "imported late" not in errors, errors


def test_a_script_without_a_main_guard_ends_with_an_iterator_alive(tmp_path: Path) -> None:
    """Its functions, lambdas, closures and classes travel, nothing of it runs twice, 200 batches need no 64 files."""
    script = tmp_path / "script.py"
    script.write_text(
        PREAMBLE
        + """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
factor = 3

class Scaled:
    def __init__(self, value):
        self.value = value * factor

def scale(sample):
    return Scaled(sample)

assert [s.value for s in Pipeline(range(5)).map(scale, executor="process")] == [0, 3, 6, 9, 12]
made = Pipeline(range(200)).map(lambda key: torch.full((50_000,), key * factor), executor="process", concurrency=2)
kept = list(made)
assert all(int(batch[-1]) == 3 * key for key, batch in enumerate(kept))
alive = iter(DataLoader(Stuck(), num_workers=2, worker_type="process"))
print(next(alive))
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "main"
    assert done.stdout.count("main") == 1
    assert "tensor([0])" in done.stdout
    assert not done.stderr


def test_a_process_that_multiprocessing_has_spawned_has_workers(tmp_path: Path) -> None:
    """As ranks of `torch.multiprocessing.spawn` are; the script's functions are those of `__mp_main__` there."""
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing
from aioloader import Pipeline

def triple(sample):
    return 3 * sample

def rank():
    print(list(Pipeline(range(3)).map(triple, executor="process")))

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=rank)
    process.start()
    process.join()
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout == "[0, 3, 6]\n"
    assert not done.stderr


def test_without_cloudpickle_the_error_says_what_to_install() -> None:
    """Functions of importable modules go, a lambda does not."""
    script = """
    import sys
    sys.modules["cloudpickle"] = None
    from operator import neg
    from aioloader import Pipeline
    assert list(Pipeline(range(3)).map(neg, executor="process")) == [0, -1, -2]
    try:
        list(Pipeline(range(3)).map(lambda x: x, executor="process"))
    except Exception as error:
        print(error)
    """
    with Child(script) as child:
        status, out, errors = child.finish()
    assert status == 0, errors
    assert "the functions or the dataset cannot cross to another process" in out
    assert "pip install 'aioloader[process]' brings cloudpickle" in out
