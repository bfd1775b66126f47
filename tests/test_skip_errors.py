"""`skip_errors`: what fails is left out, counted and reported, and costs nobody else."""

import asyncio
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import aioloader
from aioloader import Pipeline, Skip, TooManySkippedError
from aioloader.insight.stats import StageStats
from aioloader.sources import Channel, CursorSource, Entry, EntryReader, Lines
from aioloader.testing import FaultPlan, Gate, assert_resumes_exactly
from tests._support import Face, Steps, collect, explained, notes, on_both_faces
from tests._work import fails_by_seven

pytestmark = pytest.mark.usefixtures("fork_server")

BAD = (3, 10, 11, 17, 24, 25, 26, 31)


class OtherError(Exception):
    """Not what is skipped."""


def decode(key: int) -> int:
    if key in BAD:
        raise ValueError(f"bad {key}")
    return key


async def fetch(key: int) -> int:
    await asyncio.sleep(0)
    return decode(key)


def good(count: int) -> list[int]:
    return [key for key in range(count) if key not in BAD]


def cut(samples: list[int], size: int) -> list[list[int]]:
    return [samples[at : at + size] for at in range(0, len(samples), size)]


def plain(outcomes: list[Any]) -> list[Any]:
    """Batches as lists; errors as their type."""
    return [type(one) if isinstance(one, BaseException) else one.tolist() for one in outcomes]


def stage_of(loader: Any, name: str = "skip_errors") -> StageStats:
    (found,) = [stage for stage in loader.stats().stages if stage.name.startswith(name)]
    return found  # type: ignore[no-any-return]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcomes_of(loader: Any, face: Face) -> list[Any]:
    with Steps(loader, face) as steps:
        return steps.outcomes()


# -- where it may be ---------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("fn", [decode, fetch])
def test_the_neighbours_of_a_failed_sample_stay(face: Face, fn: Callable[[int], Any]) -> None:
    """Before `batch`, batches are full all the same; `stats()` counts what was left out, there and nowhere else."""
    loader = Pipeline(range(40)).map(fn, concurrency=4).skip_errors().batch(4)
    assert [batch.tolist() for batch in collect(loader, face)] == cut(good(40), 4)
    stage = stage_of(loader)
    assert (stage.name, stage.kind, stage.skipped, stage.samples, stage.errors) == ("skip_errors()", "fold", 8, 32, 0)
    assert sum(other.skipped for other in loader.stats().stages) == 8


@on_both_faces
def test_after_batch_a_batch_is_left_out(face: Face) -> None:
    """The others are as they were, and are held where batches are held: `prefetch` of them, no more."""
    loader = Pipeline(range(40)).map(fetch).batch(4).prefetch(3).skip_errors()
    expected = [keys for keys in cut(list(range(40)), 4) if not set(keys) & set(BAD)]
    assert [batch.tolist() for batch in collect(loader, face)] == expected
    assert stage_of(loader).skipped == 10 - len(expected)
    assert stage_of(loader, "collate").room == 3


@on_both_faces
@pytest.mark.parametrize("before", [True, False])
def test_without_prefetch_the_next_one_is_begun_in_its_place(face: Face, before: bool) -> None:
    """Nothing is held ahead, and whoever asked is not left waiting when what came was left out."""
    loader: Pipeline = Pipeline(range(40)).map(fetch)
    loader = loader.skip_errors().batch(4) if before else loader.batch(4).skip_errors()
    whole = [keys for keys in cut(list(range(40)), 4) if not set(keys) & set(BAD)]
    batches = [batch.tolist() for batch in collect(loader.prefetch(0), face)]
    assert batches == (cut(good(40), 4) if before else whole)


def made_in(executor: str) -> Pipeline:
    keys = Pipeline(range(60))
    match executor:
        case "process":
            return keys.map(fails_by_seven, executor="process", concurrency=2).skip_errors().batch(4)
        case "in_process":
            return keys.map(fails_by_seven).skip_errors().batch(4).in_process()
        case "after in_process":
            return keys.map(fails_by_seven).in_process().skip_errors().batch(4)
        case "batched in_process":
            return keys.map(fails_by_seven).batch(1).in_process().skip_errors().unbatch().batch(4)
    return keys.map(fails_by_seven).skip_errors().batch(4)


@on_both_faces
@pytest.mark.parametrize("executor", ["thread", "process", "in_process", "after in_process", "batched in_process"])
def test_wherever_functions_run(face: Face, executor: str) -> None:
    """In threads, in worker processes, and in a process of its own, on either side of the border."""
    with made_in(executor) as loader:
        batches = [batch.tolist() for batch in collect(loader, face)]
        assert batches == cut([key for key in range(60) if key % 7 != 3], 4)
        assert stage_of(loader).skipped == 9


