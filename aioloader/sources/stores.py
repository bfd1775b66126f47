"""Stores of obstore: how they are opened by URL, and versions of their objects."""

from hashlib import sha256
from typing import Any, Final
from urllib.parse import urlsplit

from aioloader.masking import mask_message, masked

__all__ = [
    "Options",
    "Version",
    "check_no_options",
    "open_store",
    "read_version",
    "request_options",
    "with_options",
]

Options = dict[str, Any]
"""Options of obstore: `client_options` and `retry_config`."""

ONE_ATTEMPT: Final[Any] = {"max_retries": 0}
"""The `retry_config` of a store whose requests are retried by us."""


def request_options(client_options: object, retry_config: object, retry: object, *, source: str) -> Options:
    """What a source tells its stores: with a `retry` of ours, they make no retries themselves.

    Raises:
        ValueError: There is a `retry_config` as well.
    """
    if retry is not None:
        if retry_config is not None:
            raise ValueError(
                f"{source}: {retry=} and {retry_config=} would both retry, attempts times attempts; pass one of them"
            )
        retry_config = ONE_ATTEMPT
    return {"client_options": client_options, "retry_config": retry_config}


def open_store(url: str, options: Options, *, source: str) -> Any:
    """The store of a URL.

    Args:
        url: Of a bucket, a host, or a folder in it.
        options: `client_options` and `retry_config` as the user passed them, or None.
        source: The name of the source, for errors.

    Raises:
        ImportError: obstore is not installed.
        Exception: obstore's own: it cannot open such a URL, or does not know an option.
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
    """Refuse timeouts, retries and the like without a store.

    Raises:
        ValueError: Some were given.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{source} takes {' and '.join(given)} for a store, got paths; leave it out")


def with_options(store: Any, options: Options, *, source: str) -> Any:
    """A copy of `store` with other timeouts and retries; `store` itself if no options are given.

    Args:
        store: The user's.
        options: `client_options`, which are merged into its own, and `retry_config`, or None.
        source: The name of the source, for errors.

    Raises:
        ValueError: It is a kind of store without timeouts and retries.
    """
    given = {name: value for name, value in options.items() if value is not None}
    over_network = hasattr(store, "retry_config")
    if not over_network and given.get("retry_config") is ONE_ATTEMPT:
        del given["retry_config"]  # memory and folders make no retries
    if not given:
        return store
    if not over_network:
        raise ValueError(
            f"{source} takes {' and '.join(given)} for a store that is reached over a network, got "
            f"{type(store).__name__}; leave it out"
        )
    args, kwargs = store.__getnewargs_ex__()  # how pickle would rebuild it
    if "client_options" in given:
        given["client_options"] = {**(kwargs.get("client_options") or {}), **given["client_options"]}
    return type(store)(*args, **{**kwargs, **given})


def read_version(value: object) -> str | None:
    """Check a version in a cursor.

    Raises:
        ValueError: It is not a version.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"a version is a string, got {value!r}"[:200])
    return value


class Version:
    """Which version of an object is read.

    An ETag names an upload, not the content: a copy in another store has another ETag. So it counts only in the place
    where it was seen. Elsewhere, and in folders, whose ETags are times of change, the content decides.

    Attributes:
        mark: For cursors: where the object is, and its version; None if that is not known, or not yet.
    """

    def __init__(self, store: object, key: str, expected: str | None = None) -> None:
        self._store = store
        self._key = key
        self._expected = expected
        self._meta: Any = None
        self._as_expected = True
        self.mark: str | None = None

    @property
    def known(self) -> bool:
        """Whether an answer has arrived."""
        return self._meta is not None

    @property
    def size(self) -> int:
        """The object's size in bytes, once an answer has arrived."""
        return int(self._meta["size"])

    def is_same(self, meta: object) -> bool:
        """Whether an answer is of the same version as the first one. The first call sets that version.

        If that is not the expected one, no answer is: of several requests for a range, a later one must not be taken
        for right because it is as wrong as the first.
        """
        if self._meta is None:
            self._meta = meta
            self.mark = self._mark_of(meta)
            place, _, version = (self._expected or "").partition(":")
            here, _, now = (self.mark or "").partition(":")
            self._as_expected = place != here or version == now
            return self._as_expected
        return self._as_expected and self.difference(meta) is None

    def difference(self, meta: Any) -> str | None:
        """How the version of an answer differs from that of the first one, in words; None if it is the same."""
        first = self._meta
        if first["size"] != meta["size"]:
            return f"it had {first['size']} bytes, and has {meta['size']} now"
        if first["e_tag"] is not None and meta["e_tag"] is not None:
            same, what = first["e_tag"] == meta["e_tag"], "ETag"
        else:
            same, what = first["last_modified"] == meta["last_modified"], "time of its last change"
        return None if same else f"its {what} differs (if it was not rewritten, the servers behind its URL disagree)"

    @property
    def condition(self) -> dict[str, Any]:
        """Options of obstore for the next request: servers that know them answer only with the same version."""
        if self._meta is None:
            return {}
        tag = self._meta["e_tag"]
        if tag is None:
            return {"if_unmodified_since": self._meta["last_modified"]}
        return {} if tag.startswith("W/") else {"if_match": tag}  # by the standard, a weak one never matches

    def _mark_of(self, meta: Any) -> str | None:
        from obstore.store import LocalStore

        if isinstance(self._store, LocalStore):
            return None
        config = getattr(self._store, "config", None) or {}
        place = (getattr(self._store, "url", None), config.get("endpoint"), repr(self._store), self._key)
        return f"{_checksum(masked(str(place)))}:{_checksum(str(meta['e_tag'] or meta['last_modified']))}"


def _checksum(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
