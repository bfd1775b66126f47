"""`batch_by_length`: budgets are kept, nothing is lost, and each batch can be resumed from."""

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from aioloader import Pipeline, StateError
from aioloader.stages.length_plan import OpenBatch, TokenBudget, plan_window
from aioloader.testing import Gate, assert_resumes_exactly
from tests._support import Face, Steps, collect, notes, on_both_faces

Document = list[int]

LENGTHS = [1 + number * 7 % 23 for number in range(60)]
DOCUMENTS: list[Document] = [[number] * length for number, length in enumerate(LENGTHS)]


def by_length(source: Any = DOCUMENTS, max_tokens: int = 64, **how: Any) -> Pipeline:
    given: dict[str, Any] = {"window": 20, "collate_fn": list} | how
    return Pipeline(source).batch_by_length(max_tokens, len, **given)


def names(batches: list[Any]) -> list[int]:
    return sorted(document[0] for batch in batches for document in batch)


def fails(document: Document) -> Document:
    if document[0] % 11 == 3:
        raise RuntimeError(f"document {document[0]}")
    return document


# -- budgets -----------------------------------------------------------------------------------------------------------


def generated(seed: int) -> tuple[list[int], TokenBudget]:
    rng = random.Random(seed)
    longest = rng.choice([3, 40, 500])
    lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 60))]
    return lengths, TokenBudget(rng.randint(1, 1000), rng.random() < 0.5, rng.choice([None, None, 1, 4]))


def within(lengths: list[int], budget: TokenBudget) -> bool:
    """Whether samples of these lengths may be in one batch: what the budget says, in other words."""
    if budget.max_samples is not None and len(lengths) > budget.max_samples:
        return False
    tokens = max(lengths) * len(lengths) if budget.padded else sum(lengths)
    return len(lengths) == 1 or tokens <= budget.max_tokens


def test_no_window_passes_the_budget_and_each_sample_is_in_one_batch() -> None:
    """In ten thousand generated cases."""
    for seed in range(10_000):
        lengths, budget = generated(seed)
        batches = plan_window(lengths, budget, seed)
        assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
        assert all(within([lengths[number] for number in batch], budget) for batch in batches), seed


def test_no_batch_in_order_passes_the_budget_nor_could_hold_the_next_sample() -> None:
    """Against the plain rule."""
    for seed in range(2_000):
        lengths, budget = generated(seed)
        batches: list[list[int]] = [[]]
        open_batch = OpenBatch(budget)
        for length in lengths:
            if not open_batch.fits(length):
                assert not within([*batches[-1], length], budget)
                batches.append([])
                open_batch.clear()
            open_batch.add(length)
            batches[-1].append(length)
            assert open_batch.full == (not within([*batches[-1], 1], budget))
        assert all(within(batch, budget) for batch in batches)


def test_a_window_of_2048_pads_little() -> None:
    """Lengths as those of documents are: the logarithm is normal."""
    rng = random.Random(0)
    lengths = [max(1, int(rng.lognormvariate(6, 1))) for _ in range(20_480)]
    padded = 0
    for start in range(0, len(lengths), 2048):
        window = lengths[start : start + 2048]
        for batch in plan_window(window, TokenBudget(16_384), 0):
            padded += len(batch) * max(window[number] for number in batch)
    assert 1 - sum(lengths) / padded <= 0.05


# -- what it gives -----------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
@pytest.mark.parametrize("padded", [True, False])
def test_all_samples_come_once_within_the_budget(window: int | None, padded: bool, face: Face) -> None:
    """Whatever the window."""
    budget = TokenBudget(64, padded, 5)
    batches = collect(by_length(window=window, padded=padded, max_samples=5), face)
    assert names(batches) == list(range(60))
    assert all(within(list(map(len, batch)), budget) for batch in batches)


@on_both_faces
def test_without_a_window_the_order_is_kept(face: Face) -> None:
    """A batch is closed before the sample that would pass the budget."""
    documents = [[0] * length for length in (3, 3, 4, 10, 2, 2, 2, 2)]
    batches = collect(by_length(documents, 12, window=None), face)
    assert [list(map(len, batch)) for batch in batches] == [[3, 3, 4], [10], [2, 2, 2, 2]]


