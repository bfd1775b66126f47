"""A place in a `Channel` that is taken before its sample is made."""

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self

from aioloader.core.typevars import T
from aioloader.sources.channel_queue import ChannelQueue

__all__ = ["Slot"]


class Slot(Generic[T]):
    """A place in a channel, made by `Channel.reserve()` and its kin.

    It is for one sample, and may be used from any thread: `send` never waits. An unused place is given back by
    `release()`, by the end of a `with` or `async with` block, or when the sender that reserved it is closed.

    ```python
    async with await channel.reserve() as slot:
        slot.send(await generate(policy))
    ```

    One that is dropped with its place is a mistake: the place is given back when it is collected, with a
    `ResourceWarning`.
    """

    def __init__(self, channel: ChannelQueue[T], check_sender: Callable[[], None] | None = None) -> None:
        self._channel = channel
        self._check_sender = check_sender  # raises once the sender that reserved it is closed
        self._held = True  # guarded by the channel's lock

    def send(self, sample: T) -> None:
        """Put `sample` into the channel, at once.

        Raises:
            ChannelClosedError: The channel or the sender was closed meanwhile; `sample` has not been sent.
            RuntimeError: The slot has been used or released.
        """
        channel = self._channel
        channel._check_process()
        with channel._lock:
            if self._held:
                self._held = False
                if channel._closed:
                    channel._give_back()
                    raise channel._refusal("the sample was not sent")
                channel._fill(sample)
                return
        if self._check_sender is not None:
            self._check_sender()
        raise RuntimeError("this slot has been used or released: it is for one sample; reserve another one")

    def release(self) -> None:
        """Give the place back, if it is not used: the next one who waits gets it. Idempotent."""
        self._channel._check_process()
        self._let_go()

    def _let_go(self) -> bool:
        """Whether there was a place to give back, in a channel where somebody may want it."""
        channel = self._channel
        with channel._lock:
            held, self._held = self._held, False
            if held:
                channel._give_back()
            return held and not channel._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Slot: {'free to send' if self._held else 'used or released'}, of {self._channel!r}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Slot belongs to a channel of this process and cannot be pickled or copied; send from here")

    def __del__(self, _warn: Any = warnings.warn) -> None:  # the module may be gone at exit
        if self._held and self._channel._is_here and self._let_go():
            what = f"a slot of {self._channel!r} was dropped unused, and its place was given back; use `with slot:`"
            _warn(what, ResourceWarning, 2)
