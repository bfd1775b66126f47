"""Samplers, whose order may be random: what they drew from is kept, so that a resumed epoch draws it again."""

import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import islice
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
from aioloader.core.safe_text import safe_repr
from aioloader.core.seeds import derive_seed
from aioloader.engine.progress import Progress
from aioloader.engine.resumable import KnowsOrigin, Origin, is_stateful, tells_state

__all__ = [
    "Draws",
    "ReplayableOrder",
    "arguments_of",
    "chain_of",
    "check_draws",
    "check_generators",
    "check_place",
    "detached_copies",
    "drawing_from",
    "draws_globally",
    "draws_of",
    "generators_of",
    "is_plain",
    "is_repeatable",
    "kind_of",
    "packed",
    "replayable_keys",
    "unpacked",
]

_DRAWING: Final = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_FIXED: Final = (SequentialSampler, DistributedSampler)


_drawing = threading.Lock()


@after_fork_in_child
def _draw_anew() -> None:
    global _drawing
    _drawing = threading.Lock()


@dataclass(frozen=True)
class Draws:
    """What the orders of one epoch are drawn from, and go on being drawn from after a resume.

    Attributes:
        state: Of torch's global generator when the epoch began, as text; None: no order depends on it.
        sole: One sampler draws from it, which has what torch's own loader would give it. Several have a generator each
            that is derived from `state`, since they draw in no fixed order; the loader has drawn once for all of them.
        resumed: The epoch has begun before: nothing more may be drawn from the global generator.
    """

    state: str | None = None
    sole: bool = True
    resumed: bool = False


def draws_of(progress: Progress, *, sole: bool = True) -> Draws:
    """Those of the epoch that `progress` is about."""
    return Draws(progress.loader_state.get("drawn"), sole, progress.begun_before)


class ReplayableOrder(KnowsOrigin):
    """The keys of one epoch.

    What an order is drawn from is decided when the epoch begins, or when a state of its beginning is taken. torch's
    samplers draw all that they need from the global generator at their first key, and from one of their own whenever
    they need more. As long as the global generator stands where it stood, they simply draw from it. Else they draw from
    another generator in that state: a resumed epoch, whose caller had the global one drawn from once and is not to
    notice that it happens again; and one that begins after a state was taken, however often the caller has drawn since.
    In that second case the global generator is drawn from as well, so that whatever is drawn later is the same with a
    checkpoint and without. A sampler's own generator is left where the epoch leaves it, so that later epochs go on with
    it as they would have.

    Why the state is not simply put into the global generator for that moment: this is a thread, and the generator is
    the whole process's. A consumer who drew from it meanwhile, or kept its state in a checkpoint, would have met
    somebody else's numbers, and what he drew would have been undone. `_DrawnFrom` acts on this thread alone.

    Args:
        open_keys: Begins an epoch of the sampler; what it draws counts too.
        draws: What its order is drawn from, the samplers' own generators aside.
        generators: Those, if their states are to be a part of each cursor: where an epoch asks for the keys several
            times.
        name: Tells the samplers of one loader apart.
        alone: No other order is drawn from the global generator between the look at it and the draw; not for
            samplers of the user's, which may wait for anything.
        repetitions: Of the enclosing `repeat` stages. Those after the first do not draw from the global generator,
            which the consumer may be using meanwhile: they go on from what the first one drew from.
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
            first = list(islice(keys, 1))
        yield from first
        yield from keys

    def _drawing(self) -> AbstractContextManager[Any]:
        """What the first key is asked for in."""
        draws = self._draws
        path = () if draws.sole else (self._name,)
        if draws.state is not None and (path or any(self._repetitions)):
            again = torch.Generator().manual_seed(derive_seed(0, draws.state, *path, *self._repetitions))
            return _DrawnFrom(again.get_state())
        return drawing_from(draws)


def drawing_from(draws: Draws) -> AbstractContextManager[Any]:
    """In which a sole sampler draws its order."""
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
"""Functions and methods of torch that draw, and take a `generator`, if not in every version."""


class _DrawnFrom(TorchFunctionMode):
    """Lets this thread's functions of torch draw from a generator in `state` where they would take the global one.

    Args:
        state: Of the global generator of the CPU.
        and_global: They draw as much from the global one, too, and what comes of that is dropped.
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
                drawn = func(*args, **kwargs) if self._and_global else None  # first: the other one may overwrite it
                try:
                    return func(*args, **{**kwargs, "generator": self._generator})
                except TypeError:  # it takes none
                    if self._and_global:
                        return drawn
        return func(*args, **kwargs)


