"""Awaits where nothing can be awaited: on a loop of its own, in a thread of its own, while the caller waits."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

__all__ = ["in_thread", "run_apart"]

T = TypeVar("T")


def run_apart(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of `main()`. The caller may be on a loop itself, which is blocked meanwhile.

    Nothing is left: when the caller is interrupted, `main` is cancelled, and the thread waited for.

    Raises:
        Exception: What `main` raises.
    """
    outcome: Future[T] = Future()
    loop = asyncio.new_event_loop()
    tasks: list[asyncio.Task[Any] | None] = []
    interrupted = False

    async def run() -> T:
        if interrupted:
            raise asyncio.CancelledError
        tasks.append(asyncio.current_task())
        return await main()

    def work() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                result = runner.run(run())
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    def cancel() -> None:
        for task in tasks:
            if task is not None:
                task.cancel()

    thread = Thread(target=work, name="aioloader-apart", daemon=True)
    try:
        thread.start()  # which waits, too
        return outcome.result()
    except BaseException:
        if not outcome.done():  # the caller was interrupted
            interrupted = True
            with suppress(RuntimeError):  # it is closed by now
                loop.call_soon_threadsafe(cancel)
        raise
    finally:
        if thread.ident is not None:
            thread.join()


async def in_thread(fn: Callable[..., T], *args: Any) -> T:
    """`fn(*args)` in one of the threads of the running loop."""
    return await asyncio.to_thread(fn, *args)
