"""What the documentation says is true: its Python runs, prints what it says it prints, and its links lead somewhere."""

import contextlib
import inspect
import io
import re
import sys
from dataclasses import dataclass
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from types import ModuleType

import pytest

from aioloader import Pipeline

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RAY = ROOT / "docs" / "ray.md"
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]

NOT_TESTED = re.compile(r"<!-- no test: .*\S.* -->")
"""On the line before a block: why it cannot run here. For what needs a GPU or the network, or begins a
cluster, and nothing else."""

PRINTED = re.compile(r"^\s*# -> (.*)$")
"""A line that a block prints."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: Where its first line of code stands, counted from 1.
    """

    language: str
    line: int
    code: str
    tested: bool


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks; a fence that is never closed is an error."""
    found = []
    lines = text.splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
        else:
            before = lines[opened - 1] if opened else ""
            tested = NOT_TESTED.fullmatch(before.strip()) is None
            code = "\n".join(lines[opened + 1 : number]) + "\n"
            found.append(Block(lines[opened][3:].strip(), opened + 2, code, tested))
            opened = None
    assert opened is None, f"the fence in line {(opened or 0) + 1} is never closed"
    return found


def test_blocks_are_found_with_their_lines() -> None:
    """This file's own reading of Markdown."""
    text = "a\n```python\nx = 1\n```\n<!-- no test: needs a GPU -->\n```python\ny\n```\n```\nplain\n```\n"
    assert blocks_of(text) == [
        Block("python", 3, "x = 1\n", True),
        Block("python", 7, "y\n", False),
        Block("", 10, "plain\n", True),
    ]


@pytest.fixture(scope="module", autouse=True)
def resource_tracker() -> None:
    """Start multiprocessing's resource tracker, which is kept for the life of the process, with its pipe."""
    ensure_running()


@pytest.mark.parametrize("page", [page for page in PAGES if page != RAY], ids=lambda page: page.name)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page and in one namespace, as a reader would type them."""
    run_blocks(page, tmp_path, monkeypatch)


@pytest.mark.usefixtures("ray_cluster")
def test_every_python_block_on_ray_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, on a cluster."""
    run_blocks(RAY, tmp_path, monkeypatch)


def run_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"docs_{page.stem.lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses and pickle look names up
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language != "python" or not block.tested:
            continue
        # With empty lines in front, so that a traceback shows the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, vars(module))
        said = [match[1] for line in block.code.splitlines() if (match := PRINTED.match(line))]
        printed = output.getvalue().splitlines()
        missing = _first_missing(said, printed)
        assert missing is None, f"{page.name}, block in line {block.line}: {missing!r} is not printed, but {printed}"


def _first_missing(said: list[str], printed: list[str]) -> str | None:
    """The first of `said` that does not come in `printed`, in this order."""
    rest = iter(printed)
    return next((line for line in said if line not in rest), None)


STAGE = re.compile(r"`\.(\w+)\((.*?)\)`")


def test_the_guide_shows_stages_as_they_are_called() -> None:
    """Names, defaults, and what is passed by name alone; the guide may leave out none."""
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    table = text[text.index("| stage | meaning |") :].partition("\n\n")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    shown = [match.groups() for cell in cells for match in STAGE.finditer(cell)]
    assert len(shown) > 15
    for name, arguments in shown:
        signature = inspect.signature(getattr(Pipeline, name))
        parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()][1:]
        bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
        written = str(bare).replace("'", '"').replace('<class "Exception">', "Exception")
        assert written == f"({arguments})", name


def test_only_what_needs_a_gpu_or_the_network_is_left_out() -> None:
    """The mark gives the reason: these, a cluster, or a package that is missing and what runs the block instead."""
    for page in PAGES:
        for mark in NOT_TESTED.findall(page.read_text(encoding="utf-8")):
            assert re.search(r"GPU|network|cluster|needs .*; tests/\w+ runs it", mark), f"{page.name}: {mark}"


@pytest.mark.parametrize("page", LINKED, ids=[page.name for page in LINKED])
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    """Files exist, and so do the headings behind a `#`."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links to {target}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
