"""`TarShards`: samples in tar archives, in the layout of WebDataset."""

import re
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from time import perf_counter
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from aioloader.engine.entry import Entry
from aioloader.engine.located import Access, AccessThreads, CursorSource, EntryReader
from aioloader.engine.progress import cursor_parts, whole
from aioloader.errors import BrokenDataError
from aioloader.masking import masked
from aioloader.notes import shown
from aioloader.sources.ahead import Ahead, failed
from aioloader.sources.chunks import file_chunks, object_chunks
from aioloader.sources.compressed import decompressor_for
from aioloader.sources.marks import read_mark, read_offset
from aioloader.sources.parsing import Parser, parsed
from aioloader.sources.paths import each_path, expand_braces, find_files, names_of
from aioloader.sources.stores import Options, Version, check_no_options, open_store, read_version, with_options
from aioloader.sources.tar_decode import DecodeSample, Decoding
from aioloader.sources.tar_format import Member, TarMembers
from aioloader.stages.checks import check_count

__all__ = ["TarShards"]

_Start = tuple[int, int | None, str | None]  # byte offset, mark, version
_BEGINNING: Final[_Start] = (0, None, None)

LISTS_AHEAD: Final = 2  # per open shard: of up to a few milliseconds of work each


@dataclass(frozen=True, slots=True)
class _Shard:
    """Where an archive is.

    Attributes:
        url: As the user named it.
        store: An obstore store; None: a local file.
        key: In the store, or the file's path.
    """

    url: str
    store: Any
    key: str

    @property
    def name(self) -> str:
        """What keys and errors call it: the URL without its password."""
        return masked(self.url)

    def chunks(self, thread: AccessThreads, parser: "_Samples") -> AsyncGenerator[Any]:
        """Its bytes that `parser` wants."""
        if self.store is None:
            return file_chunks(self.key, thread, start=parser.start, needed=parser.needed)
        return object_chunks(self.store, self.key, parser.version, start=parser.start, needed=parser.needed)


class TarShards(CursorSource):
    """Samples from tar archives, in the layout of WebDataset: neighbouring members with the same key are one sample.

    The key of a member is its folders and its name up to the first dot, the rest is the extension, in lower case. A
    sample is a dict: `{"__key__": "train/0001", "__url__": "shard-000.tar", "jpg": b"...", "cls": b"7"}`. As in
    WebDataset, members without an extension, folders, links and names like `__meta__` are left out. Archives are
    read from front to back, nothing is written to disk, and the next ones are opened ahead, in order. They may be
    compressed: `.tar.gz`, `.tgz`, `.tar.zst`.

    What is broken stands at its place, and the next sample follows: a name twice in one sample, an absolute name or one
    with `..`, a member that cannot be decoded. An archive that cannot be opened, is broken or truncated raises once,
    behind its last whole sample, and the next archive follows.

    Cursor: archive, the offset of the next sample in it, a mark of what is before, see `aioloader.sources.marks`, and
    the version of a stored one. A compressed one is decompressed up to it again. An archive that was written anew
    since, or while it is read, is an error at its place, and the next archive follows.

    Args:
        shards: Paths, globs, or URLs of what obstore opens (`s3://`, `gs://`, `az://`, `https://`), one or a sequence;
            `{000..099}` and `{a,b}` are expanded. With `store`: keys in it.
        store: A store of obstore (`aioloader[objects]`).
        decode: See `DecodeSample`; False: members stay bytes. It runs in the thread that reads the archive; leave
            images to `.map(DecodeSample("torchrgb8"))`, which uses all cores.
        open_ahead: How many archives behind the current one are open, and have their first samples ready.
        client_options, retry_config: Timeouts and retries in place of the store's own, as obstore names them, for URLs
            too. By its defaults a request ends after 30 seconds and is tried again until three minutes are over.

    Raises:
        FileNotFoundError: A glob matches nothing.
        ImportError: What a store, a `.zst` or an image needs is not installed.
        ValueError: An argument does not fit.
    """

    def __init__(
        self,
        shards: str | PathLike[str] | Sequence[str | PathLike[str]],
        *,
        store: Any = None,
        decode: Decoding = False,
        open_ahead: int = 2,
        client_options: Any = None,
        retry_config: Any = None,
    ) -> None:
        stores: dict[str, Any] = {}
        options = {"client_options": client_options, "retry_config": retry_config}
        if store is not None:
            store = with_options(store, options, source="TarShards")
        self._shards: list[_Shard] = []
        for name in each_path(shards, source="TarShards"):
            for url in expand_braces(name):
                if store is not None:
                    self._shards.append(_Shard(url, store, url))
                elif url.startswith("pipe:"):
                    raise ValueError(
                        f"TarShards runs no commands, got {shown(url)}; pass the URL, or a store of obstore"
                    )
                elif "://" in url:
                    self._shards.append(_remote(url, stores, options))
                else:
                    self._shards += [_Shard(path, None, path) for path in find_files(url, source="TarShards")]
        if store is None and not stores:
            check_no_options(options, source="TarShards")
        for shard in self._shards:
            decompressor_for(shard.key)  # what is not installed is said here
        self._decode = DecodeSample(decode)
        self._open_ahead = check_count("open_ahead", open_ahead, least=0)

    @property
    def urls(self) -> tuple[str, ...]:
        """The archives, in order."""
        return tuple(shard.url for shard in self._shards)

    @cached_property
    def _names(self) -> dict[str, Any]:
        return names_of(self.urls)

    def identity(self) -> dict[str, Any]:
        return self._names

    def check_cursor(self, cursor: Any) -> None:
        self._place(cursor)

    def _place(self, cursor: Any) -> tuple[int, _Start]:
        """Archive and place in it."""
        if cursor is None:
            return 0, _BEGINNING
        index, offset, mark, version = cursor_parts(cursor, 4)
        start = read_offset(offset), read_mark(mark), read_version(version)
        if whole(index) > len(self._shards):
            raise ValueError(f"the cursor is in archive {index}, but there are {len(self._shards)}: they have changed")
        return index, start

    def open(self, access: Access, cursor: Any) -> EntryReader:
        return _InOrder(access, self._shards, self._decode, self._open_ahead, *self._place(cursor))


