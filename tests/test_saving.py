"""The ways of saving that `assert_resumes_exactly` tries."""

from collections import Counter
from typing import Any

import pytest

from aioloader import DataLoader, Pipeline
from aioloader.testing import assert_resumes_exactly, resume
from aioloader.testing.saving import WAYS, load_by_way


def shuffled() -> Pipeline:
    return Pipeline(range(20)).shuffle(seed=1).batch(4)


@pytest.mark.parametrize("way", WAYS)
def test_a_state_is_the_same_again(way: str) -> None:
    loader = shuffled()
    next(iter(loader))
    other = shuffled()
    load_by_way(way, loader.state_dict(), other)
    assert other.state_dict() == loader.state_dict()


@pytest.mark.parametrize("faces", [("for",), ("for", "async for")])
def test_all_ways_are_tried(faces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dear one for some states, on each face."""
    tried = Counter[str]()

    def load(way: str, state: dict[str, Any], loader: Any) -> None:
        tried[way] += 1
        load_by_way(way, state, loader)

    monkeypatch.setattr(resume, "load_by_way", load)
    states = assert_resumes_exactly(shuffled, faces=faces)
    assert tried.keys() == set(WAYS)
    assert tried.total() == len(states)
    assert tried[WAYS[2]] == len(faces)


def test_a_state_that_only_json_keeps_is_found_out() -> None:
    """A library that loads in place forgets what the state of a fresh loader has not."""

    class Forgetful:
        """Its state holds more once it has begun."""

        def __init__(self) -> None:
            self.loader = DataLoader(range(20), 4)

        def __iter__(self) -> Any:
            return iter(self.loader)

        def state_dict(self) -> dict[str, Any]:
            state = self.loader.state_dict()
            return state if state["batches"] == 0 else state | {"more": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loader.load_state_dict(state)

        def close(self) -> None:
            self.loader.close()

    with pytest.raises(AssertionError, match="the shape of the state changes"):
        assert_resumes_exactly(Forgetful, faces=("for",))
