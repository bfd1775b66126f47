"""`state_dict` and `load_state_dict`: when they may be called, and what they mean (promise 8)."""

import asyncio
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aioloader
from aioloader import DataLoader, Pipeline, ReplayWarning
from aioloader.testing import Gate, assert_resumes_exactly
from tests._states import contents_of
from tests._support import Child, Face, Steps, collect, on_both_faces
from tests.test_resume import later, numbers, pairs_of


def pipeline(length: int = 10) -> Pipeline:
    return Pipeline(range(length)).shuffle(seed=3).batch(3)


def lists(batches: Any) -> list[Any]:
    return [batch.tolist() for batch in batches]


def test_a_state_is_small_and_readable() -> None:
    """What it says after two of four batches; JSON gives it back as it is."""
    loader = pipeline()
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    varying = json.loads(state.pop("cursor")["json"])
    assert state == {
        "format": "aioloader",
        "version": 2,
        "loader": "Pipeline",
        "guarantee": "exact",
        "epoch": 0,
        "batches": 2,
    }
    assert varying.pop("random").keys() == {"sample_seed"}  # drawn once, for `sample_rng`
    assert varying == {
        "cursor": 6,
        "pipeline": [
            {"stage": "source", "kind": "indexable", "name": "range", "length": 10},
            {"stage": "shuffle", "buffer_size": None, "seed": 3},
            {"stage": "batch", "batch_size": 3, "drop_last": False},
        ],
        "ranks": None,
        "left_out": [],
    }
    loader.close()


def test_its_size_does_not_grow_with_the_data() -> None:
    """A hundred times the samples are two digits more."""
    sizes = []
    for length in (1_000, 100_000):
        loader = Pipeline(range(length)).map(later).shuffle(100).batch(4)
        iterator = iter(loader)
        for _ in range(length // 1000):
            next(iterator)
        sizes.append(len(json.dumps(loader.state_dict())))
        loader.close()
    assert sizes[1] - sizes[0] <= 12


@on_both_faces
def test_batches_made_ahead_do_not_count(face: Face) -> None:
    """However much is prefetched, the state is that of the batch in the consumer's hands."""
    loader = pipeline(1000).prefetch(100)
    with Steps(loader, face) as steps:
        steps.next()
        steps.settle(steps._iterator._delivery.run.loop)
        assert (loader.state_dict()["batches"], contents_of(loader.state_dict())["cursor"]) == (1, 3)
        assert steps._iterator.state_dict() == loader.state_dict()


@on_both_faces
def test_loading_takes_effect_when_the_next_epoch_begins(face: Face) -> None:
    """An iterator that was made before but has not begun takes it; one that has begun is not touched."""
    other = pipeline()
    with Steps(other, face) as steps:
        steps.next()
        state = other.state_dict()
        rest = lists(steps.rest())
    loader = pipeline()
    with Steps(loader, face) as begun, Steps(loader, face) as made:
        whole = lists([begun.next()])
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert lists(made.rest()) == rest
        whole += lists(begun.rest())
    assert whole == lists(pipeline())


def test_the_state_is_that_of_the_newest_epoch_that_has_begun() -> None:
    """And each iterator tells its own."""
    loader = pipeline()
    first, second, third = iter(loader), iter(loader), iter(loader)
    next(first)
    next(second)
    next(second)
    next(first)
    next(first)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1, 2)
    assert (first.state_dict()["epoch"], first.state_dict()["batches"]) == (0, 3)
    assert (third.state_dict()["epoch"], third.state_dict()["batches"]) == (2, 0)
    loader.close()


@on_both_faces
@pytest.mark.parametrize("make", [pipeline, lambda: DataLoader(list(range(10)), 3)])
def test_a_state_outlives_its_iterator(make: Callable[[], Any], face: Face) -> None:
    """After `break`, and after `close`: what was delivered does not change any more."""
    loader = make()
    with Steps(loader, face) as steps:
        steps.next()
    assert loader.state_dict()["batches"] == 1
    loader.close()
    assert loader.state_dict()["batches"] == 1


@on_both_faces
@pytest.mark.parametrize("make", [pipeline, lambda: DataLoader(list(range(10)), 3)])
def test_after_the_last_batch_comes_the_next_epoch(make: Callable[[], Any], face: Face) -> None:
    """Saved inside the loop, behind it, and from an epoch that was taken as far as it goes by `zip`."""
    loader = make()
    with Steps(loader, face) as steps:
        steps.rest(4)
        inside = loader.state_dict()
        assert steps.rest() == []
    assert inside == loader.state_dict()
    assert (inside["epoch"], inside["batches"], contents_of(inside)["cursor"]) == (1, 0, None)


