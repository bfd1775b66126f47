"""Accelerate: keeps track of what is a torch DataLoader; its `save_state` keeps the state of stateful ones."""

from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from aioloader.integrations import as_torch_dataloader
from tests.trainers._job import OURS, Job, Net, loss_of

VERSION = accelerate.__version__


def run(job: Job) -> None:
    stateful = job.kind in (*OURS, "stateful")
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=job.accumulate,
        dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=stateful, use_seedable_sampler=True),
    )
    loader, validation = job.loader(), job.validation_loader()
    if job.kind in OURS:
        loader, validation = as_torch_dataloader(loader), as_torch_dataloader(validation)
    net = Net()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.01)
    model, optimizer, loader, validation = accelerator.prepare(net, optimizer, loader, validation)
    job.kept.append(model)
    job.note(length=len(loader))
    checkpoint = str(job.place / "checkpoint")
    steps, rest = 0, loader
    if job.resumes:
        accelerator.load_state(checkpoint)
        assert job.checkpoint_at is not None
        steps = job.checkpoint_at
        if not stateful:  # as its documentation says for other loaders
            rest = accelerator.skip_first_batches(loader, steps % len(loader))
    gathered = []
    for epoch in range(steps // len(loader), job.epochs):
        loader.set_epoch(epoch)
        for x, y in rest:
            job.train(x)
            with accelerator.accumulate(model):
                loss = loss_of(model(x), y)
                accelerator.backward(loss)
                job.optimizer_steps += accelerator.sync_gradients
                optimizer.step()
                optimizer.zero_grad()
            gathered += accelerator.gather_for_metrics(x).reshape(-1).tolist()
            steps += 1
            if job.steps == job.checkpoint_at and not job.resumes:
                accelerator.save_state(checkpoint)
        rest = loader
    for x, _ in validation:
        job.validate(x)
    job.note(gathered=len(gathered))
    accelerator.end_training()
