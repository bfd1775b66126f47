"""Flow with all of it at once: limits that are shared and changed, rates, retries, pauses, staleness, and early ends.

`test_flow_model` has random stages; here are random policies, and hands that change things while it runs. A virtual
clock goes on when nothing else is to be done, so an order of completions is a matter of the seed.
"""

import asyncio
import contextvars
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aioloader import Limit, Pipeline, Rate, Retry
from tests._support import until_no_task_left
from tests._virtual_loop import VirtualLoop, virtual_time

VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("variable")


class Busy(Exception):  # noqa: N818 - the model speaks of it as a value
    """What is retried."""


class Broken(Exception):  # noqa: N818
    """What is not."""


async def collate(samples: list[int]) -> list[int]:
    return samples


class Case:
    """A pipeline of one to three maps, drawn by its seed, and what is known of its calls."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draw = self.draw = random.Random(seed)
        self.samples = draw.randrange(1, 45)
        self.limits = [Limit(draw.choice((1, 2, 3, 8))) for _ in range(2)]
        self.most = [limit.value for limit in self.limits]  # calls that may be under way in each
        widths: tuple[int | Limit, ...] = (1, 3, 30, *self.limits)
        self.maps = [draw.choice(widths) for _ in range(draw.choice((1, 2, 3)))]
        self.attempts = [draw.choice((None, 2, 4)) for _ in self.maps]
        self.rates = [draw.choice((None, None, 3.0, 1000.0)) for _ in self.maps]
        self.at_once, self.soils = draw.choice((0.0, 0.5, 0.9)), draw.choice((0.0, 0.3))
        self.fails, self.refuses = draw.choice((0.0, 0.1)), draw.choice((0.0, 0.3))
        self.size, self.prefetch = draw.choice((1, 2, 4, 7)), draw.choice((0, 1, 2, 4))
        self.staleness = draw.choice((None, 0, 1, 3))
        self.taken = draw.choice((None, None, 5, 9))
        self.under_way = [0 for _ in self.maps]
        self.tries: Counter[tuple[int, int]] = Counter()
        self.asked_when_begun: dict[int, int] = {}
        self.asked = 0
        self.paused = False

    def fate(self, key: int, what: str, share: float) -> bool:
        return random.Random(f"{self.seed} {key} {what}").random() < share

    def in_limit(self, number: int) -> int:
        """Calls under way in that limit."""
        limit = self.limits[number]
        return sum(count for count, width in zip(self.under_way, self.maps, strict=True) if width is limit)

    def map(self, number: int) -> Any:
        async def call(key: int) -> int:
            if not number:
                assert not self.paused, f"{key} begins in a pause"
                self.asked_when_begun[key] = self.asked
            self.under_way[number] += 1
            try:
                for at, most in enumerate(self.most):
                    assert self.in_limit(at) <= most, f"{key} begins beyond its limit"
                if self.fate(key, f"soils {number}", self.soils):
                    VARIABLE.set(key)
                if not self.fate(key, f"at once {number}", self.at_once):
                    await asyncio.sleep(random.Random(f"{self.seed} {key} {number}").choice((0, 0.1, 2.0)))
                return self.comes_to(key, number)
            finally:
                self.under_way[number] -= 1
                for at, limit in enumerate(self.limits):
                    self.most[at] = max(limit.value, min(self.most[at], self.in_limit(at)))

        return call

    def comes_to(self, key: int, number: int) -> int:
        attempts = self.attempts[number]
        self.tries[key, number] += 1
        if attempts is not None and self.fate(key, f"busy {number}", 0.2) and self.tries[key, number] < attempts:
            raise Busy(key)
        if self.fate(key, f"fails {number}", self.fails):
            raise Broken(key)
        return key

    def keeps(self, key: int) -> bool:
        return not self.fate(key, "refused", self.refuses)

    # All of it is on the loop, so that no thread has a say in the order.

    async def keys(self) -> AsyncIterator[int]:
        for key in range(self.samples):
            yield key

    async def passes(self, key: int) -> bool:
        return self.keeps(key)

    @property
    def pipeline(self) -> Pipeline:
        pipeline: Pipeline = Pipeline(self.keys)
        for number, width in enumerate(self.maps):
            attempts, rate = self.attempts[number], self.rates[number]
            retry = None if attempts is None else Retry(attempts, on=Busy, wait_initial=0.2, wait_max=1.0)
            pipeline = pipeline.map(
                self.map(number), concurrency=width, retry=retry, rate=None if rate is None else Rate(rate)
            )
        pipeline = pipeline.filter(self.passes)
        if self.taken is not None:
            pipeline = pipeline.take(self.taken)
        pipeline = pipeline.batch(self.size, collate_fn=collate).prefetch(self.prefetch)
        return pipeline if self.staleness is None else pipeline.max_staleness(self.staleness)

    def outcomes(self) -> list[Any]:
        """Those of a plain loop: batches, and for each that failed the key of its first error."""
        samples: list[tuple[int, bool]] = []
        for key in range(self.samples):
            failed = any(self.fate(key, f"fails {number}", self.fails) for number in range(len(self.maps)))
            if failed or self.keeps(key):
                samples.append((key, failed))
        found: list[Any] = []
        samples = samples[: self.taken]
        for at in range(0, len(samples), self.size):
            batch = samples[at : at + self.size]
            errors = [key for key, failed in batch if failed]
            found.append(errors[0] if errors else [key for key, _ in batch])
        return found


async def meddle(case: Case, loader: Pipeline) -> None:
    """Change a limit, or pause, or look at what there is."""
    draw = case.draw
    if draw.random() < 0.3:
        at, value = draw.randrange(2), draw.choice((1, 2, 3, 8))
        case.limits[at].value = value
        case.most[at] = max(value, case.in_limit(at))
    if draw.random() < 0.2:
        drain = draw.random() < 0.5
        async with loader.paused(drain=drain):
            case.paused = True
            assert not (drain and any(case.under_way)), "drained"
            await asyncio.sleep(draw.choice((0, 0.3)))
            case.paused = False
    if draw.random() < 0.1:
        for stage in loader.stats().stages[1:]:
            assert stage.finished_slots <= stage.room or not stage.room


async def epoch(case: Case) -> None:
    loader = case.pipeline
    found: list[Any] = []
    batches = aiter(loader)
    while True:
        await meddle(case, loader)
        case.asked = len(found) + 1
        try:
            batch = await anext(batches)
        except StopAsyncIteration:
            break
        except Broken as error:
            found.append(error.args[0])
            continue
        if case.staleness is not None:
            oldest = min(case.asked_when_begun[key] for key in batch)
            assert case.asked - oldest <= case.staleness, "older than allowed"
        found.append(batch)
    assert found == case.outcomes()
    for limit in case.limits:
        assert (limit.under_way, limit._ledger.used, limit._ledger.granted) == (0, 0, 0)
    await until_no_task_left({asyncio.current_task()})


def check(seed: int) -> None:
    with virtual_time() as clock, asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        runner.run(epoch(Case(seed)))


@pytest.mark.parametrize("seed", range(260, 300))
def test_all_of_it_at_once_is_as_a_plain_loop(seed: int) -> None:
    """Nothing lost, twice, too old, in a pause or beyond a limit; and no slot is held when all is over."""
    check(seed)
