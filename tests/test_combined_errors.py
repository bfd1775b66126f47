"""`merge`, `interleave`, `mix`: one source fails, and the others go on."""

import collections
import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioloader import Pipeline
from aioloader.core.entry import DONE, LAST, ONE_LOST, Entry
from aioloader.engine.combine import InterleaveNode, MergeNode, ZipNode
from aioloader.engine.mix_node import MixNode
from aioloader.engine.node import Kick, Node
from tests._support import Face, Steps, notes, on_both_faces

pytestmark = [pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning"), pytest.mark.usefixtures("fork_server")]

Combine = Callable[..., Pipeline]


def mix(*sources: Any) -> Pipeline:
    return Pipeline.mix(sources, range(1, len(sources) + 1), seed=5)


HOWS: dict[str, Combine] = {"merge": Pipeline.merge, "interleave": Pipeline.interleave, "mix": mix}
each_way = pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)


class Source:
    """Gives pairs of a letter and a number; fails once, or always, instead of number `fails_at`."""

    def __init__(
        self, letter: str, length: int, fails_at: int | None = None, *, error: Exception | None = None
    ) -> None:
        self.letter = letter
        self.length = length
        self.fails_at = fails_at
        self.error = OSError(f"{letter} is gone") if error is None else error

    def __iter__(self) -> Iterator[str]:
        for number in range(self.length):
            if number == self.fails_at:
                raise self.error
            yield f"{self.letter}{number}"

    @property
    def samples(self) -> list[str]:
        """Those before the failure."""
        return [f"{self.letter}{number}" for number in range(self.length if self.fails_at is None else self.fails_at)]


def abc(*, fails: bool) -> list[Source]:
    return [Source("a", 9), Source("b", 8, 3 if fails else None), Source("c", 4)]


ALL = [sample for source in abc(fails=False) for sample in source.samples]
LEFT = [sample for source in abc(fails=True) for sample in source.samples]


# -- in this run -----------------------------------------------------------------------------------------------------


@on_both_faces
@each_way
def test_the_others_go_on(face: Face, how: Combine) -> None:
    """The error comes once, after the samples of its source before it, with the source's name; nothing else is lost."""
    with Steps(how(*abc(fails=True)), face) as steps:
        outcomes = steps.outcomes()
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert [str(error) for error in errors] == ["b is gone"]
    assert "source(Source)" in notes(errors[0])
    assert sorted(outcome for outcome in outcomes if isinstance(outcome, str)) == sorted(LEFT)
    before = outcomes[: outcomes.index(errors[0])]
    assert [sample for sample in before if sample[0] == "b"] == ["b0", "b1", "b2"]
    for letter in "abc":  # each in its own order
        assert [sample for sample in LEFT if sample[0] == letter] == [
            outcome for outcome in outcomes if isinstance(outcome, str) and outcome[0] == letter
        ]


@on_both_faces
@each_way
def test_all_may_fail(face: Face, how: Combine) -> None:
    """Each error once, and then the end."""
    with Steps(how(Source("a", 3, 1), Source("b", 3, 0), Source("c", 3, 3 - 1)), face) as steps:
        outcomes = steps.outcomes()
    errors = sorted(str(outcome) for outcome in outcomes if isinstance(outcome, Exception))
    assert errors == ["a is gone", "b is gone", "c is gone"]
    assert sorted(outcome for outcome in outcomes if isinstance(outcome, str)) == ["a0", "c0", "c1"]


@on_both_faces
def test_zip_ends(face: Face) -> None:
    """There is nothing to pair the others with."""
    with Steps(Pipeline.zip(range(9), Source("b", 8, 3)), face) as steps:
        outcomes = steps.outcomes()
    assert outcomes[:3] == [(0, "b0"), (1, "b1"), (2, "b2")]
    assert [str(outcome) for outcome in outcomes[3:]] == ["b is gone"]


