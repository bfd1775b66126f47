"""Twenty loaders, and how they are saved and loaded; run as a program, it saves them on the ranks of torchrun."""

import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.utils.data import IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from aioloader import DataLoader, Pipeline, Schedule
from aioloader.sources import Lines

__all__ = ["LOADERS", "PLACES", "SEED", "Training", "make", "plain"]

COUNT: Final = 40
SEED: Final = 3

dataset = TensorDataset(torch.arange(COUNT))


class Numbers(IterableDataset[int]):
    """A stream that tells where it is."""

    def __init__(self) -> None:
        self.position = 0
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        self.position, self.start = self.start, 0
        while self.position < COUNT:
            self.position += 1
            yield self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


def lines(path: str = __file__) -> Lines:
    return Lines(path, shuffle=True, seed=2)


def sampled() -> Pipeline:
    return Pipeline(dataset, sampler=RandomSampler(dataset))


def documents() -> Pipeline:
    return Pipeline([[number] * (number % 7 + 1) for number in range(COUNT)])


def mixed() -> Pipeline:
    weights = Schedule.linear({0: {"a": 1, "b": 0}, 30: {"a": 1, "b": 3}})
    return Pipeline.mix({"a": Pipeline(range(COUNT)).shuffle(seed=4), "b": range(100, 100 + COUNT)}, weights)


def is_odd(number: int) -> bool:
    return number % 2 == 1


def twice(number: int) -> list[int]:
    return [number, number]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Callable[[], Any]] = {
    "DataLoader, in order": lambda: DataLoader(dataset, 4),
    "DataLoader, shuffled": lambda: DataLoader(dataset, 4, shuffle=True),
    "DataLoader, shuffled, threads": lambda: DataLoader(dataset, 4, shuffle=True, num_workers=2),
    "DataLoader, shuffled, persistent": lambda: DataLoader(
        dataset, 4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "DataLoader, seed": lambda: DataLoader(dataset, 4, shuffle=True, seed=3),
    "DataLoader, generator": lambda: DataLoader(dataset, 4, shuffle=True, generator=seeded()),
    "DataLoader, weighted": lambda: DataLoader(dataset, 4, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)),
    "DataLoader, a stream": lambda: DataLoader(Numbers(), 4),
    "Pipeline, shuffle": lambda: Pipeline(dataset).shuffle(seed=1).batch(4),
    "Pipeline, sampler": lambda: sampled().batch(4),
    "Pipeline, sampler, repeat": lambda: sampled().repeat(2).batch(4),
    "Pipeline, two samplers": lambda: Pipeline.zip(sampled(), sampled()).batch(4),
    "Pipeline, filter and a buffer": lambda: Pipeline(range(COUNT)).filter(is_odd).shuffle(7, seed=2).batch(4),
    "Pipeline, flat_map": lambda: Pipeline(range(COUNT)).flat_map(twice).batch(4),
    "Pipeline, lines": lambda: Pipeline(lines()).batch(4, collate_fn=list),
    "Pipeline, a stream": lambda: Pipeline(Numbers()).map(abs).batch(4),
    "Pipeline, mix": lambda: mixed().batch(4),
    "Pipeline, pack": lambda: documents().pack(16).batch(2, collate_fn=list),
    "Pipeline, batch_by_length": lambda: documents().shuffle(seed=1).batch_by_length(24, len, collate_fn=list),
    "Pipeline, cache and info": lambda: sampled().map(tuple).cache(memory_bytes=1 << 20).batch(4).with_info(),
}

PLACES: dict[str, int | None] = {"before the first batch": 0, "in the middle": 3, "between epochs": None}
"""How many batches of the second epoch have been given; None: all."""


def make(name: str) -> Any:
    """One of the loaders; in a process that trains, which has drawn some numbers."""
    return LOADERS[name]()


def plain(batch: Any) -> Any:
    """A batch as JSON gives it back."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, list | tuple):
        return [plain(part) for part in batch]
    return batch if isinstance(batch, int | str | None) else repr(type(batch).__name__)


class Training:
    """A loader whose state is saved at one of the places, and what came afterwards: the rest, and one epoch more."""

    def __init__(self, name: str, place: str, save: Callable[[Any], None]) -> None:
        torch.manual_seed(SEED)
        loader = make(name)
        for _ in loader:
            pass
        batches = iter(loader)
        stop = PLACES[place]
        given = 0
        while stop is None or given < stop:
            try:
                next(batches)
            except StopIteration:
                break
            given += 1
        save(loader)
        rest = [plain(batch) for batch in batches] if stop else []
        self.expected = [*([rest] if stop else []), *_epochs(loader, 1 if stop else 2)]
        loader.close()

    def goes_on(self, loader: Any) -> bool:
        """Whether `loader`, into which the state was loaded, gives just that."""
        found = _epochs(loader, len(self.expected))
        loader.close()
        return found == self.expected


def _epochs(loader: Any, count: int) -> list[list[Any]]:
    return [[plain(batch) for batch in loader] for _ in range(count)]


def as_json(folder: Path, loader: Any) -> None:
    (folder / "state.json").write_text(json.dumps(loader.state_dict()))


def from_json(folder: Path, loader: Any) -> None:
    loader.load_state_dict(json.loads((folder / "state.json").read_text()))


def by_torch_save(folder: Path, loader: Any) -> None:
    torch.save({"loader": loader.state_dict()}, folder / "state.pt")


def by_torch_load(folder: Path, loader: Any) -> None:
    loader.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["loader"])


def by_dcp(folder: Path, loader: Any) -> None:
    state_dict_saver.save({"loader": loader}, checkpoint_id=folder, no_dist=not dist.is_initialized())


def by_dcp_async(folder: Path, loader: Any) -> None:
    saved = state_dict_saver.async_save({"loader": loader}, checkpoint_id=folder, no_dist=True)
    assert not isinstance(saved, state_dict_saver.AsyncSaveResponse)
    saved.result()


def from_dcp(folder: Path, loader: Any) -> None:
    state_dict_loader.load({"loader": loader}, checkpoint_id=folder, no_dist=True)


def main(folder: Path) -> None:
    """Save all of them on each of the ranks of torchrun, in one checkpoint each."""
    dist.init_process_group("gloo")
    expected: dict[str, list[Any]] = {}
    for name in LOADERS:
        for place in PLACES:
            where = folder / name / place
            training = Training(name, place, lambda loader, where=where: by_dcp(where, loader))  # type: ignore[misc]
            expected[f"{name}/{place}"] = training.expected
    buffer = io.StringIO()
    json.dump(expected, buffer)
    (folder / f"expected-{dist.get_rank()}.json").write_text(buffer.getvalue())
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
