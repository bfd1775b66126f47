"""Workers keep what they free, where malloc is glibc's and the user has said nothing of it."""

import ctypes
import platform
from typing import Any

import pytest

from aioloader import Pipeline
from aioloader.executors.processes import freed_memory
from aioloader.executors.processes.freed_memory import keep_freed_memory

SETTINGS = [freed_memory._TRIM_THRESHOLD, freed_memory._MMAP_THRESHOLD]


class Glibc:
    """A library that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def mallopt(self, *setting: int) -> int:
        self.told.append(setting)  # type: ignore[arg-type]  # two of them
        return 1

    def gnu_get_libc_version(self) -> bytes:
        return b"2.36"


class Musl(Glibc):
    """One that has a `mallopt`, which does nothing."""

    @property
    def gnu_get_libc_version(self) -> Any:
        raise AttributeError("gnu_get_libc_version: symbol not found")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in freed_memory._SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("library", "told"), [(Glibc(), SETTINGS), (Musl(), [])])
def test_only_glibc_is_told(library: Glibc, told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have other settings, under the same numbers."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    keep_freed_memory()
    assert library.told == told


def test_a_system_without_a_c_library_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is changed, and that is no error."""

    def refuse(name: None) -> Any:
        raise OSError("there is none")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    keep_freed_memory()


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_what_the_user_has_said_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is another malloc."""
    library = Glibc()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setenv(name, "")
    keep_freed_memory()
    assert library.told == []


def accepted(key: int) -> list[int]:
    library = ctypes.CDLL(None)
    return [library.mallopt(*setting) for setting in SETTINGS]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_glibc_accepts_the_settings() -> None:
    """In a worker process."""
    with Pipeline(range(1)).map(accepted, executor="process", concurrency=1) as loader:
        assert list(loader) == [[1, 1]]
