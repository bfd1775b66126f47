"""`assert_resumes_exactly`: checks that a loader can resume from each of its states."""

import asyncio
import json
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, product
from typing import Any, Final, Literal

import numpy as np
import torch

from aioloader.errors import ReplayWarning
from aioloader.testing.saving import WAYS, load_by_way

__all__ = ["assert_resumes_exactly"]

Face = Literal["for", "async for"]

MAX_OUTCOMES: Final = 10_000
"""An epoch with more outcomes is taken to be endless."""


def assert_resumes_exactly(
    make_loader: Callable[..., Any],
    *,
    variants: Sequence[Mapping[str, Any]] = ({},),
    faces: Sequence[Face] = ("for", "async for"),
    epochs: int = 2,
    limit: int | None = None,
    samples: Callable[[Any], Iterable[Hashable]] | None = None,
    states: bool = True,
) -> list[dict[str, Any]]:
    """Take the state before every batch, load each into a new loader, and compare everything that comes later.

    The states go through JSON and `torch.save` in turn, and some through `torch.distributed.checkpoint`. They must all
    have one shape: the same keys, and strings and integers as values, so that they can be loaded in place. The later
    batches are compared byte for byte (tensors, arrays, nested), errors by type
    and message, and the later states. torch's global random state is restored with each state, as a training program
    does with its checkpoint.

    Args:
        make_loader: Makes a loader, the same each time; called with the items of a variant as keyword arguments.
        variants: What may differ between the loader that a state is from and the one that loads it, for instance
            concurrency and workers. States are taken with the first variant, and loaded with all in turn.
        faces: How the resumed loaders are iterated, in turn; states are taken under `for`.
        epochs: How many epochs are compared, from the first one on.
        limit: How many states to try, evenly spread; None: all.
        samples: For loaders without a fixed order, returns the samples of a batch. Then the samples before and after a
            state must be those of the whole epoch, each as often, and later states may differ.
        states: Whether to compare later states. Pass False if a source has several states for the same place.

    Returns:
        The states.

    Raises:
        AssertionError: Something differs. The message says after how many batches of which epoch the state was taken.
    """
    rng_before = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReplayWarning)
            full = _iterate(make_loader(**variants[0]), "for", _EpochRecord(takes_points=True), epochs)
            ways = cycle(product(variants, faces))
            tried = _spread(len(full.points), limit)
            for count, number in enumerate(tried):
                point = full.points[number]
                variant, face = next(ways)
                way = _way(count, len(tried), len(variants) * len(faces))
                where = f"resumed after {point.batches} outcomes of epoch {point.epoch}, {dict(variant)!r}, by {face!r}"
                where += f", saved by {way}"
                torch.set_rng_state(point.rng)
                loader = make_loader(**variant)
                load_by_way(way, json.loads(point.state), loader)
                if states and samples is None:
                    _same_state(loader.state_dict(), point.state, f"{where}: the state before the first batch")
                resumed = _iterate(loader, face, _EpochRecord(), epochs - point.epoch - full.ends_at(point))
                _compare(full, point, resumed, where, samples, states)
    finally:
        torch.set_rng_state(rng_before)
    return [json.loads(point.state) for point in full.points]


@dataclass
class _Point:
    """A state, as JSON, and where it was taken."""

    state: str
    epoch: int
    batches: int
    rng: torch.Tensor


@dataclass
class _EpochRecord:
    """Records the epochs of a loader.

    Attributes:
        takes_points: Whether it records points.
        outcomes: Batches and errors, by epoch.
        states: The state after each of them, by epoch.
        points: States to resume from: before and after each outcome.
    """

    takes_points: bool = False
    outcomes: list[list[Any]] = field(default_factory=list)
    states: list[list[str]] = field(default_factory=list)
    points: list[_Point] = field(default_factory=list)

    def begin(self, loader: object) -> None:
        self.outcomes.append([])
        self.states.append([])
        self._take_point(loader)

    def add(self, outcome: Any, loader: Any) -> None:
        if len(self.outcomes[-1]) >= MAX_OUTCOMES:
            raise AssertionError(f"the epoch does not end: {MAX_OUTCOMES} outcomes, the last one {outcome!r}")
        self.outcomes[-1].append(outcome)
        self.states[-1].append(json.dumps(loader.state_dict()))
        self._take_point(loader)

    def _take_point(self, loader: Any) -> None:
        if not self.takes_points:
            return
        state = loader.state_dict()
        text = json.dumps(state)
        assert json.loads(text) == state, f"JSON changes the state {state!r}"
        _same_shape(state, json.loads(self.points[0].state) if self.points else state)
        self.points.append(_Point(text, len(self.outcomes) - 1, len(self.outcomes[-1]), torch.get_rng_state()))

    def ends_at(self, point: _Point) -> bool:
        """Whether the point is after the last batch of an epoch: its state leads to the next epoch."""
        return 0 < point.batches == len(self.outcomes[point.epoch])

    def after(self, point: _Point) -> tuple[list[list[Any]], list[list[str]]]:
        """The outcomes and states that come after `point`, by epoch."""
        epoch, batches = point.epoch, point.batches
        if self.ends_at(point):
            return self.outcomes[epoch + 1 :], self.states[epoch + 1 :]
        return (
            [self.outcomes[epoch][batches:], *self.outcomes[epoch + 1 :]],
            [self.states[epoch][batches:], *self.states[epoch + 1 :]],
        )


