"""`DataLoader`: torch's constructor and meaning, over our engine."""

import warnings
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Final, Literal, Self, TypeVar, Unpack, overload

import torch
import torch.utils.data
from torch import Tensor

from aioloader.core.checks import check_integer
from aioloader.core.policies import Hedge, Policies, Rate, Retry
from aioloader.core.safe_text import safe_repr
from aioloader.core.skip import Skip
from aioloader.core.typevars import T_co
from aioloader.device import Transfer, check_device, open_transfer, why_not_pinned
from aioloader.drop_in.arguments import Arguments, WorkerType, is_async_iterable, worker_type_of
from aioloader.drop_in.inline import inline_nodes, skip_rule
from aioloader.drop_in.stages import stages_here, stages_in_workers, stages_to_device
from aioloader.engine.delivery import InlineDelivery, SyncDelivery
from aioloader.engine.faces import AsyncBatches, Batches
from aioloader.engine.progress import Progress
from aioloader.engine.turns import Turns
from aioloader.engine.window import Window
from aioloader.errors import ReplayWarning, StateError
from aioloader.executors.processes.fork_server import check_processes
from aioloader.executors.ray.workers import RayWorkers, actors_for
from aioloader.loader import Loader
from aioloader.plan.build import build
from aioloader.plan.plan import Plan, Single, guarantee_of_stream
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
from aioloader.sources.rank_sampler import RankSampler, check_shards
from aioloader.sources.resolve import StreamData, check_dataset, warn_of_live
from aioloader.stages.base import Pass
from aioloader.stages.flow import Guarantee
from aioloader.torch_shims import AsyncStandIn, BatchSamplerView

__all__ = ["DataLoader"]

K = TypeVar("K")
S = TypeVar("S")

KEYS_AHEAD: Final = 8
"""Keys of batches that lie ready, where reading them runs no code of the user's: else cheap batches wait for them."""