@on_both_faces
def test_an_epoch_with_nothing_left_is_passed_over(face: Face) -> None:
    """Where only the source knows that it was the last batch, the resumed loader finds out, and goes on to the next."""
    loader = Pipeline(numbers).shuffle(4).batch(17)
    with Steps(loader, face) as steps:
        steps.next()
        state = loader.state_dict()
    assert (state["epoch"], state["batches"]) == (0, 1)
    expected = lists(collect(loader, face))
    resumed = Pipeline(numbers).shuffle(4).batch(17)
    resumed.load_state_dict(state)
    with pytest.warns(ReplayWarning):
        assert lists(collect(resumed, face)) == expected
    assert resumed.state_dict()["epoch"] == 2


@on_both_faces
def test_who_names_the_epoch_gets_what_is_left_of_it(face: Face) -> None:
    """A trainer that counts epochs by itself is not given the next one under the number of this one."""
    loader = Pipeline(numbers).shuffle(4).batch(17)
    with Steps(loader, face) as steps:
        steps.next()
        state = loader.state_dict()
    following = lists(collect(loader, face))
    resumed = Pipeline(numbers).shuffle(4).batch(17)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)
    with pytest.warns(ReplayWarning):
        assert collect(resumed, face) == []
    resumed.set_epoch(1)
    assert lists(collect(resumed, face)) == following


def test_set_epoch_with_the_same_epoch_keeps_what_was_loaded() -> None:
    """Trainers call it before each epoch."""
    loader = pipeline()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    rest = lists(iterator)
    loader.load_state_dict(state)
    loader.set_epoch(0)
    assert loader.state_dict() == state
    assert lists(loader) == rest


def test_set_epoch_with_another_epoch_drops_it_and_says_so() -> None:
    """The place in the epoch is lost; the beginning of an epoch is no loss."""
    loader = pipeline()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    loader.close()
    loader.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"set_epoch\(5\) drops the state .* epoch 0 after 1 batches"):
        loader.set_epoch(5)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (0, 1)  # of the newest epoch
    assert len(list(loader)) == 4
    assert loader.state_dict()["epoch"] == 6
    fresh = pipeline()
    fresh.load_state_dict(loader.state_dict())
    fresh.set_epoch(2)
    assert fresh.state_dict()["epoch"] == 2


def test_before_anything_has_begun() -> None:
    """The beginning of the next epoch."""
    loader = pipeline()
    assert (loader.state_dict()["epoch"], contents_of(loader.state_dict())["cursor"]) == (0, None)
    loader.set_epoch(7)
    state = loader.state_dict()
    assert state["epoch"] == 7
    other = pipeline()
    other.load_state_dict(state)
    assert lists(other) == lists(loader)


def test_a_source_that_failed_is_tried_again_where_it_failed() -> None:
    """What was read before is not read again as new, and nothing is left out: `drop_last` has kept its place."""
    works = [False]

    def unsteady() -> Iterator[int]:
        yield from range(8)
        if not works[0]:
            raise OSError("the connection is lost")
        yield from range(8, 12)

    def make() -> Pipeline:
        return Pipeline(unsteady).batch(3, drop_last=True)

    loader = make()
    iterator = iter(loader)
    assert lists([next(iterator), next(iterator)]) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(OSError, match="lost"):
        next(iterator)
    state = loader.state_dict()
    works[0] = True
    resumed = make()
    resumed.load_state_dict(state)
    with pytest.warns(ReplayWarning):
        assert lists(resumed) == [[6, 7, 8], [9, 10, 11]]


def test_a_description_that_travels_leaves_its_place_behind() -> None:
    """A pickled loader begins anew; the state goes by itself."""
    loader: DataLoader[Any] = DataLoader(list(range(10)), 3)
    iterator = iter(loader)
    next(iterator)
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.state_dict()["batches"] == 0
    copy.load_state_dict(loader.state_dict())
    assert lists(copy) == lists(iterator)


def test_a_cancelled_wait_changes_no_state() -> None:
    """What was not handed out does not count."""

    async def main() -> None:
        gate = Gate()

        async def fetch(sample: int) -> int:
            await gate.passing(sample)
            return sample

        loader = Pipeline(range(8)).map(fetch, concurrency=1).batch(2).prefetch(1)
        iterator = aiter(loader)
        for expected in range(3):
            waiting = asyncio.ensure_future(anext(iterator))
            await gate.until_arrived(2 * expected + 1)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert loader.state_dict()["batches"] == expected
            gate.open(2 * expected, 2 * expected + 1)
            assert (await anext(iterator)).tolist() == [2 * expected, 2 * expected + 1]
        await loader.aclose()

    asyncio.run(main())


# -- random pipelines ------------------------------------------------------------------------------------------------


def _third(sample: Any) -> bool:
    return hash(str(sample)) % 3 != 0


def _fails(sample: Any) -> Any:
    if hash(str(sample)) % 7 == 0:
        raise ValueError(f"{sample} is broken")
    return sample