@on_both_faces
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p.skip_errors().map(str), [str(key) for key in good(40)]),
        (lambda p: p.filter(lambda key: key % 2).skip_errors(), [key for key in good(40) if key % 2]),
        (lambda p: p.skip_errors().filter(lambda key: key % 2), [key for key in good(40) if key % 2]),
        (lambda p: p.drop_if(lambda key: key < 5).skip_errors(), [key for key in good(40) if key >= 5]),
        (lambda p: p.skip_errors().drop_if(lambda key: key < 5), [key for key in good(40) if key >= 5]),
        (lambda p: p.drop_if(lambda key: key < 0, requeue=True).skip_errors(), good(40)),
        (lambda p: p.skip_errors().take(5), good(40)[:5]),
        (lambda p: p.take(5).skip_errors(), good(5)),
        (lambda p: p.skip_errors().skip(5), good(40)[5:]),
        (lambda p: p.skip_errors().enumerate(), list(enumerate(good(40)))),
        (lambda p: p.skip_errors().skip_errors(), good(40)),
        (lambda p: p.skip_errors().shuffle(1, seed=0), good(40)),
        (lambda p: p.skip_errors().repeat(2), good(40) * 2),
        (lambda p: p.repeat(2).skip_errors(), good(40) * 2),
        (lambda p: Pipeline.interleave(p.skip_errors(), Pipeline(["a"])), [0, "a", *good(40)[1:]]),
        (lambda p: Pipeline.interleave(p, Pipeline(["a"])).skip_errors(), [0, "a", *good(40)[1:]]),
        (lambda p: Pipeline.zip(p, Pipeline(range(40))).skip_errors(), [(key, key) for key in good(40)]),
        (lambda p: Pipeline.mix([p], [1]).skip_errors(), good(40)),
        (lambda p: Pipeline.merge(p).skip_errors(), good(40)),
    ],
)
def test_beside_other_stages(face: Face, make: Callable[[Pipeline], Pipeline], expected: list[Any]) -> None:
    """Wherever it is, the good samples come, in order."""
    assert outcomes_of(make(Pipeline(range(40)).map(fetch)), face) == expected


