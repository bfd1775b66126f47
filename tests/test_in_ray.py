"""`in_ray` without Ray: how a pipeline is dealt into parts, in which order they give, and what is refused."""

import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler

from aioloader import Limit, Pipeline, Rate, StateError, sample_rng
from aioloader.sources import Channel, Lines
from aioloader.testing import assert_resumes_exactly
from tests._datasets import assert_same
from tests._support import Face, Steps, collect, notes, on_both_faces

POOL = ThreadPoolExecutor(1)  # it never begins a thread


def plus_one(sample: int) -> int:
    return sample + 1


def even(sample: int) -> bool:
    return sample % 2 == 0


def fails_at_seven(sample: int) -> int:
    if sample == 7:
        raise KeyError("seven")
    return sample


def noise(sample: int) -> torch.Tensor:
    return torch.rand(3, generator=sample_rng()) + sample


def numbers() -> Iterator[int]:
    yield from range(23)


async def later() -> AsyncIterator[int]:
    for number in range(23):
        yield number


def in_turn(parts: list[list[Any]]) -> list[Any]:
    """One of each in turn; those that have ended drop out of the turn."""
    found = []
    for step in range(max(map(len, parts), default=0)):
        found += [part[step] for part in parts if step < len(part)]
    return found


def plain(batches: list[Any]) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in batches]


@on_both_faces
def test_batches_of_the_parts_come_one_each_in_turn(face: Face) -> None:
    """Part i has every n-th sample of the epoch's order, and batches of its own."""
    loader = Pipeline(range(37)).shuffle(seed=1).map(plus_one).batch(4).in_ray(actors=0, parts=3)
    for epoch in range(2):
        whole = Pipeline(range(37)).shuffle(seed=1).map(plus_one)
        whole.set_epoch(epoch)
        order = list(whole)
        parts = [[order[i::3][at : at + 4] for at in range(0, len(order[i::3]), 4)] for i in range(3)]
        assert plain(collect(loader, face)) == in_turn(parts)


@on_both_faces
@pytest.mark.parametrize("source", [numbers, later, list(range(23))], ids=["generator", "async", "list"])
def test_parts_of_any_source_have_each_sample_once(face: Face, source: Any) -> None:
    """A stream is read once for each part, which keeps its share."""
    loader = Pipeline(source).map(plus_one).in_ray(actors=0, parts=4)
    assert collect(loader, face) == list(range(1, 24))


def test_samples_of_one_pipeline_and_of_its_parts_have_the_same_random_numbers() -> None:
    """They belong to the key of a sample."""
    whole = Pipeline(range(12)).with_seed(5).map(noise)
    assert_same(list(whole.in_ray(actors=0, parts=3)), list(whole))


@pytest.mark.parametrize(
    ("pipeline", "batches"),
    [
        (Pipeline(range(37)).batch(4), 10),
        (Pipeline(range(37)).batch(4, drop_last=True), 9),
        (Pipeline(range(2)).batch(4), 2),
        (Pipeline([]).batch(4), 0),
        (Pipeline(range(37)), 37),
        (Pipeline(range(37)).take(10).batch(4), 3),
    ],
)
def test_its_length_is_that_of_all_parts(pipeline: Pipeline[Any], batches: int) -> None:
    """Each part may end with a shorter batch."""
    loader = pipeline.in_ray(actors=0, parts=3)
    assert len(loader) == len(list(loader)) == batches


