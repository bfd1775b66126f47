"""Every state leads to exactly what was to come: through each stage, from each source (promise 8)."""

import asyncio
import contextlib
import io
import json
import tarfile
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    IterableDataset,
    RandomSampler,
)

from aioloader import DataLoader, Pipeline, ReplayWarning, SourceUsedUpError, StateError
from aioloader.sources import Lines, TarShards
from aioloader.testing import Gate, assert_resumes_exactly
from tests._states import contents_of, edited
from tests._support import Face, Steps, collect, on_both_faces

CONCURRENCIES = [{"concurrency": 1}, {"concurrency": 3}, {"concurrency": 16}]

Make = Callable[[int], Pipeline]


async def later(sample: Any) -> Any:
    """The sample, some turns of the loop later, each after another number of turns."""
    for _ in range(hash(str(sample)) % 4):
        await asyncio.sleep(0)
    return sample


def odd_fail(sample: int) -> int:
    if sample % 5 == 3:
        raise ValueError(f"sample {sample} is broken")
    return sample


async def pairs_of(sample: int) -> AsyncIterator[tuple[int, int]]:
    for number in range(sample % 4):
        yield sample, number


def breaks_in_the_middle(sample: int) -> Iterator[int]:
    yield sample
    if sample % 3 == 1:
        raise ValueError(f"no more items of {sample}")
    yield -sample


def numbers() -> Iterator[int]:
    yield from range(17)


async def async_numbers() -> AsyncIterator[int]:
    for number in range(17):
        await asyncio.sleep(0)
        yield number


class Stream(IterableDataset[int]):
    """Re-iterable, without a state."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(17))


class Stateful:
    """A stream that tells its state, as torchdata's do: loaded before `iter`, it begins there, once."""

    def __init__(self, length: int = 600) -> None:
        self.length = length
        self.position = 0
        self.start: int | None = None
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        self.position = 0 if self.start is None else self.start
        while self.position < self.length:
            self.position += 1
            self.read += 1
            yield self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]  # for all epochs to come, as Hugging Face's do


class StatefulIterators:
    """A stream whose iterators tell their state."""

    def __init__(self, length: int = 600) -> None:
        self.length = length

    def __iter__(self) -> "StatefulIterator":
        return StatefulIterator(self.length)


class StatefulIterator:
    def __init__(self, length: int) -> None:
        self.length = length
        self.position = 0

    def __iter__(self) -> "StatefulIterator":
        return self

    def __next__(self) -> int:
        if self.position == self.length:
            raise StopIteration
        self.position += 1
        return self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class AsyncStateful:
    """The same, async."""

    def __init__(self, length: int = 600) -> None:
        self.length = length

    def __aiter__(self) -> "AsyncStatefulIterator":
        return AsyncStatefulIterator(self.length)


class AsyncStatefulIterator(StatefulIterator):
    def __aiter__(self) -> "AsyncStatefulIterator":
        return self

    async def __anext__(self) -> int:
        try:
            return next(self)
        except StopIteration:
            raise StopAsyncIteration from None


def failing_stream() -> Iterator[int]:
    yield from range(7)
    raise OSError("the connection is lost")


