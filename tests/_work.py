"""Functions and datasets for worker processes, which import this file: it needs nothing that takes long to import."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


class RefusedError(Exception):
    """Its constructor does not take its `args`, so plain pickle cannot make it again."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


def double(sample: Any) -> Any:
    return sample * 2


def filled(sample: int) -> torch.Tensor:
    return torch.full((1000, 100), float(sample))


def pid_of(sample: object) -> int:
    return os.getpid()


def fail_at_five(sample: int) -> int:
    if sample == 5:
        raise ValueError(f"no {sample}")
    return sample


def refuse(sample: int) -> int:
    raise RefusedError(sample, "refused")


def killed_at_five(sample: int) -> int:
    if sample == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return sample


def killed_at_every_hundredth(sample: int) -> int:
    if sample % 100 == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return sample


def noted_then_killed_at_every_hundredth(sample: int, path: str) -> int:
    """Says in a file that it was called."""
    with Path(path).open("ab", buffering=0) as file:
        file.write(b"%d\n" % sample)
    return killed_at_every_hundredth(sample)


def exits(sample: int) -> int:
    os._exit(3)


def busy_millisecond(sample: int) -> int:
    end = time.perf_counter() + 0.001
    while time.perf_counter() < end:
        pass
    return sample


def forever(sample: int) -> int:
    if sample == 5:
        print("ready", flush=True)
        while True:
            signal.pause()
    return sample


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return index * index, torch.full((64, 64), float(index))


class RandomDraws(Dataset[Any]):
    """What torch promises to code in workers: seeds of their own, and who they are."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        import random

        info = get_worker_info()
        assert info is not None
        return index, torch.rand(3), random.random(), info.id, info.num_workers, info.seed


class Counting(IterableDataset[Any]):
    """Workers have parts of different lengths."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is not None
        yield from range(100 * info.id, 100 * info.id + 5 * (info.id + 1))


class FailingParts(IterableDataset[Any]):
    """The first worker fails at once, the second in the middle, the third gives all."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is not None
        if info.id == 0:
            raise ValueError("no part")
        return self._part(info.id)

    def _part(self, worker: int) -> Iterator[int]:
        yield from range(10 * worker, 10 * worker + 3)
        if worker == 1:
            raise ValueError("half a part")
        yield from range(100, 107)


class Logged:
    """A `collate_fn` that writes down what it was given."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, samples: list[Any]) -> list[Any]:
        with self._path.open("a") as file:
            file.write(f"{samples}\n")
        return samples


class Opened:
    """Gives what it gets, once a file is there."""

    def __init__(self, gate: Path) -> None:
        self._gate = gate

    def __call__(self, sample: int) -> int:
        while not self._gate.exists():
            time.sleep(0.001)
        return sample


def many(sample: int) -> list[torch.Tensor]:
    return [torch.full((8,), float(sample + k)) for k in range(100)]
