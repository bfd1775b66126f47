"""What the parts of `Pipeline` share: the plan, and all that follows from it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from aioloader.core.typevars import T_co
from aioloader.engine.progress import Progress
from aioloader.engine.resumable import is_stateful
from aioloader.loader import Loader
from aioloader.plan.admission import check_admission
from aioloader.plan.agreeing import agreeing_group
from aioloader.plan.by_file import cost_of_samples, uneven_files
from aioloader.plan.lengths import batch_size_of
from aioloader.plan.parts import (
    datasets_of,
    samplers_of,
    streams_of,
    with_streams,
)
from aioloader.plan.plan import Plan, length_of, may_tune, without_reports
from aioloader.plan.shown import shown
from aioloader.plan.uneven import uneven_stage
from aioloader.plan.unsplit import warn_of_cost, warn_of_length, warn_of_uneven
from aioloader.sources.sampler_order import detached_copies
from aioloader.stages.base import Stage

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline
from aioloader.stages.device import To

__all__ = ["Described"]


class Described(Loader[T_co]):
    """A loader that runs what its plan says."""

    @classmethod
    def _of(cls, plan: Plan) -> "Pipeline[Any]":
        pipeline: Any = cls.__new__(cls)
        pipeline._begin_with(plan)
        made: Pipeline[Any] = pipeline
        return made

    def _begin_with(self, plan: Plan) -> None:
        """What a constructor does once the plan is known."""
        Loader.__init__(self)
        self._plan = plan

    def _then(self, stage: Stage) -> "Pipeline[Any]":
        """This pipeline and one more stage."""
        if self._plan.gives_info:
            raise ValueError(f"with_info() must be the last stage, got {stage.label} after it")
        if self._plan.stages and self._plan.stages[-1].must_be_last:
            last = self._plan.stages[-1]
            raise ValueError(f"{last.label} must be the last stage, got {stage.label} after it; put it before .to()")
        plan = replace(self._plan, stages=(*self._plan.stages, stage))
        check_admission(plan)
        return self._of(plan)

    def _agreeing(self) -> Any:
        return None if self._alone else agreeing_group(self._plan)

    def _tell_of_ranks(self, world_size: int) -> None:
        if cost := cost_of_samples(self._plan, lambda shard: not shard.by_numbers):
            warn_of_cost(cost)
        if world_size and self._agreeing() is None and (why := uneven_files(self._plan) or uneven_stage(self._plan)):
            warn_of_uneven(why)

    def __len__(self) -> int:
        """Batches (samples, without `batch`) per epoch.

        Raises:
            TypeError: That is known only when it has run.
        """
        return length_of(self._plan)

    @property
    def batch_size(self) -> int | None:
        """Samples in a batch, a short last one aside, on this rank; None: not batched, or of no fixed number."""
        return batch_size_of(self._plan)

    @property
    def device(self) -> Any:
        """What `to` was told; None: batches stay where they are made."""
        return next((stage.device for stage in self._plan.stages if isinstance(stage, To)), None)

    def __bool__(self) -> bool:
        return True  # `if loader:` does not ask for the length

    @property
    def _gives_info(self) -> bool:  # type: ignore[override]  # a plain attribute where nobody asks for it
        return self._plan.gives_info

    def __repr__(self) -> str:
        return shown(self._plan)

    def _check_usable(self) -> None:
        self._agreeing()
        for stream in streams_of(self._plan):
            if stream.single_use:
                stream.check_unused()

    def _nothing_to_tune(self) -> str | None:
        return None if may_tune(self._plan) else "this pipeline has none; add map, filter or batch"

    def _ended(self, progress: Progress) -> None:
        if self._plan.told_length is not None and progress.length is not None and progress.length != progress.batches:
            warn_of_length(self, progress.length, progress.batches)
            progress.length = None  # said once

    def _detached(self) -> Self:
        again = super()._detached()
        samplers = set(map(id, samplers_of(self._plan)))
        moving = [
            stream.make
            for stream in streams_of(self._plan)
            if not stream.call and (id(stream.make) in samplers or is_stateful(stream.make))
        ]
        copies = detached_copies(moving, shared=datasets_of(self._plan))
        again._plan = with_streams(without_reports(self._plan), dict(zip(map(id, moving), copies, strict=True)))
        return again
