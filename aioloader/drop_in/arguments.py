"""What a `DataLoader` was told, and what follows from that. Pure."""

from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch.utils.data
from torch.utils.data import IterableDataset

from aioloader.core.checks import check_ahead, check_count, is_async_callable
from aioloader.core.policies import Errors, Policies
from aioloader.core.skip import Skip, as_skip
from aioloader.core.source import CursorSource
from aioloader.device import check_device
from aioloader.executors.ray.workers import RayWorkers
from aioloader.plan.plan import DEFAULT_PREFETCH
from aioloader.sources.fetch import FetchSource
from aioloader.stages.load_one import check_load_policies
from aioloader.stages.map import ASYNC_CONCURRENCY

__all__ = ["Arguments", "WorkerType", "is_async_iterable", "worker_type_of"]

WorkerType = Literal["thread", "process", "ray"] | RayWorkers


@dataclass(frozen=True)
class Arguments:
    """The arguments of a `DataLoader`, see there, but for those that decide the keys of an epoch.

    Attributes:
        torch_loader: torch's own, which has checked them, made the samplers and knows the length.
        bounded: `prefetch_factor` was passed.
        actors: The actors of a Ray cluster that `worker_type` names; None: it names none.
        policies: What is done about loads of samples that fail, take long, or are too many; None: nothing.
    """

    torch_loader: "torch.utils.data.DataLoader[Any]"
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
    device: Any
    worker_type: WorkerType
    actors: RayWorkers | None
    shard: bool
    bounded: bool
    concurrency: int = ASYNC_CONCURRENCY
    ahead: int | None = None
    ahead_bytes: int | None = None
    skip_errors: Skip | None = None
    policies: Policies | None = None

    def checked(
        self, *, concurrency: Any, ahead: Any, ahead_bytes: Any, skip_errors: Any, **policies: Any
    ) -> "Arguments":
        """The same with arguments that torch does not know.

        Args:
            concurrency: See `DataLoader`, as for the following.
            ahead: See there.
            ahead_bytes: See there.
            skip_errors: See there.
            policies: `retry`, `sample_timeout`, `hedge` and `rate`.

        Raises:
            TypeError, ValueError: One of them is none, or they do not fit.
        """
        fetches = isinstance(self.dataset, FetchSource)
        if concurrency is not None:
            concurrency = check_count("concurrency", concurrency, least=1)
        else:
            concurrency = self.dataset.concurrency if fetches else ASYNC_CONCURRENCY
        if self.in_processes:
            self._check_loaded_elsewhere()
        skip = as_skip(skip_errors)
        if skip is not None and self.workers_read:
            raise ValueError(
                "skip_errors cannot leave samples out of an IterableDataset that worker processes read: its iterators "
                "are theirs, and over when they raise; use worker_type='thread', or a dataset with __getitem__"
            )
        found = check_load_policies(
            self.dataset,
            **policies,
            iterable=self.iterable,
            awaited=self.awaited,
            in_processes=self.in_processes,
            retried_by_itself=fetches,
        )
        told = self._of_the_same_dataset(concurrency=concurrency, skip_errors=skip, policies=found)
        ahead, ahead_bytes = told._check_ahead(ahead, ahead_bytes)
        return told._of_the_same_dataset(ahead=ahead, ahead_bytes=ahead_bytes)

    def _of_the_same_dataset(self, **others: Any) -> "Arguments":
        """As `replace`, but what the dataset is, and `collate_fn`, is not looked at again."""
        again = object.__new__(Arguments)
        again.__dict__.update(self.__dict__, **others)
        return again

    def changed(self, name: str, value: Any) -> "Arguments":
        """The same with another value for one of them.

        Raises:
            TypeError, ValueError: It is none.
        """
        if name == "num_workers":
            value = check_count(name, value, least=0)
        elif name == "concurrency" or (name == "prefetch_factor" and value is not None):
            value = check_count(name, value, least=1)
        elif name == "skip_errors":
            value = as_skip(value)
        elif name == "device" and value is not None:
            check_device(value)
        changed = replace(self, **{name: value})
        if name in ("ahead", "ahead_bytes"):
            changed._check_ahead(changed.ahead, changed.ahead_bytes)
        return changed

    def _check_loaded_elsewhere(self) -> None:
        """Refuse datasets whose samples cannot be loaded by processes, or by actors."""
        worker_type = "process" if self.actors is None else "ray"
        if self.awaited:
            raise ValueError(
                f"worker_type={worker_type!r} is for sync datasets, got one that is async and awaited on the event "
                f"loop; leave worker_type out"
            )
        if self.iterable and self.actors is not None:
            raise ValueError(
                "worker_type='ray' is for datasets whose samples are loaded by key, got one that is iterated: its "
                "iterator would die with its actor; use Pipeline(dataset).map(fn, executor='ray'), or "
                "worker_type='process'"
            )

    def _check_ahead(self, ahead: Any, ahead_bytes: Any) -> tuple[int | None, int | None]:
        """How much may be ahead, checked."""
        width, of = self.num_workers, "num_workers"
        if self.awaits_samples:
            width, of = self.concurrency, "concurrency"
        if isinstance(self.dataset, FetchSource):
            ahead = self.dataset.ahead if ahead is None else ahead
            ahead_bytes = self.dataset.ahead_bytes if ahead_bytes is None else ahead_bytes
        ahead, ahead_bytes = check_ahead(ahead, ahead_bytes, width, of=of)
        prefetch_factor = self.prefetch_factor
        if ahead is not None and self.bounded:
            raise ValueError(f"{ahead=} and {prefetch_factor=} both say how much is ahead; pass one of them")
        if (ahead or ahead_bytes) and not (self.num_workers or self.awaited):
            raise ValueError(
                f"ahead and ahead_bytes need workers, got {ahead=}, {ahead_bytes=} with num_workers=0, which makes "
                f"nothing ahead; pass num_workers=1 or more"
            )
        return ahead, ahead_bytes

    # -- what kind of dataset it is, and who reads it ----------------------------------------------------------------

    @cached_property
    def iterable(self) -> bool:
        """Whether the dataset is iterated; else its samples are loaded by key."""
        return is_async_iterable(self.dataset) or isinstance(self.dataset, IterableDataset)

    @cached_property
    def awaited(self) -> bool:
        """Whether it is async."""
        return is_async_iterable(self.dataset) or self.has_async("__getitem__") or self.has_async("__getitems__")

    def has_async(self, method: str) -> bool:
        """Whether this method of the dataset is async."""
        fn = getattr(self.dataset, method, None)
        return fn is not None and is_async_callable(fn)

    @property
    def batched(self) -> bool:
        """Whether there are batches; with `batch_size=None` there are samples."""
        return self.torch_loader.batch_sampler is not None

    @cached_property
    def collates_async(self) -> bool:
        """Whether `collate_fn` is awaited."""
        return self.collate_fn is not None and is_async_callable(self.collate_fn)

    @property
    def inline(self) -> bool:
        """Whether `for` needs no thread: all is done inside `next()`."""
        return not (self.num_workers or self.awaited or self.collates_async)

    @property
    def in_processes(self) -> bool:
        """Whether worker processes load, here or in a cluster."""
        return self.worker_type != "thread" and self.num_workers > 0

    @property
    def workers_read(self) -> bool:
        """Each worker process iterates a copy of the dataset, and nobody else knows where it is."""
        return self.in_processes and self.iterable

    @property
    def awaits_samples(self) -> bool:
        """Whether the samples of a batch are loaded one by one, `concurrency` at once."""
        if self.iterable or not self.awaited:
            return False
        together = self.batched and self.has_async("__getitems__")
        return self.policies is not None if together else self.has_async("__getitem__")

    @property
    def loads_samples(self) -> bool:
        """The same, or the workers load them so."""
        return self.awaits_samples or (not self.iterable and self.batched and self.policies is not None)

    @property
    def ordered(self) -> bool:
        """Whether batches come in the order of their keys; the same for any number of workers, for their cursors."""
        if self.in_order or (self.iterable and self.batch_size is not None):
            return True
        return self.batched and self.loads_samples

    @property
    def leaves_out(self) -> Errors:
        """The types of errors whose samples are left out."""
        return () if self.skip_errors is None else self.skip_errors.on

    # -- how much is ahead -------------------------------------------------------------------------------------------

    @property
    def grows(self) -> bool:
        """Whether more batches begin while a slow one holds finished ones up."""
        return not self.bounded and self.ahead is None and self.num_workers > 0

    @property
    def room(self) -> int | None:
        """Batches being made or finished: torch's bound; without workers none, unless they are awaited.

        None where there are no batches, but samples that are awaited one by one: as many as that has use for.
        """
        if self.awaits_samples and not self.batched and self.prefetch_factor is None:
            return None
        if self.loads_samples and not self.awaits_samples and self.samples_ahead is not None:
            return self.num_workers  # the others are samples yet
        return self._most_batches

    @property
    def _most_batches(self) -> int:
        """Being made or finished."""
        if self.ahead is not None and not self.awaits_samples:
            return self.ahead
        if self.num_workers:
            return (self.prefetch_factor or 2) * self.num_workers
        return DEFAULT_PREFETCH if self.awaited else 0

    @property
    def samples_ahead(self) -> int | None:
        """Being loaded or finished, where workers load them one by one; None: as many as that has use for.

        These are the samples of the batches that may be ahead, but of one batch for each worker, which is collated. Not
        so with a batch sampler that does not tell its `batch_size`.
        """
        if not self.num_workers:
            return 0
        size = getattr(self.torch_loader.batch_sampler, "batch_size", None)
        if type(size) is not int:
            return None
        return max(self.num_workers, (self._most_batches - self.num_workers) * size)

    @property
    def samples_grow(self) -> bool:
        """Whether more samples begin while a slow one, or one that waits for its next attempt, holds others up."""
        return self.grows and self.ahead_bytes is None


def is_async_iterable(dataset: Any) -> bool:
    """Whether it is iterated on the event loop."""
    return not hasattr(dataset, "__getitem__") and isinstance(dataset, AsyncIterable | CursorSource)


def worker_type_of(worker_method: Any, worker_type: WorkerType) -> WorkerType:
    """`worker_type`, or in our word what newer versions of torch call `worker_method`.

    Raises:
        ValueError: Not one of torch's, or another one than the `worker_type` beside it.
    """
    if worker_method is None:
        return worker_type
    found: WorkerType
    if worker_method == "thread":
        found = "thread"
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
