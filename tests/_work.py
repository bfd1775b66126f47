"""Functions and datasets for worker processes, which import this file: it needs nothing that takes long to import."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


class RefusedError(Exception):
    """Its constructor does not take its `args`, so plain pickle cannot make it again."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class BusyError(OSError):
    """Holds what cannot be pickled, and its constructor takes something else than its `args`."""

    def __init__(self, path: str) -> None:
        super().__init__(11, "busy", path)
        self.tries = 3
        self.lock = threading.Lock()
        self.log = Path(os.devnull).open("wb")  # noqa: SIM115 - of an exception, which nobody closes

    def __del__(self) -> None:
        if hasattr(self, "log"):
            self.log.close()


class GroupOfTwoError(ExceptionGroup[Exception]):
    """A group that is made in a way of its own."""

    def __new__(cls, left: Exception, right: Exception) -> "GroupOfTwoError":
        return super().__new__(cls, "two", [left, right])

    def __init__(self, left: Exception, right: Exception) -> None:
        self.names = (type(left).__name__, type(right).__name__)


def http_error() -> HTTPError:
    """As `urlopen` raises it, with the connection that its body would come from."""
    headers = Message()
    headers["Retry-After"] = "3"
    here, there = socket.socketpair()
    there.close()
    with here:
        return HTTPError("http://host/key", 503, "Busy", headers, here.makefile("rb"))


def fails_in_many_ways(sample: int) -> int:
    """For samples 0 to 6 there is an exception that plain pickle does not take, each of another kind."""
    match sample:
        case 0:
            raise http_error()
        case 1:
            raise BusyError("file")
        case 2:
            raise GroupOfTwoError(RefusedError(2, "refused"), ExceptionGroup("inner", [http_error()]))
        case 3:
            try:
                raise BusyError("cause")
            except BusyError as error:
                raise RefusedError(3, "refused") from error
        case 4:
            mine = ValueError("mine", threading.Lock())
            mine.add_note("a note")
            raise mine
        case 5:
            raise KeyboardInterrupt
        case 6:
            raise SystemExit(3)
    return sample


class FailsInManyWays(Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return fails_in_many_ways(index)


class OverFile(Dataset[bool]):
    """Rows of a file of int64 that is mapped into memory, in several guises.

    A sample is whether all of them show the same row, whose last element is then set to -1 through one of them.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.guises = {
            "view": rows[::-1],
            "array": np.asarray(rows).T,
            "bytes": [rows.view(np.uint8)],
            "tensor": torch.from_numpy(rows),
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bool:
        self.guises["tensor"][index, -1] = -1
        row = self.rows[index].tolist()
        others = [
            self.guises["view"][-1 - index].tolist(),
            self.guises["array"][:, index].tolist(),
            self.guises["bytes"][0][index].view(np.int64).tolist(),
            self.guises["tensor"][index].tolist(),
        ]
        return row == [index] * (len(row) - 1) + [-1] and others == [row] * 4 and isinstance(self.rows, np.memmap)


def double(sample: Any) -> Any:
    return sample * 2


def tens(sample: int) -> bool:
    return sample % 10 == 0


def filled(sample: int) -> torch.Tensor:
    return torch.full((1000, 100), float(sample))


class Filled(Dataset[torch.Tensor]):
    """Samples as `filled` makes them."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        return filled(index)


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


def wide(index: int) -> dict[str, torch.Tensor]:
    """A sample of forty parts of 4 KiB and a label of eight bytes."""
    parts = {f"part {part}": torch.full((1024,), float(index + part)) for part in range(40)}
    return {**parts, "label": torch.tensor(index)}


def many(sample: int) -> list[torch.Tensor]:
    return [torch.full((8,), float(sample + k)) for k in range(100)]


def fails_by_seven(key: int) -> int:
    """Every seventh key, from 3 on, cannot be loaded."""
    if key % 7 == 3:
        raise ValueError(f"bad {key}")
    return key


class Holes(Dataset[int]):
    """Twenty numbers, some of which cannot be loaded."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, key: int) -> int:
        if key in (2, 8, 9, 10, 11, 15):
            raise ValueError(f"no sample {key}")
        return key


class ManyHoles(Holes):
    """Loads several at once, or none of them."""

    def __getitems__(self, keys: list[int]) -> list[int]:
        return [self[key] for key in keys]


class DeadlyHoles(Holes):
    """Some of them end the process that loads them."""

    def __getitem__(self, key: int) -> int:
        if key in (5, 6, 15):
            os._exit(3)
        return super().__getitem__(key)


class DeadlyManyHoles(DeadlyHoles):
    """The same, several at once."""

    def __getitems__(self, keys: list[int]) -> list[int]:
        return [self[key] for key in keys]


def collate_deadly(samples: list[int]) -> list[int]:
    """Ends the process of the batch that begins with 4."""
    if samples[0] == 4:
        os._exit(3)
    return samples


class AsyncHoles:
    """The same, awaited."""

    def __len__(self) -> int:
        return 20

    async def __getitem__(self, key: int) -> int:
        return Holes()[key]


class AsyncManyHoles(Holes):
    """Several at once, awaited."""

    async def __getitems__(self, keys: list[int]) -> list[int]:
        return [self[key] for key in keys]


def key_of(sample: dict[str, Any]) -> str:
    return str(sample["__key__"])
