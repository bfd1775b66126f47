"""Where the files of a source are: on this machine, or in stores of obstore, by URL or by key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from os.path import lexists
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from aioloader.core.safe_text import safe_repr
from aioloader.masking import masked
from aioloader.sources.paths import Paths, each_path, expand_braces, find_files
from aioloader.sources.requests import RequestPolicies, store_policies
from aioloader.sources.stores import Options, check_no_options, open_store, request_options, with_options

__all__ = ["StoredFile", "find_stored_files", "names_urls"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Where a file is.

    Attributes:
        url: The path, URL or key that the user passed.
        store: A store of obstore; None for a local file.
        key: The key in the store, or the path of the file.
    """

    url: str
    store: Any
    key: str

    @property
    def name(self) -> str:
        """The URL without its password, for keys and errors."""
        return masked(self.url)


def find_stored_files(
    paths: Paths, store: object, options: Options, policies: Options, *, source: str, folders: bool = False
) -> tuple[tuple[StoredFile, ...], RequestPolicies]:
    """The files of `paths`, in order, and what is done about requests for them.

    Args:
        paths: Paths and globs, or URLs of what obstore opens, one or a sequence; `{000..099}` and `{a,b}` are expanded,
            unless a file has exactly that name. With `store`: keys in it.
        store: A store of obstore; None: there is none.
        options: `client_options` and `retry_config`, as the user passed them.
        policies: `retry`, `timeout`, `hedge` and `rate`, likewise.
        source: The name of the source, for errors.
        folders: A single path may be a folder, see `find_files`.

    Raises:
        TypeError, ValueError: Something is no path, or options are for a store, and there is none.
        FileNotFoundError: A glob matches nothing.
        ImportError: A URL needs obstore.
    """
    checked = store_policies(**policies)
    given = request_options(**options, retry=policies["retry"], source=source)
    names = each_path(paths, source=source)
    files: list[StoredFile] = []
    if store is not None:
        store = with_options(store, given, source=source)
        files += [StoredFile(key, store, key) for name in names for key in expand_braces(name)]
    elif folders and len(names) == 1 and _scheme(names[0], source) is None:
        files += _local(find_files(paths, source=source, folders=True))
    else:
        stores: dict[str, Any] = {}
        for name in names:
            for url in (name,) if "{" in name and lexists(name) else expand_braces(name):
                files += _found(url, stores, given, source)
    if all(file.store is None for file in files):
        check_no_options({**options, **policies}, source=source)
    return tuple(files), RequestPolicies(checked, source)


def names_urls(paths: object, *, source: str) -> bool:
    """Whether something in `paths` is in a store.

    Raises:
        ValueError: A URL that nothing here opens.
    """
    names = paths if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]
    schemes = {_scheme(fspath(name), source) for name in names if isinstance(name, str | PathLike)}
    return not schemes <= {None, "file"}


def _local(paths: tuple[str, ...]) -> list[StoredFile]:
    return [StoredFile(path, None, path) for path in paths]


def _found(url: str, stores: dict[str, Any], options: Options, source: str) -> list[StoredFile]:
    """The files of a URL, a path or a glob; those of one bucket or host share a store."""
    scheme = _scheme(url, source)
    if scheme is None:
        return _local(find_files(url, source=source))
    parts = urlsplit(url)
    if scheme == "file":
        return [StoredFile(url, None, unquote(parts.path))]
    if parts.query:
        raise ValueError(
            f"{source} takes URLs without a query, got {safe_repr(url)}; make a store of obstore and pass store="
        )
    if "*" in parts.path:
        raise ValueError(
            f"{source} looks up no globs in stores, got {safe_repr(url)}; pass the names, for instance as "
            f"{{000..099}}, or list them with obstore"
        )
    base = f"{scheme}://{parts.netloc}"
    if base not in stores:
        stores[base] = open_store(base, options, source=source)
    return [StoredFile(url, stores[base], unquote(parts.path).lstrip("/"))]


_URL: Final = re.compile(r"([a-z][a-z0-9+.-]+)://|(?:s3|gs|gcs|az|abfss?|https?|hf|file):/", re.IGNORECASE)
"""The second form is what `pathlib` makes of a URL."""

_SCHEMES: Final = frozenset(
    ("file", "s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https", "memory")
)
"""What obstore opens, and files of this machine."""


def _scheme(url: str, source: str) -> str | None:
    """The scheme of a URL; None for a path, also one that looks like a URL and is there.

    Raises:
        ValueError: Nothing here opens such a URL.
    """
    if lexists(url):
        return None
    if url.startswith("pipe:"):
        raise ValueError(f"{source} runs no commands, got {safe_repr(url)}; pass the URL, or a store of obstore")
    match = _URL.match(url)
    if match is None:
        return None
    if match[1] is None:
        raise ValueError(
            f"{source} takes URLs as str, got {safe_repr(url)}, from which pathlib has taken a slash; pass it as a str"
        )
    scheme = match[1].lower()
    if scheme not in _SCHEMES:
        raise ValueError(
            f"{source} does not know {scheme}://, got {safe_repr(url)}; URLs begin with s3://, gs://, az:// or "
            f"https:// (pip install 'aioloader[objects]'); for what is elsewhere pass a store of obstore, or copy it"
        )
    return scheme
