"""`shard`: one order dealt to ranks, in step, and taken up again by any number of them (DESIGN 6)."""

import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler
from torch.utils.data import Sampler as TorchSampler

import aioloader
from aioloader import DataLoader, Pipeline, UnsplitWarning
from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.engine.progress import Progress
from aioloader.engine.window import Window
from aioloader.errors import StateError
from aioloader.plan.plan import Plan
from aioloader.plan.ranks import check_shard_state, shard_state
from aioloader.sources import Channel
from aioloader.sources.lines import Lines
from aioloader.stages.base import FoldStage, Pass, order_of
from aioloader.stages.key_order import KeyOrder
from aioloader.stages.rank import Even
from aioloader.stages.select import SkipFirst, Take
from aioloader.stages.shard import Shard
from aioloader.stages.shuffle import Shuffle
from aioloader.testing import assert_resumes_exactly
from tests._states import contents_of
from tests._support import Face, Steps, collect, notes, on_both_faces

pytestmark = pytest.mark.filterwarnings("ignore::aioloader.errors.ReplayWarning")

EVENS: tuple[Even, ...] = ("pad", "drop")
WORLDS = range(1, 9)

Make = Callable[[int, int], Pipeline]
"""A pipeline for a rank and a world size."""


def resumed(loader: Pipeline, cursor: Any) -> Pipeline:
    """`loader`, whose next epoch goes on behind `cursor`, whatever its state would say of ranks."""
    if cursor is None:
        return loader
    cursor = json.loads(json.dumps(cursor))
    build = loader._build

    def build_resumed(progress: Progress) -> Window:
        window = build(progress)
        window.resume(cursor)
        return window

    loader._build = build_resumed  # type: ignore[method-assign]
    return loader


def loaded(loader: Pipeline, state: dict[str, Any]) -> Pipeline:
    """`loader`, which goes on from `state`, which has been in a file meanwhile."""
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


def going_on(make: Make, state: dict[str, Any]) -> Make:
    """All ranks go on from one state."""
    return lambda rank, world_size: loaded(make(rank, world_size), state)


def steps_of(
    make: Make,
    world_size: int,
    cursor: Any = None,
    *,
    limit: int | None = None,
    face: Face = "for",
    states: list[dict[str, Any]] | None = None,
) -> tuple[list[list[Any]], list[Any]]:
    """The batches of each step behind `cursor`, one of each rank; and the cursor behind each, the same on all ranks.

    `states` gets the states, which must be the same on all ranks too.
    """
    batches: list[list[Any]] = []
    cursors: list[list[Any]] = []
    known: list[list[dict[str, Any]]] = []
    for rank in range(world_size):
        loader = resumed(make(rank, world_size), cursor)
        with Steps(loader, face) as steps:
            mine: list[Any] = []
            its: list[Any] = []
            said: list[dict[str, Any]] = []
            while limit is None or len(mine) < limit:
                try:
                    mine.append(steps.next())
                except StopIteration:
                    break
                its.append(steps._iterator.cursor)
                if states is not None:
                    said.append(loader.state_dict())
        batches.append(mine)
        cursors.append(its)
        known.append(said)
    counts = [len(mine) for mine in batches]
    assert len(set(counts)) == 1, f"ranks are not in step: {counts} batches"
    assert all(its == cursors[0] for its in cursors), f"ranks have other cursors: {cursors}"
    assert all(said == known[0] for said in known), f"ranks have other states: {known}"
    if states is not None:
        states += known[0]
    return [list(step) for step in zip(*batches, strict=True)], cursors[0]


def dealt(steps: Iterable[Sequence[Any]]) -> list[Any]:
    """The samples of `steps` in the order that they were dealt from: one to each rank, round by round."""
    found: list[Any] = []
    for step in steps:
        for one_round in zip(*step, strict=True):
            found += one_round
    return found


def filled(order: Sequence[Any], begin: int, world_size: int, even: Even) -> list[Any]:
    """What `world_size` ranks get between them of `order` from position `begin` on."""
    left = len(order) - begin
    rounds = left // world_size if even == "drop" else math.ceil(left / world_size)
    return [order[number % len(order)] for number in range(begin, begin + rounds * world_size)]


