"""A list of keys to a batch, in one call: what a worker does where the samples of a batch are loaded together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aioloader.executors.sample import Fetching, current_sample
from aioloader.notes import add_note, shown
from aioloader.stages.batch import Group
from aioloader.stages.collate import DEFAULT, Alloc, Collate, collate_samples

__all__ = ["CollateAny", "FetchBatch", "FetchGroup", "FetchOne", "LoadsBatches"]


class LoadsBatches(ABC):
    """A dataset that can load samples straight to where they will be in the batch, so that nothing is copied.

    Not found by the method's name: a user's dataset may have one of that name, too.
    """

    @abstractmethod
    def load_batch(self, keys: Sequence[Any], alloc: Alloc) -> Any:
        """The samples with these keys as torch's `default_collate` would batch them, in memory of `alloc`."""


class FetchBatch:
    """Keys to a batch.

    Args:
        dataset: Map-style, with `__getitems__` or without.
        collate_fn: From a list of samples to a batch; None: `collate`.
        collate: The default.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, collate: Collate) -> None:
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._collate = collate

    def __call__(self, keys: Any, names: Sequence[Any] | None = None) -> Any:
        """Load and collate.

        Args:
            keys: In the order of the batch.
            names: What the samples are called in notes of errors, when not by their keys.
        """
        dataset = self._dataset
        collate_fn = self._collate_fn
        if collate_fn is None and isinstance(dataset, LoadsBatches) and len(keys) and self._collate.stacks_tensors:
            return dataset.load_batch(keys, self._collate.alloc_or_empty)
        if getattr(dataset, "__getitems__", None):  # torch also looks whether it is true
            samples = dataset.__getitems__(keys)
        else:
            samples = []
            key = None
            sample = current_sample.get()
            if sample is not None:
                sample.name = Fetching(keys, samples)
            try:
                append = samples.append
                for key in keys:
                    append(dataset[key])
            except Exception as error:
                add_note(error, f"aioloader: dataset index {shown(key)}, sample {len(samples)} of its batch")
                raise
        return collate_samples(samples, keys if names is None else names, collate_fn, self._collate)


class FetchGroup:
    """The same for what the batch fold makes of keys."""

    def __init__(self, fetch: FetchBatch) -> None:
        self._fetch = fetch

    def __call__(self, group: Group) -> Any:
        return self._fetch(group.samples, group.keys)


@dataclass(frozen=True)
class FetchOne:
    """One key to one sample, which is handed out alone.

    Args:
        dataset: Map-style.
        convert: What is done with the sample.
    """

    dataset: Any
    convert: Callable[[Any], Any]

    def __call__(self, key: Any) -> Any:
        return self.convert(self.dataset[key])


@dataclass(frozen=True)
class CollateAny:
    """A list of samples, or a group of the batch fold, to a batch.

    Args:
        collate_fn: From a list of samples to a batch; None: `collate`.
        collate: The default.
    """

    collate_fn: Callable[[list[Any]], Any] | None
    collate: Collate = DEFAULT

    def __call__(self, samples: Any) -> Any:
        keys = None
        if isinstance(samples, Group):
            samples, keys = samples.samples, samples.keys
        return collate_samples(samples, keys, self.collate_fn, self.collate)
