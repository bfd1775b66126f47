"""The command line: what goes wrong is told in one line on standard error, with an exit code and no traceback."""

import importlib.machinery
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import aioloader.__main__ as command_line
from aioloader import Pipeline


def test_doctor_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor` succeeds and names torch."""
    assert command_line.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_it_runs_as_a_module() -> None:
    """`python -m aioloader --help` lists the commands."""
    done = subprocess.run([sys.executable, "-m", "aioloader", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert "doctor" in done.stdout
    assert "skipped" in done.stdout
    assert "index" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--epochs", "0"], "--epochs: must be a whole number of at least 1, got '0'"),
        (["demo", "--batch-size", "many"], "--batch-size: must be a whole number of at least 1, got 'many'"),
        (["demo", "--latency-ms", "-1"], "--latency-ms: must be a number from 0 to 60000, got '-1'"),
        (["demo", "--min-accuracy", "nan"], "--min-accuracy: must be a number from 0 to 1, got 'nan'"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the rule and the value found."""
    with pytest.raises(SystemExit) as exited:
        command_line.main(arguments)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without scikit-learn the demo does not start."""

    def without_sklearn(name: str) -> importlib.machinery.ModuleSpec | None:
        return None if name == "sklearn" else find_spec(name)

    monkeypatch.setattr(command_line, "find_spec", without_sklearn)
    assert command_line.main(["demo"]) == 1
    message = capsys.readouterr().err
    assert message == "aioloader: the demo needs scikit-learn; run: pip install 'aioloader[demo]'\n"


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted command says so instead of showing where it stood."""

    def interrupt() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_doctor", interrupt)
    assert command_line.main(["doctor"]) == 130
    assert capsys.readouterr().err == "aioloader: interrupted\n"


def record(key: Any, error: str, second: int, **more: Any) -> str:
    """A line of a report."""
    time = f"2026-01-01T00:00:{second:02}.000+00:00"
    fields = {
        "key": key,
        "epoch": 0,
        "position": key,
        "stage": "map(decode)",
        "error": error,
        "rank": None,
        "time": time,
    }
    return json.dumps({**fields, **more})


def test_skipped_sums_up_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several files as one: how many, the first and last, kinds by stage, and the keys that failed most often."""
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text("\n".join([record(7, "ValueError: bad 7", 5, rank=0), record(8, "OSError: gone", 6, rank=0)]) + "\n")
    other.write_text(
        "\n".join(
            [record(7, "ValueError: bad 7", 1, rank=1, epoch=1), record([7, 9], "OSError: x", 2), '{"key": 1, "er']
        )
    )
    assert command_line.main(["skipped", str(one), str(other)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "4 errors left out, 3 keys, 2 epochs, 2 ranks",
        "first: 2026-01-01T00:00:01.000+00:00  key 7, epoch 1, position 7: ValueError: bad 7",
        "last:  2026-01-01T00:00:06.000+00:00  key 8, epoch 0, position 8: OSError: gone",
        "kinds:",
        "       2  ValueError in map(decode), for instance ValueError: bad 7",
        "       2  OSError in map(decode), for instance OSError: x",
        "keys that failed most often:",
        "       2  7",
        "       1  8",
        "       1  [7, 9]",
        f"not read, since they are no lines of a report: 1 ({other}:3)",
    ]


def test_skipped_reads_what_skip_errors_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two ends fit."""
    report = tmp_path / "skipped.jsonl"
    list(Pipeline([2, 0, 1, 0]).map(lambda number: 1 // number).skip_errors(report=report))
    assert command_line.main(["skipped", str(report)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 errors left out, 1 key, 1 epoch\nfirst: ")
    assert "2  ZeroDivisionError in map(<lambda>), for instance" in said


def test_skipped_of_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    assert command_line.main(["skipped", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == "No error was left out.\n"


def test_skipped_of_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["skipped", str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err == f"aioloader: cannot read '{tmp_path / 'none.jsonl'}': No such file or directory\n"
