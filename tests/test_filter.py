"""`filter`: its concurrency, and the error of one that lets nothing pass."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aioloader import Limit, NothingPassesError, Pipeline, Retry
from aioloader.sources import Channel
from aioloader.testing import Gate, assert_resumes_exactly
from tests._support import Face, Started, Steps, collect, on_both_faces
from tests._work import tens

pytestmark = pytest.mark.usefixtures("fork_server")

HOW = ("async", "threads", "process", "in_process")


def refuse(sample: int) -> bool:
    """Nothing passes."""
    return sample < 0


def as_async(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def awaited(sample: Any) -> Any:
        await asyncio.sleep(0)
        return fn(sample)

    awaited.__qualname__ = fn.__qualname__
    return awaited


def outcomes(loader: Any, face: Face, limit: int = 1000) -> list[Any]:
    """Samples, and the names of the errors in their places."""
    with Steps(loader, face) as steps:
        found = steps.outcomes(limit)
        if len(found) == limit and face == "for":
            loader.close()
    return [type(one).__name__ if isinstance(one, BaseException) else one for one in found]


N = "NothingPassesError"


# -- nothing passes --------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("how", HOW)
def test_the_sample_that_is_one_too_many_fails_at_its_place(face: Face, how: str) -> None:
    """Each of three that are allowed is left out, the fourth fails, and the count begins anew."""
    keep = as_async(tens) if how == "async" else tens
    loader = Pipeline(range(25))
    if how == "process":
        loader = loader.map(abs, executor="process", concurrency=2)
    loader = loader.filter(keep, max_dropped_in_a_row=3)
    if how == "in_process":
        loader = loader.in_process()
    assert outcomes(loader, face) == [0, N, N, 10, N, N, 20, N]
    stages = loader.stats().stages
    assert (sum(stage.errors for stage in stages), sum(stage.dropped for stage in stages)) == (5, 22)
    loader.close()


@on_both_faces
def test_the_error_says_what_was_refused_and_where(face: Face) -> None:
    loader = Pipeline(range(2000)).filter(refuse, max_dropped_in_a_row=1000)
    with Steps(loader, face) as steps:
        (error,) = steps.outcomes()
    assert isinstance(error, NothingPassesError)
    assert isinstance(error, RuntimeError)
    assert str(error) == (
        "filter(refuse) has refused 1,001 samples in a row, the last one with key 1000, and max_dropped_in_a_row=1000 "
        "allows no more; look at what it gets and why it refuses that, or allow more"
    )
    assert error.__notes__ == ["aioloader: stage filter(refuse), key 1000, epoch 0, position 1000"]


@on_both_faces
def test_an_endless_epoch_ends_in_an_error(face: Face) -> None:
    """`repeat` before the filter: it never comes to an end, and nothing would ever come out."""
    loader = Pipeline(range(7)).repeat().map(abs).filter(refuse, max_dropped_in_a_row=50).batch(2)
    assert outcomes(loader, face, 2) == [N, N]


@on_both_faces
def test_the_batch_that_would_have_had_it_fails_and_the_next_one_comes(face: Face) -> None:
    loader = Pipeline(range(24)).filter(tens, max_dropped_in_a_row=7).batch(2, collate_fn=list)
    assert outcomes(loader, face) == [N, N, [20]]  # 0 and the one for 8, 10 and the one for 18


@on_both_faces
def test_samples_that_failed_before_neither_count_nor_begin_anew(face: Face) -> None:
    """The filter has not seen them."""

    def fetch(key: int) -> int:
        if key in (2, 3):
            raise KeyError(key)
        return key

    loader = Pipeline(range(1, 8)).map(fetch).filter(refuse, max_dropped_in_a_row=2)
    assert outcomes(loader, face) == ["KeyError", "KeyError", N]  # 1, 4 and 5
    own = Pipeline(range(1, 8)).filter(lambda sample: fetch(sample) < 0, max_dropped_in_a_row=2)
    assert outcomes(own, face) == ["KeyError", "KeyError", N]  # it raised itself


@on_both_faces
def test_a_sample_that_passes_begins_anew_whatever_becomes_of_it(face: Face) -> None:
    """A later filter refuses it, or a later function fails."""

    def fail(sample: int) -> int:
        if sample == 3:
            raise KeyError
        return sample

    def third(sample: int) -> bool:
        return sample % 3 == 0

    for late in (Pipeline.filter, later_map):
        loader = Pipeline(range(1, 10)).filter(third, max_dropped_in_a_row=2)
        assert N not in outcomes(late(loader, refuse), face)
    loader = Pipeline(range(1, 6)).filter(third, max_dropped_in_a_row=2).map(fail)
    assert outcomes(loader, face) == ["KeyError"]


@on_both_faces
@pytest.mark.parametrize("kinds", [("s", "s"), ("a", "a"), ("s", "a"), ("a", "s")])
def test_a_sample_that_passes_when_it_is_tried_again_begins_anew_as_well(face: Face, kinds: tuple[str, str]) -> None:
    attempts: Counter[int] = Counter()

    def fails_once(sample: int) -> int:
        attempts[sample] += 1
        if sample % 3 == 2 and attempts[sample] == 1:
            raise OSError(sample)
        return sample

    def third(sample: int) -> bool:
        return sample % 3 == 2

    first, second = (as_async if kind == "a" else like for kind in kinds)
    loader = Pipeline(range(12)).map(first(fails_once), retry=Retry(2, wait_initial=0, jitter=0))
    loader = loader.filter(first(third), max_dropped_in_a_row=2).filter(second(refuse))
    assert outcomes(loader, face) == []


def like(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`fn` as it is."""
    return fn