@on_both_faces
def test_errors_after_it_are_raised(face: Face) -> None:
    """It has to do with the stages before it."""
    loader = Pipeline(range(8)).map(decode).skip_errors().map(lambda key: 1 // (key - 2)).batch(4)
    assert plain(outcomes_of(loader, face)) == [ZeroDivisionError, [0, 0, 0]]


@on_both_faces
def test_errors_of_other_types_are_raised_in_their_place(face: Face) -> None:
    """`on` is one type or several; the user's own exception comes, with its note."""

    def fail(key: int) -> int:
        if key in (2, 5, 6):
            raise {2: KeyError("k"), 5: OtherError("o"), 6: ConnectionResetError("c")}[key]
        return key

    loader = Pipeline(range(9)).map(fail).skip_errors((KeyError, OSError))
    outcomes = outcomes_of(loader, face)
    assert [one if isinstance(one, int) else type(one) for one in outcomes] == [0, 1, 3, 4, OtherError, 7, 8]
    assert "key 5" in notes(outcomes[4])
    assert loader.stats().stages[-1].name == "skip_errors((KeyError, OSError))"


@on_both_faces
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_never_skipped(face: Face, kind: type[BaseException]) -> None:
    """It is not the sample's."""

    def interrupted(key: int) -> int:
        if key == 2:
            raise kind
        return key

    with Steps(Pipeline(range(5)).map(interrupted).skip_errors(), face) as steps:
        assert [one if isinstance(one, int) else type(one) for one in steps.outcomes()] == [0, 1, kind, 3, 4]


@on_both_faces
def test_what_would_look_like_an_end_is_skipped_too(face: Face) -> None:
    """`StopIteration` and `CancelledError` of a function are errors of its sample."""

    async def odd(key: int) -> int:
        if key == 1:
            raise asyncio.CancelledError
        return key

    def end(key: int) -> int:
        if key == 3:
            raise StopIteration
        return key

    assert outcomes_of(Pipeline(range(6)).map(odd).map(end).skip_errors(), face) == [0, 2, 4, 5]
    only = Pipeline(range(6)).map(end).skip_errors(RuntimeError)  # as which it would be raised
    assert outcomes_of(only, face) == [0, 1, 2, 4, 5]


# -- sources -----------------------------------------------------------------------------------------------------------


class BrokenRows(CursorSource):
    """Ten rows, of which some are broken; then it fails for good, if it is to."""

    def __init__(self, broken: tuple[int, ...], fails: bool = False) -> None:
        self.broken = broken
        self.fails = fails

    def open(self, context: Any, cursor: Any) -> EntryReader:
        return RowReader(self, cursor or 0)


class RowReader(EntryReader):
    """Reads them."""

    def __init__(self, source: BrokenRows, at: int) -> None:
        self.source = source
        self.at = at

    async def read(self, limit: int) -> list[Entry]:
        if self.at == 10 and self.source.fails:
            raise OSError("the disk is gone")
        rows = range(self.at, min(10, self.at + limit))
        self.at = rows.stop
        return [
            Entry.failed(ValueError(f"row {row}"), row + 1, row)
            if row in self.source.broken
            else Entry(row, row + 1, row)
            for row in rows
        ]


@on_both_faces
def test_a_broken_entry_of_a_source_is_skipped(face: Face, tmp_path: Path) -> None:
    """Rows that are broken in the middle, with a map after them or none."""
    for pipeline in (Pipeline(BrokenRows((0, 4, 9))), Pipeline(BrokenRows((0, 4, 9))).map(fetch_any)):
        assert outcomes_of(pipeline.skip_errors(), face) == [1, 2, 3, 5, 6, 7, 8]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nno json\n{"a": 3}\n')
    assert outcomes_of(Pipeline(Lines([path], decode=json.loads)).skip_errors(), face) == [{"a": 1}, {"a": 3}]


async def fetch_any(sample: Any) -> Any:
    return sample


@on_both_faces
def test_a_source_that_fails_is_not_skipped(face: Face) -> None:
    """A sample is left out, a source is not: it raises, after what came before, and ends the epoch."""
    loader = Pipeline(BrokenRows((4,), fails=True)).skip_errors().batch(4)
    assert plain(outcomes_of(loader, face)) == [[0, 1, 2, 3], [5, 6, 7, 8], [9], OSError]

    def numbers() -> Iterator[int]:
        yield from range(3)
        raise OtherError

    loader = Pipeline(numbers).map(fetch).skip_errors()
    assert [one if isinstance(one, int) else type(one) for one in outcomes_of(loader, face)] == [0, 1, 2, OtherError]


@on_both_faces
def test_one_of_several_sources_that_fails_is_not_skipped(face: Face) -> None:
    """Its error is raised once, and the others go on, whatever is left out of them."""
    one = Pipeline(BrokenRows((1,), fails=True))
    other = Pipeline(range(14)).map(decode)
    loader = Pipeline.interleave(one, other).skip_errors()
    outcomes = outcomes_of(loader, face)
    samples = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    assert sorted(samples) == sorted([row for row in range(10) if row != 1] + good(14))
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == [OSError]


@on_both_faces
def test_a_channel_loses_nothing_with_a_failed_sample(face: Face) -> None:
    """What a channel gave is gone once a batch was raised: with the stage before `batch`, the good neighbours are not.

    So each sample that was sent and does not fail is trained on, once.
    """
    channel = Channel(40)
    with channel.sender_sync() as sender:
        for key in range(40):
            sender.send(key)
    loader = Pipeline(channel).map(decode).skip_errors().batch(4)
    assert [batch.tolist() for batch in collect(loader, face)] == cut(good(40), 4)


@on_both_faces
def test_a_channel_gets_back_what_was_not_handed_out(face: Face) -> None:
    """The cursors that it reads its own number from are inside those of the stage."""
    channel = Channel(20)
    with channel.sender_sync() as sender:
        for key in range(20):
            sender.send(key)
    loader = Pipeline(channel).map(decode).skip_errors().batch(4)
    with Steps(loader, face) as steps:
        first = steps.next().tolist()
        if face == "for":
            loader.close()
        else:
            steps.do(loader.aclose)
    assert first == good(5)
    assert [batch.tolist() for batch in collect(Pipeline(channel).map(decode).skip_errors().batch(4), face)] == cut(
        good(20)[4:], 4
    )


# -- limits ------------------------------------------------------------------------------------------------------------


@on_both_faces
def test_past_max_errors_each_further_one_is_raised(face: Face) -> None:
    """In its place, with the newest error as its cause; the samples in between still come."""
    loader = Pipeline(range(40)).map(decode).skip_errors(max_errors=3)
    outcomes = outcomes_of(loader, face)
    expected = [key if key not in BAD else TooManySkippedError for key in range(40) if key not in BAD[:3]]
    assert [one if isinstance(one, int) else type(one) for one in outcomes] == expected
    first, *_ = errors = [one for one in outcomes if isinstance(one, TooManySkippedError)]
    assert [str(error.__cause__) for error in errors] == [f"bad {key}" for key in BAD[3:]]
    assert isinstance(first.__cause__, ValueError)
    assert "key 17" in notes(first.__cause__)
    assert "max_errors=3" in str(first)
    assert "key 17" in notes(first)
    stage = stage_of(loader)
    assert (stage.skipped, stage.errors, stage.samples) == (3, 5, 37)


@on_both_faces
def test_max_errors_is_for_each_epoch_and_round(face: Face) -> None:
    """The next epoch begins to count anew, and so does each round of `repeat`."""
    loader = Pipeline(range(20)).map(decode).skip_errors(max_errors=4)
    assert [outcomes_of(loader, face) for _ in range(2)] == [good(20)] * 2
    assert outcomes_of(loader.repeat(2), face) == good(20) * 2


def test_no_errors_are_allowed_with_0() -> None:
    outcomes = outcomes_of(Pipeline(range(5)).map(decode).skip_errors(max_errors=0), "for")
    assert [one if isinstance(one, int) else type(one) for one in outcomes] == [0, 1, 2, TooManySkippedError, 4]


def share_model(failed: list[bool], share: float) -> list[bool | None]:
    """For each sample: None, it is good; True: it is left out; False: it raises."""
    found: list[bool | None] = []
    for at, bad in enumerate(failed):
        window = failed[max(0, at - 999) : at + 1]
        found.append(None if not bad else not (len(window) >= 20 and sum(window) > share * len(window)))
    return found


@on_both_faces
def test_max_share_looks_at_the_last_thousand(face: Face) -> None:
    """From the 20th on; where the share falls again, errors are left out again."""
    rng = Random(5)
    failed = [rng.random() < (0.3 if 1000 <= at < 1200 else 0.01) for at in range(4000)]
    failed[:5] = [True] * 5  # of fewer than 20 samples nothing is said

    def fail(key: int) -> int:
        if failed[key]:
            raise ValueError(key)
        return key

    loader = Pipeline(range(4000)).map(fail, concurrency=2).skip_errors(max_share=0.04)
    outcomes = outcomes_of_many(loader, face)
    model = share_model(failed, 0.04)
    assert outcomes == [None if kept is False else key for key, kept in enumerate(model) if kept is not True]
    assert {True, False, None} <= set(model)
    assert True in model[2500:]


def outcomes_of_many(loader: Any, face: Face) -> list[int | None]:
    """Samples, and None for a `TooManySkippedError`."""
    found: list[int | None] = []
    with Steps(loader, face) as steps:
        while True:
            try:
                found.append(steps.next())
            except StopIteration:
                return found
            except TooManySkippedError:
                found.append(None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"on": "ValueError"}, TypeError, "on must be an exception type or a tuple of them, got 'ValueError'"),
        ({"on": ()}, TypeError, "on must be an exception type"),
        ({"on": [ValueError]}, TypeError, "on must be an exception type"),
        ({"on": (ValueError, int)}, TypeError, "on must be an exception type"),
        ({"on": KeyboardInterrupt}, TypeError, "on must be an exception type"),
        ({"max_errors": -1}, ValueError, "max_errors must be at least 0, got -1"),
        ({"max_errors": 1.5}, TypeError, "max_errors must be an integer"),
        ({"max_errors": True}, TypeError, "max_errors must be an integer"),
        ({"max_share": 1.5}, ValueError, "max_share must be from 0 to 1, got 1.5"),
        ({"max_share": float("nan")}, ValueError, "max_share must be from 0 to 1"),
        ({"max_share": "1%"}, TypeError, "max_share must be a number from 0 to 1"),
        ({"report": 3}, TypeError, "report must be the path of a file, got 3"),
        ({"report": b"x"}, TypeError, "report must be the path of a file"),
        (
            {"report": "no/such/folder/x.jsonl"},
            ValueError,
            "can be written.*make its folder",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """At once, by the stage and by `Skip` alike."""
    with pytest.raises(error, match=message):
        Pipeline(range(3)).skip_errors(**arguments)
    with pytest.raises(error, match=message):
        Skip(**arguments)


def test_a_folder_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "report"):
        with pytest.raises(ValueError, match="report must be a file that can be written"):
            Skip(report=path)