# -- one order, dealt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("even", EVENS)
@pytest.mark.parametrize("before", WORLDS)
def test_any_number_of_ranks_goes_on_from_any_other(before: int, even: Even) -> None:
    """A permutation of 199 samples, the world size changed in the middle, the global batch the same.

    Each rank has as many batches, and the same cursor. Nothing is lost and nothing comes twice, but for what fills the
    last round; and each step is the one that the others would have made.
    """
    n = 199
    order = list(Pipeline(range(n)).shuffle(seed=5))
    for after in WORLDS:
        global_batch = math.lcm(before, after)
        at = n // global_batch // 2

        def make(rank: int, world_size: int, global_batch: int = global_batch) -> Pipeline:
            loader = Pipeline(range(n)).shuffle(seed=5).shard(rank, world_size, even=even)
            return loader.batch(global_batch // world_size, collate_fn=list)

        states: list[dict[str, Any]] = []
        first, cursors = steps_of(make, before, limit=at, states=states)
        assert dealt(first) == order[: at * global_batch]
        assert cursors == [number * global_batch for number in range(1, at + 1)]

        rest, _ = steps_of(going_on(make, states[-1]), after)
        assert dealt(rest) == filled(order, at * global_batch, after, even)

        whole, _ = steps_of(make, after)
        assert [sorted(dealt([step])) for step in first + rest] == [sorted(dealt([step])) for step in whole]


@pytest.mark.parametrize("before", WORLDS)
def test_any_number_of_ranks_goes_on_in_a_stream(before: int) -> None:
    """The same where the end is not known before it comes, and where a `filter` stands before `shard`."""
    n = 399

    async def source() -> AsyncIterator[int]:
        for number in range(n):
            yield number

    order = list(range(0, n, 2))
    for after in WORLDS:
        global_batch = math.lcm(before, after)
        at = len(order) // global_batch // 2

        def make(rank: int, world_size: int, global_batch: int = global_batch) -> Pipeline:
            loader = Pipeline(source).filter(lambda number: number % 2 == 0).shard(rank, world_size)
            return loader.batch(global_batch // world_size, collate_fn=list)

        states: list[dict[str, Any]] = []
        first, _ = steps_of(make, before, limit=at, states=states)
        assert dealt(first) == order[: at * global_batch]
        rest, _ = steps_of(going_on(make, states[-1]), after)
        assert dealt(rest) == filled(order, at * global_batch, after, "pad")


@on_both_faces
@pytest.mark.parametrize("even", EVENS)
@pytest.mark.parametrize("stream", [False, True], ids=["indexable", "stream"])
def test_resumed_at_every_step(face: Face, even: Even, stream: bool) -> None:
    """From 3 to 2 ranks and back, at the last step too."""
    n = 23

    def make(rank: int, world_size: int) -> Pipeline:
        loader = Pipeline((lambda: iter(range(n))) if stream else range(n))
        return loader.shard(rank, world_size, even=even).batch(6 // world_size, collate_fn=list)

    for before, after in ((3, 2), (2, 3), (3, 3)):
        whole, cursors = steps_of(make, before, face=face)
        assert dealt(whole) == filled(range(n), 0, before, even)
        for number, cursor in enumerate(cursors, 1):
            begin = min(n, len(dealt(whole[:number])))
            rest, _ = steps_of(make, after, cursor, face=face)
            assert dealt(rest) == filled(range(n), begin, after, even)


@on_both_faces
@settings(max_examples=30)
@given(data=st.data())
def test_the_world_size_may_change_after_any_sample(face: Face, data: st.DataObject) -> None:
    """Without batches a step is one sample for each rank; the next ranks deal on from there, whatever their number."""
    n = data.draw(st.integers(0, 40))
    stream = data.draw(st.booleans())
    evens = data.draw(st.sampled_from(EVENS))

    def make(rank: int, world_size: int) -> Pipeline:
        loader = Pipeline((lambda: iter(range(n))) if stream else range(n))
        return loader.shard(rank, world_size, even=evens).map(lambda number: [number])

    begin, cursor = 0, None
    for world_size in data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)):
        limit = data.draw(st.integers(0, 5))
        steps, cursors = steps_of(make, world_size, cursor, limit=limit, face=face)
        assert dealt(steps) == filled(range(n), begin, world_size, evens)[: limit * world_size]
        begin = min(n, begin + len(dealt(steps)))
        cursor = cursors[-1] if cursors else cursor
    rest, _ = steps_of(make, 3, cursor, face=face)
    assert dealt(rest) == filled(range(n), begin, 3, evens)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def keys_of(order: KeyOrder) -> list[int]:
    return list(order.slice(0, len(order)))


order_stages = st.lists(
    st.one_of(
        st.builds(Take, st.integers(0, 30)),
        st.builds(SkipFirst, st.integers(0, 30)),
        st.builds(Shuffle, st.none(), st.integers(0, 3)),
    ),
    max_size=3,
)


def by_lists(n: int, stages: Sequence[FoldStage], this_pass: Pass) -> list[int]:
    """`take`, `skip` and `shuffle` as said in one line each."""
    keys = list(range(n))
    for stage in stages:
        match stage:
            case Take(count):
                keys = keys[:count]
            case SkipFirst(count):
                keys = keys[count:]
            case Shuffle(None, seed):
                generator = torch.Generator().manual_seed(this_pass.seed(seed, "shuffle"))
                keys = [keys[place] for place in torch.randperm(len(keys), generator=generator)]
            case Shard(rank, world_size, even="pad" | "drop" | "error" as even) if (
                rank is not None and world_size is not None
            ):
                keys = filled(keys, 0, world_size, even)[rank::world_size]
    return keys


@settings(max_examples=200)
@given(
    n=st.integers(0, 60),
    before=order_stages,
    behind=order_stages,
    world_size=st.integers(1, 9),
    even=st.sampled_from(EVENS),
    data=st.data(),
)
def test_order_stages_are_arithmetic(
    n: int, before: list[FoldStage], behind: list[FoldStage], world_size: int, even: Even, data: st.DataObject
) -> None:
    """In any order, any slice of them, resumed at any of their positions."""
    this_pass = Pass(epoch=data.draw(st.integers(0, 2)))
    rank = data.draw(st.integers(0, world_size - 1))
    stages = [*before, Shard(rank, world_size, even=even), *behind]
    order = order_of(n, stages, this_pass)
    expected = by_lists(n, stages, this_pass)
    assert len(order) == len(expected)
    assert keys_of(order) == expected
    start, stop = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 70))
    assert list(order.slice(start, stop)) == expected[start:stop]
    assert order.stride == world_size
    for number in range(len(expected) + 1):
        assert keys_of(order.after(number * world_size)) == expected[number:]


@settings(max_examples=200)
@given(
    n=st.integers(0, 60),
    before=order_stages,
    worlds=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    data=st.data(),
)
def test_ranks_of_any_number_share_what_is_left(
    n: int, before: list[FoldStage], worlds: list[int], data: st.DataObject
) -> None:
    """Behind any position, complete and disjoint; the ends of other worlds' orders included."""
    this_pass = Pass(epoch=0)
    order = by_lists(n, before, this_pass)
    position = data.draw(st.integers(0, math.ceil(len(order) / worlds[0]) * worlds[0]))
    world_size = worlds[1]
    parts = [
        keys_of(order_of(n, [*before, Shard(rank, world_size)], this_pass).after(position))
        for rank in range(world_size)
    ]
    begin = min(position, len(order))
    assert [key for one_round in zip(*parts, strict=True) for key in one_round] == filled(
        order, begin, world_size, "pad"
    )


@pytest.mark.parametrize("behind", [Take(4), SkipFirst(1), Shuffle(None, 0)], ids=["take", "skip", "shuffle"])
def test_a_position_within_a_round_is_refused_behind_stages_of_a_rank(behind: FoldStage) -> None:
    """They know this rank's samples by number; where none can be said, the numbers are."""
    order = order_of(20, [Shard(1, 3), behind], Pass(0))
    with pytest.raises(ValueError, match="position 7 lies within a round of 3 ranks"):
        order.after(7)


@pytest.mark.parametrize("position", [-1, 2.0, "3", None, True, 21])
def test_what_is_no_position_is_refused(position: Any) -> None:
    with pytest.raises(ValueError, match="position"):
        order_of(20, [], Pass(0)).after(position)


def test_a_shard_of_a_large_range_holds_no_list() -> None:
    """Neither the keys nor the one that fills the last round make a copy of the order."""
    order = order_of(10**12 + 1, [Shard(1, 8)], Pass(0))
    assert len(order) == 125_000_000_001
    assert list(order.slice(125_000_000_000 - 1, 125_000_000_002)) == [10**12 - 7, 0]


