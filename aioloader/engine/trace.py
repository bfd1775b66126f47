"""What `loader.trace(path)` returns: the trace that is being written."""

from os import PathLike
from pathlib import Path
from typing import Protocol, Self
from weakref import ref

from aioloader.engine.tracing import Tracer
from aioloader.insight.trace_file import TraceFile

__all__ = ["Trace"]


class Traced(Protocol):
    """A loader."""

    _tracer: Tracer | None


class Trace:
    """A trace that is being written; made by `loader.trace`.

    An epoch that has begun goes on writing until the file is closed; then it goes on without.

    Args:
        loader: What is traced.
        path: The file.
        every: One sample in so many.
        max_bytes: How large the file may become.
    """

    def __init__(self, loader: Traced, path: str | PathLike[str], every: int, max_bytes: int) -> None:
        self._file = TraceFile(Path(path), f"aioloader: {loader!r}", max_bytes)
        self._loader = ref(loader)
        self.tracer = Tracer(self._file, every)

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def closed(self) -> bool:
        """Whether it is complete."""
        return self._file.closed

    def close(self) -> None:
        """Write what has come, and trace no more. Idempotent."""
        loader = self._loader()
        if loader is not None and loader._tracer is self.tracer:
            loader._tracer = None
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<trace of one sample in {self.tracer.every} in {str(self.path)!r}{', closed' if self.closed else ''}>"
