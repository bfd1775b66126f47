"""States that somebody, or a bit, has changed: refused when they are loaded, or as good as any other."""

import contextlib
import copy
import json
import os
import random
import signal
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from obstore.store import MemoryStore
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset, RandomSampler, Sampler

from aioloader import BrokenDataError, DataLoader, Pipeline, StateError
from aioloader.sources import Channel, Files, Lines, Objects, ParquetRows, TarShards
from tests._support import FACES, Face, Steps
from tests.test_resume import AsyncStateful, Stateful, later, numbers, pairs_of

MUTANTS: Final = int(os.environ.get("AIOLOADER_MUTANTS", "12"))
"""Of each kind of loader; a soak run takes thousands."""

MOST_BATCHES: Final = 40

COUNT: Final = 24


class Unequal(Sampler[int]):
    """Somebody's own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))

    def __len__(self) -> int:
        return COUNT


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


class Told(Stateful, IterableDataset[int]):
    """Goes on anywhere."""


async def async_numbers() -> AsyncIterator[int]:
    """Without ever waiting."""
    for number in range(COUNT):
        yield number


def files(folder: Path) -> dict[str, list[str]]:
    """Three of each kind, with eight samples each."""
    made: dict[str, list[str]] = {"txt": [], "tar": [], "gz": [], "parquet": [], "bin": []}
    for kind, paths in made.items():
        for number in range(3):
            path = folder / f"{number}.{'tar.gz' if kind == 'gz' else kind}"
            paths.append(str(path))
            if kind == "txt":
                path.write_text("".join(f"line {number} {at}\n" for at in range(8)))
            elif kind == "parquet":
                pq.write_table(pa.table({"x": list(range(8))}), path, row_group_size=3)
            elif kind == "bin":
                path.write_bytes(bytes(number))
            else:
                with tarfile.open(path, "w:gz" if kind == "gz" else "w") as archive:
                    for at in range(8):
                        member = tarfile.TarInfo(f"{at}.bin")
                        member.size = 700
                        archive.addfile(member, BytesIO(bytes(700)))
    return made


def kinds(folder: Path) -> dict[str, Callable[[], Any]]:
    made = files(folder)
    store = MemoryStore()
    for number in range(COUNT):
        store.put(f"a/{number:03}", b"x")
    keys = range(COUNT)
    data: Any = list(keys)

    def sampled(**arguments: Any) -> Pipeline:
        return Pipeline(keys, sampler=RandomSampler(keys, **arguments))

    return {
        "keys": lambda: Pipeline(keys).shuffle(seed=3).skip(1).take(20).batch(2),
        "ranks": lambda: Pipeline(keys).shuffle(seed=3).shard(1, 2).batch(2),
        "ranks of a stream": lambda: Pipeline(numbers).shard(0, 2).batch(2),
        "ranks, error": lambda: Pipeline(keys).shard(0, 4, even="drop").batch(2),
        "a stream": lambda: Pipeline(numbers).batch(2),
        "an async stream": lambda: Pipeline(async_numbers).batch(2),
        "a stream with a state": lambda: Pipeline(Told(300)).batch(40),
        "an async stream with a state": lambda: Pipeline(AsyncStateful(300)).batch(40),
        "take, skip, enumerate": lambda: Pipeline(numbers).skip(2).enumerate().take(13).batch(2, collate_fn=list),
        "buffer": lambda: Pipeline(keys).shuffle(5, seed=1).batch(2),
        "buffer of a stream": lambda: Pipeline(numbers).shuffle(5, seed=1).batch(2),
        "flat_map": lambda: Pipeline(keys).flat_map(pairs_of).batch(2),
        "unbatch": lambda: Pipeline(keys).batch(4).unbatch().batch(3),
        "repeat": lambda: Pipeline(range(7)).shuffle(seed=0).repeat(3).batch(2),
        "repeat for ever": lambda: Pipeline(range(7)).shuffle(seed=0).repeat().batch(2),
        "repeat twice": lambda: Pipeline(range(3)).repeat(2).shuffle(3).repeat(2).batch(2),
        "mix": lambda: Pipeline.mix([keys, numbers, Pipeline(keys).shuffle(4)], [1, 2, 3]).batch(2),
        "interleave": lambda: Pipeline.interleave(range(3), keys, numbers).batch(2),
        "zip": lambda: Pipeline.zip(keys, Pipeline(keys).shuffle(seed=2)).batch(2),
        "merge": lambda: Pipeline.merge(keys, range(5)).batch(2),
        "ordered=False": lambda: Pipeline(keys).map(later, ordered=False, concurrency=4).batch(2),
        "ordered=False, buffer": lambda: Pipeline(keys).map(later, ordered=False, concurrency=4).shuffle(3).batch(2),
        "filter, drop_if": lambda: Pipeline(keys).filter(bool).drop_if(bool.__call__).batch(2),
        "cache": lambda: Pipeline(numbers).map(int).cache(memory_bytes=1 << 20).batch(2),
        "sampler": lambda: sampled().batch(2),
        "sampler, repeat": lambda: sampled().repeat(2).batch(2),
        "samplers, generators, repeat": lambda: Pipeline.mix(
            [sampled(generator=_generator()).repeat(2), sampled(replacement=True)], [1, 1]
        ).batch(2),
        "somebody's sampler": lambda: Pipeline(keys, sampler=Unequal()).batch(2),
        "Files": lambda: Pipeline(Files(made["bin"])).shuffle(seed=0).repeat(3).batch(2, collate_fn=list),
        "Lines": lambda: Pipeline(Lines(made["txt"])).batch(2, collate_fn=list),
        "Lines side by side": lambda: Pipeline(Lines(made["txt"], interleave=2)).batch(2, collate_fn=list),
        "TarShards": lambda: Pipeline(TarShards(made["tar"])).batch(2, collate_fn=list),
        "TarShards, compressed": lambda: Pipeline(TarShards(made["gz"])).batch(2, collate_fn=list),
        "ParquetRows": lambda: Pipeline(ParquetRows(made["parquet"])).batch(2, collate_fn=list),
        "ParquetRows in batches": lambda: Pipeline(ParquetRows(made["parquet"], batch_rows=2)),
        "Objects": lambda: Pipeline(Objects(store, prefix="a")).batch(2, collate_fn=list),
        "Objects, keys": lambda: (
            Pipeline(Objects(store, keys=[f"a/{n:03}" for n in keys])).shuffle().batch(2, collate_fn=list)
        ),
        "Channel": channel,
        "DataLoader": lambda: DataLoader(data, 2, shuffle=True),
        "DataLoader, threads": lambda: DataLoader(data, 2, shuffle=True, num_workers=2),
        "DataLoader, generator": lambda: DataLoader(data, 2, shuffle=True, generator=_generator()),
        "DataLoader, seed": lambda: DataLoader(data, 2, shuffle=True, seed=4),
        "DataLoader, any order": lambda: DataLoader(data, 2, shuffle=True, in_order=False, num_workers=2),
        "DataLoader, batch sampler": lambda: DataLoader(data, batch_sampler=BatchSampler(Unequal(), 2, False)),
        "DataLoader, epochs": lambda: DataLoader(data, 2, sampler=DistributedSampler(data, 2, 0)),
        "DataLoader, persistent": lambda: DataLoader(data, 2, shuffle=True, num_workers=2, persistent_workers=True),
        "DataLoader of a stream": lambda: DataLoader(Numbers(), 2),
        "DataLoader of a stream with a state": lambda: DataLoader(Told(300), 40, num_workers=1),
        "in a process": lambda: Pipeline(keys).shuffle(3).batch(2).in_process(),
        "DataLoader of a stream, processes": lambda: DataLoader(Numbers(), 2, num_workers=2, worker_type="process"),
        "DataLoader of lines": lambda: DataLoader(Lines(made["txt"]), 2),
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def channel() -> Pipeline:
    source = Channel(COUNT)
    for number in range(COUNT):
        source.send_nowait(number)
    source.close()
    return Pipeline(source).batch(2)


# -- mutants -----------------------------------------------------------------------------------------------------------

ODD: Final[list[Any]] = [
    *(0, 1, 2, 7, -1, 1 << 31, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 4000, -(1 << 70)),
    *(True, False, None, 0.0, 2.5, 1e300, float("nan"), float("inf"), "", "x", "0x1f", "0x" + "f" * 5000, "-1", "AAAA"),
    *([], [[]], [0], [1, 2], [None, 3], [[0, 1], 2], [[0], 1, [0]], [1, 2, 3, 4], {}, {"at": 3}, {"json": "{}"}),
    *({"at": 1 << 62, "of": "iterable", "state": {"position": 3}}, {"at": 2, "generators": []}),
    *(["0", 1, "2"], [[[[[[1]]]]]], [1] * 1000),
]


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of all that is in `value`, but for what an object of the user's said of itself."""
    if isinstance(value, dict | list):
        for key, part in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
            if key != "state":
                yield value, key
                yield from places_in(part)


