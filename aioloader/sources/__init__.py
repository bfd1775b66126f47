"""Where samples come from."""

from aioloader.sources.files import Files
from aioloader.sources.lines import Lines
from aioloader.sources.tar import TarShards
from aioloader.sources.tar_decode import DecodeSample

__all__ = ["DecodeSample", "Files", "Lines", "TarShards"]
