"""The examples run, on small data, and do what they say."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> dict[str, Any]:
    """The names of an example, as `python examples/{name}.py` has them, not run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=f"examples_{name}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch's own: on a machine that does other things too, they wait for each other for most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rollouts_train_a_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """A channel fed by tasks: the policy gets better while they play."""
    example("rollouts")["main"](["--updates", "40"])
    said = capsys.readouterr().out.split()
    assert said[:2] == ["mean", "reward"]
    assert float(said[5]) > float(said[2])


def test_huggingface_trains_on_a_cached_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a `datasets.Dataset`, decoded once and augmented in each epoch."""
    pytest.importorskip("datasets")
    example("huggingface")["main"](["--rows", "400", "--epochs", "30"])
    said = capsys.readouterr().out.split()
    assert float(said[1]) > 0.9
    assert said[3] == said[5] == "400"
