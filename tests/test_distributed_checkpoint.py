"""Loaders in `torch.distributed.checkpoint`, which loads in place: into the keys that a fresh loader's state has."""

import asyncio
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from aioloader import DataLoader, Pipeline
from aioloader.sources import Lines
from tests._support import FACES, Child, Face, Steps, collect
from tests.test_resume import Stateful

pytestmark = pytest.mark.usefixtures("fork_server")

COUNT = 48


def dataset() -> TensorDataset:
    return TensorDataset(torch.arange(COUNT))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class Mine(Sampler[int]):
    """A random sampler of somebody's own."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(COUNT).tolist()

    def __len__(self) -> int:
        return COUNT


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


class StatefulNumbers(Stateful, IterableDataset[int]):
    pass


class AsyncDataset:
    def __len__(self) -> int:
        return COUNT

    async def __getitem__(self, index: int) -> int:
        await asyncio.sleep(0)
        return index


def sampled(pipelines: int = 1, **arguments: Any) -> Any:
    made = [Pipeline(range(COUNT), sampler=RandomSampler(range(COUNT), **arguments)) for _ in range(pipelines)]
    return made if pipelines > 1 else made[0]


KINDS: dict[str, Callable[[], Any]] = {
    "shuffle, no workers": lambda: DataLoader(dataset(), 4, shuffle=True),
    "shuffle, threads": lambda: DataLoader(dataset(), 4, shuffle=True, num_workers=2),
    "shuffle, processes": lambda: DataLoader(dataset(), 4, shuffle=True, num_workers=2, worker_type="process"),
    "shuffle, persistent": lambda: DataLoader(dataset(), 4, shuffle=True, num_workers=2, persistent_workers=True),
    "shuffle, in any order": lambda: DataLoader(dataset(), 4, shuffle=True, in_order=False),
    "shuffle, one by one": lambda: DataLoader(dataset(), None, shuffle=True),
    "shuffle, awaited": lambda: DataLoader(AsyncDataset(), 4, shuffle=True),
    "shuffle, generator": lambda: DataLoader(dataset(), 4, shuffle=True, generator=seeded()),
    "shuffle, seed": lambda: DataLoader(dataset(), 4, shuffle=True, seed=3),
    "no shuffle": lambda: DataLoader(dataset(), 4),
    "a sampler": lambda: DataLoader(dataset(), 4, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)),
    "a subset": lambda: DataLoader(dataset(), 4, sampler=SubsetRandomSampler(range(0, COUNT, 2))),
    "somebody's sampler": lambda: DataLoader(dataset(), 4, sampler=Mine()),
    "somebody's sampler, threads": lambda: DataLoader(dataset(), 4, sampler=Mine(), num_workers=2),
    "a batch sampler": lambda: DataLoader(dataset(), batch_sampler=BatchSampler(Mine(), 4, False)),
    "a sampler of a rank": lambda: DataLoader(dataset(), 4, sampler=DistributedSampler(dataset(), 2, 1)),
    "a stream": lambda: DataLoader(Numbers(), 4),
    "a stream, processes": lambda: DataLoader(Numbers(), 4, num_workers=2, worker_type="process"),
    "a stream with a state": lambda: DataLoader(StatefulNumbers(COUNT), 4),
    "Pipeline, shuffle": lambda: Pipeline(dataset()).shuffle(seed=3).batch(4),
    "Pipeline, sampler": lambda: sampled().batch(4),
    "Pipeline, sampler and generator": lambda: sampled(generator=seeded()).batch(4),
    "Pipeline, somebody's sampler": lambda: Pipeline(range(COUNT), sampler=Mine()).batch(4),
    "Pipeline, in a process": lambda: Pipeline(range(COUNT)).shuffle(seed=1).batch(4).in_process(),
    "Pipeline, sampler and buffer": lambda: sampled().shuffle(5).batch(4),
    "Pipeline, sampler, repeat": lambda: sampled().repeat(3).batch(4),
    "Pipeline, sampler and generator, repeat": lambda: sampled(generator=seeded()).repeat(3).batch(4),
    "Pipeline, mix": lambda: Pipeline.mix(sampled(2), [1, 2]).batch(4),
    "Pipeline, interleave": lambda: Pipeline.interleave(*sampled(2), range(9)).batch(4),
    "Pipeline, zip": lambda: Pipeline.zip(*sampled(2)).batch(4),
    "Pipeline, cache": lambda: sampled().map(int).cache(memory_bytes=1 << 20).batch(4),
    "Pipeline, repeat": lambda: Pipeline(range(9)).shuffle(seed=1).repeat().take(COUNT).batch(4),
    "Pipeline, a rank": lambda: sampled().shard(1, 2).batch(2),
    "Pipeline, ordered=False": lambda: Pipeline(range(COUNT)).map(int, ordered=False, concurrency=1).batch(4),
    "Pipeline, a stream": lambda: Pipeline(StatefulNumbers(COUNT)).batch(4),
    "Pipeline, lines": lambda: Pipeline(Lines(__file__)).batch(4, collate_fn=list),
}


QUICK = [name for name in KINDS if "process" not in name]  # processes take seconds to start

WAYS = [
    (name, taken, face)
    for name, taken, face in product(KINDS, (0, 3, "all"), FACES)
    if name in QUICK or (taken, face) in ((0, "for"), (3, "async for"))
]


def plain(batch: Any) -> Any:
    """A batch as lists."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(part) for part in batch] if isinstance(batch, list | tuple) else batch


