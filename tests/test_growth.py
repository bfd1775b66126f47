"""How long the first entry of a full window has been waited for, whatever is remembered of arrivals."""

import random
from collections import deque

import pytest

from aioloader.engine import room
from aioloader.engine.room import MANY, Growth


@pytest.mark.parametrize("seed", range(20))
def test_the_first_entry_is_waited_for_since_it_came(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Arrivals are forgotten in lots, or when somebody asks; a model that remembers each entry says the same."""
    rng = random.Random(seed)
    now = 0.0
    monkeypatch.setattr(room, "perf_counter", lambda: now)
    growth = Growth()
    held: deque[float] = deque()  # when each entry came, in order
    often = rng.choice((0.01, 0.3))
    for _ in range(2000):
        now += rng.random()
        count = rng.randint(1, 4)
        growth.came(count, len(held), now)
        held.extend([now] * count)
        assert len(growth._arrivals) <= MANY + len(held)
        for _ in range(rng.randint(0, min(7, len(held) - 1))):
            held.popleft()
        if rng.random() < often:
            assert growth.wait(len(held), 5.0) == pytest.approx(held[0] + 5.0 - now)
