"""Lightning's Trainer: takes any iterable, and keeps the state of a loader that has one."""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.trainers._job import Job, Net, loss_of

VERSION = lightning.__version__


class Module(lightning.LightningModule):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.net = Net()

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.job.train(batch[0])
        return loss_of(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.job.validate(batch[0])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.job.optimizer_steps += 1
        super().optimizer_step(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def run(job: Job) -> None:
    callbacks: list[Any] = []
    if job.checkpoint_at is not None:
        callbacks.append(
            ModelCheckpoint(
                job.place, "checkpoint", every_n_train_steps=job.checkpoint_at, save_on_train_epoch_end=False
            )
        )
    trainer = lightning.Trainer(
        max_epochs=job.epochs,
        accelerator="cpu",
        devices=job.world_size,
        strategy="ddp" if job.world_size > 1 else "auto",
        accumulate_grad_batches=job.accumulate,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=job.folder,
    )
    job.kept.append(trainer)
    checkpoint = str(job.place / "checkpoint.ckpt") if job.resumes else None
    trainer.fit(Module(job), job.loader(), job.validation_loader(), ckpt_path=checkpoint)
    job.note(length=int(trainer.num_training_batches))