# -- what it promises --------------------------------------------------------------------------------------------------


def test_its_length_is_not_known() -> None:
    with pytest.raises(TypeError, match="skip_errors"):
        len(Pipeline(range(8)).skip_errors())


def test_shard_must_come_before_it() -> None:
    """Ranks that fail in different places would deal different samples."""
    with pytest.raises(ValueError, match=r"skip_errors\(\) gives samples as they come.*put shard\(\) before it"):
        Pipeline(range(8)).map(decode).skip_errors().shard(0, 2)
    parts = [collect(Pipeline(range(40)).shard(rank, 2).map(decode).skip_errors(), "for") for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == good(40)
    assert Pipeline(range(8)).shard(1, 2).skip_errors().batch(2).state_dict()["guarantee"] == "exact"


def test_a_state_of_one_rank_is_not_another_ones() -> None:
    """Each rank has left out others."""
    state = Pipeline(range(40)).shard(0, 2).map(decode).skip_errors().batch(4).state_dict()
    with pytest.raises(aioloader.StateError, match="each rank is elsewhere"):
        Pipeline(range(40)).shard(1, 2).map(decode).skip_errors().batch(4).load_state_dict(state)


def test_the_stage_is_part_of_the_state_and_its_limits_are_not() -> None:
    """So a limit may be raised to go on."""
    loader = Pipeline(range(40)).map(decode).skip_errors(max_errors=2)
    iterator = iter(loader)
    assert [next(iterator) for _ in range(len(good(11)))] == good(11)
    with pytest.raises(TooManySkippedError):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    other = Pipeline(range(40)).map(decode).skip_errors((ValueError, OSError), max_errors=100)
    other.load_state_dict(state)
    assert collect(other, "for") == [key for key in good(40) if key > 11]
    with pytest.raises(aioloader.StateError):
        Pipeline(range(40)).map(decode).load_state_dict(state)


@on_both_faces
def test_max_staleness_lets_others_begin_in_their_place(face: Face) -> None:
    """What is left out makes room at once: no batch is waited for in vain, and none begins too early."""
    gate = Gate()

    async def guarded(key: int) -> int:
        await gate.passing(key)
        return decode(key)

    loader = Pipeline(range(40)).map(guarded, concurrency=32).skip_errors().batch(4).max_staleness(1)
    gate.open_all()
    with Steps(loader, face) as steps:
        for number, expected in enumerate(cut(good(40), 4), 1):
            assert steps.next().tolist() == expected
            left_out = stage_of(loader).skipped
            assert len(gate.arrived) <= (number + 1) * 4 + left_out
        assert steps.rest() == []


@on_both_faces
def test_max_staleness_reaches_into_a_process_of_its_own(face: Face) -> None:
    """What is left out there is not waited for here."""
    with Pipeline(range(40)).map(fails_by_seven).skip_errors().in_process().batch(4).max_staleness(1) as loader:
        expected = cut([key for key in range(40) if key % 7 != 3], 4)
        assert [batch.tolist() for batch in collect(loader, face)] == expected


@on_both_faces
def test_all_may_fail(face: Face) -> None:
    """Then nothing comes, and the epoch ends."""
    loader = Pipeline(range(3000)).map(lambda key: key // 0).skip_errors().batch(4)
    assert collect(loader, face) == []
    assert stage_of(loader).skipped == 3000
    assert "skip_errors() has left out 3000 of 3000 (100.0%)" in explained(loader)


def test_explain_mentions_a_noticeable_share() -> None:
    loader = Pipeline(range(40)).map(decode).skip_errors().batch(4)
    collect(loader, "for")
    assert "skip_errors() has left out 8 of 40 (20.0%), since they failed." in explained(loader)
    loader = Pipeline(range(2000)).map(decode).skip_errors().batch(4)
    collect(loader, "for")
    assert "left out" not in explained(loader)


def test_leaving_early_leaves_nothing_behind(tmp_path: Path) -> None:
    """Also with a report, whose thread ends with the run; what was left out by then is written."""
    report = tmp_path / "skipped.jsonl"
    loader = Pipeline(range(10_000)).map(decode).skip_errors(report=report).batch(4)
    for _ in loader:
        break
    loader.close()
    assert [line["key"] for line in lines_of(report)][:1] == [3]


def test_batch_info_names_those_that_came() -> None:
    loader = Pipeline(range(8)).map(decode).skip_errors().batch(4)
    next(iter(loader))
    info = loader.last_batch_info()
    assert info is not None
    assert (info.keys, info.positions) == ((0, 1, 2, 4), (0, 1, 2, 4))
    assert loader.replay(0).tolist() == [0, 1, 2, 4]
    loader.close()


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Pipeline(range(40)).map(decode, concurrency=n).skip_errors().batch(4),
        lambda n: Pipeline(range(40)).map(fetch, concurrency=n).skip_errors(max_errors=4).batch(4),
        lambda n: Pipeline(range(40)).map(fetch, concurrency=n).batch(4).skip_errors(max_errors=2),
        lambda n: Pipeline(range(40)).shuffle(seed=3).map(fetch, concurrency=n).skip_errors(max_share=0.15).batch(3),
        lambda n: Pipeline(BrokenRows((0, 3, 4, 9))).skip_errors().map(fetch_any, concurrency=n).batch(2),
        lambda n: Pipeline(range(40)).map(fetch, concurrency=n).skip_errors(max_errors=3).repeat(2).batch(4),
        lambda n: Pipeline(range(40)).map(fetch, concurrency=n).skip_errors().take(20).shuffle(5).batch(4),
        lambda n: Pipeline.mix(
            [Pipeline(range(20)).map(decode, concurrency=n), Pipeline(BrokenRows((1, 2), fails=True))], [2, 1]
        ).skip_errors(max_errors=4),
    ],
)
def test_a_resume_is_exact(make: Callable[[int], Pipeline]) -> None:
    """At every batch: the same samples, the same errors past the limits, for every concurrency and on both faces."""
    assert_resumes_exactly(lambda n: make(n), variants=({"n": 4}, {"n": 1}, {"n": 16}), limit=12)


