"""A loader that is what the arguments of torch's `DataLoader` mean: its attributes, the plan of an epoch, its nodes."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from inspect import getattr_static
from typing import Any, Final, Self

import torch

from aioloader.core.policies import Policies
from aioloader.core.skip import Skip
from aioloader.core.typevars import T_co
from aioloader.device import Transfer, open_transfer, why_not_pinned
from aioloader.drop_in.arguments import Arguments, WorkerType
from aioloader.drop_in.inline import inline_nodes
from aioloader.drop_in.plan import plan_of
from aioloader.engine.delivery import InlineDelivery
from aioloader.engine.sync_delivery import SyncDelivery
from aioloader.loader import Loader
from aioloader.plan.parts import sampled_of
from aioloader.plan.plan import Plan
from aioloader.sources.epoch_sampling import EpochSampling
from aioloader.sources.sampled import Sampled
from aioloader.torch_shims import AsyncStandIn, BatchSamplerView

__all__ = ["DropInLoader"]


_NOTHING: Final = object()


class _Argument:
    """An argument of the loader as an attribute of it.

    Args:
        fixed: It says which samples come when, and cannot be set.
        before: What a subclass has under this name, to be read until the loader has its arguments, as in torch.
    """

    def __init__(self, *, fixed: bool, before: Any = _NOTHING) -> None:
        self._fixed = fixed
        self._before = before

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, loader: "DropInLoader[Any] | None", kind: type) -> Any:
        arguments = None if loader is None else loader.__dict__.get("_arguments")
        if arguments is not None and self._name != "sampler":
            return getattr(arguments, self._name)
        if arguments is None and self._before is not _NOTHING:
            return self._before.__get__(loader, kind) if hasattr(self._before, "__get__") else self._before
        if loader is None:
            return self
        raise AttributeError(self._without(kind))

    def __set__(self, loader: "DropInLoader[Any]", value: Any) -> None:
        name = self._name
        if self._fixed:
            raise ValueError(f"{name} attribute should not be set after DataLoader is initialized; make a new one")
        loader._is_made_of(loader._arguments.changed(name, value), loader._sampling)

    def __delete__(self, loader: "DropInLoader[Any]") -> None:
        raise AttributeError(f"{self._name} is an argument of the DataLoader, which stays; set another value")

    def over(self, before: Any) -> "_Argument":
        """The same for a subclass that has `before` under its name."""
        return _Argument(fixed=self._fixed, before=before)

    def _without(self, kind: type) -> str:
        if self._name != "sampler":
            return f"{kind.__name__!r} object has no attribute {self._name!r}"
        return (
            "DataLoader shows no attribute 'sampler', since trainers replace what they find there; "
            "call loader.set_epoch(epoch), which reaches your sampler"
        )


def _argument(*, fixed: bool = False) -> Any:
    return _Argument(fixed=fixed)


class DropInLoader(Loader[T_co]):
    """`DataLoader` but for its constructor.

    It shows each argument as an attribute. Those that say which samples come when are fixed; another value for one of
    the others counts from the next epoch on, since it makes another plan.
    """

    _knob = "num_workers"
    _kind = "DataLoader"
    _arguments: Arguments
    _sampling: EpochSampling
    _order: str
    """What decides the order, as in a call."""

    # The attributes of torch's that programs read. Not `_iterator`, and `sampler` is not there: trainers act on these.
    dataset: Any = _argument(fixed=True)
    batch_size: int | None = _argument(fixed=True)
    sampler: Any = _argument(fixed=True)
    drop_last: bool = _argument(fixed=True)
    num_workers: int = _argument()
    collate_fn: Callable[[list[Any]], Any] | None = _argument()
    pin_memory: bool = _argument()
    timeout: float = _argument()
    worker_init_fn: Callable[[int], None] | None = _argument()
    multiprocessing_context: Any = _argument()
    prefetch_factor: int | None = _argument()
    persistent_workers: bool = _argument(fixed=True)
    pin_memory_device: str = _argument()
    in_order: bool = _argument()

    # And our own.
    device: Any = _argument()
    concurrency: int = _argument()
    ahead: int | None = _argument()
    ahead_bytes: int | None = _argument()
    worker_type: WorkerType = _argument()
    skip_errors: Skip | None = _argument()
    policies: Policies | None = _argument()
    shard: bool = _argument(fixed=True)

    def __init_subclass__(cls, **options: Any) -> None:
        """What a subclass, or a class before it, has under the name of an argument hides neither that nor its setting.

        But a property of theirs, or whatever else sees what is set itself.
        """
        super().__init_subclass__(**options)
        for name, argument in vars(DropInLoader).items():
            if isinstance(argument, _Argument):
                here = getattr_static(cls, name)
                if not isinstance(here, _Argument) and not hasattr(type(here), "__set__"):
                    again = argument.over(here)
                    again.__set_name__(cls, name)
                    setattr(cls, name, again)

    def _is_made_of(self, arguments: Arguments, sampling: EpochSampling) -> None:
        plan = plan_of(arguments, sampling)  # now, and not while somebody waits for the first batch
        self._arguments, self._sampling, self._plan = arguments, sampling, plan
        self.__dict__.pop("_sampled", None)

    # Of a loader that was unpickled they are made when they are needed: its dataset may not be whole before.

    @cached_property
    def _plan(self) -> Plan:  # type: ignore[override]  # a plain attribute where it cannot change
        return plan_of(self._arguments, self._sampling)

    @cached_property
    def _sampled(self) -> Sampled:  # type: ignore[override]  # likewise
        data = sampled_of(self._plan)
        assert data is not None, "the plan of a DataLoader"
        return data

    @property
    def generator(self) -> torch.Generator | None:
        """See torch."""
        return self._sampling.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self._sampling.generator = generator
        self._fixed = None

    @property
    def seed(self) -> int | None:
        """With it the order depends on the seed and the epoch alone."""
        return self._sampling.seed

    @property
    def batch_sampler(self) -> BatchSamplerView:
        """A view of the batch sampler, for trainers: `batch_sampler.sampler.set_epoch(n)` reaches the loader."""
        return BatchSamplerView(self._arguments.torch_loader.batch_sampler, self.__len__, self.set_epoch)

    @batch_sampler.setter
    def batch_sampler(self, _: Any) -> None:
        raise ValueError("batch_sampler attribute should not be set after DataLoader is initialized; make a new one")

    def __len__(self) -> int:
        """Batches per epoch.

        Raises:
            TypeError: The dataset has no length.
        """
        return len(self._arguments.torch_loader)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        """With what decides the order: somebody who forgot `shuffle` sees it here."""
        parts = [type(self.dataset).__name__, f"batch_size={self.batch_size}"]
        parts += [self._order] if self._order else []
        parts += [f"num_workers={self.num_workers}"]
        parts += [] if self.seed is None else [f"seed={self.seed}"]
        return f"DataLoader({', '.join(parts)})"

    # -- iteration ---------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self.timeout and self.num_workers == 0:
            # The type that torch's iterator raises.
            raise AssertionError(f"timeout needs num_workers > 0, got timeout={self.timeout} with num_workers=0")
        if self.pin_memory and self.device is None and (reason := why_not_pinned()) is not None:
            warnings.warn(
                f"'pin_memory' argument is set as true but {reason}, then device pinned memory won't be used.",
                stacklevel=3,
            )

    def set_epoch(self, epoch: int) -> None:
        """Let the next epoch be number `epoch`, and tell the samplers and the dataset that have a `set_epoch`."""
        super().set_epoch(epoch)
        self._sampling.set_epoch(epoch)

    def _plan_of_epoch(self, *, pins: bool) -> Plan:
        if pins or self._arguments.in_processes or self._arguments.awaited:  # then it has the dataset's own methods
            return plan_of(self._arguments, self._sampling, pins=pins)
        return self._plan

    def _open_delivery(self) -> SyncDelivery | InlineDelivery:
        if not self._arguments.inline:
            return super()._open_delivery()
        with self._beginning() as progress:
            transfer = self._opened_transfer()
            this_pass, alloc = self._pass(progress), self._alloc(transfer)
            node, meters = inline_nodes(self._arguments, self._sampled, progress, this_pass, transfer, alloc)
        self._watch(progress, meters)
        return InlineDelivery(node, progress, self._receiver())

    def _open_transfer(self) -> Transfer | None:
        return open_transfer(self.device) if self.device is not None or self.pin_memory else None

    def _nothing_to_tune(self) -> str | None:
        if self._arguments.in_processes:
            return "here worker processes load the samples; measure other num_workers epoch by epoch"
        if not (self.num_workers or self._arguments.awaited):
            return "num_workers=0 loads them in your own thread; pass num_workers=2 or more"
        return None

    @property
    def _bounded(self) -> bool:
        return self.ahead is not None or self.ahead_bytes is not None

    @property
    def _split_by(self) -> str:  # type: ignore[override]  # a plain attribute where it is always the same
        if self._arguments.iterable:
            return "use Pipeline(dataset).shard(), whose map and batch do the rest"
        return "pass sampler=DistributedSampler(dataset), or shard=True, which deals the same keys"

    def _detached(self) -> Self:
        again = super()._detached()
        sampling, skip = self._sampling.detached(), self.skip_errors
        if skip is not None:
            skip = replace(skip, report=None)  # it is written down already
        copied = sampling.dataset.dataset if isinstance(sampling.dataset, AsyncStandIn) else sampling.dataset
        again._is_made_of(replace(self._arguments, dataset=copied, skip_errors=skip), sampling)
        return again

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_plan", "_sampled")}
