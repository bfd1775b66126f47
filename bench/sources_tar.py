"""Tar shards of images: `python -m bench.sources_tar`.

Archives of samples of a JPEG's size (60 kB of noise) and a class, in the page cache, read in one process each: the
package webdataset as its documentation writes it, with its own decoder of the class, against `TarShards`. The limit
reads the archives' bytes and does nothing with them. Also with small samples, where the work is per member.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from aioloader import Pipeline
from aioloader.sources import TarShards
from bench._harness import Contender, Epoch, Report, Target, Tick, by_async_for, by_for, parser_for, pick

SHARDS: Final = 4
BATCH: Final = 64

BARE: Final = "only reading"
THEIRS: Final = "webdataset"
OURS: Final = ("TarShards, async for", "TarShards, for")
TARGETS: Final = [Target(name, "speed", THEIRS, 1) for name in OURS]


def write_shards(folder: Path, samples: int, image_bytes: int) -> list[str]:
    """Archives by webdataset's own writer."""
    import numpy
    import webdataset

    paths = [str(folder / f"{image_bytes}-{number:03}.tar") for number in range(SHARDS)]
    noise = numpy.random.default_rng(0).bytes(image_bytes + samples)
    for number, path in enumerate(paths):
        with webdataset.TarWriter(path) as sink:
            for sample in range(number, samples, SHARDS):
                sink.write({"__key__": f"{sample:06}", "jpg": noise[sample : sample + image_bytes], "cls": sample % 10})
    return paths


def reading(paths: list[str], samples: int) -> Epoch:
    """The bytes of the archives, a megabyte at once."""

    def epoch(tick: Tick) -> None:
        for path in paths:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - as one would write it
                while file.read(1 << 20):
                    pass
            tick(samples // SHARDS)

    return epoch


def webdataset_loader(paths: list[str]) -> Epoch:
    """Its pipeline, with the decoder of classes, and lists of 64 samples."""
    import webdataset

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        sample["cls"] = int(sample["cls"])
        return sample

    dataset = webdataset.WebDataset(paths, shardshuffle=False).map(decode).batched(BATCH, collation_fn=list)
    return by_for(dataset, len)


def tar_shards(paths: list[str], *, asynchronous: bool) -> Epoch:
    """Ours, likewise."""
    loader = Pipeline(TarShards(paths, decode={"cls": int})).batch(BATCH, collate_fn=list)
    return (by_async_for if asynchronous else by_for)(loader, len)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, judge."""
    options = parser_for(__doc__).parse_args(arguments)
    report = Report("sources_tar", options)
    with tempfile.TemporaryDirectory() as name:
        for image_bytes, full, quick in ((60_000, 2048, 512), (1000, 8192, 2048)):
            samples = pick(options, full=full, quick=quick, smallest=4 * BATCH)
            paths = write_shards(Path(name), samples, image_bytes)
            report.compare(
                f"{samples} samples of {image_bytes} bytes and a class in {SHARDS} archives",
                [
                    Contender(BARE, partial(reading, paths, samples), samples, limit=True),
                    Contender("TarShards, async for", partial(tar_shards, paths, asynchronous=True), samples),
                    Contender("TarShards, for", partial(tar_shards, paths, asynchronous=False), samples),
                    Contender(THEIRS, partial(webdataset_loader, paths), samples, needs=("webdataset",)),
                ],
                TARGETS,
                apart=True,
            )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
