"""`TarShards(index=True)`: samples of archives by number, so that their order is free.

Of files (`IndexedTarFiles`) it is a map-style dataset, whose samples are read in threads. Of stores
(`IndexedTarObjects`) keys are planned, so that neighbours share a request. The samples are those of `TarShards`, made
by its own parser, of the bytes that the index says: so each of them is checked, and an index that does not fit is an
error and never another sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from os import fstat
from typing import Any, Final, NamedTuple

from aioloader.core.checks import check_count
from aioloader.core.policies import Policies, Rate
from aioloader.core.source import SourceContext
from aioloader.executors.apart import in_thread
from aioloader.sources.fetch import FetchSource, NamedSamples, PlannedKeys
from aioloader.sources.paths import names_of
from aioloader.sources.requests import RequestPolicies, store_policies
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.tar_decode import DecodeSample
from aioloader.sources.tar_index_files import read_indexes
from aioloader.sources.tar_parser import TarLimits
from aioloader.sources.tar_ranges import ArchiveRanges, PlannedRanges, Wanted
from aioloader.sources.tar_samples import TarSamples

__all__ = ["IndexedTarFiles", "IndexedTarObjects", "ToldOfTar", "open_indexed"]

CONCURRENCY: Final = 64

WINDOW_BYTES: Final = 64 << 20
"""The samples of a window are read at once where they are neighbours, and held until they are wanted."""


@dataclass(frozen=True)
class ToldOfTar:
    """What `TarShards` was told of its archives, as far as it means the same with an index.

    Attributes:
        files: They, in order.
        decode: See `TarShards`, as for the others.
        limits: How large members and samples may be.
        requests: What is done about those that fail.
        open_ahead: Archives that are open ahead.
        ahead: See there.
        ahead_bytes: See there.
    """

    files: tuple[StoredFile, ...]
    decode: DecodeSample
    limits: TarLimits
    requests: RequestPolicies
    open_ahead: int
    ahead: int | None
    ahead_bytes: int | None

    @property
    def urls(self) -> tuple[str, ...]:
        """The paths and URLs of the archives, in order."""
        return tuple(file.url for file in self.files)


def open_indexed(
    told: Callable[..., ToldOfTar], *arguments: Any, concurrency: int | None = None, **others: Any
) -> "IndexedTarFiles | IndexedTarObjects":
    """The source of `TarShards(shards, index=True, ...)`.

    Args:
        told: Checks what `TarShards` is called with.
        arguments: Of `TarShards`.
        concurrency: Of `TarShards`.
        others: Of `TarShards`.

    Raises:
        FileNotFoundError: There is no archive, or it has no index.
        ValueError: An argument does not fit, or an index does not.
    """
    for name, nothing in (("shuffle", False), ("interleave", 1)):
        if others.get(name, nothing) != nothing:
            raise ValueError(
                f"TarShards(index=True) has its samples in any order: Pipeline(...).shuffle() is the true shuffle, and "
                f"{name}={others[name]!r} is for archives without an index; leave it out"
            )
    tar = told(*arguments, **others)
    archives = tar.files
    stored = [archive for archive in archives if archive.store is not None]
    if stored and len(stored) < len(archives):
        local = next(archive.name for archive in archives if archive.store is None)
        raise ValueError(
            f"TarShards(index=True) takes archives of this machine or of stores, got both: {local} and "
            f"{stored[0].name}; make two sources, and combine them with Pipeline.mix or Pipeline.interleave"
        )
    policies = store_policies(*(others.get(name) for name in ("retry", "timeout", "hedge", "rate")))
    samples = TarSamples(archives, read_indexes(archives, policies), tar.decode, tar.limits)
    if stored:
        concurrency = CONCURRENCY if concurrency is None else check_count("concurrency", concurrency, least=1)
        return IndexedTarObjects(samples, tar, policies, concurrency)
    if concurrency is not None:
        raise ValueError(
            f"concurrency says how many samples of stored archives are fetched at once, got {concurrency} for files; "
            f"pass it to Pipeline(source, concurrency=...)"
        )
    return IndexedTarFiles(samples, tar)


def _identity(samples: TarSamples, tar: ToldOfTar) -> dict[str, Any]:
    return {**names_of(tar.urls), "samples": samples.checksum}


class IndexedTarFiles(NamedSamples):
    """The samples of archives in files, by number: a map-style dataset.

    Args:
        samples: Where they are.
        tar: What the user has said of them.
    """

    def __init__(self, samples: TarSamples, tar: ToldOfTar) -> None:
        self.samples = samples
        self.names = _Names(samples)
        self._identity = _identity(samples, tar)
        self.ahead, self.ahead_bytes = tar.ahead, tar.ahead_bytes
        self.urls = tar.urls

    def identity(self) -> dict[str, Any]:
        return self._identity

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: object) -> Any:
        """The sample with number `key`; for a slice, a list of samples.

        Raises:
            BrokenDataError: It is broken, or the archive is not what its index says.
            OSError: The system's own.
        """
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        number = self.samples.number(key)
        return self.samples.sample(number, [self._read(number)])

    def _read(self, number: int) -> bytes:
        archive, start, stop = self.samples.place(number)
        path = self.samples.archives[archive].key
        with FileIO(path) as file:
            self.samples.check_file(number, fstat(file.fileno()))
            file.seek(start)
            content = file.read(stop - start)
            while len(content) < stop - start and (more := file.read(stop - start - len(content))):
                content += more  # the system reads two gigabytes at once, at most
        return content

    def __repr__(self) -> str:
        return f"TarShards({len(self.urls)} archives, {len(self)} samples, index=True)"


class Fetched(NamedTuple):
    """The bytes of a sample, as they came.

    Attributes:
        number: Of the sample.
        pieces: One after the other.
    """

    number: int
    pieces: list[Any]


class IndexedTarObjects(FetchSource[dict[str, Any]]):
    """The samples of archives in stores, by number.

    Args:
        samples: Where they are.
        tar: What the user has said of them.
        policies: What is done about requests.
        concurrency: How many samples are fetched at once.
    """

    finishes = True

    def __init__(self, samples: TarSamples, tar: ToldOfTar, policies: Policies | None, concurrency: int) -> None:
        self.samples = samples
        self.urls = tar.urls
        self.policies = policies
        self.ahead, self.ahead_bytes = tar.ahead, tar.ahead_bytes
        self.concurrency = concurrency if self.ahead is None else min(concurrency, self.ahead)
        self._keys = _Keys(samples, tar)
        self._unplanned = ArchiveRanges(samples, None)

    @property
    def keys(self) -> PlannedKeys:
        return self._keys

    def __len__(self) -> int:
        return len(self.samples)

    async def __getitem__(self, number: int) -> Any:
        """The sample with that number, by a request of its own.

        Raises:
            BrokenDataError: It is broken, or the archive is not what its index says.
            Exception: The store's own.
        """
        return await in_thread(self.finish, await self.fetch(self.samples.number(number)))

    async def fetch(self, key: int | Wanted) -> Fetched:
        """The bytes of a sample: of a number by a request of its own."""
        if isinstance(key, Wanted):
            return Fetched(key.number, await key.read())
        return Fetched(key, await self._unplanned.read(self.samples.place(key)))

    def finish(self, fetched: Fetched) -> Any:
        """The sample.

        Raises:
            BrokenDataError: See `__getitem__`.
        """
        return self.samples.sample(*fetched)

    def __repr__(self) -> str:
        return f"TarShards({len(self.urls)} archives, {len(self)} samples, index=True)"


class _Keys(PlannedKeys):
    """The numbers of the samples, and how their requests are planned."""

    def __init__(self, samples: TarSamples, tar: ToldOfTar) -> None:
        self._samples = samples
        self.names = _Names(samples)
        self._identity = _identity(samples, tar)
        self._requests: RequestPolicies = tar.requests
        # What waits besides the window that is being used is the beginning of the next one: so half for each.
        self._most_keys = None if tar.ahead is None else max(1, tar.ahead // 2)
        self._most_bytes = WINDOW_BYTES if tar.ahead_bytes is None else tar.ahead_bytes / 2
        self._ranges_ahead = tar.open_ahead

    def identity(self) -> dict[str, Any]:
        return self._identity

    @property
    def rate(self) -> Rate | None:  # type: ignore[override]  # a plain attribute where there is none
        return self._requests.rate

    def __len__(self) -> int:
        return len(self._samples)

    def begin(self, context: SourceContext) -> Callable[[Sequence[int], bool], Sequence[Any]]:
        return PlannedRanges(
            ArchiveRanges(self._samples, self._requests.begin(context)),
            context,
            most_keys=self._most_keys,
            most_bytes=self._most_bytes,
            ranges_ahead=self._ranges_ahead,
        ).plan


class _Names(Sequence[Any]):
    """What the samples are called: as the entries of `TarShards`."""

    def __init__(self, samples: TarSamples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: Any) -> Any:
        return self._samples.name(number)
