"""Keras 3 on torch: `fit(x=...)` takes torch DataLoaders; a callback of a few lines keeps the state."""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras  # which reads its backend from the environment
import numpy as np
import torch

from aioloader.integrations import as_torch_dataloader
from tests.trainers._job import OURS, STEPS, Job, N

VERSION = keras.__version__
RANKS = False  # on torch, Keras has no data-parallel training of its own


class Layer(keras.layers.Dense):  # type: ignore[misc]
    job: Job

    def call(self, inputs: Any, training: Any = None) -> Any:
        if not getattr(keras.src.backend.common.global_state, "building", False) and "meta" not in str(inputs.device):
            numbers = inputs.detach().reshape(-1)
            if training and self.job.fitting:
                self.job.train(numbers)
            elif self.job.fitting:
                self.job.validate(numbers)
        return super().call(inputs / N)


class Checkpoint(keras.callbacks.Callback):  # type: ignore[misc]
    """What a user writes: Keras looks at a first batch before training, so the state is loaded after that."""

    def __init__(self, job: Job, loader: Any) -> None:
        super().__init__()
        self.job, self.loader = job, loader
        self.path = job.place / "loader.pt"

    def on_train_begin(self, logs: Any = None) -> None:
        if self.job.resumes and hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(torch.load(self.path))
        self.job.fitting = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        job = self.job
        if job.steps == job.checkpoint_at and not job.resumes:
            self.model.save(job.place / "model.keras")
            if hasattr(self.loader, "state_dict"):
                torch.save(self.loader.state_dict(), self.path)


def run(job: Job) -> None:
    loader, validation = job.loader(), job.validation_loader()
    if job.kind in OURS:
        loader, validation = as_torch_dataloader(loader), as_torch_dataloader(validation)
    Layer.job = job
    job.fitting = False
    keras.utils.set_random_seed(job.seed)
    model = keras.Sequential([keras.Input((1,)), Layer(1)])
    model.compile(optimizer="sgd", loss="mse")
    epoch = (job.checkpoint_at or 0) // STEPS if job.resumes else 0
    model.fit(
        loader,
        epochs=job.epochs,
        initial_epoch=epoch,
        validation_data=validation,
        callbacks=[Checkpoint(job, loader)],
        verbose=0,
    )
    job.note(length=len(loader))
    assert np.isfinite(model.get_weights()[0]).all()
