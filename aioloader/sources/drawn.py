"""Samplers, whose order may be random: what they drew from is kept, so that a resumed epoch draws it again."""

import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
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

from aioloader.engine.resumable import Origin, Redrawn, is_stateful
from aioloader.forks import after_fork_in_child
from aioloader.seeds import derive_seed

__all__ = [
    "Drawn",
    "apart",
    "arguments_of",
    "chain_of",
    "check_drawn",
    "check_generators",
    "generators_of",
    "is_plain",
    "is_repeatable",
    "keys_of",
    "kind_of",
    "packed",
    "unpacked",
]

_DRAWING: Final = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_FIXED: Final = (SequentialSampler, DistributedSampler)


_drawing = threading.Lock()


@after_fork_in_child
def _draw_anew() -> None:
    global _drawing
    _drawing = threading.Lock()


class Drawn(Redrawn):
    """The keys of one epoch.

    Which random state an order comes from is decided when the first key is asked for: torch's samplers draw all that
    they need from the global generator then, and from one of their own whenever they need more. So the state of the
    global one is kept as it was before, and a resumed epoch draws from another generator in that state: the caller had
    the global one drawn from once, when the epoch began, and is not to notice that it happens again. A sampler's own
    generator is left where the epoch leaves it, so that later epochs go on with it as they would have.

    Why the state is not simply put into the global generator for that moment: this is a thread, and the generator is
    the whole process's. A consumer who drew from it meanwhile, or kept its state in a checkpoint, would have met
    somebody else's numbers, and what he drew would have been undone. `_DrawnFrom` acts on this thread alone.

    Args:
        open_keys: Begins an epoch of the sampler; what it draws counts too.
        generators: The samplers' own.
        uses_global: Whether the order may depend on the global generator.
        resumed: The epoch has begun before: nothing more may be drawn from the global generator.
        record: Keeps what the epoch was drawn from, under `name`; the loader then sets the generators back itself.
            None: it becomes a part of each cursor, since the keys are asked for several times in an epoch.
        name: See `record`.
        alone: Nobody else's `Drawn` draws from the global generator between the moment when its state is noted and the
            draw; not for samplers of the user's, which may wait for anything.
        repetitions: Of the enclosing `repeat` stages. Those after the first do not draw from the global generator,
            which the consumer may be using meanwhile: they go on from what the first one drew from. And the states of
            generators are a part of each cursor, for they are others in each repetition.
    """

    def __init__(
        self,
        open_keys: Callable[[], Iterator[Any]],
        generators: list[torch.Generator],
        *,
        uses_global: bool,
        resumed: bool = False,
        record: dict[str, Any] | None = None,
        name: str = "drawn",
        alone: bool = False,
        repetitions: tuple[int, ...] = (),
    ) -> None:
        self._open = open_keys
        self._generators = generators
        self._uses_global = uses_global
        self._resumed = resumed
        self._record = record
        self._name = name
        self._alone: AbstractContextManager[Any] = _drawing if alone and uses_global else nullcontext()
        self._repetitions = repetitions
        self.origin: Origin | None = None

    def __iter__(self) -> Iterator[Any]:
        with self._alone:
            before = self._before()
            if before is None and not self._resumed:
                keys = self._open()
                first = list(islice(keys, 1))
            else:
                with _DrawnFrom(torch.get_rng_state() if before is None else unpacked(before)):
                    keys = self._open()
                    first = list(islice(keys, 1))
        yield from first
        yield from keys

    def _before(self) -> str | None:
        """The state of the global generator that the order is to be drawn from again; None: from where it is now."""
        if self.origin is not None:
            drawn = self.origin["drawn"]
            for generator, state in zip(self._generators, drawn["generators"], strict=True):
                generator.set_state(unpacked(state))
            known: str | None = drawn["global"]
            if known is None and self._record is not None and self._uses_global:
                known = self._recorded(self._record, None)
            return known
        now = packed(torch.get_rng_state()) if self._uses_global else None
        if self._record is not None:
            if self._repetitions and self._generators:
                states = [packed(generator.get_state()) for generator in self._generators]
                self.origin = {"at": 0, "drawn": {"global": None, "generators": states}}
            return self._recorded(self._record, now)
        if self._uses_global or self._generators:
            states = [packed(generator.get_state()) for generator in self._generators]
            self.origin = {"at": 0, "drawn": {"global": now, "generators": states}}
        return None

    def _recorded(self, record: dict[str, Any], now: str | None) -> str | None:
        """As `_before`, with what the record knows; `now` is the state of the global generator, if it matters."""
        first = record.get(self._name)
        if any(self._repetitions) and first is not None:
            again = torch.Generator().manual_seed(derive_seed(0, str(first), *self._repetitions))
            return packed(again.get_state())
        if self._resumed and first is not None:
            return str(first)
        if now is not None:
            record[self._name] = now
        return None


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
    """

    def __init__(self, state: torch.Tensor) -> None:
        super().__init__()
        self._generator = torch.Generator()
        self._generator.set_state(state)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _DRAWS and _draws_on_cpu(args, kwargs):
            generator = kwargs.get("generator")
            if generator is None or generator is torch.default_generator:
                try:
                    return func(*args, **{**kwargs, "generator": self._generator})
                except TypeError:  # it takes none
                    pass
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


def check_generators(state: dict[str, Any], generators: list[torch.Generator]) -> None:
    """Refuse states of generators that these cannot take.

    Raises:
        ValueError: Why.
    """
    states = state.get("generators", [])
    if not isinstance(states, list) or len(states) != len(generators):
        raise ValueError(f"states of {len(generators)} generators were expected, got {states!r}"[:200])
    for its in states:
        _check_generator(its)


def check_drawn(state: dict[str, Any]) -> None:
    """Refuse what is no state of the global generator.

    Raises:
        ValueError: Why.
    """
    for name, its in state.items():
        if name.startswith("drawn"):
            _check_generator(its)


def _check_generator(state: Any) -> None:
    if not isinstance(state, str):
        raise ValueError(f"the state of a generator is a string, got {state!r}"[:200])
    try:
        torch.Generator().set_state(unpacked(state))
    except RuntimeError as error:
        raise ValueError(f"the state of a generator is broken: {error}"[:300]) from None


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


def apart(things: Sequence[Any], shared: Sequence[Any] = ()) -> list[Any]:
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
        if is_stateful(part):
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


def keys_of(sampler: Any, open_keys: Callable[[], Iterator[Any]], **how: Any) -> Any:
    """The keys of one epoch of `sampler`, that can be had again: with its state when it tells one, else drawn.

    Args:
        sampler: A sampler or batch sampler.
        open_keys: Begins an epoch of it.
        how: See `Drawn`.
    """
    for part in chain_of(sampler):
        if is_stateful(part):
            return _Stateful(part, open_keys, resumed=how.get("resumed", False))
    alone = is_repeatable(sampler)
    return Drawn(open_keys, generators_of(sampler), uses_global=draws_globally(sampler), alone=alone, **how)


class _Stateful:
    """The keys of a sampler that tells its state, which may stand behind a batch sampler that reads no further."""

    def __init__(self, sampler: Any, open_keys: Callable[[], Iterator[Any]], *, resumed: bool) -> None:
        self.__wrapped__ = sampler
        self._keys = Drawn(open_keys, [], uses_global=False, resumed=resumed)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def state_dict(self) -> Any:
        return self.__wrapped__.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.__wrapped__.load_state_dict(state)
