"""JSONL with rows of a kilobyte: `python -m bench.sources_lines`.

The limit is the bare synchronous loop, `for line in open(path, "rb"): parse(line)`, with the same parser: `json.loads`;
and, without a target, `orjson.loads`, where nothing is left but what carries the rows. The rival is aiofiles, line by
line, as its documentation writes it. The file is in the page cache.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from aioloader import Pipeline
from aioloader.sources import Lines
from bench._harness import Contender, Epoch, Report, Target, Tick, by_async_for, by_for, parser_for, pick

ROW_BYTES: Final = 1024
BATCH: Final = 64

BARE: Final = "bare loop"
AIOFILES: Final = "aiofiles, line by line"
OURS: Final = ("Lines, async for", "Lines, for")
TO_BARE: Final = [Target(name, "speed", BARE, 0.7) for name in OURS]
TO_AIOFILES: Final = [Target(name, "speed", AIOFILES, 10) for name in OURS]

Parse = Callable[[bytes], Any]


def write_rows(path: Path, count: int) -> None:
    """A file of JSON objects, each with its line end `ROW_BYTES` long."""
    with path.open("w") as file:
        for number in range(count):
            row: dict[str, Any] = {"id": number, "label": number % 10, "scores": [number / 7, number / 11], "text": ""}
            row["text"] = "lorem ipsum " * (ROW_BYTES // 12)
            row["text"] = row["text"][: ROW_BYTES - 1 - len(json.dumps({**row, "text": ""}))]
            file.write(json.dumps(row) + "\n")


def bare(path: Path, parse: Parse) -> Epoch:
    """No loader at all."""

    def epoch(tick: Tick) -> None:
        count = 0
        with path.open("rb") as file:
            for line in file:
                parse(line)
                count += 1
                if count % BATCH == 0:
                    tick(BATCH)

    return epoch


def with_aiofiles(path: Path, parse: Parse) -> Epoch:
    """A hop into a thread for each line."""
    import aiofiles

    async def main(tick: Tick) -> None:
        async with aiofiles.open(path, "rb") as file:
            count = 0
            async for line in file:
                parse(line)
                count += 1
                if count % BATCH == 0:
                    tick(BATCH)

    return lambda tick: asyncio.run(main(tick))


def lines(path: Path, parse: Parse, *, asynchronous: bool) -> Epoch:
    """`Lines`, and lists of 64 rows."""
    decode: Any = "json" if parse is json.loads else parse
    loader = Pipeline(Lines(path, decode=decode)).batch(BATCH, collate_fn=list)
    return (by_async_for if asynchronous else by_for)(loader, len)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge."""
    import orjson

    options = parser_for(__doc__).parse_args(arguments)
    count = pick(options, full=32 << 10, quick=8 << 10, smallest=4 * BATCH)
    few = pick(options, full=4 << 10, quick=1 << 10, smallest=BATCH)
    report = Report("sources_lines", options)
    with tempfile.TemporaryDirectory() as folder:
        path, short = Path(folder) / "rows.jsonl", Path(folder) / "few.jsonl"
        write_rows(path, count)
        write_rows(short, few)
        for name, parse in (("json.loads", json.loads), ("orjson.loads", orjson.loads)):
            report.compare(
                f"{count} rows of {ROW_BYTES} bytes, {name}",
                [
                    Contender(BARE, partial(bare, path, parse), count, limit=True),
                    Contender("Lines, async for", partial(lines, path, parse, asynchronous=True), count),
                    Contender("Lines, for", partial(lines, path, parse, asynchronous=False), count),
                    Contender(AIOFILES, partial(with_aiofiles, short, parse), few),
                ],
                [*TO_BARE, *TO_AIOFILES] if parse is json.loads else TO_AIOFILES,
                apart=True,
            )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
