"""`share`: of some ranks on one host, one reads for all."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final

import torch

from aioloader.core.checks import check_count, check_positive
from aioloader.core.memory import Alloc
from aioloader.engine.borrowing_node import BorrowingNode
from aioloader.engine.fuse import FusedOps
from aioloader.engine.lending_node import LendingNode, ShareTerms
from aioloader.engine.meeting import job_name
from aioloader.executors.processes.lending import Lender
from aioloader.stages.base import Builder, Stage
from aioloader.stages.flow import Flow
from aioloader.stages.rank import check_group, check_mesh, current_rank

__all__ = ["Share"]

SAMPLES_AHEAD: Final = 32  # so that what is sent is never more than a socket holds
BATCHES_AHEAD: Final = 0  # of what the ranks have asked for

_numbers = count()  # all ranks make their pipelines in the same order, as they do with process groups


@dataclass(frozen=True)
class Share(Stage):
    """The first rank of a group on each host runs what is before this; the others get what it gives.

    Args:
        group: A process group, a mesh of one dimension or a pair of a mesh and a dimension, or ranks.
        timeout: See `Pipeline.share`.
        number: Which one of this program.
    """

    group: Any
    timeout: float = 600.0
    number: int = field(default_factory=lambda: next(_numbers), compare=False)

    exact_in_any_order = True
    keeps_samples = True
    only_reads = True
    same_each_epoch = True
    here_only = True
    for_several_ranks = True

    def __post_init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise ValueError(f"share needs Linux, whose processes can share memory page by page, got {sys.platform}")
        check_positive("timeout", self.timeout, "it is in seconds")
        if isinstance(self.group, Sequence) and not _is_pair(self.group):
            ranks = [check_count("each rank of the group", rank, least=0) for rank in self.group]
            if not ranks or len(set(ranks)) < len(ranks):
                raise ValueError(f"share takes the ranks of a group, each of them once, got {list(self.group)!r}")
        elif _is_group(self.group):
            check_group(self.group)
        else:
            _, dims = check_mesh(self.group)
            if len(dims) > 1:
                raise ValueError(f"share takes one dimension of a mesh, got {len(dims)}; pass for instance mesh['tp']")

    @property
    def label(self) -> str:
        return f"share({list(self.group)!r})" if isinstance(self.group, list | range) else "share(...)"

    def length(self, upstream: int) -> int:
        return upstream

    def shape(self) -> None:
        return None

    def flow(self, before: Flow) -> Flow:
        return replace(before.closed(), again="none")

    def ranks(self) -> tuple[int, tuple[int, ...]]:
        """The rank of this process, and those of the group that are on its host. Never a collective call.

        Raises:
            ValueError: This process is not in the group.
        """
        rank = current_rank()[0]
        ranks = _ranks_of(self.group)
        if rank not in ranks:
            raise ValueError(f"share takes a group that this process is in, got ranks {list(ranks)} in rank {rank}")
        local_rank, local_size = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
        if local_rank is not None and local_size is not None:  # of torchrun: ranks of one host follow each other
            first = rank - int(local_rank)
            ranks = tuple(one for one in ranks if first <= one < first + int(local_size))
        return rank, ranks

    def memory(self) -> Alloc | None:
        rank, ranks = self.ranks()
        return Lender() if len(ranks) > 1 and rank == ranks[0] else None

    def build(self, builder: Builder) -> None:
        batches = builder.fused.batches
        made = batches and builder.fused.ops  # else they are ahead before this already
        node = builder.close(room=max(1, builder.prefetch - 1) if made else None)
        rank, ranks = self.ranks()
        terms = ShareTerms(
            self.label,
            (*job_name(), self.number),
            builder.described,
            ranks,
            rank,
            BATCHES_AHEAD if batches else SAMPLES_AHEAD,
            batches,
            self.timeout,
        )
        if len(ranks) > 1:
            lender = builder.alloc if isinstance(builder.alloc, Lender) else Lender()
            builder.node = LendingNode(node, terms, lender) if rank == ranks[0] else BorrowingNode(node, terms)
        builder.fused = FusedOps(batches)


def _is_pair(group: Any) -> bool:
    """Whether it is a mesh and a dimension."""
    return isinstance(group, tuple) and len(group) == 2 and not isinstance(group[0], int)


def _is_group(group: Any) -> bool:
    distributed = torch.distributed
    return distributed.is_available() and isinstance(group, distributed.ProcessGroup)


def _ranks_of(group: Any) -> tuple[int, ...]:
    if _is_group(group):
        return tuple(sorted(torch.distributed.get_process_group_ranks(group)))
    if isinstance(group, Sequence) and not _is_pair(group):
        return tuple(sorted(group))
    mesh, dims = check_mesh(group)
    return tuple(sorted(torch.distributed.get_process_group_ranks(mesh.get_group(dims[0]))))