def _iterate(loader: Any, face: Face, run: _EpochRecord, epochs: int) -> _EpochRecord:
    if face == "async for":
        asyncio.run(_iterate_async(loader, run, epochs))
        return run
    for _ in range(epochs):
        run.begin(loader)
        iterator = iter(loader)
        while True:
            try:
                outcome = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                outcome = error
            run.add(outcome, loader)
        del iterator
    loader.close()
    return run


async def _iterate_async(loader: Any, run: _EpochRecord, epochs: int) -> None:
    for _ in range(epochs):
        run.begin(loader)
        iterator = aiter(loader)
        while True:
            try:
                outcome = await anext(iterator)
            except StopAsyncIteration:
                break
            except Exception as error:
                outcome = error
            run.add(outcome, loader)
        del iterator
    await loader.aclose()


def _spread(count: int, limit: int | None) -> Sequence[int]:
    if limit is None or limit >= count:
        return range(count)
    return sorted({round(number * (count - 1) / max(1, limit - 1)) for number in range(limit)})


def _way(count: int, tried: int, combinations: int) -> str:
    """How state number `count` of those that are tried is saved.

    By `torch.distributed.checkpoint`, which takes twenty times as long as the others, those in the middle: as many as
    there are combinations of variants and faces, and four at most.
    """
    if 0 <= count - tried // 2 < min(combinations, 4):
        return WAYS[2]
    return WAYS[count // combinations % 2]


def _compare(
    full: _EpochRecord,
    point: _Point,
    resumed: _EpochRecord,
    where: str,
    samples: Callable[[Any], Iterable[Hashable]] | None,
    compare_states: bool,
) -> None:
    expected, states = full.after(point)
    outcomes = [list(epoch) for epoch in resumed.outcomes]
    # A source that failed before the point is tried again, and may fail again. Then the error is not one to expect.
    failures = [one for one in full.outcomes[point.epoch][: point.batches] if isinstance(one, BaseException)]
    if full.ends_at(point):
        if outcomes and outcomes[0] and all(_is_in(one, failures) for one in outcomes[0]):
            return
    elif len(outcomes[0]) > len(expected[0]):
        as_expected = [one for one in outcomes[0] if not _is_in(one, failures) or _is_in(one, expected[0])]
        if len(as_expected) < len(outcomes[0]):
            outcomes[0] = as_expected
            compare_states = False  # states count the repeated errors
    for number, (got, wanted) in enumerate(zip(outcomes, expected, strict=True)):
        if samples is not None:
            same = _counted(got, samples) == _counted(wanted, samples)
            assert same, f"{where}: epoch {number} after it has other samples"
            continue
        for at, (one, other) in enumerate(zip(got, wanted, strict=False)):
            assert _same(one, other), f"{where}: outcome {at} of epoch {number} after it is {one!r}, not {other!r}"
        assert len(got) == len(wanted), f"{where}: epoch {number} after it has {len(got)} outcomes, not {len(wanted)}"
    if samples is None and compare_states:
        _compare_states(resumed.states, states, where)


def _compare_states(got: list[list[str]], expected: list[list[str]], where: str) -> None:
    for number, epochs in enumerate(zip(got, expected, strict=True)):
        for at, (state, other) in enumerate(zip(*epochs, strict=True)):
            _same_state(json.loads(state), other, f"{where}: the state after outcome {at} of epoch {number}")


def _is_in(outcome: object, others: Iterable[Any]) -> bool:
    return any(_same(outcome, other) for other in others)


def _same_state(state: dict[str, Any], text: str, what: str) -> None:
    expected = json.loads(text)
    different = [key for key in expected if state.get(key) != expected[key]]
    shown = "; ".join(f"{key} is {state.get(key)!r}, not {expected[key]!r}"[:300] for key in different)
    assert not different, f"{what}: {shown}"


def _same_shape(state: dict[str, Any], first: dict[str, Any]) -> None:
    shape, expected = _shape_of(state), _shape_of(first)
    assert shape == expected, f"the shape of the state changes from {expected} to {shape}"


def _shape_of(value: object) -> Any:
    """The keys and the types of the values."""
    if isinstance(value, dict) and value:
        return {key: _shape_of(part) for key, part in value.items()}
    assert isinstance(value, str | int | bool), f"a state is made of strings and integers, got {value!r}"
    return type(value).__name__


def _counted(outcomes: Iterable[Any], samples: Callable[[Any], Iterable[Hashable]]) -> Counter[Hashable]:
    return Counter(
        sample
        for outcome in outcomes
        for sample in ([repr(outcome)] if isinstance(outcome, Exception) else samples(outcome))
    )


def _same(one: Any, other: Any) -> bool:
    """Equal in type and content, floats bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
            return False
        first, second = (tensor.detach().cpu().contiguous().flatten() for tensor in (one, other))
        return bool(torch.equal(first.view(torch.uint8), second.view(torch.uint8)))
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and bool(one.tobytes() == other.tobytes())
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, BaseException):
        return str(one) == str(other)
    if isinstance(one, float):
        return np.float64(one).tobytes() == np.float64(other).tobytes()
    return bool(one == other)