_FIXED = ("batch_size", "batch_sampler", "sampler", "drop_last", "dataset", "persistent_workers", "shard")
_SHOWN = frozenset(field.name for field in fields(Arguments)) - {"torch_loader", "actors", "bounded"}
"""Arguments that are attributes of the loader."""


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
    _arguments: Arguments
    _keys: EpochSampling

    # The attributes of torch's that programs read. Not `sampler` and not `_iterator`: trainers act on these.
    dataset: Any
    batch_size: int | None
    drop_last: bool
    num_workers: int
    collate_fn: Callable[[list[Any]], Any] | None
    pin_memory: bool
    timeout: float
    worker_init_fn: Callable[[int], None] | None
    multiprocessing_context: Any
    prefetch_factor: int | None
    persistent_workers: bool
    pin_memory_device: str
    in_order: bool

    # And our own.
    device: Any
    concurrency: int
    ahead: int | None
    ahead_bytes: int | None
    worker_type: WorkerType
    skip_errors: Skip | None
    policies: Policies | None
    shard: bool

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
        self._keys = EpochSampling(torch_loader, shuffled=bool(shuffle), seed=seed, persistent=persistent_workers)
        self._arguments = Arguments(
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
        self._timeout = timeout or None
        self._timeout_message = "DataLoader timed out after {seconds} seconds"

    def __getattr__(self, name: str) -> Any:
        if name in _SHOWN and (arguments := self.__dict__.get("_arguments")) is not None:
            return getattr(arguments, name)
        if name == "sampler":
            raise AttributeError(
                "DataLoader shows no attribute 'sampler', since trainers replace what they find there; "
                "call loader.set_epoch(epoch), which reaches your sampler"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED:
            raise ValueError(f"{name} attribute should not be set after DataLoader is initialized; make a new one")
        if name in _SHOWN:
            self._arguments = replace(self._arguments, **{name: value})
        else:
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
        return BatchSamplerView(self._arguments.torch_loader.batch_sampler, self.__len__, self.set_epoch)

    def __len__(self) -> int:
        """Batches per epoch.

        Raises:
            TypeError: The dataset has no length.
        """
        return len(self._arguments.torch_loader)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        seed = "" if self.seed is None else f", seed={self.seed}"
        return (
            f"DataLoader({type(self.dataset).__name__}, batch_size={self.batch_size}, num_workers={self.num_workers}"
            f"{seed})"
        )

    # -- iteration ---------------------------------------------------------------------------------------------------

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

    def _open_delivery(self) -> SyncDelivery | InlineDelivery:
        if not self._arguments.inline:
            return super()._open_delivery()
        with self._beginning() as progress:
            transfer = self._open_transfer()
            node, meters = inline_nodes(
                self._arguments, self._keys, progress, self._pass(progress), transfer, self._alloc(transfer)
            )
        self._watch(progress, meters)
        return InlineDelivery(node, progress, self._receiver())

    def _build(self, progress: Progress) -> Window:
        base = BaseSeed()
        if self._arguments.workers_read:
            self._begin_turns(progress, base)
        elif self._arguments.iterable:
            self._keys.draw_base_seed(progress)
        return self._nodes(progress, self._open_transfer(), base)

    def _nodes(self, progress: Progress, transfer: Transfer | None = None, base: BaseSeed | None = None) -> Window:
        of = self._arguments
        if of.in_processes:
            alloc, base = None, BaseSeed() if base is None else base
            turns = Turns(of.num_workers) if of.iterable else None
            keys = partial(self._keys.of, progress, base)
            source = StreamData(keys if turns is None else turns, call=turns is None, single_use=False)
            stages = stages_in_workers(of, self._keys, base, turns)
        else:
            alloc = self._alloc(transfer)
            keys = partial(self._keys.of, progress)
            source = StreamData(of.dataset if of.iterable else keys, call=not of.iterable, single_use=False)
            stages = stages_here(of, alloc)
        stages += stages_to_device(of, pins=transfer is not None)
        nbytes = None if of.awaits_samples else of.ahead_bytes
        plan = Plan(self._single(source), tuple(stages), room=of.room, grows=of.grows, nbytes=nbytes)
        window = build(plan, self._pass(progress), transfer, alloc, self._open_processes)
        window.rule = skip_rule(of, progress.epoch)
        return window

    def _single(self, source: StreamData) -> Single:
        if self._arguments.iterable:
            return Single(source, name="source")
        ahead = KEYS_AHEAD if self._keys.plain else 0
        return Single(source, name="sampler", keys=True, ahead=ahead, check=self._keys.check_place)

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

    def _open_transfer(self) -> Transfer | None:
        if self._transfer is None and (self.device is not None or self.pin_memory):
            self._transfer = open_transfer(self.device)
        return self._transfer

    def _pass(self, progress: Progress) -> Pass:
        return Pass(progress.epoch, sample_seed=self._sample_seed(self._rng_seed))

    @property
    def _rng_seed(self) -> int | None:
        """Of `sample_rng`, as in `Pipeline`: ranks that share samples need the same one."""
        return 0 if self.shard and self.seed is None else self.seed

    # -- ranks and state ---------------------------------------------------------------------------------------------

    @property
    def _split_by(self) -> str:  # type: ignore[override]  # a plain attribute where it is always the same
        if self._arguments.iterable:
            return "use Pipeline(dataset).shard(), whose map and batch do the rest"
        return "pass sampler=DistributedSampler(dataset), or shard=True, which deals the same keys"

    def _gives_all(self) -> bool:
        of = self._arguments
        if not dataset_gives_all(of.dataset, indexed=not of.iterable):
            return False
        return of.iterable or keys_of_all(self._keys.sampler)

    def _begins(self, progress: Progress) -> None:
        if not self._arguments.iterable:
            progress.batch_size = self.batch_size
        if progress.cursor is not None:  # the rest of it comes in that order, whatever they were told since
            self._keys.set_epochs(progress.loader_state, told=not progress.epoch_pinned)
        progress.loader_state |= self._keys.epochs()

    def _shape(self) -> Shape:
        of = self._arguments
        try:
            length = len(of.dataset)
        except (TypeError, NotImplementedError):
            length = None
        shape = [
            {"stage": "source", "name": type(of.dataset).__name__, "length": length} | identity_of(of.dataset),
            {"stage": "stream"} if of.iterable else self._keys.shape(),
            {"stage": "batch", "batch_size": of.batch_size, "drop_last": of.drop_last, "ordered": of.ordered},
        ]
        return shape if of.skip_errors is None else [*shape, {"stage": "skip_errors"}]

    def _guarantee(self) -> Guarantee:
        of = self._arguments
        if of.workers_read:
            return "replayed" if of.in_order else "at-least-once"
        if of.iterable:
            return guarantee_of_stream(of.dataset)
        return "exact" if self._keys.repeatable else "replayed"

    def _never_again(self) -> str | None:
        why = super()._never_again()
        return "samples come in another order each time" if why is None and not self._arguments.ordered else why

    def _sure_length(self, *, resumed: bool) -> int | None:
        of = self._arguments
        if of.skip_errors is not None:
            return None  # nobody knows whether a batch is left of them
        if of.iterable or not self._keys.repeatable or self._keys.generators:
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
        if self._arguments.iterable:  # its workers' seeds, where these decide what comes
            return self._arguments.workers_read and self.seed is None and self.generator is None
        return self._keys.draws_globally

    def _check_random_state(self, state: dict[str, Any], *, begun: bool) -> None:
        super()._check_random_state(state, begun=begun)
        self._keys.check_state(state)
        if begun and self._arguments.workers_read and "base_seed" not in state:
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
        skip = self.skip_errors
        again._arguments = replace(
            self._arguments,
            dataset=again._keys.dataset,
            skip_errors=None if skip is None else replace(skip, report=None),  # it is written down already
        )
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
        of = self._arguments
        if of.workers_read and not of.in_order:  # the epoch is begun again
            batches, cursor = 0, None
        elif of.workers_read and cursor is not None:
            cursor = (of.num_workers, batches)
        return super()._make_state(epoch, batches, cursor, random, lengths, guarantee=guarantee)

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        of, cursor = self._arguments, loaded["cursor"]
        if of.iterable and cursor is not None:
            theirs, ours = _reading_workers(cursor), of.reading_workers
            if theirs != ours or (ours and not of.in_order):
                raise StateError(
                    f"the state is in the middle of an epoch of an IterableDataset that {_readers(theirs)} read, and "
                    f"this loader has {_readers(ours)}{'' if of.in_order else ', in_order=False'}, so its parts or "
                    f"their order are others; go on with the former, or begin the epoch anew"
                )
            if ours and cursor[1] != loaded["batches"]:
                raise StateError(
                    f"the 'cursor' of the state is after {safe_repr(cursor[1])} batches, and its 'batches' are "
                    f"{loaded['batches']}: it is broken"
                )
        super()._check_loaded(loaded)


def _reading_workers(cursor: Any) -> int:
    """Of how many worker processes that iterate a dataset each a cursor is; 0: of none."""
    of_workers = isinstance(cursor, list | tuple) and len(cursor) == 2 and all(type(part) is int for part in cursor)
    return cursor[0] if of_workers else 0


def _readers(workers: int) -> str:
    return f"{safe_repr(workers)} worker processes" if workers else "one reader (num_workers=0 or worker_type='thread')"
