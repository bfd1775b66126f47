"""A range of an object in a store: a request for it, or as many as it takes, and what is checked of the answers."""

import asyncio
import re
from collections.abc import Callable
from time import perf_counter
from typing import Any

from aioloader.errors import BrokenDataError
from aioloader.sources.requests import CutShortError, Requests
from aioloader.sources.stores import Version

__all__ = ["Range", "RequestedRange", "check_length", "checked_size"]


class Range:
    """A request for a range of an object: the answer, and then its body.

    obstore's awaitables are futures, so both make progress without a task that awaits them.

    Args:
        store: A store of obstore.
        key: The object's.
        start, stop: Which bytes.
        condition: Options of the request, so that it is of one version.
        told: Called with how many seconds the answer took to begin.
    """

    def __init__(
        self,
        store: Any,
        key: str,
        start: int,
        stop: int,
        condition: dict[str, Any],
        told: Callable[[float], object] | None = None,
    ) -> None:
        import obstore

        self._store = store
        self._key = key
        self._start = start
        self._stop = stop
        options: Any = {"range": (start, stop), **condition}
        answer: Any = obstore.get_async(store, key, options=options)
        self._answer = answer
        self._body: Any = None
        self._began = perf_counter()
        self._told = told
        self._answer.add_done_callback(self._read_body)

    def _read_body(self, answer: Any) -> None:
        if self._body is None and not answer.cancelled() and answer.exception() is None:
            if self._told is not None:
                self._told(perf_counter() - self._began)
            self._body = answer.result().bytes_async()
            self._body.add_done_callback(lambda body: body.cancelled() or body.exception())  # it may never be awaited

    async def read(self, answered: Callable[[Any], int]) -> Any:
        """The bytes of the range; `b""` if the object ends where it begins.

        Args:
            answered: Called with what the store says of the object, before its bytes; returns where it ends.

        Raises:
            BrokenDataError: It is another version than it was, or the answer was cut short.
            Exception: The store's own, or what `answered` raises.
        """
        from obstore.exceptions import GenericError, PreconditionError

        try:
            end = answered((await self._answer).meta)
            self._read_body(self._answer)  # the callback may not have run yet
            data = await self._body
        except PreconditionError as error:
            raise BrokenDataError(_changed_meanwhile(self._key, self._start)) from error
        except GenericError as error:
            end = answered(await _head_if_beyond(self._store, self._key, error))
            if self._start < end:
                raise
            return b""
        check_length(self._key, self._start, len(data), min(self._stop, end))
        return data

    def cancel(self) -> None:
        """Cancel what is pending; may be called at any time."""
        self._answer.cancel()
        if self._body is not None:
            self._body.cancel()


class RequestedRange:
    """The same by `Requests`, which may make it several times: in a task, so that one that is ahead goes on by itself.

    Args:
        requests: The reader's.
        begin: Makes a request.
        check: Returns where the object ends, from an answer.
    """

    def __init__(self, requests: Requests, begin: Callable[[], Range], check: Callable[[Any], int]) -> None:
        self._begin = begin
        self._check = check
        self._meta: Any = None  # of the first answer
        self._answered = asyncio.Event()
        self._pending = requests.begin(self._attempt)
        self._pending.task.add_done_callback(lambda _: self._answered.set())

    async def _attempt(self) -> Any:
        request = self._begin()
        try:
            return await request.read(self._took_answer)
        finally:
            request.cancel()

    def _took_answer(self, meta: object) -> int:
        end = self._check(meta)
        if self._meta is None:
            self._meta = meta
            self._answered.set()
        return end

    async def read(self, answered: Callable[[Any], int]) -> Any:
        """See `Range.read`; the answers of later attempts are those of the first, or an error."""
        await self._answered.wait()
        if self._meta is not None:
            answered(self._meta)
        return await self._pending.result()

    def cancel(self) -> None:
        """Cancel it; may be called at any time."""
        self._pending.cancel()


async def _head_if_beyond(store: Any, key: str, error: Exception) -> Any:
    """The metadata of an object after a request for a range past its end (416), which stores word differently.

    Raises:
        Exception: `error`, if it is another one.
    """
    import obstore

    if not re.search(r"\b416\b|range", str(error), re.IGNORECASE):
        raise error
    try:
        return await obstore.head_async(store, key)
    except Exception:
        raise error from None


def checked_size(meta: Any, version: Version, key: str, at: int, needed: int) -> int:
    """The size of the object, from an answer.

    Raises:
        BrokenDataError: It is another version, or has fewer than `needed` bytes.
    """
    begins = not version.known
    if not version.is_same(meta):
        raise BrokenDataError(_another_version(key) if begins else _changed_meanwhile(key, at))
    size: int = meta["size"]
    if size < needed:
        raise BrokenDataError(f"the object {key!r} has {size} bytes now, and reading resumes at byte {needed}")
    return size


def _another_version(key: str) -> str:
    return (
        f"the object {key!r} was rewritten since the state was made: its ETag differs; restore the old "
        f"version, or begin the epoch again without the state"
    )


def _changed_meanwhile(key: str, at: int) -> str:
    return (
        f"the object {key!r} was rewritten while it was read: what comes from byte {at} on is of another version; "
        f"samples before it have the old one. Write new data under a new key, or begin the epoch again (if it was not "
        f"rewritten, the servers behind its URL disagree about the ETag)"
    )


def check_length(key: str, start: int, length: int, stop: int) -> None:
    """Check that all bytes came, from `start` to `stop`.

    Raises:
        CutShortError: They did not.
    """
    if length != stop - start:
        raise CutShortError(
            f"the object {key!r}: {stop - start} bytes from byte {start} on were promised, and {length} came; the "
            f"answer was cut short"
        )
