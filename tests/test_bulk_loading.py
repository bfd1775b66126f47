"""Datasets with `__getitems__` in a pipeline: several samples by one call, where that is cheaper, and never else."""

from collections import Counter
from typing import Any

import pytest

from aioloader import Pipeline, sample_rng
from aioloader.core.keys import PartKey
from aioloader.engine.bulk_load_step import MOST, _Size
from aioloader.testing import Gate
from tests._support import Face, Started, Steps, collect, on_both_faces


class Table:
    """Rows by number, one or many at a time; some of them are broken."""

    def __init__(self, rows: int, *broken: int) -> None:
        self._rows = rows
        self._broken = broken
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, key: int) -> int:
        self.asked.append(1)
        if key in self._broken:
            raise ValueError(f"no {key}")
        return key

    def __getitems__(self, keys: list[int]) -> list[int]:
        self.asked.append(len(keys))
        if set(keys) & set(self._broken):
            raise ValueError("no row of these")
        return list(keys)


def grow_to(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on, calls are for `size` samples, until they turn out not to work."""

    def measured(self: _Size, _count: int, _seconds: float) -> None:
        if not self._settled:
            self.now = size

    monkeypatch.setattr(_Size, "measured", measured)


def test_the_size_doubles_while_samples_get_cheaper() -> None:
    """A call costs 100 and a sample 1: 64 together are nearly free of the call's share."""
    size = _Size()
    for _ in range(20):
        size.measured(size.now, 100 + size.now)
    assert size.now == MOST


def test_the_size_stays_at_one_where_samples_cost_the_same() -> None:
    """They are then loaded side by side, and none waits for its neighbours."""
    size = _Size()
    for _ in range(20):
        size.measured(size.now, 100 * size.now)
    assert size.now == 1


@on_both_faces
def test_all_rows_come_in_order(face: Face) -> None:
    """Whatever is asked together; with and without stages behind."""
    table = Table(1000)
    assert collect(Pipeline(table), face) == list(range(1000))
    assert collect(Pipeline(table).map(lambda n: n + 1).filter(lambda n: n % 2 == 0), face) == list(range(2, 1001, 2))
    assert sum(table.asked) == 2000


@pytest.mark.parametrize("size", [1, 8, MOST])
def test_a_failed_row_raises_at_its_place(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its group are loaded one by one."""
    grow_to(size, monkeypatch)
    with Steps(Pipeline(Table(200, 0, 77, 199)), "for") as steps:
        found = steps.outcomes()
    assert [str(error) for error in found if isinstance(error, Exception)] == ["no 0", "no 77", "no 199"]
    assert [str(found[n]) for n in (0, 77, 199)] == ["no 0", "no 77", "no 199"]
    assert [n for n in found if isinstance(n, int)] == [n for n in range(200) if n not in (0, 77, 199)]


@pytest.mark.parametrize("behind", ["batch", "unbatch", "flat_map", "zip", "shard"])
def test_rows_that_were_asked_for_again_say_so(behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all stages that make one entry of others. Of a batch: the most of its samples."""
    grow_to(8, monkeypatch)
    asked: Counter[int] = Counter()

    class Counts(Table):
        def __getitem__(self, key: int) -> int:
            asked[key] += 1
            return super().__getitem__(key)

        def __getitems__(self, keys: list[int]) -> list[int]:
            asked.update(keys)
            return super().__getitems__(keys)

    rows = Pipeline(Counts(64, *range(1, 64, 4))).map(abs)
    samples = {
        "batch": rows.batch(2),
        "unbatch": rows.batch(2).unbatch(),
        "flat_map": rows.flat_map(lambda row: [row]),
        "zip": Pipeline.zip(range(64), rows),
        "shard": rows.filter(lambda row: row >= 0).shard(1, 2),
    }[behind]
    attempts: dict[int, int] = {}
    with Steps(samples.with_info(), "for") as steps:
        for outcome in steps.outcomes():
            if not isinstance(outcome, ValueError):
                for key in outcome[1].keys:
                    while not isinstance(key, int):
                        key = key.key if isinstance(key, PartKey) else key[1]
                    attempts[key] = outcome[1].attempts
    pairs = behind in ("batch", "unbatch")
    most = {key: max(asked[key], asked[key ^ 1]) if pairs else asked[key] for key in attempts}
    assert attempts == most
    assert 2 in most.values()


def test_a_getitems_that_does_not_work_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises where single rows come, or gives other than was asked for: rows are loaded one by one from then on."""
    grow_to(8, monkeypatch)

    class Raises(Table):
        def __getitems__(self, keys: list[int]) -> list[int]:
            raise NotImplementedError

    class Short(Table):
        def __getitems__(self, keys: list[int]) -> list[int]:
            return keys[1:]

    for kind in (Raises, Short):
        assert collect(Pipeline(kind(100)), "for") == list(range(100))


def test_samples_that_wait_for_each_other_stand_side_by_side() -> None:
    """Slow ones are not asked for together."""
    gate = Gate()

    class Slow(Table):
        def __getitem__(self, key: int) -> int:
            gate.pass_sync()
            return super().__getitem__(key)

        def __getitems__(self, keys: list[int]) -> list[int]:
            raise AssertionError("together")

    with Steps(Pipeline(Slow(2)).map(lambda n: n, concurrency=2), "for") as steps:
        first = Started(steps.next)
        gate.wait_arrived(2)
        gate.open_all()
        assert first.outcome() == 0
        assert steps.rest() == [1]


@pytest.mark.parametrize("swallows", [False, True], ids=["", "swallows the error"])
def test_random_numbers_of_samples_are_those_of_single_rows(swallows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that draws from `sample_rng` is loaded row by row, also if nobody sees that it could not draw."""
    grow_to(8, monkeypatch)

    class Drawing(Table):
        def __getitem__(self, key: int) -> Any:
            return key, sample_rng().random().random()

        def __getitems__(self, keys: list[int]) -> Any:
            try:
                return [self[key] for key in keys]
            except RuntimeError:
                if not swallows:
                    raise
                return [(key, 0.0) for key in keys]

    class Single(Drawing):
        __getitems__ = None  # type: ignore[assignment]

    assert collect(Pipeline(Drawing(50)).with_seed(0), "for") == collect(Pipeline(Single(50)).with_seed(0), "for")
