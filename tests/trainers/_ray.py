"""Ray Train: `prepare_data_loader` in each of its workers; it reads one batch ahead."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model

from aioloader.integrations import as_torch_dataloader
from tests.trainers._job import OURS, Job, Net, loss_of

VERSION = ray.__version__
WORKERS = True  # they are processes of Ray's


def train(settings: dict[str, Any]) -> None:
    """One of its workers."""
    context = ray.train.get_context()
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(context.get_world_rank()), str(context.get_world_size())
    job = Job(**settings)
    plain, validation = job.loader(), job.validation_loader()
    if job.kind in OURS:
        plain, validation = as_torch_dataloader(plain, read_ahead=1), as_torch_dataloader(validation)
    loader: Any = prepare_data_loader(plain)
    model = prepare_model(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    checkpoint = job.place / f"checkpoint-{job.rank}.pt"
    steps = 0
    if job.resumes:
        saved = torch.load(checkpoint)
        steps = saved["steps"]
        model.load_state_dict(saved["model"])
        if hasattr(plain, "load_state_dict"):
            plain.load_state_dict(saved["loader"])
    for epoch in range(steps // len(loader), job.epochs):
        if job.kind == "torch" and job.world_size > 1:
            loader.sampler.set_epoch(epoch)
        for x, y in loader:
            job.train(x)
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
            steps += 1
            if job.steps == job.checkpoint_at and not job.resumes:
                state = plain.state_dict() if hasattr(plain, "state_dict") else None
                torch.save({"steps": steps, "model": model.state_dict(), "loader": state}, checkpoint)
    for x, _ in prepare_data_loader(validation):
        job.validate(x)
    job.note(length=len(loader))
    job.finish()


def run(job: Job) -> None:
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    environment = {"env_vars": {"PYTHONPATH": str(Path.cwd())}}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        trainer = TorchTrainer(
            train,
            train_loop_config=asdict(job),
            scaling_config=ScalingConfig(num_workers=int(job.option or 1), use_gpu=False),
            run_config=RunConfig(storage_path=str(job.place / "ray")),
        )
        trainer.fit()
    except Exception:
        if job.dies:
            os._exit(9)
        raise
    finally:
        ray.shutdown()
