"""A list of keys to a batch, in one call: what a worker does where the samples of a batch are loaded together."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from math import inf
from time import perf_counter
from typing import Any, Self

from aioloader.core.memory import Alloc, IntoMemory
from aioloader.core.policies import Errors
from aioloader.core.safe_text import add_note, safe_repr
from aioloader.core.sizes import rough_bytes
from aioloader.executors.chunk import DROP
from aioloader.executors.current_sample import BatchBeingLoaded, BulkLoad, SampleContext, current_sample
from aioloader.executors.epochs import Holds
from aioloader.executors.isolated import isolated
from aioloader.executors.partial import NO_SAMPLES, KeysLeft, LeavesOut, LeftOut, Partial
from aioloader.stages.collate import DEFAULT, Collate, are_plain, collate_samples, named
from aioloader.stages.group import Group
from aioloader.stages.load_one import TriedInPlace, one_of

__all__ = [
    "CollateAny",
    "CollateAsync",
    "FetchAsync",
    "FetchBatch",
    "FetchGroup",
    "FetchOne",
    "LoadsBatches",
    "is_light",
]


class LoadsBatches(ABC):
    """A dataset that can load samples straight to where they will be in the batch, so that nothing is copied.

    Not found by the method's name: a user's dataset may have one of that name, too.
    """

    @abstractmethod
    def load_batch(self, keys: Sequence[Any], alloc: Alloc) -> Any:
        """The samples with these keys as torch's `default_collate` would batch them, in memory of `alloc`."""


class FetchBatch(Holds, LeavesOut, IntoMemory):
    """Keys to a batch.

    A `__getitems__` that asks for `sample_rng()` is called for one key at a time from then on: a call for several
    samples has no numbers that belong to one of them, and those of the batch would depend on its size and order. That
    it asks is known when it does; what it had begun is begun again.

    Args:
        dataset: Map-style, with `__getitems__` or without.
        collate_fn: From a list of samples to a batch; None: `collate`.
        collate: The default; `Group`: the samples are left as they are, for a step that collates them.
        leaves_out: Samples that fail with such errors are left out of their batch, which is a `Partial` then. They are
            loaded one by one where a call for several fails, or has cost a worker process.
    """

    def __init__(
        self,
        dataset: object,
        collate_fn: Callable[[list[Any]], Any] | None,
        collate: Collate | type[Group],
        leaves_out: Errors = (),
    ) -> None:
        self._dataset = dataset
        self._leaves_out = leaves_out
        self._collate_fn = collate_fn
        self._collate = collate
        self._singly = False  # `__getitems__` asks which sample is at hand

    def into(self, alloc: Alloc | None) -> Self:
        collate = self._collate.into(alloc) if isinstance(self._collate, Collate) else self._collate
        return type(self)(self._dataset, self._collate_fn, collate, self._leaves_out)

    @property
    def held(self) -> tuple[Any, ...]:
        return self._dataset, self._collate_fn

    def __call__(self, keys: Any, names: Sequence[Any] | None = None) -> Any:
        """Load and collate.

        Args:
            keys: In the order of the batch; or `KeysLeft`.
            names: The samples' keys in the epoch, for notes of errors and random numbers, when they are not `keys`.
        """
        dataset = self._dataset
        collate_fn = self._collate_fn
        collate = self._collate
        left_out: list[LeftOut] = []
        singly = type(keys) is KeysLeft
        if singly:
            if keys.only is not None:
                return self._tried(keys.keys[keys.only], (keys.keys if names is None else names)[keys.only])
            keys, left_out = keys.keys, [*keys.left_out]
        if (
            collate_fn is None
            and not singly
            and isinstance(dataset, LoadsBatches)
            and len(keys)
            and isinstance(collate, Collate)
            and collate.stacks_tensors
        ):
            try:
                return dataset.load_batch(keys, collate.alloc_or_empty)
            except self._leaves_out:
                pass  # it comes again when they are loaded one by one
        samples = self.load(keys, names, left_out, singly=singly)
        named = keys if names is None else names
        if not left_out:
            return self._collated(samples, named)
        samples, named = _without(left_out, samples), _without(left_out, list(named))
        return Partial(self._collated(samples, named) if samples else NO_SAMPLES, left_out, "fetch")

    def without(self, keys: Any, at: int | None, error: BaseException) -> KeysLeft | None:
        if not isinstance(error, self._leaves_out):
            return None
        left = keys if type(keys) is KeysLeft else KeysLeft(keys)
        if at is not None:
            return KeysLeft(left.keys, sorted([*left.left_out, LeftOut(at, error)], key=_place))
        return None if left is keys else left  # it may have been one call for all of them

    def _tried(self, key: Any, name: Any) -> Any:
        """Load one sample, to see whether this process survives it; an error is told when its batch is loaded."""
        with suppress(Exception):
            self.load([key], [name], singly=True)
        return NO_SAMPLES

    def _collated(self, samples: Any, names: Any) -> Any:
        sample = current_sample.get()
        if sample is None:
            return collate_samples(samples, names, self._collate_fn, self._collate)
        name, sample.name = sample.name, None  # none is at hand while they are collated
        try:
            return collate_samples(samples, names, self._collate_fn, self._collate)
        finally:
            sample.name = name

    def load(
        self,
        keys: Any,
        names: Sequence[Any] | None = None,
        left_out: list[LeftOut] | None = None,
        *,
        singly: bool = False,
    ) -> Any:
        """The samples, not collated. Those that are left out have something in their places, and are in `left_out`.

        Args:
            keys: Of the samples.
            names: See `__call__`.
            left_out: Those that are in it already are not loaded.
            singly: One by one, whatever the dataset offers.
        """
        sample = current_sample.get()
        name = None if sample is None else sample.name
        names, left_out = keys if names is None else names, [] if left_out is None else left_out
        try:
            return self._load(keys, names, sample, left_out, singly=singly)
        finally:
            if sample is not None:
                sample.name = name

    def _load(
        self, keys: Any, names: Sequence[Any], sample: SampleContext | None, left_out: list[LeftOut], *, singly: bool
    ) -> Any:
        """The samples of a batch; `sample` is told which one is at hand."""
        dataset = self._dataset
        many = getattr(dataset, "__getitems__", None) or None  # torch also looks whether it is true
        if many is not None and not (singly or self._singly):
            several = BulkLoad()
            if sample is not None:
                sample.name = several
            try:
                together = copy_context().run(many, keys)
            except Exception as error:
                if not several.asked and not isinstance(error, self._leaves_out):
                    raise
            else:
                if not several.asked:
                    return together
            self._singly = several.asked
        samples: list[Any] = []
        if sample is not None:
            sample.name = BatchBeingLoaded(names, samples)
        if self._leaves_out:
            begins = None if sample is None else sample.begins
            isolated(_load_some_of, dataset, many, iter(keys), samples, self._leaves_out, left_out, begins)
            if begins is not None:
                begins(None)
            left_out.sort(key=_place)
        else:
            isolated(_load_some, dataset, many, iter(keys), samples)
        return samples


