"""What is done to the keys or samples of a `DataLoader`, by its arguments: the stages of its plan. Pure."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch.utils.data import default_convert

from aioloader.core.memory import Alloc
from aioloader.core.written import Written
from aioloader.drop_in.arguments import Arguments
from aioloader.engine.ops import InProcesses, OnRay
from aioloader.executors.epochs import epochs_of
from aioloader.executors.partial import over_partial, over_partial_async
from aioloader.executors.processes.segments import shared_memory
from aioloader.executors.processes.torch_worker import FetchNext, TorchWorker
from aioloader.sources.epoch_sampling import BaseSeed
from aioloader.sources.sampled import Sampled
from aioloader.stages.base import Stage
from aioloader.stages.batch import Batch, CollateWith
from aioloader.stages.collate import Collate
from aioloader.stages.device import PinMemory, To
from aioloader.stages.group import Group
from aioloader.stages.load import CollateAny, CollateAsync, FetchAsync, FetchBatch, FetchOne
from aioloader.stages.load_one import FetchSample, FetchSampleAsync, TriedInPlace
from aioloader.stages.map import Map
from aioloader.stages.skip_errors import SkipErrors, SkipInBatches
from aioloader.stages.split_join import JoinBatches, SplitBatches

__all__ = ["collate_call", "fetch_call", "last_stages", "skips_in_batches", "stages_here", "stages_in_workers"]

SAMPLE: Final = "dataset[...]"
THREADS: Final = "aioloader-worker"

WORKERS: Final = Written("DataLoader(...", "num_workers", "prefetch_factor", of_loader=True)
AWAITED: Final = Written("DataLoader(...", of_loader=True)


def stages_here(of: Arguments) -> list[Stage]:
    """Where threads of this process, or its event loop, load and collate."""
    if of.iterable and of.batch_size is not None:
        collate = _collate_with(of, _collates_with(of))
        skip: list[Stage] = [] if of.skip_errors is None else [SkipErrors(of.skip_errors)]
        return [*skip, Batch(of.batch_size, of.drop_last, collate)]
    if of.iterable:
        return [_convert(of)]
    if of.awaits_samples and not of.batched:
        return [_await_samples(of, of.in_order), _convert(of)]
    if of.awaits_samples:
        # Samples of one batch may overtake each other only inside it: the join goes by their order.
        return _around(of, _await_samples(of, True), _collates_with(of))
    if of.loads_samples:
        return _around(of, _load_samples(of), _collates_with(of))
    if of.batched and of.has_async("__getitems__"):
        at_once = max(1, of.concurrency // (of.batch_size or 1))
        many = FetchAsync(of.dataset.__getitems__, of.leaves_out)
        return [Map(many, True, at_once, of.in_order, name="dataset.__getitems__"), _convert(of)]
    fetch = Map(
        fetch_call(of),
        False,
        max(1, of.num_workers),
        of.in_order,
        name="fetch",
        initializer=of.worker_init_fn if of.num_workers else None,
        thread_name=THREADS,
        policies=of.policies,
        written=WORKERS,
    )
    return [fetch, _convert(of)] if _converts_separately(of) else [fetch]


def stages_in_workers(of: Arguments, data: Sampled) -> list[Stage]:
    """Each worker process loads and collates whole batches, in turn, as in torch."""
    prepare = partial(_torch_worker, of.dataset, of.num_workers, data.base, of.worker_init_fn)
    epochs = partial(epochs_of, dataset=of.dataset, told=data.sampling.told_epoch)
    place: InProcesses | OnRay
    if of.actors is not None:
        place = OnRay(of.actors, prepare, epochs, seeds_each=True)
    else:
        in_turn = (of.in_order and not of.loads_samples) or of.iterable
        place = InProcesses(
            kept=of.persistent_workers, in_turn=in_turn, prepare=prepare, turns=data.turns, epochs=epochs
        )
    if of.loads_samples:
        return _around(of, _load_samples(of, place), None)
    fetch: Callable[[Any], Any]
    if data.turns is not None:
        collate = None if of.collates_async else collate_call(of, shared_memory)
        fetch = FetchNext(of.dataset, of.batch_size, of.drop_last, collate)
    else:
        fetch = fetch_call(of, shared_memory)
    load = Map(fetch, False, of.num_workers, of.in_order, executor=place, name="fetch", policies=of.policies)
    return [load, _convert(of, shared_memory)] if _converts_separately(of) else [load]


def last_stages(of: Arguments, *, pins: bool) -> list[Stage]:
    """What is done with batches at last; `pins`: there is page-locked memory."""
    stages: list[Stage] = []
    if of.device is not None:
        stages.append(To(of.device))
    elif pins:
        stages.append(PinMemory())
    skip = skips_in_batches(of)
    return stages if skip is None else [*stages, skip]


def skips_in_batches(of: Arguments) -> SkipInBatches | None:
    """What leaves samples out of batches that workers have loaded; None: nothing, or that is done before `batch`."""
    if of.skip_errors is None or (of.iterable and of.batch_size is not None):
        return None
    return SkipInBatches(of.skip_errors, batched=of.batched, batch_size=of.batch_size)


def fetch_call(of: Arguments, alloc: Alloc | None = None, dataset: Any = None) -> Callable[[Any], Any]:
    """From a key, or the keys of a batch, to what is handed out, or to what is collated apart.

    Args:
        of: The arguments.
        alloc: Where the default collate puts batches; None: where the epoch has memory for them.
        dataset: Instead of the dataset.
    """
    dataset = of.dataset if dataset is None else dataset
    if not of.batched:
        separate = _converts_separately(of) and type(dataset) is not TriedInPlace
        return FetchOne(dataset, None if separate else of.collate_fn or default_convert)
    if of.collates_async:
        return FetchBatch(dataset, None, Group, of.leaves_out)
    return FetchBatch(dataset, of.collate_fn, Collate(alloc), of.leaves_out)


def collate_call(of: Arguments, alloc: Alloc | None = None) -> Callable[[Any], Any]:
    """From samples to a batch, or for `batch_size=None` from a sample to what is handed out."""
    if not of.batched:
        return of.collate_fn or default_convert
    if of.collates_async and of.collate_fn is not None:
        return CollateAsync(of.collate_fn)
    return CollateAny(of.collate_fn, Collate(alloc))


def _around(of: Arguments, load: Map, initializer: Callable[[int], None] | None) -> list[Stage]:
    """`load`, which loads samples, between what takes the keys of batches apart and what makes batches."""
    return [
        SplitBatches(of.batch_size),
        load,
        JoinBatches(_collate_with(of, initializer), of.leaves_out),
    ]


def _load_samples(of: Arguments, place: InProcesses | OnRay | None = None) -> Map:
    """The step whose workers load samples one by one."""
    return Map(
        FetchSample(of.dataset),
        False,
        max(1, of.num_workers),
        executor=place,
        name=SAMPLE,
        initializer=of.worker_init_fn if of.num_workers and place is None else None,
        thread_name=THREADS,
        ahead=of.samples_ahead,
        grows=of.samples_grow,
        policies=of.policies,
        written=WORKERS,
    )


def _await_samples(of: Arguments, ordered: bool) -> Map:
    """The step that awaits the samples one by one."""
    return Map(
        of.dataset.__getitem__ if of.has_async("__getitem__") else FetchSampleAsync(of.dataset),
        True,
        of.concurrency,
        ordered,
        name=SAMPLE,
        ahead=of.ahead,
        ahead_bytes=of.ahead_bytes,
        policies=of.policies,
        written=AWAITED,
    )


def _convert(of: Arguments, alloc: Alloc | None = None) -> Map:
    """The step that makes batches of the samples that the step before it loaded."""
    collate = collate_call(of, alloc)
    if of.skip_errors is not None:
        collate = over_partial_async(collate) if of.collates_async else over_partial(collate)
    return Map(
        collate,
        of.collates_async,
        max(1, of.num_workers),
        of.in_order,
        name="collate",
        initializer=_collates_with(of),
        thread_name=THREADS,
    )


def _collate_with(of: Arguments, initializer: Callable[[int], None] | None) -> CollateWith:
    return CollateWith(of.collate_fn, max(1, of.num_workers), initializer, partial=of.skip_errors is not None)


def _collates_with(of: Arguments) -> Callable[[int], None] | None:
    """What is called first in threads that collate: nothing, where others load samples and are the workers."""
    if not of.num_workers or (of.policies is not None and not of.awaited):
        return None
    return of.worker_init_fn


def _converts_separately(of: Arguments) -> bool:
    """Whether what is done to a sample that was loaded alone is no part of the load, which may be repeated."""
    return of.collates_async or (of.policies is not None and not of.batched)


def _torch_worker(
    dataset: Any, num_workers: int, base: BaseSeed, worker_init_fn: Callable[[int], None] | None
) -> TorchWorker:
    """Not a closure over the loader: its workers must not keep it alive."""
    return TorchWorker(dataset, num_workers, base.value, worker_init_fn)
