"""The benchmarks run, in small; what they measure is nobody's assertion here."""

import json
from pathlib import Path

import pytest

import bench.__main__ as all_benches
from bench import overhead


def test_overhead_prints_a_table_and_a_line_of_json_per_row(capsys: pytest.CaptureFixture[str]) -> None:
    """At its smallest size, each contender gives every sample."""
    assert overhead.main(["--samples", "512", "--rounds", "1", "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["what"] for row in rows] == [
        "bare loop",
        "aioloader, async for",
        "aioloader, for",
        "torch DataLoader, 0 workers",
    ]
    for row in rows:
        assert row["samples"] == 512
        assert row["us_low"] <= row["us_per_sample"] <= row["us_high"]
        assert any(line.startswith(row["what"]) for line in lines)


def test_an_epoch_that_loses_samples_is_no_figure() -> None:
    """A contender that gives fewer samples would look fast."""
    with pytest.raises(RuntimeError, match="an epoch must give 512 samples, got 0"):
        overhead.measure({overhead.BARE: lambda: 0}, 512, 1)


def test_every_script_is_run_by_python_m_bench() -> None:
    """A new benchmark cannot be forgotten."""
    folder = Path(overhead.__file__).parent
    scripts = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    assert set(all_benches.SCRIPTS) == scripts
