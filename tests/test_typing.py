"""What type checkers know: `tests/typing` is read by them in `make check`; here is what that cannot say.

An editable install is seen, and the loops of all examples know what a batch is, in a project of somebody else's. What
the signatures claim of batches is so.
"""

import ast
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from aioloader import DataLoader, Packed, Pipeline
from aioloader.core.typevars import T_co
from aioloader.signatures import DataLoaderOptions, OwnOptions
from aioloader.sources import Channel, CursorSource, EntryReader, Files, Lines, Objects, SourceContext
from aioloader.sources.options import FilesOptions, LinesOptions, ObjectsOptions
from aioloader.sources.resolve import StreamData, describe_content
from tests._support import Face, collect, on_both_faces

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = ("torchtitan_loader",)  # what they import
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem not in NOT_INSTALLED)

TAKEN = {  # what the loops of each example take
    "finetune": ["Packed"],
    "grpo": ["list[Group]"],
    "huggingface": ["Tensor", "Tensor"],
    "jsonl_that_grows": ["Tensor", "Tensor"],
    "online": ["dict[str, Tensor]"],
    "pretrain": ["int", "Packed"],
    "ray_decode": ["BatchInfo", "Tensor", "Tensor"],
    "rest_api": ["dict[str, Tensor]"],
    "rollouts": ["dict[str, Tensor]"],
    "s3_tar_training": ["Tensor", "Tensor"],
    "sqlite_that_grows": ["Tensor", "Tensor"],
    "train_torchrun": ["Tensor", "Tensor", "Tensor"],
    "vision": ["Tensor", "Tensor"],
}
PACKED = re.compile(r"tuple\[.*fallback=aioloader\.stages\.packed\.Packed\]")
"""As mypy writes a named tuple, whose keys may be anything."""

LOADERS = (
    "loader",
    "batches",
    "enumerate(loader, done + 1)",
    "loader.progress(f'epoch {epoch}')",
    "loader.take(updates)",
)


# -- in a project that has installed it as editable --------------------------------------------------------------------


