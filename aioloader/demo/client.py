"""How the training processes fetch images: with aiohttp on any event loop, or blocking, in torch's workers."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from http.client import HTTPConnection
from urllib.parse import urlsplit

import aiohttp
from torch.utils.data import Dataset

from aioloader.demo.data import Example, Sample, decode

_Holder = AsyncGenerator[aiohttp.ClientSession, None]


def open_session(connections: int) -> aiohttp.ClientSession:
    """Return a session for the running loop with up to `connections` connections."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections))


async def fetch(session: aiohttp.ClientSession, url: str) -> bytes:
    """Return the object at `url`."""
    async with session.get(url) as response:
        response.raise_for_status()
        return await response.read()


class SessionPerLoop:
    """One aiohttp session per event loop, made at the first request and closed together with its loop.

    A session belongs to the loop on which it was made. Under `for`, samples are awaited on the loader's private loop,
    which lives for one epoch or for a `with loader:` block, and code outside cannot open or close a session there. An
    asynchronous generator can: before a loop closes, asyncio closes the generators that are still open on it
    (`loop.shutdown_asyncgens`), and this one closes its session.
    """

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._open: dict[asyncio.AbstractEventLoop, tuple[_Holder, aiohttp.ClientSession]] = {}

    async def get(self) -> aiohttp.ClientSession:
        """Return the running loop's session."""
        loop = asyncio.get_running_loop()
        if loop not in self._open:
            holder = self._hold(loop)
            self._open[loop] = holder, await anext(holder)  # this never suspends, so no other task comes in between
        return self._open[loop][1]

    async def _hold(self, loop: asyncio.AbstractEventLoop) -> _Holder:
        async with open_session(self._connections) as session:
            try:
                yield session
            finally:
                del self._open[loop]


class AsyncDigits(Dataset[Awaitable[Example]]):
    """A map-style dataset whose samples are awaited; aioloader keeps many of them under way at once."""

    def __init__(self, url: str, samples: list[Sample], connections: int) -> None:
        self._url = url
        self._samples = samples
        self._sessions = SessionPerLoop(connections)

    def __len__(self) -> int:
        return len(self._samples)

    async def __getitem__(self, index: int) -> Example:
        name, label = self._samples[index]
        content = await fetch(await self._sessions.get(), f"{self._url}/{name}")
        return decode(content), label  # 0.1 ms, short enough for the loop; use to_thread for photographs


class BlockingDigits(Dataset[Example]):
    """The same for torch's DataLoader: each worker process has one connection and waits for each image."""

    def __init__(self, url: str, samples: list[Sample]) -> None:
        self._address = urlsplit(url).netloc
        self._samples = samples
        self._connection: HTTPConnection | None = None  # made at the first request, which is in the worker

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Example:
        name, label = self._samples[index]
        if self._connection is None:
            self._connection = HTTPConnection(self._address)
        self._connection.request("GET", f"/{name}")
        response = self._connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{name} must be served with status 200, got {response.status} {response.reason}")
        return decode(content), label