class _InOrder(EntryReader):
    """The samples of the archives, one after the other; each is read by a task and a thread of its own."""

    def __init__(
        self,
        access: Access,
        shards: list[_Shard],
        decode: DecodeSample,
        open_ahead: int,
        index: int,
        start: _Start,
    ) -> None:
        self._access = access
        self._shards = shards
        self._decode = decode
        # An archive has one thread to itself, for its file is opened and closed in it. The threads are used in turn:
        # an archive is opened only when the one that used its thread before has been read to its end.
        self._threads = [access.threads(1) for _ in range(open_ahead + 1)]
        self._open: deque[Ahead] = deque()
        self._next = index
        self._start = start

    def _open_more(self) -> None:
        while len(self._open) < len(self._threads) and self._next < len(self._shards):
            self._open.append(self._ahead(self._next, self._start))
            self._next += 1
            self._start = _BEGINNING

    def _ahead(self, index: int, start: _Start) -> Ahead:
        shard = self._shards[index]
        thread = self._threads[index % len(self._threads)]
        parser = _Samples(shard, index, start, self._decode)
        chunks = shard.chunks(thread, parser)
        return Ahead(
            self._access, lambda: parsed(chunks, parser, thread, after=(index + 1, *_BEGINNING)), lists=LISTS_AHEAD
        )

    async def read(self, limit: int) -> list[Entry]:
        while True:
            self._open_more()
            if not self._open:
                return []
            entries = await self._open[0].read(limit)
            if entries:
                return entries
            self._open.popleft()


class _Samples(Parser):
    """The samples of one archive."""

    def __init__(self, shard: _Shard, index: int, start: _Start, decode: DecodeSample) -> None:
        offset, mark, version = start
        super().__init__(shard.name, offset, mark)
        self.version = Version(shard.store, shard.key, version)
        self._index = index
        self._decode = decode
        self._members = TarMembers(offset)
        self._sample: dict[str, Any] | None = None  # its members are still coming
        self._broken: BrokenDataError | None = None  # what is wrong with it

    def _feed(self, piece: bytes) -> None:
        self._members.feed(piece)

    def _take(self, entries: list[Entry], deadline: float) -> bool:
        members = self._members
        while (member := members.next()) is not None:
            split = _split_name(member.name) if member.data is not None else None
            if split is None:
                continue
            key, extension = split
            sample = self._sample
            if sample is None or sample["__key__"] != key:
                self._complete(entries, member.offset)
                self._sample = sample = {"__key__": key, "__url__": self.path}
            self._add(sample, extension, member)
            if perf_counter() > deadline:
                return True
        if members.end is not None:
            self._complete(entries, members.end)
        return False

    def _add(self, sample: dict[str, Any], extension: str, member: Member) -> None:
        if _UNSAFE.search(member.name):
            self._broken = BrokenDataError(
                f"{self.path}: the name {member.name!r} at byte {member.offset} leads out of the archive, and "
                f"names must be relative and without '..'; nothing is extracted to disk, but pack it anew"
            )
        elif extension in sample:
            self._broken = BrokenDataError(
                f"{self.path}: the sample {sample['__key__']!r} has two members {extension!r}, the second one "
                f"{member.name!r} at byte {member.offset}; each extension may come once in a sample"
            )
        else:
            sample[extension] = member.data

    def _complete(self, entries: list[Entry], offset: int) -> None:
        """The next sample, or the end, is at `offset`: the one before it has all its members."""
        sample, self._sample = self._sample, None
        if sample is None:
            return
        cursor = (self._index, offset, self.trail.mark(offset), self.version.mark)
        key = f"{self.path}:{sample['__key__']}"
        broken, self._broken = self._broken, None
        if broken is None:
            try:
                entries.append(Entry(self._decode(sample), cursor, key, 0))
                return
            except BaseException as error:  # also what ends a program: it is the consumer's, at this place
                raised: BaseException = error
        else:
            raised = broken
        entries.append(failed(raised, cursor, key))

    def _finish(self) -> list[Entry]:
        self._members.finish()
        return []

    def _named(self, error: BrokenDataError) -> BrokenDataError:
        named = super()._named(error)
        if self._sample is None:
            return named
        return BrokenDataError(f"{named}; the sample {self._sample['__key__']!r} may lack members and is left out")


_UNSAFE: Final = re.compile(r"^/|^[A-Za-z]:[\\/]|(^|[\\/])\.\.([\\/]|$)")
_META: Final = re.compile(r"__[^/]*__($|/)")


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and extension; None for what WebDataset leaves out."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or _META.match(name):
        return None
    return f"{folder}{slash}{stem}", extension.lower()


def _remote(url: str, stores: dict[str, Any], options: Options) -> _Shard:
    """A URL as a store, one for all archives of a bucket or host, and the key in it."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return _Shard(url, None, unquote(parts.path))
    if parts.query:
        raise ValueError(
            f"TarShards takes URLs without a query, got {shown(url)}; make a store of obstore and pass store="
        )
    base = f"{parts.scheme}://{parts.netloc}"
    if base not in stores:
        stores[base] = open_store(base, options, source="TarShards")
    return _Shard(url, stores[base], unquote(parts.path).lstrip("/"))
