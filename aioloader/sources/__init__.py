"""Where samples come from."""

from aioloader.sources.lines import Lines
from aioloader.sources.parquet import ParquetRows
from aioloader.sources.tar import TarShards
from aioloader.sources.tar_decode import DecodeSample

__all__ = ["DecodeSample", "Lines", "ParquetRows", "TarShards"]
