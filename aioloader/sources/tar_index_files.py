"""The index files beside archives: found, read, and compared with the archives that they are of."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final, TypeVar

from aioloader.core.policies import Attempts, Policies
from aioloader.core.safe_text import add_note
from aioloader.errors import BrokenDataError
from aioloader.executors.apart import run_apart
from aioloader.masking import mask_message
from aioloader.sources.compressed import is_compressed
from aioloader.sources.stored_files import StoredFile
from aioloader.sources.tar_index import SUFFIX, TarIndex, decode_index, mark_of, name_of, other_version
from aioloader.sources.tar_samples import changed

__all__ = ["check_indexable", "file_mark", "read_index", "read_indexes"]

T = TypeVar("T")

AT_ONCE: Final = 32
"""How many indexes of a store are read at once."""

Seen = tuple[int, int] | None
"""Size and time of change of a file, in nanoseconds."""


def check_indexable(archive: StoredFile) -> None:
    """Refuse compressed archives.

    Raises:
        ValueError: It is one.
    """
    if is_compressed(archive.key):
        raise ValueError(
            f"{archive.name} is compressed: to get at a sample all before it has to be decompressed, so an index is of "
            f"no use. Decompress it (images are compressed anyway), or read it without an index"
        )


def file_mark(path: str, status: os.stat_result) -> str:
    """The mark of a file, see `mark_of`."""
    return mark_of(os.path.realpath(path), str(status.st_mtime_ns))


def read_indexes(archives: Sequence[StoredFile], policies: Policies | None) -> list[tuple[TarIndex, Seen]]:
    """The index of each archive, and what its file was when they were compared.

    Args:
        archives: All of files, or all of stores.
        policies: What is done about requests that fail; hedging is not.

    Raises:
        FileNotFoundError: An archive is missing, or its index.
        ValueError: An archive is compressed, or an index is broken, or of another archive.
        Exception: A store's own.
    """
    for archive in archives:
        check_indexable(archive)
    if archives[0].store is None:
        return [_read_file(archive) for archive in archives]

    async def read_all() -> list[tuple[TarIndex, Seen]]:
        places = asyncio.Semaphore(AT_ONCE)

        async def read(archive: StoredFile) -> tuple[TarIndex, Seen]:
            async with places:
                return await _read_object(archive, policies), None

        return await asyncio.gather(*map(read, archives))

    return run_apart(read_all)


def read_index(archive: StoredFile) -> tuple[TarIndex, Seen]:
    """The same for one archive."""
    return read_indexes([archive], None)[0]


def _read_file(archive: StoredFile) -> tuple[TarIndex, Seen]:
    try:
        content = Path(archive.key + SUFFIX).read_bytes()
    except FileNotFoundError:
        raise _missing(archive) from None
    status = os.stat(archive.key)  # noqa: PTH116
    index = decode_index(content, archive.key + SUFFIX)
    _check_name(index, archive)
    if status.st_size != index.size or other_version(index.mark, file_mark(archive.key, status)):
        raise BrokenDataError(changed(archive.name, index.size, status.st_size))
    return index, (status.st_size, status.st_mtime_ns)


async def _read_object(archive: StoredFile, policies: Policies | None) -> TarIndex:
    import obstore

    key = archive.key + SUFFIX

    async def request() -> Any:
        return await (await obstore.get_async(archive.store, key)).bytes_async()

    try:
        content = await _requested(request, policies)
    except Exception as error:
        mask_message(error)
        if isinstance(error, FileNotFoundError):
            raise _missing(archive) from error
        add_note(error, f"aioloader: the index {key!r} of {archive.store!r}")
        raise
    index = decode_index(bytes(content), archive.name + SUFFIX)
    _check_name(index, archive)
    return index


async def _requested(request: Callable[[], Awaitable[T]], policies: Policies | None) -> T:
    """The result of a request, which may be made again."""
    policies = policies or Policies()
    attempts = None if policies.retry is None else Attempts(policies.retry)
    done, began = 0, perf_counter()
    while True:
        if policies.rate is not None:
            await asyncio.sleep(policies.rate.take())
        try:
            async with asyncio.timeout(policies.timeout):
                return await request()
        except Exception as error:
            done += 1
            if policies.rate is not None:
                policies.rate.failed(error)
            seconds = None if attempts is None else attempts.wait_after(done, error, perf_counter() - began, done)
            if seconds is None:
                raise
        await asyncio.sleep(seconds)


def _missing(archive: StoredFile) -> FileNotFoundError:
    return FileNotFoundError(
        f"{archive.name} has no index: there is no {name_of(archive.name)}{SUFFIX} beside it; write it once: "
        f"python -m aioloader index {archive.name}, or leave index=True out, which reads archives from front to back"
    )


def _check_name(index: TarIndex, archive: StoredFile) -> None:
    if index.archive != name_of(archive.key):
        raise BrokenDataError(
            f"{archive.name}{SUFFIX} is the index of another archive, of {index.archive!r}; write it again, also after "
            f"renaming: python -m aioloader index {archive.name}"
        )
