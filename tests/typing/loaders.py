"""What a type checker knows of a `DataLoader`, and of the sources of `aioloader.sources`. Nothing runs it."""

from typing import Any, assert_type

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, random_split

from aioloader import DataLoader, Limit, Pipeline, Retry
from aioloader.sources import (
    CursorSource,
    DecodeSample,
    EntryReader,
    Files,
    Lines,
    Objects,
    ParquetRows,
    SourceContext,
    TarShards,
)


class Images(Dataset[tuple[Tensor, int]]):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3), index

    def __len__(self) -> int:
        return 8


class Remote:
    async def __getitem__(self, index: int) -> bytes:
        return b""

    def __len__(self) -> int:
        return 8


class Rows(CursorSource[dict[str, Tensor]]):
    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        raise NotImplementedError


def join(parts: list[bytes]) -> bytes:
    return b"".join(parts)


async def upload(parts: list[bytes]) -> int:
    return len(parts)


def stack(pairs: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, classes = zip(*pairs, strict=True)
    return torch.stack(images), torch.tensor(classes)


def datasets_of_torch(pairs: TensorDataset, images: Dataset[tuple[Tensor, int]]) -> None:
    """Without annotations on `__getitem__`: mypy calls its samples `Any`, and pyright must not refuse them."""
    DataLoader(pairs, 2)
    for first, _ in Pipeline(pairs).shuffle(seed=0).batch(2):
        first.sum()
    for part in random_split(images, [3, 1]):
        Pipeline(part).map(lambda pair: pair[0]).batch(2)
    assert_type(Pipeline(images).batch(2), Pipeline[list[Tensor]])


async def loaders(unknown: Any, untyped: Dataset[Any]) -> None:
    assert_type(DataLoader([1, 2]), DataLoader[Tensor])
    assert_type(DataLoader([1, 2], 8, True, num_workers=2, retry=Retry(3)), DataLoader[Tensor])
    assert_type(DataLoader(["a"], batch_size=8, seed=3), DataLoader[list[str]])
    assert_type(DataLoader(Images(), 8), DataLoader[list[Tensor]])
    assert_type(DataLoader(Images(), 8, collate_fn=stack), DataLoader[tuple[Tensor, Tensor]])
    assert_type(DataLoader(Remote()), DataLoader[list[bytes]])
    assert_type(DataLoader(Remote(), 8, collate_fn=join), DataLoader[bytes])
    assert_type(DataLoader(Remote(), 8, collate_fn=upload), DataLoader[int])
    assert_type(DataLoader(Rows(), 8), DataLoader[dict[str, Tensor]])
    assert_type(DataLoader(Lines("a")), DataLoader[list[str]])
    assert_type(DataLoader(Images(), None), DataLoader[Any])
    assert_type(DataLoader(unknown, 8), DataLoader[Any])
    assert_type(DataLoader(untyped, 8), DataLoader[Any])
    assert_type(DataLoader(Images(), 8, False, None, None, 2, stack), DataLoader[Any])
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(untyped, 8)
    for images, classes in loader:
        assert_type(images, Tensor)
        assert_type(classes, Tensor)
    async for batch in DataLoader(Images(), 8):
        assert_type(batch, list[Tensor])
    assert_type(loader.replay(1), tuple[Tensor, Tensor])


def sources(store: Any, read: bool) -> None:
    assert_type(Pipeline(Lines("a")), Pipeline[str])
    assert_type(Pipeline(Lines("a", decode=len, encoding="utf-8")), Pipeline[int])
    assert_type(Pipeline(Lines("a", decode="json")), Pipeline[Any])
    assert_type(Pipeline(Files("a")), Pipeline[bytes])
    assert_type(Pipeline(Files("a", read="tensor")), Pipeline[Tensor])
    assert_type(Pipeline(Files("a", read=None)), Pipeline[str])
    assert_type(Pipeline(Files("a", with_path=True, watch=True)), Pipeline[tuple[str, bytes]])
    assert_type(Pipeline(Files("a", with_path=read)), Pipeline[Any])
    assert_type(Pipeline(Objects(store, ["a"])), Pipeline[bytes])
    assert_type(Pipeline(Objects(store, prefix="a", read="tensor", with_key=True)), Pipeline[tuple[str, Tensor]])
    assert_type(Pipeline(Objects(store, ["a"], read="buffer")), Pipeline[Any])
    assert_type(Pipeline(TarShards("a")), Pipeline[dict[str, Any]])
    assert_type(Pipeline(TarShards("a", index=True)), Pipeline[dict[str, Any]])
    assert_type(Pipeline(TarShards("a")).map(DecodeSample("torchrgb8")), Pipeline[dict[str, Any]])
    assert_type(Pipeline(ParquetRows("a")), Pipeline[dict[str, Any]])
    assert_type(Pipeline(Rows(), concurrency=Limit(3)), Pipeline[dict[str, Tensor]])
