"""skorch: `iterator_train` is called as torch's DataLoader is; it has no way to resume in an epoch."""

from functools import partial
from typing import Any

import numpy as np
import skorch
import torch
from skorch import NeuralNetRegressor
from skorch.callbacks import Callback
from torch.utils.data import DataLoader as TorchDataLoader

import aioloader
from aioloader import Pipeline
from tests.trainers._job import BATCH, Job, Loads, N, Net

VERSION = skorch.__version__
RESUMES = False
RANKS = False


class Recorder(Callback):  # type: ignore[misc]
    def __init__(self, job: Job) -> None:
        self.job = job

    def on_batch_begin(self, net: Any, batch: Any = None, training: bool = False, **_: Any) -> None:
        if training:
            self.job.train(batch[0])
        else:
            self.job.validate(batch[0])


def pipeline(dataset: Any, batch_size: int, shuffle: bool = False) -> Any:
    """As torch's DataLoader is called."""
    made = Pipeline(range(len(dataset)))
    return (made.shuffle(seed=1) if shuffle else made).map(Loads(dataset), concurrency=8).batch(batch_size)


def run(job: Job) -> None:
    iterator: Any = {
        "pipeline": pipeline,
        "seeded": partial(aioloader.DataLoader, seed=1),
        "dataloader": aioloader.DataLoader,
        "torch": TorchDataLoader,
    }.get(job.kind)
    if iterator is None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        iterator = StatefulDataLoader
    x = torch.arange(float(N)).reshape(-1, 1)

    def split(dataset: Any, *_: Any) -> Any:
        return dataset, torch.utils.data.Subset(dataset, range(10))

    net = NeuralNetRegressor(
        Net,
        max_epochs=job.epochs,
        batch_size=BATCH,
        iterator_train=iterator,
        iterator_train__shuffle=True,
        iterator_valid=iterator,
        train_split=split,
        callbacks=[Recorder(job)],
        verbose=0,
        lr=0.01,
    )
    net.fit(x, torch.zeros(N, 1))
    assert np.isfinite(net.predict(x)).all()
