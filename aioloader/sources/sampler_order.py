"""Samplers with random orders: the states they draw from are kept, so that a resumed epoch draws the same keys."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from aioloader.core.forks import after_fork_in_child
from aioloader.core.generator_states import check_generators, packed, unpacked
from aioloader.core.seeds import derive_seed
from aioloader.engine.progress import Progress
from aioloader.engine.resumable import KnowsOrigin, Origin, ask_initial, is_stateful, tells_state
from aioloader.sources.rank_sampler import RankSampler

__all__ = [
    "Draws",
    "ReplayableOrder",
    "arguments_of",
    "chain_of",
    "check_place",
    "detached_copies",
    "drawing_from",
    "draws_globally",
    "draws_of",
    "generators_of",
    "is_plain",
    "is_repeatable",
    "kind_of",
    "replayable_keys",
]

_DRAWING: Final = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_FIXED: Final = (SequentialSampler, DistributedSampler, RankSampler)


_NO_KEY: Final = object()


_drawing = threading.Lock()


@after_fork_in_child
def _renew_lock() -> None:
    global _drawing
    _drawing = threading.Lock()


@dataclass(frozen=True)
class Draws:
    """What the orders of one epoch are drawn from, also after a resume.

    Attributes:
        state: The state of torch's global generator when the epoch began, as text; None if no order depends on it.
        sole: A single sampler draws from it, the same numbers as with torch's own loader. Several samplers have a
            generator each that is derived from `state`, because they draw in no fixed order; the loader has drawn once
            for all of them.
        resumed: The epoch began before a resume: nothing more may be drawn from the global generator.
        progress: Of the epoch: it is told when its order is drawn.
    """

    state: str | None = None
    sole: bool = True
    resumed: bool = False
    progress: Progress | None = None

    def drawn(self) -> None:
        """Note in which state the global generator is left, so that it shows whether others draw from it."""
        if self.state is not None and self.progress is not None and self.progress.left_global is None:
            self.progress.left_global = packed(torch.get_rng_state())


def draws_of(progress: Progress, *, sole: bool = True) -> Draws:
    """The draws of the epoch that `progress` is about."""
    return Draws(progress.loader_state.get("drawn"), sole, progress.begun_before, progress)


class ReplayableOrder(KnowsOrigin):
    """The keys of one epoch.

    The state that an order is drawn from is noted when the epoch begins, or when a state of its beginning is saved.
    torch's samplers draw all that they need from the global generator at their first key, and from one of their own
    whenever they need more. As long as the global generator is still in the noted state, they simply draw from it.
    Otherwise they draw from another generator in that state, in two cases: in a resumed epoch, because the epoch has
    drawn from the global generator before, and must not do so twice; and in an epoch that begins after its state was
    saved, because the caller may have drawn since. In the second case the global generator is drawn from as well, so
    that later draws are the same with a checkpoint and without. A sampler's own generator is left as the epoch leaves
    it, and later epochs go on from there.

    Why the state is not simply put into the global generator for that moment: this is a thread, and the generator
    belongs to the process. A consumer who draws from it meanwhile, or saves its state in a checkpoint, would get other
    numbers, and those draws would be undone. `_DrawnFrom` affects this thread alone.

    Args:
        open_keys: Begins an epoch of the sampler, and may draw too.
        draws: What its order is drawn from, apart from the samplers' own generators.
        generators: These, if their states are part of each cursor because an epoch asks for the keys several times.
        name: Tells the samplers of a loader from each other.
        alone: No other order may be drawn from the global generator between reading its state and drawing. Not for
            the user's samplers, which may wait for anything.
        repetitions: Those of the enclosing `repeat` stages. Later ones do not draw from the global generator, which the
            consumer may be using meanwhile: they derive their order from what the first one drew from.
    """

    def __init__(
        self,
        open_keys: Callable[[], Iterator[Any]],
        draws: Draws = Draws(),
        generators: Sequence[torch.Generator] = (),
        *,
        name: str = "",
        alone: bool = False,
        repetitions: tuple[int, ...] = (),
    ) -> None:
        self._open = open_keys
        self._draws = draws
        self._generators = generators
        self._name = name
        self._alone: AbstractContextManager[Any] = _drawing if alone and draws.state else nullcontext()
        self._repetitions = repetitions
        self.origin: Origin | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.origin is not None:
            for generator, its in zip(self._generators, self.origin["generators"], strict=True):
                generator.set_state(unpacked(its))
        elif self._generators:
            self.origin = {"at": 0, "generators": [packed(generator.get_state()) for generator in self._generators]}
        with self._alone, self._drawing():
            keys = self._open()
            first = next(keys, _NO_KEY)
            self._draws.drawn()
        if first is _NO_KEY:
            return
        yield first
        # `yield from` would call `__iter__` of a sampler that is its own iterator, and so begin it anew.
        yield from keys if type(keys).__module__ == "builtins" else iter(keys.__next__, _NO_KEY)

    def _drawing(self) -> AbstractContextManager[Any]:
        """The context in which to ask for the first key."""
        draws = self._draws
        path = () if draws.sole else (self._name,)
        if draws.state is not None and (path or any(self._repetitions)):
            again = torch.Generator().manual_seed(derive_seed(0, draws.state, *path, *self._repetitions))
            return _DrawnFrom(again.get_state())
        return drawing_from(draws)


def drawing_from(draws: Draws) -> AbstractContextManager[Any]:
    """The context in which a sole sampler draws its order."""
    now = torch.get_rng_state()
    state = now if draws.state is None else unpacked(draws.state)
    if draws.resumed:
        return _DrawnFrom(state)
    return nullcontext() if torch.equal(state, now) else _DrawnFrom(state, and_global=True)


_DRAWS: Final = {
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
    *("rand_like", "randn_like", "randint_like", "random_", "uniform_", "normal_", "bernoulli_"),
    *("exponential_", "geometric_", "cauchy_", "log_normal_"),
}
"""Functions and methods of torch that draw, and that take a `generator` at least in some versions."""


class _DrawnFrom(TorchFunctionMode):
    """Makes torch's functions draw from a generator in `state` instead of the global one of the CPU, in this thread.

    With `and_global` they draw as much from the global one too, and drop that.
    """

    def __init__(self, state: torch.Tensor, *, and_global: bool = False) -> None:
        super().__init__()
        self._and_global = and_global
        self._generator = torch.Generator()
        self._generator.set_state(state)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _DRAWS and _draws_on_cpu(args, kwargs):
            generator = kwargs.get("generator")
            if generator is None or generator is torch.default_generator:
                # First, because a draw in place is to end with the numbers of the other generator.
                from_global = func(*args, **kwargs) if self._and_global else None
                try:
                    return func(*args, **{**kwargs, "generator": self._generator})
                except TypeError:  # it takes none
                    if self._and_global:
                        return from_global
        return func(*args, **kwargs)


def _draws_on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if args and isinstance(args[0], torch.Tensor) and kwargs.get("device") is None:
        return args[0].device.type == "cpu"
    return torch.device(kwargs.get("device") or torch.get_default_device()).type == "cpu"


def check_place(sampler: Any, origin: Origin | None, since: int, *, in_cursor: bool) -> None:
    """Refuse an invalid place in the keys of `sampler`.

    Args:
        sampler: A sampler or batch sampler.
        origin: What the keys are counted from, see `resumable`.
        since: How many keys since then.
        in_cursor: The states of generators are part of the cursor.

    Raises:
        ValueError: Why.
    """
    generators = generators_of(sampler) if in_cursor else []
    tells = any(map(is_stateful, chain_of(sampler)))
    if origin is None:
        if generators and not tells:
            raise ValueError("the states of generators that the order was drawn from are missing")
    elif "generators" in origin:
        check_generators(origin["generators"], generators)
    elif not tells:
        raise ValueError(f"it holds a state of a sampler, but {type(sampler).__name__} has no load_state_dict")
    if not tells and is_repeatable(sampler) and since > (length := len(sampler)):
        raise ValueError(f"key {since} is after the last of {length}")


def chain_of(sampler: Any) -> Iterator[Any]:
    """A sampler and those that it gets its keys from, by the attribute that torch's and most others use."""
    seen = 0
    while sampler is not None and seen < 8:
        yield sampler
        sampler = getattr(sampler, "sampler", None)
        seen += 1


