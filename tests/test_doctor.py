"""`aioloader doctor`: facts are collected by one function and told by another."""

import dataclasses
import socket

import pytest
import torch

from aioloader.doctor import OPTIONAL, REQUIRED, Facts, collect, describe
from aioloader.executors.ray.cluster import words_of_named

FACTS = Facts(
    python="3.11.7 (CPython)",
    system="Linux x86_64",
    threading="share the GIL",
    versions={"torch": "2.13.0", "uvloop": "0.23.0", "tqdm": None},
    event_loop="uvloop.Loop",
    accelerators=["cuda:0 H200"],
    torch_built_for="for CUDA 13.0",
    usable_cores=2,
    open_files=1024,
)


def test_it_finds_what_is_installed_here() -> None:
    """The versions are those of the running interpreter, and every known distribution has an entry."""
    facts = collect()
    assert facts.versions["torch"] == torch.__version__
    assert list(facts.versions) == [*REQUIRED, *OPTIONAL]
    assert facts.usable_cores >= 1


def test_a_missing_distribution_is_told_with_its_purpose_and_its_extra() -> None:
    """The last lines say what is missing for what, and how to get it."""
    lines = describe(FACTS).splitlines()
    assert lines[-1] == "tqdm: not installed; progress bars; pip install 'aioloader[progress]'"
    assert not any(line.startswith("tqdm ") for line in lines)


def test_nothing_missing_is_said_too() -> None:
    """With everything installed the last line says so."""
    assert describe(dataclasses.replace(FACTS, versions={"torch": "2.13.0"})).endswith("\nnothing is missing")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "accelerator       cuda:0 H200"),
        ({"accelerators": []}, "accelerator       none found; torch is built for CUDA 13.0"),
        ({}, "open files        at most 1024"),
        ({"open_files": None}, "open files        no limit known"),
        ({}, "loop under `for`  uvloop.Loop"),
        ({"ray": "none named"}, "Ray cluster       none named"),
    ],
)
def test_each_fact_has_a_line(change: dict[str, object], line: str) -> None:
    """Name and value stand in two columns."""
    assert line in describe(dataclasses.replace(FACTS, **change)).splitlines()  # type: ignore[arg-type]


def test_it_tells_which_ray_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whether somebody answers there; nothing is joined."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert words_of_named() == "none named: call ray.init(...), or set RAY_ADDRESS"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert words_of_named().startswith(f"{address} (RAY_ADDRESS) does not answer: ")
        sock.listen()
        assert words_of_named() == f"{address} (RAY_ADDRESS) answers"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert words_of_named() == "auto (RAY_ADDRESS)"
