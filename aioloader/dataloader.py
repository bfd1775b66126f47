"""`DataLoader`: torch's constructor and meaning, over our engine."""

from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar, Unpack, overload

import torch
import torch.utils.data
from torch import Tensor

from aioloader.core.checks import check_integer
from aioloader.core.policies import Hedge, Rate, Retry
from aioloader.core.skip import Skip
from aioloader.core.typevars import T_co
from aioloader.device import DeviceLike, check_device
from aioloader.drop_in.arguments import Arguments, is_async_iterable, worker_type_of
from aioloader.drop_in.loader import DropInLoader
from aioloader.executors.processes.fork_server import check_processes
from aioloader.executors.ray.workers import RayWorkers, actors_for
from aioloader.signatures import (
    AsyncIndexed,
    Data,
    DataLoaderOptions,
    DictOfStackables,
    Indexed,
    Iterated,
    OwnOptions,
    Stackable,
    TupleWithNames,
    Unknown,
)
from aioloader.sources.epoch_sampling import EpochSampling
from aioloader.sources.rank_sampler import RankSampler, check_shards
from aioloader.sources.resolve import check_dataset
from aioloader.torch_shims import AsyncStandIn

__all__ = ["DataLoader"]

K = TypeVar("K")
S = TypeVar("S")


