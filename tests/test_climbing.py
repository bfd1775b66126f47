"""The search of `autotune` on surfaces that are known, with noise that is seeded; it runs nothing."""

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import product
from math import sqrt

import pytest

from aioloader.core.climbing import Axis, Found, Measured, Point, climb

POINT_SECONDS = 0.6
SEEDS = range(40)


@dataclass
class Surface:
    """What a loader would do.

    Attributes:
        rate: Batches per second at a point.
        use: How busy the stages are at a point.
        failed: The share of calls that fail at a point.
        consumer: Batches per second that are taken at most.
    """

    rate: Callable[[Point], float]
    use: Callable[[Point], tuple[float, ...]]
    failed: Callable[[Point], float] = lambda _: 0.0
    consumer: float = 1e9

    def measured(self, point: Point, chance: random.Random, noise: float, left: float) -> Measured:
        rate = min(self.rate(point), self.consumer)
        blocks = tuple((rate * 0.1 * chance.lognormvariate(0, noise), 0.1) for _ in range(5))
        waited = 1.0 - rate / self.consumer
        return Measured(blocks, waited, self.use(point), self.failed(point), left, POINT_SECONDS)


def search(
    axes: list[Axis], surface: Surface, *, seed: int = 0, noise: float = 0.0, seconds: float = 30.0
) -> tuple[Found, list[Point]]:
    """Run a search to its end; what it found, and all points that it asked for."""
    chance, left = random.Random(seed), seconds
    climbing: Generator[Point, Measured, Found] = climb(axes)
    point, asked = next(climbing), []
    while True:
        asked.append(point)
        left -= POINT_SECONDS
        try:
            point = climbing.send(surface.measured(point, chance, noise, left))
        except StopIteration as end:
            found: Found = end.value
            return found, asked


def busy(point: Point, rate: float, each: tuple[float, ...]) -> tuple[float, ...]:
    """Calls under way by Little's law, as a share of the places."""
    return tuple(min(1.0, rate * seconds / places) for places, seconds in zip(point, each, strict=False))


LATENCY = 0.4  # seconds for all samples of a batch, one after the other


def latency_rate(point: Point) -> float:
    return min(point[0] / LATENCY, 1200.0)


def cpu_rate(point: Point) -> float:
    return 100.0 * min(point[0], 2) - 3.0 * max(0, point[0] - 2)


def mixed_rate(point: Point) -> float:
    return min(point[0] / 0.5, point[1] / 0.08, 900.0)


def files_rate(point: Point) -> float:
    return min(50.0 * sqrt(point[0]), 60.0 * point[1])


ALLOWED = 50.0


def offered(point: Point) -> float:
    return point[0] / 0.2


