"""`TarShards`: samples in tar archives, in the layout of WebDataset."""

from asyncio import Event
from collections.abc import AsyncGenerator, Callable, Sequence
from os import PathLike
from typing import Any, Final, Self

from aioloader.core.checks import check_ahead, check_count
from aioloader.core.cursors import as_count, cursor_parts
from aioloader.core.entry import Entry
from aioloader.core.policies import Hedge, Rate, Retry
from aioloader.core.source import SourceContext, SourceThreads
from aioloader.sources.compressed import MAX_WINDOW_BYTES, decompressor_for
from aioloader.sources.file_order import FileOrder
from aioloader.sources.file_source import FileSource
from aioloader.sources.in_order import InOrder
from aioloader.sources.marks import read_mark
from aioloader.sources.pace import Pace
from aioloader.sources.parsing import OffsetQuota
from aioloader.sources.read_ahead import Quota, QuotaRule
from aioloader.sources.requests import Requests
from aioloader.sources.stored_files import StoredFile, find_stored_files
from aioloader.sources.stores import read_version
from aioloader.sources.tar_decode import DecodeSample, Decoding
from aioloader.sources.tar_index import without_indexes
from aioloader.sources.tar_parser import (
    BEGINNING,
    MAX_MEMBER_BYTES,
    MAX_SAMPLE_BYTES,
    Start,
    TarLimits,
    TarParser,
)

__all__ = ["TarShards", "archives_of"]

LISTS_AHEAD: Final = 2  # per open archive, each of a few milliseconds of work


