"""Contenders of `bench.flow` that are checkouts: cases that run with the aioloader of another folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench._harness import Epoch, Tick

__all__ = ["CASES", "in_checkout"]

CASES: Final = {
    "never suspends": "an async op that never suspends, 64 side by side, batches of 256",
    "10 ms": "an async op that takes 10 ms, 64 side by side, batches of 64",
    "sync": "a sync function that only looks up, 2 threads, batches of 256",
}
"""The cases, and what they are."""

CHILD: Final = Path(__file__).with_name("_checkout_child.py")


def in_checkout(root: Path, case: str, samples: int, *, is_async: bool) -> Epoch:
    """An epoch of a case in a process of its own, which stays until the epoch is dropped.

    Args:
        root: The checkout: the folder that has `aioloader/` in it.
        case: One of `CASES`.
        samples: In an epoch.
        is_async: By `async for`, else by `for`.
    """
    return _Child(root, case, samples, is_async=is_async)


class _Child:
    """Asks a process for an epoch whenever it is called.

    Raises:
        RuntimeError: The process has ended; what it had to say is on standard error.
    """

    def __init__(self, root: Path, case: str, samples: int, *, is_async: bool) -> None:
        asked = json.dumps({"root": str(root.resolve()), "case": case, "samples": samples, "is_async": is_async})
        self._what = f"{case} in {root}"
        # -P: `bench` is not to be a place to import from, for its scripts have names of modules.
        command = [sys.executable, "-P", str(CHILD), asked]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, tick: Tick) -> float:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write("\n")
            stdin.flush()
        except BrokenPipeError:
            pass
        answer = stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._what}: its process ended with status {self._process.wait()}")
        found = json.loads(answer)
        tick(found["samples"])
        return float(found["seconds"])

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._process.communicate()  # the end of its input ends it
