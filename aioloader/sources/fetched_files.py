"""`Files` of stores: each object is a sample, and many are fetched at once."""

from collections.abc import Sequence
from operator import index
from typing import Any

from aioloader.core.checks import check_ahead, check_count
from aioloader.core.memory import tensor_over_bytes
from aioloader.core.safe_text import add_note
from aioloader.masking import mask_message
from aioloader.sources.fetch import FetchSource
from aioloader.sources.paths import Paths
from aioloader.sources.read_file import Read, check_read
from aioloader.sources.stored_files import find_stored_files

__all__ = ["FetchedFiles"]


class FetchedFiles(FetchSource):
    """What `Files` returns for URLs, or with a `store`; its arguments are described there."""

    def __init__(
        self,
        paths: Paths,
        *,
        read: Read | None = "bytes",
        with_path: bool = False,
        store: Any = None,
        concurrency: int | None = None,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        client_options: Any = None,
        retry_config: Any = None,
        retry: object = None,
        timeout: object = None,
        hedge: object = None,
        rate: object = None,
    ) -> None:
        check_read(read, with_path)
        options = {"client_options": client_options, "retry_config": retry_config}
        policies = {"retry": retry, "timeout": timeout, "hedge": hedge, "rate": rate}
        files, requests = find_stored_files(paths, store, options, policies, source="Files")
        local = next((file for file in files if file.store is None), None)
        if local is not None:
            raise ValueError(
                f"Files takes files of this machine or URLs, got both, for instance {local.name!r} among URLs; read "
                f"them by two sources"
            )
        self.policies = requests.policies
        self.concurrency = check_count("concurrency", 64 if concurrency is None else concurrency, least=1)
        self.ahead, self.ahead_bytes = check_ahead(ahead, ahead_bytes, self.concurrency)
        self.read = read
        self.with_path = bool(with_path)
        self._names = tuple(file.name for file in files)
        self._files = {file.name: file for file in files}

    @property
    def keys(self) -> Sequence[str]:
        """URLs or keys, in order, without passwords."""
        return self._names

    @property
    def paths(self) -> tuple[str, ...]:
        """URLs or keys, as they were given."""
        return tuple(self._files[name].url for name in self._names)

    def __len__(self) -> int:
        return len(self._names)

    async def __getitem__(self, number: int) -> Any:
        return await self.fetch(self._names[index(number)])

    async def fetch(self, key: str) -> Any:
        """The content of an object.

        Raises:
            Exception: The store's own; FileNotFoundError if it is missing.
        """
        if self.read is None:
            return key
        import obstore

        file = self._files[key]
        try:
            buffer = await (await obstore.get_async(file.store, file.key)).bytes_async()
        except Exception as error:
            mask_message(error)
            add_note(error, f"aioloader: object {file.key!r} of {file.store!r}")
            raise
        content: Any = bytes(buffer) if self.read == "bytes" else tensor_over_bytes(buffer)
        return (key, content) if self.with_path else content

    def __repr__(self) -> str:
        return f"Files({len(self)} files, read={self.read!r})"
