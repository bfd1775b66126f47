"""`Files`: each file is a sample."""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, Final, Literal, Self, Unpack, overload

from torch import Tensor

from aioloader.core.checks import check_ahead
from aioloader.core.memory import Alloc
from aioloader.core.policies import Hedge, Rate, Retry
from aioloader.core.typevars import T_co
from aioloader.sources.fetched_files import FetchedFiles
from aioloader.sources.options import FilesOptions
from aioloader.sources.paths import Paths
from aioloader.sources.read_file import Read, check_read, load, read_bytes, read_stacked
from aioloader.sources.stored_files import find_stored_files, names_urls
from aioloader.sources.stores import check_no_options
from aioloader.sources.watched_files import WatchedFiles
from aioloader.stages.load import LoadsBatches

__all__ = ["Files"]

_NO_OPTIONS: Final[dict[str, Any]] = {"client_options": None, "retry_config": None}
_NO_POLICIES: Final[dict[str, Any]] = {"retry": None, "timeout": None, "hedge": None, "rate": None}
_NOT_WATCHED: Final = ("ahead", "ahead_bytes", "store", "concurrency", *_NO_OPTIONS, *_NO_POLICIES)
"""What `Files(watch=True)` does not take."""


class Files(Sequence[T_co], LoadsBatches):
    """Whole files, in a stable order; a map-style dataset, so that `shuffle()` is a full permutation.

    A file that cannot be read raises in its position: the system's OSError with the path; what comes after it goes on.
    In a `DataLoader`, and if `batch` comes directly after the source, a worker loads all files of a batch together;
    with `read="tensor"` straight into the memory of the batch, which is reused.

    Cursor: as for any indexable source, the position in the order of the epoch. With `watch=True`: the names given.

    Args:
        paths: A folder (the files in it and in the folders in it, without hidden ones), a glob (`**` means any
            folders), a path, or a sequence of paths and globs. Folders and globs are looked up here, once, and sorted.
            Or URLs of what obstore opens (`s3://`, `gs://`, `az://`, `https://`); with `store`, keys in it.
            `{000..099}` and `{a,b}` are expanded.
        read: What a sample is: the content as `bytes`, or as a tensor, uint8 [bytes of the file]; without a
            `collate_fn`, tensors can only be batched if all files have one size. None: the path, for a function that
            opens it.
        with_path: Samples are pairs of path and content.
        watch: Go on with files that appear later, each once, until the loader is closed. The source is then a stream,
            of one folder or glob: first the files that are there, sorted, then each one when it is complete. Needs
            watchfiles (`aioloader[watch]`).
        settle: With `watch`: a file is complete when it is not empty, its name is not a temporary one (it begins with
            a dot, or ends in `.tmp`, `.temp`, `.part`, `.partial`, `.crdownload`, `.swp` or `~`), and it has not
            changed for this many seconds. So a writer must not pause for that long, or it writes under a temporary
            name and renames the file when it is done, which is always safe.
        ahead: Files begun and not taken by what follows, at most; as in `Pipeline.map`. They are then read one by one,
            not for whole batches.
        ahead_bytes: The same in bytes.
        store: A store of obstore (`aioloader[objects]`). What is in stores is fetched on the loop, as by `Objects`.
        concurrency: For URLs and `store`: files that are fetched at once; 64 by default.
        client_options, retry_config: For URLs and `store`: timeouts and retries in place of the store's own, as obstore
            names them.
        retry, timeout, hedge, rate: For URLs and `store`: as in `Pipeline.map`. With `retry`, the store makes no
            retries of its own.

    Raises:
        FileNotFoundError: A glob matches nothing, a folder has no files, or with `watch` does not exist.
        ImportError: `watch` without watchfiles, a URL without obstore.
        TypeError, ValueError: An argument is invalid.

    ```python
    loader = Pipeline(Files("images/**/*.jpg")).shuffle(seed=0).map(decode).batch(64)
    ```
    """

    paths: tuple[str, ...]

    def __new__(cls, *arguments: Any, watch: bool = False, **others: Any) -> Self:
        # A stream is another kind of source: it has no length and no indices. And what is in stores is awaited.
        if watch:
            if wrong := [name for name in _NOT_WATCHED if others.get(name) is not None]:
                raise ValueError(
                    f"Files(watch=True) watches a folder of this machine, and reads no file before it is needed; leave "
                    f"{' and '.join(wrong)} out"
                )
            watched: Any = WatchedFiles(*arguments, **others)
            return watched  # type: ignore[no-any-return]  # of the same samples
        paths = arguments[0] if arguments else others.get("paths", ())
        if others.get("store") is not None or names_urls(paths, source="Files"):
            fetched: Any = FetchedFiles(*arguments, **others)
            return fetched  # type: ignore[no-any-return]
        return super().__new__(cls)

    @overload
    def __init__(
        self: "Files[bytes]",
        paths: Paths,
        *,
        read: Literal["bytes"] = "bytes",
        with_path: Literal[False] = False,
        **options: Unpack[FilesOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "Files[Tensor]",
        paths: Paths,
        *,
        read: Literal["tensor"],
        with_path: Literal[False] = False,
        **options: Unpack[FilesOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "Files[str]",
        paths: Paths,
        *,
        read: None,
        with_path: Literal[False] = False,
        **options: Unpack[FilesOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "Files[tuple[str, bytes]]",
        paths: Paths,
        *,
        read: Literal["bytes"] = "bytes",
        with_path: Literal[True],
        **options: Unpack[FilesOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: "Files[tuple[str, Tensor]]",
        paths: Paths,
        *,
        read: Literal["tensor"],
        with_path: Literal[True],
        **options: Unpack[FilesOptions],
    ) -> None: ...

    @overload
    def __init__(
        self, paths: Paths, *, read: Read | None = "bytes", with_path: bool = False, **options: Unpack[FilesOptions]
    ) -> None: ...

    def __init__(
        self,
        paths: Paths,
        *,
        read: Read | None = "bytes",
        with_path: bool = False,
        watch: bool = False,
        settle: float = 0.5,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        store: Any = None,
        concurrency: int | None = None,
        client_options: Any = None,
        retry_config: Any = None,
        retry: int | Retry | None = None,
        timeout: float | None = None,
        hedge: Hedge | None = None,
        rate: Rate | None = None,
    ) -> None:
        check_read(read, with_path)
        policies = {"retry": retry, "timeout": timeout, "hedge": hedge, "rate": rate}
        options = {"client_options": client_options, "retry_config": retry_config, "concurrency": concurrency}
        check_no_options({**options, **policies}, source="Files")
        self.ahead, self.ahead_bytes = check_ahead(ahead, ahead_bytes, None)
        files, _ = find_stored_files(paths, None, _NO_OPTIONS, _NO_POLICIES, source="Files", folders=True)
        self.paths = tuple(file.key for file in files)
        self.read = read
        self.with_path = bool(with_path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Any) -> Any:
        """The sample with index `key`; for a slice, a list of samples."""
        if isinstance(key, slice):
            return self.__getitems__(range(*key.indices(len(self.paths))))
        return load(self.paths[index(key)], self.read, self.with_path)

    def __getitems__(self, keys: Iterable[Any]) -> list[Any]:
        """The samples with these indices, in this order."""
        return [self[key] for key in keys]

    def load_batch(self, keys: Sequence[Any], alloc: Alloc) -> Any:
        """The samples with these indices, in this order, as torch's `default_collate` would batch them.

        Args:
            keys: At least one index.
            alloc: Allocates the memory of the batch.

        Raises:
            OSError: A file cannot be read.
            ValueError: Files to be stacked differ in size.
        """
        paths = [self.paths[index(key)] for key in keys]
        if self.read is None:
            return paths
        content: Any = read_stacked(paths, alloc) if self.read == "tensor" else [read_bytes(path) for path in paths]
        if not self.with_path:
            return content
        return [tuple(paths), content if self.read == "tensor" else tuple(content)]

    def __repr__(self) -> str:
        return f"Files({len(self.paths)} files, read={self.read!r})"