class DataLoader(DropInLoader[T_co]):
    """A drop-in for `torch.utils.data.DataLoader`: the same arguments, the same batches for the same seed.

    It is no subclass of torch's: trainers rebuild a subclass as a plain one. Two things are different, unless
    `worker_type="process"` asks for torch's way:

    - Workers are threads of this process: one copy of the dataset, nothing pickled, the first batch at once. Python
      code that holds the GIL does not get faster by them.
    - An `IterableDataset` is read once, by one thread, however many workers there are: no sample comes twice. The
      workers collate.

    A dataset with `async def __getitem__` or `async def __getitems__`, or an async iterable, is awaited on the event
    loop: the caller's under `async for`, a private one under `for`.

    Args:
        dataset: As in torch, or async.
        batch_size: As in torch, like all arguments up to `in_order`.
        shuffle: See torch.
        sampler: See torch.
        batch_sampler: See torch.
        num_workers: Threads. 0: everything in the consumer's thread inside `next()`, nothing ahead; under `async for`,
            one thread, so that the event loop is never blocked.
        collate_fn: See torch; an async one is awaited on the event loop, with worker processes too.
        pin_memory: See torch.
        drop_last: See torch; at most one batch is dropped, whatever the number of workers.
        timeout: Seconds to wait for one batch; the batch is not lost.
        worker_init_fn: Called once in each worker, in its thread or process, with its number.
        multiprocessing_context: Checked, and of no effect on threads.
        generator: See torch: the same draws in the same order.
        prefetch_factor: Batches per worker, being made or finished.
        persistent_workers: Worker processes stay from one epoch to the next; threads cost nothing to start.
        pin_memory_device: Deprecated in torch and ignored.
        in_order: See torch.
        device: Where batches go: `.to(device)` of `Pipeline`.
        concurrency: Samples of an async dataset under way at once; default 64, or what `Objects` says.
        ahead: Batches being made or finished, in all, at least `num_workers`; instead of `prefetch_factor`. Of a
            dataset with `async def __getitem__` it is samples, at least `concurrency`. Default: `2 * num_workers`
            batches, as torch; while a slow one holds up finished ones after it, more begin, up to `16 * num_workers` or
            256 MiB of finished ones. With a `prefetch_factor` there are exactly `prefetch_factor * num_workers`.
        ahead_bytes: The same in bytes, by the running mean of what came; there is always room for `num_workers`.
        worker_type: `"thread"`, or `"process"` for Python code that holds the GIL: worker processes as torch's, each
            with a copy of the dataset, but started from a small process of their own and not forked from this one.
            `"ray"`, or `aioloader.ray.RayWorkers(...)`: `num_workers` actors of a Ray cluster, each with a copy of the
            dataset, which has keys; they stay until the loader is closed. See `docs/ray.md`.
        worker_method: torch's word for `worker_type`, in versions that have it: `"multiprocessing"` or `"thread"`.
        seed: With it the order depends on the seed and the epoch alone, and no global random state is drawn from.
        skip_errors: A `Skip`, or True for its defaults: samples that cannot be loaded are left out of their batches,
            which are shorter then, and a batch without any is left out. A batch that fails as a whole (its samples do
            not fit together, its worker process died) still raises. Of an iterable dataset what is left out is a sample
            whose source goes on after its error, as those of `aioloader.sources` do; an iterator that raises is over.
        retry: Attempts for a sample, or a `Retry`, as in `Pipeline.map`. With this or one of the following, samples are
            loaded one by one, by `__getitem__`; for datasets with keys.
        sample_timeout: Seconds for one attempt at one sample; for async datasets and worker processes.
        hedge: A second call for a sample that takes long; for async datasets.
        rate: How many samples are begun in a second; may be shared with other loaders.
        shard: Give this rank's part, the same as `sampler=DistributedSampler(dataset, shuffle=shuffle, seed=seed or 0)`
            which is told each epoch. The ranks are those of `torch.distributed` when an epoch begins, else those of
            RANK and WORLD_SIZE; without any, all samples come. For datasets with a length.

    Raises:
        ValueError, TypeError: For the same arguments as torch's.
    """

    @overload
    def __init__(
        self,
        dataset: Iterated[S],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: Callable[[list[S]], Coroutine[Any, Any, T_co]],
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        dataset: AsyncIndexed[S],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: Callable[[list[S]], Coroutine[Any, Any, T_co]],
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        dataset: Indexed[S],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: Callable[[list[S]], Coroutine[Any, Any, T_co]],
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        dataset: Iterated[S],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: Callable[[list[S]], T_co],
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        dataset: AsyncIndexed[S],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: Callable[[list[S]], T_co],
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        dataset: Indexed[S],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: Callable[[list[S]], T_co],
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[Any]",
        dataset: Unknown | Data[Unknown],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[Tensor]",
        dataset: Data[Stackable],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[list[str]]",
        dataset: Data[str],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[list[bytes]]",
        dataset: Data[bytes],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[dict[K, Any]]",
        dataset: Data[dict[K, Unknown]],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[dict[K, Tensor]]",
        dataset: Data[DictOfStackables[K]],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[dict[K, Any]]",
        dataset: Data[dict[K, Any]],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[Any]",
        dataset: Data[TupleWithNames],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[list[Tensor]]",
        dataset: Data[tuple[Stackable, ...]],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[list[Any]]",
        dataset: Data[tuple[Any, ...]],
        batch_size: int = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[Any]",
        dataset: Data[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        *,
        collate_fn: None = None,
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "DataLoader[Any]",
        dataset: Data[Any],
        batch_size: None,
        *,
        collate_fn: Callable[[Any], Any],
        **options: Unpack[DataLoaderOptions],
    ) -> None: ...

    @overload  # as torch: all of them by position
    def __init__(
        self: "DataLoader[Any]",
        dataset: Data[Any],
        batch_size: int | None,
        shuffle: bool | None,
        sampler: Any,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        **options: Unpack[OwnOptions],
    ) -> None: ...

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        device: DeviceLike | None = None,
        concurrency: int | None = None,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        worker_type: Literal["thread", "process", "ray"] | RayWorkers = "thread",
        worker_method: Literal["multiprocessing", "thread"] | None = None,
        seed: int | None = None,
        skip_errors: Skip | bool | None = None,
        retry: Retry | int | None = None,
        sample_timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
        shard: bool = False,
    ) -> None:
        super().__init__()
        check_dataset(dataset)
        self._order = _shown_order(shuffle, sampler, batch_sampler, shard)
        if shard:
            check_shards(dataset, sampler, batch_sampler)
            seed = None if seed is None else check_integer("seed", seed)
            shuffle, sampler = None, RankSampler(dataset, shuffle=bool(shuffle), seed=seed or 0)
        # torch's own constructor checks the arguments, makes the samplers and knows the length. With one worker at
        # most, since it warns of more processes than cores.
        torch_loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            AsyncStandIn(dataset) if is_async_iterable(dataset) else dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers if num_workers < 1 else 1,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            in_order=in_order,
        )
        if prefetch_factor == 0:
            raise ValueError("prefetch_factor must be at least 1, got 0; leave it out for 2")
        worker_type = worker_type_of(worker_method, worker_type)
        actors = actors_for(worker_type)
        if worker_type == "process":
            check_processes("worker_type='process'")
        if seed is not None and generator is not None:
            raise ValueError("seed and generator both decide the order; pass one of them")
        if device is not None:
            check_device(device)
        seed = None if seed is None else check_integer("seed", seed)
        sampling = EpochSampling(torch_loader, shuffled=bool(shuffle), seed=seed, persistent=persistent_workers)
        arguments = Arguments(
            torch_loader=torch_loader,
            dataset=dataset,
            batch_size=torch_loader.batch_size,
            drop_last=torch_loader.drop_last,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            prefetch_factor=torch_loader.prefetch_factor,
            bounded=prefetch_factor is not None,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
            device=device,
            worker_type=worker_type,
            actors=actors,
            shard=bool(shard),
        ).checked(
            concurrency=concurrency,
            ahead=ahead,
            ahead_bytes=ahead_bytes,
            skip_errors=skip_errors,
            retry=retry,
            sample_timeout=sample_timeout,
            hedge=hedge,
            rate=rate,
        )
        self._is_made_of(arguments, sampling)


def _shown_order(shuffle: bool | None, sampler: object, batch_sampler: object, shard: bool) -> str:
    """What decides the order, as in a call."""
    parts = ["shuffle=True"] if shuffle else []
    for name, value in (("sampler", sampler), ("batch_sampler", batch_sampler)):
        parts += [] if value is None else [f"{name}={type(value).__name__}"]
    return ", ".join(parts + (["shard=True"] if shard else []))
