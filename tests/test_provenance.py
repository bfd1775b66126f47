"""Where a batch comes from, the same batch once more, and steps that are left out on purpose."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import ref

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

import aioloader
from aioloader import BatchInfo, DataLoader, Pipeline
from aioloader.core.entry import Entry
from aioloader.engine.progress import Progress
from aioloader.sources import Channel, Lines
from tests._states import contents_of, edited
from tests._support import Face, Steps, collect, on_both_faces


def with_infos(loader: Pipeline, face: Face) -> list[tuple[Any, BatchInfo]]:
    return [(batch.tolist(), info) for batch, info in collect(loader.with_info(), face)]


@on_both_faces
def test_a_batch_tells_its_samples_step_and_epoch(face: Face) -> None:
    loader = Pipeline([0, 10, 20, 30, 40]).map(lambda sample: sample + 1).filter(lambda sample: sample != 21).batch(2)
    for epoch in range(2):
        pairs = with_infos(loader.with_info(), face) if epoch == 0 else with_infos(loader, face)
        assert [batch for batch, _ in pairs] == [[1, 11], [31, 41]]
        assert [(info.epoch, info.step, info.keys) for _, info in pairs] == [(0, 0, (0, 10)), (0, 1, (30, 40))]
        assert all(info.seconds_waited >= 0 for _, info in pairs)


@on_both_faces
def test_a_shuffled_drop_in_tells_the_indices_it_loaded(face: Face) -> None:
    dataset = TensorDataset(torch.arange(20) * 2)
    for workers in (0, 2):
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=3, shuffle=True, num_workers=workers)
        assert loader.last_batch_info() is None
        with Steps(loader, face) as steps:
            for number in range(7):
                (values,) = steps.next()
                info = loader.last_batch_info()
                assert info is not None
                assert (info.epoch, info.step) == (0, number)
                assert [2 * key for key in info.keys] == values.tolist()


def test_keys_say_which_source_part_or_round_they_are_of() -> None:
    mixed = Pipeline.mix([["a", "b"], ["c"]], [1, 1]).batch(3).with_info()
    ((batch, info),) = mixed
    assert [key.key for key in info.keys] == batch
    assert {key.source for key in info.keys} == {0, 1}
    ((_, info),) = Pipeline(["ab"]).flat_map(list).batch(2).with_info()
    assert [(key.key, key.part) for key in info.keys] == [("ab", 1), ("ab", 2)]
    ((_, info),) = Pipeline(["x"]).repeat(2).batch(2).with_info()
    assert repr(info.keys) == "('x', 'x' (1))"


def places_of(loader: Any) -> list[tuple[tuple[Any, ...], tuple[int | None, ...], tuple[int | None, ...]]]:
    """Keys, positions and sources of each batch that is left of an epoch."""
    found = []
    for _ in loader:
        info = loader.last_batch_info()
        found.append((info.keys, info.positions, info.sources))
    return found


ITEMS = [[index] for index in range(6)]


@pytest.mark.parametrize(
    ("make", "positions", "sources"),
    [
        (lambda: Pipeline(ITEMS).batch(2), [(0, 1), (2, 3), (4, 5)], None),
        (lambda: Pipeline(ITEMS).shuffle(seed=1).batch(4), [(0, 1, 2, 3), (4, 5)], None),
        (lambda: Pipeline(lambda: iter(ITEMS)).filter(lambda item: item[0] % 3).batch(2), [(1, 2), (4, 5)], None),
        (lambda: Pipeline(ITEMS).shard(1, 2).batch(2), [(1, 3), (5,)], None),
        (lambda: Pipeline(ITEMS).shard(1, 2).shard(0, 2).batch(1), [(1,), (5,)], None),
        (lambda: Pipeline(lambda: iter(ITEMS)).shard(1, 2).batch(2), [(1, 3), (5,)], None),
        (lambda: Pipeline(ITEMS).flat_map(list).batch(4), [(0, 1, 2, 3), (4, 5)], None),
        (lambda: Pipeline(ITEMS).batch(3).unbatch().batch(2), [(0, 1), (2, 3), (4, 5)], None),
        (lambda: Pipeline(ITEMS), [(0,), (1,), (2,), (3,), (4,), (5,)], None),
        (lambda: Pipeline(ITEMS[:3]).repeat(2).batch(3), [(0, 1, 2), (0, 1, 2)], None),
        (lambda: Pipeline.zip(ITEMS, ITEMS[::-1]).batch(4), [(0, 1, 2, 3), (4, 5)], None),
        (
            lambda: Pipeline.interleave(ITEMS, ITEMS[:2]).batch(4),
            [(0, 0, 1, 1), (2, 3, 4, 5)],
            [(0, 1, 0, 1), (0, 0, 0, 0)],
        ),
        (
            lambda: Pipeline.interleave(Pipeline(ITEMS).batch(4), Pipeline(ITEMS).batch(3)).repeat(1),
            [(0, 1, 2, 3), (0, 1, 2), (4, 5), (3, 4, 5)],
            [(0,) * 4, (1,) * 3, (0,) * 2, (1,) * 3],
        ),
        (lambda: Pipeline(ITEMS).in_process().batch(4), [(0, 1, 2, 3), (4, 5)], None),
        (lambda: Pipeline(ITEMS).batch(4).in_process(), [(0, 1, 2, 3), (4, 5)], None),
        (lambda: DataLoader(ITEMS, batch_size=4, shuffle=True, seed=1), [(0, 1, 2, 3), (4, 5)], None),
        (lambda: DataLoader(ITEMS, batch_size=4, num_workers=2), [(0, 1, 2, 3), (4, 5)], None),
        (lambda: DataLoader(ITEMS, batch_size=None, num_workers=2), [(0,), (1,), (2,), (3,), (4,), (5,)], None),
        (lambda: DataLoader(OnTheLoop(), batch_size=4), [(0, 1, 2, 3), (4, 5)], None),
        (lambda: DataLoader(IterableItems(), batch_size=4), [(0, 1, 2, 3), (4, 5)], None),
        (lambda: DataLoader(ITEMS, batch_sampler=[[5, 0, 1], [2]]), [(None,) * 3, (None,)], None),
    ],
    ids=[
        "sequence", "shuffle", "filter", "shard", "shard of a shard", "shard of a stream", "flat_map", "unbatch",
        "no batch", "repeat", "zip", "interleave", "interleaved batches", "behind a process", "in a process",
        "drop-in inline", "drop-in", "drop-in of samples", "drop-in async", "drop-in iterable", "batch sampler",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("fork_server")
@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
def test_positions_and_sources_are_the_same_after_a_resume(
    make: Callable[[], Any], positions: list[Any], sources: list[Any] | None
) -> None:
    """Only sources count: a count of a stage's own would begin anew."""
    found = places_of(make())
    assert [places for _, places, _ in found] == positions
    expected = [(None,) * len(places) for places in positions] if sources is None else sources
    assert [numbers for _, _, numbers in found] == expected
    assert all(len(keys) == len(places) for keys, places, _ in found)
    for done in range(1, len(found)):
        loader = make()
        batches = iter(loader)
        for _ in range(done):
            next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
        batches.close()
        resumed = make()
        resumed.load_state_dict(state)
        assert places_of(resumed) == found[done:]


