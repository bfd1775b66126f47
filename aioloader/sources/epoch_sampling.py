"""`EpochSampling`: the keys of a `DataLoader`'s epochs, drawn as torch's iterator draws them."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.data
from torch.utils.data import BatchSampler, RandomSampler

from aioloader.core.safe_text import safe_repr
from aioloader.core.seeds import derive_seed
from aioloader.engine.resumable import Origin, is_stateful
from aioloader.sources.rank_sampler import RankSampler
from aioloader.sources.sampler_order import (
    Draws,
    ReplayableOrder,
    arguments_of,
    check_place,
    detached_copies,
    drawing_from,
    draws_globally,
    generators_of,
    is_plain,
    is_repeatable,
    kind_of,
    replayable_keys,
)

__all__ = ["BaseSeed", "EpochSampling"]


@dataclass
class BaseSeed:
    """The base of the seeds of an epoch's workers; 0 until it is drawn."""

    value: int = 0


class EpochSampling:
    """Draws what an epoch needs when it begins: the order of its keys, and a base seed for its workers.

    Attributes:
        told_epoch: The last argument of `set_epoch`.
        batch_size: Keys in a batch; None: there are no batches, or the user's batch sampler decides.
        drop_last: A shorter last batch is left out.

    Args:
        loader: torch's own, which has made the samplers.
        shuffled: Whether `shuffle=True` was passed.
        seed: If given, the order depends on the seed and the epoch alone.
        persistent: Workers stay, and have one base seed for all epochs: as in torch, only the first epoch draws one, so
            that later epochs have other orders than without. A loader that resumes does what the saved one did,
            whatever its own workers do. With `seed`, no order depends on it.
    """

    def __init__(
        self, loader: "torch.utils.data.DataLoader[Any]", *, shuffled: bool, seed: int | None, persistent: bool
    ) -> None:
        self.seed = seed
        self.generator: torch.Generator | None = loader.generator
        self.dataset: Any = loader.dataset
        self.sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last
        inner = self.sampler if loader.batch_sampler is None else loader.sampler
        self._ranks = inner if isinstance(inner, RankSampler) else None
        self._seeded = seed is not None and shuffled and self._ranks is None
        self._draws_once = persistent and seed is None
        self._base_seed: int | None = None  # after it was drawn, if that happens once
        self.told_epoch: int | None = None

    @property
    def plain(self) -> bool:
        """Whether reading keys early has no side effects."""
        return is_plain(self.sampler)

    @property
    def repeatable(self) -> bool:
        """Whether a resumed epoch is guaranteed to have the same keys."""
        return self._seeded or is_repeatable(self.sampler)

    @property
    def draws_globally(self) -> bool:
        """Whether the order depends on torch's global generator."""
        return not self._seeded and draws_globally(self.sampler)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that an epoch draws from, apart from the global one."""
        return generators_of(self)  # and of its sampler, as of whatever has one

    def shape(self) -> dict[str, Any]:
        """What decides the order, for comparing pipelines."""
        if self._seeded:
            return {"stage": "shuffle", "seed": self.seed}
        inner = getattr(self.sampler, "sampler", self.sampler)
        of = inner if self.batch_size is not None else self.sampler  # else the user passed the batch sampler
        shape = {
            "stage": "sampler",
            "kind": kind_of(inner),
            "name": type(inner).__name__,
            "arguments": arguments_of(of),
        }
        return shape if self.seed is None else shape | {"seed": self.seed}

    @property
    def _with_epochs(self) -> list[Any]:
        """The samplers and the dataset that have a `set_epoch`."""
        parts = (self.sampler, getattr(self.sampler, "sampler", None), self.dataset)
        return [part for part in parts if callable(getattr(part, "set_epoch", None))]

    @property
    def _with_epoch(self) -> list[Any]:
        """Those of them that have an `epoch`."""
        return [part for part in self._with_epochs if type(getattr(part, "epoch", None)) is int]

    def set_epoch(self, epoch: int) -> None:
        """Tell the samplers and the dataset that have a `set_epoch`."""
        self.told_epoch = epoch
        for part in self._with_epochs:
            part.set_epoch(epoch)

    def detached(self) -> "EpochSampling":
        """A copy that draws the same keys without advancing the user's samplers, generators and iterables.

        Raises:
            LookupError: One of them cannot be copied.
        """
        again = copy(self)
        shared = [] if is_stateful(self.dataset) else [self.dataset]
        things = [self.sampler, self.generator] if shared else [self.sampler, self.generator, self.dataset]
        again.sampler, again.generator, *copied = detached_copies(things, shared)
        again.dataset = copied[0] if copied else self.dataset
        return again

    def set_epoch_of_dataset(self, state: dict[str, Any]) -> None:
        """Set the epoch of the dataset, and of nothing else, to that in `state`."""
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if callable(set_epoch):
            own_epoch = state.get("set_epoch")
            for part, epoch in zip(self._with_epoch, state.get("epochs", ()), strict=False):
                own_epoch = epoch if part is self.dataset else own_epoch
            if own_epoch is not None:
                set_epoch(own_epoch)

    # -- drawing -----------------------------------------------------------------------------------------------------

    def of(self, epoch: int, draws: Draws, base: BaseSeed | None = None) -> Any:
        """The keys of an epoch, drawn when the first is asked for, from the states of when the epoch began.

        Args:
            epoch: The number of the epoch.
            draws: What its order is drawn from.
            base: Gets the base seed.
        """
        open_keys = partial(self.draw, epoch, base)
        if self._seeded:
            return ReplayableOrder(open_keys, Draws(resumed=draws.resumed))
        return replayable_keys(self.sampler, open_keys, draws)

    def check_place(self, origin: Origin | None, since: int) -> None:
        """Refuse an invalid place in the keys.

        Raises:
            ValueError: Why.
        """
        check_place(self.sampler, origin, since, in_cursor=False)

    def draw_base_seed(self, epoch: int, draws: Draws, base: BaseSeed | None = None) -> None:
        """Draw for an epoch without a sampler; a resumed one has drawn before.

        Args:
            epoch: The number of the epoch.
            draws: What it is drawn from.
            base: Gets the base seed.
        """
        with drawing_from(draws):
            self.draw(epoch, base)
        draws.drawn()

    def draw(self, epoch: int, base: BaseSeed | None = None) -> Iterator[Any]:
        """The keys of an epoch, drawn now.

        As in torch's iterator, the sampler's `__iter__` comes first and the base seed is drawn second, from the same
        generator, so that everything drawn later, by samplers or by the user, is the same.

        Args:
            epoch: The number of the epoch.
            base: Gets the base seed.
        """
        sampler = self.sampler
        seed = self._base_seed
        if self.seed is not None:
            seed = derive_seed(self.seed, "workers", epoch)
            if self._seeded:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", epoch))
                sampler = self._batched(RandomSampler(self.dataset, generator=generator))
        if self._ranks is not None:
            sampler = self._batched(self._ranks.of(epoch))
        keys: Iterator[Any] = iter(sampler)
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=self.generator))
            if self._draws_once:
                self._base_seed = seed
        if base is not None:
            base.value = seed
        return keys

    def _batched(self, sampler: Any) -> Any:
        """What gives the keys of batches, where there are batches."""
        return sampler if self.batch_size is None else BatchSampler(sampler, self.batch_size, self.drop_last)

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What else the next epoch depends on, apart from generators; JSON-able."""
        state: dict[str, Any] = {}
        if self._draws_once:
            state["draws_once"] = True
        if self._base_seed is not None:
            state["base_seed"] = self._base_seed
        return state | self.epochs()

    def epochs(self) -> dict[str, Any]:
        """The part of the state with the epochs of samplers and dataset."""
        state: dict[str, Any] = {}
        if self.told_epoch is not None:
            state["set_epoch"] = self.told_epoch
        if parts := self._with_epoch:
            state["epochs"] = [part.epoch for part in parts]
        return state

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that is invalid for `set_state`.

        Raises:
            ValueError: Why.
        """
        if type(state.get("draws_once", False)) is not bool:
            raise ValueError(f"'draws_once' is true or false, got {safe_repr(state['draws_once'])}")
        for name in ("base_seed", "set_epoch"):
            if name in state:
                _check_int64(name, state[name])
        if not isinstance(epochs := state.get("epochs", []), list) or len(epochs) not in (
            0,
            len(self._with_epoch),
        ):
            raise ValueError(f"epochs of {len(self._with_epoch)} samplers were expected, got {epochs!r}"[:200])
        for epoch in epochs:
            _check_int64("the epoch of a sampler", epoch)

    def set_state(self, state: dict[str, Any]) -> None:
        """Draw as `state` says, which `check_state` has accepted."""
        self._draws_once = state.get("draws_once", False)
        self._base_seed = state.get("base_seed") if self._draws_once else None

    def set_epochs(self, state: dict[str, Any], *, told: bool = True) -> None:
        """Set the epochs of samplers and dataset to those in `state`.

        Args:
            state: See `set_state`.
            told: Also for those without an `epoch`.
        """
        if told:
            self.told_epoch = None
            if (epoch := state.get("set_epoch")) is not None:
                self.set_epoch(epoch)
        for part, epoch in zip(self._with_epoch, state.get("epochs", ()), strict=False):
            if part.epoch != epoch:
                part.set_epoch(epoch)


def _check_int64(name: str, value: object) -> None:
    """Refuse what torch would not accept as a seed.

    Raises:
        ValueError: It is not an integer of 64 bits.
    """
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {safe_repr(value)}")