# -- even --------------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("stream", [False, True], ids=["indexable", "stream"])
def test_drop_leaves_out_the_last_round(face: Face, stream: bool) -> None:
    """As DistributedSampler(drop_last=True) with its padding: no rank gets more than another."""
    for n in range(12):
        source: Any = (lambda n=n: iter(range(n))) if stream else range(n)
        parts = [collect(Pipeline(source).shard(rank, 4, even="drop"), face) for rank in range(4)]
        assert parts == [list(range(rank, n // 4 * 4, 4)) for rank in range(4)]
        if not stream:
            assert {len(Pipeline(source).shard(rank, 4, even="drop")) for rank in range(4)} == {n // 4}


@on_both_faces
def test_error_refuses_at_the_start_where_the_length_is_known(face: Face) -> None:
    """With the numbers, before anything is read; `len` too."""

    class Sized(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("it is read")

        def __len__(self) -> int:
            return 10

    for source in (range(10), Sized()):
        loader = Pipeline(source).shard(0, 4, even="error").batch(2)
        with pytest.raises(ValueError, match=r"10 samples on 4 ranks leave 2 over.*'pad'"):
            collect(loader, face)
        with pytest.raises(ValueError, match="10 samples on 4 ranks leave 2 over"):
            len(loader)
    for source in (range(12), range(0)):
        assert len(collect(Pipeline(source).shard(0, 4, even="error"), face)) == len(source) // 4


@on_both_faces
def test_error_refuses_at_the_end_of_a_stream(face: Face) -> None:
    """All ranks get the same batches, and then the error; a stream that shares out evenly gets none."""
    for rank in range(4):
        loader = Pipeline(lambda: iter(range(10))).shard(rank, 4, even="error").batch(2, collate_fn=list)
        with Steps(loader, face) as steps:
            batch, error = steps.outcomes()
        assert batch == [rank, rank + 4]
        assert isinstance(error, ValueError)
        assert "10 samples on 4 ranks leave 2 over" in str(error)
        assert collect(Pipeline(lambda: iter(range(8))).shard(rank, 4, even="error"), face) == [rank, rank + 4]


@on_both_faces
@pytest.mark.parametrize("even", ["pad", "drop", "error"])
def test_a_stream_that_fails_gives_its_own_error(face: Face, even: Even) -> None:
    """In the middle of a round, on every rank after as many samples."""

    def broken() -> Iterator[int]:
        yield from range(5)
        raise OSError("the disk is gone")

    found = []
    for rank in range(3):
        with Steps(Pipeline(broken).shard(rank, 3, even=even), face) as steps:
            *samples, error = steps.outcomes()
        assert isinstance(error, OSError)
        assert "position 5" in notes(error)
        found.append(samples)
    assert found == ([[0, 3], [1, 4], [2, 0]] if even == "pad" else [[0], [1], [2]])


@on_both_faces
def test_a_failed_sample_keeps_ranks_in_step(face: Face) -> None:
    """It is one of its rank's samples, and one that fills the last round fails again."""

    def fetch(key: int) -> int:
        if key == 0:
            raise KeyError(key)
        return key

    loader = Pipeline(lambda: iter(range(5))).map(fetch)
    outcomes = []
    for rank in range(3):
        with Steps(loader.shard(rank, 3), face) as steps:
            outcomes.append(["failed" if isinstance(found, KeyError) else found for found in steps.outcomes()])
    assert outcomes == [["failed", 3], [1, 4], [2, "failed"]]


# -- streams: what is read ---------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("ordered", [True, False])
def test_maps_in_front_of_shard_run_for_this_rank_only(face: Face, ordered: bool) -> None:
    """A map gives one sample for one: whether it stands before `shard` or behind makes no difference but in work."""
    fetched: list[int] = []

    async def fetch(key: int) -> int:
        fetched.append(key)
        return key * 10

    loader = Pipeline(lambda: iter(range(12))).map(fetch, ordered=ordered).shard(1, 4)
    assert sorted(collect(loader, face)) == [10, 50, 90]
    assert sorted(fetched) == [1, 5, 9]


@on_both_faces
def test_a_sampler_is_sharded_before_samples_are_loaded(face: Face) -> None:
    """Each rank loads its own."""
    loaded: list[int] = []

    class Data:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, key: int) -> int:
            loaded.append(key)
            return key

    loader = Pipeline(Data(), sampler=[7, 6, 5, 4, 3, 2, 1, 0]).shard(1, 4)
    assert collect(loader, face) == [6, 2]
    assert sorted(loaded) == [2, 6]


def write_lines(path: Path, n: int) -> Path:
    path.write_bytes(b"".join(b"%d\n" % number for number in range(n)))
    return path


@on_both_faces
def test_a_resumed_stream_seeks(face: Face, tmp_path: Path) -> None:
    """Only what may have to fill the last round is read again from the beginning: one sample less than ranks."""
    n = 1000
    path = write_lines(tmp_path / "lines.txt", n)
    opened: list[tuple[Any, list[int]]] = []

    class Watched(Lines):
        def open(self, context: SourceContext, cursor: Any) -> EntryReader:
            opened.append((cursor, []))
            return WatchedReader(super().open(context, cursor), opened[-1][1])

    class WatchedReader(EntryReader):
        def __init__(self, reader: EntryReader, read: list[int]) -> None:
            self._reader, self._read = reader, read

        async def read(self, limit: int) -> list[Entry]:
            entries = await self._reader.read(limit)
            self._read += [int(entry.value) for entry in entries]
            return entries

        async def aclose(self) -> None:
            await self._reader.aclose()

    def make(rank: int, world_size: int) -> Pipeline:
        return Pipeline(Watched(path)).shard(rank, world_size).map(lambda line: [int(line)])

    first, cursors = steps_of(make, 3, limit=300, face=face)
    assert dealt(first) == list(range(900))
    opened.clear()
    rest, _ = steps_of(make, 8, cursors[-1], face=face)
    assert dealt(rest) == [*range(900, n), 0, 1, 2, 3]
    assert len(opened) == 16
    for cursor, read in opened:
        assert read == (list(range(7)) if cursor is None else list(range(900, n)))


@on_both_faces
def test_a_generator_is_read_once_when_it_is_resumed(face: Face) -> None:
    """Its first samples cannot be read again beside it: it is read from the beginning, as without `shard`."""
    _, cursors = steps_of(lambda rank, of: Pipeline(iter(range(10))).shard(rank, of).map(lambda n: [n]), 3, limit=2)
    rest, _ = steps_of(
        lambda rank, of: Pipeline(iter(range(10))).shard(rank, of).map(lambda n: [n]), 3, cursors[-1], face=face
    )
    assert dealt(rest) == [6, 7, 8, 9, 0, 1]


def test_a_sampler_is_iterated_once_when_it_is_resumed() -> None:
    """It may draw its order as it is iterated: a second time would draw another."""
    begun = []

    class Keys(TorchSampler[int]):
        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[int]:
            begun.append(True)
            return iter(range(9, -1, -1))

    def make(rank: int, world_size: int) -> Pipeline:
        return Pipeline([[n] for n in range(10)], sampler=Keys()).shard(rank, world_size)

    _, cursors = steps_of(make, 4, limit=1)
    begun.clear()
    rest, _ = steps_of(make, 4, cursors[-1])
    assert dealt(rest) == [5, 4, 3, 2, 1, 0, 9, 8]
    assert len(begun) == 4


def test_what_does_not_come_again_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A live source is read on, and a last round is filled with the first samples since."""
    assert CursorSource.replayable
    monkeypatch.setattr(Lines, "replayable", False)
    path = write_lines(tmp_path / "lines.txt", 10)

    def make(rank: int, world_size: int) -> Pipeline:
        return Pipeline(Lines(path)).shard(rank, world_size).map(lambda line: [int(line)])

    _, cursors = steps_of(make, 4, limit=1)
    assert dealt(steps_of(make, 4, cursors[-1])[0]) == [4, 5, 6, 7, 8, 9, 4, 5]


# -- which rank this is ------------------------------------------------------------------------------------------------


@pytest.fixture
def rank_3_of_8() -> Iterator[DeviceMesh]:
    """torch.distributed with a backend that talks to nobody, and a mesh of 2 (data) by 4 (tensor)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "tensor"))
    finally:
        dist.destroy_process_group()


@on_both_faces
def test_ranks_come_from_wherever_they_are_said(
    face: Face, rank_3_of_8: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing communicates: any collective would fail here."""
    mesh = rank_3_of_8
    odd = dist.new_group([1, 3, 5])
    monkeypatch.setenv("RANK", "0")  # torch.distributed knows better
    monkeypatch.setenv("WORLD_SIZE", "2")

    def collective(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective is called")

    for name in ("all_gather_object", "all_gather", "all_reduce", "barrier", "broadcast", "broadcast_object_list"):
        monkeypatch.setattr(dist, name, collective)
        monkeypatch.setattr(dist.distributed_c10d, name, collective)
    for loader, (rank, world_size) in (
        (Pipeline(range(48)).shard(), (3, 8)),
        (Pipeline(range(48)).shard(group=odd), (1, 3)),
        (Pipeline(range(48)).shard(group=dist.group.WORLD), (3, 8)),
        (Pipeline(range(48)).shard(mesh=mesh["data"]), (0, 2)),
        (Pipeline(range(48)).shard(mesh=(mesh, "data")), (0, 2)),
        (Pipeline(range(48)).shard(mesh=(mesh, 1)), (3, 4)),
        (Pipeline(range(48)).shard(mesh=(mesh, ("data", "tensor"))), (3, 8)),
        (Pipeline(range(48)).shard(mesh=(mesh, ("tensor", "data"))), (6, 8)),
        (Pipeline(range(48)).shard(1, 6), (1, 6)),
    ):
        assert collect(loader, face) == list(range(rank, 48, world_size))
        assert len(loader) == 48 // world_size
        state = shard_state(loader._plan)
        assert state is not None
        assert state["world_size"] == world_size


@on_both_faces
@pytest.mark.parametrize("whole", [True, False])
def test_a_state_is_of_the_ranks_that_there_were_when_their_group_is_destroyed(
    face: Face, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last state is often taken after the end of the training loop; and the environment may know nothing of ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    try:
        odd = dist.new_group([1, 3, 5])
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "tensor"))
        loaders = [
            Pipeline(range(480)).shard(group=odd).batch(2),
            Pipeline(range(480)).shard().batch(2),
            Pipeline(range(480)).shard(mesh=mesh["data"]).batch(2),
        ]
        states = []
        for loader in loaders:
            collect(loader, face, limit=3)
            states.append(loader.state_dict())
        dist.destroy_process_group(None if whole else odd)
        assert [loader.state_dict() for loader in loaders] == states
        worlds = [json.loads(state["cursor"]["json"])["ranks"]["world_size"] for state in states]
        assert worlds == [3, 8, 2]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_group_or_mesh_without_this_process_is_refused(rank_3_of_8: DeviceMesh) -> None:
    """Where it is passed, and not with another rank's samples."""
    with pytest.raises(ValueError, match="group must be one that this process is in"):
        Pipeline(range(8)).shard(group=dist.new_group([0, 1]))
    with pytest.raises(ValueError, match=r"mesh must be one that this process is in, got one of ranks \[0, 1\]"):
        Pipeline(range(8)).shard(mesh=DeviceMesh("cpu", [0, 1], _init_backend=False))


@pytest.mark.parametrize(
    ("argument", "kind", "said"),
    [
        pytest.param(lambda _: {"group": 3}, TypeError, "ProcessGroup, got 3 of type int", id="no group"),
        pytest.param(lambda _: {"mesh": 3}, TypeError, "DeviceMesh or a pair.*got 3", id="no mesh"),
        pytest.param(
            lambda mesh: {"mesh": mesh}, ValueError, "one dimension, got 2.*'data', 'tensor'", id="two of them"
        ),
        pytest.param(lambda mesh: {"mesh": (mesh, "pipe")}, ValueError, "no dimension 'pipe'.*'data'", id="a name"),
        pytest.param(lambda mesh: {"mesh": (mesh, 2)}, ValueError, "no dimension 2", id="a number"),
        pytest.param(lambda mesh: {"mesh": (mesh, 0.5)}, TypeError, "names or numbers.*0.5", id="neither"),
        pytest.param(lambda mesh: {"mesh": (mesh, ())}, ValueError, "each dimension once", id="none"),
        pytest.param(lambda mesh: {"mesh": (mesh, (0, "data"))}, ValueError, "each dimension once", id="twice"),
        pytest.param(
            lambda mesh: {"mesh": (mesh, 0), "rank": 0, "world_size": 1}, ValueError, "one of rank and", id="both"
        ),
        pytest.param(lambda _: {"even": "cut"}, ValueError, "'error', 'keep', 'agree', got 'cut'", id="even"),
    ],
)
def test_bad_arguments_are_refused(rank_3_of_8: DeviceMesh, argument: Any, kind: type[Exception], said: str) -> None:
    """At once."""
    with pytest.raises(kind, match=said):
        Pipeline(range(8)).shard(**argument(rank_3_of_8))


def test_a_world_size_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several processes would take itself for rank 0, and most samples would never come."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="WORLD_SIZE='4' without RANK"):
        list(Pipeline(range(8)).shard())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert list(Pipeline(range(3)).shard()) == [0, 1, 2]


@on_both_faces
def test_a_whole_epoch_is_of_one_rank(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up when it begins; a later repetition does not ask again."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Steps(Pipeline(range(4)).shard().repeat(2), face) as steps:
        found = steps.rest(1)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        found += steps.rest()
    assert found == [1, 3, 1, 3]


# -- one order for all -------------------------------------------------------------------------------------------------


def plus(number: int) -> int:
    return number + 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Pipeline.merge(range(3), range(3)), r"Pipeline.merge\(...\)"),
        (lambda: Pipeline(range(9)).map(plus, ordered=False).filter(bool), r"map\(plus, ordered=False\)"),
        (lambda: Pipeline(range(9)).filter(bool).map(plus, ordered=False), r"map\(plus, ordered=False\)"),
        (lambda: Pipeline(range(9)).map(plus, ordered=False).batch(2), r"map\(plus, ordered=False\)"),
        (lambda: Pipeline(range(9)).map(plus, ordered=False).repeat(2), r"map\(plus, ordered=False\)"),
        (lambda: Pipeline.zip(range(9), Pipeline(range(9)).map(plus, ordered=False)), r"map\(plus, ordered=False\)"),
        (lambda: Pipeline.mix([Pipeline.merge(range(3), range(3))], [1]).take(4), r"Pipeline.merge\(...\)"),
        (lambda: Pipeline(range(9)).batch(2, max_wait=1), r"batch\(2, max_wait=1\)"),
        (lambda: Pipeline(range(9)).drop_if(bool), r"drop_if\(bool\)"),
    ],
)
def test_what_each_rank_would_see_in_another_order_is_not_dealt(make: Callable[[], Pipeline], said: str) -> None:
    """Some samples would come on several ranks and others on none, and nothing would say so."""
    with pytest.raises(ValueError, match=f"alike, but {said} gives samples as they come"):
        make().shard(0, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda sampler: Pipeline(range(8), sampler=sampler),
        lambda sampler: Pipeline(range(8), sampler=Wrapping(Wrapping(sampler))),
        lambda sampler: Pipeline(sampler),
        lambda sampler: Pipeline.interleave(range(8), Pipeline(range(8), sampler=sampler).map(plus)),
        lambda sampler: Pipeline.mix([Pipeline(range(8), sampler=Wrapping(sampler)), range(8)], [1, 1]),
        lambda sampler: Pipeline.zip(Pipeline.zip(Pipeline(range(8), sampler=sampler)).batch(2), range(8)),
        lambda sampler: Pipeline(range(8), sampler=sampler).repeat(2).filter(bool),
    ],
    ids=["sampler", "wrapped", "source", "in interleave", "in mix", "in zips", "in front of others"],
)
def test_a_distributed_sampler_is_not_sharded_again(make: Callable[[Any], Pipeline]) -> None:
    """Wherever the shard's samples come from: each rank would deal a part of its part."""
    sampler: Any = DistributedSampler(range(8), num_replicas=2, rank=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="DistributedSampler gives each rank its own part already"):
        make(sampler).shard(0, 2)


