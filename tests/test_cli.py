"""The command line: what goes wrong is told in one line on standard error, with an exit code and no traceback."""

import importlib.machinery
import subprocess
import sys
from importlib.util import find_spec

import pytest

import aioloader.__main__ as command_line


def test_doctor_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor` succeeds and names torch."""
    assert command_line.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_it_runs_as_a_module() -> None:
    """`python -m aioloader --help` lists both commands."""
    done = subprocess.run([sys.executable, "-m", "aioloader", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert "doctor" in done.stdout


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
