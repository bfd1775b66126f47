"""`max_overtaken`: how far results may overtake a slower sample, where they come as they are finished."""

import asyncio
import random
from typing import Any

import pytest

from aioloader import Pipeline
from aioloader.core.cursors import CompletionCursor
from aioloader.core.entry import DROPPED, UNDER_WAY, Entry
from aioloader.engine.overtaking import Overtaking
from aioloader.testing import Gate, assert_resumes_exactly
from tests._support import Face, Steps, collect, on_both_faces, run, turns

on_bounds = pytest.mark.parametrize("most", [0, 1, 4])


def same(key: int) -> int:
    return key


@on_both_faces
@pytest.mark.parametrize("most", [1, 4])
def test_so_many_overtake_a_slow_sample_and_no_more(face: Face, most: int) -> None:
    """Then those after it wait for it, finished."""
    gate = Gate()
    gate.open(*range(1, 40))
    loop: asyncio.AbstractEventLoop | None = None

    async def fetch(key: int) -> int:
        nonlocal loop
        loop = asyncio.get_running_loop()
        await gate.passing(key)
        return key

    loader = Pipeline(range(40)).map(fetch, concurrency=40, ahead=40, ordered=False, max_overtaken=most)
    with Steps(loader, face) as steps:
        before = steps.rest(most)
        assert 0 not in before
        steps.until_arrived(gate, 40)
        steps.settle(loop)
        gate.open(0)
        after = steps.rest()
    assert sorted(before + after) == [*range(40)]
    assert after[0] == 0


@on_both_faces
def test_none_may_overtake_is_the_order_of_the_input(face: Face) -> None:
    """`max_overtaken=0`, with whatever is left out and whatever fails."""

    async def fetch(key: int) -> int:
        for _ in range(key * 7 % 5):
            await asyncio.sleep(0)
        if key % 10 == 9:
            raise ValueError(key)
        return key

    loader = Pipeline(range(60)).map(fetch, ordered=False, max_overtaken=0).filter(lambda key: key % 3)
    with Steps(loader, face) as steps:
        found = [outcome.args[0] if isinstance(outcome, ValueError) else outcome for outcome in steps.outcomes()]
    assert found == [key for key in range(60) if key % 3 or key % 10 == 9]


@pytest.mark.parametrize("seed", range(40))
def test_the_count_is_that_of_a_plain_model(seed: int) -> None:
    """Whoever is left out overtakes nobody; who is begun again is overtaken no more often for that."""
    draw = random.Random(seed)
    most = draw.choice((0, 1, 2, 5))
    overtaking, completion = Overtaking(most), CompletionCursor()
    entries = completion.comes([Entry(None, number, number) for number in range(60)])
    waiting, left = list(entries), set()
    under_way: list[Any] = []
    overtaken: dict[int, int] = {}
    while waiting or under_way:
        while waiting and len(under_way) < 8:
            entry = waiting.pop(0)
            overtaking.begins(entry)
            overtaken[entry.cursor[0]] = 0
            under_way.append(entry)
        entry = under_way.pop(draw.randrange(len(under_way)))
        if draw.random() < 0.1:
            entry.state = DROPPED
        for leaving in overtaking.finished(entry):
            number = leaving.cursor[0]
            assert number not in left
            left.add(number)
            if leaving.state == DROPPED:
                continue
            for other in under_way:
                if other.cursor[0] < number:
                    overtaken[other.cursor[0]] += 1
                    assert overtaken[other.cursor[0]] <= most
            if draw.random() < 0.3:  # sent back
                left.discard(number)
                leaving.state = UNDER_WAY
                waiting.append(leaving)
    assert left == set(range(1, 61))


