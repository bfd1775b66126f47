"""One contender of the demo runs in a process of its own, so that its peak of memory is its own."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

from aioloader.demo.memory import tree_memory_bytes

Loader = Literal["async for", "for", "torch"]
"""Which training loop of `aioloader.demo.train` is run."""

SAMPLING_S = 0.05
"""The memory is looked at so often, in seconds; a look costs about 3 ms per process of the contender."""


@dataclass(frozen=True)
class Assignment:
    """What a contender is told."""

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
    """What a contender measured of itself; see `Meter` for the first three."""

    first_batch_s: float
    samples_per_s: float
    waited_share: float
    accuracy: float
    explanation: str


class ContenderError(Exception):
    """A contender's process failed; it has told why on standard error."""


def run_contender(task: Assignment) -> tuple[Outcome, int]:
    """Run `aioloader.demo.train` in a new process.

    Returns:
        What it measured, and the peak of its memory in bytes, its worker processes included.

    Raises:
        ContenderError: It ended with another exit code than 0.
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
        raise ContenderError(
            f"{task.name!r} must end with exit code 0, got {process.returncode}; its error stands above"
        )
    return Outcome(**json.loads(answer)), peak_bytes
