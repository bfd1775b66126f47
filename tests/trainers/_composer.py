"""composer: any iterable with a length and a `batch_size`, which it spins forward on a resume."""

import contextlib
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


class StandIn(MetaPathFinder, Loader):
    """For torchvision, which composer imports and does not need here: its wheel does not load beside a CPU torch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def exec_module(self, module: types.ModuleType) -> None:
        def anything(attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return type(attribute, (), {})

        module.__getattr__ = anything  # type: ignore[method-assign]


try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    sys.meta_path.append(StandIn())

import composer  # noqa: E402
import torch  # noqa: E402
from composer import ComposerModel, Trainer  # noqa: E402

from tests.trainers._job import Job, Net, loss_of  # noqa: E402

with contextlib.suppress(ImportError):
    import accelerate  # noqa: F401  # before jobs are forked: composer's Trainer imports it

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
    loader, validation = job.loader(), job.validation_loader()
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        eval_dataloader=validation,
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