def _place(one: LeftOut) -> int:
    return one.at


def _without(left_out: list[LeftOut], samples: list[Any]) -> list[Any]:
    """`samples`, or their names, without those that are left out."""
    out = {one.at for one in left_out}
    return [sample for at, sample in enumerate(samples) if at not in out]


def _load_some(
    context: Context, clean: Context, dataset: Any, many: Callable[[Any], Any] | None, keys: Any, samples: list[Any]
) -> bool:
    """Go on until the keys are over, or this context is not clean any more (True)."""
    key = None
    append = samples.append
    try:
        for key in keys:
            append(dataset[key] if many is None else one_of(many([key])))
            try:
                if context != clean:
                    return True
            except Exception:
                return True
    except Exception as error:
        add_note(error, f"aioloader: dataset index {safe_repr(key)}, sample {len(samples)} of its batch")
        raise
    return False


def _load_some_of(
    context: Context,
    clean: Context,
    dataset: Any,
    many: Callable[[Any], Any] | None,
    keys: Any,
    samples: list[Any],
    leaves_out: Errors,
    left_out: list[LeftOut],
    begins: Callable[[int], None] | None,
) -> bool:
    """The same, and samples that fail with certain errors are left out; None is in their places meanwhile.

    Those that are in `left_out` are not loaded. `begins` is told which one is.
    """
    key = None
    out = {one.at for one in left_out}
    began = perf_counter()
    try:
        for key in keys:
            if len(samples) in out:
                samples.append(None)
                continue
            if begins is not None:
                begins(len(samples))
            try:
                samples.append(dataset[key] if many is None else one_of(many([key])))
            except leaves_out as error:
                attempts = 1
                if type(dataset) is TriedInPlace:
                    attempts, began = dataset.attempts, dataset.began
                left_out.append(LeftOut(len(samples), error, perf_counter() - began, attempts))
                samples.append(None)
            began = perf_counter()
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
        leaves_out: See `FetchBatch`.
    """

    def __init__(self, many: Callable[[Any], Awaitable[Any]], leaves_out: Errors = ()) -> None:
        self._many = many
        self._leaves_out = leaves_out
        self._singly = False

    async def __call__(self, keys: Any) -> Any:
        """Load."""
        sample = current_sample.get()
        assert sample is not None, "a step says which sample is at hand"
        if not self._singly:
            sample.name = several = BulkLoad()
            try:
                together = await self._many(keys)
            except Exception as error:
                if not several.asked and not isinstance(error, self._leaves_out):
                    raise
            else:
                if not several.asked:
                    return together
            self._singly = several.asked
        samples: list[Any] = []
        left_out: list[LeftOut] = []
        sample.name = BatchBeingLoaded(keys, samples)
        for key in keys:
            began = perf_counter()
            try:
                samples.append(one_of(await self._many([key])))
            except self._leaves_out as error:
                left_out.append(LeftOut(len(samples), error, perf_counter() - began))
                samples.append(None)
        if not left_out:
            return samples
        return Partial(_without(left_out, samples) or NO_SAMPLES, left_out, "dataset.__getitems__")


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

    def __call__(self, key: object) -> Any:
        sample = self.dataset[key]
        return sample if self.convert is None else self.convert(sample)


@dataclass(frozen=True)
class CollateAny(IntoMemory):
    """A list of samples, or a group of the batch fold, to a batch.

    Args:
        collate_fn: From a list of samples to a batch; None: `collate`.
        collate: The default.
    """

    collate_fn: Callable[[list[Any]], Any] | None
    collate: Collate = DEFAULT

    def into(self, alloc: Alloc | None) -> Self:
        return replace(self, collate=self.collate.into(alloc))

    def __call__(self, samples: Any) -> Any:
        keys = None
        if isinstance(samples, Group):
            samples, keys = samples.samples, samples.keys
        return collate_samples(samples, keys, self.collate_fn, self.collate)


def is_light(samples: Any, most_bytes: float) -> bool:
    """Whether the default collate runs nothing of the user's for them: a list or a `Group`, or a `Partial` of one.

    Args:
        samples: These.
        most_bytes: Whether they are no larger, if they are like the first one. Infinity: whatever they are.
    """
    if type(samples) is Partial:
        samples = samples.batch
    if type(samples) is Group:
        samples = samples.samples
    if type(samples) is not list or not are_plain(samples):
        return False
    return most_bytes == inf or not samples or len(samples) * rough_bytes(samples[0]) <= most_bytes


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
