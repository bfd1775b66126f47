"""`DataLoader`: torch's constructor and meaning, over our engine."""

import warnings
from collections.abc import AsyncIterable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, Self, TypeVar, Unpack, overload

import torch
import torch.utils.data
from torch import Tensor
from torch.utils.data import IterableDataset, default_convert

from aioloader.core.checks import check_ahead, check_count, check_integer, is_async_callable
from aioloader.core.memory import Alloc
from aioloader.core.policies import Errors, Hedge, Rate, Retry
from aioloader.core.safe_text import safe_repr
from aioloader.core.skip import Skip, as_skip
from aioloader.core.source import CursorSource
from aioloader.core.typevars import T_co
from aioloader.device import Transfer, check_device, open_transfer, pin_batch, why_not_pinned
from aioloader.engine.delivery import InlineDelivery, SyncDelivery
from aioloader.engine.faces import AsyncBatches, Batches
from aioloader.engine.fuse import InProcesses
from aioloader.engine.inline import InlineMap, InlineSource
from aioloader.engine.node import FoldNode, Node
from aioloader.engine.progress import Progress
from aioloader.engine.ray_step import OnRay
from aioloader.engine.skipping import SkipNode, SkipRule, SkipSamplesRule
from aioloader.engine.stream_source import warn_of_replay
from aioloader.engine.turns import Turns
from aioloader.engine.window import Window
from aioloader.errors import ReplayWarning, StateError
from aioloader.executors.chunk import Call
from aioloader.executors.epochs import epochs_of
from aioloader.executors.partial import over_partial, over_partial_async
from aioloader.executors.processes.fork_server import check_processes
from aioloader.executors.processes.segments import shared_memory
from aioloader.executors.processes.torch_worker import FetchNext, TorchWorker
from aioloader.executors.ray.workers import RayWorkers, actors_for
from aioloader.insight.meters import StageMeter
from aioloader.insight.policies import PolicyMeter
from aioloader.loader import Loader
from aioloader.plan.build import build
from aioloader.plan.plan import DEFAULT_PREFETCH, Plan, Single, guarantee_of_stream
from aioloader.plan.state import Shape, identity_of
from aioloader.plan.unsplit import dataset_gives_all, keys_of_all
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
from aioloader.sources.epoch_sampling import BaseSeed, EpochSampling
from aioloader.sources.fetch import FetchSource
from aioloader.sources.rank_sampler import RankSampler, check_shards
from aioloader.sources.resolve import StreamData, check_dataset, warn_of_live
from aioloader.stages.base import Pass, Stage
from aioloader.stages.batch import Batch, BatchFold, CollateWith
from aioloader.stages.collate import Collate
from aioloader.stages.device import PinMemory, To
from aioloader.stages.flow import Guarantee
from aioloader.stages.group import Group
from aioloader.stages.load import CollateAny, CollateAsync, FetchAsync, FetchBatch, FetchOne
from aioloader.stages.load_one import FetchSample, FetchSampleAsync, TriedInPlace, check_load_policies
from aioloader.stages.map import ASYNC_CONCURRENCY, Map
from aioloader.stages.skip_errors import SkipErrors, rank_for_report
from aioloader.stages.split_join import JoinBatches, SplitBatches
from aioloader.torch_shims import AsyncStandIn, BatchSamplerView

__all__ = ["DataLoader"]

K = TypeVar("K")
S = TypeVar("S")

KEYS_AHEAD: Final = 8
"""Keys of batches that lie ready, where reading them runs no code of the user's: else cheap batches wait for them."""

SAMPLE: Final = "dataset[...]"

_FIXED = ("batch_size", "batch_sampler", "sampler", "drop_last", "dataset", "persistent_workers", "shard")