@on_both_faces
def test_a_full_batch_does_not_wait_for_the_next_sample(face: Face) -> None:
    """Of a source that has none at the moment."""
    gate = Gate()

    async def source() -> Any:
        yield [0] * 6
        yield [1] * 6
        await gate.passing()
        yield [2]

    loader = Pipeline(source).batch_by_length(12, len, window=None, collate_fn=list)
    with Steps(loader, face) as steps:
        assert [document[0] for document in steps.next()] == [0, 1]
        gate.open_all()
        assert steps.next() == [[2]]


def test_the_order_of_batches_is_of_the_seed_the_epoch_and_the_window() -> None:
    """And of nothing else."""
    loader = by_length()
    first, second = list(loader), list(loader)
    assert first == list(by_length()) == list(by_length().prefetch(0))
    assert first != second
    assert names(first) == names(second)
    assert first != list(by_length(seed=1))
    lengths = [max(map(len, batch)) for batch in first]
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_the_order_does_not_depend_on_concurrency(concurrency: int) -> None:
    """Nor on what finishes first."""

    async def later(document: Document) -> Document:
        return document

    loader = Pipeline(DOCUMENTS).map(later, concurrency=concurrency)
    assert list(loader.batch_by_length(64, len, window=20, collate_fn=list)) == list(by_length())


@on_both_faces
def test_the_next_window_comes_in_while_one_is_given(face: Face) -> None:
    """One sample for each that is gone, and no more are held than a window has."""
    begun: list[int] = []

    def load(document: Document) -> Document:
        begun.append(document[0])
        return document

    loader: Pipeline = Pipeline(DOCUMENTS).map(load, concurrency=2, ahead=2)
    loader = loader.batch_by_length(64, len, window=20, collate_fn=list).prefetch(1)
    with Steps(loader, face) as steps:
        given = 0
        while (batch := steps.next()) and given < 30:
            given += len(batch)
            longest = 64  # samples in the batches that are on their way
            assert len(begun) <= given + 20 + 2 + longest
        assert len(begun) >= given


@on_both_faces
def test_the_next_window_comes_in_while_nobody_asks(face: Face) -> None:
    """The consumer trains, and what was given is made good, though no more than two samples are under way at a time."""
    begun: list[int] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def load(document: Document) -> Document:
        loops.append(asyncio.get_running_loop())
        begun.append(document[0])
        return document

    loader: Pipeline = Pipeline(DOCUMENTS * 5).map(load, concurrency=2, ahead=2)
    loader = loader.batch_by_length(300, len, window=30, collate_fn=list).prefetch(1)
    with Steps(loader, face) as steps:
        given = len(steps.next())
        steps.settle(loops[0])
        count = len(begun)
        given += len(steps.next())  # it was ready
        assert count >= given + 30


def test_a_field_may_tell_the_length() -> None:
    """By its name."""
    samples = [{"text": [0] * 3, "name": "a"}, {"text": [0] * 5, "name": "b"}]
    (batch,) = Pipeline(samples).batch_by_length(10, "text", collate_fn=list)
    assert {sample["name"] for sample in batch} == {"a", "b"}


@on_both_faces
def test_what_is_too_long(face: Face) -> None:
    """Is alone in a batch, is left out and counted, or is an error that names it."""
    documents = [[0] * 3, [1] * 30, [2] * 4]
    assert sorted(map(len, collect(by_length(documents, 10), face))) == [1, 2]
    loader = by_length(documents, 10, too_long="drop")
    with Steps(loader, face) as steps:
        assert [len(batch) for batch in steps.rest()] == [2]
        assert sum(stage.dropped for stage in loader.stats().stages) == 1
    with Steps(by_length(documents, 10, too_long="error"), face) as steps:
        error, batch = steps.outcomes()
    assert isinstance(error, ValueError)
    assert "30 tokens" in str(error)
    assert "batch_by_length(10), key 1, epoch 0, position 1" in notes(error)
    assert [len(document) for document in batch] == [3, 4]


@on_both_faces
@pytest.mark.parametrize("told", [0, -1, 2.5, "3", None, True])
def test_a_length_that_is_none_is_an_error_of_that_sample(told: Any, face: Face) -> None:
    """Which is named; its neighbours come."""

    def length(document: Document) -> Any:
        return told if document[0] == 1 else len(document)

    loader = Pipeline(DOCUMENTS[:4]).batch_by_length(100, length, collate_fn=list)
    with Steps(loader, face) as steps:
        error, batch = steps.outcomes()
    assert isinstance(error, ValueError if type(told) is int else TypeError)
    assert "integer of at least 1" in str(error)
    assert "key 1," in notes(error)
    assert names([batch]) == [0, 2, 3]