def test_pipelines_that_are_combined_are_dealt_each_for_itself() -> None:
    """Not all of their samples are made for each part."""
    made: list[int] = []

    def make(sample: int) -> int:
        made.append(sample)
        return sample

    mixed = Pipeline.mix([Pipeline(range(20)).map(make), range(100, 120)], [1, 1], seed=3)
    assert sorted(mixed.in_ray(actors=0, parts=4)) == [*range(20), *range(100, 120)]
    assert sorted(made) == list(range(20))
    pairs = Pipeline.zip(range(20), range(100, 120)).in_ray(actors=0, parts=3)
    assert sorted(pairs) == [(at, 100 + at) for at in range(20)]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven files with lines of different numbers."""
    paths = [tmp_path / f"{number}.txt" for number in range(7)]
    for number, path in enumerate(paths):
        path.write_text("".join(f"{number}-{line}\n" for line in range(number + 2)))
    return paths


def test_files_are_dealt_where_there_are_as_many_as_parts(files: list[Path]) -> None:
    """So that each part opens its own alone."""
    loader = Pipeline(Lines(files)).batch(2, collate_fn=list).in_ray(actors=0, parts=3)
    parts = [
        list(Pipeline(Lines(files)).shard(number, 3, by="file", even="keep").batch(2, collate_fn=list))
        for number in range(3)
    ]
    assert list(loader) == in_turn(parts)
    with pytest.raises(TypeError):
        len(loader)


def test_lines_are_dealt_where_there_are_fewer_files(files: list[Path]) -> None:
    """Each sample still comes once."""
    whole = list(Pipeline(Lines(files)))
    assert list(Pipeline(Lines(files)).in_ray(actors=0, parts=8)) == whole


def test_files_of_a_rank_are_dealt_among_its_parts(files: list[Path]) -> None:
    """Nobody else reads them."""
    ranks = [
        list(Pipeline(Lines(files)).shard(rank, 2, by="file", even="keep").in_ray(actors=0, parts=3))
        for rank in range(2)
    ]
    assert sorted([*ranks[0], *ranks[1]]) == sorted(Pipeline(Lines(files)))
    for rank in range(2):
        assert sorted(ranks[rank]) == sorted(Pipeline(Lines(files)).shard(rank, 2, by="file", even="keep"))


@on_both_faces
def test_errors_stand_at_their_place(face: Face) -> None:
    """In the batch of their part; the next part follows."""
    loader = Pipeline(range(20)).map(fails_at_seven).batch(5).in_ray(actors=0, parts=2)
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert [type(outcome) for outcome in outcomes] == [torch.Tensor, KeyError, torch.Tensor, torch.Tensor]
    assert "stage map(fails_at_seven), key 7" in notes(outcomes[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pipeline(range(23)).shuffle(seed=2).map(plus_one).batch(3).in_ray(actors=0, parts=4),
        lambda: Pipeline(numbers).map(plus_one).shuffle(buffer_size=3).batch(2).in_ray(actors=0, parts=3),
        lambda: Pipeline(range(23)).filter(even).flat_map(lambda x: [x] * (x % 3)).in_ray(actors=0, parts=3),
        lambda: Pipeline(range(20)).shard(1, 2).map(fails_at_seven).batch(2).in_ray(actors=0, parts=3).take(4),
        lambda: Pipeline(range(9)).shuffle(seed=2).batch(2).in_ray(actors=0, parts=2).repeat(2),
        lambda: Pipeline.mix([range(9), range(100, 105)], [2, 1]).batch(2).in_ray(actors=0, parts=2),
    ],
    ids=["keys", "stream", "filter", "shard", "repeat", "mix"],
)
def test_it_resumes_exactly_from_every_batch(make: Any) -> None:
    """Whatever is before it."""
    assert_resumes_exactly(make)


def test_ranks_have_one_state_and_each_sample_once() -> None:
    """With shard() before it: at a step all ranks are at the same place of the order."""

    def make(rank: int) -> Pipeline[Any]:
        return Pipeline(range(48)).shuffle(seed=4).shard(rank, 2).map(plus_one).batch(3).in_ray(actors=0, parts=4)

    seen: list[int] = []
    states = []
    for rank in range(2):
        with make(rank) as loader:
            batches = iter(loader)
            for _ in range(3):
                seen += next(batches).tolist()
            states.append(loader.state_dict())
    assert json.dumps(states[0]) == json.dumps(states[1])
    for rank in range(2):
        with make(rank) as loader:
            loader.load_state_dict(states[0])
            seen += [sample for batch in loader for sample in batch.tolist()]
    assert sorted(seen) == list(range(1, 49))


def test_a_state_says_how_many_parts_there_are_unless_the_user_does() -> None:
    """So that another number of actors can go on from it."""

    def make(parts: int | None = None) -> Pipeline[Any]:
        return Pipeline(range(40)).batch(4).in_ray(actors=0, parts=parts)

    with make(6) as loader:
        batches = iter(loader)
        next(batches)
        state, rest = loader.state_dict(), plain(list(batches))
    other = make()
    other.load_state_dict(state)
    assert repr(other).endswith(".in_ray(actors=0, parts=6)")
    assert plain(list(other)) == rest
    with pytest.raises(StateError, match=r"stage 2 is in_ray\(parts=5\), and was in_ray\(parts=6\)"):
        make(5).load_state_dict(state)
    with pytest.raises(StateError):
        other.load_state_dict({})
    assert repr(other).endswith("parts=6)")


def test_a_state_of_another_number_of_ranks_is_refused() -> None:
    """A place in a part is one of so many ranks' parts."""
    with Pipeline(range(40)).shard(0, 2).batch(2).in_ray(actors=0, parts=4) as loader:
        next(iter(loader))
        state = loader.state_dict()
    with pytest.raises(StateError, match=r"world_size=2, and this is rank 0 of 4: after in_ray\(\) a position"):
        Pipeline(range(40)).shard(0, 4).batch(1).in_ray(actors=0, parts=4).load_state_dict(state)