def test_a_resume_in_completion_order_loses_and_repeats_nothing() -> None:
    """What was left out is delivered, as far as cursors go."""

    def make(n: int) -> Pipeline:
        return Pipeline(range(40)).map(fetch, concurrency=n, ordered=False).skip_errors().batch(4)

    states = assert_resumes_exactly(
        lambda n: make(n), variants=({"n": 4}, {"n": 9}), samples=lambda batch: batch.tolist(), limit=10
    )
    assert {state["guarantee"] for state in states} == {"exact"}


@on_both_faces
def test_what_was_left_out_before_a_state_is_not_tried_again(face: Face) -> None:
    """The cursor has passed it, even if it would work by now; the count of the epoch goes on."""
    tried: list[int] = []

    def note(key: int) -> int:
        tried.append(key)
        return decode(key)

    loader = Pipeline(range(20)).map(note, concurrency=1).skip_errors(max_errors=3).batch(4)
    with Steps(loader, face) as steps:
        assert [steps.next().tolist() for _ in range(3)] == cut(good(20), 4)[:3]
        state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    tried.clear()
    again = Pipeline(range(20)).map(note, concurrency=1).skip_errors(max_errors=3).batch(4)
    again.load_state_dict(state)
    assert plain(outcomes_of(again, face)) == [TooManySkippedError, [19]]  # 17 is the fourth
    assert min(tried) == 15


