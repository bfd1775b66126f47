"""What names a sample in its epoch: its key.

An index, a string, a path, or whatever a sampler gives; where a sample has none of these, its number in its stream. A
sample that is made of another one, or comes from one of several sources, has the key of that one and says which it is.
`sample_rng` seeds by keys and caches keep by them, so a key is the same whatever happened before: a resume, another
number of ranks, a cache that was read from a disk.
"""

from collections.abc import Callable
from operator import index
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple

__all__ = ["NAMES", "PartKey", "SourceKey", "each_key", "key_text", "read_key", "source_of", "written_key"]

NAMES: Final = (str, int, PurePath)
"""Samples that are their own keys."""


class PartKey(NamedTuple):
    """The key of one of several entries that come from one: of `flat_map`, `unbatch`, or a later round of `repeat`.

    Attributes:
        key: Of the entry that it comes from.
        part: Which of them it is, from 1; of `repeat` from 1 too, since the entries of the first round keep their keys.
    """

    key: Any
    part: int

    def __repr__(self) -> str:
        return f"{self.key!r} ({self.part})"


class SourceKey(NamedTuple):
    """The key of an entry of one of several sources.

    Attributes:
        source: Its number, from 0.
        key: In that source.
    """

    source: int
    key: Any

    def __repr__(self) -> str:
        return f"{self.key!r} of source {self.source}"


class _Text(str):
    """Stands for a key that cannot be written down: it says of itself what that one did."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def each_key(key: Any, change: Callable[[Any], Any]) -> Any:
    """`change(key)`; of a batch, whose key is a list, that of each of its samples, so that all still have a name."""
    return [each_key(part, change) for part in key] if type(key) is list else change(key)


def source_of(key: Any) -> int | None:
    """Which source of `merge`, `mix` or `interleave` a sample is from, the last one that it went through."""
    while isinstance(key, PartKey):
        key = key.key
    return key.source if isinstance(key, SourceKey) else None


def key_text(key: Any) -> str:
    """A key in words; a number is one whether it comes as Python's, numpy's or a tensor."""
    try:
        return str(index(key))
    except TypeError:
        return repr(key)


def written_key(key: Any) -> Any:
    """What JSON can hold of `key`, for `read_key`."""
    match key:
        case None | str() | int():
            return key
        case PartKey(of, part):
            return ["part", written_key(of), part]
        case SourceKey(source, of):
            return ["source", source, written_key(of)]
        case Path():
            return ["path", str(key)]
        case list():
            return ["list", *map(written_key, key)]
        case tuple() if type(key) is tuple:
            return ["tuple", *map(written_key, key)]
    return ["text", key_text(key)]


def read_key(written: Any) -> Any:
    """The key that `written_key` wrote; what has no form in JSON comes back as something of the same `key_text`."""
    if not isinstance(written, list):
        return written
    match written:
        case ["part", of, part]:
            return PartKey(read_key(of), part)
        case ["source", source, of]:
            return SourceKey(source, read_key(of))
        case ["path", path]:
            return Path(path)
        case ["list", *keys]:
            return list(map(read_key, keys))
        case ["tuple", *keys]:
            return tuple(map(read_key, keys))
        case ["text", text]:
            return _Text(text)
    raise ValueError(f"no key was written as {written!r}"[:200])
