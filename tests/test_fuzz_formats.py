"""Broken files of every format: they end in samples and errors at their places, soon, in little memory.

Mutants are made of real files from a number (`tests/_mutants.py`) and read in another process (`tests/_fuzz_child.py`),
which says what must hold of each. `python -m tests._fuzz_child 17` reads the one with the number 17 by hand.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests._mutants import mutant

QUICK: Final = 300
"""Mutants of a usual run."""

SOAK: Final = int(os.environ.get("AIOLOADER_FUZZ_MUTANTS", "20000"))
"""Mutants of `pytest -m soak`."""

AT_ONCE: Final = 50
"""In one test."""

SILENT_SECONDS: Final = 60.0
"""A process that says nothing for longer hangs; one that works is ended by its CPU time, long before."""


class Fuzzer:
    """The process that reads mutants; another one takes its place when it dies, to the end of the test."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed with this object
        self._unread = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._process = self._start()

    def check(self, first: int, count: int) -> list[str]:
        """What is wrong with so many mutants."""
        found: list[str] = []
        stop = first + count
        before = self._process
        while first < stop:
            first = self._check(first, stop, found)
        if self._process is not before:
            self._close_process()
        return found

    def _check(self, first: int, stop: int, found: list[str]) -> int:
        """Returns where to go on."""
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(b"%d %d\n" % (first, stop - first))
        process.stdin.flush()
        seed = first
        while (said := self._next(process)) is not None:
            if said.get("end"):
                found += [f"after {first} to {stop - 1}: {problem}" for problem in said["problems"]]
                return stop
            seed = said.get("begin", seed)
            found += [f"mutant {seed} ({said['story']}): {problem}" for problem in said.get("problems", ())]
        found.append(f"mutant {seed} ({mutant(seed).story}) {self._end()}")
        return seed + 1

    def _start(self) -> subprocess.Popen[bytes]:
        self._unread = b""
        self._errors.truncate(0)
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "tests._fuzz_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Memory comes and goes as it is used, so that what is measured is what was used.
            env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if self._next(process) != {"ready": True}:
            pytest.fail(f"the process that reads mutants {self._end()}")
        return process

    def _next(self, process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """What the process says next; None: nothing more."""
        assert process.stdout is not None
        deadline = time.monotonic() + SILENT_SECONDS
        while b"\n" not in self._unread:
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(process.stdout.fileno(), 1 << 16) if readable else b""
            if not more:
                return None
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def _end(self) -> str:
        """How the process died; one that is silent is ended here."""
        process = self._process
        assert process is not None
        try:
            process.wait(1)
            why = f"used too much CPU time, or killed its process ({process.returncode})"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGPROF)  # it writes where all its threads are
            why = f"hangs: silent for {SILENT_SECONDS:g} s"
        self._close_process()
        self._errors.seek(0)
        return f"{why}\n{self._errors.read().decode(errors='replace')[-4000:]}"

    def _close_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def close(self) -> None:
        self._close_process()
        self._errors.close()


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    one = Fuzzer()
    yield one
    one.close()


@pytest.mark.parametrize("first", range(0, QUICK, AT_ONCE))
def test_broken_files_end_in_samples_and_errors(fuzzer: Fuzzer, first: int) -> None:
    assert not fuzzer.check(first, AT_ONCE)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(QUICK, SOAK, AT_ONCE))
def test_many_more_broken_files(fuzzer: Fuzzer, first: int) -> None:
    assert not fuzzer.check(first, AT_ONCE)
