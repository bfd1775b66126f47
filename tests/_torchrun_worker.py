"""One of four processes of a torchrun: what each way to name its rank gives it, as JSON into the folder of argv[1].

The processes are a mesh of 2 (data) by 2 (tensor).
"""

import asyncio
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, SubsetRandomSampler

from aioloader import DataLoader, Pipeline, UnsplitWarning
from aioloader.sources import Lines

N = 26


class Words(IterableDataset[int]):
    """Somebody's own stream, which may split itself."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(dist.get_rank(), N, dist.get_world_size()))


def distributed() -> Any:
    return DistributedSampler(range(N))  # type: ignore[arg-type]


def stream() -> Any:
    return datasets.Dataset.from_dict({"n": list(range(N))}).to_iterable_dataset(num_shards=4)


LOADERS: dict[str, Callable[[], Any]] = {
    "unsplit: a pipeline": lambda: Pipeline(range(N)).shuffle(seed=1).batch(4),
    "unsplit: a source": lambda: Pipeline(Lines(__file__)).batch(4, collate_fn=list),
    "unsplit: two pipelines": lambda: Pipeline.zip(Pipeline(range(N)), Pipeline(range(N))),
    "unsplit: a loader, without workers": lambda: DataLoader(range(N), 4),
    "unsplit: a loader, shuffled": lambda: DataLoader(range(N), 4, shuffle=True, num_workers=2),
    "unsplit: a stream of Hugging Face": lambda: Pipeline(stream()),
    "split: shard": lambda: Pipeline(range(N)).shard().batch(4),
    "split: a rank's part already": lambda: Pipeline(list(range(N))).shard(0, 1),
    "split: shard in one of two": lambda: Pipeline.zip(Pipeline(range(N)).shard(), Pipeline(range(7))),
    "split: every fourth": lambda: Pipeline(range(dist.get_rank(), N, 4)),
    "split: a sampler": lambda: DataLoader(range(N), 4, sampler=distributed()),
    "split: a sampler of batches": lambda: DataLoader(
        range(N),
        batch_sampler=BatchSampler(distributed(), 4, drop_last=False),
    ),
    "split: a sampler of a pipeline": lambda: Pipeline(range(N), sampler=distributed()),
    "split: shard=True": lambda: DataLoader(range(N), 4, shuffle=True, shard=True, num_workers=2),
    "split: indices": lambda: DataLoader(range(N), 4, sampler=SubsetRandomSampler([1, 2])),
    "split: somebody's stream": lambda: DataLoader(Words(), 4),
    "split: somebody's function": lambda: Pipeline(lambda: iter(range(3))),
    "split: a stream of Hugging Face": lambda: Pipeline(
        split_dataset_by_node(stream(), rank=dist.get_rank(), world_size=4)
    ),
}


def warned(make: Callable[[], Any]) -> list[int]:
    """How many warnings come with two epochs, by `for` and by `async for`."""

    async def read(loader: Any) -> None:
        async for _ in loader:
            pass

    counts = []
    for face in ("for", "async for"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loader = make()
            iter(loader)
            assert not caught  # before the first batch a trainer may still make its ranks
            for _ in range(2):
                if face == "for":
                    list(loader)
                else:
                    asyncio.run(read(loader))
        mine = [warning for warning in caught if issubclass(warning.category, UnsplitWarning)]
        assert all(warning.filename == __file__ for warning in mine)
        counts.append(len(mine))
    return counts


def noting(calls: list[int]) -> Callable[[int], int]:
    """Note what is loaded."""

    def load(n: int) -> int:
        calls.append(n)
        return n

    return load


def agreed(group: Any, face: str) -> list[int]:
    """How many steps this rank does in each of two epochs, where a filter leaves it more or fewer samples than others.

    Each step has a collective call of its own on the group of the whole job, as that of a trainer has.
    """
    rank = dist.get_rank()
    loader = Pipeline(range(120)).shard(group=group, even="agree").filter(lambda n: n // 4 % 5 <= rank).batch(3)

    def train(batch: Any) -> None:
        total = batch.sum()
        dist.all_reduce(total)
        steps.append(int(total))

    async def train_async() -> None:
        async for batch in loader:
            train(batch)

    counts = []
    for _ in range(2):
        steps: list[int] = []
        if face == "for":
            for batch in loader:
                train(batch)
        else:
            asyncio.run(train_async())
        counts.append(len(steps))
    return counts


def refused(group: Any) -> str:
    """Why ranks cannot agree on `group`."""
    try:
        Pipeline(range(9)).shard(group=group, even="agree")
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    found: dict[str, Any] = {}
    found["environment"] = list(Pipeline(range(N)).shard())  # before torch.distributed is there
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    mine = groups[0 if rank in (0, 3) else 1]

    def collective(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective is called")

    names = ("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast")
    kept = {name: getattr(dist, name) for name in names}
    for name in kept:
        setattr(dist, name, collective)
    found["distributed"] = list(Pipeline(range(N)).shuffle(seed=1).shard())
    found["group"] = list(Pipeline(range(N)).shard(group=mine))
    found["mesh"] = list(Pipeline(range(N)).shard(mesh=mesh["data"]))
    found["pair"] = list(Pipeline(range(N)).shard(mesh=(mesh, "data")))
    found["stream"] = list(Pipeline(lambda: iter(range(N))).map(abs).shard(even="drop"))
    found["shared"] = {}
    for name, tensor in (("mesh", mesh["tensor"]), ("pair", (mesh, "tensor")), ("group", mesh.get_group("tensor"))):
        calls: list[int] = []
        dealt = Pipeline(range(N)).shard(mesh=mesh["data"]).map(noting(calls))
        found["shared"][name] = [list(dealt.batch(4, collate_fn=list).share(tensor)), len(calls)]
    sampler: Any = DistributedSampler(range(N), shuffle=True, seed=2)  # type: ignore[arg-type]
    loader: Any = DataLoader(range(N), batch_size=4, sampler=sampler, num_workers=2)
    found["sampler"] = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found["sampler"].append([batch.tolist() for batch in loader])
    loader.set_epoch(2)
    steps = iter(loader)
    next(steps)
    state = json.loads(json.dumps(loader.state_dict()))
    found["rest"] = [batch.tolist() for batch in steps]
    again: Any = DataLoader(range(N), batch_size=4, sampler=sampler, num_workers=0)
    again.load_state_dict(state)
    again.set_epoch(state["epoch"])
    found["resumed"] = [batch.tolist() for batch in again]
    found["warned"] = {name: warned(make) for name, make in LOADERS.items()}
    for name, function in kept.items():
        setattr(dist, name, function)
    dist.barrier()
    everybody = dist.new_group(backend="gloo")
    found["agreed"] = [agreed(everybody, face) for face in ("for", "async for")]
    found["agreed on the trainer's own group"] = agreed(dist.group.WORLD, "for")
    found["refused"] = refused(None)
    dist.destroy_process_group()
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
