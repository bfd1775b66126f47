"""Hugging Face's Trainer: takes what `get_train_dataloader` returns."""

from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments

from aioloader.integrations import as_torch_dataloader, transformers_callback
from tests.trainers._job import OURS, Dicts, Job, Net, loss_of

VERSION = transformers.__version__


class Model(torch.nn.Module):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.net = Net()
        self.job = job

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        if self.training:
            self.job.train(x)
        else:
            self.job.validate(x)
        return {"loss": loss_of(self.net(x), labels), "logits": x}


class Optimizer(torch.optim.SGD):
    job: Job

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.job.optimizer_steps += 1
        return super().step(*args, **kwargs)


def run(job: Job) -> None:
    loader, validation = job.loader(Dicts()), job.validation_loader(Dicts(10))
    callbacks: list[Any] = []
    if job.kind in OURS:
        loader, validation = as_torch_dataloader(loader), as_torch_dataloader(validation)
        callbacks.append(transformers_callback(loader))

    class MyTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(loader)

        def get_eval_dataloader(self, _: Any = None) -> Any:
            return self.accelerator.prepare(validation)

    model = Model(job)
    Optimizer.job = job
    at = 1000 if job.checkpoint_at is None else job.checkpoint_at // job.accumulate
    arguments = TrainingArguments(
        output_dir=str(job.place / "checkpoints"),
        num_train_epochs=job.epochs,
        save_strategy="no" if job.checkpoint_at is None else "steps",
        save_steps=at,
        gradient_accumulation_steps=job.accumulate,
        eval_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        learning_rate=0.01,
        seed=job.seed,
        remove_unused_columns=False,
    )
    optimizer = Optimizer(model.parameters(), lr=0.01)
    trainer = MyTrainer(model, arguments, eval_dataset=Dicts(10), callbacks=callbacks, optimizers=(optimizer, None))
    job.kept.append(trainer)
    trainer.train(resume_from_checkpoint=job.resumes or None)
    job.note(length=len(trainer.get_train_dataloader()), epoch=trainer.state.epoch)
