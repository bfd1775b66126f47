"""A default collate that takes less time than a way into a thread is called on the loop of `for`, and nowhere else."""

import asyncio
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils.data._utils import collate as torch_collate

from aioloader import Pipeline
from aioloader.core.entry import Entry
from aioloader.engine import thread_step
from aioloader.engine.sync_delivery import SyncDelivery
from aioloader.executors.chunk import Call
from aioloader.executors.processes.stacked import stacked
from aioloader.stages import collate
from aioloader.stages.collate import are_plain
from aioloader.testing import Gate
from tests._support import Face, Steps, collect, notes, on_both_faces

BATCHES = 100


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which the default collate was called."""
    names: list[str] = []
    called = collate.Collate.__call__

    def noting(self: collate.Collate, samples: Any, keys: Any = None) -> Any:
        names.append(threading.current_thread().name)
        return called(self, samples, keys)

    monkeypatch.setattr(collate.Collate, "__call__", noting)
    return names


def take_as_light(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Whatever takes less than so many seconds."""
    monkeypatch.setattr(thread_step, "LIGHT_SECONDS", seconds)


def test_a_light_collate_is_called_on_the_loop(monkeypatch: pytest.MonkeyPatch, threads: list[str]) -> None:
    """From the first one on."""
    take_as_light(monkeypatch, 60.0)
    batches = list(Pipeline(range(4 * BATCHES)).batch(4))
    assert torch.cat(batches).tolist() == list(range(4 * BATCHES))
    assert threads == ["aioloader-loop"] * BATCHES


LARGE: dict[str, Callable[[int], Any]] = {
    "tensors": lambda row: torch.full((thread_step.LIGHT_BYTES // 4,), row),
    "inside": lambda row: {"name": str(row), "x": [np.full(thread_step.LIGHT_BYTES, row, "u1")]},
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in LARGE.items()])
def test_of_large_samples_the_first_one_shows_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, threads: list[str], make: Callable[[int], Any]
) -> None:
    """In a thread."""
    take_as_light(monkeypatch, 60.0)
    assert len(list(Pipeline(range(40)).map(make).batch(4))) == 10
    assert threads[0].startswith("aioloader-collate")


def test_one_that_takes_longer_is_called_in_threads(monkeypatch: pytest.MonkeyPatch, threads: list[str]) -> None:
    """So that the loop goes on meanwhile. The first ones have shown it."""
    take_as_light(monkeypatch, 0.0)
    list(Pipeline(range(4 * BATCHES)).batch(4))
    assert_first_hop_on_loop(threads)


def assert_first_hop_on_loop(threads: list[str]) -> None:
    """And all that follows in threads."""
    here = [name == "aioloader-loop" for name in threads]
    assert here[0]
    assert not any(here[16:])


def test_a_loop_of_the_users_is_left_alone(monkeypatch: pytest.MonkeyPatch, threads: list[str]) -> None:
    """There it would be called under what the user has set for that thread, and hold up his tasks."""
    take_as_light(monkeypatch, 60.0)

    async def main() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [batch async for batch in Pipeline(range(4 * BATCHES)).batch(4)]

    batches = asyncio.run(main())
    assert not any(batch.is_inference() for batch in batches)
    assert all(name.startswith("aioloader-collate") for name in threads)


def test_what_a_suspended_function_has_set_is_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's contexts belong to a thread, and here that is the one of our loop: no batch is made under them."""
    take_as_light(monkeypatch, 60.0)

    async def holds(row: int) -> int:
        with torch.inference_mode(), torch.device("meta"):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return row

    batches = list(Pipeline(range(2000)).map(holds, concurrency=64).batch(4))
    assert not any(batch.is_inference() or batch.is_meta for batch in batches)
    assert torch.cat(batches).tolist() == list(range(2000))


def test_a_users_function_is_called_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """However quick it is: nobody knows what it waits for."""
    take_as_light(monkeypatch, 60.0)
    names: list[str] = []

    def own(samples: list[int]) -> torch.Tensor:
        names.append(threading.current_thread().name)
        return torch.tensor(samples)

    list(Pipeline(range(40)).batch(4, collate_fn=own))
    assert all(name.startswith("aioloader-collate") for name in names)


class Lazy(Mapping[str, int]):
    """Reads when it is asked, maybe from a file."""

    asked: ClassVar[set[str]] = set()

    def __init__(self, row: int) -> None:
        self._row = row

    def __getitem__(self, key: str) -> int:
        self.asked.add(threading.current_thread().name)
        return self._row

    def __iter__(self) -> Iterator[str]:
        return iter(["row"])

    def __len__(self) -> int:
        return 1


class Marked(torch.Tensor):
    """A class of the user's."""


class Pair(NamedTuple):
    """Likewise."""

    first: int
    second: int


def test_methods_of_the_users_are_called_in_threads(monkeypatch: pytest.MonkeyPatch, threads: list[str]) -> None:
    """The default collate calls those of samples. On the loop, they would wait there, or find another loop running."""
    take_as_light(monkeypatch, 60.0)
    Lazy.asked.clear()
    assert len(list(Pipeline(range(BATCHES)).map(Lazy).batch(1))) == BATCHES
    assert "aioloader-loop" not in Lazy.asked
    assert "aioloader-loop" not in threads