class Wrapping:
    """A sampler that takes its keys from another one."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)


def test_maps_that_commute_with_shard_may_be_unordered() -> None:
    """They run behind it in any case."""
    for source in (range(8), lambda: iter(range(8)), Pipeline.merge(range(8))):
        parts = [list(Pipeline(source).map(plus, ordered=False).shard(rank, 2)) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == list(range(1, 9))
        assert sorted(parts[0]) == [1, 3, 5, 7]


# -- who may go on from a state ----------------------------------------------------------------------------------------


def ones(number: float) -> list[float]:
    return [number]


def is_odd(number: int) -> bool:
    return number % 2 == 1


def iter_of(n: int) -> Callable[[], Iterator[int]]:
    return lambda: iter(range(n))


Shared = Literal["any world", "same world", "same rank"]


@pytest.mark.parametrize(
    ("stages", "shared", "global_batch"),
    [
        (lambda loader: loader, "same world", None),
        (lambda loader: loader.batch(4), "any world", 12),
        (lambda loader: loader.map(plus).batch(4).map(len).pin_memory(), "any world", 12),
        (lambda loader: loader.batch(4).skip(1).take(9).enumerate().shuffle(3), "any world", 12),
        (lambda loader: loader.batch(4).repeat(2), "any world", 12),
        (lambda loader: loader.repeat().batch(4), "any world", 12),
        (lambda loader: loader.repeat(2).batch(4), "same world", 12),
        (lambda loader: loader.batch(4, drop_last=True).repeat(2), "same world", 12),
        (lambda loader: loader.batch(4, drop_last=True).shuffle(3), "same world", 12),
        (lambda loader: loader.batch(4).batch(2, drop_last=True).shuffle(3), "same world", 24),
        (lambda loader: Pipeline.zip(loader.batch(4, drop_last=True)).repeat(2), "same world", 12),
        (lambda loader: Pipeline.zip(loader.batch(4, drop_last=True)).shuffle(3), "same world", 12),
        (lambda loader: loader.batch(4, drop_last=True).skip(1).take(9).enumerate(), "any world", 12),
        (lambda loader: loader.batch(4).batch(2), "any world", 24),
        (lambda loader: loader.take(9).batch(4), "same world", 12),
        (lambda loader: loader.skip(9).batch(4), "same world", 12),
        (lambda loader: loader.enumerate().batch(4), "same world", 12),
        (lambda loader: loader.shuffle().batch(4), "same world", 12),
        (lambda loader: loader.shuffle(9).batch(4), "same world", 12),
        (lambda loader: loader.batch(4).unbatch(), "same world", None),
        (lambda loader: loader.filter(bool).batch(4), "same rank", 12),
        (lambda loader: loader.flat_map(ones).batch(4), "same rank", 12),
        (lambda loader: loader.batch(4).filter(len), "same rank", 12),
        (lambda loader: loader.batch(4, collate_fn=list).unbatch().batch(2), "same rank", 6),
        (lambda loader: loader.map(plus, ordered=False).batch(4), "same rank", 12),
        (lambda loader: loader.batch(4).map(len, ordered=False), "same rank", 12),
        (lambda loader: loader.batch(4, max_wait=1), "same rank", 12),
        (lambda loader: loader.cache(memory_bytes=99).batch(4), "any world", 12),
        (lambda loader: Pipeline.interleave(loader, loader).batch(4), "same world", 12),
        (lambda loader: Pipeline.zip(loader, loader).batch(4), "any world", 12),
        (lambda loader: Pipeline.zip(loader, range(9)).batch(4), "same world", 12),
        (lambda loader: Pipeline.mix([loader, range(9)], [1, 1]).batch(4), "same world", 12),
        (lambda loader: Pipeline.merge(loader, range(9)).batch(4), "same rank", 12),
        (lambda loader: Pipeline.zip(loader, Pipeline(range(9)).shard(0, 2)), "same rank", None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_who_may_go_on_from_a_state(
    stages: Callable[[Pipeline], Pipeline], shared: Shared, global_batch: int | None
) -> None:
    """What stands behind `shard` decides: samples alone, counts of a rank's samples, or what it did with them."""
    state = shard_state(stages(Pipeline(range(24)).map(plus).shard(1, 3))._plan)
    assert state == {
        "world_size": 3,
        "global_batch": global_batch,
        "elastic": shared == "any world",
        "rank": 1 if shared == "same rank" else None,
    }
    assert json.loads(json.dumps(state)) == state


