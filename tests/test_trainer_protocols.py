"""What torchtitan 0.3.0 and TRL 1.16.0 ask of a loader, in a fake of each: they are too heavy to install for tests.

torchtitan's trainer takes a `BaseDataLoader`, which is `Stateful` and iterable, and saves it beside the model by
`torch.distributed.checkpoint`, under "dataloader". TRL's trainers are Hugging Face's `Trainer`: an epoch in groups of
`gradient_accumulation_steps` batches, whose resume skips batches by `skip_first_batches`.
"""

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.data
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful

from aioloader import DataLoader, Pipeline
from aioloader.integrations import as_torch_dataloader, transformers_callback

N = 22
STEPS = 6
EPOCHS = 3


async def load(key: int) -> Any:
    return torch.tensor([key])


def make_pipeline() -> Any:
    return Pipeline(range(N)).shuffle(seed=1).map(load, concurrency=8).batch(4)


def make_dataloader() -> Any:
    return DataLoader(range(N), batch_size=4, shuffle=True, num_workers=2)


makers = pytest.mark.parametrize("make", [make_pipeline, make_dataloader])


def keys(batch: Any) -> list[int]:
    found: list[int] = batch.flatten().tolist()
    return found


# -- torchtitan ------------------------------------------------------------------------------------------------------


class BaseDataLoader(Stateful, ABC):
    """As torchtitan's."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]: ...


class Loader(BaseDataLoader):
    """What a user writes: pairs of inputs and labels, without an end."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            for batch in self.loader:
                yield {"input": batch}, batch

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def titan(loader: Loader, first: int, stop: int, folder: Path, save_at: int | None = None) -> list[list[int]]:
    """Its training loop, from step `first` on."""
    if first:
        dcp_load({"dataloader": loader}, checkpoint_id=folder)
    batches, trained = iter(loader), []
    for step in range(first, stop):
        inputs, _ = next(batches)
        trained.append(keys(inputs["input"]))
        if step + 1 == save_at:
            dcp_save({"dataloader": loader}, checkpoint_id=folder)
    return trained


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # it says that there is one process
@pytest.mark.parametrize("save_at", [3, STEPS, STEPS + 4])
@makers
def test_torchtitan_resumes_from_a_distributed_checkpoint(make: Any, save_at: int, tmp_path: Path) -> None:
    """Loaded in place, into a loader that has not been iterated."""
    whole = titan(Loader(make()), 0, EPOCHS * STEPS, tmp_path, save_at)
    torch.manual_seed(8)
    assert titan(Loader(make()), save_at, EPOCHS * STEPS, tmp_path) == whole[save_at:]


# -- TRL, and Hugging Face's Trainer ---------------------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What of accelerate and transformers is used."""
    gradient_state = SimpleNamespace(dataloader_references=[None], active_dataloader=None)
    accelerate: Any = ModuleType("accelerate.state")
    accelerate.is_initialized = lambda: True
    accelerate.GradientState = lambda: gradient_state
    transformers: Any = ModuleType("transformers")
    transformers.TrainerCallback = object
    monkeypatch.setitem(sys.modules, "accelerate.state", accelerate)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    return gradient_state


class SkipDataLoader:
    """As Accelerate makes it of a loader with an iterable dataset."""

    def __init__(self, loader: Any, skip_batches: int, gradient_state: Any) -> None:
        self.dataset = loader.dataset
        self.skip_batches = skip_batches
        self.gradient_state = gradient_state
        self.base: Any = torch.utils.data.DataLoader(
            loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn
        )

    def __iter__(self) -> Iterator[Any]:
        self.gradient_state.active_dataloader = self
        for number, batch in enumerate(self.base):
            if number >= self.skip_batches:
                yield batch
        self.gradient_state.active_dataloader = None


def train(
    loader: Any, callback: Any, gradient_state: Any, *, accumulate: int, save_at: int = -1, resume: str | None = None
) -> tuple[list[list[list[int]]], str]:
    """The Trainer: groups of batches that were stepped, and what it saved after step `save_at`."""
    arguments = SimpleNamespace(gradient_accumulation_steps=accumulate, process_index=0)
    control = SimpleNamespace(should_save=True)
    updates = -(-len(loader) // accumulate)
    state = SimpleNamespace(global_step=0, stateful_callbacks={}, max_steps=EPOCHS * updates)
    if resume is not None:
        state = SimpleNamespace(**json.loads(resume))
    skip = state.global_step % updates * accumulate
    trained, saved, begun = [], "", state.global_step
    callback.on_train_begin(arguments, state, control)
    for epoch in range(state.global_step // updates, EPOCHS):
        source, first = loader, 0
        if state.global_step == begun and skip:
            source, first = SkipDataLoader(loader, skip, gradient_state), skip // accumulate
        else:
            loader.set_epoch(epoch)
        batches = iter(source)
        for update in range(first, updates):
            count = accumulate if update < updates - 1 else len(loader) - (updates - 1) * accumulate
            trained.append([keys(next(batches)) for _ in range(count)])
            state.global_step += 1
            callback.on_step_end(arguments, state, control)
            if state.global_step == save_at:
                saved = json.dumps(vars(state))
        callback.on_epoch_end(arguments, state, control)
    return trained, saved


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("place", ["middle", "end of epoch", "second epoch"])
@makers
def test_trl_resumes_with_accumulated_gradients(make: Any, place: str, accumulate: int, modules: Any) -> None:
    """The last group of an epoch is smaller, and is stepped in a resumed epoch, too."""
    updates = -(-STEPS // accumulate)
    save_at = {"middle": 1, "end of epoch": updates, "second epoch": updates + 1}[place]

    def run(**arguments: Any) -> tuple[list[Any], str]:
        loader = as_torch_dataloader(make())
        return train(loader, transformers_callback(loader), modules, accumulate=accumulate, **arguments)

    whole, saved = run(save_at=save_at)
    torch.manual_seed(8)
    resumed, _ = run(resume=saved)
    assert resumed == whole[save_at:]
    assert len(whole) == EPOCHS * updates
