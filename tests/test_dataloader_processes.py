"""`DataLoader(worker_type="process")` is torch's DataLoader with workers: batch for batch, seed for seed."""

import asyncio
import gc
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, get_worker_info
from torch.utils.data import DataLoader as TorchDataLoader

from aioloader import DataLoader, ReplayWarning, StateError, WorkerDiedError
from aioloader.engine.turns import dealt
from aioloader.memory.mapping import mapping_of
from aioloader.testing import assert_resumes_exactly
from tests import _work
from tests._datasets import Broken, Made, MadeInBulk, ShardingStream, Stream, assert_same, join, noisy, pair, record
from tests._states import contents_of, edited
from tests._support import Face, Started, Steps, collect, notes, on_both_faces, workers

pytestmark = pytest.mark.usefixtures("fork_server")

SEED = 1234

Arguments = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    """The process that workers are forked from: made once, for it takes seconds to import torch."""
    with loader(Made(2, pair), persistent_workers=True, num_workers=1) as keeper:
        assert len(list(keeper)) == 2
        yield


def loader(dataset: Any, batch_size: int | None = 1, *, num_workers: int = 2, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, num_workers=num_workers, worker_type="process", **kwargs)


def seeded(index: int) -> tuple[Any, ...]:
    """All that torch promises about random numbers and who one is."""
    info = get_worker_info()
    assert info is not None
    return index, torch.rand(2), random.random(), np.random.rand(), info.id, info.num_workers, info.seed


