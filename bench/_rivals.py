"""Pipelines of rivals that several scripts share, each as its own documentation recommends."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

__all__ = ["async_items", "quiet_grain", "spdl_loader"]


async def async_items(items: Iterable[Any]) -> AsyncIterator[Any]:
    """For SPDL: reading an async source costs it no thread hop per item."""
    for item in items:
        yield item


class spdl_loader:  # noqa: N801 - it stands where a function would
    """Builds an SPDL pipeline for each epoch, as its documentation says: a pipeline is for one.

    Args:
        describe: Adds source and stages to a new `PipelineBuilder`.
        threads: Of the pipeline.
        sink: Batches held ahead.
        stats: Its default statistics; False: the settings that its documentation gives for the least overhead.
        thread_queue: Its opt-in output queue, which is cheaper per batch.
    """

    def __init__(
        self,
        describe: Callable[[Any], Any],
        *,
        threads: int,
        sink: int = 3,
        stats: bool = True,
        thread_queue: bool = False,
    ) -> None:
        self._describe = describe
        self._threads = threads
        self._sink = sink
        self._settings: dict[str, Any] = {"use_thread_output_queue": True} if thread_queue else {}
        if not stats:
            from spdl.pipeline import AsyncQueue

            self._settings |= {"queue_class": AsyncQueue, "task_hook_factory": lambda _: []}

    def __iter__(self) -> Iterator[Any]:
        from spdl.pipeline import PipelineBuilder

        builder = self._describe(PipelineBuilder()).add_sink(self._sink)
        pipeline = builder.build(num_threads=self._threads, **self._settings)
        with pipeline.auto_stop():
            yield from pipeline


def quiet_grain() -> Any:
    """The module `grain`, without its remarks about JAX, which it does not need here."""
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)
    import grain

    return grain
