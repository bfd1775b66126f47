"""Stores of obstore: opened by URL, and which version of an object they have."""

from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from aioloader.masking import mask_message, masked

__all__ = ["Options", "Version", "check_no_options", "open_store", "read_version", "with_options"]

Options = dict[str, Any]
"""Of obstore: `client_options` and `retry_config`."""


def open_store(url: str, options: Options, *, source: str) -> Any:
    """The store of a URL.

    Args:
        url: Of a bucket, a host, or a folder in it.
        options: The user's `client_options` and `retry_config`, None where there are none.
        source: Who asks, for errors.

    Raises:
        ImportError: obstore is not installed.
        Exception: Of obstore: it opens no such URL, or knows no such option.
    """
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise ImportError(
            f"{source}: reading {masked(url)} needs the package obstore: pip install 'aioloader[objects]'"
        ) from error
    given = {name: value for name, value in options.items() if value is not None}
    if urlsplit(url).scheme == "http":
        given["client_options"] = {"allow_http": True, **given.get("client_options", {})}
    try:
        return from_url(url, **given)
    except Exception as error:
        mask_message(error)
        raise


def check_no_options(options: Options, *, source: str) -> None:
    """Refuse timeouts and retries where there is no store.

    Raises:
        ValueError: There are some.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{source} takes {' and '.join(given)} for a store, got paths; leave it out")


def with_options(store: Any, options: Options, *, source: str) -> Any:
    """`store` with other timeouts and retries: one like it, that has all else in common; itself, if there are none.

    Args:
        store: The user's.
        options: `client_options`, which are added to its own, and `retry_config`; None where there are none.
        source: Who asks, for errors.

    Raises:
        ValueError: It is of a kind that waits for nobody.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return store
    if not hasattr(store, "retry_config"):
        raise ValueError(
            f"{source} takes {' and '.join(given)} for a store behind a network, got "
            f"{type(store).__name__}; leave it out"
        )
    args, kwargs = store.__getnewargs_ex__()  # what pickle makes it anew from
    if "client_options" in given:
        given["client_options"] = {**(kwargs.get("client_options") or {}), **given["client_options"]}
    return type(store)(*args, **{**kwargs, **given})


def read_version(value: Any) -> str | None:
    """A version in a cursor.

    Raises:
        ValueError: It is none.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"a version is a string, got {value!r}"[:200])
    return value


class Version:
    """Which version of an object is read.

    An ETag says which upload an object comes from, and not what is in it: a copy in another store has another one. So
    it counts in one place only. In another one, and in folders, whose ETags are times of change, the content decides.

    Attributes:
        mark: For cursors: where the object is, and which version it was; None: not known yet, or never.
    """

    def __init__(self, store: Any, key: str, expected: str | None = None) -> None:
        self._store = store
        self._key = key
        self._expected = expected
        self._meta: Any = None
        self.mark: str | None = None

    @property
    def known(self) -> bool:
        """Whether an answer has come."""
        return self._meta is not None

    @property
    def size(self) -> int:
        """Bytes of the object, once an answer has come."""
        return int(self._meta["size"])

    def is_same(self, meta: Any) -> bool:
        """Whether an answer is of the version that the first one was of; the first one decides."""
        if self._meta is None:
            self._meta = meta
            self.mark = self._mark_of(meta)
            place, _, version = (self._expected or "").partition(":")
            here, _, now = (self.mark or "").partition(":")
            return place != here or version == now
        return self.difference(meta) is None

    def difference(self, meta: Any) -> str | None:
        """What tells the version of an answer from that of the first one, in words; None: they are the same."""
        first = self._meta
        if first["size"] != meta["size"]:
            return f"it had {first['size']} bytes, and has {meta['size']} now"
        if first["e_tag"] is not None and meta["e_tag"] is not None:
            same, what = first["e_tag"] == meta["e_tag"], "ETag"
        else:
            same, what = first["last_modified"] == meta["last_modified"], "time of its last change"
        return None if same else f"its {what} is another one now (if nobody wrote it: servers behind one URL disagree)"

    @property
    def condition(self) -> dict[str, Any]:
        """What the next answer must fulfil, as options of obstore: a server that knows it sends nothing else."""
        if self._meta is None:
            return {}
        tag = self._meta["e_tag"]
        if tag is None:
            return {"if_unmodified_since": self._meta["last_modified"]}
        return {} if tag.startswith("W/") else {"if_match": tag}  # a weak one matches nothing, by the standard

    def _mark_of(self, meta: Any) -> str | None:
        from obstore.store import LocalStore

        if isinstance(self._store, LocalStore):
            return None
        config = getattr(self._store, "config", None) or {}
        place = (getattr(self._store, "url", None), config.get("endpoint"), repr(self._store), self._key)
        return f"{_checksum(masked(str(place)))}:{_checksum(str(meta['e_tag'] or meta['last_modified']))}"


def _checksum(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
