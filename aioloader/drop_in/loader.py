"""A loader that is what the arguments of torch's `DataLoader` mean: its attributes, the plan of an epoch, its nodes."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from inspect import getattr_static
from typing import Any, Final, Self

import torch

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


class _Argument:
    """An argument of the loader as an attribute: in the instance, as in torch's loader, and setting it is noticed.

    Otherwise it is as if the class had nothing under this name: what a class after it has is found. This is no
    `__setattr__`, which would cost every attribute of a loader half a microsecond.

    Args:
        fixed: It says which samples come when, and cannot be set.
        ours: A loader of torch's has none of this name.
    """

    def __init__(self, *, fixed: bool, ours: bool) -> None:
        self.fixed = fixed
        self.ours = ours

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, loader: "DropInLoader[Any] | None", kind: type) -> Any:
        if loader is not None and self._name in loader.__dict__:
            return loader.__dict__[self._name]
        for after in kind.__mro__[kind.__mro__.index(DropInLoader) + 1 :]:
            if self._name in vars(after):
                found = vars(after)[self._name]
                return found.__get__(loader, kind) if hasattr(found, "__get__") else found
        raise AttributeError(f"{kind.__name__!r} object has no attribute {self._name!r}")

    def __set__(self, loader: "DropInLoader[Any]", value: Any) -> None:
        loader._set_argument(self._name, value)

    def __delete__(self, loader: "DropInLoader[Any]") -> None:
        if self._name not in loader.__dict__:
            raise AttributeError(self._name)
        del loader.__dict__[self._name]


def _argument(*, fixed: bool = False, ours: bool = False) -> Any:
    return _Argument(fixed=fixed, ours=ours)


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
    device: Any = _argument(ours=True)
    concurrency: int = _argument(ours=True)
    ahead: int | None = _argument(ours=True)
    ahead_bytes: int | None = _argument(ours=True)
    worker_type: WorkerType = _argument(ours=True)
    skip_errors: Skip | None = _argument(ours=True)
    shard: bool = _argument(fixed=True, ours=True)
    seed: int | None = _argument(fixed=True, ours=True)
    """With it the order depends on the seed and the epoch alone."""

    _timeout_message = "DataLoader timed out after {seconds} seconds"
    _properties: tuple[str, ...] = ()
    """Of torch's, those for which a subclass has a property."""
    _theirs: frozenset[str] = frozenset()
    """Of our own, those that are something else in a subclass, or that it has set before it called this constructor."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        found = {name: getattr_static(cls, name) for name in _ARGUMENTS}
        others = {name: it for name, it in found.items() if it is not _ARGUMENTS[name]}
        cls._theirs = _OURS & others.keys()
        torchs = {name: hasattr(type(it), "__set__") for name, it in others.items() if name not in _OURS}
        cls._properties = tuple(name for name, sets in torchs.items() if sets and name in _SHOWN)
        if not all(torchs.values()) and "__setattr__" not in vars(cls):
            cls.__setattr__ = _setting(cls)  # type: ignore[method-assign]

    def _is_made_of(self, arguments: Arguments, sampling: EpochSampling) -> None:
        """Take these, and show them as attributes."""
        plan = plan_of(arguments, sampling)  # now, and not while somebody waits for the first batch
        attributes, told = self.__dict__, vars(arguments)
        shown = {name: told[name] for name in _SHOWN}
        shown["seed"] = sampling.seed
        first = "_arguments" not in attributes
        if first and (set_before := attributes.keys() & _OURS):
            self._theirs |= {name for name in set_before if attributes[name] is not shown[name]}
        for name in self._theirs:
            del shown[name]
        attributes.update(shown, _arguments=arguments, _sampling=sampling, _plan=plan)
        attributes["_timeout"] = arguments.timeout or None
        attributes.pop("_sampled", None)
        for name in self._properties if first else ():  # as torch's constructor does
            setattr(self, name, shown[name])

    def _read_properties(self) -> None:
        """What properties of a subclass say now: torch's loader asks them when an epoch begins."""
        arguments = self._arguments
        told = {name: getattr(self, name) for name in self._properties}
        if any(value is not getattr(arguments, name) for name, value in told.items()):
            self._is_made_of(replace(arguments, **told), self._sampling)

    def _set_argument(self, name: str, value: Any) -> None:
        if "_arguments" not in self.__dict__ or name in self._theirs:
            self.__dict__[name] = value
        elif _ARGUMENTS[name].fixed:
            raise ValueError(f"{name} attribute should not be set after DataLoader is initialized; make a new one")
        else:
            with self._lock:
                self._is_made_of(self._arguments.changed(name, value), self._sampling)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":
            raise AttributeError(
                "DataLoader shows no attribute 'sampler', since trainers replace what they find there; "
                "call loader.set_epoch(epoch), which reaches your sampler"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        told, seed = self._arguments, self._sampling.seed
        parts = [type(told.dataset).__name__, f"batch_size={told.batch_size}"]
        parts += [self._order] if self._order else []
        parts += [f"num_workers={told.num_workers}"]
        parts += [] if seed is None else [f"seed={seed}"]
        return f"DataLoader({', '.join(parts)})"

    # -- iteration ---------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._properties:
            self._read_properties()
        told = self._arguments
        if told.timeout and told.num_workers == 0:
            # The type that torch's iterator raises.
            raise AssertionError(f"timeout needs num_workers > 0, got timeout={told.timeout} with num_workers=0")
        if told.pin_memory and told.device is None and (reason := why_not_pinned()) is not None:
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
        told = self._arguments
        return open_transfer(told.device) if told.device is not None or told.pin_memory else None

    def _nothing_to_tune(self) -> str | None:
        if self._arguments.in_processes:
            return "here worker processes load the samples; measure other num_workers epoch by epoch"
        if not (self._arguments.num_workers or self._arguments.awaited):
            return "num_workers=0 loads them in your own thread; pass num_workers=2 or more"
        return None

    @property
    def _bounded(self) -> bool:
        return self._arguments.ahead is not None or self._arguments.ahead_bytes is not None

    @property
    def _split_by(self) -> str:  # type: ignore[override]  # a plain attribute where it is always the same
        if self._arguments.iterable:
            return "use Pipeline(dataset).shard(), whose map and batch do the rest"
        return "pass sampler=DistributedSampler(dataset), or shard=True, which deals the same keys"

    def _detached(self) -> Self:
        again = super()._detached()
        sampling, skip = self._sampling.detached(), self._arguments.skip_errors
        if skip is not None:
            skip = replace(skip, report=None)  # it is written down already
        copied = sampling.dataset.dataset if isinstance(sampling.dataset, AsyncStandIn) else sampling.dataset
        again._is_made_of(replace(self._arguments, dataset=copied, skip_errors=skip), sampling)
        return again

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_plan", "_sampled")}


_ARGUMENTS: Final[dict[str, _Argument]] = {
    name: it for name, it in vars(DropInLoader).items() if isinstance(it, _Argument)
}
_OURS: Final = frozenset(name for name, it in _ARGUMENTS.items() if it.ours)
_SHOWN: Final = tuple(name for name in _ARGUMENTS if name not in ("sampler", "seed"))  # by their names in `Arguments`


def _setting(kind: type[Any]) -> Callable[[Any, str, Any], None]:
    """`__setattr__` of a subclass that has attributes of its own under the names of arguments, which hide these."""

    def set_attribute(loader: Any, name: str, value: Any) -> None:
        hidden = name in _ARGUMENTS and not hasattr(type(getattr_static(type(loader), name)), "__set__")
        if hidden and name not in _OURS:
            loader._set_argument(name, value)
        else:
            super(kind, loader).__setattr__(name, value)

    return set_attribute
