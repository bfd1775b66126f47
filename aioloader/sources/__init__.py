"""Where samples come from."""

from aioloader.core.entry import Entry
from aioloader.core.source import CursorSource, EntryReader, SourceContext, SourceThreads
from aioloader.sources.channel import Channel
from aioloader.sources.channel_slot import Slot
from aioloader.sources.files import Files
from aioloader.sources.lines import Lines
from aioloader.sources.objects import Objects
from aioloader.sources.parquet import ParquetRows
from aioloader.sources.tar import TarShards
from aioloader.sources.tar_decode import DecodeSample

__all__ = [
    "Channel",
    "CursorSource",
    "DecodeSample",
    "Entry",
    "EntryReader",
    "Files",
    "Lines",
    "Objects",
    "ParquetRows",
    "Slot",
    "SourceContext",
    "SourceThreads",
    "TarShards",
]