@on_both_faces
@pytest.mark.parametrize("window", [None, 20])
def test_a_failed_sample_costs_no_other_one(window: int | None, face: Face) -> None:
    """It is raised alone, whether `skip_errors` comes before or after."""
    bad = {number for number in range(60) if number % 11 == 3}
    pipeline = Pipeline(DOCUMENTS).map(fails)
    how: Any = {"window": window, "collate_fn": list}
    with Steps(pipeline.batch_by_length(64, len, **how), face) as steps:
        outcomes = steps.outcomes()
    errors = [outcome for outcome in outcomes if isinstance(outcome, RuntimeError)]
    assert {int(str(error).split()[1]) for error in errors} == bad
    kept = [outcome for outcome in outcomes if not isinstance(outcome, RuntimeError)]
    assert names(kept) == [number for number in range(60) if number not in bad]
    for loader in (
        pipeline.batch_by_length(64, len, **how).skip_errors(),
        pipeline.skip_errors().batch_by_length(64, len, **how),
    ):
        assert names(collect(loader, face)) == names(kept)


@on_both_faces
@pytest.mark.parametrize(
    ("sample", "error", "match"),
    [
        ({"text": "x"}, ValueError, r"its field 'ids', and this one has none of that name, got the fields \['text'\]"),
        ([1, 2], ValueError, r"none of that name, got \[1, 2\]; name another one"),
        ({"ids": 3}, TypeError, "here by ids, must be an integer of at least 1, and that field has no length: object"),
        ({"ids": []}, ValueError, "here by ids, must be an integer of at least 1, got 0"),
    ],
)
def test_a_field_that_tells_no_length_is_named(sample: Any, error: type[Exception], match: str, face: Face) -> None:
    """As an error of its sample alone, in `pack` as well."""
    good = {"ids": [1, 2]}
    samples = Pipeline(range(3)).map([good, sample, good].__getitem__)
    for loader in (samples.batch_by_length(8, "ids", collate_fn=list), samples.pack(8, length="ids")):
        with Steps(loader, face) as steps:
            first, second = steps.outcomes()
        with pytest.raises(error, match=match):
            raise first
        assert "key 1," in notes(first)
        assert not isinstance(second, Exception)


def test_in_order_an_error_is_between_its_neighbours() -> None:
    """After those before it, and before those after it."""
    loader = Pipeline(DOCUMENTS[:6]).map(fails).batch_by_length(1000, len, window=None, collate_fn=list)
    with Steps(loader, "for") as steps:
        before, error, after = steps.outcomes()
    assert (names([before]), str(error), names([after])) == ([0, 1, 2], "document 3", [4, 5])


def test_the_default_collate_says_what_to_do_about_several_lengths() -> None:
    """Which sample has which, and that a function may pad."""
    with Steps(Pipeline(DOCUMENTS[:2]).batch_by_length(100, len), "for") as steps:
        (error,) = steps.outcomes()
    assert "sample 1 (key 1) has length 8; pass collate_fn= that pads" in notes(error)


def test_a_batch_knows_its_samples() -> None:
    """Keys and positions, in the order of the batch."""
    for batch, info in by_length().with_info():
        assert [document[0] for document in batch] == list(info.keys) == list(info.positions)


def test_samples_that_went_stale_in_the_window_are_left_out() -> None:
    """By a `drop_if` right before, just before collate."""
    stale: set[int] = set()
    loader: Pipeline = Pipeline(DOCUMENTS).drop_if(lambda document: document[0] in stale)
    loader = loader.batch_by_length(64, len, window=20, collate_fn=list).prefetch(0)
    with Steps(loader, "for") as steps:
        first = steps.next()
        stale |= set(range(60)) - {document[0] for document in first}
        assert steps.rest() == []


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 20])
def test_whole_batches_are_dealt_as_many_to_each_rank(window: int | None) -> None:
    """For any number of ranks."""
    whole = list(by_length(window=window))
    for world_size in range(1, 9):
        ranks = [list(by_length(window=window).shard(rank, world_size)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        dealt = [batches[number] for number in range(len(ranks[0])) for batches in ranks]
        assert dealt[: len(whole)] == whole


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 8), (8, 1), (4, 4)])
def test_any_number_of_ranks_goes_on(before: int, after: int) -> None:
    """With the batches that were to come."""
    whole = list(by_length())
    states = []
    for rank in range(before):
        with Steps(by_length().shard(rank, before), "for") as steps:
            [steps.next() for _ in range(2)]
            states.append(json.dumps(steps._loader.state_dict()))  # type: ignore[attr-defined]
            steps._loader.close()
    assert len(set(states)) == 1
    ranks = []
    for rank in range(after):
        loader = by_length().shard(rank, after)
        loader.load_state_dict(json.loads(states[0]))
        ranks.append(list(loader))
    dealt = [batches[number] for number in range(len(ranks[0])) for batches in ranks]
    assert dealt[: len(whole) - 2 * before] == whole[2 * before :]