def test_one_part_that_fails_raises_once_and_the_others_go_on() -> None:
    """A resume tries it again."""

    def source() -> Iterator[int]:
        yield from range(4)
        raise OSError("gone")

    with Steps(Pipeline(source).in_ray(actors=0, parts=2), "for") as steps:
        outcomes = steps.outcomes()
    assert outcomes[:4] == [0, 1, 2, 3]
    assert [str(outcome) for outcome in outcomes[4:]] == ["gone", "gone"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Pipeline(range(4)).in_ray().in_ray(), ValueError, r"in_ray\(\) must come before in_ray"),
        (lambda: Pipeline(range(4)).in_process().in_ray(), ValueError, "must come before in_process"),
        (lambda: Pipeline(range(4)).in_ray().in_process(), ValueError, "must come before in_ray"),
        (lambda: Pipeline(range(4)).batch(2).to("cpu").in_ray(), ValueError, r"must (come before|be the last stage)"),
        (lambda: Pipeline(range(4)).batch(2).pin_memory().in_ray(), ValueError, "must come before pin_memory"),
        (lambda: Pipeline(Channel(4)).in_ray(), ValueError, "reads its source in other processes"),
        (lambda: Pipeline(number for number in range(4)).in_ray(), ValueError, "the generator function itself"),
        (lambda: Pipeline(range(4)).map(plus_one, concurrency=Limit(2)).in_ray(), ValueError, "concurrency=2"),
        (lambda: Pipeline(range(4)).map(plus_one, rate=Rate(2)).in_ray(), ValueError, "cannot share its Rate"),
        (lambda: Pipeline(range(4)).map(plus_one, executor="ray").in_ray(), ValueError, "in actors of its own"),
        (lambda: Pipeline(range(4)).map(plus_one, executor=POOL).in_ray(), ValueError, "is one of this process"),
        (lambda: Pipeline(range(4), sampler=RandomSampler(range(4))).in_ray(), ValueError, "random generators behind"),
        (lambda: Pipeline.merge(range(4), range(4)).in_ray(), ValueError, "as they come"),
        (lambda: Pipeline(range(4)).enumerate().in_ray(), ValueError, r"enumerate\(\) would count in each"),
        (lambda: Pipeline(numbers).take(2).in_ray(), ValueError, r"take\(2\) would count in each of them"),
        (lambda: Pipeline(range(9)).batch(2).take(2).in_ray(), ValueError, r"take\(2\) would count in each of them"),
        (lambda: Pipeline(numbers).cache(memory_bytes=1 << 20).in_ray(), ValueError, "by their positions in it"),
        (lambda: Pipeline(range(4)).in_ray(actors=-1), ValueError, "actors must be at least 0"),
        (
            lambda: Pipeline(range(4)).in_ray(actors=4, parts=3),
            ValueError,
            "at least as many, got actors=4 and parts=3",
        ),
        (lambda: Pipeline(range(4)).in_ray(parts=0), ValueError, "parts must be at least 1"),
        (lambda: Pipeline(range(4)).in_ray(ahead=0), ValueError, "ahead must be at least 1"),
        (lambda: Pipeline(range(4)).in_ray(num_cpus=-1), ValueError, "cpus must be at least 0"),
        (lambda: Pipeline(range(4)).in_ray(pool="readers"), TypeError, "pool must be a RayPool"),
        (lambda: Pipeline(range(4)).in_ray().shard(0, 2), ValueError, r"shard\(\) comes before in_ray\(\)"),
        (lambda: Pipeline(range(4)).scale(actors=2), ValueError, "and this pipeline has none"),
        (lambda: Pipeline(range(4)).in_ray(actors=0).scale(actors=2), ValueError, "has none; pass in_ray"),
        (lambda: Pipeline(range(4)).in_ray(actors=2, parts=2).scale(actors=3), ValueError, "got actors=3 for in_ray"),
        (lambda: Pipeline(range(4)).in_ray().scale(actors=0), ValueError, "actors must be at least 1"),
        (
            lambda: Pipeline(range(4)).map(plus_one).batch(2).in_ray().max_staleness(1),
            ValueError,
            r"cannot hold with in_ray",
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(make: Any, error: type[Exception], words: str) -> None:
    """The rule, what was found, and the way out."""
    with pytest.raises(error, match=words):
        make()


def test_it_imports_ray_only_when_it_runs_there() -> None:
    """A description costs nothing."""
    import subprocess
    import sys

    code = (
        "import sys; from aioloader import Pipeline; list(Pipeline(range(3)).in_ray(actors=0)); "
        "Pipeline(range(3)).in_ray(); print('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