@on_both_faces
def test_zip_pairs_nothing_with_the_error_of_a_part(face: Face) -> None:
    """One of several sources of its first input fails: the second input loses nothing by it."""
    inner = Pipeline.interleave(Source("a", 3), Source("b", 3, 1))
    with Steps(Pipeline.zip(inner, range(9)), face) as steps:
        outcomes = steps.outcomes()
    assert [str(one) for one in outcomes if isinstance(one, Exception)] == ["b is gone"]
    assert [one for one in outcomes if isinstance(one, tuple)] == [("a0", 0), ("b0", 1), ("a1", 2), ("a2", 3)]


@on_both_faces
def test_the_error_is_raised_between_batches(face: Face) -> None:
    """It is no sample of one: what came before it is given as a short batch, and nothing is lost."""
    with Steps(Pipeline.interleave(*abc(fails=True)).batch(4, collate_fn=list), face) as steps:
        outcomes = steps.outcomes()
    assert [str(one) if isinstance(one, Exception) else one for one in outcomes] == [
        ["a0", "b0", "c0", "a1"],
        ["b1", "c1", "a2", "b2"],
        ["c2", "a3"],
        "b is gone",
        ["c3", "a4", "a5", "a6"],
        ["a7", "a8"],
    ]


@on_both_faces
def test_where_all_batches_are_to_be_full_they_are(face: Face) -> None:
    """With `drop_last`, the samples before the error are in the next batch."""
    with Steps(Pipeline.interleave(*abc(fails=True)).batch(4, drop_last=True, collate_fn=list), face) as steps:
        outcomes = steps.outcomes()
    assert [str(one) if isinstance(one, Exception) else one for one in outcomes] == [
        ["a0", "b0", "c0", "a1"],
        ["b1", "c1", "a2", "b2"],
        "b is gone",
        ["c2", "a3", "c3", "a4"],
        ["a5", "a6", "a7", "a8"],
    ]


async def later(sample: str) -> str:
    return sample


def never(_: str) -> bool:
    return False


def is_text(sample: Any) -> bool:
    return isinstance(sample, str)


TAILS: dict[str, Callable[[Pipeline], Pipeline]] = {
    "nothing": lambda pipeline: pipeline,
    "map": lambda pipeline: pipeline.map(str, concurrency=3),
    "async map": lambda pipeline: pipeline.map(later, concurrency=3),
    "as completed": lambda pipeline: pipeline.map(later, ordered=False),
    "batch": lambda pipeline: pipeline.batch(4, collate_fn=list),
    "filter, batch": lambda pipeline: pipeline.filter(bool).batch(4, collate_fn=list).prefetch(0),
    "unbatch": lambda pipeline: pipeline.batch(4, collate_fn=list).unbatch().batch(3, collate_fn=list),
    "flat_map": lambda pipeline: pipeline.flat_map(lambda sample: [sample + "x", sample + "y"]),
    "shuffle": lambda pipeline: pipeline.shuffle(3).batch(2, collate_fn=list),
    "enumerate": lambda pipeline: pipeline.enumerate().map(lambda pair: pair[1]),
    "skip, take": lambda pipeline: pipeline.skip(0).take(100),
    "drop_if": lambda pipeline: pipeline.drop_if(never).batch(4, collate_fn=list),
    "max_wait": lambda pipeline: pipeline.batch(4, max_wait=60, collate_fn=list),
    "merged again": lambda pipeline: Pipeline.merge(pipeline, []).batch(4, collate_fn=list),
    "interleaved again": lambda pipeline: Pipeline.interleave(pipeline, []),
    "mixed with others": lambda pipeline: Pipeline.mix([range(9), pipeline], [1, 1], seed=3).filter(is_text),
    "interleaved with others": lambda pipeline: Pipeline.interleave(range(9), pipeline).filter(is_text),
    "mixed again": lambda pipeline: Pipeline.mix([[], pipeline], [1, 1]).batch(4, collate_fn=list),
    "one rank": lambda pipeline: pipeline.shard(0, 1).batch(4, collate_fn=list),
    "process": lambda pipeline: pipeline.in_process().batch(4, collate_fn=list),
}
REPEATS = {"unbatch", "flat_map", "shuffle", "as completed"}
"""What is known by number there is not told once a source has failed: samples may come again."""


