"""A loader as far as its plan says: what runs in an epoch, and what that depends on."""

from functools import cached_property
from secrets import randbits
from typing import Any, Final
from weakref import finalize

from aioloader.core.cursors import as_count
from aioloader.core.generator_states import check_draws, check_generators, unpacked
from aioloader.core.memory import Alloc
from aioloader.core.safe_text import safe_repr
from aioloader.core.typevars import T_co
from aioloader.device import Transfer, Transferred
from aioloader.engine.delivery import Receive
from aioloader.engine.progress import Progress
from aioloader.engine.watched import Watched
from aioloader.engine.window import Window
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.memory.pool import BatchMemory
from aioloader.plan.build import build
from aioloader.plan.parts import generators_in, global_draws
from aioloader.plan.plan import Plan, flow_of, forgets_numbers
from aioloader.plan.ranks import check_shard_state, is_sharded, is_shared
from aioloader.sources.sampled import Sampled
from aioloader.sources.sampler_order import draws_of
from aioloader.stages.base import Pass
from aioloader.stages.flow import Guarantee
from aioloader.stages.rank import has_process_group

__all__ = ["Planned"]

_RANDOM: Final = frozenset(
    {"base_seed", "drawn", "draws_once", "epochs", "generators", "next", "sample_seed", "set_epoch", "weights"}
)


