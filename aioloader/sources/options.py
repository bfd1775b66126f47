"""The arguments that the overloads of a source have in common, for type checkers: each says what its samples are."""

from typing import Any, TypedDict

from aioloader.core.policies import Hedge, Retry
from aioloader.core.rate import Rate

__all__ = ["FilesOptions", "LinesOptions", "ObjectsOptions"]


class _RequestOptions(TypedDict, total=False):
    """What is done about requests."""

    client_options: Any
    retry_config: Any
    retry: int | Retry | None
    timeout: float | None
    hedge: Hedge | None
    rate: Rate | None


class FilesOptions(_RequestOptions, total=False):
    """See `Files`."""

    watch: bool
    settle: float
    ahead: int | None
    ahead_bytes: int | None
    store: Any
    concurrency: int | None


class LinesOptions(_RequestOptions, total=False):
    """See `Lines`."""

    encoding: str
    shuffle: bool
    seed: int
    interleave: int
    follow: bool
    store: Any
    max_line_bytes: int
    max_window_bytes: int


class ObjectsOptions(_RequestOptions, total=False):
    """See `Objects`."""

    prefix: str | None
    ranges: Any
    concurrency: int
    ahead: int | None
    ahead_bytes: int | None