@pytest.mark.parametrize("broken", [[1, 2, 3], [None, -1, 0, 0], [None, 0, 1001, 0], [None, 0, 0, -1], [0, 0, 0, "x"]])
def test_a_broken_cursor_is_refused(broken: Any) -> None:
    from tests._states import edited

    loader = Pipeline(range(40)).map(decode).skip_errors()
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    with pytest.raises(aioloader.StateError, match="cursor"):
        loader.load_state_dict(edited(state, cursor=broken))


# -- caches ------------------------------------------------------------------------------------------------------------


def flaky(failures: set[tuple[int, int]]) -> Callable[[int], int]:
    """Fails for pairs of a key and the number of the call for it."""
    calls: dict[int, int] = {}

    def made(key: int) -> int:
        calls[key] = calls.get(key, 0) + 1
        if (key, calls[key]) in failures:
            raise ValueError(f"call {calls[key]} for {key}")
        return key

    return made


@on_both_faces
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_cache_after_it_keeps_no_gap(face: Face, where: str, stream: bool, tmp_path: Path) -> None:
    """What was left out in one epoch comes in the next, in its place; then all is kept."""
    source: Any = (lambda: iter(range(12))) if stream else range(12)
    how: dict[str, Any] = {"memory_bytes": 1 << 20} if where == "memory" else {"disk": tmp_path / "cache"}
    with Pipeline(source).map(flaky({(4, 1), (9, 1)}), concurrency=1).skip_errors().cache(**how) as loader:
        epochs = [collect(loader, face) for _ in range(3)]
    assert epochs == [[key for key in range(12) if key not in (4, 9)], list(range(12)), list(range(12))]


@on_both_faces
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_cache_before_it_keeps_no_failure(face: Face, where: str, tmp_path: Path) -> None:
    """Whatever failed is made anew in the next epoch, and the others are not."""
    how: dict[str, Any] = {"memory_bytes": 1 << 20} if where == "memory" else {"disk": tmp_path / "cache"}
    with Pipeline(range(12)).map(flaky({(4, 1), (9, 1), (9, 2)})).cache(**how).skip_errors() as loader:
        epochs = [collect(loader, face) for _ in range(3)]
        assert epochs == [[key for key in range(12) if key not in gone] for gone in [(4, 9), (9,), ()]]
        assert stage_of(loader, "cache").misses == 1


def test_a_cache_after_a_process_of_its_own_keeps_no_gap() -> None:
    """The gap is told with the entries after it."""
    loader = Pipeline(range(30)).map(fails_by_seven).skip_errors().in_process().cache(memory_bytes=1 << 20)
    with loader:
        expected = [key for key in range(30) if key % 7 != 3]
        assert [collect(loader, "for") for _ in range(2)] == [expected] * 2
        assert stage_of(loader, "cache").hits <= 3  # those before the first one that failed


