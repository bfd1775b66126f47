"""Keys: a key names a sample in its epoch.

A key is an index, a string, a path, or whatever a sampler gives; without any of these it is the sample's number in its
stream. The key of a sample that is made from another one, or comes from one of several sources, wraps the key of that
one. `sample_rng` is seeded by keys and caches look samples up by them. So a key does not depend on what happened
before: a resume, another number of ranks, a cache that was read from disk.
"""

from collections.abc import Callable
from operator import index
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple

__all__ = ["NAMES", "PartKey", "SourceKey", "each_key", "key_text", "read_key", "source_of", "written_key"]

NAMES: Final = (str, int, PurePath)
"""The types of samples that are their own keys."""


class PartKey(NamedTuple):
    """The key of one of several entries made from one: by `flat_map`, `unbatch`, or a later round of `repeat`.

    Attributes:
        key: The key of the original entry.
        part: The number of this entry, from 1. For `repeat`, 1 is the second round; in the first, keys are not wrapped.
    """

    key: Any
    part: int

    def __repr__(self) -> str:
        return f"{self.key!r} ({self.part})"


class SourceKey(NamedTuple):
    """The key of an entry from one of several sources, which are numbered from 0."""

    source: int
    key: Any

    def __repr__(self) -> str:
        return f"{self.key!r} of source {self.source}"


class _Text(str):
    """Stands for a key that has no form in JSON, and has the same text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def each_key(key: object, change: Callable[[Any], Any]) -> Any:
    """`change(key)`; for the key of a batch, a list, the change is applied to each sample's key."""
    return [each_key(part, change) for part in key] if type(key) is list else change(key)


def source_of(key: object) -> int | None:
    """The number of the source of `merge`, `mix` or `interleave` that a sample is from; the outermost one."""
    while isinstance(key, PartKey):
        key = key.key
    return key.source if isinstance(key, SourceKey) else None


def key_text(key: Any) -> str:
    """A key as text, which is the same for an integer of Python, of numpy and in a tensor."""
    try:
        return str(index(key))
    except TypeError:
        return repr(key)


def written_key(key: object) -> Any:
    """`key` in JSON's types, for `read_key`."""
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


def read_key(written: object) -> Any:
    """The key that `written_key` wrote. A key without a form in JSON becomes another one with the same `key_text`."""
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