KNOWN: dict[str, Callable[[int], Any]] = {
    "numbers": float,
    "NumPy scalars": np.float32,
    "tensors": lambda row: torch.tensor([row]),
    "arrays": lambda row: np.array([row]),
    "tuples": lambda row: (row, torch.tensor(row), str(row)),
    "nested": lambda row: {"x": [row, (row, {"y": row})]},
    "text": str,
}
OTHERS: dict[str, Callable[[int], Any]] = {
    "mappings": Lazy,
    "inside": lambda row: {"x": (row, [Lazy(row)])},
    "one of them": lambda row: Lazy(row) if row % 4 == 3 else {"row": row},
    "tensor subclass": lambda row: torch.tensor([row]).as_subclass(Marked),
    "named tuples": lambda row: Pair(row, row),
    "numbers of the user's": type("Number", (int,), {}),
    "deep": lambda row: [[[[[row]]]]],
}


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in KNOWN.items()])
def test_samples_of_known_classes_are_plain(make: Callable[[int], Any]) -> None:
    """Those that torch's collate has functions for."""
    assert are_plain([make(row) for row in range(8)])


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in OTHERS.items()])
def test_others_are_not(make: Callable[[int], Any]) -> None:
    """Whatever its methods do, the loop does not."""
    assert not are_plain([make(row) for row in range(8)])


def test_a_mapped_file_is_not_plain(tmp_path: Path) -> None:
    """To copy from it is to read the file."""
    assert not are_plain([np.memmap(tmp_path / "rows", "u1", "w+", shape=4)])


@pytest.mark.parametrize("make", [int, Lazy], ids=["known", "of the user's"])
def test_of_stacked_samples_what_is_not_stacked_counts(make: Callable[[int], Any]) -> None:
    """They come from a worker process."""
    samples = [(torch.full((1 << 18,), float(row)), make(row)) for row in range(4)]
    chunk = stacked(samples, 4, lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype))
    assert are_plain(pickle.loads(pickle.dumps(chunk))) == (make is int)


def test_one_that_has_waited_sends_the_next_ones_into_threads(
    monkeypatch: pytest.MonkeyPatch, threads: list[str]
) -> None:
    """Pages of a mapped file cost no time of the processor: only the clock on the wall tells."""
    take_as_light(monkeypatch, 60.0)
    monkeypatch.setattr(thread_step, "CHUNK_SECONDS", 0.0)  # all of them have
    list(Pipeline(range(4 * BATCHES)).batch(4))
    assert_first_hop_on_loop(threads)


def test_threads_take_samples_while_the_loop_looks_at_them() -> None:
    """One that was woken for a sample that is not plain goes on with the next ones, meanwhile."""

    def light(value: object, most_bytes: float) -> bool:
        if step.inbox:
            step.inbox.popleft()  # as a thread does, between two looks
        return True

    step = thread_step.ThreadStep([Call(list, predicate=False, label="collate")], 1, light=light)
    step._run = Mock(private_loop=True)
    step._cpu_each = 0.0
    step.inbox.extend(Entry([row], row, row) for row in range(4))
    assert step._may_work_here
    assert not step.inbox


@on_both_faces
def test_errors_come_at_their_place(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the note that names the samples; the epoch goes on."""
    take_as_light(monkeypatch, 60.0)
    rows: list[Any] = [torch.zeros(2 if row != 41 else 3) for row in range(80)]
    with Steps(Pipeline(rows).batch(4), face) as steps:
        outcomes = steps.outcomes()
    error = outcomes.pop(10)
    assert isinstance(error, RuntimeError)
    assert "key 41" in notes(error)
    assert [batch.shape for batch in outcomes] == [(4, 2)] * 19


@on_both_faces
def test_a_function_for_a_type_is_the_users_too(
    face: Face, monkeypatch: pytest.MonkeyPatch, threads: list[str]
) -> None:
    """It is called in threads; what ends programs is raised in the loop body."""
    take_as_light(monkeypatch, 60.0)

    class Word(str):
        __slots__ = ()

    def exits(words: list[Word], *, collate_fn_map: object = None) -> list[str]:
        if "20" in words:
            raise SystemExit(3)
        return list(words)

    monkeypatch.setitem(torch_collate.default_collate_fn_map, Word, exits)
    with pytest.raises(SystemExit, match="3"):
        collect(Pipeline([Word(row) for row in range(40)]).batch(4), face)
    assert all(name.startswith("aioloader-collate") for name in threads)


def test_the_first_batch_is_given_before_more_samples_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the thread that loads these would have the interpreter first, for all of its hop."""
    log: list[str] = []

    def noting(owner: type, name: str, word: Callable[[Any], str | None]) -> None:
        real = getattr(owner, name)

        def noted(self: Any, *args: Any) -> Any:
            log.extend(filter(None, [word(self)]))
            return real(self, *args)

        monkeypatch.setattr(owner, name, noted)

    noting(collate.Collate, "__call__", lambda _: "collated")
    noting(SyncDelivery, "_pump", lambda delivery: "given" if delivery.run.output.held else None)
    noting(thread_step.ThreadStep, "dispatch", lambda step: "begun" if "double" in step.meter.name else None)
    gate = Gate()

    def double(row: int) -> int:
        gate.pass_sync(row)
        return 2 * row

    loader = Pipeline(range(64)).map(double, concurrency=1).batch(4)
    with Steps(loader, "for") as steps:
        asked = steps.ask()
        steps.until_arrived(gate, 1)
        gate.open_all()
        assert asked().tolist() == [0, 2, 4, 6]
        assert len(steps.rest()) == 15
    collated = log.index("collated")
    assert "begun" not in log[collated : log.index("given", collated)]
