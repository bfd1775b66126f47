"""torchtnt: any iterable; its `AutoUnit` reads one batch ahead, and its saver keeps what is stateful through DCP."""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torchtnt.framework.auto_unit import AutoUnit
from torchtnt.framework.callbacks.dcp_saver import DistributedCheckpointSaver
from torchtnt.framework.evaluate import evaluate
from torchtnt.framework.train import train

from aioloader.integrations import as_torch_dataloader
from tests.trainers._job import OURS, Job, Net, loss_of

VERSION = importlib.metadata.version("torchtnt")


class Unit(AutoUnit[Any]):  # type: ignore[misc]
    def __init__(self, job: Job) -> None:
        super().__init__(module=Net(), device=torch.device("cpu"), strategy="ddp" if job.world_size > 1 else None)
        self.job = job

    def compute_loss(self, state: Any, data: Any) -> Any:
        x, y = data
        if state.active_phase.name == "TRAIN":
            self.job.train(x)
        else:
            self.job.validate(x)
        output = self.module(x)
        return loss_of(output, y), output

    def configure_optimizers_and_lr_scheduler(self, module: torch.nn.Module) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.01), None


def run(job: Job) -> None:
    if job.world_size > 1:
        torch.distributed.init_process_group("gloo")
    loader = job.loader()
    if job.kind in OURS:
        loader = as_torch_dataloader(loader, read_ahead=1)
    unit = Unit(job)
    callbacks: list[Any] = []
    if job.checkpoint_at is not None and not job.resumes:
        callbacks.append(DistributedCheckpointSaver(job.folder, save_every_n_train_steps=job.checkpoint_at))
    if job.resumes:
        path = next(Path(job.folder).glob(f"epoch_*_step_{job.checkpoint_at}"))
        DistributedCheckpointSaver.restore(str(path), unit, train_dataloader=loader)
    train(unit, loader, max_epochs=job.epochs, callbacks=callbacks)
    evaluate(unit, job.validation_loader())
    job.note(length=len(loader))
    if job.world_size > 1:
        torch.distributed.destroy_process_group()
