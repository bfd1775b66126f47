"""`assert_resumes_exactly`: every state of a loader leads to exactly what was to come."""

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

__all__ = ["assert_resumes_exactly"]

Face = Literal["for", "async for"]

MOST_OUTCOMES: Final = 10_000
"""An epoch with more does not end, as far as a test is concerned."""


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
    """Take the state before every batch, restore a fresh loader from each, and compare all that comes later.

    The states go through JSON, and all have one shape: the same keys, and strings and integers as values, so that they
    can be loaded in place. What is compared: the later batches byte for byte (tensors, arrays, nested), errors by
    type and text, the epochs behind, and the later states. torch's global random state is put back along with each
    state, as a training program does with its checkpoint; that the loader itself leaves it alone is checked too.

    Args:
        make_loader: Makes a loader, the same each time; called with the items of a variant as keyword arguments.
        variants: What may differ between the loader that gave the state and the one that takes it: concurrency,
            workers. The first one gives the states, the restored loaders take all in turn.
        faces: By which the restored loaders are iterated, in turn; the states are taken by `for`.
        epochs: How many are compared, from the first one on.
        limit: States to try: so many, evenly spread; None: all.
        samples: For loaders that keep no order: the samples of a batch. Then the samples before a state and those after
            it must be those of the whole epoch, each as often; and later states may differ.
        states: Compare later states too; False where a source of somebody else's says the same place in several ways.

    Returns:
        The states, for a look at them.

    Raises:
        AssertionError: Something differs; says after how many batches of which epoch the state was taken.
    """
    before = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReplayWarning)
            whole = _whole(make_loader(**variants[0]), epochs)
            ways = cycle(product(variants, faces))
            for number in _spread(len(whole.points), limit):
                point = whole.points[number]
                variant, face = next(ways)
                where = f"resumed after {point.batches} outcomes of epoch {point.epoch}, {dict(variant)!r}, by {face!r}"
                torch.set_rng_state(point.rng)
                loader = make_loader(**variant)
                loader.load_state_dict(json.loads(point.state))
                if states and samples is None:
                    _same_state(loader.state_dict(), point.state, f"{where}: the state before the first batch")
                rest = _collect(loader, face, epochs - point.epoch - _is_an_end(whole, point))
                _compare(whole, point, rest, where, samples, states)
    finally:
        torch.set_rng_state(before)
    return [json.loads(point.state) for point in whole.points]


@dataclass
class _Point:
    """A state, as JSON, and where it was taken."""

    state: str
    epoch: int
    batches: int
    rng: torch.Tensor


@dataclass
class _Epochs:
    """What an iteration gave.

    Attributes:
        outcomes: Batches and errors, by epoch.
        states: Behind each of them, by epoch.
        points: States to resume from.
    """

    outcomes: list[list[Any]] = field(default_factory=list)
    states: list[list[str]] = field(default_factory=list)
    points: list[_Point] = field(default_factory=list)

    def begin(self) -> None:
        self.outcomes.append([])
        self.states.append([])

    def add(self, outcome: Any, loader: Any) -> None:
        if len(self.outcomes[-1]) >= MOST_OUTCOMES:
            raise AssertionError(f"the epoch does not end: {MOST_OUTCOMES} outcomes, the last one {outcome!r}")
        self.outcomes[-1].append(outcome)
        self.states[-1].append(json.dumps(loader.state_dict()))

    def mark(self, loader: Any) -> None:
        state = loader.state_dict()
        text = json.dumps(state)
        assert json.loads(text) == state, f"JSON changes the state {state!r}"
        _same_shape(state, json.loads(self.points[0].state) if self.points else state)
        self.points.append(_Point(text, len(self.outcomes) - 1, len(self.outcomes[-1]), torch.get_rng_state()))


def _whole(loader: Any, epochs: int) -> _Epochs:
    """All epochs, with a point before and behind every batch."""
    found = _Epochs()
    for _ in range(epochs):
        found.begin()
        found.mark(loader)
        iterator = iter(loader)
        while True:
            try:
                outcome = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                outcome = error
            found.add(outcome, loader)
            found.mark(loader)
        del iterator
    loader.close()
    return found