def _draws_on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if args and isinstance(args[0], torch.Tensor) and kwargs.get("device") is None:
        return args[0].device.type == "cpu"
    return torch.device(kwargs.get("device") or torch.get_default_device()).type == "cpu"


def packed(state: torch.Tensor) -> str:
    """A generator's state as text: 5 KiB of bytes as 6.6 KiB of base64."""
    return b64encode(bytes(state.numpy())).decode()


def unpacked(text: str) -> torch.Tensor:
    """What `packed` was given.

    Raises:
        ValueError: It is no base64.
    """
    return torch.frombuffer(bytearray(b64decode(text, validate=True)), dtype=torch.uint8)


def check_generators(states: Any, generators: Sequence[torch.Generator]) -> None:
    """Refuse states of generators that these cannot take.

    Raises:
        ValueError: Why.
    """
    if not isinstance(states, list) or len(states) != len(generators):
        raise ValueError(f"states of {len(generators)} generators were expected, got {safe_repr(states)}")
    for its, generator in zip(states, generators, strict=True):
        _check_generator(its, generator.device)


def check_draws(state: Mapping[str, Any]) -> None:
    """Refuse a state without what the order of its epoch is drawn from.

    Raises:
        ValueError: Why.
    """
    if "drawn" not in state:
        raise ValueError("'drawn', the state of the global generator that the order is drawn from, is missing")
    _check_generator(state["drawn"], torch.device("cpu"))


def _check_generator(state: Any, device: torch.device) -> None:
    if not isinstance(state, str):
        raise ValueError(f"the state of a generator is a string, got {safe_repr(state)}")
    try:
        torch.Generator(device=device).set_state(unpacked(state))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the state of a generator is broken: {error}"[:300]) from None