class Planned(Watched[T_co]):
    """A loader that runs its plan.

    Attributes:
        _plan: What it is made of. Everything that is said of a loader without running it is read from there.
        _sampled: What a `DataLoader` reads, of its plan; None: each source and sampler of the plan is for itself.
    """

    _plan: Plan
    _sampled: Sampled | None = None

    def __init__(self) -> None:
        super().__init__()
        self._transfer: Transfer | None = None
        self._memory: BatchMemory | None = None
        self._processes: WorkerThread | None = None
        self._random_seed: int | None = None
        self._begun_plan: Plan | None = None  # with the ranks of the newest epoch, if torch.distributed told them

    @property
    def _plan_of_state(self) -> Plan:
        """When the process group has been destroyed, what was read until then is of the ranks that it told."""
        return self._plan if self._begun_plan is None or has_process_group() else self._begun_plan

    def _plan_of_epoch(self, *, pins: bool) -> Plan:
        """The plan as one epoch runs it, where there is page-locked memory or (`pins=False`) not."""
        return self._plan

    # -- what runs ---------------------------------------------------------------------------------------------------

    def _build(self, progress: Progress) -> Window:
        """The nodes of one epoch, not started, and all that they need."""
        return self._nodes(progress, self._opened_transfer())

    def _nodes(self, progress: Progress, transfer: Transfer | None = None) -> Window:
        """The same, only to see whether a cursor fits: nothing is opened, drawn or used up."""
        alloc = self._alloc(transfer)
        plan = self._plan_of_epoch(pins=transfer is not None)
        draws = draws_of(progress, sole=global_draws(plan) == 1)
        this_pass = self._pass(progress)
        return build(plan, this_pass, transfer, alloc, self._open_processes, draws=draws, mixes=progress.mixes)

    def _pass(self, progress: Progress) -> Pass:
        return Pass(progress.epoch, sample_seed=self._sample_seed())

    def _opened_transfer(self) -> Transfer | None:
        """Opened once; it is kept from one epoch to the next."""
        if self._transfer is None:
            self._transfer = self._open_transfer()
        return self._transfer

    def _open_transfer(self) -> Transfer | None:
        """The way to the plan's device, or to its page-locked memory."""
        for stage in reversed(self._plan.stages):
            if stage.on_device:
                return stage.open_transfer()
        return None

    def _receiver(self) -> Receive | None:
        transfer = self._transfer
        if transfer is None:
            return None
        # It stays the iterator's own: `close` may take it from the loader while a `next()` is under way.
        return lambda batch: transfer.receive(batch) if isinstance(batch, Transferred) else batch

    def _alloc(self, transfer: Transfer | None) -> Alloc:
        """Where the default collate puts batches: page-locked memory for a device that can use it, else our own."""
        if transfer is not None and transfer.backend.pins:
            return transfer.backend.alloc_pinned
        with self._lock:
            if self._memory is None:
                self._memory = BatchMemory()
            return self._memory.alloc

    def _open_processes(self) -> WorkerThread:
        """Where worker processes come from; kept between epochs, with those that are to be kept."""
        with self._lock:
            if self._processes is None:
                self._processes = WorkerThread()
                finalize(self, self._processes.close).atexit = False  # the exit hook of `loop_thread` also waits
            return self._processes

    # -- what a state says -------------------------------------------------------------------------------------------

    @property
    def _guarantee(self) -> Guarantee:
        """What a resume gives."""
        return flow_of(self._plan).guarantee

    @property
    def _guarantee_without_a_source(self) -> Guarantee:
        """The same after one of several sources has failed in this epoch."""
        flow = flow_of(self._plan)
        return (flow.at_least("at-least-once") if forgets_numbers(self._plan) else flow).guarantee

    def _check_ranks(self, ranks: dict[str, Any] | None, begun: bool) -> None:
        """Refuse what a state says of ranks, if this one cannot go on from it.

        Args:
            ranks: What it says.
            begun: It is in the middle of an epoch.

        Raises:
            StateError: Why.
        """
        check_shard_state(self._plan, ranks, begun=begun)

    # -- what is drawn -----------------------------------------------------------------------------------------------

    @property
    def _seed(self) -> int | None:
        """Of `sample_rng`; None: to be drawn.

        With `shard` it is 0 unless told: ranks cannot agree on a drawn one without talking, and with one each, a
        sample would get other random numbers on another rank.
        """
        plan = self._plan
        if plan.seed is not None or self._sampled is not None:
            return plan.seed
        return 0 if self._for_ranks else None

    @cached_property
    def _for_ranks(self) -> bool:
        """Whether its samples are dealt to ranks, or shared by several; asked often."""
        return is_sharded(self._plan) or is_shared(self._plan)

    def _sample_seed(self) -> int:
        """For the random numbers of samples: the user's seed, else one that is drawn once for this loader."""
        seed = self._seed
        return self._drawn_seed() if seed is None else seed

    def _drawn_seed(self) -> int:
        with self._lock:
            if self._random_seed is None:
                self._random_seed = randbits(63)  # not from torch's generator, whose draws are the user's
            return self._random_seed

    def _random_state(self) -> dict[str, Any]:
        """What else the next epoch depends on that is random, or was told to samplers; JSON-able."""
        state = {} if self._seed is not None else {"sample_seed": self._drawn_seed()}
        return state if self._sampled is None else state | self._sampled.sampling.state()

    def _check_random_state(self, state: dict[str, Any], *, begun: bool) -> None:
        """Refuse what `_set_random_state` could not take, or what is not enough.

        Args:
            state: What `_random_state` and `_order_source` gave.
            begun: It is that of an epoch that has begun.

        Raises:
            ValueError: Why.
        """
        if unknown := state.keys() - _RANDOM:
            raise ValueError(f"it holds {safe_repr(min(unknown))}, which is nothing that is drawn from")
        check_generators(state.get("generators", []), generators_in(self._plan))
        if global_draws(self._plan):
            check_draws(state)
        if "sample_seed" in state:
            as_count(state["sample_seed"])
        if self._sampled is not None:
            self._sampled.check_state(state, begun=begun)

    def _set_random_state(self, state: dict[str, Any]) -> None:
        """Draw from what `state` tells of, once `_check_random_state` has let it pass."""
        self._random_seed = state.get("sample_seed", self._random_seed)
        for generator, its in zip(generators_in(self._plan), state.get("generators", ()), strict=False):
            generator.set_state(unpacked(its))
        if self._sampled is not None:
            self._sampled.sampling.set_state(state)
