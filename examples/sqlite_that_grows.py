"""Train on the rows of an SQLite table while another process adds some, and go on there in the next run.

    python examples/sqlite_that_grows.py rows.db --steps 100 --state state.json

The table is `samples(id INTEGER PRIMARY KEY, x TEXT, y REAL)`, with `x` a JSON list of numbers and ids from 1. Rows are
read in the order of their ids; SQLite lets one connection write at a time, so none comes before one that was read. A
batch with a row that is broken is reported and left out.
"""

import argparse
import asyncio
import json
import sqlite3
from collections.abc import Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aioloader import Pipeline
from aioloader.sources import CursorSource, Entry, EntryReader, SourceContext

Row = tuple[int, str, float]


class Rows(CursorSource[tuple[Tensor, Tensor]]):
    """The rows of the table, in the order of their ids; at its end it waits for more.

    Cursor: the id.

    Args:
        path: Of the database.
        wait_seconds: SQLite tells other processes of nothing, so it is asked that often for new rows.
    """

    def __init__(self, path: Path, wait_seconds: float = 0.2) -> None:
        self.path = path
        self.wait_seconds = wait_seconds

    @property
    def live(self) -> bool:
        """Stages take no row before they need it."""
        return True

    def check_cursor(self, cursor: Any) -> None:
        """An id."""
        if type(cursor) is not int:
            raise ValueError(f"a cursor of Rows is the id of a row, got {cursor!r}")

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        """The table is opened by the first `read`."""
        return _RowReader(self, context, cursor or 0)


class _RowReader(EntryReader):
    def __init__(self, source: Rows, context: SourceContext, last_id: int) -> None:
        self._source = source
        self._last_id = last_id
        self._thread = context.threads(1)  # a connection is used by the thread that has made it
        self._connection: sqlite3.Connection | None = None

    async def read(self, limit: int) -> list[Entry]:
        while not (rows := await self._thread.call(self._select, limit)):  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(self._source.wait_seconds)
        self._last_id = rows[-1][0]
        return list(map(_entry, rows))

    def _select(self, limit: int) -> list[Row]:
        if self._connection is None:
            self._connection = sqlite3.connect(f"{self._source.path.resolve().as_uri()}?mode=ro", uri=True)
        query = "SELECT id, x, y FROM samples WHERE id > ? ORDER BY id LIMIT ?"
        return self._connection.execute(query, (self._last_id, limit)).fetchall()

    async def aclose(self) -> None:
        await self._thread.call(self._close)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _entry(row: Row) -> Entry:
    """Input and target."""
    row_id, x, y = row
    try:
        pair = torch.tensor(json.loads(x)), torch.tensor([y])
    except (ValueError, TypeError, RuntimeError) as error:
        return Entry.failed(error, cursor=row_id, key=row_id)
    return Entry(pair, cursor=row_id, key=row_id)


async def train(loader: Pipeline[list[Tensor]], steps: int) -> None:
    """Train a linear model for so many steps."""
    model: nn.Linear | None = None
    step = 0
    async with aclosing(aiter(loader)) as batches:
        while step < steps:
            try:
                inputs, targets = await anext(batches)
            except (ValueError, TypeError, RuntimeError) as error:
                print(f"left out: {error} ({'; '.join(error.__notes__)})", flush=True)
                continue
            if model is None:
                model = nn.Linear(inputs.shape[1], 1)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}: {len(inputs)} rows, loss {loss.item():.4f}", flush=True)


def make_table(path: Path) -> None:
    """The table, if there is none."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS samples(id INTEGER PRIMARY KEY, x TEXT, y REAL)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--state", type=Path, help="where to go on, and where to write it")
    options = parser.parse_args(arguments)
    make_table(options.path)
    loader = Pipeline(Rows(options.path)).batch(options.batch_size)
    if options.state is not None and options.state.exists():
        loader.load_state_dict(json.loads(options.state.read_text()))
    asyncio.run(train(loader, options.steps))
    if options.state is not None:
        options.state.write_text(json.dumps(loader.state_dict()))


if __name__ == "__main__":
    main()