def plan(rank: int, world_size: int, batch_size: int, stages: Callable[[Pipeline], Pipeline] = lambda p: p) -> Plan:
    return stages(Pipeline(range(96)).shard(rank, world_size)).batch(batch_size)._plan


def test_a_state_of_other_ranks_is_taken_or_refused_with_the_numbers() -> None:
    """The same global batch: taken. What cannot be gone on with exactly: refused, with what would do."""
    two = shard_state(plan(0, 2, 6))
    check_shard_state(plan(1, 2, 6), two)
    check_shard_state(plan(2, 3, 4), two)
    check_shard_state(plan(0, 1, 12), two)
    with pytest.raises(StateError, match=r"global batch of 12 \(world_size 2 times batch_size 6\).*18.*batch_size=4"):
        check_shard_state(plan(0, 3, 6), two)
    with pytest.raises(StateError, match="a number of ranks that divides 12, which 5 does not"):
        check_shard_state(plan(0, 5, 2), two)
    with pytest.raises(StateError, match=r"one of None \(no batch\(\)\)"):
        check_shard_state(Pipeline(range(8)).shard(0, 2)._plan, two)
    single = shard_state(Pipeline(range(8)).shard(0, 2)._plan)
    check_shard_state(Pipeline(range(8)).shard(1, 2)._plan, single)
    with pytest.raises(StateError, match=r"world_size=2, and this is rank 0 of 4: without batch\(\) .* start 2 ranks"):
        check_shard_state(Pipeline(range(8)).shard(0, 4)._plan, single)

    apart: list[Callable[[Pipeline], Pipeline]] = [lambda loader: loader.flat_map(list), Pipeline.unbatch]
    for change in apart:  # no batches any more
        of_two, of_three = (change(Pipeline(range(96)).shard(0, ranks).batch(6))._plan for ranks in (2, 3))
        with pytest.raises(StateError, match=r"rank 0 of 3: after (flat_map|unbatch)\(.*\) a position of one rank"):
            check_shard_state(of_three, shard_state(of_two))

    taken = shard_state(plan(0, 2, 6, lambda loader: loader.take(20)))
    check_shard_state(plan(1, 2, 6, lambda loader: loader.take(20)), taken)
    with pytest.raises(StateError, match=r"world_size=2.*rank 0 of 3: after take\(20\).*start 2 ranks.*before shard"):
        check_shard_state(plan(0, 3, 4, lambda loader: loader.take(20)), taken)

    kept = shard_state(plan(0, 2, 6, lambda loader: loader.filter(bool)))
    check_shard_state(plan(0, 2, 6, lambda loader: loader.filter(bool)), kept)
    with pytest.raises(StateError, match=r"rank 0 of 2, and this is rank 1 of 2: after filter\(bool\)"):
        check_shard_state(plan(1, 2, 6, lambda loader: loader.filter(bool)), kept)
    with pytest.raises(StateError, match=r"world_size=2.*rank 2 of 3: after filter\(bool\)"):
        check_shard_state(plan(2, 3, 4, lambda loader: loader.filter(bool)), kept)


