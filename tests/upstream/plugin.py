"""A plugin of pytest: the loaders in the modules that are collected are ours, and outcomes are counted."""

import inspect
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from aioloader import DataLoader

__all__ = ["Plugin"]


class Stateful(DataLoader[Any]):
    """Ours, which takes the argument of torchdata's that has no meaning here."""

    def __init__(self, dataset: Any, *args: Any, snapshot_every_n_steps: int = 1, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)


class Plugin:
    """Counts what passes and fails.

    Attributes:
        outcomes: By the name of a test, `Class::test`: passed, failed or skipped.
        errors: Of those that failed, the last line of what pytest says.
    """

    def __init__(self, worker_type: str) -> None:
        self.outcomes: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self._loaders: dict[str, Any] = {"DataLoader": DataLoader, "StatefulDataLoader": Stateful}
        if worker_type == "process":
            self._loaders = {name: partial(loader, worker_type=worker_type) for name, loader in self._loaders.items()}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: Any) -> Any:
        module = inspect.getmodule(collector.obj) if not isinstance(collector.obj, ModuleType) else collector.obj
        if module is not None:
            for name_there, ours in self._loaders.items():
                if hasattr(module, name_there):
                    setattr(module, name_there, ours)
        yield

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = "::".join(report.nodeid.split("::")[1:])
        if report.failed:
            self.outcomes[name] = "failed"
            self.errors[name] = str(report.longrepr).strip().splitlines()[-1][:200]
        elif report.when == "call" or report.skipped:
            self.outcomes.setdefault(name, report.outcome)
