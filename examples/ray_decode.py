"""Images decoded in actors of a Ray cluster, for data-parallel training under torchrun; one actor may be killed.

Run it on a node of a cluster, or on this machine alone:

    ray start --head
    export RAY_ADDRESS=127.0.0.1:6379
    torchrun --nproc-per-node 2 examples/ray_decode.py --images pictures --kill-at 5

The images must be where all nodes see them. Without `--images` some are drawn. Whatever dies, each image comes once, in
order: what an actor had is decoded again by another one.
"""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aioloader import Pipeline
from aioloader.ray import RayWorkers

GLOBAL_BATCH = 16
SIZE = 32


def decode(path: str) -> tuple[Tensor, int]:
    """In an actor: the image as uint8 [3, SIZE, SIZE] in 0..255, and the class that its name begins with."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB").resize((SIZE, SIZE)))
    return torch.from_numpy(pixels).permute(2, 0, 1), int(Path(path).name.partition("-")[0])


def draw(folder: Path, count: int) -> None:
    """Pictures of two classes: dark and light ones."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        light = number % 2
        pixels = rng.integers(0, 128, (48, 48, 3), dtype=np.uint8) + np.uint8(100 * light)
        Image.fromarray(pixels).save(folder / f"{light}-{number}.jpg")


def kill_an_actor(loader: Pipeline) -> int:
    """As the system does when memory runs out; the process must be of this machine. Returns its number."""
    actors = [actor for stage in loader.stats().stages for actor in stage.actors if actor.pid is not None]
    pid = actors[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def train(paths: Sequence[str], epochs: int, kill_at: int | None, trace: Path | None) -> None:
    """Train a linear classifier."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3 * SIZE * SIZE, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    workers = RayWorkers(cpus=1, retries=3)
    loader = (
        Pipeline(paths)
        .shuffle(seed=1)
        .shard()
        .map(decode, executor=workers, concurrency=2)
        .batch(GLOBAL_BATCH // world_size)
        .with_info()
    )
    step = again = 0
    with loader:
        for epoch in range(epochs):
            right = seen = 0
            for (images, labels), info in loader:
                logits = model(images.flatten(1).float() / 255 - 0.5)
                loss = nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                again += info.attempts > 1
                right += int((logits.argmax(1) == labels).sum())
                seen += len(labels)
                if trace is not None:
                    names = " ".join(Path(str(key)).name for key in info.keys)
                    with (trace / f"{rank}.txt").open("a") as file:
                        file.write(f"{epoch} {names}\n")
                if step == kill_at and rank == 0:
                    print(f"killed an actor, pid {kill_an_actor(loader)}", flush=True)
            if rank == 0:
                print(f"epoch {epoch}: {right / seen:.0%} right, {again} batches with samples made again", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Join the other processes, and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of files whose names begin with a class: 0-….jpg")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="kill an actor of the first rank after this step")
    parser.add_argument("--trace", type=Path, help="a folder for what each rank has seen")
    chosen = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo")
    try:
        with TemporaryDirectory() as drawn:
            shared: list[Any] = [str(chosen.images or drawn)]
            dist.broadcast_object_list(shared)  # that of the first rank
            folder = Path(shared[0])
            if chosen.images is None and dist.get_rank() == 0:
                draw(folder, 160)
            dist.barrier()
            paths = sorted(str(path) for path in folder.iterdir())
            train(paths, chosen.epochs, chosen.kill_at, chosen.trace)
            dist.barrier()  # before the folder of the first rank goes
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
