"""How the object that a user passes as a source is read."""

import asyncio
import contextlib
import inspect
import warnings
from array import array
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, Final
from weakref import WeakSet

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from aioloader.core.checks import is_async_callable
from aioloader.core.safe_text import safe_repr
from aioloader.core.source import CursorSource, SourceContext
from aioloader.errors import SourceUsedUpError
from aioloader.masking import masked
from aioloader.sources.fetch import NamedSamples, PlannedKeys
from aioloader.sources.files import Files
from aioloader.sources.mistaken import meant, table_in
from aioloader.sources.sampler_order import Draws

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

_BOUNDED = (Files, NamedSamples)
_BUILT_IN = (list, tuple, range, array)  # reading one of these runs no user code


@dataclass(frozen=True)
class Indexable:
    """A source with a length and indices.

    Attributes:
        data: The user's object.
        load: Its `__getitem__` if that may run user code; None if it is read on the loop.
        is_async: Whether `load` is awaited.
        names: The names of samples in notes of errors, instead of their indices.
        begin: Plans how the samples of an epoch are fetched, see `PlannedKeys`; None: by their indices.
    """

    data: Any
    load: Callable[[int], Any] | None
    is_async: bool
    names: Sequence[Any] | None = None
    begin: Callable[[SourceContext], Callable[[Sequence[int], bool], Sequence[Any]]] | None = None

    @property
    def loads_many(self) -> bool:
        """Whether one call loads a batch, off the loop."""
        many = getattr(self.data, "__getitems__", None)
        return self.load is not None and not self.is_async and bool(many) and not is_async_callable(many)

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """How far ahead it may be loaded, in samples and in bytes; None: for the engine to decide."""
        return (self.data.ahead, self.data.ahead_bytes) if isinstance(self.data, _BOUNDED) else (None, None)

    @property
    def length(self) -> int:
        """The current number of samples."""
        return len(self.data)


@dataclass
class StreamData:
    """A source that is iterated.

    Attributes:
        make: The iterable, or the function that returns it.
        call: Whether `make` is a function.
        single_use: Whether it is an iterator, which iterating uses up.
        used: Whether that has happened.
    """

    make: Any
    call: bool
    single_use: bool
    used: bool = False

    @property
    def length(self) -> int:
        """The number of samples.

        Raises:
            TypeError: It is not known.
        """
        if self.call or not hasattr(self.make, "__len__"):
            raise TypeError(f"{describe(self.make)} has no length")
        return len(self.make)

    def check_unused(self) -> None:
        """Refuse a second epoch of a generator.

        Raises:
            SourceUsedUpError: An epoch has begun already.
        """
        if self.used or _is_used(self.make):
            raise self._used_up()

    def _used_up(self) -> SourceUsedUpError:
        return SourceUsedUpError(
            f"{describe(self.make)} can be iterated once, and an epoch of it has begun already; pass the generator "
            f"function itself (without calling it), which is called again for each epoch"
        )

    def of_epoch(self, epoch: int, draws: Draws) -> "StreamData":
        """What is iterated in an epoch: one whose order is drawn has another in each.

        Args:
            epoch: Its number.
            draws: What its order is drawn from.
        """
        return self

    def begin(self, epoch: int, draws: Draws) -> None:
        """An epoch begins.

        Args:
            epoch: See `of_epoch`.
            draws: See `of_epoch`.

        Raises:
            SourceUsedUpError: It can be iterated once, and was.
        """
        self.use()

    def use_again(self) -> None:
        """It is read once more in an epoch that reads it already, or is going to."""
        if self.single_use:
            raise self._used_up()

    def use(self) -> None:
        """Note that an epoch begins."""
        if self.single_use:
            self.check_unused()
            self.used = True
            with contextlib.suppress(TypeError):  # an iterator without weak references or hash
                _used.add(self.make)


_used: WeakSet[Any] = WeakSet()  # a generator may be passed to several pipelines


def _is_used(iterator: object) -> bool:
    try:
        return iterator in _used
    except TypeError:
        return False


def resolve(source: object) -> Indexable | StreamData:
    """How `source` is read.

    Raises:
        TypeError: It cannot be a source.
        SourceUsedUpError: It is a generator that is used up.
    """
    if isinstance(source, type):
        raise TypeError(f"a source must be {TAKEN}; got the class {source.__name__}: pass an instance of it")
    if isinstance(source, str | bytes | bytearray | Mapping | PurePath):
        raise TypeError(
            f"a source must be {TAKEN}; got {describe(source)}, whose samples are ambiguous: pass {meant(source)}"
        )
    if (table := table_in(source)) is not None:
        raise TypeError(f"a source must be {TAKEN}; got {table}")
    if isinstance(source, IterableDataset | CursorSource):
        return StreamData(source, call=False, single_use=False)
    indexable = _indexable(source)
    if indexable is not None:
        return indexable
    _check_can_begin(source)
    if isinstance(source, AsyncIterable):
        return StreamData(source, call=False, single_use=isinstance(source, AsyncIterator))
    if isinstance(source, Iterable):
        once = isinstance(source, Iterator) and not isinstance(source, Sampler)
        return StreamData(source, call=False, single_use=once)
    if callable(source):
        _check_no_arguments(source)
        return StreamData(source, call=True, single_use=False)
    if inspect.isawaitable(source):
        raise TypeError(f"a source must be {TAKEN}; got {describe(source)}, a coroutine: await it first")
    raise TypeError(f"a source must be {TAKEN}; got {describe(source)}")