def generators_of(*samplers: Any) -> list[torch.Generator]:
    """The generators that the samplers draw from, each once."""
    found: list[torch.Generator] = []
    for outer in samplers:
        for sampler in chain_of(outer):
            generator = getattr(sampler, "generator", None)
            if generator is None or not isinstance(generator, torch.Generator):  # of which torch makes a long question
                continue
            if all(generator is not other for other in found):
                found.append(generator)
    return found


def detached_copies(things: Sequence[Any], shared: Sequence[Any] = ()) -> list[Any]:
    """Copies of samplers, generators and stateful iterables: using a copy does not advance the original.

    Args:
        things: Lists, tuples and ranges have no state, and are not copied.
        shared: Objects in them that are not copied either, beside the datasets of samplers.

    Raises:
        LookupError: One of them cannot be copied.
    """
    memo = {id(thing): thing for thing in shared}
    for thing in things:
        for part in chain_of(thing):
            for held in (getattr(part, "data_source", None), getattr(part, "dataset", None)):
                memo.setdefault(id(held), held)  # a sampler only asks for its length
    generators = [thing for thing in things if isinstance(thing, torch.Generator)]
    for generator in [*generators, *generators_of(*things)]:
        memo[id(generator)] = clone = torch.Generator(device=generator.device)
        clone.set_state(generator.get_state())
    copies = []
    for thing in things:
        try:
            copies.append(thing if isinstance(thing, range | list | tuple | None) else deepcopy(thing, memo))
        except Exception as error:
            raise LookupError(
                f"replay reads from copies of samplers and of iterables with a state_dict, so that the epoch goes on "
                f"undisturbed, but {type(thing).__name__} cannot be copied ({error}); keep the batch, or its keys"
            ) from error
    return copies