def check_place(sampler: Any, origin: Origin | None, since: int, *, in_cursor: bool) -> None:
    """Refuse a place in the keys of `sampler` that is none.

    Args:
        sampler: A sampler or batch sampler.
        origin: What the keys are counted from, see `resumable`.
        since: How many.
        in_cursor: The states of generators are a part of the cursor.

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
        raise ValueError(f"key {since} is behind the last of {length}")


def chain_of(sampler: Any) -> Iterator[Any]:
    """A sampler and those that it takes its keys from, as torch's and most people's hold them."""
    seen = 0
    while sampler is not None and seen < 8:
        yield sampler
        sampler = getattr(sampler, "sampler", None)
        seen += 1


def generators_of(*samplers: Any) -> list[torch.Generator]:
    """The generators that they draw from, each once."""
    found: list[torch.Generator] = []
    for outer in samplers:
        for sampler in chain_of(outer):
            generator = getattr(sampler, "generator", None)
            if isinstance(generator, torch.Generator) and all(generator is not other for other in found):
                found.append(generator)
    return found


def detached_copies(things: Sequence[Any], shared: Sequence[Any] = ()) -> list[Any]:
    """Copies of samplers, generators and iterables that know where they are: using them moves none of the originals.

    Args:
        things: Lists, tuples and ranges do not move, and stay what they are.
        shared: What they hold and the copies hold too, beside the datasets of samplers.

    Raises:
        LookupError: One of them cannot be copied.
    """
    memo = {id(thing): thing for thing in shared}
    for thing in things:
        for part in chain_of(thing):
            for held in (getattr(part, "data_source", None), getattr(part, "dataset", None)):
                memo.setdefault(id(held), held)  # of which a sampler asks for its length
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
    """Whether its order may depend on torch's global generator: nobody knows of those that are not torch's."""
    for part in chain_of(sampler):
        if type(part) in _DRAWING:
            if part.generator is None:
                return True
        elif type(part) is not BatchSampler and type(part) not in _FIXED and not isinstance(part, range | list | tuple):
            return True
    return False


def kind_of(sampler: Any) -> str:
    """Which of torch's samplers it is, or that it is somebody else's."""
    return type(sampler).__name__ if type(sampler) in (*_DRAWING, *_FIXED, BatchSampler) else "custom"


_ARGUMENTS: Final[dict[type, tuple[tuple[str, str], ...]]] = {
    BatchSampler: (("batch_size", "batch_size"), ("drop_last", "drop_last")),
    RandomSampler: (("replacement", "replacement"), ("num_samples", "_num_samples")),
    SubsetRandomSampler: (("indices", "indices"),),
    WeightedRandomSampler: (("weights", "weights"), ("num_samples", "num_samples"), ("replacement", "replacement")),
    DistributedSampler: tuple((name, name) for name in ("num_replicas", "shuffle", "seed", "drop_last")),
}
"""Of torch's samplers: names and attributes of what decides their order; of what is long, how much there is. Not the
rank, since a state is that of all ranks."""


def arguments_of(sampler: Any) -> dict[str, Any]:
    """What torch's samplers were made with, as far as it decides the keys; JSON-able."""
    found = {}
    for part in chain_of(sampler):
        for name, attribute in _ARGUMENTS.get(type(part), ()):
            value = getattr(part, attribute, None)
            if not isinstance(value, int | None):
                value = len(value)
            found[f"{type(part).__name__}.{name}"] = value
    return found


def is_repeatable(sampler: Any) -> bool:
    """Whether a resumed epoch surely has the same keys: torch's own samplers, and those that tell their state."""
    for part in chain_of(sampler):
        if tells_state(part):
            return True
        if type(part) not in (*_DRAWING, *_FIXED, BatchSampler) and not isinstance(part, range | list | tuple):
            return False
    return True


def is_plain(sampler: Any) -> bool:
    """Whether nobody can tell when its keys are read: torch's own samplers, without a generator of the user's."""
    for part in chain_of(sampler):
        if type(part) not in (*_DRAWING, *_FIXED, BatchSampler, range, list, tuple):
            return False
        if getattr(part, "generator", None) is not None:
            return False
    return True


def replayable_keys(
    sampler: Any, open_keys: Callable[[], Iterator[Any]], draws: Draws, *, in_cursor: bool = False, **how: Any
) -> Any:
    """The keys of one epoch of `sampler`, that can be had again: with its state when it tells one, else drawn.

    Args:
        sampler: A sampler or batch sampler.
        open_keys: Begins an epoch of it.
        draws: What its order is drawn from.
        in_cursor: The states of its generators are a part of each cursor.
        how: See `ReplayableOrder`.
    """
    if not draws_globally(sampler):
        draws = replace(draws, state=None)
    for part in chain_of(sampler):
        if is_stateful(part):
            return _Stateful(part, ReplayableOrder(open_keys, draws, **how))
    generators = generators_of(sampler) if in_cursor else ()
    return ReplayableOrder(open_keys, draws, generators, alone=is_repeatable(sampler), **how)


class _Stateful:
    """The keys of a sampler that tells its state, which may stand behind a batch sampler that reads no further."""

    def __init__(self, sampler: Any, keys: ReplayableOrder) -> None:
        self.__wrapped__ = sampler
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def state_dict(self) -> Any:
        return self.__wrapped__.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.__wrapped__.load_state_dict(state)
