"""The keys below a prefix of a store, listed page by page while they are read."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final

from aioloader.core.entry import Entry
from aioloader.core.policies import Policies, Rate
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.masking import mask_message
from aioloader.sources.read_ahead import Ahead
from aioloader.sources.requests import RequestPolicies, Requests

__all__ = ["Listing"]

PAGE_KEYS: Final = 1000
"""The most that one request for a listing returns, in S3, GCS and Azure alike."""

PAGES_AHEAD: Final = 2


class Listing(CursorSource):
    """The keys below a prefix, in order.

    Cursor: the key.
    """

    def __init__(self, store: Any, prefix: str, policies: Policies | None) -> None:
        self._store = store
        self._prefix = prefix
        self._requests = RequestPolicies(policies, "Objects")

    @property
    def rate(self) -> Rate | None:
        """How many of its requests begin in a second, which others may share."""
        return self._requests.rate

    def identity(self) -> dict[str, Any]:
        return {"prefix": self._prefix}

    def check_cursor(self, cursor: Any) -> None:
        if not isinstance(cursor, str):
            raise ValueError(f"the cursor of a listing is a key, got {cursor!r}"[:200])

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        requests = self._requests.begin(context)
        return Ahead(context, lambda: self._entries(cursor, requests), lists=PAGES_AHEAD)

    async def _entries(self, last_key: str | None, requests: Requests | None) -> AsyncGenerator[list[Entry]]:
        found = last_key is not None
        in_order = _lists_in_order(self._store)
        listing = _Pages(self._store, self._prefix, last_key if in_order else None, requests, resumes=in_order)
        pages = _in_order if in_order else _sorted
        try:
            async for keys in pages(listing, last_key):
                found = True
                yield [Entry(key, key, key, 0) for key in keys]
            if not found:
                raise FileNotFoundError(
                    f"Objects: no object below the prefix {self._prefix!r} in {self._store!r}; a prefix is a folder: "
                    f"complete parts of a key, between slashes"
                )
        except Exception as error:
            mask_message(error)
            raise


class _Pages:
    """The pages of a listing. Where one fails and is retried, the listing begins again.

    Args:
        store: Of obstore.
        prefix: What is listed.
        last: The key after which it begins; None: there is none.
        requests: What asks for them; None: each is asked for once.
        resumes: It begins again after the last page, and not at its start.

    Attributes:
        store: See above.
        first: The latest page is the first one of what is listed, once more perhaps.
    """

    def __init__(self, store: Any, prefix: str, last: str | None, requests: Requests | None, *, resumes: bool) -> None:
        self.store = store
        self._prefix = prefix
        self._last = last
        self._requests = requests
        self._resumes = resumes
        self._stream: Any = None
        self.first = False

    async def next(self) -> Sequence[Mapping[str, Any]]:
        """The next page; an empty one at the end."""
        if self._requests is None:
            return await self._next()
        return await self._requests.run(self._next, hedged=False)

    async def _next(self) -> Sequence[Mapping[str, Any]]:
        stream, self._stream = self._stream, None  # unless it goes well, the next attempt begins a stream
        self.first = stream is None and not self._resumes
        if stream is None:
            stream = aiter(self.store.list(self._prefix or None, offset=self._last, chunk_size=PAGE_KEYS))
        try:
            page: Sequence[Mapping[str, Any]] = await anext(stream)
        except StopAsyncIteration:
            page = ()
        self._stream = stream
        if page and self._resumes:
            self._last = page[-1]["path"]
        return page


async def _in_order(pages: _Pages, last_key: str | None) -> AsyncGenerator[list[str]]:
    """The keys after `last_key`, page by page, from a store that lists in order."""
    last = last_key
    while page := await pages.next():
        keys = _keys_of(page)
        for key in keys:
            if last is not None and key <= last:
                raise ValueError(
                    f"{pages.store!r} lists in no order: {key!r} comes after {last!r}, so a resume could not go on "
                    f"from there; list the keys yourself, and pass keys=sorted(keys)"
                )
            last = key
        if keys:
            yield keys


async def _sorted(pages: _Pages, last_key: str | None) -> AsyncGenerator[list[str]]:
    """The same from a store that must be listed to its end first."""
    found: list[str] = []
    while page := await pages.next():
        if pages.first:
            found.clear()
        found += _keys_of(page)
    if last_key is not None:
        found = [key for key in found if key > last_key]
    found.sort()
    for start in range(0, len(found), PAGE_KEYS):
        yield found[start : start + PAGE_KEYS]


def _keys_of(page: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of a page, without the empty objects with which some consoles represent folders."""
    return [item["path"] for item in page if item["size"] or not item["path"].endswith("/")]


def _lists_in_order(store: Any) -> bool:
    from obstore.store import HTTPStore, LocalStore

    return not isinstance(store, HTTPStore | LocalStore)