def flat(outcomes: list[Any]) -> list[str]:
    """The samples in what came."""
    return [
        sample
        for outcome in outcomes
        if not isinstance(outcome, Exception)
        for sample in (outcome if isinstance(outcome, list) else [outcome])
    ]


def expected(samples: list[str], tail: str) -> list[str]:
    return [sample + end for sample in samples for end in "xy"] if tail == "flat_map" else samples


def each_tail(*without: str) -> pytest.MarkDecorator:
    """Each way to combine, with each tail that may follow it."""
    return pytest.mark.parametrize(
        ("how", "tail"),
        [
            pytest.param(combine, tail, id=f"{name}, {tail}")
            for name, combine in HOWS.items()
            for tail in TAILS
            if tail not in without and (name, tail) != ("merge", "one rank")  # ranks must see one order
        ],
    )


@on_both_faces
@each_tail()
def test_whatever_follows_nothing_is_lost(face: Face, how: Combine, tail: str) -> None:
    """The error once, and every sample of the others."""
    loader = TAILS[tail](how(*abc(fails=True)))
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    loader.close()
    assert [str(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == ["b is gone"]
    assert sorted(flat(outcomes)) == sorted(expected(LEFT, tail))


@on_both_faces
def test_ranks_lose_nothing(face: Face) -> None:
    """Each sees the error, and gets its part of what the others give."""
    found = []
    for rank in range(3):
        loader = Pipeline.interleave(*abc(fails=True)).shard(rank, 3, even="drop")
        with Steps(loader, face) as steps:
            outcomes = steps.outcomes()
        assert [str(one) for one in outcomes if isinstance(one, Exception)] == ["b is gone"]
        found += flat(outcomes)
    assert len(found) == len(LEFT) // 3 * 3
    assert len(set(found)) == len(found)


@on_both_faces
@each_way
def test_the_next_round_and_the_next_epoch_try_it_again(face: Face, how: Combine) -> None:
    """Each begins with all sources."""
    faulty = Source("b", 8, 3)
    loader = how(Source("a", 9), faulty, Source("c", 4)).repeat(2)
    for _ in range(2):
        with Steps(loader, face) as steps:
            outcomes = steps.outcomes()
        assert [str(one) for one in outcomes if isinstance(one, Exception)] == ["b is gone"] * 2
        assert sorted(flat(outcomes)) == sorted(LEFT * 2)
    faulty.fails_at = None
    with Steps(loader, face) as steps:
        assert sorted(steps.rest()) == sorted(ALL * 2)


@on_both_faces
@each_way
def test_repeating_errors_alone_comes_to_an_end(face: Face, how: Combine) -> None:
    """A round that gives no sample is the last one, as where a source is empty."""
    with Steps(how(Source("a", 3, 0), Source("b", 3, 0)).repeat(), face) as steps:
        assert sorted(map(str, steps.outcomes())) == ["a is gone", "b is gone"]


# -- a resume --------------------------------------------------------------------------------------------------------


@on_both_faces
@each_tail("process", "max_wait")
def test_a_resume_tries_it_again(face: Face, how: Combine, tail: str) -> None:
    """From a state at any step: that source goes on where it had failed, and nothing of any source is lost."""
    describe = TAILS[tail]
    steps_before = 0
    while True:
        failing = describe(how(*abc(fails=True)))
        before: list[Any] = []
        with Steps(failing, face) as steps:
            for _ in range(steps_before):
                try:
                    before.append(steps.next())
                except StopIteration:
                    return
                except OSError as error:
                    before.append(error)
            state = failing.state_dict()
        again = describe(how(*abc(fails=False)))
        again.load_state_dict(state)
        with Steps(again, face) as steps:
            after = steps.rest()
        found = collections.Counter(flat(before) + flat(after))
        whole = collections.Counter(expected(ALL, tail))
        assert not whole - found, (steps_before, before, after)
        if tail not in REPEATS:
            assert found == whole, (steps_before, before, after)
        steps_before += 1
        if len(flat(before)) >= len(expected(LEFT, tail)):
            return


def nested(*sources: Any) -> Pipeline:
    return Pipeline.interleave(mix(*sources), list("xyz" * 5))


@on_both_faces
@pytest.mark.parametrize("how", [Pipeline.interleave, mix, nested], ids=["interleave", "mix", "nested"])
def test_right_after_the_error_the_order_is_that_without_it(face: Face, how: Combine) -> None:
    """The source that failed has its turn again, or is drawn again."""
    failing = how(*abc(fails=True))
    before: list[str] = []
    with Steps(failing, face) as steps:
        while not (outcomes := steps.outcomes(1)) or isinstance(outcomes[0], str):
            before += outcomes
        assert str(outcomes[0]) == "b is gone"
        state = failing.state_dict()
    again = how(*abc(fails=False))
    again.load_state_dict(state)
    with Steps(again, face) as steps:
        after = steps.rest()
    with Steps(how(*abc(fails=False)), face) as steps:
        assert before + after == steps.rest()


@on_both_faces
def test_a_source_that_fails_again_fails_again(face: Face) -> None:
    """A resume raises its error once more, and the others go on."""
    failing = Pipeline.interleave(*abc(fails=True)).batch(4, collate_fn=list)
    with Steps(failing, face) as steps:
        before = [steps.next() for _ in range(3)]
        with pytest.raises(OSError, match="b is gone"):
            steps.next()
        state = failing.state_dict()
    failing.load_state_dict(state)
    with Steps(failing, face) as steps:
        after = steps.outcomes()
    assert [str(one) for one in after if isinstance(one, Exception)] == ["b is gone"]
    assert sorted(flat(before) + flat(after)) == sorted(LEFT)


# -- the nodes, against plain models ---------------------------------------------------------------------------------


class Scripted(Node):
    """Gives numbers, now and then nothing, and fails in the end if it is told to."""

    def __init__(self, length: int, fails: bool, ready: Iterator[int]) -> None:
        self._next = 0
        self._length = length
        self._fails = fails
        self._ready = ready
        self.closed = False

    def resume(self, cursor: Any) -> None:
        self._next = cursor

    def start(self, run: Any, kick: Kick) -> None: ...

    def poll(self, limit: int) -> list[Entry]:
        assert not self.ended
        taken = []
        for _ in range(min(limit, next(self._ready))):
            if self._next == self._length:
                if self._fails:
                    taken.append(Entry.last(OSError("gone"), self._next, self._next))
                self.ended = True
                break
            taken.append(entry := Entry(self._next, self._next + 1, self._next, self._next))
            entry.state = DONE
            self._next += 1
        return taken

    def close(self) -> None:
        self.closed = True


def everything(node: Node) -> list[tuple[int, int | None]]:
    """Pairs of the number of the source and of its sample; None: it failed."""
    found: list[tuple[int, int | None]] = []
    for _ in range(10_000):
        if node.ended:
            return found
        for entry in node.poll(3):
            assert entry.state in (DONE, ONE_LOST)
            key: Any = entry.key
            found.append((key.source, None if entry.state == ONE_LOST else entry.value))
    pytest.fail("it does not end")


def in_turn(sources: list[tuple[int, bool]]) -> list[tuple[int, int | None]]:
    """`interleave`, as a plain loop."""
    found: list[tuple[int, int | None]] = []
    iterators: dict[int, Iterator[int]] = {number: iter(range(length)) for number, (length, _) in enumerate(sources)}
    while iterators:
        for number, iterator in list(iterators.items()):
            sample = next(iterator, None)
            if sample is not None or sources[number][1]:
                found.append((number, sample))
            if sample is None:
                del iterators[number]
    return found


def drawn(sources: list[tuple[int, bool]], seed: int) -> list[tuple[int, int | None]]:
    """`mix`, as a plain loop: a source that has failed is drawn no more, as one that has ended."""
    random = Random(seed)
    weights = [number + 1.0 for number in range(len(sources))]
    given = [0] * len(sources)
    found: list[tuple[int, int | None]] = []
    while any(weights):
        bounds = list(itertools.accumulate(weights))
        point = random.random() * bounds[-1]
        number = next(index for index, bound in enumerate(bounds) if point < bound)
        length, fails = sources[number]
        if given[number] < length:
            found.append((number, given[number]))
            given[number] += 1
        else:
            weights[number] = 0.0
            if fails:
                found.append((number, None))
    return found


SOURCES = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=4)
READY = st.lists(st.integers(0, 3), min_size=1, max_size=7).filter(any)


@given(sources=SOURCES, ready=READY, seed=st.integers(0, 9))
def test_the_order_is_that_of_a_plain_loop(sources: list[tuple[int, bool]], ready: list[int], seed: int) -> None:
    """Whoever is slow."""

    def upstreams() -> list[Node]:
        return [
            Scripted(length, fails, itertools.islice(itertools.cycle(ready), number, None))
            for number, (length, fails) in enumerate(sources)
        ]

    weights = [number + 1.0 for number in range(len(sources))]
    assert everything(InterleaveNode(upstreams())) == in_turn(sources)
    assert everything(MixNode(upstreams(), weights, seed)) == drawn(sources, seed)
    merged = everything(MergeNode(upstreams()))
    assert sorted(merged, key=str) == sorted(in_turn(sources), key=str)
    for number in range(len(sources)):
        assert [one for one in merged if one[0] == number] == [one for one in in_turn(sources) if one[0] == number]


def test_what_has_failed_is_closed_and_left_alone() -> None:
    """It is polled no more."""
    nodes = [Scripted(3, fails, itertools.repeat(2)) for fails in (False, True)]
    node = MergeNode(nodes)
    assert (1, None) in everything(node)
    assert nodes[1].closed


def test_zip_of_nodes_ends_with_the_error() -> None:
    """As ever."""
    zipped = ZipNode([Scripted(3, False, itertools.repeat(2)), Scripted(1, True, itertools.repeat(2))])
    states = []
    while not zipped.ended:
        states += [entry.state for entry in zipped.poll(2)]
    assert states == [0, LAST]


COUNTING: dict[str, Callable[[Pipeline], Pipeline]] = {
    "unbatch": lambda pipeline: pipeline.batch(3, collate_fn=list).unbatch(),
    "shuffle": lambda pipeline: pipeline.shuffle(4),
    "flat_map": lambda pipeline: pipeline.flat_map(lambda sample: [sample, sample]),
}


@on_both_faces
@pytest.mark.parametrize("name", COUNTING)
def test_a_state_after_the_error_promises_no_more_than_it_keeps(face: Face, name: str) -> None:
    """Stages that know entries by number forget them, since that source takes part again: samples may come twice."""
    loader = COUNTING[name](Pipeline.interleave(*abc(fails=True)))
    with Steps(loader, face) as steps:
        while True:
            before = loader.state_dict()["guarantee"]
            try:
                steps.next()
            except OSError:
                break
        assert before != "at-least-once"
        assert loader.state_dict()["guarantee"] == "at-least-once"
    assert Pipeline.interleave(*abc(fails=True)).batch(2, collate_fn=list).state_dict()["guarantee"] == before