# -- the report --------------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_report_has_a_line_for_each(face: Face, tmp_path: Path) -> None:
    """In order, with what is known of each, and appended to what is there."""
    report = tmp_path / "skipped.jsonl"
    loader = Pipeline(range(20)).map(decode).skip_errors(report=str(report)).batch(4)
    assert not report.exists()  # a description leaves nothing behind
    collect(loader, face)
    first = lines_of(report)
    assert [(line["key"], line["position"], line["epoch"], line["error"]) for line in first] == [
        (key, key, 0, f"ValueError: bad {key}") for key in BAD if key < 20
    ]
    assert {(line["stage"], line["attempts"], line["rank"]) for line in first} == {("map(decode)", 1, None)}
    assert all(line["seconds"] >= 0 for line in first)
    assert [line["time"] for line in first] == sorted(line["time"] for line in first)
    collect(loader, face)
    assert [line["epoch"] for line in lines_of(report)] == [0] * 4 + [1] * 4


def test_what_passed_a_limit_is_not_reported(tmp_path: Path) -> None:
    """It was not left out."""
    report = tmp_path / "skipped.jsonl"
    outcomes_of(Pipeline(range(40)).map(decode).skip_errors(max_errors=2, report=report), "for")
    assert [line["key"] for line in lines_of(report)] == list(BAD[:2])


@pytest.mark.parametrize("executor", ["process", "in_process", "after in_process", "batched in_process"])
def test_a_report_from_wherever_functions_run(executor: str, tmp_path: Path) -> None:
    """The stage that failed is named, also when only the error has come from another process."""
    report = tmp_path / "skipped.jsonl"
    keys = Pipeline(range(20))
    makers: dict[str, Callable[[], Pipeline]] = {
        "process": lambda: keys.map(fails_by_seven, executor="process").skip_errors(report=report),
        "in_process": lambda: keys.map(fails_by_seven).skip_errors(report=report).in_process(),
        "after in_process": lambda: keys.map(fails_by_seven).in_process().skip_errors(report=report),
        "batched in_process": lambda: keys.map(fails_by_seven).batch(1).in_process().skip_errors(report=report),
    }
    loader = makers[executor]()
    with loader:
        collect(loader, "for")
    lines = lines_of(report)
    named = [[key] for key in (3, 10, 17)] if executor == "batched in_process" else [3, 10, 17]
    assert [line["key"] for line in lines] == named
    assert {line["stage"] for line in lines} == {"map(fails_by_seven)"}


def test_a_report_shows_no_secrets(tmp_path: Path) -> None:
    report = tmp_path / "skipped.jsonl"
    url = "s3://user:secret@host/key?token=secret&part=1"

    def fail(key: object) -> str:
        raise OSError(f"cannot read {key}")

    collect(Pipeline([url, ("a", url)]).map(fail).skip_errors(report=report), "for")
    assert "secret" not in report.read_text()
    assert lines_of(report)[0]["key"] == "s3://***@host/key?token=***&part=1"


def test_a_report_bears_odd_errors_and_keys(tmp_path: Path) -> None:
    """A `str` that raises, surrogates, keys that JSON does not know, long messages, line ends."""
    report = tmp_path / "skipped.jsonl"

    class OddError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def fail(sample: Any) -> Any:
        raise {0: OddError(), 1: ValueError("a\nb\udce9"), 2: ValueError("x" * 10_000)}[sample]

    loader = Pipeline.merge(Pipeline(range(3)).map(fail)).flat_map(lambda sample: [sample]).skip_errors(report=report)
    collect(loader, "for")
    lines = lines_of(report)
    assert len(lines) == 3
    assert [line["error"].partition(":")[0] for line in lines] == ["OddError", "ValueError", "ValueError"]
    assert lines[1]["error"] == "ValueError: a\nb\udce9"
    assert len(lines[2]["error"]) <= 2000
    assert lines[0]["key"] == "0 of source 0"


@on_both_faces
def test_a_report_that_cannot_be_written_any_more_warns_once(face: Face, tmp_path: Path) -> None:
    """The epoch goes on, and nobody believes that nothing was left out."""
    folder = tmp_path / "folder"
    folder.mkdir()
    loader = Pipeline(range(40)).map(decode).skip_errors(report=folder / "x.jsonl").batch(4)
    folder.rmdir()
    with pytest.warns(RuntimeWarning, match=r"cannot write its report .*x\.jsonl") as warned:
        assert len(collect(loader, face)) == 8
    assert len(warned) == 1