SCENARIOS: dict[str, tuple[list[Axis], Surface, list[tuple[int, ...]]]] = {
    "latency": (
        [Axis(64, 1, 1024), Axis(1, 1, 16, is_room=True)],
        Surface(latency_rate, lambda p: (*busy(p, latency_rate(p), (LATENCY,)), 0.0)),
        [(16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16)],
    ),
    "CPU": (
        [Axis(2, 1, 128)],
        Surface(cpu_rate, lambda _: (1.0,)),
        [(1, 2, 3, 4, 8, 16)],
    ),
    "mixed": (
        [Axis(64, 1, 1024), Axis(2, 1, 128)],
        Surface(mixed_rate, lambda p: busy(p, mixed_rate(p), (0.5, 0.08))),
        [(8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16, 32)],
    ),
    "files": (
        [Axis(2, 1, 64), Axis(1, 1, 16, is_room=True)],
        Surface(files_rate, lambda _: (1.0, 0.0)),
        [(1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)],
    ),
    "throttled": (
        [Axis(64, 1, 1024)],
        Surface(lambda p: min(offered(p), ALLOWED), lambda _: (1.0,), lambda p: max(0.0, 1 - ALLOWED / offered(p))),
        [(2, 4, 8, 16, 32, 64)],
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_reaches_the_best_of_a_grid(name: str) -> None:
    axes, surface, grid = SCENARIOS[name]
    best = max(surface.rate(point) for point in product(*grid))
    found, _ = search(axes, surface, seconds=60)
    assert surface.rate(found.point) >= 0.9 * best


@pytest.mark.parametrize("name", SCENARIOS)
def test_noise_never_makes_it_worse_than_the_start(name: str) -> None:
    """By what the point really gives, whatever was measured; and mostly it still finds what there is."""
    axes, surface, grid = SCENARIOS[name]
    best = max(surface.rate(point) for point in product(*grid))
    start = surface.rate(tuple(axis.start for axis in axes))
    reached = 0
    for seed in SEEDS:
        found, _ = search(axes, surface, seed=seed, noise=0.15, seconds=60)
        assert surface.rate(found.point) >= 0.9 * start, seed
        reached += surface.rate(found.point) >= 0.8 * best
    assert reached >= 0.9 * len(SEEDS)


def test_calls_that_are_refused_count_against_a_point() -> None:
    """The rate is the same from 10 calls on: the fewer of them, the fewer are refused."""
    axes, surface, _ = SCENARIOS["throttled"]
    found, _ = search(axes, surface)
    assert found.before.failed > 0.8
    assert found.after.failed < 0.2
    assert 10 <= found.point[0] <= 12


def test_a_consumer_that_does_not_wait_ends_it_at_once() -> None:
    axes, surface, _ = SCENARIOS["latency"]
    slow = Surface(surface.rate, surface.use, consumer=10.0)
    found, asked = search(axes, slow)
    assert (found.point, found.why, asked) == ((64, 1), "consumer", [(64, 1)])


def test_it_goes_no_further_than_the_consumer_takes() -> None:
    """As soon as the consumer does not wait, more is not looked for."""
    axes, surface, _ = SCENARIOS["latency"]
    slow = Surface(surface.rate, surface.use, consumer=300.0)
    found, asked = search(axes, slow)
    assert found.why == "consumer"
    assert found.point[0] == 128
    assert max(point[0] for point in asked) == 128


def test_what_ended_it_is_of_what_was_measured_last() -> None:
    """A consumer that seemed to take no more, and waits after all when that is measured again, is not the limit."""
    climbing = climb([Axis(1, 1, 64)])
    point, asked = next(climbing), 0
    while True:
        asked += 1
        waited = 0.01 if point[0] > 1 and asked < 4 else 0.5
        try:
            point = climbing.send(Measured(((10.0 * point[0], 0.1),) * 5, waited, (1.0,), 0.0, 30.0 - asked, 1.0))
        except StopIteration as end:
            found: Found = end.value
            break
    assert found.after.waited > 0.03
    assert found.why != "consumer"


def test_it_ends_early_when_no_change_helps() -> None:
    flat = Surface(lambda _: 100.0, lambda _: (1.0, 1.0))
    found, asked = search([Axis(64, 1, 1024), Axis(2, 1, 128)], flat, seconds=600)
    assert (found.point, found.why) == ((64, 2), "best")
    assert len(asked) < 30


def test_what_is_not_busy_is_left_alone() -> None:
    """A stage that waits for its input does not get faster by more places."""
    surface = Surface(lambda point: 10.0 * point[1], lambda _: (0.1, 1.0))
    _, asked = search([Axis(64, 1, 1024), Axis(2, 1, 16)], surface)
    assert {point[0] for point in asked} == {64}


def test_the_busiest_stage_is_tried_though_it_is_not_busy() -> None:
    """Of cheap calls, most of the time goes into crossing into threads: fewer of these are better."""
    surface = Surface(lambda point: 100.0 / point[0], lambda _: (0.3, 0.1))
    found, _ = search([Axis(4, 1, 128), Axis(2, 1, 128)], surface)
    assert found.point == (1, 2)


@pytest.mark.parametrize("seconds", [1.0, 3.0, 7.0, 30.0])
def test_the_time_is_enough_for_the_check_at_the_end(seconds: float) -> None:
    """A gain is not believed unchecked: the last points are the start and the best one in turn, within the time."""
    axes, surface, _ = SCENARIOS["mixed"]
    found, asked = search(axes, surface, seconds=seconds)
    assert (len(asked) - 1) * POINT_SECONDS <= seconds
    if found.point != asked[0]:
        assert asked[-4:] == [asked[0], found.point] * 2, "at least twice"


def test_what_was_luck_is_taken_back() -> None:
    """A point that looked good and is not, when it is measured again: the start stays."""
    climbing = climb([Axis(8, 1, 64)])

    def measured(rate: float, left: float) -> Measured:
        return Measured(((rate, 1.0),) * 5, 1.0, (1.0,), left=left, seconds=1.0)

    assert next(climbing) == (8,)
    assert climbing.send(measured(100, 10)) == (16,)
    point = climbing.send(measured(200, 5))  # and there is time for the check alone
    asked = [point]
    asked += [climbing.send(measured(100, 1)) for _ in range(3)]
    assert asked == [(8,), (16,), (8,), (16,)]
    with pytest.raises(StopIteration) as end:
        climbing.send(measured(100, 1))
    assert end.value.value.point == (8,)


@pytest.mark.parametrize("seed", range(20))
def test_it_stays_within_the_axes(seed: int) -> None:
    chance = random.Random(seed)
    axes = [
        Axis(start, 1, max(start, chance.randrange(1, 100)), chance.random() < 0.3)
        for start in chance.sample(range(1, 64), 3)
    ]
    surface = Surface(lambda _: chance.random() * 100, lambda _: (chance.random(),) * 3, lambda _: 0.1)
    _, asked = search(axes, surface, seed=seed)
    for point in asked:
        assert all(axis.least <= value <= axis.most for axis, value in zip(axes, point, strict=True))
