"""A store of objects for benchmarks: all of one size, each after the same latency, over HTTP, in its own process.

Answers are bytes that lie ready, written by a bare protocol of asyncio: on a machine that client and server share, a
web framework would take more of it than any client that is measured. Run as a file: it imports no torch.
"""

import asyncio
import contextlib
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

__all__ = ["ObjectServer"]


class ObjectServer:
    """`with ObjectServer(size=65536, latency_s=0.03) as server`: whatever is asked for below `server.url`.

    Args:
        size: Of each object, in bytes.
        latency_s: How long each answer waits, in seconds; any number of answers wait side by side.
    """

    def __init__(self, size: int, latency_s: float) -> None:
        self._command = [sys.executable, "-P", __file__, str(size), str(latency_s)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"the server ended with exit code {self._process.wait()} before it listened")
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its standard input, which ends it, and waits


class _Answers(asyncio.Protocol):
    """One connection: an answer for each request, in order."""

    def __init__(self, answer: bytes, latency_s: float) -> None:
        self._answer = answer
        self._latency = latency_s
        self._rest = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *requests, self._rest = (self._rest + data).split(b"\r\n\r\n")
        for _ in requests:
            asyncio.get_running_loop().call_later(self._latency, self._send)

    def _send(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._answer)


async def _serve(size: int, latency_s: float) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % size
    answer += bytes(range(256)) * (-(-size // 256))
    answer = answer[: len(answer) - (-size % 256)] if size % 256 else answer
    server = await asyncio.get_running_loop().create_server(
        lambda: _Answers(answer, latency_s), "127.0.0.1", 0, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    server.close()


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes our standard input
    run = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        run = uvloop.run
    run(_serve(int(sys.argv[1]), float(sys.argv[2])))


if __name__ == "__main__":
    main()
