"""Train on a JSONL file while another process writes it.

    python examples/jsonl_that_grows.py rows.jsonl --steps 100

Each row is `{"x": [...], "y": 0.5}`. A row is a sample as soon as its line end is written; when there are no more, the
loader waits for the system to tell that the file has grown, and polls nothing.
"""

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aioloader import Pipeline
from aioloader.sources import Lines


def to_pair(row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and target of a row."""
    return torch.tensor(row["x"]), torch.tensor([row["y"]])


async def train(path: Path, steps: int, batch_size: int) -> float:
    """Train a linear model for so many steps; returns the last loss."""
    loader = Pipeline(Lines(path, decode="json", follow=True)).map(to_pair).batch(batch_size)
    model: nn.Linear | None = None
    loss = torch.tensor(0.0)
    async with aclosing(aiter(loader)) as batches:
        step = 0
        async for inputs, targets in batches:
            if model is None:
                model = nn.Linear(inputs.shape[1], 1)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}: {len(inputs)} rows, loss {loss.item():.4f}", flush=True)
            if step == steps:
                break
    return loss.item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(arguments)
    asyncio.run(train(options.path, options.steps, options.batch_size))


if __name__ == "__main__":
    main()