def targets_of(tree: ast.AST) -> Iterator[tuple[ast.expr, int]]:
    """What takes a batch, and how much further in than its line the next statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.AsyncFor) and ast.unparse(node.iter) in LOADERS:
            yield node.target, 4
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "await anext(batches)":
            yield node.targets[0], 0


def asking(path: Path) -> str:
    """An example that reveals the types of its batches."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for target, further in sorted(targets_of(ast.parse(text)), key=lambda found: -found[0].lineno):
        names = [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]
        line = lines[target.lineno - 1]
        inside = " " * (len(line) - len(line.lstrip()) + further)
        lines[target.lineno : target.lineno] = [f"{inside}reveal_type({name})" for name in names]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of somebody's, with an environment that has aioloader as `pip install -e` leaves it."""
    folder = tmp_path_factory.mktemp("typing")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "aioloader"):
        (checkout / name).symlink_to(ROOT / name)
    build = "import setuptools.build_meta as backend; backend.build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True, timeout=120)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    user = folder / "user"
    user.mkdir()
    for path in EXAMPLES:
        (user / path.name).write_text(asking(path), encoding="utf-8")
    page = (ROOT / "docs" / "types.md").read_text(encoding="utf-8")
    (user / "page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), encoding="utf-8")
    return user


def run(project: Path, tool: str, *arguments: str) -> str:
    """What a type checker says in the project, of whose environment it knows no more than the interpreter."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    command = [sys.executable, "-P", "-m", tool, *arguments, "."]
    done = subprocess.run(command, cwd=project, env=clean, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


Revealed = dict[str, list[str]]


def revealed(found: Iterable[tuple[str, int, str]]) -> Revealed:
    """By example, the types that are revealed in it, from the top: of a checker's files, lines and types."""
    types: Revealed = {path.stem: [] for path in EXAMPLES}
    for file, _, shown in sorted(found):
        if Path(file).stem in types:
            types[Path(file).stem].append(re.sub(r"(?:\w+\.)+(\w+)", r"\1", PACKED.sub("Packed", shown)))
    return types


def test_mypy_knows_what_a_batch_is_in_every_example(project: Path) -> None:
    """With the settings of this project, and nothing of its paths."""
    python = str(project.parent / "env" / "bin" / "python")
    cache = str(ROOT / ".mypy_cache" / "installed")
    told = run(project, "mypy", f"--python-executable={python}", f"--config-file={ROOT / 'pyproject.toml'}",
               f"--cache-dir={cache}")  # fmt: skip
    lines = re.findall(r'^(.*?):(\d+): note: Revealed type is "(.*)"$', told, re.MULTILINE)
    assert revealed((file, int(line), shown) for file, line, shown in lines) == TAKEN


def test_pyright_knows_what_a_batch_is_in_every_example(project: Path) -> None:
    python = str(project.parent / "env" / "bin" / "python")
    (project / "pyrightconfig.json").write_text(
        json.dumps({"reportPossiblyUnbound": False, "reportPossiblyUnboundVariable": False}), encoding="utf-8"
    )
    told = json.loads(run(project, "pyright", f"--pythonpath={python}", "--outputjson"))["generalDiagnostics"]
    shown = [(each, re.fullmatch(r'Type of ".*" is "(.*)"', each["message"])) for each in told]
    found = [(each["file"], each["range"]["start"]["line"], type_[1]) for each, type_ in shown if type_]
    assert revealed(found) == TAKEN


# -- what is claimed is so ---------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: float
    y: int


ROW = Pipeline([torch.arange(4)]).pack(4)

BATCHES: list[tuple[list[Any], type, type | None]] = [  # samples, what their batch is, and what is in that
    ([torch.zeros(2)] * 3, Tensor, None),
    ([np.zeros(2)] * 3, Tensor, None),
    ([np.float32(2)] * 3, Tensor, None),
    ([1, 2, 3], Tensor, None),
    ([True, False, True], Tensor, None),
    ([1.5, 2.0, 3.0], Tensor, None),
    (["a", "b", "c"], list, str),
    ([b"a", b"b", b"c"], list, bytes),
    ([{"a": torch.zeros(1)}] * 3, dict, Tensor),
    ([{"a": 1, "b": 2}] * 3, dict, Tensor),
    ([(torch.zeros(1), 1, 2.0)] * 3, list, Tensor),
    ([[1, 2]] * 3, list, Tensor),
    ([("a", 1)] * 3, list, None),
    ([Point(1.0, 2)] * 3, Point, Tensor),
]


@on_both_faces
@pytest.mark.parametrize(("samples", "kind", "inner"), BATCHES, ids=lambda value: getattr(value, "__name__", None))
def test_the_default_collate_gives_what_its_types_say(
    face: Face, samples: list[Any], kind: type, inner: type | None
) -> None:
    """Of `batch`, and of the drop-in."""
    loaders: list[Any] = [Pipeline(samples).batch(3), DataLoader(samples, 3)]
    for loader in loaders:
        (batch,) = collect(loader, face)
        assert type(batch) is kind
        if inner is not None:
            parts: Any = batch.values() if isinstance(batch, dict) else batch
            assert {type(part) for part in parts} == {inner}


@on_both_faces
def test_rows_stay_rows(face: Face) -> None:
    documents = [torch.arange(4)] * 4
    assert [type(batch) for batch in collect(Pipeline(documents).pack(4).batch(2), face)] == [Packed, Packed]


@pytest.mark.parametrize(
    ("source", "options", "own"),
    [
        pytest.param(Lines, LinesOptions, {"paths", "decode"}, id="Lines"),
        pytest.param(Files, FilesOptions, {"paths", "read", "with_path"}, id="Files"),
        pytest.param(Objects, ObjectsOptions, {"store", "keys", "read", "with_key"}, id="Objects"),
        pytest.param(
            DataLoader, DataLoaderOptions, {"dataset", "batch_size", "shuffle", "collate_fn"}, id="DataLoader"
        ),
    ],
)
def test_overloads_have_all_arguments(source: type, options: type, own: set[str]) -> None:
    """None is forgotten, and each has the type that it has in the constructor."""
    init: Any = source.__init__  # type: ignore[misc]
    parameters = set(inspect.signature(init).parameters) - {"self"}
    assert set(get_type_hints(options)) | own == parameters
    hints = get_type_hints(init)
    shared = {name: kind for name, kind in get_type_hints(options).items() if hints[name] is not Any}
    assert {name: hints[name] for name in shared if name != "ranges"} == {
        n: k for n, k in shared.items() if n != "ranges"
    }


def test_what_is_passed_by_name_alone_is_told_apart() -> None:
    parameters = inspect.signature(DataLoader.__init__).parameters.values()
    by_name = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert set(get_type_hints(OwnOptions)) == by_name


# -- at run time -------------------------------------------------------------------------------------------------------


class Rows(CursorSource[T_co]):
    def __init__(self) -> None:
        self.path = "rows"

    def open(self, context: SourceContext, cursor: Any) -> EntryReader:
        raise NotImplementedError


@on_both_faces
def test_a_type_may_be_said_and_changes_nothing(face: Face) -> None:
    """Not the samples, not the class, not what is written down."""
    loader = Pipeline[int]([1, 2])
    assert type(loader) is Pipeline
    assert collect(loader, face) == [1, 2]
    assert collect(DataLoader[Tensor]([1, 2], 2), face)[0].tolist() == [1, 2]
    assert isinstance(Channel[int](3), Channel)
    assert repr(loader) == repr(Pipeline([1, 2]))
    told, said = (StreamData(source, call=False, single_use=False) for source in (Rows(), Rows[int]()))
    assert describe_content(told) == describe_content(said)


def test_what_is_pickled_does_not_need_the_type() -> None:
    """It may be a class that the other process cannot find."""

    class Local:
        pass

    loader: Any = pickle.loads(pickle.dumps(Pipeline[Local]([1, 2])))  # type: ignore[list-item]
    assert list(loader) == [1, 2]