def changed(value: Any, chance: random.Random) -> Any:
    """`value`, a little different or something else."""
    if type(value) is int and chance.random() < 0.5:
        return chance.choice([value + 1, value - 1, -value, 2 * value, value + (1 << 40), value << 200, value ^ 64])
    if isinstance(value, str) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return chance.choice([value[:at], value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :], value * 2])
    if isinstance(value, list) and value and chance.random() < 0.7:
        part = chance.choice(value)
        return chance.choice([value[1:], value[:-1], [*value, part], value[::-1], part, [value]])
    return copy.deepcopy(chance.choice(ODD))


def mutant_of(state: dict[str, Any], chance: random.Random) -> Any:
    """A state with one thing that is different, or two or three."""
    mutant = copy.deepcopy(state)
    text = mutant["cursor"]["json"]
    how = chance.random()
    if how < 0.05:
        at = chance.randrange(len(text))
        flipped = text[:at] + chr(ord(text[at]) ^ 1 << chance.randrange(7)) + text[at + 1 :]
        deep = text.replace("[", "[" * 900, 1).replace("]", "]" * 900, 1)
        long = text.replace("0", "9" * 5000, 1)
        mutant["cursor"]["json"] = chance.choice([text[:at], flipped, deep, long, "[" * 100_000])
        return mutant
    varying = json.loads(text)
    tree = varying if how < 0.85 else mutant
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        found = list(places_in(tree))
        if tree is varying and "cursor" in varying and chance.random() < 0.7:
            found = [*places_in(varying["cursor"]), (varying, "cursor")]
        if not found:
            break
        inside, key = chance.choice(found)
        if chance.random() < 0.1:
            del inside[key]
        elif chance.random() < 0.05 and isinstance(inside, dict):
            inside[chance.choice(["x", "drawn", "epochs", "length"])] = chance.choice(ODD)
        else:
            inside[key] = changed(inside[key], chance)
    if tree is varying:
        mutant["cursor"]["json"] = json.dumps(varying)
    return mutant