def test_a_state_with_shard_and_one_without_do_not_mix() -> None:
    plain = Pipeline(range(8))._plan
    check_shard_state(plain, None)
    assert shard_state(plain) is None
    with pytest.raises(StateError, match=r"saved without shard\(\)"):
        check_shard_state(plan(0, 2, 6), None)
    with pytest.raises(StateError, match=r"saved with shard\(\)"):
        check_shard_state(plain, shard_state(plan(0, 2, 6)))


@pytest.mark.parametrize(
    "part",
    [
        {"world_size": 0},
        {"world_size": True},
        {"world_size": None},
        {"elastic": 1},
        {"global_batch": "12"},
        {"global_batch": 0},
        {"rank": 2},
        {"rank": -1},
        {"rank": "0"},
    ],
)
def test_a_broken_state_is_refused(part: dict[str, Any]) -> None:
    """A rank that is not in the state's world is one of them."""
    good = shard_state(plan(0, 2, 6)) or {}
    with pytest.raises(StateError, match="must hold world_size"):
        check_shard_state(plan(0, 2, 6), good | part)
    others: list[Any] = [{}, [], 3]
    for broken in others:
        with pytest.raises(StateError, match="must hold world_size"):
            check_shard_state(plan(0, 2, 6), broken)


def test_a_state_tells_other_ranks_from_another_pipeline() -> None:
    """The size of batches may change with the number of ranks, the rest of the description may not."""

    def state_of(batches: int, rank: int, world_size: int, size: int, *, seed: int = 3, even: Even = "drop") -> Any:
        loader: Pipeline = (
            Pipeline(range(960)).shuffle(seed=seed).shard(rank, world_size, even=even).batch(size, collate_fn=list)
        )
        loader = loader.batch(4, collate_fn=list)
        collect(loader, "for", limit=batches)
        return loader, loader.state_dict()

    _, two = state_of(3, 1, 2, 6)
    assert contents_of(two)["ranks"] == {"world_size": 2, "global_batch": 48, "elastic": True, "rank": None}
    other, _ = state_of(0, 0, 3, 4)
    other.load_state_dict(two)
    assert dealt([[sum(batch, [])] for batch in collect(other, "for", limit=1)])  # noqa: RUF017
    for others, said in (
        (state_of(0, 0, 3, 4, seed=4), "shuffle"),
        (state_of(0, 0, 3, 4, even="pad"), "even='pad', and was|even='drop'"),
        (state_of(0, 0, 3, 6), "global batch of 48.*72"),
        (state_of(0, 1, 2, 12), "global batch of 48"),
    ):
        loader, before = others
        with pytest.raises(StateError, match=said):
            loader.load_state_dict(two)
        assert loader.state_dict() == before


