"""A stage that is added as CONTRIBUTING says, and says nothing of itself, promises no more than is true."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from aioloader import Pipeline
from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.engine.node import Fold
from aioloader.stages.base import FoldStage, Pass
from aioloader.testing import assert_resumes_exactly
from tests._support import Face, Steps, on_both_faces
from tests.test_resume import later, numbers, odd_fail


@dataclass(frozen=True)
class Each(FoldStage):
    """Each sample `n` times. Cursor: the one *before* the sample, and how many of it are out."""

    n: int

    @property
    def label(self) -> str:
        return f"each({self.n})"

    def length(self, upstream: int) -> int:
        return self.n * upstream

    def fold(self, this_pass: Pass) -> Fold:
        return _EachFold(self.n)


class _EachFold:
    full = False

    def __init__(self, n: int) -> None:
        self._n = n
        self._before: Any = None
        self._out = 0  # of the next sample, before a resume

    def resume(self, cursor: Any) -> Any:
        self._before, out = cursor_parts(cursor, 2)
        self._out = as_count(out, self._n)
        return self._before

    def failed_at(self, cursor: Any) -> Any:
        return (cursor, 0)

    def wants(self, limit: int) -> int:
        return 1

    def feed(self, run: list[Entry]) -> Iterable[Entry]:
        for entry in run:
            after = entry.cursor
            for out in range(self._out + 1, self._n + 1):
                copy = entry.derived(entry.value, (self._before, out), entry.key, entry.position)
                copy.error = entry.error
                yield copy
            self._before, self._out = after, 0

    def flush(self) -> Iterable[Entry]:
        return []


class AsItIs(Each):
    """Each sample once, with the cursor that it came with."""

    def fold(self, this_pass: Pass) -> Fold:
        return _AsItIsFold(1)


class _AsItIsFold(_EachFold):
    def resume(self, cursor: Any) -> Any:
        return cursor

    def failed_at(self, cursor: Any) -> Any:
        return cursor

    def feed(self, run: list[Entry]) -> Iterable[Entry]:
        return run


def each(pipeline: Pipeline, n: int = 3) -> Pipeline:
    return pipeline._then(Each(n))


def guarantee(pipeline: Pipeline) -> str:
    return str(pipeline.state_dict()["guarantee"])


EXACT: dict[str, Callable[[], Pipeline]] = {
    "keys": lambda: each(Pipeline(range(11)).shuffle(seed=1)),
    "a stream": lambda: each(Pipeline(numbers).shuffle(4)),
    "ordered maps": lambda: each(Pipeline(range(11)).map(later, concurrency=4).map(odd_fail)),
    "behind a batch": lambda: each(Pipeline(range(11)).batch(2)),
    "twice": lambda: each(each(Pipeline(range(5)))),
    "repeat": lambda: each(Pipeline(range(5)).repeat(2)),
    "zip": lambda: Pipeline.zip(each(Pipeline(range(5))), range(12)),
}


@pytest.mark.parametrize("name", EXACT)
def test_where_it_says_exact_it_is(name: str) -> None:
    """In the order of its input, from each state."""
    make = EXACT[name]
    assert guarantee(make()) == ("replayed" if name == "a stream" else "exact")
    assert_resumes_exactly(lambda: make().batch(2))


LOOSE: dict[str, Callable[[], Pipeline]] = {
    "ordered=False": lambda: Pipeline(range(8)).map(later, ordered=False, concurrency=4),
    "merge": lambda: Pipeline.merge(Pipeline(range(4)).map(later), range(4, 8)),
    "a filter behind": lambda: Pipeline(range(8)).map(later, ordered=False, concurrency=4).filter(lambda x: x >= 0),
    "a mix of them": lambda: Pipeline.mix([Pipeline(range(8)).map(later, ordered=False, concurrency=4)], [1.0]),
}


@on_both_faces
@pytest.mark.parametrize("stage", [Each(3), AsItIs(1)])
@pytest.mark.parametrize("name", LOOSE)
def test_behind_samples_without_an_order_it_loses_none(name: str, stage: Each, face: Face) -> None:
    """Its cursors may be wrong there: the state says so, and a resume gives some again rather than never."""

    def make() -> Pipeline:
        return LOOSE[name]()._then(stage)

    assert guarantee(make()) == "at-least-once"
    whole_epoch = Counter(sample for sample in range(8) for _ in range(stage.n))
    for taken in range(1, 8 * stage.n):
        loader = make()
        with Steps(loader, face) as steps:
            before = [steps.next() for _ in range(taken)]
            state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        rest = make()
        rest.load_state_dict(state)
        with Steps(rest, face) as steps:
            later_on = steps.rest() if taken < 8 * stage.n else []
        assert Counter(before + later_on) >= whole_epoch, f"after {taken}"


def test_a_cache_gives_it_copies() -> None:
    """Nobody said that it leaves samples as they are."""
    kept = Pipeline([[0], [1]]).cache(memory_bytes=1 << 20)
    pipeline = each(kept, 1)
    for _ in range(2):
        for sample in pipeline:
            sample.append("mine")
    assert list(kept) == [[0], [1]]


def test_a_cache_behind_it_is_refused() -> None:
    """Nobody said that each epoch gives the same samples in the same order."""
    with pytest.raises(ValueError, match=r"cache\(\) after each\(3\) cannot tell samples apart"):
        each(Pipeline(numbers)).cache(memory_bytes=1 << 20)


def test_actors_refuse_to_run_it_part_by_part() -> None:
    """Nobody said that it makes of each part what it makes of the whole."""
    with pytest.raises(ValueError, match=r"each\(3\) would count in each of them; put it after in_ray\(\)"):
        each(Pipeline(range(6))).in_ray(actors=0, parts=2)
