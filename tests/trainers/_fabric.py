"""Fabric: `setup_dataloaders` takes torch DataLoaders only; `fabric.save` keeps what has a state."""

from typing import Any

import lightning
import torch
from lightning.fabric import Fabric

from aioloader.integrations import as_torch_dataloader
from tests.trainers._job import OURS, Job, Net, loss_of

VERSION = lightning.__version__


def run(job: Job) -> None:
    fabric = Fabric(accelerator="cpu", devices=job.world_size, strategy="ddp" if job.world_size > 1 else "auto")
    fabric.launch()
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    job.kept.append(model)
    plain, validation = job.loader(), job.validation_loader()
    if job.kind in OURS:
        plain, validation = as_torch_dataloader(plain), as_torch_dataloader(validation)
    loader: Any
    loader, validation = fabric.setup_dataloaders(plain, validation)
    job.note(length=len(loader))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "steps": 0}
    if job.kind != "torch":
        state["loader"] = loader
    if job.resumes:
        fabric.load(job.place / "checkpoint.ckpt", state)
    for _ in range(state["steps"] // len(loader), job.epochs):
        for x, y in loader:
            job.train(x)
            optimizer.zero_grad()
            fabric.backward(loss_of(model(x), y))
            optimizer.step()
            job.optimizer_steps += 1
            state["steps"] += 1
            if job.steps == job.checkpoint_at and not job.resumes:
                fabric.save(job.place / "checkpoint.ckpt", state)
    for x, _ in validation:
        job.validate(x)
