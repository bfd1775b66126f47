"""Real processes under torchrun, which talk by gloo. Each start takes seconds, so there are few."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DistributedSampler

from aioloader import Pipeline

ROOT = Path(__file__).parent.parent
DEADLINE = 90.0

pytestmark = pytest.mark.slow


def torchrun(processes: int, *arguments: str) -> str:
    """What a torchrun of so many processes writes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


Seen = list[tuple[int, int, list[int]]]
"""Epoch, step and indices of each step of each rank."""


# What runs under torchrun is a fixture of the module: the time that a test may take is for what hangs, and processes
# that import torch on two busy cores do not.


@pytest.fixture(scope="module")
def stopped_twice(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """`examples/train_torchrun.py` for two epochs of 8 steps: 5 with 2 processes, 5 more with 3, the rest with 1."""
    trace = tmp_path_factory.mktemp("train_torchrun")
    example = str(ROOT / "examples" / "train_torchrun.py")
    arguments = ["--samples", "192", "--checkpoint", str(trace / "run.pt"), "--trace", str(trace)]
    torchrun(2, example, *arguments, "--stop-after", "5")
    assert "epoch 0: loss" in torchrun(3, example, *arguments, "--stop-after", "10")
    assert re.search(r"epoch 1: loss 0\.\d+ after 16 steps", torchrun(1, example, *arguments))
    found = []
    for path in sorted(trace.glob("*.txt")):
        for line in path.read_text().splitlines():
            epoch, step, *indices = map(int, line.split())
            found.append((epoch, step, indices))
    return found


def test_every_sample_is_seen_once_whatever_the_number_of_processes(stopped_twice: Seen) -> None:
    """In each epoch, though the processes became more and fewer in the middle of it."""
    for epoch in (0, 1):
        indices = [index for number, _, part in stopped_twice if number == epoch for index in part]
        assert Counter(indices) == Counter(range(192))


def test_each_step_is_that_of_a_run_that_was_never_stopped(stopped_twice: Seen) -> None:
    """Between them the processes train on the same samples in each step as one would."""
    whole = Pipeline(range(192)).shuffle(seed=1).batch(24, collate_fn=list)
    expected = [batch for _ in range(2) for batch in whole]
    for number, batch in enumerate(expected, 1):
        parts = [part for _, step, part in stopped_twice if step == number]
        assert len(parts) == (2 if number <= 5 else 3 if number <= 10 else 1)
        assert sorted(index for part in parts for index in part) == sorted(batch)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes of `_torchrun_worker.py` found."""
    folder = tmp_path_factory.mktemp("four_ranks")
    torchrun(4, str(Path(__file__).parent / "_torchrun_worker.py"), str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def test_ranks_come_from_torchrun(four_ranks: list[dict[str, Any]]) -> None:
    """By the environment, and by torch.distributed: complete, and as much on each."""
    order = list(Pipeline(range(26)).shuffle(seed=1))
    for key, samples in (("environment", list(range(26))), ("distributed", order)):
        assert Counter(sample for found in four_ranks for sample in found[key]) == Counter(samples + samples[:2])
        assert {len(found[key]) for found in four_ranks} == {7}
    assert [found["stream"] for found in four_ranks] == [[*range(rank, 24, 4)] for rank in range(4)]


def test_ranks_of_groups_and_meshes(four_ranks: list[dict[str, Any]]) -> None:
    """Ranks that differ in the tensor dimension only get the same samples."""
    assert [found["group"] for found in four_ranks] == [[*range(place, 26, 2)] for place in (0, 0, 1, 1)]
    for key in ("mesh", "pair"):
        assert [found[key] for found in four_ranks] == [[*range(place, 26, 2)] for place in (0, 0, 1, 1)]


def test_one_of_the_ranks_that_get_the_same_reads(four_ranks: list[dict[str, Any]]) -> None:
    """By a dimension of a mesh, or by its group; nothing communicates through the group."""
    for rank, found in enumerate(four_ranks):
        mine = list(range(rank // 2, 26, 2))
        batches = [mine[at : at + 4] for at in range(0, 13, 4)]
        assert found["shared"] == {name: [batches, 0 if rank % 2 else 13] for name in ("mesh", "pair", "group")}, (
            f"rank {rank}"
        )


def test_ranks_agree_on_their_batches(four_ranks: list[dict[str, Any]]) -> None:
    """Of 6, 12, 18 and 24 samples in batches of 3 all ranks give 2, whatever the trainer calls in between."""
    for found in four_ranks:
        assert found["agreed"] == [[2, 2], [2, 2]]
        assert found["agreed on the trainer's own group"] == [2, 2]
        assert "without a process group; pass shard(group=torch.distributed.new_group" in found["refused"]


def test_a_loader_that_nobody_splits_warns_once(four_ranks: list[dict[str, Any]]) -> None:
    """Each rank would train on everything, as under trainers that make ranks and no sampler. Nothing communicates."""
    for found in four_ranks:
        for name, counts in found["warned"].items():
            assert counts == ([1, 1] if name.startswith("unsplit") else [0, 0]), name


def test_torchs_distributed_sampler_under_torchrun(four_ranks: list[dict[str, Any]]) -> None:
    """In our DataLoader: each epoch is shuffled anew, and a resume on as many ranks is exact."""
    for rank, found in enumerate(four_ranks):
        sampler: Any = DistributedSampler(range(26), num_replicas=4, rank=rank, seed=2)  # type: ignore[arg-type]
        epochs = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            keys = list(sampler)
            epochs.append([keys[:4], keys[4:]])
        assert found["sampler"] == epochs[:2]
        assert found["rest"] == found["resumed"] == epochs[2][1:]
