"""The site of the documentation: it builds without a warning, and everything is in it and can be found."""

import re
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from subprocess import run
from urllib.parse import unquote, urlsplit

import pytest

import aioloader
from docs.build_site import lay_out, pages

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"

PUBLIC = ["aioloader", "aioloader.integrations", "aioloader.metrics", "aioloader.sources", "aioloader.testing"]
"""Modules whose names are documented, each in a page of `docs/api/`."""


def navigation() -> set[str]:
    """The pages that the toctrees of `docs/index.md` name, or match."""
    names = {Path(name).with_suffix("").as_posix() for name in pages().values()}
    found = {"index"}
    for tree in re.findall(
        r"```\{toctree\}\n(.*?)```", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.DOTALL
    ):
        for line in tree.splitlines():
            entry = re.sub(r"^.*<(.*)>$", r"\1", line)
            if entry.endswith("/*"):
                found |= {name for name in names if Path(name).match(entry)}
            elif entry and not entry.startswith(":"):
                found.add(entry)
    return found


def test_every_page_is_in_the_navigation() -> None:
    """A page that is in no toctree is found by nobody."""
    names = {Path(name).with_suffix("").as_posix() for name in pages().values()}
    missing, unknown = names - navigation(), navigation() - names
    assert not missing, f"add them to a toctree of docs/index.md: {sorted(missing)}"
    assert not unknown, f"docs/index.md names pages that do not exist: {sorted(unknown)}"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    """All that a user may import has a place in `docs/api/`."""
    described: set[str] = set()
    for page in API.glob("*.md"):
        current = ""
        for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            if kind in ("currentmodule", "automodule"):
                current = name
            elif current == module:
                described.add(name)
    missing = {name for name in import_module(module).__all__ if not name.startswith("__")} - described
    assert not missing, f"add them to a page of docs/api/: {sorted(missing)}"


def test_links_out_of_docs_lead_to_pages_of_the_site(tmp_path: Path) -> None:
    """What is a file in the repository is a page of the site, and examples show their code."""
    lay_out(tmp_path)
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert "](examples/grpo.md)" in index
    assert "](readme.md)" in index
    assert "](guide.md#what-is-slow)" in (tmp_path / "readme.md").read_text(encoding="utf-8")
    assert "```python" in (tmp_path / "examples" / "grpo.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("program", ["finetune", "online", "rest_api", "vision"])
def test_programs_to_begin_with_are_near(program: str, tmp_path: Path) -> None:
    """The first page leads to each of them, and so does the recipe of its kind."""
    lay_out(tmp_path)
    for page in ("index.md", "recipes.md"):
        assert f"](examples/{program}.md)" in (tmp_path / page).read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a page has: anchors, links, the title, and what a browser loads with it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.title = ""
        self._in_title = False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._in_title = tag == "title" and not self.title  # pictures have titles, too
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False

    def handle_data(self, data: str) -> None:
        self.title += data if self._in_title else ""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning; these are errors."""
    folder = tmp_path_factory.mktemp("built") / "site"
    done = run([sys.executable, ROOT / "docs" / "build_site.py", folder], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole(site: Path) -> None:
    """Each page has a title and links that lead somewhere, and loads nothing from elsewhere."""
    found = {file: Page(file) for file in site.rglob("*.html")}
    assert {file.relative_to(site).with_suffix("").as_posix() for file in found} >= navigation()
    for file, page in found.items():
        name = file.relative_to(site)
        assert page.title.endswith(f"aioloader {aioloader.__version__}"), name
        assert [each for each in page.loaded if urlsplit(each).netloc] == [], name
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            to = (file.parent / unquote(target.path)).resolve() if target.path else file
            assert to.is_file(), f"{name} links to {link}"
            if target.fragment and to in found:
                assert unquote(target.fragment) in found[to].anchors, f"{name} links to {link}"


@pytest.mark.slow
def test_the_reference_says_what_docstrings_say(site: Path) -> None:
    """Each public name with its methods, the inherited ones too; as text that reads well and is found by the search."""
    described = set().union(*(Page(file).anchors for file in (site / "api").glob("*.html")))
    for module in PUBLIC:
        names = {f"{module}.{name}" for name in import_module(module).__all__ if not name.startswith("__")}
        assert names <= described, sorted(names - described)
    assert {"aioloader.Pipeline.batch", "aioloader.Pipeline.state_dict", "aioloader.DataLoader.explain"} <= described
    text = (site / "api" / "pipeline.html").read_text(encoding="utf-8")
    assert "```" not in text
    for file in (site / "api").glob("*.html"):  # as it is written, and not `tell=<built-in function print>`
        plain = re.sub("<[^>]+>", "", file.read_text(encoding="utf-8"))
        assert re.findall(r"\w+=&lt;.{0,40}", plain) == [], file.name
    assert "Group samples into batches of" in text
    assert "batch_by_length" in (site / "searchindex.js").read_text(encoding="utf-8")
