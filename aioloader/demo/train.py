"""The demo's three training loops; `python -m aioloader.demo.train TASK` runs one and prints what it measured."""

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from aioloader import DataLoader, Pipeline
from aioloader.demo.client import AsyncDigits, BlockingDigits, fetch, open_session
from aioloader.demo.contender import Assignment, Outcome
from aioloader.demo.data import Example, Sample, decode, read_split
from aioloader.demo.meter import Meter
from aioloader.demo.model import Learner

SEED = 0


async def train_with_async_for(task: Assignment, samples: list[Sample], learner: Learner, meter: Meter) -> str:
    """Train in one coroutine; images are fetched on its own event loop, with its own session."""
    async with open_session(task.connections) as session:

        async def fetch_sample(sample: Sample) -> tuple[bytes, int]:
            name, label = sample
            return await fetch(session, f"{task.url}/{name}"), label

        def decode_sample(fetched: tuple[bytes, int]) -> Example:
            content, label = fetched
            return decode(content), label

        loader = (
            Pipeline(samples)
            .shuffle(seed=SEED)
            .map(fetch_sample, concurrency=task.connections)
            .map(decode_sample)
            .batch(task.batch_size)
            .to(task.device)
        )
        async with loader:
            for epoch in range(task.epochs):
                with meter.epoch(epoch):
                    async for images, labels in loader:
                        with meter.step(len(labels)):
                            learner.step(images, labels)
            return str(loader.explain())


def train_with_for(task: Assignment, samples: list[Sample], learner: Learner, meter: Meter) -> str:
    """Train with a plain `for` loop over the drop-in `DataLoader`; coroutines run on the loader's private loop."""
    dataset = AsyncDigits(task.url, samples, task.connections)
    loader = DataLoader(
        dataset,
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=task.workers,
        concurrency=task.connections,
        device=task.device,
    )
    with loader:
        for epoch in range(task.epochs):
            with meter.epoch(epoch):
                for images, labels in loader:
                    with meter.step(len(labels)):
                        learner.step(images, labels)
        return str(loader.explain())


def train_with_torch(task: Assignment, samples: list[Sample], learner: Learner, meter: Meter) -> str:
    """Train with torch's DataLoader at its best: workers stay alive between epochs, and each keeps its connection."""
    loader = torch.utils.data.DataLoader(
        BlockingDigits(task.url, samples),
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=task.workers,
        persistent_workers=True,
        pin_memory=task.device != "cpu",
    )
    for epoch in range(task.epochs):
        with meter.epoch(epoch):
            for images, labels in loader:
                with meter.step(len(labels)):
                    learner.step(images.to(task.device, non_blocking=True), labels.to(task.device, non_blocking=True))
    return ""


def train(task: Assignment) -> Outcome:
    """Run the training loop of `task`, then test the network on images from disk, which the server does not count."""
    folder = Path(task.folder)
    split = read_split(folder)
    learner = Learner(SEED, task.device)
    meter = Meter(task.name, task.epochs, len(split.train), task.batch_size)
    match task.loader:
        case "async for":
            explanation = asyncio.run(train_with_async_for(task, split.train, learner, meter))
        case "for":
            explanation = train_with_for(task, split.train, learner, meter)
        case "torch":
            explanation = train_with_torch(task, split.train, learner, meter)
    assert meter.first_batch_s is not None
    images, labels = _test_set(folder, split.test)
    return Outcome(
        first_batch_s=meter.first_batch_s,
        samples_per_s=meter.samples_per_s,
        waited_share=meter.waited_share,
        accuracy=learner.accuracy(images.to(task.device), labels.to(task.device)),
        explanation=explanation,
    )


def _test_set(folder: Path, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    images = torch.stack([torch.from_numpy(decode((folder / name).read_bytes())) for name, _ in samples])
    return images, torch.tensor([label for _, label in samples])


def main() -> int:
    """Run the task given as JSON on the command line; print the outcome as JSON."""
    torch.set_num_threads(1)  # for all contenders: the network is too small for more, which would slow the loaders
    try:
        outcome = train(Assignment(**json.loads(sys.argv[1])))
    except KeyboardInterrupt:
        return 130
    print(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
