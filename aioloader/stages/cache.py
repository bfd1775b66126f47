"""`cache`: samples kept from one epoch to the next."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aioloader.cache.disk import DiskStore
from aioloader.cache.memory import MemoryStore
from aioloader.cache.samples import copied
from aioloader.core.cores import usable_cores
from aioloader.stages.base import Stage
from aioloader.stages.batch import Batch
from aioloader.stages.flow import Flow
from aioloader.stages.map import Map

__all__ = ["COPY", "Cache", "with_copies"]


@dataclass(frozen=True)
class Cache(Stage):
    """Keeps samples behind the stages in front of it.

    Args:
        store: Where; shared by all pipelines that go on from this stage.
        pipeline: What is in front, in words.
    """

    store: MemoryStore | DiskStore = field(compare=False)
    pipeline: str

    concurrency = None
    ordered = True
    is_async = False
    exact_in_any_order = True  # which it refuses, see `plan.in_front_of_cache`
    keeps_samples = True
    same_each_epoch = True

    @property
    def label(self) -> str:
        if isinstance(self.store, MemoryStore):
            return f"cache(memory_bytes={self.store.budget})"
        return f"cache(disk={str(self.store.folder)!r})"

    @property
    def width(self) -> int:
        """Samples that are written or read side by side."""
        return 1 if isinstance(self.store, MemoryStore) else usable_cores()

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return before if before.by_key else before.closed()


COPY: Final = Map(copied, False, name="copy", flexible=True)
"""What is kept in memory is the cache's, and what a user's function gets is the user's."""


def with_copies(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """`stages`, and a copy behind each cache in memory whose samples reach somebody who may change them.

    The default collate only reads: it puts samples straight into the batch. Everybody else gets a copy.
    """
    found: list[Stage] = []
    for at, stage in enumerate(stages):
        found.append(stage)
        if isinstance(stage, Cache) and isinstance(stage.store, MemoryStore):
            following: Any = next((s for s in stages[at + 1 :] if not s.keeps_samples), None)
            collates = isinstance(following, Batch) and following.collate.fn is None
            if following is not COPY and not collates:
                found.append(COPY)
    return tuple(found)
