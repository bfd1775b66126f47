"""Parquet files to tensors: `python -m bench.sources_parquet`.

The limit is a bare loop over pyarrow with the same batches: `ParquetFile.iter_batches`, each column to numpy, that to
torch. It makes no batch of rows from two files, starts nothing, and keeps no cursor.
"""

import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from aioloader import Pipeline
from aioloader.sources import ParquetRows
from bench._harness import Contender, Epoch, Report, Target, by_async_for, by_for, parser_for, pick

BARE: Final = "bare pyarrow loop"
BARE_ROWS: Final = "bare pyarrow loop, to_pylist"
WIDE: Final = 32  # numbers in the vector of a row
FILES: Final = 2
TARGETS: Final = [
    Target(ours, "speed", BARE, 0.8) for ours in ("ParquetRows(batch_rows), for", "ParquetRows(batch_rows), async for")
]


def write(folder: Path, rows: int) -> list[str]:
    """Files of `rows` rows in all: a vector, two numbers, a label."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    each = rows // FILES
    paths = []
    for number in range(FILES):
        vectors = pa.array(random.random(each * WIDE, dtype=np.float32))
        table = pa.table(
            {
                "vector": pa.FixedSizeListArray.from_arrays(vectors, WIDE),
                "a": random.random(each),
                "b": random.integers(0, 1 << 40, each),
                "label": random.integers(0, 1000, each).astype(np.int32),
            }
        )
        paths.append(str(folder / f"{number}.parquet"))
        pq.write_table(table, paths[-1], row_group_size=128 * 1024)
    return paths


def bare_loop(paths: Sequence[str], columns: list[str], batch_rows: int) -> Epoch:
    """What one writes by hand."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def tensor(column: Any) -> torch.Tensor:
        if not pa.types.is_fixed_size_list(column.type):
            return torch.from_numpy(column.to_numpy(zero_copy_only=False))
        flat = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False))
        return flat.view(len(column), column.type.list_size)

    def epoch(tick: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the arrays are read-only
            for path in paths:
                for batch in pq.ParquetFile(path).iter_batches(batch_rows, columns=columns):
                    made = {name: tensor(batch.column(name)) for name in columns}
                    tick(len(made[columns[-1]]))

    return epoch


def bare_rows(paths: Sequence[str], columns: list[str]) -> Epoch:
    """Rows by hand."""
    import pyarrow.parquet as pq

    def epoch(tick: Any) -> None:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(2048, columns=columns):
                for _ in batch.to_pylist():
                    tick(1)

    return epoch


def loader(paths: list[str], columns: list[str], batch_rows: int | None) -> Pipeline:
    return Pipeline(ParquetRows(paths, columns=columns, batch_rows=batch_rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = parser_for(__doc__)
    options = parser.parse_args(arguments)
    rows = pick(options, full=1 << 19, quick=1 << 16, smallest=4096)
    report = Report("sources_parquet", options)
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), rows)
        for columns, batch_rows in (
            (["vector", "a", "b", "label"], 1024),
            (["vector", "a", "b", "label"], 8192),
            (["a", "b", "label"], 1024),
        ):
            ours = loader(paths, columns, batch_rows)
            report.compare(
                f"{rows} rows of {len(columns)} columns ({columns[0]}, ...) to tensors, {batch_rows} at a time",
                [
                    Contender(BARE, partial(bare_loop, paths, columns, batch_rows), rows, limit=True),
                    Contender("ParquetRows(batch_rows), for", partial(by_for, ours), rows),
                    Contender("ParquetRows(batch_rows), async for", partial(by_async_for, ours), rows),
                ],
                TARGETS,
            )
        columns = ["a", "b", "label"]
        few = loader(paths, columns, None).batch(64, collate_fn=list)
        report.compare(
            f"{rows} rows of 3 columns as dictionaries, lists of 64",
            [
                Contender(BARE_ROWS, partial(bare_rows, paths, columns), rows, limit=True),
                Contender("ParquetRows, for", lambda: by_for(few, len), rows, ours=True),
            ],
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
