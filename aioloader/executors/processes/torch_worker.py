"""What torch gives to code in the worker processes of a DataLoader: seeds, `get_worker_info()`, `worker_init_fn`."""

import random
import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils.data import _DatasetKind
from torch.utils.data._utils import worker as torch_worker

from aioloader.executors.epochs import Holds

__all__ = ["EXHAUSTED", "FetchNext", "TorchWorker"]


@dataclass(frozen=True)
class TorchWorker:
    """Sets up a worker process as torch sets up its own.

    Args:
        dataset: For `get_worker_info()`.
        num_workers: As in torch.
        base_seed: Worker k is seeded with `base_seed + k`.
        worker_init_fn: As in torch; called last.
    """

    dataset: Any
    num_workers: int
    base_seed: int
    worker_init_fn: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        """Called once, in the worker."""
        seed = self.base_seed + worker_id
        random.seed(seed)
        torch.manual_seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(torch_worker._generate_state(self.base_seed, worker_id))
        torch_worker._worker_info = torch_worker.WorkerInfo(
            id=worker_id, num_workers=self.num_workers, seed=seed, dataset=self.dataset
        )
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


class _Exhausted:
    def __reduce__(self) -> str:
        return "EXHAUSTED"  # one object in every process


EXHAUSTED: Final = _Exhausted()
"""What `FetchNext` returns at the end of its worker's part of the dataset."""


class FetchNext(Holds):
    """Fetches the next batch from this worker's iterator over an iterable dataset.

    Args:
        dataset: Each worker has a copy, which selects its part by `get_worker_info()`.
        batch_size: None for single samples.
        drop_last: Applies to each worker's part, as in torch.
        collate_fn: Makes a batch from a list of samples, or with `batch_size=None` converts a sample. None: samples are
            returned as they are.
    """

    def __init__(
        self, dataset: Any, batch_size: int | None, drop_last: bool, collate_fn: Callable[[Any], Any] | None
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._collate_fn = collate_fn
        self._epoch: int | None = None
        self._fetcher: Any = None
        self._reads_again = False

    @property
    def held(self) -> tuple[Any, ...]:
        return self._dataset, self._collate_fn

    def __call__(self, turn: tuple[int, int]) -> Any:
        """The next batch of an epoch, or `EXHAUSTED`.

        Args:
            turn: The epoch, and how many batches to skip. A greater epoch starts a new iterator. If the second number
                is not 0, the call only reads that many batches and drops them, to continue after a resume; it returns
                how many there were.
        """
        epoch, given = turn
        if not given:
            return self._next(epoch)
        self._reads_again = True
        try:
            for number in range(given):
                with suppress(BaseException):  # it was raised before the resume
                    if self._next(epoch) is EXHAUSTED:
                        return number
        finally:
            self._reads_again = False
        return given

    def _collate(self, samples: Any) -> Any:
        if self._reads_again:
            return None
        return samples if self._collate_fn is None else copy_context().run(self._collate_fn, samples)  # see `isolated`

    def _next(self, epoch: int) -> Any:
        if self._epoch is None or epoch > self._epoch:
            self._fetcher = None
            self._epoch = epoch
            self._context = copy_context()  # the iterator runs in one context, as it does in other executors
            self._fetcher = _DatasetKind.create_fetcher(
                _DatasetKind.Iterable, self._dataset, self._batch_size is not None, self._collate, self._drop_last
            )
        elif epoch < self._epoch:
            raise RuntimeError(
                "persistent workers read one epoch of an IterableDataset at a time, and a later one has begun; "
                "use one iterator at a time, or persistent_workers=False"
            )
        if self._fetcher is None:
            return EXHAUSTED
        try:
            return self._context.run(self._fetcher.fetch, [None] * (self._batch_size or 1))
        except StopIteration:
            self._fetcher = None
            return EXHAUSTED