def save(folder: Path, loader: Any) -> None:
    state_dict_saver.save({"loader": loader}, checkpoint_id=folder, no_dist=True)


def load(folder: Path, loader: Any) -> None:
    state_dict_loader.load({"loader": loader}, checkpoint_id=folder, no_dist=True)


@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize(("name", "taken", "face"), WAYS)
def test_a_loader_goes_on_from_a_checkpoint(name: str, taken: int | str, face: Face, tmp_path: Path) -> None:
    """From before the first batch, from the middle and from the end: in a fresh loader, and in the same one."""
    make = KINDS[name]
    loader = make()
    with Steps(loader, face) as steps:
        for _ in range(3 if taken == 3 else 0):
            steps.next()
        if taken == "all":
            steps.rest()
        save(tmp_path, loader)
        torch.rand(7)  # the program draws, too
        expected = [] if taken != 3 else plain(steps.rest())
    if taken != 3:
        expected = plain(collect(loader, face))
    torch.manual_seed(99)
    other = make()
    load(tmp_path, other)
    assert plain(collect(other, face)) == expected
    load(tmp_path, loader)
    assert plain(collect(loader, face)) == expected
    loader.close()
    other.close()


@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
@pytest.mark.parametrize("name", KINDS)
def test_a_state_has_one_shape(name: str) -> None:
    """Fresh, in the middle, between epochs and after loading: no `None`, no list, nothing empty."""
    loader = KINDS[name]()
    states = [loader.state_dict()]
    for _ in range(2 if name in QUICK else 1):
        for number, _ in enumerate(loader):
            if number in (0, 3):
                states.append(loader.state_dict())
        states.append(loader.state_dict())
    loader.load_state_dict(states[2])
    states.append(loader.state_dict())
    loader.close()
    for state in states:
        flat, _ = flatten_state_dict(state)
        assert {key: type(value) for key, value in flat.items()} == {
        "format": str, "version": int, "loader": str, "guarantee": str, "epoch": int, "batches": int,
        "cursor.json": str,
    }  # fmt: skip


PROGRAM = """
import json
import sys
import warnings
from pathlib import Path
import torch
from tests.test_distributed_checkpoint import KINDS, QUICK, load, plain

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(123)
    rest = {}
    for name in QUICK:
        loader = KINDS[name]()
        load(Path(sys.argv[1]) / name, loader)
        rest[name] = [plain(batch) for batch in loader]
        loader.close()
    print(json.dumps(rest))
"""


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_another_process_goes_on(tmp_path: Path) -> None:
    """As after a kill."""
    expected = {}
    for name in QUICK:
        loader = KINDS[name]()
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        save(tmp_path / name, loader)
        expected[name] = [plain(batch) for batch in batches]
        loader.close()
    with Child(PROGRAM, str(tmp_path)) as child:
        code, output, errors = child.finish()
    assert code == 0, errors
    assert json.loads(output) == json.loads(json.dumps(expected))
