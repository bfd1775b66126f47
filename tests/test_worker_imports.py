"""What worker processes import: the user's modules, once for each loader, and with every epoch a fresh process."""

import asyncio
import importlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aioloader import DataLoader, Pipeline
from tests._support import Face, collect, on_both_faces, workers

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there are no worker processes"),
    pytest.mark.usefixtures("fork_server"),
]

MODULE = """
import os
with open({log!r}, "a") as file:
    file.write(f"{{os.getpid()}}\\n")
print("imported")
{more}
calls = 0

def counted(sample):
    global calls
    calls += 1
    return calls

class Rows:
    def __init__(self):
        self.calls = 0
    def __len__(self):
        return 4
    def __getitem__(self, index):
        self.calls += 1
        return os.getpid(), counted(index), self.calls
"""


class Module:
    """A module of the user's that says who imports it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._log = folder / "log"
        self._path = folder / f"{name}.py"
        self.write("")
        self.module: Any = importlib.import_module(name)

    def write(self, more: str) -> None:
        self._path.write_text(MODULE.format(log=str(self._log), more=more))

    def importers(self) -> list[int]:
        """The processes that have imported it, this one aside."""
        pids = [int(line) for line in self._log.read_text().splitlines()]
        return [pid for pid in pids if pid != os.getpid()]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"users_{tmp_path.name}".replace("-", "_")
    yield Module(tmp_path, name)
    del sys.modules[name]


def loader(dataset: Any, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset, **{"batch_size": None, "num_workers": 2, "worker_type": "process"} | kwargs)


LOADERS: dict[str, Callable[[Any], Any]] = {
    "workers": lambda module: loader(module.Rows()),
    "persistent workers": lambda module: loader(module.Rows(), persistent_workers=True),
    "a stage": lambda module: Pipeline(range(4)).map(module.counted, executor="process", concurrency=2),
    "a closure": lambda module: Pipeline(range(4)).map(
        lambda sample: module.counted(sample), executor="process", concurrency=2
    ),
    "two stages": lambda module: (
        Pipeline(range(4))
        .map(module.counted, executor="process", concurrency=1)
        .filter(bool)
        .map(module.counted, executor="process", concurrency=1)
    ),
    "in_process": lambda module: Pipeline(module.Rows()).map(module.counted).in_process(),
}


@on_both_faces
@pytest.mark.parametrize("name", LOADERS)
def test_a_module_is_imported_once_for_all_workers_and_epochs(face: Face, name: str, made: Module) -> None:
    with LOADERS[name](made.module) as ours:
        for _ in range(3):
            assert len(collect(ours, face)) == 4
    assert len(made.importers()) == 1


def test_each_epoch_has_fresh_workers_all_the_same(made: Module) -> None:
    """Neither the dataset nor a module remembers the epoch before."""
    with loader(made.module.Rows()) as ours:
        pids: set[int] = set()
        for epoch in range(3):
            found = [tuple(map(int, sample)) for sample in ours]
            assert sorted(calls for _, *calls in found) == [[1, 1], [1, 1], [2, 2], [2, 2]]
            mine = {pid for pid, *_ in found}
            assert len(mine) == 2, epoch
            assert not mine & pids
            pids |= mine
            assert not mine & workers()


def test_another_loader_imports_what_the_file_says_by_then(made: Module) -> None:
    for more, expected in (("", 1), ("0", 1), ("def counted(sample): return 7", 1)):
        made.write(more)
        importlib.invalidate_caches()
        with Pipeline(range(1)).map(made.module.counted, executor="process", concurrency=1) as ours:
            assert list(ours) == [expected]
    assert len(made.importers()) == 3


def test_a_worker_that_takes_the_place_of_a_dead_one_imports_nothing(made: Module) -> None:
    with Pipeline(range(4)).map(made.module.counted, executor="process", concurrency=1) as ours:
        others = workers()
        assert list(ours) == [1, 2, 3, 4]
        (mine,) = workers() - others
        os.kill(mine, signal.SIGKILL)
        assert list(ours) == [1, 2, 3, 4]
    assert len(made.importers()) == 1


def test_an_import_that_fails_is_raised_with_its_own_error(made: Module) -> None:
    made.write("raise LookupError('no weights here')")
    with Pipeline(range(4)).map(made.module.counted, executor="process", concurrency=1) as ours:
        for _ in range(2):
            with pytest.raises(LookupError, match="no weights here"):
                list(ours)
        made.write("")
        assert list(ours) == [1, 2, 3, 4]


def test_a_loader_is_closed_while_an_import_hangs(made: Module, tmp_path: Path) -> None:
    """And leaves nothing behind, though other loaders go on."""
    fifo = tmp_path / "begun"
    os.mkfifo(fifo)
    made.write(f"open({str(fifo)!r}, 'w').close()\nimport signal\nwhile True: signal.pause()")
    ours = Pipeline(range(4)).map(made.module.counted, executor="process", concurrency=1)

    async def first() -> None:
        async with ours:
            step = asyncio.ensure_future(anext(aiter(ours)))
            await asyncio.to_thread(lambda: fifo.open().close())  # the import has begun
            step.cancel()
            await asyncio.wait([step])

    asyncio.run(first())


def test_what_an_import_prints_is_printed_once(tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text("print('imported', flush=False)\ndef same(sample): return sample\n")
    script = """
        import sys
        from aioloader import Pipeline
        sys.path.insert(0, sys.argv[1])
        from prints import same
        for _ in range(2):
            with Pipeline(range(8)).map(same, executor="process", concurrency=2) as loader:
                assert len(list(loader)) == 8
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported\n" * 3  # here, and once for each loader
