"""Contenders for `bench.flow` where few samples take much longer than the others: all of them only sleep."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.utils.data

from aioloader import DataLoader, Pipeline
from bench._harness import Epoch, Tick, by_async_for, by_for, whole
from bench._rivals import async_items, spdl_loader

__all__ = ["Stragglers", "bare_threads", "by_dataloader", "by_map", "by_spdl", "by_torch", "ideal"]


@dataclass(frozen=True)
class Stragglers:
    """Samples that take some time, and a few of which take much longer. Always the same ones.

    Attributes:
        samples: How many there are in an epoch.
        seconds: What most of them take.
        slow_seconds: What the others take.
        share: How many of them are slow, 0 to 1.
    """

    samples: int
    seconds: float
    slow_seconds: float
    share: float

    def times(self) -> list[float]:
        """What each sample takes, in seconds."""
        numbers = random.Random(0)
        return [self.slow_seconds if numbers.random() < self.share else self.seconds for _ in range(self.samples)]


def _one(_: Any) -> int:
    return 1


def ideal(work: Stragglers, width: int) -> Epoch:
    """Nothing runs: the time that all samples take together, over `width`."""

    def epoch(tick: Tick) -> float:
        tick(work.samples)
        return sum(work.times()) / width

    return epoch


def bare_threads(work: Stragglers, width: int) -> Epoch:
    """Threads that take the next sample each, in no order and without a bound: what the machine can do."""
    times = work.times()

    def run(samples: Iterator[float], lock: threading.Lock) -> None:
        while True:
            with lock:
                seconds = next(samples, None)
            if seconds is None:
                return
            time.sleep(seconds)

    def epoch(tick: Tick) -> float:
        began = time.perf_counter()
        samples, lock = iter(times), threading.Lock()
        threads = [threading.Thread(target=run, args=(samples, lock)) for _ in range(width)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tick(len(times))
        return time.perf_counter() - began

    return epoch


def by_map(
    work: Stragglers,
    width: int,
    *,
    ordered: bool = True,
    ahead: int | None = None,
    sync: bool = False,
    is_async: bool = True,
) -> Epoch:
    """`Pipeline.map`, of an async function or of a sync one."""
    times = work.times()

    async def fetch(key: int) -> int:
        await asyncio.sleep(times[key])
        return key

    def read(key: int) -> int:
        time.sleep(times[key])
        return key

    fn = read if sync else fetch
    loader = Pipeline(range(work.samples)).map(fn, concurrency=width, ordered=ordered, ahead=ahead)
    return whole(by_async_for(loader, _one) if is_async else by_for(loader, _one))


def by_spdl(work: Stragglers, width: int, *, ordered: bool) -> Epoch:
    """An async pipe, with the settings that its documentation gives for the least overhead."""
    times = work.times()

    async def fetch(key: int) -> int:
        await asyncio.sleep(times[key])
        return key

    def describe(builder: Any) -> Any:
        order = "input" if ordered else "completion"
        source = async_items(range(work.samples))
        return builder.add_source(source).pipe(fetch, concurrency=width, output_order=order)

    return whole(by_for(spdl_loader(describe, threads=2, sink=64, stats=False), _one))


class Slow(torch.utils.data.Dataset[int]):
    """The same as a dataset."""

    def __init__(self, work: Stragglers) -> None:
        self._times = work.times()

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, index: int) -> int:
        time.sleep(self._times[index])
        return index


def by_dataloader(work: Stragglers, width: int, batch_size: int) -> Epoch:
    return whole(by_for(DataLoader(Slow(work), batch_size, num_workers=width)))


def by_torch(work: Stragglers, width: int, batch_size: int, *, in_order: bool = True) -> Epoch:
    """Workers stay, so that an epoch does not fork them."""
    return whole(
        by_for(
            torch.utils.data.DataLoader(
                Slow(work), batch_size, num_workers=width, persistent_workers=True, in_order=in_order
            )
        )
    )
