"""Several samples in one hop into a thread: what is done goes on, and lets go of, when a later one takes its time."""

from collections.abc import Callable
from typing import Any

import pytest

from aioloader import Pipeline
from aioloader.engine import bulk_load_step, thread_step
from aioloader.engine.bulk_load_step import _Size
from aioloader.engine.node import CHUNK_SECONDS
from aioloader.engine.sync_step import SyncStep
from aioloader.engine.thread_step import ThreadStep
from aioloader.executors import chunk
from aioloader.testing import Gate
from tests._support import Face, Steps, on_both_faces, until, wait_until


class HeldClock:
    """The time in threads and for those that look at them: it stands until the test lets it go on.

    Attributes:
        looks: How often somebody has looked at a hop whose thread had begun.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.looks = 0
        for module in (thread_step, bulk_load_step, chunk):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)
        real = ThreadStep._look_again

        def look(step: ThreadStep) -> None:
            begun = any(job.claimed for job in step._jobs)
            real(step)
            self.looks += begun

        monkeypatch.setattr(ThreadStep, "_look_again", look)

    def until_looked(self, steps: Steps, face: Face) -> None:
        """Until somebody has looked once more."""
        before = self.looks
        if face == "for":
            wait_until(lambda: self.looks > before)
        else:
            steps.do(lambda: until(lambda: self.looks > before))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HeldClock:
    return HeldClock(monkeypatch)


def all_samples_seem_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it turns out that they are not."""
    real = SyncStep.__init__

    def begin(self: SyncStep, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self._seconds_each = CHUNK_SECONDS / 8

    monkeypatch.setattr(SyncStep, "__init__", begin)


@on_both_faces
def test_a_thread_that_began_late_keeps_nothing(face: Face, clock: HeldClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody looks while it is at its first sample, and its millisecond is not over: it goes on to the second one."""
    all_samples_seem_cheap(monkeypatch)
    apply: Callable[..., Any] = chunk.apply_chunk

    def late(*args: Any) -> Any:
        clock.now += 5 * CHUNK_SECONDS
        return apply(*args)

    monkeypatch.setattr(thread_step, "apply_chunk", late)
    gate = Gate()

    def load(sample: int) -> int:
        gate.pass_sync(sample)
        return sample

    loader = Pipeline(range(8)).map(load, concurrency=1)
    with Steps(loader, face) as steps:
        asked = steps.ask()
        steps.until_arrived(gate, 1)
        clock.until_looked(steps, face)
        gate.open(0)
        steps.until_arrived(gate, 2)
        clock.now += 1.0
        assert asked() == 0
        gate.open_all()
        assert steps.rest() == [*range(1, 8)]


class Together:
    """Rows that cannot be loaded together."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: int) -> int:
        self._gate.pass_sync(key)
        return key

    def __getitems__(self, keys: list[int]) -> list[int]:
        raise ValueError("no row of these")


@on_both_faces
def test_rows_that_are_loaded_one_by_one_after_all_do_not_wait_for_each_other(
    face: Face, clock: HeldClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever somebody has looked."""
    all_samples_seem_cheap(monkeypatch)
    monkeypatch.setattr(_Size, "now", 4, raising=False)
    monkeypatch.setattr(_Size, "__init__", lambda _: None)
    monkeypatch.setattr(_Size, "failed", lambda _: None)
    gate = Gate()
    with Steps(Pipeline(Together(gate)).map(lambda row: row, concurrency=1), face) as steps:
        asked = steps.ask()
        steps.until_arrived(gate, 1)
        clock.now += 1.0
        clock.until_looked(steps, face)
        gate.open(0)
        steps.until_arrived(gate, 2)
        assert asked() == 0
        gate.open_all()
        assert steps.rest() == [*range(1, 8)]
