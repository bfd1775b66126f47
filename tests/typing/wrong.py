"""Mistakes that both type checkers find. An ignore that is not needed is an error, too; nothing runs this."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aioloader import DataLoader, Hedge, Pipeline
from aioloader.sources import Channel, Lines


class Images(Dataset[tuple[Tensor, int]]):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3), index

    def __len__(self) -> int:
        return 8


def decode(data: bytes) -> Tensor:
    return torch.tensor(list(data))


async def fetch(key: int) -> bytes:
    return bytes(key)


def two(key: int, other: int) -> int:
    return key + other


def stack(samples: list[Tensor]) -> Tensor:
    return torch.stack(samples)


async def mistakes(texts: Pipeline[str], channel: Channel[int]) -> None:
    keys = Pipeline(range(3))
    Pipeline(3)  # type: ignore[call-overload]  # pyright: ignore
    keys.map(decode)  # type: ignore[arg-type]  # pyright: ignore
    keys.map(fetch).map(fetch)  # type: ignore[arg-type]  # pyright: ignore
    keys.map(two)  # type: ignore[arg-type]  # pyright: ignore
    keys.map(3)  # type: ignore[call-overload]  # pyright: ignore
    keys.map(str, hedge=Hedge())  # type: ignore[arg-type]  # pyright: ignore
    keys.map(str, concurency=3)  # type: ignore[call-overload]  # pyright: ignore
    keys.map(lambda key: key.lower())  # type: ignore[attr-defined]  # pyright: ignore
    keys.filter(decode)  # type: ignore[arg-type]  # pyright: ignore
    keys.flat_map(str.split)  # type: ignore[arg-type]  # pyright: ignore
    keys.flat_map(abs)  # type: ignore[arg-type]  # pyright: ignore
    keys.drop_if(decode)  # type: ignore[arg-type]  # pyright: ignore
    keys.batch("64")  # type: ignore[call-overload]  # pyright: ignore
    keys.batch(64, collate_fn=stack)  # type: ignore[arg-type]  # pyright: ignore
    texts.batch_by_length(64, decode)  # type: ignore[arg-type]  # pyright: ignore
    keys.pack(64, length=decode)  # type: ignore[arg-type]  # pyright: ignore
    keys.to(3.5)  # type: ignore[arg-type]  # pyright: ignore
    DataLoader(Images(), 8, device=3.5)  # type: ignore[call-overload]  # pyright: ignore
    Pipeline.zip(keys, 3)  # type: ignore[call-overload]  # pyright: ignore
    Pipeline.merge(keys, 3)  # type: ignore[call-overload]  # pyright: ignore
    Pipeline.mix([keys, texts], ["a", "b"])  # type: ignore[list-item]  # pyright: ignore
    Pipeline.mix({"a": keys}, [1])  # type: ignore[call-overload]  # pyright: ignore
    DataLoader(3)  # type: ignore[call-overload]  # pyright: ignore
    DataLoader(Images(), collate_fn=stack)  # type: ignore[arg-type]  # pyright: ignore
    DataLoader(Images(), 8, workers=3)  # type: ignore[call-overload]  # pyright: ignore
    Pipeline(Lines("a", decode=len)).map(decode)  # type: ignore[arg-type]  # pyright: ignore
    await channel.send("a")  # type: ignore[arg-type]  # pyright: ignore
    narrow: Pipeline[bool] = keys  # type: ignore[assignment]  # pyright: ignore
    for key in keys:
        key.lower()  # type: ignore[attr-defined]  # pyright: ignore
    async for batch in texts.batch(2):
        batch.sum()  # type: ignore[attr-defined]  # pyright: ignore
    for images, classes in Pipeline(Images()).batch(4):
        images.lower()  # type: ignore[attr-defined]  # pyright: ignore
        classes.upper()  # type: ignore[attr-defined]  # pyright: ignore
    del narrow
