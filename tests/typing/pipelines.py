"""What a type checker knows of a pipeline. Read by mypy and pyright; nothing runs it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple, TypeGuard, assert_type

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from aioloader import BatchInfo, Limit, Packed, Pipeline
from aioloader.sources import Channel


class Images(Dataset[tuple[Tensor, int]]):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3), index

    def __len__(self) -> int:
        return 8


class Untyped(Dataset):  # type: ignore[type-arg]
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3), index

    def __len__(self) -> int:
        return 8


class Remote:
    async def __getitem__(self, index: int) -> bytes:
        return b""

    def __len__(self) -> int:
        return 8


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


class Point(NamedTuple):
    x: Tensor
    y: int


async def later() -> AsyncIterator[str]:
    yield "a"


def generated() -> Iterator[int]:
    yield 1


async def opened() -> list[int]:
    return [1]


async def fetch(key: int) -> bytes:
    return bytes(key)


def decode(data: bytes) -> Tensor:
    return torch.tensor(list(data))


def pair(key: int) -> tuple[Tensor, int]:
    return torch.zeros(1), key


def pad(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples)


async def pad_later(samples: list[Tensor]) -> dict[str, Tensor]:
    return {"x": torch.stack(samples)}


def is_str(value: str | int) -> TypeGuard[str]:
    return isinstance(value, str)


async def long_enough(key: int) -> bool:
    return key > 1


async def words(line: str) -> AsyncIterator[str]:
    yield line


def sources(unknown: Any) -> None:
    assert_type(Pipeline([1, 2]), Pipeline[int])
    assert_type(Pipeline(range(3)), Pipeline[int])
    assert_type(Pipeline(Images()), Pipeline[tuple[Tensor, int]])
    assert_type(Pipeline(Untyped()), Pipeline[tuple[Tensor, int]])
    assert_type(Pipeline(Remote()), Pipeline[bytes])
    assert_type(Pipeline(Numbers()), Pipeline[int])
    assert_type(Pipeline(later), Pipeline[str])
    assert_type(Pipeline(later()), Pipeline[str])
    assert_type(Pipeline(generated), Pipeline[int])
    assert_type(Pipeline(opened), Pipeline[int])
    assert_type(Pipeline(lambda: [1.5]), Pipeline[float])
    assert_type(Pipeline(torch.zeros(3)), Pipeline[Tensor])
    assert_type(Pipeline(Pipeline([1])), Pipeline[int])
    assert_type(Pipeline(unknown), Pipeline[Any])
    channel: Channel[Point] = Channel(4)
    assert_type(Pipeline(channel), Pipeline[Point])
    assert_type(Pipeline(Channel[int](4)), Pipeline[int])
    assert_type(Pipeline(Images(), sampler=[1, 0], concurrency=Limit(4)), Pipeline[tuple[Tensor, int]])


def functions(texts: Pipeline[str], mixed: Pipeline[str | int], unknown: Pipeline) -> None:
    keys = Pipeline(range(3))
    assert_type(keys.map(fetch), Pipeline[bytes])
    assert_type(keys.map(fetch, concurrency=4, retry=3, hedge=None).map(decode, executor="process"), Pipeline[Tensor])
    assert_type(keys.map(str), Pipeline[str])
    assert_type(keys.map(lambda key: key / 2), Pipeline[float])
    assert_type(keys.map(lambda key: (key, str(key))), Pipeline[tuple[int, str]])
    assert_type(keys.filter(bool), Pipeline[int])
    assert_type(keys.filter(long_enough), Pipeline[int])
    assert_type(keys.filter(lambda key: key > 1), Pipeline[int])
    assert_type(mixed.filter(is_str), Pipeline[str])
    assert_type(texts.flat_map(str.split), Pipeline[str])
    assert_type(texts.flat_map(words), Pipeline[str])
    assert_type(keys.flat_map(lambda key: [key / 2, 1.5]), Pipeline[float])
    assert_type(keys.drop_if(lambda key: key > 1), Pipeline[int])
    assert_type(unknown.map(lambda sample: sample["x"]), Pipeline[Any])
    assert_type(unknown.map(fetch), Pipeline[bytes])


def batches(
    tensors: Pipeline[Tensor],
    names: Pipeline[str],
    records: Pipeline[dict[str, Tensor]],
    counts: Pipeline[dict[str, int]],
    fields: Pipeline[dict[str, Any]],
    points: Pipeline[Point],
    objects: Pipeline[object],
    lists: Pipeline[list[float]],
    unknown: Pipeline,
) -> None:
    assert_type(tensors.batch(4), Pipeline[Tensor])
    assert_type(Pipeline([1]).batch(4, drop_last=True), Pipeline[Tensor])
    assert_type(Pipeline([True]).batch(4), Pipeline[Tensor])
    assert_type(Pipeline([1.5]).batch(4), Pipeline[Tensor])
    assert_type(names.batch(4), Pipeline[list[str]])
    assert_type(names.map(str.encode).batch(4), Pipeline[list[bytes]])
    assert_type(records.batch(4), Pipeline[dict[str, Tensor]])
    assert_type(counts.batch(4), Pipeline[dict[str, Tensor]])
    assert_type(fields.batch(4), Pipeline[dict[str, Any]])
    assert_type(Pipeline(Images()).batch(4), Pipeline[list[Tensor]])
    assert_type(lists.batch(4), Pipeline[list[Tensor]])
    assert_type(Pipeline([("a", 1)]).batch(4), Pipeline[list[Any]])
    assert_type(points.batch(4), Pipeline[Any])
    assert_type(objects.batch(4), Pipeline[Any])
    assert_type(unknown.batch(4), Pipeline[Any])
    assert_type(tensors.batch(4, collate_fn=pad), Pipeline[Tensor])
    assert_type(tensors.batch(4, collate_fn=pad_later, max_wait=0.5), Pipeline[dict[str, Tensor]])
    assert_type(names.batch(4, collate_fn=list), Pipeline[list[str]])
    assert_type(names.batch(4, collate_fn=tuple), Pipeline[tuple[str, ...]])
    assert_type(names.batch(4, collate_fn=lambda texts: len(texts[0])), Pipeline[int])
    assert_type(names.batch_by_length(64, len, collate_fn=list), Pipeline[list[str]])
    assert_type(tensors.batch_by_length(64, len, collate_fn=pad_later), Pipeline[dict[str, Tensor]])
    assert_type(tensors.pack(64), Pipeline[Packed])
    assert_type(tensors.pack(64, length=len).batch(2), Pipeline[Packed])
    assert_type(tensors.batch(4).unbatch(), Pipeline[Tensor])
    assert_type(records.batch(4).unbatch(), Pipeline[dict[str, Tensor]])
    assert_type(names.batch(4).unbatch(), Pipeline[Any])


def several(numbers: Pipeline[int], texts: Pipeline[str], dataset: Images) -> None:
    assert_type(Pipeline.zip(numbers, texts), Pipeline[tuple[int, str]])
    assert_type(Pipeline.zip(numbers, [1.5], later, dataset), Pipeline[tuple[int, float, str, tuple[Tensor, int]]])
    assert_type(Pipeline.merge(numbers, range(3)), Pipeline[int])
    assert_type(Pipeline.interleave(numbers, numbers), Pipeline[int])
    assert_type(Pipeline.mix([numbers, numbers], [3, 1]), Pipeline[int])
    assert_type(Pipeline.mix({"a": texts, "b": texts}, weights={"a": 1, "b": 0.5}), Pipeline[str])


def all_others(texts: Pipeline[str]) -> None:
    assert_type(texts.shuffle(8).take(8).skip(1).repeat(2), Pipeline[str])
    assert_type(texts.enumerate(), Pipeline[tuple[int, str]])
    assert_type(texts.shard(0, 2).share([0, 1]), Pipeline[str])
    assert_type(texts.cache(memory_bytes=100).in_process().pin_memory().to("cpu"), Pipeline[str])
    assert_type(texts.skip_errors(OSError).prefetch(2).max_staleness(1).with_seed(3), Pipeline[str])
    assert_type(texts.with_info(), Pipeline[tuple[str, BatchInfo]])
    assert_type(texts.set_weights({"a": 1}), int | None)
    assert_type(texts.last_batch_info(), BatchInfo | None)


async def faces(texts: Pipeline[str]) -> None:
    for text in texts:
        assert_type(text, str)
    async for text in texts:
        assert_type(text, str)
    for batch, info in texts.batch(2).with_info():
        assert_type(batch, list[str])
        assert_type(info, BatchInfo)
    assert_type(next(iter(texts)), str)
    assert_type(await anext(aiter(texts)), str)
    assert_type(texts.replay(3), str)
    assert_type(await texts.areplay(3), str)
    with texts as same, texts.paused():
        assert_type(same, Pipeline[str])
    async with texts as same:
        assert_type(same, Pipeline[str])
    wider: Pipeline[str | int] = texts
    del wider


async def channels(channel: Channel[int]) -> None:
    await channel.send(1)
    with await channel.reserve() as slot:
        slot.send(2)
    async with channel.sender() as sender:
        await sender.send(3)
    await asyncio.sleep(0)
