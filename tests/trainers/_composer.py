"""composer: any iterable with a length; on its own it spins a loader forward to where it was."""

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any


def stand_in(name: str) -> None:
    """For torchvision, which composer imports and does not use here: its builds for CUDA do not load beside a CPU torch."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []

    def anything(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (), {})

    module.__getattr__ = anything  # type: ignore[method-assign]
    sys.modules[name] = module


try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    for part in ("", ".transforms", ".transforms.functional", ".models", ".models._utils", ".models.segmentation",
                 ".datasets", ".ops", ".utils"):  # fmt: skip
        stand_in("torchvision" + part)

import composer
import torch
from composer import Callback, ComposerModel, Trainer
from composer.utils import reproducibility  # noqa: F401

from tests.trainers._job import Job, Net, loss_of

VERSION = composer.__version__


class Model(ComposerModel):  # type: ignore[misc]
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.net = Net()
        self.job = job

    def forward(self, batch: Any) -> Any:
        if self.training:
            self.job.train(batch[0])
        else:
            self.job.validate(batch[0])
        return self.net(batch[0])

    def loss(self, outputs: Any, batch: Any, *_: Any, **__: Any) -> Any:
        return loss_of(outputs, batch[1])

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        return self.forward(batch)

    def get_metrics(self, is_train: bool = False) -> Any:
        return {}

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        pass


def run(job: Job) -> None:
    model = Model(job)
    checkpoint: dict[str, Any] = {}
    if job.checkpoint_at is not None and not job.resumes:
        checkpoint = {
            "save_folder": job.folder,
            "save_interval": f"{job.checkpoint_at}ba",
            "save_filename": "b{batch}.pt",
            "save_latest_filename": None,
        }
    if job.resumes:
        checkpoint = {"load_path": str(job.place / f"b{job.checkpoint_at}.pt")}
    loader = job.loader()
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        eval_dataloader=job.validation_loader(),
        max_duration=f"{job.epochs}ep",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        device="cpu",
        seed=1,
        progress_bar=False,
        **checkpoint,
    )
    trainer.fit()
    job.note(length=int(trainer.state.dataloader_len))  # type: ignore[arg-type]
    trainer.close()
