"""What somebody may have meant who passes a name, a mapping or a table as a source."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Final

import numpy as np

from aioloader.masking import masked

__all__ = ["meant", "table_in"]

_READERS: Final = {
    (".jsonl", ".ndjson"): "Lines({}, decode='json')",
    (".csv", ".tsv"): "Lines({})",
    (".parquet",): "ParquetRows({})",
    (".tar", ".tgz"): "TarShards({})",
}
"""What reads files of these names, compressed or not; `Files` reads the others."""

_COMPRESSED: Final = (".gz", ".zst")

_ROWS: Final = {
    ("pandas", "DataFrame"): 'frame.to_dict("records")',
    ("polars", "DataFrame"): "frame.to_dicts()",
    ("polars", "LazyFrame"): "frame.collect().to_dicts()",
    ("pyarrow", "Table"): "table.to_pylist()",
}
"""What gives the rows of a table."""


def meant(source: Any) -> str:
    """What to pass instead of a name or a mapping."""
    if isinstance(source, Mapping):
        return "list(mapping.items())"
    name = os.fsdecode(source) if isinstance(source, str | bytes | PurePath) else ""
    if not isinstance(source, PurePath) and not _looks_like_path(name):
        return "[it] for one sample"
    reader = _reader(name)
    pattern = masked(name)
    if "*" not in name and not PurePath(name).suffix:
        pattern = f"{pattern.rstrip('/')}/**/*"
    return f"aioloader.sources.{reader.format(repr(pattern))} to read files, or [it] for one sample"


def _looks_like_path(name: str) -> bool:
    if "\n" in name or len(name) > 1000:
        return False
    return "/" in name or os.sep in name or "*" in name or _reader(name) != "Files({})" or Path(name).exists()


def _reader(name: str) -> str:
    name = name.lower()
    for end in _COMPRESSED:
        name = name.removesuffix(end)
    return next((reader for ends, reader in _READERS.items() if name.endswith(ends)), "Files({})")


def table_in(source: Any) -> str | None:
    """What `source` is, and how its rows become samples; None: it is no table, or its `[]` gives rows by position.

    That of a frame gives columns. That of a Series takes labels, and these are no positions after a filter or a sort.
    """
    for kind in type(source).__mro__:  # a GeoDataFrame is a DataFrame
        library = kind.__module__.partition(".")[0]
        way_out = _ROWS.get((library, kind.__name__))
        if way_out is not None:
            return (
                f"a {kind.__name__} of {library}, whose [] gives columns: pass {way_out}, a dict for each row; or "
                f"range(len({way_out.partition('.')[0]})), and take the row in map"
            )
        if (library, kind.__name__) == ("pandas", "Series") and not np.array_equal(source.index, range(len(source))):
            return "a Series of pandas, whose [] takes labels that are not 0, 1, 2, ...: pass series.to_numpy()"
    return None
