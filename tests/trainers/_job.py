"""What every trainer's script gets: loaders, a recorder of what is trained on, and a death at the right moment."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import torch
import torch._dynamo  # before jobs are forked: optimizers import it, which takes a second
import torch.utils.data
from torch.utils.data import Dataset, DistributedSampler

from aioloader import DataLoader, Pipeline

N: Final = 50
"""Samples; in batches of 4 these are 13, the last one of 2."""

BATCH: Final = 4
STEPS: Final = 13
EPOCHS: Final = 3

Kind = Literal["pipeline", "seeded", "dataloader", "torch", "stateful"]
KINDS: Final[dict[Kind, str]] = {
    "pipeline": "`Pipeline`",
    "seeded": "`DataLoader(seed=)`",
    "dataloader": "`DataLoader`",
    "torch": "torch's `DataLoader`",
    "stateful": "`StatefulDataLoader`",
}
OURS: Final = ("pipeline", "seeded", "dataloader")


class Numbers(Dataset[Any]):
    """Sample n is (n, 0)."""

    def __init__(self, n: int = N) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(key)]), torch.tensor([0.0])


class Dicts(Numbers):
    """The same, as Hugging Face's Trainer wants it."""

    def __getitem__(self, key: int) -> Any:
        x, y = super().__getitem__(key)
        return {"x": x, "labels": y}


class Net(torch.nn.Module):
    """One weight that hardly moves, so that nothing explodes on numbers up to 50."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x / N)  # type: ignore[no-any-return]


def loss_of(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(output, y)


@dataclass
class Job:
    """One process.

    Attributes:
        kind: Of loader.
        folder: For records and checkpoints; one for a first run and the one that resumes it.
        run: Names the records.
        checkpoint_at: Steps after which the trainer writes its own checkpoint; None: it writes none.
        dies: The process dies in the step after that.
        resumes: Goes on from the checkpoint that is in `folder`.
        accumulate: Batches per optimizer step.
        seed: Of torch's generator.
    """

    kind: Kind
    folder: str
    run: str
    checkpoint_at: int | None = None
    dies: bool = False
    resumes: bool = False
    accumulate: int = 1
    seed: int = 1
    epochs: int = EPOCHS
    option: str = ""
    fitting: bool = True

    def __post_init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.steps = 0
        self.validated: list[int] = []
        self.notes: dict[str, Any] = {}
        self.optimizer_steps = 0
        # Models of several ranks, until the process ends. With the last one goes the group of gloo (torch 2.13), which
        # then joins its thread while it holds the GIL; and that thread may be waiting for the GIL.
        self.kept: list[Any] = []
        torch.manual_seed(self.seed)
        torch.set_num_threads(1)

    @property
    def place(self) -> Path:
        return Path(self.folder)

    def loader(self, data: Numbers | None = None) -> Any:
        """A loader of this kind; with several ranks, split by hand if it is ours, which no trainer splits."""
        data = Numbers() if data is None else data
        if self.kind == "pipeline":
            pipeline = Pipeline(range(len(data))).shuffle(seed=1)
            if self.world_size > 1:
                pipeline = pipeline.shard()
            return pipeline.map(Loads(data), concurrency=8).batch(BATCH)
        if self.kind in OURS:
            if self.world_size > 1:
                sampler: Any = DistributedSampler(data, self.world_size, self.rank, seed=1)
                return DataLoader(data, batch_size=BATCH, sampler=sampler, num_workers=2)
            seed = 1 if self.kind == "seeded" else None
            return DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=2, seed=seed)
        if self.kind == "stateful":
            from torchdata.stateful_dataloader import StatefulDataLoader

            return StatefulDataLoader(data, batch_size=BATCH, shuffle=True)
        return torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)

    def validation_loader(self, data: Numbers | None = None) -> Any:
        """The first ten samples, in order."""
        data = Numbers(10) if data is None else data
        if self.kind == "pipeline":
            pipeline = Pipeline(range(len(data)))
            return (pipeline.shard() if self.world_size > 1 else pipeline).map(Loads(data)).batch(BATCH)
        if self.kind in OURS:
            sampler: Any = None
            if self.world_size > 1:
                sampler = DistributedSampler(data, self.world_size, self.rank, shuffle=False)
            return DataLoader(data, batch_size=BATCH, sampler=sampler)
        return torch.utils.data.DataLoader(data, batch_size=BATCH)

    # -- what the script tells ---------------------------------------------------------------------------------------

    def train(self, x: Any) -> None:
        """The trainer is in a step with these samples; here it dies."""
        self.steps += 1
        with self._records.open("a") as file:
            file.write(json.dumps([round(float(n)) for n in x.reshape(-1)]) + "\n")
        if self.dies and self.checkpoint_at is not None and self.steps > self.checkpoint_at:
            os._exit(9)

    def validate(self, x: Any) -> None:
        """The trainer evaluates these samples."""
        self.validated += [round(float(n)) for n in x.reshape(-1)]

    def note(self, **values: Any) -> None:
        """For instance how long the trainer believes an epoch to be."""
        self.notes |= values

    def finish(self) -> None:
        """Say how it ended, and what is left behind."""
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("aioloader")]
        for thread in threads:  # that are on their way out
            thread.join(5)
        left = [thread.name for thread in threads if thread.is_alive()]
        left += [child.name() for child in psutil.Process().children() if "aioloader" in " ".join(child.cmdline())]
        end = {"steps": self.steps, "left": left, "validated": self.validated, "optimizer_steps": self.optimizer_steps}
        (self.place / f"{self.run}-{self.rank}.end.json").write_text(json.dumps(end | self.notes))

    @property
    def _records(self) -> Path:
        return self.place / f"{self.run}-{self.rank}.jsonl"


@dataclass(frozen=True)
class Loads:
    """Loads a sample on the event loop."""

    data: Numbers

    async def __call__(self, key: int) -> Any:
        return self.data[key]


Script = Callable[[Job], None]


def batches_of(folder: Path, run: str, rank: int = 0) -> list[list[int]]:
    """What was trained on, step by step."""
    path = folder / f"{run}-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def end_of(folder: Path, run: str, rank: int = 0) -> dict[str, Any] | None:
    """How it ended; None: it did not."""
    path = folder / f"{run}-{rank}.end.json"
    return json.loads(path.read_text()) if path.exists() else None


def epochs_of(batches: list[list[int]], steps: int = STEPS) -> Iterator[list[int]]:
    """The samples of each epoch."""
    for start in range(0, len(batches), steps):
        yield [n for batch in batches[start : start + steps] for n in batch]
