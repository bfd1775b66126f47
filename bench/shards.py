"""Files dealt to ranks, shuffled, and resumed: `python -m bench.shards`.

How many bytes all ranks read together, of the bytes that there are: tar, lines and Parquet, 16 files of one length,
where samples and where files are dealt. From files that is by the counters of the process (`/proc/self/io`), from a
server that speaks S3 by what it was asked for; there each rank is stopped in the middle, too, and goes on in a new
loader: what it had read ahead is asked for again, of Parquet whole row groups, of which each of 4 ranks has 128. How
many of 8 archives the first 300 of 1,600 samples come from. And how long the first batch takes after a resume at 90 %
of an archive, beside torchdata's `StatefulDataLoader` over webdataset, which reads again what is before it.
"""

import io
import json
import statistics
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from aioloader import Pipeline, ReadAllWarning
from aioloader.sources import Lines, ParquetRows, TarShards
from bench._file_server import FileServer
from bench._harness import Report, Target, parser_for, pick

FILES: Final = 16
BATCH: Final = 32
BY_FILE: Final = {1: "by file, 1 rank"} | {world_size: f"by file, {world_size} ranks" for world_size in (2, 4, 8)}
REPEATS: Final = 5
STOPS: Final = 0.375, 0.44, 0.5  # of an epoch, in the middle of files and between two
NBYTES: Final = 2000  # of a sample: four batches of them, which lie ready, are a hundredth of what one of 4 ranks reads
GROUPS: Final = 32  # row groups of a file


