"""What `executor=` may be, and where that is."""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Literal, TypeAlias

from aioloader.engine.ops import PROCESSES, InProcesses, OnRay
from aioloader.executors.processes.fork_server import check_processes
from aioloader.executors.ray.workers import RayWorkers
from aioloader.sources.resolve import describe

__all__ = ["AnyExecutor", "RayExecutor", "check_executor", "kind_of"]

RayExecutor: TypeAlias = Literal["ray"] | RayWorkers
AnyExecutor: TypeAlias = Executor | Literal["thread", "process"] | RayExecutor


def check_executor(executor: Any, fn: Callable[[Any], Any], is_async: bool) -> Executor | InProcesses | OnRay | None:
    """The place that the user has named; None: threads of the loader, or its loop.

    Raises:
        ImportError: It needs what is not installed.
        TypeError, ValueError: There is no such place, or the function cannot run there.
    """
    if executor is None or executor == "thread":
        return None
    if executor == "ray" or isinstance(executor, RayWorkers):
        return OnRay(executor if isinstance(executor, RayWorkers) else RayWorkers())
    if executor == "process":
        check_processes("executor='process'")
    elif not callable(getattr(executor, "submit", None)):
        kind = ValueError if isinstance(executor, str) else TypeError
        raise kind(f"executor must be a concurrent.futures.Executor, 'thread', 'process' or 'ray', got {executor!r}")
    if is_async:
        raise ValueError(
            f"executor runs sync functions, but {describe(fn)} is async and awaited on the loop; leave it out"
        )
    return PROCESSES if executor == "process" else executor


def kind_of(executor: Any) -> Any:
    """For `check_policies`."""
    return "ray" if isinstance(executor, RayWorkers) else executor
