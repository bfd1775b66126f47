"""Files dealt to ranks: where `shard(by="file")` may stand, and what the other kind of `shard` costs. Pure."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from aioloader.plan.parts import streams_of
from aioloader.plan.plan import Combined, Plan, walk
from aioloader.sources.even_files import COUNTED
from aioloader.sources.file_source import FileSource
from aioloader.sources.files import Files
from aioloader.sources.resolve import Indexable, source_name
from aioloader.stages.map import Map
from aioloader.stages.shard import Shard

__all__ = ["check_by_file", "cost_of_samples", "uneven_files"]

_FETCHED: Final = ("FetchedFiles", "Objects")  # a sample is a file, and keys are dealt before they are fetched

_UNCOUNTED: Final = (
    "pass even='agree' and a gloo group, so that all ranks end together; or even='keep' if your training can handle "
    "ranks of different length, as with torch's Join; or deal samples instead (by='sample')"
)


def check_by_file(plan: Plan, shard: Shard, even: Any) -> Shard:
    """`shard`, which comes next in `plan` and deals files, with what its `even` means there.

    Args:
        plan: Up to there.
        shard: The stage.
        even: What the user has said; None: nothing.

    Raises:
        ValueError: There are no files to be dealt, or `even` cannot hold.
    """
    source = plan.source
    if isinstance(source, Combined):
        raise ValueError(
            f"shard(by='file') deals the files of one source, and this is Pipeline.{source.how}(...); put it into each "
            f"of the pipelines that are combined"
        )
    if source.name in _FETCHED:
        return replace(shard, by="sample", even="pad" if even is None else even)
    if isinstance(source.data, Indexable):
        if isinstance(source.data.data, Files) and source.sampler is None:
            return replace(shard, by="sample", even="pad" if even is None else even)  # a sample is a file
        raise ValueError(
            f"shard(by='file') is for sources that read files from front to back, and {source_name(source.data.data)} "
            f"is asked for single samples: each rank loads its own alone already; leave by='file' out"
        )
    stream = source.data.make
    if not isinstance(stream, FileSource):
        raise ValueError(
            f"shard(by='file') needs a source that knows its files: TarShards, Lines or ParquetRows itself, got "
            f"{source_name(stream)}; leave by='file' out"
        )
    between = next((stage.label for stage in plan.stages if not isinstance(stage, Map)), None)
    if between is not None:
        raise ValueError(
            f"shard(by='file') lets the source read this rank's files alone, so it comes before {between}; put it "
            f"right after the source, or maps"
        )
    if even is None:
        even = "pad" if stream.counts_samples else None
    elif even in COUNTED and not stream.counts_samples:
        raise ValueError(
            f"shard(by='file', even={even!r}) must know how many samples each rank gets, and nobody has counted those "
            f"in the files of {source_name(stream)}; {_UNCOUNTED}"
        )
    return replace(shard, by="file", even=even)


def cost_of_samples(plan: Plan, wanted: Callable[[Shard], bool]) -> str:
    """What it costs that ranks read all of the same files, in words; empty: they do not.

    Args:
        plan: Any.
        wanted: Which of its `shard` stages to look at.
    """
    for shard, source in _reading_all(plan, wanted):
        _, world_size = shard.place()
        if world_size > 1:
            return (
                f"each of {world_size} ranks reads all {source.file_count} files of {source_name(source)} and keeps "
                f"its share of the samples: {world_size} times the requests, bytes and decompression; "
                f"shard(by='file'), right after the source, lets each rank read its own files alone. Where this is "
                f"meant, ignore aioloader.ReadAllWarning"
            )
    return ""


def uneven_files(plan: Plan) -> str:
    """Why ranks may get different numbers of samples out of files that nobody has counted; empty: they do not."""
    for part in walk(plan):
        if any(isinstance(stage, Shard) and stage.by == "file" and stage.even is None for stage in part.stages):
            return (
                f"shard(by='file') gives each rank what is in its files, and nobody has counted that: where ranks get "
                f"different numbers of batches, DistributedDataParallel waits for ever; {_UNCOUNTED}. Where all files "
                f"are of one length, ignore aioloader.UnevenWarning"
            )
    return ""


def _reading_all(plan: Plan, wanted: Callable[[Shard], bool]) -> Iterator[tuple[Shard, FileSource[Any, Any]]]:
    for part in walk(plan):
        shards = [stage for stage in part.stages if isinstance(stage, Shard)]
        if any(shard.by == "file" for shard in shards):
            continue
        for shard in filter(wanted, shards):
            for stream in streams_of(part):
                if isinstance(stream.make, FileSource) and stream.make.may_be_dealt:
                    yield shard, stream.make
