"""A store of objects for benchmarks: all of one size, each after the same latency, over HTTP, in its own process.

It may fail on purpose, by a seed: what becomes of a request depends on its path and on how often that was asked for.

Answers are bytes that lie ready, written by a bare protocol of asyncio: on a machine that client and server share, a
web framework would take more of it than any client that is measured. Run as a file: it imports no torch.
"""

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self
from urllib.request import urlopen

__all__ = ["Faults", "ObjectServer"]


@dataclass(frozen=True)
class Faults:
    """What goes wrong.

    Attributes:
        unavailable: Share of requests that are answered by 503.
        hang: Share that are never answered.
        truncated: Share whose body ends too early, and the connection with it.
        slow: Share that take `slow_s` instead.
        slow_s: Seconds.
        per_second: Requests that are allowed, with a tenth of that at once; others are answered by 429. 0: all.
        seed: Of what happens to whom.
    """

    unavailable: float = 0.0
    hang: float = 0.0
    truncated: float = 0.0
    slow: float = 0.0
    slow_s: float = 1.0
    per_second: float = 0.0
    seed: int = 0


class ObjectServer:
    """`with ObjectServer(size=65536, latency_s=0.03) as server`: whatever is asked for below `server.url`.

    Args:
        size: Of each object, in bytes.
        latency_s: How long each answer waits, in seconds; any number of answers wait side by side.
        faults: What goes wrong; None: nothing.
    """

    def __init__(self, size: int, latency_s: float, faults: Faults | None = None) -> None:
        wrong = json.dumps(asdict(faults or Faults()))
        self._command = [sys.executable, "-P", __file__, str(size), str(latency_s), wrong]

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

    def answers(self) -> dict[str, int]:
        """How many there were so far of each kind: `"ok"`, or the name of a fault."""
        with urlopen(f"{self.url}/answers") as answer:
            counts: dict[str, int] = json.loads(answer.read())
        return counts


class _Server:
    """What all connections share."""

    def __init__(self, size: int, latency_s: float, faults: Faults) -> None:
        body = (bytes(range(256)) * (-(-size // 256)))[:size]
        self.answer = _answer("200 OK", body)
        self.truncated = self.answer[: len(self.answer) - size // 2 - 1]
        self.latency_s = latency_s
        self.faults = faults
        self.counts: Counter[str] = Counter()
        self._asked: Counter[bytes] = Counter()
        self._tokens = faults.per_second / 10
        self._at = 0.0

    def fate(self, path: bytes) -> str:
        """What becomes of a request."""
        faults = self.faults
        if faults.per_second and not self._allows(asyncio.get_running_loop().time()):
            return "throttled"
        self._asked[path] += 1
        chance = random.Random(f"{faults.seed} {path!r} {self._asked[path]}").random()
        for name in ("unavailable", "hang", "truncated", "slow"):
            chance -= getattr(faults, name)
            if chance < 0:
                return name
        return "ok"

    def _allows(self, now: float) -> bool:
        most = self.faults.per_second / 10
        self._tokens = min(most, self._tokens + (now - self._at) * self.faults.per_second)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def _answer(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class _Answers(asyncio.Protocol):
    """One connection: an answer for each request, in order."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._rest = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *requests, self._rest = (self._rest + data).split(b"\r\n\r\n")
        for request in requests:
            self._serve(request.split(b" ", 2)[1])

    def _serve(self, path: bytes) -> None:
        server = self._server
        if path == b"/answers":
            self._send(_answer("200 OK", json.dumps(server.counts).encode()))
            return
        fate = server.fate(path) if server.faults != Faults() else "ok"
        server.counts[fate] += 1
        later = asyncio.get_running_loop().call_later
        match fate:
            case "hang":
                pass
            case "throttled":
                later(server.latency_s, self._send, _answer("429 Too Many Requests", b""))
            case "unavailable":
                later(server.latency_s, self._send, _answer("503 Service Unavailable", b""))
            case "truncated":
                later(server.latency_s, self._send, server.truncated, True)
            case _:
                later(server.faults.slow_s if fate == "slow" else server.latency_s, self._send, server.answer)

    def _send(self, answer: bytes, last: bool = False) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)
            if last:
                self._transport.close()


async def _serve(size: int, latency_s: float, faults: Faults) -> None:
    shared = _Server(size, latency_s, faults)
    server = await asyncio.get_running_loop().create_server(lambda: _Answers(shared), "127.0.0.1", 0, backlog=4096)
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
    run(_serve(int(sys.argv[1]), float(sys.argv[2]), Faults(**json.loads(sys.argv[3]))))


if __name__ == "__main__":
    main()