def warn_of_live(loader: object, *streams: object) -> None:
    """Warn of a `for` loop in the thread of an event loop if one of `streams` waits for others to send.

    The warning names the caller of the function that calls this one.
    """
    if asyncio._get_running_loop() is not None and any(map(_is_live, streams)):
        warnings.warn(
            f"`for` over {loader!r} blocks the event loop that runs in this thread, and its source is live: if tasks "
            f"of that loop send to it, both wait for ever; use `async for`, or send from threads",
            RuntimeWarning,
            stacklevel=3,
        )


def _is_live(stream: object) -> bool:
    """Whether its samples come when others send them, and more may come."""
    return isinstance(stream, CursorSource) and not stream.replayable and not getattr(stream, "closed", False)


def is_one_source(value: object) -> bool:
    """Whether this is a source itself, and not a list of sources or numbers."""
    return isinstance(value, (Dataset, CursorSource, AsyncIterable))


def check_dataset(dataset: object) -> None:
    """Refuse what `DataLoader` can neither index nor iterate, or what looks like a mistake: a class, or a name.

    Raises:
        TypeError: What it is, and the way out.
    """
    rule = "dataset must be a map-style Dataset with __getitem__, an IterableDataset or an async iterable"
    if isinstance(dataset, type):
        raise TypeError(f"{rule}; got the class {dataset.__name__}: pass an instance of it")
    if isinstance(dataset, str | bytes | bytearray | PurePath):
        raise TypeError(f"{rule}; got {describe(dataset)}, whose samples are ambiguous: pass {meant(dataset)}")
    if isinstance(dataset, (IterableDataset, AsyncIterable, CursorSource)):
        return
    if (table := table_in(dataset)) is not None:
        raise TypeError(f"{rule}; got {table}")
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


def _check_can_begin(source: object) -> None:
    """Refuse a generator that has ended, or is running: it would give nothing, or raise."""
    over = running = False
    if inspect.isgenerator(source):
        over, running = source.gi_frame is None, source.gi_running
    elif inspect.isasyncgen(source):
        over, running = source.ag_frame is None, source.ag_running
    if over or running:
        raise SourceUsedUpError(
            f"{describe(source)} can be iterated once, and {'is over already' if over else 'is being iterated now'}; "
            f"pass the generator function itself (without calling it), which is called again for each epoch"
        )


def _indexable(source: Any) -> Indexable | None:
    kind = type(source)
    if isinstance(source, Files) and source.read is not None:
        return Indexable(source, source.__getitem__, is_async=False, names=source.paths)
    if isinstance(source, NamedSamples):
        return Indexable(source, source.__getitem__, is_async=False, names=source.names)
    if isinstance(source, PlannedKeys):
        return Indexable(source, None, is_async=False, names=source.names, begin=source.begin)
    if _is_in_memory(source):
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


def _is_in_memory(source: object) -> bool:
    """Whether its samples are in memory, and reading one runs no user code."""
    if isinstance(source, Files):
        return source.read is None  # its samples are the paths
    if isinstance(source, torch.Tensor) or type(source).__module__ == "numpy":
        if not getattr(source, "ndim", 1):
            raise TypeError(f"a source must be {TAKEN}; got {describe(source)} without dimensions")
        return hasattr(type(source), "__len__")
    return type(source) in _BUILT_IN


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
    except (TypeError, ValueError):  # a built-in without a signature
        return
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"a source must be {TAKEN}; got the function {describe(fn)}{signature}, which wants arguments ({error}): "
            f"pass functools.partial(fn, ...) or a lambda"
        ) from None


def describe_content(source: Indexable | StreamData) -> str:
    """A description of what a source gives: its name, and for lists and our own sources also their content."""
    data = source.data if isinstance(source, Indexable) else source.make
    name = source_name(data)
    if isinstance(data, CursorSource):
        there = getattr(data, "__dict__", {}).items()
        attributes = sorted(item for item in there if item[0] != "__orig_class__")  # of `Source[T](...)`
        name += f"({', '.join(f'{key}={_plain(value)}' for key, value in attributes)})"
    elif isinstance(data, _BUILT_IN) and all(isinstance(value, str | int | float) for value in data):
        name += f"({_plain(data if isinstance(data, range) else list(data))})"
    elif isinstance(source, Indexable):
        name += f"({source.length})"
    name = masked(name)  # it is stored with a cache
    if len(name) > 300:
        name = f"{name[:200]}... {blake2b(name.encode(), digest_size=16).hexdigest()}"
    return name


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, str | int | float | bool | range):
        return repr(value)
    if isinstance(value, PurePath):
        return repr(str(value))
    if is_dataclass(value):
        return _plain([getattr(value, each.name) for each in fields(value)])
    return source_name(value)


def source_name(source: object) -> str:
    """The name of a source in reprs and statistics: the function's, else the type's."""
    name = getattr(source, "__qualname__", None) or type(source).__qualname__
    return str(name).rpartition("<locals>.")[2]


def describe(source: object) -> str:
    """The user's object for an error message: its name or type, and little of its content."""
    name = getattr(source, "__qualname__", None)
    if name is not None:
        return f"{type(source).__name__} {name.rpartition('<locals>.')[2]}"
    text = safe_repr(source, 60) if isinstance(source, int | float | str | bytes | None) else ""
    return f"{text} of type {type(source).__name__}" if text else f"an object of type {type(source).__name__}"