# Arguments of both loaders. Made anew for each loader, as samplers have a state.
CONFIGURATIONS: dict[str, Callable[[], Arguments]] = {
    "shuffled batches": lambda: {"dataset": Made(21, record), "batch_size": 4, "shuffle": True},
    "drop_last": lambda: {"dataset": Made(10, pair), "batch_size": 4, "drop_last": True},
    "no batches": lambda: {"dataset": Made(5, record), "batch_size": None},
    "bulk": lambda: {"dataset": MadeInBulk(10, pair), "batch_size": 4},
    "batch_sampler": lambda: {
        "dataset": Made(10, pair),
        "batch_sampler": BatchSampler(RandomSampler(range(10)), 3, False),
    },
    "collate_fn": lambda: {"dataset": Made(10, pair), "batch_size": 4, "collate_fn": join},
    "seeds": lambda: {"dataset": Made(12, seeded), "batch_size": 2, "shuffle": True},
    "generator": lambda: {
        "dataset": Made(12, noisy),
        "batch_size": 2,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(3),
    },
    "worker_init_fn": lambda: {"dataset": Made(8, noisy), "batch_size": 2, "worker_init_fn": torch.manual_seed},
    "persistent_workers": lambda: {"dataset": Made(8, seeded), "batch_size": 2, "persistent_workers": True},
    "stream, a copy for each worker": lambda: {"dataset": Stream(7, pair), "batch_size": 3},
    "stream in parts": lambda: {"dataset": ShardingStream(11, seeded), "batch_size": 2},
    "stream, drop_last": lambda: {"dataset": ShardingStream(11, pair), "batch_size": 2, "drop_last": True},
    "stream, no batches": lambda: {"dataset": ShardingStream(5, pair), "batch_size": None},
    "stream, persistent_workers": lambda: {
        "dataset": ShardingStream(9, seeded),
        "batch_size": 2,
        "persistent_workers": True,
    },
    "parts of different lengths": lambda: {"dataset": _work.Counting(), "batch_size": 2},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@on_both_faces
def test_two_epochs_are_those_of_torch(face: Face, name: str) -> None:
    """The same batches in the same order, the same random numbers, and the same draws from the caller's generator."""
    make = CONFIGURATIONS[name]
    torch.manual_seed(SEED)
    torchs = TorchDataLoader(num_workers=2, **make())
    expected = [list(torchs), list(torchs), torch.rand(1)]
    del torchs
    torch.manual_seed(SEED)
    with loader(**make()) as ours:
        assert_same([collect(ours, face), collect(ours, face), torch.rand(1)], expected)


async def join_async(samples: Any) -> Any:
    assert asyncio.get_running_loop() is not None
    assert get_worker_info() is None  # it runs here, where the user's event loop is
    await asyncio.sleep(0)
    return join(samples) if isinstance(samples, list) else samples


@on_both_faces
@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize("dataset", [Made(10, pair), MadeInBulk(10, pair), ShardingStream(10, pair)])
def test_an_async_collate_fn_is_awaited_on_the_loop_behind_the_workers(
    dataset: Any, batch_size: int | None, face: Face
) -> None:
    """Samples travel as the workers loaded them; batches are those of a sync function."""
    if batch_size is None and isinstance(dataset, MadeInBulk):
        return  # it refuses to be asked for single samples, as torch does then
    twin = join if batch_size is not None else (lambda sample: sample)
    expected = collect(loader(dataset, batch_size, collate_fn=twin), face)
    assert_same(collect(loader(dataset, batch_size, collate_fn=join_async), face), expected)
    if batch_size is None or not isinstance(dataset, Made):
        return

    async def failing(samples: Any) -> Any:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as raised, loader(dataset, batch_size, collate_fn=failing) as failed:
        collect(failed, face)
    assert "cannot collate: samples with keys [0, 1, 2, 3]" in notes(raised.value)


def test_any_order_gives_the_same_batches_as_they_come() -> None:
    """`in_order=False`."""
    with loader(Made(12, pair), 2, in_order=False) as ours:
        assert sorted(labels[0].item() for _, labels in ours) == [index * index for index in range(0, 12, 2)]


@on_both_faces
def test_an_error_stands_at_its_place(face: Face) -> None:
    """The dataset's own exception, with the notes of both sides; the other batches come."""
    with loader(Broken(8, 3), 2) as ours, Steps(ours, face) as steps:
        outcomes = steps.outcomes()
    assert_same([*outcomes[:1], *outcomes[2:]], [b for i, b in enumerate(TorchDataLoader(Made(8, pair), 2)) if i != 1])
    assert outcomes[1].key == 3
    assert "dataset index 3, sample 1 of its batch" in notes(outcomes[1])
    assert "stage fetch" in notes(outcomes[1])
    assert "in worker process 1" in notes(outcomes[1])


def test_what_worker_init_fn_raises_is_raised_for_the_first_batch_of_its_worker() -> None:
    def refuse(worker_id: int) -> None:
        if worker_id == 1:
            raise LookupError("no such worker")

    with loader(Made(8, pair), 2, worker_init_fn=refuse) as ours, Steps(ours, "for") as steps:
        outcomes = steps.outcomes()
    assert [type(outcome) for outcome in outcomes] == [list, LookupError, list, list]


@on_both_faces
def test_a_worker_that_dies_is_named_with_its_samples_and_the_rest_goes_on(face: Face) -> None:
    """A fresh one does what the dead one had not begun."""
    with loader(Made(20, _work.killed_at_five), 2) as ours, Steps(ours, face) as steps:
        outcomes = steps.outcomes()
    assert isinstance(outcomes[2], WorkerDiedError)
    assert "was killed by SIGKILL, with samples [4, 5]" in str(outcomes[2])
    batches = [batch.tolist() for batch in outcomes[:2] + outcomes[3:]]
    assert batches == [[i, i + 1] for i in range(0, 20, 2) if i != 4]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_that_dies_in_an_iterable_dataset_ends_its_part(persistent: bool) -> None:
    """At its place; the other worker's part comes to its end, and the next epoch is whole again."""
    dataset = ShardingStream(24, _work.killed_at_five)
    with loader(dataset, 2, persistent_workers=persistent) as ours, Steps(ours, "for") as steps:
        outcomes = steps.outcomes()
        (error,) = (outcome for outcome in outcomes if isinstance(outcome, WorkerDiedError))
        assert "with it what was left of its part" in str(error)
        assert outcomes.index(error) == 3  # the second batch of the second worker
        samples = sorted(i for outcome in outcomes if outcome is not error for i in outcome.tolist())
        assert samples == sorted([*range(0, 24, 2), 1, 3])


@on_both_faces
def test_a_timeout_is_torchs_error_and_loses_no_batch(face: Face, tmp_path: Path) -> None:
    """The batch comes with a later call."""
    gate = tmp_path / "gate"
    with loader(Made(2, _work.Opened(gate)), timeout=0.05) as ours, Steps(ours, face) as steps:
        with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.05 seconds"):
            steps.next()
        gate.touch()
        found: list[int] = []
        while len(found) < 2:
            try:
                found.append(steps.next().item())
            except RuntimeError:
                continue
    assert found == [0, 1]


def test_pin_memory_without_an_accelerator_warns_and_goes_on() -> None:
    with loader(Made(4, pair), 2, pin_memory=True) as ours, pytest.warns(UserWarning, match="pin_memory"):
        assert_same(list(ours), list(TorchDataLoader(Made(4, pair), 2)))


def test_workers_end_with_their_epoch_unless_they_are_persistent() -> None:
    before = workers()
    with loader(Made(4, _work.pid_of)) as ours:
        first, second = set(map(int, ours)), set(map(int, ours))
        assert len(first) == len(second) == 2
        assert not first & second
        assert workers() == before
    with loader(Made(4, _work.pid_of), persistent_workers=True) as ours:
        pids = set(map(int, ours))
        assert set(map(int, ours)) == pids
        assert workers() - before == pids
    assert workers() == before


def test_break_in_an_epoch_leaves_no_worker() -> None:
    before = workers()
    ours = loader(Made(400, _work.busy_millisecond))
    for _ in ours:
        break
    gc.collect()
    ours.close()
    assert workers() == before


def test_a_stream_that_is_left_begins_anew_in_the_next_epoch() -> None:
    """Persistent workers, which were ahead in the old one."""
    with loader(ShardingStream(40, int), 2, persistent_workers=True) as ours:
        whole = [batch.tolist() for batch in ours]
        for _ in range(2):
            assert next(iter(ours)).tolist() == whole[0]
        assert [batch.tolist() for batch in ours] == whole


def test_batches_are_in_shared_memory_that_is_used_again() -> None:
    """Kept, sliced, and sent to another thread they stay as they are; dropped, they cost no more mappings."""
    with loader(Made(120, _work.filled), 2, persistent_workers=True) as ours:
        for _ in range(2):
            for batch in ours:
                del batch
        maps = Path("/proc/self/maps").read_text().count("memfd:aioloader")
        assert 1 <= maps < 30
        kept = [(batch, batch[1][5:6], batch.numpy()) for batch in ours]
        for _ in ours:  # whatever would be used again is, now
            pass

    def check() -> None:
        for number, (batch, row, array) in enumerate(kept):
            assert (batch[1] == 2 * number + 1).all()
            assert (row == 2 * number + 1).all()
            assert (array[0] == 2 * number).all()

    Started(check).outcome()


def test_many_small_tensors_take_one_segment_or_none() -> None:
    """A hundred in a batch: torch's workers make a file for each."""
    with loader(Made(40, _work.many), 2, persistent_workers=True) as ours:
        list(ours)
        before = psutil.Process().num_fds()
        kept = list(ours)
        assert psutil.Process().num_fds() < before + 10
    assert len(kept[0]) == 100
    assert torch.equal(kept[3][7], torch.tensor([[6.0] * 8, [7.0] * 8]) + 7)


def test_many_parts_take_few_segments_and_labels_none() -> None:
    """A message takes sixteen descriptors; and whoever keeps the labels of an epoch keeps nothing else of it."""
    with loader(Made(1024, _work.wide), 256, persistent_workers=True) as ours:
        for _ in range(3):
            batches = list(ours)
            assert [batch["label"][7].item() for batch in batches] == [7, 263, 519, 775]
            assert all(batch["part 3"].eq(batch["label"][:, None] + 3).all() for batch in batches)
            assert not [batch for batch in batches if mapping_of(batch["label"]) is not None]
            assert all(mapping_of(batch["part 3"]) is not None for batch in batches)
            del batches
        for pid in workers():
            assert psutil.Process(pid).num_fds() < 16


# -- resume of an IterableDataset that each worker has a part of -------------------------------------------------------

PARTS: dict[str, Callable[[], Arguments]] = {
    "parts": lambda: {"dataset": ShardingStream(23, seeded), "batch_size": 2},
    "no batches": lambda: {"dataset": ShardingStream(7, pair), "batch_size": None},
    "drop_last": lambda: {"dataset": ShardingStream(23, pair), "batch_size": 2, "drop_last": True},
    "different lengths": lambda: {"dataset": _work.Counting(), "batch_size": 2, "num_workers": 3},
    "an error in each part": lambda: {"dataset": _work.FailingParts(), "batch_size": 2, "num_workers": 3},
    "persistent_workers": lambda: {"dataset": ShardingStream(9, pair), "batch_size": 2, "persistent_workers": True},
    "generator": lambda: {
        "dataset": ShardingStream(9, seeded),
        "batch_size": 2,
        "generator": torch.Generator().manual_seed(3),
    },
}


@pytest.mark.parametrize("name", PARTS)
def test_what_workers_had_given_is_read_again_and_dropped(name: str) -> None:
    """From every state, also where some parts had ended: in `guarantee` words, `replayed`."""

    def make() -> DataLoader[Any]:
        return loader(**PARTS[name]())

    states = assert_resumes_exactly(make, limit=9)
    assert {state["guarantee"] for state in states} == {"replayed"}


def test_a_resume_that_reads_again_warns_of_it_and_collates_nothing(tmp_path: Path) -> None:
    log = tmp_path / "collated"
    make = partial(loader, ShardingStream(8, int), 2, collate_fn=_work.Logged(log))
    with make() as ours:
        batches = iter(ours)
        seen = [next(batches) for _ in range(3)]
        state = ours.state_dict()
        batches.close()
    assert seen == [[0, 2], [1, 3], [4, 6]]
    assert contents_of(state)["cursor"] == [2, 3]
    log.unlink()
    with make() as ours:
        ours.load_state_dict(state)
        with pytest.warns(ReplayWarning, match="reads the 3 batches before it again and drops them"):
            assert list(ours) == [[5, 7]]
    assert log.read_text() == "[5, 7]\n"


def test_parts_are_those_of_a_number_of_workers() -> None:
    """A state in the middle is refused by another number, by none, and by workers that keep no order."""
    dataset = ShardingStream(8, int)
    with loader(dataset, 2) as ours:
        batches = iter(ours)
        next(batches)
        middle = ours.state_dict()
        batches.close()
    for other in (
        loader(dataset, 2, num_workers=3),
        loader(dataset, 2, in_order=False),
        DataLoader(dataset, 2),
        DataLoader(dataset, 2, num_workers=2),
    ):
        with pytest.raises(StateError, match="in the middle of an epoch of an IterableDataset that 2 worker processes"):
            other.load_state_dict(middle)
        assert contents_of(other.state_dict())["cursor"] is None
    single = DataLoader(dataset, 2)
    next(iter(single))
    with pytest.raises(StateError, match=r"that one reader \(num_workers=0 or worker_type='thread'\) read"):
        loader(dataset, 2).load_state_dict(single.state_dict())
    for broken in ((2, -1), (2, "3"), (2, 3, 4), [2], (2, 1 << 62)):
        with pytest.raises(StateError):
            loader(dataset, 2).load_state_dict(edited(middle, cursor=broken))


def test_between_epochs_any_number_of_workers_goes_on() -> None:
    with loader(ShardingStream(8, int), 2) as ours:
        list(ours)
        state = ours.state_dict()
    assert (state["epoch"], contents_of(state)["cursor"]) == (1, None)
    with loader(ShardingStream(8, int), 2, num_workers=3) as ours:
        ours.load_state_dict(state)
        assert sorted(sample for batch in ours for sample in batch.tolist()) == list(range(8))


def test_a_step_of_workers_parts_can_be_had_again() -> None:
    with loader(ShardingStream(12, int), 2) as ours:
        seen = [batch.tolist() for batch in ours]
        with pytest.warns(ReplayWarning):
            assert ours.replay(4).tolist() == seen[4]


def test_a_worker_that_dies_while_it_reads_again_ends_the_epoch() -> None:
    with loader(ShardingStream(12, int), 1) as ours:
        batches = iter(ours)
        for _ in range(8):
            next(batches)
        state = ours.state_dict()
        batches.close()
    with loader(ShardingStream(12, _work.killed_at_five), 1) as ours:
        ours.load_state_dict(state)
        with pytest.warns(ReplayWarning), pytest.raises(WorkerDiedError, match="while it read again what was given"):
            list(ours)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    count=st.integers(0, 30),
    known=st.sets(st.integers(0, 3)),
)
def test_turns_are_dealt_round_by_round(lengths: list[int], count: int, known: set[int]) -> None:
    """As one after the other; asking those who turn out to have ended comes to the same."""
    given_, turn = [0] * len(lengths), 0
    total = min(count, sum(lengths))
    for _ in range(total):
        while given_[turn] == lengths[turn]:
            turn = (turn + 1) % len(lengths)
        given_[turn] += 1
        turn = (turn + 1) % len(lengths)
    limits = [length if slot in known else None for slot, length in enumerate(lengths)]
    while True:
        found, following = dealt(count, limits)
        over = [slot for slot, wanted in enumerate(found) if wanted > lengths[slot]]
        if not over:
            break
        for slot in over:
            limits[slot] = lengths[slot]
    assert found == given_
    if total < sum(lengths):
        order = [(following + n) % len(lengths) for n in range(len(lengths))]
        left = [slot for slot in order if lengths[slot] > found[slot]]
        expected = [(turn + n) % len(lengths) for n in range(len(lengths))]
        assert left == [slot for slot in expected if lengths[slot] > found[slot]]
