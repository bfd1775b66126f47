"""Objects of 64 KiB behind 30 ms of latency: `python -m bench.sources_objects`.

512 requests at once, batches of 64. The limit is bare obstore: as many workers that fetch, in no order. What makes
batches is compared with workers that copy what they fetched into batches, since that costs memory bandwidth whoever
does it. All run on the same kind of event loop (uvloop where it is installed, as `for` does). The server has a process
of its own on the same machine, and takes its share of it: all contenders pay that.
"""

import asyncio
import sys
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal

import torch
from obstore.store import HTTPStore

from aioloader import Pipeline
from aioloader.core.memory import tensor_over_bytes
from aioloader.sources import Objects
from bench._harness import PER_SECOND, Contender, Epoch, Report, Target, Tick, by_for, parser_for, pick
from bench._object_server import ObjectServer

SIZE: Final = 64 << 10
LATENCY_S: Final = 0.03
CONCURRENCY: Final = 512
BATCH: Final = 64

BARE: Final = "bare obstore"
BARE_BATCHES: Final = "bare obstore, batches"
TARGETS: Final = [
    Target("Objects, async for", "speed", BARE, 0.9),
    Target("Objects, batches, async for", "speed", BARE_BATCHES, 0.9),
    Target("Objects, batches, for", "speed", BARE_BATCHES, 0.9),
]


def run(main: Coroutine[Any, Any, None]) -> None:
    """On a loop of the same kind as that of `for`."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        asyncio.run(main)
    else:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main)


def open_store(url: str) -> Any:
    """A store for all objects of the server."""
    return HTTPStore(url, client_options={"allow_http": True})


def bare(url: str, count: int, *, batches: bool = False) -> Epoch:
    """As many workers as requests at once, each fetches the next key."""
    import obstore

    store = open_store(url)
    torch.set_num_threads(1)  # several would fight over 64 KiB
    batch = torch.empty(BATCH, SIZE, dtype=torch.uint8)

    async def work(numbers: Iterator[int], tick: Tick) -> None:
        for number in numbers:
            content = await (await obstore.get_async(store, f"{number:06}")).bytes_async()
            assert len(content) == SIZE
            if batches:
                batch[number % BATCH].copy_(tensor_over_bytes(content))
            tick(1)

    async def main(tick: Tick) -> None:
        numbers = iter(range(count))
        await asyncio.gather(*[work(numbers, tick) for _ in range(CONCURRENCY)])

    return lambda tick: run(main(tick))


def objects(url: str, count: int, *, batches: bool, asynchronous: bool) -> Epoch:
    """`Objects`, in order; batches of tensors, or each sample for itself."""
    read: Literal["tensor", "buffer"]
    keys = [f"{number:06}" for number in range(count)]
    read = "tensor" if batches else "buffer"  # which is what obstore gives
    loader = Pipeline(Objects(open_store(url), keys, read=read, concurrency=CONCURRENCY))
    if batches:
        loader = loader.batch(BATCH)
    if not asynchronous:
        return by_for(loader, len if batches else lambda _: 1)

    async def main(tick: Tick) -> None:
        async for batch in loader:
            tick(len(batch) if batches else 1)

    return lambda tick: run(main(tick))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge."""
    options = parser_for(__doc__).parse_args(arguments)
    count = pick(options, full=8192, quick=1536, smallest=128)
    report = Report("sources_objects", options)
    with ObjectServer(SIZE, LATENCY_S) as server:

        def contender(name: str, open: Any, **more: Any) -> Contender:
            skip = 0 if options.smallest else 2 * CONCURRENCY
            return Contender(name, partial(open, server.url, count, **more), count, skip=skip, limit=name == BARE)

        report.compare(
            f"{count} objects of 64 KiB behind 30 ms, {CONCURRENCY} at once",
            [
                contender(BARE, bare),
                contender(BARE_BATCHES, bare, batches=True),
                contender("Objects, async for", objects, batches=False, asynchronous=True),
                contender("Objects, batches, async for", objects, batches=True, asynchronous=True),
                contender("Objects, batches, for", objects, batches=True, asynchronous=False),
            ],
            TARGETS,
            unit=PER_SECOND,
            apart=True,
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
