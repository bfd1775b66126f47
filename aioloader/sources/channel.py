"""`Channel`: samples that other tasks and threads send while they are trained on."""

from functools import partial
from typing import Any, Literal, Self, get_args

from aioloader.core.checks import check_count
from aioloader.core.source import CursorSource, EntryReader, SourceContext
from aioloader.core.typevars import T
from aioloader.sources.channel_ledger import ChannelLedger
from aioloader.sources.channel_queue import ChannelQueue
from aioloader.sources.channel_reader import ChannelReader
from aioloader.sources.channel_senders import Sender, SyncSender
from aioloader.sources.channel_slot import Slot

__all__ = ["Channel"]

WhenFull = Literal["wait", "drop_oldest"]


class Channel(ChannelQueue[T], CursorSource[T]):
    """A live source: samples that other tasks or threads send, in the order in which they were sent.

    Tasks of any event loop send with `await send(sample)`, threads with `sender_sync().send(sample)`; both wait while
    the channel holds `maxsize` samples, so that a slow consumer slows down its producers. An epoch lasts until the
    channel is closed. All methods may be called from any thread.

    Several loaders, or several iterators of one, may read a channel: each sample goes to one of them. Samples that a
    loader has read ahead and not handed out when its iterator is closed, or its `take(n)` is complete, go back to the
    front of the channel, in order, and come in the next epoch.

    A sample that is made first and then waits for room grows old. `reserve` takes the place before it is made:

    ```python
    with await channel.reserve() as slot:
        slot.send(await generate(policy))  # never waits
    ```

    At most `maxsize` places are taken, by samples in the channel and by slots. A place is free again when a loader has
    read its sample, and a loader reads no more than its own stages have room for: no more than `maxsize` samples and
    those rooms together have been begun and not been handed out.

    A live sample comes once: a saved state cannot bring it back in another process.

    Args:
        maxsize: How many places the channel has, at least 1. Samples that go back to it may exceed this.
        when_full: What `send` does when there is no place. `"wait"`: it waits for one. `"drop_oldest"`: it never waits,
            and the oldest sample in the channel is dropped and counted, see `dropped`.

    Raises:
        ValueError: `maxsize` is less than 1, or `when_full` is something else.

    ```python
    channel = Channel(maxsize=256)
    loader = Pipeline(channel).batch(64, max_wait=0.5)
    ```
    """

    replayable = False

    def __init__(self, maxsize: int, when_full: WhenFull = "wait") -> None:
        if when_full not in get_args(WhenFull):
            raise ValueError(f"when_full must be 'wait' or 'drop_oldest', got {when_full!r}")
        super().__init__(check_count("maxsize", maxsize, least=1), drops=when_full == "drop_oldest")

    # -- sending -----------------------------------------------------------------------------------------------------

    async def reserve(self) -> Slot[T]:
        """Take a place for a sample that is yet to be made; wait for one, in turn with those who send.

        A call that is cancelled has taken nothing. With `when_full="drop_oldest"` it waits, too: what is in the channel
        is dropped for a sample that is there.

        Returns:
            The place. Use it once, `slot.send(sample)`, or give it back: `slot.release()`, or the end of its block.

        Raises:
            ChannelClosedError: The channel is closed, or was closed meanwhile.
        """
        return await self._reserve(partial(Slot, self))

    def reserve_nowait(self) -> Slot[T]:
        """Take a place if one is free; from any thread.

        Raises:
            asyncio.QueueFull: None is. An HTTP service answers 429 then.
            ChannelClosedError: The channel is closed.
        """
        return self._reserve_nowait(partial(Slot, self))

    def sender(self) -> "Sender[T]":
        """A handle for one of several senders: the channel is closed when all its handles are closed.

        Make all of them before the first one is closed, and use each in a `with` or `async with` block:

        ```python
        async def rollout(sender):
            with sender:
                async for step in environment():
                    await sender.send(step)

        tasks = [asyncio.create_task(rollout(channel.sender())) for _ in range(8)]
        ```
        """
        return Sender(self)

    def sender_sync(self) -> "SyncSender[T]":
        """A handle for a thread: its `send` blocks. Close it, or call `channel.close()` in the end."""
        return SyncSender(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error if isinstance(error, Exception) else None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error if isinstance(error, Exception) else None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        reserved = f", {self._promised} reserved" if self._promised else ""
        return f"<Channel: {len(self._samples)} samples{reserved}, maxsize {self._maxsize}, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Channel belongs to its process and cannot be pickled or copied; make it where it is read, and let other "
            "processes send to a task or thread there"
        )

    # -- reading -----------------------------------------------------------------------------------------------------

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        """Read on. `cursor` has no effect, because live samples do not come again."""
        self._check_process()
        ledger: ChannelLedger = context.shared(self, lambda: ChannelLedger(self._put_back))
        return ChannelReader(self, context, ledger)