def test_ranks_write_into_one_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each line names its rank."""
    report = tmp_path / "skipped.jsonl"
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        collect(Pipeline(range(20)).shard().map(decode).skip_errors(report=report), "for")
    assert sorted((line["rank"], line["key"]) for line in lines_of(report)) == [(0, 10), (1, 3), (1, 11), (1, 17)]


def test_what_is_made_again_is_not_reported_again(tmp_path: Path) -> None:
    """`replay` makes a batch once more."""
    report = tmp_path / "skipped.jsonl"
    loader = Pipeline(range(8)).map(decode).skip_errors(report=report).batch(4)
    batches = [batch.tolist() for batch in loader]
    assert loader.replay(0).tolist() == batches[0]
    assert len(lines_of(report)) == 1


def test_a_description_with_a_report_can_be_pickled(tmp_path: Path) -> None:
    """It is a path, and no open file."""
    loader = pickle.loads(pickle.dumps(Pipeline(range(8)).map(fetch).skip_errors(OSError, report=tmp_path / "r")))
    assert repr(loader) == "Pipeline(range).map(fetch).skip_errors(OSError)"


# -- any schedule ------------------------------------------------------------------------------------------------------


def any_schedule(seed: int) -> None:
    """Random stages, limits and resumes, against a loop that says the same in plain words."""
    rng = Random(seed)
    count = rng.randrange(1, 120)
    plan = FaultPlan(seed, reset=rng.choice([0.0, 0.05, 0.3, 0.9]), throttled=rng.choice([0.0, 0.1]))
    max_errors = rng.choice([None, 0, 1, 3, 20])
    max_share = rng.choice([None, 0.0, 0.05, 0.4])
    size, width = rng.choice([1, 2, 5]), rng.choice([1, 3, 16])
    before, ordered = rng.random() < 0.7, rng.random() < 0.8

    async def load(key: int) -> int:
        for _ in range(key * 7919 % 3):
            await asyncio.sleep(0)
        if (fault := plan.fault(key)) is not None:
            raise ConnectionError(key, fault.kind)
        return key

    def make() -> Pipeline:
        pipeline = Pipeline(range(count)).map(load, concurrency=width, ordered=ordered)
        skip: dict[str, Any] = {"max_errors": max_errors, "max_share": max_share}
        if before:
            return pipeline.skip_errors(ConnectionError, **skip).batch(size, collate_fn=list)
        return pipeline.batch(size, collate_fn=list).skip_errors(OSError, **skip)

    face: Face = rng.choice(["for", "async for"])
    loader, found = make(), []
    stop = rng.randrange(0, 60)
    with Steps(loader, face) as steps:
        found += steps.outcomes(stop) if stop else []
        state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    before_stop = len(found)
    if state["epoch"] == 0:
        again = make()
        again.load_state_dict(state)
        found += outcomes_of(again, rng.choice(["for", "async for"]))
    shown = [one if isinstance(one, list) else type(one) for one in found]
    fails = [plan.fault(key) is not None for key in range(count)]
    if ordered:
        expected = skip_model(fails, size, before, max_errors, max_share)
        # After the last outcome, when the end has not been seen, a resume finds it, and the next epoch is what comes.
        twice = stop and before_stop == len(expected) and state["epoch"] == 0
        assert shown == (expected * 2 if twice else expected), seed
    elif max_errors is None and max_share is None and before:
        came = sorted(sample for batch in shown for sample in batch)
        assert came in ([key for key in range(count) if not fails[key] for _ in range(times)] for times in (1, 2)), seed


def skip_model(
    fails: list[bool], size: int, before: bool, max_errors: int | None, max_share: float | None
) -> list[Any]:
    """The outcomes of one epoch."""

    def skipped(failures: list[bool]) -> list[bool | None]:
        left_out, found = 0, []
        for at, failed in enumerate(failures):
            window = failures[max(0, at - 999) : at + 1]
            over = max_errors is not None and left_out >= max_errors
            over = over or (max_share is not None and len(window) >= 20 and sum(window) > max_share * len(window))
            found.append(None if not failed else not over)
            left_out += failed and not over
        return found

    keys = list(range(len(fails)))
    if before:
        kept = [(key, what) for key, what in zip(keys, skipped(fails), strict=True) if what is not True]
        groups = [kept[at : at + size] for at in range(0, len(kept), size)]
        return [
            [key for key, _ in group] if all(what is None for _, what in group) else TooManySkippedError
            for group in groups
        ]
    batches = [keys[at : at + size] for at in range(0, len(keys), size)]
    outcomes = skipped([any(fails[key] for key in batch) for batch in batches])
    return [
        batch if what is None else TooManySkippedError
        for batch, what in zip(batches, outcomes, strict=True)
        if what is not True
    ]


@pytest.mark.parametrize("part", range(4))
def test_any_schedule(part: int) -> None:
    """Good samples come once and in order, errors past a limit in their places, a resume in the middle included."""
    for seed in range(part * 50, part * 50 + 50):
        any_schedule(seed)


@pytest.mark.soak
def test_many_schedules() -> None:
    for seed in range(1000, 11_000):
        any_schedule(seed)
