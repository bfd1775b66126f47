"""Twenty loaders, each saved in six ways at three places of its second epoch: all go on with what was to come."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests._ways_of_saving import (
    LOADERS,
    PLACES,
    Training,
    as_json,
    by_dcp,
    by_dcp_async,
    by_torch_load,
    by_torch_save,
    from_dcp,
    from_json,
    make,
)
from tests.test_torchrun import torchrun

WAYS: dict[str, tuple[Callable[[Path, Any], None], Callable[[Path, Any], None]]] = {
    "json": (as_json, from_json),
    "torch.save": (by_torch_save, by_torch_load),
    "dcp": (by_dcp, from_dcp),
    "dcp, async": (by_dcp_async, from_dcp),
}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")


def fresh(name: str) -> Any:
    """A loader in a program of another seed, which has drawn some numbers."""
    torch.manual_seed(77)
    torch.rand(5)
    return make(name)


def check(name: str, folder: Path, save: Callable[[Path, Any], None], load: Callable[[Path, Any], None]) -> None:
    """At each place."""
    for place in PLACES:
        where = folder / place
        where.mkdir()
        training = Training(name, place, lambda loader, where=where: save(where, loader))  # type: ignore[misc]
        loader = fresh(name)
        load(where, loader)
        assert training.goes_on(loader), place


def test_there_are_twenty() -> None:
    assert len(LOADERS) == 20


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_loader_goes_on(way: str, name: str, tmp_path: Path) -> None:
    """In one process."""
    check(name, tmp_path, *WAYS[way])


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that two processes have saved together."""
    folder = tmp_path_factory.mktemp("saved_by_two")
    torchrun(2, str(Path(sys.modules[Training.__module__].__file__ or "")), str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
def test_one_process_goes_on_from_a_checkpoint_of_two(name: str, saved_by_two: Path) -> None:
    """Resharded: all ranks had the same state, and it is there once."""
    for place in PLACES:
        expected = [
            json.loads((saved_by_two / f"expected-{rank}.json").read_text())[f"{name}/{place}"] for rank in range(2)
        ]
        assert expected[0] == expected[1]
        training = Training.__new__(Training)
        training.expected = expected[0]
        loader = fresh(name)
        from_dcp(saved_by_two / name / place, loader)
        assert training.goes_on(loader), place


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
    yield accelerate.Accelerator(cpu=True)
    for state in ("AcceleratorState", "GradientState", "PartialState"):
        getattr(accelerate.state, state)._reset_state()


@pytest.mark.parametrize("name", LOADERS)
def test_accelerate_goes_on(name: str, accelerator: Any, tmp_path: Path) -> None:
    """`save_state` and `load_state`, with the loader registered; they put the random generators back, too."""

    def save(folder: Path, loader: Any) -> None:
        accelerator.register_for_checkpointing(loader)
        accelerator.save_state(str(folder))
        accelerator._custom_objects.clear()

    def load(folder: Path, loader: Any) -> None:
        accelerator.register_for_checkpointing(loader)
        accelerator.load_state(str(folder))
        accelerator._custom_objects.clear()

    check(name, tmp_path, save, load)