# -- resume ------------------------------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[..., Pipeline]] = {
    "a window": lambda **how: loaded(**how).batch_by_length(64, len, window=20, collate_fn=list),
    "shuffled": lambda **how: loaded(shuffled=True, **how).batch_by_length(64, len, window=13, collate_fn=list),
    "in order": lambda **how: loaded(**how).batch_by_length(64, len, window=None, collate_fn=list),
    "errors": lambda **how: loaded(fails, **how).batch_by_length(64, len, window=20, collate_fn=list),
    "errors in order": lambda **how: loaded(fails, **how).batch_by_length(64, len, window=None, collate_fn=list),
    "dropped": lambda **how: loaded(**how).batch_by_length(12, len, window=20, too_long="drop", collate_fn=list),
    "dealt": lambda **how: loaded(**how).batch_by_length(64, len, window=20, collate_fn=list).shard(1, 3),
    "repeated": lambda **how: loaded(**how).batch_by_length(64, len, window=40, collate_fn=list).repeat(2),
    "a stream": lambda **_: Pipeline(lambda: iter(DOCUMENTS)).batch_by_length(64, len, window=20, collate_fn=list),
    "several sources": lambda **how: Pipeline.interleave(loaded(**how), DOCUMENTS).batch_by_length(
        64, len, window=40, collate_fn=list
    ),
}


def loaded(load: Callable[[Document], Document] = list, *, concurrency: int = 4, shuffled: bool = False) -> Pipeline:
    pipeline = Pipeline(DOCUMENTS)
    return (pipeline.shuffle(seed=2) if shuffled else pipeline).map(load, concurrency=concurrency)


@pytest.mark.parametrize("name", LOADERS)
def test_it_resumes_exactly_at_every_batch(name: str) -> None:
    """With other concurrency, on both faces."""
    assert_resumes_exactly(LOADERS[name], variants=({}, {"concurrency": 1}, {"concurrency": 16}), limit=40)


@pytest.mark.parametrize("now_fail", [set(), {3, 14, 15, 16, 25}, set(range(20))])
def test_samples_that_fail_after_a_resume_only_cost_no_other_one(now_fail: set[int]) -> None:
    """Nor those that failed before it only: each comes once, or has its error."""
    failing: set[int] = set()

    def load(document: Document) -> Document:
        if document[0] in failing:
            raise RuntimeError(str(document[0]))
        return document

    def seen(outcomes: list[Any]) -> list[int]:
        errors = [int(str(outcome)) for outcome in outcomes if isinstance(outcome, RuntimeError)]
        return errors + names([outcome for outcome in outcomes if not isinstance(outcome, RuntimeError)])

    for taken in range(8):
        failing.clear()
        failing.update({5, 14})
        loader = Pipeline(DOCUMENTS[:40]).map(load).batch_by_length(64, len, window=20, collate_fn=list)
        with Steps(loader, "for") as steps:
            before = steps.outcomes(taken) if taken else []
            state = loader.state_dict()
            loader.close()
        failing.clear()
        failing.update(now_fail)
        loader.load_state_dict(state)
        with Steps(loader, "for") as steps:
            after = steps.outcomes()
        assert all(within(list(map(len, batch)), TokenBudget(64)) for batch in after if isinstance(batch, list))
        assert sorted(seen(before) + seen(after)) == list(range(40)), taken


def test_the_state_is_as_large_as_a_window_and_no_larger() -> None:
    """However long the epoch is."""
    documents = [[0] * (1 + number % 9) for number in range(3_000)]
    loader = Pipeline(documents).batch_by_length(256, len, window=100, collate_fn=list)
    assert max(len(json.dumps(loader.state_dict())) for _ in loader) < 1_000


@on_both_faces
def test_a_source_among_several_that_fails_costs_no_sample(face: Face) -> None:
    """Of those that go on, whatever the window holds then."""

    async def broken() -> Any:
        for document in DOCUMENTS[:7]:
            yield document
        raise OSError("gone")

    loader = Pipeline.interleave(broken, DOCUMENTS[10:40]).batch_by_length(64, len, window=20, collate_fn=list)
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert [str(outcome) for outcome in outcomes if isinstance(outcome, OSError)] == ["gone"]
    kept = [outcome for outcome in outcomes if not isinstance(outcome, OSError)]
    assert names(kept) == [*range(7), *range(10, 40)]