@on_both_faces
def test_steps_of_batches_are_counted_alike_by_all_worlds(face: Face) -> None:
    """`skip`, `take` and `shuffle` behind `batch`: the same steps, whatever the number of ranks."""

    def make(rank: int, world_size: int) -> Pipeline:
        batches = Pipeline(range(240)).shard(rank, world_size).batch(12 // world_size, collate_fn=list)
        return batches.skip(2).shuffle(4, seed=1).take(9)

    whole, cursors = steps_of(make, 2)
    expected = [sorted(dealt([step])) for step in whole]
    for at in (1, 4, 8):
        rest, _ = steps_of(make, 3, cursors[at - 1], face=face)
        assert [sorted(dealt([step])) for step in rest] == expected[at:]


@on_both_faces
def test_ranks_that_zip_stay_in_step(face: Face) -> None:
    def make(rank: int, world_size: int) -> Pipeline:
        left, right = Pipeline(range(30)).shard(rank, world_size), Pipeline(range(100, 130)).shard(rank, world_size)
        return Pipeline.zip(left, right).batch(6 // world_size, collate_fn=list)

    states: list[dict[str, Any]] = []
    steps_of(make, 3, limit=2, states=states)
    rest, _ = steps_of(going_on(make, states[-1]), 2, face=face)
    assert dealt(rest) == [(number, number + 100) for number in range(12, 30)]


@on_both_faces
def test_the_same_world_goes_on_behind_counts_of_samples(face: Face) -> None:
    """`take`, `skip`, `shuffle` and `unbatch` on a rank: exact for as many ranks, from any one's cursor."""
    for stages in (
        lambda loader: loader.skip(3).take(20),
        lambda loader: loader.shuffle(seed=2),
        lambda loader: loader.shuffle(5, seed=2),
        lambda loader: loader.batch(4).unbatch().map(int),
    ):

        def make(rank: int, world_size: int, stages: Callable[[Pipeline], Pipeline] = stages) -> Pipeline:
            return stages(Pipeline(range(100)).shard(rank, world_size)).batch(5, collate_fn=list)

        whole, cursors = steps_of(make, 3)
        for at in range(1, len(whole)):
            assert steps_of(make, 3, cursors[at - 1], face=face)[0] == whole[at:]


@on_both_faces
def test_a_rank_goes_on_behind_a_filter_of_its_own(face: Face) -> None:
    """Its own cursor is exact for it."""
    for rank in range(3):
        loader = Pipeline(range(60)).shard(rank, 3).filter(lambda n: n % 7 < 3).batch(2, collate_fn=list)
        with Steps(loader, face) as steps:
            first = steps.rest(2)
            cursor = steps._iterator.cursor
            rest = steps.rest()
        assert collect(resumed(loader, cursor), face) == rest
        assert Counter(sum(first + rest, [])) == Counter(n for n in range(rank, 60, 3) if n % 7 < 3)  # noqa: RUF017


def test_nested_shards_deal_what_was_dealt() -> None:
    """Nodes first, and then the ranks of each."""
    parts = [
        list(Pipeline(range(24)).shard(node, 2).shard(local, 3)) for node, local in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    assert parts == [[0, 6, 12, 18], [1, 7, 13, 19], [2, 8, 14, 20], [3, 9, 15, 21]]
    state = shard_state(Pipeline(range(24)).shard(1, 2).shard(2, 3)._plan)
    assert state == {"world_size": 6, "global_batch": None, "elastic": False, "rank": None}


# -- with all the rest -------------------------------------------------------------------------------------------------


def noisy(number: float) -> float:
    return number + float(aioloader.sample_rng().numpy().random())


@pytest.mark.parametrize("stream", [False, True], ids=["indexable", "stream"])
@pytest.mark.parametrize("before", [False, True], ids=["map behind", "map before"])
def test_random_numbers_of_a_sample_are_the_same_on_any_rank(stream: bool, before: bool) -> None:
    """Though nobody has said a seed: ranks could not agree on one that is drawn."""

    def samples(world_size: int) -> set[float]:
        found: set[float] = set()
        for rank in range(world_size):
            loader: Pipeline = Pipeline((lambda: iter(range(30))) if stream else range(30))
            loader = loader.map(noisy).shard(rank, world_size) if before else loader.shard(rank, world_size).map(noisy)
            found |= set(loader)
        return found

    assert samples(1) == samples(2) == samples(3) == samples(4)  # the last with two samples twice
    assert len(samples(1)) == 30


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Pipeline(range(26)).shuffle(seed=1).shard(1, 4).batch(3), id="indexable"),
        pytest.param(lambda: Pipeline(lambda: iter(range(26))).map(noisy).shard(3, 4).batch(3), id="stream"),
        pytest.param(lambda: Pipeline(lambda: iter(range(26))).filter(plus).shard(2, 4, even="drop"), id="drop"),
        pytest.param(lambda: Pipeline(lambda: iter(range(26))).flat_map(ones).shard(2, 4, even="error"), id="error"),
        pytest.param(lambda: Pipeline(lambda: iter(range(26))).shuffle(5).shard(3, 4).repeat(2).batch(2), id="repeat"),
        pytest.param(
            lambda: Pipeline(
                range(26), sampler=RandomSampler(range(26), generator=torch.Generator().manual_seed(7))
            ).shard(3, 4),
            id="sampler",
        ),
        pytest.param(lambda: Pipeline(range(26), sampler=RandomSampler(range(26))).shard(3, 4).batch(2), id="global"),
        pytest.param(lambda: Pipeline(range(26)).map(plus).cache(memory_bytes=9999).shard(3, 4).batch(2), id="cache"),
        pytest.param(
            lambda: Pipeline.mix([Pipeline(range(9)).shard(2, 4), Pipeline(iter_of(9)).shard(2, 4)], [1, 2]), id="mix"
        ),
        pytest.param(
            lambda: Pipeline.zip(Pipeline(range(9)).shard(3, 4), Pipeline(iter_of(9)).shard(3, 4)).batch(2), id="zip"
        ),
        pytest.param(
            lambda: Pipeline.zip(
                Pipeline(range(9)).map(noisy), Pipeline(range(10)).map(noisy).filter(bool).shard(3, 4).map(noisy)
            ),
            id="filler of a second source",
        ),
        pytest.param(
            lambda: Pipeline.interleave(
                Pipeline(range(2)).map(noisy).repeat(2),
                Pipeline(range(5)).map(noisy).repeat(2).flat_map(ones).shard(3, 4),
                Pipeline(iter_of(10)).map(noisy).flat_map(ones).map(noisy).filter(bool).shard(3, 4).repeat(2),
            ),
            id="filler behind repeats",
        ),
        pytest.param(lambda: Pipeline(range(60)).shard(0, 2).shard(1, 3).filter(is_odd).batch(2), id="nested"),
        pytest.param(lambda: Pipeline(iter_of(60)).shard(1, 2).shard(2, 4).filter(is_odd).batch(2), id="twice"),
    ],
)
def test_a_rank_resumes_exactly(make: Callable[[], Pipeline]) -> None:
    """From every state, the fillers of the last round included."""
    assert_resumes_exactly(make)


