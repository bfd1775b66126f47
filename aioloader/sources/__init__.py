"""Where samples come from."""

from aioloader.sources.channel import Channel
from aioloader.sources.files import Files
from aioloader.sources.lines import Lines
from aioloader.sources.objects import Objects
from aioloader.sources.parquet import ParquetRows
from aioloader.sources.tar import TarShards
from aioloader.sources.tar_decode import DecodeSample

__all__ = ["Channel", "DecodeSample", "Files", "Lines", "Objects", "ParquetRows", "TarShards"]