@on_both_faces
def test_a_source_that_fails_ends_after_what_came_before(face: Face) -> None:
    """The last window is as short as it is."""

    async def broken() -> Any:
        for document in DOCUMENTS[:30]:
            yield document
        raise OSError("gone")

    for window in (None, 20):
        loader = Pipeline(broken).batch_by_length(64, len, window=window, collate_fn=list)
        with Steps(loader, face) as steps:
            *batches, error = steps.outcomes()
        assert str(error) == "gone"
        assert names(batches) == list(range(30))


@on_both_faces
def test_without_a_fixed_order_samples_come_again_rather_than_never(face: Face) -> None:
    """And the state says so."""

    async def later(document: Document) -> Document:
        return document

    def make() -> Pipeline:
        pipeline = Pipeline(DOCUMENTS).map(later, ordered=False, concurrency=8)
        return pipeline.batch_by_length(64, len, window=20, collate_fn=list)

    for taken in range(1, 12, 3):
        loader = make()
        with Steps(loader, face) as steps:
            before = [steps.next() for _ in range(taken)]
            state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        assert state["guarantee"] == "at-least-once"
        rest = make()
        rest.load_state_dict(state)
        assert set(names(before + collect(rest, face))) == set(range(60))


@pytest.mark.parametrize("cursor", [[None, 0], [None, -1, 0], [None, 0, -1], [None, 0, 1 << 21], [None, 0, "x"], 3])
def test_a_broken_cursor_is_refused(cursor: Any) -> None:
    """When it is loaded."""
    loader = by_length()
    state = loader.state_dict()
    state["cursor"] = {"json": json.dumps(json.loads(state["cursor"]["json"]) | {"cursor": cursor})}
    with pytest.raises(Exception, match=r"cursor|expected|state"):
        loader.load_state_dict(state)


# -- arguments ---------------------------------------------------------------------------------------------------------


async def awaited(document: Document) -> int:
    return len(document)


def generated_lengths(document: Document) -> Any:
    yield len(document)


@pytest.mark.parametrize(
    ("arguments", "how", "error", "match"),
    [
        ((0, len), {}, ValueError, "max_tokens must be at least 1"),
        ((1.5, len), {}, TypeError, "max_tokens"),
        ((8, len), {"max_samples": 0}, ValueError, "max_samples"),
        ((8, len), {"window": 0}, ValueError, "window=None keeps the order"),
        ((8, len), {"seed": "a"}, TypeError, "seed"),
        ((8, len), {"too_long": "cut"}, ValueError, "'alone', 'drop', 'error'"),
        ((8, 3), {}, TypeError, "length must be a function"),
        ((8, awaited), {}, TypeError, "sync function"),
        ((8, generated_lengths), {}, TypeError, "generator"),
        ((8, len), {"collate_fn": 3}, TypeError, "collate_fn"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: Any, how: Any, error: type[Exception], match: str) -> None:
    """With the rule and what was found."""
    with pytest.raises(error, match=match):
        Pipeline(DOCUMENTS).batch_by_length(*arguments, **how)


def test_its_length_is_not_known() -> None:
    """Only running it tells."""
    with pytest.raises(TypeError, match="as many batches as the lengths"):
        len(by_length())


def test_max_staleness_cannot_hold_with_it() -> None:
    """It waits for more samples than may begin."""
    with pytest.raises(ValueError, match="waits for more samples"):
        Pipeline(DOCUMENTS).map(list).batch_by_length(64, len).max_staleness(1)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"window": 21}, "window=21, and had window=20"),
        ({"window": None}, "window=None, and had window=20"),
        ({"max_tokens": 65}, "max_tokens=65, and had max_tokens=64"),
        ({"too_long": "drop"}, "too_long='drop', and had too_long='alone'"),
    ],
)
def test_a_state_of_other_arguments_is_told_by_what_differs(how: dict[str, Any], told: str) -> None:
    """And not by two names that are the same."""
    loader = by_length()
    with Steps(loader, "for") as steps:
        steps.next()
        state = loader.state_dict()
    with pytest.raises(StateError, match=rf"stage 1, batch_by_length\(len\), has {told}"):
        by_length(**how).load_state_dict(state)
