"""The shape of the package: what is public, who imports whom, and who may start tasks and threads.

Read from the source with `ast`, so that an import inside a function or under `TYPE_CHECKING` counts too.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import aioloader
from aioloader.stages.base import Stage
from docs.list_files import PAGE, page, shown_in_design

PACKAGE = Path(aioloader.__file__).parent
DESIGN = PACKAGE.parent / "docs" / "design.md"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

IMPORTS: dict[str, set[str]] = {
    "masking": set(),
    "errors": {"masking"},
    "core": {"errors", "masking"},
    "torch_shims": set(),
    "version": set(),
    "insight": {"core", "masking"},
    "metrics": {"insight", "masking", "version"},
    "memory": {"core"},
    "executors": {"core", "errors", "insight", "memory"},
    "cache": {"core", "errors", "executors"},
    "device": {"errors", "memory"},
    "engine": {"cache", "core", "errors", "executors", "insight"},
    "stages": {"cache", "core", "device", "engine", "errors", "executors", "insight"},
    "sources": {"core", "engine", "errors", "executors", "masking", "memory", "stages"},
    "plan": {"core", "device", "engine", "errors", "executors", "memory", "sources", "stages"},
    "ray": {"executors"},
    "rng": {"core", "executors"},
    "signatures": {"core", "device", "executors", "sources"},
    "loader": {"core", "device", "engine", "errors", "executors", "insight", "memory", "plan", "sources", "stages"},
    "pipeline": {
        "cache", "core", "device", "engine", "executors", "insight", "loader", "plan", "signatures", "sources",
        "stages",
    },
    "drop_in": {
        "core", "device", "engine", "errors", "executors", "insight", "loader", "plan", "sources", "stages",
        "torch_shims",
    },
    "dataloader": {"core", "device", "drop_in", "executors", "signatures", "sources", "torch_shims"},
    "integrations": {"core", "engine", "errors", "loader"},
    "testing": {"core", "device", "errors", "memory"},
    "doctor": {"core", "engine", "executors"},
    "demo": {"dataloader", "pipeline"},
    "top": {"insight", "masking"},
    "indexer": {"core", "errors", "executors", "masking", "sources"},
    "__main__": {"demo", "doctor", "indexer", "insight", "top", "version"},
    "__init__": {"core", "dataloader", "errors", "insight", "pipeline", "rng", "stages", "version"},
}  # fmt: skip
"""What the files of each folder, or a single file, may import of the others."""

TASKS = {"create_task", "ensure_future", "start_soon", "create_task_group", "TaskGroup", "run_coroutine_threadsafe"}
THREADS = {"Thread", "Timer", "start_new_thread", "ThreadPoolExecutor", "to_thread", "run_in_executor"}

MAY_START_TASKS = ("engine/",)
MAY_START_THREADS = ("engine/", "executors/")
EXEMPT = {
    "demo/server.py": "a program of its own, in its own process",
    "executors/ray/chunk_runner.py": "it runs in an actor, which is a process of its own",
    "testing/device.py": "a fake stream is a thread, as a real one runs beside the host",
    "loader/running.py": "`aclose` lends one of anyio's threads to `close`, which waits for other threads",
}


def name_of(path: Path) -> str:
    """A module by its place in the package: `engine/window.py`."""
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """The folder or single file that a module belongs to: `engine`, `plan`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported; of `from a import b` both `a` and `a.b`, since `b` may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(tree: ast.AST) -> set[str]:
    """The parts of aioloader that are imported; a public name counts for the part that defines it."""
    found = set()
    for name in imported(tree):
        package, _, rest = name.partition(".")
        if package != "aioloader" or not rest:
            continue
        part = rest.split(".")[0]
        if part not in IMPORTS:
            part = getattr(aioloader, part).__module__.split(".")[1]
        found.add(part)
    return found