class DataLoader(Loader[T_co]):
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

    _knob = "num_workers"
    _kind = "DataLoader"

    @property
    def _split_by(self) -> str:  # type: ignore[override]  # a plain attribute where it is always the same
        if self._iterable:
            return "use Pipeline(dataset).shard(), whose map and batch do the rest"
        return "pass sampler=DistributedSampler(dataset), or shard=True, which deals the same keys"

    # The attributes of torch's that programs read. Not `sampler` and not `_iterator`: trainers act on these.
    dataset: Any
    batch_size: int | None
    drop_last: bool
    num_workers: int

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
        device: Any = None,
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
        is_async_iterable = isinstance(dataset, AsyncIterable | CursorSource) and not hasattr(dataset, "__getitem__")
        self.shard = bool(shard)
        if self.shard:
            check_shards(dataset, sampler, batch_sampler)
            seed = None if seed is None else check_integer("seed", seed)
            shuffle, sampler = None, RankSampler(dataset, shuffle=bool(shuffle), seed=seed or 0)
        # torch's own constructor checks the arguments, makes the samplers and knows the length. With one worker at
        # most, since it warns of more processes than cores.
        self._torch: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            AsyncStandIn(dataset) if is_async_iterable else dataset,
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
        if worker_method is not None:
            worker_type = _worker_type_of(worker_method, worker_type)
        self._actors = actors_for(worker_type)
        if worker_type == "process":
            check_processes("worker_type='process'")
        if seed is not None and generator is not None:
            raise ValueError("seed and generator both decide the order; pass one of them")
        if device is not None:
            check_device(device)
        self.dataset = dataset
        self.batch_size = self._torch.batch_size
        self.drop_last = self._torch.drop_last
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.pin_memory = pin_memory
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.prefetch_factor = self._torch.prefetch_factor
        self.persistent_workers = persistent_workers
        self.pin_memory_device = pin_memory_device
        self.in_order = in_order
        self.device = device
        if concurrency is not None:
            self.concurrency = check_count("concurrency", concurrency, least=1)
        else:
            self.concurrency = dataset.concurrency if isinstance(dataset, FetchSource) else ASYNC_CONCURRENCY
        self.worker_type = worker_type
        seed = None if seed is None else check_integer("seed", seed)
        self._keys = EpochSampling(self._torch, shuffled=bool(shuffle), seed=seed, persistent=persistent_workers)
        self._iterable = is_async_iterable or isinstance(dataset, IterableDataset)
        self._awaited = is_async_iterable or _is_async(dataset, "__getitem__") or _is_async(dataset, "__getitems__")
        self._collates_async = collate_fn is not None and is_async_callable(collate_fn)
        self._in_processes = worker_type != "thread" and num_workers > 0
        if self._in_processes:
            check_loaded_elsewhere(self._actors, iterable=self._iterable, awaited=self._awaited)
        self.skip_errors = as_skip(skip_errors)
        if self.skip_errors is not None and self._workers_read:
            raise ValueError(
                "skip_errors cannot leave samples out of an IterableDataset that worker processes read: its iterators "
                "are theirs, and over when they raise; use worker_type='thread', or a dataset with __getitem__"
            )
        self.policies = check_load_policies(
            dataset,
            retry=retry,
            sample_timeout=sample_timeout,
            hedge=hedge,
            rate=rate,
            iterable=self._iterable,
            awaited=self._awaited,
            in_processes=self._in_processes,
            retried_by_itself=isinstance(dataset, FetchSource),
        )
        self.ahead, self.ahead_bytes = self._check_ahead(ahead, ahead_bytes, prefetch_factor)
        self._grows = prefetch_factor is None and ahead is None and num_workers > 0
        self._timeout = timeout or None
        self._timeout_message = "DataLoader timed out after {seconds} seconds"
        self._initialized = True

    def _check_ahead(self, ahead: Any, ahead_bytes: Any, prefetch_factor: int | None) -> tuple[int | None, int | None]:
        """How much may be ahead, checked.

        Raises:
            TypeError, ValueError: It does not fit.
        """
        width, of = self.num_workers, "num_workers"
        if self._awaits_samples:
            width, of = self.concurrency, "concurrency"
        if isinstance(self.dataset, FetchSource):
            ahead = self.dataset.ahead if ahead is None else ahead
            ahead_bytes = self.dataset.ahead_bytes if ahead_bytes is None else ahead_bytes
        ahead, ahead_bytes = check_ahead(ahead, ahead_bytes, width, of=of)
        if ahead is not None and prefetch_factor is not None:
            raise ValueError(f"{ahead=} and {prefetch_factor=} both say how much is ahead; pass one of them")
        if (ahead or ahead_bytes) and not (self.num_workers or self._awaited):
            raise ValueError(
                f"ahead and ahead_bytes need workers, got {ahead=}, {ahead_bytes=} with num_workers=0, which makes "
                f"nothing ahead; pass num_workers=1 or more"
            )
        return ahead, ahead_bytes

    @property
    def _awaits_samples(self) -> bool:
        """Whether the samples of a batch are loaded one by one, `concurrency` at once."""
        if self._iterable or not self._awaited:
            return False
        together = self._torch.batch_sampler is not None and _is_async(self.dataset, "__getitems__")
        return self.policies is not None if together else _is_async(self.dataset, "__getitem__")

    @property
    def _loads_samples(self) -> bool:
        """The same, or the workers load them so."""
        batched = not self._iterable and self._torch.batch_sampler is not None
        return self._awaits_samples or (batched and self.policies is not None)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":
            raise AttributeError(
                "DataLoader shows no attribute 'sampler', since trainers replace what they find there; "
                "call loader.set_epoch(epoch), which reaches your sampler"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and getattr(self, "_initialized", False):
            raise ValueError(f"{name} attribute should not be set after DataLoader is initialized; make a new one")
        super().__setattr__(name, value)

    @property
    def generator(self) -> torch.Generator | None:
        """See torch."""
        return self._keys.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self._keys.generator = generator
        self._fixed = None

    @property
    def seed(self) -> int | None:
        """With it the order depends on the seed and the epoch alone."""
        return self._keys.seed

    @property
    def batch_sampler(self) -> BatchSamplerView:
        """A view of the batch sampler, for trainers: `batch_sampler.sampler.set_epoch(n)` reaches the loader."""
        return BatchSamplerView(self._torch.batch_sampler, self.__len__, self.set_epoch)

    # -- iteration ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches per epoch.

        Raises:
            TypeError: The dataset has no length.
        """
        return len(self._torch)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        seed = "" if self.seed is None else f", seed={self.seed}"
        return (
            f"DataLoader({type(self.dataset).__name__}, batch_size={self.batch_size}, num_workers={self.num_workers}"
            f"{seed})"
        )

    def __aiter__(self) -> AsyncBatches[T_co]:
        return super().__aiter__()

    def __iter__(self) -> Batches[T_co]:
        warn_of_live(self, self.dataset)
        self._check_usable()
        return Batches(self)

    def _check_usable(self) -> None:
        if self.timeout and self.num_workers == 0:
            # The type that torch's iterator raises.
            raise AssertionError(f"timeout needs num_workers > 0, got timeout={self.timeout} with num_workers=0")
        if self.pin_memory and self.device is None and (reason := why_not_pinned()) is not None:
            warnings.warn(
                f"'pin_memory' argument is set as true but {reason}, then device pinned memory won't be used.",
                stacklevel=3,
            )

    def set_epoch(self, epoch: int) -> None:
        """Let the next epoch be number `epoch`, and tell the samplers and the dataset that have a `set_epoch`."""
        super().set_epoch(epoch)
        self._keys.set_epoch(epoch)

    # -- without workers ---------------------------------------------------------------------------------------------

    def _open_delivery(self) -> SyncDelivery | InlineDelivery:
        if self.num_workers or self._awaited or self._collates_async:
            return super()._open_delivery()
        with self._beginning() as progress:
            node, meters = self._inline_nodes(progress)
        self._watch(progress, meters)
        return InlineDelivery(node, progress, self._receiver())

    def _gives_all(self) -> bool:
        if not dataset_gives_all(self.dataset, indexed=not self._iterable):
            return False
        return self._iterable or keys_of_all(self._torch.batch_sampler or self._torch.sampler)

    def _nothing_to_tune(self) -> str | None:
        if self._in_processes:
            return "here worker processes load the samples; measure other num_workers epoch by epoch"
        if not (self.num_workers or self._awaited):
            return "num_workers=0 loads them in your own thread; pass num_workers=2 or more"
        return None

    @property
    def _bounded(self) -> bool:
        return self.ahead is not None or self.ahead_bytes is not None

    def _begins(self, progress: Progress) -> None:
        if not self._iterable:
            progress.batch_size = self.batch_size
        if progress.cursor is not None:  # the rest of it comes in that order, whatever they were told since
            self._keys.set_epochs(progress.loader_state, told=not progress.epoch_pinned)
        progress.loader_state |= self._keys.epochs()

    def _inline_nodes(self, progress: Progress) -> tuple[Node, list[StageMeter]]:
        epoch = progress.epoch
        transfer = self._open_transfer()
        alloc = self._alloc(transfer)
        source: Node
        before: SkipRule | None = None
        log: PolicyMeter | None = None
        if self._iterable:
            self._keys.draw_base_seed(progress)
            source = inline_source = InlineSource(self.dataset, "source", epoch)
            if self.batch_size is not None:
                if self.skip_errors is not None:
                    before = SkipRule(self.skip_errors, epoch)
                    source = SkipNode(source, before)
                source = FoldNode(source, BatchFold(self.batch_size, drop_last=self.drop_last))
            calls = [Call(self._collate_call(alloc), False, "collate")]
        else:
            source = inline_source = InlineSource(self._keys.of(progress), "sampler", epoch, keys=True)
            rng_seed = self._sample_seed(self._rng_seed)
            seed = self._pass(progress).seed(rng_seed, "sample 1")  # as `plan.build` numbers it
            data = self.dataset
            if self.policies is not None:
                log = PolicyMeter(self.policies)
                data = TriedInPlace(data, self.policies, lambda attempt: inline_map.retried(attempt), log)
            calls = [Call(self._fetch(alloc, data), False, "fetch", seed)]
        if transfer is not None and self.device is not None:
            calls.append(Call(over_partial(transfer.send), False, f"to({self.device})"))
        elif transfer is not None:
            backend = transfer.backend
            calls.append(Call(over_partial(lambda batch: pin_batch(batch, backend)), False, "pin_memory()"))
        output: Node
        output = inline_map = InlineMap(source, calls, epoch, ordered=self._ordered)
        inline_map.meter.policies = log
        meters = [inline_source.meter, inline_map.meter]
        if before is not None:
            meters.insert(1, before.meter)
        elif (rule := self._skip_rule(epoch)) is not None:
            output = SkipNode(inline_map, rule)
            meters.append(rule.meter)
        if progress.cursor is not None:
            output.resume(progress.cursor)
            if self._iterable:
                warn_of_replay(progress.cursor if self.skip_errors is None else progress.cursor[0], "source")
        return output, meters

    def _skip_rule(self, epoch: int) -> SkipRule | None:
        """What leaves samples, or those of a batch, out; None: nothing does, or what does is before `batch`."""
        skip = self.skip_errors
        if skip is None or self._skips_before_batch:
            return None
        rank = None if skip.report is None else rank_for_report()
        if self._torch.batch_sampler is None:
            return SkipRule(skip, epoch, rank)
        return SkipSamplesRule(skip, epoch, rank, batch_size=self.batch_size)

    @property
    def _skips_before_batch(self) -> bool:
        """Samples of a stream are left out before they are batched."""
        return self.skip_errors is not None and self._iterable and self.batch_size is not None

    @property
    def _leaves_out(self) -> Errors:
        """The types of errors."""
        return () if self.skip_errors is None else self.skip_errors.on

    # -- with workers, or on a loop ----------------------------------------------------------------------------------

    def _build(self, progress: Progress) -> Window:
        base = BaseSeed()
        if self._workers_read:
            self._begin_turns(progress, base)
        elif self._iterable:
            self._keys.draw_base_seed(progress)
        return self._nodes(progress, self._open_transfer(), base)

    def _nodes(
        self,
        progress: Progress,
        transfer: Transfer | None = None,
        base: BaseSeed | None = None,
    ) -> Window:
        stages: list[Stage]
        if self._in_processes:
            alloc = None
            source, stages = self._in_workers(progress, BaseSeed() if base is None else base)
        else:
            alloc = self._alloc(transfer)
            keys = partial(self._keys.of, progress)
            source = StreamData(self.dataset if self._iterable else keys, call=not self._iterable, single_use=False)
            stages = self._stages(alloc)
        if self.device is not None:
            stages.append(To(self.device))
        elif transfer is not None:
            stages.append(PinMemory())
        nbytes = None if self._awaits_samples else self.ahead_bytes
        plan = Plan(self._single(source), tuple(stages), room=self._room, grows=self._grows, nbytes=nbytes)
        window = build(plan, self._pass(progress), transfer, alloc, self._open_processes)
        window.rule = self._skip_rule(progress.epoch)
        return window

    def _in_workers(self, progress: Progress, base: BaseSeed) -> tuple[StreamData, list[Stage]]:
        """Each worker process loads and collates whole batches, in turn, as in torch."""
        turns = Turns(self.num_workers) if self._iterable else None
        prepare = partial(_torch_worker, self.dataset, self.num_workers, base, self.worker_init_fn)
        epochs = partial(epochs_of, dataset=self.dataset, told=self._keys.told_epoch)
        place: InProcesses | OnRay
        if self._actors is not None:
            place = OnRay(self._actors, prepare, epochs, seeds_each=True)
        else:
            place = InProcesses(
                kept=self.persistent_workers,
                in_turn=(self.in_order and not self._loads_samples) or self._iterable,
                prepare=prepare,
                turns=turns,
                epochs=epochs,
            )
        fetch: Callable[[Any], Any]
        if turns is not None:
            source = StreamData(turns, call=False, single_use=False)
            collate = None if self._collates_async else self._collate_call(shared_memory)
            fetch = FetchNext(self.dataset, self.batch_size, self.drop_last, collate)
        else:
            source = StreamData(partial(self._keys.of, progress, base), call=True, single_use=False)
            fetch = self._fetch(shared_memory)
        if self._loads_samples:
            load = Map(
                FetchSample(self.dataset),
                False,
                self.num_workers,
                executor=place,
                name=SAMPLE,
                ahead=self._samples_ahead,
                grows=self._samples_grow,
                policies=self.policies,
            )
            collate_here = CollateWith(self.collate_fn, self.num_workers, None, partial=self.skip_errors is not None)
            return source, [SplitBatches(self.batch_size), load, JoinBatches(collate_here, self._leaves_out)]
        stages: list[Stage] = [
            Map(fetch, False, self.num_workers, self.in_order, executor=place, name="fetch", policies=self.policies)
        ]
        if self._converts_apart:
            stages.append(self._convert(shared_memory))
        return source, stages

    def _begin_turns(self, progress: Progress, base: BaseSeed) -> None:
        """Give workers that iterate the dataset their base seed: that which they had, where the epoch goes on."""
        record = progress.loader_state
        if progress.cursor is None:
            self._keys.draw_base_seed(progress, base)
            record["base_seed"] = base.value
            return
        if self.generator is not None:
            self._keys.draw_base_seed(progress)  # it moves on, as it did when the epoch began
        base.value = record["base_seed"]
        warnings.warn(
            f"worker processes cannot enter their parts of an IterableDataset in the middle: the resumed epoch reads "
            f"the {progress.batches_before} batches before it again and drops them",
            ReplayWarning,
            stacklevel=2,
        )

    def _single(self, source: StreamData) -> Single:
        if self._iterable:
            return Single(source, name="source")
        ahead = KEYS_AHEAD if self._keys.plain else 0
        return Single(source, name="sampler", keys=True, ahead=ahead, check=self._keys.check_place)

    def _pass(self, progress: Progress) -> Pass:
        return Pass(progress.epoch, sample_seed=self._sample_seed(self._rng_seed))

    @property
    def _rng_seed(self) -> int | None:
        """Of `sample_rng`, as in `Pipeline`: ranks that share samples need the same one."""
        return 0 if self.shard and self.seed is None else self.seed

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def _ordered(self) -> bool:
        """Whether batches come in the order of their keys; the same for any number of workers, for their cursors."""
        if self.in_order or (self._iterable and self.batch_size is not None):
            return True
        return self._torch.batch_sampler is not None and self._loads_samples

    @property
    def _workers_read(self) -> bool:
        """Each worker process iterates a copy of the dataset, and nobody else knows where it is."""
        return self._in_processes and self._iterable

    @property
    def _reading_workers(self) -> int:
        """How many iterate the dataset each; 0: it is iterated once."""
        return self.num_workers if self._workers_read else 0

    def _shape(self) -> Shape:
        try:
            length = len(self.dataset)
        except (TypeError, NotImplementedError):
            length = None
        shape = [
            {"stage": "source", "name": type(self.dataset).__name__, "length": length} | identity_of(self.dataset),
            {"stage": "stream"} if self._iterable else self._keys.shape(),
            {"stage": "batch", "batch_size": self.batch_size, "drop_last": self.drop_last, "ordered": self._ordered},
        ]
        return shape if self.skip_errors is None else [*shape, {"stage": "skip_errors"}]

    def _guarantee(self) -> Guarantee:
        if self._workers_read:
            return "replayed" if self.in_order else "at-least-once"
        if self._iterable:
            return guarantee_of_stream(self.dataset)
        return "exact" if self._keys.repeatable else "replayed"

    def _never_again(self) -> str | None:
        why = super()._never_again()
        return "samples come in another order each time" if why is None and not self._ordered else why

    def _sure_length(self, *, resumed: bool) -> int | None:
        if self.skip_errors is not None:
            return None  # nobody knows whether a batch is left of them
        if self._iterable or not self._keys.repeatable or self._keys.generators:
            return None  # a generator may be drawn from once more at the end
        try:
            return len(self)
        except TypeError:
            return None

    def _random_state(self) -> dict[str, Any]:
        return self._seed_state(self._rng_seed) | self._keys.state()

    def _generators(self) -> list[torch.Generator]:
        return self._keys.generators

    def _draws_globally(self) -> bool:
        if self._iterable:  # its workers' seeds, where these decide what comes
            return self._workers_read and self.seed is None and self.generator is None
        return self._keys.draws_globally

    def _check_random_state(self, state: dict[str, Any], *, begun: bool) -> None:
        super()._check_random_state(state, begun=begun)
        self._keys.check_state(state)
        if begun and self._workers_read and "base_seed" not in state:
            raise ValueError("'base_seed', which the seeds of the epoch's workers begin with, is missing")

    def _set_random_state(self, state: dict[str, Any]) -> None:
        super()._set_random_state(state)
        self._keys.set_state(state)

    def _set_epochs(self, state: dict[str, Any]) -> None:
        self._keys.set_epochs(state)

    def _replayed(self, random: dict[str, Any]) -> None:
        self._keys.set_epoch_of_dataset(random)

    def _detached(self) -> Self:
        again = super()._detached()
        again._keys = self._keys.detached()
        if self.skip_errors is not None:  # it is written down already
            again.skip_errors = replace(self.skip_errors, report=None)
        again.__dict__["dataset"] = again._keys.dataset  # what the constructor was told cannot be set
        return again

    def _make_state(
        self,
        epoch: int,
        batches: int,
        cursor: Any,
        random: dict[str, Any] | None,
        lengths: Sequence[int | None] | None = None,
        *,
        guarantee: Guarantee | None = None,
    ) -> dict[str, Any]:
        if self._workers_read and not self.in_order:  # the epoch is begun again
            batches, cursor = 0, None
        elif self._workers_read and cursor is not None:
            cursor = (self.num_workers, batches)
        return super()._make_state(epoch, batches, cursor, random, lengths, guarantee=guarantee)

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        cursor = loaded["cursor"]
        if self._iterable and cursor is not None:
            theirs, ours = _reading_workers(cursor), self._reading_workers
            if theirs != ours or (ours and not self.in_order):
                raise StateError(
                    f"the state is in the middle of an epoch of an IterableDataset that {_readers(theirs)} read, and "
                    f"this loader has {_readers(ours)}{'' if self.in_order else ', in_order=False'}, so its parts or "
                    f"their order are others; go on with the former, or begin the epoch anew"
                )
            if ours and cursor[1] != loaded["batches"]:
                raise StateError(
                    f"the 'cursor' of the state is after {safe_repr(cursor[1])} batches, and its 'batches' are "
                    f"{loaded['batches']}: it is broken"
                )
        super()._check_loaded(loaded)

    @property
    def _room(self) -> int | None:
        """Batches being made or finished: torch's bound; without workers none, unless they are awaited.

        None where there are no batches, but samples that are awaited one by one: as many as that has use for.
        """
        if self._awaits_samples and self._torch.batch_sampler is None and self.prefetch_factor is None:
            return None
        if self._loads_samples and not self._awaits_samples and self._samples_ahead is not None:
            return self.num_workers  # the others are samples yet
        return self._most_batches

    @property
    def _most_batches(self) -> int:
        """Being made or finished."""
        if self.ahead is not None and not self._awaits_samples:
            return self.ahead
        if self.num_workers:
            return (self.prefetch_factor or 2) * self.num_workers
        return DEFAULT_PREFETCH if self._awaited else 0

    @property
    def _samples_ahead(self) -> int | None:
        """Being loaded or finished, where workers load them one by one; None: as many as that has use for.

        These are the samples of the batches that may be ahead, but of one batch for each worker, which is collated. Not
        so with a batch sampler that does not tell its `batch_size`.
        """
        if not self.num_workers:
            return 0
        size = getattr(self._torch.batch_sampler, "batch_size", None)
        if type(size) is not int:
            return None
        return max(self.num_workers, (self._most_batches - self.num_workers) * size)

    @property
    def _samples_grow(self) -> bool:
        """Whether more samples begin while a slow one, or one that waits for its next attempt, holds others up."""
        return self._grows and self.ahead_bytes is None

    @property
    def _collates_with(self) -> Callable[[int], None] | None:
        """What is called first in threads that collate: nothing, where others load samples and are the workers."""
        if not self.num_workers or (self.policies is not None and not self._awaited):
            return None
        return self.worker_init_fn

    @property
    def _converts_apart(self) -> bool:
        """Whether what is done to a sample that was loaded alone is no part of the load, which may be repeated."""
        return self._collates_async or (self.policies is not None and self._torch.batch_sampler is None)

    def _stages(self, alloc: Alloc) -> list[Stage]:
        workers = max(1, self.num_workers)
        initializer = self.worker_init_fn if self.num_workers else None
        one_by_one = self._loads_samples and not self._awaits_samples
        collate = CollateWith(self.collate_fn, workers, self._collates_with, partial=self.skip_errors is not None)
        if self._iterable and self.batch_size is not None:
            skip: list[Stage] = [] if self.skip_errors is None else [SkipErrors(self.skip_errors)]
            return [*skip, Batch(self.batch_size, self.drop_last, collate)]
        convert = self._convert(alloc)
        if self._iterable:
            return [convert]
        if self._awaits_samples and self._torch.batch_sampler is None:
            return [self._load(self.in_order), convert]
        # Samples of one batch may overtake each other only inside it: the join goes by their order.
        around = SplitBatches(self.batch_size), JoinBatches(collate, self._leaves_out)
        if self._awaits_samples:
            return [around[0], self._load(True), around[1]]
        if self._torch.batch_sampler is not None and _is_async(self.dataset, "__getitems__"):
            at_once = max(1, self.concurrency // (self.batch_size or 1))
            many = FetchAsync(self.dataset.__getitems__, self._leaves_out)
            return [Map(many, True, at_once, self.in_order, name="dataset.__getitems__"), convert]
        fetch = Map(
            FetchSample(self.dataset) if one_by_one else self._fetch(alloc),
            False,
            workers,
            self.in_order or one_by_one,
            name=SAMPLE if one_by_one else "fetch",
            initializer=initializer,
            thread_name="aioloader-worker",
            ahead=self._samples_ahead if one_by_one else None,
            grows=self._samples_grow and one_by_one,
            policies=self.policies,
        )
        if one_by_one:
            return [around[0], fetch, around[1]]
        return [fetch, convert] if self._converts_apart else [fetch]

    def _load(self, ordered: bool) -> Map:
        """The step that awaits the samples one by one."""
        return Map(
            self.dataset.__getitem__ if _is_async(self.dataset, "__getitem__") else FetchSampleAsync(self.dataset),
            True,
            self.concurrency,
            ordered,
            name=SAMPLE,
            ahead=self.ahead,
            ahead_bytes=self.ahead_bytes,
            policies=self.policies,
        )

    def _convert(self, alloc: Alloc) -> Map:
        """The step that makes batches of the samples that the step before it loaded."""
        collate = self._collate_call(alloc)
        if self.skip_errors is not None:
            collate = over_partial_async(collate) if self._collates_async else over_partial(collate)
        return Map(
            collate,
            self._collates_async,
            max(1, self.num_workers),
            self.in_order,
            name="collate",
            initializer=self._collates_with,
            thread_name="aioloader-worker",
        )

    def _open_transfer(self) -> Transfer | None:
        if self._transfer is None and (self.device is not None or self.pin_memory):
            self._transfer = open_transfer(self.device)
        return self._transfer

    # -- what a worker does ------------------------------------------------------------------------------------------

    def _fetch(self, alloc: Alloc, dataset: Any = None) -> Callable[[Any], Any]:
        dataset = self.dataset if dataset is None else dataset
        if self._torch.batch_sampler is None:
            apart = self._converts_apart and type(dataset) is not TriedInPlace
            return FetchOne(dataset, None if apart else self.collate_fn or default_convert)
        if self._collates_async:
            return FetchBatch(dataset, None, Group, self._leaves_out)
        return FetchBatch(dataset, self.collate_fn, Collate(alloc), self._leaves_out)

    def _collate_call(self, alloc: Alloc) -> Callable[[Any], Any]:
        """From samples to a batch, or for `batch_size=None` from a sample to what is handed out."""
        if self._torch.batch_sampler is None:
            return self.collate_fn or default_convert
        if self._collates_async and self.collate_fn is not None:
            return CollateAsync(self.collate_fn)
        return CollateAny(self.collate_fn, Collate(alloc))


def _reading_workers(cursor: Any) -> int:
    """Of how many worker processes that iterate a dataset each a cursor is; 0: of none."""
    of_workers = isinstance(cursor, list | tuple) and len(cursor) == 2 and all(type(part) is int for part in cursor)
    return cursor[0] if of_workers else 0


def _readers(workers: int) -> str:
    return f"{safe_repr(workers)} worker processes" if workers else "one reader (num_workers=0 or worker_type='thread')"


def _is_async(dataset: Any, method: str) -> bool:
    fn = getattr(dataset, method, None)
    return fn is not None and is_async_callable(fn)


def _worker_type_of(worker_method: str, worker_type: Any) -> Literal["thread", "process"]:
    """What newer versions of torch call `worker_method`, in our word.

    Raises:
        ValueError: Not one of torch's, or another one than the `worker_type` beside it.
    """
    if worker_method == "thread":
        found: Literal["thread", "process"] = "thread"
    elif worker_method == "multiprocessing":
        found = "process"
    else:
        raise ValueError(
            f"worker_method must be 'multiprocessing' or 'thread', as in torch, got {worker_method!r}; leave it out "
            f"and pass worker_type"
        )
    if worker_type not in ("thread", found):
        raise ValueError(
            f"worker_method and worker_type both say where samples are loaded, got {worker_method!r} and "
            f"{worker_type!r}; pass one of them"
        )
    return found


def check_loaded_elsewhere(actors: RayWorkers | None, *, iterable: bool, awaited: bool) -> None:
    """Refuse datasets whose samples cannot be loaded by processes, or by actors.

    Raises:
        ValueError: Why.
    """
    worker_type = "process" if actors is None else "ray"
    if awaited:
        raise ValueError(
            f"worker_type={worker_type!r} is for sync datasets, got one that is async and awaited on the event loop; "
            f"leave worker_type out"
        )
    if iterable and actors is not None:
        raise ValueError(
            "worker_type='ray' is for datasets whose samples are loaded by key, got one that is iterated: its iterator "
            "would die with its actor; use Pipeline(dataset).map(fn, executor='ray'), or worker_type='process'"
        )


def _torch_worker(
    dataset: Any, num_workers: int, base: BaseSeed, worker_init_fn: Callable[[int], None] | None
) -> TorchWorker:
    """Not a closure over the loader: its workers must not keep it alive."""
    return TorchWorker(dataset, num_workers, base.value, worker_init_fn)
