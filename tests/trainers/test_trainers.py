"""Trainers, run for real, each in processes of its own: three in every run of the tests, all with `-m trainers`.

What is not installed is skipped; `make trainers` installs all of them and writes the table of `docs/trainers.md`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent

LIGHT = {"accelerate": "accelerate", "ignite": "ignite", "lightning": "lightning"}
"""What is small to install, and by which module it is found; part of the dev extra."""

OTHERS = {
    "composer": "composer",
    "fabric": "lightning",
    "fastai": "fastai",
    "hf_trainer": "transformers",
    "keras": "keras",
    "ray": "ray.train",
    "skorch": "skorch",
    "torchtnt": "torchtnt",
}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of its parent
        return False


def run(trainer: str, module: str, kinds: str, *, quick: bool) -> dict[str, Any]:
    """What the one script for all finds."""
    if not installed(module):
        pytest.skip(f"{module} is not installed: pip install 'aioloader[trainers]', or make trainers")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.trainers.run",
        trainer,
        kinds,
        *(["--quick"] if quick else []),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any]) -> None:
    """Each sample once, and every resume exact."""
    assert found["once"] == "once"
    assert set(found["resume"].values()) <= {"exact"}, found["resume"]
    assert found["ranks"] in ("once", "not run")


# What runs the trainer is a fixture of the module: the time that a test may take is for what hangs.


@pytest.fixture(scope="module", params=sorted(LIGHT))
def light(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run(request.param, LIGHT[request.param], "pipeline,seeded", quick=True)


@pytest.mark.slow
def test_a_trainer_killed_in_its_second_epoch_goes_on_exactly(light: dict[str, Any]) -> None:
    """Each sample once per epoch, length and progress right, nothing left; the rest of the epoch, and the one after."""
    for kind in ("pipeline", "seeded"):
        check(light[kind])
        assert light[kind]["resume"] == {"second epoch": "exact"}


@pytest.fixture(scope="module", params=sorted(LIGHT | OTHERS))
def full(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run(request.param, (LIGHT | OTHERS)[request.param], "pipeline,seeded", quick=False)


@pytest.mark.trainers
def test_every_trainer_resumes_exactly_anywhere(full: dict[str, Any]) -> None:
    """In the middle, after the last batch of an epoch, in the second one, and on two ranks."""
    for kind in ("pipeline", "seeded"):
        found = full[kind]
        if full["trainer"] == "torchtnt":  # begins an epoch anew whose last step it has saved, whatever the loader
            assert found["resume"].pop("end of epoch").startswith("39 steps instead of 26")
        check(found)
