"""States of users' objects come back as they were: tensors, arrays, tuples, bytes, and keys that are no strings."""

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from aioloader import DataLoader, Pipeline, StateError
from aioloader.core.user_state import decoded, encoded
from aioloader.testing import assert_resumes_exactly
from aioloader.testing.resume import _same
from tests._states import contents_of, edited

STATES: dict[str, Any] = {
    "plain": {"at": 3, "parts": [1, 2.5, None, True, "a"], "deep": {"x": []}},
    "tuple": {"at": (1, (2, [3]))},
    "int keys": {0: "a", 1: {"b": 2}, (1, 2): 3},
    "odd keys": {"~tensor": [1], "x": {"~": 1}},
    "bytes": {"b": b"\x00\xff"},
    "sets": {"seen": {1, 2}, "frozen": frozenset("ab")},
    "python's generator": random.Random(3).getstate(),
    "torch's generator": {"g": torch.Generator().manual_seed(3).get_state()},
    "tensors": [
        torch.arange(6).reshape(2, 3),
        torch.tensor(1.5),
        torch.zeros(0, 2),
        torch.ones(2, dtype=torch.bfloat16),
    ],
    "bools": torch.tensor([True, False]),
    "arrays": [np.arange(6.0).reshape(2, 3), np.zeros((0, 2), np.int8), np.array(3)],
    "numpy's numbers": [np.int64(3), np.float32(0.1), np.bool_(True)],
    "numpy's generator": np.random.default_rng(3).bit_generator.state,
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back_as_it_was(name: str) -> None:
    """Through JSON, and by type."""
    text = json.dumps(encoded(STATES[name]))
    assert _same(decoded(json.loads(text)), STATES[name])


def test_it_shares_nothing() -> None:
    """What the object does with its state later does not change it."""
    state: dict[str, Any] = {"parts": [1], "tensor": torch.zeros(2)}
    kept = encoded(state)
    state["parts"].append(2)
    state["tensor"] += 1
    assert decoded(kept)["parts"] == [1]
    assert decoded(kept)["tensor"].tolist() == [0, 0]
    decoded(kept)["tensor"].add_(1)
    assert decoded(kept)["tensor"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "state", [object(), [np.array([object()])], torch.eye(2).to_sparse(), {"f": print}, np.array(["a"])]
)
def test_what_has_no_such_form_is_refused(state: Any) -> None:
    with pytest.raises(TypeError):
        encoded(state)


@pytest.mark.parametrize(
    "broken",
    [
        {"~what": 1},
        {"~tensor": ["float33", [1], ""]},
        {"~tensor": ["nn", [1], ""]},
        {"~tensor": ["float32", [2], "AAAA"]},
        {"~tensor": ["float32", [-1, 1 << 62], "AAAAAA=="]},
        {"~array": ["O", [1], "AAAAAAAAAAA="]},
        {"~array": ["<f4", [3], "AAAAAA=="]},
        {"~array": 3},
        {"~bytes": "?"},
        {"~dict": [1]},
        {"~set": [[]]},
    ],
)
def test_a_broken_one_is_an_error_of_its_own(broken: Any) -> None:
    with pytest.raises(ValueError, match="broken"):
        decoded({"deep": [broken]})


class Noise(IterableDataset[float]):
    """Draws from a generator of its own, whose state is a tensor, and counts by tuples and numbers."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.counts: dict[Any, Any] = {0: 0}
        self.start: Any = None

    def __iter__(self) -> Iterator[float]:
        if self.start is None:
            self.generator.manual_seed(1)
            self.counts = {0: 0}
        else:
            self.generator.set_state(self.start["generator"])
            self.counts = {key: value[0] for key, value in self.start["counts"].items()}
            self.start = None
        while self.counts[0] < 20:
            self.counts[0] += 1
            yield torch.rand(1, generator=self.generator).item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "counts": {key: (value,) for key, value in self.counts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state


def test_a_dataset_with_tensors_in_its_state_resumes_exactly() -> None:
    """Nothing is read again."""
    for make in (
        lambda **workers: DataLoader(Noise(), 3, **workers),
        lambda **_: Pipeline(Noise()).map(float).batch(3),
    ):
        states = assert_resumes_exactly(make, variants=[{}, {"num_workers": 2}])
        assert {state["guarantee"] for state in states} == {"exact"}


def test_a_broken_state_of_a_dataset_is_refused() -> None:
    loader: DataLoader[Any] = DataLoader(Noise(), 3)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    cursor = contents_of(state)["cursor"]
    cursor[0]["state"]["generator"]["~tensor"][0] = "float33"
    with pytest.raises(StateError, match="cursor"):
        loader.load_state_dict(edited(state, cursor=cursor))
