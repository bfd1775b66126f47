"""Trains a classifier on a Hugging Face dataset: decoded once, augmented anew in each epoch.

    python examples/huggingface.py

The rows are made here, so that nothing is downloaded; `datasets.load_dataset(...)` gives a dataset of the same kind.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from aioloader import Pipeline


def rings(rows: int) -> datasets.Dataset:
    """Points on two rings, as text: something to decode."""
    angles = [2 * math.pi * n / rows * 7 for n in range(rows)]
    radii = [1.0 if n % 2 else 2.0 for n in range(rows)]
    return datasets.Dataset.from_dict(
        {
            "point": [f"{r * math.cos(a):.3f} {r * math.sin(a):.3f}" for r, a in zip(radii, angles, strict=True)],
            "label": [n % 2 for n in range(rows)],
        }
    )


def decode(row: dict[str, Any]) -> tuple[Tensor, int]:
    """A row of the dataset to a sample; runs in threads, and once per row thanks to the cache."""
    return torch.tensor([float(number) for number in row["point"].split()]), row["label"]


def augment(sample: tuple[Tensor, int]) -> tuple[Tensor, int]:
    """Behind the cache: another one in each epoch. The tensor is a copy, which may be changed in place."""
    point, label = sample
    return point.add_(torch.randn(2) * 0.1), label


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print how many of the points are told apart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    rows = Pipeline[dict[str, Any]](rings(options.rows))
    decoded = rows.shuffle(seed=0).map(decode).cache(memory_bytes=1 << 30)
    loader = decoded.map(augment).batch(100)
    for _ in range(options.epochs):
        for points, labels in loader:
            loss = nn.functional.cross_entropy(model(points), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = sum(int((model(points).argmax(1) == labels).sum()) for points, labels in decoded.batch(100))
    cache = next(stage for stage in loader.stats().stages if stage.name.startswith("cache"))
    print(f"accuracy {right / options.rows:.3f} with {cache.hits} of {options.rows} rows from the cache")


if __name__ == "__main__":
    main()