def called(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names in what is called, `anyio.to_thread.run_sync` giving three, and the lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function: ast.expr = node.func
            while isinstance(function, ast.Attribute):
                yield function.attr, node.lineno
                function = function.value
            if isinstance(function, ast.Name):
                yield function.id, node.lineno


def starters(names: set[str], allowed: tuple[str, ...]) -> list[str]:
    """Where one of `names` is called outside the `allowed` folders."""
    return [
        f"{name_of(path)}:{line} {name}"
        for path in MODULES
        if not name_of(path).startswith(allowed) and name_of(path) not in EXEMPT
        for name, line in called(tree_of(path))
        if name in names
    ]


def test_public_names_are_sorted_and_all_there() -> None:
    """`__all__` is what `import aioloader` gives, and nothing else."""
    public = {
        name
        for name, value in vars(aioloader).items()
        if (not name.startswith("_") or name == "__version__") and not isinstance(value, ModuleType)
    }
    assert aioloader.__all__ == sorted(aioloader.__all__)
    assert set(aioloader.__all__) == public


def test_init_holds_the_public_names_and_nothing_else() -> None:
    """A docstring, imports and `__all__`."""
    kinds = [type(node) for node in tree_of(PACKAGE / "__init__.py").body]
    assert set(kinds[1:-1]) == {ast.ImportFrom}
    assert (kinds[0], kinds[-1]) == (ast.Expr, ast.Assign)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_opens_with_what_it_is_for(path: Path) -> None:
    """A docstring, whose first line is a sentence or its beginning."""
    assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"


def test_a_class_name_means_one_thing() -> None:
    """No two classes of the package have the same name."""
    where: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(name_of(path))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    """Description, then engine, then executors and device; engine/ knows nothing of what describes."""
    part = part_of(path)
    assert part in IMPORTS, f"{part} is new: say in IMPORTS, and in docs/design.md, what it may import"
    assert parts_imported(tree_of(path)) - {part} <= IMPORTS[part]


def test_the_one_way_has_no_circle() -> None:
    """The table itself is a graph with one direction."""
    tuple(TopologicalSorter(IMPORTS).static_order())


def test_no_two_modules_need_each_other() -> None:
    """Neither when they run nor for their types: each can be read after those that it imports.

    The one exception: methods of `Pipeline` are in several files, and what they return is a `Pipeline`.
    """
    places = {path: ("aioloader", *path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES}
    modules = {".".join(place).removesuffix(".__init__"): path for path, place in places.items()}
    imports = {
        name: {other for other in imported(tree_of(path)) if other in modules} - {name}
        for name, path in modules.items()
    }
    for name in imports:
        if name.startswith("aioloader.pipeline."):
            imports[name].discard("aioloader.pipeline.pipeline")
    try:
        tuple(TopologicalSorter(imports).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_the_surface_imports_the_two_descriptions() -> None:
    """`pipeline` and `dataloader` are for users, for `__init__` and for the command line."""
    users = {part for part, others in IMPORTS.items() if others & {"pipeline", "dataloader"}}
    assert users <= {"__init__", "__main__", "demo", "doctor"}


ASK_OF_STAGES = {
    "pipeline/described.py": ["To"],
    "plan/agreeing.py": ["Shard"],
    "plan/by_file.py": ["Map", "Shard", "Shard"],
    "plan/for_ray.py": ["InRay", "InRay", "InRay"],
    "plan/mixing.py": ["Repeat"],
    "plan/uneven.py": ["Shard"],
}
"""Who asks of which class a stage is, since the question is of that stage alone. What is asked of any stage it says
itself, in its own file, with a default in `stages/base.py` that promises little."""


def test_a_stage_says_itself_what_it_means() -> None:
    """Outside `stages/` nobody asks of which class one is, but in these places."""
    kinds = {stage.__name__ for stage in stages_below(Stage)} | {"Stage", "FoldStage"}
    asked: dict[str, list[str]] = {}
    for path in MODULES:
        if name_of(path).startswith("stages/"):
            continue
        for node in ast.walk(tree_of(path)):
            classes: ast.AST | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                classes = node.args[1]
            elif isinstance(node, ast.MatchClass):
                classes = node.cls
            found = [] if classes is None else [part.id for part in ast.walk(classes) if isinstance(part, ast.Name)]
            if of_stages := kinds.intersection(found):
                asked.setdefault(name_of(path), []).extend(of_stages)
    assert {name: sorted(of) for name, of in asked.items()} == ASK_OF_STAGES


def test_only_device_knows_cuda() -> None:
    """`torch.cuda` stands in device/, and in the fake of it, nowhere else."""
    found = []
    for path in MODULES:
        tree = tree_of(path)
        mentions = [name for name in imported(tree) if name.startswith("torch.cuda")]
        mentions += [
            f"line {node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr == "cuda"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
        if mentions and not name_of(path).startswith(("device/", "testing/device")):
            found.append(f"{name_of(path)}: {mentions}")
    assert not found


def test_only_the_engine_starts_tasks() -> None:
    """So one supervisor can own them all."""
    assert starters(TASKS, MAY_START_TASKS) == []


def test_only_engine_and_executors_start_threads() -> None:
    """So an epoch's end can wait for them all."""
    assert starters(THREADS, MAY_START_THREADS) == []


def test_the_design_shows_the_tree_as_it_is() -> None:
    """The block in its part on layout names each folder and file of the package once."""
    there = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in PACKAGE.iterdir()
        if path.name not in {"__pycache__", "py.typed"}
    ]
    assert sorted(shown_in_design()) == sorted(there)


def test_each_file_has_its_line() -> None:
    """`docs/files.md` is what its program makes of the docstrings, and these begin with a line that ends there."""
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python docs/list_files.py`"
    open_ended = [line for line in page().splitlines() if line.startswith("- `") and not line.endswith(".")]
    assert not open_ended


def test_files_that_the_design_names_are_there() -> None:
    """By their paths, from the package or the repository; those of stages by their names, in the table of stages."""
    prose = re.sub(r"```.*?```", "", DESIGN.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", prose))
    assert len(named) > 50
    folders = (PACKAGE, PACKAGE.parent, PACKAGE / "stages")
    assert not {name for name in named if not any((folder / name).is_file() for folder in folders)}


def test_the_design_says_what_each_stage_adds() -> None:
    """The table of stages names the file of each."""
    _, _, table = DESIGN.read_text(encoding="utf-8").partition("| stage, file in `stages/` | adds |")
    assert table
    named = {
        name
        for row in table.partition("\n\n")[0].splitlines()
        for name in re.findall(r"(\w+)\.py", row.split(" | ")[0])
    }
    assert named == {stage.__module__.rpartition(".")[2] for stage in stages_below(Stage)}


def stages_below(stage: type[Any]) -> Iterator[type[Any]]:
    """Those of the package that are descriptions of something to be built."""
    for below in stage.__subclasses__():
        yield from stages_below(below)
        if below.__module__.startswith("aioloader.") and not isabstract(below):
            yield below


def test_what_docstrings_document_is_there() -> None:
    """The names below `Attributes:` occur in the class, so that a rename takes its documentation along."""
    stale = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef):
                continue
            doc = ast.get_docstring(node) or ""
            if "Attributes:\n" not in doc or name_of(path).startswith("testing/"):  # inherited there
                continue
            code = {
                part
                for inner in ast.walk(node)
                for part in (getattr(inner, "attr", ""), getattr(inner, "id", ""), getattr(inner, "name", ""))
            } | {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and inner.value is not None}
            section = doc.split("Attributes:\n")[1].split("\n\n")[0]
            stale += [
                f"{name_of(path)}: {node.name}.{name}"
                for name in re.findall(r"^    (\w+): ", section, re.MULTILINE)
                if name not in code
            ]
    assert not stale
