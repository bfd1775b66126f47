"""Writes `docs/files.md`, each file of the package in one line: `python docs/list_files.py`.

The lines are the first ones of the modules' docstrings, and folders stand in the order of the tree in `docs/design.md`.
A test compares the page with the files, so that neither is changed without the other.
"""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "aioloader"
DESIGN = ROOT / "docs" / "design.md"
PAGE = ROOT / "docs" / "files.md"

INTRODUCTION = """\
# Every file in a line

What each file of `aioloader/` is for, in its own words: the first line of its docstring. [The design](design.md)
says how they work together, and [what happens to a sample](design.md#5-layout), file by file; folders are in the order
of its tree.

`python docs/list_files.py` writes this page.
"""


def page() -> str:
    """The page as it should be."""
    return "\n".join([INTRODUCTION, *_lines()])


def shown_in_design() -> list[str]:
    """The files and folders at the top of the tree in `docs/design.md`, in its order: `pipeline/`, `dataloader.py`."""
    tree = re.search(r"```\naioloader/\n(.*?)```", DESIGN.read_text(encoding="utf-8"), re.DOTALL)
    assert tree is not None, "docs/design.md has no tree of the package"
    return re.findall(r"^  (\S+)", tree[1].partition("\ntests/")[0], re.MULTILINE)


def _lines() -> Iterator[str]:
    alone: list[str] = []
    for name in shown_in_design():
        path = PACKAGE / name
        if path.is_file():
            alone.append(f"- `{name}`: {_purpose(path)}")
            continue
        yield f"## `{name}`\n\n{_purpose(path / '__init__.py')}\n"
        yield from (f"- `{of}`: {_purpose(path / of)}" for of in _files(path))
        yield ""
    yield "## The files beside these folders\n"
    yield from alone
    yield ""


def _files(folder: Path) -> list[str]:
    """Below `folder`, but for its own `__init__.py`; those of inner folders come last."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path != folder / "__init__.py"]
    return sorted(names, key=lambda name: (name.count("/"), name))


def _purpose(path: Path) -> str:
    """The first line of its docstring."""
    return path.read_text(encoding="utf-8").partition('"""')[2].partition("\n")[0].removesuffix('"""')


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
