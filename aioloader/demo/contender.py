"""Runs a contender of the demo in a separate process, so that its peak memory can be measured."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

from aioloader.demo.memory import tree_memory_bytes

Loader = Literal["async for", "for", "torch"]
"""The training loop of `aioloader.demo.train`."""

SAMPLING_S = 0.05
"""How often the memory is measured, in seconds; this costs about 3 ms per process of the contender."""


@dataclass(frozen=True)
class Assignment:
    """The task of a contender."""

    loader: Loader
    name: str
    folder: str
    url: str
    epochs: int
    batch_size: int
    device: str
    workers: int
    connections: int


@dataclass(frozen=True)
class Outcome:
    """The measurements of a contender; see `Meter` for the first three."""

    first_batch_s: float
    samples_per_s: float
    waited_share: float
    accuracy: float
    explanation: str


class ContenderError(Exception):
    """A contender's process failed; it has printed the reason to standard error."""


def run_contender(task: Assignment) -> tuple[Outcome, int]:
    """Run `aioloader.demo.train` in a new process.

    Returns:
        Its measurements, and its peak memory in bytes, with worker processes.

    Raises:
        ContenderError: Its exit code was not 0.
    """
    command = [sys.executable, "-m", "aioloader.demo.train", json.dumps(asdict(task))]
    peak_bytes = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while True:
            try:
                answer, _ = process.communicate(timeout=SAMPLING_S)
                break
            except subprocess.TimeoutExpired:
                peak_bytes = max(peak_bytes, tree_memory_bytes(process.pid))
    if process.returncode != 0:
        raise ContenderError(f"{task.name!r} must end with exit code 0, got {process.returncode}; see its error above")
    return Outcome(**json.loads(answer)), peak_bytes
