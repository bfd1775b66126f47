"""The benchmarks run, in small; what they measure is nobody's assertion here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bench.__main__ as all_benches
from bench import _rollouts as rollouts
from bench import endless
from bench._checkout import in_checkout
from bench._harness import Contender, Epoch, Report, Target, Tick, parser_for
from bench._measure import race

LONG = {"autotune", "cache", "decode", "failures", "flow", "own_process", "processes", "shards", "share"}
"""Scripts that take ten seconds or more in small: together half of what all of them take."""


def marked(script: str) -> Any:
    """A script, left out of what is run each time if it takes long, or needs a cluster."""
    if script.startswith("ray"):
        return pytest.param(script, marks=pytest.mark.ray)
    return pytest.param(script, marks=pytest.mark.soak) if script in LONG else script


@pytest.mark.slow
@pytest.mark.parametrize("script", [marked(script) for script in all_benches.SCRIPTS])
def test_a_script_runs_at_its_smallest_size(script: str) -> None:
    """Each contender gives every sample, each figure is a line of JSON, and a missed target is no failure."""
    on_gpu = script == "gpu"  # without one it says so, and ends
    command = [sys.executable, "-m", f"bench.{script}", *([] if on_gpu else ["--smallest"])]
    timeout = 400 if script.startswith("ray") else 90  # Ray Data has twelve epochs in it
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    if not on_gpu:
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert rows
        assert all(row["bench"] == script for row in rows)


def test_an_epoch_that_loses_samples_is_no_figure() -> None:
    """A contender that gives fewer samples would look fast."""
    with pytest.raises(RuntimeError, match="cheat: an epoch must give 512 samples, got 0"):
        race([Contender("cheat", lambda: lambda _: None, 512)], 1)


APART = """
import multiprocessing
from bench._measure import Contender, race

def opened():
    return lambda tick: tick(len(multiprocessing.get_start_method()))

if __name__ == "__main__":
    usual = len(multiprocessing.get_start_method())
    for memory in (False, True):
        timings, _ = race([Contender("c", opened)], 1, warm_up=0, apart=True, memory=memory)
        assert timings["c"][0].samples == usual, memory
"""


def test_workers_of_a_contender_apart_start_as_in_a_users_program(tmp_path: Path) -> None:
    """Not spawned because the contender was: torch's first batch would come seconds later, its workers be larger."""
    script = tmp_path / "apart.py"
    script.write_text(APART)
    root = Path(all_benches.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, script], check=False, capture_output=True, text=True, timeout=90, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_targets_are_judged_by_the_ratios_within_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the seconds are half the speed; the verdict is told and is no exit status."""
    report = Report("test", parser_for("test").parse_args(["--smallest"]))

    def taking(seconds: float) -> Epoch:
        def epoch(tick: Tick) -> float:
            tick(10)
            return seconds

        return epoch

    slow = Contender("slow", lambda: taking(2.0), 10)
    fast = Contender("fast", lambda: taking(1.0), 10)
    report.compare("two", [slow, fast], [Target("fast", "speed", "slow", 2), Target("slow", "time", "fast", 1)])
    assert report.finish() == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    verdicts = [(row["value"], row["reached"]) for row in rows if row["what"] == "target"]
    assert verdicts == [(2.0, True), (2.0, False)]
    page = all_benches.page_of({"test": out.splitlines(keepends=True)}, "A note.")
    assert "- test, two: slow takes 2.00 of the time of fast; at most 1." in page
    assert "A note." in page


def test_endless_tells_how_far_ahead_each_source_was(capsys: pytest.CaptureFixture[str]) -> None:
    """The lead is bounded by rooms, not by the number of samples; memory is not judged here."""
    assert endless.main(["--smallest"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    ahead = [row for row in rows if row.get("unit") == "samples at most"]
    assert len(ahead) == len(endless.SOURCES)
    for row in ahead:
        assert row["samples"] == 20 * endless.BATCH
        rooms = 2 * endless.CONCURRENCY + 4 * endless.BATCH + 256 + 8 + 2 * endless.MERGED
        assert row["median"] <= rooms


def test_a_case_runs_in_another_checkout(tmp_path: Path) -> None:
    """With the aioloader of that folder, or not at all."""
    counts: list[int] = []
    root = Path(all_benches.__file__).parents[1]
    epoch = in_checkout(root, "10 ms", 130, is_async=True)
    assert epoch(counts.append) > 0  # type: ignore[operator]
    assert counts == [130]
    with pytest.raises(RuntimeError, match="its process ended with status 1"):
        in_checkout(tmp_path, "10 ms", 130, is_async=True)(counts.append)


def test_rollouts_that_the_consumer_admits_are_not_too_old() -> None:
    """The simulated trainer counts: as many groups as updates take, and the oldest of them."""
    shapes = rollouts.SHAPES
    for name, oldest in (("filter + max_staleness(1)", 1), ("filter + drop_if, no admission", 1)):
        found = rollouts.run(shapes[name], group_seconds=0.0, step_seconds=0.0, steps=6, seed=0)
        assert found.oldest <= oldest
        assert found.per_trained >= 1


@pytest.mark.slow
def test_python_m_bench_writes_a_page(tmp_path: Path) -> None:
    """Of what its scripts print in processes of their own."""
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "endless", "--only", "gpu", "--write", str(page)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== gpu" in done.stdout
    assert "| endless | an async generator | an async generator: " in page.read_text()


def test_every_script_is_run_by_python_m_bench() -> None:
    """A new benchmark cannot be forgotten."""
    folder = Path(all_benches.__file__).parent
    scripts = {path.stem for path in folder.glob("[!_]*.py")}
    assert set(all_benches.SCRIPTS) == scripts