class TarShards(FileSource[Start, dict[str, Any]]):
    """Samples from tar archives, in the layout of WebDataset: neighbouring members with the same key are one sample.

    The key of a member is its folders and its name up to the first dot, the rest is the extension, in lower case. A
    sample is a dict: `{"__key__": "train/0001", "__url__": "shard-000.tar", "jpg": b"...", "cls": b"7"}`. As in
    WebDataset, members without an extension, folders, symbolic links, devices, pipes and names like `__meta__` are left
    out. Archives are read from front to back, nothing is written to disk, and the next ones are opened ahead, in order.
    They may be compressed: `.tar.gz`, `.tgz`, `.tar.zst`.

    A broken sample raises in its position, and the next sample follows: a name that comes twice in one sample, an
    absolute name or one with `..`, a member that is too long or cannot be read or decoded, a hard link to a member that
    is not before it in the same sample. An archive that cannot be opened, or whose rest cannot be read, raises once,
    after its last complete sample, and the next archive follows.

    Cursor: archive, the offset of the next sample in it, a mark of what is before, see `aioloader.sources.marks`, and
    the version of an archive in a store. A compressed archive is decompressed again up to that offset. An archive that
    was rewritten since, or while it is read, is an error, and the next archive follows.

    Args:
        shards: Paths, globs, or URLs of what obstore opens (`s3://`, `gs://`, `az://`, `https://`), one or a sequence;
            `{000..099}` and `{a,b}` are expanded. With `store`: keys in it.
        store: A store of obstore (`aioloader[objects]`).
        decode: See `DecodeSample`; with False, members stay bytes. It runs in the thread that reads the archive; leave
            images to `.map(DecodeSample("torchrgb8"))`, which uses all cores.
        shuffle: The archives come in another order in each epoch, and in each round of a `repeat`: a permutation that
            depends on these and `seed` alone, so all ranks have the same.
        seed: See `shuffle`.
        interleave: How many archives are read side by side, at least 1: one sample of each in turn. The first reader
            has those at 0, `interleave`, 2 `interleave`, ... of the order, the second 1, `interleave` + 1, ..., however
            many samples are in them.
        open_ahead: How many archives after those that are read are open, and have their first samples ready; with
            `interleave` rounded up to a multiple of that.
        ahead: Samples, of all open archives, that have been read and not taken, at most; at least 1. It is shared out
            among them, so no more than that are open. Default: some milliseconds of reading, for each.
        ahead_bytes: The same in bytes, by the running mean of what came; there is always room for one sample of each.
        client_options, retry_config: Timeouts and retries in place of the store's own, as obstore names them, for URLs
            too. By its defaults, a request times out after 30 seconds and is retried for up to three minutes.
        retry, timeout, hedge, rate: What is done about requests that fail, take long or are too many, as in
            `Pipeline.map`, for each request for itself. With `retry`, the store makes no retries of its own. What
            another attempt cannot change is not retried, unless `Retry.on` says so: see `docs/failures.md`.
        max_member_bytes: A sample with a larger member is an error. The member is skipped without being buffered, so
            that neither a broken header nor a small `.tar.gz` with much in it takes all memory.
        max_sample_bytes: The same for all members of a sample together, headers included.
        index: Read by the indexes that `python -m aioloader index` has written beside the archives, see
            `docs/sources/tar.md`. The source then has a length and indices: `shuffle()` is a full permutation, and
            `shard`, `take` and `skip` choose samples before anything is read.
        concurrency: With an index, and archives in a store: how many samples are fetched at once; 64 by default.
        max_window_bytes: A `.zst` file that needs a larger window is refused (`zstd --long=31` writes 2 GiB): that much
            of the output is kept while it is read. A file that is broken on purpose can ask for any size.

    Raises:
        FileNotFoundError: A glob matches nothing, or with `index` there is none.
        ImportError: What a store, a `.zst` or an image needs is not installed.
        ValueError: An argument is invalid.
    """

    _words = ("archive", "they")

    def __new__(cls, *arguments: Any, index: bool = False, **others: Any) -> Self:
        if not isinstance(index, bool):
            raise TypeError(f"index must be True or False, got {index!r}; the index of an archive is beside it")
        if not index:
            return super().__new__(cls)
        # What has a length and indices is another kind of source.
        from aioloader.sources.indexed_tar import ToldOfTar, open_indexed

        def told(*arguments: Any, **others: Any) -> ToldOfTar:
            tar = cls(*arguments, **others)
            files, ahead, ahead_bytes = tar._files, tar.ahead, tar._ahead_bytes
            return ToldOfTar(files, tar._decode, tar._limits, tar._requests, tar._open_ahead, ahead, ahead_bytes)

        indexed: Any = open_indexed(told, *arguments, **others)
        return indexed  # type: ignore[no-any-return]  # of the same samples

    def __init__(
        self,
        shards: str | PathLike[str] | Sequence[str | PathLike[str]],
        *,
        store: Any = None,
        decode: Decoding = False,
        shuffle: bool = False,
        seed: int = 0,
        interleave: int = 1,
        open_ahead: int = 2,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        client_options: Any = None,
        retry_config: Any = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        max_sample_bytes: int = MAX_SAMPLE_BYTES,
        max_window_bytes: int = MAX_WINDOW_BYTES,
        index: bool = False,
        concurrency: int | None = None,
    ) -> None:
        if concurrency is not None:
            raise ValueError(
                f"concurrency says how many samples are fetched at once by an index, got {concurrency=}; without one "
                f"leave it out, or pass index=True"
            )
        options = {"client_options": client_options, "retry_config": retry_config}
        policies = {"retry": retry, "timeout": timeout, "hedge": hedge, "rate": rate}
        self._files, self._requests = find_stored_files(shards, store, options, policies, source="TarShards")
        self._files = tuple(without_indexes(self._files))
        for file in self._files:
            decompressor_for(file.key)  # raises if the package for it is not installed
        self._set_order(shuffle, seed, interleave)
        self._decode = DecodeSample(decode)
        open_ahead = check_count("open_ahead", open_ahead, least=0)
        self.ahead, self._ahead_bytes = check_ahead(ahead, ahead_bytes, None)
        if self.ahead is not None:
            if self.ahead < self.interleave:
                raise ValueError(
                    f"ahead must be at least interleave, since each open archive has a sample ready, got {ahead=} and "
                    f"interleave={self.interleave}; raise ahead, or lower interleave"
                )
            open_ahead = min(open_ahead, self.ahead - self.interleave)
        # Of each lane: shared out, so that one is open ahead for each of many, and none where none shall be.
        self._open_ahead = -(-open_ahead // self.interleave)
        if self.ahead is not None and self.interleave * (1 + self._open_ahead) > self.ahead:
            self._open_ahead -= 1
        self._limits = TarLimits(
            check_count("max_member_bytes", max_member_bytes, least=1),
            check_count("max_sample_bytes", max_sample_bytes, least=1),
            check_count("max_window_bytes", max_window_bytes, least=1),
        )

    @property
    def urls(self) -> tuple[str, ...]:
        """The paths and URLs of the archives, in order."""
        return tuple(file.url for file in self._files)

    def _parse(self, cursor: object) -> tuple[Any, Start]:
        if cursor is None:
            return 0, BEGINNING
        index, offset, mark, version = cursor_parts(cursor, 4)
        return index, (as_count(offset), read_mark(mark), read_version(version))

    def _opener(self, context: SourceContext, order: FileOrder) -> Callable[[int, Start], InOrder[TarParser]]:
        requests = self._requests.begin(context)
        pace = Pace(order.lanes, len(order.numbers), lambda: context.consumer_starves)

        def open_lane(at: int, start: Start) -> InOrder[TarParser]:
            def read(samples: TarParser, thread: SourceThreads, turn: Event) -> AsyncGenerator[list[Entry]]:
                return samples.read(thread, pace, turn)

            def quota_of(samples: TarParser) -> QuotaRule | None:
                return self._quota(samples, pace)

            return InOrder(
                context,
                self._parsers(order, at, start, requests),
                read,
                open_ahead=self._open_ahead,
                lists_ahead=LISTS_AHEAD,
                quota_of=quota_of,
                starved=pace.starved,
            )

        return open_lane

    def _quota(self, samples: TarParser, pace: Pace) -> QuotaRule | None:
        """How many samples of an archive may be ready; None: for the number of lists to say."""
        if self.ahead is None and self._ahead_bytes is None:
            return OffsetQuota(lambda: pace.ahead_bytes) if samples.is_stored else None
        archives = self.interleave * (self._open_ahead + 1)
        most = None if self.ahead is None else self.ahead // archives
        samples.quota = Quota(most, None if self._ahead_bytes is None else self._ahead_bytes / archives)
        return samples.quota

    async def _parsers(
        self, order: FileOrder, at: int, start: Start, requests: Requests | None
    ) -> AsyncGenerator[TarParser]:
        """A parser for each archive of a lane from position `at` on; the first begins at `start`."""
        for position, number in order.places(at):
            file = self._files[number]
            yield TarParser(file, position, start, self._decode, self._limits, requests, lanes=order.lanes)
            start = BEGINNING


def archives_of(tar: TarShards) -> tuple[StoredFile, ...]:
    """The archives of a source without an index."""
    return tar._files
