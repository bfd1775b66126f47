"""ignite: any iterable, and a loader is one more thing to save."""

from typing import Any

import ignite
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver

from tests.trainers._job import Job, Net, loss_of

VERSION = ignite.__version__


def run(job: Job) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step(_: Engine, batch: Any) -> float:
        job.train(batch[0])
        optimizer.zero_grad()
        loss = loss_of(net(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        job.optimizer_steps += 1
        return float(loss)

    def evaluate(_: Engine, batch: Any) -> None:
        job.validate(batch[0])

    trainer, evaluator = Engine(step), Engine(evaluate)
    loader, validation = job.loader(), job.validation_loader()
    parts = {"trainer": trainer, "net": net, "optimizer": optimizer}
    if hasattr(loader, "state_dict"):
        parts["loader"] = loader
    name = f"checkpoint-{job.rank}.pt"
    if job.checkpoint_at is not None and not job.resumes:
        saver = Checkpoint(
            parts, DiskSaver(str(job.place), create_dir=True, require_empty=False), filename_pattern=name
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=job.checkpoint_at), saver)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(validation))
    if job.resumes:
        Checkpoint.load_objects(parts, torch.load(job.place / name, weights_only=False))
    trainer.run(loader, max_epochs=job.epochs)
    job.note(length=trainer.state.epoch_length)
