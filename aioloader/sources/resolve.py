"""What a user may pass as a source, and what it is."""

import asyncio
import contextlib
import inspect
import warnings
from array import array
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from hashlib import blake2b
from typing import Any, Final
from weakref import WeakSet

import torch
from torch.utils.data import Dataset, IterableDataset

from aioloader.core.checks import is_async_callable
from aioloader.core.safe_text import safe_repr
from aioloader.core.source import CursorSource
from aioloader.errors import SourceUsedUpError
from aioloader.masking import masked
from aioloader.sources.files import Files

__all__ = [
    "Indexable",
    "StreamData",
    "check_dataset",
    "describe",
    "describe_content",
    "is_one_source",
    "resolve",
    "source_name",
    "warn_of_live",
]

TAKEN: Final = (
    "a map-style Dataset or Sequence, an IterableDataset or other iterable, an async iterable, "
    "or a function of no arguments that returns one of these"
)

_BUILT_IN = (list, tuple, range, array)  # reading one of these runs no code of the user's


@dataclass(frozen=True)
class Indexable:
    """A source with a length and samples by number.

    Attributes:
        data: The user's object.
        load: Its `__getitem__`, when calling that may run user code; None: read on the loop.
        is_async: Whether `load` is awaited.
        names: What samples are called in notes of errors, instead of their numbers.
    """

    data: Any
    load: Callable[[int], Any] | None
    is_async: bool
    names: Sequence[Any] | None = None

    @property
    def loads_many(self) -> bool:
        """Whether a whole batch is loaded by one call, off the loop."""
        many = getattr(self.data, "__getitems__", None)
        return self.load is not None and not self.is_async and bool(many) and not is_async_callable(many)

    @property
    def length(self) -> int:
        """How many samples there are, now."""
        return len(self.data)


@dataclass
class StreamData:
    """A source that is iterated.

    Attributes:
        make: The iterable, or the function that gives it.
        call: Whether `make` is a function.
        single_use: It is an iterator, and iterating uses it up.
        used: That has happened.
    """

    make: Any
    call: bool
    single_use: bool
    used: bool = False

    @property
    def length(self) -> int:
        """How many samples there are.

        Raises:
            TypeError: It does not say.
        """
        if self.call or not hasattr(self.make, "__len__"):
            raise TypeError(f"{describe(self.make)} has no length")
        return len(self.make)

    def check_unused(self) -> None:
        """Refuse a second epoch of a generator.

        Raises:
            SourceUsedUpError: One has begun already.
        """
        if self.used or _is_used(self.make):
            raise self._used_up()

    def _used_up(self) -> SourceUsedUpError:
        return SourceUsedUpError(
            f"{describe(self.make)} can be iterated once, and an epoch of it has begun already; pass the generator "
            f"function itself (without calling it), which is called anew for each epoch"
        )

    def use_again(self) -> None:
        """It is read once more in an epoch that reads it already, or is going to."""
        if self.single_use:
            raise self._used_up()

    def use(self) -> None:
        """An epoch begins."""
        if self.single_use:
            self.check_unused()
            self.used = True
            with contextlib.suppress(TypeError):  # an iterator that cannot be referred to weakly, or has no hash
                _used.add(self.make)


_used: WeakSet[Any] = WeakSet()  # a generator may be passed to several pipelines


def _is_used(iterator: Any) -> bool:
    try:
        return iterator in _used
    except TypeError:
        return False


def resolve(source: Any) -> Indexable | StreamData:
    """What `source` is.

    Raises:
        TypeError: None of what is taken.
        SourceUsedUpError: A generator that has nothing to give.
    """
    if isinstance(source, type):
        raise TypeError(f"a source must be {TAKEN}; got the class {source.__name__}: pass an instance of it")
    if isinstance(source, str | bytes | bytearray | Mapping):
        hint = "list(mapping.items())" if isinstance(source, Mapping) else "[it] for one sample"
        raise TypeError(f"a source must be {TAKEN}; got {describe(source)}, whose samples are ambiguous: pass {hint}")
    if isinstance(source, IterableDataset | CursorSource):
        return StreamData(source, call=False, single_use=False)
    indexable = _indexable(source)
    if indexable is not None:
        return indexable
    _check_can_begin(source)
    if isinstance(source, AsyncIterable):
        return StreamData(source, call=False, single_use=isinstance(source, AsyncIterator))
    if isinstance(source, Iterable):
        return StreamData(source, call=False, single_use=isinstance(source, Iterator))
    if callable(source):
        _check_no_arguments(source)
        return StreamData(source, call=True, single_use=False)
    if inspect.isawaitable(source):
        raise TypeError(f"a source must be {TAKEN}; got {describe(source)}, a coroutine: await it first")
    raise TypeError(f"a source must be {TAKEN}; got {describe(source)}")


def warn_of_live(loader: Any, *streams: Any) -> None:
    """Warn whoever begins a `for` loop in the thread of an event loop, if one of `streams` waits for others to send.

    Called by what the caller has called.
    """
    if asyncio._get_running_loop() is not None and any(map(_is_live, streams)):
        warnings.warn(
            f"`for` over {loader!r} blocks the event loop that runs in this thread, and its source is live: if tasks "
            f"of that loop send to it, both wait for ever; use `async for`, or send from threads",
            RuntimeWarning,
            stacklevel=3,
        )


def _is_live(stream: Any) -> bool:
    """Whether samples come when others send them, and more may come."""
    return isinstance(stream, CursorSource) and not stream.replayable and not getattr(stream, "closed", False)


