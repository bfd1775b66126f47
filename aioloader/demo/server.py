"""The demo's object store: an HTTP server in a separate process that answers each request after a fixed latency.

It runs as a file (`python server.py FOLDER`), since `python -m aioloader.demo.server` would import torch first. It
prints its port and serves until its standard input is closed, so it cannot outlive the process that started it.
"""

import argparse
import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.request import urlopen

from aiohttp import web


class DemoServer:
    """`with DemoServer(folder, latency_s=0.02) as server`: serves the images of `folder` at `server.url`.

    Args:
        folder: PNG files; they are read once, so that an object costs nothing but the latency.
        latency_s: How long each answer waits, in seconds; any number of answers wait at the same time.
    """

    def __init__(self, folder: Path, latency_s: float) -> None:
        self._command = [sys.executable, "-P", __file__, str(folder), "--latency-s", str(latency_s)]

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = self.process.stdout.readline().strip()
        if not port:
            self.__exit__(None, None, None)
            raise RuntimeError(f"the demo's server ended with exit code {self.process.returncode} before it listened")
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.communicate()  # closes its standard input, and waits for its end

    def served(self) -> int:
        """Return how many files have been sent since the start."""
        with urlopen(f"{self.url}/served") as response:
            return int(response.read())


async def serve(files: dict[str, bytes], latency_s: float) -> None:
    """Serve `files`, each under its name, until standard input ends."""
    served = 0

    async def send_file(request: web.Request) -> web.Response:
        nonlocal served
        content = files.get(request.match_info["name"])
        if content is None:
            raise web.HTTPNotFound
        await asyncio.sleep(latency_s)
        served += 1
        return web.Response(body=content, content_type="image/png")

    async def send_count(_: web.Request) -> web.Response:
        return web.Response(text=str(served))

    app = web.Application()
    app.add_routes([web.get("/served", send_count), web.get("/{name}", send_file)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.to_thread(sys.stdin.buffer.read)
    finally:
        await runner.cleanup()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-s", type=float, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes standard input
    files = {path.name: path.read_bytes() for path in arguments.folder.glob("*.png")}
    asyncio.run(serve(files, arguments.latency_s))


if __name__ == "__main__":
    main()
