"""fastai: any two loaders in `DataLoaders`; it has no way to resume in an epoch."""

from typing import Any

import fastai
from fastai.basics import Callback, DataLoaders, Learner

from tests.trainers._job import Job, Net, loss_of

VERSION = fastai.__version__
RESUMES = False
RANKS = False


class Recorder(Callback):  # type: ignore[misc]
    def __init__(self, job: Job) -> None:
        self.job = job

    def before_batch(self) -> None:
        if self.training:
            self.job.train(self.learn.xb[0])
        else:
            self.job.validate(self.learn.xb[0])

    def before_train(self) -> None:
        self.job.note(length=len(self.learn.dls.train))


def run(job: Job) -> None:
    validation = job.validation_loader()
    dls: Any = DataLoaders(job.loader(), validation)
    learner = Learner(dls, Net(), loss_func=loss_of, lr=0.01, cbs=[Recorder(job)], path=job.folder)
    learner.fit(job.epochs)
    predictions, _ = learner.get_preds(dl=validation)
    assert len(predictions) == 10