def test_where_a_source_does_not_count_positions_are_not_made_up(tmp_path: Path) -> None:
    """Its keys say where its samples are."""
    path = tmp_path / "lines.txt"
    path.write_text("a\nb\nc\nd\n")
    loader = Pipeline(Lines(path)).batch(2, collate_fn=list)
    batches = iter(loader)
    next(batches)
    info = loader.last_batch_info()
    assert info is not None
    assert (info.positions, info.keys) == ((0, 1), (f"{path}:1", f"{path}:2"))
    resumed = Pipeline(Lines(path)).batch(2, collate_fn=list)
    resumed.load_state_dict(loader.state_dict())
    assert places_of(resumed) == [((f"{path}:3", f"{path}:4"), (None, None), (None, None))]
    batches.close()


class OnTheLoop:
    def __len__(self) -> int:
        return len(ITEMS)

    async def __getitem__(self, index: int) -> list[int]:
        return ITEMS[index]


class IterableItems(IterableDataset[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        return iter(ITEMS)


@on_both_faces
@pytest.mark.parametrize(
    "make",
    [
        lambda: Pipeline(range(40)).shuffle(seed=1).map(noisy).with_seed(3).batch(4),
        lambda: Pipeline(lambda: iter(range(40))).shuffle(7).batch(4, drop_last=True),
        lambda: DataLoader(TensorDataset(torch.arange(40)), batch_size=4, shuffle=True, num_workers=2),
        lambda: DataLoader(TensorDataset(torch.arange(40)), batch_size=4, shuffle=True),
        lambda: DataLoader(
            TensorDataset(torch.arange(40)), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)
        ),
    ],
    ids=["permutation and augmentation", "shuffle buffer", "drop-in", "drop-in inline", "generator"],
)
@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
def test_any_earlier_step_can_be_had_again(make: Callable[[], Any], face: Face) -> None:
    """The very same, and neither the epoch nor any generator notices."""
    torch.manual_seed(5)
    expected = collect(make(), face)
    torch.manual_seed(5)
    loader = make()
    with Steps(loader, face) as steps:
        seen = [steps.next() for _ in range(5)]
        for step in (0, 3, 4):
            state = torch.get_rng_state(), random.getstate()
            assert_equal(loader.replay(step), seen[step])
            assert torch.equal(torch.get_rng_state(), state[0])
            assert random.getstate() == state[1]
        assert_equal(seen, expected[:5])
        assert_equal([steps.next() for _ in range(5)], expected[5:10])


def noisy(sample: int) -> float:
    return sample + float(torch.rand((), generator=aioloader.sample_rng()))


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_equal(ours, theirs)
    else:
        assert one == other


def test_a_step_after_a_resume_is_counted_from_the_beginning_of_the_epoch() -> None:
    loader = Pipeline(range(20)).batch(2)
    batches = iter(loader)
    next(batches)
    next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    other = Pipeline(range(20)).batch(2)
    other.load_state_dict(state)
    assert next(iter(other)).tolist() == [4, 5]
    info = other.last_batch_info()
    assert info is not None
    assert info.step == 2
    assert other.replay(2).tolist() == [4, 5]
    with pytest.raises(LookupError, match="got step=1, known are steps 2 to 2 of epoch 0"):
        other.replay(1)


def test_a_replay_of_a_failed_step_fails_again() -> None:
    def fail(sample: int) -> int:
        if sample == 3:
            raise ValueError("broken")
        return sample

    loader = Pipeline(range(6)).map(fail).batch(2)
    batches = iter(loader)
    next(batches)
    with pytest.raises(ValueError, match="broken"):
        next(batches)
    with pytest.raises(ValueError, match="broken"):
        loader.replay(1)
    assert next(batches).tolist() == [4, 5]


def test_what_is_not_known_is_no_batch() -> None:
    loader = Pipeline(range(6)).batch(2)
    with pytest.raises(LookupError, match="got step=0, known are none; for others take a state_dict"):
        loader.replay(0)
    next(iter(loader))
    with pytest.raises(LookupError, match="got step=1, known are steps 0 to 0 of epoch 0"):
        loader.replay(1)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        loader.replay(-1)


async def later(sample: int) -> int:
    return sample


def channel_of(count: int) -> Channel:
    channel = Channel(count)
    for number in range(count):
        channel.send_nowait(number)
    channel.close()
    return channel


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Pipeline(channel_of(12)).batch(2), "what has been sent cannot be read again"),
        (lambda: DataLoader(channel_of(12), batch_size=2), "what has been sent cannot be read again"),
        (lambda: Pipeline(range(12)).map(later, ordered=False).batch(2), "samples come in another order each time"),
        (lambda: Pipeline.merge(range(6), range(6)).batch(2), "samples come in another order each time"),
        (
            lambda: DataLoader(TensorDataset(torch.arange(12)), batch_size=2, num_workers=2, in_order=False),
            "samples come in another order each time",
        ),
        (lambda: Pipeline(range(12)).batch(2, max_wait=9.0), "which samples a batch holds depends on time"),
        (lambda: Pipeline(range(12)).drop_if(lambda _: False).batch(2), "which samples a batch holds depends on time"),
    ],
    ids=["channel", "channel, drop-in", "unordered", "merge", "drop-in, unordered", "max_wait", "drop_if"],
)
def test_where_it_would_be_another_batch_a_replay_is_refused(make: Callable[[], Any], why: str) -> None:
    """Not guessed, and nothing is taken from who sends."""
    with make() as loader:
        batches = iter(loader)
        first = next(batches)
        with pytest.raises(LookupError, match=f"{why}; "):
            loader.replay(0)
        rest = list(batches)
    found = sorted(int(number) for batch in [first, *rest] for number in torch.as_tensor(flat(batch)))
    assert found in (list(range(12)), sorted([*range(6), *range(6)]))


