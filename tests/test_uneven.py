"""A warning where stages after `shard` leave ranks with different numbers of batches."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aioloader import Pipeline, UnevenWarning
from tests._support import Face, collect, on_both_faces


def even(n: int) -> bool:
    return n % 2 == 0


def twice(n: int) -> list[int]:
    return [n, n]


Build = Callable[[Pipeline], Pipeline]

UNEVEN: dict[str, Build] = {
    "filter(even)": lambda dealt: dealt.filter(even),
    "flat_map(twice)": lambda dealt: dealt.map(abs).flat_map(twice),
    "filter(even) after take": lambda dealt: dealt.take(8).filter(even),
    "filter(even) of one of two": lambda dealt: Pipeline.zip(dealt.filter(even), range(40)),
    "filter(even) of two": lambda dealt: Pipeline.interleave(dealt, dealt).filter(even),
    "drop_if(even)": lambda dealt: dealt.drop_if(even),
}
EVEN: dict[str, Build] = {
    "maps": lambda dealt: dealt.map(abs).enumerate(),
    "unbatch": lambda dealt: dealt.batch(2).unbatch(),
    "endless, of two": lambda dealt: Pipeline.zip(dealt.filter(even), range(40)).repeat(),
    "take": lambda dealt: dealt.filter(even).take(4),
    "endless": lambda dealt: dealt.filter(even).repeat(),
    "skip_errors": lambda dealt: dealt.map(abs).skip_errors(),
    "repeat": lambda dealt: dealt.repeat(2),
}


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def told(loader: Any, face: Face) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            collect(loader, face, limit=4)
    return [one for one in caught if issubclass(one.category, UnevenWarning)]


@on_both_faces
@pytest.mark.parametrize("stage", UNEVEN)
@pytest.mark.usefixtures("second_of_two")
def test_such_a_stage_is_named_once(face: Face, stage: str) -> None:
    (one,) = told(UNEVEN[stage](Pipeline(range(40)).shard()), face)
    assert f"{stage.split(' ')[0]} after shard()" in str(one.message)
    assert Path(one.filename).name in ("test_uneven.py", "_support.py")


@on_both_faces
@pytest.mark.parametrize("stage", EVEN)
@pytest.mark.usefixtures("second_of_two")
def test_others_are_not(face: Face, stage: str) -> None:
    assert not told(EVEN[stage](Pipeline(range(40)).shard()), face)


@on_both_faces
@pytest.mark.usefixtures("second_of_two")
def test_before_it_all_ranks_see_alike(face: Face) -> None:
    assert not told(Pipeline(range(40)).filter(even).shard().batch(2), face)


@on_both_faces
def test_one_rank_is_told_nothing(face: Face) -> None:
    assert not told(Pipeline(range(40)).shard().filter(even), face)
    assert not told(Pipeline(range(40)).shard(0, 2).filter(even), face)
