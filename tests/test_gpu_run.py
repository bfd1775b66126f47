"""What is to be run on a machine with a GPU, run here without one: the bench's own logic, and the script for it all."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aioloader.testing import FakeBackend
from bench import gpu

no_gpu = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="the real thing is run by hand")


class InstantEvent:
    """An event of a device that has always done everything."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "InstantEvent") -> float:
        return 1.0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """`torch.cuda` as far as the bench calls it, and the fake device where it opens one."""
    backend = FakeBackend(threads=True)
    for name, fake in (("synchronize", lambda: None), ("_sleep", lambda _: None), ("Event", InstantEvent)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: backend.pin(tensor))
    monkeypatch.setattr(gpu, "open_backend", lambda _: backend)
    return backend


def test_the_bench_measures_each_contender_alone_and_beside_kernels(
    fake_cuda: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bandwidth for all, and beside kernels the overlap and what a batch costs the consumer."""
    sent: list[object] = []

    def send(batch: object) -> object:
        sent.append(batch)
        return batch

    monkeypatch.setattr(gpu, "spdl_transfer", lambda: send)
    rows = {row.what: row for row in gpu.measure(1, 3, 1, "cuda")}
    contenders = [
        "Transfer, page-locked",
        "Transfer, pageable",
        "Transfer, shared",
        "tensor.to(device), page-locked",
        "tensor.to(device), pageable",
        "pin_memory().to(device), pageable",
        "SPDL, pageable",
    ]
    assert set(rows) == {
        "bare copy, page-locked",
        "kernels alone",
        "page-locking, shared",
        *contenders,
        *(f"kernels + {name}" for name in contenders),
    }
    for name in contenders:
        alone, both = rows[name], rows[f"kernels + {name}"]
        assert alone.gigabytes_per_second
        assert alone.share is not None
        assert both.overlap is not None
        assert both.consumer_us is not None
    assert len(sent) == 2 * 2 * 3  # alone and beside kernels, warm-up and one round, three batches
    assert not fake_cuda.problems


def test_an_error_of_the_device_thread_is_the_benchs(fake_cuda: FakeBackend) -> None:
    """It does not wait for a batch that never comes."""

    def fail(batch: Any) -> Any:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        gpu.on_its_own_thread(fake_cuda, fail, lambda batch: batch, None, 3, 0, [])
    fake_cuda.close()


@pytest.mark.slow
@no_gpu
def test_the_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    """All parts are run without pytest-asyncio, and write their files; the status tells that nothing was measured."""
    shadow = tmp_path / "without" / "pytest_asyncio"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('not on this machine')")
    results = tmp_path / "results"
    done = subprocess.run(
        ["bash", "bench/gpu_run.sh", results],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
        cwd=Path(gpu.__file__).parents[1],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(shadow.parent)},
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "there is no GPU here" in done.stdout
    assert f"torch {torch.__version__}" in (results / "machine.txt").read_text()
    assert " skipped" in (results / "tests.txt").read_text()
    assert "no CUDA device was found" in (results / "bench.txt").read_text()
    assert {path.name for path in results.iterdir()} == {
        "machine.txt", "tests.txt", "tests.xml", "bench.txt", "bench.jsonl"
    }  # fmt: skip
