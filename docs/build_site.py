"""Builds the site: `python docs/build_site.py build/site`, or `make docs`.

Pages are written for two readers: on the site, and in the repository. So they link to files as these lie in the
repository (`../examples/grpo.py`, `../README.md`). Here the pages of `docs/`, those of the root and the examples are
put into one folder, with links that fit it, and Sphinx makes the site of them. Warnings are errors.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

FROM_ROOT = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "bench/RESULTS.md": "results.md",
    "LICENSE": "license.md",
}
"""Files outside of `docs/`, and their pages on the site."""

LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def pages() -> dict[Path, str]:
    """The files that become pages, and the names that these have on the site."""
    found = {file: file.relative_to(DOCS).as_posix() for file in sorted(DOCS.rglob("*.md"))}
    found |= {ROOT / file: name for file, name in FROM_ROOT.items()}
    found |= {file: f"examples/{file.stem}.md" for file in sorted((ROOT / "examples").glob("*.py"))}
    return found


def lay_out(folder: Path) -> None:
    """Write the pages, and what Sphinx needs beside them, into an empty folder."""
    names = pages()
    for file, name in names.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_page(file, name, names), encoding="utf-8")
    for file in DOCS.iterdir():
        if file.is_file() and file.suffix != ".md":
            shutil.copy(file, folder)


def _page(file: Path, name: str, names: dict[Path, str]) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return _example(file.name, text)
    if file.suffix != ".md":
        return f"# {file.name.capitalize()}\n\n```text\n{text}```\n"

    def relinked(link: re.Match[str]) -> str:
        to = names.get(Path(os.path.normpath(file.parent / link[1])))
        return link[0] if to is None else f"]({os.path.relpath(to, Path(name).parent)}{link[2] or ''})"

    return LINK.sub(relinked, text)


def _example(name: str, code: str) -> str:
    """An example as a page: what its docstring says, and all of the program."""
    said = ast.get_docstring(ast.parse(code))
    assert said is not None, f"examples/{name} begins without a docstring"
    title, _, rest = said.partition("\n\n")
    return f"# {name}\n\n{title}\n\n{rest}\n\n```python\n{code}```\n"


def build(output: Path, *, builder: str = "html") -> int:
    """Make the site; returns Sphinx's exit status."""
    with tempfile.TemporaryDirectory(prefix="aioloader-site-") as folder:
        source = Path(folder, "source")
        source.mkdir()
        lay_out(source)
        command = [sys.executable, "-m", "sphinx", "-b", builder, "-q", "-W", "--keep-going"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))  # this code is documented
        environ = os.environ | {"PYTHONPATH": path}
        return subprocess.run(
            [*command, "-d", str(Path(folder, "doctrees")), str(source), str(output)], env=environ
        ).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="the folder of the site")
    return build(parser.parse_args(arguments).output)


if __name__ == "__main__":
    sys.exit(main())
