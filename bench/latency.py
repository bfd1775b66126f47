"""Samples behind latency: `python -m bench.latency`.

Objects of 64 KiB, each 30 ms away, from a server in a process of its own: the case that an asynchronous loader exists
for. torch has a worker process per request that is under way. The limit is a bare loop over the same client, which
keeps 512 requests going and the batches in order.
"""

import asyncio
import http.client
import sys
from collections import deque
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from typing import Any, Final
from urllib.parse import urlsplit

import torch
import torch.utils.data
from torch import Tensor

from aioloader import Pipeline
from bench._harness import (
    PER_SECOND,
    Contender,
    Epoch,
    Measure,
    Report,
    Target,
    Tick,
    by_async_for,
    by_for,
    parser_for,
    pick,
)
from bench._object_server import ObjectServer

BATCH: Final = 64
OBJECT_BYTES: Final = 64 << 10
LATENCY_S: Final = 0.03
IN_FLIGHT: Final = 512
WORKERS: Final = 16

BARE: Final = "bare asyncio"
TORCH: Final = f"torch, {WORKERS} workers"

REACH: Final[list[tuple[Measure, str, float]]] = [
    ("speed", TORCH, 20),
    ("speed", BARE, 0.9),
    ("first", TORCH, 0.1),
    ("memory", TORCH, 1),
]


def store_of(url: str) -> Any:
    """A client that is good at many requests side by side."""
    from obstore.store import HTTPStore

    return HTTPStore(url, client_options={"allow_http": True})


async def fetch_from(store: Any, key: int) -> Tensor:
    import obstore

    result = await obstore.get_async(store, str(key))
    return torch.frombuffer(bytearray(await result.bytes_async()), dtype=torch.uint8)


def bare(url: str, samples: int) -> Epoch:
    """Requests in a window that moves, samples in order."""

    async def consume(tick: Tick) -> None:
        store = store_of(url)
        under_way: deque[asyncio.Task[Tensor]] = deque()
        batch: list[Tensor] = []
        key = 0
        while key < samples or under_way:
            while key < samples and len(under_way) < IN_FLIGHT:
                under_way.append(asyncio.create_task(fetch_from(store, key)))
                key += 1
            batch.append(await under_way.popleft())
            if len(batch) == BATCH:
                tick(len(torch.stack(batch)))
                batch.clear()

    return lambda tick: asyncio.run(consume(tick))


def by_pipeline(url: str, samples: int, *, is_async: bool) -> Epoch:
    def pipeline() -> Pipeline:
        return Pipeline(range(samples)).map(partial(fetch_from, store_of(url)), concurrency=IN_FLIGHT).batch(BATCH)

    return by_async_for(pipeline) if is_async else by_for(pipeline)


class Remote(torch.utils.data.Dataset[Tensor]):
    """As it is written with torch: each worker keeps its connection."""

    def __init__(self, url: str, samples: int) -> None:
        self._host = urlsplit(url).netloc
        self._samples = samples
        self._connection: http.client.HTTPConnection | None = None

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._host)
        self._connection.request("GET", f"/{index}")
        return torch.frombuffer(bytearray(self._connection.getresponse().read()), dtype=torch.uint8)


def by_torch(url: str, samples: int) -> Epoch:
    # Forked, as they are by default: the process that measures this was itself started in another way.
    return by_for(
        torch.utils.data.DataLoader(
            Remote(url, samples), BATCH, num_workers=WORKERS, multiprocessing_context=get_context("fork")
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    samples = pick(options, full=128, quick=24, smallest=2) * BATCH
    few = pick(options, full=24, quick=18, smallest=2) * BATCH
    report = Report("latency", options)
    skip = pick(options, full=2 * IN_FLIGHT, quick=2 * IN_FLIGHT, smallest=BATCH)
    with ObjectServer(OBJECT_BYTES, LATENCY_S) as server:
        report.compare(
            f"objects of 64 KiB behind {LATENCY_S * 1e3:g} ms, {IN_FLIGHT} in flight, batches of {BATCH}",
            [
                Contender(BARE, partial(bare, server.url, samples), samples, skip, limit=True, needs=("obstore",)),
                *(
                    Contender(
                        name,
                        partial(by_pipeline, server.url, samples, is_async=is_async),
                        samples,
                        skip,
                        needs=("obstore",),
                    )
                    for name, is_async in (("aioloader, async for", True), ("aioloader, for", False))
                ),
                Contender(TORCH, partial(by_torch, server.url, few), few, WORKERS * BATCH),
            ],
            [
                Target(ours, measure, rival, reach)
                for ours in ("aioloader, async for", "aioloader, for")
                for measure, rival, reach in REACH
            ],
            unit=PER_SECOND,
            rounds=pick(options, full=3, quick=1, smallest=1),
            memory=not options.quick,
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
