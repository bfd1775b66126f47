"""The stages for several ranks."""

from typing import TYPE_CHECKING, Any

from aioloader.core.typevars import T_co
from aioloader.pipeline.described import Described
from aioloader.plan.agreeing import check_agreeing
from aioloader.plan.by_file import check_by_file, cost_of_samples
from aioloader.plan.ranks import check_one_order
from aioloader.plan.unsplit import warn_of_cost
from aioloader.stages.rank import Even
from aioloader.stages.shard import By, Shard
from aioloader.stages.share import Share

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Sharding"]


class Sharding(Described[T_co]):
    """Each gets its part, or several the same."""

    def shard(
        self,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        group: Any = None,
        mesh: Any = None,
        even: Even | None = None,
        by: By = "sample",
    ) -> "Pipeline[T_co]":
        """Give this rank's part: every `world_size`-th sample, or file, the same number of samples on every rank.

        Without arguments, rank and world size are those of torch.distributed when it is initialised, else of the
        environment's RANK and WORLD_SIZE, else there is one rank. They are looked up when iteration begins; nothing
        here communicates, but for `even="agree"`.

        Args:
            rank: In [0, world_size).
            world_size: How many ranks there are.
            group: A torch.distributed.ProcessGroup instead: the ranks are those in it.
            mesh: A DeviceMesh of one dimension instead, such as `mesh["dp"]`, or a pair `(mesh, "dp")`: the ranks are
                those along it, and all that differ in other dimensions only, as in tensor parallelism, get the same.
            even: When the last round has fewer samples than there are ranks: `"pad"`, the default, fills it from the
                beginning, as torch's DistributedSampler does, `"drop"` leaves it out, `"error"` raises: at the start
                when the length is known, else at the end. By files, these three need a source that has counted its
                samples (ParquetRows): a rank with fewer reads its own files again, or all end after as many as the
                shortest has. Without a count the default is to give what is in the rank's files. `"keep"`: each rank
                gives what it has, for training that can handle it, as with torch's Join. `"agree"`: likewise, but
                before a batch is handed out, all ranks have agreed that each of them has one, and all end together,
                for what cannot be counted, such as a filter or packing after this. Inside `next()` ranks then ask each
                other on `group`, which is of gloo; so all ranks iterate alike, and break at the same step. Where one
                fails, the others raise `RankError` at the same batch.
            by: `"file"`: deal the files of `TarShards`, `Lines` or `ParquetRows`, every `world_size`-th in the order of
                the epoch, so that a rank opens its own alone. It comes right after the source, or maps. A state is then
                that of one rank, of as many. `"sample"`: every rank reads all files, and a `ReadAllWarning` says so.

        Raises:
            TypeError, ValueError: The arguments do not fit, or the samples before come in no order that all ranks
                would see alike; or there are no files to deal, or `even` needs a count that nobody has.
        """
        if any(stage.for_several_ranks for stage in self._plan.stages):
            raise ValueError("shard() comes before share(), which gives several ranks the same, got it after that")
        if any(stage.parts for stage in self._plan.stages):
            raise ValueError(
                f"shard() comes before in_ray(), which deals each rank's own samples into parts, got it after that in "
                f"{self!r}"
            )
        shard = Shard(rank, world_size, group, mesh, "pad" if even is None else even, by)
        if by != "sample":
            shard = check_by_file(self._plan, shard, even)
        if even == "agree":
            check_agreeing(shard)
        if shard.by == "sample":
            check_one_order(self._plan)
        pipeline = self._then(shard)
        if cost := cost_of_samples(pipeline._plan, lambda stage: stage is shard and shard.by_numbers):
            warn_of_cost(cost)
        return pipeline

    def share(self, group: Any, *, timeout: float = 600.0) -> "Pipeline[T_co]":
        """Let one of several ranks on a host read for all of them, which are to get the same.

        For tensor parallelism and the like: `.share(mesh["tp"])`. On each host the first rank of the group runs what is
        before this; the others get what it gives, in shared memory, in the same order and with the same state. A batch
        is there once for all, and copied page by page for who changes it. It pays where reading or making a batch is
        dear; for a cheap one it changes nothing. It uses no collective call, and no process group for data.

        All ranks make the loader in the same place of the program, and iterate it in the same epochs, as often. The
        first batch comes when all have asked for it. A rank that ends early is not waited for any more; if the one that
        reads ends or dies, the others get a `WorkerDiedError` after what it had given.

        Args:
            group: A torch.distributed.ProcessGroup, a DeviceMesh of one dimension or a pair `(mesh, "tp")`, or the
                global ranks as a list. Which of them are on this host is found by torchrun's LOCAL_RANK and
                LOCAL_WORLD_SIZE; without these, all are.
            timeout: In seconds; so long the ranks wait for each other when an epoch begins.

        Raises:
            TypeError, ValueError: The group is none, or this does not run on Linux, or something before or after this
                does not fit.
        """
        for stage in self._plan.stages:
            if stage.on_device or stage.for_several_ranks:
                raise ValueError(f"share() lends batches in host memory, once, got it after {stage.label}")
        return self._then(Share(group, timeout))
