"""`skip_errors`: samples that failed are left out, counted and reported."""

from dataclasses import dataclass, replace
from typing import Any, Self

from aioloader.core.skip import Skip
from aioloader.engine.fuse import FusedOps
from aioloader.engine.node import Fold
from aioloader.engine.skipping import SkipNode, SkipRule, SkipSamplesRule
from aioloader.engine.window import Window
from aioloader.stages.base import Builder, FoldStage, Pass, UnknownLengthError
from aioloader.stages.flow import Flow, Shared
from aioloader.stages.rank import current_rank

__all__ = ["SkipErrors", "SkipInBatches"]


@dataclass(frozen=True)
class SkipErrors(FoldStage):
    """Leaves out the errors of all stages before it, and of single samples of the source.

    A source that fails for good, or one of several, is no sample: its error passes. What is left out depends on what
    failed in this run, so no other rank can be sure to see the same order, and `shard` must come before.

    A cache after it keeps nothing from the first error on: samples would have other numbers in an epoch without it.

    Cursor: see `SkipRule`. Limits are not compared by a state, so that they may be raised for a resume.

    Args:
        skip: Which errors, and how many.
        rank: Of this process, for the report; None: there is only one, or it is not known yet.
    """

    skip: Skip
    rank: int | None = None

    exact_in_any_order = True
    passes = True
    keeps_samples = True
    same_each_epoch = True
    part_by_part = True
    evenness = "kept"  # what is left out should not happen

    @property
    def label(self) -> str:
        return self.skip.label

    @property
    def cache_label(self) -> str:
        return "skip_errors()"

    def length(self, upstream: int) -> int:
        raise UnknownLengthError(f"{self.label} gives as many samples as do not fail")

    def shape(self) -> dict[str, Any]:
        return {"stage": "skip_errors"}

    def flow(self, before: Flow) -> Flow:
        after = before.limited(Shared.SAME_RANK, self.label).closed()
        return replace(after, rank_order=after.rank_order or self.label)

    def with_ranks(self) -> Self:
        return self if self.skip.report is None else replace(self, rank=_rank_for_report(self.rank))

    def without_report(self) -> "SkipErrors":
        return replace(self, skip=replace(self.skip, report=None))

    def fold(self, this_pass: Pass) -> Fold:
        return self.rule(this_pass)

    def rule(self, this_pass: Pass) -> SkipRule:
        """What leaves them out in one pass."""
        return SkipRule(self.skip, this_pass.epoch, self.rank)

    def build(self, builder: Builder) -> None:
        """The last act of the window before it, or a node where there is none."""
        fused, rule = builder.fused, self.rule(builder.this_pass)
        first = fused.first and not fused.ops
        node = builder.close(room=builder.prefetch if fused.batches and fused.ops else None)
        if fused.ops and isinstance(node, Window):
            node.rule = rule
        else:
            builder.node = SkipNode(node, rule)
        builder.fused = FusedOps(batches=fused.batches, first=first, checks=fused.checks)


@dataclass(frozen=True)
class SkipInBatches(SkipErrors):
    """The same at the end of a `DataLoader`, whose workers load batches: of these too, what failed is left out.

    Args:
        batched: They load batches; else samples.
        batch_size: Samples in all batches but the last; None: the sampler decides.
    """

    batched: bool = True
    batch_size: int | None = None

    def rule(self, this_pass: Pass) -> SkipRule:
        if not self.batched:
            return super().rule(this_pass)
        return SkipSamplesRule(self.skip, this_pass.epoch, self.rank, batch_size=self.batch_size)

    def build(self, builder: Builder) -> None:
        """The last act of the last window."""
        builder.rule = self.rule(builder.this_pass)


def _rank_for_report(rank: int | None = None) -> int | None:
    """`rank`, or that of this process where there are several."""
    if rank is not None:
        return rank
    try:
        now, world_size = current_rank()
    except ValueError:  # `shard` says what is wrong with the environment
        return None
    return now if world_size > 1 else None
