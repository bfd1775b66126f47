"""`examples/torchtitan_loader.py`, made, iterated, saved and loaded as torchtitan does it, which is not installed."""

import json
import random
import runpy
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.stateful import Stateful

from aioloader import Pipeline

EXAMPLE = Path(__file__).parent.parent / "examples" / "torchtitan_loader.py"
CONTEXT, TOKENS = 24, 64
Batch = tuple[dict[str, Tensor], Tensor]


class FakeBaseDataLoader(Stateful, ABC):
    """The protocol of torchtitan at commit b5bcd76: `Config.build`, `__iter__`, the state, and `close`."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        owner: ClassVar[Any] = None

        def build(self, **arguments: Any) -> Any:
            assert not arguments.keys() & self.__dataclass_fields__.keys()
            return self.owner(config=replace(self), **arguments)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        assert "__slots__" in vars(cls.Config)
        cls.Config.owner = cls

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the example's `Config`."""
    names = ["torchtitan", "torchtitan.components", "torchtitan.components.data", "torchtitan.components.data.loader"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    setattr(sys.modules[names[-1]], "BaseDataLoader", FakeBaseDataLoader)  # noqa: B010
    return runpy.run_path(str(EXAMPLE))["PackedLoader"].Config


def tokens_of(document: int) -> list[int]:
    """What the tokenizer makes of it: token `t` of document `d` is `1000 * d + t`."""
    return [1000 * document + token for token in range(random.Random(document).randint(1, 40))]


class Tokenizer:
    def encode(self, text: str) -> list[int]:
        return tokens_of(int(text))


def documents(tokenizer: Tokenizer) -> Pipeline[Any]:
    return Pipeline([str(number) for number in range(60)]).shuffle(seed=1).map(tokenizer.encode)


def ranks(config: Any, dp_world_size: int) -> list[Any]:
    """The loaders as a trainer makes them."""
    context = {"max_context_length": CONTEXT, "num_tokens_per_batch": TOKENS, "tokenizer": Tokenizer()}
    return [config.build(dp_world_size=dp_world_size, dp_rank=rank, **context) for rank in range(dp_world_size)]


def steps_of(loaders: list[Any], steps: int | None = None) -> list[list[Batch]]:
    """What each rank trains on, a rank after the other: nobody waits for another."""
    found = []
    for loader in loaders:
        iterator = iter(loader)
        found.append(list(islice(iterator, steps)))
    return found


def in_order(found: list[list[Batch]]) -> list[list[int]]:
    """The tokens of rows as they were dealt."""
    return [batch[0]["input"].tolist() for step in zip(*found, strict=True) for batch in step]


def test_a_batch_is_what_the_trainer_takes(config: Any) -> None:
    """Inputs, labels, and positions that begin at 0 in each document, and in the padding."""
    (found,) = steps_of(ranks(config(documents=documents, repeat=False), 1))
    for inputs, labels in found:
        ids, positions = inputs["input"], inputs["positions"]
        assert ids.shape == positions.shape == labels.shape == (TOKENS,)
        assert positions.dtype == ids.dtype == labels.dtype == torch.int64
        starts = (positions == 0).nonzero().flatten().tolist()
        assert starts[0] == 0
        for begin, end in zip(starts, [*starts[1:], TOKENS], strict=True):
            assert positions[begin:end].tolist() == list(range(end - begin))
            if labels[begin] == -100:
                assert (end, set(labels[begin:].tolist())) == (TOKENS, {-100})
            else:
                assert end - begin <= CONTEXT
                assert torch.equal(labels[begin:end], ids[begin:end] + 1)


def test_ranks_end_together_and_have_each_token_once(config: Any) -> None:
    """Rows are dealt whole, so nobody asks anybody. What is left over is dropped, or filled from the beginning."""
    expected = Counter(token for number in range(60) for token in tokens_of(number)[1:])
    for world_size in (1, 2, 3):
        for even in ("drop", "pad"):
            found = steps_of(ranks(config(documents=documents, repeat=False, even=even), world_size))
            assert len({len(steps) for steps in found}) == 1
            labels = Counter(token for steps in found for _, row in steps for token in row.tolist() if token != -100)
            if even == "drop":
                assert labels <= expected
                assert (expected - labels).total() < TOKENS * world_size
            else:
                assert labels.keys() == expected.keys()


def test_what_is_too_long_is_split_or_dropped(config: Any) -> None:
    """Dropped: none of it is there."""
    (found,) = steps_of(ranks(config(documents=documents, repeat=False, too_long="drop"), 1))
    there = {token // 1000 for _, labels in found for token in labels.tolist() if token != -100}
    assert there == {number for number in range(60) if 2 <= len(tokens_of(number)) <= CONTEXT + 1}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_another_number_of_ranks_goes_on(config: Any, tmp_path: Path) -> None:
    """As the trainer saves and loads it: each rank under the same name, by torch.distributed.checkpoint."""
    (whole,) = steps_of(ranks(config(documents=documents), 1), 36)
    seen: list[list[int]] = []
    for part, world_size in enumerate((2, 3, 1, 4)):
        loaders = ranks(config(documents=documents), world_size)
        if part:
            for loader in loaders:
                state_dict_loader.load({"dataloader": loader}, checkpoint_id=tmp_path / str(part - 1), no_dist=True)
        seen += in_order(steps_of(loaders, 3))
        states = [loader.state_dict() for loader in loaders]
        assert all(state == states[0] for state in states)
        assert json.loads(states[0]["state"])["guarantee"] == "exact"
        state_dict_saver.save({"dataloader": loaders[-1]}, checkpoint_id=tmp_path / str(part), no_dist=True)
        for loader in loaders:
            loader.close()
    assert seen == [batch[0]["input"].tolist() for batch in whole[: len(seen)]]
    assert len(seen) == 3 * (2 + 3 + 1 + 4)


def test_an_empty_state_and_a_validator_are_fine(config: Any) -> None:
    """A validator makes the loader of its own `Config`, finite; a checkpoint without the loader begins anew."""
    endless = config(documents=documents)
    (loader,) = ranks(replace(endless, repeat=False), 1)
    loader.load_state_dict({})
    first, second = steps_of([loader, loader])
    assert in_order([first]) != in_order([second])  # another epoch
    assert sorted(token for row in in_order([first]) for token in row if token) == sorted(
        token for row in in_order([second]) for token in row if token
    )
    (loader,) = ranks(endless, 1)
    assert len(steps_of([loader], len(first) + 5)[0]) == len(first) + 5
    loader.close()