def flat(batch: Any) -> torch.Tensor:
    tensor: torch.Tensor = batch[0] if isinstance(batch, list | tuple) else batch
    return tensor.flatten()


@pytest.mark.asyncio
async def test_a_replay_from_async_code_runs_in_a_thread() -> None:
    loader = Pipeline(range(6)).batch(2)
    async for batch in loader:
        assert (await asyncio.to_thread(loader.replay, 0)).tolist() == [0, 1]
        assert batch.tolist() == [0, 1]
        break
    await loader.aclose()


@on_both_faces
def test_steps_of_an_older_epoch_that_is_alive_are_left_out(face: Face) -> None:
    """Though two newer ones have begun since."""
    loader = Pipeline(range(10)).batch(2)
    with Steps(loader, face) as old:
        assert old.next().tolist() == [0, 1]
        for _ in range(2):
            with Steps(loader, face) as newer:
                newer.next()
                newer.rest()
        loader.skip_steps(2, 4, epoch=0)
        assert [batch.tolist() for batch in old.rest()] == [[2, 3], [8, 9]]


@on_both_faces
def test_steps_are_left_out_and_nothing_else_moves(face: Face) -> None:
    def fail(sample: int) -> int:
        if sample == 5:
            raise ValueError("it is in a step that is left out")
        return sample

    loader = Pipeline(range(12)).map(fail).batch(2)
    loader.skip_steps(1, 3)
    loader.skip_steps(5, 6, epoch=1)
    loader.skip_steps(2, 3, epoch=1)
    assert [batch.tolist() for batch in collect(loader, face)] == [[0, 1], [6, 7], [8, 9], [10, 11]]
    assert [batch.tolist() for batch in collect(loader, face)] == [[0, 1], [2, 3], [6, 7], [8, 9]]
    info = loader.last_batch_info()
    assert info is not None
    assert (info.epoch, info.step, info.keys) == (1, 4, (8, 9))  # and not the step behind it, which was left out


