"""The stages that decide where samples are kept and made, and where batches go."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioloader.cache.disk import DiskStore
from aioloader.cache.memory import MemoryStore
from aioloader.core.checks import check_count
from aioloader.core.typevars import T_co
from aioloader.device import DeviceLike, check_device
from aioloader.executors.processes.fork_server import check_processes
from aioloader.pipeline.described import Described
from aioloader.plan.elsewhere import check_may_leave
from aioloader.plan.plan import before_cache
from aioloader.stages.cache import Cache
from aioloader.stages.device import PinMemory, To
from aioloader.stages.in_process import OwnProcess

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Placing"]


class Placing(Described[T_co]):
    """A cache, a process, page-locked memory, a device."""

    def cache(
        self, *, memory_bytes: int | None = None, disk: str | PathLike[str] | None = None, version: Any = ""
    ) -> "Pipeline[T_co]":
        """Keep the samples that come here, so that the next epoch does not make them again.

        For a cached sample none of the stages before this one runs. Samples of an indexable source with nothing but
        `map`, `filter`, `shuffle()`, `shard`, `take` and `skip` in between are known by their keys, and may come in
        another order in each epoch. All others are known by their position, so the stages before the cache must give
        the same samples in each epoch; a source whose samples are all cached is not even opened. Random augmentation
        belongs after the cache. Errors are not kept.

        In memory the cache belongs to this pipeline and those made of it, and lives as long as they do. Nothing is
        evicted: when the budget is used up, the other samples are made anew in each epoch. Functions after the cache
        get copies, and may change them.

        Args:
            memory_bytes: The budget, at least 1.
            disk: A directory, made when it is needed, which other processes may use at the same time. Samples travel by
                pickle: it is to be trusted as code is.
            version: Of what is before a cache on disk, anything that has a `str`. The directory is refused when it
                was made with another one, or by a pipeline of other stages; change it when functions have changed.

        Raises:
            TypeError: Neither `memory_bytes` nor `disk`, or both.
            ValueError: The directory is not this pipeline's, or samples cannot be told apart from epoch to epoch.
        """
        pipeline = before_cache(self._plan)
        if (memory_bytes is None) == (disk is None):
            raise TypeError(
                f"cache() takes either memory_bytes or disk, got {memory_bytes=} and {disk=}; pass for instance "
                f"cache(memory_bytes=4 << 30) or cache(disk='cache')"
            )
        if memory_bytes is not None:
            return self._then(Cache(MemoryStore(check_count("memory_bytes", memory_bytes, least=1)), pipeline))
        assert disk is not None
        store = DiskStore(Path(disk), str(version))
        store.check(pipeline)
        return self._then(Cache(store, pipeline))

    def in_process(self) -> "Pipeline[T_co]":
        """Run everything before this in a process of its own, for a training loop that is busy in Python.

        There it has an event loop, threads and a GIL of its own, and finished batches come in shared memory that is
        used again. Order, errors at their place, bounds and state are as without it. What is different: all of it is
        pickled (cloudpickle takes what is defined in `__main__`), async sources and functions run on the event loop of
        that process, so that clients must be made there, in a source function or at first use, and what functions
        change is changed there. The process stays from one epoch to the next until the loader is closed or collected.

        Raises:
            ValueError: Something before this cannot go there, or has gone already.
        """
        check_processes("in_process()")
        for stage in self._plan.stages:
            if stage.here_only:
                raise ValueError(f"in_process() must come before {stage.label}, got {self!r}; put it first, once")
        check_may_leave(self._plan, "in_process()", "another process")
        return self._then(OwnProcess())

    def pin_memory(self) -> "Pipeline[T_co]":
        """Put batches into page-locked memory, for copies to a device that you make yourself; `to` does both.

        Without an accelerator it warns and does nothing, as torch's DataLoader does.
        """
        return self._then(PinMemory())

    def to(self, device: DeviceLike) -> "Pipeline[T_co]":
        """Copy batches to `device`, safe to use on the stream that is current at `next()`. The last stage.

        Args:
            device: `"cuda"`, `"cuda:1"`, `"cpu"`, the type of another accelerator that torch knows here (`"xpu"`,
                `"hpu"`, `"npu"`, `"mps"`), a `torch.device`, or the index of a device.

        Raises:
            TypeError, ValueError: Not a device that torch knows.
            DeviceError: A device that is not there.
        """
        check_device(device)
        return self._then(To(device))
