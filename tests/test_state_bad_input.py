"""States that cannot be loaded are refused with the difference, and the loader is as it was."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from obstore.store import MemoryStore
from torch.utils.data import DistributedSampler, RandomSampler

from aioloader import AioloaderError, DataLoader, Pipeline, StateError
from aioloader.sources import Lines, Objects, ParquetRows, TarShards
from tests._states import contents_of, edited
from tests.test_resume import Stream, numbers, pairs_of


def pipeline(length: int = 10) -> Pipeline:
    return Pipeline(range(length)).shuffle(seed=3).map(str).filter(bool).batch(3)


def state_of(loader: Any, batches: int = 1) -> dict[str, Any]:
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    state: dict[str, Any] = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    return state


def refused(loader: Any, state: Any, message: str) -> None:
    """`state` is refused, and nothing has changed."""
    before = loader.state_dict()
    with pytest.raises(StateError, match=message) as caught:
        loader.load_state_dict(state)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AioloaderError)
    assert loader.state_dict() == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "a state is a dict from state_dict.., got NoneType"),
        ([], "got list"),
        ("{}", "got str: '{}'"),
        ({}, "has 'format': 'aioloader', got None"),
        ({"epoch": 3, "_num_yielded": 7}, r"in a dict of \['_num_yielded', 'epoch'\]"),
        ({"format": "aioloader", "version": 1, "cursor": 6}, "version 1, and this release reads version 2"),
        ({"format": "aioloader", "version": True}, "version True"),
        ({"format": "aioloader", "version": 2}, "no 'loader': it is cut off"),
    ],
)
def test_what_is_no_state_of_ours(state: Any, message: str) -> None:
    """Another object, another library's, another version's, half of one."""
    refused(pipeline(), state, message)


@pytest.mark.parametrize(
    "key", ["loader", "epoch", "batches", "cursor", "guarantee", "pipeline", "random", "ranks", "left_out"]
)
def test_a_state_that_lacks_something(key: str) -> None:
    """Each key is missed by its name."""
    refused(pipeline(), edited(state_of(pipeline()), **{key: ...}), f"no '{key}'")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epoch", "3", "'epoch' of the state must be int, got '3'"),
        ("epoch", True, "must be int, got True"),
        ("epoch", -1, "from 0 to .*, got -1"),
        ("epoch", 1 << 63, "from 0 to"),
        pytest.param("batches", 10**5000, "from 0 to", id="5,000 digits"),
        ("batches", 1.5, "must be int, got 1.5"),
        ("guarantee", "surely", "must be one of"),
        ("pipeline", "shuffle", "must be list, got"),
        ("pipeline", [1], "is broken"),
        ("pipeline", [], "stage 0 is a source"),
        ("random", [], "must be dict, got"),
        (
            "cursor",
            "3",
            "'cursor' of the state does not fit this loader, or is broken: an integer .* was expected, got '3'",
        ),
        ("cursor", 99, "position 99 is beyond the end of an order of 10 keys"),
        ("cursor", [3, 1], "was expected"),
        ("cursor", {"a": 1}, "was expected"),
        ("cursor", True, "was expected"),
        ("loader", "DataLoader", "of a DataLoader, and this is a Pipeline"),
    ],
)
def test_a_state_with_something_else_in_it(key: str, value: Any, message: str) -> None:
    """Named, with what was found."""
    refused(pipeline(), edited(state_of(pipeline()), **{key: value}), message)


@pytest.mark.parametrize(
    ("make", "cursor", "message"),
    [
        (lambda: Pipeline.interleave(range(4), range(4)).batch(2), [[4, 1], 1, [0, 0]], "sources end once"),
        (lambda: Pipeline.mix([range(4), range(4)], [1, 1]).batch(2), [[4, 1], 5, [0, 0]], "sources end once"),
        (lambda: Pipeline(numbers).shuffle(4).batch(2), [2, 2, 10**12], "a buffer of 4 holds no more"),
        (
            lambda: Pipeline(range(4), sampler=RandomSampler(range(4))).repeat(2).batch(2),
            [0, [{"at": 0, "generators": ["x"]}, 1]],
            "states of 0 generators",
        ),
        (
            lambda: Pipeline(range(4), sampler=RandomSampler(range(4))).repeat(2).batch(2),
            [0, [{"at": 0, "drawn": {"global": None}}, 1]],
            "an origin was expected",
        ),
    ],
)
def test_a_cursor_that_leads_nowhere(make: Callable[[], Pipeline], cursor: Any, message: str) -> None:
    """It would never come to an end, or fail inside."""
    refused(make(), edited(state_of(make()), cursor=cursor), message)


@pytest.mark.parametrize("arguments", [{}, None, {"RandomSampler.replacement": False}])
def test_arguments_of_a_sampler_that_are_not_all_there(arguments: Any) -> None:
    """One that was left to its default is missed by its name, too."""

    def make() -> Pipeline:
        return Pipeline(range(4), sampler=RandomSampler(range(4)))

    state = state_of(make())
    shape = contents_of(state)["pipeline"]
    shape[0]["arguments"] = arguments
    refused(make(), edited(state, pipeline=shape), "the sampler of stage 0")


@pytest.mark.parametrize("epochs", ["3", [1, 2], ["x"]])
def test_epochs_of_samplers_that_are_none(epochs: Any) -> None:
    """There is one sampler that tells its epoch."""
    dataset: Any = range(8)

    def make() -> DataLoader[Any]:
        return DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 2, 0))

    state = state_of(make())
    random = contents_of(state)["random"] | {"epochs": epochs}
    refused(make(), edited(state, random=random), "epoch")


MANY: dict[str, Callable[[], Pipeline]] = {
    "take": lambda: Pipeline(numbers).take(9).batch(2),
    "skip": lambda: Pipeline(numbers).skip(2).batch(2),
    "buffer": lambda: Pipeline(numbers).shuffle(4).batch(2),
    "flat_map": lambda: Pipeline(numbers).flat_map(pairs_of).batch(2),
    "unbatch": lambda: Pipeline(range(9)).batch(2).unbatch().batch(3),
    "repeat": lambda: Pipeline(range(9)).repeat(2).batch(2),
    "zip": lambda: Pipeline.zip(range(9), Stream()).batch(2),
    "mix": lambda: Pipeline.mix([range(9), numbers], [1, 1]).batch(2),
    "merge": lambda: Pipeline.merge(range(9), Stream()).batch(2),
    "ordered=False": lambda: Pipeline(range(9)).map(str, ordered=False).batch(2),
    "shard": lambda: Pipeline(numbers).shard(0, 2).batch(2),
    "sampler": lambda: Pipeline(range(9), sampler=RandomSampler(range(9))).batch(2),
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize(
    "cursor", ["x", -1, 1.5, [], [1], [[], []], [None, "y"], [1, 2, 3, 4], {}, [None, -3], [True, 1]]
)
def test_garbage_in_the_cursor_of_any_stage(name: str, cursor: Any) -> None:
    """Refused when it is loaded, not when the epoch begins."""
    if name == "shard" and cursor == [True, 1]:
        return  # it reads from the beginning, whatever the first part says
    state = state_of(MANY[name]())
    refused(MANY[name](), edited(state, cursor=cursor), "does not fit this loader, or is broken")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Pipeline(range(9)).shuffle(seed=3).filter(bool).batch(3), "shrunk from 10 samples to 9"),
        (lambda: Pipeline(range(11)).shuffle(seed=3).filter(bool).batch(3), "grown from 10 samples to 11"),
        (
            lambda: Pipeline(range(10)).shuffle(seed=4).filter(bool).batch(3),
            "is shuffle.seed=4., and was shuffle.seed=3.",
        ),
        (
            lambda: Pipeline(range(10)).shuffle(seed=3).filter(bool).batch(4),
            "stage 3 is batch.batch_size=4, drop_last=False",
        ),
        (
            lambda: Pipeline(range(10)).shuffle(seed=3).filter(bool).batch(3, drop_last=True),
            "drop_last=True., and was batch",
        ),
        (lambda: Pipeline(range(10)).shuffle(seed=3).batch(3), "stage 2 is batch.*, and was filter.bool"),
        (lambda: Pipeline(range(10)).filter(bool).batch(3), "stage 1 is filter.bool., and was shuffle"),
        (lambda: pipeline().take(2), "stage 4 is take.n=2., and there was none"),
        (lambda: Pipeline(range(10)).shuffle(seed=3).filter(bool), "stage 3 was batch.*, and there is none now"),
        (lambda: Pipeline(numbers).shuffle(2).filter(bool).batch(3), "a source of kind 'stream'"),
        (lambda: Pipeline.zip(range(10)), "stage 0 is zip of 1 sources, and was a source"),
        (
            lambda: Pipeline(range(10)).shuffle(seed=3).map(str, ordered=False).filter(bool).batch(3),
            "stage 2 is map.str, ordered=False., and was filter",
        ),
    ],
)
def test_another_pipeline(other: Callable[[], Pipeline], message: str) -> None:
    """The first difference is named."""
    refused(other(), state_of(pipeline()), message)


def test_another_pipeline_inside_a_combination() -> None:
    """With the number of the source."""
    state = state_of(Pipeline.mix([range(3), Pipeline(range(4)).take(3)], [1, 2]))
    refused(
        Pipeline.mix([range(3), Pipeline(range(4)).take(2)], [1, 2]), state, "source 1 of stage 0, stage 1 is take.n=2."
    )
    refused(
        Pipeline.mix([range(3), Pipeline(range(4)).take(3)], [1, 3]), state, "stage 0, mix of 2 sources, has weights="
    )
    refused(Pipeline.mix([range(3)], [1]), state, "stage 0 has 1 sources, and had 2")


def test_what_does_not_matter() -> None:
    """Names of functions, maps that keep the order, concurrency, prefetch, collate."""

    def keep(text: str) -> bool:
        return bool(text)

    state = state_of(pipeline())
    other: Pipeline = Pipeline(list(range(10))).shuffle(seed=3).map(str, concurrency=1).map(str.strip).filter(keep)
    other = other.batch(3, collate_fn=list).prefetch(7)
    other.load_state_dict(state)
    assert len(list(other)) == 3


def test_another_data_loader() -> None:
    """Batch size, order, sampler, seed, dataset."""
    data = list(range(10))
    state = state_of(DataLoader(data, 3, shuffle=True))
    refused(DataLoader(data, 4, shuffle=True), state, "stage 2 is batch.batch_size=4")
    refused(DataLoader(data, 3), state, "stage 1 is sampler.SequentialSampler., and was sampler.RandomSampler.")
    refused(DataLoader(data, 3, shuffle=True, seed=1), state, "stage 1 is shuffle.seed=1.")
    refused(DataLoader(data[:-1], 3, shuffle=True), state, "shrunk from 10 samples to 9")
    refused(
        DataLoader(data, 3, shuffle=True, generator=torch.Generator()), state, "states of 1 generators were expected"
    )
    refused(DataLoader(data, 3, shuffle=True), edited(state, cursor=[1, 2]), "was expected")
    for broken in ("x", "AAAA", 3, None):
        refused(DataLoader(data, 3, shuffle=True), edited(state, random={"drawn": broken}), "broken|Incorrect|string")
    DataLoader(data, 3, shuffle=True, num_workers=2).load_state_dict(state)


FILES: dict[str, tuple[Callable[[list[str]], Any], str]] = {
    "Lines": (Lines, "txt"),
    "Lines side by side": (lambda paths: Lines(paths, interleave=2), "txt"),
    "TarShards": (TarShards, "tar"),
    "ParquetRows": (ParquetRows, "parquet"),
    "ParquetRows in batches": (lambda paths: ParquetRows(paths, batch_rows=3), "parquet"),
}


def written(folder: Path, kind: str) -> list[str]:
    """Three files of four samples."""
    folder.mkdir()
    paths = [folder / f"{number}.{kind}" for number in range(3)]
    for path in paths:
        if kind == "txt":
            path.write_text("a\nb\nc\nd\n")
        elif kind == "parquet":
            pq.write_table(pa.table({"x": [1, 2, 3, 4]}), path)
        else:
            with tarfile.open(path, "w") as archive:
                for number in range(4):
                    archive.addfile(tarfile.TarInfo(f"{number}.bin"))
    return list(map(str, paths))


@pytest.mark.parametrize("name", FILES)
def test_other_files(name: str, tmp_path: Path) -> None:
    """Fewer, more, others, or in another order; but it does not matter where they lie."""
    make, kind = FILES[name]
    paths = written(tmp_path / "here", kind)
    state = state_of(Pipeline(make(paths)))
    refused(Pipeline(make(paths[:2])), state, "the source .* has files=2, and had 3")
    refused(Pipeline(make([*paths, paths[0]])), state, "the source .* has files=4, and had 3")
    for others in (paths[::-1], [*paths[:2], paths[2].replace("2.", "3.")]):
        refused(Pipeline(make(others)), state, "as many files as it had, but of other names, or in another order")
    if "side" not in name:
        refused(DataLoader(make(paths[:2]), 1), state_of(DataLoader(make(paths), 1)), "has files=2, and had 3")
    moved = Pipeline(make(written(tmp_path / "there", kind)))
    moved.load_state_dict(state)
    assert len(list(moved)) == len(list(Pipeline(make(paths)))) - 1


@pytest.mark.parametrize(
    "cursor", ["x", -1, [], [1], [0, -1], [9, 0], [1.5, 0, 0], [0, 0, -1], [9, 0, 0], {}, [2, [[]]]]
)
@pytest.mark.parametrize("name", FILES)
def test_garbage_in_the_cursor_of_files(name: str, cursor: Any, tmp_path: Path) -> None:
    """Refused when it is loaded, not when the epoch begins."""
    make, kind = FILES[name]
    paths = written(tmp_path / "here", kind)
    state = state_of(Pipeline(make(paths)))
    refused(Pipeline(make(paths)), edited(state, cursor=cursor), "does not fit this loader, or is broken")


def test_another_listing(tmp_path: Path) -> None:
    store = MemoryStore()
    for number in range(6):
        store.put(f"a/{number}", b"")
    state = state_of(Pipeline(Objects(store, prefix="a")))
    refused(Pipeline(Objects(store, prefix="")), state, "the source .* has prefix='', and had 'a'")
    refused(Pipeline(Objects(store, prefix="a")), edited(state, cursor=3), "the cursor of a listing is a key, got 3")


def test_nothing_happens_to_a_source_that_can_be_read_once() -> None:
    """A state is looked at without using it up."""
    loader = Pipeline(iter(range(10))).batch(2)
    state = state_of(Pipeline(iter(range(10))).batch(2))
    refused(loader, edited(state, cursor="x"), "was expected")
    assert len(list(loader)) == 5


def test_a_cursor_that_no_text_can_hold() -> None:
    """A source of somebody's own that turns to a cursor that JSON does not know; from the start on, `read` fails."""
    from aioloader.sources import CursorSource, Entry, EntryReader, SourceContext

    class Reader(EntryReader):
        cursor: Any = 1

        async def read(self, limit: int) -> list[Entry]:
            cursor, self.cursor = self.cursor, object()
            return [Entry(1, cursor, 1)]

    class Source(CursorSource):
        def open(self, context: SourceContext, cursor: Any) -> EntryReader:
            return Reader()

    loader = Pipeline(Source())
    samples = iter(loader)
    assert [next(samples) for _ in range(2)] == [1, 1]
    with pytest.raises(StateError, match="a cursor is made of numbers, strings and lists"):
        loader.state_dict()
    loader.close()
