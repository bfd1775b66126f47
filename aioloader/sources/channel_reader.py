"""The reader of a `Channel` for one epoch of a loader."""

from typing import Any

from aioloader.core.entry import Entry
from aioloader.core.source import EntryReader, SourceContext
from aioloader.sources.channel_ledger import ChannelLedger
from aioloader.sources.channel_queue import ChannelQueue

__all__ = ["ChannelReader"]


class ChannelReader(EntryReader):
    """Takes samples out of a channel as they are asked for."""

    def __init__(self, channel: ChannelQueue[Any], context: SourceContext, ledger: ChannelLedger) -> None:
        self._channel = channel
        self._context = context
        self._ledger = ledger
        self._dropped = channel.dropped  # as far as the loader has been told

    async def read(self, limit: int) -> list[Entry]:
        channel = self._channel
        self._ledger.forget(self._context.handed_out)
        while True:
            with channel._lock:
                samples = channel._take(limit)
                if not samples:
                    if channel._closed:
                        break
                    arrival = self._context.loop.create_future()
                    channel._readers[arrival] = self._context.loop
            self._tell_dropped(channel.dropped)
            if samples:
                return self._ledger.entries(samples)
            try:
                await arrival
            finally:
                with channel._lock:
                    channel._readers.pop(arrival, None)
        self._tell_dropped(channel.dropped)
        if channel._error is not None:
            raise channel._error
        return []

    def _tell_dropped(self, count: int) -> None:
        if count != self._dropped:
            self._context.count_dropped(count - self._dropped)
            self._dropped = count