def is_one_source(value: Any) -> bool:
    """Whether this is a source itself, and no list of sources or of numbers."""
    return isinstance(value, (Dataset, CursorSource, AsyncIterable))


def check_dataset(dataset: Any) -> None:
    """Refuse for `DataLoader` what it could neither index nor iterate, at its first batch, and a name for a dataset.

    Raises:
        TypeError: Which of these it is, and the way out.
    """
    rule = "dataset must be a map-style Dataset with __getitem__, an IterableDataset or an async iterable"
    if isinstance(dataset, type):
        raise TypeError(f"{rule}; got the class {dataset.__name__}: pass an instance of it")
    if isinstance(dataset, str | bytes | bytearray):
        raise TypeError(
            f"{rule}; got {describe(dataset)}, whose samples would be its characters: pass a Dataset that reads it, "
            f"or aioloader.sources.Files"
        )
    if isinstance(dataset, (IterableDataset, AsyncIterable, CursorSource)):
        return
    if hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__"):
        return
    hint = ": pass one of these"
    if isinstance(dataset, Iterator):
        hint = ": pass an IterableDataset whose __iter__ makes it, or its function to Pipeline"
    elif isinstance(dataset, Iterable):
        hint = ": make it an IterableDataset, or pass it to Pipeline"
    elif callable(dataset):
        hint = ": pass what it returns, or pass it to Pipeline"
    raise TypeError(f"{rule}; got {describe(dataset)}{hint}")


def _check_can_begin(source: Any) -> None:
    """Refuse a generator that is over already, or is at work: it would give nothing, or raise."""
    over = running = False
    if inspect.isgenerator(source):
        over, running = source.gi_frame is None, source.gi_running
    elif inspect.isasyncgen(source):
        over, running = source.ag_frame is None, source.ag_running
    if over or running:
        raise SourceUsedUpError(
            f"{describe(source)} can be iterated once, and {'is over already' if over else 'is being iterated now'}; "
            f"pass the generator function itself (without calling it), which is called anew for each epoch"
        )


def _indexable(source: Any) -> Indexable | None:
    kind = type(source)
    if isinstance(source, Files):
        if source.read is None:
            return Indexable(source, None, is_async=False)  # the paths are there
        return Indexable(source, source.__getitem__, is_async=False, names=source.paths)
    if isinstance(source, torch.Tensor) or kind.__module__ == "numpy":
        if not getattr(source, "ndim", 1):
            raise TypeError(f"a source must be {TAKEN}; got {describe(source)} without dimensions")
        if hasattr(kind, "__len__"):
            return Indexable(source, None, is_async=False)
    if kind in _BUILT_IN:
        return Indexable(source, None, is_async=False)
    if not hasattr(kind, "__len__") and not hasattr(source, "__len__"):
        return None
    if hasattr(kind, "__getitem__"):
        return Indexable(source, source.__getitem__, is_async_callable(kind.__getitem__))
    if hasattr(kind, "__getitems__"):
        if is_async_callable(kind.__getitems__):
            return Indexable(source, _OneOfManyAsync(source), is_async=True)
        return Indexable(source, _OneOfMany(source), is_async=False)
    return None


@dataclass(frozen=True)
class _OneOfMany:
    """`__getitem__` for a dataset that has only `__getitems__`."""

    data: Any

    def __call__(self, key: int) -> Any:
        return self.data.__getitems__([key])[0]


@dataclass(frozen=True)
class _OneOfManyAsync:
    """The same where `__getitems__` is async."""

    data: Any

    async def __call__(self, key: int) -> Any:
        return (await self.data.__getitems__([key]))[0]


def _check_no_arguments(fn: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # a built-in that does not tell
        return
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"a source must be {TAKEN}; got the function {describe(fn)}{signature}, which wants arguments ({error}): "
            f"pass functools.partial(fn, ...) or a lambda"
        ) from None


def describe_content(source: Indexable | StreamData) -> str:
    """What a source gives, as far as it tells: its name, and of lists and sources of our own also what is in them."""
    data = source.data if isinstance(source, Indexable) else source.make
    name = source_name(data)
    if isinstance(data, CursorSource):
        told = sorted(getattr(data, "__dict__", {}).items())
        name += f"({', '.join(f'{key}={_plain(value)}' for key, value in told)})"
    elif isinstance(data, _BUILT_IN) and all(isinstance(value, str | int | float) for value in data):
        name += f"({_plain(data if isinstance(data, range) else list(data))})"
    elif isinstance(source, Indexable):
        name += f"({source.length})"
    name = masked(name)  # it is written down beside a cache
    if len(name) > 300:
        name = f"{name[:200]}... {blake2b(name.encode(), digest_size=16).hexdigest()}"
    return name


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, str | int | float | bool | range):
        return repr(value)
    if is_dataclass(value):
        return _plain([getattr(value, each.name) for each in fields(value)])
    return source_name(value)


def source_name(source: Any) -> str:
    """A source in a pipeline's repr and in statistics: the function's name, else the type's."""
    name = getattr(source, "__qualname__", None) or type(source).__qualname__
    return str(name).rpartition("<locals>.")[2]


def describe(source: Any) -> str:
    """A user's object in an error message: its name or its type, and never much of its content."""
    name = getattr(source, "__qualname__", None)
    if name is not None:
        return f"{type(source).__name__} {name.rpartition('<locals>.')[2]}"
    text = safe_repr(source, 60) if isinstance(source, int | float | str | bytes | None) else ""
    return f"{text} of type {type(source).__name__}" if text else f"an object of type {type(source).__name__}"
