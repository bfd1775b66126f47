"""What becomes of chunks, by chance: sizes, costs, the order of answers, deaths, time that is up, limits and pauses."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from aioloader import Limit, Pipeline, Retry
from aioloader.engine import op_steps
from aioloader.executors.chunk import Call
from tests._played import PlayedPool, Worker
from tests._support import FACES, Face, Steps

SEEDS = 40
NEVER = 600.0  # seconds


def number(key: int) -> int:
    return key


def flaky(key: int) -> int:
    if key % 11 == 3:
        raise ValueError(f"no sample {key}")
    return key


class Sized:
    """Gives tensors of `size` numbers.

    Args:
        size: How many.
        fails: At some keys, always.
    """

    def __init__(self, size: int, *, fails: bool) -> None:
        self.size = size
        self.fails = fails

    def __call__(self, key: int) -> torch.Tensor:
        if self.fails:
            flaky(key)
        return torch.full((self.size,), float(key))


class Chance:
    """A pipeline and what is done to it, drawn from a seed."""

    def __init__(self, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.draw = draw = random.Random(seed)
        self.workers = draw.choice([1, 2, 3, 16])
        self.batch = draw.choice([1, 2, 7, 64, 170, 171, 255, 256, 511, 512, 513])
        self.epoch = draw.randint(1, 7) * self.batch + draw.randint(0, self.batch)
        self.ordered = draw.random() < 0.7
        self.cost = 10 ** draw.uniform(-7, -1.5)
        large = max(1, draw.choice([1, 300_000, 300_000, 600_000]) // self.batch)
        self.skips, self.retries = draw.random() < 0.5, draw.random() < 0.3
        call = Call(Sized(large, fails=self.skips), False, "fn", None)
        self.played = random.Random(seed + 1)  # in the thread of the workers
        self.pool = PlayedPool(self.workers, (call,), self._seconds, self.played)
        self.pool.cuts = draw.choice([0.0, 0.0, 0.1, 0.5])
        self.pool.worker = Worker() if large > 1 else None
        if draw.random() < 0.4:
            self.pool.fatal = set(draw.sample(range(self.epoch), min(3, self.epoch // 3)))
        self.limit = Limit(self.workers) if draw.random() < 0.3 else None
        patch.setattr(op_steps, "_worker_pool", lambda *_: self.pool)
        self.loader = self._loader(draw)

    def _seconds(self) -> float:
        return self.cost * 10 ** self.played.choice([0, 0, 0, 0, 0, self.played.uniform(-2, 2)])

    def _loader(self, draw: random.Random) -> Pipeline[Any]:
        policies: dict[str, Any] = {}
        if self.retries:
            policies["retry"] = Retry(attempts=2, wait_initial=0.0, jitter=0.0)
        if draw.random() < 0.2:
            policies["timeout"] = NEVER
        if draw.random() < 0.2:
            policies["ahead"] = draw.choice([self.workers, 2 * self.workers, 64, 500])
        concurrency = self.workers if self.limit is None else self.limit
        samples = Pipeline(range(self.epoch)).map(
            number, executor="process", concurrency=concurrency, ordered=self.ordered, **policies
        )
        if self.skips or self.pool.fatal:
            samples = samples.skip_errors()
        return samples.batch(self.batch)

    @property
    def expected(self) -> list[int]:
        """Of an epoch."""
        lost = set() if self.retries else self.pool.fatal
        return [key for key in range(self.epoch) if not (self.skips and key % 11 == 3) and key not in lost]

    def happens(self, face: Face) -> None:
        """Something, between two batches."""
        if face == "for" and self.draw.random() < 0.1:
            with self.loader.paused(drain=self.draw.random() < 0.5):
                pass
        if self.limit is not None and self.draw.random() < 0.3:
            self.limit.value = self.draw.randint(1, self.workers + 2)

    def end(self) -> None:
        self.loader.close()
        self.pool.end()


def keys_of(batch: torch.Tensor) -> list[int]:
    """Of its samples, which are written over: nobody else is to see that."""
    keys = [int(key) for key in batch[:, 0].tolist()]
    assert torch.equal(batch, batch[:, :1].expand_as(batch))
    batch.fill_(-1)
    return keys


@pytest.fixture
def chance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chance]:
    chance = Chance(request.param, monkeypatch)
    yield chance
    chance.end()


@pytest.mark.parametrize("chance", range(SEEDS), indirect=True)
def test_all_samples_come_whatever_becomes_of_chunks(chance: Chance) -> None:
    """Each once, in full batches, in order where that is asked for; with a resume, pauses and a limit that changes."""
    face = chance.draw.choice(FACES)
    loader, draw = chance.loader, chance.draw
    for _ in range(3):
        expected = chance.expected
        found: list[int] = []
        batches: list[torch.Tensor] = []
        stop = draw.choice([None, None, draw.randint(0, 3)])
        with Steps(loader, face) as steps:
            while stop is None or len(batches) < stop:
                chance.happens(face)
                some = steps.rest(1)
                if not some:
                    stop = None
                    break
                batches += some
                found += keys_of(some[0])
        if stop is not None and len(found) < len(expected):
            state = loader.state_dict()
            loader.load_state_dict(state)
            with Steps(loader, face) as steps:
                for batch in steps.rest():
                    batches.append(batch)
                    found += keys_of(batch)
        assert (found if chance.ordered else sorted(found)) == expected
        assert all(len(batch) == chance.batch for batch in batches[:-1])
        kept = {id(batch): batch.untyped_storage().data_ptr() for batch in batches}
        assert len(set(kept.values())) == len(batches)
