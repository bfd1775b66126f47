"""`cache`: samples kept from one epoch to the next."""

from dataclasses import dataclass, field, replace

from aioloader.cache.disk import DiskStore
from aioloader.cache.memory import MemoryStore
from aioloader.cache.samples import copied
from aioloader.engine.cache_step import CacheOp
from aioloader.engine.cache_stream_node import PlacedNode
from aioloader.engine.fuse import FusedOps, Op
from aioloader.stages.base import Builder, Stage
from aioloader.stages.flow import Flow

__all__ = ["Cache"]


@dataclass(frozen=True)
class Cache(Stage):
    """Keeps samples behind the stages in front of it.

    Args:
        store: Where; shared by all pipelines that go on from this stage.
        pipeline: What is in front, in words.
    """

    store: MemoryStore | DiskStore = field(compare=False)
    pipeline: str

    exact_in_any_order = True  # which it refuses, see `plan.before_cache`
    keeps_samples = True
    same_each_epoch = True
    caches = True

    @property
    def label(self) -> str:
        if isinstance(self.store, MemoryStore):
            return f"cache(memory_bytes={self.store.budget})"
        return f"cache(disk={str(self.store.folder)!r})"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return before if before.by_key else before.closed()

    def build(self, builder: Builder) -> None:
        op = CacheOp(self.store, self.pipeline, self.label)
        if builder.fused.keyed:
            builder.fused.add(op)
        else:  # known by their positions in the stream
            batches = builder.fused.batches
            again = builder.again(closed=True, warns=False)
            builder.node = stream = PlacedNode(builder.close(), self.store, self.pipeline, again)
            builder.fused = FusedOps(batches, ops=[replace(op, stream=stream)])
        if isinstance(self.store, MemoryStore):
            # What is kept is the cache's, and what a user's function gets is the user's.
            taker = next((stage for stage in builder.following if not stage.keeps_samples), None)
            if taker is None or not taker.only_reads:
                builder.fused.add(Op(copied, "copy", flexible=True))
