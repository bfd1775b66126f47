"""Data-parallel training under torchrun, stopped in the middle and gone on with by another number of processes.

Run it:

    torchrun --nproc-per-node 2 examples/train_torchrun.py --checkpoint run.pt --stop-after 100
    torchrun --nproc-per-node 3 examples/train_torchrun.py --checkpoint run.pt

The second run makes the very steps that the first one would have made: the global batch is the same, so each process
gets a larger or smaller part of it. Without torchrun it is one process.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aioloader import Pipeline

GLOBAL_BATCH = 24
FEATURES = 8


class Measurements(torch.utils.data.Dataset[tuple[int, Tensor, Tensor]]):
    """Rows of a linear law with some noise; each is made from its index."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.law = torch.linspace(-1, 1, FEATURES)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(FEATURES, generator=generator)
        return index, x, x @ self.law + 0.1 * torch.randn((), generator=generator)


def train(samples: int, epochs: int, checkpoint: Path, stop_after: int | None, trace: Path | None) -> None:
    """Train from the checkpoint on, if there is one; stop after so many steps of all runs together."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if GLOBAL_BATCH % world_size:
        raise SystemExit(f"the global batch of {GLOBAL_BATCH} does not share out among {world_size} processes")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(FEATURES, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loader = Pipeline(Measurements(samples)).shuffle(seed=1).shard().batch(GLOBAL_BATCH // world_size)
    step = 0
    if checkpoint.exists():
        saved: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])  # on all ranks the same
        step = saved["step"]

    def save() -> None:
        if rank == 0:  # any rank's state is that of all
            parts = {"model": model.module, "optimizer": optimizer, "loader": loader}
            torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, checkpoint)

    with loader:
        for epoch in range(loader.state_dict()["epoch"], epochs):
            for indices, x, y in loader:
                loss = nn.functional.mse_loss(model(x)[:, 0], y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                if trace is not None:
                    with (trace / f"{world_size}-{rank}.txt").open("a") as file:
                        file.write(f"{epoch} {step} {' '.join(map(str, indices.tolist()))}\n")
                if step == stop_after:
                    save()
                    return
            save()
            if rank == 0:
                print(f"epoch {epoch}: loss {loss.item():.4f} after {step} steps", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Join the other processes, and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=4800)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--stop-after", type=int, help="steps, those of earlier runs included")
    parser.add_argument("--trace", type=Path, help="a folder for what each rank has seen")
    chosen = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo")
    try:
        train(chosen.samples, chosen.epochs, chosen.checkpoint, chosen.stop_after, chosen.trace)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
