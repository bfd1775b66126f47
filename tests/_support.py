"""What several test files need: one word for both faces, deadlines, and loop turns instead of time."""

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from time import monotonic
from typing import Any, Final, Literal, Protocol, Self, TypeVar

import psutil
import pytest

from aioloader.testing import Gate

T = TypeVar("T")

DEADLINE: Final = 30.0
"""Seconds after which a wait fails; no wait of a passing test comes near it."""

Face = Literal["for", "async for"]
FACES: Final[tuple[Face, Face]] = ("for", "async for")
on_both_faces: Final = pytest.mark.parametrize("face", FACES)


class Loader(Protocol):
    """What all loaders have in common: both faces, and their end."""

    def __iter__(self) -> Iterator[Any]: ...
    def __aiter__(self) -> AsyncIterator[Any]: ...
    def close(self) -> None: ...
    async def aclose(self) -> None: ...


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` on a fresh event loop: within the deadline, and leaving no task."""

    async def watched() -> T:
        async with asyncio.timeout(DEADLINE):
            result = await main()
        await until_no_task_left({asyncio.current_task()})
        return result

    with asyncio.Runner() as runner:
        return run_on(runner, watched)


def run_on(runner: asyncio.Runner, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """`runner.run(main())`, for which the result costs nothing.

    A runner asks for the handler of SIGINT when its task is done, and `signal` shows that handler in an error that it
    catches: with it the task, and with that its result. To show a tensor takes longer than most steps.
    """
    results: list[T] = []

    async def keep() -> None:
        results.append(await main())

    runner.run(keep())
    return results[0]


def collect(loader: Loader, face: Face, *, limit: int | None = None) -> list[Any]:
    """The batches of one epoch, or the first `limit` of them, through `face`."""
    with Steps(loader, face) as steps:
        return steps.rest(limit)


def workers() -> set[int]:
    """Worker processes that are alive: children of the loader servers, which are children of the fork server."""
    found = set()
    for parent in psutil.Process().children():
        for server in parent.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {worker.pid for worker in server.children()}
    return found


class Steps:
    """An iterator of `loader` that is moved step by step, in the same words for both faces.

    Under `async for` each step runs the loop until the batch is there, and between two steps the loop stands still.
    """

    def __init__(
        self, loader: Loader, face: Face, *, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    ) -> None:
        self._loader = loader
        self._face = face
        self._loop_factory = loop_factory  # of `async for`
        self._runner: asyncio.Runner | None = None
        self._iterator: Any = None

    def __enter__(self) -> Self:
        if self._face == "for":
            self._iterator = iter(self._loader)
            return self

        async def begin() -> None:  # `async for` asks for the iterator in a running loop
            self._iterator = self._loader.__aiter__()

        self._runner = asyncio.Runner(loop_factory=self._loop_factory)
        try:
            self._runner.run(begin())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._iterator = None
        if self._runner is None:
            if error is not None:
                self._loader.close()
        else:

            async def finish() -> None:
                if error is not None:  # whose traceback may hold the iterator
                    await self._loader.aclose()
                await until_no_task_left({asyncio.current_task()})

            try:
                self._runner.run(finish())
            finally:
                self._runner.close()

    def next(self) -> Any:
        """The next batch; `StopIteration` at the end on both faces."""
        if self._runner is None:
            return next(self._iterator)

        async def step() -> tuple[bool, Any]:
            deadline = asyncio.timeout(DEADLINE)
            try:
                async with deadline:
                    return True, await self._iterator.__anext__()
            except StopAsyncIteration:
                return False, None
            except TimeoutError:
                if deadline.expired():
                    pytest.fail(f"no batch came within {DEADLINE:g} s")
                raise

        there, batch = run_on(self._runner, step)
        if not there:
            raise StopIteration
        return batch

    def ask(self) -> Callable[[], Any]:
        """Ask for the next batch without waiting for it; returns what waits, and gives it."""
        if self._runner is None:
            return Started(lambda: next(self._iterator)).outcome

        async def begin() -> asyncio.Future[Any]:
            asked: asyncio.Future[Any] = asyncio.ensure_future(self._iterator.__anext__())
            return asked

        async def wait() -> Any:
            async with asyncio.timeout(DEADLINE):
                return await asked

        asked = self._runner.run(begin())
        return lambda: self.do(wait)

    def do(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `main` on the loop of `async for`."""
        assert self._runner is not None
        return run_on(self._runner, main)

    def until_arrived(self, gate: Gate, n: int) -> None:
        """Let the loader work until `n` calls have come to `gate`."""
        if self._runner is None:
            gate.wait_arrived(n)
        else:
            self._runner.run(gate.until_arrived(n))

    def settle(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Let the loader do all that it can without the consumer; `loop` is the one that user code saw."""
        assert loop is not None
        if self._runner is None:
            asyncio.run_coroutine_threadsafe(turns(), loop).result(DEADLINE)
        else:
            self._runner.run(turns())

    def rest(self, limit: int | None = None) -> list[Any]:
        """All batches that are to come, or the next `limit`."""
        batches: list[Any] = []
        while limit is None or len(batches) < limit:
            try:
                batches.append(self.next())
            except StopIteration:
                break
        return batches

    def outcomes(self, limit: int = 1000) -> list[Any]:
        """All that is to come, or the next `limit`: batches, and the exceptions that were raised in their places."""
        found: list[Any] = []
        while len(found) < limit:
            try:
                found.append(self.next())
            except StopIteration:
                return found
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                found.append(error)
        if limit < 1000:
            return found
        pytest.fail(f"the epoch does not end: {found[:10]} ...")


async def until_no_task_left(known: "set[asyncio.Task[Any]] | set[asyncio.Task[Any] | None]") -> None:
    """Wait until no task but `known` ones and the caller's is pending; at need, garbage is collected first."""
    for _ in range(10):
        await asyncio.sleep(0)
    known = {*known, asyncio.current_task()}
    if not asyncio.all_tasks() - known:
        return
    gc.collect()
    left = asyncio.all_tasks() - known
    if left:
        _, left = await asyncio.wait(left, timeout=10)
    assert not left, f"tasks left: {left}"


async def turns(n: int = 2000) -> None:
    """Give the loop `n` turns, enough for whatever can go on without anything from outside."""
    for _ in range(n):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop turns until `condition` holds, at most until the deadline."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - any condition, of any thread
            await asyncio.sleep(0)


def wait_until(condition: Callable[[], bool]) -> None:
    """The same in a thread without a loop; for what other threads or processes do.

    A condition that is long in the asking, as of processes, is asked for less often: they need the cores to get there.
    """
    deadline = monotonic() + DEADLINE
    pause = threading.Event()
    asked = monotonic()
    while not condition():
        now = monotonic()
        assert now < deadline, "it does not come to that"
        pause.wait(max(0.001, 4 * (now - asked)))
        asked = monotonic()


class Started(threading.Thread):
    """A thread that runs `fn` from now on; its outcome is waited for with a deadline."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        super().__init__(name="test", daemon=True)
        self._fn = fn
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._fn()
        except BaseException as error:
            self._error = error

    def outcome(self) -> Any:
        """What the function returned or raised."""
        self.join(DEADLINE)
        assert not self.is_alive(), "the thread hangs"
        if self._error is not None:
            raise self._error
        return self._result


def join_loader_threads() -> None:
    """Wait until the threads of all loaders have ended by themselves."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("aioloader"):
            thread.join(DEADLINE)
            assert not thread.is_alive(), f"{thread.name} does not end"


def explained(loader: Any) -> str:
    """What `explain()` says, in one line."""
    return " ".join(loader.explain().split())


def notes(error: BaseException) -> str:
    """The notes of `error` in one text."""
    return "\n".join(getattr(error, "__notes__", ()))


class Child:
    """A Python process that runs `script`, whose lines can be waited for."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._interrupted = False
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def until_line(self, expected: str) -> None:
        """Read the child's output up to the line `expected`."""
        assert self.process.stdout is not None

        def read() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if line.rstrip("\n") == expected:
                    return
            assert self.process.stderr is not None
            pytest.fail(f"the child ended before it said {expected!r}:\n{self.process.stderr.read()}")

        Started(read).outcome()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        self._interrupted = True

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end: exit status, what it wrote (after the last line read), and its errors."""
        # When a signal comes just before a thread begins to wait for a lock, CPython sees it at the next signal only.
        # Somebody at a keyboard is too slow for that; a test is not.
        for _ in range(int(DEADLINE / 0.2) if self._interrupted else 0):
            self.process.send_signal(signal.SIGURG)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
                break
        try:
            out, err = self.process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"the child did not end within {DEADLINE:g} s\n{out}\n{err}")
        return self.process.returncode, out, err