def _number(sample: Any) -> int:
    return hash(str(sample)) % 50


def _as_is(samples: list[Any]) -> list[Any]:
    return samples


def _draws(sample: Any) -> Any:
    return sample, aioloader.sample_rng().random().random()


def nameless() -> Iterator[tuple[int]]:
    return zip(range(13))


stages = st.one_of(
    st.just(("map", lambda p, n: p.map(later, concurrency=n))),
    st.just(("draws", lambda p, n: p.map(_draws, concurrency=n))),
    st.just(("fails", lambda p, n: p.map(_fails, concurrency=n))),
    st.just(("filter", lambda p, _: p.filter(_third))),
    st.just(("flat_map", lambda p, _: p.map(_number).flat_map(pairs_of))),
    st.integers(1, 6).map(lambda size: (f"shuffle({size})", lambda p, _: p.shuffle(size, seed=size))),
    st.integers(0, 20).map(lambda count: (f"take({count})", lambda p, _: p.take(count))),
    st.integers(0, 5).map(lambda count: (f"skip({count})", lambda p, _: p.skip(count))),
    st.just(("enumerate", lambda p, _: p.enumerate())),
    st.integers(1, 4).map(lambda size: (f"batch({size})", lambda p, _: p.batch(size, collate_fn=_as_is))),
    st.integers(1, 4).map(
        lambda size: (f"drop_last({size})", lambda p, _: p.batch(size, drop_last=True, collate_fn=_as_is))
    ),
    st.integers(1, 4).map(lambda size: (f"unbatch({size})", lambda p, _: p.batch(size, collate_fn=_as_is).unbatch())),
    st.integers(1, 2).map(lambda times: (f"repeat({times})", lambda p, _: p.repeat(times))),
    st.just(("zip", lambda p, _: Pipeline.zip(p, range(30)))),
    st.just(("mix", lambda p, _: Pipeline.mix([p, range(100, 104)], [2, 1], seed=1))),
    st.integers(2, 3).map(lambda size: (f"shard(1, {size})", lambda p, _: p.shard(1, size))),
)
sources = st.sampled_from(
    [
        ("range", lambda: Pipeline(range(13))),
        ("shuffled", lambda: Pipeline(range(13)).shuffle(seed=2)),
        ("stream", lambda: Pipeline(numbers)),
        ("nameless", lambda: Pipeline(nameless)),
        ("mix", lambda: Pipeline.mix([range(6), nameless], [1, 2])),
    ]
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(source=sources, chain=st.lists(stages, max_size=4), limit=st.integers(2, 5))
def test_random_pipelines_resume(source: Any, chain: list[Any], limit: int) -> None:
    """Whatever stands behind what."""

    def make(concurrency: int) -> Pipeline:
        made: Pipeline = source[1]()
        for _, add in chain:
            made = add(made, concurrency)
        return made

    assert_resumes_exactly(make, variants=[{"concurrency": 3}, {"concurrency": 1}, {"concurrency": 8}], limit=limit)


# -- a process that is killed ----------------------------------------------------------------------------------------

TRAINS = """
    import json, os, sys
    from aioloader import Pipeline

    async def fetch(key):
        return key

    folder = sys.argv[1]
    loader = Pipeline(range(60)).shuffle(seed=1).map(fetch, concurrency=int(sys.argv[2])).shuffle(7).batch(4)
    path = os.path.join(folder, "state.json")
    if os.path.exists(path):
        with open(path) as file:
            saved = json.load(file)
        loader.load_state_dict(saved["loader"])
        seen = saved["seen"]  # what a model has learned from is a part of its checkpoint
    else:
        seen = []
    stop_after = int(sys.argv[3])
    for number, batch in enumerate(loader):
        seen += batch.tolist()
        with open(path + ".new", "w") as file:
            json.dump({"loader": loader.state_dict(), "seen": seen}, file)
        os.replace(path + ".new", path)
        if number == stop_after:
            seen += [-1]  # never saved
            print("now", flush=True)
            while True:
                pass
    print(json.dumps(seen), flush=True)
"""


def test_a_killed_process_is_continued_by_another(tmp_path: Any) -> None:
    """`kill -9` in the middle of an epoch: each sample is seen once."""
    with Child(TRAINS, str(tmp_path), "16", "6") as child:
        child.until_line("now")
        child.process.kill()
    with Child(TRAINS, str(tmp_path), "5", "-1") as child:
        status, out, err = child.finish()
    assert status == 0, err
    seen = json.loads(out)
    assert len(seen) == 60
    assert sorted(seen) == list(range(60))
    loader = Pipeline(range(60)).shuffle(seed=1).shuffle(7).batch(4)
    assert torch.cat(list(loader)).tolist() == seen
