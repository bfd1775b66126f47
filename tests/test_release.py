"""What would be published: complete, well described, and at work in an environment that has nothing else."""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

import aioloader
from tests.test_docs import ROOT, blocks_of

VERSION = aioloader.__version__


def call(*command: str | Path, cwd: Path, seconds: float = 900) -> str:
    """What a command prints; its failure is the test's, with all that it said."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=seconds, env=environ
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made from it: of what git has, so that nothing of this checkout helps."""
    folder = tmp_path_factory.mktemp("release")
    clean = folder / "source"
    clean.mkdir()
    listed = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            target = clean / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=clean)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_what_is_built_is_complete_and_described(built: tuple[Path, Path]) -> None:
    """The wheel has the package with its type marker, the sdist all that its tests need; both are of this version."""
    sdist, wheel = built
    assert (sdist.name, wheel.name) == (f"aioloader-{VERSION}.tar.gz", f"aioloader-{VERSION}-py3-none-any.whl")
    call(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=ROOT)

    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "aioloader").rglob("*.py")} | {
        "aioloader/py.typed"
    }
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"aioloader-{VERSION}.dist-info/METADATA").decode()
    assert {name for name in names if ".dist-info/" not in name} == package
    assert f"aioloader-{VERSION}.dist-info/licenses/LICENSE" in names
    assert re.findall(r"^Project-URL: (\w+),", metadata, re.MULTILINE) == [
        "Documentation",
        "Source",
        "Issues",
        "Changelog",
    ]
    description = metadata.partition("\n\n")[2]
    source = re.findall(r"^Project-URL: Source, (.+)$", metadata, re.MULTILINE)[0]
    links = re.findall(r"\]\(([^)\s]+)\)", "".join(description.split("```")[::2]))
    assert [link for link in links if not link.startswith("https://")] == [], "they lead nowhere on an index"
    files = [link.removeprefix(f"{source}/blob/main/").partition("#")[0] for link in links if "/blob/main/" in link]
    assert len(files) > 30
    assert [file for file in files if not (ROOT / file).exists()] == []
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert package <= inside
    for name in ("CHANGELOG.md", "SECURITY.md", "Makefile", "constraints.txt", "docs/index.md", "docs/conf.py"):
        assert name in inside, name
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")} <= inside


def test_the_changelog_has_this_version() -> None:
    """A section with notes, below the one of what is not released."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert VERSION in sections
    assert len(text.partition(f"## [{VERSION}]")[2].partition("\n## ")[0].splitlines()) > 10


def pythons() -> Iterator[str]:
    """The oldest Python that is supported and the newest that is here, or those of `AIOLOADER_RELEASE_PYTHONS`."""
    if named := os.environ.get("AIOLOADER_RELEASE_PYTHONS"):
        yield from named.split(os.pathsep)
        return
    folders = [Path(folder) for folder in os.get_exec_path()]
    folders += Path("~/.pyenv/versions").expanduser().glob("*/bin")
    found: dict[int, list[str]] = {sys.version_info.minor: [sys.executable]}
    for folder in folders:
        for file in folder.glob("python3.*"):
            if (match := re.fullmatch(r"python3\.(\d+)", file.name)) and int(match[1]) >= 11:
                found.setdefault(int(match[1]), []).append(str(file))
    versions = sorted(found)
    yield from dict.fromkeys([first_that_runs(found, versions), first_that_runs(found, versions[::-1])])


def first_that_runs(found: dict[int, list[str]], versions: list[int]) -> str:
    """The first Python that is there: what stands on the path may be no more than a word that there is none."""
    here = (python for version in versions for python in found[version])
    return next(python for python in here if not subprocess.run([python, "-c", ""], capture_output=True).returncode)


QUICKSTART = """
import runpy, sys
from importlib.metadata import version

import aioloader

assert version("aioloader") == aioloader.__version__ == sys.argv[2], (version("aioloader"), aioloader.__file__)
assert "site-packages" in aioloader.__file__, aioloader.__file__
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.release
@pytest.mark.parametrize("python", list(pythons()))
def test_the_quickstart_runs_in_a_fresh_environment(built: tuple[Path, Path], tmp_path: Path, python: str) -> None:
    """First the wheel, then the sdist, with nothing but what they ask for."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.partition("## Quickstart\n")[2].partition("\n## ")[0]
    program, check = tmp_path / "quickstart.py", tmp_path / "check.py"
    program.write_text("\n".join(block.code for block in blocks_of(section) if block.language == "python"))
    check.write_text(QUICKSTART)

    call(python, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    here = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    for artifact in reversed(built):
        call(here, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", artifact, cwd=tmp_path, seconds=3000)
        printed = call(here, check, program, VERSION, cwd=tmp_path)
        assert re.search(r"\d", printed), printed  # the sentence of `explain()`, with numbers
        assert "aioloader" in call(here, "-m", "aioloader", "doctor", cwd=tmp_path)
        call(here, "-m", "pip", "uninstall", "-q", "-y", "aioloader", cwd=tmp_path)
