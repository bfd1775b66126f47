"""A list of keys to a batch, in one call: what a worker does where the samples of a batch are loaded together."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

from aioloader.core.memory import Alloc
from aioloader.core.safe_text import add_note, safe_repr
from aioloader.executors.chunk import DROP
from aioloader.executors.current_sample import BatchBeingLoaded, BulkLoad, SampleContext, current_sample
from aioloader.executors.epochs import Holds
from aioloader.executors.isolated import isolated
from aioloader.stages.collate import DEFAULT, Collate, collate_samples, named
from aioloader.stages.group import Group

__all__ = ["CollateAny", "CollateAsync", "FetchAsync", "FetchBatch", "FetchGroup", "FetchOne", "LoadsBatches"]


class LoadsBatches(ABC):
    """A dataset that can load samples straight to where they will be in the batch, so that nothing is copied.

    Not found by the method's name: a user's dataset may have one of that name, too.
    """

    @abstractmethod
    def load_batch(self, keys: Sequence[Any], alloc: Alloc) -> Any:
        """The samples with these keys as torch's `default_collate` would batch them, in memory of `alloc`."""


class FetchBatch(Holds):
    """Keys to a batch.

    A `__getitems__` that asks for `sample_rng()` is called for one key at a time from then on: a call for several
    samples has no numbers that belong to one of them, and those of the batch would depend on its size and order. That
    it asks is known when it does; what it had begun is begun again.

    Args:
        dataset: Map-style, with `__getitems__` or without.
        collate_fn: From a list of samples to a batch; None: `collate`.
        collate: The default; `Group`: the samples are left as they are, for a step that collates them.
    """

    def __init__(
        self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, collate: Collate | type[Group]
    ) -> None:
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._collate = collate
        self._singly = False  # `__getitems__` asks which sample is at hand

    @property
    def held(self) -> tuple[Any, ...]:
        return self._dataset, self._collate_fn

    def __call__(self, keys: Any, names: Sequence[Any] | None = None) -> Any:
        """Load and collate.

        Args:
            keys: In the order of the batch.
            names: The samples' keys in the epoch, for notes of errors and random numbers, when they are not `keys`.
        """
        dataset = self._dataset
        collate_fn = self._collate_fn
        collate = self._collate
        if (
            collate_fn is None
            and isinstance(dataset, LoadsBatches)
            and len(keys)
            and isinstance(collate, Collate)
            and collate.stacks_tensors
        ):
            return dataset.load_batch(keys, collate.alloc_or_empty)
        samples = self.load(keys, names)
        sample = current_sample.get()
        if sample is None:
            return collate_samples(samples, keys if names is None else names, collate_fn, collate)
        name, sample.name = sample.name, None  # none is at hand while they are collated
        try:
            return collate_samples(samples, keys if names is None else names, collate_fn, collate)
        finally:
            sample.name = name

    def load(self, keys: Any, names: Sequence[Any] | None = None) -> Any:
        """The samples, not collated."""
        sample = current_sample.get()
        name = None if sample is None else sample.name
        try:
            return self._load(keys, keys if names is None else names, sample)
        finally:
            if sample is not None:
                sample.name = name

    def _load(self, keys: Any, names: Sequence[Any], sample: SampleContext | None) -> Any:
        """The samples of a batch; `sample` is told which one is at hand."""
        dataset = self._dataset
        many = getattr(dataset, "__getitems__", None) or None  # torch also looks whether it is true
        if many is not None and not self._singly:
            several = BulkLoad()
            if sample is not None:
                sample.name = several
            try:
                together = copy_context().run(many, keys)
            except Exception:
                if not several.asked:
                    raise
            else:
                if not several.asked:
                    return together
            self._singly = True
        samples: list[Any] = []
        if sample is not None:
            sample.name = BatchBeingLoaded(names, samples)
        isolated(_load_some, dataset, many, iter(keys), samples)
        return samples


def _load_some(
    context: Context, clean: Context, dataset: Any, many: Callable[[Any], Any] | None, keys: Any, samples: list[Any]
) -> bool:
    """Go on until the keys are over, or this context is not clean any more (True)."""
    key = None
    append = samples.append
    try:
        for key in keys:
            append(dataset[key] if many is None else _one_of(many([key])))
            try:
                if context != clean:
                    return True
            except Exception:
                return True
    except Exception as error:
        add_note(error, f"aioloader: dataset index {safe_repr(key)}, sample {len(samples)} of its batch")
        raise
    return False


class FetchAsync:
    """The same for an async `__getitems__`, without collating.

    Args:
        many: It.
    """

    def __init__(self, many: Callable[[Any], Awaitable[Any]]) -> None:
        self._many = many
        self._singly = False

    async def __call__(self, keys: Any) -> Any:
        """Load."""
        sample = current_sample.get()
        assert sample is not None, "a step says which sample is at hand"
        if not self._singly:
            sample.name = several = BulkLoad()
            try:
                together = await self._many(keys)
            except Exception:
                if not several.asked:
                    raise
            else:
                if not several.asked:
                    return together
            self._singly = True
        samples: list[Any] = []
        sample.name = BatchBeingLoaded(keys, samples)
        for key in keys:
            samples.append(_one_of(await self._many([key])))
        return samples


def _one_of(loaded: Any) -> Any:
    """The sample in what was loaded for one key.

    Raises:
        TypeError: It is something else than a list of one sample.
    """
    samples = [] if isinstance(loaded, Mapping) else list(loaded)
    if len(samples) != 1:
        raise TypeError(
            f"a __getitems__ that asks for sample_rng() is called for one key at a time and must return a list of one "
            f"sample then, got {safe_repr(loaded)}; call sample_rng() in a map() or in __getitem__ instead"
        )
    return samples[0]


class FetchGroup(Holds):
    """The same for what the batch fold makes of keys."""

    def __init__(self, fetch: FetchBatch) -> None:
        self._fetch = fetch

    @property
    def held(self) -> tuple[Any, ...]:
        return (self._fetch,)

    def __call__(self, group: Group) -> Any:
        if group.left_over:
            self._fetch.load(group.samples, group.keys)
            return DROP
        return self._fetch(group.samples, group.keys)


@dataclass(frozen=True)
class FetchOne(Holds):
    """One key to one sample, which is handed out alone.

    Args:
        dataset: Map-style.
        convert: What is done with the sample; None: nothing.
    """

    dataset: Any
    convert: Callable[[Any], Any] | None

    @property
    def held(self) -> tuple[Any, ...]:
        return self.dataset, self.convert

    def __call__(self, key: Any) -> Any:
        sample = self.dataset[key]
        return sample if self.convert is None else self.convert(sample)


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


@dataclass(frozen=True)
class CollateAsync:
    """The same by the user's async function, on the loop.

    Args:
        collate_fn: From a list of samples to a batch.
    """

    collate_fn: Callable[[list[Any]], Awaitable[Any]]

    async def __call__(self, samples: Any) -> Any:
        keys = None
        if isinstance(samples, Group):
            samples, keys = samples.samples, samples.keys
        try:
            return await self.collate_fn(samples)
        except Exception as error:
            add_note(error, f"aioloader: cannot collate: {named(keys)}")
            raise
