"""What the parts of `Pipeline` share: the plan, and all that follows from it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from torch import Generator

from aioloader.core.memory import Alloc
from aioloader.core.typevars import T_co
from aioloader.device import Transfer
from aioloader.engine.faces import Batches
from aioloader.engine.progress import Progress
from aioloader.engine.resumable import is_stateful
from aioloader.engine.window import Window
from aioloader.loader import Loader
from aioloader.plan.admission import check_admission
from aioloader.plan.agreeing import agreeing_group
from aioloader.plan.build import build
from aioloader.plan.by_file import cost_of_samples, uneven_files
from aioloader.plan.lengths import batch_size_of, sure_length
from aioloader.plan.parts import (
    datasets_of,
    drawing_samplers_of,
    samplers_of,
    streams_of,
    with_streams,
)
from aioloader.plan.plan import Plan, flow_of, forgets_numbers, length_of, may_tune, without_reports
from aioloader.plan.ranks import check_shard_state, is_sharded, is_shared, shard_state
from aioloader.plan.shown import shown
from aioloader.plan.state import Shape, shape_of
from aioloader.plan.uneven import uneven_stage
from aioloader.plan.unsplit import gives_all, warn_of_cost, warn_of_length, warn_of_uneven
from aioloader.sources.resolve import warn_of_live
from aioloader.sources.sampler_order import detached_copies, draws_globally, draws_of, generators_of
from aioloader.stages.base import Pass, Stage
from aioloader.stages.flow import Guarantee

if TYPE_CHECKING:
    from aioloader.pipeline.pipeline import Pipeline
from aioloader.stages.device import To

__all__ = ["Described"]


class Described(Loader[T_co]):
    """A loader that runs what its plan says."""

    _plan: Plan

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
        return agreeing_group(self._plan) if self._agrees else None

    def _gives_all(self) -> bool:
        return gives_all(self._plan)

    def _tell_of_ranks(self, world_size: int) -> None:
        if cost := cost_of_samples(self._plan, lambda shard: not shard.said):
            warn_of_cost(cost)
        if world_size and self._agreeing() is None and (why := uneven_files(self._plan) or uneven_stage(self._plan)):
            warn_of_uneven(why)

    @property
    def _seed(self) -> int | None:
        """Of `sample_rng`; None: to be drawn.

        With `shard` it is 0 unless told: ranks cannot agree on a drawn one without talking, and with one each, a
        sample would get other random numbers on another rank.
        """
        of_several = is_sharded(self._plan) or is_shared(self._plan)
        return 0 if self._plan.seed is None and of_several else self._plan.seed

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

    def __iter__(self) -> Batches[T_co]:
        """An iterator for `for`: the loader runs on an event loop in a thread of its own."""
        warn_of_live(self, *(stream.make for stream in streams_of(self._plan)))
        return super().__iter__()

    def _check_usable(self) -> None:
        self._agreeing()
        for stream in streams_of(self._plan):
            if stream.single_use:
                stream.check_unused()

    def _build(self, progress: Progress) -> Window:
        if self._transfer is None:
            self._transfer = _open_transfer(self._plan)
        return self._nodes(progress, self._transfer, self._alloc(self._transfer))

    def _nodes(self, progress: Progress, transfer: Transfer | None = None, alloc: Alloc | None = None) -> Window:
        this_pass = Pass(progress.epoch, sample_seed=self._sample_seed(self._seed))
        draws = draws_of(progress, sole=self._draws_alone)
        return build(self._plan, this_pass, transfer, alloc, self._open_processes, draws=draws, mixes=progress.mixes)

    def _nothing_to_tune(self) -> str | None:
        return None if may_tune(self._plan) else "this pipeline has none; add map, filter or batch"

    # -- state -------------------------------------------------------------------------------------------------------

    def _shape(self) -> Shape:
        return shape_of(self._plan)

    def _ranks(self) -> dict[str, Any] | None:
        return shard_state(self._plan)

    def _check_ranks(self, ranks: dict[str, Any] | None, begun: bool) -> None:
        check_shard_state(self._plan, ranks, begun=begun)

    def _guarantee_without_a_source(self) -> Guarantee:
        flow = flow_of(self._plan)
        return (flow.at_least("at-least-once") if forgets_numbers(self._plan) else flow).guarantee

    def _guarantee(self) -> Guarantee:
        return flow_of(self._plan).guarantee

    def _never_again(self) -> str | None:
        why = super()._never_again()
        flow = flow_of(self._plan)
        if why is None and flow.completion_order:
            why = "samples come in another order each time"
        if why is None and flow.timed:
            why = "which samples a batch holds depends on time"
        return why

    def _sure_length(self, *, resumed: bool) -> int | None:
        return sure_length(self._plan, resumed=resumed)

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

    def _generators(self) -> list[Generator]:
        return generators_of(*(stream.make for stream in streams_of(self._plan)))

    def _draws_globally(self) -> bool:
        return any(map(draws_globally, drawing_samplers_of(self._plan)))

    @property
    def _draws_alone(self) -> bool:
        """One sampler draws from torch's global generator, and no other one."""
        return sum(map(draws_globally, drawing_samplers_of(self._plan))) == 1


def _open_transfer(plan: Plan) -> Transfer | None:
    """The way to the plan's device, or to its page-locked memory."""
    for stage in reversed(plan.stages):
        if stage.on_device:
            return stage.open_transfer()
    return None
