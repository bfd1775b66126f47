"""Failures in worker processes against a plain model: samples that fail, hang, or take their process with them.

Time is real here, so there are few: what can be told without processes is told by `test_failures_model`.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aioloader import Pipeline, Retry, WorkerDiedError
from tests._failures_model import Broken, Busy, Outcome
from tests._support import FACES, Face, Steps
from tests.test_failures_model import named

pytestmark = pytest.mark.usefixtures("fork_server")

SEEDS = 4
SOAK_SEEDS = 200
SAMPLES = 16
TIMEOUT = 4.0  # more than a call takes on the busiest of machines
CALL_SECONDS = 0.005  # so that each call is sent alone: a death loses the results of those before it in one message

ERRORS = {"busy": Busy, "broken": Broken, "hangs": TimeoutError, "dies": WorkerDiedError}


@dataclass(frozen=True)
class Case:
    """What is drawn by a seed.

    Attributes:
        seed: What everything is drawn from.
        folder: Where calls of all processes are counted.
        attempts: Of `retry`.
        width: Worker processes.
        skips: `skip_errors` is there.
        size: Of a batch.
    """

    seed: int
    folder: str
    attempts: int
    width: int
    skips: bool
    size: int

    @classmethod
    def of(cls, seed: int, folder: Path) -> "Case":
        draw = random.Random(f"processes {seed}")
        return cls(
            seed, str(folder), draw.choice((1, 2, 3)), draw.choice((1, 2)), draw.random() < 0.5, draw.choice((1, 3))
        )

    def fault(self, key: int, attempt: int) -> str:
        chance = random.Random(f"{self.seed} {key} {attempt}").random()
        faults = ((0.75, "fast"), (0.83, "busy"), (0.88, "broken"), (0.9, "hangs"), (1.0, "dies"))
        return next(fault for most, fault in faults if chance < most)

    def is_last(self, key: int, attempt: int) -> bool:
        fault = self.fault(key, attempt)
        return fault in ("fast", "broken") or attempt >= self.attempts

    def __call__(self, key: int) -> int:
        """The user's function, in a worker process."""
        time.sleep(CALL_SECONDS)
        attempt = 1
        while True:  # the first name that is free
            try:
                os.close(os.open(f"{self.folder}/{key} {attempt}", os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                attempt += 1
        attempt = self.within_journey(key, attempt)
        fault = self.fault(key, attempt)
        if fault == "busy":
            raise Busy
        if fault == "broken":
            raise Broken
        if fault == "hangs":
            time.sleep(3600)
        if fault == "dies":
            os._exit(3)
        return key

    def within_journey(self, key: int, calls: int) -> int:
        """The attempt that call number `calls` is: those of a resume begin anew."""
        attempt = 1
        for _ in range(calls - 1):
            attempt = 1 if self.is_last(key, attempt) else attempt + 1
        return attempt

    def pipeline(self) -> Pipeline[Any]:
        retry = Retry(self.attempts, (Busy, TimeoutError, WorkerDiedError), wait_initial=0.01, jitter=0.0)
        loader: Any = Pipeline(range(SAMPLES)).map(
            self, executor="process", concurrency=self.width, retry=retry, timeout=TIMEOUT
        )
        if self.skips:
            loader = loader.skip_errors(max_share=None, report=f"{self.folder}/skipped.jsonl")
        return loader.batch(self.size, collate_fn=list)  # type: ignore[no-any-return]

    def ends(self) -> Iterator[tuple[int, str | None, int]]:
        """Each sample, the type of its error, and its attempts."""
        for key in range(SAMPLES):
            attempt = 1
            while not self.is_last(key, attempt):
                attempt += 1
            fault = self.fault(key, attempt)
            yield key, None if fault == "fast" else ERRORS[fault].__name__, attempt

    def outcomes(self) -> list[Outcome]:
        samples = [(key, error) for key, error, _ in self.ends() if error is None or not self.skips]
        found: list[Outcome] = []
        for at in range(0, len(samples), self.size):
            batch = samples[at : at + self.size]
            failed = [(error, key) for key, error in batch if error is not None]
            found.append(failed[0] if failed else [key for key, _ in batch])
        return found


def outcomes(steps: Steps, most: int = 1000) -> list[Outcome]:
    return [named(one) if isinstance(one, Exception) else one for one in steps.outcomes(most)]


def check(seed: int, face: Face, folder: Path) -> None:
    """A whole epoch, and one that is left and gone on with."""
    case = Case.of(seed, folder)
    with Steps(case.pipeline(), face) as steps:
        assert outcomes(steps) == case.outcomes()
    if case.skips:
        report = folder / "skipped.jsonl"
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        assert [(line["key"], line["attempts"]) for line in lines] == [
            (key, attempts) for key, error, attempts in case.ends() if error is not None
        ]
    for path in folder.iterdir():
        path.unlink()
    stop = random.Random(f"{seed} stop").randrange(1, max(2, len(case.outcomes())))
    first = case.pipeline()
    with Steps(first, face) as steps:
        found = outcomes(steps, stop)
        state = json.loads(json.dumps(first.state_dict()))
    for path in folder.iterdir():
        path.unlink()
    rest = case.pipeline()
    rest.load_state_dict(state)
    with Steps(rest, FACES[1 - FACES.index(face)]) as steps:
        assert found + outcomes(steps) == case.outcomes()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_failures_in_processes_are_those_of_the_model(seed: int, tmp_path: Path) -> None:
    check(seed, FACES[seed % 2], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(SEEDS, SEEDS + SOAK_SEEDS))
def test_failures_in_processes_are_those_of_the_model_for_long(seed: int, tmp_path: Path) -> None:
    check(seed, FACES[seed % 2], tmp_path)
