"""What is said of a pipeline as a whole: how it hands batches out."""

from dataclasses import replace
from typing import TYPE_CHECKING

from aioloader.core.checks import check_count, check_integer
from aioloader.core.typevars import T_co
from aioloader.insight.batch_info import BatchInfo
from aioloader.pipeline.described import Described
from aioloader.plan.admission import check_admission
from aioloader.plan.lengths import with_told_length

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Delivering"]


class Delivering(Described[T_co]):
    """How far ahead, how old, with which random numbers, with what beside them."""

    def prefetch(self, n: int) -> "Pipeline[T_co]":
        """Hold `n` finished batches ahead; default 2.

        0: each is collated when it is asked for. Samples are under way before that all the same, see `map`.
        """
        count = check_count("prefetch", n, least=0, hint="prefetch(0) makes no batch ahead")
        return self._of(replace(self._plan, prefetch=count))

    def max_staleness(self, batches: int) -> "Pipeline[T_co]":
        """Let the consumer decide when samples begin: none before the batch that is `batches` in front of its own.

        For training on what the newest policy made: a map generates with the weights of now, and what it begins too
        early would be stale. At most `(asked + batches) * batch_size` samples have been begun and neither handed out
        nor left out, where `asked` is the number of batches that the consumer is waiting for. What `filter`, `drop_if`,
        `drop_last` or an error leaves out makes room at once. With ordered maps, and batches that are full, no sample
        is more than `batches` batches old when its batch is given: `BatchInfo.ages` says how old each is. 0 is
        on-policy: samples begin when their batch is asked for.

        It is in no state: after a resume it counts from there. It comes after `batch`, and holds for all that is
        before; what waits for more samples than its batch, such as `shuffle(1000)`, must be before the first map.

        ```python
        loader = Pipeline(prompts).shuffle().repeat().map(rollout, concurrency=64).filter(has_variance).batch(8)
        async for batch in loader.max_staleness(1): ...
        ```

        Args:
            batches: At least 0.

        Raises:
            TypeError: Not an integer.
            ValueError: It is negative, there is no `batch` after the maps, or a stage between them cannot bear it.
        """
        count = check_count("max_staleness", batches, least=0, hint="max_staleness(0) begins samples when asked")
        plan = replace(self._plan, staleness=count)
        check_admission(plan)
        return self._of(plan)

    def with_seed(self, seed: int | None) -> "Pipeline[T_co]":
        """Let `sample_rng()` in this pipeline's functions depend on `seed`; None: draw one, and keep it in the state.

        With `shard` or `share`, None is 0, since all ranks need the same.

        It is not the seed of `shuffle` and `mix`, which have their own.
        """
        return self._of(replace(self._plan, seed=None if seed is None else check_integer("seed", seed)))

    def with_length(self, n: int) -> "Pipeline[T_co]":
        """Say how many batches (samples, without `batch`) an epoch has, for `len()`, where nobody can count them.

        Lightning and torchtnt read one batch ahead of a loader without a length, and a checkpoint of theirs loses that
        one. With it the state after batch `n` is the beginning of the next epoch. It changes nothing of what comes: an
        epoch that turns out to have another number of batches warns at its end; `take(n)` would end it. Stages after
        it count on from there, so `.with_length(1000).batch(10)` has 100.

        Args:
            n: At least 0. After `shard`, what this rank gets.

        Raises:
            TypeError: Not an integer.
            ValueError: It is negative, or the pipeline is known to give another number.
        """
        return self._of(with_told_length(self._plan, check_count("n", n, least=0)))

    def with_info(self) -> "Pipeline[tuple[T_co, BatchInfo]]":
        """Give pairs `(batch, info)`: a `BatchInfo` says which samples are in the batch. The last stage."""
        return self._of(replace(self._plan, gives_info=True))