def test_samples_that_are_sent_back_are_not_overtaken_more() -> None:
    """Six come back together, after the count had moved past them."""

    async def main() -> None:
        made, looked = Gate(), Gate()
        attempts: dict[int, int] = {}

        async def rollout(key: int) -> int:
            attempts[key] = attempts.get(key, -1) + 1
            await made.passing((key, attempts[key]))
            return key

        def stale(key: int) -> bool:
            attempt = attempts[key]
            looked.pass_sync((key, attempt))
            return key < 6 and not attempt

        samples = Pipeline(range(20)).map(rollout, concurrency=20, ahead=20, ordered=False, max_overtaken=1)
        loader = samples.drop_if(stale, requeue=True).batch(1, collate_fn=list).prefetch(20)
        found: list[int] = []

        async def consume() -> None:
            async for (key,) in loader:
                found.append(key)

        consumer = asyncio.create_task(consume())
        await made.until_arrived(20)
        for key in range(6):
            made.open((key, 0))
            await turns(50)
        looked.open(*((key, 0) for key in range(20)))
        await made.until_arrived(26)
        looked.open(*((key, 1) for key in range(20)))
        made.open(*((key, 1) for key in range(1, 6)))
        await turns()
        assert len(found) <= 1
        made.open_all()
        looked.open_all()
        await consumer
        assert sorted(found) == [*range(20)]

    run(main)


@on_both_faces
@on_bounds
@pytest.mark.parametrize("n", [0, 2])
def test_with_max_staleness_no_sample_is_older(face: Face, most: int, n: int) -> None:
    """`(batch_size * (n + 1) + most - 1) // batch_size` batches at most; after a resume, too."""
    oldest = 0
    handed = 0

    async def rollout(key: int) -> tuple[int, int]:
        begun = handed
        for _ in range(200 if key % 9 == 0 else key * 7 % 5):
            await asyncio.sleep(0)
        return key, begun

    def make() -> Pipeline:
        samples = Pipeline(range(90)).map(rollout, ordered=False, max_overtaken=most)
        return samples.batch(3, collate_fn=list).max_staleness(n)

    found: list[int] = []
    state: dict[str, Any] | None = None
    for limit in (7, None):
        loader = make()
        if state is not None:
            loader.load_state_dict(state)
        with Steps(loader, face) as steps:
            while limit is None or len(found) < 3 * limit:
                try:
                    batch = steps.next()
                except StopIteration:
                    break
                found += [key for key, _ in batch]
                oldest = max(oldest, *(handed - begun for _, begun in batch))
                handed += 1
            state = loader.state_dict()
            if face == "async for":
                steps.do(loader.aclose)
        loader.close()
    assert sorted(found) == [*range(90)]
    assert oldest <= (3 * (n + 1) + most - 1) // 3


def test_a_resume_loses_nothing() -> None:
    """Whatever was let go beyond a slow one."""

    async def fetch(key: int) -> int:
        for _ in range(key * 7 % 11):
            await asyncio.sleep(0)
        return key

    def make(concurrency: int) -> Pipeline:
        samples = Pipeline(range(40)).map(fetch, concurrency=concurrency, ordered=False, max_overtaken=3)
        return samples.batch(3, collate_fn=list)

    assert_resumes_exactly(make, variants=[{"concurrency": 8}, {"concurrency": 3}], samples=list, limit=10)


@on_both_faces
def test_a_failed_source_waits_for_all_before_it(face: Face) -> None:
    """Those that are held are given first."""

    def source() -> Any:
        yield from range(10)
        raise OSError("gone")

    async def fetch(key: int) -> int:
        for _ in range(100 if key == 2 else 0):
            await asyncio.sleep(0)
        return key

    with Steps(Pipeline(source).map(fetch, ordered=False, max_overtaken=1), face) as steps:
        *found, error = steps.outcomes()
    assert sorted(found) == [*range(10)]
    assert isinstance(error, OSError)


def test_it_is_refused_where_nothing_overtakes() -> None:
    """With the rule and the way out."""
    with pytest.raises(ValueError, match=r"max_overtaken needs ordered=False.*leave it out"):
        Pipeline(range(4)).map(same, max_overtaken=2)
    with pytest.raises(ValueError, match="max_overtaken"):
        Pipeline(range(4)).map(same, ordered=False, max_overtaken=-1)
    with pytest.raises(TypeError):
        Pipeline(range(4)).map(same, ordered=False, max_overtaken=1.5)  # type: ignore[call-overload]
    assert collect(Pipeline(range(4)).map(same, ordered=False, max_overtaken=0), "for") == [0, 1, 2, 3]
