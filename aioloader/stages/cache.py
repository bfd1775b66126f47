"""`cache`: samples kept from one epoch to the next."""

from dataclasses import dataclass, field, replace

from aioloader.cache.disk import DiskStore
from aioloader.cache.memory import MemoryStore
from aioloader.cache.samples import copied
from aioloader.engine.cache_step import CacheOp
from aioloader.engine.cache_stream_node import PlacedNode
from aioloader.engine.fuse import FusedOps
from aioloader.engine.ops import Op
from aioloader.stages.base import Builder, Stage
from aioloader.stages.flow import Flow

__all__ = ["Cache"]


@dataclass(frozen=True)
class Cache(Stage):
    """Keeps the samples that the stages before it make.

    Args:
        store: Where samples are kept; all pipelines that continue from this stage share it.
        pipeline: What comes before the cache, in words.
    """

    store: MemoryStore | DiskStore = field(compare=False)
    pipeline: str

    exact_in_any_order = True  # `plan.before_cache` refuses streams without a fixed order
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
        else:  # samples of a stream are identified by their positions
            batches = builder.fused.batches
            again = builder.again(closed=True, warns=False)
            builder.node = stream = PlacedNode(builder.close(), self.store, self.pipeline, again)
            builder.fused = FusedOps(batches, ops=[replace(op, stream=stream)])
        if isinstance(self.store, MemoryStore):
            # The cache owns what it keeps; a user's function may change what it gets, so it gets a copy.
            taker = next((stage for stage in builder.following if not stage.keeps_samples), None)
            if taker is None or not taker.only_reads:
                builder.fused.add(Op(copied, "copy", flexible=True))
