"""`make`: what it says when it cannot do what it was asked."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str) -> tuple[int, str]:
    """Its exit status, and what it says is wrong."""
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("there", [True, False], ids=["with a virtual environment", "without"])
def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path, there: bool) -> None:
    venv = tmp_path / "venv"
    if there:
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").touch()
    status, said = make("demo", f"VENV={venv}", "PYTHON=python3.99")
    assert status != 0
    assert "there is no python3.99 here; install it, or name a Python from 3.11 on: make PYTHON=" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("folder", ["aioloader", "examples", "tests"])
def test_a_folder_is_no_word(folder: str) -> None:
    """As `make tests`, where `make test` is meant."""
    status, said = make(folder)
    assert status != 0
    assert f"'{folder}' is a folder and not a word of this Makefile; the words are:" in said
    assert "make test " in said


@pytest.mark.parametrize("word", ["chekc", "tset"])
def test_a_word_that_is_mistyped_lists_those_there_are(word: str) -> None:
    status, said = make(word)
    assert status != 0
    assert f"'{word}' is not a word of this Makefile; the words are:" in said
    assert "make check " in said