PIPELINES: dict[str, Make] = {
    "indexable": lambda n: Pipeline(range(10)).map(later, concurrency=n).batch(3),
    "nothing but a source": lambda _: Pipeline(range(5)),
    "empty": lambda _: Pipeline(range(0)).batch(2),
    "shuffle": lambda n: Pipeline(range(10)).shuffle(seed=3).map(later, concurrency=n).batch(3),
    "order stages": lambda _: Pipeline(range(30)).skip(2).shuffle(seed=1).shard(1, 3).take(7).batch(2),
    "drop_last": lambda n: Pipeline(range(11)).map(later, concurrency=n).batch(3, drop_last=True),
    "a stream": lambda n: Pipeline(numbers).map(later, concurrency=n).batch(4),
    "an async stream": lambda n: Pipeline(async_numbers).map(later, concurrency=n).batch(4),
    "an iterable dataset": lambda n: Pipeline(Stream()).map(later, concurrency=n).batch(4),
    "filter": lambda n: Pipeline(range(20)).map(later, concurrency=n).filter(lambda x: x % 3 != 1).batch(4),
    "filter of nearly all": lambda _: Pipeline(range(20)).filter(lambda x: x == 2).batch(4),
    "flat_map": lambda n: Pipeline(range(8)).map(later, concurrency=n).flat_map(pairs_of).map(later),
    "flat_map and batch": lambda _: Pipeline(range(9)).flat_map(pairs_of).batch(2, collate_fn=list),
    "flat_map that fails": lambda _: Pipeline(range(6)).flat_map(breaks_in_the_middle),
    "shuffle buffer": lambda n: Pipeline(numbers).map(later, concurrency=n).shuffle(5, seed=2).batch(3),
    "shuffle buffer of all": lambda n: Pipeline(numbers).shuffle(100, seed=2).map(later, concurrency=n).batch(3),
    "shuffle buffers": lambda _: Pipeline(range(12)).shuffle(3, seed=1).shuffle(4, seed=2).batch(2),
    "shuffle and flat_map": lambda _: Pipeline(range(9)).shuffle(3).flat_map(pairs_of).shuffle(4).batch(2),
    "take of a stream": lambda n: Pipeline(numbers).take(7).map(later, concurrency=n).batch(2),
    "skip of a stream": lambda n: Pipeline(numbers).skip(7).map(later, concurrency=n).batch(2),
    "skip of all": lambda _: Pipeline(numbers).skip(70).batch(2),
    "enumerate": lambda _: Pipeline(numbers).filter(lambda x: x % 2 == 0).enumerate().batch(2),
    "unbatch": lambda n: Pipeline(range(11)).batch(4).unbatch().map(later, concurrency=n).batch(3),
    "unbatch single": lambda _: Pipeline(range(7)).batch(3).unbatch(),
    "shard of a stream": lambda n: Pipeline(numbers).shard(2, 3).map(later, concurrency=n).batch(2),
    "repeat": lambda n: Pipeline(range(5)).shuffle(seed=4).map(later, concurrency=n).repeat(3).batch(2),
    "repeat of a stream": lambda n: Pipeline(numbers).shuffle(3).repeat(2).map(later, concurrency=n).batch(5),
    "repeat twice": lambda _: (
        Pipeline(range(3)).shuffle(seed=1).repeat(2).enumerate().repeat(2).batch(2, collate_fn=list)
    ),
    "repeat, then take": lambda _: Pipeline(range(5)).repeat().take(12).batch(2),
    "zip": lambda n: Pipeline.zip(Pipeline(range(9)).shuffle(), numbers, range(20)).map(later, concurrency=n).batch(2),
    "mix": lambda _: Pipeline.mix([range(5), numbers, range(100, 109)], [1, 2, 1], seed=5).batch(4),
    "mix of mixes": lambda _: Pipeline.mix(
        [Pipeline.mix([range(4), range(10, 13)], [1, 1]), Pipeline(range(20, 26)).flat_map(pairs_of)], [1, 2]
    ).batch(2, collate_fn=list),
    "merge of one": lambda n: Pipeline.merge(numbers).map(later, concurrency=n).batch(3),
    "errors": lambda n: Pipeline(range(20)).map(later, concurrency=n).map(odd_fail).batch(3),
    "errors without batch": lambda n: Pipeline(range(9)).map(odd_fail, concurrency=n),
    "errors and a buffer": lambda _: Pipeline(range(12)).map(odd_fail).shuffle(4).take(9).enumerate(),
    "errors at the end": lambda n: Pipeline(range(14)).map(odd_fail, concurrency=n).batch(4, drop_last=True),
    "a source that fails": lambda n: Pipeline(failing_stream).map(later, concurrency=n).batch(3),
    "a source that fails, drop_last": lambda _: Pipeline(failing_stream).batch(3, drop_last=True),
    "a source that fails, folds": lambda _: Pipeline(failing_stream).shuffle(3).skip(1).enumerate().take(20),
    "a source that fails, flat_map": lambda _: Pipeline(failing_stream).flat_map(pairs_of),
    "a source that fails in zip": lambda _: Pipeline.zip(range(20), failing_stream, numbers),
    "a source that fails in mix": lambda _: Pipeline.mix([range(20), failing_stream], [1, 1]),
    "a source that fails in repeat": lambda _: Pipeline(failing_stream).batch(2).unbatch().repeat(3),
    "a sampler": lambda n: Pipeline(list(range(9)), sampler=[3, 1, 8, 0, 2]).map(later, concurrency=n).batch(2),
    "a random sampler": lambda _: Pipeline(list(range(9)), sampler=RandomSampler(range(9))).batch(2),
    "a random sampler, repeated": lambda _: (
        Pipeline(list(range(5)), sampler=RandomSampler(range(5))).repeat(3).batch(2)
    ),
    "a sampler with a generator, repeated": lambda _: (
        Pipeline(list(range(5)), sampler=RandomSampler(range(5), generator=torch.Generator().manual_seed(1)))
        .repeat(3)
        .batch(2)
    ),
    "prefetch": lambda n: Pipeline(range(12)).batch(2).prefetch(n - 1),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_resumes_from_every_state(name: str) -> None:
    """With other concurrency and by both faces; the next epoch too."""
    make = PIPELINES[name]
    assert_resumes_exactly(lambda concurrency: make(concurrency), variants=CONCURRENCIES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of lines and three archives, plain and compressed."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(3):
        (folder / f"{number}.txt").write_text("".join(f"{number} {line}\n" for line in range(4 + number)))
        with tarfile.open(folder / f"{number}.tar.gz" if number == 1 else folder / f"{number}.tar", "w") as archive:
            for sample in range(3):
                member = tarfile.TarInfo(f"{number}{sample}.txt")
                member.size = 1
                archive.addfile(member, io.BytesIO(b"%d" % sample))
    return folder


@pytest.mark.parametrize("interleave", [1, 2])
def test_lines_resume(files: Path, interleave: int) -> None:
    """At a byte offset, whatever stands behind them."""

    def make(concurrency: int) -> Pipeline:
        lines = Lines(str(files / "*.txt"), interleave=interleave)
        return Pipeline(lines).map(later, concurrency=concurrency).shuffle(4).batch(3)

    states = assert_resumes_exactly(make, variants=CONCURRENCIES)
    assert {state["guarantee"] for state in states} == {"exact"}


def test_archives_resume(files: Path) -> None:
    """At the offset of a sample."""

    def make(concurrency: int) -> Pipeline:
        archives = TarShards([files / "0.tar", files / "2.tar"])
        return Pipeline(archives).map(later, concurrency=concurrency).batch(2, collate_fn=list)

    states = assert_resumes_exactly(make, variants=CONCURRENCIES)
    assert {state["guarantee"] for state in states} == {"exact"}


def test_a_function_that_gives_a_source_of_ours_resumes(files: Path) -> None:
    """It is called anew for the resumed epoch, and what it gives is opened at the place."""
    assert_resumes_exactly(
        lambda concurrency: Pipeline(lambda: Lines(files / "2.txt")).map(later, concurrency=concurrency),
        variants=CONCURRENCIES,
    )


def test_a_dataset_of_hugging_face_is_asked() -> None:
    """It keeps what was loaded for all its epochs; the one after the resumed one is whole all the same."""
    datasets = pytest.importorskip("datasets")

    def make(concurrency: int) -> Pipeline:
        source = datasets.Dataset.from_dict({"number": list(range(600))}).to_iterable_dataset(num_shards=3)
        return Pipeline(source).map(lambda row: row["number"], concurrency=concurrency).batch(100)

    states = assert_resumes_exactly(make, variants=CONCURRENCIES[:2], limit=6, states=False)
    assert contents_of(states[4])["cursor"][0]["at"] == 256
    assert {state["guarantee"] for state in states} == {"exact"}


@pytest.mark.parametrize("make_stream", [Stateful, StatefulIterators, AsyncStateful])
def test_a_stream_that_tells_its_state_is_asked(make_stream: Any) -> None:
    """Once in many samples; only those since then are read again."""
    states = assert_resumes_exactly(
        lambda concurrency: Pipeline(make_stream()).map(later, concurrency=concurrency).batch(50),
        variants=CONCURRENCIES,
    )
    assert contents_of(states[8])["cursor"][0]["at"] == 256
    assert contents_of(states[8])["cursor"][1] == 400 - 256


class StaysWhereItWasLoaded(Stateful, IterableDataset[int]):
    """Its state is there only once it is iterated, as an attribute that `__iter__` sets is."""

    begun = False

    def __iter__(self) -> Iterator[int]:
        self.begun = True
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        if not self.begun:
            raise RuntimeError("not iterated yet")
        return super().state_dict()


class TellsLater(StaysWhereItWasLoaded):
    """The same, and what is loaded is for one epoch, as torchdata's have it."""

    def __iter__(self) -> Iterator[int]:
        yield from super().__iter__()
        self.start = None


class TellsNothing(Stateful, IterableDataset[int]):
    """It has the methods because a base class wants them."""

    def state_dict(self) -> dict[str, int]:
        raise NotImplementedError


class TellsNoJson(Stateful, IterableDataset[int]):
    def state_dict(self) -> Any:
        return {"position": self.position, "what": object()}


class AsyncTellsNothing:
    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(600):
            await asyncio.sleep(0)
            yield number

    def state_dict(self) -> Any:
        raise NotImplementedError

    def load_state_dict(self, state: Any) -> None:
        raise NotImplementedError


LOADER_OF: dict[str, Callable[[Any], Any]] = {
    "a pipeline": lambda stream: Pipeline(stream).batch(50),
    "no workers": lambda stream: DataLoader(stream, 50),
    "threads": lambda stream: DataLoader(stream, 50, num_workers=2),
}


@on_both_faces
@pytest.mark.parametrize("loader", LOADER_OF)
@pytest.mark.parametrize("stream", [TellsLater, TellsNothing, TellsNoJson, AsyncTellsNothing])
def test_a_stream_that_does_not_tell_its_state_is_read_all_the_same(
    stream: Callable[[], Any], loader: str, face: Face
) -> None:
    """Nobody has asked for a state. Whoever does is not told that it is exact."""
    ours = LOADER_OF[loader](stream())
    assert len(collect(ours, face)) == len(collect(ours, face)) == 12
    assert ours.state_dict()["guarantee"] == ("exact" if stream is TellsLater else "replayed")


@pytest.mark.parametrize("loader", LOADER_OF)
@pytest.mark.parametrize("stream", [TellsLater, TellsNothing, TellsNoJson, AsyncTellsNothing])
def test_a_stream_that_does_not_tell_its_state_is_resumed(stream: Callable[[], Any], loader: str) -> None:
    """From its own state where it told one once it was iterated, else from the beginning."""
    assert_resumes_exactly(lambda: LOADER_OF[loader](stream()), limit=8)


@on_both_faces
def test_a_stream_that_cannot_be_sent_back_says_so(face: Face) -> None:
    """It would begin each epoch where it was resumed, and the samples before that would never come again."""
    loader = Pipeline(StaysWhereItWasLoaded()).batch(50)
    with Steps(loader, face) as steps:
        for _ in range(7):
            steps.next()
        state = loader.state_dict()
    resumed = Pipeline(StaysWhereItWasLoaded()).batch(50)
    resumed.load_state_dict(state)
    assert len(collect(resumed, face)) == 5
    with pytest.raises(ValueError, match="StaysWhereItWasLoaded goes on in each epoch from the state"):
        collect(resumed, face)


def test_a_stream_that_tells_its_state_is_not_read_from_the_beginning() -> None:
    """And its epochs after the resumed one are whole, although it keeps what was loaded."""
    loader = Pipeline(Stateful()).batch(100)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    loader.close()
    stream = Stateful()
    resumed = Pipeline(stream).batch(100)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == [list(range(501, 601))]
    assert stream.read == 600 - 256
    assert len(list(resumed)) == 6


@on_both_faces
def test_a_stream_without_a_state_is_read_again_with_a_warning(face: Face) -> None:
    """It says how many samples, once, and the state says "replayed"."""
    loader = Pipeline(numbers).batch(5)
    with Steps(loader, face) as steps:
        steps.next()
        steps.next()
        state = loader.state_dict()
    assert state["guarantee"] == "replayed"
    loader.close()
    loader.load_state_dict(state)
    with Steps(loader, face) as steps:
        with pytest.warns(ReplayWarning, match="the 10 samples before it"):
            assert steps.next().tolist() == [10, 11, 12, 13, 14]
        assert steps.next().tolist() == [15, 16]


# -- in any order ----------------------------------------------------------------------------------------------------


def of_batch(batch: torch.Tensor) -> list[int]:
    found: list[int] = batch.tolist()
    return found


ANY_ORDER: dict[str, Make] = {
    "merge": lambda n: Pipeline.merge(range(9), numbers, Pipeline(range(100, 107)).map(later, concurrency=n)).batch(3),
    "ordered=False": lambda n: Pipeline(range(40)).map(later, concurrency=n, ordered=False).batch(4),
    "ordered=False and filter": lambda n: (
        Pipeline(range(40)).map(later, concurrency=n, ordered=False).filter(lambda x: x % 3 != 0).batch(4)
    ),
    "ordered=False, repeated": lambda n: Pipeline(range(7)).map(later, concurrency=n, ordered=False).repeat(3).batch(4),
}


@pytest.mark.parametrize("name", ANY_ORDER)
def test_what_comes_in_any_order_comes_once(name: str) -> None:
    """Nothing is lost and nothing repeated, although the order may be another one."""
    make = ANY_ORDER[name]
    states = assert_resumes_exactly(lambda concurrency: make(concurrency), variants=CONCURRENCIES[1:], samples=of_batch)
    assert {state["guarantee"] for state in states} <= {"exact", "replayed"}


def never(sample: int) -> bool:
    return False


LOOSE: dict[str, Make] = {
    "flat_map": lambda n: Pipeline(range(20)).map(later, concurrency=n, ordered=False).flat_map(pairs_of).batch(4),
    "unbatch": lambda _: (
        Pipeline.merge(Pipeline(range(9)).batch(2), Pipeline(range(9, 20)).batch(2)).unbatch().batch(3)
    ),
    "a buffer": lambda n: Pipeline(range(20)).map(later, concurrency=n, ordered=False).shuffle(4).batch(3),
    "ordered=False twice": lambda n: (
        Pipeline(range(30))
        .map(later, concurrency=n, ordered=False)
        .batch(4)
        .map(later, concurrency=n, ordered=False)
        .prefetch(n)
    ),
    "ordered=False after drop_if": lambda n: (
        Pipeline.merge(range(9), numbers).drop_if(never).map(later, concurrency=n, ordered=False).batch(2)
    ),
    "ordered=False of a merge": lambda n: (
        Pipeline.merge(range(9), numbers).map(later, concurrency=n, ordered=False).batch(2)
    ),
}


@pytest.mark.parametrize("name", LOOSE)
def test_what_goes_by_number_behind_any_order_comes_at_least_once(name: str) -> None:
    """A fold that counts cannot find its place in another order: it says so, and loses nothing."""
    make = LOOSE[name]

    def samples(batches: Any) -> set[str]:
        return {
            str(row)
            for batch in batches
            for row in torch.as_tensor(torch.stack(batch, 1) if isinstance(batch, list) else batch)
        }

    whole = samples(make(5))
    for count in range(8):
        loader = make(3)
        iterator = iter(loader)
        seen = [batch for _, batch in zip(range(count), iterator, strict=False)]
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        assert state["guarantee"] == "at-least-once"
        resumed = make(7)
        resumed.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReplayWarning)
            rest = list(resumed)
        assert samples([*seen, *rest]) == whole


def test_one_that_takes_long_is_waited_for_by_nobody_and_lost_by_nobody() -> None:
    """The state tells of thousands beyond it, in a text that JSON takes."""
    gate = Gate()

    async def first_waits(sample: int) -> int:
        if sample == 0:
            await gate.passing()
        return sample

    def make() -> Pipeline:
        return Pipeline(range(6000)).map(first_waits, concurrency=4, ordered=False).batch(1000)

    loader = make()
    iterator = iter(loader)
    seen = [sample for _ in range(5) for sample in next(iterator).tolist()]
    assert 0 not in seen
    state = json.loads(json.dumps(loader.state_dict()))
    gate.open_all()
    loader.close()
    resumed = make()
    resumed.load_state_dict(state)
    assert sorted([*seen, *(sample for batch in resumed for sample in batch.tolist())]) == list(range(6000))


# -- a recorded order ------------------------------------------------------------------------------------------------


def unordered(n: int, **log: Any) -> Pipeline:
    return Pipeline(range(60)).map(later, concurrency=n, ordered=False, **log).filter(lambda x: x % 7 != 0).batch(4)


@on_both_faces
def test_a_recorded_order_is_replayed(tmp_path: Path, face: Face) -> None:
    """Epoch by epoch, with less and with more concurrency, and then it resumes exactly."""
    recording = unordered(9, record_order=tmp_path)
    recorded = [[batch.tolist() for batch in collect(recording, face)] for _ in range(2)]
    order = [sample for batch in recorded[0] for sample in batch]
    assert order != sorted(order)
    assert len((tmp_path / "epoch-0.order").read_bytes()) == 4 * 60
    for concurrency in (1, 3, 30):
        replaying = unordered(concurrency, replay_order=tmp_path)
        assert [[batch.tolist() for batch in collect(replaying, face)] for _ in range(2)] == recorded


def test_a_replayed_order_resumes_exactly(tmp_path: Path) -> None:
    """Also behind folds that go by number."""
    list(Pipeline(range(20)).map(later, concurrency=9, ordered=False, record_order=tmp_path))
    assert_resumes_exactly(
        lambda concurrency: (
            Pipeline(range(20))
            .map(later, concurrency=concurrency, ordered=False, replay_order=tmp_path)
            .flat_map(pairs_of)
            .shuffle(4)
            .batch(3)
        ),
        variants=CONCURRENCIES,
        epochs=1,
    )


def test_recording_goes_on_in_a_resumed_epoch(tmp_path: Path) -> None:
    """What was recorded beyond the state is forgotten: the file is the order that the consumers saw."""
    loader = unordered(9, record_order=tmp_path)
    iterator = iter(loader)
    seen = [next(iterator).tolist() for _ in range(4)]
    state = loader.state_dict()
    next(iterator)
    loader.close()
    resumed = unordered(5, record_order=tmp_path)
    resumed.load_state_dict(state)
    seen += [batch.tolist() for batch in resumed]
    assert [batch.tolist() for batch in unordered(2, replay_order=tmp_path)] == seen


@on_both_faces
def test_an_order_of_something_else_is_an_error(tmp_path: Path, face: Face) -> None:
    """A log that ends too early, tells of more than there is, or is not there."""
    list(Pipeline(range(20)).map(later, ordered=False, record_order=tmp_path))
    for length, message in ((30, "holds the order of 20 samples, and there are more"), (10, "comes next, but")):
        loader = Pipeline(range(length)).map(later, concurrency=4, ordered=False, replay_order=tmp_path)
        outcomes = outcomes_of(loader, face)
        assert isinstance(outcomes[-1], StateError)
        assert message in str(outcomes[-1])
    missing = Pipeline(range(3)).map(later, ordered=False, replay_order=tmp_path / "nowhere")
    (error,) = outcomes_of(missing, face)
    assert "is not there" in str(error)


def outcomes_of(loader: Any, face: Face) -> list[Any]:
    with Steps(loader, face) as steps:
        return steps.outcomes()


FAR = {
    "mix": lambda: Pipeline.mix([range(20_000), range(20_000), range(3)], [1, 2, 1], seed=3).batch(500),
    "buffer": lambda: Pipeline(range(20_000)).shuffle(7, seed=3).batch(500),
    "large buffer": lambda: Pipeline(range(20_000)).shuffle(6_000, seed=3).batch(500),
}


@pytest.mark.parametrize("name", FAR)
def test_far_into_an_epoch(name: str) -> None:
    """Draws come from one generator after the other, and are found again in the middle of any of them."""
    assert_resumes_exactly(FAR[name], limit=10, epochs=1)


@on_both_faces
@pytest.mark.parametrize(
    ("make", "cursor"),
    [
        (lambda: Pipeline.mix([range(9), range(9)], [1, 1]), [[3, 3], 1 << 62, []]),
        (lambda: Pipeline.mix([range(9), range(9)], [1, 1]), [[3, 3], (1 << 63) - 1, []]),
        (lambda: Pipeline(range(50)).shuffle(4, seed=1), [3, (1 << 62) - 4, 1 << 62]),
        (lambda: Pipeline(range(50)).shuffle(4, seed=1), [3, 1 << 62, 1 << 62]),
        (lambda: Pipeline(range(9)).repeat(), [1 << 62, 3]),
        (lambda: Pipeline(numbers).enumerate(), [3, 1 << 62]),
        (lambda: Pipeline(numbers), 1 << 62),
        (lambda: Pipeline(async_numbers), 1 << 62),
        (lambda: Pipeline(range(9)).flat_map(pairs_of), [3, 1 << 62]),
        (lambda: Pipeline(range(9)).batch(2).unbatch(), [2, 1 << 62]),
        (lambda: Pipeline(range(9), sampler=RandomSampler(range(9))).repeat(2).shard(0, 2), [[0, 3], 1 << 62]),
        (lambda: Pipeline(range(9)).map(later, ordered=False), [3, 1 << 62, "0x" + "f" * 9000]),
    ],
)
@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
def test_an_absurd_count_costs_nothing(make: Callable[[], Pipeline], cursor: Any, face: Face) -> None:
    """It leads somewhere, or is refused; nobody counts up to it."""
    loader = make()
    with Steps(loader, face) as steps:
        steps.next()
        state = edited(loader.state_dict(), cursor=cursor)
    resumed = make()
    with contextlib.suppress(StateError):
        resumed.load_state_dict(state)
    with Steps(resumed, face) as steps:
        steps.rest(5)
    resumed.close()


def test_samples_that_are_dropped_again_let_the_loop_turn() -> None:
    """An async source that never waits is read again up to where it was: others on the loop go on meanwhile."""

    async def numbers() -> AsyncIterator[int]:
        for number in range(100_000):
            yield number

    async def turning(turns: list[int]) -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def main() -> int:
        turns: list[int] = []
        other = asyncio.create_task(turning(turns))
        loader = Pipeline(numbers)
        loader.load_state_dict(edited(state, cursor=50_000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReplayWarning)
            async with loader:
                assert await anext(aiter(loader)) == 50_000
        other.cancel()
        return len(turns)

    first = Pipeline(numbers)
    next(iter(first))
    state = first.state_dict()
    first.close()
    assert asyncio.run(main()) >= 50_000 // 256


@on_both_faces
@pytest.mark.parametrize("repeats", [False, True])
def test_a_warning_that_is_an_error_takes_no_state_away(face: Face, repeats: bool) -> None:
    """`python -W error`: the epoch has not begun, and the next attempt goes on where the state says."""

    def make() -> Pipeline:
        loader = Pipeline(lambda: iter(range(6)))
        return loader.repeat(2) if repeats else loader

    first = make()
    with Steps(first, face) as steps:
        assert [steps.next(), steps.next()] == [0, 1]
        state = json.loads(json.dumps(first.state_dict()))
    loader = make()
    loader.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Steps(loader, face) as steps, pytest.raises(ReplayWarning):
            steps.next()
    assert loader.state_dict()["batches"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReplayWarning)
        assert collect(loader, face) == [2, 3, 4, 5, *(range(6) if repeats else ())]


@on_both_faces
def test_an_iterator_that_comes_too_late_for_a_generator_begins_no_epoch(face: Face) -> None:
    """Both were made before either had begun; the state stays that of the one that has."""
    loader = Pipeline(iter([0, 1, 2]))
    with Steps(loader, face) as steps, Steps(loader, face) as late:
        assert steps.next() == 0
        with pytest.raises(SourceUsedUpError):
            late.next()
        assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (0, 1)
        assert steps.next() == 1
