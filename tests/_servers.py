"""Real servers on this machine: S3 by moto, and HTTP by aiohttp with everything that goes wrong on a wire.

`conftest.py` has a fixture for each, which starts it once per session. Connections are closed together with the store
or session that holds them, which a test drops.
"""

import asyncio
import itertools
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from email.utils import formatdate
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.request import Request, urlopen

from aiohttp import web
from obstore.store import HTTPStore, S3Store

from aioloader.testing import Fault as PlannedFault
from aioloader.testing import FaultPlan, Gate

__all__ = ["Fault", "HttpServer", "S3Server"]

# How long a store tries again what failed. The default of obstore is three minutes.
RETRY: Final[Any] = {
    "max_retries": 3,
    "backoff": {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2},
}


class S3Server:
    """`with S3Server() as server`: moto's S3, in a process of its own, at `server.endpoint`."""

    _SCRIPT = """if True:
        import sys
        from moto.server import ThreadedMotoServer
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        print(server.get_host_and_port()[1], flush=True)
        sys.stdin.read()
        server.stop()
    """

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # one line per request
            text=True,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        assert port, "moto's server did not start"
        self.endpoint = f"http://127.0.0.1:{port}"
        self._buckets = itertools.count()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its standard input, which ends it, and waits

    def make_bucket(self) -> str:
        """An empty bucket, of a name that none had before."""
        bucket = f"bucket-{next(self._buckets)}"
        with urlopen(Request(f"{self.endpoint}/{bucket}", method="PUT")):
            return bucket

    def store(self, bucket: str, **more: Any) -> S3Store:
        """A store for a bucket."""
        return S3Store(bucket, **{**self.options(), **more})

    def options(self) -> dict[str, Any]:
        """What `S3Store` and `from_url` need to come here."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": "any",
            "secret_access_key": "any",
            "region": "us-east-1",
            "client_options": {"allow_http": True},
            "retry_config": RETRY,
        }


Fault = Literal["reset", "truncated", "short"] | int
"""Of one answer: the connection is reset before it, or closed in its middle, or it has half of the range and says so,
or it is this status."""


@dataclass
class HttpServer:
    """`with HttpServer() as server`: files in memory, with ranges, in a thread of this process.

    Attributes:
        files: What is served, by path without the first slash.
        faults: By path, what is wrong with the answers, one after the other; those after the last are fine.
        plan: What goes wrong by chance, asked by path at each GET.
        gate: If there is one, each request waits at its path's gate.
        versions: By path, what the file is at each answer; for one that is rewritten while it is read.
        tells: How an answer says which version it is of: by an ETag, by a weak one, by the time of change, or not.
        conditions: Whether `If-Match` and `If-Unmodified-Since` are understood.
        heads: Whether HEAD is understood.
        media_type: What an answer says that its content is.
        ranges: Whether ranges are understood; else the whole file is the answer, as plain servers give it.
        requests: What came: method, path, and the header `Range`.
        asked_for: Of each request, the conditions in its header.
        at_once: How many were being answered at a time, at most.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, Iterator[Fault | None]] = field(default_factory=dict)
    plan: FaultPlan | None = None
    versions: dict[str, Iterator[bytes]] = field(default_factory=dict)
    tells: Literal["etag", "weak etag", "time"] | None = None
    conditions: bool = True
    heads: bool = True
    gate: Gate | None = None
    media_type: str = "application/octet-stream"
    ranges: bool = True
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    epoch_pinned: list[set[str]] = field(default_factory=list)
    at_once: int = 0
    _now: int = 0

    def reset(self) -> None:
        """As it was at first."""
        self.files, self.faults, self.versions, self.requests, self.epoch_pinned = {}, {}, {}, [], []
        self.tells, self.conditions, self.heads = None, True, True
        self.plan, self.media_type = None, "application/octet-stream"
        self.gate, self.ranges, self.at_once = None, True, 0

    def store(self, **more: Any) -> HTTPStore:
        """A store for all of it."""
        options: Any = {"client_options": {"allow_http": True}, "retry_config": RETRY}
        return HTTPStore(self.url, **{**options, **more})

    def __enter__(self) -> Self:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=[self._serve(started)], name="test-server", daemon=True
        )
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set_result, None)
        self._thread.join()
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer, allow_head=True)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        try:
            await self._stop
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.requests.append((request.method, path, request.headers.get("Range", "")))
        self.epoch_pinned.append({"If-Match", "If-Unmodified-Since"} & set(request.headers))
        self._now += 1
        self.at_once = max(self.at_once, self._now)
        try:
            if self.gate is not None:
                await self.gate.passing(path)
            planned = self.plan.next_fault(path) if self.plan is not None and request.method == "GET" else None
            if planned is None:
                return await self._response(request, path)
            return await self._planned(request, path, planned)
        finally:
            self._now -= 1

    async def _planned(self, request: web.Request, path: str, planned: PlannedFault) -> web.StreamResponse:
        """An answer with which something is wrong, as `FaultPlan` says."""
        match planned.kind:
            case "throttled":
                return web.Response(status=429, headers={"Retry-After": str(planned.retry_after)})
            case "unavailable":
                return web.Response(status=503)
            case "latency":
                await asyncio.sleep(planned.seconds)
            case "hang":
                self._now -= 1  # whoever has asked is gone long before this ends, with the server
                try:
                    await asyncio.wait([self._stop])
                finally:
                    self._now += 1
                return web.Response(status=503)
            case "reset":
                return await self._response(request, path, "reset")
            case "truncated":
                return await self._response(request, path, "truncated")
        answer = await self._response(request, path)
        if not isinstance(answer, web.Response) or not isinstance(answer.body, bytes) or answer.status >= 400:
            return answer
        match planned.kind:
            case "changed_etag":
                answer.headers["ETag"] = f'"{planned.attempt} {path}"'
            case "wrong_length":
                answer.body = answer.body[: len(answer.body) // 2]
            case "drip":
                return await _drip(request, answer, planned.seconds)
        return answer

    async def _response(self, request: web.Request, path: str, fault: Fault | None = None) -> web.StreamResponse:
        fault = fault or next(self.faults.get(path, iter(())), None)
        content = next(self.versions.get(path, iter(())), self.files.get(path))
        if request.method == "HEAD" and not self.heads:
            return web.Response(status=405)
        if isinstance(fault, int) or content is None:
            return web.Response(status=fault if isinstance(fault, int) else 404, text="so it is")
        assert request.transport is not None
        if fault == "reset":
            request.transport.abort()
            return web.Response()
        headers = {"Last-Modified": formatdate(0, usegmt=True), "Accept-Ranges": "bytes"}
        checksum = zlib.crc32(content)
        if self.tells == "time":
            headers["Last-Modified"] = formatdate(checksum, usegmt=True)
        elif self.tells is not None:
            headers["ETag"] = f'{"W/" if self.tells == "weak etag" else ""}"{checksum}"'
        if self.conditions:
            asked_tag = request.headers.get("If-Match")
            asked_time = request.headers.get("If-Unmodified-Since")
            if asked_tag not in (None, headers.get("ETag")) or asked_time not in (None, headers["Last-Modified"]):
                return web.Response(status=412)
        status, body = 200, content
        asked = request.http_range
        if self.ranges and (asked.start is not None or asked.stop is not None):
            start, stop, _ = asked.indices(len(content))
            if start >= len(content):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
            if fault == "short":
                stop = (start + stop) // 2
            status, body = 206, content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if fault != "truncated" or request.method == "HEAD":
            return web.Response(status=status, body=body, headers=headers, content_type=self.media_type)
        response = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        request.transport.close()
        return response


async def _drip(request: web.Request, answer: web.Response, seconds: float, pieces: int = 4) -> web.StreamResponse:
    """The body of `answer` in pieces, during `seconds`."""
    body = answer.body
    assert isinstance(body, bytes)
    slow = web.StreamResponse(status=answer.status, headers={**answer.headers, "Content-Length": str(len(body))})
    await slow.prepare(request)
    size = max(1, -(-len(body) // pieces))
    for begin in range(0, len(body), size):
        await asyncio.sleep(seconds / pieces)
        await slow.write(body[begin : begin + size])
    return slow
