"""The runner of torch's and torchdata's own tests, with a file of ours in their place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.upstream.different import DIFFERENT, reason_of

ROOT = Path(__file__).parent.parent

THEIRS = """
import unittest

import aioloader
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader


class TestLoader(unittest.TestCase):
    def test_ours(self):
        assert DataLoader is aioloader.DataLoader
        assert sum(DataLoader(range(4))) == 6
        loader = StatefulDataLoader(range(4), snapshot_every_n_steps=2)
        assert isinstance(loader, aioloader.DataLoader)

    def test_partial_workers(self):
        iter(DataLoader(range(4)))._workers

    def test_new(self):
        assert False, "nobody knows"
"""


def test_a_reason_is_found_by_the_name_of_a_test_or_of_its_class() -> None:
    assert reason_of("TestDataLoader::test_bulk_loading_nobatch") == DIFFERENT["test_bulk_loading_nobatch"]
    assert reason_of("TestEndOfEpochBehavior_shard0::test_x") == DIFFERENT["TestEndOfEpochBehavior_shard0"]
    assert reason_of("TestSnapshotZero_shard2::test_map") != reason_of("TestSnapshotZero_shard2::test_generator")


@pytest.mark.slow
def test_the_runner_swaps_the_loaders_and_tells_what_is_known(tmp_path: Path) -> None:
    pytest.importorskip("torchdata", reason="needs the package torchdata")
    path = tmp_path / "test_theirs.py"
    path.write_text(THEIRS)
    command = [sys.executable, "-m", "tests.upstream"]
    environment = os.environ | {"AIOLOADER_UPSTREAM": str(path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=90, check=False, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert "1 passed, 0 skipped, 2 failed" in done.stdout
    assert f"1 different by design: {DIFFERENT['test_partial_workers']}" in done.stdout
    assert "not known: TestLoader::test_new" in done.stdout
