"""Train on tar shards in S3, or in anything that speaks S3.

    python examples/s3_tar_training.py BUCKET 'train/shard-{000..003}.tar' --endpoint http://127.0.0.1:5000

Credentials come from the environment (`AWS_ACCESS_KEY_ID`, ...). Shards are streamed, nothing is written to disk; the
next ones are open before the current one ends, and images are decoded in as many threads as there are cores.
"""

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from obstore.store import S3Store
from torch import nn

from aioloader import Pipeline
from aioloader.sources import DecodeSample, TarShards


def to_pair(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Image and class of a decoded sample."""
    return sample["png"].float() / 255, sample["cls"]


async def train(store: S3Store, shards: Sequence[str], epochs: int, batch_size: int) -> float:
    """Train a tiny classifier; returns the mean loss of the last epoch."""
    loader = (
        Pipeline(TarShards(shards, store=store))
        .shuffle(buffer_size=1000)
        .map(DecodeSample("torchrgb8"))
        .map(to_pair)
        .batch(batch_size)
        .to("cuda" if torch.cuda.is_available() else "cpu")
    )
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    if torch.cuda.is_available():
        model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses: list[float] = []
    async with loader:
        for epoch in range(epochs):
            losses = []
            samples = 0
            async for images, classes in loader:
                loss = nn.functional.cross_entropy(model(images), classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                samples += len(classes)
            print(f"epoch {epoch}: {samples} samples, loss {sum(losses) / len(losses):.3f}", flush=True)
    return sum(losses) / len(losses)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bucket")
    parser.add_argument("shards", nargs="+", help="names in the bucket, {000..003} is expanded")
    parser.add_argument("--endpoint", help="of a server other than AWS")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(arguments)
    more: Any = {"endpoint": options.endpoint, "client_options": {"allow_http": True}} if options.endpoint else {}
    store = S3Store(options.bucket, region=options.region, **more)
    asyncio.run(train(store, options.shards, options.epochs, options.batch_size))


if __name__ == "__main__":
    main()