class FrozenError(Exception):
    """Nothing has come for seconds."""


@pytest.fixture
def watched() -> Iterator[None]:
    """No test is waited for for ever."""

    def rings(*_: Any) -> None:
        raise FrozenError

    before = signal.signal(signal.SIGALRM, rings)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def states_of(make: Callable[[], Any]) -> list[dict[str, Any]]:
    """Of its beginning, of its middle, of its end."""
    loader = make()
    states = [loader.state_dict()]
    for number, _ in zip(range(MOST_BATCHES), loader, strict=False):
        if number in (0, 2, 6):
            states.append(loader.state_dict())
    states.append(loader.state_dict())
    loader.close()
    return states


@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
def test_a_changed_state_is_refused_or_good(tmp_path: Path, watched: None) -> None:
    """At once, with words; else it leads to batches, and to no other error than the data's."""
    for name, make in kinds(tmp_path).items():
        states = states_of(make)
        for number in range(MUTANTS if "process" not in name else 1 + MUTANTS // 12):
            chance = random.Random(f"{name} {number}")
            mutant = mutant_of(chance.choice(states[1:]), chance)
            try:
                try_out(make(), mutant, FACES[number % 2])
            except Exception as error:
                raise AssertionError(f"{name}, mutant {number}: {json.dumps(mutant)[:1000]}") from error


DATA_SAY_SO: Final = (OSError, BrokenDataError)
"""The state leads to a byte or a row that a file does not have: only the file can tell, when it is opened."""


def try_out(loader: Any, state: Any, face: Face) -> None:
    """Load `state`, and go on from it if it is taken; within seconds."""
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        try:
            loader.load_state_dict(state)
        except StateError as refusal:
            if len(str(refusal)) > 1000:
                raise ValueError("more words than anybody reads") from refusal
            return
        with contextlib.suppress(*DATA_SAY_SO), Steps(loader, face) as steps:
            steps.rest(MOST_BATCHES)
        loader.state_dict()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        loader.close()