def write_tar(path: Path, first: int, samples: int, nbytes: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + samples):
            info = tarfile.TarInfo(f"{path.stem}-{number:06}.bin")
            info.size = nbytes
            tar.addfile(info, io.BytesIO(number.to_bytes(8, "big") * (nbytes // 8)))


def write_lines(path: Path, first: int, samples: int, nbytes: int) -> None:
    path.write_text("".join(f"{number:0{nbytes}}\n" for number in range(first, first + samples)))


def write_parquet(path: Path, first: int, samples: int, nbytes: int) -> None:
    import numpy
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = numpy.random.default_rng(first).bytes(samples * nbytes)
    column = pa.array([rows[at : at + nbytes] for at in range(0, len(rows), nbytes)])
    pq.write_table(
        pa.table({"row": column}),
        path,
        row_group_size=max(1, samples // GROUPS),
        compression="none",
        write_statistics=False,
    )


FORMATS: Final[dict[str, tuple[Any, Callable[..., None]]]] = {
    "tar": (TarShards, write_tar),
    "txt": (Lines, write_lines),
    "parquet": (ParquetRows, write_parquet),
}


def bytes_read() -> int:
    """By this process so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def share_read(source: Any, world_size: int, total: int, by: Any) -> float:
    """What all ranks read together, as a share of what there is."""
    before = bytes_read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReadAllWarning)
        for rank in range(world_size):
            for _ in Pipeline(source).shard(rank, world_size, by=by):
                pass
    return (bytes_read() - before) / total


def write_all(folder: Path, samples: int) -> None:
    """The files of each format, of so many samples."""
    for suffix, (_, write) in FORMATS.items():
        for number in range(FILES):
            write(folder / f"{number:02}.{suffix}", number * samples, samples, NBYTES)


def read_once(report: Report, folder: Path) -> None:
    """All ranks together, for 1 to 8 of them."""
    if not Path("/proc/self/io").exists():
        report.note("left out: bytes read, for want of /proc/self/io")
        return
    for suffix, (kind, _) in FORMATS.items():
        paths = sorted(folder.glob(f"*.{suffix}"))
        total = sum(path.stat().st_size for path in paths)
        source = kind(paths, shuffle=True, interleave=2)
        list(Pipeline(source).take(1))  # what is imported is read, too
        rows = {name: {"read": share_read(source, world_size, total, "file")} for world_size, name in BY_FILE.items()}
        rows["by sample, 4 ranks"] = {"read": share_read(source, 4, total, "sample")}
        title = f"bytes read by all ranks, of {total / 1e6:.0f} MB in {FILES} {suffix} files"
        report.table(title, rows)
        judge(report, rows, title)


def judge(report: Report, rows: dict[str, dict[str, float]], title: str) -> None:
    """What the number of ranks that reads most has read, where files are dealt and nobody is stopped."""
    most = max(row["read"] for name, row in rows.items() if name in BY_FILE.values())
    target = Target("by file, 1 to 8 ranks", "time", "the data", 1.05)
    report.judge(target, most, "{ours}: at most {value} of the bytes; at most {reach}", of=title)


def from_server(report: Report, folder: Path, samples: int) -> None:
    """The same files from a server, by what it was asked for."""
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        report.note(f"left out: files from a server, for want of {error.name}")
        return
    with FileServer(folder) as server:
        for suffix, (kind, _) in FORMATS.items():
            paths = sorted(folder.glob(f"*.{suffix}"))
            total = sum(path.stat().st_size for path in paths)
            source = kind([path.name for path in paths], store=server.store(), shuffle=True, interleave=2)
            rows = {}
            for world_size, stop in (*((each, 0.0) for each in BY_FILE), *((4, stop) for stop in STOPS)):
                before = server.counts()
                batches = int(samples * FILES / world_size / BATCH * stop)
                given = sum(read_part(source, rank, world_size, batches) for rank in range(world_size))
                if given != samples * FILES:
                    raise RuntimeError(f"{suffix}: all ranks must give {samples * FILES} samples, got {given}")
                sent, gets = (now - then for now, then in zip(server.counts(), before, strict=True))
                name = stopped_at(stop) if stop else BY_FILE[world_size]
                rows[name] = {"read": sent / total, "GETs": float(gets), "files again": 0.0}
            for stopped in (rows[stopped_at(stop)] for stop in STOPS):
                stopped["files again"] = (stopped["read"] - rows[BY_FILE[4]]["read"]) * FILES / 4  # by each rank
            title = f"bytes that all ranks ask a server for, of {total / 1e6:.0f} MB in {FILES} {suffix} objects"
            report.table(title, rows)
            judge(report, rows, title)
            most = max(rows[stopped_at(stop)]["read"] for stop in STOPS)
            target = Target("by file, 4 ranks, each stopped once", "time", "the data", 1.05)
            report.judge(target, most, "{ours}: at most {value} of the bytes; at most {reach}", of=title)


def stopped_at(stop: float) -> str:
    """What the row is called of ranks that were stopped there."""
    return f"{BY_FILE[4]}, each stopped at {stop:.0%}"


def read_part(source: Any, rank: int, world_size: int, batches: int) -> int:
    """The samples in an epoch of one rank, which is stopped after so many batches, if any, and resumed elsewhere."""
    part = Pipeline(source).shard(rank, world_size, by="file", even="keep").batch(BATCH, collate_fn=len)
    if batches:
        state = state_at(part, batches)
        part = Pipeline(source).shard(rank, world_size, by="file", even="keep").batch(BATCH, collate_fn=len)
        part.load_state_dict(state)
    return batches * BATCH + sum(part)


def mixed(report: Report, folder: Path) -> None:
    """The first 300 of 1,600 samples in 8 archives."""
    paths = [folder / f"mixed-{number}.tar" for number in range(8)]
    for number, path in enumerate(paths):
        write_tar(path, 200 * number, 200, 64)
    rows = {}
    for name, arguments in {"as given": {}, "shuffle, interleave=8": {"shuffle": True, "interleave": 8}}.items():
        loader = Pipeline(TarShards(paths, **arguments)).take(300)  # type: ignore[arg-type]
        epochs = [[sample["__url__"] for sample in loader] for _ in range(2)]
        rows[name] = {"archives": float(len(set(epochs[0]))), "orders of 2": float(len(set(map(tuple, epochs))))}
    title = "archives in the first 300 of 1,600 samples, of 8"
    report.table(title, rows)
    name = "shuffle, interleave=8"
    report.judge(
        Target(name, "speed", "all", 8), rows[name]["archives"], "{ours}: {value} archives; at least {reach}", of=title
    )


def first_batch(make: Callable[[], Any], state: Any) -> float:
    """Median seconds until a fresh loader that goes on from `state` has given a batch."""
    seconds = []
    for _ in range(REPEATS):
        loader = make()
        began = perf_counter()
        loader.load_state_dict(state)
        iterator = iter(loader)
        next(iterator)
        seconds.append(perf_counter() - began)
        del iterator, loader
    return statistics.median(seconds)


def state_at(loader: Any, batches: int) -> Any:
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    return loader.state_dict()


def webdataset_loader(path: Path) -> Any:
    import webdataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = webdataset.WebDataset([str(path)], shardshuffle=False).batched(BATCH, collation_fn=list)
    return StatefulDataLoader(dataset, batch_size=None)


def resumed(report: Report, folder: Path, samples: int) -> None:
    """The first batch after a resume near the start and near the end."""
    path = folder / "resumed.tar"
    write_tar(path, 0, samples, 16_000)

    def ours() -> Pipeline:
        return Pipeline(TarShards(path)).batch(BATCH, collate_fn=list)

    loaders: dict[str, Callable[[], Any]] = {"aioloader": ours}
    try:
        webdataset_loader(path)
        loaders["StatefulDataLoader, webdataset"] = lambda: webdataset_loader(path)
    except ImportError as error:
        report.note(f"left out: webdataset, for want of {error.name}")
    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdata's, of torch
        for name, make in loaders.items():
            batches = samples // BATCH
            states = {share: state_at(make(), max(1, batches * share // 100)) for share in (2, 90)}
            rows[name] = {f"ms at {share} %": first_batch(make, state) * 1e3 for share, state in states.items()}
            if name == "aioloader":
                json.dumps(states)
    title = f"first batch after a resume, in an archive of {path.stat().st_size / 1e6:.0f} MB"
    report.table(title, rows)
    row = rows["aioloader"]
    target = Target("aioloader", "time", "at 2 %", 1.5)
    value = row["ms at 90 %"] / row["ms at 2 %"]
    report.judge(target, value, "{ours}: at 90 % it takes {value} times as long as at 2 %; at most {reach}", of=title)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    report = Report("shards", options)
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), Path(name, "files")
        files.mkdir()
        samples = pick(options, full=3200, quick=800, smallest=64)
        write_all(files, samples)
        read_once(report, files)
        from_server(report, files, samples)
        mixed(report, folder)
        resumed(report, folder, pick(options, full=4000, quick=2000, smallest=200))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