def test_a_drop_in_without_workers_leaves_any_number_of_steps_out_too() -> None:
    """More than Python calls one inside the other."""
    loader: DataLoader[Any] = DataLoader(range(6010), batch_size=2)
    loader.skip_steps(0, 3004)
    assert [batch.tolist() for batch in loader] == [[6008, 6009]]


@on_both_faces
def test_what_is_left_out_is_in_the_state(face: Face) -> None:
    loader = Pipeline(range(12)).batch(2)
    with Steps(loader, face) as steps:
        steps.next()
        loader.skip_steps(2, 4)
        loader.skip_steps(0, 1, epoch=1)
        state = json.loads(json.dumps(loader.state_dict()))
        assert contents_of(state)["left_out"] == [[0, 2, 4], [1, 0, 1]]
        rest = [batch.tolist() for batch in steps.outcomes()]
    assert rest == [[2, 3], [8, 9], [10, 11]]
    other = Pipeline(range(12)).batch(2)
    other.load_state_dict(state)
    assert [batch.tolist() for batch in collect(other, face)] == rest
    assert len(collect(other, face)) == 5


@pytest.mark.parametrize("broken", [[[0, 1]], [1], [[0, "a", 2]]])
def test_a_broken_list_of_what_is_left_out_is_refused(broken: Any) -> None:
    loader = Pipeline(range(12)).batch(2)
    state = edited(loader.state_dict(), left_out=broken)
    with pytest.raises(aioloader.StateError, match="'left_out' of the state holds lists of epoch, first step and stop"):
        loader.load_state_dict(state)


def test_wrong_arguments_are_told_at_once() -> None:
    loader = Pipeline(range(12)).batch(2)
    with pytest.raises(ValueError, match="stop must be at least 4, got 3"):
        loader.skip_steps(3, 3)
    with pytest.raises(ValueError, match=r"with_info\(\) must be the last stage, got batch\(2\) after it"):
        Pipeline(range(3)).with_info().batch(2)
    with pytest.raises(ValueError, match=r"zip combines samples, got pairs with their info"):
        Pipeline.zip(Pipeline(range(3)).with_info())


def test_random_numbers_of_samples_go_on_after_a_resume() -> None:
    """The seed that a loader draws for itself is in its state."""

    def make(concurrency: int) -> Pipeline:
        return Pipeline(range(30)).shuffle().map(noisy, concurrency=concurrency).batch(5)

    loader = make(1)
    before = loader.state_dict()
    batches: Iterator[torch.Tensor] = iter(loader)
    first = [next(batches) for _ in range(2)]
    state = loader.state_dict()
    rest = list(batches)
    other = make(4)
    other.load_state_dict(json.loads(json.dumps(state)))
    assert_equal(list(other), rest)
    other.load_state_dict(before)
    assert_equal(list(other), first + rest)


def test_a_batch_that_was_handed_out_keeps_nothing_of_what_it_was_made_of() -> None:
    """The loader knows its last entry after the epoch; what came into its functions may be large."""

    class Large:
        pass

    large = Large()
    alive = ref(large)
    entry = Entry("sample", 1, "key", 0)
    entry.origin = large
    progress = Progress(0)
    progress.hand_out(entry, perf_counter())
    del large
    assert alive() is None
    assert progress.info is not None
    assert progress.info.keys == ("key",)