def _collect(loader: Any, face: Face, epochs: int) -> _Epochs:
    if face == "async for":
        return asyncio.run(_collect_async(loader, epochs))
    found = _Epochs()
    for _ in range(epochs):
        found.begin()
        iterator = iter(loader)
        while True:
            try:
                outcome = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                outcome = error
            found.add(outcome, loader)
        del iterator
    loader.close()
    return found


async def _collect_async(loader: Any, epochs: int) -> _Epochs:
    found = _Epochs()
    for _ in range(epochs):
        found.begin()
        iterator = aiter(loader)
        while True:
            try:
                outcome = await anext(iterator)
            except StopAsyncIteration:
                break
            except Exception as error:
                outcome = error
            found.add(outcome, loader)
        del iterator
    await loader.aclose()
    return found


def _spread(count: int, limit: int | None) -> Sequence[int]:
    if limit is None or limit >= count:
        return range(count)
    return sorted({round(number * (count - 1) / max(1, limit - 1)) for number in range(limit)})


def _is_an_end(whole: _Epochs, point: _Point) -> bool:
    """Whether the state is that of a last batch: it leads to the beginning of the next epoch."""
    return 0 < point.batches == len(whole.outcomes[point.epoch])


def _compare(
    whole: _Epochs,
    point: _Point,
    rest: _Epochs,
    where: str,
    samples: Callable[[Any], Iterable[Hashable]] | None,
    compare_states: bool,
) -> None:
    epoch, batches = point.epoch, point.batches
    outcomes = whole.outcomes[epoch]
    expected = [outcomes[batches:], *whole.outcomes[epoch + 1 :]]
    states = [whole.states[epoch][batches:], *whole.states[epoch + 1 :]]
    got = [list(mine) for mine in rest.outcomes]
    # A source that failed is tried again, and may have failed again: then that is no outcome of its own.
    failures = [outcome for outcome in outcomes[:batches] if isinstance(outcome, BaseException)]
    again = [at for at, outcome in enumerate(got[0] if got else ()) if any(_same(outcome, one) for one in failures)]
    if _is_an_end(whole, point):
        del expected[0], states[0]
        if again and len(again) == len(got[0]):
            return
    elif len(got[0]) > len(expected[0]):
        for at in reversed(again):
            if not any(_same(got[0][at], one) for one in expected[0]):
                del got[0][at]
                compare_states = False  # they count it
    if samples is not None:
        for number, (mine, its) in enumerate(zip(got, expected, strict=True)):
            assert _counted(mine, samples) == _counted(its, samples), f"{where}: epoch {number} behind it has others"
        return
    for number, (mine, its) in enumerate(zip(got, expected, strict=True)):
        for at, (one, other) in enumerate(zip(mine, its, strict=False)):
            assert _same(one, other), f"{where}: outcome {at} of epoch {number} behind it is {one!r}, not {other!r}"
        assert len(mine) == len(its), f"{where}: epoch {number} behind it has {len(mine)} outcomes, not {len(its)}"
        if compare_states:
            for at, (state, then) in enumerate(zip(rest.states[number], states[number], strict=True)):
                _same_state(json.loads(state), then, f"{where}: the state behind outcome {at} of epoch {number}")


def _same_state(state: dict[str, Any], text: str, what: str) -> None:
    expected = json.loads(text)
    different = [key for key in expected if state.get(key) != expected[key]]
    shown = "; ".join(f"{key} is {state.get(key)!r}, not {expected[key]!r}"[:300] for key in different)
    assert not different, f"{what}: {shown}"


def _same_shape(state: dict[str, Any], first: dict[str, Any]) -> None:
    shape, expected = _shape_of(state), _shape_of(first)
    assert shape == expected, f"the shape of the state changes from {expected} to {shape}"


def _shape_of(value: Any) -> Any:
    """Keys, and types of values."""
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