def test_a_batch_of_a_rank_is_made_once_more() -> None:
    """`replay`, and where it came from."""
    loader = Pipeline(range(26)).shuffle(seed=1).shard(2, 4).batch(3, collate_fn=list)
    batches = []
    for batch in loader:
        batches.append(batch)
        info = loader.last_batch_info()
        assert info is not None
        assert list(info.keys) == batch
    assert [loader.replay(number) for number in range(len(batches))] == batches


FRONT: dict[str, Callable[[Pipeline], Pipeline]] = {
    "map": lambda loader: loader.map(plus),
    "filter": lambda loader: loader.filter(lambda number: number % 3 != 0),
    "flat_map": lambda loader: loader.flat_map(lambda number: [number, number + 1000]),
    "take": lambda loader: loader.take(40),
    "skip": lambda loader: loader.skip(3),
    "shuffle(5)": lambda loader: loader.shuffle(5, seed=4),
    "repeat": lambda loader: loader.repeat(2),
    "batch": lambda loader: loader.batch(3).unbatch().map(int),
}
BEHIND: dict[str, Callable[[Pipeline], Pipeline]] = {
    "take": lambda loader: loader.take(5),
    "skip": lambda loader: loader.skip(1),
    "map": lambda loader: loader.map(list),
    "batch": lambda loader: loader.batch(2, collate_fn=lambda batches: sum(batches, [])),  # noqa: RUF017
}


@settings(max_examples=25)
@given(
    front=st.lists(st.sampled_from(sorted(FRONT)), max_size=3),
    behind=st.lists(st.sampled_from(sorted(BEHIND)), max_size=2),
    stream=st.booleans(),
    even=st.sampled_from(EVENS),
    worlds=st.sampled_from([(1, 2), (2, 3), (3, 2), (3, 1), (2, 6), (6, 3), (3, 3)]),
    at=st.integers(1, 6),
)
def test_any_pipeline_goes_on_with_other_ranks(
    front: list[str], behind: list[str], stream: bool, even: Even, worlds: tuple[int, int], at: int
) -> None:
    """The steps of the first ranks and those of the others together are those of a run that was never stopped."""
    before, after = worlds

    def make(rank: int, world_size: int) -> Pipeline:
        loader: Pipeline = Pipeline(iter_of(50) if stream else range(50))
        for name in front:
            loader = FRONT[name](loader)
        loader = loader.shard(rank, world_size, even=even).batch(6 // world_size, collate_fn=list)
        for name in behind:
            loader = BEHIND[name](loader)
        return loader

    states: list[dict[str, Any]] = []
    first, _ = steps_of(make, before, limit=at, states=states)
    whole, _ = steps_of(make, after)
    if len(first) < at or len(whole) <= at or not states:
        return  # it was over by then
    rest, _ = steps_of(going_on(make, states[-1]), after)
    assert [sorted(sum(step, [])) for step in first + rest] == [sorted(sum(step, [])) for step in whole]  # noqa: RUF017


# -- ranks that nothing splits for -------------------------------------------------------------------------------------


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun says to the second of two processes."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


@on_both_faces
@pytest.mark.parametrize(
    ("make", "way_out"),
    [
        (lambda: Pipeline(range(8)).batch(4), r"add \.shard\(\)"),
        (lambda: DataLoader(list(range(8)), 4), "pass sampler=DistributedSampler"),
        (lambda: DataLoader(list(range(8)), 4, shuffle=True, num_workers=2), "pass sampler=DistributedSampler"),
    ],
)
@pytest.mark.usefixtures("two_ranks")
def test_data_that_nobody_splits_among_ranks_is_warned_of(make: Any, way_out: str, face: Face) -> None:
    """Once for each loader, at its first batch; a replay and a resumed state say no more."""
    loader = make()
    with pytest.warns(UnsplitWarning, match=f"there are 2 ranks, and nothing splits the data of .*{way_out}") as caught:
        assert len(collect(loader, face)) == 2
    assert [warning.filename for warning in caught] == [caught[0].filename]
    assert "aioloader/aioloader" not in caught[0].filename
    assert len(collect(loader, face)) == 2
    loader.load_state_dict(loader.state_dict())
    assert len(collect(loader, face)) == 2


@on_both_faces
@pytest.mark.usefixtures("two_ranks")
def test_a_warning_that_is_an_error_is_raised_once_and_loses_no_epoch(face: Face) -> None:
    """With `-W error`, which is this suite's way."""
    loader = Pipeline(range(3))
    with pytest.raises(UnsplitWarning):
        collect(loader, face)
    assert loader.state_dict()["epoch"] == 0
    assert collect(loader, face) == [0, 1, 2]


@on_both_faces
@pytest.mark.usefixtures("two_ranks")
def test_what_is_split_or_cannot_be_known_is_not_warned_of(face: Face) -> None:
    """Warnings are errors here; with real ranks see `test_torchrun`."""
    channel = Channel(4)
    channel.close()
    for loader in (
        Pipeline(range(8)).shard(),
        Pipeline(range(8)).shard(0, 1),
        Pipeline(range(1, 8, 2)),
        Pipeline(channel),
        Pipeline(lambda: iter(range(8))),
        DataLoader(list(range(8)), sampler=DistributedSampler(range(8), 2, 1)),  # type: ignore[arg-type]
        DataLoader(list(range(8)), sampler=[1, 3, 5, 7]),
        DataLoader(list(range(8)), batch_sampler=[[1, 3], [5, 7]]),
    ):
        collect(loader, face)


def test_one_rank_is_not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is an environment that says nothing of use, where nobody asked for ranks."""
    for environment in ({"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            assert list(Pipeline(range(3))) == [0, 1, 2]