def draws_globally(sampler: Any) -> bool:
    """Whether its order may depend on torch's global generator; assumed of samplers that are not torch's."""
    for part in chain_of(sampler):
        if type(part) in _DRAWING:
            if part.generator is None:
                return True
        elif type(part) is not BatchSampler and type(part) not in _FIXED and not isinstance(part, range | list | tuple):
            return True
    return False


def kind_of(sampler: Any) -> str:
    """Which of torch's samplers it is, or "custom"."""
    return type(sampler).__name__ if type(sampler) in (*_DRAWING, *_FIXED, BatchSampler) else "custom"


_ARGUMENTS: Final[dict[type, tuple[tuple[str, str], ...]]] = {
    BatchSampler: (("batch_size", "batch_size"), ("drop_last", "drop_last")),
    RandomSampler: (("replacement", "replacement"), ("num_samples", "_num_samples")),
    SubsetRandomSampler: (("indices", "indices"),),
    WeightedRandomSampler: (("weights", "weights"), ("num_samples", "num_samples"), ("replacement", "replacement")),
    DistributedSampler: tuple((name, name) for name in ("num_replicas", "shuffle", "seed", "drop_last")),
    RankSampler: tuple((name, name) for name in ("num_replicas", "shuffle", "seed")),
}
"""Names and attributes of torch's samplers that decide their order; long ones count by their length. Not the rank,
because a state is that of all ranks."""


def arguments_of(sampler: Any) -> dict[str, Any]:
    """The arguments of torch's samplers that decide the keys; JSON-able."""
    found = {}
    for part in chain_of(sampler):
        for name, attribute in _ARGUMENTS.get(type(part), ()):
            value = getattr(part, attribute, None)
            if not isinstance(value, int | None):
                value = len(value)
            found[f"{type(part).__name__}.{name}"] = value
    return found


def is_repeatable(sampler: Any) -> bool:
    """Whether a resumed epoch is guaranteed to have the same keys: torch's own samplers, and those with a state."""
    for part in chain_of(sampler):
        if tells_state(part):
            return True
        if type(part) not in (*_DRAWING, *_FIXED, BatchSampler) and not isinstance(part, range | list | tuple):
            return False
    return True


def is_plain(sampler: Any) -> bool:
    """Whether reading keys early has no side effects: torch's own samplers, without a generator of their own."""
    for part in chain_of(sampler):
        if type(part) not in (*_DRAWING, *_FIXED, BatchSampler, range, list, tuple):
            return False
        if getattr(part, "generator", None) is not None:
            return False
    return True


def replayable_keys(
    sampler: Any, open_keys: Callable[[], Iterator[Any]], draws: Draws, *, in_cursor: bool = False, **how: Any
) -> Any:
    """The keys of one epoch of `sampler`, which can be repeated: from its own state if it has one, else drawn again.

    Args:
        sampler: A sampler or batch sampler.
        open_keys: Begins an epoch of it.
        draws: What its order is drawn from.
        in_cursor: The states of its generators are part of each cursor.
        how: See `ReplayableOrder`.
    """
    if draws.state is not None and not draws_globally(sampler):
        draws = replace(draws, state=None)
    for part in chain_of(sampler):
        if is_stateful(part):
            return _Stateful(part, ReplayableOrder(partial(_opened, part, open_keys), draws, **how))
    generators = generators_of(sampler) if in_cursor else ()
    return ReplayableOrder(open_keys, draws, generators, alone=is_repeatable(sampler), **how)


def _opened(sampler: Any, open_keys: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The keys of a sampler with a state, which is asked for it once it has been iterated.

    One in a batch sampler is asked before: that iterates it at its first key.
    """
    keys = open_keys()
    ask_initial(sampler)
    return keys


class _Stateful:
    """The keys of a sampler with a state, which may belong to a batch sampler that does not read ahead."""

    def __init__(self, sampler: Any, keys: ReplayableOrder) -> None:
        self.__wrapped__ = sampler
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def state_dict(self) -> Any:
        return self.__wrapped__.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.__wrapped__.load_state_dict(state)