def later_map(loader: Pipeline, _: Any) -> Pipeline:
    return loader.map(fail_always)


def fail_always(sample: Any) -> Any:
    raise KeyError(sample)


@on_both_faces
@pytest.mark.parametrize("kinds", [("s", "s"), ("a", "a"), ("s", "a"), ("a", "s")])
def test_each_filter_counts_for_itself(face: Face, kinds: tuple[str, str]) -> None:
    """Who refused a sample is known, in one hop and in several steps; what comes before a filter is not its own."""

    def even(sample: int) -> bool:
        return sample % 2 == 0

    def large(sample: int) -> bool:
        return sample >= 100

    def made(kind: str, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return as_async(fn) if kind == "a" else fn

    one, two = made(kinds[0], even), made(kinds[1], large)
    first = Pipeline(range(12)).filter(one, max_dropped_in_a_row=1).filter(two)
    assert outcomes(first, face) == []
    second = Pipeline(range(12)).filter(one).filter(two, max_dropped_in_a_row=3)
    with Steps(second, face) as steps:
        (error,) = steps.outcomes()
    assert "filter(" in str(error)
    assert "large" in str(error)
    assert "with key 6" in str(error)
    both = Pipeline([1, 3, 0, 2, 4, 1, 3, 5]).filter(one, max_dropped_in_a_row=2).filter(two, max_dropped_in_a_row=2)
    with Steps(both, face) as steps:
        found = steps.outcomes()
    assert ["large" in str(error) for error in found] == [True, False]


@on_both_faces
def test_completion_order_is_what_is_counted_without_another(face: Face) -> None:
    """As they leave: the slow one in front is not the first of the row."""
    gate = Gate()

    async def keep(sample: int) -> bool:
        await gate.passing(sample)
        return False

    loader = Pipeline(range(4)).map(as_async(abs), ordered=False).filter(keep, max_dropped_in_a_row=2)
    with Steps(loader, face) as steps:
        for key in (3, 2, 1):
            gate.open(key)
        error = steps.outcomes(1)[0]
        gate.open_all()
        assert steps.outcomes() == []
    assert isinstance(error, NothingPassesError)
    assert "3 samples in a row" in str(error)
    assert "with key 0" not in str(error)


@on_both_faces
def test_a_cache_that_knows_who_was_refused_counts_them_too(face: Face, tmp_path: Path) -> None:
    """The second epoch asks no filter, and is the same."""
    for store in ({"memory_bytes": 1 << 20}, {"disk": tmp_path / face.replace(" ", "_")}):
        with Pipeline(range(25)).map(abs).filter(tens, max_dropped_in_a_row=6).cache(**store) as loader:
            for _ in range(2):
                assert outcomes(loader, face) == [0, N, 10, N, 20]


@on_both_faces
def test_a_cache_behind_several_filters_knows_only_what_is_made_now(face: Face) -> None:
    """Which of them had refused a sample is not kept: then it counts for none of them."""
    with Pipeline(range(25)).filter(tens, max_dropped_in_a_row=6).filter(always).cache(memory_bytes=1 << 20) as loader:
        assert outcomes(loader, face) == [0, N, 10, N, 20]
        assert outcomes(loader, face) == [0, 10, 20]


def always(_: Any) -> bool:
    return True


@on_both_faces
def test_what_failed_in_another_window_says_nothing_about_the_filters_of_this_one(face: Face) -> None:
    """It had passed a filter there, and has not come to the one here."""
    loader = Pipeline(range(6)).filter(always, max_dropped_in_a_row=9).map(some_fail).skip(0)
    loader = loader.filter(refuse, max_dropped_in_a_row=3)
    assert outcomes(loader, face) == ["KeyError", N]  # 3, and then 4: the fourth that came to it


@on_both_faces
def test_the_samples_that_may_begin_are_no_more_for_it(face: Face) -> None:
    """One that fails is not left out: with `max_staleness`, the next sample begins when its batch is asked for."""
    begun: list[int] = []

    async def note(sample: int) -> int:
        begun.append(sample)
        loops.append(asyncio.get_running_loop())
        return sample

    loops: list[asyncio.AbstractEventLoop] = []
    loader = Pipeline(range(1000)).map(note).filter(refuse, max_dropped_in_a_row=1).batch(2).max_staleness(0)
    with Steps(loader, face) as steps:
        for count in range(1, 20):
            assert isinstance(steps.outcomes(1)[0], NothingPassesError)
            steps.settle(loops[0])
            assert len(begun) == 4 * count  # two failed, for which one each was left out
        loader.close() if face == "for" else steps.do(loader.aclose)


@on_both_faces
def test_a_channel_whose_samples_are_all_refused(face: Face) -> None:
    """Live sources too, and nobody waits for ever."""
    channel = Channel(10)
    for number in range(5):
        channel.send_nowait(number)
    loader = Pipeline(channel).filter(refuse, max_dropped_in_a_row=4)
    assert outcomes(loader, face, 1) == [N]


def some_fail(sample: int) -> int:
    if sample % 7 == 3:
        raise KeyError(sample)
    return sample


def some_pass(sample: int) -> bool:
    return sample % 11 == 0


def few_pass(sample: int) -> bool:
    return sample % 5 != 0


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_resume_goes_on_with_the_count(batch_size: int, is_async: bool) -> None:
    """Also right after a sample that failed before the filter, in the middle of a row."""

    def make(concurrency: int = 2) -> Pipeline:
        fn = as_async(some_fail) if is_async else some_fail
        loader = Pipeline(range(80)).map(fn, concurrency=concurrency)
        loader = loader.filter(few_pass, max_dropped_in_a_row=1).filter(some_pass, max_dropped_in_a_row=4)
        return loader.batch(batch_size, collate_fn=list)

    assert_resumes_exactly(make, variants=({}, {"concurrency": 5}))


def test_a_resume_in_any_pipeline_of_filters_and_failures() -> None:
    """60 pipelines that are drawn: filters with and without a limit, failures before, between and after."""
    for seed in range(60):
        draw = random.Random(seed)
        count = draw.randint(10, 40)
        table = [[draw.random() < draw.choice([0.2, 0.8]) for _ in range(count)] for _ in range(3)]
        fails = [{key for key in range(count) if draw.random() < 0.15} for _ in range(3)]
        limits = [draw.choice([None, 1, 2, 4]) for _ in range(3)]
        asyncs = [draw.random() < 0.4 for _ in range(3)]
        size = draw.randint(1, 3)

        def make(
            table: Any = table,
            fails: Any = fails,
            limits: Any = limits,
            asyncs: Any = asyncs,
            size: int = size,
            n: int = count,
        ) -> Pipeline:
            loader = Pipeline(range(n))
            for passes, failing, limit, is_async in zip(table, fails, limits, asyncs, strict=True):

                def work(sample: int, failing: Any = failing) -> int:
                    if sample in failing:
                        raise KeyError(sample)
                    return sample

                def keep(sample: int, passes: Any = passes) -> Any:
                    return passes[sample]

                fn, predicate = (as_async(work), as_async(keep)) if is_async else (work, keep)
                loader = loader.map(fn, concurrency=2).filter(predicate, max_dropped_in_a_row=limit)
            return loader.batch(size, collate_fn=list)

        expected = plain(range(count), table, fails, limits, size)
        assert outcomes(make(), "for") == expected, f"{seed=}"
        assert_resumes_exactly(make, epochs=1, limit=6)


def plain(keys: Any, table: Any, fails: Any, limits: Any, size: int) -> list[Any]:
    """What a loop would give."""
    counts = [0, 0, 0]
    found: list[Any] = []
    for key in keys:
        outcome: Any = key
        for at, (passes, failing, limit) in enumerate(zip(table, fails, limits, strict=True)):
            if key in failing:
                outcome = "KeyError"
                break
            if passes[key]:
                counts[at] = 0
                continue
            outcome = None
            counts[at] += 1
            if limit is not None and counts[at] > limit:
                counts[at] = 0
                outcome = N
            break
        if outcome is not None:
            found.append(outcome)
    batches = [found[start : start + size] for start in range(0, len(found), size)]
    return [next((one for one in batch if isinstance(one, str)), batch) for batch in batches]


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"max_dropped_in_a_row": 0}, ValueError, "max_dropped_in_a_row must be at least 1, got 0; leave it out"),
        ({"max_dropped_in_a_row": 1.5}, TypeError, "max_dropped_in_a_row must be an integer of at least 1, got 1.5"),
        ({"max_dropped_in_a_row": True}, TypeError, "max_dropped_in_a_row must be an integer"),
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1, got 0"),
        ({"concurrency": "8"}, TypeError, "concurrency must be an integer of at least 1, got '8'"),
        ({"concurrency": False}, TypeError, "concurrency must be an integer"),
    ],
)
def test_wrong_numbers_are_refused_when_the_filter_is_described(
    wrong: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Pipeline(range(3)).filter(refuse, **wrong)


# -- concurrency -----------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("is_async", [False, True])
def test_so_many_samples_are_looked_at_at_once(face: Face, is_async: bool) -> None:
    """And no more, whatever the stage before it has."""
    gate = Gate()

    async def keep(sample: int) -> bool:
        await gate.passing(sample)
        return True

    def keep_sync(sample: int) -> bool:
        gate.pass_sync(sample)
        return True

    loader = Pipeline(range(40)).map(abs, concurrency=5).filter(keep if is_async else keep_sync, concurrency=3)
    with Steps(loader, face) as steps:
        with_first = start(steps, face)
        steps.until_arrived(gate, 3)
        assert len(gate.arrived) == 3
        gate.open_all()
        assert with_first() == 0
        assert steps.rest() == list(range(1, 40))
    by_name = {stage.name.partition("(")[0]: stage.concurrency for stage in loader.stats().stages}
    assert by_name["filter"] == 3
    assert by_name["map"] == 5


@on_both_faces
def test_a_limit_is_shared_by_a_source_a_map_and_a_filter(face: Face) -> None:
    """All three take one; no more calls than it says are under way in all of them together."""
    limit = Limit(2)
    under_way = 0
    most = 0

    async def work(sample: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return sample + 1

    class Source:
        def __len__(self) -> int:
            return 50

        async def __getitem__(self, key: int) -> int:
            return await work(key) - 1

    loader = Pipeline(Source(), concurrency=limit).map(work, concurrency=limit).filter(work, concurrency=limit)
    assert collect(loader, face) == list(range(1, 51))
    assert (most, under_way, limit.under_way) == (2, 0, 0)
    for alone in (Pipeline(Source(), concurrency=limit), Pipeline(range(3)).filter(work, concurrency=limit)):
        with pytest.raises(ValueError, match="Limit"):
            alone.in_process()


def start(steps: Steps, face: Face) -> Callable[[], Any]:
    """Ask for the first sample, and return what waits for it."""
    if face == "for":
        asking = Started(steps.next)
        return asking.outcome

    async def ask() -> Any:
        return asyncio.ensure_future(anext(steps._iterator))

    task = steps.do(ask)

    async def first() -> Any:
        return await task

    return lambda: steps.do(first)


@on_both_faces
def test_without_a_number_a_filter_is_part_of_the_hop_beside_it(face: Face) -> None:
    """As before; with the same number, too."""
    for concurrency in (None, 2):
        loader = Pipeline(range(10)).map(abs, concurrency=2).filter(tens, concurrency=concurrency)
        assert collect(loader, face) == [0]
        assert "map(abs) + filter(tens)" in [stage.name for stage in loader.stats().stages]
    loader = Pipeline(range(10)).map(abs, concurrency=2).filter(tens, concurrency=3)
    assert collect(loader, face) == [0]
    assert [stage.concurrency for stage in loader.stats().stages[1:]] == [2, 3]


@pytest.mark.parametrize("face", ["for", "async for"])
def test_that_nothing_passes_is_not_skipped(face: Face) -> None:
    """`skip_errors` leaves out samples, and not what says that the epoch would never end."""
    loader = Pipeline(range(1000)).filter(refuse_all, max_dropped_in_a_row=10).skip_errors().batch(4, collate_fn=list)
    with Steps(loader, face) as steps, pytest.raises(NothingPassesError):
        steps.next()


def refuse_all(_: int) -> bool:
    return False
