"""`Objects`: the objects of a store, fetched by many requests at once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import index
from typing import Any, Literal, Unpack, overload

from torch import Tensor

from aioloader.core.checks import check_ahead, check_count
from aioloader.core.memory import tensor_over_bytes
from aioloader.core.policies import Hedge, Rate, Retry
from aioloader.core.safe_text import add_note, safe_repr
from aioloader.core.typevars import T_co
from aioloader.errors import BrokenDataError
from aioloader.masking import mask_message
from aioloader.sources.fetch import FetchSource
from aioloader.sources.listing import Listing
from aioloader.sources.options import ObjectsOptions
from aioloader.sources.requests import CutShortError, store_policies
from aioloader.sources.stores import Version, request_options, with_options

__all__ = ["Objects"]

Range = tuple[int, int]
Ranges = Range | Mapping[str, Range] | Sequence[Range | None]
Request = tuple[str, int, int]  # a key, and where its range starts and ends


class Objects(FetchSource[T_co]):
    """The objects of a store, or ranges of them: with `keys` indexable, with `prefix` a stream of all that is there.

    With `keys`, `Pipeline(Objects(...)).shuffle()` is a full permutation, `len` is known, and `DataLoader` takes it as
    a dataset. With `prefix`, the listing is read page by page, at most two pages ahead, and the objects come in the
    order of their keys; those that are written meanwhile may be included or not.

    An object that is missing or cannot be read raises in its position, the store's own error with the key in a note,
    and the next one follows. The store itself retries what may succeed later, see its `retry_config`, or `retry` does.

    If `ranges` has several of one object, they must all be of the same version of it: if it is rewritten meanwhile, the
    next range is an error.

    Cursor: with `keys` the position; with `prefix` the last key, so that a resume lists from there.

    Args:
        store: Any store of obstore (`aioloader[objects]`): S3, GCS, Azure, HTTP, a folder, memory.
        keys: Which objects, a sequence; a key may come twice.
        prefix: Instead of `keys`: all objects in this folder and below; `""` means all. A store that lists in no
            order (a folder, HTTP) is listed to its end first.
        ranges: Which bytes of each object, as (start, end) without `end`: one pair for all; a mapping from key to pair,
            with objects read in full that have none; or, with `keys`, a sequence as long, with None for all of one.
        read: `"bytes"`: a sample is a `bytes`. `"tensor"`: a uint8 tensor over the memory that the store received into,
            without a copy; collate copies it once, into the batch. Do not write to it, a store may share that memory.
            `"buffer"`: obstore's own `Bytes`, without a copy.
        with_key: Samples are (key, content), for instance if the key contains the label.
        concurrency: Requests in flight at once, at least 1.
        ahead, ahead_bytes: Objects requested and not taken, at most, in number (at least `concurrency`) and in bytes;
            as in `Pipeline.map`.
        client_options, retry_config: Timeouts and retries in place of the store's own, as obstore names them. By its
            defaults, a request times out after 30 seconds and is retried for up to three minutes.
        retry, timeout, hedge, rate: What is done about objects that fail, take long or are too many, as in
            `Pipeline.map`. With `retry`, the store makes no retries of its own; what another attempt cannot change is
            not retried, unless `Retry.on` says so: see `docs/failures.md`. Listings are retried page by page.

    Raises:
        ImportError: obstore is not installed.
        TypeError: An argument has the wrong type.
        ValueError: An argument is invalid; both or none of `keys` and `prefix`.

    ```python
    store = obstore.store.S3Store("bucket", region="eu-central-1")
    loader = Pipeline(Objects(store, keys, concurrency=256)).shuffle().map(decode).batch(64)
    ```
    """

    @overload
    def __init__(
        self: "Objects[bytes]",
        store: Any,
        keys: Sequence[str] | None = None,
        *,
        read: Literal["bytes"] = "bytes",
        with_key: Literal[False] = False,
        **options: Unpack[ObjectsOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "Objects[Tensor]",
        store: Any,
        keys: Sequence[str] | None = None,
        *,
        read: Literal["tensor"],
        with_key: Literal[False] = False,
        **options: Unpack[ObjectsOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "Objects[tuple[str, bytes]]",
        store: Any,
        keys: Sequence[str] | None = None,
        *,
        read: Literal["bytes"] = "bytes",
        with_key: Literal[True],
        **options: Unpack[ObjectsOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "Objects[tuple[str, Tensor]]",
        store: Any,
        keys: Sequence[str] | None = None,
        *,
        read: Literal["tensor"],
        with_key: Literal[True],
        **options: Unpack[ObjectsOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        store: Any,
        keys: Sequence[str] | None = None,
        *,
        read: Literal["bytes", "tensor", "buffer"] = "bytes",
        with_key: bool = False,
        **options: Unpack[ObjectsOptions],
    ) -> None: ...

    def __init__(
        self,
        store: Any,
        keys: Sequence[str] | None = None,
        *,
        prefix: str | None = None,
        ranges: Ranges | None = None,
        read: Literal["bytes", "tensor", "buffer"] = "bytes",
        with_key: bool = False,
        concurrency: int = 64,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        client_options: Any = None,
        retry_config: Any = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
    ) -> None:
        _require_obstore()
        if not _is_store(store):
            raise TypeError(
                f"Objects takes a store of obstore, got {safe_repr(store, 80)} of type {type(store).__name__}; "
                f"pass for instance obstore.store.from_url('s3://bucket')"
            )
        self.policies = store_policies(retry, timeout, hedge, rate)
        options = request_options(client_options, retry_config, retry, source="Objects")
        store = with_options(store, options, source="Objects")
        if (keys is None) == (prefix is None):
            what = "neither" if keys is None else "both"
            raise ValueError(
                f"Objects takes either keys or prefix, got {what}; prefix='' means all objects of the store"
            )
        if read not in ("bytes", "tensor", "buffer"):
            raise ValueError(f"read must be 'bytes', 'tensor' or 'buffer', got {read!r}")
        self._store = store
        self._read = read
        self._with_key = bool(with_key)
        self.concurrency = check_count("concurrency", concurrency, least=1)
        self.ahead, self.ahead_bytes = check_ahead(ahead, ahead_bytes, self.concurrency)
        self._range: Range | None = None
        self._versions: dict[str, Version] = {}  # of objects with several ranges
        self._range_of: Mapping[str, Range] = {}
        self._keys: Sequence[str | Request] | Listing
        if keys is not None:
            self._keys = requests = _requests(_checked_keys(keys), ranges)
            count_of = Counter(request[0] for request in requests if isinstance(request, tuple))
            self._versions = {key: Version(store, key) for key, count in count_of.items() if count > 1}
        else:
            if not isinstance(prefix, str):
                raise TypeError(f"prefix must be a str, got {safe_repr(prefix, 80)} of type {type(prefix).__name__}")
            self._keys = Listing(store, prefix, self.policies)
        if ranges is None:
            pass
        elif isinstance(ranges, Mapping):
            self._range_of = {key: _checked_range(pair, key) for key, pair in ranges.items()}
        elif _is_pair(ranges):
            self._range = _checked_range(ranges, None)
        elif keys is None:
            raise TypeError(
                f"with prefix, ranges must be one pair (start, end) or a mapping from key to pair, "
                f"got {safe_repr(ranges, 80)}"
            )

    @property
    def keys(self) -> Any:
        """Keys, or keys with ranges; a sequence, or a stream of those that are listed."""
        return self._keys

    def __len__(self) -> int:
        """The number of samples.

        Raises:
            TypeError: It is not known, with `prefix`.
        """
        if isinstance(self._keys, Listing):
            raise TypeError(
                "Objects(prefix=...) has no length, as it lists while it reads; pass it to Pipeline, or pass keys"
            )
        return len(self._keys)

    async def __getitem__(self, number: int) -> Any:
        if isinstance(self._keys, Listing):
            raise TypeError(
                "Objects(prefix=...) cannot be indexed, as it lists while it reads; pass it to Pipeline, or pass keys"
            )
        return await self.fetch(self._keys[number])

    async def fetch(self, key: str | Request) -> Any:
        """The content of an object, or of its range.

        Raises:
            BrokenDataError: The object ends within the range.
            Exception: The store's own; FileNotFoundError if it is missing.
        """
        import obstore

        start, end = 0, 0
        if isinstance(key, tuple):
            key, start, end = key
        elif self._range is not None:
            start, end = self._range
        elif self._range_of:
            start, end = self._range_of.get(key, (0, 0))
        try:
            if not end:
                content: Any = await (await obstore.get_async(self._store, key)).bytes_async()
            else:
                if (version := self._versions.get(key)) is None:
                    content = await obstore.get_range_async(self._store, key, start=start, end=end)
                else:
                    content = await self._range_of_version(key, start, end, version)
                if len(content) < end - start:
                    raise await self._too_short(key, start, end, len(content))
        except Exception as error:
            part = f", bytes {start} to {end}" if end else ""
            mask_message(error)
            add_note(error, f"aioloader: object {key!r}{part} of {self._store!r}")
            raise
        if self._read == "bytes":
            content = bytes(content)
        elif self._read == "tensor":
            content = tensor_over_bytes(content)
        return (key, content) if self._with_key else content

    async def _too_short(self, key: str, start: int, end: int, length: int) -> BrokenDataError:
        """The error of a range of which only `length` bytes came: the object has no more, or the answer had not."""
        import obstore

        size = start + length
        with suppress(Exception):  # not all servers tell
            size = (await obstore.head_async(self._store, key))["size"]
        if size >= end:
            return CutShortError(
                f"the object {key!r}: {end - start} bytes from byte {start} on were promised, and {length} came; the "
                f"answer was cut short"
            )
        return BrokenDataError(
            f"the object {key!r} ends at byte {start + length}, but bytes {start} to {end} were requested"
        )

    async def _range_of_version(self, key: str, start: int, end: int, version: Version) -> Any:
        """A range of an object that has other ranges, all of one version."""
        import obstore
        from obstore.exceptions import PreconditionError

        options: Any = {"range": (start, end), **version.condition}
        try:
            answer = await obstore.get_async(self._store, key, options=options)
        except PreconditionError as error:
            raise BrokenDataError(_changed(key)) from error
        if not version.is_same(answer.meta):
            raise BrokenDataError(_changed(key))
        return await answer.bytes_async()


def _changed(key: str) -> str:
    return (
        f"the object {key!r} was rewritten since the first of its ranges was read, so the other ranges do not "
        f"fit it; make a new Objects with ranges for its present content"
    )


def _require_obstore() -> None:
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise ImportError("Objects needs the package obstore: pip install 'aioloader[objects]'") from error


def _is_store(store: Any) -> bool:
    return all(callable(getattr(store, name, None)) for name in ("get_async", "get_range_async", "list"))


def _checked_keys(keys: Any) -> tuple[str, ...]:
    if isinstance(keys, str | bytes) or not isinstance(keys, Sequence):
        raise TypeError(
            f"keys must be a sequence of str, got {safe_repr(keys, 80)} of type {type(keys).__name__}; "
            f"for one object pass [key], for a folder prefix="
        )
    found = tuple(keys)
    if not set(map(type, found)) <= {str}:
        wrong = next(key for key in found if type(key) is not str)
        raise TypeError(f"keys must be str, got {safe_repr(wrong, 80)} of type {type(wrong).__name__}")
    if not found:
        raise ValueError("Objects needs at least one key, got none; an empty list would be an epoch without samples")
    return found


def _requests(keys: tuple[str, ...], ranges: Any) -> Sequence[str | Request]:
    """The keys, each with its range if these are a sequence."""
    if ranges is None or isinstance(ranges, Mapping) or _is_pair(ranges):
        return keys
    if isinstance(ranges, str | bytes) or not isinstance(ranges, Sequence):
        raise TypeError(
            f"ranges must be a pair (start, end), a mapping from key to pair, or a sequence of pairs, "
            f"got {safe_repr(ranges, 80)} of type {type(ranges).__name__}"
        )
    if len(ranges) != len(keys):
        raise ValueError(
            f"ranges must be as many as keys, got {len(ranges)} for {len(keys)}; None means the whole object"
        )
    return tuple(
        key if pair is None else (key, *_checked_range(pair, key)) for key, pair in zip(keys, ranges, strict=True)
    )


def _is_pair(ranges: Any) -> bool:
    return isinstance(ranges, tuple | list) and len(ranges) == 2 and all(hasattr(end, "__index__") for end in ranges)


def _checked_range(pair: Any, key: str | None) -> Range:
    where = "" if key is None else f" for {safe_repr(key)}"
    if not _is_pair(pair):
        raise TypeError(f"a range must be a pair of integers (start, end), got {safe_repr(pair, 80)}{where}")
    start, end = map(index, pair)
    if not 0 <= start < end:
        raise ValueError(f"a range must be 0 <= start < end, got ({start}, {end}){where}")
    return start, end
