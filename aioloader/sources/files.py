"""`Files`: each file is a sample."""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

from aioloader.core.checks import check_ahead
from aioloader.core.memory import Alloc
from aioloader.sources.paths import Paths, find_files
from aioloader.sources.read_file import Read, check_read, load, read_bytes, read_stacked
from aioloader.sources.watched_files import WatchedFiles
from aioloader.stages.load import LoadsBatches

__all__ = ["Files"]


class Files(Sequence[Any], LoadsBatches):
    """Whole files, in a stable order; a map-style dataset, so that `shuffle()` is a full permutation.

    A file that cannot be read raises in its position: the system's OSError with the path; what comes after it goes on.
    In a `DataLoader`, and if `batch` comes directly after the source, a worker loads all files of a batch together;
    with `read="tensor"` straight into the memory of the batch, which is reused.

    Cursor: as for any indexable source, the position in the order of the epoch. With `watch=True`: the names given.

    Args:
        paths: A folder (the files in it and in the folders in it, without hidden ones), a glob (`**` means any
            folders), a path, or a sequence of paths and globs. Folders and globs are looked up here, once, and sorted.
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

    Raises:
        FileNotFoundError: A glob matches nothing, a folder has no files, or with `watch` does not exist.
        ImportError: `watch` without watchfiles.
        TypeError, ValueError: An argument is invalid.

    ```python
    loader = Pipeline(Files("images/**/*.jpg")).shuffle(seed=0).map(decode).batch(64)
    ```
    """

    paths: tuple[str, ...]

    def __new__(cls, *arguments: Any, watch: bool = False, **others: Any) -> Any:
        # A stream is another kind of source: it has no length and no indices.
        if watch and not others.keys().isdisjoint(("ahead", "ahead_bytes")):
            raise ValueError("Files(watch=True) reads no file before it is needed; leave ahead and ahead_bytes out")
        return WatchedFiles(*arguments, **others) if watch else super().__new__(cls)

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
    ) -> None:
        check_read(read, with_path)
        self.ahead, self.ahead_bytes = check_ahead(ahead, ahead_bytes, None)
        self.paths = find_files(paths, source="Files", folders=True)
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
