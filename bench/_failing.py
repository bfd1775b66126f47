"""Contenders for `bench.failures` whose requests fail now and then: ours, and what people write by hand."""

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from multiprocessing import get_context
from typing import Any, Final
from urllib.parse import urlsplit

import torch.utils.data

from aioloader import Hedge, Pipeline, Retry
from bench._harness import Epoch, Tick, by_async_for, by_for
from bench._rivals import async_items, spdl_loader

__all__ = ["BATCH", "IN_FLIGHT", "WORKERS", "bare", "by_map", "by_spdl", "by_torch"]

IN_FLIGHT: Final = 256
TIMEOUT_S: Final = 0.3
ATTEMPTS: Final = 6
WORKERS: Final = 16  # of torch, each with one request
BATCH: Final = 64

Fetch = Callable[[int], Awaitable[bytes]]

_epochs = itertools.count()  # each asks for other paths, and so meets the same share of faults


def fetch_of(url: str) -> Fetch:
    """One epoch's requests. Once each: the store's own retries are off."""
    import obstore
    from obstore.store import HTTPStore

    options: Any = {"client_options": {"allow_http": True, "timeout": "60s"}, "retry_config": {"max_retries": 0}}
    store, epoch = HTTPStore(url, **options), next(_epochs)

    async def fetch(key: int) -> bytes:
        return bytes(await (await obstore.get_async(store, f"{epoch}/{key}")).bytes_async())

    return fetch


def what_passes() -> tuple[type[Exception], ...]:
    from obstore.exceptions import GenericError

    return GenericError, TimeoutError


def by_map(
    url: str,
    samples: int,
    *,
    is_async: bool = True,
    policies: bool = True,
    hedge: Hedge | None = None,
    ordered: bool = True,
    ahead: int | None = None,
) -> Epoch:
    def pipeline() -> Pipeline:
        retry = Retry(ATTEMPTS, on=what_passes(), wait_initial=0.02, wait_max=0.1, jitter=0.02)
        more: dict[str, Any] = {"timeout": TIMEOUT_S, "retry": retry, "hedge": hedge} if policies else {}
        fetched = Pipeline(range(samples)).map(
            fetch_of(url), concurrency=IN_FLIGHT, ordered=ordered, ahead=ahead, **more
        )
        return fetched.batch(BATCH, collate_fn=list)

    return by_async_for(pipeline, len) if is_async else by_for(pipeline, len)


def by_hand(url: str) -> Fetch:
    """As it is written with stamina."""
    import stamina

    stamina.instrumentation.set_on_retry_hooks([])  # else it prints each retry
    fetch = fetch_of(url)

    @stamina.retry(on=what_passes(), attempts=ATTEMPTS, wait_initial=0.02, wait_max=0.1, wait_jitter=0.02, timeout=None)
    async def patient(key: int) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await fetch(key)

    return patient


def bare(url: str, samples: int) -> Epoch:
    """Requests in a window that moves, samples in order."""

    async def consume(tick: Tick) -> None:
        patient = by_hand(url)
        under_way: deque[asyncio.Task[bytes]] = deque()
        batch: list[bytes] = []
        key = 0
        while key < samples or under_way:
            while key < samples and len(under_way) < IN_FLIGHT:
                under_way.append(asyncio.ensure_future(patient(key)))
                key += 1
            batch.append(await under_way.popleft())
            if len(batch) == BATCH or not under_way:
                tick(len(batch))
                batch = []

    return lambda tick: asyncio.run(consume(tick))


def by_spdl(url: str, samples: int, *, policies: bool = True, ordered: bool = True) -> Epoch:
    def describe(builder: Any) -> Any:
        return (
            builder.add_source(async_items(range(samples)))
            .pipe(
                by_hand(url) if policies else fetch_of(url),
                concurrency=IN_FLIGHT,
                output_order="input" if ordered else "completion",
            )
            .aggregate(BATCH)
        )

    return by_for(spdl_loader(describe, threads=2, stats=False), len)


class Remote(torch.utils.data.Dataset[bytes]):
    """As it is written with torch and tenacity: a connection for each worker, made anew when it broke."""

    def __init__(self, url: str, samples: int) -> None:
        self._host = urlsplit(url).netloc
        self._samples = samples
        self._epoch = next(_epochs)
        self._connection: Any = None

    def __len__(self) -> int:
        return self._samples

    def _get(self, index: int) -> bytes:
        import http.client

        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT_S)
        try:
            self._connection.request("GET", f"/{self._epoch}/{index}")
            answer = self._connection.getresponse()
            body: bytes = answer.read()
            if answer.status != 200:
                raise ConnectionError(f"status {answer.status}")
        except BaseException:
            self._connection.close()
            self._connection = None
            raise
        return body

    def __getitem__(self, index: int) -> bytes:
        import tenacity

        patient = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential_jitter(multiplier=0.02, max=0.1, jitter=0.02),
            reraise=True,
        )
        found: bytes = patient(self._get, index)
        return found


def by_torch(url: str, samples: int) -> Epoch:
    return by_for(
        lambda: torch.utils.data.DataLoader(
            Remote(url, samples),
            BATCH,
            num_workers=WORKERS,
            collate_fn=list,
            multiprocessing_context=get_context("fork"),
        ),
        len,
    )
